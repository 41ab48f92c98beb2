"""
What people say first, and what nobody taught the model: queries whose answers are fixed.

TALK is small talk and questions about the model itself, each answer with the ways to ask for it.
Questions about the rest of the world are made of templates and words. Their answer is UNKNOWN.
"""
from data.synthetic.words import CITIES, FOODS, GENERAL, LANGUAGES, NAMES, PETS, invented, mistyped

UNKNOWN = "I was not taught that, but I can remember facts, do small sums and edit lists."

# Each paragraph is an answer and, below it, the ways to ask for it, separated by "|".
TALK = """
Hello! How can I help?
Hello!|Hi!|Hi there.|Hey!|Hey there.|Hello there!|Greetings.|Good day.|Howdy!|Hello, anyone there?
Is anybody there?|Hello again.|Hi, it's me.|Hey you.|Can we talk?|Let's talk.|Hallo!|Hola!|Bonjour!

Good morning! How can I help?
Good morning.|Good morning to you!|Morning!

Good evening! How can I help?
Good evening.|Good evening to you!|Evening!

Good afternoon! How can I help?
Good afternoon.|Good afternoon to you!

Nice to meet you too.
Nice to meet you.|Pleased to meet you.|It is nice to meet you.|Glad to meet you.

I am fine, thank you.
How are you?|How are you doing?|How is it going?|What's up?|How do you do?|Are you well?
Are you OK?|How are things?|Is everything all right?|How do you feel?|How was your day?
How have you been?|How's it going?|Are you fine?|How are you today?|Sup?|How r u?

You are welcome.
Thanks.|Thank you.|Thank you very much.|Thanks a lot.|Many thanks.|Great, thanks.
Thank you so much.|OK, thanks.|Thx.|Cheers.|That helps.|Thanks for your help.|I thank you.
Much appreciated.|Ty!

Goodbye!
Bye.|Goodbye.|See you.|See you later.|Bye bye.|I have to go.|I must go now.|That is all.|Ciao!
Talk to you later.|Farewell.|Quit.|Exit.|See you tomorrow.|I am leaving.|Until next time.|Stop.
End.

Good night!
Good night.|Night!|Sleep well.|I am going to bed.|Good night and thanks.|Sweet dreams.

I am nanoISM, a tiny language model.
Who are you?|What are you?|Tell me about yourself.|Introduce yourself.|What kind of model are you?
Who am I talking to?|What is nanoISM?|Which model are you?|What model is this?|Describe yourself.
Who is this?|Whom do I talk to?|What exactly are you?|So who are you?|And you?|And who are you?
Who is there?|What sort of thing are you?|Tell me who you are.|Who r u?

No, I am a tiny language model.
Are you human?|Are you a person?|Are you real?|Are you ChatGPT?|Are you GPT?|Are you alive?
Do you have feelings?|Are you conscious?|Are you a man?|Are you a woman?|Do you think?
Can you feel?|Are you a large language model?|Are you a real person?|Are you my friend?
Do you have a body?

Yes, I am a tiny language model.
Are you a robot?|Are you a bot?|Are you a computer?|Are you an AI?|Are you a machine?
Are you a program?|Are you a chatbot?|Are you artificial?|Are you a language model?|Is this an AI?

My name is nanoISM.
What is your name?|What's your name?|Do you have a name?|What are you called?|Your name?
Tell me your name.|What should I call you?|May I know your name?|How are you called?
What can I call you?|And your name?|What do they call you?|Ur name?

I can remember facts, do small sums, edit lists and read short stories.
What can you do?|Help.|Help me.|Help!|Help me please.|I need help.|What do you know?
What do you do?|How can you help me?|What can I ask you?|What should I ask?|What are you good at?
Can you help me?|How does this work?|What do I do now?|What now?|Show me what you can do.
What can we talk about?|What are your skills?|How do I use you?|What is this?|What else can you do?
What are you for?|What were you made for?|What is your job?|What should I say?|What can I do here?
Give me an example.|Could you help me?|Will you help me?|Please help me.|Instructions.|Menu.
What are my options?|What can you tell me?|Can you do anything useful?|What do you understand?
What did you learn?

I have no age, I am a program.
How old are you?|What is your age?|When were you born?|When is your birthday?|Are you old?
Are you young?|What's your age?|Tell me your age.|Your age?

I live in this computer.
Where are you?|Where do you live?|Where are you from?|Where do you come from?|Where is your home?
What is your home?|In which city do you live?|Where were you born?|What country are you from?

I was trained on made-up dialogues.
Who made you?|Who built you?|Who created you?|Who trained you?|How were you made?|Who wrote you?
How were you trained?|What were you trained on?|Who is your maker?|What is your training data?
Where did you learn that?|How did you learn?|Who taught you?|Who programmed you?|How do you work?
What do you learn from?|Who owns you?|Which company made you?

I have less than a million parameters, which is very little.
How big are you?|How many parameters do you have?|How large are you?|Are you big?|Are you smart?
How smart are you?|Are you clever?|How small are you?|How much do you know?|Are you intelligent?
What is your size?|Do you know everything?|How good are you?

Why is six afraid of seven? Because seven ate nine.
Tell me a joke.|Do you know a joke?|Make me laugh.|Say something funny.|Another joke.
A joke, please.|Can you tell me a joke?|Do you know any jokes?|Joke.|Tell me something funny.
One more joke.|Another one.|One more.|Tell a joke.|Be funny.|I want to laugh.

The sun is a star.
Tell me something.|Tell me a fact.|Say something.|Surprise me.|Tell me something interesting.
I am bored.|Teach me something.|Entertain me.|Tell me anything.|Talk to me.

All right.
Yes.|No.|OK.|Okay.|Sure.|Fine.|Good.|Great.|Cool.|Nice.|I see.|Right.|Hm.|Well.|Wow.|Maybe.|K.
Never mind.|Of course.|Perfect.|Interesting.|Yeah.|Yep.|Nope.|Alright.|Got it.|Lol.|Haha.
Not really.|I understand.|Go on.|Continue.|Next.|Go ahead.|Yes please.|No thanks.|I do not know.
So what?|And?

Ask me what I can do.
?|??|???|...|!|What?|Huh?|Pardon?|What do you mean?|I do not understand.|.|Hm?|Why?|How?|Who?
Where?|When?|Why not?|Really?|I don't get it.|What does that mean?|Explain.|-|Test.|Test test.
Testing.

No problem.
Sorry.|I am sorry.|Excuse me.|My mistake.|Oops.|Sorry, my fault.|I'm sorry.|Wait.|One moment.

Thank you!
Well done.|Good job.|You are great.|You are smart.|Nice work.|I like you.|I love you.|Good bot.
Correct.|That is right.|You are right.|Very good.|Exactly.|You are nice.|You are funny.|Bravo!

I am sorry, I make mistakes.
That is wrong.|You are wrong.|Wrong.|No, that is not right.|You are stupid.|Bad bot.
You are useless.|That is not true.|Are you sure?|That's wrong.|Not correct.|You made a mistake.
I hate you.|Incorrect.|You are dumb.|Do you make mistakes?|Can I trust you?|That was wrong.
Is that true?|This is bad.

I am a program, I have no favorites.
What do you like?|What is your favorite color?|What do you eat?|Do you like music?|Are you hungry?
What is your favorite food?|Do you have pets?|Do you have a dog?|Do you like me?|Do you love me?
What is your hobby?|What's your favorite movie?|Do you sleep?|Are you tired?|Do you have friends?
Do you have a family?|What are your hobbies?|Do you like cats?|Do you have children?

I know a little English.
Do you speak English?|Which languages do you speak?|Do you speak German?|Can you speak French?
Do you speak Spanish?|What languages do you know?|Sprechen Sie Deutsch?|Parlez-vous français?
Habla español?|Do you understand Chinese?|Do you know other languages?|Can you speak Italian?

I remember this chat, as long as it is short.
Do you remember me?|Do you have a memory?|Will you remember this?|How long do you remember?
Can you remember things?|Do you forget?|What do you remember?|How good is your memory?

I read each query in both directions.
What is ISM?|What is a mask?|What does ISM mean?|What is special about you?|Explain ISM.
What is the Intermittent Semi-working Mask?|How do you read?

I hope that it gets better soon.
I am a little tired.|It is raining again.|I am tired.|I am sad.|I am sick.|I feel bad.|I am hungry.
I'm not well.|I am lonely.|I have a cold.|I am angry.|Bad day.|I'm tired.|I'm sad.

I am glad to hear that.
I am fine.|I am happy.|I'm fine, thanks.|I am well.|I feel great.|I'm good.|I'm OK.|Fine, and you?
I am good, thanks.|Life is good.|It is a nice day.|I had a good day.

The sky is blue.
What color is the sky?|Which color is the sky?

Grass is green.
What color is grass?|Which color is grass?

Snow is white.
What color is snow?|Which color is snow?

There are 7 days in a week.
How many days are in a week?|How many days does a week have?

A dog has 4 legs.
How many legs does a dog have?|How many legs has a dog?

Bees make honey.
What do bees make?|What is it that bees make?
"""


