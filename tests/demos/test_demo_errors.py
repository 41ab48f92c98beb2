"""What a user gets wrong is one line of the demo, at once: before any work, and without a picture.

{model} is a random checkpoint folder and {tmp} an empty one. Under a file there can be no folder.
"""
import importlib

import pytest
from helpers import make_folder

ERRORS = {  # of each program: some flags, and words that the line must have
    "masks --out {tmp}/x.png": {
        "--out README.md/x": "cannot write",
        "--dialogues 0": "at least 1",
        "--masks ism,yours": "'yours' is no mask",
        "--quik": "--quik",
    },
    "page --out {tmp}/page.html": {
        "--ckpt no-such.pt": "python train.py",
        "--ckpt README.md": "not a checkpoint",
        "--race no-such.json": "No such file",
        "--race README.md": "demos/race.py --json",
        "--race demos/quality.json": "demos/race.py --json",
        "--out README.md/x/page.html": "README.md",
        "--nonsense": "--nonsense",
    },
    "theory": {
        "--out README.md/x": "cannot write",
        "--quik": "--quik",
    },
    "race": {
        "--masks causal,foo": "'foo' is no mask",
        "--steps 0": "--steps",
        "--every 0": "--every",
        "--task chess": "links",
        "--place middle": "next",
        "--seed x": "invalid int",
        "--out README.md/x": "cannot write",
    },
    "quality": {
        "--rows foo": "none of",
        "--seeds 4-x": "as in 0-2",
        "--seeds 7-4": "as in 0-2",
        "--json README.md": "holds no figures",
        "--out README.md/x": "cannot write",
    },
    "compare --init_from {model} --runs {tmp}/runs --out {tmp}/x.png": {
        "--masks foo": "'foo' is no mask",
        "--rates fast": "numbers",
        "--kinds sums": "question last",
        "--kinds gsm8k": "--gsm8k FOLDER",
        "--n 39": "at least 40",
        "--json README.md": "holds no figures",
        "--full --json {tmp}/x.json --init_from no-such": "python demos/real.py",
        "--full --json {tmp}/x.json --kinds gsm8k --gsm8k no-such": "No such file",
    },
    "speed": {
        "--device tpu": "tpu",
        "--real nowhere": "nowhere",
        "--quick --out README.md/x.png": "cannot write",
    },
    "finetune": {
        "": "--init_from FOLDER",
    },
}
CASES = [(program, flags, words) for program in ERRORS for flags, words in ERRORS[program].items()]


@pytest.mark.parametrize("program, flags, words", CASES)
def test_an_error_is_one_line_at_once(program, flags, words, tmp_path, last_words, capsys):
    if "{model}" in program + flags:
        make_folder(tmp_path / "model")
    line = f"{program} {flags}".format(model=tmp_path / "model", tmp=tmp_path)
    name, *given = line.split()
    assert words in last_words(importlib.import_module(f"demos.{name}"), *given)
    # compare.py names each run before it begins.
    assert "--full" in flags or not capsys.readouterr().out
    assert not [*tmp_path.glob("x.*"), *tmp_path.glob("page.html")]
