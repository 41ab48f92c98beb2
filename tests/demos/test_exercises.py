"""The exercises in a copy of the tree: right answers are right, slightly wrong ones wrong."""
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "demos"))
import exercises

REFERENCE = '''
import torch

from mask import causal, ism, loss_positions, prefix
from sample import Chat


def lookahead(segments, w):
    return torch.minimum(ism(segments), causal(segments) + w)


class Late(Chat):
    def feed(self, *tokens):
        if tokens == (self.tokenizer.end,):
            return None
        if len(tokens) > 1:
            start = self.cache.length
            end = start + len(tokens)
            self.f[:, start:end] = end
        return super().feed(*tokens)


SEES_IT = "test_random_sessions"


def trained(segments, f):
    following = torch.cat([segments[:, 1:], torch.zeros_like(segments[:, :1])], 1)
    unseen = f.cummax(1).values <= torch.arange(1, f.shape[1] + 1)
    return (following > 0) & (following % 2 == 0) & unseen


LEAK = ([1, 1, 2], [3, 2, 3])


def as_read(segments):
    T = segments.shape[1]
    f = prefix(segments).clone()
    for end in range(T, 0, -1):
        answer = end < T and segments[0, end] % 2 == 0
        if end == T or answer or segments[0, end] != segments[0, end - 1]:
            f[:, :end] = prefix(segments[:, :end])
    for j in range(T):
        if segments[0, j] % 2 == 0:
            f[:, j] = prefix(segments[:, : j + 1])[:, j]
    return f


WHICH = "ism"
STALE = ([1, 1, 2, 2, 3, 4], 4)
LAYERS = 1


def pairs(lengths):
    T = sum(lengths)
    causal = T * (T + 1) // 2
    ism = causal + sum(n * (n - 1) // 2 for n in lengths[::2])
    prefix = 0
    for k in range(0, len(lengths), 2):
        e, n = sum(lengths[: k + 1]), lengths[k + 1]
        prefix += e * e + n * e + n * (n + 1) // 2
    return causal, ism, prefix


def longest(n_layer):
    return n_layer + 1, 2**n_layer
'''

LOOKAHEAD = "torch.minimum(ism(segments), causal(segments) + w)"
CLAMPED = "(causal(segments) + w).clamp(max=segments.shape[1])"
LATE_END = "        if tokens == (self.tokenizer.end,):\n            return None\n"
AS_READ = "    f = prefix(segments).clone()"
STALE = "([1, 1, 2, 2, 3, 4], 4)"
LEAK = "([1, 1, 2], [3, 2, 3])"
QUERIES = "sum(n * (n - 1) // 2 for n in lengths[::2])"
ALL = "sum(n * (n - 1) // 2 for n in lengths)"

# The number of the exercise, what is replaced in the reference, by what, words of the hint.
WRONG = [
    (1, "causal(segments) + w", "causal(segments) + w + 1", "w = 0: token"),
    (1, LOOKAHEAD, "causal(segments) + w", "is in"),
    (1, LOOKAHEAD, "ism(segments)", "a query and sees"),
    (1, LOOKAHEAD, CLAMPED, "yours sees"),
    (1, LOOKAHEAD, "[1, 2, 3]", "a tensor of the shape"),
    (1, LOOKAHEAD, "causal(segments) + v", "NameError"),
    (1, LOOKAHEAD, "torch.minimum(", "SyntaxError"),
    (2, "if len(tokens) > 1:", "if False:", "they hide the query from it"),
    (2, "            return None", "            pass", "still goes alone"),
    (2, "self.f[:, start:end] = end", "self.f[:, start:end] = 1", "put back"),
    (2, LATE_END, "", "still goes alone"),
    (2, '"test_random_sessions"', '"test_what_a_terminal_sends"', "passes with Late"),
    (2, '"test_random_sessions"', '"test_no_such"', "has no test"),
    (3, "f.cummax(1).values", "f", "in 2 layers"),
    (3, "f.cummax(1).values", "f.amax(1, keepdim=True)", "nothing that reaches it"),
    (3, "& (following % 2 == 0) ", "", "no answer's"),
    (3, "<= torch.arange(1, f", "< torch.arange(1, f", "may be trained"),
    (3, LEAK, "([1, 1, 2], [2, 3, 3])", "sees further than j"),
    (3, LEAK, "([1, 1, 2], [3, 2, 4])", "from 1 to T"),
    (3, LEAK, "3", "another form"),
    (4, AS_READ, "    return prefix(segments)", "when the dialogue has"),
    (4, AS_READ, "    return causal(segments)", "when the dialogue has"),
    (4, '"ism"', '"causal"', "is not causal"),
    (4, STALE, "([1, 1, 2, 2, 3, 4], 5)", "What has to come after the cut?"),
    (4, STALE, "([1, 1, 2, 2, 3, 4], 3)", "where a segment ends"),
    (4, "LAYERS = 1", "LAYERS = 0", "the layer below"),
    (5, "T * (T + 1)", "T * (T - 1)", "Token j sees j tokens"),
    (5, QUERIES, ALL, "than under causal"),
    (5, "prefix += e * e", "prefix = e * e", "In the copy of a turn"),
    (6, "return n_layer + 1", "return 2**n_layer", "Who moves"),
    (6, "2**n_layer", "2 * n_layer", "How far"),
]


