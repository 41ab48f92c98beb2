"""
Text to token ids and back: a tiktoken Encoding, four special tokens, and the layout of a dialogue.

    query  = (<|system|> text <|end|>)? <|user|> text <|end|> <|assistant|>
    answer = text <|end|>

A query is given to the model, and its segment has an odd number. An answer is written by the model,
and its segment has an even number.

Other layouts differ in their strings alone. They may have tokens that begin the dialogue, and
tokens between an answer's <|end|> and the next header (data/hf/tokenizer.py has those of LLaMA 3
and ChatML).

The default encoding is built from `data/ranks.tiktoken`: 256 bytes, merges of them that are
frequent in names, and the words of `data/whole_words.txt`, which were the commonest of the
synthetic dialogues when models were first trained. Names are not among those words, so that each is
cut into pieces. A name that was never trained on is then made of the same pieces as all others, and
can be copied. Nothing is downloaded. `python -m data.tokenizer FILE` makes the ranks anew.
"""
import base64
import collections
import functools
import pathlib
import re
import zlib

import tiktoken

RANKS = pathlib.Path(__file__).parent / "ranks.tiktoken"
WHOLE_WORDS = RANKS.with_name("whole_words.txt")
N_PIECES = 480  # bytes and merges
# One token a digit. Runs are bounded, so that no text takes more than linear time to encode.
PATTERN = r" ?\p{N}| ?\p{L}{1,24}| ?[^\s\p{L}\p{N}]{1,8}|\s{1,8}"
ROLES = ("system", "user", "assistant")
# A longer run of letters, digits, signs or spaces is cut, since an older tiktoken takes quadratic
# time for it (10 s for 100,000 letters) and the newest fails at a million spaces.
LONGEST_RUN = 1000
RUN = re.compile(r"\s+|\d+|[^\W\d_]+|(?:[^\w\s]|_)+")


def make_layout(begin, header, end, after):
    """A dict of the strings around the texts of a dialogue.

    They begin the dialogue, open a message (header, with {role} in it), end a message, and stand
    between an answer and the next message's header (after).
    """
    return {"begin": begin, **{role: header.format(role=role) for role in ROLES},
            "end": end, "after": after}


LAYOUT = make_layout("", "<|{role}|>", "<|end|>", "")


