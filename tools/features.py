"""
A site of static pages about a checkpoint's features: what they read, how often, beside what, and
what they do.

    python -m tools.features --ckpt=out/demo --out_dir=features       # open features/index.html
    python -m tools.features --ckpt=out/demo --tokens=5e6 --text=a.txt
    python -m tools.features --ckpt=out/demo --labels=labels.json     # {"0.1.517": "a label"}

It reads windows of the data, drawn at random, once, and keeps their codes in out_dir/codes.bin (6
bytes an active feature and token) until the site is whole. All but the effects is counted from
these. The front page can be opened as soon as they are read. To measure effects it reads some of
the windows again. An interrupted run keeps the codes, and goes on when it is started again.
records/features_site has times, and how a page of another tool is added.

Definitions
- frequency: the share of tokens at which a feature is active. dead and rare: as in evals.py.
- contexts: those of the largest codes, and a uniform sample, at most one a window.
- caption: what the sampled contexts have in common more than the data: the feature's token, the
  token before or after it, its word, or its place in the line. Of all candidates that at least 20%
  of the contexts fit it is the one with the largest likelihood ratio against its frequency in the
  data (Dunning, Computational Linguistics 19(1), 1993), told with that share; "mixed" if none is.
- nearest and beside it: features of its layer, of its own level and of others, by the correlation
  of being active or not over all tokens read (phi). Not by the atoms' products: for every feature
  these are the same few values, by the XOR of the two numbers alone (cayley.py).
- steer: a feature's mean code over the data, which is added to its code.
- measured effect: at some 256 of its active tokens, drawn at random, the feature is steered at that
  token alone and the later layers run again. It is the mean change of the next token's
  log-probabilities, in nats.
- first-order estimate: the steer's change of the logits through its block's MLP, with each neuron's
  mean slope of GELU over the data, and straight on to the unembedding: without later layers and the
  final norm's scale, so up to a factor per token. Its correlation with the measured effect over the
  vocabulary stands beside it.
- Tokens that a feature raises and lowers are among those that the data have at least 10 times; so
  are those in the histogram of what it moves.
- reach: the length of the steer's change of the residual stream at its token, after each later
  layer, relative to the length after its own.
"""
if not __package__:
    raise SystemExit("from the repository's root: python -m tools.features")

import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
from typing import NamedTuple

import numpy as np
import torch

from cayley import Codes
from checkpoint import build_model, load_checkpoint, pick_device
from configurator import configure
from data import encode, get_tokenizer, lock, permute, progress, read_text, write_text
from model import KVCache
from tools.evals import RARE
from tools.report import batches
from tools.runs import run_windows

# settings, see configurator.py
ckpt = "out/ckpt.pt"  # or a directory with a ckpt.pt
data_dir = ""  # directory of bins; "": the run's data_dir
split = "train"
out_dir = "features"  # a new directory, or that of an interrupted run
tokens = 300_000  # of the data, at most
text = ""  # a file that gets a page with its active features
text_tokens = 20_000  # of that file, at most
labels = ""  # a JSON file with labels by hand, {"layer.level.feature": "text"}
n_top = 6  # contexts of largest codes, per feature
n_random = 32  # sampled contexts, for captions and quantiles
n_measured = 128  # features per level and layer whose effects are measured, the most frequent
batch_size = 8
device = "auto"

BEFORE, AFTER = 400, 200  # characters of a context around its token; the window may have fewer
QUANTILES = (0.9, 0.7, 0.5, 0.3, 0.1)  # of a feature's sampled codes, whose contexts are shown
N_BINS = 20  # of the histogram of codes
N_MOVED = 40  # of the histogram of effects
N_NEAR = 6  # features of each level that are told as nearest to one
CHUNK = 128  # features in a file
WINDOWS_FILE = 16_384  # tokens of the data in a file
MEASURED_READ = 50_000  # tokens of the data, among which features are steered
MEASURED_TOKENS = 256  # of them in expectation, for each measured feature
ROWS = 2048  # of them at once
SEEN = 10  # times a token is in the data, to be told as raised or lowered
LEAST_SHARE = 0.2  # of the sampled contexts, to be a caption


# -----------------------------------------------------------------------------
# reading the data: the codes of every window, on the disk

@torch.no_grad()
def codes_of(model, idx):
    """idx (B, T) -> per layer and level Codes of numpy arrays (B, T, k)."""
    idx = torch.from_numpy(idx).to(model.wte.weight.device)
    layers = []
    for codes in model.run_with_codes(idx, n_logits=1)[1]:
        layers.append([Codes(c.ids.cpu().numpy(), c.values.float().cpu().numpy()) for c in codes])
    return layers


def record_type(model, T):
    """
    What is kept of a window of T tokens, a numpy dtype.

    "layer.level.ids" and "layer.level.values" (T, k), and "layer.slopes" (4d,), the mean slopes of
    GELU.
    """
    fields = []
    for layer, sae in enumerate(model.saes()):
        for level, (n, k, _) in enumerate(sae.levels):
            fields.append((f"{layer}.{level}.ids", np.uint16 if n <= 16 else np.int32, (T, k)))
            fields.append((f"{layer}.{level}.values", np.float32, (T, k)))
        fields.append((f"{layer}.slopes", np.float32, 4 * model.config.n_embd))
    return np.dtype(fields)


def read_batch(model, windows):
    """windows (B, T) -> their records (B,)."""
    slopes = []  # per layer (B, 4d)

    def keep_slopes(module, inputs, output):
        hidden = output.float()  # (B, T, 4d)
        slopes.append(torch.ops.aten.gelu_backward(torch.ones_like(hidden), hidden).mean(1))

    hooks = [block.mlp.c_fc.register_forward_hook(keep_slopes) for block in model.blocks]
    layers = codes_of(model, windows)
    for hook in hooks:
        hook.remove()
    records = np.empty(len(windows), dtype=record_type(model, windows.shape[1]))
    for layer, codes in enumerate(layers):
        records[f"{layer}.slopes"] = slopes[layer].cpu().numpy()
        for level, (ids, values) in enumerate(codes):
            records[f"{layer}.{level}.ids"] = ids
            records[f"{layer}.{level}.values"] = values
    return records


