"""records/ablation: what its layers with more gradient do; test_tax.py has the command."""
import importlib.util

import pytest
import torch
from conftest import ROOT

spec = importlib.util.spec_from_file_location(
    "ablation", ROOT / "records" / "ablation" / "ablation.py"
)
ablation = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ablation)
GradientSAE = ablation.GradientSAE


def gradient_beside_the_code(training, setting, value):
    """
    What a setting adds to the gradient of (output * weight).sum() at x (..., 64), x, weight, layer.

    Neither the output nor the gradient at the biases may change.
    """
    torch.manual_seed(0)
    x = torch.randn(3, 7, 64, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    results = []
    for now in (0, value):
        torch.manual_seed(1)
        sae = GradientSAE(64, "6,5,0;9,6,16").double().train(training)
        with torch.no_grad():
            sae.bias.normal_(std=0.3)
            sae.mean.normal_(std=0.3)
            sae.var.uniform_(0.3, 2)
        setattr(sae, setting, now)
        output = sae(x)
        results.append((output, *torch.autograd.grad((output * weight).sum(), [x, sae.bias])))
    (plain, plain_x, plain_bias), (output, grad_x, grad_bias) = results
    assert torch.equal(output, plain) and torch.equal(grad_bias, plain_bias)
    return grad_x - plain_x, x, weight, sae


@pytest.mark.parametrize("training", [True, False])
def test_dense_gradient_goes_around_the_code_in_training_alone(training):
    added, _, weight, _ = gradient_beside_the_code(training, "dense_gradient", 0.5)
    torch.testing.assert_close(added, 0.5 * weight * training)


@pytest.mark.parametrize("training", [True, False])
def test_near_misses_hand_their_part_of_the_gradient_on_in_training_alone(training):
    added, x, weight, sae = gradient_beside_the_code(training, "near_misses", 4)
    atoms = sae.atoms(0, range(64))
    score = (x @ atoms.T - sae.mean[:64]) / sae.var[:64].sqrt() + sae.bias[:64]
    ids = score.topk(9).indices[..., 5:]
    near = torch.nn.functional.one_hot(ids, 64).sum(-2).double()  # (3, 7, 64)
    expected = (weight @ atoms.T * near) @ atoms
    torch.testing.assert_close(added, expected * training)


def test_an_active_feature_is_no_near_miss_where_scores_tie():
    torch.manual_seed(0)
    sae = GradientSAE(64, "6,5,0;9,6,16").double()
    x = torch.randn(20, 7, 64, dtype=torch.float64).sign().requires_grad_()
    weight = torch.randn_like(x)
    gradients = []
    for sae.near_misses in (0, 7):
        gradients += torch.autograd.grad((sae(x) * weight).sum(), x)
    along = (gradients[1] - gradients[0]) @ sae.atoms(0, range(64)).T
    along_active = along.gather(-1, sae.encode(x)[0].ids)
    torch.testing.assert_close(along_active, torch.zeros_like(along_active))


def test_near_misses_are_features_that_are_not_active(monkeypatch):
    monkeypatch.setattr(GradientSAE, "near_misses", 60)
    with pytest.raises(ValueError, match="near_misses=60: must be from 0 to 59"):
        GradientSAE(64, "6,5,0")
