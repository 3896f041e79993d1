"""
What the design of the layer leaves open: the dense twin, and the layer with one thing changed.

    python records/ablation/ablation.py --seeds=3 --jobs=2
    python records/ablation/ablation.py --long --seeds=3 --jobs=2 --out_dir=out/ablation_long
    python records/ablation/ablation.py --only "no gate" --only "Gold exponent 3"

Start it at the top of the repository, after `make demo` has built data/python. Every setting trains
configs/demo.py at SIZE by train.py; those of GradientSAE and AblatedSAE train it with that layer in
the model.
"""
import math
import os
import runpy
import sys

import numpy as np
import torch
from torch.nn import functional as F

# Python puts a script's own directory on sys.path; model.py and the others are two above
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

import model
from cayley import CayleySAE, Codes, Record, labels, open_features, select
from configurator import configure
from tools import tax

# settings, see configurator.py
config = "configs/demo.py"  # of every run
train_settings = []  # key=value, settings of train.py for every run, after SIZE
seeds = 1  # runs of each setting, with different weights and batches
jobs = 1  # runs at a time, sharing the cores
long = False  # the settings of LONG at twice the iterations
only = []  # names of settings; none: all
out_dir = "out/ablation"

SIZE = [
    "n_layer=2",
    "n_embd=256",
    "n_head=4",
    "block_size=128",
    "batch_size=8",
    "gradient_accumulation_steps=1",
    "max_iters=250",
    "warmup_iters=20",
    "eval_interval=50",
    "eval_iters=32",
]
BASE = "cayley_levels=8,8,0;12,16,64"
MOST_ON_TOP = "cayley_levels=8,16,0;12,8,16"
ONE_LEVEL = "cayley_levels=8,24,0"
DENSE_GRADIENT = "dense_gradient=1.0"
RAW = "score_standardize=False forward_standardized=False"
SETTINGS = {
    "two levels, 8 + 16 of 256 + 4,096": BASE,
    "level 0 alone, 24 active": ONE_LEVEL,
    "level 0 alone, 8 active": "cayley_levels=8,8,0",
    "three levels, 8 + 8 + 8": "cayley_levels=8,8,0;12,8,64;16,8,64",
    "k split 16 + 8": "cayley_levels=8,16,0;12,8,64",
    "k split 4 + 20": "cayley_levels=8,4,0;12,20,64",
    "delta 16": "cayley_levels=8,8,0;12,16,16",
    "delta 256": "cayley_levels=8,8,0;12,16,256",
    "no gate": f"{BASE} per_parent_budget=False",
    "raw scores, raw codes": f"{BASE} {RAW}",
    "standardised scores, raw codes": f"{BASE} forward_standardized=False",
    "Gold exponent 3": f"{BASE} dictionary=gold",
    "random dictionary": f"{BASE} dictionary=random",
    "residual of the level above": f"{BASE} residual=True",
    "no repeats of parents": f"{BASE} repeats=False",
    "by absolute value": f"{BASE} absolute=True",
    "leaves weigh 1/2": f"{BASE} leaf_weight=0.5",
    "k split 16 + 8, delta 16": MOST_ON_TOP,
    "k split 16 + 8, delta 16, raw": f"{MOST_ON_TOP} {RAW}",
    "level 0 alone, 24 active, raw": f"{ONE_LEVEL} {RAW}",
    "dense gradient": f"{BASE} {DENSE_GRADIENT}",
    "k split 16 + 8, delta 16, dense gradient": f"{MOST_ON_TOP} {DENSE_GRADIENT}",
    "level 0 alone, 24 active, dense gradient": f"{ONE_LEVEL} {DENSE_GRADIENT}",
    "k split 16 + 8, delta 16, near misses": f"{MOST_ON_TOP} near_misses=32",
    "level 0 alone, 24 active, near misses": f"{ONE_LEVEL} near_misses=24",
    "k split 16 + 8, delta 16, dense gradient, revived":
        f"{MOST_ON_TOP} {DENSE_GRADIENT} revive=0.02",
}
LONG = [
    "two levels, 8 + 16 of 256 + 4,096",
    "level 0 alone, 24 active",
    "raw scores, raw codes",
    "no repeats of parents",
    "no gate",
    "residual of the level above",
    "leaves weigh 1/2",
    "k split 16 + 8, delta 16",
    "k split 16 + 8, delta 16, raw",
    "level 0 alone, 24 active, raw",
    "k split 16 + 8, delta 16, dense gradient",
    "k split 16 + 8, delta 16, dense gradient, revived",
    "level 0 alone, 24 active, near misses",
]

# -----------------------------------------------------------------------------
# the layer with options

