"""
Six exercises: each asks for a few lines of code, and says right, wrong or open, with a hint.

    python demos/exercises.py          which of the six are right so far
    python demos/exercises.py 1        the task of the first, and the verdict on your answer

All answers stand in one file, demos/answers.py. The first call writes it, with `...` where an
answer is missing; git does not track it. `--answers FILE` judges another file: a teacher those of a
class. An answer may use all of the code, and is never compared with a text. It is run on random
dialogues beside a loop that follows the words of the definition, or in a small GPT.
"""
import importlib.util
import random
import re
import subprocess
import sys
import textwrap
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import machine
from data.tokenizer import Tokenizer
from mask import MASKS, causal, draw, ism, prefix, reusable, row_ends
from model import GPT, Cache, GPTConfig

STUB = '''"""
My answers. `python demos/exercises.py 1` prints the first task and judges what stands here.
"""
import torch

from mask import MASKS, causal, dense, ism, prefix
from sample import Chat


# 1. Look a little ahead
def lookahead(segments, w):
    return ...


# 2. Break the cache
class Late(Chat):
    def feed(self, *tokens):
        return super().feed(*tokens)


SEES_IT = ...  # the name of a test, "test_..."


# 3. Derive the loss mask
def trained(segments, f):
    return ...


LEAK = ...  # ([segments], [f]), two lists of one length


# 4. Prefix that reads nothing twice
def as_read(segments):
    return ...


WHICH = ...  # "causal", "prefix" or "ism"
STALE = ...  # ([segments], n)
LAYERS = ...  # a number


# 5. Count without counting
def pairs(lengths):
    return ...  # causal, ism, prefix


# 6. Where causal falls behind
def longest(n_layer):
    return ...  # causal, ism
'''


# --- what the exercises share -------------------------------------------------------------------


class Wrong(Exception):
    """An answer is wrong; the message is the hint."""


class Open(Exception):
    """An answer is missing; the message says which."""


def check(right, hint):
    if not right:
        raise Wrong(hint)


def begun(value, name):
    if value is ...:
        raise Open(f"{name} is still `...`")
    if value is None:
        raise Open(f"{name} is None")
    return value


def as_lists(value, name, shape):
    """A student's tensor (B, T) as lists; Wrong if it is anything else."""
    begun(value, name)
    fits = isinstance(value, torch.Tensor) and value.shape == shape
    check(fits, f"{name} has to return a tensor of the shape {tuple(shape)}")
    return value.tolist()


def numbers(value, name, masks):
    """A student's numbers, one for each mask; Wrong if they are anything else."""
    begun(value, name)
    fits = isinstance(value, (tuple, list)) and len(value) == len(masks)
    check(fits, f"{name} has to return {len(masks)} numbers: {', '.join(masks)}")
    return value


def dialogues(count):
    """`count` random dialogues as segment numbers: queries and answers of 1 to 5 tokens."""
    rng = random.Random(0)
    for _ in range(count):
        n_segments = rng.randint(2, 7)
        yield [number for number in range(1, n_segments) for _ in range(rng.randint(1, 5))]


def batches(count):
    """Tensors (3, T) of dialogues, padded with 0 on the right."""
    rows = list(dialogues(3 * count))
    for i in range(0, len(rows), 3):
        three = rows[i : i + 3]
        T = max(map(len, three))
        yield torch.tensor([row + [0] * (T - len(row)) for row in three])


def is_query(number):
    return number % 2 == 1


def is_answer(number):
    return number > 0 and number % 2 == 0


def ends(row):
    """The end of each token's segment: how many tokens stand up to it, itself included."""
    return [max(i for i, other in enumerate(row) if other == number) + 1 for number in row]


def gpt(n_layer, vocab_size=50):
    """A small random GPT in float64."""
    torch.manual_seed(0)
    sizes = {"n_head": 2, "n_kv_head": 2, "n_embd": 32, "n_hidden": 64}
    model = GPT(GPTConfig(vocab_size, block_size=64, n_layer=n_layer, **sizes)).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def entries(cache):
    """The keys and values that a cache holds: (2, L, 1, H, T, D)."""
    return torch.stack([cache.k, cache.v])[..., : cache.length, :]


def cached(model, tokens, f):
    """The keys and values of tokens (1, T), all read in one call: (2, L, 1, H, T, D)."""
    cache = Cache(model.config, dtype=torch.float64)
    model(tokens, f, cache)
    return entries(cache)


