"""
Dialogues on disk and in batches.

`prepare` writes each split once as flat integer arrays. `Split` maps them into memory, and its
`batches` have rows of like length, so that there is little padding. No row holds two dialogues.
"""
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import secrets
import shutil
import time

import numpy as np
import torch

from data.chats import read_chats
from data.checkpoint import make_folder
from data.machine import Bar
from data.synthetic import FAMILIES, deal
from mask import answer_ends, one_pass

HELD_OUT = {"val": 1000, "test": 2000, "new_words": 1000}  # dialogues of these splits, at most
FEW = 100  # of fewer chats all are trained on, since 5 % of them, held out, would show nothing
HERE = pathlib.Path(__file__).parent
CACHE = HERE / "cache"
A_DAY = 86400  # seconds


def prepare(tokenizer, block_size, data="", *, n_dialogues=0, families=tuple(FAMILIES), seed=0,
            skip_bad=False):
    """Write the splits to a cache, unless they are there already, and return their folder.

    data: a JSONL file of chats, or "" for n_dialogues synthetic dialogues of these families.
    A dialogue longer than block_size ends with the last answer that fits. One in which none fits is
    left out. skip_bad: go on without bad lines. ValueError for a bad file, or if none is left.
    """
    if data and os.path.exists(data) and not os.path.isfile(data):
        raise ValueError(f"--data {data} is no file that can be read twice, as a pipe or a folder "
                         "is not; write the chats to a file")
    tokens = tokenizer.identity, tokenizer.default_system, tokenizer.encode_dialogue(PROBE)
    made_from = tokens, block_size, bool(data), n_dialogues, seed, families, skip_bad
    key = hashlib.sha256(repr(made_from).encode())
    # After each edit of code in data/ the data are made anew.
    for path in [*sorted(HERE.rglob("*.py")), *([data] if data else [])]:
        with open(path, "rb") as origin:
            for part in iter(lambda: origin.read(1 << 20), b""):
                key.update(part)
    name = key.hexdigest()[:16]
    cache = writable_cache()
    if is_whole(cache / name):
        return cache / name
    encoder = Encoder(tokenizer, block_size)
    # The folder gets its name when it is whole, so that a broken run leaves none.
    partial = cache / f"{name}.{secrets.token_hex(4)}{PARTIAL}"
    try:
        partial.mkdir()
        if data:
            splits = own_splits(data, encoder, skip_bad)
        else:
            splits = synthetic_splits(encoder, n_dialogues, seed, families)
        for split, rows in splits.items():
            write_split(partial, split, rows)
        (partial / "splits.json").write_text(json.dumps([*splits]), encoding="utf-8")
        if not is_whole(cache / name):
            shutil.rmtree(cache / name, ignore_errors=True)
            partial.rename(cache / name)
    except OSError as error:
        if not is_whole(cache / name):  # another run may have been faster
            reason = error.strerror or "is the disk full?"  # numpy gives no reason
            raise ValueError(f"{cache / name} cannot be written ({reason})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if data:
        encoder.print_counts()
    return cache / name


# A dialogue with each part of a layout, and spaces, which a tokenizer may take away. Its tokens are
# part of a cache's key.
PROBE = [{"role": role, "content": " a"} for role in ("system", *("user", "assistant") * 2)]
PARTIAL = ".half-made"  # the end of a folder's name until it is whole


def writable_cache():
    """The folder of prepared data, cleared of what killed runs have left half made.

    It is $NANOISM_CACHE, or data/cache if that is not set. ValueError if it cannot be written.
    """
    cache = pathlib.Path(os.environ.get("NANOISM_CACHE") or CACHE)
    try:
        make_folder(cache)
    except OSError as error:
        raise ValueError(f"{cache} cannot be written ({error.strerror}); let NANOISM_CACHE name a "
                         "folder for the prepared data") from None
    # Another machine may be writing here, so only what is a day old is removed.
    for partial in cache.glob(f"*{PARTIAL}"):
        with contextlib.suppress(FileNotFoundError):  # another run may clear it too
            if time.time() - partial.stat().st_mtime > A_DAY:
                shutil.rmtree(partial, ignore_errors=True)
    return cache


def is_whole(folder):
    """Whether all splits that a folder lists are there, with sizes that agree."""
    try:
        read_splits(folder)
    except Exception:  # a damaged file raises many types
        return False
    return True


class Encoder:
    """Dialogues -> tokens. It counts the dialogues that it cuts to block_size or drops."""

    def __init__(self, tokenizer, block_size):
        self.tokenizer, self.block_size = tokenizer, block_size
        self.cut = self.dropped = 0

    def rows(self, dialogues):
        """Yields (tokens, segments, family) of each dialogue in which an answer fits."""
        for dialogue in dialogues:
            tokens, segments = self.tokenizer.encode_dialogue(dialogue["messages"])
            ends = [end for end in answer_ends(segments) if end <= self.block_size]
            if not ends:
                self.dropped += 1
                continue
            if len(tokens) > self.block_size:
                self.cut += 1
                tokens, segments = tokens[: ends[-1]], segments[: ends[-1]]
            yield tokens, segments, dialogue["family"]

    def print_counts(self):
        if self.cut or self.dropped:
            print(f"{self.cut} dialogues were cut to {self.block_size} tokens at the end of an "
                  f"answer, {self.dropped} had no answer that fits and were left out")


def synthetic_splits(encoder, n_dialogues, seed, families):
    """{split: rows}, a row is (tokens, segments, family). ValueError if a split has no row."""
    sizes = {"train": n_dialogues}
    sizes |= {split: min(most, n_dialogues) for split, most in HELD_OUT.items()}
    dealt = deal(sizes, seed, families, mixed=True)
    rows = {split: [] for split in sizes}
    total = sum(sizes.values())
    for split, dialogue in Bar(dealt, "prepare", total, unit=" dialogues", leave=False):
        rows[split] += encoder.rows([dialogue])
    for split in ("train", "val", "test"):
        if not rows[split]:
            raise ValueError(f"none of {sizes[split]} dialogues for '{split}' has an answer that "
                             f"fits into {encoder.block_size} tokens; raise --block_size or "
                             "--n_dialogues")
    return rows


def own_splits(data, encoder, skip_bad):
    """{split: rows} of a file of chats. ValueError if no answer fits into the context.

    Of FEW chats and more, "val" and "test" get 5 % each.
    """
    # Each dialogue is taken once. A hash gives the order, since a file's own may mean something.
    different = {json.dumps(messages): messages for messages in read_chats(data, skip_bad)}
    if not different:
        raise ValueError(f"{data} holds no dialogue; expected one a line, in JSON")
    chats = [{"messages": messages, "family": "chats"} for messages in different.values()]
    chats.sort(key=lambda chat: hashlib.sha256(json.dumps(chat).encode()).digest())
    rows = list(encoder.rows(Bar(chats, "prepare", unit=" dialogues", leave=False)))
    if not rows:
        raise ValueError(f"{data} has no dialogue with an answer that fits into "
                         f"{encoder.block_size} tokens")
    if len(rows) < FEW:
        return {"train": rows}
    n = min(1000, len(rows) // 20)
    return {"val": rows[:n], "test": rows[n : 2 * n], "train": rows[2 * n :]}


def write_split(folder, name, rows):
    """Writes rows (tokens, segments, family) as flat arrays."""
    families = sorted({family for _, _, family in rows})
    parts = {
        "tokens": (np.uint32, (token for tokens, _, _ in rows for token in tokens)),
        "segments": (np.uint16, (segment for _, segments, _ in rows for segment in segments)),
        "offsets": (np.int64, itertools.accumulate((len(row[0]) for row in rows), initial=0)),
        "families": (np.uint8, (families.index(family) for _, _, family in rows)),
    }
    for part, (dtype, numbers) in parts.items():
        np.save(folder / f"{name}.{part}.npy", np.fromiter(numbers, dtype))
    (folder / f"{name}.json").write_text(json.dumps(families), encoding="utf-8")


def read_splits(folder):
    """{name: Split} of the splits in a folder that are not empty.

    If nothing is held out, "val" and "test" are the same object as "train".
    """
    names = json.loads((folder / "splits.json").read_text(encoding="utf-8"))
    splits = {name: Split(folder, name) for name in names}
    splits = {name: split for name, split in splits.items() if len(split.families)}
    return {"val": splits["train"], "test": splits["train"], **splits}


def padded_length(length):
    """Rounds lengths from 80 on up to a multiple of 8, so that fewer kernel shapes are compiled."""
    return length if length < 80 else -(-length // 8) * 8


class Split:
    """One split in memory-mapped arrays: tokens and segments (N,), offsets (dialogues + 1,)."""

    def __init__(self, folder, name):
        def read(part):
            return np.load(folder / f"{name}.{part}.npy", mmap_mode="r")

        self.tokens, self.segments, self.offsets = read("tokens"), read("segments"), read("offsets")
        self.families = read("families")  # (dialogues,) places in family_names
        self.family_names = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        sizes = len(self.tokens), len(self.segments), len(self.offsets)
        if sizes != (self.offsets[-1], self.offsets[-1], len(self.families) + 1):
            raise ValueError(f"{folder} is damaged; remove it")

    def rows(self, mask):
        """(rows, 3) dialogue, start, end: a row a dialogue, or if the mask needs it, a turn."""
        first, last = self.offsets[:-1], self.offsets[1:]
        if one_pass(mask):
            return np.stack([np.arange(len(first)), first, last], 1)
        # Each dialogue begins with segment 1, and none that has an answer ends with it.
        ends = np.array(answer_ends(self.segments.tolist()))
        dialogue = np.searchsorted(last, ends)
        return np.stack([dialogue, first[dialogue], ends], 1)

    def batches(self, rows, n_tokens, seed):
        """Cuts the rows into batches of at most n_tokens and 10 % padding, in random order.

        A row that is longer than n_tokens is a batch of its own.
        """
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
        longest = int((rows[:, 2] - rows[:, 1]).max())
        # Padding stops at the longest dialogue's length, since that fits into the context.
        T = max(longest, min(padded_length(longest), int(np.diff(self.offsets).max())))
        tokens, segments = np.zeros((2, len(rows), T), dtype=np.int64)
        for i, (_, start, end) in enumerate(rows.tolist()):
            tokens[i, : end - start] = self.tokens[start:end]
            segments[i, : end - start] = self.segments[start:end]
        return torch.from_numpy(tokens), torch.from_numpy(segments)
