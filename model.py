"""
A decoder-only transformer with a pluggable attention mask and a KV cache, in one file.

Notable features:
- the mask is a vector f (see mask.py): row j may attend to the first f[j] tokens; None is causal
- RMSNorm, rotary positions, SwiGLU, grouped-query attention, optional biases, q and k norms, tied embeddings,
  token shift: the same class is a GPT, a LLaMA or a Qwen by its config alone (data/hf.py loads their weights)
- one attention function over SDPA, with FlexAttention for long contexts on CUDA; a decoder that replays a CUDA graph
- nothing here knows about text or dialogues
"""
import functools
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

# On CUDA a mask over so many keys is left to FlexAttention. At 1,024 a compiled training step is 1.05 times as fast with it
# as with a mask given to SDPA, at 4,096 forward and backward of attention alone are 1.26 times as fast (H100, bfloat16).
FLEX_FROM = 1024


@functools.cache
def compiled(function):
    """torch.compile, but not before it is needed: to import the compiler takes two seconds."""
    torch._dynamo.config.recompile_limit = 64  # beyond its limit FlexAttention would fall back to a T x T matrix
    return torch.compile(function)


@dataclass
class GPTConfig:
    vocab_size: int = 1280
    block_size: int = 256  # the longest context, in tokens
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 4  # fewer than n_head is grouped-query attention
    n_embd: int = 128
    n_hidden: int = 384  # width of the SwiGLU
    head_size: int = 0  # 0 is n_embd / n_head
    rope_theta: float = 10000.0
    rope_scaling: tuple = ()  # LLaMA 3.1: (factor, low frequency factor, high frequency factor, original context)
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm on each query and key head before the rotation, as in Qwen3
    tie_embeddings: bool = True
    # Before attention, add to each position a learned share of the three before it. To find "the word after the name"
    # a layer must know what stands before each word; this tells it. Off in LLaMA and Qwen shapes.
    token_shift: bool = False

    def __post_init__(self):
        for f in fields(self):
            if not isinstance(value := getattr(self, f.name), (int, float) if f.type is float else f.type):
                raise ValueError(f"{f.name} must be {f.type.__name__}, not {value!r}")
        known, self.head_size = self.head_size, self.head_size or self.n_embd // self.n_head
        if (self.n_embd % self.n_head and not known) or self.head_size % 2:
            raise ValueError(f"n_embd ({self.n_embd}) must be n_head ({self.n_head}) times an even head size")
        if not 0 < self.block_size <= 1 << 20 or not 0 < self.vocab_size <= 1 << 20:
            raise ValueError(f"block_size ({self.block_size}) and vocab_size ({self.vocab_size}) must be from 1 to {1 << 20:,}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head ({self.n_head}) must be a multiple of n_kv_head ({self.n_kv_head})")


class Cache:
    """Keys and values of the tokens seen so far, allocated once: 2 * n_layer * B * n_kv_head * S * D numbers.

    With token shift also what each attention was given, n_layer * B * (S + 3) * n_embd numbers. To forget all
    but the first p tokens, set `length` to p.
    """

    def __init__(self, config, batch_size=1, device=None, dtype=None):
        shape = (config.n_layer, batch_size, config.n_kv_head, config.block_size, config.head_size)
        self.k = torch.empty(shape, device=device, dtype=dtype)  # (L, B, Hkv, S, D)
        self.v = torch.empty_like(self.k)
        slots = config.block_size + 3 if config.token_shift else 0  # before the first token stand three zeros
        self.x = torch.zeros(config.n_layer, batch_size, slots, config.n_embd, device=device, dtype=dtype)  # (L, B, S + 3, C)
        self.length = 0


