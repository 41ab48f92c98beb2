"""Folders of published models, as transformers and tokenizers write them; chat templates."""
import functools
import random
import unicodedata

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed; only tests of data/hf need it"
)
import tokenizers
from conftest import ROOT
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from data.hf.tokenizer import SYMBOLS
from mask import MASKS, dense

SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
             num_attention_heads=4, max_position_embeddings=128)
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0,
                   high_freq_factor=4.0, original_max_position_embeddings=32)


PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1000.0}


def family_of(kind, n_kv_head, tied, rope=PLAIN_ROPE, **options):
    """transformers' name for it, and what its config has of its own."""
    heads = dict(num_key_value_heads=n_kv_head, tie_word_embeddings=tied)
    return kind, dict(heads, rope_parameters=rope, **options)


FAMILIES = {
    "llama2": family_of("Llama", 4, tied=False, rms_norm_eps=1e-5),
    "llama3": family_of("Llama", 2, tied=False, rope={**PLAIN_ROPE, "rope_theta": 5e5}),
    "llama3.2": family_of("Llama", 1, tied=True, rope=LLAMA3_ROPE, head_dim=12),
    "smollm2": family_of("Llama", 1, tied=True),
    "qwen2": family_of("Qwen2", 2, tied=True),
    "qwen2.5": family_of("Qwen2", 1, tied=False),
    "qwen3": family_of("Qwen3", 2, tied=True, head_dim=16),
}


def random_model(family, std, **sizes):
    """A model of transformers: no norm is 1 and no bias 0, so that a lost one shows."""
    torch.manual_seed(0)
    kind, options = family
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **sizes}, **options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, std)
    return model.eval()


def make_pretrained(family, folder, dtype=torch.float32, **save):
    """A random model, saved to the folder."""
    model = random_model(FAMILIES[family], 0.3)
    model.to(dtype).save_pretrained(folder, **save)
    # Read again, since bfloat16 rounds the rotation too.
    return type(model).from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def check_equal(theirs, ours):
    """Causal on plain tokens, and each mask on a dialogue with padding.

    transformers gets the mask as numbers that are added. What a processor rounds is less than 3e-5
    of the largest logit.
    """
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, theirs.config.vocab_size, (2, 100), generator=generator)
    expected = theirs(tokens).logits  # (2, T, V)
    assert expected.std() > 0.1
    assert (expected - ours(tokens)).abs().max() < 3e-5 * expected.abs().max()
    whole = [1] * 20 + [2] * 13 + [3] * 30 + [4] * 37
    padded = [1] * 5 + [2] * 50 + [3] * 9 + [4] * 20 + [0] * 16
    segments = torch.tensor([whole, padded])
    places = torch.arange(100)[None].expand(2, -1)
    for mask in MASKS.values():
        f = mask(segments)
        hidden = ~dense(f)[:, None]  # (B, 1, T, T)
        added = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
        expected = theirs(tokens, attention_mask=added, position_ids=places).logits
        assert (expected - ours(tokens, f)).abs().max() < 3e-5 * expected.abs().max()


# The regular expressions as the published tokenizer.json files have them.
CASED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>",
]
PIECES = [
    "def f(x):\n    return x ** 2", "for (int i = 0; i < n; ++i) {\n\t\ta[i] += 1;\n}\n",
    "https://example.org/a?b=c&d=1", "Hello", " world", "it's", " WE'LL", "I'M", "don't", "'",
    "''s",
    # Digits of several scripts, beside letters or alone.
    " 1", "2024", "  3.14", "x1y22z333", "1's", " \u0664\u0665\u0666", "\u2167", "\u00b2\u00bd",
    "\u0967\u0968",
    # Scripts; letters of one and of two code points; emoji.
    "\u4f60\u597d\uff0c\u4e16\u754c", "\u3053\u3093\u306b\u3061\u306f", "\uc548\ub155",
    "\u1112\u1161\u11ab", "\u0645\u0631\u062d\u0628\u0627", "\u05e9\u05dc\u05d5\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\u041f\u0440\u0438\u0432\u0435\u0442", "\u0393\u03b5\u03b9\u03ac", "na\u00efve",
    "nai\u0308ve", "e\u0301", "\u212b", "\u1e9b\u0323", "\u017f", "'\u017f", "\U0001f600",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f",
    # White space, punctuation, control characters, long runs.
    " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u200b", "\u2028", "...",
    "!?", "--", "()",
    "\u2014", "_", "__init__", "{}", "\x00", "\x7f", "a" * 40, "=" * 30, "ab" * 20,
]


