"""
What nodes of an MLP's input do to a model's answer, for circuits.py: dictionaries, runs with some
nodes held at other values, and scores by integrated gradients. Definitions stand in circuits.py.

    _, clean = reads(dictionary, contexts.clean, contexts.last)
    held = held_reads(dictionary, contexts, clean, "patch")
    gradients, = integrated_gradients(dictionary, contexts, clean, held, [contexts])
    scores = node_scores(dictionary, *differences(contexts, clean, held), gradients)
    logits = with_nodes(dictionary, contexts, held, ranks(scores) < 10)

Shapes: B contexts of T tokens, L layers, D numbers that a layer's reader gets, F features; of nodes
F + 1, the last one being the error. Contexts: see tasks.py.
"""
import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

STEPS = 10  # of integrated gradients

# -----------------------------------------------------------------------------
# dictionaries: what the nodes of a layer are


class Read(NamedTuple):
    """What one layer's reader got, total = sum of values * atoms + error (+ a constant)."""

    total: Tensor  # (B, T, D)
    values: Tensor  # (B, T, F)
    error: Tensor  # (B, T, D), or (1,), a zero, where values are all there is


class Coordinates:
    """The coordinates that an MLP reads: a dictionary without weights, which others override."""

    keeps_error = True

    def __init__(self, name, model):
        self.name = name
        self.model = model

    def reader(self, block):
        """The module of a block that reads the sum of the nodes."""
        return block.mlp

    def read(self, layer, total):
        """The Read of total (B, T, D), inside of forward."""
        return Read(total, total, total.new_zeros(1))

    def combine(self, layer, values):
        """The sum of values * atoms: (B, T, F) -> (B, T, D)."""
        return values

    def project(self, layer, gradient):
        """Products with the atoms: (B, T, D) -> (B, T, F)."""
        return gradient

    def constant(self, layer):
        """What is read where all values and errors are 0."""
        return 0


class Neurons(Coordinates):
    """The neurons of the MLPs."""

    def reader(self, block):
        return block.mlp.c_proj


class Features(Coordinates):
    """Features with atoms, a list of (F, D), one a layer."""

    def __init__(self, name, model, atoms):
        super().__init__(name, model)
        self.atoms = atoms

    def combine(self, layer, values):
        return values @ self.atoms[layer]

    def project(self, layer, gradient):
        return gradient @ self.atoms[layer].T

    def spread(self, layer, ids, values):
        """ids, values (B, T, k) -> (B, T, F)."""
        n_features = len(self.atoms[layer])
        return values.new_zeros(*ids.shape[:-1], n_features).scatter(-1, ids, values)


class CayleyFeatures(Features):
    """The features of a model's CayleySAEs, numbered through the levels."""

    def __init__(self, name, model):
        super().__init__(name, model, [all_atoms(sae) for sae in model.saes()])

    def read(self, layer, total):
        sae = self.model.saes()[layer]
        codes = sae.record[-1].codes  # of the forward that is going on
        ids = [code.ids + where.start for code, where in zip(codes, sae.level_slices)]
        values = torch.cat([code.values for code in codes], -1)
        return Read(total, self.spread(layer, torch.cat(ids, -1), values), total.new_zeros(1))


def all_atoms(sae):
    """The atoms of all levels of a CayleySAE, (F, d)."""
    ids = [torch.arange(2**level.n) for level in sae.levels]
    return torch.cat([sae.atoms(level, level_ids) for level, level_ids in enumerate(ids)]).detach()


class SAEFeatures(Features):
    """The features of SAEs of a dense model's MLP inputs, and their errors."""

    def __init__(self, name, model, saes, keeps_error):
        super().__init__(name, model, [sae.atoms() for sae in saes])
        self.saes = saes
        self.keeps_error = keeps_error

    def read(self, layer, total):
        values = self.spread(layer, *self.saes[layer].encode(total))
        explained = self.combine(layer, values) + self.constant(layer)
        return Read(total, values, total - explained)

    def constant(self, layer):
        return self.saes[layer].b_dec * self.saes[layer].scale


