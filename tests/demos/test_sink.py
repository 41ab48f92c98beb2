"""The demo of the attention sink: which tokens it keeps apart, and that it runs whole."""
import sys

import torch
from helpers import make_folder

from demos import sink
from demos.compare import question_last
from mask import MASKS, causal, ism
from sample import load_chat


def test_what_is_kept_apart_is_causal_and_the_rest_is_ism(tmp_path):
    tokenizer = load_chat(make_folder(tmp_path / "model"), "cpu").tokenizer
    for dialogue in question_last("test", 20, 0):
        messages = [{"role": "system", "content": "Be kind."}, *dialogue["messages"]]
        tokens, segments, apart = sink.laid_out(messages, tokenizer)
        system = tokenizer.decode(tokens[0, apart["system prompt"]].tolist())
        assert system.endswith("Be kind.<|im_end|>\n") and "user" not in system
        heads = tokenizer.decode(tokens[0, apart["headers"]].tolist())
        assert heads.count("<|im_start|>") == 9 and "Be kind" not in heads
        for name in apart:
            f = sink.bounds(name, segments, apart)
            expected = torch.where(apart[name], causal(segments), ism(segments))
            assert torch.equal(f, expected) and f[0, 0] == 1 and not torch.equal(f, ism(segments))
        assert torch.equal(sink.bounds("ism_sink", segments, apart), MASKS["ism_sink"](segments))


def test_it_runs_whole(tmp_path, capsys, monkeypatch, handlers):
    model, out = make_folder(tmp_path / "model", max_position_embeddings=512), tmp_path / "sink.png"
    flags = "--init_from", str(model), "--answers", "3", "--out", str(out)
    monkeypatch.setattr(sys, "argv", ["sink.py", *flags])
    monkeypatch.setattr(sink, "QUERIES", ["Hi"])
    sink.main()
    said = capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG")
    for words in ("| ism_sink", "ISM, headers apart", "first token", "--- ism_sink", "> Hi"):
        assert words in said
