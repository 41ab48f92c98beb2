"""
Chat with a trained model: `python sample.py`.

Each turn is read once and stays in the KV cache as long as the mask allows it. That is decided by
f and not by the mask's name: at each turn f is computed for the dialogue as it now stands, and the
cache is kept as far as the old f and the new one agree. Under ISM and causal that is all of it,
under prefix nothing.

Read `Chat.stream` first: a turn is opened, written, closed.
"""
import codecs
import threading

import torch

from data.machine import clock
from mask import check, reusable
from model import Cache


def sample(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """logits (V,) -> a token id: the likeliest if temperature is 0, else one drawn at random.

    It is drawn from the top_k likeliest (0: from all), and of these from the fewest whose
    probability reaches top_p. ValueError if the logits are NaN, so that there is nothing to draw.
    """
    likeliest = logits.max(-1)
    if likeliest.values.isnan():
        raise ValueError("the model's logits are not numbers; are its weights damaged?")
    if temperature == 0:
        return int(likeliest.indices)
    logits = logits.cpu()  # there a seed draws the same for each device
    # Up to 0 and by what float32 can hold, so that no temperature is too low or too high.
    logits = (logits - logits.max()) / min(max(temperature, 1e-30), 1e30)
    if top_k > 0:
        least = logits.topk(min(top_k, len(logits))).values[-1]
        logits[logits < least] = -torch.inf
    probs, order = logits.softmax(-1).sort(descending=True)  # (V,) each
    before = probs.cumsum(0) - probs  # (V,) the probability of all that are likelier
    probs[1:][before[1:] >= top_p] = 0
    return int(order[torch.multinomial(probs, 1, generator=generator)])


BUSY = "this chat is writing an answer; read that to its end, or close it"


class Chat:
    """A conversation: `reply = chat.send("...")`, or `for piece in chat.stream("...")`.

    The history is kept as token ids and never encoded again from its text. mask is a function of
    mask.py; notify is called with a line when an answer is cut, or turns are forgotten because the
    context is full.
    """

    def __init__(self, model, tokenizer, mask, system="", temperature=0.0, top_k=0, top_p=1.0,
                 seed=0, max_new_tokens=200, notify=lambda line: None):
        self.model, self.tokenizer, self.mask, self.notify = model.eval(), tokenizer, mask, notify
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.generator = torch.Generator().manual_seed(seed)
        self.max_new_tokens = max_new_tokens
        weight = model.norm.weight
        self.device, self.size = weight.device, model.config.block_size
        self.cache = Cache(model.config, device=weight.device, dtype=weight.dtype)
        # A faster way to read one token, if the model was given one: `faster` of model.py.
        self.read_one = model.reader and model.reader(model, self.cache)
        self.silent = torch.tensor(tokenizer.unsayable, device=self.device)
        self.stop = False  # set it from a signal handler or another thread to end the answer
        self.busy = threading.Lock()  # held while a turn is open
        self.messages = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self):
        """Forget all but the system prompt. ValueError while an answer is being written."""
        if self.busy.locked():
            raise ValueError(BUSY)
        self.messages = [m for m in self.messages[:1] if m["role"] == "system"]
        given = self.tokenizer.encode_given(self.messages, header=False)
        self.system = self.tokenizer.begin + given  # tokens
        self.turns = []  # (tokens of the query, tokens of the answer)
        self.f = torch.zeros(1, 0, dtype=torch.long)  # the f under which the cache was filled
        self.cache.length = 0
        self.stats = {}

    def layout(self):
        """The dialogue so far as (tokens, segments), two lists."""
        tokens = list(self.system)
        segments = [1] * len(tokens)
        for i, (query, answer) in enumerate(self.turns):
            given = query if i == 0 else self.tokenizer.after + query
            tokens += given + answer
            segments += [2 * i + 1] * len(given) + [2 * i + 2] * len(answer)
        return tokens, segments

    def send(self, text):
        """The whole answer to a query. ValueError if the query does not fit into the context."""
        return "".join(self.stream(text))

    @torch.inference_mode()
    def stream(self, text):
        """Yield the answer to a query piece by piece. ValueError if the query does not fit."""
        began = clock(self.device)
        logits = self.open(text)  # (V,)
        opened = clock(self.device)
        self.stats = {"prefill tokens": self.fed, "prefill s": opened - began}
        try:
            yield from self.write(logits)
        finally:  # also when the caller stops listening
            rest = self.close()
            self.stats["decode tokens"] = len(self.turns[-1][1])
            self.stats["decode s"] = clock(self.device) - opened
        yield rest

    def open(self, text):
        """Open a turn: the query is read into the cache -> the logits (V,) of the first token."""
        message = {"role": "user", "content": text}
        query = query_tokens(self, message)
        if not self.busy.acquire(blocking=False):
            raise ValueError(BUSY)
        self.stop = False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.turns.append((query, []))
        try:
            logits = self.read()
        except BaseException:  # interrupted, or out of memory: as if nothing had been asked
            self.turns.pop()
            self.f = self.f[:, : self.cache.length]
            self.busy.release()
            raise
        self.messages += [message, {"role": "assistant", "content": ""}]
        return logits

    def read(self):
        """Bring the cache up to the dialogue, in one call -> the logits (V,) of the next token."""
        tokens, segments = self.layout()
        if len(tokens) + 2 > self.size:
            tokens, segments = forget_oldest(self)
        # f of the dialogue as it now stands, followed by an answer as long as the context allows.
        answer = segments[-1] + segments[-1] % 2
        to_come = [answer] * (self.size - len(tokens))
        f = self.mask(torch.tensor([segments + to_come]))  # (1, block_size)
        check(f, (1, self.size))
        # What still holds in the cache is not read again. The last token is, for its logits.
        keep = min(reusable(self.f, f), self.cache.length, len(tokens) - 1)
        self.cache.length = keep
        self.f = f
        self.fed = len(tokens) - keep
        return self.feed(*tokens[keep:])

    def write(self, logits):
        """Write the answer token by token until the model says <|end|>: yields its text."""
        answer = self.turns[-1][1]  # the tokens of the answer, which grows here
        while not self.stop:
            logits.index_fill_(0, self.silent, -torch.inf)  # makes no GPU wait
            token = sample(logits, self.temperature, self.top_k, self.top_p, self.generator)
            if token == self.tokenizer.end:
                return
            if len(answer) == self.max_new_tokens:
                self.notify(f"[the answer is cut: --max_new_tokens is {self.max_new_tokens}]")
                return
            answer.append(token)
            yield self.say(self.tokenizer.token_bytes(token))
            # There must be room for this token, for one at which the caller stops, for <|end|>.
            if self.cache.length + 3 <= self.size:
                logits = self.feed(token)
            elif len(self.turns) > 1:
                logits = self.read()  # forgets the oldest turns
            else:
                answer.pop()
                self.notify(f"[the answer has filled the context of {self.size} tokens]")
                return

    def close(self):
        """Close the turn: the answer ends with <|end|>, all is in the cache -> the last text."""
        answer = self.turns[-1][1]
        answer.append(self.tokenizer.end)
        # <|end|> was sampled but not read yet. It is a token of the answer and sees its past and
        # itself, so it is read alone. Read together with the next query, under no mask at all, it
        # would see that query, and every logit after it would be a little wrong.
        tokens, _ = self.layout()
        try:
            for token in tokens[self.cache.length :]:
                self.feed(token)
        finally:
            self.f = self.f[:, : self.cache.length]
            self.busy.release()
        return self.say(b"", final=True)

    def feed(self, *tokens):
        """Tokens go behind those in the cache -> the logits (V,) that follow them, in float32."""
        start = self.cache.length
        end = start + len(tokens)
        f = self.f[:, start:end]  # (1, n)
        if self.read_one is not None and len(tokens) == 1 and f >= end:
            return self.read_one(tokens[0]).float()
        last = torch.tensor([len(tokens) - 1], device=self.device)
        given = torch.tensor([tokens], device=self.device)  # (1, n)
        return self.model(given, f, self.cache, last)[0].float()

    def say(self, raw, final=False):
        """Bytes of the answer join its message -> their text, as far as characters are whole."""
        piece = self.decoder.decode(raw, final)
        self.messages[-1]["content"] += piece
        return piece


