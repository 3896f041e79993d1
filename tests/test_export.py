"""export.py: other tools read the same model."""
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import load_model as load_safetensors

from conftest import ROOT, run_script
from export import sae_inputs, saelens_tensors
from model import GPT, GPTConfig, load_model


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported")
    for form in ("safetensors", "saelens"):
        result = run_script(ROOT / "export.py", f"--ckpt={trained / 'ckpt.pt'}", f"--format={form}", f"--out={directory / form}")
        assert result.returncode == 0, result.stderr
    return directory


def test_safetensors_hold_the_same_model(trained, exported):
    config = json.loads((exported / "safetensors" / "config.json").read_text())
    model = GPT(GPTConfig(**config["model_args"])).eval()
    load_safetensors(model, exported / "safetensors" / "model.safetensors")
    idx = torch.arange(20).unsqueeze(0)
    torch.testing.assert_close(model(idx)[0], load_model(trained / "ckpt.pt")[0](idx)[0], rtol=0, atol=0)
    assert config["config"]["tokenizer"] == "bytes"


def dense_codes(codes, size):
    return torch.zeros(*codes.ids.shape[:-1], size).scatter(-1, codes.ids, codes.values)


@torch.no_grad()
def test_weights_give_the_scores(trained, exported):
    """Independent of SAELens: x W_enc + b_enc is the code of every active feature, and codes times W_dec what the MLP reads."""
    model, _ = load_model(trained / "ckpt.pt")
    x = sae_inputs(model, torch.arange(32).unsqueeze(0))[1]
    sae, total = model.blocks[1].sae, 0
    for level, codes in enumerate(sae.encode(x)):
        weights = load_file(exported / "saelens" / f"layer_1_level_{level}" / "sae_weights.safetensors")
        scores = x @ weights["W_enc"] + weights["b_enc"]
        torch.testing.assert_close(scores.gather(-1, codes.ids), codes.values, rtol=1e-4, atol=1e-4)
        total = total + dense_codes(codes, scores.shape[-1]) @ weights["W_dec"]
    torch.testing.assert_close(total, sae(x), rtol=1e-4, atol=1e-4)
    metadata = [json.loads((exported / "saelens" / f"layer_1_level_{level}" / "cfg.json").read_text())["metadata"] for level in (0, 1)]
    assert metadata[0]["gate"] == "none" and metadata[1]["gate"].startswith("not expressed")
    assert 0.05 < metadata[1]["active_features_in_common"] < 1


@torch.no_grad()
def test_saelens_loads_and_encodes_alike(trained, exported):
    SAE = pytest.importorskip("sae_lens", reason="sae-lens is not here: pip install sae-lens").SAE
    model, _ = load_model(trained / "ckpt.pt")
    x = sae_inputs(model, torch.arange(32).unsqueeze(0))[0]
    codes = model.blocks[0].sae.encode(x)
    loaded = [SAE.load_from_disk(str(exported / "saelens" / f"layer_0_level_{level}")) for level in (0, 1)]
    expected = dense_codes(codes[0], 32).relu()
    torch.testing.assert_close(loaded[0].encode(x), expected, rtol=1e-4, atol=1e-4)
    read = expected @ model.blocks[0].sae.atoms(0, range(32))
    torch.testing.assert_close(loaded[0].decode(loaded[0].encode(x)), read, rtol=1e-4, atol=1e-4)
    theirs, ours = loaded[1].encode(x), dense_codes(codes[1], 256).relu()
    both = (theirs > 0) & (ours > 0)
    torch.testing.assert_close(theirs[both], ours[both], rtol=1e-4, atol=1e-4)
    assert both.any() and (theirs.sum(-1) >= ours.sum(-1) - 1e-3).all(), "without the gate the k largest can only be larger"
    assert loaded[0].cfg.k == 4 and loaded[0].cfg.metadata.hook_name == "blocks.0.ln_2"


def test_weights_without_standardisation():
    torch.manual_seed(0)
    sae = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=32, cayley_levels="5,4,0",
                        score_standardize=False, forward_standardized=False)).blocks[0].sae.eval()
    sae.mean.normal_()  # is not used
    weights, x = saelens_tensors(sae, 0), torch.randn(5, 32)
    np.testing.assert_allclose((x @ weights["W_enc"]).gather(1, sae.encode(x)[0].ids), sae.encode(x)[0].values.detach(), atol=1e-5)
