"""
What a model does with what nobody trained it on, and no setting was chosen on.

1. Names and cities: how many answers that need one are right, word for word, in dialogues whose
   names are FINAL_NAMES and FINAL_CITIES of data/synthetic/words.py.
2. The questions in data/unseen_questions.txt, each in a chat of its own: general knowledge, code,
   other languages, typing errors and so on. How many answers end by themselves, and how many say
   that this was not taught.
3. What people say first: their name, in each wording, or a question for what they have not told.

    python demos/unseen.py [--ckpt out/ckpt.pt] [--show]
"""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import machine
from data.synthetic.families import FACTS, PATTERNS, capital, generate, typed
from data.synthetic.talk import UNKNOWN
from data.synthetic.words import FINAL_CITIES, FINAL_NAMES
from sample import load_chat

QUESTIONS = ROOT / "data" / "unseen_questions.txt"
LONGEST = 40  # tokens; an answer that is not over then has lost its way


@torch.inference_mode()
def scored(chat, dialogue):
    """Yield (answer, whether each token of it is the likeliest) for each answer of a dialogue."""
    tokens, segments = chat.tokenizer.encode_dialogue(dialogue["messages"])
    tokens, segments = tokens[: chat.size], segments[: chat.size]
    logits = chat.model(torch.tensor([tokens]), chat.mask(torch.tensor([segments])))[0]
    likeliest = [None] + logits.argmax(1).tolist()[:-1]
    for segment in range(2, max(segments) + 1, 2):
        places = [place for place, number in enumerate(segments) if number == segment]
        answer = [tokens[place] for place in places]
        if answer[-1] == chat.tokenizer.end:  # else it was cut off
            right = answer == [likeliest[place] for place in places]
            yield chat.tokenizer.decode(answer[:-1]), right


def new_names(chat, n):
    """{family: (answers that need a final name, how many of them are right)} in n dialogues."""
    counts = {}
    for dialogue in generate("final_words", n, mixed=True):
        for answer, right in scored(chat, dialogue):
            if any(word in answer for word in FINAL_NAMES + FINAL_CITIES):
                asked, known = counts.get(dialogue["family"], (0, 0))
                counts[dialogue["family"]] = asked + 1, known + int(right)
    patterns = [counts[name] for name in PATTERNS if name in counts]
    counts["the four patterns"] = tuple(map(sum, zip(*patterns)))
    return counts


def answers(chat, questions):
    """[(question, answer, whether it ended by itself)]"""
    found = []
    for question in questions:
        chat.reset()
        answer = chat.send(question)
        found.append((question, answer, chat.stats["decode tokens"] <= LONGEST))
    return found


def first_words(small):
    """{what is said first: [(query, answer)]}, as it is written or in small letters without stops.

    The names are FINAL_NAMES.
    """
    your_name, told, _ = FACTS[0]
    names = [name.lower() if small else name for name in FINAL_NAMES[:10]]
    named = [(f"{capital(way.format(name=name))}.", f"Noted. {your_name.format(name=name)}")
             for name in names for way in told]
    untold = [(question, "You have not told me.")
              for _, _, asked in FACTS for question in asked if "{" not in question]
    found = {"a name": named, "a question for what was not told": untold}
    lower = "all" if small else ""
    return {title: [(typed(None, query, lower, False, ()), answer) for query, answer in turns]
            for title, turns in found.items()}


def main():
    parser = machine.Parser("A model on names and questions new to it.")
    parser.add_argument("--ckpt", default="out/ckpt.pt", help="a checkpoint of train.py")
    parser.add_argument("--show", action="store_true", help="print each question and its answer")
    a = parser.parse_args()
    with machine.errors_in_one_line("close other programs"):
        chat = load_chat(a.ckpt, device="cpu", dtype="float32", max_new_tokens=LONGEST)
        measure(chat, a.show)


def measure(chat, show):
    """Print the figures of a model, and each answer if it shall be shown."""
    print("Answers that need a name or a city that nothing was chosen on, right")
    for family, (asked, right) in sorted(new_names(chat, 1000).items()):
        print(f"  {family:18} {right / asked:6.1%} of {asked}")
    found = answers(chat, QUESTIONS.read_text(encoding="utf-8").splitlines())
    if show:
        for question, answer, ended in found:
            print(f"> {question}\n{answer}" + ("" if ended else " ..."))
    ends = [ended for _, _, ended in found].count(True)
    told = [answer for _, answer, _ in found].count(UNKNOWN)
    ending = f"{ends} of {len(found)} answers end within {LONGEST} tokens"
    saying = f"{told} say that this was not taught"
    print(f"Questions that nobody trained it on: {ending}, {saying}")
    print("Said first of all, each in a chat of its own, answered right")
    for small in (False, True):
        for title, turns in first_words(small).items():
            found = answers(chat, [query for query, _ in turns])
            right = [said == answer for (_, said, _), (_, answer) in zip(found, turns)].count(True)
            how = ", in small letters" if small else ""
            print(f"  {title + how:52} {right / len(turns):6.1%} of {len(turns)}")


if __name__ == "__main__":
    main()