# ==== below this line: the files of a model and of a conversation, and the terminal ====
import json
import pathlib
import re
import shutil
import sys
import textwrap

from data import hf, machine
from data.chats import check_history
from data.checkpoint import load_model, write_json
from data.machine import one_line, printable
from data.tokenizer import Tokenizer
from mask import MASKS, draw
from model import PACKED, by_columns, faster, pack


def query_tokens(chat, message):
    """The tokens of a query. ValueError if it does not fit into the context."""
    if not isinstance(message["content"], str):
        raise ValueError(f"a query is text, not {type(message['content']).__name__}")
    # Its bytes are counted first, so that the tokenizer need not read a book.
    n_bytes = len(message["content"].encode("utf-8", "replace"))
    if n_bytes > chat.size * chat.tokenizer.longest:
        raise ValueError(f"the query is too long for the context of {chat.size} tokens")
    query = chat.tokenizer.encode_given([message])
    # An answer is one token at least, and <|end|>.
    if len(chat.system) + len(query) + 2 > chat.size:
        system = f" and the system prompt {len(chat.system)}" if chat.system else ""
        raise ValueError(f"the query has {len(query)} tokens{system}: too long for the context "
                         f"of {chat.size}")
    return query


def forget_oldest(chat):
    """Drop the oldest turns until half of the context is free, empty the cache -> layout."""
    tokens, segments = chat.layout()
    dropped = 0
    while len(chat.turns) > 1 and len(tokens) > chat.size // 2:
        chat.turns.pop(0)
        dropped += 1
        tokens, segments = chat.layout()
    chat.cache.length = 0
    chat.f = chat.f[:, :0]
    full = f"the context of {chat.size} tokens is full"
    chat.notify(f"[{full}, so the oldest turns are forgotten, {dropped} of them]")
    return tokens, segments


