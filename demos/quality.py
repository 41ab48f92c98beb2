"""
Does it help in dialogues to read a query in both directions? Whole runs of train.py.

The claim of the paper: ISM answers better than a causal model on multi-turn and context-heavy
tasks, and trains without the triplets that a prefix model needs. Here are whole default runs, some
seeds of each, each seed with its own data and weights:

    python demos/quality.py              prints and draws the committed figures, without training
    python demos/quality.py --full       runs what the file of figures does not hold yet: hours
    python demos/quality.py --quick      runs of a handful of steps, to see that it works

Each run is a command of its own: python train.py --mask causal --seed 1 --out_dir FOLDER. Then the
model chats with itself, as in BotChat: its own answers stand in the history in place of the right
ones. All dialogues are synthetic: these are not scores on the paper's benchmarks. Where reading
both ways wins is shown by demos/race.py.
"""
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import machine
from data.checkpoint import load_checkpoint, write_json
from data.dialogues import generate
from data.machine import setting
from demos.output import (
    by_group,
    check_writable,
    color,
    interval,
    percent,
    picture,
    plt,
    read_figures,
    table,
)
from sample import load_chat

ROWS = {  # how each row is trained, beside its seed
    "causal": ["--mask", "causal"],
    "ism": ["--mask", "ism"],
    "prefix": ["--mask", "prefix"],
    "causal, all tokens": ["--mask", "causal", "--no-answers_only"],
}
QUICK = "--max_iters 6 --n_dialogues 40 --n_embd 32 --batch_size 2 --device cpu".split()


@dataclass
class Study:
    """What is run and where it goes. Each field is a flag of the command line."""

    full: bool = setting(False, "run what the file of figures does not hold yet")
    quick: bool = setting(False, "run a handful of steps, without the file of figures")
    rows: str = setting("causal;ism", f"what is run: some of {';'.join(ROWS)}")
    seeds: int = setting(3, "seeds of each, from 0 on")
    chats: int = setting(200, "dialogues in which the model chats with itself")
    runs: str = setting("out/quality", "the folder of the runs")
    json: str = setting("", "the figures (default: demos/quality.json, with --quick none)")
    out: str = setting(picture("quality"), "the picture")

    def __post_init__(self):
        if not 1 <= self.seeds <= 10 or self.chats < 1:
            raise ValueError("expected --seeds from 1 to 10 and --chats from 1 on")
        for row in self.rows.split(";"):
            if row not in ROWS:
                raise ValueError(f"--rows: '{row}' is none of {';'.join(ROWS)}")
        if not self.json and not self.quick:
            self.json = str(ROOT / "demos" / "quality.json")


# --- the runs -----------------------------------------------------------------------------------


def run_all(study, figures):
    """Train and measure what the figures do not hold yet; they are written after each run."""
    there = {(record["row"], record["seed"]) for record in figures["runs"]}
    for seed in range(study.seeds):
        for row in study.rows.split(";"):
            if (row, seed) in there:
                continue
            folder = Path(study.runs, f"{row.replace(', ', '-').replace(' ', '-')}-{seed}")
            figures["runs"].append({"row": row, "seed": seed, **run_one(study, row, seed, folder)})
            if study.json:
                write_json(study.json, figures)


def run_one(study, row, seed, folder):
    """One run of train.py, which goes on if it was stopped, and what is measured of it."""
    print(f"{row}, seed {seed}", flush=True)
    command = [sys.executable, "train.py", *ROWS[row], "--seed", str(seed)]
    command += ["--out_dir", str(folder)]
    if study.quick:
        command += QUICK
    if (folder / "ckpt.pt").exists():
        command.append("--resume")
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise ValueError(f"the run in {folder} has stopped; the same command goes on from there")
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return {**metrics, "chat": self_chat(folder / "ckpt.pt", study.chats)}