# --- 1 ------------------------------------------------------------------------------------------


def exercise_1(a):
    """Look a little ahead

    Under ISM a query token sees its segment to the end. Let it see w tokens beyond itself, and no
    more:

        f(j) = min(the last position of j's segment, j + w)   in a query, counting from 1
        f(j) = j                                              elsewhere: in answers, in padding

    Write lookahead(segments, w): segments (B, T) -> f (B, T), as mask.py describes them. With w = 0
    it is causal, with a large w it is ISM. One line will do.
    """
    for segments in batches(100):
        for w in (0, 1, 3, 100):
            got = as_lists(a.lookahead(segments.clone(), w), "lookahead()", segments.shape)
            for row, mine in zip(segments.tolist(), got):
                check_lookahead(row, w, mine)
    segments = torch.tensor([[1] * 6 + [2] * 3])
    f = a.lookahead(segments, 2)
    kept = reusable(a.lookahead(segments[:, :6], 2), f)
    return "\n".join([
        "With w = 2 a query of six tokens and an answer of three look like this:",
        *draw(f[0], list("QQQQQQAAA")),
        f"A chat keeps {kept} of the query's 6 cache entries when the answer comes.",
        "Put it into mask.py, and into MASKS with a w of your choice, which takes a function of",
        "segments alone: \"ahead\": lambda segments: lookahead(segments, 2). Then train.py and",
        "sample.py take it with --mask ahead.",
    ])


def check_lookahead(row, w, mine):
    """f of one dialogue, token by token."""
    for j, (number, end) in enumerate(zip(row, ends(row)), start=1):
        f, kind = j, "padding"
        if is_query(number):
            f, kind = min(end, j + w), "a query"
        elif is_answer(number):
            kind = "an answer"
        check(mine[j - 1] == f, f"segments {row}, w = {w}: token {j} is in {kind} and sees {f} "
                                f"tokens; yours sees {mine[j - 1]}")


# --- 2 ------------------------------------------------------------------------------------------


def exercise_2(a):
    """Break the cache

    The model says <|end|> to close an answer. That token is not in the cache yet, so Chat.close
    (sample.py) feeds it, alone. It looks as if this call could be saved: let <|end|> wait, and feed
    it together with the next query. Under ISM a query is read without a mask. So <|end|> would see
    the query, its cache entry would be wrong, and so would all that is written later. Do it:

    - Override feed() in Late, a subclass of Chat. A call with <|end|> alone feeds nothing and keeps
      it for the next call. That one feeds it before its own tokens, and each of them sees all.
      self.f (1, T) holds what each row sees.
    - SEES_IT is the name of a test in tests/test_chat.py that fails when Chat is Late.
    """
    tokenizer = Tokenizer()
    model = gpt(3, tokenizer.vocab_size)
    chat = a.Late(model, tokenizer, ism, max_new_tokens=5)
    chat.send("I am Ann.")
    chat.send("Who am I?")
    off = off_by(chat)  # (T,)
    if a.SEES_IT is ... and chat.cache.length == len(off) and off.max() < 1e-9:
        raise Open("Late does what Chat does, and SEES_IT is still `...`")
    check_late(chat, off)
    name = begun(a.SEES_IT, "SEES_IT")
    failed = check_test(name, a.__file__)
    stale = int((off > 1e-9).sum())
    return (f"{stale} of {chat.cache.length} cache entries are wrong, by up to {off.max():.1g}: "
            f"from the first answer's <|end|> on.\n{name} says: {failed}")


def off_by(chat):
    """By how much each entry of a chat's cache is not that of one fresh forward: (T,)."""
    tokens, segments = chat.layout()
    fresh = cached(chat.model, torch.tensor([tokens]), ism(torch.tensor([segments])))
    held = entries(chat.cache)
    return (held - fresh[..., : chat.cache.length, :]).abs().amax((0, 1, 2, 3, 5))


