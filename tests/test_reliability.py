"""Nothing lost, nothing leaked.

Training under kills and faults, chat under hostile text and long use, the same seed twice.
"""

import gc
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from conftest import ROOT
from helpers import SPECIAL, TINY, TOKENIZER, check_cache, make_chat, peak_memory, run
from hypothesis import given, settings
from hypothesis import strategies as st

import sample
import train as module
from data.checkpoint import load_checkpoint, save_checkpoint, whole_file
from data.loader import Split, prepare
from data.machine import one_line, until_stopped
from sample import command, go_on, load_chat, read_history
from train import Settings, train

resource = pytest.importorskip("resource", reason="limits and signals as Linux and macOS have them")

# A checkpoint every fourth step, so that much of the time is spent writing. Many more steps than
# the kills wait for, so that a late one still comes in time.
KILLED = dict(
    n_dialogues=20,
    n_layer=2,
    n_head=2,
    n_embd=64,
    batch_size=2,
    block_size=256,
    max_iters=120,
    eval_interval=4,
    dtype="float32",
    device="cpu",
)


def start(out, resume=False, **changed):
    flags = [f"--{name}={value}" for name, value in {**KILLED, "out_dir": out, **changed}.items()]
    if resume:
        flags.append("--resume")
    return subprocess.Popen(
        [sys.executable, "train.py", *flags],
        cwd=ROOT,
        text=True,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def slots_of(state):
    """The dicts of tensors that a checkpoint holds: the model's, and one of each optimizer slot."""
    return [state["model"], *state["optimizer"]["state"].values()]


def finish(out, resume=False, **changed):
    """The final loss, the step, and all numbers that the last checkpoint holds."""
    process = start(out, resume, **changed)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    state = load_checkpoint(out / "ckpt.pt")
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    numbers = [x for slots in slots_of(state) for x in slots.values()]
    return metrics["loss"], state["step"], numbers


def same(a, b):
    """Whether two runs have the same loss, step and numbers at their end."""
    if a[:2] != b[:2] or len(a[2]) != len(b[2]):
        return False
    return all(torch.equal(x, y) for x, y in zip(a[2], b[2]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("whole") / "out")


def wait_for(process, condition, seconds=120):
    """Whether the condition came true before the process ended.

    Asks every half millisecond, since a file is being written for a few milliseconds only.
    """
    until = time.time() + seconds
    while process.poll() is None and time.time() < until:
        if condition():
            return True
        time.sleep(0.0005)
    assert process.poll() is not None, "nothing happened"
    return False


def written(file):
    """When a file was written, 0 if it is not there."""
    return file.stat().st_mtime_ns if file.exists() else 0


def wait_for_another(process, file, before):
    """Whether a file was written anew before the process ended."""
    return wait_for(process, lambda: written(file) != before)


def kill(out, moment, rng):
    """Start or resume the run and kill it. True if it was writing a checkpoint.

    moment: while it starts, in some step, or while it writes a checkpoint.
    """
    file = out / "ckpt.pt"
    half_written = lambda: any(out.glob("ckpt.pt.*.partial"))
    before, process = written(file), start(out, resume=file.exists())
    if moment == "start":
        end = time.time() + rng.uniform(0, 4)
        # Its first checkpoint ends the start.
        wait_for(process, lambda: time.time() > end or written(file) != before)
    else:
        for _ in range(rng.randint(1, 6)):  # the n-th checkpoint from here
            if not wait_for_another(process, file, before):
                break
            before = written(file)
        time.sleep(rng.uniform(0, 0.05))
        if moment == "writing":
            wait_for(process, half_written)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it had ended before it was killed"
    return half_written()


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again(tmp_path, whole):
    """Three kills, each in the run that went on from the one before."""
    rng = random.Random(time.time())
    for moment in ("step", "writing", "start"):
        kill(tmp_path, moment, rng)
    assert same(finish(tmp_path, resume=True), whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "metrics.json"]


@pytest.mark.slow
def test_twenty_kills(tmp_path, whole):
    rng, writing = random.Random(time.time()), 0
    for number in range(20):
        out = tmp_path / str(number)
        moment = ("step", "writing", "writing", "start")[number % 4]
        if kill(out, moment, rng):
            writing += 1
        assert same(finish(out, resume=(out / "ckpt.pt").exists()), whole)
    print(f"20 kills, {writing} while a checkpoint was half written")
    assert writing >= 3


@pytest.mark.slow
def test_a_signal_ends_in_a_checkpoint_and_a_line(tmp_path, whole):
    file = tmp_path / "ckpt.pt"
    for number in (signal.SIGTERM, signal.SIGINT):
        before = written(file)
        process = start(tmp_path, resume=file.exists())
        assert wait_for_another(process, file, before)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1 and "Traceback" not in errors
        step = load_checkpoint(file)["step"]
        stopped = f"stopped after step {step} of {KILLED['max_iters']}"
        how = f"the same flags and --resume go on from {file}"
        assert errors.splitlines()[-1] == f"train.py: {stopped}; {how}"
    assert same(finish(tmp_path, resume=True), whole)


@pytest.fixture
def interruptible():
    """Ctrl-C interrupts, also where the tests run in the background, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_stopping_cuts_no_step_and_the_second_time_interrupts(interruptible):
    handlers = lambda: (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    before, steps = handlers(), []
    for batch in until_stopped(range(100)):
        if batch == 3:
            signal.raise_signal(signal.SIGTERM)
        steps.append(batch)
    assert steps == [0, 1, 2, 3] and handlers() == before
    with pytest.raises(KeyboardInterrupt):
        for _ in until_stopped(range(100)):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("interval", [1000, 1])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, interval):
    s = {**TINY, "n_dialogues": 40, "out_dir": str(tmp_path)}
    train(Settings(**s, max_iters=5))
    good = (tmp_path / "ckpt.pt").read_bytes()
    steep = {**s, "eval_interval": interval, "max_iters": 200, "learning_rate": 1e30}
    words = r"is NaN or infinite at step \d+;.*--learning_rate"
    with pytest.raises(ValueError, match=words) as error:
        train(Settings(**steep, resume=True))
    assert one_line(error.value) == str(error.value)
    state = load_checkpoint(tmp_path / "ckpt.pt")
    assert all(x.isfinite().all() for slots in slots_of(state) for x in slots.values())
    if interval > 1:
        assert (tmp_path / "ckpt.pt").read_bytes() == good
        assert " step 20;" in str(error.value)


def test_what_is_not_finite_is_not_saved(tmp_path):
    train(Settings(**{**TINY, "n_dialogues": 40, "out_dir": str(tmp_path)}, max_iters=5))
    path = tmp_path / "ckpt.pt"
    good, rng = path.read_bytes(), random.Random(0)
    for _ in range(30):
        state = load_checkpoint(path)
        slots = rng.choice(slots_of(state))
        x = slots[rng.choice(list(slots))]
        bad = rng.choice((float("nan"), float("inf"), -float("inf")))
        x.view(-1)[rng.randrange(x.numel())] = bad
        with pytest.raises(ValueError, match="is NaN or infinite at step 5"):
            save_checkpoint(path, **state)
        assert path.read_bytes() == good


def main_fails(monkeypatch, *arguments):
    """Run train.py's main in this process; what it says on its way out."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as end:
        module.main()
    signal.signal(signal.SIGTERM, handler)
    assert len(end.value.code.strip().splitlines()) == 1
    return end.value.code


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
]


@pytest.mark.parametrize("error", FULL)
def test_out_of_memory_on_a_gpu_names_the_flags(tmp_path, monkeypatch, error):
    """Raised by hand where there is no GPU; test_out_of_memory_on_the_cpu runs out for real."""

    def full(*_, **__):
        raise error

    monkeypatch.setattr(module.GPT, "forward", full)
    said = main_fails(monkeypatch, "--n_dialogues=40", "--device=cpu", f"--out_dir={tmp_path}")
    assert all(flag in said for flag in ("--batch_size", "--block_size", "--n_embd", "--n_layer"))


def test_out_of_memory_on_the_cpu(tmp_path, monkeypatch):
    flags = "--n_dialogues=40", "--n_embd=100000000", "--device=cpu"
    said = main_fails(monkeypatch, *flags, f"--out_dir={tmp_path}")
    assert "--n_embd" in said


def test_a_full_disk(tmp_path):
    """The last good checkpoint stays.

    First a device that is full, then a file system that takes no more bytes.
    """
    s = Settings(**{**TINY, "n_dialogues": 40, "out_dir": str(tmp_path)}, max_iters=5)
    train(s)
    path = tmp_path / "ckpt.pt"
    good, state = path.read_bytes(), load_checkpoint(path)
    if pathlib.Path("/dev/full").exists():
        with pytest.raises(ValueError, match="/dev/full cannot be written .No space left"):
            save_checkpoint("/dev/full", **state)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in random.Random(0).sample(range(len(good)), 20):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            words = "ckpt.pt cannot be written .File too large"
            with pytest.raises(ValueError, match=words) as error:
                save_checkpoint(path, tmp_path / "ckpt.before.pt", **state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == good
        assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt.pt", "metrics.json"]
    assert one_line(error.value) == str(error.value)


def test_a_conversation_is_saved_whole_or_not_at_all(tmp_path, capsys):
    chat, path = make_chat(), tmp_path / "a.json"
    chat.send("one")
    command(chat, f"/save {path}")
    good = path.read_bytes()
    chat.send("two " * 10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, hard))
    try:
        command(chat, f"/save {path}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    saved, failed = capsys.readouterr().out.splitlines()
    assert saved == f"[saved to {path}]" and failed.startswith(f"[not saved: {path}: ")
    assert path.read_bytes() == good and list(tmp_path.iterdir()) == [path]


def read_only(tmp_path):
    """Folders that even root cannot write into."""
    (tmp_path / "file").write_text("x", encoding="utf-8")
    folders = [tmp_path / "file", tmp_path / "file" / "below"]
    if sys.platform == "linux":
        folders += [pathlib.Path("/sys"), pathlib.Path("/sys/out")]
    return folders


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    for folder in read_only(tmp_path):
        flags = f"--out_dir={folder}", "--max_iters=1", "--n_dialogues=40"
        said = main_fails(monkeypatch, *flags)
        assert f"--out_dir {folder} is no folder that can be written" in said
    monkeypatch.setenv("NANOISM_CACHE", str(tmp_path / "file" / "cache"))
    said = main_fails(monkeypatch, f"--out_dir={tmp_path / 'out'}", "--device=cpu")
    assert "file/cache cannot be written" in said


def test_data_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("data.loader.CACHE", tmp_path / "cache")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ValueError, match="cannot be written"):
            prepare(TOKENIZER, 256, n_dialogues=300)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "cache").iterdir())
    assert len(Split(prepare(TOKENIZER, 256, n_dialogues=300), "train").offsets) == 301


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"n_layer": 1}, "n_layer 2, not 1"),
        ({"block_size": 128}, "block_size 256, not 128"),
        ({"mask": "causal"}, "mask ism, not causal"),
        ({"muon": False}, "needs the flags of the run"),
        ({"max_iters": 1}, "from step 2; --max_iters must be at least that"),
    ],
)
def test_a_checkpoint_of_other_settings(tmp_path, changed, words):
    s = {**TINY, "n_dialogues": 40, "out_dir": str(tmp_path), "max_iters": 2}
    train(Settings(**s))
    with pytest.raises(ValueError, match=words):
        train(Settings(**{**s, **changed, "resume": True}))


