"""Each mask against a naive double loop, and the properties that f must have."""

import time

import pytest
import torch
from conftest import ROOT
from helpers import naive, run
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mask import MASKS, causal, dense, draw, ism, loss_positions, one_pass, reusable

LENGTHS = st.lists(st.integers(1, 6), max_size=7)  # of neighbouring segments
ROWS = st.integers(1, 3)


@st.composite
def layouts(draw, rows=ROWS):
    """Segments (B, T) with any start, two queries or answers in a row, empty rows, padding."""
    dialogues = []
    for _ in range(draw(rows)):
        number, row = draw(st.integers(0, 1)), []
        for n in draw(LENGTHS):
            number += draw(st.integers(1, 2))
            row += [number] * n
        dialogues.append(row)
    T = max(map(len, dialogues)) + draw(st.integers(0, 3))
    padded = [row + [0] * (T - len(row)) for row in dialogues]
    return torch.tensor(padded, dtype=torch.long)


@pytest.mark.parametrize("name", MASKS)
@settings(max_examples=300, deadline=None)
@given(segments=layouts())
def test_mask_equals_naive_loop(name, segments):
    assert MASKS[name](segments).tolist() == [naive(name, row) for row in segments.tolist()]


@settings(max_examples=200, deadline=None)
@given(segments=layouts())
def test_dense_and_loss_positions_equal_naive_loops(segments):
    for mask in MASKS.values():
        f = mask(segments)
        B, T = segments.shape
        allowed = dense(f)
        seen = loss_positions(segments, f)
        after = loss_positions(segments, f, answers_only=False)
        for b in range(B):
            for j in range(T):
                assert allowed[b, j].tolist() == [i < f[b, j] for i in range(T)]
                knows = max(f[b, : j + 1].tolist())  # the furthest token that can have reached j
                following = int(segments[b, j + 1]) if j + 1 < T else 0
                assert seen[b, j] == (following > 0 and following % 2 == 0 and knows <= j + 1)
                assert after[b, j] == (following > 0 and knows <= j + 1)


@settings(max_examples=200, deadline=None)
@given(segments=layouts(), data=st.data())
def test_every_path_of_information_respects_the_loss_positions(segments, data):
    """No leak: after many layers nothing that is trained to predict token j + 1 has seen it."""
    T = segments.shape[1]
    ahead = data.draw(st.lists(st.integers(0, 3), min_size=T, max_size=T))
    # A mask of nobody's making.
    own = (causal(segments) + torch.tensor(ahead, dtype=torch.long)).clamp(max=max(T, 1))
    for f in [mask(segments) for mask in MASKS.values()] + [own]:
        reach = dense(f) | torch.eye(T, dtype=torch.bool)
        for _ in range(T.bit_length()):  # each doubles the length of the paths
            reach = (reach.float() @ reach.float()) > 0
        for answers_only in (True, False):
            for b, j in loss_positions(segments, f, answers_only).nonzero().tolist():
                assert not reach[b, j, j + 1]


@settings(max_examples=200, deadline=None)
@given(segments=layouts(st.just(1)), data=st.data())
def test_one_pass_tells_whether_f_stays_as_a_dialogue_grows(segments, data):
    """f of a dialogue that is cut behind a segment, or within an answer, is the cut of f."""
    row = segments[0]
    places = [cut for cut in range(1, len(row))
              if row[cut] % 2 == 0 or row[cut - 1] != row[cut]]
    assume(places)
    cut = data.draw(st.sampled_from(places))
    for mask in MASKS.values():
        if one_pass(mask):
            assert torch.equal(mask(segments[:, :cut]), mask(segments)[:, :cut])


SOME_F = st.lists(st.integers(1, 6), max_size=6)


@settings(max_examples=300, deadline=None)
@given(start=SOME_F, before=SOME_F, after=SOME_F)
def test_reusable_keeps_all_entries_that_depend_on_nothing_that_changed(start, before, after):
    """The longest start in which each f is as it was and no row looks beyond it."""
    old, new = start + before, start + after
    places = range(min(len(old), len(new)) + 1)
    holds = [n for n in places if old[:n] == new[:n] and max(new[:n], default=0) <= n]
    assert reusable(torch.tensor([old]).long(), torch.tensor([new]).long()) == max(holds)


def test_prefix_alone_needs_more_than_one_pass():
    assert [name for name, mask in MASKS.items() if not one_pass(mask)] == ["prefix"]


def test_no_mask_loops_over_tokens():
    """8 rows of 8,192 tokens take milliseconds, a loop seconds. The bound is for a busy machine."""
    segments = (torch.arange(8192) // 50 + 1).expand(8, 8192).contiguous()
    for mask in MASKS.values():
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            loss_positions(segments, mask(segments))
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.5


def test_draw():
    segments = torch.tensor([[1, 1, 2]])
    assert draw(ism(segments)[0], ["a", "b", "c"]) == ["a #+.", "b ##.", "c ###"]
    assert len(draw(torch.arange(1, 201), ["x"] * 200)[0]) == 62


def test_mask_py_runs():
    done = run("mask.py")
    drawing = (ROOT / "README.md").read_text(encoding="utf-8").split("```\n")[1]
    assert done.returncode == 0 and done.stdout.startswith(drawing)
    assert all(name in done.stdout for name in MASKS)
    assert max(map(len, done.stdout.splitlines())) <= 80
