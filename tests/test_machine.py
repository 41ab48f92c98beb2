"""Machines that are not ours: other devices and dtypes, no compiler, no torchrun."""

import importlib.util
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from helpers import TOKENIZER, OnCpu, check_cache, exact_attention, fails, tiny

import model as model_module
from data import machine
from data.machine import check_compiler, pick_device, pick_dtype
from mask import MASKS
from model import GPT, Cache, GPTConfig, Replay, fastest_attention
from sample import Chat
from train import to_device, train


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A CUDA card with Triton and a compiler, by what torch says of it; nothing is compiled."""
    told = {"capability": (9, 0), "triton": object(), "cc": "/usr/bin/cc", "header": str(tmp_path)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: told["capability"])
    monkeypatch.setattr(model_module.importlib.util, "find_spec", lambda name: told["triton"])
    monkeypatch.setattr(model_module.shutil, "which", lambda name: told["cc"])
    monkeypatch.setattr(model_module.sysconfig, "get_paths", lambda: {"include": told["header"]})
    monkeypatch.setattr(model_module, "compiled_flex", lambda: None)
    tmp_path.joinpath("Python.h").touch()
    model_module.has_triton.cache_clear()
    yield told
    model_module.has_triton.cache_clear()


@pytest.mark.parametrize(
    "lacks", [{}, {"triton": None}, {"capability": (7, 5)}, {"cc": None}, {"header": "/nowhere"}]
)
def test_without_triton_long_masks_go_to_sdpa(card, capsys, lacks):
    card.update(lacks)
    torch.manual_seed(0)
    f = torch.randint(1, 1025, (1, 1024))
    q, k, v = torch.randn(3, 1, 2, 1024, 16).unbind()
    with OnCpu(), torch.no_grad():
        attend = [fastest_attention(f, 1024, torch.device("cuda")) for _ in range(3)][0]
        by_blocks = attend.func is model_module.attend_by_blocks
        assert by_blocks == (not lacks)
        if lacks:
            y = attend(q, k, v)
            assert torch.allclose(y, exact_attention(q, k, v, f), atol=1e-5)
    assert capsys.readouterr().out.count("long masks go to SDPA") == bool(lacks)


@pytest.mark.parametrize("D", [2, 10, 12, 14])
def test_no_compiled_kernel_for_heads_that_it_does_not_take(D):
    def refuse(*_, **__):
        raise AssertionError("a compiled kernel")

    torch.manual_seed(0)
    f = torch.randint(1, 41, (2, 40))
    q, k, v = torch.randn(2, 4, 40, D), torch.randn(2, 2, 40, D), torch.randn(2, 2, 40, D)
    y = model_module.attend_by_blocks(q, k, v, f, None, refuse)
    assert torch.allclose(y, exact_attention(q, k, v, f), atol=1e-5)


@pytest.mark.parametrize("head_size", [2, 6, 10, 12, 18])
def test_any_even_head_size_trains_and_chats(head_size):
    config = GPTConfig(TOKENIZER.vocab_size, 96, 2, 2, 1, 2 * head_size, 24, token_shift=True)
    torch.manual_seed(0)
    model = GPT(config)
    tokens = torch.randint(0, 500, (2, 30))
    for mask in MASKS.values():
        f = mask(torch.randint(1, 6, (2, 30)).sort(1).values)
        loss = model(tokens, f).logsumexp(-1).sum()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        chat = Chat(model, TOKENIZER, mask, max_new_tokens=5)
        chat.send("hi")
        check_cache(chat)
    with torch.no_grad():
        cache = Cache(config)
        replay = Replay(model, cache)
        steps = torch.stack([replay(int(token)) for token in tokens[0]])
        assert torch.allclose(steps, model(tokens[:1])[0], atol=1e-4)


@pytest.mark.parametrize("capability, dtype", [
    ((6, 1), torch.float32), ((7, 0), torch.float32), ((7, 5), torch.float32),  # P, V100, T4
    ((8, 0), torch.bfloat16), ((8, 9), torch.bfloat16), ((9, 0), torch.bfloat16),
    ((12, 0), torch.bfloat16),
])
def test_auto_takes_no_bfloat16_by_emulation(monkeypatch, card, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    card["capability"] = capability
    assert pick_dtype("auto", torch.device("cuda")) == dtype
    assert pick_dtype("bfloat16", torch.device("cuda")) == torch.bfloat16  # who asks gets it


def test_the_chosen_device_is_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    for name in ("cuda:1", "cuda", "auto", "cpu"):
        pick_device(name)
    assert chosen == ["cuda:1", "cuda:0", "cuda:0"]
    for name in ("cpu:x", "cpu:0", "cuda:2", "cuda:x", "", "tpu"):
        said = fails(pick_device, name)
        assert said == f"--device {name} is not on this machine; there is cuda:0, cuda:1, cpu"


def some_f(rng, n, S):
    """A random f (1, n), now and then one of those that have a way of their own."""
    return rng.choice((
        torch.randint(1, S + 1, (1, n)), torch.arange(S - n + 1, S + 1)[None],
        torch.full((1, n), S), MASKS["ism"](torch.randint(1, 9, (1, n)).sort().values),
    ))


def test_on_mps_there_is_the_plain_attention_alone(monkeypatch):
    """Its fused kernels give wrong numbers for views and masks, and its late copies too."""
    def fused(*_, **__):
        raise AssertionError("a fused kernel")

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto").type == "cpu" and pick_device("mps").type == "mps"
    mps, rng = torch.device("mps"), random.Random(0)
    assert pick_dtype("auto", mps) == torch.float32
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    monkeypatch.setattr(model_module, "flex_attention", fused)
    torch.manual_seed(0)
    for _ in range(60):
        n = rng.randint(1, 40)
        S = n + rng.choice((0, rng.randint(0, 300)))
        f = some_f(rng, n, S)
        H, Hkv = rng.choice(((2, 1), (2, 2)))
        q, k, v = torch.randn(1, H, n, 8), torch.randn(1, Hkv, S, 8), torch.randn(1, Hkv, S, 8)
        with OnCpu(), torch.set_grad_enabled(rng.random() < 0.5):
            y = fastest_attention(f, S, mps)(q, k, v)
        assert torch.allclose(y, exact_attention(q, k, v, f), atol=1e-5)
    with OnCpu() as asked:
        for device in (mps, torch.device("cuda")):
            to_device(device, torch.zeros(2, 3), torch.arange(3), torch.arange(3))
    assert [copy["non_blocking"] for copy in asked.copies] == [False] * 3 + [True] * 3


def test_threads_without_a_core_each_are_told():
    for threads in (2, 8):
        assert machine.crowded(10, 9.9 * threads, threads) == ""
        line = machine.crowded(10, 6.6 * threads, threads)
        assert f"{threads} threads had 66%" in line
        assert "OMP_NUM_THREADS=1" in line
    # One thread waits for none, so there is nothing to advise.
    assert machine.crowded(10, 3.3, 1) == ""


def test_to_compile_without_a_compiler_is_one_line(tmp_path, card):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    check_compiler(cuda), check_compiler(cpu)
    card["triton"] = None
    assert "needs Triton" in fails(check_compiler, cuda)
    check_compiler(cpu)
    card["cc"] = None
    assert "needs a C++ compiler (g++ or clang++)" in fails(train, tiny(tmp_path, compile=True))


def test_variables_of_torchrun_are_numbers_or_as_if_unset(monkeypatch):
    for value, number in (("", 1), ("12", 12)):
        monkeypatch.setenv("WORLD_SIZE", value)
        machine.check_torchrun()
        assert machine.from_torchrun("WORLD_SIZE", 1) == number
    for value in ("x", "-1", "1.5", " "):
        monkeypatch.setenv("WORLD_SIZE", value)
        how = "torchrun sets a number here; unset it to run without torchrun"
        assert fails(machine.check_torchrun) == f"WORLD_SIZE={value}: {how}"
        assert machine.from_torchrun("WORLD_SIZE", 1) == 1  # an import ends no process
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    spec = importlib.util.spec_from_file_location("fresh", ROOT / "data" / "machine.py")
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert (fresh.WORLD, fresh.RANK, fresh.LOCAL_RANK) == (1, 0, 0)
