"""
Nothing lost, nothing wrong: kill -9 at random moments, many ranks, long runs, random inputs.

    python tests/test_reliability.py --rounds=200 --ranks=1     # the kill campaign by hand

A few rounds of the campaign run in the suite. Full disks are in test_disk.py.
"""
import math
import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    ENVIRONMENT,
    largest_difference,
    log_rows,
    make_data,
    run_training,
    train_command,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

import configurator
from cayley import CayleySAE, all_label_bits
from checkpoint import load_checkpoint
from model import GPT, GPTConfig
from test_cayley import reference

# -----------------------------------------------------------------------------
# kill -9

CAMPAIGN = dict(max_iters=200, eval_interval=10, eval_iters=2, gradient_accumulation_steps=2)
LONGEST = "longest time to end after a rank's death (s)"


def workers(process):
    """Process ids of the ranks that a launcher has started."""
    command = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    return [int(pid) for pid in output.split()]


def start_or_resume(data_dir, out_dir, ranks):
    init_from = "resume" if (out_dir / "last.pt").exists() else "scratch"
    command = train_command(data_dir, out_dir, ranks, init_from=init_from, **CAMPAIGN)
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT
    )


def changed_since(path, moment):
    """Whether a file was written after a moment (time.time())."""
    try:
        return path.stat().st_mtime > moment
    except FileNotFoundError:
        return False


def wait_for_the_moment(process, out_dir, seconds, during_a_write):
    """
    Until so many seconds after the run's first row and, if asked for, a checkpoint being written.

    True if one is being written.
    """
    started = time.time()
    deadline = None
    while process.poll() is None:
        if deadline is None and changed_since(out_dir / "log.csv", started):
            deadline = time.monotonic() + seconds
        writing = changed_since(out_dir / "last.pt.tmp", started)
        if deadline and time.monotonic() > deadline and (writing or not during_a_write):
            return writing
        time.sleep(0 if during_a_write else 0.01)
    return False


def kill_one(process, ranks, generator):
    """kill -9 of the run, or of one of its ranks -> seconds until all of it has ended."""
    victims = workers(process) if ranks > 1 else [process.pid]
    if victims:
        os.kill(generator.choice(victims), signal.SIGKILL)
    else:
        process.kill()
    start = time.monotonic()
    process.wait(60)
    return round(time.monotonic() - start, 1)


def check_what_is_left(out_dir, expected):
    """Whole checkpoints, no row that an unkilled run lacks, at most one interval to do again."""
    rows = log_rows(out_dir) if (out_dir / "log.csv").exists() else {}
    assert all(expected[it] == loss for it, loss in rows.items())
    if (out_dir / "last.pt").exists():
        load_checkpoint(str(out_dir / "ckpt.pt"))
        saved = load_checkpoint(str(out_dir / "last.pt"))["iter"]
        assert max(rows, default=0) - saved <= CAMPAIGN["eval_interval"]


def kill_campaign(directory, data_dir, rounds, ranks, seed=0):
    """
    Runs killed at random moments (one rank of several, at random) and resumed, `rounds` kills.

    Every other kill waits for a checkpoint that is being written. Raises AssertionError on a
    damaged file, on more than one interval of repeated work, or on a loss row that an unkilled run
    doesn't have. Returns counts.
    """
    generator = random.Random(seed)
    whole = directory / "whole"
    assert run_training(data_dir, whole, ranks, **CAMPAIGN).returncode == 0
    expected = log_rows(whole)
    counts = {"kills": 0, "during writes": 0, "finished runs": 0, LONGEST: 0.0}
    out_dir = directory / "run 0"
    while counts["kills"] < rounds:
        process = start_or_resume(data_dir, out_dir, ranks)
        seconds = generator.uniform(0, 3)
        during_a_write = counts["kills"] % 2 == 1
        writing = wait_for_the_moment(process, out_dir, seconds, during_a_write)
        if process.poll() is None:
            took = kill_one(process, ranks, generator)
            counts[LONGEST] = max(counts[LONGEST], took)
            counts["kills"] += 1
            counts["during writes"] += writing
            check_what_is_left(out_dir, expected)
        else:
            assert process.returncode == 0, f"resume ended with status {process.returncode}"
            assert log_rows(out_dir) == expected
            counts["finished runs"] += 1
            out_dir = directory / f"run {counts['finished runs']}"
    return counts


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_runs_resume_to_the_same_rows(data_dir, tmp_path, ranks):
    counts = kill_campaign(tmp_path, data_dir, rounds=2, ranks=ranks)
    assert counts["kills"] == 2
    assert counts[LONGEST] < 60


