"""
Files that are written whole or not at all, and checkpoints: plain tensors and settings. A file may
be damaged or hostile, so each reader here checks it first.

    python -m data.checkpoint out/ckpt.pt data/small.pt

makes the small model of the repository, with which sample.py chats before one is trained.
"""
import json
import os
import pathlib
import secrets
import shlex
import shutil
import tempfile
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields

import torch

from data import machine
from model import GPT, GPTConfig

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# --- files --------------------------------------------------------------------------------------


@contextmanager
def whole_file(path, former=None):
    """A file to write bytes to. It gets its name when all of it is on the disk.

    A link is followed. A path that is no regular file, such as /dev/null, is written directly.
    former: where an older file of this name is moved to.
    """
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():
        with open(path, "wb") as file:
            yield file
        return
    path = path.resolve()
    # The name is random, so that two runs, even of two machines, do not write into one file.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            with suppress(OSError):  # some disks have no modes
                shutil.copymode(path, partial)
            if former is not None:
                path.replace(former)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path, content):
    """Write a dict or a list as JSON, whole or not at all."""
    with whole_file(path) as file:
        text = json.dumps(content, indent=1, ensure_ascii=False)
        # UTF-8 has no half of a pair of surrogates, so it is written as JSON's escape.
        file.write(text.encode("utf-8", "backslashreplace"))


def make_folder(path):
    """Makes a folder if there is none -> its absolute path. OSError if it cannot be written."""
    folder = pathlib.Path(path).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    return folder


HELD = {}  # folder -> the open file that locks it
LOCK = "ckpt.pt.lock"
WRITTEN = "ckpt.pt", "metrics.json", "model.safetensors"  # what a run writes by whole_file


def hold(folder):
    """Locks a folder for this process and removes what a killed run has left half written there.

    ValueError if another process holds it. The lock ends with the process, however that ends.
    Windows has no such lock: there a second process in the folder goes unnoticed.
    """
    if folder.resolve() in HELD:  # left over from a failed run of this process
        HELD.pop(folder.resolve()).close()
    file = HELD[folder.resolve()] = open(folder / LOCK, "a")
    if fcntl is None:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is writing to {folder}; name another --out_dir") from None
    except OSError:  # this disk has no locks, and another machine may be writing to it
        return
    for name in WRITTEN:
        for partial in folder.glob(f"{name}.????????.partial"):
            if partial.is_file():
                partial.unlink()


def let_go(folder):
    """Unlocks a folder that `hold` has locked."""
    HELD.pop(folder.resolve()).close()
    (folder / LOCK).unlink(missing_ok=True)


# --- checkpoints --------------------------------------------------------------------------------

VERSION = 1  # of the form of checkpoints


def save_checkpoint(path, former=None, **state):
    """Writes a checkpoint, whole or not at all. former: see `whole_file`.

    ValueError if a number in it is not finite or the disk is full; then the last good one stays.
    """
    for slots in (state["model"], *state["optimizer"].get("state", {}).values()):
        for name, x in slots.items():
            check_finite(x, state["step"], name)
    try:
        with whole_file(path, former) as file:
            torch.save({"version": VERSION, "torch": str(torch.__version__), **state}, file)
    except (OSError, RuntimeError) as error:
        # torch may raise an error of its own while it handles the system's.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        stays = "the checkpoint before it, if any, is whole"
        raise ValueError(f"{path} cannot be written ({reason.strerror}); {stays}") from None


def put_away(path):
    """Where a new run's first save moves an older checkpoint of its path: (path, line to print).

    The path is None if there is no such checkpoint, or if ckpt.before.pt has more steps.
    """
    if not path.exists():
        return None, ""
    before = path.resolve().with_name("ckpt.before.pt")
    steps, kept = steps_of(path), steps_of(before)
    line = f"{path} has a model of {steps} steps, which"
    if kept > steps:
        return None, f"{line} this run replaces; {before.name} has one of {kept} steps and stays"
    line += f" becomes {before.name} when this run saves"
    if before.exists():
        line += f", in place of one of {kept} steps; --out_dir names another folder"
    return before, line


def steps_of(path):
    """The steps of a checkpoint, even of an edited model; 0 if it cannot be read."""
    try:
        check_archive(path)
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"])
    except Exception:  # a damaged file raises many types
        return 0


