"""Statuses: what the rows of a table deserve, by what their nodes do to outputs; by their weights where nothing ran."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mono_quant_fx.accuracy.row import AccuracyRow

#: dB above which a node needs no second look, and by how many a weight is worse than normal ones to be unusual.
GOOD_DB, UNUSUAL_DB = 30.0, 3.0
_RANKS = ("critical", "warning", "ok", "good")


@dataclass(frozen=True)
class Verdict:
    """A row's status, the dB that decided it (None: nothing to judge), and what else to say of them."""

    status: str
    db: float | None = None
    remark: str = ""


def verdicts(rows: Iterable[AccuracyRow], warning_db: float, error_db: float) -> list[Verdict]:
    """One a row, in execution order.

    A node is judged by its local output, and by its accumulated one where that falls below a threshold for the first
    time: the nodes after it inherit what it hands on. Without data a weight is judged against a normally distributed
    one at the same scheme, since how much a scheme costs is no fault of a weight.
    """
    found: list[Verdict] = []
    reached = math.inf
    for row in rows:
        if row.weight_sqnr_db is None and row.local_sqnr_db is None:
            found.append(Verdict("float"))
            continue
        if row.local_sqnr_db is None:
            found.append(_of_weight(row, error_db))
            continue
        verdict = Verdict(_status(row.local_sqnr_db, warning_db, error_db), row.local_sqnr_db)
        accumulated = math.inf if row.accumulated_sqnr_db is None else row.accumulated_sqnr_db
        status = _status(accumulated, warning_db, error_db)
        before = _status(reached, warning_db, error_db)
        if _RANKS.index(status) < min(1 + _RANKS.index("warning"), *map(_RANKS.index, (verdict.status, before))):
            verdict = Verdict(status, accumulated, "accumulated")
        found.append(verdict)
        reached = min(reached, accumulated)
    return found


def with_statuses(rows: Sequence[AccuracyRow], warning_db: float, error_db: float) -> list[AccuracyRow]:
    """The rows with the statuses of their verdicts."""
    pairs = zip(rows, verdicts(rows, warning_db, error_db), strict=True)
    return [replace(row, status=verdict.status) for row, verdict in pairs]


def _status(db: float, warning_db: float, error_db: float) -> str:
    return "critical" if db < error_db else "warning" if db < warning_db else "good" if db > GOOD_DB else "ok"


def _of_weight(row: AccuracyRow, error_db: float) -> Verdict:
    db, normal = row.weight_sqnr_db, row.normal_sqnr_db
    assert db is not None
    if normal is None or db > normal - UNUSUAL_DB:
        return Verdict("good" if db > GOOD_DB else "ok", db)
    return Verdict("critical" if db < error_db else "warning", db, f"where a normal weight has {normal:.1f}")
