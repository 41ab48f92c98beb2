"""
Files of chats, one a line in JSON, in the forms that people have them:

    {"messages": [{"role": "user", "content": "..."}, ...]}             OpenAI
    {"conversations": [{"from": "human", "value": "..."}, ...]}         ShareGPT, AgentInstruct
    {"instruction": "...", "input": "...", "output": "..."}             LLaMA-Factory, Alpaca

A file may mix the forms. Each key of a line is used, or is an error, or is left out and counted; a
line at the end tells the counts. A flag such as "weight": 0 (see LEARNED and NOT_LEARNED) marks an
answer, or all answers of a line, as not to be learned. The model then reads them as queries.
"""
import collections
import json

from data.tokenizer import ROLES

# A tool's result is part of a query, like what a user writes.
ALIASES = {
    "human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "ai": "assistant", "model": "assistant", "developer": "system", "tool": "user",
    "function": "user", "observation": "user", "ipython": "user", "function_call": "assistant",
}
# The most bytes of a line, so that a file without line breaks cannot fill the memory.
LONGEST_LINE = 1 << 24
# Keys that may stand beside a text and are not trained on; a line at the end counts them.
LEFT_OUT = {
    "reasoning_content", "reasoning", "thinking", "tool_calls", "function_call", "tools",
    "functions", "refusal", "chosen", "rejected",
}
CALLS = "tool_calls", "function_call"  # a message with such a key may have no text
# Other tools' names for the flag that says whether an answer is learned: 1 and true, 0 and false.
LEARNED = ("weight", "loss", "loss_weight", "loss_scale", "loss_mask", "train", "training",
           "trainable", "trained", "label")
NOT_LEARNED = "mask", "masked"  # here 1 and true say that it is not
BAD = "kto_tag", "label"  # flags of a line; false says that its answer is a bad one
TEXTS = "text", "input_text", "output_text"  # the types of parts of a content that are read
# Without what these hold, a text would be wrong, or a bad part of an answer would be learned.
REFUSED = ("images", "image", "videos", "video", "audios", "audio", "train_detail",
           "training_detail")
BEGINNINGS = {  # of files that are no lines of JSON
    b"\x1f\x8b": "packed by gzip; unpack it first",
    b"PK\x03\x04": "packed by zip; unpack it first",
    b"\xff\xfe": "UTF-16; write it as UTF-8",
    b"\xfe\xff": "UTF-16; write it as UTF-8",
}
FORM = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}'


def read_chats(path, skip_bad=False):
    """Yield the messages of each line, {"role": system, user or assistant, "content": str} each.

    ValueError names the line, the message and what is wrong with it. With skip_bad such lines are
    left out and counted. If anything was left out, a line at the end says so.
    """
    left_out, skipped = collections.Counter(), []
    for number, line in lines(path):
        try:
            messages = read_chat(line, left_out)
        except ValueError as error:
            skipped.append(f"line {number}{error}")
            if not skip_bad:
                how = "(--skip_bad goes on without such lines)"
                raise ValueError(f"{path}, {skipped[0]} {how}") from None
            continue
        yield messages
    if left_out:
        counts = ", ".join(f"{n} times {name}" for name, n in sorted(left_out.items()))
        print(f"left out of {path}, which is not trained on: {counts}")
    if skipped:
        bad = f"{len(skipped)} lines that cannot be read, the first {skipped[0]}"
        print(f"left out of {path}: {bad}")


def lines(path):
    """(number, text) of the lines of a file that are not empty; text is bytes."""
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
            if len(line) > LONGEST_LINE:
                long = f"line {number} is longer than {LONGEST_LINE:,} bytes"
                raise ValueError(f"{path}, {long}; put each dialogue on a line of its own")
            if line.strip():
                yield number, line