def check_late(chat, off):
    """Is the cache wrong, and from the first answer's <|end|> on?"""
    tokens, _ = chat.layout()
    stale = (off > 1e-9).nonzero()[:, 0].tolist()
    waits = chat.cache.length < len(tokens)
    check(stale or waits, "The cache is as it should be: <|end|> still goes alone. close() gives "
                          "it to feed() as the only token")
    check(stale, "<|end|> waits for the next query, and yet every entry of the cache is right: "
                 "feed() hands over the rows of self.f, and they hide the query from it. That is "
                 "what f is for. For this one call let self.f hide nothing, as in a call without "
                 "a mask. Then put it back: the next turn compares it with the new f")
    query, answer = chat.turns[0]
    end = len(query) + len(answer) - 1
    check(stale[0] > 0, "every cache entry is wrong, from the first on: self.f was changed and not "
                        "put back, so that the next turn trusts nothing and reads all again")
    first = chat.tokenizer.decode([tokens[stale[0]]])
    check(stale[0] == end, f"the first wrong cache entry is that of token {stale[0]}, {first}; it "
                           f"should be token {end}, the <|end|> of the first answer")


def check_test(name, path):
    """A test that passes with Chat and fails with Late, in which it says this."""
    tests = (ROOT / "tests" / "test_chat.py").read_text(encoding="utf-8")
    there = re.search(rf"^def {re.escape(str(name))}\(", tests, re.M)
    check(there, f"tests/test_chat.py has no test {name!r}")
    late = run_test(name, "sample.Chat = load(sys.argv[1]).Late", path)
    ran = late.returncode in (0, 1)
    check(ran, "pytest does not run; pip install -r tests/requirements.txt. " + late.stderr[-200:])
    check(late.returncode == 1, f"{name} passes with Late. Which test compares the cache with a "
                                "forward pass of the whole dialogue?")
    own = run_test(name, "", path)
    check(own.returncode == 0, f"{name} fails with sample.py's own Chat as well. Undo what you "
                               "changed in the core")
    errors = [line[1:].strip() for line in late.stdout.splitlines() if line.startswith("E  ")]
    return errors[0] if errors else "failed"


def run_test(name, replace, path):
    """pytest on one test of tests/test_chat.py, in a process of its own, after a line of code."""
    script = f"""
import sys
sys.path.insert(0, "demos")
import pytest, sample
from exercises import load
{replace}
flags = ["-qx", "-p", "no:cacheprovider", "-o", "addopts="]  # in this process, with its Chat
sys.exit(pytest.main([*flags, "tests/test_chat.py::{name}"]))
"""
    command = [sys.executable, "-c", script, path]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


# --- 3 ------------------------------------------------------------------------------------------


def exercise_3(a):
    """Derive the loss mask

    Position j may be trained to predict token j+1 if token j+1 is an answer's, and if nothing that
    reaches j has seen it: not j itself, not the tokens that j sees, not those that these see, and
    so on, since layers stack.

    - Write trained(segments, f): both (B, T) -> a boolean tensor (B, T). f may be any f in
      which each token sees itself, f(j) >= j, not only one of mask.py. Derive it before you look
      at how mask.py does it: follow the paths, or find what they come to.
    - LEAK is a dialogue for which the short rule "f(j) <= j, counting from 1" is not enough:
      ([segments], [f]), f your own, at which a position would be trained that has seen the answer.
    """
    rng = random.Random(1)
    for segments in batches(60):
        T = segments.shape[1]
        own = [[min(T, j + rng.choice((0, 0, 0, 1, 4))) for j in range(1, T + 1)]
               for _ in segments]
        for f in (causal(segments), ism(segments), prefix(segments), torch.tensor(own)):
            got = as_lists(a.trained(segments.clone(), f.clone()), "trained()", segments.shape)
            for row, limits, mine in zip(segments.tolist(), f.tolist(), got):
                check_trained(row, limits, mine)
    row, f = begun(a.LEAK, "LEAK")
    return show_leak(row, f, first_leak(row, f))


def hops(f, j, target):
    """How many layers bring what token `target` says to token j; None if no number of them does.

    A layer carries what token i says to token j if i < f[j].
    """
    knows = {j}
    for layers in range(len(f) + 1):
        if target in knows:
            return layers
        knows |= {i for k in knows for i in range(f[k])}
    return None


def is_leak(f, j):
    """j may not be trained to predict the next token: after enough layers it has seen it."""
    return hops(f, j, j + 1) is not None


