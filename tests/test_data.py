"""Dialogues, tokenizer, batches."""

import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from helpers import SPECIAL, line_of_chat, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st

import data.loader as loader
from data.checkpoint import load_checkpoint
from data.loader import Split, prepare, read_splits
from data.synthetic import talk
from data.synthetic.families import FAMILIES, deal, generate, split_of
from data.synthetic.words import (
    CITIES,
    FINAL_CITIES,
    FINAL_NAMES,
    HELD_OUT,
    NAMES,
    NEW_CITIES,
    NEW_NAMES,
)
from data.tokenizer import LAYOUT, PATTERN, RANKS, Tokenizer, train_ranks
from mask import MASKS, loss_positions

TOKENIZER = Tokenizer()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "CACHE", tmp_path / "cache")
    return tmp_path


SIZES = {"train": 3000, "val": 300, "test": 300, "new_words": 300, "final_words": 300}


def dealt(sizes=SIZES, **settings):
    """{split: its dialogues}"""
    splits = {split: [] for split in sizes}
    for split, dialogue in deal(sizes, **settings):
        splits[split].append(dialogue)
    return splits


def text(dialogue):
    return json.dumps(dialogue["messages"], ensure_ascii=False)


@pytest.mark.parametrize("mixed", [False, True])
def test_dialogues_are_deterministic_and_the_splits_disjoint(mixed):
    splits = dealt(seed=3, mixed=mixed)
    assert {split: len(dialogues) for split, dialogues in splits.items()} == SIZES
    for split, dialogues in splits.items():
        assert dialogues == list(generate(split, SIZES[split], seed=3, mixed=mixed))
        assert dialogues != list(generate(split, SIZES[split], seed=4, mixed=mixed))
    texts = {split: set(map(text, dialogues)) for split, dialogues in splits.items()}
    for a, b in itertools.combinations(("train", "val", "test"), 2):
        assert not texts[a] & texts[b]
    for split in ("train", "val", "test"):
        assert {split_of(d["messages"]) for d in splits[split]} == {split}


def test_no_held_out_dialogue_is_a_part_of_one_to_train_on():
    """But for small talk, which is what it is."""
    splits = dealt({"train": 8000, "test": 500}, seed=1, mixed=True)
    parts = set()
    for dialogue in splits["train"]:
        turns = [m["content"] for m in dialogue["messages"] if m["role"] != "system"]
        for i in range(0, len(turns), 2):
            parts |= {"\n".join(turns[i:j]) for j in range(i + 2, len(turns) + 1, 2)}
    for dialogue in splits["test"]:
        turns = [m["content"] for m in dialogue["messages"] if m["role"] != "system"]
        assert dialogue["family"] == "small talk" or "\n".join(turns) not in parts


def test_held_out_words_are_in_no_other_split():
    # So many that each word of a split's own is drawn.
    splits = dealt({**SIZES, "new_words": 600, "final_words": 600}, seed=3, mixed=True)
    words = {}
    for split, dialogues in splits.items():
        words[split] = set(re.findall(r"[\w'-]+", " ".join(map(text, dialogues)).lower()))
    new, final = NEW_NAMES + NEW_CITIES, FINAL_NAMES + FINAL_CITIES
    assert len(HELD_OUT) == len(new + final) and not HELD_OUT & set(NAMES + CITIES)
    for split, own in (("new_words", new), ("final_words", final)):
        for word in own:
            assert {other for other in splits if word.lower() in words[other]} == {split}, word


