"""
Does it help to read a query in both directions? The same GPT, data, seeds and budget under each mask.

The claim of the paper: ISM answers better than a causal model on multi-turn and context-heavy tasks, and
trains without the triplets that a prefix model needs. Four parts:

1. dialogues of data/dialogues.py under causal, ISM, prefix (one row a turn: the triplets), and causal with loss
   on all tokens. All train the same number of answer tokens, with the learning rate that was best for each on a
   seed of its own. Accuracy is the share of held-out answers that are right as a whole;
2. the same with the shape of a LLaMA, of a Qwen, and with 4 layers, one seed each, at the rates of part 1;
3. self-chat, as in BotChat: the model's own answers stand in the history in place of the right ones;
4. lists of symbols, where what comes later changes what an earlier word means: `missing` (which of the first list
   is not in the second?), `once` (what is named only once?) and `chain` (follow shuffled definitions, 1 to 3 steps).
   Accuracy against steps, by depth, with and without token shift. With one layer causal and ISM must agree: the rows
   of answers are the same under both, and what a query's token has seen can only matter from the second layer on.

A full run takes hours on a CPU. Its figures are in demos/quality.json, and

    python demos/quality.py              prints and draws them, without training
    python demos/quality.py --quick      trains all parts with a handful of steps: some seconds, to see that it runs
    python demos/quality.py --full       trains all parts; called again, it goes on where it was stopped

The synthetic dialogues stand in for the paper's benchmarks; these are not scores on MT-Eval, BotChat or MATH.
"""
import concurrent.futures
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from data.checkpoint import whole_file
from data.dialogues import PATTERNS, generate
from data.loader import Split, prepare
from data.tokenizer import Tokenizer
from demos.output import COLORS, check_writable, plt
from mask import MASKS, causal, loss_positions
from model import GPT, GPTConfig
from sample import Chat
from train import (Parser, Settings, batch_stream, evaluate, learning_rate, make_optimizer, model_config,
                   needs_new_word, pick_device, pick_dtype, segment_text, summary, tune_cpu, update)

ROWS = {"causal": {"mask": "causal"}, "ism": {"mask": "ism"}, "prefix": {"mask": "prefix"},
        "causal, all tokens": {"mask": "causal", "answers_only": False}}
MODELS = {"1 layer": {"n_layer": 1}, "2 layers": {"n_layer": 2}, "4 layers": {"n_layer": 4},
          "2 layers, no shift": {"n_layer": 2, "token_shift": False}, "4 layers, no shift": {"n_layer": 4, "token_shift": False},
          "LLaMA-like": {"n_kv_head": 2, "tie_embeddings": False, "token_shift": False, "qk_norm": False},
          "Qwen-like": {"n_kv_head": 2, "qkv_bias": True, "token_shift": False, "qk_norm": False}}
SWEEP_SEED = 100  # tunes the learning rate and is reported nowhere
FULL = {"steps": 500, "seeds": 3, "rates": [5e-3, 1e-2], "others": ["LLaMA-like", "Qwen-like"],
        "dialogues": 24000, "chats": 200, "longest": 64, "price_steps": 50, "settings": {},
        "list_steps": 600, "list_rates": [2e-3, 5e-3], "list_rows": 20000, "every": 25,
        "lists": [["missing", "2 layers, no shift"], ["missing", "2 layers"], ["missing", "4 layers, no shift"], ["chain", "4 layers"],
                  ["once", "2 layers, no shift"]]}
QUICK = FULL | {"steps": 6, "seeds": 2, "rates": [4e-3], "others": ["Qwen-like"], "dialogues": 40, "chats": 2, "longest": 4,
                "price_steps": 2, "settings": {"n_embd": 32, "batch_size": 2}, "list_steps": 6, "list_rates": [4e-3],
                "list_rows": 40, "every": 2, "lists": [["missing", "2 layers"]]}


class Run(NamedTuple):
    """One training run. rate 0 is a reported one, with the rate that its sweep finds."""
    task: str
    model: str
    row: str
    seed: int
    rate: float = 0.0


def rates(task, size):
    return size["rates" if task == "dialogues" else "list_rates"]