def check_trained(row, f, mine):
    """The loss mask of one dialogue, token by token."""
    for j in range(len(row)):
        may, why = "may not", "the next token is no answer's"
        if j + 1 < len(row) and is_answer(row[j + 1]):
            why = f"the next token reaches it in {hops(f, j, j + 1)} layers"
            if not is_leak(f, j):
                may, why = "may", "nothing that reaches it has seen the next token"
        check(bool(mine[j]) == (may == "may"), f"segments {row}, f {f}: token {j + 1} (counting "
                                               f"from 1) {may} be trained: {why}")


def first_leak(row, f):
    """The first position that the short rule would train though it has seen the answer."""
    T = len(row)
    fits = len(f) == T and all(1 <= limit <= T for limit in f)
    check(fits, "LEAK: segments and f have one length T, and f is from 1 to T")
    check(T <= 64, "LEAK: at most 64 tokens, please; four will do")
    for j in range(T - 1):
        by_short_rule = is_answer(row[j + 1]) and f[j] <= j + 1
        if by_short_rule and is_leak(f, j):
            return j
    raise Wrong("LEAK: wherever f(j) <= j and the next token is an answer's, nothing that reaches "
                "j has seen that token. Let j see a token that sees further than j")


def show_leak(row, f, j):
    """Change the token that j should predict: do its logits move?"""
    layers = hops(f, j, j + 1)
    f = torch.tensor([f])
    tokens = torch.arange(len(row))[None] % 40
    other = tokens.clone()
    other[0, j + 1] = 45
    moved = []
    for model in (gpt(layers - 1), gpt(layers)):
        moved.append(float((model(other, f) - model(tokens, f))[0, j].abs().max()))
    return (f"In LEAK token {j + 1} sees no token after itself. Change token {j + 2}, which it "
            f"should predict:\nits logits in a random GPT move by {moved[0]:.1g} with n_layer = "
            f"{layers - 1}, and by {moved[1]:.1g} with n_layer = {layers}.")


# --- 4 ------------------------------------------------------------------------------------------


def exercise_4(a):
    """Prefix that reads nothing twice

    Under the prefix mask a chat throws its cache away at each turn. Suppose that it does not: it
    reads each query in one call, under prefix of the dialogue as it stands then, writes the answer
    token by token, and never reads a token again.

    - as_read(segments) is the f that each row had when it was read: segments (1, T) -> f (1, T).
      You may cut the dialogue and ask prefix.
    - WHICH mask of mask.py is that: "causal", "prefix" or "ism"?
    - STALE shows that it is not prefix: ([segments], n), a dialogue and a segment's end n, where
      prefix of the first n tokens alone gives some of them another f than prefix of the whole
      dialogue does.
    - LAYERS is the largest number of layers with which a prefix chat may keep its cache all the
      same. Think of what the keys and values of the first layer are made from.
    """
    for row in dialogues(200):
        check_as_read(a, row)
    which = begun(a.WHICH, "WHICH")
    check(which in MASKS, 'WHICH is "causal", "prefix" or "ism"')
    for row in dialogues(50):
        segments = torch.tensor([row])
        check(torch.equal(a.as_read(segments), MASKS[which](segments)),
              f"as_read() is not {which}: draw both for a dialogue of two turns (mask.draw)")
    row, n = begun(a.STALE, "STALE")
    off = off_by_layer(row, n)
    exact = [moved for moved in off if moved < 1e-9]
    check(begun(a.LAYERS, "LAYERS") == len(exact),
          "LAYERS: a cache holds keys and values, and each layer makes them from what the layer "
          "below wrote")
    return "\n".join([
        f"A prefix chat that reads nothing twice is {which}.",
        f"On STALE the keys and values of the {n} cached tokens are off by",
        *(f"   layer {i}: {moved:.1g}" for i, moved in enumerate(off, start=1)),
        "The first layer's are made from the tokens alone. From the second on prefix has to read "
        "them again.",
    ])


def check_as_read(a, row):
    """The f of each row when it was read."""
    segments = torch.tensor([row])
    got = as_lists(a.as_read(segments), "as_read()", segments.shape)[0]
    for j, end in enumerate(ends(row)):
        # How long the dialogue was when token j was read.
        stands = end if is_query(row[j]) else j + 1
        f = int(prefix(segments[:, :stands])[0, j])
        check(got[j] == f, f"segments {row}: token {j + 1} is read when the dialogue has {stands} "
                           f"tokens, and sees {f}; yours sees {got[j]}")


