"""
A checkpoint of one layer of the published recipe with random weights, to measure features.py with.

    python records/features_site/one_layer.py DATA_DIR OUT_DIR

Its statistics are those of 100 windows of the data, so that its features are about as often active
as a trained model's.
"""
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from data import Windows, atomic  # noqa: E402  the path comes first
from model import GPT, GPTConfig  # noqa: E402


def main(data_dir, out_dir):
    torch.manual_seed(0)
    config = GPTConfig(n_layer=1)
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


main(*sys.argv[1:])
