"""
Sparse probing, and absorption, of codes: what scorecard.py scores features by. Here are arrays
alone, no models: its docstring has the protocol.

A Table holds the codes of N tokens. Probes are chosen on one Table with labels (N, L) and scored on
another; a score is kept as an Outcome, counts per document, of which metrics() takes any sum.
"""
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from data import progress
from tools.labels import english_words, token_texts

BINS = 256  # of scores, for AUC
FEWEST = 30  # tokens with a label on either side, for it to count

# -----------------------------------------------------------------------------
# codes by feature


class Table:
    """
    Codes of N tokens, to be had by feature.

    ids (N, k), or None where values (N, n_features) has every feature; a code of 0 is not active.
    """

    def __init__(self, ids, values, n_features):
        self.n_tokens = len(values)
        self.n_features = n_features
        self.dense = values if ids is None else None
        if ids is not None:
            active = np.flatnonzero(values)
            owners = ids.ravel()[active]
            order = np.argsort(owners, kind="stable")
            self.owners = owners[order]  # (E,), ascending
            self.rows = active[order] // values.shape[1]
            self.values = values.ravel()[active[order]]
            self.starts = np.searchsorted(self.owners, np.arange(n_features + 1))

    def feature(self, number):
        """The tokens at which a feature is active, and its codes there."""
        if self.dense is not None:
            return np.arange(self.n_tokens), self.dense[:, number]
        where = slice(self.starts[number], self.starts[number + 1])
        return self.rows[where], self.values[where]

    def column(self, number):
        """A feature's code at every token, 0 where it is not active, (N,)."""
        rows, values = self.feature(number)
        column = np.zeros(self.n_tokens, dtype=np.float32)
        column[rows] = values
        return column

    def at(self, tokens):
        """Codes of all features at some tokens (M,), each named once, -> (M, n_features)."""
        if self.dense is not None:
            return self.dense[tokens]
        place = np.full(self.n_tokens, -1)
        place[tokens] = np.arange(len(tokens))
        kept = place[self.rows] >= 0
        codes = np.zeros((len(tokens), self.n_features), dtype=np.float32)
        codes[place[self.rows[kept]], self.owners[kept]] = self.values[kept]
        return codes

    def sums(self, weights):
        """Sums over tokens of code * weight: weights (N, L) -> (n_features, L)."""
        if self.dense is not None:
            return self.dense.T.astype(np.float64) @ weights
        columns = []
        for weight in weights.T:
            columns.append(np.bincount(self.owners, self.values * weight[self.rows],
                                       minlength=self.n_features))
        return np.stack(columns, 1)

    def counts(self):
        """Activations of every feature, (n_features,)."""
        if self.dense is not None:
            return np.full(self.n_features, self.n_tokens)
        return np.diff(self.starts)


# -----------------------------------------------------------------------------
# sparse probing: fitted on one Table, scored on another


class Probe(NamedTuple):
    """One feature that predicts a label: where sign * code >= threshold."""

    feature: int
    sign: int
    threshold: float


def best_cut(scores, hits, positives):
    """
    The threshold of the best F1, "score >= threshold", for every label at once.

    scores (m,); hits (m, L): which have the label; positives (L,): how many do among all tokens,
    those without a score too. Returns F1 (L,) and thresholds (L,).
    """
    order = np.argsort(-scores, kind="stable")
    scores = scores[order]
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # of every run of ties
    found = hits[order].cumsum(0, dtype=np.int32)[last]  # (cuts, L)
    f1 = 2 * found / ((last + 1)[:, None] + positives)
    best = f1.argmax(0)
    return f1[best, np.arange(len(positives))], scores[last[best]]


def mean_differences(table, labels):
    """Mean code with the label less mean code without: labels (N, L) -> (n_features, L)."""
    positives = labels.sum(0)
    sums = table.sums(np.column_stack([labels, np.ones(len(labels))]))
    with_label = sums[:, :-1] / positives
    return with_label - (sums[:, -1:] - sums[:, :-1]) / (len(labels) - positives)


