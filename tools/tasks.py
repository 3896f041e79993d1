"""
Tasks from rules, offline, for circuits.py: pairs of prompts that differ in one thing, on which the
right next token depends.

    choice, test = make_contexts("quote", documents, encoding, 32, 64)

A task's rule yields Examples, from Python documents (in_documents) or from templates. "Python
tasks" after Gao et al., "Weight-sparse transformers have interpretable circuits", 2025; agreement
after Marks et al., arXiv 2403.19647; greater_than and ioi after Hanna et al. and Wang et al., as in
MIB, arXiv 2504.13151.
"""
import itertools
import random
import re
from typing import NamedTuple

import torch
from torch import Tensor

from data import encode

FEWEST = 4  # contexts of a side


class Example(NamedTuple):
    """Two prompts and how each goes on; tokens that both continuations begin with are prompt."""

    clean: str
    patch: str
    answer: str  # of clean
    wrong: str  # of patch


class Contexts(NamedTuple):
    """B pairs of prompts of up to T tokens, with end of text behind the shorter ones."""

    clean: Tensor  # (B, T) int64
    patch: Tensor  # (B, T)
    last: Tensor  # (B,) position of the last token of both prompts
    answer: Tensor  # (B,) token
    wrong: Tensor  # (B,) token; -1 where there is none

    def to(self, device):
        return Contexts(*(part.to(device) for part in self))

    def batches(self, size):
        """Yield Contexts of up to size rows."""
        for parts in zip(*(part.split(size) for part in self)):
            yield Contexts(*parts)


# -----------------------------------------------------------------------------
# Python, in documents: every document -> Examples

SWAPPED = {"'": '"', '"': "'", "(": "[", "[": "("}
CLOSING = {"(": ")", "[": "]"}
STRING = re.compile(r"""(?<=[\s(\[{,=:])(['"])[^'"\\\n]{1,40}\1(?=[\s)\]},:.])""")
BRACKETS = re.compile(r"""([(\[])[^()\[\]{}'"\n]{1,40}[)\]]""")
LINES = re.compile(r"^( *)(?=\S)(.*([:)]))\n( *)(?=[a-z])(\w+)", re.MULTILINE)
BLOCK = re.compile(r"(if|elif|else|for|while|def|class|with|try|except|finally)\b")


def replaced(text, place, character):
    """text with another character at a place."""
    return text[:place] + character + text[place + 1:]


def quote(document):
    """The closing quote is the opening one."""
    for match in STRING.finditer(document):
        clean = document[:match.end() - 1]
        other = SWAPPED[match[1]]
        yield Example(clean, replaced(clean, match.start(), other), match[1], other)


def bracket(document):
    """The closing bracket, ) or ], is of the opening one's kind."""
    for match in BRACKETS.finditer(document):
        other = SWAPPED[match[1]]
        if match[0][-1] == CLOSING[match[1]]:
            clean = document[:match.end() - 1]
            patch = replaced(clean, match.start(), other)
            yield Example(clean, patch, CLOSING[match[1]], CLOSING[other])


def indent(document):
    """After a colon the next line is indented by four more; after a parenthesis it isn't."""
    for match in LINES.finditer(document):
        before, line, end, after, word = match.groups()
        clean = document[:match.start(4)] + before
        deeper = "    " + word
        if end == ":" and after == before + "    " and BLOCK.match(line):
            yield Example(clean, replaced(clean, match.start(3), ")"), deeper, word)
        elif end == ")" and after == before:
            yield Example(clean, replaced(clean, match.start(3), ":"), word, deeper)


# -----------------------------------------------------------------------------
# Python, from templates: a random.Random -> two Examples, each the other's patch

NOUNS = ("items", "values", "names", "lines", "words", "nodes", "paths", "files", "users", "rows")
VERBS = ("find", "read", "check", "load", "count", "parse", "merge", "clean", "match", "update")
SHORT = ("item", "value", "name", "line", "word", "node", "path", "entry", "user", "row")
STATES = ("total", "result", "found", "seen", "size", "index", "start", "level", "offset", "done")


def both_ways(clean, patch, answer, wrong):
    return [Example(clean, patch, answer, wrong), Example(patch, clean, wrong, answer)]


