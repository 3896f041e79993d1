"""
Reading token bins: tokenizers, meta.json, and windows of tokens in their training order.

prepare_fineweb.py writes what this file reads. How every script writes a file, locks a directory,
reads a text and shows how far it is stands here too.
"""
import codecs
import contextlib
import hashlib
import itertools
import json
import os
import re
import sys
import time

import numpy as np
import tiktoken
from tqdm import tqdm

try:
    import fcntl
except ImportError:
    raise SystemExit("Linux and macOS are supported (on Windows: WSL)") from None

# -----------------------------------------------------------------------------
# files that are whole or not there, directories that belong to one process

@contextlib.contextmanager
def atomic(path, mode="w"):
    """
    A file to fill ("w": UTF-8 text, "wb": bytes): at path when it is whole and on the disk.

    If the block fails the old file at path stays, and nothing of the new one. A killed process
    leaves path.tmp behind, which the next write replaces.
    """
    partial = f"{path}.tmp"
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(partial)
        if isinstance(error, OSError) and error.filename is None:  # a write has no name to tell
            raise OSError(error.errno, error.strerror, path) from error
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


def make_directory(path):
    """Make a directory, if it isn't there. Raises ValueError if it can't be made."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        reason = error.strerror or "it has no name"
        if os.path.islink(path):
            reason = f"a link to {os.readlink(path)}, which isn't a directory"
        raise ValueError(f"out_dir={path!r}: it can't be made ({reason}): choose another "
                         "directory") from None


@contextlib.contextmanager
def lock(directory):
    """
    Hold a directory, made if need be, for this process: to the block's end or the process' death.

    Raises ValueError if another process holds it.
    """
    if not directory:
        raise ValueError("out_dir='': must name a directory")
    make_directory(directory)
    held = os.open(directory, os.O_RDONLY)  # the directory itself: no lock file stays behind
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise ValueError(f"{directory}: another process works in it: wait for its end, or choose "
                         "another --out_dir") from None
    except OSError as error:  # NFS locks files alone
        print(f"{directory} can't be locked ({error.strerror}): start no second process in it",
              file=sys.stderr)
    try:
        yield
    finally:
        os.close(held)


# -----------------------------------------------------------------------------
# progress

LOG_SECONDS = 10  # from one line to the next, whichever loop it is of


class LogLines(tqdm):
    """tqdm for a log file: a plain line now and then, none for what is done sooner."""

    last_line = time.monotonic()

    def __init__(self, iterable=None, **options):
        options |= dict(mininterval=0, miniters=1, leave=False)
        options["bar_format"] = "{desc} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
        super().__init__(iterable, **options)

    def display(self, msg=None, pos=None):
        # a message is the empty one with which tqdm clears its bar
        if msg is None and time.monotonic() - LogLines.last_line >= LOG_SECONDS:
            LogLines.last_line = time.monotonic()
            print(str(self).strip(), file=sys.stderr, flush=True)


def progress(iterable=None, desc=None, **options):
    """
    iterable, or a context whose update(n) counts, with tqdm's bar; in a log with lines instead.

    desc: what it is, shown before the numbers; options: tqdm's unit, total, initial, unit_scale.
    """
    kind = tqdm if sys.stderr.isatty() else LogLines
    return kind(iterable, desc=desc, leave=False, **options)


# -----------------------------------------------------------------------------
# text files

def read_lines(path, on_error=None):
    """
    Yield the lines of a UTF-8 file, their ends as they are (CR LF stays), no byte order mark.

    on_error: a line that is not UTF-8 raises a ValueError that names it (None, or "refuse" where
    the user may choose), or is named on standard error and has U+FFFD there ("replace").
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                byte = f"byte {error.start} is 0x{line[error.start]:02x}"
                message = f"{path}, line {number}: invalid UTF-8 ({byte})"
                if on_error != "replace":
                    choice = " (or --on_error=replace)" if on_error else ""
                    raise ValueError(f"{message}: convert the file to UTF-8{choice}") from None
                print(f"{message}, replaced", file=sys.stderr)
                yield line.decode(errors="replace")


