"""
Why a published model babbles under ISM, and what one number of f mends: the attention sink.

    python demos/sink.py                        needs out/smollm2, which demos/real.py makes
    python demos/sink.py --gsm8k test.jsonl     GSM8K's worked answers too

A model that was trained causally rests its attention on the first token, which sees itself alone:
some layers make its hidden state huge, and heads that look for nothing look there (Xiao et al.,
2023, "Efficient Streaming Language Models with Attention Sinks"). Under ISM the first token sees
its whole query, so it is no such token. Under `ism_sink` of mask.py f(1) = 1, and it is again.
Nothing is trained here. The demo shows

    1. the loss on answers, also where more tokens than the first see only their past
    2. how large the first token's hidden state is, layer by layer: the picture
    3. a chat of three turns
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import machine
from data.hf import from_pretrained
from data.machine import setting
from data.synthetic import generate
from demos.compare import gsm8k, question_last
from demos.output import check_writable, color, dashes, describe, picture, plt, save, table
from mask import MASKS, causal, ism
from sample import load_chat
from train import predicted

QUERIES = ["My name is Ann and I live in Rome. What can I do there in the rain?",
           "How do I get there?", "What is my name?"]


@dataclass
class Sink:
    """Each field is a flag of the command line."""

    init_from: str = setting("out/smollm2", "a Hugging Face folder of a model trained causally")
    gsm8k: str = setting("", "GSM8K's test.jsonl; without it two kinds of dialogues")
    answers: int = setting(200, "answers of each kind")
    out: str = setting(picture("sink"), "the picture")

    def __post_init__(self):
        if self.answers < 1:
            raise ValueError(f"--answers must be at least 1, not {self.answers}")
        if not Path(self.init_from, "config.json").exists():
            how = "python demos/real.py makes out/smollm2"
            raise ValueError(f"--init_from {self.init_from} is no Hugging Face folder; {how}")


# --- which tokens see only their past -----------------------------------------------------------


def laid_out(messages, tokenizer):
    """A dialogue as tokens and segments (1, T), and {name: tokens to keep apart, booleans (T,)}."""
    tokens, segments = tokenizer.encode_dialogue(messages)
    j = torch.arange(len(tokens))
    special = torch.tensor([token in tokenizer.unsayable for token in tokens])  # (T,)
    # A turn's header in ChatML: a special token, then the role and a line break.
    header = special | special.roll(1) | special.roll(2)
    system = [m for m in messages[:1] if m["role"] == "system"]
    if not system and tokenizer.default_system:
        system = [{"role": "system", "content": tokenizer.default_system}]
    n_system = 0
    if system:
        n_system = len(tokenizer.begin) + len(tokenizer.encode_given(system, header=False))
    apart = {"the first 4": j < 4, "headers": header, "system prompt": j < n_system}
    return torch.tensor([tokens]), torch.tensor([segments]), apart


def bounds(name, segments, apart):
    """f (1, T) by a name of MASKS, or of what to keep apart: ISM, but causal for these tokens."""
    if name in MASKS:
        return MASKS[name](segments)
    return torch.where(apart[name], causal(segments), ism(segments))


# --- what is measured ---------------------------------------------------------------------------


def kinds(s):
    """{kind: dialogues without end}."""
    by_kind = {
        "question last": question_last("test", s.answers, 0),
        "dialogues": generate("test", s.answers, 0, mixed=True),
    }
    if s.gsm8k:
        by_kind["GSM8K"] = gsm8k(Path(s.gsm8k))
    return by_kind


def encoded(dialogues, tokenizer, answers):
    """The first dialogues that have so many answers together, laid out."""
    rows = []
    for dialogue in dialogues:
        rows.append(laid_out(dialogue["messages"], tokenizer))
        answers -= sum(message["role"] == "assistant" for message in dialogue["messages"])
        if answers <= 0:
            break
    return rows


@torch.no_grad()
def loss(model, dialogues, name):
    """The mean loss on the tokens of answers under a mask."""
    losses = []
    for tokens, segments, apart in dialogues:
        f = bounds(name, segments, apart)  # (1, T)
        at, targets = predicted(tokens, segments, f)  # (N,) each
        with machine.autocast(torch.device("cpu"), model.embed.weight.dtype):
            logits = model(tokens, f, at=at)  # (N, V)
        losses.append(F.cross_entropy(logits.float(), targets, reduction="none"))
    return float(torch.cat(losses).mean())


@torch.no_grad()
def sizes(model, dialogue, name):
    """The norms of the hidden states behind each block: of the first token, of the median one."""
    norms = []

    def record(block, inputs, x):
        norms.append(x[0].float().norm(dim=-1))  # (T,)

    tokens, segments, apart = dialogue
    hooks = [block.register_forward_hook(record) for block in model.blocks]
    with machine.autocast(torch.device("cpu"), model.embed.weight.dtype):
        model(tokens, bounds(name, segments, apart))
    for hook in hooks:
        hook.remove()
    return [float(x[0]) for x in norms], [float(x.median()) for x in norms]


def draw(norms, path):
    """Norms by layer: a line a mask."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, (first, _) in norms.items():
        layers = range(1, len(first) + 1)
        axis.semilogy(layers, first, dashes(name), color=color(name), label=f"{name}, first token")
    _, median = norms["causal"]
    axis.semilogy(layers, median, color="silver", lw=3, zorder=0, label="causal, the median token")
    axis.set(xlabel="layer", ylabel="norm of the hidden state")
    axis.grid(alpha=0.2)
    axis.legend()
    save(figure, path, 120)


def talk(chat, names):
    """Three turns under each mask; what the model says there stands in its history."""
    for name in names:
        print(f"\n--- {name}")
        chat.mask, chat.messages = MASKS[name], []
        chat.reset()
        for query in QUERIES:
            print(f"> {query}\n{' '.join(chat.send(query).split())}")


def main():
    with machine.errors_in_one_line("a smaller model takes less"):
        s = machine.parse(Sink, "The attention sink of a published model under ISM.")
        check_writable(s.out)
        machine.tune_cpu()
        chat = load_chat(s.init_from, device="cpu", max_new_tokens=40)
        # Many tokens at a time are read twice as fast by the plain weights as by those of a chat.
        dtype = machine.pick_dtype("auto", torch.device("cpu"))
        model = from_pretrained(s.init_from, chat.model.config.block_size, dtype)
        asked = {kind: encoded(dialogues, chat.tokenizer, s.answers)
                 for kind, dialogues in kinds(s).items()}
        names = "causal", "ism", "ism_sink"
        rows = []
        example = next(iter(asked.values()))[0]
        for name in (*names, *example[2]):
            row = {"mask": name if name in MASKS else f"ISM, {name} apart"}
            for kind, dialogues in asked.items():
                row[kind] = f"{loss(model, dialogues, name):.3f}"
            rows.append(row)
        table(f"Loss on {s.answers} answers, untrained; apart: these tokens see only their past",
              rows)
        norms = {name: sizes(model, example, name) for name in names}
        layer = len(model.blocks) * 2 // 3
        table(f"Norm of the hidden state behind layer {layer}", [
            {"mask": name, "first token": first[layer - 1], "median token": median[layer - 1]}
            for name, (first, median) in norms.items()
        ])
        draw(norms, s.out)
        talk(chat, names)
        print(f"\nOn {describe()}. The picture: {s.out}")


if __name__ == "__main__":
    main()
