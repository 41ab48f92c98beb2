"""demos/speed.py: it runs, and its figures are of the right kind.

What they are is no matter of a test.
"""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import run

from data.loader import Split, prepare
from data.tokenizer import Tokenizer
from demos import speed
from model import GPT, GPTConfig
from train import Settings, make_optimizer, model_config, rate_at, train


@pytest.mark.slow
def test_quick_writes_the_table_the_figures_and_the_picture(tmp_path):
    files = ["--json", str(tmp_path / "speed.json"), "--out", str(tmp_path / "new" / "speed.png")]
    done = run("demos/speed.py", "--quick", "--device", "cpu", *files)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new" / "speed.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "speed.json").read_text())
    passes = figures["a training pass, times causal's"]
    assert passes["causal"]["ratio"] == 1 and set(passes) == {"causal", "ism", "prefix"}
    for found in passes.values():
        low, high = found["quartiles"]
        assert 0 < low <= high and found["seconds"] > 0
    turns = figures["first token by turn"].values()
    assert len({len(seconds) for seconds in turns}) == 1
    assert all(s > 0 for seconds in turns for s in seconds)
    for name in figures:
        assert name in done.stdout


def test_pieces_of_text_train_with_a_loss_on_all_tokens():
    pieces = speed.Pieces(np.arange(200) % 20, n=8, length=16)
    torch.manual_seed(0)
    model = GPT(GPTConfig(20, 16, n_layer=1, n_head=2, n_kv_head=2, n_embd=16, n_hidden=32))
    losses = []
    s = Settings(mask="causal", answers_only=False, batch_size=2, block_size=16, max_iters=4,
                 device="cpu", dtype="float32")
    watch = lambda run, loss: losses.append((float(loss), run.seen))  # noqa: E731
    train(s, model, {"train": pieces, "test": speed.Some(pieces, 1)}, watch)
    assert [seen for _, seen in losses] == [0, 32, 64, 96]  # counted when the next step begins
    assert losses[-1][0] < losses[0][0]


@pytest.mark.parametrize("answers_only", [True, False])
def test_a_peer_trains_on_the_tokens_and_the_targets_of_ours(answers_only):
    """So a twin of our model, trained as the peer in its place, has the same losses."""
    tokenizer = Tokenizer()
    split = Split(prepare(tokenizer, 256, "", 400), "train")
    s = Settings(mask="causal", answers_only=answers_only, batch_size=1, max_iters=12,
                 device="cpu", dtype="float32")
    torch.manual_seed(0)
    model = GPT(model_config(s, tokenizer.vocab_size))
    twin = copy.deepcopy(model)
    optimizer, losses = make_optimizer(twin, s), []

    def step(tokens, targets):
        loss = F.cross_entropy(twin(tokens).flatten(0, 1), targets.flatten(), ignore_index=-1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), s.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(len(losses), s)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        return losses[-1]

    found = speed.beside(s, split, model, step)
    assert len(losses) == s.max_iters and losses[-1] < losses[0]
    theirs = found["nanoGPT, last loss"]
    assert theirs == pytest.approx(np.mean(losses[-10:]))
    assert found["ours, last loss"] == pytest.approx(theirs, rel=1e-4)


def test_the_way_to_a_peers_loss_counts_steps_and_their_times():
    steps = {
        "ours": [(10 - i, 2.0) for i in range(20)],  # after the 15th a mean of ten is 0.5
        "nanoGPT": [(0.5, 1.0)] * 20,
    }
    found = speed.compared(steps)
    assert found["times as fast a step"]["ratio"] == 0.5
    assert found["ours, steps to nanoGPT's last loss"] == 15
    assert found["times as fast to nanoGPT's last loss"] == pytest.approx(20 / 15 * 0.5)


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--device", "tpu"), "tpu"),
        (("--nanogpt", "nowhere"), "nowhere"),
        (("--out", "/dev/null/x.png", "--quick"), "cannot write /dev/null"),
        (("--json", "/dev/null/x.json"), "cannot write /dev/null"),
    ],
)
def test_errors_are_one_line(flags, words, last_words, capsys):
    assert words in last_words(speed, *flags)
    assert not capsys.readouterr().out  # at once, not after the measurements
