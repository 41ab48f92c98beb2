"""A conversation: its characters and tokens are kept, text stays text, and it is one at a time."""

import gc
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import ANSWER, SPECIAL, TOKENIZER, USER, check_cache, fails, make_chat, peak_memory
from hypothesis import given, settings
from hypothesis import strategies as st

import model as model_module
from mask import MASKS
from sample import BUSY, Chat, command, go_on, load_chat, read_history

SPECIAL_IDS = {TOKENIZER.end, *TOKENIZER.headers.values()}
SAYABLE = sorted({*range(TOKENIZER.vocab_size)} - {*TOKENIZER.unsayable, TOKENIZER.end})


def special(tokens):
    return [token for token in tokens if token in SPECIAL_IDS]


def answer_with(chat, tokens, query="go"):
    """The pieces of the chat's answer to a query, when its model is made to write these tokens."""
    forced, feed = iter(tokens), chat.feed

    def forcing(*given):
        logits = feed(*given)
        logits[next(forced, TOKENIZER.end)] = 1e6
        return logits

    chat.feed = forcing
    pieces = list(chat.stream(query))
    chat.feed = feed
    return pieces


# --- what is said -------------------------------------------------------------------------------

# What str.isprintable denies and people write; what drives a terminal; special tokens as text.
ODD = ["\xa0", "\u202f", "\u200d", "\u3000", "\xad", "\U0001fae9", "\u2028", "\x1b[31m", "\u202e",
       "\x00", "é", " ", "a", "\U000e0067", *SPECIAL]
HALVES = ["\ud83d", "\udcff"]  # of pairs of surrogates


def test_a_conversation_saved_and_loaded_has_the_characters_and_tokens_it_had(
    tmp_path, monkeypatch
):
    """And the special tokens of its layout alone, whatever its text spells."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    rng = random.Random(0)
    for _ in range(25):
        chat = make_chat(block_size=512, max_new_tokens=200, temperature=0.0)
        for _ in range(2):
            said = "".join(rng.choices(ODD, k=rng.randint(1, 8)))
            asked = "".join(rng.choices([*ODD, *HALVES], k=rng.randint(0, 8)))
            written = TOKENIZER.encode(said)
            answer = "".join(answer_with(chat, written, asked))
            assert answer == said == chat.messages[-1]["content"]
            assert chat.messages[-2]["content"] == asked
            # Any tokens: not those of their own text, and no whole characters.
            written = rng.choices(SAYABLE, k=rng.randint(0, 20))
            answer = "".join(answer_with(chat, written, asked))
            assert answer == TOKENIZER.decode(written) == chat.messages[-1]["content"]
        assert not command(chat, "/save ~/x.json")
        again = make_chat(block_size=512, max_new_tokens=5)
        go_on(again, read_history(tmp_path / "x.json"))
        assert again.layout() == chat.layout() and again.messages == chat.messages
        again.send("and?")
        assert len(special(chat.layout()[0])) == 16 and len(special(again.layout()[0])) == 20
        check_cache(again)


def test_tokens_in_a_history_that_are_not_those_of_its_text_are_left_aside():
    chat = make_chat()
    right = TOKENIZER.encode_answer("y")
    a_and_b = [*TOKENIZER.encode("a"), *TOKENIZER.encode("b")]
    for tokens in (None, {}, "y", ["y"], [1.0], [True], [-1], [1 << 70], TOKENIZER.encode("z"),
                   right, [TOKENIZER.headers["user"]], [right], [None]):
        go_on(chat, [USER, {**ANSWER, "tokens": tokens}])
        assert chat.turns[-1][1] == right
    go_on(chat, [USER, {"role": "assistant", "content": "ab", "tokens": a_and_b}])
    assert chat.turns[-1][1] == [*a_and_b, TOKENIZER.end] != TOKENIZER.encode_answer("ab")
    assert chat.messages[-1] == {"role": "assistant", "content": "ab"}


PARTS = st.one_of(st.sampled_from([*ODD, *HALVES, "<|", "<|end", "nd|>"]), st.text(max_size=4))
PARTS = st.lists(PARTS, min_size=1, max_size=6).map("".join).filter(bool)


@settings(max_examples=100, deadline=None)
@given(system=PARTS, query=PARTS, answer=PARTS)
def test_no_entry_lets_a_special_token_in(system, query, answer):
    """The special tokens are those of the layout, as many as there are messages.

    In the system prompt, a query, a history and data.
    """
    system_id, end = TOKENIZER.headers["system"], TOKENIZER.end
    turn = [TOKENIZER.headers["user"], end, TOKENIZER.headers["assistant"], end]
    chat = make_chat(block_size=1024, max_new_tokens=3, system=system)
    assert special(chat.system) == [system_id, end]
    chat.send(query)
    assert special(chat.layout()[0]) == [system_id, end, *turn]
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": query},
        {"role": "assistant", "content": answer},
    ]
    go_on(chat, messages)
    chat.send(query)
    assert special(chat.layout()[0]) == [system_id, end, *turn, *turn]
    assert special(TOKENIZER.encode_dialogue(messages)[0]) == [system_id, end, *turn]
    check_cache(chat)


@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1, max_size=20), seed=st.integers(0, 10**6))
def test_characters_are_streamed_whole(text, seed):
    """An answer's tokens may end inside of a character; its pieces hold whole characters alone."""
    rng = random.Random(seed)
    raw = text.encode("utf-8", "replace")
    tokens = [TOKENIZER.encoding.encode_single_token(bytes([byte])) for byte in raw]
    if rng.random() < 0.3:
        tokens = tokens[: rng.randrange(len(tokens)) + 1]  # cut off, maybe inside of a character
    chat = make_chat(block_size=256, temperature=0.0, max_new_tokens=100)
    pieces = answer_with(chat, tokens)
    expected = raw[: len(tokens)].decode("utf-8", "replace")
    assert "".join(pieces) == expected == chat.messages[-1]["content"]
    for piece in pieces[:-1]:
        assert piece == "" or piece in expected
    if "\ufffd" not in raw.decode("utf-8"):
        assert all("\ufffd" not in piece for piece in pieces[:-1])