def head(rng):
    """The first line of a function, and its argument's name."""
    noun = rng.choice(NOUNS)
    return f"def {rng.choice(VERBS)}_{rng.choice(NOUNS)}({noun}):\n", noun


def bracket_counting(rng):
    """A list in a list ends in ]], another in ]. (" [" where [[ is two tokens, "[" where one.)"""
    numbers = ", ".join(str(rng.randrange(10)) for _ in range(rng.randint(2, 5)))
    name = rng.choice(NOUNS)
    clean = f"{name} = [[{numbers}"
    found = []
    for opening in (" [", "["):
        found += both_ways(clean, f"{name} = {opening}{numbers}", "]]\n", "]\n")
    return found


def else_elif(rng):
    """else: has a colon, elif a condition."""
    line, noun = head(rng)
    start = f"{line}    if {noun} == {rng.randrange(10)}:\n        return {rng.choice(STATES)}\n"
    return both_ways(start + "    else", start + "    elif", ":\n", f" {noun}")


def fstring_brace(rng):
    """In an f-string a brace is closed by a brace, a parenthesis by one."""
    line, noun = head(rng)
    text = f'{line}    print(f"{rng.choice(STATES)} %s{noun}'
    return both_ways(text % "{", text % "(", "}", ")")


def for_while(rng):
    """for goes on with in, while with a colon. (The line before makes up for the length.)"""
    line, noun = head(rng)
    start = f"{line}    {rng.choice(STATES)} = "
    name = rng.choice(SHORT)
    return both_ways(f"{start}100\n    for {name}", f"{start}1\n    while {name}",
                     f" in {noun}", ":\n")


def while_return_true(rng):
    """while True has a colon, return True none. (The line before makes up for the length.)"""
    line, _ = head(rng)
    start = f"{line}    {rng.choice(STATES)} = "
    return both_ways(f"{start}10\n    while True", f"{start}1\n    return True", ":\n", "\n")


def set_or_string(rng):
    """A set grows by .add, a string by +=."""
    line, noun = head(rng)
    state, item = rng.choice(STATES), rng.choice(SHORT)
    clean = f"{line}    {state} = set()\n    for {item} in {noun}:\n        {state}"
    return both_ways(clean, clean.replace("set()", "str()"), f".add({item})", f" += {item}")


# -----------------------------------------------------------------------------
# English, from templates; prompts of one length are rare unless words are tokens

PEOPLE = ("boy", "girl", "teacher", "doctor", "farmer", "lawyer", "manager", "guard", "pilot",
          "writer", "friend", "driver", "actor", "student", "player", "owner")
THINGS = ("car", "house", "table", "door", "tree", "book", "window", "bridge", "store", "road")
NAMES = (" Mary", " John", " Tom", " James", " Dan", " Martin", " Amy", " Anna", " Paul", " Mark",
         " David", " Sarah", " Laura", " Peter", " Alice", " Kate")
EVENTS = ("war", "dispute", "siege", "campaign", "reign", "journey", "famine", "trial")


def agreement_simple(rng):
    """The verb agrees with its subject."""
    noun = rng.choice(PEOPLE)
    adverb = rng.choice(("", " here", " there", " now", " always", " often", " still", " never"))
    return both_ways(f"The {noun}{adverb}", f"The {noun}s{adverb}", " is", " are")


def agreement_pp(rng):
    """... across a prepositional phrase."""
    noun, thing = rng.choice(PEOPLE), rng.choice(THINGS) + rng.choice(("", "s"))
    phrase = f"{rng.choice(('near', 'behind', 'beside'))} the {thing}"
    return both_ways(f"The {noun} {phrase}", f"The {noun}s {phrase}", " is", " are")


def agreement_rc(rng):
    """... within a relative clause."""
    noun, other = rng.sample(PEOPLE, 2)
    other += rng.choice(("", "s"))
    return both_ways(f"The {other} that the {noun}", f"The {other} that the {noun}s",
                     " likes the", " like the")


def greater_than(rng):
    """A span of years ends later than it begins; patched, it begins in the year 01."""
    century, year, by = rng.randint(11, 18), rng.randint(30, 79), rng.randint(5, 18)
    text = f"The {rng.choice(EVENTS)} lasted from the year {century}%s to the year {century}"
    return [Example(text % year, text % "01", str(year + by), str(year - by))]


