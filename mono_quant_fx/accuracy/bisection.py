"""bisect: the pass after which a pipeline loses accuracy, and the node in which that pass loses it.

Two comparisons, both in lockstep. Against the float graph: how good is each node's output after a pass. Against the
graph right before that pass: what did the pass itself do to each node, on inputs without that pass's other errors.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, fx

from mono_quant_fx.accuracy.bisection_report import Bisection, BisectionStep, Suspect
from mono_quant_fx.errors import CalibrationError, ConfigError, PreconditionError
from mono_quant_fx.execution.batch import Batch, Prepare, leaves
from mono_quant_fx.execution.collection import collect, cut
from mono_quant_fx.execution.lockstep import Lockstep
from mono_quant_fx.execution.noise import Noise
from mono_quant_fx.execution.run import run_batch
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.effects import may_write
from mono_quant_fx.graph.state import written
from mono_quant_fx.numerics.error import ErrorSum
from mono_quant_fx.pass_base import Pass, PassResult, Pipeline
from mono_quant_fx.process.surroundings import in_plain_surroundings

#: Every node that the pass changed has its own error carried to the output on a few samples, the costliest on all.
FEW_SAMPLES, MOST_SUSPECTS = 4, 8


class _Outputs:
    """A sum for each floating-point output of the model, in order; the worst of them counts."""

    def __init__(self) -> None:
        self.sums: list[ErrorSum] = []

    def add(self, expected: Any, actual: Any) -> bool:
        """False, and nothing added, where the shapes differ."""
        pairs = _pairs(expected, actual)
        for i, (a, b) in enumerate(pairs or ()):
            self.sums += [ErrorSum()] * (i == len(self.sums))
            self.sums[i].add(a, b)
        return pairs is not None

    @property
    def db(self) -> float:
        """Of the worst output."""
        return min(map(_db, self.sums), default=math.inf)


class _Errors(NamedTuple):
    """Of the nodes by name, and of the model's outputs."""

    accumulated: dict[str, ErrorSum]
    local: dict[str, ErrorSum]
    outputs: _Outputs


@in_plain_surroundings
def bisect(
    pipeline: Pipeline,
    gm: fx.GraphModule | PassResult,
    data: Iterable[Any],
    threshold_db: float,
    *,
    prepare_batch: Prepare | None = None,
) -> Bisection:
    """Runs a pipeline's passes one by one and finds the pass, and in it the node, where accuracy is lost.

    After each pass the model's output is measured against `gm`. For the first pass after which its SQNR is below
    `threshold_db`, each node is measured against the graph right before that pass, and the error of each that
    it changed is carried to the output by itself. With many of them that is done on 4 samples, and for the 8
    costliest on all. A constant counts for the op that reads it. The pipeline's callback is not called.

    Args:
        gm: the float graph.
        data: an iterable of batches to measure on. Passes that need data carry their own.
        prepare_batch: turns a batch into the model's arguments.

    Raises:
        ConfigError: threshold_db is not a finite number. CalibrationError: no data, data that does not fit, or a graph
        that does not run (names the pass). PreconditionError: `gm` is not a GraphModule, its output holds no
        floating-point tensor or differs from run to run. PassError: a pass fails.

    >>> import torch
    >>> import mono_quant_fx as mq
    >>> _ = torch.manual_seed(0)
    >>> gm = mq.capture(torch.nn.Sequential(torch.nn.Linear(128, 64)).eval())
    >>> found = mq.bisect(mq.default_pipeline(), gm, [torch.randn(8, 128)], 30.0)
    >>> found.culprit_pass, found.culprit_node
    ('int4-lowering', 'linear')
    """
    if isinstance(threshold_db, bool) or not isinstance(threshold_db, int | float) or not math.isfinite(threshold_db):
        raise ConfigError(f"threshold_db={threshold_db!r}: a finite number of dB is needed, 20.0 for example")
    gm = tensors.need_graph(gm.graph_module if isinstance(gm, PassResult) else gm, "bisect")
    batches, samples = collect(data, None, prepare_batch)
    _check_reference(gm, batches)
    steps: list[BisectionStep] = []
    found: tuple[fx.GraphModule, fx.GraphModule] | None = None
    current, output_db = gm, math.inf
    for stage in pipeline.passes:
        start = time.perf_counter()
        result = stage(current)
        seconds = time.perf_counter() - start
        if result.modified:
            output_db = _after(stage, gm, result.graph_module, batches).outputs.db
        steps.append(BisectionStep(stage.name, output_db, result.modified, seconds))
        if found is None and output_db < threshold_db:
            found = current, result.graph_module
        current = result.graph_module
    if found is None:
        return Bisection(float(threshold_db), tuple(steps), samples)
    return _blame(Bisection(float(threshold_db), tuple(steps), samples), gm, found, batches)


