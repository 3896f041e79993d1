"""
CayleySAE: a hierarchical top-k sparse code over a parameter-free algebraic dictionary.

The top half builds the dictionary: labels of the coordinates of R^d by bits over GF(2^t), d = 2^t, and the atoms,
which are parities of those labels. The bottom half is the layer. It needs only torch and numpy and nothing from the
rest of the project: copy this file into yours.

Names: n = bits of a level (2^n features), k = its active features, delta = 2^m = features in a block that a parent
opens, N = tokens, K = active features of all levels, F = features of all levels.
"""
import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

# -----------------------------------------------------------------------------
# the field GF(2^t) and the label map, in exact integers

PRIMITIVE_POLYNOMIALS = {4: 0x13, 5: 0x25, 6: 0x43, 7: 0x83, 8: 0x11D, 9: 0x211, 10: 0x409, 11: 0x805, 12: 0x1053}


def field_tables(t):
    """exp[i] = alpha^i as an integer, i < 2^t - 1, for the generator alpha of GF(2^t), and its inverse log (log[0] = 0)."""
    exp, log = np.ones(2**t - 1, dtype=np.int64), np.zeros(2**t, dtype=np.int64)
    for i in range(1, len(exp)):
        exp[i] = exp[i - 1] << 1
        exp[i] ^= PRIMITIVE_POLYNOMIALS[t] * (exp[i] >> t)
    log[exp] = np.arange(len(exp))
    return exp, log


