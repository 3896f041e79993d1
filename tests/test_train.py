"""train.py and sample.py as their users run them: training, resume, ranks, errors."""
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import configurator
import train
from conftest import ENVIRONMENT, ROOT, largest_difference, log_rows, run_training, train_command
from model import covariances, explained, load_model

def test_a_run_leaves_its_files(trained):
    assert {path.name for path in trained.iterdir()} == {"ckpt.pt", "last.pt", "config.json", "log.csv"}
    assert list(log_rows(trained)) == list(range(20)) and list(log_rows(trained, "val_loss")) == [0, 10, 20]
    val_loss = {it: float(value) for it, value in log_rows(trained, "val_loss").items()}
    assert 5.2 < val_loss[0] < 6 and val_loss[20] < val_loss[10] < val_loss[0]
    for column in ("dead_0", "dead_1", "active_0", "active_1", "explained"):
        assert list(log_rows(trained, column)) == [0, 10, 20]
    assert {float(value) for value in log_rows(trained, "active_1").values()} == {6.0}
    assert 0 < float(log_rows(trained, "explained")[20]) < 1
    assert int(log_rows(trained, "dead_1")[0]) == 2 * 256 > int(log_rows(trained, "dead_1")[20])  # before training: all
    record = json.loads((trained / "config.json").read_text())
    assert record["config"]["n_embd"] == 32 and record["config"]["tokenizer"] == "bytes"
    assert record["versions"]["torch"] == torch.__version__
    model, config = load_model(str(trained / "ckpt.pt"))
    assert config["cayley_levels"] == "5,4,0;8,6,16" and model.saes()[0].active_counts.sum() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_and_resumed_equals_uninterrupted(trained, data_dir, tmp_path, number):
    out_dir = tmp_path / "run"
    process = subprocess.Popen(train_command(data_dir, out_dir), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=ENVIRONMENT)
    for line in process.stdout:
        if line.startswith("iter 12:" if number == signal.SIGTERM else "iter 3:"):
            process.send_signal(number)
    assert process.wait() == 0, process.stderr.read()
    stopped_at = max(log_rows(out_dir))
    assert stopped_at < 19 and (out_dir / "last.pt").exists()
    result = run_training(data_dir, out_dir, init_from="resume")
    assert result.returncode == 0, result.stderr
    for column in ("loss", "val_loss", "grad_norm", "muon_lr", "tokens", "dead_0", "dead_1", "explained"):
        assert log_rows(out_dir, column) == log_rows(trained, column)
    states = [torch.load(path / "last.pt", weights_only=True) for path in (trained, out_dir)]
    assert all(torch.equal(a, b) for a, b in zip(states[0]["model"].values(), states[1]["model"].values(), strict=True))


@pytest.mark.parametrize("ranks, settings", [
    (2, dict(gradient_accumulation_steps=2)),
    (3, dict(gradient_accumulation_steps=3, cayley_levels="", muon_lr=5e-4, adamw_lr=5e-4)),
    (2, dict(gradient_accumulation_steps=4, cayley_levels="", muon_lr=5e-4, adamw_lr=5e-4)),
])
def test_ranks_train_on_the_same_global_batches(data_dir, tmp_path, ranks, settings):
    """
    Loss rows agree over 20 iterations. With top-k a different rounding of a sum of more than two gradients decides
    near ties otherwise, and training is chaotic from there; so those cases are the dense twin's, at a low rate.
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
    assert checkpoint["iter"] == 0 and all(value.isfinite().all() for value in checkpoint["model"].values())


def test_a_finished_run_is_never_overwritten(trained, data_dir):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    result = run_training(data_dir, trained)
    assert result.returncode == 1 and "--init_from=resume" in result.stderr
    result = run_training(data_dir, trained, init_from="resume")
    assert result.returncode == 0, result.stderr  # nothing left to do
    assert (trained / "last.pt").read_bytes() == before["last.pt"] and (trained / "log.csv").read_bytes() == before["log.csv"]


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
    return subprocess.run([sys.executable, ROOT / "sample.py", "--device=cpu", *map(str, arguments)], capture_output=True, text=True)


def test_sampling_from_a_checkpoint(trained, tmp_path):
    (tmp_path / "prompt.txt").write_text("def é(", encoding="utf-8")
    arguments = ["--ckpt", trained / "ckpt.pt", "--start", f"FILE:{tmp_path / 'prompt.txt'}", "--num_samples=2", "--max_new_tokens=50"]
    texts = [sample(*arguments, *extra) for extra in ([], ["--use_cache=False"], ["--seed=2"])]
    assert all(text.returncode == 0 for text in texts), texts[0].stderr
    assert texts[0].stdout == texts[1].stdout != texts[2].stdout
    assert texts[0].stdout.count("def é(") == 2 == texts[0].stdout.count("-" * 80)


def test_steering_beside_the_unsteered_text(trained):
    arguments = ["--ckpt", trained / "ckpt.pt", "--num_samples=1", "--max_new_tokens=40", "--temperature=0"]
    plain = sample(*arguments).stdout
    both = sample(*arguments, "--steer", "0.1.77=+30", "--steer", "1.0.3=-30", "--ablate", "1.1.5", "--compare")
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
    namespace = {"size": 1, "rate": 0.5, "name": "a", "switch": False, "tokens": 5, "__name__": "x", "os": os}
    settings = configurator.configure(namespace, [str(config), "--size=7", "--name", "b c", "--switch", "--tokens=25e9"])
    assert settings == {"size": 7, "rate": 1.0, "name": "b c", "switch": True, "tokens": 25_000_000_000}
    assert namespace["size"] == 7 and namespace["os"] is os


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_configs(path, monkeypatch):
    """Every config is valid, and the recipes are those of the reference."""
    for key, value in list(vars(train).items()):
        monkeypatch.setattr(train, key, value)  # restores what configure changes
    config = configurator.configure(vars(train), [str(path)])
    train.check_settings()
    from model import GPT, GPTConfig
    with torch.device("meta"):
        GPT(GPTConfig(**{key: config[key] for key in GPTConfig.__dataclass_fields__}))
    if path.stem != "demo":
        assert config["batch_size"] * config["gradient_accumulation_steps"] * config["block_size"] == 1_572_864
        assert (config["max_iters"], config["warmup_iters"], config["vocab_size"]) == (12716, 200, 50304)
        large = "large" in path.stem
        assert (config["n_layer"], config["n_embd"], config["n_head"]) == ((24, 2048, 16) if large else (12, 1024, 8))
        assert (config["muon_lr"], config["muon_min_lr"]) == ((8e-3, 1e-4) if large else (1.2e-2, 1.5e-4))
        assert (config["adamw_lr"], config["adamw_min_lr"]) == ((3e-4, 1e-5) if large else (1.2e-2, 1.5e-4))
        assert config["warmdown_frac"] == (0.5 if large else 0.9)
        top = "11,16,0" if large else "10,16,0"
        assert config["cayley_levels"] == {"2L": top + ";15,32,256", "3L": top + ";15,32,256;17,64,256"}.get(path.stem[-2:], "")
