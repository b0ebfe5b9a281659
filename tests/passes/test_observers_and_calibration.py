import pytest
import torch

import mono_quant_fx as mq
from mono_quant_fx.graph.annotation import annotated
from tests.harness import Snapshot, check_pass
from tests.models import MLP, Reused, TiedLM

CONFIG = mq.QuantConfig(group_size=32, skip_param_threshold=0)


def annotate(model):
    return mq.passes.SkipAnnotation(CONFIG)(mq.capture(model.eval())).graph_module


def observe(model):
    return mq.passes.ObserverInsertion()(annotate(model)).graph_module


def test_observers_stand_on_the_inputs_of_annotated_ops():
    check_pass(
        mq.passes.ObserverInsertion(),
        annotate(MLP(bias=False)),
        after="""
            %x = placeholder
            %observer_of_x = MinMaxObserver[observer_of_x](%x)
            %fc1_weight = get_attr fc1.weight                      # float32[128, 64]  int4 g32 sym
            %linear = linear(%observer_of_x, %fc1_weight, None)
            %relu = relu(%linear, inplace=False)
            %observer_of_relu = MinMaxObserver[observer_of_relu](%relu)
            %fc2_weight = get_attr fc2.weight                      # float32[16, 128]  int4 g32 sym
            %linear_1 = linear(%observer_of_relu, %fc2_weight, None)
            return %linear_1""",
    )


def test_a_shared_input_is_observed_once_and_integer_inputs_never():
    class Shared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)

        def forward(self, x):
            y = torch.relu(x)
            return self.q(y) + self.k(y) + y

    gm = observe(Shared())
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == ["observer_of_relu"]
    add = next(n for n in gm.graph.nodes if n.name == "add_1")
    assert add.args[1].name == "relu", "an op without an annotated weight keeps its own input"
    config = mq.QuantConfig(group_size=32, default_skips=False, skip_param_threshold=0)
    tied = mq.passes.SkipAnnotation(config)(mq.capture(TiedLM().eval()))
    calls = [n for n in mq.passes.ObserverInsertion()(tied).graph_module.graph.nodes if n.op == "call_module"]
    assert "observer_of_ids" not in [n.target for n in calls]


def test_calibration_moves_the_statistics_to_the_annotations():
    model, data = MLP().eval(), [torch.randn(3, 64), torch.randn(5, 64)]
    gm = observe(model)
    result = check_pass(mq.passes.CalibrationExecution(data), gm, args=(data[0],))
    assert not [n for n in result.graph.nodes if n.op == "call_module"]
    seen = {a.weight: a.observed[0] for _, a in annotated(result)}
    everything = torch.cat(data)
    assert seen["fc1.weight"].source == "x"
    assert seen["fc1.weight"].observer == "minmax"
    assert seen["fc1.weight"].statistics == {"min": (everything.min().item(),), "max": (everything.max().item(),)}
    hidden = torch.relu(model.fc1(everything)).max().item()
    assert seen["fc2.weight"].statistics["max"][0] == pytest.approx(hidden, rel=1e-6)


def test_only_the_first_samples_are_used():
    gm = observe(MLP())
    data = [torch.ones(2, 64), torch.full((2, 64), 9.0)]
    result = mq.passes.CalibrationExecution(data, num_calibration_samples=2)(gm).graph_module
    assert next(a for _, a in annotated(result)).observed[0].statistics["max"] == (1.0,)


def test_a_reused_weight_has_the_statistics_of_all_its_inputs():
    gm = mq.passes.CalibrationExecution([torch.randn(4, 64)])(observe(Reused())).graph_module
    (_, annotation), *_ = annotated(gm)
    assert [o.source for o in annotation.observed] == ["x", "tanh", "tanh_1"]


def test_calibration_leaves_the_observed_graph_alone_even_when_a_batch_fails():
    gm = observe(MLP())
    before = Snapshot(gm)
    with pytest.raises(mq.CalibrationError, match=r"batch 1 fails at node 'linear' \(linear of \(2, 63\), \(128, 64\)"):
        mq.passes.CalibrationExecution([torch.randn(2, 64), torch.randn(2, 63)])(gm)
    before.check(gm)


def test_out_of_order_passes_name_the_remedy():
    gm = mq.capture(MLP().eval())
    with pytest.raises(mq.PreconditionError, match="observer-insertion: no weight is annotated; run skip-annotation"):
        mq.passes.ObserverInsertion()(gm)
    with pytest.raises(mq.PreconditionError, match="calibration: the graph has no observers; run observer-insertion"):
        mq.passes.CalibrationExecution([torch.randn(1, 64)])(annotate(MLP()))


def test_nan_in_an_activation_names_the_node_and_the_batch():
    data = [torch.randn(2, 64), torch.full((2, 64), float("nan"))]
    with pytest.raises(
        mq.CalibrationError, match=r"^batch 1: the output of node 'x': observer saw NaN or infinity: 128"
    ):
        mq.passes.CalibrationExecution(data)(observe(MLP()))
