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
from tqdm import tqdm

from data import dialogues
from data.tokenizer import ROLES
from mask import one_pass

SPLITS = "train", "val", "test", "new_words"
# Bytes of a dialogue in JSON, so that a file without line breaks cannot fill the memory.
LONGEST_LINE = 1 << 24
# ShareGPT's names of the roles; what a tool returns is given to the model, as what a user says is.
ALIASES = {
    "human": "user", "gpt": "assistant", "tool": "user", "function": "user", "observation": "user",
    "function_call": "assistant",
}
CACHE = pathlib.Path(__file__).parent / "cache"


def well_formed(messages):
    """True for a list of messages, each {"role": system, user or assistant, "content": str}."""
    if not isinstance(messages, list) or not messages:
        return False
    return all(
        isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str)
        for m in messages
    )


def read_chats(path):
    """Yield the messages of each line of a JSONL file.

    {"messages": [{"role", "content"}, ...]}, or ShareGPT's {"conversations": [{"from", "value"},
    ...]}. ValueError names the file and the line that is not of this form.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
            if len(line) > LONGEST_LINE:
                long = f"line {number} is longer than {LONGEST_LINE:,} bytes"
                raise ValueError(f"{path}, {long}; put each dialogue on a line of its own")
            if not line.strip():
                continue
            messages = read_line(line)
            if not well_formed(messages):
                start = line.strip()[:80].decode("utf-8", "replace")
                message = '{"role": "system", "user" or "assistant", "content": "text"}'
                form = f'{{"messages": [{message}, ...]}}'
                raise ValueError(f"{path}, line {number}: expected {form}, got {start}")
            yield messages


def read_line(line):
    """The messages of one line of bytes, not checked; None if it is no dialogue at all."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
        if "messages" in record:
            said = [(m["role"], m["content"]) for m in record["messages"]]
        else:
            said = [(m["from"], m["value"]) for m in record["conversations"]]
        return [{"role": ALIASES.get(role, role), "content": text} for role, text in said]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def sources(data, n_dialogues, seed, mixed):
    """Split name -> (how many dialogues, an iterator over them)."""
    if not data:
        found = {}
        for split, most in zip(SPLITS, (n_dialogues, 1000, 2000, 1000)):
            n = min(most, n_dialogues)
            found[split] = n, dialogues.generate(split, n, seed, mixed=mixed)
        return found
    # Each dialogue once, in an order that is not the file's.
    different = {json.dumps(messages): messages for messages in read_chats(data)}
    chats = [{"messages": messages, "family": "chats"} for messages in different.values()]
    if len(chats) < 3:
        few = f"has {len(chats)} different dialogues"
        raise ValueError(f"{data} {few}; at least 3 are needed, to train, tune and test on")
    chats.sort(key=lambda chat: hashlib.sha256(json.dumps(chat).encode()).digest())
    n = max(1, min(1000, len(chats) // 20))
    parts = {"val": chats[:n], "test": chats[n : 2 * n], "train": chats[2 * n :]}
    return {split: (len(part), iter(part)) for split, part in parts.items()}


def prepare(tokenizer, block_size, data="", n_dialogues=0, seed=0, mixed=False):
    """Write the splits to data/cache, unless they are there already, and return their folder.

    data: a JSONL file of chats, or "" for n_dialogues synthetic dialogues, mixed as
    data/dialogues.py says. Dialogues longer than block_size are cut after the last answer that
    fits; those without one are left out. ValueError for a bad file.
    """
    made_from = tokenizer.identity, block_size, bool(data), n_dialogues, seed, mixed
    key = hashlib.sha256(repr(made_from).encode())
    with open(data or dialogues.__file__, "rb") as origin:
        for part in iter(lambda: origin.read(1 << 20), b""):
            key.update(part)
    folder = CACHE / key.hexdigest()[:16]
    if folder.exists():
        return folder
    CACHE.mkdir(exist_ok=True)
    # Renamed when whole, so that a broken run leaves no cache.
    partial = CACHE / f"{folder.name}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_splits(partial, tokenizer, block_size, sources(data, n_dialogues, seed, mixed))
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.exists():  # it does if another run was faster
            raise
    return folder


def write_splits(folder, tokenizer, block_size, parts):
    """Encode each split into a new folder, see `prepare`."""
    folder.mkdir()
    cut = dropped = 0
    for split, (n, items) in parts.items():
        tokens, segments, offsets, families = array("I"), array("H"), [0], []
        for item in tqdm(items, total=n, desc=f"prepare {split}", unit=" dialogues", leave=False):
            t, s = tokenizer.encode_dialogue(item["messages"])
            end = last_answer(s, block_size)
            if end == 0:
                dropped += 1
                continue
            if len(t) > block_size:
                cut += 1
                t, s = t[:end], s[:end]
            tokens.extend(t)
            segments.extend(s)
            offsets.append(len(tokens))
            families.append(item["family"])
        if split == "train" and not families:
            raise ValueError("none of the dialogues to train on has an answer that fits into "
                             f"{block_size} tokens; raise --block_size")
        names = sorted(set(families))
        arrays = {
            "tokens": np.array(tokens, dtype=np.uint32),
            "segments": np.array(segments, dtype=np.uint16),
            "offsets": np.array(offsets, dtype=np.int64),
            "families": np.array([names.index(f) for f in families], dtype=np.uint8),
        }
        for part, x in arrays.items():
            np.save(folder / f"{split}.{part}.npy", x)
        (folder / f"{split}.json").write_text(json.dumps(names), encoding="utf-8")
    if cut or dropped:
        print(f"{cut} dialogues were cut to {block_size} tokens at the end of an answer, "
              f"{dropped} had no answer that fits and were left out")


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
