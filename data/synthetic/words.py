"""
The words of the synthetic dialogues: lists to draw from, and words that nobody has seen before.

A user has a name that the model has never seen. So there are many names here, and a dialogue
invents half of its names: the model has to copy names, and gains nothing by remembering them.
"""
import random

# Names and cities to train on, from many languages.
NAMES = """
Aaliyah Aaron Abdul Abdul-Aziz Abigail Adam Adele Aditi Adrian Ahmed Aiko Aisha Akira Alan Albert
Alejandro Alice Alina Allison Alma Alvaro Amanda Amara Amelie Amina Amir Amit Amy Ana Anaïs Anders
Andrea André Andrzej Angela Anil Anita Anja Anna Anne-Marie Anthony Antonio Anya Arash Ariel Arjun
Arne Arthur Asha Astrid Aurora Ava Axel Ayesha Ayla Åsa Barbara Bart Beatrice Beatriz Ben Bengt
Bernard Beth Bianca Bilal Bjarne Bogdan Boris Brandon Brenda Brian Bridget Bryan Caleb Camille Carl
Carlos Carmen Carol Caroline Catarina Catherine Cecilia Céline Chandra Charles Charlotte Chen
Chiara Chidi Chinedu Christina Christopher Claire Clara Claudia Conor Cora Craig Cristian Cynthia
D'Angelo Dalia Damian Dan Daniel Daria David Dawn Deborah Deepak Denise Dennis Derek Diana Diego
Dina Dolores Dominik Donald Dora Dorothy Douglas Dylan Edgar Edith Eduardo Edward Efua Egor Eileen
Ekaterina Elena Eli Elif Elijah Elizabeth Ella Elliot Elsa Emeka Emil Emily Emma Enrique Eric Erin
Ernesto Esra Esther Ethan Eugene Eva Evelyn Ezra Fabian Fatima Felix Ferdinand Filip Fiona Florian
Frances Francisco Frank Freya Fumiko Gabriel Gareth Gary Gemma Geoffrey George Gerald Gianluca Gina
Giovanni Giulia Gloria Goran Grace Graham Greta Guadalupe Guillermo Hakan Hamza Hana Hanna Hannah
Hans Harald Harry Haruki Hassan Hector Heidi Helen Henrik Henry Hiroshi Holly Howard Hugo Hussein
Ian Ibrahim Ida Ifeoma Igor Ilse Imran Ines Inès Ingrid Irene Iris Isaac Ivan Ivy Jack Jacob
Jacques Jada Jakub James Jamila Jan Jane Janet Javier Jay Jean Jean-Paul Jeffrey Jelena Jenny
Jeremy Jerome Jessica Jin Joanna Joao Joe Johan John Jonas Jordan Jose Joseph José Joshua Joy Juan
Judith Julia Julian June Justin Jürgen Jyoti Kaito Karen Karim Karin Karl Katarzyna Kate Keiko
Keith Kelly Ken Kenji Khalid Kim Kirsten Klaus Kofi Kristina Kurt Kyle Lakshmi Lamar Lara Lars
Latisha Laura Lauren Layla Lea Leila Lena Leo Leticia Li Liam Lily Linda Ling Lisa Logan Lorenzo
Louis Lucas Lucia Lucy Ludwig Luis Luna Lupita Lydia Maciej Madison Magdalena Mahmoud Malik Mandla
Manuel Marco Margaret Maria Marie Marina Mark Marta Martin Mary Mary-Jane Masha Mateo Matthew
Maurice Max Maya Megan Mei Melissa Mia Michael Miguel Mikael Milena Miles Min Mina Ming Miriam
Mohamed Mohan Moira Monica Morgan Moses Mónica Muhammad Musa Mustafa N'Golo Nadia Nadine Naledi
Nancy Natalia Nathan Neema Neil Nicholas Nicole Nikhil Niklas Nils Nina Niño Noah Noël Noor Nora
Norman O'Connor O'Neil Octavia Oleg Olga Oliver Olivia Omar Orla Oscar Otto Owen Özlem Pablo Paige
Pamela Paolo Parisa Patricia Patrick Paul Pavel Pedro Penelope Per Peter Petra Philip Phoebe Pierre
Pilar Piotr Pradeep Qasim Qiang Quinn Rachel Rafael Rahul Raj Ralph Ramona Rania Raquel Rashid
Raymond Rebecca René Reza Ricardo Richard Rita Robert Roberto Rodrigo Roger Rohan Rolf Roman Ronan
Rosa Rose Roxana Roy Ruben Ruby Rune Russell Ruth Ryan Sabine Sadia Saeed Said Sakura Salma Sam
Samira Samuel Sandra Sanjay Sara Sarah Scott Sean Sebastian Sergei Seth Shanice Sharon Shirin
Shreya Siddharth Sigrid Simon Simone Sina Sipho Sofia Soledad Sonia Sophie Stacy Stanislaw Stefan
Stella Stephanie Steven Stuart Sunil Susan Sven Svetlana Sylvia Søren Tadashi Takeshi Tamar Tamika
Tanya Tariq Tatiana Ted Teresa Terry Thabo Theo Theodora Theresa Thomas Tiffany Tim Timothy Tina
Todd Tom Tomas Torsten Tracy Trevor Tyler Uma Umar Uri Ursula Usman Valentina Valerie Vanessa Vera
Veronica Victor Vijay Viktor Vincent Viola Violet Vivek Vladimir Walter Wanda Wei Wendy Wilhelm
William Winnie Xavier Xin Yan Yara Yasmin Yelena Ying Yolanda Yosef Youssef Yuri Yusuf Yvonne Zahra
Zainab Zane Zara Zeynep Zhang Zoe Zoë Zoltan Zuri Łukasz
""".split()
CITIES = """
Aachen Aberdeen Abuja Accra Adelaide Aleppo Algiers Almaty Amman Amsterdam Antwerp Athens Atlanta
Auckland Austin Århus Baghdad Baku Baltimore Bamako Bangkok Barcelona Basel Beijing Beirut Belfast
Belgrade Bengaluru Berlin Bern Bilbao Birmingham Bogota Bogotá Bologna Bombay Bonn Bordeaux Boston
Bradford Brasilia Bratislava Bremen Bristol Brno Brussels Budapest Buenos_Aires Buffalo Bursa Busan
Cairo Cambridge Canberra Cancun Cape_Town Caracas Cardiff Casablanca Cádiz Chennai Cleveland
Cologne Colombo Copenhagen Cordoba Cork Cusco Dakar Dallas Damascus Davao Delhi Denver Derby
Detroit Dhaka Doha Dover Dubai Dublin Dundee Durban Düsseldorf Edinburgh Eindhoven Essen Exeter Fez
Frankfurt Freetown Fresno Fukuoka Galway Gdansk Geneva Genoa Ghent Glasgow Goa Graz Grenoble
Guangzhou Haifa Hanoi Harare Havana Helsinki Hiroshima Hong_Kong Houston Hull Hyderabad Ibadan
Incheon Innsbruck Islamabad Istanbul Izmir Jaipur Jerusalem Juba Kabul Kampala Kano Kansas Karachi
Kazan Kiel Kiev Kigali Kinshasa Kobe Kolkata Köln Kumasi Kuwait Kyoto Lagos Lahore Las_Vegas Leeds
Leicester Leipzig León Lille Lima Limerick Lisbon Liverpool Lodz London Los_Angeles Luanda Lusaka
Luxor Lyon Madrid Malaga Malmo Managua Manchester Manila Maputo Marrakesh Málaga Mecca Medellin
Melbourne Memphis Mérida Miami Milan Minsk Montreal Moscow Mumbai Munich Muscat Nagoya
Nantes Naples Nashville New_Delhi New_York Newcastle Nicosia Oakland Oran Orlando Osaka Oslo
Ottawa Oxford Padua Palermo Panama Paris Patna Penang Pisa Plovdiv Plymouth Porto Poznan Prague
Pretoria Pune Quebec Quito Rabat Raleigh Recife Riga Rijeka Rio_de_Janeiro Riyadh Rome Rosario
Rotterdam Rouen Saint_Petersburg Salzburg Samara San_Diego San_Francisco San_Jose Sapporo Sarajevo
Seattle Seoul Seville Shanghai Split Stockholm Strasbourg Surat Suva Sydney Taipei Tallinn Tampa
Tampere Tangier Tehran Tel_Aviv Tirana Tokyo Toledo Toronto Toulouse Trieste Tripoli Trondheim
Tucson Turin Uppsala Utrecht Valencia Varna Venice Verona Vienna Vilnius Warsaw Washington
Wellington Windhoek Winnipeg Wuppertal Xian Yerevan York Zaragoza Zurich Zürich
"""
CITIES = [city.replace("_", " ") for city in CITIES.split()]
# Words never trained on. Settings are chosen on the first two lists; the last two are for the end.
NEW_NAMES = """
Agnes Bruno Cedric Dilan Eleanor Farid Gustav Imani Jasper Kamila Leon Magnus Naomi Rupert Selma
Tobias
""".split()
NEW_CITIES = """
Ankara Brisbane Calgary Dresden Florence Hamburg Jakarta Kingston Marseille Odessa Santiago Tunis
""".split()
FINAL_NAMES = """
Zsofia Kwame Xiaoming O'Brien Agnieszka Thandiwe Björn Yuki Priyanka Oluwaseun Dmitri Saoirse Ngozi
Mehmet Chloé Jean-Luc Quentin Tuulikki Rajesh Ximena Wojciech Fatoumata Isabella Bob Kevin Jennifer
Mohammed Brooke Gwendolyn Ulrich
""".split()
FINAL_CITIES = """
Reykjavik Kathmandu Ljubljana Guadalajara Nairobi Vancouver Wuhan Chicago Zagreb Tbilisi Kraków
Bucharest Perth Sheffield Ouagadougou Yokohama Bergen Phoenix Stuttgart Valparaiso
Stratford-upon-Avon Philadelphia
""".split()

