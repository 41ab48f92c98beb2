"""Chat: its cache equals one fresh forward after every turn, and it survives what people type."""

import random
import sys

import pytest
import torch
from helpers import TOKENIZER, check_cache, make_chat
from hypothesis import given, settings
from hypothesis import strategies as st

import sample as sample_module
from data.checkpoint import load_checkpoint, save_checkpoint
from mask import MASKS
from model import faster, sdpa
from sample import go_on, sample


def sessions(count):
    rng = random.Random(7)
    for number in range(count):
        chat = make_chat(
            rng.choice(list(MASKS)),
            rng.choice((48, 96, 128)),
            seed=number,
            token_shift=rng.random() < 0.5,
            system=rng.choice(("", "Be kind.")),
        )
        for _ in range(rng.randint(1, 8)):
            longest = chat.size // rng.choice((1, 3, 12))
            words = ["Ann", "lives", "in", "Rome", "7", "é", "<|end|>"]
            text = " ".join(rng.choices(words, k=rng.randint(0, longest)))
            chat.temperature = rng.choice((0.0, 1.0))
            chat.top_k = rng.choice((0, 5))
            chat.top_p = rng.choice((1.0, 0.5))
            chat.max_new_tokens = rng.choice((1, 5, 30, 200))
            if rng.random() < 0.1:
                chat.reset()
            try:
                stream = chat.stream(text)
                for _ in range(rng.choice((0, 1, 3, 999))):  # 999: to its end
                    if next(stream, None) is None:
                        break
                stream.close()
            except ValueError:
                assert len(text) > 20
            if chat.turns:
                check_cache(chat)


def test_a_loaded_history_is_laid_out_as_in_training():
    rng, chat = random.Random(3), make_chat()

    def say(role):
        words = rng.choices(["Ann", "Rome", "7", "é", "<|end|>"], k=rng.randint(0, 4))
        return {"role": role, "content": " ".join(words)}

    for _ in range(200):
        messages = [say("system")] * rng.randint(0, 1)
        for _ in range(rng.randint(1, 4)):
            messages += [say("user") for _ in range(rng.choice((1, 1, 2)))] + [say("assistant")]
        chat.messages = []
        go_on(chat, messages)
        assert chat.layout() == TOKENIZER.encode_dialogue(messages)


def test_random_sessions():
    sessions(40)


@pytest.mark.slow
def test_thousands_of_random_sessions():
    sessions(3000)


def test_each_turn_is_read_once_under_ism():
    for mask, once in (("ism", True), ("causal", True), ("prefix", False)):
        chat, read = make_chat(mask, 256), []
        for text in ("one", "two two", "three"):
            chat.send(text)
            read.append(chat.stats["prefill tokens"])
        queries = [len(query) for query, _ in chat.turns]
        assert (read == queries) == once


def test_chat_under_ism_never_builds_a_mask(monkeypatch):
    chosen = []

    def choose(*arguments):
        chosen.append(original(*arguments))
        return chosen[-1]

    chat = make_chat("ism", 256)
    original = faster(chat.model).choose_attention
    chat.read_one = chat.model.reader(chat.model, chat.cache)
    monkeypatch.setattr(chat.model, "choose_attention", choose)
    for text in ("one", "two two", "three"):
        chat.send(text)
    # One choice a query, and each time attention to all. A token of an answer has no choice: it
    # sees the whole cache.
    assert chosen == [sdpa] * 3


def test_a_history_is_read_in_one_call_and_goes_on_the_same():
    a = make_chat("ism", 256, temperature=0.0)
    first = [a.send(text) for text in ("one", "two")]
    b = make_chat("ism", 256, temperature=0.0)
    # Text does not always encode back to the sampled tokens, so the ids are handed over.
    go_on(b, a.messages)
    b.turns = [(list(q), list(r)) for q, r in a.turns]
    assert b.send("three") == a.send("three") and len(first) == 2
    assert b.stats["prefill tokens"] == b.cache.length - b.stats["decode tokens"]


