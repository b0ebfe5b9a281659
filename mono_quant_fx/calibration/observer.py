"""What every observer shares, and the plainest one: a module whose forward is the identity and which remembers."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mono_quant_fx.errors import CalibrationError, ConfigError
from mono_quant_fx.numerics.affine import TILE, code_range


class Observer(nn.Module, ABC):
    """Base of the observers.

    Args:
        axis: None observes the tensor as a whole, a dimension each channel along it.

    Attributes:
        count: how many values were seen, int64; one number a channel.

    State is replaced, never written into, so that a copy that shares tensors stays independent. It survives a
    state_dict, and it moves to the device of the data.
    """

    name: ClassVar[str]
    count: Tensor

    def __init__(self, axis: int | None = None):
        super().__init__()
        if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int)):
            raise ConfigError(f"axis={axis!r}: a dimension such as 0 or -1 is needed, or None for the whole tensor")
        self.axis = axis
        self.reset()

    def reset(self) -> None:
        """Forgets everything, and stays on its device."""
        device = self.count.device if "count" in self._buffers else None
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=device))

    @property
    def has_seen(self) -> bool:
        """Whether any value was seen."""
        return bool(self.count.any())

    @abstractmethod
    def observe(self, rows: Tensor) -> None:
        """Takes in finite float32 values [C, n]: one row a channel, or a single row for the tensor as a whole."""

    @abstractmethod
    def merge_state(self, other: Any) -> None:
        """Takes in the state of another observer of the same kind, options and channels; both have seen data."""

    @abstractmethod
    def value_range(self, bits: int = 8, symmetric: bool = False) -> tuple[Tensor, Tensor]:
        """(low, high) float32: the values that the codes should reach; scalars, or one a channel."""

    def chosen(self) -> tuple[str, str]:
        """(name, reason) of the kind whose range this is: its own, for which there is nothing to say."""
        return self.name, ""

    @abstractmethod
    def statistics(self) -> dict[str, tuple[float, ...]]:
        """What was seen, as plain numbers."""

    def calculate_qparams(self, bits: int = 8, symmetric: bool = False) -> tuple[Tensor, Tensor]:
        """(scale float32, zero_point int32) of what was seen; scalars, or one a channel.

        The affine map of value_range, widened to hold zero, onto the signed codes (arXiv 1712.05877, sec. 2.1).

        Raises:
            ConfigError: nothing was seen yet, or the observer measures no range.
        """
        low, high = self.value_range(bits, symmetric)
        if not self.has_seen:
            raise ConfigError("calculate_qparams: the observer has seen no data yet; run calibration first")
        qmin, qmax = code_range(bits)
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        tiny = torch.finfo(torch.float32).tiny
        if symmetric:
            scale = (torch.maximum(high, -low) / ((qmax - qmin) / 2)).clamp(min=tiny)
            return scale, torch.zeros_like(scale, dtype=torch.int32)
        scale = (high / (qmax - qmin) - low / (qmax - qmin)).clamp(min=tiny)
        return scale, (qmin - torch.round(low / scale)).clamp(qmin, qmax).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x itself.

        Raises:
            CalibrationError: x holds NaN or infinity, or has other channels than what was seen before.
        """
        if x.numel():
            rows = self._rows(x.detach())
            if rows.device != self.count.device:
                self.to(rows.device)
            self.observe(rows)
            self.count = self.count + self._one_or_each(self.count.new_full((len(rows),), rows.shape[1]))
        return x

    def merge(self, other: Observer) -> None:
        """Takes in what `other` has seen, as if this observer had seen it after its own data.

        Raises:
            ConfigError: the kinds, the options or the numbers of channels differ.
        """
        if type(other) is not type(self):
            raise ConfigError(f"merge: {type(self).__name__} cannot take in {type(other).__name__}; use the same kind")
        for option in known_options(type(self)):
            mine, theirs = getattr(self, option), getattr(other, option)
            if mine != theirs:
                raise ConfigError(f"merge: {option} differs, {mine!r} and {theirs!r}; use the same options")
        if not other.has_seen:
            return
        if other.count.device != self.count.device:
            other = copy.deepcopy(other).to(self.count.device)
        if not self.has_seen:
            self._buffers.update(other._buffers)  # shared, which is safe because no one writes into them
            return
        if self.count.shape != other.count.shape:
            raise ConfigError(f"merge: channels differ, {self.count.numel()} and {other.count.numel()}")
        self.merge_state(other)
        self.count = self.count + other.count

    def extra_repr(self) -> str:
        """The options."""
        return ", ".join(f"{option}={getattr(self, option)!r}" for option in known_options(type(self)))

    def _rows(self, x: Tensor) -> Tensor:
        if self.axis is None:
            rows = x.float().reshape(1, -1)
        elif not -x.dim() <= self.axis < x.dim():
            raise CalibrationError(f"observer of axis {self.axis} saw a tensor of shape {list(x.shape)}")
        else:
            rows = x.float().movedim(self.axis, 0).flatten(1) if x.dim() > 1 else x.float().reshape(-1, 1)
            if self.has_seen and len(rows) != self.count.numel():
                raise CalibrationError(
                    f"observer saw {len(rows)} channels along axis {self.axis}, and {self.count.numel()} before"
                )
        low, high = torch.aminmax(rows)  # NaN propagates
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            bad = int((~torch.isfinite(rows)).sum())
            raise CalibrationError(f"observer saw NaN or infinity: {bad} of {rows.numel()} values, in float32")
        return rows

    def _one_or_each(self, per_channel: Tensor) -> Tensor:
        """Without the channel dimension, [C, ...] -> [...], when the tensor is observed as a whole."""
        return per_channel[0] if self.axis is None else per_channel

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Takes on the shapes of the saved state, which are not those of a fresh observer."""
        count = state_dict.get(f"{prefix}count")
        if count is not None and bool(count.any()) and count.dim() != (self.axis is not None):
            kind = "one observer for the whole tensor" if count.dim() == 0 else "one a channel"
            args[-1].append(f"{prefix}count: the saved state is {kind}, and this observer has axis={self.axis}")
            return
        for name, buffer in list(self._buffers.items()):
            if f"{prefix}{name}" in state_dict and buffer is not None:
                self._buffers[name] = buffer.new_empty(state_dict[f"{prefix}{name}"].shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


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
        super().reset()
        self.register_buffer("min_val", self.count.new_full((), float("inf"), dtype=torch.float32))
        self.register_buffer("max_val", self.count.new_full((), float("-inf"), dtype=torch.float32))

    def observe(self, rows: Tensor) -> None:
        """Widens the range."""
        low, high = torch.aminmax(rows, dim=1)
        self.min_val = torch.minimum(self.min_val, self._one_or_each(low))
        self.max_val = torch.maximum(self.max_val, self._one_or_each(high))

    def merge_state(self, other: Any) -> None:
        """The range that holds both."""
        self.min_val = torch.minimum(self.min_val, other.min_val)
        self.max_val = torch.maximum(self.max_val, other.max_val)

    def value_range(self, bits: int = 8, symmetric: bool = False) -> tuple[Tensor, Tensor]:
        """The range as it is."""
        return self.min_val, self.max_val

    def statistics(self) -> dict[str, tuple[float, ...]]:
        """min and max."""
        return {"min": numbers(self.min_val), "max": numbers(self.max_val)}

    def extra_repr(self) -> str:
        """The options and the range."""
        return f"{super().extra_repr()}, min={self.min_val.tolist()}, max={self.max_val.tolist()}"


def known_options(kind: type[Observer]) -> tuple[str, ...]:
    """The names of the options of a kind of observer; each is an attribute as well."""
    return tuple(inspect.signature(kind).parameters)


def tiles(rows: Tensor) -> Iterator[Tensor]:
    """Column blocks of about TILE elements, so that a float64 copy of one stays small."""
    return iter(rows.split(max(1, TILE // len(rows)), dim=1))


def numbers(x: Tensor) -> tuple[float, ...]:
    """A tensor as plain numbers."""
    return tuple(float(v) for v in x.reshape(-1))
