"""Uses of a weight that are dead, that no data reaches, that have no batch, or that are no matrix product at all.

Each section is a kind of fault; its docstrings tell what went wrong.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.graph.annotation import annotated, set_annotation
from mono_quant_fx.graph.weight_ops import find_weights

pytestmark = pytest.mark.filterwarnings("ignore:capture. the model fixes", "ignore:INT8 activations run")
BY_METHOD = pytest.mark.parametrize("method", ["symbolic", "export"])
ALL = {"group_size": 16, "skip_param_threshold": 0, "accuracy_warning": "ignore"}
#: dB that 8 bits reach on random weights and inputs.
LEAST_INT8_DB = 30.0
#: Settings under which every pass runs.
SETTINGS = (
    {},
    {"calibration": True, "algorithm": "gptq"},
    {"calibration": True, "activations": "int8", "bits": 8, "bias_correction": True},
    {"calibration": True, "activations": "int8", "algorithm": "gptq", "bias_correction": True},
)


def quantized(gm, x, calibration=False, **fields):
    data = [x] if calibration else None
    return mq.quantize(gm, calibration_data=data, evaluation_data=data, **{**ALL, **fields})


def db(gm, result, x):
    return mq.sqnr_db(gm(x), result.graph_module(x))


# --- uses that are dead, and annotations that outlive their nodes -----------------------------------------------------


class Dead(nn.Module):
    """A weight with a use that counts and another whose result nothing reads, before it or after it."""

    def __init__(self, first):
        super().__init__()
        self.a, self.b, self.first = nn.Linear(32, 32), nn.Linear(32, 32), first

    def forward(self, x):
        if self.first:
            extra = self.b(x)
        h = torch.tanh(self.a(x))
        y = self.b(h)
        if not self.first:
            extra = self.b(y)  # noqa: F841
        return y


@BY_METHOD
@pytest.mark.parametrize("fields", SETTINGS, ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_a_dead_use_of_a_shared_weight_does_not_count(first, fields, method):
    """KeyError 'linear_1': the annotation named an op that dead-code elimination had taken out."""
    x = torch.randn(16, 32)
    gm = mq.capture(Dead(first).eval(), x, method=method)
    result = quantized(gm, x, **fields)
    assert db(gm, result, x) > (LEAST_INT8_DB if fields.get("bits") == 8 else 12)
    assert [row.weight for row in result.accuracy.rows] == ["a.weight", "b.weight"]
    assert all(use.node in {n.name for n in result.graph_module.graph.nodes}
               for _, a in annotated(result.graph_module) for use in a.users)  # fmt: skip


def test_a_dead_head_does_not_decide_for_the_weight_it_shares():
    """A tied lm_head whose logits nobody reads is no reason to keep the other uses float."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.lm_head = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
            self.lm_head.weight = self.fc.weight

        def forward(self, x):
            h = self.fc(x)
            logits = self.lm_head(h)  # noqa: F841
            return h

    for method in ("symbolic", "export"):
        x = torch.randn(4, 32)
        (row,) = quantized(mq.capture(Tied().eval(), x, method=method), x).accuracy.rows
        assert row.scheme == "int4 g16 sym", row.reason


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_an_op_that_is_taken_out_between_passes_takes_its_use_along(fields):
    """Whoever edits a graph between two passes need not know of annotations."""
    fields = dict(fields)
    x, calibration = torch.randn(16, 32), fields.pop("calibration", False)
    gm = mq.capture(Dead(True).eval(), x, method="symbolic")
    pipeline = mq.default_pipeline(mq.QuantConfig(**{**ALL, **fields}), [x] if calibration else None)
    for at, pass_ in enumerate(pipeline.passes):
        gm = pass_(gm).graph_module
        for node, annotation in list(annotated(gm)):
            ghost = replace(annotation.users[0], node=f"gone_{at}")
            set_annotation(node, replace(annotation, users=(ghost, *annotation.users)))
    assert gm(x).shape == x.shape


# --- convolutions without a batch, and paddings in words --------------------------------------------------------------

