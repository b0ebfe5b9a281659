import pytest
import torch
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.calibration.sequential_rounding import SequentialWalk
from mono_quant_fx.execution.batch import to_batch
from mono_quant_fx.execution.carry import Carry
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.annotation import annotated
from mono_quant_fx.numerics.rounding import RoundingOptions, round_weight
from tests.harness import Snapshot, check_pass
from tests.models import MLP, ConvNet, Reused, TiedLM

CONFIG = mq.QuantConfig(group_size=32, skip_param_threshold=0)
#: Sums of the same float32 terms in another order.
SUM = 1e-4


def annotate(model, config=CONFIG):
    return mq.passes.SkipAnnotation(config)(mq.capture(model.eval())).graph_module


def hessians(model, data, algorithm="clip"):
    """What the walk hands to the rounding of each weight, and what the rounding returned."""
    gm, seen, rounded = annotate(model), {}, {}

    def round_one(node, annotation, hessian, _):
        seen[annotation.weight] = hessian
        matrix = tensors.get_tensor(gm, node).detach()
        rounded[annotation.weight] = round_weight(matrix, annotation.scheme, hessian, RoundingOptions(algorithm))
        return rounded[annotation.weight]

    SequentialWalk(gm, [to_batch(x) for x in data], round_one).run()
    return seen, rounded


