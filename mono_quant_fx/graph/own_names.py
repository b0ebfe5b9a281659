"""Names that a graph cannot have (class, it's, graph), plain ones instead, and the user's own behind them.

torch.fx writes a graph as Python source, `self.encoder.weight`, on a GraphModule with attributes of its own. A part of
a name that cannot stand there is replaced; gm.meta keeps what it stood for, and tables, patterns and files for others
use that.
"""

from __future__ import annotations

import keyword
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx, nn

#: The key of gm.meta: name in the graph -> the user's own, for those that differ.
NAMES = "mono_quant_fx_names"
#: Characters of a name: more than any model has, and no more than Python's parser bears.
LONGEST = 100_000
_ROOT = frozenset({*dir(fx.GraphModule(nn.Module(), fx.Graph())), "_in_spec", "_out_spec"})
_MODULE = frozenset(dir(nn.Module()))
#: What torch.export calls something else by.
_EXPORTS = ("_guards_fn", "self")


def is_name(name: Any) -> bool:
    """Whether Python takes it as the name of a variable, and as it is spelled.

    >>> is_name("größe"), is_name("class"), is_name("\ufb01x")  # Python reads the last one as "fix"
    (True, False, False)
    """
    plain = isinstance(name, str) and len(name) <= LONGEST and name.isidentifier() and not keyword.iskeyword(name)
    return plain and unicodedata.normalize("NFKC", name) == name


def spoken(part: str) -> bool:
    """Whether torch.fx can write this part of a dotted path as an attribute: behind a dot, or in quotation marks."""
    if part.startswith("__") and part.endswith("__"):
        return False
    if part.isidentifier():
        return is_name(part)
    return 0 < len(part) <= LONGEST and part.isprintable() and not set(part) & set('"\\')


def is_taken(part: str, at_root: bool) -> bool:
    """Whether every GraphModule (at the root) or Module has an attribute of this name."""
    return part in (_ROOT if at_root else _MODULE)


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """The user's own name -> the one in the graph, for the names of a model that need another, prefixes included.

    >>> plain_names(["class.weight", "class_.weight", "head.weight"])
    {'class': 'class__1', 'class.weight': 'class__1.weight'}
    """
    paths = dict.fromkeys(tuple(parts[:i]) for n in names for parts in [n.split(".")] for i in range(1, len(parts) + 1))
    found: dict[tuple[str, ...], tuple[str, ...]] = {(): ()}
    taken = set(paths)
    for path in sorted(paths, key=len):
        parent, part = path[:-1], path[-1]
        new, number = _plain(part, not parent), 0
        while new != part and (*parent, new if not number else f"{new}_{number}") in taken:
            number += 1
        new = f"{new}_{number}" if number else new
        taken.add((*parent, new))
        found[path] = (*found[parent], new)
    return {".".join(own): ".".join(new) for own, new in found.items() if own != new}


def _plain(part: str, at_root: bool) -> str:
    if spoken(part) and not is_taken(part, at_root) and not (at_root and part in _EXPORTS):
        return part
    text = re.sub(r"[^A-Za-z0-9_]", "_", part)[:100].strip("_") or "name"
    ends = keyword.iskeyword(text) or is_taken(text, at_root) or (at_root and part in _EXPORTS)
    return f"{text}_" if ends else text


def set_names(gm: fx.GraphModule, tied: Mapping[str, str]) -> None:
    """Notes the user's own names, which are among the further names of tensors that a capture records."""
    names = replaced(tied)
    if names:
        gm.meta[NAMES] = names


def replaced(tied: Mapping[str, str]) -> dict[str, str]:
    """Name in the graph -> the user's own, for those that differ, from the further names that a capture records."""
    plain = plain_names(tied)
    return {new: own for own, new in tied.items() if own in plain and _stands_for(new, own)}


def _stands_for(new: str, own: str) -> bool:
    """Whether plain_names may have made the one of the other."""
    pairs = list(zip(new.split("."), own.split("."), strict=False))
    same_length = new.count(".") == own.count(".")
    return same_length and all(a == b or a.startswith(_plain(b, not i)) for i, (a, b) in enumerate(pairs))


def own_name(gm: Any, name: str) -> str:
    """The user's own name for a tensor or module of a graph, or for what was made of it (class_.weight_scale)."""
    names: dict[str, str] = gm.meta.get(NAMES) or {}
    if not names or name in names:
        return names.get(name, name)
    prefixes = {
        ".".join(new.split(".")[:i]): ".".join(own.split(".")[:i])
        for new, own in names.items()
        for i in range(1, new.count(".") + 1)
    }
    longest_first = sorted([*((n, "_") for n in names), *((p, ".") for p in prefixes)], key=lambda x: -len(x[0]))
    for new, sign in longest_first:
        if name == new or name.startswith(new + sign):
            return (names if sign == "_" else prefixes)[new] + name[len(new) :]
    return name
