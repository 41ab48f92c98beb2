"""
A model that was fine-tuned under ISM, used elsewhere: with transformers alone, from its folder.

    python demos/elsewhere.py FOLDER "My name is Ann." "What is my name?"

transformers runs every folder as causal. A model of ISM then still writes, only worse, and without
a warning. Two things make it right. The tokens of a query see each other: they are read in one call
with a mask that hides nothing. And the token that ends an answer belongs to the answer: it is read
by itself, not with the next query. With that the cache of keys and values works as ever. Under
ism_sink the first token of all sees itself alone.
"""
import sys
from pathlib import Path

import torch

try:
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
    from transformers.masking_utils import create_causal_mask
except ImportError:
    sys.exit('elsewhere.py needs transformers 5: pip install "transformers>=5,<6"')


def dialogue_mask(model, tokens, segments):
    """The attention_mask (B, 1, T, T) of whole dialogues, to train on them or to score them.

    tokens (B, T), segments (B, T): 1, 3, ... for the queries, 2, 4, ... for the answers.
    """
    # Tokens of one block see each other; those of block -1 are causal.
    blocks = torch.where(segments % 2 == 1, segments, -1)  # (B, T)
    if model.config.nanoism_mask == "ism_sink":
        blocks[:, 0] = -1
    x = model.get_input_embeddings()(tokens)  # (B, T, C)
    return create_causal_mask(model.config, x, None, None, block_sequence_ids=blocks)


def read(model, cache, tokens):
    """Read a list of tokens, each of which sees the whole cache and the whole list: logits (V,)."""
    n = len(tokens)
    start = cache.get_seq_length()
    seen = torch.ones(1, 1, n, start + n, dtype=torch.bool)  # (1, 1, n, S)
    if start == 0 and model.config.nanoism_mask == "ism_sink":
        seen[..., 0, 1:] = False
    # By position, since the cache has had two names. Positions (None) follow from it.
    return model(torch.tensor([tokens]), seen, None, cache).logits[0, -1]


def turn_end(tokenizer):
    """The token that the chat template writes behind an answer; eos_token may be another one."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    behind = tokenizer(text.rpartition("ANSWER")[2], add_special_tokens=False).input_ids
    added = tokenizer.get_added_vocab().values()
    return next((token for token in behind if token in added), tokenizer.eos_token_id)


@torch.no_grad()
def chat(model, tokenizer, queries, max_new_tokens=100):
    """Yield the answer to each query."""
    cache, messages, end = DynamicCache(), [], turn_end(tokenizer)
    spelled = tokenizer.convert_ids_to_tokens(end)
    for query in queries:
        messages.append({"role": "user", "content": query})
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        if len(messages) > 1:  # all up to the end of the last answer has been read
            text = spelled.join(text.rsplit(spelled, 2 + query.count(spelled))[1:])
        new = tokenizer(text, add_special_tokens=False).input_ids
        logits, answer = read(model, cache, new), []
        while len(answer) < max_new_tokens and int(logits.argmax()) != end:
            answer.append(int(logits.argmax()))
            logits = read(model, cache, answer[-1:])
        read(model, cache, [end])  # by itself, see above
        messages.append({"role": "assistant", "content": tokenizer.decode(answer)})
        yield messages[-1]["content"]


if __name__ == "__main__":
    folder, *queries = sys.argv[1:] or [""]
    if not queries or not Path(folder, "config.json").exists():
        sys.exit('usage: python demos/elsewhere.py FOLDER "a query" "the next one" ..., with the '
                 "folder of a model that was fine-tuned under ISM")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        sys.exit(f"elsewhere.py: {folder} has no chat template")
    for answer in chat(AutoModelForCausalLM.from_pretrained(folder), tokenizer, queries):
        print(answer, flush=True)
