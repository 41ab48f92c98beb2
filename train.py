"""
Train a GPT under a mask: `python train.py`, or `python train.py --mask causal --max_iters 500`.

Prepares the data, trains with one progress bar, evaluates on held-out dialogues, writes out/ckpt.pt and
out/metrics.json, and prints a table of how many whole answers are exactly right.
"""
import argparse
import ctypes
import json
import os
import pathlib
import signal
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.checkpoint import check_finite, load_state, restore, save_checkpoint
from data.dialogues import FAMILIES, PATTERNS
from data.hf import copy_small_files, from_pretrained, load_tokenizer, read_config
from data.loader import Split, prepare
from data.tokenizer import Tokenizer, one_line
from data.words import NEW_CITIES, NEW_NAMES
from mask import MASKS, annealed, loss_positions
from model import GPT, GPTConfig


# Set by torchrun: the number of this process, the same on its machine, and how many there are.
RANK, LOCAL_RANK, WORLD = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


def setting(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Settings:
    mask: str = setting("ism", "the attention mask", tuple(MASKS))
    data: str = setting("", "a JSONL file of chats; without it, synthetic dialogues")
    n_dialogues: int = setting(30000, "synthetic dialogues to train on")
    families: str = setting(",".join(FAMILIES), "families of synthetic dialogues to train and report on")
    mixed: bool = setting(True, "synthetic dialogues may change their subject, from one family to another")
    tokenizer: str = setting("nanoism", "'nanoism' or the name of a tiktoken encoding")
    init_from: str = setting("", "a Hugging Face folder: start from its weights, with its sizes and tokenizer")
    out_dir: str = setting("out", "where the checkpoint and the figures go")
    device: str = setting("auto", "cpu, cuda, mps; auto takes the fastest there is")
    dtype: str = setting("auto", "of the computation; auto tries which is fast", ("auto", "float32", "bfloat16"))
    max_iters: int = setting(2400, "training steps")
    batch_size: int = setting(16, "a step holds batch_size * block_size tokens, in as many dialogues as fit")
    grad_accum: int = setting(1, "parts that a batch is cut into to save memory; their gradients add up to the batch's")
    checkpointing: bool = setting(False, "compute each block again in the backward pass to save memory")
    block_size: int = setting(256, "longest context in tokens")
    n_layer: int = setting(2, "blocks")
    n_head: int = setting(4, "query heads")
    n_kv_head: int = setting(0, "key and value heads; 0: as many as query heads")
    n_embd: int = setting(128, "width")
    qkv_bias: bool = setting(False, "biases on queries, keys and values")
    qk_norm: bool = setting(True, "norms on queries and keys")
    tie_embeddings: bool = setting(True, "one matrix for the embedding and the head")
    token_shift: bool = setting(True, "before attention, add learned shares of the three positions before")
    answers_only: bool = setting(True, "loss on answers alone, not on queries")
    anneal: int = setting(0, "steps in which the mask goes from causal to its own")
    learning_rate: float = setting(0.0, "peak learning rate; 0: 1e-2, with --init_from 2e-5")
    warmup_iters: int = setting(50, "steps of linear warm-up")
    decay: float = setting(0.4, "last fraction of the steps, in which the rate falls linearly to 0")
    muon: bool = setting(True, "Muon for the matrices in the blocks of a new model, AdamW for all else")
    weight_decay: float = setting(0.05, "of the matrices in the blocks")
    grad_clip: float = setting(1.0, "largest norm of the gradient")
    eval_interval: int = setting(1000, "steps between evaluations and checkpoints")
    seed: int = setting(0, "of the data, the weights and the order")
    compile: bool = setting(False, "torch.compile the blocks")
    resume: bool = setting(False, "go on from the checkpoint in out_dir")

    def __post_init__(self):
        for f in fields(self):
            least = 0 if f.name in ("seed", "n_kv_head", "warmup_iters", "anneal") else 1
            if f.type is int and getattr(self, f.name) < least:
                raise ValueError(f"--{f.name} must be at least {least}, not {getattr(self, f.name)}")
            if f.type is float and not 0 <= getattr(self, f.name) < float("inf"):
                raise ValueError(f"--{f.name} must be a number from 0 on, not {getattr(self, f.name)}")
        for name in self.families.split(","):
            if name not in FAMILIES:
                raise ValueError(f"--families has no '{name}'; there are {', '.join(FAMILIES)}, with a comma between them")
        self.learning_rate = self.learning_rate or (2e-5 if self.init_from else 1e-2)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        sys.exit(f"{self.prog}: {message} (--help lists the flags)")


def parse(settings_class, description, argv=None):
    """A dataclass of settings from the command line: each field is a flag."""
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    for f in fields(settings_class):
        kind = {"type": f.type} if f.type is not bool else {"action": argparse.BooleanOptionalAction}
        if f.metadata["choices"]:
            kind["choices"] = f.metadata["choices"]
        parser.add_argument(f"--{f.name}", default=f.default, help=f.metadata["help"], **kind)
    return settings_class(**vars(parser.parse_args(argv)))


def pick_device(name):
    """A torch device from its name; ValueError if it is not there."""
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if WORLD > 1 and name in ("auto", "cuda") and there[0] == "cuda":  # a GPU for each process
        if LOCAL_RANK >= torch.cuda.device_count():
            raise ValueError(f"--nproc_per_node asks for more processes than the {torch.cuda.device_count()} GPUs of this machine")
        return torch.device("cuda", LOCAL_RANK)
    if name == "auto":
        return torch.device(there[0])
    if name.split(":")[0] not in there:
        raise ValueError(f"--device {name} is not on this machine; there is {', '.join(there)}")
    return torch.device(name)


def pick_dtype(name, device):
    """The dtype to compute in; auto times a product of matrices in both, since not every CPU is fast in bfloat16."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cpu":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.ones(1024, 256, dtype=dtype), torch.ones(256, 1024, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            x @ w
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return torch.bfloat16 if seconds[torch.bfloat16] < 0.8 * seconds[torch.float32] else torch.float32


def autocast(device, dtype):
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()


def tune_cpu():
    """What makes many small steps of ever other shapes cheap on a CPU; together 1.3 times the speed."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")  # a kernel is prepared once for each shape
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc keeps freed blocks
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def learning_rate(step, s):
    """Linear warm-up, constant, linear decay to 0."""
    return s.learning_rate * min((step + 1) / (s.warmup_iters + 1), 1, (s.max_iters - step) / (s.decay * s.max_iters + 1))


