"""What a reader changes above the lines is what runs: when it trains, is tested, reads, writes."""

import functools
import random
import sys

import pytest
import torch
from conftest import ROOT
from helpers import LINE, TINY, load, source

import train
from data.tokenizer import Tokenizer
from mask import ism

# A name for the edit: (what stands in model.py, what a reader writes instead).
MODEL = {
    "no mask": ("masked_fill(hidden, -torch.inf)", "masked_fill(hidden, 0)"),
    "no scale": ("q = q / q.shape[-1] ** 0.5", "q = q * 1.0"),
    "soft-capped scores": ("weights = scores", "weights = (4 * torch.tanh(scores / 4))"),
    "a bias of distances": ("return lambda q, k, v: attention(q, k, v, bias)",
        "return lambda q, k, v: attention(q, k, v, bias + (0.1 * torch.arange(S)).to(device))"),
    "a sink": ("weights = scores.softmax(-1)",
        "weights = F.pad(scores, (1, 0)).softmax(-1)[..., 1:]"),
    "a window of 16": ("hidden = ~dense(f, S)",
        "hidden = ~dense(f, S) | dense(torch.arange(S - f.shape[1], S)[None] - 15, S)"),
    "a window of 200": ("hidden = ~dense(f, S)",
        "hidden = ~dense(f, S) | dense(torch.arange(S - f.shape[1], S)[None] - 199, S)"),
    "dropout of weights": ("return weights @ v", "return F.dropout(weights, 0.1) @ v"),
    "dropout in a norm": ("return F.rms_norm(x,", "return F.rms_norm(F.dropout(x, 0.1, "
        "self.training),"),
    "dropout in a block": ("return x + self.mlp(self.norm2(x))",
        "return x + F.dropout(self.mlp(self.norm2(x)), 0.1, self.training)"),
    "a norm of zero": ("return F.rms_norm(", "return 0 * F.rms_norm("),
    "a norm of (1 + weight)": ("* self.weight.to(x.dtype)", "* (1 + self.weight.to(x.dtype))"),
    "another epsilon": ("eps=self.eps)", "eps=1e-2)"),
    "a norm by the mean": ("return F.rms_norm(x, x.shape[-1:], eps=self.eps)",
        "return x / (x.abs().mean(-1, keepdim=True) + self.eps)"),
    "a norm in the table replaced": ("self.norm1 = RMSNorm(config.n_embd, config.norm_eps)",
        "self.norm1 = nn.LayerNorm(config.n_embd)"),
    "torch's norm of heads": ("self.q_norm = RMSNorm(D, config.norm_eps)",
        "self.q_norm = nn.LayerNorm(D)"),
    "no shift": ("x = torch.addcmul(x, past[:, start : start + n], share)", "pass"),
    "a shift of one": ("REACH = 3", "REACH = 1"),
    "a shift by lerp": ("torch.addcmul(x, past[:, start : start + n], share)",
        "torch.lerp(x, past[:, start : start + n], share)"),
    "a shift of what is shifted": ("start = self.REACH - back", "start = self.REACH - 1"),
    "no rotation": ("return torch.addcmul(x * cos, swapped, sin)", "return x"),
    "a part is rotated": ("return torch.addcmul(x * cos, swapped, sin)",
        "y = torch.addcmul(x * cos, swapped, sin)\n    return torch.cat([y[..., :2], x[..., 2:]],"
        " -1)"),
    "other pairs": ("swapped = x.roll(x.shape[-1] // 2, -1)",
        "swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)"),
    "other angles": ("/ D)  # (D / 2,)", "/ D) / 2"),
    "squared ReLU": ("F.silu(gate) * up", "gate.relu().square() + 0 * up"),
    "two experts": ("return self.down(F.silu(gate) * up)",
        "share = x.mean(-1, keepdim=True).sigmoid()\n"
        "        return share * self.down(F.silu(gate) * up) + (1 - share) * self.down(gate)"),
    "norms behind": ("x = take(x, at) + self.attention(self.norm1(x), attend",
        "x = take(x, at) + self.attention(x, attend"),
    "a parallel block": ("return x + self.mlp(self.norm2(x))",
        "return x + self.mlp(self.norm1(x))"),
    "learned positions": ("x = self.embed(tokens)  # (B, n, C)",
        "x = self.embed(tokens) + self.embed.weight[places % 40]"),
    "a capped head": ("logits = self.layers(tokens, attend, places, end, cache, at)",
        "logits = 5 * torch.tanh(self.layers(tokens, attend, places, end, cache, at) / 5)"),
    "an untied head": ("if config.tie_embeddings:", "if False:"),
    "another last layer": ("return self.head(self.norm(x))", "return self.head(self.norm(x) + x)"),
    "a last block again": ("            x = block(x, attend, rotation, layer, wanted)",
        "            x = block(x, attend, rotation, layer, wanted)\n            x = x + x.tanh()"),
}
# What train.py trains with: two steps are not those of the file as it is.
TRAINING = {
    "loss on queries": ("segments, f, s.answers_only)", "segments, f, False)"),
    "smoothed targets": ('targets, reduction="sum") / count',
        'targets, reduction="sum", label_smoothing=0.1) / count'),
    "another loss": ("loss.backward()", "loss = loss + 1e-3 * logits.square().mean()\n"
        "            loss.backward()"),
    "another optimizer": ("run.model, run.optimizer",
        "run.model, torch.optim.SGD(run.model.parameters(), lr=1)"),
    "a clipped step": ("optimizer.step()", "optimizer.step() if run.step > 0 else None"),
    "every second target": ("    return at, tokens.flatten()[at + 1]",
        "    return at[::2], tokens.flatten()[at[::2] + 1]"),
}
# Masks of a reader's own, and what one_pass says of them.
OWN_MASKS = {
    "a short sight": ("return torch.where(segments % 2 == 1, end, j)",
        "return torch.where(segments % 2 == 1, torch.minimum(end, j + 1), j)", True),
    "the last query both ways": ("return torch.where(segments % 2 == 1, end, j)",
        "return torch.where(segments == (segments * (segments % 2)).amax(1, True), end, j)", False),
    "answers two ahead": ("return torch.where(segments % 2 == 1, end, j)",
        "return torch.where(segments % 2 == 1, end, j + 2)", True),
}
DENSE = {"dense sees one less": ("< f[:, :, None]", "< (f[:, :, None] - 1).clamp(min=1)")}


