"""What is said where a user hands over something else than a model that can be quantized."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mono_quant_fx as mq
from tests.capture_models import TwoLayers as Net
from tests.capture_models import assert_same
from tests.capture_models import two_layers as net

pytestmark = pytest.mark.filterwarnings("ignore:capture. the model fixes")
OPTIONS = {"group_size": 32, "skip_param_threshold": 0}
METHODS = pytest.mark.parametrize("method", ["symbolic", "export"])


def test_torchscript_is_refused_with_what_to_pass_and_kept_whole_inside_a_model():
    """It gave '_CachedForward' or "no signature found"."""
    model, x = net()
    for made in (torch.jit.script(model), torch.jit.trace(model, x)):
        with pytest.raises(mq.CaptureError, match=r"pass the nn\.Module that it was scripted or traced from"):
            mq.quantize(made, x)
    grads = [p.requires_grad for p in model.a.parameters()]
    model.a = torch.jit.script(model.a)
    result = mq.quantize(model, **OPTIONS)
    assert [p.requires_grad for p in model.a.parameters()] == grads
    assert result.info.quantized_layers == {"b": "int4 g32 sym"}
    assert [row.reason for row in result.accuracy.rows if row.scheme == "float32"] == [
        "not reachable: RecursiveScriptModule hides its weights from the graph"
    ]
    assert_same(mq.capture(model, method="symbolic"), model, x)


def test_a_lazy_module_asks_for_one_forward():
    """A raw ValueError."""
    model, x = nn.Sequential(nn.LazyLinear(64), nn.LazyBatchNorm1d()).eval(), torch.randn(4, 64)
    for call in (lambda: mq.quantize(model, x), lambda: mq.capture(model)):
        with pytest.raises(mq.CaptureError, match=r"'0\.weight' has no shape yet.*run the model on one batch first"):
            call()
    model(x)
    assert mq.quantize(model, x, **OPTIONS).info.quantized_layers


def test_a_second_quantize_says_that_it_is_one_and_dequantize_model_leads_out():
    """It said "the float graph has no weight '0.weight'"."""
    model, x = net()
    first = mq.quantize(model, x, **OPTIONS).graph_module
    for example in (None, x):
        with pytest.raises(
            mq.PreconditionError, match=r"quantized already .*'a\.weight'.*mq\.dequantize_model\(graph\)"
        ):
            mq.quantize(first, example, **OPTIONS)
    again = mq.quantize(mq.dequantize_model(first), x, **OPTIONS)
    assert again.info.quantized_layers == {"a": "int4 g32 sym", "b": "int4 g32 sym"}
    inside = mq.quantize(nn.Sequential(first, nn.Linear(64, 64)).eval(), x, **OPTIONS)
    assert inside.info.quantized_layers == {"1": "int4 g32 sym"}


class AlwaysOn(Net):
    """In eval mode these still use the batch's statistics, and drop."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(64, track_running_stats=False)
        self.other = nn.InstanceNorm1d(4)

    def forward(self, x):
        x = self.other(self.norm(super().forward(x)).unflatten(-1, (4, 16))).flatten(1)
        return F.dropout(x, 0.1, training=True)


@METHODS
def test_quantize_of_a_captured_graph_takes_what_quantize_of_the_model_takes(method):
    """It was refused as "training mode"."""
    model, x = net(AlwaysOn)
    gm = mq.capture(model, x, method=method)
    names = mq.quantize(model, x, **OPTIONS).info.quantized_layers
    assert mq.quantize(gm, x, **OPTIONS).info.quantized_layers == names
    assert mq.capture(mq.quantize(gm, x, **OPTIONS).graph_module)


def test_a_program_that_was_exported_in_training_mode_is_still_refused():
    program = torch.export.export(nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train(), (torch.ones(2, 4),))
    with pytest.raises(mq.CaptureError, match="exported in training mode"):
        mq.quantize(program.module())
    model, x = net(lambda: nn.BatchNorm1d(64, track_running_stats=False))
    assert mq.capture(torch.export.export(model, (x,)).module())


@METHODS
def test_accuracy_is_measured_against_the_module_that_a_newcomer_has(method):
    """AttributeError: 'graph'."""
    model, x = net()
    gm = mq.capture(model, x, method=method)
    result = mq.quantize(gm, x, **OPTIONS)
    for data in ([x], (batch for batch in [x, x + 1]), None):
        kept = None if data is None else list(data)
        expected = mq.measure_accuracy(gm, result.graph_module, kept)
        assert str(mq.measure_accuracy(model, result.graph_module, None if data is None else iter(kept))) == str(
            expected
        )
    assert mq.measure_accuracy(model, result, [{"image": x}], prepare_batch=lambda b: b["image"]).samples == 8
    assert mq.validate_quantization(model, result, [x]) == mq.validate_quantization(gm, result.graph_module, [x])


def test_what_is_no_graph_is_refused_with_the_way_to_one():
    model, x = net()
    result = mq.quantize(model, x, **OPTIONS)
    for call in (
        lambda: mq.measure_accuracy(model, model, [x]),
        lambda: mq.validate_quantization(x, result, [x]),
        lambda: mq.format_graph(model),
        lambda: mq.diff_graphs(model, model),
        lambda: mq.dequantize_model(model),
        lambda: mq.bisect(mq.default_pipeline(), model, [x], 30.0),
        lambda: mq.draw(model),
    ):
        with pytest.raises(
            mq.PreconditionError, match=r"a GraphModule is needed, not .*; mq\.capture\(model\) makes one"
        ):
            call()
    with pytest.raises(mq.CaptureError, match=r"measure_accuracy needs the float graph, mq\.capture"):
        mq.measure_accuracy(model.train(), result, [x])
    with pytest.raises(mq.PreconditionError, match=r"what mq\.quantize returned is needed"):
        mq.save(model, "nowhere")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda m: mq.check_accuracy_warnings(m),
            mq.PreconditionError,
            "what mq.quantize returned is needed, not TwoLayers",
        ),
        (lambda m: mq.history(m), mq.PreconditionError, "history: a node of a graph is needed, not TwoLayers"),
        (lambda m: mq.default_pipeline(m), mq.ConfigError, "a QuantConfig is needed, not TwoLayers"),
        (lambda m: mq.quantize_weight_int4(m.a), mq.WeightError, "a dense tensor with values is needed, not Linear"),
        (lambda m: mq.quantize_weight_int4(m.a.weight.to("meta")), mq.WeightError, "not one on meta"),
        (lambda m: mq.sqnr_db([1.0], [1.0]), mq.InputError, "two tensors of one shape are needed, not list"),
    ],
)
def test_what_a_newcomer_has_in_hand_is_answered_with_what_is_needed(call, error, words):
    """AttributeError 'graph', 'shape' and their like."""
    with pytest.raises(error, match=words):
        call(Net().eval())


def test_accuracy_is_measured_against_an_exported_program():
    model, x = net()
    result = mq.quantize(model, x, **OPTIONS)
    program = torch.export.export(model, (x,))
    table = mq.measure_accuracy(program, mq.quantize(program, **OPTIONS).graph_module, [(x,)])
    assert table.output_sqnr_db == pytest.approx(mq.sqnr_db(model(x), result.graph_module(x)), abs=0.1)
