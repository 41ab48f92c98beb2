"""
What ISM costs beside causal, and how fast a chat writes.

The claim of the paper: the latency of causal, since a turn is encoded once and the KV cache
survives. Everything is measured in turns (A, B, A, B, ...) in one run, since the speed of a shared
machine changes within minutes. A ratio is that of medians, beside it the quartiles of the ratios
turn by turn.

    python demos/speed.py                   under 3 minutes on 2 cores
    python demos/speed.py --quick           under a minute, less exact
    python demos/speed.py --transformers    and beside `generate` of transformers, 1 minute more
    python demos/speed.py --real FOLDER     and a real model, of demos/real.py: 2 minutes more
"""
import functools
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import hf, machine
from data.loader import Split, prepare
from data.machine import setting
from data.tokenizer import Tokenizer
from demos.output import check_writable, color, dashes, describe, picture, plt, save
from mask import MASKS, causal, ism
from model import GPT, Cache, GPTConfig, faster, fastest_attention
from sample import DTYPES, Chat, stored
from train import Settings, make_optimizer, train

SHAPES = {  # of decoding: on a CPU a small model, on a GPU one of the 1B class
    "cpu": {
        "vocab_size": 1280, "block_size": 512, "n_layer": 6, "n_head": 6, "n_kv_head": 6,
        "n_embd": 384, "n_hidden": 1024,
    },
    "cuda": {
        "vocab_size": 128256, "block_size": 2048, "n_layer": 16, "n_head": 32, "n_kv_head": 8,
        "n_embd": 2048, "n_hidden": 8192,
    },
}


