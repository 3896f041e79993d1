"""
One command for a GPU, in minutes: are the layer's operators right on it, and which launch is best?

    python records/kernels/sweep.py --out_file=sweep.json
    python records/kernels/sweep.py --checkout=../before --times_only --out_file=before.json

It checks ids, codes, outputs and gradients against the plain definition in float64, that 20 repeats
are the same to the bit, and that torch.compile changes nothing; then it times every operator, and
block_products by each launch of product_variants (compiled.py), whose results must be the same to
the bit, and few tokens by the launches for few and for many, in CUDA graphs. Prints a line a result
and writes all as JSON. With --checkout=DIR it times the operators of another checkout, so that
before and after are of one card.
"""
import contextlib
import copy
import json
import os
import statistics
import sys
import time
from pathlib import Path

# a script here can't see the repository's top otherwise
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton

from configurator import configure
from data import write_text

# settings, see configurator.py
device = "cuda"  # "cpu" is for a look at the script itself, by PyTorch's operators
checkout = ""  # a directory whose cayley.py and cayley_triton.py are timed; "": this one's
times_only = False  # no checks
n_tokens = 32768  # of the repeats and times
seconds = 420  # after which nothing new is begun
out_file = ""  # JSON

RECIPES = {"2L": "10,16,0;15,32,256", "3L": "10,16,0;15,32,256;17,64,256"}
SHAPES = [  # n_embd, levels, tokens, dtype
    (1024, RECIPES["2L"], 2048, "float32"),
    (1024, RECIPES["2L"], 2048, "bfloat16"),
    (1024, RECIPES["3L"], 512, "bfloat16"),
    (2048, "11,16,0;15,32,256;17,64,256", 256, "bfloat16"),
    (1024, "10,48,0", 2048, "bfloat16"),
    (512, "9,8,0;11,12,16;14,16,128;17,20,64", 777, "bfloat16"),
    (512, "9,12,0;13,24,128", 1001, "float32"),
    (128, "7,8,0;11,16,64", 333, "float16"),
    (64, "6,1,0;9,1,8", 5, "float32"),
    (4096, "12,16,0;16,32,256", 64, "bfloat16"),
    (32, "5,8,0;8,6,256", 2, "float32"),
    (1024, RECIPES["3L"], 16, "float32"),  # up to 16 tokens have launches of their own
]


def random_sae(cayley, levels):
    torch.manual_seed(0)
    sae = cayley.CayleySAE(2 ** int(levels.split(",")[0]), levels).to(device).eval()
    with torch.no_grad():
        sae.bias.normal_(std=0.3)
        sae.mean.normal_(std=0.3)
        sae.var.uniform_(0.3, 2)
    return sae


def normalised(n, d, dtype):
    x = torch.randn(n, d, device=device)
    return torch.nn.functional.rms_norm(x, (d,)).to(dtype)


def through(sae, x, weight, dtype):
    """A layer's codes and output, and the gradients of x and bias."""
    x = x.clone().requires_grad_()
    with torch.autocast(torch.device(device).type, dtype, enabled=dtype == torch.bfloat16):
        codes = sae.encode(x)
        output = sae.decode(codes)
    gradients = torch.autograd.grad((output.float() * weight).sum(), [x, sae.bias])
    return codes, output, *gradients


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def check_shape(cayley, d, levels, n, dtype):
    """What differs from the plain definition in float64, over tokens with the same active ids."""
    sae = random_sae(cayley, levels)
    x = normalised(n, d, dtype)
    weight = torch.randn(n, d, device=device)
    codes, output, grad_x, grad_bias = through(sae, x, weight, dtype)
    wide = copy.deepcopy(sae).double()
    atoms = [wide.atoms(i, range(2**level.n)) for i, level in enumerate(wide.levels)]
    exact_x = x.double().requires_grad_()
    exact = cayley.plain_encode(wide, exact_x, atoms)
    exact_output = cayley.plain_decode(exact, atoms)
    exact_gradients = torch.autograd.grad(
        (exact_output * weight.double()).sum(), [exact_x, wide.bias]
    )
    same = torch.ones(n, dtype=torch.bool, device=device)
    off = 0.0
    for code, other in zip(codes, exact):
        same &= (code.ids.sort(1).values == other.ids.sort(1).values).all(1)
        gap = code.values.double().sort(1).values - other.values.sort(1).values
        off = max(off, gap[same].abs().max().item())
    return {
        "same ids %": 100 * same.double().mean().item(),
        "codes off by": off,
        "output, relative": relative(output[same], exact_output[same]),
        "gradient of x": relative(grad_x[same], exact_gradients[0][same]),
        "gradient of bias": relative(grad_bias, exact_gradients[1]),
    }


