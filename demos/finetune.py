"""
Fine-tune a published checkpoint under a mask with LoRA, and save it back in the format it came in.

    python demos/finetune.py --init_from FOLDER --data chats.jsonl --mask ism_sink --out_dir tuned
    python sample.py --ckpt tuned

A model that was trained causally starts far nearer to what it knows under ism_sink than under ism:
demos/sink.py shows why.

The loop is train.py's, with its settings. LoRA (Hu et al., 2021) leaves the weights W as they are
and learns what is added to them, W x + alpha / rank * B (A x), where A and B have `rank` rows and
columns: gradients and optimizer states are those of A and B alone. At the end B A is added to W,
so that the result is a checkpoint like any other. Queries, keys and values are one matrix here, and
so are gate and up: they share an A.
"""
import pathlib
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from data import machine
from data.checkpoint import load_state
from data.hf import from_pretrained, save_pretrained
from data.machine import RANK, setting
from data.scores import report
from train import Settings, train

LINEAR = ("qkv", "out", "up", "down")  # of each block


@dataclass
class Finetune(Settings):
    lora: bool = setting(True, "train LoRA's matrices alone; --no-lora trains all weights")
    rank: int = setting(16, "rank of LoRA")
    alpha: float = setting(32.0, "LoRA's product is multiplied by alpha / rank")

    learning_rate: float = setting(None, "peak (default: 2e-4 with LoRA, 2e-5 without)")

    def __post_init__(self):
        if self.learning_rate is None and self.lora:
            self.learning_rate = 2e-4
        super().__post_init__()
        if self.alpha == 0:
            raise ValueError("--alpha must be above 0: with 0 nothing is learned")
        if not self.init_from:
            raise ValueError("--init_from FOLDER is needed, a checkpoint as Hugging Face has it")


class LoRA(nn.Module):
    """A frozen linear layer and a trained product of rank `rank` beside it, 0 at first."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) * linear.in_features**-0.5)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        return self.linear(x) + self.scale * F.linear(F.linear(x, self.A), self.B)

    @torch.no_grad()
    def merged(self):
        """The linear layer with the product added to its weights, in float32 and rounded once."""
        self.linear.weight.copy_(self.linear.weight.float() + self.scale * self.B @ self.A)
        return self.linear


def linear_layers(model):
    """(the part of a block, the name of its linear layer) of all layers that get LoRA, a list."""
    parts = [part for block in model.blocks for part in (block.attention, block.mlp)]
    return [(part, name) for part in parts for name in LINEAR if hasattr(part, name)]


def add_lora(model, rank, alpha):
    """Freeze a GPT and put LoRA around the linear layers of its blocks."""
    model.requires_grad_(False)
    for part, name in linear_layers(model):
        setattr(part, name, LoRA(getattr(part, name), rank, alpha))


def merge_lora(model):
    """Turn a GPT, with LoRA or without, into a plain one that computes the same."""
    for part, name in linear_layers(model):
        layer = getattr(part, name)
        if isinstance(layer, LoRA):
            setattr(part, name, layer.merged())
    return model.requires_grad_(True)


def finetune(s, splits=None, watch=None):
    """Fine-tune by the settings and write a checkpoint folder to s.out_dir -> train's metrics.

    splits, watch: as of `train`; with splits no file is written.
    """
    # Absolute paths, since a `watch` may change the working directory.
    source, out = pathlib.Path(s.init_from).absolute(), pathlib.Path(s.out_dir).absolute()
    if s.resume and splits is None:
        asked = {name: getattr(s, name) for name in ("lora", "rank", "alpha")}
        load_state(out / "ckpt.pt", asked)
    if not s.lora:
        machine.tell_idle(s, ("rank", "alpha"), "beside --no-lora")
        model = from_pretrained(s.init_from, s.block_size)
    else:
        dtype = machine.pick_dtype(s.dtype, machine.pick_device(s.device))
        s.dtype = str(dtype).removeprefix("torch.")
        # Frozen weights need no more digits than the computation has.
        model = from_pretrained(s.init_from, s.block_size, dtype)
        torch.manual_seed(s.seed)
        add_lora(model, s.rank, s.alpha)
    metrics = train(s, model, splits, watch)
    if RANK == 0 and splits is None:
        save_pretrained(merge_lora(model), source, out, s.mask)
    return metrics


def main():
    machine.end_as_interrupted()
    memory = "lower --batch_size or --block_size, raise --grad_accum, or set --checkpointing"
    stopped = "stopped; if there is a checkpoint, the same flags and --resume go on from it"
    with machine.errors_in_one_line(memory, stopped):
        s = machine.parse(Finetune, "Fine-tune a published checkpoint under a mask.")
        if not s.data and RANK == 0:
            print("without --data it learns the synthetic dialogues of data/synthetic")
        metrics = finetune(s)
        if RANK == 0:
            report(metrics)
            print("\nckpt.pt is there for --resume alone; remove it to save space")
            print(f"chat with it: {machine.command('sample.py', '--ckpt', s.out_dir)}")


if __name__ == "__main__":
    main()
