"""
Attention masks as a vector.

Everything that a mask decides is one integer per token: f(j), how many leading tokens token j may see
(the upper bound of the sum in the ISM paper's formula). A mask here is a function from segments to f:

    segments  (B, T) integers: 0 is padding (on the right), odd is a query segment (given to the model),
              even is an answer segment (written by it); numbers never decrease along a dialogue.
              data/tokenizer.py lays a dialogue out.
    f         (B, T) integers: row j may attend to the columns 0 .. f[j] - 1. The paper counts from 1: the f[j] of a
              tensor is its f(j + 1), so causal is f[j] = j + 1.

All the rest follows from f: the dense mask, where there is loss, and what a KV cache may keep.
To add a mask, write one such function and put it into MASKS. `python mask.py` draws them.
"""
import torch


def causal(segments):
    """Each token sees its past and itself: f(j) = j, counting from 1."""
    B, T = segments.shape
    return torch.arange(1, T + 1, device=segments.device).expand(B, T)


def ism(segments):
    """A query token sees its whole segment and all before it; an answer token is causal (paper: ISM)."""
    j = causal(segments)
    T = segments.shape[1]
    last = torch.ones_like(segments, dtype=torch.bool)  # (B, T) the last token of each segment
    last[:, :-1] = segments[:, 1:] != segments[:, :-1]
    # The nearest last token at or after each one: a running minimum from the right.
    end = torch.where(last, j, T).flip(1).cummin(1).values.flip(1)  # (B, T) the end of each token's segment
    return torch.where(segments % 2 == 1, end, j)


def prefix(segments):
    """All up to the end of the row's last query sees all of it; what follows is causal (a prefix LM).

    So f changes as a dialogue goes on, and each turn is trained in a row of its own (see one_pass).
    """
    j = causal(segments)
    end = torch.where(segments % 2 == 1, j, 0).cummax(1).values[:, -1:]  # (B, 1) the end of the last query
    return torch.maximum(j, end)


MASKS = {"causal": causal, "prefix": prefix, "ism": ism}


def annealed(mask, share):
    """The mask that has gone `share` of the way from causal to `mask`, from 0 to 1; rounded to whole tokens."""
    return lambda segments: (j := causal(segments)) + (share * (mask(segments) - j)).round().long()


def dense(f):
    """f (B, T) -> boolean (B, T, T), True where row j may attend to column i."""
    return torch.arange(f.shape[1], device=f.device) < f[..., None]


def loss_positions(segments, f, answers_only=True):
    """Where predicting the next token is trained: boolean (B, T).

    The next token must be an answer's (answers_only=False: any real token), and nothing that reaches
    position j may have seen it. Layers stack, so j knows all that any token before it has seen: the
    condition is max(f(1), ..., f(j)) <= j, not f(j) <= j.
    """
    following = torch.zeros_like(segments)  # (B, T) the segment of the next token, 0 after the last
    following[:, :-1] = segments[:, 1:]
    wanted = following > 0
    if answers_only:
        wanted &= following % 2 == 0
    return wanted & (f.cummax(1).values <= causal(segments))


def one_pass(mask):
    """True if one pass over a dialogue trains all its answers; a prefix mask needs one copy per turn."""
    segments = torch.tensor([[1, 1, 2, 2, 3, 3, 4, 4]])
    return bool((loss_positions(segments, mask(segments)).sum() == (segments % 2 == 0).sum()))


def reusable(old, new):
    """How many leading entries of one dialogue's KV cache, built under f `old` (1, S), hold under f `new` (1, T).

    Rows before the first change keep their f, but those that see a changed row change with it. So the cut
    must also be one that no row before it looks across.
    """
    n = min(old.shape[1], new.shape[1])
    same = (old[:, :n] == new[:, :n]).cumprod(1).bool()  # True up to the first row that changes
    closed = new[:, :n].cummax(1).values <= causal(new[:, :n])  # True where a cut after this row is clean
    return int((causal(new[:, :n]) * (same & closed)).amax()) if n else 0


def draw(f, labels, columns=60):
    """f (T,) and T labels -> lines of text, one a token: '#' its past, '+' its future, '.' hidden.

    With more tokens than `columns` a cell stands for several tokens and shows the first of them.
    """
    T = len(labels)
    cells = [c * T // min(T, columns) for c in range(min(T, columns))]
    width = max(map(len, labels), default=0)
    return [f"{label:>{width}} " + "".join("." if i >= end else "#" if i <= j else "+" for i in cells)
            for j, (label, end) in enumerate(zip(labels, f.tolist()))]


if __name__ == "__main__":
    text = "<|user|> I'm Ann <|end|> <|assistant|> Hi Ann <|end|> <|user|> Who am I? <|end|> <|assistant|> You're Ann <|end|>"
    segments = torch.tensor([[1] * 5 + [2] * 3 + [3] * 6 + [4] * 3])
    labels = text.split()
    drawn = [draw(mask(segments)[0], labels) for mask in MASKS.values()]
    margin = max(map(len, labels)) + 1
    print(" " * margin + "   ".join(f"{name:{len(labels)}}" for name in MASKS))
    for first, *others in zip(*drawn):
        print("   ".join([first] + [line[margin:] for line in others]))
    print("A row is a token and what it sees: '#' its past and itself, '+' its future, '.' hidden.")
