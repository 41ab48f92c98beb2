"""
Train a GPT under a mask: `python train.py`, or `python train.py --mask causal --max_iters 500`.

Read `train` first: dialogues as numbers, what each token may see, where there is a loss, one step.
Prepares the data, trains with one progress bar, writes out/ckpt.pt and out/metrics.json, and prints
how many answers of held-out dialogues are exactly right, as a whole.
"""
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F

from data.machine import DEVICES, DTYPES, RANK, WORLD, autocast, from_all, setting
from data.synthetic import FAMILIES
from mask import MASKS, loss_positions


@dataclass
class Settings:
    """What a run is made of. Each field is a flag of the command line."""

    mask: str = setting("ism", "the attention mask", tuple(MASKS))
    data: str = setting("", "a JSONL file of chats; without it, synthetic dialogues")
    skip_bad: bool = setting(False, "go on without lines of the file that cannot be read")
    n_dialogues: int = setting(30000, "synthetic dialogues to train on")
    families: str = setting(",".join(FAMILIES), "of synthetic dialogues, to train and report on")
    tokenizer: str = setting("nanoism", "'nanoism' or the name of a tiktoken encoding")
    init_from: str = setting("", "start from the weights of a Hugging Face folder")
    out_dir: str = setting("out", "where the checkpoint and the figures go")
    device: str = setting("auto", DEVICES)
    dtype: str = setting("auto", "to compute in; auto: bfloat16, or float32 where the processor "
                         "has it by emulation alone, as a T4", DTYPES)
    max_iters: int = setting(None, "training steps (default: 4000; if no chats are held out, 400)")
    batch_size: int = setting(8, "a step holds batch_size * block_size tokens, in whole dialogues")
    grad_accum: int = setting(1, "parts that a batch is cut into to save memory")
    checkpointing: bool = setting(False, "compute blocks again in the backward pass to save memory")
    block_size: int = setting(256, "longest context in tokens")
    n_layer: int = setting(2, "blocks of a new model")
    n_head: int = setting(2, "its query heads")
    n_embd: int = setting(96, "its width")
    answers_only: bool = setting(True, "loss on answers alone, not on queries")
    anneal: int = setting(0, "steps in which the mask goes from causal to its own")
    learning_rate: float = setting(None, "peak (default: 0.008, with --init_from 2e-5)")
    warmup_iters: int = setting(50, "steps of linear warm-up")
    decay: float = setting(0.4, "last fraction of the steps, in which the rate falls to 0")
    muon: bool = setting(True, "Muon for the matrices in the blocks of a new model, else AdamW")
    weight_decay: float = setting(0.05, "of the matrices in the blocks")
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0: any")
    eval_interval: int = setting(1000, "steps between evaluations and checkpoints")
    seed: int = setting(0, "of the data, the weights and the order")
    compile: bool = setting(False, "torch.compile the blocks")
    resume: bool = setting(False, "go on from the checkpoint in out_dir")

    def __post_init__(self):
        if self.learning_rate is None:
            self.learning_rate = 2e-5 if self.init_from else 8e-3
        from_zero = "seed", "warmup_iters", "anneal"
        for f in fields(self):
            value = getattr(self, f.name)
            least = 0 if f.name in from_zero else 1
            if f.type is int and value is not None and value < least:
                raise ValueError(f"--{f.name} must be at least {least}, not {value}")
            if f.type is float and not 0 <= value < float("inf"):
                raise ValueError(f"--{f.name} must be a number from 0 on, not {value}")
        if self.learning_rate == 0:
            raise ValueError("--learning_rate must be above 0: with 0 nothing is learned")
        if self.decay > 1:
            raise ValueError(f"--decay must be at most 1, all of the steps, not {self.decay}")
        if self.seed >= 1 << 64:
            raise ValueError(f"--seed must have at most 64 bits, not be {self.seed}")
        for name, known in (("mask", MASKS), ("dtype", DTYPES)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"--{name} has no '{value}'; there are {', '.join(known)}")
        for name in self.families.split(","):
            if name not in FAMILIES:
                raise ValueError(f"--families has no '{name}'; there are {', '.join(FAMILIES)}, "
                                 "with a comma between them")


