"""SAEs in all layers of a dense model: their fits, and the table."""
import csv

import pytest
import torch
from conftest import arguments, run_script, run_training

from checkpoint import load_model
from data import Windows
from model import GPT
from tools import splice
from tools.topk_sae import TopKSAE

TINY_SPLICE = dict(features="48", k=4, tokens=8192, lr="3e-3", n_windows=8, device="cpu")


def run_splice(dense, out_dir, **settings):
    settings = {**TINY_SPLICE, "dense": dense, "out_dir": out_dir, **settings}
    return run_script("-m", "tools.splice", *arguments(settings))


def table_of(out_dir):
    with open(out_dir / "splice.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def dense(twin):
    model, _ = load_model(str(twin))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def train(data_dir):
    return Windows(str(data_dir), "train", 32)


def test_the_table_has_a_row_for_every_combination(trained, twin, tmp_path):
    sweep = dict(features="32,48", kinds="TopK,Matryoshka", ckpt=trained)
    result = run_splice(twin, tmp_path / "out", **sweep)
    assert result.returncode == 0, result.stderr
    rows = table_of(tmp_path / "out")
    assert [(row["row"], row["n_features"]) for row in rows] == [
        ("dense", ""), ("code 5,4,0;8,6,16", "288"), ("TopK SAEs", "32"), ("TopK SAEs", "48"),
        ("Matryoshka SAEs", "32"), ("Matryoshka SAEs", "48"),
    ]
    losses = [float(row["loss"]) for row in rows]
    for row, loss in zip(rows, losses):
        assert float(row["above_dense"]) == pytest.approx(loss - losses[0], abs=1e-5)
    # 2 layers of encoder, decoder and both biases
    assert [int(row["parameters"]) for row in rows[2:4]] == [2 * (2 * n * 32 + n + 32)
                                                             for n in (32, 48)]
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.pt")}
    again = run_splice(twin, tmp_path / "out", **sweep)
    assert again.stdout == result.stdout
    assert {path: path.stat().st_mtime_ns for path in files} == files  # none was fitted again


def test_saes_of_another_k_or_model_are_not_taken(twin, data_dir, tmp_path):
    other = tmp_path / "other"
    assert run_training(data_dir, other, cayley_levels="", seed=5, max_iters=1).returncode == 0
    assert run_splice(twin, tmp_path / "out").returncode == 0
    one = table_of(tmp_path / "out")
    assert run_splice(twin, tmp_path / "out", k=8).returncode == 0
    two = table_of(tmp_path / "out")
    assert float(two[1]["loss"]) != float(one[1]["loss"])
    result = run_splice(other, tmp_path / "out")
    assert result.returncode == 1 and "its SAEs were fitted to another model" in result.stderr


def test_a_fit_does_not_depend_on_what_is_fitted_beside_it(twin, tmp_path):
    assert run_splice(twin, tmp_path / "one").returncode == 0
    assert run_splice(twin, tmp_path / "two", features="32,48", lr="3e-3,1e-3").returncode == 0
    name = "TopK_48_clean_8192_0.003_k_4_kl_0_seed_0.pt"
    one, two = (torch.load(tmp_path / out / name, weights_only=True) for out in ("one", "two"))
    for a, b in zip(one["saes"], two["saes"]):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_inputs_are_those_that_the_saes_before_give(dense, train):
    torch.manual_seed(0)
    modules = {0: TopKSAE(32, 48, 4).requires_grad_(False)}
    inputs = splice.shuffled_inputs(dense, train, [0, 1], 64, 0, modules)
    clean = splice.shuffled_inputs(dense, train, [0, 1], 64, 0)
    batches = [(next(inputs), next(clean)) for _ in range(9)]
    for met, without in batches[:8]:  # the SAEs have seen nothing yet
        assert torch.equal(met[0], without[0]) and torch.equal(met[1], without[1])
    met, without = batches[8]
    assert torch.equal(met[0], without[0])
    assert not torch.allclose(met[1], without[1], atol=1e-2)


def test_finetuning_lowers_the_kl_and_leaves_the_model_alone(dense, train):
    saes = [splice.new_sae("TopK", dense, layer, 48, 4, seed=0) for layer in range(2)]
    inputs = splice.shuffled_inputs(dense, train, [0, 1], 64, 0)
    splice.fit_saes(saes, inputs, 20, [3e-3] * 2)
    weights = {name: p.clone() for name, p in dense.named_parameters()}
    windows = train.shuffled(0, 32, seed=5)
    modules = dict(enumerate(saes))
    before = splice.losses(dense, windows, modules, dense, 32)
    splice.finetune(dense, saes, train, 20 * 32 * 32, 3e-3, seed=0)
    after = splice.losses(dense, windows, modules, dense, 32)
    assert after[:, 1].mean() < 0.8 * before[:, 1].mean()
    assert all(torch.equal(p, weights[name]) for name, p in dense.named_parameters())
    for sae in saes:
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))


def test_saes_are_read_as_they_were_written(dense, train, tmp_path):
    saes = [splice.new_sae("TopK", dense, layer, 48, 4, seed=0) for layer in range(2)]
    saes[1].scale.fill_(3.0)
    path = str(tmp_path / "saes.pt")
    origin = splice.origin_of(dense, train)
    splice.write_saes(saes, path, origin)
    x = torch.randn(5, 32)
    for sae, read in zip(saes, splice.read_saes(path, dense, origin)):
        assert torch.equal(sae(x), read(x))
    other = GPT(dense.config)
    with pytest.raises(ValueError, match="fitted to another model"):
        splice.read_saes(path, other, splice.origin_of(other, train))
    with pytest.raises(ValueError, match="fitted to other data"):
        splice.read_saes(path, dense, {**origin, "data": "other data"})
    (tmp_path / "saes.pt").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a file of SAEs by tools.splice"):
        splice.read_saes(path, dense, origin)


@pytest.mark.parametrize("settings, message", [
    (dict(kinds="TopK,Gated"), "'Gated' is none of TopK, Matryoshka"),
    (dict(fitted_to="dirty"), "'dirty' is none of clean, spliced"),
    (dict(features="512,many"), "'many' is not a number from 0 on"),
    (dict(features="8"), "features='8': must be at least 36, with k=36"),
    (dict(tokens="100"), "tokens='100': must be at least 1024"),
    (dict(tokens="2.5e0"), "'2.5e0' is not a number from 0 on"),
    (dict(kl_tokens="inf"), "'inf' is not a number from 0 on"),
    (dict(lr="0"), "lr='0': must be above 0"),
    (dict(lr="nan"), "'nan' is not a number from 0 on"),
])
def test_impossible_settings(monkeypatch, settings, message):
    for key, value in settings.items():
        monkeypatch.setattr(splice, key, value)
    with pytest.raises(ValueError, match=message):
        splice.variants()


def test_mistakes_are_one_line(trained, twin, tmp_path):
    for settings, message in (
        (dict(dense=trained), "it is no dense model"),
        (dict(dense=twin, ckpt=twin), "it has no CayleySAE"),
        (dict(dense=twin, lr="1e30"), "the fit of an SAE of 48 features diverged"),
    ):
        result = run_splice(out_dir=tmp_path / "out", **settings)
        assert result.returncode == 1 and message in result.stderr
        assert "Traceback" not in result.stderr
