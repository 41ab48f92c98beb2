"""
What a mask is: causal, prefix and ISM on one short dialogue, drawn, counted and put to the test.

The claim of the paper: under ISM a query is read in both directions and an answer is causal, so that one
pass trains all answers of a dialogue (a prefix model needs a copy for each turn: history, query, answer)
and a KV cache survives each new turn (under a prefix mask each new query makes it stale). Three parts:

1. draw the masks, and count what each attends to and trains;
2. no leak: change a token and see which logits of a small random GPT move. A position that is trained and
   predicts this token, or stands before it, may not move;
3. cacheable: cut the dialogue where a segment ends and see what differs from the whole dialogue: which rows
   of f, and which of the GPT's keys and values.

Part 1 is the picture --out, parts 2 and 3 a second one beside it, whose name ends in -properties.

    python demos/masks.py [--quick]
"""
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.dialogues import generate
from data.machine import Parser
from data.tokenizer import Tokenizer
from demos.output import check_writable, plt
from mask import MASKS, loss_positions, one_pass, reusable
from model import GPT, Cache, GPTConfig

DIALOGUE = [{"role": "user", "content": "I am Anna."}, {"role": "assistant", "content": "Hi Anna."},
            {"role": "user", "content": "Who am I?"}, {"role": "assistant", "content": "You are Anna."}]
PAST, FUTURE, CHANGE, SAME = "#3b6ea5", "#f28e2b", "#d1495b", "#c3cec6"
TINTS = ["#f7ecd9", "#e4ebf4"]  # the rows of an answer, of a query
EXACT = 1e-12  # logits in float64: rounding moves them by 1e-16, a changed token by 1e-3 and more


def borders(segments):
    """Where segments end, after a 0: segment s is the tokens borders[s] .. borders[s + 1] - 1."""
    T = len(segments)
    return [j for j in range(T + 1) if j in (0, T) or segments[j] != segments[j - 1]]


def copies(mask, segments):
    """What a dialogue is trained as: itself, or for a prefix mask one copy a turn, up to the end of its answer."""
    if one_pass(mask):
        return [segments]
    ends = borders(segments[0].tolist())[1:]
    return [segments[:, :end] for end in ends if segments[0, end - 1] % 2 == 0]


def count(name, dialogues):
    """Tokens processed, attended pairs and trained tokens, summed over dialogues and their copies."""
    parts = [part for segments in dialogues for part in copies(MASKS[name], segments)]
    fs = [MASKS[name](part) for part in parts]
    return {"mask": name, "copies": len(parts), "tokens": sum(part.shape[1] for part in parts),
            "attended pairs": sum(int(f.sum()) for f in fs),
            "trained tokens": sum(int(loss_positions(part, f).sum()) for part, f in zip(parts, fs))}


def moves(model, tokens, f):
    """How far the logits at j move when token i is changed: row i, column j of (T, T)."""
    T = tokens.shape[1]
    changed = (tokens + torch.eye(T, dtype=torch.long)) % model.config.vocab_size  # (T, T) in row i token i is another
    return (model(changed, f.expand(T, -1)) - model(tokens, f)).abs().amax(-1)


def cached(model, tokens, f):
    """The keys and values of each token in all layers: (T, 2 * L * H * D)."""
    cache = Cache(model.config, dtype=torch.float64)
    model(tokens, f, cache)
    return torch.stack([cache.k, cache.v])[..., :cache.length, :].movedim(-2, 0).flatten(1)


def where(true):
    return true.nonzero()[:, 0].tolist()


