"""Says what is missing before a hundred tests fail over it."""

import os
import warnings

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read as torch is loaded: threads that wait sleep, and do not spin

import pytest
import torch

try:
    import mono_quant_fx.passes
except ModuleNotFoundError as e:  # the checkout was found first, and it has no subpackage of that name
    if e.name != "mono_quant_fx.passes":
        raise
    raise pytest.UsageError(
        "mono_quant_fx.passes is mapped from passes/: develop with an editable install, "
        "pip install torch==2.13.0 -e '.[test]'"
    ) from e

from mono_quant_fx.ops import native

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # side by side on the same cores, threads of each would wait for those of the other
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _kernel(request, monkeypatch):
    """Tests compare figures to the last digit, and pages print them, so torch computes, the same on every machine.

    Real models (slow) run what this machine is fastest with, and tests/ops/test_kernels.py names the path it means.
    """
    path = "auto" if request.node.get_closest_marker("slow") else "torch"
    monkeypatch.setenv(native.VARIABLE, path)
    native.path.cache_clear()
    yield
    native.path.cache_clear()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mono_quant_fx.AccuracyWarning)
        yield
