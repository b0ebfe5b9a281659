"""Every dtype: half precision is compared by its own rounding, float64 works to float32 precision, autocast is kept."""

import copy
import math

import pytest
import torch
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.frontend.agreement import COARSE, FINE, HALF, difference
from mono_quant_fx.numerics import error
from tests.capture_models import OneLinear

pytestmark = pytest.mark.filterwarnings("ignore:capture. the model fixes")
SLOW = pytest.mark.slow
HALVES = [
    ("masked", torch.bfloat16), ("attention", torch.float16), pytest.param("masked", torch.float16, marks=SLOW),
    pytest.param("attention", torch.bfloat16, marks=SLOW), pytest.param("encoder", torch.bfloat16, marks=SLOW),
]  # fmt: skip


def encoder(**options):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 1, **options).eval()


@pytest.mark.parametrize(("way", "dtype"), HALVES)
def test_transformers_in_half_precision_are_captured(way, dtype):
    """Refused as "Python control flow was frozen": rtol 1e-3 was asked of bfloat16, which agreed to 48 dB."""
    torch.manual_seed(0)
    x = torch.randn(3, 7, 32).to(dtype)
    if way == "attention":
        model, example = nn.MultiheadAttention(32, 4, batch_first=True).eval().to(dtype), (x, x, x)
    else:
        mask = torch.zeros(3, 7, dtype=torch.bool)
        mask[0, 4:] = way == "masked"
        model, example = encoder().to(dtype), {"src": x, "src_key_padding_mask": mask}
    result = mq.quantize(model, example, group_size=32, skip_param_threshold=0, default_skips=False, bits=8)
    assert result.info.quantized_layers
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    kept = ~example["src_key_padding_mask"] if isinstance(example, dict) else ...
    expected, actual = (mq.execution.batch.leaves(m(*args, **kwargs))[0] for m in (model, result.graph_module))
    assert actual.dtype == dtype and mq.sqnr_db(expected[kept], actual[kept]) > 25


@SLOW
def test_padding_that_torchs_fused_path_fills_with_zeros_is_no_difference():
    """float32 as well: without gradients torch's encoder gives zeros where the mask says padding."""
    model, x, mask = encoder(), torch.randn(3, 7, 32), torch.zeros(3, 7, dtype=torch.bool)
    mask[1, 3:] = True
    gm = mq.capture(model, {"src": x, "src_key_padding_mask": mask})
    torch.testing.assert_close(gm(x, src_key_padding_mask=mask), model(x, src_key_padding_mask=mask))


@pytest.mark.parametrize(("allowed", "noise"), [(FINE, 1e-5), (HALF, 3e-3), (COARSE, 2e-2)])
def test_rounding_noise_is_no_difference_and_a_frozen_factor_is(allowed, noise):
    torch.manual_seed(0)
    for scale in (1e-6, 1.0, 1e6):
        x = torch.randn(50, 40) * scale
        assert difference([x], [x + noise * scale * torch.randn_like(x)], allowed) is None
        for wrong in (x * 1.5, x.flip(0), x.roll(1, 1), -x, x.relu()):
            assert "dB, the largest difference is" in difference([x], [wrong], allowed)


def test_what_else_sets_outputs_apart_is_named():
    x, ids = torch.randn(4, 5), torch.arange(1000)
    nan = x.clone()
    nan[0, 0] = math.nan
    for a, b, words in (
        ([x], [x, x], "2 outputs instead of 1"),
        ([x], [x.double()], r"output 0 (float32[4, 5]) has dtype float64"),
        ([x, x], [x, x[:2]], "output 1 (float32[4, 5]) has shape [2, 5]"),
        ([x], [nan], "is finite in other places (1 of 20)"),
        ([ids], [ids.flip(0)], "output 0 (int64[1000]) differs in 100.00% of its elements"),
        ([3], [4], "output 0 is 4 instead of 3"),
        ([x.to(torch.complex64)], [1j * x], "dB, the largest"),
    ):
        assert words in difference(a, b, FINE)
    near = ids.clone()
    near[7] = 0
    assert difference([nan, ids, None, "a"], [nan, near, None, "a"], FINE) is None


