"""
A checkpoint in other tools' formats.

    python export.py --ckpt ckpt.pt --format=safetensors --out=exported     # model.safetensors and config.json
    python export.py --ckpt ckpt.pt --format=saelens --out=saes             # a SAELens SAE per layer and level

safetensors: read it back with safetensors.torch.load_model(GPT(GPTConfig(**config["model_args"])), "model.safetensors").

saelens: SAE.load_from_disk("saes/layer_3_level_1") is a TopK SAE of the output of blocks.3.ln_2. The atoms are W_dec; the
atoms over each feature's deviation are W_enc. A layer's MLP reads the sum of its levels' reconstructions. Two things
SAELens can't express: it makes negative codes 0, and it has no gate. Level 0, and every level of a model without
per_parent_budget, is encoded as the model does; for a gated level SAELens takes the k largest of all features, and the
share of the model's active features that it still finds is printed and written to cfg.json. W_enc and W_dec are dense: a
level of 32,768 features at d=1024 takes 268 MB.
"""
import os

import torch
from safetensors.torch import save_file, save_model

from cayley import CayleySAE
from configurator import configure, run_main
from model import load_model
from prepare_fineweb import new_directory, run_windows, write_json

# settings, see configurator.py
ckpt = "out/ckpt.pt"
format = "safetensors"  # or "saelens"
out = "exported"  # a new directory
data = ""  # whose val split the gate's effect is measured on; "": that of the run

FORMATS = ("safetensors", "saelens")


@torch.no_grad()
def sae_inputs(model, idx):
    """What each layer's CayleySAE reads: idx (B, T) -> a list of (B, T, d)."""
    inputs = []
    hooks = [sae.register_forward_pre_hook(lambda module, args: inputs.append(args[0])) for sae in model.saes()]
    model(idx)
    for hook in hooks:
        hook.remove()
    return inputs


@torch.no_grad()
def gate_agreement(model, idx):
    """Per layer and level the share of active features that are also active without the gate, on idx (B, T)."""
    shares = []
    for sae, x in zip(model.saes(), sae_inputs(model, idx)):
        free = CayleySAE(sae.n_embd, sae.levels, False, sae.score_standardize, sae.forward_standardized).eval()
        free.load_state_dict(sae.state_dict())
        shares.append([(gated.ids.unsqueeze(-1) == ungated.ids.unsqueeze(-2)).any(-1).float().mean().item()
                       for gated, ungated in zip(sae.encode(x), free.encode(x))])
    return shares


def check_expressible(model):
    """Raise ValueError unless SAELens SAEs can hold the model's."""
    if not model.saes():
        raise ValueError(f"{ckpt} is a dense twin: it has no SAE")
    if model.config.score_standardize != model.config.forward_standardized:
        raise ValueError(f"{ckpt} selects by score_standardize={model.config.score_standardize} and forwards by "
                         f"forward_standardized={model.config.forward_standardized}: a SAELens SAE forwards what it selects by")


def saelens_tensors(sae, level):
    """The weights of a SAELens TopK SAE for one level of a CayleySAE."""
    where, atoms = sae.level_slices[level], sae.atoms(level, range(2 ** sae.levels[level].n))  # (F, d)
    scale, shift = (vector[where] for vector in sae.standardization())
    return {"W_enc": (atoms * scale[:, None]).T.contiguous(), "b_enc": (sae.bias[where] + shift).detach().contiguous(),
            "W_dec": atoms.contiguous(), "b_dec": torch.zeros(sae.n_embd)}


def export_saelens(model, directory, agreement):
    """A directory per layer and level; agreement: of gate_agreement, or None where it wasn't measured."""
    for layer, sae in enumerate(model.saes()):
        for level, (n, k, _) in enumerate(sae.levels):
            path = os.path.join(directory, f"layer_{layer}_level_{level}")
            os.makedirs(path)
            save_file(saelens_tensors(sae, level), os.path.join(path, "sae_weights.safetensors"))
            gated = sae.plan[3 * level + 2] < n
            metadata = {"sae_lens_version": "6.0.0", "hook_name": f"blocks.{layer}.ln_2", "model_class_name": "GPT of model.py",
                        "checkpoint": os.path.abspath(ckpt),
                        "gate": "not expressed: the k largest of all features are taken" if gated else "none"}
            if gated and agreement:
                metadata["active_features_in_common"] = agreement[layer][level]
            write_json(os.path.join(path, "cfg.json"), {
                "architecture": "topk", "k": k, "d_in": sae.n_embd, "d_sae": 2**n, "dtype": "float32", "device": "cpu",
                "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
                "rescale_acts_by_decoder_norm": False, "metadata": metadata})
        if agreement:
            print(f"layer {layer}: active features that SAELens finds without the gate, by level: "
                  + ", ".join(f"{share:.1%}" for share in agreement[layer]))


def main():
    configure(globals())
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: must be one of {', '.join(FORMATS)}")
    with new_directory(out) as directory:
        model, config = load_model(ckpt)
        if format == "safetensors":
            save_model(model, os.path.join(directory, "model.safetensors"))
            write_json(os.path.join(directory, "config.json"), {"model_args": vars(model.config), "config": config})
        else:
            check_expressible(model)
            try:
                windows = run_windows(config, "val", data)
                agreement = gate_agreement(model, torch.from_numpy(windows.shuffled(0, min(8, len(windows)), seed=0)[:, :-1]))
            except (ValueError, OSError) as error:
                agreement = None
                print(f"the gate's effect is not measured: {error}")
            export_saelens(model, directory, agreement)
    print(f"{out} is written")


if __name__ == "__main__":
    run_main(main)
