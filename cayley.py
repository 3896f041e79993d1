"""
CayleySAE: a hierarchical top-k sparse code over a parameter-free algebraic dictionary.

The top half builds the dictionary: labels of the coordinates of R^d by bits over GF(2^t), d = 2^t,
and the atoms, which are parities of those labels. Then comes the layer by its plain definition,
then the operators that compute the same fast, and last the layer. It needs only torch and numpy
and nothing from the rest of the project: copy this file into yours. Import cayley_triton.py, too,
and the operators run its kernels on CUDA.

Names: n = bits of a level (2^n features), k = its active features, delta = 2^m = features in a
block that a parent opens, N = tokens; of all levels, K = active features and F = features.

The laws, each with the test in test_cayley.py that checks it:
1. A coordinate x of R^d, d = 2^t, has a label s(x): its t bits, then bits Tr(alpha^j x^e) over
   GF(2^t). test_label_bits_are_traces
2. The atom of feature v is phi_v[x] = (-1)^<v, s(x)> / sqrt(d).
   test_atoms_are_the_parities_of_the_design
3. The top level is the Walsh-Hadamard basis, and levels nest.
   test_top_level_is_orthonormal_and_levels_nest
4. <phi_u, phi_v> depends on u XOR v alone, the spectrum of a Cayley graph, so the coherence is
   exact: 1/32 for 32,768 atoms of R^1024. test_coherence_is_the_table_of_the_design
5. score_v = (<x, phi_v> - mean_v) / std_v + bias_v, with running statistics that all ranks share.
   test_statistics_are_the_moments_of_raw
6. Below the top only the features in active parents' blocks of delta compete. test_gating
7. The k largest scores of each level are the code, and the output is the sum of code_v phi_v:
   codes, output and gradients equal plain_encode in float64. test_layer_equals_dense_reference
8. Changing a code by c changes the MLP's input by exactly c phi_v.
   test_interventions_change_exactly_their_atoms
"""
import contextlib
import functools
import itertools
import math
import operator
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.autograd import forward_ad

# -----------------------------------------------------------------------------
# the field GF(2^t) and the label map, in exact integers

PRIMITIVE_POLYNOMIALS = {
    4: 0x13,
    5: 0x25,
    6: 0x43,
    7: 0x83,
    8: 0x11D,
    9: 0x211,
    10: 0x409,
    11: 0x805,
    12: 0x1053,
}


def field_tables(t):
    """
    Powers and logarithms in GF(2^t) for its generator alpha.

    exp[i] = alpha^i as an integer, i < 2^t - 1, and log, its inverse (log[0] = 0).
    """
    exp = np.ones(2**t - 1, dtype=np.int64)
    for i in range(1, len(exp)):
        exp[i] = exp[i - 1] << 1
        exp[i] ^= PRIMITIVE_POLYNOMIALS[t] * (exp[i] >> t)
    log = np.zeros(2**t, dtype=np.int64)
    log[exp] = np.arange(len(exp))
    return exp, log


def _independent(candidates):
    """The rows that are no sum over F_2 of earlier ones, in order."""
    rows = []
    basis = {}  # leading bit -> vector of F_2^d as an int, for Gaussian elimination
    for row in candidates:
        vector = int.from_bytes(np.packbits(row.astype(np.uint8)).tobytes())
        while vector.bit_length() in basis:
            vector ^= basis[vector.bit_length()]
        if vector:
            basis[vector.bit_length()] = vector
            rows.append(row)
    return np.array(rows, dtype=np.uint8)


