"""
A site of static pages about a checkpoint's features: what they read, how often, beside what, and
what they do.

    python -m tools.features --ckpt out/demo/ckpt.pt --out_dir=features  # open its index.html
    python -m tools.features --ckpt ckpt.pt --data_dir=data/fineweb_edu --tokens=5e6 --text=a.txt
    python -m tools.features --ckpt ckpt.pt --labels=labels.json  # {"0.1.517": "a label by hand"}

It reads tokens of the data three times. First it counts, and keeps per feature the contexts of its
largest codes and a uniform sample of contexts, at most one a window. Then it reads the codes around
them. Then it steers the features that are active most often and measures what changes. Memory:
about 9 kB a feature and 40 bytes a token, and in the third reading 4 bytes times the vocabulary for
each feature that is measured (n_measured a level and layer). records/features_site has times.

Definitions
- frequency: the share of tokens at which a feature is active. dead and rare: as in evals.py.
- caption: what the sampled contexts have in common more than the data: the feature's token, the
  token before or after it, its word, or its place in the line. Of all candidates that at least 20%
  of the contexts fit it is the one with the largest likelihood ratio against its frequency in the
  data (Dunning, Computational Linguistics 19(1), 1993), told with that share; "mixed" if none is.
- co-active: features of other levels that are active at most of the sampled contexts, beyond what
  their frequency explains.
- steer: a feature's mean code over the data, which is added to its code.
- measured effect: at up to 256 of its active tokens in expectation, drawn at random, the feature is
  steered at that token alone and the later layers run again. It is the mean change of the next
  token's log-probabilities, in nats.
- first-order estimate: the steer's change of the logits through its block's MLP, with each neuron's
  mean slope of GELU over the data, and straight on to the unembedding: without later layers and the
  final norm's scale, so up to a factor per token. Its correlation with the measured effect over the
  vocabulary stands beside it.
- Tokens that a feature raises and lowers are among those that the data have at least 10 times.
- reach: the length of the steer's change of the residual stream at its token, after each later
  layer, relative to the length after its own.
"""
if not __package__:
    raise SystemExit("from the repository's root: python -m tools.features")

import functools
import json
import math
import os
import re
import shutil
from configurator import configure
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from cayley import Codes
from checkpoint import build_model, load_checkpoint, pick_device
from data import get_tokenizer, new_directory, permute, read_text, run_windows
from model import KVCache
from tools.evals import RARE, code_statistics, explained

# settings, see configurator.py
ckpt = "out/ckpt.pt"
data_dir = ""  # directory of bins; "": the run's data_dir
split = "train"
out_dir = "features"  # a new directory
tokens = 2_000_000  # of the data, at most
text = ""  # a file that gets a page with its active features
text_tokens = 20_000  # of that file, at most
labels = ""  # a JSON file with labels by hand, {"layer.level.feature": "text"}
n_top = 6  # contexts of largest codes, per feature
n_random = 32  # sampled contexts, for captions, quantiles and co-active features
n_measured = 256  # features per level and layer whose effects are measured, the most frequent
batch_size = 8
device = "auto"

BEFORE, AFTER = 40, 20  # characters of a context around its token; the window may have fewer
QUANTILES = (0.9, 0.7, 0.5, 0.3, 0.1)  # of a feature's sampled codes, whose contexts are shown
N_BINS = 20  # of the histogram of codes
CHUNK = 128  # features in a file
WINDOWS_FILE = 16_384  # tokens of the data in a file
MEASURED_TOKENS = 256  # in expectation, for each measured feature
ROWS = 2048  # of them at once
SEEN = 10  # times a token is in the data, to be told as raised or lowered
LEAST_SHARE = 0.2  # of the sampled contexts, to be a caption


# -----------------------------------------------------------------------------
# contexts