def check_finite(x, step, what="the loss"):
    """ValueError if a number in x, a tensor or a float, is NaN or infinite."""
    if not torch.as_tensor(x).isfinite().all():
        raise ValueError(
            f"{what} is NaN or infinite at step {step}; the last checkpoint, if any, is from "
            "before: go on with --resume and a lower --learning_rate, a longer --warmup_iters, a "
            "smaller --grad_clip or --dtype float32"
        )


def load_checkpoint(path):
    """The dict that save_checkpoint wrote, on the CPU. ValueError for a missing or damaged file.

    The file may be hostile: no code in it runs, and reading takes no more memory than its size.
    """
    path = pathlib.Path(path)
    instead = hint(path) or f"train one with: {machine.command('train.py')}"
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}; {instead}")
    GPTConfig()  # if the reader has broken it, this is his traceback, and the file is not blamed
    try:
        check_archive(path)
        return checked(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged file raises many types
        why = error if machine.for_the_user(error) else type(error).__name__
        what = f"is not a checkpoint of this train.py ({why})"
        raise ValueError(f"{path} {what}; {instead}") from None


def load_model(path):
    """(GPT, the checkpoint) of a checkpoint file. ValueError if it is damaged or of another GPT."""
    path = pathlib.Path(path)
    state = load_checkpoint(path)
    config = GPTConfig(**state["config"])
    other = other_weights(state["model"], meta_model(config))
    if other:
        other = f"holds other weights than the GPT of model.py: {other}"
        if (path.parent / "model.safetensors").exists():
            folder = shlex.quote(str(path.parent))
            other += f"; the model beside it is whole: --ckpt {folder}"
        raise ValueError(f"{path} {other}")
    model = GPT(config)
    model.load_state_dict(state["model"])
    return model, state


def meta_model(config):
    """A GPT that has shapes and no memory. To make it takes no random numbers."""
    with torch.device("meta"):
        return GPT(config)


def hint(path):
    """What to do with a path that other programs take for a model; "" if nothing is known."""
    path = pathlib.Path(path)
    if path.suffix == ".gguf":
        real = machine.command("demos/real.py", str(path), "--out_dir", path.stem)
        return f"of a GGUF file make a folder: {real}"
    if path.suffix == ".safetensors":
        return "name the folder that the file is in"
    if len(path.parts) == 2 and path.suffix != ".pt" and not path.parent.exists():
        return ("if it is the name of a model on a hub, download its folder first; demos/real.py "
                "makes one without a hub")
    return ""


def check_archive(path):
    """ValueError if a file claims more bytes than it holds or a checksum is wrong."""
    with zipfile.ZipFile(path) as archive:
        claimed = sum(entry.file_size for entry in archive.infolist())
        if claimed > path.stat().st_size:
            raise ValueError("compressed entries, or entries that claim more bytes than there are")
        if archive.testzip():
            raise ValueError("bytes that are not those that were written")


def checked(state):
    """The parts of a checkpoint. Raises any exception if one of them is wrong."""
    if state.get("version") != VERSION:
        raise ValueError(f"version {state.get('version')}; this code reads version {VERSION}")
    tensors = state["model"]
    check_config(state["config"], len(tensors))
    if not all(isinstance(name, str) and x.is_contiguous() for name, x in tensors.items()):
        raise ValueError("its weights are not tensors")
    texts = [state["settings"][name] for name in ("tokenizer", "mask", "init_from")]
    if not all(isinstance(x, str) for x in (state["tokenizer"], *texts)):
        raise ValueError("settings of a wrong type")
    slots = state["optimizer"].get("state", {})
    if not all(isinstance(x, torch.Tensor) for slot in slots.values() for x in slot.values()):
        raise ValueError("its optimizer's numbers are no tensors")
    if type(state["step"]) is not int or state["step"] < 0:
        raise ValueError("it has no number of steps")
    kept = "config", "settings", "tokenizer", "optimizer", "step"
    return {"model": tensors, **{key: state[key] for key in kept}}


def other_weights(tensors, model):
    """How tensors differ in names and shapes from a model's weights; "" if they do not."""
    wanted = model.state_dict()
    differ = [f"{name} is missing" for name in wanted if name not in tensors]
    differ += [f"{name} is not one of them" for name in tensors if name not in wanted]
    differ += [f"{name} is {tuple(tensors[name].shape)}, not {tuple(x.shape)}"
               for name, x in wanted.items() if name in tensors and tensors[name].shape != x.shape]
    more = f"; {len(differ) - 3} more differ" if len(differ) > 3 else ""
    return "; ".join(sorted(differ)[:3]) + more


def check_config(options, n_tensors):
    """ValueError if a file's config has wrong types, or sizes that would cost memory or time."""
    for f in fields(GPTConfig):
        value = options.get(f.name, f.default)
        kinds = (int, float) if f.type is float else f.type
        if not isinstance(value, kinds):
            raise ValueError(f"{f.name} must be {f.type.__name__}, not {value!r}")
        if f.type is int and not 0 <= value <= LARGEST:
            raise ValueError(f"{f.name} ({value}) must be from 0 to {LARGEST:,}")
    unknown = options.keys() - {f.name for f in fields(GPTConfig)}
    if unknown:
        raise ValueError(f"GPTConfig has no {', '.join(map(str, unknown))}")
    config = GPTConfig(**options)
    check_sizes(config)
    if config.n_layer >= n_tensors:
        raise ValueError("fewer tensors than layers")
    if (config.n_head + 2 * config.n_kv_head) * config.head_size > LARGEST:
        raise ValueError("its heads are too large")


LARGEST = 1 << 20  # the largest size of a model that a file may claim


def check_sizes(config):
    """ValueError if a file's config has no context or vocabulary, or a far too large one."""
    for name in ("block_size", "vocab_size"):
        value = getattr(config, name)
        if not 0 < value <= LARGEST:
            raise ValueError(f"{name} ({value}) must be from 1 to {LARGEST:,}")


def load_state(path, asked):
    """The checkpoint to go on from. ValueError if it differs in one of the settings {name: value}.

    They are settings of its run or of its model's config; "tokenizer" is the tokenizer's identity.
    """
    if not pathlib.Path(path).is_file():
        raise ValueError(f"no checkpoint at {path} to go on from; without --resume a run begins")
    state = load_checkpoint(path)
    had = {**state["settings"], **asdict(GPTConfig(**state["config"]))}
    had["tokenizer"] = state["tokenizer"]
    differ = [f"{key} {had.get(key)}, not {value}" for key, value in asked.items()
              if had.get(key) != value]
    if differ:
        what = f"has another model config: {'; '.join(differ)}"
        raise ValueError(f"{path} {what}. --resume needs the same settings")
    return state


def other_settings(state, settings):
    """Where these settings differ from those of a checkpoint's run: ["--seed 1, not 0", ...]."""
    now, of_no_matter = asdict(settings), ("resume", "out_dir", "device", "eval_interval")
    return [
        f"--{name} {now[name]}, not {was}" for name, was in state["settings"].items()
        if name in now and name not in of_no_matter and now[name] != was
    ]


def restore(state, model, optimizer, max_iters, path):
    """Copies a checkpoint's numbers into the model and the optimizer -> the step to go on from.

    ValueError if they do not fit.
    """
    step, other = state["step"], other_weights(state["model"], model)
    if not other:
        model.load_state_dict(state["model"])
        # The groups' settings come from the flags.
        groups = optimizer.state_dict()["param_groups"]
        slots = state["optimizer"].get("state", {})
        optimizer.load_state_dict({"state": slots, "param_groups": groups})
        if step > 0:
            other = other_slots(optimizer)
    if other:
        needed = "--resume needs the flags of the run that wrote it"
        raise ValueError(f"{path} is of other settings ({other}); {needed}")
    if step > max_iters:
        what = f"is from step {step}; --max_iters must be at least that, not {max_iters}"
        raise ValueError(f"{path} {what}")
    return step


def other_slots(optimizer):
    """What does not fit in the numbers of an optimizer of train.py; "" if all does."""
    for group in optimizer.param_groups:
        if "muon" not in group:  # an optimizer of the reader's own
            continue
        names = ["momentum"] if group["muon"] else ["step", "exp_avg", "exp_avg_sq"]
        for p in group["params"]:
            found = optimizer.state.get(p, {})
            if any(name not in found for name in names):
                return "its optimizer is another one"
            if any(found[name].shape != (() if name == "step" else p.shape) for name in names):
                return "its optimizer's numbers are of another size"
    return ""


def shrink(path, out):
    """Writes a checkpoint to chat with: in bfloat16, without the optimizer's numbers."""
    model, state = load_model(path)
    small = model.bfloat16().state_dict()
    save_checkpoint(out, **{**state, "model": small, "optimizer": {}})


if __name__ == "__main__":
    with machine.errors_in_one_line("close other programs"):
        parser = machine.Parser("Make a small file to chat with from a checkpoint.")
        parser.add_argument("path", help="a checkpoint of train.py")
        parser.add_argument("out", help="the file to write")
        shrink(**vars(parser.parse_args()))