def test_dialogues_have_the_stated_form():
    dialogues = list(generate("train", 2000))
    assert {d["family"] for d in dialogues} == set(FAMILIES)
    for d in dialogues:
        roles = [m["role"] for m in d["messages"]]
        roles = roles[1:] if roles[0] == "system" else roles
        assert roles == ["user", "assistant"] * (len(roles) // 2) and 2 <= len(roles) // 2 <= 8
        for m in d["messages"]:
            assert m["content"] and (m["role"] != "assistant" or m["content"][-1] in ".!?")


ANSWERS = {
    "induction": " gives ",
    "refinement": "Here it is|There are|^It is |sort numbers",
    "follow-up": " (plus|minus|times|divided|even|odd|more than)|Half of|The number is|not taught",
}


def test_mixed_dialogues_go_from_one_family_to_another_and_may_come_back():
    """In pairs of families whose answers show which is which."""
    for pair in itertools.combinations(ANSWERS, 2):
        dialogues = list(generate("train", 300, seed=1, families=pair, mixed=True))
        mixed = [d["messages"] for d in dialogues if d["family"] == "mixed"]
        assert 50 < len(mixed) < 130
        back = 0
        for messages in mixed:
            said = [m["content"] for m in messages if m["role"] == "assistant"]
            kinds = [[bool(re.search(ANSWERS[name], answer)) for name in pair] for answer in said]
            parts = [kind for kind, _ in itertools.groupby(kinds)]
            assert parts in ([kinds[0], kinds[0][::-1]], [kinds[0], kinds[0][::-1], kinds[0]])
            assert kinds[0].count(True) == 1
            back += len(parts) == 3
        assert 15 < back < len(mixed) - 15


def test_dialogues_are_interrupted_by_small_talk():
    """One more turn behind the first. The family is then "mixed", so it counts for no other."""
    dialogues = list(generate("train", 1000, families=("refinement", "small talk"), mixed=True))
    answers = {answer for answer, _ in talk.TALK} | {talk.UNKNOWN}
    interrupted = 0
    for d in dialogues:
        said = [m["content"] in answers for m in d["messages"] if m["role"] == "assistant"]
        assert d["family"] != "refinement" or not any(said)
        if d["family"] == "mixed" and not said[0] and said.count(True) == 1:
            interrupted += 1
    assert 30 < interrupted < 150


def test_a_family_of_ones_own_is_a_function_and_an_entry(cache, monkeypatch):
    def echo(rng, words):
        for name in words.names(3):
            yield f"Say {name}.", f"{name}."

    monkeypatch.setitem(FAMILIES, "echo", (50, echo))
    families = {d["family"] for d in generate("train", 100, families=tuple(FAMILIES), mixed=True)}
    assert families >= {"echo", "mixed"}
    split = Split(prepare(TOKENIZER, 256, n_dialogues=20, families=("echo",)), "new_words")
    assert split.family_names == ["echo"]
    told = TOKENIZER.decode(split.tokens[: split.offsets[1]].tolist())
    assert len([name for name in NEW_NAMES if name in told]) == 3


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
            if answer == talk.UNKNOWN:
                assert re.search(r"(times|multiply .* by) ([3-9]|10)\.?$", query.lower())
            if " times " in answer:
                a, b, c = numbers(answer)
                assert a * b == c and (a < 10 or b < 3)
            if "missing" in query:
                first, second = (part.split(": ")[1].split(", ") for part in query.split(". ")[:2])
                assert answer == f"The second list has no {(set(first) - set(second)).pop()}."
            if " minus " in answer:
                a, b, c = numbers(answer)
                assert a - b == c
            if answer.startswith("Half of "):
                a, b = numbers(answer)
                assert a == 2 * b
            if re.fullmatch(r"\d+ is (odd|even)\.", answer):
                assert answer.endswith("odd.") == (numbers(answer)[0] % 2 == 1)
            if query.startswith("Reverse ") and ", " in query:
                items = query.removeprefix("Reverse ").rstrip(".").split(", ")
                assert answer == f"Here it is: {', '.join(items[::-1])}."
            if re.match(r"Sort [1-9]|.*Sort them\.$", query) and numbers(query):
                assert numbers(answer) == sorted(numbers(query))
            if " = " in query:
                values = {}
                told = re.findall(r"(\w) = (\w)(?: \+ (\d))?", query)
                for _ in told:
                    for name, base, n in told:
                        value = int(base) if base.isdigit() else values.get(base)
                        if value is not None:
                            values[name] = value + int(n or 0)
                name = query.rstrip("?")[-1]
                assert answer == f"{name} is {values[name]}."


def test_a_short_question_asks_for_what_the_one_before_it_asked():
    """"And Ann?" behind "Where does Tom live?" is answered by where Ann lives."""
    short, thing = 0, re.compile(r"(.*) (is a|is|lives|has|likes) [\w-]+")
    for d in generate("train", 300, families=("expansion",)):
        turns = [m["content"] for m in d["messages"] if m["role"] != "system"]
        for query, before, answer in zip(turns[2::2], turns[1::2], turns[3::2]):
            if query.lower().startswith(("and ", "what about ")):
                short += 1
                (person, said), (other, same) = (thing.match(x).groups() for x in (answer, before))
                asked = person.lower() if query.islower() else person
                assert query.rstrip("?").endswith(asked) and person != other and said == same
    assert short > 50


def test_a_question_about_a_list_is_answered_by_the_list_before():
    asked = unsorted = 0
    for d in generate("train", 300, families=("refinement",)):
        turns = [m["content"] for m in d["messages"] if m["role"] != "system"]
        items = None
        for query, answer in zip(turns[::2], turns[1::2]):
            if ": " in query:
                items = query.split(": ")[1].split(".")[0].split(", ")
            elif items is None:  # "Sort fish, corn."
                items = query.split(" ", 1)[1].rstrip(".").split(", ")
            if answer.startswith("Here it is: "):
                items = answer.removeprefix("Here it is: ").rstrip(".").split(", ")
                continue
            asked += 1
            if answer.startswith("There are "):
                assert numbers(answer) == [len(items)]
            elif answer == "I can only sort numbers.":
                unsorted += 1
                assert not items[0].isdigit()
            else:
                # It may be mistyped, but for its first letter.
                place, = re.findall(" ([fsl])", query.split(". ")[-1])
                item = {"f": items[0], "s": items[1], "l": items[-1]}[place]
                assert answer == f"It is {item}."
    assert asked > 50 and unsorted > 10


def test_what_was_told_last_holds():
    starts = "Your name is", "You live in", "You like", "You work as", "Your favorite color is"
    changes = 0
    for d in generate("train", 1000, families=("recollection",)):
        noted = {}
        for answer in (m["content"] for m in d["messages"] if m["role"] == "assistant"):
            told = answer.startswith("Noted. ")
            for said in answer.removeprefix("Noted. ").removesuffix(".").split(". "):
                start = next((start for start in starts if said.startswith(start)), None)
                if told and start:
                    changes += noted.get(start, said) != said
                    noted[start] = said
                elif start in noted:
                    assert said == noted[start]
    assert changes > 50


def test_recollection_answers_stand_in_earlier_queries():
    for d in generate("train", 300, families=("recollection",)):
        told = ""
        for m in d["messages"]:
            if m["role"] == "user":
                told += m["content"] + " "
            elif m["content"].startswith(("Your name is", "You live in")):
                assert m["content"].split()[-1][:-1] in told


def test_names_are_asked_for_in_small_letters_and_answered_as_they_were_told():
    asked = 0
    for d in generate("train", 600, families=("expansion",)):
        told = ""
        turns = [m["content"] for m in d["messages"] if m["role"] != "system"]
        for query, answer in zip(turns[::2], turns[1::2]):
            person = answer.split()[0]
            if told and query.islower() and person.lower() in query.split():
                asked += person != person.lower()
                assert person in told
            told += query
    assert asked > 20


def test_expansion_answers_stand_in_a_sentence_that_was_told():
    for d in generate("train", 300, families=("expansion",)):
        told = []
        for m in d["messages"]:
            if m["role"] == "user":
                told += m["content"].split(". ")
            if m["role"] != "assistant" or m["content"] in ("Noted.", "You have not told me."):
                continue
            for said in m["content"][:-1].split(". "):
                said = said.replace(" years old", "")
                person, value = said.split()[0], said.split()[-1]
                if said.startswith("The one who "):
                    fact, person = said.rsplit(" is ", 1)
                    value = fact.split()[-1]
                assert any(person in sentence and value in sentence for sentence in told)


# The words that tell of a thing, and those that ask for it.
THINGS = {
    "age": (r"years old|\bage \d", r"old|\bage\b"),
    "city": (r" lives in|\bcity ", r" live"),
    "pet": (r" has a |\bpet ", r"\bpet\b"),
    "job": (r" is a |\bjob ", r"\bjob\b|work"),
    "food": (r" likes |\bfood ", r"\blike"),
}


def test_expansion_says_that_it_was_not_told_what_no_sentence_tells():
    untold = 0
    for d in generate("train", 600, families=("expansion",)):
        said = [m["content"] for m in d["messages"] if m["role"] != "system"]
        told = set()
        for query, answer in zip(said[::2], said[1::2]):
            sentences = query.split(". ")
            question = "" if answer == "Noted." else sentences.pop()
            for sentence in sentences:
                for name, (tells, _) in THINGS.items():
                    if re.search(tells, sentence):
                        told.add((sentence.split()[0].rstrip(":").lower(), name))
            asked = {name for name, (_, asks) in THINGS.items() if re.search(asks, question)}
            words = re.findall(r"[\w'-]+", question.lower())
            if answer == "You have not told me.":
                untold += len(asked)
                assert not any((word, name) in told for word in words for name in asked)
    assert untold > 50


def simple(query):
    return re.sub(r"\W", "", query.lower())


def test_a_greeting_may_come_first():
    """It is what people type first."""
    dialogues = generate("train", 500, families=("recollection",))
    first = [d["messages"][0]["content"] for d in dialogues]
    greetings = {simple(query) for _, queries in talk.TALK for query in queries}
    greeted = [query for query in first if simple(query) in greetings]
    assert 50 < len(greeted) < 150


def test_small_talk_has_one_answer_each_and_the_unknown_one_for_all():
    queries = [query for _, queries in talk.TALK for query in queries]
    assert len(queries) == len(set(map(str.lower, queries))) > 400
    rng = random.Random(0)
    made = [talk.unknown(rng) for _ in range(2000)]
    assert {answer for _, answer in made} == {talk.UNKNOWN}
    assert len({query for query, _ in made}) > 1900
    assert not any(blank in query for query, _ in made for blank in talk.BLANKS)


def test_names_are_cut_into_pieces_that_are_known_well():
    """No name is a token, and each piece of a held-out name is one of names to train on."""

    def cut(words):
        return [TOKENIZER.encode(before + word) for word in words for before in ("", " ")]

    known = {token for tokens in cut(NAMES + CITIES) for token in tokens}
    for tokens in cut(sorted(HELD_OUT)):
        assert len(tokens) > 1 and known.issuperset(tokens)


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


def test_unknown_tokenizer_is_one_line():
    with pytest.raises(ValueError, match="'nanoism' needs no download") as error:
        Tokenizer("no-such")
    assert "\n" not in str(error.value)


def test_train_ranks_merges_the_most_frequent_pair():
    ranks = train_ranks("ab ab ab ac", 258)
    assert list(ranks)[256] in (b"ab", b" a") and len(ranks) == 258


def test_the_ranks_are_made_as_they_are_committed(tmp_path):
    out = tmp_path / "ranks.tiktoken"
    before = RANKS.read_bytes()
    done = subprocess.run([sys.executable, "-m", "data.tokenizer", str(out)], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    assert out.read_bytes() == before == RANKS.read_bytes()
    assert "1276 ranks, equal to ranks.tiktoken" in done.stdout


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


def test_prepare_is_done_once_and_again_when_settings_or_code_change(cache, monkeypatch):
    monkeypatch.setattr(loader, "HERE", cache / "data")
    shutil.copytree(ROOT / "data", cache / "data", ignore=shutil.ignore_patterns("cache", "*.pt"))
    first = prepare(TOKENIZER, 256, n_dialogues=20)
    stamp = (first / "train.tokens.npy").stat().st_mtime_ns
    assert prepare(TOKENIZER, 256, n_dialogues=20) == first
    assert (first / "train.tokens.npy").stat().st_mtime_ns == stamp
    folders = {first, prepare(TOKENIZER, 128, n_dialogues=20)}
    for name in ("tokenizer.py", "chats.py", "loader.py"):
        with open(cache / "data" / name, "a", encoding="utf-8") as file:
            file.write("# edited")
        folders.add(prepare(TOKENIZER, 256, n_dialogues=20))
    assert len(folders) == 5


def test_a_tokenizer_of_another_pattern_or_layout_is_another_one(monkeypatch):
    """A checkpoint names its tokenizer; that of the committed one is today's."""
    before = load_checkpoint(ROOT / "data" / "small.pt")["tokenizer"]
    assert Tokenizer().identity == before
    assert Tokenizer(layout={**LAYOUT, "end": "<|over|>"}).identity != before
    monkeypatch.setattr("data.tokenizer.PATTERN", PATTERN + "|x")
    assert Tokenizer().identity != before


def test_what_stands_in_the_cache_and_is_not_ours_stays(cache):
    folder = cache / "cache"
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


def test_a_damaged_cache_is_made_again(cache):
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


def test_where_the_cache_goes_that_cannot_be_beside_the_code(cache, monkeypatch):
    (cache / "file").touch()
    monkeypatch.setattr(loader, "CACHE", cache / "file" / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "mine"))
    assert prepare(TOKENIZER, 256, n_dialogues=9).parent == cache / "mine" / "nanoism"
    monkeypatch.setenv("NANOISM_CACHE", str(cache / "here"))
    assert prepare(TOKENIZER, 256, n_dialogues=9).parent == cache / "here"
    monkeypatch.setenv("NANOISM_CACHE", str(cache / "file" / "here"))
    with pytest.raises(ValueError, match="let NANOISM_CACHE name a folder"):
        prepare(TOKENIZER, 256, n_dialogues=9)








@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"messages": []}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": "x"}',
        "7",
        '{"messages": [{"role": "robot", "content": "x"}]}',
        '{"messages": [{"role": "user", "content": 5}]}',
    ],
)
def test_a_bad_line_is_reported_by_its_number(cache, line):
    path = write_lines(cache / "chats.jsonl", [line_of_chat(n) for n in range(4)] + [line])
    with pytest.raises(ValueError, match="chats.jsonl, line 5") as error:
        prepare(TOKENIZER, 64, data=path)
    assert "\n" not in str(error.value)
    assert not list((cache / "cache").glob("*.npy"))


