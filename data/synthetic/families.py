"""
Synthetic multi-turn dialogues in plain English, endless and deterministic from a seed.

Four families follow the patterns by which MT-Eval sorts multi-turn dialogue, two more ask for
reasoning, and one is what people say to a model that they do not know:

    recollection  the user tells facts and asks for them later, with small talk and sums between
    expansion     several questions around one table or story
    refinement    one list, whose instructions are added to turn by turn
    follow-up     each query builds on the last answer
    reasoning     shuffled definitions, what is missing from a list
    induction     examples of an unknown rule in the query, then a case to apply it to
    small talk    greetings, questions about the model, and questions that nobody taught it

A family is a function that yields turns (query, answer). Each answer is a function of the turns
before it, so that "exactly right" has a meaning. FAMILIES, below them, says how to add one of your
own. `python -m data.synthetic` prints some dialogues, with `--jsonl FILE --n 1000` it writes them.
"""
import zlib

from data.synthetic import talk
from data.synthetic.words import (
    COLORS,
    FOODS,
    GENERAL,
    JOBS,
    LETTERS,
    PAIRS,
    PETS,
    RELATIVES,
    ROOMS,
    THINGS,
    TYPED_WRONG,
    Random,
    Words,
    invented,
    mistyped,
)


def listed(items):
    return ", ".join(map(str, items))


def capital(text):
    return text[0].upper() + text[1:]


# --- recollection -------------------------------------------------------------------------------

