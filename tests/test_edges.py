"""Hard edges: what people's own files, machines and habits do to it."""

import gzip
import importlib.util
import io
import json
import os
import pathlib
import random
import re
import shlex
import signal
import struct
import subprocess
import sys
import threading
import unicodedata

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from helpers import TOKENIZER, check_cache, exact_attention, line_of_chat, make_chat, make_folder
from torch.overrides import TorchFunctionMode

import data.loader as loader
import model as model_module
import sample as sample_module
import train as train_module
from data import machine
from data.chats import read_chats
from data.checkpoint import (
    LOCK,
    hold,
    let_go,
    load_checkpoint,
    save_checkpoint,
    steps_of,
    write_json,
)
from data.hf import from_pretrained, save_pretrained
from data.loader import Split, prepare, read_splits
from data.machine import Bar, check_compiler, pick_device, pick_dtype, printable
from data.scores import report
from mask import MASKS
from model import GPT, Cache, GPTConfig, Replay, fastest_attention
from sample import BUSY, Chat, command, go_on, load_chat, read_history, sample, talk
from train import Settings, equalize, to_device, train

sys.path.insert(0, str(ROOT / "demos"))
import finetune as finetune_module
from finetune import Finetune, finetune
from real import convert

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

signals = pytest.mark.skipif(os.name != "posix", reason="signals as Linux and macOS have them")
TINY = dict(
    n_embd=32, n_layer=1, n_head=2, batch_size=2, device="cpu", dtype="float32",
    n_dialogues=30, max_iters=2,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a tiny run; its path has a space."""
    out = tmp_path_factory.mktemp("a run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "CACHE", out / "cache")
        train(Settings(**TINY, out_dir=str(out)))
    return out


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "folder")


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(line_of_chat(n) for n in range(12)), encoding="utf-8")
    return str(path)


def fails(call, *arguments, **options):
    """What an error of the user's says, which is one line."""
    with pytest.raises(ValueError) as error:
        call(*arguments, **options)
    said = str(error.value)
    assert said and "\n" not in said
    return said


# --- what people have said ----------------------------------------------------------------------


def test_only_what_drives_a_terminal_is_changed_for_it():
    """Each of the 1,114,112 characters."""
    overrides = {*"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}
    for c in map(chr, range(0x110000)):
        drives = unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" or c in overrides
        assert printable(c) == ("\ufffd" if drives else c), hex(ord(c))
    assert printable("Bonjour\xa0! 1\u202f000") == "Bonjour\xa0! 1\u202f000"


# What str.isprintable denies and people write; what drives a terminal; halves of a pair.
ODD = ["\xa0", "\u202f", "\u200d", "\u3000", "\xad", "\U0001fae9", "\u2028", "\x1b[31m", "\u202e",
       "\x00", "é", " ", "a", "<|end|>", "\U000e0067"]


SAYABLE = sorted({*range(TOKENIZER.vocab_size)} - {*TOKENIZER.unsayable, TOKENIZER.end})


def answers_with(chat, tokens, query):
    """The chat's answer to a query, when its model is made to write these tokens."""
    forced, feed = iter(tokens), chat.feed

    def forcing(*tokens):
        logits = feed(*tokens)
        logits[next(forced, TOKENIZER.end)] = 1e6
        return logits

    chat.feed = forcing
    try:
        return chat.send(query)
    finally:
        chat.feed = feed


def test_a_conversation_saved_and_loaded_has_the_characters_and_tokens_it_had(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    rng = random.Random(0)
    for _ in range(25):
        chat = make_chat(block_size=512, max_new_tokens=200, temperature=0.0)
        for _ in range(2):
            said = "".join(rng.choices(ODD, k=rng.randint(1, 8)))
            asked = "".join(rng.choices([*ODD, "\ud83d", "\udcff"], k=rng.randint(0, 8)))
            written = TOKENIZER.encode(said)
            assert answers_with(chat, written, asked) == said == chat.messages[-1]["content"]
            assert chat.messages[-2]["content"] == asked
            # Any tokens: not those of their own text, and no whole characters.
            written = rng.choices(SAYABLE, k=rng.randint(0, 20))
            said = answers_with(chat, written, asked)
            assert said == TOKENIZER.decode(written) == chat.messages[-1]["content"]
        assert not command(chat, "/save ~/x.json")
        again = make_chat(block_size=512)
        go_on(again, read_history(tmp_path / "x.json"))
        assert again.layout() == chat.layout()
        assert again.messages == chat.messages


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


def test_a_history_that_is_none_says_what_is_wrong_with_which_message():
    chat = make_chat()
    chat.send("hi")
    before = chat.layout(), list(chat.messages)
    user, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    for messages, words in (
        ([user, {**answer, "content": None}], "the history, message 2: content is null"),
        ([{"role": "robot", "content": "x"}, answer], 'message 1: the role is "robot"'),
        ([user, answer, "z"], "message 3 is no object but a str"),
        ([{**user, "content": [{"type": "image"}]}, answer], "message 1: content has a part"),
        ([user], "ends with the assistant's"),
        ({}, "a history is a list"),
    ):
        assert words in fails(go_on, chat, messages)
        assert (chat.layout(), chat.messages) == before
    go_on(chat, [{"from": "human", "value": "x"}, {**answer, "content": [{"text": "y"}]}])
    assert chat.messages == [user, answer]


USER, ANSWER = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
CALL = {"role": "assistant", "tool_calls": [{"id": 1}]}


@pytest.mark.parametrize(
    "record, words",
    [
        ({"messages": [USER, ANSWER], "kto_tag": False}, "'kto_tag' is false, so its answer"),
        ({"messages": [USER, ANSWER], "loss_mask": [0, 1]}, "the loss_mask is [0, 1]; known are"),
        ({"messages": [USER, {**ANSWER, "loss_weight": 0.5}]}, "the loss_weight is 0.5; known"),
        ({"messages": [USER, {**ANSWER, "train_detail": [{}]}]}, "2: 'train_detail' is not"),
        ({"messages": [USER, ANSWER], "conversations": [USER, ANSWER]},
         "there are both 'messages' and 'conversations'"),
        ({"messages": [USER, ANSWER], "instruction": "x"}, "both 'messages' and 'instruction'"),
        ({"messages": [USER, {**CALL, "content": ""}]},
         "message 2: content is empty (tool_calls is not supported)"),
        ({"messages": [USER, {**CALL, "content": []}]}, "message 2: content is empty"),
        ({"messages": [USER, {**ANSWER, "content": [{"type": "thinking", "text": "z"}]}]},
         "message 2: content has a part of type thinking"),
        ({"messages": [USER, {**ANSWER, "content": [7]}]}, "a part of type int"),
        ({"messages": [USER, {**ANSWER, "loss": "no"}]},
         'message 2: the loss is "no"; known are 0 and 1'),
        ({"messages": None, "conversations": None}, "neither 'messages' nor"),
    ],
)
def test_what_a_chat_file_says_and_cannot_be_used_is_refused(tmp_path, record, words):
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(record), encoding="utf-8")
    assert words in fails(lambda: list(read_chats(path)))


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
        assert "'label' is false, so its answer" in fails(lambda: list(read_chats(path)))
    else:
        assert next(read_chats(path))[1] == given


def test_bad_lines_that_were_skipped_once_are_not_skipped_unasked(tmp_path, chats):
    with open(chats, "a", encoding="utf-8") as file:
        file.write("\n{")
    prepare(TOKENIZER, 64, chats, skip_bad=True)
    assert "line 13 is not JSON" in fails(prepare, TOKENIZER, 64, chats)


# --- one chat is one conversation ---------------------------------------------------------------


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


def test_an_open_answer_can_be_closed_or_dropped():
    chat = make_chat()
    for end in (lambda stream: stream.close(), lambda stream: None):
        stream = chat.stream("hi")
        next(stream)
        end(stream)
        del stream
        chat.send("and?")
        check_cache(chat)
    chat.reset()
    assert chat.layout() == ([], [])


def test_threads_that_send_at_once():
    chat, answers, refused = make_chat("ism", 512, max_new_tokens=6), [], []
    start = threading.Barrier(6)

    def send(number):
        start.wait()
        for turn in range(4):
            try:
                answers.append(chat.send(f"{number} {turn}"))
            except ValueError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) + len(refused) == 24 and {*refused} <= {BUSY}
    said = [m["content"] for m in chat.messages if m["role"] == "assistant"]
    assert len(chat.turns) == len(answers) and sorted(said) == sorted(answers)
    check_cache(chat)


# --- nothing that was computed is lost ----------------------------------------------------------


def test_runs_of_hardly_any_dialogues_end_or_say_why(tmp_path):
    """Of one dialogue a split, which often does not fit; of new words there may be none at all."""
    told = without = 0
    s = {**TINY, "n_dialogues": 1, "max_iters": 1, "out_dir": str(tmp_path)}
    for seed in range(60):
        try:
            metrics = train(Settings(**s, block_size=40, seed=seed))
            without += "accuracy_new_words" not in metrics
        except ValueError as error:
            assert "fits into 40 tokens; raise --block_size or --n_dialogues" in str(error)
            told += 1
    assert told > 0 and without > 0
    assert train(Settings(**{**s, "n_dialogues": 3}, block_size=48))["loss"] > 0


def test_splits_are_drawn_from_dialogues_that_fit(tmp_path, capsys):
    """Few chats are all trained on and reported on; of more, 5 % are held out for each report."""
    rng = random.Random(0)
    for fit in (0, 1, 6, loader.FEW - 1, loader.FEW, 250):
        lengths = [2] * fit + [100] * rng.randint(1, 12)
        rng.shuffle(lengths)
        path = tmp_path / f"{fit}.jsonl"
        text = "\n".join(line_of_chat(n, "hello " * k) for n, k in enumerate(lengths))
        path.write_text("\n".join([text] * 3), encoding="utf-8")  # each is there three times
        if fit == 0:
            words = f"{path} has no dialogue with an answer that fits into 32 tokens"
            assert fails(prepare, TOKENIZER, 32, str(path)) == words
            continue
        splits = read_splits(prepare(TOKENIZER, 32, str(path)))
        sizes = {name: len(split.families) for name, split in splits.items()}
        if fit < loader.FEW:
            assert sizes["train"] == fit and splits["val"] is splits["test"] is splits["train"]
        else:
            held = fit // 20
            assert sizes == {"train": fit - 2 * held, "val": held, "test": held}


def test_few_chats_are_learned_by_heart_and_the_report_says_so(tmp_path, capsys):
    path = tmp_path / "c.jsonl"
    text = "\n".join(line_of_chat(n) for n in range(6))
    path.write_text(text, encoding="utf-8")
    s = {**TINY, "max_iters": None, "n_dialogues": 7}
    metrics = train(Settings(**s, data=str(path), out_dir=str(tmp_path), skip_bad=True))
    report(metrics)
    told = capsys.readouterr().out
    assert "fewer than 100 different chats: all are trained on, and the report is on" in told
    assert "6 rows of" in told and "without effect beside --data: --n_dialogues" in told
    assert "Trained-on answers that are exactly right" in told and "eld-out" not in told
    assert metrics["accuracy"] == {"chats": 1} and metrics["settings"]["max_iters"] == 400
    for n in range(6):
        assert load_chat(tmp_path / "ckpt.pt", "cpu").send(f"hello {n}") == f"yes {n}"


def test_a_run_saves_before_it_evaluates(tmp_path, monkeypatch):
    def broken(run, split):
        raise RuntimeError("evaluation")

    monkeypatch.setattr(train_module, "evaluate", broken)
    for interval, step in ((1, 1), (1000, 2)):
        out = tmp_path / str(interval)
        with pytest.raises(RuntimeError, match="evaluation"):
            train(Settings(**TINY, eval_interval=interval, out_dir=str(out)))
        assert load_checkpoint(out / "ckpt.pt")["step"] == step


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@signals
def test_a_second_run_in_a_folder_is_told(tmp_path):
    mine, theirs = tmp_path / "ckpt.pt.0123abcd.partial", tmp_path / "ckpt.pt"
    others = [tmp_path / "movie.partial", tmp_path / "lock"]
    others[0].write_bytes(b"a film"), others[1].write_bytes(b"a file")
    (tmp_path / "smollm2.partial").mkdir()
    mine.touch(), theirs.write_bytes(b"good")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / LOCK)],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    s = Settings(**TINY, out_dir=str(tmp_path))
    assert fails(train, s) == f"another run is writing to {tmp_path}; name another --out_dir"
    assert mine.exists() and theirs.read_bytes() == b"good"
    holder.communicate()
    train(s)  # what died holds nothing
    assert not mine.exists() and load_checkpoint(theirs)["step"] == 2
    hold(tmp_path)
    let_go(tmp_path)
    assert not (tmp_path / LOCK).exists() and (tmp_path / "smollm2.partial").exists()
    assert [path.read_bytes() for path in others] == [b"a film", b"a file"]


