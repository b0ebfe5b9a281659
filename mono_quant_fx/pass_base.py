"""The contract of a pass, kept in one place, and the Pipeline that runs them.

A pass is a frozen dataclass (its fields are its options) with three hooks: `requires` checks the stage of the input,
`rewrite` works on a clone in place, `ensures` checks the result. Everything else of the contract is done here: the
input stays untouched, dead code and replaced tensors go, the graph is linted, `modified` is computed, and each node
learns what was done to it (see graph/provenance.py).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from mono_quant_fx import pass_change
from mono_quant_fx.errors import ConfigError, MonoQuantError, PassError, PostconditionError, PreconditionError
from mono_quant_fx.graph import provenance, tensors
from mono_quant_fx.graph.annotation import drop_gone_users
from mono_quant_fx.graph.fingerprint import fingerprint
from mono_quant_fx.pass_change import PassChange
from mono_quant_fx.process.surroundings import in_plain_surroundings


@dataclass(frozen=True)
class PassResult:
    """What a pass returns: the graph, and whether it differs from the one that went in.

    `changes` tells what each pass that ran did, by the names of nodes; a notebook shows it.
    """

    graph_module: fx.GraphModule
    modified: bool
    changes: tuple[PassChange, ...] = field(default=(), repr=False, compare=False)

    def _repr_html_(self) -> str:
        return pass_change.result_html(self.modified, self.changes)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(pass_change.result_text(self.modified, self.changes))


class Pass(ABC):
    """Base of every pass: `pass_(gm) -> PassResult`; it accepts a PassResult too, so that passes chain as functions."""

    name: ClassVar[str]

    def requires(self, gm: fx.GraphModule) -> str | None:
        """What keeps this pass from running on `gm`, in words with the remedy; None when nothing does."""
        return None

    @abstractmethod
    def rewrite(self, gm: fx.GraphModule) -> None:
        """Changes `gm`, a clone that shares its tensors: nodes and attributes freely, never a tensor's content."""

    def ensures(self, gm: fx.GraphModule) -> str | None:
        """What is wrong with the result, in words; None when it is as promised."""
        return None

    @in_plain_surroundings
    def __call__(self, gm: fx.GraphModule | PassResult) -> PassResult:
        """Runs the pass.

        Raises:
            PassError: requires, rewrite or ensures failed; the message names the pass, and the cause is kept.
        """
        source = gm.graph_module if isinstance(gm, PassResult) else gm
        tensors.need_graph(source, self.name)
        self._check(self.requires(source), PreconditionError)
        before = fingerprint(source)
        result = tensors.clone(source)
        names = provenance.mark(result)
        try:
            self.rewrite(result)
            _tidy(result)
        except MonoQuantError:
            raise
        except Exception as e:
            raise PassError(f"{self.name}: {type(e).__name__}: {e}") from e
        marks = provenance.Marks(names, provenance.unmark(result))
        self._check(self.ensures(result), PostconditionError)
        after = fingerprint(result)
        change = PassChange.between(self.name, before.nodes, after.nodes)
        if after == before:
            return PassResult(source, False, (change,))
        provenance.record(self.name, source, result, marks, before, after)
        return PassResult(result, True, (change,))

    def _check(self, complaint: str | None, error: type[PassError]) -> None:
        if complaint is not None:
            raise error(f"{self.name}: {complaint}")


def _tidy(gm: fx.GraphModule) -> None:
    tensors.drop_dead_code(gm)
    drop_gone_users(gm)
    tensors.drop_unused(gm)
    gm.graph.lint()
    gm.recompile()


Callback = Callable[[Pass, fx.GraphModule, PassResult], Any]


@dataclass(frozen=True)
class Pipeline:
    """Passes in order, and one callback `(pass, graph before, result)` for whoever prints, times or verifies.

    Another pipeline comes of it by name, and this one stays as it is:

    >>> from mono_quant_fx.passes import DequantFusion, LinearMerging, SkipAnnotation
    >>> pipeline = Pipeline((SkipAnnotation(), DequantFusion()))
    >>> longer = pipeline.insert_after("dequant-fusion", LinearMerging())
    >>> [item.name for item in longer.without("skip-annotation").passes]
    ['dequant-fusion', 'linear-merging']

    Raises:
        ConfigError: something in `passes` is not a Pass, or no pass of the name is there.
    """

    passes: tuple[Pass, ...]
    callback: Callback | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", tuple(self.passes))
        for item in self.passes:
            if not isinstance(item, Pass):
                raise ConfigError(f"Pipeline: {item!r} is no pass; pass instances such as DequantFusion() are needed")

    def insert_after(self, name: str, *passes: Pass) -> Pipeline:
        """With `passes`, in this order, behind the pass called `name`."""
        at = self._find(name) + 1
        return dataclasses.replace(self, passes=(*self.passes[:at], *passes, *self.passes[at:]))

    def insert_before(self, name: str, *passes: Pass) -> Pipeline:
        """With `passes`, in this order, ahead of the pass called `name`."""
        at = self._find(name)
        return dataclasses.replace(self, passes=(*self.passes[:at], *passes, *self.passes[at:]))

    def replace(self, name: str, *passes: Pass) -> Pipeline:
        """With `passes` in the place of the pass called `name`."""
        at = self._find(name)
        return dataclasses.replace(self, passes=(*self.passes[:at], *passes, *self.passes[at + 1 :]))

    def without(self, name: str) -> Pipeline:
        """Without the pass called `name`."""
        return self.replace(name)

    def _find(self, name: str) -> int:
        names = [item.name for item in self.passes]
        if names.count(name) != 1:
            found = "none" if name not in names else f"{names.count(name)}"
            raise ConfigError(f"Pipeline: {name!r}: {found} of its passes is called that; they are {', '.join(names)}")
        return names.index(name)

    def __call__(self, gm: fx.GraphModule | PassResult) -> PassResult:
        """Runs every pass on the result of the one before; `modified` is True if any of them changed the graph."""
        current = gm.graph_module if isinstance(gm, PassResult) else gm
        modified, changes = False, gm.changes if isinstance(gm, PassResult) else ()
        for item in self.passes:
            result = item(current)
            if self.callback is not None:
                self.callback(item, current, result)
            current, modified = result.graph_module, modified or result.modified
            changes += result.changes
        return PassResult(current, modified, changes)

    def _repr_html_(self) -> str:
        return pass_change.pipeline_html(self.passes)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(pass_change.pipeline_text(self.passes))
