"""
A model that was fine-tuned under ISM, used elsewhere: with transformers alone, from its folder.

    python demos/elsewhere.py FOLDER "My name is Ann." "What is my name?"

transformers runs every folder as causal. A model of ISM then still writes, only worse, and nothing
tells. Two things make it right. The tokens of a query see each other: they are read in one call
with a mask that hides nothing. And the token that ends an answer belongs to the answer: it is read
by itself, not with the next query. With that the cache of keys and values works as ever.
"""
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.masking_utils import create_causal_mask


def dialogue_mask(model, tokens, segments):
    """The attention_mask (B, 1, T, T) of whole dialogues, to train on them or to score them.

    tokens (B, T), segments (B, T): 1, 3, ... for the queries, 2, 4, ... for the answers.
    """
    # Tokens of one block see each other; those of block -1 are causal.
    blocks = torch.where(segments % 2 == 1, segments, -1)  # (B, T)
    x = model.get_input_embeddings()(tokens)  # (B, T, C)
    return create_causal_mask(model.config, x, None, None, block_sequence_ids=blocks)


def read(model, cache, tokens):
    """Read a list of tokens, each of which sees the whole cache and the whole list: logits (V,)."""
    n = len(tokens)
    everything = torch.ones(1, 1, n, cache.get_seq_length() + n, dtype=torch.bool)  # (1, 1, n, S)
    # By position, since the cache has had two names. Positions (None) follow from it.
    return model(torch.tensor([tokens]), everything, None, cache).logits[0, -1]


@torch.no_grad()
def chat(model, tokenizer, queries, max_new_tokens=100):
    """Yield the answer to each query."""
    cache, messages, known = DynamicCache(), [], ""
    for query in queries:
        messages.append({"role": "user", "content": query})
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        new = tokenizer(text[len(known) :], add_special_tokens=False).input_ids
        logits, answer = read(model, cache, new), []
        while len(answer) < max_new_tokens and int(logits.argmax()) != tokenizer.eos_token_id:
            answer.append(int(logits.argmax()))
            logits = read(model, cache, answer[-1:])
        read(model, cache, [tokenizer.eos_token_id])  # by itself, see above
        messages.append({"role": "assistant", "content": tokenizer.decode(answer)})
        # What has been read ends there; some templates take the spaces around an answer away.
        known = tokenizer.apply_chat_template(messages, tokenize=False)
        known = known[: known.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)]
        yield messages[-1]["content"]


if __name__ == "__main__":
    folder, *queries = sys.argv[1:] or [""]
    if not queries or not Path(folder, "config.json").exists():
        sys.exit('usage: python demos/elsewhere.py FOLDER "a query" "the next one" ..., with the '
                 "folder of a model that was fine-tuned under ISM")
    for answer in chat(AutoModelForCausalLM.from_pretrained(folder),
                       AutoTokenizer.from_pretrained(folder), queries):
        print(answer, flush=True)
