"""The quality demo: equal budgets, tasks with one right answer, runs that can be stopped, and the lesson of one layer."""
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

DEMO = Path(__file__).resolve().parent.parent / "demos" / "quality.py"
sys.path.insert(0, str(DEMO.parent))
import quality as q


def demo(*flags):
    return subprocess.run([sys.executable, str(DEMO), *flags], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    flags = "--device", "cpu", "--dtype", "float32", "--jobs", "2"
    done = demo("--quick", "--json", str(folder / "quality.json"), "--out", str(folder / "new" / "quality.png"), *flags)
    assert done.returncode == 0, done.stderr
    return folder / "quality.json", folder / "new" / "quality.png", done.stdout


@pytest.fixture(scope="module")
def figures(run):
    return json.loads(run[0].read_text(encoding="utf-8"))


def key(record):
    return q.Run(*(record[field] for field in q.Run._fields))


def test_all_planned_runs_are_there_with_shares_of_answers(figures):
    assert sorted(map(key, figures["runs"])) == sorted(q.plan(q.QUICK))
    assert figures["made"][0]["command"].startswith("python demos/quality.py --quick") and figures["made"][0]["commit"]
    for record in figures["runs"]:
        assert record["learning_rate"] in q.QUICK["rates"] and 0 <= record["score"] <= 1
        shares = sum(record.get("curves", {}).values(), [*record.get("accuracy", {}).values()])
        assert all(0 <= share <= 1 for share in shares)
        for n, taught, own in record.get("chat", []):
            assert 0 <= taught <= n and 0 <= own <= n


def test_all_rows_train_the_same_number_of_answer_tokens_within_a_batch(figures):
    for seed in (*range(q.QUICK["seeds"]), q.SWEEP_SEED):
        runs = {r["row"]: r for r in figures["runs"] if (r["task"], r["model"], r["seed"]) == ("dialogues", "2 layers", seed)}
        assert set(runs) == set(q.ROWS) and len({r["budget"] for r in runs.values()}) == 1
        for r in runs.values():
            assert r["budget"] <= r["answer_tokens"] < r["budget"] + r["largest_step"]
        one_pass = [(r["steps"], r["tokens"], r["answers"]) for row, r in runs.items() if row != "prefix"]
        assert len(set(one_pass)) == 1  # the very same batches
        assert runs["prefix"]["tokens"] / runs["prefix"]["answers"] > 1.5 * runs["ism"]["tokens"] / runs["ism"]["answers"]


def test_tables_and_picture(run):
    _, picture, text = run
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    assert all(f"{part}. " in text for part in (1, 2, 3, 4)) and "not scores on those benchmarks" in text
    again = demo("--json", str(run[0]), "--out", str(picture))  # drawn from the file, without training
    assert again.returncode == 0 and again.stdout[again.stdout.index("1. "):] == text[text.index("1. "):]


def test_a_stopped_run_goes_on_to_the_same_figures(figures, run, tmp_path):
    path = tmp_path / "quality.json"
    cut = [r for r in figures["runs"] if r["row"] in ("prefix", "ism") and r["seed"] == 1 or r["model"] == "1 layer"]
    rest = figures | {"runs": [r for r in figures["runs"] if r not in cut]}
    q.train_all(rest, [key(r) for r in cut], path, 2, "cpu", "float32")
    before, after = ({key(r): {k: v for k, v in r.items() if k != "seconds"} for r in figures["runs"]}
                     for figures in (figures, json.loads(path.read_text(encoding="utf-8"))))
    assert len(cut) > 3 and before == after


@pytest.mark.parametrize("shift", [True, False])
def test_with_one_layer_causal_and_ism_give_the_same_answers(shift):
    assert max(q.one_layer(1, seed, shift) for seed in range(100)) == 0
    assert sum(q.one_layer(2, seed, shift) > 1e-3 for seed in range(100)) > 90


def test_the_tasks_have_one_answer_which_their_queries_tell():
    rng = random.Random(0)
    for _ in range(300):
        for query, answer in q.missing(rng):
            second = query.index(q.SECOND)
            assert {answer} == set(query[1:second]) - set(query[second:])
        for query, answer in q.once(rng):
            assert [answer] == [x for x in query[1:-1] if query.count(x) == 1]
        after = {}
        for query, answer in q.chain(rng):
            after |= {query[i + 1]: query[i + 2] for i, token in enumerate(query) if token == q.LINK}
            ask, x = query[-2:]
            for _ in range(ask - q.ASK):
                x = after[x]
            assert x == answer


def test_lists_are_made_of_queries_and_answers():
    for task in q.TASKS.values():
        split = q.Lists(task, 50, "a seed")
        rng = random.Random("a seed")
        for row, (start, end) in enumerate(zip(split.offsets, split.offsets[1:])):
            tokens, segments = split.tokens[start:end], split.segments[start:end]
            for turn, (query, answer) in enumerate(task(rng)):
                assert tokens[segments == 2 * turn + 1].tolist() == query
                assert tokens[segments == 2 * turn + 2].tolist() == [answer]
            assert (np.diff(segments) >= 0).all() and segments[-1] == 2 * turn + 2
            assert len(tokens) <= q.Settings().block_size and tokens.max() < q.VOCABULARY


def test_the_rate_is_the_best_of_a_whole_sweep():
    rng = random.Random(0)
    size = q.FULL
    for run in [run for run in q.plan(size) if not run.rate]:
        scores = [rng.random() for _ in q.rates(run.task, size)]
        model = run.model if run.task != "dialogues" and run.model != "1 layer" else "2 layers"
        records = [q.Run(run.task, model, run.row, q.SWEEP_SEED, rate)._asdict() | {"score": score}
                   for rate, score in zip(q.rates(run.task, size), scores)]
        others = [q.Run("dialogues", "2 layers", "none", q.SWEEP_SEED, 1.0)._asdict() | {"score": 2.0}]
        assert q.best_rate(run, records + others, size) == q.rates(run.task, size)[int(np.argmax(scores))]
        assert q.best_rate(run, records[1:] + others, size) is None


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_intervals_hold_the_mean_as_often_as_they_say(n):
    values = np.random.default_rng(n).normal(size=(4000, n))
    held = np.mean([abs(v.mean()) < q.half_width(v) for v in values])
    assert abs(held - 0.95) < 0.015


def test_self_chat_counts_what_teacher_forcing_does_and_agrees_with_it_in_the_first_turn():
    size = q.QUICK | {"dialogues": 30, "steps": 200, "chats": 30, "longest": 60}
    s = q.settings(q.Run("dialogues", "2 layers", "ism", 0), size, "cpu", "float32")
    s = q.replace(s, n_embd=64, block_size=512, batch_size=1)  # so long that no dialogue is cut
    tokenizer, test = q.Tokenizer(), q.Split(q.data(s), "test")
    model, _ = q.fit(s, test, tokenizer.vocab_size)  # learns most of these few dialogues by heart
    _, answers = q.evaluate(model, test, q.MASKS["ism"], s, torch.device("cpu"), torch.float32)
    n, taught, own = zip(*q.self_chat(model, tokenizer, test, answers, s, size))
    for turn, counts in enumerate(zip(n, taught)):
        right = answers[answers[:, 1] == 2 * turn + 2, 2]
        assert counts == (len(right), right.sum())
    assert taught[0] == own[0] > 5 and sum(n) / 2 < sum(own) <= sum(n) == len(answers)


@pytest.mark.parametrize("flags, line", [
    (("--quick", "--json", "/dev/null/file"), "quality.py: cannot write /dev/null/file"), (("--json", "no/such.json"), "quality.py: [Errno"),
    (("--json", __file__), f"quality.py: {__file__} holds no figures"),
    (("--quick", "--seeds", "0"), "quality.py: expected"), (("--quik",), "quality.py: unrecognized"),
    (("--quick", "--device", "none"), "quality.py: --device none is not")])
def test_errors_are_one_line(flags, line):
    done = demo(*flags)
    assert done.returncode == 1 and done.stderr.startswith(line) and done.stderr.count("\n") == 1


def test_figures_of_another_size_are_not_mixed(run):
    done = demo("--full", "--json", str(run[0]))
    assert done.returncode == 1 and "another size" in done.stderr and done.stderr.count("\n") == 1


def test_help_and_plan(tmp_path):
    text = demo("--help").stdout
    assert all(flag in text for flag in ("--quick", "--full", "--json", "--out", "--jobs", "--device"))
    planned = demo("--plan", "--json", str(tmp_path / "none.json")).stdout.splitlines()
    assert len(planned) == 1 + len(q.plan(q.FULL)) == 1 + len(set(q.plan(q.FULL)))
