"""
Turns text into token bins: headerless uint16 files, as nanoGPT's, beside a meta.json that says what they hold.

    python prepare_fineweb.py                                     # 25B tokens of FineWeb-Edu, 50 GB, GPT-2 BPE
    python prepare_fineweb.py --source='my/*.jsonl' --out=data/my --val_tokens=1e6
    python prepare_fineweb.py --source=python --tokenizer=bytes --out=data/python --val_tokens=2e5     # offline
    python prepare_fineweb.py --shard=0/4 --out=data/part0        # this machine's quarter of the stream, see README
    python prepare_fineweb.py --verify=data/fineweb_edu           # check every shard's checksum

Every document is one <|endoftext|> and its tokens. The first val_tokens are val_000000.bin, the rest train_*.bin in
shards of shard_tokens. Stopped at any moment, the same command goes on after the last whole shard.
"""
import collections
import contextlib
import glob
import hashlib
import importlib
import itertools
import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tiktoken
from tqdm import tqdm

from configurator import configure, run_main

# settings, see configurator.py
source = "fineweb-edu"  # or files and globs of .txt, .jsonl, .parquet, separated by commas; or "python"
out = "data/fineweb_edu"  # directory of the bins: train.py's data_dir
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
# tokenizers

def get_tokenizer(name):
    """The tiktoken Encoding called "gpt2" or "bytes". Raises ValueError for another name or if it can't be had."""
    if name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,256}", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={"<|endoftext|>": 256}, explicit_n_vocab=257)
    if name != "gpt2":
        raise ValueError(f"tokenizer={name!r}: must be 'gpt2' or 'bytes'")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken downloads it: no network, no cache, a damaged file
        raise ValueError(f"tokenizer 'gpt2' can't be loaded ({type(error).__name__}): connect once, or set "
                         "TIKTOKEN_CACHE_DIR to a directory that has its files") from None


def encode(text, encoding):
    """
    uint16 array: end of text, then the text as ordinary text (a literal "<|endoftext|>" in it is not special).

    Rows that are no document, empty or not a string, have no tokens at all.
    """
    if not isinstance(text, str) or not text:
        return np.empty(0, np.uint16)
    try:
        ids = encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # lone surrogates, from JSON escapes: encode_ordinary replaces them
        ids = encoding.encode_ordinary(text)
    return np.concatenate([[encoding.eot_token], ids]).astype(np.uint16)


# -----------------------------------------------------------------------------
# sources: iterators over documents, in a fixed order

def documents(source, start, part, parts):
    """The rows (a document is a str) from number `start` on of the part-th of `parts` consecutive parts of a source."""
    if source == "fineweb-edu":
        from datasets import load_dataset
        rows = load_dataset("HuggingFaceFW/fineweb-edu", name="sample-100BT", split="train", streaming=True)
        rows = rows.shard(num_shards=parts, index=part)  # whole files, consecutive
        return retrying(lambda start: (row["text"] for row in rows.skip(start)), start)
    paths = None if source == "python" else source_files(source)
    first, end = 0, None
    if parts > 1:
        total = sum(1 for _ in python_documents()) if paths is None else sum(map(count_rows, paths))
        first, end = part * total // parts, (part + 1) * total // parts
    rows = python_documents() if paths is None else itertools.chain.from_iterable(map(file_rows, paths))
    return itertools.islice(rows, first + start, end)


def retrying(open_rows, start, waits=(1, 10, 60, 300)):
    """The rows of open_rows(start), opened again at the row where the stream broke, after so many seconds each time."""
    broken = 0
    while True:
        try:
            for row in open_rows(start):
                yield row
                start, broken = start + 1, 0
            return
        except Exception as error:  # whatever a network, a hub or a decoder raises
            if broken == len(waits):
                raise ValueError(f"the stream broke at document {start} and {broken} times again ({type(error).__name__}: "
                                 f"{str(error)[:100]}): run the same command to go on") from None
            time.sleep(waits[broken])
            broken += 1


