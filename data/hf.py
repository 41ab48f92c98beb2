"""
Published checkpoints in the Hugging Face format: all that this codebase knows of foreign weights and tokenizers.

    model = from_pretrained(folder)         LLaMA 2, 3 and 3.x, TinyLlama, SmolLM2, Qwen2, Qwen2.5, Qwen3
    save_pretrained(model, folder, out)     back to the same format, for use elsewhere
    tokenizer = load_tokenizer(folder)      the same, but for LLaMA 2 and TinyLlama, which use SentencePiece

Weights are read memory-mapped from safetensors: eight bytes with the length of a JSON header, the header, raw
numbers. Names, shapes and sizes are all checked before the first number is read, so that nothing is half-loaded.
Each error is a ValueError of one line. A chat format is a row of LAYOUTS, and its default system prompt, where its
authors' template has one, is left to the caller.
"""
import functools
import json
import math
import pathlib
import shutil
import unicodedata

import torch

from data.checkpoint import check_sizes, whole_file
from data.tokenizer import Tokenizer, read_ranks
from model import GPT, GPTConfig, rope_tables

ARCHITECTURES = {"LlamaForCausalLM": {}, "Qwen2ForCausalLM": {"qkv_bias": True}, "Qwen3ForCausalLM": {"qk_norm": True}}
# The values that the model here has; where config.json has no such option, the first holds.
SUPPORTED = {
    "hidden_act": ("silu",), "attention_bias": (False, None), "mlp_bias": (False, None), "partial_rotary_factor": (1, None),
    "use_sliding_window": (False, None), "quantization_config": (None,),
}
# Ours to theirs. Those in one list are stacked along their rows.
TENSORS = {"embed.weight": ["model.embed_tokens.weight"], "norm.weight": ["model.norm.weight"], "head.weight": ["lm_head.weight"]}
BLOCK_TENSORS = {
    "norm1.weight": ["input_layernorm.weight"],
    "attention.qkv.weight": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    "attention.qkv.bias": ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"],
    "attention.q_norm.weight": ["self_attn.q_norm.weight"],
    "attention.k_norm.weight": ["self_attn.k_norm.weight"],
    "attention.out.weight": ["self_attn.o_proj.weight"],
    "norm2.weight": ["post_attention_layernorm.weight"],
    "mlp.up.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.down.weight": ["mlp.down_proj.weight"],
}
SMALL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
               "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

LAYOUTS = {
    "chatml": {"begin": "", "header": "<|im_start|>{role}\n", "end": "<|im_end|>", "after": "\n"},  # Qwen, SmolLM2
    "llama3": {"begin": "<|begin_of_text|>", "header": "<|start_header_id|>{role}<|end_header_id|>\n\n", "end": "<|eot_id|>", "after": ""},
}
# How text is split before pairs are merged.
MODERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN, LLAMA3 = MODERN % "", MODERN % "{1,3}"
# SmolLM2 cuts out each digit first and splits what is left as GPT-2 does: to the space before a digit the text ends there.
SMOLLM = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# Byte-level BPE files write each byte as one printable character (GPT-2's encoder): {character: byte}.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
SYMBOLS = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*PRINTABLE}))}
# The special tokens that a chat needs, behind the ranks of LLaMA 3's tokenizer.model; the others of its 256 are never said.
LLAMA3_SPECIAL = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|start_header_id|>": 6, "<|end_header_id|>": 7, "<|eot_id|>": 9}
UNKNOWN = "is not a byte-level BPE as LLaMA 3, Qwen and SmolLM2 have it; SentencePiece tokenizers are not supported"


