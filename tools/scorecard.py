"""
Are a Cayley GPT's features better to read than those of an SAE fitted to its dense twin afterwards?

    python -m tools.scorecard --ckpt=cayley.pt --dense=dense.pt --seeds=3
    python -m tools.scorecard --ckpt=c0.pt,c1.pt,c2.pt --dense=d0.pt,d1.pt,d2.pt  # 3 training seeds
    python -m tools.scorecard --ckpt=cayley.pt --dense=dense.pt --layers=2,3 --labels=mine.npz

--ckpt and --dense take as many checkpoints as there are training seeds, with commas between them
and in the same order; --seeds is the number of post-hoc SAEs fitted to each. Prints the tables and
who wins what, and writes scorecard.json, .csv and .svg to out_dir. Stopped and started again it
goes on: finished SAEs and rows are in out_dir/parts, by the checkpoints, data and settings that
they depend on; after a change of this file take another out_dir.

Data: fitting (SAEs, features, thresholds, probes, gradients) sees the train split alone, and every
score is of the val split's documents. Intervals are 95%, from 1,000 resamples of those documents;
+- after a score is the standard deviation over training seeds.

Site: the input of a layer's MLP after the second norm, where the CayleySAE is; post-hoc SAEs are
fitted to that place of the dense twin, with Cayley's number of features and of active features.

Loss: of the val split's windows, differences paired by window. KL is that of the row's
distribution to its reference's, KL(reference || row): the dense twin is the reference of Cayley and
of the spliced SAEs, Cayley as it is that of Cayley with dense inputs.

Rows: a feature's score at a token is its code as the MLP gets it, with its sign, and 0 where it is
not active; either end of it may predict. "untrained code": a CayleySAE with the statistics of the
dense twin's inputs and biases of 0. "random dictionary": the same layer with random atoms. "random
model": Cayley's architecture with fresh weights, its statistics those of the data. "current token":
the share of a token's occurrences that have the label, which needs no model. "always yes": the F1
that is to be had without any; a row may stay below it, since a sparse feature can only predict
where it is active. Balanced accuracy and AUC have the same floor, 0.5, in all rows.

Sparse probing, after SAEBench's sparse_probing and sae-probes, at tokens.
- one feature: predicted where its code is at least a positive threshold, or at most a negative one.
  Feature, side and threshold have the best F1 on the training documents, over all features. Dense
  rows may have any threshold; of them the 8 of largest standardised mean difference are tried.
- five: those of the largest |mean code with the label - mean code without|, and a logistic probe
  with an L2 penalty (scikit-learn's LogisticRegression(C=1)) at the threshold of the best F1.
- means over labels of F1, balanced accuracy and AUC (of the code's value, ties counting half).

Causal. A label's probability is the sum over next tokens of the model's probability times the share
of that token's occurrences that have the label. Steering adds a multiple of the best feature's
atom to the MLP's input at all tokens, so much that KL(before || after) is 0.1 nats a token; share
is the change of the label's probability, over what the gradient of that probability, a direction
found on training documents, achieves at the same KL: a mean over the labels that the gradient
raises. "Chosen by effect" takes the feature whose atom, in either direction, has the largest
cosine with that gradient instead of the one that reads the label best (Arad et al., "SAEs Are Good
for Steering -- If You Select the Right Features", 2025, find the two to differ): large dictionaries
come near to any direction, as the random dictionary's row shows. Ablation takes a feature's
contribution away; specificity is mean |change| where the next token has the label over the sum of
that and of the mean |change| elsewhere: one half is no specificity.

Absorption (GPT-2 BPE only): see absorption() in probing.py.

Codes, an appendix: entropy in bits of tokens, and mean entropy of labels, in the 16 contexts of
largest code on the val split, by feature and weighted by use; dead and rare (below one in 10,000
tokens) features there; explained as in evals.py.

--labels: an .npz with names (L,) and train and val, int8 (n, L), of the first n tokens of each
split in order: 1, 0, or -1 where nobody knows. Without it those of labels.py.
"""
if not __package__:
    raise SystemExit("from the repository's root: python -m tools.scorecard")

import functools
import hashlib
import itertools
import json
import math
import os
import re
import sys
import textwrap
import time
import zipfile
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

from cayley import CayleySAE, Codes, plain_encode
from checkpoint import build_model, check_archive, load_checkpoint, pick_device
from configurator import configure
from data import get_tokenizer, lock, progress, write_json, write_text
from model import GPT, covariances, explained
from tools.evals import mean_and_error
from tools.labels import UNKNOWN, label_stream
from tools.probing import (
    FEWEST,
    Table,
    absorption,
    metrics,
    probe_nothing,
    probe_one,
    probe_some,
    probe_token,
    stacked,
    token_rates,
    word_letters,
)
from tools.report import duration, interval_chart, markdown, write_csv
from tools.runs import run_windows, write_tensors
from tools.splice import (
    SAE_BATCH,
    kl_divergence,
    losses,
    mlp_inputs,
    new_sae,
    on_device,
    shuffled_inputs,
    watching,
)
from tools.topk_sae import TopKSAE, fit_saes, restored, states_of

# settings, see configurator.py
ckpt = "out/ckpt.pt"  # of Cayley models, a training seed each, commas between
dense = ""  # of their dense twins
data_dir = ""  # "": that of the runs
out_dir = "out/scorecard"
layers = ""  # to read, as "1,2"; "": the middle one
seeds = 1  # post-hoc SAEs of each kind and model
labels = ""  # an .npz; "": those of labels.py
sae_tokens = 700_000  # that a post-hoc SAE is fitted to
sae_lr = 5e-3  # of its Adam, at the peak; records/scorecard/sae_lr.csv has others
splice_all = True  # fit SAEs to every layer of the dense twin, for the loss with all of them
label_tokens = 1_000_000  # of the train split, that are labelled; windows are drawn from them
fit_tokens = 65_536  # for features, thresholds and probes
score_tokens = 131_072  # of the val split
causal_tokens = 2048  # for steering and ablation
n_windows = 128  # of the val split, for losses
batch_size = 16  # windows in a forward pass
device = "auto"

STEER_KL = 0.1  # nats a token
TOP_CONTEXTS = 16
RARE = 1e-4  # activations per token
RESAMPLES = 1000
REFERENCE = "TopK SAE on dense"  # that differences are to
KEYS = ("label_tokens", "fit_tokens", "score_tokens", "causal_tokens", "n_windows")  # of parts
SAE_KEYS = ("sae_tokens", "sae_lr")  # of those with a post-hoc SAE in them

# -----------------------------------------------------------------------------
# finished parts on the disk


class Parts:
    """
    Results by name in a directory, computed once for each key, a dict of what they depend on.

    sae_key: what those depend on beside it whose name has "SAE".
    """

    def __init__(self, directory, key, sae_key):
        self.directory = self._make(directory, key)
        self.sae_directory = self._make(directory, {**key, **sae_key})

    def _make(self, directory, key):
        text = json.dumps(key, sort_keys=True)
        path = os.path.join(directory, hashlib.sha256(text.encode()).hexdigest()[:16])
        os.makedirs(path, exist_ok=True)
        write_text(os.path.join(path, "key.json"), text)
        return path

    def get(self, name, compute):
        """What compute() returns, tensors and plain values, or did before."""
        safe = "".join(c if c.isalnum() else "_" for c in name)
        directory = self.sae_directory if "SAE" in name else self.directory
        path = os.path.join(directory, f"{safe}.pt")
        if not is_whole(path):
            write_tensors(path, compute())
        return torch.load(path, weights_only=True)


