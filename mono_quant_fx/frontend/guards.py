"""The checks of its inputs that an exported graph makes: what torch.export writes as Python source, as a graph."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from mono_quant_fx.errors import NotSelfContainedError


class GuardsFn(nn.Module):
    """Runs `checks`, a graph of comparisons and torch._assert; raises AssertionError as the exported module does."""

    _is_impure = True  # nothing reads what it returns, and still it must not be dropped

    def __init__(self, checks: fx.GraphModule):
        super().__init__()
        self.checks = checks

    def forward(self, *args: Any) -> None:
        """The graph's inputs, flattened, in the order of its placeholders."""
        self.checks(*args)


def is_guards(module: nn.Module) -> bool:
    """Whether torch.export made this module for its guards."""
    return type(module).__name__ == "GuardsFn" and type(module).__module__.startswith("torch.export")


def trace_guards(module: nn.Module, inputs: int) -> fx.GraphModule:
    """The module's checks as a graph with that many placeholders.

    Raises:
        NotSelfContainedError: a check branches on what it compares, which a graph cannot hold.
    """
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    proxies = [fx.Proxy(graph.placeholder(f"args_{i}"), tracer) for i in range(inputs)]
    try:
        module.forward(*proxies)
    except Exception as error:  # a TraceError, or what the check's own code says to a Proxy
        raise NotSelfContainedError(
            f"a check of its inputs cannot be written as a graph ({error}); capture with dynamic_shapes that leave "
            "these sizes free, or fixed"
        ) from error
    graph.output(None)
    return fx.GraphModule(nn.Module(), graph)
