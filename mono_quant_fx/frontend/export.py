"""torch.export: a graph of aten ops that sees through Python control flow, with every size dynamic."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from mono_quant_fx.errors import CaptureError
from mono_quant_fx.execution.batch import Batch
from mono_quant_fx.frontend.randomness import nothing_else_drawn
from mono_quant_fx.frontend.record import all_names
from mono_quant_fx.frontend.regions import open_regions
from mono_quant_fx.frontend.stopwatch import Stopwatch
from mono_quant_fx.frontend.symbolic import normalize
from mono_quant_fx.frontend.tracing_lock import exporting
from mono_quant_fx.frontend.twins import twin
from mono_quant_fx.graph.own_names import plain_names
from mono_quant_fx.graph.tensors import attach, is_persistent, named_tensors


def export(
    model: nn.Module, batch: Batch, dynamic_shapes: Any = None, *, dynamic: str = "all", budget: float | None = None
) -> tuple[fx.GraphModule, list[str]]:
    """torch.export on one batch, and a note on the sizes that the model fixes.

    Args:
        dynamic_shapes: as torch.export takes it; None leaves the choice to `dynamic`.
        dynamic: "all" sizes, the "batch" (dim 0 of every tensor that has the first one's), or "none".
        budget: seconds of processor time.

    Raises:
        OverBudgetError: it takes longer. Whatever torch.export raises.
    """
    model, batch = twin(model), batch.in_order(model)  # some modules (LSTM) rebind their attributes meanwhile
    frozen = _thaw(model)
    _spell_out_kwargs(model, batch)
    shapes = batch.dynamic_shapes(model, dynamic) if dynamic_shapes is None else dynamic_shapes
    label = {"all": "every size dynamic", "batch": "a dynamic batch"}.get(dynamic, "the example's sizes")
    with Stopwatch(f"capture: torch.export with {label}", budget), exporting(), nothing_else_drawn():
        program = torch.export.export(model, batch.args, batch.kwargs, dynamic_shapes=shapes, strict=False)
        plain = _with_plain_names(program, all_names(model))
        gm = program.module()
        _refuse_transforms(gm)
        for own, tensor in frozen.items():
            name = plain.get(own, own)
            attach(gm, name, tensor, is_persistent(gm, name))
        open_regions(gm)
        gm = normalize(gm)
        follow_inputs(gm)
        return gm, _fixed_sizes(program) if dynamic_shapes is None and dynamic == "all" else []


def _with_plain_names(program: torch.export.ExportedProgram, names: list[str]) -> dict[str, str]:
    """Gives the tensors of a program names that its module can have; see graph/own_names.py."""
    plain = plain_names([*names, *program.state_dict, *program.constants])
    for spec in (*program.graph_signature.input_specs, *program.graph_signature.output_specs):
        if spec.target is not None:
            spec.target = plain.get(spec.target, spec.target)
    for held in (program.state_dict, program.constants):
        renamed = {plain.get(name, name): value for name, value in held.items()}
        held.clear()
        held.update(renamed)
    return plain


def _refuse_transforms(gm: fx.GraphModule) -> None:
    """Raises CaptureError where forward calls torch.func.vmap: its graph switches a state of the whole process.

    One call of the graph switches it on and a later one off, so that what runs node by node, and two graphs in turn,
    would find it in a wrong state, and a run that fails would leave it on.
    """
    for node in gm.graph.nodes:
        if str(getattr(node.target, "__module__", "")).startswith("torch._functorch"):
            raise CaptureError(
                "forward calls torch.func.vmap or another transform of torch.func, which a graph cannot hold; write it "
                "for the whole batch (torch's layers and products take leading dimensions)"
            )


def _thaw(model: nn.Module) -> dict[str, Tensor]:
    """Puts ordinary tensors in the place of those made in inference mode, which no export takes; returns the latter."""
    frozen = {name: t for name, t in named_tensors(model) if t.is_inference()}
    made = {id(t): t.clone() for t in frozen.values()}
    for name, tensor in frozen.items():
        is_parameter = isinstance(tensor, nn.Parameter)
        ordinary = nn.Parameter(made[id(tensor)], tensor.requires_grad) if is_parameter else made[id(tensor)]
        attach(model, name, ordinary, is_persistent(model, name))
        made[id(tensor)] = ordinary
    return frozen


def follow_inputs(gm: fx.GraphModule) -> None:
    """Makes every device that an export froze that of the first input, so that gm.to(device) moves all there is.

    A model that lies on several devices keeps them, and so does an autocast block that takes no tensor.
    """
    homes = {n.meta["val"].device for n in _tensor_inputs(gm)} | {t.device for _, t in named_tensors(gm)}
    if len(homes) == 1:
        for part in gm.modules():  # the bodies of autocast blocks are graphs of their own
            if isinstance(part, fx.GraphModule):
                _unfreeze(part, *homes)


def _unfreeze(gm: fx.GraphModule, home: torch.device) -> None:
    inputs = _tensor_inputs(gm)
    frozen = [n for n in gm.graph.nodes if any(isinstance(a, torch.device) for a in (*n.args, *n.kwargs.values()))]
    if not inputs or not frozen:
        return
    with gm.graph.inserting_after([n for n in gm.graph.nodes if n.op == "placeholder"][-1]):
        here = gm.graph.call_function(getattr, (inputs[0], "device"), name="device")
    for node in frozen:
        node.args, node.kwargs = (
            fx.node.map_aggregate(given, lambda a: here if isinstance(a, torch.device) and a == home else a)
            for given in (node.args, node.kwargs)
        )
    gm.recompile()


def _tensor_inputs(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), Tensor)]


def _spell_out_kwargs(model: nn.Module, batch: Batch) -> None:
    """Gives a forward(**kwargs) the batch's own keywords: torch.export makes no others dynamic."""
    inner = model.forward
    parameters = inspect.signature(inner).parameters.values()
    kept = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    extra = [n for n in batch.kwargs if n not in {p.name for p in kept}]
    if not extra:
        return

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    kept += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra]
    forward.__signature__ = inspect.Signature(kept)  # type: ignore[attr-defined]
    model.forward = forward


def _fixed_sizes(program: torch.export.ExportedProgram) -> list[str]:
    inputs = set(program.graph_signature.user_inputs)
    fixed = [
        f"{n.name}.shape[{i}] = {size}"
        for n in program.graph.nodes
        if n.op == "placeholder" and n.name in inputs and isinstance(n.meta.get("val"), Tensor)
        for i, size in enumerate(n.meta["val"].shape)
        if is_concrete_int(size)
    ]
    return [f"capture: the model fixes {', '.join(fixed)}; other sizes will be refused"] if fixed else []


#: Where an exported op says that it is in training mode.
_TRAINING = {torch.ops.aten.dropout.default: 2, torch.ops.aten.batch_norm.default: 5}


def check_exported_mode(gm: fx.GraphModule) -> None:
    """Raises CaptureError if a graph was exported from a model in training mode."""
    for node in gm.graph.nodes:
        always = node.target is torch.ops.aten.batch_norm.default and node.args[3] is None  # no statistics to use
        if node.target in _TRAINING and node.args[_TRAINING[node.target]] is True and not always:
            raise CaptureError(
                f"{type(gm).__name__}: {node.name} was exported in training mode; quantization works on a model in "
                "eval mode: call model.eval() and export it again"
            )