def check_repeats(cayley, levels):
    """How many of 19 repeats differ in any bit of a forward and backward."""
    sae = random_sae(cayley, levels)
    x = normalised(n_tokens, sae.n_embd, torch.bfloat16)
    weight = torch.randn(n_tokens, sae.n_embd, device=device)
    results = []
    for _ in range(20):
        codes, *others = through(sae, x, weight, torch.bfloat16)
        results.append([*(code.ids for code in codes), *(code.values for code in codes), *others])
    first = results[0]
    different = 0
    for result in results[1:]:
        different += not all(torch.equal(a, b) for a, b in zip(first, result))
    return {"repeats that differ, of 19": different}


def check_compiled(cayley):
    """A training forward and backward by torch.compile, without a graph break, against eager."""
    sae = random_sae(cayley, RECIPES["2L"]).train()
    other = copy.deepcopy(sae)
    x = normalised(1024, sae.n_embd, torch.float32).view(2, 512, -1)
    compiled = torch.compile(sae, fullgraph=True)
    results = []
    for layer, function in ((sae, compiled), (other, other)):
        y = x.clone().requires_grad_()
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            output = function(y)
        output.float().square().sum().backward()
        results.append((output, y.grad, layer.bias.grad, layer.pending_counts))
    names = ("output", "gradient of x", "gradient of bias", "counts")
    return {name: relative(a, b) for name, a, b in zip(names, *results)}


def milliseconds(function, calls=10, repeats=7):
    """Median time of a call, of a queue of some."""
    function()
    times = []
    for _ in range(repeats):
        if device == "cpu":
            start = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - start))
            continue
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize()
        events[0].record()
        for _ in range(calls):
            function()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]) / calls)
    return statistics.median(times)


def selection(cayley, sae, x):
    """The function that runs select on x, in a checkout of any time."""
    if hasattr(sae, "terms"):
        terms = sae.terms()
        return lambda: cayley.select(x, terms, sae.bias.detach(), sae.plan)
    scale, shift = sae.standardization()
    offset = sae.bias.detach() + shift
    return lambda: cayley.select(x, scale, offset, sae.plan)


def operator_calls(cayley, levels, n):
    """{operator: function} on n tokens in bf16, and a layer's forward and backward."""
    sae = random_sae(cayley, levels)
    x = normalised(n, sae.n_embd, torch.bfloat16)
    select = selection(cayley, sae, x)
    with torch.no_grad():
        codes = sae.encode(x)
    leaves = torch.cat([c.ids << (sae.n - level.n) for c, level in zip(codes, sae.levels)], 1)
    weights = torch.randn(leaves.shape, device=device).bfloat16()
    weight = torch.randn(n, sae.n_embd, device=device)
    calls = {
        "select": select,
        "combine": lambda: cayley.combine(leaves, weights, sae.t, sae.n),
        "project": lambda: cayley.project(x, leaves, sae.t, sae.n),
        "forward and backward": lambda: through(sae, x, weight, torch.bfloat16),
    }
    if hasattr(cayley, "sum_by_index"):
        values = torch.randn(leaves.numel(), device=device)
        index = torch.cat([c.ids + where.start for c, where in zip(codes, sae.level_slices)], 1)
        index = index.flatten()
        calls["gradient of bias"] = lambda: cayley.sum_by_index(values, index, len(sae.bias))
        zeros = torch.zeros_like(sae.bias)
        calls["the same by fp32 atomics"] = lambda: zeros.index_add_(0, index, values)
    return calls