def load_chat(path, device="auto", dtype="auto", mask="", block_size=0, **settings):
    """A Chat with the model of a checkpoint file, or of a Hugging Face folder; settings are Chat's.

    mask: a name in MASKS; "" is the one that the file or folder was trained with. system: without
    it the system prompt of the folder's chat template, if it has one; "" is none at all.
    block_size: the context of a folder in tokens; 0 is its own, but at most 4,096, since the cache
    is allocated at once. dtype: of the weights, one of DTYPES. ValueError if it cannot be loaded.
    """
    device, path, lines = machine.pick_device(device), pathlib.Path(path), []
    if (path / "ckpt.pt").exists() and not (path / "config.json").exists():
        path /= "ckpt.pt"  # the folder of a run of train.py
    if dtype in PACKED and dtype != "bfloat16" and device.type != "cpu":
        raise ValueError(f"--dtype {dtype} is for the CPU; {device.type} has float32 and bfloat16")
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ValueError(f"{path} holds neither the ckpt.pt of train.py nor the config.json of "
                             f"a published model; train one with: {machine.command('train.py')}")
        tokenizer = hf.load_tokenizer(path)
        block_size = block_size or min(4096, hf.read_config(path).block_size)
        read_as = torch.float32 if dtype == "float32" else torch.bfloat16
        model, trained_under = hf.from_pretrained(path, block_size, read_as), hf.read_mask(path)
    else:
        model, tokenizer, trained_under = load_trained(path, lines.append)
    for name, weight in model.named_parameters():
        if not weight.sum().isfinite():
            raise ValueError(f"{path}: {name} holds NaN or infinite numbers, so the model can say "
                             "nothing; take an earlier checkpoint or another copy")
    mask = mask or trained_under
    if mask not in MASKS:
        raise ValueError(f"{path} was trained with the mask '{mask}', which mask.py does not have")
    # The model was trained with the system prompt that its template has for whoever gives none.
    if settings.get("system") is None:
        settings["system"] = tokenizer.default_system
    model = faster(stored(model, device, dtype).eval(), tell=lines.append)
    chat = Chat(model, tokenizer, MASKS[mask], **settings)
    if tokenizer.note:
        chat.notify(tokenizer.note)
    if mask != trained_under:
        learn = f"to read well under {mask} it has to learn it first"
        chat.notify(f"[trained under {trained_under}: {learn}]")
    for line in lines:
        chat.notify(f"[{line}]")
    if block_size and not path.is_dir():
        chat.notify(f"[--block_size is for folders: this checkpoint has {chat.size} tokens]")
    return chat


