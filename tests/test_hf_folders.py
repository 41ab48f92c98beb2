"""Checkpoints and tokenizers in the Hugging Face format, against its own two libraries."""
import base64
import importlib
import json
import random
import shutil
import struct
import time

import pytest
import torch
from folders import (
    FAMILIES,
    SIZES,
    check_equal,
    make_pretrained,
    strings,
    tokenizers,
    trained,
    transformers,
)
from helpers import change_json, read_safetensors, write_safetensors
from safetensors.torch import load_file, save_file

from data.hf import from_pretrained, load_tokenizer, read_config
from data.tokenizer import LONGEST_RUN
from model import rope_tables


def in_json(name, change):
    return lambda folder: change_json(folder / name, change)


def config(**options):
    return in_json("config.json", lambda held: held.update(options))


def index(change):
    return in_json("model.safetensors.index.json", lambda held: change(held["weight_map"]))


def tensors(change):
    def damage(folder):
        path = folder / "model.safetensors"
        held = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(held)
        save_file(held, path)

    return damage


def add(name, *shape, **options):
    return tensors(lambda held: held.update({name: torch.ones(shape, **options)}))


def header(change):
    def damage(folder):
        path = folder / "model.safetensors"
        held, numbers = read_safetensors(path)
        change(held)
        write_safetensors(path, held, numbers)

    return damage


def offsets(start, end):
    return header(lambda held: held[NORM].update(data_offsets=[start, end]))