def is_whole(path):
    """Whether a part is there and undamaged."""
    try:
        check_archive(path)
        return True
    except (FileNotFoundError, EOFError, zipfile.BadZipFile):
        return False


def file_digest(path):
    """sha256 of a file, or of a directory's ckpt.pt."""
    if os.path.isdir(path):
        path = os.path.join(path, "ckpt.pt")
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -----------------------------------------------------------------------------
# labelled tokens


class Labelled(NamedTuple):
    """Windows of T + 1 tokens with their labels; T of them are read, the last one is a target."""

    windows: np.ndarray  # (M, T + 1) int64
    labels: np.ndarray  # (M, T + 1, L) bool
    documents: np.ndarray  # (M, T + 1) number of the document

    def read(self):
        """Of the tokens that are read, one after the other: labels (N, L), documents (N,)."""
        n_labels = self.labels.shape[-1]
        return self.labels[:, :-1].reshape(-1, n_labels), self.documents[:, :-1].ravel()


def read_stream(windows, n_tokens):
    """The first n_tokens or so of a split's first shard, whole windows and one more token (n,)."""
    n = int(min(windows.ends[0], max(1, n_tokens // windows.block_size)))
    rows = windows.read(range(n))  # each starts with the last token of the one before
    return np.append(rows[:, :-1].ravel(), rows[-1, -1])


def user_labels(path, split, n_tokens):
    """names and labels (n, L) of a split in an .npz. Raises ValueError saying what is wrong."""
    try:
        with np.load(path) as file:
            names = [str(name) for name in file["names"]]
            values = file[split]
    except (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: labels must be an .npz with the arrays names, train and val "
                         f"({error})") from None
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{path}: names must be one or more different labels, not {names}")
    if values.ndim != 2 or values.shape[1] != len(names) or not len(values):
        raise ValueError(f"{path}: {split} is {values.shape}, it must be (tokens, {len(names)})")
    wrong = values[~np.isin(values, (1, 0, UNKNOWN))]
    if values.dtype.kind not in "biu" or len(wrong):
        found = repr(wrong[0]) if len(wrong) else values.dtype
        raise ValueError(f"{path}: {split} must hold the integers 1, 0 and {UNKNOWN}, not {found}")
    return names, values[:n_tokens].astype(np.int8)


def labelled(split_windows, split, encoding, n_stream, n_tokens, rng):
    """
    Label a split's first n_stream tokens and draw windows of about n_tokens in all.

    Only windows whose every token has known labels. Returns names and Labelled.
    """
    ids = read_stream(split_windows, n_stream)
    if labels:
        names, values = user_labels(labels, split, len(ids))
        ids = ids[:len(values)]
    else:
        names, values = label_stream(ids, encoding)
    T = split_windows.block_size
    documents = np.cumsum(ids == encoding.eot_token)
    starts = np.arange(0, len(ids) - T, T)
    known = [(values[start:start + T + 1] != UNKNOWN).all() for start in starts]
    starts = starts[np.array(known, dtype=bool)]
    if len(starts) < 2:
        raise ValueError(f"fewer than 2 windows of the {split} split have labels for all of their "
                         f"{T + 1} tokens: give other --labels, or more data by a larger "
                         "--label_tokens and --score_tokens")
    starts = rng.permutation(starts)[:max(2, n_tokens // T)]
    where = starts[:, None] + np.arange(T + 1)  # (M, T + 1)
    return names, Labelled(ids[where], values[where] == 1, documents[where])


def usable_labels(names, fit, score):
    """Keep the labels that enough tokens of both sides have. Raises ValueError if there is none."""
    kept = np.ones(len(names), dtype=bool)
    for side in (fit, score):
        count = side.read()[0].sum(0)
        n = side.labels[:, :-1, 0].size
        kept &= (count >= FEWEST) & (n - count >= FEWEST)
    if not kept.any():
        raise ValueError(f"no label has {FEWEST} tokens with it and without it in both splits: "
                         "larger --fit_tokens and --score_tokens, or other --labels")
    left_out = [name for name, keep in zip(names, kept) if not keep]
    if left_out:
        print(f"labels left out, that fewer than {FEWEST} tokens have or lack: "
              f"{', '.join(left_out)}", file=sys.stderr)
    names = [name for name, keep in zip(names, kept) if keep]
    fit = fit._replace(labels=fit.labels[..., kept])
    return names, fit, score._replace(labels=score.labels[..., kept])


# -----------------------------------------------------------------------------
# models: what an MLP reads, and what comes of reading something else


@torch.no_grad()
def site_of(model, layer, windows):
    """The Site and all logits (B, T, V) of windows (B, T)."""
    with watching(model, layer) as seen:
        logits, _ = model(torch.from_numpy(windows).to(on_device(model)), n_logits=0)
    return seen[0], logits.float()


def logits_after(model, layer, residual, mlp_input):
    """Logits (B, T, V) when a layer's MLP reads mlp_input (B, T, d) beside residual."""
    x = residual + model.blocks[layer].mlp(mlp_input)
    for block in model.blocks[layer + 1:]:
        x = block(x)
    return model.lm_head(model.ln_f(x)).float()


def settle(model_or_sae, saes, forward):
    """Give saes the statistics of a forward's inputs exactly: forward() of model_or_sae."""
    model_or_sae.train()
    for _ in saes:  # a layer's inputs settle after those before it
        with torch.no_grad():
            forward()
        for sae in saes:
            sae.stats_momentum = 1.0
            sae.update_stats()
    model_or_sae.eval()


# -----------------------------------------------------------------------------
# fitting post-hoc SAEs


def fitted_saes(model, windows, jobs, width, k, seed):
    """
    SAEs of a model's MLP inputs, fitted together: jobs are (layer, kind).

    kind: as new_sae's.
    """
    saes = [new_sae(kind, model, layer, width, k, seed) for layer, kind in jobs]
    at_layers = [layer for layer, _ in jobs]
    inputs = shuffled_inputs(model, windows, at_layers, batch_size, seed)
    fit_saes(saes, inputs, sae_tokens // SAE_BATCH, [sae_lr] * len(saes))
    if not all(sae.W_dec.isfinite().all() for sae in saes):
        raise ValueError(f"sae_lr={sae_lr}: the fit of an SAE diverged, take a smaller one")
    return saes


# -----------------------------------------------------------------------------
# rows: whose features are read


@dataclass
class Arm:
    """Features of a model's MLP inputs."""

    name: str
    model: GPT
    encode: Any  # x (N, d) -> Codes (N, k); ids None: every feature of (N, n_features) values
    n_features: int
    atoms: Any = None  # (n_features, d): what a code of 1 adds to the MLP's input
    adds_up: bool = False  # the MLP's input is a sum of codes * atoms, so that one can be taken out


def flat_codes(sae, codes):
    """Codes per level as Codes over the features of all levels."""
    ids = [code.ids + where.start for code, where in zip(codes, sae.level_slices)]
    return Codes(torch.cat(ids, -1), torch.cat([code.values for code in codes], -1))


def cayley_atoms(sae):
    """The atoms of all levels, (F, d)."""
    ids = [torch.arange(2**level.n) for level in sae.levels]
    return torch.cat([sae.atoms(level, level_ids) for level, level_ids in enumerate(ids)]).detach()


def cayley_arm(name, model, sae, level=None):
    """The Arm of a CayleySAE's features: of all levels, or of one."""
    atoms = cayley_atoms(sae)
    if level is None:
        return Arm(name, model, lambda x: flat_codes(sae, sae.encode(x)), len(atoms), atoms,
                   adds_up=True)
    atoms = atoms[sae.level_slices[level]]
    return Arm(name, model, lambda x: sae.encode(x)[level], len(atoms), atoms, adds_up=True)


def fresh_sae(config, like):
    """An untrained CayleySAE of a GPTConfig on the device of the tensor like."""
    return CayleySAE(config.n_embd, config.cayley_levels, config.per_parent_budget,
                     config.score_standardize, config.forward_standardized).to(like.device)


def untrained_arm(model, config, x):
    """The algebraic code with the statistics of x (N, d) and no training."""
    sae = fresh_sae(config, model.wte.weight)
    settle(sae, [sae], lambda: sae.encode(x.to(sae.bias.device)))
    arm = cayley_arm("untrained code on dense", model, sae)
    arm.adds_up = False
    return arm


def random_dictionary_arm(model, config, x, seed):
    """The same layer with random unit vectors as atoms, standardised by x (N, d)."""
    sae = fresh_sae(config, model.wte.weight).eval()
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(sae.bias), config.n_embd, generator=generator)
    atoms = F.normalize(rows, dim=1).to(sae.bias.device)
    x = x.to(atoms.device)
    sae.mean.copy_(atoms @ x.mean(0))
    sae.var.copy_(((atoms @ torch.cov(x.T)) * atoms).sum(1))
    per_level = [atoms[where] for where in sae.level_slices]

    def encode(x):
        return flat_codes(sae, plain_encode(sae, x, per_level))

    return Arm("random dictionary on dense", model, encode, len(atoms), atoms)


def random_model(config, windows, seed, target):
    """A GPT of a GPTConfig with fresh weights, its statistics those of windows (M, T)."""
    torch.manual_seed(seed)
    model = GPT(config).to(target)
    idx = torch.from_numpy(windows[:16]).to(target)
    settle(model, model.saes(), lambda: model(idx))
    return model


def sae_arm(name, model, sae):
    return Arm(name, model, sae.encode, len(sae.W_dec), sae.atoms(), adds_up=True)


def coordinates_arm(model):
    """The dense coordinates that an MLP reads."""
    d = model.config.n_embd
    atoms = torch.eye(d, device=on_device(model))
    return Arm("dense coordinates", model, lambda x: Codes(None, x), d, atoms, adds_up=True)


def neurons_arm(model, layer):
    """An MLP's neurons."""
    c_fc = model.blocks[layer].mlp.c_fc

    def encode(x):
        return Codes(None, F.gelu(c_fc(x)))

    return Arm("dense MLP neurons", model, encode, c_fc.out_features)


@torch.no_grad()
def encoded(arm, x):
    """An Arm's Table of x (N, d)."""
    ids, values = [], []
    for rows in x.split(4096):
        codes = arm.encode(rows.to(on_device(arm.model)))
        values.append(codes.values.float().cpu())
        if codes.ids is not None:
            ids.append(codes.ids.cpu())
    return Table(torch.cat(ids).numpy() if ids else None, torch.cat(values).numpy(), arm.n_features)


# -----------------------------------------------------------------------------
# causal


def match_kl(kl_of, target=STEER_KL, tolerance=0.02):
    """
    The positive scale at which kl_of(scale) is target, within a share of tolerance.

    KL grows as the square of a small scale, which gives the next guess; once the target is
    bracketed, guesses outside are replaced by the middle. None if it isn't reached by 1e6 or in 40
    tries.
    """
    scale = 1.0
    low, high = 0.0, math.inf
    for _ in range(40):
        kl = kl_of(scale)
        if abs(kl - target) <= tolerance * target:
            return scale
        if kl < target:
            low = scale
        else:
            high = scale
        guess = scale * min(10.0, max(0.1, math.sqrt(target / max(kl, 1e-12))))
        if not low < guess < high:
            guess = math.sqrt(low * high) if low else high / 2
            if not math.isfinite(guess):
                guess = 2 * scale
        if guess > 1e6:
            return None
        scale = guess
    return None


class Stage:
    """
    Where steering and ablation at one layer of a model are measured.

    fit, score: windows (B, T); rates: token_rates as a tensor (V, L); next_labels (B, T, L) of
    score's next tokens.
    """

    def __init__(self, model, layer, fit, score, rates, next_labels):
        self.model = model
        self.layer = layer
        self.rates = rates
        self.next_labels = torch.from_numpy(next_labels).to(rates.device)
        self.site, self.logits = site_of(model, layer, score)
        self.before = self.label_probabilities(self.logits)  # (B, T, L)
        self.gradients = self._gradients(fit)  # (L, d)
        self.gradient_effects = [self.steer(g)[:, label] for label, g in enumerate(self.gradients)]

    def label_probabilities(self, logits):
        """(B, T, V) -> (B, T, L): that the next token has each label."""
        return logits.softmax(-1) @ self.rates

    def _gradients(self, windows):
        site, _ = site_of(self.model, self.layer, windows)
        shift = torch.zeros(site.x.shape[-1], device=site.x.device, requires_grad=True)
        logits = logits_after(self.model, self.layer, site.residual, site.mlp_input + shift)
        gradients = []
        for mean in self.label_probabilities(logits).mean((0, 1)):
            gradients += torch.autograd.grad(mean, shift, retain_graph=True)
        return [F.normalize(g, dim=0) for g in gradients]

    @torch.no_grad()
    def steer(self, direction):
        """Change of the labels' probabilities per window at the KL: direction (d,) -> (B, L)."""
        direction = F.normalize(direction, dim=0)
        after = None

        def kl_of(scale):
            nonlocal after
            after = logits_after(self.model, self.layer, self.site.residual,
                                 self.site.mlp_input + scale * direction)
            return kl_divergence(self.logits, after).mean().item()

        if match_kl(kl_of) is None:  # it moves nothing
            return torch.zeros_like(self.before[:, 0])
        return (self.label_probabilities(after) - self.before).mean(1)

    @torch.no_grad()
    def ablate(self, contribution, label):
        """
        Take contribution (B, T, d) away -> (B, 5) sums per window.

        Of the probability's fall, and of its |change|, where the next token has the label; the
        number of these tokens; of |change| elsewhere; the number of those.
        """
        after = logits_after(self.model, self.layer, self.site.residual,
                             self.site.mlp_input - contribution)
        fall = (self.before - self.label_probabilities(after))[..., label]  # (B, T)
        inside = self.next_labels[..., label].float()
        outside = 1 - inside
        sums = [fall * inside, fall.abs() * inside, inside, fall.abs() * outside, outside]
        return torch.stack([s.sum(1) for s in sums], 1)


def causal_scores(arm, stage, probes):
    """
    Steering and ablation of the features that read each label best, and steering of those whose
    atoms raise it most: tensors steer, by_effect, gradient (B, L), ablate (B, L, 5).
    """
    B, T, d = stage.site.x.shape
    table = encoded(arm, stage.site.x.flatten(0, 1).cpu())

    @functools.cache
    def steered(feature, sign):
        return stage.steer(sign * arm.atoms[feature])

    slopes = F.normalize(arm.atoms, dim=1) @ torch.stack(stage.gradients, 1)  # (n_features, L)
    strongest = slopes.abs().argmax(0).tolist()
    steer, by_effect, ablate = [], [], []
    for label, probe in enumerate(progress(probes, desc=f"steering, {arm.name}")):
        steer.append(steered(probe.feature, probe.sign)[:, label])
        feature = strongest[label]
        sign = 1 if slopes[feature, label] > 0 else -1
        by_effect.append(steered(feature, sign)[:, label])
        if arm.adds_up:
            column = torch.from_numpy(table.column(probe.feature)).view(B, T, 1)
            contribution = column.to(stage.site.x.device) * arm.atoms[probe.feature]
            ablate.append(stage.ablate(contribution, label))
    result = {
        "steer": torch.stack(steer, 1).cpu(),  # (B, L)
        "by_effect": torch.stack(by_effect, 1).cpu(),  # (B, L)
        "gradient": torch.stack(stage.gradient_effects, 1).cpu(),  # (B, L)
    }
    if ablate:
        result["ablate"] = torch.stack(ablate, 1).cpu()  # (B, L, 5)
    return result


# -----------------------------------------------------------------------------
# codes


def entropy(counts):
    """In bits, of counts (..., n) -> (...)."""
    p = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    return -(p * np.log2(np.maximum(p, 1e-12))).sum(-1)


def code_scores(arm, table, x, ids, labels):
    """State of an Arm's codes of x (N, d): see this file's docstring. ids (N,), labels (N, L)."""
    counts = table.counts()
    of_tokens, of_labels, uses = [], [], []
    for feature in np.flatnonzero(counts >= TOP_CONTEXTS):
        rows, values = table.feature(feature)
        top = rows[np.argsort(-np.abs(values), kind="stable")[:TOP_CONTEXTS]]
        of_tokens.append(entropy(np.unique(ids[top], return_counts=True)[1]))
        share = labels[top].mean(0)
        of_labels.append(entropy(np.stack([share, 1 - share], -1)).mean())
        uses.append(counts[feature])
    scores = {
        "dead": int((counts == 0).sum()),
        "rare": int((counts < RARE * table.n_tokens).sum()),
        "active": float(counts.sum() / table.n_tokens),
    }
    if uses:
        for name, values in (("token_entropy", of_tokens), ("label_entropy", of_labels)):
            scores[name] = float(np.mean(values))
            scores[f"{name}_by_use"] = float(np.average(values, weights=uses))
    if arm.atoms is not None and table.dense is None:
        decoded = torch.zeros_like(x)
        order = np.argsort(table.rows, kind="stable")
        offsets = torch.from_numpy(np.searchsorted(table.rows[order], np.arange(len(x))))
        decoded = F.embedding_bag(
            torch.from_numpy(table.owners[order]), arm.atoms.cpu(), offsets, mode="sum",
            per_sample_weights=torch.from_numpy(table.values[order]))
        scores["explained"] = explained(covariances(x, decoded)).item()
    return scores


# -----------------------------------------------------------------------------
# losses


def loss_arms(pair, at_layers, topk):
    """{name: (model, modules to splice in, reference)}: topk {layer: post-hoc SAE on dense}."""
    n_layer = len(pair.cayley.blocks)
    skips = {layer: nn.Identity() for layer in range(n_layer)}
    arms = {
        "dense": (pair.dense, {}, pair.dense),
        "Cayley": (pair.cayley, {}, pair.dense),
        "Cayley, dense input in all layers": (pair.cayley, skips, pair.cayley),
    }
    if len(topk) == n_layer:
        arms["dense, TopK SAE in all layers"] = (pair.dense, topk, pair.dense)
    for layer in at_layers:
        one = {layer: topk[layer]}
        arms[f"dense, TopK SAE in layer {layer}"] = (pair.dense, one, pair.dense)
        skip = {layer: nn.Identity()}
        arms[f"Cayley, dense input in layer {layer}"] = (pair.cayley, skip, pair.cayley)
    return arms


# -----------------------------------------------------------------------------
# one pair of checkpoints: its parts


class Pair(NamedTuple):
    """A Cayley model and its dense twin of one training seed."""

    cayley: GPT
    dense: GPT
    tokens: tuple  # that each was trained on
    digests: tuple


class Data(NamedTuple):
    """What all pairs are read on."""

    encoding: Any
    names: list  # of the L labels
    fit: Labelled
    score: Labelled  # documents numbered from 0
    val_windows: np.ndarray  # (M, T + 1), for losses
    train: Any  # Windows, for the post-hoc SAEs
    key: dict  # what all this depends on

    @property
    def n_documents(self):
        return int(self.score.documents.max()) + 1


def load_pair(ckpt_path, dense_path, target):
    """Pair and the runs' configurations. Raises ValueError where the two don't make a pair."""
    checkpoints = [load_checkpoint(path) for path in (ckpt_path, dense_path)]
    models = []
    tokens = []
    for path, checkpoint in zip((ckpt_path, dense_path), checkpoints):
        models.append(build_model(checkpoint, path).to(target).eval().requires_grad_(False))
        windows_read = checkpoint.get("windows_read", 0)
        tokens.append(windows_read * models[-1].config.block_size)
    cayley, twin = models
    if not cayley.saes():
        raise ValueError(f"ckpt={ckpt_path}: it has no CayleySAE: give the dense twin as --dense")
    if twin.saes():
        raise ValueError(f"dense={dense_path}: it is no dense model, it has a CayleySAE")
    fingerprints = {c["data"] for c in checkpoints if "data" in c}
    if len(fingerprints) > 1:
        raise ValueError(f"{ckpt_path} and {dense_path} were trained on different data: they are "
                         "no twins")
    for key in ("n_embd", "n_layer", "block_size", "vocab_size"):
        sizes = [getattr(model.config, key) for model in models]
        if sizes[0] != sizes[1]:
            raise ValueError(f"{ckpt_path} has {key}={sizes[0]} and {dense_path} {sizes[1]}: they "
                             "are no twins")
    digests = (file_digest(ckpt_path), file_digest(dense_path))
    return Pair(cayley, twin, tuple(tokens), digests), [c["config"] for c in checkpoints]


def load_data(config):
    """Data of a run. Raises ValueError as run_windows, labelled and usable_labels do."""
    rng = np.random.default_rng(0)
    train = run_windows(config, "train", data_dir)
    val = run_windows(config, "val", data_dir)
    encoding = get_tokenizer(config["tokenizer"])
    names, fit = labelled(train, "train", encoding, label_tokens, fit_tokens, rng)
    names, score = labelled(val, "val", encoding, 2 * score_tokens, score_tokens, rng)
    names, fit, score = usable_labels(names, fit, score)
    numbers = np.unique(score.documents, return_inverse=True)[1].reshape(score.documents.shape)
    key = {
        "data": [train.fingerprint, val.fingerprint],
        "labels": hashlib.sha256(fit.labels.tobytes() + score.labels.tobytes()).hexdigest(),
        "names": names,
    }
    val_windows = val.shuffled(0, min(n_windows, len(val)), seed=0)
    return Data(encoding, names, fit, score._replace(documents=numbers), val_windows, train, key)


def cached_saes(parts, name, model, windows, jobs, width, k, seed):
    """fitted_saes, or what they were before: {(layer, kind): TopKSAE}."""
    def compute():
        return states_of(fitted_saes(model, windows, jobs, width, k, seed))

    states = parts.get(f"SAEs {name} {jobs} seed {seed}", compute)
    return {job: restored(state, k, on_device(model)) for job, state in zip(jobs, states)}


class Reader:
    """Reads the features of one pair at one layer; what several rows need is computed once."""

    def __init__(self, pair, layer, data):
        self.pair = pair
        self.layer = layer
        self.data = data
        self.fit_labels, _ = data.fit.read()
        self.score_labels, self.documents = data.score.read()
        self.fit_ids = data.fit.windows[:, :-1]
        self.score_ids = data.score.windows[:, :-1]
        vocab_size = pair.dense.config.vocab_size
        self.rates = token_rates(self.fit_ids.ravel(), self.fit_labels, vocab_size)
        self.inputs = functools.cache(self._inputs)
        self.stage = functools.cache(self._stage)

    def _inputs(self, model):
        """x of fit and score, (N, d) each."""
        fit = mlp_inputs(model, self.fit_ids, [self.layer], batch_size)[self.layer]
        return fit, mlp_inputs(model, self.score_ids, [self.layer], batch_size)[self.layer]

    def _stage(self, model):
        """The Stage of a model at this layer."""
        T = self.fit_ids.shape[1]
        n = max(2, causal_tokens // T)
        rates = torch.from_numpy(self.rates).float().to(on_device(model))
        return Stage(model, self.layer, self.fit_ids[:n], self.score_ids[:n], rates,
                     self.data.score.labels[:n, 1:])

    def token_row(self):
        """The row of the current token alone."""
        outcomes = probe_token(self.rates, self.fit_ids.ravel(), self.score_ids.ravel(),
                               self.fit_labels, self.score_labels, self.documents)
        return {"one": stacked(outcomes), "five": stacked(outcomes)}

    def constant_row(self):
        """The row of saying yes at every token."""
        outcomes = probe_nothing(self.score_labels, self.documents)
        return {"one": stacked(outcomes), "five": stacked(outcomes)}

    def row(self, arm):
        """Every score of an Arm, tensors and plain values."""
        fit_x, score_x = self.inputs(arm.model)
        fit, score = encoded(arm, fit_x), encoded(arm, score_x)
        sides = (self.fit_labels, self.score_labels, self.documents)
        probes, one = probe_one(fit, score, *sides)
        result = {
            "probes": [list(probe) for probe in probes],
            "one": stacked(one),
            "five": stacked(probe_some(fit, score, *sides)),
        }
        if fit.dense is None:
            ids = self.score_ids.ravel()
            result["codes"] = code_scores(arm, score, score_x, ids, self.score_labels)
        if arm.atoms is not None and arm.model in (self.pair.cayley, self.pair.dense):
            result["causal"] = causal_scores(arm, self.stage(arm.model), probes)
        if self.data.encoding.name == "gpt2" and fit.dense is None:
            letters = []
            for windows in (self.fit_ids, self.score_ids):
                rows = [word_letters(ids, self.data.encoding) for ids in windows]
                letters.append(np.concatenate(rows))
            result["absorption"] = absorption(arm.atoms, fit, score, fit_x, score_x, *letters)
        return result

    def arms(self):
        """{name: function that makes the Arm}, of those without a seed of SAEs."""
        layer, cayley, twin = self.layer, self.pair.cayley, self.pair.dense
        sae = cayley.blocks[layer].sae
        config = cayley.config
        makers = {"Cayley": lambda: cayley_arm("Cayley", cayley, sae)}
        if len(sae.levels) > 1:
            for level in range(len(sae.levels)):
                name = f"Cayley, level {level}"
                makers[name] = functools.partial(cayley_arm, name, cayley, sae, level)
        makers["dense coordinates"] = lambda: coordinates_arm(twin)
        makers["dense MLP neurons"] = lambda: neurons_arm(twin, layer)
        makers["untrained code on dense"] = lambda: untrained_arm(
            twin, config, self.inputs(twin)[0])
        makers["random dictionary on dense"] = lambda: random_dictionary_arm(
            twin, config, self.inputs(twin)[0], seed=0)
        makers["random model"] = self.random_model_arm
        return makers

    def random_model_arm(self):
        model = random_model(self.pair.cayley.config, self.fit_ids, 0, on_device(self.pair.cayley))
        return cayley_arm("random model", model, model.blocks[self.layer].sae)


def code_shape(sae):
    """Number of features of a CayleySAE and of active ones, over its levels."""
    return len(sae.bias), sum(level.k for level in sae.levels)


def read_losses(pair, data, at_layers, fitted, parts):
    """{name: (M, 2)} for every seed of post-hoc SAEs."""
    all_rows = []
    for seed, (of_dense, _) in enumerate(fitted):
        topk = {layer: sae for (layer, kind), sae in of_dense.items() if kind == "TopK"}
        rows = {}
        for name, arm in loss_arms(pair, at_layers, topk).items():
            of_seed = f" seed {seed}" if "SAE" in name else ""
            model, modules, reference = arm
            compute = functools.partial(losses, model, data.val_windows, modules, reference,
                                        batch_size)
            rows[name] = parts.get(f"loss {name}{of_seed}", compute)
        all_rows.append(rows)
    return all_rows


def read_rows(pair, data, layer, fitted, parts):
    """{name: a list of results, one per seed of post-hoc SAEs or just one} at a layer."""
    reader = Reader(pair, layer, data)
    makers = {name: [make] for name, make in reader.arms().items()}
    for of_dense, of_cayley in fitted:
        for name, model, sae in (
            (REFERENCE, pair.dense, of_dense[layer, "TopK"]),
            ("Matryoshka SAE on dense", pair.dense, of_dense[layer, "Matryoshka"]),
            ("TopK SAE on Cayley's input", pair.cayley, of_cayley[layer, "TopK"]),
        ):
            makers.setdefault(name, []).append(functools.partial(sae_arm, name, model, sae))

    def compute(make):
        return reader.row(make())

    rows = {
        "current token": [parts.get(f"layer {layer} current token", reader.token_row)],
        "always yes": [parts.get(f"layer {layer} always yes", reader.constant_row)],
    }
    for name, seeded in progress(makers.items(), desc=f"rows of layer {layer}"):
        rows[name] = []
        for seed, make in enumerate(seeded):
            part = f"layer {layer} {name} seed {seed}"
            rows[name].append(parts.get(part, functools.partial(compute, make)))
    return rows


def read_pair(pair, data, at_layers):
    """
    Everything about one pair, from the disk where it is there: read_losses' list, and read_rows'
    lists as {(layer, name): list}.
    """
    key = {**data.key, "checkpoints": pair.digests, **{name: globals()[name] for name in KEYS}}
    sae_key = {name: globals()[name] for name in SAE_KEYS}
    parts = Parts(os.path.join(out_dir, "parts"), key, sae_key)
    shape = code_shape(pair.cayley.saes()[0])
    spliced_layers = range(len(pair.dense.blocks)) if splice_all else at_layers
    on_dense = [(layer, "TopK") for layer in spliced_layers]
    on_dense += [(layer, "Matryoshka") for layer in at_layers]
    on_cayley = [(layer, "TopK") for layer in at_layers]
    fitted = []
    for seed in range(seeds):
        fitted.append([
            cached_saes(parts, "on dense", pair.dense, data.train, on_dense, *shape, seed),
            cached_saes(parts, "on Cayley", pair.cayley, data.train, on_cayley, *shape, seed),
        ])
    all_losses = read_losses(pair, data, at_layers, fitted, parts)
    rows = {}
    for layer in at_layers:
        for name, results in read_rows(pair, data, layer, fitted, parts).items():
            rows[layer, name] = results
    return all_losses, rows


# -----------------------------------------------------------------------------
# the card: means over runs, intervals over documents, spread over training seeds


def resamples(n_documents):
    """How often each document counts: once in the first row, drawn in the others, (1 + R, D)."""
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(n_documents, np.full(n_documents, 1 / n_documents), size=RESAMPLES)
    return np.vstack([np.ones(n_documents, dtype=np.int64), drawn]).astype(np.float64)


def nanmean(values, axis):
    """np.nanmean, and nan without a warning where nothing is there."""
    values = np.asarray(values, dtype=np.float64)
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(there, values, 0).sum(axis) / there.sum(axis)


def probe_scores(tables, weights):
    """F1, balanced accuracy and AUC, means over labels: stacked Outcomes -> (1 + R, 3)."""
    confusion = np.tensordot(weights, tables["confusion"].numpy(), 1)  # (1 + R, L, 4)
    per_label = []
    for label in range(confusion.shape[1]):
        histogram = np.tensordot(weights, tables["histogram"][:, label].numpy(), 1)
        per_label.append(metrics(confusion[:, label], histogram))  # (1 + R, 3)
    return nanmean(per_label, 0)


def causal_numbers(causal, window_weights):
    """Shares, fall, change inside and specificity, means over labels: -> (1 + R, 5)."""
    gradient = window_weights @ causal["gradient"].double().numpy()  # (1 + R, L)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = []
        for name in ("steer", "by_effect"):
            steer = window_weights @ causal[name].double().numpy()
            shares.append(nanmean(np.where(gradient > 0, steer / gradient, np.nan), 1))
        if "ablate" not in causal:
            nothing = np.full(len(gradient), np.nan)
            return np.stack([*shares, nothing, nothing, nothing], 1)
        sums = np.tensordot(window_weights, causal["ablate"].double().numpy(), 1)
        fall, inside, n_inside, outside, n_outside = np.moveaxis(sums, -1, 0)  # (1 + R, L)
        inside, outside = inside / n_inside, outside / n_outside
        specificity = nanmean(inside / (inside + outside), 1)
        return np.stack(
            [*shares, nanmean(fall / n_inside, 1), nanmean(inside, 1), specificity], 1)


def interval(values):
    """95% of resamples (R,): a list of two, or None where there is no value."""
    values = values[~np.isnan(values)]
    return np.percentile(values, [2.5, 97.5]).tolist() if len(values) else None


def spread(values):
    """Standard deviation of numbers, one a training seed; None of a single one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def seed_means(runs):
    """Of every training seed the mean over seeds of SAEs: runs as in summary."""
    return np.array([np.mean([value[0] for value in of_pair]) for of_pair in runs])


def summary(runs, reference):
    """
    A number's mean, interval, spread and difference to a reference row.

    runs: per training seed a list, per seed of SAEs, of (1 + R,); reference: the same or None.
    """
    mean = np.mean([value for of_pair in runs for value in of_pair], axis=0)
    if np.isnan(mean[0]):
        return None
    result = {"mean": float(mean[0]), "interval": interval(mean[1:]),
              "over_seeds": spread(seed_means(runs))}
    if reference is not None:
        other = np.mean([value for of_pair in reference for value in of_pair], axis=0)
        if np.isnan(other[0]):
            return result
        result["difference"] = float(mean[0] - other[0])
        result["difference_interval"] = interval(mean[1:] - other[1:])
        result["difference_over_seeds"] = spread(seed_means(runs) - seed_means(reference))
    return result


PROBE_NAMES = ("f1", "balanced_accuracy", "auc")
CAUSAL_NAMES = ("steering_share", "steering_by_effect", "fall", "change", "specificity")


def row_numbers(result, weights, window_documents):
    """A row's result -> {name of a number: (1 + R,)}."""
    numbers = {}
    for kind in ("one", "five"):
        scores = probe_scores(result[kind], weights)
        for name, column in zip(PROBE_NAMES, scores.T):
            numbers[f"{kind}_{name}"] = column
    if "causal" in result:
        window_weights = weights[:, window_documents]
        window_weights = window_weights[:, :len(result["causal"]["steer"])]
        for name, column in zip(CAUSAL_NAMES, causal_numbers(result["causal"], window_weights).T):
            numbers[name] = column
    return numbers


def mean_dicts(dicts):
    """Means of numbers by key over dicts; None where there are none."""
    dicts = [d for d in dicts if d]
    if not dicts:
        return None
    return {key: float(np.mean([d[key] for d in dicts if key in d])) for key in dicts[0]}


def label_f1(results, weights):
    """F1 of one feature by label, means over results: a list of L."""
    once = weights[:1]
    values = []
    for result in results:
        confusion = np.tensordot(once, result["one"]["confusion"].numpy(), 1)[0]  # (L, 4)
        values.append(metrics(confusion, np.zeros((*confusion.shape[:1], 1, 2)))[:, 0])
    return nanmean(values, 0).tolist()


def make_rows(per_pair, data):
    """The card's rows, of read_pair's rows for every pair."""
    weights = resamples(data.n_documents)
    window_documents = data.score.documents[:, 0]
    rows = []
    reference = {}
    names = sorted(per_pair[0], key=lambda key: (key[0], key[1] != REFERENCE))
    for layer, name in progress(names, desc="intervals"):
        runs = [[row_numbers(result, weights, window_documents) for result in rows[layer, name]]
                for rows in per_pair]
        if name == REFERENCE:
            reference = runs
        row = {"layer": layer, "name": name}
        for number in runs[0][0]:
            values = [[result[number] for result in of_pair] for of_pair in runs]
            against = None
            if name != REFERENCE and number in reference[0][0]:
                against = [[result[number] for result in of_pair] for of_pair in reference]
            row[number] = summary(values, against)
        results = [result for rows in per_pair for result in rows[layer, name]]
        row["label_f1"] = label_f1(results, weights)
        row["codes"] = mean_dicts([result.get("codes") for result in results])
        row["absorption"] = mean_dicts([result.get("absorption") for result in results])
        rows.append(row)
    return sorted(rows, key=lambda row: (row["layer"], order(row["name"])))


def order(name):
    """Where a row stands in the tables."""
    names = ("Cayley", "TopK SAE on C", REFERENCE, "Matryoshka", "dense c", "dense M", "untrained",
             "random d", "random m", "current", "always")
    return [name.startswith(start) for start in names].index(True), name


def make_losses(per_pair):
    """The card's losses, of read_pair's losses for every pair: paired by window."""
    def mean_windows(name):  # (pairs, M, 2)
        return np.stack([np.mean([rows[name].numpy() for rows in seeds_of], axis=0)
                         for seeds_of in per_pair])

    base = mean_windows("dense")
    rows = []
    for name in per_pair[0][0]:
        values = mean_windows(name)
        difference = values[..., 0] - base[..., 0]  # (pairs, M)
        mean, error = mean_and_error(difference.mean(0))
        rows.append({
            "name": name,
            "loss": float(values[..., 0].mean()),
            "over_seeds": spread(values[..., 0].mean(1)),
            "minus_dense": mean,
            "minus_dense_error": error,
            "minus_dense_over_seeds": spread(difference.mean(1)),
            "kl": float(values[..., 1].mean()),
        })
    return rows


# -----------------------------------------------------------------------------
# tables and picture


def brief(text):
    """Text without the zeros before decimal points, so that the tables fit 100 columns."""
    return re.sub(r"\b0\.", ".", text)


def plain(number, form=".3f"):
    return "" if number is None else brief(f"{number['mean']:{form}}")


def with_spread(number):
    """Text of a summary: mean [interval] +- spread."""
    if number is None:
        return ""
    text = f"{number['mean']:.3f}"
    if number["interval"]:
        low, high = number["interval"]
        text += f" [{low:.3f}, {high:.3f}]"
    if number["over_seeds"] is not None:
        text += f" +- {number['over_seeds']:.3f}"
    return brief(text)


def against_reference(number):
    """Text of a summary's difference to the reference row."""
    if number is None or "difference" not in number:
        return ""
    text = f"{number['difference']:+.3f}"
    if number["difference_interval"]:
        low, high = number["difference_interval"]
        text += f" [{low:+.3f}, {high:+.3f}]"
    return brief(text)


def loss_table(losses):
    rows = []
    for row in losses:
        spread_text = "" if row["over_seeds"] is None else f" +- {row['over_seeds']:.3f}"
        rows.append([row["name"], f"{row['loss']:.4f}{spread_text}",
                     f"{row['minus_dense']:+.4f} ({row['minus_dense_error']:.4f})",
                     f"{row['kl']:.4f}"])
    return markdown(["loss", "nats a token", "minus dense (s.e.)", "KL"], rows)


def probe_table(rows, kind, title):
    """kind: "one" or "five"."""
    cells = []
    for row in rows:
        f1 = row[f"{kind}_f1"]
        cells.append([row["name"], with_spread(f1), against_reference(f1),
                      plain(row[f"{kind}_balanced_accuracy"]), plain(row[f"{kind}_auc"])])
    return markdown([title, "F1", "F1, to the SAE", "bal. acc.", "AUC"], cells)


def steering_table(rows):
    cells = []
    for row in rows:
        share = row.get("steering_share")
        if share:
            cells.append([row["name"], with_spread(share), against_reference(share),
                          with_spread(row["steering_by_effect"])])
    return markdown(["steering", "share of the gradient's", "to the SAE", "chosen by effect"],
                    cells)


def ablation_table(rows):
    cells = []
    for row in rows:
        if row.get("specificity"):
            cells.append([row["name"], with_spread(row["specificity"]),
                          against_reference(row["specificity"]),
                          plain(row["fall"], ".4f"), plain(row["change"], ".4f")])
    return markdown(["ablation", "specificity", "to the SAE", "fall", "change"], cells)


def codes_table(rows):
    names = {
        "token_entropy": "token bits",
        "token_entropy_by_use": "by use",
        "label_entropy": "label bits",
        "label_entropy_by_use": "by use",
        "explained": "explained",
    }
    cells = []
    for row in rows:
        codes = row["codes"]
        if codes:
            numbers = [f"{codes.get(name, math.nan):.3f}" for name in names]
            cells.append([row["name"], *map(brief, numbers), f"{codes['active']:.1f}",
                          f"{codes['dead']:,.0f}", f"{codes['rare']:,.0f}"])
    return markdown(["codes", *names.values(), "active", "dead", "rare"], cells)


def absorption_table(rows):
    cells = []
    for row in rows:
        if row["absorption"]:
            *scores, n_letters = row["absorption"].values()
            cells.append([row["name"], *(f"{score:.3f}" for score in scores), f"{n_letters:.0f}"])
    return markdown(["absorption", "fraction", "full", "probe F1", "letters"], cells)


CONTESTS = {
    "one_f1": "reading by one feature",
    "five_f1": "reading by five",
    "steering_share": "steering",
    "specificity": "specificity of ablations",
}


def verdict(card, layer):
    """One sentence on who wins what at a layer, Cayley or the reference row."""
    row = next(r for r in card["rows"] if (r["layer"], r["name"]) == (layer, "Cayley"))
    few_documents = "intervals" in card["header"]
    contests = {"ahead": [], "behind": [], "undecided": []}
    for key, name in CONTESTS.items():
        number = row.get(key) or {}
        if number.get("difference_interval"):
            low, high = number["difference_interval"]
            if few_documents or low <= 0 <= high:
                outcome = "undecided"
            else:
                outcome = "ahead" if low > 0 else "behind"
            contests[outcome].append(f"{name} ({brief(format(number['difference'], '+.3f'))})")
    parts = [f"{outcome} in {', '.join(names)}" for outcome, names in contests.items() if names]
    losses = {loss["name"]: format(loss["minus_dense"], "+.3f") for loss in card["losses"]}
    parts.append(f"loss above dense's {brief(losses['Cayley'])} with Cayley in every layer, "
                 f"{brief(losses[f'dense, TopK SAE in layer {layer}'])} with the SAE in this one")
    return f"Layer {layer}, Cayley beside the {REFERENCE}: {'; '.join(parts)}."


CSV_COLUMNS = ("layer", "row", "number", "mean", "low", "high", "over_seeds", "difference",
               "difference_low", "difference_high", "difference_over_seeds")


def csv_rows(card):
    """The card as rows of CSV_COLUMNS, a number a row."""
    rows = []
    for loss in card["losses"]:
        for number in ("loss", "minus_dense", "minus_dense_error", "kl"):
            over_seeds = loss.get(f"{number}_over_seeds", "")
            if number == "loss":
                over_seeds = loss["over_seeds"]
            rows.append(["", loss["name"], number, loss[number], "", "", over_seeds])
    for row in card["rows"]:
        place = [row["layer"], row["name"]]
        for number, value in row.items():
            if isinstance(value, dict) and "mean" in value:
                cells = [value["mean"], *(value["interval"] or ["", ""]), value["over_seeds"]]
                if "difference" in value:
                    cells += [value["difference"], *(value["difference_interval"] or ["", ""]),
                              value["difference_over_seeds"]]
                rows.append([*place, number, *cells])
        for label, f1 in zip(card["labels"], row["label_f1"]):
            rows.append([*place, f"one_f1 of {label}", f1])
        for number, value in {**(row["codes"] or {}), **(row["absorption"] or {})}.items():
            rows.append([*place, number, value])
    return rows


def text_of(card):
    """The card as lines: Markdown of at most 100 columns, and who wins what at the end."""
    lines = []
    for key, value in card["header"].items():
        lines += textwrap.wrap(f"{key}: {value}", 100, subsequent_indent="  ",
                               break_long_words=False, break_on_hyphens=False)
    lines += ["", *loss_table(card["losses"])]
    layers = sorted({row["layer"] for row in card["rows"]})
    for layer in layers:
        rows = [row for row in card["rows"] if row["layer"] == layer]
        tables = [probe_table(rows, "one", "best feature"), probe_table(rows, "five", "5 features"),
                  steering_table(rows), ablation_table(rows), codes_table(rows)]
        if any(row["absorption"] for row in rows):
            tables.append(absorption_table(rows))
        lines += ["", f"layer {layer}"]
        for table in tables:
            lines += ["", *table]
    for layer in layers:
        lines += ["", *textwrap.wrap(verdict(card, layer), 100)]
    return lines


PANELS = {
    "one_f1": "F1, best feature",
    "five_f1": "F1, 5 features",
    "steering_share": "steering, share of the gradient's",
}


def chart(rows):
    """Scores with their intervals as SVG text; Cayley's rows stand out."""
    several = len({row["layer"] for row in rows}) > 1
    lines = []
    for row in rows:
        name = f"layer {row['layer']}: {row['name']}" if several else row["name"]
        scores = []
        for key in PANELS:
            score = row.get(key)
            scores.append(score and [score["mean"], *score["interval"]])
        lines.append((name, row["name"].startswith("Cayley"), scores))
    return interval_chart(PANELS.values(), lines)


# -----------------------------------------------------------------------------
# the script


AT_LEAST = {"seeds": 1, "sae_tokens": SAE_BATCH, "label_tokens": 1, "fit_tokens": 1,
            "score_tokens": 1, "causal_tokens": 1, "n_windows": 2, "batch_size": 1}


def check_settings():
    """Raise ValueError for a setting that makes no sense, before anything is loaded."""
    if not 0 < sae_lr < math.inf:
        raise ValueError(f"sae_lr={sae_lr}: must be above 0 and finite")
    if not dense:
        raise ValueError("dense='': give the dense twin's checkpoint, --dense=dense.pt")
    for key in ("ckpt", "dense"):
        paths = globals()[key].split(",")
        if "" in paths or len(set(paths)) < len(paths):
            raise ValueError(f"{key}={globals()[key]!r}: write different checkpoints with a comma "
                             "between two of them")
    n_ckpt, n_dense = len(ckpt.split(",")), len(dense.split(","))
    if n_ckpt != n_dense:
        raise ValueError(f"{n_ckpt} checkpoints in --ckpt and {n_dense} in --dense: there must be "
                         "one dense twin for each, in the same order")


def chosen_layers(n_layer):
    """The layers that the setting names. Raises ValueError for one that isn't there."""
    if not layers:
        return [n_layer // 2]
    try:
        chosen = sorted({int(layer) for layer in layers.split(",")})
    except ValueError:
        raise ValueError(f"layers={layers!r}: write numbers and commas, as '1,2'") from None
    if chosen[0] < 0 or chosen[-1] >= n_layer:
        raise ValueError(f"layers={layers!r}: the model's layers are 0 to {n_layer - 1}")
    return chosen


def header(pairs, data, at_layers):
    """What is compared with what, as a dict of texts and numbers."""
    cayley = pairs[0].cayley
    width, k = code_shape(cayley.saes()[0])
    n_parameters = cayley.get_num_params()
    lines = {
        "Cayley": f"{ckpt}, levels {cayley.config.cayley_levels}",
        "dense": dense,
        "model": f"{n_parameters:,} parameters, d={cayley.config.n_embd}, "
                 f"{cayley.config.n_layer} layers",
        "matching": f"{width:,} features, {k} active ({k / cayley.config.n_embd:.1%} of d), at the "
                    f"MLP's input of layer {', '.join(map(str, at_layers))} for every sparse row",
        "tokens of the models": ", ".join(f"{a:,} and {b:,}" for a, b in
                                          (pair.tokens for pair in pairs)),
        "tokens of a post-hoc SAE": f"{sae_tokens:,}",
        "seeds": f"{len(pairs)} of training, {seeds} of post-hoc SAEs each",
        "data": f"{data.fit.windows[:, :-1].size:,} tokens to fit on, "
                f"{data.score.windows[:, :-1].size:,} of "
                f"{data.n_documents} documents to score, {causal_tokens:,} tokens to steer on",
        "labels": ", ".join(data.names),
    }
    if data.n_documents < 5:
        lines["intervals"] = (f"over {data.n_documents} documents and say little: more "
                              "--score_tokens")
    if data.encoding.name == "gpt2" and n_parameters < 1e9:
        lines["warning"] = ("absorption is made for models that can spell, SAEBench's default "
                            f"being Gemma-2-2B; this one has {n_parameters:,} parameters")
    return lines


def unit_seconds(pair, windows):
    """Seconds of a token's forward, a mean over a Pair's models, and of a post-hoc SAE's step."""
    config = pair.cayley.config
    device = on_device(pair.cayley)
    shape = code_shape(pair.cayley.saes()[0])
    x = torch.randn(SAE_BATCH, config.n_embd, device=device)
    few = windows[:max(1, 4096 // config.block_size), :-1]
    for rows, steps in ((few[:1, :8], 1), (few, 3)):  # what a first time builds isn't counted
        start = time.perf_counter()
        for model in pair[:2]:
            mlp_inputs(model, rows, [0], batch_size)
        read = time.perf_counter()
        sae = TopKSAE(config.n_embd, *shape).to(device)
        fit_saes([sae], itertools.repeat([x]), steps, [sae_lr])
        fitted = time.perf_counter()
    return (read - start) / (2 * few.size), (fitted - read) / steps


def announce(pairs, data, at_layers):
    """Tell what is computed and about how long it takes, by unit_seconds."""
    n_layer = pairs[0].cayley.config.n_layer
    n_labels = len(data.names)
    n_saes = seeds * (2 * len(at_layers) + (n_layer if splice_all else len(at_layers)))
    n_rows = 8 + 3 * seeds
    n_losses = 4 + 2 * len(at_layers)
    n_labelled = (data.fit.labels.size + data.score.labels.size) // n_labels  # tokens
    tokens = 2 * seeds * sae_tokens + 2 * n_losses * data.val_windows.size
    for layer in at_layers:
        # three models are read; codes and probes of a row take half a forward, at demo size
        tokens += (3 + n_rows / 2) * n_labelled
        # five tries of a strength for a label, and its ablation, each from this layer on
        tokens += 5 * n_rows * n_labels * causal_tokens * (1 - layer / n_layer)
    forward, step = unit_seconds(pairs[0], data.val_windows)
    seconds = tokens * forward + n_saes * sae_tokens / SAE_BATCH * step
    print(f"{len(pairs)} pairs, for each {n_saes} SAEs and {len(at_layers) * n_rows} rows: about "
          f"{duration(len(pairs) * seconds)}, less what {out_dir}/parts has already",
          file=sys.stderr, flush=True)


def load_pairs(target):
    """Every Pair, and a run's configuration. Raises ValueError where they don't go together."""
    pairs, configs = [], []
    for paths in zip(ckpt.split(","), dense.split(",")):
        pair, pair_configs = load_pair(*paths, target)
        pairs.append(pair)
        configs += pair_configs
    for key in ("tokenizer", "block_size", "vocab_size", "n_layer", "n_embd"):
        values = {config[key] for config in configs}
        if len(values) > 1:
            raise ValueError(f"the checkpoints differ in {key}: {sorted(values, key=str)}")
    for key, digests in zip(("ckpt", "dense"), zip(*(pair.digests for pair in pairs))):
        if len(set(digests)) < len(digests):
            raise ValueError(f"{key}={globals()[key]!r}: two of these files are the same, no two "
                             "training seeds")
    levels = {pair.cayley.config.cayley_levels for pair in pairs}
    if len(levels) > 1:
        raise ValueError(f"the checkpoints differ in cayley_levels: {sorted(levels)}")
    return pairs, configs[0]


def main():
    config = configure(globals(), at_least=AT_LEAST)
    check_settings()
    target = pick_device(device)
    pairs, run_config = load_pairs(target)
    at_layers = chosen_layers(len(pairs[0].cayley.blocks))
    data = load_data(run_config)
    announce(pairs, data, at_layers)
    with lock(out_dir):
        read = [read_pair(pair, data, at_layers) for pair in progress(pairs, desc="pairs")]
        card = {
            "header": header(pairs, data, at_layers),
            "settings": config,
            "labels": data.names,
            "losses": make_losses([losses for losses, _ in read]),
            "rows": make_rows([rows for _, rows in read], data),
        }
        write_json(os.path.join(out_dir, "scorecard.json"), card)
        write_csv(os.path.join(out_dir, "scorecard.csv"), CSV_COLUMNS, csv_rows(card))
        write_text(os.path.join(out_dir, "scorecard.svg"), chart(card["rows"]))
    print("\n".join(text_of(card)))


if __name__ == "__main__":
    main()
