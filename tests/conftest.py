"""
What all tests share with pytest. To read the tests, begin with three files:

    test_mask     each mask against a naive loop; what f must be for, so that nothing leaks
    test_model    the model against a reference in float64; a cache changes nothing
    test_chat     a chat's cache against one fresh forward, whatever people type

helpers.py holds a tiny model and chat, random dialogues, files, a naive f; folders.py published
models by transformers; demos/ the tests of the demos. One-line errors are tables: test_errors.py
and demos/test_demo_errors.py.
"""
import os
import pathlib
import shutil
import signal
import sys

# The models of the tests are so small that a second thread waits more than it works, in the
# programs that the tests start too; beside another busy program it waits four times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what a student has: no answers to the exercises yet."""
    copy = tmp_path_factory.mktemp("classroom") / "nanoISM"
    left_out = shutil.ignore_patterns(".*", "out", "cache", "__pycache__", "answers.py")
    shutil.copytree(ROOT, copy, ignore=left_out)
    return copy


@pytest.fixture
def handlers():
    """Signals act as in a fresh program, and as before when the test is over."""
    names = "SIGINT", "SIGTERM", "SIGHUP"  # Windows has no SIGHUP
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def last_words(monkeypatch, handlers):
    """Calls a program's main with arguments, in the project's folder -> its error, of one line."""
    def run(module, *arguments):
        name = f"{module.__name__.rpartition('.')[2]}.py"
        with monkeypatch.context() as patch:
            patch.chdir(ROOT)
            patch.setattr(sys, "argv", [name, *arguments])
            with pytest.raises(SystemExit) as end:
                module.main()
        said = end.value.code.strip()
        assert said.startswith(f"{name}: ") and "\n" not in said
        return said

    return run


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Prepared data go to a folder of the test's own."""
    monkeypatch.setattr("data.loader.CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of the smallest run; its path has a space."""
    from helpers import tiny

    from train import train

    out = tmp_path_factory.mktemp("a run")
    train(tiny(out))
    return out


@pytest.fixture
def folder(tmp_path):
    """A random checkpoint in the Hugging Face format."""
    from helpers import make_folder

    return make_folder(tmp_path / "folder")


@pytest.fixture
def chats(tmp_path):
    """The path of a file of twelve chats."""
    from helpers import line_of_chat, write_lines

    return write_lines(tmp_path / "chats.jsonl", [line_of_chat(n) for n in range(12)])


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: the full count of a repeated test, run by -m slow")
    config.addinivalue_line("markers", "cuda: needs a CUDA device")


def pytest_collection_modifyitems(config, items):
    import torch

    for item in items:
        # By its marker: among its keywords are the names of folders too.
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
        if item.get_closest_marker("slow") and "slow" not in config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="a full count; run it with -m slow"))