def batch_stream(split, rows, s, start):
    """Batches without end, in an order that depends on the seed and the step alone."""
    epoch = 0
    while True:
        batches = split.batches(rows, s.batch_size * s.block_size, seed=(s.seed, epoch))
        yield from batches[start:]
        start, epoch = max(0, start - len(batches)), epoch + 1


def inputs(split, rows, mask, device, answers_only=True):
    """Rows -> (tokens (B, T), at (N,), targets (N,), f (B, T), segments (B, T)), the last two on the CPU.

    at: the positions in the flattened rows that have loss. N is rounded up to a multiple of 64, since kernels are
    prepared once for each shape: what is added has the target -100, which cross_entropy ignores.
    """
    tokens, segments = split.collate(rows)
    f = mask(segments)
    at = loss_positions(segments, f, answers_only).flatten().nonzero()[:, 0]
    targets = tokens.roll(-1, 1).flatten()[at]
    more = -len(at) % 64
    at, targets = F.pad(at, (0, more)), F.pad(targets, (0, more), value=-100)
    return *(x.to(device, non_blocking=True) for x in (tokens, at, targets)), f, segments


def model_config(s, vocab_size):
    return GPTConfig(vocab_size=vocab_size, block_size=s.block_size, n_layer=s.n_layer, n_head=s.n_head,
                     n_kv_head=s.n_kv_head or s.n_head, n_embd=s.n_embd, n_hidden=2 * s.n_embd, qkv_bias=s.qkv_bias, qk_norm=s.qk_norm,
                     tie_embeddings=s.tie_embeddings, token_shift=s.token_shift)