def strings(n):
    """Random strings of code, words, scripts, emoji, white space, and any assigned characters."""
    rng = random.Random(0)
    code = (ROOT / "model.py").read_text(encoding="utf-8")
    no_character = "Cn", "Cs", "Co"
    assigned = [c for c in map(chr, range(0x30000)) if unicodedata.category(c) not in no_character]
    for _ in range(n // 3):
        yield "".join(rng.choices(PIECES, k=rng.randint(1, 12)))
        yield "".join(rng.choices(assigned, k=rng.randint(1, 8)) + rng.choices(PIECES, k=3))
        start = rng.randrange(len(code))
        yield code[start : start + rng.randint(1, 200)]


@functools.cache
def trained(family):
    """A small BPE of tokenizers, configured as the family's, trained on code and the pieces."""

    def level(regex):
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)

    def split(number):
        isolated = pre_tokenizers.Split(Regex(CASED + number + REST), "isolated")
        return pre_tokenizers.Sequence([isolated, level(False)])

    bpe = tokenizers.Tokenizer(models.BPE(ignore_merges=family == "llama3"))
    first, alphabet = [], pre_tokenizers.ByteLevel.alphabet()
    if family == "qwen":
        bpe.normalizer, bpe.pre_tokenizer = normalizers.NFC(), split(r"\p{N}")
    elif family == "llama3":
        bpe.pre_tokenizer = split(r"\p{N}{1,3}")
    else:
        digits = pre_tokenizers.Digits(individual_digits=True)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, level(True)])
        # The special tokens of SmolLM2 come first. Bytes that no text of common characters has
        # are no tokens.
        first = CHATML_TOKENS
        rare = {0xC0, 0xC1, *range(0xF1, 0x100)}
        alphabet = [c for c, byte in SYMBOLS.items() if byte not in rare]
    bpe.decoder = decoders.ByteLevel()
    names = "model.py", "train.py", "README.md"
    text = [(ROOT / name).read_text(encoding="utf-8") for name in names]
    text += PIECES * 3
    text.append("".join(random.Random(1).choices(PIECES, k=400)))
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=first, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(text, trainer)
    bpe.add_special_tokens(LLAMA3_TOKENS if family == "llama3" else CHATML_TOKENS)
    bpe.add_tokens([tokenizers.AddedToken("<think>", special=False, normalized=False)])
    return bpe


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
BEGUN = LLAMA3.replace("{{ bos_token if loop.first }}", "")
BEGUN = "{{ bos_token }}" + UNLESS + OWN + BEGUN
# Kind of a chat: a family of models and its chat template.
KINDS = {"qwen": ("qwen2", CHATML), "smollm2": ("smollm2", CHATML), "llama3": ("llama3.2", LLAMA3)}


def chat_folder(kind, folder):
    """A random model and a trained BPE in one folder, as a published checkpoint has them.

    Returns transformers' tokenizer.
    """
    family, template = KINDS[kind]
    sizes = dict(vocab_size=1600, max_position_embeddings=512)
    random_model(FAMILIES[family], 0.2, **sizes).save_pretrained(folder)
    begin = "<|begin_of_text|>" if kind == "llama3" else None
    bpe = trained(kind)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=begin)
    fast.chat_template = template
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


def random_query(rng):
    """A random query.

    It begins with no line break: templates that do not cut it off merge it with the header's.
    """
    words = [p for p in PIECES if p.strip() and p.isprintable()]
    return {"role": "user", "content": "".join(rng.choices(words, k=rng.randint(1, 9))).strip()}
