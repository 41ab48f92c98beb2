"""The page: what Python puts into it against loops and a real chat, and its JavaScript in a real headless browser."""
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

sys.path.insert(0, str(ROOT / "demos"))
import page

import model as model_module
from data.dialogues import generate
from data.tokenizer import PATTERN, Tokenizer
from mask import MASKS, reusable
from model import GPT, GPTConfig
from sample import Chat

TOKENIZER = Tokenizer()
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
TYPED = ["Is 42 é or ñ?", "No!!", "a <b> & </script>", "x"]


def tiny(**config):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 32, "n_hidden": 32, **config}
    model = GPT(GPTConfig(TOKENIZER.vocab_size, 256, **sizes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def naive(name, segments):
    """f of a dialogue by its definition."""
    last = {number: j + 1 for j, number in enumerate(segments)}
    query = max(end for number, end in last.items() if number % 2)
    return [min(last[s], j + 3) if name == "near" and s % 2 else last[s] if name == "ism" and s % 2 else max(j, query) if name == "prefix" else j
            for j, s in enumerate(segments, start=1)]


def turns(segments):
    """The dialogue's parts up to the end of each answer."""
    return [segments[: segments.index(number) + segments.count(number)] for number in range(2, segments[-1] + 1, 2)]


@pytest.fixture(scope="module")
def dialogues():
    odd = [("system", "</script><b>"), ("user", 'é\n"x" {{DATA}}'), ("assistant", ""), ("user", ""), ("assistant", "<!--")]
    made = {f"{i}": dialogue["messages"] for i, dialogue in enumerate(generate("val", 30, seed=5))}
    return {"odd": [{"role": role, "content": text} for role, text in odd], **made}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("config", [{}, {"n_kv_head": 1, "token_shift": True}, {"qk_norm": True, "qkv_bias": True, "head_size": 8}])
def test_attention_weights_are_those_of_the_model(monkeypatch, config, mask):
    """Weights times values is what each attention gives; they sum to one, and are zero where f hides."""
    model, calls, attention = tiny(**config), [], model_module.attention
    tokens, segments = (torch.tensor([row]) for row in TOKENIZER.encode_dialogue(page.ANNA))
    f = MASKS[mask](segments)

    def record(q, k, v, *rest):
        calls.append((q, k, v, attention(q, k, v, *rest)))
        return calls[-1][-1]

    with torch.no_grad():
        monkeypatch.setattr(model_module, "attention", record)
        logits = model(tokens, f)
        monkeypatch.undo()
        weights, probabilities = page.look(model, tokens, f)
    assert model_module.attention is attention and torch.allclose(probabilities, logits[0].softmax(-1), atol=1e-6)
    hidden = torch.arange(f.shape[1]) >= f[0][:, None]
    assert len(weights) == len(calls) == 2 and (weights[..., hidden] == 0).all()
    assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    for layer, (q, k, v, y) in zip(weights, calls):
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        assert torch.allclose(layer @ v[0], y[0], atol=1e-5)


def kept_by_a_chat(mask, messages):
    """How many cache entries a real chat keeps at each turn of these messages."""
    chat, kept, given = Chat(tiny(n_layer=1), TOKENIZER, MASKS[mask]), [], []
    with torch.inference_mode():
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
            chat.f, given = chat.f[:, : chat.cache.length], []
    return kept


def test_what_is_embedded(dialogues):
    """f by loops, and what the cache keeps by a chat that is led through the dialogue."""
    for name, messages in dialogues.items():
        made = page.describe(name, messages, TOKENIZER)
        tokens, segments = TOKENIZER.encode_dialogue(messages)
        assert made["tokens"] == [TOKENIZER.decode([token]) for token in tokens] and made["segments"] == segments
        parts = turns(segments)
        for mask in MASKS:
            assert [turn["f"][mask] for turn in made["turns"]] == [naive(mask, part) for part in parts]
            assert [turn["kept"][mask] for turn in made["turns"]] == kept_by_a_chat(mask, messages)


CHECK = r"""
const found = [], say = text => { if (found.length < 20) found.push(text); };
let checks = 0;
const same = (a, b, what) => { checks++; if (JSON.stringify(a) !== JSON.stringify(b)) say(what + ": " + JSON.stringify(a) + " is not " + JSON.stringify(b)); };
addEventListener("error", event => say("script error: " + event.message));
const rgb = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim().match(/[0-9a-f]{2}/g).map(x => parseInt(x, 16));
const press = key => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const chips = () => [...document.querySelectorAll(".token")];
const change = (id, value, type) => { const e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event(type, { bubbles: true })); };

function hovered(f, j, what) {  // the token j is pointed at: the classes of all tokens against f
  same(chips().map(c => c.classList.contains("self")).indexOf(true), j, what + " self");
  same(chips().map(c => c.classList.contains("past")), f.map((_, i) => i < j), what + " past");
  same(chips().map(c => c.classList.contains("future")), f.map((_, i) => i > j && i < f[j]), what + " future");
  same(chips().map(c => c.classList.contains("sees-it")), f.map((limit, i) => i !== j && limit > j), what + " who sees it");
  same(document.getElementById("says").textContent.includes(": f = " + f[j] + "."), true, what + " says");
}

function matrix(mask, f, what) {  // the colours in the middle of the cells
  const canvas = document.getElementById(mask + "-matrix"), n = f.length, side = canvas.width / n;
  if (side < 6) return;
  const all = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const colours = ["past", "future", "hidden"].map(rgb);
  const drawn = f.map((_, j) => f.map((_, i) => {
    const at = 4 * (Math.floor((j + .5) * side) * canvas.width + Math.floor((i + .5) * side));
    return colours.findIndex(c => c.every((x, k) => x === all[at + k]));
  }));
  same(drawn, f.map((limit, j) => f.map((_, i) => i >= limit ? 2 : i > j ? 1 : 0)), what + " matrix");
}

addEventListener("load", () => {
  same(document.getElementById("checked").textContent.startsWith("Checked when it opened: "), true, "the page's own check");
  EXPECTED.dialogues.forEach((turns, d) => {
    change("dialogue", d, "change");
    turns.forEach(({ f, lanes }, t) => {
      if (t) document.getElementById("on").click();
      [...document.querySelectorAll(".strip")].forEach((strip, m) => same(["kept", "again", "read", "written"].map(
        kind => strip.querySelectorAll("." + kind).length), lanes[m], `dialogue ${d}, turn ${t}, cache of mask ${m}`));
      if (d > 3) return;
      Object.keys(f).forEach((mask, m) => {
        const what = `dialogue ${d}, turn ${t}, ${mask}`, limits = f[mask], step = d ? 11 : 1;
        document.querySelectorAll("#masks button")[m].click();
        for (let j = 0; j < limits.length; j += step) {
          chips()[j].dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
          hovered(limits, j, `${what}, token ${j}`);
        }
        matrix(mask, limits, what);
      });
    });
  });
  change("dialogue", 0, "change");
  EXPECTED.reusable.forEach(({ before, now, kept }) => same(reusable(before, now), kept, `reusable(${before}, ${now})`));
  const last = EXPECTED.dialogues[0].at(-1).f, n = last.ism.length;
  for (const _ of EXPECTED.dialogues[0]) press("n");
  for (const [key, mask] of [["1", "causal"], ["2", "prefix"], ["3", "ism"]]) {
    press(key);
    for (let i = 0; i < n + 3; i++) press("ArrowLeft");
    hovered(last[mask], 0, `keys: ${mask}, far left`);
    press("ArrowRight");
    hovered(last[mask], 1, `keys: ${mask}, one to the right`);
  }
  const box = document.getElementById("prefix-matrix").getBoundingClientRect();
  document.getElementById("prefix-matrix").dispatchEvent(new PointerEvent("pointermove", { pointerType: "mouse",
    clientX: box.left + 1, clientY: box.top + 3.5 * box.height / n }));
  hovered(last.prefix, 3, "the fourth row of the matrix");
  if (EXPECTED.model) EXPECTED.model.forEach(({ mask, layer, head, token, attended, next }) => {
    press(String(1 + Object.keys(last).indexOf(mask)));
    change("layer", layer, "change");
    change("head", head, "change");
    chips()[token].click();
    const shown = id => [...document.querySelectorAll(id)].map(cell => cell.textContent);
    const near = (a, b, what) => same(a.length === b.length && a.every((x, i) => Math.abs(parseFloat(x) - b[i]) < .4), true, `${what} ${a} ${b}`);
    near(shown("#attended td:last-child"), attended, "attention");
    near(shown("#next figure:first-child td:last-child"), next, "next tokens");
  });
  same([...document.querySelectorAll(".with-model")].every(e => e.hidden), !EXPECTED.model, "model's part hidden");
  change("dialogue", EXPECTED.dialogues.length, "change");
  change("typed", EXPECTED.typed.lines.join("\n"), "input");
  press("n");
  press("3");
  same(chips().map(c => c.textContent), EXPECTED.typed.tokens, "typed tokens");
  chips().forEach((chip, j) => { chip.click(); hovered(EXPECTED.typed.ism, j, "typed, token " + j); });
  press("4");
  hovered(EXPECTED.typed.ism, EXPECTED.typed.tokens.length - 1, "a mask that the page cannot compute is not chosen");
  for (const text of ["", "one line"]) {
    change("typed", text, "input");
    same(chips().length, text ? 5 : 0, "typed " + text);
  }
  same(document.documentElement.scrollWidth <= innerWidth, true, `nothing is wider than ${innerWidth} pixels`);
  parent.postMessage(`${found.length ? found.join("\n") : "no error"} in ${checks} checks at ${innerWidth} pixels, ` +
    (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"), "*");
});
"""

FRAMES = """<!DOCTYPE html><meta charset="utf-8"><pre id="result"></pre>
<script>addEventListener("message", e => document.getElementById("result").append(e.data + "\\n"));</script>
"""


def expected_of_model(model):
    """What the page has to show of the model on Anna's dialogue: for some tokens the largest weights and probabilities, in %."""
    tokens, segments = (torch.tensor([row]) for row in TOKENIZER.encode_dialogue(page.ANNA))
    rows = []
    for mask in MASKS:
        weights, probabilities = page.look(model, tokens, MASKS[mask](segments))
        for token in range(8, tokens.shape[1], 3):
            for layer, head in ((0, 1), (1, 0)):
                top = lambda x, k: [100 * p for p in x.topk(k).values.tolist()]
                rows.append({"mask": mask, "layer": layer, "head": head, "token": token,
                             "attended": top(weights[layer, head, token], 8), "next": top(probabilities[token], 5)})
    return rows


def random_reuse(count):
    """Pairs of any two f's, the first perhaps of a shorter dialogue, and what of the first's cache holds under the second."""
    rng, cases = random.Random(3), []
    for _ in range(count):
        now = [min(9, j + rng.choice((0, 0, 1, 3))) for j in range(1, 10)]
        before = [f if rng.random() < 0.9 else rng.randint(1, 9) for f in now[: rng.randint(0, 9)]]
        cases.append({"before": before, "now": now, "kept": reusable(torch.tensor([before]), torch.tensor([now]))})
    return cases


@torch.inference_mode()
def checked(folder, name, dialogues, model=None):
    """Write a page with the check in it."""
    shown = []
    for messages in dialogues.values():
        _, segments = TOKENIZER.encode_dialogue(messages)
        parts, kept = turns(segments), {mask: kept_by_a_chat(mask, messages) for mask in MASKS}
        turn = []
        for k, part in enumerate(parts):
            start, answer = len(parts[k - 1]) if k else 0, part.count(part[-1])
            lanes = [[kept[mask][k], start - kept[mask][k], len(part) - start - answer, answer] for mask in MASKS]
            turn.append({"f": {mask: naive(mask, part) for mask in MASKS}, "lanes": lanes})
        shown.append(turn)
    pieces = []
    for i, line in enumerate(TYPED):
        words = regex.findall(PATTERN, line)
        pieces.append([*words, "<|end|>"] if i % 2 else ["<|user|>", *words, "<|end|>", "<|assistant|>"])
    typed = {"lines": TYPED, "tokens": sum(pieces, []),
             "ism": naive("ism", [i for i, piece in enumerate(pieces, start=1) for _ in piece])}
    expected = {"dialogues": shown, "reusable": random_reuse(300), "typed": typed, "model": expected_of_model(model) if model else None}
    text = page.page(dialogues, TOKENIZER, model, "ism" if model else "")
    values = json.dumps(expected).replace("<", "\\u003c")
    place = '<script id="data"'  # before it, to catch the errors of the page's own script
    (folder / name).write_text(text.replace(place, f"<script>const EXPECTED = {values};\n{CHECK}</script>\n{place}", 1), encoding="utf-8")


@pytest.mark.skipif(not BROWSER, reason="no chromium here (Debian: apt-get install chromium)")
def test_in_a_browser(tmp_path, dialogues, monkeypatch):
    """Hovers, keys, clicks and typing against loops, at a phone's width and a desk's, light and dark, with a model and without."""
    monkeypatch.setitem(MASKS, "near", lambda segments: torch.minimum(MASKS["ism"](segments), MASKS["causal"](segments) + 3))
    checked(tmp_path, "masks.html", dialogues)  # with a mask of a user's own
    monkeypatch.undo()
    checked(tmp_path, "model.html", {"Anna": page.ANNA}, tiny())
    frames = [f'<iframe src="{name}.html" style="width:{width}px;height:2000px"></iframe>'
              for name in ("masks", "model") for width in (390, 1100)]
    (tmp_path / "frames.html").write_text(FRAMES + "\n".join(frames), encoding="utf-8")
    for scheme, number in (("dark", 0), ("light", 1)):
        done = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / scheme}",
                               f"--blink-settings=preferredColorScheme={number}", "--virtual-time-budget=20000", "--dump-dom",
                               (tmp_path / "frames.html").as_uri()], capture_output=True, text=True, encoding="utf-8", timeout=300)
        result = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.S)
        assert result, done.stderr[-500:]
        lines = sorted(result[1].strip().splitlines())
        good = [line for line in lines if re.fullmatch(rf"no error in \d{{3,}} checks at (390|1100) pixels, {scheme}", line)]
        assert good == lines and len(lines) == 4, result[1]


@pytest.mark.parametrize("arguments, words", [(("--ckpt", "no-such.pt"), "python train.py"), (("--ckpt", "README.md"), "not a checkpoint"),
                                              (("--out", "/dev/null/x/page.html"), "Not a directory"), (("--nonsense",), "unrecognized")])
def test_user_errors_are_one_line(arguments, words, tmp_path):
    done = subprocess.run([sys.executable, "demos/page.py", "--out", str(tmp_path / "page.html"), *arguments], cwd=ROOT,
                          capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode != 0 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_the_command_writes_one_file_that_needs_no_network(tmp_path):
    out = tmp_path / "new" / "page.html"
    done = subprocess.run([sys.executable, "demos/page.py", "--out", str(out)], cwd=ROOT, capture_output=True, text=True,
                          encoding="utf-8", timeout=120)
    text = out.read_text(encoding="utf-8")
    assert done.returncode == 0 and str(out) in done.stdout and list(out.parent.iterdir()) == [out]
    assert "{{DATA}}" not in text and not re.search(r"https?:|src=|@import|url\(|fetch\(|XMLHttp", text)
