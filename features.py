"""
A site of static pages about a checkpoint's features: what they read, how often, beside what, and
what they write.

    python features.py --ckpt out/demo/ckpt.pt --out_dir=features   # then open features/index.html
    python features.py --ckpt ckpt.pt --data_dir=data/fineweb_edu --tokens=5e6 --text=essay.txt

It reads tokens of the data twice. The first time it counts, and keeps per feature the contexts of
its largest codes and a uniform sample of contexts, at most one a window; the second time it reads
the codes around them. Memory grows with the number of features, and by 8 bytes a token.

Definitions: frequency is the share of tokens at which a feature is active; co-active features are
those of other levels that are active at most of the sampled contexts, beyond what their frequency
explains. The logits that a feature promotes are the first-order effect of its code through its
block's MLP (with each neuron's mean slope of GELU over the data) and straight on to the
unembedding, without later blocks and the final norm's scale: up to a factor per token.
"""
import functools
import json
import os
import shutil

import numpy as np
import torch
from tqdm import tqdm

from cayley import Codes
from configurator import configure, run_main
from data import get_tokenizer, new_directory, read_text, run_windows
from model import load_model, pick_device

# settings, see configurator.py
ckpt = "out/ckpt.pt"
data_dir = ""  # directory of bins; "": the run's data_dir
split = "train"
out_dir = "features"  # a new directory
tokens = 2_000_000  # of the data, at most
text = ""  # a file whose tokens get a page with their active features
text_tokens = 20_000  # of it, at most
n_top = 6  # contexts of largest codes, per feature
n_random = 16  # sampled contexts, for tokens and co-active features
batch_size = 8
device = "auto"

BEFORE, AFTER = 12, 8  # tokens of a context around the feature's
SHOWN_RANDOM = 2  # sampled contexts on a feature's page
N_BINS = 20  # of the histogram of codes
CHUNK = 128  # features in a file


class BestContexts:
    """
    Per feature the `size` contexts of largest key, largest first.

    keys (F, size), and refs (F, size), token numbers, -1 where there is none.
    """

    def __init__(self, n_features, size):
        self.keys = np.full((n_features, size), -np.inf, dtype=np.float32)
        self.refs = np.full((n_features, size), -1, dtype=np.int64)

    def add(self, features, keys, refs, windows):
        """
        Offer contexts: (M,) features, keys, token numbers and window numbers.

        One a feature and window is taken.
        """
        good = np.flatnonzero(keys > self.keys[features, -1])
        good = good[np.lexsort((-keys[good], windows[good], features[good]))]
        features = features[good]
        keys = keys[good]
        refs = refs[good]
        windows = windows[good]
        first = np.ones(len(features), dtype=bool)
        first[1:] = (features[1:] != features[:-1]) | (windows[1:] != windows[:-1])
        touched, rows = np.unique(features[first], return_inverse=True)
        size = self.keys.shape[1]
        rows = np.concatenate([rows, np.repeat(np.arange(len(touched)), size)])
        keys = np.concatenate([keys[first], self.keys[touched].ravel()])
        refs = np.concatenate([refs[first], self.refs[touched].ravel()])
        order = np.lexsort((-keys, rows))
        rows = rows[order]
        rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
        best = rank < size
        self.keys[touched[rows[best]], rank[best]] = keys[order][best]
        self.refs[touched[rows[best]], rank[best]] = refs[order][best]


