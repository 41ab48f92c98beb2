"""Where a demo's picture and figures go: matplotlib without a screen, a color for each mask, and files that can be written."""
import sys
from pathlib import Path

try:
    import matplotlib
except ModuleNotFoundError:
    sys.exit(f"{Path(sys.argv[0]).name}: the picture needs matplotlib, which is not installed: pip install -r tests/requirements.txt")

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"causal": "tab:red", "ism": "tab:blue", "prefix": "tab:green", "causal, all tokens": "tab:orange"}


def check_writable(*paths, json=""):
    """Make the folders of the files and open the files, before the work and not after it. Ends the program where that fails.

    json: one more file, that of the figures, where it was asked for.
    """
    for path in map(Path, (*paths, json) if json else paths):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            open(path, "a").close()
        except OSError as error:
            sys.exit(f"{Path(sys.argv[0]).name}: cannot write {path}: {error.strerror}")
