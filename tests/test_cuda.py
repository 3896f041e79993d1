"""
What a user does on a CUDA GPU, at small sizes, in under 3 minutes. Without a GPU it is skipped.

    make gpu    # these tests and the bench
"""
import copy
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import (
    ENVIRONMENT,
    ROOT,
    TINY,
    arguments,
    interrupted_stream,
    largest_difference,
    log_rows,
    train_command,
)

import model as model_module
from cayley import CayleySAE, plain_decode, plain_encode
from checkpoint import load_model
from model import DecodingStep, GPTConfig
from tools import account

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

DEVICE = "cuda"
LEVELS_2L = "10,16,0;15,32,256"
TRAINED = dict(device=DEVICE, lr_schedule="constant")
RUNS = {
    "eager": {},
    "torch": {"kernels": "torch"},
    "compiled": {"torch_compile": True},
    "compiled_torch": {"torch_compile": True, "kernels": "torch"},
    "dense": {"cayley_levels": ""},
    "half": {"max_iters": 10},  # to be resumed
}
LARGER = dict(  # whose logits take gigabytes
    n_embd=256, block_size=256, batch_size=32, gradient_accumulation_steps=2, vocab_size=50304,
    cayley_levels="8,8,0;12,16,64", max_iters=3, warmup_iters=1,
)
CARD = dict(
    sae_tokens=20_000, label_tokens=60_000, fit_tokens=4096, score_tokens=4096, causal_tokens=128,
    n_windows=16,
)
LOAD_EXPORTED = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model.to(sys.argv[2]).eval()
idx = torch.arange(20, device=sys.argv[2])[None]
with torch.no_grad():
    torch.save(model(idx).logits.cpu(), sys.argv[3])
    print(model.generate(idx, max_new_tokens=8, do_sample=False).tolist())
