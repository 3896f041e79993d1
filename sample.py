"""
Samples text from a checkpoint of train.py.

    python sample.py --ckpt out/demo/ckpt.pt
    python sample.py --ckpt out/demo/ckpt.pt --start "def main(" --num_samples 3 --temperature 0.8
    python sample.py --ckpt out/demo/ckpt.pt --start FILE:prompt.txt
    python sample.py --ckpt out/demo/ckpt.pt --steer 2.1.517=+8 --ablate 0.0.3 --compare

--steer layer.level.feature=+8 adds 8 to a feature's code at every token (=-8 subtracts, =8 sets
it), --ablate sets it to 0; both can be given more than once. The MLP's input changes by exactly the
feature's atom times the change.
"""
import codecs
import re

from configurator import configure  # before torch, for GOMP_SPINCOUNT

# isort: split
import torch

from cayley import Edit
from checkpoint import load_model, pick_device
from data import encode, get_tokenizer, read_text

# settings, see configurator.py
ckpt = "out/ckpt.pt"  # or a directory with a ckpt.pt
start = ""  # prompt, or FILE:path; end of text (a new document) comes before it
num_samples = 3
max_new_tokens = 300
temperature = 0.8  # 0: always the most likely token
top_k = 200  # sample among this many; 0: among all
seed = 1337
device = "auto"  # CUDA where there is one
steer = []  # layer.level.feature=+8
ablate = []  # layer.level.feature
compare = False  # show the text without steer and ablate first
use_cache = True  # keys and values of earlier tokens; the text is the same without


def parse_edit(text, saes):
    """
    "layer.level.feature", to steer with "=+8", "=-8" or "=8" behind -> layer, Edit of its codes.

    Raises ValueError naming a text of another form, or what the model does not have.
    """
    match = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)(?:=([+-]?)(\w.*|\..*))?", text)
    try:
        *path, sign, number = match.groups()
        add = float(sign + number) if number else 0.0
    except (AttributeError, ValueError):  # no match; no number
        raise ValueError(f"{text!r}: write layer.level.feature=+8 to steer and layer.level.feature "
                         "to ablate") from None
    layer, level, feature = map(int, path)
    if not saes:
        raise ValueError(f"{text!r}: the model is a dense twin, it has no features")
    if layer >= len(saes):
        raise ValueError(f"{text!r}: the model has {len(saes)} layers with features, counted from "
                         "0")
    n_levels = len(saes[layer].levels)
    if level >= n_levels:
        raise ValueError(f"{text!r}: the model has {n_levels} levels with features, counted from 0")
    n_features = 2 ** saes[layer].levels[level].n
    if feature >= n_features:
        raise ValueError(f"{text!r}: level {level} has {n_features} features, counted from 0")
    keep = 1 if sign else 0
    if not abs(add) <= 1e6:  # codes are of order 1; far beyond the MLP overflows
        raise ValueError(f"{text!r}: a code can be changed by a number of at most 1,000,000")
    return layer, Edit(level, feature, keep, add)


def sample(model, encoding, prompt, ids):
    """Print num_samples texts that continue ids."""
    target = model.wte.weight.device
    generator = torch.Generator(target).manual_seed(seed)
    idx = torch.tensor([ids], device=target)
    for _ in range(num_samples):
        print(prompt, end="", flush=True)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end inside
        tokens = model.stream(idx, max_new_tokens, temperature, top_k or None, use_cache,
                              encoding.n_vocab, generator)
        for token in tokens:
            text = decoder.decode(encoding.decode_single_token_bytes(token.item()))
            print(text, end="", flush=True)
        print(decoder.decode(b"", final=True) + "\n" + "-" * 80)


def main():
    configure(
        globals(),
        at_least=dict(temperature=0, top_k=0, max_new_tokens=0, num_samples=1, seed=0),
        at_most=dict(temperature=1000),
        below=dict(seed=2**63),
    )
    if 0 < temperature < 1e-3:  # a softmax of such logits has no meaning
        raise ValueError(f"temperature={temperature}: must be 0, or from 0.001 to 1000")
    if compare and not steer + ablate:
        raise ValueError("--compare shows the text without and with --steer or --ablate: give one")
    if any("=" not in text for text in steer) or any("=" in text for text in ablate):
        raise ValueError("--steer takes layer.level.feature=+8 and --ablate layer.level.feature, "
                         f"not {steer + ablate}")
    target = pick_device(device)
    prompt = read_text(start[5:]) if start.startswith("FILE:") else start
    model, config = load_model(ckpt, target)
    encoding = get_tokenizer(config["tokenizer"])
    ids = [encoding.eot_token] + encode(encoding, prompt)
    block_size = model.config.block_size
    if len(ids) > block_size:
        raise ValueError(f"the prompt has {len(ids)} tokens with end of text, more than "
                         f"block_size={block_size}")
    edits = [parse_edit(text, model.saes()) for text in steer + ablate]
    if not edits:
        sample(model, encoding, prompt, ids)
        return
    if compare:
        print("=== as trained")
        sample(model, encoding, prompt, ids)
    for layer, edit in edits:
        model.saes()[layer].edits.append(edit)
    print("=== steered")
    sample(model, encoding, prompt, ids)


if __name__ == "__main__":
    main()