def read_text(path, on_error=None):
    """The text of a UTF-8 file as read_lines has it. Raises ValueError as it does."""
    return "".join(read_lines(path, on_error))


def read_json_lines(path, on_error=None, start=0):
    """
    Yield the values of a .jsonl file, one a line that isn't blank, from number start on.

    Raises ValueError naming a line that is not JSON, or not UTF-8 as in read_lines.
    """
    lines = enumerate(read_lines(path, on_error), 1)
    filled = ((number, line) for number, line in lines if line.strip())
    for number, line in itertools.islice(filled, start, None):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{path}, line {number}: not JSON") from None
        yield value


# -----------------------------------------------------------------------------
# tokenizers and meta.json

TOKENIZERS = ("gpt2", "bytes")
SPACE = r"[^\S\x1c-\x1f]"  # tiktoken's \s: Python's has four control characters more
LONG_SPACES = re.compile(rf"(?<!{SPACE}){SPACE}{{100000,}}+(?!\Z)")


def get_tokenizer(name):
    """
    The tiktoken Encoding of one of TOKENIZERS; "bytes" has 256 bytes and end of text.

    Raises ValueError if its files can't be had.
    """
    if name == "bytes":
        return tiktoken.Encoding(
            "bytes",
            pat_str=r"[\s\S]{1,256}",
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={"<|endoftext|>": 256},
            explicit_n_vocab=257,
        )
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # tiktoken downloads it: no network, no cache, a damaged file
        raise ValueError(
            f"tokenizer {name!r} can't be loaded ({type(error).__name__}): connect once, or set "
            "TIKTOKEN_CACHE_DIR to a directory that has its files"
        ) from None


def encode(encoding, text):
    """
    The ids of a text, a list: as encoding.encode_ordinary, but for whitespace of any length.

    "<|endoftext|>" in it is text, a lone surrogate U+FFFD. GPT-2's regex takes whitespace before a
    word apart from its last character, which tiktoken finds by going back, and no further than
    999,998 characters (then a Rust panic). Cut there before, both parts have the same tokens.
    """
    ids = []
    start = 0
    for spaces in LONG_SPACES.finditer(text):
        ids += encoding.encode_ordinary(text[start:spaces.end() - 1])
        start = spaces.end() - 1
    return ids + encoding.encode_ordinary(text[start:])


def read_meta(data_dir):
    """
    meta.json of a prepared directory, or of one that is being prepared.

    Raises ValueError naming a directory that has none, or what is wrong with it.
    """
    path = os.path.join(data_dir, "meta.json")
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
    except FileNotFoundError:
        raise ValueError(f"{os.path.abspath(path)} is missing: prepare the data with "
                         f"{_prepare_command(data_dir)}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {error}") from None
    kinds = {"tokenizer": str, "vocab_size": int, "dtype": str, "complete": bool, "shards": list}
    _check_fields(path, meta, kinds)
    for number, shard in enumerate(meta["shards"]):
        _check_fields(f"{path}, shard {number}", shard, {"file": str, "split": str, "tokens": int})
    if meta["tokenizer"] not in TOKENIZERS:
        raise ValueError(f"{path}: tokenizer={meta['tokenizer']!r}: must be 'gpt2' or 'bytes'")
    if meta["dtype"] != "uint16":
        raise ValueError(f"{path}: dtype is {meta['dtype']!r}, only 'uint16' bins can be read")
    return meta


def _prepare_command(data_dir):
    """What fills a directory: the Makefile's command for the demo's, else as much as is known."""
    command = f"python prepare_fineweb.py --out_dir={data_dir}"
    if os.path.abspath(data_dir).endswith(os.path.join("data", "python")):
        return f"{command} --source=python --tokenizer=bytes --val_tokens=200_000"
    return (f"{command} and your --source and --tokenizer, which the config's comment may name (by "
            "default 50 GB of FineWeb-Edu)")