def test_a_dead_rank_is_reported(data_dir, tmp_path):
    process = subprocess.Popen(
        train_command(data_dir, tmp_path / "run", 2, max_iters=5000),
        text=True,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    for line in process.stdout:
        if line.startswith("iter 3:"):
            os.kill(workers(process)[1], signal.SIGKILL)
            break
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0 and "SIGKILL" in error


# -----------------------------------------------------------------------------
# numbers

SMALL = dict(block_size=8, vocab_size=65, n_head=2, n_embd=32, cayley_levels="5,4,0;8,6,16")


def test_the_first_nonfinite_layer_is_named():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=3, **SMALL))
    idx = torch.randint(65, (2, 8))
    assert model.first_nonfinite(idx, idx) is None
    with torch.no_grad():
        model.blocks[1].mlp.c_fc.weight[3, 3] = math.inf
    assert model.first_nonfinite(idx, idx) == "blocks.1.mlp.c_fc"


def test_ties_are_decided_alike_wherever_a_token_stands():
    torch.manual_seed(0)
    sae = CayleySAE(64, "6,8,0;10,8,64")
    signs = torch.randint(-1, 2, (64,)).float()
    tokens = torch.stack([torch.zeros(64), torch.ones(64), torch.eye(64)[5], signs])  # many ties
    alone = sae.encode(tokens)
    for order in (torch.arange(4).repeat(100), torch.randperm(400) % 4):
        for code, expected in zip(sae.encode(tokens[order]), alone):
            assert torch.equal(code.ids, expected.ids[order])


# -----------------------------------------------------------------------------
# ranks


def test_three_ranks_see_the_same_batches_and_statistics(data_dir, tmp_path):
    """
    While weights are still equal: the first losses, those after statistics are folded in, and the
    evaluations' columns on the codes.
    """
    no_learning = dict(muon_lr=0.0, muon_min_lr=0.0, adamw_lr=0.0, adamw_min_lr=0.0)
    for ranks in (1, 2, 3):
        out_dir = tmp_path / str(ranks)
        settings = dict(gradient_accumulation_steps=6, max_iters=4, **no_learning)
        result = run_training(data_dir, out_dir, ranks, **settings)
        assert result.returncode == 0, result.stderr
    first = log_rows(tmp_path / "1")
    for ranks in (2, 3):
        other = log_rows(tmp_path / str(ranks))
        assert abs(float(first[0]) - float(other[0])) < 1e-5
        assert max(abs(float(first[it]) - float(other[it])) for it in first) < 1e-3
    for column in ("explained", "dead_0", "dead_1"):
        columns = [log_rows(tmp_path / str(ranks), column)[0] for ranks in (1, 2, 3)]
        assert columns[0] == columns[1] == columns[2], column
    statistics = []
    for ranks in (1, 2, 3):
        statistics.append(load_checkpoint(str(tmp_path / str(ranks) / "last.pt"))["model"])
    for other in statistics[1:]:
        for name in ("blocks.0.sae.mean", "blocks.0.sae.var"):
            torch.testing.assert_close(other[name], statistics[0][name])