def train(s, model=None, splits=None, watch=None):
    """Train by the settings -> the metrics, see `measure`. ValueError for settings that cannot be.

    model: one that is there already. splits: {"train", "val", "test": a Split each} in place of the
    data of the settings; no file is written then. watch(run, loss): called after each step.
    """
    run = begin(s, model, splits, watch)  # the data, the model, the optimizer: below the line
    model, optimizer = run.model, run.optimizer
    for rows in batches(run):
        mask = mask_at(run.step, s)
        total = torch.zeros((), device=run.device)
        # Dialogues as numbers, (B, T) each, padded on the right. Mostly a batch is one such part.
        for tokens, segments, count in parts(run, rows, mask):
            # What each token may see: one number for each.
            f = mask(segments)  # (B, T)
            # Where there is a loss, and the next tokens that shall be predicted there.
            at, targets = predicted(tokens, segments, f, s.answers_only)  # (N,) each
            # Predict and compare. The loss is a mean over the batch, of which this may be a part.
            tokens, at, targets = to_device(run.device, tokens, at, targets)
            with autocast(run.device, run.dtype):
                logits = model(tokens, f, at=at)  # (N, V)
            loss = F.cross_entropy(logits.float(), targets, reduction="sum") / count
            loss.backward()
            total += loss.detach()
        # One step against the gradient.
        add_up_gradients(run)
        if s.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(run.step, s)
        optimizer.step()
        optimizer.zero_grad()
        run.step += 1
        # Look and save.
        run.watch(run, total)
        if run.step % s.eval_interval == 0 and run.step < s.max_iters:
            save(run)
            look(run)
    return finish(run)


def predicted(tokens, segments, f, answers_only=True):
    """Where there is a loss: the positions (N,) in the flattened rows, and the next tokens (N,)."""
    at = loss_positions(segments, f, answers_only).flatten().nonzero()[:, 0]  # (N,)
    return at, tokens.flatten()[at + 1]


@torch.no_grad()
def evaluate(run, split):
    """The mean loss, and for each answer a row (dialogue, segment, right), (N, 3).

    Each token is predicted from the right ones before it. Greedy decoding writes an answer exactly
    if each of them is the likeliest. So one forward pass scores the answers of a batch.
    """
    s, mask, model = run.s, MASKS[run.s.mask], run.model.eval()
    loss, guesses = 0.0, [np.zeros((0, 3), dtype=np.int64)]
    n_tokens = 4 * s.batch_size * s.block_size // s.grad_accum
    for rows in split.batches(split.rows(mask), n_tokens, seed=0)[RANK::WORLD]:
        tokens, segments = split.collate(rows)  # (B, T) each
        f = mask(segments)  # (B, T)
        at, targets = predicted(tokens, segments, f)  # (N,) each
        dialogue = torch.from_numpy(rows[:, :1]).expand(segments.shape).flatten()[at]  # (N,)
        answer = segments.flatten()[at + 1]  # (N,)
        tokens, places, targets = to_device(run.device, tokens, at, targets)
        with autocast(run.device, run.dtype):
            logits = model(tokens, f, at=places).float()  # (N, V)
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        right = (logits.argmax(-1) == targets)[: len(at)].cpu()  # (N,)
        guesses.append(torch.stack([dialogue, answer, right], 1).numpy())
    model.train()
    every = from_all((loss, np.concatenate(guesses)))
    guesses = np.concatenate([part for _, part in every])  # (N, 3) a row a token
    # An answer is right if all its tokens are.
    answers, which = np.unique(guesses[:, :2], axis=0, return_inverse=True)
    wrong = np.bincount(which.ravel(), 1 - guesses[:, 2], len(answers))
    loss = sum(part for part, _ in every) / max(1, len(guesses))
    return loss, np.column_stack([answers, wrong == 0])


# ==== below this line: how a run starts and ends, its files, rates, processes, optimizer ====
import pathlib
import time
from dataclasses import asdict, field

from torch.optim.adamw import adamw

from data import checkpoint, hf, loader, machine
from data.scores import by_kind, needs_new_word, report, summary
from data.tokenizer import Tokenizer
from mask import annealed, causal, check, one_pass
from model import GPT, GPTConfig, compile_blocks, faster, recompute_blocks, upload

FEW_ITERS = 400  # in which chats are learned by heart that are so few that none is held out
FIRST_SAVE = 30  # seconds of training, after which there is a model to chat with


