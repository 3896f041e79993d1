"""
Compiles the kernels of cayley_triton.py without a GPU, at the published recipes' shapes.

    python records/kernels/compiled.py                    # for sm_80, sm_90, sm_100, sm_120
    python records/kernels/compiled.py --arch=90 --levels="10,16,0;15,32,256"
    python records/kernels/compiled.py --few --dtype=float32   # for 1 to 16 tokens, as in sampling
    python records/kernels/compiled.py --designs          # what was weighed, on sm_80

Per kernel: registers, stack (spills), shared memory, blocks a multiprocessor holds, instructions in
its SASS and in its loops, and warp instructions a token, where an instruction of a loop counts as
often as the loop runs (of the launches for few tokens, where many programs make a token, a
program). Needs triton, whose wheel brings ptxas and cuobjdump.
"""
import csv
import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# a script here can't see the repository's top otherwise
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
import triton.backends.nvidia
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import cayley
import cayley_triton
from cayley_triton import Launch
from configurator import configure
from data import write_text

# settings, see configurator.py
arch = "80,90,100,120"  # compute capabilities
levels = ""  # one bottleneck, as n_embd is 2^n of the first level; "": the published recipes'
dtype = "bfloat16"  # of the activations; or "float32"
few = False  # the launches for few tokens
designs = False  # instead, other ways to do the 2L level of d=1024
csv_file = ""  # for the table

RECIPES = (
    "10,16,0;15,32,256",
    "10,16,0;15,32,256;17,64,256",
    "11,16,0;15,32,256",
    "11,16,0;15,32,256;17,64,256",
)
REGISTERS = 65536  # of a multiprocessor, on every arch here
ROUNDS = 8  # of pick's searches, a mean: 6 to 10 for normal scores, 31 at most
SHARED_BYTES = {80: 164, 90: 228, 100: 228, 120: 100}  # of a multiprocessor, in KiB

# kernel's tensors; x is the activations' type
TYPES = {
    "top_products": "*x *fp32 *fp32 *fp32 *fp32",
    "block_products": "*x *i32 *fp32 *fp32 *bf16 *bf16 *fp32 *fp32 *fp32 i32",
    "few_products": "*x *i32 *fp32 *fp32 *i32 *i32 *fp32 *fp32",
    "pick": "*fp32 *fp32 *i32 *fp32 *fp32 *fp32 *fp32 *fp32 *i64 *fp32 *i32 *i32",
    "combine_atoms": "*i64 *x *i32 *i32 *x i32 i32",
    "project_atoms": "*x *i64 *i32 *i32 *x i32 i32",
    "bitonic_pick": "*fp32 *i64",
}


def launches(text):
    """(name, Launch) of everything that a layer with these levels starts."""
    sae = cayley.CayleySAE(2 ** int(text.split(",")[0]), text)
    found = []
    K = sum(level.k for level in sae.levels)
    per_level = cayley_triton.level_launches(tuple(sae.plan), getattr(torch, dtype), few)
    for i, level in enumerate(per_level):
        found.append((f"products of level {i}", level.products))
        found.append((f"pick of level {i}", level.picks))
    n_tokens = 1 if few else cayley_triton.FEW + 1
    constants = cayley_triton.combine_constants(sae.t, n_tokens, K)
    found.append(("combine_atoms", Launch(cayley_triton.combine_atoms, constants)))
    words = {"words": sae.n_embd // 32}
    found.append(("project_atoms", Launch(cayley_triton.project_atoms, words)))
    return found, K


@triton.jit
def bitonic_pick(scores, ids, size: tl.constexpr, k: tl.constexpr):
    """One token a program: the k largest of packed (score, id) keys by Triton's bitonic top-k."""
    token = tl.program_id(0).to(tl.int64)
    item = tl.arange(0, size)
    bits = tl.load(scores + token * size + item).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (ordered.to(tl.int64) << 32) | (size - 1 - item).to(tl.int64)
    best = tl.topk(key, k)
    tl.store(ids + token * k + tl.arange(0, k), size - 1 - (best & 0xFFFFFFFF))


def product_variants():
    """(tokens, warps, most registers) of a program of products: what a GPU may prefer."""
    return [(2, 4, 168), (2, 4, 128), (2, 2, 255), (1, 2, 168), (4, 8, 128), (2, 8, 128)]


def weighed():
    """(name, Launch) of other ways to do level 1 of 10,16,0;15,32,256."""
    sae = cayley.CayleySAE(1024, "10,16,0;15,32,256")
    _, _, _, products, picks = cayley_triton.level_launches(tuple(sae.plan))[1]
    found = []
    for tokens, warps, registers in product_variants():
        kept = (tokens, warps, registers) == (products.tokens, products.warps, products.maxnreg)
        name = f"products, {16 * tokens} rows, {warps} warps, {registers} registers"
        constants = {**products.constants, "tokens": tokens}
        launch = Launch(products.kernel, constants, tokens, warps, registers)
        found.append((name + " (kept)" * kept, launch))
    found.append(("top-k: bisection in the best of 8 (kept)", picks))
    constants = {**picks.constants, "group": 1, "parts": picks.constants["padded_k"]}
    found.append(("top-k: bisection in all 4,096", Launch(picks.kernel, constants, warps=4)))
    for warps in (1, 4):
        bitonic = Launch(bitonic_pick, {"size": 4096, "k": 32}, warps=warps)
        found.append((f"top-k: bitonic, {warps} warps", bitonic))
    return found


def compiled(launch, capability):
    """A Launch compiled for sm_<capability>, by Triton."""
    kernel = launch.kernel
    short = {"bfloat16": "bf16", "float32": "fp32"}[dtype]
    types = iter(TYPES[kernel.fn.__name__].replace("*x", f"*{short}").split())
    signature = {}
    attributes = {}
    for place, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in launch.constants else next(types)
        if signature[name].startswith("*"):  # PyTorch's allocations are aligned
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=launch.constants, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=launch.options())