# A fact: what the answer says, how the user may tell it, how he may ask for it.
FACTS = [
    ("Your name is {name}.",
     "my name is {name}|I am {name}|I'm {name}|I am called {name}|call me {name}|this is {name}|"
     "my name's {name}|{name} is my name|you can call me {name}|people call me {name}",
     "What is my name?|Who am I?|Do you remember my name?|What's my name?|What am I called?|"
     "Tell me my name.|Do you know my name?|Do you know who I am?|Say my name.|And my name?"),
    ("You live in {city}.",
     "I live in {city}|my home is in {city}|I come from {city}|I am from {city}|I'm from {city}|"
     "{city} is my home|I was born in {city}|I moved to {city}",
     "Where do I live?|Which city do I live in?|Do you know where I live?|Where am I from?|"
     "Where is my home?|What city do I live in?|Where do I come from?|In which city do I live?|"
     "Where do I live now?"),
    ("You work as a {job}.",
     "I work as a {job}|I am a {job}|I'm a {job}|my job is {job}",
     "What is my job?|What do I work as?|What do I do for a living?|What's my job?|"
     "Do you know my job?"),
    ("You like {food}.",
     "I like {food}|I love to eat {food}|I love {food}|my favorite food is {food}",
     "What do I like?|What do I love to eat?|What is my favorite food?|What do I like to eat?"),
    ("You are {age} years old.",
     "I am {age} years old|my age is {age}|I'm {age} years old|I am {age}",
     "How old am I?|What is my age?|Do you know my age?|Tell me my age.|What's my age?"),
    ("Your favorite color is {color}.",
     "my favorite color is {color}|the color I like best is {color}|{color} is my favorite color",
     "What is my favorite color?|Which color do I like best?|What color do I like?"),
    ("Your {pet} is called {pet_name}.",
     "I have a {pet} called {pet_name}|my {pet} is called {pet_name}|"
     "my {pet}'s name is {pet_name}|I have a {pet} named {pet_name}",
     "What is my {pet} called?|What is the name of my {pet}?|What is my pet called?|"
     "What's the name of my {pet}?|What is my {pet}'s name?|Do you know my {pet}'s name?|"
     "What pet do I have?|Which pet do I have?|Do I have a pet?|Do I have a {pet}?"),
    ("Your {thing} is in the {room}.",
     "my {thing} is in the {room}|I left my {thing} in the {room}|I put my {thing} in the {room}",
     "Where is my {thing}?|Where did I leave my {thing}?|Where did I put my {thing}?|"
     "Where's my {thing}?"),
    ("Your {pair} are in the {pair_room}.",
     "my {pair} are in the {pair_room}|I left my {pair} in the {pair_room}",
     "Where are my {pair}?|Where did I leave my {pair}?"),
    ("Your {owned} is {owned_color}.",
     "my {owned} is {owned_color}|the color of my {owned} is {owned_color}",
     "What color is my {owned}?|Which color is my {owned}?|What is the color of my {owned}?"),
    ("Your {relative} {relative_name} lives in {relative_city}.",
     "my {relative} {relative_name} lives in {relative_city}",
     "Where does my {relative} live?|Where does {relative_name} live?|"
     "Who lives in {relative_city}?"),
    ("Your {relative} works as a {relative_job}.",
     "my {relative} works as a {relative_job}|my {relative} is a {relative_job}",
     "What does my {relative} work as?|What is the job of my {relative}?|"
     "What is my {relative}'s job?"),
    ("Your {other} is called {other_name}.",
     "my {other} is called {other_name}|my {other}'s name is {other_name}|"
     "{other_name} is my {other}|the name of my {other} is {other_name}",
     "What is my {other} called?|What is the name of my {other}?|What is my {other}'s name?|"
     "Who is {other_name}?|Do you know my {other}'s name?"),
    ("Your friend {friend} likes {friend_food}.",
     "my friend {friend} likes {friend_food}",
     "What does {friend} like?|What does my friend like?|Who likes {friend_food}?"),
    ("You will visit {next_city} in {days} days.",
     "I will visit {next_city} in {days} days|I will go to {next_city} in {days} days",
     "Which city will I visit?|Where will I go?|When will I go to {next_city}?"),
    ("Your favorite {kind} is {best}.",
     "my favorite {kind} is {best}|the {kind} I like best is {best}|{best} is my favorite {kind}",
     "What is my favorite {kind}?|Which {kind} do I like best?|What's my favorite {kind}?|"
     "Do you know my favorite {kind}?"),
    ("Your {numbered} is {number}.",
     "my {numbered} is {number}|{number} is my {numbered}",
     "What is my {numbered}?|What's my {numbered}?|Tell me my {numbered}.|"
     "Do you know my {numbered}?"),
]
FACTS = [(answer, told.split("|"), asked.split("|")) for answer, told, asked in FACTS]
KINDS = "animal band book car city drink film game movie place singer song sport team word".split()
NUMBERED = ["favorite number", "lucky number", "phone number", "house number", "code", "PIN"]
NOT_TOLD = "You have not told me."
NEVER_TOLD = talk.split_up("""When is my birthday?|What is my last name?|How tall am I?
What is my shoe size?|Which car do I drive?|Where was my father born?|What did I eat yesterday?
How many children do I have?|Which school did I go to?|What is my address?|Am I married?
What is my hobby?|What did I say yesterday?|How much do I weigh?|What am I thinking?
What is my email?|Do I have a brother?""")


def values(rng, words):
    """What fills the blanks in FACTS: {blank: word}."""
    name, pet_name, relative_name, other_name, friend, best = words.names(6)
    city, relative_city, next_city = words.cities(3)
    job, relative_job = rng.sample(JOBS, 2)
    food, friend_food = rng.sample(FOODS, 2)
    room, pair_room = rng.sample(ROOMS, 2)
    thing, owned = rng.sample(THINGS, 2)
    color, owned_color = rng.sample(COLORS, 2)
    relative, other = rng.sample(RELATIVES, 2)
    return dict(name=name, pet_name=pet_name, relative_name=relative_name, other_name=other_name,
                friend=friend, best=best, city=city, relative_city=relative_city,
                next_city=next_city, job=job, relative_job=relative_job, food=food,
                friend_food=friend_food, relative=relative, other=other, pet=rng.choice(PETS),
                thing=thing, room=room, pair=rng.choice(PAIRS), pair_room=pair_room, owned=owned,
                color=color, owned_color=owned_color, kind=rng.choice(KINDS),
                numbered=rng.choice(NUMBERED), number=talk.number(rng), age=rng.randint(10, 90),
                days=rng.randint(2, 60))


