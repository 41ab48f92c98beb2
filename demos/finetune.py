"""
Fine-tune a published checkpoint under a mask with LoRA, and save it back in the format it came in.

    python demos/finetune.py --init_from FOLDER --data chats.jsonl --out_dir tuned
    python sample.py --ckpt tuned
    python demos/finetune.py --memory

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
from data.hf import from_pretrained, save_pretrained
from data.machine import RANK, setting
from data.scores import report
from model import GPT, GPTConfig
from train import Settings, train

LINEAR = ("qkv", "out", "up", "down")  # of each block


@dataclass
class Finetune(Settings):
    KEPT = ("mask", "lora", "rank", "alpha", "layers")

    lora: bool = setting(True, "train LoRA's matrices alone; --no-lora trains all weights")
    rank: int = setting(16, "rank of LoRA")
    alpha: float = setting(32.0, "LoRA's product is multiplied by alpha / rank")
    layers: str = setting(",".join(LINEAR), "the linear layers of each block that get LoRA")
    memory: bool = setting(False, "print what training takes in memory, and stop")

    learning_rate: float = setting(None, "peak (default: 2e-4 with LoRA, 2e-5 without)")

    def __post_init__(self):
        if self.learning_rate is None and self.lora:
            self.learning_rate = 2e-4
        super().__post_init__()
        if not set(self.layers.split(",")) <= set(LINEAR):
            some = f"expected some of {','.join(LINEAR)}, with commas between"
            raise ValueError(f"--layers {self.layers}: {some}")
        if self.alpha == 0:
            raise ValueError("--alpha must be above 0: with 0 nothing is learned")
        if not self.init_from and not self.memory:
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


def add_lora(model, rank, alpha, layers=LINEAR):
    """Freeze a GPT and put LoRA around the named linear layers of its blocks."""
    model.requires_grad_(False)
    for block in model.blocks:
        for part in (block.attention, block.mlp):
            for name, linear in list(part.named_children()):
                if name in layers:
                    setattr(part, name, LoRA(linear, rank, alpha))


def merge_lora(model):
    """Turn a GPT with LoRA into a plain one that computes the same."""
    for block in model.blocks:
        for part in (block.attention, block.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, LoRA):
                    setattr(part, name, child.merged())
    return model.requires_grad_(True)


# From their config.json: name: (n_embd, n_layer, n_head, n_kv_head, n_hidden, vocab_size, tied)
SIZES = {
    "Qwen2.5-0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "Qwen2.5-1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "Qwen2.5-3B": (2048, 36, 16, 2, 11008, 151936, True),
    "LLaMA-3.1-8B": (4096, 32, 32, 8, 14336, 128256, False),
}


def memory(config, rows, length, positions, rank=0, layers=LINEAR, checkpointing=False,
           dtype=torch.bfloat16, device="cuda"):
    """Bytes at the peak of a training step, a dict of what they are for.

    rows, length: of one part of a batch (see --grad_accum); positions: those in it with loss. With
    rank 0 all weights are trained. "activations" is what the forward pass keeps, "working" the
    larger of the loss's logits and one block's backward pass.
    """
    with torch.device("meta"):  # counts parameters without memory
        model = GPT(config)
        total = model.n_params()
        if rank:
            add_lora(model, rank, 1, layers)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    a = dtype.itemsize  # of what products of matrices take and give; what is frozen is kept in it
    weights = 4 * trained
    if a < 4:  # autocast's copy of each weight that is trained, since those are float32
        weights += a * trained
    if rank > 0:
        weights += a * total
    C, H, Hkv, D = config.n_embd, config.n_head, config.n_kv_head, config.head_size
    # A block keeps for each token: of both norms what they give and, in float32, their input; to
    # train their weights the normalized input too. On a CPU that one takes the input's place.
    in_float32 = 1 if rank > 0 or device == "cpu" else 2
    norms = 2 * C * (4 * in_float32 + a)
    # Queries and keys, then keys and values again with all heads and attention's result, the mask's
    # row in numbers, four tensors in the MLP, what LoRA's A gives.
    attention = (H + Hkv) * D + 3 * H * D + length
    block = norms + a * (attention + 4 * config.n_hidden + rank * len(layers)) + 4 * H + 8
    # The backward pass of a block: four gradients in the MLP, those of the stream between blocks.
    backward = 4 * a * config.n_hidden + 12 * C
    kept = block
    if checkpointing:  # only the stream is kept, in the embedding's dtype; the block comes again
        kept = (a if rank else 4) * C
        backward += block
    # The logits in dtype, and in float32 the log-softmax and two gradients.
    logits = positions * config.vocab_size * (a + 12)
    return {
        "weights": weights, "gradients": 4 * trained, "optimizer": 8 * trained,
        "activations": rows * length * kept * config.n_layer,
        "working": max(logits, rows * length * backward),
    }


def table(rows=4, length=1024):
    """Print the memory of SIZES."""
    print(f"GB for {rows} rows of {length:,} tokens at a time, half of them with loss,")
    print("in bfloat16, with --checkpointing; LoRA has rank 16")
    titles = "weights", "gradients", "optimizer", "activations", "working", "in all"
    print(" " * 21 + "".join(f"{title:>13}" for title in titles))
    for name, (n_embd, n_layer, n_head, n_kv_head, n_hidden, vocab_size, tied) in SIZES.items():
        config = GPTConfig(vocab_size, length, n_layer, n_head, n_kv_head, n_embd, n_hidden,
                           qkv_bias="Qwen" in name, tie_embeddings=tied)
        for rank in (0, 16):
            parts = memory(config, rows, length, rows * length // 2, rank, checkpointing=True)
            numbers = [*parts.values(), sum(parts.values())]
            how = "LoRA" if rank else "full"
            print(f"{name:14} {how:6}" + "".join(f"{n / 1e9:13.2f}" for n in numbers))


def finetune(s, splits=None, watch=None):
    """Fine-tune by the settings and write a checkpoint folder to s.out_dir -> train's metrics.

    splits, watch: as of `train`; with splits no file is written.
    """
    # Absolute, should a watch change the working directory.
    source, out = pathlib.Path(s.init_from).absolute(), pathlib.Path(s.out_dir).absolute()
    if not s.lora:
        machine.tell_idle(s, ("rank", "alpha", "layers"), "beside --no-lora")
        model = from_pretrained(s.init_from, s.block_size)
    else:
        dtype = machine.pick_dtype(s.dtype, machine.pick_device(s.device))
        s.dtype = str(dtype).removeprefix("torch.")
        # What is frozen needs no more digits than are computed with.
        model = from_pretrained(s.init_from, s.block_size, dtype)
        torch.manual_seed(s.seed)
        add_lora(model, s.rank, s.alpha, s.layers.split(","))
    metrics = train(s, model, splits, watch)
    if RANK == 0 and splits is None:
        save_pretrained(merge_lora(model), source, out, s.mask)
    return metrics


def main():
    machine.end_as_interrupted()
    memory = "lower --batch_size or --block_size, raise --grad_accum, or set --checkpointing"
    stopped = "stopped; --resume goes on from the last checkpoint, one each --eval_interval steps"
    with machine.errors_in_one_line(memory, stopped):
        s = machine.parse(Finetune, "Fine-tune a published checkpoint under a mask.")
        if s.memory:
            return table()
        metrics = finetune(s)
        if RANK == 0:
            report(metrics)
            print("\nckpt.pt is there for --resume alone; remove it to save space")
            print(f"chat with it: {machine.command('sample.py', '--ckpt', s.out_dir)}")


if __name__ == "__main__":
    main()
