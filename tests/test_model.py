"""The model: equal to a naive reference, no leak, and a cache that changes nothing."""

import collections
import copy
import functools
import itertools
import random
import time
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    LINE,
    VARIANTS,
    decoded,
    exact_attention,
    load,
    make_model,
    random_dialogue,
    source,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import model as model_module
from mask import MASKS, dense, ism, loss_positions
from model import (
    AUTO,
    FLEX_FROM,
    GPT,
    PACKED,
    Cache,
    FusedNorm,
    GPTConfig,
    Int4Linear,
    Int8Linear,
    PackedLinear,
    Replay,
    Steps,
    attend_by_blocks,
    block_mask,
    by_columns,
    faster,
    fastest,
    fastest_attention,
    pack,
    sdpa,
)


def reference(model, tokens, f):
    """The same model in float64, a loop over heads and a dense mask, no library attention."""
    c, P = model.config, {name: p.double() for name, p in model.state_dict().items()}
    x = P["embed.weight"][tokens]
    norm = lambda x, w: x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * w
    D, T, H, Hkv = c.head_size, tokens.shape[1], c.n_head, c.n_kv_head
    angle = torch.arange(T).double()[:, None] / c.rope_theta ** (torch.arange(0, D, 2).double() / D)

    def rotate(h):
        a, b = h.chunk(2, -1)
        first = a * angle.cos() - b * angle.sin()
        second = b * angle.cos() + a * angle.sin()
        return torch.cat([first, second], -1)

    for i in range(c.n_layer):
        W = lambda name, i=i: P[f"blocks.{i}.{name}"]
        h = norm(x, W("norm1.weight"))
        if c.token_shift:
            shares, shifted = W("attention.shift.shares"), []
            for j in range(T):
                before = [shares[n - 1] * h[:, j - n] for n in (1, 2, 3) if n <= j]
                shifted.append(h[:, j] + sum(before))
            h = torch.stack(shifted, 1)
        h = h @ W("attention.qkv.weight").T
        if c.qkv_bias:
            h = h + W("attention.qkv.bias")
        heads = h.split(D, -1)
        q, k, v = heads[:H], heads[H : H + Hkv], heads[H + Hkv :]
        out = []
        for j in range(H):
            g = j // (H // Hkv)
            scores = rotate(q[j]) @ rotate(k[g]).mT / D**0.5
            out.append(scores.masked_fill(~dense(f), -torch.inf).softmax(-1) @ v[g])
        x = x + torch.cat(out, -1) @ W("attention.out.weight").T
        gate, up = (norm(x, W("norm2.weight")) @ W("mlp.up.weight").T).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ W("mlp.down.weight").T
    return norm(x, P["norm.weight"]) @ P["head.weight"].T


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MASKS)
@torch.no_grad()
def test_forward_equals_reference(variant, name):
    model, rng = make_model(variant), random.Random(1)
    for _ in range(5):
        tokens, segments = random_dialogue(rng)
        f = MASKS[name](segments)
        expected = reference(model, tokens, f)
        logits = model(tokens, f)
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
        at = torch.randint(0, tokens.shape[1], (3,))
        assert torch.allclose(model(tokens, f, at=at), logits[0, at], atol=1e-3)


def in_pieces(model, tokens, f, cache, rng):
    """The logits of a dialogue that is read into a cache in pieces which no row looks beyond."""
    T = tokens.shape[1]
    ends = [end for end in range(cache.length + 1, T + 1) if f[0, :end].max() <= end]
    ends = sorted({*rng.sample(ends, rng.randint(0, len(ends))), T})
    logits = []
    for end in ends:
        start = cache.length
        logits.append(model(tokens[:, start:end], f[:, start:end], cache)[0])
    return torch.cat(logits)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MASKS)
