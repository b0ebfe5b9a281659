"""Carries out the plan of quantize_checkpoint: into one file, or into a folder whose finished files survive a crash."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mono_quant_fx.errors import ConfigError
from mono_quant_fx.execution.run import Progress
from mono_quant_fx.files.resumable_folder import PartialFolder
from mono_quant_fx.files.writer import TensorWriter
from mono_quant_fx.streaming.blocks import WeightStream
from mono_quant_fx.streaming.job import Job
from mono_quant_fx.streaming.shards import Shard

#: (tensors done, of how many, bytes read, of how many)
Told = Callable[[int, int, int, int], Any]


class Bar:
    """Tells how far the work is: on the terminal, to a callable, or to nobody.

    Attributes:
        read, written: bytes of tensors so far.
    """

    def __init__(self, job: Job, progress: bool | Told | None):
        if progress is not None and not isinstance(progress, bool) and not callable(progress):
            raise ConfigError(f"progress={progress!r}: True, False, None or a callable with four arguments is needed")
        self.told: Told | None = None if progress is None or isinstance(progress, bool) else progress
        self.is_shown = progress is not False and self.told is None
        self.stream = WeightStream(job.checkpoint, job.weights, self.advance)
        self.checkpoint = job.checkpoint
        self.done = self.total = self.read = self.written = self.bytes = 0
        self._line = Progress("quantizing", 1, "MB", self.is_shown)

    def start(self, shards: list[Shard]) -> None:
        """These are to be made."""
        sources = [name for shard in shards for name in self.stream.sources(shard)]
        self.total, self.bytes = len(sources), sum(map(self.checkpoint.nbytes, sources))
        self._line = Progress("quantizing", -(-self.bytes // 10**6), "MB", self.is_shown)

    def advance(self, name: str, is_finished: bool, nbytes: int) -> None:
        """Counts a block."""
        before, self.read = self.read, self.read + nbytes
        self.done += is_finished
        # the first step rounds up: a line needs something done
        step = -(-self.read // 10**6) - -(-before // 10**6)
        if step:
            self._line.advance(step, f"({self.done}/{self.total} tensors) {name}")
        if self.told is not None:
            self.told(self.done, self.total, self.read, self.bytes)

    def end(self) -> None:
        """Ends the line."""
        self._line.__exit__(None, None, None)


def into_file(job: Job, bar: Bar, out: Path) -> int:
    """One file at `out`, or what was there; returns 0, since nothing of an interrupted run is used."""
    if len(job.shards) > 1:
        size = sum(shard.nbytes for shard in job.shards)
        raise ConfigError(
            f"out={str(out)!r}: the tensors take {size} bytes, more than shard_bytes allows in one file; give a folder "
            "(a name without .safetensors), or a larger shard_bytes"
        )
    bar.start(job.shards)
    try:
        _write(job, bar, job.shards[0], out, has_header=True)
    finally:
        bar.end()
    return 0


def into_folder(job: Job, bar: Bar, out: Path) -> int:
    """All files and the index; returns how many were finished before."""
    is_single = len(job.shards) == 1
    with PartialFolder(out, job.about()) as partial:
        if partial.differing:
            warnings.warn(
                f"{out}: an interrupted run is there, but {' and '.join(partial.differing)} differ; starting afresh",
                stacklevel=3,
            )
        found = {shard.name: partial.finished(shard.name, shard.entries) for shard in job.shards}
        for known in found.values():
            job.sqnr_db |= known["sqnr_db"] if known else {}
        todo = [shard for shard in job.shards if found[shard.name] is None]
        bar.start(todo)
        try:
            for shard in todo:
                known = {"sqnr_db": _write(job, bar, shard, partial.path / shard.name, has_header=is_single)}
                partial.finish(shard.name, known)
        finally:
            bar.end()
        partial.commit([shard.name for shard in job.shards], None if is_single else _index(job))
    return len(job.shards) - len(todo)


def _write(job: Job, bar: Bar, shard: Shard, path: Path, has_header: bool) -> dict[str, float | None]:
    """One file, whole or not at all; returns the SQNR of its weights."""
    metadata = job.header() if has_header else {"format": "pt"}
    with TensorWriter(path, shard.entries, metadata, spare=job.spare() if has_header else 0) as writer:
        found = bar.stream.fill(shard, writer)
        job.sqnr_db |= found
        if has_header:
            writer.describe(job.header())
    bar.written += shard.nbytes
    return found


def _index(job: Job) -> dict[str, Any]:
    size = sum(shard.nbytes for shard in job.shards)
    names = {name: shard.name for shard in job.shards for name in shard.tensors}
    return {"metadata": {"total_size": size, **job.header()}, "weight_map": names}
