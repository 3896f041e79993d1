"""
A full disk loses nothing that could be kept and hides nothing that is lost.

    python tests/test_disk.py --rounds=30     # disks that fill and empty at random moments, by hand

The disk is a small tmpfs, which takes root; without it these tests are skipped.
"""
import contextlib
import os
import random
import resource
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, log_rows, make_data, run_training, train_command

import checkpoint
import configurator
import data

DISK_BYTES = 8 * 2**20  # some ten checkpoints of TINY
SETTINGS = dict(max_iters=80, eval_interval=20, eval_iters=1, save_patience=1.0)


@contextlib.contextmanager
def small_disk(path):
    """A file system of DISK_BYTES at path. Raises OSError where this process may not make one."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True).returncode:
        raise OSError("mounting a tmpfs takes root")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def disk(tmp_path):
    try:
        context = small_disk(tmp_path / "disk")
        path = context.__enter__()
    except OSError as error:
        pytest.skip(str(error))
    yield path
    context.__exit__(None, None, None)


def fill(disk):
    """Take all that is left, to the last byte."""
    with contextlib.suppress(OSError), open(disk / "filler", "ab", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


def empty(disk):
    (disk / "filler").unlink(missing_ok=True)


def paused_at(process, iterations):
    """Yield each of these iterations while the run stands still behind it."""
    wanted = list(iterations)
    for line in process.stdout:
        if wanted and line.startswith(f"iter {wanted[0]}: loss"):
            process.send_signal(signal.SIGSTOP)
            yield wanted.pop(0)
            process.send_signal(signal.SIGCONT)


def start(data_dir, out_dir, **settings):
    return subprocess.Popen(
        train_command(data_dir, out_dir, **{**SETTINGS, **settings}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """A run of SETTINGS whose disk was never full."""
    out_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run_training(data_dir, out_dir, **SETTINGS).returncode == 0
    return out_dir


def same_rows(one, other):
    return all(log_rows(one, column) == log_rows(other, column) for column in ("loss", "val_loss"))


def test_a_disk_that_is_full_for_a_while_loses_nothing(data_dir, whole, disk):
    out_dir = disk / "run"
    process = start(data_dir, out_dir)
    for it in paused_at(process, [25, 70]):
        fill(disk) if it == 25 else empty(disk)
    error = process.stderr.read()
    assert process.wait() == 0, error
    assert "log.csv could not be written (No space left on device)" in error
    assert "last.pt could not be written (No space left on device): training goes on" in error
    assert {path.name for path in out_dir.iterdir()} == {path.name for path in whole.iterdir()}
    assert same_rows(out_dir, whole)


@pytest.mark.parametrize("full_at, saved_at", [(6, 0), (50, 40)])
def test_a_last_checkpoint_that_cannot_be_written_is_an_error(
    data_dir, whole, disk, full_at, saved_at
):
    out_dir = disk / "run"
    process = start(data_dir, out_dir)
    for _ in paused_at(process, [full_at]):
        fill(disk)
    lines = process.stderr.read().splitlines()
    assert process.wait() == 1
    assert lines[-1].startswith("train.py: ") and "No space left on device" in lines[-1]
    assert "what came after the last checkpoint there is lost" in lines[-1]
    assert not list(out_dir.glob("*.tmp"))  # the partial file would keep the disk full
    for name in ("last.pt", "ckpt.pt"):
        assert torch.load(out_dir / name, weights_only=True)["iter"] == saved_at
    empty(disk)
    result = run_training(data_dir, out_dir, init_from="resume", **SETTINGS)
    assert result.returncode == 0, result.stderr
    assert same_rows(out_dir, whole)


def test_room_made_in_time_saves_the_last_checkpoint(data_dir, whole, disk):
    out_dir = disk / "run"
    process = start(data_dir, out_dir, save_patience=60.0)
    next(paused_at(process, [50]))
    fill(disk)
    process.send_signal(signal.SIGCONT)
    for line in process.stderr:
        if "tried again" in line:
            empty(disk)
    assert process.wait() == 0
    assert torch.load(out_dir / "last.pt", weights_only=True)["iter"] == 80
    assert same_rows(out_dir, whole)


def test_a_limit_of_file_sizes_leaves_the_old_checkpoint_and_the_training(data_dir, tmp_path):
    """As a full disk, without root."""
    out_dir = tmp_path / "run"
    assert run_training(data_dir, out_dir, lr_schedule="constant", max_iters=10).returncode == 0
    before = (out_dir / "last.pt").read_bytes()
    limit = len(before) // 2
    settings = dict(init_from="resume", lr_schedule="constant", save_patience=0.0)
    result = subprocess.run(
        train_command(data_dir, out_dir, **settings),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode == 1
    assert max(log_rows(out_dir)) == 19  # training went on
    assert "last.pt could not be written (File too large)" in result.stderr
    assert result.stderr.count("\n") == 1
    assert (out_dir / "last.pt").read_bytes() == before


def test_rows_are_appended_whole_or_not_at_all(tmp_path):
    """A file that may have 10 bytes, as a disk with room for the first 3 of the row."""
    path = tmp_path / "log.csv"
    path.write_bytes(b"header\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="No space left"):
            checkpoint.append(path, b"1,2,3,4\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"header\n"
    checkpoint.append(path, b"1,2,3,4\n")
    assert path.read_bytes() == b"header\n1,2,3,4\n"


def test_a_full_disk_under_standard_output_stops_no_run(data_dir, whole, disk, tmp_path):
    fill(disk)
    with open(disk / "filler", "ab") as log:
        command = train_command(data_dir, tmp_path / "run", **SETTINGS)
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        process.communicate()
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["iter"] == 80
    assert same_rows(tmp_path / "run", whole)


def test_a_reader_that_goes_stops_no_run(data_dir, whole, tmp_path):
    process = start(data_dir, tmp_path / "run")
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 0, error
    assert same_rows(tmp_path / "run", whole)


def test_an_atomic_file_leaves_nothing_on_a_full_disk(disk):
    path = disk / "file.json"
    data.write_json(path, [1])
    fill(disk)
    with pytest.raises(OSError):
        data.write_json(path, list(range(100_000)))
    assert path.read_text() == "[\n 1\n]" and not list(disk.glob("*.tmp"))


# -----------------------------------------------------------------------------
# by hand


def disk_campaign(directory, data_dir, rounds, seed):
    """
    Runs whose disk fills at a random iteration and is emptied at a later one, or never.

    Raises AssertionError for a row that a run on a large disk doesn't have, a damaged checkpoint, a
    partial file or a wrong status. Returns counts.
    """
    generator = random.Random(seed)
    whole = directory / "whole"
    assert run_training(data_dir, whole, **SETTINGS).returncode == 0
    counts = {"full for a while": 0, "full to the end, then resumed": 0}
    for number in range(rounds):
        with small_disk(directory / str(number)) as disk:
            out_dir = disk / "run"
            first, second = sorted(generator.sample(range(1, SETTINGS["max_iters"] - 1), 2))
            for_good = generator.random() < 0.5
            process = start(data_dir, out_dir)
            for it in paused_at(process, [first] if for_good else [first, second]):
                fill(disk) if it == first else empty(disk)
            process.stderr.read()
            assert process.wait() == (1 if for_good else 0)
            assert not list(out_dir.glob("*.tmp"))
            if for_good:
                empty(disk)
                result = run_training(data_dir, out_dir, init_from="resume", **SETTINGS)
                assert result.returncode == 0, result.stderr
            assert same_rows(out_dir, whole)
            counts["full to the end, then resumed" if for_good else "full for a while"] += 1
    return counts


if __name__ == "__main__":
    rounds = 30
    seed = 0
    configurator.configure(globals())
    with tempfile.TemporaryDirectory() as name:
        print(disk_campaign(Path(name), make_data(os.path.join(name, "data")), rounds, seed))