@torch.no_grad()
def test_cache_equals_one_forward(variant, name):
    """Also of a cache that has forgotten all but its start and is filled once more."""
    rng = random.Random(2)
    for seed in range(8):
        model = make_model(variant, seed=seed)
        tokens, segments = random_dialogue(rng)
        f = MASKS[name](segments)
        whole, cache = model(tokens, f)[0], Cache(model.config)
        close = dict(atol=1e-5 * float(whole.abs().max()), rtol=1e-5)
        assert torch.allclose(in_pieces(model, tokens, f, cache, rng), whole, **close)
        places = [p for p in range(tokens.shape[1]) if p == 0 or f[0, :p].max() <= p]
        cache.length = kept = rng.choice(places)
        assert torch.allclose(in_pieces(model, tokens, f, cache, rng), whole[kept:], **close)


@pytest.mark.parametrize("variant", ["gpt", "shift"])
@pytest.mark.parametrize("name", MASKS)
@torch.no_grad()
def test_no_leak(variant, name):
    """Change a token: no logits that are trained, and predict it or one before it, may move."""
    model, rng = make_model(variant), random.Random(3)
    for _ in range(6):
        tokens, segments = random_dialogue(rng, longest=40)
        f = MASKS[name](segments)
        trained = loss_positions(segments, f, answers_only=False)[0]
        before = model(tokens, f)[0]
        for i in range(1, tokens.shape[1]):
            changed = tokens.clone()
            changed[0, i] = (changed[0, i] + 1) % 50
            moved = (model(changed, f)[0] - before).abs().amax(-1) > 1e-6
            assert not (moved[:i] & trained[:i]).any()


@torch.no_grad()
def test_padding_changes_nothing():
    model, rng = make_model("shift"), random.Random(4)
    tokens, segments = random_dialogue(rng, longest=30)
    n = tokens.shape[1]
    for mask in MASKS.values():
        alone = model(tokens, mask(segments))
        padded = F.pad(segments, (0, 7))
        logits = model(F.pad(tokens, (0, 7)), mask(padded))
        assert torch.isfinite(logits).all()
        assert torch.allclose(logits[:, :n], alone, atol=1e-4)


@torch.no_grad()
def test_the_cheapest_attention_is_chosen():
    """No mask where a row sees all, as a chat's rows under ISM do; is_causal for causal rows."""

    def chosen(f, S):
        attend = fastest_attention(f, S, torch.device("cpu"))
        return attend if attend is sdpa else attend.keywords

    assert chosen(torch.full((1, 5), 12), 12) is sdpa  # a query over a cache of 7
    assert chosen(torch.tensor([[12]]), 12) is sdpa  # a decoded token
    assert chosen(torch.arange(1, 6)[None], 5) == {"causal": True}
    expected = torch.arange(12) < torch.arange(8, 13)[:, None]  # a triangle at the bottom right
    assert torch.equal(chosen(torch.arange(8, 13)[None], 12)["seen"][0, 0], expected)
    with torch.enable_grad():  # short rows in training take the plain attention
        attend = fastest_attention(torch.arange(1, 6)[None], 5, torch.device("cpu"))
        assert not isinstance(attend, functools.partial)


def test_every_attention_gives_the_same():
    """The plain and the fused ones with their gradients, and FlexAttention, for random f."""
    rng = random.Random(0)
    torch.manual_seed(0)
    for number in range(60):
        H, Hkv = rng.choice(((4, 4), (4, 2), (4, 1)))
        n = rng.choice((1, 1, rng.randint(2, 40)))
        S = n + rng.choice((0, rng.randint(0, 30)))
        kind = rng.choice(("random", "causal", "all"))
        f = torch.randint(1, S + 3, (2, n))
        if kind == "causal":
            f = torch.arange(S - n + 1, S + 1).expand(2, n)
        elif kind == "all":
            f = torch.full((2, n), S)
        there = dict(dtype=torch.double, requires_grad=True)
        q, k, v = (torch.randn(2, h, x, 16, **there) for h, x in ((H, n), (Hkv, S), (Hkv, S)))
        expected = exact_attention(q, k, v, f)
        seed = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, (q, k, v), seed)
        with torch.no_grad():  # so that no training is expected, and a fused kernel chosen
            fast = fastest_attention(f, S, q.device)
        for attend in (fastest_attention(f, S, q.device), fast):
            y = attend(q, k, v)
            assert torch.allclose(y, expected)
            assert all(map(torch.allclose, torch.autograd.grad(y, (q, k, v), seed), wanted))
        if number < 20:
            with torch.no_grad():
                y = attend_by_blocks(q.detach(), k.detach(), v.detach(), f, block_mask(f, S, 16),
                                     flex_attention)
            assert torch.allclose(y, expected)


