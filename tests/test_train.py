"""Training: end to end, to the bit, and resumed."""

import copy
import json
import random

import pytest
import torch
from helpers import TINY, run, write_lines

from data.checkpoint import load_checkpoint, save_checkpoint
from data.scores import report
from data.synthetic.words import CITIES, NAMES
from mask import MASKS
from model import GPT, GPTConfig
from sample import load_chat
from train import POLYNOMIALS, Settings, equalize, make_optimizer, rate_at, train


def test_learning_rate():
    s = Settings(max_iters=100, warmup_iters=10, decay=0.4, learning_rate=1.0)
    rates = [rate_at(step, s) for step in range(100)]
    assert rates[0] < 0.1 and rates[10:60] == [1.0] * 50 and 0 < rates[-1] < 0.05
    assert all(a >= b for a, b in zip(rates[60:], rates[61:]))


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 40, 24), (2, 24, 64), (2, 128, 300),
                                   (1, 136, 300), (2, 400, 150)])
def test_singular_values_are_moved_to_about_one(shape):
    """Against the polynomial of the singular values themselves, in float64."""
    for seed in range(20):
        scale = 10.0 ** (seed % 7 - 3)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
        few = seed % 2 == 1
        if few:  # of the directions carry nearly all, as in a momentum
            x[:, :, 8:] *= 1e-3
        u, values, v = torch.linalg.svd(x.double(), full_matrices=False)
        values = values / values.square().sum(1, keepdim=True).sqrt()
        for a, b, c in POLYNOMIALS:
            values = a * values + b * values**3 + c * values**5
        expected = u * values[:, None] @ v
        for kind, off in ((torch.float64, 1e-9), (torch.float32, 1e-3), (torch.bfloat16, 0.2)):
            found = equalize(x.to(kind))
            assert found.dtype == kind and (found - expected).norm() < off * expected.norm()
        values = torch.linalg.svdvals(equalize(x))
        assert few or 0.6 < values.median() < 1.7 and 0.1 < values.min() and values.max() < 2