@functools.cache
def all_label_bits(t, exponents=None):
    """Every label bit that GF(2^t) offers, uint8 (bits, 2^t); exponents: see label_bits."""
    if t not in PRIMITIVE_POLYNOMIALS:
        raise ValueError(
            f"t={t}: the label map is defined for t from 4 to 12, that is n_embd from 16 to 4096"
        )
    if exponents is None:
        exponents = (3, 5) if t % 2 else (2 ** (t // 2) + 1, 2 ** (t // 2 + 1) + 1)
    x = np.arange(2**t)
    order = 2**t - 1  # of the multiplicative group
    exp, log = field_tables(t)
    conjugates = [exp[np.arange(order) * 2**i % order] for i in range(t)]
    trace = np.bitwise_xor.reduce(conjugates)  # of alpha^i, for every i
    candidates = [x >> (t - 1 - i) & 1 for i in range(t)]
    for e in exponents:
        for j in range(t):
            candidates.append(np.where(x == 0, 0, trace[(j + e * log) % order]))
    return _independent(candidates)


def label_bits(t, n, exponents=None):
    """
    The first n label bits s_n of the 2^t coordinates, uint8 (n, 2^t).

    First the t bits of x, most significant first, so that n = t is the Walsh-Hadamard basis. Then
    Tr(alpha^j x^e), j = 0..t-1, without the linearly dependent ones: for even t, e = 2^(t/2)+1 and
    2^(t/2+1)+1 (small, large Kasami set); for odd t, e = 3 and 5 (Gold). exponents, a tuple, takes
    others. Source: Kasami 1966; Sarwate & Pursley, Proc. IEEE 68(5), 1980.

    Raises ValueError for t outside 4..12 or an n that the field does not give.
    """
    bits = all_label_bits(t, exponents)
    if not 1 <= n <= len(bits):
        raise ValueError(
            f"n={n}: GF(2^{t}), for n_embd={2**t}, gives labels of 1 to {len(bits)} bits"
        )
    return bits[:n]


@functools.cache
def labels(t, n, exponents=None):
    """
    label_bits as integers, first bit most significant, int64 (2^t,).

    So labels(t, n) >> 1 is labels(t, n - 1).
    """
    bits = label_bits(t, n, exponents).astype(np.int64)
    places = np.arange(n - 1, -1, -1)[:, None]
    return (bits << places).sum(0)


def coherence(t, n):
    """
    max |<phi_u, phi_v>| over u != v of the level with n bits, exact and exhaustive.

    <phi_u, phi_v> depends on w = u XOR v alone and is 1/d times the Walsh-Hadamard transform of the
    histogram of labels at w: the spectrum of the Cayley graph on F_2^n that the labels generate.
    """
    histogram = np.bincount(labels(t, n), minlength=2**n)
    spectrum = walsh_hadamard(torch.from_numpy(histogram).double().unsqueeze(1))  # double: exact
    return spectrum[1:].abs().max().item() / 2**t


# -----------------------------------------------------------------------------
# levels


class Level(NamedTuple):
    n: int  # bits: 2^n features
    k: int  # active features per token
    delta: int  # features that one active parent opens; 0 on the top level


def parse_levels(text):
    """
    "10,16,0;15,32,256" -> [Level(10, 16, 0), Level(15, 32, 256)].

    A list of triples is taken as well. Raises ValueError naming a part that it can't read.
    """
    if not isinstance(text, (str, list, tuple)):
        raise ValueError(f"levels={text!r}: write '10,16,0;15,32,256' or a list of Levels")
    levels = []
    for part in text.split(";") if isinstance(text, str) else text:
        try:
            numbers = map(int, part.split(",")) if isinstance(part, str) else part
            levels.append(Level(*map(operator.index, numbers)))
        except (ValueError, TypeError):
            raise ValueError(
                f"level {part!r} of {text!r}: write three integers n,k,delta a level and ';' "
                "between levels, as in '10,16,0;15,32,256'"
            ) from None
    return levels


def check_levels(n_embd, levels, per_parent_budget=True):
    """Raise ValueError, with the numbers, unless R^n_embd has these levels, each with k open."""
    t = n_embd.bit_length() - 1 if isinstance(n_embd, int) else None
    if t not in PRIMITIVE_POLYNOMIALS or n_embd != 2**t:
        raise ValueError(f"n_embd={n_embd!r}: a CayleySAE needs a power of two from 16 to 4096")
    if not levels:
        raise ValueError("levels: there must be at least one")
    n_bits = len(all_label_bits(t))
    for i, (n, k, delta) in enumerate(levels):
        gated = per_parent_budget and i > 0
        # surely: all active parents may lie in one block; min: n may still be far too large for 2^n
        n_open = delta if gated else 2 ** min(n, n_bits)
        parent_n = levels[i - 1].n
        fault = None
        if i == 0 and (n != t or delta != 0):
            fault = f"the top level needs n = log2(n_embd) = {t} and, having no parents, delta = 0"
        elif i > 0 and not parent_n < n <= n_bits:
            fault = (
                f"n must be above the parent level's {parent_n} and at most the {n_bits} bits that "
                f"GF(2^{t}) gives"
            )
        elif gated and (delta.bit_count() != 1 or not 2 ** (n - parent_n) <= delta <= 2**n):
            fault = (
                f"delta must be a power of two from 2^(n - parent's n) = {2 ** (n - parent_n)} "
                f"to 2^n = {2**n}"
            )
        elif not 1 <= k <= n_open:
            fault = f"k must be from 1 to the {n_open} features that are surely open"
        if fault:
            raise ValueError(f"level {i} '{n},{k},{delta}': {fault}")


# -----------------------------------------------------------------------------
# the plain definition of the layer: dense, slow, and what everything below must equal


class Codes(NamedTuple):
    """Active features of one level, largest score first."""

    ids: Tensor  # (..., k) int64
    values: Tensor  # (..., k), their codes


def open_features(parents, parent_n, n, m):
    """
    The gate: which features of an n-bit level the active parents open.

    A parent opens the block of 2^m features that share its first n - m bits: parents (N, k), ids of
    the level with parent_n bits -> bool (N, 2^n).
    """
    blocks = parents >> (parent_n - (n - m))  # (N, k)
    opened = torch.zeros(len(parents), 2 ** (n - m), dtype=torch.bool, device=parents.device)
    opened.scatter_(1, blocks, True)
    return opened.repeat_interleave(2**m, 1)


def plain_encode(sae, x, atoms):
    """
    What sae.encode computes: x (N, d), atoms (a list of (2^n, d), one a level) -> Codes per level.

    Every product with the whole dictionary, and the gate as a mask.
    """
    codes = []
    for i, (n, k, _) in enumerate(sae.levels):
        where = sae.level_slices[i]
        raw = x @ atoms[i].T  # (N, 2^n)
        bias = sae.bias[where]
        score = raw + bias
        if sae.score_standardize:
            std = sae.var[where].clamp_min(sae.min_var).sqrt()
            score = (raw - sae.mean[where]) / std + bias
        candidates = score
        if sae.block_bits[i] < n:
            opened = open_features(codes[-1].ids, sae.levels[i - 1].n, n, sae.block_bits[i])
            candidates = score.masked_fill(~opened, -math.inf)
        ids = candidates.topk(k).indices  # (N, k)
        forwarded = score if sae.forward_standardized else raw + bias
        codes.append(Codes(ids, forwarded.gather(1, ids)))
    return codes


def plain_decode(codes, atoms):
    """What sae.decode computes: the sum of values * atoms over all levels' codes, (N, d)."""
    total = 0
    for (ids, values), level_atoms in zip(codes, atoms):
        total = total + nn.functional.embedding_bag(
            ids, level_atoms, per_sample_weights=values.to(level_atoms.dtype), mode="sum"
        )
    return total


# -----------------------------------------------------------------------------
# atoms as rows of +1 and -1 (the unit norm is a factor 2^(-t/2) elsewhere), in tables that all
# layers share

TABLE_BYTES = 2**30  # of a table of all atoms; above it rows are made when needed
# Bound of temporaries. On a CPU they should stay in its cache; any other device counts as CUDA.
CHUNK_BYTES = {"cpu": 12 * 2**20, "cuda": 2**29}


def _chunk_bytes(device):
    return CHUNK_BYTES["cpu" if device.type == "cpu" else "cuda"]


def _parity(v, label, dtype, device):
    """(-1)^<v, label> of integers that broadcast, numpy arrays, as a tensor."""
    odd = np.bitwise_count(v & label).astype(np.int8) & 1
    return torch.from_numpy(1 - 2 * odd).to(device, dtype)


@functools.cache
def _label_tensor(t, n, device):
    return torch.from_numpy(labels(t, n)).to(device)


@functools.cache
def _walsh(t, dtype, device):
    """The Walsh-Hadamard matrix, (2^t, 2^t)."""
    x = np.arange(2**t)
    return _parity(x[:, None], x, dtype, device)


@functools.cache
def _chirps(t, n, dtype, device):
    """The parities of the last n - t label bits, (2^(n-t), 2^t)."""
    return _parity(np.arange(2 ** (n - t))[:, None], labels(t, n), dtype, device)


@functools.cache
def _sign_table(t, n, dtype, device):
    """All atoms of the n-bit level, (2^n, 2^t), or None if that is too large."""
    if 2 ** (n + t) * dtype.itemsize > TABLE_BYTES:
        return None
    walsh = _walsh(t, dtype, device)
    if n == t:
        return walsh
    return (walsh[:, None] * _chirps(t, n, dtype, device)).view(2**n, 2**t)


def _signs(ids, t, n, dtype, device):
    """Atoms of the n-bit level: ids (...) -> (..., 2^t)."""
    table = _sign_table(t, n, dtype, device)
    if table is not None:
        return nn.functional.embedding(ids, table)
    # the first t bits of v choose a Walsh function, the others a chirp
    walsh = nn.functional.embedding(ids >> (n - t), _walsh(t, dtype, device))
    last_bits = ids & (2 ** (n - t) - 1)
    return walsh * nn.functional.embedding(last_bits, _chirps(t, n, dtype, device))


def _atom_rows(ids, t, n, dtype, device):
    """
    Yield (tokens, rows, index), for ids (N, K) in pieces of bounded memory.

    tokens is a slice, and rows[index] are the atoms of ids[tokens].
    """
    table = _sign_table(t, n, dtype, device)
    if table is not None:
        yield slice(0, len(ids)), table, ids
        return
    token_bytes = ids.shape[1] * 2**t * dtype.itemsize
    step = max(1, _chunk_bytes(device) // token_bytes)
    for start in range(0, len(ids), step):
        tokens = slice(start, start + step)
        piece = ids[tokens]
        rows = _signs(piece.flatten(), t, n, dtype, device)
        yield tokens, rows, torch.arange(piece.numel(), device=device).view_as(piece)


def walsh_hadamard(y):
    """
    Unnormalised Walsh-Hadamard transform along dim 0 of (2^r, M).

    As products with matrices of at most 32 x 32: H_(a b) is the Kronecker product of H_a and H_b.
    """
    shape = y.shape
    done = 1
    while done < shape[0]:
        radix = min(32, shape[0] // done)
        H = _walsh(radix.bit_length() - 1, y.dtype, y.device)
        y = H @ y.reshape(done, radix, -1)
        done *= radix
    return y.reshape(shape)


# -----------------------------------------------------------------------------
# the operators: select the active features, combine atoms, project on atoms, and the biases'
# gradient. combine is the adjoint of project and of select's products. torch.compile takes each as
# one node: no graph break, and the loop over chunks isn't unrolled.


def _autocast_off(device):
    """Inside the operators dtypes are explicit. The meta device has no autocast."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


@functools.cache
def _inner_chirps(t, n, m, dtype, device):
    """
    The chirps inside a block at coordinate x = (head, tail), (2^tail, 2^head, 2^chirp).

    They are the parities of the last `chirp` label bits; see _block_scores for the names.
    """
    head = min(n - m, t)
    chirp = min(n - t, m)
    label = labels(t, n).reshape(2**head, -1).T[..., None]
    return _parity(np.arange(2**chirp), label, dtype, device)


def _block_scores(x, blocks, t, n, m):
    """
    Products of x with all atoms of some blocks, unnormalised.

    x (N, d), blocks (N, S) -> (N, S, 2^m). A block fixes the first n - m bits of its features. Its
    own parity, of these bits with the coordinate's, is divided out of x by signs; that leaves the
    atoms of block 0, each a Walsh function of the coordinate's tail times a chirp. So: sign, sum
    over the head against the chirps, transform over the tail.

        fixed  = n - m          bits of v that the block fixes
        head   = min(fixed, t)  first bits of the coordinate, on which the block's parity depends
        tail   = t - head       the coordinate's other bits, free Walsh bits of v
        chirp  = min(n - t, m)  last bits of v inside the block: m = tail + chirp
    """
    N, S = blocks.shape
    fixed = n - m
    head = min(fixed, t)
    tail = t - head
    chirp = min(n - t, m)
    x = x.view(N, 2**head, 2**tail).permute(2, 0, 1).contiguous().unsqueeze(2)
    chirps = _inner_chirps(t, n, m, x.dtype, x.device)  # (2^tail, 2^head, 2^chirp)
    if fixed > 0:
        # when fixed > t, head = t and the block's bits beyond t belong to chirps: _signs knows
        signed = x * _signs(blocks, head, fixed, x.dtype, x.device)  # (2^tail, N, S, 2^head)
        sums = torch.bmm(signed.reshape(2**tail, N * S, 2**head), chirps)  # (2^tail, N*S, 2^chirp)
    else:
        sums = x.squeeze(2) * chirps  # one block, and a head of no bits
    products = walsh_hadamard(sums.flatten(1))
    return products.view(2**tail, N, S, 2**chirp).permute(1, 2, 0, 3).reshape(N, S, 2**m)


def _open_blocks(parents, parent_n, fixed):
    """
    The blocks, by their first `fixed` bits, of active parents (N, k) -> (N, k), ascending.

    And a mask (N, k) of those that repeat the one before: parents in one block open it once.
    """
    blocks = (parents >> (parent_n - fixed)).sort(1).values
    repeats = blocks[:, 1:] == blocks[:, :-1]
    return blocks, nn.functional.pad(repeats, (1, 0))


def _topk(score, k):
    """
    Indices of the k largest of each row: score (N, M) -> (N, k), largest first.

    The k largest lie in the k groups of largest maximum, for any partition into M/8 groups of 8;
    a full topk over M is the slower, the more M exceeds k.
    """
    if score.shape[1] < 64 * k or score.shape[1] % 8:
        return score.topk(k).indices
    groups = score.unflatten(1, (8, -1))  # (N, 8, M/8): group j is column j
    n_groups = groups.shape[2]
    best = groups.amax(1).topk(k, sorted=False).indices  # (N, k)
    candidates = groups.gather(2, best.unsqueeze(1).expand(-1, 8, -1)).flatten(1)  # (N, 8 k)
    among = candidates.topk(k).indices  # row * k + place in best
    return among // k * n_groups + best.gather(1, among % k)


class _PlannedLevel(NamedTuple):
    """A level as select works on it: blocks of 2^m features, all of them where there is no gate."""

    n: int
    k: int
    m: int
    scale: Tensor | None = None  # (2^(n-m), 2^m)
    offset: Tensor | None = None  # (2^(n-m) + 1, 2^m), the last row -inf for repeated blocks


def _unpack_plan(plan):
    """The flat list of integers that an operator's schema allows -> _PlannedLevels."""
    return [_PlannedLevel(*plan[i:i + 3]) for i in range(0, len(plan), 3)]


def _per_level(leaves, plan):
    """select's leaves (N, K) as ids of their own levels, a list of (N, k)."""
    levels = _unpack_plan(plan)
    parts = leaves.split([level.k for level in levels], 1)
    return [part >> (levels[-1].n - level.n) for part, level in zip(parts, levels)]


def _among_all(leaves, plan):
    """select's leaves (N, K) as numbers among all F features, (N, K)."""
    starts = itertools.accumulate((2**level.n for level in _unpack_plan(plan)), initial=0)
    return torch.cat([ids + start for ids, start in zip(_per_level(leaves, plan), starts)], 1)


def _select_chunk(x, levels):
    """Leaves and products of select, for tokens x (N, d) few enough to score at once."""
    t = levels[0].n
    deepest = levels[-1].n
    active = None  # of the level above, (N, k)
    leaves = []
    products = []
    for i, (n, k, m, scale, offset) in enumerate(levels):
        fixed = n - m
        if fixed > 0:
            blocks, repeated = _open_blocks(active, levels[i - 1].n, fixed)  # (N, S)
            block_scale = nn.functional.embedding(blocks, scale)  # (N, S, 2^m)
            rows = blocks.masked_fill(repeated, 2**fixed)
            block_offset = nn.functional.embedding(rows, offset)
        else:
            blocks = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
            block_scale = scale
            block_offset = offset[:1]
        product = _block_scores(x, blocks, t, n, m).to(scale.dtype)  # (N, S, 2^m)
        score = torch.addcmul(block_offset, product, block_scale)
        top = _topk(score.flatten(1), k)  # (N, k), slot * 2^m + place in the block
        active = blocks.gather(1, top >> m) << m | top & (2**m - 1)
        leaves.append(active << (deepest - n))
        products.append(product.flatten(1).gather(1, top))
    return torch.cat(leaves, 1), torch.cat(products, 1)


def torch_select(
    x: Tensor, terms: Tensor, bias: Tensor, plan: list[int]
) -> tuple[Tensor, Tensor]:
    """
    Per level the k open features v with the largest <x, phi_v> * scale_v + offset_v.

    x (N, d), terms (4, F), bias (F,), plan = n, k, m of each level, where a block has 2^m features
    (all of a level that has no gate). terms: scale and offset, then scale and shift of the codes
    -> the features' leaves, that is their ids as the deepest level has them (p is p << shift
    there), (N, K), and their codes <x, phi_v> * scale_v + shift_v + bias_v, (N, K), which are
    differentiable in x and bias.
    """
    scale, offset, code_scale, code_shift = terms
    d = x.shape[1]
    levels = []
    start = 0
    slots = 1  # blocks that a token scores
    token_bytes = 0
    for n, k, m, *_ in _unpack_plan(plan):
        where = slice(start, start + 2**n)
        level_scale = scale[where].view(-1, 2**m) * d**-0.5
        never = (0, 0, 0, 1)  # one more row
        level_offset = nn.functional.pad(offset[where].view(-1, 2**m), never, value=-math.inf)
        levels.append(_PlannedLevel(n, k, m, level_scale, level_offset))
        if m == n:
            slots = 1
        token_bytes = max(token_bytes, 4 * slots * (d + 2 * 2**m))  # signed copies and scores
        start += 2**n
        slots = k
    step = max(1, _chunk_bytes(x.device) // token_bytes)
    with _autocast_off(x.device):
        parts = [_select_chunk(part, levels) for part in x.split(step)]
    leaves, products = map(torch.cat, zip(*parts))
    features = _among_all(leaves, plan)
    codes = products * d**-0.5 * code_scale[features] + code_shift[features]
    return leaves, codes + bias.index_select(0, features.flatten()).view_as(codes)


def torch_combine(ids: Tensor, weights: Tensor, t: int, n: int) -> Tensor:
    """
    Sum of weights * sqrt(d) phi, differentiable in weights.

    ids (N, K) of the n-bit level, weights (N, K) -> (N, 2^t).
    """
    out = weights.new_empty(len(ids), 2**t)
    for tokens, rows, index in _atom_rows(ids, t, n, weights.dtype, weights.device):
        out[tokens] = nn.functional.embedding_bag(
            index, rows, per_sample_weights=weights[tokens], mode="sum"
        )
    return out


def torch_project(y: Tensor, ids: Tensor, t: int, n: int) -> Tensor:
    """Products <y, sqrt(d) phi>: y (N, 2^t), ids (N, K) of the n-bit level -> (N, K)."""
    dtype = y.dtype
    if y.is_cuda and dtype == torch.bfloat16:
        dtype = torch.float32  # CUDA has no bfloat16 of the operator below
    out = y.new_empty(ids.shape)
    for tokens, rows, index in _atom_rows(ids, t, n, dtype, y.device):
        N, K = index.shape
        bags = torch.arange(N, device=y.device)
        # These products are embedding_bag's gradient for its weights, an operator without a public
        # name. The public way, rows[index] @ y, copies (N, K, d): 3.8x the time at d=1024 on a CPU.
        out[tokens] = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            y[tokens].to(dtype), rows, index.flatten(), bags * K, bags.repeat_interleave(K), 0
        ).view_as(index)
    return out


# cayley_triton.py, where it is imported, registers its kernels for CUDA
select = torch.library.custom_op("cayley::select", torch_select, mutates_args=())
combine = torch.library.custom_op("cayley::combine", torch_combine, mutates_args=())
project = torch.library.custom_op("cayley::project", torch_project, mutates_args=())


@torch.library.custom_op("cayley::sum_by_index", mutates_args=())
def sum_by_index(values: Tensor, index: Tensor, n: int) -> Tensor:
    """
    Sums of values (M,) of equal index (M,) -> (n,), the same in whatever order a GPU adds them.

    Of integers every order has the same sum: values are cut off to multiples of the largest |value|
    times 2^-s, with M <= 2^(62 - s), so that no sum overflows. For M = 2^21, s is 41, where fp32
    loses up to 2^-24 of a sum at each addition. A value that is not finite makes all sums so.
    """
    if len(values) == 0:
        return values.new_zeros(n)
    bits = 62 - (len(values) - 1).bit_length()
    unit = values.abs().amax().double() * 2.0**-bits
    whole = (values.double() / unit).long()
    sums = torch.zeros(n, dtype=torch.int64, device=values.device)
    return (sums.index_add_(0, index, whole) * unit).to(values.dtype)


@select.register_fake
def _(x, terms, bias, plan):
    K = sum(level.k for level in _unpack_plan(plan))
    return x.new_empty(len(x), K, dtype=torch.int64), terms.new_empty(len(x), K)


@combine.register_fake
def _(ids, weights, t, n):
    return weights.new_empty(len(ids), 2**t)


@project.register_fake
def _(y, ids, t, n):
    return y.new_empty(ids.shape)


@sum_by_index.register_fake
def _(values, index, n):
    return values.new_empty(n)


def _sums_by(index, values, n):
    """Sums of values (M,) of equal index (M,) -> (n,), the same on every run."""
    if values.is_cuda:
        return sum_by_index(values, index, n)
    return values.new_zeros(n).index_add_(0, index, values)


def _select_setup(ctx, inputs, output):
    x, terms, bias, ctx.plan = inputs
    leaves, _ = output
    ctx.dtypes = x.dtype, bias.dtype
    ctx.save_for_backward(leaves, terms)


def _select_backward(ctx, _, grad):
    leaves, terms = ctx.saved_tensors
    x_dtype, bias_dtype = ctx.dtypes
    levels = _unpack_plan(ctx.plan)
    t = levels[0].n
    features = _among_all(leaves, ctx.plan)
    of_x = None
    of_bias = None
    if ctx.needs_input_grad[0]:
        weights = grad * terms[2][features] * 2 ** (-t / 2)
        of_x = combine(leaves, weights.to(x_dtype), t, levels[-1].n)
    if ctx.needs_input_grad[2]:
        sums = _sums_by(features.flatten(), grad.flatten(), terms.shape[1])
        of_bias = sums.to(bias_dtype)
    return of_x, None, of_bias, None


def _combine_setup(ctx, inputs, output):
    ids, _, ctx.t, ctx.n = inputs
    ctx.save_for_backward(ids)


def _combine_backward(ctx, grad):
    (ids,) = ctx.saved_tensors
    return None, project(grad.contiguous(), ids, ctx.t, ctx.n), None, None


select.register_autograd(_select_backward, setup_context=_select_setup)
combine.register_autograd(_combine_backward, setup_context=_combine_setup)


# -----------------------------------------------------------------------------
# the layer


class Edit(NamedTuple):
    """A feature's code c becomes keep * c + add at every token, where c is 0 if it isn't active."""

    level: int
    feature: int
    keep: float  # (keep 1, add a) steers by a, (0, a) sets the code to a, (0, 0) ablates
    add: float


class Record(NamedTuple):
    """What one forward read and handed on."""

    x: Tensor  # (..., d)
    codes: list  # Codes of each level, after edits


def _autocast_dtype(device):
    """The dtype of the autocast that is on for this type of device; None where none is."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def _refuse_transforms(*tensors):
    """
    Raise NotImplementedError for tensors that torch.func.grad, torch.func.jvp or forward_ad follow.

    PyTorch's custom operators know none of them: grad would end in an obscure error, and the others
    silently in derivatives of 0. PyTorch has no public names for this.
    """
    if torch.compiler.is_compiling():
        return
    functorch = torch._C._functorch
    if forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active():
        return
    for tensor in tensors:
        while functorch.is_batchedtensor(tensor):  # of vmap, which the operators know
            tensor = functorch.get_unwrapped(tensor)
        reverse = functorch.is_gradtrackingtensor(tensor) and tensor.requires_grad
        if reverse or forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                "a CayleySAE can't be differentiated by torch.func.grad, jacrev, jvp or in forward "
                "mode: use torch.autograd.grad or torch.autograd.functional.jacobian (vmap works)"
            )


def _recomputing():
    """
    Whether this forward runs inside a backward, as torch.utils.checkpoint does it a second time.

    PyTorch has no public name for this; under torch.compile there is no such second call.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class CayleySAE(nn.Module):
    """
    Sparse code of the normalised residual: per level the top-k features of a parameter-free
    dictionary.

    n_embd: width d, a power of two from 16 to 4096.
    levels: text for parse_levels, or a list of Levels.
    per_parent_budget: below the top level only the blocks of active parents compete; otherwise all
        features.
    score_standardize: select by (raw - mean) / std + bias, with running statistics; otherwise by
        raw + bias.
    forward_standardized: the code is that score; otherwise raw + bias.

    The biases are the only parameters: bias (F,), a slice of level_slices per level. Buffers of
    that layout: mean and var of raw, and active_counts, activations since it was last zeroed. Call
    update_stats() after every optimizer step. edits: a list of Edits that every forward makes.
    record: None, or a list to which every forward appends a Record. constants: None, or terms()
    computed before, which then stand for bias, mean and var when features are chosen.

    Raises ValueError for impossible levels.
    """

    stats_momentum = 0.05
    stats_stride = 8  # statistics see every 8th position of (B, T, d), and every row of (N, d)
    min_var = 1e-5  # for constant features; after RMSNorm the mean square over a basis is 1

    def __init__(
        self,
        n_embd,
        levels,
        per_parent_budget=True,
        score_standardize=True,
        forward_standardized=True,
    ):
        super().__init__()
        self.levels = parse_levels(levels)
        check_levels(n_embd, self.levels, per_parent_budget)
        self.n_embd = n_embd
        self.t = n_embd.bit_length() - 1
        self.n = self.levels[-1].n
        self.score_standardize = score_standardize
        self.forward_standardized = forward_standardized
        self.edits = []
        self.record = None
        self.constants = None

        self.block_bits = []  # a block of level i has 2^block_bits[i] features
        self.level_slices = []  # where the features of level i lie among all F
        start = 0
        for i, (n, _, delta) in enumerate(self.levels):
            gated = per_parent_budget and i > 0
            self.block_bits.append(delta.bit_length() - 1 if gated else n)
            self.level_slices.append(slice(start, start + 2**n))
            start += 2**n
        self.plan = []  # for select
        for (n, k, _), m in zip(self.levels, self.block_bits):
            self.plan += [n, k, m]

        n_features = start
        self.bias = nn.Parameter(torch.zeros(n_features))
        fp32 = {"dtype": torch.float32}  # whatever the default, as in _apply
        self.register_buffer("mean", torch.zeros(n_features, **fp32))
        self.register_buffer("var", torch.ones(n_features, **fp32))
        self.register_buffer("active_counts", torch.zeros(n_features, dtype=torch.int64))
        # sums over the training forwards since update_stats()
        pending = {
            "pending_rows": torch.zeros(1, **fp32),
            "pending_x": torch.zeros(n_embd, **fp32),
            "pending_xx": torch.zeros(n_embd, n_embd, **fp32),
            # of 32 bits: torch.compile would sort 64-bit ones, an eighth of a step on an H100
            "pending_counts": torch.zeros(n_features, dtype=torch.int32),
            "skipped_updates": torch.zeros(1, dtype=torch.int64),  # see update_stats
        }
        for name, zeros in pending.items():
            self.register_buffer(name, zeros, persistent=False)

    def standardization(self):
        """scale and shift (F,) of the features' scores, raw * scale + shift + bias."""
        if not self.score_standardize:
            return torch.ones_like(self.mean), torch.zeros_like(self.mean)
        scale = self.var.clamp_min(self.min_var).rsqrt()
        return scale, -self.mean * scale

    def terms(self):
        """What select reads of the features but their biases, (4, F)."""
        scale, shift = self.standardization()
        offset = self.bias.detach() + shift
        if self.forward_standardized:
            return torch.stack([scale, offset, scale, shift])
        return torch.stack([scale, offset, torch.ones_like(scale), torch.zeros_like(shift)])

    def _flat(self, x):
        """x (..., d) as the operators take it, (N, d)."""
        flat = x.reshape(-1, self.n_embd)
        return flat.to(_autocast_dtype(x.device) or flat.dtype)

    def encode(self, x):
        """
        x (..., d) -> [Codes of level 0, Codes of level 1, ...].

        In training it also accumulates statistics. Raises ValueError for another width.
        """
        return self._codes(*self._select(x), x.shape[:-1])

    def _select(self, x):
        """encode for x (..., d) as select has it: leaves and codes (N, K)."""
        if x.dim() < 2 or x.shape[-1] != self.n_embd:
            raise ValueError(
                f"input of shape {tuple(x.shape)}: must be (..., tokens, n_embd={self.n_embd})"
            )
        _refuse_transforms(x, self.bias)
        terms = self.terms() if self.constants is None else self.constants
        leaves, values = select(self._flat(x), terms, self.bias, self.plan)
        if self.training and not _recomputing():
            self._accumulate(x, _among_all(leaves, self.plan))
        return leaves, values

    def _codes(self, leaves, values, shape):
        """Codes of every level, (*shape, k), of _select's results."""
        codes = []
        start = 0
        for ids in _per_level(leaves, self.plan):
            k = ids.shape[1]
            # slices and not split, whose results autograd doesn't let one change in place
            level_values = values[:, start:start + k]
            codes.append(Codes(ids.view(*shape, k), level_values.reshape(*shape, k)))
            start += k
        return codes

    def decode(self, codes):
        """
        Codes per level, of one or more features, -> the sum of values * atoms, (..., d).

        Levels at the end may be missing.
        """
        # levels nest: p is p << shift on the deepest
        leaves = [c.ids << (self.n - level.n) for c, level in zip(codes, self.levels)]
        leaves = torch.cat(leaves, -1)  # (..., K)
        values = torch.cat([c.values for c in codes], -1)
        _refuse_transforms(values)
        out = self._combine(leaves.flatten(0, -2), values.flatten(0, -2))
        return out.view(*leaves.shape[:-1], self.n_embd)

    def _combine(self, leaves, values):
        """The sum of values * atoms of leaves (N, K), (N, d)."""
        weights = values * 2 ** (-self.t / 2)
        weights = weights.to(_autocast_dtype(weights.device) or self.bias.dtype)
        return combine(leaves, weights, self.t, self.n)

    def forward(self, x):
        """x (..., d) -> its reconstruction from the active features after self.edits, (..., d)."""
        # in eval by encode and decode all the same, whose results nnsight takes by their names
        unread = not self.edits and self.record is None
        if unread and (self.training or self.constants is not None):
            return self._combine(*self._select(x)).view(x.shape)
        codes = self.edit(self.encode(x), self.edits)
        if self.record is not None:
            self.record.append(Record(x, codes))
        return self.decode(codes)

    def edit(self, codes, edits):
        """
        Codes with the edits made at every token.

        What is active elsewhere stays as it is: since decode is linear, an edit is one more entry
        with the difference. Raises ValueError for a feature that isn't there.
        """
        codes = list(codes)
        for level, feature, keep, add in edits:
            self._check_feature(level, feature)
            ids, values = codes[level]
            old = values.masked_fill(ids != feature, 0).sum(-1, keepdim=True)  # (..., 1)
            change = (keep - 1) * old + add
            entry = torch.full_like(ids[..., :1], feature)
            codes[level] = Codes(torch.cat([ids, entry], -1), torch.cat([values, change], -1))
        return codes

    def _check_feature(self, level, feature):
        """Raise ValueError unless a level has this feature."""
        n_levels = len(self.levels)
        if not 0 <= level < n_levels or not 0 <= feature < 2 ** self.levels[level].n:
            raise ValueError(
                f"level {level}, feature {feature}: of the levels 0 to {n_levels - 1} level i has "
                f"2^n features from 0, n = {', '.join(str(level.n) for level in self.levels)}"
            )

    def atoms(self, level, ids):
        """Unit-norm atoms of features of a level, a tensor or list of m ids -> (m, n_embd)."""
        ids = torch.as_tensor(ids, device=self.bias.device)
        signs = _signs(ids, self.t, self.levels[level].n, self.bias.dtype, self.bias.device)
        return signs * 2 ** (-self.t / 2)

    @torch.no_grad()
    def _accumulate(self, x, features):
        features = features.flatten()
        self.pending_counts.index_add_(0, features, torch.ones_like(features, dtype=torch.int32))
        if not self.score_standardize:
            return
        stride = self.stats_stride if x.dim() > 2 else 1
        first = (x.shape[-2] - 1) % stride  # so that the last position is always seen
        with _autocast_off(x.device):
            x = x[..., first::stride, :].reshape(-1, self.n_embd).to(self.mean.dtype)
            self.pending_rows += len(x)
            self.pending_x += x.sum(0)
            self.pending_xx += x.T @ x

    def _moments(self):
        """
        E[raw] and E[raw^2] of all features (F,) over the pending rows, exact without scoring any.

        E[raw_v] = <phi_v, E[x]> and E[raw_v^2] = phi_v^T E[x x^T] phi_v. Since phi_v[i] phi_v[j] is
        the parity of v with s(i) XOR s(j), each is a Walsh-Hadamard transform, of length 2^n, of
        sums over equal labels.
        """
        label = _label_tensor(self.t, self.n, self.mean.device)
        pairs = label[:, None] ^ label  # (d, d)
        sums = (
            _sums_by(label, self.pending_x, 2**self.n),
            _sums_by(pairs.flatten(), self.pending_xx.flatten(), 2**self.n),
        )
        sums = torch.stack(sums, 1)  # (2^n, 2)
        first, second = (walsh_hadamard(sums) / self.pending_rows.clamp_min(1)).unbind(1)
        strides = [2 ** (self.n - level.n) for level in self.levels]  # p is p << shift below
        mean = torch.cat([first[::stride] for stride in strides]) * 2 ** (-self.t / 2)
        square = torch.cat([second[::stride] for stride in strides]) * 2.0**-self.t
        return mean, square

    @torch.no_grad()
    def update_stats(self):
        """
        Fold the training forwards since the last call, of all ranks, into mean, var and counts.

        Call it once per optimizer step on every rank. Sums that are not finite (one bad batch) are
        left out; skipped_updates counts how often. A CPU run warns of it as well; on other devices
        that would make the host wait.
        """
        pending = (self.pending_rows, self.pending_x, self.pending_xx, self.pending_counts)
        if dist.is_initialized() and dist.get_world_size() > 1:
            for sums in pending:  # before the transform, so that every world size rounds alike
                dist.all_reduce(sums)
        finite = self.pending_xx.isfinite().all() & self.pending_x.isfinite().all()
        self.skipped_updates += ~finite
        if finite.device.type == "cpu" and not finite:
            warnings.warn(
                "a CayleySAE's input was not finite: it is left out of the statistics", stacklevel=2
            )
        for sums in (self.pending_x, self.pending_xx):
            sums.copy_(torch.where(finite, sums, 0))
        mean, square = self._moments()
        # no rows, or no finite ones: the statistics stay as they are
        momentum = self.stats_momentum * ((self.pending_rows > 0) & finite)
        self.mean += momentum * (mean - self.mean)
        self.var += momentum * ((square - mean.square()).clamp_min(0) - self.var)
        self.active_counts += self.pending_counts
        for sums in pending:
            sums.zero_()

    def _apply(self, fn, recurse=True):
        """Statistics stay in float32 at least: sums of squares overflow a .half() model."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer.is_floating_point() and buffer.itemsize < 4:
                self._buffers[name] = before[name].to(buffer.device)
        return self
