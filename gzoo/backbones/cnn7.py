"""CNN7: the seven-layer Z2CNN for rotated MNIST, 28x28 pixels, no padding.

Source: Cohen & Welling 2016, arXiv:1602.07576, section 8.1: 3x3 convolutions of 20 channels (4x4 in the last layer),
max pooling after the second. Ours differs in two places: the seventh layer keeps its 20 channels and a linear
classifier follows, where the paper's has one channel per class; larger images are averaged over the remaining pixels.
"""

from torch import nn

from gzoo.backbones.staged import Stage, StagedCNN


def cnn7(
    in_chans: int = 1,
    num_classes: int = 10,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    block_drop_rate: float = 0.0,
) -> StagedCNN:
    """The seven-layer network; images of at least 28x28 pixels.

    Args:
        in_chans: channels of the image.
        num_classes: logits; 0 for none.
        global_pool: spatial pooling, timm's names.
        drop_rate: dropout before the classifier.
        block_drop_rate: dropout after the layers three to six; the paper's is 0.3.
    """

    def layer(width: int, kernel: int, drop: float = 0.0) -> nn.Sequential:
        layers = [nn.Conv2d(width, 20, kernel, bias=False), nn.BatchNorm2d(20), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers, *([nn.Dropout(drop)] if drop else []))

    drop = block_drop_rate
    stages = [
        Stage(nn.Sequential(layer(20, 3), nn.MaxPool2d(2, 2)), 20, 2),
        Stage(nn.Sequential(*(layer(20, 3, drop) for _ in range(4)), layer(20, 4)), 20, 2),
    ]
    return StagedCNN(layer(in_chans, 3), stages, in_chans, num_classes, global_pool, drop_rate)
