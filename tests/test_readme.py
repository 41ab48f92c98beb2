"""The README: its chat is what the small model of the repository says, its counts are so."""
import re

import pytest
import torch
from conftest import ROOT

import sample
from data.checkpoint import load_checkpoint, shrink
from sample import SMALL_MODEL, load_chat

README = (ROOT / "README.md").read_text(encoding="utf-8")
LESSONS = "mask.py", "model.py", "train.py", "sample.py"
LINE = "# ==== below this line"


def test_the_small_model_answers_as_the_readme_says():
    block = re.search(r"```\n(> .*?)```", README, re.S).group(1)
    turns = re.findall(r"> (.*)\n((?:[^>].*\n)+)", block)
    assert len(turns) > 4
    chat = load_chat(SMALL_MODEL, device="cpu")
    for query, answer in turns:
        assert chat.send(query) == answer.rstrip("\n")


def test_without_a_model_of_ones_own_the_small_one_chats(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--prompt", "My name is Anna.", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["sample.py", *flags])
    sample.main()
    told, _, answer = capsys.readouterr().out.splitlines()
    assert "small model" in told and "train.py trains your own" in told
    assert answer == "Noted. Your name is Anna."


@pytest.mark.parametrize("name", LESSONS)
def test_the_lines_above_the_line_are_counted_right(name):
    above, _ = (ROOT / name).read_text(encoding="utf-8").split(LINE)
    told = re.search(rf"\| `{name}` \| (\d+) \|", README).group(1)
    assert int(told) == above.count("\n")


def test_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 100


def test_the_small_model_is_made_by_one_command(tmp_path):
    """From a checkpoint, which may be the small one itself: the same numbers, no optimizer."""
    shrink(SMALL_MODEL, tmp_path / "again.pt")
    old, new = load_checkpoint(SMALL_MODEL), load_checkpoint(tmp_path / "again.pt")
    assert new["optimizer"] == {} and old["config"] == new["config"]
    for name, x in new["model"].items():
        assert x.dtype == torch.bfloat16 and torch.equal(x, old["model"][name])
    assert (tmp_path / "again.pt").stat().st_size < 1_100_000


# The lines of today. A change may add a twentieth; more is a decision, and is written down here.
LINES = {
    "the lessons": 830,  # above the line
    "data": 3811,
    "demos": 4112,
    "tests": 8789,
}


@pytest.mark.parametrize("folder", LINES)
def test_it_stays_small(folder):
    answers = ROOT / "demos" / "answers.py"  # a student's own
    paths = {*(ROOT / folder).rglob("*.py")} - {answers}
    if folder == "the lessons":
        paths = [ROOT / name for name in LESSONS]
    count = 0
    for path in paths:
        text = path.read_text(encoding="utf-8")
        if folder == "the lessons":
            text = text.split(LINE)[0]
        count += text.count("\n")
    assert 0 < count <= 1.05 * LINES[folder], f"{folder}: {count} lines"