def plan(size):
    """All runs, the most important first, long ones before short ones."""
    def tuned(task, model, rows):
        hows = [(SWEEP_SEED, rate) for rate in rates(task, size)] + [(seed,) for seed in range(size["seeds"])]
        return [Run(task, model, row, *how) for how in hows for row in rows]

    rows, two = ("prefix", "causal, all tokens", "ism", "causal"), ("ism", "causal")
    runs = tuned("dialogues", "2 layers", rows)
    for task, model in size["lists"]:
        runs += tuned(task, model, two)
    return runs + [Run("missing", "1 layer", row, 0) for row in two] + [
        Run("dialogues", model, row, 0) for model in size["others"] for row in rows]


def best_rate(run, records, size):
    """The learning rate of a run: the best on the seed of the sweep, where the model was not swept that of 2 layers.

    None as long as runs of the sweep are missing.
    """
    if run.rate:
        return run.rate
    swept = run.task != "dialogues" and [run.task, run.model] in size["lists"]
    like = run.task, run.model if swept else "2 layers", run.row
    sweep = [r for r in records if (r["task"], r["model"], r["row"]) == like and r["rate"]]
    return max(sweep, key=lambda r: r["score"])["rate"] if len(sweep) == len(rates(run.task, size)) else None


# --- the tasks on lists -------------------------------------------------------------------------------------

ITEMS, FIRST, SECOND, LINK, ASK, VOCABULARY = 40, 40, 41, 42, 43, 47  # tokens 0 to 39 are items, 44 to 46 ask for 1 to 3 steps


def missing(rng):
    """Four turns, each with two lists of its own."""
    for _ in range(4):
        gone, *rest = rng.sample(range(ITEMS), rng.randint(3, 9))
        items = rng.sample([gone, *rest], len(rest) + 1)
        yield [FIRST, *items, SECOND, *rest, ASK], gone


def once(rng):
    """Four turns, each with a list of its own."""
    for _ in range(4):
        items = rng.sample(range(ITEMS), rng.randint(2, 7))
        named = items + items[1:]
        rng.shuffle(named)
        yield [FIRST, *named, ASK], items[0]


def chain(rng):
    """Shuffled definitions in the first query, three chains a -> b -> c -> d, and eight questions: what is n steps after x?"""
    chains = np.array(rng.sample(range(ITEMS), 12)).reshape(3, 4).tolist()
    links = [[LINK, x, y] for items in chains for x, y in zip(items, items[1:])]
    rng.shuffle(links)
    query = sum(links, [])
    for _ in range(8):
        items, n = rng.choice(chains), rng.randint(1, 3)
        start = rng.randint(0, 3 - n)
        yield [*query, ASK + n, items[start]], items[start + n]
        query = []


TASKS = {"missing": missing, "once": once, "chain": chain}


class Lists(Split):
    """n rows of a task, each answer one token."""

    def __init__(self, task, n, seed):
        rng, tokens, segments, offsets = random.Random(seed), [], [], [0]
        for _ in range(n):
            for turn, (query, answer) in enumerate(task(rng)):
                tokens += [*query, answer]
                segments += [2 * turn + 1] * len(query) + [2 * turn + 2]
            offsets.append(len(tokens))
        self.tokens, self.segments, self.offsets = map(np.array, (tokens, segments, offsets))


# --- one training run ---------------------------------------------------------------------------------------

def budget(split, s):
    """How many answer tokens s.max_iters steps train in one pass, and s with batches that train as many under s.mask.

    A prefix mask repeats the history in each of its rows, so its batches hold more tokens.
    """
    once, rows = split.rows(causal), split.rows(MASKS[s.mask])
    more = (rows[:, 2] - rows[:, 1]).sum() / (once[:, 2] - once[:, 1]).sum()
    steps = len(split.batches(once, s.batch_size * s.block_size, seed=0))  # that see each answer once
    answer_tokens = np.count_nonzero(np.asarray(split.segments) % 2 == 0)
    return s.max_iters * answer_tokens / steps, replace(s, batch_size=round(s.batch_size * more))


