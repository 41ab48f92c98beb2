"""
The weights of published checkpoints in the Hugging Face format.

    model = from_pretrained(folder)       LLaMA 2, 3 and 3.x, TinyLlama, SmolLM2, Qwen2, 2.5 and 3
    save_pretrained(model, folder, out)   back to the same format, for use elsewhere

Weights are read memory-mapped from safetensors: eight bytes with the length of a JSON header, the
header, raw numbers. Names, shapes and sizes are all checked before the first number is read, so
that nothing is half-loaded. Each error is a ValueError of one line.
"""
import json
import math
import pathlib
import shutil

import torch

from data.checkpoint import meta_model, whole_file, write_json
from data.hf.config import MASK_KEY, read_config, read_json
from model import rope_tables

# Ours to theirs. Those in one list are stacked along their rows.
TENSORS = {
    "embed.weight": ["model.embed_tokens.weight"],
    "norm.weight": ["model.norm.weight"],
    "head.weight": ["lm_head.weight"],
}
BLOCK_TENSORS = {
    "norm1.weight": ["input_layernorm.weight"],
    "attention.qkv.weight": [f"self_attn.{x}_proj.weight" for x in "qkv"],
    "attention.qkv.bias": [f"self_attn.{x}_proj.bias" for x in "qkv"],
    "attention.q_norm.weight": ["self_attn.q_norm.weight"],
    "attention.k_norm.weight": ["self_attn.k_norm.weight"],
    "attention.out.weight": ["self_attn.o_proj.weight"],
    "norm2.weight": ["post_attention_layernorm.weight"],
    "mlp.up.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.down.weight": ["mlp.down_proj.weight"],
}
WEIGHTS = "model.safetensors"
# All that a folder holds beside the weights.
SMALL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
               "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
               "tokenizer.model", "chat_template.jinja")
STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def copy_small_files(folder, out):
    """Copy all but the weights from a checkpoint folder to another."""
    for name in SMALL_FILES:
        path = pathlib.Path(folder) / name
        if path.exists():
            shutil.copyfile(path, pathlib.Path(out) / name)


def read_safetensors(path):
    """{name: tensor} of one file, memory-mapped: a tensor is read when it is used.

    ValueError if the file is damaged.
    """
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
        if kind not in STORED:
            raise ValueError(f"{path}: {name} is of dtype {kind}; read are {', '.join(STORED)}")
        if end - first != math.prod(shape) * STORED[kind].itemsize:
            raise ValueError(f"{path}: {name} has {end - first} bytes, "
                             f"not those of the shape {shape} in {kind}")
        if start + end > size:
            raise ValueError(f"{path} is cut off: {name} ends at byte {start + end} of {size}")
        part = raw[start + first : start + end]
        aligned = part.storage_offset() % STORED[kind].itemsize == 0
        tensors[name] = (part if aligned else part.clone()).view(STORED[kind]).view(shape)
    return tensors