def read_json(path):
    """The dict in a JSON file. ValueError if it is missing or holds no dict."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def read_config(folder, block_size=0):
    """The GPTConfig of a folder's config.json, its context cut to block_size unless that is 0. ValueError for what GPT has not."""
    path = pathlib.Path(folder) / "config.json"
    c = read_json(path)
    name = str(c.get("architectures")).strip("[']")
    if name not in ARCHITECTURES:
        raise ValueError(f"{path}: the architecture {name} is not known; known are {', '.join(ARCHITECTURES)}")
    for option in ("rope_parameters", "rope_scaling"):
        if not isinstance(c.get(option) or {}, dict):
            raise ValueError(f"{path}: {option} must be an object, not {c[option]}")

    def number(options, key, default=None, kind=int):
        value = default if options.get(key) is None else options[key]
        if isinstance(value, bool) or not isinstance(value, (kind, int)) or not 0 < value < math.inf:
            raise ValueError(f"{path}: {key} must be a positive number, not {value}")
        return kind(value)

    rope = c.get("rope_parameters") or {"rope_theta": c.get("rope_theta"), **(c.get("rope_scaling") or {})}  # newer and older files
    for option, allowed in SUPPORTED.items():
        if (value := c.get(option, rope.get(option, allowed[0]))) not in allowed:
            raise ValueError(f"{path}: {option} = {value} is not supported")
    kind, scaling = rope.get("rope_type", rope.get("type", "default")), ()
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = tuple(number(rope, key, kind=float) for key in keys)
    elif kind != "default":
        raise ValueError(f"{path}: rope scaling of type {kind} is not supported, only llama3")
    n_embd, n_head, longest = number(c, "hidden_size"), number(c, "num_attention_heads"), number(c, "max_position_embeddings")
    if not isinstance(types := c.get("layer_types") or [], list) or any(kind != "full_attention" for kind in types):
        raise ValueError(f"{path}: layer_types other than full_attention are not supported")
    if block_size > longest:
        raise ValueError(f"{path}: the context is {longest} tokens, {block_size} are asked for")
    config = GPTConfig(
        vocab_size=number(c, "vocab_size"), block_size=block_size or longest, n_layer=number(c, "num_hidden_layers"),
        n_head=n_head, n_kv_head=number(c, "num_key_value_heads", n_head), n_embd=n_embd, n_hidden=number(c, "intermediate_size"),
        head_size=number(c, "head_dim", n_embd // n_head), rope_theta=number(rope, "rope_theta", 10000.0, float), rope_scaling=scaling,
        norm_eps=number(c, "rms_norm_eps", 1e-6, float), tie_embeddings=bool(c.get("tie_word_embeddings")), **ARCHITECTURES[name])
    check_sizes(config)
    return config


def copy_small_files(folder, out):
    """Copy all but the weights from a checkpoint folder to another: the config, the tokenizer, the chat template."""
    for name in SMALL_FILES:
        if (path := pathlib.Path(folder) / name).exists():
            shutil.copyfile(path, pathlib.Path(out) / name)


def read_safetensors(path):
    """{name: tensor} of one file, memory-mapped: a tensor is read when it is used. ValueError if the file is damaged."""
    size = path.stat().st_size if path.is_file() else -1
    if size < 8:
        raise ValueError(f"{path} is {'cut off' if size >= 0 else 'missing'}")
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")  # of the numbers
        if start > min(size, 100 << 20):
            raise ValueError(f"{path} is cut off within its header, or is no safetensors file")
        try:
            header = dict(json.loads(file.read(start - 8)))
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f"{path}: the header is not JSON") from None
    raw = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)  # (size,)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        match entry:
            case {"dtype": str(kind), "shape": [*shape], "data_offsets": [first, end]} if all(
                    type(n) is int and n >= 0 for n in (*shape, first, end)):
                pass
            case _:
                raise ValueError(f"{path}: the header's entry for {name} is damaged")
        if kind not in DTYPES:
            raise ValueError(f"{path}: {name} is of dtype {kind}; read are {', '.join(DTYPES)}")
        if end - first != math.prod(shape) * DTYPES[kind].itemsize:
            raise ValueError(f"{path}: {name} has {end - first} bytes, not those of the shape {shape} in {kind}")
        if start + end > size:
            raise ValueError(f"{path} is cut off: {name} ends at byte {start + end} of {size}")
        part = raw[start + first : start + end]
        aligned = part.storage_offset() % DTYPES[kind].itemsize == 0
        tensors[name] = (part if aligned else part.clone()).view(DTYPES[kind]).view(shape)
    return tensors


