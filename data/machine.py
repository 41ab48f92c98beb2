"""
The machine and the command line, for all programs here: flags, errors, signals, what may be
printed, devices and dtypes, processes. No lesson stands in it.
"""
import argparse
import contextlib
import ctypes
import importlib.util
import os
import pathlib
import platform
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
from dataclasses import MISSING, field, fields

import torch
import torch.distributed as dist
from tqdm import tqdm

if sys.version_info < (3, 10):  # below, `match` would be a SyntaxError
    sys.exit("nanoISM needs Python 3.10 or newer; this is " + platform.python_version())

# --- the command line ---------------------------------------------------------------------------

ROOT = pathlib.Path(__file__).resolve().parent.parent  # of the project


class Parser(argparse.ArgumentParser):
    """Parses the flags of a program. An error is one line."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message):
        sys.exit(f"{self.prog}: {message} (--help lists the flags)")


def setting(default, help, choices=None):
    """A field of a dataclass of settings. If the default is None, the help says what holds."""
    return field(default=default, metadata={"help": help, "choices": choices})


def parse(settings_class, description):
    """A dataclass of settings from the command line: each field is a flag."""
    parser = Parser(description)
    for f in fields(settings_class):
        options = {"help": f.metadata["help"], "default": f.default}
        if f.default not in (None, "", MISSING):
            options["help"] += f" (default: {f.default})".replace("%", "%%")
        if f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = f.type
            options["choices"] = f.metadata["choices"]
        parser.add_argument(f"--{f.name}", **options)
    return settings_class(**vars(parser.parse_args()))


def tell_idle(settings, names, why):
    """Print which of these settings the user has changed without effect, and why they have none."""
    changed = [f"--{f.name}" for f in fields(settings)
               if f.name in names and getattr(settings, f.name) != f.default]
    if changed and RANK == 0:
        print(f"without effect {why}: {', '.join(changed)}")


def command(program, *arguments):
    """The line that a user pastes into a terminal, in this folder, to run a program of ours."""
    here = pathlib.Path.cwd() == ROOT
    return f"python {shlex.join([program if here else str(ROOT / program), *arguments])}"


# Characters that control a terminal (not line breaks and tabs), that turn the direction of writing,
# or that are half of a pair of surrogates, which a terminal cannot show.
DRIVING = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text):
    """The text with U+FFFD for each character that would drive the terminal."""
    return DRIVING.sub("\ufffd", text)


def one_line(error):
    """An error's text in one line for the terminal. The text may quote a hostile file."""
    line = " ".join(str(error)[:1000].split())
    return "".join(c if c.isprintable() else "\ufffd" for c in line)


def for_the_user(error):
    """Whether this project raised a ValueError, in words for the user.

    Where a library raised it, or an expression, it is a mistake in the code, whose line must be
    seen. An OSError tells of a file or of the network, and is for the user too.
    """
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = ROOT in pathlib.Path(last.filename).resolve().parents
    raised = ours and "site-packages" not in last.filename and last.line.startswith("raise")
    return isinstance(error, OSError) or raised


def out_of_memory(error):
    """Whether a RuntimeError of torch says so, of a GPU's memory or of the computer's."""
    words = "out of memory", "can't allocate memory"
    return any(word in str(error) for word in words)


UNREAD = contextlib.suppress(OSError, AttributeError)  # a broken standard error, or none at all


class Bar(tqdm):
    """A progress bar. When nobody reads it any more, it falls silent and the program goes on."""

    def display(self, *args, **options):
        with UNREAD:
            super().display(*args, **options)

    def tell(self, line):
        """Print a line above the bar."""
        with UNREAD:
            self.write(line)

    def close(self):
        with UNREAD:
            super().close()


@contextlib.contextmanager
def errors_in_one_line(memory, stopped="stopped"):
    """Within it, an error that the user can mend ends the program in a line. Others are tracebacks.

    memory: what the line says if there is too little of it; stopped: what it says after Ctrl-C.
    """
    name = os.path.basename(sys.argv[0])
    try:
        check_torchrun()
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # nobody reads any more, as behind `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        if not for_the_user(error):
            raise
        sys.exit(f"{name}: {one_line(error)}")
    except KeyboardInterrupt as error:
        sys.exit(f"\n{name}: {str(error) or stopped}")
    except RuntimeError as error:
        if out_of_memory(error):
            sys.exit(f"{name}: out of memory; {memory}")
        # torch raises this when the process at the other end of a connection has died.
        if WORLD > 1 and "peer" in str(error):
            why = "stops, because another one has stopped"
            sys.exit(f"{name}: process {RANK} {why}; --resume goes on from the last checkpoint")
        raise


def ends():
    """SIGINT (Ctrl-C), SIGTERM, and SIGHUP (the terminal closes) unless nohup has it ignored."""
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is None or signal.getsignal(hangup) == signal.SIG_IGN:
        return [signal.SIGINT, signal.SIGTERM]
    return [signal.SIGINT, signal.SIGTERM, hangup]


def end_as_interrupted():
    """Make these signals raise KeyboardInterrupt, so that `finally` can remove half-made files."""
    for number in ends():
        signal.signal(number, signal.default_int_handler)