JOBS = """
baker banker barber builder chef clerk cook dancer dentist doctor driver farmer judge lawyer miner
nurse painter pilot poet sailor singer tailor teacher writer
""".split()
FOODS = """
apples bananas beans bread butter cake carrots cheese chicken chocolate coffee corn dates eggs figs
fish grapes honey jam lemons melons milk nuts olives onions pasta peas pizza plums rice salad soup
sugar tea toast tomatoes water
""".split()
PETS = """
cat cow crab dog dove duck fox frog goat hamster hen horse mouse bear parrot pig rabbit rat sheep
snake turtle wolf
""".split()
COLORS = """
black blue brown gold gray green orange pink purple red silver white yellow
""".split()
THINGS = """
bag ball bike book car coat cup hat house key lamp map pen phone ring spoon ticket watch
""".split()
PAIRS = """
books coats glasses gloves keys papers shoes socks tickets toys
""".split()
ROOMS = """
attic bath box car cellar desk drawer garage garden hall kitchen office tent
""".split()
RELATIVES = """
aunt boss boyfriend brother cousin dad daughter father friend girlfriend grandfather grandmother
husband mom mother neighbor sister son uncle wife
""".split()
LETTERS = """
a b c d e f g h k m n p r s t u v w x y z
""".split()
# What the world talks about, and these dialogues do not.
GENERAL = """
able above accident account across actor address adventure advice afternoon air airport album alone
alphabet always amount ancient angry animal answer apple army arrive art article artist ask atom
author autumn back bad balance bank base basket battery battle beach beautiful become before begin
behind believe bell between bicycle big bill biology bird birthday blood boat body bone border born
bottle bottom brain branch bridge bright bring build building business busy buy camera camp capital
captain card care carry castle cause center century chair change cheap child children choose church
circle class clean clear climate climb clock close clothes cloud club coast code cold college comma
company compare computer concert cook cool copy cost country course cover create culture cut cycle
danger dangerous dark date day dead deal death debt decide deep define describe design difference
different dinner dinosaur direction distance doctor door draw dream dress drink drive dry early
earth east easy economy education effect electric elephant email empire empty energy engine english
enough error essay event every exam example exercise expensive explain eye face fact factory fall
false family famous far fast father fear feel field fight file film final find finger finish fire
fly follow force foreign forest forget formula free french fresh fruit full fun function future
game gas german get gift girl glass god government great ground group grow guess guitar hair hand
hard head health hear heart heavy height high hill history hit hold holiday hospital hot hotel hour
house human hundred hungry idea important improve increase internet invent island journey joke keep
key king know lake language large late laugh law leader leaf learn leg letter level library lie
life light line lion liquid long look lose love low machine magic main make man market marry math
matter mean measure meat medicine meeting message metal method middle milk million minute mirror
modern moment money month moon mountain mouth move movie much muscle museum music name nation
nature near need network news night noise north novel number ocean office often oil open opinion
order origin oxygen paint painting paper parent park part party pay peace people percent person
phone photo physics picture piece place plan planet plant play player poem point poison police poor
population power president pretty price problem produce program project proof proper protect pull
push queen question quick quiet radio rain read reason recipe recommend relativity religion
remember rent report rest result rich ride right ring river road robot rock roof room rule run sad
safe salt school science screen sea search season secret sell send sentence server shape sharp ship
shirt shoe shop short show sick side sign simple sing sister size skin sleep slow small smell smile
snow society soft soldier solve song soul sound south space speak speed spell spring square stage
star start state station stone stop storm story straight strange street strong student study sugar
suggest summary summer sun surface sweet swim system table talk tall taste tax teach team
temperature test theory thing think thousand ticket tiger time tired today tomorrow tooth top total
touch town toy trade train translate travel treaty tree triangle trip true truth try turn
understand universe use vegetable video village virus visit voice volcano vote wait walk wall war
warm wash water wave way weak weather website week weight west wheel wide wild win wind window wine
winter woman wood word work world worry write wrong year yesterday young
""".split()
# Words of other languages, a line each, to tell them from English.
LANGUAGES = [line.split() for line in """
ich du und der die das ist nicht wie was wo warum heute bitte danke haus schule essen morgen
je tu et le la les est pas comment quoi pourquoi merci maison école manger demain peux mon très
yo tú el los es no cómo qué dónde gracias casa escuela comer mañana puedo mi muy con calle por
io tu il lo è non come cosa dove perché grazie casa scuola mangiare domani posso mio molto con
eu você o os não como que onde obrigado casa escola comer amanhã posso meu muito com rua é
ik jij en het is niet hoe wat waar waarom bedankt huis school eten morgen kan mijn heel met
jag du och den är inte hur vad var varför tack hus skola äta imorgon kan min mycket med gata
ja ty i to jest nie jak co gdzie dlaczego dziękuję dom szkoła jeść jutro mogę mój bardzo z ulica
ben sen ve bu değil nasıl ne nerede neden teşekkürler ev okul yemek yarın benim çok ile sokak
minä sinä ja se on ei miten mitä missä miksi kiitos talo koulu syödä huomenna voin minun hyvin
я ты и это не как что где почему спасибо дом школа есть завтра могу мой очень с улица пожалуйста
εγώ εσύ και αυτό είναι δεν πώς τι πού γιατί ευχαριστώ σπίτι σχολείο αύριο μου πολύ με δρόμος
我 你 是 不 什么 哪里 为什么 谢谢 家 学校 吃 明天 可以 我的 很 请 今天 怎么 多少 吗
私 あなた は です ない 何 どこ なぜ ありがとう 家 学校 食べる 明日 できる とても を の か ください
나는 너 이다 아니 무엇 어디 왜 감사합니다 집 학교 먹다 내일 아주 오늘 좀 해 주세요
أنا أنت هو ليس كيف ماذا أين لماذا شكرا بيت مدرسة غدا جدا اليوم من على
मैं तुम है नहीं कैसे क्या कहाँ क्यों धन्यवाद घर स्कूल कल बहुत आज और से
""".strip().splitlines()]
# Words that a user may mistype.
TYPED_WRONG = """
again around biggest called color double even favorite first front gives half have largest last
like list live lives more much name named number older once only people remember remove reverse
second smallest sort story subtract swap take tell than there turn what where which without work
works years your
""".split()


