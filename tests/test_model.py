"""The model: equal to a naive reference, no leak, and a cache that changes nothing."""

import collections
import copy
import functools
import itertools
import random
import sys
import time
import types
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from helpers import VARIANTS, decoded, exact_attention, make_model, random_dialogue
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import model as model_module
from mask import MASKS, causal, dense, ism, loss_positions, reusable
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
        assert (model(tokens, f) - expected).abs().max() < 1e-4 * expected.abs().max()


def feed_as_chat_does(model, tokens, segments, mask, feed_end_with_query=False, cache=None):
    """Turn by turn and token by token through the cache.

    Yields (position, logits) where chat reads them. feed_end_with_query is a mistake: the last
    token of an answer goes in together with the next query.
    """
    cache, old = cache or Cache(model.config), torch.zeros(1, 0, dtype=torch.long)
    row, T, position = segments[0].tolist(), segments.shape[1], 0
    while position < T:
        end = position + 1
        if row[position] % 2 == 1:  # a query goes in at once, an answer token by token
            while end < T and row[end] == row[position]:
                end += 1
        elif feed_end_with_query and end < T and row[end] % 2 == 1:
            while end < T and row[end] == row[position + 1]:
                end += 1
        f = mask(segments[:, :end])
        cache.length = keep = min(cache.length, reusable(old, f))
        rows = f[:, keep:end]
        if feed_end_with_query:
            rows = torch.full((1, end - keep), end)
        yield end - 1, model(tokens[:, keep:end], rows, cache)[:, -1]
        position, old = end, f


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MASKS)
@torch.no_grad()
def test_cache_equals_one_forward(variant, name):
    rng = random.Random(2)
    for seed in range(8):
        model = make_model(variant, seed=seed)
        tokens, segments = random_dialogue(rng)
        for position, logits in feed_as_chat_does(model, tokens, segments, MASKS[name]):
            # Of a prefix mask each answer has its own f, that of the dialogue up to there.
            upto = segments[:, : position + 1]
            whole = model(tokens[:, : position + 1], MASKS[name](upto))[:, -1]
            assert torch.allclose(logits, whole, atol=1e-5 * float(whole.abs().max()), rtol=1e-5)
            if name != "prefix":
                full = model(tokens, MASKS[name](segments))[:, position]
                assert torch.allclose(logits, full, atol=1e-5 * float(full.abs().max()), rtol=1e-5)


@torch.no_grad()
def test_end_of_answer_fed_with_the_next_query_is_wrong():
    """The closing <|end|> must be fed alone.

    In one unmasked call with the next query it sees that query.
    """
    model, tokens = make_model(), torch.randint(0, 50, (1, 14))
    segments = torch.tensor([[1] * 4 + [2] * 4 + [3] * 4 + [4] * 2])
    full = model(tokens, ism(segments))
    right = dict(feed_as_chat_does(model, tokens, segments, ism))
    wrong = dict(feed_as_chat_does(model, tokens, segments, ism, feed_end_with_query=True))
    scale = full.abs().max()
    assert (right[13] - full[:, 13]).abs().max() < 1e-5 * scale
    assert (wrong[13] - full[:, 13]).abs().max() > 1e-3 * scale


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
def test_one_layer_answers_are_the_same_under_ism_and_causal():
    """What a query token has seen can matter only from the second layer on."""
    tokens, segments = random_dialogue(random.Random(5))
    trained = loss_positions(segments, ism(segments)).flatten().nonzero()[:, 0]
    difference = {}
    for n_layer in (1, 2):
        model = make_model(n_layer=n_layer)
        a, b = model(tokens, ism(segments), at=trained), model(tokens, causal(segments), at=trained)
        difference[n_layer] = float((a - b).abs().max())
    assert difference[1] < 1e-4 < 1e-2 < difference[2]


@torch.no_grad()
def test_the_cheapest_attention_is_chosen():
    """Under ISM no mask for a query over a cache, nor for a decoded token.

    is_causal for causal rows, else a mask.
    """

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
    """The plain attention, the one that is chosen, and FlexAttention give the same for random f.

    The result and its gradients; of FlexAttention the result alone.
    """
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
        q = torch.randn(2, H, n, 8, dtype=torch.double, requires_grad=True)
        k, v = (torch.randn(2, Hkv, S, 8, dtype=torch.double, requires_grad=True) for _ in range(2))
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
            blocks = block_mask(f, S, 16)
            with torch.no_grad():
                q, k, v = q.detach(), k.detach(), v.detach()
                y = flex_attention(q, k, v, block_mask=blocks, enable_gqa=H > Hkv)
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
    with pytest.raises(ValueError, match="n_embd"):
        GPTConfig(n_embd=130, n_head=4)
    with pytest.raises(ValueError, match="n_kv_head"):
        GPTConfig(n_head=4, n_kv_head=3)


@pytest.mark.parametrize("f, words", [
    (torch.ones(2, 5, dtype=torch.bool), "integers"),
    (torch.ones(2, 5), "integers"),
    (torch.ones(5, dtype=torch.long), "for each token"),
    (torch.ones(1, 5, dtype=torch.long), "for each token"),
    (torch.tensor([[1, 2, 0, 4, 5], [1, 2, 3, 4, 5]]), "at least one"),
])
def test_an_f_that_is_none_is_one_line(f, words):
    with pytest.raises(ValueError, match=words) as error:
        make_model()(torch.zeros(2, 5, dtype=torch.long), f)
    assert "\n" not in str(error.value)


