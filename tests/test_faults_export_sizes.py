"""Which sizes an exported graph leaves free: other batches, equal sizes, a time budget; and the second input."""

import sys
import warnings

import pytest
import torch
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.frontend import export_ways, stopwatch
from mono_quant_fx.frontend.record import get_record
from tests.capture_models import OneLinear, r


def captured(model, example, method="export", **options):
    """The graph, and what capture said."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        gm = mq.capture(model.eval(), example, method=method, **options)
    return gm, [str(w.message) for w in heard if str(w.message).startswith("capture:")]


def assert_same(gm, model, *inputs):
    with torch.no_grad():
        torch.testing.assert_close(gm(*inputs), model(*inputs))


class Patches(nn.Module):
    """As PatchTST: overlapping windows of a series become tokens."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(16, 32)

    def forward(self, x):
        return self.embed(x.unfold(-1, 16, 8)).mean(1)


def test_fewer_dynamic_sizes_where_that_frees_the_batch():
    """`Guard failed: x.size()[0] * (-1 + x.size()[1] // 8) != ...` on a batch of one, without a word before."""
    model = Patches().eval()
    gm, said = captured(model, torch.randn(4, 64))
    assert len(said) == 1 and get_record(gm).dynamic == "batch"
    assert "with every size dynamic the graph refuses other batches (Guard failed: x.size()[0] * " in said[0]
    assert "only the batch is dynamic, every other size stays as in the example" in said[0]
    for batch in (1, 2, 3, 8):
        assert_same(gm, model, torch.randn(batch, 64))
    with pytest.raises(AssertionError, match="Guard failed"):
        gm(torch.randn(4, 72))


class Counts(OneLinear):
    def forward(self, x):
        return torch.stack([self.fc(row) * (i + 1) for i, row in enumerate(x)])


def test_a_batch_that_stays_fixed_is_warned_of():
    gm, said = captured(Counts(), r(4, 5))
    assert said == ["capture: the model fixes x.shape[0] = 4, x.shape[2] = 32; other sizes will be refused"]
    with pytest.raises(AssertionError):
        gm(r(2, 5))


class Banded(OneLinear):
    """Compares two lengths that need not be the same, and does not mind."""

    def forward(self, x, y):
        z = (self.fc(x) @ y.mT).softmax(-1) @ y
        return z if x.shape[1] != y.shape[1] else z + 0


def test_a_size_that_equals_another_in_the_example_and_need_not_is_said():
    model = Banded().eval()
    gm, said = captured(model, (r(4, 6), r(4, 6)))
    assert_same(gm, model, r(3, 5), r(3, 5))
    assert any("the graph refuses (float32[4, 6, 32], float32[4, 3, 32]), which the model takes" in t for t in said)


@pytest.mark.parametrize("method", ["symbolic", "export"])
def test_sizes_that_are_equal_by_chance_stay_apart(method):
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(32, 32)

        def forward(self, x, table):
            return (self.a(x) @ table.t()).softmax(-1)

    model = Table().eval()
    gm, _ = captured(model, (torch.randn(32, 32), torch.randn(32, 32)), method)
    for rows, entries in ((3, 5), (1, 7), (32, 2)):
        assert_same(gm, model, torch.randn(rows, 32), torch.randn(entries, 32))


class Contiguous(OneLinear):
    def forward(self, x):
        return self.fc(x if x.is_contiguous() else x * 2)


def test_a_graph_that_differs_on_a_second_input_is_refused_with_the_difference():
    """Only the example itself was looked at."""
    with pytest.raises(mq.CaptureError) as e:
        mq.capture(Contiguous().eval(), r(4, 5))
    said = str(e.value)
    assert "computes something else than the model on a second input (float32[" in said
    assert "output 0 (float32[4, 5, 32]) agrees to " in said and "the largest difference is " in said


class Remembers(OneLinear):
    """A mask that was made for the length of an earlier call."""

    def __init__(self):
        super().__init__()
        self.mask = torch.arange(7.0)[:, None]

    def forward(self, x):
        if self.mask.shape[0] != x.shape[1]:
            self.mask = torch.arange(float(x.shape[1]))[:, None]
        return self.fc(x) * self.mask


@pytest.mark.parametrize("length", [5, 7])
def test_what_was_made_for_one_length_is_not_used_for_another(length):
    model = Remembers().eval()
    gm, said = captured(model, r(4, length), "auto")
    assert_same(gm, model, r(3, length))
    try:
        actual = gm(r(3, 6))
    except AssertionError:
        assert any(f"x.shape[1] = {length}" in text for text in said)
    else:
        assert actual.shape == (3, 6, 32)


