"""
Reading token bins: tokenizers, meta.json, and windows of tokens in their training order.

prepare_fineweb.py writes what this file reads. The atomic writes that every script uses are here too.
"""
import contextlib
import json
import os
import shutil

import numpy as np
import tiktoken

# -----------------------------------------------------------------------------
# files that are whole or not there

@contextlib.contextmanager
def atomic(path, mode="w"):
    """
    A file to fill ("w": UTF-8 text, "wb": bytes) that is at path, whole and on the disk, at the end.

    If the block fails the old file at path stays, and nothing of the new one. A killed process
    leaves path.tmp behind, which the next write replaces.
    """
    partial = f"{path}.tmp"
    text_options = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with open(partial, mode, **text_options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise
    directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    os.fsync(directory)  # the renaming itself survives a power failure
    os.close(directory)


def write_text(path, text):
    """Write a text file, atomically."""
    with atomic(path) as file:
        file.write(text)


def write_json(path, value):
    """Write a JSON file, atomically."""
    write_text(path, json.dumps(value, indent=1))


@contextlib.contextmanager
def new_directory(path):
    """
    A directory to fill, which is at path when it is whole, and gone if that fails.

    Raises ValueError if path is there.
    """
    if os.path.exists(path):
        raise ValueError(f"{path} is there already: choose another --out_dir, or remove it")
    partial = path.rstrip("/") + ".partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    os.makedirs(partial)
    try:
        yield partial
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


# -----------------------------------------------------------------------------
# tokenizers and meta.json

def get_tokenizer(name):
    """
    The tiktoken Encoding called "gpt2" or "bytes" (256 bytes and end of text).

    Raises ValueError for another name or if its files can't be had.
    """
    if name == "bytes":
        return tiktoken.Encoding(
            "bytes",
            pat_str=r"[\s\S]{1,256}",
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={"<|endoftext|>": 256},
            explicit_n_vocab=257,
        )
    if name != "gpt2":
        raise ValueError(f"tokenizer={name!r}: must be 'gpt2' or 'bytes'")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken downloads it: no network, no cache, a damaged file
        raise ValueError(
            f"tokenizer 'gpt2' can't be loaded ({type(error).__name__}): connect once, or set "
            "TIKTOKEN_CACHE_DIR to a directory that has its files"
        ) from None


def read_meta(data_dir):
    """
    meta.json of a prepared directory.

    Raises ValueError naming a directory that has none or a damaged one.
    """
    path = os.path.join(data_dir, "meta.json")
    try:
        with open(path) as file:
            return json.load(file)
    except FileNotFoundError:
        fix = f"prepare the data with prepare_fineweb.py --out_dir={data_dir}"
        raise ValueError(f"{path} is missing: {fix}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {error}") from None


# -----------------------------------------------------------------------------
# windows

def permute(i, n, key):
    """
    A pseudo-random permutation of 0..n-1 at the integers i (an array), without a table in memory.

    Four rounds of a Feistel network over the next even power of two, walked along its cycle until
    below n: a bijection for any round function (Black & Rogaway, "Ciphers with arbitrary finite
    domains", 2002).
    """
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64(2**half - 1)
    keys = np.random.SeedSequence(key).generate_state(4, np.uint64)
    i = np.array(i, dtype=np.uint64)
    walking = np.ones(i.shape, dtype=bool)
    while walking.any():
        left = i[walking] >> shift
        right = i[walking] & mask
        for k in keys:  # the round function is splitmix64's finalizer
            z = (right + k) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
            z = z ^ z >> np.uint64(31)
            left, right = right, left ^ z & mask
        i[walking] = left << shift | right
        walking = i >= n
    return i.astype(np.int64)


class Windows:
    """
    The windows of block_size + 1 tokens of a split, shard by shard.

    Each starts block_size after the one before, so that every token is a target once. data_dir: a
    directory, or several with commas between them, one after the other. Raises ValueError if a
    shard of a meta.json is missing or short, if tokenizers differ, or if there is no whole window.
    """

    def __init__(self, data_dir, split, block_size):
        self.block_size = block_size
        self.files = []
        directories = data_dir.split(",")
        self.meta = read_meta(directories[0])
        counts = []
        for directory in directories:
            meta = read_meta(directory)
            if meta["tokenizer"] != self.meta["tokenizer"]:
                raise ValueError(f"{directory} has tokenizer {meta['tokenizer']!r} and "
                                 f"{directories[0]} {self.meta['tokenizer']!r}")
            for shard in meta["shards"]:
                if shard["split"] == split:
                    self.files.append(self._open(directory, shard))
                    counts.append((shard["tokens"] - 1) // block_size)
        self.ends = np.cumsum(counts)  # number of the first window after each shard
        if not counts or not self.ends[-1]:
            raise ValueError(f"{data_dir}: no {split} shard has a window of block_size + 1 = "
                             f"{block_size + 1} tokens")

    @staticmethod
    def _open(directory, shard):
        path = os.path.join(directory, shard["file"])
        expected = 2 * shard["tokens"]  # uint16
        size = os.path.getsize(path) if os.path.exists(path) else None
        if size != expected:
            found = "is missing" if size is None else f"has {size} bytes"
            raise ValueError(f"{path} {found}, meta.json says {expected}: prepare it again")
        return os.open(path, os.O_RDONLY)

    def __len__(self):
        return int(self.ends[-1])

    def read(self, numbers):
        """Windows by number (0 <= number < len) -> int64 (len(numbers), block_size + 1)."""
        n_bytes = 2 * (self.block_size + 1)
        rows = []
        for number in numbers:
            shard = int(np.searchsorted(self.ends, number, side="right"))
            in_shard = int(number - (self.ends[shard - 1] if shard else 0))
            # pread, not a memmap: the pages belong to the system's cache and not to this process
            row = os.pread(self.files[shard], n_bytes, 2 * self.block_size * in_shard)
            rows.append(np.frombuffer(row, dtype=np.uint16))
        return np.stack(rows).astype(np.int64)

    def shuffled(self, first, count, seed):
        """
        Windows number first..first+count-1 of the endless training order -> as read.

        Each epoch is a permutation by seed and epoch.
        """
        order = np.arange(first, first + count)
        epochs = order // len(self)
        numbers = []
        for epoch in np.unique(epochs):
            in_epoch = order[epochs == epoch] % len(self)
            numbers.append(permute(in_epoch, len(self), (seed, int(epoch))))
        return self.read(np.concatenate(numbers))


def run_windows(config, split, data_dir=""):
    """
    Windows of a split for the model of a run with this configuration, from data_dir or its own.

    Raises ValueError as Windows does, and if the data are of another tokenizer than the run's.
    """
    data_dir = data_dir or config["data_dir"]
    windows = Windows(data_dir, split, config["block_size"])
    if windows.meta["tokenizer"] != config["tokenizer"]:
        raise ValueError(f"{data_dir}: its tokenizer is {windows.meta['tokenizer']!r} and the "
                         f"checkpoint's {config['tokenizer']!r}")
    return windows
