"""Kills, signals and faults: nothing computed is lost, and a resumed run is the same to the bit."""

import fcntl
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from helpers import LEAST, TINY, TOKENIZER, fails, flags_of, slots_of, tiny

import data.loader as loader
import train as train_module
from data.checkpoint import load_checkpoint, save_checkpoint, whole_file
from data.loader import prepare, read_splits
from data.machine import until_stopped
from demos import finetune as finetune_module
from demos.finetune import Finetune, finetune
from sample import load_chat
from train import Settings, train

pytestmark = pytest.mark.usefixtures("own_cache")

# A checkpoint every fourth step, so that much of the time is spent writing. Many more steps than
# the kills wait for, so that a late one still comes in time.
KILLED = {**TINY, "n_dialogues": 20, "n_embd": 64, "max_iters": 120, "eval_interval": 4}


def start(out, resume=False, env=None, **changed):
    flags = flags_of(**{**KILLED, **changed}, out_dir=out) + ["--resume"] * resume
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    return subprocess.Popen([sys.executable, "train.py", *flags], cwd=ROOT, env=env, **pipes)


def finish(out, resume=False, **options):
    """The final loss, the step, and all numbers that the last checkpoint holds."""
    process = start(out, resume, **options)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    state = load_checkpoint(out / "ckpt.pt")
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    return metrics["loss"], state["step"], [x for slot in slots_of(state) for x in slot.values()]


def same(a, b):
    """Whether two runs have the same loss, step and numbers at their end."""
    return a[:2] == b[:2] and len(a[2]) == len(b[2]) and all(map(torch.equal, a[2], b[2]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("whole") / "out")


def wait_for(process, condition, seconds=120):
    """Whether the condition came true before the process ended.

    Asks every half millisecond, since a file is being written for a few milliseconds only.
    """
    until = time.time() + seconds
    while process.poll() is None and time.time() < until:
        if condition():
            return True
        time.sleep(0.0005)
    assert process.poll() is not None, "nothing happened"
    return False


def written(file):
    """When a file was written, 0 if it is not there."""
    return file.stat().st_mtime_ns if file.exists() else 0


def kill(out, moment, rng):
    """Start or resume the run and kill it. True if it was writing a checkpoint.

    moment: while it starts, in some step, or while it writes a checkpoint.
    """
    file = out / "ckpt.pt"
    half_written = lambda: any(out.glob("ckpt.pt.*.partial"))
    before, process = written(file), start(out, resume=file.exists())
    another = lambda: written(file) != before
    if moment == "start":
        end = time.time() + rng.uniform(0, 4)
        # Its first checkpoint ends the start.
        wait_for(process, lambda: time.time() > end or another())
    else:
        for _ in range(rng.randint(1, 6)):  # the n-th checkpoint from here
            if not wait_for(process, another):
                break
            before = written(file)
        time.sleep(rng.uniform(0, 0.05))
        if moment == "writing":
            wait_for(process, half_written)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it had ended before it was killed"
    return half_written()


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again(tmp_path, whole):
    """Each time in the run that went on from the one before; at least once as it writes."""
    rng = random.Random(time.time())
    kill(tmp_path, "step", rng)
    assert any(kill(tmp_path, "writing", rng) for _ in range(4))
    kill(tmp_path, "start", rng)
    assert same(finish(tmp_path, resume=True), whole)
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"ckpt.pt", "metrics.json"}


@pytest.mark.slow
def test_a_signal_ends_in_a_checkpoint_and_a_line(tmp_path, whole):
    file = tmp_path / "ckpt.pt"
    for number in (signal.SIGTERM, signal.SIGINT):
        before = written(file)
        process = start(tmp_path, resume=file.exists())
        assert wait_for(process, lambda before=before: written(file) != before)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1 and "Traceback" not in errors
        step = load_checkpoint(file)["step"]
        stopped = f"stopped after step {step} of {KILLED['max_iters']}"
        how = f"the same flags and --resume go on from {file}"
        assert errors.splitlines()[-1] == f"train.py: {stopped}; {how}"
    assert same(finish(tmp_path, resume=True), whole)


def test_stopping_cuts_no_step_and_the_second_time_interrupts(handlers):
    acting = lambda: (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    before, steps = acting(), []
    for batch in until_stopped(range(100)):
        if batch == 3:
            signal.raise_signal(signal.SIGTERM)
        steps.append(batch)
    assert steps == [0, 1, 2, 3] and acting() == before
    with pytest.raises(KeyboardInterrupt):
        for _ in until_stopped(range(100)):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)


def test_a_hangup_leaves_a_checkpoint_and_a_run_without_files_a_line(tmp_path, handlers):
    def hang_up(run, loss):
        if run.step == 3:
            signal.raise_signal(signal.SIGHUP)

    splits = read_splits(prepare(TOKENIZER, 256, n_dialogues=30))
    with pytest.raises(KeyboardInterrupt, match="^stopped after step 3 of 9$"):
        train(tiny(tmp_path, max_iters=9), splits=splits, watch=hang_up)
    assert not (tmp_path / "ckpt.pt").exists()
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3 of 9; .*--resume"):
        train(tiny(tmp_path, max_iters=9), watch=hang_up)
    assert load_checkpoint(tmp_path / "ckpt.pt")["step"] == 3
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        train(tiny(tmp_path, max_iters=9), watch=hang_up)
    except KeyboardInterrupt:
        pytest.fail("it was stopped all the same")
    assert load_checkpoint(tmp_path / "ckpt.pt")["step"] == 9


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