def test_a_model_that_takes_no_other_sizes_is_no_reason_to_refuse():
    class Fixed(OneLinear):
        def forward(self, x):
            assert x.shape == (4, 5, 32), "only this"
            return self.fc(x) if x.dim() == 3 else x

    model = Fixed().eval()
    gm, _ = captured(model, r(4, 5), "auto")
    assert_same(gm, model, r(4, 5))


def test_other_values_stay_valid_ids_and_the_users_random_numbers_go_on():
    class Ids(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(9, 32)

        def forward(self, ids, mask):
            return self.emb(ids) * mask[..., None] if ids.dim() == 2 else ids

    ids, mask = torch.tensor([[8, 0, 3], [1, 8, 8]]), torch.tensor([[True, False, True], [True, True, True]])
    model, state = Ids().eval(), torch.get_rng_state()
    gm, _ = captured(model, (ids, mask), "auto")
    assert torch.equal(torch.get_rng_state(), state)
    assert gm(ids, mask).shape == (2, 3, 32)


@pytest.fixture
def no_time(monkeypatch):
    monkeypatch.setattr(export_ways, "BUDGET_SECONDS", 0.0)


def test_an_export_past_its_budget_keeps_the_batch_dynamic_and_says_so(no_time):
    """106 s of silence on a toy Swin, where an export with the batch alone takes 4.5 s."""
    model = Patches().eval()
    gm, said = captured(model, torch.randn(4, 64))
    assert get_record(gm).dynamic == "batch" and len(said) == 1
    assert "every size dynamic takes more than 0 s: only the batch is dynamic" in said[0]
    for batch in (1, 2, 5):
        assert_same(gm, model, torch.randn(batch, 64))


def test_dynamic_shapes_of_the_users_own_have_no_budget(no_time):
    auto = torch.export.Dim.AUTO
    gm, said = captured(Patches(), torch.randn(4, 64), dynamic_shapes=({0: auto, 1: auto},))
    assert not said
    assert gm(torch.randn(5, 80)).shape == (5, 32)


def test_a_graph_from_a_shortened_search_is_saved_and_loaded_as_it_was(no_time, tmp_path, monkeypatch):
    model = Patches().eval()
    gm, _ = captured(model, torch.randn(4, 64))
    result = mq.quantize(gm, group_size=16, skip_param_threshold=0)
    mq.save(result, tmp_path / "m.safetensors")
    monkeypatch.undo()
    loaded = mq.load(tmp_path / "m.safetensors", Patches().eval()).graph_module
    x = torch.randn(3, 64)
    assert torch.equal(loaded(x), result.graph_module(x))


class Screen:
    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_line_tells_what_takes_long_on_a_terminal_only(monkeypatch, is_terminal):
    screen = Screen()
    screen.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(stopwatch, "QUIET_SECONDS", -1.0)
    with stopwatch.Stopwatch("work", 5.0) as watch:
        watch.shown = -9.0
        torch.ones(1).add(1)
    assert (screen.text.startswith("\rwork: 0 s, at most 5 s") and screen.text.endswith("\n")) == is_terminal
    assert is_terminal or not screen.text


def test_the_stopwatch_stops_work_in_a_call_of_torch_and_leaves_torch_as_it_was():
    with stopwatch.Stopwatch("work", 0.0), pytest.raises(stopwatch.OverBudgetError, match="work takes more than 0 s"):
        torch.ones(1000).sum()
    assert torch.overrides._len_torch_function_stack() == 0
    assert torch.ones(1).add(1) == 2


class Decoding(nn.Module):
    """Its decoder is one opaque module to a symbolic trace, and looks at its mask's values."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True)
        self.decoder, self.out = nn.TransformerDecoder(layer, 1), nn.Linear(32, 32)

    def forward(self, x, memory, mask, is_causal=None):
        return self.out(self.decoder(x, memory, mask, tgt_is_causal=is_causal))


def test_a_mask_whose_values_torch_looks_at_is_answered_with_a_way_out_that_works():
    """The decoder was left whole, ratio 1.04, and nothing said so."""
    model, mask = Decoding().eval(), nn.Transformer.generate_square_subsequent_mask(5)
    fields = {"group_size": 16, "skip_param_threshold": 0, "default_skips": False}
    result = mq.quantize(model, (r(2, 5), r(2, 4), mask), **fields)
    said = " ".join(result.info.warnings)
    assert "return self.out(self.decoder(" in said and "try: say by keyword in the example" in said
    example = {"x": r(2, 5), "memory": r(2, 4), "mask": mask, "is_causal": True}
    result = mq.quantize(model, example, **fields)
    assert "decoder.layers.0.linear1" in result.info.quantized_layers
    assert "by keyword" not in " ".join(result.info.warnings)
