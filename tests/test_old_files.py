"""Files that earlier sources wrote load and compute what they did: one of each kind, under the old names of settings.

calibrated and streamed hold plans, self_contained a graph too; expected what each gave for `ids`, in float16.
"""

from pathlib import Path

import pytest
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import mono_quant_fx as mq

DATA = Path(__file__).parent / "data/old_layout"


class Net(nn.Module):
    """Linears that merge, a convolution, an embedding, and a write into a piece."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, 64)
        self.up, self.gate = nn.Linear(64, 64), nn.Linear(64, 64)
        self.conv = nn.Conv1d(64, 64, 3, padding=1)
        self.down = nn.Linear(64, 64)

    def forward(self, ids):
        x = self.table(ids)
        x = F.silu(self.gate(x)) * self.up(x)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2).contiguous()
        x[:, 0] = 0.0
        return self.down(x)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("calibrated.safetensors", {"short_row": "shrink", "desc_act": False, "activations": "int8"}),
        ("self_contained.safetensors", {"short_row": "shrink", "activations": "int8_dynamic", "compute": "auto"}),
        ("streamed", {"short_row": "shrink", "desc_act": False, "activations": None}),
    ],
)
def test_it_loads_and_computes_what_it_did(name, settings):
    loaded = mq.load(DATA / name, None if name.startswith("self") else Net().eval())
    expected = load_file(DATA / "expected.safetensors")
    out = loaded.graph_module(expected["ids"])
    assert mq.sqnr_db(expected[name.removesuffix(".safetensors")].float(), out) > 60
    assert {field: getattr(loaded.config, field) for field in settings} == settings
