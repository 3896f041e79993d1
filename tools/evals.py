"""
Scores a checkpoint: val loss, perplexity of text, HellaSwag, LAMBADA, and its sparse codes' state.

    python -m tools.evals --ckpt out/demo/ckpt.pt                      # val loss and codes
    python -m tools.evals --ckpt ckpt.pt --ppl=hub --hellaswag=hub --lambada=hub
    python -m tools.evals --ckpt ckpt.pt --ppl=text.txt --hellaswag=val.jsonl --lambada=test.jsonl
    python -m tools.evals --ckpt ckpt.pt --vs=other.pt                 # val losses compared, paired

Prints the scores and writes them to evals.json beside the checkpoint. There they join those of
earlier runs on the same weights; a task's scores of more windows or items stay, unless --replace.

Conventions
- Losses are nats per token. A standard error is over windows or items; for several texts it is
  over texts.
- Every text and every context begins with end of text, as the training documents do. For HellaSwag
  and LAMBADA lm-evaluation-harness prepends nothing, so single decisions can differ from its own.
- --ppl scores each token of a text once, in windows of block_size tokens. A last, shorter one has
  the tokens before it as context (the harness' rolling windows). Perplexity is per token, word
  perplexity per word of re.split(r"\\s+", text), also the harness'. Bits per byte count no byte for
  end of text. "hub" is the 10,000 documents of NeelNanda/pile-10k, the published cards' pile_ppl.
- HellaSwag takes the ending of the largest log-probability per character, the harness' acc_norm.
  LAMBADA asks for every token of the last word to be the most likely one. A context that is too
  long loses its start. An item with an ending or a word of more than block_size tokens is
  unscorable: it is counted, and left out of the accuracy.
- vs: loss_difference is the checkpoint's loss less that of --vs, so it is negative where the
  checkpoint is better. Its standard error is of the pairs, window by window.
- explained is of the MLP input's variance about its mean, by the best multiple of the code.
- loss_dense and loss_zero are val losses when one layer's MLP reads its dense input, or zero,
  instead of its code, in the same weights. Their differences to the loss are paired by window.
  loss_dense - loss can be positive: the MLP was trained on codes, not on the dense input.
- dead: features without an activation in the windows that were read. rare: features below one
  activation in 10,000 tokens, dead ones too; only told of more tokens than that.
"""
if not __package__:
    raise SystemExit("from the repository's root: python -m tools.evals")

import hashlib
import json
import math
import os
import re
import time

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

from cayley import Codes
from checkpoint import load_model, pick_device
from configurator import configure
from data import encode, get_tokenizer, progress, read_json_lines, read_text, write_json
from model import explained
from tools.report import batches, duration
from tools.runs import run_windows

# settings, see configurator.py
ckpt = "out/ckpt.pt"  # or a directory with a ckpt.pt
vs = ""  # another checkpoint, compared on the same windows
data_dir = ""  # of the val split; "": that of the run
n_windows = 256  # of the val split
batch_size = 8
ppl = ""  # a text file, a .jsonl file with a text a row, or "hub"
hellaswag = ""  # a .jsonl file with ctx, endings, label; or "hub"
lambada = ""  # a .jsonl file with text; or "hub"
limit = 0  # texts, items of HellaSwag and of LAMBADA; 0: all
replace = False  # write scores to evals.json also where it has them of more windows or items
device = "auto"

CODE_WINDOWS = 64  # of the val windows, for the state of the codes: two passes a layer over them
BINS = [0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1]  # of activation frequencies; the first has the dead
RARE = 1e-4  # activations per token


# -----------------------------------------------------------------------------
# means