def read_codes(model, windows, file):
    """
    The records (M,) of windows (M, T), in a binary file, mapped to memory.

    A file of an interrupted run has those of the first windows, and is read on from there.
    """
    kind = record_type(model, windows.shape[1])
    done = file.seek(0, os.SEEK_END) // kind.itemsize
    file.truncate(done * kind.itemsize)  # the last record may not be whole
    if done:
        print(f"{done:,} of {len(windows):,} windows are read already")
    for batch in batches(windows[done:], batch_size, "reading"):
        file.write(read_batch(model, batch).tobytes())
        file.flush()
    return np.memmap(file, dtype=kind, mode="r")


def read(model, windows, characters, path=None):
    """
    Read windows (M, T); characters (V,) of each token; path: of a file that keeps the codes.

    Returns a LevelReader per layer and level, and each layer's mean GELU slopes (4d,).
    """
    with open(path, "a+b") if path else tempfile.TemporaryFile() as file:
        records = read_codes(model, windows, file)
    ends = np.concatenate([[0], np.cumsum(characters[windows.ravel()])])
    readers = []
    slopes = []
    for layer, sae in enumerate(model.saes()):
        readers.append([])
        for level in range(len(sae.levels)):
            ids = np.asarray(records[f"{layer}.{level}.ids"])
            values = np.asarray(records[f"{layer}.{level}.values"])
            size = 2 ** sae.levels[level].n
            readers[-1].append(LevelReader(layer, level, size, ids, values, ends))
        mean = records[f"{layer}.slopes"].mean(0, dtype=np.float64).astype(np.float32)
        slopes.append(torch.from_numpy(mean).to(model.wte.weight.device))
    return readers, slopes


# -----------------------------------------------------------------------------
# what the codes tell of each feature

def best_in_windows(keys, windows, n):
    """
    Where the n largest of keys (A,) are, one a window, largest first.

    windows (A,): the keys' windows by number, ascending.
    """
    starts = np.flatnonzero(np.diff(windows, prepend=-1))
    ends = np.append(starts[1:], len(keys))
    largest = np.argsort(-np.maximum.reduceat(keys, starts), kind="stable")[:n]
    return [start + keys[start:end].argmax() for start, end in zip(starts[largest], ends[largest])]


def quantile_slots(codes, present):
    """
    Which sampled contexts stand at QUANTILES of their codes.

    codes, present (F, slots) -> slots (F, len(QUANTILES)), -1 where there are too few.
    """
    order = np.argsort(np.where(present, codes, np.inf), axis=1, kind="stable")
    n = present.sum(1, keepdims=True)
    place = np.floor(np.array(QUANTILES) * n).astype(np.int64)  # (F, quantiles)
    place = np.minimum(place, np.maximum(n - 1, 0))
    slots = np.take_along_axis(order, place, 1)
    repeated = np.diff(place, axis=1, prepend=-1) == 0
    return np.where(repeated | (n == 0), -1, slots)


def context_bounds(ends, refs, T):
    """
    First and last token, exclusive, of contexts of BEFORE + AFTER characters in their window.

    ends (tokens + 1,): characters before each token of the data; refs (...): the contexts' tokens,
    which get more characters on one side where the window of T tokens ends on the other.
    """
    first = refs // T * T
    last = first + T
    low = np.maximum(ends[refs] - BEFORE, ends[first])
    high = np.minimum(np.maximum(ends[refs + 1], low + BEFORE) + AFTER, ends[last])
    low = np.maximum(np.minimum(low, high - BEFORE - AFTER), ends[first])
    start = np.searchsorted(ends, low, side="right") - 1
    end = np.searchsorted(ends, high, side="left")
    end = np.searchsorted(ends, ends[end], side="right") - 1  # the last bytes of a character
    return start.clip(first, refs), end.clip(refs + 1, last)


class LevelReader:
    """
    What the codes of one level of one layer tell of its features, F of them.

    ids, values (M, T, k): its codes, on the disk. ends (M T + 1,): characters before each token.
    Tokens are told by number, counted over all windows, -1 where there is none.
    """

    def __init__(self, layer, level, size, ids, values, ends):
        self.layer = layer
        self.level = level
        self.size = size
        self.ids = ids
        self.values = values
        self.T = ids.shape[1]
        self.counts = np.bincount(ids.ravel(), minlength=size)
        self.steer = np.ones(size, dtype=np.float32)  # the mean code; 1 of a dead feature
        self.range = np.zeros((size, 2), dtype=np.float32)  # smallest and largest code
        self.histogram = np.zeros((size, N_BINS), dtype=np.int64)
        self.top = np.full((size, n_top), -1)  # tokens of largest codes, largest first
        self.sample = np.full((size, n_random), -1)  # tokens drawn at random
        self.sample_codes = np.zeros((size, n_random), dtype=np.float32)
        self.effects = None  # Effects, where measured
        rng = np.random.default_rng((layer, level))
        for feature, (tokens, codes) in enumerate(zip(*self.active())):
            if len(tokens):
                self._describe(feature, tokens, codes, rng)
        self._choose_contexts(ends)

    def active(self):
        """Per feature the tokens at which it is active, ascending, and its codes there."""
        order = np.argsort(self.ids, axis=None, kind="stable")
        codes = self.values.ravel().take(order)
        tokens = np.floor_divide(order, self.ids.shape[2], out=order)
        ends = np.cumsum(self.counts)[:-1]
        return np.split(tokens, ends), np.split(codes, ends)

    def _describe(self, feature, tokens, codes, rng):
        self.steer[feature] = codes.mean(dtype=np.float64)
        self.range[feature] = codes.min(), codes.max()
        self.histogram[feature], _ = np.histogram(codes, N_BINS)
        windows = tokens // self.T
        top = best_in_windows(codes, windows, n_top)
        sample = best_in_windows(rng.random(len(codes)), windows, n_random)
        self.top[feature, :len(top)] = tokens[top]
        self.sample[feature, :len(sample)] = tokens[sample]
        self.sample_codes[feature, :len(sample)] = codes[sample]

    def _choose_contexts(self, ends):
        """Those on the pages: of the largest codes, then at QUANTILES of the sampled ones."""
        slots = quantile_slots(self.sample_codes, self.sample >= 0)
        at = np.where(slots >= 0, np.take_along_axis(self.sample, slots.clip(0), 1), -1)
        repeated = (at[:, :, None] == self.top[:, None]).any(-1)
        self.contexts = np.concatenate([self.top, np.where(repeated, -1, at)], 1)
        self.start, self.end = context_bounds(ends, self.contexts.clip(0), self.T)


