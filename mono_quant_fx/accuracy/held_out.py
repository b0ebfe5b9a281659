"""Which data calibrates and which judges: nothing is judged on what it was fitted to where data can be held out."""

from __future__ import annotations

import ctypes
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mono_quant_fx.accuracy.table import CALIBRATION, EVALUATION, HELD_OUT
from mono_quant_fx.execution.batch import Batch
from mono_quant_fx.execution.collection import Reading, Taken, cut, is_batch_axis
from mono_quant_fx.process.surroundings import in_plain_surroundings

#: One of so many batches (or samples, of fewer batches) is held out.
EVERY = 5


@dataclass(frozen=True)
class Split:
    """What to calibrate on, what to judge on, what the latter is called, and what the user should know of it."""

    calibration: Taken | None = None
    evaluation: Taken | None = None
    measured_on: str | None = None
    notes: tuple[str, ...] = ()


@in_plain_surroundings
def split(gm: fx.GraphModule, calibration: Reading | None, evaluation: Reading | None, limit: int) -> Split:
    """Judges on the evaluation data; without, on what the data has past `limit`, if that is a fifth; else on a fifth.

    Args:
        gm: the float graph; runs to see whether a batch may be cut.
        limit: of samples to calibrate on, and of samples past them to judge on.
    """
    if calibration is None:
        if evaluation is None:
            return Split()
        return Split(None, evaluation.batches, EVALUATION, _holding_nan(evaluation.batches, EVALUATION))
    kept, rest = cut(calibration.batches, limit, gm)
    is_cut = not calibration.is_all or bool(rest)
    if evaluation is not None:
        judged, measured_on = evaluation.batches, EVALUATION
    elif (EVERY - 1) * rest.samples >= kept.samples:
        judged, measured_on = cut(rest, limit, gm)[0], HELD_OUT
    else:  # nothing is past the limit, or so little that it would be no judge
        kept, judged = _hold_out(gm, Taken([*kept, *rest]))
        measured_on, is_cut = HELD_OUT, not calibration.is_all
    known = _known_samples(gm, kept, judged)
    if measured_on == HELD_OUT:  # a loader may repeat itself, and a repeated sample is no unseen one
        judged = Taken(batch for batch, count in zip(judged, known, strict=True) if count < batch.samples())
    notes = _used(calibration, kept.samples, is_cut, limit)
    if not judged or sum(known) == judged.samples:
        judged, measured_on = judged or kept, CALIBRATION
    elif measured_on == EVALUATION and any(known):
        notes += (f"{sum(known):,} of the {judged.samples:,} samples of evaluation_data were calibrated on as well",)
    return Split(kept, judged, measured_on, notes + _holding_nan(judged, measured_on))


def _holding_nan(judged: Taken, measured_on: str) -> tuple[str, ...]:
    """A note on samples that judge nothing: what is NaN in both graphs counts as equal."""
    bad = [i for i, batch in enumerate(judged) if any(_has_nan(t) for t in batch.tensors())]
    if not bad:
        return ()
    return (
        f"{len(bad)} of {len(judged)} batches of the {measured_on} hold NaN (the first is batch {bad[0]}): what is NaN "
        "in both graphs counts as equal, so that the figures leave it out; mask it or drop these batches",
    )


def _has_nan(t: Tensor) -> bool:
    return (t.is_floating_point() or t.is_complex()) and t.layout is torch.strided and bool(t.isnan().any())


def _hold_out(gm: fx.GraphModule, batches: Taken) -> tuple[Taken, Taken]:
    """Every fifth batch, spread evenly, the last among them; of fewer batches than five the last fifth of the samples.

    The last batch of a loader is often a small one, which would be no judge alone: the one before it is held out too.
    """
    if len(batches) < EVERY:
        return _hold_out_the_last(gm, batches)
    kept, judged, count = Taken(), Taken(), len(batches) // EVERY
    for i in range(count):
        block = Taken(batches[i * len(batches) // count : (i + 1) * len(batches) // count])
        held = 1
        while held < len(block) - 1 and 2 * EVERY * Taken(block[-held:]).samples < block.samples:
            held += 1
        kept += block[:-held]
        judged += block[-held:]
    return kept, judged


def _hold_out_the_last(gm: fx.GraphModule, batches: Taken) -> tuple[Taken, Taken]:
    """The last fifth of the samples where a batch may be cut there; else the last batch, where there are others."""
    total = batches.samples
    if total > 1:
        kept, judged = cut(batches, total - max(1, total // EVERY), gm)
        if judged:
            return kept, judged
    return (batches, Taken()) if len(batches) == 1 else (Taken(batches[:-1]), Taken(batches[-1:]))


def _known_samples(gm: fx.GraphModule, kept: Taken, judged: Taken) -> list[int]:
    """How many samples of each of the judged batches were calibrated on, whatever batches they came in.

    Where dim 0 is not certainly the batch's, rows are no samples, and only whole batches are compared.
    """
    whole = [batch.samples() if any(batch.equals(other) for other in kept) else 0 for batch in judged]
    seen = {sample for batch in kept for sample in _hashed_samples(batch)}
    found = [sum(sample in seen for sample in _hashed_samples(batch)) for batch in judged]
    largest = max((*kept, *judged), key=Batch.samples)
    if found == whole or not is_batch_axis(gm, largest, largest.samples() // 2):
        return whole
    return [max(pair) for pair in zip(whole, found, strict=True)]


def _hashed_samples(batch: Batch) -> list[int]:
    """A hash of each sample: its row of every tensor whose dim 0 is the sample count, and all other values."""
    values, structure = pytree.tree_flatten((batch.args, batch.kwargs))
    total = batch.samples()
    has_rows = [isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] == total for v in values]
    of_all = hash((repr(structure), *(_content(v) for v, has in zip(values, has_rows, strict=True) if not has)))
    rows = [map(_content, v) for v, has in zip(values, has_rows, strict=True) if has]
    return [hash((of_all, *row)) for row in zip(*rows, strict=True)] if rows else [of_all] * total


def _content(value: Any) -> Hashable:
    """Equal for equal tensors and numbers; of anything else the object itself."""
    if isinstance(value, Tensor) and value.layout is torch.strided:
        plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        return value.dtype, value.shape, ctypes.string_at(plain.data_ptr(), plain.nbytes)  # numpy may be absent
    return value if isinstance(value, int | float | str) else id(value)


def _used(reading: Reading, used: int, is_cut: bool, limit: int) -> tuple[str, ...]:
    """What the user should know of data that was given and not used to calibrate, or used past the limit."""
    notes = []
    if is_cut and reading.total is not None:
        notes.append(f"Calibration data: {used:,} of {reading.total:,} samples used")
    elif is_cut:
        of = "" if reading.total_batches is None else f" of {reading.total_batches:,}"
        notes.append(f"Calibration data: {used:,} samples used; only {len(reading.batches):,}{of} batches were read")
    if used > limit:
        notes.append(
            f"Calibration data: {used:,} samples used; dim 0 is not certainly the batch's, so no batch was cut"
        )
    return tuple(f"{note} (num_calibration_samples={limit})" for note in notes)
