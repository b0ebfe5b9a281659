"""mono-quant-fx quantize: a checkpoint and the code of its model in, one file and its accuracy table out."""

from __future__ import annotations

import argparse
from pathlib import Path

from mono_quant_fx.cli_inputs import batches, load_checkpoint, make_model, read_inputs
from mono_quant_fx.cli_options import config_fields
from mono_quant_fx.cli_report import result_report, verdict
from mono_quant_fx.cli_text import CommandError, Report
from mono_quant_fx.compiler import quantize
from mono_quant_fx.config import QuantConfig
from mono_quant_fx.result import save


def run_quantize(options: argparse.Namespace) -> tuple[Report, str | None]:
    """The report, and why the result was not written: it is below the threshold that was given."""
    _check_target(options.out, [options.checkpoint, options.calibration, options.example])
    config = QuantConfig(**config_fields(options))
    if not options.checkpoint.exists():
        raise CommandError(f"{options.checkpoint}: there is no such file or folder")
    model = make_model(options.model)
    load_checkpoint(model, options.checkpoint)
    data = None
    if options.calibration is not None:
        data = batches(read_inputs("--calibration", options.calibration, model), options.batch_size)
    example = read_inputs("--example", options.example, model) if options.example is not None else None
    result = quantize(model, example, calibration_data=data, config=config)
    below = verdict(result.accuracy, options.fail_below_db)
    if below is None:
        save(result, options.out, graph=options.graph)
    return result_report(result), None if below is None else f"{below}; {options.out} is not written"


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
