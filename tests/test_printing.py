import torch

import mono_quant_fx as mq
from tests.models import MLP


def test_a_diff_shows_only_what_a_pass_did():
    gm = mq.capture(MLP(bias=False).eval())
    config = mq.QuantConfig(group_size=32, skip_layer_names=["fc1"])
    out = mq.default_pipeline(config)(gm).graph_module
    assert mq.diff_graphs(gm, gm) == ""
    assert mq.diff_graphs(gm, out).splitlines() == [
        "--- before",
        "+++ after",
        "@@ -1,7 +1,8 @@",
        " %x = placeholder",
        "-%fc1_weight = get_attr fc1.weight                      # float32[128, 64]",
        "+%fc1_weight = get_attr fc1.weight                      # float32[128, 64]  float: skip_layer_names: fc1",
        " %linear = linear(%x, %fc1_weight, None)",
        " %relu = relu(%linear, inplace=False)",
        "-%fc2_weight = get_attr fc2.weight                      # float32[16, 128]",
        "-%linear_1 = linear(%relu, %fc2_weight, None)",
        "+%fc2_weight_packed = get_attr fc2.weight_packed        # int32[16, 16]  int4 g32 sym",
        "+%fc2_weight_scale = get_attr fc2.weight_scale          # float32[16, 4]",
        "+%linear_1 = mono_quant_fx.int4_linear(%relu, %fc2_weight_packed, %fc2_weight_scale, None, None, 32)",
        " return %linear_1",
    ]


def test_containers_slices_and_modules_are_readable():
    class Many(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.act = torch.nn.GELU()

        def forward(self, x, y):
            return {"a": torch.cat([x, self.act(y)], dim=1)[:, :2], "b": (x, 3)}

    assert mq.format_graph(mq.capture(Many().eval())).splitlines()[2:] == [
        "%act = GELU[act](%y)",
        "%cat = cat([%x, %act], dim=1)",
        "%getitem = getitem(%cat, (slice(None, None, None), slice(None, 2, None)))",
        "return {a: %getitem, b: (%x, 3)}",
    ]
