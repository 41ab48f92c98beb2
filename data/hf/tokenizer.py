"""
The tokenizer of a checkpoint folder in the Hugging Face format: a byte-level BPE as LLaMA 3, Qwen
and SmolLM2 have it. Ids equal those of Hugging Face tokenizers. Each error is a ValueError of one
line.

A chat format is a row of LAYOUTS. A folder has the format if it has all its special tokens. The
folder's chat template, if any, says what stands between them (data/hf/chat_template.py).
"""
import functools
import pathlib
import re
import unicodedata

from data.hf import chat_template
from data.hf.config import read_config, read_json
from data.tokenizer import Tokenizer, make_layout, read_ranks

LAYOUTS = {
    # Qwen and SmolLM2.
    "chatml": make_layout("", "<|im_start|>{role}\n", "<|im_end|>", "\n"),
    "llama3": make_layout("<|begin_of_text|>", "<|start_header_id|>{role}<|end_header_id|>\n\n",
                          "<|eot_id|>", ""),
}
# How text is split before pairs are merged.
MODERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN, LLAMA3 = MODERN % "", MODERN % "{1,3}"
# SmolLM2 cuts out each digit first and splits the rest as GPT-2 does, so a space before a digit
# counts as the end of the text.
SMOLLM = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# Byte-level BPE files write each byte as one printable character, {character: byte}, as GPT-2 did.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
SYMBOLS = {chr(b): b for b in PRINTABLE}
SYMBOLS |= {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*PRINTABLE}))}
# The special tokens that a chat needs, behind the ranks of LLaMA 3's tokenizer.model. A chat never
# has the others of its 256.
LLAMA3_SPECIAL = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|start_header_id|>": 6,
                  "<|end_header_id|>": 7, "<|eot_id|>": 9}
UNKNOWN = ("is not a byte-level BPE as LLaMA 3, Qwen and SmolLM2 have it; "
           "SentencePiece tokenizers are not supported")


def byte_ranks(path, vocab, merges, whole):
    """A byte-level BPE's vocabulary and merges -> {bytes: id} for tiktoken.

    tiktoken merges what gives the smallest id. That is the same if ids grow along the merges.
    ValueError if the two could differ. whole: words of the vocabulary that are never cut.
    """
    made = ["".join(pair) for pair in merges]
    ids = [vocab.get(token) for token in made]
    if not {*"".join(made)} <= SYMBOLS.keys():
        raise ValueError(f"{path} {UNKNOWN}")
    if None in ids or ids != sorted(ids):
        raise ValueError(f"{path}: the ids of the vocabulary do not follow the order of the merges")
    tokens = {*SYMBOLS, *made} | {token for token in whole if {*token} <= SYMBOLS.keys()}
    return {bytes(SYMBOLS[c] for c in token): vocab[token] for token in tokens if token in vocab}


def normalizers(normalizer):
    """The types of a normalizer of tokenizer.json and of those in it, a list; None is none."""
    if normalizer is None:
        return []
    if normalizer["type"] == "Sequence":
        return sum((normalizers(part) for part in normalizer["normalizers"]), [])
    return [normalizer["type"]]


def read_added(path, listed):
    """The entries of added tokens, each with its id -> {token: (id, special)}."""
    for token in listed:
        if not isinstance(token, dict) or not {"content", "id", "special"} <= token.keys():
            raise ValueError(f"{path}: an entry of its added tokens is damaged")
        # With such an option the token fits other places of a text, or takes the spaces around it.
        for option in ("lstrip", "rstrip", "single_word"):
            if token.get(option):
                raise ValueError(f"{path}: the added token {token['content']!r} has {option}, "
                                 "which is not supported; expected tokens without it")
    return {token["content"]: (token["id"], token["special"]) for token in listed}


