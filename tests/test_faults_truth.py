"""The headline is true: what it is measured on, which output it is of, how much of the model it covers, what warns."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.cli import main
from mono_quant_fx.tensor_file import write_tensors
from tests.models import MLP


def batches(count, size=8, features=64, scale=1.0):
    return [torch.randn(size, features) * scale for _ in range(count)]


def pooled_db(model, quantized, data):
    """SQNR over several batches, computed apart from the package's table."""
    signal = noise = 0.0
    with torch.no_grad():
        for x in data:
            a, b = model(x).double(), quantized(x).double()
            signal, noise = signal + a.square().sum(), noise + (a - b).square().sum()
    return float(10 * torch.log10(signal / noise))


class TestAFigureMeasuredOnTheDataItWasFittedTo:
    """GPTQ was judged on its calibration data: with less data the output dB rose while the model got worse."""

    def test_less_data_does_not_look_better_than_it_is(self):
        model = nn.Sequential(nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 8)).eval()
        unseen = torch.randn(256, 256)
        result = mq.quantize(model, calibration_data=batches(4, 10, 256), group_size=32)
        true = mq.sqnr_db(model(unseen), result.graph_module(unseen))
        assert abs(result.info.sqnr_db - true) < 1.5
        assert result.accuracy.measured_on == "held-out data"

    def test_a_fifth_of_the_batches_is_held_out_and_nothing_is_fitted_to_it(self):
        data = batches(10)
        for i in (4, 9):
            data[i] *= 100  # every fifth: seen by an observer, it would be the range
        settings = {"group_size": 32, "activations": "int8", "bias_correction": True}
        model = MLP().eval()
        result = mq.quantize(model, calibration_data=data, **settings)
        table, info = result.accuracy, result.info
        assert max(map(abs, table.rows[0].input_range)) < 10
        assert (
            (table.measured_on, table.samples) == (info.measured_on, info.evaluation_samples) == ("held-out data", 16)
        )
        assert info.calibration_samples_used == 64
        kept = [x for i, x in enumerate(data) if i not in (4, 9)]
        alike = mq.quantize(model, calibration_data=kept, evaluation_data=[data[4], data[9]], **settings)
        for a, b in zip(result.graph_module.parameters(), alike.graph_module.parameters(), strict=True):
            assert torch.equal(a, b)
        assert result.accuracy.rows == alike.accuracy.rows
        assert info.sqnr_db == pytest.approx(pooled_db(model, result.graph_module, [data[4], data[9]]), abs=1e-3)

    def test_evaluation_data_judges_every_figure_and_calibration_keeps_all_of_its_own(self):
        model, data, other = MLP().eval(), batches(3), batches(2, 5, scale=3.0)
        result = mq.quantize(
            model,
            calibration_data=[(x, 0) for x in data],
            evaluation_data=[(x, 1) for x in other],
            prepare_batch=lambda b: b[0],
            group_size=32,
        )
        assert (result.accuracy.measured_on, result.accuracy.samples) == ("evaluation data", 10)
        assert result.info.calibration_samples_used == 24
        assert result.info.sqnr_db == pytest.approx(pooled_db(model, result.graph_module, other), abs=1e-3)
        gm = mq.capture(model)
        assert result.accuracy.rows == mq.measure_accuracy(gm, result.graph_module, other).rows

    def test_evaluation_data_alone_judges_weights_that_no_data_has_rounded(self):
        model, other = MLP().eval(), batches(2)
        result = mq.quantize(model, evaluation_data=other, group_size=32)
        assert (result.info.calibration_samples_used, result.info.evaluation_samples) == (0, 16)
        assert result.info.sqnr_db == pytest.approx(pooled_db(model, result.graph_module, other), abs=1e-3)
        assert {row.algorithm for row in result.accuracy.rows} <= {"", "rtn"}

    @pytest.mark.parametrize("kind", [list, iter])
    def test_what_lies_beyond_the_calibration_samples_is_held_out(self, kind):
        data = batches(9)
        model = MLP().eval()
        result = mq.quantize(model, calibration_data=kind(data), num_calibration_samples=20, group_size=32)
        info = result.info
        assert (info.calibration_samples_used, info.evaluation_samples, info.measured_on) == (20, 20, "held-out data")
        held_out = torch.cat(data)[20:40]
        assert info.sqnr_db == pytest.approx(pooled_db(model, result.graph_module, [held_out]), abs=1e-3)

    @pytest.mark.parametrize("method", ["symbolic", "export"])
    def test_a_single_batch_is_split_along_its_certain_axis(self, method):
        (x,), model = batches(1, 30), MLP().eval()
        gm = mq.capture(model, x, method=method)
        result = mq.quantize(gm, calibration_data=[x], group_size=32)
        info = result.info
        assert (info.calibration_samples_used, info.evaluation_samples, info.measured_on) == (24, 6, "held-out data")
        assert info.sqnr_db == pytest.approx(pooled_db(model, result.graph_module, [x[24:]]), abs=1e-3)

    @pytest.mark.parametrize("data", [torch.randn(1, 64), torch.randn(64)], ids=["one sample", "an unbatched vector"])
    def test_too_little_data_is_said_in_the_last_line_and_in_the_warnings(self, data):
        result = mq.quantize(MLP().eval(), calibration_data=[data], group_size=32)
        assert result.accuracy.measured_on == "calibration data"
        for shown in (str(result.accuracy), result.accuracy.to_markdown()):
            assert "on calibration data" in shown.splitlines()[-1]
        assert any("on calibration data" in w and "evaluation_data" in w for w in result.warnings)

    def test_a_batch_whose_rows_depend_on_each_other_is_not_split(self):
        class Attention(MLP):
            def forward(self, x):
                return super().forward(F.scaled_dot_product_attention(x, x, x))  # [T, D], no batch at all

        result = mq.quantize(Attention().eval(), calibration_data=batches(1, 30), group_size=32)
        assert result.accuracy.measured_on == "calibration data"

    @pytest.mark.parametrize("give", ["the same list", "repeated batches"])
    def test_data_that_was_calibrated_on_is_called_so_whatever_it_was_given_as(self, give):
        data = batches(2)
        given = {"calibration_data": data, "evaluation_data": [x.clone() for x in data]}
        if give == "repeated batches":
            given = {"calibration_data": [data[0], data[0].clone()]}
        result = mq.quantize(MLP().eval(), group_size=32, **given)
        assert result.accuracy.measured_on == "calibration data"
        assert any("on calibration data" in w for w in result.warnings)

    def test_what_was_measured_on_is_everywhere_that_figures_are(self, tmp_path):
        result = mq.quantize(MLP().eval(), calibration_data=batches(10), group_size=32)
        said = "measured on held-out data: 16 samples"
        assert said in str(result.accuracy).splitlines()[-1]
        assert said in result.accuracy.to_html() and "held-out data" in result._repr_html_()
        assert json.loads(result.accuracy.to_json())["total"]["measured_on"] == "held-out data"
        assert result.accuracy.to_csv().splitlines()[1].endswith(",held-out data")
        assert "held-out data" in str(mq.explain(result, "fc1"))
        result.save(tmp_path / "m.safetensors")
        loaded = mq.load(tmp_path / "m.safetensors", MLP().eval())
        assert (loaded.accuracy, loaded.info.measured_on) == (result.accuracy, "held-out data")

    def test_a_table_of_an_older_file_has_no_such_word(self):
        from mono_quant_fx.records import from_plain, to_plain
        from mono_quant_fx.table import AccuracyTable

        table = mq.quantize(MLP().eval(), calibration_data=batches(5), group_size=32).accuracy
        data = to_plain(table)
        for new in ("measured_on", "outputs"):
            del data[new]
        old = from_plain(AccuracyTable, data, "table")
        assert old.measured_on is None and old.rows == table.rows
        assert "measured on" not in str(old)

    def test_the_command_line_judges_on_the_evaluation_file(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "their.py").write_text("from tests.models import MLP\n")
        model, x, other = MLP().eval(), *batches(2, 40)
        write_tensors("m.safetensors", model.state_dict())
        write_tensors("x.safetensors", {"x": x})
        write_tensors("y.safetensors", {"x": other * 0.01})
        command = ["quantize", "m.safetensors", "--model", "their:MLP", "--out", "q.safetensors", "--group-size", "32"]
        assert main([*command, "--calibration", "x.safetensors", "--evaluation-data", "y.safetensors"]) == 0
        assert "measured on evaluation data: 40 samples" in capsys.readouterr().out
        quantized = mq.load("q.safetensors", model)
        true = pooled_db(model, quantized.graph_module, [other * 0.01])
        assert quantized.info.sqnr_db == pytest.approx(true, abs=1e-3)
        over = ["--evaluation-data", "y.safetensors", "--fail-below-db", f"{true + 0.1}"]
        assert main([*command, "--calibration", "x.safetensors", *over]) == 1
