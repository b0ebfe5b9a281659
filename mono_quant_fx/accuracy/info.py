"""The figures of one quantization, and how they follow from the two graphs and the table."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from mono_quant_fx.accuracy.table import AccuracyTable
from mono_quant_fx.config import QuantConfig
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.annotation import annotated
from mono_quant_fx.graph.own_names import own_name


@dataclass
class QuantizationInfo:
    """The figures of one quantization.

    Attributes:
        bits, group_size, symmetric: the scheme asked for; the table has the one that each layer got.
        original_bytes, quantized_bytes: everything that the float and the quantized graph store, each tensor once.
        sqnr_db: of the model output (see AccuracyTable.output_sqnr_db); None where it has none.
        calibration_samples_used: that were calibrated on; 0 without data.
        quantized_layers: module (or weight) name -> scheme.
        skipped_layers: name -> reason.
        warnings: what check_accuracy_warnings found, and what capture said.
        seconds: stage -> wall time.
        measured_on, evaluation_samples: what sqnr_db and the table were measured on, as in AccuracyTable.
    """

    bits: int
    group_size: int
    symmetric: bool
    original_bytes: int
    quantized_bytes: int
    sqnr_db: float | None
    calibration_samples_used: int
    quantized_layers: dict[str, str]
    skipped_layers: dict[str, str]
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    measured_on: str | None = None
    evaluation_samples: int = 0

    @property
    def compression_ratio(self) -> float:
        """original_bytes / quantized_bytes."""
        return self.original_bytes / max(1, self.quantized_bytes)

    @property
    def original_size_mb(self) -> float:
        """original_bytes in MB (10^6 bytes)."""
        return self.original_bytes / 1e6

    @property
    def quantized_size_mb(self) -> float:
        """quantized_bytes in MB (10^6 bytes)."""
        return self.quantized_bytes / 1e6


def info_of(
    gm: fx.GraphModule,
    out: fx.GraphModule,
    table: AccuracyTable,
    config: QuantConfig,
    samples: int,
    seconds: dict[str, float],
) -> QuantizationInfo:
    """The figures of a quantization, the warnings aside; of tensors only sizes are read."""
    quantized, skipped = {}, {}
    for _, annotation in annotated(out):
        name = annotation.users[0].module if len(annotation.users) == 1 else ""
        own = own_name(out, annotation.weight)
        name = name if own.rpartition(".")[0] == name and name else own
        if annotation.lowered:
            quantized[name] = str(annotation.scheme)
        else:
            skipped[name] = annotation.reason
    return QuantizationInfo(
        config.bits, config.group_size, config.symmetric, tensors.total_bytes(gm), tensors.total_bytes(out),
        table.output_sqnr_db, samples, quantized, skipped, [], seconds, table.measured_on,
        table.samples if table.measured_on else 0,
    )  # fmt: skip
