"""
Fine-tune a published checkpoint under a mask with LoRA, and save it back in the format it came in.

    python demos/finetune.py --init_from FOLDER --data chats.jsonl --out_dir tuned
    python sample.py --ckpt tuned
    python demos/finetune.py --memory

The loop is train.py's, with its settings. LoRA leaves the weights W as they are and learns what is added to them,
W x + alpha / rank * B (A x), where A and B have `rank` rows and columns: gradients and optimizer states are those of
A and B alone. At the end B A is added to W, so that the result is a checkpoint like any other. Queries, keys and
values are one matrix here, and so are gate and up: they share an A.
"""
import pathlib
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from data.hf import from_pretrained, save_pretrained
from model import GPT, GPTConfig
from train import RANK, Settings, parse, pick_device, pick_dtype, report, setting, train

LINEAR = ("qkv", "out", "up", "down")  # of each block


@dataclass
class Finetune(Settings):
    lora: bool = setting(True, "train LoRA's matrices alone; --no-lora trains all weights")
    rank: int = setting(16, "rank of LoRA")
    alpha: float = setting(32.0, "LoRA's product is multiplied by alpha / rank")
    layers: str = setting(",".join(LINEAR), "the linear layers of each block that get LoRA")
    memory: bool = setting(False, "print what training takes in memory, and stop")

    def __post_init__(self):
        self.learning_rate = self.learning_rate or (2e-4 if self.lora else 0)
        super().__post_init__()
        if not set(self.layers.split(",")) <= set(LINEAR):
            raise ValueError(f"--layers {self.layers}: expected some of {','.join(LINEAR)}, with commas between")
        if not self.init_from and not self.memory:
            raise ValueError("--init_from FOLDER is needed, a checkpoint in the Hugging Face format")


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
        """The linear layer with the product added to its weights."""
        self.linear.weight.copy_(self.linear.weight.float() + self.scale * self.B @ self.A)  # in float32, rounded once
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


# name: (n_embd, n_layer, n_head, n_kv_head, n_hidden, vocab_size, tie_embeddings), from their config.json
SIZES = {
    "Qwen2.5-0.5B": (896, 24, 14, 2, 4864, 151936, True), "Qwen2.5-1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "Qwen2.5-3B": (2048, 36, 16, 2, 11008, 151936, True), "LLaMA-3.1-8B": (4096, 32, 32, 8, 14336, 128256, False),
}


def memory(config, rows, length, positions, rank=0, layers=LINEAR, checkpointing=False, dtype=torch.bfloat16):
    """Bytes at the peak of a training step: {"weights", "gradients", "optimizer", "activations", "working"}.

    rows, length: of one part of a batch (see --grad_accum); positions: those in it with loss. rank 0 trains all weights.
    activations: what the forward pass keeps. working: the larger of the loss's logits and one block's backward pass.
    """
    with torch.device("meta"):  # counts parameters without memory
        model = GPT(config)
        total = model.n_params()
        if rank:
            add_lora(model, rank, 1, layers)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    a = dtype.itemsize  # of what products of matrices take and give; what is frozen is kept in it
    cast = a if a < 4 else 0  # autocast's copy of each weight that is trained, since those are float32
    C, H, Hkv, D = config.n_embd, config.n_head, config.n_kv_head, config.head_size
    # A block keeps for each token: of both norms the input and, to train their weights, the normalized, in float32, and what
    # they give; queries and keys, keys and values again with all heads, the mask's row in numbers, attention's result; four in the MLP.
    norms = 2 * C * ((4 if rank else 8) + a)
    block = norms + a * ((H + Hkv) * D + 3 * H * D + length + 4 * config.n_hidden + rank * len(layers)) + 4 * H + 8
    kept = (a if rank else 4) * C if checkpointing else block  # the stream between blocks has the dtype of the embedding
    # In a block's backward pass, which with checkpointing has the block again: four gradients in the MLP, and those of the stream.
    logits = positions * config.vocab_size * (a + 12)  # in dtype; in float32 the log-softmax and two gradients
    return {"weights": (4 + cast) * trained + a * (total if rank else 0), "gradients": 4 * trained, "optimizer": 8 * trained,
            "activations": rows * length * kept * config.n_layer,
            "working": max(logits, rows * length * (block * checkpointing + 4 * a * config.n_hidden + 12 * C))}


def table(rows=4, length=1024):
    """Print the memory of SIZES."""
    print(f"GB for {rows} rows of {length:,} tokens at a time, half of them with loss, in bfloat16, with --checkpointing; LoRA has rank 16")
    print(f"{'':21}" + "".join(f"{name:>13}" for name in ("weights", "gradients", "optimizer", "activations", "working", "in all")))
    for name, (n_embd, n_layer, n_head, n_kv_head, n_hidden, vocab_size, tied) in SIZES.items():
        config = GPTConfig(vocab_size, length, n_layer, n_head, n_kv_head, n_embd, n_hidden, qkv_bias="Qwen" in name, tie_embeddings=tied)
        for rank in (0, 16):
            parts = memory(config, rows, length, rows * length // 2, rank, checkpointing=True)
            numbers = [*parts.values(), sum(parts.values())]
            print(f"{name:14} {'LoRA' if rank else 'full':6}" + "".join(f"{n / 1e9:13.2f}" for n in numbers))


def finetune(s):
    """Fine-tune by the settings and write the model to s.out_dir as a checkpoint folder; returns train's metrics."""
    if not s.lora:
        model = from_pretrained(s.init_from, s.block_size)
    else:
        dtype = pick_dtype(s.dtype, pick_device(s.device))
        s.dtype = str(dtype).removeprefix("torch.")
        model = from_pretrained(s.init_from, s.block_size, dtype)  # what is frozen needs no more digits than are computed with
        torch.manual_seed(s.seed)
        add_lora(model, s.rank, s.alpha, s.layers.split(","))
    metrics = train(s, model)
    if RANK == 0:
        save_pretrained(merge_lora(model), s.init_from, s.out_dir, s.mask)
    return metrics


def main():
    try:
        s = parse(Finetune, "Fine-tune a published checkpoint under a mask.")
        if s.memory:
            return table()
        metrics = finetune(s)
    except (ValueError, OSError) as error:
        sys.exit(f"finetune.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\nfinetune.py: stopped; --resume goes on from the last checkpoint, which is written every --eval_interval steps")
    if RANK == 0:
        report(metrics, s.out_dir)


if __name__ == "__main__":
    main()
