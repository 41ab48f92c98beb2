"""
What a mask is: causal, prefix and ISM on one short dialogue, drawn, counted and put to the test.

    python demos/masks.py                     15 seconds
    python demos/masks.py --masks ism,yours   with a mask of your own

The claim of the paper: under ISM a query is read in both directions and an answer is causal. So one
pass trains all answers of a dialogue, where a prefix model needs a copy for each turn (history,
query, answer). And a KV cache survives each new turn, where each new query makes that of a prefix
model stale. Three parts:

    1  count      what each mask attends to and trains
    2  no leak    change a token, and see which logits of a small random GPT move. A position that
                  is trained may not move if it predicts this token or stands before it.
    3  cacheable  cut the dialogue where a segment ends. Which rows of f, and which keys and values
                  of the GPT, are others than in the whole dialogue?
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import machine
from data.machine import setting
from data.synthetic import generate
from data.tokenizer import Tokenizer
from demos.exercises import cached, gpt
from demos.output import check_masks, check_writable, picture, plt, save, table
from mask import MASKS, loss_positions, one_pass, reusable, row_ends

DIALOGUE = [
    {"role": "user", "content": "I am Anna."},
    {"role": "assistant", "content": "Hi Anna."},
    {"role": "user", "content": "Who am I?"},
    {"role": "assistant", "content": "You are Anna."},
]


@dataclass
class Masks:
    """What is counted and where it goes. Each field is a flag of the command line."""

    masks: str = setting("causal,prefix,ism", "names of masks, with commas between")
    dialogues: int = setting(2000, "training dialogues to count")
    out: str = setting(picture("masks"), "the picture, a PNG")

    def __post_init__(self):
        check_masks(self.masks)
        if self.dialogues < 1:
            raise ValueError(f"--dialogues must be at least 1, not {self.dialogues}")


# --- 1. what each mask attends to and trains ----------------------------------------------------


def borders(segments):
    """Where segments end, after a 0: those of [1, 1, 2] are [0, 2, 3]."""
    T = len(segments)
    inner = [j for j in range(1, T) if segments[j] != segments[j - 1]]
    return [0, *inner, T]


def copies(mask, segments):
    """The rows that train all answers of a dialogue (1, T): one, or with prefix one for each turn.

    The copy of a turn ends with the turn's answer.
    """
    return [segments[:, :end] for end in row_ends(mask, segments[0].tolist())]


def count(name, dialogues):
    """What training on dialogues, each of them segments (1, T), takes under a mask."""
    mask = MASKS[name]
    total = {"mask": name, "copies": 0, "tokens": 0, "attended pairs": 0, "trained tokens": 0}
    for segments in dialogues:
        for copy in copies(mask, segments):  # (1, n)
            f = mask(copy)  # (1, n)
            total["copies"] += 1
            total["tokens"] += copy.shape[1]
            # Token j is paired with the f(j) tokens that it sees.
            total["attended pairs"] += int(f.sum())
            total["trained tokens"] += int(loss_positions(copy, f).sum())
    return total


# --- 2 and 3. a small random GPT shows what a mask lets through ---------------------------------

# In float64 rounding moves a number by some 1e-16, another token in its sight by 1e-3 and more.
ROUNDING = 1e-12


def where(true):
    """Booleans (T,) -> the list of places that are True."""
    return true.nonzero()[:, 0].tolist()


def moves(model, tokens, f):
    """Booleans (T, T): True in row i and column j if another token i moves the logits at j."""
    T = tokens.shape[1]
    # One copy of the dialogue for each token, in which this token is another one.
    others = (tokens + torch.eye(T, dtype=torch.long)) % model.config.vocab_size  # (T, T)
    before = model(tokens, f)  # (1, T, V)
    after = model(others, f.expand(T, -1))  # (T, T, V)
    return (after - before).abs().amax(-1) > ROUNDING


def no_leak(name, model, tokens, segments):
    """Part 2, for each copy: f, what is trained, and the logits that each token moves."""
    mask = MASKS[name]
    rows = []
    for turn, copy in enumerate(copies(mask, segments), start=1):  # (1, n)
        f = mask(copy)  # (1, n)
        moved = moves(model, tokens[:, : copy.shape[1]], f)  # (n, n)
        rows.append({
            "mask": name if one_pass(mask) else f"{name}, turn {turn}",
            "f": f[0].tolist(),
            "trained": where(loss_positions(copy, f)[0]),
            "moved": [where(row) for row in moved],
        })
    return rows


def cacheable(name, model, tokens, segments):
    """Part 3, for each end of a segment: what is not as in the whole dialogue."""
    mask = MASKS[name]
    f = mask(segments)  # (1, T)
    whole = cached(model, tokens, f)  # (2, L, 1, H, T, D)
    rows = []
    for end in borders(segments[0].tolist())[1:-1]:
        f_cut = mask(segments[:, :end])  # (1, end)
        cut = cached(model, tokens[:, :end], f_cut)  # (2, L, 1, H, end, D)
        off = (cut - whole[..., :end, :]).abs().amax((0, 1, 2, 3, 5))  # (end,)
        rows.append({
            "mask": name,
            "cut": end,
            "f_changed": where(f_cut[0] != f[0, :end]),
            "stale": where(off > ROUNDING),
            # What mask.py says, which looks at f alone.
            "reusable": reusable(f_cut, f),
        })
    return rows


@torch.no_grad()
def measure(masks, n_dialogues):
    """All figures of masks, a list of names."""
    tokenizer = Tokenizer()
    tokens, segments = tokenizer.encode_dialogue(DIALOGUE)
    labels = [tokenizer.decode([token]).strip() for token in tokens]
    tokens, segments = torch.tensor([tokens]), torch.tensor([segments])  # (1, T) each
    model = gpt(3, tokenizer.vocab_size)
    train = []
    for dialogue in generate("train", n_dialogues):
        _, numbers = tokenizer.encode_dialogue(dialogue["messages"])
        train.append(torch.tensor([numbers]))
    return {
        "labels": labels,
        "segments": segments[0].tolist(),
        "parts": [row for name in masks for row in no_leak(name, model, tokens, segments)],
        "cuts": [row for name in masks for row in cacheable(name, model, tokens, segments)],
        "counts": [count(name, [segments]) for name in masks],
        "train": [count(name, train) for name in masks],
    }


def report(figures, n_dialogues):
    table("This dialogue", figures["counts"])
    table(f"{n_dialogues:,} training dialogues of one family each", figures["train"])
    rows = []
    for part in figures["parts"]:
        before = [j for i, moved in enumerate(part["moved"]) for j in moved if j < i]
        rows.append({
            "mask": part["mask"],
            "logits that move": sum(map(len, part["moved"])),
            "before the token": len(before),
            "and trained (leaks)": len(set(before) & set(part["trained"])),
        })
    table("No leak: change each token in turn", rows)
    rows = []
    for cut in figures["cuts"]:
        rows.append({
            "mask": cut["mask"],
            "tokens": cut["cut"],
            "rows of f that change": len(cut["f_changed"]),
            "stale keys and values": len(cut["stale"]),
            "reusable": cut["reusable"],
        })
    table("Cacheable: cut the dialogue where a segment ends", rows)


# --- the picture: a row is a token, one unit high -----------------------------------------------

# Blue and orange, one dark and one light; the tints are of a row of an answer, of a query.
PAST, FUTURE, TINTS = "#1f5a96", "#f28e2b", ["#f7ecd9", "#e4ebf4"]


def draw(figures, path):
    """A panel for each mask, for prefix one for each copy, and the words in the last place."""
    # Prefix stands last, so that its copies stand side by side.
    parts = sorted(figures["parts"], key=lambda part: "prefix" in part["mask"])
    rows = (len(parts) + 1) // 2
    figure, axes = plt.subplots(rows, 2, figsize=(9, 4.15 * rows + 0.4), layout="constrained")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for axis, part in zip(axes.flat, parts):
        draw_mask(axis, figures, part)
    words = {
        "sees: itself and its past": PAST,
        "sees: its future": FUTURE,
        "hidden from a query's token": TINTS[1],
        "hidden from an answer's token": TINTS[0],
    }
    handles = [plt.Rectangle((0, 0), 1, 1, fc=color, ec="gray", lw=0.5) for color in words.values()]
    handles.append(plt.Line2D([], [], ls="", marker="o", ms=4, color="black"))
    texts = [*words, "the next token, which the row is trained to predict"]
    figure.legend(handles, texts, fontsize=8.5, frameon=False, loc="outside lower center", ncols=3)
    save(figure, path, 200)


def draw_mask(axis, figures, part):
    f, trained = part["f"], part["trained"]
    n, T = len(f), len(figures["labels"])
    segments = figures["segments"][:n]
    ends = borders(segments)
    for j, number in enumerate(segments):
        axis.barh(j + 0.5, n + 6, 1, -6, color=TINTS[number % 2])
        axis.text(-0.2, j + 0.5, figures["labels"][j], ha="right", va="center", fontsize=7.5)
        for i in range(f[j]):
            color = PAST if i <= j else FUTURE
            axis.add_patch(plt.Rectangle((i, j), 1, 1, fc=color, ec="white", lw=0.6))
    axis.plot([j + 1.5 for j in trained], [j + 0.5 for j in trained], "o", ms=4, color="black")
    axis.hlines(ends[1:-1], -6, n, color="black", lw=0.7)
    axis.vlines(ends[1:], 0, n, color="black", lw=0.7)
    for start, end in zip(ends, ends[1:]):
        kind = "query" if segments[start] % 2 == 1 else "answer"
        name = f"{kind} {(segments[start] + 1) // 2}"
        axis.text((start + end) / 2, -0.2, name, ha="center", fontsize=8)
    name = part["mask"].replace("ism", "ISM")
    axis.set_title(f"{name}: {sum(f)} pairs, {len(trained)} trained", fontsize=10.5)
    axis.set(xlim=(-6, T), ylim=(T, -1.2))


def main():
    with machine.errors_in_one_line("fewer --dialogues take less"):
        s = machine.parse(Masks, "The masks on one short dialogue: drawn, counted, tested.")
        check_writable(s.out)
        figures = measure(s.masks.split(","), s.dialogues)
        report(figures, s.dialogues)
        draw(figures, s.out)
        print(f"\nThe picture: {s.out}")


if __name__ == "__main__":
    main()
