"""
A checkpoint in other tools' formats, in a new directory.

    python -m tools.export --ckpt ckpt.pt --export_format=safetensors --out_dir=exported
    python -m tools.export --ckpt ckpt.pt --export_format=hf --out_dir=cayley-small
    python -m tools.export --ckpt ckpt.pt --export_format=saelens --out_dir=saes
    python -m tools.export --ckpt ckpt.pt --export_format=neuronpedia --out_dir=cayley-small

safetensors: model.safetensors and config.json. Read it back with
safetensors.torch.load_model(GPT(GPTConfig(**config["model_args"])), "model.safetensors").

hf: a folder that transformers' AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
loads where this repository isn't: weights, settings, tokenizer, the model card, and one modeling
file made of cayley.py, model.py and hf_model.py. Logits are the same bit for bit.

saelens: a SAELens SAE per layer and level. SAE.load_from_disk("saes/layer_3_level_1") is a TopK SAE
of the output of blocks.3.ln_2. The atoms are W_dec; the atoms over each feature's deviation are
W_enc. A layer's MLP reads the sum of its levels' reconstructions. Two things SAELens can't express:
it makes negative codes 0, and it has no gate. Level 0, and every level of a model without
per_parent_budget, is encoded as the model does otherwise; for a gated level SAELens takes the k
largest of all features. Printed and written to cfg.json, measured on windows of the val split: the
share of the model's active features that it still finds, and what the loss gains when the MLPs read
SAELens' codes. W_enc and W_dec are dense: a level of 32,768 features at d=1024 takes 268 MB.

neuronpedia: requests for https://www.neuronpedia.org/api/feature/upload-batch, one a file,
SOURCE/batch-0.json and so on, of at most 128 features each: density, tokens whose logits a feature
raises and lowers most (features.py says how), and the contexts of its largest codes. The sources
are 0-cayley-level-0, ...: a source set a level, a source a layer. A feature without activations is
refused there, and left out. Create model (its id is out_dir's last name) and source sets first.

All but neuronpedia need safetensors (pip install safetensors); none needs the other tool.
"""
if not __package__:
    raise SystemExit("from the repository's root: python -m tools.export")

import os

import numpy as np
import torch
import torch.nn as nn

from cayley import CayleySAE, Codes
from checkpoint import build_model, load_checkpoint
from configurator import configure
from data import atomic, get_tokenizer, write_json, write_text
from tools import features
from tools.evals import digest, mean_and_error, window_losses
from tools.hf_folder import MODELING, PADDING, TESTED, hf_configs, inlined_source, padding_id
from tools.model_card import model_card, read_corpus, read_run, without_paths
from tools.runs import new_directory, run_data_dir, run_windows

# settings, see configurator.py
ckpt = "out/ckpt.pt"  # or a directory with a ckpt.pt
export_format = "safetensors"  # or "hf", "saelens", "neuronpedia"
out_dir = "exported"  # a new directory
data_dir = ""  # "": that of the run
tokens = 1_000_000  # for neuronpedia, of the train split, at most
# for hf's card
license = "mit"  # of the weights, as the hub names it
language = ""  # codes as the hub names them, "en, de"; "": that of the corpus, if it is known
corpus = ""  # what the model read; "": by the data's meta.json

BATCH = 128  # features in a request: Neuronpedia takes no more
N_WINDOWS = 16  # of the val split, for what SAELens can't express


def run_directory():
    """The directory of the checkpoint, absolute."""
    return os.path.abspath(ckpt if os.path.isdir(ckpt) else os.path.dirname(ckpt))


def write_safetensors(path, tensors):
    """A dict of tensors as a safetensors file, atomically. Raises OSError naming path."""
    from safetensors.torch import save
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        with atomic(path, "wb") as file:
            file.write(save(tensors, metadata={"format": "pt"}))
    except OSError as error:
        raise OSError(f"{path} can't be written ({error.strerror})") from None


