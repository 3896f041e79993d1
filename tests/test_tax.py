"""
tax.py's numbers are those of a hand computation, and the command goes on where it stopped; of
records/ablation, its plain layer is the real one and its options do what they say.
"""
import csv
import importlib.util
import math
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from conftest import ROOT, TINY, run_script

from cayley import CayleySAE
from checkpoint import load_model
from tools import tax

ABLATION = ROOT / "records" / "ablation" / "ablation.py"
spec = importlib.util.spec_from_file_location("ablation", ABLATION)
ablation = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ablation)
AblatedSAE = ablation.AblatedSAE


@pytest.fixture
def options(monkeypatch):
    def set_options(**values):
        for key, value in values.items():
            monkeypatch.setattr(AblatedSAE, key, value)
    return set_options


@pytest.fixture
def config(data_dir, tmp_path):
    """A config file of a run of 4 iterations with an evaluation every other."""
    settings = {**TINY, "data_dir": str(data_dir), "max_iters": 4, "eval_interval": 2,
                "eval_iters": 1}
    path = tmp_path / "tiny.py"
    path.write_text("\n".join(f"{key} = {value!r}" for key, value in settings.items()))
    return path


def read_table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# -----------------------------------------------------------------------------
# tax.py

def test_token_multiple():
    dense = [(0, 5.0), (100, 3.0), (200, 2.0), (400, 1.0)]
    assert tax.token_multiple([(0, 5.0), (400, 1.5)], dense) == pytest.approx(400 / 300)
    assert math.isnan(tax.token_multiple([(0, 5.0), (400, 0.5)], dense))


def test_gaps_are_paired_by_seed():
    dense = [[(0, 5.0), (100, 2.0)], [(0, 5.0), (100, 3.0)]]
    first = [[(0, 5.0), (100, 2.5)], [(0, 5.0), (100, 3.5)]]
    other = [[(0, 5.0), (100, 2.2)], [(0, 5.0), (100, 3.4)]]
    lines = tax.summarize({"dense": dense, "first": first, "other": other})
    assert lines[2].startswith("| dense | 2.500 +- 0.707 |  |")
    assert lines[3].startswith("| first | 3.000 +- 0.707 | 0.500 +- 0.000 |  |")
    assert lines[4].startswith("| other | 2.800 +- 0.849 | 0.300 +- 0.141 | -0.200 +- 0.141 |")


@pytest.mark.parametrize("texts, words", [
    (["cayley_levels=7,24,0"], "write name: key=value"),
    ([": cayley_levels=7,24,0"], "write name: key=value"),
    (["dense: cayley_levels=7,24,0"], "'dense' is taken"),
    (["a: n_layer=1", "a: n_layer=2"], "'a' is taken"),
    (["a b: n_layer=1", "a_b: n_layer=2"], "share a directory"),
    (["a: max_iters=1"], "all runs share max_iters"),
    (["a: max-iters=1"], "all runs share max_iters"),
    (["a: seed=7"], "tax.py gives seed itself"),
])
def test_variants_that_could_not_be_compared_are_refused(config, tmp_path, texts, words):
    with pytest.raises(ValueError, match=words):
        tax.compare(tax.parse_variants(texts), config, [], str(tmp_path / "tax"))
    assert not (tmp_path / "tax").exists()


def test_a_typo_costs_no_run_and_can_be_corrected(config, tmp_path):
    """Every setting is checked before the first training."""
    out_dir = tmp_path / "tax"
    for _ in range(2):  # the second time the directory is there, but holds no run
        with pytest.raises(ValueError, match="'nosuch'"):
            tax.compare(tax.parse_variants(["x: nosuch=3"]), str(config), [], str(out_dir), jobs=2)
    assert not list(out_dir.glob("*/*/log.csv"))
    tax.claim(tax.run_directory(str(out_dir), "x", 0), "other settings")


def test_the_whole_command(config, tmp_path):
    command = [f"--config={config}", f"--out_dir={tmp_path / 'tax'}", "--jobs=2"]
    command += ["--variant", "half, k: cayley_levels=5,2,0;8,3,16"]
    raw = "<raw>: score_standardize=False"
    for _ in range(2):  # the second time everything is there
        result = run_script("-m", "tools.tax", *command, "--variant", raw)
        assert result.returncode == 0, result.stderr
    raw = "<raw>: forward_standardized=False"
    other = run_script("-m", "tools.tax", *command, "--variant", raw)
    assert other.returncode == 1
    assert "score_standardize=False" in other.stderr
    assert "forward_standardized=False" in other.stderr
    rows = read_table(tmp_path / "tax" / "tax.csv")
    assert len(rows) == 9
    assert {row["setting"] for row in rows} == {"dense", "half, k", "<raw>"}
    last = rows[2]["tokens"]
    final = {row["setting"]: float(row["val_loss"]) for row in rows if row["tokens"] == last}
    half, raw, dense = final["half, k"], final["<raw>"], final["dense"]
    assert f"| half, k | {half:.3f} | {half - dense:.3f} |  |" in result.stdout
    assert f"| {raw - dense:.3f} | {raw - half:+.3f} |" in result.stdout
    svg = ElementTree.parse(tmp_path / "tax" / "tax.svg")
    assert len(svg.findall(".//{*}polyline")) == 3


