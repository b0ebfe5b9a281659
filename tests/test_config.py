"""QuantScheme and QuantConfig: each wrong value has its words, text and scheme are inverses, configs are values."""

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.config import INT8, check_thresholds

GROUP = "a group is a positive multiple of 8 columns (32, 64 and 128 are usual), or -1 for the whole row"
FOUR = "one of 'int8', 'shrink', 'skip', 'error' is needed"
DB = "a finite number of dB is needed"
PAIR = "pattern -> QuantScheme, 'int8', 'int4 g64 asym' or 'skip'"
PATTERN = "is no pattern; a name or 're:...' is needed"
SCHEME = "a scheme reads like 'int8', 'int4 g64 sym' or 'int4 channel asym'"

OBSERVER = "one of 'minmax', 'moving_average_minmax', 'histogram', 'percentile', 'auto' is needed"

#: Every field of one value: its wrong values, and the rule that answers them after "field=value: ".
WRONG = [
    ("bits", [3, 0, 16, -4, "4", None, True, 4.0, [4]], "bits is 4 or 8"),
    ("group_size", [0, -2, 12, 127, 128.0, "128", None, True], GROUP),
    ("axis", [1, -1, None, "0", False, 0.0], "only axis 0, the output channels, can carry scales"),
    ("symmetric", [1, 0, "yes", None], "symmetric is True or False"),
    ("default_skips", [1, 0, "no", None], "True or False"),
    ("short_row", ["int4", "INT8", "", None, ["int8"]], FOUR),
    ("indivisible", ["pad", True, None], FOUR),
    ("skipped_precision", ["int4", "fp16", 8, False, []], "one of None, 'int8' is needed"),
    ("accuracy_warning", ["loud", None, True], "one of 'warn', 'error', 'ignore' is needed"),
    ("algorithm", ["awq", "GPTQ", None, True], "one of 'auto', 'rtn', 'clip', 'gptq' is needed"),
    ("damping", [0, -0.1, float("nan"), float("inf"), "0.01", None, True], "a finite number above 0 is needed"),
    ("desc_act", [1, 0, "yes", None], "True or False"),
    ("activations", ["int4", "INT8", 8, True, ""], "one of None, 'int8', 'int8_dynamic' is needed"),
    ("activation_symmetric", [1, 0, "yes", None], "True or False"),
    ("bias_correction", [1, 0, "yes", None], "True or False"),
    ("compute", ["int4", "bf16", "int8", None, 32], "one of 'auto', 'float32', 'bfloat16' is needed"),
    ("merge_linears", [1, 0, "yes", None], "True or False"),
    ("observer", ["minmx", "energy", None, True], OBSERVER),
    ("skip_param_threshold", [-1, 0.5, "512", True], "a whole number >= 0 is needed"),
    ("num_calibration_samples", [0, -5, 1.5, "150", None, True], "a whole number >= 1 is needed"),
    ("sqnr_warning_threshold", [float("nan"), float("inf"), "20", None, True], DB),
    ("sqnr_error_threshold", [float("nan"), float("-inf"), "10", None, False], DB),
]
WRONG_VALUES = [(field, value, rule) for field, values, rule in WRONG for value in values]

