"""mono-quant-fx export: a saved model as a folder in compressed-tensors' format."""

from __future__ import annotations

import argparse

from mono_quant_fx.cli.inputs import make_model
from mono_quant_fx.cli.rendering import CommandError, size
from mono_quant_fx.interop.exporting import export_compressed_tensors
from mono_quant_fx.storage.loading import load


def run_export(options: argparse.Namespace) -> str:
    """What was written, in words."""
    if options.folder.exists() and not options.folder.is_dir():
        raise CommandError(f"{options.folder}: this is a file; name a folder")
    model = None if options.model is None else make_model(options.model, needs_values=False)
    export_compressed_tensors(load(options.file, model), options.folder)
    files = sorted(path for path in options.folder.iterdir() if path.suffix in (".safetensors", ".json"))
    return "\n".join(f"{path}: {size(path.stat().st_size)}" for path in files)