"""


def run_all(commands):
    """{name: command} -> {name: subprocess.CompletedProcess}, four at a time."""

    def run(command):
        words = [str(word) for word in command]
        return subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(commands, pool.map(run, commands.values())))


def check(result):
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WARNING" not in result.stderr, result.stderr  # as of kernels that don't agree


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture(scope="module")
def runs(data_dir, directory):
    """Results of RUNS; the out_dirs have their names."""
    commands = {}
    for name, settings in RUNS.items():
        commands[name] = train_command(data_dir, directory / name, **{**TRAINED, **settings})
    for name, compiled in (("memory", False), ("memory_compiled", True)):
        settings = {**TRAINED, **LARGER, "torch_compile": compiled}
        commands[name] = train_command(data_dir, directory / name, **settings)
    return run_all(commands)


@pytest.fixture(scope="module")
def results(runs, data_dir, directory):
    """Results of what is done with trained models."""
    eager = directory / "eager"
    python = sys.executable
    resumed = train_command(data_dir, directory / "half", **TRAINED, init_from="resume")
    sample = [python, ROOT / "sample.py", f"--ckpt={eager}", "--num_samples=1"]
    sample += ["--max_new_tokens=80", f"--device={DEVICE}"]
    card = {**CARD, "ckpt": eager, "dense": directory / "dense", "device": DEVICE}
    features = {"tokens": 20_000, "n_measured": 16, "ckpt": eager, "device": DEVICE}
    return run_all({
        "resume": [
            python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1",
            *resumed[1:],
        ],
        "sample": sample,
        "sample_without_cache": [*sample, "--use_cache=False"],
        "steer": [*sample, "--steer=1.0.3=+100", "--ablate=0.0.3", "--compare"],
        "evals": [
            python, "-m", "tools.evals", f"--ckpt={eager}", f"--vs={directory}/dense",
            "--n_windows=16", f"--device={DEVICE}",
        ],
        "features": [
            python, "-m", "tools.features", *arguments(features), f"--out_dir={directory}/site",
        ],
        "scorecard": [
            python, "-m", "tools.scorecard", *arguments(card), f"--out_dir={directory}/card",
        ],
        "export": [
            python, "-m", "tools.export", f"--ckpt={eager}", "--export_format=hf",
            f"--out_dir={directory}/hf",
        ],
    })


# -----------------------------------------------------------------------------
# training

@pytest.mark.parametrize("name", RUNS)
def test_training(runs, directory, name):
    check(runs[name])
    val_losses = [float(loss) for loss in log_rows(directory / name, "val_loss").values()]
    assert val_losses[-1] < val_losses[0] - 0.1


@pytest.mark.parametrize("name", ["torch", "compiled", "compiled_torch"])
def test_other_ways_train_alike(runs, directory, name):
    """As near as rounding to bfloat16 leaves runs of 20 iterations."""
    assert largest_difference(directory / "eager", directory / name) < 0.1


def test_resumed_under_torchrun_with_nccl(results, directory):
    check(results["resume"])
    assert largest_difference(directory / "eager", directory / "half") < 0.1
    assert len(log_rows(directory / "half")) == TINY["max_iters"]


@pytest.mark.parametrize("name, compiled", [("memory", False), ("memory_compiled", True)])
def test_peak_memory_is_the_account_s(runs, directory, name, compiled):
    check(runs[name])
    settings = {**TINY, **LARGER}
    names = GPTConfig.__dataclass_fields__.keys() & settings.keys()
    config = GPTConfig(**{key: settings[key] for key in names})
    paper = account.memory_account(config, settings["batch_size"], compiled=compiled)["peak"]
    *_, peak = log_rows(directory / name, "peak_memory_gb").values()
    libraries = 0.15  # GB: cuBLAS's workspaces, a table that the start's check leaves
    assert -0.03 * paper < float(peak) * 1e9 - paper < 0.03 * paper + libraries * 1e9


def test_out_of_memory_is_one_line(data_dir, tmp_path):
    """4 million tokens, whose logits take 400 GB."""
    settings = {**TRAINED, "kernels": "torch", "vocab_size": 50304, "batch_size": 131_072}
    command = train_command(data_dir, tmp_path / "run", **settings)
    (result,) = run_all({"run": command}).values()
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and "out of memory" in result.stderr, result.stderr
    assert "batch_size" in result.stderr


# -----------------------------------------------------------------------------
# sampling

def test_sample_py_writes_the_same_text_with_and_without_the_cache(results):
    check(results["sample"])
    check(results["sample_without_cache"])
    assert results["sample"].stdout == results["sample_without_cache"].stdout
    check(results["steer"])
    before, after = results["steer"].stdout.split("=== steered\n")
    assert before == "=== as trained\n" + results["sample"].stdout
    assert after and after != results["sample"].stdout


@pytest.mark.parametrize("name", ["eager", "dense"])
def test_same_text_with_and_without_graphs(runs, directory, monkeypatch, name):
    model, config = load_model(directory / name, DEVICE)
    prompt = torch.randint(257, (3, 7), device=DEVICE)
    captures = []

    class CountedStep(DecodingStep):
        def capture(self):
            captures.append(self)
            super().capture()
    monkeypatch.setattr(model_module, "DecodingStep", CountedStep)
    for sampling in ({"temperature": 0}, {"temperature": 0.7, "top_k": 5}):
        texts = []
        for use_cache in (True, False):
            generator = torch.Generator(DEVICE).manual_seed(1)
            texts.append(model.generate(
                prompt, 100, use_cache=use_cache, generator=generator, n_tokens=257, **sampling
            ))
        assert torch.equal(*texts)
    assert len(captures) == 2


def test_edits_records_and_hooks_may_begin_between_tokens(runs, directory, monkeypatch):
    """With graphs as without."""
    model, _ = load_model(directory / "eager", DEVICE)
    prompt = torch.randint(257, (1, 4), device=DEVICE)
    texts = []
    for devices in ((), (DEVICE,)):
        monkeypatch.setattr(model_module, "STATIC_DEVICES", devices)
        texts.append(interrupted_stream(model, prompt, (0, 3, 1, 100.0)))
    assert torch.equal(*texts)


def test_graphs_leave_no_memory_behind(runs, directory):
    model, _ = load_model(directory / "eager", DEVICE)
    prompt = torch.randint(257, (1, 4), device=DEVICE)
    held = []
    for _ in range(6):
        model.generate(prompt, 8)
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved())
    assert held[-1] == held[1]


# -----------------------------------------------------------------------------
# tools

@pytest.mark.parametrize("name", ["evals", "features", "scorecard", "export"])
def test_tools(results, name):
    check(results[name])


def test_scores_are_those_of_a_cpu(results, directory):
    """evals.py's losses, in float32 on both."""
    scores = directory / "eager" / "evals.json"
    on_gpu = json.loads(scores.read_text())
    command = [sys.executable, "-m", "tools.evals", f"--ckpt={directory}/eager", "--n_windows=16"]
    (result,) = run_all({"cpu": [*command, "--device=cpu", "--replace"]}).values()
    check(result)
    on_cpu = json.loads(scores.read_text())
    assert on_gpu["val"]["loss"] == pytest.approx(on_cpu["val"]["loss"], abs=2e-3)


