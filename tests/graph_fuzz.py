"""Stored graphs changed by chance, loaded and run in a process of their own: whatever they call, no signal ends it.

Run as a program, `python -m tests.graph_fuzz START STOP`, it loads and runs the mutants of those seeds, and prints each
seed before it is run; `fuzz` starts such programs, and goes on behind a mutant that ended one.
"""

from __future__ import annotations

import json
import math
import os
import random
import resource
import select
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import mono_quant_fx as mq
from mono_quant_fx.graph.tensors import get_attribute
from mono_quant_fx.storage.graph_json import allowed_calls
from mono_quant_fx.storage.graph_json.calls import allowed_operators
from mono_quant_fx.storage.graph_json.document import graph_from_json, graph_to_json
from mono_quant_fx.storage.graph_json.values import DTYPES
from tests import models

FUNCTIONS = [f"{home}.{name}" for home, names in allowed_calls.FUNCTIONS.items() for name in names.split()]
METHODS = [*allowed_calls.METHODS.split(), *allowed_calls.METHODS_IN_PLACE.split()]
OPERATORS = {str(op): op for op in allowed_operators()}
NUMBERS = [0, 1, -1, 2, 3, 4, 5, 7, 8, -2, -3, -8, 16, 31, 32, 33, 63, 64, 65, 127, 128, 1000, -1000, 10**6]
LARGE = [2**31 - 1, 2**31, -(2**31), 2**32 + 1, 2**62, 2**63 - 1, -(2**63) + 1]
REALS = [0.0, 1.0, -1.0, 0.5, 2.5, 1e-5, 1e30, -1e30, 1e308, {"float": "inf"}, {"float": "-inf"}, {"float": "nan"}]
TYPES = [name for name in DTYPES if "float8" not in name]
WORDS = ["mean", "sum", "none", "linear", "reflect", "constant", "amax", "replicate", "nearest", "bilinear", "tanh"]
#: Seconds that one mutant may take before it counts as slow, and those that a process has to start.
PATIENCE, START = 10, 120
#: What tests/guarded_malloc.c fills fresh memory with, as a float32.
FRESH = -2.8735380875585056e-16
MEMORY = 6 << 30


class Indexed(nn.Module):
    """Ops that read and write places by index."""

    def __init__(self):
        super().__init__()
        self.emb, self.fc = nn.Embedding(16, 32), nn.Linear(32, 32)
        self.register_buffer("index", torch.tensor([[3, 1], [0, 2]]))
        self.register_buffer("mask", torch.tensor([[True, False], [True, True]]))

    def forward(self, ids):
        h = self.fc(self.emb(ids))
        picked = torch.gather(h[:, :, :2], 1, self.index[:, :, None].expand(2, 2, 2) % 3)
        spread = torch.zeros(2, 5, 2).scatter(1, self.index[:, :, None].expand(2, 2, 2), picked)
        values, order = torch.topk(h.sum(-1), 2)
        kept = torch.where(self.mask, values, h[0, :2, 0])
        return spread, h[self.index[:, 0] % 2, order[:, 0]], kept.cumsum(0), torch.index_select(h, 1, order[0])


