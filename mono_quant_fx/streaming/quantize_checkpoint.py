"""quantize_checkpoint: a checkpoint larger than memory, quantized weight by weight, in files that load reads."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mono_quant_fx.accuracy.findings import check_accuracy_warnings
from mono_quant_fx.accuracy.info import QuantizationInfo
from mono_quant_fx.accuracy.table import AccuracyTable
from mono_quant_fx.config import QuantConfig
from mono_quant_fx.errors import AccuracyError, ConfigError
from mono_quant_fx.pipelines import needs_data
from mono_quant_fx.process.surroundings import in_plain_surroundings
from mono_quant_fx.streaming.job import prepare
from mono_quant_fx.streaming.output import Bar, Told, into_file, into_folder

FILE = ".safetensors"


@dataclass
class CheckpointReport:
    """What quantize_checkpoint did; str() prints it.

    Attributes:
        path: what was asked for: the file, or the folder.
        files: the names of the safetensors files.
        accuracy: the table, of weights only.
        info: the figures, as in the file; its `seconds` are empty, so that equal runs write equal bytes.
        config: the settings.
        bytes_read, bytes_written: tensors, in this run.
        seconds: of this run.
        resumed_from: how many finished files of an interrupted run were kept.
        unused: tensors of the checkpoint that the model does not have.
    """

    path: Path
    files: tuple[str, ...]
    accuracy: AccuracyTable
    info: QuantizationInfo
    config: QuantConfig
    bytes_read: int
    bytes_written: int
    seconds: float
    resumed_from: int = 0
    unused: tuple[str, ...] = ()

    @property
    def warnings(self) -> list[str]:
        """Same as info.warnings."""
        return self.info.warnings

    def __str__(self) -> str:
        info = self.info
        lines = [
            f"{self.accuracy}\n",
            f"{len(info.quantized_layers)} layers quantized, {len(info.skipped_layers)} skipped; "
            f"{info.original_size_mb:.1f} MB -> {info.quantized_size_mb:.1f} MB ({info.compression_ratio:.2f}x)",
            f"{self.path}: {len(self.files)} file{'s' * (len(self.files) > 1)}; {self.bytes_read / 1e6:.1f} MB read, "
            f"{self.bytes_written / 1e6:.1f} MB written in {self.seconds:.1f} s",
        ]
        if self.resumed_from:
            lines.append(f"resumed: {self.resumed_from} of {len(self.files)} files were finished before")
        if self.unused:
            lines.append(f"not in the model: {', '.join(self.unused[:5])}{', ...' * (len(self.unused) > 5)}")
        return "\n".join(lines)


@in_plain_surroundings
def quantize_checkpoint(
    source: str | os.PathLike[str],
    model: nn.Module,
    out: str | os.PathLike[str],
    config: QuantConfig | None = None,
    *,
    example_inputs: Any = None,
    shard_bytes: int = 5 * 10**9,
    progress: bool | Told | None = None,
    **config_fields: Any,
) -> CheckpointReport:
    """Quantizes a float checkpoint weight by weight: memory holds some rows of one weight, never the model.

    What is written is what ``save(quantize(model), out)`` writes for the model with these weights, bit for bit, and
    load reads it. Weights are rounded to nearest, since everything better needs data to run through the whole model.

    A run that was interrupted, by kill -9 even, goes on after its last finished file when it is called again with the
    same arguments. Until all is done, an older model at `out` stays; see load for what is found in between.

    Args:
        source: a safetensors file, or a folder with model.safetensors or with model.safetensors.index.json and its
            files.
        model: the float model in eval mode, best on the meta device; its class and sizes are used, and of its values
            only those of buffers outside the state_dict.
        out: a folder, which gets model.safetensors or, past `shard_bytes`, several files and their index; or the name
            of one file, ending in .safetensors.
        config: a QuantConfig; `config_fields` are its fields as keywords and win over it.
        example_inputs: as in capture; only types and sizes count. Needed where symbolic tracing does not suffice.
        shard_bytes: no file has more bytes of tensors, unless what has to lie side by side is larger.
        progress: None shows a bar on a terminal, False nothing; a callable is given (tensors done, of how many, bytes
            read, of how many) after each block.

    Raises:
        ConfigError: a setting that needs data, a bad `shard_bytes`, or an `out` that cannot be.
        CaptureError: no graph. PlanError: the checkpoint does not fit the model; names the tensors and the remedy.
        FileFormatError: a damaged file or index. WeightError: NaN or infinity in a weight.
        AccuracyError: accuracy_warning="error" and a critical finding; the files are complete, and `result` is the
            report. OSError: a full disk, say; finished files are kept for the next call.

    >>> import tempfile, torch
    >>> from mono_quant_fx import load
    >>> from mono_quant_fx.files.reader import write_tensors
    >>> folder, net = tempfile.mkdtemp(), nn.Sequential(nn.Linear(256, 64), nn.ReLU()).eval()
    >>> write_tensors(f"{folder}/float.safetensors", net.state_dict())
    >>> report = quantize_checkpoint(f"{folder}/float.safetensors", net.to("meta"), f"{folder}/int4", group_size=64)
    >>> [(row.module, row.scheme) for row in report.accuracy.rows], report.files
    ([('0', 'int4 g64 sym')], ('model.safetensors',))
    >>> load(f"{folder}/int4", net).graph_module(torch.ones(1, 256)).shape
    torch.Size([1, 64])
    """
    start = time.perf_counter()
    config = QuantConfig.build(config, config_fields)
    target = Path(out)
    _check(config, shard_bytes, target)
    job = prepare(source, model, config, example_inputs, shard_bytes)
    if job.checkpoint.holds(target):
        raise ConfigError(f"out={str(out)!r}: the checkpoint itself is there; give another name")
    bar = Bar(job, progress)
    resumed = into_file(job, bar, target) if target.suffix == FILE else into_folder(job, bar, target)
    files = (target.name,) if target.suffix == FILE else tuple(shard.name for shard in job.shards)
    report = CheckpointReport(
        target, files, job.table, job.info, config, bar.read, bar.written, time.perf_counter() - start, resumed,
        job.checkpoint.unused,
    )  # fmt: skip
    try:
        check_accuracy_warnings(job.result(), accuracy_warning=config.accuracy_warning, **job.thresholds)
    except AccuracyError as e:
        raise AccuracyError(str(e), report) from None
    return report


def _check(config: QuantConfig, shard_bytes: int, out: Path) -> None:
    """Raises ConfigError for what cannot be asked for."""
    missing = needs_data(config)
    if missing is not None:
        raise ConfigError(
            f"{missing}; quantize_checkpoint runs no data through the model: leave this setting out, or use quantize "
            "on the whole model"
        )
    if type(shard_bytes) is not int or shard_bytes < 1:
        raise ConfigError(f"shard_bytes={shard_bytes!r}: a positive number of bytes is needed")
    if out.exists() and out.is_dir() is (out.suffix == FILE):
        found = "folder" if out.is_dir() else "file"
        raise ConfigError(f"out={str(out)!r}: a {found} is there; a name that ends in {FILE} is a file, others folders")
