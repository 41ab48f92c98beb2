"""
A mask is a vector.

Attention lets each token of a dialogue look at others, and a mask says at which. All that the
masks here decide is one integer for each token: f(j), how many leading tokens token j may see.
It is the upper bound of the sum in the paper's formula. The words:

    segment   a run of tokens. Odd numbers are queries (given to the model), even numbers are
              answers (written by it), 0 is padding and stands on the right. Numbers never
              decrease along a dialogue.
    mask      a function from segments (B, T) to f (B, T), both tensors of integers.
    f         row j may attend to the columns 0 .. f[j] - 1. The paper counts tokens from 1, a
              tensor counts from 0: f[j] here is the paper's f(j + 1), so causal is f[j] = j + 1.

Two turns, a row for each token: '#' its past and itself, '+' its future, '.' hidden.

    token     segment    causal    f    ISM       f    ISM sink  f    prefix    f
    Who             1    #......   1    #+.....   2    #......   1    #++++..   5
    ?               1    ##.....   2    ##.....   2    ##.....   2    ##+++..   5
    Ann             2    ###....   3    ###....   3    ###....   3    ###++..   5
    And             3    ####...   4    ####+..   5    ####+..   5    ####+..   5
    I?              3    #####..   5    #####..   5    #####..   5    #####..   5
    You're          4    ######.   6    ######.   6    ######.   6    ######.   6
    Ben             4    #######   7    #######   7    #######   7    #######   7

All the rest follows from f: the square of booleans that a textbook calls the mask, the positions
where there is a loss, and what a KV cache may keep. `python mask.py` draws a longer dialogue.
"""
import torch


def causal(segments):
    """Each token sees its past and itself: f(j) = j, counting from 1."""
    B, T = segments.shape
    return torch.arange(1, T + 1, device=segments.device).expand(B, T)  # (B, T)


def ism(segments):
    """A query's token sees its whole query and all before it; an answer is causal (paper: ISM)."""
    T = segments.shape[1]
    j = causal(segments)  # (B, T)
    # A token is the last of its segment if the next one has another number.
    last = torch.ones_like(segments, dtype=torch.bool)  # (B, T)
    last[:, :-1] = segments[:, 1:] != segments[:, :-1]
    # A segment ends at the first such token from here on: the smallest j of those to the right.
    end = torch.where(last, j, T)  # (B, T)
    end = end.flip(1).cummin(1).values.flip(1)
    return torch.where(segments % 2 == 1, end, j)  # (B, T)


def ism_sink(segments):
    """ISM, but f(1) = 1: the first token stays the sink that a model trained causally leans on.

    A head that looks for nothing rests its attention on the first token. That token is known by
    what it saw: itself alone. Under ISM it sees its whole query, and heads find no place to rest.
    """
    f = ism(segments)  # (B, T)
    f[:, :1] = 1
    return f


def prefix(segments):
    """All up to the end of the last query sees all of it; what follows is causal (a prefix LM).

    The last query is another one at each turn. So f changes while a dialogue grows, and each turn
    is trained in a row of its own.
    """
    j = causal(segments)  # (B, T)
    end = torch.where(segments % 2 == 1, j, 0)  # (B, T)
    end = end.cummax(1).values[:, -1:]  # (B, 1)
    return torch.maximum(j, end)  # (B, T)


# A mask of your own is one function as above and one entry here: `python train.py --mask yours`.
MASKS = {"causal": causal, "prefix": prefix, "ism": ism, "ism_sink": ism_sink}


def dense(f, S=0):
    """f (B, T) -> booleans (B, T, S), True where row j may attend to column i; S is T if 0."""
    return torch.arange(S or f.shape[1], device=f.device) < f[:, :, None]


def loss_positions(segments, f, answers_only=True):
    """Where the prediction of the next token is trained: booleans (B, T).

    The next token must be an answer's (answers_only=False: any but padding), and nothing that
    reaches position j may have seen it. Layers stack: through the tokens that it sees, j knows all
    that those have seen. So the condition is max(f(1), ..., f(j)) <= j. A look at f(j) alone would
    miss what leaks in through an earlier token.
    """
    following = torch.zeros_like(segments)  # (B, T) the segment of the next token, if there is one
    following[:, :-1] = segments[:, 1:]
    wanted = following > 0
    if answers_only:
        wanted &= following % 2 == 0
    unseen = f.cummax(1).values <= causal(segments)  # (B, T)
    return wanted & unseen


