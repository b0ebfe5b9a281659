"""Write a safetensors file tensor by tensor, and put it in place whole: a reader finds the old file or the new one.

The bytes go to a temporary file in the same folder, `.NAME.RANDOM.partial`. Only when all of them are on the disk is
it renamed. A process that is killed leaves its temporary behind, and the destination as it was.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from mono_quant_fx.errors import FileFormatError
from mono_quant_fx.files.header import Entry, layout, shown

#: What one call of the system writes: more at once is slower, and between two calls an interrupt gets through.
_CHUNK = 1 << 20


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the body names the file that the caller asked for."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def memory(raw: Tensor) -> memoryview:
    """The bytes of a dense CPU tensor [n] uint8, in place; good as long as the tensor is.

    Files are written from it and read into it. A buffer between would be filled by torch, whose threads start for
    every piece; on a busy machine that takes longer than the file does.
    """
    return memoryview((ctypes.c_ubyte * raw.numel()).from_address(raw.data_ptr())) if raw.numel() else memoryview(b"")


class TensorWriter:
    """A safetensors file of `entries` (name, dtype, shape), written in their order, which is the order of the bytes.

    Each tensor is aligned where entries with larger elements stand before those with smaller ones. Entering the `with`
    block takes the room on the disk, and leaving it puts the file in place. Leaving it by an exception deletes the
    temporary, and an older file stays. Where `path` is a symbolic link, the file that it points to is replaced. An
    older file's permissions are kept; those of a new one are what open() gives.

    A file that is written as it is computed can be `write_rows`: parts of tensors, the tensors in any order. What its
    header says in the end is told by `describe`, which may be longer than `metadata` by no more than `spare` bytes.

    Raises FileFormatError for what the format cannot hold (a name twice, "__metadata__" or with NUL, a dtype such as
    complex64, metadata that is not str to str), for a tensor that is not the declared next one, and when the block
    ends before all are written; OSError, with `path`, for a missing folder, missing rights or a full disk.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> with TensorWriter(path, [("w", torch.int32, (4, 2))], {"format": "pt"}) as writer:
    ...     writer.write("w", torch.ones(4, 2, dtype=torch.int32))
    >>> path.stat().st_size
    128
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        entries: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
        *,
        spare: int = 0,
    ):
        self.path = Path(path)
        self._declared = list(entries)
        try:
            self._head, self.entries = layout(entries, metadata if metadata is not None else {})
            if spare:
                self._head, _ = layout(entries, metadata or {}, len(self._head) + spare)
        except FileFormatError as error:
            raise FileFormatError(f"{self.path}: {error}") from None
        self._rows, self._is_free = dict.fromkeys(self.entries, 0), False
        self._todo = iter(self.entries.values())
        self._next = next(self._todo, None)
        self._descriptor: int | None = None

    def __enter__(self) -> TensorWriter:
        with naming(self.path):
            self._target, mode = _destination(self.path)
            self._partial = self._target.with_name(f".{self._target.name[:48]}.{secrets.token_hex(4)}.partial")
            try:
                self._descriptor = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                if mode is not None:
                    os.fchmod(self._descriptor, mode)
                stop = max((entry.stop for entry in self.entries.values()), default=0)
                _reserve(self._descriptor, len(self._head) + stop)
                self._put(self._head, 0)
            except BaseException:
                self._discard()
                raise
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next entry: a tensor of its name, dtype and shape, on any device and with any strides.

        After an OSError the same tensor may be written again.
        """
        entry = self._expected(name)
        self._check(entry, tensor)
        self._put_tensor(tensor, entry.start)
        self._rows[name] = _rows(entry)
        self._next = next(self._todo, None)

    def write_rows(self, name: str, tensor: Tensor) -> None:
        """Write the next rows (along dim 0) of an entry; entries in any order. Not to be mixed with `write`."""
        entry = self.entries.get(name)
        where = f"{self.path}: tensor {shown(name)}"
        if entry is None or self._descriptor is None:
            raise FileFormatError(f"{where}: write what was declared, inside the `with` block of this writer")
        count, done = (tensor.shape[0] if entry.shape else 1), self._rows[name]
        if done + count > _rows(entry):
            raise FileFormatError(f"{where} has {_rows(entry)} rows; {done} are written, and {count} are too many")
        part = (count, *entry.shape[1:]) if entry.shape else ()
        self._check(Entry(name, entry.dtype, part, entry.start, entry.stop), tensor)
        self._put_tensor(tensor, entry.start + done * (entry.nbytes // max(1, _rows(entry))))
        self._rows[name] += count
        self._is_free = True

    def describe(self, metadata: Mapping[str, str]) -> None:
        """Replace the metadata, in the space that the header has."""
        try:
            head, _ = layout(self._declared, metadata, len(self._head))
        except FileFormatError as error:
            raise FileFormatError(f"{self.path}: {error}") from None
        if len(head) > len(self._head):
            raise FileFormatError(f"{self.path}: a header of {len(head)} bytes; {len(self._head)} were set aside")
        with naming(self.path):
            self._put(head, 0)

    def _put_tensor(self, tensor: Tensor, start: int) -> None:
        """Write a tensor's bytes at byte `start` of the data."""
        dense = tensor.detach().resolve_neg().contiguous().cpu()
        # not reshape: a single element is contiguous with any stride, and only stride 1 can be viewed as bytes
        raw = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
        with naming(self.path):
            self._put(memory(raw), len(self._head) + start)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._discard()

    def _commit(self) -> None:
        left = self._next
        if self._is_free:
            left = next((e for e in self.entries.values() if e.nbytes and self._rows[e.name] < _rows(e)), None)
        if left is not None:
            raise FileFormatError(f"{self.path}: tensor {shown(left.name)} was not written; write every entry")
        assert self._descriptor is not None
        with naming(self.path):
            os.fsync(self._descriptor)
            os.replace(self._partial, self._target)
        folder = os.open(self._target.parent, os.O_RDONLY)
        try:
            with suppress(OSError):  # the file is in place and sound; some network file systems refuse this
                os.fsync(folder)
        finally:
            os.close(folder)

    def _discard(self) -> None:
        """Close, and delete the temporary where it was not put in place."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        with suppress(OSError):
            self._partial.unlink()

    def _put(self, data: bytes | memoryview, at: int) -> None:
        """Write all of `data` at the file's byte `at`; the system may take it in parts."""
        assert self._descriptor is not None
        rest = memoryview(data)
        while rest:
            count = os.pwrite(self._descriptor, rest[:_CHUNK], at)
            rest, at = rest[count:], at + count

    def _expected(self, name: str) -> Entry:
        if self._descriptor is None:
            raise FileFormatError(f"{self.path}: write inside the `with` block of this writer")
        if self._next is None or self._next.name != name:
            due = f"{shown(self._next.name)} is next" if self._next else "all entries are written"
            raise FileFormatError(f"{self.path}: tensor {shown(name)} is out of order: {due}; write as declared")
        return self._next

    def _check(self, entry: Entry, tensor: Tensor) -> None:
        where = f"{self.path}: tensor {shown(entry.name)}"
        if tensor.dtype is not entry.dtype or tuple(tensor.shape) != entry.shape:
            raise FileFormatError(
                f"{where} is {tensor.dtype} {list(tensor.shape)}; declared was {entry.dtype} {list(entry.shape)}"
            )
        if tensor.device.type == "meta" or tensor.layout is not torch.strided:
            raise FileFormatError(
                f"{where} is on the device {tensor.device} with layout {tensor.layout}; "
                "only a dense tensor with data can be written: use to_dense(), or load its values first"
            )


def _rows(entry: Entry) -> int:
    return entry.shape[0] if entry.shape else 1


def _destination(path: Path) -> tuple[Path, int | None]:
    """The file that open() would write, and its permissions where it is there; refuses what open() would refuse."""
    target = Path(os.path.realpath(path))
    try:
        found = os.stat(target)
    except FileNotFoundError:
        return target, None
    if not stat.S_ISREG(found.st_mode):
        raise FileFormatError(f"{path}: a folder, pipe or device is here; a file can only replace a file")
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "the file is read-only", str(path))
    return target, stat.S_IMODE(found.st_mode)


def _reserve(descriptor: int, size: int) -> None:
    """Take the room on the disk: a full disk says so before the work is done, and ext4 writes several times faster."""
    if hasattr(os, "posix_fallocate"):
        try:
            return os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # not every file system can
                raise
    return os.ftruncate(descriptor, size)


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors as one file, in the mapping's order; raises like TensorWriter."""
    with TensorWriter(path, [(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