CONVS = {
    "conv1d": (lambda: nn.Conv1d(16, 8, 3, padding=1), (16, 9)),
    "conv1d same": (lambda: nn.Conv1d(16, 8, 4, padding="same", dilation=2), (16, 9)),
    "conv1d valid": (lambda: nn.Conv1d(16, 8, 3, padding="valid", stride=2), (16, 9)),
    "conv2d same": (lambda: nn.Conv2d(16, 8, (3, 2), padding="same"), (16, 7, 6)),
    "conv2d reflect": (lambda: nn.Conv2d(16, 8, 3, padding=1, padding_mode="reflect"), (16, 7, 6)),
    "conv3d groups": (lambda: nn.Conv3d(32, 8, 2, groups=2), (32, 4, 4, 4)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(16, 8, 3, stride=2, output_padding=1), (16, 9)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(32, 8, 3, groups=2, padding=1), (32, 5, 4)),
}  # fmt: skip


@pytest.mark.parametrize("fields", SETTINGS[1:], ids=str)
@pytest.mark.parametrize("is_batch", [False, True])
@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_works_with_or_without_a_batch(name, is_batch, fields):
    """Conv1d on [C, L]: IndexError, "permute(sparse_coo)", or a zip that failed. padding="same": rtn in silence."""
    make, size = CONVS[name]
    x = torch.randn(3, *size) if is_batch else torch.randn(size)
    gm = mq.capture(make().eval(), x, method="symbolic")
    result = quantized(gm, (x,), **fields)
    (row,) = result.accuracy.rows
    assert row.algorithm == fields.get("algorithm", "rtn") and "rtn" not in row.reason
    assert db(gm, result, x) > (LEAST_INT8_DB if fields.get("bits") == 8 else 15)


def test_every_consumer_without_a_matrix_says_why_it_is_rounded_plainly():
    """An embedding's or a bilinear form's row said "rtn" where GPTQ was asked for, and no more."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.bi, self.fc = nn.Embedding(20, 32), nn.Bilinear(16, 16, 8), nn.Linear(8, 8)

        def forward(self, ids):
            e = self.emb(ids)
            return self.fc(self.bi(e[:, :16], e[:, 16:]))

    ids = torch.randint(0, 20, (30,))
    gm = mq.capture(Both().eval(), ids, method="symbolic")
    result = quantized(gm, ids, calibration=True, algorithm="gptq", default_skips=False)
    reasons = {row.module: (row.algorithm, row.reason) for row in result.accuracy.rows}
    for module in ("emb", "bi"):
        algorithm, reason = reasons[module]
        assert algorithm == "rtn" and "rtn, not gptq: " in reason and "multiplies its rows with nothing" in reason


def test_a_window_that_is_computed_is_a_reason():
    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 16, 3) / 7)

        def forward(self, x):
            return F.conv1d(x, self.w, padding=x.shape[2] // 4)

    x = torch.randn(2, 16, 9)
    gm = mq.capture(Computed().eval(), x, method="symbolic")
    result = quantized(gm, x, calibration=True, algorithm="gptq")
    assert result.accuracy.rows[0].reason == "rtn, not gptq: the window of conv1d is itself computed"


# --- inputs that no data reaches --------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Sends rows with a positive first value to one linear, and the others to another."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        up, down = x[:, 0] > 0, x[:, 0] <= 0
        y = torch.index_put(torch.zeros_like(x), (up,), self.a(x[up]))
        return torch.index_put(y, (down,), self.b(x[down]))


@pytest.mark.parametrize("observer", ["minmax", "histogram", "moving_average_minmax", "percentile", "auto"])
@pytest.mark.parametrize("fields", SETTINGS[1:], ids=str)
def test_an_expert_without_tokens_stays_as_it_is_with_a_reason(fields, observer):
    """INT8 activations: ConfigError "the observer has seen no data yet; run calibration first"."""
    if observer != "minmax" and fields != SETTINGS[2]:
        pytest.skip("each observer once")
    x = torch.randn(24, 32)
    seen = x.clone()
    seen[:, 0] = seen[:, 0].abs() + 0.1
    gm = mq.capture(Experts().eval(), seen, method="symbolic")
    result = quantized(gm, seen, observer=observer, **fields)
    a, b = result.accuracy.rows
    assert db(gm, result, x) > (LEAST_INT8_DB if fields.get("bits") == 8 else 15)
    assert a.activations == ("int8 asym" if "activations" in fields else "")
    assert b.activations == "" and "no calibration data reached" in b.reason
    assert b.algorithm == "rtn" and b.input_range is None
    if fields.get("algorithm") == "gptq":
        assert a.algorithm == "gptq" and "rtn, not gptq: no calibration data reached it" in b.reason
    if fields.get("bias_correction"):
        assert "bias not corrected: no calibration data reached it" in b.reason


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
@pytest.mark.parametrize(("make", "size"), [(lambda: nn.Linear(32, 32), (32,)), (lambda: nn.Conv1d(16, 8, 3), (16, 9))])
def test_an_op_takes_a_batch_of_nothing(make, size, fields):
    """An expert's input may be empty at any call."""
    x = torch.randn(4, *size)
    model = make().eval()
    result = quantized(mq.capture(model, x, method="symbolic"), x, **fields)
    assert result.graph_module(x[:0]).shape == model(x[:0]).shape


