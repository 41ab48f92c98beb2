"""
A decoder-only transformer with a pluggable attention mask and a KV cache, in one file.

Notable features:
- the mask is a vector f (see mask.py): row j may attend to the first f[j] tokens
- RMSNorm, rotary positions, SwiGLU, grouped-query attention, optional biases, norms on queries
  and keys, tied embeddings, token shift: by its config alone the same class is a GPT, a LLaMA or a
  Qwen (data/hf/ loads their weights)
- nothing here knows about text or dialogues

The letters in the shapes: B dialogues, n new tokens, S tokens in all, C = n_embd, H heads (Hkv of
keys and values) of D numbers each, V tokens in the vocabulary.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from mask import check, dense


@dataclass
class GPTConfig:
    """The sizes and options of a GPT. ValueError if they do not fit together."""

    vocab_size: int = 1280
    block_size: int = 256  # the longest context, in tokens
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 4  # fewer than n_head is grouped-query attention
    n_embd: int = 128
    n_hidden: int = 384  # width of the SwiGLU
    head_size: int = 0  # 0 is n_embd / n_head
    rope_theta: float = 10000.0
    # LLaMA 3.1: (factor, low frequency factor, high frequency factor, original context)
    rope_scaling: tuple = ()
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm on each query and key head before the rotation, as in Qwen3
    tie_embeddings: bool = True
    token_shift: bool = False  # see TokenShift; off in LLaMA and Qwen

    def __post_init__(self):
        C, H, Hkv = self.n_embd, self.n_head, self.n_kv_head
        if self.head_size == 0 and C % H == 0:
            self.head_size = C // H
        if self.head_size == 0 or self.head_size % 2:
            raise ValueError(f"n_embd ({C}) must be n_head ({H}) times an even head size")
        if H % Hkv:
            raise ValueError(f"n_head ({H}) must be a multiple of n_kv_head ({Hkv})")


def attention(q, k, v, bias):
    """Scaled dot-product attention: each row mixes the values of the keys that it sees.

    q (B, H, n, D), k and v (B, Hkv, S, D), bias (B, 1, n, S): 0 where a row sees a key, -inf where
    not -> (B, H, n, D).
    """
    # With grouped queries several heads share the same keys and values.
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k = k.repeat_interleave(groups, 1)  # (B, H, S, D)
        v = v.repeat_interleave(groups, 1)  # (B, H, S, D)
    q = q / q.shape[-1] ** 0.5
    # A score of -inf becomes a weight of 0.
    scores = q @ k.mT + bias.to(q.dtype)  # (B, H, n, S)
    weights = scores.softmax(-1)  # (B, H, n, S)
    return weights @ v  # (B, H, n, D)


def choose_attention(f, S, device):
    """How n rows with bounds f (B, n) look at S keys: a function of (q, k, v) for all layers.

    This is the plain way. Below the line stands one that chooses the fastest among equals.
    """
    hidden = ~dense(f, S)  # (B, n, S)
    bias = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
    bias = bias[:, None].to(device)  # (B, 1, n, S)
    return lambda q, k, v: attention(q, k, v, bias)


def rope_tables(config):
    """The rotation of each position, cos and sin of its angles: two tensors (block_size, 1, D).

    Pair i of a head turns by theta^(-2i / D) a token: fast for the first pairs, slowly for the last
    (RoPE, Su et al., 2021, section 3.2).
    """
    D = config.head_size
    frequency = config.rope_theta ** (-torch.arange(0, D, 2) / D)  # (D / 2,)
    if config.rope_scaling:
        # A longer context: pairs that make many turns in the original one stay, those of few turns
        # are slowed down by the factor, and between them it is blended (LLaMA 3.1's model card).
        factor, low, high, original = config.rope_scaling
        turns = original * frequency / (2 * torch.pi)  # (D / 2,)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / factor)
    angles = torch.arange(config.block_size)[:, None] * frequency  # (block_size, D / 2)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # (block_size, 1, D / 2) each
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x, rotation):
    """Turn each pair (a, b) of a head by its position's angle: (a cos - b sin, b cos + a sin).

    x (B, n, H, D); a is in the first half of a head, its b in the second. Scores of rotated queries
    and keys depend on how far apart two tokens stand.
    """
    cos, sin = (table.to(x.dtype) for table in rotation)  # (n, 1, D) each, sin with its sign
    swapped = x.roll(x.shape[-1] // 2, -1)  # (b, a)
    return torch.addcmul(x * cos, swapped, sin)  # x cos + swapped sin, in one pass


class Cache:
    """Keys and values of the tokens so far: 2 * n_layer * B * Hkv * block_size * D numbers.

    With token shift also what each attention was given, n_layer * B * (block_size + 3) * C numbers.
    To forget all but the first p tokens, set `length` to p.
    """

    def __init__(self, config, batch_size=1, device=None, dtype=None):
        L, S, C = config.n_layer, config.block_size, config.n_embd
        shape = (L, batch_size, config.n_kv_head, S, config.head_size)
        self.k = torch.empty(shape, device=device, dtype=dtype)  # (L, B, Hkv, S, D)
        self.v = torch.empty_like(self.k)
        slots = S + TokenShift.REACH if config.token_shift else 0
        self.x = torch.zeros(L, batch_size, slots, C, device=device, dtype=dtype)
        self.length = 0


class LayerCache:
    """One layer's part of a Cache while n tokens are read, at their places (n,) of `end` in all."""

    def __init__(self, cache, layer, places, end):
        self.k, self.v, self.x = cache.k[layer], cache.v[layer], cache.x[layer]
        self.places, self.end = places, end

    def add(self, k, v):
        """Keys and values of the new tokens (B, Hkv, n, D) -> those of all (B, Hkv, end, D)."""
        self.k.index_copy_(2, self.places, k)
        self.v.index_copy_(2, self.places, v)
        return self.k[:, :, : self.end], self.v[:, :, : self.end]  # views: nothing is copied

    def add_inputs(self, x):
        """The new tokens' inputs (B, n, C) -> these behind the three before them (B, n + 3, C)."""
        n, reach = x.shape[1], TokenShift.REACH
        self.x.index_copy_(1, self.places + reach, x)
        known = self.places[0] + torch.arange(n + reach, device=x.device)  # (n + 3,)
        return self.x.index_select(1, known)


