"""
How many answers are exactly right, as a whole: by family of dialogues, by turn. A run's tables.
"""
import numpy as np

from data.synthetic import PATTERNS
from data.synthetic.families import reasoning_kind
from data.synthetic.words import NEW_CITIES, NEW_NAMES


def summary(split, answers):
    """Answers (N, 3) as `evaluate` gives them -> ({family: ...}, {turn: ...}), fractions right."""
    dialogue, segment, right = answers.T
    family = np.asarray(split.families)[dialogue]
    groups = {name: family == i for i, name in enumerate(split.family_names)}
    patterns = [groups[name] for name in PATTERNS if name in groups]
    if patterns:
        groups["the four patterns"] = np.any(patterns, 0)
    last = np.asarray(split.segments)[split.offsets[1:] - 1][dialogue]
    turns = {
        "first": segment == 2,
        "middle": (segment > 2) & (segment < last),
        "last": (segment > 2) & (segment >= last),
    }
    return fractions(right, groups), fractions(right, turns)


def by_kind(split, answers, tokenizer):
    """{kind of reasoning: fraction right} of answers (N, 3), by what their query asks."""
    families = np.array(split.family_names)[np.asarray(split.families)[answers[:, 0]]]
    answers = answers[families == "reasoning"]
    kinds = np.array([reasoning_kind(segment_text(split, tokenizer, dialogue, segment - 1))
                      for dialogue, segment, _ in answers])
    return fractions(answers[:, 2], {kind: kinds == kind for kind in np.unique(kinds)})


def fractions(right, groups):
    """{name: how many of its answers are right}; groups: {name: which answers are its own}."""
    return {name: float(right[at].mean()) for name, at in groups.items() if at.any()}


def segment_text(split, tokenizer, dialogue, segment):
    """The text of one segment of a dialogue."""
    start, end = split.offsets[dialogue : dialogue + 2]
    tokens = split.tokens[start:end][split.segments[start:end] == segment]
    return tokenizer.decode(tokens.tolist())


def needs_new_word(split, answers, tokenizer):
    """Which answers (N, 3) contain a word that is in no training dialogue: booleans (N,)."""
    needed = []
    for dialogue, segment, _ in answers:
        text = segment_text(split, tokenizer, dialogue, segment)
        needed.append(any(word in text for word in NEW_NAMES + NEW_CITIES))
    return np.array(needed, dtype=bool)


TABLES = {  # titles of the tables of a run, and where its metrics have them
    "by family": "accuracy",
    "by turn": "accuracy_by_turn",
    "by kind of reasoning": "accuracy_by_kind",
    "that need a word never trained on": "accuracy_new_words",
}


def report(metrics):
    """Print the tables of a run's metrics."""
    how = f"loss {metrics['loss']:.4f}, {metrics['seconds']:.0f} s"
    of = metrics["reported_on"].capitalize()
    print(f"\n{of} answers that are exactly right, whole      {how}")
    for title, key in TABLES.items():
        if metrics.get(key):  # none of some families' answers may need a new word
            print(f"  {title}")
            for name, value in metrics[key].items():
                print(f"    {name:22} {value:6.1%}")
