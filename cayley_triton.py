"""
The operators of cayley.py for CUDA, in Triton: select, combine and project, with the same results.

select takes two kernels a level. The first makes the products with all features that may be chosen:
a Walsh-Hadamard transform in registers on the top level, else products of the signed inputs with
the chirps on the matrix units, which are exact because signs and chirps are +1 and -1, and x is
split into parts of 8 bits. It also keeps the best score of every 8 features. The second finds the k
best of those groups, then the k best features in them, by bisection of the score's bits. combine
and project hold a token in registers, 32 coordinates a lane, and read an atom as bits. A few
tokens, as sampling has them, are spread over many small programs instead. Sums are in fp32. Of
equal scores the smaller feature wins; every run gives the same results.

Importing this file is all it takes: cayley.py's operators then run these kernels on CUDA, but for
shapes that supports() leaves out. `with enabled(False):` has PyTorch's run again; find_fault
compares the two on a batch, as train.py does at a run's start. records/kernels/ has the
instructions and bytes of each kernel.
"""
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

import cayley

SCRATCH_BYTES = 2**29  # select takes at most about so many bytes of tokens at a time
FEW = 16  # up to so many tokens are spread over more programs
GROUP = 8  # features that share one entry in the first search

# -----------------------------------------------------------------------------
# select, first kernel of a level: the products


