"""Chats with checkpoint folders in the Hugging Face format, against transformers' templates."""
import json
import random
import sys

import pytest
import torch
from folders import (
    BARE,
    BEGUN,
    CHATML,
    KINDS,
    QWEN25,
    SMOLLM2,
    chat_folder,
    fresh,
    random_query,
    transformers,
)
from helpers import run

from data.hf import chat_template, load_tokenizer
from sample import go_on, load_chat

EACH = "{% for m in messages %}"
NONE = CHATML.replace(EACH, EACH + (
    "{% if m.role == 'system' %}{{ '<|im_start|>system\n' ~ m.content ~ '<|im_end|>' ~ '\n' }}"
    "{% continue %}{% endif %}"))
# Name: the kind, the template, and whether it has a system prompt of its own.
TEMPLATES = {
    "smollm2": ("smollm2", SMOLLM2, True),
    "qwen2.5": ("qwen", QWEN25, True),
    "bare": ("smollm2", BARE, True),
    "llama3": ("llama3", BEGUN, True),
    "plain": ("qwen", CHATML, False),
    "none": ("smollm2", NONE, False),
}
PROMPTS = [
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "Reason step by step, put the answer within \\boxed{}.",
    "You're Qwen. You said: 'yes' + no.",
    "Two\nlines",
    "<b>7 > 5</b> | 3",
]


