"""
The operators of cayley.py for CUDA, in Triton: select, combine and project, with the same results.

select takes two kernels a level. The first makes the products with all features that may be chosen: a Walsh-Hadamard
transform in registers on the top level, else products of the signed inputs with the chirps on the matrix units, which
are exact because signs and chirps are +1 and -1, and x is split into parts of 8 bits. It also keeps the best score of
every 8 features. The second finds the k best of those groups, then the k best features in them: a threshold on the
score's bits, one bit a round. combine and project hold a token in registers, 32 coordinates a lane, and read an atom
as bits. Sums are in fp32. Of equal scores the smaller feature wins; every result is the same at every run.

records/kernels/ has the instructions and bytes of each kernel and of the designs that lost.
"""
import functools

import numpy as np
import torch
import triton
import triton.language as tl

from cayley import labels

SCRATCH_BYTES = 2**29  # select takes at most about so many bytes of tokens at a time
GROUP = 8  # features that share one entry in the first search

# -----------------------------------------------------------------------------
# select, first kernel of a level: the products


@triton.jit
def _hadamard(y, rows: tl.constexpr, log_columns: tl.constexpr):
    """Walsh-Hadamard transform along the last axis: (rows, columns) -> (rows, columns)."""
    columns: tl.constexpr = 2**log_columns
    for _ in tl.static_range(log_columns):  # the last bit of the index is transformed and becomes the first
        a, b = tl.split(tl.reshape(y, (rows, columns // 2, 2)))
        y = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (rows, columns))
    return y


@triton.jit
def top_products(x, scale, offset, products, best, log_rows: tl.constexpr, log_columns: tl.constexpr,
                 inv_sqrt_d: tl.constexpr, group: tl.constexpr):
    """Top level, one token a program: all d products (N, d) and, if group > 1, best scores (N, d / group)."""
    rows: tl.constexpr = 2**log_rows
    columns: tl.constexpr = 2**log_columns
    token = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, rows)[:, None]
    feature = row * columns + tl.arange(0, columns)[None, :]  # (rows, columns)
    y = tl.load(x + token * (rows * columns) + feature).to(tl.float32)
    y = _hadamard(y, rows, log_columns)
    y = tl.trans(_hadamard(tl.trans(y), columns, log_rows)) * inv_sqrt_d
    tl.store(products + token * (rows * columns) + feature, y)
    if group > 1:
        score = y * tl.load(scale + feature).to(tl.float32) + tl.load(offset + feature).to(tl.float32)
        score = tl.max(tl.reshape(score, (rows, columns // group, group)), 2)
        entry = row * (columns // group) + tl.arange(0, columns // group)[None, :]
        tl.store(best + token * (rows * columns // group) + entry, score)


@triton.jit
def block_products(x, blocks, scale, offset, signs, chirps, walsh, products, best, n_tokens,
                   tokens: tl.constexpr, slots: tl.constexpr, padded_slots: tl.constexpr,
                   heads: tl.constexpr, padded_heads: tl.constexpr, step: tl.constexpr,
                   tails: tl.constexpr, chirp_count: tl.constexpr, padded_chirps: tl.constexpr,
                   parts: tl.constexpr, dot_type: tl.constexpr, inv_sqrt_d: tl.constexpr, group: tl.constexpr):
    """
    A gated level, some tokens a program: products (N, slots, block) and best scores (N, slots, block / group).

    As cayley.py's _block_scores: a coordinate is (h, j) = (head, tail). For each j sum over h the inputs, signed by
    the block's parity of h, against the chirps; then transform over j. blocks (N, slots): ~block where it repeats.
    """
    rows: tl.constexpr = tokens * padded_slots
    block_size: tl.constexpr = tails * chirp_count
    token = tl.program_id(0).to(tl.int64) * tokens + tl.arange(0, tokens)  # (tokens,)
    slot = tl.arange(0, padded_slots)[None, :]
    inside = token < n_tokens
    known = inside[:, None] & (slot < slots)  # (tokens, padded_slots)
    block = tl.load(blocks + token[:, None] * slots + slot, mask=known, other=-1)
    opens = tl.reshape(block >= 0, (rows, 1, 1))
    block = tl.reshape(tl.where(block >= 0, block, ~block), (rows,))
    entry = tl.reshape(token[:, None] * slots + slot, (rows, 1, 1))
    known = tl.reshape(known, (rows, 1, 1))

    head = tl.arange(0, step)
    chirp = tl.arange(0, padded_chirps)
    tail = tl.arange(0, tails)
    acc = tl.zeros((rows, tails, padded_chirps), tl.float32)
    for j in range(tails):
        y = tl.zeros((rows, padded_chirps), tl.float32)
        for start in range(0, heads, step):
            h = start + head
            rest = tl.load(x + token[:, None] * (heads * tails) + h[None, :] * tails + j,
                           mask=inside[:, None] & (h < heads)[None, :], other=0)  # (tokens, step)
            sign = tl.load(signs + block[:, None] * padded_heads + h[None, :])  # (rows, step)
            factor = tl.load(chirps + (j * padded_heads + h[:, None]) * padded_chirps + chirp[None, :])
            factor = factor.to(dot_type)
            for _ in tl.static_range(parts):
                part = rest.to(tl.bfloat16)
                rest = rest.to(tl.float32) - part.to(tl.float32)
                signed = part.to(tl.int16, bitcast=True)[:, None, :]
                signed = tl.broadcast_to(signed, (tokens, padded_slots, step))
                signed = (tl.reshape(signed, (rows, step)) ^ sign).to(tl.bfloat16, bitcast=True)
                y = tl.dot(signed.to(dot_type), factor, y)  # (rows, padded_chirps)
        acc += y[:, None, :] * tl.load(walsh + j * tails + tail)[None, :, None]

    acc *= inv_sqrt_d
    feature = tail[None, :, None] * chirp_count + chirp[None, None, :]
    real = known & (chirp < chirp_count)[None, None, :]
    tl.store(products + entry * block_size + feature, acc, mask=real)
    if group > 1:
        where = block[:, None, None].to(tl.int64) * block_size + feature
        score = acc * tl.load(scale + where, mask=real, other=0).to(tl.float32)
        score += tl.load(offset + where, mask=real, other=0).to(tl.float32)
        score = tl.where(opens, score, -float("inf"))
        score = tl.max(tl.reshape(score, (rows, tails, padded_chirps // group, group)), 3)
        of_tail = tl.arange(0, padded_chirps // group)[None, None, :]
        where = entry * (block_size // group) + tail[None, :, None] * (chirp_count // group) + of_tail
        tl.store(best + where, score, mask=known & (of_tail < chirp_count // group))


# -----------------------------------------------------------------------------
# select, second kernel of a level: the k best


@triton.jit
def _ordered(score):
    """float32 -> int32 in the same order; -0 is +0."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _largest(key, k: tl.constexpr):
    """Mask of the k largest of int32 keys (M,), of equal keys the first."""
    at_least = tl.sum((key >= 0).to(tl.int32), 0)
    bound = tl.where(at_least >= k, 0, -2147483648)  # the k-th largest key, bit by bit from the first
    for i in range(31):
        trial = bound | (1 << (30 - i))
        bound = tl.where(tl.sum((key >= trial).to(tl.int32), 0) >= k, trial, bound)
    chosen = key >= bound
    if tl.sum(chosen.to(tl.int32), 0) > k:
        above = key > bound
        equal = (key == bound).to(tl.int32)
        rest = k - tl.sum(above.to(tl.int32), 0)
        chosen = above | ((equal > 0) & (tl.cumsum(equal, 0) <= rest))
    return chosen


@triton.jit
def _gather_chosen(chosen, item, i, work):
    """The items (M,) of the mask chosen, in order, at the places i (padded_k,) of a vector; work: its memory."""
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
def pick(products, best, blocks, scale, offset, ids, values, next_blocks, work,
         slots: tl.constexpr, block_size: tl.constexpr, k: tl.constexpr, padded_k: tl.constexpr,
         padded_size: tl.constexpr, group: tl.constexpr, columns: tl.constexpr, column: tl.constexpr,
         next_shift: tl.constexpr):
    """
    One token a program: the k features with the largest scores, largest first, into ids and values (N, columns).

    next_blocks (N, k), unless next_shift < 0: blocks of the next level, ascending, ~block where it repeats the one
    before. work (N, padded_k) int32: memory for vectors that lanes exchange.
    """
    token = tl.program_id(0).to(tl.int64)
    work += token * padded_k
    products += token * (slots * block_size)
    i = tl.arange(0, padded_k)
    real = i < k
    candidate = tl.arange(0, padded_size)
    inside = candidate < slots * block_size
    if group > 1:
        entry = tl.arange(0, padded_size // group)
        n_entries: tl.constexpr = slots * block_size // group
        score = tl.load(best + token * n_entries + entry, mask=entry < n_entries, other=-float("inf"))
        entry = _gather_chosen(_largest(_ordered(score), k), entry, i, work)
        candidate = tl.where(real, entry, 0)[:, None] * group + tl.arange(0, group)[None, :]
        candidate = tl.reshape(candidate, (padded_k * group,))
        inside = tl.reshape(tl.broadcast_to(real[:, None], (padded_k, group)), (padded_k * group,))

    block = tl.load(blocks + token * slots + candidate // block_size, mask=inside, other=-1)
    inside = block >= 0
    feature = block * block_size + candidate % block_size
    score = tl.load(products + candidate, mask=inside, other=0)
    score *= tl.load(scale + feature, mask=inside, other=0).to(tl.float32)
    score += tl.load(offset + feature, mask=inside, other=-float("inf")).to(tl.float32)
    candidate = _gather_chosen(_largest(_ordered(score), k), candidate, i, work)  # ascending
    candidate = tl.where(real, candidate, 0)

    block = tl.load(blocks + token * slots + candidate // block_size)
    feature = block * block_size + candidate % block_size
    value = tl.load(products + candidate)
    score = value * tl.load(scale + feature).to(tl.float32) + tl.load(offset + feature).to(tl.float32)
    key = tl.where(real, _ordered(score), -2147483648)
    other = _spread(key, i, work)
    before = (other > key[:, None]) | ((other == key[:, None]) & (i[None, :] < i[:, None]))
    rank = tl.sum(before.to(tl.int32), 1)  # (padded_k,)
    tl.store(ids + token * columns + column + rank, feature.to(tl.int64), mask=real)
    tl.store(values + token * columns + column + rank, value.to(values.dtype.element_ty), mask=real)

    if next_shift >= 0:
        block = tl.where(real, feature >> next_shift, 2147483647)
        other = _spread(block, i, work)
        same = (other == block[:, None]) & (i[None, :] < i[:, None])
        rank = tl.sum((same | (other < block[:, None])).to(tl.int32), 1)
        repeats = tl.sum(same.to(tl.int32), 1) > 0
        tl.store(next_blocks + token * k + rank, tl.where(repeats, ~block, block), mask=real)


# -----------------------------------------------------------------------------
# combine and project. A word holds an atom's signs at 32 coordinates: bit i of word w is 1 where coordinate
# i * d/32 + w is negative. An atom's words are a Walsh function's XOR a chirp's. Sums of +-a are the sum of all a
# minus twice the sum of the negative ones: one predicated addition an element.


@triton.jit
def _words(walsh, chirps, feature, c, lane, words: tl.constexpr):
    first = tl.load(walsh + (feature >> c) * words + lane)
    return first ^ tl.load(chirps + (feature & ((1 << c) - 1)) * words + lane)


@triton.jit
def combine_atoms(ids, weights, walsh, chirps, out, K, c, words: tl.constexpr):
    """One token a program: ids and weights (N, K) of the level with t + c bits -> out (N, 32 * words)."""
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, words)
    total = 0.0
    negative = ()
    for _ in tl.static_range(32):
        negative = negative + (tl.zeros((words,), tl.float32),)
    for k in range(K):
        weight = tl.load(weights + token * K + k).to(tl.float32)
        word = _words(walsh, chirps, tl.load(ids + token * K + k), c, lane, words)
        total += weight
        sums = ()
        for i in tl.static_range(32):
            sums = sums + (tl.where((word >> i) & 1 != 0, negative[i] + weight, negative[i]),)
        negative = sums
    out += token * (32 * words) + lane
    for i in tl.static_range(32):
        tl.store(out + i * words, (total - 2 * negative[i]).to(out.dtype.element_ty))


@triton.jit
def project_atoms(y, ids, walsh, chirps, out, K, c, words: tl.constexpr):
    """One token a program: y (N, 32 * words), ids (N, K) of the level with t + c bits -> out (N, K)."""
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, words)
    total = tl.zeros((words,), tl.float32)
    parts = ()
    for i in tl.static_range(32):
        part = tl.load(y + token * (32 * words) + i * words + lane).to(tl.float32)
        total += part
        parts = parts + (part,)
    for k in range(K):
        word = _words(walsh, chirps, tl.load(ids + token * K + k), c, lane, words)
        negative = tl.zeros((words,), tl.float32)
        for i in tl.static_range(32):
            negative = tl.where((word >> i) & 1 != 0, negative + parts[i], negative)
        product = tl.sum(total - 2 * negative, 0)
        tl.store(out + token * K + k, product.to(out.dtype.element_ty))


# -----------------------------------------------------------------------------
# tables, kept for every device


def _parity(v, label):
    return np.bitwise_count(v & label).astype(np.int8) & 1


@functools.cache
def _sign_table(t, n, m, device):
    """Sign bits of bfloat16, int16 (2^q, 2^p): a block's parity of the head h; heads padded to 16."""
    q = n - m
    p = min(q, t)
    signs = np.zeros((2**q, max(16, 2**p)), dtype=np.int16)
    label = labels(t, q) if q > t else np.arange(2**p)  # (2^p,)
    signs[:, :2**p] = -32768 * _parity(np.arange(2**q)[:, None], label).astype(np.int16)
    return torch.from_numpy(signs).to(device)


@functools.cache
def _chirp_table(t, n, m, device):
    """+1 and -1, bfloat16 (2^r, 2^p, 2^c): parities of the last c label bits at (h, j), zero in the padding to 16."""
    p, c = min(n - m, t), min(n - t, m)
    label = labels(t, n).reshape(2**p, 2 ** (t - p)).T[..., None]
    chirps = np.zeros((2 ** (t - p), max(16, 2**p), max(16, 2**c)), dtype=np.int8)
    chirps[:, :2**p, :2**c] = 1 - 2 * _parity(np.arange(2**c), label)
    return torch.from_numpy(chirps).to(device, torch.bfloat16)


@functools.cache
def _walsh_table(r, device):
    j = np.arange(2**r)
    return torch.from_numpy(1 - 2 * _parity(j[:, None], j)).to(device, torch.float32)


@functools.cache
def _word_tables(t, n, device):
    """Words of the Walsh functions (2^t, d/32) and of the chirps (2^(n-t), d/32), int32."""
    chirp_labels = labels(t, n) & (2 ** (n - t) - 1)
    tables = []
    for count, label in ((2**t, np.arange(2**t)), (2 ** (n - t), chirp_labels)):
        bits = _parity(np.arange(count)[:, None], label).reshape(count, 32, -1)
        words = (bits.astype(np.uint32) << np.arange(32, dtype=np.uint32)[:, None]).sum(1, dtype=np.uint32)
        tables.append(torch.from_numpy(words.view(np.int32)).to(device))
    return tables


# -----------------------------------------------------------------------------
# which kernels a plan takes


def _power_of_two(x):
    return 1 << (x - 1).bit_length()


def _group(slots, m, k, width):
    """GROUP, or 1 where a level is too small for two searches."""
    return GROUP if width >= GROUP and slots * 2**m >= 2 * GROUP * k else 1


def level_kernels(t, plan, dtype=torch.bfloat16):
    """
    Per level what select launches for x of dtype: [(kernel, constants, tokens a program, warps) of products and pick].

    plan: n, k, m of each level, as select takes it.
    """
    levels = list(zip(plan[::3], plan[1::3], plan[2::3]))
    parts = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}[dtype]
    column, slots, launches = 0, 1, []
    for level, (n, k, m) in enumerate(levels):
        if level == 0:
            group = _group(1, m, k, 2 ** (t // 2))
            products = (top_products, {
                "log_rows": t - t // 2, "log_columns": t // 2, "inv_sqrt_d": 2 ** (-t / 2), "group": group}, 1, 1)
        else:
            slots = levels[level - 1][1] if m < n else 1
            p, c = min(n - m, t), min(n - t, m)
            group = _group(slots, m, k, 2**c)
            padded = _power_of_two(slots)
            padded_heads, padded_chirps = max(16, 2**p), max(16, 2**c)
            tokens = max(1, 32 // padded)
            size = tokens * padded * 2 ** (t - p) * padded_chirps
            products = (block_products, {
                "tokens": tokens, "slots": slots, "padded_slots": padded, "heads": 2**p,
                "padded_heads": padded_heads, "step": min(128, padded_heads), "tails": 2 ** (t - p),
                "chirp_count": 2**c, "padded_chirps": padded_chirps, "parts": parts,
                "dot_type": tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16,
                "inv_sqrt_d": 2 ** (-t / 2), "group": group}, tokens, 8 if size > 8192 else 4)
        shift = -1
        if level + 1 < len(levels) and levels[level + 1][2] < levels[level + 1][0]:
            shift = n - (levels[level + 1][0] - levels[level + 1][2])
        launches.append((products, (pick, {
            "slots": slots, "block_size": 2**m, "k": k, "padded_k": max(8, _power_of_two(k)),
            "padded_size": _power_of_two(slots) * 2**m, "group": group, "columns": sum(plan[1::3]),
            "column": column, "next_shift": shift}, 1, 1)))
        column += k
    return launches


def supports(t, plan=None, dtype=torch.float32):
    """
    Whether select (with its plan) or combine and project (without) are covered for d = 2^t and tensors of dtype.

    Not covered: d under 32, float64, and levels of more features than registers hold (16,384 of a token's open ones,
    1,024 if none is gated).
    """
    if not 5 <= t <= 12 or dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    for products, picks in level_kernels(t, plan or [], dtype):
        constants = products[1]
        if products[0] is block_products:
            rows = constants["tokens"] * constants["padded_slots"]
            if rows * constants["tails"] * constants["padded_chirps"] > 16384:
                return False
        if picks[1]["group"] == 1 and picks[1]["padded_size"] > 2048:
            return False
    return True


# -----------------------------------------------------------------------------
# the operators


def select(x, scale, offset, plan):
    """As cayley.select: x (N, d), scale and offset (F,), plan -> ids (N, K) int64, products (N, K) as scale."""
    t, K = plan[0], sum(plan[1::3])
    x, scale, offset = x.contiguous(), scale.contiguous(), offset.contiguous()
    ids = x.new_empty((len(x), K), dtype=torch.int64)
    values = scale.new_empty((len(x), K))
    launches = level_kernels(t, plan, x.dtype)
    sizes = [picks[1]["slots"] * picks[1]["block_size"] for _, picks in launches]
    chunk = max(1, SCRATCH_BYTES // (4 * max(sizes)))
    with torch.cuda.device_of(x):
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            _select_chunk(x[part], scale, offset, plan, launches, max(sizes), ids[part], values[part])
    return ids, values


def _select_chunk(x, scale, offset, plan, launches, size, ids, values):
    N, t = len(x), plan[0]
    products = x.new_empty((N, size), dtype=torch.float32)
    best = x.new_empty((N, size // GROUP), dtype=torch.float32)
    work = x.new_empty((N, max(picks[1]["padded_k"] for _, picks in launches)), dtype=torch.int32)
    start, next_blocks = 0, None
    for (n, k, m), (first, picks) in zip(zip(plan[::3], plan[1::3], plan[2::3]), launches):
        blocks = next_blocks if m < n else x.new_zeros((N, 1), dtype=torch.int32)
        a, b = scale[start:start + 2**n], offset[start:start + 2**n]
        kernel, constants, tokens, warps = first
        grid = (triton.cdiv(N, tokens),)
        if kernel is top_products:
            kernel[grid](x, a, b, products, best, num_warps=warps, **constants)
        else:
            tables = (_sign_table(t, n, m, x.device), _chirp_table(t, n, m, x.device),
                      _walsh_table(t - min(n - m, t), x.device))
            kernel[grid](x, blocks, a, b, *tables, products, best, N, num_warps=warps, **constants)
        next_blocks = x.new_empty((N, k), dtype=torch.int32)
        kernel, constants, _, warps = picks
        kernel[(N,)](products, best, blocks, a, b, ids, values, next_blocks, work, num_warps=warps, **constants)
        start += 2**n


def combine(ids, weights, t, n):
    """As cayley.combine: ids (N, K) of the n-bit level, weights (N, K) -> (N, 2^t)."""
    ids, weights = ids.contiguous(), weights.contiguous()
    out = weights.new_empty((len(ids), 2**t))
    if len(ids):
        with torch.cuda.device_of(weights):
            combine_atoms[(len(ids),)](ids, weights, *_word_tables(t, n, weights.device), out, ids.shape[1],
                                       n - t, words=2**t // 32, num_warps=1)
    return out


def project(y, ids, t, n):
    """As cayley.project: y (N, 2^t), ids (N, K) of the n-bit level -> (N, K)."""
    y, ids = y.contiguous(), ids.contiguous()
    out = y.new_empty(ids.shape)
    if len(ids):
        with torch.cuda.device_of(y):
            project_atoms[(len(ids),)](y, ids, *_word_tables(t, n, y.device), out, ids.shape[1],
                                       n - t, words=2**t // 32, num_warps=1)
    return out
