"""
Six exercises: each asks for a few lines of code, and says right or wrong, with a hint.

    python demos/exercises.py          which of the six are right so far
    python demos/exercises.py 1        the task of the first, and the verdict on your answer

All answers stand in one file, demos/answers.py. The first call writes it, with `...` where an answer is missing; git does not
track it. `--answers FILE` judges another file: a teacher those of a class. An answer may use all of the code, and is never
compared with a text: it is run on random dialogues beside a loop that follows the words of the definition, or in a small GPT.
"""
import importlib.util
import random
import re
import subprocess
import sys
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data.machine import Parser
from data.tokenizer import Tokenizer
from mask import MASKS, causal, draw, ism, one_pass, prefix, reusable
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


class Wrong(Exception):
    """An answer is wrong; the message is the hint."""


def check(right, hint):
    if not right:
        raise Wrong(hint)


def begun(value, name):
    check(value is not ..., f"{name} is still `...`")
    return value


def as_tensor(value, name, shape):
    """A student's (B, T) as lists; Wrong if it is anything else."""
    begun(value, name)
    check(isinstance(value, torch.Tensor) and value.shape == shape, f"{name} has to return a tensor of the shape {tuple(shape)}")
    return value.tolist()


def dialogues(count, seed=0):
    """`count` random dialogues as segment numbers: queries and answers in turn, of 1 to 5 tokens."""
    rng = random.Random(seed)
    for _ in range(count):
        yield [number for number in range(1, rng.randint(2, 7)) for _ in range(rng.randint(1, 5))]


def batches(count):
    """Tensors (3, T) of dialogues, padded with 0 on the right."""
    rows = list(dialogues(3 * count))
    for i in range(0, len(rows), 3):
        T = max(map(len, rows[i : i + 3]))
        yield torch.tensor([row + [0] * (T - len(row)) for row in rows[i : i + 3]])


def ends(row):
    """The end of each token's segment: how many tokens stand up to it, itself included."""
    return [max(i for i, other in enumerate(row) if other == number) + 1 for number in row]