class RMSNorm(nn.Module):
    """x (..., C) over the root of its mean square, times a weight (Zhang and Sennrich, 2019)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight.to(x.dtype)


class TokenShift(nn.Module):
    """Before attention, adds to each position a learned share of each of the three before it.

    To find "the word after the name" a layer must know what stands before each word; this tells it.
    """

    REACH = 3

    def __init__(self, config):
        super().__init__()
        self.shares = nn.Parameter(torch.empty(self.REACH, config.n_embd))

    def forward(self, x, cache=None):
        n = x.shape[1]
        if cache is None:
            past = F.pad(x, (0, 0, self.REACH, 0))  # (B, n + 3, C) zeros before the first token
        else:
            past = cache.add_inputs(x)  # (B, n + 3, C)
        for back, share in enumerate(self.shares, 1):
            start = self.REACH - back
            x = torch.addcmul(x, past[:, start : start + n], share)  # x + past * share
        return x


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.sizes = config.n_head, config.n_kv_head, config.head_size
        H, Hkv, D = self.sizes
        self.shift = TokenShift(config) if config.token_shift else None
        self.qkv = nn.Linear(config.n_embd, (H + 2 * Hkv) * D, bias=config.qkv_bias)
        self.out = nn.Linear(H * D, config.n_embd, bias=False)
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else None

    def forward(self, x, attend, rotation, cache=None, at=None):
        B, n = x.shape[:2]
        H, Hkv, D = self.sizes
        if self.shift is not None:
            x = self.shift(x, cache)  # (B, n, C)
        qkv = self.qkv(x).view(B, n, H + 2 * Hkv, D)
        q, k, v = qkv.split((H, Hkv, Hkv), 2)  # (B, n, H, D), (B, n, Hkv, D) and again
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rotation), rotate(k, rotation)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, n, D), (B, Hkv, n, D) and again
        if cache is not None:
            k, v = cache.add(k, v)  # (B, Hkv, S, D)
        y = attend(q, k, v)  # (B, H, n, D)
        y = y.transpose(1, 2).reshape(B, n, H * D)
        return self.out(take(y, at))  # (B, n, C) or (N, C)


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020): down(silu(gate) * up), with gate and up in one product."""

    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 2 * config.n_hidden, bias=False)
        self.down = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.up(x).chunk(2, -1)  # (B, n, n_hidden) each
        return self.down(F.silu(gate) * up)  # (B, n, C)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attention = Attention(config)
        self.norm2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, attend, rotation, cache=None, at=None):
        x = take(x, at) + self.attention(self.norm1(x), attend, rotation, cache, at)
        return x + self.mlp(self.norm2(x))  # (B, n, C) or (N, C)


def take(x, at):
    """The rows at (N,) of x (B, n, C), counted through all dialogues: (N, C). None: all of x."""
    return x if at is None else x.flatten(0, 1).index_select(0, at)


class GPT(nn.Module):
    """Token ids in, logits of the next token out."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        table = torch.empty(config.vocab_size, config.n_embd)
        self.embed = nn.Embedding.from_pretrained(table, freeze=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        # What `faster`, below the line, replaces by an equal: the choice of attention, and what
        # reads one token in a chat (None: this same class does).
        self.choose_attention, self.reader = choose_attention, None
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        if not table.is_meta:  # on that device shapes alone are wanted, no numbers
            self.initialize()
            self.cos, self.sin = rope_tables(config)  # (block_size, 1, D) each

    def initialize(self):
        """Draw the weights so that each layer keeps the size of what goes through it."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name == "embed.weight":
                nn.init.normal_(p, std=0.02)
            elif name.endswith("q_norm.weight"):
                # Sharp enough from the start to single out a token among many.
                p.data.mul_(2)
            elif name.endswith("shares"):
                # Random shares keep the positions apart: equal ones of 0.3 left the loss at 0.92
                # after 600 steps, these at 0.73.
                nn.init.normal_(p, std=0.5)
            elif p.dim() == 2 and (p != p[0, 0]).any():
                # (One number everywhere, zeros say, stands there since its layer wants it so.)
                # What writes to the residual stream starts smaller, since the layers add up.
                writes = name.endswith(("out.weight", "down.weight"))
                layers = 2 * self.config.n_layer if writes else 1
                nn.init.normal_(p, std=(p.shape[1] * layers) ** -0.5)

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def forward(self, tokens, f=None, cache=None, at=None):
        """tokens (B, n) -> logits (B, n, V), or (N, V) for the N places `at` in the flattened rows.

        f (B, n) integers, on the CPU: how many leading tokens of the whole context, those in the
        cache included, each new token may see; None is causal. With a cache the tokens stand behind
        those in it, and it grows. ValueError if they do not fit into block_size, or f not to them.
        """
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.config.block_size:
            size = self.config.block_size
            raise ValueError(f"{end} tokens do not fit into the context of {size}")
        if f is None:
            f = torch.arange(start + 1, end + 1).expand(tokens.shape)
        check(f, tokens.shape)
        attend = self.choose_attention(f, end, tokens.device)
        places = torch.arange(start, end, device=tokens.device)  # (n,)
        logits = self.layers(tokens, attend, places, end, cache, at)
        if cache is not None:
            cache.length = end
        return logits

    def layers(self, tokens, attend, places, end, cache=None, at=None):
        """Tokens (B, n) at their places (n,) among `end` in all -> logits, as forward."""
        x = self.embed(tokens)  # (B, n, C)
        rotation = self.cos[places], self.sin[places]  # (n, 1, D) each
        for i, block in enumerate(self.blocks):
            layer = None if cache is None else LayerCache(cache, i, places, end)
            # The last block needs all keys and values, but goes on with the wanted rows alone.
            wanted = at if i == len(self.blocks) - 1 else None
            x = block(x, attend, rotation, layer, wanted)  # (B, n, C), at last maybe (N, C)
        return self.head(self.norm(x))  # (B, n, V) or (N, V)