def fit(s, split, vocab_size, check=lambda model, step: None):
    """Train on the budget, with check(model, step) after each step: the model and what it took."""
    tune_cpu()
    device, dtype, mask = pick_device(s.device), getattr(torch, s.dtype), MASKS[s.mask]
    total, wide = budget(split, s)
    torch.manual_seed(s.seed)
    model = GPT(model_config(s, vocab_size)).to(device)
    optimizer = make_optimizer(model, s)
    took = {"budget": total, "steps": 0, "tokens": 0, "answers": 0, "answer_tokens": 0, "largest_step": 0}
    start = time.perf_counter()
    for rows in batch_stream(split, split.rows(mask), wide, 0):
        rate = learning_rate(took["answer_tokens"] / total * s.max_iters, s)
        loss = update(model, optimizer, split, rows, mask, rate, s, device, dtype)
        _, segments = split.collate(rows)
        trained = loss_positions(segments, mask(segments))  # (B, T) those of answers alone
        took["steps"] += 1
        took["tokens"] += int((segments > 0).sum())
        took["answers"] += int((trained & (segments % 2 == 1)).sum())  # an answer is foretold from its query's last token
        took["answer_tokens"] += int(trained.sum())
        took["largest_step"] = max(took["largest_step"], int(trained.sum()))  # in answer tokens
        check(model, took["steps"])
        if took["answer_tokens"] >= total:
            loss.item()  # waits for the device
            return model, took | {"seconds": time.perf_counter() - start}


def settings(run, size, device, dtype):
    lists = {"max_iters": size["list_steps"], "batch_size": 8, "decay": 0.0}  # a constant rate: the curves do not depend on where they end
    return Settings(**{"seed": run.seed, "device": device, "dtype": dtype, "n_dialogues": size["dialogues"], "mixed": False,
                       "max_iters": size["steps"], **(lists if run.task in TASKS else {}), **ROWS[run.row], **MODELS[run.model],
                       **size["settings"]})


def data(s):
    return prepare(Tokenizer(), s.block_size, "", s.n_dialogues, s.seed, s.mixed)


def execute(run, rate, size, device, dtype):
    """Train and measure: what the JSON holds of a run."""
    s = replace(settings(run, size, device, dtype), learning_rate=rate)
    result = dialogues(s, size, run.rate > 0) if run.task == "dialogues" else lists(TASKS[run.task], s, size)
    return run._asdict() | {"learning_rate": rate} | result


def lists(task, s, size):
    held_out = Lists(task, 250, f"held out {s.seed}")
    asks = held_out.tokens[np.flatnonzero(held_out.segments % 2 == 0) - 2]  # one an answer, in order
    groups = {"all": asks >= 0} | {f"{n} steps": asks == ASK + n for n in (1, 2, 3)}
    curves = {name: [] for name, at in groups.items() if at.any()}

    def check(model, step):
        if step % size["every"] == 0:
            _, answers = evaluate(model, held_out, MASKS[s.mask], s, pick_device(s.device), getattr(torch, s.dtype))
            right = answers[np.lexsort((answers[:, 1], answers[:, 0])), 2]
            for name, curve in curves.items():
                curve.append(round(float(right[groups[name]].mean()), 4))

    _, took = fit(s, Lists(task, size["list_rows"], f"train {s.seed}"), VOCABULARY, check)
    return took | {"curves": curves, "score": float(np.mean(curves["all"]))}


def dialogues(s, size, tuning):
    folder, tokenizer = data(s), Tokenizer()
    model, took = fit(s, Split(folder, "train"), tokenizer.vocab_size)
    val, test, new = (Split(folder, name) for name in ("val", "test", "new_words"))

    def answers_of(split):
        return evaluate(model, split, MASKS[s.mask], s, pick_device(s.device), getattr(torch, s.dtype))[1]

    result = took | {"score": float(answers_of(val)[:, 2].mean()), "parameters": model.n_params()}
    if tuning:
        return result
    answers, answers_new = answers_of(test), answers_of(new)
    families, _ = summary(test, answers)
    _, segment, right = answers.T
    groups = {f"turn {t}": segment == 2 * t for t in range(1, 9)}
    kinds = np.array([kind(segment_text(test, tokenizer, d, at - 1)) if test.family_names[test.families[d]] == "reasoning" else ""
                      for d, at, _ in answers])
    groups |= {name: kinds == name for name in np.unique(kinds) if name}
    accuracy = {"all": float(right.mean()), **families}
    accuracy |= {name: float(right[at].mean()) for name, at in groups.items() if at.any()}
    accuracy["words never trained on"] = float(answers_new[needs_new_word(new, answers_new, tokenizer), 2].mean())
    return result | {"accuracy": accuracy, "chat": self_chat(model, tokenizer, test, answers, s, size)}


