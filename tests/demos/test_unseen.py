"""The demo on unseen names and questions: its counts against the chat's own answers."""

import sys

import pytest
import torch
from helpers import TOKENIZER, make_chat

from data.synthetic import generate
from data.synthetic.words import FINAL_CITIES, FINAL_NAMES
from demos.unseen import answers, first_words, main, new_names, scored


@pytest.fixture
def chat():
    return make_chat(block_size=256, temperature=0.0, max_new_tokens=40)


def test_an_answer_is_right_if_each_of_its_tokens_is_the_likeliest(chat):
    """A model that knows what comes next, but for one token in the second answer."""
    dialogue = next(generate("final_words", 1, families=("follow-up",)))
    tokens, segments = TOKENIZER.encode_dialogue(dialogue["messages"])

    def knowing(tokens, f):
        following = tokens.roll(-1)
        following[0, segments.index(4)] += 1
        return torch.nn.functional.one_hot(following, 2000).float()

    chat.model = knowing
    found = list(scored(chat, dialogue))
    assert [right for _, right in found] == [True, False] + [True] * (len(found) - 2)
    said = [m["content"] for m in dialogue["messages"] if m["role"] == "assistant"]
    assert [answer for answer, _ in found] == said


def test_new_names_are_counted_by_family(chat):
    counts = new_names(chat, 80)
    assert {"expansion", "mixed", "the four patterns"} <= set(counts)
    needed = 0
    for dialogue in generate("final_words", 80, mixed=True):
        tokens, _ = TOKENIZER.encode_dialogue(dialogue["messages"])
        if len(tokens) <= 256:
            said = [m["content"] for m in dialogue["messages"] if m["role"] == "assistant"]
            for text in said:
                if any(word in text for word in FINAL_NAMES + FINAL_CITIES):
                    needed += 1
    by_family = {family: n for family, (n, _) in counts.items()}
    del by_family["the four patterns"]  # a sum of others
    assert sum(by_family.values()) >= needed > 30
    assert all(0 <= right <= asked for asked, right in counts.values())


def test_answers_that_do_not_end_are_told(chat):
    ((question, answer, ended),) = answers(chat, ["Who are you?"])
    assert question == "Who are you?" and answer == chat.messages[-1]["content"]
    assert ended == (len(chat.turns[0][1]) <= 40)


def test_what_is_said_first_is_said_and_answered_as_in_training():
    taught = {}
    for dialogue in generate("final_words", 6000, families=("recollection",)):
        query, answer = [m["content"] for m in dialogue["messages"] if m["role"] != "system"][:2]
        taught[query] = answer
    for small in (False, True):
        for turns in first_words(small).values():
            common = [(taught[query], answer) for query, answer in turns if query in taught]
            assert len(common) >= 5 and all(a == b for a, b in common)
            assert not small or all(query == query.lower() for query, _ in turns)


def test_a_missing_checkpoint_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["unseen.py", "--ckpt", "no-such.pt"])
    with pytest.raises(SystemExit, match="unseen.py: no checkpoint at no-such.pt"):
        main()