def tell_facts(rng, facts, blanks, first):
    """A turn in which the user tells facts: (query, answer)."""
    parts = [rng.choice(told).format(**blanks) for _, told, _ in facts]
    if facts[:2] == FACTS[:2] and rng.random() < 0.8:
        both = rng.choice(("I am {name} from {city}", "I'm {name} from {city}"))
        parts[:2] = [both.format(**blanks)]
    if rng.random() < 0.5:
        *others, last = parts
        text = f"{listed(others)} and {last}" if others else last
    else:
        text = ". ".join(map(capital, parts))
    greeting = rng.choice(("Hello. ", "Hello! ", "Hi! ", "Hi, ", "", "", "")) if first else ""
    text = greeting + (text if greeting.endswith(", ") else capital(text)) + "."
    if len(facts) > 2:
        return text, "Nice to meet you."
    return text, " ".join(["Noted."] + [answer.format(**blanks) for answer, _, _ in facts])


def simple(facts):
    """Those that say one thing."""
    return [fact for fact in facts if fact[0].count("{") == 1]


def tell_anew(rng, words, fact, blanks, just_told):
    """A turn in which the user corrects a fact, or it has changed: (query, answer).

    The new value goes into blanks, so that later questions are answered by it.
    """
    answer, told, _ = fact
    blank = answer[answer.index("{") + 1 : answer.index("}")]
    blanks[blank] = values(rng, words)[blank]
    if just_told and rng.random() < 0.6:
        text = rng.choice(("No, it is {}.", "No, {}.", "I mean {}.")).format(blanks[blank])
    else:
        text = rng.choice(told).format(**blanks)
        text = rng.choice(("No, {}.", "Actually, {}.", "Now {}.", "{} now.", "{}.")).format(text)
    return capital(text), f"Noted. {answer.format(**blanks)}"


def recollection(rng, words):
    blanks = values(rng, words)
    untold, told = rng.sample(FACTS, len(FACTS)), []
    if rng.random() < 0.3:
        # Who tells or asks one thing mostly begins with the name, and often goes on with the city.
        start = FACTS[:2] if rng.random() < 0.4 else FACTS[:1]
        untold = start + [fact for fact in untold if fact not in start]
    n_turns, just_told = rng.randint(3, 8), []
    for turn in range(n_turns):
        kind = rng.random()
        # The fact of the last turn, if it told one alone: "No, it is Ann." corrects that.
        correctable, just_told = just_told, []
        if turn == 0 and kind < 0.2:
            yield talk.known(rng)
        elif untold and kind > 0.82:
            questions = NEVER_TOLD if rng.random() < 0.3 else untold[0][2]
            yield rng.choice(questions).format(**blanks), NOT_TOLD
        elif not told or (kind < 0.2 and untold):
            n = min(len(untold), rng.choice((1, 2) if told else (1, 1, 2, 3)))
            yield tell_facts(rng, untold[:n], blanks, first=not told)
            just_told = simple(untold[:n]) if n == 1 else []
            told, untold = told + untold[:n], untold[n:]
        elif kind < (0.4 if correctable else 0.25) and simple(told):
            # The fact stands in `told` once more, so the user asks for it twice as often.
            fact = rng.choice(correctable or simple(told))
            yield tell_anew(rng, words, fact, blanks, just_told=bool(correctable))
            told.append(fact)
        elif turn < n_turns - 1 and kind < 0.45:
            yield talk.known(rng) if rng.random() < 0.6 else new_sum(rng)[:2]
        else:
            answer, _, questions = rng.choice(told)
            yield rng.choice(questions).format(**blanks), answer.format(**blanks)


# --- expansion ----------------------------------------------------------------------------------