def _check_fields(name, value, kinds):
    """Raise ValueError unless value is a dict with keys of certain types."""
    if not isinstance(value, dict):
        raise ValueError(f"{name}: {str(value)[:40]} is not what prepare_fineweb.py writes")
    for key, kind in kinds.items():
        if not isinstance(value.get(key), kind):
            found = f"{key} is {value[key]!r}" if key in value else f"{key} is missing"
            raise ValueError(f"{name}: {found}, it must be {kind.__name__}")


def check_shard(data_dir, shard):
    """
    Raise ValueError unless a shard of data_dir's meta.json is there, and as long as that says.

    Returns its path.
    """
    path = os.path.join(data_dir, shard["file"])
    expected = 2 * shard["tokens"]  # uint16
    size = os.path.getsize(path) if os.path.exists(path) else None
    if size != expected:
        found = "is missing" if size is None else f"has {size} bytes"
        raise ValueError(f"{path} {found}, meta.json says {expected}: bring the file back, or "
                         f"remove {data_dir} and prepare it anew")
    return path


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
    directory isn't whole, if a shard of a meta.json is missing or short, if tokenizers differ, or
    if there is no whole window.
    """

    def __init__(self, data_dir, split, block_size):
        directories = data_dir.split(",")
        if "" in directories:
            raise ValueError(f"data_dir={data_dir!r}: there must be a directory on each side of a "
                             "comma")
        self.block_size = block_size
        self.paths = []
        self.checksums = []
        counts = []  # windows of each shard
        metas = [read_meta(directory) for directory in directories]
        self.meta = metas[0]
        for directory, meta in zip(directories, metas):
            if not meta["complete"]:
                raise ValueError(f"{directory} is not whole: run its prepare_fineweb.py command "
                                 "again, which goes on (and ends at a lower --tokens)")
            if meta["tokenizer"] != self.meta["tokenizer"]:
                raise ValueError(f"{directory} has tokenizer {meta['tokenizer']!r} and "
                                 f"{directories[0]} {self.meta['tokenizer']!r}")
            for shard in meta["shards"]:
                if shard["split"] == split:
                    self.paths.append(check_shard(directory, shard))
                    self.checksums.append(shard.get("sha256") or "")
                    counts.append((shard["tokens"] - 1) // block_size)
        if not sum(counts):
            raise ValueError(f"{data_dir}: no {split} shard has a window of block_size + 1 = "
                             f"{block_size + 1} tokens")
        self.ends = np.cumsum(counts)  # number of the first window after each shard
        self.files = [os.open(path, os.O_RDONLY) for path in self.paths]

    @property
    def fingerprint(self):
        """A hex digest of what the windows are: block_size and the shards' checksums in order."""
        described = " ".join([str(self.block_size), *self.checksums])
        return hashlib.sha256(described.encode()).hexdigest()

    def __len__(self):
        return int(self.ends[-1])

    def read(self, numbers):
        """
        Windows by number (0 <= number < len) -> int64 (len(numbers), block_size + 1).

        Raises ValueError naming a shard that has an id beyond the vocabulary, or got shorter.
        """
        n_bytes = 2 * (self.block_size + 1)
        rows = []
        for number in numbers:
            shard = int(np.searchsorted(self.ends, number, side="right"))
            in_shard = int(number - (self.ends[shard - 1] if shard else 0))
            # pread, not a memmap: the pages belong to the system's cache and not to this process
            row = os.pread(self.files[shard], n_bytes, 2 * self.block_size * in_shard)
            row = np.frombuffer(row, dtype=np.uint16)
            if len(row) != self.block_size + 1 or row.max() >= self.meta["vocab_size"]:
                path = self.paths[shard]
                raise ValueError(f"{path} is damaged: window {in_shard} is short or has an id "
                                 f"beyond vocab_size={self.meta['vocab_size']}; prepare_fineweb.py "
                                 f"--verify={os.path.dirname(path)} tells more")
            rows.append(row)
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
