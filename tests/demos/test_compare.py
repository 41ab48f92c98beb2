"""The comparison of a published model under two masks: dialogues, runs and their figures."""

import collections
import json
import random
import re

import pytest
from conftest import ROOT
from helpers import make_folder, run

from demos import compare
from demos.compare import LAST, ORDINALS, Comparison, gsm8k, question_last, sources, splits

ALL = "question last,dialogues,gsm8k"


def names(text):
    return re.split(", | or ", text)


def solved(family, query):
    """The answer, from the query's text alone."""
    if family == "the n-th":
        listed, ordinal = re.fullmatch(r"Names: (.*)\. Which is the (\w+)\?", query).groups()
        return names(listed)[ORDINALS.index(ordinal)]
    if family == "only once":
        listed, = re.fullmatch(r"Names: (.*)\. Which is there only once\?", query).groups()
        once, = [name for name, n in collections.Counter(names(listed)).items() if n == 1]
        return once
    if family == "missing":
        needed, there = re.fullmatch(r"I need (.*)\. I have (.*)\. What.*", query).groups()
        gone, = {*names(needed)} - {*names(there)}
        return gone
    if family == "options first":
        listed, found, *others = re.fullmatch(
            r"Is it (.*)\? (.*) found the key, after (.*) and (.*) had.*", query).groups()
        assert {found, *others} < {*names(listed)}
        return found
    boss = dict(re.findall(r"(\S+) reports to (\S+)\.", query))
    start, = re.findall(r"boss of (\S+)'s boss", query)
    return boss[boss[start]]


def test_each_answer_follows_from_its_query():
    seen = collections.Counter()
    for dialogue in question_last("train", 500, 0):
        messages = dialogue["messages"]
        assert [m["role"] for m in messages] == ["user", "assistant"] * 4
        for query, answer in zip(messages[::2], messages[1::2]):
            seen[dialogue["family"]] += 1
            assert answer["content"] == solved(dialogue["family"], query["content"]) + "."
    assert {*seen} == {*LAST} and min(seen.values()) > 200


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """Files in the form of GSM8K's."""
    folder, rng = tmp_path_factory.mktemp("gsm8k"), random.Random(0)
    for name, n in (("train", 300), ("test", 60)):
        lines = []
        for i in range(n):
            a, b = rng.randint(1, 99), rng.randint(1, 99)
            worked = f"It is {a} + {b} = <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}"
            record = {"question": f"{name} {i}: {a} and {b}?", "answer": worked}
            lines.append(json.dumps(record))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_stories_lose_their_marks_alone(stories):
    for dialogue in gsm8k(stories / "train.jsonl"):
        query, answer = (message["content"] for message in dialogue["messages"])
        a, b = map(int, re.findall(r"(\d+) and (\d+)", query)[0])
        assert answer == f"It is {a} + {b} = {a + b}.\n#### {a + b}"


def test_no_dialogue_is_in_two_splits_and_a_seed_gives_the_same(stories, tmp_path):
    c = Comparison(gsm8k=str(stories), init_from=str(make_folder(tmp_path / "model")), kinds=ALL)
    texts = {}
    for seed in (0, 1):
        for split in ("train", "val", "test"):
            kinds = sources(c, split, 100, seed)
            again = sources(c, split, 100, seed)
            for kind in kinds:
                said = [json.dumps(dialogue) for dialogue in kinds[kind]]
                assert said == [json.dumps(dialogue) for dialogue in again[kind]]
                n = {"val": 30, "test": 60}.get(split, 100) if kind == "gsm8k" else 100
                assert len(said) == n
                texts.setdefault((split, kind), set()).update(said)
    for kind in ("question last", "dialogues", "gsm8k"):
        found = [texts[split, kind] for split in ("train", "val", "test")]
        assert len(set.union(*found)) == sum(map(len, found))
    made = splits(c, 0, tmp_path)
    assert made["train"].family_names == sorted(made["train"].family_names)
    assert {"gsm8k", "mixed", "missing"} <= {*made["train"].family_names}
    assert [*made["test"]] == [*made["val"]] == ["question last", "dialogues", "gsm8k"]


@pytest.fixture(scope="module")
def made(stories, tmp_path_factory):
    """A small comparison: its folder, its flags, what it printed."""
    folder = tmp_path_factory.mktemp("compare")
    model = make_folder(folder / "model")
    flags = "--full --seeds 0-1 --steps 4 --every 2 --n 40 --rank 2 --rates 1e-3,1e-12".split()
    flags += ["--init_from", str(model), "--gsm8k", str(stories), "--runs", str(folder / "runs")]
    flags += ["--json", str(folder / "real.json"), "--out", str(folder / "real.png")]
    flags += ["--kinds", ALL]
    done = run("demos/compare.py", *flags)
    assert done.returncode == 0, done.stderr
    return folder, flags, done.stdout


