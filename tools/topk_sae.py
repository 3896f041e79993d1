"""
TopK SAEs, and Matryoshka TopK SAEs, that are fitted to a model's activations afterwards: what
scorecard.py compares a CayleySAE with.

    sae = TopKSAE(d, n_features, k)
    fit_saes([sae], ([x] for x in batches), n_steps, [5e-3])    # x (N, d)
    codes = sae.encode(x)                                        # ids and values (..., k)
"""
import math

import torch
import torch.nn as nn
from torch.nn import functional as F

from cayley import Codes
from data import progress


class TopKSAE(nn.Module):
    """
    A TopK SAE, and with more than one prefix a Matryoshka TopK SAE.

    Gao et al., "Scaling and evaluating sparse autoencoders", 2024: relu of the k largest
    pre-activations, decoder rows of norm 1, AuxK for dead features. Bussmann et al., "Learning
    Multi-Level Features with Matryoshka Sparse Autoencoders", 2025: the features' prefixes
    reconstruct as well. Inputs are scaled to a mean square of 1 and centred by b_dec.
    """

    def __init__(self, d, n_features, k, prefixes=()):
        super().__init__()
        self.k = min(k, n_features)
        self.prefixes = (*prefixes, n_features)
        rows = F.normalize(torch.randn(n_features, d), dim=1)
        self.W_enc = nn.Parameter(rows.clone())
        self.W_dec = nn.Parameter(rows)
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.b_dec = nn.Parameter(torch.zeros(d))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("idle", torch.zeros(n_features))  # tokens since it was active

    def pre_activations(self, x):
        """x (N, d), scaled -> (N, n_features)."""
        return F.linear(x - self.b_dec, self.W_enc, self.b_enc)

    def encode(self, x):
        """x (..., d) -> Codes (..., k), none negative."""
        values, ids = self.pre_activations(x / self.scale).topk(self.k)
        return Codes(ids, values.relu())

    def decode(self, codes):
        """Codes (..., k) -> x (..., d)."""
        ids, values = codes
        flat = bag(ids.flatten(0, -2), values.flatten(0, -2), self.W_dec)
        return (flat.view(*ids.shape[:-1], -1) + self.b_dec) * self.scale

    def forward(self, x):
        return self.decode(self.encode(x))

    def atoms(self):
        """What a code of 1 adds to x, (n_features, d)."""
        return self.W_dec.detach() * self.scale


def states_of(saes):
    """SAEs as a list of dicts of tensors on the CPU, of which restored makes them again."""
    return [{key: value.cpu() for key, value in sae.state_dict().items()} for sae in saes]


def restored(state, k, device):
    """A fitted SAE with k active features, of one of states_of's dicts; without its prefixes."""
    n_features, d = state["W_dec"].shape
    sae = TopKSAE(d, n_features, k).to(device)
    sae.load_state_dict(state)
    return sae.eval().requires_grad_(False)


def bag(ids, values, rows):
    """The sum of values * rows[ids]: ids, values (N, k) -> (N, d)."""
    return F.embedding_bag(ids, rows, per_sample_weights=values.to(rows.dtype), mode="sum")


def sae_loss(sae, x, dead_after):
    """
    Mean normalised square error over the prefixes, and AuxK's with weight 1/32: x (N, d), scaled.

    AuxK: the error as reconstructed by the d/2 largest pre-activations of features that were idle
    for dead_after tokens.
    """
    pre = sae.pre_activations(x)
    values, ids = pre.topk(sae.k, sorted=False)
    values = values.relu()
    variance = (x - x.mean(0)).square().sum().clamp_min(1e-9)
    loss = 0.0
    for prefix in sae.prefixes:  # the last one is everything
        x_hat = bag(ids, values * (ids < prefix), sae.W_dec) + sae.b_dec
        loss = loss + (x - x_hat).square().sum() / variance / len(sae.prefixes)
    with torch.no_grad():
        fired = torch.zeros_like(sae.idle)
        fired.index_add_(0, ids.flatten(), (values > 0).flatten().to(fired.dtype))
        sae.idle += len(x)
        sae.idle.masked_fill_(fired > 0, 0)
    dead = sae.idle >= dead_after
    k_aux = min(x.shape[1] // 2, int(dead.sum()))
    if k_aux:
        error = (x - x_hat).detach()
        aux, aux_ids = pre.masked_fill(~dead, -math.inf).topk(k_aux, sorted=False)
        error_hat = bag(aux_ids, aux.relu(), sae.W_dec)
        scale = error.square().sum().clamp_min(1e-9)
        loss = loss + (error - error_hat).square().sum() / scale / 32
    return loss


class Schedule:
    """
    Adam of one SAE for n_steps: its learning rate warms up over the first 5% of the steps and falls
    to 0 over the last share of cooldown. Gradients of decoder rows keep their norm, which is set
    back to 1 after every step.
    """

    def __init__(self, sae, lr, n_steps, cooldown):
        self.sae = sae
        self.lr = lr
        self.n_steps = n_steps
        self.cooldown = cooldown
        self.adam = torch.optim.Adam(sae.parameters(), lr=lr, eps=6.25e-10)

    def step(self, step):
        """Take step number step with the gradients that are there, and clear them."""
        warmup = (step + 1) / (0.05 * self.n_steps)
        cooldown = (self.n_steps - step) / (self.cooldown * self.n_steps)
        self.adam.param_groups[0]["lr"] = self.lr * min(1, warmup, cooldown)
        rows = self.sae.W_dec.data
        grad = self.sae.W_dec.grad
        grad -= (grad * rows).sum(1, keepdim=True) * rows
        self.adam.step()
        self.adam.zero_grad()
        rows.copy_(F.normalize(rows, dim=1))


def fit_saes(saes, inputs, n_steps, lrs):
    """
    Fit SAEs in lockstep: inputs yields n_steps lists of x (N, d), one for each; lrs: of each the
    learning rate at the peak, see Schedule.
    """
    schedules = [Schedule(sae, lr, n_steps, cooldown=0.2) for sae, lr in zip(saes, lrs)]
    steps = zip(range(n_steps), inputs)
    for step, of_saes in progress(steps, desc=f"{len(saes)} SAEs", total=n_steps):
        for sae, schedule, x in zip(saes, schedules, of_saes):
            if step == 0:
                sae.scale.copy_(x.square().mean().sqrt())
                sae.b_dec.data.copy_((x / sae.scale).mean(0))
            sae_loss(sae, x / sae.scale, dead_after=n_steps * len(x) / 20).backward()
            schedule.step(step)
    for sae in saes:
        sae.eval().requires_grad_(False)
