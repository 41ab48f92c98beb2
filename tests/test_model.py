"""The model: equal to a naive reference, no leak, and a cache that changes nothing."""
import copy
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mask import MASKS, causal, dense, ism, loss_positions, reusable
from model import FLEX_FROM, GPT, Cache, Decoder, GPTConfig, Int8Linear, PackedLinear, attention, blocks, pack, visible

VARIANTS = {
    "gpt": dict(n_kv_head=4),
    "llama": dict(n_kv_head=2, tie_embeddings=False, rope_theta=500000.0),
    "qwen": dict(n_kv_head=1, qkv_bias=True),
    "shift": dict(n_kv_head=4, token_shift=True),
}


def make(variant="gpt", block_size=96, seed=0, n_layer=3):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=50, block_size=block_size, n_layer=n_layer, n_head=4, n_embd=32, n_hidden=48, **VARIANTS[variant]))
    for p in model.parameters():  # larger than the initial ones, so that a wrong mask shows
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def dialogue(rng, longest=96, turns=4):
    """Random (tokens (1, T), segments (1, T)), which may start with an answer and end in a query."""
    number, row = rng.randint(0, 1), []
    for _ in range(rng.randint(1, 2 * turns)):
        number += 1
        row += [number] * rng.randint(1, 9)
    segments = torch.tensor([row[:longest]])
    return torch.tensor([[rng.randrange(50) for _ in range(segments.shape[1])]]), segments


