"""The notebook, run in a copy of the tree; the committed one; the plan for class."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from data.tokenizer import Tokenizer
from mask import MASKS, causal, draw, ism, loss_positions, reusable

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
NOTEBOOK = ROOT / "demos" / "lesson.ipynb"
MESSAGES = [
    {"role": "user", "content": "My name is Anna."},
    {"role": "assistant", "content": "Hi Anna."},
    {"role": "user", "content": "Who am I?"},
    {"role": "assistant", "content": "You are Anna."},
]


@pytest.fixture(scope="module")
def executed(tree):
    """The notebook after a quick run, from the folder that Jupyter takes: that of the file."""
    notebook = nbformat.read(tree / "demos" / "lesson.ipynb", 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tree / "demos")}}
    )
    own = {"NANOISM_QUICK": "1", "IPYTHONDIR": str(tree.parent / "ipython")}
    client.execute(env={**os.environ, **own})
    return notebook


@pytest.fixture
def committed():
    return nbformat.read(NOTEBOOK, 4)


@pytest.fixture(params=["executed", "committed"])
def notebook(request):
    return request.getfixturevalue(request.param)


def outputs(notebook, name):
    """What a cell put out: (its text, whether there is a picture)."""
    found = [cell.outputs for cell in notebook.cells if cell.id == name]
    assert len(found) == 1
    text = "".join(x.text for x in found[0] if x.get("name") == "stdout")
    return text, any("image/png" in x.get("data", {}) for x in found[0])


def test_masks_are_those_of_mask_py(notebook):
    said, _ = outputs(notebook, "masks")
    words = ["Who", "?", "Ann", "And", "I?", "You're", "Ben"]
    for name, mask in MASKS.items():
        f = mask(torch.tensor([[1, 1, 2, 3, 3, 4, 4]]))[0]
        lines = [f"{name}: f = {f.tolist()}", *draw(f, words)]
        assert "\n".join(lines) in said


def test_f_of_the_own_dialogue(notebook):
    said, _ = outputs(notebook, "own")
    head, *lines = said.splitlines()
    tokens, segments = Tokenizer().encode_dialogue(MESSAGES)
    assert head.split() == ["token", "segment", *MASKS] and len(lines) == len(tokens)
    columns = zip(*(re.findall(r"\d+", line)[-1 - len(MASKS) :] for line in lines))
    shown = [[int(number) for number in column] for column in columns]
    row = torch.tensor([segments])
    assert shown == [segments, *(mask(row)[0].tolist() for mask in MASKS.values())]


def test_loss_positions(notebook):
    said, _ = outputs(notebook, "loss")
    tokens, segments = Tokenizer().encode_dialogue(MESSAGES)
    row = torch.tensor([segments])
    at = loss_positions(row, ism(row))[0].nonzero()[:, 0]
    listed = [line for line in said.splitlines() if "learns to say" in line]
    assert [int(line.split()[1].strip(",")) for line in listed] == (at + 1).tolist()
    for name, mask in MASKS.items():
        n, of_all = (int(loss_positions(row, mask(row), only).sum()) for only in (True, False))
        assert f"{name}: {n} of answers; {of_all} if" in said


def test_f_becomes_the_zeros_of_the_softmax(notebook):
    said, picture = outputs(notebook, "attention")
    T, f = 27, {"causal": range(1, 28), "ism": [9] * 9 + [*range(10, 15)] + [21] * 7}
    f["ism"] += range(22, 28)
    zeros = {name: sum(T - limit for limit in limits) for name, limits in f.items()}
    for name, of_token_2 in (("causal", 2), ("ism", 9)):
        line = (f"{name}: {zeros[name]} of {T * T} shares are 0; token 2 has {of_token_2} that are "
                "not, and they sum to 1.000")
        assert line in said
    assert picture


def test_the_model_trains_and_chats_and_its_cache_is_kept_by_f(notebook):
    said, picture = outputs(notebook, "train")
    assert picture and re.search(r"[\d,]+ parameters, \d+ s", said)
    assert re.search(r"recollection: \d+\.\d% of held-out", said)
    said, _ = outputs(notebook, "chat")
    assert said.index("--- ism") < said.index("--- prefix")
    form = r"cache: (\d+) of (\d+) kept, (\d+) read, (\d+) written"
    turns = [tuple(map(int, found)) for found in re.findall(form, said)]
    assert len(turns) == 6
    for i, (kept, before, read, written) in enumerate(turns):
        after = turns[i + 1][1] if i not in (2, 5) else kept + read + written
        assert kept == (before if i < 3 else 0) and kept + read + written == after
        assert written >= 1 and read >= 1
    # The first query is of one length under both, and so is what is read of the others.
    assert turns[0][2] == turns[3][2]
    for under_ism, under_prefix in zip(turns[:3], turns[3:]):
        assert under_prefix[2] == under_prefix[1] + under_ism[2]


def test_the_race_has_a_table_and_a_picture(notebook):
    said, picture = outputs(notebook, "race")
    assert picture and "2 after" in said
    assert re.search(r"\| causal \| +0 \| +\d", said) and re.search(r"\| ism +\| +0 \| +\d", said)


def test_the_exercise_as_it_stands_is_causal(notebook):
    said, _ = outputs(notebook, "exercise")
    assert f"f: {list(range(1, 15))}" in said
    assert "hold at turn 2: 7\n" in said and "trained: 6\n" in said


def test_the_committed_notebook_has_outputs_and_no_traces(committed):
    assert 14 <= len(committed.cells) <= 20
    assert len({cell.id for cell in committed.cells}) == len(committed.cells)
    for cell in committed.cells:
        assert cell.metadata == {}
        if cell.cell_type == "code":
            assert cell.outputs and cell.execution_count
            assert all(x.output_type != "error" for x in cell.outputs)
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"/(tmp|work|home|root)/", text)
    lines = [line for cell in committed.cells for line in cell.source.splitlines()]
    assert max(map(len, lines)) <= 100
    assert json.loads(text)["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("place, found", [(".", 1), ("demos", 1), ("..", 1), ("/", 0)])
def test_the_first_cell_finds_the_code(tree, committed, place, found):
    setup, = (cell.source for cell in committed.cells if cell.id == "setup")
    done = subprocess.run(
        [sys.executable, "-c", setup + "\nimport mask, demos.race"], cwd=tree / place,
        env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, encoding="utf-8",
    )
    if found:
        assert done.returncode == 0 and done.stdout == "ready\n", done.stderr
    else:
        assert "start Jupyter in its folder" in done.stderr.splitlines()[-1]


def test_the_plan_for_class():
    """It fits a page, names files that are there, and its solution gives the numbers it names."""
    text = (ROOT / "demos" / "teaching.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 120 and all(len(line) <= 100 for line in lines if line[0:1] != "|")
    named = r"\b(?:tests/demos|demos|tests)/\w+\.(?:py|ipynb|png|html|md|txt)"
    for path in re.findall(named, text):
        assert (ROOT / path).exists() or path == "demos/answers.py", path
    solution = re.search(r"`(torch\.where\(.*?)`", text)[1]

    def mine(segments):
        names = {"torch": torch, "ism": ism, "causal": causal, "segments": segments}
        return eval(solution, names)

    row = torch.tensor([[1] * 4 + [2] * 3 + [3] * 4 + [4] * 3])
    f = mine(row)
    third, ninth = f[0, 2], f[0, 8]
    kept, trained = reusable(mine(row[:, :7]), f), loss_positions(row, f).sum()
    assert f"f is {third} and {ninth}, {kept} entries hold, {trained} tokens are trained" in text


def test_answers_of_the_test_questions():
    text = (ROOT / "demos" / "teaching.md").read_text(encoding="utf-8")
    _, _, text = text.partition("## Six questions")
    rows = [line.split(" | ") for line in text.splitlines()]
    answer = {row[0][2:]: row[2] for row in rows if len(row) == 4}
    row = torch.tensor([[1, 1, 2, 3, 3, 4, 4]])
    of = {name: MASKS[name] for name in ("causal", "ism", "prefix")}
    assert answer["1"] == " ".join(map(str, of["ism"](row)[0].tolist()))
    assert answer["2"] == " ".join(map(str, of["prefix"](row)[0].tolist()))
    kept = [reusable(mask(row[:, :3]), mask(row[:, :5])) for mask in of.values()]
    assert answer["3"] == ", ".join(map(str, kept))
    trained = loss_positions(row, ism(row))[0].nonzero()[:, 0] + 1
    assert answer["4"] == ", ".join(map(str, trained.tolist()))
    f = causal(row).clone()
    f[0, 0] = 7
    assert answer["6"] == "none" and not loss_positions(row, f).any()
