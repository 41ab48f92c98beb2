"""The quality demo: runs of train.py, their figures, and self-chat."""

import json

import pytest
from conftest import ROOT
from helpers import run

from data.synthetic import generate
from demos import quality
from demos.quality import ROWS, Quality, run_all, self_chat
from sample import load_chat


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A quick study of two rows: its folder, the printed text."""
    folder = tmp_path_factory.mktemp("quality")
    flags = "--quick --seeds 3 --rows prefix;ism --chats 6".split()
    flags += ["--runs", str(folder / "runs"), "--json", str(folder / "quality.json")]
    flags += ["--out", str(folder / "new" / "quality.png")]
    done = run("demos/quality.py", *flags)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_all_runs_are_there_with_shares_of_answers(made):
    folder, said = made
    figures = json.loads((folder / "quality.json").read_text(encoding="utf-8"))
    runs = [(record["row"], record["seed"]) for record in figures["runs"]]
    assert sorted(runs) == [("ism", 3), ("prefix", 3)]
    assert figures["command"].startswith("python demos/quality.py --quick")
    for record in figures["runs"]:
        assert record["cpu"] and record["commit"]
        s = record["settings"]
        assert (s["mask"], s["seed"], s["max_iters"]) == (record["row"], record["seed"], 6)
        assert all(0 <= share <= 1 for share in record["accuracy"].values())
        assert all(0 <= right <= asked for asked, right in record["chat"])
        said_in_all = sum(asked for asked, _ in record["chat"])
        dialogues = generate("test", 6, record["seed"], mixed=True)
        roles = [m["role"] for d in dialogues for m in d["messages"]]
        assert said_in_all == roles.count("assistant")
    assert (folder / "new" / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert "| ism" in said and "the four patterns" in said and "its own answers as history" in said


def test_a_study_goes_on_where_it_was_stopped(made, monkeypatch):
    """A run whose record is lost is made of its checkpoint, no other one is made again.

    A command with other seeds adds its runs to the same figures.
    """
    folder, _ = made
    path = folder / "runs" / "ism-3.json"
    lost = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    written = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/ckpt.pt")}
    flags = dict(quick=True, rows="ism", chats=6, runs=str(folder / "runs"))
    monkeypatch.setattr("sys.argv", ["quality.py"])
    run_all(Quality(seeds="3", **flags))
    again = json.loads(path.read_text(encoding="utf-8"))
    for record in (again, lost):
        del record["seconds"], record["settings"]
    assert again == lost
    changed = [path for path, before in written.items() if path.stat().st_mtime_ns != before]
    assert [path.parent.name for path in changed] == ["ism-3"]
    run_all(Quality(seeds="2-3", **flags))
    figures = json.loads((folder / "runs.json").read_text(encoding="utf-8"))
    runs = {(record["row"], record["seed"]) for record in figures["runs"]}
    assert runs == {("prefix", 3), ("ism", 3), ("ism", 2)}


def test_self_chat_counts_what_a_chat_by_hand_gives(made):
    folder, _ = made
    chat = load_chat(folder / "runs" / "ism-3" / "ckpt.pt", max_new_tokens=64)
    right = asked = 0
    for dialogue in generate("test", 6, 3, mixed=True):
        chat.messages = [m for m in dialogue["messages"] if m["role"] == "system"]
        chat.reset()
        texts = [m["content"] for m in dialogue["messages"] if m["role"] != "system"]
        for query, answer in zip(texts[::2], texts[1::2]):
            asked += 1
            if chat.send(query) == answer:
                right += 1
    counted = self_chat(folder / "runs" / "ism-3" / "ckpt.pt", 6)
    assert [sum(column) for column in zip(*counted)] == [asked, right]


def test_a_study_stopped_before_its_first_figures_begins_again(tmp_path, last_words):
    """It leaves no file of its own. That it has begun shows in that its run cannot write."""
    figures, drawn = tmp_path / "quality.json", tmp_path / "x.png"
    (tmp_path / "causal-0").write_text("no folder")
    flags = "--full", "--json", str(figures), "--out", str(drawn), "--runs", str(tmp_path)
    for _ in range(2):
        assert f"the run in {tmp_path}/causal-0 has stopped" in last_words(quality, *flags)
        assert not figures.exists() and not drawn.exists()


def test_the_committed_figures_are_of_whole_runs():
    """What the README tells: three seeds at least of ISM and causal, with the default settings."""
    figures = json.loads((ROOT / "demos" / "quality.json").read_text(encoding="utf-8"))
    for row in ("ism", "causal"):
        seeds = [record["seed"] for record in figures["runs"] if record["row"] == row]
        assert len(set(seeds)) >= 3 and set(ROWS) >= {record["row"] for record in figures["runs"]}
