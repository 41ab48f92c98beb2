"""Dialogues, tokenizer, batches."""
import itertools
import json
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.loader as loader
from data.dialogues import (
    CITIES,
    FAMILIES,
    NAMES,
    NEW_CITIES,
    NEW_NAMES,
    SMALL_TALK,
    SYSTEM,
    generate,
    split_of,
)
from data.loader import Split, prepare
from data.tokenizer import Tokenizer, train_ranks
from mask import MASKS, loss_positions

TOKENIZER = Tokenizer()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "CACHE", tmp_path / "cache")
    return tmp_path


@pytest.mark.parametrize("mixed", [False, True])
def test_dialogues_are_deterministic_and_the_splits_disjoint(mixed):
    splits = {name: list(generate(name, 3000 if name == "train" else 300, seed=3, mixed=mixed)) for name in ("train", "val", "test", "new_words")}
    assert splits["val"] == list(generate("val", 300, seed=3, mixed=mixed)) != list(generate("val", 300, seed=4, mixed=mixed))
    texts = {name: {json.dumps(d["messages"]) for d in dialogues} for name, dialogues in splits.items()}
    for a in texts:
        for b in texts:
            assert a == b or not texts[a] & texts[b]
    assert all(split_of(d["messages"]) == name for name in ("train", "val", "test") for d in splits[name] if d["family"] != "mixed")
    words = {name: set(re.findall(r"\w+", " ".join(texts[name]))) for name in texts}
    new = set(NEW_NAMES + NEW_CITIES)
    assert not new & (words["train"] | words["val"] | words["test"]) and not new & set(NAMES + CITIES)
    assert len(new & words["new_words"]) > 20


def test_dialogues_have_the_stated_form():
    dialogues = list(generate("train", 2000))
    assert {d["family"] for d in dialogues} == set(FAMILIES)
    for d in dialogues:
        roles = [m["role"] for m in d["messages"]]
        roles = roles[1:] if roles[0] == "system" else roles
        assert roles == ["user", "assistant"] * (len(roles) // 2) and 2 <= len(roles) // 2 <= 8
        for m in d["messages"]:
            assert m["content"] and (m["role"] != "assistant" or m["content"][-1] in ".!?")


def test_mixed_dialogues_go_from_one_family_to_another():
    """In pairs of families whose first queries show which is which: both are there, the second in whole."""
    first = {"induction": "gives", "refinement": "list|words|numbers", "follow-up": "Start with|Take the number|I have"}
    for pair in itertools.combinations(first, 2):
        dialogues = list(generate("test", 300, seed=1, families=pair, mixed=True))
        mixed = [d["messages"] for d in dialogues if d["family"] == "mixed"]
        assert 50 < len(mixed) < 130
        for messages in mixed:
            told = " ".join(m["content"] for m in messages)
            turns = [m for m in messages if m["role"] != "system"]
            assert all(re.search(first[name], told, re.IGNORECASE) for name in pair)
            assert [m["role"] for m in turns] == ["user", "assistant"] * (len(messages) // 2)
            assert all(m["role"] != "system" for m in messages[1:])
            rests = [[*system, *turns[cut:]] for cut in (2, 4, 6) for system in ([], *([{"content": text}] for text in SYSTEM)) if turns[cut:]]
            assert "test" in map(split_of, rests)  # a dialogue of its own, no held-out one of another split


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def test_answers_are_right():
    """Work the answers of three families out again from the queries alone."""
    for d in generate("train", 1500, families=("follow-up", "refinement", "reasoning")):
        turns = [m["content"] for m in d["messages"] if m["role"] != "system"]
        for query, answer in zip(turns[::2], turns[1::2]):
            if " plus " in answer:
                a, b, c = numbers(answer)
                assert a + b == c
            if " times " in answer:
                a, b, c = numbers(answer)
                assert a * b == c
            if "What is missing" in query:
                first, second = (part.split(": ")[1].split(", ") for part in query.split(". ")[:2])
                assert answer == f"The second list has no {(set(first) - set(second)).pop()}."
            if "only once" in query:
                named = query.split(".")[0].split(", ")
                assert [named.count(x) for x in [answer.split()[0]]] == [1]
            if query.endswith("Sort them.") and numbers(query):
                assert numbers(answer) == sorted(numbers(query))
            if " = " in query:
                values = {}
                told = re.findall(r"(\w) = (\w)(?: \+ (\d))?", query)
                for _ in told:
                    for name, base, n in told:
                        value = int(base) if base.isdigit() else values.get(base)
                        if value is not None:
                            values[name] = value + int(n or 0)
                name = query[-2]
                assert answer == f"{name} is {values[name]}."


def test_recollection_answers_stand_in_earlier_queries():
    for d in generate("train", 300, families=("recollection",)):
        told = ""
        for m in d["messages"]:
            if m["role"] == "user":
                told += m["content"] + " "
            elif m["content"].startswith(("Your name is", "You live in")):
                assert m["content"].split()[-1][:-1] in told


def test_expansion_answers_stand_in_a_sentence_that_was_told():
    for d in generate("train", 300, families=("expansion",)):
        told = []
        for m in d["messages"]:
            if m["role"] == "user":
                told += m["content"].split(". ")
            for said in m["content"][:-1].split(". ") if m["role"] == "assistant" and "Added" not in m["content"] else ():
                person, *_, value = said.removesuffix(" years old").split()
                assert any(person in sentence and value in sentence for sentence in told)


def test_a_greeting_may_come_first():
    """It is what people type first."""
    first = [d["messages"][0]["content"] for d in generate("train", 500, families=("recollection",))]
    assert 50 < sum(query.capitalize() in (sentence, sentence[:-1]) for query in first for sentence, _ in SMALL_TALK) < 150


@settings(max_examples=500, deadline=None)
@given(st.text())
def test_any_text_round_trips(text):
    assert TOKENIZER.decode(TOKENIZER.encode_answer(text)[:-1]) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def test_every_byte_is_a_token_and_digits_are_single():
    ranks = TOKENIZER.encoding._mergeable_ranks
    assert all(bytes([b]) in ranks for b in range(256)) and len(ranks) == 1276 and TOKENIZER.vocab_size == 1280
    assert all(len(TOKENIZER.encoding.encode_ordinary(str(10**n))) == n + 1 for n in range(12))


SPECIAL = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(SPECIAL), st.text(max_size=8)), max_size=8))
def test_special_tokens_cannot_be_typed(parts):
    text = "".join(parts)
    ids = {TOKENIZER.end, *TOKENIZER.headers.values()}
    assert not ids & set(TOKENIZER.encode_answer(text)[:-1])
    tokens, _ = TOKENIZER.encode_dialogue([{"role": "user", "content": text}, {"role": "assistant", "content": text}])
    assert sum(t in ids for t in tokens) == 4  # <|user|>, <|end|>, <|assistant|>, <|end|>