def candidates(table, differences):
    """The features that best_features tries: all of a sparse Table, some of a dense one."""
    if table.dense is None:
        return np.flatnonzero(table.counts())
    deviation = table.dense.std(0)[:, None] + 1e-9
    return np.unique(np.argsort(-np.abs(differences / deviation), axis=0)[:8])


def best_features(table, labels):
    """The Probe of the best F1 for each label: labels (N, L) -> L Probes."""
    positives = labels.sum(0)
    best = np.full(len(positives), -1.0)
    probes = [None] * len(positives)
    tried = candidates(table, mean_differences(table, labels))
    for feature in progress(tried, desc="best features"):
        rows, values = table.feature(feature)
        for sign in (1, -1):
            side = sign * values > 0 if table.dense is None else slice(None)
            scores = sign * values[side]
            if not len(scores):
                continue
            f1, thresholds = best_cut(scores, labels[rows[side]], positives)
            for label in np.flatnonzero(f1 > best):
                best[label] = f1[label]
                probes[label] = Probe(int(feature), sign, float(thresholds[label]))
    return probes


def logistic(x, y, C=1.0):
    """
    L2 logistic regression: x (N, m), y (N,) of 0 and 1 -> weights (m,), intercept.

    Minimises |w|^2 / 2 + C sum log(1 + exp(-(2y - 1) (x w + b))), as scikit-learn does, by Newton's
    method with halved steps.
    """
    x = np.column_stack([x, np.ones(len(x))]).astype(np.float64)
    y = np.asarray(y, dtype=np.float64)
    penalty = np.append(np.ones(x.shape[1] - 1), 0) / C
    w = np.zeros(x.shape[1])

    def objective(w):
        z = x @ w
        return np.logaddexp(0, z).sum() - y @ z + 0.5 * penalty @ (w * w)

    value = objective(w)
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -500, 500)))
        gradient = x.T @ (p - y) + penalty * w
        hessian = (x * (p * (1 - p))[:, None]).T @ x + np.diag(penalty + 1e-9)
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while size > 1e-6 and objective(w - size * step) > value:
            size /= 2
        w = w - size * step
        new = objective(w)
        if value - new <= 1e-12 * abs(value):
            break
        value = new
    return w[:-1], w[-1]


class Outcome(NamedTuple):
    """How a label was predicted: counts per document, from which every metric follows."""

    confusion: np.ndarray  # (D, 4): true and false negatives and positives, as tn, fp, fn, tp
    histogram: np.ndarray  # (D, BINS, 2): tokens without and with the label, by bin of the score


def outcome(scores, predicted, truth, documents):
    """Scores, predictions and truth (N,) -> Outcome. documents (N,): numbers from 0."""
    n_documents = documents.max() + 1
    cells = documents * 4 + 2 * truth + predicted
    confusion = np.bincount(cells, minlength=4 * n_documents).reshape(n_documents, 4)
    distinct, bins = np.unique(scores, return_inverse=True)
    if len(distinct) > BINS:  # by rank, so that each has about as many distinct scores
        bins = bins * BINS // len(distinct)
    cells = (documents * BINS + bins) * 2 + truth
    histogram = np.bincount(cells, minlength=2 * BINS * n_documents)
    return Outcome(confusion, histogram.reshape(n_documents, BINS, 2))


