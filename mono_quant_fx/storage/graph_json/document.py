"""A graph as JSON and back: what a file needs, beside the tensors, to run a model without its code.

Nothing in the data is imported or evaluated: calls are resolved by name through one allow-list (graph_ops), modules by
class name through another (leaf_modules), and every name that reaches the code torch.fx generates is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from mono_quant_fx.errors import GraphFormatError, NotSelfContainedError
from mono_quant_fx.storage.graph_json.reader import Reader, finish
from mono_quant_fx.storage.graph_json.writer import Writer


def graph_to_json(gm: fx.GraphModule) -> dict[str, Any]:
    """A captured or quantized graph as plain JSON data; tensors stand in it by name, dtype and shape only.

    The names are the keys of the result's "tensors"; a tied tensor stands there once, its other names in "tied".
    What was written is read back once, so that what is returned can be read.

    Raises:
        NotSelfContainedError: a node, module or container cannot be written; names it, the reason and a remedy.

    >>> import mono_quant_fx as mq
    >>> from torch import nn
    >>> data = graph_to_json(mq.capture(nn.Sequential(nn.Linear(4, 2), nn.ReLU()).eval()))
    >>> [node.get("target") for node in data["graph"]["nodes"]]
    ['input', '0.weight', '0.bias', 'torch.nn.functional.linear', '1', None]
    >>> data["graph"]["modules"], list(data["tensors"])
    ({'1': {'class': 'ReLU', 'args': {'inplace': False}}}, ['0.weight', '0.bias'])
    """
    writer = Writer()
    data = writer.write(gm)
    try:
        back = graph_from_json(data, writer.values)
    except GraphFormatError as error:
        raise NotSelfContainedError(f"the graph could be written but not read back: {error}") from error
    before, after = ([(n.op, n.name) for n in g.graph.nodes] for g in (gm, back))
    if before != after:
        raise NotSelfContainedError("the graph could be written but not read back: its nodes would differ")
    return data


def graph_from_json(data: object, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """The GraphModule that graph_to_json wrote, in eval mode; it shares the tensors.

    Args:
        data: what graph_to_json returned, also after a round trip through JSON text.
        tensors: the tensors by the names of data["tensors"], with the dtypes and shapes that it tells.

    Raises:
        GraphFormatError: the data or the tensors break a rule; names the node or tensor, the value and the rule.

    >>> import json, torch, mono_quant_fx as mq
    >>> gm = mq.capture(torch.nn.Linear(4, 2).eval())
    >>> back = graph_from_json(json.loads(json.dumps(graph_to_json(gm))), gm.state_dict())
    >>> x = torch.randn(3, 4)
    >>> torch.equal(back(x), gm(x))
    True
    """
    try:
        reader, root = Reader.of(data, tensors)
        gm = reader.graph(root)
        finish(reader)
        return gm
    except GraphFormatError:
        raise
    except Exception as error:  # whatever torch.fx says to a graph that no rule above has caught
        raise GraphFormatError(f"no graph can be built from the data: {type(error).__name__}: {error}") from error
