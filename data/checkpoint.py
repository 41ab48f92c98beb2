"""
Files that are written whole or not at all, and checkpoints: plain tensors and settings, checked when they are read.
"""
import os
import pathlib
import zipfile
from contextlib import contextmanager
from dataclasses import asdict

import torch

from model import GPT, GPTConfig


@contextmanager
def whole_file(path):
    """A file to write bytes to that takes its name only when all is on the disk; until then what was there stays."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


VERSION = 1  # of what a checkpoint holds


def save_checkpoint(path, **state):
    """Write a checkpoint whole or not at all. ValueError, and the last good one stays, if a number in it is not finite."""
    for slots in (state["model"], *state["optimizer"].get("state", {}).values()):
        for name, x in slots.items():
            check_finite(x, state["step"], name)
    try:
        with whole_file(path) as file:
            torch.save({"version": VERSION, "torch": str(torch.__version__), **state}, file)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch's own error may hide the system's
        if not isinstance(reason, OSError):
            raise
        raise ValueError(f"{path} cannot be written ({reason.strerror}); the checkpoint before it, if any, is whole") from None


def check_finite(x, step, what="the loss"):
    """ValueError if a number in x, a tensor or a float, is NaN or infinite."""
    if not torch.as_tensor(x).isfinite().all():
        raise ValueError(f"{what} is NaN or infinite at step {step}; the last checkpoint, if any, is from before: go on with --resume "
                         "and a lower --learning_rate, a longer --warmup_iters, a smaller --grad_clip or --dtype float32")


def load_checkpoint(path):
    """The dict that save_checkpoint wrote, on the CPU. ValueError if it is missing, of another version or not one of ours.

    The file is not trusted: nothing in it is run, and what is taken of memory is bounded by its size.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}; train one with: python train.py")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("compressed entries, or entries that claim more bytes than there are")
            if archive.testzip():
                raise ValueError("bytes that are not those that were written")
        state = torch.load(path, map_location="cpu", weights_only=True)
        version = state.get("version")
        if version == VERSION:
            config, tensors = GPTConfig(**state["config"]), state["model"]
            if config.n_layer >= len(tensors):
                raise ValueError("fewer tensors than layers")
            with torch.device("meta"):  # shapes without memory
                shapes = {name: x.shape for name, x in GPT(config).state_dict().items()}
            plain = {name.replace(".linear.", "."): x.shape for name, x in tensors.items() if not name.endswith((".A", ".B"))}  # but for LoRA's
            if plain != shapes or not all(x.is_contiguous() for x in tensors.values()):
                raise ValueError("tensors that are not those of its config")
            if not all(isinstance(x, str) for x in (state["tokenizer"], *(state["settings"][name] for name in ("tokenizer", "mask", "init_from")))):
                raise ValueError("settings of a wrong type")
            return {key: state[key] for key in ("config", "settings", "tokenizer", "model", "optimizer", "step")}
    except Exception as error:  # a damaged file raises many types
        raise ValueError(f"{path} is not a checkpoint of train.py ({type(error).__name__}); train one with: python train.py") from None
    raise ValueError(f"{path} is a checkpoint of version {version}; this code reads version {VERSION}. Use the code that wrote it, or train again")


def load_state(path, config, identity, mask):
    """The checkpoint to go on from. ValueError if its model, tokenizer or mask is not the one that is asked for."""
    state = load_checkpoint(path)
    had = {**asdict(GPTConfig(**state["config"])), "tokenizer": state["tokenizer"], "mask": state["settings"]["mask"]}
    asked = {**asdict(config), "tokenizer": identity, "mask": mask}
    if differ := [f"{key} {had[key]}, not {asked[key]}" for key in asked if had[key] != asked[key]]:
        raise ValueError(f"{path} has another model config: {'; '.join(differ)}. --resume needs the same settings")
    return state


def restore(state, model, optimizer, max_iters, path):
    """Give a checkpoint's numbers to the model and the optimizer; the step to go on from. ValueError if they do not fit."""
    model.load_state_dict(state["model"])
    try:
        if (step := int(state["step"])) < 0:
            raise ValueError("a negative step")
        # The groups' settings come from the flags, so that of the file only numbers are left to be checked.
        optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": optimizer.state_dict()["param_groups"]})
        for group in optimizer.param_groups if state["step"] > 0 else []:
            names = {"step", "momentum"} if group["muon"] else {"step", "exp_avg", "exp_avg_sq"}
            for p in group["params"]:
                slots = optimizer.state[p]
                if set(slots) != names or any(x.shape != (() if name == "step" else p.shape) for name, x in slots.items()):
                    raise ValueError("slots of another optimizer")
    except Exception as error:  # a damaged file raises many types
        raise ValueError(f"{path} has no optimizer state for these settings ({type(error).__name__}); --resume needs the flags of the run "
                         "that wrote it") from None
    if step > max_iters:
        raise ValueError(f"{path} is from step {step}; --max_iters must be at least that, not {max_iters}")
    return step