# How a story tells it, how one asks for it, how one asks for the person.
ATTRIBUTES = {
    "age": ("is {} years old", ["How old is {}?", "What is the age of {}?"],
            ["Who is {} years old?"]),
    "city": ("lives in {}", ["Where does {} live?", "Which city does {} live in?"],
             ["Who lives in {}?"]),
    "pet": ("has a {}",
            ["Which pet does {} have?", "What pet does {} have?", "What does {} have?"],
            ["Who has a {}?"]),
    "job": ("is a {}", ["What is the job of {}?", "What does {} work as?"], ["Who is a {}?"]),
    "food": ("likes {}", ["What does {} like?", "What does {} like to eat?"], ["Who likes {}?"]),
}
# What each is drawn from, but for cities, which the split has.
POOLS = {"age": range(18, 80), "pet": PETS, "job": JOBS, "food": FOODS}
ASK_ALL = ("Tell me all about {}.", "Tell me all about {}.", "Tell me about {}.",
           "What do you know about {}?", "Who is {}?")


def told_of(person, facts):
    """A sentence for each thing that is known of a person."""
    return " ".join(f"{person} {ATTRIBUTES[key][0].format(facts[key])}." for key in facts)


def row(person, facts, story):
    """All that a story or a table says about a person."""
    if story:
        return told_of(person, facts)
    return f"{person}: {', '.join(f'{key} {facts[key]}' for key in facts)}."


def expansion(rng, words):
    n = rng.choice((1, 2, 2, 2, 3, 3, 3, 4, 4, 4))
    keys = rng.sample(list(ATTRIBUTES), rng.choice((1, 2, 2, 3)))
    people = words.names(n + 1)
    columns = {
        key: rng.sample(POOLS[key], n + 1) if key in POOLS else words.cities(n + 1) for key in keys
    }
    facts = [{key: columns[key][i] for key in keys} for i in range(n + 1)]
    story = rng.random() < 0.75
    starts = ("Here is a story. ", "Read this. ", "") if story else ("Here is a table. ",)
    text = rng.choice(starts) + " ".join(row(people[i], facts[i], story) for i in range(n))
    # It may stand alone, to be asked about later.
    if rng.random() < 0.2:
        yield text, "Noted."
        text = ""
    asked = None  # the person and the thing that the last turn asked for
    for turn in range(rng.randint(3, 6)):
        i, key, kind = rng.randrange(n), rng.choice(keys), rng.random()
        again = asked and asked[0] != i and rng.random() < 0.25
        if again:
            key = asked[1]
        telling, ask, ask_who = ATTRIBUTES[key]
        said, asked = telling.format(facts[i][key]), None
        answer = f"{people[i]} {said}."
        if again:
            # A short question for the same as the one before it.
            kind, ask = 1, ("And {}?", "What about {}?")
        if kind < 0.2:
            # The person comes last in the answer: one looks for a name from what is known of it.
            query = rng.choice(ask_who).format(facts[i][key])
            answer = f"The one who {said} is {people[i]}."
        elif kind < 0.35:
            # In one order, whatever the story's is: the model need not find its place in it.
            known = {key: facts[i][key] for key in ATTRIBUTES if key in facts[i]}
            query = rng.choice(ASK_ALL).format(people[i])
            answer = told_of(people[i], known)
        elif kind < 0.45 and turn > 0 and n < len(people):
            more = row(people[n], facts[n], story)
            query, answer = rng.choice(("Add this. ", "")) + more, "Noted."
            n += 1
        elif kind < 0.5:
            # The story tells nothing of this person, or not this thing.
            person, untold = people[i], [key for key in ATTRIBUTES if key not in keys]
            if n < len(people) and rng.random() < 0.5:
                person, untold = people[n], keys
            _, ask, _ = ATTRIBUTES[rng.choice(untold)]
            query, answer = rng.choice(ask).format(person), NOT_TOLD
        else:
            query, asked = rng.choice(ask).format(people[i]), (i, key)
        yield f"{text} {query}".strip(), answer
        text = ""


# --- refinement ---------------------------------------------------------------------------------

SORT = "Sort them.", "Sort them, the smallest first.", "Sort the list.", "Sort it.", "Sort."
NO_NUMBERS = "I can only sort numbers."
HEADINGS = "shopping groceries todo to-do packing wishes guests tasks errands items words".split()