# -----------------------------------------------------------------------------
# records/ablation

@pytest.mark.parametrize("switches", [
    (True, True, True),
    (False, True, True),
    (True, False, False),
    (True, True, False),
    (True, False, True),
])
def test_the_plain_layer_without_options_is_the_real_one(switches):
    torch.manual_seed(0)
    plain = AblatedSAE(64, "6,8,0;9,16,32", *switches)
    real = CayleySAE(64, "6,8,0;9,16,32", *switches)
    plain.stats_stride = 1
    for _ in range(3):
        x = torch.randn(10, 64) * torch.linspace(0.2, 3, 64)  # 2D: all rows count
        x = torch.nn.functional.rms_norm(x, (64,)).requires_grad_()
        outputs = plain(x), real(x)
        torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)
        gradients = (torch.autograd.grad(y.square().sum(), x)[0] for y in outputs)
        torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-3)
        for sae in (plain, real):
            sae.update_stats()
    torch.testing.assert_close(plain.active_counts, real.active_counts)


def test_options_change_what_they_say(options):
    torch.manual_seed(0)
    x = torch.randn(50, 64)

    def codes(**values):
        options(**values)
        return AblatedSAE(64, "6,8,0;9,16,32").eval().encode(x)
    plain = codes()
    assert any((plain[1].ids % 8 == 0).flatten()), "parents' own atoms are among the leaves"
    assert not (codes(repeats=False)[1].ids % 8 == 0).any()
    absolute = codes(repeats=True, absolute=True)
    assert (absolute[0].values < 0).any() and not (plain[0].values < 0).any()
    halved = codes(absolute=False, leaf_weight=0.5)
    torch.testing.assert_close(halved[1].values, plain[1].values / 2)
    residual = codes(leaf_weight=1.0, residual=True)
    # level 0 is orthonormal: nothing of its active atoms is left
    sae = AblatedSAE(64, "6,8,0;9,16,32")
    left = x - sae.decode([residual[0]])
    products = (left @ sae.atoms(1, residual[1].ids[0]).T)[0]
    assert products.sub(residual[1].values[0]).abs().max() < 1e-4


@pytest.mark.parametrize("dictionary, largest", [("kasami", 1 / 16), ("gold", 1 / 8)])
def test_coherence_of_the_dictionaries(options, dictionary, largest):
    options(dictionary=dictionary)
    atoms = AblatedSAE(256, "8,8,0;12,16,64").atoms_1.double()
    products = atoms[:1] @ atoms[1:].T  # they depend on u XOR v alone
    assert products.abs().max().item() == largest


@pytest.mark.parametrize("argument, words", [
    ("--residual=true", "residual='true' must be bool"),
    ("--leaf_weight=abc", "leaf_weight='abc' must be float"),
    ("--dictionary=golden", "dictionary='golden'"),
])
def test_an_option_of_the_wrong_type_is_refused(argument, words):
    wrong = run_script(ABLATION, "--train", argument)
    assert wrong.returncode == 1 and words in wrong.stderr and wrong.stderr.count("\n") == 1


def test_a_checkpoint_of_the_layer_with_options_is_not_taken_for_a_plain_one(config, tmp_path):
    out_dir = tmp_path / "run"
    result = run_script(ABLATION, "--train", config, "--residual=True", f"--out_dir={out_dir}")
    assert result.returncode == 0, result.stderr
    with pytest.raises(ValueError, match="can't be built.*sae.use"):
        load_model(str(out_dir / "ckpt.pt"))


def test_the_random_dictionary_keeps_the_parents(options):
    options(dictionary="random")
    sae = AblatedSAE(64, "6,8,0;9,16,32")
    torch.testing.assert_close(sae.atoms_1[::8], sae.atoms_0)
    torch.testing.assert_close(sae.atoms_1.norm(dim=1), torch.ones(2**9))


def test_the_ablation_command(config, tmp_path):
    """Rows by name; an option of AblatedSAE reaches the model of the run, and so its losses."""
    command = [ABLATION, f"--config={config}", f"--out_dir={tmp_path / 'out'}", "--jobs=2"]
    for word in ("n_layer=1", "batch_size=1", "max_iters=4", "eval_interval=4", "eval_iters=1"):
        command += ["--train_settings", word]
    for name in ("two levels, 8 + 16 of 256 + 4,096", "by absolute value"):
        command += ["--only", name]
    result = run_script(*command)
    assert result.returncode == 0, result.stderr
    rows = read_table(tmp_path / "out" / "tax.csv")
    losses = {row["setting"]: row["val_loss"] for row in rows if row["tokens"] != "0"}
    assert len(losses) == 3 == len(set(losses.values()))
    wrong = run_script(ABLATION, "--only", "by luck")
    assert wrong.returncode == 1 and "'by luck'" in wrong.stderr
