"""The dialogues that data/synthetic generates: their form, their splits, their right answers."""
import itertools
import json
import random
import re

import pytest
from helpers import TOKENIZER

import data.loader as loader
from data.loader import Split, prepare
from data.synthetic import talk
from data.synthetic.families import FAMILIES, deal, edit, edits, generate, split_of
from data.synthetic.words import (
    CITIES,
    FINAL_CITIES,
    FINAL_NAMES,
    HELD_OUT,
    NAMES,
    NEW_CITIES,
    NEW_NAMES,
)

SIZES = {"train": 3000, "val": 300, "test": 300, "new_words": 300, "final_words": 300}


def dealt(sizes=SIZES, **settings):
    """{split: its dialogues}"""
    splits = {split: [] for split in sizes}
    for split, dialogue in deal(sizes, **settings):
        splits[split].append(dialogue)
    return splits


def text(dialogue):
    return json.dumps(dialogue["messages"], ensure_ascii=False)


def turns(dialogue):
    """[(query, answer), ...]"""
    texts = [m["content"] for m in dialogue["messages"] if m["role"] != "system"]
    return list(zip(texts[::2], texts[1::2]))


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


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
        said = turns(dialogue)
        parts |= {tuple(said[i:j]) for j in range(len(said) + 1) for i in range(j)}
    for dialogue in splits["test"]:
        assert dialogue["family"] == "small talk" or tuple(turns(dialogue)) not in parts


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


def test_answers_are_right():
    """Work the answers of three families out again from the queries alone."""
    for d in generate("train", 1500, families=("follow-up", "refinement", "reasoning")):
        for query, answer in turns(d):
            for word, result in (("plus", sum), ("minus", lambda x: x[0] - x[1])):
                if f" {word} " in answer:
                    assert result(numbers(answer)[:2]) == numbers(answer)[2]
            if answer == talk.UNKNOWN:
                assert re.search(r"(times|multiply .* by) ([3-9]|10)\.?$", query.lower())
            if " times " in answer:
                a, b, c = numbers(answer)
                assert a * b == c and (a < 10 or b < 3)
            if "missing" in query:
                first, second = (part.split(": ")[1].split(", ") for part in query.split(". ")[:2])
                assert answer == f"The second list has no {(set(first) - set(second)).pop()}."
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
        for (_, before), (query, answer) in itertools.pairwise(turns(d)):
            if query.lower().startswith(("and ", "what about ")):
                short += 1
                (person, said), (other, same) = (thing.match(x).groups() for x in (answer, before))
                asked = person.lower() if query.islower() else person
                assert query.rstrip("?").endswith(asked) and person != other and said == same
    assert short > 50


def test_a_question_about_a_list_is_answered_by_the_list_before():
    asked = unsorted = 0
    for d in generate("train", 300, families=("refinement",)):
        items = None
        for query, answer in turns(d):
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


def test_a_list_keeps_two_items_whatever_is_asked():
    """A word may be drawn twice: a list of one would have no second item to ask for."""
    rng, pool = random.Random(0), ["tea", "tea", "rice", "soap"]
    for _ in range(300):
        items = rng.sample(pool, 3)
        for _ in range(20):
            _, items = edit(rng, rng.choice(edits(items, False)), items, [*pool, *"abcdefg"])
            assert len(items) >= 2


def test_what_was_told_last_holds():
    """It stands in an earlier query, and the answers say it until they note another."""
    starts = "Your name is", "You live in", "You like", "You work as", "Your favorite color is"
    changes = 0
    for d in generate("train", 1000, families=("recollection",)):
        noted, told = {}, ""
        for query, answer in turns(d):
            told += query + " "
            if answer.startswith(starts[:2]):
                assert answer.split()[-1][:-1] in told
            for said in answer.removeprefix("Noted. ").removesuffix(".").split(". "):
                start = next((start for start in starts if said.startswith(start)), None)
                if start and answer.startswith("Noted. "):
                    changes += noted.get(start, said) != said
                    noted[start] = said
                elif start in noted:
                    assert said == noted[start]
    assert changes > 50


# The words that tell of a thing, and those that ask for it.
THINGS = {
    "age": (r"years old|\bage \d", r"old|\bage\b"),
    "city": (r" lives in|\bcity ", r" live"),
    "pet": (r" has a |\bpet ", r"\bpet\b"),
    "job": (r" is a |\bjob ", r"\bjob\b|work"),
    "food": (r" likes |\bfood ", r"\blike"),
}


def test_an_answer_on_people_stands_in_a_sentence_that_was_told():
    """As the name was spelled, though it is asked for in small letters. Or no sentence told it."""
    small = untold = 0
    for d in generate("train", 600, families=("expansion",)):
        before, told, things = "", [], set()
        for query, answer in turns(d):
            person = answer.split()[0]
            if before and query.islower() and person.lower() in query.split():
                small += person != person.lower()
                assert person in before
            before += query
            sentences = query.split(". ")
            told += sentences
            question = "" if answer == "Noted." else sentences.pop()
            for sentence in sentences:
                for name, (tells, _) in THINGS.items():
                    if re.search(tells, sentence):
                        things.add((sentence.split()[0].rstrip(":").lower(), name))
            if answer == "You have not told me.":
                asked = [name for name, (_, asks) in THINGS.items() if re.search(asks, question)]
                words = re.findall(r"[\w'-]+", question.lower())
                untold += len(asked)
                assert not things & set(itertools.product(words, asked))
            elif answer != "Noted.":
                for said in answer[:-1].replace(" years old", "").split(". "):
                    person, value = said.split()[0], said.split()[-1]
                    if said.startswith("The one who "):
                        fact, person = said.rsplit(" is ", 1)
                        value = fact.split()[-1]
                    assert any(person in sentence and value in sentence for sentence in told)
    assert small > 20 and untold > 50


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


def test_a_family_of_ones_own_is_a_function_and_an_entry(tmp_path, monkeypatch):
    def echo(rng, words):
        for name in words.names(3):
            yield f"Say {name}.", f"{name}."

    monkeypatch.setattr(loader, "CACHE", tmp_path)
    monkeypatch.setitem(FAMILIES, "echo", (50, echo))
    families = {d["family"] for d in generate("train", 100, families=tuple(FAMILIES), mixed=True)}
    assert families >= {"echo", "mixed"}
    split = Split(prepare(TOKENIZER, 256, n_dialogues=20, families=("echo",)), "new_words")
    assert split.family_names == ["echo"]
    told = TOKENIZER.decode(split.tokens[: split.offsets[1]].tolist())
    assert len([name for name in NEW_NAMES if name in told]) == 3


def test_names_are_cut_into_pieces_that_are_known_well():
    """No name is a token, and each piece of a held-out name is one of names to train on."""

    def cut(words):
        return [TOKENIZER.encode(before + word) for word in words for before in ("", " ")]

    known = {token for tokens in cut(NAMES + CITIES) for token in tokens}
    for tokens in cut(sorted(HELD_OUT)):
        assert len(tokens) > 1 and known.issuperset(tokens)
