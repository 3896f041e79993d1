"""
Turns text into token bins: headerless uint16 files, as nanoGPT's, beside a meta.json of what they hold.

    python prepare_fineweb.py                               # 25B tokens of FineWeb-Edu, 50 GB, GPT-2 BPE
    python prepare_fineweb.py --source='my/*.jsonl' --out_dir=data/my --val_tokens=1e6
    python prepare_fineweb.py --source=python --tokenizer=bytes --out_dir=data/python --val_tokens=2e5
    python prepare_fineweb.py --shard=0/4 --out_dir=data/part0  # this machine's quarter, see README
    python prepare_fineweb.py --verify=data/fineweb_edu         # check every shard's checksum

Every document is one <|endoftext|> and its tokens. The first val_tokens are val_000000.bin, the rest
train_*.bin in shards of shard_tokens. Stopped at any moment, the same command goes on after the last
whole shard. data.py reads what this file writes.
"""
import collections
import glob
import hashlib
import importlib
import itertools
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from configurator import configure, run_main
from data import atomic, get_tokenizer, read_meta, write_json

# settings, see configurator.py
source = "fineweb-edu"  # or files and globs of .txt, .jsonl, .parquet, separated by commas; or "python"
out_dir = "data/fineweb_edu"  # directory of the bins: train.py's data_dir
tokenizer = "gpt2"  # or "bytes": 256 bytes and end of text, no download
tokens = 25_000_000_000  # stop after this many, val included
val_tokens = 10_000_000  # 0: no validation split, as on the second machine and after
shard_tokens = 100_000_000
skip = 0  # documents to leave out at the start
shard = "0/1"  # i/n: the i-th of n consecutive parts of the documents
on_error = "refuse"  # invalid UTF-8 in .txt and .jsonl; or "replace" by U+FFFD; both name file and line
workers = 0  # tokenizer threads; 0: one per core
verify = ""  # a directory to check instead

# -----------------------------------------------------------------------------
# sources: iterators over documents, in a fixed order

def documents(source, start, part, parts):
    """
    The documents of the part-th of `parts` consecutive parts of a source, from its number `start` on.

    A document is a str; a row that is none is yielded as it is.
    """
    if source == "fineweb-edu":
        return retrying(lambda start: fineweb_edu_rows(start, part, parts), start)
    paths = None if source == "python" else source_files(source)
    first, end = 0, None
    if parts > 1:
        total = sum(1 for _ in python_documents()) if paths is None else sum(map(count_rows, paths))
        first, end = part * total // parts, (part + 1) * total // parts
    if paths is None:
        rows = python_documents()
    else:
        rows = itertools.chain.from_iterable(file_rows(path) for path in paths)
    return itertools.islice(rows, first + start, end)


def fineweb_edu_rows(start, part, parts):
    """Texts of FineWeb-Edu's 100B-token sample, streamed."""
    from datasets import load_dataset
    rows = load_dataset("HuggingFaceFW/fineweb-edu", name="sample-100BT", split="train", streaming=True)
    rows = rows.shard(num_shards=parts, index=part)  # whole files, consecutive
    for row in rows.skip(start):
        yield row["text"]


def retrying(open_rows, start, waits=(1, 10, 60, 300)):
    """
    The rows of open_rows(start), opened again at the row where the stream broke.

    waits: seconds before each new attempt. Raises ValueError when they are used up without a row.
    """
    broken = 0
    while True:
        try:
            for row in open_rows(start):
                yield row
                start, broken = start + 1, 0
            return
        except Exception as error:  # whatever a network, a hub or a decoder raises
            if broken == len(waits):
                raise ValueError(
                    f"the stream broke at document {start} and {broken} times again "
                    f"({type(error).__name__}: {str(error)[:100]}): run the same command to go on"
                ) from None
            time.sleep(waits[broken])
            broken += 1


