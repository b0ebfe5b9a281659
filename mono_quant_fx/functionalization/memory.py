"""Which of the model's tensors a graph's nodes stand for: objects that share memory, and what was written into it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import fx


@dataclass(eq=False)
class Root:
    """A piece of memory.

    Attributes:
        node: who made it.
        kind: "value", "input", or "state" for one of the model's own tensors.
        changes: the writes into it, in order.
        linked: other memory that may be the same.
        nodes: every node whose value lies in it.
    """

    node: fx.Node
    kind: str = "value"
    changes: list[Change] = field(default_factory=list)
    linked: set[Root] = field(default_factory=set)
    nodes: list[fx.Node] = field(default_factory=list)

    def link(self, others: Iterable[Root]) -> None:
        """Notes that this may be the same memory as the others."""
        for other in others:
            if other is not self:
                self.linked.add(other)
                other.linked.add(self)

    def cluster(self) -> set[Root]:
        """All other memory that this may be."""
        found, todo = {self}, [self]
        while todo:
            new = todo.pop().linked - found
            found |= new
            todo += new
        return found - {self}


@dataclass(eq=False)
class Thing:
    """One tensor of the model, or a tuple of views: memory, looked at in one way. Several nodes may give it.

    Attributes:
        parent: what it is a view of; None for the tensor that has all of the memory.
        step: the node that takes the view.
        piece: which piece it is, where the parent is a tuple.
        is_tuple: it is a tuple of views, or may be a tuple.
        latest: the node that gives its value after the first `seen` changes of the root.
    """

    root: Root
    latest: fx.Node
    parent: Thing | None = None
    step: fx.Node | None = None
    piece: int | str | None = None
    is_tuple: bool = False
    seen: int = 0

    def path(self) -> list[Thing]:
        """From the root's own tensor to this."""
        found = [self]
        while found[-1].parent is not None:
            found.append(found[-1].parent)
        return found[::-1]

    def overlaps(self, other: Thing) -> bool:
        """Whether a write into `other` may change this: not where they are two pieces of one split."""
        for mine, its in zip(self.path(), other.path(), strict=False):
            if mine is not its:
                if mine.parent is not its.parent or mine.piece is None or its.piece is None:
                    return True
                return mine.piece == its.piece or _sign(mine.piece) != _sign(its.piece)
        return True


def _sign(piece: int | str) -> object:
    """Pieces counted from the end and from the start may be the same."""
    return piece >= 0 if isinstance(piece, int) else str


@dataclass(eq=False)
class Change:
    """A write.

    Attributes:
        thing: what was written; None where it may have been this memory, or another.
        value: the node of its new value; None where it was written in place.
    """

    thing: Thing | None
    value: fx.Node | None = None


def pieces(things: list[Thing]) -> Iterator[tuple[Thing, Thing | None]]:
    """(what is a view, the tuple that it is a piece of) from the innermost view outwards."""
    at = len(things) - 1
    while at > 0:
        is_piece = things[at].piece is not None
        yield things[at], things[at - 1] if is_piece else None
        at -= 2 if is_piece else 1