def mean_and_error(values):
    """Mean and its standard error of independent values; None where there are too few of them."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        return None, None
    if len(values) == 1:
        return float(values[0]), None
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def ratio_and_error(sums, counts):
    """sum(sums) / sum(counts) of independent pairs, and its standard error to first order."""
    sums = np.asarray(sums, dtype=np.float64)
    counts = np.asarray(counts, dtype=np.float64)
    ratio = sums.sum() / counts.sum()
    _, error = mean_and_error((sums - ratio * counts) / counts.mean())
    return float(ratio), error


def perplexity(nats):
    """exp(nats), or None where that is no float or there are no nats."""
    return math.exp(nats) if nats is not None and nats < 700 else None


# -----------------------------------------------------------------------------
# losses

@torch.no_grad()
def token_scores(model, idx, targets):
    """
    Losses of targets, and whether each is the most likely token.

    idx, targets (B, T) -> float32 and bool, (B, T) each.
    """
    logits, _ = model(idx, n_logits=0)  # (B, T, V)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return losses.view(targets.shape), logits.argmax(-1) == targets


def window_losses(model, windows, label="val"):
    """Mean loss of each window: windows (M, T + 1) int64, numpy -> list of M."""
    losses = []
    for rows in batches(windows, batch_size, label):
        rows = torch.from_numpy(rows).to(model.wte.weight.device)
        losses.append(token_scores(model, rows[:, :-1], rows[:, 1:])[0].mean(1))
    return torch.cat(losses).tolist()


def token_bytes(encoding):
    """Bytes of every token of a tokenizer, (V,); 0 for end of text."""
    lengths = np.zeros(encoding.n_vocab, dtype=np.int64)
    for token in range(encoding.n_vocab):
        if token != encoding.eot_token:
            lengths[token] = len(encoding.decode_single_token_bytes(token))
    return lengths


def loss_scores(losses, windows, encoding):
    """loss, its standard error, perplexity and bits per byte, by the window_losses of windows."""
    loss, error = mean_and_error(losses)
    targets = windows[:, 1:]
    n_bytes = token_bytes(encoding)[targets].sum()
    return {
        "loss": loss,
        "standard_error": error,
        "perplexity": perplexity(loss),
        "bits_per_byte": loss * targets.size / n_bytes / math.log(2),
        "windows": len(windows),
    }


def pad(pairs, block_size):
    """
    Pairs of context and continuation as inputs, targets and a mask, (B, T) each.

    The mask is true where the target is of the continuation. A row that is longer than
    block_size + 1 loses its start.
    """
    rows = [np.concatenate(pair)[-block_size - 1:] for pair in pairs]
    idx = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros(idx.shape, dtype=torch.bool)
    for i, (row, (_, continuation)) in enumerate(zip(rows, pairs)):
        idx[i, :len(row)] = torch.from_numpy(row)
        mask[i, len(row) - len(continuation):len(row)] = True
    return idx[:, :-1], idx[:, 1:], mask[:, 1:]


@torch.no_grad()
def continuation_scores(model, pairs, label="continuations"):
    """
    Log-probability of continuations, and whether each of their tokens is the most likely one.

    pairs: (context ids, continuation ids), both not empty -> a list of (float, bool). Contexts lose
    their start where both don't fit in block_size; a continuation of more tokens is a ValueError.
    """
    block_size = model.config.block_size
    longest = max((len(continuation) for _, continuation in pairs), default=0)
    if longest > block_size:
        raise ValueError(f"a continuation of {longest} tokens: block_size={block_size}")
    scores = [None] * len(pairs)
    lengths = [len(context) + len(continuation) for context, continuation in pairs]
    order = sorted(range(len(pairs)), key=lambda i: -lengths[i])  # like lengths share a batch
    for chosen in batches(order, batch_size, label):
        batch = pad([pairs[i] for i in chosen], block_size)
        idx, targets, mask = (tensor.to(model.wte.weight.device) for tensor in batch)  # (B, T)
        losses, greedy = token_scores(model, idx, targets)
        log_probs = -losses.masked_fill(~mask, 0).sum(1)  # (B,)
        all_greedy = (greedy | ~mask).all(1)
        for i, *score in zip(chosen, log_probs.tolist(), all_greedy.tolist()):
            scores[i] = tuple(score)
    return scores


# -----------------------------------------------------------------------------
# rows of files and of the hub

def hub_rows(name, config, split):
    """Rows (dicts) of a data set of the Hugging Face hub."""
    from datasets import load_dataset
    return load_dataset(name, config, split=split)


def read_rows(path, dataset, fault):
    """
    The first limit rows of a .jsonl file, or if path is "hub" of a data set, hub_rows(*dataset).

    fault(row) says what is wrong with a row, None if nothing is. Raises ValueError naming the file
    and the row, or a data set that can't be had.
    """
    rows = []
    if path == "hub":
        path = dataset[0]
        try:
            source = hub_rows(*dataset)
        except Exception as error:  # no network, no such data set, a damaged cache: of many classes
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ValueError(f"{path} can't be had from the hub ({reason}): give a file") from None
    else:
        source = read_json_lines(path)
    for row in source:
        problem = fault(row) if isinstance(row, dict) else "it is not an object with fields"
        if problem:
            raise ValueError(f"{path}: row {len(rows) + 1}: {problem}")
        rows.append(row)
        if len(rows) == limit:
            break
    if not rows:
        raise ValueError(f"{path}: it has no rows")
    return rows


def text_fault(row):
    if not isinstance(row.get("text"), str):
        return "it needs the field text"


def lambada_fault(row):
    if text_fault(row) or not row["text"].strip():
        return "it needs the field text, with a word"


def hellaswag_fault(row):
    missing = {"ctx", "endings", "label"} - row.keys()
    if missing:
        return f"it needs the fields ctx, endings and label, and lacks {', '.join(sorted(missing))}"
    endings = row["endings"]
    if not isinstance(endings, list) or len(endings) != 4:
        return f"its endings are {str(endings)[:60]!r}: must be a list of 4"
    if str(row["label"]) not in ("0", "1", "2", "3"):
        return f"its label is {row['label']!r}: must be 0, 1, 2 or 3"
    texts = [row[key] for key in ("ctx", "activity_label", "ctx_a", "ctx_b") if key in row]
    if not all(isinstance(text, str) for text in texts + endings):
        return "ctx, activity_label, ctx_a, ctx_b and each ending must be text"


# -----------------------------------------------------------------------------
# text

def read_texts(path):
    """
    The texts of the hub's documents, of a .jsonl file's rows, or of one file; none is empty.

    Raises ValueError if there are none.
    """
    if path == "hub" or path.endswith(".jsonl"):
        rows = read_rows(path, ("NeelNanda/pile-10k", None, "train"), text_fault)
        texts = [row["text"] for row in rows if row["text"]]
    else:
        texts = [text for text in [read_text(path)] if text]
    if not texts:
        raise ValueError(f"{path}: there is no text in it")
    return texts


def text_windows(ids, block_size):
    """
    Pairs of context and continuation that have each token of a text in one continuation.

    ids (n,): end of text and the text's tokens. Continuations have block_size tokens, and the
    token before as context; the last one has fewer, and as many before it as fit.
    """
    pairs = []
    for start in range(1, len(ids), block_size):
        end = min(start + block_size, len(ids))
        context_start = max(0, end - 1 - block_size)
        pairs.append((ids[context_start:start], ids[start:end]))
    return pairs


def text_scores(model, encoding, texts):
    """loss, its standard error, the perplexities and bits per byte of texts, each on its own."""
    lengths = token_bytes(encoding)
    pairs, owners = [], []
    n_bytes, n_words = 0, 0
    for number, text in enumerate(progress(texts, desc="encoding")):
        ids = np.array([encoding.eot_token] + encode(encoding, text), dtype=np.int32)
        windows = text_windows(ids, model.config.block_size)
        pairs += windows
        owners += [number] * len(windows)
        n_bytes += lengths[ids].sum()
        n_words += len(re.split(r"\s+", text))
    losses = [-score for score, _ in continuation_scores(model, pairs, "text")]
    counts = [len(continuation) for _, continuation in pairs]
    if len(texts) > 1:  # windows of one text are not independent
        losses = np.bincount(owners, losses)
        counts = np.bincount(owners, counts)
    loss, error = ratio_and_error(losses, counts)
    total, n_tokens = float(np.sum(losses)), int(np.sum(counts))
    return {
        "loss": loss,
        "standard_error": error,
        "perplexity": perplexity(loss),
        "word_perplexity": perplexity(total / n_words),
        "bits_per_byte": total / n_bytes / math.log(2),
        "texts": len(texts),
        "tokens": n_tokens,
    }


# -----------------------------------------------------------------------------
# HellaSwag and LAMBADA

def clean(text):
    """Without WikiHow's bracketed artefacts, as lm-evaluation-harness does it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def hellaswag_text(row):
    """Context and endings of a row, as lm-evaluation-harness prepares them."""
    context = row["ctx"]
    if "ctx_a" in row and "ctx_b" in row:
        context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    if "activity_label" in row:
        context = f"{row['activity_label']}: {context}"
    return [clean(text) for text in (context, *row["endings"])]


