"""train.py's runs: what a resume refuses, who may share a directory, how a run stops and fails."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    ENVIRONMENT,
    ROOT,
    contents,
    log_rows,
    make_data,
    run_script,
    run_training,
    train_command,
)

from checkpoint import load_model
from data import Windows
from tools.account import train_settings


def copy_of(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def start(data_dir, out_dir, ranks=1, **settings):
    return subprocess.Popen(
        train_command(data_dir, out_dir, ranks, **settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.stderr.read())


# -----------------------------------------------------------------------------
# resume


@pytest.mark.parametrize("settings, words", [
    (dict(seed=1338), ["seed=1337, not 1338"]),
    (dict(seed=7, batch_size=8), ["seed=1337, not 7 and batch_size * gradient"]),
])
def test_resume_refuses_other_batches(trained, data_dir, tmp_path, settings, words):
    run = copy_of(trained, tmp_path)
    before = contents(run)
    result = run_training(data_dir, run, init_from="resume", max_iters=22, **settings)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    for word in [*words, "--resume_anyway"]:
        assert word in result.stderr
    assert contents(run) == before


def test_resume_takes_other_batches_when_told_to(trained, data_dir, tmp_path):
    run = copy_of(trained, tmp_path)
    settings = dict(init_from="resume", max_iters=22, seed=1338, resume_anyway=True)
    result = run_training(data_dir, run, **settings)
    assert result.returncode == 0, result.stderr
    assert list(log_rows(run)) == list(range(22))
    assert "after 20 iterations" in result.stdout
    assert "max_iters=22 (was 20)" in result.stdout and "seed=1338 (was 1337)" in result.stdout


def test_resume_takes_the_same_windows_in_other_micro_batches(trained, data_dir, tmp_path):
    run = copy_of(trained, tmp_path)
    settings = dict(init_from="resume", max_iters=21, batch_size=8, gradient_accumulation_steps=2)
    result = run_training(data_dir, run, **settings)
    assert result.returncode == 0, result.stderr


def test_resume_refuses_other_data_of_as_many_windows(trained, data_dir, tmp_path):
    other = make_data(tmp_path / "bins")
    meta = json.loads((other / "meta.json").read_text())
    shard = next(shard for shard in meta["shards"] if shard["split"] == "train")
    shard["sha256"] = "0" * 64
    (other / "meta.json").write_text(json.dumps(meta))
    run = copy_of(trained, tmp_path)
    result = run_training(other, run, init_from="resume", max_iters=22)
    assert result.returncode == 1 and "other shards than those of" in result.stderr


def test_the_two_checkpoints_are_independent_files(trained, data_dir, tmp_path):
    """A truncated last.pt leaves ckpt.pt whole, and copying that is the way on."""
    run = copy_of(trained, tmp_path)
    os.truncate(run / "last.pt", 1000)
    refused = run_training(data_dir, run, init_from="resume", max_iters=21)
    assert refused.returncode == 1 and f"copy it to {run}/last.pt" in refused.stderr
    shutil.copy(run / "ckpt.pt", run / "last.pt")
    result = run_training(data_dir, run, init_from="resume", max_iters=21)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("spoil, words", [
    (lambda c: c.pop("optimizer"), ["lacks optimizer"]),
    (lambda c: c["model"].update({"wte.weight": torch.zeros(3, 3)}), ["doesn't fit", "wte"]),
    (lambda c: c["optimizer"].pop("muon"), ["doesn't fit", "muon"]),
])
def test_a_checkpoint_that_lacks_something_is_one_line(trained, data_dir, tmp_path, spoil, words):
    run = copy_of(trained, tmp_path)
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    spoil(checkpoint)
    torch.save(checkpoint, run / "last.pt")
    result = run_training(data_dir, run, init_from="resume", max_iters=22)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def test_a_setting_newer_than_the_checkpoint_had_its_default(trained, data_dir, tmp_path):
    run = copy_of(trained, tmp_path)
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    del checkpoint["model_args"]["forward_standardized"]
    torch.save(checkpoint, run / "last.pt")
    settings = dict(init_from="resume", max_iters=22, forward_standardized=False)
    result = run_training(data_dir, run, **settings)
    assert result.returncode == 1 and "forward_standardized=True, not False" in result.stderr


@pytest.mark.parametrize("weight", [0, 0.5])
def test_a_setting_that_the_layer_no_longer_has(trained, data_dir, tmp_path, weight):
    """Checkpoints that carry it switched off go on, others are refused."""
    run = copy_of(trained, tmp_path)
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    checkpoint["model_args"]["dense_gradient"] = weight
    checkpoint["config"]["dense_gradient"] = weight
    torch.save(checkpoint, run / "last.pt")
    result = run_training(data_dir, run, init_from="resume", max_iters=21)
    assert result.returncode == (1 if weight else 0), result.stderr
    assert not weight or "dense_gradient=0.5, which the layer no longer has" in result.stderr


def test_a_checkpoint_of_the_published_models_own_code_is_refused(tmp_path):
    keys = ("model", "optimizer_states", "config", "model_config", "iter_num")
    torch.save(dict.fromkeys(keys, {}), tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="published models' own code"):
        load_model(str(tmp_path))


def test_a_log_without_a_header_is_refused_and_kept(trained, data_dir, tmp_path):
    run = copy_of(trained, tmp_path)
    (run / "log.csv").write_text("1,2,3\n4,5,6\n")
    result = run_training(data_dir, run, init_from="resume", max_iters=22)
    assert result.returncode == 1 and "log.csv" in result.stderr and "header" in result.stderr
    assert (run / "log.csv").read_text() == "1,2,3\n4,5,6\n"


def test_a_run_s_relative_data_is_found_from_elsewhere(data_dir, tmp_path):
    command = train_command("bins", "run", max_iters=2, eval_interval=2)
    os.symlink(data_dir, tmp_path / "bins")
    subprocess.run(command, check=True, cwd=tmp_path, env=ENVIRONMENT, capture_output=True)
    result = run_script("-m", "tools.evals", f"--ckpt={tmp_path}/run", "--n_windows=4")
    assert result.returncode == 0, result.stderr


# -----------------------------------------------------------------------------
# one run a directory


def test_a_second_run_in_the_same_directory_is_refused(data_dir, tmp_path):
    run = tmp_path / "run"
    first = start(data_dir, run, max_iters=5000)
    wait_for(first, "iter 3:")
    for init_from in ("scratch", "resume"):
        second = run_training(data_dir, run, init_from=init_from)
        assert second.returncode == 1 and "another process works in it" in second.stderr
    first.send_signal(signal.SIGKILL)
    first.communicate()
    rows = log_rows(run)
    assert list(rows) == list(range(len(rows)))  # nothing of the second runs
    resumed = run_training(data_dir, run, init_from="resume", max_iters=5)
    assert resumed.returncode == 0, resumed.stderr  # death has released the lock


# -----------------------------------------------------------------------------
# stopping


def long_evaluation(data_dir, out_dir, **settings):
    """A run in its first evaluation, of half a minute or more."""
    process = start(data_dir, out_dir, eval_iters=100_000, batch_size=1, block_size=8, **settings)
    wait_for(process, "training windows")
    time.sleep(1)
    return process


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_ends_a_long_evaluation_with_a_checkpoint(data_dir, tmp_path, ranks):
    run = tmp_path / "run"
    process = long_evaluation(data_dir, run, ranks=ranks)
    process.send_signal(signal.SIGTERM)
    output, error = process.communicate(timeout=60)
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    assert (checkpoint["iter"], checkpoint["evaluated"]) == (0, -1)
    assert not log_rows(run, "val_loss")
    if ranks == 1:
        assert process.returncode == 0, error
        assert "go on with --init_from=resume" in output


def test_nohup_s_run_goes_on_when_its_terminal_goes(data_dir, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        ["nohup", *train_command(data_dir, run)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )
    wait_for(process, "iter 3:")
    process.send_signal(signal.SIGHUP)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert max(log_rows(run)) == 19


def test_a_second_signal_ends_at_once(data_dir, tmp_path):
    """Even where the first one can't be obeyed: the run is held up in a system call of its own."""
    code = (
        "import checkpoint, runpy, time\n"
        "checkpoint.save = lambda *args, **keywords: time.sleep(600)\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    command = train_command(data_dir, tmp_path / "run", max_iters=5000, eval_interval=5000)
    process = subprocess.Popen(
        [command[0], "-u", "-c", code, *command[2:]],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    wait_for(process, "iter 0: val loss")
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGINT


# -----------------------------------------------------------------------------
# ranks


@pytest.mark.parametrize("settings, words", [
    (dict(batch_size=0), "train.py: batch_size=0: must be at least 1"),
    (dict(adamw_lr=1e30, warmup_iters=0), "train.py: iteration 1: loss"),
])
def test_torchrun_s_last_words_are_our_one_line(data_dir, tmp_path, settings, words):
    command = train_command(data_dir, tmp_path / "run", 2, **settings)
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode != 0
    assert result.stderr.count(words) == 1
    last = [line for line in result.stderr.splitlines() if line.strip("=- ")][-1]
    assert words in last


def test_no_deprecated_call_is_left(data_dir, tmp_path):
    code = (
        "import warnings; warnings.simplefilter('error', FutureWarning)\n"
        f"import runpy; runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    command = train_command(data_dir, tmp_path / "run", max_iters=2, eval_interval=2)
    script = tmp_path / "strict.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    settings = [part for part in command[2:] if str(part).startswith("--")]
    result = subprocess.run(
        [*launch, script, *settings], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert result.returncode == 0, result.stderr


# -----------------------------------------------------------------------------
# settings


@pytest.mark.parametrize("text", [
    "import sys; sys.argv[99]",
    "n_layer = 1 / 0",
    "raise KeyError('n_layer')",
    "n_layer = {}['x']",
])
def test_a_config_that_raises_anything_is_one_line(tmp_path, text):
    (tmp_path / "c.py").write_text(text + "\n")
    result = run_script(ROOT / "train.py", tmp_path / "c.py")
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert "c.py" in result.stderr and "Error" in result.stderr


def test_without_a_compiler_one_line_says_how_to_do_without(data_dir, tmp_path):
    environment = {**ENVIRONMENT, "CXX": "/nonexistent", "PATH": ""}
    environment["TORCHINDUCTOR_CACHE_DIR"] = "cache"  # where nothing is compiled yet
    result = subprocess.run(
        train_command(data_dir, tmp_path / "run", torch_compile=True),
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert "--torch_compile=False" in result.stderr
    assert not (tmp_path / "run").exists()


WANDB = """
import json, os
class Error(Exception):
    pass
class Run:
    id = "abc123"
    def log(self, row, step):
        with open("wandb.txt", "a") as file:
            file.write(f"log {step} {row.get('loss')}\\n")
    def finish(self):
        pass
def init(**options):
    if "WANDB_API_KEY" not in os.environ:
        raise Error("api_key not configured (no-tty).\\ncall wandb.login(key=[your_api_key])")
    with open("wandb.txt", "a") as file:
        file.write(f"init {options['id']} {options['resume']}\\n")
    return Run()
"""


def test_wandb_goes_on_under_the_run_s_id(data_dir, tmp_path):
    """With a stand-in for the package, which the tests don't need."""
    (tmp_path / "wandb.py").write_text(WANDB)
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{ROOT}"}

    def train(**settings):
        command = train_command(data_dir, tmp_path / "run", wandb_log=True, **settings)
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=tmp_path
        )

    result = train()
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert "api_key not configured" in result.stderr and "--wandb_log=False" in result.stderr
    assert not (tmp_path / "run" / "last.pt").exists()
    environment["WANDB_API_KEY"] = "key"
    for settings in (dict(max_iters=3), dict(max_iters=5, init_from="resume")):
        result = train(**settings)
        assert result.returncode == 0, result.stderr
    lines = (tmp_path / "wandb.txt").read_text().splitlines()
    assert [line for line in lines if line.startswith("init")] == [
        "init None allow", "init abc123 allow"
    ]
    logged = [line.split() for line in lines if line.startswith("log")]
    losses = {int(step): loss for _, step, loss in logged if loss != "None"}
    assert list(losses) == list(range(5))
    assert {step: float(loss) for step, loss in losses.items()} == pytest.approx(
        {step: float(loss) for step, loss in log_rows(tmp_path / "run").items()}
    )


def test_a_vocabulary_that_is_too_small_names_a_size_that_is_not(data_dir, tmp_path):
    result = run_training(data_dir, tmp_path / "run", vocab_size=100)
    assert result.returncode == 1 and "set vocab_size=320" in result.stderr
    settings = dict(vocab_size=320, max_iters=1, eval_interval=1)
    assert run_training(data_dir, tmp_path / "run", **settings).returncode == 0


@pytest.mark.parametrize("text, words", [
    ("import math as _math\nmuon_lr = 10 ** _math.log10(0.01)\n", None),
    ("import math\n_rate = 0.01\nmuon_lr = math.fabs(_rate)\n", None),
    ("from math import fabs, log10\nfrom pathlib import Path\nimport os.path as p\n"
     "def rate(x):\n    return fabs(x)\nmuon_lr = rate(10 ** log10(0.01))\n", None),
    ("rate = 0.01\nmuon_lr = rate\n", "unknown setting 'rate'"),
    ("from math import pi\nmuon_lr = 0.01\n", "unknown setting 'pi'"),
    ("from math import fabs as muon_lr\n", "muon_lr=.* must be float"),
])
def test_a_config_may_import_and_have_names_of_its_own(tmp_path, text, words):
    (tmp_path / "c.py").write_text(text)
    arguments = [str(tmp_path / "c.py")]
    if words:
        with pytest.raises(ValueError, match=words):
            train_settings(arguments)
    else:
        assert train_settings(arguments)["muon_lr"] == pytest.approx(0.01)


def test_a_missing_config_is_named_with_the_nearest(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="no such file; the nearest is configs/demo.py"):
        train_settings(["configs/dmeo.py"])


def test_two_configs_are_refused_by_name(monkeypatch):
    monkeypatch.chdir(ROOT)
    words = "two config files, configs/demo.py and configs/vanilla_small.py: give one"
    with pytest.raises(ValueError, match=words):
        train_settings(["configs/demo.py", "configs/vanilla_small.py"])


def test_a_home_directory_s_tilde_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert train_settings(["--out_dir=~/x"])["out_dir"] == "/home/me/x"


def test_help_shows_comments_and_choices():
    result = run_script(ROOT / "train.py", "--help")
    assert result.returncode == 0, result.stderr
    lines = {line.split("=")[0].strip(): line for line in result.stdout.splitlines()}
    assert "iterations between evaluations" in lines["--eval_interval"]
    assert "'cosine'" in lines["--lr_schedule"] and "'linear_warmdown'" in lines["--lr_schedule"]


# -----------------------------------------------------------------------------
# the parity schedule


def test_parity_warms_down_at_its_threshold_and_ends(data_dir, tmp_path):
    """Stopped in the warmdown and resumed, it is the same run."""
    flat = dict(lr_schedule="constant", max_iters=40)
    assert run_training(data_dir, tmp_path / "flat", **flat).returncode == 0
    target = float(log_rows(tmp_path / "flat", "val_loss")[20])
    parity = dict(lr_schedule="parity", target_val_loss=target - 0.05, parity_band=0.0501)
    parity.update(parity_iters=7, max_iters=100)
    whole = run_training(data_dir, tmp_path / "whole", **parity)
    assert whole.returncode == 0, whole.stderr
    assert "warmdown to iteration 27" in whole.stdout
    rates = {it: float(rate) for it, rate in log_rows(tmp_path / "whole", "muon_lr").items()}
    assert max(rates) == 26
    assert {rates[it] for it in range(5, 21)} == {0.012}
    assert rates[24] == pytest.approx(0.012 + (0.00015 - 0.012) * 4 / 7)
    val_loss = log_rows(tmp_path / "whole", "val_loss")
    assert list(val_loss) == [0, 10, 20, 27]
    assert float(val_loss[27]) < target
    parts = {**parity, "max_iters": 23}
    assert run_training(data_dir, tmp_path / "parts", **parts).returncode == 0
    resumed = run_training(data_dir, tmp_path / "parts", init_from="resume", **parity)
    assert resumed.returncode == 0, resumed.stderr
    assert log_rows(tmp_path / "parts") == log_rows(tmp_path / "whole")
    assert log_rows(tmp_path / "parts", "muon_lr") == log_rows(tmp_path / "whole", "muon_lr")
    # another schedule knows neither parity's warmdown nor its end
    other = dict(lr_schedule="constant", max_iters=30)
    result = run_training(data_dir, tmp_path / "whole", init_from="resume", **other)
    assert result.returncode == 0, result.stderr
    rates = log_rows(tmp_path / "whole", "muon_lr")
    assert {float(rates[it]) for it in (27, 28, 29)} == {0.012}


def test_parity_says_how_it_ended(data_dir, tmp_path):
    parity = dict(lr_schedule="parity", max_iters=12, eval_interval=6)
    result = run_training(data_dir, tmp_path / "never", target_val_loss=0.1, **parity)
    assert "never came within 0.207 of 0.1" in result.stdout
    parity.update(target_val_loss=5.4, parity_band=0.3, parity_iters=100)
    result = run_training(data_dir, tmp_path / "cut", **parity)
    assert "max_iters=12 cuts its 100 iterations short" in result.stdout
    assert "iter 12: target_val_loss=5.4 is reached" in result.stdout


@pytest.mark.parametrize("words, message", [
    ({"lr_schedule": "parity"}, "target_val_loss=0.0"),
    ({"lr_schedule": "parity", "target_val_loss": "1e999"}, "target_val_loss=inf"),
    ({"target_val_loss": 3.0}, "'linear_warmdown' knows no target"),
])
def test_parity_needs_a_target(data_dir, tmp_path, words, message):
    result = run_training(data_dir, tmp_path / "run", **words)
    assert result.returncode == 1 and message in result.stderr


# -----------------------------------------------------------------------------
# what faults made by hand got past, see records/mutants


def test_log_csv_has_every_row_once(trained, data_dir, tmp_path):
    """A resumed run drops the rows of iterations that its checkpoint doesn't know."""
    run = copy_of(trained, tmp_path)
    lines = (run / "log.csv").read_text().splitlines()
    assert len(lines) == 1 + 20 + 3  # a header, iterations, evaluations
    late = lines[-2].replace("19,", "25,", 1)
    assert late.startswith("25,")
    (run / "log.csv").write_text("\n".join([*lines, late]) + "\n")
    result = run_training(data_dir, run, init_from="resume", max_iters=22)
    assert result.returncode == 0, result.stderr
    resumed = (run / "log.csv").read_text().splitlines()
    assert resumed[:len(lines)] == lines
    assert [line.split(",")[0] for line in resumed[len(lines):]] == ["20", "21", "22"]


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_validation_is_the_mean_over_all_windows(data_dir, tmp_path, batch_size):
    """Whatever the size of a micro-batch, and whether the last one is full."""
    no_learning = dict(muon_lr=0.0, muon_min_lr=0.0, adamw_lr=0.0, adamw_min_lr=0.0)
    settings = dict(batch_size=batch_size, eval_iters=1000, max_iters=1, n_layer=1)
    settings.update(gradient_accumulation_steps=1, cayley_levels="", **no_learning)
    run = tmp_path / "run"
    result = run_training(data_dir, run, **settings)
    assert result.returncode == 0, result.stderr
    model, _ = load_model(str(run))
    val_windows = Windows(str(data_dir), "val", 32)
    windows = torch.from_numpy(val_windows.read(range(len(val_windows))))
    with torch.no_grad():
        expected = model(windows[:, :-1], windows[:, 1:])[1].item()
    assert float(log_rows(run, "val_loss")[0]) == pytest.approx(expected, abs=1e-5)


def test_a_gradient_that_is_not_finite_stops_its_own_iteration(data_dir, tmp_path):
    code = (
        "import math, model, runpy\n"
        "init = model.GPT.__init__\n"
        "def with_hook(self, config):\n"
        "    init(self, config)\n"
        "    self.wte.weight.register_hook(lambda gradient: gradient * math.inf)\n"
        "model.GPT.__init__ = with_hook\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    command = train_command(data_dir, tmp_path / "run")
    result = subprocess.run(
        [command[0], "-c", code, *command[2:]], cwd=ROOT, env=ENVIRONMENT,
        capture_output=True, text=True,
    )
    assert result.returncode == 1
    assert "iteration 0: loss 5." in result.stderr and "gradient norm nan" in result.stderr
    assert "first in the gradient of wte.weight; the weights are as before it" in result.stderr


def test_ckpt_pt_is_of_the_best_val_loss(data_dir, tmp_path):
    run = tmp_path / "run"
    settings = dict(adamw_lr=0.5, adamw_min_lr=0.5, warmup_iters=0, eval_interval=5)
    assert run_training(data_dir, run, **settings).returncode == 0
    val_loss = {it: float(value) for it, value in log_rows(run, "val_loss").items()}
    best = min(val_loss, key=val_loss.get)
    assert best < 20
    checkpoint = torch.load(run / "ckpt.pt", weights_only=True)
    assert (checkpoint["iter"], checkpoint["best_val_loss"]) == (best, val_loss[best])


def test_random_numbers_go_on_where_the_checkpoint_was(trained, data_dir, tmp_path):
    """train.py draws none after the first weights; a fork with dropout does."""
    run = copy_of(trained, tmp_path)
    settings = dict(init_from="resume", max_iters=21, seed=1338, resume_anyway=True)
    assert run_training(data_dir, run, **settings).returncode == 0
    states = [torch.load(folder / "last.pt", weights_only=True)["rng"] for folder in (trained, run)]
    assert torch.equal(states[0]["cpu"], states[1]["cpu"])


def test_directories_of_two_tokenizers_are_not_one_data_set(data_dir, tmp_path):
    other = shutil.copytree(data_dir, tmp_path / "other")
    assert len(Windows(f"{data_dir},{other}", "val", 32)) == 2 * len(Windows(str(other), "val", 32))
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps({**meta, "tokenizer": "gpt2"}))
    with pytest.raises(ValueError, match="other has tokenizer 'gpt2' and .* 'bytes'"):
        Windows(f"{data_dir},{other}", "val", 32)
