"""fork after use: the child computes with one thread, where it waited for threads that only the parent has."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import mono_quant_fx as mq
from mono_quant_fx import ops
from mono_quant_fx.ops import forking, native

ROOT = Path(__file__).resolve().parents[2]
PATHS = native.kernels().available
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@needs_fork
def test_every_operator_returns_in_a_forked_child():
    """Each of them hung for ever."""
    check_children(PATHS[-1], "used")


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("how", ["used", "fresh"])
def test_every_operator_returns_in_a_forked_child_on_every_path(path, how):
    check_children(path, how)


def check_children(path, how):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), native.VARIABLE: path, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.forked_calls", how],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == 13 and all(line.endswith("-> exit 0") for line in lines), done.stdout + done.stderr


@pytest.fixture
def lost(monkeypatch):
    """As in a child whose parent had threads; torch's own number comes back afterwards."""
    before = torch.get_num_threads()
    monkeypatch.setattr(forking, "_state", forking._State())
    monkeypatch.setattr(forking, "_has_threads_of_others", lambda: True)
    forking._before()
    forking._in_child()
    yield
    torch.set_num_threads(before)


def test_the_first_operator_sets_one_thread_and_says_so_once(lost):
    torch.set_num_threads(2)
    packed, scale, _ = mq.quantize_weight_int4(torch.randn(16, 64), 32)
    with pytest.warns(mq.PerformanceWarning, match="forked after its parent had used several threads"):
        ops.dequantize_int4(packed, scale, None, 32, 64)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)  # the user's word on torch holds, and kernels keep to one
    ops.dequantize_int4(packed, scale, None, 32, 64)
    assert torch.get_num_threads() == 2 and forking.threads() == 1


def test_a_process_that_lost_nothing_keeps_its_threads(monkeypatch):
    monkeypatch.setattr(forking, "_state", forking._State())
    monkeypatch.setattr(forking, "_has_threads_of_others", lambda: False)
    forking._before()
    forking._in_child()
    assert forking.threads() == torch.get_num_threads()


@pytest.mark.skipif(not Path(forking._TASKS).exists(), reason="no list of tasks here")
def test_threads_of_python_are_not_counted_as_others():
    before, stop = forking._has_threads_of_others(), threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    assert forking._has_threads_of_others() == before
    stop.set()
    thread.join()


def test_where_nobody_tells_threads_count_as_lost(monkeypatch):
    monkeypatch.setattr(forking, "_TASKS", "/no/such/folder")
    assert forking._has_threads_of_others()