@dataclass
class Run:
    """What a run is made of, from `begin` on."""

    s: Settings
    device: torch.device
    dtype: torch.dtype
    tokenizer: Tokenizer
    splits: dict
    model: GPT
    optimizer: "Optimizer"
    out: pathlib.Path  # the folder of its files; None: it writes none
    step: int
    watch: object  # called as watch(run, loss) after each step
    began: float
    bar: machine.Bar = None  # the progress bar; None if another watches
    since: float = field(default_factory=time.time)  # the first step
    seen: int = 0  # tokens since then
    right: float = None  # the share of held-out answers, when last looked at
    told: bool = False  # that there is a checkpoint to chat with
    times: tuple = None  # seconds and CPU seconds at the first look; () when they were compared
    former: pathlib.Path = None  # where the first save puts the checkpoint of an earlier run
    saved: bool = False  # that it has put it there


def begin(s, model=None, splits=None, watch=None):
    """The machine, the data, the model, its optimizer, new or as a checkpoint has them: a Run."""
    began = time.time()
    machine.tune_cpu()
    device = machine.pick_device(s.device)
    dtype = machine.pick_dtype(s.dtype, device)
    if WORLD > 1:
        dtype = machine.connect(device, dtype)
    if s.init_from and pathlib.Path(s.init_from).resolve() == pathlib.Path(s.out_dir).resolve():
        raise ValueError(f"--out_dir {s.out_dir} is the folder of --init_from; name another")
    if s.init_from and not (splits or s.resume) and pathlib.Path(s.out_dir, hf.WEIGHTS).exists():
        raise ValueError(f"--out_dir {s.out_dir} holds a model, {hf.WEIGHTS}; name another")
    out = None if splits else open_folder(s)
    # The sizes of the model and its tokenizer: from a published checkpoint, or from the settings.
    if s.init_from:
        tokenizer = hf.load_tokenizer(s.init_from)
        if tokenizer.note and RANK == 0:
            print(machine.one_line(tokenizer.note))
        config = hf.read_config(s.init_from, s.block_size)
        check_shape(s)
    else:
        tokenizer = Tokenizer(s.tokenizer)
        config = model_config(s, tokenizer.vocab_size)
    state = None
    if s.resume:
        asked = {**asdict(config), "tokenizer": tokenizer.identity, "mask": s.mask}
        state = checkpoint.load_state(out / "ckpt.pt", asked)
    if s.data:
        machine.tell_idle(s, ("n_dialogues", "families"), "beside --data")
    else:
        machine.tell_idle(s, ["skip_bad"], "without --data")
    if s.mask == "causal":
        machine.tell_idle(s, ["anneal"], "under causal, where it begins")
    splits = splits or prepare(s, tokenizer)
    if s.max_iters is None:
        s.max_iters = FEW_ITERS if splits["test"] is splits["train"] else 4000
    others = "; ".join(checkpoint.other_settings(state, s)) if s.resume else ""
    if others and RANK == 0:
        print(machine.one_line(f"goes on with other settings than before: {others}"))
    check_mask(s.mask, splits["train"], s.answers_only)
    if s.init_from and RANK == 0 and out is not None and not s.resume:
        hf.copy_small_files(s.init_from, out)  # so that out_dir can be moved to another machine
    torch.manual_seed(s.seed)
    if model is None and s.init_from:
        model = hf.from_pretrained(s.init_from, s.block_size)
    elif model is None:
        model = GPT(config)
    model = model.to(device)
    optimizer = make_optimizer(model, s)
    step = 0
    if state is not None:
        step = checkpoint.restore(state, model, optimizer, s.max_iters, out / "ckpt.pt")
    faster(model.train(), dtype, print if RANK == 0 else lambda line: None)
    if s.compile:
        machine.check_compiler(device)
        compile_blocks(model)
    if s.checkpointing:
        recompute_blocks(model)
    run = Run(
        s, device, dtype, tokenizer, splits, model, optimizer, out, step, watch, began,
    )
    if out is not None and not s.resume and RANK == 0:
        run.former, line = checkpoint.put_away(pathlib.Path(s.out_dir, "ckpt.pt"))
        if line:
            print(line)
    if watch is None:
        run.watch, run.bar = tell, announce(run)
    return run


