"""The user's world is as it was: attributes, hooks' lists, other threads, warnings, streams, modes around a call."""

import contextlib
import copy
import io
import logging
import random
import sys
import threading
import warnings

import pytest
import torch
import torch.nn.utils.prune
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import mono_quant_fx as mq
from mono_quant_fx.process.surroundings import plain
from tests.harness import Snapshot

pytestmark = pytest.mark.filterwarnings("ignore:capture. the model fixes")
OPTIONS = {"group_size": 32, "skip_param_threshold": 0}
SEEN = []


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)

    def forward(self, x):
        with torch.no_grad():
            mean = x.mean()
        return self.b(self.norm(torch.relu(self.a(x)))) * 2.0 + mean


def net(kind=Net):
    torch.manual_seed(0)
    return kind().eval(), torch.randn(16, 64)


# --- A copy that fails is no licence to trace the original ---


def weight_norm(model):
    nn.utils.weight_norm(model.a)


def pruned(model):
    nn.utils.prune.l1_unstructured(model.a, "weight", 0.5)


def spectral_norm(model):
    nn.utils.spectral_norm(model.a).eval()


def locked(model):
    model.lock = threading.Lock()
    model.a.nested = {"deep": [threading.Lock()]}


class NoCopy:
    def __deepcopy__(self, memo):
        raise RuntimeError("this one is not copied")


def refusing(model):
    model.held = NoCopy()
    model.__dict__["__deepcopy__"] = NoCopy().__deepcopy__  # so that not even a copy without `held` succeeds


@pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm).*:FutureWarning")
@pytest.mark.parametrize("method", ["symbolic", "export"])
@pytest.mark.parametrize("spoil", [weight_norm, pruned, spectral_norm, locked, refusing])
def test_a_model_that_cannot_be_copied_is_as_it_was_after_the_capture(spoil, method):
    """m.weight of a model with old weight_norm, prune, spectral_norm or a lock is a torch.fx Proxy afterwards."""

    class Notes(Net):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    model, x = net(Notes)
    spoil(model)
    before, attributes = Snapshot(model), [dict(vars(m)) for m in model.modules()]
    expected = model(x)
    del model.last
    attributes = [dict(vars(m)) for m in model.modules()]
    gm = mq.capture(model, x, method=method)
    before.check(model)
    assert [{k: id(v) for k, v in vars(m).items()} for m in model.modules()] == [
        {k: id(v) for k, v in old.items()} for old in attributes
    ]
    torch.testing.assert_close(gm(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(x), expected)


class Recorder(Net):
    """Writes to all that a copy of the model shares with it."""

    count, log = 0, []

    def forward(self, x):
        global LAST
        type(self).count += 1
        type(self).fresh = x
        self.log.append(x)
        SEEN.append(x)
        LAST = x
        return super().forward(x)


LAST = None


@pytest.mark.parametrize("way", ["symbolic", "export", "failing", "interrupted"])
def test_what_hooks_and_forward_record_is_put_back_however_it_ends(way):
    """A hook that appends to the user's list leaves Proxies there; so do class attributes, globals and closures."""
    model, x = net(Recorder)
    kept, latest, counter = [], {"x": None}, 0

    def hook(module, args, output):
        nonlocal counter
        counter += 1
        kept.append(output)
        latest["x"] = output
        if way == "failing":
            raise ValueError("the hook's own")
        if way == "interrupted" and isinstance(output, fx.Proxy):
            raise KeyboardInterrupt

    model.a.register_forward_hook(hook)
    model.register_forward_pre_hook(lambda module, args: kept.append(args))
    error = {"failing": mq.CaptureError, "interrupted": KeyboardInterrupt}.get(way)
    with contextlib.nullcontext() if error is None else pytest.raises(error):
        mq.capture(model, x, method=way if error is None else "auto")
    assert (kept, latest, counter, SEEN, LAST, Recorder.count, Recorder.log) == ([], {"x": None}, 0, [], None, 0, [])
    assert "fresh" not in vars(Recorder)


def test_the_users_random_numbers_go_on_as_they_would():
    class Draws(Net):
        def forward(self, x):
            return super().forward(x) + torch.rand_like(x) * 0

    model, x = net(Draws)
    states = torch.get_rng_state(), random.getstate()
    mq.quantize(model, x, **OPTIONS)
    mq.capture(model, x, method="export")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


# --- Process-wide switches ---


def in_threads(*works):
    """Runs them at once; raises what any of them raised."""
    failures = []

    def guarded(work):
        try:
            work()
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_the_modes_of_an_export_in_another_thread_stay_in_place():
    """They stand in one place for all threads: putting them aside broke the export, and putting them back raised."""
    inside, done, seen = threading.Event(), threading.Event(), []

    def traced(x):
        inside.set()
        assert done.wait(60)
        return x + 1

    def trace():
        gm = make_fx(traced, pre_dispatch=True)(torch.ones(2))
        assert any(node.op == "call_function" for node in gm.graph.nodes)

    def other():
        assert inside.wait(60)
        try:
            with plain():
                seen.append(torch._ops._len_torch_dispatch_stack_pre_dispatch())
        finally:
            done.set()

    in_threads(trace, other)
    assert seen == [1]


@pytest.mark.parametrize("method", ["symbolic", "export"])
def test_captures_in_several_threads_succeed_and_leave_the_process_as_it_was(method):
    """Two quantize() calls in two threads fail, and streams, warnings and torch's loggers stay changed for good."""
    model, x = net()
    levels = {n: logging.getLogger(n).level for n in ("torch.export", "torch._export")}
    before = sys.stdout, sys.stderr, warnings.showwarning, list(warnings.filters)
    expected = mq.format_graph(mq.capture(model, x, method=method))
    graphs = []

    def capture():
        graphs.append(mq.format_graph(mq.capture(copy.deepcopy(model), x, method=method)))

    in_threads(*[capture] * 4)
    assert graphs == [expected] * 4
    assert (sys.stdout, sys.stderr, warnings.showwarning, list(warnings.filters)) == before
    assert {n: logging.getLogger(n).level for n in levels} == levels
    assert not [f for n in levels for f in logging.getLogger(n).filters]


@pytest.mark.parametrize("method", ["symbolic", "export"])
def test_a_float_model_in_another_thread_runs_while_this_one_captures(method):
    """It raises NameError "module is not installed as a submodule", and its prints are lost."""
    model, x = net(lambda: nn.Sequential(Net(), nn.TransformerEncoderLayer(64, 4, batch_first=True)))
    other, ready, done = copy.deepcopy(model), threading.Event(), threading.Event()
    expected, out, count = other(x), io.StringIO(), 0

    def run():
        nonlocal count
        while not done.is_set():
            assert torch.equal(other(x), expected)
            assert not torch.compiler.is_compiling() and not torch.fx._symbolic_trace.is_fx_symbolic_tracing()
            print("line")
            count += 1
            ready.set()

    def capture():
        ready.wait()
        try:
            for _ in range(3):
                mq.capture(model, x, method=method)
        finally:
            done.set()

    with contextlib.redirect_stdout(out):
        in_threads(run, capture)
    assert out.getvalue() == "line\n" * count and count > 1


def test_a_compiled_model_in_another_thread_runs_while_this_one_traces():
    class Slow(Net):
        def forward(self, x):
            in_threads(lambda: torch.testing.assert_close(compiled(y), expected))
            return super().forward(x)

    model, x = net(Slow)
    other, y = net()
    compiled, expected = torch.compile(other, backend="eager"), other(x)
    compiled(y)
    mq.capture(model)


def test_notes_of_torchs_loggers_stay_off_the_screen_without_their_levels(capfd):
    class Stops(Net):
        def forward(self, x):
            logging.getLogger("torch.export").warning("told by another part of this thread")
            return super().forward(x) if x.sum() > 0 else x

    model, x = net(Stops)
    with pytest.raises(mq.CaptureError, match="data-dependent"):
        mq.capture(model, x, method="export")
    assert "def forward" not in "".join(capfd.readouterr())


# --- Warnings of the user's model ---


class Warns(Net):
    def forward(self, x):
        warnings.warn("the user's own", RuntimeWarning, stacklevel=1)
        return super().forward(x)


@pytest.mark.parametrize("call", ["capture", "quantize", "export", "no example"])
def test_the_users_warnings_pass_once_and_are_no_notes(call):
    """Everything that did not begin with "capture:" was swallowed."""
    model, x = net(Warns)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        if call == "quantize":
            assert "the user's own" not in str(mq.quantize(model, x, **OPTIONS).warnings)
        else:
            method = "export" if call == "export" else "auto"
            mq.capture(model, None if call == "no example" else x, method=method)
    told = [w.filename for w in heard if str(w.message) == "the user's own"]
    assert told == [__file__]


def test_a_warning_made_an_error_is_the_models_own_failure():
    model, x = net(Warns)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(mq.CaptureError, match="RuntimeWarning: the user's own"):
            mq.capture(model, x)
        warnings.filterwarnings("ignore", "capture: the model fixes")
        mq.capture(nn.GRU(64, 64).eval(), x)


def test_a_warning_of_the_user_that_looks_like_a_note_is_none():
    class Sly(Net):
        def forward(self, x):
            warnings.warn("capture: not ours", stacklevel=1)
            return super().forward(x)

    model, x = net(Sly)
    with pytest.warns(UserWarning, match="not ours"):
        assert "not ours" not in str(mq.quantize(model, x, **OPTIONS).warnings)
