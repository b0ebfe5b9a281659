"""What quantize returns."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from torch import fx

from mono_quant_fx.accuracy.info import QuantizationInfo
from mono_quant_fx.accuracy.table import AccuracyTable
from mono_quant_fx.config import QuantConfig
from mono_quant_fx.errors import PreconditionError
from mono_quant_fx.process.surroundings import in_plain_surroundings
from mono_quant_fx.storage.graph_json.document import graph_to_json
from mono_quant_fx.storage.saving import write_model
from mono_quant_fx.web.page import Shown, details, escape, frame, grid


@dataclass
class QuantizationResult(Shown):
    """A drop-in GraphModule, the table that tells what was done to it, and the figures."""

    graph_module: fx.GraphModule
    accuracy: AccuracyTable
    info: QuantizationInfo
    config: QuantConfig = field(default_factory=QuantConfig, repr=False)

    @property
    def warnings(self) -> list[str]:
        """Same as info.warnings."""
        return self.info.warnings

    def save(self, path: str | os.PathLike[str], *, graph: bool = False) -> None:
        """See mono_quant_fx.save."""
        save(self, path, graph=graph)

    def __str__(self) -> str:
        info = self.info
        output = output_figure(self.accuracy)
        return (
            f"{self.accuracy}\n\n{len(info.quantized_layers)} layers quantized, {len(info.skipped_layers)} skipped; "
            f"{info.original_size_mb:.1f} MB -> {info.quantized_size_mb:.1f} MB ({info.compression_ratio:.2f}x); "
            f"model output SQNR: {output}"
        )

    def _repr_html_(self) -> str:
        return result_html(self)


def output_figure(table: AccuracyTable) -> str:
    """The SQNR of the model's output and what it was measured on, or why there is none."""
    if table.output_sqnr_db is not None:
        on = f" on {table.measured_on}" if table.measured_on else ""
        return f"{table.output_sqnr_db:.1f} dB{on}"
    return table.output_note or "needs calibration_data or evaluation_data"


def result_html(result: QuantizationResult) -> str:
    """Sizes and accuracy, the warnings, the table, and the stages' times folded away."""
    info = result.info
    table, judged = result.accuracy, "SQNR of the model's output"
    tiles = [
        (str(len(info.quantized_layers)), "layers quantized"),
        (str(len(info.skipped_layers)), "layers skipped"),
        (f"{info.original_size_mb:.1f} → {info.quantized_size_mb:.1f} MB", f"stored: {info.compression_ratio:.2f}x"),
        ("–", f"{judged}: {output_figure(table)}")
        if table.output_sqnr_db is None
        else (f"{table.output_sqnr_db:.1f} dB", f"{judged}, {table.samples} samples of {table.measured_on or 'data'}"),
    ]
    head = "".join(f'<div class="tile"><b>{escape(k)}</b><span>{escape(v)}</span></div>' for k, v in tiles)
    warnings = "".join(f'<div class="warn">{escape(warning)}</div>' for warning in info.warnings)
    times = [(escape(stage), f"{seconds:.2f}") for stage, seconds in info.seconds.items()]
    total = f"{sum(info.seconds.values()):.1f} seconds"
    folded = details(total, grid(("stage", "seconds"), times)) if times else ""
    return frame(f'<div class="tiles">{head}</div>{warnings}{folded}') + table.to_html()


@in_plain_surroundings
def save(result: QuantizationResult, path: str | os.PathLike[str], *, graph: bool = False) -> None:
    """Writes a quantized model as one safetensors file, which load reads; nothing is pickled.

    Packed weights stand under their own names, in the layout that they have in memory; so does everything else that
    the graph needs. The header holds, as JSON, what each weight became and why, the config and the accuracy table. The
    file is complete or not there: a crash or a full disk leaves what was at `path` before.

    Args:
        path: of the file; its folder must exist.
        graph: also stores the graph, so that load needs no model.

    Raises:
        PreconditionError: no QuantizationResult is given.
        NotSelfContainedError: graph=True, and a node calls what no file can hold; names the node.
        FileFormatError: a tensor whose type the format does not know. OSError: the file cannot be written.
    """
    if not isinstance(result, QuantizationResult):
        raise PreconditionError(f"save: what mq.quantize returned is needed, not {type(result).__name__}")
    gm = result.graph_module
    structure = graph_to_json(gm) if graph else None
    write_model(path, gm, result.accuracy, result.info, result.config, structure)
