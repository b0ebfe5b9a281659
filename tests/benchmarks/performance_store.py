"""Figures of the benchmarks `linear` and `decode`, kept in a file until docs/performance.md is written from them."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.accuracy_cache import ROOT, cpu, version

DEFAULT = Path.home() / ".cache/mono_quant_fx/performance.json"
PAGE = ROOT / "docs/performance.md"


@dataclass(frozen=True)
class Section:
    """What one measurement found.

    Attributes:
        figures: plain data, as the page reads it.
        environment: date, CPU, threads, versions.
    """

    figures: dict[str, Any]
    environment: dict[str, str]


class Store:
    """Key -> Section, in a JSON file; a section that is measured again replaces the one before."""

    def __init__(self, path: Path):
        self.path = path
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.sections = {key: Section(**section) for key, section in found.items()}

    def add(self, key: str, figures: dict[str, Any], packages: Iterable[str] = ()) -> None:
        """Notes a section and writes the file."""
        self.sections[key] = Section(figures, environment(packages))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({k: asdict(s) for k, s in self.sections.items()}, indent=1), encoding="utf-8")
        partial.replace(self.path)


def environment(packages: Iterable[str] = ()) -> dict[str, str]:
    """What a section says of where it was made; a package that is not installed is left out."""
    versions = {package: version(package) for package in ("mono_quant_fx", *packages)}
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": ", ".join(f"{name} {v}" for name, v in versions.items() if v != "not installed"),
    }
