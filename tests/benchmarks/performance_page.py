"""docs/performance.md from the sections that the benchmarks `linear` and `decode` keep.

python -m tests.benchmarks.performance_page writes it from what they kept last, and measures nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.accuracy_page import number, table
from tests.benchmarks.accuracy_settings import OURS
from tests.benchmarks.performance_linear import linear_part, linear_summary, linear_text
from tests.benchmarks.performance_models import (
    memory_text,
    minilm_text,
    models_part,
    models_summary,
    profile_text,
    smollm2_text,
)
from tests.benchmarks.performance_store import DEFAULT, PAGE, Section, Store

__all__ = ["PARTS", "linear_text", "page", "write"]

#: Section of `decode` -> its text.
PARTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "smollm2": smollm2_text, "profile": profile_text, "memory": memory_text, "minilm": minilm_text,
}  # fmt: skip

INTRODUCTION = """\
# Performance

Written by `python -m tests.benchmarks.linear --page` and `python -m tests.benchmarks.decode --page` (extra `[bench]`):
run them to make this page anew, and do not edit it.
"""

METHOD = """\
All contestants of a table run in one process and take turns, on as many threads; a figure is the median of its calls.
Ratios travel between machines better than times do, and "1.50x" always means that mono_quant_fx is 1.5 times as fast;
below 1 it is slower.
"""

EXAMPLE = """\
### What a call reads

What there is to gain for a few rows of x is what a call need not read:

```python
import torch
import mono_quant_fx as mq
from mono_quant_fx import ops

weight = torch.randn(4096, 4096)
stored = mq.quantize_weight_int4(weight, 128)
read = sum(part.nbytes for part in stored if part is not None)
print(f"float32 {weight.nbytes / 2**20:.0f} MiB, bfloat16 {weight.nbytes / 2**21:.0f}, INT4 {read / 2**20:.1f}")
y = ops.int4_linear(torch.randn(1, 4096), *stored, None, 128)
print(tuple(y.shape))
```

```text
float32 64 MiB, bfloat16 32, INT4 8.5
(1, 4096)
```
"""

NEXT = "Next: [torch.compile, export and AOTInductor](compile.md)."


def write(path: Path, store: Store) -> None:
    """The page, from all sections that the store has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(store.sections), encoding="utf-8")
    print(f"wrote {path}")


def page(sections: Mapping[str, Section]) -> str:
    """The whole page; what was not measured is named at its end."""
    figures = {key: section.figures for key, section in sections.items()}
    parts = [INTRODUCTION, _conditions(list(sections.values())), METHOD, _summary(figures)]
    parts += [linear_part(figures), EXAMPLE]
    parts += [_paths(figures), _overhead(figures), models_part(figures), _gaps(figures), NEXT]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts if part)


def _summary(figures: Mapping[str, Any]) -> str:
    lines = linear_summary(figures) + models_summary(figures)
    return "## In short\n\n" + "\n".join(lines) + "\n" if lines else ""


def _conditions(sections: list[Section]) -> str:
    def all_of(key: str) -> str:
        return " and ".join(sorted({s.environment[key] for s in sections}))

    packages = sorted({p for s in sections for p in s.environment["packages"].split(", ") if not p.startswith(OURS)})
    ours = sorted({p for s in sections for p in s.environment["packages"].split(", ") if p.startswith(OURS)})
    return (
        f"Measured {all_of('date')}; CPU {all_of('cpu')}, threads: {all_of('threads')}; Python {all_of('python')}, "
        f"torch {all_of('torch')}; {', '.join(ours + packages)}.\n"
    )


def _paths(figures: Mapping[str, Any]) -> str:
    found = {key.removeprefix("path "): f for key, f in figures.items() if key.startswith("path ")}
    if not found:
        return ""
    rows = list(next(iter(found.values()))["milliseconds"])
    lines = []
    for count in rows:
        cells = [found[path]["milliseconds"][count] for path in found]
        lines.append([count, *(_path_cell(cell) for cell in cells)])
    some = next(iter(found.values()))
    return (
        "### Other CPUs\n\nThe paths of [Kernels](kernels.md) that this machine can run but does not take, each forced "
        f"in a process of its own: milliseconds, and against F.linear in float32 in the same process. float32 x, "
        f"{some['shape']}, groups of {some['group_size']}.\n\n" + table(lines, ["M", *found])
    )


def _path_cell(taken: Mapping[str, float]) -> str:
    plain = [each for name, each in taken.items() if name != OURS]
    return f"{number(taken[OURS], 2)} ({number(plain[0] / taken[OURS], 2)}x)" if plain else number(taken[OURS], 2)


def _overhead(figures: Mapping[str, Any]) -> str:
    if "overhead" not in figures:
        return ""
    found = figures["overhead"]["microseconds"]
    lines = [
        (dtype, number(each[OURS], 1), number(each["F.linear"], 1), number(each[OURS] - each["F.linear"], 1))
        for dtype, each in found.items()
    ]
    return (
        "### What a call costs when there is nothing to compute\n\nMicroseconds of 1 x 64 by 64 x 64:\n\n"
        + table(lines, ("x", OURS, "F.linear", "more"))
    )  # fmt: skip


def _gaps(figures: Mapping[str, Any]) -> str:
    wanted = {"overhead": "the cost of a call", "linear float32": "linears with float32 x", "smollm2": "SmolLM2",
              "profile": "where the time of a token goes", "memory": "resident memory", "minilm": "MiniLM"}  # fmt: skip
    absent = [text for key, text in wanted.items() if key not in figures]
    if not any(key.startswith("linear ") and key != "linear float32" for key in figures):
        absent.insert(0, "linears")
    return f"## What is left to measure\n\n{', '.join(absent)}\n" if absent else ""


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.performance_page", description=__doc__)
    parser.add_argument("--cache", type=Path, default=DEFAULT, help=f"the kept figures; default: {DEFAULT}")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/performance.md")
    options = parser.parse_args()
    write(options.page, Store(options.cache))


if __name__ == "__main__":
    main()