@torch.no_grad()
def test_causal_without_f_over_a_cache():
    model, tokens = make_model("shift"), torch.randint(0, 50, (2, 20))
    cache = Cache(model.config, batch_size=2)
    parts = [model(tokens[:, a:b], cache=cache) for a, b in ((0, 7), (7, 8), (8, 20))]
    assert torch.allclose(torch.cat(parts, 1), model(tokens), atol=1e-4)


def test_cache_is_its_formulas_bytes():
    config = GPTConfig(n_layer=3, n_head=4, n_kv_head=2, n_embd=64, block_size=100)
    cache = Cache(config, batch_size=2, dtype=torch.bfloat16)
    assert cache.k.nbytes + cache.v.nbytes == 2 * 3 * 2 * 2 * 100 * 16 * 2


def test_errors():
    with pytest.raises(ValueError, match="context of 96"):
        make_model()(torch.zeros(1, 97, dtype=torch.long))
    with pytest.raises(ValueError, match="for each token"):  # one row of f would do for both
        make_model()(torch.zeros(2, 5, dtype=torch.long), torch.ones(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="n_embd"):
        GPTConfig(n_embd=130, n_head=4)
    with pytest.raises(ValueError, match="n_kv_head"):
        GPTConfig(n_head=4, n_kv_head=3)


def test_blocks_are_those_of_the_dense_mask():
    """Which blocks FlexAttention takes as full, looks into or leaves out."""
    rng = random.Random(0)
    for _ in range(60):
        n, size = rng.randint(1, 60), rng.choice((8, 16))
        S = n + rng.randint(0, 30)
        f = torch.tensor([[rng.randint(1, S) for _ in range(n)] for _ in range(2)])
        seen = torch.arange(S) < f[..., None]  # (B, n, S)
        found = block_mask(f, S, size)
        for b, r in itertools.product(range(2), range(-(-n // size))):
            part = seen[b, r * size : (r + 1) * size].split(size, 1)
            n_full, n_some = found.full_kv_num_blocks[b, 0, r], found.kv_num_blocks[b, 0, r]
            full = set(found.full_kv_indices[b, 0, r, :n_full].tolist())
            some = set(found.kv_indices[b, 0, r, :n_some].tolist())
            assert not full & some
            # A last column of blocks that is cut off by S may be called "some", even if all of
            # it is seen.
            assert {c for c, x in enumerate(part) if x.any()} == full | some
            assert full <= {c for c, x in enumerate(part) if x.all()} <= full | {len(part) - 1}


@functools.cache
def lesson():
    """What stands above the line of model.py, as a module of its own."""
    return load("model", source("model").split(LINE)[0])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MASKS)
def test_the_lesson_above_the_line_is_the_whole_model(variant, name):
    """The faster ways give its logits and gradients, and with a cache its logits."""
    assert not hasattr(lesson(), "sdpa")
    rng = random.Random(5)
    for seed in range(2):
        model = faster(make_model(variant, 400, seed))
        plain = lesson().GPT(lesson().GPTConfig(**asdict(model.config)))
        plain.load_state_dict(model.state_dict())
        tokens, segments = random_dialogue(rng, 400, turns=rng.choice((4, 40)))
        f = MASKS[name](segments)
        logits, expected = model(tokens, f), plain(tokens, f)
        scale = float(expected.detach().abs().max())
        assert torch.allclose(logits, expected, atol=1e-5 * scale, rtol=0)
        for y in (logits, expected):
            y.square().mean().backward()
        for p, q in zip(model.parameters(), plain.parameters()):
            assert torch.allclose(p.grad, q.grad, atol=1e-4 * float(p.grad.abs().max()), rtol=0)
        with torch.no_grad():
            read = in_pieces(plain, tokens, f, lesson().Cache(plain.config), rng)
        assert torch.allclose(read, expected[0], atol=1e-5 * scale, rtol=0)


def packed_layers(model):
    return [(n, x) for n, x in model.named_modules() if isinstance(x, PackedLinear)]


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_packed_weights_are_off_by_a_step_of_rounding(variant, kind):
    for seed in range(6):
        model = make_model(variant, seed=seed)
        layers = packed_layers(pack(copy.deepcopy(model).bfloat16(), kind))
        kinds = {type(layer) for _, layer in layers}
        # In 4 bits some shapes are not there.
        assert kinds & {*PACKED[kind]} and kinds <= {*PACKED[kind], *PACKED["bfloat16"]}
        for name, layer in layers:
            weight = model.get_submodule(name).weight
            step = weight.abs().max() / 256
            if type(layer) is Int4Linear:  # 15 steps from the least to the largest of 32 neighbours
                groups = weight.view(-1, 32)
                step = 1.2 * (groups.amax(1) - groups.amin(1)).max() / 15
            elif type(layer) is Int8Linear:  # 127 steps to each side of 0
                step = 1.1 * weight.abs().max() / 127
            assert (layer.unpacked() - weight).abs().max() <= step


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_packed_weights_give_the_logits_of_the_rounded_ones(variant, kind):
    """A dialogue at once, and its start at once and the rest token by token."""
    rng = random.Random(0)
    for seed in range(6):
        model = make_model(variant, seed=seed)
        packed = pack(copy.deepcopy(model).bfloat16(), kind)
        for name, layer in packed_layers(packed):
            model.get_submodule(name).weight = torch.nn.Parameter(layer.unpacked())
        model.embed.weight = torch.nn.Parameter(packed.embed.weight.float())
        for p, q in zip(model.parameters(), model.bfloat16().float().parameters()):
            p.data = q.data
        tokens, segments = random_dialogue(rng)
        f = ism(segments)
        cut = rng.randint(1, tokens.shape[1])
        cache = Cache(packed.config)
        read_one = faster(packed).reader(packed, cache)
        parts = [packed(tokens[:, :cut], None, cache)[0]]
        parts += [read_one(int(token))[None] for token in tokens[0, cut:]]
        whole, causal_whole = model(tokens, f), model(tokens)[0]
        assert (packed(tokens, f) - whole).norm() <= 0.02 * whole.norm()
        assert (torch.cat(parts) - causal_whole).norm() <= 0.02 * causal_whole.norm()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_steps_written_out_are_the_model(variant):
    """Token by token behind a start that was read at once: logits and cache of the modules."""
    rng = random.Random(1)
    for seed in range(8):
        model = make_model(variant, 64, seed)
        tokens = torch.tensor([[rng.randrange(50) for _ in range(64)]])
        cut = rng.randint(1, 63)
        cache, expected = Cache(model.config), Cache(model.config)
        for each in (cache, expected):
            model(tokens[:, :cut], None, each)
        read_one = faster(model).reader(model, cache)
        for token in tokens[0, cut:].tolist():
            got, want = read_one(token), model(torch.tensor([[token]]), None, expected)[0, 0]
            assert torch.allclose(got, want, atol=1e-5 * float(want.abs().max()), rtol=1e-5)
        assert torch.allclose(cache.k, expected.k, atol=1e-5)
        assert torch.allclose(cache.v, expected.v, atol=1e-5)


CHANGES = {  # of a layer, as a reader makes them
    "a block": lambda block: setattr(
        block, "forward", lambda x, *given: type(block).forward(block, x, *given).tanh()),
    "an MLP": lambda block: setattr(block.mlp, "forward", lambda x: block.mlp.down(
        block.mlp.up(x).chunk(2, -1)[0].relu())),
    "a norm": lambda block: setattr(block, "norm1", torch.nn.LayerNorm(block.norm1.weight.shape)),
    "attention": lambda block: setattr(block.attention, "forward", lambda x, *given: (
        type(block.attention).forward(block.attention, 2 * x, *given) - x)),
}


@pytest.mark.parametrize("kind", ["float32", *PACKED])
@torch.inference_mode()
def test_a_changed_layer_is_not_written_out(kind):
    """What a reader changes is in the chat too. Packed weights, which are rounded, hide nothing."""
    pairs = itertools.product(VARIANTS.values(), CHANGES.values())
    for seed, (options, change) in enumerate(pairs):
        torch.manual_seed(seed)
        model = GPT(GPTConfig(block_size=32, n_hidden=256, **options)).eval()
        if kind != "float32":
            model = pack(model, kind)
        assert faster(model).reader is Steps
        change(model.blocks[seed % len(model.blocks)])
        assert faster(model).reader is None


def test_a_memory_that_is_full_is_no_change_of_a_layer(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for owner, name in ((Steps, "__init__"), (Steps, "__call__"), (FusedNorm, "forward")):
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(owner, name, full)
            faster(make_model().eval())


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_weights_laid_out_by_columns_are_the_same_numbers(variant):
    rng = random.Random(0)
    for seed in range(6):
        model = make_model(variant, seed=seed)
        tokens, segments = random_dialogue(rng)
        expected, weights = model(tokens, ism(segments)), copy.deepcopy(model.state_dict())
        assert by_columns(model).head.weight.stride() == (1, model.config.vocab_size)
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, weights[name])
        assert torch.allclose(model(tokens, ism(segments)), expected, atol=1e-4)
        assert faster(model).reader is Steps


@torch.inference_mode()
def test_each_way_to_pack_is_right_for_any_width_or_refused():
    """In int8 torch reads beyond the rows if a width is no multiple of 16; that is never called."""
    rng, taken = random.Random(0), collections.Counter()
    widths = [*range(1, 40), 64, 100, 172, 200, 256, *(rng.randrange(40, 999) for _ in range(9))]
    for width, out in itertools.product(widths, (1, 29, 96, 514)):
        linear, x = torch.nn.Linear(width, out, bias=False), torch.randn(1, width)
        for way in {*AUTO, Int8Linear, Int4Linear}:
            layers = model_module.packed([linear], way, torch.float32, x)
            assert layers or way in (Int8Linear, Int4Linear)
            taken[way] += len(layers)
            for layer in layers:
                error = (layer(x) - F.linear(x, layer.unpacked())).norm()
                size = F.linear(x.abs(), layer.unpacked().abs()).norm() / width**0.5
                assert error <= 0.02 * size
    assert taken[Int8Linear] >= 16 and taken[Int4Linear] >= 3


def test_the_fastest_way_that_is_right_is_taken(monkeypatch):
    class Slow(PackedLinear):
        def row(self, x):
            time.sleep(0.001)
            return super().row(x)

    class Wrong(PackedLinear):
        def row(self, x):
            return 1.1 * super().row(x)

    linears = [torch.nn.Linear(64, 64) for _ in range(3)]
    for ways in itertools.permutations((Slow, Wrong, PackedLinear)):
        assert fastest(linears, ways, torch.float32) is PackedLinear
    assert fastest(linears, (Wrong,), torch.float32) is None


def test_without_torchs_private_operators_the_weights_are_bfloat16(monkeypatch, capsys):
    """A later torch may not have them: the chat goes on, with more bytes."""

    def gone(*_):
        raise AttributeError("no such operator")

    monkeypatch.setattr(Int8Linear, "row", gone)
    monkeypatch.setattr(Int4Linear, "pack", gone)
    for kind in ("int8", "int4"):
        packed = pack(make_model().bfloat16(), kind)
        kinds = {type(layer) for _, layer in packed_layers(packed)}
        assert kinds <= {*PACKED["bfloat16"]}
        assert f"in {kind}: they are in bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_replayed_steps_are_the_full_forward(variant):
    """The steps that a CUDA graph captures, run without a graph.

    Contexts below and above the smallest graph's.
    """
    rng = random.Random(0)
    for seed, block_size in enumerate((40, 96, 200, 600)):
        model = make_model(variant, block_size, seed)
        tokens, segments = random_dialogue(rng, block_size, turns=block_size // 8)
        f = ism(segments)
        got, whole = decoded(model, tokens, f), model(tokens, f)[0]
        assert torch.allclose(got, whole, atol=1e-5 * float(whole.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("reader", [Steps, Replay])
@torch.no_grad()
def test_a_reader_refuses_a_full_cache(reader):
    model = make_model(block_size=4)
    read_one = reader(model, Cache(model.config))
    for token in range(4):
        read_one(token)
    with pytest.raises(ValueError, match="context of 4"):
        read_one(0)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype, tolerance", [
    (torch.bfloat16, 1e-2), (torch.float16, 1e-2), (torch.float32, 1e-5),
])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("Hkv", [8, 2])
@pytest.mark.parametrize("T", [320, 1200])  # by SDPA and by FlexAttention
def test_cuda_attention_is_fused_and_right(dtype, tolerance, name, Hkv, T):
    """Forward and backward with only the fused kernels allowed.

    Against float64 on the same rounded inputs.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    H, D = 8, 64
    f = MASKS[name]((torch.arange(T) // 23 + 1)[None].expand(2, T))
    attend = fastest_attention(f, T, torch.device("cuda"))
    assert (attend.func is attend_by_blocks) == (name != "causal" and T >= FLEX_FROM)
    there = dict(device="cuda", dtype=dtype, requires_grad=True)
    q, k, v = (torch.randn(2, h, T, D, **there) for h in (H, Hkv, Hkv))
    fused = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")
    with sdpa_kernel([getattr(SDPBackend, name) for name in fused]):
        out = attend(q, k, v)
        seed = torch.randn_like(out)
        grads = torch.autograd.grad(out, (q, k, v), seed)
    Q, K, V = (x.detach().double().requires_grad_() for x in (q, k, v))
    expected = exact_attention(Q, K, V, f.cuda())
    wanted = torch.autograd.grad(expected, (Q, K, V), seed.double())
    for got, want in zip((out, *grads), (expected, *wanted)):
        assert (got.double() - want).norm() / want.norm() < tolerance


@pytest.mark.cuda
def test_cuda_long_rows_need_no_square_of_their_length():
    """32,768 tokens, one row, forward and backward: a mask of T x T alone would be 1 GiB."""
    T = 32768
    f = ism((torch.arange(T) // 300 + 1)[None])
    there = dict(device="cuda", dtype=torch.bfloat16, requires_grad=True)
    q, k, v = (torch.randn(1, 4, T, 64, **there) for _ in range(3))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = fastest_attention(f, T, q.device)(q, k, v)
    out.backward(torch.randn_like(out))
    assert torch.cuda.max_memory_allocated() - before < 16 * q.nbytes < T * T


@pytest.mark.cuda
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_cuda_graphs_are_the_full_forward(variant):
    rng = random.Random(0)
    for seed in range(3):
        model = make_model(variant, 300, seed=seed).cuda().bfloat16()
        tokens, segments = random_dialogue(rng, 300, turns=20)
        tokens, f = tokens.cuda(), ism(segments)
        got, want = decoded(model, tokens, f).double(), model(tokens, f)[0].double()
        exact = model.double()(tokens, f)[0]
        # No further from the truth than rounding takes any path.
        assert (got - exact).norm() < 2 * (want - exact).norm()
