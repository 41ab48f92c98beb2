"""
What a mask is: causal, prefix and ISM on one short dialogue, drawn, counted and put to the test.

    python demos/masks.py            15 seconds
    python demos/masks.py --quick    counts fewer training dialogues

The claim of the paper: under ISM a query is read in both directions and an answer is causal. So one
pass trains all answers of a dialogue, where a prefix model needs a copy for each turn (history,
query, answer). And a KV cache survives each new turn, where each new query makes that of a prefix
model stale. Three parts:

    1  count      what each mask attends to and trains
    2  no leak    change a token, and see which logits of a small random GPT move. A position that
                  is trained may not move if it predicts this token or stands before it.
    3  cacheable  cut the dialogue where a segment ends. Which rows of f, and which keys and values
                  of the GPT, are others than in the whole dialogue?

The picture shows the masks themselves. A second one beside it, whose name ends in -properties,
shows parts 2 and 3.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import machine
from data.checkpoint import write_json
from data.dialogues import generate
from data.machine import setting
from data.tokenizer import Tokenizer
from demos.output import check_writable, picture, plt, table
from mask import MASKS, loss_positions, one_pass, reusable
from model import GPT, Cache, GPTConfig

DIALOGUE = [
    {"role": "user", "content": "I am Anna."},
    {"role": "assistant", "content": "Hi Anna."},
    {"role": "user", "content": "Who am I?"},
    {"role": "assistant", "content": "You are Anna."},
]


@dataclass
class Settings:
    """What is counted and where it goes. Each field is a flag of the command line."""

    quick: bool = setting(False, "count over 50 training dialogues, not 2,000")
    json: str = setting("", "write all figures to this file")
    out: str = setting(picture("masks"), "the picture, a PNG")


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
    if one_pass(mask):
        return [segments]
    ends = borders(segments[0].tolist())[1:]
    return [segments[:, :end] for end in ends if segments[0, end - 1] % 2 == 0]


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


def random_gpt(vocab_size):
    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_head": 2, "n_kv_head": 2, "n_embd": 32, "n_hidden": 64}
    return GPT(GPTConfig(vocab_size, block_size=64, **sizes)).double()


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


def no_leak(model, tokens, segments):
    """Part 2, for each mask and copy: f, what is trained, and the logits that each token moves."""
    rows = []
    for name, mask in MASKS.items():
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


def cached(model, tokens, f):
    """What a cache holds of each token: its keys and values of all layers, (T, 2 * L * H * D)."""
    cache = Cache(model.config, dtype=torch.float64)
    model(tokens, f, cache)
    entries = torch.stack([cache.k, cache.v])[..., : cache.length, :]  # (2, L, 1, H, T, D)
    return entries.movedim(-2, 0).flatten(1)


def cacheable(model, tokens, segments):
    """Part 3, for each mask and end of a segment: what is not as in the whole dialogue."""
    rows = []
    for name, mask in MASKS.items():
        f = mask(segments)  # (1, T)
        whole = cached(model, tokens, f)  # (T, 2 * L * H * D)
        for end in borders(segments[0].tolist())[1:-1]:
            f_cut = mask(segments[:, :end])  # (1, end)
            cut = cached(model, tokens[:, :end], f_cut)  # (end, 2 * L * H * D)
            off = (cut - whole[:end]).abs().amax(1)  # (end,)
            rows.append({
                "mask": name,
                "cut": end,
                "f_changed": where(f_cut[0] != f[0, :end]),
                "stale": where(off > ROUNDING),
                # The same by mask.py, which looks at f alone.
                "reusable": reusable(f_cut, f),
            })
    return rows


@torch.no_grad()
def measure(n_dialogues):
    """All figures, as they stand in the file of --json."""
    tokenizer = Tokenizer()
    tokens, segments = tokenizer.encode_dialogue(DIALOGUE)
    labels = [tokenizer.decode([token]).strip() for token in tokens]
    tokens, segments = torch.tensor([tokens]), torch.tensor([segments])  # (1, T) each
    model = random_gpt(tokenizer.vocab_size)
    train = []
    for dialogue in generate("train", n_dialogues):
        _, numbers = tokenizer.encode_dialogue(dialogue["messages"])
        train.append(torch.tensor([numbers]))
    return {
        "labels": labels,
        "segments": segments[0].tolist(),
        "parts": no_leak(model, tokens, segments),
        "cuts": cacheable(model, tokens, segments),
        "counts": [count(name, [segments]) for name in MASKS],
        "train": [count(name, train) for name in MASKS],
    }


# --- the tables ---------------------------------------------------------------------------------


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


# --- the pictures: a row is a token, one unit high ----------------------------------------------

PAST, FUTURE, CHANGES, SAME = "#3b6ea5", "#f28e2b", "#d1495b", "#c3cec6"
TINTS = ["#f7ecd9", "#e4ebf4"]  # of the rows of an answer, of a query


def spelled(mask):
    return mask.replace("ism", "ISM")


def segment_name(number):
    kind = "query" if number % 2 else "answer"
    return f"{kind} {(number + 1) // 2}"


def rows_of_tokens(axis, figures, n, left, right):
    """Rows for the first n tokens with their labels, tinted by segment from `left` to `right`."""
    segments = figures["segments"][:n]
    for j, number in enumerate(segments):
        axis.barh(j + 0.5, right - left, 1, left, color=TINTS[number % 2], zorder=0)
        axis.text(-0.2, j + 0.5, figures["labels"][j], ha="right", va="center", fontsize=7.5)
    axis.hlines(borders(segments)[1:-1], left, right, color="black", lw=0.7, zorder=3)
    axis.set(xticks=[], yticks=[], frame_on=False)


def cell(axis, x, y, color):
    axis.add_patch(plt.Rectangle((x, y), 1, 1, facecolor=color, edgecolor="white", lw=0.6))


def dots(axis, x, y):
    axis.plot(x, y, "o", ms=4, color="black", mec="white", mew=0.6, zorder=4)


def legend(place, colors, dot, **options):
    """colors: what a cell means, and its color. dot: what a dot means."""
    handles = [
        plt.Rectangle((0, 0), 1, 1, facecolor=color, edgecolor="gray", lw=0.5)
        for color in colors.values()
    ]
    handles.append(plt.Line2D([], [], ls="", marker="o", ms=4, color="black"))
    place.legend(handles, [*colors, dot], fontsize=8.5, frameon=False, **options)


def draw_masks(figures, path):
    """A panel for each mask, for prefix one for each copy."""
    parts = sorted(figures["parts"], key=lambda part: "prefix" in part["mask"])
    rows = (len(parts) + 1) // 2
    figure, axes = plt.subplots(rows, 2, figsize=(9, 4.15 * rows), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, part in zip(axes.flat, parts):
        draw_mask(axis, figures, part)
        if part["mask"] == "prefix, turn 1":
            room = axis  # this copy is short
    colors = {
        "sees: itself and its past": PAST,
        "sees: its future": FUTURE,
        "hidden from a query's token": TINTS[1],
        "hidden from an answer's token": TINTS[0],
    }
    legend(room, colors, "the next token, which the row is trained to predict",
           loc="lower left", bbox_to_anchor=(0.1, 0.05))
    figure.savefig(path, dpi=200, format="png")


def draw_mask(axis, figures, part):
    f, trained = part["f"], part["trained"]
    n, T = len(f), len(figures["labels"])
    rows_of_tokens(axis, figures, n, -6, n)
    for j in range(n):
        for i in range(f[j]):
            cell(axis, i, j, PAST if i <= j else FUTURE)
    dots(axis, [j + 1.5 for j in trained], [j + 0.5 for j in trained])
    ends = borders(figures["segments"][:n])
    axis.vlines(ends[1:], 0, n, color="black", lw=0.7, zorder=3)
    for start, end in zip(ends, ends[1:]):
        name = segment_name(figures["segments"][start])
        axis.text((start + end) / 2, -0.2, name, ha="center", fontsize=8)
    title = f"{spelled(part['mask'])}: {sum(f)} pairs, {len(trained)} trained"
    axis.set_title(title, fontsize=10.5)
    axis.set(xlim=(-6, T), ylim=(T, -1.2))


def columns_after_a_change(figures, i):
    """The columns of the second picture that show token i changed, one for each mask and copy."""
    columns = []
    for part in figures["parts"]:
        n = len(part["f"])
        changes = part["moved"][i] if i < n else []
        columns.append({
            "mask": part["mask"], "rows": n, "changes": changes, "trained": part["trained"],
        })
    return columns


def columns_after_a_cut(figures, end):
    """The columns that show the dialogue cut behind `end` tokens, one for each mask."""
    return [
        {"mask": cut["mask"], "rows": end, "changes": cut["f_changed"], "trained": []}
        for cut in figures["cuts"] if cut["cut"] == end
    ]


def draw_properties(figures, path):
    """A group of columns for each of two changed tokens, and for each cut."""
    labels, segments = figures["labels"], figures["segments"]
    ends = borders(segments)
    figure, axis = plt.subplots(figsize=(9, 5.2), layout="constrained")
    x = 0.3
    # The second token of the first answer, the third of the second query.
    for i in (ends[1] + 1, ends[2] + 2):
        title = f'change "{labels[i]}" in {segment_name(segments[i])}:\nlogits that move'
        columns = columns_after_a_change(figures, i)
        draw_columns(axis, x, title, columns, len(labels))
        around = plt.Rectangle((x, i), len(columns), 1, fill=False, lw=1.5, zorder=5)
        axis.add_patch(around)
        x += len(columns) + 0.5
    for end in ends[1:-1]:
        title = f"cut after\n{segment_name(segments[end - 1])}:\nrows of f\nthat change"
        columns = columns_after_a_cut(figures, end)
        draw_columns(axis, x, title, columns, len(labels))
        x += len(columns) + 0.5
    rows_of_tokens(axis, figures, len(labels), -2, x)
    axis.set(xlim=(-2, x), ylim=(len(labels), -5.6))
    legend(figure, {"changes": CHANGES, "stays the same": SAME, "is not there": "white"},
           "trained: predicts the token of the next row", loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=200, format="png")


def draw_columns(axis, x, title, columns, T):
    """Columns side by side from x on, with their title."""
    axis.text(x + len(columns) / 2, -2.2, title, ha="center", fontsize=8.5)
    for column in columns:
        name = spelled(column["mask"]).replace(", ", "\n")
        axis.text(x + 0.5, -0.2, name, ha="center", fontsize=7)
        colors = [SAME] * column["rows"] + ["white"] * (T - column["rows"])
        for j in column["changes"]:
            colors[j] = CHANGES
        for j, color in enumerate(colors):
            cell(axis, x, j, color)
        trained = column["trained"]
        dots(axis, [x + 0.5] * len(trained), [j + 0.5 for j in trained])
        x += 1


def main():
    with machine.errors_in_one_line("--quick takes less"):
        s = machine.parse(Settings, "The masks on one short dialogue: drawn, counted, tested.")
        out = Path(s.out)
        properties = out.with_name(f"{out.stem}-properties{out.suffix}")
        check_writable(out, properties, json=s.json)
        n_dialogues = 50 if s.quick else 2000
        figures = {"quick": s.quick, **measure(n_dialogues)}
        report(figures, n_dialogues)
        draw_masks(figures, out)
        draw_properties(figures, properties)
        if s.json:
            write_json(s.json, figures)
        print(f"\nThe pictures: {out} and {properties}")


if __name__ == "__main__":
    main()
