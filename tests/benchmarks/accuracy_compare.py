"""What beats what: each peer's row beside mono_quant_fx's rows at the same group size, and the verdict in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate

from tests.benchmarks.accuracy_cache import Row
from tests.benchmarks.accuracy_settings import (
    ALGORITHMS,
    PEERS,
    Setting,
    activation_setting,
    weight_setting,
    workload,
)

INTRODUCTION = """\
## What beats what

Each row of another package beside those of mono_quant_fx with the same group size and, weight-only, the same symmetry
(with INT8 activations: `w4a8`). Positive differences are mono_quant_fx's: better by so much. A difference within the
larger of the two standard errors is marked with ≈. All settings answer the same questions, so the standard error of a
difference is smaller than that, and ≈ errs on the side of doubt.

Where another package is ahead in groups of 32, mind the bits: quanto and HQQ keep a float32 zero point beside each
scale (6 bits a weight), so their grid follows a group's range more closely than a whole number lets it (5.25 bits).

SmolLM2 in asymmetric groups of 32 is left out. Its weights were published on just such a grid (GGUF Q4_1), and whoever
rounds to nearest with a float zero point gets them back bit for bit, which says nothing of any other model.
"""


@dataclass(frozen=True)
class Comparison:
    """One peer's row and ours.

    Attributes:
        model, peer: keys.
        theirs: the peer's row.
        ours: algorithm -> our row.
        is_equal: the peer quantized every weight that we did, so that the bits compare.
    """

    model: str
    peer: str
    theirs: Row
    ours: dict[str, Row]
    is_equal: bool

    def lead(self, algorithm: str) -> float:
        """How much better our row is, in the metric's units; negative: worse."""
        sign = 1.0 if workload(self.model).HIGHER_IS_BETTER else -1.0
        return sign * (_value(self.ours[algorithm]) - _value(self.theirs))

    def is_within_error(self, algorithm: str) -> bool:
        """Whether the difference is no larger than the larger standard error."""
        rows = (self.ours[algorithm], self.theirs)
        return abs(self.lead(algorithm)) <= max(row.standard_error or 0.0 for row in rows)


def _value(row: Row) -> float:
    assert row.value is not None
    return row.value


def counterparts(peer: Setting) -> dict[str, str]:
    """Algorithm -> the name of our setting that a peer's is compared with."""
    size, symmetric = peer.options["group_size"], peer.options["symmetric"]
    if peer.kind == "activations":
        return {a: activation_setting(a, size) for a in ALGORITHMS}
    return {a: weight_setting(a, symmetric, size) for a in ALGORITHMS}


def comparisons(models: Sequence[str], cells: dict[tuple[str, str], Row]) -> list[Comparison]:
    """Every peer's row that holds figures and has a counterpart with figures."""
    found = []
    for model in models:
        for peer in PEERS:
            if model == "smollm2" and peer.options["group_size"] == 32 and not peer.options["symmetric"]:
                continue
            theirs = cells.get((model, peer.name))
            ours = {a: cells.get((model, name)) for a, name in counterparts(peer).items()}
            known = {a: row for a, row in ours.items() if row is not None and not row.error}
            if theirs is not None and not theirs.error and known:
                found.append(Comparison(model, peer.name, theirs, known, "float32" not in theirs.schemes))
    return found


def verdicts(found: list[Comparison]) -> str:
    """The section: the sentences, then the table; nothing without a comparison."""
    if not found:
        return ""
    lines = [_sentence(algorithm, found) for algorithm in ALGORITHMS]
    lines += [_behind_all(found), _unequal(found)]
    return INTRODUCTION + "\n" + "\n".join(line for line in lines if line) + "\n\n" + _table(found)


def _sentence(algorithm: str, found: list[Comparison]) -> str:
    """How often an algorithm is ahead of the peers at equal bits, and where it is not."""
    rows = [c for c in found if c.is_equal and algorithm in c.ours]
    if not rows:
        return ""
    ahead = [c for c in rows if c.lead(algorithm) > 0]
    behind = [c for c in rows if c.lead(algorithm) < 0]
    where = "; ".join(f"{_where(c)} by {_amount(c, algorithm)}" for c in behind)
    return (
        f"- **{algorithm}** is ahead in {len(ahead)} of {len(rows)} comparisons at equal group size, level in "
        f"{len(rows) - len(ahead) - len(behind)}, behind in {len(behind)}{f': {where}' if where else ''}."
    )


def _behind_all(found: list[Comparison]) -> str:
    lost = [c for c in found if c.is_equal and all(c.lead(a) < 0 for a in c.ours)]
    if not lost:
        return "- No other package is ahead of all algorithms anywhere."
    return f"- **Ahead of every algorithm of mono_quant_fx**: {'; '.join(map(_where, lost))}."


def _unequal(found: list[Comparison]) -> str:
    unequal = [c for c in found if not c.is_equal]
    if not unequal:
        return ""
    where = "; ".join(
        f"{_where(c)} ({100 * c.theirs.schemes['float32'] / sum(c.theirs.schemes.values()):.0f} % float, "
        f"{c.theirs.bits:.2f} bits)"
        for c in unequal
    )
    return f"- Not at equal bits, and left out of these counts, since a part of the weights stays float: {where}."


def _where(c: Comparison) -> str:
    return f"{c.peer} on {workload(c.model).NAME}"


def _amount(c: Comparison, algorithm: str) -> str:
    return f"{abs(c.lead(algorithm)):.3f}{' ≈' if c.is_within_error(algorithm) else ''}"


def _table(found: list[Comparison]) -> str:
    head = ("model", "other package", "its metric", "its bits", "our bits", *ALGORITHMS)
    lines = [
        (
            workload(c.model).NAME,
            c.peer,
            f"{_value(c.theirs):.3f}",
            f"{c.theirs.bits:.2f}",
            f"{next(iter(c.ours.values())).bits:.2f}",
            *(_lead(c, a) for a in ALGORITHMS),
        )
        for c in found
    ]
    align = ["left", "left", *["right"] * (len(head) - 2)]
    return tabulate(lines, head, tablefmt="github", colalign=align, disable_numparse=True) + "\n"


def _lead(c: Comparison, algorithm: str) -> str:
    if algorithm not in c.ours:
        return ""
    return f"{c.lead(algorithm):+.3f}{' ≈' if c.is_within_error(algorithm) else ''}"
