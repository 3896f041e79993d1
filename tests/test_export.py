"""export.py: other tools read the same model."""
import ast
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, log_rows
from safetensors.torch import load_file
from safetensors.torch import load_model as load_safetensors

from checkpoint import load_model
from data import get_tokenizer
from model import GPT, GPTConfig
from tools import export
from tools.evals import digest
from tools.export import saelens_tensors
from tools.hf_folder import imported_modules, inlined_source, tokenizer_json, without_imports
from tools.runs import run_windows


def run_export(trained, export_format, out_dir, *settings):
    """export.py in this process."""
    argv = ["export.py", f"--ckpt={trained}", f"--export_format={export_format}"]
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "ckpt", "export_format", "out_dir", "data_dir", "tokens", "license", "language",
            "corpus",
        ):
            patch.setattr(export, name, getattr(export, name))  # restored afterwards
        patch.setattr(sys, "argv", [*argv, f"--out_dir={out_dir}", *settings])
        export.main()


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported")
    for export_format in ("safetensors", "hf", "saelens"):
        run_export(trained, export_format, directory / export_format)
    return directory


def sae_input(model, idx, layer):
    """What a layer's CayleySAE reads, (B, T, d)."""
    with model.recording() as records:
        model(idx)
    return records[layer][-1].x


# -----------------------------------------------------------------------------
# files

def test_files_have_the_modes_of_the_umask(exported):
    umask = os.umask(0)
    os.umask(umask)
    files = [path for path in exported.rglob("*") if path.is_file()]
    assert len(files) == 2 + 8 + 2 * 4
    for path in files:
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path


