"""The race: games with one right answer, the same start for both, and what the program shows."""

import json
import random
import sys

import pytest
import torch
from conftest import ROOT
from helpers import run

from demos.page import attention_weights, read_race
from mask import MASKS
from model import GPT
from train import Settings, model_config

sys.path.insert(0, str(ROOT / "demos"))
import race as r


@pytest.mark.parametrize("place", r.PLACES)
def test_each_game_has_one_answer_which_its_queries_tell(place):
    rng = random.Random(0)
    for _ in range(300):
        given = []
        for query, answer, kinds in r.missing(rng, place):
            given = query if r.SECOND in query else given
            lists = [token for token in given if token != r.ASK]
            second = lists.index(r.SECOND)
            assert (answer == r.READ and not kinds and r.ASK not in query) or (
                r.ASK in query and kinds == ["all"]
                and {answer} == set(lists[1:second]) - set(lists[second + 1 :]))
        after, stands = {}, []
        for query, answer, kinds in r.links(rng, place):
            for i, token in enumerate(query):
                if token == r.LINK:
                    after[query[i + 1]] = query[i + 2]
                    stands.append(query[i + 1])
            if not kinds:
                assert place == "next" and answer == r.READ and len(query) == 27
                continue
            at = 0 if place == "start" else -2
            asked, x = query[at:][:2]
            n, start = asked - r.ASK, x
            for _ in range(n):
                x = after[x]
            assert x == answer and kinds[0] == ("1 step" if n == 1 else f"{n} steps")
            if n == 2:
                first = stands.index(start) < stands.index(after[start])
                assert kinds[1:] == [r.SPLIT[0] if first else r.SPLIT[1]]


@pytest.mark.parametrize("task", r.TASKS)
def test_games_are_those_of_the_task(task):
    """As rows: each answer is one token behind its query, which is given twice if wanted."""
    for twice, place in ((False, "end"), (True, "next"), (False, "start")):
        games = r.Games(task, 20, "x", twice, place)
        rng = random.Random(f"{task} x")
        every = []
        for row in games.rows(MASKS["ism"]):
            tokens, segments = games.collate(row[None])
            for turn, (query, answer, kinds) in enumerate(r.TASKS[task](rng, place)):
                given = tokens[segments == 2 * turn + 1].tolist()
                assert given == (query + query if twice else query)
                assert tokens[segments == 2 * turn + 2].tolist() == [answer]
                every.append(kinds)
        assert len(every) == (games.segments % 2 == 0).sum()
        for name, at in games.groups().items():
            assert at.tolist() == [name in kinds for kinds in every]


def test_both_start_alike_and_see_the_same_games():
    """With one layer causal and ISM give the same answers: then all of a race must be the same."""
    race = r.Race(layers=1, steps=4, every=2, masks="causal,ism")
    torch.set_num_threads(1)
    causal, ism = (r.run_one(race, name, 3, lambda *_: None) for name in ("causal", "ism"))
    assert causal["curves"] == ism["curves"] and causal["guesses"] == ism["guesses"]
    assert r.run_one(race, "ism", 4, lambda *_: None)["guesses"] != ism["guesses"]


@pytest.mark.parametrize("mask", ["causal", "ism"])
@torch.no_grad()
def test_where_tokens_look_and_should_look(mask):
    """The largest weight over heads and other tokens, by loops; the goals, by the links."""
    torch.manual_seed(0)
    model = GPT(model_config(Settings(), r.VOCABULARY))
    for task in r.TASKS:
        games = r.Games(task, 1, "x")
        query, *_ = next(r.TASKS[task](random.Random(f"{task} x")))
        read = r.reading(model, games, MASKS[mask])
        assert read["tokens"] == [r.SPELLED[token] for token in query]
        n = len(query)
        segments = torch.ones(1, n, dtype=torch.long)
        weights, _ = attention_weights(model, torch.tensor([query]), MASKS[mask](segments))
        assert len(read["looks"]) == len(weights)
        for layer, heads in zip(read["looks"], weights.tolist()):
            assert len(layer) == n
            for j, (place, weight) in enumerate(layer):
                others = [max(head[j][i] for head in heads) * (i != j) for i in range(n)]
                assert weight == pytest.approx(max(others), abs=1e-6)
                assert others[place] == pytest.approx(weight, abs=1e-6)
        ends = {query[i + 1]: i + 2 for i in range(n) if query[i] == r.LINK}
        goals = [ends.get(token) if query[j - 2] == r.LINK else None
                 for j, token in enumerate(query)]
        assert read["goals"] == goals and (sum(map(bool, goals)) == 6) == (task == "links")


