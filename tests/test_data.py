"""Batches: from what users hand over to the values of a graph's placeholders."""

import collections

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import fx, nn
from torch.utils.data import DataLoader, TensorDataset

import mono_quant_fx as mq
from mono_quant_fx.execution.batch import Batch, leaves, to_batch
from mono_quant_fx.execution.collection import collect
from mono_quant_fx.execution.run import run_batch
from tests.capture_models import OneLinear, Out, r
from tests.models import MLP

pytestmark = pytest.mark.filterwarnings("ignore:capture. the model fixes")
METHODS = pytest.mark.parametrize("method", ["symbolic", "export"])
Pair = collections.namedtuple("Pair", ["a", "b"])
ROWWISE = fx.symbolic_trace(nn.Tanh())


class Difference(OneLinear):
    """Not symmetric in anything, so that no mix-up goes unseen."""

    def forward(self, a, b, c=None):
        y = self.fc(a) - 2 * b
        return y if c is None else y + 3 * c


class OfDict(OneLinear):
    def forward(self, d):
        return self.fc(d["a"]) - 2 * d["b"][0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 3), "(float32[2, 3])"),
        ((torch.zeros(2), torch.zeros(1, dtype=torch.long)), "(float32[2], int64[1])"),
        ([torch.zeros(2), None], "(float32[2], NoneType)"),
        (Pair(torch.zeros(2), 3), "(float32[2], int)"),
        ({"x": torch.zeros(2)}, "(x=float32[2])"),
        (collections.UserDict(x=torch.zeros(2)), "(x=float32[2])"),
        (collections.OrderedDict(x=(torch.zeros(2), [True])), "(x=(float32[2], [bool]))"),
        (({"k": torch.zeros(2, dtype=torch.bool)},), "({k: bool[2]})"),
        (Batch((), {"y": torch.zeros(())}), "(y=float32[])"),
    ],
)
def test_what_becomes_positional_and_what_a_keyword(value, text):
    assert str(to_batch(value)) == text


def test_prepare_batch_comes_first():
    batch = to_batch((torch.zeros(2, 3), torch.zeros(2)), lambda b: {"x": b[0]})
    assert str(batch) == "(x=float32[2, 3])"


@settings(deadline=None, derandomize=True, max_examples=100)
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6), limit=st.integers(1, 12))
def test_the_first_samples_in_order_the_last_batch_cut_and_no_batch_more_than_needed(sizes, limit):
    whole = torch.arange(sum(sizes), dtype=torch.float32)
    asked = []

    def data():
        for i, part in enumerate(whole.split(sizes)):
            asked.append(i)
            yield part.unsqueeze(1)

    if not sum(sizes):
        with pytest.raises(mq.CalibrationError, match="calibration_data is empty"):
            collect(data(), limit)
        return
    batches, taken = collect(data(), limit, gm=ROWWISE)
    values = torch.cat([batch.args[0] for batch in batches])[:, 0]
    assert torch.equal(values, whole[:limit])
    assert taken == len(values) == min(limit, sum(sizes))
    needed = next((i for i in range(len(sizes)) if sum(sizes[: i + 1]) >= limit), len(sizes) - 1)
    assert asked == list(range(needed + 1))


def test_every_tensor_with_the_sample_dimension_is_cut_and_no_other():
    batch = Batch((torch.zeros(4, 2), torch.zeros(3, 3)), {"y": (torch.zeros(4), 7), "s": torch.zeros(())})
    assert str(batch.rows(0, 3)) == "(float32[3, 2], float32[3, 3], y=(float32[3], int), s=float32[])"
    assert str(batch) == "(float32[4, 2], float32[3, 3], y=(float32[4], int), s=float32[])"


def test_doubling_repeats_the_one_sample_wherever_it_stands():
    doubled = Batch((torch.arange(3.0).unsqueeze(0), torch.zeros(5, 5)), {"s": torch.zeros(())}).doubled()
    assert doubled.args[0].tolist() == [[0.0, 1.0, 2.0]] * 2
    assert str(doubled) == "(float32[2, 3], float32[5, 5], s=float32[])"
    assert Batch((torch.zeros(2, 3),)).doubled() is None
    assert Batch((3,)).doubled() is None


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (torch.zeros(4, 64), "calibration_data is a Tensor: an iterable of batches is needed; write \\[batch\\]"),
        ({"x": torch.zeros(4, 64)}, "calibration_data is a dict: an iterable of batches is needed"),
        ("data.csv", "calibration_data is a str: an iterable"),
        (7, "calibration_data is a int: an iterable"),
        ([], "calibration_data is empty: give at least one batch, or leave it out"),
        (iter(()), "calibration_data is empty"),
        ([torch.zeros(0, 64)], "calibration_data is empty"),
        ([(torch.zeros(2, 64), 1)], r"batch 0 \(float32\[2, 64\], int\) does not fit forward\(x\)"),
        ([torch.zeros(2, 64), {"y": torch.zeros(2, 64)}], r"batch 1 \(y=float32\[2, 64\]\) does not fit forward\(x\)"),
    ],
)
def test_what_is_no_calibration_data_is_said(data, words):
    with pytest.raises(mq.CalibrationError, match=words):
        mq.quantize(MLP().eval(), calibration_data=data, group_size=32)