def hellaswag_scores(model, encoding, rows):
    """Accuracy by log-probability per character over the rows whose endings fit in block_size."""
    pairs, lengths, labels = [], [], []
    for row in rows:
        context, *endings = hellaswag_text(row)
        context_ids = [encoding.eot_token] + encode(encoding, context)
        ending_ids = [encode(encoding, " " + ending) for ending in endings]
        if max(map(len, ending_ids)) <= model.config.block_size:
            pairs += [(context_ids, ids) for ids in ending_ids]
            lengths += [max(1, len(ending)) for ending in endings]
            labels.append(int(row["label"]))
    log_probs = np.array([score for score, _ in continuation_scores(model, pairs, "HellaSwag")])
    best = (log_probs / np.array(lengths)).reshape(-1, 4).argmax(1)  # (items,)
    accuracy, error = mean_and_error(best == labels)
    return {
        "accuracy": accuracy,
        "standard_error": error,
        "items": len(labels),
        "unscorable": len(rows) - len(labels),
        "chance": 0.25,
    }


def lambada_scores(model, encoding, rows):
    """Accuracy and perplexity of the last word over the rows whose word fits in block_size."""
    pairs = []
    for row in rows:
        context, _, word = row["text"].rstrip().rpartition(" ")
        context_ids = [encoding.eot_token] + encode(encoding, context)
        word_ids = encode(encoding, " " + word)
        if len(word_ids) <= model.config.block_size:
            pairs.append((context_ids, word_ids))
    scores = continuation_scores(model, pairs, "LAMBADA")
    accuracy, error = mean_and_error([greedy for _, greedy in scores])
    nats, _ = mean_and_error([-score for score, _ in scores])
    return {
        "accuracy": accuracy,
        "standard_error": error,
        "items": len(pairs),
        "unscorable": len(rows) - len(pairs),
        "perplexity": perplexity(nats),
    }


