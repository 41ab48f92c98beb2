"""
Chat with a trained model: `python sample.py`.

Each turn is encoded once and stays in the KV cache as long as the mask allows it. That is decided by f and not
by the mask's name: at each turn f is computed for the dialogue as it now stands, and the cache is kept up to
what the change of f leaves valid. Under ISM and causal that is all of it, under prefix nothing.
"""
import codecs
import json
import pathlib
import signal
import sys
import time

import torch

from data.checkpoint import load_checkpoint, whole_file
from data.hf import from_pretrained, load_tokenizer, read_config, read_mask
from data.loader import well_formed
from data.tokenizer import Tokenizer, one_line, printable
from mask import MASKS, draw, reusable
from model import GPT, Cache, Decoder, GPTConfig, pack
from train import Parser, out_of_memory, pick_device, pick_dtype


def sample(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """logits (V,) -> a token id: the likeliest if temperature is 0, else drawn from the top_k and the nucleus top_p.

    ValueError if there is nothing to draw from, since the logits are NaN.
    """
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.cpu() / temperature  # drawn on the CPU, so that a seed gives the same text on each device
    if top_k:
        logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -torch.inf
    probs, order = logits.softmax(-1).sort(descending=True)
    if probs.isnan().any():
        raise ValueError("the model's logits are not numbers; are its weights damaged?")
    probs[probs.cumsum(0) - probs >= top_p] = 0  # the smallest set whose probability reaches top_p
    return int(order[torch.multinomial(probs, 1, generator=generator)])


class Chat:
    """A conversation with a model. `reply = chat.send("...")`, or `for piece in chat.stream("...")`.

    The history is kept as token ids and never encoded again from its text. mask is a function of mask.py;
    notify is called with a line when turns are dropped because the context is full.
    """

    def __init__(self, model, tokenizer, mask, system="", temperature=0.0, top_k=0, top_p=1.0, seed=0,
                 max_new_tokens=200, notify=lambda line: None):
        self.model, self.tokenizer, self.mask, self.notify = model.eval(), tokenizer, mask, notify
        self.temperature, self.top_k, self.top_p, self.max_new_tokens = temperature, top_k, top_p, max_new_tokens
        weight = model.embed.weight
        self.device, self.size = weight.device, model.config.block_size
        self.generator = torch.Generator().manual_seed(seed)
        self.cache = Cache(model.config, device=weight.device, dtype=weight.dtype)
        self.decoder = Decoder(model, self.cache) if Decoder.runs(self.cache) else None
        self.silent = torch.tensor(tokenizer.unsayable, device=self.device)
        self.stop = False  # set it from a signal handler or another thread to end the answer
        self.messages = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self):
        """Forget all but the system prompt."""
        self.messages = [m for m in self.messages[:1] if m["role"] == "system"]
        self.system = self.tokenizer.begin + self.tokenizer.encode_given(self.messages, header=False)
        self.turns = []  # (query tokens, answer tokens), the system prompt not among them
        self.f = torch.zeros(1, 0, dtype=torch.long)  # the f under which the cache was filled
        self.cache.length = 0
        self.stats = {}

    def load(self, messages):
        """Go on from a conversation, a list of messages that ends with an answer, maybe after a system prompt."""
        if not well_formed(messages) or messages[-1]["role"] != "assistant":
            raise ValueError("a history is a list of system, user and assistant messages that ends with the assistant's")
        if messages[0]["role"] == "system":
            self.messages, messages = messages[:1], messages[1:]
        self.reset()
        given = []
        for message in messages:
            if message["role"] == "assistant":
                self.turns.append((self.tokenizer.encode_given(given), self.tokenizer.encode_answer(message["content"])))
                given = []
            else:
                given.append(message)
        self.messages += messages

    def layout(self):
        """The dialogue so far as (tokens, segments), two lists."""
        tokens, segments = list(self.system), [1] * len(self.system)
        for i, (query, answer) in enumerate(self.turns):
            for j, part in enumerate((self.tokenizer.after * (i > 0) + query, answer)):
                tokens += part
                segments += [2 * i + j + 1] * len(part)
        return tokens, segments

    def send(self, text):
        """The whole answer to a query. ValueError if the query does not fit into the context."""
        return "".join(self.stream(text))

    @torch.inference_mode()
    def stream(self, text):
        """Yield the answer to a query piece by piece. ValueError if the query does not fit into the context."""
        message = {"role": "user", "content": text}
        if len(text.encode("utf-8", "replace")) > self.size * self.tokenizer.longest:  # before the tokenizer has to read it
            raise ValueError(f"the query is too long for the context of {self.size} tokens")
        query = self.tokenizer.encode_given([message])
        if len(self.system) + len(query) + 2 > self.size:  # an answer is at least one token and <|end|>
            raise ValueError(f"the query has {len(query)} tokens and the system prompt {len(self.system)}: "
                             f"too long for the context of {self.size}")
        self.stop = False
        began = time.perf_counter()
        answer, decoder = [], codecs.getincrementaldecoder("utf-8")("replace")
        self.turns.append((query, answer))  # the answer grows below
        try:
            logits = self.read()
        except BaseException:  # interrupted, or out of memory: as if nothing had been asked
            self.turns.pop()
            self.f = self.f[:, : self.cache.length]
            raise
        self.messages += [message, {"role": "assistant", "content": ""}]
        try:
            self.stats = {"prefill tokens": self.fed, "prefill s": time.perf_counter() - began}
            while not self.stop and len(answer) < self.max_new_tokens:
                logits[self.silent] = -torch.inf
                token = sample(logits, self.temperature, self.top_k, self.top_p, self.generator)
                self.stats.setdefault("first token s", time.perf_counter() - began)
                if token == self.tokenizer.end:
                    break
                answer.append(token)
                piece = printable(decoder.decode(self.tokenizer.token_bytes(token)))
                self.messages[-1]["content"] += piece
                yield piece
                if self.cache.length + 3 <= self.size:  # room for the token, for one more at which the caller stops, for <|end|>
                    logits = self.feed(token)
                elif len(self.turns) > 1:
                    logits = self.read()
                else:
                    answer.pop()
                    self.notify(f"[the answer has filled the context of {self.size} tokens]")
                    break
        finally:  # also when the caller stops listening: the history must end with <|end|>
            rest = printable(decoder.decode(b"", final=True))
            self.messages[-1]["content"] += rest
            answer.append(self.tokenizer.end)
            tokens, _ = self.layout()
            for token in tokens[self.cache.length :]:  # <|end|> alone: read with the next query it would need a mask
                self.feed(token)
            self.f = self.f[:, : self.cache.length]
            self.stats["decode s"] = time.perf_counter() - began - self.stats.get("prefill s", 0)
            self.stats["decode tokens"] = len(answer)
        yield rest

    def read(self):
        """Bring the cache up to the dialogue in one call, dropping old turns if it is full: the next logits (V,)."""
        tokens, segments = self.layout()
        if len(tokens) + 2 > self.size:
            dropped = 0
            while len(self.turns) > 1 and len(tokens) > self.size // 2:
                self.turns.pop(0)
                dropped += 1
                tokens, segments = self.layout()
            self.cache.length, self.f = 0, self.f[:, :0]
            self.notify(f"[the context of {self.size} tokens is full: the oldest {dropped} turns are forgotten]")
        n = len(tokens)
        answer = segments[-1] + segments[-1] % 2  # being written or to come: f is asked for all of it now, and feed only cuts it
        f = self.mask(torch.tensor([segments + [answer] * (self.size - n)]))  # (1, block_size)
        self.cache.length = keep = min(reusable(self.f, f), self.cache.length, n - 1)
        self.f, self.fed = f, n - keep
        return self.feed(*tokens[keep:])

    def feed(self, *tokens):
        """Tokens go behind the cache: the logits (V,) that follow them, float32."""
        start = self.cache.length
        if self.decoder and len(tokens) == 1 and self.f[0, start] > start:
            return self.decoder(tokens[0]).float()
        f = self.f[:, start : start + len(tokens)]
        at = torch.tensor([len(tokens) - 1], device=self.device)
        return self.model(torch.tensor([tokens], device=self.device), f, self.cache, at)[0].float()


