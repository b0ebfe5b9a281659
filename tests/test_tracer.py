"""The symbolic way: what its graph looks like, and that the model keeps nothing of it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.frontend.symbolic import open_modules, trace
from mono_quant_fx.frontend.tracer import required_inputs
from mono_quant_fx.graph import tensors
from tests.harness import Snapshot, assert_graph
from tests.models import TiedLM

#: name -> (module, its arguments by name), made afresh for each test
CLASSES = {
    "linear": lambda: (nn.Linear(8, 6), {"input": torch.randn(2, 8)}),
    "bilinear": lambda: (nn.Bilinear(4, 8, 6), {"input1": torch.randn(2, 4), "input2": torch.randn(2, 8)}),
    "embedding": lambda: (nn.Embedding(9, 8, padding_idx=0), {"input": torch.tensor([[0, 3], [8, 1]])}),
    "embedding_bag": lambda: (
        nn.EmbeddingBag(9, 8),
        {"input": torch.tensor([0, 3, 8, 1]), "offsets": torch.tensor([0, 1])},
    ),
    "conv1d": lambda: (nn.Conv1d(4, 6, 3, padding="same"), {"input": torch.randn(2, 4, 9)}),
    "conv2d": lambda: (
        nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="reflect"),
        {"input": torch.randn(2, 4, 9, 9)},
    ),
    "conv3d": lambda: (nn.Conv3d(4, 6, 3), {"input": torch.randn(2, 4, 5, 5, 5)}),
    "conv_transpose2d": lambda: (nn.ConvTranspose2d(4, 6, 3, groups=2), {"input": torch.randn(2, 4, 5, 5)}),
}


def test_weights_are_get_attr_nodes_under_their_own_names_one_a_tensor():
    gm = trace(TiedLM().eval())
    assert_graph(
        gm,
        """
        %ids = placeholder
        %emb_weight = get_attr emb.weight                      # float32[40, 32]
        %embedding = embedding(%ids, %emb_weight, norm_type=2.0, scale_grad_by_freq=False, sparse=False)
        %fc_weight = get_attr fc.weight                        # float32[32, 32]
        %fc_bias = get_attr fc.bias                            # float32[32]
        %linear = linear(%embedding, %fc_weight, %fc_bias)
        %tanh = tanh(%linear)
        %linear_1 = linear(%tanh, %emb_weight, None)
        return %linear_1
        """,
    )
    assert set(gm.state_dict()) == {"emb.weight", "fc.weight", "fc.bias"}
    paths = {n.name: tensors.module_path(n) for n in gm.graph.nodes if n.op == "call_function"}
    assert paths == {"embedding": "emb", "linear": "fc", "tanh": "", "linear_1": "head"}


@pytest.mark.parametrize("name", CLASSES)
def test_every_weight_module_is_opened_and_computes_the_same(name):
    module, inputs = CLASSES[name]()
    gm = trace(module.eval(), list(inputs))
    assert not [n for n in gm.graph.nodes if n.op == "call_module"]
    assert gm.weight is module.weight
    assert torch.equal(gm(**inputs), module(**inputs))


@pytest.mark.parametrize("name", CLASSES)
def test_the_calls_of_a_plain_fx_graph_are_opened_with_all_their_arguments(name):
    module, inputs = CLASSES[name]()
    calls = torch.fx.Graph()
    first, *others = (calls.placeholder(name) for name in inputs)
    calls.output(calls.call_module("inner.layer", (first,), dict(zip([*inputs][1:], others, strict=True))))
    root = nn.Module()
    root.inner = nn.Module()
    root.inner.layer = module.eval()
    plain = torch.fx.GraphModule(root, calls).eval()
    opened = mq.capture(plain)
    assert not [n for n in opened.graph.nodes if n.op == "call_module"]
    assert opened.inner.layer.weight is module.weight
    assert torch.equal(opened(**inputs), module(**inputs))
    assert [n for n in plain.graph.nodes if n.op == "call_module"], "the given graph stays as it is"
    stack = next(n for n in opened.graph.nodes if n.op == "call_function").meta["nn_module_stack"]
    assert stack["inner.layer"] == ("inner.layer", type(module))


class Upsample(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 4, 3, stride=2)
        self.fc = nn.Linear(11, 64)

    def forward(self, x):
        return self.fc(self.up(x, output_size=(12, 11)))


@pytest.mark.parametrize("plain", [False, True])
def test_a_transposed_convolution_asked_for_a_size_stays_a_leaf_with_a_reason(plain):
    model, x = Upsample().eval(), torch.randn(1, 4, 5, 5)
    gm = mq.capture(torch.fx.symbolic_trace(model) if plain else model)
    assert torch.equal(gm(x), model(x))
    rows = {row.module: row.reason for row in mq.quantize(gm, group_size=32).accuracy.rows}
    assert rows["up"] == "not reachable: ConvTranspose2d hides its weights from the graph"


class Shapes(nn.Module):
    """Reads every plain property of a weight without using the weight."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 6)

    def forward(self, x):
        w = self.fc.weight
        x = x.to(w.dtype).to(w.device).reshape(-1, w.shape[1])
        scale = w.size(0) + w.size()[1] + w.dim() + w.ndim + w.numel()
        return self.fc(x) / scale


def test_shape_dtype_and_device_of_a_weight_are_plain_values_and_no_use_of_it():
    model, x = Shapes().eval(), torch.randn(3, 8)
    gm = trace(model)
    (weight,) = [n for n in gm.graph.nodes if n.target == "fc.weight"]
    assert [user.target for user in weight.users] == [F.linear]
    assert torch.equal(gm(x), model(x))


class Constants(nn.Module):
    """Makes tensors in forward, and leaves notes on itself."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 6)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.last = x
        return self.fc(x) + torch.arange(6) * torch.ones(6)


def test_nothing_of_the_trace_stays_on_the_model():
    model, x = Constants().eval(), torch.randn(2, 8)
    before, attributes = Snapshot(model), dict(vars(model))
    gm = mq.capture(model, x, method="symbolic")
    before.check(model)
    assert vars(model) == attributes
    assert torch.equal(gm(x), model(x))


def test_parameters_buffers_and_plain_tensors_are_shared_not_copied():
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)).eval()
    gm = trace(model)
    assert getattr(gm, "0").weight is getattr(model, "0").weight
    assert getattr(gm, "1").running_mean is getattr(model, "1").running_mean


def test_required_inputs_are_those_without_a_default():
    class Model(nn.Module):
        def forward(self, a, b, c=None, *, d, e=2, **rest):
            return a

    assert required_inputs(Model()) == ["a", "b", "d"]


def test_opening_a_graph_again_changes_nothing():
    gm = mq.capture(TiedLM().eval())
    assert mq.format_graph(open_modules(gm)) == mq.format_graph(gm)
