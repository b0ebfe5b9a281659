"""One cell of the accuracy benchmark: python -m tests.benchmarks.accuracy_cell MODEL SETTING THREADS

Prints the figures (or the error, in one line) as JSON on its last line. Each cell has a process of its own, so that its
peak memory is its own, and so that a package that crashes costs one row.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.numerics.error import ErrorSum
from tests.benchmarks import peers
from tests.benchmarks.accuracy_cache import ROOT
from tests.benchmarks.accuracy_settings import BY_NAME, SEED, Setting, Workload, workload
from tests.benchmarks.memory import resident, settle

T = TypeVar("T")
Figures = dict[str, Any]


def measure(model: str, setting: Setting, threads: int) -> Figures:
    """The figures of one cell, under the names of accuracy_cache.Row.

    Raises:
        Whatever the loader or the package raises.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    work = workload(model)
    if setting.kind == "float":
        return _judged(work, work.load())
    return _ours(work, setting) if setting.is_ours else _theirs(work, setting)


def _judged(work: Workload, model: nn.Module) -> Figures:
    value, standard_error = work.evaluate(model)
    return {"value": value, "standard_error": standard_error}


def _metered(call: Callable[[], T]) -> tuple[T, Figures]:
    """What the call returns, its seconds, and its peak of resident memory beyond what was resident before."""
    settle()
    before, start = resident("VmRSS"), time.perf_counter()
    value = call()
    return value, {"seconds": time.perf_counter() - start, "peak_bytes": resident("VmHWM") - before}


def _ours(work: Workload, setting: Setting) -> Figures:
    model, batches, unseen = work.load(), work.calibration(), work.unseen()
    options = {**setting.options, "accuracy_warning": "ignore"}
    mq.quantize(nn.Linear(256, 16).eval(), calibration_data=[torch.randn(2, 256)], **options)  # imports, kernels
    result, figures = _metered(
        lambda: mq.quantize(
            model,
            calibration_data=batches,
            evaluation_data=unseen,
            num_calibration_samples=work.NUM_SAMPLES,
            **options,
        )
    )
    stored = [row for row in result.accuracy.rows if row.scheme.startswith("int") and row.bytes_after]
    weights: Counter[str] = Counter()
    for row in stored:
        weights[row.scheme] += torch.Size(row.shape).numel()
    local = [row.local_sqnr_db for row in result.accuracy.rows if row.local_sqnr_db is not None]
    return {
        **figures,
        **_judged(work, result.graph_module),
        "table_seconds": result.info.seconds["accuracy"],
        "sqnr_db": result.info.sqnr_db,
        "local_sqnr_db": statistics.median(local),
        "bits": 8 * sum(row.bytes_after for row in stored) / weights.total(),
        "schemes": dict(weights),
    }


def _theirs(work: Workload, setting: Setting) -> Figures:
    model, batches = work.load(), work.calibration()
    plan = peers.weight_plan(model, batches[0], setting.options["group_size"])
    convert = peers.CONVERT[setting.package]
    tiny = nn.Sequential(nn.Linear(256, 16)).eval()
    convert(tiny, {"0": mq.QuantScheme(4, setting.options["group_size"])}, setting.options)
    with torch.no_grad():
        tiny(torch.randn(2, 256))  # imports, kernels that are compiled at first use
    sizes = {path: model.get_submodule(path).weight.numel() for path in plan}  # type: ignore[operator, union-attr]
    paths, figures = _metered(lambda: convert(model, plan, setting.options))
    weights: Counter[str] = Counter()
    for path, scheme in plan.items():
        converted = f"int{scheme.bits} {f'g{scheme.group_size}' if scheme.bits == 4 else 'channel'}"
        weights[converted if path in paths else "float32"] += sizes[path]
    stored = sum(peers.stored_bytes(model.get_submodule(path)) for path in plan)
    return {
        **figures,
        **_judged(work, model),
        "sqnr_db": _output_sqnr(work.load(), model, work.unseen()),
        "bits": 8 * stored / weights.total(),
        "schemes": dict(weights),
    }


def _output_sqnr(reference: nn.Module, model: nn.Module, batches: list[Any]) -> float | None:
    """SQNR of the model's output over all batches that calibration does not see, as QuantizationInfo.sqnr_db has it."""
    total = ErrorSum()
    with torch.no_grad():
        for batch in batches:
            total.add(reference(*batch), model(*batch))
    return total.sqnr_db


def one_line(words: str) -> str:
    """An error's words without line breaks, and without where this environment and these sources lie."""
    for folder, name in ((sys.prefix, "<environment>"), (str(ROOT), "<sources>")):
        words = words.replace(folder, name)
    return " ".join(words.split())


def main() -> None:
    """Runs one cell."""
    model, setting, threads = sys.argv[1:]
    try:
        figures = measure(model, BY_NAME[setting], int(threads))
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # pytest.skip, which a loader raises where a package is missing, is no Exception
        figures = {"error": one_line(f"{type(e).__name__}: {e}")}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