class Random(random.Random):
    """Random numbers by fewer calls than those of its base class."""

    def choice(self, items):
        return items[int(self.random() * len(items))]

    def randint(self, low, high):
        return low + int(self.random() * (high - low + 1))

    def randrange(self, n):
        return int(self.random() * n)

    def sample(self, items, n):
        items = list(items)
        for i in range(n):
            j = i + int(self.random() * (len(items) - i))
            items[i], items[j] = items[j], items[i]
        return items[:n]


def chain(words):
    """What letter follows two others in these words: {two letters: [letters]}; "." ends a word."""
    following = {}
    for word in words:
        letters = f"  {word.lower()}."
        for i in range(2, len(letters)):
            following.setdefault(letters[i - 2 : i], []).append(letters[i])
    return following


FOLLOWING = chain(NAMES + CITIES)
ONSETS = "b br c ch d dr f fl g gr h j k kw l m n p q r s sh st sz t th tr v w x y z zh".split()
VOWELS = "a e i o u y ai au ee ia oo ou".split()
CODAS = ["", "", "", "", "l", "m", "n", "r", "s", "x", "k", "ng"]
HELD_OUT = {*NEW_NAMES, *NEW_CITIES, *FINAL_NAMES, *FINAL_CITIES}
# Letters of two bytes, which a model has to copy whole.
ACCENTS = {"a": "áàâäãåæą", "c": "çčć", "d": "ðđ", "e": "éèêëęě", "g": "ğ", "i": "íìîïı", "l": "ł",
           "n": "ñńň", "o": "óòôöõøœ", "r": "řŕ", "s": "šśşß", "t": "ţť", "u": "úùûüůű", "y": "ýÿ",
           "z": "žźż"}


