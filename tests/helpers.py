"""What the tests share: a tiny model and chat, random dialogues, files of chats, a naive f."""
import functools
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT
from torch.overrides import TorchFunctionMode

from data.hf import read_config, save_pretrained
from data.hf.tokenizer import SYMBOLS
from data.tokenizer import Tokenizer
from mask import MASKS, reusable
from model import GPT, Cache, GPTConfig, Replay
from sample import Chat
from train import Settings

TOKENIZER = Tokenizer()


def make_chat(mask="ism", block_size=128, seed=0, token_shift=True, **settings):
    torch.manual_seed(seed)
    config = GPTConfig(
        vocab_size=TOKENIZER.vocab_size,
        block_size=block_size,
        n_layer=2,
        n_head=2,
        n_kv_head=1,
        n_embd=32,
        n_hidden=48,
        token_shift=token_shift,
    )
    model = GPT(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    settings = {"max_new_tokens": 12, "temperature": 1.0, **settings}
    return Chat(model, TOKENIZER, MASKS[mask], **settings)


@torch.no_grad()
def check_cache(chat):
    """The cache gives what one fresh forward over the whole dialogue gives.

    After the turn, and for the next query.
    """

    def check(tokens, f, keep):
        tokens = torch.tensor([tokens])
        whole, chat.cache.length = chat.model(tokens, f)[0, -1], keep
        cached = chat.model(tokens[:, keep:], f[:, keep:], chat.cache)[0, -1]
        assert torch.allclose(cached, whole, atol=1e-4 * float(whole.abs().max()), rtol=0)

    tokens, segments = chat.layout()
    n = len(tokens)
    assert chat.cache.length == n <= chat.size and tokens[-1] == TOKENIZER.end
    assert torch.equal(chat.f, chat.mask(torch.tensor([segments])))
    check(tokens, chat.f, n - 1)
    query = TOKENIZER.encode_given([{"role": "user", "content": "so?"}])
    if n + len(query) > chat.size:
        return
    f = chat.mask(torch.tensor([segments + [segments[-1] + 1] * len(query)]))
    keep = reusable(chat.f, f)
    check(tokens + query, f, keep)
    if keep < n:  # what was written over has to be restored for the next turn
        check(tokens, chat.f, 0)
    chat.cache.length = n


def peak_memory():
    """The most memory that this process ever had, in MB. Skips the test on Windows."""
    resource = pytest.importorskip("resource", reason="Windows has no module `resource`")
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10  # macOS counts bytes, Linux kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def run(*arguments, timeout=300, **options):
    """A command of the project, as a user gives it; the timeout allows for a busy machine."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout,
        **options,
    )


SPECIAL = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


def write_lines(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def change_json(path, change):
    """Change, in place, what a file of JSON holds."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def read_safetensors(path):
    """The header and the bytes of the numbers."""
    raw = path.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def write_safetensors(path, header, numbers, pad=""):
    raw = (json.dumps(header) + pad).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + numbers)


def line_of_chat(n, words="hello"):
    query = {"role": "user", "content": f"{words} {n}"}
    answer = {"role": "assistant", "content": f"yes {n}"}
    return json.dumps({"messages": [query, answer]})


def random_chats(n, most):
    """n chats of one to three turns, a line each; up to `most` times "hello" in a query."""
    rng, lines = random.Random(0), []
    for number in range(n):
        messages = []
        for _ in range(rng.randint(1, 3)):
            words = "hello " * rng.randint(1, most)
            messages += json.loads(line_of_chat(number, words))["messages"]
        lines.append(json.dumps({"messages": messages}))
    return lines


LINE = "# ==== below this line"  # above it stands the lesson


@functools.cache
def source(name):
    """The text of one of the lessons."""
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def load(name, text, **others):
    """A module of a text, which finds the others where it imports mask and model."""
    module = types.ModuleType(f"edited_{name}")
    module.__file__ = str(ROOT / f"{name}.py")
    before = {other: sys.modules.get(other) for other in others}
    sys.modules |= {module.__name__: module, **others}
    try:
        exec(compile(text, module.__file__, "exec"), module.__dict__)
    finally:
        sys.modules |= {other: known for other, known in before.items() if known}
    return module


VARIANTS = {
    "gpt": dict(n_kv_head=4),
    "llama": dict(n_kv_head=2, tie_embeddings=False, rope_theta=500000.0),
    "qwen": dict(n_kv_head=1, qkv_bias=True),
    "shift": dict(n_kv_head=4, token_shift=True),
}


