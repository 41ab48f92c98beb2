"""Chats with checkpoint folders in the Hugging Face format, against transformers' templates."""

import json
import random
import sys

import pytest
import torch
from folders import FAMILIES, PIECES, SIZES, check_equal, make_pretrained, trained
from helpers import run

transformers = pytest.importorskip(
    "transformers",
    reason="transformers is not installed; it is needed only to check folders of its format",
)
from conftest import ROOT

from data.hf import chat_template, from_pretrained, load_tokenizer, save_pretrained
from mask import MASKS, dense
from sample import go_on, load_chat

sys.path.insert(0, str(ROOT / "demos"))
import elsewhere
from finetune import add_lora, merge_lora

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ bos_token if loop.first }}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
KINDS = {"qwen": ("qwen2", CHATML), "smollm2": ("smollm2", CHATML), "llama3": ("llama3.2", LLAMA3)}

# Chat templates with a system prompt of their own, SYSTEM, for dialogues that have none: SmolLM2's,
# Qwen2.5's (shortened where tools are listed), and others of the kind.
SMOLLM2 = (
    r"{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    r"{{ '<|im_start|>system\nSYSTEM<|im_end|>\n' }}{% endif %}"
    r"{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    r"{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN25 = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'SYSTEM' }}
    {%- endif %}
    {{- "\n\n# Tools\n\nYou may call one or more functions<|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nSYSTEM<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
           or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
UNLESS = "{% if messages[0].role != 'system' %}"
BARE = UNLESS + "<|im_start|>system\nSYSTEM<|im_end|>\n{% endif %}" + CHATML
OWN = r"{{ '<|start_header_id|>system<|end_header_id|>\n\nSYSTEM<|eot_id|>' }}{% endif %}"
BEGUN = "{{ bos_token }}" + UNLESS + OWN + LLAMA3.replace("{{ bos_token if loop.first }}", "")
EACH = "{% for m in messages %}"
GIVEN = (
    "{% if m.role == 'system' %}{{ '<|im_start|>system\n' ~ m.content ~ '<|im_end|>' ~ '\n' }}"
    "{% continue %}{% endif %}"
)
NONE = CHATML.replace(EACH, EACH + GIVEN)
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


def make_folder(kind, folder):
    """A random model and a trained BPE in one folder, as a published checkpoint has them.

    Returns transformers' tokenizer.
    """
    architecture, options = FAMILIES[KINDS[kind][0]]
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 1600, "max_position_embeddings": 512}
    config = getattr(transformers, f"{architecture}Config")(**sizes, **options)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder)
    begin = "<|begin_of_text|>" if kind == "llama3" else None
    bpe = trained(kind)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=begin)
    fast.chat_template = KINDS[kind][1]
    bpe.save(str(folder / "tokenizer.json"))
    return fast


def fresh(chat, query):
    """Logits after one more query, from the cache and from one forward over the whole dialogue."""
    tokens, segments = chat.layout()
    more = chat.tokenizer.after + chat.tokenizer.encode_given([{"role": "user", "content": query}])
    f = chat.mask(torch.tensor([segments + [segments[-1] + 1] * len(more)]))
    whole = chat.model(torch.tensor([tokens + more]), f)[0, -1]
    chat.turns.append((more[len(chat.tokenizer.after) :], []))
    cached = chat.read()
    chat.turns.pop()
    chat.cache.length, chat.f = len(tokens), chat.f[:, : len(tokens)]
    return cached, whole


def user(rng):
    """A random query.

    It begins with no line break: templates that do not cut it off merge it with the header's.
    """
    words = [p for p in PIECES if p.strip() and p.isprintable()]
    return {"role": "user", "content": "".join(rng.choices(words, k=rng.randint(1, 9))).strip()}