def open_folder(s):
    """The folder of --out_dir, made and locked for this run. ValueError if it cannot be had."""
    try:
        out = checkpoint.make_folder(s.out_dir)
    except OSError as error:
        why = f"is no folder that can be written ({error.strerror}); name another"
        raise ValueError(f"--out_dir {s.out_dir} {why}") from None
    if RANK == 0:
        checkpoint.hold(out)
    return out


def model_config(s, vocab_size):
    """The GPTConfig of the settings: a setting that is a field of it too reaches it."""
    options = {"n_kv_head": s.n_head, "n_hidden": 2 * s.n_embd}
    options |= {"qk_norm": True, "token_shift": True}
    for f in fields(GPTConfig):
        if hasattr(s, f.name):
            options[f.name] = getattr(s, f.name)
    return GPTConfig(**options | {"vocab_size": vocab_size})


def check_shape(s):
    """ValueError if the settings ask for another model than that of --init_from."""
    shape = {f.name for f in fields(GPTConfig)} - {"block_size"} | {"tokenizer"}
    for f in fields(s):
        if f.name in shape and getattr(s, f.name) != f.default:
            raise ValueError(f"--{f.name} is that of the folder of --init_from; leave it out")


def prepare(s, tokenizer):
    """The data of the settings, prepared if need be: by the first process of a machine, for all."""
    if machine.LOCAL_RANK > 0:
        torch.distributed.barrier()
    folder = loader.prepare(
        tokenizer, s.block_size, s.data, n_dialogues=s.n_dialogues, seed=s.seed,
        families=tuple(s.families.split(",")), skip_bad=s.skip_bad,
    )
    if WORLD > 1 and machine.LOCAL_RANK == 0:
        torch.distributed.barrier()
    return loader.read_splits(folder)


def check_mask(name, split, answers_only=True):
    """ValueError for a mask that returns no f, or under which nothing can be trained.

    A line tells if it is a part of the answers' tokens alone.
    """
    mask = MASKS[name]
    try:
        rows = split.rows(mask)
        _, segments = split.collate(rows[:64])
        f = mask(segments)
        check(f, segments.shape)
    except ValueError as error:
        if not machine.for_the_user(error):
            raise
        raise ValueError(f"the mask '{name}': {error}") from None
    if not loss_positions(segments, f, answers_only).any():
        raise ValueError(f"under the mask '{name}' nothing can be trained: before each token of an "
                         "answer stands one that has seen it; let answers see no future (mask.py)")
    # Under causal no token is seen too early, so that all of the answers can be trained.
    answers = loss_positions(segments, causal(segments))  # (B, T)
    if not one_pass(mask):  # a row a turn: of each its last answer
        answers &= segments.roll(-1, 1) == segments.amax(1, keepdim=True)
    share = (loss_positions(segments, f) & answers).sum() / answers.sum()
    if share < 1 and RANK == 0:
        print(f"under the mask '{name}' {share:.0%} of the answers' tokens are trained and scored: "
              "before each of the others stands one that has seen it")


def batches(run):
    """The rows of each step, in an order that depends on the seed and the step alone."""
    s, split = run.s, run.splits["train"]
    rows = split.rows(MASKS[s.mask])

    def endless():
        epoch, start = 0, run.step
        while True:
            cut = split.batches(rows, s.batch_size * s.block_size, seed=(s.seed, epoch))
            yield from cut[start:]
            start, epoch = max(0, start - len(cut)), epoch + 1

    for batch in machine.until_stopped(endless()):
        if run.step >= s.max_iters:
            return
        yield batch
        run.seen += int((batch[:, 2] - batch[:, 1]).sum())


def parts(run, rows, mask):
    """A batch in parts (tokens, segments, number of targets in all of them): mostly it is one.

    --grad_accum cuts it, so that memory is enough. Of several processes each gets its own parts.
    """
    s, split = run.s, run.splits["train"]
    n = min(len(rows), s.grad_accum * WORLD)
    cut = [split.collate(part) for part in np.array_split(rows, n)]
    targets = [predicted(tokens, x, mask(x), s.answers_only)[1] for tokens, x in cut]
    count = max(1, sum(map(len, targets)))
    return [(tokens, segments, count) for tokens, segments in cut[RANK::WORLD]]


