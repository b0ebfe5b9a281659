import warnings

import pytest
import torch
from torch import nn

import mono_quant_fx as mq
from tests.harness import Snapshot
from tests.models import MLP, ConvNet, Reused, TiedLM

#: The fused op sums tile by tile, the float op at once.
FUSED_TOLERANCE = 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", [MLP, ConvNet, Reused])
def test_the_result_is_a_drop_in_and_the_model_is_untouched(model, dtype):
    model = model().to(dtype).eval()
    x = (torch.randn(2, 3, 8, 8) if isinstance(model, ConvNet) else torch.randn(2, 64)).to(dtype)
    before = Snapshot(model)
    result = mq.quantize(model, x, calibration_data=[x], group_size=32, skip_param_threshold=0)
    before.check(model)
    assert result.graph_module(x).dtype == dtype
    assert result.graph_module(torch.cat([x, x])).shape[0] == 4
    assert 5 < result.info.sqnr_db < 100
    state = result.graph_module.state_dict()
    assert result.info.quantized_layers
    for name in result.info.quantized_layers:
        kept = state.get(f"{name}.weight")
        assert kept is None or kept.dtype == torch.int8, "a float copy of a quantized weight is left"


def test_two_runs_give_the_same_bits():
    model, data = MLP().eval(), [torch.randn(4, 64)]
    a, b = (mq.quantize(model, calibration_data=data, group_size=32) for _ in range(2))
    assert a.accuracy.to_json() == b.accuracy.to_json()
    for x, y in zip(a.graph_module.state_dict().values(), b.graph_module.state_dict().values(), strict=True):
        assert torch.equal(x, y)


def test_the_info_tells_the_sizes_and_the_reasons():
    result = mq.quantize(TiedLM().eval(), group_size=32, skip_param_threshold=0)
    info = result.info
    assert info.quantized_layers == {"fc": "int4 g32 sym"}
    assert info.skipped_layers == {"emb.weight": "default skip: Embedding (tied weight: emb decides)"}
    assert info.original_bytes == (40 * 32 + 32 * 32 + 32) * 4
    assert info.quantized_bytes == (40 * 32 + 32) * 4 + 32 * 32 // 2 + 32 * 4
    assert info.compression_ratio == info.original_bytes / info.quantized_bytes
    assert (info.bits, info.group_size, info.symmetric, info.calibration_samples_used) == (4, 32, True, 0)
    assert "1 layers quantized, 1 skipped" in str(result)


def test_config_and_keywords_combine_and_a_graph_module_is_taken_as_it_is():
    gm = mq.capture(MLP().eval())
    result = mq.quantize(gm, config=mq.QuantConfig(group_size=64), symmetric=False)
    assert set(result.info.quantized_layers.values()) == {"int4 g64 asym"}
    assert result.graph_module(torch.randn(1, 64)).shape == (1, 16)


@pytest.mark.parametrize("bits", [4, 8])
def test_it_trains_through_with_respect_to_the_input(bits):
    gm = mq.quantize(MLP().eval(), bits=bits, group_size=32).graph_module
    assert not any(p.requires_grad for p in gm.parameters())
    x = torch.randn(3, 64, requires_grad=True)
    out = gm(x)
    out.sum().backward()
    (expected,) = torch.autograd.grad(mq.dequantize_model(gm)(x).sum(), x)
    torch.testing.assert_close(x.grad, expected, rtol=FUSED_TOLERANCE, atol=FUSED_TOLERANCE)
    with torch.no_grad():
        assert torch.equal(gm(x), out)


def test_the_result_compiles_and_exports():
    x = torch.randn(4, 64)
    gm = mq.quantize(Reused().eval(), group_size=32).graph_module
    torch._dynamo.reset()
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x), gm(x), rtol=FUSED_TOLERANCE, atol=FUSED_TOLERANCE)
    program = torch.export.export(gm, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    wide = torch.randn(7, 64)
    assert torch.equal(program.module()(wide), gm(wide))


def test_accuracy_warnings_are_one_a_category():
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(7)]).eval()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        result = mq.quantize(
            model, calibration_data=[torch.randn(9, 64)], group_size=-1, sqnr_error_threshold=18.0,
            sqnr_warning_threshold=60.0,
        )  # fmt: skip
    texts = [str(w.message) for w in heard if w.category is mq.AccuracyWarning]
    assert texts == result.warnings
    assert [t.split(":")[0] for t in texts].count("Low SQNR") <= 2
    low = next(t for t in texts if t.startswith("Low SQNR") and "nodes below" in t)
    assert low.count(" dB") == 6, "the worst five and the threshold"
    assert "All layers were quantized" in " ".join(texts)
    assert "Few calibration samples: 8 < 50" in " ".join(texts)


def test_error_mode_raises_at_the_end_and_carries_the_result():
    with pytest.raises(mq.AccuracyError, match=r"CRITICAL: far too noisy: 2 of 2 nodes below 90 dB: fc\d") as caught:
        mq.quantize(
            MLP().eval(), evaluation_data=[torch.randn(4, 64)], group_size=32, accuracy_warning="error",
            sqnr_error_threshold=90, sqnr_warning_threshold=95,
        )  # fmt: skip
    assert isinstance(caught.value.result, mq.QuantizationResult)
    assert caught.value.result.graph_module(torch.randn(1, 64)).shape == (1, 16)


def test_ignore_mode_is_silent_and_still_tells():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = mq.quantize(
            MLP().eval(), evaluation_data=[torch.randn(4, 64)], group_size=32, accuracy_warning="ignore",
            sqnr_warning_threshold=90,
        )  # fmt: skip
    assert any(w.startswith("Low SQNR") for w in result.warnings)


def test_the_four_checks():
    gm = mq.capture(MLP().eval())
    out = mq.default_pipeline(mq.QuantConfig(group_size=32))(gm).graph_module
    good = mq.validate_quantization(gm, out, [torch.randn(4, 64)])
    assert (good.load_test_passed, good.weight_range_valid, good.errors) == (True, True, ())
    assert good.compression_ratio > 3
    assert 5 < good.sqnr_db < 40
    bad = mq.graph.tensors.clone(out)
    mq.graph.tensors.attach(bad, "fc1.weight_scale", torch.full((128, 2), -1.0))
    broken = mq.validate_quantization(gm, bad)
    assert not broken.weight_range_valid
    assert broken.errors == ("weight range: fc1.weight: a scale is not finite and positive",)


@pytest.mark.parametrize("model", [MLP, ConvNet, Reused, TiedLM])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dequantize_model_gives_the_float_model_back(model, symmetric):
    config = {"group_size": 32, "skip_param_threshold": 0, "default_skips": False, "symmetric": symmetric}
    model = model().eval()
    gm = mq.quantize(model, **config).graph_module
    before = Snapshot(gm)
    back = mq.dequantize_model(gm)
    before.check(gm)
    x = torch.randn(2, 3, 8, 8) if isinstance(model, ConvNet) else torch.randn(2, 64)
    x = torch.arange(8).view(2, 4) if isinstance(model, TiedLM) else x
    torch.testing.assert_close(back(x), gm(x), rtol=FUSED_TOLERANCE, atol=FUSED_TOLERANCE)
    assert not [n for n in back.graph.nodes if "mono_quant_fx" in str(n.target)]
    missing = model.load_state_dict(back.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"head.weight", "bn.num_batches_tracked"}
    torch.testing.assert_close(model(x), gm(x), rtol=FUSED_TOLERANCE, atol=FUSED_TOLERANCE)
