"""
The chat template of a checkpoint folder: a program in Jinja's language that writes a dialogue.

It is run in Jinja's sandbox, where it reaches no files, and gets the few dialogues below. The text
around their messages is the layout of a chat. A line tells the user what a layout cannot say.
"""
import datetime
import functools
import json
import re

NO_JINJA = "was read and not run, since Jinja is not installed (pip install jinja2)"


def compile_template(source):
    """A template as Jinja compiles it, with the functions that transformers gives a template."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def refuse(message):
        raise TemplateError(message)

    extensions = ["jinja2.ext.loopcontrols", Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=extensions)
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def dialogue(*texts, system=()):
    roles = [*["system" for _ in system], "user", "assistant", "user"]
    return [{"role": r, "content": text} for r, text in zip(roles, [*system, *texts])]


# `read_layout` reads the layout from the first two dialogues, and `difference` compares all.
TEXTS = "Qone", "Qtwo", "Qthree"
DIALOGUES = {
    "no system prompt": dialogue(*TEXTS),
    "a system prompt": dialogue(*TEXTS, system=["Qzero"]),
    "spaces around a text": dialogue(*(f" {text} " for text in TEXTS)),
    "thoughts in an answer": dialogue("Qone", "<think>\nQ?\n</think>\n\nQtwo", "Qthree"),
}


@functools.lru_cache
def run(source, special):
    """What a template writes for each of DIALOGUES, a list. ValueError if it cannot be run.

    special: pairs as ("bos_token", "<s>"). For a dialogue that the template refuses: None.
    """
    template, texts = None, []
    for messages in DIALOGUES.values():
        try:
            template = template or compile_template(source)
            text = template.render(messages=messages, add_generation_prompt=True, tools=None,
                                   documents=None, **dict(special))
        except ImportError:
            raise ValueError(NO_JINJA) from None
        except Exception as error:  # whatever a stranger's program may raise
            text, why = None, f"{type(error).__name__}: {error}"[:200]
        texts.append(text)
    if texts == [None] * len(texts):
        raise ValueError(f"cannot be run ({why})")
    return texts


def around(written, texts):
    """What a template wrote before, between and behind these texts, a list."""
    pieces = re.fullmatch("(.*)".join(["", *texts, ""]), written or "", re.DOTALL)
    return list(pieces.groups()) if pieces else []


def read_layout(usual, written):
    """A layout that writes what the template wrote, and its own system prompt ("" is none).

    usual: the layout of LAYOUTS with the same special tokens. ValueError, or IndexError, if the
    template does not use them.
    """
    bare, prompted, *_ = written
    start, end = re.match(r"<\|\w+\|>", usual["user"])[0], usual["end"]
    # 1. A header is all from its special token on; it stands behind the end of another message.
    own, *pieces = around(bare, TEXTS)
    if not all(piece.startswith(end) for piece in pieces):
        raise ValueError("messages end otherwise")
    _, after_answer, asked = pieces
    layout = {
        "begin": own[: own.index(start)],
        "system": usual["system"],
        "user": after_answer[after_answer.rindex(start) :],
        "assistant": asked[asked.rindex(start) :],
        "end": end,
        "after": after_answer[len(end) : after_answer.rindex(start)],
    }
    before = around(prompted, ["Qzero", *TEXTS])[:1]
    if before:
        layout["system"] = before[0][before[0].index(start) :]
    # 2. A system prompt of its own stands between a header and the user's.
    behind = end + layout["after"] + layout["user"]
    if not own.endswith(behind):
        return layout, ""
    block = own[len(layout["begin"]) : -len(behind)]
    if block == layout["system"] or not block.startswith(layout["system"]):
        # LLaMA 3.1 has the date there, before any prompt.
        layout["system"] = usual["system"]
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
