"""cayley_triton.py without a GPU: in the interpreter, and compiled for GPUs that aren't here."""
import csv
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, ROOT

pytest.importorskip("triton", reason="Triton isn't installed: CUDA builds of PyTorch bring it")


def run(*command):
    environment = {**ENVIRONMENT, "PYTHONWARNINGS": "ignore"}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_kernels_equal_the_definition_and_the_cpu_in_the_interpreter():
    """Ids, codes, outputs, gradients of 11 shapes; ties, 16-bit inputs, the start's check."""
    output = run(ROOT / "tests" / "triton_program.py")
    assert output.count(" many\n") == 11 and output.endswith("compiled\n")
    assert output.count(" few\n") == 3  # by the launches for few tokens


@pytest.mark.parametrize("arch, levels, few", [
    ("80,90,100,120", "11,16,0;15,32,256;17,64,256", False),
    ("80,120", "10,16,0;15,32,256;17,64,256", False),
    ("80,90", "11,16,0;15,32,256;17,64,256", True),
])
def test_kernels_compile_without_spills_and_leave_room_for_two_blocks(tmp_path, arch, levels, few):
    """The three levels' plans hold the two levels' kernels as well."""
    table = tmp_path / "table.csv"
    script = ROOT / "records" / "kernels" / "compiled.py"
    run(script, f"--arch={arch}", f"--levels={levels}", f"--few={few}", f"--csv_file={table}")
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 * len(arch.split(","))
    for row in rows:
        assert row["stack"] == "0", row
        assert int(row["blocks"]) >= 2, row
