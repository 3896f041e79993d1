"""
Turns text into token bins: uint16 files without a header, as nanoGPT's, beside a meta.json.

    python prepare_fineweb.py                        # 25B tokens of FineWeb-Edu, 50 GB, GPT-2 BPE
    python prepare_fineweb.py --source='my/*.jsonl' --out_dir=data/my
    python prepare_fineweb.py --source='lib/**/*.py' --tokenizer=bytes --out_dir=data/code
    python prepare_fineweb.py --source=python --tokenizer=bytes --out_dir=data/python   # offline
    python prepare_fineweb.py --shard=0/4 --out_dir=data/part0  # this machine's quarter
    python prepare_fineweb.py --verify=data/fineweb_edu         # check every shard's checksum

A row of a .jsonl or .parquet file is a document, its field "text"; any other file is one document.
Each becomes one <|endoftext|> and its tokens. The first val_tokens of the source are
val_000000.bin, the rest train_*.bin in shards of shard_tokens. Unless val_tokens is given it is at
most the first 1% of the source: of a single book that is its beginning.

Stopped at any moment, the same command goes on after the last whole shard: meta.json has its
place, as file, row group, row and token. FineWeb-Edu is read file by file (2 GB each); the next is
fetched while one is tokenised, and each is removed when done. data.py reads what this file writes.
"""
import collections
import contextlib
import functools
import glob
import hashlib
import itertools
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from configurator import configure
from data import (
    TOKENIZERS,
    atomic,
    check_shard,
    encode,
    get_tokenizer,
    lock,
    progress,
    read_json_lines,
    read_meta,
    read_text,
    write_json,
)

# settings, see configurator.py
source = "fineweb-edu"  # or paths and globs with commas: .jsonl, .parquet, text; or "python"
out_dir = "data/fineweb_edu"  # directory of the bins: train.py's data_dir
tokenizer = "gpt2"  # or "bytes": 256 bytes and end of text, no download
tokens = 25_000_000_000  # stop after this many, val included
val_tokens = 10_000_000  # by default not over 1% of the source; 0: none, as on a second machine
shard_tokens = 100_000_000
shard = "0/1"  # i/n: the i-th of n consecutive parts of FineWeb-Edu's files
on_error = "refuse"  # invalid UTF-8 in text and .jsonl; or "replace" by U+FFFD; both name the line
workers = 0  # tokenizer threads; 0: one per core
verify = ""  # a directory to check instead

DEFAULT_VAL_TOKENS = val_tokens
WAITS = (1, 10, 60, 300)  # seconds before each new attempt at what a network or a disk refused
# bad input, and ours: another attempt would meet them again
MISTAKES = (ValueError, TypeError, AttributeError, NameError, LookupError)
DATA_SET = "HuggingFaceFW/fineweb-edu"
BYTES_PER_TOKEN = {"gpt2": 4, "bytes": 1}  # roughly, for the default val split and the progress bar

# -----------------------------------------------------------------------------
# the hub: its calls are these two, which tests replace by a local folder

def hub_files():
    """FineWeb-Edu's 100B-token sample -> the data set's commit, {file: bytes} in their order."""
    from huggingface_hub import HfApi
    commit = HfApi().repo_info(DATA_SET, repo_type="dataset").sha
    tree = HfApi().list_repo_tree(DATA_SET, "sample/100BT", repo_type="dataset", revision=commit)
    sizes = {entry.path: entry.size for entry in tree if entry.path.endswith(".parquet")}
    return commit, dict(sorted(sizes.items()))