def load_chat(path, device="auto", dtype="auto", mask="", block_size=0, **settings):
    """A Chat with the model of a checkpoint file, or of a Hugging Face folder; settings are Chat's.

    mask: a name in MASKS; "" is the one that the file or folder was trained with. system: without
    it the system prompt of the folder's chat template, if it has one; "" is none at all.
    block_size: the context of a folder in tokens; 0 is its own, but at most 4,096, since the cache
    is allocated at once. dtype: auto, float32, bfloat16, or on the CPU int8, which has weights in
    8 bits and all else in bfloat16. ValueError if it cannot be loaded.
    """
    device, int8 = pick_device(device), dtype == "int8"
    if int8 and device.type != "cpu":
        raise ValueError(f"--dtype int8 is for --device cpu; on {device.type} choose bfloat16 or float32")
    dtype = torch.bfloat16 if int8 else pick_dtype(dtype, device)
    if pathlib.Path(path).is_dir():
        tokenizer, mask = load_tokenizer(path), mask or read_mask(path)
        model = from_pretrained(path, block_size or min(4096, read_config(path).block_size), dtype)
    else:
        state = load_checkpoint(path)
        trained, mask = state["settings"], mask or state["settings"]["mask"]
        tokenizer = load_tokenizer(pathlib.Path(path).parent) if trained["init_from"] else Tokenizer(trained["tokenizer"])
        if tokenizer.identity != state["tokenizer"]:
            raise ValueError(f"{path} was trained with another tokenizer ({state['tokenizer']}); here is {tokenizer.identity}")
        if mask not in MASKS:
            raise ValueError(f"{path} was trained with the mask '{mask}', which mask.py does not have")
        model = GPT(GPTConfig(**state["config"]))
        try:
            model.load_state_dict(state["model"])
        except RuntimeError:
            raise ValueError(f"{path} holds other weights than a GPT's, LoRA's maybe; those are merged when the run ends: --ckpt "
                             f"{pathlib.Path(path).parent}") from None
    # The model was trained with the system prompt that its template has for whoever gives none.
    if settings.get("system") is None:
        settings["system"] = tokenizer.default_system
    return Chat(pack(model.to(device, dtype), int8), tokenizer, MASKS[mask], **settings)


