"""
Python's part of a layer on a GPU, without one: launches are stubbed, and tensors are on the CPU.

    OMP_NUM_THREADS=1 python records/kernels/host_time.py
    OMP_NUM_THREADS=1 python records/kernels/host_time.py --checkout=/path/to/another

Microseconds, the least of several repeats, of select and combine by cayley_triton.py up to where
Triton's launcher would call the driver, on one token, as sampling calls them.
"""
import os
import sys
import timeit
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sweep import selection

from configurator import configure

# settings, see configurator.py
levels = "10,16,0;15,32,256"
checkout = "."  # the directory whose cayley.py and cayley_triton.py are timed
capability = 90
number = 200  # calls a repeat
repeats = 15


class NoDriver(DriverBase):
    """A GPU that compiles for a capability and takes launches without doing anything."""

    class utils:
        @staticmethod
        def load_binary(*_):
            return "module", "function", 0, 0, 1024

        @staticmethod
        def get_device_properties(_):
            return {"max_shared_mem": 232448}

        @staticmethod
        def unload_module(_):
            pass

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        return GPUTarget("cuda", capability, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 0

    def launcher_cls(self, *_):
        return lambda *_: None


def main():
    configure(globals())
    sys.path.insert(0, checkout)
    triton.runtime.driver.set_active(NoDriver())
    import cayley
    import cayley_triton
    torch.set_num_threads(1)
    torch.Tensor.new_empty = torch.Tensor.new_zeros  # ids that no kernel wrote would be none
    sae = cayley.CayleySAE(2 ** int(levels.split(",")[0]), levels).eval()
    x = torch.randn(1, sae.n_embd).bfloat16()
    ids = torch.zeros(1, sum(level.k for level in sae.levels), dtype=torch.int64)
    weights = torch.zeros(ids.shape, dtype=x.dtype)
    calls = {
        "select": selection(cayley_triton, sae, x),
        "combine": lambda: cayley_triton.combine(ids, weights, sae.t, sae.n),
    }
    if hasattr(cayley_triton, "register"):
        cayley_triton.register("cpu")
    else:
        cayley.TRITON_DEVICES = ("cpu",)
        cayley.use_kernels("triton")

    calls["layer"] = lambda: sae(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for name, call in calls.items():
            call()  # compiles, and makes tables
            times = timeit.repeat(call, number=number, repeat=repeats)
            print(f"{name}: {1e6 * min(times) / number:.0f} us")


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main()