def test_exported_model_in_transformers(results, directory):
    pytest.importorskip("transformers")
    program = [sys.executable, "-c", LOAD_EXPORTED, directory / "hf", DEVICE, directory / "logits"]
    (result,) = run_all({"load": program}).values()
    assert result.returncode == 0, result.stderr
    model, _ = load_model(directory / "eager", DEVICE)
    with torch.no_grad():
        expected, _ = model(torch.arange(20, device=DEVICE)[None], n_logits=0)
    torch.testing.assert_close(torch.load(directory / "logits"), expected.cpu())


# -----------------------------------------------------------------------------
# the layer's kernels

SHAPES = [  # n_embd, levels, tokens
    (32, "5,4,0;9,5,32", 200),
    (64, "6,4,0;9,5,16;12,7,32", 200),
    (512, "9,5,0;13,7,64", 100),
    (1024, LEVELS_2L, 200),
    (1024, LEVELS_2L + ";17,64,256", 50),
    (2048, "11,16,0;15,32,256", 50),
    (64, "6,4,0;9,5,16;12,7,32", 5),  # up to 16 tokens have launches of their own
    (1024, LEVELS_2L + ";17,64,256", 16),
    (4096, "12,16,0;15,32,256", 1),
]


def random_sae(n_embd, levels):
    torch.manual_seed(0)
    sae = CayleySAE(n_embd, levels).to(DEVICE).eval()
    with torch.no_grad():
        sae.bias.normal_(std=0.3)
        sae.mean.normal_(std=0.3)
        sae.var.uniform_(0.3, 2)
    return sae


def normalised(n_tokens, n_embd):
    return torch.nn.functional.rms_norm(torch.randn(n_tokens, n_embd, device=DEVICE), (n_embd,))


def through(sae, x, weight, dtype):
    """The layer's codes and output, and the gradients of x and bias."""
    x = x.clone().requires_grad_()
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        codes = sae.encode(x)
        output = sae.decode(codes)
    return codes, output, *torch.autograd.grad((output.float() * weight).sum(), [x, sae.bias])


def by_definition(sae, x, weight):
    """through() in float64, by the plain definition."""
    wide = copy.deepcopy(sae).double()
    x = x.double().requires_grad_()
    atoms = [wide.atoms(i, range(2**level.n)) for i, level in enumerate(wide.levels)]
    codes = plain_encode(wide, x, atoms)
    output = plain_decode(codes, atoms)
    return codes, output, *torch.autograd.grad((output * weight).sum(), [x, wide.bias])


def relative_error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("kernels, dtype", [
    ("triton", torch.float32),
    ("triton", torch.bfloat16),
    ("triton", torch.float16),
    ("torch", torch.float32),
])
@pytest.mark.parametrize("n_embd, levels, n_tokens", SHAPES)
def test_kernels_are_the_definition_in_float64(kernels, dtype, n_embd, levels, n_tokens):
    cayley_triton = pytest.importorskip("cayley_triton")
    sae = random_sae(n_embd, levels)
    x = normalised(n_tokens, n_embd).to(dtype)
    weight = torch.randn(n_tokens, n_embd, device=DEVICE)
    with cayley_triton.enabled(kernels == "triton"):
        codes, output, *gradients = through(sae, x, weight, dtype)
    exact_codes, exact_output, *exact_gradients = by_definition(sae, x, weight)
    same = torch.ones(n_tokens, dtype=torch.bool, device=DEVICE)
    for code, exact in zip(codes, exact_codes):
        same &= (code.ids.sort(1).values == exact.ids.sort(1).values).all(1)
        values, exact_values = code.values[same], exact.values[same]
        torch.testing.assert_close(values.double(), exact_values, atol=1e-4, rtol=1e-4)
    assert same.double().mean() >= 0.97  # but for scores that tie to float32's rounding
    bound = 1e-4 if dtype == torch.float32 else 0.01
    assert relative_error(output[same], exact_output[same]) < bound
    assert relative_error(gradients[0][same], exact_gradients[0][same]) < bound
    if same.all():
        assert relative_error(gradients[1], exact_gradients[1]) < bound


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_the_layer_repeats_bit_for_bit(kernels):
    cayley_triton = pytest.importorskip("cayley_triton")
    sae = random_sae(1024, LEVELS_2L).train()
    x = normalised(8192, 1024)
    weight = torch.randn(8192, 1024, device=DEVICE)
    start = {name: buffer.clone() for name, buffer in sae.named_buffers()}
    seen = []
    with cayley_triton.enabled(kernels == "triton"):
        for _ in range(10):
            for name, buffer in sae.named_buffers():
                buffer.copy_(start[name])
            _, *tensors = through(sae, x, weight, torch.bfloat16)
            sae.update_stats()
            seen.append([*tensors, sae.mean.clone(), sae.var.clone(), sae.active_counts.clone()])
    for tensors in seen[1:]:
        assert all(map(torch.equal, tensors, seen[0]))