# -----------------------------------------------------------------------------
# runs: B contexts of T tokens, L layers, F features and one node more for the error


def forward(dictionary, idx, last, change):
    """
    Logits (B, V) at the tokens last (B,) of idx (B, T), with layers reading change(layer, total) in
    the place of their total (B, T, D).
    """
    model = dictionary.model
    with contextlib.ExitStack() as stack:
        stack.enter_context(model.recording())
        for layer, block in enumerate(model.blocks):
            def hook(module, inputs, layer=layer):
                return change(layer, inputs[0])

            handle = dictionary.reader(block).register_forward_pre_hook(hook)
            stack.callback(handle.remove)
        logits, _ = model(idx, n_logits=0)  # (B, T, V)
    return logits[torch.arange(len(idx)), last]


def margin(logits, contexts):
    """The metric m (B,) of logits (B, V)."""
    of_answer = logits.gather(1, contexts.answer[:, None])[:, 0]
    of_wrong = logits.gather(1, contexts.wrong.clamp_min(0)[:, None])[:, 0]
    return of_answer - torch.where(contexts.wrong < 0, logits.logsumexp(1), of_wrong)


@torch.no_grad()
def reads(dictionary, idx, last):
    """Logits (B, V), and the Read of every layer."""
    found = []

    def keep(layer, total):
        found.append(dictionary.read(layer, total))
        return total

    logits = forward(dictionary, idx, last, keep)
    return logits, found


def real_tokens(contexts):
    """Which tokens are before the padding, bool (B, T)."""
    positions = torch.arange(contexts.clean.shape[1], device=contexts.last.device)
    return positions <= contexts.last[:, None]


def mean_reads(dictionary, batches):
    """Every layer's mean Read over the tokens of the patched prompts of Contexts, (1, 1, ...)."""
    sums, n_tokens = {}, 0
    for batch in batches:
        real = real_tokens(batch)
        n_tokens += int(real.sum())
        for layer, read in enumerate(reads(dictionary, batch.patch, batch.last)[1]):
            for name, part in read._asdict().items():
                of_batch = part[real].sum(0) if part.dim() > 1 else part
                sums[layer, name] = sums.get((layer, name), 0) + of_batch
    means = {key: total[None, None] / n_tokens for key, total in sums.items()}
    layers = range(len(dictionary.model.blocks))
    return [Read(*(means[layer, name] for name in Read._fields)) for layer in layers]


def held_reads(dictionary, contexts, clean, how, means=None):
    """
    What nodes outside of a circuit are held at, a list of Reads.

    how: "patch", "zero" or "mean", which are means, of mean_reads.
    """
    if how == "mean":
        return means
    if how == "patch":
        return reads(dictionary, contexts.patch, contexts.last)[1]
    held = []
    for layer, read in enumerate(clean):
        total = torch.zeros_like(read.total) + dictionary.constant(layer)
        held.append(Read(total, torch.zeros_like(read.values), torch.zeros_like(read.error)))
    return held


@torch.no_grad()
def with_nodes(dictionary, contexts, held, keep):
    """Logits (B, V) with the nodes keep, bool (B, L, T, F + 1), the others held."""
    def change(layer, total):
        now = dictionary.read(layer, total)
        kept = keep[:, layer]
        values = torch.where(kept[..., :-1], 0, held[layer].values - now.values)
        keeps_error = kept[..., -1:] & dictionary.keeps_error
        error = torch.where(keeps_error, 0, held[layer].error - now.error)
        return total + dictionary.combine(layer, values) + error

    return forward(dictionary, contexts.clean, contexts.last, change)