# --- one at a time ------------------------------------------------------------------------------


def test_a_second_call_while_an_answer_is_written_is_refused():
    """And changes nothing: the answer is that of a chat without it."""
    calls = (
        lambda chat: chat.send("hi"), lambda chat: next(chat.stream("hi")), Chat.reset,
        lambda chat: go_on(chat, [USER, ANSWER]),
        lambda chat: go_on(chat, [{**USER, "role": "system"}, USER, ANSWER]),
    )
    for seed in range(12):
        rng = random.Random(seed)
        mask = rng.choice(list(MASKS))
        chat, alone = (make_chat(mask, 128, seed, max_new_tokens=8) for _ in "ab")
        for number in range(3):
            stream, answer = chat.stream(f"hi {number}"), ""
            for piece in stream:
                answer += piece
                # The last piece comes when the turn is closed.
                if rng.random() < 0.5 and chat.busy.locked():
                    assert fails(rng.choice(calls), chat) == BUSY
            assert answer == alone.send(f"hi {number}")
            assert chat.layout() == alone.layout() and chat.messages == alone.messages
        check_cache(chat)


def test_threads_that_send_at_once():
    chat = make_chat("ism", 512, max_new_tokens=6)

    def send(number):
        try:
            return "answered", chat.send(str(number))
        except ValueError as error:
            return "refused", str(error)

    with ThreadPoolExecutor(6) as threads:
        results = list(threads.map(send, range(24)))
    assert {said for kind, said in results if kind == "refused"} <= {BUSY}
    answers = sorted(said for kind, said in results if kind == "answered")
    kept = [m["content"] for m in chat.messages if m["role"] == "assistant"]
    assert len(chat.turns) == len(answers) > 0 and sorted(kept) == answers
    check_cache(chat)


def numbers_alive():
    """How many numbers all tensors have that are alive."""
    kinds = torch.Tensor, torch.nn.Parameter
    return sum(x.numel() for x in gc.get_objects() if type(x) in kinds)


@pytest.mark.parametrize("mask", ["ism", "prefix"])
def test_hundreds_of_turns(mask):
    """Nothing drifts and memory does not grow, where answers are closed or dropped at any place.

    In one conversation that overflows its context again and again.
    """
    rng, told, held, resident = random.Random(1), [], [], []
    chat = make_chat(mask, 128, system="Be kind.", notify=told.append)
    for number in range(1, 251):
        stream = chat.stream("Ann lives in Rome " * rng.randint(0, 8))
        for _ in zip(range(rng.choice((1, 2, 999))), stream):
            pass
        if rng.random() < 0.5:
            stream.close()
        del stream
        if number % 20 == 0:
            check_cache(chat)
        if number % 50 == 0:
            gc.collect()
            held.append(numbers_alive())
            resident.append(peak_memory())
    assert len(chat.messages) == 501 and len(told) > 10
    assert max(held) - min(held) <= 2 * chat.size  # the f of one turn and of another
    assert resident[-1] - resident[0] < 20  # MB
    chat.reset()
    assert chat.layout() == (chat.system, [1] * len(chat.system))


# --- of which model -----------------------------------------------------------------------------


def test_a_chat_with_a_changed_layer_is_that_of_the_model(trained, monkeypatch):
    def changed(self, x):
        return -before(self, x)

    before, told = model_module.MLP.forward, []
    monkeypatch.setattr(model_module.MLP, "forward", changed)
    chat = load_chat(trained, "cpu", notify=told.append, max_new_tokens=20)
    assert len(told) == 1 and "model.py was changed" in told[0] and "one token" in told[0]
    for query in ("My name is Ann.", "Who am I?"):
        chat.send(query)
        tokens, segments = (torch.tensor([row]) for row in chat.layout())
        logits = chat.model(tokens, MASKS["ism"](segments))[0]  # (T, V)
        logits[:, chat.silent] = -torch.inf
        n = len(chat.turns[-1][1])
        written = n - 1 if n > 20 else n  # what max_new_tokens cut off has no <|end|> of its own
        start = tokens.shape[1] - n
        likeliest = logits.argmax(1)[start - 1 : start - 1 + written]
        assert likeliest.tolist() == chat.turns[-1][1][:written]


def test_a_chat_takes_the_folder_of_a_run_and_tells_of_another_mask(trained):
    told = []
    chat = load_chat(trained, "cpu", mask="causal", notify=told.append)
    assert told == ["[trained under ism: to read well under causal it has to learn it first]"]
    load_chat(trained / "ckpt.pt", "cpu", mask="ism", notify=told.append)
    assert len(told) == 1
    load_chat(trained / "ckpt.pt", "cpu", block_size=32, notify=told.append)
    assert told[1:] == ["[--block_size is for folders: this checkpoint has 256 tokens]"]
    assert isinstance(chat.send("hi"), str)