def hub_fetch(file, commit, directory):
    """Put a file of the data set at directory/file, whole."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars
    disable_progress_bars()  # ours counts tokens
    hf_hub_download(DATA_SET, file, repo_type="dataset", revision=commit, local_dir=directory)


class Downloads:
    """
    The hub's files on the disk, each while it is read and the next one already.

    files: {file: bytes} of a commit. directory: where they are put.
    """

    def __init__(self, files, commit, directory):
        self.files = files
        self.commit = commit
        self.directory = directory
        self.prefetch = None  # the thread that fetches the next file

    def fetch(self, file):
        """Path of a file, fetched unless it's there. Raises OSError if its size has changed."""
        path = os.path.join(self.directory, file)
        expected = self.files[file]
        if not os.path.exists(path) or os.path.getsize(path) != expected:
            self.remove(file)
            hub_fetch(file, self.commit, self.directory)
        size = os.path.getsize(path)
        if size != expected:
            raise OSError(f"it has {size} bytes, and {expected} when it was listed")
        return path

    def remove(self, file):
        """Remove a file from the disk."""
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(self.directory, file))

    def fetch_ahead(self, file):
        """fetch; what fails is told when it fails again in its turn."""
        with contextlib.suppress(Exception):
            self.fetch(file)

    def rows(self, file, row_group, start):
        """file_rows of a file of the hub. One that turns out damaged is removed from the disk."""
        if self.prefetch:
            self.prefetch.join()
        path = self.fetch(file)
        names = list(self.files)
        following = names[names.index(file) + 1:][:1]
        if following:  # a daemon doesn't keep the process alive
            self.prefetch = threading.Thread(target=self.fetch_ahead, args=following, daemon=True)
            self.prefetch.start()
        try:
            yield from file_rows(path, row_group, start)
        except OSError:
            self.remove(file)
            raise

    def retried_rows(self, file, row_group, row):
        """rows, fetched again where that breaks; the file is removed from the disk at the end."""
        open_rows = functools.partial(self.rows, file, row_group)
        yield from retrying(open_rows, row, f"{file}, from row group {row_group}")
        self.remove(file)


def retrying(open_rows, start, name="the stream", waits=WAITS):
    """
    The rows of open_rows(start), opened again at the row where the stream broke.

    waits: seconds before each new attempt; a row makes them all available again. Raises ValueError
    when they are used up. MISTAKES pass at once.
    """
    broken = 0
    while True:
        try:
            for row in open_rows(start):
                yield row
                start, broken = start + 1, 0
            return
        except MISTAKES:
            raise
        except Exception as error:  # whatever a network, a hub or a decoder raises
            if broken == len(waits):
                raise ValueError(f"{name} broke at document {start} and {broken} times again "
                                 f"({in_one_line(error)}): run the same command to go on") from None
            time.sleep(waits[broken])
            broken += 1


def in_one_line(error):
    """An exception's type and message, which libraries spread over several lines."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:200]}"


# -----------------------------------------------------------------------------
# sources: rows with their places, in a fixed order

class Place(NamedTuple):
    """Where a row is: a file's name, a row group of it (0 but in .parquet), a row of that."""

    file: str
    row_group: int
    row: int


