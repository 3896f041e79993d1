"""
Turns text into token bins: uint16 files without a header, as nanoGPT's, beside a meta.json.

    python prepare_fineweb.py                        # 25B tokens of FineWeb-Edu, 50 GB, GPT-2 BPE
    python prepare_fineweb.py --source='my/*.jsonl' --out_dir=data/my
    python prepare_fineweb.py --source=python --tokenizer=bytes --out_dir=data/python   # offline
    python prepare_fineweb.py --shard=0/4 --out_dir=data/part0  # this machine's quarter, see README
    python prepare_fineweb.py --verify=data/fineweb_edu         # check every shard's checksum

Every document is one <|endoftext|> and its tokens. The first val_tokens are val_000000.bin, the
rest train_*.bin in shards of shard_tokens. Stopped at any moment, the same command goes on after
the last whole shard: meta.json has its place, as parquet file, row group, row and token.
FineWeb-Edu is read file by file (2 GB each); the next is fetched while one is tokenised, and each
is removed when done. data.py reads what this file writes.
"""
import collections
import contextlib
import functools
import glob
import hashlib
import importlib
import itertools
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from configurator import configure
from data import (
    atomic,
    check_fields,
    check_shard,
    get_tokenizer,
    lock,
    read_json_lines,
    read_lines,
    read_meta,
    read_text,
    write_json,
)

# settings, see configurator.py
source = "fineweb-edu"  # or files and globs of .txt, .jsonl, .parquet, with commas; or "python"
out_dir = "data/fineweb_edu"  # directory of the bins: train.py's data_dir
tokenizer = "gpt2"  # or "bytes": 256 bytes and end of text, no download
tokens = 25_000_000_000  # stop after this many, val included
val_tokens = 10_000_000  # by default not over 1% of the source; 0: none, as on a second machine
shard_tokens = 100_000_000
skip = 0  # documents to leave out at the start
shard = "0/1"  # i/n: the i-th of n consecutive parts: of FineWeb-Edu's files, or of the documents
on_error = "refuse"  # invalid UTF-8 in .txt and .jsonl; or "replace" by U+FFFD; both name the line
workers = 0  # tokenizer threads; 0: one per core
verify = ""  # a directory to check instead

DEFAULT_VAL_TOKENS = val_tokens
WAITS = (1, 10, 60, 300)  # seconds before each new attempt at what a network or a disk refused
MISTAKES = (  # bad input, and ours: another attempt would meet them again
    ValueError, TypeError, AttributeError, NameError, LookupError, ImportError, AssertionError
)
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

    def path(self, file):
        """Path of a file, fetched unless it's there. Raises OSError if its size has changed."""
        path = os.path.join(self.directory, file)
        expected = self.files[file]
        if os.path.exists(path) and os.path.getsize(path) == expected:
            return path
        self.remove(file)
        hub_fetch(file, self.commit, self.directory)
        size = os.path.getsize(path)
        if size != expected:
            self.remove(file)
            raise OSError(f"it has {size} bytes, and {expected} when it was listed")
        return path

    def remove(self, file):
        """Remove a file from the disk."""
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(self.directory, file))

    def start_prefetch(self, file):
        """Begin to fetch a file; path finds it. The thread doesn't keep the process alive."""

        def fetch():
            with contextlib.suppress(Exception):  # it fails again in its turn, and is told then
                self.path(file)

        self.prefetch = threading.Thread(target=fetch, daemon=True)
        self.prefetch.start()

    def rows(self, file, row_group, start):
        """file_rows of a file of the hub. One that turns out damaged is removed from the disk."""
        if self.prefetch:
            self.prefetch.join()
        path = self.path(file)
        names = list(self.files)
        if file != names[-1]:
            self.start_prefetch(names[names.index(file) + 1])
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


