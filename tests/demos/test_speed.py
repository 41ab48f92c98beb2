"""demos/speed.py: it runs, and its figures are of the right kind.

What they are is no matter of a test.
"""

import pytest

from demos import speed
from sample import DTYPES


@pytest.mark.slow
def test_quick_writes_the_table_the_figures_and_the_picture(tmp_path, monkeypatch, capsys):
    kept = []
    measure = speed.measure
    monkeypatch.setattr(speed, "measure", lambda a: kept.append(measure(a)) or kept[0])
    picture = tmp_path / "new" / "speed.png"
    flags = ["--quick", "--device", "cpu", "--out", str(picture)]
    monkeypatch.setattr("sys.argv", ["speed.py", *flags])
    speed.main()
    assert picture.read_bytes().startswith(b"\x89PNG")
    figures, printed = kept[0], capsys.readouterr().out
    passes = figures["a training pass, times causal's"]
    assert passes["causal"]["ratio"] == 1 and set(passes) == {"causal", "ism", "prefix"}
    for found in passes.values():
        low, high = found["quartiles"]
        assert 0 < low <= high and found["seconds"] > 0
    turns = figures["first token by turn"].values()
    assert len({len(seconds) for seconds in turns}) == 1
    assert all(s > 0 for seconds in turns for s in seconds)
    assert set(figures["decoding"]["tokens/s"]) == set(DTYPES)
    for name in figures:
        assert name in printed