# -----------------------------------------------------------------------------
# codes

def wide(x):
    """x in float64, or in float32 on MPS, which has no float64."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def products(x, y):
    """Sums of <x, y>, <x, x> and <y, y>, (3,): x, y (N, d) or (d,)."""
    return torch.stack([(x * y).sum(), (x * x).sum(), (y * y).sum()])


class LayerSums:
    """What code_scores sums over batches of one layer's codes."""

    def __init__(self, sae):
        self.sae = sae
        self.tokens = 0
        self.x = self.y = 0  # sums over tokens of the MLP's input and its code, (d,)
        self.products = 0  # of x and y, (3,)
        self.counts = [0 for _ in sae.levels]  # activations of each feature, (2^n,)
        self.active = [0 for _ in sae.levels]  # codes other than 0
        self.norms = [0 for _ in sae.levels]  # norms of what a level adds to y

    def add(self, record):
        """Add a forward's Record."""
        x = wide(record.x.flatten(0, 1))  # (N, d)
        nothing = [Codes(c.ids[..., :0], c.values[..., :0]) for c in record.codes]
        y = 0
        for level, code in enumerate(record.codes):
            alone = nothing[:level] + [code] + nothing[level + 1:]
            part = wide(self.sae.decode(alone).flatten(0, 1))  # (N, d)
            y = y + part
            n_features = 2 ** self.sae.levels[level].n
            self.counts[level] += code.ids.flatten().cpu().bincount(minlength=n_features)
            self.active[level] += (code.values != 0).sum().item()
            self.norms[level] += part.norm(dim=-1).sum().item()
        self.tokens += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.products += products(x, y)

    def explained(self):
        """explained of all tokens, about their mean and not that of each batch."""
        return explained(self.products - products(self.x, self.y) / self.tokens).item()

    def levels(self):
        """Per level a dict: active, dead, rare, frequency_histogram (of BINS), norm_share."""
        rows = []
        norm = sum(self.norms)
        for level, count in enumerate(self.counts):
            frequency = count.numpy() / self.tokens
            dead = int((frequency == 0).sum())
            histogram = np.histogram(frequency[frequency > 0], BINS)[0].tolist()
            row = {"active": self.active[level] / self.tokens, "dead": dead}
            if self.tokens > 1 / RARE:
                row["rare"] = int((frequency < RARE).sum())
            row["norm_share"] = self.norms[level] / norm if norm else 0.0
            row["frequency_histogram"] = [dead] + histogram
            rows.append(row)
        return rows


class Replaced(nn.Module):
    """Stands in for a layer's CayleySAE: scale 1 hands on the dense input, 0 nothing."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return self.scale * x


def replaced_losses(model, layer, scale, windows):
    """window_losses when a layer's MLP reads scale times its dense input instead of its code."""
    block = model.blocks[layer]
    sae = block.sae
    block.sae = Replaced(scale)
    try:
        return window_losses(model, windows, f"layer {layer}")
    finally:
        block.sae = sae


