"""The dictionary's mathematics, exhaustively, and the layer against its definition in float64."""
import copy
import itertools
import math

import numpy as np
import pytest
import torch

import cayley
from cayley import (
    CayleySAE,
    Codes,
    coherence,
    field_tables,
    label_bits,
    parse_levels,
    plain_decode,
    plain_encode,
)

T = range(4, 13)


# -----------------------------------------------------------------------------
# the field and the labels

def multiply(a, b, t):
    """Product in GF(2^t) by shift and reduce: the definition, independent of the tables."""
    result = 0
    for i in range(t):
        result ^= (b >> i & 1) * (a << i)
    for i in reversed(range(t, 2 * t)):
        result ^= (result >> i & 1) * (cayley.PRIMITIVE_POLYNOMIALS[t] << (i - t))
    return result


@pytest.mark.parametrize("t", T)
def test_alpha_generates_the_field(t):
    exp, log = field_tables(t)
    assert sorted(exp) == list(range(1, 2**t))  # primitive: every nonzero element once
    assert all(multiply(int(exp[i - 1]), 2, t) == exp[i] for i in range(1, len(exp)))
    assert multiply(int(exp[-1]), 2, t) == 1
    for a, b in np.random.default_rng(t).integers(1, 2**t, (200, 2)).tolist():
        assert exp[(log[a] + log[b]) % (2**t - 1)] == multiply(a, b, t)


@pytest.mark.parametrize("t", T)
def test_field_axioms(t):
    for a, b, c in np.random.default_rng(t).integers(0, 2**t, (100, 3)).tolist():
        assert multiply(a, b, t) == multiply(b, a, t)
        assert multiply(a, multiply(b, c, t), t) == multiply(multiply(a, b, t), c, t)
        assert multiply(a, b ^ c, t) == multiply(a, b, t) ^ multiply(a, c, t)


def power(x, e, t):
    result = 1
    for _ in range(e):
        result = multiply(result, x, t)
    return result