def to_device(device, tokens, at, targets):
    """The three on the device, the positions (N,) filled up to a multiple of 64.

    Kernels are prepared once for each shape. What is added has the target -100, which cross_entropy
    ignores.
    """
    more = -len(at) % 64
    at = F.pad(at, (0, more))
    targets = F.pad(targets, (0, more), value=-100)
    return [upload(x, device) for x in (tokens, at, targets)]


def mask_at(step, s):
    """The mask of a step: that of the settings, or one on the way there from causal (--anneal)."""
    if step < s.anneal:
        return annealed(MASKS[s.mask], step / s.anneal)
    return MASKS[s.mask]


def rate_at(step, s):
    """The learning rate of a step: linear warm-up, constant, linear decay to 0."""
    warm = (step + 1) / (s.warmup_iters + 1)
    cool = (s.max_iters - step) / (s.decay * s.max_iters + 1)
    return s.learning_rate * min(warm, 1, cool)


def add_up_gradients(run):
    """Of several processes each has gradients of its own parts; their sum is the batch's."""
    if WORLD > 1:
        trained = [p for p in run.model.parameters() if p.requires_grad]
        for p in trained:
            if p.grad is None:  # fewer rows than processes
                p.grad = torch.zeros_like(p)
        machine.add_up([p.grad for p in trained])


def announce(run):
    """The line at the start; the progress bar."""
    rows = run.splits["train"].rows(MASKS[run.s.mask])
    length = (rows[:, 2] - rows[:, 1]).mean()
    n = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    trained = f", {n / 1e6:.2f}M of them trained" if n < run.model.n_params() else ""
    facts = [
        f"{run.model.n_params() / 1e6:.2f}M parameters{trained}", f"{run.s.mask} mask",
        f"{run.device.type} in {str(run.dtype)[6:]}",
        f"{len(rows):,} rows of {length:.0f} tokens",
    ]
    if len(rows) > len(run.splits["train"].families):
        facts.append("a row an answer, since f changes as a dialogue grows")
    if WORLD > 1:
        facts.append(f"{WORLD} processes")
    if RANK == 0:
        print(", ".join(facts))
        if run.splits["test"] is run.splits["train"]:
            few = f"fewer than {loader.FEW} different chats: all are trained on"
            print(f"{few}, and the report is on the same ones")
    return machine.Bar(
        total=run.s.max_iters, initial=run.step, desc="train", unit="step", mininterval=0.5,
        disable=RANK > 0, bar_format=BAR,
    )


# Without the steps a second, so that in 80 columns there is room for the bar itself.
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def tell(run, loss):
    """Move the bar, and tell the loss and the speed now and then."""
    run.bar.update()
    if RANK == 0 and run.out and not run.told and time.time() - run.since > FIRST_SAVE:
        run.told = True
        save(run)
        # With LoRA the file holds other weights than a GPT's: it is for --resume alone.
        if all(p.requires_grad for p in run.model.parameters()):
            run.bar.tell(f"chat with it so far, in another terminal: {chat_command(run.s)}")
    if run.step % 20 > 0 and run.step < run.s.max_iters:
        return
    if WORLD > 1:
        machine.add_up([loss])
    checkpoint.check_finite(loss, run.step)
    speed = run.seen / (time.time() - run.since)
    news = f"{speed:,.0f} tokens/s"
    if run.right is not None:
        news = f"{reported_on(run.splits)} right {run.right:.1%}"
    run.bar.set_postfix_str(f"loss {loss.item():.3f}, {news}")
    if RANK == 0 and run.device.type == "cpu":
        look_at_cores(run)


def look_at_cores(run):
    """Tell, once, whether each thread has a core, by the steps between the first two looks."""
    times = time.perf_counter(), time.process_time()
    if run.times is None:  # at the first look kernels have still been prepared
        run.times = times
    elif run.times:
        spent = [now - before for now, before in zip(times, run.times)]
        line = machine.crowded(*spent, torch.get_num_threads())
        if line:
            run.bar.tell(line)
        run.times = ()


def reported_on(splits):
    """What the dialogues are that a run looks at and reports on."""
    return "trained-on" if splits["test"] is splits["train"] else "held-out"


def chat_command(s):
    """The command that chats with what a run has saved."""
    path = str(pathlib.Path(s.out_dir, "ckpt.pt"))
    return machine.command("sample.py", *([] if s.out_dir == "out" else ["--ckpt", path]))