@functools.cache
def all_label_bits(t, exponents=None):
    """Every label bit that GF(2^t) offers, uint8 (bits, 2^t), by the exponents of label_bits or by others."""
    if t not in PRIMITIVE_POLYNOMIALS:
        raise ValueError(f"t={t}: the label map is defined for t from 4 to 12, that is n_embd from 16 to 4096")
    x, order = np.arange(2**t), 2**t - 1
    exp, log = field_tables(t)
    trace = np.bitwise_xor.reduce([exp[np.arange(order) * 2**i % order] for i in range(t)])  # Tr(alpha^i)
    candidates = [x >> (t - 1 - i) & 1 for i in range(t)]
    for e in exponents or ((3, 5) if t % 2 else (2 ** (t // 2) + 1, 2 ** (t // 2 + 1) + 1)):
        candidates += [np.where(x == 0, 0, trace[(j + e * log) % order]) for j in range(t)]
    bits, basis = [], {}  # basis: leading bit -> vector of F_2^d as an int, for Gaussian elimination
    for bit in candidates:
        vector = int.from_bytes(np.packbits(bit.astype(np.uint8)).tobytes())
        while vector.bit_length() in basis:
            vector ^= basis[vector.bit_length()]
        if vector:
            basis[vector.bit_length()] = vector
            bits.append(bit)
    return np.array(bits, dtype=np.uint8)


def label_bits(t, n, exponents=None):
    """
    The first n label bits s_n of the 2^t coordinates, uint8 (n, 2^t).

    First the t bits of x, most significant first, so that n = t is the Walsh-Hadamard basis. Then Tr(alpha^j x^e),
    j = 0..t-1, without the linearly dependent ones: for even t, e = 2^(t/2)+1 and 2^(t/2+1)+1 (small, large Kasami
    set); for odd t, e = 3 and 5 (Gold); exponents, a tuple, takes others. Source: Kasami 1966; Sarwate & Pursley, Proc.
    IEEE 68(5), 1980.
    Raises ValueError for t outside 4..12 or an n that the field does not give.
    """
    bits = all_label_bits(t, exponents)
    if not 1 <= n <= len(bits):
        raise ValueError(f"n={n}: GF(2^{t}), for n_embd={2**t}, gives labels of 1 to {len(bits)} bits")
    return bits[:n]


@functools.cache
def labels(t, n, exponents=None):
    """label_bits as integers, first bit most significant: int64 (2^t,). labels(t, n) >> 1 is labels(t, n - 1)."""
    return (label_bits(t, n, exponents).astype(np.int64) << np.arange(n - 1, -1, -1)[:, None]).sum(0)


def coherence(t, n):
    """
    max |<phi_u, phi_v>| over u != v of the level with n bits, exact and exhaustive.

    <phi_u, phi_v> depends on w = u XOR v alone and is 1/d times the Walsh-Hadamard transform of the histogram of
    labels at w: the spectrum of the Cayley graph on F_2^n that the labels generate.
    """
    histogram = torch.from_numpy(np.bincount(labels(t, n), minlength=2**n)).double()  # so the transform is exact
    return walsh_hadamard(histogram.unsqueeze(1))[1:].abs().max().item() / 2**t


# -----------------------------------------------------------------------------
# levels

class Level(NamedTuple):
    n: int  # bits: 2^n features
    k: int  # active features per token
    delta: int  # features that one active parent opens; 0 on the top level


def parse_levels(text):
    """"10,16,0;15,32,256" -> [Level(10, 16, 0), Level(15, 32, 256)]. Raises ValueError naming a part it can't read."""
    levels = []
    for part in text.split(";"):
        try:
            levels.append(Level(*map(int, part.split(","))))
        except (ValueError, TypeError):
            raise ValueError(f"level {part!r} of {text!r}: write three integers n,k,delta a level and ';' between "
                             "levels, as in '10,16,0;15,32,256'") from None
    return levels


def check_levels(n_embd, levels, per_parent_budget=True):
    """Raise ValueError, with the numbers, unless R^n_embd has these levels and k features are open on each."""
    t = n_embd.bit_length() - 1
    if n_embd != 2**t or t not in PRIMITIVE_POLYNOMIALS:
        raise ValueError(f"n_embd={n_embd}: a CayleySAE needs a power of two from 16 to 4096")
    for i, (n, k, delta) in enumerate(levels):
        parent_n, n_bits = levels[i - 1].n, len(all_label_bits(t))
        gated = per_parent_budget and i > 0
        if i == 0 and (n != t or delta != 0):
            fault = f"the top level needs n = log2(n_embd) = {t} and, having no parents, delta = 0"
        elif i > 0 and not parent_n < n <= n_bits:
            fault = f"n must be above the parent level's {parent_n} and at most the {n_bits} bits that GF(2^{t}) gives"
        elif gated and (delta.bit_count() != 1 or not 2 ** (n - parent_n) <= delta <= 2**n):
            fault = f"delta must be a power of two from 2^(n - parent's n) = {2 ** (n - parent_n)} to 2^n = {2**n}"
        elif not 1 <= k <= (delta if gated else 2**n):
            fault = f"k must be from 1 to the {delta if gated else 2**n} features that are surely open"
        else:
            continue
        raise ValueError(f"level {i} '{n},{k},{delta}': {fault}")


# -----------------------------------------------------------------------------
# atoms as rows of +1 and -1 (the unit norm is a factor 2^(-t/2) elsewhere), in tables that all layers share

TABLE_BYTES = 2**30  # a larger table of atoms is not kept: rows are made when needed, as a Walsh row times a chirp
CHUNK_BYTES = {"cpu": 12 * 2**20, "cuda": 2**29}  # bound of temporaries; on a CPU they should stay in its cache


def _parity(v, label, dtype, device):
    return torch.from_numpy(1 - 2 * (np.bitwise_count(v & label).astype(np.int8) & 1)).to(device, dtype)


@functools.cache
def _label_tensor(t, n, device):
    return torch.from_numpy(labels(t, n)).to(device)


@functools.cache
def _walsh(t, dtype, device):  # (2^t, 2^t): the Walsh-Hadamard matrix
    return _parity(np.arange(2**t)[:, None], np.arange(2**t), dtype, device)


@functools.cache
def _chirps(t, n, dtype, device):  # (2^(n-t), 2^t): the parities of the last n - t label bits
    return _parity(np.arange(2 ** (n - t))[:, None], labels(t, n), dtype, device)


@functools.cache
def _sign_table(t, n, dtype, device):  # (2^n, 2^t), or None if that is too large
    if 2 ** (n + t) * dtype.itemsize > TABLE_BYTES:
        return None
    walsh = _walsh(t, dtype, device)
    return (walsh[:, None] * _chirps(t, n, dtype, device)).view(2**n, 2**t) if n > t else walsh


def _signs(ids, t, n, dtype, device):
    """Atoms of the n-bit level as +1/-1: ids (...) -> (..., 2^t)."""
    table = _sign_table(t, n, dtype, device)
    if table is not None:
        return nn.functional.embedding(ids, table)
    walsh = nn.functional.embedding(ids >> (n - t), _walsh(t, dtype, device))
    return walsh * nn.functional.embedding(ids & (2 ** (n - t) - 1), _chirps(t, n, dtype, device))


def _lookup(ids, t, n, dtype, device):
    """Yield tokens (a slice), table, index such that table[index] = _signs(ids[tokens]), within bounded memory."""
    table = _sign_table(t, n, dtype, device)
    step = len(ids) if table is not None else CHUNK_BYTES[device.type] // (ids.shape[1] * 2**t * dtype.itemsize)
    for start in range(0, len(ids), max(1, step)):
        part = ids[start:start + max(1, step)]
        tokens, rows = slice(start, start + len(part)), torch.arange(part.numel(), device=device).view_as(part)
        yield (tokens, table, part) if table is not None else (tokens, _signs(part.flatten(), t, n, dtype, device), rows)


def walsh_hadamard(y):
    """Unnormalised Walsh-Hadamard transform along dim 0 of (2^r, M), as products with matrices of at most 32 x 32."""
    shape, done = y.shape, 1
    while done < shape[0]:
        radix = min(32, shape[0] // done)
        y = _walsh(radix.bit_length() - 1, y.dtype, y.device) @ y.reshape(done, radix, -1)
        done *= radix
    return y.reshape(shape)


# -----------------------------------------------------------------------------
# three operators: select the active features, combine atoms, project on atoms. combine is the adjoint of project and
# of select's products. torch.compile takes each as one node: no graph break, and the loop over chunks isn't unrolled.

@functools.cache
def _inner_chirps(t, n, m, dtype, device):  # (2^r, 2^p, 2^c): the parities of the last c label bits at x = (h, l)
    p, c = min(n - m, t), min(n - t, m)
    return _parity(np.arange(2**c), labels(t, n).reshape(2**p, -1).T[..., None], dtype, device)


def _block_scores(x, blocks, t, n, m):
    """
    Products of x with all atoms of some blocks: x (N, d), blocks (N, S) -> (N, S, 2^m), unnormalised.

    A block fixes the first q = n - m bits of its features. Split the t bits of a coordinate into h, the first
    p = min(q, t), and l, the other r. The block's own parity depends on h alone (if q > t, h is all of x). Signing x
    by it leaves the atoms of block 0: a Walsh function of l times a chirp of c bits. So: sign, sum over h against
    the 2^c chirps, transform over l.
    """
    N, S, q = len(x), blocks.shape[1], n - m
    p = min(q, t)
    x = x.view(N, 2**p, 2 ** (t - p)).permute(2, 0, 1).contiguous().unsqueeze(2)  # (2^r, N, 1, 2^p)
    chirps = _inner_chirps(t, n, m, x.dtype, x.device)
    if q > 0:
        x = x * _signs(blocks, p, q, x.dtype, x.device)  # (2^r, N, S, 2^p)
        y = torch.bmm(x.reshape(len(x), N * S, 2**p), chirps)  # (2^r, N*S, 2^c)
    else:
        y = x.squeeze(2) * chirps
    y = walsh_hadamard(y.flatten(1))
    return y.view(len(x), N, S, 2 ** min(n - t, m)).permute(1, 2, 0, 3).reshape(N, S, 2**m)


def _open_blocks(parents, parent_n, q):
    """Blocks (their first q bits) of active parents (N, k) -> in ascending order, (N, k), and which repeat the one before."""
    blocks = (parents >> (parent_n - q)).sort(1).values
    return blocks, nn.functional.pad(blocks[:, 1:] == blocks[:, :-1], (1, 0))


def _topk(score, k):
    """Indices of the k largest of each row: score (N, M) -> (N, k), largest first. They lie in k of any M/8 groups."""
    if score.shape[1] < 64 * k or score.shape[1] % 8:
        return score.topk(k).indices
    groups = score.unflatten(1, (8, -1))  # (N, 8, M/8)
    best = groups.amax(1).topk(k, sorted=False).indices  # (N, k)
    among = groups.gather(2, best.unsqueeze(1).expand(-1, 8, -1)).flatten(1).topk(k).indices  # in (8, k)
    return among // k * groups.shape[2] + best.gather(1, among % k)


def _select_chunk(x, levels):
    t, active, ids, products = levels[0][0], None, [], []
    for i, (n, k, m, scale, offset) in enumerate(levels):  # scale (2^q, 2^m), offset (2^q + 1, 2^m)
        q = n - m
        if q > 0:
            blocks, repeated = _open_blocks(active, levels[i - 1][0], q)  # (N, S)
            a = nn.functional.embedding(blocks, scale)  # (N, S, 2^m)
            b = nn.functional.embedding(blocks.masked_fill(repeated, 2**q), offset)
        else:
            blocks, a, b = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device), scale, offset[:1]
        product = _block_scores(x, blocks, t, n, m).to(scale.dtype)  # (N, S, 2^m)
        top = _topk(torch.addcmul(b, product, a).flatten(1), k)  # (N, k)
        active = blocks.gather(1, top >> m) << m | top & (2**m - 1)
        ids.append(active)
        products.append(product.flatten(1).gather(1, top))
    return torch.cat(ids, 1), torch.cat(products, 1)


@torch.library.custom_op("cayley::select", mutates_args=())
def select(x: Tensor, scale: Tensor, offset: Tensor, plan: list[int]) -> tuple[Tensor, Tensor]:
    """
    Per level the k open features v with the largest <x, phi_v> * scale_v + offset_v.

    x (N, d), scale and offset (F,), plan = n, k, m of each level, where a block has 2^m features (all of a level that
    has no gate) -> ids (N, K), products <x, phi_v> (N, K), differentiable in x.
    """
    levels, start, slots, token_bytes = [], 0, 1, 0
    for n, k, m in zip(plan[::3], plan[1::3], plan[2::3]):
        where = slice(start, start + 2**n)
        level_offset = nn.functional.pad(offset[where].view(-1, 2**m), (0, 0, 0, 1), value=-math.inf)  # for repeated blocks
        levels.append((n, k, m, scale[where].view(-1, 2**m) * x.shape[1] ** -0.5, level_offset))
        token_bytes = max(token_bytes, 4 * (slots if m < n else 1) * (x.shape[1] + 2 * 2**m))
        start, slots = start + 2**n, k
    with torch.autocast(x.device.type, enabled=False):
        parts = [_select_chunk(part, levels) for part in x.split(max(1, CHUNK_BYTES[x.device.type] // token_bytes))]
    ids, products = (torch.cat(part) for part in zip(*parts))
    return ids, products * x.shape[1] ** -0.5


@torch.library.custom_op("cayley::combine", mutates_args=())
def combine(ids: Tensor, weights: Tensor, t: int, n: int) -> Tensor:
    """Sum of weights * sqrt(d) phi: ids (N, K) of the n-bit level, weights (N, K) -> (N, 2^t), differentiable in weights."""
    out = weights.new_empty(len(ids), 2**t)
    for tokens, table, index in _lookup(ids, t, n, weights.dtype, weights.device):
        out[tokens] = nn.functional.embedding_bag(index, table, per_sample_weights=weights[tokens], mode="sum")
    return out


@torch.library.custom_op("cayley::project", mutates_args=())
def project(y: Tensor, ids: Tensor, t: int, n: int) -> Tensor:
    """Products <y, sqrt(d) phi>: y (N, 2^t), ids (N, K) of the n-bit level -> (N, K)."""
    out = y.new_empty(ids.shape)
    for tokens, table, index in _lookup(ids, t, n, y.dtype, y.device):
        bags = torch.arange(len(index), device=y.device)
        out[tokens] = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            y[tokens], table, index.flatten(), bags * index.shape[1], bags.repeat_interleave(index.shape[1]), 0
        ).view_as(index)
    return out


select.register_fake(lambda x, scale, offset, plan: (
    x.new_empty((len(x), sum(plan[1::3])), dtype=torch.int64), scale.new_empty(len(x), sum(plan[1::3]))))
combine.register_fake(lambda ids, weights, t, n: weights.new_empty(len(ids), 2**t))
project.register_fake(lambda y, ids, t, n: y.new_empty(ids.shape))


def _deepest(ids, levels_n):
    """Per level ids (..., k) -> the same atoms as ids of the deepest level, (..., K): p is p << shift there."""
    return torch.cat([i << (levels_n[-1] - n) for i, n in zip(ids, levels_n)], -1)


def _select_setup(ctx, inputs, output):
    ctx.dtype, ctx.plan = inputs[0].dtype, inputs[3]
    ctx.save_for_backward(_deepest(output[0].split(ctx.plan[1::3], 1), ctx.plan[::3]))


def _select_backward(ctx, _, grad):
    t, n = ctx.plan[0], ctx.plan[-3]
    return combine(*ctx.saved_tensors, (grad * 2 ** (-t / 2)).to(ctx.dtype), t, n), None, None, None


def _combine_setup(ctx, inputs, output):
    ids, _, ctx.t, ctx.n = inputs
    ctx.save_for_backward(ids)


select.register_autograd(_select_backward, setup_context=_select_setup)
combine.register_autograd(lambda ctx, grad: (None, project(grad.contiguous(), *ctx.saved_tensors, ctx.t, ctx.n), None, None),
                          setup_context=_combine_setup)


# -----------------------------------------------------------------------------
# the layer

class Codes(NamedTuple):
    """Active features of one level: ids (..., k) int64, largest score first, and their codes, values (..., k)."""
    ids: Tensor
    values: Tensor


class CayleySAE(nn.Module):
    """
    Sparse code of the normalised residual: per level the top-k features of a parameter-free dictionary.

    n_embd: width d, a power of two from 16 to 4096; levels: text for parse_levels, or a list of Levels.
    per_parent_budget: below the top level only the blocks of active parents compete; otherwise all features.
    score_standardize: select by (raw - mean) / std + bias, with running statistics; otherwise by raw + bias.
    forward_standardized: the code is that score; otherwise raw + bias.

    The biases are the only parameters: bias (F,), a slice of level_slices per level. Buffers of that layout: mean and
    var of raw, and active_counts, activations since it was last zeroed. Raises ValueError for impossible levels.
    """

    stats_momentum = 0.05
    stats_stride = 8  # statistics see every 8th position of (B, T, d), and every row of (N, d)
    min_var = 1e-5  # for constant features; after RMSNorm the mean square over a basis is 1

    def __init__(self, n_embd, levels, per_parent_budget=True, score_standardize=True, forward_standardized=True):
        super().__init__()
        self.levels = parse_levels(levels) if isinstance(levels, str) else [Level(*level) for level in levels]
        check_levels(n_embd, self.levels, per_parent_budget)
        self.n_embd, self.t, self.n = n_embd, n_embd.bit_length() - 1, self.levels[-1].n
        self.score_standardize, self.forward_standardized = score_standardize, forward_standardized
        self.edits = []  # interventions of forward, see edit
        self.plan = []
        for i, (n, k, delta) in enumerate(self.levels):
            self.plan += [n, k, delta.bit_length() - 1 if per_parent_budget and i > 0 else n]
        ends = np.cumsum([2**level.n for level in self.levels]).tolist()
        self.level_slices = [slice(end - 2**level.n, end) for end, level in zip(ends, self.levels)]
        self.bias = nn.Parameter(torch.zeros(ends[-1]))
        self.register_buffer("mean", torch.zeros(ends[-1]))
        self.register_buffer("var", torch.ones(ends[-1]))
        counts = torch.zeros(ends[-1], dtype=torch.int64)
        self.register_buffer("active_counts", counts)
        for name, zeros in (("rows", torch.zeros(1)), ("x", torch.zeros(n_embd)), ("xx", torch.zeros(n_embd, n_embd)),
                            ("counts", counts.clone())):  # sums over the training forwards since update_stats()
            self.register_buffer(f"pending_{name}", zeros, persistent=False)

    def standardization(self):
        """scale and shift (F,) of the features' scores, raw * scale + shift + bias."""
        if not self.score_standardize:
            return torch.ones_like(self.mean), torch.zeros_like(self.mean)
        scale = self.var.clamp_min(self.min_var).rsqrt()
        return scale, -self.mean * scale

    def encode(self, x):
        """x (..., d) -> [Codes of level 0, Codes of level 1, ...]. In training it also accumulates statistics."""
        flat = x.reshape(-1, self.n_embd)
        if torch.is_autocast_enabled(x.device.type):
            flat = flat.to(torch.get_autocast_dtype(x.device.type))
        scale, shift = self.standardization()
        ids, values = select(flat, scale, self.bias.detach() + shift, self.plan)  # (N, K)
        ks = [level.k for level in self.levels]
        features = torch.cat([i + where.start for i, where in zip(ids.split(ks, 1), self.level_slices)], 1)
        if self.forward_standardized:
            values = values * scale[features] + shift[features]
        values = values + self.bias.index_select(0, features.flatten()).view_as(values)
        if self.training:
            self._accumulate(x, features)
        return [Codes(i.reshape(x.shape[:-1] + (k,)), v.reshape(x.shape[:-1] + (k,)))
                for i, v, k in zip(ids.split(ks, 1), values.split(ks, 1), ks)]

    def decode(self, codes):
        """Codes per level, any number of features in each, -> the sum of values * atoms, (..., d)."""
        ids = _deepest([c.ids for c in codes], [level.n for level in self.levels])
        values = torch.cat([c.values for c in codes], -1) * 2 ** (-self.t / 2)
        if torch.is_autocast_enabled(values.device.type):
            values = values.to(torch.get_autocast_dtype(values.device.type))
        out = combine(ids.view(-1, ids.shape[-1]), values.view(-1, ids.shape[-1]), self.t, self.n)
        return out.view(ids.shape[:-1] + (self.n_embd,))

    def forward(self, x):
        """x (..., d) -> its reconstruction from the active features after self.edits, (..., d)."""
        return self.decode(self.edit(self.encode(x), self.edits))

    def edit(self, codes, edits):
        """
        Codes with some features' codes c changed to keep * c + add at every token: edits, a list of (level, feature, keep, add).

        (0, add) sets a code, (1, add) steers by add and (0, 0) ablates; c is 0 where a feature isn't active. What is
        active elsewhere stays as it is. Since decode is linear, an edit is one more entry with the difference.
        """
        codes = list(codes)
        for level, feature, keep, add in edits:
            ids, values = codes[level]
            old = values.masked_fill(ids != feature, 0).sum(-1, keepdim=True)
            codes[level] = Codes(torch.cat([ids, torch.full_like(ids[..., :1], feature)], -1),
                                 torch.cat([values, (keep - 1) * old + add], -1))
        return codes

    def atoms(self, level, ids):
        """Unit-norm atoms of features of a level, a tensor or list of m ids -> (m, n_embd)."""
        ids = torch.as_tensor(ids, device=self.bias.device)
        return _signs(ids, self.t, self.levels[level].n, self.bias.dtype, self.bias.device) * 2 ** (-self.t / 2)

    @torch.no_grad()
    def _accumulate(self, x, features):
        self.pending_counts.index_add_(0, features.flatten(), torch.ones_like(features).flatten())
        if self.score_standardize:
            stride = self.stats_stride if x.dim() > 2 else 1
            with torch.autocast(x.device.type, enabled=False):
                x = x[..., (x.shape[-2] - 1) % stride::stride, :].reshape(-1, self.n_embd).to(self.mean.dtype)
                self.pending_rows += len(x)
                self.pending_x += x.sum(0)
                self.pending_xx += x.T @ x

    @torch.no_grad()
    def update_stats(self):
        """
        Fold the training forwards since the last call, of all ranks, into mean, var and active_counts.

        Call it once per optimizer step on every rank. All features' moments are exact without scoring any:
        E[raw_v] = <phi_v, E[x]> and E[raw_v^2] = phi_v^T E[x x^T] phi_v. Since phi_v[i] phi_v[j] is the parity of v
        with s(i) XOR s(j), each is a Walsh-Hadamard transform, of length 2^n, of sums over equal labels.
        """
        pending = (self.pending_rows, self.pending_x, self.pending_xx, self.pending_counts)
        if dist.is_initialized() and dist.get_world_size() > 1:
            for sums in pending:  # before the transform, so that every world size rounds alike
                dist.all_reduce(sums)
        label = _label_tensor(self.t, self.n, self.mean.device)
        sums = self.mean.new_zeros(2**self.n, 2)
        sums[:, 0].index_add_(0, label, self.pending_x)
        sums[:, 1].index_add_(0, (label[:, None] ^ label).flatten(), self.pending_xx.flatten())
        rows = self.pending_rows
        first, second = (walsh_hadamard(sums) / rows.clamp_min(1)).unbind(1)
        mean = torch.cat([first[::2 ** (self.n - level.n)] for level in self.levels]) * 2 ** (-self.t / 2)
        square = torch.cat([second[::2 ** (self.n - level.n)] for level in self.levels]) * 2.0**-self.t
        momentum = self.stats_momentum * (rows > 0)  # no rows: the statistics stay as they are
        self.mean += momentum * (mean - self.mean)
        self.var += momentum * ((square - mean.square()).clamp_min(0) - self.var)
        self.active_counts += self.pending_counts
        for sums in pending:
            sums.zero_()
