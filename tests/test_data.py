"""
prepare_fineweb.py and data.py: what the bins hold, and how training reads them.

    python tests/test_data.py --kills=30      # by hand: preparations of FineWeb-Edu, killed
"""
import collections
import fcntl
import http.server
import json
import os
import pty
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken

sys.path.insert(0, str(Path(__file__).parents[1]))  # for --kills: there is no pytest to do it

from conftest import ROOT, contents

import data
import prepare_fineweb
from data import Windows, encode, get_tokenizer, permute, progress, read_meta
from tools.runs import new_directory, run_windows

SHARED = ROOT.parent / "shared"
DOCUMENTS = [
    "Hello world. ",
    "a literal <|endoftext|> is text",
    "naïve café 日本語 🙂",
    "x" * 1000,
    "last\n",
]


def prepare_command(out_dir, **settings):
    """prepare_fineweb.py with byte tokens unless settings say otherwise."""
    settings = {"tokenizer": "bytes", "out_dir": out_dir, **settings}
    command = [sys.executable, ROOT / "prepare_fineweb.py"]
    return command + [f"--{key}={value}" for key, value in settings.items()]


def prepare(out_dir, environment=(), **settings):
    """Run the script; its CompletedProcess."""
    environment = {**os.environ, **dict(environment)}
    command = prepare_command(out_dir, **settings)
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def prepared_well(*args, **settings):
    run = prepare(*args, **settings)
    assert run.returncode == 0, run.stderr


def check_fails(run, *words):
    """A run ended with status 1 and one line of error, behind a progress bar, with these words."""
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr
    lines = run.stderr.splitlines()
    assert sum(line.startswith("prepare_fineweb.py: ") for line in lines) == 1, run.stderr
    assert all(word in lines[-1] for word in words), run.stderr


def on_a_terminal(command):
    """What a command shows on a terminal of 100 columns; it must succeed."""
    terminal, its_end = pty.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    process = subprocess.Popen(command, stdout=its_end, stderr=its_end)
    os.close(its_end)
    shown = b""
    while process.poll() is None or shown == b"":
        try:
            shown += os.read(terminal, 10_000)
        except OSError:  # how a terminal says that nobody writes to it any more
            break
    os.close(terminal)
    assert process.wait() == 0, shown
    return shown.decode()


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_parquet(path, texts, row_group_size=100):
    table = pyarrow.table({"id": list(range(len(texts))), "text": pyarrow.array(texts, "string")})
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)
    return path


def read_bins(out_dir):
    """All tokens of a directory in order, val first."""
    names = [shard["file"] for shard in read_meta(out_dir)["shards"]]
    return np.concatenate([np.fromfile(out_dir / name, np.uint16) for name in names])


def split_documents(tokens, encoding):
    starts = np.flatnonzero(tokens == encoding.eot_token)
    return [encoding.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]


