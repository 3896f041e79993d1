"""
Labels of tokens for scorecard.py: what a token is, by rules that need no model.

    names, values = label_stream(ids, "bytes", get_tokenizer("bytes"))    # values int8 (n, labels)

Python in bytes is labelled by the standard library's tokenize, English in GPT-2 BPE by the text
alone. A label is a function of a few lines: of a Piece, for Python, and of a Word, for English. Add
yours to PYTHON or ENGLISH.

1: the token has the label; 0: it hasn't; -1: unknown, as in a document that is not whole Python.
"""
import ast
import codecs
import io
import keyword
import re
import tokenize
import warnings
from typing import NamedTuple

import numpy as np

from data import progress

UNKNOWN = -1

# -----------------------------------------------------------------------------
# Python: the source in pieces


class Piece(NamedTuple):
    """A token of Python's, or the blank text before one, with what stands around it."""

    kind: str  # tokenize's name, as "NAME" or "OP"; "BLANK" for spaces and newlines
    text: str
    start: int  # in characters of the source
    end: int
    before: str  # text of the token before it, "" at the start
    opens_line: bool  # it is the first token of a logical line
    is_line: bool  # it is the only token of its logical line, as a docstring is
    head: str  # the first token's text of its logical line
    depth: int  # brackets open around it
    indent: int  # levels of indentation
    column: int
    after_equals: bool  # an assignment's = stands before it in its logical line


SKIPPED = ("INDENT", "DEDENT", "NEWLINE", "NL", "ENDMARKER", "ENCODING")
BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}
ASSIGNMENTS = ("=", "+=", "-=", "*=", "/=", "|=", "&=", ":=")