def off_by_layer(row, n):
    """By how much the keys and values of n tokens are others in the whole dialogue: a list (L,)."""
    cut = 0 < n < len(row) <= 64 and row[n] != row[n - 1]
    check(cut, "STALE: n is where a segment ends, before the dialogue's end (at most 64 tokens)")
    part = prefix(torch.tensor([row[:n]]))  # (1, n)
    whole = prefix(torch.tensor([row]))  # (1, T)
    same = torch.equal(part, whole[:, :n])
    check(not same, f"STALE: prefix of the first {n} tokens is {part[0].tolist()}, and that of the "
                    "whole dialogue begins so too. What has to come after the cut?")
    tokens = torch.arange(len(row))[None] % 40  # (1, T)
    model = gpt(4)
    cut_short = cached(model, tokens[:, :n], part)  # (2, L, 1, H, n, D)
    off = cut_short - cached(model, tokens, whole)[..., :n, :]
    return off.abs().amax((0, 2, 3, 4, 5)).tolist()


# --- 5 ------------------------------------------------------------------------------------------

PAIR_HINTS = {
    "causal": "Token j sees j tokens",
    "ism": "A query of n tokens has n (n - 1) / 2 pairs more than under causal",
    "prefix": "In the copy of a turn whose query ends at e, e tokens see e tokens each",
}


def exercise_5(a):
    """Count without counting

    What attention costs is how many pairs of a token and a token that it sees there are. Write
    pairs(lengths): the lengths of a dialogue's segments, [query, answer, query, answer, ...] in
    tokens -> three numbers, the pairs that training all its answers once takes under causal, ism
    and prefix. Causal and ISM pass over the dialogue once. Prefix needs a copy for each turn: all
    up to the end of that turn's answer, where all up to the end of its query see each other. No
    tensor is needed.
    """
    rng = random.Random(2)
    for size in [5] * 100 + [3000] * 20:
        lengths = [rng.randint(1, size) for _ in range(2 * rng.randint(1, 4))]
        got = numbers(a.pairs(list(lengths)), "pairs()", tuple(PAIR_HINTS))
        for name, mine in zip(PAIR_HINTS, got):
            counted = count_pairs(name, lengths)
            check(mine == counted, f"lengths {lengths}, {name}: {counted} pairs, yours are {mine}. "
                                   f"{PAIR_HINTS[name]}")
    lines = ["Five turns with answers of 20 tokens, in pairs of causal:"]
    for n in (5, 20, 100):
        of_causal, of_ism, of_prefix = a.pairs([n, 20] * 5)
        shares = f"ism {of_ism / of_causal:.2f}, prefix {of_prefix / of_causal:.2f}"
        lines.append(f"   queries of {n:3} tokens: {shares}")
    return "\n".join(lines)


def count_pairs(name, lengths):
    """The pairs by the mask itself, over the copies that it is trained with."""
    mask = MASKS[name]
    numbers = torch.arange(1, len(lengths) + 1)
    row = torch.repeat_interleave(numbers, torch.tensor(lengths))[None]  # (1, T)
    return sum(int(mask(row[:, :end]).sum()) for end in row_ends(mask, row[0].tolist()))


# --- 6 ------------------------------------------------------------------------------------------


def exercise_6(a):
    """Where causal falls behind

    "a is b. b is c. c is d. d is 7. What is a?" stands in one query: a chain of four definitions,
    each before the one that it needs. Think of each definition as one token that points to the
    definition it needs (the last, "d is 7", to itself), and of the query's last token as one that
    asks, and points to the first definition. In a layer all tokens at once do this: who sees the
    token that it points to points from now on where that one pointed before the layer. The question
    is answered when the asking token points to the last definition.

    Write longest(n_layer): the lengths of the longest chains that n_layer layers answer, under
    causal and under ism, two numbers.
    """
    hints = ("No definition sees the one that it needs. Who moves at all?",
             "All definitions move in each layer. How far do they point then?")
    for n_layer in range(1, 8):
        got = numbers(a.longest(n_layer), "longest()", ("causal", "ism"))
        for mask, mine, hint in zip((causal, ism), got, hints):
            right = longest_chain(mask, n_layer)
            check(mine == right, f"under {mask.__name__} the longest chain for n_layer = {n_layer} "
                                 f"has {right} definitions, yours {mine}. {hint}")
    lines = ["layers   causal   ism   causal, each definition after the one that it needs"]
    for n in range(1, 6):
        by_causal = longest_chain(causal, n)
        by_ism = longest_chain(ism, n)
        backward = longest_chain(causal, n, backward=True)
        lines.append(f"{n:6}   {by_causal:6}   {by_ism:3}   {backward:6}")
    lines.append("A trained model need not follow the game.")
    return "\n".join(lines)