# ==== below this line: what makes it faster or safer, and changes no result ====
import contextlib
import copy
import functools
import importlib.util
import os
import shutil
import sysconfig
import time
import warnings
from dataclasses import replace

from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint


def sdpa(q, k, v, seen=None, causal=False):
    """The same as `attention` by a fused kernel of PyTorch; without `seen` all is seen."""
    B, H, n, D = q.shape
    groups = H // k.shape[1]
    if n == 1:
        # The heads of a group become rows of one head, so that the cache is not copied for each.
        rows = q.reshape(B, -1, groups, D)  # (B, Hkv, groups, D)
        # Some kernels lay their result out as (B, groups, Hkv, D), so that it is no view.
        return F.scaled_dot_product_attention(rows, k, v, seen).reshape(B, H, 1, D)
    if groups > 1 and (seen is not None or q.is_cuda and q.dtype == torch.float32):
        # No fused kernel takes grouped heads with a mask, nor, on CUDA, in float32.
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)  # (B, H, S, D)
        groups = 1
    return F.scaled_dot_product_attention(q, k, v, seen, is_causal=causal, enable_gqa=groups > 1)


def short(S):
    """Whether training on the CPU over S keys takes the plain attention.

    For short rows the backward of SDPA is slow there: in bfloat16 a step of the default run took
    1.3 times as long with it. In float32 on AVX2 plain attention over 64 keys takes 0.87 times as
    long, over 148 keys 1.07 times, over 256 keys 1.3 times.
    """
    return S <= (256 if torch.is_autocast_enabled("cpu") else 100)


# From so many keys on CUDA a mask is left to FlexAttention. At 1,024 a compiled training step is
# 1.05 times as fast as with a mask given to SDPA, at 4,096 forward and backward of attention alone
# are 1.26 times as fast (H100, bfloat16).
FLEX_FROM = 1024
FLEX_BLOCK = 128  # rows; for fewer it takes another kernel, which does not know all shapes


def fastest_attention(f, S, device, plain=choose_attention):
    """As choose_attention. f is looked at here, on the CPU: a look at a GPU would make it wait."""
    n = f.shape[1]
    # The fused kernels of MPS have had silent faults in just these shapes and views.
    if device.type == "mps" or device.type == "cpu" and torch.is_grad_enabled() and short(S):
        return plain(f, S, device)
    if f.min() >= S:
        # Under ISM so it is in a chat: a query and a token of an answer see the whole cache.
        return sdpa
    if n == S and (f == torch.arange(1, n + 1)).all():
        return functools.partial(sdpa, causal=True)
    f = upload(f, device)
    if device.type == "cuda" and S >= FLEX_FROM and n >= FLEX_BLOCK and has_triton():
        flex = compiled_flex()
        return functools.partial(attend_by_blocks, f=f, mask=block_mask(f, S), flex=flex)
    seen = torch.arange(S, device=device) < f[:, :, None]  # (B, n, S)
    return functools.partial(sdpa, seen=seen[:, None])


def upload(x, device):
    """A tensor of the CPU on a device, without a wait for what that has still to do."""
    if device.type == "cuda":
        x = x.pin_memory()  # from elsewhere more than 64 KB are waited for
    # MPS would go on with a tensor that is gone before it is copied.
    return x.to(device, non_blocking=device.type != "mps")


def normalize(x, eps):
    """x over the root of its mean square, and what x was multiplied by (..., 1), in float32."""
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # (..., 1)
    scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).to(x.dtype), scale