def list_files():
    """
    The commit of the source ("" but of the hub) and {file: bytes} of this shard, in their order.

    Raises ValueError for files that aren't there, or a hub that doesn't answer.
    """
    part, parts = parse_shard(shard)
    if source != "fineweb-edu":
        if parts > 1:
            raise ValueError(f"shard={shard!r}: only FineWeb-Edu is read in parts, of whole files; "
                             "choose this machine's files by --source")
        if source == "python":
            return "", {"python": 0}
        return "", {path: os.path.getsize(path) for path in source_files()}
    try:
        commit, files = hub_files()
    except Exception as error:  # whatever a network or a hub raises
        raise ValueError("FineWeb-Edu's files can't be listed on the hub "
                         f"({in_one_line(error)})") from None
    names = list(files)
    names = names[part * len(names) // parts:(part + 1) * len(names) // parts]
    if not names:
        raise ValueError(f"shard={shard}: FineWeb-Edu has {len(files)} files, use fewer parts")
    return commit, {name: files[name] for name in names}


def parse_shard(text):
    """"i/n" -> (i, n). Raises ValueError unless 0 <= i < n."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise ValueError(f"shard={text!r}: must be i/n with 0 <= i < n, as in 0/4")
    return int(part), int(parts)


def source_files():
    """
    The files that source names by paths and globs, each pattern's in alphabetical order.

    Raises ValueError for one that isn't there, or .parquet without "text".
    """
    paths = []
    for pattern in source.split(","):
        found = sorted(glob.glob(pattern, recursive=True))
        paths += [path for path in found if os.path.isfile(path)] or [pattern]
    for path in paths:
        if not os.path.isfile(path):
            raise ValueError(f"source {path!r}: no such file; must be 'fineweb-edu', 'python', or "
                             "paths and globs of .jsonl, .parquet and text files")
        if path.endswith(".parquet"):
            open_parquet(path)
    return paths


def documents(files, open_rows, place=None):
    """
    Yield (Place, text) of every row of files in turn, from a place on.

    open_rows: as file_rows. A row that is no document has a text that is no str, or an empty one.
    """
    names = list(files)
    start = (0, 0)
    if place:
        names = names[names.index(place.file):]
        start = (place.row_group, place.row)
    for name in names:
        for row_group, row, text in open_rows(name, *start):
            yield Place(name, row_group, row), text
        start = (0, 0)


def file_rows(path, row_group=0, row=0):
    """
    Yield (row group, row in it, text) of a file, from a row on, which is counted from row_group.

    A .jsonl file has one a line and a .parquet one a row, their field "text"; any other file is
    one row of text. "python" is Python's own text.
    """
    if path.endswith(".parquet"):
        yield from parquet_rows(path, row_group, row)
        return
    if path == "python":
        texts = itertools.islice(python_documents(), row, None)
    elif path.endswith(".jsonl"):
        values = read_json_lines(path, on_error, row)
        texts = (value.get("text") if isinstance(value, dict) else None for value in values)
    else:
        texts = [read_text(path, on_error)]
    for number, text in enumerate(texts, row):
        yield 0, number, text


def parquet_rows(path, row_group, row):
    """file_rows of a .parquet file. Raises OSError if it is damaged."""
    import pyarrow
    file = open_parquet(path)
    try:
        for group in range(row_group, file.num_row_groups):
            n_rows = file.metadata.row_group(group).num_rows
            if row < n_rows:
                batches = file.iter_batches(1024, row_groups=[group], columns=["text"])
                texts = itertools.chain.from_iterable(b["text"].to_pylist() for b in batches)
                for number, text in enumerate(itertools.islice(texts, row, None), row):
                    yield group, number, text
            row = max(0, row - n_rows)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise OSError(f"{path} is damaged ({in_one_line(error)})") from None


def open_parquet(path):
    """A pyarrow ParquetFile. Raises OSError if it is damaged, ValueError if it has no text."""
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise OSError(f"{path} is not a whole .parquet file ({in_one_line(error)})") from None
    columns = file.schema_arrow.names
    if "text" not in columns:
        raise ValueError(f"{path}: it has no column 'text', but {', '.join(columns)}")
    return file


def python_documents():
    """Text that every Python ships: pydoc's topics and its library, in a fixed shuffled order."""
    from pydoc_data.topics import topics
    library = os.path.dirname(os.__file__)
    files = [os.path.join(library, name) for name in os.listdir(library) if name.endswith(".py")]
    packages = ("asyncio collections concurrent email html http importlib json logging "
                "multiprocessing unittest urllib xml")
    for package in packages.split():
        files += glob.glob(os.path.join(library, package, "**", "*.py"), recursive=True)
    texts = {f"topic {name}": text for name, text in topics.items()}
    for path in files:
        with open(path, encoding="utf-8", errors="replace") as file:
            texts[os.path.relpath(path, library)] = file.read()
    for name in sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest()):
        yield texts[name]


def text_bytes(path):
    """About how many bytes of text a local file has."""
    if path == "python":
        return sum(len(text) for text in python_documents())
    if not path.endswith(".parquet"):
        return os.path.getsize(path)
    metadata = open_parquet(path).metadata
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == "text")


# -----------------------------------------------------------------------------
# encoding

def document_tokens(place, text, encoding):
    """
    uint16 array: end of text, then the text, in which a literal "<|endoftext|>" is not special.

    Rows that are no document, empty or not a string, have no tokens at all.
    """
    if not isinstance(text, str) or not text:
        return np.empty(0, np.uint16)
    try:
        text.encode()
    except UnicodeEncodeError:  # an escape in JSON makes them
        print(f"{place.file}, row {place.row + 1}: a lone surrogate, replaced", file=sys.stderr)
    return np.array([encoding.eot_token, *encode(encoding, text)], np.uint16)


def encoded(rows, encoding, workers):
    """
    Yield (place, document_tokens) of rows (place, text), in their order.

    workers threads make them: the tokenizer releases the GIL.
    """

    def encode_batch(batch):
        return [(place, document_tokens(place, text, encoding)) for place, text in batch]

    in_flight = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        while batch := list(itertools.islice(rows, 32)):
            in_flight.append(pool.submit(encode_batch, batch))
            if len(in_flight) > 4 * workers:  # backpressure: so many batches are in memory
                yield from in_flight.popleft().result()
        while in_flight:
            yield from in_flight.popleft().result()