def test_layout():
    def shape(*roles):
        tokens, segments = TOKENIZER.encode_dialogue([{"role": role, "content": "x"} for role in roles])
        return TOKENIZER.decode(tokens), "".join(map(str, segments))

    assert shape("user", "assistant") == ("<|user|>x<|end|><|assistant|>x<|end|>", "111122")
    assert shape("system", "user", "user", "assistant", "user") == (
        "<|system|>x<|end|><|user|>x<|end|><|user|>x<|end|><|assistant|>x<|end|><|user|>x<|end|><|assistant|>", "1" * 10 + "22" + "3333")
    assert shape("assistant", "assistant") == ("<|assistant|>x<|end|><|assistant|>x<|end|>", "122344")
    assert TOKENIZER.encode_dialogue([]) == ([], [])


def test_unknown_tokenizer_is_one_line():
    with pytest.raises(ValueError, match="'nanoism' needs no download") as error:
        Tokenizer("no-such")
    assert "\n" not in str(error.value)


def test_train_ranks_merges_the_most_frequent_pair():
    ranks = train_ranks("ab ab ab ac", 258)
    assert list(ranks)[256] in (b"ab", b" a") and len(ranks) == 258


@pytest.mark.parametrize("name", MASKS)
def test_batches_hold_every_row_once_with_little_padding(cache, name):
    split = Split(prepare(TOKENIZER, 256, n_dialogues=1500), "train")
    rows = split.rows(MASKS[name])
    batches = split.batches(rows, 2048, seed=0)
    assert sorted(map(tuple, np.concatenate(batches).tolist())) == sorted(map(tuple, rows.tolist()))
    real = padded = 0
    for batch in batches:
        tokens, segments = split.collate(batch)
        assert tokens.numel() <= 2048
        real, padded = real + int((segments > 0).sum()), padded + tokens.numel()
        for row, (_, start, end) in zip(tokens, batch):
            assert row[: end - start].tolist() == split.tokens[start:end].tolist()
    assert real >= 0.9 * padded
    assert [b.tolist() for b in split.batches(rows, 2048, seed=0)] == [b.tolist() for b in batches]