def edited(name, old, new):
    text = source(name)
    above = text.split(LINE)[0]
    assert old in above, f"{name}.py has no longer: {old}"
    return text.replace(old, new, 1)


def gpt(module):
    torch.manual_seed(0)
    model = module.GPT(module.GPTConfig(
        40, 320, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=48, qk_norm=True,
        token_shift=True))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def dialogue(T):
    """Tokens (1, T) and f."""
    return torch.arange(T)[None] * 7 % 40, ism(torch.arange(T)[None] // 9 + 1)


def outcomes(model, T, kind):
    """What a model gives in training, with gradients, and in evaluation; a list of tensors."""
    found = []
    for mode in (True, False):
        model.train(mode).zero_grad()
        torch.manual_seed(1)  # of the dropout
        with torch.set_grad_enabled(mode), torch.autocast("cpu", kind, kind != torch.float32):
            logits = model(*dialogue(T)).float()
        found.append(logits.detach())
        if mode:
            logits.square().mean().backward()
            found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return found


@torch.inference_mode()
def chatted(model):
    """The logits of a query that is read at once, and of tokens that are read one by one."""
    tokens, _ = dialogue(60)
    cache = sys.modules[type(model).__module__].Cache(model.config)
    one = model.reader and model.reader(model, cache)
    torch.manual_seed(2)
    found = [model(tokens[:, :20], torch.full((1, 20), 20), cache)[0, -1]]
    for token in tokens[0, 20:].tolist():
        logits = one(token) if one else model(torch.tensor([[token]]), None, cache)[0, 0]
        found.append(logits.clone())
    return found


def alike(found, wanted, digits):
    assert len(found) == len(wanted)
    return all((a - b).norm() <= digits * b.norm() for a, b in zip(found, wanted))


@functools.cache
def logits_without_an_edit():
    lesson = load("model", source("model").split(LINE)[0])
    return outcomes(gpt(lesson), 60, torch.float32)[:1]


@pytest.mark.parametrize("name", MODEL | DENSE)
def test_an_edit_of_the_model_is_what_runs(name):
    """The whole file, made faster, is the file that is cut at its line."""
    if name in DENSE:
        text, own = source("model"), {"mask": load("mask", edited("mask", *DENSE[name]))}
    else:
        text, own = edited("model", *MODEL[name]), {}
    whole, lesson = load("model", text, **own), load("model", text.split(LINE)[0], **own)
    told, plain = [], gpt(lesson)
    trained = whole.faster(gpt(whole).train(), torch.bfloat16, told.append)
    for T in (60, 300):
        for kind, digits in ((torch.float32, 1e-3), (torch.bfloat16, 0.1)):
            wanted = outcomes(plain, T, kind)
            assert alike(outcomes(trained, T, kind), wanted, digits), (T, kind)
    chatting = whole.faster(gpt(whole).eval(), tell=told.append)
    assert alike(chatted(chatting), chatted(plain.eval()), 1e-3)
    assert len(told) <= 3 and all("model.py" in line for line in told)
    # The edit is one: it changes what is computed, but for a window longer than the dialogue.
    moved = not alike(outcomes(plain, 60, torch.float32)[:1], logits_without_an_edit(), 1e-3)
    assert moved or name in ("a window of 200", "an untied head")


def test_without_an_edit_all_is_faster_and_nothing_is_told():
    whole, told = load("model", source("model")), []
    model = whole.faster(gpt(whole).eval(), torch.bfloat16, told.append)
    assert told == [] and model.reader is whole.Steps
    assert type(model.norm) is whole.FusedNorm and type(model.blocks[0].norm1) is whole.FusedNorm
    assert type(model.blocks[0].attention.shift) is whole.FusedShift
    assert model.choose_attention is whole.fastest_attention


def test_frozen_weights_are_no_edit():
    for seed in range(10):
        torch.manual_seed(seed)
        whole, told = load("model", source("model")), []
        model = gpt(whole).train()
        frozen = random.Random(seed).sample(list(model.parameters()), 8)
        for p in [*frozen, *(model.parameters() if seed == 0 else [])]:
            p.requires_grad_(False)
        before = [p.requires_grad for p in model.parameters()]
        whole.faster(model, torch.bfloat16, told.append)
        assert told == [] and type(model.blocks[0].norm1) is whole.FusedNorm
        assert [p.requires_grad for p in model.parameters()] == before


def test_dropout_in_a_block_that_is_computed_again_is_the_same():
    whole = load("model", edited("model", *MODEL["dropout in a block"]))
    wanted, again = outcomes(gpt(whole), 60, torch.float32), gpt(whole)
    whole.recompute_blocks(again)
    assert alike(outcomes(again, 60, torch.float32), wanted, 1e-5)


def test_a_layer_that_mixes_the_row_beside_the_cache_is_told():
    mixed = "return self.down(x.mean(1, keepdim=True).sigmoid().mean() * "
    whole, told = load("model", edited("model", "return self.down(", mixed)), []
    whole.faster(gpt(whole).eval(), tell=told.append)
    assert "other logits with a cache than without" in told[0]


@functools.cache
def splits():
    return train.prepare(train.Settings(**TINY), Tokenizer())


def two_steps(text, **others):
    """The losses of two steps of a train.py."""
    module, losses = load("train", text, **others), []
    settings = module.Settings(**TINY, max_iters=2)
    module.train(settings, splits=splits(), watch=lambda run, loss: losses.append(float(loss)))
    return losses


@functools.cache
def usual_steps():
    return two_steps(source("train"))


@pytest.mark.parametrize("name", TRAINING)
def test_an_edit_of_the_training_is_what_trains(name):
    assert two_steps(edited("train", *TRAINING[name]))[1] != usual_steps()[1]


@pytest.mark.parametrize("name", OWN_MASKS)
def test_an_edit_of_a_mask_is_what_trains(name, capsys):
    *edit, at_once = OWN_MASKS[name]
    own = load("mask", edited("mask", *edit))
    assert own.one_pass(own.ism) == at_once
    assert two_steps(source("train"), mask=own) != usual_steps()
    told = "of the answers' tokens are trained and scored" in capsys.readouterr().out
    assert told == (name == "answers two ahead")


def test_an_edit_of_the_sampler_is_what_writes():
    answers = set()
    for text in (source("sample"), edited("sample", "likeliest.indices", "logits.topk(2)[1][1]")):
        chat = load("sample", text).load_chat(ROOT / "data" / "small.pt", "cpu", max_new_tokens=5)
        answers.add(chat.send("My name is Ann."))
    assert len(answers) == 2