def read_documents(out_dir):
    """The texts of a directory of byte tokens."""
    return split_documents(read_bins(out_dir), get_tokenizer("bytes"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """DOCUMENTS 20 times over as byte tokens, in shards that cut documents."""
    directory = tmp_path_factory.mktemp("data")
    source = write_jsonl(directory / "text.jsonl", DOCUMENTS * 20)
    prepared_well(directory / "bins", source=source, val_tokens=1500, shard_tokens=4000)
    return directory / "bins"


def copied(directory, out_dir):
    """A copy of a directory of files."""
    out_dir.mkdir()
    for name, content in contents(directory).items():
        (out_dir / name).write_bytes(content)
    return out_dir


def change_meta(directory, **changes):
    meta = {**json.loads((directory / "meta.json").read_text()), **changes}
    (directory / "meta.json").write_text(json.dumps(meta))


# -----------------------------------------------------------------------------
# what the bins hold

def test_bytes_round_trip(prepared):
    assert read_documents(prepared) == DOCUMENTS * 20
    meta = read_meta(prepared)
    assert (meta["tokenizer"], meta["vocab_size"], meta["dtype"]) == ("bytes", 257, "uint16")
    assert meta["complete"]
    assert meta["tokens"]["val"] == 1500 == len(np.fromfile(prepared / "val_000000.bin", np.uint16))
    assert sum(meta["tokens"].values()) == len(read_bins(prepared))
    assert sum(meta["documents"].values()) == 100
    whole_shards = [shard["tokens"] for shard in meta["shards"][1:-1]]
    assert whole_shards == [4000] * len(whole_shards) and len(whole_shards) > 1
    names = {path.name for path in prepared.iterdir()}
    n_train = len(meta["shards"]) - 1
    assert names == {"meta.json", "val_000000.bin", *(f"train_{i:06d}.bin" for i in range(n_train))}
    assert names == {shard["file"] for shard in meta["shards"]} | {"meta.json"}


def test_gpt2_round_trip_of_fineweb_edu(tmp_path):
    sample = SHARED / "data" / "fineweb_edu_sample.jsonl"
    if not sample.exists():
        pytest.skip(f"{sample} is not here")
    out_dir = tmp_path / "bins"
    cache = {"TIKTOKEN_CACHE_DIR": str(SHARED / "tiktoken_cache")}
    prepared_well(out_dir, cache, source=sample, tokenizer="gpt2", val_tokens=10000,
                  shard_tokens=30000)
    texts = [json.loads(line)["text"] for line in sample.read_text().splitlines()]
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    encoding = get_tokenizer("gpt2")
    tokens = read_bins(out_dir)
    assert split_documents(tokens, encoding) == texts
    expected = []
    for text in texts:
        expected += [50256] + encoding.encode_ordinary(text)
    assert tokens.tolist() == expected


def test_txt_parquet_and_globs(tmp_path):
    for i, text in enumerate(DOCUMENTS):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    write_parquet(tmp_path / "all.parquet", DOCUMENTS, row_group_size=2)
    source = f"{tmp_path}/*.txt,{tmp_path}/all.parquet"
    prepared_well(tmp_path / "bins", source=source, val_tokens=50)
    assert read_documents(tmp_path / "bins") == DOCUMENTS * 2


def test_tokens_limits_the_stream(tmp_path):
    source = write_jsonl(tmp_path / "text.jsonl", DOCUMENTS * 20)
    prepared_well(tmp_path / "bins", source=source, val_tokens=100, tokens=1000)
    assert len(read_bins(tmp_path / "bins")) == 1000


def test_empty_and_foreign_rows_are_counted_and_skipped(tmp_path):
    source = tmp_path / "text.jsonl"
    texts = ["one", "", None, 5, "lone \ud800 surrogate", "two"]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run = prepare(tmp_path / "bins", source=source, val_tokens=4)
    assert run.returncode == 0 and f"{source}, row 5: a lone surrogate" in run.stderr
    assert read_documents(tmp_path / "bins") == ["one", "lone \ufffd surrogate", "two"]
    assert read_meta(tmp_path / "bins")["skipped_documents"] == 3


def test_text_files_of_any_name_are_a_document_each(tmp_path):
    """As of a package: directories below, empty files, a directory with a file's name."""
    lib = tmp_path / "lib"
    (lib / "b" / "c.py").mkdir(parents=True)
    texts = {"b/c.py/d.py": "d = 1\n", "b/a.py": "\n", "b/__init__.py": "", "a.py": "def é():\n"}
    for name, text in texts.items():
        (lib / name).write_text(text, encoding="utf-8")
    (lib / "b" / "notes.md").write_text("# Notes")
    (lib / "b" / "image.png").write_bytes(bytes(range(256)))
    settings = dict(source=f"{lib}/**/*.py,{lib}/b/*.md,{lib}/b/a.py", val_tokens=2)
    prepared_well(tmp_path / "bins", **settings)
    meta = read_meta(tmp_path / "bins")
    in_order = ["a.py", "b/__init__.py", "b/a.py", "b/c.py/d.py", "b/notes.md"]
    assert list(meta["files"]) == [f"{lib}/{name}" for name in in_order]
    assert read_documents(tmp_path / "bins") == ["def é():\n", "\n", "d = 1\n", "# Notes"]
    assert meta["skipped_documents"] == 1
    (lib / "b" / "latin.py").write_bytes(b"# \xe9\nx = 1\n")
    run = prepare(tmp_path / "other", **settings)
    check_fails(run, "b/latin.py, line 1: invalid UTF-8 (byte 2 is 0xe9)", "--on_error=replace")
    run = prepare(tmp_path / "other", on_error="replace", **settings)
    assert run.returncode == 0 and "b/latin.py, line 1" in run.stderr
    assert "# \ufffd\nx = 1\n" in read_documents(tmp_path / "other")
    check_fails(prepare(tmp_path / "no", source=lib), "lib': no such file", "text files")


def test_local_files_are_not_read_in_parts(tmp_path):
    source = write_jsonl(tmp_path / "text.jsonl", DOCUMENTS)
    for name in (source, "python"):
        run = prepare(tmp_path / "bins", source=name, shard="1/2")
        check_fails(run, "shard='1/2': only FineWeb-Edu is read in parts", "--source")


def test_invalid_utf8_is_reported_and_refused_or_replaced(tmp_path):
    source = tmp_path / "text.txt"
    source.write_bytes(b"good\nbad \xff here\n")
    run = prepare(tmp_path / "bins", source=source, val_tokens=2)
    check_fails(run, "text.txt, line 2: invalid UTF-8 (byte 4 is 0xff)")
    run = prepare(tmp_path / "bins", source=source, val_tokens=2, on_error="replace")
    assert run.returncode == 0 and "text.txt, line 2" in run.stderr
    assert read_documents(tmp_path / "bins") == ["good\nbad \ufffd here\n"]
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"text": \n')
    run = prepare(tmp_path / "other", source=tmp_path / "bad.jsonl")
    check_fails(run, "bad.jsonl, line 2: not JSON")


def test_a_byte_order_mark_blank_lines_and_crlf_are_fine(tmp_path):
    jsonl = '\ufeff{"text": "one\\r\\n"}\r\n\r\n{"text": "two"}\n\n   \n{"text": "three"}'
    (tmp_path / "a.jsonl").write_text(jsonl, encoding="utf-8", newline="")
    (tmp_path / "b.txt").write_text("\ufefftext\r\nof Windows\r\n", encoding="utf-8", newline="")
    source = f"{tmp_path}/a.jsonl,{tmp_path}/b.txt"
    texts = ["one\r\n", "two", "three", "text\r\nof Windows\r\n"]
    prepared_well(tmp_path / "bins", source=source, val_tokens=0)
    assert read_documents(tmp_path / "bins") == texts
    assert read_meta(tmp_path / "bins")["skipped_documents"] == 0
    assert data.read_text(tmp_path / "b.txt") == texts[-1]  # what other scripts read is the same
    values = list(data.read_json_lines(tmp_path / "a.jsonl"))
    assert values == [{"text": text} for text in texts[:-1]]
    last, = data.read_json_lines(tmp_path / "a.jsonl", start=2)
    assert last == {"text": "three"}


def test_latin_1_is_named(tmp_path):
    path = tmp_path / "old.txt"
    path.write_bytes("na\xefve".encode("latin-1"))
    message = "old.txt, line 1: invalid UTF-8 .byte 2 is 0xef.: convert"
    with pytest.raises(ValueError, match=message):
        data.read_text(path)


def test_parquet_without_text_or_without_its_end_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "body": ["x"]}), path)
    run = prepare(tmp_path / "bins", source=path)
    check_fails(run, "a.parquet", "no column 'text', but id, body")
    whole = write_parquet(path, DOCUMENTS).read_bytes()
    path.write_bytes(whole[:-20])
    run = prepare(tmp_path / "bins", source=path)
    check_fails(run, "a.parquet", "not a whole .parquet file")
    table = pyarrow.table({"text": pyarrow.array([b"fine", b"\xff\xff"]).cast("binary")})
    table = table.cast(pyarrow.schema([("text", "string")]), safe=False)
    pyarrow.parquet.write_table(table, path)
    check_fails(prepare(tmp_path / "bins", source=path), "a.parquet is damaged", "0xff")
    path.write_bytes(whole)
    prepared_well(tmp_path / "bins", source=path)


