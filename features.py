"""
A site of static pages about a checkpoint's features: what they read, how often, beside what, and what they write.

    python features.py --ckpt out/demo/ckpt.pt --out=features              # then open features/index.html, no server
    python features.py --ckpt ckpt.pt --data=data/fineweb_edu --tokens=5e6 --text=essay.txt --out=features

It reads tokens of the data twice. The first time it counts, and keeps per feature the contexts of its largest codes and
a uniform sample of contexts, at most one a window; the second time it reads the codes around them. Memory grows with the
number of features, and by 8 bytes a token.

Definitions: frequency is the share of tokens at which a feature is active; co-active features are those of other levels
that are active at most of the sampled contexts, beyond what their frequency explains. The logits that a feature promotes
are the first-order effect of its code through its block's MLP (with each neuron's mean slope of GELU over the data)
and straight on to the unembedding, without later blocks and the final norm's scale: up to a factor per token.
"""
import json
import os
import shutil

import numpy as np
import torch
from tqdm import tqdm

from configurator import configure, run_main
from model import load_model, pick_device
from prepare_fineweb import get_tokenizer, new_directory, run_windows

# settings, see configurator.py
ckpt = "out/ckpt.pt"
data = ""  # directory of bins; "": the run's data_dir
split = "train"
out = "features"  # a new directory
tokens = 2_000_000  # of the data, at most
text = ""  # a file whose tokens get a page with their active features
n_top = 6  # contexts of largest codes, per feature
n_random = 16  # sampled contexts, for tokens and co-active features
batch_size = 8
device = "auto"

BEFORE, AFTER = 12, 8  # tokens of a context around the feature's
SHOWN_RANDOM = 2  # sampled contexts on a feature's page
N_BINS = 20  # of the histogram of codes
CHUNK = 128  # features in a file


