"""The plan of quantize_checkpoint: the passes of quantize, on tensors without values, and the files that they need."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from mono_quant_fx.accuracy.coverage import coverage_notes
from mono_quant_fx.accuracy.findings import check_accuracy_warnings
from mono_quant_fx.accuracy.info import QuantizationInfo, info_of
from mono_quant_fx.accuracy.measure import weights_table
from mono_quant_fx.accuracy.table import AccuracyTable
from mono_quant_fx.config import QuantConfig
from mono_quant_fx.errors import CaptureError
from mono_quant_fx.files.folder import open_tensors
from mono_quant_fx.files.header import layout
from mono_quant_fx.files.json_records import to_plain
from mono_quant_fx.frontend.recapture import capture_without_values
from mono_quant_fx.graph.annotation import pending
from mono_quant_fx.graph.codes import hollow_codes
from mono_quant_fx.pass_base import Pipeline
from mono_quant_fx.passes import CodeAttachment, SkipAnnotation
from mono_quant_fx.passes.code_attachment import GivenCodes
from mono_quant_fx.pipelines import lowering
from mono_quant_fx.storage.result import QuantizationResult
from mono_quant_fx.storage.saving import KEY, Stored, header_of, stored_tensors, versions
from mono_quant_fx.streaming.shards import Shard, own_annotations, plan_shards
from mono_quant_fx.streaming.source import Checkpoint, match

#: A figure whose text is as long as one can be.
_LONGEST = -1.2345678901234567e-300


@dataclass
class Job:
    """Everything that is known before the first weight is read, and the figures as they come.

    Attributes:
        reference, quantized: the float and the emitted graph, on the meta device.
        notes: what capture said.
        sqnr_db: of each weight that is done.
    """

    checkpoint: Checkpoint
    reference: fx.GraphModule
    quantized: fx.GraphModule
    stored: Stored
    shards: list[Shard]
    config: QuantConfig
    notes: list[str]
    sqnr_db: dict[str, float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights = own_annotations(self.quantized)

    @property
    def table(self) -> AccuracyTable:
        """The table, with the figures so far."""
        known = dict.fromkeys(self.weights) | self.sqnr_db
        return weights_table(self.reference, self.quantized, known, **self.thresholds)

    @property
    def info(self) -> QuantizationInfo:
        """The figures and warnings so far; no seconds, so that equal runs write equal bytes."""
        return self.result().info

    def result(self) -> QuantizationResult:
        """What quantize would return, without values."""
        table = self.table
        info = info_of(self.reference, self.quantized, table, self.config, 0, {})
        result = QuantizationResult(self.quantized, table, info, self.config)
        info.warnings += [*self.notes, *coverage_notes(self.reference, table, self.reference)]
        info.warnings += check_accuracy_warnings(result, accuracy_warning="ignore", **self.thresholds)
        return result

    def header(self) -> dict[str, str]:
        """The metadata of the file, with the figures so far."""
        result = self.result()
        return header_of(self.quantized, self.stored, result.accuracy, result.info, self.config)

    def spare(self) -> int:
        """Bytes by which the header can grow when all figures are known."""
        longest = replace(self, sqnr_db=dict.fromkeys(self.weights, _LONGEST)).header()
        sizes = [len(layout([], header)[0]) for header in (self.header(), longest)]
        names = [json.dumps(json.dumps([row.node, row.module])) for row in self.table.rows]
        return max(0, sizes[1] - sizes[0]) + 10 * (max(map(len, names)) + 40) + 1000

    def about(self) -> dict[str, Any]:
        """What decides the bytes that are written, by topic."""
        return {
            "settings": to_plain(self.config),
            "versions": versions(),
            "checkpoint": self.checkpoint.identity(),
            "files": [[shard.name, shard.nbytes] for shard in self.shards],
            "model": hashlib.sha256(replace(self, sqnr_db={}).header()[KEY].encode()).hexdigest(),
        }

    @property
    def thresholds(self) -> dict[str, float]:
        """Those of the settings."""
        names = ("sqnr_warning_threshold", "sqnr_error_threshold")
        return {name: getattr(self.config, name) for name in names}


def prepare(
    source: str | os.PathLike[str], model: nn.Module, config: QuantConfig, example_inputs: Any, shard_bytes: int
) -> Job:
    """Captures and plans; nothing but headers is read. Raises as quantize_checkpoint does."""
    if not isinstance(model, nn.Module) or isinstance(model, fx.GraphModule):
        raise CaptureError(f"model: the float torch.nn.Module is needed, not {type(model).__name__}")
    tensors = open_tensors(source)
    reference, notes = capture_without_values(model, example_inputs)
    for note in notes:
        warnings.warn(note, stacklevel=3)
    checkpoint = match(tensors, reference, model)
    decided = SkipAnnotation(config)(reference).graph_module
    codes = {annotation.weight: GivenCodes(hollow_codes(annotation)) for _, annotation in pending(decided)}
    quantized = Pipeline((CodeAttachment(codes), *lowering(config, activations=False)))(decided).graph_module
    stored = stored_tensors(quantized)
    together = [names for _, names in own_annotations(quantized).values()]
    shards = plan_shards(stored, [*together, *stored.stacked.values()], shard_bytes)
    return Job(checkpoint, reference, quantized, stored, shards, config, notes)