def reference(model, tokens, f):
    """The same model in float64, a loop over heads and a dense mask, no library attention."""
    c, P = model.config, {name: p.double() for name, p in model.state_dict().items()}
    x = P["embed.weight"][tokens]
    norm = lambda x, w: x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * w
    D, T = c.head_size, tokens.shape[1]
    angle = torch.arange(T).double()[:, None] / c.rope_theta ** (torch.arange(0, D, 2).double() / D)
    rotate = lambda h: torch.cat([h[..., : D // 2] * angle.cos() - h[..., D // 2 :] * angle.sin(),
                                  h[..., D // 2 :] * angle.cos() + h[..., : D // 2] * angle.sin()], -1)
    for i in range(c.n_layer):
        W = lambda name: P[f"blocks.{i}.{name}"]
        h = norm(x, W("norm1.weight"))
        if c.token_shift:
            shares = W("attention.shares")
            h = torch.stack([h[:, j] + sum(shares[i - 1] * h[:, j - i] for i in (1, 2, 3) if j >= i) for j in range(T)], 1)
        h = h @ W("attention.qkv.weight").T + (W("attention.qkv.bias") if c.qkv_bias else 0)
        heads = h.split(D, -1)
        q, k, v = heads[: c.n_head], heads[c.n_head : c.n_head + c.n_kv_head], heads[c.n_head + c.n_kv_head :]
        out = []
        for j in range(c.n_head):
            g = j // (c.n_head // c.n_kv_head)
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
    model, rng = make(variant), random.Random(1)
    for _ in range(5):
        tokens, segments = dialogue(rng)
        f = MASKS[name](segments)
        expected = reference(model, tokens, f)
        assert (model(tokens, f) - expected).abs().max() < 1e-4 * expected.abs().max()


def feed_as_chat_does(model, tokens, segments, mask, feed_end_with_query=False):
    """Turn by turn and token by token through the cache; yields (position, logits) where chat reads them."""
    cache, old = Cache(model.config), torch.zeros(1, 0, dtype=torch.long)
    row, T, position = segments[0].tolist(), segments.shape[1], 0
    while position < T:
        end = position + 1
        if row[position] % 2 == 1:  # a query goes in at once, an answer token by token
            while end < T and row[end] == row[position]:
                end += 1
        elif feed_end_with_query and end < T and row[end] % 2 == 1:  # the mistake: the last token of the answer too
            while end < T and row[end] == row[position + 1]:
                end += 1
        f = mask(segments[:, :end])
        cache.length = keep = min(cache.length, reusable(old, f))
        rows = f[:, keep:end] if not feed_end_with_query else torch.full((1, end - keep), end)
        yield end - 1, model(tokens[:, keep:end], rows, cache)[:, -1]
        position, old = end, f


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MASKS)
@torch.no_grad()
def test_cache_equals_one_forward(variant, name):
    rng = random.Random(2)
    for seed in range(8):
        model = make(variant, seed=seed)
        tokens, segments = dialogue(rng)
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
    """The closing <|end|> must be fed alone: in one unmasked call with the next query it sees that query."""
    model, tokens = make(), torch.randint(0, 50, (1, 14))
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
    """Change a token: no logits that are trained to predict it, or that come before it, may move."""
    model, rng = make(variant), random.Random(3)
    for _ in range(6):
        tokens, segments = dialogue(rng, longest=40)
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
    model, rng = make("shift"), random.Random(4)
    tokens, segments = dialogue(rng, longest=30)
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
    tokens, segments = dialogue(random.Random(5))
    trained = loss_positions(segments, ism(segments)).flatten().nonzero()[:, 0]
    difference = {}
    for n_layer in (1, 2):
        model = make(n_layer=n_layer)
        a, b = model(tokens, ism(segments), at=trained), model(tokens, causal(segments), at=trained)
        difference[n_layer] = float((a - b).abs().max())
    assert difference[1] < 1e-4 < 1e-2 < difference[2]


@torch.no_grad()
def test_visible_takes_the_cheapest_path():
    """No mask for a query over a cache or a decoded token under ISM, is_causal for a causal row, else a mask."""
    assert visible(torch.full((1, 5), 12), 5, 12) is None  # a query over a cache of 7
    assert visible(torch.tensor([[12]]), 1, 12) is None  # a decoded token
    assert visible(None, 1, 12) is None
    assert visible(torch.arange(1, 6)[None], 5, 5) == visible(None, 5, 5) == "causal"
    expected = torch.arange(12) < torch.arange(8, 13)[:, None]  # a triangle at the bottom right
    assert torch.equal(visible(None, 5, 12)[0, 0], expected)
    assert torch.equal(visible(torch.arange(8, 13)[None], 5, 12)[0, 0], expected)


@torch.no_grad()
def test_causal_without_f_over_a_cache():
    model, tokens = make("shift"), torch.randint(0, 50, (2, 20))
    cache = Cache(model.config, batch_size=2)
    parts = [model(tokens[:, a:b], cache=cache) for a, b in ((0, 7), (7, 8), (8, 20))]
    assert torch.allclose(torch.cat(parts, 1), model(tokens), atol=1e-4)


def test_attention_with_gradients_equals_sdpa():
    """The path for short rows in training gives what the library gives, and the same gradients."""
    torch.manual_seed(0)
    for H, Hkv, T in ((4, 4, 33), (4, 2, 20)):
        segments = (torch.arange(T) // 4 + 1)[None]
        mask = visible(ism(segments), T, T)
        q, k, v = (torch.randn(2, h, T, 8, dtype=torch.double, requires_grad=True) for h in (H, Hkv, Hkv))
        ours = attention(q, k, v, mask)
        theirs = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        assert torch.allclose(ours, theirs)
        seed = torch.randn_like(ours)
        for a, b in zip(torch.autograd.grad(ours, (q, k, v), seed), torch.autograd.grad(theirs, (q, k, v), seed)):
            assert torch.allclose(a, b)


def test_cache_is_its_formulas_bytes():
    config = GPTConfig(n_layer=3, n_head=4, n_kv_head=2, n_embd=64, block_size=100)
    cache = Cache(config, batch_size=2, dtype=torch.bfloat16)
    assert cache.k.nbytes + cache.v.nbytes == 2 * 3 * 2 * 2 * 100 * 16 * 2


def test_errors():
    with pytest.raises(ValueError, match="context of 96"):
        make()(torch.zeros(1, 97, dtype=torch.long))
    with pytest.raises(ValueError, match="n_embd"):
        GPTConfig(n_embd=130, n_head=4)
    with pytest.raises(ValueError, match="n_kv_head"):
        GPTConfig(n_head=4, n_kv_head=3)


def test_blocks_are_those_of_the_dense_mask():
    """Which blocks of FlexAttention's are full, looked into or left out, against the mask itself; and its result."""
    rng = random.Random(0)
    for _ in range(60):
        n, size, S = rng.randint(1, 60), rng.choice((8, 16)), 0
        S = n + rng.randint(0, 30)
        f = torch.tensor([[rng.randint(1, S) for _ in range(n)] for _ in range(2)])
        seen = torch.arange(S) < f[..., None]  # (B, n, S)
        found = blocks(f, S, size)
        for b, r in itertools.product(range(2), range(-(-n // size))):
            part = [seen[b, r * size : (r + 1) * size, c * size : (c + 1) * size] for c in range(-(-S // size))]
            full = set(found.full_kv_indices[b, 0, r, : found.full_kv_num_blocks[b, 0, r]].tolist())
            some = set(found.kv_indices[b, 0, r, : found.kv_num_blocks[b, 0, r]].tolist())
            assert not full & some
            # A last column of blocks that is cut off by S may be called "some" though all of it is seen.
            assert {c for c, x in enumerate(part) if x.any()} == full | some
            assert full <= {c for c, x in enumerate(part) if x.all()} <= full | {len(part) - 1}
        q, k, v = torch.randn(2, 2, n, 16), torch.randn(2, 2, S, 16), torch.randn(2, 2, S, 16)
        expected = F.scaled_dot_product_attention(q, k, v, seen[:, None])
        assert torch.allclose(flex_attention(q, k, v, block_mask=found), expected, atol=1e-5)


def by_parts(model, tokens, segments, cut):
    """Logits of a whole dialogue at once, and of its start at once and the rest token by token."""
    cache = Cache(model.config, dtype=model.embed.weight.dtype)
    with torch.inference_mode():
        parts = [model(part, None, cache) for part in (tokens[:, :cut], *tokens[:, cut:].split(1, 1)) if part.numel()]
        return torch.cat([model(tokens, ism(segments)), *parts], 1).float()


BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize("int8", (pytest.param(False, marks=pytest.mark.skipif(not BFLOAT16, reason="a CPU without bfloat16")), True))
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_weights_give_the_same_logits(variant, int8):
    rng = random.Random(0)
    assert isinstance(pack(make(variant)).head, torch.nn.Linear)  # float32 stays as it is
    for seed in range(10):
        model = make(variant, seed=seed).bfloat16()
        packed = pack(copy.deepcopy(model), int8)
        for name, linear in packed.named_modules():
            if int8 and isinstance(linear, Int8Linear):  # the same rounded weights in the model itself
                original = model.get_submodule(name)
                rounded = linear.weight * linear.scale[:, None].float()
                assert (rounded - original.weight.float()).abs().max() <= linear.scale.max()
                original.weight = torch.nn.Parameter(rounded.bfloat16())
        kind = Int8Linear if int8 else PackedLinear
        assert isinstance(packed.head, kind) and isinstance(packed.blocks[1].attention.qkv, kind)
        tokens, segments = dialogue(rng)
        cut = rng.randint(0, tokens.shape[1] - 1)
        expected, found = (by_parts(each, tokens, segments, cut) for each in (model, packed))
        assert (found - expected).norm() <= 0.03 * expected.norm()


def exact_attention(q, k, v, f):
    """In float64, without a library: (B, H, n, D)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT / q.shape[3] ** 0.5).masked_fill(~dense(f)[:, None], -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.cuda
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 1e-2), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("Hkv", [8, 2])
@pytest.mark.parametrize("T", [320, 1200])  # by SDPA and by FlexAttention
def test_cuda_attention_is_fused_and_right(dtype, tolerance, name, Hkv, T):
    """Forward and backward with only the fused kernels allowed, against float64 on the same rounded inputs."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    H, D = 8, 64
    f = MASKS[name]((torch.arange(T) // 23 + 1)[None].expand(2, T))
    mask = visible(f, T, T, "cuda")
    assert isinstance(mask, BlockMask) == (name != "causal" and T >= FLEX_FROM)
    q, k, v = (torch.randn(2, h, T, D, device="cuda", dtype=dtype, requires_grad=True) for h in (H, Hkv, Hkv))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        out = attention(q, k, v, mask)
        seed = torch.randn_like(out)
        grads = torch.autograd.grad(out, (q, k, v), seed)
    Q, K, V = (x.detach().double().requires_grad_() for x in (q, k, v))
    expected = exact_attention(Q, K, V, f.cuda())
    for got, want in zip((out, *grads), (expected, *torch.autograd.grad(expected, (Q, K, V), seed.double()))):
        assert (got.double() - want).norm() / want.norm() < tolerance


@pytest.mark.cuda
def test_cuda_long_rows_need_no_square_of_their_length():
    """32,768 tokens, one row, forward and backward: a mask of T x T alone would be 1 GiB."""
    T = 32768
    f = ism((torch.arange(T) // 300 + 1)[None])
    q, k, v = (torch.randn(1, 4, T, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attention(q, k, v, visible(f, T, T, "cuda"))
    out.backward(torch.randn_like(out))
    assert torch.cuda.max_memory_allocated() - before < 16 * q.nbytes < T * T


@pytest.mark.cuda
@pytest.mark.parametrize("variant", VARIANTS)
def test_cuda_decoder_is_the_full_forward(variant):
    """A dialogue whose answers are decoded by graph replays gives the logits of one forward over all of it."""
    rng = random.Random(0)
    for seed in range(3):
        model = make(variant, seed=seed).cuda().bfloat16()
        tokens, segments = dialogue(rng)
        tokens, f = tokens.cuda(), ism(segments)
        cache = Cache(model.config, device="cuda", dtype=torch.bfloat16)
        decoder = Decoder(model, cache)
        parts, T = [], tokens.shape[1]
        with torch.no_grad():
            while cache.length < T:
                start, end = cache.length, int(f[0, cache.length])
                if end == start + 1:
                    parts.append(decoder(int(tokens[0, start]))[None].clone())
                else:
                    parts.append(model(tokens[:, start:end], f[:, start:end], cache)[0])
            got, want = torch.cat(parts).double(), model(tokens, f)[0].double()
            exact = model.double()(tokens, f)[0]
        assert (got - exact).norm() < 2 * (want - exact).norm()  # no further from the truth than rounding takes any path


@pytest.mark.cuda
def test_cuda_decoder_refuses_a_full_cache():
    model = make(block_size=4).cuda().bfloat16()
    decoder = Decoder(model, Cache(model.config, device="cuda", dtype=torch.bfloat16))
    for token in range(4):
        decoder(token)
    with pytest.raises(ValueError, match="context of 4"):
        decoder(0)
