"""Data: no sample goes unused in silence, no axis is cut that is not the batch's, and errors name the right batch."""

import pytest
import torch
from torch import nn

import mono_quant_fx as mq
from tests.models import MLP

NAN = float("nan")


class Masked(MLP):
    """[B, T, 64] with a mask [T, T] that is added to what T attends to."""

    def forward(self, x, mask):
        scores = (x @ x.transpose(-1, -2)) / 8 + mask
        return super().forward(torch.softmax(scores, -1) @ x)


class Looked(MLP):
    """Rows of a table that comes with each call."""

    def forward(self, ids, table):
        return super().forward(table[ids])


class TestCalibrationDataCutInSilence:
    """1,000 samples given, 150 used, no word; nine unbatched vectors of 64 features were cut to 22 features."""

    @pytest.mark.parametrize("size", [10, 100])
    def test_how_much_was_used_is_said(self, size):
        data = [torch.randn(size, 64) for _ in range(1000 // size)]
        result = mq.quantize(MLP().eval(), calibration_data=data, group_size=32)
        assert result.info.calibration_samples_used == 150
        assert any("150 of 1,000 samples used" in w for w in result.warnings)

    def test_it_is_a_warning_that_is_issued(self):
        with pytest.warns(mq.AccuracyWarning, match="8 of 40 samples used"):
            mq.quantize(MLP().eval(), calibration_data=[torch.randn(40, 64)], num_calibration_samples=8, group_size=32)

    def test_of_data_without_a_length_it_is_said_that_not_all_was_read(self):
        def endless():
            while True:
                yield torch.randn(10, 64)

        result = mq.quantize(MLP().eval(), calibration_data=endless(), num_calibration_samples=20, group_size=32)
        assert (result.info.calibration_samples_used, result.info.evaluation_samples) == (20, 20)
        assert any("20 samples used; only 4 batches were read" in w for w in result.warnings)

    def test_data_that_is_used_whole_is_no_warning(self):
        result = mq.quantize(MLP().eval(), calibration_data=[torch.randn(10, 64) for _ in range(5)], group_size=32)
        assert "samples used" not in " ".join(result.warnings)

    def test_unbatched_vectors_are_not_cut(self):
        data = [torch.randn(64) for _ in range(9)]
        result = mq.quantize(MLP().eval(), calibration_data=data, group_size=32)
        assert result.info.calibration_samples_used == 192 and result.info.measured_on == "held-out data"
        assert any("not certainly the batch's" in w for w in result.warnings)

    def test_a_mask_of_equal_first_size_is_not_cut(self):
        batch = (torch.randn(8, 8, 64), torch.randn(8, 8))
        result = mq.quantize(Masked().eval(), calibration_data=[batch], num_calibration_samples=5, group_size=32)
        assert (result.info.calibration_samples_used, result.info.measured_on) == (8, "calibration data")

    def test_a_table_of_equal_first_size_is_not_cut(self):
        batch = (torch.arange(8).flip(0), torch.randn(8, 64))
        result = mq.quantize(Looked().eval(), calibration_data=[batch], num_calibration_samples=5, group_size=32)
        assert result.info.calibration_samples_used == 8

    def test_passes_and_the_table_cut_as_quantize_does(self):
        gm, vectors = mq.capture(MLP().eval()), [torch.randn(64) for _ in range(9)]
        out = mq.default_pipeline(mq.QuantConfig(group_size=32, bias_correction=True), vectors)(gm).graph_module
        assert mq.measure_accuracy(gm, out, vectors, num_samples=150).samples == 192
        assert mq.measure_accuracy(gm, out, [torch.randn(200, 64)], num_samples=150).samples == 150


class TestALoaderThatReusesOneBuffer:
    """Every batch was silently the last one."""

    @pytest.mark.parametrize("where", ["loader", "prepare_batch"])
    def test_each_batch_is_what_it_was_when_it_came(self, where):
        buffer, batches = torch.empty(8, 64), [torch.randn(8, 64) * (i + 1) for i in range(5)]

        def filled(x):
            return buffer.copy_(x)

        if where == "loader":
            given = {"calibration_data": (filled(x) for x in batches)}
        else:
            given = {"calibration_data": batches, "prepare_batch": filled}
        model = MLP().eval()
        result = mq.quantize(model, group_size=32, accuracy_warning="ignore", **given)
        expected = mq.quantize(model, calibration_data=batches, group_size=32, accuracy_warning="ignore")
        assert result.accuracy == expected.accuracy


class TestTheNumberOfABatch:
    """After an empty batch there were two counters, and errors named the wrong one."""

    DATA = (torch.randn(0, 64), torch.randn(4, 64), torch.randn(0, 64))

    @pytest.mark.parametrize("options", [{}, {"algorithm": "rtn"}, {"activations": "int8"}, {"bias_correction": True}])
    def test_nan_names_the_batch_the_range_and_what_to_do(self, options):
        bad = torch.randn(4, 64)
        bad[1, 2] = NAN
        data = [*self.DATA, bad, torch.randn(4, 64)]
        with pytest.raises(mq.CalibrationError) as caught:
            mq.quantize(MLP().eval(), calibration_data=data, group_size=32, **options)
        said = str(caught.value)
        assert said.startswith("batch 3: ") and "NaN" in said
        assert "mask such values" in said and "drop the batch" in said
        assert "[4, 64], 1 NaN or infinite, finite ones in -" in said

    @pytest.mark.parametrize("held_out", [False, True])
    def test_a_batch_that_does_not_fit_is_named_wherever_it_is_used(self, held_out):
        wrong, right = torch.randn(4, 63), torch.randn(4, 64)
        data = [*self.DATA, *([right, wrong] if held_out else [wrong, right])]
        place = 4 if held_out else 3
        with pytest.raises(mq.CalibrationError, match=f"batch {place} fails at node 'linear'"):
            mq.quantize(MLP().eval(), calibration_data=data, group_size=32)

    def test_bisect_names_it_too(self):
        gm = mq.capture(nn.Sequential(nn.Linear(64, 32)).eval())
        with pytest.raises(mq.CalibrationError, match="batch 3 fails at node 'linear'"):
            mq.bisect(mq.default_pipeline(mq.QuantConfig(group_size=32)), gm, [*self.DATA, torch.randn(4, 63)], 20.0)