#: Wrong lists and mappings, with the whole message.
WRONG_LISTS = [
    ({f: "lm_head"}, f"{f}='lm_head': a list is needed; write {f}=['lm_head']")
    for f in (
        "modules_to_not_convert",
        "skip_layer_names",
        "skip_layer_types",
        "layer_types",
        "layer_names",
        "overrides",
    )
] + [
    ({"modules_to_not_convert": 7}, "modules_to_not_convert=7: a list is needed; write modules_to_not_convert=[7]"),
    ({"modules_to_not_convert": [3]}, f"modules_to_not_convert: 3 {PATTERN}"),
    ({"modules_to_not_convert": ["a", ""]}, f"modules_to_not_convert: '' {PATTERN}"),
    ({"skip_layer_names": [None]}, f"skip_layer_names: None {PATTERN}"),
    (
        {"skip_layer_names": ["re:("]},
        "skip_layer_names: 're:(' is no regular expression: missing ), unterminated subpattern at position 0",
    ),
    ({"skip_layer_types": nn.Linear}, "skip_layer_types=Linear: a list is needed; write [Linear]"),
    ({"skip_layer_types": [3]}, f"skip_layer_types: 3 {PATTERN}"),
    ({"overrides": {"a": 4}}, f"overrides: ('a', 4): {PAIR}"),
    ({"overrides": {"a": None}}, f"overrides: ('a', None): {PAIR}"),
    ({"overrides": [("a",)]}, f"overrides: ('a',): {PAIR}"),
    ({"overrides": ["a"]}, f"overrides: 'a': {PAIR}"),
    ({"overrides": {"": "int8"}}, f"overrides: '' {PATTERN}"),
    ({"overrides": {3: "int8"}}, f"overrides: 3 {PATTERN}"),
    ({"overrides": {"a": "int5"}}, f"overrides: 'a': scheme 'int5': {SCHEME}, or 'skip'"),
    ({"overrides": {"a": "int4 g12"}}, f"overrides: 'a': group_size=12: {GROUP}, or 'skip'"),
    (
        {"overrides": {"re:[": "skip"}},
        "overrides: 're:[' is no regular expression: unterminated character set at position 0",
    ),
    (
        {"sqnr_warning_threshold": 5.0, "sqnr_error_threshold": 10},
        "sqnr_warning_threshold=5.0 is below sqnr_error_threshold=10: a node would be critical without being worth a "
        "warning; swap them",
    ),
]


def exactly(words: str) -> str:
    return f"^{re.escape(words)}$"


@pytest.mark.parametrize(("field", "value", "rule"), WRONG_VALUES, ids=[f"{f}={v!r}" for f, v, _ in WRONG_VALUES])
def test_a_wrong_value_is_answered_with_value_rule_and_way_out(field, value, rule):
    with pytest.raises(mq.ConfigError, match=exactly(f"{field}={value!r}: {rule}")):
        mq.QuantConfig(**{field: value})
    with pytest.raises(ValueError, match=field):  # a ConfigError is a ValueError, and quantize says the same
        mq.quantize(nn.Linear(64, 64).eval(), **{field: value})


@pytest.mark.parametrize(("fields", "words"), WRONG_LISTS, ids=[str(f) for f, _ in WRONG_LISTS])
def test_a_wrong_list_is_answered_with_the_way_to_write_it(fields, words):
    with pytest.raises(mq.ConfigError, match=exactly(words)):
        mq.QuantConfig(**fields)


def test_the_tables_above_leave_no_field_out():
    covered = {field for field, _, _ in WRONG} | {field for fields, _ in WRONG_LISTS for field in fields}
    assert covered == {f.name for f in dataclasses.fields(mq.QuantConfig)}


def test_a_bad_group_size_is_refused_even_where_int8_would_not_use_it():
    with pytest.raises(mq.ConfigError, match=r"^group_size=7: a group is a positive multiple of 8"):
        mq.QuantConfig(bits=8, group_size=7)


@pytest.mark.parametrize("field", ["bits", "group_size", "symmetric"])
def test_a_scheme_alone_gives_the_same_words(field):
    rule, values = next((rule, values) for name, values, rule in WRONG if name == field)
    for value in values:
        with pytest.raises(mq.ConfigError, match=exactly(f"{field}={value!r}: {rule}")):
            mq.QuantScheme(**{field: value})


def test_int8_has_no_groups():
    words = "group_size=64 with bits=8: INT8 is stored per output channel; use QuantScheme(8, -1)"
    with pytest.raises(mq.ConfigError, match=exactly(words)):
        mq.QuantScheme(8, 64)
    with pytest.raises(mq.ConfigError, match=exactly(words)):
        mq.QuantScheme.parse("int8 g64")


int4_schemes = st.builds(
    mq.QuantScheme, st.just(4), st.one_of(st.just(-1), st.integers(1, 4096).map(lambda n: 8 * n)), st.booleans()
)
schemes = st.one_of(int4_schemes, st.builds(mq.QuantScheme, st.just(8), st.just(-1), st.booleans()))


