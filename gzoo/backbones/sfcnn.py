"""SFCNN: six large kernels for rotated MNIST, as over steerable filters.

Source: Weiler, Hamprecht & Storath 2018, arXiv:1711.07289, and Weiler & Cesa 2019, arXiv:1911.08251: kernels of 9, 7,
7, 7, 7 and 5 pixels, max pooling after the second and the fourth layer; 24, 32, 36, 36, 64 and 96 fields. Weiler & Cesa
restrict theirs from D16 to C16 after the fifth layer, where our first stage ends. Ours differs in one place: a linear
classifier follows the pooling, where theirs has two hidden layers.
"""

from torch import nn

from gzoo.backbones.staged import Stage, StagedCNN


def sfcnn(
    in_chans: int = 1,
    num_classes: int = 10,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    base_width: int = 96,
) -> StagedCNN:
    """The six-layer network; images of at least 28x28 pixels. Larger ones are averaged over the remaining pixels.

    Args:
        in_chans: channels of the image.
        num_classes: logits; 0 for none.
        global_pool: spatial pooling, timm's names.
        drop_rate: dropout before the classifier.
        base_width: channels of the first layer, a multiple of 6. The papers have 24 fields of 16 rotations.

    Raises:
        ValueError: base_width is no multiple of 6.
    """
    if base_width % 6:
        raise ValueError(f"base_width is {base_width}; the layers have 6 to 24 sixths of it, so give a multiple of 6")
    widths = [base_width // 6 * sixths for sixths in (6, 8, 9, 9, 16, 24)]
    layers, width = [], in_chans
    for i, (out, kernel) in enumerate(zip(widths, (9, 7, 7, 7, 7, 5), strict=True)):
        padding = 3 if kernel == 7 else 0
        layer = [nn.Conv2d(width, out, kernel, padding=padding, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        layers.append(nn.Sequential(*layer, *([nn.MaxPool2d(2, 2)] if i in (1, 3) else [])))
        width = out
    stem, *middle, last = layers
    stages = [Stage(nn.Sequential(*middle), widths[4], 4), Stage(nn.Sequential(last), widths[5], 4)]
    return StagedCNN(stem, stages, in_chans, num_classes, global_pool, drop_rate)
