"""SFCNN and CNN6: six layers of large kernels for rotated MNIST, 28x28 pixels, as over steerable filters.

Both have max pooling after the second and the fourth layer. Ours differ in two places: a linear classifier follows the
pooling, where theirs have one or two hidden layers, and all activations are ReLUs.
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
    """Kernels of 9, 7, 7, 7, 7 and 5 pixels; images of at least 28x28, of which larger ones are averaged at the end.

    Source: Weiler, Hamprecht & Storath 2018, arXiv:1711.07289, and Weiler & Cesa 2019, arXiv:1911.08251, with 24, 32,
    36, 36, 64 and 96 fields. Weiler & Cesa restrict theirs from D16 to C16 after the fifth layer, where our first stage
    ends.

    Args:
        in_chans: channels of the image.
        num_classes: logits; 0 for none.
        global_pool: spatial pooling, timm's names.
        drop_rate: dropout before the classifier.
        base_width: channels of the first layer, a multiple of 6. The papers have 24 fields of 16 rotations.

    Raises:
        ValueError: base_width is no multiple of 6.
    """
    widths = _widths(base_width, (6, 8, 9, 9, 16, 24))
    return _network(widths, (9, 7, 7, 7, 7, 5), (0, 3, 3, 3, 3, 0), in_chans, num_classes, global_pool, drop_rate)


def cnn6(
    in_chans: int = 1,
    num_classes: int = 10,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    block_drop_rate: float = 0.0,
    base_width: int = 32,
) -> StagedCNN:
    """Kernels of 7, 5, 5, 5, 5 and 5 pixels; images of at least 24x24.

    Source: the network that Weiler & Cesa 2019, arXiv:1911.08251, compare groups with on MNIST, with 16, 24, 32, 32, 48
    and 64 fields.

    Args:
        in_chans: channels of the image.
        num_classes: logits; 0 for none.
        global_pool: spatial pooling, timm's names.
        drop_rate: dropout before the classifier.
        block_drop_rate: dropout after the layers three to five.
        base_width: channels of the first layer, an even number. The paper has 16 fields.

    Raises:
        ValueError: base_width is odd.
    """
    widths = _widths(base_width, (2, 3, 4, 4, 6, 8))
    kernels, paddings = (7, 5, 5, 5, 5, 5), (1, 2, 2, 2, 2, 0)
    return _network(widths, kernels, paddings, in_chans, num_classes, global_pool, drop_rate, block_drop_rate)


def _widths(base_width: int, parts: tuple[int, ...]) -> list[int]:
    first = parts[0]
    if base_width % first:
        raise ValueError(
            f"base_width is {base_width}; the layers are {', '.join(map(str, parts))} parts of {first} wide, so give a "
            f"multiple of {first}"
        )
    return [base_width // first * part for part in parts]


def _network(
    widths: list[int],
    kernels: tuple[int, ...],
    paddings: tuple[int, ...],
    in_chans: int,
    num_classes: int,
    global_pool: str,
    drop_rate: float,
    block_drop_rate: float = 0.0,
) -> StagedCNN:
    layers, width = [], in_chans
    for i, (out, kernel, padding) in enumerate(zip(widths, kernels, paddings, strict=True)):
        layer = [nn.Conv2d(width, out, kernel, padding=padding, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        pool = [nn.MaxPool2d(2, 2)] if i in (1, 3) else []
        drop = [nn.Dropout(block_drop_rate)] if block_drop_rate and 2 <= i < 5 else []
        layers.append(nn.Sequential(*layer, *pool, *drop))
        width = out
    stem, *middle, last = layers
    stages = [Stage(nn.Sequential(*middle), widths[4], 4), Stage(nn.Sequential(last), widths[5], 4)]
    return StagedCNN(stem, stages, in_chans, num_classes, global_pool, drop_rate)