def neighbours(reader, other, active, n_tokens):
    """
    The features of a level of the same layer that are active most like each of the reader's own.

    active: the tokens of each, of reader.active(). Yields for each its rows [level, id, tokens at
    which both are active, correlation], most alike first.
    """
    ids = other.ids.reshape(n_tokens, -1)  # a copy, in memory
    for feature, tokens in enumerate(active):
        both = np.bincount(ids.take(tokens, 0).ravel(), minlength=other.size)
        if other is reader:
            both[feature] = 0
        found = np.flatnonzero(both)  # no other correlation is positive
        both = both[found]
        shares = other.counts[found] / n_tokens
        share = len(tokens) / n_tokens
        variances = shares * (1 - shares) * share * (1 - share)
        correlation = (both / n_tokens - share * shares) / np.sqrt(variances.clip(1e-24))
        best = np.argsort(-correlation)[:N_NEAR]
        yield [[other.level, int(found[i]), int(both[i]), round(float(correlation[i]), 3)]
               for i in best if correlation[i] > 0]


# -----------------------------------------------------------------------------
# captions

CAPTIONS = ("token", "after", "before", "line", "end", "word", "mixed")  # kinds, by number
LINE_PLACES = 4  # first, second, third and fourth token of a line
WORD = re.compile(rb"[0-9A-Za-z_\x80-\xff]{2,}")


def caption_candidates(windows, encoding):
    """
    What captions can say of each token of windows (M, T).

    Returns per kind of CAPTIONS but the last int32 (M, T): the token, the one before it, the one
    after it, its place in its line, 0 where it is the last of its line, and its word by number; -1
    where that is unknown (beyond the window) or nothing to say. And the words.
    """
    vocabulary = token_words(encoding)
    vocabulary[encoding.eot_token] = b"\n"  # ends a line, and a word
    starts_line = np.array([word.startswith(b"\n") for word in vocabulary])
    ends_line = np.array([word.endswith(b"\n") for word in vocabulary])
    M, T = windows.shape
    nothing = np.full((M, 1), -1, dtype=np.int32)
    tokens = windows.astype(np.int32)
    after = np.concatenate([nothing, tokens[:, :-1]], 1)
    before = np.concatenate([tokens[:, 1:], nothing], 1)
    line_ends = np.where(ends_line[windows], np.arange(T, dtype=np.int32), -1)
    last_end = np.concatenate([nothing, np.maximum.accumulate(line_ends, 1)[:, :-1]], 1)
    place = np.arange(T, dtype=np.int32) - last_end - 1
    place[(last_end < 0) | (place >= LINE_PLACES)] = -1
    end = np.where((before >= 0) & starts_line[before], 0, -1).astype(np.int32)
    in_words, words = words_of(windows, vocabulary)
    return [tokens, after, before, place, end, in_words], words


def words_of(windows, vocabulary):
    """
    The words in which the tokens of windows (M, T) end; vocabulary: the bytes of every token.

    Returns numbers of words int32 (M, T), -1 for none, and the words.
    """
    numbers = {}
    found = np.full(windows.shape, -1, dtype=np.int32)
    for row, ids in enumerate(windows.tolist()):
        parts = [vocabulary[i] for i in ids]
        last = np.cumsum([len(part) for part in parts]) - 1  # each token's last byte
        matches = list(WORD.finditer(b"".join(parts)))
        if not matches:
            continue
        spans = np.array([match.span() for match in matches])
        words = np.array([numbers.setdefault(match.group(), len(numbers)) for match in matches])
        at = np.searchsorted(spans[:, 0], last, side="right") - 1
        inside = (at >= 0) & (last < spans[at, 1])
        found[row, inside] = words[at[inside]]
    return found, [word.decode(errors="replace") for word in numbers]


