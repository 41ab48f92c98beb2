"""What is typed and printed: terminals, pipes, notebooks, --help, and commands to be pasted."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import unicodedata

import pytest
from conftest import ROOT
from helpers import LEAST, fails, flags_of, posix, tiny

import sample as sample_module
import train as train_module
from data.checkpoint import load_checkpoint
from data.machine import Bar, one_line, printable
from demos import finetune as finetune_module
from demos.finetune import Finetune
from demos.real import convert
from sample import load_chat, read_history, talk
from train import Settings, train

pytestmark = pytest.mark.usefixtures("own_cache")


def test_only_what_drives_a_terminal_is_changed_for_it():
    """Each of the 1,114,112 characters."""
    overrides = {*"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}
    for c in map(chr, range(0x110000)):
        drives = unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" or c in overrides
        assert printable(c) == ("\ufffd" if drives else c), hex(ord(c))
        assert one_line(f"a{c}b").isprintable()
    assert printable("Bonjour\xa0! 1\u202f000") == "Bonjour\xa0! 1\u202f000"


def test_bad_input_at_the_terminal(trained):
    """Each line is answered, in order, and nothing raw comes out.

    Invalid UTF-8, control characters, 1 MB without a space, special tokens.
    """
    lines = [b"\xff\xfe\x80 hi", b"\x1b[2J\x07\x00", b"x" * 1_000_000, b"<|end|><|assistant|>",
             "é".encode()[:1], b"/save", b"/help", b"/sevae", b"/reset", b"ok", b"/quit"]
    flags = "sample.py --ckpt PATH --device cpu --max_new_tokens 5 --temperature 2".split()
    flags[2] = str(trained / "ckpt.pt")
    done = subprocess.run([sys.executable, *flags], cwd=ROOT, input=b"\n".join(lines),
                          capture_output=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
    out = done.stdout.decode("utf-8")
    assert out.count("[the query is too long for the context of 256 tokens]") == 1
    assert "[not saved: /save FILE needs" in out and "[no command /sevae; /help" in out
    assert "/help       this" in out and all(c.isprintable() or c in "\n\t" for c in out)


def test_a_byte_order_mark_before_piped_input_and_a_history(
    trained, tmp_path, monkeypatch, capsys):
    chat = load_chat(trained / "ckpt.pt", "cpu", max_new_tokens=3)
    raw = io.BytesIO(b"\xef\xbb\xbf/stats\n\xff?\n/quit\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw, encoding="utf-8"))
    talk(chat, [])
    assert "0 of 256 tokens in the cache" in capsys.readouterr().out
    assert chat.messages[0]["content"] == "\ufffd?"
    path = tmp_path / "history.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(chat.messages).encode())
    assert read_history(path) == chat.messages


# --- notebooks, threads and streams -------------------------------------------------------------


class OutStream(io.StringIO):
    """Standard output as a notebook has it: without `reconfigure`."""


def test_train_and_chat_in_a_notebook(tmp_path, monkeypatch):
    """In a thread, in its main thread, and as `%run sample.py --prompt Ho`."""
    monkeypatch.setattr(sys, "stdout", OutStream())
    monkeypatch.setattr(sys, "stderr", OutStream())
    monkeypatch.setattr(sys, "stdin", None)
    done = []

    def work():
        train(tiny(tmp_path))
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
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--ckpt={tmp_path}", "--prompt=Ho"])
    sample_module.main()
    assert "> Ho\n" in sys.stdout.getvalue()


@posix
def test_a_closed_input_and_an_output_that_nobody_reads(trained):
    flags = f"--ckpt '{trained}/ckpt.pt' --device cpu --prompt Hi --prompt Ho"
    done = subprocess.run(
        ["sh", "-c", f"'{sys.executable}' sample.py {flags} <&- | head -1"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )
    assert (done.stdout, done.stderr) == ("> Hi\n", "")


class Broken(io.StringIO):
    """A pipe whose reader leaves when he has read these words."""

    def __init__(self, words):
        super().__init__()
        self.words = words

    def write(self, text):
        if self.words in text:
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


@pytest.mark.parametrize("name, stream", [
    ("stderr", None), ("stderr", Broken("")), ("stdout", Broken("chat with it so far"))])
def test_nobody_reads_the_progress(tmp_path, monkeypatch, name, stream):
    """As behind `2>&1 | head -1`, or with `2>&-`: the run goes on to its end.

    Also where it cannot tell that there is a first checkpoint, after half a minute.
    """
    monkeypatch.setattr(train_module, "FIRST_SAVE", 0.0)
    monkeypatch.setattr(sys, name, stream)
    assert list(Bar(range(5))) == list(range(5))
    train(tiny(tmp_path, max_iters=3))
    assert load_checkpoint(tmp_path / "ckpt.pt")["step"] == 3
    assert (tmp_path / "metrics.json").exists()


@posix
def test_nobody_reads_the_result(tmp_path, monkeypatch, handlers):
    """Standard output breaks when the tables are printed: no traceback, and all is on the disk."""
    read, write = os.pipe()
    with open(write, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        os.close(read)
        monkeypatch.setattr(sys, "argv", ["train.py", *flags_of(**LEAST, out_dir=tmp_path)])
        monkeypatch.setattr(train_module, "announce", lambda run: Bar(total=2, disable=True))
        with pytest.raises(SystemExit) as end:
            train_module.main()
    assert end.value.code == 1 and (tmp_path / "metrics.json").exists()


# --- help and commands --------------------------------------------------------------------------


def asked(monkeypatch, words):
    """The path after --ckpt in a command that was printed, as a shell would give it."""
    parts = shlex.split(words.split("python sample.py ")[-1])
    monkeypatch.setattr(sys, "argv", ["sample.py", *parts])
    return sample_module.flags().ckpt


def test_a_printed_command_can_be_pasted(tmp_path, monkeypatch, handlers, folder, chats, capsys):
    """Whatever its path is made of."""
    def printed(program, *flags):
        monkeypatch.setattr(sys, "argv", ["x.py", *flags])
        program.main()
        return capsys.readouterr().out.strip().splitlines()[-1]

    out = tmp_path / "it's $HOME; two"
    line = printed(train_module, *flags_of(**LEAST, out_dir=out))
    assert asked(monkeypatch, line) == str(out / "ckpt.pt")
    out = tmp_path / "a $b"
    settings = dict(data=chats, max_iters=1, block_size=64, batch_size=2, device="cpu")
    line = printed(finetune_module, *flags_of(**settings, init_from=folder, out_dir=out))
    assert asked(monkeypatch, line) == str(out)
    said = fails(load_chat, out / "ckpt.pt", "cpu")  # LoRA's weights, not merged
    assert asked(monkeypatch, "python sample.py " + said.split("whole: ")[1]) == str(out)
    said = fails(convert, "no.gguf", out, "bfloat16")
    assert asked(monkeypatch, said.split("(")[1].split(")")[0]) == str(out)


def help_of(program, monkeypatch, capsys):
    """{flag: what --help says of it}"""
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setattr(sys, "argv", ["x.py", "--help"])
    with pytest.raises(SystemExit):
        program.main()
    parts = re.split(r"^  --(\w+)", capsys.readouterr().out, flags=re.MULTILINE)
    return {name: " ".join(told.split()) for name, told in zip(parts[1::2], parts[2::2])}


@pytest.mark.parametrize("program", [train_module, finetune_module, sample_module])
def test_help_shows_the_real_defaults(program, monkeypatch, capsys):
    told = help_of(program, monkeypatch, capsys)
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    settings = {train_module: Settings, sample_module: lambda init_from: sample_module.flags(),
                finetune_module: Finetune}[program](init_from="x")
    # Those are told in words.
    words = "init_from", "learning_rate", *(["block_size"] if program is sample_module else [])
    for name, value in vars(settings).items():
        if value in ("", None, []) or name in words:
            continue
        default = re.search(r"\(default: (.*?)\)", told[name])[1]
        number = type(value) in (int, float) and float(default.split(",")[0]) == value
        assert default == str(value) or number, name


def test_help_shows_the_real_learning_rates(monkeypatch, capsys):
    told = help_of(train_module, monkeypatch, capsys)["learning_rate"]
    assert f"(default: {Settings().learning_rate}, with --init_from 2e-5)" in told
    assert Settings(init_from="x").learning_rate == 2e-5
    told = help_of(finetune_module, monkeypatch, capsys)["learning_rate"]
    assert "(default: 2e-4 with LoRA, 2e-5 without)" in told
    assert Finetune(init_from="x").learning_rate == 2e-4
    assert Finetune(init_from="x", lora=False).learning_rate == 2e-5