def edits(items, numbers):
    """What can be done to a list, the usual things more than once."""
    ways = ["reverse", "swap"]
    if len(items) < 7:
        ways.append("add")
    if numbers:
        ways += ["sort", "sort"]
    if len(items) > 2:
        ways += ["first", "last", "drop", "remove", "remove"]
    return ways


def edit(rng, way, items, pool):
    """A list changed in one way: (how one asks for it, the new list)."""
    if way == "reverse":
        ask = rng.choice(("Now in reverse.", "Turn it around.", "Reverse it.", "Reverse the list.",
                          "Reverse."))
        return ask, items[::-1]
    if way == "swap":
        if rng.random() < 0.5:
            return "Swap the first two.", [items[1], items[0]] + items[2:]
        return "Swap the first and the last.", [items[-1]] + items[1:-1] + [items[0]]
    if way == "sort":
        if rng.random() < 0.4:
            ask = rng.choice(("Sort them, the largest first.", "The largest first.",
                              "Largest first."))
            return ask, sorted(items, reverse=True)
        return rng.choice(SORT), sorted(items)
    if way == "add":
        new = rng.choice([item for item in pool if item not in items])
        if rng.random() < 0.6:
            ask = rng.choice((f"Add {new} at the end.", f"Add {new}.", f"Add {new}.",
                              f"Add {new} to the list.", f"Put {new} on the list."))
            return ask, items + [new]
        return rng.choice((f"Put {new} in front.", f"Put {new} first.")), [new] + items
    if way == "first":
        return "Only the first two.", items[:2]
    if way == "last":
        return "Only the last two.", items[-2:]
    if way == "drop":
        if rng.random() < 0.5:
            return "Without the first one.", items[1:]
        return "Without the last one.", items[:-1]
    gone = rng.choice(items)
    ask = rng.choice((f"Remove {gone}.", f"Remove {gone}.", f"Remove {gone} from the list.",
                      f"Delete {gone}.", f"Take {gone} off the list."))
    left = [item for item in items if item != gone]
    if len(left) == 1:  # the same word was drawn twice: it goes once, since lists keep two items
        left = [item for i, item in enumerate(items) if i != items.index(gone)]
    return ask, left


def shown(items):
    """The answer that shows a list."""
    return f"Here it is: {listed(items)}."


def question_of(rng, items, numbers):
    """A question about a list: (query, answer)."""
    kind = rng.randrange(4 if numbers else 5)
    if kind == 0:
        ask = rng.choice(("How many are there?", "How long is the list?", "How many items?",
                          "How many are on the list?"))
        return ask, f"There are {len(items)}."
    if kind < 3:
        place, item = rng.choice((("first", items[0]), ("second", items[1]), ("last", items[-1])))
        ask = rng.choice((f"What is the {place} one?", f"What comes {place}?"))
        return ask, f"It is {item}."
    if kind == 4:
        return rng.choice((*SORT, "Sort them alphabetically.")), NO_NUMBERS
    ask = rng.choice(("Show the list.", "Show me the list.", "What is on the list?",
                      "What is on my list?", "What is in the list?", "Show it."))
    return ask, shown(items)


def refinement(rng, words):
    numbers = rng.random() < 0.5
    pool = list(range(1, 10)) if numbers else rng.choice((FOODS, PETS, COLORS, LETTERS, None))
    if pool is None:
        # Any words at all, so that what is on a list has to be copied.
        pool = rng.sample(GENERAL, 6) + [invented(rng).lower() for _ in range(6)]
    items = rng.sample(pool, rng.randint(3, 6))
    some = "Here are some numbers" if numbers else "Here are some words"
    heading = capital(rng.choice(rng.choice((HEADINGS, GENERAL))))
    start = rng.choice(("Take this list", "Here is a list", "List", "Make a list", some, heading,
                        heading, f"{heading} list"))
    start = f"{start}: {listed(items)}."
    kind = rng.random()
    if kind < 0.2:
        yield start, shown(items)
        start = ""
    elif kind < 0.35:
        # All in one: "Sort 3, 1, 2."
        what, sort = listed(items), rng.random() < 0.5
        if sort and not numbers:
            yield f"Sort {what}.", NO_NUMBERS
        else:
            items = sorted(items) if sort else items[::-1]
            yield f"{'Sort' if sort else 'Reverse'} {what}.", shown(items)
        start = ""
    for _ in range(rng.randint(3, 7)):
        if rng.random() < 0.15:
            ask, answer = question_of(rng, items, numbers)
        else:
            ask, items = edit(rng, rng.choice(edits(items, numbers)), items, pool)
            answer = shown(items)
        ask, start = f"{start} {ask}".strip(), ""
        yield ask, answer