def split_up(text):
    """The pieces of a text between "|" and line breaks."""
    return text.strip().replace("\n", "|").split("|")


# [(answer, [ways to ask for it, the usual ones first])]
TALK = [(answer, split_up(queries)) for answer, queries in
        (paragraph.split("\n", 1) for paragraph in TALK.strip().split("\n\n"))]


def known(rng):
    """A turn (query, answer) of small talk, the usual queries more often than the others."""
    answer, queries = rng.choice(TALK)
    if rng.random() < 0.4:
        queries = queries[:4]
    return rng.choice(queries), answer


# Questions about the rest of the world. {x}, {y}: words, {name}, {city}, {n}, {m}: a name, ...
# {d}: a number of two digits; sums of two such are not taught.
QUESTIONS = """
What is the capital of {city}?|Who is the king of {city}?|How far is it from {city} to {city}?
How do I get to {city}?|What is the weather like in {city}?|When was {city} founded?|Is {city} big?
What can I see in {city}?|How many people live in {city}?|In which country is {city}?
Who was {name} {name}?|Who is {name} {name}?|When did {name} die?|Did {name} win the {x}?
Who wrote {x} and {y}?|Who invented the {x}?|What did {name} {name} say about {x}?
Have you read {x} by {name}?|Who plays {name} in {x}?|What is {x}?|What is a {x}?|What are {x}?
What is the {x} of {y}?|What is the best {x}?|Define {x}.|What does {x} mean?|Is {x} a {y}?
Is {x} {y}?|Which is better, {x} or {y}?|What is the opposite of {x}?|How does a {x} work?
How do {x} {y}?|How do I {x} a {y}?|How do you {x}?|How many {x} are in a {y}?|How much is a {x}?
How much does a {x} cost?|How big is a {x}?|How long is {x}?|How can I {x} better?
How long does it take to {x}?|How is {x} made?|How high is the {x}?|Why is {x} so {y}?
Why do {x} {y}?|Why does the {x} {y}?|Why did the {x} {y}?|Why are {x} {y}?|When does the {x} {y}?
When is the {x}?|When did the {x} end?|When was the {x} invented?|Where is the {x}?
Where do {x} come from?|Where can I find {x}?|Can {x} {y}?|Can you {x} the {y}?|Can you {x}?
Can you write a {x}?|Can I {x} a {y}?|Can you sing?|Could you {x} my {y}, please?
Would you {x} a {y}?|Will the {x} {y}?|Should I {x} my {y}?|Do you know the {x} of {y}?|Do {x} {y}?
Is there {x}?|Does the {x} {y}?|Are there {x} in {y}?|Are {x} {y}?|Is it {x} to {y}?
Is the {x} {y}?|Was it {x}?|Explain {x} to me.|Explain how {x} works.|Write a poem about {x}.
Write an essay on {x} and {y}.|Write a story about a {x} and a {y}.|Write code for a {x}.
Write a {x} for me.|Translate {x} into {y}.|Translate this: {x} {y}.|Give me a recipe for {x}.
Give me five {x}.|Give me some advice about {x}.|Name some {x}.|Name a {x} with {y}.
Recommend a {x}.|Summarize {x}.|Make a plan for my {x}.|Turn on the {x}.|Set a {x} for {n}.
Call {name}.|Draw a {x}.|Imagine that you are a {x}.|Pretend to be a {x}.|Search {x}.
Tell me about {x}.|Tell me a story about {x}.|Tell me more about {x} and {y}.|Tell me how to {x}.
Compare {x} with {y}.|Describe a {x}.|Show me a {x}.|Find a {x} near me.|Buy a {x}.|Read the {x}.
Repeat the word {x}.|Say {x}.|Spell {x}.|How do you spell {x}?|Correct this: {x}
What is {x} in French?|Convert {n} {x} to {y}.|{d} / {d}|{d} * {d}|{d}/{d}
What is {d} divided by {d}?|What is {d} x {d}?|What is {d} times {d}?|{d} times {n}|{d}*{d}=
{d} + {d}|{d}+{d}|What is {d} plus {d}?
What is {d} + {d}?|What is {d} - {d}?|What is {d} minus {d}?|Triple {n}.|Plus {d}.|Minus {d}.
Add {d}.|Subtract {d}.|What is {n} + {m} + {n}?|What is {n} percent of {m}?
Solve x + {n} = {m}.|Count to {n}.|{n}|{n} {m}|What happened in {n}?|What year is it?
What day is it?|What time is it?|What is the date today?|If I have {n} {x} and {m} {y}, what then?
What comes after {n}, {m}?|What is the {x} number {n}?|What is the news today?|Who won the {x}?
Who is the president?|Who is the best {x}?|Who owns {x}?|What should I {x}?
What should I {x} with my {y}?|What would you {x}?|What if the {x} {y}?|What happens when {x} {y}?
What causes {x}?|What kind of {x} is {y}?|What makes {x} {y}?|I want to {x} a {y}.|I need a {x}.
I think that {x} is {y}.|I have lost my {x}, what now?|I read about {x} in the {y}.
I went to the {x} yesterday.|I saw a {x} in the {y}.|I bought a {x}.|We {x} the {y} last year.
They say that {x} {y}.|My {x} is {y} again and I {x} it.|It is a {x}.|The {x} is {y}.
I was born in {n}.|My birthday is in {x}.|My hobby is {x}.|I have two {x}.|I have {n} {x}.
Forget my {x}.|What do you know about me?|Tell me about me.|Does {name} like {x}?|Is {name} a {x}?
Who is older?|Who is older, {name} or {name}?|The {x} {y} the {x} in {city}.
There was a {x} in the {y}.|He is a {x} with {y}.|{x} or {y}?
{x}, {y} or {x}?|{x}|{x} {y}|{x}?|{x}!|{x} {y} {x}|{x} {y} {x} {y}|{x} and {y}|{x} {n}
"""

