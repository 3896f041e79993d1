"""
Measures what the sparse bottleneck costs, beside what one would use instead. Medians of interleaved
repeats.

    python -m tools.bench                                # every section, about 4 minutes on 2 cores
    python -m tools.bench --section=layer --json_file=layer.json
    python -m tools.bench --section=step --dtype=bf16 --torch_compile
    python -m tools.bench --device=cuda > bench_cuda.txt   # the gpu section; send that and its JSON

Sections: layer, step, growth, flops, optimizer, sampling, data; gpu. Ratios are to the row they
name.
"""
if not __package__:
    raise SystemExit("from the repository's root: python -m tools.bench")

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F
from tqdm import tqdm

import cayley
import prepare_fineweb
from cayley import CayleySAE
from checkpoint import pick_device
from configurator import configure
from data import Windows, get_tokenizer, write_json
from model import GPT, MLP, CausalSelfAttention, GPTConfig
from muon import Muon, MuonAdamW
from tools import account

# settings, see configurator.py
section = "all"  # or one of the sections above; all is gpu alone on CUDA
device = "cpu"
dtype = "fp32"  # or "bf16": autocast
torch_compile = False  # a compiled cayley 2L as well, in the step section
repeats = 3
n_layer = 2  # of the models of the step section
json_file = ""  # for all numbers; bench_cuda.json on CUDA
tiny = False  # the gpu section at sizes for a test

# settings of child()
model_name = "dense"  # of MODELS, for its peak memory
directory = ""  # of bins, for the loader

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
    for _ in range(repeats + 1):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def autocast():
    enabled = dtype == "bf16"
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


