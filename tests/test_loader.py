"""The tokenizer, the cache of tokens, and the batches that a training reads from it."""
import os
import random
import shutil

import numpy as np
import pytest
from conftest import ROOT
from helpers import SPECIAL, TOKENIZER, run
from hypothesis import given, settings
from hypothesis import strategies as st

import data.loader as loader
from data.checkpoint import load_checkpoint
from data.loader import Split, prepare
from data.tokenizer import LAYOUT, PATTERN, RANKS, Tokenizer
from mask import MASKS, loss_positions

pytestmark = pytest.mark.usefixtures("own_cache")


@settings(max_examples=500, deadline=None)
@given(st.text())
def test_any_text_round_trips(text):
    # Half a surrogate pair is no text, and becomes U+FFFD.
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert TOKENIZER.decode(TOKENIZER.encode_answer(text)[:-1]) == whole


def test_every_byte_is_a_token_and_digits_are_single():
    ranks = TOKENIZER.encoding._mergeable_ranks
    assert all(bytes([b]) in ranks for b in range(256))
    assert len(ranks) == 1276 and TOKENIZER.vocab_size == 1280
    assert all(len(TOKENIZER.encoding.encode_ordinary(str(10**n))) == n + 1 for n in range(12))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(SPECIAL), st.text(max_size=8)), max_size=8))
def test_special_tokens_cannot_be_typed(parts):
    text = "".join(parts)
    ids = {TOKENIZER.end, *TOKENIZER.headers.values()}
    assert not ids & set(TOKENIZER.encode_answer(text)[:-1])
    messages = [{"role": role, "content": text} for role in ("user", "assistant")]
    tokens, _ = TOKENIZER.encode_dialogue(messages)
    assert len([t for t in tokens if t in ids]) == 4  # <|user|>, <|end|>, <|assistant|>, <|end|>


def test_layout():
    def shape(*roles):
        messages = [{"role": role, "content": "x"} for role in roles]
        tokens, segments = TOKENIZER.encode_dialogue(messages)
        return TOKENIZER.decode(tokens), "".join(map(str, segments))

    assert shape("user", "assistant") == ("<|user|>x<|end|><|assistant|>x<|end|>", "111122")
    given = "<|system|>x<|end|><|user|>x<|end|><|user|>x<|end|><|assistant|>"
    answer, query = "x<|end|>", "<|user|>x<|end|><|assistant|>"
    text, segments = shape("system", "user", "user", "assistant", "user")
    assert text == given + answer + query
    assert segments == "1" * 10 + "22" + "3333"
    text, segments = shape("assistant", "assistant")
    assert text == "<|assistant|>x<|end|><|assistant|>x<|end|>" and segments == "122344"
    assert TOKENIZER.encode_dialogue([]) == ([], [])


def test_the_ranks_are_made_as_they_are_committed(tmp_path):
    out = tmp_path / "ranks.tiktoken"
    before = RANKS.read_bytes()
    done = run("-m", "data.tokenizer", str(out))
    assert out.read_bytes() == before == RANKS.read_bytes()
    assert "1276 ranks, equal to ranks.tiktoken" in done.stdout


def test_batches_hold_every_row_once_with_little_padding():
    split = Split(prepare(TOKENIZER, 256, n_dialogues=1500), "train")
    for mask in MASKS.values():
        rows = split.rows(mask)
        batches = split.batches(rows, 2048, seed=0)
        assert sorted(np.concatenate(batches).tolist()) == sorted(rows.tolist())
        again = split.batches(rows, 2048, seed=0)
        assert [b.tolist() for b in again] == [b.tolist() for b in batches]
        real = padded = 0
        for batch in batches:
            tokens, segments = split.collate(batch)
            assert tokens.numel() <= 2048
            real, padded = real + int((segments > 0).sum()), padded + tokens.numel()
            for row, (_, start, end) in zip(tokens, batch):
                assert row[: end - start].tolist() == split.tokens[start:end].tolist()
        assert real >= 0.9 * padded


