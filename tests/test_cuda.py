"""What a CUDA device would refuse or wait for, found without one: layouts, looks, shapes."""

import functools
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from helpers import TOKENIZER, VARIANTS, OnCpu, decoded, make_model, random_dialogue
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_module
import sample as sample_module
from data.machine import clock
from mask import causal, dense, ism
from model import (
    FLEX_FROM,
    GPT,
    GPTConfig,
    Replay,
    attend_by_blocks,
    block_mask,
    compile_blocks,
    fastest_attention,
    recompute_blocks,
    rope_tables,
    sdpa,
)

META = torch.device("meta")


class Watched(TorchDispatchMode):
    """An operation between two devices is an error, but for a copy to META: a GPU would wait."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        given, made = ({x.device.type for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}
                       for tree in ((args, kwargs), result))
        # x[at] = 2.0 makes one of these, on CUDA by a copy.
        assert operation is not torch.ops.aten.scalar_tensor.default
        assert not given or len(given) == 1 and made <= given | {"meta"}, (operation, given, made)
        return result


@pytest.fixture
def watched():
    """The device META has no numbers: who looks at one of its tensors gets an error."""
    with Watched():
        yield


def meta_model(options, dtype=torch.bfloat16):
    config = GPTConfig(TOKENIZER.vocab_size, 1500, 2, 4, n_embd=64, n_hidden=64, **options)
    with META:
        model = GPT(config).to(dtype).eval()
        model.cos, model.sin = rope_tables(config)
    model.choose_attention = fastest_attention
    return model


def test_looks_and_strangers_are_found(watched):
    x, at = torch.zeros(3, device=META), torch.tensor([1], device=META)
    x.index_fill_(0, at, 2.0)
    wrong = (
        lambda: float(x.sum()), lambda: x.cpu(), lambda: x.nonzero(), lambda: x + torch.zeros(3),
        lambda: x.__setitem__(at, 2.0),
    )
    for function in wrong:
        with pytest.raises((AssertionError, RuntimeError)):
            function()


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_a_chat_looks_at_a_gpu_once_a_token(watched, monkeypatch, options):
    model = meta_model(options)
    looked = []

    def look(logits, *_):
        assert logits.device == META and logits.shape == (TOKENIZER.vocab_size,)
        looked.append(logits)
        return TOKENIZER.end if len(looked) % 9 == 0 else 7

    def read_one(token):
        replay.cache.length += 1
        return replay.step(128)

    monkeypatch.setattr(sample_module, "sample", look)
    monkeypatch.setattr(sample_module, "clock", lambda device: 0.0)
    chat = sample_module.Chat(model, TOKENIZER, ism)
    replay = Replay(model, chat.cache)
    chat.read_one = read_one
    chat.send("My name is Anna.")
    chat.send("What is my name?")
    assert len(looked) == 18


def other_layout(function):
    """SDPA that lays its result out as (B, n, H, D), as the memory-efficient kernel does."""
    def sdpa(*args, **kwargs):
        return function(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    return sdpa


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_kernel_may_lay_its_result_out_as_it_likes(monkeypatch, variant):
    tokens, segments = random_dialogue(random.Random(0), turns=8)
    f, model = ism(segments), make_model(variant)
    model.choose_attention = fastest_attention
    expected = model(tokens, f)[0]  # (T, V)
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", other_layout(F.scaled_dot_product_attention))
    for got in (decoded(model, tokens, f), model(tokens, f)[0]):
        assert torch.allclose(got, expected, atol=1e-5 * float(expected.abs().max()))


def test_few_rows_never_go_to_flex_attention(monkeypatch):
    monkeypatch.setattr(model_module, "has_triton", lambda: True)
    monkeypatch.setattr(model_module, "compiled_flex", lambda: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(model_module, "upload", lambda x, device: x)
    with OnCpu():
        for n, S in itertools.product((1, 3, 127, 128, 129, 1000), (1023, 1024, 1500)):
            f = torch.ones(1, n, dtype=torch.long)
            attend = fastest_attention(f, S, torch.device("cuda"))
            assert (attend.func is attend_by_blocks) == (S >= FLEX_FROM and n >= 128)


@torch.no_grad()
def test_float32_has_a_fused_kernel_for_grouped_heads(monkeypatch):
    """No fused kernel of CUDA has enable_gqa in float32, nor with a mask."""
    asked = []
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, k, v, seen=None, **how: asked.append((k.shape[1], how)) or q)
    with FakeTensorMode():
        for dtype in (torch.float32, torch.bfloat16):
            q, k = (torch.zeros(1, h, 9, 16, dtype=dtype, device="cuda:0") for h in (4, 2))
            sdpa(q, k, k, causal=True)
    assert [(heads, how["enable_gqa"]) for heads, how in asked] == [(4, False), (2, True)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_compile_whole(monkeypatch, checkpointing):
    """Four shapes under three attentions: no break, few graphs, within the limit, the same loss."""
    counter = CompileCounter()
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True))
    monkeypatch.setattr(model_module, "short", lambda S: False)
    torch._dynamo.reset()
    model, plain = make_model("llama", n_layer=2), make_model("llama", n_layer=2)
    for m in (model, plain):
        m.choose_attention = fastest_attention
    compile_blocks(model)
    if checkpointing:
        recompute_blocks(model)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for B, T in ((2, 40), (3, 33), (4, 64), (5, 17)):
            tokens = torch.randint(0, 50, (B, T))
            segments = (torch.arange(T) // 5 + 1).expand(B, T)
            for f in (causal(segments), ism(segments), torch.full((B, T), T)):
                losses = [m(tokens, f).logsumexp(-1).sum() for m in (model, plain)]
                assert torch.allclose(*losses)
                losses[0].backward()
    assert 3 <= counter.frame_count <= 12
    torch._dynamo.reset()


@torch.no_grad()
def test_long_masks_compile_whole(monkeypatch):
    """FlexAttention within a compiled block, as --compile has it, by a backend that runs it."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    f = ism((torch.arange(300) // 7 + 1)[None])
    q, k, v = torch.randn(3, 1, 2, 300, 16).unbind()
    flex = model_module.compiled(flex_attention)
    attend = functools.partial(attend_by_blocks, f=f, mask=block_mask(f, 300), flex=flex)
    whole = torch.compile(lambda q, k, v: attend(q, k, v) + 1, fullgraph=True)
    assert torch.allclose(whole(q, k, v), sdpa(q, k, v, dense(f)[:, None]) + 1, atol=1e-5)


