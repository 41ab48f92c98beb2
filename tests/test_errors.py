"""What a user gets wrong is one line: what was wrong, what is accepted, what to do."""

import gzip
import json
import os
import pathlib
import sys

import pytest
import torch
from conftest import ROOT
from helpers import ANSWER, TOKENIZER, USER, fails, line_of_chat, make_chat, posix, run, tiny

import sample
import train
from data.loader import prepare
from demos import finetune
from mask import MASKS
from model import GPT
from sample import go_on, load_chat
from train import Settings

pytestmark = pytest.mark.usefixtures("own_cache")

# (program, its flags, words that must be there, with ".." between those that are apart)
ERRORS = [
    (sample, "--nonsense", "unrecognized"),
    (sample, "--ckpt no-such.pt", "python train.py"),
    (sample, "--ckpt README.md", "not a checkpoint"),
    (sample, "--ckpt demos", "neither the ckpt.pt"),
    (sample, "--temperature -1", "--temperature .. from 0 on"),
    (sample, "--temperature inf", "--temperature .. from 0 on"),
    (sample, "--temperature nan", "--temperature .. from 0 on"),
    (sample, "--temperature=-inf", "--temperature .. from 0 on"),
    (sample, "--top_p nan", "--top_p .. above 0 and at most 1"),
    (sample, f"--seed {2**64}", "--seed .. from 0 on .. 64 bits"),
    (sample, "--device cpu:x", "--device cpu:x is not .. there is .. cpu"),
    (sample, "--history README.md", "README.md is not JSON"),
    (train, "--max_iter 3", "unrecognized"),
    (train, "--mask foo", "'causal', 'prefix', 'ism'"),
    (train, "--max_iters many", "int"),
    (train, "--max_iters -5", "at least 1"),
    (train, "--learning_rate nan", "from 0 on"),
    (train, "--device tpu", "there is"),
    (train, "--n_embd 130", "n_embd"),
    (train, "--n_embd 100000000 --n_dialogues 40 --device cpu", "out of memory; .. --n_embd"),
    (train, "--resume", "no checkpoint"),
    (train, "--data no-such.jsonl", "no-such.jsonl"),
    (train, "--tokenizer foo", "nanoism"),
    (train, "--out_dir README.md", "--out_dir README.md is no folder that can be written"),
    (train, "--out_dir README.md/x", "--out_dir README.md/x is no folder that can be written"),
    (finetune, "--n_layer 3", "--n_layer is that of the folder"),
    (finetune, "--tokenizer gpt2", "--tokenizer is that of the folder"),
]
if sys.platform == "linux":  # where even root cannot write
    ERRORS += [(train, f"--out_dir {path}", f"--out_dir {path} is no folder that can be written")
               for path in ("/sys", "/sys/out")]


def says(line, words):
    return all(part in line for part in words.split(" .. "))


@pytest.mark.parametrize("program, flags, words", ERRORS)
def test_a_wrong_flag_is_one_line(tmp_path, last_words, request, program, flags, words):
    flags = flags.split()
    if program is finetune:
        folder, chats = (request.getfixturevalue(name) for name in ("folder", "chats"))
        flags += ["--init_from", str(folder), "--data", chats]
    if program is not sample and "--out_dir" not in flags:
        flags += ["--out_dir", str(tmp_path / "out")]
    assert says(last_words(program, *flags), words)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, last_words):
    monkeypatch.setenv("NANOISM_CACHE", str(ROOT / "README.md" / "cache"))
    said = last_words(train, f"--out_dir={tmp_path}", "--device=cpu")
    assert "README.md/cache cannot be written" in said


def test_a_program_ends_with_one_line_that_drives_no_terminal(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b'{"messages": "\x1b[2J\x07 \xff"}\n')  # the error quotes it
    for program, flags, words in (
        ("sample.py", ["--nonsense"], "sample.py: unrecognized"),
        ("train.py", ["--nonsense"], "train.py: unrecognized"),
        ("train.py", ["--data", str(path), "--out_dir", str(tmp_path / "out")], "line 1"),
    ):
        done = run(program, *flags)
        assert done.returncode == 1 and not done.stdout and words in done.stderr
        assert done.stderr.count("\n") == 1 and done.stderr.strip().isprintable()


# (a setting, a value beyond its ends, words)
BEYOND = [
    ("learning_rate", 0.0, "nothing is learned"),
    ("learning_rate", float("nan"), "a number from 0 on"),
    ("grad_clip", float("inf"), "a number from 0 on"),
    ("grad_clip", -1.0, "a number from 0 on"),
    ("decay", 1.1, "at most 1"),
    ("weight_decay", -0.1, "a number from 0 on"),
    ("seed", 2**64, "at most 64 bits"),
    ("seed", -1, "at least 0"),
    ("batch_size", 0, "at least 1"),
    ("mask", "foo", "--mask has no 'foo' .. causal, prefix, ism"),
    ("dtype", "float16", "--dtype has no 'float16' .. auto, float32, bfloat16"),
    ("families", "", "--families has no ''"),
]


@pytest.mark.parametrize("name, value, words", BEYOND)
def test_beyond_its_ends_a_setting_is_refused(name, value, words):
    assert says(fails(Settings, **{name: value}), words)


@pytest.mark.parametrize("path, words", [
    ("my x.gguf", "make a folder: python demos/real.py 'my x.gguf' --out_dir 'my x'"),
    ("meta-llama/Llama-3.2-1B", "a model on a hub, download its folder"),
    ("out/smollm2/model.safetensors", "name the folder that the file is in"),
    ("none/ckpt.pt", "train one with: python train.py"),
])
def test_what_is_no_model_here_may_be_one_elsewhere(tmp_path, monkeypatch, path, words):
    monkeypatch.chdir(ROOT)
    assert words in fails(load_chat, path, "cpu")
    if not path.endswith(".pt"):
        assert words in fails(train.train, tiny(tmp_path, init_from=path))
    monkeypatch.chdir(tmp_path)  # from elsewhere a program has its whole path
    assert words.replace("python ", f"python {ROOT}/") in fails(load_chat, path, "cpu")