@torch.no_grad()
def measure(n_dialogues):
    tokenizer = Tokenizer()
    tokens, segments = (torch.tensor([row]) for row in tokenizer.encode_dialogue(DIALOGUE))  # (1, T)
    torch.manual_seed(0)
    model = GPT(GPTConfig(tokenizer.vocab_size, 64, n_layer=3, n_head=2, n_kv_head=2, n_embd=32, n_hidden=64)).double()
    parts, cuts = [], []
    for name, mask in MASKS.items():
        f = mask(segments)
        for turn, part in enumerate(copies(mask, segments), start=1):
            f_part = mask(part)
            moved = moves(model, tokens[:, :part.shape[1]], f_part) > EXACT
            parts.append({"mask": name if one_pass(mask) else f"{name}, turn {turn}", "f": f_part[0].tolist(),
                          "trained": where(loss_positions(part, f_part)[0]), "moved": [where(row) for row in moved]})
        whole = cached(model, tokens, f)
        for end in borders(segments[0].tolist())[1:-1]:
            f_cut = mask(segments[:, :end])
            stale = (cached(model, tokens[:, :end], f_cut) - whole[:end]).abs().amax(1) > EXACT  # (end,)
            cuts.append({"mask": name, "cut": end, "f_changed": where(f_cut[0] != f[0, :end]), "stale": where(stale),
                         "reusable": reusable(f_cut, f)})
    train = [torch.tensor([tokenizer.encode_dialogue(d["messages"])[1]]) for d in generate("train", n_dialogues)]
    return {"labels": [tokenizer.decode([token]).strip() for token in tokens[0].tolist()],
            "segments": segments[0].tolist(), "parts": parts, "cuts": cuts,
            "counts": [count(name, [segments]) for name in MASKS], "train": [count(name, train) for name in MASKS]}