def list_files(part, parts):
    """
    The commit of the source ("" but of the hub) and {file: bytes} of a part, in their order.

    Raises ValueError for files that aren't there, or a hub that doesn't answer.
    """
    if source == "python":
        return "", {"python": 0}
    if source != "fineweb-edu":
        return "", {path: os.path.getsize(path) for path in source_files(source)}
    try:
        commit, files = hub_files()
    except MISTAKES:
        raise
    except Exception as error:  # whatever a network or a hub raises
        raise ValueError("FineWeb-Edu's files can't be listed on the hub "
                         f"({in_one_line(error)})") from None
    names = list(files)
    names = names[part * len(names) // parts:(part + 1) * len(names) // parts]
    if not names:
        raise ValueError(f"shard={shard}: FineWeb-Edu has {len(files)} files, use fewer parts")
    return commit, {name: files[name] for name in names}


def source_files(source):
    """
    The files that a comma-separated list of paths and globs names, in order.

    Raises ValueError for one that isn't there, or of another kind, or .parquet without "text".
    """
    paths = []
    for pattern in source.split(","):
        paths += sorted(glob.glob(pattern)) or [pattern]
    for path in paths:
        if not path.endswith((".txt", ".jsonl", ".parquet")):
            raise ValueError(f"source {path!r}: must be 'fineweb-edu', 'python' or files .txt, "
                             ".jsonl, .parquet")
        if not os.path.isfile(path):
            raise ValueError(f"source {path!r}: no such file")
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

    A .txt file is one row; a .jsonl has one a line and a .parquet one a row, their field "text".
    "python" is Python's own text.
    """
    if path.endswith(".parquet"):
        yield from parquet_rows(path, row_group, row)
        return
    if path == "python":
        texts = itertools.islice(python_documents(), row, None)
    elif path.endswith(".txt"):
        texts = [read_text(path, on_error)][row:]
    else:
        values = read_json_lines(path, on_error, row)
        texts = (value.get("text") if isinstance(value, dict) else None for value in values)
    for number, text in enumerate(texts, row):
        yield 0, number, text


def parquet_rows(path, row_group, row):
    """file_rows of a .parquet file. Raises OSError if it is damaged."""
    import pyarrow
    file = open_parquet(path)
    while row_group < file.num_row_groups and row >= file.metadata.row_group(row_group).num_rows:
        row -= file.metadata.row_group(row_group).num_rows
        row_group += 1
    try:
        for group in range(row_group, file.num_row_groups):
            batches = file.iter_batches(1024, row_groups=[group], columns=["text"])
            columns = (batch["text"].to_pylist() for batch in batches)
            texts = itertools.chain.from_iterable(columns)
            for number, text in enumerate(itertools.islice(texts, row, None), row):
                yield group, number, text
            row = 0
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
    topics = importlib.import_module("pydoc_data.topics").topics
    library = os.path.dirname(os.__file__)
    files = [os.path.join(library, name) for name in os.listdir(library) if name.endswith(".py")]
    packages = ("asyncio collections concurrent email html http importlib json logging "
                "multiprocessing unittest urllib xml")
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


def count_rows(path):
    """Number of rows that file_rows yields."""
    if path.endswith(".parquet"):
        return open_parquet(path).metadata.num_rows
    if path == "python":
        return sum(1 for _ in python_documents())
    if path.endswith(".txt"):
        return 1
    return sum(bool(line.strip()) for line in read_lines(path, on_error))


def text_bytes(path):
    """About how many bytes of text a local file has."""
    if path == "python":
        return sum(len(text) for text in python_documents())
    if not path.endswith(".parquet"):
        return os.path.getsize(path)
    metadata = open_parquet(path).metadata
    total = 0
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            if column.path_in_schema == "text":
                total += column.total_uncompressed_size
    return total


# -----------------------------------------------------------------------------
# encoding

def encode(text, encoding):
    """
    uint16 array: end of text, then the text, in which a literal "<|endoftext|>" is not special.

    Rows that are no document, empty or not a string, have no tokens at all.
    """
    if not isinstance(text, str) or not text:
        return np.empty(0, np.uint16)
    try:
        ids = encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # lone surrogates, from JSON escapes: encode_ordinary replaces them
        ids = encoding.encode_ordinary(text)
    return np.concatenate([[encoding.eot_token], ids]).astype(np.uint16)


def encoded(rows, encoding, workers):
    """
    Yield (place, tokens as encode has them) of rows (place, text), in their order.

    workers threads make them: the tokenizer releases the GIL.
    """

    def encode_batch(batch):
        return [(place, encode(text, encoding)) for place, text in batch]

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

    arrays: iterator over (place, tokens). taken: tokens of the first document to leave out.
    place, taken: the document that was last taken from, and how many of its tokens.
    started, skipped: documents that were begun, and rows without tokens.
    """

    def __init__(self, arrays, taken=0):
        self.arrays = arrays
        self.place = None
        self.taken = 0
        self.started = 0
        self.skipped = 0
        self.leave_out = taken
        self.rest = np.empty(0, np.uint16)

    def take(self, n):
        """Yield the next n tokens as arrays, fewer if the documents end."""
        while n and self._open_next():
            piece, self.rest = self.rest[:n], self.rest[n:]
            n -= len(piece)
            self.taken += len(piece)
            yield piece

    def _open_next(self):
        """Open the next document that has tokens unless one is open -> False at the end."""
        while not len(self.rest):
            place, array = next(self.arrays, (None, None))
            if place is None:
                return False
            if len(array):
                self.started += self.leave_out == 0
                self.place = place
                self.taken = self.leave_out
                self.rest = array[self.leave_out:]
                self.leave_out = 0
            else:
                self.skipped += 1
        return True


# -----------------------------------------------------------------------------
# shards

def write_shard(path, pieces, bar):
    """Write arrays to a file, atomically -> number of tokens, sha256. No file if there are none."""
    first = next(pieces, None)
    if first is None:
        return 0, ""
    n_tokens = 0
    digest = hashlib.sha256()
    with atomic(path, "wb") as file:
        for piece in itertools.chain([first], pieces):
            file.write(piece.tobytes())
            digest.update(piece.tobytes())
            n_tokens += len(piece)
            bar.update(len(piece))
    return n_tokens, digest.hexdigest()


def parse_shard(text):
    """"i/n" -> (i, n). Raises ValueError unless 0 <= i < n."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise ValueError(f"shard={text!r}: must be i/n with 0 <= i < n, as in 0/4")
    return int(part), int(parts)


def open_meta(arguments):
    """
    The meta.json of out_dir, or None if no shard was written there.

    Raises ValueError if out_dir was prepared with other arguments, or has bins of unknown origin.
    """
    if not os.path.exists(os.path.join(out_dir, "meta.json")):
        if glob.glob(os.path.join(out_dir, "*.bin")):
            raise ValueError(f"{out_dir} has .bin files but no meta.json: choose another --out_dir")
        return None
    meta = read_meta(out_dir)
    if not meta["shards"]:
        return None
    if not meta["complete"] and "files" not in meta:
        raise ValueError(f"{out_dir} was begun by an older prepare_fineweb.py, which left no place "
                         "to go on from: choose another --out_dir")
    check_meta(meta)
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
    return meta


def check_meta(meta):
    """Raise ValueError unless a meta.json has what is needed to go on, and its shards are there."""
    path = os.path.join(out_dir, "meta.json")
    check_fields(path, meta, {"arguments": dict, "tokens": dict, "documents": dict})
    for key in ("tokens", "documents"):
        check_fields(f"{path}, {key}", meta[key], {"train": int, "val": int})
    for shard in meta["shards"]:
        check_shard(out_dir, shard)
    if meta["complete"]:
        return
    check_fields(path, meta, {"files": dict, "skipped_documents": int})
    name = f"{path}, its last shard"
    check_fields(name, meta["shards"][-1], {"cursor": dict})
    cursor = meta["shards"][-1]["cursor"]
    kinds = {"file": str, "row_group": int, "row": int, "token": int}
    check_fields(f"{name}'s cursor", cursor, kinds)
    numbers = [cursor[key] for key in ("row_group", "row", "token")]
    if cursor["file"] not in meta["files"] or min(numbers) < 0:
        raise ValueError(f"{name}: its cursor {cursor} is no place in a file of this source")


def new_meta(arguments, encoding, part, parts):
    """The meta.json of a directory without shards, written there."""
    commit, files = list_files(part, parts)
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
    clear(meta)
    return meta


def clear(meta):
    """Write a meta.json without shards, then remove those of a preparation that came to nothing."""
    meta |= {"tokens": {"train": 0, "val": 0}, "documents": {"train": 0, "val": 0}, "shards": []}
    meta["skipped_documents"] = 0
    write_json(os.path.join(out_dir, "meta.json"), meta)
    for split in ("train", "val"):
        for path in glob.glob(os.path.join(glob.escape(out_dir), f"{split}_*.bin")):
            os.remove(path)


def expected_tokens(files, parts):
    """About how many tokens there will be, at most the setting."""
    if source == "fineweb-edu":
        return tokens
    return min(tokens, sum(map(text_bytes, files)) // BYTES_PER_TOKEN[tokenizer] // parts)


def check_files(meta):
    """Raise ValueError if the local files of a source aren't those that the shards are made of."""
    if source == "fineweb-edu":
        return  # a commit of the hub doesn't change, and Downloads looks at the sizes
    _, files = list_files(0, 1)
    before = meta["files"]
    for name in {**before, **files}:
        if before.get(name) != files.get(name):
            raise ValueError(f"{name}: {before.get(name, 'no')} bytes when {out_dir} was begun, "
                             f"{files.get(name, 'no')} now: choose another --out_dir")


def open_documents(meta, part, parts):
    """
    (Place, text) of the rows that are still to be written, and how many tokens of the first are.

    After a restart the first row is that of the last token written.
    """
    files = meta["files"]
    open_rows = file_rows
    first, end = 0, None  # rows of the part, among those of files
    if source == "fineweb-edu":
        downloads = Downloads(files, meta["commit"], os.path.join(out_dir, "downloads"))
        open_rows = downloads.retried_rows
    elif parts > 1:
        total = sum(map(count_rows, files))
        first, end = part * total // parts, (part + 1) * total // parts
    first += skip
    if not meta["shards"]:
        return itertools.islice(documents(files, open_rows), first, end), 0
    *place, taken = meta["shards"][-1]["cursor"].values()
    rows = documents(files, open_rows, Place(*place))
    n_before = sum(meta["documents"].values()) + meta["skipped_documents"] - 1
    left = end if end is None else end - first - n_before
    return itertools.islice(rows, left), taken


def next_shard(meta, n_val, stream, bar):
    """
    Write the next shard and record it in meta -> False if nothing is left to write.

    n_val: tokens of the val split, which is the first shard unless it has none.
    """
    left = tokens - sum(meta["tokens"].values())
    split = "val" if n_val and not meta["shards"] else "train"
    number = sum(shard["split"] == split for shard in meta["shards"])
    name = f"{split}_{number:06d}.bin"
    pieces = stream.take(min(left, shard_tokens if split == "train" else n_val))
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
        "cursor": {**stream.place._asdict(), "token": stream.taken},
    })
    return True