def test_missing_gpt2_files_without_a_network(tmp_path):
    proxy = "http://127.0.0.1:9"
    environment = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"), "https_proxy": proxy}
    environment["HTTPS_PROXY"] = proxy
    run = prepare(tmp_path / "bins", environment, source="python", tokenizer="gpt2")
    check_fails(run, "TIKTOKEN_CACHE_DIR")


# -----------------------------------------------------------------------------
# encode: tiktoken's own, where that gives up too

GPT2_PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s")
SPACES = [chr(i) for i in range(0x3001) if chr(i).isspace()]  # with \x1c to \x1f: none to tiktoken


@pytest.fixture(scope="module", params=["small", "gpt2"])
def gpt2_encoding(request):
    """GPT-2's regex with bytes and a few merges, which show its cuts; and GPT-2's own."""
    if request.param == "small":
        merges = [b"  ", b"    ", b"\n\n", b" \n", b" a", b"\n\n\n", b"\t\t", b"\x1c\x1c", b"\x1ca"]
        ranks = {bytes([i]): i for i in range(256)}
        ranks |= {merge: 256 + i for i, merge in enumerate(merges)}
        special_tokens = {"<|endoftext|>": len(ranks)}
        return tiktoken.Encoding("small", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                 special_tokens=special_tokens)
    if not (SHARED / "tiktoken_cache").exists():
        pytest.skip("GPT-2's files are not here")
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    return get_tokenizer("gpt2")


