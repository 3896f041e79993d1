"""What several test files use: a small data set, a small training run, and how to start one."""
import csv
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from browser import Browser

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for test files that are run as scripts
TINY = dict(
    device="cpu",
    torch_compile=False,
    n_layer=2,
    n_head=2,
    n_embd=32,
    block_size=32,
    vocab_size=257,
    batch_size=4,
    gradient_accumulation_steps=4,
    cayley_levels="5,4,0;8,6,16",
    max_iters=20,
    warmup_iters=5,
    eval_interval=10,
    eval_iters=4,
    log_interval=1,
)
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONPATH": str(ROOT),  # for python -m tools.NAME in another directory
}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "torch._dynamo"])  # most of a script's seconds to start


def make_data(directory):
    """Byte tokens of Python's own text in directory."""
    command = [ROOT / "prepare_fineweb.py", "--source=python", "--tokenizer=bytes"]
    command += [f"--out_dir={directory}", "--val_tokens=20000", "--tokens=200000"]
    run_script(*command).check_returncode()
    return directory


def arguments(settings):
    """A dict as a script takes it: ["--key=value", ...]."""
    return [f"--{key}={value}" for key, value in settings.items()]


def train_command(data_dir, out_dir, ranks=1, /, **settings):
    """train.py with TINY and other settings, under torchrun for more than one rank."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    settings = {**TINY, "out_dir": out_dir, "data_dir": data_dir, **settings}
    return [*launcher, ROOT / "train.py", *arguments(settings)]


def run_here(command):
    """All of `python command`, a script or ["-m", "tools.NAME"], in this process."""
    sys.argv = command
    failed = False
    try:
        if command[0] == "-m":
            sys.argv = [f"{ROOT}/{command[1].replace('.', '/')}.py", *command[2:]]
            runpy.run_module(command[1], run_name="__main__")
        else:
            sys.path.insert(0, os.path.dirname(command[0]))
            runpy.run_path(command[0], run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())
        failed = True
    if failed:  # not in the handler, where the exception would hold all that the script held
        sys.exit(1)


def become_script(command, environment, output, error):
    """What a forked process does: all of `python command`, appending to two files."""
    for path, descriptor in ((output, 1), (error, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.update(environment)
    torch.set_num_threads(1)
    run_here(command)


def rank_environments(ranks):
    """The variables that torchrun sets, for each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def run_script(*command, ranks=1):
    """
    A script and its arguments in processes of their own -> subprocess.CompletedProcess.

    They are forked from one that has imported PyTorch, which spares the suite minutes. Several
    ranks are without torchrun's launcher; train_command has it.
    """
    command = [str(word) for word in command]
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory, name) for name in ("output", "error")]
        environments = rank_environments(ranks) if ranks > 1 else [{}]
        processes = []
        for environment in environments:
            args = (command, environment, *paths)
            processes.append(FORKS.Process(target=become_script, args=args))
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        texts = [path.read_text() for path in paths]
    status = next((process.exitcode for process in processes if process.exitcode), 0)
    return subprocess.CompletedProcess(command, status, *texts)


def run_training(data_dir, out_dir, ranks=1, /, **settings):
    return run_script(*train_command(data_dir, out_dir, **settings)[1:], ranks=ranks)


def log_rows(out_dir, column="loss"):
    """{iteration: text of a column of log.csv}, without empty ones."""
    with open(out_dir / "log.csv", newline="") as file:
        return {int(row["iter"]): row[column] for row in csv.DictReader(file) if row[column]}


def largest_difference(one, other, columns=("loss", "val_loss")):
    """Of two runs' rows, which must be of the same iterations."""
    differences = []
    for column in columns:
        a = log_rows(one, column)
        b = log_rows(other, column)
        assert a and a.keys() == b.keys()
        differences += [abs(float(a[it]) - float(b[it])) for it in a]
    return max(differences)


def contents(directory):
    """{name: bytes} of a directory's files."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "bins")


@pytest.fixture(scope="session")
def trained(data_dir, tmp_path_factory):
    """The out_dir of an uninterrupted run on one rank; tests must not change it."""
    out_dir = tmp_path_factory.mktemp("out") / "run"
    result = run_training(data_dir, out_dir)
    assert result.returncode == 0, result.stderr
    return out_dir


@pytest.fixture(scope="session")
def twin(data_dir, tmp_path_factory):
    """The out_dir of the dense twin of trained."""
    out_dir = tmp_path_factory.mktemp("twin") / "run"
    result = run_training(data_dir, out_dir, cayley_levels="")
    assert result.returncode == 0, result.stderr
    return out_dir


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; tests that want one are skipped without."""
    if not shutil.which("chromedriver"):
        pytest.skip("chromedriver is not here: apt-get install chromium-driver")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        yield browser
        browser.close()


def interrupted_stream(model, prompt, edit):
    """24 greedy tokens (1, 24): six each plain, edited in layer 0, recorded, and with a hook."""
    stream = model.stream(prompt, 24, temperature=0)
    tokens = [next(stream) for _ in range(6)]
    model.saes()[0].edits.append(edit)
    tokens += [next(stream) for _ in range(6)]
    model.saes()[0].edits.clear()
    with model.recording() as records:
        tokens += [next(stream) for _ in range(6)]
    seen = []
    hook = model.register_forward_hook(lambda *_: seen.append(1))
    tokens += [next(stream) for _ in range(6)]
    hook.remove()
    assert len(records[0]) == len(seen) == 6
    return torch.cat(tokens, 1)
