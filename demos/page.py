"""
A page to look at: one HTML file that needs no network. Pick a dialogue or type one, and see what each mask lets each token see,
what a chat keeps in its cache from turn to turn, and, with a checkpoint, where a model looks and what it would say.

    python demos/page.py [--ckpt out/ckpt.pt] [--out out/page.html]

The page is demos/page.html with what is computed here put into it: f, from mask.py, and the cache entries that each turn
may keep. It computes both for typed dialogues itself, and checks itself against these when it opens.
"""
import base64
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model as model_module
from data.dialogues import generate
from data.machine import Parser
from data.tokenizer import Tokenizer
from mask import MASKS, reusable
from sample import load_chat

ANNA = [{"role": "user", "content": "My name is Anna."}, {"role": "assistant", "content": "Noted. Your name is Anna."},
        {"role": "user", "content": "What is my name?"}, {"role": "assistant", "content": "Your name is Anna."}]


def examples(tokenizer):
    """Name -> messages: one short dialogue, and of some families one that no model was trained on."""
    found = {"What is my name?": ANNA}
    for family in ("recollection", "follow-up", "refinement", "reasoning"):
        found[family] = next(dialogue["messages"] for dialogue in generate("test", 1000, families=(family,))
                             if 5 < len(dialogue["messages"]) and len(tokenizer.encode_dialogue(dialogue["messages"])[0]) < 100)
    return found


def look(model, tokens, f):
    """What the model does with tokens (1, T) under f: the attention weights (L, H, T, T), the probabilities (T, V) of what follows."""
    weights, attention = [], model_module.attention

    def record(q, k, v, *rest):
        one_hot = torch.eye(k.shape[2]).expand(*k.shape[:3], -1)  # with these as values the output is the weights
        weights.append(attention(q, k, one_hot, *rest)[0])
        return attention(q, k, v, *rest)

    model_module.attention = record
    try:
        probabilities = model(tokens, f)[0].float().softmax(-1)
    finally:
        model_module.attention = attention
    return torch.stack(weights), probabilities


def seen(model, tokenizer, tokens, f):
    """What the page shows of `look`: the weights as bytes, and after each token the likeliest next ones and the true one."""
    weights, probabilities = look(model, torch.tensor([tokens]), f)
    top = probabilities.topk(5)
    following = [round(float(p[token]), 4) for p, token in zip(probabilities, tokens[1:])]
    return {"weights": base64.b64encode((255 * weights).round().byte().numpy().tobytes()).decode(), "following": following,
            "top": [[[tokenizer.decode([token]), round(p, 4)] for token, p in zip(*row)]
                    for row in zip(top.indices.tolist(), top.values.tolist())]}


@torch.inference_mode()
def describe(name, messages, tokenizer, model=None):
    """A dialogue as the page takes it: its tokens, and by turn and mask f, what the cache keeps, what the model does."""
    tokens, segments = tokenizer.encode_dialogue(messages)
    ends = [j for j in range(1, len(tokens) + 1) if segments[j - 1] % 2 == 0 and segments[j - 1 : j] != segments[j : j + 1]]
    turns, before = [], {mask: torch.zeros(1, 0) for mask in MASKS}
    for end in ends:
        fs = {name: mask(torch.tensor([segments[:end]])) for name, mask in MASKS.items()}
        turn = {"f": {mask: f[0].tolist() for mask, f in fs.items()}, "kept": {mask: reusable(before[mask], f) for mask, f in fs.items()}}
        if model:
            turn["model"] = {mask: seen(model, tokenizer, tokens[:end], f) for mask, f in fs.items()}
        turns.append(turn)
        before = fs
    return {"name": name, "tokens": [tokenizer.decode([token]) for token in tokens], "segments": segments, "turns": turns}


def page(dialogues, tokenizer, model=None, trained=""):
    """The page as text. dialogues: name -> messages that end with an answer; trained: the name of the model's mask."""
    shown = [describe(name, messages, tokenizer, model) for name, messages in dialogues.items()]
    data = {"dialogues": shown, "masks": list(MASKS), "model": None}
    if model:
        data["model"] = {"mask": trained, "layers": model.config.n_layer, "heads": model.config.n_head}
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace("{{DATA}}", json.dumps(data).replace("<", "\\u003c"))  # a "</script>" in a text ends nothing


def main():
    parser = Parser(description="Write the page.", allow_abbrev=False)
    parser.add_argument("--ckpt", metavar="FILE", default="", help="a checkpoint of train.py, e.g. out/ckpt.pt, to see what its model does")
    parser.add_argument("--out", metavar="FILE", default="out/page.html", help="where the page goes (out/page.html)")
    a = parser.parse_args()
    try:
        out = Path(a.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        chat = load_chat(a.ckpt, "cpu", "float32") if a.ckpt else None
        tokenizer = chat.tokenizer if chat else Tokenizer()
        model, trained = (chat.model, next(name for name, mask in MASKS.items() if mask is chat.mask)) if chat else (None, "")
        text = page(examples(tokenizer), tokenizer, model, trained)
        out.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"page.py: {error}")
    print(f"{out}: {len(text) // 1000:,} kB; open it in a browser" + ("" if chat else " (--ckpt out/ckpt.pt adds a model)"))


if __name__ == "__main__":
    main()
