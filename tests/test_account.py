"""account.py's numbers are those of real models and steps, and its plan is of what would train."""
import csv
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, TINY, arguments, run_script
from torch.profiler import ProfilerActivity, profile

from checkpoint import load_model
from model import GPT, GPTConfig
from muon import MuonAdamW
from tools import account

BATCH = 8
LEVELS = ("", "6,8,0;9,16,16", "6,8,0;8,16,16;10,16,32")


def make(levels):
    torch.manual_seed(0)
    config = GPTConfig(
        n_layer=2, n_embd=64, n_head=2, block_size=128, vocab_size=2048, cayley_levels=levels
    )
    return config, GPT(config), torch.randint(2048, (BATCH, 129))


def loss_of(model, idx, bf16):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return model(idx[:, :-1], idx[:, 1:])[1]


def saved_bytes(model, raw_model, idx, bf16):
    """Bytes of the storages that a forward saves, each once, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in raw_model.state_dict().values()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage  # and so it is kept, as autograd keeps it
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, idx, bf16)
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("levels", LEVELS)
def test_parameters_and_states(levels):
    config, model, _ = make(levels)
    muon, adamw = account.muon_parameters(config), account.adamw_parameters(config)
    assert muon + adamw == sum(p.numel() for p in model.parameters())
    flops = 6 * model.get_num_params() + 12 * config.n_layer * config.n_embd * config.block_size
    assert model.flops_per_token() == flops
    optimizer = MuonAdamW(model, 1e-3, 1e-3)
    momentum = sum(m.numel() * 4 for m in optimizer.muon.momentum.values())
    assert account.muon_state_bytes(config, world_size=1) == momentum
    assert sum(p.numel() for p in optimizer.adamw.param_groups[0]["params"]) == adamw
    buffers = sum(b.numel() * b.element_size() for sae in model.saes() for b in sae.buffers())
    table = 4 * 2**model.saes()[0].n * config.n_embd if levels else 0
    assert account.sae_state_bytes(config, bf16=False) == pytest.approx(buffers + table, rel=0.01)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("levels", LEVELS)
def test_activations_are_what_a_forward_saves(levels, bf16):
    config, model, idx = make(levels)
    parts = account.memory_account(config, BATCH, bf16=bf16, fused_norm=False)
    expected = parts["activations"] + parts["weights in bf16"] + parts["loss"] / 3
    assert saved_bytes(model, model, idx, bf16) == pytest.approx(expected, rel=0.02)


def test_activations_of_a_compiled_forward():
    """Compiled, the CPU's RMSNorm saves what the fused one of CUDA does."""
    config, model, idx = make(LEVELS[1])
    # torch.compile's own partition into forward and backward, without its code generation
    compiled = torch.compile(model, backend="aot_eager_decomp_partition")
    parts = account.memory_account(config, BATCH, compiled=True)
    expected = parts["activations"] + parts["weights in bf16"] + parts["loss"] / 2
    assert saved_bytes(compiled, model, idx, bf16=True) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("levels", LEVELS)
def test_the_peak_is_where_the_backward_begins(levels, bf16):
    config, model, idx = make(levels)
    loss_of(model, idx, bf16).backward()  # from now on the gradients are there
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss_of(model, idx, bf16).backward()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    parts = account.memory_account(config, BATCH, bf16=bf16, fused_norm=False)
    there_before = ("weights", "gradients", "Muon's share", "AdamW", "SAE statistics and atoms")
    expected = parts["peak"] - sum(parts[name] for name in there_before)
    assert peak == pytest.approx(expected, rel=0.02)


def test_what_fits():
    """A micro-batch that fits is the largest, and more ranks leave more room."""
    config, batch_size = account.read_recipe(ROOT / "configs" / "cayley_small_2L.py")
    largest = account.largest_batch(config, 40e9)
    peaks = [account.memory_account(config, n)["peak"] for n in (largest, largest + 1)]
    assert peaks[0] <= account.USABLE * 40e9 < peaks[1]
    assert account.largest_batch(config, 40e9, world_size=8) >= largest
    assert account.largest_batch(config, 1e9) == 0
    for name in account.RECIPES:
        config, batch_size = account.read_recipe(ROOT / "configs" / f"{name}.py")
        assert batch_size <= account.largest_batch(config, 80e9, world_size=8)