def save(run):
    """Write the checkpoint, whole or not at all. The first one puts an earlier run's away."""
    if RANK > 0 or run.out is None:
        return
    checkpoint.save_checkpoint(
        run.out / "ckpt.pt", former=run.former, config=asdict(run.model.config),
        settings=asdict(run.s), tokenizer=run.tokenizer.identity, model=run.model.state_dict(),
        optimizer=run.optimizer.state_dict(), step=run.step,
    )
    if not run.saved and not run.s.resume:  # earlier figures go where their checkpoint went
        figures, before = run.out / "metrics.json", run.out / "metrics.before.json"
        if run.former is not None:
            before.unlink(missing_ok=True)
            if figures.exists():
                figures.rename(before)
        figures.unlink(missing_ok=True)
    run.former, run.saved = None, True


def look(run):
    """Ask the dialogues that are held out for a look now and then."""
    _, answers = evaluate(run, run.splits["val"])
    run.right = answers[:, 2].mean()


def finish(run):
    """Save, measure, write the metrics. KeyboardInterrupt if the run was stopped before its end."""
    save(run)
    if RANK == 0 and run.out is not None:
        checkpoint.let_go(run.out)
    if run.bar is not None:
        run.bar.close()
    if run.step < run.s.max_iters:
        stopped = f"stopped after step {run.step} of {run.s.max_iters}"
        if run.out is not None:
            path = pathlib.Path(run.s.out_dir, "ckpt.pt")
            stopped += f"; the same flags and --resume go on from {path}"
        raise KeyboardInterrupt(stopped)
    metrics = measure(run)
    if RANK == 0 and run.out is not None:
        checkpoint.write_json(run.out / "metrics.json", metrics)
    if WORLD > 1:
        torch.distributed.destroy_process_group()
    return metrics


def measure(run):
    """The metrics of a trained model on the dialogues held out for the end."""
    test = run.splits["test"]
    loss, answers = evaluate(run, test)
    accuracy, by_turn = summary(test, answers)
    metrics = {"accuracy": accuracy, "accuracy_by_turn": by_turn, "loss": loss}
    if "reasoning" in test.family_names:
        metrics["accuracy_by_kind"] = by_kind(test, answers, run.tokenizer)
    if "new_words" in run.splits:
        new = run.splits["new_words"]
        _, answers = evaluate(run, new)
        answers = answers[needs_new_word(new, answers, run.tokenizer)]
        metrics["accuracy_new_words"], _ = summary(new, answers)
    return {
        **metrics, "reported_on": reported_on(run.splits), "parameters": run.model.n_params(),
        "settings": asdict(run.s), "seconds": time.time() - run.began,
    }


