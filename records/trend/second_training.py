"""
What a built-in code gains by the second training that finetuned SAEs had: all its weights and
biases, to the least KL(dense || code), on the same windows in the same steps.

    PYTHONPATH=. python records/trend/second_training.py DENSE CODE DATA_DIR TOKENS RATE
"""
import sys

import torch

from checkpoint import load_model
from data import progress
from tools.evals import mean_and_error
from tools.runs import run_windows
from tools.splice import kl_divergence, losses

dense_path, code_path, data_dir, n_tokens, rate = sys.argv[1:]
dense, config = load_model(dense_path)
code, _ = load_model(code_path)  # both in eval: the code's statistics stay
dense.requires_grad_(False)
train = run_windows(config, "train", data_dir)
val = run_windows(config, "val", data_dir).shuffled(0, 192, seed=0)
n_rows = 1024 // train.block_size
n_steps = int(n_tokens) // 1024
optimizer = torch.optim.Adam(code.parameters(), lr=float(rate))
decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, n_steps)

base = losses(dense, val, {}, dense, 16)


def report(when):
    scores = losses(code, val, {}, dense, 16)
    above, error = mean_and_error((scores - base)[:, 0].numpy())
    print(f"{when}: above dense {above:.4f} ({error:.4f}), KL {scores[:, 1].mean():.4f}")


report("before")
for step in progress(range(n_steps), desc="KL"):
    rows = train.shuffled(step * n_rows, n_rows, seed=2)[:, :-1]
    idx = torch.from_numpy(rows)
    with torch.no_grad():
        before = dense(idx, n_logits=0)[0].float()
    optimizer.zero_grad()
    kl_divergence(before, code(idx, n_logits=0)[0].float()).mean().backward()
    optimizer.step()
    decay.step()
report(f"after {n_tokens} tokens at {rate}")