def test_overflow_keeps_the_system_prompt_and_tells():
    told = []
    chat = make_chat("ism", 96, system="Be kind.", notify=told.append)
    for _ in range(12):
        chat.send("Ann lives in Rome")
        tokens, _ = chat.layout()
        assert tokens[: len(chat.system)] == chat.system and len(tokens) <= 96
        check_cache(chat)
    assert any("forgotten" in line for line in told)
    assert len(chat.messages) == 25  # the conversation itself is whole


def test_overflow_in_the_middle_of_an_answer():
    told = []
    chat = make_chat("ism", 64, notify=told.append, max_new_tokens=40)
    chat.silent = torch.tensor([*TOKENIZER.unsayable, TOKENIZER.end])  # an answer without end
    for _ in range(3):
        chat.send("Ann lives in Rome")
        check_cache(chat)
    assert told
    chat.max_new_tokens = 500
    chat.send("x")
    check_cache(chat)
    assert "filled the context" in told[-1]


def test_a_query_longer_than_the_context_is_refused_and_changes_nothing():
    chat = make_chat("ism", 64)
    chat.send("hi")
    before = chat.layout()
    for text in ("word " * 100, "x" * 1_000_000):
        with pytest.raises(ValueError, match="too long"):
            chat.send(text)
    assert chat.layout() == before
    check_cache(chat)


@pytest.mark.parametrize("mask", MASKS)
def test_an_interrupted_read_leaves_the_chat_as_it_was(monkeypatch, mask):
    chat = make_chat(mask, 256)
    chat.send("hi")
    before, feed = chat.layout(), chat.feed

    def interrupted(*tokens):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "feed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat.send("Who am I?")
    monkeypatch.setattr(chat, "feed", feed)
    assert chat.layout() == before and len(chat.messages) == 2
    chat.send("Who am I?")
    check_cache(chat)


def test_stop_ends_the_answer():
    chat = make_chat("ism", 128, max_new_tokens=50)
    chat.silent = torch.tensor([*TOKENIZER.unsayable, TOKENIZER.end])
    pieces = []
    for piece in chat.stream("hi"):
        pieces.append(piece)
        chat.stop = len(pieces) == 3
    assert len(chat.turns[-1][1]) == 4  # three tokens and <|end|>
    check_cache(chat)


def test_no_special_token_is_sampled():
    chat = make_chat("ism", 256, temperature=3.0, max_new_tokens=100)
    for text in ("<|end|><|assistant|>", "b"):
        chat.send(text)
    special = {*TOKENIZER.headers.values(), TOKENIZER.end}
    for _, answer in chat.turns:
        assert not special & set(answer[:-1])
        assert answer[-1] == TOKENIZER.end


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-50, 50), min_size=2, max_size=20),
    st.integers(0, 25),
    st.floats(0.01, 1),
    st.integers(0, 10**6),
)
def test_sample_stays_in_its_set(logits, top_k, top_p, seed):
    logits = torch.tensor(logits) / 10  # equal or well apart
    token = sample(logits.clone(), 1.0, top_k, top_p, torch.Generator().manual_seed(seed))
    larger = logits > logits[token]
    assert not top_k or larger.sum() < top_k
    kept = logits
    if top_k:
        least = logits.topk(min(top_k, len(logits))).values[-1]
        kept = logits[logits >= least]
    assert kept[kept > logits[token]].exp().sum() / kept.exp().sum() < top_p + 1e-4
    assert sample(logits, 0.0) == int(logits.argmax())


def test_sample_at_the_limits_of_float32():
    logits = torch.tensor([0.0, 2.0, -torch.inf, 1.0])
    for extreme in ({"temperature": 1e-46}, {"temperature": 1.0, "top_p": 1e-46}):
        assert sample(logits.clone(), **extreme) == 1
    assert sample(logits.clone(), temperature=1e300) != 2
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="not numbers"):
            sample(torch.tensor([0.0, torch.nan]), temperature)


