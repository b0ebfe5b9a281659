"""select_observer: which rule fires on which tensor, the mark of the experimental, and what it refuses."""

import sys
import warnings

import pytest
import torch

import mono_quant_fx as mq
from mono_quant_fx.calibration.auto_observer import ExperimentalWarning, select_observer
from mono_quant_fx.calibration.histogram import HistogramObserver

quiet = pytest.mark.filterwarnings("ignore::mono_quant_fx.calibration.auto_observer.ExperimentalWarning")


def known(count=1e6, skew=0.0, kurtosis=3.0, outlier_ratio=2.0):
    return {"count": count, "skew": skew, "kurtosis": kurtosis, "outlier_ratio": outlier_ratio}


@quiet
@pytest.mark.parametrize(
    ("statistics", "name", "words"),
    [
        (known(count=9_999), "minmax", "9,999 values say little about the tail; 10,000 would"),
        (known(count=0, kurtosis=0.0, outlier_ratio=1.0), "minmax", "0 values say little about the tail; 10,000 would"),
        (known(outlier_ratio=1.5), "minmax", "no tail to cut: max|x| is 1.5 times the 99.9% magnitude"),
        (known(outlier_ratio=40.0), "percentile", "isolated outliers: max|x| is 40.0 times the 99.9% magnitude"),
        (known(skew=-3.5), "percentile", "one long side: skew -3.5, where KL divergence would cut into it"),
        (known(kurtosis=31.0), "percentile", "a heavy tail: kurtosis 31.0, where KL divergence would cut into it"),
        (
            known(skew=-0.01, kurtosis=6.0),
            "histogram",
            "a moderate tail: max|x| is 2.0 times the 99.9% magnitude, kurtosis 6.0, skew 0.0",
        ),
        (known(skew=(0.0, -4.0, 1.0)), "percentile", "one long side: skew -4.0, where KL divergence would cut into it"),
    ],
)
def test_each_rule_and_its_reason(statistics, name, words):
    assert select_observer(statistics) == (name, f"experimental: {words}")
    assert "\n" not in words and mq.create_observer(name).name == name


@quiet
def test_tensors_observers_and_statistics_give_the_same_answer():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(50_000, generator=generator)
    uniform = torch.rand(50_000, generator=generator)
    laplace = torch.randn(50_000, generator=generator) * (-2 * torch.rand(50_000, generator=generator).log()).sqrt()
    tensors = {
        "minmax": uniform,
        "histogram": laplace,
        "percentile": torch.cat([normal, torch.tensor([100.0])]),
    }
    for name, x in tensors.items():
        observer = HistogramObserver()
        observer(x)
        answer = select_observer(x)
        assert answer[0] == name
        assert answer == select_observer(observer) == select_observer(observer.statistics())


def test_the_warning_comes_once():
    sys.modules[
        "mono_quant_fx.calibration.auto_observer"
    ]._warn_once.cache_clear()  # the package gives the function that name
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        select_observer(known())
        select_observer(known())
    (warning,) = heard
    assert warning.category is ExperimentalWarning and issubclass(ExperimentalWarning, UserWarning)
    assert str(warning.message) == "select_observer is experimental: its rules will change"
    assert warning.filename == __file__  # it points at the caller


@quiet
def test_what_it_refuses():
    observer = mq.create_observer("minmax")
    observer(torch.ones(3))
    words = r"^select_observer: 'count' is missing; a HistogramObserver's statistics\(\) have count, skew, kurtosis, "
    with pytest.raises(mq.ConfigError, match=words):
        select_observer(observer.statistics())
    with pytest.raises(mq.CalibrationError, match=r"^observer saw NaN or infinity: 1 of 2 values, in float32$"):
        select_observer(torch.tensor([1.0, float("nan")]))