SETTINGS = {
    "int4": {"group_size": 32},
    "gptq": {"group_size": 32, "algorithm": "gptq", "bias_correction": True},
    "clip": {"group_size": -1, "algorithm": "clip"},
    "asymmetric": {"group_size": 32, "symmetric": False, "algorithm": "rtn"},
    "int8": {"bits": 8, "activations": "int8", "observer": "histogram"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_float64_is_quantized_like_float32_and_says_how_exactly(name):
    """ "value cannot be converted to type float without overflow" with calibration data."""
    torch.manual_seed(0)
    fields, x = SETTINGS[name], torch.randn(100, 64)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    results = []
    for dtype in (torch.float32, torch.float64):
        data = None if name == "int4" else [x.to(dtype)[:50], x.to(dtype)[50:]]
        given = copy.deepcopy(model).to(dtype)
        results.append(mq.quantize(given, calibration_data=data, **fields, default_skips=False))
    single, double = results
    assert double.graph_module(x.double()).dtype == torch.float64
    nearness = mq.sqnr_db(single.graph_module(x).double(), double.graph_module(x.double()))
    assert nearness > (30 if name == "gptq" else 60), "each rounding of GPTQ depends on the last bit of all before"
    if name != "int4":
        assert abs(single.info.sqnr_db - double.info.sqnr_db) < 0.3
    assert any("float64" in w and "float32 precision" in w for w in double.info.warnings)
    assert not any("float64" in w for w in single.info.warnings)


@pytest.mark.parametrize(("value", "words"), [(1e300, "exceeds float32"), (1e-300, "below what float32 can hold")])
@pytest.mark.parametrize("data", [None, [torch.randn(8, 64).double()]])
def test_weights_beyond_float32_are_refused_by_name(value, words, data):
    """inf dB was reported where 0.0 is true."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).double().eval()
    with torch.no_grad():
        model[1].weight.mul_(value)
    with pytest.raises(mq.WeightError, match=rf"'1\.weight'.*{words}"):
        mq.quantize(model, calibration_data=data, group_size=32)


def test_figures_of_float64_are_taken_in_float64():
    tiny = torch.full((4, 4), 1e-60, dtype=torch.float64)
    assert error.sqnr_db(tiny, torch.zeros_like(tiny)) == 0.0
    assert error.sqnr_db(tiny, tiny * 1.1) == pytest.approx(20.0)
    assert error.sqnr_db(tiny * 1e200, tiny * 1.1e200) == pytest.approx(20.0)
    assert error.max_abs_error(tiny * 1e200, tiny * 1.5e200) == pytest.approx(0.5e140)


class Cast(OneLinear):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.fc(x)


def test_autocast_inside_forward_is_kept_by_export_and_refused_without_an_example():
    """The output silently became float32."""
    model, x = Cast().eval(), torch.randn(4, 32)
    with pytest.raises(mq.CaptureError, match=r"forward enters torch\.autocast.*give an example(?s:.*)example_inputs"):
        mq.capture(model)
    gm = mq.capture(model, x)
    assert torch.equal(gm(x), model(x)) and gm(x).dtype == torch.bfloat16


class Partly(nn.Module):
    """What `a` computes gives no gradients."""

    def __init__(self, region):
        super().__init__()
        self.a, self.b, self.region = nn.Linear(32, 32), nn.Linear(32, 32), region

    def forward(self, x):
        with self.region():
            h = self.a(x)
            low, high = h.chunk(2, -1)
            n = h.shape[-1] // 16
        return self.b(h) * n + torch.cat([high, low], -1) + x


@pytest.mark.parametrize("method", ["symbolic", "export"])
@pytest.mark.parametrize("region", [torch.no_grad, lambda: torch.set_grad_enabled(False), torch.enable_grad])
def test_no_grad_inside_forward_stops_gradients_and_hides_no_weight(method, region):
    """A symbolic trace let them through, and an export set the weights apart in a graph of their own."""
    model, x = Partly(region).eval(), torch.randn(4, 32)
    gm = mq.capture(model, x, method=method)
    assert torch.equal(gm(x), model(x))
    seen = []
    for given in (model, gm):
        y = x.clone().requires_grad_()
        model.zero_grad()
        given(y).square().sum().backward()
        seen.append([y.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*seen, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b))
    assert (seen[1][1] is None) == (region is not torch.enable_grad)
    result = mq.quantize(gm, group_size=16, skip_param_threshold=0, default_skips=False)
    assert set(result.info.quantized_layers) == {"a", "b"}


class Frozen(OneLinear):
    @torch.no_grad()
    def forward(self, x):
        return {"y": self.fc(x), "rest": (x.shape[0], [x.mean(-1).max(0)[0]])}


@pytest.mark.parametrize("method", ["symbolic", "export"])
def test_a_forward_without_gradients_as_a_whole_is_quantized(method, tmp_path):
    model, x = Frozen().eval(), torch.randn(4, 32)
    gm = mq.capture(model, x, method=method)
    out = gm(x.requires_grad_())
    assert not out["y"].requires_grad and not out["rest"][1][0].requires_grad and out["rest"][0] == 4
    result = mq.quantize(gm, group_size=16, skip_param_threshold=0, default_skips=False)
    assert set(result.info.quantized_layers) == {"fc"}
    result.save(tmp_path / "m.safetensors", graph=True)
    assert torch.equal(mq.load(tmp_path / "m.safetensors").graph_module(x)["y"], result.graph_module(x)["y"])
