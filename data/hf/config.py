"""
The config.json of a checkpoint folder in the Hugging Face format: what model it is, and the mask it
was trained under. Each error is a ValueError of one line.
"""
import json
import math
import pathlib

from data.checkpoint import check_sizes, hint
from mask import MASKS
from model import GPTConfig

# The architectures that GPT can be, each with what sets it apart.
ARCHITECTURES = {
    "LlamaForCausalLM": {},
    "Qwen2ForCausalLM": {"qkv_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": True},
}
# The values that GPT supports. Without the option in config.json the first one holds.
SUPPORTED = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
}
# The key of config.json that names the mask. Other programs pass over a key that they do not know.
MASK_KEY = "nanoism_mask"


def read_json(path):
    """The dict in a JSON file. ValueError if it is missing or holds no dict."""
    try:
        # Some editors put a byte order mark before the text; "utf-8-sig" passes over it.
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        line, instead = f"{path} cannot be read ({error.strerror})", hint(path.parent)
        raise ValueError(f"{line}; {instead}" if instead else line) from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def positive(path, options, key, default=None, kind=int):
    """The positive number under a key of the options, of the kind int or float."""
    value = options.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (kind, int)) or not 0 < value < math.inf:
        raise ValueError(f"{path}: {key} must be a positive number, not {value}")
    return kind(value)


def agreed(path, key, *values):
    """The value of an option that may stand in several places; None where it stands in none."""
    first, *others = [value for value in values if value is not None] or [None]
    for value in others:
        if value != first:
            raise ValueError(f"{path}: {key} stands there twice, as {first} and as {value}; "
                             "leave one of them out")
    return first


def read_rope(path, c):
    """The rotation by the dict c of config.json: (rope_theta, rope_scaling), see GPTConfig.

    Newer files have all of it in rope_parameters. Older ones have rope_theta by itself and the
    rest in rope_scaling. Mixtures are read as transformers reads them. What contradicts itself is
    refused.
    """
    for option in ("rope_parameters", "rope_scaling"):
        if not isinstance(c.get(option) or {}, dict):
            raise ValueError(f"{path}: {option} must be an object, not {c[option]}")
    # An empty object says as little as none.
    rope = agreed(path, "rope_parameters, or rope_scaling,", c.get("rope_parameters") or None,
                  c.get("rope_scaling") or None) or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"{path}: rope_parameters for each type of layer are not supported, "
                         "only one for all layers")
    for options in (c, rope):
        if options.get("partial_rotary_factor") not in (1, None):
            raise ValueError(f"{path}: partial_rotary_factor = {options['partial_rotary_factor']} "
                             "is not supported, only 1")
    theta = agreed(path, "rope_theta", rope.get("rope_theta"), c.get("rope_theta"))
    theta = positive(path, {"rope_theta": theta}, "rope_theta", 10000.0, float)
    # Before it was called rope_type it was called type.
    kind = agreed(path, "rope_type", rope.get("rope_type"), rope.get("type"))
    if kind in ("default", None):
        return theta, ()
    if kind != "llama3":
        raise ValueError(f"{path}: rope scaling of type {kind} is not supported, only llama3")
    original = agreed(path, "original_max_position_embeddings",
                      rope.get("original_max_position_embeddings"),
                      c.get("original_max_position_embeddings"))
    rope = {**rope, "original_max_position_embeddings": original or c["max_position_embeddings"]}
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return theta, tuple(positive(path, rope, key, kind=float) for key in keys)


def read_config(folder, block_size=0):
    """The GPTConfig of a folder's config.json, its context cut to block_size unless that is 0.

    ValueError for what GPT does not have.
    """
    path = pathlib.Path(folder) / "config.json"
    c = read_json(path)
    names = c.get("architectures")
    names = names if isinstance(names, list) else [names]
    # Of several, as of a model that was published for two uses, one is known.
    known = [name for name in names if isinstance(name, str) and name in ARCHITECTURES]
    if len(known) != 1:
        raise ValueError(f"{path}: the architecture {' and '.join(map(str, names))} is not known; "
                         f"known are {', '.join(ARCHITECTURES)}")
    for option, allowed in SUPPORTED.items():
        value = c.get(option, allowed[0])
        if value not in allowed:
            raise ValueError(f"{path}: {option} = {value} is not supported")
    layer_types = c.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise ValueError(f"{path}: layer_types other than full_attention are not supported")
    n_embd = positive(path, c, "hidden_size")
    n_head = positive(path, c, "num_attention_heads")
    longest = positive(path, c, "max_position_embeddings")
    if block_size > longest:
        raise ValueError(f"{path}: the context is {longest} tokens, {block_size} are asked for")
    theta, scaling = read_rope(path, c)
    config = GPTConfig(
        vocab_size=positive(path, c, "vocab_size"),
        block_size=block_size or longest,
        n_layer=positive(path, c, "num_hidden_layers"),
        n_head=n_head,
        n_kv_head=positive(path, c, "num_key_value_heads", n_head),
        n_embd=n_embd,
        n_hidden=positive(path, c, "intermediate_size"),
        head_size=positive(path, c, "head_dim", n_embd // n_head),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=positive(path, c, "rms_norm_eps", 1e-6, float),
        tie_embeddings=bool(c.get("tie_word_embeddings")),
        **ARCHITECTURES[known[0]],
    )
    check_sizes(config)
    return config


def read_mask(folder):
    """The name of the mask that a folder's model was trained under.

    A folder that says nothing is causal, since that is how published models were trained.
    """
    path = pathlib.Path(folder) / "config.json"
    name = read_json(path).get(MASK_KEY, "causal")
    if not isinstance(name, str) or name not in MASKS:
        raise ValueError(f"{path}: {MASK_KEY} is {name}, which mask.py does not have; "
                         f"it has {', '.join(MASKS)}")
    return name
