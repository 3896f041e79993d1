"""
A checkpoint in other tools' formats, in a new directory.

    python export.py --ckpt ckpt.pt --export_format=safetensors --out_dir=exported
    python export.py --ckpt ckpt.pt --export_format=saelens --out_dir=saes

safetensors: model.safetensors and config.json. Read it back with
safetensors.torch.load_model(GPT(GPTConfig(**config["model_args"])), "model.safetensors").

saelens: a SAELens SAE per layer and level. SAE.load_from_disk("saes/layer_3_level_1") is a TopK SAE
of the output of blocks.3.ln_2. The atoms are W_dec; the atoms over each feature's deviation are
W_enc. A layer's MLP reads the sum of its levels' reconstructions. Two things SAELens can't express:
it makes negative codes 0, and it has no gate. Level 0, and every level of a model without
per_parent_budget, is encoded as the model does; for a gated level SAELens takes the k largest of
all features, and the share of the model's active features that it still finds is printed and
written to cfg.json. W_enc and W_dec are dense: a level of 32,768 features at d=1024 takes 268 MB.

All formats need safetensors (pip install safetensors).
"""
import os

import torch

from cayley import CayleySAE
from configurator import configure, run_main
from data import atomic, new_directory, run_windows, write_json
from model import load_model

# settings, see configurator.py
ckpt = "out/ckpt.pt"  # or a directory with a ckpt.pt
export_format = "safetensors"  # or "saelens"
out_dir = "exported"  # a new directory
data_dir = ""  # whose val split the gate's effect is measured on; "": that of the run

FORMATS = ("safetensors", "saelens")
N_WINDOWS = 8  # of the val split, for the gate's effect


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

def export_safetensors(model, config, directory):
    """model.safetensors, without the tied lm_head.weight, and config.json."""
    tensors = model.state_dict()
    del tensors["lm_head.weight"]
    write_safetensors(os.path.join(directory, "model.safetensors"), tensors)
    write_json(os.path.join(directory, "config.json"), {
        "model_args": vars(model.config), "config": config,
    })


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
        free = CayleySAE(
            sae.n_embd, sae.levels, False, sae.score_standardize, sae.forward_standardized
        ).eval()
        free.load_state_dict(sae.state_dict())
        of_layer = []
        for gated, ungated in zip(sae.encode(record.x), free.encode(record.x)):
            equal = gated.ids.unsqueeze(-1) == ungated.ids.unsqueeze(-2)  # (B, T, k, k)
            of_layer.append(equal.any(-1).float().mean().item())
        shares.append(of_layer)
    return shares


def measure_gate(model, config):
    """gate_agreement on some of the val split, or None, and why, where there is none."""
    try:
        windows = run_windows(config, "val", data_dir)
    except (ValueError, OSError) as error:
        print(f"the gate's effect is not measured: {error}")
        return None
    idx = windows.shuffled(0, min(N_WINDOWS, len(windows)), seed=0)[:, :-1]
    agreement = gate_agreement(model, torch.from_numpy(idx))
    for layer, shares in enumerate(agreement):
        shown = ", ".join(f"{share:.1%}" for share in shares)
        print(f"layer {layer}: active features that SAELens finds without the gate, "
              f"by level: {shown}")
    return agreement


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


def saelens_config(sae, layer, level, agreement):
    """cfg.json of a SAELens TopK SAE; agreement: of gate_agreement, None if not measured."""
    n, k, _ = sae.levels[level]
    gated = sae.block_bits[level] < n
    metadata = {
        "sae_lens_version": "6.0.0",
        "hook_name": f"blocks.{layer}.ln_2",
        "model_class_name": "GPT of model.py",
        "checkpoint": os.path.abspath(ckpt),
        "gate": "not expressed: the k largest of all features are taken" if gated else "none",
    }
    if gated and agreement:
        metadata["active_features_in_common"] = agreement[layer][level]
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


def export_saelens(model, config, directory):
    """A directory per layer and level."""
    check_expressible(model)
    agreement = measure_gate(model, config)
    for layer, sae in enumerate(model.saes()):
        for level in range(len(sae.levels)):
            path = os.path.join(directory, f"layer_{layer}_level_{level}")
            os.makedirs(path)
            tensors = saelens_tensors(sae, level)
            write_safetensors(os.path.join(path, "sae_weights.safetensors"), tensors)
            write_json(os.path.join(path, "cfg.json"),
                       saelens_config(sae, layer, level, agreement))


# -----------------------------------------------------------------------------
# the script

def check_settings():
    """Raise ValueError for a format that doesn't exist, or whose package isn't installed."""
    if export_format not in FORMATS:
        formats = ", ".join(FORMATS)
        raise ValueError(f"export_format={export_format!r}: must be one of {formats}")
    try:
        import safetensors.torch  # noqa: F401
    except ImportError:
        raise ValueError(f"export_format={export_format!r} needs safetensors, which is not "
                         "installed: pip install safetensors") from None


def main():
    configure(globals())
    check_settings()
    with new_directory(out_dir) as directory:
        model, config = load_model(ckpt)
        if export_format == "safetensors":
            export_safetensors(model, config, directory)
        else:
            export_saelens(model, config, directory)
    print(f"{out_dir} is written")


if __name__ == "__main__":
    run_main(main)