CHAT = line_of_chat(1).encode()
CALL = {"role": "assistant", "tool_calls": [{"id": 1}]}


@pytest.mark.parametrize("content, words", [
    (gzip.compress(CHAT, mtime=0), "packed by gzip"),
    (line_of_chat(1).encode("utf-16"), "UTF-16; write it as UTF-8"),
    (b"[\n" + CHAT + b"\n]", "of a list write each dialogue on a line of its own"),
    (b"question,answer\n1,2", "is not JSON: question,answer"),
    (b"\n \n", "holds no dialogue"),
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
])
def test_what_is_no_file_of_chats_is_named(tmp_path, content, words):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(content if type(content) is bytes else json.dumps(content).encode())
    assert words in fails(prepare, TOKENIZER, 64, str(path))


@posix
def test_data_from_a_pipe_is_one_line(chats):
    """As `--data <(zcat x.gz)` gives it: it is read twice, once to see what it is."""
    read, write = os.pipe()
    os.write(write, pathlib.Path(chats).read_bytes())
    os.close(write)
    path = f"/dev/fd/{read}"
    said = fails(prepare, TOKENIZER, 64, path)
    os.close(read)
    assert said.startswith(f"--data {path} is no file that can be read twice")


def test_a_history_that_is_none_says_what_is_wrong_with_which_message():
    chat = make_chat()
    chat.send("hi")
    before = chat.layout(), list(chat.messages)
    for messages, words in (
        ([USER, {**ANSWER, "content": None}], "the history, message 2: content is null"),
        ([{**USER, "role": "robot"}, ANSWER], 'message 1: the role is "robot"'),
        ([{**USER, "role": "robot"}], "history"),
        ([USER, ANSWER, "z"], "message 3 is no object but a str"),
        ([{**USER, "content": [{"type": "image"}]}, ANSWER], "message 1: content has a part"),
        ([USER], "ends with the assistant's"),
        ([], "history"),
        ({}, "a history is a list"),
    ):
        assert words in fails(go_on, chat, messages)
        assert (chat.layout(), chat.messages) == before
    go_on(chat, [{"from": "human", "value": "x"}, {**ANSWER, "content": [{"text": "y"}]}])
    assert chat.messages == [USER, ANSWER]


@pytest.mark.parametrize(
    "f, words",
    [
        (lambda s: MASKS["ism"](s) > 0, "returns integers, .. not torch.bool"),
        (lambda s: MASKS["ism"](s).float(), "returns integers, .. not torch.float32"),
        (lambda s: MASKS["causal"](s) - 1, "must see at least one; the mask returned a 0"),
        (lambda s: MASKS["causal"](s)[0], "for each token (1, 8), not (8,)"),
        (lambda s: MASKS["causal"](s)[:, :-1], "for each token (1, 8), not (1, 7)"),
        (lambda s: MASKS["ism"](s).tolist(), "a tensor of integers, not a list"),
        (lambda s: None, "a tensor of integers, not a NoneType"),
        (lambda s: torch.full_like(s, s.shape[1]), "under the mask 'own' nothing can be trained"),
        (lambda s: MASKS["causal"](s) + 1, "under the mask 'own' nothing can be trained"),
    ],
)
def test_a_mask_of_ones_own_that_is_none(tmp_path, monkeypatch, f, words):
    """Told at the start, before a step; and in a chat."""
    def step(run, loss):
        raise AssertionError("a step was taken")

    monkeypatch.setitem(MASKS, "own", f)
    assert says(fails(train.train, tiny(tmp_path, mask="own"), watch=step), words)
    if "nothing" not in words:
        chat = make_chat("own")
        fails(chat.send, "hi")
        assert not chat.busy.locked()


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
]


@pytest.mark.parametrize("error", FULL)
@pytest.mark.parametrize("program, named", [
    (train, ("--batch_size", "--block_size", "--n_embd", "--n_layer")),
    (finetune, ("--batch_size", "--block_size", "--grad_accum", "--checkpointing")),
])
def test_out_of_memory_on_a_gpu_names_the_flags(
    tmp_path, monkeypatch, last_words, folder, chats, program, named, error
):
    """Raised by hand where there is no GPU; on the CPU `--n_embd 100000000` runs out for real."""
    def full(*_, **__):
        raise error

    monkeypatch.setattr(GPT, "forward", full)
    flags = ["--init_from", str(folder)] if program is finetune else []
    said = last_words(program, *flags, "--data", chats, "--device=cpu", f"--out_dir={tmp_path}/out")
    assert "out of memory; " in said and all(flag in said for flag in named)


def test_a_chat_that_runs_out_of_memory(trained, monkeypatch, capsys):
    """A tensor of 4 PB is asked for in place of the cache, then in place of an answer's logits."""
    too_much = lambda *_, **__: torch.empty(1 << 50)
    flags = "--device cpu --prompt Hello! --prompt Hi!".split()
    monkeypatch.setattr(sys, "argv", ["sample.py", "--ckpt", str(trained / "ckpt.pt"), *flags])
    words = "^sample.py: out of memory; [^\n]*--block_size[^\n]*$"
    with monkeypatch.context() as patch:
        patch.setattr(sample, "Cache", too_much)
        with pytest.raises(SystemExit, match=words):
            sample.main()
    monkeypatch.setattr(sample.Chat, "feed", too_much)
    sample.main()
    assert capsys.readouterr().out.count("[out of memory; ") == 2
