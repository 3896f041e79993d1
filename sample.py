"""
Samples text from a checkpoint of train.py.

    python sample.py --ckpt out/demo/ckpt.pt
    python sample.py --ckpt out/demo/ckpt.pt --start "def main(" --num_samples 3 --temperature 0.8
    python sample.py --ckpt out/demo/ckpt.pt --start FILE:prompt.txt
    python sample.py --ckpt out/demo/ckpt.pt --steer 2.1.517=+8 --ablate 0.0.3 --compare

--steer layer.level.feature=+8 adds 8 to a feature's code at every token (=-8 subtracts, =8 sets it), --ablate sets it
to 0; both can be given more than once. The MLP's input changes by exactly the feature's atom times the change.
"""
import codecs
import re

import torch

from configurator import configure, run_main
from model import load_model, pick_device
from prepare_fineweb import get_tokenizer

# settings, see configurator.py
ckpt = "out/ckpt.pt"
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
    """"layer.level.feature", with "=+8", "=-8" or "=8" behind to steer -> layer and the edit for CayleySAE.edits."""
    match = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)(?:=([+-]?)(\d+(?:\.\d*)?))?", text)
    if not match:
        raise ValueError(f"{text!r}: write layer.level.feature=+8 to steer and layer.level.feature to ablate")
    layer, level, feature = map(int, match.groups()[:3])
    for name, value, count in (("layer", layer, len(saes)), ("level", level, len(saes[0].levels) if saes else 0)):
        if value >= count:
            raise ValueError(f"{text!r}: the model has {count} {name}s with features, counted from 0")
    if feature >= 2 ** saes[layer].levels[level].n:
        raise ValueError(f"{text!r}: level {level} has {2 ** saes[layer].levels[level].n} features, counted from 0")
    sign, number = match.groups()[3:]
    return layer, (level, feature, 1 if sign else 0, float(sign + number) if number else 0.0)


def main():
    configure(globals())
    if temperature < 0 or top_k < 0 or num_samples < 1 or max_new_tokens < 0:
        raise ValueError(f"temperature={temperature}, top_k={top_k}, max_new_tokens={max_new_tokens} must not be negative, "
                         f"and num_samples={num_samples} must be at least 1")
    target = pick_device(device)
    prompt = start
    if start.startswith("FILE:"):
        with open(start[5:], encoding="utf-8") as file:
            prompt = file.read()
    model, config = load_model(ckpt, target)
    encoding = get_tokenizer(config["tokenizer"])
    ids = [encoding.eot_token] + encoding.encode_ordinary(prompt)
    if len(ids) > model.config.block_size:
        raise ValueError(f"the prompt has {len(ids)} tokens with end of text, more than block_size={model.config.block_size}")
    edits = [parse_edit(text, model.saes()) for text in steer + ablate]
    if any("=" not in text for text in steer) or any("=" in text for text in ablate):
        raise ValueError(f"--steer takes layer.level.feature=+8 and --ablate layer.level.feature, not {steer + ablate}")
    for steered in (False, True) if edits and compare else (bool(edits),):
        if edits:
            print(f"=== {'steered' if steered else 'as trained'}")
        for layer, sae in enumerate(model.saes()):
            sae.edits = [edit for where, edit in edits if steered and where == layer]
        sample(model, encoding, prompt, ids)


def sample(model, encoding, prompt, ids):
    """Print num_samples texts that continue ids."""
    target = model.wte.weight.device
    generator = torch.Generator(target).manual_seed(seed)
    for _ in range(num_samples):
        print(prompt, end="", flush=True)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end inside a character
        for token in model.stream(torch.tensor([ids], device=target), max_new_tokens, temperature, top_k or None,
                                  use_cache, encoding.n_vocab, generator):
            print(decoder.decode(encoding.decode_single_token_bytes(token.item())), end="", flush=True)
        print(decoder.decode(b"", final=True) + "\n" + "-" * 80)


if __name__ == "__main__":
    run_main(main)