def test_padding_is_never_longer_than_the_longest_dialogue():
    rng, split = np.random.default_rng(0), object.__new__(Split)
    for _ in range(300):
        lengths = rng.integers(2, rng.integers(3, 400), rng.integers(1, 9))
        split.offsets = np.concatenate([[0], np.cumsum(lengths)])
        split.tokens = split.segments = np.ones(lengths.sum(), dtype=np.uint16)
        rows = np.stack([np.arange(len(lengths)), split.offsets[:-1], split.offsets[1:]], 1)
        chosen = rows[rng.permutation(len(rows))[: rng.integers(1, len(rows) + 1)]]
        tokens, segments = split.collate(chosen)
        assert tokens.shape == segments.shape
        assert (chosen[:, 2] - chosen[:, 1]).max() <= tokens.shape[1] <= lengths.max()
        assert (segments.sum(1).numpy() == chosen[:, 2] - chosen[:, 1]).all()


def test_under_each_mask_the_rows_train_each_answer_once():
    split = Split(prepare(TOKENIZER, 256, n_dialogues=60), "train")
    answers = (np.flatnonzero(split.segments % 2 == 0) - 1).tolist()
    for mask in MASKS.values():
        trained = []
        for row in split.rows(mask):
            _, segments = split.collate(row[None])
            at = loss_positions(segments, mask(segments)).nonzero()[:, 1]
            trained += (at + int(row[1])).tolist()
        assert sorted(trained) == answers


def test_prepare_is_done_once_and_again_when_settings_or_code_change(tmp_path, monkeypatch):
    left_out = shutil.ignore_patterns("cache", "*.pt")
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=left_out)
    monkeypatch.setattr(loader, "HERE", tmp_path / "data")
    first = prepare(TOKENIZER, 256, n_dialogues=20)
    stamp = (first / "train.tokens.npy").stat().st_mtime_ns
    assert prepare(TOKENIZER, 256, n_dialogues=20) == first
    assert (first / "train.tokens.npy").stat().st_mtime_ns == stamp
    folders = {first, prepare(TOKENIZER, 128, n_dialogues=20)}
    for name in ("tokenizer.py", "chats.py", "loader.py"):
        with open(tmp_path / "data" / name, "a", encoding="utf-8") as file:
            file.write("# edited")
        folders.add(prepare(TOKENIZER, 256, n_dialogues=20))
    trims = Tokenizer()
    trims.trim = True
    folders.add(prepare(trims, 256, n_dialogues=20))
    assert len(folders) == 6


def test_a_tokenizer_of_another_pattern_or_layout_is_another_one(monkeypatch):
    """A checkpoint names its tokenizer; that of the committed one is today's."""
    before = load_checkpoint(ROOT / "data" / "small.pt")["tokenizer"]
    assert Tokenizer().identity == before
    assert Tokenizer(layout={**LAYOUT, "end": "<|over|>"}).identity != before
    monkeypatch.setattr("data.tokenizer.PATTERN", PATTERN + "|x")
    assert Tokenizer().identity != before


def test_what_stands_in_the_cache_and_is_not_ours_stays(tmp_path):
    folder = tmp_path / "cache"
    stay = [folder / name for name in (".DS_Store", ".nfs0001", ".gitkeep", "Thumbs.db", "abc.old",
                                       "made-elsewhere.half-made", "x.1")]
    left = folder / "left.half-made"
    folder.mkdir()
    for path in (*stay, left):
        path.mkdir() if path.suffix in (".old", ".half-made") else path.touch()
    os.utime(left, (0, 0))  # a run that was killed long ago; the other may be another machine's
    prepare(TOKENIZER, 256, n_dialogues=20)
    assert all(path.exists() for path in stay) and not left.exists()
    assert len(list(folder.iterdir())) == len(stay) + 1


def test_a_damaged_cache_is_made_again():
    rng = random.Random(0)
    folder = prepare(TOKENIZER, 256, n_dialogues=20)
    good = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    for path, content in good.items():
        for damaged in (None, b"", content[: rng.randrange(len(content))]):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            assert prepare(TOKENIZER, 256, n_dialogues=20) == folder
            assert {path: path.read_bytes() for path in folder.iterdir()} == good


def test_where_the_cache_goes_that_cannot_be_beside_the_code(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(loader, "CACHE", tmp_path / "file" / "cache")
    monkeypatch.setenv("NANOISM_CACHE", str(tmp_path / "here"))
    assert prepare(TOKENIZER, 256, n_dialogues=9).parent == tmp_path / "here"
    monkeypatch.setenv("NANOISM_CACHE", str(tmp_path / "file" / "here"))
    with pytest.raises(ValueError, match="let NANOISM_CACHE name a folder"):
        prepare(TOKENIZER, 256, n_dialogues=9)
