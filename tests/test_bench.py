"""bench.py compares with the same layer, counts right, and its report for a GPU runs."""
import json

import pytest
import torch
from conftest import run_script
from torch.profiler import ProfilerActivity, profile

import cayley
from cayley import CayleySAE
from tools import account, bench

LEVELS = "6,8,0;9,16,32"


def test_the_dense_dictionary_is_the_same_layer():
    torch.manual_seed(0)
    x = torch.nn.functional.rms_norm(torch.randn(20, 64), (64,)).requires_grad_()
    outputs = [layer(64, LEVELS).eval()(x) for layer in (CayleySAE, bench.DenseDictionarySAE)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in outputs]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def scoring_flops(n_embd, levels, n_tokens=64):
    """
    FLOPs a token of select's products, counted.

    By the profiler: FlopCounterMode doesn't see what an operator of torch.library does inside.
    """
    sae = CayleySAE(n_embd, levels)
    inputs = torch.randn(n_tokens, n_embd), sae.terms(), sae.bias
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
        cayley.select(*inputs, sae.plan)
    products = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
    counts = [event.flops for event in profiler.key_averages() if event.key in products]
    return sum(counts) / n_tokens


def test_flops_of_the_products():
    """Counted inside the operator, against the account of cayley.py's way to score, by hand."""
    walsh_64 = 2 * 64 * 32 + 2 * 64 * 2  # as 32 x 2
    # a block of 32 of 512 features: 4 fixed bits, tail 2, chirp 3
    chirps = 2 * 8 * 64 * 8  # 8 parents, 64 coordinates, 8 chirps
    walsh_4 = 2 * 4 * 4 * 8 * 8
    assert scoring_flops(64, LEVELS) == walsh_64 + chirps + walsh_4


@pytest.mark.parametrize("levels", ["", "5,4,0;8,6,16"])
def test_the_measured_step_has_the_account_s_peak(monkeypatch, levels):
    """No logits that outlive the loss: the peak is training's."""
    monkeypatch.setattr(bench, "dtype", "bf16")
    shape = {**bench.TINY.shape, "vocab_size": 4096}
    sizes = bench.TINY._replace(shape=shape, batch_size=8)
    both, update = bench.training_step(sizes, levels)
    both()  # from now on the gradients are there
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        both()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    paper = account.memory_account(sizes.config(levels), sizes.batch_size, fused_norm=False)
    there_before = ("weights", "gradients", "Muon's share", "AdamW", "SAE statistics and atoms")
    expected = paper["peak"] - sum(paper[name] for name in there_before)
    assert peak == pytest.approx(expected, rel=0.03)


def test_the_gpu_report_on_a_cpu(tmp_path):
    path = tmp_path / "report.json"
    result = run_script("-m", "tools.bench", "--section=gpu", "--tiny", f"--json_file={path}")
    assert result.returncode == 0, result.stderr
    report = json.loads(path.read_text())["gpu"]
    models = ("cayley 2L", "cayley 3L")
    for name in models:
        for operator in ("select", "combine", "project"):
            assert report["operators"]["times"][f"{name}, {operator}, torch"]["ms"] > 0
    for way in ("eager", "compiled"):
        assert set(report[way]) == {f"dense, {way}", *(f"{name}, torch, {way}" for name in models)}
        for row in report[way].values():
            assert row["fwd+bwd tok/s"] > 0 and row["account GB"] > 0
    assert set(report["sampling"]) == {"dense", *models}
    for row in report["sampling"].values():
        assert all(rate > 0 for rate in row.values())


def test_agreement_of_kernels():
    """Tokens with other ids are counted, and don't count as wrong products."""
    ids = torch.tensor([[1, 2], [3, 4]])
    products = torch.tensor([[0.5, 0.4], [0.3, 0.2]])
    sums = torch.zeros(2, 4)
    one = {"select": (ids, products), "combine": sums, "project": products}
    other_ids = torch.tensor([[1, 2], [3, 5]])
    other_products = torch.tensor([[0.5, 0.25], [0.3, 9.0]])
    other = {"select": (other_ids, other_products), "combine": sums + 2, "project": products}
    row = bench.agreement(one, other)
    assert row["tokens with equal ids %"] == 50
    assert row["select off by"] == pytest.approx(0.15)
    assert (row["combine off by"], row["project off by"]) == (2, 0)


def test_a_near_tie_is_no_disagreement():
    sums = torch.zeros(2, 4)
    ids, products = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[0.5, 0.4], [0.3, 0.2]])
    exact = {"select": (ids, products), "combine": sums, "project": products}
    other = {**exact, "select": (torch.tensor([[2, 1], [3, 7]]), products.flip(1) + 1e-5)}
    assert bench.agreement(exact, other)["tokens with equal ids %"] == 100


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_one_line_says_so():
    result = run_script("-m", "tools.bench", "--device=cuda")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and "no CUDA device" in result.stderr
    result = run_script("-m", "tools.bench", "--section=gpu")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and "--device=cuda" in result.stderr