@pytest.mark.parametrize("length", [99_999, 100_001])
def test_long_whitespace_has_tiktoken_s_tokens(gpt2_encoding, length):
    rng = random.Random(length)
    runs = [character * length for character in " \n\x1c\xa0"]
    runs += ["".join(rng.choices(SPACES, k=length)) for _ in range(4)]
    runs += [" " * (length - 1) + "\n", "\n" * (length - 1) + " ", " " * length + "\x1c"]
    ends = ["a b", "!", "\x1ca's", ""]
    texts = [f"a{run}{ends[number % 4]}" for number, run in enumerate(runs)]
    for text in [*texts, "    " * (length // 4)]:
        assert encode(gpt2_encoding, text) == gpt2_encoding.encode_ordinary(text)


def test_whitespace_beyond_tiktoken_s_limit(gpt2_encoding):
    """Its last character goes to the word behind."""
    spaces = "\v" * 1_000_000
    text = f"a{spaces} b\ufffd"
    parts = [gpt2_encoding.encode_ordinary(part) for part in ("a", spaces, " b\ufffd")]
    row = prepare_fineweb.document_tokens(None, text, gpt2_encoding)
    assert row.tolist() == sum(parts, [gpt2_encoding.eot_token])
    assert encode(gpt2_encoding, text.replace("\ufffd", "\ud800")) == sum(parts, [])


# -----------------------------------------------------------------------------
# stopped, started again, mended

def test_a_stopped_preparation_goes_on_to_the_same_bytes(prepared, tmp_path):
    """As after kill -9 anywhere: drop shards from the end, leave a half-written one, run again."""
    meta = read_meta(prepared)
    for n_kept in range(len(meta["shards"])):
        out = tmp_path / str(n_kept)
        out.mkdir()
        for shard in meta["shards"][:n_kept]:
            os.link(prepared / shard["file"], out / shard["file"])
        if n_kept:
            kept, counts = meta["shards"][:n_kept], {"train": 0, "val": 0}
            for shard in kept:
                counts[shard["split"]] += shard["tokens"]
            stopped = {**meta, "shards": kept, "tokens": counts, "complete": False}
            (out / "meta.json").write_text(json.dumps(stopped))
        (out / f"{meta['shards'][n_kept]['file']}.tmp").write_bytes(b"half")
        prepared_well(out, **meta["arguments"])
        for shard in meta["shards"]:
            assert (out / shard["file"]).read_bytes() == (prepared / shard["file"]).read_bytes()


def test_a_preparation_stopped_again_and_again_in_one_document(tmp_path):
    (tmp_path / "book.txt").write_text("All work and no play. " * 200)
    settings = dict(source=tmp_path / "book.txt", val_tokens=0, shard_tokens=1000)
    prepared_well(tmp_path / "whole", **settings)
    whole = contents(tmp_path / "whole")
    shards = read_meta(tmp_path / "whole")["shards"]
    assert [shard["cursor"]["token"] for shard in shards] == [1000, 2000, 3000, 4000, 4401]
    for n_kept in range(1, len(shards)):
        out = copied(tmp_path / "whole", tmp_path / str(n_kept))
        for shard in shards[n_kept:]:
            (out / shard["file"]).unlink()
        counts = {"train": 1000 * n_kept, "val": 0}
        change_meta(out, shards=shards[:n_kept], tokens=counts, complete=False)
        prepared_well(out, **settings)
        assert contents(out) == whole


def test_other_arguments_never_touch_an_existing_directory(prepared):
    before = contents(prepared)
    run = prepare(prepared, **{**read_meta(prepared)["arguments"], "val_tokens": 1600})
    check_fails(run, "val_tokens=1500, not 1600")
    assert run.stderr.count("\n") == 1
    assert before == contents(prepared)


@pytest.mark.parametrize("complete", [True, False])
def test_a_shard_that_is_short_or_gone_is_named(prepared, tmp_path, complete):
    arguments = read_meta(prepared)["arguments"]
    for content, found in ((b"", "is missing"), (b"short", "has 5 bytes")):
        out = copied(prepared, tmp_path / f"{complete}{len(content)}")
        change_meta(out, complete=complete)
        (out / "train_000001.bin").unlink()
        if content:
            (out / "train_000001.bin").write_bytes(content)
        check_fails(prepare(out, **arguments), f"train_000001.bin {found}, meta.json says 8000")


def test_a_source_without_text_is_called_so(tmp_path):
    for name, line in (("a", '{"other": "x"}'), ("b", '{"text": 5}'), ("c", "")):
        source = tmp_path / f"{name}.jsonl"
        source.write_text(f"{line}\n")
        check_fails(prepare(tmp_path / name, source=source), "has no text here")


def test_new_directory_takes_nobody_elses(tmp_path):
    out = tmp_path / "site"
    with new_directory(str(out)) as first:
        (Path(first) / "page").write_text("1")
        with pytest.raises(ValueError, match="another process works in it"):
            with new_directory(str(out)):
                pass
    assert [path.name for path in out.iterdir()] == ["page"]
    theirs = tmp_path / "other.partial"
    theirs.mkdir()
    (theirs / "notes").write_text("precious")
    with pytest.raises(ValueError, match="is in the way"):
        with new_directory(str(tmp_path / "other")):
            pass
    (theirs / ".unfinished").touch()  # a killed run's: its pages go
    with new_directory(str(tmp_path / "other")) as partial:
        assert [path.name for path in Path(partial).iterdir()] == [".unfinished"]


def test_verify_finds_a_changed_shard(prepared, tmp_path):
    command = [sys.executable, ROOT / "prepare_fineweb.py"]
    assert subprocess.run([*command, f"--verify={prepared}"], capture_output=True).returncode == 0
    out = copied(prepared, tmp_path / "copy")
    damaged = bytearray((out / "train_000001.bin").read_bytes())
    damaged[100] ^= 1
    (out / "train_000001.bin").write_bytes(damaged)
    run = subprocess.run([*command, f"--verify={out}"], capture_output=True, text=True)
    assert run.returncode == 1
    assert "train_000001.bin" in run.stdout and "train_000000.bin" not in run.stdout


@pytest.mark.parametrize("workers", [1, 3])
def test_killed_at_any_moment_and_started_again(tmp_path, workers):
    """kill -9 at moments spread over the run, then once more to the end: the same bytes."""
    source = write_jsonl(tmp_path / "text.jsonl", DOCUMENTS * 1500)
    settings = dict(source=source, val_tokens=100_000, shard_tokens=30_000, workers=workers)
    out, whole = tmp_path / "killed", tmp_path / "whole"
    prepared_well(whole, **settings)
    kills = 0
    for attempt in range(80):  # from 0.05 s, before any machine has done it, to 4 s
        if run_and_kill(prepare_command(out, **settings), 0.05 * (attempt + 1)) == 0:
            break
        kills += 1
        if (out / "meta.json").exists():
            assert prepare_fineweb.verify_shards(out) == []  # what is there is whole
    assert kills and contents(out) == contents(whole)


def run_and_kill(command, seconds, **options):
    """Kill a command after a while -> its status, None if it was killed."""
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, **quiet, **options)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def test_two_preparations_of_one_directory(tmp_path):
    source = write_jsonl(tmp_path / "text.jsonl", DOCUMENTS * 20)
    out = tmp_path / "bins"
    holder = "import sys, data\nwith data.lock(sys.argv[1]): print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", holder, out]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        process.stdout.readline()
        check_fails(prepare(out, source=source), str(out), "another process works in it")
        assert list(out.iterdir()) == []
        process.send_signal(signal.SIGKILL)
    prepared_well(out, source=source)  # death gave it free
    with data.lock(out), pytest.raises(ValueError, match="bins: another process works in it"):
        with data.lock(out):
            pass
    with data.lock(out):
        pass


def test_a_small_source_gets_a_small_val_split(tmp_path):
    (tmp_path / "book.txt").write_text("All work and no play. " * 4000)
    shown = on_a_terminal(prepare_command(tmp_path / "bins", source=tmp_path / "book.txt"))
    assert read_meta(tmp_path / "bins")["tokens"] == {"train": 88_001 - 880, "val": 880}
    assert "25.0G" not in shown and "/88.0k" in shown  # the progress bar's end is the book's
    assert "880 val tokens (the source's first 1.0%, --val_tokens=N sets it)" in shown
    prepared_well(tmp_path / "bins", source=tmp_path / "book.txt")
    run = prepare(tmp_path / "given", source=tmp_path / "book.txt", val_tokens=500)
    assert run.stdout.endswith("and 500 val tokens, 1 documents, 2 shards\n") and not run.stderr
    write_parquet(tmp_path / "book.parquet", [f"{i} word " * 300 for i in range(50)])
    prepared_well(tmp_path / "parquet", source=tmp_path / "book.parquet")
    counts = read_meta(tmp_path / "parquet")["tokens"]
    assert 0.008 < counts["val"] / sum(counts.values()) < 0.012


