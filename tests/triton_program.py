"""
The kernels of cayley_triton.py in Triton's interpreter, on the CPU.

test_triton.py runs this file in a process of its own, since TRITON_INTERPRET must be set before
Triton is imported.

Prints a line for each shape; raises AssertionError for a difference.
"""
import copy
import functools
import math
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import cayley
import cayley_triton
from cayley import CayleySAE, plain_decode, plain_encode

SHAPES = [  # n_embd, levels, tokens
    (32, "5,4,0;9,5,32", 3),
    (32, "5,2,0;10,3,32;15,3,32", 1),  # a block's bits reach beyond the coordinate's
    (32, "5,8,0;8,6,256", 2),  # delta maximal: one block
    (64, "6,1,0;9,1,8", 3),  # delta minimal, k = 1
    (64, "6,4,0;9,5,16;12,7,32", 5),
    (128, "7,8,0;10,5,8;17,6,128", 3),
    (256, "8,3,0;12,9,64", 2),
    (512, "9,5,0;13,7,64", 1),
    (1024, "10,48,0", 2),  # one level
    (1024, "10,16,0;15,32,256", 1),  # the published recipe's
    (2048, "11,4,0;15,6,256", 1),
]


def random_sae(n_embd, levels):
    torch.manual_seed(0)
    sae = CayleySAE(n_embd, levels).eval()
    with torch.no_grad():
        sae.bias.normal_(std=0.3)
        sae.mean.normal_(std=0.3)
        sae.var.uniform_(0.3, 2)
    return sae


def through(sae, x, weight):
    """The layer's codes and output, and the gradients of x and bias."""
    x = x.clone().requires_grad_()
    codes = sae.encode(x)
    output = sae.decode(codes)
    gradients = torch.autograd.grad((output * weight).sum(), [x, sae.bias])
    return codes, output, gradients


def check_layer(n_embd, levels, n_tokens):
    """The whole layer, forward and backward, in fp32: its definition in float64 and the CPU's."""
    sae = random_sae(n_embd, levels)
    x = torch.randn(n_tokens, n_embd)
    weight = torch.randn(n_tokens, n_embd)
    assert cayley_triton.supports(sae.t, tuple(sae.plan))
    ours = through(sae, x, weight)
    with cayley_triton.enabled(False):
        theirs = through(sae, x, weight)
    wide = copy.deepcopy(sae).double()
    atoms = [wide.atoms(i, range(2**level.n)) for i, level in enumerate(wide.levels)]
    definition = plain_encode(wide, x.double(), atoms)
    for code, other, exact in zip(ours[0], theirs[0], definition):
        assert torch.equal(code.ids, other.ids)
        assert torch.equal(code.ids, exact.ids)
        torch.testing.assert_close(code.values.double(), exact.values, atol=1e-5, rtol=1e-5)
    exact_output = plain_decode(definition, atoms)
    torch.testing.assert_close(ours[1].double(), exact_output, atol=2e-5, rtol=1e-5)
    for gradient, other in zip(ours[2], theirs[2]):
        torch.testing.assert_close(gradient, other, atol=1e-4, rtol=1e-4)


def check_half(n_embd, levels, n_tokens, dtype):
    """Inputs of 16 bits: sums are in fp32, so the results are those of the same numbers in fp32."""
    sae = random_sae(n_embd, levels)
    arguments = sae.terms(), sae.bias.detach(), sae.plan
    x = torch.randn(n_tokens, n_embd).to(dtype)
    leaves, codes = cayley_triton.select(x, *arguments)
    exact_leaves, exact_codes = cayley.torch_select(x.float(), *arguments)
    assert torch.equal(leaves, exact_leaves)
    torch.testing.assert_close(codes, exact_codes, atol=1e-5, rtol=1e-5)
    weights = torch.randn(leaves.shape).to(dtype)
    sums = cayley_triton.combine(leaves, weights, sae.t, sae.n)
    exact = cayley.torch_combine(leaves, weights.float(), sae.t, sae.n)
    assert sums.dtype == dtype
    torch.testing.assert_close(sums, exact.to(dtype), atol=1e-5, rtol=2**-7)
    products = cayley_triton.project(x, leaves, sae.t, sae.n)
    exact = cayley.torch_project(x.float(), leaves, sae.t, sae.n)
    torch.testing.assert_close(products, exact.to(dtype), atol=1e-4, rtol=2**-7)


def check_launches():
    """Another number of tokens a program: the same bits, here of sums that are exact."""
    sae = random_sae(64, "6,4,0;9,5,16;12,7,32")
    x = torch.randint(-8, 9, (7, 64)).float()
    arguments = x, sae.terms(), sae.bias.detach(), sae.plan
    leaves, codes = cayley_triton.select(*arguments)
    chosen = cayley_triton._block_launch

    def with_tokens(tokens, *arguments):
        launch = chosen(*arguments)
        constants = {**launch.constants, "tokens": tokens}
        return launch._replace(constants=constants, tokens=tokens)

    for tokens in (1, 2, 8):
        cayley_triton._block_launch = functools.partial(with_tokens, tokens)
        cayley_triton.level_launches.cache_clear()
        again_leaves, again = cayley_triton.select(*arguments)
        assert torch.equal(leaves, again_leaves) and torch.equal(codes, again)
    cayley_triton._block_launch = chosen
    cayley_triton.level_launches.cache_clear()