def captions(refs, candidates):
    """
    The best caption of each feature by its sampled contexts, refs (F, slots), -1 for none.

    Returns (F,) each: kinds, numbers in CAPTIONS (-1: no contexts), what they say, and the
    percentage of the contexts that fit. Mixed ones say the most frequent token.
    """
    n = (refs >= 0).sum(1)  # (F,)
    kinds = np.where(n > 0, CAPTIONS.index("mixed"), -1)
    values = np.zeros(len(refs), dtype=np.int64)
    shares = np.zeros(len(refs))
    ratios = np.full(len(refs), -1.0)
    for kind, said in enumerate(candidates):
        feature, value, count = said_counts(refs, said.ravel())
        share = count / n[feature]
        base = np.bincount(said[said >= 0])[value] / said.size
        ratio = n[feature] * divergence(share, base)
        ratio[share < LEAST_SHARE] = -1
        if kind == 0:  # of mixed ones, which the others don't replace
            ratio = np.where(ratio < 0, share - 1, ratio)
        order = np.lexsort((-ratio, feature))
        best = order[np.diff(feature[order], prepend=-1) != 0]
        best = best[ratio[best] > ratios[feature[best]]]
        feature = feature[best]
        fits = share[best] >= LEAST_SHARE
        kinds[feature[fits]] = kind
        values[feature] = value[best]
        shares[feature] = share[best]
        ratios[feature] = np.where(fits, ratio[best], 0)
    return kinds, values, np.rint(100 * shares).astype(np.int64)


def said_counts(refs, said):
    """How often each thing is said (tokens,) of the contexts of each feature: (P,) x 3."""
    feature, slot = np.nonzero(refs >= 0)
    value = said[refs[feature, slot]]
    feature, value = feature[value >= 0], value[value >= 0]
    size = int(said.max()) + 2
    pairs, counts = np.unique(feature * size + value, return_counts=True)
    return pairs // size, pairs % size, counts


def divergence(share, base):
    """KL divergence of a coin of probability share from one of base; 0 where share is below it."""
    share, base = np.maximum(share, base), np.clip(base, 1e-12, 1 - 1e-12)
    others = 1 - share
    rest = others * np.log(np.maximum(others, 1e-12) / (1 - base))
    return share * np.log(share / base) + rest


# -----------------------------------------------------------------------------
# effects: the first-order estimate, and what is measured

@torch.no_grad()
def first_order(model, layer, level, features, slopes, tokens):
    """Changes of the logits of tokens (A,) per unit of code to first order, (features, A)."""
    block = model.blocks[layer]
    hidden = block.mlp.c_fc.weight @ block.sae.atoms(level, features).T  # (4d, features)
    written = block.mlp.c_proj.weight @ (slopes[:, None] * hidden)  # (d, features)
    return (model.wte.weight[tokens] @ (model.ln_f.weight[:, None] * written)).T