def test_the_command(tmp_path):
    table = tmp_path / "account.csv"
    result = run_script("-m", "tools.account", "--world_size=2", f"--csv_file={table}")
    assert result.returncode == 0, result.stderr
    assert "| peak |" in result.stdout
    with open(table, newline="") as file:
        rows = {row["recipe"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(account.RECIPES)
    config, batch_size = account.read_recipe(ROOT / "configs" / "cayley_large_3L.py")
    peak = account.memory_account(config, batch_size, world_size=2)["peak"]
    assert int(rows["cayley_large_3L"]["peak"]) == peak
    assert "world_size=0" in run_script("-m", "tools.account", "--world_size=0").stderr


# -----------------------------------------------------------------------------
# the plan of a run


def plan(*words, **settings):
    """account.py with configs/demo.py, TINY and other settings, and words of a command line."""
    settings = arguments({**TINY, **settings})
    return run_script("-m", "tools.account", ROOT / "configs" / "demo.py", *settings, *words)


@pytest.mark.parametrize("words", [
    {"lr_schedule": "parity", "target_val_loss": 3.0},
    {"lr_schedule": "constant"},
    {"warmdown_frac": 0.0},
])
def test_a_plan_that_ends_in_its_warmup(data_dir, tmp_path, words):
    result = plan(max_iters=2, data_dir=data_dir, out_dir=tmp_path / "run", **words)
    assert result.returncode == 0, result.stderr
    assert "iteration 2: learning rates" in result.stdout
    assert f"data: {data_dir}: tokenizer bytes" in result.stdout


def test_the_plan_is_printed_and_nothing_written(tmp_path):
    config = ROOT / "configs" / "cayley_small_2L.py"
    result = subprocess.run(
        [sys.executable, "-m", "tools.account", config],
        cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT,
    )
    assert result.returncode == 0, result.stderr
    for text in ("data: not ready", "12,716 iterations of 1,572,864 = 20,000,538,624",
                 "iteration 1,271: learning rates 0.012", "a card of 80 GB holds"):
        assert text in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command, words", [
    ("--n_embd=48", ["n_embd=48", "power of two"]),
    ("--cayley_levels=5,4,0;99999999999999,4,2048", ["'99999999999999,4,2048'", "15 bits"]),
    ("--batch_size=0", ["batch_size=0", "at least 1"]),
    ("--momentum=1.0", ["momentum=1.0", "below 1"]),
    ("--lr_schedule=step", ["lr_schedule='step'", "'cosine'"]),
    ("--lr_schedule=parity", ["target_val_loss=0.0"]),
    ("--n_layers=2", ["'n_layers'", "'n_layer'"]),
    ("--device=gpu", ["device='gpu'", "'cpu'"]),
])
def test_what_training_refuses_the_plan_refuses(command, words):
    result = plan(*shlex.split(command))
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("account.py: ")
    assert [word for word in words if word not in result.stderr] == [], result.stderr


def test_the_accumulation_of_the_plan_must_be_a_multiple_of_the_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = str(ROOT / "configs" / "demo.py")
    with pytest.raises(ValueError) as error:
        account.check_run([config, "--gradient_accumulation_steps=4"])
    line = str(error.value)
    assert "gradient_accumulation_steps=4 is not a multiple of the 3 ranks" in line


def test_a_cpu_run_is_planned_for_cpus_with_the_parameters_that_training_counts(trained):
    result = plan()
    assert result.returncode == 0, result.stderr
    assert "memory of a CPU process of 1 in fp32" in result.stdout
    assert "GPU" not in result.stdout and "a card of" not in result.stdout
    model, config = load_model(str(trained))
    parameters = f"parameters: {model.get_num_params():,} without positions and features' biases"
    assert parameters in result.stdout
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"{total:,} with them" in result.stdout


def test_a_cuda_run_is_planned_without_one():
    result = plan(device="cuda", torch_compile=True)
    assert result.returncode == 0, result.stderr
    assert "a card of 24 GB holds" in result.stdout