def ioi(rng):
    """Of two people the one who isn't the subject gets it."""
    one, other = rng.sample(NAMES, 2)
    place = rng.choice(("store", "park", "school", "office", "station", "garden"))
    gift = rng.choice(("drink", "book", "ring", "letter", "ball", "present"))
    text = f"When{one} and{other} went to the {place},%s gave a {gift} to"
    return both_ways(text % other, text % one, one, other)


IN_DOCUMENTS = (quote, bracket, indent)
FROM_TEMPLATES = (bracket_counting, else_elif, fstring_brace, for_while, while_return_true,
                  set_or_string, agreement_simple, agreement_pp, agreement_rc, greater_than, ioi)
TASKS = {rule.__name__: rule for rule in (*IN_DOCUMENTS, *FROM_TEMPLATES)}

# -----------------------------------------------------------------------------
# Examples as tokens


def continued(text, answer, wrong, encoding):
    """
    Token ids of a prompt, and the two tokens at which its continuations part.

    None where one continuation is the other's beginning.
    """
    one, other = (encode(encoding, text + end) for end in (answer, wrong))
    for n, (a, b) in enumerate(zip(one, other)):
        if a != b:
            return one[:n], a, b
    return None


def tokenized(example, encoding, n_tokens):
    """
    clean, patch (lists of up to n_tokens ids), answer and wrong of an Example.

    A prompt that isn't cut has end of text, a document's start, before it. None where clean and
    patch, as tokens, differ in length or in their ends, or not at all.
    """
    ends = (example.answer, example.wrong, encoding)
    clean, patch = continued(example.clean, *ends), continued(example.patch, *ends)
    if not clean or not patch or len(clean[0]) != len(patch[0]) or clean[1:] != patch[1:]:
        return None
    ids, other = (([encoding.eot_token] + prompt)[-n_tokens:] for prompt in (clean[0], patch[0]))
    return (ids, other, *clean[1:]) if ids != other else None


def as_contexts(rows, padding):
    """Contexts of rows of clean, patch, answer and wrong; -1 for wrong means none."""
    clean, patch, answer, wrong = zip(*rows)
    last = torch.tensor([len(ids) - 1 for ids in clean])
    T = int(last.max()) + 1
    clean, patch = (torch.tensor([ids + [padding] * (T - len(ids)) for ids in prompts])
                    for prompts in (clean, patch))
    return Contexts(clean, patch, last, torch.tensor(answer), torch.tensor(wrong))


def examples(task, documents, n, rng):
    """A task's Examples in random order, each once; from templates 4 n of them are drawn."""
    rule = TASKS[task]
    if rule in IN_DOCUMENTS:
        found = [example for document in documents for example in rule(document)]
    else:
        found = [example for _ in range(4 * n) for example in rule(rng)]
    found = list(dict.fromkeys(found))
    rng.shuffle(found)
    return found


def balanced(rows):
    """Rows in turns of their answers, so that one answer alone isn't often right."""
    by_answer = {}
    for row in rows:
        by_answer.setdefault(row[2], []).append(row)
    turns = itertools.zip_longest(*by_answer.values())
    return [row for turn in turns for row in turn if row is not None]


def make_contexts(task, documents, encoding, n, n_tokens, seed=0):
    """
    Contexts of a task to choose circuits on and, disjoint from them, to test them on: n each, or as
    many as there are, of up to n_tokens tokens. documents: texts, for the tasks that need them.

    Raises ValueError if fewer than FEWEST fit the tokenizer and the documents.
    """
    rng = random.Random(seed)
    rows = {}
    for example in examples(task, documents, n, rng):
        row = tokenized(example, encoding, n_tokens)
        if row is not None:
            rows.setdefault(tuple(row[0]), row)  # cut, two prompts may be the same
        if len(rows) >= 16 * n:
            break
    rows = balanced(rows.values())[:2 * n]
    half = len(rows) // 2
    if half < FEWEST:
        raise ValueError(f"task={task}: {len(rows)} contexts fit the tokenizer "
                         f"{encoding.name!r} and the data, {2 * FEWEST} are needed")
    choice, test = rows[:half], rows[half:2 * half]
    return as_contexts(choice, encoding.eot_token), as_contexts(test, encoding.eot_token)