def test_a_checkpoint_of_another_vocabulary_or_version(tmp_path):
    s = {**TINY, "n_dialogues": 40, "out_dir": str(tmp_path), "max_iters": 1}
    train(Settings(**s))
    path = tmp_path / "ckpt.pt"
    state = load_checkpoint(path)
    assert state["settings"]["n_layer"] == 2
    assert torch.load(path, weights_only=True)["torch"] == torch.__version__
    save_checkpoint(path, **{**state, "tokenizer": "nanoism 00000000"})
    with pytest.raises(ValueError, match="tokenizer nanoism 00000000, not nanoism"):
        train(Settings(**s, resume=True))
    with pytest.raises(ValueError, match="another tokenizer"):
        load_chat(path)
    for version in (99, None):
        with whole_file(path) as file:
            torch.save({**state, "version": version}, file)
        words = f"version {version}; this code reads version 1"
        for read in (load_chat, load_checkpoint):
            with pytest.raises(ValueError, match=words):
                read(path)


def places_of_numbers(path):
    """[(where the numbers of a tensor start in a checkpoint, how many bytes they are)]"""
    raw, places = path.read_bytes(), []
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if "/data/" not in entry.filename or not entry.file_size:
                continue
            # Before the numbers stand a header of 30 bytes, a name and a filling.
            start = entry.header_offset
            filling = int.from_bytes(raw[start + 28 : start + 30], "little")
            places.append((start + 30 + len(entry.filename) + filling, entry.file_size))
    return places