def test_ranks_stay_together_over_many_iterations(data_dir, tmp_path):
    """What ranks round differently may flip a selection, so losses aren't equal, only near."""
    settings = dict(max_iters=30, gradient_accumulation_steps=6, eval_interval=30)
    for ranks in (1, 2, 3):
        assert run_training(data_dir, tmp_path / str(ranks), ranks, **settings).returncode == 0
    for ranks in ("2", "3"):
        assert largest_difference(tmp_path / "1", tmp_path / ranks, ("loss",)) < 1e-3


# -----------------------------------------------------------------------------
# long runs


def test_memory_and_files_stay_flat(data_dir, tmp_path):
    """Of a process between iterations 50 and 250."""
    settings = dict(max_iters=250, eval_interval=50, eval_iters=1)
    process = subprocess.Popen(
        train_command(data_dir, tmp_path / "run", **settings),
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    measured = {}
    for line in process.stdout:
        for it in (50, 249):
            if line.startswith(f"iter {it}: loss"):
                status = Path(f"/proc/{process.pid}/status").read_text()
                memory = int(status.split("VmRSS:")[1].split()[0])
                n_files = len(os.listdir(f"/proc/{process.pid}/fd"))
                measured[it] = memory, n_files
    assert process.wait() == 0
    assert measured[249][0] < 1.05 * measured[50][0], measured
    assert measured[249][1] <= measured[50][1], measured


# -----------------------------------------------------------------------------
# random inputs


@st.composite
def layers(draw):
    """n_embd, levels and whether there is a gate, that the field allows."""
    t = draw(st.integers(4, 7))
    levels = [(t, draw(st.integers(1, 2**t)), 0)]
    for _ in range(draw(st.integers(0, 3))):
        n = levels[-1][0] + draw(st.integers(1, 3))
        if n > min(len(all_label_bits(t)), 11):
            break
        delta = 2 ** draw(st.integers(n - levels[-1][0], n))
        levels.append((n, draw(st.integers(1, delta)), delta))
    return 2**t, levels, draw(st.booleans())


SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@example((64, [(6, 1, 0)], False), [0], True, True, 0)  # top-k by groups of an empty batch
@given(layers(), SHAPES, st.booleans(), st.booleans(), st.integers(0, 99))
def test_any_layer_equals_the_reference(layer, shape, standardize, forward, seed):
    n_embd, levels, gate = layer
    torch.manual_seed(seed)
    sae = CayleySAE(n_embd, levels, gate, standardize, forward).double()
    with torch.no_grad():
        sae.bias.normal_()
        sae.var.uniform_(0.5, 2)
    x = torch.randn(*shape, n_embd, dtype=torch.float64)
    codes = sae.encode(x)
    output = sae.decode(codes)
    assert output.shape == x.shape
    expected, expected_codes = reference(sae, x.reshape(-1, n_embd))
    torch.testing.assert_close(output.reshape(-1, n_embd), expected)
    for code, (ids, _) in zip(codes, expected_codes):
        assert code.ids.shape == x.shape[:-1] + ids.shape[1:]
        mine = code.ids.reshape(ids.shape)
        torch.testing.assert_close(mine.sort(1).values, ids.sort(1).values)


VALUES = st.one_of(
    st.text(max_size=8),
    st.integers().map(str),
    st.floats().map(str),
    st.booleans().map(str),
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["size", "rate", "name", "switch", "nothing"]), VALUES)
def test_any_argument_is_taken_with_the_right_type_or_refused(key, value):
    namespace = {"size": 1, "rate": 0.5, "name": "a", "switch": False}
    try:
        result = configurator.configure(dict(namespace), [f"--{key}={value}"])
    except ValueError:
        assert key != "name"
    else:
        types = {name: type(v) for name, v in namespace.items()}
        assert {name: type(v) for name, v in result.items()} == types
        assert key != "name" or result["name"] == value


if __name__ == "__main__":
    rounds, ranks, seed = 200, 1, 0
    configurator.configure(globals())
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        print(kill_campaign(directory, make_data(directory / "data"), rounds, ranks, seed))
