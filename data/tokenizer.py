"""
Text to token ids and back: a tiktoken Encoding, four special tokens, and the layout of a dialogue.

    query  = (<|system|> text <|end|>)? <|user|> text <|end|> <|assistant|>      odd segment, given to the model
    answer = text <|end|>                                                        even segment, written by it

Other layouts differ in their strings alone: a query may be opened by tokens that begin the dialogue, or that stand
between an answer's <|end|> and the next header (data/hf.py has those of LLaMA 3 and ChatML).

The default encoding is built from `data/ranks.tiktoken`, which `python -m data.tokenizer` makes:
256 bytes, merges of them that are frequent in names, and the commonest words of the synthetic
dialogues. Names are not among those words, so that each is cut into pieces. A name that was never
trained on is then made of the same pieces as all others, and can be copied. Nothing is downloaded.
"""
import base64
import collections
import functools
import pathlib
import random
import re
import zlib

import tiktoken

RANKS = pathlib.Path(__file__).parent / "ranks.tiktoken"
N_PIECES = 480  # bytes and merges
N_RANKS = 1276  # these and whole words; with the four special tokens 1,280
# One token a digit. Runs are bounded, so that no text takes more than linear time to encode.
PATTERN = r" ?\p{N}| ?\p{L}{1,24}| ?[^\s\p{L}\p{N}]{1,8}|\s{1,8}"
ROLES = ("system", "user", "assistant")
# A longer run of letters, digits, signs or spaces is cut, since an older tiktoken takes quadratic
# time for it (10 s for 100,000 letters) and the newest fails at a million spaces.
LONGEST_RUN = 1000
RUN = re.compile(r"\s+|\d+|[^\W\d_]+|(?:[^\w\s]|_)+")
# What begins a dialogue, what opens a message, what ends it, and what stands between its end and the next header.
LAYOUT = {"begin": "", "header": "<|{role}|>", "end": "<|end|>", "after": ""}


class Tokenizer:
    """A tiktoken encoding with the special tokens of the dialogue layout.

    name: "nanoism", the committed ranks, or the name of a tiktoken encoding, e.g. "gpt2", which tiktoken
    downloads. ValueError where that is unknown or cannot be had.
    With `ranks` the encoding is given instead of looked up: pattern and special tokens as tiktoken takes them, the
    special tokens that a text may contain (`spoken`), a function to apply to each text first, and the vocabulary's size
    if the model has rows beyond its tokens. Ranks at or beyond vocab_size are left out of what is encoded.
    default_system: the system prompt of a dialogue that has none, as the model was trained.
    """

    def __init__(self, name="nanoism", ranks=None, pattern=PATTERN, special=None, layout=LAYOUT,
                 spoken=(), normalize=str, vocab_size=0, default_system=""):
        foreign = [pattern, special] if ranks else []  # what, beside the ranks, tells two of these apart
        if ranks is None:
            ranks, pattern, others = load_named(name)
            n = max([*ranks.values(), *others.values()]) + 1
            added = [layout["header"].format(role=role) for role in ROLES] + [layout["end"]]
            special = {**others, **{token: n + i for i, token in enumerate(added)}}
        # A special token may be an ordinary one too, under the same id.
        others = [i for token, i in special.items() if ranks.get(token.encode()) != i]
        ids = [*ranks.values(), *others]
        # tiktoken panics or hangs where these do not hold.
        if not all(type(i) is int and 0 <= i < 1 << 21 for i in ids) or len({*ids}) < len(ids):
            raise ValueError(f"the tokenizer '{name}' is damaged: an id is there twice, or is no number from 0 to {1 << 21:,}")
        if "" in special or b"" in ranks or not all(bytes([b]) in ranks for b in range(256)):
            raise ValueError(f"the tokenizer '{name}' is damaged: a token is empty, or a byte has none")
        self.encoding = tiktoken.Encoding(f"{name}-chat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.normalize, self.spoken = normalize, set(spoken)
        self.default_system = default_system
        self.vocab_size = vocab_size or max([*ranks.values(), *special.values()]) + 1
        fixed = lambda text: self.encoding.encode(text, allowed_special="all")
        self.openings = {role: fixed(layout["header"].format(role=role)) for role in ROLES}
        self.headers = {role: opening[0] for role, opening in self.openings.items()}  # the special tokens of the roles
        self.begin, self.after = fixed(layout["begin"]), fixed(layout["after"])
        self.end = self.encoding.encode_single_token(layout["end"])
        sayable = {*ranks.values(), self.end, *(special[token] for token in self.spoken)}
        self.unsayable = sorted({*range(self.vocab_size)} - sayable)  # never to be sampled
        self.longest = max(map(len, ranks))  # bytes of the longest token
        self.identity = f"{name} {zlib.crc32(repr([*sorted(ranks.items()), *foreign]).encode()):08x}"

    def encode(self, text):
        """Text -> its token ids, a list; the spelling of a special token is text, unless it is among the spoken ones."""
        tokens = []
        for part in bounded(self.normalize(text)):
            tokens += self.encoding.encode(part, allowed_special=self.spoken, disallowed_special=())
        return [token for token in tokens if token < self.vocab_size]

    def encode_given(self, messages, header=True):
        """A run of given messages -> the tokens of the query segment, which ends with the answer's header if that is wanted.

        In a dialogue `begin` stands before the first query, and `after` before each query behind an answer.
        """
        tokens = []
        for message in messages:
            tokens += [*self.openings[message["role"]], *self.encode(message["content"]), self.end, *self.after]
        return tokens + self.openings["assistant"] * header

    def encode_answer(self, text):
        """An answer's text -> the tokens of the answer segment, which ends with <|end|>."""
        return self.encode(text) + [self.end]

    def encode_dialogue(self, messages):
        """[{"role": ..., "content": ...}, ...] -> (tokens, segments), two lists of integers of one length.

        Just what a chat over these messages holds in its cache. Neighbouring given messages are one query.
        """
        if self.default_system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        tokens, segments, given, segment, opening = [], [], [], 1, self.begin
        for message in messages:
            if message["role"] != "assistant" or message.get("given"):
                given.append(message)
                continue
            for part in (opening + self.encode_given(given), self.encode_answer(message["content"])):
                tokens += part
                segments += [segment] * len(part)
                segment += 1
            given, opening = [], self.after
        if given:  # cut off in a query
            part = opening + self.encode_given(given)
            tokens += part
            segments += [segment] * len(part)
        return tokens, segments

    def token_bytes(self, token):
        """The bytes of one token; a special token's are its spelling."""
        return self.encoding.decode_single_token_bytes(token)

    def decode(self, tokens):
        """Token ids -> text; bytes that are no UTF-8 become U+FFFD."""
        return self.encoding.decode(tokens, errors="replace")


def bounded(text):
    """A text in parts that make it up, cut only within runs of more than LONGEST_RUN characters."""
    if len(text) <= LONGEST_RUN:
        return [text]
    parts, start = [], 0
    for run in RUN.finditer(text):
        for cut in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
            parts.append(text[start:cut])
            start = cut
    return [*parts, text[start:]]


@functools.cache
def load_named(name):
    """(ranks, pattern, special tokens) of "nanoism" or of a tiktoken encoding. ValueError if it cannot be had."""
    if name == "nanoism":
        return read_ranks(RANKS), PATTERN, {}
    try:
        base = tiktoken.get_encoding(name)
    except Exception as error:  # unknown names and failed downloads come as many types
        raise ValueError(f"tokenizer '{name}' cannot be loaded ({type(error).__name__}); 'nanoism' needs no "
                         f"download, others are {', '.join(tiktoken.list_encoding_names())}") from None
    return base._mergeable_ranks, base._pat_str, base._special_tokens


def read_ranks(path):
    """{bytes: rank} of a file with a line for each token, its bytes in base 64 and its rank. ValueError if it is damaged."""
    try:
        pairs = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        raise ValueError(f"{path} is no rank file: a line is not a token in base 64 and its rank") from None
    if len(ranks) < len(pairs) or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path} is damaged: a token or a rank stands in it twice, or a rank is left out")
    return ranks


