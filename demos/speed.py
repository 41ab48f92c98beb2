"""
What ISM costs beside causal, and how near training and chat are to what the machine can do.

The paper's claim: the latency of causal, since a turn is encoded once and the KV cache survives. Everything is
measured in turns (A, B, A, B, ...) in one run, and told as a ratio of medians with the quartiles of the single ratios,
since a shared machine's speed changes within minutes.

    python demos/speed.py            # under 3 minutes on 2 cores
    python demos/speed.py --quick    # under 20 seconds, less exact
"""
import json
import pathlib
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(ROOT := pathlib.Path(__file__).parent.parent))
import numpy as np  # noqa: E402
import torch  # noqa: E402

from data.dialogues import generate  # noqa: E402
from data.loader import Split, prepare  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from demos.output import check_writable, plt  # noqa: E402
from mask import MASKS, causal, ism  # noqa: E402
from model import GPT, Cache, Decoder, GPTConfig, attention, pack, visible  # noqa: E402
from sample import Chat  # noqa: E402
from train import Parser, Settings, learning_rate, make_optimizer, model_config, pick_device, pick_dtype, tune_cpu, update  # noqa: E402

SHAPES = {  # of decoding: on a CPU a small model, on a GPU one of the 1B class
    "cpu": dict(vocab_size=1280, block_size=512, n_layer=6, n_head=6, n_kv_head=6, n_embd=384, n_hidden=1024),
    "cuda": dict(vocab_size=128256, block_size=2048, n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, n_hidden=8192),
}
PEAK = 989e12  # FLOP/s of an H100 in bfloat16 without sparsity, by its data sheet


def in_turns(calls, repeats, device):
    """Run each call `repeats` times, one after the other in turns -> {name: seconds of each run}, the first run not counted."""
    seconds = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds, name, base):
    """How many times as long as base: {"ratio": of the medians, "quartiles": of the single ratios, "seconds": the median}."""
    single = [a / b for a, b in zip(seconds[name], seconds[base])]
    quartiles = statistics.quantiles(single, n=4)[::2] if len(single) > 1 else single * 2
    median = statistics.median(seconds[name])
    return {"ratio": median / statistics.median(seconds[base]), "quartiles": quartiles, "seconds": median}


def training(a, device, dtype):
    """A step as large as the default run's, on the same dialogues of one family each under each mask; prefix on its copies of them, one a turn."""
    s = Settings(n_dialogues=400 if a.quick else 4000)
    tokenizer = Tokenizer(s.tokenizer)
    start = time.perf_counter()
    dialogues = list(generate("train", s.n_dialogues))
    generated = time.perf_counter() - start
    characters = sum(len(m["content"]) for d in dialogues for m in d["messages"])
    with tempfile.TemporaryDirectory() as folder:  # our own dialogues as a user's file, written anew: its key is not in the cache
        path = pathlib.Path(folder, "chats.jsonl")
        path.write_text("\n".join(json.dumps(d | {"at": time.time()}) for d in dialogues), encoding="utf-8")
        start = time.perf_counter()
        shutil.rmtree(prepare(tokenizer, s.block_size, str(path), s.n_dialogues, s.seed))
        seconds = time.perf_counter() - start
    prepared = {"MB/s of a JSONL file": characters / seconds / 1e6, "MB/s of synthetic dialogues, written": characters / generated / 1e6}
    split = Split(prepare(tokenizer, s.block_size, "", s.n_dialogues, s.seed), "train")
    batch = split.batches(split.rows(ism), s.batch_size * s.block_size, seed=0)[0]
    copies = split.rows(MASKS["prefix"])
    copies = copies[torch.isin(torch.from_numpy(copies[:, 0]), torch.from_numpy(batch[:, 0])).numpy()]
    calls = {}
    for name, rows in (("causal", batch), ("ism", batch), ("prefix", copies)):
        torch.manual_seed(0)
        model = GPT(model_config(s, tokenizer.vocab_size)).to(device)
        optimizer = make_optimizer(model, s)
        calls[name] = lambda m=model, o=optimizer, r=rows, n=name: update(m, o, split, r, MASKS[n], 1e-3, s, device, dtype)
    seconds = in_turns(calls, 6 if a.quick else 60, device)
    tokens = int((batch[:, 2] - batch[:, 1]).sum())
    return {name: {**ratio(seconds, name, "causal"), "tokens/s": tokens / statistics.median(seconds[name])} for name in calls}, prepared