def gold_atoms(t, n):
    """Atoms (2^n, 2^t) by labels of the t bits of x and then Tr(alpha^j x^3), j = 0, 1, ..."""
    v = np.arange(2**n)[:, None]
    parity = np.bitwise_count(v & labels(t, n, exponents=(3,))) & 1  # (2^n, 2^t)
    return torch.from_numpy(1.0 - 2 * parity).float() * 2 ** (-t / 2)


def random_atoms(walsh, n, seed):
    """Random signs as atoms, (2^n, d), in which v << (n - t) stays row v of walsh (d, d)."""
    d = len(walsh)
    generator = torch.Generator().manual_seed(seed)
    atoms = (torch.randint(0, 2, (2**n, d), generator=generator) * 2.0 - 1) * d**-0.5
    atoms[:: 2**n // d] = walsh
    return atoms


class GradientSAE(CayleySAE):
    """
    CayleySAE whose input gets more of the output's gradient in training; the forward is the same.

    dense_gradient: weight with which the gradient goes straight to x as well; through the codes
        alone it has the active atoms' directions only
    near_misses: how many features of the top level, the next ones after the k active, hand their
        part of the gradient to x

    Raises ValueError for more near misses than there are features that are not active.
    """

    dense_gradient = 0.0
    near_misses = 0

    def __init__(self, *args):
        super().__init__(*args)
        inactive = self.n_embd - self.levels[0].k
        if not 0 <= self.near_misses <= inactive:
            raise ValueError(
                f"near_misses={self.near_misses}: must be from 0 to {inactive}, the features of "
                "level 0 that are not active"
            )

    def forward(self, x):
        codes = self.edit(self.encode(x), self.edits)
        if self.record is not None:
            self.record.append(Record(x, codes))
        out = self.decode(codes)
        if self.training and self.dense_gradient:
            out = out + self.dense_gradient * (x - x.detach()).to(out.dtype)  # plus 0
        if self.training and self.near_misses:
            near = self._project_on_near_misses(x, codes[0].ids)
            out = out + (near - near.detach()).to(out.dtype)  # plus 0
        return out

    def _project_on_near_misses(self, x, active):
        """
        x (..., d) -> its part along the top level's near misses, orthonormal atoms, (..., d).

        active (..., k): ids of features that are none, since where scores tie the larger selection
        may begin with others.
        """
        n, k, _ = self.levels[0]
        where = self.level_slices[0]
        scale, shift = self.standardization()
        offset = self.bias.detach() + shift
        plan = [n, k + self.near_misses, n]
        ones, zeros = torch.ones_like(scale[where]), torch.zeros_like(scale[where])
        terms = torch.stack([scale[where], offset[where], ones, zeros])
        ids, products = select(self._flat(x), terms, zeros, plan)  # codes without scale or bias
        is_active = torch.zeros(len(ids), self.n_embd, dtype=torch.bool, device=ids.device)
        is_active.scatter_(1, active.reshape(len(ids), -1), True)
        near = Codes(ids, products.masked_fill(is_active.gather(1, ids), 0))
        return self.decode([near]).view(x.shape)


class AblatedSAE(GradientSAE):
    """
    GradientSAE by products with dense dictionaries, and with options that it doesn't have.

    dictionary: below level 0, "kasami" (the design's), "gold" or "random", see the functions above
    residual: a level scores what the levels above leave
    repeats: a leaf may be its parent's atom
    absolute: the largest |score| are active
    leaf_weight: of the codes of all levels but the first
    revive: step of the bias, an iteration, of a feature that is active less than 2% as often as its
        level's mean
    """

    dictionary = "kasami"
    residual = False
    repeats = True
    absolute = False
    leaf_weight = 1.0
    revive = 0.0

    def __init__(self, *args):
        super().__init__(*args)
        for i, level in enumerate(self.levels):
            if self.dictionary == "gold" and i > 0:
                atoms = gold_atoms(self.t, level.n)
            elif self.dictionary == "random" and i > 0:
                atoms = random_atoms(self.atoms_0, level.n, seed=i)
            else:
                atoms = self.atoms(i, range(2**level.n))
            self.register_buffer(f"atoms_{i}", atoms, persistent=False)
        self.register_buffer("pending_raw", torch.zeros(2, len(self.bias)), persistent=False)
        # in checkpoints, which the plain layer therefore refuses
        self.register_buffer("use", torch.ones(len(self.bias)))

    def encode(self, x):
        codes = []
        left = x  # (..., d)
        scale, shift = self.standardization()  # (F,)
        for i, where in enumerate(self.level_slices):
            ids, raw = self._select(i, left, codes, scale[where], shift[where])  # (..., k)
            values = raw
            if self.forward_standardized:
                values = raw * scale[where][ids] + shift[where][ids]
            values = values + self.bias[where][ids]
            if i > 0:
                values = values * self.leaf_weight
            codes.append(Codes(ids, values))
            if self.residual:  # in raw units
                left = left - self._sum(i, ids, raw)
        if self.training:
            self.pending_rows += x[..., :: self.stats_stride, 0].numel()
        return codes

    def _select(self, i, left, codes, scale, shift):
        """Active features of level i, (..., k), and their raw scores, differentiable in left."""
        level, where = self.levels[i], self.level_slices[i]
        atoms = getattr(self, f"atoms_{i}")  # (2^n, d)
        with torch.no_grad():
            raw = left @ atoms.T  # (..., 2^n)
            rank = raw * scale + shift + self.bias[where]
            if self.absolute:
                rank = rank.abs()
            if self.block_bits[i] < level.n:
                parents = codes[-1].ids.flatten(0, -2)  # (N, k)
                opened = open_features(parents, self.levels[i - 1].n, level.n, self.block_bits[i])
                rank = rank.masked_fill(~opened.view_as(rank), -math.inf)
            if i > 0 and not self.repeats:
                rank[..., :: 2 ** (level.n - self.levels[i - 1].n)] = -math.inf
            ids = rank.topk(level.k).indices
            if self.training:
                seen = raw[..., :: self.stats_stride, :].flatten(0, -2)
                self.pending_raw[:, where] += torch.stack([seen.sum(0), seen.square().sum(0)])
                self.pending_counts[where] += ids.flatten().bincount(minlength=2**level.n)
        return ids, (atoms[ids] @ left.unsqueeze(-1)).squeeze(-1)

    def _sum(self, i, ids, values):
        """Atoms of level i: ids and values (..., k) -> (..., d)."""
        rows, atoms = ids.flatten(0, -2), getattr(self, f"atoms_{i}")
        weights = values.flatten(0, -2)
        total = F.embedding_bag(rows, atoms, mode="sum", per_sample_weights=weights)
        return total.view(*ids.shape[:-1], self.n_embd)

    def decode(self, codes):
        return sum(self._sum(i, ids, values) for i, (ids, values) in enumerate(codes))

    @torch.no_grad()
    def update_stats(self):
        """As CayleySAE's, on one rank, from the scores of all features."""
        mean, square = self.pending_raw / self.pending_rows
        self.mean += self.stats_momentum * (mean - self.mean)
        self.var += self.stats_momentum * ((square - mean * mean).clamp_min(0) - self.var)
        self.active_counts += self.pending_counts
        self.use += 0.05 * (self.pending_counts - self.use)
        for where in self.level_slices:
            use = self.use[where]
            self.bias[where] += self.revive * (use < 0.02 * use.mean())
        for pending in (self.pending_raw, self.pending_rows, self.pending_counts):
            pending.zero_()


# -----------------------------------------------------------------------------
# runs

GRADIENT_OPTIONS = ("dense_gradient", "near_misses")
OPTIONS = (
    *GRADIENT_OPTIONS, "dictionary", "residual", "repeats", "absolute", "leaf_weight", "revive"
)
DICTIONARIES = ("kasami", "gold", "random")


def take_options(arguments):
    """--key=value arguments -> {key: value} of those that are a layer's options, and the others."""
    ours, others = {}, []
    for argument in arguments:
        key = argument.removeprefix("--").partition("=")[0]
        if key in OPTIONS:
            ours[key] = argument
        else:
            others.append(argument)
    defaults = {key: getattr(AblatedSAE, key) for key in OPTIONS}
    values = configure(defaults, list(ours.values()), choices={"dictionary": DICTIONARIES})
    return {key: values[key] for key in ours}, others


def train_one(arguments):
    """Be train.py with these arguments; options among them put their layer into the model."""
    options, others = take_options(arguments)
    if options:
        layer = GradientSAE if set(options) <= set(GRADIENT_OPTIONS) else AblatedSAE
        for key, value in options.items():
            setattr(layer, key, value)
        model.CayleySAE = layer
    sys.argv = ["train.py", *others]
    runpy.run_path(os.path.join(os.path.dirname(model.__file__), "train.py"), run_name="__main__")


def main():
    if sys.argv[1:2] == ["--train"]:
        return train_one(sys.argv[2:])
    configure(globals())
    names = only or (LONG if long else list(SETTINGS))
    for name in names:
        if name not in SETTINGS:
            raise ValueError(f"only={name!r}: must be one of {', '.join(map(repr, SETTINGS))}")
    settings = {"dense": tax.DENSE} | {name: SETTINGS[name] for name in names}
    common = SIZE + ["max_iters=500"] * long + train_settings
    script = [os.path.abspath(__file__), "--train"]
    curves = tax.compare(settings, config, common, out_dir, seeds, jobs, script)
    tax.report(curves, out_dir)


if __name__ == "__main__":
    main()
