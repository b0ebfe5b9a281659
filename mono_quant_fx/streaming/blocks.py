"""Fills a file of a quantized model from a float checkpoint, some rows of one tensor at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mono_quant_fx.accuracy.weight_figures import weight_errors
from mono_quant_fx.files.writer import TensorWriter, memory
from mono_quant_fx.graph.annotation import QuantAnnotation
from mono_quant_fx.graph.codes import codes_of
from mono_quant_fx.numerics import affine
from mono_quant_fx.numerics.error import ErrorSum
from mono_quant_fx.storage.saving import DIGESTS
from mono_quant_fx.streaming.shards import Shard
from mono_quant_fx.streaming.source import Checkpoint
from mono_quant_fx.streaming.workers import Workers

#: Elements of a weight that one thread has in memory at a time, where its layout allows it. Small enough for malloc to
#: keep what is freed: from 32 MiB on it goes back to the system each time, and comes again page by page.
BLOCK = 1 << 22
STAGE = "quantize-checkpoint"

#: (name of the tensor that is being read, whether it is finished, bytes read of it since the last call)
Report = Callable[[str, bool, int], None]


@dataclass
class WeightStream:
    """Reads what a shard needs, rounds what has a scheme, and writes it.

    Args:
        checkpoint: the float tensors.
        weights: weight -> its annotation, and the names under which its codes are stored.
        report: is told of every block.
    """

    checkpoint: Checkpoint
    weights: Mapping[str, tuple[QuantAnnotation, tuple[str, ...]]]
    report: Report
    _of: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self._of = {name: weight for weight, (_, names) in self.weights.items() for name in names}

    def sources(self, shard: Shard) -> list[str]:
        """The float tensors that a shard is made of, each once, in the order in which they are read."""
        return list(dict.fromkeys(self._of.get(name, name) for name in shard.tensors))

    def fill(self, shard: Shard, writer: TensorWriter) -> dict[str, float | None]:
        """Writes every tensor of a shard, and the digests; returns the SQNR of each weight that was quantized.

        Raises:
            WeightError: a weight holds NaN or infinity. OSError: reading or writing fails.
        """
        out = _Output(writer, {name: hashlib.sha256() for name in shard.tensors})
        errors = {name: ErrorSum() for name in self.sources(shard) if name in self.weights}
        blocks = [block for name in self.sources(shard) for block in self._blocks(name)]
        with Workers() as workers:
            for block, done in workers.run(self._work, blocks):
                for error in done.errors:
                    errors[block.name].merge(error)
                for stored_name, tensor in done.tensors.items():
                    out.write(stored_name, tensor)
                self.report(block.name, block.is_last, done.nbytes)
        digests = [torch.frombuffer(bytearray(h.digest()), dtype=torch.uint8) for h in out.hashes.values()]
        writer.write_rows(DIGESTS, torch.stack(digests))
        return {name: total.sqnr_db for name, total in errors.items()}

    def _work(self, block: _Block) -> _Done:
        """Reads a block, and rounds it where its tensor has a scheme."""
        part = self.checkpoint.rows(block.name, block.start, block.stop)
        if block.name not in self.weights:
            return _Done(part.nbytes, {block.name: part}, [])
        annotation, names = self.weights[block.name]
        own = replace(annotation, shape=tuple(part.shape))
        stored = codes_of(part, own, STAGE)
        tensors = {n: t for n, t in zip(names, stored, strict=False) if t is not None}
        return _Done(part.nbytes, tensors, weight_errors(part, stored, own))

    def _blocks(self, name: str) -> list[_Block]:
        """A tensor's rows, some at a time."""
        shape = self.checkpoint.shape(name)
        rows, columns = (shape[0] if shape else 1), max(1, prod(shape[1:]))
        multiple = 1
        if name in self.weights:  # where tiles begin decides how sums are rounded: blocks are whole tiles
            is_rows = self.weights[name][0].layout == "rows"
            multiple = max(1, affine.TILE // columns) if is_rows else rows
        step = max(1, BLOCK // (columns * multiple)) * multiple
        return [_Block(name, i, min(rows, i + step), i + step >= rows) for i in range(0, rows, step)]


class _Block(NamedTuple):
    """Rows of a float tensor."""

    name: str
    start: int
    stop: int
    is_last: bool


class _Done(NamedTuple):
    """What became of a block: bytes read, rows to write, and their errors, a tile of them each."""

    nbytes: int
    tensors: dict[str, Tensor]
    errors: list[ErrorSum]


@dataclass
class _Output:
    """A file, and the running SHA-256 of each of its tensors."""

    writer: TensorWriter
    hashes: dict[str, Any]

    def write(self, name: str, part: Tensor) -> None:
        """The next rows of a tensor."""
        self.writer.write_rows(name, part)
        flat = part.detach().contiguous().view(-1)
        if flat.numel():
            self.hashes[name].update(memory(flat.view(torch.uint8)))