def test_a_second_run_of_one_process_in_a_folder_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = []

    def start_another(run, loss):
        # The same folder by another name; a run in a thread, as of a notebook's other cell.
        s = Settings(**TINY, out_dir=str(tmp_path / "x" / ".." / "out"))
        thread = threading.Thread(target=lambda: told.append(fails(train, s)))
        thread.start()
        thread.join()

    def fail(run, loss):
        raise RuntimeError("a cell that fails")

    train(Settings(**TINY, out_dir="out"), watch=start_another)
    assert len(told) == 2 and all("another run is writing to" in line for line in told)
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == 2
    with pytest.raises(RuntimeError, match="a cell"):
        train(Settings(**TINY, out_dir="out"), watch=fail)
    train(Settings(**TINY, out_dir="out"))  # what failed holds nothing


def test_what_is_no_number_from_torchrun_is_one_line(monkeypatch):
    for value in ("x", "-1", "1.5", " "):
        monkeypatch.setenv("WORLD_SIZE", value)
        how = "torchrun sets a number here; unset it to run without torchrun"
        with pytest.raises(ValueError, match=re.escape(f"WORLD_SIZE={value}: {how}")):
            machine.check_torchrun()
        assert machine.from_torchrun("WORLD_SIZE", 1) == 1  # an import ends no process
    for value, number in (("", 1), ("12", 12)):
        monkeypatch.setenv("WORLD_SIZE", value)
        machine.check_torchrun()
        assert machine.from_torchrun("WORLD_SIZE", 1) == number