@torch.no_grad()
def code_scores(model, windows):
    """
    The loss of windows (M, T + 1), and per layer the state of its codes there.

    A layer has explained; loss_dense and loss_zero, each with its difference to the loss, paired by
    window, and that difference's standard error; and per level what LayerSums.levels gives.
    """
    sums = [LayerSums(sae) for sae in model.saes()]
    losses = []
    for rows in batches(windows, batch_size, "codes"):
        rows = torch.from_numpy(rows).to(model.wte.weight.device)
        with model.recording() as records:
            losses += token_scores(model, rows[:, :-1], rows[:, 1:])[0].mean(1).tolist()
        for of_layer, (record,) in zip(sums, records):
            of_layer.add(record)
    loss, error = mean_and_error(losses)
    layers = []
    for layer, of_layer in enumerate(sums):
        row = {"explained": of_layer.explained()}
        for name, scale in (("dense", 1.0), ("zero", 0.0)):
            replaced = replaced_losses(model, layer, scale, windows)
            row[f"loss_{name}"] = float(np.mean(replaced))
            difference, difference_error = mean_and_error(np.subtract(replaced, losses))
            row[f"{name}_minus_loss"] = difference
            row[f"{name}_minus_loss_error"] = difference_error
        row["levels"] = of_layer.levels()
        layers.append(row)
    return {
        "loss": loss,
        "standard_error": error,
        "windows": len(windows),
        "tokens": sums[0].tokens,
        "frequency_bins": BINS,
        "layers": layers,
    }


# -----------------------------------------------------------------------------
# the script

def load_tasks(encoding, block_size):
    """
    What the settings ask for, as {name: data} for evaluate.

    Read at once, so that what is missing is reported before anything runs. Raises ValueError naming
    a file that is missing or a row that can't be scored.
    """
    for path in (ppl, hellaswag, lambada):
        if path and path != "hub" and not os.path.isfile(path):
            raise ValueError(f"{path}: no such file")
    tasks = {}
    if ppl:
        tasks["text"] = read_texts(ppl)
    if hellaswag:
        dataset = ("Rowan/hellaswag", None, "validation")
        tasks["hellaswag"] = read_rows(hellaswag, dataset, hellaswag_fault)
    if lambada:
        dataset = ("EleutherAI/lambada_openai", "default", "test")
        tasks["lambada"] = read_rows(lambada, dataset, lambada_fault)
    return tasks


def task_characters(name, rows):
    """Of the text that a model reads for load_tasks' data of a task."""
    if name == "text":
        return sum(map(len, rows))
    if name == "lambada":
        return sum(len(row["text"]) for row in rows)
    return sum(len(row["endings"]) * len(row["ctx"]) + sum(map(len, row["endings"]))
               for row in rows)


