"""Modes that a caller has switched on around a call: the same bits as without, and the mode is on again afterwards."""

import contextlib
import copy
import functools

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mono_quant_fx as mq
from tests.test_faults_world import OPTIONS, Net, net

pytestmark = pytest.mark.filterwarnings("ignore:capture. the model fixes")


class Biased(TorchFunctionMode):
    """Adds one to what torch.round gives, which nobody asked for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result + 1 if func in (torch.round, torch.Tensor.round_, torch.Tensor.round) else result


class BiasedOps(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result + 1 if func is torch.ops.aten.round.default else result


@contextlib.contextmanager
def switched(switch, on, off):
    switch(on)
    try:
        yield
    finally:
        switch(off)


MODES = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "float64": lambda: switched(torch.set_default_dtype, torch.float64, torch.float32),
    "meta by default": lambda: switched(torch.set_default_device, "meta", None),
    "with meta": lambda: torch.device("meta"),
    "a function mode": Biased,
    "a dispatch mode": BiasedOps,
    "deterministic": lambda: switched(torch.use_deterministic_algorithms, True, False),
    "products in bfloat16": lambda: switched(torch.set_float32_matmul_precision, "medium", "highest"),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
}
INT8 = {"activations": "int8", "bits": 8, "bias_correction": True, "observer": "histogram"}


#: A way to a graph, and the options it is quantized with.
ROUNDS = [("symbolic", INT8), ("symbolic", {"algorithm": "gptq"}), ("export", {"algorithm": "clip"})]


def quantized(model, x, method, options):
    gm = mq.capture(model, x, method=method)
    result = mq.quantize(gm, calibration_data=[x], **OPTIONS, **options)
    table = mq.measure_accuracy(gm, result.graph_module, [x], all_nodes=True)
    return result.graph_module, [str(result.accuracy), str(table), mq.format_graph(result.graph_module)]


@functools.cache
def plain_results():
    return [quantized(*net(), *one) for one in ROUNDS]


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@pytest.mark.parametrize("mode", MODES)
def test_whatever_is_switched_on_around_a_call_the_bits_are_the_same(mode):
    """Inside autocast: PassError "self and mat2 must have the same dtype", or silently other codes; and so on."""
    for one, (expected, texts) in zip(ROUNDS, plain_results(), strict=True):
        model, x = net()
        with MODES[mode]():
            gm, said = quantized(model, x, *one)
        assert said == texts
        state, wanted = gm.state_dict(), expected.state_dict()
        assert {k: (v.dtype, v.device) for k, v in state.items()} == {k: (v.dtype, v.device) for k, v in wanted.items()}
        assert all(torch.equal(state[k], wanted[k]) for k in wanted)
        assert torch.equal(gm(x), expected(x))


@pytest.mark.parametrize("mode", MODES)
def test_the_mode_is_on_again_afterwards_and_loading_does_not_feel_it(mode, tmp_path):
    model, x = net()
    expected = mq.quantize(model, x, **OPTIONS).graph_module(x)
    probes = torch.zeros(2).device, torch.zeros(2).dtype
    with MODES[mode]():
        inside = probe()
        mq.quantize(model, x, **OPTIONS).save(tmp_path / "m.safetensors", graph=True)
        loaded = [mq.load(tmp_path / "m.safetensors", m) for m in (None, model)]
        assert probe() == inside
        with pytest.raises(mq.CaptureError):
            mq.capture(nn.Dropout().train())
        assert probe() == inside
    assert (torch.zeros(2).device, torch.zeros(2).dtype) == probes
    assert all(torch.equal(one.graph_module(x), expected) for one in loaded)


def probe():
    """What the modes of MODES show of themselves."""
    return (
        torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.is_grad_enabled(),
        torch.zeros(2).device, torch.zeros(2).dtype, torch.round(torch.zeros(2)).tolist() if not torch.zeros(2).is_meta
        else None, torch.are_deterministic_algorithms_enabled(), torch.is_anomaly_enabled(),
        torch.get_float32_matmul_precision(),
    )  # fmt: skip


def test_a_default_device_on_which_the_model_lies_stays():
    with torch.device("meta"):
        model = Net().eval()
        gm = mq.capture(model)
    assert all(t.is_meta for t in gm.state_dict().values())


def test_a_model_and_data_made_in_inference_mode_are_quantized():
    model, x = net()
    expected = mq.quantize(model, calibration_data=[x], **OPTIONS)
    with torch.inference_mode():
        made, y = copy.deepcopy(model), x.clone()
        result = mq.quantize(made, calibration_data=[y], **OPTIONS)
        exported = mq.capture(made, y, method="export")
    assert str(result.accuracy) == str(expected.accuracy)
    with torch.no_grad():
        torch.testing.assert_close(exported(x), model(x))
