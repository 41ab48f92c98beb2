"""
See it win: the same small GPT learns a game under causal and under ISM, side by side.

    python demos/race.py                            about a minute on 2 cores
    python demos/race.py --steps 3000 --decay 0.3   for three steps, about four minutes
    python demos/race.py --masks causal,ism,yours   other masks, your own in mask.py among them
    python demos/race.py --place next               the first question stands in a turn of its own
    python demos/race.py --task missing             another game
    python demos/race.py --json out/race.json       for the page: demos/page.py --race

Both models start from the same weights and see the same games, as many of them. The games are of
symbols, since a sentence tells less a token. Two of them:

    links     A>B F>G B>C ... in any order, three chains of four. Then 18 questions: what is n
              steps after A? One step asks for a link that was read. Two ask for a link of a link,
              three for one more.
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
import textwrap
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
from demos.output import check_masks, check_writable, color, dashes, picture, plt, save, table
from demos.page import attention_weights
from mask import MASKS
from model import GPT
from train import Settings, check_mask, evaluate, model_config, train

# --- the games ----------------------------------------------------------------------------------

N_ITEMS = 40  # tokens 0 to 39 are symbols to play with
FIRST, SECOND, LINK, ASK = 40, 41, 42, 43  # a list begins, the other one, a link, a question
READ = 47  # 44 to 46 ask for 1 to 3 steps; 47 is an answer to what is no question
VOCABULARY = 48
SPELLED = [*"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmn"]  # the symbols on the screen
SPELLED += ["list:", "and:", "", "what is missing", "1 after", "2 after", "3 after", "read"]
TWO = "2 steps"
SPLIT = f"{TWO}, A>B before B>C", f"{TWO}, A>B behind B>C"
PLACES = "end", "start", "next"


def turns(given, question, answer, kinds, place):
    """Turns (query, answer, kinds): a question at the end of what is given, at its start, or in the
    next turn. kinds: the names of the kinds of question that it is of.
    """
    if place == "next":
        yield given, READ, ()
        yield question, answer, kinds
    elif place == "start":
        yield question + given, answer, kinds
    else:
        yield given + question, answer, kinds


def links(rng, place="end"):
    """Three chains of four as shuffled links: what is n steps after x? `place` of the first one."""
    chains = np.array(rng.sample(range(N_ITEMS), 12)).reshape(3, 4).tolist()
    links_read = [[LINK, x, y] for chain in chains for x, y in zip(chain, chain[1:])]
    rng.shuffle(links_read)
    stands = {x: i for i, (_, x, _) in enumerate(links_read)}  # where the link x>y stands
    asked = []
    for n in (1, 2, 3):
        # Each question once: what was answered before is of no use.
        for chain, i in [(chain, i) for chain in chains for i in range(4 - n)]:
            kinds = ["1 step" if n == 1 else f"{n} steps"]
            if n == 2:
                kinds.append(SPLIT[stands[chain[i]] > stands[chain[i + 1]]])
            asked.append(([ASK + n, chain[i]], chain[i + n], kinds))
    rng.shuffle(asked)
    yield from turns(sum(links_read, []), *asked[0], place)
    yield from asked[1:]


def missing(rng, place="end"):
    """Four times two lists, the second without one item of the first: which one?"""
    for _ in range(4):
        gone, *rest = rng.sample(range(N_ITEMS), rng.randint(3, 9))
        items = rng.sample([gone, *rest], len(rest) + 1)
        yield from turns([FIRST, *items, SECOND, *rest], [ASK], gone, ["all"], place)


TASKS = {"links": links, "missing": missing}


class Games(Split):
    """n games as a split that `train` takes. Each answer is one token, and has no <|end|>.

    twice: each query is given twice, so that a causal model knows all of it the second time.
    """

    def __init__(self, task, n, seed, twice=False, place="end"):
        rng = random.Random(f"{task} {seed}")
        tokens, segments, offsets, self.kinds = [], [], [0], []
        for _ in range(n):
            for turn, (query, answer, kinds) in enumerate(TASKS[task](rng, place)):
                given = query + query if twice else query
                tokens += [*given, answer]
                segments += [2 * turn + 1] * len(given) + [2 * turn + 2]
                self.kinds.append(kinds)
            offsets.append(len(tokens))
        self.tokens, self.segments, self.offsets = map(np.array, (tokens, segments, offsets))
        self.families, self.family_names = np.zeros(n, dtype=np.int64), [task]

    def groups(self):
        """Which answers are of which kind: {"1 step": booleans (answers,), ...}."""
        names = sorted({name for kinds in self.kinds for name in kinds})
        return {name: np.array([name in kinds for kinds in self.kinds]) for name in names}


# --- one runner ---------------------------------------------------------------------------------


@dataclass
class Race:
    """The settings of a race. Each field is a flag of the command line."""

    masks: str = setting("causal,ism", "who runs: names of masks, with commas between")
    twice: bool = setting(False, "one more runs: causal with each query given twice")
    task: str = setting("links", "the game", tuple(TASKS))
    place: str = setting("end", "where the first question stands: at the query's end, at its "
                         "start, in the next turn", PLACES)
    layers: int = setting(2, "blocks of each model")
    steps: int = setting(600, "training steps")
    decay: float = setting(0.0, "last part of the steps, in which the rate falls to 0")
    every: int = setting(25, "steps between two looks at held-out games")
    seed: int = setting(0, "of the games and of the weights")
    seeds: int = setting(1, "races, one after the other, with the seeds that follow")
    json: str = setting("", "write the figures to this file")
    out: str = setting(picture("race"), "the picture")

    def __post_init__(self):
        for name in ("layers", "steps", "every", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"--decay must be from 0 to 1, not {self.decay}")
        self.every = min(self.every, self.steps)
        check_masks(self.masks)
        for name in self.masks.split(","):
            check_mask(name, Games(self.task, 2, "of a trial", place=self.place))

    def runners(self):
        """Name -> (mask, whether the queries are given twice)."""
        runners = {name: (name, False) for name in self.masks.split(",")}
        if self.twice:
            runners["causal, given twice"] = ("causal", True)
        return runners


def run_one(race, name, seed, tell):
    """Train one runner -> its record. tell(step, {kind: share right}) is called after each step."""
    mask, twice = race.runners()[name]
    s = Settings(
        mask=mask, seed=seed, n_layer=race.layers, max_iters=race.steps, decay=race.decay,
        eval_interval=race.steps, device="cpu", dtype="float32",
    )
    games = Games(race.task, 25 * race.steps, f"train {seed}", twice, race.place)
    held_out = Games(race.task, 250, f"held out {seed}", twice, race.place)
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
    and the weight in the head where that is largest. goals: where each y of a link x>y has to look,
    at the z of y>z; for other tokens None.
    """
    tokens, segments = games.collate(games.rows(mask)[:1])  # (1, T) each
    n = int((segments == 1).sum())
    tokens, f = tokens[:, :n], mask(segments)[:, :n].clamp(max=n)  # (1, n) each
    weights, _ = attention_weights(model.eval(), tokens, f)  # (L, H, n, n)
    weights = weights.amax(1)  # (L, n, n)
    weights.diagonal(dim1=1, dim2=2).zero_()  # a token that looks at itself finds nothing
    most, places = weights.max(-1)  # (L, n) each
    query = tokens[0].tolist()
    ends = {x: i + 2 for i, (link, x) in enumerate(zip(query, query[1:])) if link == LINK}
    return {
        "tokens": [SPELLED[token] for token in query],
        "looks": [[*zip(*layer)] for layer in zip(places.tolist(), most.tolist())],
        "goals": [ends.get(token) if before == LINK else None
                  for before, token in zip([None, None, *query], query)],
    }


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


