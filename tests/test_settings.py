"""Each setting does what it says, at its ends and with hardly any data; the idle ones are named."""

import random

import numpy as np
import pytest
import torch
from helpers import LEAST, TOKENIZER, fails, line_of_chat, tiny, write_lines

import data.loader as loader
from data.checkpoint import load_checkpoint
from data.loader import prepare, read_splits
from data.scores import report
from demos.finetune import Finetune, finetune
from sample import load_chat, sample
from train import Settings, train

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("name, value", [
    ("decay", 0.0), ("decay", 1.0), ("weight_decay", 0.0), ("warmup_iters", 0),
    ("warmup_iters", 10**9), ("anneal", 1), ("anneal", 10**9), ("grad_accum", 10**6),
    ("batch_size", 1), ("eval_interval", 1), ("max_iters", 1), ("n_dialogues", 1),
    ("seed", 2**64 - 1),
])
def test_each_setting_trains_at_its_ends(tmp_path, name, value):
    losses, s = [], tiny(tmp_path, **{name: value})
    metrics = train(s, watch=lambda run, loss: losses.append(float(loss)))
    assert len(losses) == s.max_iters and np.isfinite([*losses, metrics["loss"]]).all()


def test_no_clipping_is_clipping_at_no_bound(tmp_path):
    def weights(**settings):
        train(tiny(tmp_path, **settings))
        return load_checkpoint(tmp_path / "ckpt.pt")["model"]

    none, far = weights(grad_clip=0.0), weights(grad_clip=1e30)
    untrained = weights(learning_rate=1e-30, grad_clip=0.0)
    assert all(torch.equal(none[name], far[name]) for name in none)
    assert all(not torch.equal(none[name], untrained[name]) for name in none)


def test_the_lowest_temperatures_take_the_likeliest():
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(50, generator=generator) * 10
        temperature = 10.0 ** -random.Random(seed).uniform(4, 45)
        assert sample(logits.clone(), temperature, generator=generator) == int(logits.argmax())
    assert "not numbers" in fails(sample, torch.full((5,), float("nan")), 1.0)


@pytest.mark.parametrize("flags, words", [
    (dict(data=True, families="follow-up"),
     "beside --data: --n_dialogues, --families"),
    (dict(skip_bad=True), "without --data: --skip_bad"),
    (dict(mask="causal", anneal=2), "under causal, where it begins: --anneal"),
    (dict(data=True, init_from=True, lora=False, rank=4), "beside --no-lora: --rank"),
])
def test_flags_without_effect_are_told(tmp_path, folder, chats, capsys, flags, words):
    known = {"data": chats, "init_from": str(folder)}
    s = {name: known.get(name, value) for name, value in flags.items()}
    s = {**LEAST, "block_size": 64, "out_dir": str(tmp_path / "out"), **s}
    if "lora" in flags:
        finetune(Finetune(**{k: s[k] for k in s if k not in ("n_embd", "n_layer", "n_head")}))
    else:
        train(Settings(**s))
    assert f"without effect {words}" in capsys.readouterr().out.splitlines()


# --- hardly any data ----------------------------------------------------------------------------


def test_runs_of_hardly_any_dialogues_end_or_say_why(tmp_path):
    """Of one dialogue a split, which often does not fit; of new words there may be none at all."""
    told = without = 0
    for seed in range(40):
        try:
            s = tiny(tmp_path, n_dialogues=1, max_iters=1, block_size=40, seed=seed)
            without += "accuracy_new_words" not in train(s)
        except ValueError as error:
            assert "fits into 40 tokens; raise --block_size or --n_dialogues" in str(error)
            told += 1
    assert told > 0 and without > 0
    assert train(tiny(tmp_path, n_dialogues=3, max_iters=1, block_size=48))["loss"] > 0


def test_splits_are_drawn_from_dialogues_that_fit(tmp_path, capsys):
    """Few chats are all trained on and reported on; of more, 5 % are held out for each report."""
    rng = random.Random(0)
    for fit in (0, 1, 6, loader.FEW - 1, loader.FEW, 250):
        lengths = [2] * fit + [100] * rng.randint(1, 12)
        rng.shuffle(lengths)
        lines = [line_of_chat(n, "hello " * k) for n, k in enumerate(lengths)]
        path = write_lines(tmp_path / f"{fit}.jsonl", lines * 3)  # each is there three times
        if fit == 0:
            words = f"{path} has no dialogue with an answer that fits into 32 tokens"
            assert fails(prepare, TOKENIZER, 32, path) == words
            continue
        splits = read_splits(prepare(TOKENIZER, 32, path))
        sizes = {name: len(split.families) for name, split in splits.items()}
        if fit < loader.FEW:
            assert sizes["train"] == fit and splits["val"] is splits["test"] is splits["train"]
        else:
            held = fit // 20
            assert sizes == {"train": fit - 2 * held, "val": held, "test": held}


def test_few_chats_are_learned_by_heart_and_the_report_says_so(tmp_path, capsys):
    path = write_lines(tmp_path / "c.jsonl", [line_of_chat(n) for n in range(6)])
    metrics = train(tiny(tmp_path, data=path, max_iters=None))
    report(metrics)
    told = capsys.readouterr().out
    assert "fewer than 100 different chats: all are trained on, and the report is on" in told
    assert "6 rows of" in told
    assert "Trained-on answers that are exactly right" in told and "eld-out" not in told
    assert metrics["accuracy"] == {"chats": 1} and "accuracy_new_words" not in metrics
    assert metrics["settings"]["max_iters"] == 400
    for n in range(6):
        assert load_chat(tmp_path / "ckpt.pt", "cpu").send(f"hello {n}") == f"yes {n}"