def chain(mask, length, n_layer, backward=False):
    """True if n_layer layers follow a chain of `length` definitions.

    All stand in one query. Each is a token that points to the next; the query's last token asks for
    the end of the chain, and points to its start. backward: the end of the chain stands first.
    """
    f = mask(torch.ones(1, length + 1, dtype=torch.long))[0].tolist()
    order = list(range(length))  # where the first, second, ... definition of the chain stands
    if backward:
        order.reverse()
    points = dict(zip(order, order[1:]))
    points[order[-1]] = order[-1]
    points[length] = order[0]
    for _ in range(n_layer):
        # Who sees the token it points to takes over where that one pointed before the layer.
        points = {j: points[to] if to < f[j] else to for j, to in points.items()}
    return points[length] == order[-1]


def longest_chain(mask, n_layer, backward=False):
    lengths = range(1, 2**n_layer + 2)
    return max(length for length in lengths if chain(mask, length, n_layer, backward))


# --- the verdict --------------------------------------------------------------------------------

EXERCISES = [exercise_1, exercise_2, exercise_3, exercise_4, exercise_5, exercise_6]


def load(path):
    """A file of answers as a module."""
    spec = importlib.util.spec_from_file_location("answers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def judge(number, path):
    """The verdict on one exercise: ("right", "wrong" or "open", what to say about it)."""
    try:
        with torch.no_grad():
            return "right", EXERCISES[number - 1](load(path))
    except (Open, Wrong) as error:
        hint = str(error)
        verdict = "open" if isinstance(error, Open) else "wrong"
        return verdict, hint if hint.endswith("?") else f"{hint}."
    except Exception as error:  # whatever a student's code may raise
        if isinstance(error, AttributeError) and getattr(error.obj, "__name__", "") == "answers":
            return "open", f"{error.name} is not in {path.name}."
        where = place(error, path)
        return "wrong", f"{path.name}, {where}: {type(error).__name__}: {error}"


def place(error, path):
    """Where in the answers an error was raised, in words."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    if not lines and isinstance(error, SyntaxError):
        lines.append(error.lineno)
    return f"line {lines[-1]}" if lines else "an answer has another form than was asked for"


def task(number):
    """(title, text) of an exercise."""
    title, _, text = EXERCISES[number - 1].__doc__.partition("\n\n")
    return title, textwrap.dedent(text).rstrip()


def judge_one(number, path):
    """Print the task and the verdict on its answer -> whether it is right."""
    title, text = task(number)
    print(f"{number}. {title}\n\n{text}\n\nYour answer goes into {path}\n")
    verdict, why = judge(number, path)
    print(f"{verdict}: {why}")
    return verdict == "right"


def judge_all(path):
    """Print a line for each exercise -> whether all are right."""
    verdicts = []
    for number in range(1, len(EXERCISES) + 1):
        title, _ = task(number)
        verdict, _ = judge(number, path)
        print(f"{number}. {title:34} {verdict}", flush=True)
        verdicts.append(verdict)
    print("\npython demos/exercises.py N prints the task N, and why an answer is wrong or open.")
    return {*verdicts} == {"right"}


def main():
    parser = machine.Parser("Six exercises, judged.")
    parser.add_argument("number", nargs="?", type=int, choices=range(1, len(EXERCISES) + 1),
                        help="which exercise (without it: the verdicts on all six)")
    parser.add_argument("--answers", metavar="FILE", default=str(ROOT / "demos" / "answers.py"),
                        help="your answers (default: demos/answers.py)")
    a = parser.parse_args()
    path = Path(a.answers).resolve()
    with machine.errors_in_one_line("close what else runs here"):
        try:
            if not path.exists():
                path.write_text(STUB, encoding="utf-8")
                print(f"Wrote {path}: your answers go there.\n")
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}") from None
        right = judge_one(a.number, path) if a.number else judge_all(path)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
