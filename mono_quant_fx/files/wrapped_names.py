"""Names of tensors with and without what torch.compile, DataParallel and FSDP put into them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

#: Parts that wrappers add: anywhere, and in front.
_ANYWHERE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_IN_FRONT = "module"
#: How many names of a side an error lists.
_SHOWN = 3


def bare(name: str) -> str:
    """A name without wrappers.

    >>> bare("module._orig_mod.layers.0.weight"), bare("layers.0._orig_mod.weight"), bare("layers.module.weight")
    ('layers.0.weight', 'layers.0.weight', 'layers.module.weight')
    """
    parts = [part for part in name.split(".") if part not in _ANYWHERE]
    while len(parts) > 1 and parts[0] == _IN_FRONT:
        parts.pop(0)
    return ".".join(parts)


def align(found: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """Each wanted name that is found -> the name that is found: itself, else the only one that is the same when bare.

    >>> align(["_orig_mod.a", "b", "module.b"], ["a", "b", "c"])
    {'b': 'b', 'a': '_orig_mod.a'}
    """
    known, asked = dict.fromkeys(found), dict.fromkeys(wanted)
    matched = {name: name for name in asked if name in known}
    others, missing = defaultdict(list), defaultdict(list)
    for name in known.keys() - matched.keys():
        others[bare(name)].append(name)
    for name in asked.keys() - matched.keys():
        missing[bare(name)].append(name)
    pairs = {ours[0]: others[key][0] for key, ours in missing.items() if len(ours) == len(others.get(key, ())) == 1}
    return matched | {name: pairs[name] for name in asked if name in pairs}


def few(names: Iterable[str]) -> str:
    """The first names, and how many more there are.

    >>> few(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
