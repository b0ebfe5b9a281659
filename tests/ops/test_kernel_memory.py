"""The kernels read and write nothing but their operands: their own C test, under the sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
SOURCES = [FOLDER / "check_kernels.c", *sorted((FOLDER.parents[1] / "mono_quant_fx/ops/kernels").glob("*.c"))]
FLAGS = ["-std=gnu11", "-O1", "-g", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


@pytest.mark.slow
def test_no_kernel_leaves_its_buffers(tmp_path):
    compiler = shutil.which("gcc")
    if compiler is None:
        if os.environ.get("CI"):
            pytest.fail("gcc is needed in CI")
        pytest.skip("no gcc")
    binary = tmp_path / "check"
    subprocess.run([compiler, *FLAGS, "-o", binary, *SOURCES, "-lm"], check=True)
    done = subprocess.run([binary], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(" paths, 0 wrong\n")
