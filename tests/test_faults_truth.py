"""The headline is true: what it is measured on, which output it is of, how much of the model it covers, what warns."""

import json
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.accuracy import judging
from mono_quant_fx.accuracy.row import AccuracyRow
from mono_quant_fx.cli.main import main
from mono_quant_fx.files.reader import write_tensors
from mono_quant_fx.numerics import affine
from mono_quant_fx.numerics.normal_weights import normal_sqnr_db
from tests.models import MLP, hopeless_


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
        from mono_quant_fx.accuracy.table import AccuracyTable
        from mono_quant_fx.files.json_records import from_plain, to_plain

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


@dataclass
class Said:
    head: torch.Tensor
    labels: torch.Tensor
    extra: tuple = ()


class Heads(MLP):
    """Returns its output in many shapes, beside what no weight has touched."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.other = nn.Linear(64, 16)

    def forward(self, x, labels=None):
        y, loud = super().forward(x), 1000.0 * x
        return {
            "tuple": lambda: (y, loud),
            "dict": lambda: {"y": y, "loud": loud},
            "nested": lambda: {"loud": [loud, loud], "heads": (y, self.other(x))},
            "dataclass": lambda: Said(y, loud, (self.other(x),)),
            "loss": lambda: (y.square().mean(), y, labels),
            "classes": lambda: (y.argmax(-1), loud),
            "only a table": lambda: (loud, labels),
        }[self.shape]()


class TestAFigureThatPoolsWhatShouldStandApart:
    """A passthrough of 1000 * x beside a 28 dB head was reported as 97 dB."""

    @pytest.mark.parametrize("method", ["symbolic", "export"])
    @pytest.mark.parametrize(
        ("shape", "names"),
        [
            ("tuple", {"0": True, "1": False}),
            ("dict", {"y": True, "loud": False}),
            ("nested", {"loud.0": False, "loud.1": False, "heads.0": True, "heads.1": True}),
            ("dataclass", {"head": True, "labels": False, "extra.0": True}),
            ("loss", {"0": True, "1": True, "2": False}),
        ],
    )
    def test_one_figure_an_output_and_the_worst_one_that_depends_is_the_headline(self, shape, names, method):
        if (shape, method) == ("dataclass", "export"):
            pytest.skip("torch.export wants to know the class; transformers' own outputs are among the real models")
        model, x = Heads(shape).eval(), torch.randn(40, 64)
        given = [(x, torch.randn(40, 1))]
        gm = mq.capture(model, given[0], method=method)
        table = mq.quantize(gm, evaluation_data=given, group_size=32).accuracy
        assert {figure.name: figure.depends for figure in table.outputs} == names
        worst = min(figure.sqnr_db for figure in table.outputs if figure.depends)
        assert table.output_sqnr_db == worst < 40
        for figure in table.outputs:
            assert f"output {figure}" in str(table)

    def test_the_figure_of_each_output_is_its_own(self):
        model, x = Heads("nested").eval(), torch.randn(40, 64)
        result = mq.quantize(model, evaluation_data=[x[:25], x[25:]], group_size=32)
        found = {figure.name: figure for figure in result.accuracy.outputs}
        a, b = model(x)["heads"], result.graph_module(x)["heads"]
        for i in (0, 1):
            assert found[f"heads.{i}"].sqnr_db == pytest.approx(mq.sqnr_db(a[i], b[i]), abs=1e-3)
            assert found[f"heads.{i}"].max_abs_error == pytest.approx(
                float((a[i] - b[i]).abs().max().detach()), rel=1e-5
            )

    @pytest.mark.parametrize("method", ["symbolic", "export"])
    def test_integers_that_depend_have_an_agreement_and_the_headline_says_why_it_is_none(self, method):
        model, x = Heads("classes").eval(), torch.randn(400, 64)
        gm = mq.capture(model, x, method=method)
        result = mq.quantize(gm, calibration_data=[x[:200]], evaluation_data=[x[200:]], group_size=32)
        classes, loud = result.accuracy.outputs
        share = float((model(x[200:])[0] == result.graph_module(x[200:])[0]).float().mean())
        assert (classes.agreement, classes.sqnr_db, loud.depends) == (pytest.approx(share), None, False)
        assert result.info.sqnr_db is None
        said = str(result)
        assert "no floating-point output depends on a quantized weight" in said
        assert "needs calibration_data" not in said + result._repr_html_()

    def test_a_model_whose_outputs_no_weight_reaches_says_so(self):
        model, x = Heads("only a table").eval(), torch.randn(8, 64)
        result = mq.quantize(model, (x, x), evaluation_data=[(x, x)], group_size=32)
        assert result.info.sqnr_db is None and "no output depends on a quantized weight" in str(result)

    def test_what_is_only_the_size_of_a_tensor_does_not_depend(self):
        class Sized(MLP):
            def forward(self, x):
                y = super().forward(x)
                return y, torch.zeros(y.shape[0]) + x.sum(-1)

        table = mq.quantize(Sized().eval(), evaluation_data=batches(1), group_size=32).accuracy
        assert [figure.depends for figure in table.outputs] == [True, False]

    def test_what_a_weight_reaches_through_a_state_depends(self):
        class Cached(MLP):
            def __init__(self):
                super().__init__()
                self.register_buffer("cache", torch.zeros(8, 16))

            def forward(self, x):
                y = super().forward(x)
                self.cache.copy_(y)
                return x, self.cache + 0

        table = mq.quantize(Cached().eval(), evaluation_data=batches(1), group_size=32).accuracy
        assert [figure.depends for figure in table.outputs] == [False, True]
        assert table.output_sqnr_db < 40


def normal_(model):
    """Weights as trained models have them, and nn.Linear's own are not."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.05)
    return model


