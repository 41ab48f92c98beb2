"""
What the mask computes: linear attention on in-context linear regression.

The claim of the paper: under ISM the final query is read by batch gradient descent, which converges
linearly to the least-squares optimum w*, and earlier tokens keep the online updates of a causal model.
Five parts: 1 the final query, 2 causal, 3 examples spread over turns, 4 noise, 5 a trained GPT.
Parts 1 to 4 run the paper's own layer in float64 under f of mask.py and compare it with closed forms:

    x_j <- x_j + O V sum_{i <= f(j)} x_i (x_i^T K^T Q x_j)

A token is [key half, query half, residual]. An example is [x, x, y]; a token that asks for the label of x
is [0, x, 0]. K reads the key half, Q the query half, V the residual, and O writes it back times -eta.
So a layer changes the residuals r only, and all of them at once, by one matrix of T x T:

    r <- r - eta A r,     A[j, i] = key_i . query_j  where i <= f(j), else 0

Call a the sum of eta r over the layers so far. Then r = y - A a, and the layer is a <- a + eta (y - A a).
Over the examples A is M * G, the Gram matrix G = X X^T masked by M. A token that asks starts at r = 0 and so
holds -x . w with w = sum of a_i x_i over the examples that it sees: it reads out w. With M all ones, w takes
the step w <- w + eta X^T (y - X w), which is batch gradient descent. The empty key half matters: a token
that asks and has a key is an example with the label 0.

Where the layers stop, each block of tokens that see each other has been solved on what the earlier ones left
over, w_s = w_{s-1} + pinv(X_s) (y_s - X_s w_{s-1}): one sweep of the block Kaczmarz method (of the Kaczmarz
method itself under the causal mask, where a block is one example).

    python demos/theory.py [--quick]
"""
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.machine import Parser
from demos.output import COLORS, check_writable, plt
from mask import MASKS, causal, dense, ism, prefix
from model import GPT, GPTConfig

D, N = 16, 60  # inputs have D dimensions; a dialogue holds N examples
LENGTHS = [1, 2, 3, 5, 10, 12, 15, 20, 30, 60]  # examples in one query; 1 is causal, N is prefix