class NormFunction(torch.autograd.Function):
    """RMSNorm with its gradient written out: on a CPU it takes half of the time."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        normal, scale = normalize(x, eps)
        ctx.save_for_backward(normal, scale, weight)
        return normal * weight

    @staticmethod
    def backward(ctx, dy):
        normal, scale, weight = ctx.saved_tensors
        dweight = (dy * normal).sum(tuple(range(dy.dim() - weight.dim())))
        dy = dy * weight
        along = torch.linalg.vecdot(dy, normal).unsqueeze(-1) / dy.shape[-1]  # (..., 1)
        return torch.addcmul(dy, normal, along, value=-1).mul_(scale), dweight, None


class FusedNorm(RMSNorm):
    """RMSNorm, which PyTorch puts together from many small operations on a CPU, of fewer."""

    def forward(self, x):
        if not torch.is_grad_enabled():
            return normalize(x, self.eps)[0] * self.weight.to(x.dtype)
        if x.dtype == torch.float32:
            return NormFunction.apply(x, self.weight, self.eps)
        return super().forward(x)


class ShiftFunction(torch.autograd.Function):
    """TokenShift without a cache, its gradient written out: a third of the time on a CPU."""

    @staticmethod
    def forward(ctx, x, shares):
        ctx.save_for_backward(x, shares)
        y = x.clone()
        for back, share in enumerate(shares, 1):
            y[:, back:].addcmul_(x[:, :-back], share)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, shares = ctx.saved_tensors
        dx, dshares = dy.clone(), torch.empty_like(shares)
        for back, share in enumerate(shares, 1):
            dx[:, :-back].addcmul_(dy[:, back:], share)
            dshares[back - 1] = (dy[:, back:] * x[:, :-back]).sum((0, 1))
        return dx, dshares


class FusedShift(TokenShift):
    """TokenShift in training with the function above."""

    def forward(self, x, cache=None):
        if cache is None and torch.is_grad_enabled() and x.dtype == self.shares.dtype:
            return ShiftFunction.apply(x, self.shares)
        return super().forward(x, cache)


def block_mask(f, S, size=FLEX_BLOCK):
    """f (B, n) over S keys for FlexAttention: (n / size) * (S / size) indices, never n * S.

    Since a row sees leading tokens, a row of blocks is so many full ones, then some that need a
    look, then none.
    """
    n = f.shape[1]
    # The last row stands in for those that are missing to a whole block.
    f = F.pad(f[:, None].float(), (0, -n % size), mode="replicate")[:, 0].long()  # (B, R * size)
    f = f.clamp(max=S)
    rows = f.view(len(f), 1, -1, size)  # (B, 1, R, size)
    full = rows.amin(3) // size  # (B, 1, R)
    end = (rows.amax(3) + size - 1) // size  # (B, 1, R)
    column = torch.arange(-(-S // size), device=f.device).expand(*full.shape, -1)  # (B, 1, R, K)
    behind = (column + full[..., None]) % column.shape[3]  # (B, 1, R, K) from the full ones on
    return BlockMask.from_kv_blocks(
        kv_num_blocks=(end - full).int(), kv_indices=behind.int(),
        full_kv_num_blocks=full.int(), full_kv_indices=column.int(),
        BLOCK_SIZE=size, mask_mod=lambda b, h, i, j: j < f[b, i], seq_lengths=(n, S),
    )


def attend_by_blocks(q, k, v, f, mask, flex):
    if q.shape[-1] < 16:  # FlexAttention has no kernel for such heads
        seen = torch.arange(k.shape[2], device=f.device) < f[:, :, None]  # (B, n, S)
        return sdpa(q, k, v, seen[:, None])
    grouped = q.shape[1] > k.shape[1]
    return flex(q, k, v, block_mask=mask, enable_gqa=grouped)


@functools.cache
def has_triton():
    """Whether FlexAttention can be compiled for CUDA; if not, on Windows for one, prints a line."""
    there = importlib.util.find_spec("triton") is not None
    if os.name == "posix":  # there it compiles a helper in C, for which small images lack a part
        header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
        compilers = os.environ.get("CC", "cc"), "gcc", "clang"
        there = there and os.path.exists(header) and any(map(shutil.which, compilers))
    # Older cards have 64 KB of shared memory; in float32 heads of 128 need 80.
    if there and torch.cuda.get_device_capability() >= (8, 0):
        return True
    print("no Triton for this GPU, no C compiler or no Python.h: long masks go to SDPA, which is "
          "slower and needs more memory")
    return False


def compiled(function, **options):
    """torch.compile, but not before it is needed: to import the compiler takes two seconds."""
    # Beyond its limit of shapes FlexAttention would fall back to a matrix of T x T, and a block to
    # eager mode. It is set here, since within compiled code it would break the graph.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, **options)


@functools.cache
def compiled_flex():
    return compiled(flex_attention)


def compile_blocks(model):
    """Compile the blocks; they are alike and share a graph. Before recompute_blocks, not after."""
    for block in model.blocks:
        block.forward = compiled(block.forward, dynamic=True)


def recompute_blocks(model):
    """Let the backward pass compute each block again, to keep the activations of one at a time."""
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


class PackedLinear(nn.Module):
    """A linear layer for chat on the CPU: its weight in fewer bits, what goes through in float32.

    A single row takes as long as the weight is read: half of the bytes take half of the time. Many
    rows are bound by arithmetic: for them the weight is unpacked, to the dtype `wide`.
    """

    def __init__(self, linear, wide):
        super().__init__()
        self.wide = wide
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.pack(linear.weight.detach())

    def pack(self, weight):
        self.weight = weight.bfloat16()  # (out, in)

    def row(self, x):
        """x (in,) -> (out,)."""
        return torch.mv(self.weight, x.bfloat16()).float()

    def unpacked(self):
        return self.weight.to(self.wide)  # (out, in)

    def forward(self, x):
        if x.shape[:-1].numel() == 1:
            y = self.row(x.flatten()).view(*x.shape[:-1], -1)
        else:
            y = F.linear(x.to(self.wide), self.unpacked()).float()
        return y if self.bias is None else y + self.bias


class ColumnLinear(PackedLinear):
    """In bfloat16 as well: the weight's columns are summed up, as much of each as x has.

    An embedding bag does this, by FBGEMM and not by oneDNN: the head of SmolLM2 takes 0.8 times as
    long on two threads as by torch.mv with AVX512, 0.65 times with AVX2.
    """

    def pack(self, weight):
        out, n = weight.shape
        # Its kernel is fastest with up to 512 sums at once, and each thread should have some.
        pieces = min(out, max(torch.get_num_threads(), -(-out // 512)))
        while out % pieces:
            pieces += 1
        self.weight = weight.bfloat16().t().contiguous().t()  # (out, in), columns in one piece
        self.columns = self.weight.t().view(n * pieces, out // pieces)
        places = torch.arange(n, dtype=torch.int32) * pieces  # (in,)
        self.order = torch.cat([places + piece for piece in range(pieces)])
        self.starts = torch.arange(pieces, dtype=torch.int32) * n

    def row(self, x):
        shares = torch.cat([x.bfloat16()] * len(self.starts))  # (pieces * in,)
        sums = F.embedding_bag(self.order, self.columns, self.starts, mode="sum",
                               per_sample_weights=shares)  # (pieces, out / pieces)
        return sums.flatten().float()


class FloatLinear(PackedLinear):
    """In float32 by columns: fastest where the weight is small enough for the processor's cache."""

    def pack(self, weight):
        self.weight = weight.float().t().contiguous().t()  # (out, in)

    def row(self, x):
        return torch.mv(self.weight, x)


