"""
What the demos put out: tables, and pictures, in one folder and with one color for each mask.
"""
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mask import MASKS

try:
    import matplotlib
except ModuleNotFoundError:
    name = Path(sys.argv[0]).name
    sys.exit(f"{name}: the picture needs matplotlib, which is not installed: "
             "pip install -r demos/requirements.txt")

matplotlib.use("Agg")  # without a screen
import matplotlib.pyplot as plt  # noqa: F401, the demos take it from here

PICTURES = Path(__file__).resolve().parent / "out"
COLORS = {
    "causal": "tab:red", "ism": "tab:blue", "prefix": "tab:green",
    "causal, all tokens": "tab:orange", "causal, given twice": "tab:orange",
    "ism, annealed": "tab:cyan",
}


def color(name):
    """The color of a mask; one of a reader's own is gray."""
    return COLORS.get(name, "tab:gray")


def picture(name):
    """Where a demo's picture goes if no one says otherwise."""
    return str(PICTURES / f"{name}.png")


def check_writable(*paths, json=""):
    """Make the folders of the files and try the files, before the work. Ends the program if not.

    json: one more file, that of the figures, where it was asked for.
    """
    for path in map(Path, (*paths, json) if json else paths):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not (path.exists() or path.is_symlink())
            open(path, "a").close()
            if new:  # a program that is stopped leaves no empty file
                path.unlink()
        except OSError as error:
            sys.exit(f"{Path(sys.argv[0]).name}: cannot write {path}: {error.strerror}")


def read_figures(path, names):
    """What stands under these names in a file of figures. ValueError if it is none."""
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
        return {name: figures[name] for name in names}
    except (OSError, ValueError, KeyError, TypeError):
        how = "name a file that --full has written"
        raise ValueError(f"{path} holds no figures of this demo; {how}") from None


def spelled(value):
    if value is None:
        return "-"
    if isinstance(value, bool) or isinstance(value, str):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def table(title, rows):
    """Print dicts with the same keys under their keys, as Markdown. Lists in them are left out."""
    names = [name for name, value in rows[0].items() if not isinstance(value, list)]
    lines = [names, *([spelled(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{title}\n")
    for i, line in enumerate(lines):
        first, *others = (cell.rjust(width) for cell, width in zip(line, widths))
        print("| " + " | ".join([line[0].ljust(widths[0]), *others]) + " |")
        if i == 0:
            rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
            print("| " + " | ".join(rules) + " |")


def by_group(title, found, told):
    """Rows for `table`, one a group of {name: [{group: value} a seed]}; ISM - causal by seed.

    told: makes a cell of a list of values, as `percent` does.
    """
    lines = []
    causal = next((name for name in found if name.startswith("causal")), None)
    for group in dict.fromkeys(key for seeds in found.values() for seed in seeds for key in seed):
        line = {title: group}
        for name, seeds in found.items():
            line[name] = told([seed[group] for seed in seeds if group in seed])
        for name, seeds in found.items():
            if name.startswith("ism") and causal:
                pairs = zip(seeds, found[causal])
                both = [a[group] - b[group] for a, b in pairs if group in a and group in b]
                line[f"{name} - {causal}"] = told(both, "+")
        lines.append(line)
    return lines


def check_masks(names):
    """ValueError if one of the names, with commas between, is no mask."""
    for name in names.split(","):
        if name not in MASKS:
            raise ValueError(f"--masks {names}: '{name}' is no mask; there are {', '.join(MASKS)}")


T975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, for 2 to 10 values


def interval(values):
    """Half of the 95 % t interval of a mean; NaN for one value."""
    n = len(values)
    return T975[n - 2] * np.std(values, ddof=1) / n**0.5 if n > 1 else np.nan


def percent(values, sign=""):
    """The mean of shares in percent, with its interval."""
    if len(values) == 0:
        return "-"
    mean = f"{100 * np.mean(values):{sign}.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * interval(values):.1f}"