def raw(change):
    def damage(folder):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def remove(pattern):
    return lambda folder: sorted(folder.glob(pattern))[0].unlink()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, tmp_path):
    theirs = make_pretrained(family, tmp_path)
    ours = from_pretrained(tmp_path).eval()
    check_equal(theirs, ours)
    assert ours.n_params() == theirs.num_parameters()
    assert (ours.head.weight is ours.embed.weight) == FAMILIES[family][1]["tie_word_embeddings"]
    assert all(p.requires_grad and p.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_shards_and_bfloat16(family, tmp_path):
    theirs = make_pretrained(family, tmp_path, torch.bfloat16, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    check_equal(theirs, from_pretrained(tmp_path))
    assert from_pretrained(tmp_path, dtype=torch.bfloat16).embed.weight.dtype == torch.bfloat16


def test_config_files_of_older_versions(tmp_path):
    """What they have: rope_theta and rope_scaling as keys of their own, a table of frequencies.

    And a header of odd length.
    """
    theirs = make_pretrained("llama3.2", tmp_path)
    new = read_config(tmp_path)

    def older(held):
        rope = held.pop("rope_parameters")
        held.update(rope_theta=rope.pop("rope_theta"), rope_scaling=rope)

    change_json(tmp_path / "config.json", older)
    assert read_config(tmp_path) == new and new.rope_scaling == (8.0, 1.0, 4.0, 32.0)
    path = tmp_path / "model.safetensors"
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    save_file({**load_file(path), **table}, path)
    held, numbers = read_safetensors(path)
    n = len(json.dumps(held))
    write_safetensors(path, held, numbers, pad=" " * (1 + n % 2))
    check_equal(theirs, from_pretrained(tmp_path))


def random_rope(rng):
    """The keys of a config.json that tell the rotation: older ones, newer ones, both at once."""

    def some(**options):
        return {key: rng.choice(values) for key, values in options.items() if rng.random() < 0.5}

    def rope():
        if rng.random() < 0.3:
            return rng.choice((None, {}))
        kind = rng.choice(("default", "llama3"))
        names = rng.choice((["rope_type"], ["type"], ["type", "rope_type"]))
        keys = {**dict.fromkeys(names, kind), **some(rope_theta=(500.0, 1000.0))}
        if kind == "llama3":
            keys |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            keys |= some(original_max_position_embeddings=(32, 64))
        return keys

    keys = some(rope_theta=(500.0, 1000.0), original_max_position_embeddings=(32, 64),
                partial_rotary_factor=(1.0,))
    for name in ("rope_parameters", "rope_scaling"):
        if rng.random() < 0.6:
            keys[name] = rope()
    if rng.random() < 0.1:
        keys["rope_scaling"] = keys.get("rope_parameters")
    return keys


def contradicts(keys):
    """Whether two places of a config.json say two things of the rotation."""
    both = [keys[name] for name in ("rope_parameters", "rope_scaling") if keys.get(name)]
    if len(both) == 2 and both[0] != both[1]:
        return True
    inner = both[0] if both else {}
    return any(inner[name] != keys[name] for name in inner.keys() & keys.keys())


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
def test_all_mixtures_of_keys_rotate_as_in_transformers(kind, tmp_path):
    """The rotation of each position is that of transformers, or an error says what stands twice."""
    rng, refused, name = random.Random(kind), 0, kind.lower()
    sizes = {"architectures": [f"{kind}ForCausalLM"], "model_type": name, **SIZES, "head_dim": 8}
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    for _ in range(150):
        keys = random_rope(rng)
        (tmp_path / "config.json").write_text(json.dumps({**sizes, **keys}))
        if contradicts(keys):
            with pytest.raises(ValueError, match="stands there twice"):
                read_config(tmp_path)
            refused += 1
            continue
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        rotary = getattr(module, f"{kind}RotaryEmbedding")(config)
        theirs = rotary(torch.zeros(1), torch.arange(128)[None])  # cos and sin, (1, T, D)
        ours = rope_tables(read_config(tmp_path))  # cos and signed sin, (T, 1, D)
        for a, b in zip(theirs, ours, strict=True):
            assert (a[0].abs() - b[:, 0].abs()).abs().max() < 1e-4, keys
    assert 20 < refused < 130


def test_a_theta_beside_the_parameters(tmp_path):
    theirs = make_pretrained("llama3", tmp_path)
    config(rope_parameters={"rope_type": "default"}, rope_theta=5e5)(tmp_path)
    check_equal(theirs, from_pretrained(tmp_path))


def test_a_byte_order_mark(tmp_path):
    """As some editors write it before a text."""
    (tmp_path / "words").mkdir()
    bpe = train_bpe("qwen", tmp_path / "words")
    theirs = make_pretrained("qwen2", tmp_path)
    for path in (tmp_path / "config.json", *(tmp_path / "words").iterdir()):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    check_equal(theirs, from_pretrained(tmp_path))
    expected = bpe.encode("Hello world", add_special_tokens=False).ids
    assert load_tokenizer(tmp_path / "words").encode("Hello world") == expected


def test_a_shorter_context(tmp_path):
    make_pretrained("qwen2", tmp_path)
    assert from_pretrained(tmp_path, block_size=50).config.block_size == 50
    with pytest.raises(ValueError, match="128 tokens, 200"):
        from_pretrained(tmp_path, block_size=200)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Folders of two sound checkpoints: one file, untied, and shards."""
    folder = tmp_path_factory.mktemp("sound")
    make_pretrained("llama3", folder / "one")
    make_pretrained("smollm2", folder / "tied")
    make_pretrained("llama3", folder / "shards", max_shard_size="10KB")
    return folder


UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
YARN, LINEAR = {"rope_type": "yarn", "rope_theta": 1e4}, {"type": "linear", "factor": 2.0}
JUNK = struct.pack("<Q", 4) + b"junk"
# The checkpoint, the damage to it, the message.
ERRORS = [
    ("one", remove("config.json"), "config.json cannot be read"),
    ("one", lambda folder: (folder / "config.json").write_text("{"), "config.json holds no JSON"),
    ("one", config(architectures=["MistralForCausalLM"]), "MistralForCausalLM is not known"),
    ("one", config(architectures=5), "architecture 5 is not known"),
    ("one", config(hidden_act="gelu"), "hidden_act = gelu"),
    ("one", config(attention_bias=True), "attention_bias = True"),
    ("one", config(mlp_bias=True), "mlp_bias = True"),
    ("one", config(use_sliding_window=True), "use_sliding_window = True"),
    ("one", config(layer_types=["sliding_attention"] * 2), "layer_types"),
    ("one", config(quantization_config={"bits": 4}), "quantization_config"),
    ("one", config(rope_parameters=YARN), "type yarn"),
    ("one", config(rope_parameters=None, rope_scaling=LINEAR), "type linear"),
    ("one", config(rope_parameters={"rope_type": "llama3", "factor": 2.0}),
     "low_freq_factor must be"),
    ("one", config(rope_parameters={"rope_type": "llama3", "type": "default"}),
     "rope_type stands there twice, as llama3"),
    ("one", config(rope_parameters={"full_attention": {"rope_theta": 5.0}}),
     "for each type of layer are not supported"),
    ("one", config(rope_parameters={"rope_theta": 5.0, "partial_rotary_factor": 0.5}),
     "partial_rotary_factor = 0.5"),
    ("one", config(rope_parameters=5), "rope_parameters must be an object"),
    ("one", config(hidden_size=None), "hidden_size must be a positive number, not None"),
    ("one", config(num_hidden_layers="two"), "num_hidden_layers must be"),
    ("one", config(num_key_value_heads=3), "n_kv_head"),
    ("one", remove("model.safetensors"), "neither model.safetensors nor"),
    ("one", tensors(lambda held: held.pop(UP)), f"{UP} is missing"),
    ("one", add("model.norm.bias", 32), "model.norm.bias is a tensor that"),
    ("one", config(num_hidden_layers=1), "model.layers.1.input_layernorm.weight is a tensor that"),
    ("one", add(UP, 40, 31), rf"{UP} has the shape \(40, 31\).*\(40, 32\)"),
    ("one", config(intermediate_size=48), r"mlp.gate_proj.weight has the shape \(40, 32\)"),
    ("one", add(NORM, 32, dtype=torch.int8), f"{NORM} is of dtype I8"),
    ("tied", add("lm_head.weight", 96, 32), "lm_head.weight differs"),
    ("one", raw(lambda x: x[:-4]), "is cut off: .* ends at byte"),
    ("one", raw(lambda x: x[:100]), "cut off within its header"),
    ("one", raw(lambda x: x[:4]), "model.safetensors is cut off"),
    ("one", raw(lambda x: JUNK), "header is not JSON"),
    ("one", header(lambda h: h.update({NORM: {"dtype": "F32"}})), f"entry for {NORM} is damaged"),
    ("one", offsets(-128, 0), f"entry for {NORM} is damaged"),
    ("one", offsets(0, 64), f"{NORM} has 64 bytes"),
    ("one", offsets(2**40, 2**40 + 128), f"cut off: {NORM} ends"),
    ("shards", remove("model-00002-*"), "00002-of-.* is missing"),
    ("shards", index(lambda m: m.update({"model.x": m[NORM]})),
     "model.x is missing, the index has it here"),
    ("shards", index(lambda m: m.pop(NORM)), f"{NORM} is here, but the index has it in no file"),
    ("shards", index(lambda m: m.update({NORM: "../model.safetensors"})), "weight_map must map"),
]


@pytest.mark.parametrize("source, damage, message", ERRORS)
def test_each_error_of_a_checkpoint_is_one_line(source, damage, message, sound, tmp_path):
    folder = shutil.copytree(sound / source, tmp_path / "folder")
    from_pretrained(folder)
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        from_pretrained(folder)
    assert "\n" not in str(error.value)


def train_bpe(family, folder):
    """The family's BPE, saved to the folder as tokenizer.json beside a config.json."""
    bpe = trained(family)
    bpe.save(str(folder / "tokenizer.json"))
    kind = "Qwen2" if family == "qwen" else "Llama"
    config = {**SIZES, "architectures": [f"{kind}ForCausalLM"], "vocab_size": 1600}
    (folder / "config.json").write_text(json.dumps(config))
    return bpe


def check_ids(bpe, ours, n=3000):
    texts = list(strings(n)) + ["", "a <think> b", "\U0001f3f4\U000e0067\U000e0062\U000e007f ok"]
    for text, expected in zip(texts, bpe.encode_batch(texts, add_special_tokens=False)):
        assert ours.encode(text) == expected.ids, ascii(text)
        assert ours.decode(expected.ids) == bpe.decode(expected.ids, skip_special_tokens=False)


@pytest.mark.parametrize("family", ["qwen", "smollm2", "llama3"])
def test_ids_equal_tokenizers(family, tmp_path):
    bpe = train_bpe(family, tmp_path)
    ours = load_tokenizer(tmp_path)
    check_ids(bpe, ours)
    without_a_token = set(range(bpe.get_vocab_size(), 1600))
    assert ours.vocab_size == 1600 and without_a_token <= set(ours.unsayable)
    assert bpe.token_to_id("<think>") not in ours.unsayable and ours.end not in ours.unsayable
    assert ours.openings["user"][0] in ours.unsayable
    assert ours.end not in ours.encode("<|im_end|><|eot_id|>")  # a text cannot end its own turn


def test_a_sequence_of_normalizers(tmp_path):
    bpe = train_bpe("qwen", tmp_path)
    nfc = {"type": "NFC"}
    for steps in ([nfc], [{"type": "Sequence", "normalizers": [nfc, nfc]}], []):
        normalizer = {"type": "Sequence", "normalizers": steps}
        edit(lambda held, new=normalizer: held.update(normalizer=new))(tmp_path)
        bpe = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        check_ids(bpe, load_tokenizer(tmp_path), 300)


@pytest.mark.parametrize("family", ["qwen", "smollm2", "llama3"])
@pytest.mark.parametrize("special", [True, False])
def test_an_added_token_that_is_an_ordinary_one(family, special, tmp_path):
    """As `tokenizer.pad_token = "!"` saves it. A special token's spelling is text, here as ever."""
    train_bpe(family, tmp_path)
    bpe = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for token in ("!", "in"):
        token = tokenizers.AddedToken(token, special=special, normalized=False)
        add = bpe.add_special_tokens if special else bpe.add_tokens
        add([token])
    bpe.save(str(tmp_path / "tokenizer.json"))
    bpe.encode_special_tokens = special
    ours = load_tokenizer(tmp_path)
    for text in ["a!! b! in", "begin! !", *strings(600)]:
        if special:  # tokenizers would then take <|im_end|> and <think> for text as well
            text = text.replace("<", "")
        assert ours.encode(text) == bpe.encode(text, add_special_tokens=False).ids, ascii(text)
    assert {bpe.token_to_id("!"), bpe.token_to_id("in")}.isdisjoint(ours.unsayable)


@pytest.mark.parametrize("family", ["qwen", "smollm2", "llama3"])
def test_long_runs_take_linear_time(family, tmp_path):
    """Ids are those of tokenizers up to 1,000 letters or spaces in a row; more are cut, fast."""
    bpe = train_bpe(family, tmp_path)
    ours = load_tokenizer(tmp_path)
    for run in (" ", "a", ".", "7", "\n", "\t", "\u4f60", "\U0001f600", " \n", "=-"):
        text = "x" + (run * LONGEST_RUN)[: LONGEST_RUN - 2] + "y " * 3000
        assert ours.encode(text) == bpe.encode(text, add_special_tokens=False).ids
        many = run * (1_000_000 if run == " " else 100_000)
        began = time.perf_counter()
        ids = ours.encode(many)
        assert time.perf_counter() - began < 5
        assert ours.decode(ids) == many


@pytest.mark.parametrize("family", ["qwen", "smollm2"])
def test_vocab_and_merges(family, tmp_path):
    bpe = train_bpe(family, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    bpe.model.save(str(tmp_path))
    added = {}
    for i, token in bpe.get_added_tokens_decoder().items():
        added[i] = {"content": token.content, "special": token.special}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    check_ids(bpe, load_tokenizer(tmp_path), 600)


def test_rank_file(tmp_path):
    """LLaMA 3's tokenizer.model: a line for each token, its bytes in base 64 and its rank."""
    bpe = train_bpe("llama3", tmp_path)
    by_json = load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    ranks = by_json.encoding._mergeable_ranks
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    ours = load_tokenizer(tmp_path)
    for text in strings(600):
        assert ours.encode(text) == bpe.encode(text, add_special_tokens=False).ids
    assert (ours.begin, ours.openings, ours.end) == (by_json.begin, by_json.openings, by_json.end)


CHAT = [("system", "Be kind."), ("user", "Hi, I'm Ann."), ("assistant", "Hello Ann."),
        ("user", "Who am I?"), ("assistant", "Ann.")]
CHATML = "<|im_start|>{}\n{}<|im_end|>\n"
LLAMA3 = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"


@pytest.mark.parametrize("family, begin, message", [
    ("qwen", "", CHATML), ("smollm2", "", CHATML), ("llama3", "<|begin_of_text|>", LLAMA3)])
def test_chat_formats(family, begin, message, tmp_path):
    """A dialogue is the family's template encoded as one text.

    What the model writes, to the end of the turn, is an answer.
    """
    bpe = train_bpe(family, tmp_path)
    ours = load_tokenizer(tmp_path)
    messages = [{"role": role, "content": text} for role, text in CHAT]
    tokens, segments = ours.encode_dialogue(messages)
    text = begin + "".join(message.format(role, text) for role, text in CHAT)
    assert tokens + ours.after == bpe.encode(text, add_special_tokens=False).ids
    assert sorted(segments) == segments and set(segments) == {1, 2, 3, 4}
    for segment, answer in ((2, "Hello Ann."), (4, "Ann.")):
        written = [t for t, s in zip(tokens, segments) if s == segment]
        assert ours.decode(written) == answer + ours.decode([ours.end])


def edit(change):
    return in_json("tokenizer.json", change)


def model(**options):
    return edit(lambda held: held["model"].update(options))


def added(place, **options):
    return edit(lambda held: held["added_tokens"][place].update(options))


def split(place, **options):
    return edit(lambda held: held["pre_tokenizer"]["pretokenizers"][place].update(options))


def only_sentencepiece(folder):
    (folder / "tokenizer.json").unlink()
    content = b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02\n\x0c\n\x03<s>"
    (folder / "tokenizer.model").write_bytes(content)


def template(content):
    """A folder's chat template, in tokenizer_config.json."""
    text = json.dumps({"chat_template": content})
    return lambda folder: (folder / "tokenizer_config.json").write_text(text)


NO_FORMAT = (r"lacks a special token of each known chat format: "
             r"chatml has <\|im_start\|>, <\|im_end\|>; llama3 has")
OTHER = "chat template does not write .* chatml"
LOWER = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
SENTENCEPIECE, SPLIT = "SentencePiece tokenizers are not", "is not a byte-level BPE"


def spell(token):
    """Merges that make a token out of the letters of a text."""

    def change(held):
        vocab, made = held["model"]["vocab"], token[0]
        for letter in token[1:]:
            held["model"]["merges"].append([made, letter])
            made += letter
            vocab.setdefault(made, 1580 + len(made))
        for entry in held["added_tokens"]:
            if entry["content"] == token:
                entry["id"] = vocab[token]

    return change


TOKENIZER_ERRORS = [  # the damage, the message
    (remove("tokenizer.json"), "has no tokenizer.json"),
    (only_sentencepiece, SENTENCEPIECE),
    (model(byte_fallback=True), SENTENCEPIECE),
    (model(type="Unigram"), SENTENCEPIECE),
    (edit(lambda held: held.update(normalizer={"type": "NFKC"})),
     "the normalizer NFKC is not supported, only NFC"),
    (edit(lambda held: held.update(normalizer=LOWER)), "normalizer NFC, Lowercase is not"),
    (edit(lambda held: held.update(pre_tokenizer={"type": "Whitespace"})), SPLIT),
    (edit(lambda held: held.update(pre_tokenizer=None)), SPLIT),
    (edit(lambda held: held.pop("model")), SPLIT),
    (split(1, add_prefix_space=True), SPLIT),
    (split(0, behavior="Removed"), "split in a way that is not"),
    (edit(lambda held: held["model"]["merges"].reverse()), "do not follow the order of the merges"),
    (model(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    (model(continuing_subword_prefix="#"), "subword_prefix"),
    (model(dropout=0.1), "dropout"),
    (edit(lambda held: held["added_tokens"][0].pop("id")), "of its added tokens is damaged"),
    (added(0, lstrip=True), r"the added token '<\|endoftext\|>' has lstrip"),
    (added(-1, rstrip=True), "the added token '<think>' has rstrip"),
    (added(-1, single_word=True), "the added token '<think>' has single_word"),
    (edit(lambda held: held.update(added_tokens=[])), NO_FORMAT),
    (edit(lambda held: held["added_tokens"].pop(1)), NO_FORMAT),
    (edit(spell("<|im_end|>")), NO_FORMAT),
    (template("<|im_start|>assistant<|im_sep|><|im_end|>"), OTHER),
    (template("<|im_start|>{{ messages[0].content }}</s>"), OTHER),
    (template("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"), OTHER),
    (template(5), "chat_template must be a text, not 5"),
]


@pytest.mark.parametrize("damage, message", TOKENIZER_ERRORS)
def test_each_error_of_a_tokenizer_is_one_line(damage, message, tmp_path):
    train_bpe("qwen", tmp_path)
    load_tokenizer(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
