"""A model that was fine-tuned here and saved: what transformers makes of its folder."""
import json
import random
import sys

import pytest
import torch
from conftest import ROOT
from folders import (
    FAMILIES,
    KINDS,
    chat_folder,
    check_equal,
    fresh,
    make_pretrained,
    random_query,
    transformers,
)

from data.hf import from_pretrained, save_pretrained
from mask import MASKS, dense
from sample import load_chat

sys.path.insert(0, str(ROOT / "demos"))
import elsewhere
from finetune import add_lora, merge_lora


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [0, 8])
def test_what_is_saved_loads_in_transformers(family, rank, tmp_path):
    """Logits equal those of the model that was saved.

    With LoRA merged, from a sharded source, and in bfloat16.
    """
    theirs = make_pretrained(family, tmp_path / "source", max_shard_size="10KB" if rank else "5GB")
    for dtype in (torch.float32, torch.bfloat16):
        ours = from_pretrained(tmp_path / "source", dtype=dtype)
        if rank:
            add_lora(ours, rank, 16.0)
            for name, p in ours.named_parameters():
                if name.endswith(".B"):
                    torch.nn.init.normal_(p, std=0.1)
            merge_lora(ours)
        out = tmp_path / f"{dtype}"
        save_pretrained(ours, tmp_path / "source", out)
        assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype)[6:]
        load = type(theirs).from_pretrained
        again, info = load(out, dtype=torch.float32, output_loading_info=True)
        assert not any(info.values())
        check_equal(again.eval(), ours.float().eval())
        check_equal(again, from_pretrained(out))
        if not rank and dtype == torch.float32:
            for a, b in zip(theirs.parameters(), again.parameters()):
                assert torch.equal(a, b)


@pytest.mark.parametrize("mask", ["ism", "ism_sink"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_model_of_ism_elsewhere(kind, mask, tmp_path):
    """demos/elsewhere.py: transformers gives our chat's logits if it is told the mask.

    Turn by turn from its cache, and for a whole dialogue. If it is not told, they differ, and no
    error tells.
    """
    fast = chat_folder(kind, tmp_path)
    fast.eos_token = "q"  # a base model's is another token than that which ends a turn
    fast.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "nanoism_mask": mask}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert theirs.config.nanoism_mask == mask
    chat = load_chat(tmp_path, "cpu", "float32", max_new_tokens=9)
    queries = [random_query(random.Random(number))["content"] for number in range(4)]
    cache, seen, answers = transformers.DynamicCache(), 0, []
    for query in queries:
        # 1. The query behind the cache.
        ours = fresh(chat, query)[0] if chat.turns else None
        answers.append(chat.send(query))
        tokens, _ = chat.layout()
        start = len(tokens) - len(chat.turns[-1][1])
        logits = elsewhere.read(theirs, cache, tokens[seen:start])
        assert ours is None or (logits - ours).abs().max() < 1e-4 * ours.abs().max()
        # 2. Each token of the answer, that which ends it too.
        for token in tokens[start:]:
            elsewhere.read(theirs, cache, [token])
        seen = len(tokens)
    # 3. The whole dialogue in one call, by blocks and by f.
    tokens, segments = (torch.tensor([row]) for row in chat.layout())
    f = MASKS[mask](segments)
    ours = chat.model(tokens, f)  # (1, T, V)
    by_blocks = elsewhere.dialogue_mask(theirs, tokens, segments)
    assert torch.equal(by_blocks, dense(f)[:, None])
    logits = theirs(tokens, attention_mask=by_blocks).logits
    assert (logits - ours).abs().max() < 1e-4 * ours.abs().max()
    # 4. What goes wrong without it: another distribution of every answer's first token.
    last = (segments[0, :-1] % 2 == 1) & (segments[0, 1:] % 2 == 0)  # the last token of each query
    differ = (theirs(tokens).logits - ours)[0, :-1][last].abs().amax(1)  # (4,)
    assert len(differ) == 4 and differ.min() > 0.1 * ours.std()
    # 5. The chat as it stands there. A random model may say a special token; so silence them.
    bias = torch.zeros(theirs.config.vocab_size)
    bias[chat.tokenizer.unsayable] = -torch.inf
    theirs.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bias)
    assert list(elsewhere.chat(theirs, fast, queries, 9)) == answers