def test_a_loader_of_inputs_and_labels_is_answered_with_both_signatures_and_prepare_batch():
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.randn(10, 64), torch.arange(10)), batch_size=4)
    said = (
        r"batch 0 \(float32\[4, 64\], int64\[4\]\) does not fit forward\(x\): too many positional arguments; "
        r"pass prepare_batch=, a callable .*, e.g. prepare_batch=lambda b: b\[0\]"
    )
    with pytest.raises(mq.CalibrationError, match=said):
        mq.quantize(MLP().eval(), calibration_data=loader, group_size=32)
    result = mq.quantize(
        MLP().eval(), calibration_data=loader, prepare_batch=lambda b: b[0], group_size=32, num_calibration_samples=7
    )
    assert result.info.calibration_samples_used == 7


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda b: b["x"], r"prepare_batch fails on batch 0 float32\[2, 64\]: (IndexError|TypeError): "),
        (3, "prepare_batch=3 is no callable; write e.g. lambda b: b\\[0\\]"),
    ],
)
def test_a_prepare_batch_that_fails_is_said(prepare, words):
    with pytest.raises(mq.CalibrationError, match=words):
        mq.quantize(MLP().eval(), calibration_data=[torch.randn(2, 64)], prepare_batch=prepare, group_size=32)


def test_an_error_inside_the_users_generator_stays_the_users():
    with pytest.raises(ZeroDivisionError):
        mq.quantize(MLP().eval(), calibration_data=(1 / 0 for _ in range(2)), group_size=32)


@METHODS
@pytest.mark.parametrize("give", ["keywords", "positional", "mixed"])
def test_arguments_find_their_places_however_they_are_given(method, give):
    model = Difference().eval()
    gm = mq.capture(model, {"b": r(2, 3), "a": r(2, 3)}, method=method)
    a, b = r(4, 5), r(4, 5)
    batch = {"keywords": {"b": b, "a": a}, "positional": (a, b), "mixed": Batch((a,), {"b": b})}[give]
    (actual,) = leaves(run_batch(gm, to_batch(batch)))
    torch.testing.assert_close(actual, model(a, b))


@METHODS
def test_nested_keys_in_another_order_are_no_mix_up(method):
    model = OfDict().eval()
    gm = mq.capture(model, ({"b": (r(2, 3),), "a": r(2, 3)},), method=method)
    a, b = r(4, 5), (r(4, 5),)
    (actual,) = leaves(run_batch(gm, to_batch(({"a": a, "b": b},))))
    torch.testing.assert_close(actual, model({"a": a, "b": b}))


@METHODS
@pytest.mark.parametrize("batch", [{"a": 1}, {"a": 1, "b": 1, "z": 1}, {"a": 1, "b": 1, "c": 1}, (1,), (1, 1, 1)])
def test_missing_and_extra_arguments_show_both_signatures(method, batch):
    gm = mq.capture(Difference().eval(), (r(2, 3), r(2, 3)), method=method)
    values = {k: r(2, 3) for k in batch} if isinstance(batch, dict) else tuple(r(2, 3) for _ in batch)
    with pytest.raises(mq.CalibrationError, match=r"a batch \(.*float32\[2, 3, 32\].* does not fit forward\(a, b\): "):
        to_batch(values).bind(gm)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": 1}, "expected 2, but got 1"),
        ({"a": 1, "b": (1,), "c": 1}, "expected 2, but got 3"),
        ({"a": 1, "z": (1,)}, r"missing key\(s\): {'b'}; extra key\(s\): {'z'}"),
        ({"a": 1, "b": [1]}, "expected <class 'tuple'>, but got <class 'list'>"),
        ({"a": 1, "b": (1, 1)}, "expected 1, but got 2"),
        ({"a": (1,), "b": (1,)}, "a tuple stands where the example had a single value"),
        ((1, 1), "expected <class 'dict'>, but got <class 'tuple'>"),
    ],
)
def test_another_nesting_than_the_examples_is_an_error(value, words):
    gm = mq.capture(OfDict().eval(), ({"a": r(2, 3), "b": (r(2, 3),)},), method="export")
    tensors = torch.utils._pytree.tree_map(lambda _: r(2, 3), value)
    with pytest.raises(mq.CalibrationError, match=f"does not have the example's structure: .*{words}"):
        to_batch((tensors,)).bind(gm)


def test_outputs_of_plain_dataclasses_are_looked_into():
    one, two = torch.zeros(1), torch.zeros(2)
    assert [id(v) for v in leaves({"o": Out(one, (two, 3)), "n": None})][:2] == [id(one), id(two)]
    assert leaves(Out) == [Out]


def test_names_are_those_of_forward():
    class Model(nn.Module):
        def forward(self, a, b=None, *, c=None, **rest):
            return a

    assert Batch((1,), {"z": 3, "c": 2}).names(Model()) == ["a", "c", "z"]
    assert list(Batch((1,), {"z": 3, "c": 2, "b": 0}).in_order(Model()).kwargs) == ["b", "c", "z"]