# --- follow-up ----------------------------------------------------------------------------------

def sums(value):
    """What can be asked about a number, the usual things more than once."""
    ways = ["odd", "more", "times", "new", "new"]
    if value < 90:
        ways += ["add", "add"]
    if value > 10:
        ways.append("subtract")
    if value > 89:
        ways.append("subtract")
    if value < 50:
        ways.append("double")
    if value % 2 == 0:
        ways.append("halve")
    return ways


def reckon(rng, way, value):
    """One step from a number: (how one asks for it, the answer, the new number)."""
    n = rng.randint(1, 10)
    if way == "add":
        ask = rng.choice((f"Add {n}.", f"Now add {n}.", f"And {n} more?", f"Plus {n}.",
                          f"Add {n} to it."))
        return ask, f"{value} plus {n} is {value + n}.", value + n
    if way == "subtract":
        ask = rng.choice((f"Subtract {n}.", f"Take away {n}.", f"Minus {n}."))
        return ask, f"{value} minus {n} is {value - n}.", value - n
    if way == "double":
        ask = rng.choice(("Double it.", "Double it.", "Now double that.", "Times 2."))
        return ask, f"{value} times 2 is {2 * value}.", 2 * value
    if way == "times":
        ask = rng.choice((f"Times {n}.", f"Multiply it by {n}."))
        if value > 9 and n > 2:  # such products are not taught
            return ask, talk.UNKNOWN, value
        return ask, f"{value} times {n} is {value * n}.", value * n
    if way == "halve":
        ask = rng.choice(("Halve it.", "What is half of it?", "Half of that.", "Divide it by 2.",
                          "Divide by 2."))
        return ask, f"Half of {value} is {value // 2}.", value // 2
    if way == "odd":
        ask = rng.choice(("Is it odd or even?", "Is it odd?", "Is it even?"))
        return ask, f"{value} is {'odd' if value % 2 else 'even'}.", value
    n = rng.randint(5, 95)
    if value > n:
        return f"Is it more than {n}?", f"Yes, {value} is more than {n}.", value
    return f"Is it more than {n}?", f"No, {value} is not more than {n}.", value


def new_sum(rng):
    """What does not build on the last answer: (how one asks for it, the answer, the new number)."""
    kind = rng.random()
    if kind < 0.2:
        # "Double 21." in place of "Double it."
        value, ask = rng.randint(2, 49), ""
        ways = [way for way in sums(value) if way != "new"]
        while " it" not in ask:
            ask, answer, result = reckon(rng, rng.choice(ways), value)
        return ask.replace(" it", f" {value}"), answer, result
    if kind < 0.4:
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        sign, word, result = rng.choice("*x"), "times", a * b
        if rng.random() < 0.3:
            # The same product backwards.
            sign, word = "/", "divided by"
            a, result = result, a
    else:
        a, b = rng.randint(1, rng.choice((20, 60, 200))), rng.randint(1, 9)
        sign, word, result = "+", "plus", a + b
        if a > b and rng.random() < 0.3:
            sign, word, result = "-", "minus", a - b
    written = rng.choice((f"{a} {word} {b}", f"{a} {sign} {b}", f"{a}{sign}{b}"))
    ask = rng.choice(("What is {}?", "What's {}?", "How much is {}?", "And {}?", "{}", "{}", "{}="))
    return ask.format(written), f"{a} {word} {b} is {result}.", result