def race_with(tmp_path, *flags):
    files = "--json", str(tmp_path / "race.json"), "--out", str(tmp_path / "new" / "race.png")
    done = run("demos/race.py", "--steps", "4", "--every", "2", *files, *flags)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new" / "race.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "race.json").read_text())
    shown = read_race(tmp_path / "race.json")  # the page takes what the race writes
    assert shown["task"] == figures["race"]["task"]
    assert len(shown["records"]) == len(figures["records"])
    return figures, done.stdout


def test_a_race_shows_a_table_a_game_and_why(tmp_path):
    figures, said = race_with(tmp_path, "--twice")
    names = ["causal", "ism", "causal, given twice"]
    assert [x["runner"] for x in figures["records"]] == names
    for record in figures["records"]:
        assert set(record["curves"]) == {"1 step", r.TWO, *r.SPLIT, "3 steps"}
        assert len(record["guesses"]) == 18
        assert set(record["reading"]) == {"tokens", "looks", "goals"}
        for kind, curve in record["curves"].items():
            assert len(curve) == 2 and all(0 <= share <= 1 for share in curve)
            assert f"{curve[-1]:.1%}" in said or "," in kind
    assert max(map(len, said[said.index("One game") :].splitlines()[:-1])) < 80
    game = said[said.index("One game") : said.index("2 steps: ")]
    assert game.count(" after ") == 8 and all(game.count(f"{name} ") >= 8 for name in names)
    turns = list(r.links(random.Random("links held out 0")))
    for turn, (_, right, _) in enumerate(turns[:8]):
        line = game.splitlines()[turn + 1]
        assert f"? {r.SPELLED[right]}   (" in line
        for record in figures["records"]:
            assert f"{record['runner']} {record['guesses'][turn]}" in line


def test_who_won_is_a_sentence():
    """At the end, if the lead is large; else by when the mean over the seeds came to 95 %."""
    def told(causal, ism):
        records = [{"runner": name, "seed": seed, "curves": {"all": curve}}
                   for name, curves in (("causal", causal), ("ism", ism))
                   for seed, curve in enumerate(curves)]
        return r.verdict(r.Race(steps=40, every=10), records, "all")

    slow, fast = [0.1, 0.2, 0.5, 0.96], [0.1, 0.96, 0.97, 0.97]
    assert told([slow, slow], [fast, fast]) == (
        "all: ism is there first, and the others follow. causal ends at 96.0%, first at 95% after "
        "40 steps; ism ends at 97.0%, first at 95% after 20 steps.")
    assert told([fast], [slow]).startswith("all: causal is there first")
    assert told([slow], [[0.1, 0.2, 0.3, 0.7]]).startswith("all: causal wins. ")
    assert "causal ends at 75.0%, never at 95%" in told([[0.5] * 4, [1.0] * 4], [fast, fast])
    assert told([fast], [fast]).startswith("all: nobody wins.")


@pytest.mark.slow
def test_the_other_game(tmp_path):
    flags = "--task", "missing", "--place", "next", "--seeds", "2", "--seed", "5"
    figures, said = race_with(tmp_path, *flags)
    runners = [(x["runner"], x["seed"]) for x in figures["records"]]
    assert runners == [("causal", 5), ("ism", 5), ("causal", 6), ("ism", 6)]
    assert set(figures["records"][0]["curves"]) == {"all"} and said.count("what is missing?") == 4