class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.up = nn.Conv2d(4, 8, 3, 1, 1), nn.GroupNorm(2, 8), nn.ConvTranspose2d(8, 4, 2, 2)
        self.fc = nn.Linear(4, 16)

    def forward(self, x):
        y = torch.nn.functional.max_pool2d(self.norm(self.conv(x)).relu(), 2)
        return self.fc(self.up(y).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.attention = nn.GRU(16, 16, batch_first=True), nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        y = self.rnn(x)[0]
        return self.attention(y, y, y)[0].softmax(-1)


def _noise(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(3))


#: input, model, how it is captured, and how it is quantized (not at all: None)
BASES: dict[str, tuple[Tensor, type[nn.Module], str, dict[str, Any] | None]] = {
    "mlp": (_noise(3, 64), models.MLP, "symbolic", {"group_size": 32}),
    "int8": (_noise(3, 64), models.MLP, "symbolic", {"group_size": 32, "activations": "int8"}),
    "conv": (_noise(2, 4, 6, 6), Convolved, "export", {"bits": 8, "group_size": -1, "activations": "int8"}),
    "index": (torch.tensor([[1, 2, 3], [4, 5, 0]]), Indexed, "export", {"group_size": 16}),
    "symbolic": (torch.tensor([[1, 2, 3]]), models.TiedLM, "symbolic", {"group_size": 32}),
    "recurrent": (_noise(2, 3, 16), Recurrent, "symbolic", None),
}


def _build(x: Tensor, model: type[nn.Module], method: str, settings: dict[str, Any] | None) -> fx.GraphModule:
    torch.manual_seed(0)
    gm = mq.capture(model().eval(), x, method=method)
    if settings is None:
        return gm
    data = [x] if "activations" in settings else None
    settings = {**settings, "skip_param_threshold": 1, "accuracy_warning": "ignore"}
    return mq.quantize(gm, calibration_data=data, **settings).graph_module


@dataclass(frozen=True)
class Base:
    """A sound graph as JSON text, its tensors, and an input."""

    text: str
    tensors: dict[str, Tensor]
    x: Tensor


def make_bases() -> list[Base]:
    """The graphs that mutants are made from; the same in each process."""
    found = []
    for x, *how in BASES.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gm = _build(x, *how)
        data = graph_to_json(gm)
        tensors = {name: get_attribute(gm, name).detach().clone() for name in data["tensors"]}
        found.append(Base(json.dumps(data), tensors, x))
    return found


class Mutant:
    """A base with one change or more; deterministic in its seed."""

    def __init__(self, base: Base, seed: int):
        self.chance, self.x = random.Random(seed), base.x.clone()
        self.data = json.loads(base.text)
        self.tensors = {name: tensor.clone() for name, tensor in base.tensors.items()}
        self.nodes: list[dict[str, Any]] = self.data["graph"]["nodes"]
        changes = [self.change_argument] * 3 + [self.add_call] * 4 + [self.exchange_call, self.exchange_node]
        changes += [self.change_tensor] * 2
        for _ in range(self.chance.choice([1, 1, 2, 2, 3, 5])):
            self.chance.choice(changes)()

    def number(self) -> int:
        return self.chance.choice(NUMBERS if self.chance.random() < 0.85 else LARGE)

    def before(self, place: int) -> dict[str, str]:
        """A node that stands before a place."""
        names = [n["name"] for n in self.nodes[:place] if n["op"] != "output"]
        return {"node": self.chance.choice(names[-12:] if self.chance.random() < 0.7 else names)}

    def value(self, old: Any, place: int) -> Any:
        """Something in place of an argument."""
        draw = self.chance.random()
        if draw < 0.15:
            return self.before(place)
        if draw < 0.2:
            return self.chance.choice([None, True, [], [1, 2], {"dtype": self.chance.choice(TYPES)}, "sum"])
        if isinstance(old, bool):
            return not old
        if isinstance(old, int):
            return self.number() if draw < 0.7 else old + self.chance.choice([-1, 1, 2])
        if isinstance(old, float):
            return self.chance.choice(REALS)
        if isinstance(old, list):
            return self.list(old, place)
        if isinstance(old, dict) and "dtype" in old:
            return {"dtype": self.chance.choice(TYPES)}
        if isinstance(old, dict) and next(iter(old)) in ("tuple", "size", "slice"):
            key = next(iter(old))
            return {key: self.list(old[key], place)}
        return self.number() if draw < 0.6 else self.chance.choice(REALS)

    def list(self, old: list[Any], place: int) -> list[Any]:
        new = list(old)
        draw = self.chance.random()
        if new and draw < 0.7:
            at = self.chance.randrange(len(new))
            new[at] = self.value(new[at], place)
        elif draw < 0.85:
            new.insert(self.chance.randint(0, len(new)), self.number())
        elif new:
            new.pop()
        return new

    def _calls(self) -> list[int]:
        return [i for i, n in enumerate(self.nodes) if n["op"].startswith("call_") and n.get("args")]

    def change_argument(self) -> None:
        place = self.chance.choice(self._calls())
        args, kwargs = self.nodes[place]["args"], self.nodes[place].get("kwargs", {})
        if kwargs and self.chance.random() < 0.4:
            key = self.chance.choice(list(kwargs))
            kwargs[key] = self.value(kwargs[key], place)
        else:
            at = self.chance.randrange(len(args))
            args[at] = self.value(args[at], place)

    def exchange_node(self) -> None:
        place = self.chance.choice(self._calls())
        self.nodes[place]["args"][0] = self.before(place)

    def exchange_call(self) -> None:
        places = [i for i in self._calls() if self.nodes[i]["op"] == "call_function"]
        if places:
            target = self.chance.choice([self.chance.choice(list(OPERATORS)), self.chance.choice(FUNCTIONS)])
            self.nodes[self.chance.choice(places)]["target"] = target

    def change_tensor(self) -> None:
        """Values that are no indices, another type, or another shape; the record in the graph says so too."""
        name = self.chance.choice(list(self.tensors))
        tensor, record = self.tensors[name], self.data["tensors"][name]
        draw = self.chance.random()
        if draw < 0.4:
            tensor = torch.full(tensor.shape, self.number()).to(tensor.dtype)  # integers wrap
            tensor = tensor * self.chance.choice([1, -1, 2**40, math.nan]) if tensor.is_floating_point() else tensor
        elif draw < 0.65:
            dtype = DTYPES[self.chance.choice(TYPES)]
            tensor = tensor.to(dtype)
            record["kind"], record["requires_grad"] = "buffer", False
        elif tensor.dim():
            at = self.chance.randrange(tensor.dim())
            sizes = list(tensor.shape)
            sizes[at] = self.chance.choice([0, 1, 2, 3, sizes[at] - 1, sizes[at] + 1, 2 * sizes[at]])
            tensor = tensor.new_zeros(sizes)
        record.update(dtype=str(tensor.dtype)[6:], shape=list(tensor.shape))
        self.tensors[name] = tensor

    def add_call(self) -> None:
        """One more call, whose result is one more output."""
        place = self.chance.randint(1, len(self.nodes) - 1)
        place = max(place, 1 + max(i for i, n in enumerate(self.nodes) if n["op"] == "placeholder"))
        name = f"more_{len(self.nodes)}"
        node = {"name": name, **self.call(place)}
        self.nodes.insert(place, node)
        output = self.nodes[-1]
        if self.data["graph"]["codegen"] is None or self.data["graph"]["codegen"]["outputs"] is None:
            output["args"] = [{"tuple": [*output["args"], {"node": name}]}]

    def call(self, place: int) -> dict[str, Any]:
        draw = self.chance.random()
        if draw < 0.2:
            args = [self.before(place), *(self.loose(place) for _ in range(self.chance.randint(0, 3)))]
            return {"op": "call_method", "target": self.chance.choice(METHODS), "args": args}
        if draw < 0.4:
            args = [self.before(place), *(self.loose(place) for _ in range(self.chance.randint(0, 4)))]
            return {"op": "call_function", "target": self.chance.choice(FUNCTIONS), "args": args}
        target = self.chance.choice(list(OPERATORS))
        args, kwargs = [], {}
        for argument in OPERATORS[target]._schema.arguments:
            left_out = argument.has_default_value() and self.chance.random() < 0.3
            if left_out:
                break
            if argument.kwarg_only:
                kwargs[argument.name] = self.of_type(argument, place)
            else:
                args.append(self.of_type(argument, place))
        return {"op": "call_function", "target": target, "args": args, "kwargs": kwargs}

    def loose(self, place: int) -> Any:
        pair = [self.number(), self.number()]
        other = [{"dtype": self.chance.choice(TYPES)}, {"tuple": [2, 2]}, None, True, self.chance.choice(REALS)]
        return self.chance.choice([self.before(place), self.before(place), self.number(), pair, -1, 1, 0, *other])

    def of_type(self, argument: Any, place: int) -> Any:
        kind, optional = str(argument.real_type), str(argument.real_type).startswith("Optional[")
        if optional and self.chance.random() < 0.4:
            return None
        kind = kind.removeprefix("Optional[").removesuffix("]" if optional else "")
        count = argument.N or self.chance.choice([0, 1, 2, 2, 3, 4])
        make: dict[str, Callable[[], Any]] = {
            "Tensor": lambda: self.before(place),
            "int": lambda: self.chance.choice([0, 1, -1, 2]) if self.chance.random() < 0.6 else self.number(),
            "float": lambda: self.chance.choice(REALS),
            "number": lambda: self.chance.choice([*REALS, self.number()]),
            "bool": lambda: self.chance.random() < 0.5,
            "str": lambda: self.chance.choice(WORDS),
            "ScalarType": lambda: {"dtype": self.chance.choice(TYPES)},
            "MemoryFormat": lambda: {"memory_format": self.chance.choice(["contiguous_format", "channels_last"])},
            "List[int]": lambda: [self.number() for _ in range(count)],
            "List[float]": lambda: [self.chance.choice(REALS) for _ in range(count)],
            "List[bool]": lambda: [True] * count,
            "List[Tensor]": lambda: [self.before(place) for _ in range(count)],
            "List[Optional[Tensor]]": lambda: [self.before(place), None][: self.chance.randint(1, 2)],
        }
        return make.get(kind, lambda: None)()

    def run(self) -> str:
        """refused by load, raised when it ran, or ran; leaked where fresh memory came out."""
        try:
            gm = graph_from_json(self.data, self.tensors)
        except mq.GraphFormatError:
            return "refused"
        try:
            leaves = [t for t in pytree.tree_leaves(gm(self.x)) if isinstance(t, Tensor)]
            return "leaked" if any(map(_is_fresh, leaves)) else "ran"
        except Exception:  # whatever Python and torch say to nonsense: all of it is an error and no signal
            return "raised"


def _is_fresh(tensor: Tensor) -> bool:
    """Reads every element; whether one is what fresh memory holds."""
    values = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return bool((values == (FRESH if values.dtype is torch.float32 else math.nan)).any())


@dataclass
class Report:
    """What became of the mutants; `crashed` and `slow` and `leaked` are their seeds."""

    counts: dict[str, int] = field(default_factory=dict)
    crashed: dict[int, int] = field(default_factory=dict)
    leaked: list[int] = field(default_factory=list)
    slow: list[int] = field(default_factory=list)


def guard(folder: Path) -> Path | None:
    """tests/guarded_malloc.c, compiled; None without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    library = folder / "guarded_malloc.so"
    source = Path(__file__).with_name("guarded_malloc.c")
    subprocess.run([compiler, "-O2", "-fPIC", "-shared", "-o", library, source, "-ldl"], check=True)
    return library


def environment(library: Path | None) -> dict[str, str]:
    """Of a process whose tensors' memory is guarded."""
    guarded = {"LD_PRELOAD": str(library)} if library is not None else {}
    return {**os.environ, **guarded, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def fuzz(start: int, stop: int, library: Path | None = None) -> Report:
    """Runs the mutants start <= seed < stop, in as many processes as they end."""
    report, at = Report(), start
    while at < stop:
        command = [sys.executable, "-W", "ignore", "-m", "tests.graph_fuzz", str(at), str(stop)]
        folder = Path(__file__).resolve().parents[1]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(library), cwd=folder
        )
        last = _follow(process, report)
        if process.wait() == 0:
            break
        if last is None:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode} before its first mutant")
        if process.returncode != -9 or last not in report.slow:
            report.crashed[last] = process.returncode
        at = last + 1
    return report


def _follow(process: subprocess.Popen[bytes], report: Report) -> int | None:
    """Reads a program's lines until it ends, or is killed for its last mutant, which took too long."""
    assert process.stdout is not None
    last, rest = None, b""
    while True:
        if not select.select([process.stdout], [], [], START if last is None else PATIENCE)[0]:
            if last is not None:
                report.slow.append(last)
            process.kill()
        piece = os.read(process.stdout.fileno(), 1 << 16)
        if not piece:
            return last
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            word, _, value = line.decode().partition(" ")
            if word == "seed":
                last = int(value)
            else:
                report.counts[word] = report.counts.get(word, 0) + 1
                if word == "leaked":
                    report.leaked.append(last or 0)


def main(start: int, stop: int) -> None:
    torch.set_num_threads(1)
    bases = make_bases()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    for seed in range(start, stop):
        print("seed", seed, flush=True)
        torch.manual_seed(seed)
        print(Mutant(bases[seed % len(bases)], seed).run(), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