def test_damaged_weights_are_told_on_loading(tmp_path, last_words):
    state = torch.load(sample_module.SMALL_MODEL, weights_only=True)
    for name in ("norm.weight", "blocks.1.mlp.up.weight"):
        weights = {**state["model"], name: state["model"][name].clone()}
        weights[name][3] = torch.inf if name == "norm.weight" else torch.nan
        torch.save({**state, "model": weights}, tmp_path / "ckpt.pt")
        said = last_words(sample_module, "--ckpt", str(tmp_path))
        assert f"{name} holds NaN or infinite numbers" in said


def test_a_model_whose_training_goes_on_is_told(tmp_path):
    state = load_checkpoint(sample_module.SMALL_MODEL)
    steps = state["settings"]["max_iters"]
    for step, lines in ((7, [f"[trained for 7 of {steps:,} steps so far]"]), (steps, [])):
        save_checkpoint(tmp_path / "ckpt.pt", **{**state, "step": step})
        told = []
        sample_module.load_chat(tmp_path, "cpu", notify=told.append)
        assert [line for line in told if "steps" in line] == lines


def test_an_answer_that_is_cut_or_goes_in_circles_is_told(capsys):
    told = []
    chat = make_chat(block_size=512, notify=told.append, temperature=0.0, max_new_tokens=5)
    chat.silent = torch.tensor([*TOKENIZER.unsayable, TOKENIZER.end])  # an answer without end
    chat.send("hi")
    assert "--max_new_tokens is 5" in told[0] and len(chat.turns[-1][1]) == 6
    chat.max_new_tokens = 300
    monotone = torch.zeros(TOKENIZER.vocab_size).index_fill(0, torch.tensor([65]), 1.0)
    chat.feed = lambda *tokens: monotone.clone()
    sample_module.answer(chat, "hi")
    assert "in circles" in capsys.readouterr().out and len(chat.turns[-1][1]) == 25
    random.seed(0)
    for n in range(1, 80):
        run = [random.randrange(99) for _ in range(n)]
        assert sample_module.in_circles([7, *run * 24]) == (n <= 64)
        assert not sample_module.in_circles(3 * run + [100])


@pytest.mark.parametrize("text", [None, b"hi", 5, ["hi"]])
def test_a_query_is_text(text):
    with pytest.raises(ValueError, match="a query is text, not"):
        make_chat().send(text)


def test_what_a_terminal_sends(monkeypatch, capsys):
    """Keys that nothing edits are no query; no command ends the chat but /quit."""
    lines = ["\x1b[A", "\x1bOA\x1b[1;5C", "\x1b", "x" * 4095, "/mask", "/stats",
             "/save ~nosuch/x.json", "/save a\0b", "/save", "\x1b[200~hi\x1b[201~", "/mask"]
    chat = make_chat(max_new_tokens=2)
    monkeypatch.setattr("builtins.input", lambda _: lines.pop(0) if lines else "/quit")
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setitem(sys.modules, "readline", None)
    sample_module.talk(chat, [])
    assert [m["content"] for m in chat.messages if m["role"] == "user"] == ["hi"]
    out = capsys.readouterr().out
    for words in ("4,095 bytes", "nothing to draw", "home directory", "<|assistant|> ####"):
        assert out.count(words) == 1, words
    assert out.count("[not saved") == 3
    go_on(chat, chat.messages)
    sample_module.command(chat, "/mask")  # nothing is in the cache yet
    assert "<|assistant|> ####" in capsys.readouterr().out
    sample_module.command(chat, "/mask ism")
    assert capsys.readouterr().out.startswith("[/mask only draws")
    go_on(chat, 20 * chat.messages)
    sample_module.command(chat, "/mask")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("The last 60 of ") and lines[1:61][-1].endswith("#")
    assert len(lines) == 62 and lines[-1].startswith("A column is")
    sample_module.command(chat, "/reset")
    assert capsys.readouterr().out == "[forgotten]\n" and not chat.messages
