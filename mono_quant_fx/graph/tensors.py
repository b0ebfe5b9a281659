"""What every pass needs of a GraphModule: clone, attach and drop tensors, names of nodes."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from mono_quant_fx.errors import PassError, PreconditionError
from mono_quant_fx.graph import copying
from mono_quant_fx.graph.storage_bytes import stored_bytes
from mono_quant_fx.graph.weight_table import PURE
from mono_quant_fx.ops.registry import is_ours
from mono_quant_fx.process.this_thread import unheard

#: The key of gm.meta that names the tensors that a graph writes.
STATE = "mono_quant_fx_state"
#: The key of node.meta that provenance.py keeps.
HISTORY = "mono_quant_fx_history"


def clone(gm: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule with its own graph and modules that shares every tensor with `gm`; node.meta and gm.meta stay."""
    graph = fx.Graph()
    copied: Any = graph.graph_copy(gm.graph, {}, return_output_node=True)
    if copied is not None:
        value, old = copied
        output = graph.output(value, old.type)
        output.meta = dict(old.meta)
    graph._codegen = copy.copy(gm.graph._codegen)
    twin = fx.GraphModule(nn.Module(), fx.Graph())
    copies = dict[int, Any]()
    for target in attribute_targets(gm):
        value = get_attribute(gm, target)
        if not isinstance(value, Tensor):
            if id(value) not in copies:
                own = [t for _, t in named_tensors(value)] if isinstance(value, nn.Module) else []
                copies[id(value)] = copying.copied(value, own)
            value = copies[id(value)]
        attach(twin, target, value, is_persistent(gm, target))
    for name, module in twin.named_modules(remove_duplicate=False):
        module.training = get_attribute(gm, name).training if name else gm.training
    twin.meta = dict(gm.meta)
    twin.graph = graph
    return twin


def need_graph(value: Any, caller: str) -> fx.GraphModule:
    """The value, which has to be a graph.

    Raises:
        PreconditionError: it is something else; names mq.capture.
    """
    if not isinstance(value, fx.GraphModule):
        raise PreconditionError(
            f"{caller}: a GraphModule is needed, not {type(value).__name__}; mq.capture(model) makes one, and "
            "result.graph_module is one"
        )
    return value


def isolate(module: nn.Module) -> nn.Module:
    """A deep copy that shares parameters and stored codes, with buffers of its own: running it leaves no trace.

    A parameter that a captured graph writes is its own as well; for one that a model writes see frontend/untouched.py.
    """
    own = module.meta.get(STATE, ()) if isinstance(module, fx.GraphModule) else ()
    shared: list[Tensor] = [p for name, p in module.named_parameters(remove_duplicate=False) if name not in own]
    if isinstance(module, fx.GraphModule):
        ours = (n for n in module.graph.nodes if is_ours(n.target))
        shared += [t for n in ours for a in n.all_input_nodes if (t := get_tensor(module, a)) is not None]
    with unheard():  # torch copies the tree specs of an exported graph in a way that it deprecates
        return copying.copied(module, shared)


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under each of its names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def attribute_targets(gm: fx.GraphModule) -> list[str]:
    """The distinct get_attr and call_module targets, in execution order."""
    return list(dict.fromkeys(n.target for n in gm.graph.nodes if n.op in ("get_attr", "call_module")))


def get_attribute(gm: nn.Module, target: str) -> Any:
    """The tensor or module at a dotted path."""
    value: Any = gm
    for name in target.split("."):
        value = getattr(value, name)
    return value


