"""
What a Hugging Face folder of a model holds, beside its weights and its card: see export.py.
"""
import ast
import hashlib
import math
import os

from data import read_text

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
MODELING = "modeling_cayley_gpt"
TESTED = ("4.57.6", "5.24.0")  # releases of transformers that tests/test_export.py runs with


# -----------------------------------------------------------------------------
# the modeling file

def imported_modules(node):
    """Names of the modules that a node of a syntax tree imports."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {node.module}
    return set()


def without_imports(source, inlined, others):
    """
    A source without its imports of inlined modules (a set of names).

    Where it imports one of others it raises ImportError, as if that were not installed.
    """
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        modules = imported_modules(node)
        if not modules & (inlined | others):
            continue
        instead = ""
        if modules & others:
            instead = " " * node.col_offset + "raise ImportError('not a part of this file')"
        blank = [""] * (node.end_lineno - node.lineno)
        lines[node.lineno - 1:node.end_lineno] = [instead, *blank]
    return "\n".join(lines)


def inlined_source(names):
    """
    Modules such as "model" and "tools.hf_model" as one file that imports none of them.

    PyTorch knows operators by name in a whole process, and one that is defined again takes the
    first one's from under its model: theirs get a number of this source and of the module's name.
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    files = {file.removesuffix(".py") for file in os.listdir(root) if file.endswith(".py")}
    parts = ["import zlib\n\nMODULE = zlib.crc32(__name__.encode())"]
    for name in names:
        source = read_text(os.path.join(root, *name.split(".")) + ".py")
        parts.append(without_imports(source, set(names), files - set(names)))
    source = "\n\n\n".join(parts) + "\n"
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    return source.replace('custom_op("cayley::', f'custom_op("cayley_{digest}_" f"{{MODULE}}::')


# -----------------------------------------------------------------------------
# the tokenizer

def byte_characters():
    """The character that byte-level tokenizers write for each byte, as GPT-2 chose them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    return characters


def merged_pair(token, ranks):
    """The two tokens (bytes) that byte-pair encoding merges last into a token of ranks."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
        first = pairs.index(min(pairs))
        parts[first:first + 2] = [parts[first] + parts[first + 1]]
    return parts


def special_token(number, content):
    """A special token of tokenizer.json."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": True, **flags}


def tokenizer_json(encoding, padding=None):
    """
    tokenizer.json, for the tokenizers library, of a tiktoken Encoding: "gpt2" or "bytes".

    padding: the id of padding, None where there is none but end of text.
    """
    characters = byte_characters()

    def written(token):
        return "".join(characters[byte] for byte in token)

    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = [merged_pair(token, ranks) for token in tokens if len(token) > 1]
    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    words["use_regex"] = encoding.name == "gpt2"  # bytes are not divided into words
    special = [special_token(encoding.eot_token, END_OF_TEXT)]
    if padding is not None:
        special.append(special_token(padding, PADDING))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": words,
        "post_processor": None,
        "decoder": words,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {written(token): rank for token, rank in ranks.items()},
            "merges": [" ".join(map(written, pair)) for pair in merges],
        },
    }


# -----------------------------------------------------------------------------
# settings

def padding_id(model, encoding):
    """The first id of the vocabulary that no text has; None where every id is a token."""
    return encoding.n_vocab if encoding.n_vocab < model.config.vocab_size else None


def hf_configs(model, encoding):
    """What the folder's .json files hold, {name: value}."""
    end = encoding.eot_token
    padding = padding_id(model, encoding)
    has_padding = padding is not None
    special = {"bos_token_id": end, "eos_token_id": end}
    special["pad_token_id"] = padding if has_padding else end
    padding_ids = list(range(encoding.n_vocab, model.config.vocab_size))
    return {
        "config.json": {
            "architectures": ["CayleyGPTForCausalLM"],
            "auto_map": {
                "AutoConfig": f"{MODELING}.CayleyGPTConfig",
                "AutoModelForCausalLM": f"{MODELING}.CayleyGPTForCausalLM",
            },
            "model_type": "cayley_gpt",
            "dtype": "float32",
            "tie_word_embeddings": True,
            "transformers_version": TESTED[-1],
            "tested_with_transformers": list(TESTED),
            **vars(model.config),
            **special,
        },
        "generation_config.json": {
            **special,
            "suppress_tokens": padding_ids or None,  # of the vocabulary: never sampled
            "disable_compile": True,  # with a static cache each length would be compiled anew
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "pad_token": PADDING if has_padding else END_OF_TEXT,
            "padding_side": "left",
            "model_max_length": model.config.block_size,
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
        },
        "tokenizer.json": tokenizer_json(encoding, padding),
    }