@signals
def test_a_hangup_leaves_a_checkpoint(tmp_path, handlers):
    def hang_up(run, loss):
        if run.step == 3:
            signal.raise_signal(signal.SIGHUP)

    s = {**TINY, "max_iters": 9, "out_dir": str(tmp_path)}
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3 of 9"):
        train(Settings(**s), watch=hang_up)
    assert load_checkpoint(tmp_path / "ckpt.pt")["step"] == 3
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        train(Settings(**s), watch=hang_up)
    except KeyboardInterrupt:
        pytest.fail("it was stopped all the same")
    assert load_checkpoint(tmp_path / "ckpt.pt")["step"] == 9


@signals
def test_a_run_without_files_is_stopped_in_a_line(handlers):
    def stop(run, loss):
        signal.raise_signal(signal.SIGTERM)

    splits = read_splits(prepare(TOKENIZER, 256, n_dialogues=30))
    with pytest.raises(KeyboardInterrupt, match="^stopped after step 1 of 9$"):
        train(Settings(**{**TINY, "max_iters": 9}), splits=splits, watch=stop)


@signals
@pytest.mark.parametrize("module", [train_module, finetune_module])
@pytest.mark.parametrize("number", ["SIGHUP", "SIGTERM", "SIGINT"])
def test_a_signal_in_preparation_leaves_nothing_half_made(
    tmp_path, monkeypatch, last_words, folder, chats, module, number
):
    def interrupted(folder, name, rows):
        (folder / "half").touch()
        signal.raise_signal(getattr(signal, number))

    monkeypatch.setattr(loader, "write_split", interrupted)
    flags = "--data", chats, "--init_from", str(folder), "--out_dir", str(tmp_path / "out")
    assert "stopped" in last_words(module, *flags, "--device=cpu")
    assert not list((tmp_path / "cache").iterdir())


TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@signals
def test_a_closed_terminal_leaves_a_checkpoint(tmp_path):
    """A real one: all that is written to it fails from then on."""
    termios = pytest.importorskip("termios")
    main, terminal = os.openpty()
    size = struct.pack("HHHH", 24, 100, 0, 0)  # lines and columns, without which no loss is shown
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
    flags = [f"--{name}={value}" for name, value in {**TINY, "max_iters": 100000}.items()]
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINAL, sys.executable, "train.py", *flags,
         f"--out_dir={tmp_path}"],
        cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal,
    )
    os.close(terminal)
    seen = b""
    while b"loss" not in seen:
        seen += os.read(main, 1000)
    os.close(main)
    assert process.wait(timeout=300) == 1
    assert load_checkpoint(tmp_path / "ckpt.pt")["step"] >= 20
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def test_resume_with_other_lora_is_one_line(tmp_path, folder, chats):
    s = dict(data=chats, init_from=str(folder), out_dir=str(tmp_path / "out"), max_iters=1,
             batch_size=2, block_size=64, device="cpu", dtype="float32")
    finetune(Finetune(**s, rank=4))
    for changed, words in (
        ({}, "rank 4, not 16"),
        ({"rank": 4, "alpha": 64.0}, "alpha 32.0, not 64.0"),
        ({"rank": 4, "layers": "qkv"}, "layers qkv,out,up,down, not qkv"),
        ({"rank": 4, "lora": False}, "lora True, not False"),
    ):
        said = fails(finetune, Finetune(**s, **changed, resume=True))
        assert words in said and "--resume needs the same settings" in said
    said = fails(train, Settings(**s, resume=True))
    assert "--resume needs the flags of the run that wrote it" in said
    finetune(Finetune(**{**s, "max_iters": 2}, rank=4, resume=True))


