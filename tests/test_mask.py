"""Each mask against a naive double loop, and the properties that f must have."""

import time

import pytest
import torch
from helpers import naive, run
from hypothesis import given, settings
from hypothesis import strategies as st

from mask import MASKS, causal, dense, draw, ism, loss_positions, one_pass, prefix, reusable

LENGTHS = st.lists(st.integers(1, 6), max_size=7)  # of neighbouring segments
ROWS = st.integers(1, 3)


@st.composite
def layouts(draw, rows=ROWS):
    """Random segments (B, T).

    Any start, two queries or two answers in a row, empty rows, padding.
    """
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


@pytest.mark.parametrize("name", MASKS)
@settings(max_examples=200, deadline=None)
@given(segments=layouts())
def test_padding_is_never_seen_and_always_sees(name, segments):
    f = MASKS[name](segments)
    real = (segments > 0).sum(1)
    for b in range(len(f)):
        assert (f[b] >= 1).all()
        assert (f[b, : real[b]] <= real[b]).all()


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


def test_leak_through_an_earlier_token():
    segments = torch.tensor([[1, 1, 2, 2, 2]])
    f = torch.tensor([[5, 2, 3, 4, 5]])  # causal, but for a first token that sees all
    assert not loss_positions(segments, f).any()
    assert loss_positions(segments, causal(segments)).sum() == 3


@pytest.mark.parametrize("name, holds", [
    ("causal", True), ("ism", True), ("ism_sink", True), ("prefix", False),
])
def test_cacheable(name, holds):
    """f of a dialogue cut at a segment's end, or inside an answer, is the cut of f.

    That holds for all but prefix.
    """
    mask, generator = MASKS[name], torch.Generator().manual_seed(0)
    equal = True
    for _ in range(200):
        n = int(torch.randint(2, 8, (), generator=generator))
        sizes = torch.randint(1, 6, (n,), generator=generator)
        row = torch.repeat_interleave(torch.arange(1, len(sizes) + 1), sizes)[None]
        f = mask(row)
        for cut in range(1, row.shape[1]):
            inside_query = row[0, cut - 1] == row[0, cut] and row[0, cut] % 2 == 1
            if not inside_query:
                equal = equal and torch.equal(mask(row[:, :cut]), f[:, :cut])
    assert equal == holds


@settings(max_examples=200, deadline=None)
@given(segments=layouts(st.just(1)), data=st.data())
def test_reusable_entries_depend_on_nothing_that_changed(segments, data):
    """What reusable() keeps: rows whose f is the same, and that of all that they can reach."""
    T = segments.shape[1]
    for mask in MASKS.values():
        new = mask(segments)
        cut = data.draw(st.integers(0, T))
        old = mask(segments[:, :cut])
        kept = reusable(old, new)
        assert kept <= cut
        assert torch.equal(old[:, :kept], new[:, :kept]) and (new[0, :kept] <= kept).all()


def test_reusable_by_mask():
    turn, two = torch.tensor([[1, 1, 1, 2, 2]]), torch.tensor([[1, 1, 1, 2, 2, 3, 3, 4]])
    assert reusable(ism(turn), ism(two)) == 5
    assert reusable(causal(turn), causal(two)) == 5
    assert reusable(prefix(turn), prefix(two)) == 0
    assert reusable(ism(turn[:, :0]), ism(two)) == 0


def test_one_pass():
    passes = {name: one_pass(mask) for name, mask in MASKS.items()}
    assert passes == {"causal": True, "prefix": False, "ism": True, "ism_sink": True}


def test_vectorised():
    """T = 8192, B = 8 takes milliseconds; a loop over tokens takes seconds.

    The bound allows for a busy machine.
    """
    segments = (torch.arange(8192) // 50 + 1).expand(8, 8192).contiguous()
    for mask in MASKS.values():
        assert min(timed(mask, segments) for _ in range(5)) < 0.5


def timed(mask, segments):
    """The seconds that a mask and its loss positions take."""
    start = time.perf_counter()
    loss_positions(segments, mask(segments))
    return time.perf_counter() - start


def test_draw():
    segments = torch.tensor([[1, 1, 2]])
    assert draw(ism(segments)[0], ["a", "b", "c"]) == ["a #+.", "b ##.", "c ###"]
    assert len(draw(torch.arange(1, 201), ["x"] * 200)[0]) == 62


def test_mask_py_runs():
    done = run("mask.py")
    assert done.returncode == 0 and "causal" in done.stdout and "#+" in done.stdout