@torch.no_grad()
def with_permuted(dictionary, contexts, held, permutations, keep):
    """
    As with_nodes, but nodes change the held total, and along wrong atoms.

    permutations: a layer's feature permutation[f] has the atom of f.
    """
    def change(layer, total):
        now = dictionary.read(layer, total)
        kept = keep[:, layer]
        values = torch.where(kept[..., :-1], now.values - held[layer].values, 0)
        keeps_error = kept[..., -1:] & dictionary.keeps_error
        error = torch.where(keeps_error, now.error - held[layer].error, 0)
        moved = dictionary.combine(layer, values[..., permutations[layer]])
        return held[layer].total + moved + error

    return forward(dictionary, contexts.clean, contexts.last, change)


# -----------------------------------------------------------------------------
# scores


@torch.no_grad()
def residual_streams(model, idx):
    """What every layer's MLP adds its output to, a list of (B, T, d): idx (B, T)."""
    found = []

    def keep(module, inputs):
        found.append(inputs[0])

    handles = [block.ln_2.register_forward_pre_hook(keep) for block in model.blocks]
    model(idx)
    for handle in handles:
        handle.remove()
    return found


def logits_from(dictionary, layer, residual, total, last):
    """Logits (B, V) at the tokens last (B,) when a layer reads total (B, T, D) beside residual."""
    model = dictionary.model
    x = residual + dictionary.reader(model.blocks[layer])(total)
    for block in model.blocks[layer + 1:]:
        x = block(x)
    return model.lm_head(model.ln_f(x[torch.arange(len(x)), last]))


def integrated_gradients(dictionary, contexts, clean, held, targets):
    """
    The mean gradient of m with respect to each layer's total, from clean to held.

    targets: Contexts of which only answer and wrong matter. Returns a list of (B, T, D) of each.
    """
    residuals = residual_streams(dictionary.model, contexts.clean)
    means = [[] for _ in targets]
    for layer, (start, end) in enumerate(zip(clean, held)):
        sums = [0] * len(targets)
        for step in range(STEPS):
            total = torch.lerp(start.total, end.total.expand_as(start.total), step / STEPS)
            total.requires_grad_()
            logits = logits_from(dictionary, layer, residuals[layer], total, contexts.last)
            for i, target in enumerate(targets):
                m = margin(logits, target).sum()
                sums[i] = sums[i] + torch.autograd.grad(m, total, retain_graph=True)[0]
        for mean, layer_sum in zip(means, sums):
            mean.append(layer_sum / STEPS)
    return means


def differences(contexts, clean, held):
    """clean - held of the features, a list of (B, T, F), and of the error, of (B, T, D)."""
    real = real_tokens(contexts)[..., None]
    values, errors = [], []
    for one, other in zip(clean, held):
        values.append((one.values - other.values) * real)
        errors.append((one.error - other.error) * real)
    return values, errors


def node_scores(dictionary, values, errors, gradients, permutations=None):
    """
    The nodes' scores (B, L, T, F + 1) from differences and gradients.

    With permutations the atom of f is that of feature permutation[f].
    """
    scores = []
    for layer, (value, error, gradient) in enumerate(zip(values, errors, gradients)):
        products = dictionary.project(layer, gradient)  # (B, T, F)
        if permutations is not None:
            products = products[..., permutations[layer].argsort()]
        of_error = (error * gradient).sum(-1, keepdim=True) * dictionary.keeps_error
        scores.append(torch.cat([value * products, of_error], -1))
    return torch.stack(scores, 1)


def node_sizes(dictionary, values, errors):
    """How far each node's clean value is from its ablated one, (B, L, T, F + 1)."""
    sizes = []
    for value, error in zip(values, errors):
        of_error = error.norm(dim=-1, keepdim=True) * dictionary.keeps_error
        sizes.append(torch.cat([value.abs(), of_error], -1))
    return torch.stack(sizes, 1)


def ranks(scores):
    """The rank of every node in its context, 0 for the largest |score|, of scores' shape."""
    order = scores.flatten(1).abs().argsort(dim=1, descending=True, stable=True)
    numbers = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, numbers).view_as(scores)