@pytest.mark.parametrize("t", [4, 5, 6, 7, 8])
def test_label_bits_are_traces(t):
    """Every bit after the first t is Tr(alpha^j x^e), by definition, for some j and allowed e."""
    def trace(x):
        total, conjugate = 0, x
        for _ in range(t):
            total, conjugate = total ^ conjugate, multiply(conjugate, conjugate, t)
        return total
    exponents = (3, 5) if t % 2 else (2 ** (t // 2) + 1, 2 ** (t // 2 + 1) + 1)
    powers = [[power(x, e, t) for x in range(2**t)] for e in exponents]
    allowed = []
    for row in powers:
        for j in range(t):
            alpha_j = power(2, j, t)
            allowed.append([trace(multiply(alpha_j, xe, t)) for xe in row])
    bits = cayley.all_label_bits(t).tolist()
    assert bits[:t] == [[x >> (t - 1 - i) & 1 for x in range(2**t)] for i in range(t)]
    positions = [allowed.index(bit) for bit in bits[t:]]
    assert positions == sorted(positions) and len(set(positions)) == len(positions)


@pytest.mark.parametrize("t", T)
def test_label_bits_are_independent(t):
    bits = cayley.all_label_bits(t).astype(np.int64)
    rows = [int("".join(map(str, bit)), 2) for bit in bits]
    rank = 0
    while rows:
        pivot = rows.pop()
        if pivot:
            rank += 1
            rows = [row ^ pivot if row ^ pivot < row else row for row in rows]
    assert rank == len(bits)
    assert len(bits) == (5 * t // 2 if t % 2 == 0 else 3 * t)
    if t % 2 == 0:  # the first exponent gives exactly t/2 bits: the trace of a norm
        x = np.arange(2**t)
        exp, log = field_tables(t)
        norm = np.where(x == 0, 0, exp[(2 ** (t // 2) + 1) * log % (2**t - 1)])
        small = bits[t:t + t // 2]
        for value in set(norm.tolist()):
            of_one_norm = small[:, norm == value]
            assert (of_one_norm == of_one_norm[:, :1]).all()


def expected_coherence(t, n):
    if n <= t:
        return 0
    if t % 2 == 0:
        return 2 ** (-t / 2) if n <= 3 * t // 2 else 2 ** (-t / 2 + 1)
    return 2 ** (-(t - 1) / 2) if n <= 2 * t else 2 ** (-(t - 3) / 2)


@pytest.mark.parametrize("t", T)
def test_coherence_is_the_table_of_the_design(t):
    for n in range(1, min(20, len(cayley.all_label_bits(t))) + 1):
        assert coherence(t, n) == expected_coherence(t, n), (t, n)


@pytest.mark.parametrize("t, n", [(4, 8), (5, 9), (6, 9)])
def test_gram_matrix_is_a_function_of_u_xor_v(t, n):
    sae = CayleySAE(2**t, [(t, 1, 0), (n, 1, 2 ** (n - t))])
    atoms = sae.double().atoms(1, range(2**n))
    gram = atoms @ atoms.T
    u = torch.arange(2**n)
    torch.testing.assert_close(gram, gram[0][u[:, None] ^ u])
    off_diagonal = gram - torch.eye(2**n, dtype=torch.float64)
    assert off_diagonal.abs().max().item() == pytest.approx(coherence(t, n), abs=1e-12)


@pytest.mark.parametrize("t", T)
def test_top_level_is_orthonormal_and_levels_nest(t):
    sae = CayleySAE(2**t, [(t, 1, 0), (t + 1, 1, 2)])
    atoms = sae.atoms(0, range(2**t))
    torch.testing.assert_close(atoms @ atoms.T, torch.eye(2**t))
    assert torch.equal(sae.atoms(1, torch.arange(2**t) << 1), atoms)


def test_atoms_are_the_parities_of_the_design():
    sae = CayleySAE(64, "6,4,0;11,4,32")
    for level, n in ((0, 6), (1, 11)):
        ids = [0, 1, 5, 2**n - 1]
        bits = label_bits(6, n).astype(int)
        for v, atom in zip(ids, sae.atoms(level, ids)):
            # the first label bit meets the most significant bit of v
            v_bits = np.array([v >> (n - 1 - i) & 1 for i in range(n)])
            np.testing.assert_allclose(atom.numpy(), (-1.0) ** (v_bits @ bits) / 8)


# -----------------------------------------------------------------------------
# the layer

def reference(sae, x):
    """The plain definition in float64, of x (N, d) -> output (N, d), Codes per level."""
    sae = copy.deepcopy(sae).double() if sae.bias.dtype != torch.float64 else sae
    atoms = [sae.atoms(i, range(2**level.n)) for i, level in enumerate(sae.levels)]
    codes = plain_encode(sae, x.double(), atoms)
    return plain_decode(codes, atoms), codes


def random_sae(n_embd, levels, *switches):
    sae = CayleySAE(n_embd, levels, *switches)
    with torch.no_grad():
        sae.bias.normal_(std=0.3)
        sae.mean.normal_(std=0.3)
        sae.var.uniform_(0.3, 2)
    return sae


LEVELS = [
    (64, "6,4,0"),
    (32, "5,4,0;9,5,32"),
    (64, "6,4,0;9,5,16;12,7,32"),
    (128, "7,8,0;10,5,8;17,6,128"),
    (16, "4,16,0;6,4,4;7,2,2;9,2,4"),
    (32, "5,2,0;10,3,32;15,3,32"),
]
LARGE = [
    (1024, "10,16,0;15,32,256"),
    (512, "9,16,0;13,16,64;16,16,128"),
]


@pytest.mark.parametrize("n_embd, levels", LEVELS)
@pytest.mark.parametrize("switches", list(itertools.product([True, False], repeat=3)))
def test_layer_equals_dense_reference(n_embd, levels, switches):
    torch.manual_seed(0)
    sae = random_sae(n_embd, levels, *switches).double()
    x = torch.randn(3, 7, n_embd, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    codes = sae.encode(x)
    output = sae.decode(codes)
    grads = torch.autograd.grad((output * weight).sum(), [x, sae.bias])
    x_ref = x.detach().flatten(0, 1).requires_grad_()
    output_ref, codes_ref = reference(sae, x_ref)
    grads_ref = torch.autograd.grad((output_ref * weight.flatten(0, 1)).sum(), [x_ref, sae.bias])
    for code, (ids_ref, values_ref) in zip(codes, codes_ref):
        torch.testing.assert_close(code.ids.flatten(0, 1), ids_ref)
        torch.testing.assert_close(code.values.flatten(0, 1), values_ref)
    torch.testing.assert_close(output.flatten(0, 1), output_ref)
    torch.testing.assert_close(grads[0].flatten(0, 1), grads_ref[0])
    torch.testing.assert_close(grads[1], grads_ref[1])
    torch.testing.assert_close(sae(x), output)


@pytest.mark.parametrize("n_embd, levels", LARGE)
def test_full_size_layer_in_float32(n_embd, levels):
    torch.manual_seed(0)
    sae = random_sae(n_embd, levels)
    x = torch.randn(40, n_embd)
    output, codes = reference(sae, x)
    same = torch.ones(40, dtype=torch.bool)  # tokens without a near tie that rounding decides
    for (ids, _), (ids_ref, _) in zip(sae.encode(x), codes):
        same &= (ids.sort(1).values == ids_ref.sort(1).values).all(1)
    assert same.sum() >= 36
    torch.testing.assert_close(sae(x)[same].double(), output[same], atol=2e-5, rtol=1e-5)


def test_bf16_autocast_is_close_to_float64():
    torch.manual_seed(0)
    sae = random_sae(256, "8,16,0;12,16,64")
    x = torch.randn(2, 64, 256, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = sae(x)
    output.float().square().sum().backward()
    reference_output, _ = reference(sae, x.detach().flatten(0, 1))
    error = (output.flatten(0, 1).double() - reference_output).norm() / reference_output.norm()
    # some tokens' near ties are decided otherwise; without them it is about 0.005
    assert error < 0.1
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_large_dictionaries_and_small_chunks_give_the_same(monkeypatch):
    torch.manual_seed(0)
    sae = random_sae(32, "5,4,0;9,5,16;13,6,16")
    x = torch.randn(50, 32, requires_grad=True)
    weight = torch.randn(50, 32)
    expected = sae.eval()(x)
    grad, = torch.autograd.grad((expected * weight).sum(), x)
    monkeypatch.setattr(cayley, "TABLE_BYTES", 0)  # no table of atoms: rows are made when needed
    monkeypatch.setattr(cayley, "CHUNK_BYTES", {"cpu": 1})  # one token at a time
    cayley._sign_table.cache_clear()
    try:
        output = sae(x)
        small_grad, = torch.autograd.grad((output * weight).sum(), x)
    finally:
        cayley._sign_table.cache_clear()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(small_grad, grad)


def test_gating():
    """Every active feature lies in an active parent's block, and no feature is active twice."""
    torch.manual_seed(0)
    sae = random_sae(64, "6,6,0;9,8,16;12,10,32")
    codes = sae.encode(torch.randn(200, 64))
    for parent, child, levels in zip(codes, codes[1:], itertools.pairwise(sae.levels)):
        parent_level, level = levels
        shared = level.n - int(math.log2(level.delta))
        child_blocks = child.ids >> (level.n - shared)
        parent_blocks = parent.ids >> (parent_level.n - shared)
        assert (child_blocks[:, :, None] == parent_blocks[:, None]).any(2).all()
    for code in codes:
        ordered = code.ids.sort(1).values
        assert (ordered[:, 1:] > ordered[:, :-1]).all()


def test_interventions_change_exactly_their_atoms():
    torch.manual_seed(0)
    sae = random_sae(64, "6,4,0;9,5,16").double()
    x = torch.randn(2, 3, 64, dtype=torch.float64)
    codes = sae.encode(x)
    output = sae.decode(codes)
    edited = [Codes(c.ids.clone(), c.values.clone()) for c in codes]
    edited[1].values[..., 2] += 8.0
    atoms = sae.atoms(1, codes[1].ids[..., 2].flatten()).view(2, 3, 64)
    torch.testing.assert_close(sae.decode(edited) - output, 8.0 * atoms)
    ids = torch.full((2, 3, 1), 77)  # feature 77 of level 1, code -3
    values = torch.full((2, 3, 1), -3.0, dtype=torch.float64)
    with_77 = Codes(torch.cat([codes[1].ids, ids], -1), torch.cat([codes[1].values, values], -1))
    change = sae.decode([codes[0], with_77]) - output
    torch.testing.assert_close(change, -3.0 * sae.atoms(1, [77]).expand_as(output))


# -----------------------------------------------------------------------------
# statistics

def test_statistics_are_the_moments_of_raw():
    torch.manual_seed(0)
    sae = CayleySAE(32, "5,4,0;9,5,16").double()
    mixing = torch.randn(100, 32, dtype=torch.float64), torch.randn(32, 32, dtype=torch.float64)
    x = mixing[0] @ mixing[1] / 5 + 0.5
    counts = torch.zeros_like(sae.active_counts)
    for _ in range(2):
        before = sae.mean.clone(), sae.var.clone()
        codes = sae.encode(x)
        assert torch.equal(sae.mean, before[0])  # no token sees the same step's statistics
        sae.update_stats()
        raw = []
        for i, level in enumerate(sae.levels):
            raw.append(x @ sae.atoms(i, range(2**level.n)).T)
        raw = torch.cat(raw, 1)
        torch.testing.assert_close(sae.mean, before[0].lerp(raw.mean(0), 0.05))
        torch.testing.assert_close(sae.var, before[1].lerp(raw.var(0, correction=0), 0.05))
        for code, where in zip(codes, sae.level_slices):
            counts[where] += code.ids.flatten().bincount(minlength=where.stop - where.start)
    assert torch.equal(sae.active_counts, counts)


def test_statistics_do_not_depend_on_the_split():
    torch.manual_seed(0)
    x = torch.randn(12, 20, 32)
    results = []
    for parts in (1, 2, 3, 12):
        sae = CayleySAE(32, "5,4,0;9,5,16")
        for part in x.chunk(parts):
            sae(part)
        sae.update_stats()
        results.append((sae.mean, sae.var, sae.active_counts))
    for mean, var, counts in results[1:]:
        torch.testing.assert_close(mean, results[0][0])
        torch.testing.assert_close(var, results[0][1])
        assert torch.equal(counts, results[0][2])


def test_nothing_seen_changes_nothing():
    sae = random_sae(32, "5,4,0;9,5,16")
    state = {key: value.clone() for key, value in sae.state_dict().items()}
    sae.eval()(torch.randn(50, 32))  # evaluation accumulates nothing
    sae.train()(torch.randn(0, 32))  # nor does an empty batch
    sae.update_stats()
    assert all(torch.equal(value, state[key]) for key, value in sae.state_dict().items())


def test_constant_input_never_divides_by_zero():
    sae = CayleySAE(32, "5,4,0;9,5,16")
    for _ in range(300):  # the variances decay to zero
        sae(torch.ones(4, 32))
        sae.update_stats()
    assert sae(torch.ones(4, 32)).isfinite().all() and sae(torch.randn(4, 32)).isfinite().all()


def test_compiles_without_graph_breaks():
    torch.manual_seed(0)
    sae = CayleySAE(32, "5,4,0;9,5,16")
    x = torch.randn(2, 8, 32)
    expected = sae(x)
    torch.testing.assert_close(torch.compile(sae, fullgraph=True, backend="aot_eager")(x), expected)


# -----------------------------------------------------------------------------
# errors

def edited(*edit):
    sae = CayleySAE(32, "5,4,0;9,5,16")
    return sae.edit(sae.encode(torch.randn(2, 32)), [edit])


@pytest.mark.parametrize("call, words", [
    (lambda: edited(0, 32, 1, 8), ["level 0, feature 32", "5, 9"]),
    (lambda: edited(2, 0, 1, 8), ["level 2, feature 0", "0 to 1"]),
    (lambda: parse_levels([(6, 8.5, 0)]), ["(6, 8.5, 0)", "integers"]),
    (lambda: parse_levels("10,16"), ["'10,16'", "n,k,delta"]),
    (lambda: parse_levels("10,16,0;15,x,256"), ["'15,x,256'"]),
    (lambda: label_bits(3, 3), ["t=3", "4 to 12"]),
    (lambda: label_bits(10, 26), ["n=26", "25"]),
    (lambda: CayleySAE(1000, "10,16,0"), ["n_embd=1000", "power of two"]),
    (lambda: CayleySAE(1024, "11,16,0"), ["'11,16,0'", "10"]),
    (lambda: CayleySAE(1024, "99999999999999,16,0"), ["'99999999999999,16,0'", "10"]),
    (lambda: CayleySAE(1024, "10,16,4"), ["'10,16,4'", "delta = 0"]),
    (lambda: CayleySAE(1024, "10,16,0;10,16,16"), ["above", "10"]),
    (lambda: CayleySAE(1024, "10,16,0;26,16,65536"), ["25 bits"]),
    (lambda: CayleySAE(1024, "10,16,0;15,16,100"), ["'15,16,100'", "power of two"]),
    (lambda: CayleySAE(1024, "10,16,0;15,16,16"), ["32 to 2^n = 32768"]),
    (lambda: CayleySAE(1024, "10,16,0;15,16,65536"), ["32768"]),
    (lambda: CayleySAE(1024, "10,16,0;15,300,256"), ["1 to the 256"]),
    (lambda: CayleySAE(1024, "10,2000,0"), ["1 to the 1024"]),
    (lambda: CayleySAE(1024, "10,0,0"), ["1 to the 1024"]),
])
def test_errors_name_the_value_and_the_fix(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