class BestContexts:
    """Per feature the `size` contexts of largest key, largest first: keys (F, size), and refs (F, size), -1 where there is none."""

    def __init__(self, n_features, size):
        self.keys = np.full((n_features, size), -np.inf, dtype=np.float32)
        self.refs = np.full((n_features, size), -1, dtype=np.int64)

    def add(self, features, keys, refs, windows):
        """Offer contexts: (M,) features, keys, token numbers and window numbers; one a feature and window is taken."""
        good = keys > self.keys[features, -1]
        features, keys, refs, windows = features[good], keys[good], refs[good], windows[good]
        order = np.lexsort((-keys, windows, features))
        features, keys, refs, windows = features[order], keys[order], refs[order], windows[order]
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
        self.layer, self.level, self.size, self.k = layer, level, 2 ** sae.levels[level].n, sae.levels[level].k
        self.counts, self.sums = np.zeros(self.size, dtype=np.int64), np.zeros(self.size)
        self.histogram, self.range = np.zeros((self.size, N_BINS), dtype=np.int64), None
        self.top, self.random = BestContexts(self.size, n_top), BestContexts(self.size, n_random)

    def count(self, codes, first_window, rng):
        """Take in the codes, ids and values (B, T, k), of windows from number first_window."""
        ids, values = codes[self.level]
        B, T, k = ids.shape
        refs = np.repeat(np.arange(first_window * T, (first_window + B) * T), k)
        ids, values = ids.ravel(), values.ravel()
        if self.range is None:  # of the first batch, and half as much again
            low, high = np.quantile(values, [0.0005, 0.9995])
            self.range = min(0.0, float(low) * 1.5), max(0.0, float(high) * 1.5) or 1.0
        self.counts += np.bincount(ids, minlength=self.size)
        self.sums += np.bincount(ids, values, minlength=self.size)
        low, high = self.range
        bins = ((values - low) / (high - low) * N_BINS).clip(0, N_BINS - 1).astype(np.int64)
        self.histogram += np.bincount(ids * N_BINS + bins, minlength=self.histogram.size).reshape(self.histogram.shape)
        self.top.add(ids, values, refs, refs // T)
        self.random.add(ids, rng.random(len(ids), dtype=np.float32), refs, refs // T)

    def start_contexts(self, T, k_others):
        """Between the two readings: the contexts to read, in the order of the data."""
        self.refs = np.concatenate([self.top.refs, self.random.refs], 1)  # (F, slots)
        self.shown = n_top + min(SHOWN_RANDOM, n_random)
        self.shades = np.zeros((self.size, self.shown, BEFORE + 1 + AFTER), dtype=np.float16)
        self.beside = np.full((self.size, n_random, k_others), -1, dtype=np.int32)
        where = np.flatnonzero(self.refs.ravel() >= 0)
        self.order = where[np.argsort(self.refs.ravel()[where], kind="stable")]
        self.windows = self.refs.ravel()[self.order] // T

    def read_contexts(self, codes, windows):
        """Take in the codes around this level's contexts in some windows (their numbers, ascending)."""
        T = codes[0].ids.shape[1]
        others = np.concatenate([c.ids for i, c in enumerate(codes) if i != self.level], -1) if len(codes) > 1 else None
        for b, window in enumerate(windows):
            start, end = np.searchsorted(self.windows, [window, window + 1])
            for part in np.array_split(self.order[start:end], (end - start) // 4096 + 1):
                feature, slot = np.divmod(part, self.refs.shape[1])
                position = self.refs[feature, slot] % T
                near = position[:, None] + np.arange(-BEFORE, AFTER + 1)  # (R, tokens of a context)
                inside = (near >= 0) & (near < T)
                near = near.clip(0, T - 1)
                mine = codes[self.level].ids[b, near] == feature[:, None, None]  # (R, tokens, k)
                shade = (codes[self.level].values[b, near] * mine).sum(-1) * inside
                on_page, sampled = slot < self.shown, slot >= n_top
                self.shades[feature[on_page], slot[on_page]] = shade[on_page]
                if others is not None:
                    self.beside[feature[sampled], slot[sampled] - n_top] = others[b, position[sampled]]


# -----------------------------------------------------------------------------
# reading the data

@torch.no_grad()
def codes_of(model, idx):
    """idx (B, T) -> per layer and level Codes of numpy arrays (B, T, k)."""
    layers = model.run_with_codes(torch.from_numpy(idx).to(model.wte.weight.device), n_logits=1)[1]
    return [[type(c)(c.ids.cpu().numpy(), c.values.float().cpu().numpy()) for c in codes] for codes in layers]


def read(model, windows):
    """Both readings of windows, a (M, T) array -> a LevelReader per layer and level, and each layer's mean GELU slopes."""
    readers = [[LevelReader(i, l, sae) for l in range(len(sae.levels))] for i, sae in enumerate(model.saes())]
    rng, slopes = np.random.default_rng(0), [0.0] * len(readers)

    def measure(layer):
        def hook(module, inputs, output):
            hidden = output.float()
            slopes[layer] = slopes[layer] + torch.ops.aten.gelu_backward(torch.ones_like(hidden), hidden).sum((0, 1)) / windows.size
        return hook
    hooks = [block.mlp.c_fc.register_forward_hook(measure(i)) for i, block in enumerate(model.blocks)]
    for first in tqdm(range(0, len(windows), batch_size), desc="counting", unit="batch"):
        for layer, codes in zip(readers, codes_of(model, windows[first:first + batch_size])):
            for reader in layer:
                reader.count(codes, first, rng)
    for hook in hooks:
        hook.remove()
    for layer in readers:
        for reader in layer:
            reader.start_contexts(windows.shape[1], sum(other.k for other in layer if other is not reader))
    wanted = np.unique(np.concatenate([reader.windows for layer in readers for reader in layer]))
    for first in tqdm(range(0, len(wanted), batch_size), desc="contexts", unit="batch"):
        chosen = wanted[first:first + batch_size]
        for layer, codes in zip(readers, codes_of(model, windows[chosen])):
            for reader in layer:
                reader.read_contexts(codes, chosen)
    return readers, slopes


@torch.no_grad()
def logit_effects(model, layer, level, features, slopes, n_vocab, n=10):
    """Tokens whose logits features raise and lower most per unit of code: ids and values (len(features), 2 n), most raised first."""
    block = model.blocks[layer]
    hidden = block.mlp.c_fc.weight @ block.sae.atoms(level, features).T  # (4d, features)
    written = block.mlp.c_proj.weight @ (slopes[:, None] * hidden)  # (d, features)
    logits = (model.wte.weight[:n_vocab] @ (model.ln_f.weight[:, None] * written)).T  # (features, V)
    up, down = logits.topk(n), logits.topk(n, largest=False)
    return [torch.cat([a, b.flip(1)], 1).cpu().numpy() for a, b in zip((up.indices, up.values), (down.indices, down.values))]


# -----------------------------------------------------------------------------
# writing the site

def save(directory, key, value):
    """data/key.js, which hands value to the page: a script, since pages from file:// can't fetch."""
    path = os.path.join(directory, "data", key + ".js")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"loaded({json.dumps(key)},{json.dumps(value, separators=(',', ':'))})")


def rounded(values, digits=2):
    return [round(float(v), digits) for v in values]


def co_active(reader, feature, others, n_tokens, limit=8):
    """[level, id, samples beside the feature] of features of other levels, by how far they exceed their frequency."""
    row = reader.beside[feature][reader.random.refs[feature] >= 0]
    found, start = [], 0
    for other in others:
        ids, counts = np.unique(row[:, start:start + other.k], return_counts=True)
        excess = counts - other.counts[ids] / n_tokens * len(row)
        found += [(e, other.level, int(i), int(c)) for e, i, c in zip(excess, ids, counts)]
        start += other.k
    return [list(row[1:]) for row in sorted(found, reverse=True)[:limit]]


def context(reader, feature, slot, windows):
    """[place of the feature's token, tokens around it, the feature's code at each, whether it is a sampled context]."""
    window, position = divmod(int(reader.refs[feature, slot]), windows.shape[1])
    start, end = max(0, position - BEFORE), min(windows.shape[1], position + AFTER + 1)
    shade = reader.shades[feature, slot][start - position + BEFORE:end - position + BEFORE]
    return [position - start, windows[window, start:end].tolist(), rounded(shade), int(slot >= n_top)]


def write_level(directory, model, reader, layer_readers, windows, slopes, n_vocab):
    """The table of one level of one layer, and its features in chunks."""
    flat = windows.ravel()
    others = [other for other in layer_readers if other is not reader]
    table = {"count": reader.counts.tolist(), "mean": rounded(reader.sums / reader.counts.clip(1)), "max": [], "tokens": []}
    for first in range(0, reader.size, CHUNK):
        features = np.arange(first, min(first + CHUNK, reader.size))
        effects = logit_effects(model, reader.layer, reader.level, features, slopes, n_vocab)
        pages = []
        for feature, logit_ids, logit_values in zip(features, *effects):
            refs = reader.refs[feature]
            ids, counts = np.unique(flat[refs[refs >= 0]], return_counts=True)
            table["tokens"].append(ids[np.argsort(-counts, kind="stable")][:4].tolist())
            table["max"].append(round(float(reader.top.keys[feature, 0]), 2) if refs[0] >= 0 else 0)
            contexts = [context(reader, feature, slot, windows) for slot in range(reader.shown) if refs[slot] >= 0]
            pages.append({"contexts": contexts, "histogram": reader.histogram[feature].tolist(), "up": logit_ids[:10].tolist(),
                          "down": logit_ids[:9:-1].tolist(), "upBy": rounded(logit_values[:10], 3),
                          "downBy": rounded(logit_values[:9:-1], 3), "beside": co_active(reader, feature, others, flat.size)})
        save(directory, f"{reader.layer}/{reader.level}/{first // CHUNK}", pages)
    save(directory, f"{reader.layer}/{reader.level}/table", table)


def write_text_page(directory, model, encoding, ids):
    """The page of a text, a list of ids: its tokens, and per layer their codes by level."""
    layers = codes_of(model, np.array([[encoding.eot_token] + ids]))
    for layer, codes in enumerate(layers):
        save(directory, f"text/{layer}", [[[c.ids[0, i].tolist(), rounded(c.values[0, i])] for c in codes] for i in range(1, len(ids) + 1)])
    save(directory, "text/tokens", ids)


def write_site(directory, model, encoding, windows, readers, slopes, text_ids):
    """All files of the site in a new directory."""
    shutil.copyfile(os.path.join(os.path.dirname(os.path.abspath(__file__)), "features.html"), os.path.join(directory, "index.html"))
    bar = tqdm(total=sum(reader.size for layer in readers for reader in layer), desc="writing", unit="feature")
    for layer, slope in zip(readers, slopes):
        for reader in layer:
            write_level(directory, model, reader, layer, windows, slope, encoding.n_vocab)
            bar.update(reader.size)
    bar.close()
    save(directory, "vocab", [encoding.decode_single_token_bytes(i).decode("utf-8", errors="replace") if i != encoding.eot_token
                              else "<|endoftext|>" for i in range(encoding.n_vocab)])
    sae = model.saes()[0]
    save(directory, "site", {
        "checkpoint": os.path.abspath(ckpt), "tokens": windows.size, "layers": len(readers), "chunk": CHUNK,
        "levels": [{"n": level.n, "k": level.k, "m": sae.plan[3 * i + 2], "ranges": [layer[i].range for layer in readers]}
                   for i, level in enumerate(sae.levels)],
        "text": len(text_ids)})
    if text_ids:
        write_text_page(directory, model, encoding, text_ids)


def main():
    configure(globals())
    if tokens < 1 or batch_size < 1 or n_top < 1 or n_random < 1:
        raise ValueError(f"tokens={tokens}, batch_size={batch_size}, n_top={n_top} and n_random={n_random} must be at least 1")
    if text and not os.path.isfile(text):
        raise ValueError(f"{text}: no such file")
    with new_directory(out) as directory:
        model, config = load_model(ckpt, pick_device(device))
        if not model.saes():
            raise ValueError(f"{ckpt} is a dense twin: it has no features")
        encoding, text_ids = get_tokenizer(config["tokenizer"]), []
        if text:
            with open(text, encoding="utf-8") as file:
                text_ids = encoding.encode_ordinary(file.read())[:model.config.block_size - 1]
        source = run_windows(config, split, data)
        windows = source.shuffled(0, max(1, min(tokens // model.config.block_size, len(source))), seed=0)[:, :-1]
        readers, slopes = read(model, windows)
        write_site(directory, model, encoding, windows, readers, slopes, text_ids)
    print(f"open {os.path.join(os.path.abspath(out), 'index.html')}")


if __name__ == "__main__":
    run_main(main)