class TokenStream:
    """
    The tokens of documents one after the other.

    arrays: iterator over (place, tokens).
    place, taken: the document that was last taken from, and how many of its tokens.
    started, skipped: documents that were begun, and rows without tokens.
    """

    def __init__(self, arrays):
        self.arrays = arrays
        self.place = None
        self.taken = 0
        self.started = 0
        self.skipped = 0
        self.rest = np.empty(0, np.uint16)

    def goes_on(self):
        """Whether there are more tokens: opens the next document that has any."""
        if len(self.rest):
            return True
        for place, tokens in self.arrays:
            if len(tokens):
                self.place, self.taken, self.rest = place, 0, tokens
                self.started += 1
                return True
            self.skipped += 1
        return False

    def take(self, n):
        """Yield the next n tokens as arrays, fewer if the documents end."""
        while n and self.goes_on():
            piece, self.rest = self.rest[:n], self.rest[n:]
            n -= len(piece)
            self.taken += len(piece)
            yield piece


# -----------------------------------------------------------------------------
# shards

def meta_path():
    return os.path.join(out_dir, "meta.json")


def open_meta(arguments):
    """
    The meta.json of out_dir, or None if no shard was written there.

    Raises ValueError if out_dir was prepared with other arguments or from other files, or has bins
    of unknown origin.
    """
    if not os.path.exists(meta_path()):
        if any(name.endswith(".bin") for name in os.listdir(out_dir)):
            raise ValueError(f"{out_dir} has .bin files but no meta.json: choose another --out_dir")
        return None
    meta = read_meta(out_dir)
    if not meta["shards"]:
        return None
    if not meta["complete"] and "cursor" not in meta["shards"][-1]:
        raise ValueError(f"{out_dir} was begun by an older prepare_fineweb.py, which left no place "
                         "to go on from: choose another --out_dir")
    for entry in meta["shards"]:
        check_shard(out_dir, entry)
    before = meta["arguments"]
    if not meta["complete"]:
        if before.get("on_error") == "refuse":
            before["on_error"] = on_error  # what is written had no error
        if sum(meta["tokens"].values()) <= tokens:
            before["tokens"] = tokens  # it decides the end alone
    for key, value in arguments.items():
        if before.get(key) != value:
            raise ValueError(f"{out_dir} was prepared with {key}={before.get(key)!r}, not "
                             f"{value!r}: use that or another --out_dir")
    if not meta["complete"] and source != "fineweb-edu":  # of a commit, Downloads sees the sizes
        check_files(meta["files"])
    return meta


def check_files(before):
    """Raise ValueError if the source's {file: bytes} aren't those that the shards are made of."""
    _, files = list_files()
    for name in {**before, **files}:
        if before.get(name) != files.get(name):
            raise ValueError(f"{name}: {before.get(name, 'no')} bytes when {out_dir} was begun, "
                             f"{files.get(name, 'no')} now: choose another --out_dir")


def new_meta(arguments, encoding):
    """A meta.json without shards, written; bins of a preparation that came to nothing go."""
    commit, files = list_files()
    meta = {
        "tokenizer": tokenizer,
        "vocab_size": encoding.n_vocab,
        "dtype": "uint16",
        "source": source,
        "commit": commit,
        "files": files,
        "tokens": {"train": 0, "val": 0},
        "documents": {"train": 0, "val": 0},
        "skipped_documents": 0,
        "arguments": arguments,
        "complete": False,
        "shards": [],
    }
    write_json(meta_path(), meta)
    for split in ("train", "val"):
        for path in glob.glob(os.path.join(glob.escape(out_dir), f"{split}_*.bin")):
            os.remove(path)
    return meta


