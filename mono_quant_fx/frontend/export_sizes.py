"""Which sizes an exported graph takes: its own checks of its inputs, run on inputs without values."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, fx

from mono_quant_fx.execution.batch import Batch
from mono_quant_fx.frontend.guards import is_guards
from mono_quant_fx.frontend.variants import other_length, resized, with_samples
from mono_quant_fx.graph.tensors import get_attribute


def refusal(gm: fx.GraphModule, batch: Batch) -> str | None:
    """What the graph's checks say against a batch, the first line; None where they take it."""
    checks = [n for n in gm.graph.nodes if n.op == "call_module" and is_guards(get_attribute(gm, str(n.target)))]
    values = dict(zip(_placeholders(gm), batch.bind(gm), strict=True)) if checks else {}
    for node in checks:
        try:
            get_attribute(gm, str(node.target))(*(values[a] for a in node.args))
        except AssertionError as e:
            return (str(e).splitlines() or ["a check fails"])[0]
    return None


def refused_batches(gm: fx.GraphModule, example: Batch) -> dict[int, str]:
    """Of 1, 2 and twice the example's: the numbers of samples that the graph refuses, and why."""
    samples, found = example.samples(), {}
    hollow = example.map_tensors(lambda t: t.to("meta"))
    for count in dict.fromkeys((1, 2, 2 * samples)):
        reason = refusal(gm, with_samples(hollow, count)) if count != samples else None
        if reason is not None:
            found[count] = reason
    return found


def unequal(gm: fx.GraphModule, example: Batch) -> Iterator[Batch]:
    """The example with one input of another size, for each size that the graph asks two inputs to share.

    Sizes that are equal in an example may be so by chance. Ids, positions and masks of one length belong together, so
    integers are left as they are.
    """
    seen: dict[str, fx.Node] = {}
    parted: set[str] = set()
    for node, value in zip(_placeholders(gm), example.bind(gm), strict=True):
        symbolic = node.meta.get("val")
        if not isinstance(value, Tensor) or not isinstance(symbolic, Tensor) or not value.is_floating_point():
            continue
        for dim, size in enumerate(symbolic.shape):
            name = str(size)
            if isinstance(size, int) or value.shape[dim] < 2 or name in parted:
                continue
            if seen.setdefault(name, node) is not node:
                parted.add(name)
                yield _replaced(example, value, resized(value, dim, other_length(value.shape[dim])))


def _replaced(batch: Batch, old: Tensor, new: Tensor) -> Batch:
    return batch.map_tensors(lambda t: new if t is old else t)


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]
