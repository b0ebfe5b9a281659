"""The skip rules: which name a pattern means, which rule wins, what a row that does not fit becomes, and the reason."""

import re

import pytest
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.graph.annotation import annotated
from mono_quant_fx.graph.skip_rules import matches


class Gated(nn.Module):
    """Three linears whose names are prefixes of each other: mlp.gate, mlp.gate_proj, mlp.up."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.ModuleDict({k: nn.Linear(128, 128, bias=False) for k in ("gate", "gate_proj", "up")})

    def forward(self, x):
        return self.mlp["gate"](x) + self.mlp["gate_proj"](x) + self.mlp["up"](x)


class Tied(nn.Module):
    """An embedding whose weight is the head's too; `body` is something to quantize in any case."""

    def __init__(self, head="lm_head"):
        super().__init__()
        self.emb, self.body = nn.Embedding(64, 128), nn.Linear(128, 128)
        self.add_module(head, nn.Linear(128, 64, bias=False))
        self.get_submodule(head).weight = self.emb.weight
        self.head = head

    def forward(self, ids):
        return self.get_submodule(self.head)(self.body(self.emb(ids)))


class Leaves(nn.Module):
    """A linear, then three modules that symbolic tracing leaves closed."""

    def __init__(self):
        super().__init__()
        self.fc, self.bn, self.ln = nn.Linear(128, 128), nn.BatchNorm1d(128), nn.LayerNorm(128)
        self.rnn = nn.LSTM(128, 16, batch_first=True)

    def forward(self, x):
        return self.rnn(self.ln(self.bn(self.fc(x).transpose(1, 2)).transpose(1, 2)))[0]


def decisions(model, **fields):
    """weight or module name -> (scheme as text, reason), from mq.capture and SkipAnnotation."""
    gm = mq.passes.SkipAnnotation(mq.QuantConfig(**fields))(mq.capture(model.eval())).graph_module
    return {a.weight.removesuffix(".weight"): (str(a.scheme), a.reason) for _, a in annotated(gm)}


def of_row(columns, **fields):
    """The decision for a linear with rows of that many columns; a second one that fits keeps the pass content."""
    return decisions(nn.Sequential(nn.Linear(128, columns), nn.Linear(columns, 32)), **fields)["1"]


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("mlp.gate", "mlp.gate", True),
        ("mlp.gate", "layers.0.mlp.gate", True),
        ("mlp.gate", "layers.0.mlp.gate.weight", False),  # neither a prefix nor a suffix, and the weight has its own
        ("mlp.gate", "mlp.gate.weight", True),
        ("mlp.gate", "mlp.gate_proj", False),
        ("mlp.gate", "layers.0.mlp.gate_proj", False),
        ("layers.1", "layers.1.mlp", True),
        ("layers.1", "layers.10.mlp", False),
        ("gate", "mlp.gate", True),
        ("mlp.gate", "xmlp.gate", False),
        ("a.b", "axb", False),
        (r"re:.*gate.*", "layers.0.mlp.gate_proj", True),
        (r"re:mlp\.gate", "mlp.gate_proj", False),  # a full match
        (r"re:gate", "mlp.gate", False),
        (r"re:layers\.[0-3]\..*", "layers.2.mlp", True),
    ],
)
def test_what_a_pattern_means(pattern, name, expected):
    assert matches(pattern, name) is expected


QUANTIZED = ("int4 g128 sym", "")


@pytest.mark.parametrize(
    ("fields", "skipped"),
    [
        ({"modules_to_not_convert": ["mlp.gate"]}, ["gate"]),
        ({"modules_to_not_convert": ["gate"]}, ["gate"]),
        ({"modules_to_not_convert": ["mlp.gate.weight"]}, ["gate"]),
        ({"modules_to_not_convert": ["re:.*gate.*"]}, ["gate", "gate_proj"]),
        ({"skip_layer_names": ["mlp.gate"]}, ["gate"]),
        ({"skip_layer_names": ["mlp.gate_proj.weight"]}, ["gate_proj"]),
        ({"skip_layer_names": ["re:mlp.gate.*"]}, ["gate", "gate_proj"]),
    ],
)
def test_a_list_skips_what_it_names_and_nothing_else(fields, skipped):
    ((field, (pattern,)),) = fields.items()
    expected = {
        k: (("None", f"{field}: {pattern}") if k in skipped else QUANTIZED) for k in ("gate", "gate_proj", "up")
    }
    assert decisions(Gated(), **fields) == {f"mlp.{k}": v for k, v in expected.items()}


def test_a_users_lists_add_to_the_defaults_and_can_replace_them():
    assert decisions(Tied())["emb"] == ("None", "default skip: Embedding")
    with_more = decisions(
        nn.Sequential(nn.Embedding(64, 128), nn.Linear(128, 128), nn.Linear(128, 64)), skip_layer_names=["2"]
    )
    assert with_more == {"0": ("None", "default skip: Embedding"), "1": QUANTIZED, "2": ("None", "skip_layer_names: 2")}
    assert decisions(Tied(), default_skips=False) == {"emb": QUANTIZED, "body": QUANTIZED}
    typed = decisions(Tied(head="out"), default_skips=False, skip_layer_types=[nn.Embedding])
    assert typed["emb"] == ("None", "skip_layer_types: Embedding (tied weight: emb decides)")


