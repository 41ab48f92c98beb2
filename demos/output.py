"""
What the demos share: pictures, tables, and studies, which are many runs and their figures.

    python demos/output.py    makes the pictures of the repository anew, in minutes
"""
import functools
import json
import platform
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data.checkpoint import write_json
from data.machine import setting
from mask import MASKS

try:
    import matplotlib
except ModuleNotFoundError:
    name = Path(sys.argv[0]).name
    sys.exit(f"{name}: the picture needs matplotlib, which is not installed: "
             "pip install -r demos/requirements.txt")

matplotlib.use("Agg")  # without a screen
import matplotlib.pyplot as plt
from matplotlib.colors import to_hex

PICTURES = ROOT / "demos" / "out"
# Blue and orange, which the color-blind tell apart; one is dark and one light, for black and white.
COLORS = {
    "causal": "#e08214", "ism": "#1f5a96", "prefix": "#222222",
    "causal, all tokens": "#fdb863", "causal, given twice": "#fdb863",
    "ism, annealed": "#6baed6", "ism_sink": "#35978f",
}
LINES = {"causal": "--", "prefix": ":", "ism_sink": "-."}


def color(name):
    """The color of a mask; one of a reader's own is gray."""
    return COLORS.get(name, "tab:gray")


def dashes(name):
    """How a mask's line is drawn: what tells the masks apart without colors."""
    return LINES.get(name, "-")


def picture(name):
    """The default path of a demo's picture."""
    return str(PICTURES / f"{name}.png")


def save(figure, path, dpi):
    """Write a picture as PNG. Its metadata `shows` is a checksum of all texts, lines and cells.

    By it a test sees whether a picture in the repository is older than what it shows. Numbers
    count to two digits, so that rounding on another machine changes nothing.
    """
    shows = []
    for text in figure.findobj(plt.Text):
        shows.append(text.get_text())
    for drawn in figure.findobj(plt.Line2D):
        numbers = [f"{y:.2g}" for y in np.ravel(drawn.get_ydata(orig=False)) if y > 1e-12]
        shows += [to_hex(drawn.get_color()), drawn.get_linestyle(), *numbers]
    for cell in figure.findobj(plt.Rectangle):
        shows += [to_hex(cell.get_facecolor()), *(f"{x:.2g}" for x in cell.get_bbox().bounds)]
    checksum = f"{zlib.crc32(repr(shows).encode()):08x}"
    figure.savefig(path, dpi=dpi, format="png", metadata={"shows": checksum})


