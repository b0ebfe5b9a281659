"""What a user hands to the command line: a model's factory, a checkpoint, calibration data. Nothing is unpickled."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mono_quant_fx.cli.rendering import CommandError, printable
from mono_quant_fx.files.folder import open_tensors
from mono_quant_fx.files.kinds import PICKLED, START, kind_of
from mono_quant_fx.files.reader import TensorFile
from mono_quant_fx.files.wrapped_names import align, few
from mono_quant_fx.files.writer import naming
from mono_quant_fx.graph.tensors import named_tensors

#: How many differing tensors an error lists.
SHOWN = 5


def make_model(spec: str, needs_values: bool = True) -> nn.Module:
    """Calls `package.module:factory`, which the user named, and returns its module in eval mode.

    The current folder is searched as with python -m. What the user's code prints goes to stderr.

    Args:
        needs_values: a model on the meta device will not do.

    Raises:
        CommandError: there is no such thing, it raises, or it returns no module with values.
    """
    module_name, colon, path = spec.partition(":")
    if not (colon and module_name and path):
        raise CommandError(f"--model {spec}: write package.module:factory, e.g. my_models.net:make")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    with _users_code(f"--model {spec}: importing {module_name}"):
        module = importlib.import_module(module_name)
    try:
        factory: Any = functools.reduce(getattr, path.split("."), module)
    except AttributeError as e:
        raise CommandError(f"--model {spec}: {e}") from e
    if not callable(factory):
        raise CommandError(f"--model {spec}: {path} is a {type(factory).__name__}; a function or class is needed")
    with _users_code(f"--model {spec}: {path}()"):
        model = factory()
    if not isinstance(model, nn.Module):
        raise CommandError(f"--model {spec}: {path}() returned a {type(model).__name__}; a torch.nn.Module is needed")
    if needs_values and any(tensor.is_meta for _, tensor in named_tensors(model)):
        raise CommandError(f"--model {spec}: the model is on the meta device; build it on the CPU, with values")
    return model.eval()


@contextlib.contextmanager
def _users_code(what: str) -> Iterator[None]:
    """Says what the user's code raised, SystemExit included."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (Exception, SystemExit) as e:
        raise CommandError(f"{what} raised {type(e).__name__}: {e}") from e


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Copies a checkpoint's tensors into the model: every name and shape has to be the model's.

    Names may have what torch.compile, DataParallel and FSDP put into them (see wrapped_names). A name that is missing
    is no fault where the model ties it to one that is there.

    Raises:
        CommandError: the names or shapes differ, or the file holds something else.
        FileFormatError, OSError: it cannot be read.
    """
    found = read_checkpoint(path)
    own = model.state_dict(keep_vars=True)
    spelled = align(found, own)
    state = {name: found[there] for name, there in spelled.items()}
    tied = {id(own[name]) for name in state}
    extra = sorted(found.keys() - spelled.values())
    absent = [name for name, tensor in own.items() if name not in state and id(tensor) not in tied]
    faults = [f"{few(map(printable, extra))}: in the checkpoint and not in the model"] if extra else []
    faults += [f"{few(absent)}: in the model and not in the checkpoint"] if absent else []
    faults += [
        f"{name} is {list(state[name].shape)} in the checkpoint and {list(tensor.shape)} in the model"
        for name, tensor in own.items()
        if name in state and getattr(tensor, "shape", None) != state[name].shape
    ]
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise CommandError(f"{path} does not fit the model: {'; '.join(faults[:SHOWN])}{more}")
    model.load_state_dict(state, strict=False)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, of a folder as Hugging Face writes it, or of a file of torch.save.

    What a file is, its first bytes tell and not its name.
    """
    if path.is_file():
        with naming(path), path.open("rb") as start:
            kind = kind_of(start.read(START), path.stat().st_size)
        if kind in PICKLED:
            return _pickled(path)
    found = open_tensors(path)
    return {name: found.tensor(name) for name in found.entries}


def _pickled(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file, warnings.catch_warnings():  # of a name torch.load would believe the suffix
            warnings.simplefilter("ignore")  # about protocols of pickle; what cannot be read is refused below
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever damaged bytes make of it, OSError among it
        reason = re.search(r"WeightsUnpickler error: ([^\n]{,120})", str(e))  # not torch's advice to trust the file
        raise CommandError(
            f"{path}: torch.load(weights_only=True) refuses it, so it is damaged or holds more than tensors, and code "
            f"from a file is never run; save model.state_dict() instead ({reason[1] if reason else type(e).__name__})"
        ) from e
    for key in ("state_dict", "model_state_dict", "model", "module"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    pairs = found.items() if isinstance(found, Mapping) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in pairs):
        raise CommandError(f"{path}: a state_dict is needed, names to tensors; save model.state_dict()")
    return dict(found)


def read_inputs(option: str, path: Path, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a safetensors file, named after parameters of the model's forward.

    Raises:
        CommandError: names that forward does not have, or needs and does not get, or sizes of dim 0 that differ.
    """
    file = TensorFile(path)
    tensors = {name: file.tensor(name) for name in file.entries}
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    listed = ", ".join(named) or "none that has a name"
    for name in tensors:
        if name not in named and not takes_any:
            raise CommandError(f"{option} {path}: forward has no parameter {printable(name)!r}; it has {listed}")
    for name in named:
        if name not in tensors and parameters[name].default is inspect.Parameter.empty:
            raise CommandError(f"{option} {path}: no tensor for forward's parameter {name!r}; name the tensors so")
    rows = {name: len(tensor) for name, tensor in tensors.items() if tensor.dim()}
    if not rows or len(set(rows.values())) > 1 or not all(rows.values()):
        sizes = ", ".join(f"{printable(name)}: {count}" for name, count in rows.items()) or "none"
        raise CommandError(f"{option} {path}: one sample or more along dim 0 is needed, as many of each ({sizes})")
    return tensors


def batches(tensors: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Split along dim 0, `count` samples at a time; a tensor without dimensions goes into each batch.

    >>> [b["x"].tolist() for b in batches({"x": torch.arange(5)}, 2)]
    [[0, 1], [2, 3], [4]]
    """
    total = next(len(tensor) for tensor in tensors.values() if tensor.dim())
    return [
        {name: tensor[start : start + count] if tensor.dim() else tensor for name, tensor in tensors.items()}
        for start in range(0, total, count)
    ]
