"""What an example leaves in a graph: one tensor given twice, views, sizes that happen to be equal."""

import pytest
import torch
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.execution.batch import Batch

pytestmark = pytest.mark.filterwarnings("ignore:capture. the model fixes")
METHODS = pytest.mark.parametrize("method", ["symbolic", "export"])


def r(*size):
    return torch.randn(*size, 32)


class Difference(nn.Module):
    """Not symmetric in its inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x, y):
        return self.a(x) - self.b(y)


class OfContainers(Difference):
    def forward(self, pair, rest):
        return super().forward(pair[0], rest["y"][0]) * pair[1]


X = torch.randn(4, 32)
TWICE = {
    "by position": (Difference, (X, X), (r(3), r(3))),
    "by keyword": (Difference, {"x": X, "y": X}, {"x": r(3), "y": r(3)}),
    "both": (Difference, Batch((X,), {"y": X}), Batch((r(3),), {"y": r(3)})),
    "nested": (OfContainers, ((X, X), {"y": [X]}), ((r(3), r(3)), {"y": [r(3)]})),
    "two views of one": (Difference, (X[:, :], X.view(4, 32)), (r(3), r(3))),
    "overlapping": (Difference, (X.flatten()[:64].view(2, 32), X.flatten()[8:72].view(2, 32)), (r(3), r(3))),
}


@METHODS
@pytest.mark.parametrize("name", TWICE)
def test_a_tensor_given_for_two_inputs_stays_two_inputs(method, name):
    """The export dropped the first input and ignored it for ever: 6 dB on (x, y)."""
    kind, example, fresh = TWICE[name]
    model, batch = kind().eval(), mq.execution.batch.to_batch(fresh)
    gm = mq.capture(model, example, method=method)
    with torch.no_grad():
        (actual,) = mq.execution.batch.leaves(mq.execution.run.run_batch(gm, batch))
        torch.testing.assert_close(actual, model(*batch.args, **batch.kwargs))


VIEWS = {
    "sliced": lambda: torch.randn(4, 9, 64)[..., :32],
    "a part of a batch": lambda: r(6, 9)[:4],
    "transposed": lambda: torch.randn(32, 9, 4).permute(2, 1, 0),
    "expanded": lambda: r(1, 1).expand(4, 9, 32),
    "overlapping": lambda: torch.randn(200).as_strided((4, 9, 32), (2, 3, 1)),
    "at an offset": lambda: torch.randn(5000)[17 : 17 + 4 * 9 * 32].view(4, 9, 32),
    "unfolded": lambda: torch.randn(4, 9, 80).unfold(2, 32, 32)[:, :, 0],
    "every other": lambda: r(4, 18)[:, ::2],
    "a parameter": lambda: nn.Parameter(r(4, 9)),
    "a conjugate's real part": lambda: torch.randn(4, 9, 32, dtype=torch.complex64).conj().real,
}


class Flow(nn.Module):
    """Asks for the number of dimensions, so that export takes it."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(32, 32)

    def forward(self, x):
        return self.a(x.reshape(-1, 32)) if x.dim() == 3 else x


@METHODS
@pytest.mark.parametrize("name", VIEWS)
def test_an_example_that_is_a_view_makes_a_graph_for_fresh_tensors(method, name):
    """The graph's guards read x._base: 'NoneType' object has no attribute 'size'."""
    model = (Flow() if method == "export" else nn.Sequential(nn.Linear(32, 32))).eval()
    x = VIEWS[name]()
    before = x.detach().clone()
    gm = mq.capture(model, x, method=method)
    assert torch.equal(x, before)
    with torch.no_grad():
        for fresh in (r(4, 9), r(2, 5), r(7, 3), torch.randn(3, 5, 64)[..., ::2], x.detach()):
            torch.testing.assert_close(gm(fresh), model(fresh))


def test_shifted_ids_and_calibration_batches_that_are_cut_are_views_too():
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.out = nn.Embedding(50, 32), nn.Linear(32, 32)

        def forward(self, ids, labels):
            return self.out(self.emb(ids)) - self.emb(labels) if ids.dim() == 2 else ids

    model, ids = Pairs().eval(), torch.randint(50, (4, 9))
    gm = mq.capture(model, (ids[:, :-1], ids[:, 1:]))
    a, b = torch.randint(50, (3, 7)), torch.randint(50, (3, 7))
    torch.testing.assert_close(gm(a, b), model(a, b))
    data = [(torch.randint(50, (4, 9))[:, :-1], torch.randint(50, (4, 9))[:, 1:]) for _ in range(3)]
    result = mq.quantize(model, calibration_data=data, num_calibration_samples=6, group_size=16, skip_param_threshold=0)
    assert mq.sqnr_db(model(a, b), result.graph_module(a, b)) > 10
