"""The exercises in a copy of the tree: reference answers are judged right, an empty file and many slightly wrong answers wrong."""
import os
import shutil
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
            self.f[:, start : start + len(tokens)] = start + len(tokens)
        return super().feed(*tokens)


SEES_IT = "test_random_sessions"


def trained(segments, f):
    following = torch.cat([segments[:, 1:], torch.zeros_like(segments[:, :1])], 1)
    return (following > 0) & (following % 2 == 0) & (f.cummax(1).values <= torch.arange(1, f.shape[1] + 1))


LEAK = ([1, 1, 2], [3, 2, 3])


def as_read(segments):
    f = prefix(segments).clone()
    for end in range(segments.shape[1], 0, -1):
        if end == segments.shape[1] or segments[0, end] % 2 == 0 or segments[0, end] != segments[0, end - 1]:
            f[:, :end] = prefix(segments[:, :end])
    for j in range(segments.shape[1]):
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

# number of the exercise, what is replaced in the reference, by what, words of the hint
WRONG = [
    (1, "causal(segments) + w", "causal(segments) + w + 1", "w = 0: token"),
    (1, "torch.minimum(ism(segments), causal(segments) + w)", "causal(segments) + w", "is in"),
    (1, "torch.minimum(ism(segments), causal(segments) + w)", "ism(segments)", "a query and sees"),
    (1, "torch.minimum(ism(segments), causal(segments) + w)", "(causal(segments) + w).clamp(max=segments.shape[1])", "yours sees"),
    (1, "torch.minimum(ism(segments), causal(segments) + w)", "[1, 2, 3]", "a tensor of the shape"),
    (1, "torch.minimum(ism(segments), causal(segments) + w)", "causal(segments) + v", "NameError"),
    (1, "torch.minimum(ism(segments), causal(segments) + w)", "torch.minimum(", "SyntaxError"),
    (2, "        if len(tokens) > 1:\n            start", "        if False:\n            start", "they hide the query from it"),
    (2, "            return None", "            pass", "still goes alone"),
    (2, "self.f[:, start : start + len(tokens)] = start", "self.f[:, start : start + len(tokens)] = 0 * start + 1 +", "first wrong"),
    (2, "        if tokens == (self.tokenizer.end,):\n            return None\n", "", "still goes alone"),
    (2, '"test_random_sessions"', '"test_printable"', "passes with Late"),
    (2, '"test_random_sessions"', '"test_no_such"', "has no test"),
    (3, "f.cummax(1).values", "f", "in 2 layers"),
    (3, "f.cummax(1).values", "f.amax(1, keepdim=True)", "nothing that reaches it"),
    (3, "& (following % 2 == 0) ", "", "no answer's"),
    (3, "<= torch.arange(1, f", "< torch.arange(1, f", "may be trained"),
    (3, "([1, 1, 2], [3, 2, 3])", "([1, 1, 2], [2, 3, 3])", "sees further than j"),
    (3, "([1, 1, 2], [3, 2, 3])", "([1, 1, 2], [3, 2, 4])", "from 1 to T"),
    (3, "([1, 1, 2], [3, 2, 3])", "3", "another form"),
    (4, "    f = prefix(segments).clone()", "    return prefix(segments)", "when the dialogue has"),
    (4, "    f = prefix(segments).clone()", "    return causal(segments)", "when the dialogue has"),
    (4, '"ism"', '"causal"', "is not causal"),
    (4, "([1, 1, 2, 2, 3, 4], 4)", "([1, 1, 2, 2, 3, 4], 5)", "What has to come after the cut?"),
    (4, "([1, 1, 2, 2, 3, 4], 4)", "([1, 1, 2, 2, 3, 4], 3)", "where a segment ends"),
    (4, "LAYERS = 1", "LAYERS = 0", "the layer below"),
    (4, "LAYERS = 1", "LAYERS = ...", "still `...`"),
    (5, "T * (T + 1)", "T * (T - 1)", "Token j sees j tokens"),
    (5, "causal + sum(n * (n - 1) // 2 for n in lengths[::2])", "causal + sum(n * (n - 1) // 2 for n in lengths)", "than under causal"),
    (5, "prefix += e * e", "prefix = e * e", "In the copy of a turn"),
    (6, "return n_layer + 1", "return 2**n_layer", "Who moves"),
    (6, "2**n_layer", "2 * n_layer", "How far"),
]


