"""
Synthetic multi-turn dialogues in plain English, endless and deterministic from a seed.

Four families follow the patterns by which MT-Eval sorts multi-turn dialogue, two more ask for reasoning:

    recollection  facts given in earlier turns, asked for later, with small talk and sums between them
    expansion     several questions around one table or story
    refinement    one list, whose instructions are added to turn by turn
    follow-up     each query builds on the last answer
    reasoning     shuffled definitions, what is missing, who is named only once
    induction     examples of an unknown rule in the query, then a case to apply it to

A family is a generator of turns (query, answer). Each answer is a function of what was said before it, so
that "exactly right" has a meaning. `python -m data.dialogues` prints some.
"""
import random
import zlib

NAMES = """Adam Alice Amir Anna Ben Boris Carl Carmen Clara Dan Dora Elena Emil Emma Eric Eva Felix Fiona Frank Grace
Greta Hanna Harry Helen Hugo Ida Igor Irene Iris Ivan Jack Jane Jonas Julia Karim Kate Lara Laura Leo Linda Lucy Marco
Maria Max Mia Mina Nadia Nina Nora Olga Omar Oscar Otto Paul Peter Rita Rosa Ruth Sam Sara Tim Tom Uma Vera""".split()
CITIES = """Athens Austin Berlin Bern Bonn Boston Cairo Cork Dallas Delhi Dover Dublin Geneva Hanoi Kyoto Lima Lisbon
London Lyon Madrid Malmo Miami Milan Moscow Munich Nice Osaka Oslo Paris Porto Prague Quito Riga Rome Seoul Tokyo
Turin Venice Vienna Warsaw""".split()
NEW_NAMES = "Agnes Bruno Cedric Dilan Eleanor Farid Gustav Imani Jasper Kamila Leon Magnus Naomi Rupert Selma Tobias".split()
NEW_CITIES = "Ankara Brisbane Calgary Dresden Florence Hamburg Jakarta Kingston Marseille Odessa Santiago Tunis".split()
ONSETS = "b br c d dr f fl g gr h j k l m n p r s st t tr v w z".split()
VOWELS = "a e i o u".split()
CODAS = ["", "", "", "l", "m", "n", "r", "s"]
JOBS = "baker banker barber builder chef clerk cook dancer dentist doctor driver farmer judge lawyer miner nurse painter pilot poet sailor singer tailor teacher writer".split()
FOODS = "apples beans bread butter cake carrots cheese corn dates eggs figs fish grapes honey jam lemons melons nuts olives onions pasta peas pizza plums rice salad soup tea toast".split()
PETS = "cat cow crab dog dove duck fox frog goat hamster hen horse mouse bear parrot pig rabbit rat sheep snake turtle wolf".split()
COLORS = "black blue brown gold gray green orange pink purple red silver white yellow".split()
THINGS = "bag ball book coat cup hat key lamp map pen phone ring spoon ticket watch".split()
ROOMS = "attic bath box car cellar desk drawer garage garden hall kitchen office tent".split()
RELATIVES = "aunt boss brother cousin daughter father friend mother neighbor sister son uncle".split()
LETTERS = "a b c d e f g h k m n p r s t u v w x y z".split()
SMALL_TALK = [
    ("Hello!", "Hello! How can I help?"), ("Hi!", "Hello! How can I help?"), ("Hi there.", "Hello! How can I help?"),
    ("Good morning.", "Good morning! How can I help?"), ("How are you?", "I am fine, thank you."),
    ("Thanks.", "You are welcome."), ("Thank you very much.", "You are welcome."),
    ("What color is the sky?", "The sky is blue."), ("What color is grass?", "Grass is green."),
    ("What color is snow?", "Snow is white."), ("How many days are in a week?", "There are 7 days in a week."),
    ("How many legs does a dog have?", "A dog has 4 legs."), ("Tell me something.", "The sun is a star."),
    ("What do bees make?", "Bees make honey."), ("Can you help me?", "Yes, I can help you."),
    ("It is raining again.", "I hope that it stops soon."), ("I am a little tired.", "I hope that you can rest soon."),
]
SYSTEM = ["You are a helpful assistant.", "Answer in short sentences.", "Be kind and exact.", "You have a good memory."]


