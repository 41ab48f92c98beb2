"""
Does a published model gain by reading queries in both directions? SmolLM2 under causal and ISM.

    python demos/compare.py              prints and draws the committed figures, without training
    python demos/compare.py --full       fine-tunes, hours on a CPU, and writes out/compare.json
    python demos/compare.py --full --kinds gsm8k --gsm8k FOLDER     its train.jsonl and test.jsonl

Both masks get the same dialogues, seeds and steps of LoRA, and each the better of the rates. The
dialogues are of three kinds, each asked apart:

    question last   lists and facts, told before it is known what will be asked about them
    dialogues       those of data/synthetic/families.py
    gsm8k           sums told as a story, with a worked answer (Cobbe et al., 2021); masks are
                    compared problem by problem

SmolLM2 was trained under causal. So the curves also tell how fast it learns to read both ways;
under ism_sink it starts nearer to it (demos/sink.py). Two commands with other --masks can run
beside each other.
"""
import functools
import itertools
import json
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import hf, machine
from data.loader import Encoder, Split, write_split
from data.machine import setting
from data.scores import summary
from data.synthetic.families import generate, listed
from data.synthetic.words import FOODS, NAMES, Random
from demos.finetune import Finetune, finetune
from demos.output import (
    Study,
    add_run,
    by_group,
    check_masks,
    color,
    dashes,
    decimals,
    percent,
    picture,
    plt,
    read_figures,
    save,
    table,
)
from mask import MASKS
from train import evaluate, predicted

KINDS = "question last", "dialogues", "gsm8k"


@dataclass
class Comparison(Study):
    """What is run and where it goes. Each field is a flag of the command line."""

    COMMITTED = "real.json"

    init_from: str = setting("out/smollm2", "the Hugging Face folder to start from")
    kinds: str = setting("question last,dialogues", "of dialogues, with commas between")
    gsm8k: str = setting("", "a folder with GSM8K's train.jsonl and test.jsonl")
    problems: int = setting(1319, "how many of GSM8K's to test on")
    twice: bool = setting(False, "say each query twice, so that causal has seen how it ends")
    masks: str = setting("causal,ism", "names of masks, with commas between")
    rates: str = setting("1e-3,3e-3", "rates that the first seed tries, with commas between")
    steps: int = setting(120, "training steps")
    every: int = setting(20, "steps between two looks")
    batch_size: int = setting(2, "a step holds batch_size * block_size tokens, whole dialogues")
    block_size: int = setting(256, "longest dialogue in tokens")
    rank: int = setting(16, "of LoRA; 0 trains all weights")
    anneal: int = setting(0, "steps in which the mask goes from causal to its own")
    dtype: str = setting("auto", "to compute in, see train.py", machine.DTYPES)
    n: int = setting(400, "dialogues of each kind to train on; a tenth to test on")
    runs: str = setting("out/compare", "the folder of the runs, a file each")
    out: str = setting(picture("real"), "the picture")

    def __post_init__(self):
        super().__post_init__()
        smallest = {"steps": 1, "every": 1, "batch_size": 1, "rank": 0, "n": 40}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, not {getattr(self, name)}")
        check_masks(self.masks)
        for kind in self.kinds.split(","):
            if kind not in KINDS:
                raise ValueError(f"--kinds {kind}: expected some of {', '.join(KINDS)}")
        if "gsm8k" in self.kinds and not self.gsm8k:
            raise ValueError("--kinds gsm8k needs --gsm8k FOLDER, with train.jsonl and test.jsonl")
        if self.full and not Path(self.init_from, "config.json").exists():
            how = "python demos/real.py makes out/smollm2"
            raise ValueError(f"--init_from {self.init_from} is no Hugging Face folder; {how}")
        try:
            self.tried = [float(rate) for rate in self.rates.split(",")]
        except ValueError:
            numbers = "expected numbers with commas between"
            raise ValueError(f"--rates {self.rates}: {numbers}") from None


# --- the dialogues ------------------------------------------------------------------------------

ORDINALS = "first", "second", "third", "fourth", "fifth", "sixth"


def nth(rng):
    names = rng.sample(NAMES, 6)
    i = rng.randrange(6)
    return f"Names: {listed(names)}. Which is the {ORDINALS[i]}?", f"{names[i]}."


def named_once(rng):
    once, *others = rng.sample(NAMES, 4)
    named = [once, *others, *others]
    rng.shuffle(named)
    return f"Names: {listed(named)}. Which is there only once?", f"{once}."


def to_buy(rng):
    gone, *rest = rng.sample(FOODS, 5)
    items = rng.sample([gone, *rest], 5)
    return f"I need {listed(items)}. I have {listed(rest)}. What is missing?", f"{gone}."


