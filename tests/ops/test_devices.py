"""Other devices than the CPU, without having one: fake tensors that claim to be on a GPU, and meta tensors.

The reference implementations run, as they would there, and not the fake ones: an operation that mixes two devices
raises, and every value of a graph is checked to be where its inputs are.
"""

import copy
import functools

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import mono_quant_fx as mq
from mono_quant_fx import ops
from mono_quant_fx.graph import tensors
from tests import hf_models
from tests.ops.references import REFERENCES

aten = torch.ops.aten

DEVICES = ["cuda", "meta"]


class Indexing(TorchFunctionMode):
    """x[...] by calls that fake tensors take: Python's own, and copy_, ask for the device's runtime, which may lack."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__getitem__ and not isinstance(args[1], Tensor):
            return part(*args)
        if func is Tensor.__setitem__:
            return part(*args[:2]).mul_(0).add_(args[2])
        return func(*args, **(kwargs or {}))


def part(x, index):
    dim = 0
    for item in index if isinstance(index, tuple) else (index,):
        if item is None:
            x = aten.unsqueeze(x, dim)
        elif isinstance(item, slice):
            x = aten.slice(x, dim, item.start, item.stop, 1 if item.step is None else item.step)
        else:
            x, dim = aten.select(x, dim, item), dim - 1
        dim += 1
    return x


class OnDevice(fx.Interpreter):
    """Runs the references, and checks the device of every value."""

    def __init__(self, gm, device):
        super().__init__(gm)
        self.device, self.seen = device, set()

    def call_function(self, target, args, kwargs):
        if target not in REFERENCES:
            return super().call_function(target, args, kwargs)
        self.seen.add(target)
        defaults = [a.default_value for a in target._schema.arguments[len(args) :]]
        return REFERENCES[target](*args, *defaults)

    def run_node(self, n):
        value = super().run_node(n)
        assert not isinstance(value, Tensor) or value.device.type == self.device, f"{n} is on {value.device}"
        return value


def there(tensor, device):
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def run(gm, inputs, device):
    """The graph on that device, its operators seen, and its output."""
    moved = tensors.clone(gm)
    with FakeTensorMode(), Indexing():
        for name, tensor in list(tensors.named_tensors(moved)):
            tensors.attach(moved, name, there(tensor, device))
        interpreter = OnDevice(moved, device)
        out = interpreter.run(*[there(x, device) for x in inputs], enable_io_processing=False)
    return interpreter.seen, out


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.conv4 = nn.Conv1d(16, 32, 4), nn.Conv1d(32, 32, 4)
        self.a, self.b, self.c = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 40)

    def forward(self, x):
        return self.c(self.b(self.a(self.conv4(self.conv(x)).mT).relu()))


def quantized(**fields):
    x = torch.randn(4, 16, 20)
    settings = {"group_size": 32, "algorithm": "rtn", "skip_param_threshold": 0, "accuracy_warning": "ignore"}
    overrides = {"conv": "int8", "b": "int8", "c": "int4 g24 asym"}
    gm = mq.quantize(Net().eval(), calibration_data=[x], overrides=overrides, **settings, **fields).graph_module
    return gm, x


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activations", [None, "int8"])
def test_references_keep_to_the_device_of_their_inputs(device, activations):
    gm, x = quantized(activations=activations)
    seen, out = run(gm, [x], device)
    assert seen == {n.target for n in gm.graph.nodes if ops.is_ours(n.target)}
    assert out.shape == gm(x).shape and out.dtype == gm(x).dtype


def test_that_is_every_reference():
    used = {n.target for a in (None, "int8") for n in quantized(activations=a)[0].graph.nodes if ops.is_ours(n.target)}
    assert used == set(REFERENCES) == {getattr(ops, name) for name in ops.__all__ if name != "is_ours"}


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_compute_keeps_to_the_device(compute):
    gm, x = quantized(compute=compute)
    assert run(gm, [x], "cuda")[1].device.type == "cuda"


@pytest.mark.parametrize("device", DEVICES)
def test_a_reference_that_mixes_devices_is_noticed(device, monkeypatch):
    monkeypatch.setitem(REFERENCES, ops.int8_linear, lambda x, *_: x + torch.zeros(x.shape))
    gm, x = quantized()
    with pytest.raises(RuntimeError, match=r"[Dd]evice"):
        run(gm, [x], device)


@functools.cache
def exported(name):
    """A quantized graph of torch.export, and its inputs in order."""
    model, inputs = hf_models.build(name), hf_models.inputs(name, 2, 9)
    gm = mq.quantize(model, inputs, group_size=16, skip_param_threshold=64, accuracy_warning="ignore").graph_module
    return gm, [inputs[n.target] for n in gm.graph.nodes if n.op == "placeholder"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_an_exported_graph_moves_with_its_inputs(name, device):
    """Masks and positions that the model makes are made where the inputs are, not where the model was captured."""
    seen, _ = run(*exported(name), device)
    assert seen == {ops.int4_linear}


def test_a_graph_module_moves_with_to_and_runs_on_meta():
    gm, x = quantized()
    moved = copy.deepcopy(gm).to("meta")
    out = moved(x.to("meta"))
    assert out.is_meta and out.shape == gm(x).shape
    assert all(t.is_meta for _, t in tensors.named_tensors(moved))