def self_chat(path, n):
    """Turn by turn: [how many answers, how many are right with the model's own answers before]."""
    settings = load_checkpoint(path)["settings"]
    chat = load_chat(path, max_new_tokens=64)
    turns = []
    for dialogue in generate("test", n, settings["seed"], mixed=settings["mixed"]):
        messages = dialogue["messages"]
        chat.messages = [m for m in messages[:1] if m["role"] == "system"]
        chat.reset()
        messages = messages[len(chat.messages) :]
        for turn, (query, answer) in enumerate(zip(messages[::2], messages[1::2])):
            if turn == len(turns):
                turns.append([0, 0])
            turns[turn][0] += 1
            turns[turn][1] += int(chat.send(query["content"]) == answer["content"])
    return turns


# --- what was seen ------------------------------------------------------------------------------

GROUPS = {  # where the metrics have the shares, and what stands before their names
    "accuracy": "", "accuracy_by_turn": "turn: ", "accuracy_by_kind": "reasoning: ",
    "accuracy_new_words": "new words: ",
}


def shares(record):
    """All shares of a run, one dict: {"the four patterns": ..., "turn: first": ..., ...}."""
    found = {
        start + name: share
        for key, start in GROUPS.items() for name, share in record.get(key, {}).items()
    }
    asked, right = np.sum(record["chat"], 0)
    return {**found, "its own answers as history": right / asked}


def by_row(figures):
    """{row: its runs, by seed}."""
    found = {row: [r for r in figures["runs"] if r["row"] == row] for row in ROWS}
    return {row: sorted(runs, key=lambda r: r["seed"]) for row, runs in found.items() if runs}


def report(figures):
    """The table: means over seeds with 95 % t intervals; and ISM against causal, seed by seed."""
    runs = by_row(figures)
    found = {row: [shares(record) for record in records] for row, records in runs.items()}
    lines = by_group("% right", found, percent)
    n = max(map(len, found.values()))
    table(f"Whole held-out answers that are right: means of {n} seeds, 95 % t intervals", lines)
    table("What it cost", [
        {"row": row, "steps": records[0]["settings"]["max_iters"],
         "seconds": " / ".join(f"{record['seconds']:.0f}" for record in records)}
        for row, records in runs.items()
    ])


def draw(figures, path):
    """Bars by family and kind, with intervals over seeds."""
    runs = by_row(figures)
    groups = [group for group in shares(figures["runs"][0]) if not group.startswith("new words")]
    figure, axis = plt.subplots(figsize=(8, 6.5), layout="constrained")
    width = 0.8 / len(runs)
    for i, (row, records) in enumerate(runs.items()):
        found = [[shares(record).get(group, np.nan) for record in records] for group in groups]
        places = np.arange(len(groups)) + width * (i - (len(runs) - 1) / 2)
        axis.barh(places, [np.mean(x) for x in found], width, color=color(row), label=row,
                  xerr=[interval(x) for x in found], error_kw={"lw": 0.8})
    axis.set_yticks(range(len(groups)), groups, fontsize=9)
    axis.invert_yaxis()
    axis.set(xlabel="share of answers right", xlim=(0, 1.02))
    axis.grid(alpha=0.2, axis="x")
    axis.legend()
    figure.savefig(path, dpi=120, format="png")


def main():
    with machine.errors_in_one_line("see train.py --help"):
        study = machine.parse(Study, "Quality under the masks: whole runs of train.py.")
        path = Path(study.json)
        check_writable(study.out)
        figures = {"command": "", "cpu": "", "runs": []}
        if not study.quick and (path.exists() or not study.full):
            figures = read_figures(path, ("command", "cpu", "runs"))
        if study.full or study.quick:
            check_writable(json=study.json)
            figures["command"] = " ".join(["python", "demos/quality.py", *sys.argv[1:]])
            figures["cpu"] = machine.describe()
            run_all(study, figures)
        report(figures)
        draw(figures, study.out)
        print(f"\nMade by `{figures['command']}` on {figures['cpu']}.\nThe picture: {study.out}")


if __name__ == "__main__":
    main()