def test_two_chats_on_one_model_are_two():
    """Each has its own cache: their answers are those that each would have alone."""
    said = ["My name is Anna.", "I live in Rome."], ["My name is Bob.", "I live in Oslo."]
    config = GPTConfig(TOKENIZER.vocab_size, 200, 2, 2, 1, 32, 32)
    torch.manual_seed(0)
    model = GPT(config)

    def new():
        chat = sample_module.Chat(model, TOKENIZER, ism, max_new_tokens=6)
        chat.read_one = Replay(model, chat.cache)
        return chat

    alone = [[chat.send(text) for text in texts] for chat, texts in zip((new(), new()), said)]
    chats, together = (new(), new()), ([], [])
    for texts in zip(*said):
        streams = [chat.stream(text) for chat, text in zip(chats, texts)]
        pieces = list(itertools.zip_longest(*streams, fillvalue=""))
        for answers, own in zip(together, zip(*pieces)):
            answers.append("".join(own))
    assert list(together) == alone and alone[0] != alone[1]


def test_times_are_read_when_the_device_is_done(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append("cuda"))
    before = clock(torch.device("cuda"))
    assert waits == ["cuda"] and clock(torch.device("cpu")) >= before and waits == ["cuda"]
    monkeypatch.setattr(sample_module, "clock", lambda device: waits.append(device) or 1.0)
    model = GPT(GPTConfig(TOKENIZER.vocab_size, 99, 1))
    chat = sample_module.Chat(model, TOKENIZER, ism, max_new_tokens=2)
    chat.send("hi")
    assert waits[1:] == [chat.device] * 3  # before a turn, when the query is read, at the end