class Tokenizer:
    """A tiktoken encoding with the special tokens of the dialogue layout.

    name: "nanoism" for the committed ranks, or a tiktoken encoding, e.g. "gpt2", which tiktoken
    downloads. ValueError where that is unknown or cannot be had.
    ranks: the encoding, where it is given instead of looked up. Those at or beyond vocab_size are
    left out of what is encoded.
    pattern, special: how text is split, and the special tokens with their ids, as in tiktoken.
    spoken: the special tokens that a text may contain.
    normalize: a function to apply to each text first.
    vocab_size: the rows of the model's embedding, if there are more of them than tokens.
    default_system: the system prompt of a dialogue that has none, as the model was trained.
    """

    def __init__(self, name="nanoism", ranks=None, pattern=PATTERN, special=None, layout=LAYOUT,
                 spoken=(), normalize=str, vocab_size=0, default_system=""):
        # What tells two tokenizers of one name apart, beside their ranks.
        foreign = [pattern, special] if ranks else edited(layout)
        if ranks is None:
            ranks, pattern, others = load_named(name)
            n = max([*ranks.values(), *others.values()]) + 1
            added = [layout[role] for role in ROLES] + [layout["end"]]
            special = {**others, **{token: n + i for i, token in enumerate(added)}}
        check_encoding(name, ranks, special)
        self.encoding = tiktoken.Encoding(
            f"{name}-chat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
        self.normalize, self.spoken = normalize, set(spoken)
        self.default_system = default_system
        self.trim = False  # whether spaces around a text are left out
        self.note = ""  # a line on what a folder's chat template writes otherwise
        self.encode_part = self.encoding.encode_ordinary  # twice as fast as to look for spoken ones
        if spoken:
            allowed = {"allowed_special": self.spoken, "disallowed_special": ()}
            self.encode_part = functools.partial(self.encoding.encode, **allowed)
        self.vocab_size = vocab_size or max([*ranks.values(), *special.values()]) + 1

        def fixed(text):
            return self.encoding.encode(text, allowed_special="all")

        self.openings = {role: fixed(layout[role]) for role in ROLES}
        # The part of an opening behind its last special token is encoded with the text, since a
        # tokenizer may merge the two.
        self.split = {}
        for role in ROLES:
            n = max([layout[role].rfind(token) + len(token) for token in special
                     if token in layout[role]], default=0)
            self.split[role] = fixed(layout[role][:n]), layout[role][n:]
        self.headers = {role: tokens[0] for role, tokens in self.openings.items()}
        self.begin, self.after = fixed(layout["begin"]), fixed(layout["after"])
        self.end = self.encoding.encode_single_token(layout["end"])
        sayable = {*ranks.values(), self.end, *(special[token] for token in self.spoken)}
        self.unsayable = sorted({*range(self.vocab_size)} - sayable)  # never to be sampled
        self.longest = max(map(len, ranks))  # bytes of the longest token
        checksum = zlib.crc32(repr([*sorted(ranks.items()), *foreign]).encode())
        self.identity = f"{name} {checksum:08x}"

    def encode(self, text):
        """Text -> its token ids, a list.

        A special token that is spelled in the text is plain text, unless it is a spoken one.
        """
        tokens = []
        for part in bounded(self.normalize(text)):
            tokens += self.encode_part(part)
        return [token for token in tokens if token < self.vocab_size]

    def encode_given(self, messages, header=True):
        """A run of given messages -> the tokens of the query segment.

        It ends with the header of the answer, if that is wanted. In a dialogue `begin` stands
        before the first query, and `after` before each query behind an answer.
        """
        tokens = []
        for message in messages:
            opening, rest = self.split[message["role"]]
            text = message["content"]
            if self.trim and text != self.default_system:
                text = text.strip()
            tokens += [*opening, *self.encode(rest + text), self.end, *self.after]
        if header:
            tokens += self.openings["assistant"]
        return tokens

    def encode_answer(self, text):
        """An answer's text -> the tokens of the answer segment, which ends with <|end|>."""
        return self.encode(text.strip() if self.trim else text) + [self.end]

    def encode_dialogue(self, messages):
        """[{"role": ..., "content": ...}, ...] -> (tokens, segments), two lists of one length.

        A chat over these messages holds just that in its cache. Given messages that follow one
        another are one query.
        """
        if self.default_system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        parts, given, opening = [], [], self.begin
        for message in messages:
            if message["role"] != "assistant" or message.get("given"):
                given.append(message)
                continue
            parts.append(opening + self.encode_given(given))
            parts.append(self.encode_answer(message["content"]))
            given, opening = [], self.after
        if given:  # cut off in a query
            parts.append(opening + self.encode_given(given))
        tokens = [token for part in parts for token in part]
        segments = [segment for segment, part in enumerate(parts, 1) for _ in part]
        return tokens, segments

    def token_bytes(self, token):
        """The bytes of one token; a special token's are its spelling."""
        return self.encoding.decode_single_token_bytes(token)

    def decode(self, tokens):
        """Token ids -> text; bytes that are no UTF-8 become U+FFFD."""
        return self.encoding.decode(tokens, errors="replace")


# The checksum of PATTERN and LAYOUT that the models were trained with that do not name it.
USUAL = 0x3FA08097


def edited(layout):
    """A list that is empty unless the pattern or the layout was edited: then of their checksum."""
    checksum = zlib.crc32(repr((PATTERN, layout)).encode())
    return [] if checksum == USUAL else [checksum]


def check_encoding(name, ranks, special):
    """ValueError for what tiktoken would panic or hang at."""
    damaged = f"the tokenizer '{name}' is damaged"
    most = 1 << 21
    # A special token may be an ordinary one too, under the same id.
    others = [i for token, i in special.items() if ranks.get(token.encode()) != i]
    ids = [*ranks.values(), *others]
    if not all(type(i) is int and 0 <= i < most for i in ids) or len({*ids}) < len(ids):
        raise ValueError(f"{damaged}: an id is there twice, or is no number from 0 to {most:,}")
    if "" in special or b"" in ranks or not all(bytes([b]) in ranks for b in range(256)):
        raise ValueError(f"{damaged}: a token is empty, or a byte has none")


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
    """(ranks, pattern, special tokens) of "nanoism" or of a tiktoken encoding.

    ValueError if it cannot be had.
    """
    if name == "nanoism":
        return read_ranks(RANKS), PATTERN, {}
    try:
        base = tiktoken.get_encoding(name)
    except Exception as error:  # unknown names and failed downloads come as many types
        why = f"tokenizer '{name}' cannot be loaded ({type(error).__name__})"
        others = ", ".join(tiktoken.list_encoding_names())
        raise ValueError(f"{why}; 'nanoism' needs no download, others are {others}") from None
    return base._mergeable_ranks, base._pat_str, base._special_tokens


def read_ranks(path):
    """{bytes: rank} of a file that has a line for each token: its bytes in base 64 and its rank.

    ValueError if it is damaged.
    """
    try:
        pairs = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        what = "a line is not a token in base 64 and its rank"
        raise ValueError(f"{path} is no rank file: {what}") from None
    if len(ranks) < len(pairs) or sorted(ranks.values()) != list(range(len(ranks))):
        what = "a token or a rank stands in it twice, or a rank is left out"
        raise ValueError(f"{path} is damaged: {what}")
    return ranks


def train_ranks(text, n):
    """Byte-pair encoding: 256 bytes, then n - 256 times the most frequent pair, merged."""
    # PATTERN, in the words of the module re, cuts the text into pieces.
    pattern = PATTERN.replace(r"[^\s\p{L}\p{N}]", r"[^\s\w]")
    pattern = pattern.replace(r"\p{N}", "[0-9]").replace(r"\p{L}", r"[^\W\d_]")
    words = {tuple(bytes([byte]) for byte in piece.encode()): count
             for piece, count in collections.Counter(re.findall(pattern, text)).items()}
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
            new = []
            for part in word:
                if new and (new[-1], part) == (left, right):
                    new[-1] += part
                else:
                    new.append(part)
            merged[tuple(new)] = merged.get(tuple(new), 0) + count
        words = merged
    return ranks


def make_ranks():
    """The ranks of the default encoding: {bytes: rank}."""
    from data.synthetic.words import CITIES, NAMES

    # The merges come from names alone: behind a space and not, with a capital and without.
    names = NAMES + CITIES
    ranks = train_ranks("\n".join([" ".join(names), " ".join(names).lower(), *names]), N_PIECES)
    # All other words are whole.
    for word in WHOLE_WORDS.read_text(encoding="utf-8").splitlines():
        ranks[word.encode()] = len(ranks)
    return ranks


if __name__ == "__main__":
    from data import machine

    with machine.errors_in_one_line("close other programs"):
        parser = machine.Parser("Make the ranks of the default encoding.")
        parser.add_argument("out", help="the file to write")
        out = pathlib.Path(parser.parse_args().out)
        lines = [base64.b64encode(token) + f" {i}\n".encode() for token, i in make_ranks().items()]
        out.write_bytes(b"".join(lines))
        same = "equal to" if out.read_bytes() == RANKS.read_bytes() else "not those of"
        print(f"{out}: {len(lines)} ranks, {same} {RANKS.name}, by which models were trained")
