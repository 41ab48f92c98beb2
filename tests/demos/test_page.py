"""The page: its data against loops and a real chat, and its JavaScript in a headless browser."""
import json
import random
import re
import shutil
import subprocess
import sys

import pytest
import regex
import torch
from conftest import ROOT
from helpers import TOKENIZER, naive, run

from data.checkpoint import load_checkpoint, save_checkpoint
from data.synthetic import generate
from data.tokenizer import PATTERN
from demos import page
from mask import MASKS, reusable
from model import GPT, GPTConfig
from sample import SMALL_MODEL, Chat

FOUND = map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))
BROWSER = next(filter(None, FOUND), None)
TYPED = ["Is 42 é or ñ?", "No!!", "a <b> & </script>", "x"]


def tiny(**config):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 32, "n_hidden": 32, **config}
    model = GPT(GPTConfig(TOKENIZER.vocab_size, 256, **sizes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def as_rows(messages):
    """A dialogue as tokens and segments, (1, T) each."""
    return (torch.tensor([row]) for row in TOKENIZER.encode_dialogue(messages))


def near(segments):
    """A mask of a user's own: a query's token sees its query, but at most 3 tokens ahead."""
    return torch.minimum(MASKS["ism"](segments), MASKS["causal"](segments) + 3)


def loops(name, segments):
    """naive, and f of the mask above."""
    if name == "near":
        return [min(f, j + 3) for j, f in enumerate(naive("ism", segments), start=1)]
    return naive(name, segments)


def turns(segments):
    """The dialogue's parts up to the end of each answer."""
    ends = [segments.index(n) + segments.count(n) for n in range(2, segments[-1] + 1, 2)]
    return [segments[:end] for end in ends]


@pytest.fixture(scope="module")
def dialogues():
    odd = [
        {"role": "system", "content": "</script><b>"},
        {"role": "user", "content": 'é\n"x" {{DATA}}'},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "<!--"},
    ]
    made = enumerate(generate("val", 30, seed=5))
    dove = [
        {"role": "user", "content": "First list: dove, cat. Second list: cat. What is missing?"},
        {"role": "assistant", "content": "The second list has no dove."},
    ]
    lists = {"lists": [*odd[1:3], *dove, *dove]}
    return {"odd": odd, **lists, **{str(i): dialogue["messages"] for i, dialogue in made}}


CONFIGS = [
    {}, {"n_kv_head": 1, "token_shift": True},
    {"qk_norm": True, "qkv_bias": True, "head_size": 8},
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_attention_weights_are_those_of_the_model(monkeypatch, config, mask):
    """Weights times values is what each attention gives. They sum to 1, and hidden ones are 0."""
    model, calls = tiny(**config), []
    tokens, segments = as_rows(page.ANNA)
    f = MASKS[mask](segments)
    choose = model.choose_attention

    def recording(*arguments):
        attend = choose(*arguments)

        def record(q, k, v):
            calls.append((q, k, v, attend(q, k, v)))
            return calls[-1][-1]

        return record

    monkeypatch.setattr(model, "choose_attention", recording)
    logits = model(tokens, f)
    monkeypatch.undo()
    weights, probabilities = page.attention_weights(model, tokens, f)
    assert torch.allclose(probabilities, logits[0].softmax(-1), atol=1e-6)
    assert torch.allclose(model(tokens, f), logits)  # a look changes nothing
    hidden = torch.arange(f.shape[1]) >= f[0][:, None]
    assert len(weights) == len(calls) == 2 and (weights[..., hidden] == 0).all()
    assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    for layer, (q, _, v, y) in zip(weights, calls):
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        assert torch.allclose(layer @ v[0], y[0], atol=1e-5)


@torch.inference_mode()
def kept_by_a_chat(mask, messages):
    """How many cache entries a real chat keeps at each turn of these messages."""
    chat, kept, given = Chat(tiny(n_layer=1), TOKENIZER, MASKS[mask]), [], []
    for message in messages:
        if message["role"] != "assistant":
            given.append(message)
            continue
        answer = []
        chat.turns.append((TOKENIZER.encode_given(given), answer))
        chat.read()
        kept.append(chat.cache.length - chat.fed)
        for token in TOKENIZER.encode_answer(message["content"]):
            answer.append(token)
            chat.feed(token)
        chat.f = chat.f[:, : chat.cache.length]
        given = []
    return kept


def test_f_and_cache_in_the_page_are_those_of_a_chat(dialogues):
    """f by loops, and what the cache keeps by a chat that is led through the dialogue."""
    for name, messages in dialogues.items():
        made = page.describe(name, messages, TOKENIZER)
        tokens, segments = TOKENIZER.encode_dialogue(messages)
        assert made["tokens"] == [TOKENIZER.decode([token]) for token in tokens]
        assert made["segments"] == segments
        parts = turns(segments)
        for mask in MASKS:
            fs = [turn["f"][mask] for turn in made["turns"]]
            kept = [turn["kept"][mask] for turn in made["turns"]]
            assert fs == [loops(mask, part) for part in parts]
            assert kept == kept_by_a_chat(mask, messages)


CHECK = (ROOT / "tests" / "demos" / "check_page.js").read_text(encoding="utf-8")
# All pages in one, which gathers what they say.
FRAMES = """<!DOCTYPE html><meta charset="utf-8"><pre id="result"></pre>
<script>
addEventListener("message", event => document.getElementById("result").append(event.data + "\\n"));
</script>
"""


def percent(values):
    return [100 * value for value in values.tolist()]


@torch.inference_mode()
def expected_of_model(model):
    """What the page has to show of the model on Anna's dialogue, for some tokens, in percent."""
    tokens, segments = as_rows(page.ANNA)
    T = tokens.shape[1]
    start = segments[0].tolist().index(segments.max())  # of the last answer
    said = tokens[0, start:, None]
    rows = []
    for mask in MASKS:
        weights, probabilities = page.attention_weights(model, tokens, MASKS[mask](segments))
        answer = probabilities[start - 1 : -1].gather(1, said)[:, 0]
        for token in range(8, T, 3):
            for layer, head in ((0, 1), (1, 0)):
                rows.append({
                    "mask": mask, "layer": layer, "head": head, "token": token,
                    "attended": percent(weights[layer, head, token].topk(8).values),
                    "next": percent(probabilities[token].topk(5).values),
                    "answer": percent(answer),
                })
    return rows


def random_reuse(count):
    """Pairs of any two f's, and what of a cache filled under the first holds under the second."""
    rng = random.Random(3)
    cases = []
    for _ in range(count):
        after = [min(9, j + rng.choice((0, 0, 1, 3))) for j in range(1, 10)]
        # Of a dialogue that may be shorter, with some numbers changed.
        before = after[: rng.randint(0, 9)]
        before = [f if rng.random() < 0.9 else rng.randint(1, 9) for f in before]
        kept = reusable(torch.tensor([before]), torch.tensor([after]))
        cases.append({"before": before, "after": after, "kept": kept})
    return cases


def expected_turns(messages):
    """Turn by turn: f by mask, and of each mask's lane the cells kept, again, read, written."""
    _, segments = TOKENIZER.encode_dialogue(messages)
    kept = {mask: kept_by_a_chat(mask, messages) for mask in MASKS}
    found, start = [], 0
    for turn, part in enumerate(turns(segments)):
        answer = part.count(part[-1])
        query = len(part) - start - answer
        held = [kept[mask][turn] for mask in MASKS]
        found.append({
            "f": {mask: loops(mask, part) for mask in MASKS},
            "lanes": [[n, start - n, query, answer] for n in held],
        })
        start = len(part)
    return found


@torch.inference_mode()
def expected_of_typed(model):
    """The tokens of what is typed, and their f under ISM; what a model makes of them."""
    if model:
        roles = ["user", "assistant"] * 2
        messages = [{"role": role, "content": x} for role, x in zip(roles, TYPED, strict=True)]
        tokens, segments = as_rows(messages)
        _, probabilities = page.attention_weights(model, tokens, MASKS["ism"](segments))
        start = segments[0].tolist().index(len(TYPED))
        answer = probabilities[start - 1 : -1].gather(1, tokens[0, start:, None])[:, 0]
        chat = Chat(model, TOKENIZER, MASKS["ism"], temperature=0, max_new_tokens=40)
        return {
            "lines": TYPED, "tokens": [TOKENIZER.decode([i]) for i in tokens[0].tolist()],
            "ism": naive("ism", segments[0].tolist()), "answer": percent(answer),
            "next": percent(probabilities[-1].topk(5).values), "reply": chat.send(TYPED[0]),
        }
    tokens, segments = [], []
    for i, line in enumerate(TYPED):
        words = regex.findall(PATTERN, line)
        query = ["<|user|>", *words, "<|end|>", "<|assistant|>"]
        part = query if i % 2 == 0 else [*words, "<|end|>"]
        tokens += part
        segments += [i + 1] * len(part)
    return {"lines": TYPED, "tokens": tokens, "ism": naive("ism", segments)}


def random_race():
    """The figures of a race with random numbers: three runners and two seeds."""
    rng = random.Random(4)

    def looks(n):
        return [[rng.choice([i for i in range(n) if i != j]), rng.random()] for j in range(n)]

    records = []
    for seed in (7, 8):
        for runner in ("causal", "ism", "a <b>"):
            layers = [[[0, 0.0], *looks(12)[1:]] for _ in range(3)]
            goals = [None if rng.random() < 0.3 else layers[0][j][0] for j in range(12)]
            goals[0] = None
            goals[5] = 0 if goals[5] else 7  # one that is missed
            records.append({
                "runner": runner, "seed": seed, "seconds": 1.0, "guesses": [],
                "curves": {kind: [rng.random() for _ in range(5)] for kind in ("easy", "a <b>")},
                "reading": {"tokens": ["", "<", "2 after", *"ABCDEFGHI"], "looks": layers,
                            "goals": goals},
            })
    return {"race": {"task": "links", "every": 20, "steps": 100}, "records": records}


def write_checked(path, dialogues, model=None, race=None, opens=None):
    """Write a page with the check in it."""
    expected = {
        "dialogues": [expected_turns(messages) for messages in dialogues.values()],
        "reusable": random_reuse(300),
        "typed": expected_of_typed(model),
        "model": expected_of_model(model) if model else None,
        "race": race,
        "opens": opens,
    }
    values = json.dumps(expected).replace("<", "\\u003c")
    place = '<script id="data"'
    check = f"<script>const EXPECTED = {values};\n{CHECK}</script>\n{place}"
    text = page.page(dialogues, TOKENIZER, model, "ism" if model else "", race)
    path.write_text(text.replace(place, check, 1), encoding="utf-8")


def what_the_pages_say(folder, scheme):
    """The lines of all pages in frames.html, opened in a browser that is dark or light."""
    number = 0 if scheme == "dark" else 1
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu",
        f"--user-data-dir={folder / scheme}",
        f"--blink-settings=preferredColorScheme={number}", "--virtual-time-budget=20000",
        "--dump-dom", (folder / "frames.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)
    result = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.S)
    assert result, done.stderr[-500:]
    return result[1].strip().splitlines()


@pytest.mark.skipif(not BROWSER, reason="no chromium here (Debian: apt-get install chromium)")
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_in_a_browser(tmp_path, dialogues, monkeypatch, scheme):
    """Hovers, keys, clicks and typing against loops, with a model and without.

    And the race's part. At a phone's width and a desk's.
    """
    monkeypatch.setitem(MASKS, "near", near)
    opens = [[" dove"], "turn 3 of 3"]
    write_checked(tmp_path / "masks.html", dialogues, opens=opens)  # with a mask of a user's own
    monkeypatch.undo()
    model = tiny(n_kv_head=1, qk_norm=True, token_shift=True)
    model.load_state_dict(model.bfloat16().float().state_dict())  # the page holds 16 bits of each
    write_checked(tmp_path / "model.html", {"Anna": page.ANNA}, model)
    figures = tmp_path / "race.json"
    figures.write_text(json.dumps(random_race()), encoding="utf-8")
    write_checked(tmp_path / "race.html", {"Anna": page.ANNA}, race=page.read_race(figures))
    frames = [
        f'<iframe src="{name}.html" style="width:{width}px;height:2000px"></iframe>'
        for name in ("masks", "model", "race") for width in (390, 1100)
    ]
    (tmp_path / "frames.html").write_text(FRAMES + "\n".join(frames), encoding="utf-8")
    lines = what_the_pages_say(tmp_path, scheme)
    good = rf"no error in \d{{3,}} checks at (390|1100) pixels, {scheme}"
    assert len(lines) == 6 and all(re.fullmatch(good, line) for line in lines), lines


def test_the_command_writes_one_file_that_needs_no_network(tmp_path):
    out = tmp_path / "new" / "page.html"
    done = run("demos/page.py", "--out", str(out))
    text = out.read_text(encoding="utf-8")
    assert done.returncode == 0 and str(out) in done.stdout and list(out.parent.iterdir()) == [out]
    text = text.replace("http://www.w3.org/2000/svg", "")  # the name of a format, not an address
    network = r"https?:|src=|@import|url\(|fetch\(|XMLHttp"
    assert "{{DATA}}" not in text and not re.search(network, text)


@pytest.mark.skipif(not BROWSER, reason="no chromium here (Debian: apt-get install chromium)")
@pytest.mark.parametrize("flags", [(), ("--mask", "ism_sink"), ("--ckpt", str(SMALL_MODEL))])
def test_the_page_of_the_command_opens(tmp_path, flags):
    """Its own check of itself comes to an end: it shows some of MASKS, mostly not all."""
    assert run("demos/page.py", "--out", str(tmp_path / "page.html"), *flags).returncode == 0
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu",
        f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=20000", "--dump-dom",
        (tmp_path / "page.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert re.search(r'id="checked"[^>]*>Checked when it opened', done.stdout), done.stderr[-500:]


@pytest.mark.parametrize("block_size", [64, 16])
def test_a_model_of_a_short_context(block_size, tmp_path, last_words, monkeypatch, capsys):
    state = load_checkpoint(SMALL_MODEL)
    state["config"]["block_size"] = block_size
    save_checkpoint(tmp_path / "ckpt.pt", **state)
    flags = ["--ckpt", str(tmp_path), "--out", str(tmp_path / "page.html")]
    if block_size == 16:
        assert "context of 16 tokens is shorter" in last_words(page, *flags)
    else:
        monkeypatch.setattr(sys, "argv", ["page.py", *flags])
        page.main()
        assert "recollection" in capsys.readouterr().err  # its bar, since a model may take minutes