class Words:
    """A source of words: names and cities of one split, and now and then an invented one.

    Invented words are made of two or three random syllables and hardly ever come twice, so that remembering
    words does not pay and copying them does.
    """

    def __init__(self, rng, new=False):
        self.rng, self.new = rng, new
        self.invent = not new and rng.random() < 0.15

    def invented(self, n):
        pick, made = self.rng.choice, {}
        while len(made) < n:
            made["".join(pick(ONSETS) + pick(VOWELS) + pick(CODAS) for _ in range(pick((2, 2, 3)))).capitalize()] = None
        return list(made)

    def names(self, n):
        return self.invented(n) if self.invent else self.rng.sample(NEW_NAMES if self.new else NAMES, n)

    def cities(self, n):
        return self.invented(n) if self.invent else self.rng.sample(NEW_CITIES if self.new else CITIES, n)


def listed(items):
    return ", ".join(map(str, items))


# --- recollection -------------------------------------------------------------------------------------------

def facts_about(rng, words):
    """A shuffled list of facts: (what it is about, how it is told, what the answer says, the questions)."""
    name, friend, pet_name, relative_name = words.names(4)
    city, relative_city, friend_city = words.cities(3)
    job, relative_job = rng.sample(JOBS, 2)
    food, friend_food = rng.sample(FOODS, 2)
    pet, thing, room = rng.choice(PETS), rng.choice(THINGS), rng.choice(ROOMS)
    relative, age, color = rng.choice(RELATIVES[:6] + RELATIVES[7:]), rng.randint(18, 79), rng.choice(COLORS)
    facts = [
        ("name", [f"my name is {name}", f"I am {name}", f"I am called {name}"], f"Your name is {name}.",
         ["What is my name?", "Who am I?", "Do you remember my name?"]),
        ("city", [f"I live in {city}", f"my home is in {city}", f"I come from {city}"], f"You live in {city}.",
         ["Where do I live?", "Which city do I live in?", "Do you know where I live?"]),
        ("job", [f"I work as a {job}", f"I am a {job}"], f"You work as a {job}.", ["What is my job?", "What do I work as?"]),
        ("food", [f"I like {food}", f"I love to eat {food}"], f"You like {food}.", ["What do I like?", "What do I love to eat?"]),
        ("age", [f"I am {age} years old", f"my age is {age}"], f"You are {age} years old.", ["How old am I?", "What is my age?"]),
        ("color", [f"my favorite color is {color}", f"the color I like best is {color}"],
         f"Your favorite color is {color}.", ["What is my favorite color?", "Which color do I like best?"]),
        ("pet", [f"I have a {pet} called {pet_name}", f"my {pet} is called {pet_name}"], f"Your {pet} is called {pet_name}.",
         [f"What is my {pet} called?", f"What is the name of my {pet}?", "What is my pet called?"]),
        ("thing", [f"my {thing} is in the {room}", f"I left my {thing} in the {room}"], f"Your {thing} is in the {room}.",
         [f"Where is my {thing}?", f"Where did I leave my {thing}?"]),
        ("relative", [f"my {relative} {relative_name} lives in {relative_city}"],
         f"Your {relative} {relative_name} lives in {relative_city}.",
         [f"Where does my {relative} live?", f"Where does {relative_name} live?", f"Who lives in {relative_city}?"]),
        ("work", [f"my {relative} works as a {relative_job}"], f"Your {relative} works as a {relative_job}.",
         [f"What does my {relative} work as?", f"What is the job of my {relative}?"]),
        ("friend", [f"my friend {friend} likes {friend_food}"], f"Your friend {friend} likes {friend_food}.",
         [f"What does {friend} like?", "What does my friend like?", f"Who likes {friend_food}?"]),
        ("visit", [f"I will visit {friend_city} in {age - 10} days"], f"You will visit {friend_city} in {age - 10} days.",
         ["Which city will I visit?", "Where will I go?"]),
    ]
    rng.shuffle(facts)
    return facts


def sentence(text):
    return text[0].upper() + text[1:] + "."