# -----------------------------------------------------------------------------
# safetensors

def untied(model):
    """Its state without lm_head.weight, which is wte.weight."""
    state = model.state_dict()
    del state["lm_head.weight"]
    return state


def export_safetensors(model, checkpoint, directory):
    """model.safetensors, without the tied lm_head.weight, and config.json."""
    write_safetensors(os.path.join(directory, "model.safetensors"), untied(model))
    write_json(os.path.join(directory, "config.json"), {
        "model_args": vars(model.config), "config": without_paths(checkpoint["config"]),
    })


# -----------------------------------------------------------------------------
# Hugging Face

def of_weights(scores, weights):
    """Scores of evals.json without those that are said to be of other weights (see digest)."""
    kept = {}
    for name, values in scores.items():
        if values.get("weights", weights) == weights:
            kept[name] = values
        else:
            print(f"evals.json has {name} of other weights than {ckpt}: it is left out of the card")
    return kept


def export_hf(model, checkpoint, directory):
    """A folder that transformers loads with trust_remote_code=True, and its card."""
    def path(name):
        return os.path.join(directory, name)

    config = checkpoint["config"]
    encoding = get_tokenizer(config["tokenizer"])
    tensors = {f"gpt.{name}": tensor for name, tensor in untied(model).items()}
    write_safetensors(path("model.safetensors"), tensors)
    write_text(path(f"{MODELING}.py"), inlined_source(["cayley", "model", "tools.hf_model"]))
    for name, value in hf_configs(model, encoding).items():
        write_json(path(name), value)
    run, rows, scores = read_run(run_directory())
    scores = of_weights(scores, digest(model))
    text, datasets, known_language = corpus, [], ""
    if not corpus:
        text, datasets, known_language = read_corpus(data_dir or run_data_dir(config))
    facts = {
        "corpus": text,
        "datasets": datasets,
        "license": license,
        "language": language or known_language,
        "padding": PADDING if padding_id(model, encoding) is not None else None,
        "tested": TESTED,
    }
    name = os.path.basename(os.path.abspath(out_dir))
    card = model_card(name, model, checkpoint, run, rows, scores, facts)
    write_text(path("README.md"), card)
    write_json(path("training.json"), without_paths({"config": config, **run}))


# -----------------------------------------------------------------------------
# SAELens

def check_expressible(model):
    """Raise ValueError unless SAELens SAEs can hold the model's."""
    if not model.saes():
        raise ValueError(f"{ckpt} is a dense twin: it has no SAE")
    standardize = model.config.score_standardize
    if standardize != model.config.forward_standardized:
        raise ValueError(
            f"{ckpt} selects by score_standardize={standardize} and forwards by "
            f"forward_standardized={not standardize}: a SAELens SAE forwards what it selects by"
        )


def ungated(sae):
    """The CayleySAE with sae's weights and no gate, in evaluation mode."""
    free = CayleySAE(sae.n_embd, sae.levels, False, sae.score_standardize, sae.forward_standardized)
    free.load_state_dict(sae.state_dict())
    return free.eval()


class SaelensCode(nn.Module):
    """Stands in for a CayleySAE: what the SAELens SAEs of its levels reconstruct together."""

    def __init__(self, sae):
        super().__init__()
        self.sae = ungated(sae)

    def forward(self, x):
        """x (..., d) -> (..., d)."""
        codes = [Codes(c.ids, c.values.relu()) for c in self.sae.encode(x)]
        return self.sae.decode(codes)


def spliced_losses(model, layers, windows):
    """evals.window_losses of windows (M, T + 1) with SaelensCode in some layers."""
    saes = model.saes()
    for layer in layers:
        model.blocks[layer].sae = SaelensCode(saes[layer])
    try:
        return window_losses(model, windows)
    finally:
        for layer in layers:
            model.blocks[layer].sae = saes[layer]