def regression(draws, n=N, d=D, mean=0.0, noise=0.0, seed=0):
    """-> inputs (B, n, d), labels (B, n), and w* (B, d) of length 1, which made the labels up to the noise."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(draws, d))
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    X = mean + rng.normal(size=(draws, n, d))
    y = np.einsum("bnd,bd->bn", X, w) + noise * rng.normal(size=(draws, n))
    return X, y, w


# The layers, in torch

def dialogue(X, y, length=N):
    """-> tokens (B, T, 2d+1), segments (B, T): turns of `length` examples in a query, one token as answer.

    The answer asks for the first unit vector's label, so it holds -w[0]. The last query ends with d tokens
    that ask for all unit vectors, so that their residuals are -w.
    """
    X, y = torch.as_tensor(X), torch.as_tensor(y)
    B, n, d = X.shape
    examples = torch.cat([X, X, y[..., None]], 2).split(length, 1)  # each (B, length, 2d+1)
    asks = torch.zeros(d, 2 * d + 1, dtype=X.dtype)
    asks[:, d:-1] = torch.eye(d)
    asks = asks.expand(B, d, -1)  # (B, d, 2d+1)
    tokens, segments = [], []
    for s, block in enumerate(examples):
        last = s == len(examples) - 1
        tokens += [block, asks if last else asks[:, :1]]
        segments += [2 * s + 1] * (block.shape[1] + d * last) + [2 * s + 2] * (not last)
    return torch.cat(tokens, 1), torch.tensor(segments).expand(B, -1)


def weights(d, eta):
    """The matrices of one head: K and Q (d, D), V (1, D), O (D, 1), with D = 2d + 1."""
    eye, zero = torch.eye(d, dtype=torch.float64), torch.zeros(d, d + 1, dtype=torch.float64)
    K = torch.cat([eye, zero], 1)
    Q = torch.cat([zero[:, :d], eye, zero[:, :1]], 1)
    V = torch.zeros(1, 2 * d + 1, dtype=torch.float64)
    V[0, -1] = 1
    return K, Q, V, -eta * V.T


def scores(tokens, f, K, Q):
    """A[j, i] = x_i^T K^T Q x_j where i <= f(j), else 0: (B, T, T)."""
    return (tokens @ Q.T) @ (tokens @ K.T).mT * dense(f)


def run(tokens, f, eta, layers):
    """The residual that each token carries after 0, 1, ... layers: (layers + 1, B, T)."""
    K, Q, V, O = weights(tokens.shape[2] // 2, eta)
    residuals = [tokens[..., -1]]
    for _ in range(layers):
        tokens = tokens + scores(tokens, f, K, Q) @ (tokens @ V.T) @ O.T  # (B, T, 2d+1)
        residuals.append(tokens[..., -1])
    return torch.stack(residuals)


def fixed_point(tokens, f):
    """What the tokens read out, A a, where more layers change nothing, by a solve: (B, T).

    The layers stop where A r = 0 with r = y - A a. A block of more examples than dimensions leaves the part of
    its labels that no w fits, which A does not see: so solve for a, and ask for A r = 0, in the row space of A.
    """
    d = tokens.shape[2] // 2
    K, Q, _, _ = weights(d, 0)
    A = scores(tokens, f, K, Q)
    example = tokens[0, :, :d].any(1)  # (T,) those with a key
    out = []
    for full, y in zip(A, tokens[:, example, -1]):
        A = full[example][:, example]
        _, S, Vh = torch.linalg.svd(A)
        rows = Vh[S > 1e-10 * S[0]].T  # (n, rank)
        a = rows @ torch.linalg.solve(rows.T @ A @ rows, rows.T @ y)
        out.append(full[:, example] @ a)
    return torch.stack(out)


# The closed forms, in numpy

def batch_descent(X, y, eta, layers):
    """Batch gradient descent from 0: w after 0, 1, ... steps, (layers + 1, B, d)."""
    w = [np.zeros(X[:, 0].shape)]
    for _ in range(layers):
        w.append(w[-1] + eta * np.einsum("bnd,bn->bd", X, y - np.einsum("bnd,bd->bn", X, w[-1])))
    return np.stack(w)


def online_descent(X, y, length, eta, layers):
    """Online gradient descent over blocks, once per layer: the last w after each layer, (layers + 1, B, d).

    Example j moves w by a_j x_j. A layer goes through the blocks once and adds to each a_j a gradient step on
    example j, taken at the w that its block has come to.
    """
    a, out = np.zeros(y.shape), []
    for _ in range(layers + 1):
        w = np.zeros(X[:, 0].shape)
        for s in range(0, y.shape[1], length):
            block = slice(s, s + length)
            w = w + np.einsum("bnd,bn->bd", X[:, block], a[:, block])
            a[:, block] += eta * (y[:, block] - np.einsum("bnd,bd->bn", X[:, block], w))
        out.append(w)
    return np.stack(out)


def kaczmarz(X, y, length):
    """One sweep of block Kaczmarz: w after each block, (blocks, B, d)."""
    w, out = np.zeros(X[:, 0].shape), []
    for s in range(0, y.shape[1], length):
        left = y[:, s:s + length] - np.einsum("bnd,bd->bn", X[:, s:s + length], w)
        w = w + np.einsum("bdn,bn->bd", np.linalg.pinv(X[:, s:s + length]), left)
        out.append(w)
    return np.stack(out)


def expected_error(length, noise=0.0, n=N, d=D):
    """The mean of |w - w*|^2 after a sweep over standard normal inputs, for |w*| = 1.

    A block's rows span a random subspace: the part of the error inside it, length / d on average, goes, and
    the block's noise comes in through pinv(X). Near length = d that has no finite mean square: None.
    """
    error, new = 1.0, 0.0
    if noise:
        if abs(length - d) <= 1:
            return None
        new = noise**2 * (length / (d - length - 1) if length < d else d / (length - d - 1))
    for _ in range(n // length):
        error = max(0, 1 - length / d) * error + new
    return error


# What the parts share

def gap(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def batch_step(X):
    """1 / the largest eigenvalue of any draw's Gram matrix: one step for all draws, all masks, all layers."""
    return 1 / np.linalg.norm(X, 2, (1, 2)).max() ** 2


def squared_error(w, best):
    """|w - w*|^2 for each draw. |w*| is 1, so 1 is what knowing nothing costs."""
    return ((np.asarray(w) - best) ** 2).sum(-1)


