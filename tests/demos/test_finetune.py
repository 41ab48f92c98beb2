"""From a checkpoint folder to a fine-tuned one.

Parts of a batch, checkpointing, annealing, LoRA, saving.
"""

import copy
import json
import random
import shutil
import weakref

import pytest
import torch
from helpers import (
    TINY,
    VARIANTS,
    make_folder,
    make_model,
    random_chats,
    random_dialogue,
    run,
    write_lines,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample as sample_module
import train as train_module
from data.checkpoint import load_checkpoint
from data.hf import from_pretrained, load_tokenizer, save_pretrained
from demos.finetune import LINEAR, Finetune, add_lora, finetune, merge_lora
from mask import MASKS, annealed, causal, loss_positions
from model import GPT, GPTConfig, recompute_blocks
from sample import load_chat
from train import Settings, mask_at, train

SMALL = dict(TINY, eval_interval=1000)
SIZES = dict(vocab_size=50, block_size=96, n_head=4, n_embd=32, n_hidden=48)


@pytest.fixture
def chats(tmp_path, monkeypatch):
    import data.loader

    monkeypatch.setattr(data.loader, "CACHE", tmp_path / "cache")
    return write_lines(tmp_path / "chats.jsonl", random_chats(60, 3))


def losses(**settings):
    """The loss of each step of a run."""
    seen = []
    train(Settings(**settings), watch=lambda run, loss: seen.append(loss))
    return torch.stack(seen)


@pytest.mark.parametrize("mask", MASKS)
def test_parts_add_up_to_the_batch(tmp_path, chats, mask):
    """20 steps in 1, 2, 3 and more parts than there are rows: the same losses and weights."""
    s = dict(SMALL, data=chats, mask=mask, max_iters=20, out_dir=str(tmp_path))
    whole = losses(**s)
    weights = load_checkpoint(tmp_path / "ckpt.pt")["model"]
    for parts in (2, 3, 50):
        assert (losses(grad_accum=parts, **s) - whole).abs().max() < 1e-5
        other = load_checkpoint(tmp_path / "ckpt.pt")["model"]
        # Not closer: Adam divides by what may be small.
        assert all((weights[name] - other[name]).abs().max() < 1e-3 for name in weights)


def gradients_of(model, tokens, f):
    model.zero_grad()
    loss = model(tokens, f).float().square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and their peak."""

    def __init__(self, *there):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, weakref.WeakKeyDictionary()
        self.count(there)

    def count(self, tensors):
        for t in tree_leaves(tensors):
            if not isinstance(t, torch.Tensor):
                continue
            storage = t.untyped_storage()
            if storage in self.known:
                continue
            self.known[storage] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.live)

    def free(self, n):
        self.live -= n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count(out)
        return out


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_changes_nothing_but_the_memory(variant, dtype):
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=6, **SIZES, **VARIANTS[variant]))
    rng = random.Random(1)
    twin = copy.deepcopy(model)
    recompute_blocks(twin)
    for number in range(6):
        tokens, segments = (row.repeat(20, 1) for row in random_dialogue(rng))
        f = list(MASKS.values())[number % len(MASKS)](segments)
        results, peaks = [], []
        for each in (model, twin):
            autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
            with Live(*each.parameters()) as live, autocast:
                results.append(gradients_of(each, tokens, f))
            peaks.append(live.peak)
            each.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(*results))
        assert tokens.shape[1] < 20 or peaks[1] < 0.7 * peaks[0]
        with torch.no_grad():
            assert torch.equal(model(tokens, f), twin(tokens, f))


@pytest.mark.parametrize("name", MASKS)
def test_an_annealed_mask_lies_between_and_does_not_leak(name):
    rng, mask = random.Random(2), MASKS[name]
    model = make_model()
    for _ in range(30):
        tokens, segments = random_dialogue(rng)
        shares = [0, *sorted(rng.random() for _ in range(3)), 1]
        steps = [annealed(mask, share)(segments) for share in shares]
        assert torch.equal(steps[0], causal(segments)) and torch.equal(steps[-1], mask(segments))
        assert all((a <= b).all() for a, b in zip(steps, steps[1:]))
        f = rng.choice(steps)
        at = loss_positions(segments, f)[0].nonzero()[:, 0].tolist()
        at_the_end = loss_positions(segments, mask(segments))[0].nonzero()[:, 0].tolist()
        assert set(at_the_end) <= set(at)
        if at:
            j = rng.choice(at)
            changed = tokens.clone()
            changed[0, j + 1 :] = (changed[0, j + 1 :] + 1) % 50
            with torch.no_grad():
                assert torch.equal(model(tokens, f)[0, j], model(changed, f)[0, j])


def test_annealing_begins_causal_and_ends_as_the_mask(tmp_path, chats):
    s = dict(SMALL, data=chats, max_iters=4, out_dir=str(tmp_path))
    one = {name: losses(**s, mask=name)[0] for name in ("causal", "ism")}
    first = losses(**s, mask="ism", anneal=2)
    assert first[0] == one["causal"] != one["ism"]
    masks = [mask_at(step, Settings(**s, mask="ism", anneal=2)) for step in range(4)]
    assert [mask is MASKS["ism"] for mask in masks] == [False, False, True, True]


def test_lora_starts_as_nothing_and_merges_to_the_same(tmp_path):
    rng = random.Random(3)
    for number in range(12):
        torch.manual_seed(number)
        model = GPT(GPTConfig(n_layer=2, **SIZES, **rng.choice(list(VARIANTS.values()))))
        tokens, segments = random_dialogue(rng)
        f = MASKS["ism"](segments)
        names, before = list(model.state_dict()), model(tokens, f)
        add_lora(model, 4, 8.0)
        assert torch.equal(model(tokens, f), before)
        merge_lora(model)
        add_lora(model, rng.randint(1, 8), rng.choice((1.0, 16.0)))
        for name, p in model.named_parameters():
            if name.endswith(".B"):  # as if trained
                torch.nn.init.normal_(p, std=0.1)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert len(trained) == 2 * 2 * len(LINEAR)
        assert all(name.endswith((".A", ".B")) for name in trained)
        tuned = model(tokens, f)
        gradients_of(model, tokens, f)
        assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
        assert (tuned - before).abs().max() > 1e-3
        merge_lora(model)
        assert list(model.state_dict()) == names and (model(tokens, f) - tuned).abs().max() < 1e-4


FAST = dict(max_iters=6, batch_size=2, block_size=64, device="cpu", dtype="float32",
            learning_rate=1e-2, warmup_iters=0)


def test_train_from_a_folder(tmp_path, chats):
    """The weights and the tokenizer are the folder's.

    What comes out chats, also from another place and without the folder.
    """
    folder, out = make_folder(tmp_path / "folder"), tmp_path / "out"
    start = from_pretrained(folder, 64).state_dict()
    s = dict(FAST, data=chats, init_from=str(folder), out_dir=str(out))
    train(Settings(**{**s, "learning_rate": 1e-9}))
    state = load_checkpoint(out / "ckpt.pt")
    assert all((state["model"][name] - p).abs().max() < 1e-6 for name, p in start.items())
    assert state["tokenizer"] == load_tokenizer(folder).identity
    train(Settings(**s))
    whole = load_checkpoint(out / "ckpt.pt")["model"]
    assert any((whole[name] - p).abs().max() > 1e-3 for name, p in start.items())
    train(Settings(**{**s, "max_iters": 8}, resume=True))

    def answer(path):
        return load_chat(path, "cpu", "float32", max_new_tokens=8).send("hello 5")

    said = answer(out / "ckpt.pt")
    shutil.move(out, tmp_path / "moved")
    shutil.rmtree(folder)
    assert answer(tmp_path / "moved" / "ckpt.pt") == said


@pytest.mark.parametrize("options", [
    {}, {"lora": False}, {"dtype": "bfloat16"},
    {"checkpointing": True, "grad_accum": 2, "anneal": 3},
])
def test_finetune_writes_a_folder(tmp_path, chats, options, monkeypatch, capsys):
    """What is saved is what was trained, and it chats.

    The loss on the held-out chats is that of the folder, read again.
    """
    folder, out = make_folder(tmp_path / "folder"), tmp_path / "out"
    s = {**FAST, "data": chats, "init_from": str(folder), **options}
    monkeypatch.setattr(train_module, "FIRST_SAVE", 0.0)
    metrics = finetune(Finetune(**s, out_dir=str(out)))
    told = "".join(capsys.readouterr())
    # What ckpt.pt holds of a model with LoRA cannot be chatted with.
    assert ("chat with it so far" in told) == (not options.get("lora", True))
    assert "model.py was changed" not in told
    dtype = getattr(torch, s["dtype"])
    before = from_pretrained(folder, dtype=dtype).state_dict()
    after = from_pretrained(out, dtype=dtype).state_dict()
    differ = [name for name in before if not torch.equal(before[name], after[name])]
    changed = {name.split(".", 2)[-1] for name in differ}
    linear = {"attention.qkv.weight", "attention.out.weight", "mlp.up.weight", "mlp.down.weight"}
    if options.get("lora", True):
        assert changed == linear
    else:
        assert changed > linear
    as_it_is = {**FAST, "dtype": s["dtype"], "learning_rate": 1e-12, "max_iters": 1}
    paths = dict(data=chats, init_from=str(out), out_dir=str(tmp_path / "again"))
    again = train(Settings(**as_it_is, **paths))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    assert abs(again["loss"] - metrics["loss"]) < tolerance
    assert json.loads((out / "config.json").read_text())["dtype"] == s["dtype"]
    assert isinstance(load_chat(out, "cpu", max_new_tokens=8).send("hello 5"), str)


@pytest.mark.parametrize("mask", MASKS)
def test_a_folder_knows_its_mask(tmp_path, chats, mask):
    """What was fine-tuned under a mask is chatted with under it; without a word it is causal."""
    folder, out = make_folder(tmp_path / "folder"), tmp_path / "out"
    assert load_chat(folder, "cpu").mask is MASKS["causal"]
    s = {**FAST, "max_iters": 1, "data": chats, "init_from": str(folder), "out_dir": str(out)}
    finetune(Finetune(**s, mask=mask))
    assert load_chat(out, "cpu").mask is MASKS[mask]
    assert load_chat(out, "cpu", mask="prefix").mask is MASKS["prefix"]
    # What is said of the mask stays, if nothing else is.
    save_pretrained(from_pretrained(out), out, tmp_path / "again")
    assert load_chat(tmp_path / "again", "cpu").mask is MASKS[mask]
    config = json.loads((out / "config.json").read_text())
    for wrong in ("lower", 5, ["ism"]):
        (out / "config.json").write_text(json.dumps({**config, "nanoism_mask": wrong}))
        with pytest.raises(ValueError, match="mask.py does not have; it has causal, prefix, ism"):
            load_chat(out, "cpu")


def test_lora_resumes_to_the_bit(tmp_path, chats):
    folder = make_folder(tmp_path / "folder")
    s = dict(FAST, data=chats, init_from=str(folder))
    finetune(Finetune(**s, out_dir=str(tmp_path / "whole")))
    original = train_module.rate_at
    train_module.rate_at = lambda step, t: original(step, Settings(**{**FAST, "max_iters": 6}))
    try:
        finetune(Finetune(**{**s, "max_iters": 3}, out_dir=str(tmp_path / "parts")))
        finetune(Finetune(**s, out_dir=str(tmp_path / "parts"), resume=True))
    finally:
        train_module.rate_at = original
    whole, parts = (tmp_path / name / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_commands(tmp_path, chats, last_words):
    folder, out = make_folder(tmp_path / "folder"), str(tmp_path / "out")
    sizes = "--max_iters 3 --batch_size 2 --block_size 64 --device cpu".split()
    flags = ("--init_from", str(folder), "--data", chats, "--out_dir", out, *sizes)
    done = run("demos/finetune.py", *flags)
    assert done.returncode == 0 and f"--ckpt {out}" in done.stdout, done.stderr
    short = "--device cpu --max_new_tokens 5".split()
    done = run("sample.py", "--ckpt", out, "--prompt", "hello 3", *short)
    assert done.returncode == 0 and done.stdout.startswith("> hello 3"), done.stderr
    for module, arguments, words in (
        (train_module, ("--init_from", "no-such"), "no-such/config.json cannot be read"),
        (train_module, flags, "holds a model, model.safetensors; name another"),
        (train_module, (*flags, "--block_size", "999", "--resume"), "999 are asked for"),
        (sample_module, ("--ckpt", f"{out}/ckpt.pt"), "the model beside it is whole: --ckpt"),
    ):
        assert words in last_words(module, *arguments)