@contextlib.contextmanager
def products_by(cayley_triton, tokens, warps, registers):
    """Within it block_products runs by another launch."""
    chosen = cayley_triton._block_launch

    def changed(*arguments):
        launch = chosen(*arguments)
        constants = {**launch.constants, "tokens": tokens}
        return launch._replace(
            constants=constants, tokens=tokens, warps=warps, maxnreg=registers
        )

    cayley_triton._block_launch = changed
    cayley_triton.level_launches.cache_clear()
    try:
        yield
    finally:
        cayley_triton._block_launch = chosen
        cayley_triton.level_launches.cache_clear()


def time_variants(cayley, cayley_triton, levels, report):
    """select by each launch of product_variants, on the recipe's own and with equal results."""
    from compiled import product_variants
    select = operator_calls(cayley, levels, n_tokens)["select"]
    expected = select()
    for variant in product_variants():
        with products_by(cayley_triton, *variant):
            title = "select, products by {} tokens, {} warps, {} registers".format(*variant)
            try:
                ids, values = select()
            except Exception as error:  # a launch that this GPU has no room for
                report(title, {"error": str(error).splitlines()[0]})
                continue
            same = torch.equal(ids, expected[0]) and torch.equal(values, expected[1])
            report(title, {"ms": milliseconds(select), "same bits": same})


def replay(function):
    """The function as a CUDA graph: without Python's part of its launches."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph.replay


def time_few(cayley, cayley_triton, levels, report):
    """select and combine of few tokens, by the launches for few and by those for many."""
    chosen = cayley_triton.FEW
    for n in (1, 4, 16, 64):
        for title, few in (("few", n), ("many", 0)):
            cayley_triton.FEW = few
            calls = operator_calls(cayley, levels, n)
            values = {}
            for name in ("select", "combine"):
                values[f"{name} ms"] = milliseconds(replay(calls[name]))
            report(f"{n} tokens by the launches for {title}", values)
    cayley_triton.FEW = chosen


def main():
    configure(globals())
    if checkout:
        sys.path.insert(0, checkout)
    import cayley
    cayley_triton = None
    if device != "cpu":
        import cayley_triton
        if hasattr(cayley, "use_kernels"):  # a checkout in which importing is not enough
            cayley.use_kernels("triton")
    torch.set_float32_matmul_precision("highest")
    results = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
    }
    start = time.perf_counter()

    def report(title, values):
        results[title] = values
        shown = ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in values.items()
        )
        print(f"[{time.perf_counter() - start:5.0f}s] {title}: {shown}", flush=True)
        if out_file:
            write_text(out_file, json.dumps(results, indent=1))

    def late():
        return time.perf_counter() - start > seconds

    if not times_only:
        for d, levels, n, dtype in SHAPES:
            if not late():
                result = check_shape(cayley, d, levels, n, getattr(torch, dtype))
                report(f"d={d}, {levels}, {n} tokens, {dtype}", result)
        for name, levels in RECIPES.items():
            report(f"{name}, {n_tokens} tokens", check_repeats(cayley, levels))
        report("2L compiled, beside eager", check_compiled(cayley))
    for name, levels in RECIPES.items():
        for title, function in operator_calls(cayley, levels, n_tokens).items():
            report(f"{name}, {title}, {n_tokens} tokens", {"ms": milliseconds(function)})
        for title, function in operator_calls(cayley, levels, 1).items():
            report(f"{name}, {title}, 1 token", {"ms": milliseconds(function)})
    if cayley_triton and hasattr(cayley_triton, "register") and not late():
        time_variants(cayley, cayley_triton, RECIPES["2L"], report)
    if hasattr(cayley_triton, "FEW") and not late():
        time_few(cayley, cayley_triton, RECIPES["2L"], report)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main()
