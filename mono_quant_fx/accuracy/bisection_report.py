"""Bisection: what Pipeline.bisect returns."""

from __future__ import annotations

import html
from dataclasses import dataclass, field, replace

from tabulate import tabulate


@dataclass(frozen=True)
class BisectionStep:
    """One pass: the SQNR of the model's output after it in dB, whether it changed the graph, and its wall time.

    The time does not count when two are compared, and is not printed.
    """

    pass_name: str
    output_db: float
    modified: bool
    seconds: float = field(compare=False)


@dataclass(frozen=True)
class Suspect:
    """A node that the culprit pass changed.

    Attributes:
        node, op, module: the node after the pass.
        local_db: SQNR of its output against the graph before the pass, on the inputs it had there.
        output_db: SQNR of the model's output against the graph before the pass, with this node alone changed.
    """

    node: str
    op: str
    module: str
    local_db: float
    output_db: float


@dataclass(frozen=True)
class Bisection:
    """Where a pipeline loses accuracy. str() is for a terminal; a notebook shows HTML.

    Attributes:
        threshold_db: what the output was asked to keep.
        steps: one a pass, in order.
        samples: how many samples were measured.
        culprit_index, culprit_pass: the first pass after which the output is below the threshold; None: there is none.
        culprit_node: the node whose change by that pass costs the output most; "output" where no node's own value
            changed, only what the model returns.
        first_node: the first node after that pass, in execution order, whose output is below the threshold against the
            float graph's node of that name.
        suspects: of the nodes that the pass changed at most 8, the costliest first.
    """

    threshold_db: float
    steps: tuple[BisectionStep, ...]
    samples: int
    culprit_index: int | None = None
    culprit_pass: str | None = None
    culprit_node: str | None = None
    first_node: str | None = None
    suspects: tuple[Suspect, ...] = ()

    def with_culprit(self, index: int, node: str, first_node: str, suspects: tuple[Suspect, ...]) -> Bisection:
        """The report with who did it."""
        name = self.steps[index].pass_name
        return replace(
            self,
            culprit_index=index,
            culprit_pass=name,
            culprit_node=node,
            first_node=first_node,
            suspects=suspects,
        )

    @property
    def verdict(self) -> str:
        """The finding in words."""
        if self.culprit_index is None:
            return f"no loss: the output stays at or above {self.threshold_db:g} dB after every pass"
        db = self.steps[self.culprit_index].output_db
        return (
            f"{self.culprit_pass} (pass {self.culprit_index + 1} of {len(self.steps)}) takes the output to {db:.1f} dB"
            f", below {self.threshold_db:g} dB; its change of {self.culprit_node} costs most, and the first node below "
            f"is {self.first_node}"
        )

    def __str__(self) -> str:
        return "\n\n".join([self.verdict, *self._tables("simple")])

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.verdict)}</p>" + "".join(self._tables("html"))

    def _tables(self, style: str) -> list[str]:
        marks = ["<-" if i == self.culprit_index else "" for i in range(len(self.steps))]
        steps = [[s.pass_name, f"{s.output_db:.1f}", mark] for s, mark in zip(self.steps, marks, strict=True)]
        found = [[s.node, s.op, s.module, f"{s.local_db:.1f}", f"{s.output_db:.1f}"] for s in self.suspects]
        tables = [
            (steps, {"pass": "left", "output dB": "right", "": "left"}),
            (found, {"node": "left", "op": "left", "module": "left", "local dB": "right", "output dB": "right"}),
        ]
        return [
            tabulate(rows, tuple(columns), style, disable_numparse=True, colalign=tuple(columns.values()))
            for rows, columns in tables
            if rows
        ]
