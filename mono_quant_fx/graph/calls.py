"""What a node calls, in whatever spelling: its name, its arguments by name, the graphs that it runs."""

from __future__ import annotations

import functools
import inspect
import operator
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from mono_quant_fx.graph.tensors import get_attribute

HigherOrder = torch._ops.HigherOrderOperator

_OPERATORS = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift"
_AUGMENTED = {f"i{n}": getattr(operator, f"{n}_" if n in ("and", "or") else n) for n in _OPERATORS.split()}
#: Where Python's operators and its functions of numbers live.
PLAIN = ("_operator", "math", "builtins")
#: Parts of torch that call what the user wrote.
_FOREIGN = ("torch.utils.", "torch.autograd.function.", "torch._dynamo.", "torch._higher_order_ops.", "torch.jit.")

#: Higher-order calls, for people.
_REGIONS = {
    "cond": "a branch of torch.cond",
    "while_loop": "the body of a while_loop",
    "map_impl": "the body of a map",
    "scan": "the body of a scan",
    "wrap_with_set_grad_enabled": "a no_grad block",
    "wrap_with_autocast": "an autocast block",
    "tag_activation_checkpoint": "a checkpointed block",
}


def call_name(node: fx.Node) -> str:
    """The bare name of what a node calls: add_, relu, chunk, setitem; the attribute for getattr; "" for a module."""
    target = node.target
    if node.op == "call_method":
        return str(target)
    if node.op != "call_function":
        return ""
    if target is getattr:
        return str(node.args[1])
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2]
    return str(getattr(target, "__name__", ""))


def first_argument(node: fx.Node) -> Any:
    """What a function, a method or an operator works on, by place or keyword."""
    if node.args:
        return node.args[0]
    return node.kwargs.get("input", node.kwargs.get("self"))


def module_of(node: fx.Node) -> nn.Module:
    """What a call_module node calls."""
    module = get_attribute(node.graph.owning_module, str(node.target))  # type: ignore[arg-type]
    assert isinstance(module, nn.Module)
    return module


def bodies(node: fx.Node) -> list[tuple[fx.GraphModule, list[Any]]]:
    """(graph, what its placeholders get) of every graph inside this one that a call runs."""
    if node.op == "call_module":
        inner = module_of(node)
        return [(inner, list(node.args))] if isinstance(inner, fx.GraphModule) else []
    if not isinstance(node.target, HigherOrder):
        return []
    owner: Any = node.graph.owning_module
    places = pytree.tree_leaves((node.args, node.kwargs))
    at = [i for i, a in enumerate(places) if isinstance(a, fx.Node) and is_body(a)]
    found = [get_attribute(owner, str(places[i].target)) for i in at]
    operands = places[at[-1] + 1 :] if at else []
    return [(body, operands) for body in found if isinstance(body, fx.GraphModule)]


def nodes_in(value: Any) -> list[fx.Node]:
    """The nodes in an argument."""
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return found


def bound(node: fx.Node) -> dict[str, Any]:
    """The arguments that an operator is given, by name."""
    names = [a.name for a in schemas(node.target)[0].arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def schemas(target: Any) -> list[Any]:
    """Of an overload, or of a user's operator that is called without one; of torch's own the name tells enough."""
    if isinstance(target, torch._ops.OpOverload):
        return [target._schema]
    if isinstance(target, torch._ops.OpOverloadPacket) and not target._qualified_op_name.startswith("aten::"):
        return [getattr(target, name)._schema for name in target.overloads()]
    return []


def augmented(node: fx.Node) -> Callable[..., Any] | None:
    """operator.add for a node of operator.iadd, and so on."""
    name = call_name(node).strip("_") if node.op == "call_method" else getattr(node.target, "__name__", "")
    is_one = getattr(node.target, "__module__", "") == "_operator" or str(node.target).startswith("__i")
    return _AUGMENTED.get(name) if is_one else None


def is_flagged(node: fx.Node) -> bool:
    """F.relu(x, True) and F.relu(x, inplace=True)."""
    return flag(node, "inplace", False) is True


def flag(node: fx.Node, name: str, default: Any) -> Any:
    """What a call of a Python function gives for one of its parameters."""
    names = _parameters(node.target)
    at = names.index(name) if name in names else None
    if at is not None and at < len(node.args):
        return node.args[at]
    return node.kwargs.get(name, default)


def place_of(target: Any, name: str) -> int | None:
    """Where a Python function takes an argument."""
    names = _parameters(target)
    return names.index(name) if name in names else None


@functools.cache
def _parameters(target: Any) -> tuple[str, ...]:
    if not isinstance(target, types.FunctionType):
        return ()
    return tuple(inspect.signature(target).parameters)


def is_unknown(node: fx.Node) -> bool:
    """Whether nothing tells what a call does."""
    target = node.target
    if schemas(target) or node.op not in ("call_function", "call_method", "call_module"):
        return False
    if bodies(node):
        return False
    if node.op == "call_module":
        module = module_of(node)
        return not (is_torchs(type(module)) or getattr(module, "written", None) is not None)
    if node.op == "call_method":
        return not hasattr(torch.Tensor, str(target))
    return not is_torchs(target)


def is_torchs(target: Any) -> bool:
    """Whether something belongs to torch, or to Python's operators and numbers, or is a module of ours."""
    owner = getattr(target, "__objclass__", target)
    home_class = getattr(owner, "__self__", None)
    if isinstance(home_class, type):  # the apply of somebody's autograd.Function
        owner = home_class
    if isinstance(owner, type) and issubclass(owner, fx.GraphModule):
        return False
    home = f"{getattr(owner, '__module__', None) or ''}."
    known = home.startswith(("torch.", "builtins.", "math.", "_operator.", "mono_quant_fx."))
    return known and not home.startswith(_FOREIGN)


def is_body(node: fx.Node) -> bool:
    """Whether a node hands a graph to a higher-order call."""
    owner: Any = node.graph.owning_module
    return node.op == "get_attr" and isinstance(get_attribute(owner, str(node.target)), nn.Module)


def inside(call: fx.Node) -> str:
    """Why a weight stays as it is that goes into a call which runs a graph of its own; "" for any other call."""
    if not isinstance(call.target, HigherOrder):
        return ""
    return f"inside {_REGIONS.get(call.target.__name__, call.target.__name__)}, left as it is"