def test_the_mended_command_works_in_the_same_directory(tmp_path):
    out = tmp_path / "bins"
    text = tmp_path / "text.jsonl"
    write_jsonl(text, DOCUMENTS * 100)
    run = prepare(out, source=text, val_tokens=1_000_000)
    check_fails(run, "val_tokens=1000000 takes them all: lower --val_tokens")
    with text.open("ab") as file:
        file.write(b'{"text": "caf\xe9"}\n')
    settings = dict(source=text, val_tokens=1000, shard_tokens=20_000, workers=1)
    check_fails(prepare(out, **settings), "text.jsonl, line 501: invalid UTF-8")
    assert len(read_meta(out)["shards"]) > 2  # those before the bad line are kept
    with pytest.raises(ValueError, match="bins is not whole: run its prepare_fineweb.py command"):
        Windows(str(out), "train", 16)
    prepared_well(out, on_error="replace", **settings)
    assert read_documents(out) == DOCUMENTS * 100 + ["caf\ufffd"]


def test_bins_of_a_preparation_without_a_whole_shard_are_replaced(prepared, tmp_path):
    out = copied(prepared, tmp_path / "bins")
    change_meta(out, complete=False, shards=[])  # as killed after the first .bin, before meta.json
    settings = {**read_meta(prepared)["arguments"], "val_tokens": 0, "shard_tokens": 10_000}
    prepared_well(out, **settings)
    assert read_documents(out) == DOCUMENTS * 20
    names = {path.name for path in out.iterdir()}
    assert names == {"meta.json", "train_000000.bin", "train_000001.bin", "train_000002.bin"}


def test_a_stopped_preparation_may_end_earlier(prepared, tmp_path):
    """A lower --tokens, so that what is there can be used; not one below that."""
    out = copied(prepared, tmp_path / "bins")
    meta = read_meta(out)
    last = meta["shards"].pop()
    (out / last["file"]).unlink()
    meta["tokens"]["train"] -= last["tokens"]
    change_meta(out, **{**meta, "complete": False})
    n_tokens = sum(meta["tokens"].values())
    run = prepare(out, **{**meta["arguments"], "tokens": n_tokens - 1})
    check_fails(run, "tokens=25000000000, not")
    prepared_well(out, **{**meta["arguments"], "tokens": n_tokens})
    assert (read_bins(out) == read_bins(prepared)[:n_tokens]).all()
    assert len(Windows(str(out), "train", 16)) > 0


def test_a_source_that_changed_is_named(prepared, tmp_path):
    out = copied(prepared, tmp_path / "bins")
    meta = read_meta(prepared)
    name, = meta["files"]
    change_meta(out, complete=False, files={name: 5})
    run = prepare(out, **meta["arguments"])
    check_fails(run, name, "5 bytes when", f"{meta['files'][name]} now")


def test_directories_of_older_versions(prepared, tmp_path):
    """A finished one is read as ever; one that was not finished has no place to go on from."""
    out = copied(prepared, tmp_path / "bins")
    meta = read_meta(out)
    for key in ("commit", "files"):
        del meta[key]
    for number, shard in enumerate(meta["shards"]):
        del shard["cursor"]
        shard["next"] = [number, 7]
    (out / "meta.json").write_text(json.dumps(meta))
    before = contents(out)
    assert len(Windows(str(out), "train", 16)) == len(Windows(str(prepared), "train", 16))
    prepared_well(out, **meta["arguments"])
    assert before == contents(out)
    change_meta(out, complete=False)
    check_fails(prepare(out, **meta["arguments"]), str(out), "an older prepare_fineweb.py")


# -----------------------------------------------------------------------------
# FineWeb-Edu, from a hub on this machine

