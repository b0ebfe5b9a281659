"""The contract of a pass, kept in one place, and the Pipeline that runs them.

A pass is a frozen dataclass (its fields are its options) with three hooks: `requires` checks the stage of the input,
`rewrite` works on a clone in place, `ensures` checks the result. Everything else of the contract is done here: the
input stays untouched, dead code and replaced tensors go, the graph is linted, `modified` is computed, and each node
learns what was done to it (see provenance.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from mono_quant_fx import bisection, graph, pass_html, provenance
from mono_quant_fx.annotation import drop_gone_users
from mono_quant_fx.bisection_report import Bisection
from mono_quant_fx.data import Prepare
from mono_quant_fx.errors import ConfigError, MonoQuantError, PassError, PostconditionError, PreconditionError
from mono_quant_fx.fingerprint import fingerprint
from mono_quant_fx.pass_html import PassChange
from mono_quant_fx.surroundings import in_plain_surroundings


@dataclass(frozen=True)
class PassResult:
    """What a pass returns: the graph, and whether it differs from the one that went in.

    `changes` tells what each pass that ran did, by the names of nodes; a notebook shows it.
    """

    graph_module: fx.GraphModule
    modified: bool
    changes: tuple[PassChange, ...] = field(default=(), repr=False, compare=False)

    def _repr_html_(self) -> str:
        return pass_html.result_html(self.modified, self.changes)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(pass_html.result_text(self.modified, self.changes))


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
        graph.need_graph(source, self.name)
        self._check(self.requires(source), PreconditionError)
        before = fingerprint(source)
        result = graph.clone(source)
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
    graph.drop_dead_code(gm)
    drop_gone_users(gm)
    graph.drop_unused(gm)
    gm.graph.lint()
    gm.recompile()


Callback = Callable[[Pass, fx.GraphModule, PassResult], Any]


@dataclass(frozen=True)
class Pipeline:
    """Passes in order, and one callback `(pass, graph before, result)` for whoever prints, times or verifies.

    Raises:
        ConfigError: something in `passes` is no Pass.
    """

    passes: tuple[Pass, ...]
    callback: Callback | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", tuple(self.passes))
        for item in self.passes:
            if not isinstance(item, Pass):
                raise ConfigError(f"Pipeline: {item!r} is no pass; pass instances such as DequantFusion() are needed")

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

    def bisect(
        self,
        gm: fx.GraphModule | PassResult,
        data: Iterable[Any],
        threshold_db: float,
        *,
        prepare_batch: Prepare | None = None,
    ) -> Bisection:
        """Runs the passes one by one and finds the pass, and in it the node, where accuracy is lost.

        After each pass the model's output is measured against `gm`. For the first pass after which its SQNR is below
        `threshold_db`, each node is measured against the graph right before that pass, and the error of each that
        it changed is carried to the output by itself. With many of them that is done on 4 samples, and for the 8
        costliest on all. A constant counts for the op that reads it. The callback is not called.

        Args:
            gm: the float graph.
            data: an iterable of batches to measure on. Passes that need data carry their own.
            prepare_batch: turns a batch into the model's arguments.

        Raises:
            ConfigError: threshold_db is no finite number. CalibrationError: no data, data that does not fit, or a graph
            that does not run (names the pass). PreconditionError: `gm` is no GraphModule, its output holds no
            floating-point tensor or differs from run to run. PassError: a pass fails.

        >>> import torch
        >>> import mono_quant_fx as mq
        >>> _ = torch.manual_seed(0)
        >>> gm = mq.capture(torch.nn.Sequential(torch.nn.Linear(128, 64)).eval())
        >>> found = mq.default_pipeline().bisect(gm, [torch.randn(8, 128)], 30.0)
        >>> found.culprit_pass, found.culprit_node
        ('int4-lowering', 'linear')
        """
        source = gm.graph_module if isinstance(gm, PassResult) else gm
        return bisection.bisect(self.passes, source, data, threshold_db, prepare_batch)

    def _repr_html_(self) -> str:
        return pass_html.pipeline_html(self.passes)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(pass_html.pipeline_text(self.passes))