def metrics(confusion, histogram):
    """
    F1, balanced accuracy and AUC: confusion (..., 4), histogram (..., BINS, 2) -> (..., 3).

    nan where a class is empty. AUC counts ties, and what shares a bin, half.
    """
    tn, fp, fn, tp = np.moveaxis(np.asarray(confusion, dtype=np.float64), -1, 0)
    without, with_label = np.moveaxis(np.asarray(histogram, dtype=np.float64), -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = np.where(tp + fn > 0, 2 * tp / (2 * tp + fp + fn), np.nan)
        balanced = (tp / (tp + fn) + tn / (tn + fp)) / 2
        below = without.cumsum(-1) - without / 2
        auc = (with_label * below).sum(-1) / ((tp + fn) * (tn + fp))
    return np.stack([f1, balanced, auc], -1)


def probe_one(fit, score, fit_labels, score_labels, documents):
    """The best single features -> L Probes and their Outcomes on the other Table."""
    probes = best_features(fit, fit_labels)
    outcomes = []
    for probe, truth in zip(probes, score_labels.T):
        scores = probe.sign * score.column(probe.feature)
        predicted = scores >= np.float32(probe.threshold)
        outcomes.append(outcome(scores, predicted, truth, documents))
    return probes, outcomes


def probe_some(fit, score, fit_labels, score_labels, documents, n=5):
    """The n features of largest mean difference and a logistic probe -> L Outcomes."""
    differences = mean_differences(fit, fit_labels)
    outcomes = []
    for label, truth in enumerate(score_labels.T):
        features = np.argsort(-np.abs(differences[:, label]), kind="stable")[:n]
        x = np.stack([fit.column(f) for f in features], 1)
        weights, intercept = logistic(x, fit_labels[:, label])
        hits = fit_labels[:, label:label + 1]
        _, (threshold,) = best_cut(x @ weights + intercept, hits, hits.sum(0))
        scores = np.stack([score.column(f) for f in features], 1) @ weights + intercept
        outcomes.append(outcome(scores, scores >= threshold, truth, documents))
    return outcomes


def token_rates(ids, labels, vocab_size):
    """Share of each token's occurrences that have the label, (vocab_size, L), smoothed by one."""
    counts = np.bincount(ids, minlength=vocab_size)
    prior = labels.mean(0)
    rates = []
    for label in labels.T:
        rates.append(np.bincount(ids, label, minlength=vocab_size))
    return (np.stack(rates, 1) + prior) / (counts[:, None] + 1)


def probe_token(rates, fit_ids, score_ids, fit_labels, score_labels, documents):
    """The current token alone, by token_rates -> L Outcomes."""
    outcomes = []
    for label, truth in enumerate(score_labels.T):
        hits = fit_labels[:, label:label + 1]
        _, (threshold,) = best_cut(rates[fit_ids, label], hits, hits.sum(0))
        scores = rates[score_ids, label]
        outcomes.append(outcome(scores, scores >= threshold, truth, documents))
    return outcomes


def probe_nothing(score_labels, documents):
    """Saying yes at every token -> L Outcomes."""
    outcomes = []
    for truth in score_labels.T:
        scores = np.zeros(len(truth))
        outcomes.append(outcome(scores, scores == 0, truth, documents))
    return outcomes


def stacked(outcomes):
    """L Outcomes as tensors confusion (D, L, 4) and histogram (D, L, BINS, 2)."""
    return {
        "confusion": torch.from_numpy(np.stack([o.confusion for o in outcomes], 1)).int(),
        "histogram": torch.from_numpy(np.stack([o.histogram for o in outcomes], 1)).int(),
    }


# -----------------------------------------------------------------------------
# absorption


def letter_probes(x, letters):
    """Logistic probes of the 26 first letters: x (N, d), letters (N,) -> w (26, d), b (26,)."""
    w = torch.zeros(26, x.shape[1], requires_grad=True)
    b = torch.zeros(26, requires_grad=True)
    targets = F.one_hot(letters, 26).float()
    optimizer = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ w.T + b, targets, reduction="sum")
        loss = (loss + w.square().sum() / 2) / len(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.detach(), b.detach()


def main_features(fit, truth, most=10, jump=0.03):
    """
    The features that stand for a letter: the first k by mean difference, while k more of them
    raise a logistic probe's best F1 by more than jump. truth (N,).
    """
    differences = mean_differences(fit, truth[:, None])[:, 0]
    ranked = np.argsort(-differences, kind="stable")[:most]
    columns = np.stack([fit.column(f) for f in ranked], 1)
    kept, best = 1, -1.0
    for k in range(1, most + 1):
        weights, intercept = logistic(columns[:, :k], truth)
        scores = columns[:, :k] @ weights + intercept
        (f1,), _ = best_cut(scores, truth[:, None], np.array([truth.sum()]))
        if f1 <= best + jump:
            break
        kept, best = k, f1
    return ranked[:kept]


def word_absorption(parts, cosines, main, projection):
    """
    Absorption fraction and full absorption at one token, SAEBench's formulas: see absorption.

    parts (n_features,): code * cosine of its atom with the probe; main: features' numbers;
    projection: of x on the probe.
    """
    of_main = parts[main].sum()
    others = parts.copy()
    others[main] = 0
    absorbers = np.sort(others[(cosines >= 0.1) & (others > 0)])[-3:].sum()
    if of_main >= projection or absorbers < 0.4 * projection:
        fraction = 0.0
    elif of_main <= 0:
        fraction = 1.0
    else:
        taken = min(absorbers, projection - of_main)
        fraction = taken / (taken + of_main)
    top = int(parts.argmax())
    silent = bool((parts[main] == 0).all())
    full = silent and cosines[top] >= 0.025 and parts[top] >= 0.4 * projection > 0
    return fraction, bool(full)


def absorption(atoms, fit, score, fit_x, score_x, fit_letters, score_letters):
    """
    Mean over letters of the absorption fraction and of the rate of full absorption.

    SAEBench's first-letter definition (Chanin et al., "A is for Absorption", 2024; Karvonen et al.,
    "SAEBench", 2025; feature_absorption_calculator.py). With p the unit weights of a logistic probe
    of the letter on x, the projection of a token is <x, p>, and a feature's part is its code times
    its atom's norm times its cosine with p. Main features: see main_features. At each token that
    has the letter and that the probe finds:
    - absorbers: the sum of the 3 largest positive parts of other features with cosine >= 0.1;
    - fraction: 0 if the main parts reach the projection or absorbers < 0.4 projection; 1 if the
      main parts are not positive; else a / (a + main) with a = min(absorbers, projection - main);
    - full: no main feature is active, and the largest part has cosine >= 0.025 and is at least 0.4
      of the projection.
    Two departures: words are read where they stand in the text, not in a spelling prompt, and main
    features are ranked by mean difference, not by an L1 probe. The fractions compare parts with the
    projection, and so take codes for what adds up to x; those of a CayleySAE are in units of each
    feature's standard deviation and don't, so compare its rows with each other only.

    atoms (n_features, d); letters (N,): of tokens that are whole words 0..25, -1 elsewhere. Tables
    and x are of the same N tokens. Returns fraction, full, the probes' mean F1 and the number of
    letters.
    """
    on_fit, on_score = fit_letters >= 0, score_letters >= 0
    w, b = letter_probes(fit_x[on_fit], torch.from_numpy(fit_letters[on_fit]))
    atoms = atoms.cpu()
    norms = atoms.norm(dim=1).numpy()
    rows = []
    f1s = []
    for letter in range(26):
        truth = score_letters == letter
        if truth.sum() < FEWEST or (fit_letters == letter).sum() < FEWEST:
            continue
        found = (score_x @ w[letter] + b[letter] > 0).numpy() & on_score
        hits = np.flatnonzero(found & truth)
        f1s.append(2 * len(hits) / (found.sum() + truth.sum()))
        direction = F.normalize(w[letter], dim=0)
        cosines = F.cosine_similarity(atoms, direction[None]).numpy()
        main = main_features(fit, fit_letters == letter)
        projections = (score_x[hits] @ direction).numpy()
        results = [word_absorption(codes * norms * cosines, cosines, main, projection)
                   for codes, projection in zip(score.at(hits), projections)]
        if results:
            rows.append(np.mean(results, axis=0))
    if not rows:
        return None
    fraction, full = np.mean(rows, axis=0).tolist()
    return {"fraction": fraction, "full": full, "probe_f1": float(np.mean(f1s)),
            "letters": len(rows)}


def word_letters(ids, encoding):
    """First letter 0..25 of each token (N,) that is a whole word of A to Z, else -1."""
    letters = np.full(len(ids), -1)
    for number, word in enumerate(english_words(token_texts(ids, encoding))):
        text = word.text.strip()
        if word.starts_word and text == word.word and text.isascii():
            letters[number] = ord(text[0].lower()) - ord("a")
    return letters