def follow_up(rng, words):
    value, n_turns = rng.randint(2, 40), rng.randint(3, 8)
    start = rng.choice(("Start with {}. ", "Take the number {}. ", "I have {} coins. ",
                        "I have {} apples. "))
    start = start.format(value)
    if rng.random() < 0.15:
        yield start.strip(), f"The number is {value}."
        start, n_turns = "", n_turns - 1
    for _ in range(n_turns):
        way = rng.choice(sums(value))
        if way == "new":
            ask, answer, value = new_sum(rng)
        else:
            ask, answer, value = reckon(rng, way, value)
            ask = start + ask
        start = ""
        yield ask, answer


# --- reasoning ----------------------------------------------------------------------------------

def definitions(rng):
    """Shuffled definitions that take one to three additions to resolve, the question last."""
    letters = rng.sample(LETTERS, rng.randint(1, 3) + 1)
    value = rng.randint(1, 9)
    lines = [f"{letters[0]} = {value}."]
    for before, letter in zip(letters, letters[1:]):
        n = rng.randint(1, 9)
        lines.append(f"{letter} = {before} + {n}.")
        value += n
    rng.shuffle(lines)
    return f"{' '.join(lines)} What is {letters[-1]}?", f"{letters[-1]} is {value}."


def missing_item(rng):
    items = rng.sample(rng.choice((FOODS, PETS, COLORS)), rng.randint(3, 5))
    gone = rng.choice(items)
    rest = rng.sample([item for item in items if item != gone], len(items) - 1)
    query = f"First list: {listed(items)}. Second list: {listed(rest)}. What is missing?"
    return query, f"The second list has no {gone}."


def reasoning_kind(query):
    """Which of the two made a query; of definitions, how many additions resolve them."""
    return f"definitions, steps: {query.count('+')}" if "=" in query else "missing from a list"


def reasoning(rng, words):
    for _ in range(rng.randint(2, 5)):
        yield rng.choice((definitions, missing_item))(rng)


# --- induction ----------------------------------------------------------------------------------

WORD_RULES = "{y} {x}", "{x}", "{y}", "{x} {x}", "{x} {y} {x}"


def induction(rng, words):
    for _ in range(rng.randint(2, 4)):
        n = rng.randint(3, 5)
        if rng.random() < 0.375:
            k = rng.randint(1, 9)
            factor, summand = rng.choice(((1, k), (1, -k), (2, 0)))
            pairs = [(x, factor * x + summand) for x in rng.sample(range(10, 60), n)]
        else:
            rule, pool = rng.choice(WORD_RULES), rng.choice((FOODS, PETS, COLORS))
            cases = [rng.sample(pool, 2) for _ in range(n)]
            pairs = [(f"{x} {y}", rule.format(x=x, y=y)) for x, y in cases]
        *shown, (case, result) = pairs
        examples = " ".join(f"{x} gives {y}." for x, y in shown)
        yield f"{examples} What does {case} give?", f"{case} gives {result}."


# --- small talk ---------------------------------------------------------------------------------

def small_talk(rng, words):
    for _ in range(rng.randint(2, 5)):
        yield talk.turn(rng)


# --- all of them --------------------------------------------------------------------------------

# To add a family of your own, write a function as above and give it a line here. The number is its
# share: with 5 there are as many of its dialogues as of expansion. The function takes
#     rng    random numbers, and no others, so that a seed always gives the same dialogues
#     words  names and cities: words.names(2) are two names, other ones in the held-out splits
# and yields two turns or more, each a query and its answer. `python train.py --families NAME`
# trains on it alone.
FAMILIES = {
    "recollection": (3, recollection),
    "expansion": (5, expansion),
    "refinement": (4, refinement),
    "follow-up": (4, follow_up),
    "reasoning": (3, reasoning),
    "induction": (3, induction),
    "small talk": (1, small_talk),
}
SPLITS = ("train", "val", "test", "new_words", "final_words")
PATTERNS = ("recollection", "expansion", "refinement", "follow-up")  # MT-Eval's
SYSTEM = ["You are a helpful assistant.", "Answer in short sentences.", "Be kind and exact.",
          "You have a good memory."]