DTYPES = "auto", "float32", *PACKED
SMALL = 2_000_000  # parameters; a model of fewer is not bound by the bytes of its weights


def stored(model, device, dtype):
    """A model for chat on its device, its weights in a dtype of DTYPES."""
    if device.type != "cpu":
        return model.to(device, machine.pick_dtype(dtype, device))
    if dtype == "float32" or dtype == "auto" and model.n_params() < SMALL:
        return by_columns(model.float())
    return pack(model, dtype, machine.pick_dtype("auto", device))


def load_trained(path, tell):
    """(model, tokenizer, name of the mask) of a checkpoint of train.py. ValueError if damaged.

    tell: called with a line if the run has not come to its end.
    """
    model, state = load_model(path)
    settings = state["settings"]
    steps = settings.get("max_iters")
    if isinstance(steps, int) and state["step"] < steps:
        tell(f"trained for {state['step']:,} of {steps:,} steps so far")
    if settings["init_from"]:
        tokenizer = hf.load_tokenizer(path.parent)
    else:
        tokenizer = Tokenizer(settings["tokenizer"])
    if tokenizer.identity != state["tokenizer"]:
        other = f"was trained with another tokenizer ({state['tokenizer']})"
        raise ValueError(f"{path} {other}; here is {tokenizer.identity}")
    return model, tokenizer, settings["mask"]


def go_on(chat, messages):
    """A chat goes on from a conversation: messages that end with an answer. ValueError if not."""
    messages = check_history(messages)
    chat.reset()  # or an error, before anything is changed
    if messages[0]["role"] == "system":  # in place of the one that the chat has
        chat.messages, messages = messages[:1], messages[1:]
        chat.reset()
    given = []
    for message in messages:
        if message["role"] != "assistant":
            given.append(message)
            continue
        query = chat.tokenizer.encode_given(given)
        chat.turns.append((query, answer_tokens(chat.tokenizer, message)))
        given = []
    chat.messages += [{"role": m["role"], "content": m["content"]} for m in messages]


def saved(chat):
    """The messages as /save writes them. An answer has its tokens if its text would get others."""
    messages = [dict(message) for message in chat.messages]
    answers = [message for message in messages if message["role"] == "assistant"]
    # The oldest turns may be forgotten, so it is counted from the last.
    for message, (_, tokens) in zip(reversed(answers), reversed(chat.turns)):
        if tokens != chat.tokenizer.encode_answer(message["content"]):
            message["tokens"] = tokens[:-1]  # without <|end|>
    return messages


def answer_tokens(tokenizer, message):
    """The tokens of an answer: those that /save wrote, if they spell its text, or its text's."""
    tokens, known = message.get("tokens"), range(tokenizer.vocab_size)
    if isinstance(tokens, list) and all(type(token) is int and token in known for token in tokens):
        sayable = not {*tokens} & {*tokenizer.unsayable, tokenizer.end}
        if sayable and tokenizer.decode(tokens) == message["content"]:
            return [*tokens, tokenizer.end]
    return tokenizer.encode_answer(message["content"])