def prepare(arguments):
    """
    Write the missing shards, and meta.json after each.

    arguments: the settings that define the tokens. Raises ValueError as the functions above do,
    and if nothing is left for training.
    """
    encoding = get_tokenizer(tokenizer)
    part, parts = parse_shard(shard)
    meta = open_meta(arguments)
    if meta is None:
        meta = new_meta(arguments, encoding, part, parts)
    elif meta["complete"]:
        return meta
    else:
        check_files(meta)
    rows, taken = open_documents(meta, part, parts)
    stream = TokenStream(encoded(rows, encoding, workers or os.cpu_count()), taken)
    total = expected_tokens(meta["files"], parts)
    n_val = min(val_tokens, total // 100) if val_tokens == DEFAULT_VAL_TOKENS else val_tokens
    written = sum(meta["tokens"].values())
    with tqdm(total=total, initial=written, unit="tok", unit_scale=True) as bar:
        while next_shard(meta, n_val, stream, bar):
            write_json(os.path.join(out_dir, "meta.json"), meta)
        bar.total = sum(meta["tokens"].values())
    shutil.rmtree(os.path.join(out_dir, "downloads"), ignore_errors=True)
    if not meta["tokens"]["train"]:
        n_tokens = meta["tokens"]["val"]
        n_empty = stream.skipped
        clear(meta)
        if not n_tokens:
            raise ValueError(f"{source!r} has no text here ({n_empty} rows without): .jsonl and "
                             ".parquet need a field 'text' that is text")
        raise ValueError(f"{source!r} has {n_tokens} tokens here and val_tokens={val_tokens} "
                         "takes them all: lower --val_tokens")
    meta["complete"] = True
    write_json(os.path.join(out_dir, "meta.json"), meta)
    return meta


# -----------------------------------------------------------------------------

def verify_shards(data_dir):
    """Compare every shard with meta.json's checksum -> a list of faults, empty if all is well."""
    faults = []
    for shard in tqdm(read_meta(data_dir)["shards"], unit="shard"):
        path = os.path.join(data_dir, shard["file"])
        try:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard.get("sha256"):
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
    least = {"tokens": 1, "shard_tokens": 1, "val_tokens": 0, "skip": 0, "workers": 0}
    for key, low in least.items():
        if config[key] < low:
            raise ValueError(f"{key}={config[key]}: must be at least {low}")
    if on_error not in ("refuse", "replace"):
        raise ValueError(f"on_error={on_error!r}: must be 'refuse' or 'replace'")
    keys = "source tokenizer tokens val_tokens shard_tokens skip shard on_error"
    with lock(out_dir):
        meta = prepare({key: config[key] for key in keys.split()})
    print(f"{out_dir}: {meta['tokens']['train']:,} train and {meta['tokens']['val']:,} val tokens, "
          f"{sum(meta['documents'].values()):,} documents, {len(meta['shards'])} shards")


if __name__ == "__main__":
    main()
