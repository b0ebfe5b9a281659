"""Which data calibrates and which judges: nothing is judged on what it was fitted to where data can be held out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from mono_quant_fx.collection import Reading, Taken, cut, is_batch_axis
from mono_quant_fx.surroundings import in_plain_surroundings
from mono_quant_fx.table import CALIBRATION, EVALUATION, HELD_OUT

#: One of so many batches (or samples of a single batch) is held out.
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
    """Judges on the evaluation data; without, on what the data has past `limit`; else on a fifth of it.

    Args:
        gm: the float graph; runs to see whether a batch may be cut.
        limit: of samples to calibrate on, and of samples past them to judge on.
    """
    if calibration is None:
        return Split() if evaluation is None else Split(None, evaluation.batches, EVALUATION)
    kept, rest = cut(calibration.batches, limit, gm)
    if evaluation is not None:
        judged, measured_on = evaluation.batches, EVALUATION
    elif rest:
        judged, measured_on = cut(rest, limit, gm)[0], HELD_OUT
    else:
        kept, judged = _hold_out(gm, kept)
        measured_on = HELD_OUT
    known = [any(batch.equals(other) for other in kept) for batch in judged]
    if measured_on == HELD_OUT:  # a loader may repeat itself, and a repeated batch is no unseen one
        judged = Taken(batch for batch, is_known in zip(judged, known, strict=True) if not is_known)
    is_cut = bool(rest) or not calibration.is_all
    notes = _used(calibration, kept.samples, is_cut, limit)
    if not judged or all(known):
        judged, measured_on = judged or kept, CALIBRATION
    elif measured_on == EVALUATION and any(known):
        notes += (f"{sum(known)} of the {len(known)} batches of evaluation_data were calibrated on as well",)
    return Split(kept, judged, measured_on, notes)


def _hold_out(gm: fx.GraphModule, batches: Taken) -> tuple[Taken, Taken]:
    """Every fifth batch, spread evenly, the last among them; of a single batch a fifth of its samples."""
    if len(batches) > 1:
        count = max(1, len(batches) // EVERY)
        chosen = {(i + 1) * len(batches) // count - 1 for i in range(count)}
        kept = Taken(batch for i, batch in enumerate(batches) if i not in chosen)
        return kept, Taken(batch for i, batch in enumerate(batches) if i in chosen)
    (batch,) = batches
    total = batch.samples()
    at = total - max(1, total // EVERY)
    if at < 1 or not is_batch_axis(gm, batch, at):
        return batches, Taken()
    return Taken([batch.rows(0, at)]), Taken([batch.rows(at, total)])


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
