"""Files that are damaged or hostile: each reader gives what it should, or one ValueError."""
import base64
import copy
import functools
import json
import math
import pathlib
import pickle
import re
import shutil
import struct
import unicodedata
import zipfile
from dataclasses import asdict
from datetime import timedelta

import pytest
import torch
from helpers import (
    TOKENIZER,
    change_json,
    make_chat,
    peak_memory,
    read_safetensors,
    run,
    write_lines,
    write_safetensors,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("resource", reason="it counts memory on Linux and macOS")

from data.chats import read_chats
from data.checkpoint import load_checkpoint, load_state, restore, save_checkpoint
from data.hf import from_pretrained, load_tokenizer, read_config, save_pretrained
from data.hf.tokenizer import SYMBOLS
from data.machine import one_line
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig
from sample import go_on, load_chat, read_history
from train import Settings, make_optimizer

HOSTILE = [
    "", "\x00", "\x1b[2J", "\ud800", "<|end|>", "../x", -1, 0, 1, 2**31, 2**63, 10**30, 1e308,
    math.inf, math.nan, True, None, [], {}, [[]],
]
VALUES = st.recursive(
    st.sampled_from(HOSTILE) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
KINDS = st.sampled_from(("set", "cut", "insert", "repeat", "drop"))
BYTES = st.tuples(KINDS, st.floats(0, 1), st.binary(min_size=1, max_size=9))
TREES = st.tuples(st.sampled_from(("set", "drop", "copy")), st.integers(0, 10**6), VALUES)
CHANGES = st.one_of(
    st.tuples(st.just("bytes"), st.lists(BYTES, min_size=1, max_size=4)),
    st.tuples(st.just("tree"), st.lists(TREES, min_size=1, max_size=3)),
)


def mutate_bytes(raw, changes):
    for kind, where, new in changes:
        i = int(where * len(raw))
        n = len(new) ** 2  # how much is repeated or dropped
        raw = {
            "set": raw[:i] + new + raw[i + len(new) :],
            "cut": raw[:i],
            "insert": raw[:i] + new + raw[i:],
            "repeat": raw[: i + n] + raw[i:],
            "drop": raw[:i] + raw[i + n :],
        }[kind]
    return raw


def mutate_tree(tree, changes):
    """Change, drop or copy nodes of nested dicts and lists, in a copy."""
    tree = [copy.deepcopy(tree)]
    for kind, number, value in changes:
        nodes, todo = [], [tree]
        while todo:
            parent = todo.pop()
            for key in parent if isinstance(parent, dict) else range(len(parent)):
                nodes.append((parent, key))
                if isinstance(parent[key], (dict, list)):
                    todo.append(parent[key])
        if not nodes:
            break
        parent, key = nodes[number % len(nodes)]
        if kind == "set" or parent is tree:
            parent[key] = copy.deepcopy(value)
        elif kind == "drop":
            del parent[key]
        elif isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        else:
            parent[f"{key}x"] = copy.deepcopy(parent[key])
    return tree[0]


CONFIG = dict(
    architectures=["LlamaForCausalLM"], vocab_size=270, hidden_size=8, intermediate_size=12,
    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    rms_norm_eps=1e-5, rope_theta=1e4,
)
MERGES = ["h e", "l l", "he ll"]
VOCABULARY = {token: i for i, token in enumerate([*SYMBOLS, "he", "ll", "hell"])}
ADDED = [
    {"id": 260, "content": "<|im_start|>", "special": True},
    {"id": 261, "content": "<|im_end|>", "special": True},
    {"id": 262, "content": "<think>", "special": False},
]


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


def write_folder(folder):
    """A checkpoint folder in the Hugging Face format, of a tiny random model."""
    torch.manual_seed(0)
    (folder / "source").mkdir()
    write_json(folder / "source" / "config.json", CONFIG)
    save_pretrained(GPT(read_config(folder / "source")), folder / "source", folder)
    shutil.rmtree(folder / "source")
    write_json(folder / "config.json", CONFIG)
    split = {
        "type": "Split",
        "pattern": {"Regex": r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    write_json(folder / "tokenizer.json", {
        "model": {"type": "BPE", "vocab": VOCABULARY, "merges": MERGES},
        "added_tokens": ADDED,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"pretokenizers": [split, byte_level]},
    })


def write_vocab(folder):
    write_folder(folder)
    (folder / "tokenizer.json").unlink()
    write_json(folder / "vocab.json", VOCABULARY)
    write_lines(folder / "merges.txt", ["#version: 0.2", *MERGES])
    added = {str(token["id"]): token for token in ADDED}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": added})


def write_rank_model(folder):
    write_folder(folder)
    (folder / "tokenizer.json").unlink()
    ranks = {bytes([b]): b for b in range(256)} | {b"he": 256}
    lines = [base64.b64encode(token) + b" %d\n" % i for token, i in ranks.items()]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))


def one_step(model, optimizer):
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    optimizer.step()


@functools.cache
def tiny_state():
    sizes = dict(n_layer=1, n_head=2, n_kv_head=1, n_embd=8, n_hidden=8)
    config = GPTConfig(TOKENIZER.vocab_size, block_size=32, token_shift=True, **sizes)
    torch.manual_seed(0)
    model = GPT(config)
    optimizer = make_optimizer(model, Settings())
    one_step(model, optimizer)
    return dict(
        config=asdict(config),
        settings=asdict(Settings()),
        tokenizer=TOKENIZER.identity,
        model=dict(model.state_dict()),
        optimizer=optimizer.state_dict(),
        step=3,
    )


def write_checkpoint(folder):
    save_checkpoint(folder / "ckpt.pt", **tiny_state())


def chats():
    for i in range(4):
        texts = {"system": "Be kind.", "user": f"héllo {i}", "assistant": "yes"}
        yield {"messages": [{"role": role, "content": text} for role, text in texts.items()]}


def use(tokenizer):
    """What must hold of a tokenizer that could be read at all."""
    query = {"role": "user", "content": "héllo 12\x00 <|im_end|><|end|>"}
    tokens, _ = tokenizer.encode_dialogue([query, {"role": "assistant", "content": "x"}])
    assert tokens.count(tokenizer.end) == 2 + tokenizer.after.count(tokenizer.end)
    assert isinstance(tokenizer.decode(tokens), str)


def read_checkpoint(folder):
    load_chat(folder / "ckpt.pt", "cpu", "float32", max_new_tokens=2, temperature=1.0).send("hi")


def resume(folder):
    path, config = folder / "ckpt.pt", GPTConfig(**tiny_state()["config"])
    model = GPT(config)
    optimizer = make_optimizer(model, Settings())
    asked = {**asdict(config), "tokenizer": TOKENIZER.identity, "mask": "ism"}
    state = load_state(path, asked)
    step = restore(state, model, optimizer, 4000, path)
    assert 0 <= step <= 4000
    one_step(model, optimizer)


def read_jsonl(folder):
    for messages in read_chats(folder / "chats.jsonl"):
        TOKENIZER.encode_dialogue(messages)


def read_saved(folder):
    chat = CHAT[0]
    go_on(chat, read_history(folder / "history.json"))
    chat.send("hi")


CHAT = [make_chat(block_size=64, max_new_tokens=2)]


def write_jsonl(folder):
    write_lines(folder / "chats.jsonl", map(json.dumps, chats()))


def write_history(folder):
    write_json(folder / "history.json", next(chats()))


def read_config_and_tokenizer(folder):
    from_pretrained(folder)
    load_tokenizer(folder)


def read_tokenizer(folder):
    use(load_tokenizer(folder))


# Reader: what makes its sound files, the file that is changed, and the reading.
READERS = {
    "checkpoint": (write_checkpoint, "ckpt.pt", read_checkpoint),
    "resume": (write_checkpoint, "ckpt.pt", resume),
    "chats": (write_jsonl, "chats.jsonl", read_jsonl),
    "history": (write_history, "history.json", read_saved),
    "safetensors": (write_folder, "model.safetensors", from_pretrained),
    "config": (write_folder, "config.json", read_config_and_tokenizer),
    "tokenizer": (write_folder, "tokenizer.json", read_tokenizer),
    "vocab": (write_vocab, "vocab.json", read_tokenizer),
    "merges": (write_vocab, "merges.txt", read_tokenizer),
    "added tokens": (write_vocab, "tokenizer_config.json", read_tokenizer),
    "rank model": (write_rank_model, "tokenizer.model", read_tokenizer),
}


def damaged(path, sound, changes, how):
    """Write the sound file's content to path, changed as bytes or as what it holds."""

    def changed_lines(lines):
        changed = mutate_tree(lines, changes)
        return changed if isinstance(changed, list) else [changed]

    if how == "bytes":
        path.write_bytes(mutate_bytes(sound, changes))
    elif path.name == "ckpt.pt":
        torch.save(mutate_tree({"version": 1, **tiny_state()}, changes), path)
    elif path.name == "model.safetensors":
        path.write_bytes(sound)
        header, numbers = read_safetensors(path)
        write_safetensors(path, mutate_tree(header, changes), numbers)
    elif path.suffix == ".json":
        write_json(path, mutate_tree(json.loads(sound), changes))
    elif path.suffix == ".jsonl":
        lines = changed_lines([json.loads(line) for line in sound.decode().splitlines()])
        write_lines(path, map(json.dumps, lines))
    else:  # lines of text
        text = "\n".join(map(str, changed_lines(sound.decode().split("\n"))))
        path.write_text(text, encoding="utf-8", errors="surrogatepass")


def fuzz(name, folder, n):
    """Read n damaged files. Returns how many were refused."""
    make, file, read = READERS[name]
    make(folder)
    sound, before = (folder / file).read_bytes(), sorted(folder.iterdir())
    read(folder)
    refused = []

    @settings(
        max_examples=n,
        deadline=timedelta(seconds=20),
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=n < 1000,  # the short count is the same each time
    )
    @given(CHANGES)
    def read_one(change):
        how, changes = change
        damaged(folder / file, sound, changes, how)
        try:
            read(folder)
        except ValueError as error:
            refused.append(1)
            line = one_line(error)
            assert line and line == line.strip()
            assert not {unicodedata.category(c) for c in line} & {"Cc", "Cs", "Cn", "Zl", "Zp"}
        assert sorted(folder.iterdir()) == before

    read_one()
    return len(refused)


@pytest.mark.parametrize("name", READERS)
def test_damaged_files(name, tmp_path):
    assert fuzz(name, tmp_path, 60) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_10_000_damaged_files(name, tmp_path):
    print(f"{name}: {fuzz(name, tmp_path, 10_000)} refused")


class Command:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_a_pickle_does_not_run(tmp_path):
    path, made = tmp_path / "ckpt.pt", tmp_path / "made"
    pickle.loads(pickle.dumps(Command(made)))
    assert made.exists()
    made.unlink()
    sound = {"version": 1, **tiny_state()}
    hostile = [Command(made), *({**sound, key: Command(made)} for key in ("step", "model"))]
    ways = (
        lambda state: torch.save(state, path),
        lambda state: torch.save(state, path, _use_new_zipfile_serialization=False),
        lambda state: path.write_bytes(pickle.dumps(state)),
    )
    for state in hostile:
        for write in ways:
            write(state)
            with pytest.raises(ValueError, match="not a checkpoint"):
                load_checkpoint(path)
            assert not made.exists()


def compressed(folder):
    """A checkpoint of some kB that holds a tensor of 1 GB."""
    torch.save({"version": 1, **tiny_state(), "step": torch.zeros(1000)}, folder / "plain")
    with (
        zipfile.ZipFile(folder / "plain") as plain,
        zipfile.ZipFile(folder / "ckpt.pt", "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for entry in plain.infolist():
            with archive.open(entry.filename, "w") as file:
                content = plain.read(entry)
                pieces = [bytes(1 << 20)] * 1000 if len(content) == 4000 else [content]
                file.writelines(pieces)
    (folder / "plain").unlink()


def expanded(folder):
    """A checkpoint whose vocabulary is one row, said to be there a million times."""
    state, n = tiny_state(), 1 << 20
    model = dict(state["model"])
    for name, x in model.items():
        if len(x) == TOKENIZER.vocab_size:
            model[name] = x[:1].expand(n, -1)
    config = {**state["config"], "vocab_size": n}
    torch.save({"version": 1, **state, "config": config, "model": model}, folder / "ckpt.pt")


def beyond(folder):
    write_folder(folder)
    header, _ = read_safetensors(folder / "model.safetensors")
    header["model.norm.weight"] = {"dtype": "F32", "shape": [1 << 50], "data_offsets": [0, 4 << 50]}
    write_safetensors(folder / "model.safetensors", header, bytes(1000))


def claims(**options):
    """A checkpoint whose config says so."""

    def write(folder):
        state = tiny_state()
        config = {**state["config"], **options}
        torch.save({"version": 1, **state, "config": config}, folder / "ckpt.pt")

    return write


def changed(name, change):
    """A folder of which one JSON file is changed."""

    def write(folder):
        write_folder(folder)
        change_json(folder / name, change)

    return write


def hf_claims(**options):
    return changed("config.json", lambda config: config.update(options))


def rank_lines(change):
    def write(folder):
        write_rank_model(folder)
        path = folder / "tokenizer.model"
        path.write_bytes(b"\n".join(change(path.read_bytes().splitlines())))

    return write


def long_line(folder):
    with open(folder / "chats.jsonl", "w", encoding="utf-8") as file:
        file.write('{"messages": [{"role": "user", "content": "')
        for _ in range(100):
            file.write("x" * 1_000_000)
        file.write('"}]}\n')


def empty_token(held):
    held["added_tokens"].append({"id": 263, "content": "", "special": True})


def test_no_file_lets_text_end_a_turn(tmp_path):
    """A tokenizer whose files call all its special tokens ordinary ones."""
    for write, name in ((write_folder, "tokenizer.json"), (write_vocab, "tokenizer_config.json")):
        folder = tmp_path / name
        folder.mkdir()
        write(folder)
        content = (folder / name).read_text().replace('"special": true', '"special": false')
        (folder / name).write_text(content)
        tokenizer = load_tokenizer(folder)
        use(tokenizer)
        ids = {tokenizer.end, tokenizer.headers["user"]}
        assert not ids & {*tokenizer.encode("<|im_start|>user<|im_end|>")}
        assert len(tokenizer.encode("<think>")) == 1


def long_header(folder):
    write_folder(folder)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")


def deep_line(folder):
    (folder / "chats.jsonl").write_text("[" * 1_000_000)


# File: what makes it, the reading, and what the error says.
HOSTILE_FILES = {
    "compressed": (compressed, read_checkpoint, "not a checkpoint"),
    "claimed layers": (claims(n_layer=10**12), read_checkpoint, "not a checkpoint"),
    "claimed width": (claims(n_embd=10**6), read_checkpoint, "holds other weights"),
    "claimed context": (claims(block_size=10**12), read_checkpoint, "not a checkpoint"),
    "expanded": (expanded, read_checkpoint, "not a checkpoint"),
    "long header": (long_header, from_pretrained, "cut off"),
    "beyond the end": (beyond, from_pretrained, "cut off"),
    "HF layers": (hf_claims(num_hidden_layers=10**12), from_pretrained,
                  "10+ layers, the weights are"),
    "HF context": (hf_claims(max_position_embeddings=10**12), from_pretrained, "block_size"),
    "HF vocabulary": (hf_claims(vocab_size=10**12), load_tokenizer, "vocab_size"),
    "HF empty token": (changed("tokenizer.json", empty_token), load_tokenizer, "a token is empty"),
    "long line": (long_line, read_jsonl, "line 1 is longer than"),
    "deep line": (deep_line, read_jsonl, "line 1 is not JSON"),
    "rank twice": (rank_lines(lambda lines: lines + [b"enp6eg== 7"]), read_tokenizer, "twice"),
    "token twice": (rank_lines(lambda lines: lines + [lines[0].split()[0] + b" 257"]),
                    read_tokenizer, "twice"),
    "rank of a trillion": (rank_lines(lambda lines: lines + [b"enp6eg== 1000000000000"]),
                           read_tokenizer, "left out"),
    "byte without a rank": (rank_lines(lambda lines: lines[1:]), read_tokenizer, "left out"),
}


def read_hostile(name, folder):
    """Read it in a process of its own. Prints the error, and by how many MB the peak grew."""
    make, read, _ = HOSTILE_FILES[name]
    make(folder)
    use(Tokenizer())
    held, before = sorted(folder.iterdir()), peak_memory()
    try:
        read(folder)
    except ValueError as error:
        print(one_line(error))
    assert sorted(folder.iterdir()) == held
    print(f"{peak_memory() - before:.0f}")


# Reads the files that stand in a folder of sys.argv, as a program of its own.
READ_ALL = """
import pathlib, sys
sys.path.insert(0, "tests")
import test_damaged_files
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    test_damaged_files.read_hostile(folder.name, folder)
"""


def test_hostile_files(tmp_path):
    """In one process, so that memory is counted from what torch alone needs."""
    for name in HOSTILE_FILES:
        (tmp_path / name).mkdir()
    done = run("-c", READ_ALL, str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for name, message, growth in zip(sorted(HOSTILE_FILES), lines[::2], lines[1::2], strict=True):
        assert re.search(HOSTILE_FILES[name][2], message), (name, message)
        assert int(growth) < 80, (name, growth)


def test_a_long_query_is_refused_by_its_bytes(monkeypatch):
    """The tokenizer does not see a line of 1 MB without a space."""
    chat = make_chat(block_size=64)
    monkeypatch.setattr(chat.tokenizer, "encode", None)
    for text in ("x" * 1_000_000, "\U0001f600" * 250_000, "\ud800" * 1_000_000):
        with pytest.raises(ValueError, match="too long"):
            chat.send(text)