def by_length(a, device, dtype):
    """Forward and backward of attention alone, ISM over causal, with segments of some hundred tokens."""
    lengths = (256, 1024) if device.type == "cpu" else (256, 1024, 4096, 8192)
    results = {}
    for T in lengths[: 1 if a.quick else None]:
        segments = (torch.arange(T) // min(200, T // 4) + 1)[None]
        q, k, v = (torch.randn(1, 4, T, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        seed = torch.randn_like(q)
        calls = {mask.__name__: lambda m=visible(mask(segments), T, T, device): torch.autograd.grad(attention(q, k, v, m), (q, k, v), seed)
                 for mask in (causal, ism)}
        results[T] = ratio(in_turns(calls, 5 if a.quick else 20, device), "ism", "causal")
    return results


def first_tokens(a, device, dtype):
    """Seconds to the first token at each turn of a chat whose queries and answers are all equally long."""
    turns, query = (4 if a.quick else 20), "My name is Anna and I live in Rome. " * 4
    config = GPTConfig(vocab_size=Tokenizer().vocab_size, block_size=4096, n_layer=4, n_head=4, n_embd=256, n_hidden=512)
    torch.manual_seed(0)
    model, tokenizer = pack(GPT(config).to(device, dtype)), Tokenizer()
    ways = {"causal": "causal", "ism": "ism", "prefix": "prefix", "ism, no cache between turns": "ism"}
    seconds = {way: [[] for _ in range(turns)] for way in ways}
    for _ in range(1 if a.quick else 3):
        chats = {way: Chat(model, tokenizer, MASKS[mask], max_new_tokens=20) for way, mask in ways.items()}
        for chat in chats.values():  # answers of 20 tokens
            chat.silent = torch.cat([chat.silent, torch.tensor([tokenizer.end], device=device)])
        for turn in range(turns):
            for way, chat in chats.items():
                if "no cache" in way:
                    chat.f = chat.f[:, :0]
                chat.send(query)
                seconds[way][turn].append(chat.stats["first token s"])
    return {way: [statistics.median(turn) for turn in found] for way, found in seconds.items()}


def generator(config, device, dtype, prompt, n, int8=False):
    """A call that writes n tokens, greedily, after a prompt; and how many parameters are read for each."""
    with torch.device(device):
        model = GPT(config).to(dtype).eval()
    size = model.n_params()
    pack(model, int8)
    cache = Cache(config, device=device, dtype=dtype)
    decoder = Decoder(model, cache) if Decoder.runs(cache) else None

    @torch.inference_mode()
    def call():
        cache.length = 0
        token = int(model(prompt, None, cache)[0, -1].argmax())
        for _ in range(n - 1):
            logits = decoder(token) if decoder else model(torch.tensor([[token]], device=device), None, cache)[0, 0]
            token = int(logits.argmax())

    return call, size


def decoding(a, device, dtype):
    """Tokens a second with a batch of one, beside two floors: the bytes that must be read, and calls that do next to nothing."""
    n, shape = (8 if a.quick else 32), SHAPES["cuda" if device.type == "cuda" else "cpu"]
    config, tiny = GPTConfig(**shape), GPTConfig(**{**shape, "n_embd": 8, "n_hidden": 8, "head_size": 8, "n_head": 1, "n_kv_head": 1, "vocab_size": 8})
    prompt = torch.ones(1, 16, dtype=torch.long, device=device)
    ours, size = generator(config, device, dtype, prompt, n)
    source = torch.ones((1 << 26) if device.type == "cpu" else (1 << 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls = {"ours": ours, "overhead": generator(tiny, device, dtype, prompt, n)[0], "copy": lambda: target.copy_(source)}
    if device.type == "cpu" and dtype == torch.bfloat16:
        calls["ours in int8"] = generator(config, device, dtype, prompt, n, int8=True)[0]
    if theirs := hf_generate(config, device, dtype, prompt, n):
        calls["transformers"] = theirs
    seconds = in_turns(calls, 3 if a.quick else 15, device)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    cached = 2 * config.n_layer * config.n_kv_head * (16 + n // 2) * config.head_size  # numbers, in the middle of the answer
    bandwidth = 2 * source.nbytes / middle["copy"]
    found = {"bandwidth GB/s": bandwidth / 1e9, "limit by bytes, tokens/s": bandwidth / ((size + cached) * dtype.itemsize),
             "limit by overhead, tokens/s": n / middle["overhead"], "tokens/s": {name: n / middle[name] for name in calls if name not in ("copy", "overhead")}}
    if theirs:
        found["times as fast as transformers"] = {name: ratio(seconds, "transformers", name) for name in calls if name.startswith("ours")}
    if a.llama2c:
        found["llama2.c in float32, tokens/s"] = llama2c(a.llama2c, config, n)
    return found


def hf_generate(config, device, dtype, prompt, n):
    """The same by transformers' generate with its cache, a LLaMA of the same shape; None where it is not installed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return print("transformers is not installed: left out")
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=config.n_hidden, num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head, tie_word_embeddings=True, eos_token_id=None,
        pad_token_id=0, max_position_embeddings=config.block_size)).to(device, dtype).eval()
    return lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, min_new_tokens=n, do_sample=False)


def llama2c(checkout, config, n):
    """Tokens a second of llama2.c, compiled as its Makefile's runomp does, on as many threads as torch has: the median of 5 runs.

    Its weights are zeros, for which it takes the same time and never writes the token that would end the text.
    """
    C, kv = config.n_embd, config.n_kv_head * config.head_size
    layer = 2 * C + 2 * C * C + 2 * C * kv + 3 * C * config.n_hidden
    numbers = (config.vocab_size + 1) * C + config.n_layer * layer + config.block_size * config.head_size  # with its tables of rotations
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["gcc", "-Ofast", "-fopenmp", "-march=native", f"{checkout}/run.c", "-lm", "-o", f"{folder}/run"], check=True)
        header = C, config.n_hidden, config.n_layer, config.n_head, config.n_kv_head, config.vocab_size, config.block_size
        pathlib.Path(folder, "model.bin").write_bytes(np.array(header, dtype=np.int32).tobytes() + bytes(4 * numbers))
        word = np.float32(0).tobytes() + np.int32(1).tobytes() + b"a"  # a token's score, length and text
        pathlib.Path(folder, "tokens.bin").write_bytes(np.int32(1).tobytes() + config.vocab_size * word)
        run = [f"{folder}/run", f"{folder}/model.bin", "-z", f"{folder}/tokens.bin", "-t", "0", "-n", str(16 + n)]
        said = [subprocess.run(run, capture_output=True, text=True, check=True, env={"OMP_NUM_THREADS": str(torch.get_num_threads())}).stderr
                for _ in range(5)]
    return statistics.median(float(re.search(r"tok/s: ([\d.]+)", line)[1]) for line in said)


def mfu(a, device, dtype):
    """A compiled training step of a 124M model, 16 rows of 1,024 tokens, on CUDA: model FLOPs utilisation and ISM over causal.

    FLOPs a token: 6 per parameter, and 6 * n_layer * n_embd * T for the attended half of the T x T scores.
    """
    config, B = GPTConfig(vocab_size=50304, block_size=1024, n_layer=12, n_head=12, n_kv_head=12, n_embd=768, n_hidden=2048), 16
    T, tokens = config.block_size, torch.randint(0, config.vocab_size, (B, config.block_size), device=device)
    segments = (torch.arange(T) // 75 + 1)[None].expand(B, T)
    with torch.device(device):
        model = GPT(config)
    optimizer = make_optimizer(model, Settings(muon=False))
    loss_of = torch.compile(lambda logits: torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten()))
    model.layers = torch.compile(model.layers)

    def step(f):
        with torch.autocast(device.type, dtype):
            logits = model(tokens, f)
        loss_of(logits).backward()
        optimizer.step()
        optimizer.zero_grad()

    calls = {mask.__name__: lambda f=mask(segments): step(f) for mask in (causal, ism)}
    seconds = in_turns(calls, 5 if a.quick else 20, device)
    flops = B * T * (6 * model.n_params() + 6 * config.n_layer * config.n_embd * T)
    return {name: {**ratio(seconds, name, "causal"), "MFU": flops / statistics.median(seconds[name]) / PEAK,
                   "peak GB": torch.cuda.max_memory_allocated() / 1e9} for name in calls}


def nanogpt(a, dtype):
    """nanoGPT's train.py, as its README has it run on a CPU, and our model on the same tokens, shape and batch, causal with all losses.

    The loss is the mean of ten steps. Ours reaches nanoGPT's last one in fewer steps, so both ratios are told: a step's, and that of the way there.
    """
    tokenizer, block, found = Tokenizer(), 256, {}
    split = Split(prepare(tokenizer, block, "", 12000), "train")
    end = len(split.tokens) - 20000  # what follows is for nanoGPT's validation
    with tempfile.TemporaryDirectory() as folder:
        for name, part in (("train", split.tokens[:end]), ("val", split.tokens[end:])):
            part.astype(np.uint16).tofile(f"{folder}/{name}.bin")
        pathlib.Path(folder, "meta.pkl").write_bytes(pickle.dumps({"vocab_size": tokenizer.vocab_size}))
        for layers, heads, width, batch, steps in ((4, 4, 128, 32, 120), (6, 6, 384, 16, 30)):
            shape = f"--n_layer={layers} --n_head={heads} --n_embd={width} --batch_size={batch} --block_size={block} --max_iters={steps} --lr_decay_iters={steps}"
            printed = subprocess.run([sys.executable, "train.py", "config/train_shakespeare_char.py", *shape.split(), "--device=cpu", "--compile=False",
                                      "--eval_iters=1", "--log_interval=1", "--dropout=0.0", "--warmup_iters=20", f"--dataset={folder}",
                                      f"--out_dir={folder}"], cwd=a.nanogpt, capture_output=True, text=True, check=True).stdout
            theirs = [(float(loss), float(ms) / 1000) for loss, ms in re.findall(r"iter \d+: loss ([\d.]+), time ([\d.]+)ms", printed)]
            config = GPTConfig(tokenizer.vocab_size, block, layers, heads, heads, width, n_hidden=round(width / 3) * 8)
            ours = plain_training(config, split, end, batch, steps, dtype)
            loss = {name: [statistics.mean(x for x, _ in run[i : i + 10]) for i in range(steps - 9)]
                    for name, run in (("nanoGPT", theirs[:steps]), ("ours", ours))}
            seconds = {name: statistics.median(s for _, s in run[5:]) for name, run in (("nanoGPT", theirs), ("ours", ours))}
            there = next((10 + i for i, x in enumerate(loss["ours"]) if x <= loss["nanoGPT"][-1]), None)
            found[f"{layers} layers, width {width}"] = {
                **{f"{name}, tokens/s": batch * block / s for name, s in seconds.items()}, "times as fast a step": seconds["nanoGPT"] / seconds["ours"],
                **{f"{name}, loss after {steps} steps": curve[-1] for name, curve in loss.items()}, "ours, steps to nanoGPT's last loss": there,
                "times as fast to nanoGPT's last loss": there and steps * seconds["nanoGPT"] / (there * seconds["ours"])}
    return found


def plain_training(config, split, end, batch, steps, dtype):
    """Random pieces of a split's first `end` tokens, causal, with all losses -> (loss, seconds) of each step."""
    torch.manual_seed(0)
    rng, model = np.random.default_rng(0), GPT(config)
    s = Settings(mask="causal", answers_only=False, max_iters=steps, warmup_iters=20)
    optimizer, run = make_optimizer(model, s), []
    for step in range(steps):
        start = time.perf_counter()
        first = rng.integers(end - config.block_size, size=batch)
        rows = np.stack([first * 0, first, first + config.block_size], 1)  # pieces of block_size tokens, as rows of dialogues
        loss = update(model, optimizer, split, rows, causal, learning_rate(step, s), s, torch.device("cpu"), dtype)
        run.append((loss.item(), time.perf_counter() - start))
    return run


def start_up():
    """Seconds from `python sample.py` to its prompt, beyond `import torch`: the least of three runs each."""
    with tempfile.TemporaryDirectory() as folder:
        python = lambda *code, **kw: subprocess.run([sys.executable, *code], cwd=ROOT, capture_output=True, check=True, **kw)
        python("train.py", "--max_iters", "2", "--n_dialogues", "200", "--out_dir", folder)

        def least(*code):
            times = []
            for _ in range(3):
                start = time.perf_counter()
                python(*code, stdin=subprocess.DEVNULL)
                times.append(time.perf_counter() - start)
            return min(times)

        return least("sample.py", "--ckpt", f"{folder}/ckpt.pt") - least("-c", "import torch")


def flat(found, path=""):
    """Nested figures -> (name, text) lines."""
    for name, value in found.items():
        here = f"{path}, {name}" if path else str(name)
        if isinstance(value, dict) and "ratio" in value:
            low, high = value["quartiles"]
            rest = {k: v for k, v in value.items() if k not in ("ratio", "quartiles")}
            yield here, f"{value['ratio']:.2f} ({low:.2f} to {high:.2f})   " + ", ".join(f"{k} {v:,.4g}" for k, v in rest.items())
        elif isinstance(value, dict):
            yield from flat(value, here)
        elif isinstance(value, list):
            yield here, " ".join(f"{1000 * x:.1f}" for x in value) + " ms"
        else:
            yield here, f"{value:,.4g}" if isinstance(value, float) else str(value)


def draw(turns, path):
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (way, seconds), style in zip(turns.items(), ("o-", "s--", "^-", "v:")):
        axes.plot(range(1, len(seconds) + 1), [1000 * x for x in seconds], style, label=way)
    axes.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    axes.set(xlabel="turn of the chat", ylabel="time to the first token in ms", ylim=(0, None), title="A query of the same length at each turn")
    axes.legend()
    figure.savefig(path, dpi=150)


def main():
    parser = Parser(description=__doc__.strip().splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", default="auto", help="cpu, cuda (auto)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the computation (auto)")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, under 20 seconds")
    parser.add_argument("--nanogpt", default="", metavar="FOLDER", help="a checkout of nanoGPT to train beside (minutes, on the CPU)")
    parser.add_argument("--llama2c", default="", metavar="FOLDER", help="a checkout of llama2.c to decode beside (gcc compiles it)")
    parser.add_argument("--json", default="", metavar="FILE", help="write the figures there")
    parser.add_argument("--out", default=str(ROOT / "out" / "speed.png"), metavar="FILE", help="the picture (out/speed.png)")
    a = parser.parse_args()
    try:
        if a.nanogpt and not pathlib.Path(a.nanogpt, "config", "train_shakespeare_char.py").is_file():
            raise ValueError(f"--nanogpt {a.nanogpt} is no checkout of github.com/karpathy/nanoGPT")
        if a.llama2c and not (shutil.which("gcc") and pathlib.Path(a.llama2c, "run.c").is_file()):
            raise ValueError(f"--llama2c {a.llama2c} is no checkout of github.com/karpathy/llama2.c, or gcc is not installed")
        device = pick_device(a.device)
        check_writable(a.out, json=a.json)
        tune_cpu()
        dtype = pick_dtype(a.dtype, device)
        name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        figures = {"device": name, "dtype": str(dtype)[6:], "torch": torch.__version__}
        figures["a training step, times causal's"], figures["data"] = training(a, device, dtype)
        figures["attention, ISM over causal at T"] = by_length(a, device, dtype)
        turns = first_tokens(a, device, dtype)
        figures["first token by turn"] = turns
        last = {way: times[-1] for way, times in turns.items()}
        figures["first token, last turn over the second"] = {way: times[-1] / times[1] for way, times in turns.items()}
        figures["first token, history read again over ISM"] = last["ism, no cache between turns"] / last["ism"]
        figures["decoding"] = decoding(a, device, dtype)
        if device.type == "cuda":
            figures["124M training step"] = mfu(a, device, dtype)
        if a.nanogpt:
            figures["training beside nanoGPT"] = nanogpt(a, dtype)
        if not a.quick:
            figures["start-up of sample.py beyond import torch, s"] = start_up()
        print("\n".join(f"{name:60} {text}" for name, text in flat(figures)))
        draw(turns, a.out)
        if a.json:
            pathlib.Path(a.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"speed.py: {error}")


if __name__ == "__main__":
    main()