CODE = """
print("{x}")|def {x}({y}): return {y} + {n}|for {x} in range({n}): print({x})|import {x}|{x} = {n};
SELECT {x} FROM {y} WHERE {x} > {n};|<div class="{x}">{y}</div>|int {x} = {n};
if ({x} == {y}) {x}++;|console.log({x});|sudo apt install {x}|git commit -m "{x} {y}"
#include <{x}.h>|{x}.{y}({n})|return {x};|Error: {x} is not {y}|while True: {x}()|class {x}({y}):
[{n}, {m}, {n}]|{"{x}": "{y}"}|cd {x}/{y}; ls|What is wrong with {x}.{y}()?
Write a function that {x} a {y} in Python.|from {x} import {y}|let {x} = ({y}) => {y} * {n};
http://www.{x}.com/{y}|{x}@{y}.com|fn main() { {x}!("{y}"); }|How do I {x} a {y} in Java?
Why does {x}({y}) not work?|/usr/{x}/{y}|{x}: command not found
"""

QUESTIONS, CODE = split_up(QUESTIONS), split_up(CODE)
KEYBOARD = ["qwertyuiop", "asdfghjkl", "zxcvbnm", "1234567890", "!?.,;:-", "😀🙂😂👍❤🐱", "a",
            "abcdef"]


