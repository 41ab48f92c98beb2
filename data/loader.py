"""
Dialogues on disk and in batches.

`prepare` writes each split once as flat integer arrays, `Split` maps them into memory, and
`Split.batches` sorts by length so that little is padded. Two dialogues never share a row.
"""
import hashlib
import json
import os
import pathlib
import shutil
from array import array

import numpy as np
import torch

from data import dialogues, talk, words
from data.chats import read_chats
from data.machine import Bar, is_running
from mask import one_pass

SPLITS = "train", "val", "test", "new_words"
SIZES = {"val": 1000, "test": 2000, "new_words": 1000}  # dialogues of the held-out splits, at most
CACHE = pathlib.Path(__file__).parent / "cache"


def prepare(tokenizer, block_size, data="", n_dialogues=0, seed=0, mixed=False, skip_bad=False,
            families=tuple(dialogues.FAMILIES)):
    """Write the splits to data/cache, unless they are there already, and return their folder.

    data: a JSONL file of chats, or "" for n_dialogues synthetic dialogues of these families, mixed
    as data/dialogues.py says. Dialogues longer than block_size are cut after the last answer that
    fits; those without one are left out. ValueError for a bad file, or if too few are left.
    """
    encoder = tokenizer.identity + tokenizer.default_system
    made_from = encoder, block_size, bool(data), n_dialogues, seed, mixed, families, skip_bad
    key = hashlib.sha256(repr(made_from).encode())
    if data and pathlib.Path(data).is_fifo():
        raise ValueError(f"--data {data} is a pipe, which cannot be read twice; write it to a file")
    for path in [data] if data else [dialogues.__file__, talk.__file__, words.__file__]:
        with open(path, "rb") as origin:
            for part in iter(lambda: origin.read(1 << 20), b""):
                key.update(part)
    folder = CACHE / key.hexdigest()[:16]
    if folder.exists():
        return folder
    CACHE.mkdir(exist_ok=True)
    clear_cache()
    # Renamed when whole, so that a broken run leaves no cache.
    partial = CACHE / f"{folder.name}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    encode = Encoder(tokenizer, block_size)
    try:
        partial.mkdir()
        if data:
            splits = own_splits(data, encode, skip_bad)
        else:
            splits = synthetic_splits(encode, n_dialogues, seed, mixed, families)
        for name, rows in splits:
            write_split(partial, name, rows)
        partial.rename(folder)
    except OSError as error:
        if not folder.exists():  # it does if another run was faster
            reason = error.strerror or "is the disk full?"  # numpy does not say
            raise ValueError(f"{partial} cannot be written ({reason})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if data:
        encode.tell()
    return folder


def clear_cache():
    """Remove what a killed run has left half made."""
    for partial in CACHE.glob("*.*"):
        if not is_running(int(partial.suffix[1:])):
            shutil.rmtree(partial, ignore_errors=True)


class Encoder:
    """Messages -> (tokens, segments), cut to block_size; None if no answer fits. Counts both."""

    def __init__(self, tokenizer, block_size):
        self.tokenizer, self.block_size = tokenizer, block_size
        self.cut = self.dropped = 0

    def __call__(self, messages):
        tokens, segments = self.tokenizer.encode_dialogue(messages)
        end = last_answer(segments, self.block_size)
        if end == 0:
            self.dropped += 1
            return None
        if len(tokens) > self.block_size:
            self.cut += 1
            tokens, segments = tokens[:end], segments[:end]
        return tokens, segments

    def tell(self):
        if self.cut or self.dropped:
            print(f"{self.cut} dialogues were cut to {self.block_size} tokens at the end of an "
                  f"answer, {self.dropped} had no answer that fits and were left out")


def synthetic_splits(encode, n_dialogues, seed, mixed, families):
    """[(split, rows)], a row (tokens, segments, family). ValueError if one has none."""
    sizes = {split: min(SIZES.get(split, n_dialogues), n_dialogues) for split in SPLITS}
    found = dialogues.deal(sizes, seed, families, mixed)
    rows = {split: [] for split in SPLITS}
    total = sum(sizes.values())
    for split, dialogue in Bar(found, "prepare", total, unit=" dialogues", leave=False):
        row = encode(dialogue["messages"])
        if row is not None:
            rows[split].append((*row, dialogue["family"]))
    for split in ("train", "val", "test"):
        if not rows[split]:
            raise ValueError(f"none of {sizes[split]} dialogues for '{split}' has an answer that "
                             f"fits into {encode.block_size} tokens; raise --block_size or "
                             "--n_dialogues")
    return list(rows.items())


def own_splits(data, encode, skip_bad):
    """[(split, rows)] of a file of chats, drawn from those that fit. ValueError if too few do."""
    # Each dialogue once, in an order that is not the file's.
    different = {json.dumps(messages): messages for messages in read_chats(data, skip_bad)}
    if not different:
        raise ValueError(f"{data} holds no dialogue; expected one a line, in JSON")
    chats = [{"messages": messages, "family": "chats"} for messages in different.values()]
    chats.sort(key=lambda chat: hashlib.sha256(json.dumps(chat).encode()).digest())
    rows = []
    for chat in Bar(chats, "prepare", unit=" dialogues", leave=False):
        row = encode(chat["messages"])
        if row is not None:
            rows.append((*row, chat["family"]))
    if len(rows) < 3:
        few = f"has {len(rows)} different dialogues"
        fit = f"with an answer that fits into {encode.block_size} tokens"
        raise ValueError(f"{data} {few} {fit}; at least 3 are needed, to train, tune and test on")
    n = max(1, min(1000, len(rows) // 20))
    return [("val", rows[:n]), ("test", rows[n : 2 * n]), ("train", rows[2 * n :])]


def write_split(folder, name, rows):
    """Write rows (tokens, segments, family) as flat arrays."""
    tokens, segments, offsets = array("I"), array("H"), [0]
    for row_tokens, row_segments, _ in rows:
        tokens.extend(row_tokens)
        segments.extend(row_segments)
        offsets.append(len(tokens))
    families = sorted({family for _, _, family in rows})
    places = {family: i for i, family in enumerate(families)}
    arrays = {
        "tokens": np.array(tokens, dtype=np.uint32),
        "segments": np.array(segments, dtype=np.uint16),
        "offsets": np.array(offsets, dtype=np.int64),
        "families": np.array([places[family] for _, _, family in rows], dtype=np.uint8),
    }
    for part, x in arrays.items():
        np.save(folder / f"{name}.{part}.npy", x)
    (folder / f"{name}.json").write_text(json.dumps(families), encoding="utf-8")


def read_splits(folder):
    """{name: Split} of the splits in a folder that hold anything."""
    splits = {name: Split(folder, name) for name in SPLITS if (folder / f"{name}.json").exists()}
    return {name: split for name, split in splits.items() if len(split.families)}


def last_answer(segments, block_size):
    """Where the last whole answer within block_size tokens ends; 0 if there is none."""
    for end in range(min(len(segments), block_size), 0, -1):
        number = segments[end - 1]
        following = segments[end] if end < len(segments) else None
        if number % 2 == 0 and following != number:
            return end
    return 0


def padded_length(length):
    """Rows of 80 tokens and more become a multiple of 8: kernels are prepared once for a shape."""
    return length if length < 80 else -(-length // 8) * 8


class Split:
    """One split in memory-mapped arrays: tokens and segments (N,), offsets (dialogues + 1,)."""

    def __init__(self, folder, name):
        def read(part):
            return np.load(folder / f"{name}.{part}.npy", mmap_mode="r")

        self.tokens, self.segments, self.offsets = read("tokens"), read("segments"), read("offsets")
        self.families = read("families")  # (dialogues,) of each its family's place in family_names
        self.family_names = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))

    def rows(self, mask):
        """(rows, 3) dialogue, start, end: a row a dialogue; a row a turn if the mask needs that."""
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
        """Cut the rows into batches of at most n_tokens and 10 % padding, in random order.

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
        # No longer than the longest dialogue, so that the context is never too short for padding.
        T = max(longest, min(padded_length(longest), int(np.diff(self.offsets).max())))
        tokens, segments = np.zeros((2, len(rows), T), dtype=np.int64)
        for i, (_, start, end) in enumerate(rows.tolist()):
            tokens[i, : end - start] = self.tokens[start:end]
            segments[i, : end - start] = self.segments[start:end]
        return torch.from_numpy(tokens), torch.from_numpy(segments)