def make_model(variant="gpt", block_size=96, seed=0, n_layer=3):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=50, n_head=4, n_embd=32, n_hidden=48)
    config = GPTConfig(block_size=block_size, n_layer=n_layer, **sizes, **VARIANTS[variant])
    model = GPT(config)
    for p in model.parameters():  # larger than the initial ones, so that a wrong mask shows
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def random_dialogue(rng, longest=96, turns=4):
    """Random tokens and segments, (1, T) each. They may start with an answer, end in a query."""
    number, row = rng.randint(0, 1), []
    for _ in range(rng.randint(1, 2 * turns)):
        number += 1
        row += [number] * rng.randint(1, 9)
    row = row[:longest]
    tokens = [rng.randrange(50) for _ in row]
    return torch.tensor([tokens]), torch.tensor([row])


def naive(name, segments):
    """f of one row, a list, from the words of the definition."""
    f = []
    for j, segment in enumerate(segments):
        end = j + 1
        # The sink of ism_sink is the first token, which sees itself alone.
        if segment % 2 == 1 and (name == "ism" or name == "ism_sink" and j > 0):
            while end < len(segments) and segments[end] == segment:
                end += 1
        if name == "prefix":
            for i, other in enumerate(segments):
                if other % 2 == 1:
                    end = max(end, i + 1)
        f.append(end)
    return f


def decoded(model, tokens, f):
    """The logits (T, V) of a dialogue: Replay writes answers, a query is read in one call."""
    cache = Cache(model.config, device=tokens.device, dtype=model.embed.weight.dtype)
    cache.k.fill_(torch.nan)  # what memory happens to hold must not matter
    replay = Replay(model, cache)
    parts, T = [], tokens.shape[1]
    while cache.length < T:
        start, end = cache.length, int(f[0, cache.length])
        if end == start + 1:
            parts.append(replay(int(tokens[0, start]))[None].clone())
        else:
            parts.append(model(tokens[:, start:end], f[:, start:end], cache)[0])
    return torch.cat(parts)


def exact_attention(q, k, v, f):
    """In float64, without a library: (B, H, n, D)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    seen = torch.arange(k.shape[2], device=f.device) < f[:, None, :, None]  # (B, 1, n, S)
    scores = (q @ k.mT / q.shape[3] ** 0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v


FOLDER = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    vocab_size=260,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
)


def make_folder(folder, **options):
    """A random checkpoint in the Hugging Face format: a Qwen2.

    Its tokens are the bytes and those of ChatML.
    """
    folder.mkdir(parents=True)
    config = {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
    config |= {**FOLDER, **options}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.json").write_text(json.dumps(SYMBOLS))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokens = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
    special = {256 + i: {"content": t, "special": True} for i, t in enumerate(tokens)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": special}))
    torch.manual_seed(0)
    model = GPT(read_config(folder))
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.1)
    (folder / "source").mkdir()
    (folder / "source" / "config.json").write_text(json.dumps(config))
    save_pretrained(model, folder / "source", folder)
    shutil.rmtree(folder / "source")
    return folder


TINY = dict(
    n_dialogues=300,
    n_layer=2,
    n_head=2,
    n_embd=32,
    batch_size=2,
    block_size=256,
    eval_interval=10,
    dtype="float32",
    device="cpu",
)
# The smallest run: two steps of one block.
LEAST = {**TINY, "n_layer": 1, "n_dialogues": 30, "max_iters": 2}


def tiny(out, **changed):
    """The settings of the smallest run, some of them changed."""
    return Settings(**{**LEAST, "out_dir": str(out), **changed})


def flags_of(**settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def slots_of(state):
    """The dicts of tensors that a checkpoint holds: the model's, and one of each optimizer slot."""
    return [state["model"], *state["optimizer"]["state"].values()]


def fails(call, *arguments, **options):
    """What an error of the user's says, which is one line."""
    with pytest.raises(ValueError) as error:
        call(*arguments, **options)
    said = str(error.value)
    assert said and "\n" not in said
    return said


posix = pytest.mark.skipif(os.name != "posix", reason="as Linux and macOS have it")
USER, ANSWER = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}


class OnCpu(TorchFunctionMode):
    """What is asked of another device is done on the CPU; copies are written down."""

    def __init__(self):
        super().__init__()
        self.copies = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.pin_memory:
            return args[0]
        if function is torch.Tensor.to:
            self.copies.append(kwargs)
        here = [torch.device("cpu") if isinstance(x, torch.device) else x for x in args]
        if isinstance(kwargs.get("device"), torch.device):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return function(*here, **kwargs)
