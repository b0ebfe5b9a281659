"""Makes a captured graph functional: after it a node's name stands for one value, and only state is written.

A call that writes gives the new value instead, and what the model read of the same memory afterwards (the tensor under
another name, the tensor that it is a view of, other views of it) reads the new value: the view is taken again, or put
back into its tensor. So no pass has to know of writes. What stays are writes into the model's own tensors, its state,
and calls that nothing is known of where nobody reads what they may have written.
"""

from __future__ import annotations

from torch import fx

from mono_quant_fx.functionalization.lookups import renormalize_rows
from mono_quant_fx.functionalization.write_walk import Walk
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.calls import bodies, call_name
from mono_quant_fx.graph.effect_tables import RESHAPERS
from mono_quant_fx.graph.effects import is_pieces, is_view, writes
from mono_quant_fx.graph.state import own_state, share_memory

#: The key of gm.meta that holds the names of the inputs that the model writes.
WRITTEN_INPUTS = "mono_quant_fx_written_inputs"


def functionalize(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrites `gm`, gives it state of its own, and returns it; gm.meta[WRITTEN_INPUTS] names what inputs it wrote.

    Raises:
        CaptureError: a write of which the graph does not tell what else it changes.
    """
    if not _has_writes(gm):
        return gm
    renormalize_rows(gm)
    share_memory(gm)
    walk = Walk(gm).run()
    written = [root.node.name for root in walk.written() if root.kind == "input"]
    if written:
        gm.meta[WRITTEN_INPUTS] = tuple(written)
    for each in (*walk.walked.values(), walk):
        _finish(each)
    tensors.drop_unused(gm)
    own_state(gm)
    return gm


def input_notes(gm: fx.GraphModule) -> list[str]:
    """What the user should know of inputs that the model writes and the graph does not."""
    names = ", ".join(gm.meta.get(WRITTEN_INPUTS, ()))
    return [f"capture: forward writes into its input ({names}); the graph leaves the caller's tensor alone"] * bool(
        names
    )


def _has_writes(gm: fx.GraphModule) -> bool:
    """Whether any node writes, or may, here or in a graph inside."""
    nodes = list(gm.graph.nodes)
    inner = [body for n in nodes for body, _ in bodies(n)]
    return any(writes(n) or call_name(n) in RESHAPERS for n in nodes) or any(map(_has_writes, inner))


def _finish(walk: Walk) -> None:
    """Erases what nobody reads any more: values that were written in vain, and views for a write only."""
    ours = {*walk.touched, *walk.copies}
    todo = list(ours)
    while todo:
        node = todo.pop()
        is_ours = node in ours or node.op == "get_attr" or is_view(node) or is_pieces(node)
        if is_ours and not node._erased and not node.users:
            todo += node.all_input_nodes
            walk.graph.erase_node(node)
    walk.graph.lint()
    walk.gm.recompile()