# Of 80 columns at most.
BAR = "{desc} {percentage:3.0f}%|{bar:8}|{n}/{total} {remaining}{postfix}"


def run_race(race, seed):
    """One race, told while it goes on -> the records of its runners."""
    names = list(race.runners())
    threads = max(1, os.cpu_count() // len(names))
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    started = [context.Process(target=runner, args=(messages, race, name, seed, threads),
                               daemon=True) for name in names]
    bars = {name: tqdm(total=race.steps, desc=f"{name:{max(map(len, names))}}", bar_format=BAR,
                       position=i) for i, name in enumerate(names)}
    records = {}
    try:
        for process in started:
            process.start()
        while len(records) < len(names):
            try:
                kind, name, *rest = messages.get(timeout=1)
            except queue.Empty:
                codes = [process.exitcode for process in started if process.exitcode]
                if not codes:
                    continue
                why = f"a runner ended with code {codes[0]}; is memory short?"
                raise ValueError(why) from None
            if kind == "failed":
                raise ValueError(f"{name}: {rest[0]}")
            if kind == "done":
                records[name] = rest[0]
                continue
            step, shares = rest
            bars[name].update(step - bars[name].n)
            right = [f"{kind} {share:.0%}" for kind, share in shares.items() if kind in HARD]
            bars[name].set_postfix_str(", ".join(right))
    finally:
        for process in started:
            if process.is_alive():
                process.terminate()
        for bar in bars.values():
            bar.close()
    return [records[name] for name in names]


# --- what was seen ------------------------------------------------------------------------------

HARD = TWO, "3 steps", "all"  # the kinds of question by which a race is won

WHY = {
    "links": """
        Under ISM a link A>B sees all others while it is read, so it finds B>C wherever that stands,
        and stands for two steps itself. Under causal it sees those before it alone: of two links
        only the later one can find the other. If that is B>C, the rest has to be found when the
        question comes. Three steps fit into two layers too: a question takes one in the first,
        and two in the second, by a link that stands for two. In 3,000 steps (--steps 3000
        --decay 0.3) ISM came to that in seven races of ten, causal in none.""",
    "missing": """
        Under causal the first list is read before the second is known, so each of its items has to
        be looked for when the question comes. Under ISM an item sees at once whether the second
        has it.""",
}


def say(text):
    """Print a paragraph in lines of at most 79 columns, cut between words."""
    print("\n" + textwrap.fill(" ".join(text.split()), 79))


def report(race, records):
    """The table, one game in full, who won what, and why ISM and causal differ."""
    rows = []
    for record in records:
        curves = record["curves"].items()
        ends = {kind: f"{curve[-1]:.1%}" for kind, curve in curves if kind not in SPLIT}
        rows.append({"runner": record["runner"], "seed": record["seed"], **ends,
                     "seconds": f"{record['seconds']:.0f}"})
    table(f"Held-out answers that are right after {race.steps} steps of training", rows)
    show_game(race, [record for record in records if record["seed"] == race.seed])
    for kind in records[0]["curves"]:
        if kind in HARD:
            say(verdict(race, records, kind))
    if {"ism", "causal"} <= set(race.runners()):
        say(f"Why. {WHY[race.task]}")


def verdict(race, records, kind):
    """Who won one kind of question, as a sentence: at the end, or by being right earlier."""
    ends, steps, parts = {}, {}, []
    for name in race.runners():
        curves = np.array([r["curves"][kind] for r in records if r["runner"] == name])
        ends[name] = curves[:, -1].mean()
        there = curves.mean(0) >= 0.95  # the mean over the seeds
        steps[name] = race.every * (1 + there.argmax()) if there.any() else np.inf
        when = f"first at 95% after {steps[name]} steps" if there.any() else "never at 95%"
        parts.append(f"{name} ends at {ends[name]:.1%}, {when}")
    best, first = max(ends, key=ends.get), min(steps, key=steps.get)
    if all(ends[best] > ends[name] + 0.05 for name in ends if name != best):
        won = f"{best} wins"
    elif all(steps[name] > 1.25 * steps[first] for name in steps if name != first):
        won = f"{first} is there first, and the others follow"
    else:
        won = "nobody wins"
    return f"{kind}: {won}. {'; '.join(parts)}."


def show_game(race, records):
    """The first held-out game, its first questions, and what each runner answered."""
    game = TASKS[race.task](random.Random(f"{race.task} held out {race.seed}"), race.place)
    for turn, (query, right, kinds) in enumerate(itertools.islice(game, 8)):
        pairs = [f"{SPELLED[x]}>{SPELLED[y]}"
                for link, x, y in zip(query, query[1:], query[2:]) if link == LINK]
        if pairs:
            print(f"\nOne game, held out: {' '.join(pairs)}")
        if kinds:
            # A question of links is two tokens, wherever it stands.
            at = [i for i, token in enumerate(query) if token > ASK]
            asked = query[at[0] : at[0] + 2] if at else query
            answers = ", ".join(f"{r['runner']} {r['guesses'][turn]}" for r in records)
            print(f"   {' '.join(SPELLED[x] for x in asked)}? {SPELLED[right]}   ({answers})")


def draw(race, records):
    """The shares of right answers of all runners and seeds, a panel for each kind of question.

    Two steps have one panel more: the means over the seeds by which of the two links stands first.
    """
    kinds = [kind for kind in records[0]["curves"] if kind not in SPLIT]
    panels = [*kinds, "2 steps: which link stands first?"] if TWO in kinds else kinds
    columns = 2 if len(panels) > 1 else 1
    figure, axes = plt.subplots(len(panels) // columns, columns, squeeze=False, sharey=True,
                                figsize=(4.6 * columns, 1.6 * len(panels)), layout="constrained")
    for name in race.runners():
        curves = [record["curves"] for record in records if record["runner"] == name]
        for axis, panel in zip(axes.flat, panels):
            axis.set(title=panel, ylim=(0, 103))
            axis.grid(alpha=0.2)
            drawn = [(curve[panel], dashes(name), name) for curve in curves if panel in curve]
            if panel not in kinds:
                for kind, line, link in zip(SPLIT, "-:", ("A>B", "B>C")):
                    mean = np.mean([curve[kind] for curve in curves], 0)
                    drawn.append((mean, line, f"{name}, {link} first"))
            for shares, line, label in drawn:
                steps = race.every * np.arange(1, len(shares) + 1)
                axis.plot(steps, 100 * np.array(shares), line, color=color(name), label=label)
    axes[-1, 0].set(xlabel="training steps", ylabel="% of held-out answers right")
    for axis in {axes[0, 0], axes[-1, -1]}:
        lines = dict(zip(*axis.get_legend_handles_labels()[::-1]))  # one for the seeds of a runner
        axis.legend(lines.values(), lines, fontsize=9)
    save(figure, race.out, 130)


def main():
    with machine.errors_in_one_line("fewer --layers take less"):
        race = machine.parse(Race, "The same small GPT learns a game under two masks.")
        check_writable(race.out, json=race.json)
        records = []
        for seed in range(race.seed, race.seed + race.seeds):
            records += run_race(race, seed)
        report(race, records)
        draw(race, records)
        if race.json:
            write_json(race.json, {"race": vars(race), "records": records})
        print(f"\nThe picture: {race.out}")


if __name__ == "__main__":
    main()