@dataclass
class Speed:
    """What is measured. Each field is a flag of the command line."""

    device: str = setting("auto", "cpu, cuda")
    dtype: str = setting("auto", "of the computation in training", machine.DTYPES)
    quick: bool = setting(False, "fewer repeats")
    transformers: bool = setting(False, "beside transformers (1 minute)")
    real: str = setting("", "the folder of a real model to decode (2 minutes)")
    out: str = setting(picture("speed"), "the picture")

    def __post_init__(self):
        if self.real and not Path(self.real, "config.json").exists():
            raise ValueError(f"--real {self.real} is no folder that demos/real.py has written")
        self.device = machine.pick_device(self.device)
        self.dtype = machine.pick_dtype(self.dtype, self.device)

    def repeats(self, n):
        return max(2, n // 6) if self.quick else n


# --- measuring ----------------------------------------------------------------------------------


def in_turns(calls, repeats, device):
    """Run each call `repeats` times in turns -> {name: seconds of each}, the first not counted."""
    seconds = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = machine.clock(device)
            call()
            if turn > 0:
                seconds[name].append(machine.clock(device) - start)
    return seconds


def ratio(seconds, name, base):
    """How many times as long as base: the ratio of medians, quartiles of the single ratios."""
    single = [a / b for a, b in zip(seconds[name], seconds[base])]
    quartiles = statistics.quantiles(single, n=4)[::2] if len(single) > 1 else single * 2
    median = statistics.median(seconds[name])
    return {
        "ratio": median / statistics.median(seconds[base]), "quartiles": quartiles,
        "seconds": median,
    }


# --- training -----------------------------------------------------------------------------------


class Some(Split):
    """The first n dialogues of a split."""

    def __init__(self, split, n):
        self.offsets = np.array(split.offsets[: n + 1])
        self.tokens = np.array(split.tokens[: self.offsets[-1]])
        self.segments = np.array(split.segments[: self.offsets[-1]])
        self.families, self.family_names = split.families[:n], split.family_names


def training(a):
    """A pass of training over the same dialogues under each mask; for prefix a copy a turn."""
    s = Settings(n_dialogues=400, device=str(a.device), dtype=str(a.dtype)[6:])
    tokenizer = Tokenizer(s.tokenizer)
    split = Split(prepare(tokenizer, s.block_size, n_dialogues=s.n_dialogues), "train")
    some = Some(split, 30 if a.quick else 120)
    splits = {"train": some, "test": Some(some, 1)}
    seconds = {name: [] for name in ("causal", "ism", "prefix")}
    for turn in range(a.repeats(20) + 1):
        # In alternating order: what runs after a long pass is some 3 % slower or faster.
        for name in list(seconds)[:: (-1) ** turn]:
            n_tokens = s.batch_size * s.block_size
            steps = len(some.batches(some.rows(MASKS[name]), n_tokens, (0, 0)))
            ends = []

            def watch(run, _, ends=ends):
                if run.step == run.s.max_iters:
                    machine.clock(run.device)  # waits for a GPU
                    ends.append(time.time() - run.since)

            train(Settings(**{**vars(s), "mask": name, "max_iters": steps}), None, splits, watch)
            if turn > 0:
                seconds[name].append(ends[-1])
    tokens = int(some.offsets[-1])
    return {
        name: {**ratio(seconds, name, "causal"), "tokens/s": tokens / statistics.median(times)}
        for name, times in seconds.items()
    }


def by_length(a):
    """Forward and backward of attention alone, ISM over causal, in segments of up to 200 tokens."""
    lengths = (256, 1024) if a.device.type == "cpu" else (256, 1024, 4096, 8192)
    results = {}
    for T in lengths[: 1 if a.quick else None]:
        segments = (torch.arange(T) // min(200, T // 4) + 1)[None]
        shape = 4, 1, 4, T, 64  # queries, keys, values, and the gradient of what comes out
        *qkv, seed = torch.randn(shape, device=a.device, dtype=a.dtype).requires_grad_()

        def both_ways(attend, qkv=qkv, seed=seed):
            return torch.autograd.grad(attend(*qkv), qkv, seed)

        calls = {}
        for mask in (causal, ism):
            attend = fastest_attention(mask(segments), T, a.device)
            calls[mask.__name__] = functools.partial(both_ways, attend)
        results[T] = ratio(in_turns(calls, a.repeats(20), a.device), "ism", "causal")
    return results


# --- chat ---------------------------------------------------------------------------------------


def first_tokens(a):
    """Seconds to the first token at each turn of a chat, all queries and answers equally long."""
    turns, query = (4 if a.quick else 20), "My name is Anna and I live in Rome. " * 4
    tokenizer = Tokenizer()
    config = GPTConfig(tokenizer.vocab_size, 4096, n_layer=4, n_head=4, n_embd=256, n_hidden=512)
    torch.manual_seed(0)
    model = faster(stored(GPT(config), a.device, "auto").eval())
    ways = {"causal": "causal", "ism": "ism", "prefix": "prefix", "ism, no cache": "ism"}
    seconds = {way: [[] for _ in range(turns)] for way in ways}
    for _ in range(a.repeats(4)):
        chats = {
            way: Chat(model, tokenizer, MASKS[name], max_new_tokens=20)
            for way, name in ways.items()
        }
        for chat in chats.values():  # <|end|> is never sampled, so an answer has 20 tokens
            chat.silent = torch.cat([chat.silent, chat.silent.new_tensor([tokenizer.end])])
        for turn in range(turns):
            for way, chat in chats.items():
                if way == "ism, no cache":
                    chat.f = chat.f[:, :0]
                chat.send(query)
                seconds[way][turn].append(chat.stats["prefill s"])
    return {way: [statistics.median(turn) for turn in found] for way, found in seconds.items()}


def writer(model, n):
    """A call that writes n tokens after a prompt of 16, greedily, with a batch of one."""
    device = model.norm.weight.device
    prompt = torch.ones(1, 16, dtype=torch.long, device=device)
    cache = Cache(model.config, device=device, dtype=model.norm.weight.dtype)
    read_one = faster(model.eval()).reader(model, cache)

    @torch.inference_mode()
    def call():
        cache.length = 0
        token = int(model(prompt, None, cache)[0, -1].argmax())
        for _ in range(n - 1):
            token = int(read_one(token).argmax())

    return call


def generate(model, n):
    """The same by transformers: its `generate` with its cache."""
    model = model.eval()
    prompt = torch.ones(1, 16, dtype=torch.long, device=model.device)
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(prompt, max_new_tokens=n, min_new_tokens=n, **options)


def llama(config):
    """A random LLaMA of transformers with the sizes of a config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=config.n_hidden,
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head, tie_word_embeddings=True, eos_token_id=None,
        pad_token_id=0, max_position_embeddings=config.block_size,
    ))


def by_kind(a, make, theirs, n, repeats):
    """Tokens a second for each `--dtype` of sample.py, a batch of one; beside transformers.

    make, theirs: functions that make the model of nanoISM and that of transformers.
    """
    kinds = DTYPES if a.device.type == "cpu" else ("bfloat16",)
    calls = {kind: writer(stored(make(), a.device, kind), n) for kind in kinds}
    if a.transformers:
        calls["transformers"] = generate(theirs(), n)
    seconds = in_turns(calls, a.repeats(repeats), a.device)
    figures = {"tokens/s": {name: n / statistics.median(times) for name, times in seconds.items()}}
    if a.transformers:
        figures["times as fast as transformers in float32"] = {
            kind: ratio(seconds, "transformers", kind) for kind in kinds
        }
    return figures


def decoding(a):
    """A random model in each kind of weights."""
    config = GPTConfig(**SHAPES[a.device.type])
    return by_kind(a, lambda: GPT(config), lambda: llama(config), a.repeats(32), 12)


def real(a):
    """A real model in each kind of weights."""
    def theirs():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(a.real, dtype=torch.float32)
        model.generation_config.eos_token_id = None
        return model

    return by_kind(a, lambda: hf.from_pretrained(a.real, 512), theirs, a.repeats(32), 6)


# --- a large model on CUDA ---------------------------------------------------------------------


def large(a):
    """A compiled training step of a 124M model on CUDA, ISM over causal."""
    B, T = 16, 1024
    config = GPTConfig(vocab_size=50304, block_size=T, n_layer=12, n_head=12, n_kv_head=12,
                       n_embd=768, n_hidden=2048)
    tokens = torch.randint(0, config.vocab_size, (B, T), device=a.device)
    segments = (torch.arange(T) // 75 + 1)[None].expand(B, T)
    with torch.device(a.device):
        model = faster(GPT(config), a.dtype)
    optimizer = make_optimizer(model, Settings(muon=False))

    @torch.compile
    def loss_of(logits):
        logits = logits.float().flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, tokens.flatten())

    model.layers = torch.compile(model.layers)

    def step(f):
        with machine.autocast(a.device, a.dtype):
            logits = model(tokens, f)
        loss_of(logits).backward()
        optimizer.step()
        optimizer.zero_grad()

    calls = {mask.__name__: functools.partial(step, mask(segments)) for mask in (causal, ism)}
    seconds = in_turns(calls, a.repeats(20), a.device)
    return {name: ratio(seconds, name, "causal") for name in calls}


# --- what was seen ------------------------------------------------------------------------------


def flat(figures, path=""):
    """Nested figures -> (name, text) lines."""
    for name, value in figures.items():
        here = f"{path}, {name}" if path else str(name)
        if isinstance(value, dict) and "ratio" in value:
            low, high = value["quartiles"]
            rest = [f"{k} {v:,.4g}" for k, v in value.items() if k not in ("ratio", "quartiles")]
            yield here, f"{value['ratio']:.2f} ({low:.2f} to {high:.2f})   {', '.join(rest)}"
        elif isinstance(value, dict):
            yield from flat(value, here)
        elif isinstance(value, list):
            yield here, " ".join(f"{1000 * x:.1f}" for x in value) + " ms"
        elif isinstance(value, float):
            yield here, f"{value:,.4g}"
        else:
            yield here, str(value)


def draw(turns, path):
    """Time to the first token against the turn of a chat."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for way, seconds in turns.items():
        places = range(1, len(seconds) + 1)
        milliseconds = [1000 * x for x in seconds]
        name, _, no_cache = way.partition(", ")
        line = "-." if no_cache else dashes(name)
        axes.plot(places, milliseconds, line, marker=".", label=way, color=color(name))
    axes.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    axes.set(xlabel="turn of the chat", ylabel="time to the first token in ms", ylim=(0, None),
             title="A query of the same length at each turn")
    axes.legend()
    save(figure, path, 150)


def measure(a):
    """Measure all parts -> figures by name. A progress bar names the current part."""
    parts = {
        "a training pass, times causal's": training,
        "attention, ISM over causal at T": by_length,
        "first token by turn": first_tokens,
        "decoding": decoding,
    }
    if a.device.type == "cuda":
        parts["124M training step"] = large
    if a.real:
        parts["the real model"] = real
    figures = {"machine": describe(), "dtype of training": str(a.dtype)[6:]}
    bar = tqdm(parts.items(), unit="part")
    for name, part in bar:
        bar.set_description(name)
        figures[name] = part(a)
    return figures


def main():
    with machine.errors_in_one_line("--quick needs less"):
        a = machine.parse(Speed, "What ISM costs beside causal, and how fast a chat writes.")
        check_writable(a.out)
        machine.tune_cpu()
        figures = measure(a)
        print("\n".join(f"{name:60} {text}" for name, text in flat(figures)))
        draw(figures["first token by turn"], a.out)
        print(f"The picture: {a.out}")


if __name__ == "__main__":
    main()