def recollection(rng, words):
    facts, told, turns = facts_about(rng, words), [], rng.randint(3, 8)
    sums = follow_up(rng, words, turns)
    for turn in range(turns):
        kind = rng.random()
        if turn == 0 and kind < 0.2:
            yield rng.choice(SMALL_TALK)
        elif not told or (kind < 0.2 and facts):
            new = [facts.pop() for _ in range(min(len(facts), rng.choice((1, 2) if told else (1, 2, 2, 3))))]
            parts = [rng.choice(fact[1]) for fact in new]
            text = " and ".join(parts) if rng.random() < 0.5 else ". ".join(p[0].upper() + p[1:] for p in parts)
            greeting = "" if told else rng.choice(("Hello. ", "Hello! ", "Hi! ", "Hi, ", "", "", ""))
            told += new
            text = greeting + (text if greeting.endswith(", ") else text[0].upper() + text[1:]) + "."
            yield text, "Nice to meet you." if len(new) > 2 else "Noted. " + " ".join(fact[2] for fact in new)
        elif turn < turns - 1 and kind < 0.45:
            yield rng.choice(SMALL_TALK) if rng.random() < 0.6 else next(sums)
        elif facts and kind > 0.92:
            about, _, _, questions = facts[0]
            if about not in ("relative", "work", "friend", "pet"):  # whose questions may name what was not told
                yield rng.choice(questions), "You have not told me."
        else:
            _, _, answer, questions = rng.choice(told)
            yield rng.choice(questions), answer


# --- expansion ----------------------------------------------------------------------------------------------

ATTRIBUTES = {  # how a story tells it, how one asks for it, how one asks for the person
    "age": ("is {} years old", "How old is {}?", "Who is {} years old?"),
    "city": ("lives in {}", "Where does {} live?", "Who lives in {}?"),
    "pet": ("has a {}", "Which pet does {} have?", "Who has a {}?"),
    "job": ("is a {}", "What is the job of {}?", "Who is a {}?"),
    "food": ("likes {}", "What does {} like?", "Who likes {}?"),
}


def expansion(rng, words):
    n, keys = rng.randint(2, 4), rng.sample(list(ATTRIBUTES), rng.choice((2, 2, 3)))
    people = words.names(n + 1)
    values = {"age": rng.sample(range(18, 80), n + 1), "city": words.cities(n + 1), "pet": rng.sample(PETS, n + 1),
              "job": rng.sample(JOBS, n + 1), "food": rng.sample(FOODS, n + 1)}
    story = rng.random() < 0.75

    def row(i):
        if story:
            return " ".join(f"{people[i]} {ATTRIBUTES[key][0].format(values[key][i])}." for key in keys)
        return " ".join(f"{people[i]}, {key} {values[key][i]}." for key in keys)

    start = rng.choice(("Here is a story.", "Read this.")) if story else "Here is a table."
    text = " ".join([start] + [row(i) for i in range(n)])
    for turn in range(rng.randint(3, 7)):
        i, key, kind = rng.randrange(n), rng.choice(keys), rng.random()
        telling, ask, ask_who = ATTRIBUTES[key]
        answer = f"{people[i]} {telling.format(values[key][i])}."
        if kind < 0.68:
            query = ask.format(people[i])
        elif kind < 0.78:
            query = ask_who.format(values[key][i])
        elif kind < 0.88 or turn == 0 or n == len(people):
            query = f"Tell me all about {people[i]}."
            answer = " ".join(f"{people[i]} {ATTRIBUTES[key][0].format(values[key][i])}." for key in keys)
        else:
            query, answer = f"Add this. {row(n)}", f"Added {people[n]}. There are now {n + 1} people."
            n += 1
        yield (f"{text} {query}" if turn == 0 else query), answer


# --- refinement ---------------------------------------------------------------------------------------------