def energy(x):
    return x.reshape(-1, x.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def test_an_op_sees_what_the_quantized_ops_before_it_produce():
    model, data = MLP(), [torch.randn(5, 64), torch.randn(3, 64)]
    seen, rounded = hessians(model, data)
    x = torch.cat(data)
    torch.testing.assert_close(seen["fc1.weight"][0], energy(x), rtol=SUM, atol=SUM)
    packed = rounded["fc1.weight"].stored
    weight = torch.ops.mono_quant_fx.dequantize_int4(*packed, 32, 64)
    hidden = torch.relu(nn.functional.linear(x, weight, model.fc1.bias)).detach()
    torch.testing.assert_close(seen["fc2.weight"][0], energy(hidden), rtol=SUM, atol=SUM)
    assert not torch.allclose(seen["fc2.weight"][0], energy(torch.relu(model.fc1(x)).detach()), rtol=SUM, atol=SUM)


def test_a_reused_weight_has_the_inputs_of_all_its_uses_in_float():
    model, x = Reused(), torch.randn(4, 64)
    seen, _ = hessians(model, [x])
    with torch.no_grad():
        y = torch.tanh(model.fc(x))
        z = torch.tanh(model.fc(y))
    torch.testing.assert_close(seen["fc.weight"][0], energy(x) + energy(y) + energy(z), rtol=SUM, atol=SUM)


class Interleaved(nn.Module):
    """Two weights, each used twice, in turns, and a branch that joins later."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        y = torch.tanh(self.b(torch.tanh(self.a(x))))
        return torch.tanh(self.b(torch.tanh(self.a(y)))) + y + x


class BetweenUses(nn.Module):
    """A weight used twice, and in between an op that works in place on a value, and so on a view, from before."""

    def __init__(self, in_place):
        super().__init__()
        self.fc, self.out, self.in_place = nn.Linear(64, 64), nn.Linear(64, 64), in_place

    def forward(self, x):
        y = x + 1
        view, z = y.view(-1, 64), self.fc(y)
        if self.in_place:
            y.add_(z)
        else:
            view = y + z
        return self.out(self.fc(view))


def test_what_works_in_place_between_two_uses_does_so_once():
    torch.manual_seed(0)
    models, x = [BetweenUses(in_place=True), BetweenUses(in_place=False)], torch.randn(32, 64)
    models[1].load_state_dict(models[0].state_dict())
    found, wanted = (hessians(model, [x], "gptq")[0] for model in models)
    assert torch.equal(found["fc.weight"], wanted["fc.weight"])
    assert torch.equal(found["out.weight"], wanted["out.weight"])


def test_an_input_that_does_not_depend_on_the_data_counts_once_a_batch():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)
            self.register_buffer("c", torch.rand(4, 64))

        def forward(self, x):
            return x + self.fc(self.c * 2) + self.fc(x)

    model, data = Constant(), [torch.randn(4, 64), torch.randn(4, 64)]
    seen, _ = hessians(model, data)
    wanted = 2 * energy(2 * model.c) + energy(data[0]) + energy(data[1])
    torch.testing.assert_close(seen["fc.weight"][0], wanted, rtol=SUM, atol=SUM)
    mq.quantize(model.eval(), calibration_data=data, config=CONFIG, activations="int8")


@pytest.mark.parametrize("algorithm", ["clip", "gptq"])
@pytest.mark.parametrize("model", [MLP, ConvNet, Reused, Interleaved])
def test_every_kind_of_graph_is_rounded_better_and_the_contract_holds(model, algorithm):
    gm = mq.passes.ObserverInsertion()(annotate(model())).graph_module
    x = torch.randn(8, 3, 8, 8) if model is ConvNet else torch.randn(64, 64)
    calibrated = check_pass(mq.passes.CalibrationExecution([x], algorithm=algorithm), gm, args=(x,))
    assert all(a.gain_db >= 0 or a.scheme.bits == 8 for _, a in annotated(calibrated) if a.gain_db is not None)
    lowered = check_pass(mq.passes.Int4GroupwiseLowering(), calibrated, args=(x,), tolerance=None)
    assert all(a.stored is None for _, a in annotated(lowered))
    plain = mq.passes.Int4GroupwiseLowering()(mq.passes.CalibrationExecution([x])(gm)).graph_module
    found, rounded = (mq.measure_accuracy(calibrated, r, [x]).output_sqnr_db for r in (lowered, plain))
    if algorithm == "gptq":  # clip takes inputs as uncorrelated, so the model's output may pay for it
        assert found > rounded


def test_quantize_takes_the_algorithm_and_the_table_shows_the_gain():
    model, data = MLP().eval(), [torch.randn(64, 64) @ torch.randn(64, 64)]
    before = Snapshot(model)
    results = {
        a: mq.quantize(model, calibration_data=data, algorithm=a, group_size=32) for a in ("rtn", "clip", "gptq")
    }
    before.check(model)
    db = {a: r.info.sqnr_db for a, r in results.items()}
    assert db["rtn"] < db["gptq"]
    row = results["gptq"].accuracy.rows[0]
    assert (row.algorithm, row.observer) == ("gptq", "minmax")
    assert row.gain_db > 0 and row.int8_gain_db > 0
    assert row.input_range == (data[0][:64].min().item(), data[0][:64].max().item())
    assert "gain dB" in str(results["gptq"].accuracy)
    assert "gain dB" not in str(results["rtn"].accuracy)
    again = mq.quantize(model, calibration_data=data, algorithm="gptq", group_size=32)
    assert again.accuracy.to_json() == results["gptq"].accuracy.to_json()


def test_an_embedding_has_no_hessian_and_is_rounded_plainly():
    config = mq.QuantConfig(group_size=32, skip_param_threshold=0, default_skips=False)
    model = TiedLM().eval()
    model.head = nn.Linear(32, 40, bias=False).eval()
    result = mq.quantize(model, calibration_data=[torch.arange(40).view(4, 10)], config=config, algorithm="gptq")
    assert {r.module: r.algorithm for r in result.accuracy.rows} == {"emb": "rtn", "fc": "gptq", "head": "gptq"}


def test_without_data_the_algorithm_is_refused():
    with pytest.raises(mq.ConfigError, match="algorithm='gptq' needs calibration_data; without data there is 'rtn'"):
        mq.quantize(MLP().eval(), algorithm="gptq")


def test_an_unknown_algorithm_is_refused_by_the_pass_as_well():
    gm = mq.passes.ObserverInsertion()(annotate(MLP())).graph_module
    with pytest.raises(mq.ConfigError, match="algorithm='awq': one of rtn, clip, gptq is needed"):
        mq.passes.CalibrationExecution([torch.randn(4, 64)], algorithm="awq")(gm)


def test_nan_in_an_activation_names_node_and_batch():
    gm = annotate(MLP())
    data = [to_batch(x, number=i) for i, x in enumerate((torch.randn(2, 64), torch.full((2, 64), float("nan"))))]
    with pytest.raises(
        mq.CalibrationError, match=r"batch 1: the input of node 'linear' \(weight 'fc1.weight'\) holds NaN"
    ):
        SequentialWalk(gm, data, lambda *_: None).run()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_calibration_leaves_everything_as_it_was(error):
    model = MLP().eval()
    gm = mq.passes.ObserverInsertion()(annotate(model)).graph_module

    def interrupted():
        yield torch.randn(4, 64)
        raise error

    before = Snapshot(model), Snapshot(gm)
    with pytest.raises((error, mq.PassError)):
        mq.passes.CalibrationExecution(interrupted(), algorithm="gptq")(gm)
    before[0].check(model)
    before[1].check(gm)


def test_only_live_values_are_held(monkeypatch):
    gm = annotate(nn.Sequential(*[m for _ in range(12) for m in (nn.Linear(64, 64), nn.ReLU())]))
    held, put = [], Carry.put

    def counting(self, node, found):
        put(self, node, found)
        held.append(len(self.values))

    monkeypatch.setattr(Carry, "put", counting)
    walk = SequentialWalk(gm, [to_batch(torch.randn(2, 64))], lambda n, a, h, _: round_weight(
        tensors.get_tensor(gm, n).detach(), a.scheme, h, RoundingOptions()))  # fmt: skip
    assert len(walk.run()) == 12
    assert max(held) <= 2