def invented(rng):
    """A word that nobody has seen before, with a capital.

    Two of three go from letter to letter as names do, one is made of syllables as they come. Some
    have a sign in them, some a letter with an accent.
    """
    while True:
        if rng.random() < 0.67:
            word = "  "
            while word[-1] != ".":
                word += rng.choice(FOLLOWING[word[-2:]])
            word = word[2:-1]
        else:
            word = ""
            for _ in range(rng.choice((1, 2, 2, 3))):
                word += rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
        if rng.random() < 0.1:  # one of its letters, if there is an accent for that letter
            i = rng.randrange(len(word))
            word = word[:i] + rng.choice(ACCENTS.get(word[i], word[i])) + word[i + 1 :]
        word = word.title()
        sign = rng.random()
        if sign < 0.03:
            word = f"{rng.choice('DLMNO')}'{word}"
        elif sign < 0.06:
            word = f"{word}-{invented(rng)}"
        if 2 <= len(word) <= 11 and word not in HELD_OUT:
            return word


def mistyped(rng, text, fits):
    """A text with an error in one of its words, if there is one for which fits(word) holds.

    Two letters are swapped, one is left out, or one stands there twice.
    """
    words = text.split(" ")
    places = [place for place, word in enumerate(words) if fits(word)]
    if places:
        place = rng.choice(places)
        word = words[place]
        i = rng.randint(1, len(word) - 2)
        words[place] = rng.choice((word[:i] + word[i + 1] + word[i] + word[i + 2 :],
                                   word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:]))
    return " ".join(words)


class Words:
    """A source of names and cities for one dialogue, no word twice in a call.

    split: new_words and final_words have lists of their own.
    lower: the user types small letters alone.
    """

    def __init__(self, rng, split="train", lower=False):
        self.rng, self.lower = rng, lower
        self.drawn = []  # all words so far
        self.fixed = {"new_words": (NEW_NAMES, NEW_CITIES),
                      "final_words": (FINAL_NAMES, FINAL_CITIES)}.get(split)

    def names(self, n):
        return self.pick(n, self.fixed[0] if self.fixed else NAMES)

    def cities(self, n):
        return self.pick(n, self.fixed[1] if self.fixed else CITIES)

    def pick(self, n, known):
        """n different words: those of a held-out list, else about half of them invented."""
        words = {}
        while len(words) < n:
            new = not self.fixed and self.rng.random() < 0.5
            word = invented(self.rng) if new else self.rng.choice(known)
            words[word.lower() if self.lower else word] = None
        self.drawn += words
        return list(words)
