"""All-CNN-C: a CIFAR classifier made of convolutions only.

Source: Springenberg et al. 2015, arXiv:1412.6806, table 2. Ours differs in two places: the last 3x3 convolution is
padded, so the average runs over 8x8 pixels, not 6x6; the classifier is a linear layer after the average, where the
paper's 1x1 convolution with ReLU stands before it.
"""

from torch import nn

from gzoo.backbones.staged import Stage, StagedCNN

# (out channels, kernel, stride) in order, a stage a row; dropout follows each strided layer.
_STAGES = (
    ((96, 3, 1), (96, 3, 1)),
    ((96, 3, 2), (192, 3, 1), (192, 3, 1)),
    ((192, 3, 2), (192, 3, 1), (192, 1, 1)),
)


def allcnnc(in_chans: int = 3, num_classes: int = 10, global_pool: str = "avg", drop_rate: float = 0.0) -> StagedCNN:
    """All-CNN-C. ``drop_rate`` is the dropout before the classifier; the paper's own (0.2, 0.5) is always there."""
    stages, width, reduction = [], in_chans, 1
    for rows in _STAGES:
        layers: list[nn.Module] = []
        for channels, kernel, stride in rows:
            layers += [nn.Conv2d(width, channels, kernel, stride, padding=kernel // 2), nn.ReLU(inplace=True)]
            if stride > 1:
                layers.append(nn.Dropout(0.5))
            width, reduction = channels, reduction * stride
        stages.append(Stage(nn.Sequential(*layers), width, reduction))
    return StagedCNN(nn.Dropout(0.2), stages, in_chans, num_classes, global_pool, drop_rate)