class BestContexts:
    """
    Per feature the `size` contexts of largest key, largest first.

    keys (F, size); refs (F, size), token numbers, -1 where there is none; codes (F, size).
    """

    def __init__(self, n_features, size):
        self.keys = np.full((n_features, size), -np.inf, dtype=np.float32)
        self.refs = np.full((n_features, size), -1, dtype=np.int64)
        self.codes = np.zeros((n_features, size), dtype=np.float32)

    def add(self, features, keys, refs, windows, codes=None):
        """
        Offer contexts: (M,) features, keys, token numbers, window numbers, codes (default: keys).

        One a feature and window is taken.
        """
        codes = keys if codes is None else codes
        good = np.flatnonzero(keys > self.keys[features, -1])
        good = good[np.lexsort((-keys[good], windows[good], features[good]))]
        new_window = np.diff(windows[good], prepend=-1) != 0
        new_feature = np.diff(features[good], prepend=-1) != 0
        good = good[new_window | new_feature]
        touched, rows = np.unique(features[good], return_inverse=True)
        size = self.keys.shape[1]
        rows = np.concatenate([rows, np.repeat(np.arange(len(touched)), size)])
        keys = np.concatenate([keys[good], self.keys[touched].ravel()])
        order = np.lexsort((-keys, rows))
        rows = rows[order]
        rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
        best = rank < size
        for mine, new in ((self.refs, refs), (self.codes, codes)):
            both = np.concatenate([new[good], mine[touched].ravel()])
            mine[touched[rows[best]], rank[best]] = both[order][best]
        self.keys[touched[rows[best]], rank[best]] = keys[order][best]


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
    """What is kept of one level of one layer."""

    def __init__(self, layer, level, sae):
        self.layer = layer
        self.level = level
        self.size = 2 ** sae.levels[level].n
        self.k = sae.levels[level].k
        self.counts = np.zeros(self.size, dtype=np.int64)
        self.sums = np.zeros(self.size)
        self.low = np.full(self.size, np.inf, dtype=np.float32)  # smallest code
        self.high = np.full(self.size, -np.inf, dtype=np.float32)
        self.top = BestContexts(self.size, n_top)
        self.random = BestContexts(self.size, n_random)
        self.effects = None  # Effects, where measured

    def count(self, codes, first_window, rng):
        """Take in the codes, ids and values (B, T, k), of windows from number first_window."""
        ids, values = codes[self.level]
        B, T, k = ids.shape
        refs = np.repeat(np.arange(first_window * T, (first_window + B) * T), k)
        ids = ids.ravel()
        values = values.ravel()
        self.counts += np.bincount(ids, minlength=self.size)
        self.sums += np.bincount(ids, values, minlength=self.size)
        np.minimum.at(self.low, ids, values)
        np.maximum.at(self.high, ids, values)
        self.top.add(ids, values, refs, refs // T)
        keys = rng.random(len(ids), dtype=np.float32)
        self.random.add(ids, keys, refs, refs // T, values)

    def start_contexts(self, ends, T, others):
        """Between the first readings: the contexts to read, in the order of the data."""
        self.steer = np.where(self.counts > 0, self.sums / self.counts.clip(1), 1.0)
        self.histogram = np.zeros((self.size, N_BINS), dtype=np.int64)
        self.refs = np.concatenate([self.top.refs, self.random.refs], 1)  # (F, slots)
        self.start, self.end = context_bounds(ends, self.refs.clip(0), T)
        quantiles = quantile_slots(self.random.codes, self.random.refs >= 0)
        on_top = np.take_along_axis(self.random.refs, quantiles.clip(0), 1)[:, :, None]
        repeated = (on_top == self.top.refs[:, None]).any(-1)
        quantiles = np.where(repeated | (quantiles < 0), -1, quantiles + n_top)
        top = np.where(self.top.refs >= 0, np.arange(n_top), -1)
        self.shown = np.concatenate([top, quantiles], 1)  # (F, slots on the page), -1: none
        self.on_page = np.zeros(self.refs.shape, dtype=bool)
        feature, column = np.nonzero(self.shown >= 0)
        self.on_page[feature, self.shown[feature, column]] = True
        most = max((other.size for other in others), default=0)
        self.beside = np.full(
            (self.size, n_random, sum(other.k for other in others)),
            -1,
            dtype=np.int16 if most < 2**15 else np.int32,
        )
        self.shades = []  # of the contexts on the page: (number in refs, token, code)
        refs = self.refs.ravel()
        where = np.flatnonzero(refs >= 0)
        self.order = where[np.argsort(refs[where], kind="stable")]
        self.windows = refs[self.order] // T

    def read_contexts(self, codes, first_window):
        """Take in the codes of windows from number first_window: histograms, and contexts."""
        ids, values = codes[self.level]
        span = np.where(self.high > self.low, self.high - self.low, 1)
        bins = (values - self.low[ids]) / span[ids] * N_BINS
        bins = ids * N_BINS + bins.astype(np.int64).clip(0, N_BINS - 1)
        in_bins = np.bincount(bins.ravel(), minlength=self.histogram.size)
        self.histogram += in_bins.reshape(self.histogram.shape)
        others = [c.ids for i, c in enumerate(codes) if i != self.level]
        beside = np.concatenate(others, -1) if others else None  # (B, T, k_others)
        for b in range(len(ids)):
            window = first_window + b
            start, end = np.searchsorted(self.windows, [window, window + 1])
            for part in np.array_split(self.order[start:end], (end - start) // 4096 + 1):
                self._read_contexts_of_window(part, ids[b], values[b], window)
                feature, slot = np.divmod(part, self.refs.shape[1])
                sampled = slot >= n_top
                if beside is not None:
                    at = self.refs[feature, slot][sampled] % ids.shape[1]
                    self.beside[feature[sampled], slot[sampled] - n_top] = beside[b, at]

    def _read_contexts_of_window(self, part, ids, values, window):
        """Of contexts by their numbers in refs (R,): the codes, ids and values (T, k), around."""
        part = part[self.on_page.ravel()[part]]
        if not len(part):
            return
        T = len(ids)
        feature = part // self.refs.shape[1]
        start = self.start.ravel()[part] - window * T
        end = self.end.ravel()[part] - window * T
        near = start[:, None] + np.arange((end - start).max())  # (R, tokens)
        mine = ids[near.clip(0, T - 1)] == feature[:, None, None]  # (R, tokens, k)
        mine &= (near < end[:, None])[..., None]
        row, column, place = np.nonzero(mine)
        at = near[row, column]
        self.shades.append((part[row], at + window * T, values[at, place].astype(np.float32)))

    def finish_contexts(self):
        """After the second reading: shades in the order of the contexts."""
        parts = zip(*self.shades) if self.shades else [[np.zeros(0, dtype=np.int64)]] * 3
        number, at, code = [np.concatenate(part) for part in parts]
        order = np.lexsort((at, number))
        self.shades = number[order], at[order], code[order]

    def shades_of(self, feature, slot):
        """Tokens (S,) around a context at which its feature is active, and its codes (S,) there."""
        numbers, at, codes = self.shades
        number = feature * self.refs.shape[1] + slot
        start, end = np.searchsorted(numbers, [number, number + 1])
        return at[start:end], codes[start:end]


# -----------------------------------------------------------------------------
# reading the data

@torch.no_grad()
def codes_of(model, idx):
    """idx (B, T) -> per layer and level Codes of numpy arrays (B, T, k)."""
    idx = torch.from_numpy(idx).to(model.wte.weight.device)
    layers = []
    for codes in model.run_with_codes(idx, n_logits=1)[1]:
        layers.append([Codes(c.ids.cpu().numpy(), c.values.float().cpu().numpy()) for c in codes])
    return layers


class GeluSlopes:
    """While it is entered: each layer's mean slope of GELU per neuron, over the tokens read."""

    def __init__(self, model):
        self.layers = [block.mlp.c_fc for block in model.blocks]
        self.sums = [0.0] * len(self.layers)  # (4d,) each
        self.tokens = 0

    def __enter__(self):
        self.hooks = []
        for layer, c_fc in enumerate(self.layers):
            self.hooks.append(c_fc.register_forward_hook(functools.partial(self._add, layer)))
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def _add(self, layer, module, inputs, output):
        hidden = output.float().flatten(0, 1)  # (N, 4d)
        slopes = torch.ops.aten.gelu_backward(torch.ones_like(hidden), hidden)
        self.sums[layer] = self.sums[layer] + slopes.sum(0)
        self.tokens += len(hidden) if layer == 0 else 0

    def means(self):
        return [sums / self.tokens for sums in self.sums]


def batches(windows, label):
    """The number of each batch's first window and its windows, with a progress bar."""
    for first in tqdm(range(0, len(windows), batch_size), desc=label, unit="batch"):
        yield first, windows[first:first + batch_size]


def read(model, windows, characters):
    """
    The first two readings of windows (M, T); characters (V,) of each token.

    Returns a LevelReader per layer and level, and each layer's mean GELU slopes (4d,).
    """
    readers = []
    for layer, sae in enumerate(model.saes()):
        readers.append([LevelReader(layer, level, sae) for level in range(len(sae.levels))])
    rng = np.random.default_rng(0)
    with GeluSlopes(model) as slopes:
        for first, batch in batches(windows, "counting"):
            for layer, codes in zip(readers, codes_of(model, batch)):
                for reader in layer:
                    reader.count(codes, first, rng)
    ends = np.concatenate([[0], np.cumsum(characters[windows.ravel()])])
    for layer in readers:
        for reader in layer:
            others = [other for other in layer if other is not reader]
            reader.start_contexts(ends, windows.shape[1], others)
    for first, batch in batches(windows, "contexts"):
        for layer, codes in zip(readers, codes_of(model, batch)):
            for reader in layer:
                reader.read_contexts(codes, first)
    for layer in readers:
        for reader in layer:
            reader.finish_contexts()
    return readers, slopes.means()


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
# effects: the first-order estimate, and the third reading, which measures

@torch.no_grad()
def first_order(model, layer, level, features, slopes, n_vocab):
    """Changes of the logits per unit of code to first order, (len(features), n_vocab)."""
    block = model.blocks[layer]
    hidden = block.mlp.c_fc.weight @ block.sae.atoms(level, features).T  # (4d, features)
    written = block.mlp.c_proj.weight @ (slopes[:, None] * hidden)  # (d, features)
    return (model.wte.weight[:n_vocab] @ (model.ln_f.weight[:, None] * written)).T


def extremes(effects, among, n=10):
    """
    The tokens, of some (A,), that effects (features, V) raise and lower most.

    Returns ids and values (features, 2 n), most raised first; fewer of fewer than 2 n tokens.
    """
    n = min(n, len(among) // 2)
    effects = effects[:, among]
    up = effects.topk(n)
    down = effects.topk(n, largest=False)
    ids = among[torch.cat([up.indices, down.indices.flip(1)], 1)]
    values = torch.cat([up.values, down.values.flip(1)], 1)
    return ids.cpu().numpy(), values.cpu().numpy()


def seen_tokens(windows, n_vocab, device):
    """The tokens that windows have often enough to be told as raised or lowered; at least 20."""
    counts = np.bincount(windows.ravel(), minlength=n_vocab)
    least = min(SEEN, np.sort(counts)[::-1][:20].min())
    return torch.from_numpy(np.flatnonzero(counts >= least)).to(device)


class Effects:
    """Sums over tokens at which features of one level were steered; m features."""

    def __init__(self, features, n_features, n_layers, n_vocab, device):
        self.features = features  # (m,), ascending
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
    chance = MEASURED_TOKENS / reader.counts[effects.features]
    chance = torch.from_numpy(chance).float().to(device)
    drawn = torch.rand(ids.shape, generator=generator, device=device) < chance[slots.clamp_min(0)]
    where = torch.nonzero(drawn & (slots >= 0))  # (R, 3), ascending
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
    """The third reading: the effects of each level's n_measured most frequent features."""
    device = model.wte.weight.device
    for layer in readers:
        for reader in layer:
            features = np.argsort(-reader.counts, kind="stable")[:n_measured]
            features = np.sort(features[reader.counts[features] > 0])
            n_layers = len(readers) - reader.layer
            reader.effects = Effects(features, reader.size, n_layers, n_vocab, device)
    if n_measured == 0:
        return
    generator = torch.Generator(device).manual_seed(0)
    for _, batch in batches(windows, "measuring"):
        base = forward(model, torch.from_numpy(batch).to(device))
        for layer in readers:
            for reader in layer:
                measure_level(model, reader, base, generator)
    for layer in readers:
        for reader in layer:
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
    """What the readings found, for the pages."""

    windows: np.ndarray  # (M, T)
    readers: list  # per layer and level a LevelReader
    slopes: list  # per layer (4d,)
    candidates: list  # of captions, (M, T) each
    among: torch.Tensor  # tokens that are told as raised and lowered


def save(directory, key, value):
    """data/key.js, which hands value to the page: a script, as file:// pages can't fetch."""
    path = os.path.join(directory, "data", key + ".js")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"loaded({json.dumps(key)},{json.dumps(value, separators=(',', ':'))})")


def rounded(values, digits=2):
    return [round(float(v), digits) for v in values]


def co_active(reader, feature, others, n_tokens, limit=8):
    """
    Features of other levels, by how far they exceed their frequency beside a feature.

    Returns [level, id, samples beside the feature] of each.
    """
    rows = reader.beside[feature][reader.random.refs[feature] >= 0]  # (samples, k_others)
    found = []
    start = 0
    for other in others:
        ids, counts = np.unique(rows[:, start:start + other.k], return_counts=True)
        excess = counts - other.counts[ids] / n_tokens * len(rows)
        for e, i, count in zip(excess, ids, counts):
            found.append((e, other.level, int(i), int(count)))
        start += other.k
    return [list(row[1:]) for row in sorted(found, reverse=True)[:limit]]


def context(reader, feature, column, T):
    """
    A context on a feature's page: window, token in it, first and last token, codes, quantile.

    Codes are token, code, token, code, ... wherever the feature is active; the quantile is a
    percentage, or -1 for a context of one of the largest codes.
    """
    slot = reader.shown[feature, column]
    ref = int(reader.refs[feature, slot])
    window = ref // T
    at, codes = reader.shades_of(feature, slot)
    shades = []
    for token, code in zip((at - window * T).tolist(), rounded(codes)):
        shades += [token, code]
    start = int(reader.start[feature, slot]) - window * T
    end = int(reader.end[feature, slot]) - window * T
    quantile = round(100 * QUANTILES[column - n_top]) if column >= n_top else -1
    return [window, ref % T, start, end, shades, quantile]


def measured_effects(effects, slot, among, estimate, correlation):
    """The measured effects of a feature for its page; estimate (V,): its first-order one."""
    change = effects.changes[slot]
    ids, values = (part[0] for part in extremes(change[None], among))
    lengths = effects.lengths[slot]
    return {
        "tokens": int(effects.tokens[slot]),
        "ids": ids.tolist(),
        "by": rounded(values, 4),
        "estimate": rounded(estimate[ids], 4),
        "correlation": round(float(correlation), 3),
        "reach": rounded(lengths / lengths[0].clamp_min(1e-12), 3),
    }


def write_chunk(directory, model, reader, reading, features, table):
    """The pages of some features of a level; fills the table's columns that need their effects."""
    readers = reading.readers[reader.layer]
    others = [other for other in readers if other is not reader]
    n_vocab = reader.effects.changes.shape[1]
    slopes = reading.slopes[reader.layer]
    estimates = first_order(model, reader.layer, reader.level, features, slopes, n_vocab)
    steer = torch.from_numpy(reader.steer[features]).float().to(estimates.device)
    estimates = estimates * steer[:, None]
    slots = reader.effects.slots.cpu().numpy()[features]
    measured = np.flatnonzero(slots >= 0)
    correlation = np.zeros(len(features))
    changes = reader.effects.changes[slots[measured]]
    correlation[measured] = correlations(changes, estimates[measured])
    pages = []
    told = extremes(estimates, reading.among)
    for row, (feature, ids, values) in enumerate(zip(features, *told)):
        columns = np.flatnonzero(reader.shown[feature] >= 0)
        page = {
            "contexts": [context(reader, feature, i, reading.windows.shape[1]) for i in columns],
            "sampled": int((reader.random.refs[feature] >= 0).sum()),
            "histogram": reader.histogram[feature].tolist(),
            "ids": ids.tolist(),
            "by": rounded(values, 4),
            "beside": co_active(reader, feature, others, reading.windows.size),
        }
        if reader.counts[feature]:
            page["range"] = rounded([reader.low[feature], reader.high[feature]], 3)
        if slots[row] >= 0:
            page["measured"] = measured_effects(
                reader.effects, slots[row], reading.among, estimates[row].cpu(), correlation[row]
            )
            table["measured"].append(int(feature))
        best = page.get("measured", page)
        table["raises"].append([i for i, by in zip(best["ids"][:3], best["by"]) if by > 0])
        pages.append(page)
    save(directory, f"{reader.layer}/{reader.level}/{features[0] // CHUNK}", pages)
    return correlation[measured]


def write_level(directory, model, reader, reading):
    """
    The table of one level of one layer, and its features in chunks.

    Returns the correlations of first-order and measured effects.
    """
    flat = reading.windows.ravel()
    kinds, said, shares = captions(reader.random.refs, reading.candidates)
    tokens_of = []
    for refs in reader.refs:
        ids, counts = np.unique(flat[refs[refs >= 0]], return_counts=True)
        tokens_of.append(ids[np.argsort(-counts, kind="stable")][:4].tolist())
    table = {
        "count": reader.counts.tolist(),
        "mean": rounded(reader.steer),
        "max": rounded(np.where(reader.counts > 0, reader.high, 0)),
        "kind": kinds.tolist(),
        "says": said.tolist(),
        "share": shares.tolist(),
        "tokens": tokens_of,
        "raises": [],  # tokens, by the measured effect where there is one
        "measured": [],  # features
    }
    found = []
    for first in range(0, reader.size, CHUNK):
        features = np.arange(first, min(first + CHUNK, reader.size))
        found.append(write_chunk(directory, model, reader, reading, features, table))
    save(directory, f"{reader.layer}/{reader.level}/table", table)
    return np.concatenate(found)


def level_summary(reader, n_tokens, correlation):
    """A level's part of the front page."""
    frequency = reader.counts / n_tokens
    decades = np.log10(np.maximum(frequency[frequency > 0], 1e-6))
    halves, _ = np.histogram(decades, bins=np.linspace(-6, 0, 13))  # half decades
    lengths = reader.effects.lengths
    reach = (lengths / lengths[:, :1].clamp_min(1e-12)).mean(0) if len(lengths) else []
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
    share = explained(code_statistics(model, idx)[:, :3]).mean().item()
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
        ["measured effects", f"{sum(len(r.effects.features) for r in readers):,} features"],
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


def write_site(directory, model, reading, source):
    """The pages of the features; source: of the data. Returns what the front page says of them."""
    page = os.path.join(os.path.dirname(os.path.abspath(__file__)), "features.html")
    shutil.copyfile(page, os.path.join(directory, "index.html"))
    n_features = sum(reader.size for layer in reading.readers for reader in layer)
    summary = []
    with tqdm(total=n_features, desc="writing", unit="feature") as bar:
        for layer in reading.readers:
            summary.append([])
            for reader in layer:
                correlation = write_level(directory, model, reader, reading)
                summary[-1].append(level_summary(reader, reading.windows.size, correlation))
                bar.update(reader.size)
    sae = model.saes()[0]
    levels = []
    for level, bits in zip(sae.levels, sae.block_bits):
        levels.append({"n": level.n, "k": level.k, "m": bits})
    return {
        "checkpoint": os.path.abspath(ckpt),
        "tokens": reading.windows.size,
        "layers": len(reading.readers),
        "levels": levels,
        "chunk": CHUNK,
        "summary": summary,
        "steered": MEASURED_TOKENS,
        "rare": RARE,
        "files": source.paths,
        "data": [len(reading.windows), reading.windows.shape[1]],
    }


# -----------------------------------------------------------------------------
# the script

def check_settings():
    """Raise ValueError for a setting that makes no sense, before anything is loaded."""
    for key in ("tokens", "text_tokens", "batch_size", "n_top", "n_random"):
        if globals()[key] < 1:
            raise ValueError(f"{key}={globals()[key]}: must be at least 1")
    if n_measured < 0:
        raise ValueError(f"n_measured={n_measured}: must be at least 0")
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


def main():
    configure(globals())
    check_settings()
    with new_directory(out_dir) as directory:
        checkpoint = load_checkpoint(ckpt)
        model = build_model(checkpoint, ckpt).to(pick_device(device)).eval()
        if not model.saes():
            raise ValueError(f"{ckpt} is a dense twin: it has no features")
        encoding = get_tokenizer(checkpoint["config"]["tokenizer"])
        by_hand = read_labels(labels, model.saes()) if labels else {}
        text_ids = encoding.encode_ordinary(read_text(text)) if text else []
        source = run_windows(checkpoint["config"], split, data_dir)
        windows, places = choose_windows(source)
        readers, slopes = read(model, windows, character_counts(encoding))
        measure(model, windows, readers, encoding.n_vocab)
        candidates, words = caption_candidates(windows, encoding)
        among = seen_tokens(windows, encoding.n_vocab, model.wte.weight.device)
        reading = Reading(windows, readers, slopes, candidates, among)
        site = write_site(directory, model, reading, source)
        site["card"] = card(checkpoint, model, reading)
        site["windowsFile"] = write_windows(directory, windows, places)
        site["text"] = min(len(text_ids), text_tokens)
        site["textTokens"] = len(text_ids)
        site["textName"] = os.path.basename(text)
        if text_ids:
            write_text_page(directory, model, encoding, text_ids[:text_tokens])
        write_vocabulary(directory, encoding)
        save(directory, "words", words)
        save(directory, "labels", by_hand)
        save(directory, "site", site)
    if len(text_ids) > text_tokens:
        print(f"{text}: its first {text_tokens:,} of {len(text_ids):,} tokens have a page; "
              "--text_tokens raises the limit")
    print(f"open {os.path.join(os.path.abspath(out_dir), 'index.html')}")


if __name__ == "__main__":
    main()