def kind(query):
    """What a query of the family `reasoning` asks for; for definitions, how many additions it takes."""
    if "=" in query:
        return f"definitions, {query.count('+')} steps"
    return "missing from a list" if "missing" in query else "named only once"


def self_chat(model, tokenizer, split, answers, s, size):
    """Turn by turn: how many answers there are, how many are right after the right ones, how many after the model's own."""
    taught = {(d, at): bool(right) for d, at, right in answers.tolist()}
    model, turns = model.cpu(), []
    for d, dialogue in enumerate(generate("test", min(size["chats"], len(split.families)), s.seed)):
        messages = dialogue["messages"]
        if tokenizer.encode_dialogue(messages)[0] != split.tokens[slice(*split.offsets[d : d + 2])].tolist():
            continue  # too long for the context
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
        chat = Chat(model, tokenizer, MASKS[s.mask], system, max_new_tokens=size["longest"])
        for turn, (query, answer) in enumerate(zip(messages[::2], messages[1::2])):
            turns += [[0, 0, 0]] * (turn == len(turns))
            right = chat.send(query["content"]) == answer["content"]
            turns[turn] = [turns[turn][0] + 1, turns[turn][1] + taught[d, 2 * turn + 2], turns[turn][2] + right]
    return turns


# --- all runs -----------------------------------------------------------------------------------------------

def commit():
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty", "--exclude", "*"], cwd=HERE, capture_output=True,
                              text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not in a git repository"


def load(path):
    """The figures in a file that a run wrote. ValueError if it is none."""
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
        return {name: figures[name] for name in ("size", "made", "price", "runs")}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} holds no figures of this demo; name a file that --quick or --full has written") from None


def save(figures, path):
    with whole_file(path) as file:
        file.write((json.dumps(figures, indent=1) + "\n").encode())


def one_thread(threads):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a job without a traceback
    torch.set_num_threads(threads)


def price(figures, path, device, dtype):
    """Steps of each row of part 1, alone on the machine and on the data alone: on the CPU, and on the device."""
    size = figures["size"]
    for place in dict.fromkeys(("cpu", device)):
        for row in (next(iter(ROWS)), *ROWS):  # the first one twice: it warms up
            s = replace(settings(Run("dialogues", "2 layers", row, 0), size, place, dtype), max_iters=size["price_steps"])
            _, took = fit(s, Split(data(s), "train"), Tokenizer().vocab_size)
            figures["price"].setdefault(place, {})[row] = took
    save(figures, path)


def train_all(figures, todo, path, jobs, device, dtype):
    """Run what is to do, `jobs` at a time, each result written to path as it comes."""
    size = figures["size"]
    threads = max(1, os.cpu_count() // jobs)
    os.environ |= {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}  # of the jobs
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context, one_thread, (threads,)) as pool, \
            tqdm(total=len(todo), desc="train", unit="run") as bar:
        seeds = {run.seed: settings(run, size, device, dtype) for run in todo if run.task == "dialogues"}
        list(pool.map(data, seeds.values()))
        running = {}
        while todo or running:
            for run in todo[:]:
                rate = best_rate(run, figures["runs"], size)
                if rate and len(running) < jobs:
                    todo.remove(run)
                    running[pool.submit(execute, run, rate, size, device, dtype)] = run
            for future in concurrent.futures.wait(running, return_when="FIRST_COMPLETED").done:
                run, record = running.pop(future), future.result()
                figures["runs"].append(record)
                save(figures, path)
                bar.update()
                bar.write(f"{run.task}, {run.model}, {run.row}, seed {run.seed}, rate {record['learning_rate']:g}: "
                          f"{record['score']:.1%}, {record['seconds']:.0f} s")