def test_a_full_disk_is_one_line_and_leaves_nothing(trained, tmp_path):
    """A file-size limit stands for the full disk: the system refuses the write in both."""
    result = subprocess.run(
        [sys.executable, "-m", "tools.export", f"--ckpt={trained}", f"--out_dir={tmp_path}/out"],
        capture_output=True, text=True, env=ENVIRONMENT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    lines = result.stderr.splitlines()
    assert result.returncode == 1 and len(lines) == 1, result.stderr
    assert "model.safetensors can't be written (File too large)" in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("export_format", ["safetensors", "saelens"])
def test_without_safetensors_it_says_what_to_install(trained, tmp_path, monkeypatch, export_format):
    monkeypatch.setitem(sys.modules, "safetensors", None)  # importing it fails
    monkeypatch.delitem(sys.modules, "safetensors.torch")
    with pytest.raises(ValueError, match="pip install safetensors"):
        run_export(trained, export_format, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# -----------------------------------------------------------------------------
# safetensors

def test_safetensors_hold_the_same_model(trained, exported):
    config = json.loads((exported / "safetensors" / "config.json").read_text())
    model = GPT(GPTConfig(**config["model_args"])).eval()
    load_safetensors(model, exported / "safetensors" / "model.safetensors")
    idx = torch.arange(20).unsqueeze(0)
    expected = load_model(trained / "ckpt.pt")[0](idx)[0]
    torch.testing.assert_close(model(idx)[0], expected, rtol=0, atol=0)
    assert config["config"]["tokenizer"] == "bytes"


# -----------------------------------------------------------------------------
# Hugging Face: in environments of their own, where this repository can't be imported
#
#     python -m venv /tmp/venv-hf5
#     /tmp/venv-hf5/bin/pip install torch==2.13.0 numpy transformers==5.24.0
#
# likewise /tmp/venv-hf4 with transformers==4.57.6, and for nnsight /tmp/venv-nnsight with
# transformers and nnsight. The environment variable INTEROP_VENVS names another directory than
# /tmp. Another release of transformers goes into hf_folder.TESTED once its environment passes.

TEXTS = [
    "def main():\n    return 'x'\n\n\n\tpass  # done   ",
    "It's  we'll I'd 123,456.7 \u00e9\u4e2d\u6587 \U0001f642\r\n   end",
    " leading, \u00a0\u2003 and\x00\x7f control",
]


def interop_python(name):
    python = Path(os.environ.get("INTEROP_VENVS", "/tmp")) / f"venv-{name}" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{python} is not here: see the comment above")
    return python


def run_elsewhere(python, program, *arguments, cwd):
    """A program of tests/ by another Python, offline, in a directory of its own."""
    environment = {**ENVIRONMENT, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf_home")}
    environment.pop("PYTHONPATH", None)
    source = (ROOT / "tests" / program).read_text()
    (cwd / program).write_text(source)  # beside tests/ it would find the repository
    command = [python, cwd / program, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)
    assert result.returncode == 0 and result.stdout.endswith("equal\n"), result.stderr


def expectations(model):
    """What hf_program.py compares with, by model.py."""
    idx = torch.arange(3, 60, 3)[:16].view(2, 8)
    rows = [torch.arange(40, 40 + n) for n in (7, 3, 12, 7)]
    expected = {"idx": idx, "rows": rows, "logits": model(idx, n_logits=0)[0]}
    together = torch.stack([rows[0], rows[3]])  # rows of one length share a forward
    alone = [model(row[None], n_logits=0)[0][0] for row in rows[1:3]]
    first, last = model(together, n_logits=0)[0]
    expected["row_logits"] = [first, *alone, last]
    expected["generated"] = [
        model.generate(row[None], 8, temperature=0, n_tokens=257)[0] for row in rows
    ]
    expected["codes"] = [[tuple(code) for code in layer] for layer in model.run_with_codes(idx)[1]]
    feature = model.run_with_codes(idx)[1][1][1].ids[0, 0, 0].item()
    expected["edits"] = [(0, (0, 3, 1, 4.0)), (1, (1, feature, 0, 0.0))]
    for layer, edit in expected["edits"]:
        model.saes()[layer].edits.append(edit)
    expected["edited"] = model(idx, n_logits=0)[0]
    for sae in model.saes():
        sae.edits.clear()
    targets = torch.cat([idx[:, 1:], torch.full_like(idx[:, :1], -1)], 1)
    loss = model(idx, targets)[1]
    loss.backward()
    expected["loss"] = loss.detach()
    expected["gradients"] = {name: p.grad for name, p in model.named_parameters()}
    model.train()
    model(idx)
    for sae in model.saes():
        sae.update_stats()
    model.eval()
    expected["means"] = [sae.mean for sae in model.saes()]
    return expected


def write_texts(folder, encoding):
    rows = [(text, encoding.encode_ordinary(text)) for text in TEXTS]
    (folder / "texts.json").write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def wider(trained, tmp_path_factory):
    """The trained run with 7 ids in its vocabulary that no text has."""
    run = tmp_path_factory.mktemp("wider") / "run"
    shutil.copytree(trained, run)
    checkpoint = torch.load(run / "ckpt.pt", weights_only=True)
    rows = torch.cat([checkpoint["model"]["wte.weight"], torch.randn(7, 32)])
    checkpoint["model"] |= {"wte.weight": rows, "lm_head.weight": rows}
    checkpoint["model_args"]["vocab_size"] += 7
    torch.save(checkpoint, run / "ckpt.pt")
    run_export(run, "hf", run.parent / "hf")
    return run


@pytest.mark.parametrize("name, program", [
    ("hf4", "hf_program.py"), ("hf5", "hf_program.py"), ("nnsight", "nnsight_program.py"),
])
def test_elsewhere_it_is_the_same_model(wider, tmp_path, name, program):
    python = interop_python(name)
    folder = tmp_path / "hf"  # as its card calls it
    shutil.copytree(wider.parent / "hf", folder)
    write_texts(folder, get_tokenizer("bytes"))
    expected = expectations(load_model(wider)[0])
    torch.save({**expected, "resaved": str(tmp_path / "resaved")}, tmp_path / "expected.pt")
    run_elsewhere(python, program, folder, tmp_path / "expected.pt", cwd=tmp_path)


@pytest.mark.parametrize("name", ["hf4", "hf5"])
def test_gpt2s_tokenizer_gives_the_same_ids(tmp_path, name):
    python = interop_python(name)
    try:
        encoding = get_tokenizer("gpt2")
    except ValueError as error:
        pytest.skip(str(error))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(encoding)))
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
    tokenizer_config["clean_up_tokenization_spaces"] = False
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    write_texts(folder, encoding)
    run_elsewhere(python, "hf_program.py", folder, cwd=tmp_path)


def test_the_modeling_file_imports_no_file_of_this_directory():
    source = inlined_source(["cayley", "model", "tools.hf_model"])
    names = {path.stem for path in ROOT.glob("*.py")}
    for node in ast.walk(ast.parse(source)):
        assert not imported_modules(node) & names
    assert 'custom_op("cayley::' not in source and 'custom_op("cayley_' in source


def test_a_file_that_is_not_inlined_counts_as_not_installed():
    source = """
import math
from model import GPT
def kernels():
    try:
        import cayley_triton
    except ImportError:
        return None
    return cayley_triton
"""
    namespace = {}
    exec(without_imports(source, {"model"}, {"cayley_triton"}), namespace)
    assert namespace["kernels"]() is None and "math" in namespace and "GPT" not in namespace


def test_the_card_has_the_runs_numbers_and_says_what_is_missing(trained, exported, tmp_path):
    card = (exported / "hf" / "README.md").read_text()
    val_loss = float(log_rows(trained, "val_loss")[20])
    assert f"| val loss, nats a token | {val_loss:.4g} |" in card
    assert "| tokens | 10,240 |" in card and "| iteration of these weights | 20 of 20 |" in card
    assert "| 1 | 256 | 6 | 16 |" in card and "| hardware | 1 x " in card
    assert "HellaSwag, acc_norm | not measured" in card and "--max_iters=20" in card
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "evals.json").write_text(json.dumps({
        "hellaswag": {"accuracy": 0.3142, "standard_error": 0.0046, "items": 10042},
        "codes": {"layers": [{"zero_minus_loss": 0.52, "zero_minus_loss_error": 0.013}]}}))
    (tmp_path / "run" / "log.csv").unlink()
    run_export(tmp_path / "run", "hf", tmp_path / "folder")
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "| HellaSwag, acc_norm | 0.3142 +- 0.0046 | 10,042 items |" in card
    assert "| val loss, nats a token | not measured |" in card
    assert "layer 0: loss with its MLP reading zero, minus loss | 0.52 +- 0.013 |" in card
    assert "layer 1: loss with its MLP reading zero, minus loss | not measured |" in card


    assert "explained by the best multiple of the code" in card
    assert "| positions | learned, 32 of them |" in card