def read_chat(line, left_out):
    """The messages of one line of bytes. ValueError, whose text goes behind "line 3"."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise ValueError(f" is not JSON{looks_like(line)}") from None
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise ValueError(f": expected {FORM} on a line of its own, got a {kind}")
    check_refused(record, "")
    messages = [read_message(i, m, left_out) for i, m in enumerate(listed_messages(record), 1)]
    count_left_out(record, left_out)
    for key in BAD:
        if record.get(key) is False:
            bad = "is false, so its answer is a bad one, which is not learned"
            raise ValueError(f": '{key}' {bad}")
    if not is_trained({key: record[key] for key in record if key not in BAD}, ""):
        messages = [{**message, "given": True} for message in messages]
    if record.get("system"):
        system = {"role": "system", "content": read_content(record["system"], ": 'system'")}
        if messages[0] != system:  # some files say it in both places
            messages.insert(0, system)
    return messages


def looks_like(line):
    """What a line that is not JSON may be instead, and what to do about it."""
    for beginning, what in BEGINNINGS.items():
        if line.startswith(beginning):
            return f" but {what}"
    start = line.strip()[:60].decode("utf-8", "replace")
    if start.startswith("["):
        return f": {start} (of a list write each dialogue on a line of its own)"
    return f": {start}"


def listed_messages(record):
    """The messages of a record, still in the form of the file. ValueError if it has none."""
    keys = [key for key in ("messages", "conversations", "conversation", "instruction")
            if record.get(key) is not None]
    if len(keys) > 1:
        raise ValueError(f": there are both '{keys[0]}' and '{keys[1]}'; leave one of them out")
    if keys and keys[0] != "instruction":
        messages = record[keys[0]]
        if not isinstance(messages, list) or not messages:
            raise ValueError(f": '{keys[0]}' is no list of messages; expected {FORM}")
        return messages
    if not keys:
        names = ", ".join(sorted(record)) or "nothing"
        known = "neither 'messages' nor 'conversations' nor 'instruction'"
        raise ValueError(f": {known} among {names}; expected {FORM}")
    if "output" not in record:
        raise ValueError(": there is 'instruction', but not 'output'")
    messages = []
    for pair in [*(record.get("history") or []), [record["instruction"], record["output"]]]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(": 'history' must be pairs of an instruction and an output")
        query, answer = pair
        messages.append({"role": "user", "content": query})
        messages.append({"role": "assistant", "content": answer})
    if record.get("input"):
        messages[-2]["content"] = f"{record['instruction']}\n{record['input']}"
    return messages


def read_message(i, m, left_out):
    """One message in our form. ValueError, whose text goes behind "line 3"."""
    where = f", message {i}"
    if not isinstance(m, dict):
        raise ValueError(f"{where} is no object but a {type(m).__name__}")
    check_refused(m, where)
    role = m.get("role", m.get("from"))
    known = ALIASES.get(role, role) if isinstance(role, str) else None
    if known not in ROLES:
        names = ", ".join((*ROLES, *ALIASES))
        raise ValueError(f"{where}: the role is {json.dumps(role)}; known are {names}")
    content = m.get("content", m.get("value"))
    calls = [key for key in CALLS if m.get(key)]
    if content is None or calls and not content:
        what = "missing"
        if "content" in m or "value" in m:
            what = "null" if content is None else "empty"
        why = f" ({calls[0]} is not supported)" if calls else ""
        raise ValueError(f"{where}: content is {what}{why}")
    count_left_out(m, left_out)
    message = {"role": known, "content": read_content(content, f"{where}: content")}
    if not is_trained(m, where):
        message["given"] = True
    return message


def count_left_out(m, left_out):
    """Counts the keys of a record or a message that are left out."""
    left_out.update(key for key in LEFT_OUT if m.get(key))


def read_content(content, where):
    """The text of a content: a string, or a list of parts of text. ValueError for anything else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{where} is no text but a {type(content).__name__}")
    parts = []
    for part in content:
        if isinstance(part, str):
            part = {"text": part}
        if not isinstance(part, dict):
            part = {"type": type(part).__name__}
        kind, text = part.get("type") or "text", part.get("text")
        if kind not in TEXTS or not isinstance(text, str):
            raise ValueError(f"{where} has a part of type {kind}; only text is supported")
        parts.append(text)
    return "".join(parts)


def check_refused(m, where):
    """ValueError if a record or a message has a key of REFUSED."""
    for key in REFUSED:
        if m.get(key):
            raise ValueError(f"{where}: '{key}' is not supported, only text; expected {FORM}")


def is_trained(m, where):
    """False if a flag of a message, or of a whole line, says that it is not to be learned."""
    trained = True
    for key in (*LEARNED, *NOT_LEARNED):
        value = m.get(key)
        if value not in (None, 0, 1):  # false is 0, true is 1
            raise ValueError(f"{where}: the {key} is {json.dumps(value)}; known are 0 and 1")
        if value is not None and bool(value) != (key in LEARNED):
            trained = False
    return trained


def check_history(messages):
    """The messages of a conversation to go on from. ValueError says which one is wrong, and why."""
    expected = ("a history is a list of system, user and assistant messages that ends with the "
                "assistant's")
    if not isinstance(messages, list) or not messages:
        raise ValueError(expected)
    read = []
    for i, m in enumerate(messages, 1):
        try:
            read.append(read_message(i, m, collections.Counter()))
        except ValueError as error:
            raise ValueError(f"the history{error}; {expected}") from None
    if read[-1]["role"] != "assistant":
        raise ValueError(expected)
    for message, m in zip(read, messages):
        message.pop("given", None)
        if message["role"] == "assistant" and "tokens" in m:  # see answer_tokens of sample.py
            message["tokens"] = m["tokens"]
    return read
