"""
What a mask computes: linear attention on linear regression in context.

    python demos/theory.py    half a minute

A dialogue holds examples: inputs x with labels y, which a hidden vector w* made by y = x . w*. Each
layer of linear attention moves the guess w that a dialogue's last tokens read out. The claim of the
paper: under ISM the final query is read by batch gradient descent, which converges linearly to w*,
and earlier tokens keep the online updates of a causal model. Each part compares the paper's layer,
in float64 under an f of mask.py, with a formula that knows nothing of attention:

    1  the final query       it is batch gradient descent on its examples
    2  causal                it is online gradient descent, and stops before w*
    3  examples over turns   ISM is in between: a query is fitted as one block
    4  noise on the labels   where that is better, and where it is worse

The layer. A dialogue is a row of tokens t_1, t_2, ..., and a layer adds to each of them

    t_j <- t_j + O V sum_{i <= f(j)} t_i (t_i^T K^T Q t_j)

A token is [key half, query half, residual]. An example of an input x with the label y is [x, x, y].
A token that asks for the label of x is [0, x, 0]. K reads the key half, Q the query half, V the
residual, and O writes it back times -eta. So all that a layer changes are the residuals r, and it
changes all of them at once, by one matrix of T x T:

    r <- r - eta A r,     A[j, i] = key_i . query_j  where i <= f(j), else 0

What it computes. Call a the sum of eta r over the layers so far. Then r = y - A a, and a layer is
a <- a + eta (y - A a). Between examples A is the Gram matrix of the inputs, masked by f. A token
that asks starts at r = 0, so it comes to hold -x . w with w = sum of a_i x_i over the examples that
it sees: it reads out w. If all examples see each other, w takes the step

    w <- w + eta X^T (y - X w)

which is batch gradient descent. This is why a token that asks needs an empty key half: one with a
key would be an example with the label 0.

Where the layers stop, A r = 0. Each block of examples that see each other has then been solved on
what the blocks before it left over: w <- w + pinv(X_s) (y_s - X_s w). To go through all blocks so,
once and one after the other, is a sweep of the block Kaczmarz method. Under causal a block is one
example, under prefix all of them are one block, and under ISM a query is a block.
"""
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import machine
from demos.output import check_writable, color, dashes, picture, plt, save, table
from mask import causal, dense, ism, prefix

# The letters in the shapes: B random draws of the task, n examples, T tokens, and these.
D = 16  # dimensions of an input
N = 60  # examples in a dialogue
MASKS = {"causal": causal, "prefix": prefix, "ism": ism}
LENGTHS = [1, 2, 3, 5, 10, 12, 15, 20, 30, 60]  # examples in one query: 1 is causal, N is prefix


# --- the task, and how a dialogue tells it ------------------------------------------------------


