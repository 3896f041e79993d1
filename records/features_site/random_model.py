"""
A checkpoint with random weights, to measure features.py with: one layer of the published recipe, or
other settings of GPTConfig.

    python records/features_site/random_model.py --data_dir=data/gpt2 --out_dir=out/one_layer
    python records/features_site/random_model.py --data_dir=data/gpt2 --out_dir=out/twelve_layers \
        --n_layer=12 --n_embd=256 --n_head=4 --cayley_levels="8,16,0;15,32,256"

Its statistics are those of 100 windows of the data, so that its features are about as often active
as a trained model's.
"""
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from configurator import configure  # noqa: E402  the path comes first
from data import Windows, atomic  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

data_dir = "data/gpt2"
out_dir = "out/one_layer"
n_layer = 1
n_embd = 1024
n_head = 8
cayley_levels = "10,16,0;15,32,256"


def main():
    configure(globals())
    torch.manual_seed(0)
    config = GPTConfig(
        n_layer=n_layer, n_embd=n_embd, n_head=n_head, cayley_levels=cayley_levels
    )
    model = GPT(config).train()
    windows = Windows(data_dir, "train", config.block_size)
    with torch.no_grad():
        for number in range(100):
            model(torch.from_numpy(windows.shuffled(number, 1, seed=1)[:, :256]))
            for sae in model.saes():
                sae.update_stats()
    checkpoint = {
        "model": model.state_dict(),
        "model_args": vars(config),
        "config": {"tokenizer": "gpt2", "data_dir": data_dir, "block_size": config.block_size},
    }
    os.makedirs(out_dir, exist_ok=True)
    with atomic(os.path.join(out_dir, "ckpt.pt"), "wb") as file:
        torch.save(checkpoint, file)


main()