def run(tree, *arguments):
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "demos/exercises.py", *arguments], cwd=tree, env=environment, capture_output=True,
                          text=True, encoding="utf-8", timeout=300)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what a student has: no answers yet."""
    copy = tmp_path_factory.mktemp("classroom") / "tree"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "out", "cache", "__pycache__", "answers.py"))
    return copy


def test_from_the_empty_file_to_six_right_answers(tree):
    answers = tree / "demos" / "answers.py"
    first = run(tree)
    assert first.returncode == 1 and not first.stderr and answers.read_text(encoding="utf-8") == exercises.STUB
    assert [line[-5:] for line in first.stdout.splitlines() if line[:1].isdigit()] == ["wrong"] * 6
    answers.write_text(REFERENCE, encoding="utf-8")
    last = run(tree)
    assert last.returncode == 0 and not last.stderr
    assert [line[-5:] for line in last.stdout.splitlines() if line[:1].isdigit()] == ["right"] * 6


def test_each_verdict_of_the_command(tree, tmp_path):
    """Another file of answers, one wrong change for each exercise: the task and the hint are printed."""
    path = tmp_path / "mine.py"
    for number in (1, 6):
        _, old, new, words = next(case for case in WRONG if case[0] == number)
        path.write_text(REFERENCE.replace(old, new), encoding="utf-8")
        done = run(tree, str(number), "--answers", str(path))
        title, _, task = exercises.EXERCISES[number - 1].__doc__.partition("\n\n")
        assert done.returncode == 1 and not done.stderr
        assert done.stdout.startswith(f"{number}. {title}\n\n{task.strip().splitlines()[0]}")
        assert "\nwrong: " in done.stdout and words in done.stdout


def judged(number, source, path):
    path.write_text(source, encoding="utf-8")
    return exercises.judge(number, path)


@pytest.mark.parametrize("number, old, new, words", WRONG)
def test_wrong_answer_is_wrong(number, old, new, words, tmp_path):
    assert REFERENCE.count(old) == 1
    right, said = judged(number, REFERENCE.replace(old, new), tmp_path / "answers.py")
    assert not right and words in said, said


@pytest.mark.parametrize("number", range(1, 7))
def test_missing_answer_is_wrong(number, tmp_path):
    right, said = judged(number, exercises.STUB, tmp_path / "answers.py")
    assert not right and (number == 2 or "still `...`" in said)


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
        right, said = judged(number, REFERENCE + more, tmp_path / "answers.py")
        assert right, said


@pytest.mark.parametrize("arguments, words", [
    (("7",), "invalid choice: 7"), (("--answers", "/no/such/folder/x.py"), "cannot write"), (("--answer=x",), "unrecognized")])
def test_user_errors_are_one_line(tree, arguments, words):
    done = run(tree, *arguments)
    assert done.returncode != 0 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_the_chain_game_is_what_it_says():
    """The formulas of the last exercise against the game, and ISM against causal where the order does not matter."""
    for n_layer in range(1, 7):
        assert exercises.longest_chain(exercises.causal, n_layer) == n_layer + 1
        for mask in (exercises.ism, exercises.prefix):
            assert exercises.longest_chain(mask, n_layer) == exercises.longest_chain(mask, n_layer, backward=True) == 2**n_layer
        assert exercises.longest_chain(exercises.causal, n_layer, backward=True) == 2**n_layer
    assert torch.equal(exercises.causal(torch.ones(1, 3)), torch.tensor([[1, 2, 3]]))