@pytest.mark.parametrize("mask", ["ism", "causal"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_chats(kind, mask, tmp_path):
    """After each turn the cache gives the logits of a fresh forward, and each turn is read once."""
    make_folder(kind, tmp_path)
    rng = random.Random(kind + mask)
    for number in range(4):
        options = dict(system=rng.choice(("", "Be kind.")), seed=number)
        options |= dict(temperature=1.0, max_new_tokens=9)
        chat = load_chat(tmp_path, "cpu", "float32", mask, **options)
        for _ in range(4):
            before = len(chat.layout()[0]) if chat.turns else 0
            chat.send(user(rng)["content"])
            read = chat.stats["prefill tokens"] + chat.stats["decode tokens"]
            assert read == len(chat.layout()[0]) - before
            with torch.inference_mode():
                cached, whole = fresh(chat, "so?")
            assert torch.allclose(cached, whole, atol=1e-4 * float(whole.abs().max()), rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_is_the_template(kind, tmp_path):
    """The tokens of a chat, and of its next query, are those of transformers' chat template."""
    fast = make_folder(kind, tmp_path)
    rng = random.Random(kind)

    def template(messages, header):
        options = dict(add_generation_prompt=header, return_dict=False)
        return list(fast.apply_chat_template(messages, **options))

    chat = load_chat(tmp_path, "cpu", "float32", max_new_tokens=1)
    for number in range(20):
        messages = [{"role": "system", "content": "Be kind."}] * (number % 2)
        chat.messages = []
        for _ in range(4):
            messages += [user(rng) for _ in range(rng.choice((1, 1, 2)))]
            messages.append({**user(rng), "role": "assistant"})
            go_on(chat, messages)
            tokens, segments = chat.layout()
            assert (tokens, segments) == chat.tokenizer.encode_dialogue(messages)
            assert tokens + chat.tokenizer.after == template(messages, False)
            query = user(rng)
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
    "endless": ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
                "was stopped"),
    "endless text": ("{% set x = 'x' * 10 ** 11 %}", "MemoryError"),
    "long text": ("{{ 'x' * 10 ** 6 }}", "too long"),
    "no sandbox": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "no Jinja": (CHATML, "read and not run"),
}


def test_a_template_is_obeyed_or_a_line_tells_what_is_other(tmp_path, monkeypatch):
    fast = make_folder("smollm2", tmp_path)
    fast.bos_token = "<|endoftext|>"
    for name, (template, words) in WRITTEN.items():
        monkeypatch.setattr(chat_template, "SECONDS", 2 if name == "endless" else 60)
        if name == "no Jinja":
            missing = "import sys; sys.modules['jinja2'] = None\n" + chat_template.PROGRAM
            monkeypatch.setattr(chat_template, "PROGRAM", missing)
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
            messages = system + [{**user(rng), "role": role} for role in roles]
            messages[-1]["content"] = "  spaces  before a text \n"
            asked = fast.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            assert ours.encode_dialogue(messages)[0] == asked


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_templates_own_system_prompt(name, tmp_path):
    """Without a system prompt a chat and a dialogue begin as the template does.

    With one they begin with that alone; "" is one that is not there.
    """
    kind, template, own = TEMPLATES[name]
    fast = make_folder(kind, tmp_path)
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
        messages = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "So?"},
        ]
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
        fast = make_folder(kind, tmp_path / kind)
        chat = load_chat(tmp_path / kind, "cpu", "float32", "causal", max_new_tokens=6)
        load = transformers.AutoModelForCausalLM.from_pretrained
        theirs = load(tmp_path / kind, dtype=torch.float32)
        chat.send("Hi, I'm Ann.")
        query = [{"role": "user", "content": "Hi, I'm Ann."}]
        ids = fast.apply_chat_template(query, add_generation_prompt=True, return_dict=False)
        out = theirs.generate(
            torch.tensor([ids]),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=chat.tokenizer.end,
            pad_token_id=0,
            suppress_tokens=chat.tokenizer.unsayable,
        )[0]
        assert (list(ids) + chat.turns[0][1])[: len(out)] == out.tolist()


