"""
Synthetic dialogues, made from a seed.

    families.py   what each family of dialogues says, and FAMILIES, where a new one gets its line
    talk.py       what people say first, and what nobody taught the model
    words.py      names, cities and other words to draw from

`python -m data.synthetic` prints some of them.
"""
from data.synthetic.families import FAMILIES, PATTERNS, SPLITS, deal, generate

__all__ = ["FAMILIES", "PATTERNS", "SPLITS", "deal", "generate"]
