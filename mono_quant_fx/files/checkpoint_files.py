"""Folders of safetensors files as Hugging Face lays them out: read with suspicion, and written beside, then moved in.

config.json      model.safetensors      or, in shards,      model.safetensors.index.json
                                                            model-00001-of-00002.safetensors ...
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mono_quant_fx.errors import CheckpointError, FileFormatError
from mono_quant_fx.files.kinds import START, kind_of
from mono_quant_fx.files.paths import inside, is_plain
from mono_quant_fx.files.wrapped_names import bare
from mono_quant_fx.files.writer import write_tensors

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
#: Bytes of JSON that are read: an index of a million tensors is smaller.
MOST_JSON = 1 << 27

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip


class Checkpoint:
    """The tensors of a folder by name; shapes and dtypes are known from the files' headers, values are read on demand.

    Raises:
        CheckpointError: no folder, no safetensors file, a name in the index that is no plain file name, or a file that
            is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: a folder with {SINGLE} or {INDEX} is needed")
        listed = self._listed()
        self._open = {file: _open(self.folder, file) for file in dict.fromkeys(listed.values())}
        if (self.folder / INDEX).exists():
            present = {file: set(opened.keys()) for file, opened in self._open.items()}
            for name, file in listed.items():
                if name not in present[file]:
                    raise CheckpointError(f"{self.folder / INDEX}: {name!r} is not in {file}, where the index puts it")
            self.files = listed
        else:
            self.files = dict.fromkeys(self._open[SINGLE].keys(), SINGLE)
        self._stored = {name: name for name in self.files}

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def unwrap(self, modules: Container[str]) -> None:
        """Takes what wrappers put into names out of all of them (see wrapped_names), if that is how they fit.

        They fit when no name is of one of these modules as it stands, and the bare ones are, each once.
        """
        plain = {name: bare(name) for name in self.files}
        fits = any(n.rpartition(".")[0] in modules for n in plain.values()) and len(set(plain.values())) == len(plain)
        if fits and not any(name.rpartition(".")[0] in modules for name in plain):
            self._stored = {short: name for name, short in plain.items()}
            self.files = {short: self.files[name] for short, name in self._stored.items()}

    def where(self, name: str) -> str:
        """The tensor and its file, as errors call them."""
        file = self.files.get(name)
        return f"{self.folder}: {name!r}" if file is None else f"{self.folder / file}: tensor {name!r}"

    def kind(self, name: str) -> tuple[torch.dtype | None, tuple[int, ...]]:
        """dtype (None for one that torch lacks) and shape, from the header."""
        header = self._open[self.files[name]].get_slice(self._stored[name])
        return DTYPES.get(header.get_dtype()), tuple(header.get_shape())

    def check(self, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
        """Raises CheckpointError unless the tensor is there with this shape and one of these dtypes."""
        if name not in self:
            raise CheckpointError(f"{self.folder}: tensor {name!r} is missing; {_kind(dtypes, shape)} is needed")
        dtype, there = self.kind(name)
        if dtype not in dtypes or there != shape:
            both_float = dtype is not None and dtype.is_floating_point and dtypes[0].is_floating_point
            remedy = f"; build the model in {str(dtype)[6:]}" if both_float and there == shape else ""
            raise CheckpointError(
                f"{self.where(name)} is {_kind((dtype,), there)}; {_kind(dtypes, shape)} is needed{remedy}"
            )

    def get(self, name: str) -> Tensor:
        """The tensor itself.

        Raises:
            CheckpointError: its file cannot be read.
        """
        try:
            tensor: Tensor = self._open[self.files[name]].get_tensor(self._stored[name])
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{self.where(name)} cannot be read: {e}") from e
        return tensor

    def json(self, file: str) -> dict[str, Any] | None:
        """A JSON object of the folder; None without the file."""
        path = _inside(self.folder, file)
        return read_json(path) if path.is_file() else None

    def _listed(self) -> dict[str, str]:
        """Tensor -> file as the index has it; without an index, the one file under the name ""."""
        index = self.json(INDEX)
        if index is not None:
            return _weight_map(self.folder / INDEX, index)
        if (self.folder / SINGLE).is_file():
            return {"": SINGLE}
        names = sorted(p.name for p in self.folder.iterdir())
        unsafe = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
        if unsafe:
            raise CheckpointError(
                f"{self.folder / unsafe[0]}: a pickle can run any code while it is read, so it is refused; convert the "
                f"checkpoint to {SINGLE} first"
            )
        found = ", ".join(names[:5]) or "nothing"
        raise CheckpointError(f"{self.folder}: {SINGLE} or {INDEX} is needed; the folder holds {found}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most MOST_JSON bytes.

    Raises:
        CheckpointError: too large, no JSON, or no object.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MOST_JSON + 1)
        if len(text) > MOST_JSON:
            raise CheckpointError(f"{path}: more than {MOST_JSON} bytes of JSON are not read")
        value = json.loads(text)
    except (ValueError, RecursionError, OSError) as e:
        if isinstance(e, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read as JSON: {type(e).__name__}: {e}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is needed, not {type(value).__name__}")
    return value


def write_checkpoint(
    folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], config: Mapping[str, Any], shard_bytes: int
) -> None:
    """Writes all files into a temporary folder beside, then moves them into `folder`, config.json last.

    Raises:
        CheckpointError: other safetensors files are in the folder, or it cannot be written; what was there stays.
    """
    target = Path(folder).resolve()
    shards = _shards(tensors, shard_bytes)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    files = dict(zip(names if len(shards) > 1 else [SINGLE], shards, strict=True))
    others = sorted({p.name for p in target.glob("*.safetensors")} - {*files, SINGLE}) if target.is_dir() else []
    if others:
        raise CheckpointError(f"{target / others[0]}: readers would take it for a part of the checkpoint; move it away")
    scratch = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        for file, shard in files.items():
            _write_tensors(scratch / file, {name: tensors[name] for name in shard})
        if len(files) > 1:
            _write_json(scratch / INDEX, _index(files, tensors))
        _write_json(scratch / CONFIG, config)
        _move_in(scratch, target, [*files, *([INDEX] if len(files) > 1 else []), CONFIG])
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{target} cannot be written: {e}") from e
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _move_in(scratch: Path, target: Path, names: list[str]) -> None:
    target.mkdir(exist_ok=True)
    for stale in {SINGLE, INDEX} - set(names):  # a reader would take the old one of the two
        (target / stale).unlink(missing_ok=True)
    for name in names:
        os.replace(scratch / name, target / name)


def _index(files: Mapping[str, list[str]], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    weight_map = {name: file for file, shard in files.items() for name in shard}
    size = sum(t.nbytes for t in tensors.values())
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """In the order in which safetensors' own writer has them, which needs numpy: large elements first, then by name."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    order = sorted(plain, key=lambda name: (-plain[name].dtype.itemsize, name))
    write_tensors(path, {name: plain[name] for name in order}, {"format": "pt"})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> list[list[str]]:
    """Names in order, cut where a file would grow past `shard_bytes`; one larger tensor has a file of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _weight_map(path: Path, index: Mapping[str, Any]) -> dict[str, str]:
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{path}: its weight_map, tensor -> file, is missing")
    for name, file in listed.items():
        if not is_plain(file):
            raise CheckpointError(
                f"{path}: {name!r} lies in {str(file)[:200]!r}; the plain name of a *.safetensors file is needed"
            )
    return listed


def _inside(folder: Path, file: str) -> Path:
    try:
        return inside(folder, file)
    except FileFormatError as e:
        raise CheckpointError(str(e)) from None


def _open(folder: Path, file: str) -> Any:
    path = _inside(folder, file)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{folder / file} cannot be read as safetensors: {_instead(path) or e}") from e


def _instead(path: Path) -> str | None:
    """What a file is that is no safetensors file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        kind = kind_of(file.read(START), path.stat().st_size)
    return kind and f"this is {kind.words}: {kind.remedy}"


def _kind(dtypes: tuple[torch.dtype | None, ...], shape: tuple[int, ...]) -> str:
    names = " or ".join("of an unknown dtype" if d is None else str(d).removeprefix("torch.") for d in dtypes)
    return f"{names} {list(shape)}"