class Muon(torch.optim.AdamW):
    """AdamW, and Muon for the groups marked so (Jordan et al., 2024; https://kellerjordan.github.io/posts/muon).

    Muon steps along a matrix's momentum with all singular values made about equal, so that no direction is left behind;
    the size of a step goes with the shape, so that one learning rate serves both (Liu et al., 2025, arXiv:2502.16982).
    After 300 steps of 2,048 tokens 29 % of the four patterns were right, with AdamW 3 %, each at its best rate so far.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}  # shape -> parameters, which are then multiplied together
            for p in group["params"]:
                if group["muon"] and p.grad is not None:
                    alike.setdefault(p.shape, []).append(p)
            for (rows, columns), matrices in alike.items():
                pushes = []
                for p in matrices:
                    if not self.state[p]:
                        self.state[p].update(momentum=torch.zeros_like(p), step=torch.zeros(()))  # AdamW wants a step where there is a state
                    momentum = self.state[p]["momentum"].lerp_(p.grad, 0.05)
                    pushes.append(torch.lerp(p.grad, momentum, 0.95))
                    p.grad = None  # so that AdamW leaves it alone
                rate = group["lr"] * 0.1 * max(rows, columns) ** 0.5  # with 0.2 steps are as large as AdamW's
                for p, push in zip(matrices, equalize(torch.stack(pushes))):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(push, alpha=rate)
        super().step()


def equalize(x):
    """Matrices (N, r, c) with all their singular values moved to about 1, in bfloat16: five steps of a polynomial of x x^T."""
    if x.shape[1] > x.shape[2]:
        return equalize(x.mT).mT
    y = x.bfloat16() / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        a = y @ y.mT  # (N, r, r)
        y = 3.4445 * y + torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315) @ y
    return y.to(x.dtype)


def make_optimizer(model, s):
    """Muon for the matrices in the blocks of a new model, AdamW for all else."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (matrices if name.startswith("blocks") and p.dim() > 1 and not name.endswith("shares") else others).append(p)
    groups = [{"params": matrices, "weight_decay": s.weight_decay, "muon": s.muon and not s.init_from},
              {"params": others, "weight_decay": 0.0, "muon": False}]
    return Muon(groups, lr=s.learning_rate, betas=(0.9, 0.95), fused=matrices[0].device.type != "mps")


def gradients(model, split, batch, mask, s, device, dtype):
    """Add the gradients of a batch's mean loss to the parameters, in s.grad_accum parts; returns the loss ().

    Of several processes each takes its rows, and returns its share of the loss.
    """
    own = [rows for rows in np.array_split(batch, s.grad_accum * WORLD)[RANK::WORLD] if len(rows)]
    parts = [inputs(split, rows, mask, device, s.answers_only) for rows in own or [batch[:1]]]
    if not own:  # fewer rows than processes: go along, and count nothing
        parts[0][2].fill_(-100)
    count = sum((targets != -100).sum() for _, _, targets, _, _ in parts)
    if WORLD > 1:
        dist.all_reduce(count)
    total = torch.zeros((), device=device)
    for i, (tokens, at, targets, f, _) in enumerate(parts, 1):
        with model.no_sync() if WORLD > 1 and i < len(parts) else nullcontext():
            with autocast(device, dtype):
                logits = model(tokens, f, at=at)
            loss = F.cross_entropy(logits.float(), targets, reduction="sum") / count  # a mean over the batch, not over the part
            (WORLD * loss).backward()  # DistributedDataParallel takes the mean over the processes
        total += loss.detach()
    return total