def announce(model, encoding, windows, tasks, other):
    """Print what evaluate will read and about how long that takes, by the time of one forward."""
    n_tokens = windows.size * (2 if other else 1)
    words = [f"val {len(windows)} windows"]
    for name, rows in tasks.items():
        n_tokens += task_characters(name, rows) / token_bytes(encoding)[windows].mean()
        words.append(f"{name} {len(rows):,}")
    if model.saes():
        rows = windows[:CODE_WINDOWS]
        passes = 1 + 2 * len(model.blocks)
        n_tokens += rows.size * passes
        words.append(f"codes {len(rows)} windows {passes} times")
    device = model.wte.weight.device
    few = torch.from_numpy(windows[:max(1, 2048 // windows.shape[1])]).to(device)
    for idx in (few[:1, :9], few):  # what a first forward builds isn't timed
        start = time.perf_counter()
        token_scores(model, idx[:, :-1], idx[:, 1:])[0].sum().item()
    seconds = (time.perf_counter() - start) * n_tokens / few.numel()
    print(f"{', '.join(words)} on {device}: about {duration(seconds)}", flush=True)


def evaluate(model, encoding, windows, tasks, other=None):
    """
    Every score of windows and of load_tasks' tasks, as a dict for evals.json.

    other: a model to compare with on windows. KeyboardInterrupt may end it anywhere: the model is
    then as it was.
    """
    losses = window_losses(model, windows)
    scores = {"val": loss_scores(losses, windows, encoding)}
    if other:
        pairs = np.subtract(losses, window_losses(other, windows, "vs"))
        difference, error = mean_and_error(pairs)
        scores["vs"] = {
            "checkpoint": vs,
            "loss_difference": difference,
            "standard_error": error,
            "windows": len(windows),
        }
    if "text" in tasks:
        scores["text"] = text_scores(model, encoding, tasks["text"])
    if "hellaswag" in tasks:
        scores["hellaswag"] = hellaswag_scores(model, encoding, tasks["hellaswag"])
    if "lambada" in tasks:
        scores["lambada"] = lambada_scores(model, encoding, tasks["lambada"])
    if model.saes():
        scores["codes"] = code_scores(model, windows[:CODE_WINDOWS])
    return scores


def shown(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_scores(values):
    """The numbers and texts of a dict, without its lists, in a line."""
    return ", ".join(f"{key} {shown(value)}" for key, value in values.items()
                     if not isinstance(value, list))


def report(scores):
    """Print evaluate's scores."""
    for name, values in scores.items():
        print(f"{name}: {format_scores(values)}")
        if name == "vs":
            print(f"  (the loss of {ckpt} less that of {vs}: below 0, ckpt is the better)")
    for layer, values in enumerate(scores.get("codes", {"layers": []})["layers"]):
        words = [f"explained {shown(values['explained'])}"]
        for name in ("dense", "zero"):
            difference = shown(values[f"{name}_minus_loss"])
            error = shown(values[f"{name}_minus_loss_error"])
            words.append(f"loss_{name} - loss {difference} +- {error}")
        print(f"layer {layer}: {', '.join(words)}")
        for level, row in enumerate(values["levels"]):
            print(f"  level {level}: {format_scores(row)}")


def digest(model):
    """16 hexadecimal digits that stand for a model's weights."""
    state = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        state.update(name.encode())
        state.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return state.hexdigest()[:16]


def amount(values):
    """What a task's scores are of, as a number and its unit."""
    if "items" in values:
        return values["items"] + values["unscorable"], "items"
    unit = "windows" if "windows" in values else "tokens"
    return values[unit], unit


def read_scores(path):
    """The scores that earlier runs wrote to path, by task. Raises ValueError if it has others."""
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            scores = json.load(file)
    except ValueError:
        scores = None
    if not isinstance(scores, dict) or not all(isinstance(v, dict) for v in scores.values()):
        raise ValueError(f"{path}: it is no file of scores, move it away")
    return scores


def keep(scores, path, weights):
    """
    Write scores to path beside those of the same weights (see digest) that are there.

    One of more windows or items stays, unless replace says otherwise. A file with scores of other
    weights is moved aside. Both are said.
    """
    kept = read_scores(path)
    others = {values.get("weights", "before") for values in kept.values()} - {weights}
    if others:
        aside = f"{path.removesuffix('.json')}.{'.'.join(sorted(others))}.json"
        os.replace(path, aside)
        print(f"{path} had scores of other weights: it is {aside} now")
        kept = {}
    for name, values in scores.items():
        old = kept.get(name, values)
        same = old.get("checkpoint") == values.get("checkpoint")  # that vs compares with
        if same and amount(old) > amount(values) and not replace:
            (before, unit), (now, _) = amount(old), amount(values)
            print(f"{path} keeps {name} of {before:,} {unit}, not these {now:,}: --replace=True "
                  "writes them")
        else:
            kept[name] = {**values, "weights": weights}
    write_json(path, kept)


def main():
    configure(globals(), at_least={"batch_size": 1, "n_windows": 2, "limit": 0})
    target = pick_device(device)
    model, config = load_model(ckpt, target)
    encoding = get_tokenizer(config["tokenizer"])
    tasks = load_tasks(encoding, model.config.block_size)
    split = run_windows(config, "val", data_dir)
    path = os.path.join(ckpt if os.path.isdir(ckpt) else os.path.dirname(ckpt), "evals.json")
    read_scores(path)  # one that can't be joined is told of now
    other = None
    if vs:
        other, other_config = load_model(vs, target)
        same_tokenizer = other_config["tokenizer"] == config["tokenizer"]
        if not same_tokenizer or other.config.block_size != model.config.block_size:
            raise ValueError(f"{vs}: it has another tokenizer or block_size than {ckpt}, so losses "
                             "can't be paired")
    windows = split.shuffled(0, min(n_windows, len(split)), seed=0)  # the same for all checkpoints
    announce(model, encoding, windows, tasks, other)
    scores = evaluate(model, encoding, windows, tasks, other)
    report(scores)
    keep(scores, path, digest(model))


if __name__ == "__main__":
    main()