def test_the_parameter_threshold_counts_the_weights_elements():
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 4))  # the second has exactly the default's 512
    assert decisions(model) == {"0": QUANTIZED, "1": QUANTIZED}
    assert decisions(model, skip_param_threshold=513)["1"] == ("None", "512 parameters < skip_param_threshold 513")
    assert decisions(model, skip_param_threshold=0)["1"] == QUANTIZED


def test_the_first_override_that_matches_wins_over_later_ones_and_every_rule():
    first = decisions(
        Gated(), overrides={"mlp.gate": "int8", "mlp": "skip", "gate": "int4 g32"}, skip_layer_names=["mlp.gate"]
    )
    assert first["mlp.gate"] == ("int8 channel", "override 'mlp.gate'")
    assert first["mlp.up"] == ("None", "override 'mlp': skip")
    model = nn.Sequential(nn.Embedding(64, 128), nn.Linear(128, 128), nn.Linear(128, 2))
    some = decisions(model, overrides={"0": mq.QuantScheme(4, 64, False), "2": "int4"}, group_size=32)
    assert some == {
        "0": ("int4 g64 asym", "override '0'"),
        "1": ("int4 g32 sym", ""),
        "2": ("int4 g32 sym", "override '2'"),
    }


def test_an_override_that_does_not_fit_falls_back_like_any_other():
    fallback = decisions(Gated(), overrides={"mlp.up": "int4 g256"})["mlp.up"]
    assert fallback == ("int8 channel", "override 'mlp.up': rows of 128 < group_size 256: int8 by short_row")


def test_skipped_precision_stores_what_a_rule_skips_as_int8():
    model = nn.Sequential(nn.Embedding(64, 128), nn.Linear(128, 128), nn.Linear(128, 2), nn.Linear(2, 512))
    got = decisions(model, skipped_precision="int8", overrides={"3": "skip"})
    assert got == {
        "0": ("int8 channel", "default skip: Embedding: int8 by skipped_precision"),
        "1": QUANTIZED,
        "2": ("int8 channel", "256 parameters < skip_param_threshold 512: int8 by skipped_precision"),
        "3": ("None", "override '3': skip"),  # asked for by name
    }


ODD = "no power of two >= 16 divides it"