@pytest.mark.parametrize(
    "heads, width, hidden, blocks",
    [
        (4, 16, 24, {}),
        (3, 138, 150, {"qkv": 4, "out": 2, "up": 3, "down": 2}),  # of 104, 69, 100 and 69 rows
    ],
)
def test_muon_moves_the_matrices_of_the_blocks_and_adamw_the_rest(heads, width, hidden, blocks):
    torch.manual_seed(0)
    model = GPT(GPTConfig(50, 16, 2, heads, heads, width, hidden, token_shift=True, qk_norm=True))
    twin = copy.deepcopy(model)
    optimizer = make_optimizer(model, Settings(learning_rate=0.02, weight_decay=0.3))
    adamw = dict(betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    plain = torch.optim.AdamW(twin.parameters(), lr=0.02, **adamw)
    parameters = dict(model.named_parameters())
    ends = ".qkv.weight", ".out.weight", ".up.weight", ".down.weight"
    matrices = {name for name in parameters if name.endswith(ends)}
    moved = [group["params"] for group in optimizer.param_groups if group["muon"]]
    assert {id(p) for group in moved for p in group} == {id(parameters[name]) for name in matrices}
    momentum = {}
    for _ in range(4):
        before = {name: p.clone() for name, p in model.named_parameters()}
        grads = {}
        for (name, p), q in zip(model.named_parameters(), twin.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = grads[name] = p.grad.clone()
        optimizer.step()
        plain.step()
        for (name, p), q in zip(model.named_parameters(), twin.parameters()):
            if name not in matrices:
                assert torch.equal(p, q)
                continue
            momentum[name] = 0.95 * momentum.get(name, 0.0) + 0.05 * grads[name]
            push = 0.05 * grads[name] + 0.95 * momentum[name]
            # Large matrices in blocks of rows, of which the last may have fewer.
            cut = push.chunk(blocks.get(name.split(".")[-2], 1))
            size = 0.02 * 0.1 * max(cut[0].shape) ** 0.5
            push = torch.cat([equalize(part[None])[0] for part in cut])
            expected = before[name] * (1 - 0.02 * 0.3) - size * push
            assert (p - expected).norm() < 0.01 * (expected - before[name]).norm()
    for s in (Settings(muon=False), Settings(init_from="x")):
        assert not any(group["muon"] for group in make_optimizer(model, s).param_groups)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_trains_and_resumes_to_the_bit(tmp_path, name):
    s = dict(TINY, mask=name, max_iters=24)
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def stop(run, loss):
        if run.step == 22:
            raise Stopped

    metrics = train(Settings(**s, out_dir=str(whole)))
    with pytest.raises(Stopped):
        train(Settings(**s, out_dir=str(parts)), watch=stop)
    assert load_checkpoint(parts / "ckpt.pt")["step"] == 20
    resumed = train(Settings(**s, out_dir=str(parts), resume=True))
    assert resumed["loss"] == metrics["loss"]
    a, b = (load_checkpoint(out / "ckpt.pt")["model"] for out in (whole, parts))
    assert all(torch.equal(a[key], b[key]) for key in a)
    written = json.loads((whole / "metrics.json").read_text())
    assert set(written["accuracy"]) and all(0 <= x <= 1 for x in written["accuracy"].values())
    tables = {"accuracy", "accuracy_by_turn", "accuracy_by_kind", "accuracy_new_words"}
    assert set(written) == tables | {"reported_on", "loss", "seconds", "settings", "parameters"}


class Unsavable:
    """Is interrupted in the midst of being saved."""

    def __reduce__(self):
        raise KeyboardInterrupt


def test_a_checkpoint_is_written_whole_or_not_at_all(trained, tmp_path):
    path, state = tmp_path / "ckpt.pt", load_checkpoint(trained / "ckpt.pt")
    save_checkpoint(path, **state)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, **{**state, "step": 7, "tokenizer": Unsavable()})
    assert load_checkpoint(path)["step"] == state["step"] and list(tmp_path.iterdir()) == [path]


def test_a_mask_of_ones_own_trains_and_chats(tmp_path, monkeypatch):
    """A mask is one function: here an ISM with a limited look-ahead."""

    def near(segments):
        return torch.minimum(MASKS["ism"](segments), MASKS["causal"](segments) + 3)

    monkeypatch.setitem(MASKS, "near", near)
    train(Settings(**TINY, mask="near", max_iters=10, out_dir=str(tmp_path)))
    for dtype in ("auto", "int8"):
        chat = load_chat(tmp_path / "ckpt.pt", "cpu", dtype, max_new_tokens=5)
        assert isinstance(chat.send("Hello!"), str)


def test_some_families_alone(tmp_path, capsys):
    s = dict(TINY, max_iters=2, out_dir=str(tmp_path))
    metrics = train(Settings(**s, families="follow-up,reasoning"))
    assert set(metrics["accuracy"]) == {"follow-up", "reasoning", "mixed", "the four patterns"}
    metrics = train(Settings(**s, families="follow-up"))
    assert set(metrics["accuracy"]) == {"follow-up", "the four patterns"}
    assert metrics["accuracy_new_words"] == {}
    report(metrics)
    assert "never trained on" not in capsys.readouterr().out


def introduction(i):
    """A short dialogue of facts and questions, a list of (query, answer)."""
    rng = random.Random(i)
    name, city = rng.choice(NAMES), rng.choice(CITIES)
    questions = [
        ("What is my name?", f"Your name is {name}."),
        ("Where do I live?", f"You live in {city}."),
    ]
    rng.shuffle(questions)
    told = f"My name is {name} and I live in {city}.", f"Noted. Your name is {name}."
    return [told, *questions]


def test_end_to_end(tmp_path):
    """The commands: train until held-out questions are answered, then chat."""
    trained = [introduction(i) for i in range(2000)]
    lines = []
    for turns in trained:
        messages = []
        for query, answer in turns:
            messages.append({"role": "user", "content": query})
            messages.append({"role": "assistant", "content": answer})
        lines.append(json.dumps({"messages": messages}))
    path = write_lines(tmp_path / "chats.jsonl", lines)
    sizes = "--n_layer 2 --n_embd 64 --n_head 4 --block_size 128".split()
    flags = "--max_iters 300 --eval_interval 1000 --device cpu".split()
    files = "--data", path, "--out_dir", str(tmp_path)
    done = run("train.py", *files, *sizes, *flags)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "metrics.json").read_text())["accuracy"]["chats"] > 0.8
    new = [turns for turns in map(introduction, range(2000, 2020)) if turns not in trained][:2]
    right = 0
    for turns in new:
        prompts = [f"--prompt={query}" for query, _ in turns]
        done = run("sample.py", "--ckpt", str(tmp_path / "ckpt.pt"), "--device", "cpu", *prompts)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[::2] == [f"> {query}" for query, _ in turns]
        right += [line == answer for line, (_, answer) in zip(lines[1::2], turns)].count(True)
    assert right >= 4  # of 6
