"""What a quantized model's file, or any safetensors file, says about itself: from its header alone."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from mono_quant_fx.accuracy.info import QuantizationInfo
from mono_quant_fx.accuracy.row import AccuracyRow, kib
from mono_quant_fx.accuracy.table import AccuracyTable
from mono_quant_fx.cli.rendering import CommandError, Grid, Part, Report, cleaned, printable, size
from mono_quant_fx.config import QuantConfig
from mono_quant_fx.files.header import DTYPE_NAMES
from mono_quant_fx.files.json_records import to_plain
from mono_quant_fx.files.reader import TensorFile
from mono_quant_fx.storage.loading import Header, read_header
from mono_quant_fx.storage.result import QuantizationResult, output_figure
from mono_quant_fx.storage.saving import DIGESTS, KEY

THRESHOLD = (
    "exit with 1 when the model output has less SQNR than X dB, or, where no calibration data measured it, when the "
    "worst quantized weight has"
)


def inspect_file(path: Path, with_tensors: bool) -> tuple[Report, AccuracyTable | None]:
    """All that the header of a file says; the table is None for a safetensors file of another origin."""
    with TensorFile(path) as file:
        if KEY not in file.metadata:
            return _plain_file(file), None
        header = read_header(file)
        report = model_report(header.table, header.info, header.config)
        extra: tuple[Part, ...] = (_schemes(header.table), _skips(header), _settings(header), *_warnings(header.info))
        if with_tensors:
            extra += (_tensors(file),)
        data = {
            "file": str(path),
            "file_bytes": path.stat().st_size,
            "format_version": header.format_version,
            "versions": header.versions,
            "captured_by": header.capture.method,
            "holds_graph": header.graph is not None,
            **report.data,
            "tensors": _tensor_data(file),
            "tied": header.tied,
        }
        return dataclasses.replace(report, before=(_title(file, header),), after=report.after + extra, data=data), (
            header.table
        )


def result_report(result: QuantizationResult) -> Report:
    """The table and the figures of what quantize returned."""
    return model_report(result.accuracy, result.info, result.config)


def model_report(table: AccuracyTable, info: QuantizationInfo, config: QuantConfig) -> Report:
    """The table, and the figures below it."""
    shown = dataclasses.replace(
        cleaned(table), rows=tuple(map(cleaned, table.rows)), outputs=tuple(map(cleaned, table.outputs))
    )
    output = output_figure(shown) if table.samples else "not measured (no calibration or evaluation data)"
    summary = (
        f"{len(info.quantized_layers)} layers quantized, {len(info.skipped_layers)} skipped; "
        f"{size(info.original_bytes)} -> {size(info.quantized_bytes)} ({info.compression_ratio:.2f}x); "
        f"model output SQNR: {output}"
    )
    rows = [dataclasses.asdict(row) for row in table.rows]
    totals = {
        "bytes_before": table.bytes_before,
        "bytes_after": table.bytes_after,
        "samples": table.samples,
        "measured_on": table.measured_on,
        "outputs": [dataclasses.asdict(figure) for figure in table.outputs],
    }
    data = {
        "config": to_plain(config),
        "rows": rows,
        "total": {**totals, "output_sqnr_db": table.output_sqnr_db},
        "info": dataclasses.asdict(info),
    }
    return Report(shown, data, after=(summary,))


def figure(table: AccuracyTable) -> tuple[str, float]:
    """What --fail-below-db judges: a name, and dB. The model output's; where it has none the worst quantized node's,
    and without data the worst quantized weight's.

    Raises:
        CommandError: nothing was measured.
    """
    if table.output_sqnr_db is not None:
        return "the model output", table.output_sqnr_db
    known = [
        (row.local_sqnr_db, f"the output of node {row.node}") for row in table.rows if row.local_sqnr_db is not None
    ]
    if not known:
        known = [(row.weight_sqnr_db, f"weight {row.weight}") for row in table.rows if row.weight_sqnr_db is not None]
    if not known:
        raise CommandError("--fail-below-db: the table has no figure to judge; no weight was quantized")
    least, name = min(known, key=lambda pair: (pair[0] == pair[0], pair[0]))  # NaN is the worst
    return printable(name), least


def verdict(table: AccuracyTable, least: float | None) -> str | None:
    """Why the table does not pass a threshold; None where it does, or there is none."""
    if least is None:
        return None
    name, found = figure(table)
    return None if found >= least else f"{name} has {found:.2f} dB, below {least:g} dB"


def _title(file: TensorFile, header: Header) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in header.versions.items())
    graph = "with its graph" if header.graph is not None else "load it with the float model"
    return (
        f"{file.path}: {size(file.path.stat().st_size)}, {len(file.entries)} tensors, format version "
        f"{header.format_version} ({versions}); {graph}"
    )


def _schemes(table: AccuracyTable) -> Grid:
    def total(rows: list[AccuracyRow]) -> list[str]:
        return [str(len(rows)), kib(sum(r.bytes_before for r in rows)), kib(sum(r.bytes_after for r in rows))]

    rows = [row for row in table.rows if row.bytes_before]
    counts = Counter(row.scheme for row in rows)
    body = [[scheme, *total([r for r in rows if r.scheme == scheme])] for scheme, _ in counts.most_common()]
    return Grid("schemes", ("scheme", ">weights", ">KiB", ">KiB after"), body)


def _skips(header: Header) -> Grid:
    return Grid("skipped", ("name", "reason"), list(header.info.skipped_layers.items()))


def _settings(header: Header) -> str:
    fields = dataclasses.fields(QuantConfig)
    changed = [f.name for f in fields if getattr(header.config, f.name) != f.default]
    words = ", ".join(f"{name}={getattr(header.config, name)!r}" for name in changed)
    return f"settings: {words or 'as by default'}" + (" (the others as by default)" if changed else "")


def _warnings(info: QuantizationInfo) -> tuple[str, ...]:
    lines = [f"warning: {printable(text)}" for text in info.warnings]
    return ("\n".join(lines),) if lines else ()


def _plain_file(file: TensorFile) -> Report:
    total = sum(entry.nbytes for entry in file.entries.values())
    title = (
        f"{file.path}: {size(file.path.stat().st_size)}, a safetensors file that mono_quant_fx did not write; "
        f"{len(file.entries)} tensors, {size(total)}"
    )
    data = {
        "file": str(file.path),
        "file_bytes": file.path.stat().st_size,
        "metadata": file.metadata,
        "tensors": _tensor_data(file),
    }
    metadata = Grid("metadata", ("key", "value"), [(k, v[:200]) for k, v in file.metadata.items()])
    return Report(dataclasses.replace(_tensors(file), title=""), data, (title,), (metadata,))


def _tensors(file: TensorFile) -> Grid:
    body = [
        (e.name, DTYPE_NAMES[e.dtype], "x".join(map(str, e.shape)) or "scalar", e.nbytes) for e in file.entries.values()
    ]
    return Grid("tensors", ("name", "dtype", ">shape", ">bytes"), body)


def _tensor_data(file: TensorFile) -> list[dict[str, Any]]:
    return [
        {"name": e.name, "dtype": DTYPE_NAMES[e.dtype], "shape": list(e.shape), "bytes": e.nbytes}
        for e in file.entries.values()
        if e.name != DIGESTS
    ]
