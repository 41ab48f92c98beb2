"""
A page to look at: one HTML file, which needs no network.

    python demos/page.py                        what each mask does
    python demos/page.py --ckpt out/ckpt.pt     and what a trained model does under it
    python demos/page.py --race out/race.json   and the race that demos/race.py --json ran

Pick a dialogue or type one. Point at a token and see what each mask lets it see, what a chat keeps
in its cache from turn to turn and, with a checkpoint, where a model looks and what it would say.

The page is demos/page.html with what is computed here put into it: for each turn and mask f, from
mask.py, and how many entries of the cache hold. For typed dialogues the page computes both itself,
and when it opens it checks itself against what stands here.
"""
import base64
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import machine
from data.machine import setting
from data.synthetic import generate
from data.tokenizer import Tokenizer
from mask import MASKS, answer_ends, reusable
from sample import load_chat

ANNA = [
    {"role": "user", "content": "My name is Anna."},
    {"role": "assistant", "content": "Noted. Your name is Anna."},
    {"role": "user", "content": "What is my name?"},
    {"role": "assistant", "content": "Your name is Anna."},
]


@dataclass
class Page:
    """Each field is a flag of the command line."""

    ckpt: str = setting("", "a checkpoint of train.py, out/ckpt.pt say, to see what its model does")
    mask: str = setting("ism", "a mask to show beside causal, prefix and ism", tuple(MASKS))
    race: str = setting("", "figures that demos/race.py --json wrote, to see the race")
    out: str = setting("out/page.html", "where the page goes")


def examples(tokenizer, context=100):
    """Name -> messages: a short dialogue, and of four families one that is in no training data.

    Those that fit into the context. ValueError if none does.
    """
    chosen = {}
    if len(tokenizer.encode_dialogue(ANNA)[0]) <= context:
        chosen["What is my name?"] = ANNA
    for family in ("recollection", "follow-up", "refinement", "reasoning"):
        for dialogue in generate("test", 1000, families=(family,)):
            messages = dialogue["messages"]
            tokens, _ = tokenizer.encode_dialogue(messages)
            # Some turns, and yet no more tokens than a screen has room for.
            if len(messages) > 5 and len(tokens) < 100 and len(tokens) <= context:
                chosen[family] = messages
                break
    if not chosen:
        raise ValueError(f"the context of {context} tokens is shorter than each example; train "
                         "with a longer --block_size")
    return chosen


def attention_weights(model, tokens, f):
    """A model reads tokens (1, T) under f -> its attention weights (L, H, T, T), and the
    probabilities (T, V) of what follows each token.
    """
    T = tokens.shape[1]
    attend = model.choose_attention(f, T, tokens.device)
    weights = []

    def record(q, k, v):
        # Attention mixes values by its weights. With unit vectors as values, it gives the weights.
        units = torch.eye(T).expand(*k.shape[:3], T)  # (1, Hkv, T, T)
        weights.append(attend(q, k, units)[0])  # (H, T, T)
        return attend(q, k, v)

    logits = model.layers(tokens, record, torch.arange(T), T)  # (1, T, V)
    return torch.stack(weights), logits[0].float().softmax(-1)


def model_data(model, tokenizer, tokens, f):
    """What the page shows of `attention_weights`. The weights are bytes, to keep the page small."""
    weights, probabilities = attention_weights(model, torch.tensor([tokens]), f)
    raw = (255 * weights).round().byte().numpy().tobytes()
    # After each token but the last: the probability of the one that does follow.
    following = [round(float(p[token]), 4) for p, token in zip(probabilities, tokens[1:])]
    # After each token: the five that are likeliest.
    top = []
    values, ids = probabilities.topk(5)  # (T, 5) each
    for row, row_ids in zip(values.tolist(), ids.tolist()):
        top.append([[tokenizer.decode([token]), round(p, 4)] for token, p in zip(row_ids, row)])
    return {"weights": base64.b64encode(raw).decode(), "following": following, "top": top}