def run(tree, *arguments):
    command = [sys.executable, "demos/exercises.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True,
                          encoding="utf-8", timeout=300)


def verdicts(done):
    """The last word of each exercise's line."""
    return [line.split()[-1] for line in done.stdout.splitlines() if line[:1].isdigit()]


@pytest.mark.slow
def test_from_the_empty_file_to_six_right_answers(tree):
    answers = tree / "demos" / "answers.py"
    first = run(tree)
    assert first.returncode == 1 and not first.stderr
    assert answers.read_text(encoding="utf-8") == exercises.STUB
    assert verdicts(first) == ["open"] * 6
    answers.write_text(REFERENCE, encoding="utf-8")
    last = run(tree)
    assert last.returncode == 0 and not last.stderr
    assert verdicts(last) == ["right"] * 6


@pytest.mark.parametrize("number", (1, 6))
def test_the_command_prints_the_task_and_the_hint(tree, tmp_path, number):
    """Another file of answers, with one wrong change."""
    path = tmp_path / "mine.py"
    _, old, new, words = next(case for case in WRONG if case[0] == number)
    path.write_text(REFERENCE.replace(old, new), encoding="utf-8")
    done = run(tree, str(number), "--answers", str(path))
    title, _, task = exercises.EXERCISES[number - 1].__doc__.partition("\n\n")
    assert done.returncode == 1 and not done.stderr
    assert done.stdout.startswith(f"{number}. {title}\n\n{task.strip().splitlines()[0]}")
    assert "\nwrong: " in done.stdout and words in done.stdout
    assert max(map(len, done.stdout.split("\n\nYour answer")[0].splitlines())) <= 100


def judged(number, source, path):
    path.write_text(source, encoding="utf-8")
    return exercises.judge(number, path)


@pytest.mark.parametrize("number, old, new, words", WRONG)
def test_wrong_answer_is_wrong(number, old, new, words, tmp_path):
    assert REFERENCE.count(old) == 1
    verdict, said = judged(number, REFERENCE.replace(old, new), tmp_path / "answers.py")
    assert verdict == "wrong" and words in said, said


@pytest.mark.parametrize("number, source, words", [
    *((number, exercises.STUB, "still `...`") for number in range(1, 7)),
    (4, REFERENCE.replace("LAYERS = 1", "LAYERS = ..."), "LAYERS is still"),
    (5, REFERENCE.replace("return causal, ism, prefix", "pass"), "pairs() is None"),
    (6, REFERENCE.replace("def longest", "def other"), "longest is not in"),
])
def test_missing_answer_is_open(number, source, words, tmp_path):
    verdict, said = judged(number, source, tmp_path / "answers.py")
    assert verdict == "open" and words in said


def test_another_way_to_a_right_answer_is_right(tmp_path):
    """Loops instead of vectors: what is judged is what an answer does."""
    loops = '''
def lookahead(segments, w):
    f = []
    for row in segments.tolist():
        f.append([])
        for j in range(len(row)):
            end = j + 1
            while row[j] % 2 and end < len(row) and row[end] == row[j] and end < j + 1 + w:
                end += 1
            f[-1].append(end)
    return torch.tensor(f)
'''
    reuse = "\n\ndef trained(segments, f):\n    return loss_positions(segments, f)\n"
    for number, more in ((1, loops), (3, reuse)):
        verdict, said = judged(number, REFERENCE + more, tmp_path / "answers.py")
        assert verdict == "right", said


@pytest.mark.parametrize("arguments, words", [
    (("7",), "invalid choice: 7"),
    (("--answers", "/no/such/folder/x.py"), "cannot write"),
    (("--answer=x",), "unrecognized"),
])
def test_user_errors_are_one_line(tree, arguments, words):
    done = run(tree, *arguments)
    assert done.returncode != 0 and words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_chain_game_is_what_it_says():
    """The last exercise's formulas against the game, and ISM, for which the order is nothing."""
    for n_layer in range(1, 7):
        assert exercises.longest_chain(exercises.causal, n_layer) == n_layer + 1
        assert exercises.longest_chain(exercises.causal, n_layer, backward=True) == 2**n_layer
        for mask in (exercises.ism, exercises.prefix):
            assert exercises.longest_chain(mask, n_layer) == 2**n_layer
            assert exercises.longest_chain(mask, n_layer, backward=True) == 2**n_layer
    assert torch.equal(exercises.causal(torch.ones(1, 3)), torch.tensor([[1, 2, 3]]))