def test_prefix_trains_each_answer_once_with_its_triplets(cache):
    split = Split(prepare(TOKENIZER, 256, n_dialogues=60), "train")
    trained = {}
    for name, mask in MASKS.items():
        trained[name] = set()
        for row in split.rows(mask):
            _, segments = split.collate(row[None])
            at = loss_positions(segments, mask(segments)).nonzero()[:, 1].tolist()
            assert not trained[name] & {int(row[1]) + j for j in at}
            trained[name] |= {int(row[1]) + j for j in at}
    answers = set((np.flatnonzero(split.segments % 2 == 0) - 1).tolist())
    assert trained["ism"] == trained["causal"] == trained["prefix"] == answers


def test_prepare_is_done_once_and_again_when_settings_change(cache):
    first = prepare(TOKENIZER, 256, n_dialogues=20)
    stamp = (first / "train.tokens.npy").stat().st_mtime_ns
    assert prepare(TOKENIZER, 256, n_dialogues=20) == first
    assert (first / "train.tokens.npy").stat().st_mtime_ns == stamp
    assert prepare(TOKENIZER, 128, n_dialogues=20) != first


def write(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def chat(n, words="hello"):
    return json.dumps({"messages": [{"role": "user", "content": f"{words} {n}"}, {"role": "assistant", "content": f"yes {n}"}]})


def test_own_chats(cache):
    path = write(cache / "chats.jsonl", [chat(n) for n in range(10)] + [chat(3), ""])
    folder = prepare(TOKENIZER, 64, data=path)
    sizes = {name: len(Split(folder, name).families) for name in ("train", "val", "test")}
    assert sizes == {"train": 8, "val": 1, "test": 1}


@pytest.mark.parametrize("line", ["{", "[]", '{"messages": []}', '{"messages": [{"role": "user"}]}', '{"messages": "x"}', "7",
                                  '{"messages": [{"role": "robot", "content": "x"}]}', '{"messages": [{"role": "user", "content": 5}]}'])
def test_a_bad_line_is_reported_by_its_number(cache, line):
    path = write(cache / "chats.jsonl", [chat(n) for n in range(4)] + [line])
    with pytest.raises(ValueError, match="chats.jsonl, line 5") as error:
        prepare(TOKENIZER, 64, data=path)
    assert "\n" not in str(error.value)
    assert not list((cache / "cache").glob("*.npy"))


def test_long_dialogues_are_cut_at_the_end_of_an_answer(cache, capsys):
    long = {"messages": [{"role": r, "content": "a b c d e f g h"} for r in ("user", "assistant") * 6]}
    none = {"messages": [{"role": "user", "content": "a " * 200}, {"role": "assistant", "content": "b"}]}
    path = write(cache / "chats.jsonl", [chat(n) for n in range(30)] + [json.dumps(long), json.dumps(none)])
    folder = prepare(TOKENIZER, 64, data=path)
    assert "1 dialogues were cut" in capsys.readouterr().out
    for name in ("train", "val", "test"):
        split = Split(folder, name)
        assert (np.diff(split.offsets) <= 64).all()
        assert all(split.segments[end - 1] % 2 == 0 for end in split.offsets[1:])


def test_dialogues_without_an_answer_are_left_out(cache, capsys):
    """A batch of them would have no loss, and a mean over nothing is NaN."""
    alone = [json.dumps({"messages": [{"role": "user", "content": f"Anyone? {n}"}]}) for n in range(40)]
    path = write(cache / "chats.jsonl", alone + [chat(n) for n in range(20)])
    folder = prepare(TOKENIZER, 64, path)
    kept = [Split(folder, name) for name in ("train", "val", "test")]
    assert sum(len(split.families) for split in kept) == 20 and "40 had no answer that fits" in capsys.readouterr().out
    with pytest.raises(ValueError, match="0 different dialogues with an answer that fits"):
        prepare(TOKENIZER, 64, write(cache / "alone.jsonl", alone))


def test_sharegpt_and_tools_are_the_same_chats(tmp_path):
    """A chat in ShareGPT's form, and one with a tool's results, are read as what they say in the form of OpenAI."""
    rng, names = random.Random(0), {"system": ["system"], "user": ["human", "user", "tool", "observation"], "assistant": ["gpt", "assistant"]}
    chats = [[{"role": rng.choice(list(names)), "content": rng.choice(("", "hi", "<|end|>", "é 3"))} for _ in range(rng.randint(1, 6))] for _ in range(200)]
    share = [{"conversations": [{"from": rng.choice(names[m["role"]]), "value": m["content"]} for m in chat]} for chat in chats]
    ours = [{"messages": [{**m, "role": rng.choice(names[m["role"]]), "name": "x"} for m in chat]} for chat in chats]
    for form in (share, ours):
        (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, form)), encoding="utf-8")
        assert list(loader.read_chats(tmp_path / "c.jsonl")) == chats
