"""
Does it help in dialogues to read a query in both directions? Whole runs of train.py.

The claim of the paper: ISM answers better than a causal model on multi-turn and context-heavy
tasks, and trains without the triplets that a prefix model needs. Here are whole default runs, some
seeds of each, each seed with its own data and weights:

    python demos/quality.py                        prints and draws the committed figures
    python demos/quality.py --full --seeds 4-15    trains, 6 minutes a run, into out/quality.json
    python demos/quality.py --quick                trains for a handful of steps, to try it

Each run is a command of its own: python train.py --mask causal --seed 1 --out_dir FOLDER. Then the
model chats with itself, as in BotChat: its own answers stand in the history in place of the right
ones. All dialogues are synthetic: these are not scores on the paper's benchmarks. Where reading
both ways wins is shown by demos/race.py. The same command goes on with a study that was stopped.
Commands with other seeds or rows can run beside each other.
"""
import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import machine
from data.checkpoint import load_checkpoint
from data.machine import setting
from data.synthetic import generate
from demos.output import (
    Study,
    add_run,
    by_group,
    color,
    interval,
    percent,
    picture,
    plt,
    save,
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
class Quality(Study):
    """What is run and where it goes. Each field is a flag of the command line."""

    COMMITTED = "quality.json"

    quick: bool = setting(False, "the same in a handful of steps")
    rows: str = setting("causal;ism", f"what is run: some of {';'.join(ROWS)}")
    chats: int = setting(200, "dialogues in which the model chats with itself")
    runs: str = setting("out/quality", "the folder of the runs, a file each")
    out: str = setting(picture("quality"), "the picture")

    def __post_init__(self):
        self.full = self.full or self.quick
        super().__post_init__()
        if self.chats < 1:
            raise ValueError(f"--chats must be at least 1, not {self.chats}")
        for row in self.rows.split(";"):
            if row not in ROWS:
                raise ValueError(f"--rows: '{row}' is none of {';'.join(ROWS)}")


# --- the runs -----------------------------------------------------------------------------------


def run_all(study):
    """Make the runs that have no file yet: all rows of a seed, then the next seed."""
    for seed in study.all_seeds:
        for row in study.rows.split(";"):
            folder = Path(study.runs, f"{row.replace(', ', '-').replace(' ', '-')}-{seed}")
            make = functools.partial(run_one, study, row, seed, folder)
            add_run(folder.with_suffix(".json"), make, study.json)


def run_one(study, row, seed, folder):
    """Run train.py, or resume a run that was stopped -> its figures."""
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
    chat = self_chat(folder / "ckpt.pt", study.chats)
    return {"row": row, "seed": seed, **metrics, "chat": chat}


def self_chat(path, n):
    """Turn by turn: [how many answers, how many are right with the model's own answers before]."""
    settings = load_checkpoint(path)["settings"]
    chat = load_chat(path, max_new_tokens=64)
    turns = []
    for dialogue in generate("test", n, settings["seed"], mixed=True):
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
# Chosen before seeds 4 to 15 were run. In the first two families an answer needs a word that stands
# behind the one that it is about; in the other two that cannot matter.
NAMED = {
    "needs a word behind": ("reasoning", "induction"),
    "needs none behind": ("follow-up", "expansion"),
}


def shares(record):
    """All shares of a run, one dict: {"the four patterns": ..., "turn: first": ..., ...}."""
    right_in = {
        start + name: share
        for key, start in GROUPS.items() for name, share in record.get(key, {}).items()
    }
    for name, families in NAMED.items():
        if all(family in right_in for family in families):
            right_in[name] = np.mean([right_in[family] for family in families])
    asked, right = np.sum(record["chat"], 0)
    return {**right_in, "its own answers as history": right / asked}


def by_row(figures):
    """{row: its runs, by seed}."""
    records = {row: [r for r in figures["runs"] if r["row"] == row] for row in ROWS}
    return {row: sorted(runs, key=lambda r: r["seed"]) for row, runs in records.items() if runs}


def report(figures):
    """The table: means over seeds with 95 % t intervals; and ISM against causal, seed by seed."""
    runs = by_row(figures)
    shares_of = {row: {r["seed"]: shares(r) for r in records} for row, records in runs.items()}
    lines = by_group("% right", shares_of, percent)
    n = max(map(len, shares_of.values()))
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
        found = [
            [100 * shares(record).get(group, np.nan) for record in records] for group in groups
        ]
        places = np.arange(len(groups)) + width * (i - (len(runs) - 1) / 2)
        axis.barh(places, [np.mean(x) for x in found], width, color=color(row), label=row,
                  xerr=[interval(x) for x in found], error_kw={"lw": 0.8})
    axis.set_yticks(range(len(groups)), groups, fontsize=9)
    axis.invert_yaxis()
    axis.set(xlabel="answers right, %", xlim=(0, 100))
    axis.grid(alpha=0.2, axis="x")
    axis.legend()
    save(figure, path, 120)


def main():
    with machine.errors_in_one_line("see train.py --help"):
        study = machine.parse(Quality, "Quality under the masks: whole runs of train.py.")
        study.carry_out(run_all, report, draw)


if __name__ == "__main__":
    main()
