"""The race: games with one right answer, the same start for both, and what the program shows."""

import json
import random
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_chat import run

from demos.page import look, read_race
from mask import MASKS
from model import GPT
from train import Settings, model_config

sys.path.insert(0, str(ROOT / "demos"))
import race as r


def test_each_game_has_one_answer_which_its_queries_tell():
    rng = random.Random(0)
    for _ in range(300):
        for query, answer in r.missing(rng):
            second = query.index(r.SECOND)
            assert {answer} == set(query[1:second]) - set(query[second:])
        after = {}
        for query, answer in r.links(rng):
            for i, token in enumerate(query):
                if token == r.LINK:
                    after[query[i + 1]] = query[i + 2]
            asked, x = query[-2:]
            for _ in range(asked - r.ASK):
                x = after[x]
            assert x == answer


@pytest.mark.parametrize("task", r.TASKS)
def test_games_are_those_of_the_task(task):
    """As rows: each answer is one token behind its query, which is given twice if wanted."""
    for twice in (False, True):
        games = r.Games(task, 20, "x", twice)
        rng = random.Random(f"{task} x")
        for row in games.rows(MASKS["ism"]):
            tokens, segments = games.collate(row[None])
            said = list(r.TASKS[task](rng))
            for turn, (query, answer) in enumerate(said):
                given = tokens[segments == 2 * turn + 1].tolist()
                assert given == (query + query if twice else query)
                assert tokens[segments == 2 * turn + 2].tolist() == [answer]
        kinds = np.stack(list(games.groups().values()))
        assert (kinds.sum(0) == 1).all() and kinds.shape[1] == (games.segments % 2 == 0).sum()


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
        query, _ = next(r.TASKS[task](random.Random(f"{task} x")))
        read = r.reading(model, games, MASKS[mask])
        assert read["tokens"] == [r.SPELLED[token] for token in query]
        n = len(query)
        segments = torch.ones(1, n, dtype=torch.long)
        weights, _ = look(model, torch.tensor([query]), MASKS[mask](segments))
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
        assert set(record["curves"]) == {"1 step", "2 steps", "3 steps"}
        assert len(record["guesses"]) == 18
        assert set(record["reading"]) == {"tokens", "looks", "goals"}
        for curve in record["curves"].values():
            assert len(curve) == 2 and all(0 <= share <= 1 for share in curve)
            assert f"{100 * curve[-1]:.1f}" in said
    game = said[said.index("One game") : said.index("Why.")]
    assert game.count(" after ") == 8 and all(game.count(f"{name} ") >= 8 for name in names)
    turns = list(r.links(random.Random("links held out 0")))
    for turn, (_, right) in enumerate(turns[:8]):
        line = game.splitlines()[turn + 1]
        assert f"? {r.SPELLED[right]}   (" in line
        for record in figures["records"]:
            assert f"{record['runner']} {record['guesses'][turn]}" in line


@pytest.mark.slow
def test_the_other_game(tmp_path):
    figures, said = race_with(tmp_path, "--task", "missing", "--seeds", "2", "--seed", "5")
    runners = [(x["runner"], x["seed"]) for x in figures["records"]]
    assert runners == [("causal", 5), ("ism", 5), ("causal", 6), ("ism", 6)]
    assert set(figures["records"][0]["curves"]) == {"all"} and said.count("what is missing?") == 4


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--masks", "causal,foo"), "'foo' is no mask; there are causal, prefix, ism"),
        (("--steps", "0"), "--steps must be at least 1"),
        (("--every", "0"), "--every must be at least 1"),
        (("--task", "chess"), "links"),
        (("--seed", "x"), "invalid int"),
        (("--out", "/dev/null/x"), "cannot write"),
    ],
)
def test_errors_are_one_line(flags, words, last_words, capsys):
    assert words in last_words(r, *flags) and not capsys.readouterr().out