def options(rng):
    """The choices come before the text that says which of them is right."""
    names = rng.sample(NAMES, 4)
    one, *others = rng.sample(names, 4)
    text = f"{one} found the key, after {others[0]} and {others[1]} had looked for it."
    return f"Is it {listed(names[:-1])} or {names[-1]}? {text} Who found it?", f"{one}."


def links(rng):
    """A chain of facts in any order, of which the question needs two."""
    chain = rng.sample(NAMES, 4)
    links = [f"{a} reports to {b}." for a, b in zip(chain, chain[1:])]
    rng.shuffle(links)
    i = rng.randrange(2)
    return f"{' '.join(links)} Who is the boss of {chain[i]}'s boss?", f"{chain[i + 2]}."


LAST = {"the n-th": nth, "only once": named_once, "missing": to_buy, "options first": options,
        "shuffled facts": links}


def question_last(split, n, seed):
    """n dialogues of four turns, all of one kind, which is their family."""
    rng = Random(f"{split} {seed}")
    for _ in range(n):
        family = rng.choice(list(LAST))
        messages = []
        for query, answer in (LAST[family](rng) for _ in range(4)):
            messages.append({"role": "user", "content": query})
            messages.append({"role": "assistant", "content": answer})
        yield {"messages": messages, "family": family}


