"""
The chat template of a checkpoint folder: a program in Jinja's language that writes a dialogue.

It is a stranger's program. So it runs in Jinja's sandbox, in a process of its own that has bounds
on time and memory, and is given the few dialogues below. What it writes around their texts is the
layout of a chat. What a layout cannot say is told in a line.
"""
import functools
import json
import re
import subprocess
import sys

# Reads {"template", "special", "dialogues"} and writes a list: for each dialogue its text, or
# {"error": why there is none}. The functions are those that transformers gives a template.
PROGRAM = r"""
import sys
sys.path[:] = [path for path in sys.path if path]  # nothing from the current folder
import datetime, json
try:
    import jinja2.ext, jinja2.sandbox
except ImportError:
    sys.exit(3)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
except (ImportError, ValueError, OSError):  # not on Windows, the second not on macOS
    pass

class Generation(jinja2.ext.Extension):
    tags = {"generation"}
    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)

def refuse(message):
    raise jinja2.TemplateError(message)

def render(dialogue):
    try:
        text = template.render(messages=dialogue, add_generation_prompt=True, tools=None,
                               documents=None, **job["special"])
        return text if len(text) < 100_000 else {"error": "its text is too long"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:200]}

job = json.load(sys.stdin)
environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
environment.globals["raise_exception"] = refuse
environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
try:
    template = environment.from_string(job["template"])
    print(json.dumps([render(dialogue) for dialogue in job["dialogues"]]))
except Exception as error:
    print(json.dumps([{"error": f"{type(error).__name__}: {error}"[:200]}] * len(job["dialogues"])))
"""
SECONDS = 20
NO_JINJA = "was read and not run, since Jinja is not installed (pip install jinja2)"


def dialogue(*texts, system=()):
    roles = [*["system" for _ in system], "user", "assistant", "user"]
    return [{"role": r, "content": text} for r, text in zip(roles, [*system, *texts])]


# The texts from which the layout is read, and what is compared. The first two make the layout.
TEXTS = "Qone", "Qtwo", "Qthree"
DIALOGUES = {
    "no system prompt": dialogue(*TEXTS),
    "a system prompt": dialogue(*TEXTS, system=["Qzero"]),
    "spaces around a text": dialogue(*(f" {text} " for text in TEXTS)),
    "thoughts in an answer": dialogue("Qone", "<think>\nQ?\n</think>\n\nQtwo", "Qthree"),
}


@functools.lru_cache
def run(template, special):
    """What a template writes for each of DIALOGUES, a list. ValueError if it cannot be run.

    special: the pairs of a name, bos_token say, and a token. Where it refuses a dialogue: None.
    """
    job = {"template": template, "special": dict(special), "dialogues": [*DIALOGUES.values()]}
    try:
        done = subprocess.run([sys.executable, "-c", PROGRAM], input=json.dumps(job), text=True,
                              capture_output=True, encoding="utf-8", timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"was stopped after {SECONDS} seconds") from None
    if done.returncode == 3:
        raise ValueError(NO_JINJA)
    if done.returncode:
        raise ValueError("was stopped: it takes more time or memory than a template may")
    texts = json.loads(done.stdout)
    if all(isinstance(text, dict) for text in texts):
        raise ValueError(f"cannot be run ({texts[0]['error']})")
    return [None if isinstance(text, dict) else text for text in texts]


def around(written, texts):
    """What a template wrote before, between and behind these texts, a list."""
    pieces = re.fullmatch("(.*)".join(["", *texts, ""]), written or "", re.DOTALL)
    return list(pieces.groups()) if pieces else []


def read_layout(row, written):
    """A layout that writes what the template wrote, and its own system prompt ("" is none).

    row: the layout of LAYOUTS with the same special tokens. ValueError, or IndexError, if the
    template does not use them.
    """
    bare, given, *_ = written
    start, end = re.match(r"<\|\w+\|>", row["user"])[0], row["end"]
    # 1. A header is all from its special token on; it stands behind the end of another message.
    own, *pieces = around(bare, TEXTS)
    if not all(piece.startswith(end) for piece in pieces):
        raise ValueError("messages end otherwise")
    _, after_answer, asked = pieces
    layout = {
        "begin": own[: own.index(start)],
        "system": row["system"],
        "user": after_answer[after_answer.rindex(start) :],
        "assistant": asked[asked.rindex(start) :],
        "end": end,
        "after": after_answer[len(end) : after_answer.rindex(start)],
    }
    before = around(given, ["Qzero", *TEXTS])[:1]
    if before:
        layout["system"] = before[0][before[0].index(start) :]
    # 2. A system prompt of its own stands between a header and the user's.
    behind = end + layout["after"] + layout["user"]
    if not own.endswith(behind):
        return layout, ""
    block = own[len(layout["begin"]) : -len(behind)]
    if block == layout["system"] or not block.startswith(layout["system"]):
        # LLaMA 3.1 has the date there, before any prompt.
        layout["system"] = row["system"]
    if not block.startswith(layout["system"]):
        raise ValueError("a system prompt begins otherwise")
    return layout, block.removeprefix(layout["system"])


def difference(tokenizer, written):
    """A line on the first thing that the template writes otherwise than the tokenizer, or "".

    It sets tokenizer.trim where the template takes away the spaces around a text.
    """
    line = ""
    for (what, messages), text in zip(DIALOGUES.items(), written):
        if text is None:
            line = line or f"refuses a dialogue with {what}"
            continue
        theirs = tokenizer.encoding.encode(tokenizer.normalize(text), allowed_special="all")
        ours, _ = tokenizer.encode_dialogue(messages)
        if ours != theirs and not tokenizer.trim:
            tokenizer.trim = True
            tokenizer.trim = tokenizer.encode_dialogue(messages)[0] == theirs
            ours, _ = tokenizer.encode_dialogue(messages)
        if ours != theirs and not line:
            same = 0
            while ours[same : same + 1] == theirs[same : same + 1]:
                same += 1
            a, b = (tokenizer.decode(tokens[same : same + 9]) for tokens in (theirs, ours))
            line = f"writes a dialogue with {what} otherwise: {a!r}, and here it is {b!r}"
    return line