def test_a_changed_bit_in_a_checkpoint_is_seen(tmp_path):
    train(Settings(**{**TINY, "n_dialogues": 40, "out_dir": str(tmp_path), "max_iters": 1}))
    path, rng = tmp_path / "ckpt.pt", random.Random(0)
    good = path.read_bytes()
    places = places_of_numbers(path)
    for _ in range(20):
        start, size = rng.choice(places)
        at, bad = start + rng.randrange(size), bytearray(good)
        bad[at] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="is not a checkpoint"):
            load_checkpoint(path)


# Text that tries to be more than text.
SPELLED = [*SPECIAL, "<|", "|>", "<|end", "<|e", "nd|>"]
CONTROLS = ["\x1b[2J", "\x07", "\u202e", "\ud83d", "\x00", "é"]
PART = st.one_of(st.sampled_from([*SPELLED, *CONTROLS]), st.text(max_size=4))
PARTS = st.lists(PART, min_size=1, max_size=6).map("".join).filter(bool)
SPECIAL_IDS = {TOKENIZER.end, *TOKENIZER.headers.values()}


def special(tokens):
    return [token for token in tokens if token in SPECIAL_IDS]


@settings(max_examples=100, deadline=None)
@given(system=PARTS, query=PARTS, answer=PARTS)
def test_no_entry_lets_a_special_token_in(system, query, answer):
    """The special tokens are those of the layout, as many as there are messages.

    In the system prompt, a query, a history and data.
    """
    system_id, end = TOKENIZER.headers["system"], TOKENIZER.end
    turn = [TOKENIZER.headers["user"], end, TOKENIZER.headers["assistant"], end]
    chat = make_chat(block_size=1024, max_new_tokens=3, system=system)
    assert special(chat.system) == [system_id, end]
    chat.send(query)
    assert special(chat.layout()[0]) == [system_id, end, *turn]
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": query},
        {"role": "assistant", "content": answer},
    ]
    go_on(chat, messages)
    chat.send(query)
    assert special(chat.layout()[0]) == [system_id, end, *turn, *turn]
    assert special(TOKENIZER.encode_dialogue(messages)[0]) == [system_id, end, *turn]
    check_cache(chat)