def python_documents():
    """Text that every Python ships: pydoc's topics and the standard library's sources, in a fixed shuffled order."""
    topics = importlib.import_module("pydoc_data.topics").topics
    library = os.path.dirname(os.__file__)
    files = [os.path.join(library, name) for name in os.listdir(library) if name.endswith(".py")]
    for package in ("asyncio", "collections", "concurrent", "email", "html", "http", "importlib", "json", "logging",
                    "multiprocessing", "unittest", "urllib", "xml"):
        files += glob.glob(os.path.join(library, package, "**", "*.py"), recursive=True)
    named = {f"topic {name}": name for name in topics} | {os.path.relpath(path, library): path for path in files}
    for name in sorted(named, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if name.startswith("topic "):
            yield topics[named[name]]
        else:
            with open(named[name], encoding="utf-8", errors="replace") as file:
                yield file.read()


def source_files(source):
    """The files that a comma-separated list of paths and globs names, in order. Raises ValueError for one that isn't there."""
    paths = [path for pattern in source.split(",") for path in sorted(glob.glob(pattern)) or [pattern]]
    for path in paths:
        if not path.endswith((".txt", ".jsonl", ".parquet")):
            raise ValueError(f"source {path!r}: must be 'fineweb-edu', 'python' or files .txt, .jsonl, .parquet")
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
    if path.endswith(".parquet"):
        import pyarrow.parquet
        return pyarrow.parquet.ParquetFile(path).metadata.num_rows
    with open(path, "rb") as file:
        return 1 if path.endswith(".txt") else sum(1 for _ in file)


def decoded_lines(path):
    """Lines of a UTF-8 file; one that isn't valid is reported, then refused or replaced (on_error)."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                message = f"{path}, line {number}: invalid UTF-8 (byte {error.start} is 0x{line[error.start]:02x})"
                if on_error == "refuse":
                    raise ValueError(f"{message}; --on-error=replace puts U+FFFD there") from None
                print(f"{message}, replaced", file=sys.stderr)
                yield line.decode(errors="replace")


# -----------------------------------------------------------------------------
# writing

def encoded(texts, encoding, workers):
    """Arrays of tokens, one per document and in order, made by several threads (the tokenizer releases the GIL)."""
    in_flight = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        batches = iter(lambda: list(itertools.islice(texts, 32)), [])
        for batch in batches:
            in_flight.append(pool.submit(lambda batch: [encode(text, encoding) for text in batch], batch))
            if len(in_flight) > 4 * workers:  # backpressure: at most so many batches are in memory
                yield from in_flight.popleft().result()
        while in_flight:
            yield from in_flight.popleft().result()


def write_text(path, text):
    """Write a text file by atomic rename."""
    with open(path + ".tmp", "w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def write_json(path, value):
    """Write a JSON file by atomic rename."""
    write_text(path, json.dumps(value, indent=1))


@contextlib.contextmanager
def new_directory(path):
    """A directory to fill, which is at path when it is whole, and gone if that fails. Raises ValueError if path is there."""
    if os.path.exists(path):
        raise ValueError(f"{path} is there already: choose another --out, or remove it")
    partial = path.rstrip("/") + ".partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    os.makedirs(partial)
    try:
        yield partial
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_shard(path, pieces, bar):
    """Write arrays to a file by atomic rename, unless there are none -> number of tokens, sha256."""
    n_tokens, digest = 0, hashlib.sha256()
    with open(path + ".tmp", "wb") as file:
        for piece in pieces:
            file.write(piece.tobytes())
            digest.update(piece.tobytes())
            n_tokens += len(piece)
            bar.update(len(piece))
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path) if n_tokens else os.remove(path + ".tmp")
    return n_tokens, digest.hexdigest()


class TokenStream:
    """The tokens of documents one after the other; document and offset say where the next token stands."""

    def __init__(self, arrays, document, offset):
        self.arrays, self.document, self.offset = arrays, document, offset
        self.started = self.skipped = 0  # documents with tokens, and empty or non-string ones, since the last shard
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
                self.rest, self.document, self.offset = None, self.document + 1, 0
            yield piece


def parse_shard(text):
    """"i/n" -> (i, n). Raises ValueError unless 0 <= i < n."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise ValueError(f"shard={text!r}: must be i/n with 0 <= i < n, as in 0/4")
    return int(part), int(parts)


def prepare(arguments):
    """Write the shards that are still missing, and meta.json after each. arguments: the settings that define them."""
    encoding, meta_path = get_tokenizer(tokenizer), os.path.join(out, "meta.json")
    if os.path.exists(meta_path):
        meta = read_meta(out)
        for key, value in arguments.items():
            if meta["arguments"].get(key) != value:
                raise ValueError(f"{out} was prepared with {key}={meta['arguments'].get(key)!r}, not {value!r}: "
                                 "use that or another --out")
        if meta["complete"]:
            return meta
    elif glob.glob(os.path.join(out, "*.bin")):
        raise ValueError(f"{out} has .bin files but no meta.json: choose another --out")
    else:
        meta = {"tokenizer": tokenizer, "vocab_size": encoding.n_vocab, "dtype": "uint16", "source": source,
                "tokens": {"train": 0, "val": 0}, "documents": {"train": 0, "val": 0}, "skipped_documents": 0,
                "arguments": arguments, "complete": False, "shards": []}
    document, offset = meta["shards"][-1]["next"] if meta["shards"] else (0, 0)
    part, parts = parse_shard(shard)
    rows = documents(source, skip + document, part, parts)
    arrays = encoded(iter(rows), encoding, workers or os.cpu_count())
    stream = TokenStream(arrays, document, offset)
    os.makedirs(out, exist_ok=True)
    with tqdm(total=tokens, initial=sum(meta["tokens"].values()), unit="tok", unit_scale=True) as bar:
        while (left := tokens - sum(meta["tokens"].values())) > 0:
            split = "val" if val_tokens and not meta["shards"] else "train"
            number = sum(shard["split"] == split for shard in meta["shards"])
            name = f"{split}_{number:06d}.bin"
            pieces = stream.take(min(left, shard_tokens if split == "train" else val_tokens))
            n_tokens, checksum = write_shard(os.path.join(out, name), pieces, bar)
            if n_tokens == 0:
                break
            meta["tokens"][split] += n_tokens
            meta["documents"][split] += stream.started
            meta["skipped_documents"] += stream.skipped
            stream.started = stream.skipped = 0
            meta["shards"].append({"file": name, "split": split, "tokens": n_tokens, "sha256": checksum,
                                   "next": [stream.document, stream.offset]})
            write_json(meta_path, meta)
        bar.total = sum(meta["tokens"].values())
    if not meta["tokens"]["train"]:
        raise ValueError(f"{source!r} has {meta['tokens']['val']} tokens here and val_tokens={val_tokens} takes them all: "
                         "lower --val_tokens and choose a new --out")
    meta["complete"] = True
    write_json(meta_path, meta)
    return meta


# -----------------------------------------------------------------------------
# reading

def read_meta(data_dir):
    """meta.json of a prepared directory. Raises ValueError naming a directory that has none or a damaged one."""
    path = os.path.join(data_dir, "meta.json")
    try:
        with open(path) as file:
            return json.load(file)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: prepare the data with prepare_fineweb.py --out={data_dir}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {error}") from None


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


def permute(i, n, key):
    """
    A pseudo-random permutation of 0..n-1 at the integers i (an array), without a table in memory.

    Four rounds of a Feistel network over the next even power of two, walked along its cycle until below n: a
    bijection for any round function (Black & Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    mask = np.uint64(2**half - 1)
    keys = np.random.SeedSequence(key).generate_state(4, np.uint64)
    i = np.array(i, dtype=np.uint64)
    walking = np.ones(i.shape, dtype=bool)
    while walking.any():
        left, right = i[walking] >> np.uint64(half), i[walking] & mask
        for k in keys:  # the round function is splitmix64's finalizer
            z = (right + k) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ (z ^ z >> np.uint64(31)) & mask
        i[walking] = left << np.uint64(half) | right
        walking = i >= n
    return i.astype(np.int64)


class Windows:
    """
    The windows of block_size + 1 tokens of a split, each starting block_size after the one before, shard by shard.

    data_dir: a directory, or several with commas between them, one after the other. Raises ValueError if a shard of a
    meta.json is missing or short, if tokenizers differ, or if there is no whole window.
    """

    def __init__(self, data_dir, split, block_size):
        self.block_size, self.files, counts = block_size, [], []
        directories = data_dir.split(",")
        self.meta = read_meta(directories[0])
        for directory in directories:
            meta = read_meta(directory)
            if meta["tokenizer"] != self.meta["tokenizer"]:
                raise ValueError(f"{directory} has tokenizer {meta['tokenizer']!r} and {directories[0]} {self.meta['tokenizer']!r}")
            for shard in meta["shards"]:
                if shard["split"] == split:
                    path = os.path.join(directory, shard["file"])
                    size = os.path.getsize(path) if os.path.exists(path) else -1
                    if size != 2 * shard["tokens"]:
                        found = "is missing" if size < 0 else f"has {size} bytes"
                        raise ValueError(f"{path} {found}, meta.json says {2 * shard['tokens']}: prepare it again")
                    self.files.append(os.open(path, os.O_RDONLY))
                    counts.append((shard["tokens"] - 1) // block_size)
        self.ends = np.cumsum(counts)
        if not counts or not self.ends[-1]:
            raise ValueError(f"{data_dir}: no {split} shard has a window of block_size + 1 = {block_size + 1} tokens")

    def __len__(self):
        return int(self.ends[-1])

    def read(self, numbers):
        """Windows by number (0 <= number < len) -> int64 (len(numbers), block_size + 1)."""
        rows = []
        for number in numbers:
            shard = int(np.searchsorted(self.ends, number, side="right"))
            first = int(number - (self.ends[shard - 1] if shard else 0)) * self.block_size
            # pread, not a memmap: the pages belong to the system's cache and not to this process
            rows.append(np.frombuffer(os.pread(self.files[shard], 2 * (self.block_size + 1), 2 * first), dtype=np.uint16))
        return np.stack(rows).astype(np.int64)

    def shuffled(self, first, count, seed):
        """Windows number first..first+count-1 of the endless training order: each epoch is a permutation by seed."""
        order = np.arange(first, first + count)
        epochs = order // len(self)
        numbers = np.concatenate([permute(order[epochs == epoch] % len(self), len(self), (seed, int(epoch)))
                                  for epoch in np.unique(epochs)])
        return self.read(numbers)


def run_windows(config, split, data_dir=""):
    """
    Windows of a split for the model of a run with this configuration, from data_dir or else the run's own.

    Raises ValueError as Windows does, and if the data are of another tokenizer than the run's.
    """
    data_dir = data_dir or config["data_dir"]
    windows = Windows(data_dir, split, config["block_size"])
    if windows.meta["tokenizer"] != config["tokenizer"]:
        raise ValueError(f"{data_dir}: its tokenizer is {windows.meta['tokenizer']!r} and the checkpoint's {config['tokenizer']!r}")
    return windows


# -----------------------------------------------------------------------------

def main():
    config = configure(globals())
    if verify:
        faults = verify_shards(verify)
        print("\n".join(faults) or f"{verify}: every shard is as meta.json says")
        sys.exit(bool(faults))
    arguments = {key: config[key] for key in ("source", "tokenizer", "tokens", "val_tokens", "shard_tokens", "skip",
                                              "shard", "on_error")}
    for key, low in (("tokens", 1), ("shard_tokens", 1), ("val_tokens", 0), ("skip", 0), ("workers", 0)):
        if config[key] < low:
            raise ValueError(f"{key}={config[key]}: must be at least {low}")
    if on_error not in ("refuse", "replace"):
        raise ValueError(f"on_error={on_error!r}: must be 'refuse' or 'replace'")
    meta = prepare(arguments)
    print(f"{out}: {meta['tokens']['train']:,} train and {meta['tokens']['val']:,} val tokens, "
          f"{sum(meta['documents'].values()):,} documents, {len(meta['shards'])} shards")


if __name__ == "__main__":
    run_main(main)