def pieces(text):
    """The pieces that PATTERN cuts a text into, in the words of the module re."""
    pattern = PATTERN.replace(r"[^\s\p{L}\p{N}]", r"[^\s\w]")
    return re.findall(pattern.replace(r"\p{N}", "[0-9]").replace(r"\p{L}", r"[^\W\d_]"), text)


def train_ranks(text, n):
    """Byte-pair encoding: 256 bytes, then n - 256 times the most frequent neighbouring pair, merged."""
    counts = collections.Counter(pieces(text))
    words = {tuple(bytes([byte]) for byte in piece.encode()): count for piece, count in counts.items()}
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < n:
        pairs = collections.Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[left + right] = len(ranks)
        merged = {}
        for word, count in words.items():
            new, i = [], 0
            while i < len(word):
                both = word[i:i + 2] == (left, right)
                new.append(left + right if both else word[i])
                i += 1 + both
            merged[tuple(new)] = merged.get(tuple(new), 0) + count
        words = merged
    return ranks


def add_words(ranks, text, n, leave_out):
    """Add the commonest words of a text to the ranks, up to n in all, and none of `leave_out`.

    Nor a word of two small letters: within a name it would be taken for a piece of it.
    """
    for word, _ in collections.Counter(pieces(text)).most_common():
        short = len(word) < 3 and word == word.lower().strip()
        if len(ranks) < n and not short and word.strip().lower() not in leave_out:
            ranks.setdefault(word.encode(), len(ranks))


if __name__ == "__main__":
    from data.dialogues import FAMILIES
    from data.words import CITIES, NAMES, NEW_CITIES, NEW_NAMES, Words

    # The merges come from names alone: behind a space and not, with a capital and without.
    names = NAMES + CITIES
    ranks = train_ranks("\n".join([" ".join(names), " ".join(names).lower(), *names]), N_PIECES)
    # All other words are whole. Each family is counted alike, in small letters too, as some people
    # type. The few names of one split stand for all, and are left out.
    rng, lines = random.Random(1), []
    for _, family in FAMILIES.values():
        for _ in range(3000):
            for query, answer in family(rng, Words(rng, "new_words")):
                lines += [query, query.lower(), answer]
    text = "\n".join(lines)
    add_words(ranks, text, N_RANKS, {word.lower() for word in NEW_NAMES + NEW_CITIES})
    lines = [base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items()]
    RANKS.write_bytes(b"".join(lines))
    length = len(text.encode()) / len(Tokenizer().encoding.encode_ordinary(text))
    print(f"{RANKS.name}: {len(ranks)} ranks, {length:.2f} bytes a token")
