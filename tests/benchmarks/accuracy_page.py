"""docs/accuracy.md from the rows of the accuracy benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tabulate import tabulate

from tests.benchmarks.accuracy_cache import Row
from tests.benchmarks.accuracy_compare import comparisons, verdicts
from tests.benchmarks.accuracy_settings import BY_NAME, OBSERVERS, OURS, SEED, SETTINGS, W8A8, workload

MIB = 1 << 20

INTRODUCTION = """\
# Accuracy on real models

Written by `python -m tests.benchmarks.accuracy` (extra `[bench]`): run it to make this page anew, and do not edit it.
"""

COLUMNS = """\
The weights and the data come from packages (`tests/real_models/` says which), calibration never sees what is
evaluated, and all settings of a model share its calibration batches. The columns:

| column | |
|---|---|
| metric, ± | on the evaluation data, and its standard error |
| output dB | SQNR of the model's output on batches that calibration does not see |
| local dB | median over the quantized nodes of the SQNR of a node quantized alone; not taken of other packages |
| bits | stored bits a weight, scales and zero points included, over all weights that mono_quant_fx quantizes; what a \
package leaves float counts as 32 |
| seconds | of quantization alone, calibration included; in brackets the part that filled the accuracy table; rough, \
since cells may have run side by side |
| MiB | resident memory at its peak, beyond the process with model and data loaded |

A weight-only setting reads algorithm, symmetry, group size. `w8a8` is INT8 per channel with static INT8 activations and
the observer named; `w4a8` is symmetric INT4 with static INT8 activations (minmax). Everything else is the default: rows
that the group size does not divide get a smaller group, and rows that are shorter than a group are INT8. The other
packages get the same: the same weights at the same group sizes, and the same ones left float. They see no calibration
data, and neither does `rtn`. torchao's intx and 8da4w keep each 4-bit code in a byte here, so their bits are above 8.

Bits a weight follow from the scheme: four for the code, and a float32 scale (and an int8 zero point) a group.
"""

NEXT = "Next: [Explain and bisect](explain.md)."

OUTLIERS = """
SmolLM2 shows what one static scale a tensor cannot do. Of the input of its `blk.11.ffn_down`, 99.9% lies below 1.4, and
one value reaches 3005: in steps of 12 nothing else is left. Leave the inputs of such a model float. torchao's 8da4w,
which finds a scale for each row while the model runs, is ahead there for this reason.
"""

EXAMPLE = """\
```python
import torch
from torch import nn
import mono_quant_fx as mq

model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 128)).eval()
for group_size in (32, 128):
    for symmetric in (True, False):
        rows = mq.quantize(model, group_size=group_size, symmetric=symmetric).accuracy.rows
        weights = sum(torch.Size(row.shape).numel() for row in rows)
        print(rows[0].scheme, 8 * sum(row.bytes_after for row in rows) / weights)
```