class Optimizer:
    """Muon for the groups marked so (Jordan et al., kellerjordan.github.io/posts/muon), else AdamW.

    Muon steps along a matrix's momentum with all singular values made about equal, so that no
    direction is left behind. The size of a step goes with the shape, so that one learning rate
    serves both (Liu et al., 2025, arXiv:2502.16982). After 300 steps of 2,048 tokens 29 % of the
    four patterns were right, with AdamW 3 %, each at its best rate so far.

    It has what a training needs of torch.optim.Optimizer, under the same names. To build on that
    class would import torch's compiler, 2.2 s of each start.
    """

    def __init__(self, groups, lr):
        self.param_groups = [{**group, "lr": lr} for group in groups]
        self.state = {}  # parameter -> the running means of its gradients, by name

    def parameters(self):
        return [p for group in self.param_groups for p in group["params"]]

    def zero_grad(self):
        for p in self.parameters():
            p.grad = None

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not group["muon"]:
                self.adamw_step(params, group["lr"], group["weight_decay"])
                continue
            # Matrices of one shape are multiplied together: 42 ms a step and not 381.
            alike = {}
            for p in params:
                alike.setdefault(p.shape, []).append(p)
            for matrices in alike.values():
                self.muon_step(matrices, group["lr"], group["weight_decay"])

    def adamw_step(self, params, rate, weight_decay):
        for p in params:
            if p not in self.state:
                self.state[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p),
                }
        slots = [self.state[p] for p in params]
        adamw(
            params, [p.grad for p in params], [slot["exp_avg"] for slot in slots],
            [slot["exp_avg_sq"] for slot in slots], [], [slot["step"] for slot in slots],
            lr=rate, weight_decay=weight_decay, beta1=0.9, beta2=0.95, eps=1e-8, amsgrad=False,
            maximize=False, fused=all(p.device.type != "mps" for p in params),
        )

    def muon_step(self, matrices, rate, weight_decay):
        """A step of matrices of one shape."""
        rows, columns = matrices[0].shape
        blocks = -(-rows // BLOCK) if min(rows, columns) > BLOCK else 1
        height = -(-rows // blocks)
        # Below the last row there may be a few of zeros, which change nothing.
        pushes = matrices[0].new_zeros(len(matrices), blocks * height, columns)
        for p, push in zip(matrices, pushes):
            if p not in self.state:
                self.state[p] = {"momentum": torch.zeros_like(p)}
            momentum = self.state[p]["momentum"].lerp_(p.grad, 0.05)
            torch.lerp(p.grad, momentum, 0.95, out=push[:rows])
        equal = equalize(pushes.view(-1, height, columns)).reshape(pushes.shape)
        # With 0.2 in place of 0.1 steps would be as large as AdamW's.
        size = rate * 0.1 * max(height, columns) ** 0.5
        for p, push in zip(matrices, equal):
            p.mul_(1 - rate * weight_decay).sub_(push[:rows], alpha=size)

    def state_dict(self):
        """For a checkpoint: a number stands for each parameter, as in torch's optimizers."""
        number = {p: i for i, p in enumerate(self.parameters())}
        return {
            # In the order of the parameters, so that a run that was resumed writes the same file.
            "state": {i: self.state[p] for p, i in number.items() if p in self.state},
            "param_groups": [
                {**group, "params": [number[p] for p in group["params"]]}
                for group in self.param_groups
            ],
        }

    def load_state_dict(self, state):
        """Takes over the running means. The groups stay as they are."""
        for i, p in enumerate(self.parameters()):
            if i in state["state"]:
                self.state[p] = {name: x.to(p.device) for name, x in state["state"][i].items()}


# Polynomials a s + b s^3 + c s^5 of a singular value s, each the best one for what those before
# it leave (Amsel et al., 2025, arXiv:2505.16932). Three of them left the held-out loss after 300
# steps at 0.684 and 0.728 (two seeds), five steps of Jordan's one polynomial at 0.686 and 0.803.
POLYNOMIALS = (
    (8.2051604, -22.9019350, 16.4607249),
    (4.0663952, -2.8611541, 0.5183995),
    (3.9095949, -2.8233517, 0.5250370),
)

# A matrix of more rows and more columns is cut into blocks of at most so many rows, each equalized
# by itself, as in most steps of MuonBP (Khaled et al., 2025, arXiv:2510.16981). With 9.4M
# parameters a step takes 0.90 times as long as with whole matrices in float32, 0.86 times in
# bfloat16. After 400 steps the loss was 0.341 and 0.320 (two seeds), with whole ones 0.344 and
# 0.336.
BLOCK = 128


def equalize(x):
    """Matrices (N, r, c) in float32 with their singular values, small and large, moved near 1."""
    if x.shape[1] > x.shape[2]:
        return equalize(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for a, b, c in POLYNOMIALS:
        square = x @ x.mT  # (N, r, r)
        x = a * x + torch.baddbmm(square, square, square, beta=b, alpha=c) @ x
    return x


def make_optimizer(model, s):
    """Muon for the matrices in the blocks of a new model, AdamW for all else."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if name.startswith("blocks") and p.dim() == 2 and not name.endswith("shares"):
            matrices.append(p)
        else:
            others.append(p)
    muon = s.muon and not s.init_from
    groups = [
        {"params": matrices, "weight_decay": s.weight_decay, "muon": muon},
        {"params": others, "weight_decay": 0.0, "muon": False},
    ]
    return Optimizer(groups, s.learning_rate)


def main():
    machine.end_as_interrupted()
    memory = ("lower --batch_size, --block_size, --n_layer or --n_embd, raise --grad_accum, or set "
              "--checkpointing")
    stopped = "stopped; if there is a checkpoint, the same flags and --resume go on from it"
    with machine.errors_in_one_line(memory, stopped):
        s = machine.parse(Settings, "Train a GPT under a mask on dialogues.")
        metrics = train(s)
        if RANK == 0:
            report(metrics)
            print(f"\nchat with it: {chat_command(s)}")


if __name__ == "__main__":
    main()