def show(title, rows):
    """Print rows, {name: {column: value}}, as a table, and return them."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    width = max(len(name) for name in rows)
    print(f"\n{title}")
    print(" " * width + "  " + "  ".join(f"{column:>14}" for column in columns))
    for name, row in rows.items():
        cells = [f"{row[column]:14,.4g}" if column in row else " " * 14 for column in columns]
        print(f"{name:{width}}  " + "  ".join(cells))
    return rows


def child(*arguments, ranks=1):
    """This script again, in a process or several of torchrun: the JSON that it prints last."""
    launcher = [sys.executable]
    environment = dict(os.environ)
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        environment["OMP_NUM_THREADS"] = "1"
    settings = [f"--{key}={globals()[key]}" for key in ("device", "dtype", "n_layer")]
    command = [*launcher, __file__, *settings, *arguments]
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(result.stdout.strip().splitlines()[-1])


def children(n, *arguments):
    """child() in n processes at once."""
    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(lambda _: child(*arguments), range(n)))


# -----------------------------------------------------------------------------
# what one would use instead


class DenseDictionarySAE(CayleySAE):
    """The same layer by its plain definition: products with the whole dictionary."""

    def __init__(self, *args):
        super().__init__(*args)
        for i, level in enumerate(self.levels):
            atoms = self.atoms(i, range(2**level.n))
            self.register_buffer(f"atoms_{i}", atoms, persistent=False)

    def forward(self, x):
        atoms = [getattr(self, f"atoms_{i}") for i in range(len(self.levels))]
        return cayley.plain_decode(cayley.plain_encode(self, x, atoms), atoms)


class TopKSAE(nn.Module):
    """A learned SAE of that width and number of active features: Linear, top-k, sum of rows."""

    def __init__(self, n_embd, levels):
        super().__init__()
        levels = cayley.parse_levels(levels)
        self.k = sum(level.k for level in levels)
        n_features = sum(2**level.n for level in levels)
        self.encoder = nn.Linear(n_embd, n_features)
        self.decoder = nn.Parameter(torch.randn(n_features, n_embd) / n_embd**0.5)

    def forward(self, x):
        values, ids = self.encoder(x).topk(self.k)
        return F.embedding_bag(ids, self.decoder, per_sample_weights=values.float(), mode="sum")


class DenseBlock(nn.Module):
    """A block's attention and MLP, without the bottleneck."""

    def __init__(self, n_embd):
        super().__init__()
        config = GPTConfig(n_embd=n_embd, n_head=n_embd // 128, cayley_levels="")
        self.attn = CausalSelfAttention(config)
        self.mlp = MLP(config)

    def forward(self, x):
        return self.mlp(x + self.attn(x.unsqueeze(0)).squeeze(0))


# -----------------------------------------------------------------------------
# layer


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
    x = torch.randn(n_tokens, n_embd, device=device, requires_grad=True)
    block = DenseBlock(n_embd)
    layers = {
        "CayleySAE": CayleySAE(n_embd, levels),
        "dense dictionary": DenseDictionarySAE(n_embd, levels),
        "learned TopK SAE": TopKSAE(n_embd, levels),
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


def training_step(levels, compiled=False):
    """
    Two functions of a GPT of the reference's width: forward and backward of a batch of 1,024
    tokens, and what ends the step.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=n_layer, cayley_levels=levels)).to(device)
    optimizer = MuonAdamW(model, 1e-3, 1e-3)
    idx = torch.randint(50257, (1, 1025), device=device)
    forward = torch.compile(model) if compiled else model

    def forward_backward():
        optimizer.zero_grad()
        with autocast():
            _, loss = forward(idx[:, :-1], idx[:, 1:])
        loss.backward()

    def update():
        optimizer.step()
        for sae in model.saes():
            sae.update_stats()

    return forward_backward, update


def peak_memory():
    """
    Peak bytes of training model_name in this process.

    A step, and the next backward, when the optimizer's state is there.
    """
    forward_backward, update = training_step(MODELS[model_name])
    for function in (forward_backward, update, forward_backward):
        function()
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as file:  # not ru_maxrss, which starts with the parent's
        kilobytes = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    return kilobytes * 1024


def bench_step():
    functions = {}
    for name, levels in MODELS.items():
        functions[name, "both"], functions[name, "update"] = training_step(levels)
    if torch_compile:
        functions["compiled", "both"], _ = training_step(MODELS["cayley 2L"], compiled=True)
    times = interleaved(functions, repeats)
    del functions  # and with it the models
    with ThreadPoolExecutor(2 if device == "cpu" else 1) as pool:
        peaks = pool.map(lambda name: child("--section=memory", f"--model_name={name}"), MODELS)
        memory = dict(zip(MODELS, peaks))
    step = {name: times[name, "both"] + times[name, "update"] for name in MODELS}
    rows = {}
    for name in MODELS:
        rows[name] = {
            "fwd+bwd tok/s": 1024 / times[name, "both"],
            "x dense": times["dense", "both"] / times[name, "both"],
            "step tok/s": 1024 / step[name],
            "step x dense": step["dense"] / step[name],
            "peak GB": memory[name] / 1e9,
            "peak x dense": memory[name] / memory["dense"],
        }
    if torch_compile:
        rows["cayley 2L, compiled"] = {
            "fwd+bwd tok/s": 1024 / times["compiled", "both"],
            "x dense": times["dense", "both"] / times["compiled", "both"],
        }
    title = f"training step, {n_layer} layers, d=1024, 1,024 tokens, vocab 50304, {dtype}"
    return show(title, rows)


# -----------------------------------------------------------------------------
# growth


def select_inputs(sae, x):
    """Arguments of cayley.select for a layer's first step."""
    return x, torch.ones_like(sae.bias), torch.zeros_like(sae.bias), sae.plan


@torch.no_grad()
def temporaries(sae, x):
    """Peak bytes that scoring holds beyond its inputs and results."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        sae(x)
        return torch.cuda.max_memory_allocated() - before
    inputs = select_inputs(sae, x)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        cayley.select(*inputs)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak - max(0, held)


def bench_growth():
    x = torch.randn(1024, 1024, device=device)
    layers = {}
    for n in range(12, 18):
        layers[n] = CayleySAE(1024, [(10, 16, 0), (n, 32, 256)]).to(device)
    times = interleaved({n: lambda sae=sae: sae(x) for n, sae in layers.items()}, repeats)
    by_features = {}
    for n, sae in layers.items():
        by_features[f"2^{n} features"] = {
            "us/token": times[n] / 1024 * 1e6,
            "x a bit less": times[n] / times.get(n - 1, times[n]),
            "temporary MB": temporaries(sae, x) / 1e6,
        }
    show("layer forward, d=1024, 10,16,0;n,32,256, 1,024 tokens", by_features)
    sae = layers[15]
    inputs = {n: torch.randn(n, 1024, device=device) for n in (256, 1024, 4096, 16384)}
    times = interleaved({n: lambda x=x: sae(x) for n, x in inputs.items()}, repeats)
    by_tokens = {}
    for n, x in inputs.items():
        by_tokens[f"{n} tokens"] = {
            "us/token": times[n] / n * 1e6,
            "temporary MB": temporaries(sae, x) / 1e6,
        }
    show("layer forward, d=1024, 2L", by_tokens)
    return {"features": by_features, "tokens": by_tokens}


# -----------------------------------------------------------------------------
# flops


@torch.no_grad()
def scoring_flops(n_embd, levels, n_tokens=64):
    """
    FLOPs a token of select's products, counted.

    By the profiler: FlopCounterMode doesn't see what an operator of torch.library does inside.
    """
    inputs = select_inputs(CayleySAE(n_embd, levels), torch.randn(n_tokens, n_embd))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, with_flops=True) as profile:
        cayley.select(*inputs)
    products = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
    counts = [event.flops for event in profile.key_averages() if event.key in products]
    return sum(counts) / n_tokens


def bench_flops():
    """Of the forward, per token; sums of atoms are 2 d a term."""
    rows = {}
    for name, (n_embd, levels) in LEVELS.items():
        sae = CayleySAE(n_embd, levels)
        active = sum(level.k for level in sae.levels)
        flops = scoring_flops(n_embd, levels) + 2 * n_embd * active
        moved = active * n_embd  # numbers, of the atoms that are summed
        slots = 1
        for level, m in zip(sae.levels, sae.block_bits):
            moved += slots * (2 * n_embd + 4 * 2**m)  # signed copies, scores
            slots = level.k
        rows[name] = {
            "MFLOP/token": flops / 1e6,
            "% of block": 100 * flops / (24 * n_embd**2),
            "kB moved/token": 4 * moved / 1e3,
            "block kB/token": 4 * 36 * n_embd / 1e3,
        }
    title = "arithmetic and memory traffic (estimate, fp32) of the layer's forward; the dense "
    return show(title + "block's is 24 d^2", rows)


# -----------------------------------------------------------------------------
# optimizer


def random_matrices(shapes):
    """Parameters with gradients."""
    params = []
    for shape in shapes:
        p = nn.Parameter(torch.randn(shape, device=device))
        p.grad = torch.randn_like(p)
        params.append(p)
    return params


def bench_optimizer():
    shapes = [(1024, 1024)] * 4 * n_layer + [(4096, 1024)] * n_layer + [(1024, 4096)] * n_layer
    times = interleaved({
        "Muon": Muon(random_matrices(shapes), 0.01).step,
        "torch.optim.Muon": torch.optim.Muon(random_matrices(shapes), 0.01).step,
    }, repeats)
    rows = {}
    for name, elapsed in times.items():
        rows[name] = {"ms": 1e3 * elapsed, "x torch": elapsed / times["torch.optim.Muon"]}
    if device == "cpu":
        for name, ranks in (("Muon, 1 rank of 1 thread", 1), ("Muon, each of 2 such ranks", 2)):
            rows[name] = {"ms": 1e3 * child("--section=muon", ranks=ranks)}
    return show(f"optimizer step, the matrices of {n_layer} layers of d=1024", rows)


def muon_step():
    """Median seconds of a Muon step on this rank."""
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    optimizer = Muon(random_matrices([(1024, 1024)] * 4), 0.01)
    elapsed = interleaved({"step": optimizer.step}, repeats)["step"]
    if int(os.environ.get("RANK", 0)):
        sys.stdout = open(os.devnull, "w")  # one rank prints
    return elapsed


# -----------------------------------------------------------------------------
# sampling


def bench_sampling():
    """Seconds a token: those of some tokens without those of the first, which reads the context."""
    model = GPT(GPTConfig(n_layer=n_layer)).to(device)
    rows = {}
    for context in (64, 512, 1016):
        idx = torch.randint(50257, (1, context), device=device)

        def sample(n, use_cache, idx=idx):
            for _ in model.stream(idx, n, use_cache=use_cache):
                pass

        times = interleaved({
            "first": lambda: sample(1, True),
            "eight": lambda: sample(8, True),
            "first without": lambda: sample(1, False),
            "two without": lambda: sample(2, False),
        }, repeats)
        with_cache = (times["eight"] - times["first"]) / 7
        without = times["two without"] - times["first without"]
        rows[f"context {context}"] = {
            "cache ms/token": 1e3 * with_cache,
            "without": 1e3 * without,
            "ratio": without / with_cache,
        }
    return show(f"sampling, {n_layer} layers of d=1024", rows)


# -----------------------------------------------------------------------------
# data


def write_bins(path, n_shards=10, shard_tokens=50_000_000):
    """A data directory of random tokens at path: 1 GB."""
    tokens = np.random.default_rng(0).integers(0, 50257, shard_tokens, dtype=np.uint16)
    shards = []
    for i in range(n_shards):
        name = f"train_{i:06d}.bin"
        tokens.tofile(os.path.join(path, name))
        shards.append({"file": name, "split": "train", "tokens": shard_tokens})
    meta = {
        "tokenizer": "gpt2",
        "vocab_size": 50257,
        "dtype": "uint16",
        "complete": True,
        "shards": shards,
    }
    write_json(os.path.join(path, "meta.json"), meta)


def loader_rate():
    """Tokens a second of one process that reads shuffled micro-batches of 32 windows of 1,024."""
    windows = Windows(directory, "train", 1024)
    n = 0
    start = time.perf_counter()
    while time.perf_counter() - start < 3:
        windows.shuffled(n * 32, 32, seed=0)
        n += 1
    return n * 32 * 1024 / (time.perf_counter() - start)


def compare_encoding(path):
    """Preparation against the bare tokenizer with as many threads, on Python's own text."""
    try:
        encoding = get_tokenizer("gpt2")
    except ValueError:  # not here and no network
        encoding = get_tokenizer("bytes")
    texts = list(prepare_fineweb.python_documents())
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    threads = os.cpu_count()
    source = os.path.join(path, "texts.jsonl")
    with open(source, "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)

    def bare():
        encoding.encode_ordinary_batch(texts, num_threads=threads)

    def pipeline():
        rows = prepare_fineweb.documents([source], prepare_fineweb.file_rows)
        stream = prepare_fineweb.TokenStream(prepare_fineweb.encoded(rows, encoding, threads))
        with tqdm(disable=True) as bar:
            shard = os.path.join(path, "shard.bin")
            prepare_fineweb.write_shard(shard, stream.take(10**9), bar)

    times = interleaved({"bare": bare, "pipeline": pipeline}, repeats)
    row = {
        "MB/s": megabytes / times["pipeline"],
        "bare tiktoken": megabytes / times["bare"],
        "ratio": times["bare"] / times["pipeline"],
    }
    return {f"preparing, {encoding.name}, {threads} threads": row}


def bench_data():
    rows = {}
    with tempfile.TemporaryDirectory() as path:
        write_bins(path)
        for ranks in (1, 2):
            rates = children(ranks, "--section=loader", f"--directory={path}")
            rows[f"loader, {ranks} ranks"] = {"tokens/s": sum(rates)}
        rows |= compare_encoding(path)
    return show("data", rows)


# -----------------------------------------------------------------------------
# gpu: in bf16 autocast at the reference's sizes, in under 5 minutes. Needs a CUDA device but for
# its tiny sizes, which run on a CPU in the tests.


class Sizes(NamedTuple):
    shape: dict  # of GPTConfig, without levels
    models: dict  # {name: cayley_levels}
    batch_size: int
    contexts: tuple  # tokens that sampling continues
    n_samples: int  # by so many
    copied_bytes: int  # to measure the memory's bandwidth
    backend: str  # of torch.compile


REFERENCE = Sizes(
    shape={"n_layer": 12, "n_head": 8, "n_embd": 1024, "block_size": 1024, "vocab_size": 50304},
    models=MODELS,
    batch_size=32,
    contexts=(64, 512),
    n_samples=32,
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
TIME_LIMIT = 200  # seconds, after which no further training step is begun


def gpu_config(sizes, levels):
    return GPTConfig(**sizes.shape, cayley_levels=levels)


def kernel_names():
    """Kernels that CayleySAE can be told to use here."""
    if device == "cpu":
        return ["torch"]
    try:
        cayley.use_kernels("triton")
    except ValueError as error:
        print(f"only PyTorch's kernels: {error}")
        return ["torch"]
    return ["torch", "triton"]


def normalised_input(sizes):
    """The residual of a micro-batch as a CayleySAE sees it, bf16 (N, d)."""
    n_tokens = sizes.batch_size * sizes.shape["block_size"]
    x = torch.randn(n_tokens, sizes.shape["n_embd"], device=device)
    return F.rms_norm(x, (x.shape[1],)).bfloat16()


def measure_bandwidth(n_bytes):
    """Bytes a second that a copy within the device's memory reads and writes."""
    source = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    elapsed = interleaved({"copy": lambda: target.copy_(source)}, 5)["copy"]
    return 2 * n_bytes / elapsed


def tensor_bytes(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.no_grad()
def operator_functions(sizes, levels):
    """{operator: (function, the bytes of its arguments and results)} on a micro-batch."""
    x = normalised_input(sizes)
    sae = CayleySAE(x.shape[1], levels).to(device)
    inputs = select_inputs(sae, x)
    ids, products = cayley.select(*inputs)
    # p is p << shift on the deepest level, of which combine and project take ids
    shifts = [sae.n - level.n for level in sae.levels for _ in range(level.k)]
    ids = ids << torch.tensor(shifts, device=device)
    weights = torch.randn(ids.shape, device=device, dtype=x.dtype)
    return {
        "select": (lambda: cayley.select(*inputs), tensor_bytes(*inputs[:3], ids, products)),
        "combine": (
            lambda: cayley.combine(ids, weights, sae.t, sae.n), tensor_bytes(ids, weights, x)
        ),
        "project": (
            lambda: cayley.project(x, ids, sae.t, sae.n), tensor_bytes(ids, weights, x)
        ),
    }


def agreement(one, other):
    """
    How two kernels' results of the same operators agree, {operator: result} each.

    Where two scores are nearly equal select may take either, and then other blocks are open.
    """
    (ids, products), (other_ids, other_products) = one["select"], other["select"]
    equal = (ids == other_ids).all(1)  # (N,)
    off = (products - other_products)[equal]
    row = {"tokens with equal ids %": 100 * equal.double().mean().item()}
    row["select off by"] = off.abs().max().item() if len(off) else float("nan")
    for key in ("combine", "project"):
        row[f"{key} off by"] = (one[key].float() - other[key].float()).abs().max().item()
    return row


def bench_operators(sizes, kernels, bandwidth):
    """
    Milliseconds of each operator beside what the memory's bandwidth allows; do kernels agree?

    The bound: arguments are read and results written once. The atoms aren't in it.
    """
    rows = {}
    agreements = {}
    for name, levels in sizes.models.items():
        if not levels:
            continue
        functions = operator_functions(sizes, levels)
        results = {}
        for kernel in kernels:
            cayley.use_kernels(kernel)
            results[kernel] = {key: function() for key, (function, _) in functions.items()}
            times = interleaved({key: function for key, (function, _) in functions.items()}, 5)
            for key, (_, n_bytes) in functions.items():
                bound = n_bytes / bandwidth
                rows[f"{name}, {key}, {kernel}"] = {
                    "ms": 1e3 * times[key],
                    "MB": n_bytes / 1e6,
                    "bound ms": 1e3 * bound,
                    "x bound": times[key] / bound,
                }
        if len(kernels) > 1:
            agreements[name] = agreement(*results.values())
    show(f"operators, {sizes.batch_size} x {sizes.shape['block_size']} tokens, bf16", rows)
    if agreements:
        show("triton's kernels beside torch's on the same batch", agreements)
    return {"times": rows, "agreement": agreements}


def measure_step(sizes, levels, compiled):
    """One row: a micro-batch's forward and backward, the optimizer's step, and peak memory."""
    config = gpu_config(sizes, levels)
    torch.manual_seed(0)
    with torch.device(device):  # where its weights are drawn in no time
        model = GPT(config)
    optimizer = MuonAdamW(model, 1e-3, 1e-3)
    windows = (sizes.batch_size, config.block_size + 1)
    idx = torch.randint(config.vocab_size, windows, device=device)
    forward = torch.compile(model, backend=sizes.backend) if compiled else model

    # gradients are never cleared: so it is after the first of several micro-batches
    def forward_backward():
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            _, loss = forward(idx[:, :-1], idx[:, 1:])
        loss.backward()

    def update():
        optimizer.step()
        for sae in model.saes():
            sae.update_stats()

    forward_backward()
    update()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    times = interleaved({"both": forward_backward, "update": update}, 5)
    n_tokens = sizes.batch_size * config.block_size
    paper = account.memory_account(config, sizes.batch_size, compiled=compiled)
    row = {
        "fwd+bwd tok/s": n_tokens / times["both"],
        "update ms": 1e3 * times["update"],
        "account GB": paper["peak"] / 1e9,
    }
    if device != "cpu":
        row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        known = account.find_device(torch.cuda.get_device_name())
        if known:
            flops = row["fwd+bwd tok/s"] * account.flops_per_token(config)
            row["MFU %"] = 100 * flops / known.flops
    return row


def step_variants(sizes, kernels):
    """{title: (model, kernel)}, what matters most first."""
    variants = {}
    for kernel in reversed(kernels):
        for name, levels in sizes.models.items():
            if levels:
                variants[f"{name}, {kernel}"] = name, kernel
            else:
                variants[name] = name, "torch"  # the dense twin has no choice
    return variants


def bench_gpu_steps(sizes, kernels, start, compiled):
    """Rows of training steps, as far as the time goes; what is left out is named."""
    rows = {}
    for title, (name, kernel) in step_variants(sizes, kernels).items():
        title += ", compiled" if compiled else ", eager"
        if time.perf_counter() - start > TIME_LIMIT:
            print(f"left out for want of time: {title}")
            continue
        cayley.use_kernels(kernel)
        try:
            rows[title] = measure_step(sizes, sizes.models[name], compiled)
        except torch.OutOfMemoryError:
            print(f"out of memory: {title}")
        gc.collect()
        torch.compiler.reset()
        if device != "cpu":
            torch.cuda.empty_cache()
    if not rows:
        return rows
    shape = f"{sizes.batch_size} x {sizes.shape['block_size']} tokens"
    return show(f"training step, {sizes.shape['n_layer']} layers, {shape}, bf16", rows)


def bench_gpu_sampling(sizes, kernels):
    """Tokens a second of one sequence with the cache; reading the context is in the time."""
    rows = {}
    cayley.use_kernels(kernels[-1])
    for name, levels in sizes.models.items():
        with torch.device(device):
            model = GPT(gpu_config(sizes, levels))
        functions = {}
        for context in sizes.contexts:
            idx = torch.randint(sizes.shape["vocab_size"], (1, context), device=device)
            functions[context] = lambda m=model, i=idx: m.generate(i, sizes.n_samples)
        times = interleaved(functions, 3)
        rows[name] = {f"tok/s at {key}": sizes.n_samples / t for key, t in times.items()}
    return show(f"sampling {sizes.n_samples} tokens, one sequence, with the cache", rows)


def fitting_sizes():
    """The sizes to measure, with a micro-batch that all models have room for."""
    if tiny:
        return TINY
    memory = torch.cuda.get_device_properties(device).total_memory
    configs = [gpu_config(REFERENCE, levels) for levels in REFERENCE.models.values()]
    fits = min(account.largest_batch(config, memory) for config in configs)
    if fits < 1:
        raise ValueError(f"{memory / 1e9:.0f} GB are too little for a micro-batch of 1")
    return REFERENCE._replace(batch_size=min(REFERENCE.batch_size, fits))


def bench_gpu():
    if device == "cpu" and not tiny:
        raise ValueError("section='gpu' needs --device=cuda (or --tiny, its sizes for a test)")
    start = time.perf_counter()
    torch.set_float32_matmul_precision("high")  # as train.py
    sizes = fitting_sizes()
    bandwidth = measure_bandwidth(sizes.copied_bytes)
    known = account.find_device(torch.cuda.get_device_name()) if device != "cpu" else None
    sheet = f", {known.bandwidth / 1e9:,.0f} by its data sheet" if known else ""
    print(f"\nmemory bandwidth: {bandwidth / 1e9:,.0f} GB/s by a copy{sheet}")
    kernels = kernel_names()
    results = {
        "batch_size": sizes.batch_size,
        "bandwidth": bandwidth,
        "kernels": kernels,
        "operators": bench_operators(sizes, kernels, bandwidth),
        "eager": bench_gpu_steps(sizes, kernels, start, compiled=False),
        "sampling": bench_gpu_sampling(sizes, kernels),
        "compiled": bench_gpu_steps(sizes, kernels, start, compiled=True),
        "seconds": time.perf_counter() - start,
    }
    print(f"\n{results['seconds']:.0f} seconds")
    return results


# -----------------------------------------------------------------------------

SECTIONS = {
    "layer": bench_layer,
    "step": bench_step,
    "growth": bench_growth,
    "flops": bench_flops,
    "optimizer": bench_optimizer,
    "sampling": bench_sampling,
    "data": bench_data,
    "gpu": bench_gpu,
}
CHILD_SECTIONS = {"memory": peak_memory, "muon": muon_step, "loader": loader_rate}


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
    configure(globals())
    target = pick_device(device)
    on_cuda = target.type == "cuda"
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r}: must be 'cpu' or 'cuda'")
    if target.index is not None:
        torch.cuda.set_device(target)
    if dtype not in ("fp32", "bf16"):
        raise ValueError(f"dtype={dtype!r}: must be 'fp32' or 'bf16'")
    if section in CHILD_SECTIONS:
        print(json.dumps(CHILD_SECTIONS[section]()), flush=True)
        os._exit(0)  # see the end of train.py
    names = [section]
    if section == "all":
        names = ["gpu"] if on_cuda else [name for name in SECTIONS if name != "gpu"]
    elif section not in SECTIONS:
        raise ValueError(f"section={section!r}: must be all or one of {', '.join(SECTIONS)}")
    results = {"machine": machine()}
    if names == ["gpu"]:
        results["machine"]["dtype"] = "bf16"
    print(results["machine"])
    for name in names:
        results[name] = SECTIONS[name]()
    path = json_file or ("bench_cuda.json" if on_cuda else "")
    if path:
        write_json(path, results)
        print(f"\n{path} is written")


if __name__ == "__main__":
    main()