def test_a_closed_terminal_leaves_a_checkpoint(tmp_path):
    """A real one: all that is written to it fails from then on."""
    termios = pytest.importorskip("termios")
    main, terminal = os.openpty()
    size = struct.pack("HHHH", 24, 100, 0, 0)  # lines and columns, without which no loss is shown
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
    flags = flags_of(**{**LEAST, "max_iters": 100000, "eval_interval": 1000}, out_dir=tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINAL, sys.executable, "train.py", *flags],
        cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal,
    )
    os.close(terminal)
    seen = b""
    while b"loss" not in seen:
        seen += os.read(main, 1000)
    os.close(main)
    assert process.wait(timeout=300) == 1
    assert load_checkpoint(tmp_path / "ckpt.pt")["step"] >= 20
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["ckpt.pt"]


def test_a_run_saves_before_it_evaluates(tmp_path, monkeypatch):
    def broken(run, split):
        raise RuntimeError("evaluation")

    monkeypatch.setattr(train_module, "evaluate", broken)
    for interval, step in ((1, 1), (1000, 2)):
        out = tmp_path / str(interval)
        with pytest.raises(RuntimeError, match="evaluation"):
            train(tiny(out, eval_interval=interval))
        assert load_checkpoint(out / "ckpt.pt")["step"] == step


# --- what a run goes on from --------------------------------------------------------------------


def test_a_checkpoint_of_other_settings_vocabulary_or_version(tmp_path):
    assert "without --resume a run begins" in fails(train, tiny(tmp_path, resume=True))
    train(tiny(tmp_path))
    for changed, words in (
        ({"n_layer": 2}, "n_layer 1, not 2"),
        ({"block_size": 128}, "block_size 256, not 128"),
        ({"mask": "causal"}, "mask ism, not causal"),
        ({"muon": False}, "needs the flags of the run"),
        ({"max_iters": 1}, "from step 2; --max_iters must be at least that"),
    ):
        assert words in fails(train, tiny(tmp_path, **changed, resume=True))
    path = tmp_path / "ckpt.pt"
    state = load_checkpoint(path)
    assert state["settings"]["n_layer"] == 1
    assert torch.load(path, weights_only=True)["torch"] == torch.__version__
    save_checkpoint(path, **{**state, "tokenizer": "nanoism 00000000"})
    said = fails(train, tiny(tmp_path, resume=True))
    assert "tokenizer nanoism 00000000, not nanoism" in said
    assert "another tokenizer" in fails(load_chat, path)
    for version in (99, None):
        with whole_file(path) as file:
            torch.save({**state, "version": version}, file)
        for read in (load_chat, load_checkpoint):
            assert f"version {version}; this code reads version 1" in fails(read, path)


def test_resume_with_other_lora_is_one_line(tmp_path, folder, chats):
    s = dict(data=chats, init_from=str(folder), out_dir=str(tmp_path / "out"), max_iters=1,
             batch_size=2, block_size=64, device="cpu", dtype="float32")
    finetune(Finetune(**s, rank=4))
    for changed, words in (
        ({}, "rank 4, not 16"),
        ({"rank": 4, "alpha": 64.0}, "alpha 32.0, not 64.0"),
        ({"rank": 4, "lora": False}, "lora True, not False"),
    ):
        said = fails(finetune, Finetune(**s, **changed, resume=True))
        assert words in said and "--resume needs the same settings" in said
    said = fails(train, Settings(**s, resume=True))
    assert "--resume needs the flags of the run that wrote it" in said
    finetune(Finetune(**{**s, "max_iters": 2}, rank=4, resume=True))


def test_to_resume_with_other_settings_is_told(tmp_path, capsys):
    train(tiny(tmp_path))
    capsys.readouterr()
    train(tiny(tmp_path, max_iters=3, grad_clip=0.5, resume=True))
    told = "goes on with other settings than before: --max_iters 3, not 2; --grad_clip 0.5, not 1.0"
    assert told in capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(tmp_path):
    """Across processes all is the same to the bit.

    Across thread counts the data and the initial weights are; products of matrices need not be.
    """
    def outcome(threads, hash_seed):
        """The data, the initial weights, the run, the chat: each made in a process of its own."""
        out = tmp_path / f"{threads}.{hash_seed}"
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONHASHSEED": hash_seed,
                       "NANOISM_CACHE": str(out / "cache")}
        run = finish(out, env=environment, max_iters=10)
        first = finish(out / "first", env=environment, max_iters=1, learning_rate=1e-30)
        data = [path.read_bytes() for path in sorted((out / "cache").rglob("*.npy"))]
        chat = subprocess.run(
            [sys.executable, "sample.py", f"--ckpt={out}", "--temperature=1", "--seed=3",
             "--device=cpu", "--prompt=Hello!", "--prompt=My name is Ann."],
            cwd=ROOT, env=environment, capture_output=True, check=True)
        weights = first[2][: len(load_checkpoint(out / "ckpt.pt")["model"])]
        return data, weights, run, chat.stdout

    a, b, other = outcome("1", "1"), outcome("1", "2"), outcome("2", "1")
    assert same(a[2], b[2]) and a[3] == b[3] and b"> My name is Ann.\n" in a[3]
    for data, weights, *_ in (b, other):
        assert data == a[0] and all(map(torch.equal, weights, a[1]))
    assert other[2][0] == pytest.approx(a[2][0], rel=1e-3)