def gsm8k(path):
    """The questions and worked answers of one of GSM8K's files, without its marks for sums.

    ValueError if it is none.
    """
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line:
            continue
        try:
            record = json.loads(line)
            question, worked = record["question"], record["answer"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is no file of GSM8K: {line[:60]}") from None
        answer = re.sub("<<.*?>>", "", worked)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield {"messages": messages, "family": "gsm8k"}


def stories(c, split, n, seed):
    """n dialogues of GSM8K in the order of a seed; to test on the first ones, the same for all.

    The last tenth of those to train on is there to tune on.
    """
    if split == "test":
        return list(gsm8k(Path(c.gsm8k, "test.jsonl")))[: c.problems]
    problems = list(gsm8k(Path(c.gsm8k, "train.jsonl")))
    cut = len(problems) * 9 // 10
    problems = problems[:cut] if split == "train" else problems[cut:]
    Random(seed).shuffle(problems)
    return problems[:n]


def sources(c, split, n, seed):
    """{kind: n dialogues of a split, which is train, val or test}."""
    dialogues = {}
    for kind in c.kinds.split(","):
        if kind == "question last":
            dialogues[kind] = question_last(split, n, seed)
        elif kind == "dialogues":
            dialogues[kind] = generate(split, n, seed, mixed=True)
        else:
            dialogues[kind] = stories(c, split, n, seed)
    return dialogues


def said_twice(messages):
    """Repeat each query, so that its second copy sees all of the first."""
    texts = {"user": "{0}\n\n{0}"}
    return [{**m, "content": texts.get(m["role"], "{0}").format(m["content"])} for m in messages]


def splits(c, seed, folder):
    """{"train": all kinds together, "val": {kind: Split}, "test": {kind: Split}}."""
    encoder = Encoder(hf.load_tokenizer(c.init_from), c.block_size)

    def split(name, dialogues):
        if c.twice:
            dialogues = ({**d, "messages": said_twice(d["messages"])} for d in dialogues)
        write_split(folder, name, list(encoder.rows(dialogues)))
        return Split(folder, name)

    result = {"train": split("train", itertools.chain(*sources(c, "train", c.n, seed).values()))}
    for name, n in (("val", c.n // 40), ("test", c.n // 10)):
        kinds = sources(c, name, n, seed)
        result[name] = {kind: split(f"{name} {kind}", kinds[kind]) for kind in kinds}
    encoder.print_counts()
    return result


# --- the runs -----------------------------------------------------------------------------------


def run_one(c, mask, seed, rate):
    """Fine-tune under a mask -> its record: curves on val, and the end on test, by kind."""
    print(f"{mask}, seed {seed}, rate {rate:g}", flush=True)
    rank = max(c.rank, 1)  # read with LoRA alone
    s = Finetune(
        init_from=c.init_from, mask=mask, seed=seed, learning_rate=rate, lora=c.rank > 0,
        rank=rank, alpha=2.0 * rank, max_iters=c.steps, batch_size=c.batch_size,
        block_size=c.block_size, warmup_iters=c.steps // 12, anneal=c.anneal,
        eval_interval=c.steps, dtype=c.dtype,
    )
    record = {
        "mask": mask, "seed": seed, "rate": rate, "anneal": c.anneal, "rank": c.rank,
        "twice": c.twice, "steps": [], "curves": {}, "end": {}, "families": {}, "pairs": {},
    }
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        data = splits(c, seed, Path(folder))

        def watch(run, loss):
            print(f"step {run.step}, loss {loss.item():.3f}", flush=True)
            # After the first step the model is still nearly the published one.
            if run.step == 1 or run.step % c.every == 0:
                record["steps"].append(run.step)
                for kind, split in data["val"].items():
                    record["curves"].setdefault(kind, []).append(ask(run, split)[:2])
            if run.step == c.steps:
                for kind, split in data["test"].items():
                    if kind == "gsm8k":
                        sums = loss_by_dialogue(run, split)
                        record["pairs"] = dict(zip(("loss", "tokens"), map(on_one_line, sums)))
                        record["end"][kind] = [float(sums[0].sum() / sums[1].sum())]
                        continue
                    loss, right, families = ask(run, split)
                    record["end"][kind] = loss, right
                    record["families"].update(families)

        # train() evaluates "test" at its end. The result is not used, so it gets a small split.
        small = next(iter(data["val"].values()))
        finetune(s, {"train": data["train"], "test": small}, watch)
    return {**record, "seconds": time.time() - began}


def ask(run, split):
    """(mean loss, share of answers that are right as a whole, {family: such a share})."""
    loss, answers = evaluate(run, split)
    families, _ = summary(split, answers)
    return loss, float(answers[:, 2].mean()), families


@torch.no_grad()
def loss_by_dialogue(run, split):
    """The loss of each dialogue's answers, summed, and their tokens: (2, dialogues)."""
    mask, model = MASKS[run.s.mask], run.model.eval()
    sums = torch.zeros(2, len(split.offsets) - 1)
    for rows in split.batches(split.rows(mask), 2048, seed=0):
        tokens, segments = split.collate(rows)  # (B, T) each
        f = mask(segments)  # (B, T)
        at, targets = predicted(tokens, segments, f)  # (N,) each
        with machine.autocast(run.device, run.dtype):
            logits = model(tokens.to(run.device), f, at=at.to(run.device))  # (N, V)
        losses = F.cross_entropy(logits.float().cpu(), targets, reduction="none")  # (N,)
        dialogue = torch.from_numpy(rows[:, 0])[at // tokens.shape[1]]  # (N,)
        sums[0].index_add_(0, dialogue, losses)
        sums[1].index_add_(0, dialogue, torch.ones_like(losses))
    model.train()
    return sums.numpy()


def on_one_line(numbers):
    """Numbers as one line of a file of figures."""
    return " ".join(f"{x:.5g}" for x in numbers)


def run_all(c):
    """Make the runs that have no file yet: all masks of a seed, then the next seed."""
    for seed in c.all_seeds:
        for mask in c.masks.split(","):
            rates = c.tried
            if len(rates) > 1 and seed != c.all_seeds[0]:
                name = named({"mask": mask, "anneal": c.anneal, "rank": c.rank, "twice": c.twice})
                rates = [best_rate(read_figures(c.json)["runs"], name)]
            for rate in rates:
                file = f"{mask}-{seed}-{rate:g}-anneal-{c.anneal}-rank-{c.rank}"
                file += "-twice.json" if c.twice else ".json"
                make = functools.partial(run_one, c, mask, seed, rate)
                add_run(Path(c.runs, file), make, c.json)


def chosen_by(run):
    """The loss on val at the end, mean of the kinds."""
    return np.mean([curve[-1][0] for curve in run["curves"].values()])


def named(run):
    """The name of a run in tables. Runs that differ in seed and rate alone share it."""
    parts = [run["mask"]]
    if run["twice"]:
        parts.append("given twice")
    if run["anneal"]:
        parts.append("annealed")
    if run["rank"] != Comparison.rank:
        parts.append(f"rank {run['rank']}" if run["rank"] else "all weights")
    return ", ".join(parts)


def best_rate(runs, name):
    """Of the rates that the first seed has tried, the one with the least loss on val."""
    runs = [run for run in runs if named(run) == name]
    first = min(run["seed"] for run in runs)
    return min((run for run in runs if run["seed"] == first), key=chosen_by)["rate"]


# --- what was seen ------------------------------------------------------------------------------


def at_best(figures):
    """{name in tables: the runs of that name at its best rate, by seed}."""
    best = {}
    for name in dict.fromkeys(map(named, figures["runs"])):
        wanted = name, best_rate(figures["runs"], name)
        runs = [run for run in figures["runs"] if (named(run), run["rate"]) == wanted]
        best[name] = sorted(runs, key=lambda run: run["seed"])
    return best


def report(figures):
    """The tables: the rates that were tried, the end, the way there."""
    first = min(run["seed"] for run in figures["runs"])
    table(f"Rates, seed {first}: loss on the dialogues to tune on, mean of the kinds", [
        {"run": named(run), "rate": run["rate"],
         "loss": f"{chosen_by(run):.3f}", "minutes": f"{run['seconds'] / 60:.0f}"}
        for run in figures["runs"] if run["seed"] == first
    ])
    best = at_best(figures)
    n = max(map(len, best.values()))
    means = f"means of at most {n} seeds, 95 % t intervals" if n > 1 else "one seed"
    for title, of_run, cell in (
        ("Loss on held-out answers at the end", functools.partial(ends, which=0), decimals),
        ("Whole held-out answers that are right, %", functools.partial(ends, which=1), percent),
        ("The same by family", lambda run: run["families"], percent),
    ):
        lines = by_group("held out", {
            name: {run["seed"]: of_run(run) for run in runs} for name, runs in best.items()
        }, cell)
        if lines:
            table(f"{title}, {means}", lines)
    pairs = by_dialogue(best)
    if pairs:
        table("GSM8K, problem by problem: loss a token, ± 1.96 standard errors", pairs)
    steps = figures["runs"][0]["steps"]
    for kind in figures["runs"][0]["curves"]:
        rows = []
        for mask, runs in best.items():
            losses = np.array([run["curves"][kind] for run in runs])[:, :, 0].mean(0)
            by_step = {str(step): f"{loss:.3f}" for step, loss in zip(steps, losses)}
            rows.append({"mask": mask, **by_step})
        table(f"{kind}: loss after so many steps, {'mean of the seeds' if n > 1 else 'one seed'}",
              rows)


def ends(run, which):
    """By kind, a run's loss on test (which = 0) or share of answers that are right (1)."""
    return {kind: end[which] for kind, end in run["end"].items() if which < len(end)}


def by_dialogue(best):
    """Rows for `table`: each run's loss a token less that of causal with the same seed."""
    base = next(name for name in best if name.startswith("causal") and "twice" not in name)
    numbers = {}  # (name, seed): losses and tokens of each problem, (2, problems)
    for name, runs in best.items():
        for run in runs:
            if run["pairs"]:
                pairs = [run["pairs"][key].split() for key in ("loss", "tokens")]
                numbers[name, run["seed"]] = np.array(pairs, dtype=float)
    lines = []
    for (name, seed), (losses, tokens) in numbers.items():
        if name == base or (base, seed) not in numbers:
            continue
        more = losses - numbers[base, seed][0]  # (problems,)
        mean = more.sum() / tokens.sum()
        error = np.sqrt(((more - mean * tokens) ** 2).sum()) / tokens.sum()
        lines.append({"run": name, "seed": seed, "problems": len(more),
                      "loss": f"{losses.sum() / tokens.sum():.4f}",
                      "more than causal": f"{mean:+.4f} ± {1.96 * error:.4f}"})
    return lines


def draw(figures, path):
    """Losses and shares against steps, a column a kind; thin lines are seeds, thick ones means."""
    kinds = list(figures["runs"][0]["curves"])
    figure, axes = plt.subplots(2, len(kinds), figsize=(1 + 4 * len(kinds), 6), squeeze=False,
                                sharex=True, layout="constrained")
    for mask, runs in at_best(figures).items():
        for column, kind in zip(axes.T, kinds):
            curves = np.array([run["curves"][kind] for run in runs])  # (seeds, evaluations, 2)
            for which, axis in enumerate(column):
                lines = curves[:, :, which] * (1, 100)[which]
                axis.plot(runs[0]["steps"], lines.T, color=color(mask), alpha=0.3, lw=0.8)
                axis.plot(runs[0]["steps"], lines.mean(0), dashes(mask), color=color(mask),
                          label=mask)
    for column, kind in zip(axes.T, kinds):
        column[0].set_title(kind)
        column[1].set_xlabel("steps of LoRA")
        for axis in column:
            axis.grid(alpha=0.2)
            axis.set_ylim(0)
    axes[0, 0].set_ylabel("loss on held-out answers")
    axes[1, 0].set_ylabel("% of held-out answers right")
    axes[0, -1].legend()
    save(figure, path, 120)


def main():
    with machine.errors_in_one_line("lower --batch_size"):
        c = machine.parse(Comparison, "A published model under two masks.")
        c.carry_out(run_all, report, draw)


if __name__ == "__main__":
    main()
