"""Observers: modules whose forward is the identity and which remember what they saw, as buffers."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mono_quant_fx.errors import ConfigError
from mono_quant_fx.numerics import code_range


class Observer(nn.Module, ABC):
    """Base of the observers.

    Args:
        axis: None observes the tensor as a whole, a dimension each channel along it.

    State is replaced, never written into, so that a copy that shares tensors stays independent.
    """

    name: ClassVar[str]

    def __init__(self, axis: int | None = None):
        super().__init__()
        self.axis = axis
        self.reset()

    @abstractmethod
    def reset(self) -> None:
        """Forgets everything."""

    @abstractmethod
    def observe(self, x: Tensor) -> None:
        """Takes in one tensor, detached."""

    @abstractmethod
    def calculate_qparams(self, bits: int = 8, symmetric: bool = False) -> tuple[Tensor, Tensor]:
        """(scale float32, zero_point int32) of what was seen; scalars, or one a channel."""

    @abstractmethod
    def statistics(self) -> dict[str, tuple[float, ...]]:
        """What was seen, as plain numbers."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns x itself."""
        if x.numel():
            self.observe(x.detach())
        return x


class MinMaxObserver(Observer):
    """The smallest and largest value ever seen, exact for any split of the data into batches.

    >>> observer = MinMaxObserver()
    >>> _ = observer(torch.tensor([-1.0, 0.5])), observer(torch.tensor([1.55]))
    >>> observer.calculate_qparams(bits=8)
    (tensor(0.0100), tensor(-28, dtype=torch.int32))
    """

    name = "minmax"
    min_val: Tensor
    max_val: Tensor

    def reset(self) -> None:
        """Forgets everything: the range is empty, [inf, -inf]."""
        self.register_buffer("min_val", torch.tensor(float("inf")))
        self.register_buffer("max_val", torch.tensor(float("-inf")))

    def observe(self, x: Tensor) -> None:
        """Widens the range."""
        flat = x.float().reshape(-1) if self.axis is None else x.float().movedim(self.axis, 0).flatten(1)
        low, high = torch.aminmax(flat, dim=-1)
        self.min_val = torch.minimum(self.min_val.to(low.device), low)
        self.max_val = torch.maximum(self.max_val.to(high.device), high)

    def calculate_qparams(self, bits: int = 8, symmetric: bool = False) -> tuple[Tensor, Tensor]:
        """Affine map of [min, max], widened to hold zero, onto the signed codes (arXiv 1712.05877, sec. 2.1).

        Raises:
            ConfigError: nothing was seen yet.
        """
        if bool((self.min_val > self.max_val).any()):
            raise ConfigError("calculate_qparams: the observer has seen no data yet; run calibration first")
        qmin, qmax = code_range(bits)
        low, high = self.min_val.clamp(max=0.0), self.max_val.clamp(min=0.0)
        tiny = torch.finfo(torch.float32).tiny
        if symmetric:
            scale = (torch.maximum(high, -low) / ((qmax - qmin) / 2)).clamp(min=tiny)
            return scale, torch.zeros_like(scale, dtype=torch.int32)
        scale = (high / (qmax - qmin) - low / (qmax - qmin)).clamp(min=tiny)
        return scale, (qmin - torch.round(low / scale)).clamp(qmin, qmax).to(torch.int32)

    def statistics(self) -> dict[str, tuple[float, ...]]:
        """min and max."""
        return {"min": _numbers(self.min_val), "max": _numbers(self.max_val)}

    def extra_repr(self) -> str:
        """The range."""
        return f"axis={self.axis}, min={self.min_val.tolist()}, max={self.max_val.tolist()}"


_OBSERVERS: dict[str, type[Observer]] = {MinMaxObserver.name: MinMaxObserver}


def create_observer(name: str = "minmax", **options: Any) -> Observer:
    """An observer by name.

    Raises:
        ConfigError: an unknown name (lists the known ones) or option.

    >>> create_observer("minmax", axis=0)
    MinMaxObserver(axis=0, min=inf, max=-inf)
    """
    if name not in _OBSERVERS:
        near = difflib.get_close_matches(str(name), _OBSERVERS) or sorted(_OBSERVERS)
        raise ConfigError(f"observer {name!r} is not known; known: {', '.join(near)}")
    try:
        return _OBSERVERS[name](**options)
    except TypeError as e:
        raise ConfigError(f"observer {name!r} does not take {options}: {e}") from e


def _numbers(x: Tensor) -> tuple[float, ...]:
    return tuple(float(v) for v in x.reshape(-1))
