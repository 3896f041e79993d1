"""prepare_fineweb.py: what the bins hold, and how training reads them."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import prepare_fineweb
from data import Windows, get_tokenizer, permute, read_meta

SHARED = ROOT.parent / "shared"
DOCUMENTS = ["Hello world. ", "a literal <|endoftext|> is text", "naïve café 日本語 🙂", "x" * 1000, "last\n"]


def prepare(*arguments, **environment):
    """Run the script; its CompletedProcess."""
    return subprocess.run([sys.executable, ROOT / "prepare_fineweb.py", *map(str, arguments)], capture_output=True,
                          text=True, env={**os.environ, **environment})


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def read_bins(out):
    """All tokens of a directory in order, val first."""
    return np.concatenate([np.fromfile(out / shard["file"], np.uint16) for shard in read_meta(out)["shards"]])


def split_documents(tokens, encoding):
    starts = np.flatnonzero(tokens == encoding.eot_token)
    return [encoding.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """DOCUMENTS 20 times over as byte tokens, in shards that cut documents."""
    directory = tmp_path_factory.mktemp("data")
    source = write_jsonl(directory / "text.jsonl", DOCUMENTS * 20)
    run = prepare(f"--source={source}", "--tokenizer=bytes", f"--out_dir={directory / 'bins'}", "--val_tokens=1500",
                  "--shard_tokens=4000")
    assert run.returncode == 0, run.stderr
    return directory / "bins"


def test_bytes_round_trip(prepared):
    encoding = get_tokenizer("bytes")
    assert split_documents(read_bins(prepared), encoding) == DOCUMENTS * 20
    meta = read_meta(prepared)
    assert (meta["tokenizer"], meta["vocab_size"], meta["dtype"], meta["complete"]) == ("bytes", 257, "uint16", True)
    assert meta["tokens"]["val"] == 1500 == len(np.fromfile(prepared / "val_000000.bin", np.uint16))
    assert sum(meta["tokens"].values()) == len(read_bins(prepared)) and sum(meta["documents"].values()) == 100
    assert [s["tokens"] for s in meta["shards"][1:-1]] == [4000] * (len(meta["shards"]) - 2) and len(meta["shards"]) > 3
    assert {path.name for path in prepared.iterdir()} == {s["file"] for s in meta["shards"]} | {"meta.json"}


def test_gpt2_round_trip_of_fineweb_edu(tmp_path):
    sample = SHARED / "data" / "fineweb_edu_sample.jsonl"
    if not sample.exists():
        pytest.skip(f"{sample} is not here")
    run = prepare(f"--source={sample}", f"--out_dir={tmp_path / 'bins'}", "--val_tokens=10000", "--shard_tokens=30000",
                  TIKTOKEN_CACHE_DIR=str(SHARED / "tiktoken_cache"))
    assert run.returncode == 0, run.stderr
    texts = [json.loads(line)["text"] for line in sample.read_text().splitlines()]
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    encoding = get_tokenizer("gpt2")
    tokens = read_bins(tmp_path / "bins")
    assert split_documents(tokens, encoding) == texts
    assert tokens.tolist() == [token for text in texts for token in [50256] + encoding.encode_ordinary(text)]


def test_txt_parquet_and_globs(tmp_path):
    import pyarrow
    import pyarrow.parquet
    for i, text in enumerate(DOCUMENTS):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS}), tmp_path / "all.parquet")
    run = prepare(f"--source={tmp_path}/*.txt,{tmp_path}/all.parquet", "--tokenizer=bytes", f"--out_dir={tmp_path / 'bins'}",
                  "--val_tokens=50")
    assert run.returncode == 0, run.stderr
    assert split_documents(read_bins(tmp_path / "bins"), get_tokenizer("bytes")) == DOCUMENTS * 2


def test_tokens_limits_the_stream(tmp_path):
    source = write_jsonl(tmp_path / "text.jsonl", DOCUMENTS * 20)
    run = prepare(f"--source={source}", "--tokenizer=bytes", f"--out_dir={tmp_path / 'bins'}", "--val_tokens=100", "--tokens=1000")
    assert run.returncode == 0, run.stderr
    assert len(read_bins(tmp_path / "bins")) == 1000


def test_a_stopped_preparation_goes_on_to_the_same_bytes(prepared, tmp_path):
    """As after kill -9 anywhere: drop shards from the end, leave a half-written one, and run the same command."""
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
            (out / "meta.json").write_text(json.dumps({**meta, "shards": kept, "tokens": counts, "complete": False}))
        (out / f"{meta['shards'][n_kept]['file']}.tmp").write_bytes(b"half")
        arguments = [f"--{key}={value}" for key, value in meta["arguments"].items()]
        run = prepare(*arguments, f"--out_dir={out}")
        assert run.returncode == 0, run.stderr
        for shard in meta["shards"]:
            assert (out / shard["file"]).read_bytes() == (prepared / shard["file"]).read_bytes()


def test_other_arguments_never_touch_an_existing_directory(prepared):
    before = {path.name: path.read_bytes() for path in prepared.iterdir()}
    arguments = {**read_meta(prepared)["arguments"], "val_tokens": 1600}
    run = prepare(*[f"--{key}={value}" for key, value in arguments.items()], f"--out_dir={prepared}")
    assert run.returncode == 1 and "val_tokens=1500, not 1600" in run.stderr and run.stderr.count("\n") == 1
    assert before == {path.name: path.read_bytes() for path in prepared.iterdir()}


def test_verify_finds_a_changed_shard(prepared, tmp_path):
    assert prepare(f"--verify={prepared}").returncode == 0
    out = tmp_path / "copy"
    out.mkdir()
    for path in prepared.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    damaged = bytearray((out / "train_000001.bin").read_bytes())
    damaged[100] ^= 1
    (out / "train_000001.bin").write_bytes(damaged)
    run = prepare(f"--verify={out}")
    assert run.returncode == 1 and "train_000001.bin" in run.stdout and "train_000000.bin" not in run.stdout


def test_empty_and_foreign_rows_are_counted_and_skipped(tmp_path):
    source = tmp_path / "text.jsonl"
    rows = [{"text": "one"}, {"text": ""}, {"text": None}, {"text": 5}, {"text": "lone \ud800 surrogate"}, {"text": "two"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = prepare(f"--source={source}", "--tokenizer=bytes", f"--out_dir={tmp_path / 'bins'}", "--val_tokens=4")
    assert run.returncode == 0, run.stderr
    assert split_documents(read_bins(tmp_path / "bins"), get_tokenizer("bytes")) == ["one", "lone \ufffd surrogate", "two"]
    assert read_meta(tmp_path / "bins")["skipped_documents"] == 3


@pytest.mark.parametrize("workers", [1, 3])
def test_killed_at_any_moment_and_started_again(tmp_path, workers):
    """kill -9 at moments spread over the run, then once more to the end: the bytes of an uninterrupted run."""
    source = write_jsonl(tmp_path / "text.jsonl", DOCUMENTS * 4000)
    arguments = [f"--source={source}", "--tokenizer=bytes", "--val_tokens=1e5", "--shard_tokens=5e4", f"--workers={workers}"]
    out, whole = tmp_path / "killed", tmp_path / "whole"
    assert prepare(*arguments, f"--out_dir={whole}").returncode == 0
    kills = 0
    for attempt in range(40):
        process = subprocess.Popen([sys.executable, ROOT / "prepare_fineweb.py", *arguments, f"--out_dir={out}"],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(0.4 + 0.05 * attempt)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        if (out / "meta.json").exists():
            assert prepare_fineweb.verify_shards(out) == []  # what is there is whole
    assert kills and process.returncode == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {path.name: path.read_bytes() for path in whole.iterdir()}


@pytest.mark.parametrize("n", [2, 3])
def test_parts_are_disjoint_and_in_order(tmp_path, n):
    texts = [f"{i} {text}" for i, text in enumerate(DOCUMENTS * 3)]
    (tmp_path / "a.txt").write_text("a text file")
    source = f"{tmp_path / 'a.txt'},{write_jsonl(tmp_path / 'text.jsonl', texts)}"
    outs = [tmp_path / str(i) for i in range(n)]
    for i, out in enumerate(outs):
        run = prepare(f"--source={source}", "--tokenizer=bytes", f"--out_dir={out}", f"--shard={i}/{n}", f"--val_tokens={100 * (i == 0)}")
        assert run.returncode == 0, run.stderr
    tokens = np.concatenate([read_bins(out) for out in outs])
    assert split_documents(tokens, get_tokenizer("bytes")) == ["a text file"] + texts
    together = Windows(",".join(map(str, outs)), "train", 8)
    assert len(together) == sum(len(Windows(str(out), "train", 8)) for out in outs)
    run = prepare(f"--source={source}", "--tokenizer=bytes", f"--out_dir={tmp_path / 'skip'}", "--skip=4", "--val_tokens=0")
    assert run.returncode == 0 and split_documents(read_bins(tmp_path / "skip"), get_tokenizer("bytes")) == texts[3:]


def test_invalid_utf8_is_reported_and_refused_or_replaced(tmp_path):
    source = tmp_path / "text.txt"
    source.write_bytes(b"good\nbad \xff here\n")
    arguments = [f"--source={source}", "--tokenizer=bytes", f"--out_dir={tmp_path / 'bins'}", "--val_tokens=2"]
    run = prepare(*arguments)
    assert run.returncode == 1 and "text.txt, line 2: invalid UTF-8 (byte 4 is 0xff)" in run.stderr
    run = prepare(*arguments, "--on-error=replace")
    assert run.returncode == 0 and "text.txt, line 2" in run.stderr
    assert split_documents(read_bins(tmp_path / "bins"), get_tokenizer("bytes")) == ["good\nbad \ufffd here\n"]
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"text": \n')
    run = prepare(f"--source={tmp_path / 'bad.jsonl'}", "--tokenizer=bytes", f"--out_dir={tmp_path / 'other'}")
    assert run.returncode == 1 and "bad.jsonl, line 2: not JSON" in run.stderr.splitlines()[-1]


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
    with pytest.raises(ValueError, match="broke at document 5 and 2 times again .ConnectionError: reset.: run the same"):
        list(prepare_fineweb.retrying(dead, 5, waits=(0, 0)))


# -----------------------------------------------------------------------------
# reading

@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000, 4097])
def test_permute_is_a_bijection_that_depends_on_its_key(n):
    orders = [permute(np.arange(n), n, key) for key in ((1, 0), (1, 1), (2, 0))]
    assert all(sorted(order) == list(range(n)) for order in orders)
    if n >= 64:
        assert all((a != b).mean() > 0.9 for a, b in ((orders[0], orders[1]), (orders[0], orders[2])))
        assert np.abs(np.corrcoef(np.arange(n), orders[0])[0, 1]) < 0.4


def test_every_window_once_an_epoch(prepared):
    windows = Windows(str(prepared), "train", 16)
    meta = read_meta(prepared)
    expected = []  # by the definition: shard by shard, each window starts block_size after the one before
    for shard in meta["shards"]:
        if shard["split"] == "train":
            tokens = np.fromfile(prepared / shard["file"], np.uint16)
            expected += [tokens[i:i + 17].tolist() for i in range(0, len(tokens) - 16, 16)]
    assert windows.read(range(len(windows))).tolist() == expected
    n = len(windows)
    order = windows.shuffled(0, 2 * n, seed=3).tolist()
    assert sorted(order[:n]) == sorted(order[n:]) == sorted(expected) and order[:n] != order[n:]
    pieces = [windows.shuffled(first, 10, seed=3).tolist() for first in range(0, 2 * n - 10, 10)]
    assert [row for piece in pieces for row in piece] == order[:10 * len(pieces)]


def test_reading_reports_missing_and_short_shards(prepared, tmp_path):
    with pytest.raises(ValueError, match="meta.json is missing: prepare the data"):
        Windows(str(tmp_path), "train", 16)
    for path in prepared.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="no train shard has a window of block_size . 1 = 5001 tokens"):
        Windows(str(tmp_path), "train", 5000)
    shard = tmp_path / "train_000001.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match="train_000001.bin has 7998 bytes, meta.json says 8000"):
        Windows(str(tmp_path), "train", 16)
    shard.unlink()
    with pytest.raises(ValueError, match="train_000001.bin is missing"):
        Windows(str(tmp_path), "train", 16)


def test_missing_gpt2_files_without_a_network(tmp_path):
    run = prepare("--source=python", f"--out_dir={tmp_path / 'bins'}", TIKTOKEN_CACHE_DIR=str(tmp_path / "empty"),
                  https_proxy="http://127.0.0.1:9", HTTPS_PROXY="http://127.0.0.1:9")
    assert run.returncode == 1 and "TIKTOKEN_CACHE_DIR" in run.stderr and "Traceback" not in run.stderr