def check_many_equal():
    """A search with many equal scores at its bound takes the first of them."""
    sae = CayleySAE(256, "8,5,0").eval()
    bias = torch.zeros(256)
    bias[7::3] = 2.0
    bias[200] = 3.0
    sae.bias.data = bias
    ids, codes = cayley_triton.select(torch.zeros(2, 256), sae.terms(), bias, sae.plan)
    assert torch.equal(codes, bias[ids])
    assert ids.tolist() == [[200, 7, 10, 13, 16]] * 2


def check_not_finite():
    """Whatever an input holds, ids are features: nothing reads beyond a table."""
    sae = random_sae(64, "6,4,0;9,5,16;12,7,32")
    arguments = sae.terms(), sae.bias.detach(), sae.plan
    x = torch.randn(4, 64)
    x[0] = math.nan
    x[1, 3] = math.inf
    x[2] = -math.inf
    for bad in (x, x.bfloat16()):
        leaves, _ = cayley_triton.select(bad, *arguments)
        for level, of_level in zip(sae.levels, cayley._per_level(leaves, sae.plan)):
            assert 0 <= of_level.min() and of_level.max() < 2**level.n
        exact, _ = cayley.torch_select(x[3:], *arguments)
        assert bad is not x or torch.equal(leaves[3:], exact)


def check_ties():
    """Equal scores everywhere: of the open features the k of smallest id, in order, on any run."""
    sae = CayleySAE(64, "6,8,0;10,8,64").eval()
    x = torch.zeros(3, 64)
    x[1] = 1  # constant: only feature 0 scores
    arguments = sae.terms(), sae.bias.detach(), sae.plan
    leaves, codes = cayley_triton.select(x, *arguments)
    ids = torch.cat(cayley._per_level(leaves, sae.plan), 1)
    assert ids[0].tolist() == [*range(8), *range(8)] and not codes[0].any()
    assert ids[1, 0] == ids[1, 8] == 0 and codes[1, 0] == 8
    again, _ = cayley_triton.select(x, *arguments)
    assert torch.equal(leaves, again)
    empty_ids, empty = cayley_triton.select(x[:0], *arguments)
    assert empty_ids.shape == empty.shape == (0, 16)


def check_fallback():
    """Shapes that the kernels don't cover take PyTorch's, and so do all while they are off."""
    sae = random_sae(16, "4,3,0;6,4,8")
    assert not cayley_triton.supports(sae.t, tuple(sae.plan))
    x = torch.randn(3, 16)
    output = sae(x)
    covered = random_sae(32, "5,2,0;7,2,4")
    with cayley_triton.enabled(False):
        assert torch.equal(sae(x), output)
        launched = cayley_triton.combine_atoms
        cayley_triton.combine_atoms = None  # a launch would fail
        covered(torch.randn(1, 32))
        cayley_triton.combine_atoms = launched


def check_comparison():
    """What a run does at its start: equal kernels agree, spoilt ones are found."""
    sae = random_sae(32, "5,2,0;7,2,4")
    x = torch.randn(1, 2, 32)
    assert cayley_triton.find_fault(sae, x) == ""
    right = {name: getattr(cayley_triton, name) for name in ("select", "combine", "project")}

    def shifted(*arguments):
        leaves, codes = right["select"](*arguments)
        return leaves ^ 1, codes

    def scaled(*arguments):
        leaves, codes = right["select"](*arguments)
        return leaves, codes * 1.05

    spoilt = [
        ("select", shifted, "other active features"),
        ("select", scaled, "select differs"),
        ("combine", lambda *arguments: right["combine"](*arguments) * 1.05, "combine differs"),
        ("project", lambda *arguments: right["project"](*arguments) * math.nan, "project differs"),
    ]
    for name, wrong, words in spoilt:
        setattr(cayley_triton, name, wrong)
        assert words in cayley_triton.find_fault(sae, x)
        setattr(cayley_triton, name, right[name])


def check_all(few, shapes, half):
    """Every check by the launches for at most `few` tokens, or for more."""
    cayley_triton.FEW = few
    for shape in shapes:
        check_layer(*shape)
        print("layer", *shape, "few" if few else "many", flush=True)
    for dtype in (torch.bfloat16, torch.float16):
        for shape in half:
            check_half(*shape, dtype)
            print("half", *shape, dtype, flush=True)
    check_ties()
    print("ties", flush=True)


def main():
    cayley_triton.register("cpu")
    # the interpreter is slow where programs are many
    check_all(cayley_triton.FEW, SHAPES[1:4], [SHAPES[3]])
    check_all(0, SHAPES, [SHAPES[4], SHAPES[6]])
    check_many_equal()
    check_not_finite()
    print("not finite", flush=True)
    check_comparison()
    print("comparison", flush=True)
    check_launches()
    print("launches", flush=True)
    check_fallback()
    print("fallback", flush=True)
    sae = random_sae(32, "5,2,0;7,2,4")
    x = torch.randn(1, 2, 32)
    with cayley_triton.enabled(False):
        expected = sae(x)
    compiled = torch.compile(sae, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    print("compiled", flush=True)


if __name__ == "__main__":
    main()