def table(title, rows):
    lines = [list(rows[0])] + [[f"{v:,}" if isinstance(v, int) else v for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{title}")
    for line in lines:
        print("   " + "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths)))


def report(figures, n_dialogues):
    table("This dialogue", figures["counts"])
    table(f"{n_dialogues:,} training dialogues of one family each", figures["train"])
    rows = []
    for part in figures["parts"]:
        before = [j for i, row in enumerate(part["moved"]) for j in row if j < i]
        rows.append({"mask": part["mask"], "logits that move": sum(map(len, part["moved"])),
                     "before the token": len(before), "and trained (leaks)": len({*before} & {*part["trained"]})})
    table("No leak: change each token in turn", rows)
    table("Cacheable: cut the dialogue where a segment ends", [
        {"mask": c["mask"], "tokens": c["cut"], "rows of f that change": len(c["f_changed"]),
         "stale keys and values": len(c["stale"]), "reusable": c["reusable"]} for c in figures["cuts"]])


# The pictures: a row is a token, one unit high

def frame(axis, figures, n, left, right):
    """Rows for the first n tokens, with their labels, shaded by segment from `left` to `right`."""
    for j in range(n):
        axis.barh(j + 0.5, right - left, 1, left, color=TINTS[figures["segments"][j] % 2], zorder=0)
        axis.text(-0.2, j + 0.5, figures["labels"][j], ha="right", va="center", fontsize=7.5)
    axis.hlines(borders(figures["segments"][:n])[1:-1], left, right, color="black", lw=0.7, zorder=3)
    axis.set(xticks=[], yticks=[], frame_on=False)


def cell(axis, x, y, color):
    axis.add_patch(plt.Rectangle((x, y), 1, 1, facecolor=color, edgecolor="white", lw=0.6))


def dots(axis, x, y):
    axis.plot(x, y, "o", ms=4, color="black", mec="white", mew=0.6, zorder=4)


def legend(place, colors, dot, **options):
    """colors: what a cell means, and its colour; dot: what a dot means."""
    handles = [plt.Rectangle((0, 0), 1, 1, facecolor=color, edgecolor="gray", lw=0.5) for color in colors.values()]
    handles.append(plt.Line2D([], [], ls="", marker="o", ms=4, color="black"))
    place.legend(handles, [*colors, dot], fontsize=8.5, frameon=False, **options)


def segment_name(segment):
    return f"{'query' if segment % 2 else 'answer'} {(segment + 1) // 2}"


def draw_masks(figures, path):
    figure, axes = plt.subplots(2, 2, figsize=(9, 8.3), layout="constrained")
    for axis, part in zip(axes.flat, sorted(figures["parts"], key=lambda part: "prefix" in part["mask"])):
        f, trained = part["f"], part["trained"]
        T, ends = len(f), borders(figures["segments"][:len(f)])
        frame(axis, figures, T, -6, T)
        for j in range(T):
            for i in range(f[j]):
                cell(axis, i, j, PAST if i <= j else FUTURE)
        dots(axis, [j + 1.5 for j in trained], [j + 0.5 for j in trained])
        axis.vlines(ends[1:], 0, T, color="black", lw=0.7, zorder=3)
        for start, end in zip(ends, ends[1:]):
            axis.text((start + end) / 2, -0.2, segment_name(figures["segments"][start]), ha="center", fontsize=8)
        axis.set_title(f"{part['mask'].replace('ism', 'ISM')}: {sum(f)} pairs, {len(trained)} trained", fontsize=10.5)
        axis.set(xlim=(-6, len(figures["labels"])), ylim=(len(figures["labels"]), -1.2))
    legend(axes[1, 0], {"sees: itself and its past": PAST, "sees: its future": FUTURE,
                        "hidden from a query's token": TINTS[1], "hidden from an answer's token": TINTS[0]},
           "the next token, which the row is trained to predict", loc="lower left", bbox_to_anchor=(0.1, 0.05))
    figure.savefig(path, dpi=200, format="png")


def draw_properties(figures, path):
    labels, segments, ends = figures["labels"], figures["segments"], borders(figures["segments"])
    groups = []  # (title, token changed, columns), a column: (mask, rows that change, how many rows there are, trained)
    for i in (ends[1] + 1, ends[2] + 2):  # the second token of the first answer, the third of the second query
        groups.append((f'change "{labels[i]}" in {segment_name(segments[i])}:\nlogits that move', i, [
            (p["mask"], (p["moved"] + [[]] * len(labels))[i], len(p["f"]), p["trained"]) for p in figures["parts"]]))
    for end in ends[1:-1]:
        groups.append((f"cut after\n{segment_name(segments[end - 1])}:\nrows of f\nthat change", None, [
            (c["mask"], c["f_changed"], end, []) for c in figures["cuts"] if c["cut"] == end]))
    figure, axis = plt.subplots(figsize=(9, 5.2), layout="constrained")
    x = 0.3
    for title, token, columns in groups:
        axis.text(x + len(columns) / 2, -2.2, title, ha="center", fontsize=8.5)
        if token is not None:
            axis.add_patch(plt.Rectangle((x, token), len(columns), 1, fill=False, lw=1.5, zorder=5))
        for name, changed, n, trained in columns:
            axis.text(x + 0.5, -0.2, name.replace("ism", "ISM").replace(", ", "\n"), ha="center", fontsize=7)
            for j in range(len(labels)):
                cell(axis, x, j, CHANGE if j in changed else SAME if j < n else "white")
            dots(axis, [x + 0.5] * len(trained), [j + 0.5 for j in trained])
            x += 1
        x += 0.5
    frame(axis, figures, len(labels), -2, x)
    axis.set(xlim=(-2, x), ylim=(len(labels), -5.6))
    legend(figure, {"changes": CHANGE, "stays the same": SAME, "is not there": "white"},
           "trained: predicts the token of the next row", loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=200, format="png")


def main():
    parser = Parser(description="The masks on one short dialogue: drawn, counted, tested.", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="count over 50 training dialogues, not 2,000")
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--out", metavar="FILE", help="where the picture goes, as a PNG (default: demos/out/masks.png)",
                        default=str(Path(__file__).resolve().parent / "out" / "masks.png"))
    args = parser.parse_args()
    out = Path(args.out)
    properties = out.parent / f"{out.stem}-properties{out.suffix}"
    check_writable(out, properties, json=args.json)
    n_dialogues = 50 if args.quick else 2000
    figures = {"quick": args.quick, **measure(n_dialogues)}
    report(figures, n_dialogues)
    draw_masks(figures, out)
    draw_properties(figures, properties)
    if args.json:
        Path(args.json).write_text(json.dumps(figures) + "\n", encoding="utf-8")
    print(f"\nThe pictures: {out} and {properties}")


if __name__ == "__main__":
    main()