def _check_reference(gm: fx.GraphModule, batches: list[Batch]) -> None:
    """The float graph runs, and says the same twice."""
    errors = _compare(gm, gm, batches, set())
    if not errors.outputs.sums:
        raise PreconditionError("bisect: the model's output holds no floating-point tensor, so that it has no SQNR")
    if errors.outputs.db != math.inf:
        raise PreconditionError(
            "bisect: the graph gives another output when it runs a second time; make it deterministic first (eval())"
        )


def _after(stage: Pass, reference: fx.GraphModule, gm: fx.GraphModule, batches: list[Batch]) -> _Errors:
    try:
        return _compare(reference, gm, batches, set())
    except CalibrationError as e:
        raise CalibrationError(f"bisect: after {stage.name} the graph does not run as the float graph does: {e}") from e


def _compare(a: fx.GraphModule, b: fx.GraphModule, batches: list[Batch], local_at: set[str]) -> _Errors:
    """How far the nodes of `b` are from those of `a`."""
    errors = _Errors(defaultdict(ErrorSum), defaultdict(ErrorSum), _Outputs())

    def visit(node: fx.Node, expected: Any, accumulated: Any, local: Any) -> None:
        is_output = node.op == "output"
        if is_output and not errors.outputs.add(expected, accumulated):
            raise CalibrationError("the outputs' shapes differ")
        if node.op.startswith("call_"):
            _add(errors.accumulated[node.name], expected, accumulated)
            if local is not None:
                _add(errors.local[node.name], expected, local)

    plan = Lockstep(_isolated(a), _isolated(b), local_at)
    for batch in batches:
        plan.run(batch, visit)
    return errors


def _blame(
    report: Bisection,
    reference: fx.GraphModule,
    found: tuple[fx.GraphModule, fx.GraphModule],
    batches: list[Batch],
) -> Bisection:
    before, after = found
    index = next(i for i, step in enumerate(report.steps) if step.output_db < report.threshold_db)
    constant = tensors.constant_nodes(after)
    nodes = {n.name: n for n in after.graph.nodes if not constant[n] and n.op.startswith("call_")}
    drifted = _compare(reference, after, batches, set()).accumulated
    first = next((n for n in nodes if n in drifted and _db(drifted[n]) < report.threshold_db), "output")
    again = {n for n, node in nodes.items() if not may_write(node)}  # what writes must not run a second time
    own = {n: _db(total) for n, total in _compare(before, after, batches, again).local.items() if total.batches}
    order = list(nodes)
    worst = [n for n in order if own.get(n, math.inf) < math.inf]
    if len(worst) > MOST_SUSPECTS:
        few = _carried(before, after, cut(batches[:1], FEW_SAMPLES, before)[0], worst)
        worst = sorted(worst, key=lambda n: (few[n], order.index(n)))[:MOST_SUSPECTS]
    alone = _carried(before, after, batches, worst)
    suspects = [
        Suspect(n, tensors.op_name(nodes[n]), tensors.module_path(nodes[n]), own[n], alone[n])
        for n in sorted(worst, key=lambda n: (alone[n], order.index(n)))
    ]
    culprit = suspects[0].node if suspects else first
    return report.with_culprit(index, culprit, first, tuple(suspects))


def _carried(before: fx.GraphModule, after: fx.GraphModule, batches: list[Batch], names: list[str]) -> dict[str, float]:
    """SQNR of the output when one of these nodes alone is as it is after the pass, and all else as before it."""
    exact = _isolated(before)
    is_stateful = bool(written(before))  # then each node's runs need a state of their own
    twins = {name: _isolated(before) if is_stateful else exact for name in names}
    errors = {name: _Outputs() for name in names}
    plan = Lockstep(_isolated(before), _isolated(after), set(names))
    noise = Noise()
    for batch in batches:
        expected = noise.first("", partial(run_batch, exact, batch))

        def visit(node: fx.Node, _: Any, __: Any, local: Any, batch: Batch = batch, expected: Any = expected) -> None:
            if local is not None:
                again = partial(run_batch, twins[node.name], batch, replaced={node.name: local})
                errors[node.name].add(expected, noise.again("", again))

        plan.run(batch, visit)
    return {name: found.db for name, found in errors.items()}


def _isolated(gm: fx.GraphModule) -> fx.GraphModule:
    twin = tensors.isolate(gm)
    assert isinstance(twin, fx.GraphModule)
    return twin


def _add(total: ErrorSum, expected: Any, actual: Any) -> None:
    """Adds the floating-point tensors of two values, unless their shapes differ."""
    for a, b in _pairs(expected, actual) or ():
        total.add(a, b)


def _pairs(expected: Any, actual: Any) -> list[tuple[Tensor, Tensor]] | None:
    """The floating-point tensors of two values side by side; None where their numbers or shapes differ."""
    ours, theirs = _tensors(expected), _tensors(actual)
    if [a.shape for a in ours] != [b.shape for b in theirs]:
        return None
    return list(zip(ours, theirs, strict=True))


def _tensors(value: Any) -> list[Tensor]:
    return [v for v in leaves(value) if isinstance(v, Tensor) and v.is_floating_point()]


def _db(total: ErrorSum) -> float:
    db = total.sqnr_db
    return math.inf if db is None else db