def update(model, optimizer, split, batch, mask, rate, s, device, dtype):
    """One training step on a batch of rows at a learning rate: the loss ()."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = gradients(model, split, batch, mask, s, device, dtype)
    torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def until_stopped(batches):
    """The batches up to Ctrl-C or SIGTERM, so that no step is cut in two; the second time they act as ever."""
    asked, before = [], {}

    def ask(number, _):
        asked.append(number)
        restore()

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
        for batch in batches:
            if asked:
                return
            yield batch
    finally:
        restore()


@torch.no_grad()
def evaluate(model, split, mask, s, device, dtype):
    """Teacher-forced: the mean loss, and for each answer a row (dialogue, segment, right).

    Greedy decoding writes an answer exactly iff every argmax in it is right, so one forward scores a batch.
    """
    model.eval()
    loss, count, answers = 0.0, 0, [np.zeros((0, 3), dtype=np.int64)]
    for batch in split.batches(split.rows(mask), 4 * s.batch_size * s.block_size // s.grad_accum, seed=0)[RANK::WORLD]:
        tokens, at, targets, f, segments = inputs(split, batch, mask, device)
        with autocast(device, dtype):
            logits = model(tokens, f, at=at)
        loss += F.cross_entropy(logits.float(), targets, reduction="sum").item()
        real = (targets != -100).cpu()
        count += int(real.sum())
        wrong = (logits.argmax(-1) != targets).cpu()[real].numpy()
        at = at.cpu()[real]
        dialogue = torch.from_numpy(batch[:, :1]).expand_as(segments).flatten()[at]
        answer, which = np.unique(torch.stack([dialogue, segments.flatten()[at + 1]], 1), axis=0, return_inverse=True)
        answers.append(np.column_stack([answer, np.bincount(which.ravel(), wrong, len(answer)) == 0]))
    model.train()
    if WORLD > 1:
        every = [None] * WORLD
        dist.all_gather_object(every, (loss, count, answers))
        loss, count, answers = (sum(parts[1:], parts[0]) for parts in zip(*every))
    return loss / max(count, 1), np.concatenate(answers)


def summary(split, answers):
    """Fractions of whole answers exactly right: {family: ...}, {turn: ...}."""
    dialogue, segment, right = answers.T
    family = np.asarray(split.families)[dialogue]
    last = np.asarray(split.segments)[split.offsets[1:] - 1][dialogue]
    which = {name: family == i for i, name in enumerate(split.family_names)}
    if set(PATTERNS) & set(which):
        which["the four patterns"] = sum(which[name] for name in PATTERNS if name in which) > 0
    turns = {"first": segment == 2, "middle": (segment > 2) & (segment < last), "last": (segment > 2) & (segment >= last)}
    return [{name: float(right[at].mean()) for name, at in groups.items() if at.any()} for groups in (which, turns)]


def segment_text(split, tokenizer, dialogue, segment):
    row = slice(*split.offsets[dialogue : dialogue + 2])
    return tokenizer.decode(split.tokens[row][split.segments[row] == segment].tolist())


def needs_new_word(split, answers, tokenizer):
    """Which answers (N, 3) contain a word that is in no training dialogue: boolean (N,)."""
    texts = (segment_text(split, tokenizer, dialogue, segment) for dialogue, segment, _ in answers)
    return np.array([any(word in text for word in NEW_NAMES + NEW_CITIES) for text in texts], dtype=bool)


def connect(device, dtype):
    """Join the processes that torchrun started: the dtype of the first, since what one CPU is fast in another may not be."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    dist.broadcast_object_list(chosen := [dtype], device=device)
    return chosen[0]


def make_folder(path):
    """The folder at a path, made if need be. ValueError if it cannot be written: told now, not at the first checkpoint."""
    folder = pathlib.Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--out_dir {folder} is no folder that can be written ({error.strerror}); name another") from None
    return folder


def measure(model, folder, tokenizer, mask, s, device, dtype):
    """The metrics of a trained model on the dialogues held out for the end."""
    test = Split(folder, "test")
    loss, answers = evaluate(model, test, mask, s, device, dtype)
    accuracy, by_turn = summary(test, answers)
    metrics = {"accuracy": accuracy, "accuracy_by_turn": by_turn, "loss": loss, "parameters": model.n_params(), "settings": asdict(s)}
    if not s.data:
        new = Split(folder, "new_words")
        _, answers = evaluate(model, new, mask, s, device, dtype)
        metrics["accuracy_new_words"] = summary(new, answers[needs_new_word(new, answers, tokenizer)])[0]
    return metrics


