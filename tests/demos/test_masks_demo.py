"""The mask demo: its figures against formulas and loops that know nothing of mask.py."""
import contextlib
import io

import pytest
from helpers import naive

from demos import masks

LAYERS = 3  # of the demo's GPT


@pytest.fixture(scope="module")
def made():
    """The demo's figures, and what it prints."""
    figures = masks.measure(["causal", "prefix", "ism"], 50)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        masks.report(figures, 50)
    return figures, printed.getvalue()


@pytest.fixture(scope="module")
def figures(made):
    return made[0]


def lengths(segments):
    """The length of each segment, queries and answers in turn."""
    return [segments.count(s) for s in sorted(set(segments))]


def triangle(n):
    return n * (n + 1) // 2


def expected(mask, segments):
    """tokens, attended pairs and trained tokens of one dialogue, by formula."""
    sizes, T = lengths(segments), len(segments)
    trained = sum(sizes[1::2])
    if mask == "causal":
        return T, triangle(T), trained
    if mask == "ism":  # a query of n tokens has as many pairs more as a triangle of n - 1
        return T, triangle(T) + sum(triangle(n - 1) for n in sizes[::2]), trained
    # The copy of a turn: all up to the end of its query is a square, then comes a triangle.
    tokens = pairs = 0
    for k in range(0, len(sizes), 2):
        end, n = sum(sizes[: k + 1]), sizes[k + 1]
        tokens += end + n
        pairs += end * end + n * end + triangle(n)
    return tokens, pairs, trained


def counted(row):
    return row["tokens"], row["attended pairs"], row["trained tokens"]


def test_the_tables_hold_the_figures(made):
    figures, text = made
    for title in ("This dialogue", "training dialogues", "No leak", "Cacheable"):
        assert title in text
    printed = [line.split() for line in text.splitlines()]
    for row in figures["counts"] + figures["train"]:
        cells = [row["mask"], *(f"{row[name]:,}" for name in list(row)[1:])]
        assert f"| {' | '.join(cells)} |".split() in printed


def test_the_dialogue_and_its_copies(figures):
    assert figures["labels"][0] == "<|user|>" and figures["labels"][-1] == "<|end|>"
    names = [part["mask"] for part in figures["parts"]]
    assert names == ["causal", "prefix, turn 1", "prefix, turn 2", "ism"]
    q1, a1, q2, a2 = lengths(figures["segments"])
    T = q1 + a1 + q2 + a2
    assert [len(part["f"]) for part in figures["parts"]] == [T, q1 + a1, T, T]
    for part in figures["parts"]:
        mask = part["mask"].split(",")[0]
        assert part["f"] == naive(mask, figures["segments"][: len(part["f"])])


def test_counts_of_the_dialogue_are_those_of_the_formulas(figures):
    for row in figures["counts"]:
        assert counted(row) == expected(row["mask"], figures["segments"])


def test_counts_of_the_training_data_are_those_of_the_formulas(figures):
    from data.synthetic import generate
    from data.tokenizer import Tokenizer

    tokenizer = Tokenizer()
    train = [tokenizer.encode_dialogue(d["messages"])[1] for d in generate("train", 50)]
    for row in figures["train"]:
        each = [expected(row["mask"], segments) for segments in train]
        assert counted(row) == tuple(map(sum, zip(*each)))
    causal, prefix, ism = (counted(row) for row in figures["train"])
    assert causal[2] == prefix[2] == ism[2]
    assert causal[0] == ism[0] < prefix[0] and causal[1] < ism[1] < prefix[1]


def test_trained_are_the_answers_each_once(figures):
    # The positions that predict an answer's tokens.
    answers = [j - 1 for j, s in enumerate(figures["segments"]) if s % 2 == 0]
    for mask in ("causal", "prefix", "ism"):
        parts = [part for part in figures["parts"] if mask in part["mask"]]
        assert sorted(j for part in parts for j in part["trained"]) == answers


def test_the_logits_that_move_are_those_within_reach(figures):
    """Just those that the changed token reaches within the GPT's layers."""
    for part in figures["parts"]:
        f, T = part["f"], len(part["f"])
        assert len(part["moved"]) == T
        for i, moved in enumerate(part["moved"]):
            reached = {i}
            for _ in range(LAYERS):
                reached |= {j for j in range(T) if any(k < f[j] for k in reached)}
            assert moved == sorted(reached)


def test_no_logit_that_is_trained_knows_its_future(figures):
    counts = []
    for part in figures["parts"]:
        before = [j for i, moved in enumerate(part["moved"]) for j in moved if j < i]
        assert not set(before) & set(part["trained"])
        counts.append(len(before))
    q1, a1, q2, _ = lengths(figures["segments"])
    # Within a query, and under prefix within all up to its end, all see each other.
    queries = triangle(q1 - 1) + triangle(q2 - 1)
    assert counts == [0, triangle(q1 - 1), triangle(q1 + a1 + q2 - 1), queries]


def test_the_cache_is_stale_where_f_says_so(figures):
    segments = figures["segments"]
    ends = [j for j in range(1, len(segments)) if segments[j] != segments[j - 1]]
    wanted = [(mask, end) for mask in ("causal", "prefix", "ism") for end in ends]
    assert [(cut["mask"], cut["cut"]) for cut in figures["cuts"]] == wanted
    for cut in figures["cuts"]:
        mask, end = cut["mask"], cut["cut"]
        pairs = zip(naive(mask, segments[:end]), naive(mask, segments))
        assert cut["f_changed"] == [j for j, (part, whole) in enumerate(pairs) if part != whole]
        # Measured with the GPT on the left, read off f on the right.
        assert cut["stale"] == list(range(cut["reusable"], end))
        if mask == "prefix" and end < ends[-1]:
            assert cut["f_changed"] == cut["stale"] == list(range(end))
        else:
            assert not cut["f_changed"] and not cut["stale"]


def test_a_mask_of_ones_own_is_drawn_too(monkeypatch, tmp_path):
    """It gets a panel: the picture grows by a row of panels, from two to three."""
    def near(segments):
        return (masks.MASKS["causal"](segments) + 2).minimum(masks.MASKS["ism"](segments))

    monkeypatch.setitem(masks.MASKS, "near", near)
    names, pixels = ["causal", "prefix", "ism"], []
    for shown in (names, [*names, "near"]):
        figures = masks.measure(shown, 1)
        assert [row["mask"] for row in figures["counts"]] == shown
        masks.draw(figures, tmp_path / "masks.png")
        pixels.append(int.from_bytes((tmp_path / "masks.png").read_bytes()[20:24], "big"))
    assert pixels == [1740, 2570]