# --- silent wrong results -----------------------------------------------------------------------


def weights_after(tmp_path, **settings):
    train(Settings(**{**TINY, **settings}, out_dir=str(tmp_path)))
    return load_checkpoint(tmp_path / "ckpt.pt")["model"]


def test_no_clipping_is_clipping_at_no_bound(tmp_path):
    none, far = (weights_after(tmp_path, grad_clip=clip) for clip in (0.0, 1e30))
    untrained = weights_after(tmp_path, learning_rate=1e-30, grad_clip=0.0)
    assert all(torch.equal(none[name], far[name]) for name in none)
    assert all(not torch.equal(none[name], untrained[name]) for name in none)


ENDS = dict(
    decay=[0.0, 1.0], weight_decay=[0.0], warmup_iters=[0, 10**9], anneal=[1, 10**9],
    grad_accum=[10**6], batch_size=[1], eval_interval=[1], max_iters=[1],
    n_dialogues=[1], seed=[2**64 - 1],
)


@pytest.mark.parametrize("name", ENDS)
def test_each_setting_trains_at_its_ends(tmp_path, name):
    for value in ENDS[name]:
        losses = []
        s = Settings(**{**TINY, name: value}, out_dir=str(tmp_path))
        metrics = train(s, watch=lambda run, loss, seen=losses: seen.append(float(loss)))
        assert len(losses) == s.max_iters and np.isfinite([*losses, metrics["loss"]]).all()


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("learning_rate", 0.0, "nothing is learned"),
        ("learning_rate", float("nan"), "a number from 0 on"),
        ("grad_clip", float("inf"), "a number from 0 on"),
        ("grad_clip", -1.0, "a number from 0 on"),
        ("decay", 1.1, "at most 1"),
        ("weight_decay", -0.1, "a number from 0 on"),
        ("seed", 2**64, "at most 64 bits"),
        ("seed", -1, "at least 0"),
        ("batch_size", 0, "at least 1"),
        ("mask", "foo", "--mask has no 'foo'; there are causal, prefix, ism"),
        ("dtype", "float16", "--dtype has no 'float16'; there are auto, float32, bfloat16"),
        ("families", "", "--families has no ''"),
    ],
)
def test_beyond_its_ends_a_setting_is_refused(name, value, words):
    assert words in fails(Settings, **{name: value})


def test_the_lowest_temperatures_take_the_likeliest():
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(50, generator=generator) * 10
        temperature = 10.0 ** -random.Random(seed).uniform(4, 45)
        assert sample(logits.clone(), temperature, generator=generator) == int(logits.argmax())
    assert "not numbers" in fails(sample, torch.full((5,), float("nan")), 1.0)


@pytest.mark.parametrize(
    "f, words",
    [
        (lambda s: MASKS["ism"](s) > 0, "returns integers, .*, not torch.bool"),
        (lambda s: MASKS["ism"](s).float(), "returns integers, .*, not torch.float32"),
        (lambda s: MASKS["causal"](s) - 1, "must see at least one; the mask returned a 0"),
        (lambda s: MASKS["causal"](s)[0], r"for each token \(1, 8\), not \(8,\)"),
        (lambda s: MASKS["causal"](s)[:, :-1], r"for each token \(1, 8\), not \(1, 7\)"),
        (lambda s: MASKS["ism"](s).tolist(), "a tensor of integers, not a list"),
        (lambda s: None, "a tensor of integers, not a NoneType"),
        (lambda s: torch.full_like(s, s.shape[1]), "under the mask 'own' nothing can be trained: "),
        (lambda s: MASKS["causal"](s) + 1, "under the mask 'own' nothing can be trained: "),
    ],
)
def test_a_mask_of_ones_own_that_is_none(tmp_path, monkeypatch, f, words):
    """Told at the start, before a step; and in a chat."""
    def step(run, loss):
        raise AssertionError("a step was taken")

    monkeypatch.setitem(MASKS, "own", f)
    with pytest.raises(ValueError, match=words) as error:
        train(Settings(**TINY, mask="own", out_dir=str(tmp_path)), watch=step)
    assert "\n" not in str(error.value)
    if "nothing" not in words:
        assert not make_chat("own").busy.locked()
        fails(make_chat("own").send, "hi")


