"""What is written is whole, is what it says, and nobody else's file is touched."""

import contextlib
import json
import os
import pathlib
import random
import subprocess
import sys

import pytest
import torch
from helpers import TOKENIZER, fails, make_chat, posix, slots_of, tiny

import train as train_module
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
from data.loader import Split, prepare
from data.machine import one_line
from demos import finetune as finetune_module
from sample import command
from train import train

resource = pytest.importorskip("resource", reason="limits as Linux and macOS have them")
pytestmark = pytest.mark.usefixtures("own_cache")


@contextlib.contextmanager
def full_at(size):
    """No file takes more than so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_on_a_full_disk_the_last_good_checkpoint_stays(tmp_path):
    """First a device that is full, then a file system that takes no more bytes."""
    train(tiny(tmp_path))
    path = tmp_path / "ckpt.pt"
    good, state = path.read_bytes(), load_checkpoint(path)
    if pathlib.Path("/dev/full").exists():
        said = fails(save_checkpoint, "/dev/full", **state)
        assert "/dev/full cannot be written (No space left" in said
    for limit in random.Random(0).sample(range(len(good)), 20):
        with full_at(limit):
            said = fails(save_checkpoint, path, tmp_path / "ckpt.before.pt", **state)
        assert "ckpt.pt cannot be written (File too large" in said
        assert path.read_bytes() == good
        assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["ckpt.pt",
                                                                             "metrics.json"]
    assert one_line(said) == said


def test_a_conversation_is_saved_whole_or_not_at_all(tmp_path, capsys):
    chat, path = make_chat(), tmp_path / "a.json"
    chat.send("one")
    command(chat, f"/save {path}")
    good = path.read_bytes()
    chat.send("two " * 10)
    with full_at(len(good) // 2):
        command(chat, f"/save {path}")
    saved, failed = capsys.readouterr().out.splitlines()
    assert saved == f"[saved to {path}]" and failed.startswith(f"[not saved: {path}: ")
    assert path.read_bytes() == good and list(tmp_path.iterdir()) == [path]


def test_data_that_fails_half_way_leaves_nothing(tmp_path):
    with full_at(20_000):
        assert "cannot be written" in fails(prepare, TOKENIZER, 256, n_dialogues=300)
    assert not list((tmp_path / "cache").iterdir())
    assert len(Split(prepare(TOKENIZER, 256, n_dialogues=300), "train").offsets) == 301


def test_bad_lines_that_were_skipped_once_are_not_skipped_unasked(chats):
    with open(chats, "a", encoding="utf-8") as file:
        file.write("{")
    prepare(TOKENIZER, 64, chats, skip_bad=True)
    assert "line 13 is not JSON" in fails(prepare, TOKENIZER, 64, chats)


# --- a checkpoint is what was written -----------------------------------------------------------


@pytest.mark.parametrize("interval", [1000, 1])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, interval):
    train(tiny(tmp_path, max_iters=5))
    path = tmp_path / "ckpt.pt"
    good = path.read_bytes()
    steep = dict(eval_interval=interval, max_iters=200, learning_rate=1e30, resume=True)
    said = fails(train, tiny(tmp_path, **steep))
    assert "is NaN or infinite at step " in said and "--learning_rate" in said
    slots = slots_of(load_checkpoint(path))
    assert all(x.isfinite().all() for slot in slots for x in slot.values())
    if interval > 1:
        assert path.read_bytes() == good and " step 20;" in said


def test_what_is_not_finite_is_not_saved(tmp_path):
    train(tiny(tmp_path, max_iters=5))
    path = tmp_path / "ckpt.pt"
    good, rng = path.read_bytes(), random.Random(0)
    for _ in range(30):
        state = load_checkpoint(path)
        slots = rng.choice(slots_of(state))
        x = slots[rng.choice(list(slots))]
        bad = rng.choice((float("nan"), float("inf"), -float("inf")))
        x.view(-1)[rng.randrange(x.numel())] = bad
        assert "is NaN or infinite at step 5" in fails(save_checkpoint, path, **state)
        assert path.read_bytes() == good


def test_a_changed_bit_in_a_checkpoint_is_seen(trained, tmp_path):
    path, rng = tmp_path / "ckpt.pt", random.Random(0)
    good, state = (trained / "ckpt.pt").read_bytes(), load_checkpoint(trained / "ckpt.pt")
    for x in rng.choices(list(state["model"].values()), k=20):
        numbers, bad = x.numpy().tobytes(), bytearray(good)
        bad[good.index(numbers) + rng.randrange(len(numbers))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        assert "is not a checkpoint" in fails(load_checkpoint, path)


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


# --- nobody else's file -------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("module", [train_module, finetune_module])
def test_the_folder_of_init_from_is_not_written_over(tmp_path, last_words, folder, chats, module):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "link").symlink_to(folder)
    flags = "--init_from", str(folder), "--data", chats, "--device=cpu"
    for out in (folder, folder / ".." / "folder", tmp_path / "link"):
        said = last_words(module, *flags, "--out_dir", str(out))
        assert f"--out_dir {out} is the folder of --init_from; name another" in said
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_nothing_of_a_folder_is_written_before_the_data_are_read(tmp_path, last_words, folder):
    (tmp_path / "empty.jsonl").touch()
    flags = "--init_from", str(folder), "--data", str(tmp_path / "empty.jsonl")
    said = last_words(finetune_module, *flags, f"--out_dir={tmp_path}/out", "--device=cpu")
    assert "empty.jsonl holds no dialogue" in said
    assert not (tmp_path / "out" / "config.json").exists()


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@posix
def test_a_second_run_in_a_folder_is_told(tmp_path):
    mine, theirs = tmp_path / "ckpt.pt.0123abcd.partial", tmp_path / "ckpt.pt"
    others = [tmp_path / "movie.partial", tmp_path / "lock"]
    others[0].write_bytes(b"a film"), others[1].write_bytes(b"a file")
    (tmp_path / "smollm2.partial").mkdir()
    mine.touch(), theirs.write_bytes(b"good")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / LOCK)],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    s = tiny(tmp_path)
    assert fails(train, s) == f"another run is writing to {tmp_path}; name another --out_dir"
    assert mine.exists() and theirs.read_bytes() == b"good"
    holder.communicate()
    train(s)  # what died holds nothing
    assert not mine.exists() and load_checkpoint(theirs)["step"] == 2
    hold(tmp_path)
    let_go(tmp_path)
    assert not (tmp_path / LOCK).exists() and (tmp_path / "smollm2.partial").exists()
    assert [path.read_bytes() for path in others] == [b"a film", b"a file"]


def test_a_run_that_failed_holds_its_folder_no_longer(tmp_path):
    def fail(run, loss):
        raise RuntimeError("a cell that fails")

    with pytest.raises(RuntimeError, match="a cell"):
        train(tiny(tmp_path), watch=fail)
    train(tiny(tmp_path))
    assert load_checkpoint(tmp_path / "ckpt.pt")["step"] == 2


def test_a_run_keeps_the_longest_model_of_the_runs_before(tmp_path, capsys):
    """Of each new run: its steps, those of the model that is then put away, and what it tells."""
    path, before = tmp_path / "ckpt.pt", tmp_path / "ckpt.before.pt"
    edited = {"attention": torch.zeros(1)}  # another model than GPT is here now
    runs = [(4, 0, ""), (2, 4, "4 steps, which becomes ckpt.before.pt when"),
            (1, 4, "2 steps, which this run replaces; ckpt.before.pt has one of 4 steps and stays"),
            (5, 4, "1 steps, which this run replaces"), (6, 5, "in place of one of 4 steps")]
    for steps, kept, words in runs:
        train(tiny(tmp_path, max_iters=steps))
        told = [line for line in capsys.readouterr().out.splitlines() if str(path) in line]
        assert words in "".join(told) and len(told) == (kept > 0)
        state = load_checkpoint(path)
        assert state["step"] == steps
        save_checkpoint(path, **{**state, "model": edited})
        if kept:
            figures = json.loads((tmp_path / "metrics.before.json").read_text(encoding="utf-8"))
            assert steps_of(before) == figures["settings"]["max_iters"] == kept
    save_checkpoint(path, **state)
    train(tiny(tmp_path, max_iters=7, resume=True))
    assert steps_of(before) == 5 and load_checkpoint(path)["step"] == 7


@posix
def test_what_a_run_or_a_chat_writes_goes_through_links_and_into_devices(tmp_path, monkeypatch):
    large, out = tmp_path / "large", tmp_path / "out"
    large.mkdir(), out.mkdir()
    (out / "ckpt.pt").symlink_to(large / "ckpt.pt")
    monkeypatch.chdir(tmp_path)
    elsewhere = lambda run, loss: os.chdir(large)  # as a reader's watch may
    for steps in (2, 3):
        train(tiny("out", max_iters=steps), watch=elsewhere)
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