def test_commands_with_a_folder(tmp_path):
    make_folder("qwen", tmp_path)
    flags = "--mask prefix --max_new_tokens 5 --prompt Hi --prompt So?".split()
    done = run("sample.py", "--ckpt", str(tmp_path), *flags)
    assert done.returncode == 0 and done.stdout.count("> ") >= 2, done.stderr
    config = json.loads((tmp_path / "config.json").read_text())
    for change, words in (
        ({"vocab_size": 1400}, "vocab_size is 1400"),
        ({"model_type": "x", "architectures": ["X"]}, "X is not known"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        done = run("sample.py", "--ckpt", str(tmp_path))
        assert done.returncode != 0 and words in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [0, 8])
def test_what_is_saved_loads_in_transformers(family, rank, tmp_path):
    """Logits equal those of the model that was saved.

    With LoRA merged, from a sharded source, and in bfloat16.
    """
    theirs = make_pretrained(family, tmp_path / "source", max_shard_size="10KB" if rank else "5GB")
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 1e-4)):
        ours = from_pretrained(tmp_path / "source", dtype=dtype)
        if rank:
            add_lora(ours, rank, 16.0)
            for name, p in ours.named_parameters():
                if name.endswith(".B"):
                    torch.nn.init.normal_(p, std=0.1)
            merge_lora(ours)
        out = tmp_path / f"{dtype}"
        save_pretrained(ours, tmp_path / "source", out)
        assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype)[6:]
        load = type(theirs).from_pretrained
        again, info = load(out, dtype=torch.float32, output_loading_info=True)
        assert not any(info.values())
        check_equal(again.eval(), ours.float().eval(), tolerance)
        check_equal(again, from_pretrained(out), tolerance)
        if not rank and dtype == torch.float32:
            for a, b in zip(theirs.parameters(), again.parameters()):
                assert torch.equal(a, b)


@pytest.mark.parametrize("mask", ["ism", "ism_sink"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_model_of_ism_elsewhere(kind, mask, tmp_path):
    """demos/elsewhere.py: transformers gives our chat's logits if it is told the mask.

    Turn by turn from its cache, and for a whole dialogue. If it is not told, they differ, and no
    error tells.
    """
    fast = make_folder(kind, tmp_path)
    fast.eos_token = "q"  # a base model's is another token than that which ends a turn
    fast.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "nanoism_mask": mask}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert theirs.config.nanoism_mask == mask
    chat = load_chat(tmp_path, "cpu", "float32", max_new_tokens=9)
    queries = [user(random.Random(number))["content"] for number in range(4)]
    cache, seen, answers = transformers.DynamicCache(), 0, []
    for query in queries:
        # 1. The query behind the cache.
        ours = fresh(chat, query)[0] if chat.turns else None
        answers.append(chat.send(query))
        tokens, _ = chat.layout()
        start = len(tokens) - len(chat.turns[-1][1])
        logits = elsewhere.read(theirs, cache, tokens[seen:start])
        assert ours is None or (logits - ours).abs().max() < 1e-4 * ours.abs().max()
        # 2. Each token of the answer, that which ends it too.
        for token in tokens[start:]:
            elsewhere.read(theirs, cache, [token])
        seen = len(tokens)
    # 3. The whole dialogue in one call, by blocks and by f.
    tokens, segments = (torch.tensor([row]) for row in chat.layout())
    f = MASKS[mask](segments)
    ours = chat.model(tokens, f)  # (1, T, V)
    by_blocks = elsewhere.dialogue_mask(theirs, tokens, segments)
    assert torch.equal(by_blocks, dense(f)[:, None])
    logits = theirs(tokens, attention_mask=by_blocks).logits
    assert (logits - ours).abs().max() < 1e-4 * ours.abs().max()
    # 4. What goes wrong without it: another distribution of every answer's first token.
    last = (segments[0, :-1] % 2 == 1) & (segments[0, 1:] % 2 == 0)  # the last token of each query
    differ = (theirs(tokens).logits - ours)[0, :-1][last].abs().amax(1)  # (4,)
    assert len(differ) == 4 and differ.min() > 0.1 * ours.std()
    # 5. The chat as it stands there. A random model may say a special token; so silence them.
    bias = torch.zeros(theirs.config.vocab_size)
    bias[chat.tokenizer.unsayable] = -torch.inf
    theirs.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bias)
    assert list(elsewhere.chat(theirs, fast, queries, 9)) == answers