def until_stopped(items):
    """Yields items until SIGINT, SIGTERM or SIGHUP and finishes the current one.

    A second signal interrupts at once.
    """
    asked = []

    def ask():
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    with on_interrupt(ask, ends()):
        for item in items:
            if asked:
                return
            yield item


@contextlib.contextmanager
def on_interrupt(action, signals=(signal.SIGINT,)):
    """Within it, Ctrl-C, or any of these signals, calls the action.

    In another thread, as a notebook may start, it does not, since Python allows no handlers there.
    """
    before = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in signals:
                before[number] = signal.signal(number, lambda *_: action())
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- devices ------------------------------------------------------------------------------------

DTYPES = ("auto", "float32", "bfloat16")
DEVICES = "cpu, cuda or mps, on which nobody has run this; auto is cuda, or else cpu"


def from_torchrun(name, without):
    """A number that torchrun has set in the environment; else what holds without torchrun."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else without


# The number of this process, the same on its machine, and how many processes there are.
RANK = from_torchrun("RANK", 0)
LOCAL_RANK = from_torchrun("LOCAL_RANK", 0)
WORLD = from_torchrun("WORLD_SIZE", 1)


def check_torchrun():
    """ValueError if the environment has something else where torchrun sets a number."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        value = os.environ.get(name) or "0"
        if not value.isdecimal():
            raise ValueError(f"{name}={value}: torchrun sets a number here; unset it to run "
                             "without torchrun")


def pick_device(name):
    """Makes the torch device of a name the current one and returns it. ValueError if there is none.

    auto never takes MPS, see DEVICES.
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    there = [*gpus, "cpu"]
    if torch.backends.mps.is_available():
        there.append("mps")
    if name in ("auto", "cuda") and gpus:  # each process has one of its own
        if LOCAL_RANK >= len(gpus):
            raise ValueError(f"--nproc_per_node is more than the number of GPUs, {len(gpus)}")
        name = gpus[LOCAL_RANK]
    elif name == "auto":
        name = "cpu"
    if name not in there:
        raise ValueError(f"--device {name} is not on this machine; there is {', '.join(there)}")
    device = torch.device(name)
    if device.type == "cuda":  # graphs and compiled kernels go to the current one
        torch.cuda.set_device(device)
    return device


def pick_dtype(name, device):
    """The dtype to compute in. auto takes bfloat16 if the device multiplies fast in it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        # Cards before Ampere emulate it, although torch says that they support it.
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float32
    if device.type != "cpu":
        return torch.float32
    # A CPU without bfloat16 takes 30 to 100 times as long, which a few rows show.
    for rows in (8, 512):
        narrow, full = [], []
        for _ in range(3):  # in turns, so that another program's load slows both down alike
            narrow.append(seconds_of_product(rows, torch.bfloat16))
            full.append(seconds_of_product(512, torch.float32))
        if min(narrow) > 0.8 * min(full):
            return torch.float32
    return torch.bfloat16


def seconds_of_product(rows, dtype):
    """The seconds of a product of matrices with so many rows."""
    x, w = torch.ones(rows, 256, dtype=dtype), torch.ones(256, 1024, dtype=dtype)
    start = time.perf_counter()
    x @ w
    return time.perf_counter() - start


def check_compiler(device):
    """ValueError if torch.compile would find no compiler for this device."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError("--compile needs Triton for CUDA, which is not installed")
    names = [os.environ.get("CXX"), "g++", "clang++", "c++", "cl"]
    if not any(name and shutil.which(name) for name in names):
        raise ValueError("--compile needs a C++ compiler (g++ or clang++), which is not installed")


def clock(device):
    """Waits until the device has done its work, since a GPU lags behind -> the time in seconds."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def autocast(device, dtype):
    """Within it, products of matrices are computed in dtype."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def tune_cpu():
    """Makes training on a CPU 1.3 times as fast: small steps, each of another shape."""
    # oneDNN prepares a kernel for each shape and keeps this many of them.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # it makes glibc keep freed blocks
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


# --- several threads and processes --------------------------------------------------------------


def crowded(seconds, cpu_seconds, threads):
    """A line if so many threads had much less than the time of their cores, else "".

    Threads wait for each other by spinning. So on a core each they take all of its time: 99 to
    100 % in the default run with 2 threads. Beside one other busy program they had 62 to 70 %, and
    a step took three times as long.
    """
    share = cpu_seconds / (seconds * threads)
    if threads == 1 or share > 0.85:
        return ""
    return (f"the {threads} threads had {share:.0%} of the time of {threads} cores. Where other "
            "programs run, one thread can be faster: OMP_NUM_THREADS=1 in the environment.")


def connect(device, dtype):
    """Joins the processes of torchrun -> the dtype of the first one, since CPUs may differ."""
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    chosen = [dtype]
    dist.broadcast_object_list(chosen, device=device)
    return chosen[0]


def add_up(tensors):
    """Replace each tensor by its sum over all processes."""
    for work in [dist.all_reduce(x, async_op=True) for x in tensors]:
        work.wait()


def from_all(value):
    """The values of all processes, a list; with one process that of it alone."""
    if WORLD == 1:
        return [value]
    values = [None] * WORLD
    dist.all_gather_object(values, value)
    return values
