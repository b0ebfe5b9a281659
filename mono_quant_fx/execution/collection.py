"""Reading data: whole batches, and a cut only along an axis that is certainly the batch's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mono_quant_fx.errors import CalibrationError
from mono_quant_fx.execution.batch import Batch, Prepare, leaves, to_batch
from mono_quant_fx.execution.run import run_batch
from mono_quant_fx.graph import tensors

UNLIMITED = 1 << 62
#: Rows of each part that is run to see whether dim 0 is the batch's.
TRIED_ROWS = 8


class Taken(list[Batch]):
    """Batches that were read and cut already: collect gives them back as they are."""

    @property
    def samples(self) -> int:
        """Along dim 0."""
        return sum(batch.samples() for batch in self)


@dataclass(frozen=True)
class Reading:
    """What was read of some data, and how much there is.

    Attributes:
        batches: whole ones, none of them empty.
        is_all: nothing is left to read.
        total, total_batches: in all of the data; None where only reading on would tell.
    """

    batches: Taken
    is_all: bool
    total: int | None
    total_batches: int | None


def read(
    data: Iterable[Any], limit: int, prepare_batch: Prepare | None = None, name: str = "calibration_data"
) -> Reading:
    """Whole batches, in order, until they hold `limit` samples or the data ends.

    A loader may fill one buffer again and again, so that what it hands over is copied; a list's own tensors are not.

    Raises:
        CalibrationError: `data` is a tensor or no iterable, or holds no sample; prepare_batch fails.
    """
    if isinstance(data, Tensor | Mapping | str) or not isinstance(data, Iterable):
        raise CalibrationError(
            f"{name} is a {type(data).__name__}: an iterable of batches is needed; write [batch] for one"
        )
    is_kept = isinstance(data, list | tuple) and prepare_batch is None
    batches, count, samples = Taken(), 0, 0
    for number, value in enumerate(data):
        batch = to_batch(value, prepare_batch, number)
        count, samples = count + 1, samples + batch.samples()
        if batch.samples():
            batches.append(batch if is_kept else batch.copied())
        if samples >= limit:
            break
    if not batches:
        raise CalibrationError(f"{name} is empty: give at least one batch, or leave it out (weights only)")
    length = _length(data)
    if samples < limit or length == count:
        return Reading(batches, True, samples, count)
    if is_kept and isinstance(data, list | tuple):
        rest = sum(to_batch(value).samples() for value in data[count:])
        return Reading(batches, False, samples + rest, length)
    return Reading(batches, False, None, length)


def _length(data: Iterable[Any]) -> int | None:
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:  # a loader of an iterable data set has no length after all
        return None


def collect(
    data: Iterable[Any], limit: int | None, prepare_batch: Prepare | None = None, gm: fx.GraphModule | None = None
) -> tuple[list[Batch], int]:
    """The first `limit` samples of `data` as batches (None: all), and their number.

    The last batch is cut where running `gm` shows that dim 0 is the batch's, and is taken whole elsewhere.

    Raises:
        CalibrationError: as read.
    """
    if isinstance(data, Taken):
        return data, data.samples
    found = read(data, limit or UNLIMITED, prepare_batch).batches
    if limit is not None:
        found, _ = cut(found, limit, gm)
    return found, found.samples


def cut(batches: Iterable[Batch], limit: int, gm: fx.GraphModule | None) -> tuple[Taken, Taken]:
    """The first `limit` samples, and the rest; a batch across the limit is cut, or goes whole to the first."""
    kept, rest, left = Taken(), Taken(), limit
    for batch in batches:
        count = batch.samples()
        if left <= 0:
            rest.append(batch)
        elif count > left and gm is not None and is_batch_axis(gm, batch, left):
            kept.append(batch.rows(0, left))
            rest.append(batch.rows(left, count))
        else:
            kept.append(batch)
        left -= count
    return kept, rest


def is_batch_axis(gm: fx.GraphModule, batch: Batch, at: int) -> bool:
    """Whether dim 0 is certainly the batch's, so that `batch` can be cut after `at` samples.

    It is where some rows of the batch give the rows of the output that they give among more rows: in every tensor that
    the model returns, scalars aside. Equal sizes alone prove nothing: an unbatched vector, a [T, T] mask and a table
    have a dim 0 too.
    """
    size = min(TRIED_ROWS, at, batch.samples() - at)
    if size < 1:
        return False
    twin = tensors.isolate(gm)
    assert isinstance(twin, fx.GraphModule)
    try:
        both, first, second = (_outputs(twin, batch.rows(*r)) for r in ((0, 2 * size), (0, size), (size, 2 * size)))
    except CalibrationError:
        return False
    if not both or not len(both) == len(first) == len(second):
        return False
    pairs = zip(both, first, second, strict=True)
    return all(w.shape[0] == 2 * size and _alike(w[:size], a) and _alike(w[size:], b) for w, a, b in pairs)


def _outputs(gm: fx.GraphModule, batch: Batch) -> list[Tensor]:
    return [v for v in leaves(run_batch(gm, batch)) if isinstance(v, Tensor) and v.dim()]


def _alike(a: Tensor, b: Tensor) -> bool:
    """Equal up to what another number of rows does to the order of sums."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.is_floating_point() or a.is_complex()) or a.numel() == 0:
        return torch.equal(a, b)
    finite = torch.where(torch.isfinite(a), a.abs(), 0.0)
    tolerance = 64 * torch.finfo(a.dtype).eps
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(finite.max()), equal_nan=True)