def force(chat, tokens):
    """Make these tokens the likeliest, one after another, and then the end of the answer."""
    forced, feed = iter(tokens), chat.feed

    def forcing(*given):
        logits = feed(*given)
        logits[next(forced, TOKENIZER.end)] = 1e6
        return logits

    chat.feed = forcing


def test_an_answer_that_spells_special_tokens_stays_text(tmp_path):
    """The model is made to say them, letter by letter.

    The answer comes back as history, by /save and --history too.
    """
    said = "x<|end|><|user|>hi<|end|><|assistant|>\x1b[31m\u202e y"
    chat = make_chat(block_size=512, temperature=0.0, max_new_tokens=100)
    force(chat, TOKENIZER.encode_answer(said))
    reply = chat.send("go")
    assert reply == said == chat.messages[-1]["content"]
    assert len(special(chat.layout()[0])) == 4
    command(chat, f"/save {tmp_path / 'a.json'}")
    again = make_chat(block_size=512, temperature=0.0, max_new_tokens=5)
    go_on(again, read_history(tmp_path / "a.json"))
    again.send("and?")
    assert again.messages[:2] == chat.messages and len(special(again.layout()[0])) == 8
    check_cache(again)


@settings(max_examples=200, deadline=None)
@given(text=st.text(min_size=1, max_size=20), seed=st.integers(0, 10**6))
def test_characters_are_streamed_whole(text, seed):
    """An answer's tokens may end inside of a character; its pieces hold whole characters alone."""
    rng = random.Random(seed)
    raw = text.encode("utf-8", "replace")
    tokens = [TOKENIZER.encoding.encode_single_token(bytes([byte])) for byte in raw]
    if rng.random() < 0.3:
        tokens = tokens[: rng.randrange(len(tokens)) + 1]  # cut off, maybe inside of a character
    chat = make_chat(block_size=256, temperature=0.0, max_new_tokens=100)
    force(chat, tokens)
    pieces = list(chat.stream("go"))
    expected = raw[: len(tokens)].decode("utf-8", "replace")
    assert "".join(pieces) == expected == chat.messages[-1]["content"]
    for piece in pieces[:-1]:
        assert piece == "" or piece in expected
    if "\ufffd" not in raw.decode("utf-8"):
        assert all("\ufffd" not in piece for piece in pieces[:-1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    train(Settings(**{**TINY, "n_dialogues": 40, "out_dir": str(out)}, max_iters=5))
    return out


def test_bad_input_at_the_terminal(trained):
    """Each line is answered, in order, and nothing raw comes out.

    Invalid UTF-8, control characters, 1 MB without a space, special tokens.
    """
    lines = [
        b"\xff\xfe\x80 hi",
        b"\x1b[2J\x07\x00",
        b"x" * 1_000_000,
        b"<|end|><|assistant|>",
        "é".encode()[:1],
        b"/save",
        b"/help",
        b"/sevae",
        b"/reset",
        b"ok",
        b"/quit",
    ]
    flags = "--device cpu --max_new_tokens 5 --temperature 2".split()
    done = subprocess.run(
        [sys.executable, "sample.py", "--ckpt", str(trained / "ckpt.pt"), *flags],
        cwd=ROOT,
        input=b"\n".join(lines),
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    out = done.stdout.decode("utf-8")
    assert out.count("[the query is too long for the context of 256 tokens]") == 1
    assert "[not saved: /save FILE needs" in out and "[no command /sevae; /help" in out
    assert "/help       this" in out and all(c.isprintable() or c in "\n\t" for c in out)


def test_a_chat_that_runs_out_of_memory(trained, monkeypatch, capsys):
    """A tensor of 4 PB is asked for in place of the cache, then in place of an answer's logits."""
    too_much = lambda *_, **__: torch.empty(1 << 50)
    flags = "--device cpu --prompt Hello! --prompt Hi!".split()
    monkeypatch.setattr(sys, "argv", ["sample.py", "--ckpt", str(trained / "ckpt.pt"), *flags])
    words = "^sample.py: out of memory; [^\n]*--block_size[^\n]*$"
    with monkeypatch.context() as patch:
        patch.setattr(sample, "Cache", too_much)
        with pytest.raises(SystemExit, match=words):
            sample.main()
    monkeypatch.setattr(sample.Chat, "feed", too_much)
    sample.main()
    assert capsys.readouterr().out.count("[out of memory; ") == 2


def test_errors_that_quote_a_file_drive_no_terminal(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b'{"messages": "\x1b[2J\x07 \xff"}\n')
    done = run("train.py", "--data", str(path), "--out_dir", str(tmp_path / "out"))
    assert done.returncode == 1 and "line 1" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.strip().isprintable()


def turns(chat, count):
    """Turns of all lengths, some interrupted. Yields after each."""
    rng = random.Random(1)
    for _ in range(count):
        chat.temperature, chat.top_k = rng.choice((0.0, 1.0)), rng.choice((0, 5))
        words = rng.choices(["Ann", "lives", "in", "Rome", "7"], k=rng.randint(0, 30))
        stream = chat.stream(" ".join(words))
        for _ in range(rng.choice((1, 2, 999))):
            if next(stream, None) is None:
                break
        stream.close()
        yield


def numbers_alive():
    """How many numbers all tensors have that are alive."""
    kinds = torch.Tensor, torch.nn.Parameter
    return sum(x.numel() for x in gc.get_objects() if type(x) in kinds)


@pytest.mark.parametrize("mask", ["ism", "prefix"])
def test_five_hundred_turns(mask):
    """Nothing drifts and memory does not grow.

    In one conversation that overflows its context again and again.
    """
    told = []
    chat = make_chat(mask, 128, system="Be kind.", notify=told.append)
    held, resident = [], []
    for number, _ in enumerate(turns(chat, 500), 1):
        if number % 20 == 0:
            check_cache(chat)
        if number % 100 == 0:
            gc.collect()
            held.append(numbers_alive())
            resident.append(peak_memory())
    assert len(chat.messages) == 1001 and len(told) > 20
    assert max(held) - min(held) <= 2 * chat.size  # the f of one turn and of another
    assert resident[-1] - resident[0] < 20  # MB


SAME = """
import hashlib, json, pathlib, sys
import torch
import data.loader
from sample import load_chat
from train import Settings, train
out = pathlib.Path(sys.argv[1])
data.loader.CACHE = out / "cache"
torch.set_num_threads(int(sys.argv[2]))
settings = dict(json.loads(sys.argv[3]), out_dir=str(out))


def digest(parts):
    return hashlib.sha256(b"".join(parts)).hexdigest()


def weights():
    model = torch.load(out / "ckpt.pt")["model"]
    return digest(x.numpy().tobytes() for x in model.values())


first = train(Settings(**{**settings, "max_iters": 1, "learning_rate": 1e-30}))
initial = weights()
last = train(Settings(**settings))
arrays = sorted((out / "cache").rglob("*.npy"))
chat = load_chat(out / "ckpt.pt", "cpu", "float32", temperature=1.0, seed=3)
print(json.dumps({
    "data": digest(path.read_bytes() for path in arrays),
    "initial weights": initial,
    "losses": [first["loss"], last["loss"]],
    "weights": weights(),
    "chat": [chat.send(text) for text in ("Hello!", "My name is Ann.")],
}))
"""


def same_seed(tmp_path, threads, hash_seeds, **settings):
    """What runs of one seed give: {(threads, hash seed): {what: its value}}.

    Each runs in a process of its own.
    """
    results = {}
    for n in threads:
        for hash_seed in hash_seeds:
            out = tmp_path / f"{n}.{hash_seed}"
            environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
            done = run("-c", SAME, str(out), str(n), json.dumps(settings), env=environment)
            assert done.returncode == 0, done.stderr
            results[n, hash_seed] = json.loads(done.stdout.splitlines()[-1])
    return results


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(tmp_path):
    """Across processes all is the same to the bit.

    Across thread counts the data and the initial weights are; products of matrices need not be.
    """
    settings = {**TINY, "n_dialogues": 40, "max_iters": 10}
    results = list(same_seed(tmp_path, (1,), (1, 2), **settings).values())
    assert results[0] == results[1]
    [other] = same_seed(tmp_path, (2,), (1,), **settings).values()
    assert all(other[what] == results[0][what] for what in ("data", "initial weights"))
    assert other["losses"] == pytest.approx(results[0]["losses"], rel=1e-3)
