"""What the demos share: pictures of today, tables over seeds; a line if matplotlib is missing."""

import PIL.Image
import pytest
from conftest import ROOT
from helpers import run

from demos.output import by_group, percent, seeds_of

# Runs the program that sys.argv names, and finds no matplotlib.
WITHOUT_MATPLOTLIB = """
import runpy, sys
sys.modules["matplotlib"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


ALIKE = [pytest.param(name, marks=pytest.mark.slow) for name in ("theory", "quality", "speed")]


@pytest.mark.parametrize("name", ["masks", *ALIKE])
def test_without_matplotlib_a_demo_says_so_at_once(name):
    done = run("-c", WITHOUT_MATPLOTLIB, f"demos/{name}.py")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith(f"{name}.py: the picture needs matplotlib")
    assert done.stderr.count("\n") == 1


def test_without_transformers_elsewhere_says_what_to_install():
    script = WITHOUT_MATPLOTLIB.replace("matplotlib", "transformers")
    done = run("-c", script, "demos/elsewhere.py")
    assert done.returncode == 1 and done.stderr.startswith("elsewhere.py needs transformers 5")
    assert done.stderr.count("\n") == 1


def test_masks_are_compared_seed_by_seed():
    """Whatever the order of the runs, and where one mask has a seed or a group more."""
    found = {
        "causal": {1: {"all": 0.1, "old": 0.5}, 2: {"all": 0.2}, 3: {"all": 0.9}},
        "ism": {2: {"all": 0.3, "new": 0.7}, 1: {"all": 0.4}},
    }
    cells = {line["right"]: line["ism - causal"] for line in by_group("right", found, percent)}
    assert cells == {"all": percent([0.3, 0.1], "+"), "old": "-", "new": "-"}


def test_seeds_are_named_one_by_one_or_from_to():
    assert seeds_of("4-6") == [4, 5, 6] and seeds_of("0,2") == [0, 2] and seeds_of("7") == [7]


@pytest.mark.parametrize("name, flags", [
    ("masks", ["masks.py", "--dialogues", "1"]),
    ("quality", ["quality.py"]),
    ("real", ["compare.py"]),
])
def test_a_committed_picture_shows_what_its_program_draws_today(tmp_path, name, flags):
    """That of theory.py is in test_theory.py; those of race.py and speed.py take too long."""
    out = tmp_path / f"{name}.png"
    program, *others = flags
    assert run(f"demos/{program}", *others, "--out", str(out)).returncode == 0
    today, committed = (PIL.Image.open(path).text["shows"] for path in
                        (out, ROOT / "demos" / f"{name}.png"))
    assert today == committed, f"it is old: python demos/{program} --out demos/{name}.png"