```text
int4 g32 sym 5.0
int4 g32 asym 5.25
int4 g128 sym 4.25
int4 g128 asym 4.3125
```
"""


def page(rows: Iterable[Row], models: Sequence[str], stale: set[tuple[str, str]]) -> str:
    """The whole page.

    Args:
        rows: at most one a cell.
        models: their keys, in the order of the page.
        stale: cells whose row was made by other sources than those at hand; the page names them.
    """
    cells = {(row.model, row.setting): row for row in rows}
    shown = [model for model in models if any(m == model for m, _ in cells)]
    parts = [INTRODUCTION, _conditions(list(cells.values())), COLUMNS, EXAMPLE]
    parts += [_model(model, cells) for model in shown]
    parts += [_observers(shown, cells), verdicts(comparisons(shown, cells)), _failures(shown, cells)]
    parts += [_gaps(shown, cells, stale), NEXT]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts if part)


def _conditions(rows: list[Row]) -> str:
    def all_of(key: str) -> str:
        return ", ".join(sorted({row.environment[key] for row in rows}))

    dates = sorted({row.environment["date"] for row in rows})
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return (
        f"Measured {when}; CPU {all_of('cpu')}, threads: {all_of('threads')}; Python {all_of('python')}, "
        f"torch {all_of('torch')}; {_packages(rows)}. Seed {SEED}, set before each cell.\n"
    )


def _packages(rows: list[Row]) -> str:
    packages = {row.environment["package"] for row in rows if not row.environment["package"].startswith("torch ")}
    return ", ".join(sorted(packages, key=lambda name: (not name.startswith(OURS), name)))


def _model(model: str, cells: dict[tuple[str, str], Row]) -> str:
    work = workload(model)
    better = "higher" if work.HIGHER_IS_BETTER else "lower"
    found = [cells[model, s.name] for s in SETTINGS if (model, s.name) in cells]
    lines = [_line(row) for row in found]
    head = ("package", "setting", f"{work.METRIC} ({better} is better)", "±", "output dB", "local dB", "bits",
            "seconds", "MiB")  # fmt: skip
    return f"## {work.NAME}\n\n{table(lines, head)}\n{_schemes(found)}"


def _line(row: Row) -> tuple[str, ...]:
    package = BY_NAME[row.setting].package
    return (
        "" if row.setting == "float" else package,
        row.setting,
        "does not run" if row.error else number(row.value, 3),
        number(row.standard_error, 3),
        number(row.sqnr_db, 1),
        number(row.local_sqnr_db, 1),
        number(row.bits, 2),
        number(row.seconds, 1) + (f" ({number(row.table_seconds, 1)})" if row.table_seconds is not None else ""),
        number(None if row.peak_bytes is None else row.peak_bytes / MIB, 0),
    )


def _schemes(found: list[Row]) -> str:
    """What the weights became, once for the settings that agree on it."""
    settings: dict[str, list[str]] = {}
    for row in found:
        if row.schemes:
            settings.setdefault(shares(row.schemes), []).append(row.setting)
    lines = [f"- {what}: {', '.join(names)}" for what, names in settings.items() if "," in what]
    return "\nWhere not all weights became the same:\n\n" + "\n".join(lines) + "\n" if lines else ""


def shares(schemes: dict[str, int]) -> str:
    """The share of the weights that each scheme has.

    >>> shares({"int8 channel": 10, "int4 g32 sym": 30})
    '75.0 % int4 g32 sym, 25.0 % int8 channel'
    """
    ordered = sorted(schemes.items(), key=lambda item: -item[1])
    return ", ".join(f"{100 * count / sum(schemes.values()):.1f} % {scheme}" for scheme, count in ordered)


def _observers(models: Sequence[str], cells: dict[tuple[str, str], Row]) -> str:
    lines = []
    for observer, setting in zip(OBSERVERS, W8A8, strict=True):
        found = [cells.get((model, setting.name)) for model in models]
        if any(row is not None and not row.error for row in found):
            lines.append((observer, *(_figure(row) for row in found)))
    if not lines:
        return ""
    float_row = ("(float)", *(number(r.value, 3) if (r := cells.get((m, "float"))) else "" for m in models))
    head = ("observer", *(f"{workload(m).NAME}, {workload(m).METRIC}" for m in models))
    text = "INT8 weights and static INT8 activations; the metric, and the output's dB.\n"
    if "smollm2" in models:
        text += OUTLIERS
    return f"## The observers side by side\n\n{text}\n{table([float_row, *lines], head)}"


def _figure(row: Row | None) -> str:
    if row is None or row.error:
        return ""
    return f"{number(row.value, 3)} ({number(row.sqnr_db, 1)} dB)"


def _failures(models: Sequence[str], cells: dict[tuple[str, str], Row]) -> str:
    """In words: each setting that gave an error, and on which models."""
    where: dict[tuple[str, str], list[str]] = {}
    for setting in SETTINGS:
        for model in models:
            row = cells.get((model, setting.name))
            if row is not None and row.error:
                where.setdefault((setting.name, row.error), []).append(model)
    if not where:
        return ""
    lines = [
        f"- {_version(name, cells)}, {name}: `{error.replace('`', '')}` "
        f"({'every model' if len(found) == len(models) else ', '.join(workload(m).NAME for m in found)})"
        for (name, error), found in where.items()
    ]
    return "## What does not run here\n\nThe error, in the package's own words:\n\n" + "\n".join(lines) + "\n"


def _version(setting: str, cells: dict[tuple[str, str], Row]) -> str:
    return next(row.environment["package"] for (_, name), row in cells.items() if name == setting)


def _gaps(models: Sequence[str], cells: dict[tuple[str, str], Row], stale: set[tuple[str, str]]) -> str:
    """What the page lacks: cells without a row, and rows of other sources."""
    absent = {m: [s.name for s in SETTINGS if (m, s.name) not in cells] for m in models}
    lines = [f"- {workload(m).NAME}: not measured: {', '.join(names)}" for m, names in absent.items() if names]
    measured = {m: [s.name for s in SETTINGS if (m, s.name) in cells] for m in models}
    ours = {m: [s.name for s in SETTINGS if s.is_ours and (m, s.name) in cells] for m in models}
    old = {m: [s.name for s in SETTINGS if (m, s.name) in stale] for m in models}
    lines += [
        f"- {workload(m).NAME}: measured with other sources than those beside this page: "
        f"{_all_of(names, {'everything': measured[m], 'all settings of mono_quant_fx': ours[m]})}"
        for m, names in old.items()
        if names
    ]
    return "## What is left to measure\n\n" + "\n".join(lines) + "\n" if lines else ""


def _all_of(names: list[str], whole: dict[str, list[str]]) -> str:
    """The word for all of them where `names` are all; else the names."""
    return next((word for word, all_names in whole.items() if len(names) > 1 and names == all_names), ", ".join(names))


def number(value: float | None, digits: int) -> str:
    """A figure, or nothing where there is none."""
    return "" if value is None else f"{value:.{digits}f}"


def table(lines: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    """A markdown table; figures stand at the right."""
    align = ["left" if name in ("package", "setting", "observer", "model", "reading") else "right" for name in head]
    return tabulate(lines, head, tablefmt="github", colalign=align, disable_numparse=True) + "\n"