@pytest.mark.parametrize("mask", ["ism", "causal"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_chats(kind, mask, tmp_path):
    """After each turn the cache gives the logits of a fresh forward, and each turn is read once."""
    chat_folder(kind, tmp_path)
    rng = random.Random(kind + mask)
    for number in range(4):
        options = dict(system=rng.choice(("", "Be kind.")), seed=number)
        options |= dict(temperature=1.0, max_new_tokens=9)
        chat = load_chat(tmp_path, "cpu", "float32", mask, **options)
        for _ in range(4):
            before = len(chat.layout()[0]) if chat.turns else 0
            chat.send(random_query(rng)["content"])
            read = chat.stats["prefill tokens"] + chat.stats["decode tokens"]
            assert read == len(chat.layout()[0]) - before
            with torch.inference_mode():
                cached, whole = fresh(chat, "so?")
            assert torch.allclose(cached, whole, atol=1e-4 * float(whole.abs().max()), rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_is_the_template(kind, tmp_path):
    """The tokens of a chat, and of its next query, are those of transformers' chat template."""
    fast = chat_folder(kind, tmp_path)
    rng = random.Random(kind)

    def template(messages, header):
        options = dict(add_generation_prompt=header, return_dict=False)
        return list(fast.apply_chat_template(messages, **options))

    chat = load_chat(tmp_path, "cpu", "float32", max_new_tokens=1)
    for number in range(20):
        messages = [{"role": "system", "content": "Be kind."}] * (number % 2)
        chat.messages = []
        for _ in range(4):
            messages += [random_query(rng) for _ in range(rng.choice((1, 1, 2)))]
            messages.append({**random_query(rng), "role": "assistant"})
            go_on(chat, messages)
            tokens, segments = chat.layout()
            assert (tokens, segments) == chat.tokenizer.encode_dialogue(messages)
            assert tokens + chat.tokenizer.after == template(messages, False)
            query = random_query(rng)
            asked = template(messages + [query], True)
            chat.send(query["content"])
            assert chat.layout()[0][: len(asked)] == asked


# Name: a template that a look at its text would misread, and words of the line on what it writes
# otherwise; None if a chat is what it writes.
OPENED = "<|im_start|>assistant\n{% endif %}"
WRITTEN = {
    "a beginning": ("{{ bos_token }}" + CHATML, None),
    "set": ("{% set s = 'Be good.' %}" + BARE.replace("SYSTEM", "{{ s }}"), None),
    "plus": (BARE.replace("SYSTEM", "{{ 'Be ' + 'good.' }}"), None),
    "escaped": (BARE.replace("SYSTEM", r"{{ 'Be \u0067ood.' }}"), None),
    "for tools": ("{% if tools %}<|im_start|>system\nx<|im_end|>\n{% endif %}" + CHATML, None),
    "in a comment": ("{# <|im_start|>system\nx<|im_end|>\n #}" + CHATML, None),
    "no line break": (CHATML.replace("<|im_end|>\n", "<|im_end|>"), None),
    "human": (CHATML.replace("m.role", "{'user': 'human'}.get(m.role, m.role)"), None),
    "trim": (CHATML.replace("m.content", "m.content | trim"), None),
    "in pieces": (CHATML.replace(OPENED, "{{ '<|im_start|>' + 'assistant\n' }}{% endif %}"), None),
    "think": (CHATML.replace(OPENED, OPENED.replace("{%", "<think>\n{%")), "here it is '<think>"),
    "thoughts": (CHATML.replace("m.content", "m.content.split('</think>')[-1].lstrip('\n')"),
                 "thoughts in an answer"),
    "no system": ("{{ raise_exception('no') if messages[0].role == 'system' }}" + CHATML,
                  "refuses a dialogue with a system prompt"),
    "no sandbox": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "no Jinja": (CHATML, "read and not run"),
}


def test_a_template_is_obeyed_or_a_line_tells_what_is_other(tmp_path, monkeypatch):
    fast = chat_folder("smollm2", tmp_path)
    fast.bos_token = "<|endoftext|>"
    for name, (template, words) in WRITTEN.items():
        if name == "no Jinja":
            monkeypatch.setitem(sys.modules, "jinja2", None)
            chat_template.run.cache_clear()
        config = {"chat_template": template, "bos_token": "<|endoftext|>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        ours = load_tokenizer(tmp_path)
        if words:
            assert words in ours.note, name
            continue
        assert ours.note == "", name
        fast.chat_template = template
        rng = random.Random(name)
        for system in ([], [{"role": "system", "content": "Be kind."}]):
            roles = "user", "assistant", "user", "assistant", "user"
            messages = system + [{**random_query(rng), "role": role} for role in roles]
            messages[-1]["content"] = "  spaces  before a text \n"
            asked = fast.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            assert ours.encode_dialogue(messages)[0] == asked


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_templates_own_system_prompt(name, tmp_path):
    """Without a system prompt a chat and a dialogue begin as the template does.

    With one they begin with that alone; "" is one that is not there.
    """
    kind, template, own = TEMPLATES[name]
    fast = chat_folder(kind, tmp_path)
    for number, prompt in enumerate(PROMPTS):
        spelled = prompt
        if name != "bare":  # it stands in a string
            spelled = prompt.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
        fast.chat_template = template.replace("SYSTEM", spelled)
        # The three places in which a folder may have it.
        path = tmp_path / "chat_template.jinja"
        path.unlink(missing_ok=True)
        if number % 3 == 0:
            path.write_text(fast.chat_template, encoding="utf-8")
        else:
            held = fast.chat_template
            if number % 3 == 1:
                held = [{"name": "other", "template": "x"}, {"name": "default", "template": held}]
            (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": held}))
        chat = load_chat(tmp_path, "cpu", "float32", max_new_tokens=1)
        assert chat.tokenizer.default_system == (prompt if own else "")
        texts = {"Hi": "user", "Hello": "assistant", "So?": "user"}
        messages = [{"role": role, "content": text} for text, role in texts.items()]
        asked = fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        go_on(chat, messages[:2])
        chat.send("So?")
        assert chat.layout()[0][: len(asked)] == asked
        assert chat.tokenizer.encode_dialogue(messages)[0] == asked
        for system in ("Be kind.", ""):
            chat = load_chat(tmp_path, "cpu", "float32", system=system, max_new_tokens=1)
            chat.send("Hi")
            given = messages[:1]
            if system:
                given = [{"role": "system", "content": system}, *given]
            begun = chat.tokenizer.begin + chat.tokenizer.encode_given(given)
            assert chat.layout()[0][:-2] == begun


def test_greedy_chat_writes_what_transformers_generates(tmp_path):
    """Causal: the tokens of transformers' own greedy decoding over the template's ids."""
    for kind in KINDS:
        fast = chat_folder(kind, tmp_path / kind)
        chat = load_chat(tmp_path / kind, "cpu", "float32", "causal", max_new_tokens=6)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype="float32")
        chat.send("Hi, I'm Ann.")
        query = [{"role": "user", "content": "Hi, I'm Ann."}]
        ids = fast.apply_chat_template(query, add_generation_prompt=True, return_dict=False)
        options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
        options |= dict(eos_token_id=chat.tokenizer.end, suppress_tokens=chat.tokenizer.unsayable)
        out = theirs.generate(torch.tensor([ids]), **options)[0]
        assert (list(ids) + chat.turns[0][1])[: len(out)] == out.tolist()


def test_commands_with_a_folder(tmp_path):
    chat_folder("qwen", tmp_path)
    flags = "--mask prefix --max_new_tokens 5 --prompt Hi --prompt So?".split()
    done = run("sample.py", "--ckpt", str(tmp_path), *flags)
    assert done.returncode == 0 and done.stdout.count("> ") >= 2, done.stderr
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 1400}))
    done = run("sample.py", "--ckpt", str(tmp_path))
    assert done.returncode != 0 and "vocab_size is 1400" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