@pytest.mark.parametrize(
    ("columns", "group_size", "policy", "expected"),
    [
        (384, 256, "shrink", ("int4 g128 sym", "group_size 256 does not divide rows of 384: shrunk to 128")),
        (64, 24, "shrink", ("int4 g16 sym", "group_size 24 does not divide rows of 64: shrunk to 16")),
        (96, 128, "shrink", ("int4 g32 sym", "rows of 96 < group_size 128: shrunk to 32")),
        (64, 128, "shrink", ("int4 g64 sym", "rows of 64 < group_size 128: shrunk to 64")),
        (
            301, 128, "shrink",
            ("int8 channel", f"group_size 128 does not divide rows of 301: int8 by indivisible ({ODD})"),
        ),
        (
            72, 128, "shrink",  # 8 divides it, and is below 16
            ("int8 channel", f"rows of 72 < group_size 128: int8 by short_row ({ODD})"),
        ),
        (576, 128, "int8", ("int8 channel", "group_size 128 does not divide rows of 576: int8 by indivisible")),
        (576, 128, "skip", ("None", "group_size 128 does not divide rows of 576: skipped by indivisible")),
        (96, 128, "skip", ("None", "rows of 96 < group_size 128: skipped by short_row")),
        (301, -1, "error", ("int4 channel sym", "")),
        (256, 128, "error", ("int4 g128 sym", "")),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit(columns, group_size, policy, expected):
    assert of_row(columns, group_size=group_size, short_row=policy, indivisible=policy) == expected


@pytest.mark.parametrize(
    ("columns", "rule", "what"),
    [
        (96, "short_row", "rows of 96 < group_size 128"),
        (200, "indivisible", "group_size 128 does not divide rows of 200"),
    ],
)
def test_the_error_policy_names_layer_rule_and_ways_out(columns, rule, what):
    words = (
        f"1.weight: {what}, and {rule}='error'; use another group_size, {rule}='int8', 'shrink' or 'skip', or an "
        "override for this layer"
    )
    with pytest.raises(mq.ConfigError, match=f"^{re.escape(words)}$"):
        of_row(columns, **{rule: "error"})


def test_small_and_indivisible_default_to_int8_and_shrink():
    assert of_row(96) == ("int8 channel", "rows of 96 < group_size 128: int8 by short_row")
    assert of_row(576) == ("int4 g64 sym", "group_size 128 does not divide rows of 576: shrunk to 64")


@pytest.mark.parametrize(
    ("field", "pattern", "nearest"),
    [
        ("modules_to_not_convert", "mlp.gat", "mlp.gate, mlp.gate_proj, mlp.gate.weight, mlp.up, mlp.up.weight"),
        ("skip_layer_names", "gate", "mlp.gate, mlp.gate_proj, mlp.gate.weight, mlp.gate_proj.weight"),
        ("skip_layer_names", "re:mlp.up2", "mlp.up, mlp.up.weight, mlp.gate, mlp.gate_proj, mlp.gate_proj.weight"),
        ("skip_layer_types", "Linaer", "Linear"),
        ("overrides", "qqq", "mlp.gate, mlp.gate.weight, mlp.gate_proj, mlp.gate_proj.weight, mlp.up"),
    ],
)
def test_a_pattern_without_a_match_lists_the_nearest_names(field, pattern, nearest):
    words = f"{field}: {pattern!r} matches nothing in the model; nearest: {nearest}"
    with pytest.raises(mq.PatternError, match=f"^{re.escape(words)}$"):
        decisions(Gated(), **{field: [(pattern, "int8")] if field == "overrides" else [pattern]})


def test_a_tied_weight_is_skipped_for_all_when_one_user_is():
    skipped = {"default_skips": False, "modules_to_not_convert": ["lm_head"]}
    tied = "(tied weight: lm_head decides)"
    assert decisions(Tied(), **skipped)["emb"] == ("None", f"modules_to_not_convert: lm_head {tied}")
    reason = f"modules_to_not_convert: lm_head: int8 by skipped_precision {tied}"
    assert decisions(Tied(), **skipped, skipped_precision="int8")["emb"] == ("int8 channel", reason)
    kept = decisions(Tied(), skipped_precision="int8", overrides={"lm_head": "skip"})
    assert kept["emb"] == ("None", f"override 'lm_head': skip {tied}")  # to keep it goes before to store it as int8
    rows = mq.quantize(Tied().eval(), **skipped).accuracy.rows
    assert {r.node: r.scheme for r in rows if r.weight == "emb.weight"} == {
        "embedding": "float32",
        "linear_1": "float32",
    }


def test_leaf_modules_carry_a_reason():
    assert decisions(Leaves()) == {
        "fc": QUANTIZED,
        "bn": ("None", "default skip: BatchNorm1d"),
        "ln": ("None", "default skip: LayerNorm"),
        "rnn": ("None", "not reachable: LSTM hides its weights from the graph"),
    }
    assert decisions(Leaves(), skip_layer_types=[nn.LSTM])["rnn"] == ("None", "skip_layer_types: LSTM")
    bare = decisions(Leaves(), default_skips=False, skip_layer_names=["ln"])
    assert bare["bn"] == ("None", "BatchNorm1d holds vectors only, with no rows to group")
    assert bare["ln"] == ("None", "skip_layer_names: ln")
    with pytest.raises(mq.ConfigError, match=r"^overrides: 'rnn' asks for int8 on rnn, but LSTM hides its weights$"):
        decisions(Leaves(), overrides={"rnn": "int8"})


class TestPositiveLists:
    MODEL = staticmethod(
        lambda: nn.Sequential(
            nn.Linear(128, 8), nn.LayerNorm(8), nn.Linear(8, 128), nn.Linear(128, 2), nn.Linear(2, 128)
        )
    )

    def test_only_what_is_listed_is_quantized(self):
        found = decisions(self.MODEL(), layer_names=["0"])
        assert found.pop("0") == QUANTIZED
        assert set(found.values()) == {("None", "not in layer_names"), ("None", "default skip: LayerNorm")}

    def test_what_is_listed_is_free_of_the_defaults(self):
        assert decisions(Tied(), layer_types=[nn.Embedding, nn.Linear])["emb"][0] == "int4 g128 sym"
        small = decisions(self.MODEL(), group_size=8, layer_names=["3"])
        assert small["3"] == ("int4 g8 sym", "")

    def test_either_list_will_do_and_own_skips_and_overrides_go_before(self):
        found = decisions(self.MODEL(), layer_names=["0", "2"], layer_types=["LayerNorm"], skip_layer_names=["2"])
        assert found["0"] == QUANTIZED
        assert found["2"] == ("None", "skip_layer_names: 2")
        assert found["4"] == ("None", "not in layer_types or layer_names")
        assert decisions(self.MODEL(), layer_names=["0"], overrides={"2": "int8"})["2"][0] == "int8 channel"

    @pytest.mark.parametrize("given", [{"layer_names": ["nowhere"]}, {"layer_types": ["Conv9d"]}])
    def test_a_list_that_matches_nothing_is_an_error(self, given):
        with pytest.raises(mq.PatternError, match=f"^{next(iter(given))}: .* matches nothing in the model; nearest: "):
            decisions(Leaves(), **given)


def test_without_the_defaults_there_is_no_threshold_unless_it_is_given():
    model = TestPositiveLists.MODEL()
    assert decisions(model, default_skips=False, group_size=8)["3"] == ("int4 g8 sym", "")
    kept = decisions(model, default_skips=False, group_size=8, skip_param_threshold=512)["3"]
    assert kept == ("None", "256 parameters < skip_param_threshold 512")
