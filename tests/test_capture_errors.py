"""A model that cannot be captured: the user's own line, the reason, what to try, and nothing on the screen."""

import inspect
import math
import sys

import pytest
import torch
from torch import nn

import mono_quant_fx as mq
from tests.capture_models import Args, Attention, Branches, Dataclass, OneLinear, r
from tests.harness import Snapshot
from tests.models import MLP, ConvNet


class Branching(OneLinear):
    def forward(self, x):
        y = self.fc(x)
        if y.sum() > 0:  # the line that stops both
            return y
        return -y


class Numpy(OneLinear):
    def forward(self, x):
        return self.fc(x) * float(x.numpy().mean())


class Raises(OneLinear):
    def forward(self, x):
        raise ValueError("the user's own words\nand more of them")


def line_of(kind, text):
    """file:line of the source line of `kind` that holds `text`."""
    source, first = inspect.getsourcelines(kind)
    return f"{__file__}:{first + next(i for i, line in enumerate(source) if text in line)}"


#: model, the text of the line that stops it, what to try
UNTRACEABLE = {
    "branch": (Branching, "if y.sum()", "replace a Python `if` or `while` on tensor values by torch.where or torch"),
    "numpy": (Numpy, "x.numpy()", "quantize the submodules that can be captured, one by one"),
}


SYMBOLIC, EXPORT = "symbolic tracing", "torch.export"
NEEDS_EXAMPLE = "  try: pass example_inputs (or calibration_data): torch.export needs one batch to run on\n"
NEEDS_AUTO = '  try: method="auto" with example_inputs, so that torch.export can be tried\n'
#: method, whether an example is given, the ways that are tried, and the remedy that follows from that
ASKED = [
    ("auto", True, [SYMBOLIC, EXPORT], ""),
    ("auto", False, [SYMBOLIC], NEEDS_EXAMPLE),
    ("symbolic", True, [SYMBOLIC], NEEDS_AUTO),
    ("symbolic", False, [SYMBOLIC], NEEDS_AUTO),
    ("export", True, [EXPORT], ""),
    ("export", False, [], NEEDS_EXAMPLE),
]


@pytest.mark.parametrize(("method", "example", "ways", "remedy"), ASKED)
@pytest.mark.parametrize("name", UNTRACEABLE)
def test_an_untraceable_model_names_line_reason_and_what_to_try(name, method, example, ways, remedy, capfd):
    kind, text, advice = UNTRACEABLE[name]
    model = kind().eval()
    before, attributes = Snapshot(model), dict(vars(model))
    with pytest.raises(mq.CaptureError) as e:
        mq.capture(model, r(1, 5) if example else None, method=method)
    before.check(model)
    assert vars(model) == attributes
    assert capfd.readouterr() == ("", ""), "nothing is printed"
    said = str(e.value)
    assert said.startswith(f"cannot capture {kind.__name__} as a graph (method={method!r})\n")
    stops = [line for line in said.splitlines() if " stopped at " in line]
    assert [line.strip().partition(" stopped at ")[0] for line in stops] == ways
    assert all(f"{line_of(kind, text)}, in forward: `" in line and text in line for line in stops)
    assert remedy in said
    assert not ways or f"  try: {advice}" in said


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Branching, "TraceError: symbolically traced variables cannot be used as inputs to control flow"),
        (Branching, "GuardOnDataDependentSymNode: Could not guard on data-dependent expression"),
        (Numpy, "TypeError: float() argument must be a string or a real number, not 'WritableProxy'"),
        (Numpy, "RuntimeError: .numpy() is not supported for tensor subclasses"),
    ],
)
def test_the_reasons_of_both_ways_are_given(kind, reason):
    with pytest.raises(mq.CaptureError) as e:
        mq.capture(kind().eval(), r(1, 5))
    assert f"\n    {reason}" in str(e.value)


def test_a_cause_is_kept():
    with pytest.raises(mq.CaptureError) as e:
        mq.capture(Branching().eval(), r(1, 5))
    assert "data-dependent" in str(e.value.__cause__)


CAPTURES = {
    "train mode": (lambda: MLP(), None, r"^MLP: it is in training mode; .*call model\.eval\(\) first$"),
    "a module in train mode": (
        lambda: in_train_mode(ConvNet(), "bn"),
        None,
        r"module 'bn' is in training mode; .*eval",
    ),
    "exported in train mode": (lambda: exported(nn.Dropout().train()), None, r"dropout was exported in training mode"),
    "a frozen branch": (lambda: Branches().eval(), (2, 5, 32), r"symbolic tracing stopped(?s:.*)something else than"),
    "no names": (lambda: Args().eval(), None, r"forward takes \*args, whose number is unknown without example_inputs"),
    "no module": (lambda: math.sin, None, r"a torch\.nn\.Module is needed, not builtin_function_or_method"),
    "its own error": (lambda: Raises().eval(), (1, 32), r"itself fails on a batch \(float32\[1, 32\]\), before any"),
    "its own words": (
        lambda: Raises().eval(),
        (1, 32),
        r"test_capture_errors\.py:\d+, in forward(?s:.*)the user's own words",
    ),
    "a wrong shape": (lambda: MLP().eval(), (2, 63), r"MLP itself fails on (?s:.*)RuntimeError: mat1 and mat2 shapes"),
}


def in_train_mode(model, name):
    model.eval().get_submodule(name).train()
    return model


def exported(model):
    return torch.export.export(model, (torch.ones(4),)).module()


@pytest.mark.parametrize("name", CAPTURES)
def test_what_capture_refuses(name):
    make, size, words = CAPTURES[name]
    model = make()
    before = Snapshot(model) if isinstance(model, nn.Module) else None
    with pytest.raises(mq.CaptureError, match=words):
        mq.capture(model, None if size is None else torch.zeros(size), method="symbolic")
    if before:
        before.check(model)


def test_an_output_class_that_export_does_not_know_is_named_with_the_way_to_register_it():
    with pytest.raises(mq.CaptureError, match=r"(?s)capture_models\.Out.*try: .*torch\.export\.register_dataclass"):
        mq.capture(Dataclass().eval(), r(1, 5), method="export")


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(mq.ConfigError, match="method='jit': one of 'auto', 'symbolic', 'export' is needed"):
        mq.capture(MLP().eval(), method="jit")


def test_export_that_fails_leaves_nothing_on_the_screen_and_the_streams_in_place(capfd):
    streams = sys.stdout, sys.stderr
    model = Attention().eval()
    with pytest.raises(mq.CaptureError, match=r"Attention itself fails on a batch \(float32\[1, 5, 31\]\)"):
        mq.capture(model, torch.zeros(1, 5, 31))
    assert (sys.stdout, sys.stderr) == streams
    assert capfd.readouterr() == ("", "")