def python_tokens(source):
    """tokenize's tokens of a source, or None where it is no whole Python file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's strings
            ast.parse(source)
        return list(tokenize.generate_tokens(io.StringIO(source, newline="").readline))
    except (SyntaxError, ValueError, tokenize.TokenError, RecursionError, MemoryError):
        return None


def joined_fstrings(tokens):
    """tokens with each f-string, which Python 3.12 takes apart, as one STRING again."""
    joined = []
    starts = []
    for token in tokens:
        name = tokenize.tok_name[token.type]
        if name.endswith("STRING_START"):
            starts.append(token)
        elif name.endswith("STRING_END"):
            first = starts.pop()
            if not starts:
                joined.append(first._replace(type=tokenize.STRING, end=token.end))
        elif not starts:
            joined.append(token)
    return joined


def logical_lines(tokens):
    """Tokens by logical line: lists of (token, indent), without SKIPPED ones."""
    lines = [[]]
    indent = 0
    for token in joined_fstrings(tokens):
        name = tokenize.tok_name[token.type]
        indent += {"INDENT": 1, "DEDENT": -1}.get(name, 0)
        is_comment_line = name == "NL" and all(t.type == tokenize.COMMENT for t, _ in lines[-1])
        if name == "NEWLINE" or is_comment_line:
            lines.append([])
        elif name not in SKIPPED:
            lines[-1].append((token, indent))
    return [line for line in lines if line]


def python_pieces(source):
    """The Pieces of a source in order, or None where it is no whole Python file."""
    tokens = python_tokens(source)
    if tokens is None:
        return None
    starts = [0]  # of the source's lines, in characters
    for line in io.StringIO(source, newline=""):  # the lines that tokenize counts
        starts.append(starts[-1] + len(line))
    pieces = []
    end = 0
    before = ""
    for line in logical_lines(tokens):
        depth = 0
        after_equals = False
        words = [token for token, _ in line if token.type != tokenize.COMMENT]
        head = words[0].string if words else ""
        for token, indent in line:
            start = starts[token.start[0] - 1] + token.start[1]
            shift = BRACKETS.get(token.string, 0) if token.type == tokenize.OP else 0
            outside = depth + min(shift, 0)  # a bracket itself stands outside
            around = dict(before=before, head=head, depth=outside, indent=indent,
                          after_equals=after_equals)
            if start > end:
                blank = source[end:start]
                column = end - starts[np.searchsorted(starts, end, side="right") - 1]
                pieces.append(Piece("BLANK", blank, end, start, opens_line=False, is_line=False,
                                    column=column, **around))
            end = starts[token.end[0] - 1] + token.end[1]
            is_first = bool(words) and token is words[0]
            pieces.append(Piece(tokenize.tok_name[token.type], source[start:end], start, end,
                                opens_line=is_first, is_line=is_first and len(words) == 1,
                                column=token.start[1], **around))
            depth += shift
            after_equals |= depth == 0 and token.string in ASSIGNMENTS
            before = token.string
    return pieces


# -----------------------------------------------------------------------------
# Python: the labels, functions of a Piece

def is_docstring(piece):
    return piece.kind == "STRING" and piece.is_line


def is_string(piece):
    return piece.kind == "STRING" and not piece.is_line


def is_comment(piece):
    return piece.kind == "COMMENT"


def is_keyword(piece):
    return piece.kind == "NAME" and keyword.iskeyword(piece.text)


def is_defined_name(piece):
    return piece.kind == "NAME" and piece.before in ("def", "class")


def is_attribute(piece):
    return piece.kind == "NAME" and piece.before == "." and piece.head not in ("import", "from")


def is_import_line(piece):
    return piece.head in ("import", "from") and piece.kind not in ("BLANK", "COMMENT")


def is_definition_line(piece):
    return piece.head in ("def", "class", "async") and piece.kind not in ("BLANK", "COMMENT")


def is_condition_line(piece):
    heads = ("if", "elif", "while", "assert")
    return piece.head in heads and piece.kind not in ("BLANK", "COMMENT")


def is_number(piece):
    return piece.kind == "NUMBER"


def is_operator(piece):
    return piece.kind == "OP" and piece.text not in BRACKETS and piece.text not in ".,:;"


def is_line_start(piece):
    return piece.opens_line and not piece.is_line


def is_indentation(piece):
    return piece.kind == "BLANK" and piece.indent > 0 and ("\n" in piece.text or piece.column == 0)


def is_in_brackets(piece):
    return piece.depth >= 1 and piece.kind not in ("STRING", "COMMENT")


def is_in_two_brackets(piece):
    return piece.depth >= 2 and piece.kind not in ("STRING", "COMMENT")


def is_assigned(piece):
    return piece.after_equals and piece.kind not in ("BLANK", "COMMENT")


def is_deeply_indented(piece):
    return piece.indent >= 3 and piece.kind != "BLANK"


PYTHON = {
    "docstring": is_docstring,
    "string": is_string,
    "comment": is_comment,
    "keyword": is_keyword,
    "name being defined": is_defined_name,
    "attribute": is_attribute,
    "import line": is_import_line,
    "definition line": is_definition_line,
    "condition line": is_condition_line,
    "number": is_number,
    "operator": is_operator,
    "line start": is_line_start,
    "indentation": is_indentation,
    "in brackets": is_in_brackets,
    "in two brackets": is_in_two_brackets,
    "assigned value": is_assigned,
    "indented thrice": is_deeply_indented,
}


def python_labels(document):
    """document: the bytes of a text -> int8 (bytes, labels of PYTHON)."""
    values = np.zeros((len(document), len(PYTHON)), dtype=np.int8)
    source = document.decode(errors="replace")
    pieces = python_pieces(source)
    if pieces is None or source.encode() != document:
        values[:] = UNKNOWN
        return values
    widths = [len(character.encode()) for character in source]
    byte = np.concatenate([[0], np.cumsum(widths, dtype=np.int64)])  # of each character
    for piece in pieces:
        where = slice(byte[piece.start], byte[piece.end])
        values[where] = [label(piece) for label in PYTHON.values()]
    return values


# -----------------------------------------------------------------------------
# English: the text in words of BPE


class Word(NamedTuple):
    """A token of text with what stands before it."""

    text: str  # as the tokenizer has it: a space before most words
    word: str  # all of the word that it is part of, letters only; "" outside of words
    starts_word: bool
    before: str  # the last character before it that is no space, "" at the start
    in_quotes: bool
    in_brackets: bool
    opens_sentence: bool  # it starts the first word of a sentence
    opens_line: bool


def english_words(pieces):
    """The tokens of a document, each as text -> its Words."""
    text = "".join(pieces)
    spans = {}  # first character of a word -> the word
    inside = {}  # every character of a word -> the word's first
    for match in re.finditer(r"[^\W\d_]+", text):
        spans[match.start()] = match.group()
        inside.update(dict.fromkeys(range(match.start(), match.end()), match.start()))
    words = []
    start = 0
    before = ""
    quotes = brackets = False
    opens_sentence = opens_line = True
    for piece in pieces:
        letters = start + len(piece) - len(piece.lstrip())  # where it stops to be space
        is_blank = letters == start + len(piece)
        first = None if is_blank else inside.get(letters)
        starts_word = first == letters
        opens_line |= "\n" in text[start:letters]
        words.append(Word(piece, spans.get(first, ""), starts_word, before, quotes, brackets,
                          opens_sentence and starts_word, opens_line and not is_blank))
        for character in piece:
            if character == "\n":
                quotes = brackets = False  # whatever a paragraph left open
                opens_sentence = opens_line = True
            elif not character.isspace():
                quotes = {'"': not quotes, "\u201c": True, "\u201d": False}.get(character, quotes)
                brackets = {"(": True, "[": True, ")": False, "]": False}.get(character, brackets)
                opens_sentence = character in ".!?" or opens_sentence and not character.isalnum()
                opens_line = False
                before = character
        start += len(piece)
    return words


def first_letter(letter):
    """The label of tokens that start a word with a letter."""
    return lambda word: word.starts_word and word.word[0].lower() == letter


# -----------------------------------------------------------------------------
# English: the labels, functions of a Word

def is_capitalised_inside(word):
    return word.starts_word and word.word[0].isupper() and not word.opens_sentence


def is_capitals(word):
    return len(word.word) > 1 and word.word.isupper()


def is_quoted(word):
    return word.in_quotes


def is_bracketed(word):
    return word.in_brackets


def is_sentence_start(word):
    return word.opens_sentence


def is_text_line_start(word):
    return word.opens_line


def is_digit(word):
    return word.text.strip().isdigit()


def is_word_start(word):
    return word.starts_word


def is_word_rest(word):
    return bool(word.word) and not word.starts_word


def is_after_comma(word):
    return word.before == ","


def is_punctuation(word):
    stripped = word.text.strip()
    return bool(stripped) and not any(character.isalnum() for character in stripped)


def is_ing_word(word):
    return len(word.word) > 4 and word.word.endswith("ing")


def is_past_word(word):
    return len(word.word) > 4 and word.word.endswith("ed")


ENGLISH = {
    "capitalised inside a sentence": is_capitalised_inside,
    "capitals": is_capitals,
    "in quotes": is_quoted,
    "in brackets": is_bracketed,
    "sentence start": is_sentence_start,
    "line start": is_text_line_start,
    "digit": is_digit,
    "word start": is_word_start,
    "word continued": is_word_rest,
    "after a comma": is_after_comma,
    "punctuation": is_punctuation,
    "word in -ing": is_ing_word,
    "word in -ed": is_past_word,
    **{f"first letter {letter}": first_letter(letter) for letter in "acpst"},
}


def token_texts(ids, encoding):
    """Each token as text; a character in several tokens is with the one that completes it."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(encoding.decode_single_token_bytes(int(token))) for token in ids]


def english_labels(texts):
    """texts: a document's tokens, each as text -> int8 (tokens, labels of ENGLISH)."""
    rows = [[label(word) for label in ENGLISH.values()] for word in english_words(texts)]
    return np.array(rows, dtype=np.int8).reshape(len(texts), len(ENGLISH))


# -----------------------------------------------------------------------------
# a stream of documents

def label_stream(ids, encoding):
    """
    Labels of tokens ids (n,), documents with end of text before each -> names, int8 (n, labels).

    encoding: tiktoken's; one named "bytes" is Python's. End of text has no label, and what stands
    before the first or after the last one is part of a document, mostly.
    """
    is_python = encoding.name == "bytes"
    names = list(PYTHON if is_python else ENGLISH)
    values = np.zeros((len(ids), len(names)), dtype=np.int8)
    ends = np.flatnonzero(ids == encoding.eot_token)
    documents = list(zip([0, *(ends + 1)], [*ends, len(ids)]))
    for start, end in progress(documents, desc="labelling documents"):
        document = ids[start:end]
        if is_python:
            values[start:end] = python_labels(document.astype(np.uint8).tobytes())
        else:
            values[start:end] = english_labels(token_texts(document, encoding))
    return names, values
