"""
Scores a checkpoint: val loss, perplexity, HellaSwag, LAMBADA, and the state of its sparse codes.

    python evals.py --ckpt out/demo/ckpt.pt                           # val loss and codes, from the run's data_dir
    python evals.py --ckpt ckpt.pt --ppl=text.txt --hellaswag=hub --lambada=hub
    python evals.py --ckpt ckpt.pt --hellaswag=val.jsonl --lambada=test.jsonl --vs=other.pt

Prints the scores and writes them to evals.json beside the checkpoint; train.py --final_evals does so at its end.
Conventions: losses are nats per token, with the standard error over windows; bits per byte count no byte for end of text;
HellaSwag takes the ending of the largest log-probability per character, as lm-evaluation-harness' acc_norm; LAMBADA asks
for every token of the last word to be the most likely one. A feature is rare below one activation in 10,000 tokens;
explained is about the mean at the best scale. loss_dense and loss_zero are the val losses when one layer's MLP reads its
dense input, or zero, instead of its code, in the same weights; loss_recovered = (loss_zero - loss) / (loss_zero -
loss_dense), SAELens' ce_loss_score. It can be above 1: the MLP was trained on codes, not on the dense input.
"""
import json
import math
import os
import re

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from tqdm import tqdm

from configurator import configure, run_main
from model import code_statistics, explained, load_model, pick_device
from prepare_fineweb import get_tokenizer, run_windows, write_json

# settings, see configurator.py
ckpt = "out/ckpt.pt"
vs = ""  # another checkpoint, compared on the same windows
data_dir = ""  # of the val split; "": that of the run
n_windows = 256  # of the val split
batch_size = 8
ppl = ""  # a text file
hellaswag = ""  # a .jsonl file with ctx, endings, label; or "hub"
lambada = ""  # a .jsonl file with text; or "hub"
limit = 0  # items of HellaSwag and LAMBADA; 0: all
device = "auto"

BINS = [0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1]  # of the activation-frequency histogram; the first bin has the dead features


def mean_and_error(values):
    """Mean and its standard error of independent values, a sequence of numbers."""
    values = np.asarray(values, dtype=np.float64)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


# -----------------------------------------------------------------------------
# losses

@torch.no_grad()
def window_losses(model, windows):
    """Mean loss of each window: windows (M, T + 1) int64, numpy -> list of M."""
    losses = []
    for rows in torch.from_numpy(windows).to(model.wte.weight.device).split(batch_size):
        logits, _ = model(rows[:, :-1], rows[:, 1:])
        losses += F.cross_entropy(logits.float().transpose(1, 2), rows[:, 1:], reduction="none").mean(1).tolist()
    return losses


def loss_scores(losses, windows, encoding):
    """loss, its standard error, perplexity and bits per byte, by the window_losses of windows."""
    loss, error = mean_and_error(losses)
    lengths = np.array([len(encoding.decode_single_token_bytes(i)) if i != encoding.eot_token else 0
                        for i in range(encoding.n_vocab)])
    n_bytes = lengths[windows[:, 1:]].sum()
    return {"loss": loss, "standard_error": error, "perplexity": math.exp(loss),
            "bits_per_byte": loss * windows[:, 1:].size / n_bytes / math.log(2)}


def text_windows(path, encoding, block_size):
    """A text file as windows (M, T + 1), each starting where the one before ended; T <= block_size."""
    with open(path, encoding="utf-8") as file:
        ids = np.array([encoding.eot_token] + encoding.encode_ordinary(file.read()))
    size = min(block_size, len(ids) - 1)
    if size < 1:
        raise ValueError(f"{path}: there is no text in it")
    return np.stack([ids[i:i + size + 1] for i in range(0, len(ids) - size, size)])


# -----------------------------------------------------------------------------
# HellaSwag and LAMBADA

@torch.no_grad()
def continuation_scores(model, pairs):
    """
    Log-probability of continuations, and whether each of their tokens is the most likely one.

    pairs: (context ids, continuation ids); contexts lose their start where both don't fit in block_size.
    """
    scores = [None] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))  # like lengths together
    for first in tqdm(range(0, len(order), batch_size), unit="batch", leave=False):
        chosen = order[first:first + batch_size]
        rows = [(pairs[i][0] + pairs[i][1])[-model.config.block_size - 1:] for i in chosen]
        width = max(map(len, rows))
        idx = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.wte.weight.device)
        log_probs = model(idx[:, :-1], idx[:, 1:])[0].float().log_softmax(-1)  # (B, T, V)
        for i, row, lp in zip(chosen, rows, log_probs):
            n = len(pairs[i][1])
            lp, target = lp[len(row) - 1 - n:len(row) - 1], torch.tensor(pairs[i][1], device=lp.device)
            scores[i] = lp.gather(1, target[:, None]).sum().item(), bool((lp.argmax(-1) == target).all())
    return scores


