"""
See it win: the same small GPT learns a game under causal and under ISM, side by side.

    python demos/race.py                            about 1 minute on 2 cores
    python demos/race.py --seeds 3                  three races, one after the other
    python demos/race.py --masks causal,ism,yours   other masks, your own in mask.py among them
    python demos/race.py --task missing             another game
    python demos/race.py --json out/race.json       for the page: demos/page.py --race

Both models start from the same weights and see the same games, as many of them. The games are of
symbols, since a sentence tells less a token. Two of them:

    links     A>B F>G B>C ... in any order, three chains of four. Then 18 questions: what is n
              steps after A? One step asks for a link that was read. Two ask for a link of a link.
    missing   two lists: which item of the first is not in the second?

In both an early symbol can only be understood by a later one. Under causal it is read before that
one is known; under ISM it is read together with the whole query.
"""
import itertools
import multiprocessing
import os
import queue
import random
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import machine
from data.checkpoint import write_json
from data.loader import Split
from data.machine import setting
from demos.output import check_masks, check_writable, color, picture, plt, table
from demos.page import look
from mask import MASKS
from model import GPT
from train import Settings, check_mask, evaluate, model_config, train

# --- the games ----------------------------------------------------------------------------------

N_ITEMS = 40  # tokens 0 to 39 are symbols to play with
FIRST, SECOND, LINK, ASK = 40, 41, 42, 43  # a list begins, the other one, a link, a question
VOCABULARY = 47  # 44 to 46 ask for 1 to 3 steps
SPELLED = [*"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmn"]  # the symbols on the screen
SPELLED += ["list:", "and:", "", "what is missing", "1 after", "2 after", "3 after"]


def links(rng):
    """Turns (query, answer): three chains of four as shuffled links, what is n steps after x?"""
    chains = np.array(rng.sample(range(N_ITEMS), 12)).reshape(3, 4).tolist()
    told = [[LINK, x, y] for chain in chains for x, y in zip(chain, chain[1:])]
    rng.shuffle(told)
    query = sum(told, [])
    # Each question once: what was answered before is of no use.
    asked = [(ASK + n, chain[i], chain[i + n])
             for chain in chains for n in (1, 2, 3) for i in range(4 - n)]
    rng.shuffle(asked)
    for ask, start, end in asked:
        yield [*query, ask, start], end
        query = []


def missing(rng):
    """Turns (query, answer): four times two lists, the second without one item of the first."""
    for _ in range(4):
        gone, *rest = rng.sample(range(N_ITEMS), rng.randint(3, 9))
        items = rng.sample([gone, *rest], len(rest) + 1)
        yield [FIRST, *items, SECOND, *rest, ASK], gone


TASKS = {"links": links, "missing": missing}


class Games(Split):
    """n games as a split that `train` takes. Each answer is one token, and has no <|end|>.

    twice: each query is given twice, so that a causal model knows all of it the second time.
    """

    def __init__(self, task, n, seed, twice=False):
        rng = random.Random(f"{task} {seed}")
        tokens, segments, offsets = [], [], [0]
        for _ in range(n):
            for turn, (query, answer) in enumerate(TASKS[task](rng)):
                given = query + query if twice else query
                tokens += [*given, answer]
                segments += [2 * turn + 1] * len(given) + [2 * turn + 2]
            offsets.append(len(tokens))
        self.tokens, self.segments, self.offsets = map(np.array, (tokens, segments, offsets))
        self.families, self.family_names = np.zeros(n, dtype=np.int64), [task]

    def groups(self):
        """Which answers are of which kind: {"1 step": booleans (answers,), ...}."""
        asked = self.tokens[np.flatnonzero(self.segments % 2 == 0) - 2]
        kinds = {"1 step": ASK + 1, "2 steps": ASK + 2, "3 steps": ASK + 3}
        found = {name: asked == token for name, token in kinds.items() if (asked == token).any()}
        return found or {"all": asked >= 0}


# --- one runner ---------------------------------------------------------------------------------