def train(s, model=None):
    """Train by the settings; returns the metrics. model: one that is there already, for --init_from.

    ValueError for settings that cannot be.
    """
    began = time.time()
    tune_cpu()
    device = pick_device(s.device)
    dtype = pick_dtype(s.dtype, device)
    if WORLD > 1:
        dtype = connect(device, dtype)
    mask, tokenizer = MASKS[s.mask], load_tokenizer(s.init_from) if s.init_from else Tokenizer(s.tokenizer)
    out = make_folder(s.out_dir)
    if s.init_from:
        config = read_config(s.init_from, s.block_size)
        if RANK == 0:
            copy_small_files(s.init_from, out)  # so that out_dir, with its tokenizer, can be moved to another machine
    else:
        config = model_config(s, tokenizer.vocab_size)
    state = load_state(out / "ckpt.pt", config, tokenizer.identity, s.mask) if s.resume else None
    if LOCAL_RANK:  # the first process of a machine prepares the data, the others find them
        dist.barrier()
    folder = prepare(tokenizer, s.block_size, s.data, s.n_dialogues, s.seed, s.mixed, tuple(s.families.split(",")))
    if WORLD > 1 and not LOCAL_RANK:
        dist.barrier()
    split = Split(folder, "train")
    rows = split.rows(mask)
    torch.manual_seed(s.seed)
    model = model or (from_pretrained(s.init_from, s.block_size) if s.init_from else GPT(config))
    model = model.to(device)
    model.checkpointing = s.checkpointing
    optimizer = make_optimizer(model, s)
    step = restore(state, model, optimizer, s.max_iters, out / "ckpt.pt") if state else 0
    if s.compile:
        for block in model.blocks:
            block.compile(dynamic=True)
    network = DistributedDataParallel(model) if WORLD > 1 else model
    if RANK == 0:
        print(f"{model.n_params() / 1e6:.2f}M parameters, {s.mask} mask, {device.type} in {str(dtype)[6:]}, "
              f"{len(rows):,} rows of {(rows[:, 2] - rows[:, 1]).mean():.0f} tokens" + (f", {WORLD} processes" if WORLD > 1 else ""))

    def checkpoint():
        if RANK == 0:
            save_checkpoint(out / "ckpt.pt", config=asdict(config), settings=asdict(s), tokenizer=tokenizer.identity,
                            model=model.state_dict(), optimizer=optimizer.state_dict(), step=step)

    bar = tqdm(total=s.max_iters, initial=step, desc="train", unit="step", mininterval=0.5, disable=RANK > 0)
    seen, since, val, loss = 0, time.time(), None, torch.zeros(())
    for batch in until_stopped(batch_stream(split, rows, s, step)):
        if step >= s.max_iters:
            break
        current = annealed(mask, step / s.anneal) if step < s.anneal else mask
        loss = update(network, optimizer, split, batch, current, learning_rate(step, s), s, device, dtype)
        step += 1
        seen += int((batch[:, 2] - batch[:, 1]).sum())
        bar.update()
        if step % 20 == 0:
            if WORLD > 1:
                dist.all_reduce(loss)
            check_finite(loss, step)
            bar.set_postfix_str(f"loss {loss.item():.3f}, {seen / (time.time() - since):,.0f} tokens/s"
                                + (f", held-out right {val:.1%}" if val is not None else ""))
        if step % s.eval_interval == 0 and step < s.max_iters:
            val_loss, answers = evaluate(model, Split(folder, "val"), mask, s, device, dtype)
            check_finite(val_loss, step)
            val = answers[:, 2].mean()
            checkpoint()
    bar.close()
    check_finite(loss, step)
    checkpoint()
    if step < s.max_iters:
        raise KeyboardInterrupt(f"stopped after step {step} of {s.max_iters}; the same flags and --resume go on from {out / 'ckpt.pt'}")

    metrics = {**measure(model, folder, tokenizer, mask, s, device, dtype), "seconds": time.time() - began}
    if RANK == 0:
        (out / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    if WORLD > 1:
        dist.destroy_process_group()
    return metrics


def report(m, ckpt):
    """Print the table of a run's metrics, and how to chat with the model at `ckpt`."""
    print(f"\nHeld-out answers that are exactly right, whole      loss {m['loss']:.4f}, {m['seconds']:.0f} s")
    for title, key in (("by family", "accuracy"), ("by turn", "accuracy_by_turn"), ("that need a word never trained on", "accuracy_new_words")):
        if m.get(key):  # none of some families' answers may need a new word
            print(f"  {title}")
            for name, value in m[key].items():
                print(f"    {name:18} {value:6.1%}")
    print("\nchat with it: python sample.py" + (f" --ckpt {ckpt}" if ckpt != "out/ckpt.pt" else ""))


def out_of_memory(error):
    """Whether a RuntimeError of torch says so, of a GPU's memory or of the computer's."""
    return any(words in str(error) for words in ("out of memory", "can't allocate memory"))


def main():
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        s = parse(Settings, "Train a GPT under a mask on dialogues.")
        m = train(s)
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {one_line(error)}")
    except RuntimeError as error:
        if out_of_memory(error):
            sys.exit("train.py: out of memory; lower --batch_size, --block_size, --n_layer or --n_embd, or raise --grad_accum or "
                     "set --checkpointing")
        if WORLD == 1 or "peer" not in str(error):  # what is left of a connection when its other end has died
            raise
        sys.exit(f"train.py: process {RANK} stops, because another one has stopped; --resume goes on from the last checkpoint")
    except KeyboardInterrupt as stop:
        sys.exit(f"\ntrain.py: {str(stop) or 'stopped; if there is a checkpoint, the same flags and --resume go on from it'}")
    if RANK == 0:
        report(m, f"{s.out_dir}/ckpt.pt")


if __name__ == "__main__":
    main()