def expected_tokens(files):
    """About how many tokens there will be, at most the setting."""
    if source == "fineweb-edu":
        return tokens
    return min(tokens, sum(map(text_bytes, files)) // BYTES_PER_TOKEN[tokenizer])


def open_stream(meta, encoding):
    """The TokenStream of what is still to be written."""
    open_rows = file_rows
    if source == "fineweb-edu":
        downloads = Downloads(meta["files"], meta["commit"], os.path.join(out_dir, "downloads"))
        open_rows = downloads.retried_rows
    place, taken = None, 0
    if meta["shards"]:
        *place, taken = meta["shards"][-1]["cursor"].values()
        place = Place(*place)
    rows = documents(meta["files"], open_rows, place)
    stream = TokenStream(encoded(rows, encoding, workers or os.cpu_count()))
    for _ in stream.take(taken):  # the last shard has them
        stream.started = 0
    return stream


def write_shard(meta, split, n_tokens, stream, bar):
    """Write the stream's next n_tokens, fewer at its end, as a shard of split, recorded in meta."""
    number = sum(entry["split"] == split for entry in meta["shards"])
    name = f"{split}_{number:06d}.bin"
    before = meta["tokens"][split]
    digest = hashlib.sha256()
    with atomic(os.path.join(out_dir, name), "wb") as file:
        for piece in stream.take(n_tokens):
            file.write(piece.tobytes())
            digest.update(piece.tobytes())
            meta["tokens"][split] += len(piece)
            bar.update(len(piece))
    meta["documents"][split] += stream.started
    meta["skipped_documents"] += stream.skipped
    stream.started = stream.skipped = 0
    meta["shards"].append({
        "file": name,
        "split": split,
        "tokens": meta["tokens"][split] - before,
        "sha256": digest.hexdigest(),
        "cursor": {**stream.place._asdict(), "token": stream.taken},
    })
    write_json(meta_path(), meta)


def prepare(arguments):
    """
    Write the missing shards, and meta.json after each.

    arguments: the settings that define the tokens. Raises ValueError as the functions above do,
    and if nothing is left for training.
    """
    encoding = get_tokenizer(tokenizer)
    meta = open_meta(arguments) or new_meta(arguments, encoding)
    if meta["complete"]:
        return meta
    stream = open_stream(meta, encoding)
    total = expected_tokens(meta["files"])
    n_val = min(val_tokens, total // 100) if val_tokens == DEFAULT_VAL_TOKENS else val_tokens
    written = sum(meta["tokens"].values())
    with progress(total=total, initial=written, unit="tok", unit_scale=True) as bar:
        if n_val and not meta["shards"] and stream.goes_on():
            write_shard(meta, "val", min(n_val, tokens), stream, bar)
        while (left := tokens - sum(meta["tokens"].values())) and stream.goes_on():
            write_shard(meta, "train", min(left, shard_tokens), stream, bar)
        bar.total = sum(meta["tokens"].values())
    shutil.rmtree(os.path.join(out_dir, "downloads"), ignore_errors=True)
    if not meta["tokens"]["train"]:
        write_json(meta_path(), {**meta, "shards": []})
        if not meta["shards"]:
            raise ValueError(f"{source!r} has no text here ({stream.skipped} rows without): .jsonl "
                             "and .parquet need a field 'text' that is text")
        raise ValueError(f"{source!r} has {meta['tokens']['val']} tokens here and "
                         f"val_tokens={val_tokens} takes them all: lower --val_tokens")
    meta["complete"] = True
    write_json(meta_path(), meta)
    return meta


# -----------------------------------------------------------------------------

def verify_shards(data_dir):
    """Compare every shard with meta.json's checksum -> a list of faults, empty if all is well."""
    faults = []
    for entry in progress(read_meta(data_dir)["shards"], unit="shard"):
        path = os.path.join(data_dir, entry["file"])
        try:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry.get("sha256"):
                    faults.append(f"{path}: its checksum is not the one in meta.json")
        except OSError as error:
            faults.append(f"{path}: {error.strerror}")
    return faults


def main():
    config = configure(
        globals(),
        choices={"tokenizer": TOKENIZERS, "on_error": ("refuse", "replace")},
        at_least={"tokens": 1, "val_tokens": 0, "shard_tokens": 1, "workers": 0},
    )
    if verify:
        faults = verify_shards(verify)
        print("\n".join(faults) or f"{verify}: every shard is as meta.json says")
        sys.exit(bool(faults))
    keys = "source tokenizer tokens val_tokens shard_tokens shard on_error"
    with lock(out_dir):
        meta = prepare({key: config[key] for key in keys.split()})
    n_train, n_val = meta["tokens"]["train"], meta["tokens"]["val"]
    cut = ""
    if n_val < val_tokens:
        cut = f" (the source's first {n_val / (n_train + n_val):.1%}, --val_tokens=N sets it)"
    print(f"{out_dir}: {n_train:,} train and {n_val:,} val tokens{cut}, "
          f"{sum(meta['documents'].values()):,} documents, {len(meta['shards'])} shards")


if __name__ == "__main__":
    main()
