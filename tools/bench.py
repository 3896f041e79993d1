"""
Measures what the sparse bottleneck costs, beside what one would use instead. Medians of interleaved
repeats.

    python -m tools.bench                                  # layer, step and sampling, on a CPU
    python -m tools.bench --section=layer --json_file=layer.json
    python -m tools.bench --section=step --dtype=bf16 --torch_compile
    python -m tools.bench --device=cuda > bench_cuda.txt   # the gpu section; send that and its JSON

Sections: layer, step, sampling; gpu, which has all that matters there. Ratios are to the row they
name. records/bench has what was measured of arithmetic, growth, Muon and the data's loader.
"""
if not __package__:
    raise SystemExit("from the repository's root: python -m tools.bench")

import gc
import math
import platform
import statistics
import time
from typing import NamedTuple

import torch
from torch.nn import functional as F

import cayley
from cayley import CayleySAE
from checkpoint import pick_device
from configurator import configure
from data import progress, write_json
from model import GPT, Block, GPTConfig, peak_flops
from muon import MuonAdamW
from tools import account
from tools.report import aligned
from tools.topk_sae import TopKSAE

try:
    import cayley_triton  # which makes its kernels those of CUDA
except ImportError:
    cayley_triton = None

# settings, see configurator.py
section = "all"  # or one of the sections above; all is gpu alone on CUDA
device = "cpu"
dtype = "fp32"  # or "bf16": autocast; the gpu section is in bf16
torch_compile = False  # compiled steps as well, in the step section
repeats = 5
n_layer = 2  # of the models of step and sampling
json_file = ""  # for all numbers; bench_cuda.json on CUDA
tiny = False  # the gpu section at sizes for a test

LEVELS = {
    "d=1024 2L": (1024, "10,16,0;15,32,256"),
    "d=1024 3L": (1024, "10,16,0;15,32,256;17,64,256"),
    "d=2048 2L": (2048, "11,16,0;15,32,256"),
}
MODELS = {
    "dense": "",
    "cayley 2L": LEVELS["d=1024 2L"][1],
    "cayley 3L": LEVELS["d=1024 3L"][1],
}


class Sizes(NamedTuple):
    shape: dict  # of GPTConfig, without levels
    models: dict  # {name: cayley_levels}
    batch_size: int
    contexts: tuple  # tokens that sampling continues
    n_samples: int  # by so many
    copied_bytes: int  # to measure the memory's bandwidth
    backend: str  # of torch.compile

    def config(self, levels):
        return GPTConfig(**self.shape, cayley_levels=levels)


REFERENCE = Sizes(
    shape={"n_layer": 12, "n_head": 8, "n_embd": 1024, "block_size": 1024, "vocab_size": 50304},
    models=MODELS,
    batch_size=32,
    contexts=(64, 512),
    n_samples=256,  # of a sample's length, so that capturing a CUDA graph has its share
    copied_bytes=2**30,
    backend="inductor",
)
TINY = Sizes(
    shape={"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": 256},
    models={"dense": "", "cayley 2L": "5,4,0;8,6,16", "cayley 3L": "5,4,0;8,6,16;10,8,16"},
    batch_size=2,
    contexts=(8,),
    n_samples=2,
    copied_bytes=2**20,
    backend="aot_eager",  # code generation for a CPU takes a minute
)


def cpu_sizes():
    """The reference's width in n_layer layers, one sequence a step."""
    shape = {**REFERENCE.shape, "n_layer": n_layer}
    return REFERENCE._replace(shape=shape, batch_size=1, n_samples=32)


# -----------------------------------------------------------------------------
# measuring


def synchronize():
    """Wait for the device, so that a clock read afterwards has its work."""
    if device != "cpu":
        torch.cuda.synchronize()


def seconds(function):
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def interleaved(functions, repeats):
    """{name: median seconds}: every function in turn, repeats times, after a warm-up of each."""
    times = {name: [] for name in functions}
    turns = list(functions) * (repeats + 1)
    for name in progress(turns, desc="measuring"):
        times[name].append(seconds(functions[name]))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def autocast():
    enabled = dtype == "bf16"
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


