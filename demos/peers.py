"""
Other programs that do the same work, for demos/speed.py: how each is run, how fast it is.

None of them is part of this project: a checkout or an installation of it is named by the user.
"""
import contextlib
import io
import math
import re
import runpy
import statistics
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch


def run(command, **options):
    """A peer's command. ValueError with its last line if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise ValueError(f"{' '.join(map(str, command[:3]))} failed: {said[-1]}")
    return done


def nanogpt(checkout, vocab_size, layers, heads, width, steps):
    """A step of nanoGPT's training in float32, as its train.py has it on a CPU.

    -> a function (tokens, targets), (B, T) each, targets of -1 without a loss -> the loss. The
    rates are those of its config/train_shakespeare_char.py, without dropout.
    """
    theirs = runpy.run_path(str(Path(checkout, "model.py")))
    torch.manual_seed(1337)
    with contextlib.redirect_stdout(io.StringIO()):
        model = theirs["GPT"](theirs["GPTConfig"](
            block_size=256, vocab_size=vocab_size, n_layer=layers, n_head=heads, n_embd=width,
            dropout=0.0, bias=False,
        ))
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")

    def rate(taken, warmup=20):
        """Linear warm-up, then a cosine down to a tenth."""
        cooled = max(0, (taken - warmup) / (steps - warmup))
        return min((taken + 1) / (warmup + 1), 0.55 + 0.45 * math.cos(math.pi * cooled))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def step(tokens, targets):
        _, loss = model(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def llama(config):
    """A random LLaMA of transformers with the sizes of a config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=config.n_hidden,
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head, tie_word_embeddings=True, eos_token_id=None,
        pad_token_id=0, max_position_embeddings=config.block_size,
    ))


def generate(model, n):
    """A call that writes n tokens after a prompt of 16 by transformers' generate with its cache."""
    model = model.eval()
    prompt = torch.ones(1, 16, dtype=torch.long, device=model.device)
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(prompt, max_new_tokens=n, min_new_tokens=n, **options)


def llama2c(checkout, config, n):
    """Tokens a second of llama2.c in float32, compiled as its Makefile's runomp: a median of 5.

    Its weights are zeros, for which it takes the same time, and never ends the text.
    """
    C, kv = config.n_embd, config.n_kv_head * config.head_size
    layer = 2 * C + 2 * C * C + 2 * C * kv + 3 * C * config.n_hidden
    numbers = (config.vocab_size + 1) * C + config.n_layer * layer
    numbers += config.block_size * config.head_size  # its tables of rotations
    header = (C, config.n_hidden, config.n_layer, config.n_head, config.n_kv_head,
              config.vocab_size, config.block_size)
    with tempfile.TemporaryDirectory() as folder:
        run(["gcc", "-Ofast", "-fopenmp", "-march=native", f"{checkout}/run.c", "-lm",
             "-o", f"{folder}/run"])
        weights = np.array(header, dtype=np.int32).tobytes() + bytes(4 * numbers)
        Path(folder, "model.bin").write_bytes(weights)
        word = np.float32(0).tobytes() + np.int32(1).tobytes() + b"a"  # score, length, text
        Path(folder, "tokens.bin").write_bytes(np.int32(1).tobytes() + config.vocab_size * word)
        command = [f"{folder}/run", f"{folder}/model.bin", "-z", f"{folder}/tokens.bin",
                   "-t", "0", "-n", str(16 + n)]
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        said = [run(command, env=threads).stderr for _ in range(5)]
    return statistics.median(float(re.search(r"tok/s: ([\d.]+)", line)[1]) for line in said)


LLAMACPP = """
import {getLlama} from "node-llama-cpp";
const [file, threads, n] = process.argv.slice(2);
const llama = await getLlama({gpu: false, logLevel: "error", build: "never"});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({contextSize: 512, threads: Number(threads)});
const sequence = context.getSequence();
const prompt = Array(16).fill(1);
for (let turn = 0; turn < 6; turn++) {
    await sequence.clearHistory();
    let count = 0, start = 0;
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        if (count === 0) start = performance.now();
        if (++count > Number(n)) break;
    }
    console.log(Number(n) / (performance.now() - start) * 1000);
}
process.exit(0);
"""


def llamacpp(folder, gguf, n):
    """Tokens a second of llama.cpp with a GGUF file as it is: a median of 5 after the first."""
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        script = Path(inside, "speed.mjs")
        script.write_text(LLAMACPP, encoding="utf-8")
        threads = str(torch.get_num_threads())
        command = ["node", str(script), str(Path(gguf).resolve()), threads, str(n)]
        said = run(command, cwd=folder).stdout
    return statistics.median(map(float, said.split()[1:]))


