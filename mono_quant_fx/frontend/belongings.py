"""What a model's code may write besides tensors, noted and put back: nothing of a trace stays with the user.

A copy of the model has attributes of its own. But functions are never copied: a hook that appends to a list, a forward
that sets a global name or an attribute of its class, write to the user's objects whichever copy runs them.
"""

from __future__ import annotations

import collections
import contextlib
import dis
import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn

#: How far containers and objects are followed from a module, a function or a class.
_DEPTH = 4
_MOST = 50_000
_ATOMS = (Tensor, str, bytes, int, float, complex, type(None), torch.dtype, torch.device, torch.Size)
_STORE_GLOBAL = dis.opmap["STORE_GLOBAL"]
_FOREIGN = (*sys.stdlib_module_names, "torch", "mono_quant_fx", "numpy")
GLOBAL_HOOKS = (torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks)


@contextlib.contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Notes what the model, its hooks and its code hold, and puts it back at the end, however it ends."""
    notes = _Notes()
    for module in model.modules():
        notes.look(module, _DEPTH)
    for hook in (hook for hooks in GLOBAL_HOOKS for hook in hooks.values()):
        notes.look(hook, _DEPTH)
    try:
        yield
    finally:
        for restore in notes.restores:
            restore()


class _Notes:
    def __init__(self) -> None:
        self.restores: list[Callable[[], None]] = []
        self.seen: dict[int, Any] = {}  # the objects themselves, so that no id is used again

    def look(self, value: Any, depth: int) -> None:
        """Notes a value's contents, and those of what it holds."""
        if isinstance(value, _ATOMS) or id(value) in self.seen or depth < 0 or len(self.seen) > _MOST:
            return
        self.seen[id(value)] = value
        depth = _DEPTH if isinstance(value, nn.Module) else depth
        if isinstance(value, types.FunctionType):
            self._function(value, depth)
        elif type(value) in _CONTAINERS:
            if type(value) is not tuple:
                make, put_back = _CONTAINERS[type(value)]
                self.restores.append(functools.partial(put_back, value, make(value)))
            for part in [*(value.values() if isinstance(value, dict) else value)]:
                self.look(part, depth - 1)
        elif isinstance(value, types.MethodType):
            self.look((value.__func__, value.__self__), depth)
        elif isinstance(value, functools.partial):
            self.look((value.func, value.args, value.keywords), depth)
        elif not isinstance(value, type | types.ModuleType):
            self._object(value, depth)

    def _object(self, value: Any, depth: int) -> None:
        if isinstance(value, nn.Module) or not _is_foreign(type(value)):
            self._class(type(value), depth)
            inner = vars(value) if hasattr(value, "__dict__") else {}
            self.look(inner, depth)

    def _class(self, kind: type, depth: int) -> None:
        for one in kind.__mro__:
            if id(one) in self.seen or _is_foreign(one):
                continue
            self.seen[id(one)] = one
            plain = {name: v for name, v in vars(one).items() if _is_plain(name, v)}
            self.restores.append(functools.partial(_put_back_class, one, plain))
            for value in vars(one).values():
                if isinstance(value, types.FunctionType) or type(value) in _CONTAINERS:
                    self.look(value, depth - 1)

    def _function(self, function: types.FunctionType, depth: int) -> None:
        if function.__module__ is None or function.__module__.split(".")[0] in _FOREIGN:
            return
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                before = cell.cell_contents
                self.restores.append(functools.partial(_put_back_cell, cell, before))
                self.look(before, depth - 1)
        self.look(function.__defaults__ or (), depth)
        for code in _codes(function.__code__):
            names = [name for name in code.co_names if name in function.__globals__]
            for name in names:
                self.look(function.__globals__[name], depth - 1)
            if _STORE_GLOBAL in code.co_code[::2]:
                self._globals(function.__globals__, code)

    def _globals(self, home: dict[str, Any], code: types.CodeType) -> None:
        for name in {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_GLOBAL"}:
            before = home.get(name, _MISSING)
            self.restores.append(functools.partial(_put_back_global, home, name, before))


_MISSING = object()


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _is_foreign(kind: type) -> bool:
    return str(kind.__module__).split(".")[0] in _FOREIGN and kind.__module__ != "__main__"


def _is_plain(name: str, value: Any) -> bool:
    return not (name.startswith("__") or isinstance(value, type) or hasattr(type(value), "__get__"))


def _put_back_dict(value: dict[Any, Any], before: dict[Any, Any]) -> None:
    """What changed and nothing else: another thread may be using a module that has this dict."""
    for key in [key for key in value if key not in before]:
        del value[key]
    for key, old in before.items():
        if value.get(key, _MISSING) is not old:
            value[key] = old
    if list(value) != list(before):
        value.clear()
        value.update(before)


def _put_back_list(value: Any, before: list[Any]) -> None:
    if not (len(value) == len(before) and all(a is b for a, b in zip(value, before, strict=True))):
        value.clear()
        value.extend(before)


def _put_back_set(value: set[Any], before: set[Any]) -> None:
    if value != before:
        value.clear()
        value.update(before)


def _put_back_class(kind: type, before: dict[str, Any]) -> None:
    for name in [n for n, v in vars(kind).items() if _is_plain(n, v) and n not in before]:
        delattr(kind, name)
    for name, value in before.items():
        if vars(kind).get(name, _MISSING) is not value:
            setattr(kind, name, value)


def _put_back_cell(cell: types.CellType, before: Any) -> None:
    if cell.cell_contents is not before:
        cell.cell_contents = before


def _put_back_global(home: dict[str, Any], name: str, before: Any) -> None:
    if before is _MISSING:
        home.pop(name, None)
    elif home.get(name, _MISSING) is not before:
        home[name] = before


_DICT: tuple[Any, Any] = (dict, _put_back_dict)
_LIST: tuple[Any, Any] = (list, _put_back_list)
#: How each container is noted and put back; others, whose methods may do anything, are left alone.
_CONTAINERS: dict[type, tuple[Any, Any]] = {
    dict: _DICT,
    collections.OrderedDict: _DICT,
    collections.defaultdict: _DICT,
    collections.Counter: _DICT,
    list: _LIST,
    collections.deque: _LIST,
    set: (set, _put_back_set),
    tuple: (tuple, None),
}