def check_writable(*paths, json=""):
    """End the program in one line if a file cannot be written. Makes the files' folders.

    To be called before the work. json: one more file, or "".
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


# --- studies: runs by seed ----------------------------------------------------------------------


@dataclass
class Study:
    """The flags that all studies have. COMMITTED: the file of figures in the repository."""

    full: bool = setting(False, "train what has no file in --runs yet")
    seeds: str = setting("0-2", "seeds of each")
    runs: str = setting("", "the folder of the runs, a file each")
    json: str = setting("", "the figures (default: the committed ones; of new runs RUNS.json)")
    out: str = setting("", "the picture")

    def __post_init__(self):
        self.all_seeds = seeds_of(self.seeds)
        if not self.json:
            self.json = f"{self.runs}.json" if self.full else str(ROOT / "demos" / self.COMMITTED)

    def carry_out(self, run_all, report, draw):
        """Run what is missing if --full asks for it; print and draw the figures.

        run_all() calls `add_run` for each run; report(figures) prints; draw(figures, path).
        """
        check_writable(self.out)
        if self.full:
            check_writable(json=self.json)
            run_all(self)
        figures = read_figures(self.json)
        report(figures)
        draw(figures, self.out)
        commits = ", ".join(sorted({run["commit"] for run in figures["runs"]}))
        machines = "; ".join(sorted({run["cpu"] for run in figures["runs"]}))
        print(f"\nMade by `{figures['command']}`, commit {commits}, on {machines}.")
        print(f"The picture: {self.out}")


def seeds_of(text):
    """The seeds that a flag names: "4-15", "3" or "0,2". ValueError if it names none."""
    seeds = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            seeds += range(int(first), int(last or first) + 1)
    except ValueError:
        seeds = []
    if not seeds:
        raise ValueError(f"--seeds {text}: expected seeds as in 0-2 or 4,7")
    return seeds


def add_run(path, make, figures):
    """Make a run's record if it has no file yet, and gather all records in the file `figures`.

    path: the run's own file; make() returns the record. All files in its folder are gathered. So a
    study that was stopped goes on, and commands with other seeds can run beside each other.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        record = make()
        write_json(path, {**record, "cpu": describe(), "commit": commit()})
    files = sorted(path.parent.glob("*.json"))
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    command = " ".join(["python", f"demos/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    write_json(figures, {"command": command, "runs": runs})


def read_figures(path):
    """What `add_run` has written. ValueError if it is none."""
    try:
        figures = json.loads(Path(path).read_text(encoding="utf-8"))
        return {"command": figures["command"], "runs": figures["runs"]}
    except (OSError, ValueError, KeyError, TypeError):
        how = "name a file that --full has written"
        raise ValueError(f"{path} holds no figures of this demo; {how}") from None


def describe():
    """A line that describes this machine, to stand beside figures."""
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        name = names[0] if names else name
    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()}, {name}"
    kind = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {torch.get_num_threads()} threads, {kind}, torch {torch.__version__}"


def commit():
    """The commit of the code, where it is a git checkout."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True)
    return done.stdout.decode().strip()


# --- tables -------------------------------------------------------------------------------------


def spelled(value):
    """A value as the text of a cell."""
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


def by_group(title, values_of, cell):
    """Rows for `table`, one a group of {name: {seed: {group: value}}}; ISM - causal, seed by seed.

    cell: `percent` or `decimals`, which turns a list of values into text.
    """
    lines = []
    causal = next((name for name in values_of if name.startswith("causal")), None)
    records = [groups for seeds in values_of.values() for groups in seeds.values()]
    for group in dict.fromkeys(key for groups in records for key in groups):
        line = {title: group}
        values = {name: {seed: groups[group] for seed, groups in seeds.items() if group in groups}
                  for name, seeds in values_of.items()}
        for name in values_of:
            line[name] = cell(list(values[name].values()))
        for name in values_of:
            if name.startswith("ism") and causal:
                pairs = values[name].keys() & values[causal].keys()
                both = [values[name][seed] - values[causal][seed] for seed in sorted(pairs)]
                line[f"{name} - {causal}"] = cell(both, "+")
        lines.append(line)
    return lines


def check_masks(names):
    """ValueError if one of the names, with commas between, is no mask."""
    for name in names.split(","):
        if name not in MASKS:
            raise ValueError(f"--masks {names}: '{name}' is no mask; there are {', '.join(MASKS)}")


# Student's t, for 2 to 16 values; for more the last one is a little too wide.
T975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)


def interval(values):
    """Half of the 95 % t interval of a mean; NaN for one value."""
    n = len(values)
    return T975[min(n, 16) - 2] * np.std(values, ddof=1) / n**0.5 if n > 1 else np.nan


def decimals(values, sign="", digits=3, times=1):
    """A mean with its interval as text: of losses; of shares see `percent`."""
    if len(values) == 0:
        return "-"
    mean = f"{times * np.mean(values):{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {times * interval(values):.{digits}f}"


percent = functools.partial(decimals, digits=1, times=100)


# What makes a picture that has not the name of its program, or is not made without flags.
FLAGS = {
    "real": ["compare.py"],
    "race": ["race.py", "--seed", "22", "--steps", "3000", "--decay", "0.3", "--every", "100"],
}

if __name__ == "__main__":
    for committed in sorted((ROOT / "demos").glob("*.png")):
        made_by = FLAGS.get(committed.stem, [f"{committed.stem}.py"])
        command = [sys.executable, f"demos/{made_by[0]}", *made_by[1:], "--out", str(committed)]
        subprocess.run(command, cwd=ROOT, check=True)
