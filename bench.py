"""
Measures what the sparse bottleneck costs, beside what one would use instead. Medians of interleaved repeats.

    python bench.py                                   # every section, about 4 minutes on 2 cores
    python bench.py --section=layer --json=layer.json
    python bench.py --device=cuda --dtype=bf16 --compile

Sections: layer, step, growth, flops, optimizer, sampling, data. Ratios are to the row they name.
"""
import json as json_module
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import cayley
import prepare_fineweb
from cayley import CayleySAE
from configurator import configure, run_main
from model import GPT, MLP, CausalSelfAttention, GPTConfig
from muon import Muon, MuonAdamW

# settings, see configurator.py
section = "all"  # or one of the sections above
device = "cpu"
dtype = "fp32"  # or "bf16": autocast
compile = False  # a compiled cayley 2L as well, in the step section
repeats = 3
n_layer = 2  # of the models of the step section
json = ""  # file for all numbers

LEVELS = {"d=1024 2L": (1024, "10,16,0;15,32,256"), "d=1024 3L": (1024, "10,16,0;15,32,256;17,64,256"),
          "d=2048 2L": (2048, "11,16,0;15,32,256")}


# -----------------------------------------------------------------------------
# measuring

def interleaved(functions, repeats):
    """{name: median seconds}: every function once in turn, repeats times, after one warm-up each."""
    times = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            if device != "cpu":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if device != "cpu":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def autocast():
    return torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16")