def test_long_dialogues_are_cut_at_the_end_of_an_answer(cache, capsys):
    roles = ("user", "assistant") * 6
    long = [{"role": role, "content": "a b c d e f g h"} for role in roles]
    none = [{"role": "user", "content": "a " * 200}, {"role": "assistant", "content": "b"}]
    lines = [line_of_chat(n) for n in range(30)]
    lines += [json.dumps({"messages": messages}) for messages in (long, none)]
    path = write_lines(cache / "chats.jsonl", lines)
    folder = prepare(TOKENIZER, 64, data=path)
    assert "1 dialogues were cut" in capsys.readouterr().out
    for split in read_splits(folder).values():
        assert (np.diff(split.offsets) <= 64).all()
        assert all(split.segments[end - 1] % 2 == 0 for end in split.offsets[1:])


def test_dialogues_without_an_answer_are_left_out(cache, capsys):
    """A batch of them would have no loss, and a mean over nothing is NaN."""
    queries = [{"role": "user", "content": f"Anyone? {n}"} for n in range(40)]
    alone = [json.dumps({"messages": [query]}) for query in queries]
    path = write_lines(cache / "chats.jsonl", alone + [line_of_chat(n) for n in range(20)])
    folder = prepare(TOKENIZER, 64, path)
    assert len(read_splits(folder)["train"].families) == 20
    assert "40 had no answer that fits" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no dialogue with an answer that fits"):
        prepare(TOKENIZER, 64, write_lines(cache / "alone.jsonl", alone))


def test_sharegpt_and_tools_are_the_same_chats(tmp_path):
    """A chat in ShareGPT's form, or with a tool's results, is read as the same one in OpenAI's."""
    rng = random.Random(0)
    names = {
        "system": ["system"],
        "user": ["human", "user", "tool", "observation"],
        "assistant": ["gpt", "assistant"],
    }

    def said():
        role = rng.choice(list(names))
        return {"role": role, "content": rng.choice(("", "hi", "<|end|>", "é 3"))}

    def shared(m):
        return {"from": rng.choice(names[m["role"]]), "value": m["content"]}

    def named(m):
        return {**m, "role": rng.choice(names[m["role"]]), "name": "x"}

    chats = [[said() for _ in range(rng.randint(1, 6))] for _ in range(200)]
    share = [{"conversations": [shared(m) for m in chat]} for chat in chats]
    ours = [{"messages": [named(m) for m in chat]} for chat in chats]
    for form in (share, ours):
        (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, form)), encoding="utf-8")
        assert list(loader.read_chats(tmp_path / "c.jsonl")) == chats