def visible(f, n, S, device="cpu"):
    """The attn_mask of n new rows over S keys: None (all is seen), "causal", a boolean mask or a BlockMask.

    f (B, n) or None (causal). It is looked at here, so it should be on the CPU: looking at it on a GPU would
    make the host wait. An f beyond S sees all there is. What is returned is on the device.
    """
    if f is None and n in (1, S):
        return "causal" if n > 1 else None
    if f is None:
        f = torch.arange(S - n + 1, S + 1)[None]  # causal rows over a cache: a triangle at the bottom right
    elif f.min() >= S:
        return None
    elif n == S and (f == torch.arange(1, n + 1)).all():
        return "causal"
    f = f.to(device, non_blocking=True)
    if f.is_cuda and S >= FLEX_FROM:
        return blocks(f, S)
    return (torch.arange(S, device=device) < f[..., None])[:, None]  # (B, 1, n, S)


def blocks(f, S, size=128):
    """f (B, n) over S keys as the blocks that FlexAttention visits: (n / size) * (S / size) indices, never n * S.

    Since a row sees leading tokens, a row of blocks is so many full ones, then some that need a look, then none.
    """
    n = f.shape[1]
    f = F.pad(f[:, None].float(), (0, -n % size), mode="replicate")[:, 0].long().clamp(max=S)  # (B, R * size)
    rows = f.view(len(f), 1, -1, size)  # (B, 1, R, size)
    full, end = rows.amin(3) // size, (rows.amax(3) + size - 1) // size  # (B, 1, R)
    column = torch.arange(-(-S // size), device=f.device).expand(*full.shape, -1)  # (B, 1, R, S / size)
    return BlockMask.from_kv_blocks((end - full).int(), ((column + full[..., None]) % column.shape[3]).int(), full.int(),
                                    column.int(), size, lambda b, h, i, j: j < f[b, i], (n, S))


def attention(q, k, v, attn_mask):
    """q (B, H, n, D), k and v (B, Hkv, S, D), attn_mask from `visible` on their device -> (B, H, n, D)."""
    B, H, n, D = q.shape
    groups = H // k.shape[1]
    if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype == torch.int32:
        # Inside a CUDA graph: where rows and keys begin and end, on the device. At 2,048 tokens 3.0 times, at 8,192
        # 5.9 times as fast as SDPA with a row of a mask.
        row, keys, values = (x[0].transpose(0, 1) for x in (q, k, v))  # (1, H, D), (S, Hkv, D)
        y, *_ = torch.ops.aten._flash_attention_forward(row, keys, values, *attn_mask, 1, k.shape[2], 0.0, False, False)
        return y.view(B, H, n, D)
    if isinstance(attn_mask, BlockMask):
        return compiled(flex_attention)(q, k, v, block_mask=attn_mask, enable_gqa=groups > 1)
    if n == 1:  # the heads of a group become rows of one head, so that the cache is not copied for each
        return F.scaled_dot_product_attention(q.reshape(B, -1, groups, D), k, v, attn_mask).view(B, H, 1, D)
    # The backward of SDPA on the CPU is slow for short rows: a step of the default run took 1.3 times as long with it.
    short = attn_mask is not None and q.requires_grad and q.device.type == "cpu" and k.shape[2] <= 256
    if not short and not isinstance(attn_mask, torch.Tensor):
        return F.scaled_dot_product_attention(q, k, v, is_causal=attn_mask == "causal", enable_gqa=groups > 1)
    if groups > 1:  # no fused kernel takes both a mask and grouped heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if not short:
        return F.scaled_dot_product_attention(q, k, v, attn_mask)
    allowed = attn_mask if isinstance(attn_mask, torch.Tensor) else torch.ones(n, n, dtype=torch.bool).tril()
    bias = torch.zeros(allowed.shape, dtype=q.dtype).masked_fill_(~allowed, -torch.inf)
    scores = torch.add(bias, q @ k.mT, alpha=D**-0.5)  # (B, H, n, S)
    return scores.softmax(-1) @ v


def rope_tables(config):
    """The rotation of each position: cos and signed sin, each (block_size, 1, D) float32.

    With rope_scaling wavelengths of many turns in the original context stay, those of few turns grow by the
    factor, and those between are blended (LLaMA 3.1's model card and reference code).
    """
    D = config.head_size
    frequency = config.rope_theta ** (-torch.arange(0, D, 2) / D)  # (D / 2,)
    if config.rope_scaling:
        factor, low, high, original = config.rope_scaling
        keep = ((original * frequency / (2 * torch.pi) - low) / (high - low)).clamp(0, 1)  # (D / 2,)
        frequency = frequency * (keep + (1 - keep) / factor)
    angles = torch.arange(config.block_size)[:, None] * frequency
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # (block_size, 1, D / 2)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.sizes = config.n_head, config.n_kv_head, config.head_size
        H, Hkv, D = self.sizes
        self.qkv = nn.Linear(config.n_embd, (H + 2 * Hkv) * D, bias=config.qkv_bias)
        self.out = nn.Linear(H * D, config.n_embd, bias=False)
        self.q_norm = nn.RMSNorm(D, config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(D, config.norm_eps) if config.qk_norm else None
        # Random shares keep the positions apart: equal ones of 0.3 left the loss at 0.92 after 600 steps, these at 0.73.
        self.shares = nn.Parameter(0.5 * torch.randn(3, config.n_embd)) if config.token_shift else None

    def forward(self, x, attn_mask, rope, cached=None):
        (B, n, C), (H, Hkv, D) = x.shape, self.sizes
        if cached is not None:
            keys, values, inputs, at, S = cached  # the cache of this layer, the new tokens' places in it, its tokens in all
        if self.shares is not None:
            if cached is None:
                past = F.pad(x, (0, 0, 3, 0))  # (B, n + 3, C)
            else:
                inputs.index_copy_(1, at + 3, x)
                past = inputs.index_select(1, at[0] + torch.arange(n + 3, device=at.device))  # (B, n + 3, C)
            for i, share in enumerate(self.shares):  # the first new token is past[:, 3]: share i weighs what stands i + 1 before
                x = torch.addcmul(x, past[:, 2 - i : 2 - i + n], share)
        qkv = self.qkv(x).view(B, n, H + 2 * Hkv, D)
        qk, v = qkv.split((H + Hkv, Hkv), 2)  # (B, n, H + Hkv, D), (B, n, Hkv, D)
        if self.q_norm is not None:
            scale = torch.cat([self.q_norm.weight.expand(H, D), self.k_norm.weight.expand(Hkv, D)])  # (H + Hkv, D)
            qk = F.rms_norm(qk, (D,), eps=self.q_norm.eps) * scale.to(qk.dtype)  # (B, n, H + Hkv, D)
        cos, sin = (table.to(qk.dtype) for table in rope)  # (n, 1, D)
        qk = torch.addcmul(qk * cos, qk.roll(D // 2, -1), sin)  # rotates queries and keys in one go
        q, k = qk.transpose(1, 2).split((H, Hkv), 1)  # (B, H, n, D), (B, Hkv, n, D)
        v = v.transpose(1, 2)  # (B, Hkv, n, D)
        if cached is not None:
            keys.index_copy_(2, at, k)
            values.index_copy_(2, at, v)
            k, v = keys[:, :, :S], values[:, :, :S]  # views: the cache is never copied
        y = attention(q, k, v, attn_mask)  # (B, H, n, D)
        return self.out(y.transpose(1, 2).reshape(B, n, H * D))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 2 * config.n_hidden, bias=False)  # gate and up in one product
        self.down = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.attention = Attention(config)
        self.norm2 = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, attn_mask, rope, cached=None):
        x = x + self.attention(self.norm1(x), attn_mask, rope, cached)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A GPT over token ids."""

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, False  # True: the backward pass computes each block again to save memory
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name == "embed.weight":
                nn.init.normal_(p, std=0.02)
            elif p.dim() > 1 and not name.endswith("shares"):  # what writes to the residual stream starts smaller, by the depth
                writes = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=(p.shape[1] * (2 * config.n_layer if writes else 1)) ** -0.5)
        cos, sin = rope_tables(config)  # (block_size, 1, D)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def forward(self, tokens, f=None, cache=None, at=None):
        """tokens (B, n) int64 -> logits (B, n, vocab_size), or (N, vocab_size) for the N positions in `at`.

        f (B, n) integers, best on the CPU: how many leading tokens of the whole context, cache included, each
        row may see, at least 1; None is causal. With a cache the tokens stand behind those in it, and it grows.
        at (N,) integers: the positions in the flattened rows where logits are wanted. ValueError if the context does not fit into block_size.
        """
        n, start = tokens.shape[1], cache.length if cache is not None else 0
        end = start + n
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit into the context of {self.config.block_size}")
        attn_mask = visible(f, n, end, tokens.device)
        logits = self.layers(tokens, attn_mask, cache, torch.arange(start, end, device=tokens.device), end, at)
        if cache is not None:
            cache.length = end
        return logits

    def layers(self, tokens, attn_mask, cache, places, S, at=None):
        """Tokens (B, n) at their places (n,) among the S keys that attn_mask is about -> logits."""
        x = self.embed(tokens)  # (B, n, C)
        rope = self.cos[places], self.sin[places]  # (n, 1, D)
        for i, block in enumerate(self.blocks):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, attn_mask, rope, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn in a block
            else:
                x = block(x, attn_mask, rope, None if cache is None else (cache.k[i], cache.v[i], cache.x[i], places, S))
        x = self.norm(x if at is None else x.flatten(0, 1)[at])  # (B, n, C) or (N, C)
        return self.head(x)  # (B, n, V) or (N, V)


class PackedLinear(nn.Module):
    """A linear layer in bfloat16 on the CPU, its weight laid out once as oneDNN wants it and not at every call."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1), linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """A linear layer on the CPU whose weight is rounded to 8 bits, with a scale for each row."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127  # (out, 1)
        self.weight, self.scale, self.bias = (weight / scale).round().to(torch.int8), scale[:, 0].to(linear.weight.dtype), linear.bias

    def forward(self, x):
        if x.shape[:-1].numel() > 1:  # many rows: a product in x's dtype is twice as fast
            return F.linear(x, self.weight.to(x.dtype) * self.scale[:, None], self.bias)
        y = torch._weight_int8pack_mm(x.view(1, -1), self.weight, self.scale).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def pack(model, int8=False):
    """A bfloat16 model on the CPU gets linear layers that only read: 1.2 times as many tokens a second, in 8 bits 2.2 times.

    The logits stay the same, in 8 bits nearly. Elsewhere, and in float32, the model stays as it is.
    """
    weight = model.embed.weight
    fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if weight.is_cpu and weight.dtype == torch.bfloat16 and (int8 or fast):
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, Int8Linear(child) if int8 else PackedLinear(child))
    return model


class Decoder:
    """One token after another, with a batch of one, where Decoder.runs(cache).

    Replays a CUDA graph, so that a token costs no Python per layer. The length of the cache is data on the device.
    """

    @staticmethod
    def runs(cache):
        """Whether FlashAttention takes this cache: in float16 or bfloat16, on CUDA from Ampere on."""
        return cache.k.is_cuda and cache.k.dtype != torch.float32 and torch.cuda.get_device_capability(cache.k.device) >= (8, 0)

    def __init__(self, model, cache):
        self.model, self.cache, self.graph = model, cache, None
        self.token, self.place = torch.zeros(2, 1, dtype=torch.long, device=cache.k.device)  # (1,), (1,)
        # Where rows (0 to 1) and keys (0 to the length) begin and end, as the kernel for rows of different lengths has it.
        self.ends = torch.tensor([[0, 1], [0, 0]], dtype=torch.int32, device=cache.k.device)

    @torch.inference_mode()
    def __call__(self, token):
        """A token goes behind the cache and sees all of it -> the logits (V,), to be read before the next call."""
        place, size = self.cache.length, self.model.config.block_size
        if place >= size:
            raise ValueError(f"{place + 1} tokens do not fit into the context of {size}")
        for slot, value in ((self.token, token), (self.place, place), (self.ends[1, 1], place + 1)):
            slot.fill_(value)  # a copy from the host would make it wait
        if self.graph is None:
            self.capture()
        self.graph.replay()
        self.cache.length += 1
        return self.logits

    def step(self):
        return self.model.layers(self.token[None], self.ends, self.cache, self.place, self.model.config.block_size)[0, 0]

    def capture(self):
        stream = torch.cuda.Stream()  # the first run sets up the libraries, which must not be captured
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.step()
