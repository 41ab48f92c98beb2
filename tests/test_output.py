"""The demos that draw, where matplotlib is not installed."""

import subprocess
import sys

import pytest
from conftest import ROOT

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
    command = [sys.executable, "-c", WITHOUT_MATPLOTLIB, f"demos/{name}.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith(f"{name}.py: the picture needs matplotlib")
    assert done.stderr.count("\n") == 1
