"""Rows of the accuracy benchmark in a file of JSON lines, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.accuracy_settings import MODELS, Setting

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = Path.home() / ".cache/mono_quant_fx/accuracy.jsonl"


@dataclass(frozen=True)
class Row:
    """One cell's figures; one that was not measured is None.

    Attributes:
        model, setting, digest: the key; the digest is of what decides the figures (see digest()).
        environment: date, CPU, threads, versions.
        wall_seconds: of the whole cell, loading and evaluation included.
        error: why there are no figures, in one line; "" where there are.
        value, standard_error: of the model's metric.
        sqnr_db: of the model's output on batches that calibration does not see.
        local_sqnr_db: median over the quantized nodes of the SQNR of a node quantized alone.
        bits: stored bits a weight, scales and zero points included, over the weights of `schemes`.
        schemes: scheme -> number of weights, over all weights that mono_quant_fx quantizes.
        seconds: of quantization alone; table_seconds: the part of it that filled the accuracy table.
        peak_bytes: resident memory at its peak, beyond the process with model and data loaded.
    """

    model: str
    setting: str
    digest: str
    environment: dict[str, str]
    wall_seconds: float
    error: str = ""
    value: float | None = None
    standard_error: float | None = None
    sqnr_db: float | None = None
    local_sqnr_db: float | None = None
    bits: float | None = None
    schemes: dict[str, int] = field(default_factory=dict)
    seconds: float | None = None
    table_seconds: float | None = None
    peak_bytes: int | None = None


class Cache:
    """The rows of a file; the last one of a cell counts."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[tuple[str, str], Row] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                row = Row(**json.loads(line))
            except (ValueError, TypeError):
                continue  # a line that an interruption cut, or one of an older form
            self.rows[row.model, row.setting] = row

    def add(self, row: Row) -> None:
        """Appends a row to the file, on a line of its own even after a line that was cut."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut = self.path.exists() and self.path.read_bytes()[-1:] not in (b"\n", b"")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if cut else "") + json.dumps(dataclasses.asdict(row)) + "\n")
        self.rows[row.model, row.setting] = row

    def holds(self, model: str, setting: str, digest: str) -> bool:
        """Whether the cell has figures of this digest; a row that holds an error is tried again."""
        row = self.rows.get((model, setting))
        return row is not None and row.digest == digest and not row.error


def digest(model: str, setting: Setting) -> str:
    """Of the setting, of the sources that measure it, of torch, and of what quantizes: our sources, or a version."""
    measuring = [ROOT / "tests/benchmarks" / f"{name}.py" for name in ("accuracy_cell", "peers", "tiny_models")]
    loaders = sorted((ROOT / "tests/real_models").glob("*.py")) if model in MODELS else []
    ours = [*(ROOT / "mono_quant_fx").rglob("*.py"), *(ROOT / "passes").glob("*.py")] if setting.is_ours else []
    words = [model, repr(setting), torch.__version__, "" if setting.is_ours else version(setting.package)]
    return _hash(words, [*measuring, *loaders, *sorted(ours)])


def _hash(words: Iterable[str], files: Iterable[Path]) -> str:
    found = hashlib.sha256(json.dumps(list(words)).encode())
    for file in files:
        found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()[:16]


def version(package: str) -> str:
    """The installed version of a distribution, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def environment(setting: Setting, threads: int, date: str) -> dict[str, str]:
    """What a row says of where it was made."""
    return {
        "date": date,
        "cpu": cpu(),
        "threads": str(threads),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "package": f"{setting.package} {version(setting.package)}",
    }


def cpu() -> str:
    """The processor's name and its widest vector instructions, as Linux tells them."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    found = {key.strip(): value.strip() for key, value in lines.items()}
    wide = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_int8")
    flags = [flag for flag in wide if flag in found.get("flags", "").split()]
    return f"{found.get('model name', platform.machine())} ({', '.join(flags)})"


def time_left(cache: Cache, cells: list[tuple[str, Setting]]) -> float | None:
    """Seconds that the cells will take: what each took last, else the mean of its model; None with nothing to go by."""
    total = 0.0
    for model, setting in cells:
        known = cache.rows.get((model, setting.name))
        like: list[Any] = [row for row in cache.rows.values() if row.model == model and not row.error]
        if known is None and not like:
            return None
        total += known.wall_seconds if known is not None else sum(row.wall_seconds for row in like) / len(like)
    return total