def cuobjdump(binary, flag):
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(tool), flag, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resources(binary):
    """Registers a thread and bytes of stack: spills."""
    text = cuobjdump(binary, "-res-usage")
    registers = int(re.search(r"REG:(\d+)", text).group(1))
    return registers, int(re.search(r"STACK:(\d+)", text).group(1))


def instructions(binary):
    """[(address, text)] of a kernel's SASS."""
    found = []
    for line in cuobjdump(binary, "-sass").splitlines():
        match = re.match(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", line)
        if match:
            found.append((int(match.group(1), 16), match.group(2).strip()))
    return found


def loops(code):
    """[(first, last) addresses] of the loops: branches back, but for the last one to itself."""
    found = []
    for address, text in code:
        match = re.search(r"\bBRA\S*\s.*?(0x[0-9a-f]+)", text)
        if match and int(match.group(1), 16) < address:
            found.append((int(match.group(1), 16), address))
    return sorted(found)


def trips(launch, K):
    """How often the loops of a kernel run, the outer first."""
    constants = launch.constants
    if launch.kernel is cayley_triton.pick:
        return [ROUNDS, ROUNDS]
    if launch.kernel is cayley_triton.project_atoms:
        return [K // 4, K % 4]  # it is unrolled
    if launch.kernel is cayley_triton.block_products:
        steps = -(-constants["heads"] // constants["step"])
        return [constants["tails"], steps] if steps > 1 else [constants["tails"]]
    return [-(-K // constants.get("step", 1))]


def token_instructions(launch, code, found, K):
    """Warp instructions a token, or "" where the compiler has changed the loops."""
    counts = trips(launch, K) if found else []
    if len(found) > len(counts):
        return ""
    total = 0
    for address, _ in code:
        times = 1
        for (first, last), count in zip(found, counts):
            if first <= address <= last:
                times *= count
        total += times
    return round(total * launch.warps / launch.tokens)


def row(name, launch, capability, K):
    """What there is to know of one kernel, as a dict."""
    kernel = compiled(launch, capability)
    registers, stack = resources(kernel.asm["cubin"])
    code = instructions(kernel.asm["cubin"])
    sizes = []
    for first, last in loops(code):
        sizes.append(sum(first <= address <= last for address, _ in code))
    shared = kernel.metadata.shared
    threads = 32 * launch.warps
    by_registers = REGISTERS // (threads * -(-registers // 8) * 8)
    by_shared = SHARED_BYTES[capability] * 1024 // (shared + 1024)  # 1 KiB is the system's
    return {
        "kernel": name,
        "sm": capability,
        "tokens": launch.tokens,
        "warps": launch.warps,
        "registers": registers,
        "stack": stack,
        "shared bytes": shared,
        "blocks": min(by_registers, by_shared, 2048 // threads, 32),
        "instructions": len(code),
        "loops": " ".join(map(str, sizes)),
        "a token": token_instructions(launch, code, loops(code), K),
    }


def main():
    configure(globals())
    work = []
    for text in [levels] if levels else RECIPES:
        found, K = launches(text)
        work += [(text, name, launch, K) for name, launch in found]
    capabilities = [int(capability) for capability in arch.split(",")]
    if designs:
        work = [("10,16,0;15,32,256", name, launch, 48) for name, launch in weighed()]
        capabilities = [80]
    rows = []
    for text, name, launch, K in work:
        for capability in capabilities:
            values = {"levels": text, **row(name, launch, capability, K)}
            rows.append(values)
            print(", ".join(f"{key} {value}" for key, value in values.items()), flush=True)
    if csv_file:
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        write_text(csv_file, table.getvalue())
    spilled = [values["kernel"] for values in rows if values["stack"]]
    if spilled and not designs:
        raise ValueError(f"these kernels spill: {', '.join(sorted(set(spilled)))}")


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main()
