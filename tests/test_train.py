"""Training: end to end, to the bit, and resumed."""
import json
import random
from dataclasses import asdict

import pytest
import torch
from test_chat import run
from test_data import chat

from data.dialogues import CITIES, NAMES
from mask import MASKS
from model import GPT, GPTConfig
from train import Settings, learning_rate, load_checkpoint, pick_dtype, save_checkpoint, train

TINY = dict(n_dialogues=300, n_layer=2, n_head=2, n_embd=32, batch_size=2, block_size=256, eval_interval=10, dtype="float32", device="cpu")


def test_learning_rate():
    s = Settings(max_iters=100, warmup_iters=10, decay=0.4, learning_rate=1.0)
    rates = [learning_rate(step, s) for step in range(100)]
    assert rates[0] < 0.1 and rates[10:60] == [1.0] * 50 and 0 < rates[-1] < 0.05
    assert all(a >= b for a, b in zip(rates[60:], rates[61:]))


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_trains_and_resumes_to_the_bit(tmp_path, name):
    s = dict(TINY, mask=name, max_iters=24)
    whole = train(Settings(**s, out_dir=str(tmp_path / "whole")))
    # The same run, stopped: its settings are those of 24 steps, its state that of step 20.
    class Stopped(Exception):
        pass

    import train as module
    saved, original = [], module.save_checkpoint

    def save_then_stop(path, **state):
        original(path, **state)
        saved.append(state["step"])
        if state["step"] == 20:
            raise Stopped

    module.save_checkpoint = save_then_stop
    try:
        with pytest.raises(Stopped):
            train(Settings(**s, out_dir=str(tmp_path / "parts")))
    finally:
        module.save_checkpoint = original
    resumed = train(Settings(**s, out_dir=str(tmp_path / "parts"), resume=True))
    assert saved == [10, 20] and resumed["loss"] == whole["loss"]
    a, b = (load_checkpoint(tmp_path / part / "ckpt.pt")["model"] for part in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    metrics = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert set(metrics["accuracy"]) and all(0 <= x <= 1 for x in metrics["accuracy"].values())
    assert {"accuracy", "accuracy_by_turn", "accuracy_new_words", "loss", "seconds", "settings", "parameters"} == set(metrics)


def test_resume_with_another_config_is_told(tmp_path):
    train(Settings(**TINY, max_iters=1, out_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="another model config"):
        train(Settings(**{**TINY, "n_layer": 1}, max_iters=2, out_dir=str(tmp_path), resume=True))


def test_checkpoints_are_whole_or_not_at_all(tmp_path):
    path = tmp_path / "ckpt.pt"
    config = GPTConfig(n_layer=1, n_embd=16, vocab_size=300)
    state = dict(config=asdict(config), settings=asdict(Settings()), tokenizer="", model=GPT(config).state_dict(), optimizer={}, step=1)
    save_checkpoint(path, **state)
    with pytest.raises(Exception):
        save_checkpoint(path, **{**state, "step": lambda: 0})
    assert load_checkpoint(path)["step"] == 1 and list(tmp_path.iterdir()) == [path]
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="not a checkpoint"):
        load_checkpoint(path)


def test_a_mask_of_ones_own_trains_and_chats(tmp_path, monkeypatch):
    """A mask is one function: here an ISM with a limited look-ahead."""
    def near(segments):
        return torch.minimum(MASKS["ism"](segments), MASKS["causal"](segments) + 3)

    monkeypatch.setitem(MASKS, "near", near)
    metrics = train(Settings(**TINY, mask="near", max_iters=10, out_dir=str(tmp_path)))
    assert metrics["loss"] > 0
    from sample import load_chat

    assert isinstance(load_chat(tmp_path / "ckpt.pt", max_new_tokens=5).send("Hello!"), str)


def test_own_chats_train(tmp_path, monkeypatch):
    import data.loader

    monkeypatch.setattr(data.loader, "CACHE", tmp_path / "cache")
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(chat(n) for n in range(10)), encoding="utf-8")
    metrics = train(Settings(**{**TINY, "data": str(path)}, max_iters=5, out_dir=str(tmp_path / "out")))
    assert list(metrics["accuracy"]) == ["chats"] and "accuracy_new_words" not in metrics


def test_dtype_auto_is_one_of_the_two():
    assert pick_dtype("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)


def introduction(i):
    """A short dialogue of facts and questions, a list of (query, answer)."""
    rng = random.Random(i)
    name, city = rng.choice(NAMES), rng.choice(CITIES)
    questions = [("What is my name?", f"Your name is {name}."), ("Where do I live?", f"You live in {city}.")]
    rng.shuffle(questions)
    return [(f"My name is {name} and I live in {city}.", f"Noted. Your name is {name}."), *questions]


def test_end_to_end(tmp_path):
    """The commands: train until held-out questions are answered, then chat; the streamed answers are checked."""
    trained = [introduction(i) for i in range(4000)]
    path = tmp_path / "chats.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for turns in trained:
            messages = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)]
            file.write(json.dumps({"messages": messages}) + "\n")
    done = run("train.py", "--data", str(path), "--out_dir", str(tmp_path), "--max_iters", "400", "--n_layer", "2", "--n_embd", "64",
               "--n_head", "4", "--block_size", "128", "--eval_interval", "1000", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "metrics.json").read_text())["accuracy"]["chats"] > 0.8
    new = [turns for turns in map(introduction, range(4000, 4020)) if turns not in trained][:4]
    right = 0
    for turns in new:
        prompts = [part for query, _ in turns for part in ("--prompt", query)]
        done = run("sample.py", "--ckpt", str(tmp_path / "ckpt.pt"), "--device", "cpu", *prompts)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[::2] == [f"> {query}" for query, _ in turns]
        right += sum(line == answer for line, (_, answer) in zip(lines[1::2], turns))
    assert right >= 8  # of 12