class TestADefaultWarningThatAlwaysFires:
    """Every layer of SmolLM2 was "below 20 dB": a normal weight at g128 has 19, whatever the model is worth."""

    def test_normal_weights_are_no_finding(self):
        model = normal_(nn.Sequential(*[nn.Linear(256, 256) for _ in range(6)])).eval()
        result = mq.quantize(model)
        assert [row.status for row in result.accuracy.rows] == ["ok"] * 6
        assert all(row.weight_sqnr_db < 20 for row in result.accuracy.rows)
        assert not [w for w in result.warnings if "20 dB" in w or "Low SQNR" in w]
        (line,) = [w for w in result.warnings if w.startswith("Only weights could be judged")]
        assert "none of the 6" in line

    def test_what_is_unusually_bad_for_its_scheme_is_found_by_name(self):
        model = normal_(nn.Sequential(*[nn.Linear(256, 256) for _ in range(6)])).eval()
        with torch.no_grad():
            model[2].weight.pow_(3)
        hopeless_(model[4])
        result = mq.quantize(model)
        assert [row.status for row in result.accuracy.rows] == ["ok", "ok", "warning", "ok", "critical", "ok"]
        row = result.accuracy.rows[2]
        assert row.weight_sqnr_db < row.normal_sqnr_db - 3
        said = "\n".join(result.warnings)
        assert "2 of the 6" in said and f"2 {row.weight_sqnr_db:.2f} dB where a normal weight has 19" in said

    @pytest.mark.parametrize("scheme", ["int4 g32 sym", "int4 g128 asym", "int4 channel sym", "int8 channel"])
    @pytest.mark.parametrize("columns", [128, 384])
    def test_what_a_normal_weight_has_is_what_sampling_gives(self, scheme, columns):
        weight = torch.randn(512, columns)
        if scheme == "int4 g128 asym":
            weight = weight[:, : columns // 128 * 128]
        found = mq.QuantScheme.parse(scheme)
        sampled = mq.sqnr_db(weight, affine.fake_quantize(weight, found))
        assert normal_sqnr_db(found, columns) == pytest.approx(sampled, abs=0.15)

    def test_with_data_the_local_output_is_judged_whatever_the_weight(self):
        model = normal_(nn.Sequential(nn.Linear(128, 256))).eval()
        x = torch.randn(4000, 4) @ torch.randn(4, 128)  # GPTQ can do well where inputs are alike
        result = mq.quantize(
            model, calibration_data=[x[:2000]], evaluation_data=[x[2000:]], num_calibration_samples=2000
        )
        (row,) = result.accuracy.rows
        assert row.weight_sqnr_db < 20 < row.local_sqnr_db and row.status in ("ok", "good")
        assert not [w for w in result.warnings if "nodes" in w]

    def test_the_accumulated_output_is_judged_where_it_first_falls_and_not_again(self):
        rows = [
            AccuracyRow(
                f"n{i}", "linear", f"m{i}", f"w{i}", "int4 g128 sym", "", (8, 8), 256, 32, 19.0, local, accumulated
            )
            for i, (local, accumulated) in enumerate(
                [(31, 31), (25, 22), (25, 19), (25, 18), (15, 14), (31, 9), (25, 8)]
            )
        ]
        found = judging.verdicts(rows, 20.0, 10.0)
        assert [v.status for v in found] == ["good", "ok", "warning", "ok", "warning", "critical", "ok"]
        assert [v.remark for v in found] == ["", "", "accumulated", "", "", "accumulated", ""]

    def test_error_mode_stops_at_a_critical_output_and_at_a_hopeless_weight(self):
        model = normal_(nn.Sequential(nn.Linear(256, 256))).eval()
        mq.quantize(model, accuracy_warning="error")
        with torch.no_grad():
            hopeless_(model)
        with pytest.raises(
            mq.AccuracyError, match=r"CRITICAL: far too noisy: 1 of 1 nodes below 10 dB, and 3 dB or more"
        ):
            mq.quantize(model, accuracy_warning="error")