def read_history(path):
    """The messages in a file that /save wrote, not checked. ValueError if it is not JSON."""
    try:
        saved = json.loads(pathlib.Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not JSON; expected a file that /save wrote") from None
    return saved.get("messages") if isinstance(saved, dict) else saved


MEMORY = ("--dtype bfloat16 needs half of what float32 needs, a smaller --block_size less for the "
          "cache, --device cpu uses the computer's own")
HELP = """/reset      forget the conversation
/stats      tokens in the cache and the speed of the last turn
/mask       draw what each token sees: '#' its past, '+' its future, '.' hidden
/save FILE  write the conversation as messages in JSON
/help       this
/quit       leave, as Ctrl-D does; Ctrl-C stops an answer
An answer that goes round in circles is ended: the same 8 to 64 tokens stand
three times in a row."""


def show_stats(chat):
    s = chat.stats
    print(f"{chat.cache.length} of {chat.size} tokens in the cache")
    if "decode s" in s:  # it is not there if memory ended the turn
        read = f"{s['prefill tokens']} tokens read in {1000 * s['prefill s']:.1f} ms"
        print(f"last turn: {read}, {s['decode tokens']} written "
              f"at {s['decode tokens'] / s['decode s']:,.0f} tokens/s")


ROWS = 60  # of /mask at most: what is older has left the screen


def show_mask(chat):
    tokens, segments = chat.layout()
    if not tokens:
        print("[nothing to draw: the dialogue is empty]")
        return
    labels = [ascii(chat.tokenizer.decode([token]))[1:-1][:16] for token in tokens]
    # After --history nothing is in the cache yet, so f is that of the dialogue.
    f = chat.mask(torch.tensor([segments]))
    columns = min(60, max(shutil.get_terminal_size().columns - max(map(len, labels)) - 1, 1))
    rows = draw(f[0], labels, columns)
    if len(rows) > ROWS:
        print(f"The last {ROWS} of {len(rows)} tokens.")
    print("\n".join(rows[-ROWS:]))
    if len(labels) > columns:
        print(f"A column is {len(labels) / columns:.1f} tokens.")


def save(chat, path):
    """Write the conversation to a file, and tell whether it is written."""
    if not path:
        print("[not saved: /save FILE needs the name of a file]")
        return
    try:
        write_json(pathlib.Path(path).expanduser(), {"messages": saved(chat)})
        print(f"[saved to {printable(path)}]")
    except OSError as error:
        print(f"[not saved: {printable(path)}: {error.strerror}]")
    except (ValueError, RuntimeError) as error:  # a name that no file has; ~ of nobody
        print(f"[not saved: {one_line(error)}]")


def command(chat, line):
    """Run a command of the terminal; True to leave."""
    name, _, argument = line.partition(" ")
    if name == "/quit":
        return True
    if name == "/reset":
        chat.reset()
        print("[forgotten]")
    elif name == "/stats":
        show_stats(chat)
    elif name == "/mask" and argument:
        print("[/mask only draws; to chat under another mask start with --mask NAME]")
    elif name == "/mask":
        show_mask(chat)
    elif name == "/save":
        save(chat, argument)
    elif name == "/help":
        print(HELP)
    else:
        print(f"[no command {one_line(name)}; /help lists them]")
    return False


def in_circles(tokens):
    """Whether the last 8 to 64 tokens stand there three times in a row."""
    for n in range(8, min(64, len(tokens) // 3) + 1):
        if tokens[-1] == tokens[-1 - n] and tokens[-3 * n :] == 3 * tokens[-n:]:
            return True
    return False


def tell(line):
    """Print a line of the program; a terminal gets it broken at words, so that it fits."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        line = textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
    print(line)


def answer(chat, text):
    """Stream the answer to the terminal; Ctrl-C ends it, and the program goes on."""
    def stop():
        chat.stop = True

    notes = []
    chat.notify = notes.append  # they are told behind the answer and not amid it
    try:
        with machine.on_interrupt(stop):
            for piece in chat.stream(text):
                print(printable(piece), end="", flush=True)
                if not chat.stop and in_circles(chat.turns[-1][1]):
                    chat.stop = True
                    notes.append("[the answer went round in circles and is ended]")
        print()
    except ValueError as error:
        if not machine.for_the_user(error):
            raise
        tell(f"[{one_line(error)}]")
    except RuntimeError as error:
        if not machine.out_of_memory(error):
            raise
        tell(f"[out of memory; {MEMORY}]")
    for note in notes:
        tell(note)


TRAINED = pathlib.Path("out/ckpt.pt")
SMALL_MODEL = pathlib.Path(__file__).parent / "data" / "small.pt"


def flags():
    """The command line."""
    parser = machine.Parser("Chat with a trained model.")
    flag = parser.add_argument
    flag("--ckpt", default="",
         help="a checkpoint of train.py or a Hugging Face folder (default: out/ckpt.pt, or a small "
              "model of the repository until that is there)")
    flag("--mask", default="", choices=tuple(MASKS),
         help="the attention mask (default: the one that the model was trained with)")
    flag("--block_size", type=int, default=0,
         help="context of a folder in tokens (default: its own, at most 4096)")
    flag("--prompt", action="append", default=[],
         help="a query instead of the terminal; repeat it for more turns")
    flag("--system", help="a system prompt (default: that of the folder's template, or none)")
    flag("--history", default="",
         help="go on from a file that /save wrote, or any JSON list of messages")
    flag("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    flag("--top_k", type=int, default=0, help="draw from the k likeliest tokens (default: 0, all)")
    flag("--top_p", type=float, default=1.0,
         help="draw from the fewest tokens of this probability (default: 1)")
    flag("--seed", type=int, default=0, help="of the sampling (default: 0)")
    flag("--max_new_tokens", type=int, default=200, help="longest answer (default: 200)")
    flag("--device", default="auto", help=f"{machine.DEVICES} (default: auto)")
    flag("--dtype", default="auto", choices=DTYPES,
         help="of the weights; int8 and int4, on the CPU, are faster and less exact; auto is "
              "float32 for a small model, else bfloat16 (default: auto)")
    a = parser.parse_args()
    accepted = {
        "--temperature": ("from 0 on", 0 <= a.temperature < float("inf")),
        "--top_k": ("from 0 on", a.top_k >= 0),
        "--top_p": ("above 0 and at most 1", 0 < a.top_p <= 1),
        "--seed": ("from 0 on, of at most 64 bits", 0 <= a.seed < 1 << 64),
        "--max_new_tokens": ("at least 1", a.max_new_tokens >= 1),
        "--block_size": ("from 0 on", a.block_size >= 0),
    }
    for name, (what, holds) in accepted.items():
        if not holds:
            parser.error(f"{name} must be {what}")
    return a


def main():
    a = flags()
    with machine.errors_in_one_line(MEMORY):
        if not a.ckpt and not TRAINED.exists():
            tell(f"[no {TRAINED} yet, so this is the small model of the repository; "
                 f"{machine.command('train.py')} trains your own]")
            a.ckpt = SMALL_MODEL
        ckpt = a.ckpt or TRAINED
        chat = load_chat(
            ckpt, a.device, a.dtype, a.mask, a.block_size, system=a.system,
            temperature=a.temperature, top_k=a.top_k, top_p=a.top_p, seed=a.seed,
            max_new_tokens=a.max_new_tokens, notify=tell,
        )
        if a.history:
            go_on(chat, read_history(a.history))
        talk(chat, a.prompt, ckpt)


# What a terminal sends for arrows and other keys, where nothing edits the line.
KEYS = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|O.|[^\[O])?")
LONGEST_LINE = 4095  # bytes that Linux reads of a line, where nothing edits it; it drops the others


def edit_lines():
    """Let arrow keys edit what is typed, in lines of any length: whether this system can."""
    try:
        import readline  # noqa: F401, input() uses it once it is imported
    except ImportError:
        return False
    return sys.stdout.isatty()  # else input() does without it


def talk(chat, prompts, path=TRAINED):
    """Answer the prompts, or what is typed until the end of the input. path: of the model."""
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that cannot show every character
        sys.stdout.reconfigure(errors="replace")
    for prompt in prompts:
        print(f"> {prompt}")
        answer(chat, prompt)
    if prompts or sys.stdin is None:
        return
    terminal = sys.stdin.isatty()
    edited = False
    if terminal:
        edited = edit_lines()
        tell(f"This is {path}. Ask something; /help lists the commands, /quit leaves.")
    if hasattr(sys.stdin, "reconfigure"):
        # A file may begin with a byte order mark; a terminal may not be one of UTF-8.
        encoding = None if terminal else "utf-8-sig"
        sys.stdin.reconfigure(encoding=encoding, errors="replace")
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            break
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D leaves")
            continue
        if terminal and not edited and len(line.encode(errors="replace")) >= LONGEST_LINE:
            tell(f"[a terminal cuts a line at {LONGEST_LINE:,} bytes, so this one is not asked: "
                 "put it into a file, and run sample.py < FILE]")
            continue
        line = KEYS.sub("", line).strip()
        if line.startswith("/"):
            if command(chat, line):
                break
        elif line:
            answer(chat, line)


if __name__ == "__main__":
    main()
