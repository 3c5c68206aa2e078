"""Wide ResNets for 32x32 images: 6n + 4 layers in three stages, batch norm and ReLU before each convolution.

Source: Zagoruyko & Komodakis 2016, arXiv:1605.07146, table 1: 16, 16k, 32k and 64k filters.
"""

from collections.abc import Iterator
from typing import Any

from timm.layers.drop import DropPath, calculate_drop_path_rates
from torch import Tensor, nn

from gzoo.backbones.staged import Stage, StagedCNN


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after its norm and ReLU; where the width changes, the shortcut is a 1x1 convolution of
    the activated input.

    Shape:
        x: (B, in_channels, H, W); result: (B, channels, H / stride, W / stride), rounded up.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.act1 = nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm2, self.act2 = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.drop = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.drop_path = DropPath(drop_path)
        self.shortcut = None
        if in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.conv2(self.drop(self.act2(self.norm2(self.conv1(y)))))
        return shortcut + self.drop_path(y)


def wide_resnet(
    depth: int,
    widen_factor: int,
    in_chans: int = 3,
    num_classes: int = 10,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    block_drop_rate: float = 0.0,
) -> StagedCNN:
    """WRN-``depth``-``widen_factor``.

    Args:
        depth: layers with weights, 6n + 4.
        widen_factor: k; the stages have 16k, 32k and 64k channels.
        in_chans: channels of the image.
        num_classes: logits; 0 for none.
        global_pool: spatial pooling, timm's names.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly with depth.
        block_drop_rate: dropout between the two convolutions of a block.

    Raises:
        ValueError: depth is not 6n + 4.
    """
    blocks_per_stage, rest = divmod(depth - 4, 6)
    if rest or blocks_per_stage < 1:
        raise ValueError(f"depth is {depth}; a wide ResNet has 6n + 4 layers: 10, 16, 22, 28, 40 ...")
    rates: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, 3 * blocks_per_stage))
    stages, width = [], 16
    for stride, reduction in ((1, 1), (2, 2), (2, 4)):
        channels, blocks = 16 * widen_factor * reduction, list[nn.Module]()
        for i in range(blocks_per_stage):
            blocks.append(PreActBlock(width, channels, 1 if i else stride, block_drop_rate, next(rates)))
            width = channels
        if reduction == 4:
            blocks += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        stages.append(Stage(nn.Sequential(*blocks), channels, reduction))
    stem = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
    return StagedCNN(nn.Sequential(stem), stages, in_chans, num_classes, global_pool, drop_rate)