def write_safetensors(path, shapes, dtype, read):
    """Write a file of tensors, whole or not at all.

    shapes: {name: shape}, in the order of the file. read(name) gives a tensor. It is called for one
    after the other, so that they need not be in memory all at once.
    """
    kind = {d: name for name, d in STORED.items()}[dtype]
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start = end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the numbers begin at a multiple of 8
    with whole_file(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in shapes:
            tensor = read(name).to(dtype).cpu().contiguous()
            file.write(tensor.view(torch.uint8).numpy())


def read_weights(folder):
    """{name: memory-mapped tensor} of model.safetensors, or of the shards that an index names.

    ValueError if a file is missing or damaged.
    """
    if (folder / WEIGHTS).exists():
        return read_safetensors(folder / WEIGHTS)
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        raise ValueError(f"{folder} has neither model.safetensors nor {index.name}")
    where, tensors = read_json(index).get("weight_map"), {}
    if not isinstance(where, dict) or any(
            type(file) is not str or pathlib.Path(file).name != file for file in where.values()):
        raise ValueError(f"{index}: weight_map must map the names of tensors to files "
                         "in this folder")
    for file in sorted(set(where.values())):
        shard = read_safetensors(folder / file)
        for name in shard:
            if where.get(name) != file:
                raise ValueError(f"{folder / file}: {name} is here, "
                                 f"but the index has it in {where.get(name, 'no file')}")
        tensors |= shard
    for name in sorted(where.keys() - tensors.keys()):
        raise ValueError(f"{folder / where[name]}: {name} is missing, the index has it here")
    return tensors


def checkpoint_parts(model):
    """All tensors of a checkpoint of this GPT: {our name: {their name: its shape}}."""
    c, parts = model.config, {}
    for name, p in model.state_dict().items():
        if name == "head.weight" and c.tie_embeddings:
            continue
        if name.startswith("blocks."):
            _, i, inner = name.split(".", 2)
            theirs = [f"model.layers.{i}.{part}" for part in BLOCK_TENSORS[inner]]
        else:
            theirs = TENSORS[name]
        rows = [p.shape[0]]
        if len(theirs) == 2:  # gate and up
            rows = [c.n_hidden] * 2
        elif len(theirs) == 3:  # queries, keys and values
            rows = [c.n_head * c.head_size] + [c.n_kv_head * c.head_size] * 2
        parts[name] = {part: (n, *p.shape[1:]) for part, n in zip(theirs, rows)}
    return parts


def from_pretrained(folder, block_size=0, dtype=torch.float32):
    """The GPT of a checkpoint folder (config.json, safetensors), in a dtype, on the CPU.

    block_size: a shorter context than the checkpoint's, since the cache is allocated for all of it;
    0 is the checkpoint's. ValueError for what is unknown, missing, damaged or of another shape; it
    names the tensor.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder, block_size)
    theirs = read_weights(folder)
    if config.n_layer > len(theirs):  # before so many layers are made
        raise ValueError(f"{folder}: config.json has {config.n_layer} layers, "
                         f"the weights are {len(theirs)} tensors")
    # 1. What there must be, by config.json. A head that is tied may be there or not.
    model = meta_model(config)
    parts = checkpoint_parts(model)
    expected = {name: shape for shapes in parts.values() for name, shape in shapes.items()}
    head = theirs.pop("lm_head.weight", None) if config.tie_embeddings else None
    # 2. It is there, and nothing else.
    for name, shape in expected.items():
        if name not in theirs:
            raise ValueError(f"{folder}: {name} is missing")
        if theirs[name].shape != shape:
            raise ValueError(f"{folder}: {name} has the shape {tuple(theirs[name].shape)}, "
                             f"by config.json it is {shape}")
    for name in sorted(theirs.keys() - expected.keys()):
        # Old files have this table, which follows from config.json.
        if not name.endswith("rotary_emb.inv_freq"):
            raise ValueError(f"{folder}: {name} is a tensor that config.json's architecture "
                             "does not have")
    # 3. Read it.
    state = {name: torch.cat([theirs[part].to(dtype) for part in names])
             for name, names in parts.items()}
    if config.tie_embeddings:
        state["head.weight"] = state["embed.weight"]
    if head is not None and not torch.equal(head.to(dtype), state["embed.weight"]):
        raise ValueError(f"{folder}: lm_head.weight differs from model.embed_tokens.weight, "
                         "but config.json ties them")
    model.load_state_dict(state, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    model.cos, model.sin = rope_tables(config)
    return model


def save_pretrained(model, source, folder, mask=""):
    """Write a GPT that began as the checkpoint folder `source` to a folder of the same format.

    It is written in the dtype of its parameters. mask: the name of the mask of its training, which
    config.json gets; "" leaves the entry of the source.
    """
    source, folder = pathlib.Path(source), pathlib.Path(folder)
    dtype = model.embed.weight.dtype
    folder.mkdir(parents=True, exist_ok=True)
    copy_small_files(source, folder)
    config = read_json(source / "config.json")
    # The older and the newer name of one option; some folders have both.
    for key in [key for key in ("torch_dtype", "dtype") if key in config] or ["dtype"]:
        config[key] = str(dtype).removeprefix("torch.")
    if mask:
        config[MASK_KEY] = mask
    write_json(folder / "config.json", config)
    state, tensors, shapes = model.state_dict(), {}, {}
    for name, parts in checkpoint_parts(model).items():
        shapes |= parts
        tensors |= zip(parts, state[name].split([shape[0] for shape in parts.values()]))
    write_safetensors(folder / WEIGHTS, shapes, dtype, tensors.get)
