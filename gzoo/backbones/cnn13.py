"""CNN13: the 13-layer network of semi-supervised learning, 32x32 pixels.

Source: Laine & Aila 2017, arXiv:1610.02242, table 5: three 3x3 convolutions of 128 channels, three of 256, then 3x3
without padding and 1x1 of 512, 256 and 128 channels; max pooling and dropout behind each of the first two triples;
leaky ReLUs of slope 0.1. Romero & Lohit 2022, arXiv:2110.10211, compare partial networks on it in table 5. Ours differs
in its norms: batch norm where the source normalises weights and subtracts means.
"""

from torch import nn

from gzoo.backbones.staged import Stage, StagedCNN


def cnn13(
    in_chans: int = 3,
    num_classes: int = 10,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    block_drop_rate: float = 0.0,
) -> StagedCNN:
    """The 13-layer network; images of at least 12x12 pixels.

    Args:
        in_chans: channels of the image.
        num_classes: logits; 0 for none.
        global_pool: spatial pooling, timm's names.
        drop_rate: dropout before the classifier.
        block_drop_rate: dropout behind the two max poolings; the source's is 0.5.
    """

    def layer(width: int, out: int, kernel: int = 3, padding: int = 1) -> nn.Sequential:
        convolution = nn.Conv2d(width, out, kernel, padding=padding, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.LeakyReLU(0.1, inplace=True))

    def pool() -> list[nn.Module]:
        return [nn.MaxPool2d(2, 2), *([nn.Dropout(block_drop_rate)] if block_drop_rate else [])]

    stages = [
        Stage(nn.Sequential(layer(128, 128), layer(128, 128), *pool()), 128, 2),
        Stage(nn.Sequential(layer(128, 256), layer(256, 256), layer(256, 256), *pool()), 256, 4),
        Stage(nn.Sequential(layer(256, 512, 3, 0), layer(512, 256, 1, 0), layer(256, 128, 1, 0)), 128, 4),
    ]
    return StagedCNN(layer(in_chans, 128), stages, in_chans, num_classes, global_pool, drop_rate)
