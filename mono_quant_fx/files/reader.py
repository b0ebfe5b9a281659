"""A safetensors file that is read in place: its tensors are views of one private memory mapping.

Nothing of a file is trusted: the header has to describe every byte of the data once (tensor_header), and no byte is
ever executed. What a mapping cannot help: whoever shortens a mapped file in place takes the bytes away from its
views, and reading them ends the process. `TensorWriter` never does that; it replaces files whole.
"""

from __future__ import annotations

import difflib
import hashlib
import mmap
import os
import stat
import sys
import weakref
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from mono_quant_fx.errors import FileFormatError
from mono_quant_fx.files.header import MAX_HEADER, PREFIX, Entry, fits, parse_header, shown
from mono_quant_fx.files.kinds import START, kind_of
from mono_quant_fx.files.writer import TensorWriter, memory, naming, write_tensors

__all__ = ["Entry", "TensorFile", "TensorWriter", "write_tensors"]

_CHUNK = 1 << 20
_MOST = 1 << 26
#: A private mapping can be written to, so the kernel would set memory aside for all of it, and refuse files larger
#: than the machine's. Python names the flag from 3.13 on.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class TensorFile:
    """An open safetensors file (little endian machines): `path`, `metadata`, and `entries` in the order of their bytes.

    Opening reads the header only. A view stays good when the file is closed, replaced or deleted.
    Raises OSError when the file cannot be opened, and FileFormatError, with one line that names the file, the tensor,
    the value and the rule, when it is damaged or no safetensors file at all.

    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "a.safetensors")
    >>> write_tensors(path, {"w": torch.ones(2, 3), "v": torch.zeros(1, 3)}, {"by": "hand"})
    >>> with TensorFile(path) as file:
    ...     print(file.metadata, list(file.entries), file.tensor("w").sum(), file.span(["w", "v"]).shape)
    {'by': 'hand'} ['w', 'v'] tensor(6.) torch.Size([3, 3])
    """

    path: Path
    metadata: dict[str, str]
    entries: dict[str, Entry]

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        # without O_NONBLOCK, opening a pipe waits for a writer
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._mapping: mmap.mmap | None = None
        try:
            self._mapping = self._map()
            self._data = self._parse(self._mapping)
        except FileFormatError as error:
            said = self._otherwise(error)
            self.close()
            raise FileFormatError(f"{self.path}: {said}") from None
        except BaseException:
            self.close()
            raise

    def _otherwise(self, error: FileFormatError) -> str:
        """What the file is instead, by its first bytes, or what is wrong with it."""
        start = self._mapping[:START] if self._mapping is not None else b""
        kind = kind_of(start, len(self._mapping or b""))
        if kind is not None:
            return f"this is {kind.words}, and no safetensors file: {kind.remedy}"
        return f"{error} (the file is damaged or no safetensors file: save or download it again)"

    def _map(self) -> mmap.mmap:
        found = os.fstat(self._descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise FileFormatError("this is not a regular file")
        if found.st_size < PREFIX:
            raise FileFormatError(
                f"{found.st_size} bytes are too few; a file starts with the header's length, {PREFIX}"
            )
        flags, protection = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        with naming(self.path):
            return mmap.mmap(self._descriptor, found.st_size, flags=flags, prot=protection)

    def _parse(self, mapping: mmap.mmap) -> int:
        """Read the header; returns where the data starts."""
        length = int.from_bytes(mapping[:PREFIX], "little")
        most = min(MAX_HEADER, len(mapping) - PREFIX)
        if length > most:
            raise FileFormatError(f"the header's length is {length} bytes; at most {most} are possible here")
        start = PREFIX + length
        self.metadata, self.entries = parse_header(mapping[PREFIX:start], len(mapping) - start)
        return start

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back the file; views keep the mapping alive as long as they need it."""
        self._mapping = None
        self._close()

    def tensor(self, name: str) -> Tensor:
        """The tensor as a view of the file, without a copy; writing to it changes this mapping, never the file.

        Views of one file see each other's writes. A tensor that does not lie at a multiple of its element size is
        copied, since torch's kernels expect that. Raises FileFormatError for a name that the file does not have, and
        for a BOOL tensor with a byte that is neither 0 nor 1.
        """
        entry = self._entry(name)
        raw = self._view(entry)
        return self._typed(entry, raw if self._is_aligned(entry) else raw.clone())

    def span(self, names: Iterable[str]) -> Tensor | None:
        """ONE view of several tensors, stacked along dim 0, where they lie one after the other; None where not.

        They need one dtype and equal shapes from dim 1 on, and have to be aligned. Errors as for `tensor`.
        """
        entries = [self._entry(name) for name in names]
        if not entries or not all(_continues(one, two) for one, two in pairwise(entries)):
            return None
        first, last = entries[0], entries[-1]
        if not first.shape or not self._is_aligned(first):
            return None
        shape = (sum(entry.shape[0] for entry in entries), *first.shape[1:])
        if not fits(first.dtype, shape):  # tensors without elements whose absurd sizes add up
            return None
        whole = Entry(first.name, first.dtype, shape, first.start, last.stop)
        return self._typed(whole, self._view(whole))

    def read(self, name: str) -> Tensor:
        """The tensor in memory of its own, as the file has it.

        What a mapping has touched counts as memory of the process until the last view is gone; a stream through a
        file larger than memory reads instead. Raises like `tensor`, and FileFormatError when the file got shorter.
        """
        entry = self._entry(name)
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        self._fill(memory(raw), entry, 0)
        return self._typed(entry, raw)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start <= i < stop (along dim 0, where there is one) in memory of their own; raises like `read`."""
        entry = self._entry(name)
        rows = entry.shape[0] if entry.shape else 1
        stride = entry.nbytes // rows if rows else 0
        shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
        data = memoryview(bytearray((stop - start) * stride))
        at, end = self._data + entry.start + start * stride, 0
        while end < len(data):
            with naming(self.path):
                count = os.preadv(self._descriptor, [data[end:]], at + end)
            if not count:
                raise FileFormatError(f"{self.path}: tensor {shown(entry.name)} ends early; the file got shorter")
            end += count
        raw = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8, device="cpu")
        return self._typed(Entry(name, entry.dtype, shape, 0, len(data)), raw)

    def digest(self, name: str) -> str:
        """SHA-256 of the tensor's bytes in the file, in hexadecimal; what was written to a view does not count."""
        entry, found = self._entry(name), hashlib.sha256()
        buffer = memoryview(bytearray(min(_CHUNK, entry.nbytes)))
        for at in range(0, entry.nbytes, _CHUNK):
            piece = buffer[: entry.nbytes - at]
            self._fill(piece, entry, at)
            found.update(piece)
        return found.hexdigest()

    def _fill(self, buffer: memoryview, entry: Entry, at: int) -> None:
        """Bytes of an entry, from its byte `at` on: read from the file and not through the mapping."""
        at += self._data + entry.start
        while buffer:
            with naming(self.path):
                count = os.preadv(self._descriptor, [buffer[:_MOST]], at)
            if not count:
                raise FileFormatError(f"{self.path}: tensor {shown(entry.name)} ends early; the file got shorter")
            buffer, at = buffer[count:], at + count

    def _entry(self, name: str) -> Entry:
        if self._mapping is None:
            raise FileFormatError(f"{self.path}: this file is closed; read from it inside its `with` block")
        if name not in self.entries:
            near = ", ".join(map(shown, difflib.get_close_matches(str(name), self.entries, 3))) or "none is like it"
            raise FileFormatError(f"{self.path}: no tensor is named {shown(name)}; the nearest names: {near}")
        return self.entries[name]

    def _is_aligned(self, entry: Entry) -> bool:
        return (self._data + entry.start) % entry.dtype.itemsize == 0

    def _view(self, entry: Entry) -> Tensor:
        """The bytes of an entry, in a storage of their own: torch.save and deepcopy take storages whole."""
        if not entry.nbytes or self._mapping is None:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._mapping, dtype=torch.uint8, count=entry.nbytes, offset=self._data + entry.start)

    def _typed(self, entry: Entry, raw: Tensor) -> Tensor:
        """Bytes [nbytes] uint8 as the tensor that they are."""
        if entry.dtype is torch.bool and entry.nbytes and int(raw.max()) > 1:
            where = f"{self.path}: tensor {shown(entry.name)}"
            raise FileFormatError(f"{where} is BOOL and holds the byte {int(raw.max())}; 0 and 1 are allowed")
        return raw.view(entry.dtype).view(entry.shape)


def _continues(one: Entry, two: Entry) -> bool:
    """Whether `two` goes on where `one` ends, as more of the same rows."""
    same_rows = len(one.shape) == len(two.shape) and one.shape[1:] == two.shape[1:]
    return same_rows and one.dtype is two.dtype and one.stop == two.start
