"""Several processes: torchrun on the CPU, where gloo carries the gradients, against one process."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from helpers import TINY, random_chats, write_lines

SCRIPT = """
import json, pathlib, sys
sys.path.insert(0, {root!r})
import train
import data.loader
from data.machine import RANK
data.loader.CACHE = pathlib.Path(sys.argv[1]) / "cache"
seen, read, norms = [], [], []
parts, clip = train.parts, train.torch.nn.utils.clip_grad_norm_


def noted(run, rows, mask):
    cut, of_step = parts(run, rows, mask), []
    for tokens, segments, _ in cut:
        of_step += [row[real].tolist() for row, real in zip(tokens, segments > 0)]
    read.append(of_step)
    return cut


def clipped(parameters, most):
    norms.append(float(clip(parameters, most)))


def told(run, loss):
    seen.append(loss.item())
    tell(run, loss)


tell = train.tell
train.parts, train.torch.nn.utils.clip_grad_norm_, train.tell = noted, clipped, told
s = json.loads(sys.argv[2])
metrics = train.train(train.Settings(**s))
name = pathlib.Path(s["out_dir"]) / f"losses.{{RANK}}.json"
name.write_text(json.dumps([seen, read, metrics["loss"], metrics["accuracy"], norms]))
"""


def launch(processes, tmp_path, settings):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    how = [sys.executable]
    if processes > 1:
        how += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [*how, str(script), str(tmp_path), json.dumps(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )


@pytest.fixture
def settings(tmp_path):
    chats = write_lines(tmp_path / "chats.jsonl", random_chats(90, 9))
    return {**TINY, "data": chats, "batch_size": 1, "block_size": 128, "max_iters": 20}


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    dict(mask="ism", grad_accum=2, checkpointing=True), dict(mask="prefix", batch_size=2)])
def test_two_processes_equal_one(tmp_path, settings, options):
    """The same losses over 20 steps, the same weights and held-out figures.

    Each process reads its own rows; one prints and writes.
    """
    runs = {}
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        process = launch(processes, tmp_path, {**settings, **options, "out_dir": str(out)})
        printed = process.communicate(timeout=240)[0]
        assert process.returncode == 0, printed
        assert printed.count("parameters, ") == 1 and printed.count("were cut") <= 1
        files = [out / f"losses.{rank}.json" for rank in range(processes)]
        runs[processes] = [json.loads(file.read_text()) for file in files]
        runs[processes].append(torch.load(out / "ckpt.pt", weights_only=True)["model"])
    (one, rows, loss, accuracy, norms), weights = runs[1]
    first, second, both = runs[2]
    assert len(one) == 20 and one[-1] < one[0]
    assert all(abs(a + b - whole) < 1e-5 for a, b, whole in zip(first[0], second[0], one))
    assert all(abs(a - whole) < 1e-3 * whole for a, whole in zip(first[4], norms))
    assert abs(first[2] - loss) < 1e-4 and first[3].keys() == accuracy.keys()
    assert first[2:] == second[2:]
    assert all((weights[name] - both[name]).abs().max() < 1e-3 for name in weights)
    alone = 0
    for whole, a, b in zip(rows, first[1], second[1]):
        a, b, whole = ({tuple(row) for row in part} for part in (a, b, whole))
        assert a | b == whole and not a & b
        if not b:  # of one row the second process has nothing
            alone += 1
    assert alone > 0 or "grad_accum" not in options


def test_a_process_that_dies_ends_the_run_with_a_message(tmp_path, settings):
    out = tmp_path / "out"
    settings |= {"max_iters": 100000, "eval_interval": 5, "out_dir": str(out)}
    process = launch(2, tmp_path, settings)
    until = time.time() + 120
    while not (out / "ckpt.pt").exists() and time.time() < until:
        time.sleep(0.2)
    children = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
    workers = subprocess.run(children, capture_output=True, text=True).stdout.split()
    ended = process.poll() is not None
    assert len(workers) == 2, process.communicate()[0] if ended else workers
    os.kill(int(workers[1]), signal.SIGKILL)
    printed = process.communicate(timeout=100)[0]  # no hang
    assert process.returncode != 0 and "SIGKILL" in printed


def test_settings_that_cannot_be_end_all_processes_with_one_line(tmp_path, settings):
    (tmp_path / "chats.jsonl").write_text("{")
    process = launch(2, tmp_path, {**settings, "out_dir": str(tmp_path / "out")})
    printed = process.communicate(timeout=100)[0]
    assert process.returncode != 0 and "chats.jsonl, line 1" in printed