def read_weights(folder):
    """{name: memory-mapped tensor} of model.safetensors, or of the shards that its index names. ValueError as above."""
    if (folder / "model.safetensors").exists():
        return read_safetensors(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        raise ValueError(f"{folder} has neither model.safetensors nor {index.name}")
    where, tensors = read_json(index).get("weight_map"), {}
    if not isinstance(where, dict) or any(type(file) is not str or pathlib.Path(file).name != file for file in where.values()):
        raise ValueError(f"{index}: weight_map must map the names of tensors to files in this folder")
    for file in sorted(set(where.values())):
        shard = read_safetensors(folder / file)
        for name in shard:
            if where.get(name) != file:
                raise ValueError(f"{folder / file}: {name} is here, but the index has it in {where.get(name, 'no file')}")
        tensors |= shard
    for name in sorted(where.keys() - tensors.keys()):
        raise ValueError(f"{folder / where[name]}: {name} is missing, the index has it here")
    return tensors


def their_parts(name, config):
    """Our tensor's name -> {their tensor's name: its rows}, for those that ours has stacked; one alone has None, all rows."""
    if not name.startswith("blocks."):
        return dict.fromkeys(TENSORS[name])
    _, i, inner = name.split(".", 2)
    H, Hkv, D = config.n_head, config.n_kv_head, config.head_size
    rows = {1: [None], 2: [config.n_hidden] * 2, 3: [H * D, Hkv * D, Hkv * D]}[len(BLOCK_TENSORS[inner])]
    return {f"model.layers.{i}.{part}": n for part, n in zip(BLOCK_TENSORS[inner], rows)}


def from_pretrained(folder, block_size=0, dtype=torch.float32):
    """The GPT of a checkpoint folder (config.json, safetensors) with parameters of dtype, on the CPU.

    block_size: a shorter context than the checkpoint's, since the cache is allocated for all of it; 0 is the
    checkpoint's. ValueError for what is unknown, missing, damaged or of another shape; it names the tensor.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder, block_size)
    theirs = read_weights(folder)
    if config.n_layer > len(theirs):  # before so many layers are made
        raise ValueError(f"{folder}: config.json has {config.n_layer} layers, the weights are {len(theirs)} tensors")
    with torch.device("meta"):  # shapes without memory, and no time spent on random numbers
        model = GPT(config)
    parts, expected = {}, set()  # ours: {theirs: rows}
    for name, p in model.state_dict().items():
        tied = name == "head.weight" and config.tie_embeddings and "lm_head.weight" not in theirs
        parts[name] = their_parts("embed.weight" if tied else name, config)
        for part, n in parts[name].items():
            shape = (n or p.shape[0], *p.shape[1:])
            if part not in theirs:
                raise ValueError(f"{folder}: {part} is missing")
            if theirs[part].shape != shape:
                raise ValueError(f"{folder}: {part} has the shape {tuple(theirs[part].shape)}, by config.json it is {shape}")
            expected.add(part)
    for name in sorted(theirs.keys() - expected):
        if not name.endswith("rotary_emb.inv_freq"):  # old files have this table, which follows from config.json
            raise ValueError(f"{folder}: {name} is a tensor that config.json's architecture does not have")
    state = {name: torch.cat([theirs[part].to(dtype) for part in names]) for name, names in parts.items()}
    if config.tie_embeddings and not torch.equal(state["head.weight"], state["embed.weight"]):
        raise ValueError(f"{folder}: lm_head.weight differs from model.embed_tokens.weight, but config.json ties them")
    model.load_state_dict(state, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    model.cos, model.sin = rope_tables(config)
    return model


def save_pretrained(model, source, folder):
    """Write a GPT that began as the checkpoint folder `source` to a folder of the same format, in the dtype of its parameters."""
    source, folder, dtype = pathlib.Path(source), pathlib.Path(folder), model.embed.weight.dtype
    folder.mkdir(parents=True, exist_ok=True)
    copy_small_files(source, folder)
    config = read_json(source / "config.json")
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tensors = {}
    for name, p in model.state_dict().items():
        if name != "head.weight" or not model.config.tie_embeddings:
            parts = their_parts(name, model.config)
            tensors |= zip(parts, p.split([n or len(p) for n in parts.values()]))
    kind, header, end = {d: kind for kind, d in DTYPES.items()}[dtype], {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the numbers begin at a multiple of 8
    with whole_file(folder / "model.safetensors") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            file.write(tensor.cpu().contiguous().view(torch.uint8).numpy())


def byte_ranks(path, vocab, merges, whole):
    """A byte-level BPE's vocabulary and merges -> {bytes: id}, in which tiktoken finds the same merges in the same order.

    tiktoken merges what gives the smallest id. That is the same if ids grow along the merges. whole: words that are
    in the vocabulary are taken whole (ignore_merges). ValueError if the two could differ.
    """
    made = ["".join(pair) for pair in merges]
    ids = [vocab.get(token) for token in made]
    if not {*"".join(made)} <= SYMBOLS.keys():
        raise ValueError(f"{path} {UNKNOWN}")
    if None in ids or ids != sorted(ids):
        raise ValueError(f"{path}: the ids of the vocabulary do not follow the order of the merges")
    tokens = {*SYMBOLS, *made} | ({token for token in vocab if {*token} <= SYMBOLS.keys()} if whole else set())
    return {bytes(SYMBOLS[c] for c in token): vocab[token] for token in tokens if token in vocab}


def one_error(read):
    """A reader whose files' JSON may be of any structure: what goes wrong in it is a ValueError that names the folder."""
    @functools.wraps(read)
    def reader(folder):
        try:
            return read(folder)
        except (TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{folder}: the tokenizer's files are damaged ({type(error).__name__}: {error})") from None
    return reader


@one_error
def load_tokenizer(folder):
    """The Tokenizer of a checkpoint folder: tokenizer.json, or vocab.json and merges.txt, or LLaMA 3's tokenizer.model.

    vocab.json and merges.txt do not say how text is split: that follows from config.json, as Qwen or as SmolLM2 does it.
    Ids equal those of Hugging Face tokenizers. ValueError for SentencePiece and for what is not supported.
    """
    folder = pathlib.Path(folder)
    vocab_size, qwen = read_config(folder).vocab_size, "Qwen" in str(read_json(folder / "config.json")["architectures"])
    pattern, nfc = (QWEN, True) if qwen else (SMOLLM, False)
    if (path := folder / "tokenizer.json").exists():
        match read_json(path):
            case {"model": {"type": "BPE", "vocab": {**vocab}, "merges": [*merges], **model}, "added_tokens": [*listed],
                  "normalizer": (None | {"type": "NFC"}) as normalizer, "pre_tokenizer": {"pretokenizers": [
                      {"type": "Split" | "Digits"} as first, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": again}]},
                  } if not model.get("byte_fallback"):
                nfc = normalizer is not None
            case _:
                raise ValueError(f"{path} {UNKNOWN}")
        match first, again:
            case {"pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, False:
                pass
            case {"individual_digits": True}, True:
                pattern = SMOLLM
            case _:
                raise ValueError(f"{path}: text is split in a way that is not supported ({first['type']}, then ByteLevel)")
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
        ranks = byte_ranks(path, vocab, merges, model.get("ignore_merges"))
        if not all(isinstance(token, dict) and {"content", "id", "special"} <= token.keys() for token in listed):
            raise ValueError(f"{path}: an entry of added_tokens is damaged")
        added = {token["content"]: (token["id"], token["special"]) for token in listed}
    elif (path := folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        ranks = byte_ranks(path, read_json(path), [line.split(" ") for line in lines[lines[0].startswith("#version") :] if line], False)
        listed = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
        added = {token["content"]: (int(i), token["special"]) for i, token in listed.items()}
    elif (path := folder / "tokenizer.model").exists():
        try:
            ranks, pattern = read_ranks(path), LLAMA3
        except ValueError as error:
            raise ValueError(f"{error}. It {UNKNOWN}") from None
        added = {token: (len(ranks) + i, True) for token, i in LLAMA3_SPECIAL.items()}
    else:
        raise ValueError(f"{folder} has no tokenizer.json, no vocab.json with merges.txt and no tokenizer.model")
    name = next((name for name, layout in LAYOUTS.items() if layout["end"] in added), None)
    if name is None:
        raise ValueError(f"{path} has no special token of a known chat format ({', '.join(LAYOUTS)})")
    if (highest := max(*ranks.values(), *(i for i, _ in added.values()))) >= vocab_size:
        raise ValueError(f"{path} has a token {highest}, but config.json's vocab_size is {vocab_size}")
    for byte in range(256):  # bytes that the vocabulary lacks are left out, as in Hugging Face tokenizers
        ranks.setdefault(bytes([byte]), vocab_size + byte)
    return Tokenizer(name, ranks, pattern, {token: i for token, (i, _) in added.items()}, LAYOUTS[name],
                     # Those of the layout are never read in a text, whatever the file says of them.
                     [token for token, (_, special) in added.items() if not special and not any(token in part for part in LAYOUTS[name].values())],
                     (lambda text: unicodedata.normalize("NFC", text)) if nfc else str, vocab_size)
