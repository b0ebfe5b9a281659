"""A folder of safetensors files and the index that tells which tensor is in which, as Hugging Face lays it out.

model.safetensors              all in one file, and no index
model.safetensors.index.json   {"metadata": {...}, "weight_map": {NAME: FILE}}, and the files beside it
.partial                       what an interrupted writer left (see partial_folder)
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from mono_quant_fx.errors import FileFormatError
from mono_quant_fx.files.header import MAX_HEADER, Entry, parse_object, shown
from mono_quant_fx.files.paths import inside, is_plain
from mono_quant_fx.files.reader import TensorFile

SINGLE, INDEX, PARTIAL = "model.safetensors", "model.safetensors.index.json", ".partial"


class TensorFolder:
    """The files of an index as one: what TensorFile offers, with the index's metadata (the texts of it).

    `path` is the index, `files` the open files by name. Only what the index names is in `entries`.
    Raises FileFormatError for an index or a file that is damaged, for a file name or a link that leads out of the
    folder, and for a tensor that is not in its file; OSError for a file that cannot be opened.
    """

    path: Path
    metadata: dict[str, str]
    files: dict[str, TensorFile]
    entries: dict[str, Entry]

    def __init__(self, folder: str | os.PathLike[str]):
        self.path = Path(folder) / INDEX
        index = read_index(self.path)
        self.metadata = {k: v for k, v in index.get("metadata", {}).items() if isinstance(v, str)}
        self._file_of: dict[str, str] = index["weight_map"]
        self.files = {}
        try:
            for name in dict.fromkeys(self._file_of.values()):
                self.files[name] = TensorFile(inside(self.path.parent, name))
        except FileNotFoundError as error:
            raise FileFormatError(f"{self.path} names {shown(name)}, which is missing: download it again") from error
        self.entries = {}
        for tensor, name in self._file_of.items():
            if tensor not in self.files[name].entries:
                raise FileFormatError(f"{self.path}: tensor {shown(tensor)} is not in {name}, where it should be")
            self.entries[tensor] = self.files[name].entries[tensor]

    def tensor(self, name: str) -> Tensor:
        """See TensorFile.tensor."""
        return self._at(name).tensor(name)

    def span(self, names: Iterable[str]) -> Tensor | None:
        """See TensorFile.span; None for tensors of several files."""
        listed = list(names)
        files = {id(file): file for file in map(self._at, listed)}
        return next(iter(files.values())).span(listed) if len(files) == 1 else None

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """See TensorFile.read_rows."""
        return self._at(name).read_rows(name, start, stop)

    def digest(self, name: str) -> str:
        """See TensorFile.digest."""
        return self._at(name).digest(name)

    def close(self) -> None:
        """Gives back the files; views keep their mappings alive."""
        for file in self.files.values():
            file.close()

    def _at(self, name: str) -> TensorFile:
        if name not in self._file_of:
            near = ", ".join(map(shown, difflib.get_close_matches(str(name), self._file_of, 3))) or "none is like it"
            raise FileFormatError(f"{self.path}: no tensor is named {shown(name)}; the nearest names: {near}")
        return self.files[self._file_of[name]]


Tensors = TensorFile | TensorFolder


def open_tensors(path: str | os.PathLike[str]) -> Tensors:
    """A safetensors file, or a folder with model.safetensors or with an index and its files.

    Raises:
        FileFormatError: damaged; or a folder without either, which says so if an interrupted writer left it.
        OSError: nothing is there, or it cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        return TensorFile(path)
    if (path / SINGLE).exists():
        return TensorFile(inside(path, SINGLE))
    if (path / INDEX).exists():
        return TensorFolder(path)
    if (path / PARTIAL).exists():
        raise FileFormatError(
            f"{path} is incomplete: quantize_checkpoint was interrupted while it wrote; call it again with the same "
            "arguments, and it goes on after the last finished file"
        )
    raise FileFormatError(f"{path}: a folder needs {SINGLE}, or {INDEX} and the files that it names; neither is here")


def read_index(path: Path) -> dict[str, Any]:
    """An index, checked: weight_map maps names to plain names of files in the same folder."""
    with open(path, "rb") as file:
        text = file.read(MAX_HEADER + 1)
    try:
        if len(text) > MAX_HEADER:
            raise FileFormatError(f"the index is longer than {MAX_HEADER} bytes")
        index = parse_object(text.strip(), "index")
        found = index.get("weight_map")
        if not isinstance(found, dict) or not found:
            raise FileFormatError(f"weight_map is {shown(found)}; it must map names of tensors to names of files")
        if not isinstance(index.get("metadata", {}), dict):
            raise FileFormatError(f"metadata is {shown(index['metadata'])}; it must be an object")
        for tensor, name in found.items():
            if not is_plain(name):
                raise FileFormatError(
                    f"tensor {shown(tensor)} is said to be in {shown(name)}; that must be the name of a .safetensors "
                    "file in the same folder, without a path"
                )
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error} (the index is damaged: download or save it again)") from None
    return index
