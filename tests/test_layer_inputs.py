import itertools

import pytest
import torch
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.calibration.layer_inputs import Hessian, layer_inputs
from mono_quant_fx.graph.weight_ops import find_weights, to_matrix
from mono_quant_fx.graph.weight_table import consumption

#: One product in float32, summed in another order.
PRODUCT = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore:capture. the model fixes")
GEOMETRY = [g for g in itertools.product((1, 2), (1, 2), (0, 1), (1, 2), (0, 1)) if not g[4] or g[1] == 2]


def use_of(module, method="symbolic", x=None):
    weight = find_weights(mq.capture(module.eval(), x, method=method))[0]
    return weight, weight.uses[0]


@pytest.mark.parametrize("method", ["symbolic", "export"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_patches_times_the_weight_matrix_is_the_convolution(dims, transposed, method):
    geometry = GEOMETRY if method == "symbolic" else GEOMETRY[:3]
    for groups, stride, padding, dilation, extra in geometry:
        if extra and not transposed:
            continue
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": False}
        options |= {"output_padding": extra} if transposed else {}
        module = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")(4, 6, 3, **options)
        x = torch.randn(2, 4, *(9, 8, 7)[:dims])
        weight, use = use_of(module, method, x)
        inputs = layer_inputs(use.node, consumption(use.node, weight.node), x, tuple(weight.tensor.shape))
        rows = to_matrix(weight.tensor, use.layout, use.groups).unflatten(0, (groups, -1))
        expected = module(x)
        actual = (inputs @ rows.transpose(1, 2)).unflatten(1, (2, -1)).permute(1, 0, 3, 2).reshape(expected.shape)
        torch.testing.assert_close(actual, expected, rtol=PRODUCT, atol=PRODUCT)


def test_linear_inputs_are_the_activations():
    x = torch.randn(2, 3, 8)
    weight, use = use_of(nn.Linear(8, 4))
    assert torch.equal(layer_inputs(use.node, consumption(use.node, weight.node), x, (4, 8)), x.reshape(1, 6, 8))


def test_the_hessian_is_the_sum_over_any_split():
    x = torch.randn(2, 50, 6)
    whole, parts = Hessian(), Hessian()
    whole.add(x)
    for part in x.split(7, 1):
        parts.add(part)
    assert whole.rows == parts.rows == 50
    torch.testing.assert_close(whole.value, x.transpose(1, 2) @ x)
    torch.testing.assert_close(parts.value, whole.value)