class LevelReader:
    """What is kept of one level of one layer."""

    def __init__(self, layer, level, sae):
        self.layer = layer
        self.level = level
        self.size = 2 ** sae.levels[level].n
        self.k = sae.levels[level].k
        self.counts = np.zeros(self.size, dtype=np.int64)
        self.sums = np.zeros(self.size)
        self.histogram = np.zeros((self.size, N_BINS), dtype=np.int64)
        self.range = None  # of the histogram
        self.top = BestContexts(self.size, n_top)
        self.random = BestContexts(self.size, n_random)

    def count(self, codes, first_window, rng):
        """Take in the codes, ids and values (B, T, k), of windows from number first_window."""
        ids, values = codes[self.level]
        B, T, k = ids.shape
        refs = np.repeat(np.arange(first_window * T, (first_window + B) * T), k)
        ids = ids.ravel()
        values = values.ravel()
        if self.range is None:  # of the first batch, and half as much again
            low, high = np.quantile(values, [0.0005, 0.9995])
            self.range = min(0.0, float(low) * 1.5), max(0.0, float(high) * 1.5) or 1.0
        self.counts += np.bincount(ids, minlength=self.size)
        self.sums += np.bincount(ids, values, minlength=self.size)
        low, high = self.range
        bins = ((values - low) / (high - low) * N_BINS).clip(0, N_BINS - 1).astype(np.int64)
        in_bins = np.bincount(ids * N_BINS + bins, minlength=self.histogram.size)
        self.histogram += in_bins.reshape(self.histogram.shape)
        self.top.add(ids, values, refs, refs // T)
        self.random.add(ids, rng.random(len(ids), dtype=np.float32), refs, refs // T)

    def start_contexts(self, T, k_others):
        """Between the two readings: the contexts to read, in the order of the data."""
        self.refs = np.concatenate([self.top.refs, self.random.refs], 1)  # (F, slots)
        self.shown = n_top + min(SHOWN_RANDOM, n_random)
        shape = (self.size, self.shown, BEFORE + 1 + AFTER)
        self.shades = np.zeros(shape, dtype=np.float16)
        self.beside = np.full((self.size, n_random, k_others), -1, dtype=np.int32)
        refs = self.refs.ravel()
        where = np.flatnonzero(refs >= 0)
        self.order = where[np.argsort(refs[where], kind="stable")]
        self.windows = refs[self.order] // T

    def read_contexts(self, codes, windows):
        """Take in the codes around this level's contexts in windows (their numbers, ascending)."""
        others = [c.ids for i, c in enumerate(codes) if i != self.level]
        beside = np.concatenate(others, -1) if others else None  # (B, T, k_others)
        for b, window in enumerate(windows):
            start, end = np.searchsorted(self.windows, [window, window + 1])
            for part in np.array_split(self.order[start:end], (end - start) // 4096 + 1):
                self._read_contexts_of_window(part, codes[self.level], beside, b)

    def _read_contexts_of_window(self, part, codes, beside, b):
        """Of contexts by their numbers in refs (R,), which lie in row b of a batch of codes."""
        T = codes.ids.shape[1]
        feature, slot = np.divmod(part, self.refs.shape[1])
        position = self.refs[feature, slot] % T
        near = position[:, None] + np.arange(-BEFORE, AFTER + 1)  # (R, tokens of a context)
        inside = (near >= 0) & (near < T)
        near = near.clip(0, T - 1)
        mine = codes.ids[b, near] == feature[:, None, None]  # (R, tokens, k)
        shade = (codes.values[b, near] * mine).sum(-1) * inside
        on_page = slot < self.shown
        self.shades[feature[on_page], slot[on_page]] = shade[on_page]
        sampled = slot >= n_top
        if beside is not None:
            rows = beside[b, position[sampled]]
            self.beside[feature[sampled], slot[sampled] - n_top] = rows


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


def read(model, windows):
    """
    Both readings of windows, an (M, T) array.

    Returns a LevelReader per layer and level, and each layer's mean GELU slopes (4d,).
    """
    readers = []
    for layer, sae in enumerate(model.saes()):
        readers.append([LevelReader(layer, level, sae) for level in range(len(sae.levels))])
    rng = np.random.default_rng(0)
    with GeluSlopes(model) as slopes:
        for first in tqdm(range(0, len(windows), batch_size), desc="counting", unit="batch"):
            batch = codes_of(model, windows[first:first + batch_size])
            for layer, codes in zip(readers, batch):
                for reader in layer:
                    reader.count(codes, first, rng)
    for layer in readers:
        for reader in layer:
            k_others = sum(other.k for other in layer if other is not reader)
            reader.start_contexts(windows.shape[1], k_others)
    wanted = np.unique(np.concatenate([reader.windows for layer in readers for reader in layer]))
    for first in tqdm(range(0, len(wanted), batch_size), desc="contexts", unit="batch"):
        chosen = wanted[first:first + batch_size]
        for layer, codes in zip(readers, codes_of(model, windows[chosen])):
            for reader in layer:
                reader.read_contexts(codes, chosen)
    return readers, slopes.means()


@torch.no_grad()
def logit_effects(model, layer, level, features, slopes, n_vocab, n=10):
    """
    Tokens whose logits features raise and lower most per unit of code.

    Returns ids and values (len(features), 2 n), most raised first.
    """
    block = model.blocks[layer]
    hidden = block.mlp.c_fc.weight @ block.sae.atoms(level, features).T  # (4d, features)
    written = block.mlp.c_proj.weight @ (slopes[:, None] * hidden)  # (d, features)
    logits = (model.wte.weight[:n_vocab] @ (model.ln_f.weight[:, None] * written)).T
    up = logits.topk(n)  # of (features, V)
    down = logits.topk(n, largest=False)
    ids = torch.cat([up.indices, down.indices.flip(1)], 1)
    values = torch.cat([up.values, down.values.flip(1)], 1)
    return ids.cpu().numpy(), values.cpu().numpy()


# -----------------------------------------------------------------------------
# writing the site

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


def context(reader, feature, slot, windows):
    """[place of the token, tokens around it, the feature's code at each, whether it is sampled]."""
    T = windows.shape[1]
    window, position = divmod(int(reader.refs[feature, slot]), T)
    start = max(0, position - BEFORE)
    end = min(T, position + AFTER + 1)
    before = position - BEFORE
    shade = reader.shades[feature, slot][start - before:end - before]
    return [position - start, windows[window, start:end].tolist(), rounded(shade),
            int(slot >= n_top)]


def write_level(directory, model, reader, layer_readers, windows, slopes, n_vocab):
    """The table of one level of one layer, and its features in chunks."""
    flat = windows.ravel()
    others = [other for other in layer_readers if other is not reader]
    table = {
        "count": reader.counts.tolist(),
        "mean": rounded(reader.sums / reader.counts.clip(1)),
        "max": [],
        "tokens": [],
    }
    for first in range(0, reader.size, CHUNK):
        features = np.arange(first, min(first + CHUNK, reader.size))
        effects = logit_effects(model, reader.layer, reader.level, features, slopes, n_vocab)
        pages = []
        for feature, logit_ids, logit_values in zip(features, *effects):
            refs = reader.refs[feature]
            ids, counts = np.unique(flat[refs[refs >= 0]], return_counts=True)
            table["tokens"].append(ids[np.argsort(-counts, kind="stable")][:4].tolist())
            largest = float(reader.top.keys[feature, 0]) if refs[0] >= 0 else 0.0
            table["max"].append(round(largest, 2))
            slots = [slot for slot in range(reader.shown) if refs[slot] >= 0]
            pages.append({
                "contexts": [context(reader, feature, slot, windows) for slot in slots],
                "histogram": reader.histogram[feature].tolist(),
                "up": logit_ids[:10].tolist(),
                "down": logit_ids[:9:-1].tolist(),
                "upBy": rounded(logit_values[:10], 3),
                "downBy": rounded(logit_values[:9:-1], 3),
                "beside": co_active(reader, feature, others, flat.size),
            })
        save(directory, f"{reader.layer}/{reader.level}/{first // CHUNK}", pages)
    save(directory, f"{reader.layer}/{reader.level}/table", table)


def text_windows(ids, block_size):
    """
    (start, end, first new token) of windows that cover ids.

    Each begins half a block after the one before, so that all but the first tokens are read with
    half a block of context at least.
    """
    windows = [(0, min(block_size, len(ids)), 0)]
    while windows[-1][1] < len(ids):
        start, end, _ = windows[-1]
        start += max(1, block_size // 2)
        windows.append((start, min(start + block_size, len(ids)), end))
    return windows


def write_text_page(directory, model, encoding, ids):
    """The page of a text, a list of ids: its tokens, and per layer their codes by level."""
    read_ids = [encoding.eot_token] + ids
    layers = [[] for _ in model.saes()]
    for start, end, first in text_windows(read_ids, model.config.block_size):
        codes_by_layer = codes_of(model, np.array([read_ids[start:end]]))
        for tokens, codes in zip(layers, codes_by_layer):
            for i in range(first - start, end - start):
                tokens.append([[c.ids[0, i].tolist(), rounded(c.values[0, i])] for c in codes])
    for layer, tokens in enumerate(layers):
        save(directory, f"text/{layer}", tokens[1:])  # without end of text
    save(directory, "text/tokens", ids)


def vocabulary(encoding):
    """The text of every token of a tokenizer."""
    words = []
    for i in range(encoding.n_vocab):
        if i == encoding.eot_token:
            words.append("<|endoftext|>")
        else:
            words.append(encoding.decode_single_token_bytes(i).decode("utf-8", errors="replace"))
    return words


def write_site(directory, model, encoding, windows, readers, slopes, text_ids):
    """All files of the site in a new directory."""
    page = os.path.join(os.path.dirname(os.path.abspath(__file__)), "features.html")
    shutil.copyfile(page, os.path.join(directory, "index.html"))
    n_features = sum(reader.size for layer in readers for reader in layer)
    with tqdm(total=n_features, desc="writing", unit="feature") as bar:
        for layer, slope in zip(readers, slopes):
            for reader in layer:
                write_level(directory, model, reader, layer, windows, slope, encoding.n_vocab)
                bar.update(reader.size)
    save(directory, "vocab", vocabulary(encoding))
    sae = model.saes()[0]
    levels = []
    for i, level in enumerate(sae.levels):
        ranges = [layer[i].range for layer in readers]
        levels.append({"n": level.n, "k": level.k, "m": sae.block_bits[i], "ranges": ranges})
    save(directory, "site", {
        "checkpoint": os.path.abspath(ckpt),
        "tokens": windows.size,
        "layers": len(readers),
        "chunk": CHUNK,
        "levels": levels,
        "text": len(text_ids),
    })
    if text_ids:
        write_text_page(directory, model, encoding, text_ids)


def check_settings():
    """Raise ValueError for a setting that makes no sense, before anything is loaded."""
    for key in ("tokens", "text_tokens", "batch_size", "n_top", "n_random"):
        if globals()[key] < 1:
            raise ValueError(f"{key}={globals()[key]}: must be at least 1")
    if text and not os.path.isfile(text):
        raise ValueError(f"{text}: no such file")


def main():
    configure(globals())
    check_settings()
    with new_directory(out_dir) as directory:
        model, config = load_model(ckpt, pick_device(device))
        if not model.saes():
            raise ValueError(f"{ckpt} is a dense twin: it has no features")
        encoding = get_tokenizer(config["tokenizer"])
        text_ids = []
        if text:
            text_ids = encoding.encode_ordinary(read_text(text))
            if len(text_ids) > text_tokens:
                print(f"{text}: its first {text_tokens:,} tokens of {len(text_ids):,} are read, "
                      "see --text_tokens")
            text_ids = text_ids[:text_tokens]
        source = run_windows(config, split, data_dir)
        n_windows = max(1, min(tokens // model.config.block_size, len(source)))
        windows = source.shuffled(0, n_windows, seed=0)[:, :-1]
        readers, slopes = read(model, windows)
        write_site(directory, model, encoding, windows, readers, slopes, text_ids)
    print(f"open {os.path.join(os.path.abspath(out_dir), 'index.html')}")


if __name__ == "__main__":
    run_main(main)