class Hub(http.server.ThreadingHTTPServer):
    """The hub's answers about FineWeb-Edu, the parquet files of a folder, and nothing else."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder = folder
        self.fetched = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def environment(self, home):
        """For a process that is to use it."""
        endpoint = f"http://127.0.0.1:{self.server_port}"
        return {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}

    def handle_error(self, request, client_address):
        pass  # a client that was killed


class HubHandler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = "HuggingFaceFW/fineweb-edu"
        path = self.path.partition("?")[0].replace("%2F", "/")
        file = self.server.folder / os.path.basename(path)
        if path == f"/api/datasets/{name}":
            body = json.dumps({"id": name, "sha": "c" * 40}).encode()
        elif path == f"/api/datasets/{name}/tree/{'c' * 40}/sample/100BT":
            body = json.dumps([tree_entry(file) for file in self.server.folder.iterdir()]).encode()
        elif path.startswith(f"/datasets/{name}/resolve/{'c' * 40}/sample/100BT/"):
            body = file.read_bytes()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("ETag", f'"{hash(body):x}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


def tree_entry(file):
    path = f"sample/100BT/{file.name}"
    return {"type": "file", "path": path, "size": file.stat().st_size, "oid": "0" * 40}


def write_sample(folder, n_files, n_rows, row_group_size):
    """Parquet files of random words, some rows empty -> their documents, a list a file."""
    folder.mkdir()
    rng = random.Random(0)
    files = []
    for number in range(n_files):
        texts = []
        for row in range(n_rows):
            words = " word" * rng.randrange(60)
            texts.append(f"{number} {row}{words}")
            if row % 37 == 5:
                texts[row] = ""
            elif row % 41 == 7:
                texts[row] = None
        write_parquet(folder / f"00{number}_00000.parquet", texts, row_group_size)
        files.append([text for text in texts if text])
    return files


def test_fineweb_edu_from_the_hub(tmp_path):
    """huggingface_hub itself lists and fetches; parts are whole files, all of them."""
    files = write_sample(tmp_path / "hub", 5, 300, 100)
    hub = Hub(tmp_path / "hub")
    environment = hub.environment(tmp_path / "home")
    settings = dict(source="fineweb-edu", tokens=10_000_000, shard_tokens=20_000)
    prepared_well(tmp_path / "whole", environment, val_tokens=1000, **settings)
    assert read_documents(tmp_path / "whole") == sum(files, [])
    meta = read_meta(tmp_path / "whole")
    assert meta["commit"] == "c" * 40 and list(meta["files"]) == sorted(meta["files"])
    assert {path.suffix for path in (tmp_path / "whole").iterdir()} == {".bin", ".json"}
    for part, its_files in ((0, files[:2]), (1, files[2:])):
        out = tmp_path / str(part)
        prepared_well(out, environment, shard=f"{part}/2", val_tokens=0, **settings)
        assert read_documents(out) == sum(its_files, [])
    outs = [str(tmp_path / "0"), str(tmp_path / "1")]
    together = Windows(",".join(outs), "train", 8)
    assert len(together) == sum(len(Windows(out, "train", 8)) for out in outs)
    run = prepare(tmp_path / "no", environment, shard="0/6", **settings)
    check_fails(run, "shard=0/6: FineWeb-Edu has 5 files")
    hub.shutdown()
    hub.server_close()
    check_fails(prepare(tmp_path / "no", environment, **settings), "can't be listed on the hub")


def killed_preparations(directory, kills, seconds, n_rows, seed=0):
    """
    Preparations of FineWeb-Edu over 5 files, killed until there were so many kills.

    seconds: least and most from start to kill. Each preparation is then finished, and must have the
    bytes of an uninterrupted one. -> at each kill the file in which meta.json's place was (none
    before the first shard); the number of preparations.
    """
    write_sample(directory / "hub", 5, n_rows, n_rows // 20)
    hub = Hub(directory / "hub")
    options = {"env": {**os.environ, **hub.environment(directory / "home")}}
    settings = dict(source="fineweb-edu", val_tokens=10_000, shard_tokens=30 * n_rows)
    assert run_and_kill(prepare_command(directory / "whole", **settings), 600, **options) == 0
    whole = contents(directory / "whole")
    rng = random.Random(seed)
    files_at_kill = []
    n_finished = 0
    finished = False
    while len(files_at_kill) < kills or not finished:
        out = directory / f"killed{n_finished}"
        limit = rng.uniform(*seconds) if len(files_at_kill) < kills else 600
        status = run_and_kill(prepare_command(out, **settings), limit, **options)
        finished = status is not None
        if finished:
            assert status == 0 and contents(out) == whole
            n_finished += 1
        else:
            shards = read_meta(out)["shards"] if (out / "meta.json").exists() else []
            files_at_kill.append(shards[-1]["cursor"]["file"] if shards else "none")
    hub.shutdown()
    hub.server_close()
    return files_at_kill, n_finished


def test_fineweb_edu_killed_and_started_again(tmp_path):
    files_at_kill, n_finished = killed_preparations(tmp_path, 4, (0.2, 1.2), n_rows=4000)
    assert len(files_at_kill) == 4 and n_finished


@pytest.fixture
def folder_as_hub(tmp_path, monkeypatch):
    """prepare_fineweb's two calls of the hub, of a folder; .fetches are what was asked for."""
    files = write_sample(tmp_path / "hub", 3, 300, 100)
    folder = tmp_path / "hub"
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    fetches = []

    def fetch(file, commit, directory):
        fetches.append(file)
        Path(directory).mkdir(exist_ok=True)
        (Path(directory) / file).write_bytes((folder / file).read_bytes())

    monkeypatch.setattr(prepare_fineweb, "hub_fetch", fetch)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    downloads = prepare_fineweb.Downloads(sizes, "commit", tmp_path / "downloads")
    return files, folder, downloads, fetches


def rows(downloads, place=None):
    """Texts of the documents from a place on."""
    pairs = prepare_fineweb.documents(downloads.files, downloads.retried_rows, place)
    return [text for _, text in pairs if text]


def test_the_next_file_is_fetched_meanwhile_and_each_removed_when_done(folder_as_hub):
    files, _, downloads, _ = folder_as_hub
    here = []
    stream = prepare_fineweb.documents(downloads.files, downloads.retried_rows)
    for place, _ in stream:
        if place[1:] == (1, 50):  # in the middle of each file
            downloads.prefetch.join()
            here.append(sorted(os.listdir(downloads.directory)))
    names = list(downloads.files)
    assert here == [names[:2], names[1:], names[2:]]
    assert os.listdir(downloads.directory) == []


def test_a_restart_reads_one_row_group(folder_as_hub):
    """Those before it may be of any bytes."""
    files, folder, downloads, fetches = folder_as_hub
    first_file = str(folder / "000_00000.parquet")
    row_group, row, text = next(prepare_fineweb.file_rows(first_file, 0, 217))
    assert (row_group, row, text.split()[1]) == (2, 17, "217")
    place = prepare_fineweb.Place("001_00000.parquet", 2, 17)
    path = folder / place.file
    metadata = pyarrow.parquet.ParquetFile(path).metadata
    start = metadata.row_group(2).column(0).dictionary_page_offset
    path.write_bytes(b"PAR1" + bytes(start - 4) + path.read_bytes()[start:])
    expected = [text for text in files[1] if int(text.split()[1]) >= 217] + files[2]
    assert rows(downloads, place) == expected
    assert fetches == ["001_00000.parquet", "002_00000.parquet"]
    message = "001_00000.parquet, from row group 1 broke at document 99"
    with pytest.raises(ValueError, match=message):
        rows(downloads, prepare_fineweb.Place("001_00000.parquet", 1, 99))


def test_a_file_on_its_way_is_waited_for(folder_as_hub):
    files, _, downloads, fetches = folder_as_hub
    fetch = prepare_fineweb.hub_fetch

    def fetch_slowly(file, commit, directory):
        fetches.append(f"{file} begun")
        threading.Event().wait(0.2)
        fetch(file, commit, directory)

    prepare_fineweb.hub_fetch = fetch_slowly  # the fixture's monkeypatch puts the real one back
    assert rows(downloads) == sum(files, [])
    assert len(fetches) == 6