def test_the_card_says_of_what_its_scores_are(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "evals.json").write_text(json.dumps({
        "val": {"loss": 3.21, "standard_error": 0.04, "windows": 256},
        "text": {"perplexity": 31.5, "word_perplexity": 78.9, "texts": 12, "tokens": 34567},
        "lambada": {"accuracy": 0.31, "standard_error": 0.02, "items": 50, "perplexity": 12.5},
        "codes": {"windows": 64, "layers": [{"zero_minus_loss": 0.52}]},
    }))
    run_export(run, "hf", tmp_path / "folder")
    card = (tmp_path / "folder" / "README.md").read_text()
    assert card.count("val loss, nats") == 1 and "| val loss, nats a token | 3.21 +- 0.04 |" in card
    assert "| that is the mean of | 256 windows of 32 tokens of the val split" in card
    assert "| text, perplexity a token | 31.5 | 12 texts, 34,567 tokens |" in card
    assert "| LAMBADA, perplexity | 12.5 | 50 items |" in card
    assert "minus loss | 0.52 | 64 windows |" in card


def test_scores_of_other_weights_are_left_out(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    model, _ = load_model(str(run))
    (run / "evals.json").write_text(json.dumps({
        "val": {"loss": 3.21, "windows": 256, "weights": digest(model)},
        "lambada": {"accuracy": 0.3133, "items": 50, "weights": "0123456789abcdef"},
    }))
    run_export(run, "hf", tmp_path / "folder")
    said = capsys.readouterr().out
    assert "lambada of other weights" in said and "val of other" not in said
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "3.21" in card and "0.3133" not in card


def test_the_card_names_corpus_language_and_licence(trained, data_dir, tmp_path):
    run_export(trained, "hf", tmp_path / "folder")
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "| corpus | the text that every Python ships |" in card
    assert "license: mit" in card and "| language | en |" in card and "datasets:" not in card
    fineweb = tmp_path / "fineweb"
    shutil.copytree(data_dir, fineweb)
    meta = json.loads((fineweb / "meta.json").read_text())
    (fineweb / "meta.json").write_text(json.dumps({**meta, "source": "fineweb-edu"}))
    run_export(trained, "hf", tmp_path / "web", f"--data_dir={fineweb}", "--license=apache-2.0")
    card = (tmp_path / "web" / "README.md").read_text()
    assert "datasets: [HuggingFaceFW/fineweb-edu]" in card and "language: [en]" in card
    assert "license: apache-2.0" in card and "arXiv 2607.20652" in card
    settings = ("--corpus=Moby-Dick", "--language=en, de")
    run_export(trained, "hf", tmp_path / "book", *settings)
    card = (tmp_path / "book" / "README.md").read_text()
    assert "| corpus | Moby-Dick |" in card and "language: [en, de]" in card


def test_no_file_names_a_directory_of_this_machine(trained, exported, tmp_path):
    run = json.loads((trained / "config.json").read_text())
    run["config"]["working_directory"] = str(tmp_path)
    run["config"]["data_dir"] = f"data/a,{tmp_path}/b"
    run["command"] = [f"{ROOT}/train.py", f"--out_dir={trained}", "--max_iters=20"]
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    (copy / "config.json").write_text(json.dumps(run))
    run_export(copy, "hf", tmp_path / "folder")
    for path in [*exported.rglob("*"), *(tmp_path / "folder").iterdir()]:
        if path.suffix in (".json", ".md"):
            text = path.read_text()
            for directory in (str(ROOT), str(tmp_path), str(trained), str(trained.parent)):
                assert directory not in text, path
            assert "working_directory" not in text, path
    training = json.loads((tmp_path / "folder" / "training.json").read_text())
    assert training["command"] == ["train.py", "--out_dir=run", "--max_iters=20"]
    assert training["config"]["data_dir"] == "data/a,b"


def test_without_a_free_id_padding_is_end_of_text_and_the_card_says_so(tmp_path):
    config = GPTConfig(block_size=32, vocab_size=257, n_layer=1, n_head=2, n_embd=32,
                       cayley_levels="5,4,0")
    settings = {"tokenizer": "bytes", "block_size": 32, "data_dir": "data", "batch_size": 1,
                "gradient_accumulation_steps": 1, "max_iters": 1}
    checkpoint = {"model": GPT(config).state_dict(), "model_args": vars(config), "config": settings}
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    run_export(tmp_path, "hf", tmp_path / "folder")
    names = json.loads((tmp_path / "folder" / "tokenizer_config.json").read_text())
    assert names["pad_token"] == names["eos_token"] == "<|endoftext|>"
    assert "Padding is end of text" in (tmp_path / "folder" / "README.md").read_text()


# -----------------------------------------------------------------------------
# SAELens

def dense_codes(codes, size):
    return torch.zeros(*codes.ids.shape[:-1], size).scatter(-1, codes.ids, codes.values)


@torch.no_grad()
def test_weights_give_the_scores(trained, exported):
    """Without SAELens: x W_enc + b_enc has the active features' codes, and they give W_dec."""
    model, _ = load_model(trained / "ckpt.pt")
    x = sae_input(model, torch.arange(32).unsqueeze(0), 1)
    sae, total = model.blocks[1].sae, 0
    metadata = []
    for level, codes in enumerate(sae.encode(x)):
        directory = exported / "saelens" / f"layer_1_level_{level}"
        weights = load_file(directory / "sae_weights.safetensors")
        scores = x @ weights["W_enc"] + weights["b_enc"]
        torch.testing.assert_close(scores.gather(-1, codes.ids), codes.values, rtol=1e-4, atol=1e-4)
        total = total + dense_codes(codes, scores.shape[-1]) @ weights["W_dec"]
        metadata.append(json.loads((directory / "cfg.json").read_text())["metadata"])
    torch.testing.assert_close(total, sae(x), rtol=1e-4, atol=1e-4)
    assert metadata[0]["gate"] == "none" and metadata[1]["gate"].startswith("not expressed")
    assert 0.05 < metadata[1]["active_features_in_common"] < 1


class FromFiles(torch.nn.Module):
    """What SAELens' TopK SAEs of a layer's files reconstruct together."""

    def __init__(self, directory, layer, ks):
        super().__init__()
        self.ks = ks
        self.weights = [load_file(directory / f"layer_{layer}_level_{i}/sae_weights.safetensors")
                        for i in range(len(ks))]

    def forward(self, x):
        total = 0
        for k, weights in zip(self.ks, self.weights):
            best = (x @ weights["W_enc"] + weights["b_enc"]).topk(k)
            codes = torch.zeros(*x.shape[:-1], len(weights["b_enc"]))
            total = total + codes.scatter(-1, best.indices, best.values.relu()) @ weights["W_dec"]
        return total


@torch.no_grad()
def test_the_cost_of_saelens_codes_is_that_of_its_files(trained, data_dir, exported):
    model, config = load_model(trained)
    split = run_windows(config, "val")
    windows = torch.from_numpy(split.shuffled(0, min(16, len(split)), seed=0))

    def loss():
        return model(windows[:, :-1], windows[:, 1:])[1].item()

    own = loss()
    directory = exported / "saelens"
    cfg = json.loads((directory / "layer_1_level_1" / "cfg.json").read_text())["metadata"]
    assert cfg["val_loss"] == pytest.approx(own, abs=1e-5)
    model.blocks[1].sae = FromFiles(directory, 1, [4, 6])
    assert cfg["val_loss_added_by_this_layer"] == pytest.approx(loss() - own, abs=2e-5)
    model.blocks[0].sae = FromFiles(directory, 0, [4, 6])
    assert cfg["val_loss_added_by_all_layers"] == pytest.approx(loss() - own, abs=2e-5)
    assert abs(loss() - own) > 2e-4


@torch.no_grad()
def test_saelens_loads_and_encodes_alike(trained, exported):
    reason = "sae-lens is not here: pip install sae-lens"
    SAE = pytest.importorskip("sae_lens", reason=reason).SAE
    model, _ = load_model(trained / "ckpt.pt")
    x = sae_input(model, torch.arange(32).unsqueeze(0), 0)
    codes = model.blocks[0].sae.encode(x)
    loaded = [SAE.load_from_disk(str(exported / "saelens" / f"layer_0_level_{level}"))
              for level in (0, 1)]
    expected = dense_codes(codes[0], 32).relu()
    torch.testing.assert_close(loaded[0].encode(x), expected, rtol=1e-4, atol=1e-4)
    read = expected @ model.blocks[0].sae.atoms(0, range(32))
    torch.testing.assert_close(loaded[0].decode(loaded[0].encode(x)), read, rtol=1e-4, atol=1e-4)
    theirs, ours = loaded[1].encode(x), dense_codes(codes[1], 256).relu()
    both = (theirs > 0) & (ours > 0)
    torch.testing.assert_close(theirs[both], ours[both], rtol=1e-4, atol=1e-4)
    assert both.any()
    larger = theirs.sum(-1) >= ours.sum(-1) - 1e-3
    assert larger.all(), "without the gate the k largest can only be larger"
    assert loaded[0].cfg.k == 4 and loaded[0].cfg.metadata.hook_name == "blocks.0.ln_2"


def test_weights_without_standardisation():
    torch.manual_seed(0)
    sae = GPT(GPTConfig(
        block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=32, cayley_levels="5,4,0",
        score_standardize=False, forward_standardized=False,
    )).blocks[0].sae.eval()
    sae.mean.normal_()  # is not used
    weights, x = saelens_tensors(sae, 0), torch.randn(5, 32)
    codes = sae.encode(x)[0]
    scores = (x @ weights["W_enc"]).gather(1, codes.ids)
    np.testing.assert_allclose(scores, codes.values.detach(), atol=1e-5)


# -----------------------------------------------------------------------------
# Neuronpedia

def check_request(body):
    """
    The schema of Neuronpedia's upload-batch, apps/webapp/app/api/feature/upload-batch/route.tsx.

    Of github.com/hijohnnylin/neuronpedia at commit ebb8426 (August 2026).
    """
    assert body.keys() == {"modelId", "source", "features"}
    assert body["modelId"] == body["modelId"].lower() and body["source"] == body["source"].lower()
    assert 1 <= len(body["features"]) <= 128
    indices = [feature["index"] for feature in body["features"]]
    assert len(set(indices)) == len(indices)
    for feature in body["features"]:
        assert type(feature["index"]) is int and 0 <= feature["index"] <= 10_000_000
        assert 0 <= feature["density"] <= 1
        for logits in (feature["topLogits"], feature["bottomLogits"]):
            assert len(logits) <= 20
            assert all(logit["token"] and np.isfinite(logit["value"]) for logit in logits)
        assert feature["activations"]
        for activation in feature["activations"]:
            assert 1 <= len(activation["tokens"]) == len(activation["values"]) <= 1024
            assert all(activation["tokens"]) and np.isfinite(activation["values"]).all()


@torch.no_grad()
def test_neuronpedia_takes_the_requests_and_they_tell_the_codes(trained, tmp_path):
    run_export(trained, "neuronpedia", tmp_path / "Tiny", "--tokens=960")
    model, config = load_model(trained)
    windows = run_windows(config, "train").shuffled(0, 30, seed=0)[:, :-1]
    codes = model.run_with_codes(torch.from_numpy(windows))[1]
    for layer in (0, 1):
        for level in (0, 1):
            directory = tmp_path / "Tiny" / f"{layer}-cayley-level-{level}"
            bodies = [json.loads(path.read_text()) for path in directory.iterdir()]
            for body in bodies:
                check_request(body)
                assert (body["modelId"], body["source"]) == ("tiny", directory.name)
            found = {feature["index"]: feature for body in bodies for feature in body["features"]}
            ids, values = codes[layer][level]
            assert found.keys() == set(ids.unique().tolist())
            for index in list(found)[::25]:
                active = values[ids == index]
                assert found[index]["density"] == pytest.approx(len(active) / windows.size)
                best = max(found[index]["activations"][0]["values"])
                assert best == pytest.approx(active.max().item(), abs=0.01)
                raised = [logit["value"] for logit in found[index]["topLogits"]]
                lowered = [logit["value"] for logit in found[index]["bottomLogits"]]
                assert raised == sorted(raised, reverse=True) and lowered == sorted(lowered)
                assert raised[-1] > lowered[-1]
    assert not (tmp_path / "Tiny" / "2-cayley-level-0").exists()