def read_tokenizer_json(path):
    """tokenizer.json -> (ranks, pattern, added tokens, whether text is normalized to NFC)."""
    match read_json(path):
        case {"model": {"type": "BPE", "vocab": {**vocab}, "merges": [*merges], **model},
              "added_tokens": [*listed], "normalizer": normalizer,
              "pre_tokenizer": {"pretokenizers": [
                  {"type": "Split" | "Digits"} as first,
                  {"type": "ByteLevel", "add_prefix_space": False, "use_regex": again}]},
              } if not model.get("byte_fallback"):
            pass
        case _:
            raise ValueError(f"{path} {UNKNOWN}")
    for option in ("end_of_word_suffix", "continuing_subword_prefix", "dropout"):
        if model.get(option):
            raise ValueError(f"{path}: {option} = {model[option]} is not supported")
    kinds = normalizers(normalizer)
    if {*kinds} - {"NFC"}:
        raise ValueError(f"{path}: the normalizer {', '.join(kinds)} is not supported, only NFC")
    match first, again:
        case {"pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, False:
            pass
        case {"individual_digits": True}, True:
            pattern = SMOLLM
        case _:
            raise ValueError(f"{path}: text is split in a way that is not supported "
                             f"({first['type']}, then ByteLevel)")
    added = read_added(path, listed)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    # With ignore_merges a word is taken whole. The vocabulary may list added tokens too.
    whole = vocab.keys() - added.keys() if model.get("ignore_merges") else ()
    return byte_ranks(path, vocab, merges, whole), pattern, added, bool(kinds)


def read_vocab(folder):
    """vocab.json and merges.txt -> the same as read_tokenizer_json.

    They do not say how text is split. Qwen and SmolLM2 do it in two ways, and config.json says
    which of the two a folder is.
    """
    lines = (folder / "merges.txt").read_text(encoding="utf-8-sig").split("\n")
    if lines[0].startswith("#version"):
        lines = lines[1:]
    path = folder / "vocab.json"
    ranks = byte_ranks(path, read_json(path), [line.split(" ") for line in lines if line], ())
    path = folder / "tokenizer_config.json"
    listed = read_json(path).get("added_tokens_decoder", {})
    added = read_added(path, [{"id": int(i), **token} for i, token in listed.items()])
    if "Qwen" in str(read_json(folder / "config.json")["architectures"]):
        return ranks, QWEN, added, True
    return ranks, SMOLLM, added, False


def read_template(folder):
    """The chat template of a folder, a text in Jinja's language; "" if it has none."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8-sig")
    path = folder / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.exists() else None
    if isinstance(template, list):  # several, each with a name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str | None):
        raise ValueError(f"{path}: chat_template must be a text, not {template}")
    return template or ""


def special_tokens(layout):
    """The special tokens of a chat format, a list."""
    return list(dict.fromkeys(re.findall(r"<\|\w+\|>", "".join(layout.values()))))


def choose_layout(path, special):
    """The name in LAYOUTS of the chat format of a tokenizer with these special tokens.

    ValueError if it is none of them.
    """
    needed = {name: special_tokens(layout) for name, layout in LAYOUTS.items()}
    for name in LAYOUTS:
        if {*needed[name]} <= special:
            return name
    known = "; ".join(f"{name} has {', '.join(tokens)}" for name, tokens in needed.items())
    raise ValueError(f"{path} lacks a special token of each known chat format: {known}")


def named_tokens(folder):
    """The special tokens that a template knows by name, as {"bos_token": "<s>"}."""
    named = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        options = read_json(folder / name) if (folder / name).exists() else {}
        for key, token in options.items():
            if key.endswith("_token"):
                named[key] = token["content"] if isinstance(token, dict) else token
    return {key: token for key, token in named.items() if isinstance(token, str | None)}


def load_tokenizer(folder):
    """The Tokenizer of a folder. ValueError if it is damaged or not supported.

    It is in tokenizer.json, in vocab.json and merges.txt, or in LLaMA 3's tokenizer.model.
    """
    try:
        arguments, written, note = read_tokenizer(pathlib.Path(folder))
    except (TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        # The JSON of a damaged file may be of any structure.
        raise ValueError(f"{folder}: the tokenizer's files are damaged "
                         f"({type(error).__name__}: {error})") from None
    tokenizer = Tokenizer(*arguments)
    note = note or chat_template.difference(tokenizer, written)
    tokenizer.note = note and f"[the chat template of {folder} {note}]"
    return tokenizer


def read_tokenizer(folder):
    """(the arguments of Tokenizer, what the chat template wrote, a line on why it wrote nothing).

    ValueError for SentencePiece, damaged files and what is not supported.
    """
    vocab_size = read_config(folder).vocab_size
    # 1. The tokens.
    path = folder / "tokenizer.json"
    if path.exists():
        ranks, pattern, added, nfc = read_tokenizer_json(path)
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        path = folder / "vocab.json"
        ranks, pattern, added, nfc = read_vocab(folder)
    elif (folder / "tokenizer.model").exists():
        path = folder / "tokenizer.model"
        try:
            ranks, pattern, nfc = read_ranks(path), LLAMA3, False
        except ValueError as error:
            raise ValueError(f"{error}. It {UNKNOWN}") from None
        added = {token: (len(ranks) + i, True) for token, i in LLAMA3_SPECIAL.items()}
    else:
        raise ValueError(f"{folder} has no tokenizer.json, no vocab.json with merges.txt "
                         "and no tokenizer.model")
    highest = max(*ranks.values(), *(i for i, _ in added.values()))
    if highest >= vocab_size:
        raise ValueError(f"{path} has a token {highest}, "
                         f"but config.json's vocab_size is {vocab_size}")
    # 2. The chat format. A token that a text can spell is none of its special ones: an ordinary
    # token may be added too, "!" for padding say.
    special = {token for token in added if token.encode() not in ranks}
    name = choose_layout(path, special)
    layout, default_system, written, note = LAYOUTS[name], "", [], ""
    template = read_template(folder)
    if template:
        named = {"bos_token": layout["begin"], **named_tokens(folder)}
        try:
            written = chat_template.run(template, tuple(sorted(named.items())))
        except ValueError as error:
            note = f"{error}; chats are laid out as {name} has it"
    if written:
        try:
            layout, default_system = chat_template.read_layout(layout, written)
        except (ValueError, IndexError):
            raise ValueError(f"{path}: the folder's chat template does not write what its special "
                             f"tokens tell, the format {name}; other formats are not supported"
                             ) from None
    # 3. The special tokens that a text may spell. Those of the chat format are never among them.
    spoken = [token for token, (_, special) in added.items()
              if not special and token not in special_tokens(layout)]
    # 4. A byte without a token gets an id beyond the vocabulary, which `encode` leaves out.
    for byte in range(256):
        ranks.setdefault(bytes([byte]), vocab_size + byte)
    ids = {token: i for token, (i, _) in added.items()}
    normalize = functools.partial(unicodedata.normalize, "NFC") if nfc else str
    arguments = (name, ranks, pattern, ids, layout, spoken, normalize, vocab_size, default_system)
    return arguments, written, note