class Int8Linear(PackedLinear):
    """The weight in 8 bits, with a scale for each of its rows. The operator is private to torch."""

    def pack(self, weight):
        if weight.shape[1] % 16:  # the operator would read beyond the end of a row
            raise NotImplementedError
        weight = weight.float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127  # (out, 1)
        self.weight = (weight / scale).round().to(torch.int8)  # (out, in)
        self.scale = scale[:, 0].bfloat16()  # (out,)

    def row(self, x):
        y = torch._weight_int8pack_mm(x[None].bfloat16(), self.weight, self.scale)  # (1, out)
        return y[0].float()

    def unpacked(self):
        return self.weight.to(self.wide) * self.scale[:, None].to(self.wide)


class Int4Linear(PackedLinear):
    """The weight rounded to 4 bits: 32 neighbours in a row share a step and a middle.

    A weight is (q - 8) * step + middle, with q from 0 to 15. The operators are private to torch.
    They know one row alone, so that for many rows q is kept in a byte each as well.
    """

    GROUP = 32

    def pack(self, weight):
        out = len(weight)
        groups = weight.float().view(out, -1, self.GROUP)  # (out, G, 32)
        low, high = groups.aminmax(dim=2, keepdim=True)  # (out, G, 1) each
        self.step = ((high - low) / 15).clamp(min=1e-12).bfloat16()
        self.middle = (low + 8 * self.step).bfloat16()
        q = ((groups - self.middle) / self.step).round().clamp(-8, 7)  # (out, G, 32)
        self.q = q.to(torch.int8)
        pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        self.weight = pack(q.int().add(8).view(out, -1), 1)
        steps = torch.cat([self.step, self.middle], 2).transpose(0, 1)  # (G, out, 2)
        self.steps = steps.contiguous()

    def row(self, x):
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        return product(x[None].bfloat16(), self.weight, self.GROUP, self.steps)[0].float()

    def unpacked(self):
        weight = self.q * self.step.to(self.wide) + self.middle.to(self.wide)  # (out, G, 32)
        return weight.view(len(weight), -1)


