"""
The tokenizer of a checkpoint folder in the Hugging Face format: a byte-level BPE as LLaMA 3, Qwen
and SmolLM2 have it. Ids equal those of Hugging Face tokenizers. Each error is a ValueError of one
line.

A chat format is a row of LAYOUTS. A folder has one if it has all its special tokens, and if its
chat template, where there is one, writes them so. The template is not run, since that takes a
library. Two things are looked up in its text: how an answer is opened, and what system prompt the
template has of its own.
"""
import functools
import pathlib
import re
import unicodedata

from data.hf_config import read_config, read_json
from data.tokenizer import Tokenizer, read_ranks

LAYOUTS = {
    # Qwen and SmolLM2.
    "chatml": {"begin": "", "header": "<|im_start|>{role}\n", "end": "<|im_end|>", "after": "\n"},
    "llama3": {"begin": "<|begin_of_text|>",
               "header": "<|start_header_id|>{role}<|end_header_id|>\n\n", "end": "<|eot_id|>",
               "after": ""},
}
# How text is split before pairs are merged.
MODERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN, LLAMA3 = MODERN % "", MODERN % "{1,3}"
# SmolLM2 cuts out each digit first and splits what is left as GPT-2 does: to the space before a
# digit the text ends there.
SMOLLM = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# Byte-level BPE files write each byte as one printable character, {character: byte}, as GPT-2 did.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
SYMBOLS = {chr(b): b for b in PRINTABLE}
SYMBOLS |= {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*PRINTABLE}))}
# The special tokens that a chat needs, behind the ranks of LLaMA 3's tokenizer.model; the others of
# its 256 are never said.
LLAMA3_SPECIAL = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|start_header_id|>": 6,
                  "<|end_header_id|>": 7, "<|eot_id|>": 9}
# Jinja, the language of chat templates: a string in a tag, and a tag, be it a comment.
STRING = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
TAG = re.compile(rf"""(\{{#.*?#\}}|\{{[{{%](?:{STRING.pattern}|[^'"])*?[}}%]\}})""", re.DOTALL)
UNKNOWN = ("is not a byte-level BPE as LLaMA 3, Qwen and SmolLM2 have it; "
           "SentencePiece tokenizers are not supported")


def byte_ranks(path, vocab, merges, whole):
    """A byte-level BPE's vocabulary and merges -> {bytes: id} for tiktoken.

    tiktoken merges what gives the smallest id. That is the same if ids grow along the merges.
    ValueError if the two could differ. whole: words of the vocabulary that are taken whole.
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
        # They would be found in other places of a text, or take the spaces around them.
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

    They do not say how text is split: as Qwen or as SmolLM2 does it, which config.json tells.
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


def pieces(template):
    r"""What a chat template writes in one piece each: the texts between its tags, {{ ... }} and
    {% ... %}, and the strings within them. A list."""
    parts = TAG.split(template)  # at odd places a tag, at even ones the text between two
    found = []
    for i in range(0, len(parts), 2):
        text = parts[i]
        # "-" at the edge of a tag takes away the white space beside it.
        if i > 0 and parts[i - 1][-3] == "-":
            text = text.lstrip()
        if i + 1 < len(parts) and parts[i + 1][2] == "-":
            text = text.rstrip()
        found.append(text)
    escaped = {"n": "\n", "t": "\t"}  # what a string has as \n; any other character is itself
    for tag in parts[1::2]:
        for string in STRING.findall(tag):
            found.append(re.sub(r"\\(.)", lambda c: escaped.get(c[1], c[1]), string[1:-1]))
    return found


def special_tokens(layout):
    """The special tokens of a chat format, a list."""
    return re.findall(r"<\|\w+\|>", "".join(layout.values()))


def choose_layout(path, special, written):
    """The name in LAYOUTS of the chat format of a tokenizer with these special tokens.

    written: what the folder's template writes, if it has one. ValueError if it is none of them.
    """
    needed = {name: special_tokens(layout) for name, layout in LAYOUTS.items()}
    names = [name for name in LAYOUTS if {*needed[name]} <= special]
    if not names:
        known = "; ".join(f"{name} has {', '.join(tokens)}" for name, tokens in needed.items())
        raise ValueError(f"{path} lacks a special token of each known chat format: {known}")
    for name in names:
        opening = LAYOUTS[name]["header"].format(role="assistant")
        opens = any(opening in text for text in written)
        ends = any(LAYOUTS[name]["end"] in text for text in written)
        if not written or opens and ends:
            return name
    raise ValueError(f"{path}: the folder's chat template does not write what its special tokens "
                     f"tell, the format {' or '.join(names)}; other formats are not supported")


def default_system(written, layout):
    """The system prompt that a chat template writes where a dialogue has none; "" is none.

    It is the text between a system header and its end, where all that is one piece. What a template
    puts together (LLaMA 3.1's has the date in it) is not found.
    """
    for text in written:
        _, header, behind = text.partition(layout["header"].format(role="system"))
        prompt, end, _ = behind.partition(layout["end"])
        if header and end:
            return prompt
    return ""


def one_error(read):
    """A reader of files whose JSON may be of any structure: what goes wrong is a ValueError."""
    @functools.wraps(read)
    def reader(folder):
        try:
            return read(folder)
        except (TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{folder}: the tokenizer's files are damaged "
                             f"({type(error).__name__}: {error})") from None
    return reader


def load_tokenizer(folder):
    """The Tokenizer of a folder: tokenizer.json, or vocab.json and merges.txt, or LLaMA 3's
    tokenizer.model. ValueError for SentencePiece and for what is not supported."""
    return Tokenizer(*read_tokenizer(pathlib.Path(folder)))


@one_error
def read_tokenizer(folder):
    """What a Tokenizer is made of, in the order of its arguments. ValueError as above."""
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
    template = read_template(folder)
    written = pieces(template) if template else []
    special = {token for token in added if token.encode() not in ranks}
    name = choose_layout(path, special, written)
    layout = LAYOUTS[name]
    # 3. Those that a text may spell. The format's are none of them, whatever the file says of them.
    spoken = [token for token, (_, special) in added.items()
              if not special and token not in special_tokens(layout)]
    # 4. Bytes that it lacks are left out of a text, as in Hugging Face tokenizers.
    for byte in range(256):
        ranks.setdefault(bytes([byte]), vocab_size + byte)
    ids = {token: i for token, (i, _) in added.items()}
    normalize = functools.partial(unicodedata.normalize, "NFC") if nfc else str
    system = default_system(written, layout)
    return name, ranks, pattern, ids, layout, spoken, normalize, vocab_size, system
