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
import ast
import hashlib
import math
import os

import torch

from cayley import CayleySAE
from configurator import configure, run_main
from data import (
    atomic,
    get_tokenizer,
    new_directory,
    read_text,
    run_windows,
    write_json,
    write_text,
)
from model import build_model, load_checkpoint
from model_card import model_card, read_run

# settings, see configurator.py
ckpt = "out/ckpt.pt"  # or a directory with a ckpt.pt
export_format = "safetensors"  # or "saelens"
out_dir = "exported"  # a new directory
data_dir = ""  # whose val split the gate's effect is measured on; "": that of the run

END_OF_TEXT = "<|endoftext|>"
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

def untied(model):
    """Its state without lm_head.weight, which is wte.weight."""
    state = model.state_dict()
    del state["lm_head.weight"]
    return state


def export_safetensors(model, checkpoint, directory):
    """model.safetensors, without the tied lm_head.weight, and config.json."""
    write_safetensors(os.path.join(directory, "model.safetensors"), untied(model))
    write_json(os.path.join(directory, "config.json"), {
        "model_args": vars(model.config), "config": checkpoint["config"],
    })


# -----------------------------------------------------------------------------
# Hugging Face

MODELING = "modeling_cayley_gpt"


def inlined_source(names):
    """
    Sources of this directory, such as "model.py", one after the other as one that imports no file
    of this directory.

    An import of a file that is not among them raises ImportError there. PyTorch knows operators by
    name in a whole process, so theirs get a number of this source: versions don't mix.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    files = {file.removesuffix(".py") for file in os.listdir(here) if file.endswith(".py")}
    parts = []
    for name in names:
        source = read_text(os.path.join(here, name))
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                modules = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules = {node.module}
            else:
                continue
            if modules & files:
                inlined = {f"{module}.py" for module in modules} <= set(names)
                indent = " " * node.col_offset
                line = "" if inlined else f"{indent}raise ImportError('is not in this file')"
                lines[node.lineno - 1:node.end_lineno] = [line] + [""] * (
                    node.end_lineno - node.lineno)
        parts.append("\n".join(lines))
    source = "\n\n\n".join(parts) + "\n"
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    return source.replace('custom_op("cayley::', f'custom_op("cayley_{digest}::')


def byte_characters():
    """The character that byte-level tokenizers write for each byte, as GPT-2 chose them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    return characters


def merged_pair(token, ranks):
    """The two tokens (bytes) that byte-pair encoding merges last into a token of ranks."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
        first = pairs.index(min(pairs))
        parts[first:first + 2] = [parts[first] + parts[first + 1]]
    return parts


def tokenizer_json(encoding):
    """tokenizer.json, for the tokenizers library, of a tiktoken Encoding: "gpt2" or "bytes"."""
    characters = byte_characters()

    def written(token):
        return "".join(characters[byte] for byte in token)

    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = [merged_pair(token, ranks) for token in tokens if len(token) > 1]
    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    words["use_regex"] = encoding.name == "gpt2"  # bytes are not divided into words
    end_of_text = {"id": encoding.eot_token, "content": END_OF_TEXT, "special": True}
    for flag in ("single_word", "lstrip", "rstrip", "normalized"):
        end_of_text[flag] = False
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end_of_text],
        "normalizer": None,
        "pre_tokenizer": words,
        "post_processor": None,
        "decoder": words,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {written(token): rank for token, rank in ranks.items()},
            "merges": [" ".join(map(written, pair)) for pair in merges],
        },
    }


def hf_configs(model, encoding):
    """What the folder's .json files hold, {name: value}, tokenizer.json aside."""
    end = encoding.eot_token
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    padding_ids = list(range(encoding.n_vocab, model.config.vocab_size))
    return {
        "config.json": {
            "architectures": ["CayleyGPTForCausalLM"],
            "auto_map": {
                "AutoConfig": f"{MODELING}.CayleyGPTConfig",
                "AutoModelForCausalLM": f"{MODELING}.CayleyGPTForCausalLM",
            },
            "model_type": "cayley_gpt",
            "dtype": "float32",
            "tie_word_embeddings": True,
            **vars(model.config),
            **special,
        },
        "generation_config.json": {
            **special,
            "suppress_tokens": padding_ids or None,  # of the vocabulary: never sampled
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "padding_side": "left",
            "model_max_length": model.config.block_size,
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
        },
    }


def export_hf(model, checkpoint, directory):
    """A folder that transformers loads with trust_remote_code=True, and its card."""
    def path(name):
        return os.path.join(directory, name)

    config = checkpoint["config"]
    encoding = get_tokenizer(config["tokenizer"])
    tensors = {f"gpt.{name}": tensor for name, tensor in untied(model).items()}
    write_safetensors(path("model.safetensors"), tensors)
    write_text(path(f"{MODELING}.py"), inlined_source(["cayley.py", "model.py", "hf_model.py"]))
    for name, value in hf_configs(model, encoding).items():
        write_json(path(name), value)
    write_json(path("tokenizer.json"), tokenizer_json(encoding))
    run, rows, scores = read_run(ckpt if os.path.isdir(ckpt) else os.path.dirname(ckpt))
    name = os.path.basename(os.path.abspath(out_dir))
    card = model_card(name, model, checkpoint, run, rows, scores)
    write_text(path("README.md"), card)
    write_json(path("training.json"), {"config": config, **run})


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


def export_saelens(model, checkpoint, directory):
    """A directory per layer and level."""
    check_expressible(model)
    agreement = measure_gate(model, checkpoint["config"])
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

EXPORTERS = {
    "safetensors": export_safetensors,
    "hf": export_hf,
    "saelens": export_saelens,
}


def check_settings():
    """Raise ValueError for a format that doesn't exist, or whose package isn't installed."""
    if export_format not in EXPORTERS:
        formats = ", ".join(EXPORTERS)
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
        checkpoint = load_checkpoint(ckpt)
        model = build_model(checkpoint, ckpt).eval()
        EXPORTERS[export_format](model, checkpoint, directory)
    print(f"{out_dir} is written")


if __name__ == "__main__":
    run_main(main)