# --- tables and picture -------------------------------------------------------------------------------------

T975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 97.5 %, for 2 to 10 seeds


def half_width(values):
    """Of the 95 % t interval of a mean over seeds; nan for one seed."""
    return T975[len(values) - 2] * np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan


def percent(values, sign=""):
    if not len(values):
        return "-"
    return f"{100 * np.mean(values):{sign}.1f}" + (f" ± {100 * half_width(values):.1f}" if len(values) > 1 else "")


def table(title, rows):
    """Print a list of dicts as a Markdown table."""
    lines = [[str(cell) for cell in line] for line in (list(rows[0]), *(row.values() for row in rows))]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]])
    print(f"\n{title}\n")
    for line in lines:
        print("| " + " | ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(line)) + " |")


def chosen(figures, **fields):
    """The reported runs with these fields, in the order of their seeds."""
    runs = [r for r in figures["runs"] if not r["rate"] and all(r[name] == value for name, value in fields.items())]
    return sorted(runs, key=lambda r: r["seed"])


def chat_share(runs, turn, own):
    """Share of right answers in a turn (None: in all) after the right answers or the model's own, a number a run."""
    counts = [np.array(r["chat"] if turn is None else r["chat"][turn : turn + 1]).reshape(-1, 3).sum(0) for r in runs]
    return np.array([c[1 + own] / c[0] for c in counts if c[0]])


def one_layer(layers, seed, shift=True):
    """How far causal and ISM differ in the logits that foretell answers: a random GPT, random turns, float64."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    segments = torch.tensor([[s for s in range(1, 7) for _ in range(rng.randint(1, 6))]])  # (1, T)
    tokens = torch.randint(50, segments.shape)
    model = GPT(GPTConfig(50, 64, layers, n_head=2, n_kv_head=2, n_embd=16, n_hidden=32, token_shift=shift)).double()
    with torch.no_grad():
        a, b = (model(tokens, MASKS[name](segments))[loss_positions(segments, causal(segments))] for name in ("causal", "ism"))
    return float((a - b).abs().max())


def report(figures):
    main = {row: chosen(figures, task="dialogues", model="2 layers", row=row) for row in ROWS}
    paired = [(a, b) for a in main["ism"] for b in main["causal"] if a["seed"] == b["seed"]]

    def line(name, measure):
        """measure: some runs -> an array of a share for each of them that has it."""
        less = [d for a, b in paired for d in measure([a]) - measure([b])]
        return {"% right": name, **{row: percent(measure(runs)) for row, runs in main.items()},
                "ism - causal": percent(less, "+")}

    def share(group):
        return lambda runs: np.array([r["accuracy"][group] for r in runs if group in r["accuracy"]])

    if all(main.values()):
        groups = dict.fromkeys(group for r in main["causal"] for group in r["accuracy"])
        table(f"1. Dialogues, held-out answers: means of {len(main['causal'])} seeds (each with its own data, weights and order) "
              "with\n   95 % t intervals over the seeds; ism - causal: seed by seed",
              [line(group, share(group)) for group in groups])
        table("   What it cost. Answers a second: each row alone on the machine. Rates: the best of the sweep", [
            {"row": row, "learning rate": f"{runs[0]['learning_rate']:g}", "steps": f"{runs[0]['steps']:,}",
             "answer tokens trained": f"{runs[0]['answer_tokens']:,}", "tokens processed": f"{runs[0]['tokens']:,}",
             **{f"answers/s, {place}": f"{alone[row]['answers'] / alone[row]['seconds']:,.0f}"
                for place, alone in figures["price"].items()}} for row, runs in main.items()])
        shapes = [model for model in MODELS if chosen(figures, task="dialogues", model=model, seed=0)]
        table("2. Other shapes, seed 0, at the rates of part 1", [
            {"model": model, "% right": group}
            | {row: percent(share(group)(chosen(figures, task="dialogues", model=model, row=row, seed=0))) for row in ROWS}
            for model in shapes for group in ("all", "the four patterns", "reasoning")])
        longest = max(len(r["chat"]) for runs in main.values() for r in runs)
        table("3. Self-chat, turn by turn on the same dialogues: % right after the right answers -> after the model's own", [
            {"turn": "all" if turn is None else turn + 1}
            | {row: " -> ".join(percent(chat_share(runs, turn, own)) for own in (0, 1)) for row, runs in main.items()}
            for turn in (*range(longest), None)])
    every, lines = figures["size"]["every"], []
    for task, model, row in dict.fromkeys((r["task"], r["model"], r["row"]) for r in chosen(figures) if "curves" in r):
        runs = chosen(figures, task=task, model=model, row=row)
        for group in runs[0]["curves"]:
            curves = [r["curves"][group] for r in runs]
            steps = [next((f"{every * (i + 1):,}" for i, right in enumerate(curve) if right >= 0.9), "-") for curve in curves]
            lines.append({"task": f"{task}, {group}", "model": model, "mask": row, "rate": f"{runs[0]['learning_rate']:g}",
                          "steps to 90 %": " / ".join(steps), "% right at the end": percent([curve[-1] for curve in curves])})
    if lines:
        table("4. Lists: steps until 90 % of held-out answers are right, seed by seed "
              f"(-: not in {figures['size']['list_steps']:,})",
              sorted(lines, key=lambda line: (line["task"], line["model"])))
    one, two = (max(one_layer(layers, seed) for seed in range(20)) for layers in (1, 2))
    print(f"\n   Causal and ISM differ in the logits of answers by {one:.1g} at most with one layer, by {two:.1g} with two "
          "(random GPTs).")
    if all(main.values()):
        table("The paper's benchmarks and what stands here for each: synthetic counterparts, not scores on those benchmarks", [
            line("MT-Eval: its four patterns", share("the four patterns")),
            line("BotChat: self-chat, all turns", lambda runs: chat_share(runs, None, 1)),
            line("MATH: reasoning", share("reasoning"))])
    print(*(f"\nMade by `{made['command']}` at commit {made['commit']} on {made['device']}." for made in figures["made"]))


def picture(figures, path):
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.5), layout="constrained")
    families, turns, steps, plain, shifted, chains = axes.flat
    bars = {families: ("all", *PATTERNS, "reasoning", "induction"),
            steps: (*(f"definitions, {n} steps" for n in (1, 2, 3)), "missing from a list", "named only once")}
    for i, row in enumerate(ROWS):
        runs = chosen(figures, task="dialogues", model="2 layers", row=row)
        for axis, groups in bars.items():
            values = [[r["accuracy"][group] for r in runs if group in r["accuracy"]] or [np.nan] for group in groups]
            axis.bar(np.arange(len(groups)) + 0.2 * (i - 1.5), [np.mean(v) for v in values], 0.2, color=COLORS[row], label=row,
                     yerr=[half_width(v) for v in values], error_kw={"lw": 0.8})
            labels = [group.replace(", ", "\n").replace(" from", "\nfrom") for group in groups]
            axis.set_xticks(range(len(groups)), labels, fontsize=7)
        for own, style in ((0, "-"), (1, "--")):
            shares = [chat_share(runs, turn, own) for turn in range(max((len(r["chat"]) for r in runs), default=0))]
            turns.plot(range(1, len(shares) + 1), [v.mean() for v in shares], style, marker=".", color=COLORS[row], label=None if own else row)
    families.set_title("1  Dialogues by family (95 % over seeds)")
    steps.set_title("1  Reasoning by kind and steps")
    turns.set(title="3  By turn (dashed: the model's own answers as history)", xlabel="turn")
    every = figures["size"]["every"]
    for axis, task, lines in (  # of each task the lines to draw: a model and which of its curves
            (plain, "missing", [("2 layers, no shift", "all"), ("4 layers, no shift", "all")]),
            (shifted, "missing", [("2 layers", "all"), ("1 layer", "all")]),
            (chains, "chain", [("4 layers", "2 steps"), ("4 layers", "3 steps")])):
        for (model, name), style in zip(lines, ("-", ":")):
            label = model if name == "all" else f"{name}, {model}"
            for r in chosen(figures, task=task, model=model):
                curve = r["curves"][name]
                axis.plot(every * np.arange(1, len(curve) + 1), curve, style, lw=1.2, color=COLORS[r["row"]],
                          label=None if r["seed"] else f"{r['row']}, {label}")
        axis.set(title=f"4  Lists: {task}", xlabel="training steps")
    filled = [axis for axis in axes.flat if any(len(line.get_xdata()) for line in axis.lines)
              and not axis.patches or any(np.isfinite(bar.get_height()) for bar in axis.patches)]
    for axis in set(axes.flat) - set(filled):  # what was not run yet leaves no empty panel
        axis.remove()
    wide, high = min(3, max(1, len(filled))), max(1, -(-len(filled) // 3))
    grid = figure.add_gridspec(high, wide)
    figure.set_size_inches(5 * wide, 4.25 * high)
    for place, axis in zip(grid, filled):
        axis.set_subplotspec(place)
        axis.set(ylabel="share of answers right", ylim=(0, 1.02))
        axis.grid(alpha=0.2)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=110, format="png")


def main():
    parser = Parser(description="Quality under causal, ISM and prefix masks. Without --quick or --full: show the figures there are.",
                    allow_abbrev=False)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="train with a handful of steps, anew: some seconds")
    what.add_argument("--full", action="store_true", help="train all that --json does not hold yet: hours on a CPU")
    what.add_argument("--plan", action="store_true", help="list what --full would train")
    parser.add_argument("--json", metavar="FILE",
                        help="the figures (default: demos/quality.json; if trained, demos/out/quality.json)")
    parser.add_argument("--out", metavar="FILE", help="the picture (default: demos/out/quality.png)",
                        default=str(HERE / "out" / "quality.png"))
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps (auto)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the computation (auto)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs beside each other (as many as there are cores)")
    parser.add_argument("--steps", type=int, default=FULL["steps"], help=f"of a full run ({FULL['steps']}); lists take 6/5")
    parser.add_argument("--seeds", type=int, default=FULL["seeds"], help=f"of a full run ({FULL['seeds']})")
    args = parser.parse_args()
    if args.jobs < 1 or args.steps < 1 or not 1 <= args.seeds <= 10:
        parser.error("expected --jobs >= 1, --steps >= 1, --seeds from 1 to 10")
    training = args.quick or args.full or args.plan
    path, out = Path(args.json or HERE / ("out" if training else "") / "quality.json"), Path(args.out)
    size = QUICK if args.quick else FULL | {"steps": args.steps, "list_steps": max(1, args.steps * 6 // 5), "seeds": args.seeds}
    try:
        figures = {"size": size, "made": [], "price": {}, "runs": []}
        if not args.quick and (path.exists() or not training):
            figures = load(path)
        if args.full and figures["size"] | {"seeds": 0} != size | {"seeds": 0}:
            raise ValueError(f"{path} holds runs of another size; name another file with --json")
        if training:
            figures["size"] = size
            there = {Run(*(r[field] for field in Run._fields)) for r in figures["runs"]}
            todo = [run for run in plan(size) if run not in there]
            print(f"{len(todo)} of {len(plan(size))} runs are to do")
            if args.plan:
                print("\n".join(" ".join(map(str, run)) for run in todo))
                return
            device = pick_device(args.device)
            dtype = str(pick_dtype(args.dtype, device))[6:]
            check_writable(path, out)
            save(figures, path)
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
            figures["made"].append({"command": " ".join(["python", "demos/quality.py", *sys.argv[1:]]), "commit": commit(),
                                    "device": f"{name}, {args.jobs} jobs, {dtype}, torch {torch.__version__}"})
            if not figures["price"]:
                price(figures, path, str(device), dtype)
            train_all(figures, todo, path, args.jobs, str(device), dtype)
        report(figures)
        picture(figures, out)
        print(f"The picture: {out}")
    except (ValueError, OSError) as error:
        sys.exit(f"quality.py: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\nquality.py: stopped; {path} holds what is done, and --full goes on from there")


if __name__ == "__main__":
    main()