def reusable(old, new):
    """How many leading entries of a KV cache, filled under f `old` (1, S), hold under `new` (1, T).

    An entry holds if its row sees what it saw, and all that it sees holds as well. So the cache is
    cut at a place up to which no f has changed, and across which no row before it looks.
    """
    n = min(old.shape[1], new.shape[1])
    if n == 0:
        return 0
    old, new = old[:, :n], new[:, :n]
    j = causal(new)  # (1, n)
    unchanged = (old == new).cumprod(1).bool()  # (1, n) True up to the first row that changes
    closed = new.cummax(1).values <= j  # (1, n) True where no row up to here looks further
    return int(torch.where(unchanged & closed, j, 0).max())


def check(f, shape):
    """ValueError if f is not an integer from 1 on for each token of this shape (B, T)."""
    if not isinstance(f, torch.Tensor):
        raise ValueError(f"a mask returns a tensor of integers, not a {type(f).__name__}")
    if f.dtype.is_floating_point or f.dtype == torch.bool:
        raise ValueError(f"a mask returns integers, how many tokens each may see, not {f.dtype}")
    if f.shape != shape:
        raise ValueError(f"f needs an integer for each token {tuple(shape)}, not {tuple(f.shape)}")
    if f.numel() > 0 and f.min() < 1:
        raise ValueError(f"each token must see at least one; the mask returned a {int(f.min())}")


# ==== below this line: masks on their way into training, and the drawing ====


def one_pass(mask):
    """True if one pass over a dialogue trains its answers as a chat writes them, turn by turn.

    A prefix needs a copy a turn: what its tokens see changes while a dialogue grows.
    """
    segments = torch.tensor([[1, 1, 2, 2, 3, 3, 4, 4]])
    f = mask(segments)
    check(f, segments.shape)
    first_turn = segments[:, :4]
    return torch.equal(mask(first_turn), f[:, :4])


def row_ends(mask, segments):
    """Segments of a dialogue, a list -> where the rows end that train all its answers, a list.

    It is one row with all tokens, or where one pass is not enough, a row a turn up to its answer.
    """
    return [len(segments)] if one_pass(mask) else answer_ends(segments)


def answer_ends(segments):
    """Segments of a dialogue, a list -> how many tokens stand up to the end of each answer."""
    pairs = zip(segments, [*segments[1:], None])  # each token's segment and that of the next one
    return [j for j, (number, following) in enumerate(pairs, 1)
            if number % 2 == 0 and number != following]


def annealed(mask, share):
    """The mask that has gone `share` (0 to 1) of the way from causal to `mask`, in whole tokens."""

    def between(segments):
        j = causal(segments)
        return j + (share * (mask(segments) - j)).round().long()

    return between


def draw(f, labels, columns=60):
    """f (T,) and T labels -> a line of text for each token, as at the top of this file.

    With more tokens than `columns` a cell stands for several tokens and shows the first of them.
    """
    T = len(labels)
    n = min(T, columns)
    shown = [c * T // n for c in range(n)]  # the token that each cell shows
    width = max(map(len, labels), default=0)
    lines = []
    for j, (label, end) in enumerate(zip(labels, f.tolist())):
        past = "".join("#" for i in shown if i <= j and i < end)
        future = "".join("+" for i in shown if j < i < end)
        lines.append(f"{label:>{width}} {(past + future).ljust(n, '.')}")
    return lines


if __name__ == "__main__":
    turns = [
        "<|user|> I'm Ann <|end|> <|assistant|>", "Hi Ann <|end|>",
        "<|user|> Who am I? <|end|> <|assistant|>", "You're Ann <|end|>",
    ]
    labels = " ".join(turns).split()
    segments = torch.tensor([[i + 1 for i, turn in enumerate(turns) for _ in turn.split()]])
    margin = max(map(len, labels)) + 1
    names = list(MASKS)
    for start in range(0, len(names), 3):  # three stand beside one another in 80 columns
        shown, drawn = names[start : start + 3], []
        for name in shown:
            f = MASKS[name](segments)
            check(f, segments.shape)
            drawn.append(draw(f[0], labels))
        title = "   ".join(f"{name:{len(labels)}}" for name in shown)
        print((" " * margin + title).rstrip())
        for first, *others in zip(*drawn):
            print("   ".join([first, *(line[margin:] for line in others)]))
        print()
    print("A row is a token: '#' its past and itself, '+' the future it sees, '.' hidden.")