def read_history(path):
    """The messages in a file that /save wrote, not checked. ValueError if it is not JSON."""
    try:
        saved = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not JSON; expected a file that /save wrote") from None
    return saved.get("messages") if isinstance(saved, dict) else saved


MEMORY = "out of memory; --dtype bfloat16 needs half as much, a smaller --block_size less for the cache, --device cpu uses the computer's own"
HELP = """/reset      forget the conversation
/stats      tokens in the cache and the speed of the last turn
/mask       draw what each token of the dialogue sees
/save FILE  write the conversation as messages in JSON
/help       this
/quit       leave, as Ctrl-D does; Ctrl-C stops an answer"""


def show_stats(chat):
    s = chat.stats
    print(f"{chat.cache.length} of {chat.size} tokens in the cache")
    if s:
        print(f"last turn: {s['prefill tokens']} tokens read at {s['prefill tokens'] / s['prefill s']:,.0f} tokens/s, first token after "
              f"{1000 * s['first token s']:.1f} ms, {s['decode tokens']} written at {s['decode tokens'] / s['decode s']:,.0f} tokens/s")


def command(chat, line):
    """Run a command of the terminal; True to leave."""
    name, _, argument = line.partition(" ")
    if name == "/quit":
        return True
    if name == "/reset":
        chat.reset()
    elif name == "/stats":
        show_stats(chat)
    elif name == "/mask":
        tokens, _ = chat.layout()
        print("\n".join(draw(chat.f[0], [ascii(chat.tokenizer.decode([t]))[1:-1][:16] for t in tokens])))
    elif name == "/save" and argument:
        try:
            with whole_file(pathlib.Path(argument)) as file:
                file.write(json.dumps({"messages": chat.messages}, indent=1, ensure_ascii=False).encode("utf-8", "replace"))
        except (OSError, ValueError) as error:
            print(f"[not saved: {one_line(error)}]")
    else:
        print(HELP)
    return False


def answer(chat, text):
    """Stream the answer to the terminal; Ctrl-C ends it, and the program goes on."""
    before = signal.signal(signal.SIGINT, lambda *_: setattr(chat, "stop", True))
    try:
        for piece in chat.stream(text):
            print(piece, end="", flush=True)
        print()
    except ValueError as error:
        print(f"[{one_line(error)}]")
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        print(f"[{MEMORY}]")
    finally:
        signal.signal(signal.SIGINT, before)


def main():
    parser = Parser(description="Chat with a trained model.", allow_abbrev=False)
    parser.add_argument("--ckpt", default="out/ckpt.pt", help="a checkpoint of train.py or a Hugging Face folder (out/ckpt.pt)")
    parser.add_argument("--mask", default="", choices=tuple(MASKS),
                        help="the attention mask (the one it was trained with)")
    parser.add_argument("--block_size", type=int, default=0, help="context of a folder in tokens (its own, at most 4096)")
    parser.add_argument("--prompt", action="append", default=[], help="a query instead of the terminal; repeat it for more turns")
    parser.add_argument("--system", help='a system prompt; "" is none (the folder\'s own, if any)')
    parser.add_argument("--history", default="", help="go on from a file that /save wrote, or any JSON list of messages")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    parser.add_argument("--top_k", type=int, default=0, help="draw from the k likeliest tokens; 0: from all (0)")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from the fewest tokens of this probability (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="longest answer (200)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps (auto)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "int8"),
                        help="of weights and cache; int8, on the CPU: weights in 8 bits, faster and a little less exact (auto)")
    a = parser.parse_args()
    if a.temperature < 0 or a.top_k < 0 or not 0 < a.top_p <= 1 or a.max_new_tokens < 1 or a.block_size < 0:
        parser.error("expected --temperature >= 0, --top_k >= 0, 0 < --top_p <= 1, --max_new_tokens >= 1, --block_size >= 0")
    try:
        chat = load_chat(a.ckpt, a.device, a.dtype, a.mask, a.block_size, system=a.system, temperature=a.temperature, top_k=a.top_k, top_p=a.top_p,
                         seed=a.seed, max_new_tokens=a.max_new_tokens, notify=print)
        if a.history:
            chat.load(read_history(a.history))
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {one_line(error)}")
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        sys.exit(f"sample.py: {MEMORY}")
    sys.stdout.reconfigure(errors="replace")  # for terminals that cannot show every character
    for prompt in a.prompt:
        print(f"> {prompt}")
        answer(chat, prompt)
    terminal = sys.stdin.isatty()
    if a.prompt:
        return
    if terminal:
        print("Ask something; /help lists the commands.")
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D leaves")
            continue
        if line.startswith("/"):
            if command(chat, line):
                break
        elif line:
            answer(chat, line)


if __name__ == "__main__":
    main()