def test_blocks_are_those_of_the_dense_mask():
    """Which blocks of FlexAttention's are full, looked into or left out, against the mask itself.

    And what it gives with them.
    """
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
        q, k, v = torch.randn(2, 2, n, 16), torch.randn(2, 2, S, 16), torch.randn(2, 2, S, 16)
        expected = F.scaled_dot_product_attention(q, k, v, seen[:, None])
        assert torch.allclose(flex_attention(q, k, v, block_mask=found), expected, atol=1e-5)


LINE = "# ==== below this line"


@functools.cache
def lesson():
    """model.py cut at the line: a module of what stands above it alone."""
    above, below = (ROOT / "model.py").read_text(encoding="utf-8").split(LINE)
    module = types.ModuleType("lesson")
    sys.modules["lesson"] = module  # where dataclasses look for themselves
    exec(compile(above, "lesson", "exec"), module.__dict__)
    assert "def sdpa" in below and not hasattr(module, "sdpa")
    return module


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MASKS)
def test_the_lesson_above_the_line_is_the_whole_model(variant, name):
    """The same logits and gradients in one forward, and the same logits from the cache."""
    plain, rng = lesson(), random.Random(5)
    for seed in range(2):
        model = make_model(variant, 400, seed)
        twin = plain.GPT(plain.GPTConfig(**asdict(model.config)))
        twin.load_state_dict(model.state_dict())
        tokens, segments = random_dialogue(rng, 400, turns=rng.choice((4, 40)))
        f = MASKS[name](segments)
        with torch.no_grad():
            expected = model(tokens, f)
            scale = float(expected.abs().max())
            assert torch.allclose(twin(tokens, f), expected, atol=1e-5 * scale, rtol=0)
            given, cache = (tokens, segments, MASKS[name]), plain.Cache(twin.config)
            ours = feed_as_chat_does(model, *given)
            theirs = feed_as_chat_does(twin, *given, cache=cache)
            for (_, a), (_, b) in zip(ours, theirs):
                assert torch.allclose(a, b, atol=1e-5 * scale, rtol=0)
        for each in (model, twin):
            each(tokens, f).square().mean().backward()
        for p, q in zip(model.parameters(), twin.parameters()):
            assert torch.allclose(p.grad, q.grad, atol=1e-4 * float(p.grad.abs().max()), rtol=0)


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
            step = 2**-8 * float(weight.abs().max())
            if type(layer) is Int4Linear:
                step = 1.2 * linear_step(weight, 7.5, 32)
            elif type(layer) is Int8Linear:
                step = 1.1 * linear_step(weight, 127, weight.shape[1])
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


def linear_step(weight, levels, group):
    """The largest rounding error of weights in groups of neighbours.

    A group has `levels` steps to each side of its middle, which is 0 where there are many.
    """
    groups = weight.view(-1, group)
    if levels < 8:
        reach = (groups.amax(1) - groups.amin(1)) / 2
    else:
        reach = groups.abs().amax(1)
    return float(reach.max()) / levels


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
        with pytest.raises(ValueError, match="context of 64"):
            read_one(0)


CHANGES = {  # of a layer, as a reader makes them
    "a block": lambda block: setattr(
        block, "forward", lambda x, *given: type(block).forward(block, x, *given).tanh()),
    "an MLP": lambda block: setattr(block.mlp, "forward", lambda x: block.mlp.down(
        block.mlp.up(x).chunk(2, -1)[0].relu())),
    "a norm": lambda block: setattr(block, "norm1", torch.nn.LayerNorm(block.norm1.weight.shape)),
    "attention": lambda block: setattr(block.attention, "forward", lambda x, *given: (
        type(block.attention).forward(block.attention, 2 * x, *given) - x)),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("change", CHANGES)
@torch.inference_mode()
def test_a_changed_layer_is_not_written_out(variant, change):
    """A reader's change is in the chat too: what knows the layers by heart stands back."""
    for seed in range(3):
        model = make_model(variant, 64, seed)
        assert faster(model).reader is Steps
        CHANGES[change](model.blocks[seed % len(model.blocks)])
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


@pytest.mark.parametrize("kind", PACKED)
@torch.inference_mode()
def test_packed_layers_are_written_out_unless_one_was_changed(kind):
    """A number that is rounded the other way is no change of a layer, and hides none."""
    for seed in range(12):
        torch.manual_seed(seed)
        config = GPTConfig(block_size=32, n_hidden=256)
        packed = pack(GPT(config).eval(), kind)
        assert faster(packed).reader is Steps
        CHANGES[list(CHANGES)[seed % len(CHANGES)]](packed.blocks[seed % config.n_layer])
        assert faster(packed).reader is None


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


@torch.no_grad()
def test_replay_refuses_a_full_cache():
    model = make_model(block_size=4)
    replay = Replay(model, Cache(model.config))
    for token in range(4):
        replay(token)
    with pytest.raises(ValueError, match="context of 4"):
        replay(0)


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