def test_each_mask_runs_at_its_best_rate(made):
    folder, _, said = made
    figures = json.loads((folder / "real.json").read_text(encoding="utf-8"))
    assert figures["command"].startswith("python demos/compare.py --full --seeds 0-1")
    runs = collections.defaultdict(list)
    for record in figures["runs"]:
        runs[record["mask"], record["seed"]].append(record)
        assert record["steps"] == [1, 2, 4]
        assert [*record["curves"]] == [*record["end"]] == ["question last", "dialogues", "gsm8k"]
        for curve in record["curves"].values():
            assert all(loss > 0 and 0 <= right <= 1 for loss, right in curve)
    for mask in ("causal", "ism"):
        assert sorted(record["rate"] for record in runs[mask, 0]) == [1e-12, 1e-3]
        # At a rate of nothing the model stays as it was, so the other one is better.
        learned, = runs[mask, 1]
        assert learned["rate"] == 1e-3
    assert len(figures["runs"]) == 6
    assert (folder / "real.png").read_bytes().startswith(b"\x89PNG")
    assert "ism, rank 2 - causal, rank 2" in said
    assert "| question last" in said and "gsm8k: loss after" in said
    # Problem by problem: the mean of the differences is the difference of the means.
    ends = {(r["mask"], r["seed"]): r["end"]["gsm8k"][0] for r in figures["runs"]
            if r["rate"] == 1e-3}
    for row in compare.by_dialogue(compare.at_best(figures)):
        mean = float(row["more than causal"].split()[0])
        assert row["problems"] == 60
        assert abs(mean - ends["ism", row["seed"]] + ends["causal", row["seed"]]) < 2e-4


def test_the_loss_by_dialogue_is_that_of_train(stories, tmp_path):
    """And a query that is said twice leaves the answers as they are."""
    folder, sums = make_folder(tmp_path / "model"), {}

    def watch(run, loss):
        by_dialogue = compare.loss_by_dialogue(run, given["test"]["gsm8k"])
        assert by_dialogue[0].sum() / by_dialogue[1].sum() == pytest.approx(
            compare.evaluate(run, given["test"]["gsm8k"])[0], rel=1e-4)
        sums[c.twice] = by_dialogue[1].tolist()

    common = dict(kinds="gsm8k", gsm8k=str(stories), init_from=str(folder), n=40)
    for c in (Comparison(**common, twice=twice) for twice in (False, True)):
        (tmp_path / f"{c.twice}").mkdir()
        given = splits(c, 0, tmp_path / f"{c.twice}")
        s = compare.Finetune(init_from=str(folder), mask="ism_sink", max_iters=1, block_size=256)
        compare.finetune(s, {"train": given["train"], "test": given["val"]["gsm8k"]}, watch)
    assert sums[False] == sums[True] and len(sums[True]) == 60


def test_what_is_there_is_not_run_again(made):
    folder, flags, said = made
    (folder / "runs" / "ism-1-0.001-anneal-0-rank-2.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*")}
    old = json.loads((folder / "real.json").read_text(encoding="utf-8"))
    assert run("demos/compare.py", *flags).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    new = json.loads((folder / "real.json").read_text(encoding="utf-8"))
    for record in (*old["runs"], *new["runs"]):
        del record["seconds"]
    assert new["runs"] == old["runs"]


def test_the_committed_figures_are_of_the_real_model(tmp_path, capsys, monkeypatch):
    """Both masks at the same seeds, rates and steps; and what the demo prints of them."""
    figures = json.loads((ROOT / "demos" / "real.json").read_text(encoding="utf-8"))
    assert "--init_from" not in figures["command"]  # the default, out/smollm2
    budgets = {mask: sorted((run["seed"], run["rate"], run["steps"]) for run in figures["runs"]
                            if run["mask"] == mask) for mask in ("causal", "ism")}
    assert budgets["causal"] == budgets["ism"] and len(budgets["ism"]) >= 2
    monkeypatch.setattr("sys.argv", ["compare.py", "--out", str(tmp_path / "real.png")])
    compare.main()
    said = capsys.readouterr().out
    for record in figures["runs"]:
        if record["seed"] == 0:
            assert f"{compare.chosen_by(record):.3f}" in said
    for mask in ("causal", "ism"):
        losses = [run["end"]["question last"][0] for run in figures["runs"] if run["mask"] == mask]
        assert compare.decimals(losses) in said
