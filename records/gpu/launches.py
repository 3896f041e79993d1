"""
Kernels that a decoding step launches, counted without a GPU: on PyTorch's meta device.

    python records/gpu/launches.py
    python records/gpu/launches.py --checkout=/path/to/another

Of every operator that PyTorch dispatches, views and allocations left out, per layer: how many
launches, and the bytes of their arguments and results but weights. cayley_triton.py's operators
count as the kernels that they start: two a level for select, one for combine; their bytes are those
that the kernels touch for one token, not whole tables.
"""
import sys
from collections import Counter
from pathlib import Path

# a script here can't see the repository's top otherwise
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from configurator import configure

# settings, see configurator.py
checkout = "."  # the directory whose model.py and cayley.py are counted
n_layer = 3  # the same with one fewer is subtracted

LEVELS = {
    "dense": "",
    "2L": "10,16,0;15,32,256",
    "3L": "10,16,0;15,32,256;17,64,256",
}
ALLOCATIONS = ("empty", "new_empty", "detach", "_to_copy.meta", "lift_fresh", "empty_like")


def select_bytes(plan):
    """Scores, best scores and choices of a token: products written and read, scale and offset."""
    total = 0
    slots = 1
    for n, k, m in zip(plan[::3], plan[1::3], plan[2::3]):
        candidates = 2**n if m == n else slots * 2**m
        total += candidates * (4 * 3) + 2 * 4 * candidates // 8  # product, scale, offset; best
        total += 8 * k * (4 * 6 + 8 + 4)  # candidates of the second search, codes, leaves
        slots = k
    return total


class Launches(TorchDispatchMode):
    """Counts launches by operator, and bytes."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        name = str(function)
        short = function.overloadpacket.__name__
        if function.is_view or short in ALLOCATIONS or "view" in short:
            return result
        if name.startswith("cayley.select"):
            self.counts[name] += 2 * len(arguments[-1]) // 3
            self.bytes += select_bytes(arguments[-1])
            return result
        self.counts[name] += 1
        if short == "index_copy_":  # a position of the cache
            return result
        results = result if isinstance(result, (tuple, list)) else [result]
        for tensor in (*arguments, *results):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, torch.nn.Parameter):
                weight = name.startswith(("aten.mm", "aten.addmm")) and tensor.numel() > 2**17
                self.bytes += 0 if weight else tensor.numel() * tensor.element_size()
        return result


def fused_norm(norm, x):
    """Stands for nn.RMSNorm's forward, of which CUDA makes one kernel: another norm of one."""
    return torch.native_layer_norm(x, norm.normalized_shape, norm.weight, None, norm.eps)[0]


def counted(levels, layers):
    """Launches of a decoding step of the reference's width, of one sequence."""
    from model import GPT, DecodingStep, GPTConfig, KVCache
    config = GPTConfig(n_layer=layers, cayley_levels=levels)
    with torch.device("meta"), torch.no_grad():
        model = GPT(config).eval()
        step = DecodingStep(model, KVCache(config, 1, torch.device("meta"), torch.float32))
        step.constants = [sae.terms() for sae in model.saes() if hasattr(sae, "terms")]
        with Launches() as launches:
            step.run()
    return launches


def main():
    configure(globals())
    sys.path.insert(0, checkout)
    torch.nn.RMSNorm.forward = fused_norm
    for name, levels in LEVELS.items():
        more, fewer = counted(levels, n_layer), counted(levels, n_layer - 1)
        a_layer = more.counts - fewer.counts
        rest = fewer.counts.total() - (n_layer - 1) * a_layer.total()
        megabytes = (more.bytes - fewer.bytes) / 1e6
        print(f"{name}: {a_layer.total()} launches a layer, {rest} besides; "
              f"{megabytes:.2f} MB a layer but weights")
        print("    " + ", ".join(f"{key.split('.')[1]} {n}" for key, n in a_layer.items()))


if __name__ == "__main__":
    main()