@dataclass
class Race:
    """The settings of a race. Each field is a flag of the command line."""

    masks: str = setting("causal,ism", "who runs: names of masks, with commas between")
    twice: bool = setting(False, "one more runs: causal with each query given twice")
    task: str = setting("links", "the game", tuple(TASKS))
    layers: int = setting(2, "blocks of each model")
    steps: int = setting(400, "training steps")
    every: int = setting(25, "steps between two looks at held-out games")
    seed: int = setting(0, "of the games and of the weights")
    seeds: int = setting(1, "races, one after the other, with the seeds that follow")
    json: str = setting("", "write the figures to this file")
    out: str = setting(picture("race"), "the picture")

    def __post_init__(self):
        for name in ("layers", "steps", "every", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        self.every = min(self.every, self.steps)
        check_masks(self.masks)
        for name in self.masks.split(","):
            check_mask(name, Games(self.task, 2, "of a trial"))

    def runners(self):
        """Name -> (mask, whether the queries are given twice)."""
        found = {name: (name, False) for name in self.masks.split(",")}
        if self.twice:
            found["causal, given twice"] = ("causal", True)
        return found


def run_one(race, name, seed, tell):
    """Train one runner -> its record. tell(step, {kind: share right}) is called after each step."""
    mask, twice = race.runners()[name]
    s = Settings(
        mask=mask, seed=seed, n_layer=race.layers, max_iters=race.steps, decay=0.0,
        eval_interval=race.steps, device="cpu", dtype="float32",
    )
    games = Games(race.task, 25 * race.steps, f"train {seed}", twice)
    held_out = Games(race.task, 250, f"held out {seed}", twice)
    groups = held_out.groups()
    curves = {kind: [] for kind in groups}

    def watch(run, _):
        if run.step % race.every == 0:
            _, answers = evaluate(run, held_out)
            for kind, at in groups.items():
                curves[kind].append(float(answers[at, 2].mean()))
        tell(run.step, {kind: curve[-1] for kind, curve in curves.items() if curve})

    torch.manual_seed(seed)
    model = GPT(model_config(s, VOCABULARY))
    # Queries start softer than in dialogues: with sharp ones ISM comes to two steps by step 400 in
    # two of five races, with these in nine of ten.
    for block in model.blocks:
        torch.nn.init.ones_(block.attention.q_norm.weight)
    start = time.perf_counter()
    train(s, model, {"train": games, "test": held_out}, watch)
    return {
        "runner": name, "seed": seed, "seconds": time.perf_counter() - start, "curves": curves,
        "guesses": guesses(model, held_out, MASKS[mask]),
        "reading": reading(model, held_out, MASKS[mask]),
    }


@torch.no_grad()
def guesses(model, games, mask):
    """What a model answers in the first game: the spelling of each of its answers."""
    tokens, segments = games.collate(games.rows(mask)[:1])  # (1, T) each
    logits = model.eval()(tokens, mask(segments))  # (1, T, V)
    asked = (segments[0] % 2 == 0).nonzero()[:, 0] - 1  # the positions that foretell an answer
    return [SPELLED[token] for token in logits[0, asked].argmax(-1).tolist()]


@torch.no_grad()
def reading(model, games, mask):
    """How a model reads the first game's first query, of n tokens, as demos/page.py draws it.

    tokens: their spelling. looks: in each layer, for each token, which other one it looks at most,
    and the weight in the head where that is largest. goals: for each token its place in `goal`.
    """
    tokens, segments = games.collate(games.rows(mask)[:1])  # (1, T) each
    n = int((segments == 1).sum())
    tokens, f = tokens[:, :n], mask(segments)[:, :n].clamp(max=n)  # (1, n) each
    weights, _ = look(model.eval(), tokens, f)  # (L, H, n, n)
    weights = weights.amax(1)  # (L, n, n)
    weights.diagonal(dim1=1, dim2=2).zero_()  # a token that looks at itself finds nothing
    most, places = weights.max(-1)  # (L, n) each
    query = tokens[0].tolist()
    return {
        "tokens": [SPELLED[token] for token in query],
        "looks": [[*zip(*layer)] for layer in zip(places.tolist(), most.tolist())],
        "goals": [goal(query, j) for j in range(n)],
    }


def goal(query, j):
    """Where token j of a query has to look: y of a link x>y at the z of y>z, else None."""
    if j < 2 or query[j - 2] != LINK:
        return None
    for i in range(0, len(query) - 2, 3):
        if query[i : i + 2] == [LINK, query[j]]:
            return i + 2
    return None


# --- a race: a process for each runner ----------------------------------------------------------


def runner(messages, race, name, seed, threads):
    """The body of a process: sends ("step", name, step, shares), at last ("done", name, record)."""
    torch.set_num_threads(threads)
    try:
        record = run_one(race, name, seed, lambda *step: messages.put(("step", name, *step)))
    except KeyboardInterrupt:
        return
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{where.filename}, line {where.lineno}"
        messages.put(("failed", name, f"{type(error).__name__}: {error} ({place})"))
        return
    messages.put(("done", name, record))


def hold(race, seed):
    """One race, told while it goes on -> the records of its runners."""
    names = list(race.runners())
    threads = max(1, os.cpu_count() // len(names))
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    started = [
        context.Process(target=runner, args=(messages, race, name, seed, threads), daemon=True)
        for name in names
    ]
    width = max(map(len, names))
    bars = {
        name: tqdm(total=race.steps, desc=f"{name:{width}}", position=i, unit="step")
        for i, name in enumerate(names)
    }
    records = {}
    try:
        for process in started:
            process.start()
        while len(records) < len(names):
            kind, name, *rest = next_message(messages, started)
            if kind == "failed":
                raise ValueError(f"{name}: {rest[0]}")
            if kind == "done":
                records[name] = rest[0]
                continue
            step, shares = rest
            bars[name].update(step - bars[name].n)
            right = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
            bars[name].set_postfix_str(f"right: {right}" if right else "")
    finally:
        for process in started:
            if process.is_alive():
                process.terminate()
        for bar in bars.values():
            bar.close()
    return [records[name] for name in names]


def next_message(messages, processes):
    """The next message of a runner. ValueError if one has died without a word."""
    while True:
        try:
            return messages.get(timeout=1)
        except queue.Empty:
            codes = [process.exitcode for process in processes if process.exitcode]
            if codes:
                raise ValueError(f"a runner ended with code {codes[0]}; is memory short?") from None


# --- what was seen ------------------------------------------------------------------------------

WHY = {
    "links": """\
Under ISM a link A>B sees all others while it is read, so it finds B>C wherever that stands, in one
and the same way. Under causal it sees those before it alone: of two links only the later one can
find the other, sometimes its successor, sometimes its predecessor, and the rest has to be found
when the question comes. The same two layers have more to learn, and learn it later.""",
    "missing": """\
Under causal the first list is read before the second is known, so each of its items has to be
looked for when the question comes. Under ISM an item sees at once whether the second has it.""",
}


NOT_WON = """\
Not won: one step is read off one link, under any mask. Three steps are hard for both; who guesses
among the three ends of the chains is right in a third of the cases. With more steps of training
causal comes to two steps too: try --steps 1000."""


def report(race, records):
    """The table, one game in full, and why."""
    rows = []
    for record in records:
        ends = {f"{kind}, %": f"{100 * curve[-1]:.1f}" for kind, curve in record["curves"].items()}
        rows.append({"runner": record["runner"], "seed": record["seed"], **ends,
                     "seconds": f"{record['seconds']:.0f}"})
    table(f"Held-out answers that are right after {race.steps} steps", rows)
    show_game(race, [record for record in records if record["seed"] == race.seed])
    if race.steps < 400 and race.task == "links":
        print("\nISM comes to two steps within 250 to 400 steps of training. "
              f"Here were {race.steps}.")
    print(f"\nWhy. {WHY[race.task]}")
    if race.task == "links":
        print(NOT_WON)


def show_game(race, records):
    """The first held-out game, its first questions, and what each runner answered."""
    game = random.Random(f"{race.task} held out {race.seed}")
    for turn, (query, right) in enumerate(itertools.islice(TASKS[race.task](game), 8)):
        n = 2 if race.task == "links" else len(query)
        if n < len(query):
            told = query[:-n]
            shown = [f"{SPELLED[x]}>{SPELLED[y]}" for x, y in zip(told[1::3], told[2::3])]
            print(f"\nOne game, held out. Links: {' '.join(shown)}")
        asked = " ".join(SPELLED[token] for token in query[-n:])
        said = ", ".join(f"{r['runner']} {r['guesses'][turn]}" for r in records)
        print(f"   {asked}? {SPELLED[right]}   ({said})")


def draw(race, records):
    """Curves of all runners and seeds, a panel for each kind of question."""
    kinds = list(records[0]["curves"])
    figure, axes = plt.subplots(1, len(kinds), figsize=(1 + 4 * len(kinds), 3.6), squeeze=False,
                                sharey=True, layout="constrained")
    for axis, kind in zip(axes[0], kinds):
        for record in records:
            curve = record["curves"][kind]
            steps = race.every * np.arange(1, len(curve) + 1)
            label = record["runner"] if record["seed"] == race.seed else None
            axis.plot(steps, np.array(curve) * 100, color=color(record["runner"]), label=label)
        axis.set(title=kind, xlabel="training steps", ylim=(0, 103))
        axis.grid(alpha=0.2)
    axes[0, 0].set_ylabel("% of held-out answers right")
    axes[0, -1].legend(fontsize=9)
    figure.savefig(race.out, dpi=130, format="png")


def main():
    with machine.errors_in_one_line("fewer --layers take less"):
        race = machine.parse(Race, "The same small GPT learns a game under two masks.")
        check_writable(race.out, json=race.json)
        records = []
        for seed in range(race.seed, race.seed + race.seeds):
            records += hold(race, seed)
        report(race, records)
        draw(race, records)
        if race.json:
            write_json(race.json, {"race": vars(race), "records": records})
        print(f"\nThe picture: {race.out}")


if __name__ == "__main__":
    main()
