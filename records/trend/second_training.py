"""
What a built-in code gains by the second training that finetuned SAEs had: all its weights and
biases, to the least KL(dense || code), on the same windows in the same steps.

    PYTHONPATH=. python records/trend/second_training.py DENSE CODE DATA_DIR TOKENS RATE
"""
import sys

import torch

from checkpoint import load_model
from tools.evals import mean_and_error
from tools.runs import run_windows
from tools.splice import finetuning_steps, kl_losses, losses

dense_path, code_path, data_dir, n_tokens, rate = sys.argv[1:]
dense, config = load_model(dense_path)
code, _ = load_model(code_path)  # both in eval: the code's statistics stay
dense.requires_grad_(False)
train = run_windows(config, "train", data_dir)
val = run_windows(config, "val", data_dir).shuffled(0, 192, seed=0)
base = losses(dense, val, {}, dense, 16)


def forward(idx):
    return code(idx, n_logits=0)[0].float()


def report(when):
    scores = losses(code, val, {}, dense, 16)
    above, error = mean_and_error((scores - base)[:, 0].numpy())
    print(f"{when}: above dense {above:.4f} ({error:.4f}), KL {scores[:, 1].mean():.4f}")


report("before")
_, n_steps = finetuning_steps(train, int(n_tokens))
optimizer = torch.optim.Adam(code.parameters(), lr=float(rate))
decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, n_steps)
for loss in kl_losses(dense, forward, train, int(n_tokens), seed=0):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    decay.step()
report(f"after {n_tokens} tokens at {rate}")
