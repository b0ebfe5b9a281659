"""Which part of a histogram to represent, by the divergence of what codes can tell from what was counted."""

from __future__ import annotations

import torch
from torch import Tensor

#: Divergences (nats) this close are equal, and the wider range wins: rounding must not clip anything.
TIE = 1e-9
#: Steps of candidates that are looked at together: below the size from which torch starts threads, which on a busy
#: machine wait for one another longer than they work (gather, for the same reason, and not indexing).
BLOCK = 1 << 15


def kl_bounds(counts: Tensor, levels: int, zero: int, max_cut: int | None = None) -> tuple[int, int]:
    """Bins [lo, hi), lo <= zero <= hi, of a histogram [n] that `levels` (at least 2) equal steps represent best.

    The entropy calibration of TensorRT (S. Migacz, 8-bit Inference with TensorRT, GTC 2017), with a lower end that may
    move too. P is the histogram with what lies outside [lo, hi) piled onto the end bins; Q spreads the count of
    each step evenly over the step's non-empty bins; the bounds minimize KL(P || Q) = sum P log(P / Q), in which P
    and Q are normalized. A candidate keeps at least one bin a step. An empty end bin that takes a pile enters Q as if
    one value had been counted there (the divergence would be infinite, and an outlier behind a gap could not be cut).
    No candidate leaves more than `max_cut` counts outside (default: any number): the divergence knows no distances, and
    alone cuts where values are many, not where the cut is cheap.

    With zero = 0 only the upper end moves, over all candidates, as in the talk. Otherwise the search starts from the
    full range and moves the end that gains more until none gains: a local minimum.

    >>> kl_bounds(torch.tensor([8, 8, 4, 4, 2, 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1]), levels=4, zero=0)
    (0, 8)
    """
    used = counts.nonzero()
    if not len(used):
        return 0, len(counts)
    lo, hi = min(zero, int(used[0])), max(zero, int(used[-1]) + 1)
    if hi - lo < levels:
        return lo, hi
    divergence = _Divergence(counts, levels, int(counts.sum()) if max_cut is None else max_cut)
    product = torch.cartesian_prod
    best = float(divergence.of(torch.tensor([[lo, hi]])))
    while True:
        ups, downs = torch.arange(max(zero, lo + levels), hi + 1), torch.arange(lo, min(zero, hi - levels) + 1)
        candidates = torch.cat([product(torch.tensor([lo]), ups), product(downs, torch.tensor([hi]))])
        found = divergence.of(candidates)
        least = float(found.min())
        if least >= best - TIE:
            return lo, hi
        ties = candidates[found <= least + TIE]
        lo, hi = (int(v) for v in ties[(ties[:, 1] - ties[:, 0]).argmax()])
        best = least


class _Divergence:
    """KL(P || Q) of many candidates at once: the sums over bins are differences of prefix sums."""

    def __init__(self, counts: Tensor, levels: int, max_cut: int):
        self.counts, self.levels, self.max_cut = counts.cpu().double(), levels, max_cut
        self.mass = _prefix(self.counts)
        self.filled = _prefix((self.counts > 0).double())
        self.x_log_x = _prefix(torch.xlogy(self.counts, self.counts))

    def of(self, candidates: Tensor) -> Tensor:
        """Divergence float64 [m] of candidates (lo, hi), int64 [m, 2]."""
        size = max(1, BLOCK // (self.levels + 2))
        return torch.cat([self._of_block(block) for block in candidates.split(size)])

    def _of_block(self, candidates: Tensor) -> Tensor:
        lo, hi = candidates.unbind(1)
        below, above = self.mass[lo], self.mass[-1] - self.mass[hi]  # what is piled onto the end bins
        kept, total = self.mass[hi] - self.mass[lo], self.mass[-1]
        first, last = self.counts[lo], self.counts[hi - 1]
        edge = torch.arange(self.levels + 1)  # step l starts at bin ceil(l n / levels)
        edge = lo[:, None] - (-edge * (hi - lo)[:, None]).div(self.levels, rounding_mode="floor")
        mass, filled = (t.gather(0, edge.flatten()).view_as(edge).diff() for t in (self.mass, self.filled))
        p_mass = mass.clone()
        for step, empty in ((0, (below > 0) & (first == 0)), (-1, (above > 0) & (last == 0))):
            mass[:, step] += empty
            filled[:, step] += empty
        p_mass[:, 0] += below
        p_mass[:, -1] += above
        p_log_p = self.x_log_x[hi] - self.x_log_x[lo]
        for count, pile in ((first, below), (last, above)):
            p_log_p += torch.xlogy(count + pile, count + pile) - torch.xlogy(count, count)
        p_log_q = torch.xlogy(p_mass, mass / filled.clamp(min=1)).sum(1)  # up to the normalization of Q
        divergence = (p_log_p - p_log_q) / total - torch.log(total) + torch.log(mass.sum(1))
        return torch.where((kept == 0) | (below + above > self.max_cut), float("inf"), divergence)


def _prefix(x: Tensor) -> Tensor:
    """Sums of the first 0, 1, ..., n elements."""
    return torch.cat([x.new_zeros(1), x.cumsum(0)])