def python_documents():
    """Text that every Python ships: pydoc's topics and its library's sources, in a fixed shuffled order."""
    topics = importlib.import_module("pydoc_data.topics").topics
    library = os.path.dirname(os.__file__)
    files = [os.path.join(library, name) for name in os.listdir(library) if name.endswith(".py")]
    packages = ("asyncio collections concurrent email html http importlib json logging multiprocessing "
                "unittest urllib xml")
    for package in packages.split():
        files += glob.glob(os.path.join(library, package, "**", "*.py"), recursive=True)
    named = {f"topic {topic}": topic for topic in topics}
    named |= {os.path.relpath(path, library): path for path in files}
    for name in sorted(named, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if name.startswith("topic "):
            yield topics[named[name]]
        else:
            with open(named[name], encoding="utf-8", errors="replace") as file:
                yield file.read()


def source_files(source):
    """
    The files that a comma-separated list of paths and globs names, in order.

    Raises ValueError for one that isn't there or is of another kind.
    """
    paths = []
    for pattern in source.split(","):
        paths += sorted(glob.glob(pattern)) or [pattern]
    for path in paths:
        if not path.endswith((".txt", ".jsonl", ".parquet")):
            raise ValueError(f"source {path!r}: must be 'fineweb-edu', 'python' or files .txt, .jsonl, "
                             ".parquet")
        if not os.path.isfile(path):
            raise ValueError(f"source {path!r}: no such file")
    return paths


def file_rows(path):
    """A .txt file is one row, a .jsonl has one a line and a .parquet one a row, their field "text"."""
    if path.endswith(".txt"):
        yield "".join(decoded_lines(path))
    elif path.endswith(".jsonl"):
        for number, line in enumerate(decoded_lines(path), 1):
            try:
                row = json.loads(line)
            except ValueError:
                raise ValueError(f"{path}, line {number}: not JSON") from None
            yield row.get("text") if isinstance(row, dict) else None
    else:
        import pyarrow.parquet
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(columns=["text"]):
            yield from batch["text"].to_pylist()


def count_rows(path):
    """Number of rows that file_rows yields."""
    if path.endswith(".parquet"):
        import pyarrow.parquet
        return pyarrow.parquet.ParquetFile(path).metadata.num_rows
    if path.endswith(".txt"):
        return 1
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def decoded_lines(path):
    """Lines of a UTF-8 file; one that isn't valid is reported, then refused or replaced (on_error)."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                byte = f"byte {error.start} is 0x{line[error.start]:02x}"
                message = f"{path}, line {number}: invalid UTF-8 ({byte})"
                if on_error == "refuse":
                    fix = "--on-error=replace puts U+FFFD there"
                    raise ValueError(f"{message}; {fix}") from None
                print(f"{message}, replaced", file=sys.stderr)
                yield line.decode(errors="replace")


# -----------------------------------------------------------------------------
# encoding

def encode(text, encoding):
    """
    uint16 array: end of text, then the text as ordinary text (a literal "<|endoftext|>" is not special).

    Rows that are no document, empty or not a string, have no tokens at all.
    """
    if not isinstance(text, str) or not text:
        return np.empty(0, np.uint16)
    try:
        ids = encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # lone surrogates, from JSON escapes: encode_ordinary replaces them
        ids = encoding.encode_ordinary(text)
    return np.concatenate([[encoding.eot_token], ids]).astype(np.uint16)


def encoded(texts, encoding, workers):
    """Arrays of tokens, one per document and in order, made by threads (the tokenizer releases the GIL)."""

    def encode_batch(batch):
        return [encode(text, encoding) for text in batch]

    in_flight = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        while batch := list(itertools.islice(texts, 32)):
            in_flight.append(pool.submit(encode_batch, batch))
            if len(in_flight) > 4 * workers:  # backpressure: at most so many batches are in memory
                yield from in_flight.popleft().result()
        while in_flight:
            yield from in_flight.popleft().result()


class TokenStream:
    """
    The tokens of documents one after the other; document and offset say where the next token stands.

    started and skipped count the documents with tokens, and the rows without any, that it came to.
    """

    def __init__(self, arrays, document, offset):
        self.arrays = arrays
        self.document = document
        self.offset = offset
        self.started = 0
        self.skipped = 0
        self.rest = None

    def take(self, n):
        """Yield the next n tokens as arrays, fewer if the documents end."""
        while n:
            if self.rest is None:
                array = next(self.arrays, None)
                if array is None:
                    return
                self.rest = array[self.offset:]
                self.started += self.offset == 0 and len(array) > 0
                self.skipped += len(array) == 0
            piece, self.rest = self.rest[:n], self.rest[n:]
            n -= len(piece)
            self.offset += len(piece)
            if not len(self.rest):
                self.rest = None
                self.document += 1
                self.offset = 0
            yield piece


# -----------------------------------------------------------------------------
# shards

def write_shard(path, pieces, bar):
    """Write arrays to a file, atomically, unless they are empty -> number of tokens, sha256."""
    n_tokens = 0
    digest = hashlib.sha256()
    with atomic(path, "wb") as file:
        for piece in pieces:
            file.write(piece.tobytes())
            digest.update(piece.tobytes())
            n_tokens += len(piece)
            bar.update(len(piece))
    if not n_tokens:
        os.remove(path)
    return n_tokens, digest.hexdigest()


def parse_shard(text):
    """"i/n" -> (i, n). Raises ValueError unless 0 <= i < n."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise ValueError(f"shard={text!r}: must be i/n with 0 <= i < n, as in 0/4")
    return int(part), int(parts)


def open_meta(arguments, encoding):
    """
    The meta.json of out_dir, or that of a directory without shards.

    Raises ValueError if out_dir was prepared with other arguments, or has bins of unknown origin.
    """
    if os.path.exists(os.path.join(out_dir, "meta.json")):
        meta = read_meta(out_dir)
        for key, value in arguments.items():
            before = meta["arguments"].get(key)
            if before != value:
                raise ValueError(f"{out_dir} was prepared with {key}={before!r}, not {value!r}: use that "
                                 "or another --out_dir")
        return meta
    if glob.glob(os.path.join(out_dir, "*.bin")):
        raise ValueError(f"{out_dir} has .bin files but no meta.json: choose another --out_dir")
    return {
        "tokenizer": tokenizer,
        "vocab_size": encoding.n_vocab,
        "dtype": "uint16",
        "source": source,
        "tokens": {"train": 0, "val": 0},
        "documents": {"train": 0, "val": 0},
        "skipped_documents": 0,
        "arguments": arguments,
        "complete": False,
        "shards": [],
    }


def next_shard(meta, stream, bar):
    """Write the next shard and record it in meta -> False if nothing is left to write."""
    left = tokens - sum(meta["tokens"].values())
    split = "val" if val_tokens and not meta["shards"] else "train"
    number = sum(shard["split"] == split for shard in meta["shards"])
    name = f"{split}_{number:06d}.bin"
    pieces = stream.take(min(left, shard_tokens if split == "train" else val_tokens))
    n_tokens, checksum = write_shard(os.path.join(out_dir, name), pieces, bar)
    if n_tokens == 0:
        return False
    meta["tokens"][split] += n_tokens
    meta["documents"][split] += stream.started
    meta["skipped_documents"] += stream.skipped
    stream.started = stream.skipped = 0
    meta["shards"].append({
        "file": name,
        "split": split,
        "tokens": n_tokens,
        "sha256": checksum,
        "next": [stream.document, stream.offset],
    })
    return True


def prepare(arguments):
    """Write the missing shards, and meta.json after each. arguments: the settings that define them."""
    encoding = get_tokenizer(tokenizer)
    meta = open_meta(arguments, encoding)
    if meta["complete"]:
        return meta
    document, offset = meta["shards"][-1]["next"] if meta["shards"] else (0, 0)
    part, parts = parse_shard(shard)
    rows = documents(source, skip + document, part, parts)
    arrays = encoded(iter(rows), encoding, workers or os.cpu_count())
    stream = TokenStream(arrays, document, offset)
    os.makedirs(out_dir, exist_ok=True)
    meta_path = os.path.join(out_dir, "meta.json")
    written = sum(meta["tokens"].values())
    with tqdm(total=tokens, initial=written, unit="tok", unit_scale=True) as bar:
        while next_shard(meta, stream, bar):
            write_json(meta_path, meta)
        bar.total = sum(meta["tokens"].values())
    if not meta["tokens"]["train"]:
        raise ValueError(f"{source!r} has {meta['tokens']['val']} tokens here and val_tokens={val_tokens} "
                         "takes them all: lower --val_tokens and choose a new --out_dir")
    meta["complete"] = True
    write_json(meta_path, meta)
    return meta


# -----------------------------------------------------------------------------

def verify_shards(data_dir):
    """Compare every shard with meta.json, sizes and checksums -> a list of faults, empty if all is well."""
    faults = []
    for shard in tqdm(read_meta(data_dir)["shards"], unit="shard"):
        path = os.path.join(data_dir, shard["file"])
        try:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                    faults.append(f"{path}: its checksum is not the one in meta.json")
        except OSError as error:
            faults.append(f"{path}: {error.strerror}")
    return faults


def main():
    config = configure(globals())
    if verify:
        faults = verify_shards(verify)
        print("\n".join(faults) or f"{verify}: every shard is as meta.json says")
        sys.exit(bool(faults))
    for key, low in (("tokens", 1), ("shard_tokens", 1), ("val_tokens", 0), ("skip", 0), ("workers", 0)):
        if config[key] < low:
            raise ValueError(f"{key}={config[key]}: must be at least {low}")
    if on_error not in ("refuse", "replace"):
        raise ValueError(f"on_error={on_error!r}: must be 'refuse' or 'replace'")
    keys = "source tokenizer tokens val_tokens shard_tokens skip shard on_error"
    meta = prepare({key: config[key] for key in keys.split()})
    print(f"{out_dir}: {meta['tokens']['train']:,} train and {meta['tokens']['val']:,} val tokens, "
          f"{sum(meta['documents'].values()):,} documents, {len(meta['shards'])} shards")


if __name__ == "__main__":
    run_main(main)