def show(title, rows):
    """Print rows, {name: {column: number}}, as a table, and return them."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = []
    for name, row in rows.items():
        table.append([name, *(f"{row[c]:,.4g}" if c in row else "" for c in columns)])
    print("", title, *aligned(["", *columns], table), sep="\n", flush=True)
    return rows


def kernel_names():
    """Kernels that the layer's operators can run here, the faster ones last."""
    return ["torch", "triton"] if cayley_triton and device != "cpu" else ["torch"]


def use_kernels(name):
    """Have the operators run these kernels from now on."""
    if cayley_triton and device != "cpu":
        cayley_triton.enabled(name == "triton")


# -----------------------------------------------------------------------------
# layer: beside what one would use instead


class DenseDictionarySAE(CayleySAE):
    """The same layer by its plain definition: products with the whole dictionary."""

    def __init__(self, *args):
        super().__init__(*args)
        for i, level in enumerate(self.levels):
            atoms = self.atoms(i, range(2**level.n))
            self.register_buffer(f"atoms_{i}", atoms, persistent=False)

    def forward(self, x):
        atoms = [getattr(self, f"atoms_{i}") for i in range(len(self.levels))]
        codes = cayley.plain_encode(self, x.flatten(0, -2), atoms)
        return cayley.plain_decode(codes, atoms).view(x.shape)


def layer_functions(layer, x):
    """Functions of a layer on x: its forward, and its forward and backward."""
    layer.to(device)

    def forward():
        with autocast():
            return layer(x)

    def both():
        layer.zero_grad()
        x.grad = None
        forward().float().sum().backward()

    return forward, both


