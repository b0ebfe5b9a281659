"""torch.export with as many sizes dynamic as the model allows, in a stated time, and the batch free where it can be."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from mono_quant_fx.execution.batch import Batch
from mono_quant_fx.frontend.export import export
from mono_quant_fx.frontend.export_sizes import refusal, refused_batches, unequal
from mono_quant_fx.frontend.failures import reason
from mono_quant_fx.frontend.faithfulness import Expectation, Findings, check_faithful
from mono_quant_fx.frontend.stopwatch import OverBudgetError
from mono_quant_fx.frontend.variants import with_samples

#: Seconds of processor time for exports with every size dynamic; after that only the batch is.
BUDGET_SECONDS = 20.0
LATE = "torch.export with every size dynamic"


@dataclass(frozen=True)
class Exported:
    """A graph, the inputs that it was exported on, which sizes were to stay free, and what the user should know.

    `refused` are the batch sizes, of those tried, that it refuses; `findings` where it differs from the model.
    """

    graph_module: fx.GraphModule
    batch: Batch
    dynamic: str
    notes: list[str]
    refused: dict[int, str] = field(default_factory=dict)
    findings: Findings = field(default_factory=Findings)

    @property
    def is_free(self) -> bool:
        """Whether every batch size that was tried is taken."""
        return not self.refused and "batch" not in self.findings.held_back


def exported(model: nn.Module, example: Batch, dynamic_shapes: Any, expected: Expectation | None) -> Exported:
    """The graph that leaves most sizes free, of those that compute what the model does.

    Every size is dynamic first. Where that fails, takes too long, or leaves a graph that refuses other batches, another
    batch size is tried (the example's may be equal to some other size by chance), then the batch alone as dynamic, and
    at last no size.

    Args:
        dynamic_shapes: as torch.export takes it, and then it is what counts; None for the above.
        expected: what the model gives; None if it cannot be run.

    Raises:
        Exception: whatever stopped the last way.
    """
    if dynamic_shapes is not None:
        gm, notes = export(model, example, dynamic_shapes)
        _check(gm, expected)
        return Exported(gm, example, "all", notes)
    return _Search(model, example, expected).run()


@dataclass
class _Search:
    model: nn.Module
    example: Batch
    expected: Expectation | None
    left: float = field(default_factory=lambda: BUDGET_SECONDS)
    best: Exported | None = None
    why: str = ""
    notes: list[str] = field(default_factory=list)

    def run(self) -> Exported:
        failure: Exception | None = None
        for dynamic, batch in self._steps():
            if self.best is not None and self.best.is_free:
                break
            try:
                self._keep(self._try(dynamic, batch))
                continue
            except GuardOnDataDependentSymNode as e:
                failure = e
                break  # no choice of sizes helps
            except Exception as e:
                failure = e
            if not self.why:
                is_late = isinstance(failure, OverBudgetError)
                self.why = f"{LATE} takes more than {BUDGET_SECONDS:g} s" if is_late else reason(failure)
        if self.best is None:
            raise failure or OverBudgetError("nothing was tried")
        found = self._part(self.best)
        return replace(found, notes=self._notes(found))

    def _steps(self) -> Iterator[tuple[str, Batch]]:
        """One sample is doubled first, since torch.export freezes a size of one."""
        first = self.example.doubled() or self.example
        others = with_samples(first, first.samples() + 3)
        yield "all", first
        if first is not self.example and self.best is None:
            yield "all", self.example
        if self.best is not None:
            yield "all", others
        yield "batch", first
        if self.best is not None:
            yield "batch", others
        else:
            yield "none", self.example

    def _try(self, dynamic: str, batch: Batch) -> Exported:
        if dynamic == "all" and self.left <= 0.0:
            raise OverBudgetError(f"{LATE}: no time is left")
        began = time.thread_time()
        try:
            budget = self.left if dynamic == "all" else None
            gm, notes = export(self.model, batch, dynamic=dynamic, budget=budget)
        finally:
            if dynamic == "all":
                self.left -= time.thread_time() - began
        findings = _check(gm, self.expected)
        return Exported(gm, batch, dynamic, notes, refused_batches(gm, self.example), findings)

    def _keep(self, found: Exported) -> None:
        best = self.best
        if not self.why and not found.is_free:
            why = next(iter(found.refused.values()), "which the model takes")
            self.why = f"with every size dynamic the graph refuses other batches ({why})"
        if best is None or (len(found.refused), not found.is_free) < (len(best.refused), not best.is_free):
            self.best = found

    def _part(self, best: Exported) -> Exported:
        """Parts inputs whose sizes are equal in the example and need not be for the model, where that can be."""
        if self.expected is None or best.dynamic != "all":
            return best
        for apart in unequal(best.graph_module, best.batch):
            against = refusal(best.graph_module, apart)
            if against is None or not self.expected.runs_on(apart):
                continue
            with contextlib.suppress(Exception):
                found = self._try("all", apart)
                if len(found.refused) <= len(best.refused):
                    return self._part(found)
            self.notes.append(f"the graph refuses {apart}, which the model takes ({against})")
        return best

    def _notes(self, found: Exported) -> list[str]:
        """What the user should know about the sizes."""
        notes, held_back = [*found.notes, *self.notes], found.findings.held_back
        if found.dynamic != "all":
            kept = "only the batch is dynamic" if found.dynamic == "batch" else "no size is dynamic"
            notes.append(f"{self.why}: {kept}, every other size stays as in the example; dynamic_shapes= frees some")
        is_said = found.dynamic == "none" or any(".shape[0] = " in note for note in notes)
        if found.refused and not is_said:
            sizes, why = ", ".join(map(str, found.refused)), next(iter(found.refused.values()))
            notes.append(f"the graph refuses a batch of {sizes} ({why})")
        elif "batch" in held_back and not is_said:
            notes.append("the graph refuses other batch sizes, which the model takes")
        if "length" in held_back and found.dynamic == "all" and not found.notes:
            notes.append("the graph refuses other lengths, which the model takes")
        if "strides" in held_back:
            notes.append("the graph refuses inputs that are not contiguous, which the model takes")
        if found.findings.single:
            notes.append(f"a batch of 1 is another case: {found.findings.single}")
        return [f"capture: {note.removeprefix('capture: ')}" for note in notes]


def _check(gm: fx.GraphModule, expected: Expectation | None) -> Findings:
    return Findings() if expected is None else check_faithful(gm, expected)