def test_files_of_a_killed_preparation_are_used_if_their_size_is_right(folder_as_hub):
    files, folder, downloads, fetches = folder_as_hub
    Path(downloads.directory).mkdir()
    whole = folder / "000_00000.parquet"
    (Path(downloads.directory) / whole.name).write_bytes(whole.read_bytes())
    write_parquet(Path(downloads.directory) / "001_00000.parquet", ["of another commit"])
    assert rows(downloads) == sum(files, [])
    assert fetches == ["001_00000.parquet", "002_00000.parquet"]


@pytest.mark.parametrize("fault", [
    "missing", "truncated", "another size", "no parquet", "damaged",
])
def test_a_file_of_the_hub_that_is_not_whole_is_fetched_again_then_named(folder_as_hub, fault):
    files, folder, downloads, fetches = folder_as_hub
    path = folder / "001_00000.parquet"
    whole = path.read_bytes()
    fetch = prepare_fineweb.hub_fetch

    def damage():
        if fault == "missing":
            path.unlink()
        elif fault == "truncated":
            path.write_bytes(whole[:-1])
        elif fault == "another size":
            write_parquet(path, ["of another commit"])
        elif fault == "no parquet":
            path.write_bytes(bytes(len(whole)))
        else:  # from the second row group on
            start = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
            start = start.dictionary_page_offset
            path.write_bytes(whole[:start] + bytes(2000) + whole[start + 2000:])

    def fetch_mended(file, commit, directory):
        """Whole again at the third attempt."""
        if fetches.count(path.name) == 2:
            path.write_bytes(whole)
        fetch(file, commit, directory)

    damage()
    prepare_fineweb.hub_fetch = fetch_mended  # the fixture's monkeypatch puts the real one back
    assert rows(downloads) == sum(files, [])
    assert fetches.count(path.name) == 3
    damage()
    prepare_fineweb.hub_fetch = fetch
    message = "001_00000.parquet, .* and 4 times again .*: run the same command"
    with pytest.raises(ValueError, match=message):
        rows(downloads)


def test_a_broken_stream_goes_on_where_it_broke():
    breaks = iter([3, 3, 7])

    def open_rows(start):
        stop = next(breaks, None)
        for i in range(start, 10):
            if i == stop:
                raise ConnectionError("reset")
            yield i
    assert list(prepare_fineweb.retrying(open_rows, 1, waits=(0, 0))) == list(range(1, 10))

    def dead(start):
        raise ConnectionError("reset")
    message = "broke at document 5 and 2 times again .ConnectionError: reset.: run the same"
    with pytest.raises(ValueError, match=message):
        list(prepare_fineweb.retrying(dead, 5, waits=(0, 0)))


@pytest.mark.parametrize("mistake", [TypeError, AttributeError, KeyError, NameError, ValueError])
def test_a_mistake_is_not_tried_again(mistake):
    opened = []

    def wrong(start):
        opened.append(start)
        raise mistake("a mistake")
    with pytest.raises(mistake, match="a mistake"):
        list(prepare_fineweb.retrying(wrong, 0, waits=(0, 0)))
    assert opened == [0]


# -----------------------------------------------------------------------------
# reading

@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000, 4097])
def test_permute_is_a_bijection_that_depends_on_its_key(n):
    orders = [permute(np.arange(n), n, key) for key in ((1, 0), (1, 1), (2, 0))]
    assert all(sorted(order) == list(range(n)) for order in orders)
    if n >= 64:
        for other in orders[1:]:
            assert (orders[0] != other).mean() > 0.9
        assert np.abs(np.corrcoef(np.arange(n), orders[0])[0, 1]) < 0.4


def test_every_window_once_an_epoch(prepared):
    windows = Windows(str(prepared), "train", 16)
    meta = read_meta(prepared)
    expected = []  # by the definition: each window of a shard starts block_size after another
    for shard in meta["shards"]:
        if shard["split"] == "train":
            tokens = np.fromfile(prepared / shard["file"], np.uint16)
            expected += [tokens[i:i + 17].tolist() for i in range(0, len(tokens) - 16, 16)]
    assert windows.read(range(len(windows))).tolist() == expected
    n = len(windows)
    order = windows.shuffled(0, 2 * n, seed=3).tolist()
    assert sorted(order[:n]) == sorted(order[n:]) == sorted(expected) and order[:n] != order[n:]
    pieces = []
    for first in range(0, 2 * n - 10, 10):
        pieces += windows.shuffled(first, 10, seed=3).tolist()
    assert pieces == order[:len(pieces)]


def test_reading_reports_missing_and_short_shards(prepared, tmp_path):
    with pytest.raises(ValueError, match="meta.json is missing: prepare the data"):
        Windows(str(tmp_path), "train", 16)
    out = copied(prepared, tmp_path / "bins")
    message = "no train shard has a window of block_size . 1 = 5001 tokens"
    with pytest.raises(ValueError, match=message):
        Windows(str(out), "train", 5000)
    windows = Windows(str(out), "train", 16)
    shard = out / "train_000001.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:4000])
    with pytest.raises(ValueError, match="train_000001.bin is damaged: window 124 is short"):
        windows.read(range(len(windows)))
    shard.write_bytes(whole[:-2])
    with pytest.raises(ValueError, match="train_000001.bin has 7998 bytes, meta.json says 8000"):
        Windows(str(out), "train", 16)
    shard.unlink()
    with pytest.raises(ValueError, match="train_000001.bin is missing"):
        Windows(str(out), "train", 16)