def test_inputs_that_are_all_zero_are_a_reason():
    x = torch.zeros(8, 32)
    gm = mq.capture(nn.Linear(32, 32).eval(), x)
    (row,) = quantized(gm, x, calibration=True, algorithm="gptq").accuracy.rows
    assert row.reason == "rtn, not gptq: its inputs are zero in all of the calibration data"


# --- norms that a model writes out ------------------------------------------------------------------------------------


def llama(w, x):
    x = x.to(torch.float32)
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(torch.float32)


NORMS = {
    "llama": (llama, "RMSNorm"),
    "gemma": (lambda w, x: (x * (x.square().mean(-1, True) + 1e-6).pow(-0.5)) * (1.0 + w.float()), "RMSNorm"),
    "square root": (lambda w, x: x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + 1e-6) * w, "RMSNorm"),
    "sum": (lambda w, x: x / (x.pow(2).sum(-1, keepdim=True) / 32).sqrt() * w, "RMSNorm"),
    "norm": (lambda w, x: x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6) * 5.6 * w, "RMSNorm"),
    "normalize": (lambda w, x: F.normalize(x, dim=-1) * 5.6 * w, "RMSNorm"),
    "layer norm": (lambda w, x: (x - x.mean(-1, True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt() * w, "LayerNorm"),
    "channels": (lambda w, x: w[:, None] * (x[..., None] * (x.pow(2).mean(1) + 1).rsqrt()[:, None, None]), "RMSNorm"),
}  # fmt: skip


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.fc, self.gain, self.norm = nn.Linear(32, 32), nn.Parameter(torch.ones(32)), norm

    def forward(self, x):
        return self.norm(self.gain, self.fc(x))


@BY_METHOD
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_that_is_written_out_is_a_norm(name, method):
    """A llama's rows read "aten.mul.Tensor is no op that takes a quantized weight"."""
    norm, kind = NORMS[name]
    x = torch.randn(8, 32)
    result = quantized(mq.capture(Normed(norm).eval(), x, method=method), x)
    assert {row.weight: row.reason for row in result.accuracy.rows if row.weight == "gain"} == {
        "gain": f"default skip: {kind}"
    }


@BY_METHOD
def test_the_bias_of_a_norm_is_of_the_norm_and_a_scale_is_a_scale(method):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.w, self.b, self.s = nn.Linear(32, 32), *(nn.Parameter(torch.ones(32)) for _ in range(3))

        def forward(self, x):
            x = self.fc(x)
            y = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5) * self.w + self.b
            return x + self.s * y.tanh()

    gm = mq.capture(Mixed().eval(), torch.randn(8, 32), method=method)
    found = {w.name: (w.uses[0].layer_type, w.uses[0].reason) for w in find_weights(gm)}
    assert found["w"] == found["b"] == ("LayerNorm", "LayerNorm is a normalization")
    assert found["s"][1].startswith("a 1-D constant in") and found["s"][1].endswith("has no rows to group")