def regression(draws, n=N, mean=0.0, noise=0.0, seed=0):
    """Inputs (B, n, D), labels (B, n), and w* (B, D) of length 1, which made them up to noise."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(draws, D))
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    X = mean + rng.normal(size=(draws, n, D))
    y = labels(X, w) + noise * rng.normal(size=(draws, n))
    return X, y, w


def dialogue(X, y, length=N):
    """Examples X (B, n, D), y (B, n) as tokens (B, T, 2D + 1) and segments (B, T).

    A query holds `length` examples. Its answer is one token, which asks for the label of the first
    unit vector and so holds -w[0]. The last query has no answer. It ends with D tokens that ask for
    all unit vectors: their residuals are -w.
    """
    X, y = torch.as_tensor(X), torch.as_tensor(y)
    # An example is [x, x, y], a token that asks is [0, x, 0].
    examples = torch.cat([X, X, y[..., None]], 2)  # (B, n, 2D + 1)
    asks = torch.zeros(len(X), D, 2 * D + 1, dtype=X.dtype)
    asks[:, :, D:-1] = torch.eye(D)
    *earlier, last = examples.split(length, 1)
    tokens, segments = [], []
    for turn, query in enumerate(earlier):
        tokens += [query, asks[:, :1]]
        segments += [2 * turn + 1] * length + [2 * turn + 2]
    tokens += [last, asks]
    segments += [2 * len(earlier) + 1] * (last.shape[1] + D)
    return torch.cat(tokens, 1), torch.tensor(segments).expand(len(X), -1)


# --- the layer ----------------------------------------------------------------------------------


def matrices(d, eta):
    """K and Q (d, 2d + 1), V (1, 2d + 1), O (2d + 1, 1) for inputs of d dimensions."""
    unit = torch.eye(2 * d + 1, dtype=torch.float64)
    K = unit[:d]  # reads the key half
    Q = unit[d:-1]  # reads the query half
    V = unit[-1:]  # reads the residual
    O = -eta * V.T  # writes to the residual
    return K, Q, V, O


def masked_scores(tokens, f, K, Q):
    """A[j, i] = t_i^T K^T Q t_j where i <= f(j), else 0: (B, T, T)."""
    return (tokens @ Q.T) @ (tokens @ K.T).mT * dense(f)


def read_out(tokens, f, eta, layers):
    """The w that the last D tokens read out after 0, 1, ... layers: (layers + 1, B, D)."""
    K, Q, V, O = matrices(tokens.shape[2] // 2, eta)
    read = [-tokens[:, -D:, -1]]
    for _ in range(layers):
        values = tokens @ V.T  # (B, T, 1)
        sums = masked_scores(tokens, f, K, Q) @ values  # (B, T, 1)
        tokens = tokens + sums @ O.T  # (B, T, 2d + 1)
        read.append(-tokens[:, -D:, -1])
    return torch.stack(read).numpy()


def fixed_point(tokens, f):
    """What the tokens read out, A a, where more layers change nothing, by a solve: (B, T).

    The layers stop where A r = 0 with r = y - A a. A block of more examples than dimensions leaves
    that part of its labels which no w fits, and which A does not see. So it is solved for a, and
    A r = 0 is asked for in the row space of A.
    """
    d = tokens.shape[2] // 2
    K, Q, _, _ = matrices(d, 0)
    A = masked_scores(tokens, f, K, Q)  # (B, T, T)
    example = tokens[0, :, :d].any(1)  # (T,) True for those with a key
    read = []
    for scores, y in zip(A, tokens[:, example, -1]):
        between = scores[example][:, example]  # (n, n) examples alone
        _, S, Vh = torch.linalg.svd(between)
        rows = Vh[S > 1e-10 * S[0]].T  # (n, rank) a basis of the row space
        a = rows @ torch.linalg.solve(rows.T @ between @ rows, rows.T @ y)  # (n,)
        read.append(scores[:, example] @ a)  # (T,)
    return torch.stack(read)


# --- what each mask computes, in closed form and without torch ----------------------------------


def labels(X, w):
    """The labels that w gives to inputs (B, n, D): (B, n)."""
    return np.einsum("bnd,bd->bn", X, w)


def mixture(X, a):
    """The sum of a_i x_i over inputs (B, n, D) with shares (B, n): (B, D)."""
    return np.einsum("bnd,bn->bd", X, a)


def batch_descent(X, y, eta, layers):
    """Batch gradient descent from 0: w after 0, 1, ... steps, (layers + 1, B, D)."""
    w = [np.zeros(X[:, 0].shape)]
    for _ in range(layers):
        left = y - labels(X, w[-1])  # (B, n) what w does not fit yet
        w.append(w[-1] + eta * mixture(X, left))
    return np.stack(w)


def online_descent(X, y, length, eta, layers):
    """Online gradient descent over blocks: the last w after each layer, (layers + 1, B, D).

    Example j moves w by a_j x_j. A layer goes through the blocks once, and adds to each a_j a
    gradient step on example j, taken at the w to which its block has come.
    """
    a = np.zeros(y.shape)
    last = []
    for _ in range(layers + 1):
        w = np.zeros(X[:, 0].shape)
        for start in range(0, y.shape[1], length):
            block = slice(start, start + length)
            w = w + mixture(X[:, block], a[:, block])
            a[:, block] += eta * (y[:, block] - labels(X[:, block], w))
        last.append(w)
    return np.stack(last)


def kaczmarz(X, y, length):
    """One sweep of block Kaczmarz: w after each block, (blocks, B, D)."""
    w = np.zeros(X[:, 0].shape)
    after = []
    for start in range(0, y.shape[1], length):
        block = slice(start, start + length)
        left = y[:, block] - labels(X[:, block], w)  # (B, length)
        # The smallest change of w that fits this block.
        w = w + np.einsum("bdn,bn->bd", np.linalg.pinv(X[:, block]), left)
        after.append(w)
    return np.stack(after)


def expected_error(length, noise=0.0):
    """The mean of |w - w*|^2 after a sweep over N standard normal inputs, for |w*| = 1.

    A block's rows span a random subspace. The part of the error inside it, length / D on average,
    goes, and the block's noise comes in through pinv(X). Near length = D that has no finite mean
    square: None.
    """
    if noise == 0:
        new = 0.0
    elif abs(length - D) <= 1:
        return None
    elif length < D:
        new = noise**2 * length / (D - length - 1)
    else:
        new = noise**2 * D / (length - D - 1)
    error = 1.0
    for _ in range(N // length):
        error = max(0, 1 - length / D) * error + new
    return error


# --- what the parts share -----------------------------------------------------------------------


def gap(a, b):
    """The largest difference between two arrays."""
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def batch_step(X):
    """1 / the largest eigenvalue of any draw's Gram matrix: one eta for all draws and masks.

    With 1 / max |x|^2, small enough for each example alone, causal residuals grow to 1e10 in 200
    layers before they settle, where the mean of the inputs is 3.
    """
    return 1 / np.linalg.norm(X, 2, (1, 2)).max() ** 2


def squared_error(w, best):
    """|w - w*|^2 for each draw. |w*| is 1, so 1 is what knowing nothing costs."""
    return ((np.asarray(w) - best) ** 2).sum(-1)


def show(title, rows, columns):
    """Print a table. columns: what is printed of each row, {its name: its heading}."""
    table(title, [{head: row[name] for name, head in columns.items()} for row in rows])


def say(claimed, seen):
    """End a part in plain words."""
    for word, text in (("Claimed", claimed), ("Seen", seen)):
        print(textwrap.fill(f"{word}: {text}", 79, initial_indent="\n   ", subsequent_indent="   "))


# --- 1. the final query -------------------------------------------------------------------------


def final_query(draws, layers):
    """All examples stand in the final query. What does it read out under each mask?"""
    X, y, w = regression(draws)
    eta = batch_step(X)
    tokens, segments = dialogue(X, y)
    # An earlier turn without examples, so that ISM and prefix are two masks and not one.
    tokens = torch.cat([tokens[:, -4:], tokens], 1)  # (B, 4 + N + D, 2D + 1)
    earlier = torch.tensor([[1, 1, 2, 2]]).expand(draws, 4)
    segments = torch.cat([earlier, segments + 2], 1)  # (B, 4 + N + D)
    reads = {name: read_out(tokens, mask(segments), eta, layers) for name, mask in MASKS.items()}
    descent = batch_descent(X, y, eta, layers)
    rows = []
    for name, read in reads.items():
        error = squared_error(read, w).mean(1).tolist()
        off = gap(read, descent)
        rows.append({"mask": name, "off_descent": off, "left": error[-1], "error": error})
    show(f"1. The final query holds all {N} examples: {D} dimensions, {draws} draws, no noise,\n"
         f"   step {eta:.4f}, {layers} layers", rows,
         {"mask": "mask", "off_descent": "off batch descent by", "left": "|w - w*|^2 left"})
    figures = {"rows": rows, **convergence(X, w, reads["ism"], eta)}
    slowest, fastest = max(figures["measured"]), min(figures["measured"])
    say("under ISM the final query is read by batch gradient descent and comes to w*.",
        f"each layer is a step of it; |w - w*| is {fastest:.2f} to {slowest:.2f} times as large "
        f"after each layer, as the inputs' least eigenvalue predicts to {figures['off_by']:.0e}. "
        "Causal stops before w*.")
    return figures


def convergence(X, w, read, eta):
    """By what factor |w - w*| falls in a layer: measured, and 1 - eta * (least eigenvalue)."""
    measured = []
    for error in np.sqrt(squared_error(read, w)).T:  # (layers + 1,) of each draw
        # The last 20 layers before rounding shows.
        last = np.flatnonzero(error > 1e-12)[-1]
        measured.append(float((error[last] / error[last - 20]) ** (1 / 20)))
    least = np.linalg.eigvalsh(X.swapaxes(1, 2) @ X)[:, 0]  # (B,)
    predicted = 1 - eta * least
    off = gap(measured / predicted, 1)
    return {"measured": measured, "predicted": predicted.tolist(), "off_by": off}


# --- 2. causal ----------------------------------------------------------------------------------


SHOWN = 20, 80, 320, 640  # examples after which the error is printed


def online(draws, layers, n=640, noise=0.3):
    """Causal, for inputs whose every coordinate has a mean from 0 to 3 and the variance 1."""
    rows = []
    for mean in range(4):
        for sigma in (0.0, noise):
            X, y, w = regression(draws, n, mean=mean, noise=sigma, seed=2)
            error = squared_error(kaczmarz(X, y, 1), w).mean(1)  # (n,)
            rows.append({
                "mean": mean,
                "noise": sigma,
                **follow_causal(mean, sigma, layers),
                **{f"error_{k}": float(error[k - 1]) for k in SHOWN},
                "error": error.tolist(),
            })
    show(f"2. Causal: {layers} layers against online gradient descent (one example at a\n   time); "
         "where they stop against one sweep of Kaczmarz (fit each once, in turn)", rows,
         {"mean": "mean of x", "noise": "noise", "off_online": "layers, off by",
          "off_sweep": "where they stop, off by"})
    show(f"   |w - w*|^2 where the layers stop, after 20 to 640 examples, {draws} draws", rows,
         {"mean": "mean of x", "noise": "noise", **{f"error_{k}": str(k) for k in SHOWN}})
    say("a causal model makes online updates.",
        "so it does, and more layers do not bring it to w*: it fits each example once. More is "
        "left the further the mean of the inputs is from zero. With noise an error stays, however "
        "many examples there are.")
    return {"rows": rows}


def follow_causal(mean, noise, layers):
    """The layers and where they stop against the closed forms, on 8 draws."""
    X, y, _ = regression(8, mean=mean, noise=noise, seed=1)
    tokens, segments = dialogue(X, y)
    f, eta = causal(segments), batch_step(X)
    return {
        "off_online": gap(read_out(tokens, f, eta, layers), online_descent(X, y, 1, eta, layers)),
        "off_sweep": gap(fixed_point(tokens, f)[:, -D:], kaczmarz(X, y, 1)[-1]),
    }


# --- 3 and 4. examples over turns, without noise and with ---------------------------------------


def spread(part, draws, layers, noise):
    """ISM over N examples in turns of `length`: between causal (1) and prefix (N)."""
    X, y, w = regression(16, noise=noise, seed=3)
    many_X, many_y, many_w = regression(draws, noise=noise, seed=4)
    eta = batch_step(X)
    rows = []
    for length in LENGTHS:
        error = squared_error(kaczmarz(many_X, many_y, length)[-1], many_w)  # (draws,)
        rows.append({
            "length": length,
            **follow_turns(X, y, w, length, eta, layers),
            "error": float(error.mean()),
            "standard_error": float(error.std() / draws**0.5),
            "expected": expected_error(length, noise),
        })
    show(f"{part}. ISM: {N} examples in turns of some length (1 is causal, {N} is prefix), noise\n"
         f"   {noise}; {layers} layers with step {eta:.4f} against online descent block by block,\n"
         "   where they stop against one sweep of Kaczmarz", rows,
         {"length": "in a query", "off_online": "layers, off by",
          "off_sweep": "where they stop, off by"})
    show("   |w - w*|^2 where the layers stop, and at the depth where it is least", rows,
         {"length": "in a query", "error": "at the stop", "standard_error": "std. error",
          "expected": "by formula", "best_depth": "best depth", "error_there": "there"})
    of = {row["length"]: row["error"] for row in rows}
    if noise:
        say("nothing for noise on the labels. Is ISM no worse than causal there too?",
            f"it can be worse. Causal stops at {of[1]:.2g}; 15 examples in a "
            f"query of {D} dimensions at {of[15]:.2g}, for a block that just fits takes the noise "
            f"in; all {N} in one at {of[N]:.2g}. With few layers the fit is cut short, and longer "
            "queries are better at once.")
    else:
        say("ISM is between causal and prefix.",
            "each query is fitted as one block, on what the earlier ones left over. So |w - w*|^2 "
            f"falls from {of[1]:.2g} (one example in a query, which is causal) to w* itself, as "
            f"soon as one query holds as many examples as there are dimensions ({D}).")
    return {"rows": rows}


def follow_turns(X, y, w, length, eta, layers):
    """The layers and their fixed point against the closed forms, and the error by depth."""
    tokens, segments = dialogue(X, y, length)
    f = ism(segments)
    read = read_out(tokens, f, eta, layers)  # (layers + 1, B, D)
    fixed = fixed_point(tokens, f)  # (B, T)
    sweep = kaczmarz(X, y, length)  # (N / length, B, D)
    off = gap(fixed[:, -D:], sweep[-1])
    if length < N:
        # Each answer holds w[0] as it is after its turn.
        answers = segments[0] % 2 == 0
        off = max(off, gap(fixed[:, answers].T, sweep[:-1, :, 0]))
    by_depth = squared_error(read, w).mean(1)  # (layers + 1,)
    return {
        "off_online": gap(read, online_descent(X, y, length, eta, layers)),
        "off_sweep": off,
        "by_depth": by_depth.tolist(),
        "best_depth": int(by_depth.argmin()),
        "error_there": float(by_depth.min()),
    }


# --- the picture --------------------------------------------------------------------------------


def plot(figures, path):
    figure, axes = plt.subplot_mosaic("AABBCC;.DDEE.", figsize=(15, 8.5), layout="constrained")
    for axis in axes.values():
        axis.set_ylabel("squared error |w - w*|^2")
    plot_final_query(axes["A"], figures["final_query"]["rows"])
    plot_online(axes["B"], figures["online"]["rows"])
    plot_spread(axes["C"], figures["spread"]["rows"])
    axes["C"].set(title="3  ISM, no noise: w* itself from 16 in a query on", ylim=(1e-6, 0.1))
    noisy = figures["noise"]["rows"]
    plot_spread(axes["D"], noisy)
    axes["D"].plot(LENGTHS, [row["error_there"] for row in noisy], "s", mfc="none", color="black",
                   label="at the best depth")
    axes["D"].set_title("4  ISM, noise 0.5: worst where a query just fits")
    plot_by_depth(axes["E"], noisy)
    for axis in axes.values():
        axis.legend(fontsize=8)
        axis.grid(alpha=0.2)
    save(figure, path, 110)


def plot_final_query(axis, rows):
    for row in rows:
        name = row["mask"]
        if name in MASKS:
            # Prefix and ISM lie upon each other: dots on a broad line.
            style = {"color": color(name), "ls": dashes(name), "lw": 4 if name == "ism" else 2}
            axis.semilogy(row["error"], label=name, zorder=1 if name == "ism" else 2, **style)
    title = "1  The final query: ISM comes to w*, causal does not"
    axis.set(title=title, xlabel="layers", ylim=(1e-20, 3))


def plot_online(axis, rows):
    for row in rows:
        shade = plt.cm.viridis(row["mean"] / 3.5)
        examples = range(1, len(row["error"]) + 1)
        if row["noise"]:
            axis.loglog(examples, row["error"], "--", color=shade)
        else:
            axis.loglog(examples, row["error"], color=shade, label=f"input mean {row['mean']}")
    title = "2  Causal, where its layers stop (dashed: noise 0.3)"
    axis.set(title=title, xlabel="examples", ylim=(1e-4, 2))


def plot_spread(axis, rows):
    rows = [row for row in rows if row["error"] > 1e-20]  # 0 has no place on a log axis
    lengths = [row["length"] for row in rows]
    bars = [2 * row["standard_error"] for row in rows]
    expected = np.array([row["expected"] for row in rows], float)  # NaN where there is none
    axis.errorbar(lengths, [row["error"] for row in rows], bars, fmt="o", color=color("ism"),
                  label="where the layers stop, 2 standard errors")
    axis.plot(lengths, expected, "k-", lw=1, label="expected")
    axis.axvline(D, color="gray", ls=":", label=f"as many examples as dimensions, {D}")
    axis.set(xscale="log", yscale="log", xlim=(0.9, 70))
    axis.set_xlabel("examples in a query (1 is causal, 60 is prefix)")
    ticks = [1, 2, 3, 5, 10, 20, 30, 60]
    axis.set_xticks(ticks, ticks)
    axis.minorticks_off()


def plot_by_depth(axis, rows):
    for row in rows:
        length = row["length"]
        if length in (1, 5, 10, 20, 30, 60):
            shade = plt.cm.plasma(np.log(length) / 4.6)
            axis.plot(row["by_depth"], color=shade, label=f"{length} in a query")
    title = "4  ISM, noise 0.5: better with few layers"
    axis.set(title=title, xlabel="layers", xscale="symlog", yscale="log")


def measure():
    """Print all parts -> their figures by name."""
    return {
        "final_query": final_query(draws=16, layers=400),
        "online": online(draws=256, layers=200),
        "spread": spread(3, draws=1024, layers=200, noise=0.0),
        "noise": spread(4, draws=1024, layers=200, noise=0.5),
    }


def main():
    parser = machine.Parser("What causal, ISM and prefix compute on linear regression.")
    parser.add_argument("--out", default=picture("theory"), help="the picture")
    out = parser.parse_args().out
    with machine.errors_in_one_line("it takes 1 GB"):
        check_writable(out)
        print("Examples are inputs x with labels y = x . w*. Layers move a guess w. |w - w*|^2 is")
        print("its error: 1 if it knows nothing, 0 if it is w*. 'Off by' is how far the layers are")
        print("from a formula that knows nothing of attention.")
        plot(measure(), out)
        print(f"\nThe picture: {out}")


if __name__ == "__main__":
    main()