def refinement(rng, words):
    numbers = rng.random() < 0.5
    pool = list(range(1, 10)) if numbers else rng.choice((FOODS, PETS, COLORS))
    items, turns = rng.sample(pool, rng.randint(3, 6)), rng.randint(3, 7)
    query = f"{rng.choice(('Take this list', 'Here is a list', 'Here are some words' if not numbers else 'Here are some numbers'))}: {listed(items)}."
    for turn in range(turns):
        ways = ["reverse", "swap"] + ["add"] * (len(items) < 7) + ["sort", "sort"] * numbers + ["first", "last", "drop", "remove"] * (len(items) > 2)
        way = rng.choice(ways)
        if way == "reverse":
            items, ask = items[::-1], rng.choice(("Now in reverse.", "Turn it around."))
        elif way == "swap":
            items, ask = [items[-1]] + items[1:-1] + [items[0]], "Swap the first and the last."
        elif way == "sort":
            down = rng.random() < 0.4
            items, ask = sorted(items, reverse=down), "Sort them, the largest first." if down else rng.choice(("Sort them.", "Sort them, the smallest first."))
        elif way == "add":
            new = rng.choice([item for item in pool if item not in items])
            items, ask = (items + [new], f"Add {new} at the end.") if rng.random() < 0.6 else ([new] + items, f"Put {new} in front.")
        elif way == "first":
            items, ask = items[:2], "Only the first two."
        elif way == "last":
            items, ask = items[-2:], "Only the last two."
        elif way == "drop":
            items, ask = (items[1:], "Without the first one.") if rng.random() < 0.5 else (items[:-1], "Without the last one.")
        else:
            gone = rng.choice(items)
            items, ask = [item for item in items if item != gone], f"Remove {gone}."
        yield (f"{query} {ask}" if turn == 0 else ask), f"Here it is: {listed(items)}."


# --- follow-up ----------------------------------------------------------------------------------------------

def follow_up(rng, words, turns=None):
    value = rng.randint(2, 40)
    start = rng.choice((f"Start with {value}.", f"Take the number {value}.", f"I have {value} coins."))
    for turn in range(turns or rng.randint(3, 8)):
        ways = ["odd", "more"] + ["add"] * 2 * (value < 90) + ["subtract"] * (1 + (value > 89)) * (value > 10) + ["double"] * (value < 50) + ["halve"] * (value % 2 == 0)
        way, n = rng.choice(ways), rng.randint(1, 9)
        if way == "add":
            ask, answer, value = rng.choice((f"Add {n}.", f"Now add {n}.", f"And {n} more?")), f"{value} plus {n} is {value + n}.", value + n
        elif way == "subtract":
            ask, answer, value = rng.choice((f"Subtract {n}.", f"Take away {n}.")), f"{value} minus {n} is {value - n}.", value - n
        elif way == "double":
            ask, answer, value = rng.choice(("Double it.", "Now double that.")), f"{value} times 2 is {2 * value}.", 2 * value
        elif way == "halve":
            ask, answer, value = rng.choice(("Halve it.", "What is half of it?")), f"Half of {value} is {value // 2}.", value // 2
        elif way == "odd":
            ask, answer = "Is it odd or even?", f"{value} is {'odd' if value % 2 else 'even'}."
        else:
            n = rng.randint(5, 95)
            ask, answer = f"Is it more than {n}?", f"{'Yes' if value > n else 'No'}, {value} is {'' if value > n else 'not '}more than {n}."
        yield (f"{start} {ask}" if turn == 0 else ask), answer


# --- reasoning ----------------------------------------------------------------------------------------------

def definitions(rng, steps):
    """Shuffled definitions that take `steps` additions to resolve, the question last."""
    letters = rng.sample(LETTERS, steps + 1)
    value = rng.randint(1, 9)
    told = [f"{letters[0]} = {value}."]
    for before, letter in zip(letters, letters[1:]):
        n = rng.randint(1, 9)
        told.append(f"{letter} = {before} + {n}.")
        value += n
    rng.shuffle(told)
    return f"{' '.join(told)} What is {letters[-1]}?", f"{letters[-1]} is {value}."


def missing(rng, words):
    items = rng.sample(rng.choice((FOODS, PETS, COLORS)), rng.randint(3, 5))
    gone = rng.choice(items)
    rest = rng.sample([item for item in items if item != gone], len(items) - 1)
    return f"First list: {listed(items)}. Second list: {listed(rest)}. What is missing?", f"The second list has no {gone}."