def typed(query, lower, names):
    """A query as people type it: without capitals and full stops.

    lower: "" changes nothing, "first" makes the first letter small, "all" makes all letters small.
    One of the names at its start keeps its capital under "first".
    """
    if lower == "all":
        query = query.lower().replace("'s ", "s ").replace("'m ", "m ")
    if lower:
        first = query[0] if query.startswith(names) else query[0].lower()
        query = first + query[1:].rstrip(".?!")
    return query


def one_family(rng, split, families):
    """The turns of a dialogue of one of these families as people type them: (turns, family)."""
    family, = rng.choices(families, [FAMILIES[name][0] for name in families])
    lower = rng.choice(("", "", "", "first", "all", "told"))
    errors = rng.random() < 0.1
    _, function = FAMILIES[family]
    words = Words(rng, split, lower=lower == "all")
    turns = list(function(rng, words))
    names = tuple(words.drawn)
    before, as_typed = "", []
    for query, answer in turns:
        way = lower
        if way == "told":
            # The user tells a name with its capital, and asks for it in small letters.
            new = any(name in query and name not in before for name in names)
            way = "" if new else "all"
        before += query + answer
        query = typed(query, way, names)
        if errors:
            query = mistyped(rng, query, lambda word: word in TYPED_WRONG)
        as_typed.append((query, answer))
    return as_typed, family


def one_dialogue(rng, split, families, mixed):
    """A dialogue {"messages": [...], "family": str}; see generate for mixed."""
    turns, family = one_family(rng, split, families)
    others = [other for other in families if other != family]
    kind = rng.random()
    if mixed and others and kind < 0.3:
        more, _ = one_family(rng, split, others)
        at = rng.randint(1, 3)
        if kind < 0.15:
            turns = turns[:at] + more
        else:
            turns = turns[:at] + more[: rng.randint(1, 3)] + turns[at:]
        family = "mixed"
    elif mixed and "small talk" in others and kind < 0.4:
        turns.insert(rng.randint(1, len(turns)), talk.turn(rng))
        family = "mixed"
    messages = []
    if rng.random() < 0.1:
        messages.append({"role": "system", "content": rng.choice(SYSTEM)})
    for query, answer in turns:
        messages.append({"role": "user", "content": query})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages, "family": family}


def split_of(messages):
    """The split that a dialogue belongs to, from its text alone: none is ever in two splits."""
    text = "\n".join(message["content"] for message in messages)
    return {0: "val", 1: "test", 2: "test"}.get(zlib.crc32(text.encode()) % 16, "train")


def deal(sizes, seed=0, families=tuple(FAMILIES), mixed=False):
    """Yield (split, dialogue) until each split has its size, {split: n}.

    All dialogues to train, tune and test on are dealt from one stream, so that hardly one is made
    in vain. Those of new_words and final_words have names and cities of their own.
    """
    left = dict(sizes)
    own = [split for split in left if split.endswith("_words")]
    for split in own:
        rng = Random(f"{split} {seed}")
        for _ in range(left.pop(split)):
            yield split, one_dialogue(rng, split, families, mixed)
    rng = Random(seed)
    while any(left.values()):
        dialogue = one_dialogue(rng, "train", families, mixed)
        split = split_of(dialogue["messages"])
        if left.get(split, 0) > 0:
            left[split] -= 1
            yield split, dialogue


def generate(split, n, seed=0, families=tuple(FAMILIES), mixed=False):
    """Yield n dialogues {"messages": [...], "family": str} of a split, deterministic from the seed.

    split: train, val, test, new_words or final_words.
    mixed: people change the subject, so three of ten dialogues go on after one to three turns with
    one of another family, and half of these come back from it after one to three turns; and they
    digress, so one of ten is interrupted by a turn of small talk.
    """
    for _, dialogue in deal({split: n}, seed, families, mixed):
        yield dialogue
