"""A file of chats: each thing in it is used, or refused by its name, or left out and counted."""
import json
import random

import numpy as np
import pytest
from helpers import TOKENIZER, line_of_chat, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from data.chats import ALIASES, ROLES, read_chats
from data.loader import prepare, read_splits
from mask import MASKS, loss_positions

NAMES = {role: [role] for role in ROLES}  # all that a role may be called
for alias, role in ALIASES.items():
    NAMES[role].append(alias)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("data.loader.CACHE", tmp_path / "cache")
    return tmp_path


def write(folder, records):
    """A file of these records; a text is a line as it stands."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    return write_lines(folder / "c.jsonl", lines)


# Keys that change nothing.
HARMLESS = {"name": "x"}, {"weight": 1}, {"loss": None}, {"loss": True}, {"tool_calls": []}


def said(rng):
    """A random dialogue as ours: messages with texts that are easily lost."""
    texts = "", "hi", "<|end|>", "é 3", "a\nb", "\u202f000\xa0!", "  x "
    roles = [rng.choice(ROLES) for _ in range(rng.randint(1, 7))]
    return [{"role": role, "content": rng.choice(texts)} for role in roles]


def in_some_form(messages, rng):
    """The same dialogue as somebody may have written it."""
    told = []
    for m in messages:
        content = m["content"]
        if rng.random() < 0.3:  # as parts of text
            cut = rng.randint(0, len(content))
            rest = rng.choice((content[cut:], {"text": content[cut:]}))
            content = [{"type": "text", "text": content[:cut]}, rest]
        message = {
            rng.choice(("role", "from")): rng.choice(NAMES[m["role"]]),
            rng.choice(("content", "value")): content,
        }
        if rng.random() < 0.3:
            message |= rng.choice(HARMLESS)
        told.append(message)
    doubled = len(messages) > 1 and messages[1] == messages[0]
    record = {rng.choice(("messages", "conversations")): told}
    if messages[0]["role"] == "system" and not doubled and rng.random() < 0.5:
        record["system"] = messages[0]["content"]
        del told[0]
        if not told or not record["system"]:
            return {"messages": messages}
    if rng.random() < 0.3:
        record |= {"id": 7, "source": "x", "tools": None}
    return record


def test_a_dialogue_is_the_same_in_all_forms(tmp_path):
    rng = random.Random(0)
    dialogues = [said(rng) for _ in range(1000)]
    path = write(tmp_path, [in_some_form(messages, rng) for messages in dialogues])
    assert list(read_chats(path)) == dialogues


def test_alpacas_form(tmp_path):
    rng = random.Random(1)
    dialogues, records = [], []
    for _ in range(200):
        turns = [(f"q {rng.random()}", f"a {rng.random()}") for _ in range(rng.randint(1, 4))]
        extra = rng.choice(("", "more"))
        record = {"instruction": turns[-1][0], "output": turns[-1][1], "input": extra}
        record["history"] = [list(t) for t in turns[:-1]]
        asked = [q for q, _ in turns]
        if extra:
            asked[-1] += f"\n{extra}"
        messages = []
        for query, (_, answer) in zip(asked, turns):
            messages.append({"role": "user", "content": query})
            messages.append({"role": "assistant", "content": answer})
        if rng.random() < 0.5:
            record["system"] = "Be kind."
            messages.insert(0, {"role": "system", "content": "Be kind."})
        records.append(record)
        dialogues.append(messages)
    assert list(read_chats(write(tmp_path, records))) == dialogues


USER, ANSWER = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
BAD = [  # a record, and words of the error
    ("{", "is not JSON"),
    ([USER], "on a line of its own, got a list"),
    (7, "got a int"),
    ({}, "among nothing"),
    ({"messages": []}, "'messages' is no list of messages"),
    ({"messages": "x"}, "'messages' is no list of messages"),
    ({"conversations": {}}, "'conversations' is no list"),
    ({"messages": [USER, ANSWER], "images": ["a.png"]}, "'images' is not supported, only text"),
    ({"messages": [USER, ANSWER], "system": 5}, "'system' is no text but a int"),
    ({"prompt": "x", "completion": "y"},
     "neither 'messages' nor 'conversations' nor 'instruction' among completion, prompt"),
    ({"chosen": [USER], "rejected": [USER]}, "among chosen, rejected"),
    ({"instruction": "x", "input": "y"}, "line 2: there is 'instruction', but not 'output'"),
    ({"instruction": "x", "output": "y", "history": ["a"]}, "'history' must be pairs"),
]
BAD_MESSAGES = [  # the second message, and words of the error
    ("hi", "message 2 is no object but a str"),
    ({"content": "x"}, "message 2: the role is null"),
    ({"role": ["user"], "content": "x"}, "message 2: the role is"),
    ({"role": "robot", "content": "x"},
     'message 2: the role is "robot"; known are system, user, assistant, human'),
    ({"role": "assistant"}, "message 2: content is missing"),
    ({**ANSWER, "content": None}, "message 2: content is null"),
    ({**ANSWER, "content": None, "tool_calls": [{}]},
     "message 2: content is null (tool_calls is not supported)"),
    ({**ANSWER, "content": 5}, "message 2: content is no text but a int"),
    ({**ANSWER, "content": [{"type": "image_url"}]},
     "message 2: content has a part of type image_url; only text"),
    ({**ANSWER, "weight": 0.5}, "message 2: the weight is 0.5; known are 0 and 1"),
]
BAD += [({"messages": [USER, bad]}, f"line 2, {words}") for bad, words in BAD_MESSAGES]


@pytest.mark.parametrize("record, words", BAD)
def test_what_is_refused_is_named_with_its_line_and_message(cache, record, words):
    path = write(cache, [{"messages": [USER, ANSWER]}, record])
    with pytest.raises(ValueError, match="^" + path + ", line 2") as error:
        prepare(TOKENIZER, 64, data=path)
    told = str(error.value)
    assert words in told and "--skip_bad" in told and "\n" not in told
    assert not list((cache / "cache").glob("*/*.npy"))


def test_bad_lines_can_be_skipped_and_are_counted(tmp_path, capsys):
    good = [{"messages": [USER, {**ANSWER, "content": str(n)}]} for n in range(30)]
    mixed = good + [record for record, _ in BAD]
    random.Random(0).shuffle(mixed)
    found = list(read_chats(write(tmp_path, mixed), skip_bad=True))
    answers = sorted(messages[1]["content"] for messages in found)
    assert answers == sorted(record["messages"][1]["content"] for record in good)
    assert f": {len(BAD)} lines that cannot be read, the first line " in capsys.readouterr().out


def test_what_is_left_out_is_counted_and_told(tmp_path, capsys):
    records = [
        {"messages": [USER, {**ANSWER, "reasoning_content": "because", "tool_calls": [{"id": 1}]}]},
        {"messages": [USER, {**ANSWER, "reasoning_content": "because"}], "tools": [{"x": 1}]},
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "z"}],
         "tools": "[]", "system": "s"},
    ]
    found = list(read_chats(write(tmp_path, records)))
    texts = [[m["content"] for m in messages] for messages in found]
    assert texts == [["x", "y"], ["x", "y"], ["s", "x", "z"]]
    told = capsys.readouterr().out
    assert told.count("\n") == 1
    assert "2 times reasoning_content, 1 times tool_calls, 2 times tools" in told


ROLE, WEIGHT = st.sampled_from(("user", "assistant")), st.sampled_from((None, 0, 1, False, True))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(ROLE, WEIGHT), min_size=1, max_size=8))
def test_an_answer_of_no_weight_is_given_and_not_learned(turns):
    """Its tokens stand where they would, but in the query's segment. Only other answers have
    loss."""
    messages, learned = [], 0
    for i, (role, weight) in enumerate(turns):
        message = {"role": role, "content": f"{role} {i}"}
        if role == "assistant":
            if weight in (0, False):
                message["given"] = True
            else:
                learned += 1
        messages.append(message)
    tokens, segments = TOKENIZER.encode_dialogue(messages)
    plain, _ = TOKENIZER.encode_dialogue([{**m, "given": False} for m in messages])
    without = lambda ids: [t for t in ids if t != TOKENIZER.headers["assistant"]]
    assert without(tokens) == without(plain)  # a header may stand at the end of the query before
    for message in messages:
        text = TOKENIZER.encode(message["content"])
        start = next(j for j in range(len(tokens)) if tokens[j : j + len(text)] == text)
        is_given = message["role"] != "assistant" or "given" in message
        parity = 1 if is_given else 0
        assert all(segment % 2 == parity for segment in segments[start : start + len(text)])
    assert len({segment for segment in segments if segment % 2 == 0}) == learned


def test_weights_in_a_file_reach_the_training(cache):
    def turn(n, **options):
        answer = {"role": "assistant", "content": f"say {n}", **options}
        return [{"role": "user", "content": f"ask {n}"}, answer]

    records = [{"messages": turn(n, weight=0) + turn(n + 100)} for n in range(6)]
    for n in range(6):
        query = {"from": "human", "value": f"q {n}"}
        answer = {"from": "gpt", "value": "ok", "loss": False}
        records.append({"conversations": [query, answer, *turn(n)]})
    splits = read_splits(prepare(TOKENIZER, 64, write(cache, records)))
    for split in splits.values():
        for row in split.rows(MASKS["ism"]):
            tokens, segments = split.collate(row[None])
            trained = loss_positions(segments, MASKS["ism"](segments))
            learned = TOKENIZER.decode(tokens.roll(-1, 1)[trained].tolist())
            assert segments.max() == 2 and learned.startswith("say ")


def test_columns_that_are_null_say_nothing_and_a_byte_order_mark_neither(tmp_path, capsys):
    """Tables with a column for each form have null in the others."""
    said = [USER, {**ANSWER, "content": [{"type": "output_text", "text": "y"}, {"text": ""}]}]
    records = [
        {"messages": said, "conversations": None, "instruction": None, "kto_tag": None},
        {"messages": None, "conversations": said, "kto_tag": True},
        {"messages": None, "instruction": "x", "output": "y"},
        {"messages": said, "chosen": ANSWER, "rejected": {**ANSWER, "content": "z"}},
    ]
    path = tmp_path / "c.jsonl"
    text = "\r\n".join(map(json.dumps, records))
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert list(read_chats(path)) == [[USER, ANSWER]] * 4
    assert "1 times chosen, 1 times rejected" in capsys.readouterr().out


@pytest.mark.parametrize("flag", [
    {"weight": 0}, {"loss": False}, {"train": False}, {"training": False}, {"trainable": False},
    {"loss_mask": 0}, {"mask": True}, {"loss_weight": 0.0}, {"loss_scale": 0}, {"label": False},
    {"trained": False}, {"masked": 1}])
def test_an_answer_that_another_tool_marks_is_not_learned(tmp_path, flag):
    """Nor is any answer of a line that is marked; what is marked the other way is learned."""
    path = tmp_path / "c.jsonl"
    (key, value), = flag.items()
    lines = [{"messages": [USER, {**ANSWER, key: x}]} for x in (value, 1 - value, None)]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    given = {**ANSWER, "given": True}
    assert list(read_chats(path)) == [[USER, given], [USER, ANSWER], [USER, ANSWER]]
    path.write_text(json.dumps({"messages": [USER, ANSWER], **flag}), encoding="utf-8")
    if key == "label":
        with pytest.raises(ValueError, match="'label' is false, so its answer"):
            list(read_chats(path))
    else:
        assert next(read_chats(path))[1] == given


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