@torch.no_grad()
def gate_agreement(model, idx):
    """
    Share of the model's active features on idx (B, T) that are also active without the gate.

    A list for each layer, a share for each level.
    """
    with model.recording() as records:
        model(idx)
    shares = []
    for sae, (record,) in zip(model.saes(), records):
        of_layer = []
        for gated, free in zip(record.codes, ungated(sae).encode(record.x)):
            equal = gated.ids.unsqueeze(-1) == free.ids.unsqueeze(-2)  # (B, T, k, k)
            of_layer.append(equal.any(-1).float().mean().item())
        shares.append(of_layer)
    return shares


def measure_saelens(model, config):
    """
    Per layer a dict for its SAEs' metadata: what SAELens' codes share with the model's, and cost.

    Of some windows of the val split; None, and printed why, where there is none.
    """
    try:
        split = run_windows(config, "val", data_dir)
    except (ValueError, OSError) as error:
        print(f"the cost of what SAELens can't express is not measured: {error}")
        return None
    windows = split.shuffled(0, min(N_WINDOWS, len(split)), seed=0)
    shares = gate_agreement(model, torch.from_numpy(windows[:, :-1]))
    own = np.array(window_losses(model, windows))
    everywhere = range(len(model.saes()))
    added, error = mean_and_error(spliced_losses(model, everywhere, windows) - own)
    error = f" +- {error:.2g}" if error is not None else ""
    print(f"val loss {own.mean():.4f} on {windows[:, 1:].size:,} tokens; with SAELens' codes in "
          f"all layers {added:+.4f}{error}")
    measured = []
    for layer in everywhere:
        added_here, _ = mean_and_error(spliced_losses(model, [layer], windows) - own)
        shown = ", ".join(f"{share:.1%}" for share in shares[layer])
        print(f"layer {layer}: its active features that SAELens finds without the gate, by level: "
              f"{shown}; val loss with SAELens' codes here {added_here:+.4f}")
        measured.append({
            "active_features_in_common": shares[layer],
            "val_loss": float(own.mean()),
            "val_loss_added_by_this_layer": added_here,
            "val_loss_added_by_all_layers": added,
        })
    return measured


def saelens_tensors(sae, level):
    """The weights of a SAELens TopK SAE for one level of a CayleySAE."""
    where = sae.level_slices[level]
    atoms = sae.atoms(level, range(2 ** sae.levels[level].n))  # (2^n, d)
    scale, shift = sae.standardization()
    return {
        "W_enc": (atoms * scale[where, None]).T,
        "b_enc": sae.bias[where] + shift[where],
        "W_dec": atoms,
        "b_dec": torch.zeros(sae.n_embd),
    }


def saelens_config(sae, layer, level, measured):
    """cfg.json of a SAELens TopK SAE; measured: of measure_saelens, or None."""
    n, k, _ = sae.levels[level]
    gated = sae.block_bits[level] < n
    metadata = {
        "sae_lens_version": "6.0.0",
        "hook_name": f"blocks.{layer}.ln_2",
        "model_class_name": "GPT of model.py",
        "checkpoint": os.path.basename(run_directory()),
        "gate": "not expressed: the k largest of all features are taken" if gated else "none",
    }
    if measured:
        metadata.update(measured[layer])
        metadata["active_features_in_common"] = measured[layer]["active_features_in_common"][level]
    return {
        "architecture": "topk",
        "k": k,
        "d_in": sae.n_embd,
        "d_sae": 2**n,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": metadata,
    }


def export_saelens(model, checkpoint, directory):
    """A directory per layer and level."""
    check_expressible(model)
    measured = measure_saelens(model, checkpoint["config"])
    for layer, sae in enumerate(model.saes()):
        for level in range(len(sae.levels)):
            path = os.path.join(directory, f"layer_{layer}_level_{level}")
            os.makedirs(path)
            tensors = saelens_tensors(sae, level)
            write_safetensors(os.path.join(path, "sae_weights.safetensors"), tensors)
            write_json(os.path.join(path, "cfg.json"),
                       saelens_config(sae, layer, level, measured))


