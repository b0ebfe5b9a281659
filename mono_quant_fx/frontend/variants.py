"""Second inputs for a model, made from an example: other values, another batch, another length, other strides.

What a capture froze of the example comes to light on them. None of these is sure to suit the model, so they are tried
in turn: where the model itself fails, nothing is proved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mono_quant_fx.execution.batch import Batch

#: In which respects a second input can differ from the example. A batch of one is a case of its own: sizes of 1 are
#: broadcast and squeezed.
ASPECTS = frozenset({"values", "batch", "length", "strides", "single"})
#: How many sizes that may be lengths are tried.
LENGTHS = 3


@dataclass(frozen=True)
class Variant:
    """A second input: in which respects it differs from the example, and which size is taken for the length."""

    differs: frozenset[str]
    length: int | None = None

    def of(self, example: Batch) -> Batch:
        """The second input that it makes of an example."""
        batch = example
        if "single" in self.differs:
            batch = with_samples(batch, 1)
        if "batch" in self.differs:
            batch = with_samples(batch, other_count(example))
        if self.length is not None:
            batch = with_length(batch, self.length, batch.samples())
        if "values" in self.differs:
            batch = batch.map_tensors(_resampled())
        return batch.map_tensors(_restrided) if "strides" in self.differs else batch


def variants(example: Batch) -> list[Variant]:
    """What is worth trying, what differs most first."""
    lengths = _lengths(example)
    tries = [Variant(ASPECTS - {"single"}, length) for length in lengths]
    sets = ["values batch strides", "values batch", "batch", "values strides", "values"]
    sets += ["single"] if example.samples() > 1 else []
    tries += [Variant(frozenset(differs.split())) for differs in sets]
    return tries + [Variant(frozenset({"length"}), length) for length in lengths]


def other_count(example: Batch) -> int:
    """A small number of samples that is not the example's."""
    return 3 if example.samples() == 2 else 2


def other_length(length: int) -> int:
    """Half of it, which what is cut into pieces can still be cut into, or one more."""
    return length // 2 if length >= 4 else length + 1


def with_samples(batch: Batch, count: int) -> Batch:
    """The batch with `count` samples, the first ones again where it has fewer."""
    total = batch.samples()
    return batch.map_tensors(lambda t: resized(t, 0, count) if t.dim() and t.shape[0] == total else t)


def with_length(batch: Batch, length: int, samples: int) -> Batch:
    """The batch with every size `length` changed, but for the batch's own dimension."""

    def change(t: Tensor) -> Tensor:
        for dim in range(t.dim()):
            if t.shape[dim] == length and not (dim == 0 and length == samples):
                t = resized(t, dim, other_length(length))
        return t

    return batch.map_tensors(change)


def _lengths(example: Batch) -> list[int]:
    """Sizes that may be lengths, those of early dimensions first: neither the batch nor 1."""
    tensors, samples = example.tensors(), example.samples()
    places = sorted((dim, i) for i, t in enumerate(tensors) for dim in range(t.dim()))
    sizes = [tensors[i].shape[dim] for dim, i in places if not (dim == 0 and tensors[i].shape[0] == samples)]
    return [size for size in dict.fromkeys(sizes) if size > 1][:LENGTHS]


def resized(t: Tensor, dim: int, count: int) -> Tensor:
    """The tensor with another size, what it holds from the start again where that is more."""
    return t.index_select(dim, torch.arange(count, device=t.device) % t.shape[dim])


def _resampled() -> Callable[[Tensor], Tensor]:
    """Values drawn from a tensor's own, so that indices stay valid; the user's random numbers are not used up."""
    generator = torch.Generator().manual_seed(0)

    def draw(t: Tensor) -> Tensor:
        if t.numel() < 2 or t.is_meta or t.layout is not torch.strided:
            return t
        index = torch.randint(t.numel(), (t.numel(),), generator=generator).to(t.device)
        return t.reshape(-1)[index].reshape(t.shape)

    return draw


def _restrided(t: Tensor) -> Tensor:
    """The same values with the last two dimensions the other way round in memory."""
    return t.mT.contiguous().mT if t.dim() > 1 and t.layout is torch.strided else t