def by_columns(model):
    """Lay the model's weights out for chat on the CPU in float32; no number changes -> the model.

    A row is multiplied faster by a tall matrix if each column, not each row, is a piece of memory:
    SmolLM2-135M writes 1.3 to 1.4 times as many tokens a second, an 11M model 1.4 to 1.5 times.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.out_features > layer.in_features:
            layer.weight.data = layer.weight.data.t().contiguous().t()  # (out, in)
    return model


class PackedEmbedding(nn.Embedding):
    """An embedding whose rows come out in float32."""

    def forward(self, tokens):
        return super().forward(tokens).float()


# The ways to hold a weight in so many bits. Where there are several, a trial decides.
PACKED = {"bfloat16": (PackedLinear, ColumnLinear), "int8": (Int8Linear,), "int4": (Int4Linear,)}
AUTO = *PACKED["bfloat16"], FloatLinear


def pack(model, kind, wide=torch.float32):
    """A model for chat on the CPU with weights in fewer bits: a kind of PACKED -> the model.

    What goes through it, the norms and the cache are float32. "auto" is bfloat16, or float32 for
    weights that are read faster so. Where torch has no operator for a shape in fewer bits, or one
    that is wrong, its weights are in bfloat16, and a line says so.
    """
    shapes = {}
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear:  # a reader's own kind stays as it is
                # The head in 4 bits is 9 % off in SmolLM2, other layers 0.5 %; 8 are no faster.
                head = child is model.head and kind in ("int8", "int4")
                shape = tuple(child.weight.shape), "bfloat16" if head else kind
                shapes.setdefault(shape, []).append((parent, name, child))
    for (shape, use), places in shapes.items():
        layers = [child for *_, child in places]
        way = fastest(layers, AUTO if use == "auto" else PACKED[use], wide)
        if way is None:
            print(f"torch multiplies no weights of {shape} in {use}: they are in bfloat16")
            way = fastest(layers, PACKED["bfloat16"], wide) or PackedLinear
        for parent, name, child in places:
            setattr(parent, name, way(child, wide))
    if type(model.embed) is nn.Embedding:
        model.embed = PackedEmbedding.from_pretrained(model.embed.weight.detach().bfloat16())
    for p in model.parameters():
        if p is not model.embed.weight or type(model.embed) is not PackedEmbedding:
            p.data = p.data.float()
    return model


@torch.inference_mode()
def fastest(linears, ways, wide):
    """The way to pack these layers, of one shape, that is right and takes least time; or None.

    As many are timed as do not stay in the processor's cache, since in a chat none does.
    """
    timed = 1 + (1 << 23) // linears[0].weight.numel() if len(ways) > 1 else 1
    x = torch.randn(1, linears[0].in_features, generator=torch.Generator())  # (1, in)
    trials = {}
    for way in ways:
        layers = packed(linears[:timed], way, wide, x)
        if layers:
            trials[way] = layers
    seconds = {way: [] for way in trials}
    # In turns, so that whatever else the machine does slows them down alike.
    for _ in range(5 if len(trials) > 1 else 0):
        for way, layers in trials.items():
            start = time.perf_counter()
            for layer in layers:
                layer(x)
            seconds[way].append(time.perf_counter() - start)
    # Of those that differ by less than a trial does, the first: it reads the fewest bytes.
    best = {way: min(times, default=0) for way, times in seconds.items()}
    return next((way for way in best if best[way] <= 1.1 * min(best.values())), None)


def packed(linears, way, wide, x):
    """The layers packed in a way; [] if torch has no operator for it, or one that is wrong here."""
    try:
        layers = [way(linear, wide) for linear in linears]
        got = layers[0].row(x[0])  # (out,)
    except (AttributeError, NotImplementedError, RuntimeError):
        return []
    weight = layers[0].unpacked().float()  # (out, in)
    error = (got - weight @ x[0]).norm()
    # Each product is rounded in bfloat16, by up to 0.8 %; their sum grows as a random walk.
    size = (weight.abs() @ x[0].abs()).norm() / x.numel() ** 0.5
    return layers if error <= 0.02 * size else []


class Steps:
    """One token after another on the CPU, with a batch of one: GPT.layers written out for one row.

    Half of the time of a small model goes into calls. Without modules and with fewer operations the
    default model writes 1.9 times as many tokens a second, an 11M model 1.3 times.
    """

    def __init__(self, model, cache):
        self.model, self.cache = model, cache
        c = model.config
        self.sizes = c.n_head, c.n_kv_head, c.head_size
        self.shares, self.qk_weights = [], []
        for block in model.blocks:
            attention = block.attention
            if attention.shift is not None:  # in the order of the tokens
                self.shares.append(attention.shift.shares.detach().flip(0))  # (3, C)
            if attention.q_norm is not None:
                q_weight = attention.q_norm.weight.expand(c.n_head, -1)
                k_weight = attention.k_norm.weight.expand(c.n_kv_head, -1)
                self.qk_weights.append(torch.cat([q_weight, k_weight]).detach())  # (H + Hkv, D)

    @torch.inference_mode()
    def __call__(self, token):
        """A token goes behind the cache and sees all of it -> its logits (V,)."""
        model, place = self.model, self.cache.length
        if place >= model.config.block_size:
            raise ValueError(f"{place + 1} tokens do not fit into the context of {place}")
        x = model.embed.weight[token][None].to(self.cache.k.dtype)  # (1, C)
        for i, block in enumerate(model.blocks):
            h = self.norm(x, block.norm1)
            x = x + block.attention.out.forward(self.attend(i, h, place))
            gate, up = block.mlp.up.forward(self.norm(x, block.norm2)).chunk(2, -1)
            x = x + block.mlp.down.forward(F.silu(gate).mul_(up))
        self.cache.length = place + 1
        return model.head.forward(self.norm(x, model.norm))[0]

    def norm(self, x, norm):
        size = float(torch.linalg.vector_norm(x))
        return x * (size * size / x.shape[-1] + norm.eps) ** -0.5 * norm.weight

    def attend(self, i, x, place):
        """Layer i's attention of a row x (1, C), which joins the cache -> (1, H * D)."""
        H, Hkv, D = self.sizes
        attention, cache = self.model.blocks[i].attention, self.cache
        if self.shares:
            reach = len(self.shares[i])
            cache.x[i, 0, place + reach] = x[0]
            x = x + (cache.x[i, 0, place : place + reach] * self.shares[i]).sum(0)
        qkv = attention.qkv.forward(x).view(H + 2 * Hkv, D)
        qk = qkv[: H + Hkv]
        if self.qk_weights:
            qk = normalize(qk, attention.q_norm.eps)[0] * self.qk_weights[i]
        cos, sin = self.model.cos[place], self.model.sin[place]  # (1, D) each
        qk = torch.addcmul(qk * cos, qk.roll(D // 2, -1), sin)
        cache.k[i, 0, :, place] = qk[H:]
        cache.v[i, 0, :, place] = qkv[H + Hkv :]
        q = qk[:H].view(1, Hkv, H // Hkv, D)  # the heads of a group as rows of one
        k, v = cache.k[i, :, :, : place + 1], cache.v[i, :, :, : place + 1]
        return F.scaled_dot_product_attention(q, k, v).view(1, H * D)


class Replay:
    """One token after another on CUDA, with a batch of one, by replaying a graph without Python.

    A graph has fixed shapes. So each token sees a cache of a power of two tokens under a row of a
    mask, which is made on the device from the token's place; there is a graph for each such size.
    On the CPU the same steps run without a graph, so that they can be tested there.
    """

    def __init__(self, model, cache):
        self.model, self.cache, self.graphs = model, cache, {}
        # What is hidden gets the weight 0, but 0 times what memory happens to hold could be NaN.
        cache.k.zero_()
        cache.v.zero_()
        device = cache.k.device
        self.token = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)

    @torch.inference_mode()
    def __call__(self, token):
        """A token goes behind the cache and sees all of it -> logits (V,), until the next call."""
        place, size = self.cache.length, self.cache.k.shape[3]
        if place >= size:
            raise ValueError(f"{place + 1} tokens do not fit into the context of {size}")
        self.token.fill_(token)  # a fill and no copy from the host, which would make it wait
        self.place.fill_(place)
        end = min(max(128, 1 << place.bit_length()), size)
        if not self.place.is_cuda:
            logits = self.step(end)
        else:
            if end not in self.graphs:
                self.graphs[end] = self.capture(end)
            graph, logits = self.graphs[end]
            graph.replay()
        self.cache.length += 1
        return logits

    def step(self, end):
        """The logits (V,) of the token at its place, over the first `end` places of the cache."""
        hidden = torch.arange(end, device=self.place.device) > self.place  # (end,)
        # As numbers to add, it costs each layer three launches less on CUDA.
        bias = torch.zeros_like(hidden, dtype=self.cache.k.dtype).masked_fill(hidden, -torch.inf)
        attend = functools.partial(sdpa, seen=bias[None, None, None])
        return self.model.layers(self.token, attend, self.place, end, self.cache)[0, 0]

    def capture(self, end):
        """A graph of a step and its logits. RuntimeError if a layer looks at its own numbers."""
        # One stream for all: cuBLAS keeps 32 MB for each that it has seen.
        stream = capture_stream(self.place.device)
        stream.wait_stream(torch.cuda.current_stream())
        # The first run sets up the libraries, which must not be captured. A look that a capture
        # would not survive is an error here already.
        with torch.cuda.stream(stream), no_waits():
            self.step(end)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            logits = self.step(end)
        return graph, logits


@contextlib.contextmanager
def no_waits():
    """Within it, what makes the host wait for a CUDA device is a RuntimeError."""
    warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@functools.cache
def capture_stream(device):
    return torch.cuda.Stream(device)


FASTER = {RMSNorm: FusedNorm, TokenShift: FusedShift}  # layers in training on the CPU
READERS = {"cpu": Steps, "cuda": Replay}  # of one token after another


def faster(model, dtype=torch.float32, tell=print):
    """Swap ways of the lesson for faster ones that compute the same -> the model.

    The lesson is what counts, whoever changed it: each way is compared with it on random numbers,
    values and gradients, in float32 and in the dtype of a training. One that gives anything else
    stands back, and `tell` is called with a line that says so. In eval mode, which is that of a
    chat, model.reader becomes what reads one token after another.
    """
    on_cpu = model.norm.weight.device.type == "cpu"
    random = torch.Generator().manual_seed(0)
    changed = []
    # A layer that draws random numbers in training, for dropout, must not move those of the run.
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        for plain, fast in FASTER.items():
            layers = [layer for layer in model.modules() if type(layer) is plain]
            if on_cpu and all(same_layer(layer, fast, dtype, random) for layer in layers):
                for layer in layers:
                    layer.__class__ = fast
            elif on_cpu:
                changed.append(plain.__name__)
        if same_attention(model, dtype, random):
            model.choose_attention = fastest_attention
        else:
            changed.append("attention")
        if not model.training:
            with torch.inference_mode():
                reader = choose_reader(model, tell)
            model.reader = None if changed else reader
            if model.reader is None and model.norm.weight.device.type in READERS:
                changed.append("reading one token")
    if changed:
        ways = ", ".join(changed)
        tell(f"model.py was changed, so it runs as written there, which is slower: {ways}")
    return model


def same_layer(layer, fast, dtype, random):
    """Whether a layer computes the same as one of the class `fast`, in training and without."""
    width = next(layer.parameters()).shape[-1]
    # Some rows are so small that an epsilon counts.
    sizes = torch.logspace(-3, 0, 16)[:, None]
    x = torch.randn(2, 16, width, generator=random) * sizes  # (2, 16, width)
    for kind in {torch.float32, dtype}:
        one, two = copy.deepcopy(layer).cpu().float(), copy.deepcopy(layer).cpu().float()
        # Beside LoRA the weights are frozen; here both have gradients.
        one.requires_grad_(True)
        two.requires_grad_(True)
        # What an __init__ has set to 0 or 1 may become any number.
        for p, q in zip(one.parameters(), two.parameters()):
            p.data = torch.randn(p.shape, generator=random)
            q.data = p.data
        two.__class__ = fast
        if not same(one, two, [x.to(kind)], kind):
            return False
    return True


def same_attention(model, dtype, random):
    """Whether the lesson's attention is that of the fused kernels: over few keys and over many."""
    c, device = model.config, model.norm.weight.device
    sizes = [(40, 40), (4, min(max(c.block_size, 300), 4096))]
    for kind in {torch.float32, dtype}:
        # Large scores tell a cap; in bfloat16 they would be no more than their rounding.
        size = 4 if kind == torch.float32 else 1
        for n, S in sizes:
            f = torch.randint(1, S + 1, (1, n), generator=random)  # (1, n)
            f[0, 0] = S
            shapes = (c.n_head, n), (c.n_kv_head, S), (c.n_kv_head, S)
            qkv = [torch.randn(1, *shape, c.head_size, generator=random) for shape in shapes]
            qkv[0] *= size
            qkv = [x.to(device, kind) for x in qkv]
            seen = torch.arange(S) < f[:, :, None]  # (1, n, S)
            fused = functools.partial(sdpa, seen=seen[:, None].to(device))

            def lesson(q, k, v, f=f, S=S):
                return model.choose_attention(f, S, device)(q, k, v)

            if not same(lesson, fused, qkv, kind):
                return False
    return True


def same(one, two, given, kind):
    """Whether two functions of tensors have the same values and gradients, with grad and without.

    False where one of them fails: then the lesson's own runs, and fails where it is wrong.
    """
    digits = 1e-4 if kind == torch.float32 else 0.03
    try:
        for grad in (True, False):
            with torch.set_grad_enabled(grad), torch.autocast(
                    given[0].device.type, kind, enabled=kind != torch.float32):
                for a, b in zip(outcome(one, given, grad), outcome(two, given, grad), strict=True):
                    if not close(b, a, digits):
                        return False
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a changed layer may fail in any way
        return False
    return True


def close(x, y, digits):
    return bool((x - y).abs().max() <= digits * y.abs().max())


def outcome(function, given, grad):
    """The value of a function, and if `grad` the gradients of what it was given and of its own."""
    given = [x.detach().requires_grad_(grad) for x in given]
    y = function(*given)
    if not grad:
        return [y]
    wanted = given + (list(function.parameters()) if isinstance(function, nn.Module) else [])
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
    return [y, *torch.autograd.grad((y * weights).sum(), wanted, materialize_grads=True)]


def choose_reader(model, tell):
    """What reads one token after another faster than the model, Steps or Replay -> it, or None.

    Some sixty different tokens are read: at once without a cache, and with one, where the first and
    the last few are read one by one, by the model and by the faster way.
    """
    c, weight = model.config, model.norm.weight
    n, few = min(64, c.block_size), min(5, c.block_size // 2)
    tokens = torch.arange(n, device=weight.device) * 7 % c.vocab_size  # (n,)
    cache = Cache(replace(c, block_size=n), device=weight.device, dtype=weight.dtype)
    way = READERS.get(weight.device.type)
    try:
        one = way and way(model, cache)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a changed layer may fail in any way
        way = None
    places, expected, calls = [*range(few), *range(n - few, n)], [], []
    for place in places:
        if cache.length < place:  # those between the first few and the last
            model(tokens[None, few:-few], None, cache)
        calls.append([])
        with packed_layers_call(functools.partial(note, calls[-1])):
            expected.append(model(tokens[None, place : place + 1], None, cache)[0, 0])
    expected = torch.stack(expected).float()  # (2 * few, V)
    whole = model(tokens[None])[0, places].float()  # (2 * few, V)
    rounded = any(calls) or weight.dtype != torch.float32
    if not (whole - expected).norm() <= (0.1 if rounded else 1e-3) * whole.norm():
        tell("model.py gives other logits with a cache than without: what a layer takes from other "
             "tokens of the row has to go through the cache, as in TokenShift")
        return None
    if way is None:
        return None
    digits = 0.03 if weight.dtype == torch.bfloat16 else 1e-3
    try:
        # From the last one on, so that before each stands what the model has put there.
        for place, right, called in reversed([*zip(places, expected, calls)]):
            cache.length = place
            with packed_layers_call(functools.partial(answer_again, called, digits)):
                logits = one(int(tokens[place])).float()  # (V,)
            if called or not close(logits, right, digits):
                return None
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return None
    return way


# A packed layer rounds its input. A number that differs in its last digit may be rounded the other
# way, and after thirty layers few logits agree. So while a reader is compared with the model, each
# packed layer answers what it has answered the model, if it is asked the same.


@contextlib.contextmanager
def packed_layers_call(way):
    """Within it a packed layer gives way(its forward, the layer, x)."""
    forward = PackedLinear.forward
    PackedLinear.forward = lambda layer, x: way(forward, layer, x)
    try:
        yield
    finally:
        PackedLinear.forward = forward


def note(calls, forward, layer, x):
    y = forward(layer, x)
    calls.append((layer, x, y))
    return y


def answer_again(calls, digits, forward, layer, x):
    """The noted answer. ValueError if another layer was asked then, or something else."""
    noted, before, y = calls.pop(0)
    if layer is not noted or not close(x.flatten(), before.flatten(), digits):
        raise ValueError
    return y.view(*x.shape[:-1], -1)