@settings(deadline=None, derandomize=True, max_examples=100)
@given(scheme=schemes, default=schemes)
def test_parse_is_the_inverse_of_str_whatever_the_default(scheme, default):
    assert mq.QuantScheme.parse(str(scheme)) == scheme
    assert mq.QuantScheme.parse(str(scheme), default) == scheme


def test_parse_fills_the_gaps_from_the_default():
    default = mq.QuantScheme(4, 32, False)
    assert mq.QuantScheme.parse("int4", default) == default
    assert mq.QuantScheme.parse("int4 g64", default) == mq.QuantScheme(4, 64, False)
    assert mq.QuantScheme.parse("int4 sym", default) == mq.QuantScheme(4, 32, True)
    assert mq.QuantScheme.parse("int8", default) == INT8
    assert mq.QuantScheme.parse("int4", INT8) == mq.QuantScheme()


@pytest.mark.parametrize("text", ["", "int4g64", "int4 64", "int4  g64", "INT4", "int4 sym g64", "fp8", "int4 g-1"])
def test_what_is_no_scheme_is_quoted(text):
    with pytest.raises(mq.ConfigError, match=exactly(f"scheme {text!r}: {SCHEME}")):
        mq.QuantScheme.parse(text)


def test_configs_are_frozen_hashable_values():
    fields = {"group_size": 64, "overrides": {"a": "int8", "b": mq.QuantScheme()}, "skip_layer_types": [nn.Linear]}
    one, two = mq.QuantConfig(**fields), mq.QuantConfig(**fields)
    assert one == two and hash(one) == hash(two) and one != mq.QuantConfig()
    assert eval(repr(one), vars(mq)) == one  # the repr is the reproducible config
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.bits = 8  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.scheme.bits = 8  # type: ignore[misc]


def test_lists_become_tuples_and_classes_become_names():
    config = mq.QuantConfig(
        modules_to_not_convert=["a", "re:b.*"],
        skip_layer_names=iter(["c"]),
        skip_layer_types=(nn.LSTM, "Linear"),
        overrides=[("a", "skip")],
    )
    assert config.modules_to_not_convert == ("a", "re:b.*") and config.skip_layer_names == ("c",)
    assert config.skip_layer_types == ("LSTM", "Linear") and config.overrides == (("a", "skip"),)
    assert mq.QuantConfig(overrides={"a": "skip"}).overrides == config.overrides
    assert mq.QuantConfig(modules_to_not_convert=None).modules_to_not_convert == ()


def test_the_scheme_follows_bits():
    assert mq.QuantConfig(group_size=32, symmetric=False).scheme == mq.QuantScheme(4, 32, False)
    assert mq.QuantConfig(bits=8, group_size=32, symmetric=False).scheme == mq.QuantScheme(8, -1, False)


def test_build_lays_fields_over_a_config():
    base = mq.QuantConfig(group_size=64, symmetric=False)
    built = mq.QuantConfig.build(base, {"group_size": 32, "skip_layer_names": ["x"]})
    assert built == mq.QuantConfig(group_size=32, symmetric=False, skip_layer_names=("x",))
    assert base == mq.QuantConfig(group_size=64, symmetric=False)
    assert mq.QuantConfig.build(None, {}) == mq.QuantConfig()
    with pytest.raises(mq.ConfigError, match=r"^group_size=12: "):
        mq.QuantConfig.build(base, {"group_size": 12})


def test_build_names_the_nearest_field():
    words = "groupsize=64: no such setting; did you mean group_size?"
    with pytest.raises(mq.ConfigError, match=exactly(words)):
        mq.QuantConfig.build(None, {"groupsize": 64})
    with pytest.raises(mq.ConfigError, match=r"^xyzzy=1: no such setting; did you mean bits, group_size, axis, "):
        mq.quantize(nn.Linear(64, 64).eval(), xyzzy=1)
    with pytest.raises(mq.ConfigError, match=exactly("config={'bits': 4}: a QuantConfig is needed, not dict")):
        mq.QuantConfig.build({"bits": 4}, {})  # type: ignore[arg-type]


def test_equal_thresholds_are_allowed():
    check_thresholds(10, 10.0)
    assert mq.QuantConfig(sqnr_warning_threshold=0, sqnr_error_threshold=-5).sqnr_warning_threshold == 0
