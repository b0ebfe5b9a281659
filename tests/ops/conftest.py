"""What tests of the operators share: two threads, also where tests run side by side with one each; a path by name."""

import pytest
import torch

from mono_quant_fx.ops import native


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def use(monkeypatch):
    """Forces a path; the fixture of all tests undoes it."""

    def choose(path):
        monkeypatch.setenv(native.VARIABLE, path)
        native.path.cache_clear()

    return choose
