"""ResNets for 32x32 images: 6n + 2 layers in three stages.

Source: He et al. 2015, arXiv:1512.03385, section 4.2, in the variant of Cohen & Welling 2016, arXiv:1602.07576, section
8.2: 32, 64 and 128 filters (``base_width=16`` gives He's 16, 32, 64) and 1x1 convolutions on the shortcuts that change
the width. As everywhere in timm, the last batch norm of a block starts at zero.
"""

from collections.abc import Iterator
from typing import Any

from timm.layers.drop import DropPath, calculate_drop_path_rates
from timm.models.resnet import BasicBlock, downsample_conv
from torch import nn

from gzoo.backbones.staged import Stage, StagedCNN


def resnet_cifar(
    depth: int,
    base_width: int = 32,
    in_chans: int = 3,
    num_classes: int = 10,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> StagedCNN:
    """A CIFAR ResNet of ``depth`` = 6n + 2 layers.

    Args:
        depth: layers with weights, the shortcuts not counted.
        base_width: channels of the first stage; the next two have twice and four times as many.
        in_chans: channels of the image.
        num_classes: logits; 0 for none.
        global_pool: spatial pooling, timm's names.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly with depth.

    Raises:
        ValueError: depth is not 6n + 2.
    """
    blocks_per_stage, rest = divmod(depth - 2, 6)
    if rest or blocks_per_stage < 1:
        raise ValueError(f"depth is {depth}; a CIFAR ResNet has 6n + 2 layers: 8, 14, 20, 26, 32, 44, 56, 110 ...")
    drop_paths: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, 3 * blocks_per_stage))
    stem = nn.Sequential(
        nn.Conv2d(in_chans, base_width, 3, padding=1, bias=False), nn.BatchNorm2d(base_width), nn.ReLU(inplace=True)
    )
    stages, width = [], base_width
    for stride, channels in ((1, base_width), (2, 2 * base_width), (2, 4 * base_width)):
        blocks = []
        for i in range(blocks_per_stage):
            rate = next(drop_paths)
            blocks.append(
                BasicBlock(
                    width,
                    channels,
                    stride=stride if i == 0 else 1,
                    downsample=downsample_conv(width, channels, 1, stride) if width != channels else None,
                    drop_path=DropPath(rate) if rate > 0 else None,
                )
            )
            width = channels
        reduction = channels // base_width
        stages.append(Stage(nn.Sequential(*blocks), channels, reduction))
    return StagedCNN(stem, stages, in_chans, num_classes, global_pool, drop_rate)
