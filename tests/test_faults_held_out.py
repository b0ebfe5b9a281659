"""Faults of what judges: figures of data that calibration has seen after all, of next to no data, or of two outputs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mono_quant_fx as mq
from tests.models import MLP


def quantize(data, **more):
    return mq.quantize(MLP().eval(), calibration_data=data, group_size=32, accuracy_warning="ignore", **more)


@pytest.mark.parametrize(
    ("sizes", "calibrated", "judged"),
    [
        ((32, 32), 52, 12),  # half of the data was held out
        ((1, 100), 81, 20),  # a single sample was calibrated on
        ((128, 1), 104, 25),  # the last batch of a loader, and all that judged
        ((32, 32, 32, 32, 2), 96, 34),
        ((50, 50, 50, 1), 121, 30),  # one sample past the 150 of num_calibration_samples
        ((30,) * 6, 150, 30),
        ((40,) * 5, 150, 50),
    ],
)
def test_about_a_fifth_of_the_samples_judges_whatever_the_batches(sizes, calibrated, judged):
    """Two batches held out half; a small last batch, or one sample past the limit, judged alone."""
    info = quantize([torch.randn(size, 64) for size in sizes]).info
    assert (info.calibration_samples_used, info.evaluation_samples) == (calibrated, judged)
    assert info.measured_on == "held-out data"


SEEN = torch.randn(30, 64, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(
    "given",
    [
        {"calibration_data": [SEEN.repeat(5, 1)]},
        {"calibration_data": list(SEEN.repeat(10, 1).split(25))},
        {"calibration_data": [SEEN], "evaluation_data": [SEEN[:7]]},
        {"calibration_data": [SEEN], "evaluation_data": list(SEEN.flip(0).split(4))},
        {"calibration_data": list(SEEN.split(1)), "evaluation_data": [SEEN]},
    ],
    ids=["one batch of repeats", "a loader that goes round", "a part", "other batches", "samples in one batch"],
)
def test_a_sample_that_was_calibrated_on_is_no_unseen_one_in_another_batch(given):
    """Only whole batches were compared, and the same samples in other batches passed for unseen."""
    result = mq.quantize(MLP().eval(), **given, group_size=32, accuracy_warning="ignore")
    assert result.accuracy.measured_on == "calibration data"
    assert any("on calibration data" in w for w in result.warnings)


def test_how_many_samples_were_calibrated_on_is_said():
    """A batch of ten seen and ten new samples was all new."""
    result = quantize([SEEN], evaluation_data=[torch.cat([SEEN[:10], torch.randn(10, 64)]), torch.randn(4, 64)])
    assert result.accuracy.measured_on == "evaluation data"
    assert any("10 of the 24 samples of evaluation_data were calibrated on as well" in w for w in result.warnings)


def test_a_token_that_occurs_in_another_text_is_no_sample():
    """Rows of what is not certainly a batch are compared with nothing."""

    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.out = nn.Embedding(10, 64), nn.Linear(64, 8)

        def forward(self, ids):
            return self.out(self.embedding(ids).cumsum(0))

    texts = [torch.randint(0, 10, (40,)) for _ in range(5)]
    result = mq.quantize(Text().eval(), calibration_data=texts, group_size=32, accuracy_warning="ignore")
    assert result.accuracy.measured_on == "held-out data"


def test_samples_of_any_kind_are_told_apart():
    """Dicts of several types, bfloat16 and empty tensors, and what is no tensor."""

    class Odd(MLP):
        def forward(self, x, mask, more, scale):
            return super().forward(x.float() * mask.real * scale) + more.sum()

    def batch(x):
        mask = torch.ones(len(x), 64, dtype=torch.complex64).conj()
        return {"x": x.bfloat16(), "mask": mask, "more": torch.zeros(len(x), 0), "scale": 2.0}

    for again, expected in ((SEEN[20:], "calibration data"), (-SEEN, "evaluation data")):
        model, given = Odd().eval(), [batch(SEEN)]
        result = mq.quantize(
            model, calibration_data=given, evaluation_data=[batch(again)], group_size=32, accuracy_warning="ignore"
        )
        assert result.accuracy.measured_on == expected


@pytest.mark.parametrize("method", ["symbolic", "export"])
def test_outputs_of_one_name_have_figures_of_their_own(method):
    """The keys 1 and "1", or "a.b" and b inside of a, were one output: 100 dB for a head of 16."""

    class Named(MLP):
        def forward(self, x):
            return {"a": {"b": super().forward(x)}, "a.b": 1000.0 * x}

    model, data = Named().eval(), [torch.randn(20, 64)]
    gm = mq.capture(model, data[0], method=method)
    table = mq.quantize(gm, evaluation_data=data, group_size=32, accuracy_warning="ignore").accuracy
    assert [(figure.name, figure.depends) for figure in table.outputs] == [("a.b", True), ("a.b#2", False)]
    assert table.output_sqnr_db < 40


@pytest.mark.parametrize("method", ["symbolic", "export"])
def test_each_batch_is_judged_with_the_state_that_the_model_begins_with(method):
    """What a batch wrote into a buffer was in the figures of the next one: 24.6 dB where 23.1 are true."""

    class Running(MLP):
        def __init__(self):
            super().__init__()
            self.register_buffer("state", torch.zeros(16))

        def forward(self, x):
            y = super().forward(x)
            self.state.add_(y.sum(0) ** 2)
            return y + self.state

    model, data = Running().eval(), [torch.randn(8, 64) for _ in range(3)]
    gm = mq.capture(model, data[0], method=method)
    result = mq.quantize(gm, evaluation_data=data, group_size=32, accuracy_warning="ignore")
    expected = torch.cat([copy.deepcopy(model)(x) for x in data])
    actual = torch.cat([copy.deepcopy(result.graph_module)(x) for x in data])
    assert result.info.sqnr_db == pytest.approx(mq.sqnr_db(expected, actual), abs=1e-3)


@pytest.mark.parametrize("calibrated", [True, False])
def test_samples_that_are_not_numbers_are_no_silent_part_of_the_figures(calibrated):
    """What is NaN in both graphs counts as equal: 21.9 dB, measured on fewer samples than it says."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    good, bad = [torch.randn(8, 64) for _ in range(4)], torch.randn(8, 64)
    bad[0, 0] = float("nan")
    data = {"calibration_data": good} if calibrated else {}
    result = mq.quantize(model, evaluation_data=[*good[:2], bad, bad], group_size=32, **data)
    assert any("2 of 4 batches of the evaluation data hold NaN (the first is batch 2)" in w for w in result.warnings)