@pytest.mark.parametrize("text, words", [
    ("{}", "tokenizer is missing, it must be str"),
    ("[]", ".. is not what prepare_fineweb.py writes"),
    ("null", "None is not what prepare_fineweb.py writes"),
    ('{"tokenizer": "gpt2"', "can't be read"),
    ('{"complete": false}', "is not whole: run its prepare_fineweb.py command again"),
    ('{"complete": "yes"}', "complete is 'yes', it must be bool"),
    ('{"dtype": "uint32"}', "dtype is 'uint32', only 'uint16' bins can be read"),
    ('{"tokenizer": "zz"}', "tokenizer='zz': must be 'gpt2' or 'bytes'"),
    ('{"vocab_size": null}', "vocab_size is None, it must be int"),
    ('{"shards": [{"file": "a.bin"}]}', "shard 0: split is missing"),
    ('{"shards": [5]}', "shard 0: 5 is not what"),
])
def test_a_wrong_meta_json_is_refused_in_one_line(prepared, tmp_path, text, words):
    """What is not a JSON object with keys replaces meta.json, what is replaces those keys."""
    out = copied(prepared, tmp_path / "bins")
    try:
        changes = json.loads(text)
    except ValueError:
        changes = None
    if isinstance(changes, dict) and changes:
        change_meta(out, **changes)
    else:
        (out / "meta.json").write_text(text)
    with pytest.raises(ValueError, match=words) as raised:
        Windows(str(out), "train", 16)
    assert "bins" in str(raised.value) and "\n" not in str(raised.value)


def test_ids_beyond_the_vocabulary_are_refused(prepared, tmp_path):
    out = copied(prepared, tmp_path / "bins")
    tokens = np.fromfile(out / "train_000001.bin", np.uint16)
    tokens[100] = 257
    tokens.tofile(out / "train_000001.bin")
    windows = Windows(str(out), "train", 16)
    with pytest.raises(ValueError, match="train_000001.bin is damaged: window 6 .* vocab_size=257"):
        windows.read(range(len(windows)))


@pytest.mark.parametrize("names", ["{0},", ",{0}", "{0},,{0}", ""])
def test_an_empty_name_among_directories_is_refused(prepared, names):
    with pytest.raises(ValueError, match="data_dir=.*: there must be a directory on each side"):
        Windows(names.format(prepared), "train", 16)


def test_a_fingerprint_is_of_the_windows_and_their_order(prepared, tmp_path):
    other = tmp_path / "other"
    source = write_jsonl(tmp_path / "text.jsonl", ["another", *DOCUMENTS * 20])
    prepared_well(other, source=source, val_tokens=1500, shard_tokens=4000)
    copy = copied(prepared, tmp_path / "copy")
    known = set()
    for name in (f"{prepared}", f"{other}", f"{prepared},{other}", f"{other},{prepared}"):
        for split in ("train", "val"):
            for block_size in (16, 17):
                known.add(Windows(name, split, block_size).fingerprint)
    assert len(known) == 16
    same = Windows(str(copy), "train", 16).fingerprint
    assert same == Windows(str(prepared), "train", 16).fingerprint


def test_a_runs_relative_data_dir_from_another_directory(prepared, tmp_path, monkeypatch):
    config = {"data_dir": prepared.name, "block_size": 16, "tokenizer": "bytes"}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="bins/meta.json is missing"):
        run_windows(config, "train")
    config["working_directory"] = str(prepared.parent)
    n_windows = len(Windows(str(prepared), "train", 16))
    assert len(run_windows(config, "train")) == n_windows
    config["data_dir"] = f"{prepared.name},{prepared.name}"
    assert len(run_windows(config, "train")) == 2 * n_windows
    copied(prepared, tmp_path / "moved")  # what is not there any more may be here
    assert len(run_windows({**config, "data_dir": "moved"}, "train")) == n_windows


def test_missing_data_are_named_with_what_makes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/data/my/meta.json")) as raised:
        Windows("data/my", "train", 16)
    assert "prepare_fineweb.py --out_dir=data/my and your --source" in str(raised.value)
    demo, = re.findall(r"prepare_fineweb.py --source.*\\\n.*", (ROOT / "Makefile").read_text())
    with pytest.raises(ValueError, match="data/python/meta.json is missing") as raised:
        Windows("data/python", "train", 16)
    command = str(raised.value).partition("python prepare_fineweb.py ")[2]
    assert sorted(command.split()) == sorted(demo.replace("\\", "").split()[1:])


# -----------------------------------------------------------------------------
# progress, systems

@pytest.mark.parametrize("options", [{"desc": "rows"}, {"unit_scale": True}])
def test_progress_in_a_log(options, monkeypatch, capsys):
    """Plain lines now and then, and none of what is quickly done."""
    monkeypatch.setattr(data.LogLines, "last_line", time.monotonic())
    assert list(progress(range(3), unit="row", **options)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(data, "LOG_SECONDS", 0)
    assert list(progress(iter("abc"), unit="row", total=3, **options)) == ["a", "b", "c"]
    with progress(total=3, unit="row", **options) as bar:
        bar.update(2)
    lines = capsys.readouterr().err.split("\n")
    assert lines.pop() == "" and "\r" not in "".join(lines)
    numbers = [line.removeprefix("rows ").split(" [")[0] for line in lines]
    if "unit_scale" in options:
        numbers = [number.replace(".00", "") for number in numbers]
    assert numbers == ["0/3", "1/3", "2/3", "3/3", "0/3", "2/3"]


def test_a_system_without_fcntl_is_told_so():
    program = "import sys; sys.modules['fcntl'] = None; import data"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr == "Linux and macOS are supported (on Windows: WSL)\n"


# -----------------------------------------------------------------------------

if __name__ == "__main__":
    n_kills = int(sys.argv[1].removeprefix("--kills="))
    with tempfile.TemporaryDirectory() as temporary:
        campaign = killed_preparations(Path(temporary), n_kills, (0.5, 2), n_rows=40_000)
    at_kill, n_preparations = campaign
    print(f"{len(at_kill)} kills of {n_preparations} preparations; each came to its end, with the "
          "bytes of an uninterrupted one. Kills by the file in which meta.json's place was:")
    for file, count in sorted(collections.Counter(at_kill).items()):
        print(f"    {file}: {count}")
