"""train.py and sample.py as their users run them: training, resume, ranks, errors."""
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import (
    ENVIRONMENT,
    ROOT,
    contents,
    largest_difference,
    log_rows,
    run_script,
    run_training,
    train_command,
)

import configurator
from checkpoint import load_model
from model import GPT, GPTConfig, covariances, explained
from tools.account import train_settings


def test_a_run_leaves_its_files(trained):
    assert set(contents(trained)) == {"ckpt.pt", "last.pt", "config.json", "log.csv"}
    assert list(log_rows(trained)) == list(range(20))
    assert list(log_rows(trained, "val_loss")) == [0, 10, 20]
    val_loss = {it: float(value) for it, value in log_rows(trained, "val_loss").items()}
    assert 5.2 < val_loss[0] < 6 and val_loss[20] < val_loss[10] < val_loss[0]
    for column in ("dead_0", "dead_1", "explained"):
        assert list(log_rows(trained, column)) == [0, 10, 20]
    assert 0 < float(log_rows(trained, "explained")[20]) < 1
    dead = log_rows(trained, "dead_1")
    assert int(dead[0]) == 2 * 256 > int(dead[20])  # before training: all
    record = json.loads((trained / "config.json").read_text())
    assert record["config"]["n_embd"] == 32 and record["config"]["tokenizer"] == "bytes"
    assert record["versions"]["torch"] == torch.__version__
    model, config = load_model(str(trained / "ckpt.pt"))
    assert config["cayley_levels"] == "5,4,0;8,6,16" and model.saes()[0].active_counts.sum() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stopped_and_resumed_equals_uninterrupted(trained, data_dir, tmp_path, number):
    out_dir = tmp_path / "run"
    process = subprocess.Popen(
        train_command(data_dir, out_dir),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    for line in process.stdout:
        if line.startswith("iter 3:" if number == signal.SIGINT else "iter 12:"):
            process.send_signal(number)
    assert process.wait() == 0, process.stderr.read()
    stopped_at = max(log_rows(out_dir))
    assert stopped_at < 19 and (out_dir / "last.pt").exists()
    result = run_training(data_dir, out_dir, init_from="resume")
    assert result.returncode == 0, result.stderr
    columns = ["loss", "val_loss", "grad_norm", "muon_lr", "tokens"]
    columns += ["dead_0", "dead_1", "explained"]
    for column in columns:
        assert log_rows(out_dir, column) == log_rows(trained, column)
    expected = torch.load(trained / "last.pt", weights_only=True)["model"]
    resumed = torch.load(out_dir / "last.pt", weights_only=True)["model"]
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.parametrize("ranks, settings", [
    (2, dict(gradient_accumulation_steps=2)),
    (3, dict(gradient_accumulation_steps=3, cayley_levels="", muon_lr=5e-4, adamw_lr=5e-4)),
])
def test_ranks_train_on_the_same_global_batches(data_dir, tmp_path, ranks, settings):
    """
    Loss rows agree over 20 iterations.

    With top-k a different rounding of a sum of more than two gradients decides near ties otherwise,
    and training is chaotic from there; so the three ranks are the dense twin's, at a low rate.
    """
    for out_dir, n in ((tmp_path / "one", 1), (tmp_path / "many", ranks)):
        result = run_training(data_dir, out_dir, n, **settings)
        assert result.returncode == 0, result.stderr
    assert largest_difference(tmp_path / "one", tmp_path / "many") < 1e-4


def test_resume_at_another_world_size(data_dir, tmp_path):
    settings = dict(gradient_accumulation_steps=2, lr_schedule="constant")
    assert run_training(data_dir, tmp_path / "whole", 1, **settings).returncode == 0
    assert run_training(data_dir, tmp_path / "parts", 2, max_iters=10, **settings).returncode == 0
    result = run_training(data_dir, tmp_path / "parts", 1, init_from="resume", **settings)
    assert result.returncode == 0, result.stderr
    assert largest_difference(tmp_path / "whole", tmp_path / "parts") < 1e-4


def test_dense_twin_trains(data_dir, tmp_path):
    result = run_training(data_dir, tmp_path / "run", cayley_levels="", lr_schedule="cosine")
    assert result.returncode == 0, result.stderr
    val_loss = [float(value) for value in log_rows(tmp_path / "run", "val_loss").values()]
    assert val_loss[-1] < val_loss[0]


def test_a_non_finite_loss_stops_before_the_weights(data_dir, tmp_path):
    out_dir = tmp_path / "run"
    result = run_training(data_dir, out_dir, adamw_lr=1e30, warmup_iters=0)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "iteration 1: loss" in result.stderr.splitlines()[-1]
    checkpoint = torch.load(out_dir / "last.pt", weights_only=True)
    assert checkpoint["iter"] == 0
    assert all(value.isfinite().all() for value in checkpoint["model"].values())


def test_a_finished_run_is_never_overwritten(trained, data_dir):
    before = contents(trained)
    result = run_training(data_dir, trained)
    assert result.returncode == 1 and "--init_from=resume" in result.stderr
    result = run_training(data_dir, trained, init_from="resume")
    assert result.returncode == 0, result.stderr
    assert "has its 20 iterations already: a larger --max_iters goes on" in result.stdout
    after = contents(trained)
    assert after["last.pt"] == before["last.pt"] and after["log.csv"] == before["log.csv"]


def test_explained_variance_scores_a_constant_0_and_a_scaled_copy_1():
    torch.manual_seed(0)
    x = torch.randn(500, 8) + 3
    noise = torch.randn(500, 8)

    def score(y):
        return explained(covariances(x, y)).item()
    assert score(torch.ones(500, 8) * x.mean(0)) == pytest.approx(0, abs=1e-9)
    assert score(x) == pytest.approx(1) and score(x / 3 + 7) == pytest.approx(1)
    assert score(x + noise) == pytest.approx(0.5, abs=0.05)  # squared correlation 1 / (1 + 1)


# -----------------------------------------------------------------------------
# sample.py


def sample(*arguments):
    return run_script(ROOT / "sample.py", "--device=cpu", *arguments)


def test_sampling_from_a_checkpoint(trained, tmp_path):
    (tmp_path / "prompt.txt").write_text("def é(", encoding="utf-8")
    arguments = ["--ckpt", trained / "ckpt.pt", "--start", f"FILE:{tmp_path / 'prompt.txt'}"]
    arguments += ["--num_samples=2", "--max_new_tokens=50"]
    texts = [sample(*arguments, *extra) for extra in ([], ["--use_cache=False"], ["--seed=2"])]
    assert all(text.returncode == 0 for text in texts), texts[0].stderr
    assert texts[0].stdout == texts[1].stdout != texts[2].stdout
    assert texts[0].stdout.count("def é(") == 2 == texts[0].stdout.count("-" * 80)


def test_a_terminal_that_lacks_a_character_gets_another(trained):
    command = [sys.executable, ROOT / "sample.py", "--device=cpu", "--ckpt", trained / "ckpt.pt"]
    command += ["--num_samples=1", "--max_new_tokens=20", "--start=\u6f22"]
    result = subprocess.run(
        command, capture_output=True, env={**ENVIRONMENT, "PYTHONIOENCODING": "latin-1"}
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(b"?")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["--num_samples=100", "--max_new_tokens=300"], ["--help"]])
def test_a_reader_that_goes_ends_it_quietly(trained, words, unbuffered):
    command = [sys.executable, ROOT / "sample.py", "--device=cpu", "--ckpt", trained / "ckpt.pt"]
    environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": unbuffered}
    process = subprocess.Popen(
        [*command, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    if words != ["--help"]:
        process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait()


def test_steering_beside_the_unsteered_text(trained):
    arguments = ["--ckpt", trained / "ckpt.pt", "--num_samples=1"]
    arguments += ["--max_new_tokens=40", "--temperature=0"]
    plain = sample(*arguments).stdout
    edits = ["--steer", "0.1.77=+30", "--steer", "1.0.3=-30", "--ablate", "1.1.5"]
    both = sample(*arguments, *edits, "--compare")
    assert both.returncode == 0, both.stderr
    _, unsteered, steered = both.stdout.split("===")
    assert unsteered.startswith(" as trained\n") and steered.startswith(" steered\n")
    assert unsteered.removeprefix(" as trained\n") == plain != steered.removeprefix(" steered\n")
    assert sample(*arguments, "--steer", "0.1.77=+0").stdout.removeprefix("=== steered\n") == plain


# -----------------------------------------------------------------------------
# settings

def test_config_file_then_command_line(tmp_path):
    config = tmp_path / "c.py"
    config.write_text("size = 3\nrate = 1\n")
    defaults = {"size": 1, "rate": 0.5, "name": "a", "switch": False, "tokens": 5}
    namespace = {**defaults, "__name__": "x", "os": os}
    command = [str(config), "--size=7", "--name", "b c", "--switch", "--tokens=25e9"]
    settings = configurator.configure(namespace, command)
    assert settings == {
        "size": 7,
        "rate": 1.0,
        "name": "b c",
        "switch": True,
        "tokens": 25_000_000_000,
    }
    assert namespace["size"] == 7 and namespace["os"] is os


CONFIGS = sorted((ROOT / "configs").glob("*.py"))
THIRD_LEVEL = ";17,64,256"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs(path):
    """Every config is valid; the large data's are the published recipes but for 1L's levels."""
    config = train_settings([str(path)])["config"]
    with torch.device("meta"):
        GPT(GPTConfig(**{key: config[key] for key in GPTConfig.__dataclass_fields__}))
    if path.stem in ("demo", "python_1L"):
        return
    windows = config["batch_size"] * config["gradient_accumulation_steps"]
    assert windows * config["block_size"] == 1_572_864
    assert (config["max_iters"], config["warmup_iters"]) == (12716, 200)
    assert config["vocab_size"] == 50304
    if "large" in path.stem:
        expected = dict(n_layer=24, n_embd=2048, n_head=16, warmdown_frac=0.5)
        expected.update(muon_lr=8e-3, muon_min_lr=1e-4, adamw_lr=3e-4, adamw_min_lr=1e-5)
        levels = "11,16,0;15,32,256"
    else:
        expected = dict(n_layer=12, n_embd=1024, n_head=8, warmdown_frac=0.9)
        expected.update(muon_lr=1.2e-2, muon_min_lr=1.5e-4, adamw_lr=1.2e-2, adamw_min_lr=1.5e-4)
        levels = "10,16,0;15,32,256"
    assert {key: config[key] for key in expected} == expected
    if "vanilla" in path.stem:
        levels = ""
    elif path.stem.endswith("3L"):
        levels += THIRD_LEVEL
    elif path.stem.endswith("1L"):
        levels = "10,48,0"
    assert config["cayley_levels"] == levels