def show(title, rows):
    """Print and return {name: {column: value}} as a table."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    width = max(len(name) for name in rows)
    print(f"\n{title}\n{'':{width}}  " + "  ".join(f"{column:>14}" for column in columns))
    for name, row in rows.items():
        print(f"{name:{width}}  " + "  ".join(f"{row[column]:14,.4g}" if column in row else " " * 14 for column in columns))
    return rows


def child(*arguments, ranks=1):
    """This script again in a process of its own: the JSON that it prints last."""
    launcher = [sys.executable] + ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] * (ranks > 1)
    settings = [f"--device={device}", f"--dtype={dtype}", f"--compile={compile}", f"--n_layer={n_layer}"]
    output = subprocess.run([*launcher, __file__, *settings, *arguments], check=True, capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"} if ranks > 1 else None).stdout
    return json_module.loads(output.strip().splitlines()[-1])


# -----------------------------------------------------------------------------
# what one would use instead

class DenseDictionarySAE(CayleySAE):
    """The same layer with scores from a product with the whole dictionary."""

    def __init__(self, *args):
        super().__init__(*args)
        self.dictionaries = [self.atoms(i, range(2**level.n)) for i, level in enumerate(self.levels)]

    def forward(self, x):
        output, parents = 0, None
        for i, (level, where) in enumerate(zip(self.levels, self.level_slices)):
            scale = self.var[where].rsqrt()
            score = (x @ self.dictionaries[i].T - self.mean[where]) * scale + self.bias[where]
            candidates = score
            if i > 0:
                n_blocks = 2**level.n // level.delta
                blocks = parents >> (self.levels[i - 1].n - n_blocks.bit_length() + 1)
                shut = torch.ones(len(x), n_blocks, dtype=torch.bool, device=x.device).scatter(1, blocks, False)
                candidates = score.view(len(x), n_blocks, -1).masked_fill(shut[..., None], -torch.inf).flatten(1)
            parents = candidates.topk(level.k).indices
            values = score.gather(1, parents)
            output = output + F.embedding_bag(parents, self.dictionaries[i], per_sample_weights=values.float(), mode="sum")
        return output


class TopKSAE(nn.Module):
    """A learned SAE of the same width and number of active features: Linear encoder, top-k, gather decoder."""

    def __init__(self, n_embd, levels):
        super().__init__()
        levels = cayley.parse_levels(levels)
        self.k, width = sum(level.k for level in levels), sum(2**level.n for level in levels)
        self.encoder = nn.Linear(n_embd, width)
        self.decoder = nn.Parameter(torch.randn(width, n_embd) / n_embd**0.5)

    def forward(self, x):
        values, ids = self.encoder(x).topk(self.k)
        return F.embedding_bag(ids, self.decoder, per_sample_weights=values.float(), mode="sum")


class DenseBlock(nn.Module):
    """A block's attention and MLP, without the bottleneck."""

    def __init__(self, n_embd):
        super().__init__()
        config = GPTConfig(n_embd=n_embd, n_head=n_embd // 128, cayley_levels="")
        self.attn, self.mlp = CausalSelfAttention(config), MLP(config)

    def forward(self, x):
        return self.mlp(x + self.attn(x.unsqueeze(0)).squeeze(0))


# -----------------------------------------------------------------------------
# sections

def bench_layer(n_tokens=1024):
    results = {}
    for name, (n_embd, levels) in LEVELS.items():
        n = n_tokens if name == "d=1024 2L" else n_tokens // 4
        x = torch.randn(n, n_embd, device=device, requires_grad=True)
        layers = {"CayleySAE": CayleySAE(n_embd, levels), "dense dictionary": DenseDictionarySAE(n_embd, levels),
                  "learned TopK SAE": TopKSAE(n_embd, levels), "dense block": DenseBlock(n_embd), "MLP": DenseBlock(n_embd).mlp}
        functions = {}
        for layer_name, layer in layers.items():
            layer.to(device)

            def forward(layer=layer):
                with autocast():
                    return layer(x)

            def both(layer=layer, forward=forward):
                layer.zero_grad()
                x.grad = None
                forward().float().sum().backward()
            functions[layer_name, "forward"], functions[layer_name, "both"] = forward, both
        times = interleaved(functions, repeats if name == "d=1024 2L" else 1)  # the others' alternatives take seconds
        ours = times["CayleySAE", "both"]
        results[name] = show(f"layer, {name} ({levels}), {n} tokens, {dtype}: microseconds per token", {
            layer: {"forward": times[layer, "forward"] / n * 1e6, "fwd+bwd": times[layer, "both"] / n * 1e6,
                    "x CayleySAE": times[layer, "both"] / ours} for layer in layers})
        del layers, functions
    return results


MODELS = {"dense": "", "cayley 2L": LEVELS["d=1024 2L"][1], "cayley 3L": LEVELS["d=1024 3L"][1]}


def training_step(levels, compile=False):
    """Two functions of a GPT of the reference's width: forward and backward of a batch, and what ends the step."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=n_layer, cayley_levels=levels)).to(device)
    optimizer = MuonAdamW(model, 1e-3, 1e-3)
    idx = torch.randint(50257, (1, 1025), device=device)
    forward = torch.compile(model) if compile else model

    def forward_backward():
        optimizer.zero_grad()
        with autocast():
            loss = forward(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()

    def update():
        optimizer.step()
        for sae in model.saes():
            sae.update_stats()
    return forward_backward, update


def peak_memory(levels):
    """Peak bytes of training in this process: a step, and the next backward, when the optimizer's state is there."""
    forward_backward, update = training_step(levels)
    for function in (forward_backward, update, forward_backward):
        function()
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as file:  # not ru_maxrss, which starts with the parent's
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def bench_step():
    functions = {(name, part): function for name, levels in MODELS.items()
                 for part, function in zip(("both", "update"), training_step(levels))}
    if compile:
        functions["compiled", "both"], _ = training_step(MODELS["cayley 2L"], compile=True)
    times = interleaved(functions, repeats)
    del functions
    with ThreadPoolExecutor(2 if device == "cpu" else 1) as pool:
        memory = dict(zip(MODELS, pool.map(lambda name: child("--section=memory", f"--model={name}"), MODELS)))
    step = {name: times[name, "both"] + times[name, "update"] for name in MODELS}
    rows = {
        name: {"fwd+bwd tok/s": 1024 / times[name, "both"], "x dense": times["dense", "both"] / times[name, "both"],
               "step tok/s": 1024 / step[name], "step x dense": step["dense"] / step[name], "peak GB": memory[name] / 1e9,
               "peak x dense": memory[name] / memory["dense"]} for name in MODELS}
    if compile:
        rows["cayley 2L, compiled"] = {"fwd+bwd tok/s": 1024 / times["compiled", "both"],
                                       "x dense": times["dense", "both"] / times["compiled", "both"]}
    return show(f"training step, {n_layer} layers, d=1024, 1,024 tokens, vocab 50304, {dtype}", rows)


def bench_growth():
    def layer(n, k=32):
        return CayleySAE(1024, [(10, 16, 0), (n, k, 256)]).to(device)
    x = torch.randn(1024, 1024, device=device)
    bits = {n: layer(n) for n in range(12, 18)}
    times = interleaved({n: lambda sae=sae: sae(x) for n, sae in bits.items()}, repeats)
    rows = {f"2^{n} features": {"us/token": times[n] / 1024 * 1e6, "x a bit less": times[n] / times.get(n - 1, times[n]),
                                "temporary MB": temporaries(bits[n], x) / 1e6} for n in bits}
    results = {"features": show("layer forward, d=1024, 10,16,0;n,32,256, 1,024 tokens", rows)}
    inputs = {n: torch.randn(n, 1024, device=device) for n in (256, 1024, 4096, 16384)}
    times = interleaved({n: lambda x=x: bits[15](x) for n, x in inputs.items()}, repeats)
    rows = {f"{n} tokens": {"us/token": times[n] / n * 1e6, "temporary MB": temporaries(bits[15], x) / 1e6}
            for n, x in inputs.items()}
    return results | {"tokens": show("layer forward, d=1024, 2L", rows)}


def temporaries(sae, x):
    """Peak bytes that scoring holds beyond its inputs and results."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        sae(x)
        return torch.cuda.max_memory_allocated() - before
    scale, offset = torch.ones_like(sae.bias), torch.zeros_like(sae.bias)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        with torch.no_grad():
            cayley.select(x, scale, offset, sae.plan)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak - max(0, held)


def bench_flops():
    """Of the forward, per token. The layer's products are counted on one chunk; sums of atoms are 2 d a term."""
    rows = {}
    for name, (n_embd, levels) in LEVELS.items():
        x, sae = torch.randn(64, n_embd), CayleySAE(n_embd, levels)
        plan = []
        for n, k, m in zip(sae.plan[::3], sae.plan[1::3], sae.plan[2::3]):
            plan.append((n, k, m, torch.ones(2 ** (n - m), 2**m), torch.zeros(2 ** (n - m) + 1, 2**m)))
        with FlopCounterMode(display=False) as counter:
            cayley._select_chunk(x, plan)
        active, slots = sum(level.k for level in sae.levels), [1] + [level.k for level in sae.levels[:-1]]
        flops = counter.get_total_flops() / 64 + 2 * n_embd * active
        scored = sum(s * (2 * n_embd + 4 * 2**m) for s, m in zip(slots, sae.plan[2::3]))  # signed copies, scores
        block = 24 * n_embd**2
        rows[name] = {"MFLOP/token": flops / 1e6, "% of block": 100 * flops / block, "kB moved/token":
                      4 * (scored + active * n_embd) / 1e3, "block kB/token": 4 * 36 * n_embd / 1e3}
    return show("arithmetic and memory traffic (estimate, fp32) of the layer's forward; the dense block's is 24 d^2", rows)


def bench_optimizer():
    shapes = [(1024, 1024)] * 4 * n_layer + [(4096, 1024)] * n_layer + [(1024, 4096)] * n_layer
    optimizers = {}
    for name, make in {"Muon": lambda p: Muon(p, 0.01), "torch.optim.Muon": lambda p: torch.optim.Muon(p, 0.01)}.items():
        params = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizers[name] = make(params).step
    times = interleaved(optimizers, repeats)
    rows = {name: {"ms": 1e3 * seconds, "x torch": seconds / times["torch.optim.Muon"]} for name, seconds in times.items()}
    if device == "cpu":
        one, two = (child("--section=muon", ranks=ranks) for ranks in (1, 2))
        rows |= {"Muon, 1 rank of 1 thread": {"ms": one * 1e3}, "Muon, each of 2 such ranks": {"ms": two * 1e3}}
    return show(f"optimizer step, the matrices of {n_layer} layers of d=1024", rows)


def muon_step():
    """Median seconds of a Muon step on this rank."""
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    params = [nn.Parameter(torch.randn(1024, 1024)) for _ in range(4)]
    for p in params:
        p.grad = torch.ones_like(p)
    seconds = interleaved({"step": Muon(params, 0.01).step}, repeats)["step"]
    if "RANK" in os.environ and int(os.environ["RANK"]):
        sys.stdout = open(os.devnull, "w")  # one rank prints
    return seconds


def bench_sampling():
    rows = {}
    model = GPT(GPTConfig(n_layer=n_layer)).to(device)
    for context in (64, 512, 1016):
        idx = torch.randint(50257, (1, context), device=device)

        def tokens(use_cache, n):
            for _ in model.stream(idx, n, use_cache=use_cache):
                pass
        times = interleaved({(c, n): lambda c=c, n=n: tokens(c, n) for c in (True, False) for n in ((1, 8) if c else (1, 2))}, repeats)
        with_cache, without = (times[True, 8] - times[True, 1]) / 7, times[False, 2] - times[False, 1]
        rows[f"context {context}"] = {"cache ms/token": 1e3 * with_cache, "without": 1e3 * without, "ratio": without / with_cache}
    return show(f"sampling, {n_layer} layers of d=1024", rows)


def bench_data():
    """The loader on 1 GB of bins, and preparation against the bare tokenizer with as many threads on the same text."""
    with tempfile.TemporaryDirectory() as directory:
        tokens, shards = np.random.default_rng(0).integers(0, 50257, 50_000_000, dtype=np.uint16), []
        for i in range(10):
            shards.append({"file": f"train_{i:06d}.bin", "split": "train", "tokens": len(tokens)})
            tokens.tofile(os.path.join(directory, shards[-1]["file"]))
        prepare_fineweb.write_json(os.path.join(directory, "meta.json"), {"tokenizer": "gpt2", "shards": shards})
        rows = {f"loader, {ranks} ranks": {"tokens/s": sum(parallel("--section=loader", f"--directory={directory}", ranks))}
                for ranks in (1, 2)}
        try:
            encoding = prepare_fineweb.get_tokenizer("gpt2")
        except ValueError:  # not here and no network
            encoding = prepare_fineweb.get_tokenizer("bytes")
        texts = list(prepare_fineweb.python_documents())
        megabytes, threads = sum(len(text.encode()) for text in texts) / 1e6, os.cpu_count()
        with open(os.path.join(directory, "texts.jsonl"), "w") as file:
            file.writelines(json_module.dumps({"text": text}) + "\n" for text in texts)

        def bare():
            encoding.encode_ordinary_batch(texts, num_threads=threads)

        def pipeline():
            rows = prepare_fineweb.file_rows(os.path.join(directory, "texts.jsonl"))
            stream = prepare_fineweb.TokenStream(prepare_fineweb.encoded(rows, encoding, threads), 0, 0)
            with tqdm(disable=True) as bar:
                prepare_fineweb.write_shard(os.path.join(directory, "shard.bin"), stream.take(10**9), bar)
        times = interleaved({"bare": bare, "pipeline": pipeline}, repeats)
    rows[f"preparing, {encoding.name}, {threads} threads"] = {
        "MB/s": megabytes / times["pipeline"], "bare tiktoken": megabytes / times["bare"], "ratio": times["bare"] / times["pipeline"]}
    return show("data", rows)


def loader_rate():
    """Tokens per second of one process reading shuffled micro-batches of 32 windows of 1,024."""
    windows = prepare_fineweb.Windows(directory, "train", 1024)
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < 3:
        windows.shuffled(n * 32, 32, seed=0)
        n += 1
    return n * 32 * 1024 / (time.perf_counter() - start)


def parallel(*arguments):
    """child(), in so many processes at once."""
    *arguments, n = arguments
    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(lambda _: child(*arguments), range(n)))