def json_rows(path, dataset, split, fields):
    """Rows (dicts) of a .jsonl file, or of a data set of the hub, with certain fields. Raises ValueError naming what fails."""
    if path == "hub":
        from datasets import load_dataset
        rows = load_dataset(*dataset, split=split)
    else:
        try:
            with open(path, encoding="utf-8") as file:
                rows = [json.loads(line) for line in file]
        except ValueError as error:
            raise ValueError(f"{path}: not a .jsonl file ({error})") from None
    if not len(rows) or any(field not in rows[0] for field in fields):
        raise ValueError(f"{path}: its rows need the fields {', '.join(fields)}")
    return rows if not limit else [rows[i] for i in range(min(limit, len(rows)))]


def hellaswag_text(row):
    """Context and endings of a row, without WikiHow's bracketed artefacts, as lm-evaluation-harness prepares them."""
    context = row["ctx"]
    if "activity_label" in row:
        start = f"{row['ctx_a']} {row['ctx_b'].capitalize()}" if "ctx_b" in row else context
        context = f"{row['activity_label']}: {start}"
    return [re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ") for text in (context, *row["endings"])]


def hellaswag_scores(model, encoding, rows):
    pairs, lengths = [], []
    for row in rows:
        context, *endings = hellaswag_text(row)
        for ending in endings:
            pairs.append(([encoding.eot_token] + encoding.encode_ordinary(context), encoding.encode_ordinary(" " + ending)))
            lengths.append(len(ending))
    log_probs = np.array([score for score, _ in continuation_scores(model, pairs)]).reshape(-1, 4)
    correct = (log_probs / np.array(lengths).reshape(-1, 4)).argmax(1) == [int(row["label"]) for row in rows]
    accuracy, error = mean_and_error(correct)
    return {"accuracy": accuracy, "standard_error": error, "items": len(rows), "chance": 0.25}


def lambada_scores(model, encoding, rows):
    pairs = []
    for row in rows:
        context, _, word = row["text"].rstrip().rpartition(" ")
        pairs.append(([encoding.eot_token] + encoding.encode_ordinary(context), encoding.encode_ordinary(" " + word)))
    scores = continuation_scores(model, pairs)
    accuracy, error = mean_and_error([greedy for _, greedy in scores])
    return {"accuracy": accuracy, "standard_error": error, "items": len(rows),
            "perplexity": math.exp(-np.mean([score for score, _ in scores]))}


# -----------------------------------------------------------------------------
# codes

class Replaced(nn.Module):
    """Stands in for a layer's CayleySAE: scale 1 hands on the dense input, 0 nothing."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return self.scale * x


@torch.no_grad()
def code_scores(model, windows):
    """Per layer: explained, loss_dense, loss_zero, loss_recovered, and per level the numbers of the module's docstring."""
    saes, layers = model.saes(), []
    parts = torch.from_numpy(windows[:, :-1]).to(model.wte.weight.device).split(batch_size)
    statistics = sum(code_statistics(model, part) for part in parts)  # (layers, 3 + levels)
    counts = [[torch.zeros(2**level.n, dtype=torch.int64) for level in sae.levels] for sae in saes]
    norms = torch.zeros(len(saes), len(saes[0].levels), dtype=torch.float64)
    for part in parts:
        for layer, codes in enumerate(model.run_with_codes(part, n_logits=1)[1]):
            for level, code in enumerate(codes):
                counts[layer][level] += code.ids.cpu().flatten().bincount(minlength=2 ** saes[layer].levels[level].n)
                alone = [c if i == level else type(c)(c.ids, torch.zeros_like(c.values)) for i, c in enumerate(codes)]
                norms[layer, level] += saes[layer].decode(alone).norm(dim=-1).double().mean().cpu() / len(parts)
    loss = mean_and_error(window_losses(model, windows))[0]
    for i, sae in enumerate(saes):
        losses = {}
        for name, scale in (("loss_dense", 1.0), ("loss_zero", 0.0)):
            model.blocks[i].sae = Replaced(scale)
            losses[name] = mean_and_error(window_losses(model, windows))[0]
        model.blocks[i].sae = sae
        gain = losses["loss_zero"] - losses["loss_dense"]
        losses["loss_recovered"] = (losses["loss_zero"] - loss) / gain if gain else math.nan
        levels = []
        for level, count in enumerate(counts[i]):
            frequency = count.numpy() / (windows.shape[0] * (windows.shape[1] - 1))
            histogram = [int((count == 0).sum())] + np.histogram(frequency[frequency > 0], BINS)[0].tolist()
            levels.append({"active": (statistics[i, 3 + level] / len(parts)).item(), "dead": histogram[0],
                           "rare": int((frequency < 1e-4).sum()), "frequency_histogram": histogram,
                           "norm_share": (norms[i, level] / norms[i].sum()).item()})
        layers.append({"explained": explained(statistics[i, :3]).item(), **losses, "levels": levels})
    return {"frequency_bins": BINS, "layers": layers}


# -----------------------------------------------------------------------------

def load_tasks(encoding, block_size):
    """What the settings ask for, read at once, so that what is missing is reported before anything runs: {name: data}."""
    if batch_size < 1 or n_windows < 2 or limit < 0:
        raise ValueError(f"batch_size={batch_size} must be at least 1, n_windows={n_windows} at least 2 and limit={limit} "
                         "not negative")
    for path in (ppl, hellaswag, lambada):
        if path and path != "hub" and not os.path.isfile(path):
            raise ValueError(f"{path}: no such file")
    tasks = {}
    if ppl:
        tasks["text"] = text_windows(ppl, encoding, block_size)
    if hellaswag:
        tasks["hellaswag"] = json_rows(hellaswag, ("Rowan/hellaswag",), "validation", ("ctx", "endings", "label"))
    if lambada:
        tasks["lambada"] = json_rows(lambada, ("EleutherAI/lambada_openai", "default"), "test", ("text",))
    return tasks


def val_windows(split):
    """The windows that are scored, (n_windows, T + 1): the same for every checkpoint."""
    return split.shuffled(0, min(n_windows, len(split)), seed=0)


def evaluate(model, encoding, windows, tasks, other=None):
    """Every score of windows and load_tasks' tasks, as a dict for evals.json; other: a model to compare with on windows."""
    losses = window_losses(model, windows)
    scores = {"val": loss_scores(losses, windows, encoding)}
    if "text" in tasks:
        scores["text"] = loss_scores(window_losses(model, tasks["text"]), tasks["text"], encoding)
    if "hellaswag" in tasks:
        scores["hellaswag"] = hellaswag_scores(model, encoding, tasks["hellaswag"])
    if "lambada" in tasks:
        scores["lambada"] = lambada_scores(model, encoding, tasks["lambada"])
    if model.saes():
        scores["codes"] = code_scores(model, windows[:32])
    if other:
        difference, error = mean_and_error(np.subtract(losses, window_losses(other, windows)))
        scores["vs"] = {"checkpoint": vs, "loss_difference": difference, "standard_error": error}
    return scores


def report(scores, directory):
    """Print scores and write them to directory/evals.json."""
    for name, values in scores.items():
        if name != "codes":
            print(f"{name}: " + ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                                          for key, value in values.items()))
    for layer, values in enumerate(scores.get("codes", {"layers": []})["layers"]):
        print(f"layer {layer}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items() if key != "levels"))
        for level, row in enumerate(values["levels"]):
            print(f"  level {level}: active {row['active']:.4g}, dead {row['dead']}, rare {row['rare']}, "
                  f"norm share {row['norm_share']:.3f}")
    write_json(os.path.join(directory, "evals.json"), scores)


def main():
    configure(globals())
    target = pick_device(device)
    model, config = load_model(ckpt, target)
    encoding = get_tokenizer(config["tokenizer"])
    tasks = load_tasks(encoding, model.config.block_size)
    split = run_windows(config, "val", data_dir)
    other = None
    if vs:
        other, other_config = load_model(vs, target)
        if other_config["tokenizer"] != config["tokenizer"] or other.config.block_size != model.config.block_size:
            raise ValueError(f"{vs}: it has another tokenizer or block_size than {ckpt}, so losses can't be paired")
    report(evaluate(model, encoding, val_windows(split), tasks, other), os.path.dirname(ckpt) or ".")


if __name__ == "__main__":
    run_main(main)
