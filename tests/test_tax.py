"""tax.py: its plain layer is the real one, its options do what they say, its numbers are those of a hand computation."""
import csv
import math
import xml.etree.ElementTree as ElementTree

import pytest
import torch

import tax
from cayley import CayleySAE
from conftest import ROOT, TINY, run_script


@pytest.fixture
def options(monkeypatch):
    def set_options(**values):
        for key, value in values.items():
            monkeypatch.setattr(tax.AblatedSAE, key, value)
    return set_options


@pytest.mark.parametrize("switches", [(True, True, True), (False, True, True), (True, False, False), (True, True, False),
                                      (True, False, True)])
def test_the_plain_layer_without_options_is_the_real_one(switches):
    torch.manual_seed(0)
    plain, real = tax.AblatedSAE(64, "6,8,0;9,16,32", *switches), CayleySAE(64, "6,8,0;9,16,32", *switches)
    plain.stats_stride = 1
    for step in range(3):
        x = torch.nn.functional.rms_norm(torch.randn(10, 64) * torch.linspace(0.2, 3, 64), (64,))  # 2D: all rows count
        x.requires_grad_()
        outputs = plain(x), real(x)
        torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in outputs), atol=1e-3, rtol=1e-3)
        for sae in (plain, real):
            sae.update_stats()
    torch.testing.assert_close(plain.active_counts, real.active_counts)


def test_options_change_what_they_say(options):
    torch.manual_seed(0)
    x = torch.randn(50, 64)

    def codes(**values):
        options(**values)
        return tax.AblatedSAE(64, "6,8,0;9,16,32").eval().encode(x)
    plain = codes()
    assert any((plain[1].ids % 8 == 0).flatten()), "parents' own atoms are among the leaves"
    assert not (codes(repeats=False)[1].ids % 8 == 0).any()
    assert (codes(repeats=True, absolute=True)[0].values < 0).any() and not (plain[0].values < 0).any()
    torch.testing.assert_close(codes(absolute=False, leaf_weight=0.5)[1].values, plain[1].values / 2)
    residual = codes(leaf_weight=1.0, residual=True)  # level 0 is orthonormal: nothing of its active atoms is left
    sae = tax.AblatedSAE(64, "6,8,0;9,16,32")
    left = x - sae.decode([residual[0]])
    assert (left @ sae.atoms(1, residual[1].ids[0]).T)[0].sub(residual[1].values[0]).abs().max() < 1e-4


@pytest.mark.parametrize("dictionary, largest", [("kasami", 1 / 16), ("gold", 1 / 8)])
def test_coherence_of_the_dictionaries(options, dictionary, largest):
    options(dictionary=dictionary)
    atoms = tax.AblatedSAE(256, "8,8,0;12,16,64").atoms_1.double()
    products = atoms[:1] @ atoms[1:].T  # they depend on u XOR v alone
    assert products.abs().max().item() == largest


def test_token_multiple():
    dense = [(0, 5.0), (100, 3.0), (200, 2.0), (400, 1.0)]
    assert tax.token_multiple([(0, 5.0), (400, 1.5)], dense) == pytest.approx(400 / 300)
    assert math.isnan(tax.token_multiple([(0, 5.0), (400, 0.5)], dense))


def test_the_whole_command(data_dir, tmp_path):
    config = tmp_path / "tiny.py"
    config.write_text("\n".join(f"{key} = {value!r}" for key, value in {**TINY, "data_dir": str(data_dir), "max_iters": 4,
                                                                       "eval_interval": 2, "eval_iters": 1}.items()))
    command = [f"--config={config}", f"--out_dir={tmp_path / 'tax'}", "--jobs=2", "--variant", "half, k: cayley_levels=5,2,0;8,3,16",
               "--variant", "<gold>: dictionary=gold"]
    for _ in range(2):  # the second time everything is there
        result = run_script(ROOT / "tax.py", *command)
        assert result.returncode == 0, result.stderr
    other = run_script(ROOT / "tax.py", *command[:-1], "<gold>: dictionary=random")
    assert other.returncode == 1 and "dictionary=gold" in other.stderr and "dictionary=random" in other.stderr
    with open(tmp_path / "tax" / "tax.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and {row["setting"] for row in rows} == {"dense", "half, k", "<gold>"}
    final = {row["setting"]: float(row["val_loss"]) for row in rows if row["tokens"] == rows[2]["tokens"]}
    assert f"| half, k | {final['half, k']:.3f} | {final['half, k'] - final['dense']:.3f} |  |" in result.stdout
    assert f"| {final['<gold>'] - final['dense']:.3f} | {final['<gold>'] - final['half, k']:+.3f} |" in result.stdout
    assert len(ElementTree.parse(tmp_path / "tax" / "tax.svg").findall(".//{*}polyline")) == 3