def test_equalize_computes_in_what_it_is_given_and_returns_it():
    x = torch.randn(2, 24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = equalize(x)
    for dtype, off in ((torch.float64, 0), (torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        found = equalize(x.to(dtype))
        assert found.dtype == dtype
        assert (found.double() - exact).norm() <= off * exact.norm()


def test_padding_is_never_longer_than_the_longest_dialogue():
    class Random(Split):
        def __init__(self, lengths):
            self.offsets = np.concatenate([[0], np.cumsum(lengths)])
            self.tokens = np.ones(self.offsets[-1], dtype=np.uint32)
            self.segments = np.ones(self.offsets[-1], dtype=np.uint16)

    rng = np.random.default_rng(0)
    for _ in range(300):
        lengths = rng.integers(2, rng.integers(3, 400), rng.integers(1, 9))
        split = Random(lengths)
        rows = np.stack([np.arange(len(lengths)), split.offsets[:-1], split.offsets[1:]], 1)
        chosen = rows[rng.permutation(len(rows))[: rng.integers(1, len(rows) + 1)]]
        tokens, segments = split.collate(chosen)
        assert tokens.shape == segments.shape
        assert (chosen[:, 2] - chosen[:, 1]).max() <= tokens.shape[1] <= lengths.max()
        assert (segments.sum(1).numpy() == chosen[:, 2] - chosen[:, 1]).all()


# --- machines that are not ours -----------------------------------------------------------------


class OnCpu(TorchFunctionMode):
    """What is asked of another device is done on the CPU; copies are written down."""

    def __init__(self):
        super().__init__()
        self.copies = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.pin_memory:
            return args[0]
        if function is torch.Tensor.to:
            self.copies.append(kwargs)
        here = [torch.device("cpu") if isinstance(x, torch.device) else x for x in args]
        if isinstance(kwargs.get("device"), torch.device):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return function(*here, **kwargs)


def some_f(rng, n, S):
    """A random f (1, n), now and then one of those that have a way of their own."""
    return rng.choice((
        torch.randint(1, S + 1, (1, n)), torch.arange(S - n + 1, S + 1)[None],
        torch.full((1, n), S), MASKS["ism"](torch.randint(1, 9, (1, n)).sort().values),
    ))


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A CUDA card with Triton and a compiler, by what torch says of it; nothing is compiled."""
    told = {"capability": (9, 0), "triton": object(), "cc": "/usr/bin/cc", "header": str(tmp_path)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: told["capability"])
    monkeypatch.setattr(model_module.importlib.util, "find_spec", lambda name: told["triton"])
    monkeypatch.setattr(model_module.shutil, "which", lambda name: told["cc"])
    monkeypatch.setattr(model_module.sysconfig, "get_paths", lambda: {"include": told["header"]})
    monkeypatch.setattr(model_module, "compiled_flex", lambda: None)
    tmp_path.joinpath("Python.h").touch()
    model_module.has_triton.cache_clear()
    yield told
    model_module.has_triton.cache_clear()


@pytest.mark.parametrize(
    "lacks", [{}, {"triton": None}, {"capability": (7, 5)}, {"cc": None}, {"header": "/nowhere"}]
)
def test_without_triton_long_masks_go_to_sdpa(card, capsys, lacks):
    card.update(lacks)
    torch.manual_seed(0)
    f = torch.randint(1, 1025, (1, 1024))
    q, k, v = torch.randn(3, 1, 2, 1024, 16).unbind()
    with OnCpu(), torch.no_grad():
        attend = [fastest_attention(f, 1024, torch.device("cuda")) for _ in range(3)][0]
        by_blocks = attend.func is model_module.attend_by_blocks
        assert by_blocks == (not lacks)
        if lacks:
            y = attend(q, k, v)
            assert torch.allclose(y, exact_attention(q, k, v, f), atol=1e-5)
    assert capsys.readouterr().out.count("long masks go to SDPA") == bool(lacks)


@pytest.mark.parametrize("D", [2, 10, 12, 14])
def test_no_compiled_kernel_for_heads_that_it_does_not_take(D):
    def refuse(*_, **__):
        raise AssertionError("a compiled kernel")

    torch.manual_seed(0)
    f = torch.randint(1, 41, (2, 40))
    q, k, v = torch.randn(2, 4, 40, D), torch.randn(2, 2, 40, D), torch.randn(2, 2, 40, D)
    y = model_module.attend_by_blocks(q, k, v, f, None, refuse)
    assert torch.allclose(y, exact_attention(q, k, v, f), atol=1e-5)


@pytest.mark.parametrize("head_size", [2, 6, 10, 12, 18])
def test_any_even_head_size_trains_and_chats(head_size):
    config = GPTConfig(TOKENIZER.vocab_size, 96, 2, 2, 1, 2 * head_size, 24, token_shift=True)
    torch.manual_seed(0)
    model = GPT(config)
    tokens = torch.randint(0, 500, (2, 30))
    for mask in MASKS.values():
        f = mask(torch.randint(1, 6, (2, 30)).sort(1).values)
        loss = model(tokens, f).logsumexp(-1).sum()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        chat = Chat(model, TOKENIZER, mask, max_new_tokens=5)
        chat.send("hi")
        check_cache(chat)
    with torch.no_grad():
        cache = Cache(config)
        replay = Replay(model, cache)
        steps = torch.stack([replay(int(token)) for token in tokens[0]])
        assert torch.allclose(steps, model(tokens[:1])[0], atol=1e-4)


@pytest.mark.parametrize("capability, dtype", [
    ((6, 1), torch.float32), ((7, 0), torch.float32), ((7, 5), torch.float32),  # P, V100, T4
    ((8, 0), torch.bfloat16), ((8, 9), torch.bfloat16), ((9, 0), torch.bfloat16),
    ((12, 0), torch.bfloat16),
])
def test_auto_takes_no_bfloat16_by_emulation(monkeypatch, card, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    card["capability"] = capability
    assert pick_dtype("auto", torch.device("cuda")) == dtype
    assert pick_dtype("bfloat16", torch.device("cuda")) == torch.bfloat16  # who asks gets it


def test_the_chosen_device_is_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    for name in ("cuda:1", "cuda", "auto", "cpu"):
        pick_device(name)
    assert chosen == ["cuda:1", "cuda:0", "cuda:0"]
    for name in ("cpu:x", "cpu:0", "cuda:2", "cuda:x", "", "tpu"):
        said = fails(pick_device, name)
        assert said == f"--device {name} is not on this machine; there is cuda:0, cuda:1, cpu"


def test_on_mps_there_is_the_plain_attention_alone(monkeypatch):
    """Its fused kernels give wrong numbers for views and masks, and its late copies too."""
    def fused(*_, **__):
        raise AssertionError("a fused kernel")

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto").type == "cpu" and pick_device("mps").type == "mps"
    mps, rng = torch.device("mps"), random.Random(0)
    assert pick_dtype("auto", mps) == torch.float32
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    monkeypatch.setattr(model_module, "flex_attention", fused)
    torch.manual_seed(0)
    for _ in range(60):
        n = rng.randint(1, 40)
        S = n + rng.choice((0, rng.randint(0, 300)))
        f = some_f(rng, n, S)
        H, Hkv = rng.choice(((2, 1), (2, 2)))
        q, k, v = torch.randn(1, H, n, 8), torch.randn(1, Hkv, S, 8), torch.randn(1, Hkv, S, 8)
        with OnCpu(), torch.set_grad_enabled(rng.random() < 0.5):
            y = fastest_attention(f, S, mps)(q, k, v)
        assert torch.allclose(y, exact_attention(q, k, v, f), atol=1e-5)
    with OnCpu() as asked:
        for device in (mps, torch.device("cuda")):
            to_device(device, torch.zeros(2, 3), torch.arange(3), torch.arange(3))
    assert [copy["non_blocking"] for copy in asked.copies] == [False] * 3 + [True] * 3


def test_to_compile_without_a_compiler_is_one_line(tmp_path, monkeypatch, card):
    s = Settings(**TINY, compile=True, out_dir=str(tmp_path))
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    check_compiler(cuda), check_compiler(cpu)
    card["triton"] = None
    assert "needs Triton" in fails(check_compiler, cuda)
    check_compiler(cpu)
    card["cc"] = None
    assert "needs a C++ compiler (g++ or clang++)" in fails(train, s)


# --- notebooks, threads and streams -------------------------------------------------------------


class OutStream(io.StringIO):
    """Standard output as a notebook has it: without `reconfigure`."""


def test_train_and_chat_in_a_thread_of_a_notebook(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", OutStream())
    monkeypatch.setattr(sys, "stderr", OutStream())
    monkeypatch.setattr(sys, "stdin", None)
    done = []

    def work():
        train(Settings(**TINY, out_dir=str(tmp_path)))
        chat = load_chat(tmp_path / "ckpt.pt", "cpu", max_new_tokens=3)
        sample_module.answer(chat, "Hi")
        talk(chat, ["Hello"])
        talk(chat, [])  # nobody types
        done.append(chat)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done and len(done[0].turns) == 2
    assert "> Hello\n" in sys.stdout.getvalue()
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\n/stats\n/quit\nnever"))
    talk(done[0], [])
    assert len(done[0].turns) == 3 and "tokens in the cache" in sys.stdout.getvalue()


def test_a_program_in_a_notebook(trained, monkeypatch):
    """As `%run sample.py --prompt Hi` does it."""
    monkeypatch.setattr(sys, "stdout", OutStream())
    monkeypatch.setattr(sys, "argv", ["sample.py", "--ckpt", str(trained / "ckpt.pt"),
                                      "--device", "cpu", "--prompt", "Hi"])
    sample_module.main()
    assert sys.stdout.getvalue().startswith("> Hi\n")


@signals
def test_a_closed_input_and_an_output_that_nobody_reads(trained):
    flags = f"--ckpt '{trained}/ckpt.pt' --device cpu --prompt Hi --prompt Ho"
    done = subprocess.run(
        ["sh", "-c", f"'{sys.executable}' sample.py {flags} <&- | head -1"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )
    assert (done.stdout, done.stderr) == ("> Hi\n", "")


class Broken(io.StringIO):
    """A pipe at whose other end nobody is any more."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("stream", [None, Broken()])
def test_nobody_reads_the_progress(tmp_path, monkeypatch, stream):
    """As behind `2>&1 | head -1`, or with `2>&-`: the run goes on to its end."""
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(Bar(range(5))) == list(range(5))
    train(Settings(**TINY, out_dir=str(tmp_path)))
    assert load_checkpoint(tmp_path / "ckpt.pt")["step"] == 2
    assert (tmp_path / "metrics.json").exists()


@signals
def test_nobody_reads_the_result(tmp_path, monkeypatch, handlers):
    """Standard output breaks when the tables are printed: no traceback, and all is on the disk."""
    read, write = os.pipe()
    with open(write, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        os.close(read)
        flags = [f"--{name}={value}" for name, value in TINY.items()]
        monkeypatch.setattr(sys, "argv", ["train.py", *flags, f"--out_dir={tmp_path}"])
        monkeypatch.setattr(train_module, "announce", lambda run: Bar(total=2, disable=True))
        with pytest.raises(SystemExit) as end:
            train_module.main()
    assert end.value.code == 1 and (tmp_path / "metrics.json").exists()


def test_a_byte_order_mark_before_piped_input_and_a_history(trained, monkeypatch, capsys):
    chat = load_chat(trained / "ckpt.pt", "cpu", max_new_tokens=3)
    raw = io.BytesIO(b"\xef\xbb\xbf/stats\n\xff?\n/quit\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw, encoding="utf-8"))
    talk(chat, [])
    assert "0 of 256 tokens in the cache" in capsys.readouterr().out
    assert chat.messages[0]["content"] == "\ufffd?"
    path = trained / "history.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(chat.messages).encode())
    assert read_history(path) == chat.messages


def test_empty_variables_of_torchrun_are_none(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    spec = importlib.util.spec_from_file_location("fresh", ROOT / "data" / "machine.py")
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert (fresh.WORLD, fresh.RANK, fresh.LOCAL_RANK) == (1, 0, 0)


# --- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--temperature", "inf"), "--temperature must be from 0 on"),
        (("--temperature", "nan"), "--temperature must be from 0 on"),
        (("--temperature=-inf",), "--temperature must be from 0 on"),
        (("--top_p", "nan"), "--top_p must be above 0 and at most 1"),
        (("--seed", str(2**64)), "--seed must be from 0 on, of at most 64 bits"),
        (("--device", "cpu:x"), "--device cpu:x is not on this machine; there is cpu"),
        (("--history", str(ROOT / "README.md")), "README.md is not JSON"),
    ],
)
def test_a_wrong_flag_of_the_chat_is_one_line(trained, last_words, flags, words):
    ckpt = str(trained / "ckpt.pt")
    flags = "--ckpt", ckpt, "--device", "cpu", *flags
    assert words in last_words(sample_module, *flags)


@signals
@pytest.mark.parametrize("module", [train_module, finetune_module])
def test_a_folder_that_would_be_written_over_is_one_line(
    tmp_path, last_words, folder, chats, module
):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "link").symlink_to(folder)
    for out in (folder, folder / ".." / "folder", tmp_path / "link"):
        flags = "--init_from", str(folder), "--out_dir", str(out), "--data", chats
        said = last_words(module, *flags, "--device=cpu")
        assert f"--out_dir {out} is the folder of --init_from; name another" in said
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@signals
def test_data_from_a_pipe_is_one_line(chats):
    """As `--data <(zcat x.gz)` gives it: it is read twice, once to see what it is."""
    read, write = os.pipe()
    os.write(write, pathlib.Path(chats).read_bytes())
    os.close(write)
    path = f"/dev/fd/{read}"
    said = fails(prepare, TOKENIZER, 64, path)
    os.close(read)
    assert said.startswith(f"--data {path} is no file that can be read twice")


def test_out_of_memory_in_a_fine_tuning_is_one_line(
    tmp_path, monkeypatch, last_words, folder, chats
):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee")

    monkeypatch.setattr(GPT, "forward", full)
    flags = "--init_from", str(folder), "--out_dir", str(tmp_path / "out"), "--data", chats
    said = last_words(finetune_module, *flags, "--device=cpu", "--block_size=64")
    named = "--batch_size", "--block_size", "--grad_accum", "--checkpointing"
    assert said.startswith("finetune.py: out of memory;") and all(flag in said for flag in named)


def asked(monkeypatch, words):
    """The path after --ckpt in a command that was printed, as a shell would give it."""
    parts = shlex.split(words.split("python sample.py ")[-1])
    monkeypatch.setattr(sys, "argv", ["sample.py", *parts])
    return sample_module.flags().ckpt


@signals
def test_a_flag_that_the_folder_decides_is_one_line(tmp_path, last_words, folder, chats):
    flags = "--init_from", str(folder), "--out_dir", str(tmp_path / "out"), "--data", chats
    for flag in ("--n_layer=3", "--tokenizer=gpt2"):
        name = flag.split("=")[0]
        assert f"{name} is that of the folder" in last_words(finetune_module, *flags, flag)
    # Nothing of the folder is written before the data are read.
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    said = last_words(finetune_module, *flags[:-1], str(empty), "--device=cpu")
    assert "empty.jsonl holds no dialogue" in said
    assert not (tmp_path / "out" / "config.json").exists()


def test_what_is_no_file_of_chats_is_named(tmp_path):
    chat = line_of_chat(1).encode()
    for content, words in (
        (gzip.compress(chat), "packed by gzip"),
        (line_of_chat(1).encode("utf-16"), "UTF-16; write it as UTF-8"),
        (b"[\n" + chat + b"\n]", "of a list write each dialogue on a line of its own"),
        (b"[" + chat + b"]", "on a line of its own, got a list"),
        (b"question,answer\n1,2", "is not JSON: question,answer"),
        (b"\n \n", "holds no dialogue"),
    ):
        path = tmp_path / "chats.jsonl"
        path.write_bytes(content)
        assert words in fails(prepare, TOKENIZER, 64, str(path))


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


def test_a_run_keeps_the_longest_model_of_the_runs_before(tmp_path, capsys):
    """Of each new run: its steps, those of the model that is then put away, and what it tells."""
    path, before = tmp_path / "ckpt.pt", tmp_path / "ckpt.before.pt"
    edited = {"attention": torch.zeros(1)}  # another model than GPT is here now
    runs = [(4, 0, ""), (2, 4, "4 steps, which becomes ckpt.before.pt when"),
            (1, 4, "2 steps, which this run replaces; ckpt.before.pt has one of 4 steps and stays"),
            (5, 4, "1 steps, which this run replaces"), (6, 5, "in place of one of 4 steps")]
    for steps, kept, words in runs:
        train(Settings(**{**TINY, "max_iters": steps}, out_dir=str(tmp_path)))
        told = [line for line in capsys.readouterr().out.splitlines() if str(path) in line]
        assert words in "".join(told) and len(told) == (kept > 0)
        state = load_checkpoint(path)
        assert state["step"] == steps
        save_checkpoint(path, **{**state, "model": edited})
        if kept:
            figures = json.loads((tmp_path / "metrics.before.json").read_text(encoding="utf-8"))
            assert steps_of(before) == figures["settings"]["max_iters"] == kept
    save_checkpoint(path, **state)
    train(Settings(**{**TINY, "max_iters": 7}, out_dir=str(tmp_path), resume=True))
    assert steps_of(before) == 5 and load_checkpoint(path)["step"] == 7


@signals
def test_what_a_run_or_a_chat_writes_goes_through_links_and_into_devices(tmp_path, monkeypatch):
    large, out = tmp_path / "large", tmp_path / "out"
    large.mkdir(), out.mkdir()
    (out / "ckpt.pt").symlink_to(large / "ckpt.pt")
    monkeypatch.chdir(tmp_path)
    elsewhere = lambda run, loss: os.chdir(large)  # as a reader's watch may
    for steps in (2, 3):
        train(Settings(**{**TINY, "max_iters": steps, "out_dir": "out"}), watch=elsewhere)
        monkeypatch.chdir(tmp_path)
    assert (out / "ckpt.pt").is_symlink() and load_checkpoint(large / "ckpt.pt")["step"] == 3
    assert load_checkpoint(large / "ckpt.before.pt")["step"] == 2
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_json(tmp_path / "pipe", {})
    assert os.read(reader, 10) == b"{}" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
    private = tmp_path / "private.json"
    private.touch(mode=0o600)
    write_json(private, {})
    assert private.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("path, words", [
    ("my x.gguf", "make a folder: python demos/real.py 'my x.gguf' --out_dir 'my x'"),
    ("meta-llama/Llama-3.2-1B", "if it is the name of a model on a hub, download its folder"),
    ("out/smollm2/model.safetensors", "name the folder that the file is in"),
    ("none/ckpt.pt", "train one with: python train.py"),
])
def test_what_is_no_model_here_may_be_one_elsewhere(tmp_path, monkeypatch, path, words):
    monkeypatch.chdir(ROOT)
    assert words in fails(load_chat, path, "cpu")
    if not path.endswith(".pt"):
        assert words in fails(train, Settings(**TINY, init_from=path, out_dir=str(tmp_path)))
    monkeypatch.chdir(tmp_path)  # from elsewhere a program has its whole path
    assert words.replace("python ", f"python {ROOT}/") in fails(load_chat, path, "cpu")


def test_a_config_with_two_names_for_one_thing(tmp_path, folder):
    path, out = folder / "config.json", tmp_path / "out"
    config = json.loads(path.read_text(encoding="utf-8"))
    two = ["LlamaForSequenceClassification", *config["architectures"]]
    told = {**config, "dtype": "float32", "torch_dtype": "float32", "architectures": two}
    path.write_text(json.dumps(told), encoding="utf-8")
    save_pretrained(from_pretrained(folder, dtype=torch.bfloat16), folder, out)
    written = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert written == {**told, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    for names in ([], None, two[:1], [*config["architectures"], "Qwen3ForCausalLM"]):
        path.write_text(json.dumps({**config, "architectures": names}), encoding="utf-8")
        assert "is not known; known are LlamaForCausalLM" in fails(from_pretrained, folder)


@pytest.mark.parametrize("flags, words", [
    (dict(data=True, families="follow-up"),
     "beside --data: --n_dialogues, --families"),
    (dict(skip_bad=True), "without --data: --skip_bad"),
    (dict(mask="causal", anneal=2), "under causal, where it begins: --anneal"),
    (dict(data=True, init_from=True, lora=False, rank=4), "beside --no-lora: --rank"),
])
def test_flags_without_effect_are_told(tmp_path, folder, chats, capsys, flags, words):
    known = {"data": chats, "init_from": str(folder)}
    flags = {name: known.get(name, value) for name, value in flags.items()}
    s = {**TINY, "max_iters": 1, "block_size": 64, "out_dir": str(tmp_path / "out"), **flags}
    if "lora" in flags:
        finetune(Finetune(**{k: s[k] for k in s if k not in ("n_embd", "n_layer", "n_head")}))
    else:
        train(Settings(**s))
    assert f"without effect {words}" in capsys.readouterr().out.splitlines()


def test_to_resume_with_other_settings_is_told(tmp_path, capsys):
    train(Settings(**TINY, out_dir=str(tmp_path)))
    capsys.readouterr()
    train(Settings(**{**TINY, "max_iters": 3}, out_dir=str(tmp_path), grad_clip=0.5, resume=True))
    told = "goes on with other settings than before: --max_iters 3, not 2; --grad_clip 0.5, not 1.0"
    assert told in capsys.readouterr().out.splitlines()


def test_a_printed_command_can_be_pasted(tmp_path, monkeypatch, handlers, folder, chats, capsys):
    """Whatever its path is made of."""
    out = tmp_path / "it's $HOME; two"
    flags = [f"--{name}={value}" for name, value in TINY.items()]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, f"--out_dir={out}"])
    train_module.main()
    printed = capsys.readouterr().out.strip().splitlines()[-1]
    assert asked(monkeypatch, printed) == str(out / "ckpt.pt")
    out = tmp_path / "a $b"
    monkeypatch.setattr(sys, "argv", [
        "finetune.py", "--init_from", str(folder), "--data", chats, f"--out_dir={out}",
        "--max_iters=1", "--block_size=64", "--batch_size=2", "--device=cpu"])
    finetune_module.main()
    printed = capsys.readouterr().out.strip().splitlines()[-1]
    assert asked(monkeypatch, printed) == str(out)
    said = fails(load_chat, out / "ckpt.pt", "cpu")  # LoRA's weights, not merged
    assert asked(monkeypatch, "python sample.py " + said.split("ends: ")[1]) == str(out)
    said = fails(convert, "no.gguf", out, "bfloat16")
    assert asked(monkeypatch, said.split("(")[1].split(")")[0]) == str(out)


def sections(text):
    """{flag: what --help says of it}"""
    found, name = {}, None
    for line in text.splitlines():
        if line.startswith("  --"):
            name = line.split()[0].strip(",")
            found[name] = ""
        if name:
            found[name] += " " + line.strip()
    return found


@pytest.mark.parametrize("settings_class", [Settings, Finetune])
def test_help_shows_the_real_defaults(settings_class, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit):
        machine.parse(settings_class, "", ["--help"])
    help_of = sections(capsys.readouterr().out)
    s = settings_class(init_from="x")
    for name, value in vars(s).items():
        if value in ("", "x", None) or name == "learning_rate":
            continue
        assert f"(default: {value})" in help_of[f"--{name}"], name
    told = help_of["--learning_rate"]
    plain, of_folder = Settings(), Settings(init_from="x")
    if settings_class is Settings:
        assert f"(default: {plain.learning_rate}, with --init_from 2e-5)" in told
        assert of_folder.learning_rate == 2e-5
    else:
        assert "(default: 2e-4 with LoRA, 2e-5 without)" in told
        assert s.learning_rate == 2e-4
        assert Finetune(init_from="x", lora=False).learning_rate == 2e-5


def test_the_chats_help_shows_the_real_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setattr(sys, "argv", ["sample.py", "--help"])
    with pytest.raises(SystemExit):
        sample_module.flags()
    help_of = sections(capsys.readouterr().out)
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    for name, value in vars(sample_module.flags()).items():
        told = help_of[f"--{name}"]
        if value not in ("", None, []) and name != "block_size":
            assert f"(default: {value:g}" in told if type(value) is float else (
                f"(default: {value}" in told), name


def test_nobody_reads_that_there_is_a_first_checkpoint(tmp_path, monkeypatch):
    """It is told after half a minute of training; the run goes on where that cannot be printed."""

    class ClosedLater(io.StringIO):
        def write(self, text):
            if "chat with it so far" in text:
                raise BrokenPipeError(32, "Broken pipe")
            return super().write(text)

    monkeypatch.setattr(train_module, "FIRST_SAVE", 0.0)
    monkeypatch.setattr(sys, "stdout", ClosedLater())
    metrics = train(Settings(**{**TINY, "max_iters": 3}, out_dir=str(tmp_path)))
    assert metrics["settings"]["max_iters"] == 3 and (tmp_path / "ckpt.pt").exists()