def named_once(rng, words):
    once, *others = words.names(rng.randint(2, 4))
    named = [once] + others * 2
    rng.shuffle(named)
    return f"{listed(named)}. Who is named only once?", f"{once} is named only once."


def reasoning(rng, words):
    for _ in range(rng.randint(2, 5)):
        kind = rng.choice((definitions, missing, named_once))
        yield kind(rng, rng.randint(1, 3)) if kind is definitions else kind(rng, words)


# --- induction ----------------------------------------------------------------------------------------------

def induction(rng, words):
    for _ in range(rng.randint(2, 4)):
        k = rng.randint(1, 9)
        rule, numeric = rng.choice([
            (lambda x: x + k, True), (lambda x: x - k, True), (lambda x: 2 * x, True),
            (lambda x: (x[1], x[0]), False), (lambda x: (x[0],), False), (lambda x: (x[1],), False),
            (lambda x: (x[0], x[0]), False), (lambda x: (x[0], x[1], x[0]), False)])
        n = rng.randint(2, 4) + 1
        pool = rng.choice((FOODS, PETS, COLORS))
        cases = rng.sample(range(10, 60), n) if numeric else [rng.sample(pool, 2) for _ in range(n)]
        shown = [str(case) if numeric else " ".join(case) for case in cases]
        results = [str(rule(case)) if numeric else " ".join(rule(case)) for case in cases]
        examples = " ".join(f"{x} gives {y}." for x, y in zip(shown[:-1], results))
        yield f"{examples} What does {shown[-1]} give?", f"{shown[-1]} gives {results[-1]}."


FAMILIES = {"recollection": recollection, "expansion": expansion, "refinement": refinement,
            "follow-up": follow_up, "reasoning": reasoning, "induction": induction}
PATTERNS = ("recollection", "expansion", "refinement", "follow-up")  # MT-Eval's
SHARES = {"recollection": 3, "expansion": 5, "refinement": 4, "follow-up": 3, "reasoning": 1, "induction": 1}


def split_of(messages):
    """The split that a dialogue belongs to, from its text alone: no dialogue is ever in two splits."""
    digest = zlib.crc32("\n".join(message["content"] for message in messages).encode()) % 32
    return {0: "val", 1: "test"}.get(digest, "train")


def one_family(rng, split, families):
    """A dialogue of one family that belongs to the split: (messages, family)."""
    while True:
        family, = rng.choices(families, [SHARES[name] for name in families])
        messages = [{"role": "system", "content": rng.choice(SYSTEM)}] if rng.random() < 0.1 else []
        casual = family in PATTERNS and rng.random() < 0.2  # as people type: no capital, no full stop
        for query, answer in FAMILIES[family](rng, Words(rng, new=split == "new_words")):
            query = query[0].lower() + query[1:].rstrip(".?!") if casual else query
            messages += [{"role": "user", "content": query}, {"role": "assistant", "content": answer}]
        if split == "new_words" or split_of(messages) == split:
            return messages, family


def generate(split, n, seed=0, families=tuple(FAMILIES), mixed=False):
    """Yield n dialogues {"messages": [...], "family": str} of a split: train, val, test or new_words.

    The dialogues of new_words use names and cities that occur in no other split. mixed: after one to three turns
    three of ten dialogues go on with one of another family, as people change the subject. Deterministic from the seed.
    """
    rng = random.Random(f"{split} {seed}")
    for _ in range(n):
        messages, family = one_family(rng, split, families)
        if mixed and rng.random() < 0.3:
            more, _ = one_family(rng, split, [other for other in families if other != family])
            start = (messages[0]["role"] == "system") + 2 * rng.randint(1, 3)
            messages, family = messages[:start] + [m for m in more if m["role"] != "system"], "mixed"
        yield {"messages": messages, "family": family}


if __name__ == "__main__":
    for dialogue in generate("train", 12, seed=random.randrange(10**6), mixed=True):
        print(f"--- {dialogue['family']}")
        for message in dialogue["messages"]:
            print(f"{message['role']:>9}: {message['content']}")