def extremes(effects, tokens, n=10):
    """
    The tokens, of some (A,), that effects (features, A) raise and lower most.

    Returns ids and values (features, 2 n), most raised first; fewer of fewer than 2 n tokens.
    """
    n = min(n, len(tokens) // 2)
    up = effects.topk(n)
    down = effects.topk(n, largest=False)
    ids = tokens[torch.cat([up.indices, down.indices.flip(1)], 1)]
    values = torch.cat([up.values, down.values.flip(1)], 1)
    return ids.cpu().numpy(), values.cpu().numpy()


def spread(effects):
    """Histograms of effects (features, A): counts (features, N_MOVED), from least to largest."""
    low = effects.amin(1, keepdim=True)
    width = (effects.amax(1, keepdim=True) - low).clamp_min(1e-12)
    bins = ((effects - low) / width * N_MOVED).long().clamp_max(N_MOVED - 1)
    counts = torch.zeros(len(effects), N_MOVED, dtype=torch.int64, device=effects.device)
    return counts.scatter_add_(1, bins, torch.ones_like(bins)).tolist()


def seen_tokens(windows, n_vocab, device):
    """The tokens that windows have often enough to be told as raised or lowered; at least 20."""
    counts = np.bincount(windows.ravel(), minlength=n_vocab)
    least = min(SEEN, np.sort(counts)[::-1][:20].min())
    return torch.from_numpy(np.flatnonzero(counts >= least)).to(device)


class Effects:
    """Sums over tokens at which features of one level were steered; m features."""

    def __init__(self, features, chances, n_features, n_layers, n_vocab, device):
        self.features = features  # (m,), ascending
        self.chances = torch.from_numpy(chances).float().to(device)  # (m,), of a token to be taken
        self.slots = torch.full((n_features,), -1, device=device)  # place in features
        self.slots[torch.from_numpy(features)] = torch.arange(len(features), device=device)
        self.tokens = torch.zeros(len(features), device=device)
        self.changes = torch.zeros(len(features), n_vocab, device=device)  # of log-probabilities
        self.lengths = torch.zeros(len(features), n_layers, device=device)  # own and later layers

    def add(self, slots, changes, lengths):
        """Take in tokens (R,), by the place of their feature, with changes (R, V)."""
        self.tokens.index_add_(0, slots, torch.ones_like(slots, dtype=torch.float32))
        self.changes.index_add_(0, slots, changes)
        self.lengths.index_add_(0, slots, lengths)

    def finish(self):
        """Means instead of sums."""
        n = self.tokens.clamp_min(1)[:, None]
        self.changes = self.changes / n
        self.lengths = self.lengths / n


class Forward(NamedTuple):
    """What one forward over windows computed."""

    codes: list  # per layer, Codes (B, T, k) of each level
    after: list  # per layer, the residual stream after it, (B, T, C)
    kv: torch.Tensor  # keys and values, (layers, 2, B, H, T, D)


@torch.no_grad()
def forward(model, idx):
    """idx (B, T) -> its Forward."""
    cache = KVCache(model.config, len(idx), idx.device, model.wte.weight.dtype)
    after = []
    hooks = []
    for block in model.blocks:
        hooks.append(block.register_forward_hook(lambda module, inputs, out: after.append(out)))
    with model.recording() as records:
        model(idx, cache=cache)
    for hook in hooks:
        hook.remove()
    kv = cache.kv[..., :idx.shape[1], :]
    return Forward([record.codes for (record,) in records], after, kv)


def attend(attn, x, positions, keys, values):
    """
    Attention of changed tokens, each by itself, to the unchanged ones before it in one window.

    x (R, C) at positions (R,); keys, values (H, T, D) of the window -> (R, C).
    """
    R, C = x.shape
    q, k, v = attn.c_attn(x).view(R, 3, attn.n_head, -1).permute(1, 2, 0, 3)  # (H, R, D) each
    before = torch.arange(keys.shape[1], device=x.device) < positions[:, None]  # (R, T)
    scores = (q @ keys.mT).masked_fill(~before, -math.inf)
    scores = torch.cat([scores, (q * k).sum(-1, keepdim=True)], -1)  # the last is the token itself
    weights = (scores / math.sqrt(q.shape[-1])).softmax(-1)
    y = weights[..., :-1] @ values + weights[..., -1:] * v
    return attn.c_proj(y.transpose(0, 1).reshape(R, C))


@torch.no_grad()
def steered(model, base, layer, window, position, change):
    """
    The residual stream at tokens after change (R, C) is added to a layer's MLP input there alone.

    window (R,), ascending, and position (R,) say where in base, a Forward. Returns one (R, C) for
    the layer and for each later one.
    """
    mlp = model.blocks[layer].mlp
    codes = [Codes(c.ids[window, position], c.values[window, position]) for c in base.codes[layer]]
    mlp_input = model.blocks[layer].sae.decode(codes)  # (R, C)
    x = base.after[layer][window, position] + mlp(mlp_input + change) - mlp(mlp_input)
    residuals = [x]
    sizes = torch.bincount(window, minlength=base.kv.shape[2]).tolist()
    for block, kv in zip(model.blocks[layer + 1:], base.kv[layer + 1:]):
        parts = []
        rows = zip(block.ln_1(x).split(sizes), position.split(sizes), *kv)  # of each window
        for part, at, keys, values in rows:
            if len(part):
                parts.append(attend(block.attn, part, at, keys, values))
        x = x + torch.cat(parts)
        x = x + block.mlp(block.sae(block.ln_2(x)))
        residuals.append(x)
    return residuals


def measure_level(model, reader, base, generator):
    """Steer a level's measured features at some of their active tokens in base, a Forward."""
    effects = reader.effects
    device = base.kv.device
    ids = base.codes[reader.layer][reader.level].ids  # (B, T, k)
    slots = effects.slots[ids]
    keys = torch.rand(ids.shape, generator=generator, device=device)
    drawn = (slots >= 0) & (keys < effects.chances[slots.clamp_min(0)])
    where = torch.nonzero(drawn)  # (R, 3), ascending
    steer = torch.from_numpy(reader.steer).float().to(device)
    n_vocab = effects.changes.shape[1]
    for window, position, place in (part.unbind(1) for part in where.split(ROWS)):
        feature = ids[window, position, place]
        atoms = model.blocks[reader.layer].sae.atoms(reader.level, feature)  # (R, C)
        change = steer[feature][:, None] * atoms
        residuals = steered(model, base, reader.layer, window, position, change)
        before = [after[window, position] for after in base.after[reader.layer:]]
        lengths = torch.stack([(x - b).norm(dim=1) for x, b in zip(residuals, before)], 1)
        logits = model.lm_head(model.ln_f(torch.cat([residuals[-1], before[-1]])))
        log_p, log_p_before = logits[:, :n_vocab].float().log_softmax(1).chunk(2)
        effects.add(slots[window, position, place], log_p - log_p_before, lengths)


@torch.no_grad()
def measure(model, windows, readers, n_vocab):
    """
    The effects of each level's n_measured most frequent features, at tokens of windows (m, T).

    windows: the first of those that were read, which are in a random order.
    """
    if n_measured == 0:
        return
    device = model.wte.weight.device
    every_reader = [reader for layer in readers for reader in layer]
    for reader in every_reader:
        counts = np.bincount(reader.ids[:len(windows)].ravel(), minlength=reader.size)
        features = np.argsort(-reader.counts, kind="stable")[:n_measured]
        features = np.sort(features[counts[features] > 0])
        chances = MEASURED_TOKENS / counts[features]
        n_layers = len(readers) - reader.layer
        reader.effects = Effects(features, chances, reader.size, n_layers, n_vocab, device)
    generator = torch.Generator(device).manual_seed(0)
    for batch in batches(windows, batch_size, "measuring"):
        base = forward(model, torch.from_numpy(batch).to(device))
        for reader in every_reader:
            measure_level(model, reader, base, generator)
    for reader in every_reader:
        reader.effects.finish()


def correlations(one, other):
    """Pearson's, of each row of (m, V) with the other's -> numpy (m,)."""
    one = one - one.mean(1, keepdim=True)
    other = other - other.mean(1, keepdim=True)
    return torch.nn.functional.cosine_similarity(one, other).cpu().numpy()


# -----------------------------------------------------------------------------
# tokens, a text and labels by hand

def token_words(encoding):
    """The bytes of every token of a tokenizer."""
    words = []
    for i in range(encoding.n_vocab):
        special = i == encoding.eot_token
        words.append(b"<|endoftext|>" if special else encoding.decode_single_token_bytes(i))
    return words


def character_counts(encoding):
    """The characters that begin in every token of a tokenizer, (V,); 1 for end of text."""
    counts = []
    for word in token_words(encoding):
        continuing = sum(byte & 0xC0 == 0x80 for byte in word)  # UTF-8's later bytes
        counts.append(len(word) - continuing)
    counts[encoding.eot_token] = 1
    return np.array(counts)


def walk(model, ids):
    """
    The codes of a text of any length, ids with end of text in front (N + 1,).

    Each window after the first begins half a block before the tokens it is read for. Returns per
    layer and level Codes of numpy arrays (N, k).
    """
    block_size = model.config.block_size
    parts = []
    done = 1
    while done < len(ids):
        start = max(0, done - block_size // 2) if done > 1 else 0
        window = ids[start:start + block_size]
        parts.append([[Codes(c.ids[0, done - start:], c.values[0, done - start:]) for c in codes]
                      for codes in codes_of(model, window[None])])
        done = start + len(window)
    layers = []
    for layer in zip(*parts):
        layers.append([Codes(*map(np.concatenate, zip(*level))) for level in zip(*layer)])
    return layers


def read_labels(path, saes):
    """
    Labels by hand, {"layer.level.feature": text}, from a JSON file.

    Raises ValueError naming what isn't a label of a feature of the model.
    """
    try:
        found = json.loads(read_text(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f'{path}: must be an object, {{"layer.level.feature": "text"}}')
    for key, label in found.items():
        match = re.fullmatch(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)", key)
        layer, level, feature = map(int, match.groups()) if match else (len(saes), 0, 0)
        inside = layer < len(saes) and level < len(saes[layer].levels)
        if not inside or feature >= 2 ** saes[layer].levels[level].n:
            raise ValueError(f"{path}: {key!r} is no layer.level.feature of this model")
        if not isinstance(label, str):
            raise ValueError(f"{path}: the label of {key} is {label!r}, it must be text")
    return found


# -----------------------------------------------------------------------------
# writing the site

class Reading(NamedTuple):
    """What was read, for the pages."""

    windows: np.ndarray  # (M, T)
    readers: list  # per layer and level a LevelReader
    slopes: list  # per layer (4d,)
    candidates: list  # of captions, (M, T) each
    among: torch.Tensor  # tokens that are told as raised and lowered
    n_vocab: int


def save(directory, key, value):
    """data/key.js, which hands value to the page: a script, as file:// pages can't fetch."""
    path = os.path.join(directory, "data", key + ".js")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"loaded({json.dumps(key)},{json.dumps(value, separators=(',', ':'))})")


def saved(directory, key):
    """The value of data/key.js."""
    text = read_text(os.path.join(directory, "data", key + ".js"))
    return json.loads(text[text.index(",") + 1:-1])


def published(path):
    """A path as the site may tell it: none of this machine's, so far as it wasn't given so."""
    if not os.path.isabs(path):
        return path
    here = os.path.relpath(path)
    return os.path.join(*path.split(os.sep)[-2:]) if here.startswith("..") else here


def rounded(values, digits=2):
    return [round(float(v), digits) for v in values]


def context(reader, feature, column, tokens, codes):
    """
    A context on a feature's page: window, token in it, first and last token, codes, quantile.

    tokens, codes: where the feature is active, of reader.active(). Told are token, code, token,
    code, ... of those in the context; the quantile is a percentage, or -1 for a context of one of
    the largest codes.
    """
    T = reader.T
    window, token = divmod(int(reader.contexts[feature, column]), T)
    start, end = int(reader.start[feature, column]), int(reader.end[feature, column])
    inside = slice(*np.searchsorted(tokens, [start, end]))
    shades = []
    for place, code in zip((tokens[inside] - window * T).tolist(), rounded(codes[inside])):
        shades += [place, code]
    quantile = round(100 * QUANTILES[column - n_top]) if column >= n_top else -1
    return [window, token, start - window * T, end - window * T, shades, quantile]


def told(effects, tokens):
    """
    For each feature what its page tells of its effects (features, A) on tokens (A,).

    ids and by: tokens raised and lowered, and by how much; moved: how many are by how much, a
    histogram from the least to the largest.
    """
    rows = []
    sides = torch.stack([effects.amin(1), effects.amax(1)], 1).tolist()
    for ids, by, low_high, counts in zip(*extremes(effects, tokens), sides, spread(effects)):
        moved = {"range": rounded(low_high, 4), "counts": counts}
        rows.append({"ids": ids.tolist(), "by": rounded(by, 4), "moved": moved})
    return rows


def raised(row):
    """The three tokens that a row of told is said to raise, at most."""
    return [token for token, by in zip(row["ids"][:3], row["by"]) if by > 0]


@torch.no_grad()
def estimated(model, reader, slopes, features, tokens):
    """First-order effects of steering, (features, A)."""
    effects = first_order(model, reader.layer, reader.level, features, slopes, tokens)
    steer = torch.from_numpy(reader.steer[features]).to(effects.device)
    return effects * steer[:, None]


def write_level(directory, model, reader, reading):
    """The table of one level of one layer, and its features in files of CHUNK."""
    n_tokens = reading.windows.size
    flat = reading.windows.ravel()
    kinds, said, shares = captions(reader.sample, reading.candidates)
    at = np.concatenate([reader.top, reader.sample], 1)
    tokens_of = []
    for refs in at:
        ids, counts = np.unique(flat[refs[refs >= 0]], return_counts=True)
        tokens_of.append(ids[np.argsort(-counts, kind="stable")][:4].tolist())
    active, codes = reader.active()
    levels = reading.readers[reader.layer]
    near = zip(*[neighbours(reader, other, active, n_tokens) for other in levels])
    raises = []
    for first in range(0, reader.size, CHUNK):
        features = np.arange(first, min(first + CHUNK, reader.size))
        slopes = reading.slopes[reader.layer]
        effects = estimated(model, reader, slopes, features, reading.among)
        pages = []
        for feature, page in zip(features, told(effects, reading.among)):
            raises.append(raised(page))
            columns = np.flatnonzero(reader.contexts[feature] >= 0)
            where = active[feature], codes[feature]
            page["contexts"] = [context(reader, feature, i, *where) for i in columns]
            page["sampled"] = int((reader.sample[feature] >= 0).sum())
            page["near"] = sum(next(near), [])
            if reader.counts[feature]:
                page["histogram"] = reader.histogram[feature].tolist()
                page["range"] = rounded(reader.range[feature], 3)
            pages.append(page)
        save(directory, f"{reader.layer}/{reader.level}/{first // CHUNK}", pages)
    table = {
        "count": reader.counts.tolist(),
        "mean": rounded(reader.steer),
        "max": rounded(reader.range[:, 1]),
        "kind": kinds.tolist(),
        "says": said.tolist(),
        "share": shares.tolist(),
        "tokens": tokens_of,
        "raises": raises,  # tokens, by the estimate
    }
    save(directory, f"{reader.layer}/{reader.level}/table", table)


def write_measured(directory, model, reader, reading):
    """
    The measured effects of one level of one layer, by feature.

    Returns the correlation of each with its first-order estimate.
    """
    effects = reader.effects
    if effects is None:
        save(directory, f"{reader.layer}/{reader.level}/measured", {})
        return np.zeros(0)
    every_token = torch.arange(reading.n_vocab, device=effects.changes.device)
    slopes = reading.slopes[reader.layer]
    estimates = estimated(model, reader, slopes, effects.features, every_token)
    correlation = correlations(effects.changes, estimates)
    reach = effects.lengths / effects.lengths[:, :1].clamp_min(1e-12)
    found = {}
    for slot, row in enumerate(told(effects.changes[:, reading.among], reading.among)):
        row["tokens"] = int(effects.tokens[slot])
        row["estimate"] = rounded(estimates[slot, row["ids"]], 4)
        row["correlation"] = round(float(correlation[slot]), 3)
        row["reach"] = rounded(reach[slot], 3)
        found[int(effects.features[slot])] = row
    save(directory, f"{reader.layer}/{reader.level}/measured", found)
    return correlation


def level_summary(reader, n_tokens, correlation):
    """A level's part of the front page; correlation: of its measured features."""
    frequency = reader.counts / n_tokens
    decades = np.log10(np.maximum(frequency[frequency > 0], 1e-6))
    halves, _ = np.histogram(decades, bins=np.linspace(-6, 0, 13))  # half decades
    reach = []
    if len(correlation):
        lengths = reader.effects.lengths
        reach = (lengths / lengths[:, :1].clamp_min(1e-12)).mean(0)
    return {
        "dead": int((reader.counts == 0).sum()),
        "rare": int((frequency < RARE).sum()) if n_tokens > 1 / RARE else None,
        "frequencies": halves.tolist(),
        "measured": len(correlation),
        "correlation": round(float(correlation.mean()), 3) if len(correlation) else None,
        "reach": rounded(reach, 3),
    }


def card(checkpoint, model, reading):
    """The model in ten numbers: [what, value] of each."""
    config = model.config
    levels = model.saes()[0].levels
    n_tokens = reading.windows.size
    readers = [reader for layer in reading.readers for reader in layer]
    n_features = sum(reader.size for reader in readers)
    dead = sum(int((reader.counts == 0).sum()) for reader in readers)
    idx = torch.from_numpy(reading.windows[:batch_size]).to(model.wte.weight.device)
    share = model.explained(idx).mean().item()
    loss = checkpoint.get("best_val_loss")
    trained = checkpoint.get("windows_read")
    return [
        ["parameters", f"{model.get_num_params() / 1e6:,.2f}M"],
        ["layers of width", f"{config.n_layer} × {config.n_embd:,}"],
        ["tokens trained on", f"{trained * config.block_size:,}" if trained else "not known"],
        ["val loss, nats a token", f"{loss:.3f}" if loss else "not measured"],
        ["features a layer", " + ".join(f"{2**level.n:,}" for level in levels)],
        ["active a token", " + ".join(str(level.k) for level in levels)],
        ["explained, mean of layers", f"{share:.1%}"],
        ["tokens read here", f"{n_tokens:,}"],
        ["features never active here", f"{dead:,} of {n_features:,}"],
    ]


def write_windows(directory, windows, places):
    """The data that were read, some windows a file, and where each window lies."""
    in_file = max(1, WINDOWS_FILE // windows.shape[1])
    for first in range(0, len(windows), in_file):
        part = slice(first, first + in_file)
        save(directory, f"windows/{first // in_file}",
             {"ids": windows[part].tolist(), "places": places[part]})
    return in_file


def write_text_page(directory, model, encoding, ids):
    """The page of a text, ids (N,): its tokens, and per layer their codes by level."""
    for layer, codes in enumerate(walk(model, np.array([encoding.eot_token, *ids]))):
        rows = []
        for i in range(len(ids)):
            rows.append([[c.ids[i].tolist(), rounded(c.values[i])] for c in codes])
        save(directory, f"text/{layer}", rows)
    save(directory, "text/tokens", ids)


def write_vocabulary(directory, encoding):
    """Every token's text, or its bytes where they aren't whole characters."""
    words = []
    for word in token_words(encoding):
        try:
            words.append(word.decode())
        except UnicodeDecodeError:
            words.append(list(word))
    save(directory, "vocab", words)


def write_front(directory, model, reading, encoding, places, source):
    """The front page, of what is known before effects are measured. Returns what it tells."""
    page = os.path.join(os.path.dirname(os.path.abspath(__file__)), "features.html")
    shutil.copyfile(page, os.path.join(directory, "index.html"))
    sae = model.saes()[0]
    levels = []
    for level, bits in zip(sae.levels, sae.block_bits):
        levels.append({"n": level.n, "k": level.k, "m": bits})
    summary = []
    for layer in reading.readers:
        summary.append([level_summary(reader, reading.windows.size, []) for reader in layer])
    name = published(ckpt)
    site = {
        "unfinished": True,
        "checkpoint": name,
        "command": f"python sample.py --ckpt={shlex.quote(name)}",
        "tokens": reading.windows.size,
        "layers": len(reading.readers),
        "levels": levels,
        "chunk": CHUNK,
        "summary": summary,
        "rare": RARE,
        "files": [published(path) for path in source.paths],
        "data": [len(reading.windows), reading.windows.shape[1]],
        "windowsFile": write_windows(directory, reading.windows, places),
    }
    write_vocabulary(directory, encoding)
    save(directory, "pages", [])
    return site


def add_page(directory, name, title, script):
    """
    Add a page of another tool to a site, or replace it: #/name, with its title in the header.

    script: JavaScript that ends in loaded("name.page", parts => ...), a function that shows the
    page of an address #/name/part/... . All of features.html's functions are there for it (show, h,
    load, loadTables, captioned, histogram, ...), and what save wrote is there for load.
    """
    write_text(os.path.join(directory, "data", name + ".page.js"), script)
    pages = [page for page in saved(directory, "pages") if page["name"] != name]
    save(directory, "pages", [*pages, {"name": name, "title": title}])


# -----------------------------------------------------------------------------
# the script

def check_files():
    """Raise ValueError for a file that is missing or empty, before anything is loaded."""
    for path in (text, labels):
        if path and not os.path.isfile(path):
            raise ValueError(f"{path}: no such file")
        if path and not os.path.getsize(path):
            raise ValueError(f"{path}: there is nothing in it")


def choose_windows(source):
    """Windows of a source in a random order, (M, T), and [shard, first token in it] of each."""
    n = max(1, min(tokens // source.block_size, len(source)))
    numbers = permute(np.arange(n), len(source), (0, 0))
    shards = np.searchsorted(source.ends, numbers, side="right")
    firsts = np.concatenate([[0], source.ends])[shards]
    starts = (numbers - firsts) * source.block_size
    return source.read(numbers)[:, :-1], np.stack([shards, starts], 1).tolist()


@contextlib.contextmanager
def site_directory(model, windows):
    """
    out_dir to fill, and its file of codes: new, or as a run of the same model and windows left it.

    Raises ValueError if anything else is there.
    """
    if not out_dir.strip("/"):
        raise ValueError(f"out_dir={out_dir!r}: must name a new directory")
    digest = hashlib.sha256(windows.tobytes())
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    mark = os.path.join(out_dir, "unfinished")  # by which an interrupted run's is known
    codes = os.path.join(out_dir, "codes.bin")
    another = "choose another --out_dir, or remove it"
    if os.path.isdir(out_dir) and os.listdir(out_dir) and not os.path.exists(mark):
        raise ValueError(f"{out_dir} is there already: {another}")
    with lock(out_dir):
        begun = os.path.exists(codes) and os.path.getsize(codes)
        if begun and read_text(mark) != digest.hexdigest():
            raise ValueError(f"{out_dir} was begun with another checkpoint or other tokens: "
                             f"finish it with those, {another}")
        write_text(mark, digest.hexdigest())
        try:
            yield out_dir, codes
        except BaseException:
            whole = len(windows) * record_type(model, windows.shape[1]).itemsize
            share = os.path.getsize(codes) / whole if os.path.exists(codes) else 0
            print(f"{out_dir} is unfinished, with {share:.0%} of the codes: the same command goes "
                  "on from there", file=sys.stderr)
            raise
        os.remove(codes)
        os.remove(mark)


def main():
    at_least = dict(tokens=1, text_tokens=1, batch_size=1, n_top=1, n_random=1, n_measured=0)
    configure(globals(), at_least=at_least)
    check_files()
    checkpoint = load_checkpoint(ckpt)
    model = build_model(checkpoint, ckpt).to(pick_device(device)).eval()
    if not model.saes():
        raise ValueError(f"{ckpt} is a dense twin: it has no features")
    encoding = get_tokenizer(checkpoint["config"]["tokenizer"])
    by_hand = read_labels(labels, model.saes()) if labels else {}
    text_ids = encode(encoding, read_text(text)) if text else []
    source = run_windows(checkpoint["config"], split, data_dir)
    windows, places = choose_windows(source)
    with site_directory(model, windows) as (directory, codes):
        index = os.path.join(os.path.abspath(directory), "index.html")
        print(f"reading {windows.size:,} of {len(source) * source.block_size:,} tokens, drawn at "
              "random; --tokens sets how many")
        readers, slopes = read(model, windows, character_counts(encoding), codes)
        among = seen_tokens(windows, encoding.n_vocab, model.wte.weight.device)
        candidates, words = caption_candidates(windows, encoding)
        reading = Reading(windows, readers, slopes, candidates, among, encoding.n_vocab)
        site = write_front(directory, model, reading, encoding, places, source)
        site["card"] = card(checkpoint, model, reading)
        site["text"] = min(len(text_ids), text_tokens)
        site["textTokens"] = len(text_ids)
        site["textName"] = os.path.basename(text)
        save(directory, "words", words)
        save(directory, "labels", by_hand)
        save(directory, "site", site)
        print(f"open {index}: the front page is there, the others follow")
        every_reader = [reader for layer in readers for reader in layer]
        for reader in progress(every_reader, "writing", unit="level"):
            write_level(directory, model, reader, reading)
        if text_ids:
            write_text_page(directory, model, encoding, text_ids[:text_tokens])
        n_read = max(1, MEASURED_READ // windows.shape[1])
        measure(model, windows[:n_read], readers, encoding.n_vocab)
        for reader in every_reader:
            correlation = write_measured(directory, model, reader, reading)
            row = level_summary(reader, windows.size, correlation)
            site["summary"][reader.layer][reader.level] = row
        del site["unfinished"]
        save(directory, "site", site)
    if len(text_ids) > text_tokens:
        print(f"{text}: its first {text_tokens:,} of {len(text_ids):,} tokens have a page; "
              "--text_tokens raises the limit")
    print(f"{index} is whole")


if __name__ == "__main__":
    main()