def gpt(n_layer, vocab_size=50):
    """A small random GPT in float64."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size, 64, n_layer, n_head=2, n_kv_head=2, n_embd=32, n_hidden=64)).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def cached(model, tokens, f):
    """The keys and values of tokens (1, T): (2, L, 1, H, T, D)."""
    cache = Cache(model.config, dtype=torch.float64)
    model(tokens, f, cache)
    return torch.stack([cache.k, cache.v])[..., : cache.length, :]


def exercise_1(a):
    """Look a little ahead

    Under ISM a query token sees its segment to the end. Let it see w tokens beyond itself, and no more:

        f(j) = min(the last position of j's segment, j + w)   in a query, counting from 1
        f(j) = j                                              elsewhere, in answers and in padding

    Write lookahead(segments, w): segments (B, T) -> f (B, T), as mask.py describes them. With w = 0 it is causal, with a large w
    it is ISM. One line will do.
    """
    for segments in batches(100):
        for w in (0, 1, 3, 100):
            got = as_tensor(a.lookahead(segments.clone(), w), "lookahead()", segments.shape)
            for row, mine in zip(segments.tolist(), got):
                for j, end in enumerate(ends(row), start=1):
                    kind = "padding" if row[j - 1] == 0 else "a query" if row[j - 1] % 2 else "an answer"
                    f = min(end, j + w) if kind == "a query" else j
                    check(mine[j - 1] == f, f"segments {row}, w = {w}: token {j} is in {kind} and sees {f} tokens; "
                                            f"yours sees {mine[j - 1]}")
    segments = torch.tensor([[1] * 6 + [2] * 3])
    f = a.lookahead(segments, 2)
    kept = reusable(a.lookahead(segments[:, :6], 2), f)
    return "\n".join(["With w = 2 a query of six tokens and an answer of three look like this:", *draw(f[0], list("QQQQQQAAA")),
                      f"A chat keeps {kept} of the query's 6 cache entries when the answer comes.",
                      "Put it into MASKS of mask.py with a w of your choice, and train.py and sample.py take it with --mask."])


def run_test(name, replace, path):
    """pytest on one test of tests/test_chat.py, in a process of its own, after the line of code `replace`."""
    script = ("import sys\nsys.path.insert(0, 'demos')\nimport pytest, sample\nfrom exercises import load\n" + replace
              + f"\nsys.exit(pytest.main(['-qx', '-p', 'no:cacheprovider', 'tests/test_chat.py::{name}']))")
    return subprocess.run([sys.executable, "-c", script, path], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


def exercise_2(a):
    """Break the cache

    The <|end|> that closes an answer is sampled and so not in the cache yet. Chat.stream (sample.py) feeds it alone, at once. Who
    saves that call, and feeds it together with the next query and without a mask (under ISM a query needs none), lets it see the
    query. Then its cache entry is wrong, and with it all that is written later. Do it:

    - Override feed() in Late, a subclass of Chat: a lone <|end|> is left for the next call, and that call, the only one with more
      than one token, sees everything. self.f (1, T) holds what each row sees.
    - SEES_IT is the name of a test of tests/test_chat.py that fails when Chat is Late.
    """
    model, tokenizer = gpt(3, Tokenizer().vocab_size), Tokenizer()
    chat = a.Late(model, tokenizer, ism, max_new_tokens=5)
    chat.send("I am Ann.")
    chat.send("Who am I?")
    tokens, segments = chat.layout()
    fresh = cached(model, torch.tensor([tokens]), ism(torch.tensor([segments])))
    held = torch.stack([chat.cache.k, chat.cache.v])[..., : chat.cache.length, :]
    off = (held - fresh[..., : chat.cache.length, :]).abs().amax((0, 1, 2, 3, 5))  # (T,)
    stale, end = (off > 1e-9).nonzero()[:, 0].tolist(), sum(map(len, chat.turns[0])) - 1
    waits = chat.cache.length < len(tokens)
    check(stale or waits, "The cache is as it should be: <|end|> still goes alone. stream() gives it to feed() as the only token")
    check(stale, "<|end|> waits for the next query, and yet every entry of the cache is right: feed() hands over the rows of self.f, "
                 "and they hide the query from it. That is what f is for. Let self.f hide nothing, as in a call without a mask")
    check(stale[0] == end, f"the first wrong cache entry is that of token {stale[0]}, {tokenizer.decode([tokens[stale[0]]])}; "
                           f"it should be token {end}, the <|end|> of the first answer")
    name = begun(a.SEES_IT, "SEES_IT")
    tests = (ROOT / "tests" / "test_chat.py").read_text(encoding="utf-8")
    check(re.search(rf"^def {re.escape(str(name))}\(", tests, re.M), f"tests/test_chat.py has no test {name!r}")
    late = run_test(name, "sample.Chat = load(sys.argv[1]).Late", a.__file__)
    check(late.returncode in (0, 1), "pytest does not run; pip install -r tests/requirements.txt. " + late.stderr[-200:])
    check(late.returncode, f"{name} passes with Late. Which test compares the cache with a forward pass of the whole dialogue?")
    own = run_test(name, "", a.__file__)
    check(own.returncode == 0, f"{name} fails with sample.py's own Chat as well. Undo what you changed in the core")
    said = [line[1:].strip() for line in late.stdout.splitlines() if line.startswith("E  ")]
    return (f"{len(stale)} of {chat.cache.length} cache entries are wrong, by up to {off.max():.1g}: from the first answer's <|end|> on.\n"
            f"{name} says: {said[0] if said else 'failed'}")


def hops(f, j, target):
    """How many layers bring what token `target` says to token j: a layer carries i to j if i < f[j]. None: no number does."""
    knows = {j}
    for layers in range(len(f) + 1):
        if target in knows:
            return layers
        knows |= {i for k in knows for i in range(f[k])}
    return None


def is_leak(row, f, j):
    """j may not be trained to predict the next token: after enough layers it has seen it."""
    return hops(f, j, j + 1) is not None


def exercise_3(a):
    """Derive the loss mask

    Position j may be trained to predict token j+1 if token j+1 is an answer's, and if nothing that reaches j has seen it: not j
    itself, not the tokens that j sees, not those that these see, and so on, since layers stack.

    - Write trained(segments, f): both (B, T) -> a boolean tensor (B, T). f may be any f, not only one of mask.py. Derive it
      before you look at how mask.py does it: follow the paths, or find what they come to.
    - LEAK is a dialogue for which the short rule "f(j) <= j, counting from 1" is not enough: ([segments], [f]), f your own, at
      which a position would be trained that has seen the answer.
    """
    rng = random.Random(1)
    for segments in batches(60):
        T = segments.shape[1]
        own = torch.tensor([[min(T, j + rng.choice((0, 0, 0, 1, 4))) for j in range(1, T + 1)] for _ in segments])
        for f in (causal(segments), ism(segments), prefix(segments), own):
            got = as_tensor(a.trained(segments.clone(), f.clone()), "trained()", segments.shape)
            for row, limits, mine in zip(segments.tolist(), f.tolist(), got):
                for j in range(T):
                    wanted = j + 1 < T and row[j + 1] > 0 and row[j + 1] % 2 == 0
                    right = wanted and not is_leak(row, limits, j)
                    why = ("the next token is no answer's" if not wanted else
                           "nothing that reaches it has seen the next token" if right else
                           f"the next token reaches it in {hops(limits, j, j + 1)} layers")
                    check(bool(mine[j]) == right, f"segments {row}, f {limits}: token {j + 1} (counting from 1) "
                                                  f"{'may' if right else 'may not'} be trained: {why}")
    row, f = begun(a.LEAK, "LEAK")
    T = len(row)
    check(len(f) == T and all(1 <= limit <= T for limit in f), "LEAK: segments and f have one length T, and f is from 1 to T")
    check(T <= 64, "LEAK: at most 64 tokens, please; four will do")
    leaks = [j for j in range(T - 1) if row[j + 1] > 0 and row[j + 1] % 2 == 0 and f[j] <= j + 1 and is_leak(row, f, j)]
    check(leaks, "LEAK: wherever f(j) <= j and the next token is an answer's, nothing that reaches j has seen that token. "
                 "Let j see a token that sees further than j")
    j = leaks[0]
    layers, tokens = hops(f, j, j + 1), torch.arange(T)[None] % 40
    other = tokens.clone()
    other[0, j + 1] = 45
    moved = [float((model(other, torch.tensor([f])) - model(tokens, torch.tensor([f])))[0, j].abs().max())
             for model in (gpt(layers - 1), gpt(layers))]
    return (f"In LEAK token {j + 1} sees no token after itself. Change token {j + 2}, which it should predict: its logits in a random GPT\n"
            f"move by {moved[0]:.1g} with n_layer = {layers - 1}, and by {moved[1]:.1g} with n_layer = {layers}.")


def exercise_4(a):
    """Prefix that reads nothing twice

    Under the prefix mask a chat throws its cache away at each turn. Suppose that it does not: it reads each query in one call,
    under prefix of the dialogue as it stands then, writes the answer token by token, and never reads a token again.

    - as_read(segments) is the f that each row had when it was read: segments (1, T) -> f (1, T). You may cut the dialogue and ask prefix.
    - WHICH mask of mask.py is that: "causal", "prefix" or "ism"?
    - STALE shows that it is not prefix: ([segments], n), a dialogue and a segment's end n, where prefix of the first n tokens alone
      gives some of them another f than prefix of the whole dialogue does.
    - LAYERS is the largest number of layers with which a prefix chat may keep its cache all the same. Think of what the keys and
      values of the first layer are made from.
    """
    for row in dialogues(200):
        segments = torch.tensor([row])
        got = as_tensor(a.as_read(segments), "as_read()", segments.shape)[0]
        for j, end in enumerate(ends(row)):
            stands = end if row[j] % 2 else j + 1  # how long the dialogue was when token j was read
            f = int(prefix(segments[:, :stands])[0, j])
            check(got[j] == f, f"segments {row}: token {j + 1} is read when the dialogue has {stands} tokens, and sees {f}; "
                               f"yours sees {got[j]}")
    which = begun(a.WHICH, "WHICH")
    check(which in MASKS, 'WHICH is "causal", "prefix" or "ism"')
    rows = [torch.tensor([row]) for row in dialogues(50)]
    check(all(torch.equal(a.as_read(row), MASKS[which](row)) for row in rows),
          f"as_read() is not {which}: draw both for a dialogue of two turns (mask.draw)")
    row, n = begun(a.STALE, "STALE")
    check(0 < n < len(row) <= 64 and row[n] != row[n - 1],
          "STALE: n is where a segment ends, before the dialogue's end (at most 64 tokens)")
    part, whole = prefix(torch.tensor([row[:n]])), prefix(torch.tensor([row]))
    check(not torch.equal(part, whole[:, :n]), f"STALE: prefix of the first {n} tokens is {part[0].tolist()}, and that of the whole "
                                               "dialogue begins so too. What has to come after the cut?")
    tokens, model = torch.arange(len(row))[None] % 40, gpt(4)
    apart = cached(model, tokens[:, :n], part) - cached(model, tokens, whole)[..., :n, :]  # (2, L, 1, H, n, D)
    off = apart.abs().amax((0, 2, 3, 4, 5)).tolist()  # L numbers
    check(begun(a.LAYERS, "LAYERS") == sum(moved < 1e-9 for moved in off),
          "LAYERS: a cache holds keys and values, and each layer makes them from what the layer below wrote")
    return (f"A prefix chat that reads nothing twice is {which}. On STALE the keys and values of the {n} cached tokens are off by\n"
            + "\n".join(f"   layer {i}: {moved:.1g}" for i, moved in enumerate(off, start=1))
            + "\nThe first layer's are made from the tokens alone. From the second on prefix has to read them again.")


def exercise_5(a):
    """Count without counting

    What attention costs is how many pairs of a token and a token that it sees there are. Write pairs(lengths): the lengths of a
    dialogue's segments, [query, answer, query, answer, ...] in tokens -> three numbers, the pairs that training all its answers
    once takes under causal, ism and prefix. Causal and ISM pass over the dialogue once. Prefix needs a copy for each turn: all up to
    the end of that turn's answer, where all up to the end of its query see each other. No tensor is needed.
    """
    rng = random.Random(2)
    for size in [5] * 100 + [3000] * 20:
        lengths = [rng.randint(1, size) for _ in range(2 * rng.randint(1, 4))]
        row = torch.repeat_interleave(torch.arange(1, len(lengths) + 1), torch.tensor(lengths))[None]  # (1, T)
        got = begun(a.pairs(list(lengths)), "pairs()")
        check(isinstance(got, (tuple, list)) and len(got) == 3, "pairs() returns three numbers: causal, ism, prefix")
        for name, mine in zip(("causal", "ism", "prefix"), got):
            copies = [row] if one_pass(MASKS[name]) else [row[:, : sum(lengths[:k])] for k in range(2, len(lengths) + 1, 2)]
            counted = sum(int(MASKS[name](copy).sum()) for copy in copies)
            hint = {"causal": "Token j sees j tokens", "ism": "A query of n tokens has n (n - 1) / 2 pairs more than under causal",
                    "prefix": "In the copy of a turn whose query ends at e, e tokens see e tokens each"}[name]
            check(mine == counted, f"lengths {lengths}, {name}: {counted} pairs, yours are {mine}. {hint}")
    shares = [(n, a.pairs([n, 20] * 5)) for n in (5, 20, 100)]
    return "\n".join(["Five turns with answers of 20 tokens, in pairs of causal:",
                      *(f"   queries of {n:3} tokens: ism {i / c:.2f}, prefix {p / c:.2f}" for n, (c, i, p) in shares)])


def chain(mask, length, n_layer, backward=False):
    """True if n_layer layers follow a chain of `length` definitions, each token of which points to the next.

    All stand in one query, whose last token asks for the end of the chain and points to its start. In a layer each token
    that sees the token it points to takes over where that one pointed before the layer.
    """
    f = mask(torch.ones(1, length + 1, dtype=torch.long))[0].tolist()
    order = list(range(length))[:: -1 if backward else 1]  # where the first, second, ... definition of the chain stands
    points = dict(zip(order, order[1:] + order[-1:])) | {length: order[0]}
    for _ in range(n_layer):
        points = {j: points[to] if to < f[j] else to for j, to in points.items()}
    return points[length] == order[-1]


def longest_chain(mask, n_layer, backward=False):
    return max(length for length in range(1, 2**n_layer + 2) if chain(mask, length, n_layer, backward))


def exercise_6(a):
    """Where causal falls behind

    "a is b. b is c. c is d. d is 7. What is a?" stands in one query: a chain of four definitions, each before the one that it
    needs. Think of each definition as one token that points to the definition it needs (the last, "d is 7", to itself), and of the
    query's last token as one that asks, and points to the first definition. In a layer all tokens at once do this: who sees the
    token that it points to points from now on where that one pointed before the layer. The question is answered when the asking
    token points to the last definition.

    Write longest(n_layer): the lengths of the longest chains that n_layer layers answer, under causal and under ism, two numbers.
    """
    for n_layer in range(1, 8):
        got = begun(a.longest(n_layer), "longest()")
        check(isinstance(got, (tuple, list)) and len(got) == 2, "longest() returns two numbers: causal, ism")
        hints = ("No definition sees the one that it needs. Who moves at all", "All definitions move in each layer. How far do they point then")
        for mask, mine, hint in zip((causal, ism), got, hints):
            true = longest_chain(mask, n_layer)
            check(mine == true, f"under {mask.__name__} the longest chain for n_layer = {n_layer} has {true} definitions, yours {mine}. {hint}?")
    segments = torch.tensor([[1] * 8 + [2] * 4])
    tokens = torch.arange(12)[None]
    apart = [float((gpt(n)(tokens, ism(segments)) - gpt(n)(tokens, causal(segments)))[0, 7:].abs().max()) for n in (1, 2)]
    lengths = [(n, longest_chain(causal, n), longest_chain(ism, n), longest_chain(causal, n, backward=True)) for n in range(1, 6)]
    return "\n".join(["layers   causal   ism   causal, each definition after the one that it needs",
                      *("{:6}   {:6}   {:3}   {:6}".format(*row) for row in lengths),
                      "With one layer they are even, and not in this game alone: in a random GPT the logits of an answer differ between",
                      f"ISM and causal by {apart[0]:.1g} with one layer and by {apart[1]:.1g} with two. A trained model need not follow the game."])


EXERCISES = [exercise_1, exercise_2, exercise_3, exercise_4, exercise_5, exercise_6]


def load(path):
    """A file of answers as a module."""
    spec = importlib.util.spec_from_file_location("answers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def judge(number, path):
    """The verdict on one exercise: (right, what to say about it)."""
    try:
        with torch.no_grad():
            return True, EXERCISES[number - 1](load(path))
    except Wrong as hint:
        return False, f"{hint}."
    except Exception as error:  # whatever a student's code may raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = lines[-1] if lines else getattr(error, "lineno", None)  # a SyntaxError has it
        place = f"line {line}" if line else "an answer has another form than was asked for"
        return False, f"{path.name}, {place}: {type(error).__name__}: {error}"


def main():
    parser = Parser(description="Six exercises, judged.", allow_abbrev=False)
    parser.add_argument("number", nargs="?", type=int, choices=range(1, 7), help="which exercise (without it: the verdicts on all six)")
    parser.add_argument("--answers", metavar="FILE", default=str(ROOT / "demos" / "answers.py"), help="your answers (demos/answers.py)")
    a = parser.parse_args()
    path = Path(a.answers).resolve()
    try:
        if not path.exists():
            path.write_text(STUB, encoding="utf-8")
            print(f"Wrote {path}: your answers go there.\n")
    except OSError as error:
        sys.exit(f"exercises.py: cannot write {path}: {error.strerror}")
    verdicts = {}
    for number in [a.number] if a.number else range(1, 7):
        title, _, task = EXERCISES[number - 1].__doc__.partition("\n\n")
        if a.number:
            print(f"{number}. {title}\n\n" + re.sub(r"^    ", "", task.rstrip(), flags=re.M) + f"\n\nYour answer goes into {path}\n")
        right, said = verdicts[number] = judge(number, path)
        word = "right" if right else "wrong"
        print(f"{word}: {said}" if a.number else f"{number}. {title:34} {word}", flush=True)
    if not a.number:
        print("\npython demos/exercises.py N prints the task N, and why an answer is wrong.")
    sys.exit(not all(right for right, _ in verdicts.values()))


if __name__ == "__main__":
    main()
