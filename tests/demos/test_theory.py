"""The theory demo: the layers of linear attention against the closed forms, as close as it says."""
import contextlib
import io
import math

import PIL.Image
import pytest
from conftest import ROOT

from demos import theory


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The demo's figures, its picture, and what it prints."""
    picture = tmp_path_factory.mktemp("theory") / "theory.png"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        figures = theory.measure()
    theory.plot(figures, picture)
    return figures, picture, printed.getvalue()


@pytest.fixture(scope="module")
def figures(made):
    return made[0]


def by_mask(figures, part):
    return {row["mask"]: row for row in figures[part]["rows"]}


def test_each_part_ends_in_plain_words(made):
    _, _, text = made
    assert all(f"\n{i}. " in text for i in range(1, 5))
    assert text.count("   Claimed: ") == text.count("   Seen: ") == 4
    assert max(map(len, text.splitlines())) <= 80


def test_the_committed_picture_is_of_today(made):
    today, committed = (PIL.Image.open(path).text["shows"] for path in
                        (made[1], ROOT / "demos" / "theory.png"))
    assert today == committed, "it is old: python demos/theory.py --out demos/theory.png"


def test_final_query_is_batch_gradient_descent(figures):
    rows = by_mask(figures, "final_query")
    assert rows["ism"]["off_descent"] < 1e-10 and rows["prefix"]["off_descent"] < 1e-10
    assert rows["causal"]["off_descent"] > 0.01
    assert rows["ism"]["left"] < 1e-25 < 1e-4 < rows["causal"]["left"]


def test_final_query_converges_linearly(figures):
    part = figures["final_query"]
    pairs = zip(part["measured"], part["predicted"], strict=True)
    for measured, predicted in pairs:
        assert measured == pytest.approx(predicted, rel=0.01)
        assert math.log(measured) == pytest.approx(math.log(predicted), rel=0.01)


def test_causal_is_online_descent_and_stops_at_a_kaczmarz_sweep(figures):
    for row in figures["online"]["rows"]:
        assert row["off_online"] < 1e-10
        assert row["off_sweep"] < 1e-10


def test_causal_nears_the_optimum_more_slowly_the_further_the_mean(figures):
    clean = [row["error"] for row in figures["online"]["rows"] if not row["noise"]]
    for n in (20, 80, 320):
        at_n = [error[n - 1] for error in clean]
        assert at_n[0] > 0 and at_n == sorted(at_n)
    for error in clean:
        assert error[19] > error[79] > error[319] > error[639]
    for row in figures["online"]["rows"]:
        if row["noise"]:
            assert row["error"][-1] > 0.004


def test_spread_over_turns_is_a_sweep_of_block_kaczmarz(figures):
    rows = figures["spread"]["rows"]
    for row in rows:
        assert row["off_online"] < 1e-10
        assert row["off_sweep"] < 1e-10
        assert abs(row["error"] - row["expected"]) < 5 * row["standard_error"] + 1e-25
    # From causal at one end to prefix at the other. It is w* exactly once a query holds as many
    # examples as there are dimensions.
    errors = [row["error"] for row in rows if row["length"] < 16]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.01
    assert all(row["error"] < 1e-25 for row in rows if row["length"] >= 16)


def test_noise_is_worst_where_a_query_just_fits(figures):
    rows = figures["noise"]["rows"]
    error = {row["length"]: row["error"] for row in rows}
    assert error[15] > error[10] > error[1] > error[60]
    assert error[15] > error[20] > error[30] > error[60]
    for row in rows:
        if row["expected"]:
            assert abs(row["error"] - row["expected"]) < 5 * row["standard_error"]
    # Stopped in time, longer queries are better.
    there = [row["error_there"] for row in rows]
    assert there == sorted(there, reverse=True)
