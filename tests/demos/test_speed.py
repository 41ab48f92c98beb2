"""demos/speed.py: it runs, and its figures are of the right kind.

What they are is no matter of a test.
"""

import json

import pytest
from helpers import run


@pytest.mark.slow
def test_quick_writes_the_table_the_figures_and_the_picture(tmp_path):
    files = ["--json", str(tmp_path / "speed.json"), "--out", str(tmp_path / "new" / "speed.png")]
    done = run("demos/speed.py", "--quick", "--device", "cpu", *files)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new" / "speed.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "speed.json").read_text())
    passes = figures["a training pass, times causal's"]
    assert passes["causal"]["ratio"] == 1 and set(passes) == {"causal", "ism", "prefix"}
    for found in passes.values():
        low, high = found["quartiles"]
        assert 0 < low <= high and found["seconds"] > 0
    turns = figures["first token by turn"].values()
    assert len({len(seconds) for seconds in turns}) == 1
    assert all(s > 0 for seconds in turns for s in seconds)
    for name in figures:
        assert name in done.stdout