# -----------------------------------------------------------------------------
# Neuronpedia

def neuronpedia_feature(index, reader, active, windows, words, logit_ids, logit_values):
    """
    A feature with its contexts of largest codes, as upload-batch takes it.

    active: its tokens and its codes there, of reader.active().
    """
    logits = []
    for token, value in zip(logit_ids.tolist(), logit_values.tolist()):
        logits.append({"token": words[token], "value": round(value, 4)})
    activations = []
    for slot in range(features.n_top):
        if reader.contexts[index, slot] >= 0:
            window, _, start, end, shades, _ = features.context(reader, index, slot, *active)
            codes = [0.0] * (end - start)
            for token, code in zip(shades[::2], shades[1::2]):
                codes[token - start] = code
            tokens = [words[i] for i in windows[window, start:end]]
            activations.append({"tokens": tokens, "values": codes})
    half = len(logits) // 2
    return {
        "index": int(index),
        "density": int(reader.counts[index]) / windows.size,
        "topLogits": logits[:half],
        "bottomLogits": logits[:half - 1:-1],  # the most lowered first
        "activations": activations,
    }


def export_neuronpedia(model, checkpoint, directory):
    """A directory a source, with a request body for every BATCH features that were active."""
    if not model.saes():
        raise ValueError(f"{ckpt} is a dense twin: it has no features")
    config = checkpoint["config"]
    split = run_windows(config, "train", data_dir)
    n_windows = max(1, min(tokens // model.config.block_size, len(split)))
    windows = split.shuffled(0, n_windows, seed=0)[:, :-1]
    encoding = get_tokenizer(config["tokenizer"])
    words = [word.decode("utf-8", errors="replace") for word in features.token_words(encoding)]
    readers, slopes = features.read(model, windows, features.character_counts(encoding))
    every_token = torch.arange(len(words))
    left_out = 0
    for layer, of_layer in enumerate(readers):
        for level, reader in enumerate(of_layer):
            source = f"{layer}-cayley-level-{level}"
            os.makedirs(os.path.join(directory, source))
            active = np.flatnonzero(reader.counts)
            left_out += reader.size - len(active)
            tokens_and_codes = list(zip(*reader.active()))
            for first in range(0, len(active), BATCH):
                ids = active[first:first + BATCH]
                effects = features.first_order(
                    model, layer, level, ids, slopes[layer], every_token
                )
                logits = features.extremes(effects, every_token)
                batch = []
                for index, *of_feature in zip(ids, *logits):
                    batch.append(neuronpedia_feature(index, reader, tokens_and_codes[index],
                                                     windows, words, *of_feature))
                path = os.path.join(directory, source, f"batch-{first // BATCH}.json")
                name = os.path.basename(os.path.abspath(out_dir)).lower()
                body = {"modelId": name, "source": source, "features": batch}
                write_json(path, body)
    print(f"{left_out} features without an activation in {windows.size:,} tokens are left out")


# -----------------------------------------------------------------------------
# the script

EXPORTERS = {
    "safetensors": export_safetensors,
    "hf": export_hf,
    "saelens": export_saelens,
    "neuronpedia": export_neuronpedia,
}


def check_package():
    """Raise ValueError for a format whose package isn't installed."""
    if export_format == "neuronpedia":
        return
    try:
        import safetensors.torch  # noqa: F401
    except ImportError:
        raise ValueError(f"export_format={export_format!r} needs safetensors, which is not "
                         "installed: pip install safetensors") from None


def main():
    configure(globals(), choices={"export_format": tuple(EXPORTERS)}, at_least={"tokens": 1})
    check_package()
    with new_directory(out_dir) as directory:
        checkpoint = load_checkpoint(ckpt)
        model = build_model(checkpoint, ckpt).eval()
        EXPORTERS[export_format](model, checkpoint, directory)
    print(f"{out_dir} is written")


if __name__ == "__main__":
    main()
