"""How an operator is differentiated: in both directions, at any level of torch.func, and by name where it cannot be.

Our operators are affine in what they can be differentiated by (x and the bias), so that a derivative is two functions
for each: what a gradient of the result is for the argument, and what a tangent of the argument is for the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

_is_grad_enabled, _any_requires_grad = torch.is_grad_enabled, torch._C._any_requires_grad  # looked up at each call

#: The arguments of a call; those that have a derivative are their shapes, or None.
Given = list[Any]


class Derivative(NamedTuple):
    """With respect to one argument, up to leading dimensions that broadcast.

    Attributes:
        backward: (given, gradient of the result) -> of the argument.
        forward: (given, tangent of the argument) -> of the result.
    """

    backward: Callable[[Given, Tensor], Tensor]
    forward: Callable[[Given, Tensor], Tensor]


def differentiated(
    op: torch._ops.OpOverload, cpu: Callable[..., Any], by: dict[int, Derivative] | None
) -> Callable[..., Any]:
    """The op's kernel for autograd.

    Where nothing wants a derivative and the dispatcher's next stop is the CPU's implementation, that is called at once:
    going back through the dispatcher takes 4 us, as long as the whole product of a small layer.

    Args:
        op: the operator. cpu: its implementation there.
        by: place of an argument -> the derivative. None: the result is no float, and ends what autograd records;
            torch.func, which asks for a derivative by name, gets NotImplementedError.
    """
    function = _function(op, by or {})
    # Function's own apply would climb up to torch.func's level again
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    known: dict[int, bool] = {}  # a keyset, as a number -> whether the CPU is next

    def kernel(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        wanted = forward_ad._current_level >= 0 or (_is_grad_enabled() and _any_requires_grad(*arguments))
        keys = keyset.raw_repr()
        if keys in known and not wanted:
            return cpu(*arguments) if known[keys] else _below(op, keyset, arguments)
        below = (keyset & torch._C._after_autograd_keyset).highestPriorityTypeId()
        known[keys] = below == torch._C.DispatchKey.CPU
        return slow(keyset, *arguments) if wanted else _below(op, keyset, arguments)

    def slow(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        nested = torch._C._are_functorch_transforms_active()
        if by is None:
            _refuse(op, {}, [at for at, a in enumerate(arguments) if _moves(a, nested)])
            return _below(op, keyset, arguments)
        if not nested:
            return apply(keyset, *arguments)
        with enable_single_level_autograd_function():
            return apply(keyset, *arguments)

    return kernel


def _moves(value: Any, nested: bool) -> bool:
    """Whether it has a tangent, or torch.func wants its gradient."""
    if not isinstance(value, Tensor):
        return False
    tangent = forward_ad.unpack_dual(value).tangent if forward_ad._current_level >= 0 else None
    return tangent is not None or (nested and value.requires_grad)


def _below(op: torch._ops.OpOverload, keyset: torch._C.DispatchKeySet, arguments: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)


def _function(op: torch._ops.OpOverload, by: dict[int, Derivative]) -> type[torch.autograd.Function]:
    """forward takes the dispatcher's keyset before the op's arguments."""

    def forward(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        # an outer level of torch.func may want derivatives of what this one calls
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return _below(op, keyset, arguments)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        arguments = inputs[1:]
        given = [_shape(a) if at in by else a for at, a in enumerate(arguments)]
        ctx.tensors = [at for at, a in enumerate(given) if isinstance(a, Tensor)]
        kept = [given[at] for at in ctx.tensors]
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)
        ctx.given = [None if isinstance(a, Tensor) else a for a in given]
        ctx.shape, ctx.dtype = output.shape, output.dtype
        ctx.set_materialize_grads(False)  # None is what does not move

    def given_of(ctx: Any) -> Given:
        given = list(ctx.given)
        for at, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            given[at] = tensor
        return given

    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[1:]
        if grad is None:
            return (None, *[None] * len(needs))
        _refuse(op, by, [at for at, need in enumerate(needs) if need])
        given = given_of(ctx)
        grads = [by[at].backward(given, grad).sum_to_size(given[at]) if need else None for at, need in enumerate(needs)]
        return None, *grads

    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        moving = {at: t for at, t in enumerate(tangents[1:]) if t is not None}
        _refuse(op, by, list(moving))
        given = given_of(ctx)
        parts = [by[at].forward(given, t.to(ctx.dtype)) for at, t in moving.items()]
        return sum(parts[1:], parts[0]).expand(ctx.shape).contiguous()

    names = (forward, setup_context, backward, jvp)
    return type(op._opname, (torch.autograd.Function,), {f.__name__: staticmethod(f) for f in names})


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else value


def _refuse(op: torch._ops.OpOverload, by: dict[int, Derivative], at: list[int]) -> None:
    """Raises NotImplementedError where a derivative is wanted that the op does not have; never 0 in its place."""
    names = [a.name for a in op._schema.arguments]
    for place in at:
        if place not in by:
            having = " and ".join(names[i] for i in by) or "no argument"
            raise NotImplementedError(
                f"{op.name()} has no derivative with respect to {names[place]} (it has with respect to {having}); "
                "detach that tensor, or differentiate dequantize_model(graph), which is float"
            )


def vectorized(op: torch._ops.OpOverload, leading: bool) -> Callable[..., tuple[Tensor, int]]:
    """The op's rule for vmap: its own leading dimensions where `leading`, else one call after the other.

    Args:
        leading: x, the first argument, may have any leading dimensions, which come back in the result.
    """
    names = [a.name for a in op._schema.arguments]
    bias_at = names.index("bias") if "bias" in names else -1

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
        mapped = {at for at, d in enumerate(in_dims) if isinstance(d, int)}  # a list of numbers has a list of None
        given = [a.movedim(in_dims[at], 0) if at in mapped else a for at, a in enumerate(arguments)]
        if not leading or not mapped <= {0, bias_at}:
            return _one_by_one(op, given, mapped, info.batch_size), 0
        if bias_at not in mapped:
            return op(*given), 0
        bias, given[bias_at] = given[bias_at], None
        out = op(*given) if 0 in mapped else op(*given)[None]
        return out + bias.to(out.dtype).view(len(bias), *[1] * (out.dim() - 2), -1), 0

    return rule


def _one_by_one(op: torch._ops.OpOverload, given: Given, mapped: set[int], size: int) -> Tensor:
    calls = [[a[i] if at in mapped else a for at, a in enumerate(given)] for i in range(size)]
    if calls:
        return torch.stack([op(*arguments) for arguments in calls])
    one = op(*(a.new_zeros(a.shape[1:]) if at in mapped else a for at, a in enumerate(given)))
    return one.new_empty(0, *one.shape)