@triton.jit
def _hadamard(y, rows: tl.constexpr, log_columns: tl.constexpr):
    """Walsh-Hadamard transform along the last axis: (rows, columns) -> (rows, columns)."""
    columns: tl.constexpr = 2**log_columns
    for _ in tl.static_range(
        log_columns
    ):  # the last bit of the index is transformed and becomes the first
        a, b = tl.split(tl.reshape(y, (rows, columns // 2, 2)))
        y = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (rows, columns))
    return y


@triton.jit
def top_products(
    x, scale, offset, products, best,
    log_rows: tl.constexpr, log_columns: tl.constexpr, inv_sqrt_d: tl.constexpr,
    group: tl.constexpr,
):
    """
    Top level, one token a program: all d products (N, d), and best scores (N, d / group).

    The latter only if group > 1.
    """
    rows: tl.constexpr = 2**log_rows
    columns: tl.constexpr = 2**log_columns
    token = tl.program_id(0)
    row = tl.arange(0, rows)[:, None]
    feature = row * columns + tl.arange(0, columns)[None, :]  # (rows, columns)
    y = tl.load(x + token * (rows * columns) + feature).to(tl.float32)
    y = _hadamard(y, rows, log_columns)
    y = tl.trans(_hadamard(tl.trans(y), columns, log_rows)) * inv_sqrt_d
    tl.store(products + token * (rows * columns) + feature, y)
    if group > 1:
        score = y * tl.load(scale + feature).to(tl.float32)
        score += tl.load(offset + feature).to(tl.float32)
        score = tl.max(tl.reshape(score, (rows, columns // group, group)), 2)
        entry = row * (columns // group) + tl.arange(0, columns // group)[None, :]
        tl.store(best + token * (rows * columns // group) + entry, score)


@triton.jit
def block_products(
    x, blocks, scale, offset, signs, chirps, walsh, products, best, n_tokens,
    first: tl.constexpr, gated: tl.constexpr, tokens: tl.constexpr, slots: tl.constexpr,
    padded_slots: tl.constexpr, heads: tl.constexpr, padded_heads: tl.constexpr,
    step: tl.constexpr, tails: tl.constexpr, chirp_count: tl.constexpr,
    padded_chirps: tl.constexpr, parts: tl.constexpr, dot_type: tl.constexpr,
    inv_sqrt_d: tl.constexpr, group: tl.constexpr,
):
    """
    A lower level, some tokens a program: blocks (N, slots), ~block where it repeats -> products (N,
    slots, block) and, if group > 1, best scores (N, slots, block / group). As cayley.py's
    _block_scores, for a coordinate (h, j) = (head, tail): for each j sum over h the inputs, signed
    by the block's parity of h, against the chirps; add that to all tails, by Walsh signs.

    first: the level's first feature in scale and offset. gated: otherwise there is one block.
    """
    rows: tl.constexpr = tokens * padded_slots
    block_size: tl.constexpr = tails * chirp_count
    row = tl.arange(0, rows)
    token = tl.program_id(0) * tokens + row // padded_slots
    slot = row % padded_slots
    known = (token < n_tokens) & (slot < slots)
    entry = token * slots + slot
    block = tl.zeros((rows,), tl.int32)
    if gated:
        block = tl.load(blocks + entry, mask=known, other=-1)
    opens = block >= 0
    block = tl.where(opens, block, ~block)

    own = tl.program_id(0) * tokens + tl.arange(0, tokens)  # (tokens,)
    head = tl.arange(0, step)
    chirp = tl.arange(0, padded_chirps)
    sums = ()  # of each tail, (rows, padded_chirps)
    for _ in tl.static_range(tails):
        sums = sums + (tl.zeros((rows, padded_chirps), tl.float32),)
    for j in range(tails):
        y = tl.zeros((rows, padded_chirps), tl.float32)
        for start in range(0, heads, step):
            h = start + head
            rest = tl.load(
                x + own[:, None] * (heads * tails) + h[None, :] * tails + j,
                mask=(own < n_tokens)[:, None] & (h < heads)[None, :],
                other=0,
            )  # (tokens, step)
            sign = tl.load(signs + block[:, None] * padded_heads + h[None, :])  # (rows, step)
            place = (j * padded_heads + h[:, None]) * padded_chirps + chirp[None, :]
            factor = tl.load(chirps + place).to(dot_type)  # (step, padded_chirps)
            for _ in tl.static_range(parts):
                part = rest.to(tl.bfloat16)
                rest = rest.to(tl.float32) - part.to(tl.float32)
                wide = tl.broadcast_to(part.to(dot_type)[:, None, :], (tokens, padded_slots, step))
                y = tl.dot(tl.reshape(wide, (rows, step)) * sign.to(dot_type), factor, y)
        added = ()
        for tail in tl.static_range(tails):
            added = added + (sums[tail] + y * tl.load(walsh + j * tails + tail),)
        sums = added

    real = known[:, None] & (chirp < chirp_count)[None, :]
    scored = real & opens[:, None]
    feature = first + block[:, None] * block_size + chirp[None, :]
    place = entry[:, None] * block_size + chirp[None, :]
    for tail in tl.static_range(tails):
        product = sums[tail] * inv_sqrt_d
        tl.store(products + place + tail * chirp_count, product, mask=real)
        if group > 1:
            score = product * tl.load(scale + feature + tail * chirp_count, mask=real, other=0)
            never = -float("inf")
            score += tl.load(offset + feature + tail * chirp_count, mask=scored, other=never)
            score = tl.max(tl.reshape(score, (rows, padded_chirps // group, group)), 2)
            of_tail = tl.arange(0, padded_chirps // group)[None, :]
            where = entry[:, None] * (block_size // group) + tail * (chirp_count // group) + of_tail
            tl.store(best + where, score, mask=known[:, None] & (of_tail < chirp_count // group))


# A word holds an atom's signs at 32 coordinates: bit i of word w is 1 where coordinate i * d/32 + w
# is negative. An atom's words are a Walsh function's XOR a chirp's. Sums of +-a are the sum of all
# a minus twice the sum of the negative ones: one predicated addition an element.


@triton.jit
def _words(walsh, chirps, feature, c, lane, words: tl.constexpr):
    first = tl.load(walsh + (feature >> c) * words + lane)
    return first ^ tl.load(chirps + (feature & ((1 << c) - 1)) * words + lane)


@triton.jit
def _parts(y, token, lane, words: tl.constexpr):
    """A token of y (N, 32 * words), 32 coordinates a lane: their sums, and a tuple of them."""
    total = tl.zeros((words,), tl.float32)
    parts = ()
    for i in tl.static_range(32):
        part = tl.load(y + token * (32 * words) + i * words + lane).to(tl.float32)
        total += part
        parts = parts + (part,)
    return total, parts


@triton.jit
def _signed_sum(total, parts, word):
    """The product of a token, as _parts has it, with an atom of signs word (words,)."""
    negative = tl.zeros(word.shape, tl.float32)
    for i in tl.static_range(32):
        negative = tl.where((word >> i) & 1 != 0, negative + parts[i], negative)
    return tl.sum(total - 2 * negative, 0)


@triton.jit
def _features(blocks, candidate, known, block_size: tl.constexpr, gated: tl.constexpr):
    """Features of candidates, places among a token's products, and which of them are open."""
    feature = candidate
    if gated:
        block = tl.load(blocks + candidate // block_size, mask=known, other=-1)
        known = block >= 0
        feature = tl.where(known, block, ~block) * block_size + candidate % block_size
    return feature, known


@triton.jit
def few_products(
    x, blocks, scale, offset, walsh, chirps, products, best,
    first: tl.constexpr, gated: tl.constexpr, slots: tl.constexpr, block_size: tl.constexpr,
    c: tl.constexpr, words: tl.constexpr, inv_sqrt_d: tl.constexpr, group: tl.constexpr,
):
    """
    What top_products and block_products do, for few tokens: 8 products a program.

    Many small programs, each by the atoms' words as project_atoms, in place of few large ones.
    """
    token = tl.program_id(0)
    size: tl.constexpr = slots * block_size
    lane = tl.arange(0, words)
    total, parts = _parts(x, token, lane, words)
    most = -float("inf")
    for i in tl.static_range(8):
        candidate = tl.program_id(1) * 8 + i
        known = candidate < size
        feature, opens = _features(blocks + token * slots, candidate, known, block_size, gated)
        word = _words(walsh, chirps, feature, c, lane, words)
        product = _signed_sum(total, parts, word) * inv_sqrt_d
        tl.store(products + token * size + candidate, product, mask=known)
        if group > 1:
            score = product * tl.load(scale + first + feature)
            score += tl.load(offset + first + feature, mask=opens, other=-float("inf"))
            most = tl.maximum(most, score)
    if group > 1:
        tl.store(best + token * (size // group) + tl.program_id(1), most)


# -----------------------------------------------------------------------------
# select, second kernel of a level: the k best


@triton.jit
def _ordered(score):
    """float32 -> int32 in the same order; -0 is +0."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _largest(key, k: tl.constexpr, parts: tl.constexpr):
    """
    Mask of the k largest of int32 keys (M,), of equal keys the first; parts, at least k, divides M.

    Bisection: at least k keys are >= low, since each of the parts has one, and none is above high.
    """
    low = tl.min(tl.max(tl.reshape(key, (key.shape[0] // parts, parts)), 0), 0)
    high = tl.max(key, 0)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # rounded up
        count = tl.sum((key >= middle).to(tl.int32), 0)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count > k, high, tl.where(count == k, middle, middle - 1))
    chosen = key >= low
    if tl.sum(chosen.to(tl.int32), 0) > k:
        above = key > low
        equal = (key == low).to(tl.int32)
        rest = k - tl.sum(above.to(tl.int32), 0)
        chosen = above | ((equal > 0) & (tl.cumsum(equal, 0) <= rest))
    return chosen


@triton.jit
def _gather_chosen(chosen, item, i, work):
    """
    The items (M,) of the mask chosen, in order, at the places i (padded_k,) of a vector.

    work: memory that the lanes exchange it by; a barrier stands between writing and reading.
    """
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(work + place, item, mask=chosen)
    tl.debug_barrier()
    items = tl.load(work + i)
    tl.debug_barrier()
    return items


@triton.jit
def _spread(item, i, work):
    """A vector (padded_k,) along the other axis: (1, padded_k)."""
    tl.store(work + i, item)
    tl.debug_barrier()
    items = tl.load(work + i)
    tl.debug_barrier()
    return items[None, :]


@triton.jit
def _open_next(next_blocks, block, i, work, k: tl.constexpr):
    """Blocks (padded_k,) in ascending order, ~block where one repeats, into next_blocks (k,)."""
    other = _spread(block, i, work)
    same = (other == block[:, None]) & (i[None, :] < i[:, None])
    rank = tl.sum((same | (other < block[:, None])).to(tl.int32), 1)
    repeats = tl.sum(same.to(tl.int32), 1) > 0
    tl.store(next_blocks + rank, tl.where(repeats, ~block, block), mask=i < k)


@triton.jit
def pick(
    products, best, blocks, scale, offset, code_scale, code_shift, bias, leaves, codes, next_blocks,
    work,
    first: tl.constexpr, gated: tl.constexpr, slots: tl.constexpr, block_size: tl.constexpr,
    k: tl.constexpr, padded_k: tl.constexpr, parts: tl.constexpr, padded_size: tl.constexpr,
    group: tl.constexpr, columns: tl.constexpr, column: tl.constexpr, leaf_shift: tl.constexpr,
    next_shift: tl.constexpr,
):
    """
    One token a program: the k features with the largest scores, largest first, as leaves and codes
    (N, columns).

    first: the level's first feature in scale and offset. next_blocks (N, k), unless next_shift < 0:
    blocks of the next level, ascending, ~block where it repeats the one before. work (N, padded_k)
    int32: memory for vectors that lanes exchange.
    """
    token = tl.program_id(0)
    work += token * padded_k
    products += token * (slots * block_size)
    blocks += token * slots
    scale += first
    offset += first
    i = tl.arange(0, padded_k)
    real = i < k
    candidate = tl.arange(0, padded_size)
    known = candidate < slots * block_size
    n_candidates: tl.constexpr = padded_size if group == 1 else padded_k * group
    if group > 1:
        entry = tl.arange(0, padded_size // group)
        n_entries: tl.constexpr = slots * block_size // group
        best += token * n_entries
        score = tl.load(best + entry, mask=entry < n_entries, other=-float("inf"))
        chosen = _largest(_ordered(score), k, parts)
        entry = _gather_chosen(chosen, entry, i, work)
        candidate = tl.where(real, entry, 0)[:, None] * group + tl.arange(0, group)[None, :]
        candidate = tl.reshape(candidate, (n_candidates,))
        known = tl.reshape(tl.broadcast_to(real[:, None], (padded_k, group)), (n_candidates,))

    feature, known = _features(blocks, candidate, known, block_size, gated)
    score = tl.load(products + candidate, mask=known, other=0)
    score *= tl.load(scale + feature, mask=known, other=0).to(tl.float32)
    score += tl.load(offset + feature, mask=known, other=-float("inf")).to(tl.float32)
    chosen = _largest(_ordered(score), k, parts)
    candidate = _gather_chosen(chosen, candidate, i, work)  # ascending
    candidate = tl.where(real, candidate, 0)

    feature, _ = _features(blocks, candidate, real, block_size, gated)
    product = tl.load(products + candidate)
    score = product * tl.load(scale + feature).to(tl.float32)
    score += tl.load(offset + feature).to(tl.float32)
    code = product * tl.load(code_scale + first + feature).to(tl.float32)
    code += tl.load(code_shift + first + feature).to(tl.float32)
    code += tl.load(bias + first + feature).to(tl.float32)
    key = tl.where(real, _ordered(score), -2147483648)
    other = _spread(key, i, work)
    before = (other > key[:, None]) | ((other == key[:, None]) & (i[None, :] < i[:, None]))
    rank = tl.sum(before.to(tl.int32), 1)  # (padded_k,)
    place = token * columns + column + rank
    tl.store(leaves + place, feature.to(tl.int64) << leaf_shift, mask=real)
    tl.store(codes + place, code.to(codes.dtype.element_ty), mask=real)

    if next_shift >= 0:
        block = tl.where(real, feature >> next_shift, 2147483647)
        _open_next(next_blocks + token * k, block, i, work, k)


# -----------------------------------------------------------------------------
# combine and project


@triton.jit
def combine_atoms(
    ids, weights, walsh, chirps, out, K, c,
    words: tl.constexpr, lanes: tl.constexpr, step: tl.constexpr,
):
    """
    ids and weights (N, K), of the t + c bits' level -> (N, 32 * words).

    A program makes the coordinates of some words of a token, step atoms at a time.
    """
    token = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * lanes + tl.arange(0, lanes)
    total = tl.zeros((step,), tl.float32)
    negative = ()
    for _ in tl.static_range(32):
        negative = negative + (tl.zeros((step, lanes), tl.float32),)
    for start in range(0, K, step):
        k = start + tl.arange(0, step)
        weight = tl.load(weights + token * K + k, mask=k < K, other=0).to(tl.float32)
        atom = tl.load(ids + token * K + k, mask=k < K, other=0).to(tl.int32)
        word = _words(walsh, chirps, atom[:, None], c, lane[None, :], words)  # (step, lanes)
        total += weight
        sums = ()
        for i in tl.static_range(32):
            more = negative[i] + weight[:, None]
            sums = sums + (tl.where((word >> i) & 1 != 0, more, negative[i]),)
        negative = sums
    out += token * (32 * words) + lane
    for i in tl.static_range(32):
        sums = tl.sum(total, 0) - 2 * tl.sum(negative[i], 0)
        tl.store(out + i * words, sums.to(out.dtype.element_ty))


@triton.jit
def project_atoms(y, ids, walsh, chirps, out, K, c, words: tl.constexpr):
    """One token a program: y (N, 32 * words), ids (N, K) of the t + c bits' level -> (N, K)."""
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, words)
    total, parts = _parts(y, token, lane, words)
    # unrolled, since ptxas then reads signs seven at a time
    for k in tl.range(0, K, loop_unroll_factor=4):
        word = _words(walsh, chirps, tl.load(ids + token * K + k).to(tl.int32), c, lane, words)
        product = _signed_sum(total, parts, word)
        tl.store(out + token * K + k, product.to(out.dtype.element_ty))


# -----------------------------------------------------------------------------
# tables, kept for every device


@functools.cache
def _sign_table(t, n, m, device):
    """+1 and -1, bfloat16 (2^q, 2^p): a block's parity of the head; padded to 16 heads by zeros."""
    q = n - m
    p = min(q, t)
    blocks = torch.arange(2**q, device=device)
    signs = cayley._signs(blocks, p, q, torch.bfloat16, device)
    return F.pad(signs, (0, max(16, 2**p) - 2**p))


@functools.cache
def _chirp_table(t, n, m, device):
    """
    +1 and -1, bfloat16 (2^r, 2^p, 2^c): parities of the last c label bits at (h, j).

    Padded to 16 in the last two dimensions, with zeros.
    """
    chirps = cayley._inner_chirps(t, n, m, torch.bfloat16, device)
    _, p, c = chirps.shape
    return F.pad(chirps, (0, max(16, c) - c, 0, max(16, p) - p)).contiguous()


@functools.cache
def _word_tables(t, n, device):
    """Words of the Walsh functions (2^t, d/32) and of the chirps (2^(n-t), d/32), int32."""
    tables = []
    for signs in (
        cayley._walsh(t, torch.int8, device),
        cayley._chirps(t, n, torch.int8, device),
    ):
        bits = (signs < 0).view(len(signs), 32, -1).int()
        places = torch.arange(32, dtype=torch.int32, device=device)[:, None]
        tables.append((bits << places).sum(1, dtype=torch.int32))
    return tables


# -----------------------------------------------------------------------------
# which kernels a plan takes


def _power_of_two(x):
    return 1 << (x - 1).bit_length()


def _group(slots, m, k, width):
    """GROUP, or 1 where a level is too small for two searches."""
    return GROUP if width >= GROUP and slots * 2**m >= 2 * GROUP * k else 1


class Launch(NamedTuple):
    """A kernel as it is started for a level."""

    kernel: Callable
    constants: dict  # its constexpr arguments
    tokens: int = 1  # a program
    warps: int = 1  # a program
    maxnreg: int | None = None  # registers a thread, at most

    def options(self):
        """Of Triton's compiler."""
        return {"num_warps": self.warps, "num_stages": 1, "maxnreg": self.maxnreg}


class LevelLaunches(NamedTuple):
    """What select starts for a level."""

    n: int
    k: int
    m: int
    products: Launch
    picks: Launch


def _top_launch(t, k):
    """Products of the top level."""
    constants = {
        "log_rows": t - t // 2,
        "log_columns": t // 2,
        "inv_sqrt_d": 2 ** (-t / 2),
        "group": _group(1, t, k, 2 ** (t // 2)),
    }
    return Launch(top_products, constants)


def _few_launch(t, n, m, slots, first, group):
    """Products of any level for few tokens."""
    constants = {
        "first": first,
        "gated": m < n,
        "slots": slots,
        "block_size": 2**m,
        "c": n - t,
        "words": 2**t // 32,
        "inv_sqrt_d": 2 ** (-t / 2),
        "group": group,
    }
    return Launch(few_products, constants)


def _block_launch(t, n, m, k, slots, first, dtype):
    """Products of a gated level; a matrix product wants at least 16 of each dimension."""
    head = min(n - m, t)
    chirp = min(n - t, m)
    padded_slots = _power_of_two(slots)
    padded_chirps = max(16, 2**chirp)
    tokens = max(1, 32 // padded_slots)
    size = tokens * padded_slots * 2 ** (t - head) * padded_chirps
    constants = {
        "first": first,
        "gated": m < n,
        "tokens": tokens,
        "slots": slots,
        "padded_slots": padded_slots,
        "heads": 2**head,
        "padded_heads": max(16, 2**head),
        "step": min(128 if padded_chirps <= 32 else 32, max(16, 2**head)),
        "tails": 2 ** (t - head),
        "chirp_count": 2**chirp,
        "padded_chirps": padded_chirps,
        "parts": {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}[dtype],
        # the interpreter has no bfloat16 products
        "dot_type": tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16,
        "inv_sqrt_d": 2 ** (-t / 2),
        "group": _group(slots, m, k, 2**chirp),
    }
    # as few registers as don't spill by Triton 3.6 to 3.9: a multiprocessor holds 65,536 of them
    registers = 168 if padded_chirps <= 64 else 255
    return Launch(block_products, constants, tokens, 8 if size > 8192 else 4, registers)


def _pick_launch(n, m, k, slots, first, group, columns, column, leaf_shift, next_shift):
    padded_k = max(8, _power_of_two(k))
    padded_size = _power_of_two(slots) * 2**m
    constants = {
        "first": first,
        "gated": m < n,
        "slots": slots,
        "block_size": 2**m,
        "k": k,
        "padded_k": padded_k,
        "parts": min(padded_k, padded_size // group),
        "padded_size": padded_size,
        "group": group,
        "columns": columns,
        "column": column,
        "leaf_shift": leaf_shift,
        "next_shift": next_shift,
    }
    return Launch(pick, constants)


@functools.cache
def level_launches(plan, dtype=torch.bfloat16, few=False):
    """
    What select launches for x of dtype, LevelLaunches of each level.

    plan: n, k, m of each level, a tuple, as cayley.select takes it; few: for at most FEW tokens.
    """
    t = plan[0]
    levels = list(zip(plan[::3], plan[1::3], plan[2::3]))
    launches = []
    column = 0
    first = 0
    slots = 1
    for i, (n, k, m) in enumerate(levels):
        if i == 0:
            products = _top_launch(t, k)
        else:
            slots = slots if m < n else 1
            products = _block_launch(t, n, m, k, slots, first, dtype)
        group = products.constants["group"]
        if few:
            products = _few_launch(t, n, m, slots, first, group)
        next_shift = -1
        if i + 1 < len(levels):
            next_n, _, next_m = levels[i + 1]
            if next_m < next_n:
                next_shift = n - (next_n - next_m)
        columns = sum(plan[1::3])
        leaf_shift = levels[-1][0] - n
        picks = _pick_launch(
            n, m, k, slots, first, group, columns, column, leaf_shift, next_shift
        )
        if few:
            picks = picks._replace(warps=4)
        launches.append(LevelLaunches(n, k, m, products, picks))
        column += k
        first += 2**n
        slots = k
    return launches


@functools.cache
def scratch_sizes(plan):
    """The most products, and the most places for vectors, that a token has on any level."""
    products = 0
    places = 0
    for level in level_launches(plan):
        constants = level.picks.constants
        products = max(products, constants["slots"] * constants["block_size"])
        places = max(places, constants["padded_k"])
    return products, places


@functools.cache
def supports(t, plan=(), dtype=torch.float32):
    """
    Whether select, with its plan, a tuple, is covered for d = 2^t and tensors of dtype; without a
    plan combine and project.

    Not covered: d under 32, float64, and levels whose open features don't fit in registers (16,384
    of some tokens' for products, 2,048 of a token's for a search without groups).
    """
    if not 5 <= t <= 12 or dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    for level in level_launches(plan, dtype) if plan else ():
        constants = level.products.constants
        if level.products.kernel is block_products:
            rows = constants["tokens"] * constants["padded_slots"]
            if rows * constants["tails"] * constants["padded_chirps"] > 16384:
                return False
        if constants["group"] == 1 and level.picks.constants["padded_size"] > 2048:
            return False
    return True


# -----------------------------------------------------------------------------
# the operators: as cayley.py's torch_select and so on, which they fall back to

_enabled = True


class enabled:
    """
    enabled(False) has the operators run PyTorch's kernels from now on, enabled(True) these again.

    By `with` it holds inside the block alone.
    """

    def __init__(self, on):
        global _enabled
        self.before = _enabled
        _enabled = on

    def __enter__(self):
        return self

    def __exit__(self, *_):
        global _enabled
        _enabled = self.before


def select(x, terms, bias, plan):
    """x (N, d), terms (4, F), bias (F,), plan -> leaves (N, K) int64, codes (N, K) as terms."""
    plan = tuple(plan)
    if not _enabled or not supports(plan[0], plan, x.dtype):
        return cayley.torch_select(x, terms, bias, list(plan))
    x = x.contiguous()
    terms = [*terms.contiguous(), bias.contiguous()]
    leaves = x.new_empty((len(x), sum(plan[1::3])), dtype=torch.int64)
    codes = terms[0].new_empty(leaves.shape)
    step = max(1, SCRATCH_BYTES // (4 * scratch_sizes(plan)[0]))
    with torch.cuda.device_of(x):
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            _select_chunk(x[part], terms, plan, leaves[part], codes[part])
    return leaves, codes


def _select_chunk(x, terms, plan, leaves, codes):
    """
    select for x (N, d) into leaves and codes (N, K), N so small that 32 bits count its scratch.

    terms: five (F,), the last the biases.
    """
    N = len(x)
    t = plan[0]
    scale, offset, *_ = terms
    scratch, lanes = scratch_sizes(plan)
    products = x.new_empty((N, scratch), dtype=torch.float32)
    best = x.new_empty((N, scratch // GROUP), dtype=torch.float32)
    work = x.new_empty((N, lanes), dtype=torch.int32)
    blocks = work  # of the level; the top level has none
    for n, k, m, first, picks in level_launches(plan, x.dtype, N <= FEW):
        grid = (triton.cdiv(N, first.tokens),)
        if first.kernel is few_products:
            tables = _word_tables(t, n, x.device)
            arguments = (x, blocks, scale, offset, *tables, products, best)
            grid = (N, triton.cdiv(picks.constants["slots"] * 2**m, 8))
        elif first.kernel is top_products:
            arguments = (x, scale, offset, products, best)
        else:
            tables = (
                _sign_table(t, n, m, x.device),
                _chirp_table(t, n, m, x.device),
                cayley._walsh(t - min(n - m, t), torch.float32, x.device),
            )
            arguments = (x, blocks, scale, offset, *tables, products, best, N)
        first.kernel[grid](*arguments, **first.options(), **first.constants)
        next_blocks = work
        if picks.constants["next_shift"] >= 0:
            next_blocks = x.new_empty((N, k), dtype=torch.int32)
        picks.kernel[(N,)](
            products, best, blocks, *terms, leaves, codes, next_blocks, work,
            **picks.options(), **picks.constants,
        )
        blocks = next_blocks


def combine_constants(t, N, K):
    """How N tokens of K atoms are combined; words of a program, and atoms at a time."""
    words = 2**t // 32
    if N <= FEW:
        return {"words": words, "lanes": 1, "step": min(32, _power_of_two(K))}
    return {"words": words, "lanes": words, "step": 1}


def combine(ids, weights, t, n):
    """ids (N, K) of the n-bit level, weights (N, K) -> (N, 2^t)."""
    if not _enabled or not supports(t, dtype=weights.dtype):
        return cayley.torch_combine(ids, weights, t, n)
    ids = ids.contiguous()
    weights = weights.contiguous()
    N, K = ids.shape
    out = weights.new_empty((N, 2**t))
    walsh, chirps = _word_tables(t, n, weights.device)
    constants = combine_constants(t, N, K)
    if N:
        with torch.cuda.device_of(weights):
            combine_atoms[(N, constants["words"] // constants["lanes"])](
                ids, weights, walsh, chirps, out, K, n - t, **constants, num_warps=1
            )
    return out


def project(y, ids, t, n):
    """y (N, 2^t), ids (N, K) of the n-bit level -> (N, K)."""
    if not _enabled or not supports(t, dtype=y.dtype):
        return cayley.torch_project(y, ids, t, n)
    y = y.contiguous()
    ids = ids.contiguous()
    N, K = ids.shape
    out = y.new_empty((N, K))
    walsh, chirps = _word_tables(t, n, y.device)
    if N:
        with torch.cuda.device_of(y):
            project_atoms[(N,)](
                y, ids, walsh, chirps, out, K, n - t, words=2**t // 32, num_warps=1
            )
    return out


def register(device_type):
    """Have cayley.py's operators run these on "cuda", or on "cpu" for Triton's interpreter."""
    cayley.select.register_kernel(device_type)(select)
    cayley.combine.register_kernel(device_type)(combine)
    cayley.project.register_kernel(device_type)(project)


register("cuda")

# -----------------------------------------------------------------------------
# the check at the start of a run


def _by_id(leaves, codes):
    """A selection's leaves and codes (N, K), each token's in the order of its leaves."""
    order = leaves.argsort(dim=1, stable=True)
    return leaves.gather(1, order), codes.gather(1, order)


@torch.no_grad()
def find_fault(sae, x):
    """
    What these kernels' results have that PyTorch's in fp32 haven't, in words; "" where they agree.

    sae: a CayleySAE; x (..., d): a batch of its input, under the autocast of training.
    """
    x = sae._flat(x)  # (N, d)
    arguments = (sae.terms(), sae.bias, sae.plan)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 would decide near ties its own way
    leaves, their_codes = _by_id(*cayley.torch_select(x.float(), *arguments))
    torch.set_float32_matmul_precision(precision)
    our_leaves, codes = _by_id(*select(x, *arguments))
    same = (our_leaves == leaves).all(1)  # (N,), true but where scores nearly tie
    share = same.float().mean().item()
    if share < 0.99:
        return f"{1 - share:.1%} of the tokens have other active features"
    weights = their_codes.to(x.dtype)
    their_sums = cayley.torch_combine(leaves, weights.float(), sae.t, sae.n)
    their_parts = cayley.torch_project(x.float(), leaves, sae.t, sae.n)
    pairs = {
        "select": (codes[same], their_codes[same]),
        "combine": (combine(leaves, weights, sae.t, sae.n), their_sums),
        "project": (project(x, leaves, sae.t, sae.n), their_parts),
    }
    for name, (ours, theirs) in pairs.items():
        error = ((ours.float() - theirs).norm() / theirs.norm()).item()
        if not error < 0.01:  # rounding to 16 bits is 0.003; not a number is a fault, too
            return f"{name} differs by {error:.3g} of its norm"
    return ""
