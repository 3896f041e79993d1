"""The top level stands alone: nothing there imports tools, and copied without them it does all."""
import ast
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, TINY, arguments, log_rows

TOP = sorted(path for path in ROOT.glob("*.py") if not path.name.startswith("test_"))
FORK = ("train", "model", "cayley", "muon", "checkpoint", "data", "configurator")
TOOLS = [path for path in sorted((ROOT / "tools").glob("*.py")) if "__main__" in path.read_text()]


def imported(path):
    """Names of the modules that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", TOP, ids=lambda path: path.stem)
def test_nothing_at_the_top_imports_tools(path):
    assert "tools" not in imported(path)


def test_cayley_imports_nothing_of_ours():
    assert not imported(ROOT / "cayley.py") & {path.stem for path in TOP}


@pytest.mark.parametrize("code", ["import train", "import sample", "import tools"])
def test_waiting_threads_sleep_early_unless_the_environment_says_otherwise(code):
    """Set before torch is loaded, which is when GCC's OpenMP reads it."""
    seen = f"""
import builtins, os, sys
load = builtins.__import__
def watch(name, *rest):
    if name == "torch":
        print(os.environ["GOMP_SPINCOUNT"])
        sys.exit()
    return load(name, *rest)
builtins.__import__ = watch
{code}, torch
"""
    environment = {key: ENVIRONMENT[key] for key in ENVIRONMENT if key != "GOMP_SPINCOUNT"}
    for given, expected in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        result = subprocess.run([sys.executable, "-c", seen], env={**environment, **given},
                                capture_output=True, text=True)
        assert result.stdout.strip() == expected, result.stderr


def run(directory, script, *words):
    environment = {**ENVIRONMENT, "PYTHONPATH": ""}
    command = [sys.executable, script, *words]
    return subprocess.Popen(
        command, cwd=directory, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )


def finish(process):
    output, error = process.communicate()
    assert process.returncode == 0, error
    return output


def test_the_top_level_alone_prepares_trains_stops_resumes_and_samples(tmp_path):
    for path in TOP:
        shutil.copy(path, tmp_path)
    prepare = ["--source=python", "--tokenizer=bytes", "--tokens=200000", "--val_tokens=20000"]
    finish(run(tmp_path, "prepare_fineweb.py", *prepare, "--out_dir=bins"))
    settings = arguments({**TINY, "data_dir": "bins", "out_dir": "run"})
    training = run(tmp_path, "train.py", *settings)
    for line in training.stdout:
        if line.startswith("iter 3:"):
            training.send_signal(signal.SIGTERM)
    finish(training)
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["iter"] < 20
    finish(run(tmp_path, "train.py", *settings, "--init_from=resume"))
    assert max(log_rows(tmp_path / "run")) == 19
    sampled = ["--ckpt=run", "--device=cpu", "--num_samples=1", "--max_new_tokens=20"]
    assert "-" * 80 in finish(run(tmp_path, "sample.py", *sampled, "--steer=0.1.7=+8"))


def test_a_fork_of_the_files_that_the_readme_names_trains(data_dir, tmp_path):
    for name in FORK:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    settings = {**TINY, "data_dir": data_dir, "out_dir": "run", "max_iters": 2}
    finish(run(tmp_path, "train.py", *arguments(settings)))
    named = re.search(r"\*\*To fork\*\*, copy ([\w, ]+),", (ROOT / "README.md").read_text())[1]
    assert set(re.findall(r"\w+", named)) - {"and"} == set(FORK)


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_a_tool_run_as_a_file_says_how_to_run_it(path):
    result = subprocess.run([sys.executable, path], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == f"from the repository's root: python -m tools.{path.stem}\n"


def test_the_readme_s_table_has_every_file_and_its_size():
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", text, re.MULTILINE)
    assert {name for name, _ in rows} == {path.name for path in ROOT.glob("*.py")}
    for name, lines in rows:
        assert abs(int(lines) - len((ROOT / name).read_text().splitlines())) <= 10, name
