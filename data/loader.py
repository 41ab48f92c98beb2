"""
Dialogues on disk and in batches.

`prepare` writes each split once as flat integer arrays, `Split` maps them into memory, `Split.batches`
sorts by length so that little is padded, and never packs two dialogues into one row.
"""
import hashlib
import json
import os
import pathlib
import shutil
from array import array

import numpy as np
import torch
from tqdm import tqdm

from data import dialogues, talk, words
from data.tokenizer import ROLES
from mask import one_pass

LONGEST_LINE = 1 << 24  # bytes of a dialogue in JSON, so that a file without line breaks cannot fill the memory
# ShareGPT's names of the roles; what a tool returns is given to the model, as what a user says is.
ALIASES = {"human": "user", "gpt": "assistant", "tool": "user", "function": "user", "observation": "user", "function_call": "assistant"}
CACHE = pathlib.Path(__file__).parent / "cache"


def well_formed(messages):
    """True for a list of one message or more, each {"role": system, user or assistant, "content": str}."""
    return isinstance(messages, list) and len(messages) > 0 and all(
        isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str) for m in messages)


def read_chats(path):
    """Yield the messages of each line of a JSONL file, {"messages": [{"role", "content"}, ...]} or ShareGPT's {"conversations": [{"from", "value"}, ...]}.

    ValueError names the file and the line that is not of this form.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
            if len(line) > LONGEST_LINE:
                raise ValueError(f"{path}, line {number} is longer than {LONGEST_LINE:,} bytes; put each dialogue on a line of its own")
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
                if "messages" in record:
                    said = [(m["role"], m["content"]) for m in record["messages"]]
                else:
                    said = [(m["from"], m["value"]) for m in record["conversations"]]
                messages = [{"role": ALIASES.get(role, role), "content": text} for role, text in said]
            except (ValueError, KeyError, TypeError, RecursionError):
                messages = None
            if not well_formed(messages):
                start = line.strip()[:80].decode("utf-8", "replace")
                raise ValueError(f'{path}, line {number}: expected {{"messages": [{{"role": "system", "user" or "assistant", '
                                 f'"content": "text"}}, ...]}}, got {start}')
            yield messages


# How many dialogues are held out of the synthetic ones, at most as many as there are to train on.
HELD_OUT = {"val": 1000, "test": 2000, "new_words": 1000, "final_words": 1000}


def sources(data, n_dialogues, seed, mixed, families):
    """(how many dialogues, an iterator over them, each a split's name and a dialogue)."""
    if not data:
        sizes = {"train": n_dialogues, **{split: min(n, n_dialogues) for split, n in HELD_OUT.items()}}
        return sum(sizes.values()), dialogues.deal(sizes, seed, families, mixed)
    chats = list({json.dumps(messages): {"messages": messages, "family": "chats"} for messages in read_chats(data)}.values())
    if len(chats) < 3:
        raise ValueError(f"{data} has {len(chats)} different dialogues; at least 3 are needed, to train, tune and test on")
    chats.sort(key=lambda chat: hashlib.sha256(json.dumps(chat).encode()).digest())  # an order that is not the file's
    n = max(1, min(1000, len(chats) // 20))
    splits = ["val"] * n + ["test"] * n + ["train"] * (len(chats) - 2 * n)
    return len(chats), zip(splits, chats)


def prepare(tokenizer, block_size, data="", n_dialogues=0, seed=0, mixed=False, families=tuple(dialogues.FAMILIES)):
    """Write the splits to data/cache, unless they are there already, and return their folder.

    data: a JSONL file of chats, or "" for n_dialogues synthetic dialogues of these families, mixed as data/dialogues.py
    says. Dialogues longer than block_size are cut after the last answer that fits; those without one are dropped.
    ValueError for a bad file.
    """
    key = hashlib.sha256(repr((tokenizer.identity, block_size, bool(data), n_dialogues, seed, mixed, families)).encode())
    for path in [data] if data else [dialogues.__file__, talk.__file__, words.__file__]:
        with open(path, "rb") as origin:
            for part in iter(lambda: origin.read(1 << 20), b""):
                key.update(part)
    folder = CACHE / key.hexdigest()[:16]
    if folder.exists():
        return folder
    CACHE.mkdir(exist_ok=True)
    partial = CACHE / f"{folder.name}.{os.getpid()}"  # renamed when whole, so that a broken run leaves no cache
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_splits(partial, tokenizer, block_size, *sources(data, n_dialogues, seed, mixed, families))
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.exists():  # it does if another run was faster
            raise
    return folder


def write_splits(folder, tokenizer, block_size, n, items):
    """Encode n items, each a split's name and a dialogue, into a new folder, see `prepare`."""
    folder.mkdir()
    encoded = {}  # split -> tokens, segments, offsets, families
    cut = dropped = 0
    for split, item in tqdm(items, total=n, desc="prepare", unit=" dialogues", leave=False):
        tokens, segments, offsets, families = encoded.setdefault(split, (array("I"), array("H"), [0], []))
        t, s = tokenizer.encode_dialogue(item["messages"])
        if len(t) > block_size or max(s, default=0) < 2:
            ends = [i for i in range(1, min(len(t), block_size + 1)) if s[i - 1] % 2 == 0 and s[i] != s[i - 1]]
            cut, dropped = cut + bool(ends), dropped + (not ends)
            t, s = t[: max(ends, default=0)], s[: max(ends, default=0)]
        if t:
            tokens.extend(t)
            segments.extend(s)
            offsets.append(len(tokens))
            families.append(item["family"])
    if not encoded["train"][3]:
        raise ValueError(f"none of the dialogues to train on has an answer that fits into {block_size} tokens; raise --block_size")
    for split, (tokens, segments, offsets, families) in encoded.items():
        names = sorted(set(families))
        np.save(folder / f"{split}.tokens.npy", np.array(tokens, dtype=np.uint32))
        np.save(folder / f"{split}.segments.npy", np.array(segments, dtype=np.uint16))
        np.save(folder / f"{split}.offsets.npy", np.array(offsets, dtype=np.int64))
        np.save(folder / f"{split}.families.npy", np.array([names.index(f) for f in families], dtype=np.uint8))
        (folder / f"{split}.json").write_text(json.dumps(names), encoding="utf-8")
    if cut or dropped:
        print(f"{cut} dialogues were cut to {block_size} tokens at the end of an answer, {dropped} had no answer that fits and were left out")


def padded_length(length):
    """Rows of 80 tokens and more are padded to a multiple of 8: kernels are prepared once for each shape."""
    return length if length < 80 else -(-length // 8) * 8


class Split:
    """One split in memory-mapped arrays: tokens and segments (N,), offsets (dialogues + 1,)."""

    def __init__(self, folder, name):
        self.tokens, self.segments, self.offsets, self.families = (
            np.load(folder / f"{name}.{part}.npy", mmap_mode="r") for part in ("tokens", "segments", "offsets", "families"))
        self.family_names = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))

    def rows(self, mask):
        """(rows, 3) dialogue, start, end: one row a dialogue, or one a turn if the mask needs the triplets."""
        first, last = self.offsets[:-1], self.offsets[1:]
        if one_pass(mask):
            return np.stack([np.arange(len(first)), first, last], 1)
        segments = np.asarray(self.segments)
        change = np.append(segments[1:] != segments[:-1], True)
        change[last - 1] = True
        ends = np.flatnonzero(change & (segments % 2 == 0)) + 1  # the end of each answer
        dialogue = np.searchsorted(last, ends)
        return np.stack([dialogue, first[dialogue], ends], 1)

    def batches(self, rows, n_tokens, seed):
        """Cut the rows into batches of at most n_tokens (one row at least) and 10 % padding, in random order."""
        rng = np.random.default_rng(seed)
        lengths = rows[:, 2] - rows[:, 1]
        order = np.argsort(lengths + rng.random(len(lengths)))  # by length, ties at random
        cuts, start, real = [], 0, 0
        for i, length in enumerate(lengths[order].tolist()):
            padded = (i - start + 1) * padded_length(length)
            if i > start and (padded > n_tokens or real + length < 0.9 * padded):
                cuts.append(order[start:i])
                start, real = i, 0
            real += length
        cuts.append(order[start:])
        return [rows[cuts[i]] for i in rng.permutation(len(cuts))]

    def collate(self, rows):
        """Rows -> tokens (B, T) int64, segments (B, T) int64, padded with 0 on the right."""
        T = padded_length(int((rows[:, 2] - rows[:, 1]).max()))
        tokens, segments = np.zeros((2, len(rows), T), dtype=np.int64)
        for i, (_, start, end) in enumerate(rows.tolist()):
            tokens[i, : end - start] = self.tokens[start:end]
            segments[i, : end - start] = self.segments[start:end]
        return torch.from_numpy(tokens), torch.from_numpy(segments)