@torch.inference_mode()
def describe(name, messages, tokenizer, model=None, masks=MASKS):
    """A dialogue as the page takes it: tokens, segments, and for each turn and mask what it is.

    masks: name -> mask.
    """
    tokens, segments = tokenizer.encode_dialogue(messages)
    before = {mask: torch.zeros(1, 0, dtype=torch.long) for mask in masks}
    turns = []
    # A large model takes minutes.
    for end in machine.Bar(answer_ends(segments), name, leave=False, disable=model is None):
        # f of the dialogue as it stands at this turn's end, and what of the cache holds under it.
        fs = {name: mask(torch.tensor([segments[:end]])) for name, mask in masks.items()}
        turn = {
            "f": {mask: f[0].tolist() for mask, f in fs.items()},
            "kept": {mask: reusable(before[mask], f) for mask, f in fs.items()},
        }
        if model is not None:
            turn["model"] = {
                mask: model_data(model, tokenizer, tokens[:end], f) for mask, f in fs.items()
            }
        turns.append(turn)
        before = fs
    pieces = [tokenizer.decode([token]) for token in tokens]
    return {"name": name, "tokens": pieces, "segments": segments, "turns": turns}


# The largest model that a page holds, in weights: a million are 2.7 MB.
LARGEST = 10**6


def network(model, tokenizer):
    """A small model and its tokenizer for the page's own forward pass; None if it has none.

    It knows no biases and no rope scaling, and the tokenizer of this repository alone.
    """
    config = model.config
    foreign = not tokenizer.identity.startswith("nanoism ")
    if foreign or config.qkv_bias or config.rope_scaling or model.n_params() > LARGEST:
        return None
    places, parts, start = {}, [], 0
    for name, p in model.named_parameters():
        places[name] = [start, p.numel()]
        parts.append(p.detach().flatten())
        start += p.numel()
    halves = torch.cat(parts).bfloat16().view(torch.int16).numpy().tobytes()
    spelled = [tokenizer.token_bytes(token).decode("latin-1") for token in range(config.vocab_size)]
    special = {f"<|{role}|>": token for role, token in tokenizer.headers.items()}
    special["<|end|>"] = tokenizer.end
    return {
        "layers": config.n_layer, "H": config.n_head, "Hkv": config.n_kv_head,
        "D": config.head_size, "eps": config.norm_eps, "theta": config.rope_theta,
        "qk_norm": config.qk_norm, "shift": config.token_shift, "block_size": config.block_size,
        "head": "embed.weight" if config.tie_embeddings else "head.weight",
        "places": places, "weights": base64.b64encode(halves).decode(),
        "bytes": spelled, "special": special, "unsayable": tokenizer.unsayable,
        "ranks": {text: i for i, text in enumerate(spelled) if i not in special.values()},
    }


def read_race(path):
    """What the page shows of the figures of demos/race.py. ValueError if the file has others."""
    try:
        figures = json.loads(Path(path).read_text(encoding="utf-8"))
        return {
            "task": figures["race"]["task"],
            "every": figures["race"]["every"],
            "records": [
                {name: record[name] for name in ("runner", "seed", "curves", "reading")}
                for record in figures["records"]
            ],
        }
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} is not what demos/race.py --json writes") from None


def page(dialogues, tokenizer, model=None, trained="", race=None, masks=MASKS):
    """The page as text. dialogues: name -> messages that end with an answer.

    trained: the name of the mask under which the model was trained. race: see read_race.
    """
    data = {
        "dialogues": [describe(*one, tokenizer, model, masks) for one in dialogues.items()],
        "masks": list(masks),
        "model": None,
        "network": None if model is None else network(model, tokenizer),
        "race": race,
    }
    if model is not None:
        layers, heads = model.config.n_layer, model.config.n_head
        data["model"] = {"mask": trained, "layers": layers, "heads": heads}
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    # Without a "<" no text of a dialogue can end the script that the data stands in.
    return template.replace("{{DATA}}", json.dumps(data).replace("<", "\\u003c"))


def main():
    with machine.errors_in_one_line("a smaller model takes less"):
        s = machine.parse(Page, "Write a page that shows what each mask does.")
        race = read_race(s.race) if s.race else None
        out = Path(s.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        names = ["causal", "prefix", "ism", s.mask]
        if s.ckpt:
            chat = load_chat(s.ckpt, "cpu", "float32")
            trained = next(name for name, mask in MASKS.items() if mask is chat.mask)
            masks = {name: mask for name, mask in MASKS.items() if name in [*names, trained]}
            dialogues = examples(chat.tokenizer, chat.size)
            text = page(dialogues, chat.tokenizer, chat.model, trained, race, masks)
        else:
            tokenizer = Tokenizer()
            masks = {name: mask for name, mask in MASKS.items() if name in names}
            text = page(examples(tokenizer), tokenizer, race=race, masks=masks)
        out.write_text(text, encoding="utf-8")
    more = "" if s.ckpt else " (--ckpt out/ckpt.pt adds a model)"
    print(f"{out}: {len(text) // 1000:,} kB; open it in a browser{more}")


if __name__ == "__main__":
    main()
