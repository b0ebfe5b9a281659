"""mono-quant-fx quantize: a checkpoint and the code of its model in, one file and its accuracy table out."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from torch import Tensor, nn

from mono_quant_fx.cli.inputs import batches, load_checkpoint, make_model, read_inputs
from mono_quant_fx.cli.inspecting import model_report, result_report, verdict
from mono_quant_fx.cli.options import config_fields
from mono_quant_fx.cli.rendering import CommandError, Report
from mono_quant_fx.compiler import quantize
from mono_quant_fx.config import QuantConfig
from mono_quant_fx.graph.tensors import named_tensors
from mono_quant_fx.storage.result import save
from mono_quant_fx.streaming.quantize_checkpoint import quantize_checkpoint


def run_quantize(options: argparse.Namespace) -> tuple[Report, str | None]:
    """The report, and why the result was not written: it is below the threshold that was given."""
    _check_target(options.out, [options.checkpoint, options.calibration, options.evaluation_data, options.example])
    config = QuantConfig(**config_fields(options))
    if not options.checkpoint.exists():
        raise CommandError(f"{options.checkpoint}: there is no such file or folder")
    model = make_model(options.model, needs_values=False)
    if any(tensor.is_meta for _, tensor in named_tensors(model)):
        return _stream(options, model, config)
    load_checkpoint(model, options.checkpoint)
    example = read_inputs("--example", options.example, model) if options.example is not None else None
    result = quantize(
        model,
        example,
        calibration_data=_data("--calibration", options.calibration, model, options.batch_size),
        evaluation_data=_data("--evaluation-data", options.evaluation_data, model, options.batch_size),
        config=config,
    )
    below = verdict(result.accuracy, options.fail_below_db)
    if below is None:
        save(result, options.out, graph=options.graph)
    return result_report(result), None if below is None else f"{below}; {options.out} is not written"


def _data(option: str, path: Path | None, model: nn.Module, batch_size: int) -> list[dict[str, Tensor]] | None:
    return None if path is None else batches(read_inputs(option, path, model), batch_size)


def _stream(options: argparse.Namespace, model: nn.Module, config: QuantConfig) -> tuple[Report, str | None]:
    """Weight by weight, for a model without values; beside the target first, since it may be below the threshold."""
    for name in ("calibration", "evaluation_data", "graph"):
        if getattr(options, name):
            raise CommandError(
                f"--{name.replace('_', '-')}: {options.model} is on the meta device, and its checkpoint is quantized "
                "weight by weight; build the model on the CPU, with values"
            )
    example = read_inputs("--example", options.example, model) if options.example is not None else None
    with tempfile.TemporaryDirectory(prefix=".mono-quant-fx.", dir=options.out.parent) as folder:
        beside = Path(folder) / "model.safetensors"
        report = quantize_checkpoint(
            options.checkpoint, model, beside, config, example_inputs=example, shard_bytes=1 << 62
        )
        below = verdict(report.accuracy, options.fail_below_db)
        if below is None:
            os.replace(beside, options.out)
    shown = model_report(report.accuracy, report.info, report.config)
    return shown, None if below is None else f"{below}; {options.out} is not written"


def _check_target(out: Path, sources: list[Path | None]) -> None:
    """Before the long work: the folder is there, and no file that is read would be replaced."""
    if not out.parent.is_dir():
        raise CommandError(f"--out {out}: there is no folder {out.parent}; make it first")
    if out.is_dir():
        raise CommandError(f"--out {out}: this is a folder; name the file in it")
    for source in sources:
        if source is not None and out.exists() and source.exists() and _is_in(out, source):
            raise CommandError(f"--out {out}: this would replace what is read from {source}; name another file")


def _is_in(out: Path, source: Path) -> bool:
    """Whether `out` is the file `source`, or one in that folder."""
    return out.resolve().is_relative_to(source.resolve()) or out.samefile(source)