def compare_layers(name, n_tokens, repeats):
    n_embd, levels = LEVELS[name]
    x = torch.randn(1, n_tokens, n_embd, device=device, requires_grad=True)
    sae = CayleySAE(n_embd, levels)
    block = Block(GPTConfig(n_embd=n_embd, n_head=n_embd // 128, cayley_levels=""))
    layers = {
        "CayleySAE": sae,
        "dense dictionary": DenseDictionarySAE(n_embd, levels),
        "learned TopK SAE": TopKSAE(n_embd, len(sae.bias), sum(level.k for level in sae.levels)),
        "dense block": block,
        "MLP": block.mlp,
    }
    functions = {}
    for layer_name, layer in layers.items():
        forward, both = layer_functions(layer, x)
        functions[layer_name, "forward"] = forward
        functions[layer_name, "both"] = both
    times = interleaved(functions, repeats)
    rows = {}
    for layer_name in layers:
        rows[layer_name] = {
            "forward": times[layer_name, "forward"] / n_tokens * 1e6,
            "fwd+bwd": times[layer_name, "both"] / n_tokens * 1e6,
            "x CayleySAE": times[layer_name, "both"] / times["CayleySAE", "both"],
        }
    title = f"layer, {name} ({levels}), {n_tokens} tokens, {dtype}: microseconds per token"
    return show(title, rows)


def bench_layer():
    return {
        "d=1024 2L": compare_layers("d=1024 2L", 1024, repeats),
        # the alternatives take seconds here
        "d=1024 3L": compare_layers("d=1024 3L", 256, 1),
        "d=2048 2L": compare_layers("d=2048 2L", 256, 1),
    }


# -----------------------------------------------------------------------------
# step


def training_step(sizes, levels, backend=None):
    """
    Two functions of a fresh GPT: a micro-batch's forward and backward, and what ends a step.

    Gradients are never cleared: so it is after the first of several micro-batches. backend: of
    torch.compile; None: eager.
    """
    config = sizes.config(levels)
    torch.manual_seed(0)
    with torch.device(device):  # where its weights are drawn in no time
        model = GPT(config)
    optimizer = MuonAdamW(model, 1e-3, 1e-3)
    windows = (sizes.batch_size, config.block_size + 1)
    idx = torch.randint(config.vocab_size, windows, device=device)
    forward = torch.compile(model, backend=backend) if backend else model

    def forward_backward():
        with autocast():
            loss = forward(idx[:, :-1], idx[:, 1:])[1]  # as in training, no name keeps the logits
        loss.backward()

    def update():
        optimizer.step()
        for sae in model.saes():
            sae.update_stats()

    return forward_backward, update


def step_row(sizes, levels, compiled, times):
    """What is known of a training step: times {"both" and "update": seconds}."""
    config = sizes.config(levels)
    n_tokens = sizes.batch_size * config.block_size
    paper = account.memory_account(config, sizes.batch_size, bf16=dtype == "bf16",
                                   compiled=compiled, fused_norm=device != "cpu")
    row = {
        "fwd+bwd tok/s": n_tokens / times["both"],
        "update ms": 1e3 * times["update"],
        "step tok/s": n_tokens / (times["both"] + times["update"]),
        "account GB": paper["peak"] / 1e9,
    }
    if device != "cpu":
        row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        _, peak = peak_flops(torch.device(device))
        if peak:
            with torch.device("meta"):
                flops = row["fwd+bwd tok/s"] * GPT(config).flops_per_token()
            row["MFU %"] = 100 * flops / peak
    return row


def step_variants(sizes, way):
    """{title: (levels, kernels)}, what matters most first."""
    variants = {}
    for kernel in reversed(kernel_names()):
        for name, levels in sizes.models.items():
            if levels:
                variants[f"{name}, {kernel}, {way}"] = levels, kernel
            else:
                variants[f"{name}, {way}"] = levels, "torch"  # the dense twin has no choice
    return variants


def measure_steps(sizes, variants, compiled):
    """Rows of some step_variants, interleaved: all of their models are there at once."""
    functions = {}
    for title, (levels, kernel) in variants.items():
        use_kernels(kernel)
        both, update = training_step(sizes, levels, sizes.backend if compiled else None)
        both()
        update()
        functions[title, "both"], functions[title, "update"] = both, update
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    times = interleaved(functions, repeats)
    rows = {}
    for title, (levels, _) in variants.items():
        of_step = {kind: times[title, kind] for kind in ("both", "update")}
        rows[title] = step_row(sizes, levels, compiled, of_step)
    return rows


def bench_steps(sizes, compiled, deadline=math.inf):
    """
    Training steps of all models: on a CPU interleaved, on CUDA one after the other.

    What isn't begun before the deadline is left out, and named.
    """
    way = "compiled" if compiled else "eager"
    variants = step_variants(sizes, way)
    groups = [variants] if device == "cpu" else [{title: v} for title, v in variants.items()]
    rows = {}
    for group in groups:
        if time.perf_counter() > deadline:
            print(f"left out for want of time: {', '.join(group)}")
            continue
        cayley._sign_table.cache_clear()  # a peak has no other model's tables
        try:
            rows |= measure_steps(sizes, group, compiled)
        except torch.OutOfMemoryError:
            print(f"out of memory: {', '.join(group)}")
        gc.collect()
        torch.compiler.reset()
        if device != "cpu":
            torch.cuda.empty_cache()
    dense = rows.get(f"dense, {way}", {"fwd+bwd tok/s": math.nan})
    for row in rows.values():
        row["x dense"] = row["fwd+bwd tok/s"] / dense["fwd+bwd tok/s"]
    shape = f"{sizes.batch_size} x {sizes.shape['block_size']} tokens"
    return show(f"training step, {sizes.shape['n_layer']} layers, {shape}, {dtype}", rows)


def bench_step():
    results = {"eager": bench_steps(cpu_sizes(), compiled=False)}
    if torch_compile:
        results["compiled"] = bench_steps(cpu_sizes(), compiled=True)
    return results


# -----------------------------------------------------------------------------
# sampling


def bench_sampling(sizes=None):
    """Tokens a second of one sequence with the cache; reading the context is in the time."""
    sizes = sizes or cpu_sizes()
    use_kernels(kernel_names()[-1])
    functions = {}
    for name, levels in sizes.models.items():
        with torch.device(device):
            model = GPT(sizes.config(levels)).eval()
        for context in sizes.contexts:
            idx = torch.randint(sizes.shape["vocab_size"], (1, context), device=device)
            functions[name, context] = lambda m=model, i=idx: m.generate(i, sizes.n_samples)
    times = interleaved(functions, repeats)
    rows = {}
    for name in sizes.models:
        rows[name] = {}
        for context in sizes.contexts:
            rows[name][f"tok/s at {context}"] = sizes.n_samples / times[name, context]
            rows[name][f"x dense at {context}"] = times["dense", context] / times[name, context]
    layers = sizes.shape["n_layer"]
    return show(f"sampling {sizes.n_samples} tokens, one sequence, {layers} layers", rows)


# -----------------------------------------------------------------------------
# gpu: in bf16 autocast at the reference's sizes, in under 5 minutes. Needs a CUDA device but for
# its tiny sizes, which run on a CPU in the tests.

BANDWIDTHS = {  # of a memory, GB a second, by data sheet; a part of its device's name
    "A100-SXM4-40GB": 1555,
    "A100": 2000,
    "H100 PCIe": 2000,
    "H100": 3350,
    "H200": 4800,
    "B200": 8000,
    "RTX 4090": 1008,
}
TIME_LIMIT = 200  # seconds, after which no further training step is begun


def measure_bandwidth(n_bytes):
    """Bytes a second that a copy within the device's memory reads and writes."""
    source = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    elapsed = interleaved({"copy": lambda: target.copy_(source)}, repeats)["copy"]
    return 2 * n_bytes / elapsed


def tensor_bytes(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.no_grad()
def operator_functions(x, levels):
    """{operator: (function of x, the bytes of its arguments and results)}: x (N, d)."""
    sae = CayleySAE(x.shape[1], levels).to(device)
    terms = sae.terms()
    ids, codes = cayley.select(x, terms, sae.bias, sae.plan)
    weights = torch.ones_like(ids, dtype=x.dtype)
    return {
        "select": (
            lambda x: cayley.select(x, terms, sae.bias, sae.plan),
            tensor_bytes(x, terms, sae.bias, ids, codes),
        ),
        "combine": (
            lambda x: cayley.combine(ids, x[:, :1] * weights, sae.t, sae.n),
            tensor_bytes(ids, weights, x),
        ),
        "project": (
            lambda x: cayley.project(x, ids, sae.t, sae.n), tensor_bytes(ids, weights, x)
        ),
    }


NEAR = 1e-3  # scores, which are of order 1, closer than this may change places by rounding


def agreement(exact, other):
    """
    How kernels' results agree with PyTorch's in fp32, {operator: result} each.

    A token has equal ids also where those that differ nearly tie. A tie may open other blocks on
    the level below, so a few tokens in a thousand differ without a fault.
    """
    (ids, codes), (other_ids, other_codes) = exact["select"], other["select"]
    same = (ids == other_ids).all(1)  # (N,)
    ranked = codes.sort(1).values - other_codes.sort(1).values
    tied = ranked.abs().amax(1) < NEAR
    off = (codes - other_codes)[same]
    row = {"tokens with equal ids %": 100 * (same | tied).double().mean().item()}
    row["select off by"] = off.abs().max().item() if len(off) else float("nan")
    for key in ("combine", "project"):
        row[f"{key} off by"] = (exact[key].float() - other[key].float()).abs().max().item()
    return row


def bench_operators(sizes, bandwidth):
    """
    Milliseconds of each operator beside what the memory's bandwidth allows; are Triton's right?

    The bound: arguments are read and results written once. The atoms aren't in it.
    """
    n_tokens = sizes.batch_size * sizes.shape["block_size"]
    x = torch.randn(n_tokens, sizes.shape["n_embd"], device=device)
    x = F.rms_norm(x, (x.shape[1],)).bfloat16()  # as a CayleySAE sees it
    rows = {}
    agreements = {}
    for name, levels in sizes.models.items():
        if not levels:
            continue
        functions = operator_functions(x, levels)
        for kernel in kernel_names():
            use_kernels(kernel)
            calls = {key: lambda f=f: f(x) for key, (f, _) in functions.items()}
            times = interleaved(calls, repeats)
            for key, (_, n_bytes) in functions.items():
                bound = n_bytes / bandwidth
                rows[f"{name}, {key}, {kernel}"] = {
                    "ms": 1e3 * times[key],
                    "MB": n_bytes / 1e6,
                    "bound ms": 1e3 * bound,
                    "x bound": times[key] / bound,
                }
        if kernel == "triton":  # which is in use now
            found = {key: function(x) for key, (function, _) in functions.items()}
            use_kernels("torch")
            torch.set_float32_matmul_precision("highest")  # TF32 decides near ties its own way
            exact = {key: function(x.float()) for key, (function, _) in functions.items()}
            torch.set_float32_matmul_precision("high")
            agreements[name] = agreement(exact, found)
    show(f"operators, {n_tokens:,} tokens, bf16", rows)
    if agreements:
        show("triton's kernels beside torch's in fp32 on the same batch", agreements)
    return {"times": rows, "agreement": agreements}


def fitting_sizes():
    """The sizes to measure, with a micro-batch that all models have room for."""
    if tiny:
        return TINY
    memory = torch.cuda.get_device_properties(device).total_memory
    configs = [REFERENCE.config(levels) for levels in REFERENCE.models.values()]
    fits = min(account.largest_batch(config, memory) for config in configs)
    if fits < 1:
        raise ValueError(f"{memory / 1e9:.0f} GB are too little for a micro-batch of 1")
    return REFERENCE._replace(batch_size=min(REFERENCE.batch_size, fits))


def bench_gpu():
    start = time.perf_counter()
    torch.set_float32_matmul_precision("high")  # as train.py
    sizes = fitting_sizes()
    bandwidth = measure_bandwidth(sizes.copied_bytes)
    name, _ = peak_flops(torch.device(device))
    known = [gigabytes for part, gigabytes in BANDWIDTHS.items() if part in name]
    sheet = f", {known[0]:,} by its data sheet" if known else ""
    print(f"\nmemory bandwidth: {bandwidth / 1e9:,.0f} GB/s by a copy{sheet}")
    deadline = start + TIME_LIMIT
    results = {
        "batch_size": sizes.batch_size,
        "bandwidth": bandwidth,
        "kernels": kernel_names(),
        "operators": bench_operators(sizes, bandwidth),
        "eager": bench_steps(sizes, compiled=False, deadline=deadline),
        "sampling": bench_sampling(sizes),
        "compiled": bench_steps(sizes, compiled=True, deadline=deadline),
        "seconds": time.perf_counter() - start,
    }
    print(f"\n{results['seconds']:.0f} seconds")
    return results


# -----------------------------------------------------------------------------

SECTIONS = {
    "layer": bench_layer,
    "step": bench_step,
    "sampling": bench_sampling,
    "gpu": bench_gpu,
}


def machine():
    """What the numbers were measured on."""
    described = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": dtype,
    }
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        described["processor"] = properties.name
        described["memory GB"] = round(properties.total_memory / 1e9, 1)
        described["cuda"] = torch.version.cuda
    return described


def main():
    global dtype
    configure(
        globals(),
        choices={
            "section": ("all", *SECTIONS),
            "dtype": ("fp32", "bf16"),
        },
        at_least={"repeats": 1, "n_layer": 1},
    )
    target = pick_device(device)
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r}: must be 'cpu' or 'cuda'")
    on_cuda = target.type == "cuda"
    if target.index is not None:
        torch.cuda.set_device(target)
    names = [section]
    if section == "all":
        names = ["gpu"] if on_cuda else ["layer", "step", "sampling"]
    if names == ["gpu"]:
        if not on_cuda and not tiny:
            raise ValueError("section='gpu' needs --device=cuda (or --tiny, its sizes for a test)")
        dtype = "bf16"
    results = {"machine": machine()}
    print(results["machine"])
    for name in names:
        results[name] = SECTIONS[name]()
    path = json_file or ("bench_cuda.json" if on_cuda else "")
    if path:
        write_json(path, results)
        print(f"\n{path} is written")


if __name__ == "__main__":
    main()