def get_tensor(gm: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """The tensor that a get_attr node reads; None for any other node or a module."""
    value = get_attribute(gm, node.target) if node.op == "get_attr" and isinstance(node.target, str) else None
    return value if isinstance(value, Tensor) else None


def is_persistent(gm: nn.Module, target: str) -> bool:
    """Whether the buffer at `target` belongs to the state_dict, as a plain attribute does not (others: True)."""
    path, _, name = target.rpartition(".")
    owner = get_attribute(gm, path) if path else gm
    if name in owner.__dict__:
        return not isinstance(owner.__dict__[name], Tensor)
    return name not in getattr(owner, "_non_persistent_buffers_set", ())


def attach(gm: nn.Module, target: str, value: Any, persistent: bool = True) -> None:
    """Puts a parameter, buffer or module at a dotted path, making containers on the way; replaces what stood there.

    Raises:
        PassError: a part of the path is a tensor or something else that is no module; it is not replaced.
    """
    *path, name = target.split(".")
    owner = gm
    for part in path:
        if not hasattr(owner, part):
            setattr(owner, part, nn.Module().train(owner.training))
        if not isinstance(getattr(owner, part), nn.Module):
            raise PassError(
                f"attach: {target!r} cannot be stored, since its part {part!r} is no module; take a name "
                "that free_names.free_name gives"
            )
        owner = getattr(owner, part)
    if hasattr(owner, name):
        delattr(owner, name)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        owner.register_buffer(name, value, persistent)
    else:
        setattr(owner, name, value)


def drop_unused(gm: fx.GraphModule) -> None:
    """Deletes every tensor and module that no node reads, so that a replaced weight leaves the state_dict."""
    used = set(attribute_targets(gm))

    def is_used(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:i]) in used for i in range(1, len(parts) + 1))

    for name, _ in list(named_tensors(gm)):
        if not is_used(name):
            path, _, attribute = name.rpartition(".")
            delattr(get_attribute(gm, path) if path else gm, attribute)
    for name, module in reversed(list(gm.named_modules(remove_duplicate=False))):
        empty = not (module._modules or module._parameters or module._buffers)
        if name and empty and not is_used(name):
            path, _, attribute = name.rpartition(".")
            delattr(get_attribute(gm, path) if path else gm, attribute)


def drop_dead_code(gm: fx.GraphModule) -> None:
    """Erases unused constants and unused calls that are free of side effects by torch's schemas; a user's own stay.

    So do torch's functions, which have no schema, but for linears and convolutions.
    """

    def impure(node: fx.Node) -> bool:
        if node.op == "get_attr" or (node.target in PURE and "out" not in node.kwargs):
            return False
        return not isinstance(node.target, torch._ops.OpOverload) or node.is_impure()

    gm.graph.eliminate_dead_code(impure)


def constant_nodes(gm: fx.GraphModule, written: Iterable[fx.Node] = ()) -> dict[fx.Node, bool]:
    """Which values do not depend on the batch: the weights, and what is computed from weights alone.

    Args:
        written: get_attr nodes of tensors that the graph writes, which do.
    """
    constant: dict[fx.Node, bool] = dict.fromkeys(written, False)
    for node in gm.graph.nodes:
        sources = node.all_input_nodes
        if node not in constant:
            constant[node] = node.op == "get_attr" or (
                node.op != "placeholder" and bool(sources) and all(constant[a] for a in sources)
            )
    return constant


def op_name(node: fx.Node) -> str:
    """A node's operation as a reader knows it: linear, aten.linear, .view, LayerNorm."""
    if node.op == "call_module":
        return type(get_attribute(node.graph.owning_module, node.target)).__name__  # type: ignore[arg-type]
    if node.op == "call_method":
        return f".{node.target}"
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))


def module_stack(node: fx.Node) -> list[tuple[str, str]]:
    """(path, class name) of each module whose forward made this node, outermost first; both tracers' spellings."""
    stack = []
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        name = kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]
        stack.append((re.sub(r"@\d+", "", path), name))
    return stack


def module_path(node: fx.Node) -> str:
    """The path of the innermost module whose forward made this node; "" for the root."""
    stack = module_stack(node)
    return stack[-1][0] if stack else ""


def total_bytes(module: nn.Module) -> int:
    """Bytes of everything a module stores; memory that several of its tensors share counts once."""
    return stored_bytes(tensor for _, tensor in named_tensors(module))