def table(title, rows):
    """Print rows, dicts with the same keys, under their keys. What is a list goes to the JSON file only."""
    names = [name for name, value in rows[0].items() if not isinstance(value, list)]
    cells = [names] + [[f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in names]
                       for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(f"\n{title}")
    for line in cells:
        print("   " + "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths)))


# The five parts

def final_query(draws, layers):
    X, y, w = regression(draws)
    eta = batch_step(X)
    tokens, segments = dialogue(X, y)
    # An earlier turn without examples, so that ISM and prefix are two masks and not one.
    tokens = torch.cat([tokens[:, -4:], tokens], 1)  # (B, 4 + N + d, 2d+1)
    segments = torch.cat([torch.tensor([[1, 1, 2, 2]]).expand(draws, 4), segments + 2], 1)
    keyed = tokens.clone()  # what if the tokens that ask had a key?
    keyed[:, -D:, :D] = torch.eye(D)
    reads = {name: -run(tokens, f(segments), eta, layers)[..., -D:].numpy() for name, f in MASKS.items()}
    reads["ism, asking with keys"] = -run(keyed, ism(segments), eta, layers)[..., -D:].numpy()  # (layers + 1, B, d)
    descent = batch_descent(X, y, eta, layers)
    rows = [{"mask": name, "layers_vs_batch_descent": gap(r, descent), "layers_vs_prefix": gap(r, reads["prefix"]),
             "error": squared_error(r, w).mean(1).tolist()} for name, r in reads.items()]
    table(f"1. All {N} examples in the final query: {D} dimensions, {draws} draws, no noise, step {eta:.4f};\n"
          f"   the largest difference of w over {layers} layers", rows)
    zeros = batch_descent(np.concatenate([X, np.tile(np.eye(D), (draws, 1, 1))], 1), np.pad(y, ((0, 0), (0, D))),
                          eta, layers)
    measured = []
    for e in np.sqrt(squared_error(reads["ism"], w)).T:
        last = np.flatnonzero(e > 1e-12)[-1]  # before rounding shows
        measured.append(float((e[last] / e[last - 20]) ** (1 / 20)))
    predicted = 1 - eta * np.linalg.eigvalsh(X.swapaxes(1, 2) @ X)[:, 0]
    out = {"rows": rows, "eta": eta, "keys_vs_zero_labels": gap(reads["ism, asking with keys"], zeros),
           "factor_measured": measured, "factor_predicted": predicted.tolist(),
           "factor_off_by": gap(measured / predicted, 1), "log_off_by": gap(np.log(measured) / np.log(predicted), 1)}
    print(f"   With keys they are examples with label 0: {out['keys_vs_zero_labels']:.0e} from descent on those.\n"
          f"   |w - w*| falls by a factor of {min(measured):.4f} to {max(measured):.4f} a layer, from draw to draw. "
          f"1 - step * (least eigenvalue)\n   is off by {out['factor_off_by']:.1e} at most, its logarithm by "
          f"{out['log_off_by']:.1e} (relative).")
    return out


def online(draws, layers, n=640, noise=0.3):
    """The predictions are for the long run and many dimensions d; every coordinate of x has mean m, variance 1.

    Say the error e has the product q with the mean input. An example x = mean + z takes out (q + e.z)^2 / |x|^2
    and leaves q / (1 + m^2) - m^2 / (1 + m^2) e.z of q, so q^2 comes to m^2 / (2 + m^2) |e|^2, and what an example
    takes out to 2 / (d (2 + m^2)) |e|^2. Noise of variance s^2 brings in s^2 / |x|^2 and moves q too: the two
    are equal at |e|^2 = s^2 / (1 + m^2), times d / (d - 2) because |x|^2 is random (exact for m = 0).
    """
    rows = []
    for mean in range(4):
        for sigma in (0.0, noise):
            X, y, _ = regression(8, mean=mean, noise=sigma, seed=1)
            tokens, segments = dialogue(X, y)
            f, eta = causal(segments), batch_step(X)
            r, long_step = (run(tokens, f, step, layers) for step in (eta, 1 / (X**2).sum(2).max()))
            solve = gap(fixed_point(tokens, f)[:, -D:], kaczmarz(X, y, 1)[-1])
            follow = gap(-r[..., -D:], online_descent(X, y, 1, eta, layers))
            X, y, w = regression(draws, n, mean=mean, noise=sigma, seed=2)
            e = squared_error(kaczmarz(X, y, 1), w).mean(1)  # (n,)
            rows.append({"mean": mean, "noise": sigma, "layers_vs_online": follow, "solve_vs_kaczmarz": solve,
                         "max_r": r.abs().max().item(), "max_r_long_step": long_step.abs().max().item(),
                         **{f"error_{k}": float(e[k - 1]) for k in (20, 80, 320, 640)}, "error": e.tolist()})
            if sigma:
                rows[-1] |= {"measure": "floor", "measured": float(e[-100:].mean()),
                             "predicted": sigma**2 * D / (D - 2) / (1 + mean**2)}
            else:
                rows[-1] |= {"measure": "examples for 1/10", "measured": int((e < 1e-2).argmax() - (e < 1e-1).argmax()),
                             "predicted": math.log(10) / -math.log(1 - 2 / (D * (2 + mean**2)))}
    table(f"2. Causal: {layers} layers against online gradient descent; the fixed point against one Kaczmarz sweep;\n"
          "   the largest residual with step 1/max eigenvalue, used here, and with 1/max |x|^2, where it can grow\n"
          "   beyond all bounds before it settles; and |w - w*|^2 at the fixed point after 20 to 640 examples, "
          f"{draws} draws", rows)
    return {"rows": rows}


def spread(draws, layers, noise):
    X, y, w = regression(16, noise=noise, seed=3)
    many = regression(draws, noise=noise, seed=4)
    eta, rows = batch_step(X), []
    for length in LENGTHS:
        tokens, segments = dialogue(X, y, length)
        f = ism(segments)
        read, fixed, swept = -run(tokens, f, eta, layers), fixed_point(tokens, f), kaczmarz(X, y, length)
        answers = segments[0] % 2 == 0  # each holds w[0] after its turn
        by_turn = gap(fixed[:, answers].T, swept[:-1, :, 0]) if length < N else 0.0
        by_depth = squared_error(read[..., -D:], w).mean(1)  # (layers + 1,)
        errors = squared_error(kaczmarz(*many[:2], length)[-1], many[2])
        rows.append({"length": length,
                     "layers_vs_online": gap(read[..., -D:], online_descent(X, y, length, eta, layers)),
                     "solve_vs_kaczmarz": max(by_turn, gap(fixed[:, -D:], swept[-1])),
                     "layers_vs_solve": gap(read[-1, :, -D:], fixed[:, -D:]), "by_depth": by_depth.tolist(),
                     "error": float(errors.mean()), "standard_error": float(errors.std() / draws**0.5),
                     "median": float(np.median(errors)), "expected": expected_error(length, noise),
                     "best_depth": int(by_depth.argmin()), "error_there": float(by_depth.min())})
    table(f"{4 if noise else 3}. ISM, {N} examples in turns of `length` (1 is causal, {N} is prefix), noise {noise},\n"
          f"   step {eta:.4f}, {layers} layers; error, median, expected: |w - w*|^2 at the fixed point, {draws} draws",
          rows)
    return {"rows": rows, "eta": eta, "noise": noise}


def earlier_turns(layers=50):
    """Do earlier tokens keep their values if later turns change, or if a turn is added? Turns of 5 examples."""
    X, y, _ = regression(8, seed=3)
    X2, y2, _ = regression(8, seed=5)
    X2[:, :30], y2[:, :30] = X[:, :30], y[:, :30]
    whole, changed, shorter = dialogue(X, y, 5), dialogue(X2, y2, 5), dialogue(X[:, :-5], y[:, :-5], 5)
    kept, n, rows = 6 * (5 + 1), shorter[0].shape[1] - D, []  # 6 turns of examples and an answer; all but the last asks
    for name, f in MASKS.items():
        a, b, c = (run(tokens, f(segments), batch_step(X), layers) for tokens, segments in (whole, changed, shorter))
        rows.append({"mask": name, "same_bits": torch.equal(a[..., :kept], b[..., :kept]),
                     "other_contents": gap(a[..., :kept], b[..., :kept]), "one_turn_more": gap(a[..., :n], c[..., :n])})
    table("   By how much later turns move the values of earlier tokens (turns 7 to 12 changed; turn 12 added)", rows)
    return {"rows": rows}


def trained(seeds, steps, d=4, length=8, turns=3, batch=64):
    """The project's GPT, trained under each mask to label the x that ends each query, all else being equal.

    The query of a turn is `length` examples and this x; the answer is the same x with its label. A seed
    is hard or easy for all masks alike, so compare seed by seed. Not the only setting tried: with 5 turns of 3
    examples (one seed) causal and ISM came out the same.
    """
    T = turns * (length + 2)
    segments = torch.tensor([[s for t in range(turns) for s in [2 * t + 1] * (length + 1) + [2 * t + 2]]])  # (1, T)
    asks = list(range(length, T, length + 2))

    def draw(B, generator):
        """-> tokens (B, T, d+2), the labels asked for (B, turns), with variance 1."""
        w = torch.randn(B, 1, d, generator=generator) / d**0.5
        x = torch.randn(B, T, d, generator=generator)
        x[:, [a + 1 for a in asks]] = x[:, asks]
        tokens = torch.cat([x, (x * w).sum(2, keepdim=True), torch.zeros(B, T, 1)], 2)
        labels = tokens[:, asks, d]
        tokens[:, asks, d:] = torch.tensor([0.0, 1.0])
        return tokens, labels

    def guesses(read, tokens, f):
        """The labels expected at the asks, (B, turns). Prefix needs a row for each answer, cut there."""
        if f is prefix:
            return torch.cat([read(tokens[:, :a + 1], f(segments[:, :a + 1]))[:, a] for a in asks], 1)
        return read(tokens, f(segments))[:, asks, 0]

    def linear(tokens, f):
        """The same by linear attention, at its fixed point."""
        x, y, asked = tokens.double().split((d, 1, 1), 2)
        return fixed_point(torch.cat([x * (1 - asked), x, y], 2), f)[..., None]

    config = GPTConfig(vocab_size=1, block_size=T, n_layer=2, n_embd=48, n_hidden=96, tie_embeddings=False)
    test, labels = draw(1000, torch.Generator().manual_seed(10**6))
    errors, rows = [], []
    for name, f in MASKS.items():
        errors.append([])
        for seed in range(seeds):
            torch.manual_seed(seed)
            generator = torch.Generator().manual_seed(seed)  # the same dialogues for each mask
            model = GPT(config)  # numbers in and out instead of words:
            model.embed, model.head = torch.nn.Linear(d + 2, config.n_embd), torch.nn.Linear(config.n_embd, 1)
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
            for i in range(steps):
                optimizer.param_groups[0]["lr"] = 3e-3 * min((i + 1) / 50, 1, (steps - i) / (0.4 * steps))
                tokens, y = draw(batch, generator)
                loss = ((guesses(model, tokens, f) - y) ** 2).mean()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            with torch.no_grad():
                errors[-1].append(((guesses(model, test, f) - labels) ** 2).mean(0).tolist())
        fixed = ((guesses(linear, test[:200], f) - labels[:200]) ** 2).mean(0).tolist()
        rows.append({"mask": name, **{f"turn_{t + 1}": e for t, e in enumerate(np.mean(errors[-1], 0).tolist())},
                     "tokens": sum(a + 1 for a in asks) if f is prefix else T,  # that a dialogue costs
                     "seeds_at_last_turn": " ".join(f"{e[-1]:.4f}" for e in errors[-1]),
                     "linear_at_last_turn": fixed[-1], "linear": fixed, "errors": errors[-1]})
    pooled = np.sqrt(np.var(errors, 1, ddof=1).mean(0))  # (turns,) one seed's spread, pooled over the masks
    table(f"5. A trained GPT: {config.n_layer} layers, {model.n_params():,} parameters; {turns} turns of {length} "
          f"examples, {d} dimensions, no noise;\n   {seeds} seeds, {steps} steps of {batch} dialogues for each mask, "
          "each answer trained; tokens that a\n   dialogue costs; squared error of the label (variance 1)", rows)
    print("   One seed's spread, pooled over the masks, turn by turn: " + ", ".join(f"{s:.2g}" for s in pooled))
    for row, runs in zip(rows, errors):
        if row["mask"] != "ism":
            less = np.array(runs) - errors[list(MASKS).index("ism")]  # (seeds, turns)
            print(f"   {row['mask']} - ism, seed by seed: " + "; ".join(
                f"turn {t + 1} " + " ".join(f"{x:+.4f}" for x in turn) for t, turn in enumerate(less.T)))
    return {"rows": rows, "pooled_spread": pooled.tolist()}


def picture(figures, path):
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.5), layout="constrained")
    one, two, three, four, five, six = axes.flat
    for row, style in zip(figures["final_query"]["rows"], ("-", "-", "--")):
        one.semilogy(row["error"], style, color=COLORS[row["mask"]], label=row["mask"])
    one.set(title="1  All examples in the final query", xlabel="layers", ylim=(1e-20, 3))
    for row in figures["online"]["rows"]:
        two.loglog(range(1, len(row["error"]) + 1), row["error"], "--" if row["noise"] else "-",
                   color=plt.cm.viridis(row["mean"] / 3.5), label=None if row["noise"] else f"input mean {row['mean']}")
    two.set(title="2  Causal at its fixed point (dashed: noise 0.3)", xlabel="examples", ylim=(1e-4, 2))
    for axis, part in ((three, "spread"), (four, "noise")):
        rows = [row for row in figures[part]["rows"] if row["error"] > 1e-20]  # 0 has no place on a log axis
        lengths, error, se, expected, best = (
            [row[k] for row in rows] for k in ("length", "error", "standard_error", "expected", "error_there"))
        axis.errorbar(lengths, error, 2 * np.array(se), fmt="o", label="fixed point, 2 standard errors")
        axis.plot(lengths, np.array(expected, float), "k-", lw=1, label="expected")
        axis.axvline(D, color="gray", ls=":", label=f"as many examples as dimensions, {D}")
        axis.set(xscale="log", yscale="log", xlim=(0.9, 70), xlabel="examples in a query (1 is causal, 60 is prefix)")
        axis.set_xticks([1, 2, 3, 5, 10, 20, 30, 60], [1, 2, 3, 5, 10, 20, 30, 60])
        axis.minorticks_off()
    three.set(title="3  ISM at its fixed point, no noise (0 from 16 on)", ylim=(1e-6, 0.1))
    four.plot(lengths, best, "s", mfc="none", label="at the best depth")
    four.set_title("4  ISM, noise 0.5")
    for row in rows:
        if row["length"] in (1, 5, 10, 20, 30, 60):
            five.plot(row["by_depth"], color=plt.cm.plasma(np.log(row["length"]) / 4.6),
                      label=f"{row['length']} in a query")
    five.set(title="4  ISM by depth, noise 0.5", xlabel="layers", xscale="symlog", yscale="log")
    for i, row in enumerate(figures["trained"]["rows"]):
        turns = np.arange(1, len(row["linear"]) + 1)
        six.errorbar(turns + 0.05 * (i - 1), np.mean(row["errors"], 0), figures["trained"]["pooled_spread"], fmt="o-",
                     capsize=4, color=COLORS[row["mask"]], label=row["mask"])
    six.set(title="5  A trained GPT (bars: one seed's spread)", xlabel="turn", xticks=turns, yscale="log")
    for axis in axes.flat:
        axis.set_ylabel("squared error of the label" if axis is six else "squared error |w - w*|^2")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.2)
    figure.savefig(path, dpi=110, format="png")


def main():
    parser = Parser(description="What causal, ISM and prefix masks compute on linear regression.", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="fewer draws, layers and steps: some seconds")
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--out", metavar="FILE", help="where the picture goes (default: demos/out/theory.png)",
                        default=str(Path(__file__).resolve().parent / "out" / "theory.png"))
    args = parser.parse_args()
    check_writable(args.out, json=args.json)
    start, quick = time.time(), args.quick
    figures = {"quick": quick,
               "final_query": final_query(16, 400),
               "online": online(*(64, 50) if quick else (256, 200)),
               "spread": spread(*(128, 50) if quick else (1024, 1000), noise=0.0),
               "earlier_turns": earlier_turns(),
               "noise": spread(*(128, 50) if quick else (1024, 200), noise=0.5),
               "trained": trained(*(2, 5) if quick else (3, 800))}
    figures["seconds"] = round(time.time() - start, 1)
    picture(figures, args.out)
    if args.json:
        Path(args.json).write_text(json.dumps(figures) + "\n", encoding="utf-8")
    print(f"\n{figures['seconds']} s. The picture: {args.out}")


if __name__ == "__main__":
    main()