SECTIONS = {"layer": bench_layer, "step": bench_step, "growth": bench_growth, "flops": bench_flops,
            "optimizer": bench_optimizer, "sampling": bench_sampling, "data": bench_data}
INTERNAL = {"memory": lambda: peak_memory(MODELS[model]), "muon": muon_step, "loader": loader_rate}  # of child()
model = "dense"  # of INTERNAL's memory
directory = ""  # of INTERNAL's loader


def main():
    configure(globals())
    if dtype not in ("fp32", "bf16"):
        raise ValueError(f"dtype={dtype!r}: must be 'fp32' or 'bf16'")
    if section in INTERNAL:
        print(json_module.dumps(INTERNAL[section]()), flush=True)
        os._exit(0)  # see the end of train.py
    if section != "all" and section not in SECTIONS:
        raise ValueError(f"section={section!r}: must be all or one of {', '.join(SECTIONS)}")
    machine = {"processor": torch.cuda.get_device_name() if device != "cpu" else platform.processor() or platform.machine(),
               "threads": torch.get_num_threads(), "torch": torch.__version__, "dtype": dtype}
    print(machine)
    results = {"machine": machine}
    for name in SECTIONS if section == "all" else [section]:
        results[name] = SECTIONS[name]()
    if json:
        prepare_fineweb.write_json(json, results)


if __name__ == "__main__":
    run_main(main)