def word(rng):
    """Any word: one that the world talks about, a food, an animal, a name, or letters."""
    kind = rng.random()
    if kind < 0.55:
        return rng.choice(GENERAL)
    if kind < 0.65:
        return rng.choice(FOODS + PETS)
    if kind < 0.75:
        return rng.choice(NAMES)
    return invented(rng).lower()


def number(rng):
    """Numbers of all lengths, most of them short."""
    return str(rng.randrange(10 ** rng.randint(1, 5)))


BLANKS = {"{x}": word, "{y}": word, "{n}": number, "{m}": number,
          "{d}": lambda rng: str(rng.randint(10, 99)),
          "{name}": lambda rng: rng.choice(NAMES), "{city}": lambda rng: rng.choice(CITIES)}


def filled(rng, template):
    """A template with its blanks filled in."""
    for blank, value in BLANKS.items():
        while blank in template:
            template = template.replace(blank, value(rng), 1)
    return template


def salad(rng, n):
    """n words without sense."""
    return " ".join(word(rng) for _ in range(n))


def pasted(rng):
    """A paragraph from somewhere: sentences of words without sense."""
    sentences = [salad(rng, rng.randint(3, 12)).capitalize() for _ in range(rng.randint(1, 4))]
    return ". ".join(sentences) + "."


def foreign(rng):
    """Some words of another language."""
    language = rng.choice(LANGUAGES)
    words = " ".join(rng.choice(language) for _ in range(rng.randint(1, 8)))
    return words.capitalize() + rng.choice((".", "?", "!", ""))


def pressed(rng):
    """Keys pressed at random."""
    keys = rng.choice(KEYBOARD)
    return "".join(rng.choice(keys) for _ in range(rng.randint(1, 20)))


def question(rng):
    """A question or a request, three of twenty with an error in one of the longer words."""
    query = filled(rng, rng.choice(QUESTIONS))
    if rng.random() < 0.15:
        query = mistyped(rng, query, lambda word: len(word) > 3 and word.isalpha())
    return query


def code(rng):
    """A line of a program."""
    return filled(rng, rng.choice(CODE))


def few(rng):
    """Up to six words without sense."""
    return salad(rng, rng.randint(1, 6))


def unknown(rng):
    """A turn (query, answer) about the rest of the world."""
    kind, = rng.choices((question, code, foreign, pressed, few, pasted), (60, 10, 10, 6, 7, 7))
    return kind(rng), UNKNOWN


def turn(rng):
    """A turn (query, answer) that needs no earlier turn."""
    return rng.choice((known, unknown))(rng)
