"""The mask demo: its figures against formulas and loops that know nothing of mask.py, and its two pictures."""
import json
import subprocess
import sys

import pytest
from conftest import ROOT

DEMO = ROOT / "demos" / "masks.py"
LAYERS = 3  # of the demo's GPT


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    flags = ["--quick", "--json", str(folder / "masks.json"), "--out", str(folder / "new" / "masks.png")]
    done = subprocess.run([sys.executable, str(DEMO), *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "masks.json").read_text()), folder / "new", done.stdout


@pytest.fixture(scope="module")
def figures(run):
    return run[0]


def lengths(segments):
    """The length of each segment, queries and answers in turn."""
    return [segments.count(s) for s in sorted(set(segments))]


def naive(mask, segments):
    """f, from the words of the definitions."""
    f = []
    for j, segment in enumerate(segments):
        if mask == "ism" and segment % 2 == 1:
            f.append(max(i for i, s in enumerate(segments) if s == segment) + 1)
        elif mask.startswith("prefix"):
            f.append(max(j, max(i for i, s in enumerate(segments) if s % 2 == 1)) + 1)
        else:
            f.append(j + 1)
    return f


def expected(mask, segments):
    """tokens, attended pairs and trained tokens of one dialogue, by formula."""
    sizes, T = lengths(segments), len(segments)
    trained = sum(sizes[1::2])
    if mask == "prefix":  # the copy of turn k: all up to the end of its query squared, then the answer's triangle
        pairs = tokens = 0
        for k in range(0, len(sizes), 2):
            end, n = sum(sizes[:k + 1]), sizes[k + 1]
            pairs, tokens = pairs + end * end + n * end + n * (n + 1) // 2, tokens + end + n
        return tokens, pairs, trained
    return T, T * (T + 1) // 2 + sum(n * (n - 1) // 2 for n in sizes[::2]) * (mask == "ism"), trained


def counted(row):
    return row["tokens"], row["attended pairs"], row["trained tokens"]


def test_pictures_and_tables(run):
    figures, folder, text = run
    for name in ("masks.png", "masks-properties.png"):
        picture = (folder / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
        assert int.from_bytes(picture[16:20], "big") == 1800  # pixels wide: 900, twice as sharp
    assert all(title in text for title in ("This dialogue", "training dialogues", "No leak", "Cacheable"))
    for row in figures["counts"] + figures["train"]:
        assert " ".join([row["mask"], *(f"{row[k]:,}" for k in list(row)[1:])]) in " ".join(text.split())


def test_the_dialogue_and_its_copies(figures):
    assert figures["labels"][0] == "<|user|>" and figures["labels"][-1] == "<|end|>"
    assert [part["mask"] for part in figures["parts"]] == ["causal", "prefix, turn 1", "prefix, turn 2", "ism"]
    q1, a1, q2, a2 = lengths(figures["segments"])
    assert [len(part["f"]) for part in figures["parts"]] == [q1 + a1 + q2 + a2, q1 + a1] + 2 * [q1 + a1 + q2 + a2]
    for part in figures["parts"]:
        assert part["f"] == naive(part["mask"], figures["segments"][:len(part["f"])])


def test_counts_of_the_dialogue(figures):
    for row in figures["counts"]:
        assert counted(row) == expected(row["mask"], figures["segments"])


def test_counts_of_the_training_data(figures):
    from data.dialogues import generate
    from data.tokenizer import Tokenizer

    tokenizer = Tokenizer()
    train = [tokenizer.encode_dialogue(d["messages"])[1] for d in generate("train", 50)]
    for row in figures["train"]:
        assert counted(row) == tuple(map(sum, zip(*(expected(row["mask"], segments) for segments in train))))
    causal, prefix, ism = (counted(row) for row in figures["train"])
    assert causal[2] == prefix[2] == ism[2]
    assert causal[0] == ism[0] < prefix[0] and causal[1] < ism[1] < prefix[1]


def test_trained_are_the_answers_each_once(figures):
    answers = [j - 1 for j, s in enumerate(figures["segments"]) if s % 2 == 0]  # the positions that predict them
    for mask in ("causal", "prefix", "ism"):
        assert sorted(j for part in figures["parts"] if mask in part["mask"] for j in part["trained"]) == answers


def test_logits_that_move(figures):
    """Just those that the changed token reaches within the GPT's layers."""
    for part in figures["parts"]:
        T = len(part["f"])
        assert len(part["moved"]) == T
        for i, moved in enumerate(part["moved"]):
            reached = {i}
            for _ in range(LAYERS):
                reached |= {j for j in range(T) if any(k < part["f"][j] for k in reached)}
            assert moved == sorted(reached)


def test_no_leak(figures):
    before = {}
    for part in figures["parts"]:
        before[part["mask"]] = [(i, j) for i, moved in enumerate(part["moved"]) for j in moved if j < i]
        assert not [j for _, j in before[part["mask"]] if j in part["trained"]]
    q1, a1, q2, _ = lengths(figures["segments"])
    assert [len(pairs) for pairs in before.values()] == [
        0, q1 * (q1 - 1) // 2, (q1 + a1 + q2) * (q1 + a1 + q2 - 1) // 2, q1 * (q1 - 1) // 2 + q2 * (q2 - 1) // 2]


def test_cacheable(figures):
    segments = figures["segments"]
    ends = [j for j in range(1, len(segments)) if segments[j] != segments[j - 1]]
    assert [(c["mask"], c["cut"]) for c in figures["cuts"]] == [(m, e) for m in ("causal", "prefix", "ism") for e in ends]
    for c in figures["cuts"]:
        pairs = zip(naive(c["mask"], segments[:c["cut"]]), naive(c["mask"], segments))
        assert c["f_changed"] == [j for j, (cut, whole) in enumerate(pairs) if cut != whole]
        assert c["stale"] == list(range(c["reusable"], c["cut"]))  # measured with the GPT, and read off f
        if c["mask"] == "prefix" and c["cut"] < ends[-1]:
            assert c["f_changed"] == c["stale"] == list(range(c["cut"]))
        else:
            assert not c["f_changed"] and not c["stale"]


@pytest.fixture
def main(monkeypatch):
    from demos import masks

    def call(*flags):
        monkeypatch.setattr(sys, "argv", [str(DEMO), *flags])
        with pytest.raises(SystemExit) as end:
            masks.main()
        return end.value.code

    return call


@pytest.mark.parametrize("flag", ["--json", "--out"])
def test_a_path_that_cannot_be_written_is_one_line(main, flag, tmp_path):
    error = main("--quick", "--out", str(tmp_path / "masks.png"), flag, "/dev/null/file")
    assert error.startswith("masks.py: cannot write /dev/null/file") and "\n" not in error


def test_flags(main, capsys):
    error = main("--quik")
    assert error.startswith("masks.py: unrecognized arguments: --quik") and "\n" not in error
    assert main("--help") == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--quick", "--json", "--out"))
