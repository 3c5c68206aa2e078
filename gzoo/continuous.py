"""The residual networks over SE(2) and E(2) of Romero & Lohit 2022, arXiv:2110.10211, whole and partial.

A lifting convolution and two residual blocks of two group convolutions, each followed by a max pool; the mean over
group and pixels; a linear classifier. Over t2 it is their baseline, translations alone, with the same kernels.

Ours differs from the paper's in the kernels, harmonics in place of small networks (`gzoo.nn.continuous` compares them).
As every convolution samples its own elements, a shortcut takes its input over to those of its block, by a group
convolution of one pixel.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from gzoo.nn.continuous import (
    Arc,
    ContinuousConv2d,
    ContinuousGroup,
    ContinuousLiftingConv2d,
    ContinuousNorm,
    ContinuousPool,
    Features,
    pool_all,
)


class _Layer(nn.Module):
    """Convolution and norm, at elements that it samples."""

    def __init__(self, conv: ContinuousLiftingConv2d | ContinuousConv2d, arc: Arc) -> None:
        super().__init__()
        self.arc, self.conv = arc, conv
        self.norm = ContinuousNorm(len(conv.weight))

    def forward(self, x: Tensor | Features) -> Features:
        return self.norm(self.conv(x, self.arc()))


class _Block(nn.Module):
    """Two layers beside a shortcut, and a pool."""

    def __init__(self, width: int, size: int, arcs: tuple[Arc, Arc]) -> None:
        super().__init__()
        mirrors = arcs[0].group.reflections
        self.first = _Layer(ContinuousConv2d(width, width, size, mirrors), arcs[0])
        self.second = _Layer(ContinuousConv2d(width, width, size, mirrors), arcs[1])
        self.shortcut = ContinuousConv2d(width, width, 1, mirrors)
        self.pool = ContinuousPool()

    def forward(self, features: Features) -> Features:
        y = self.second(_relu(self.first(features)))
        return self.pool(_relu(Features(y.maps + self.shortcut(features, y.elements).maps, y.elements)))


class ContinuousResNet(nn.Module):
    """The network, with timm's interface for classifiers.

    In eval mode it is exactly invariant under the quarter turns (and reflections) that its elements hold: with 4 or 8
    rotations all four turns, at every image size, as long as nothing is dropped. `gzoo.check` measures it.

    Args:
        continuous_group: "t2", "se2" or "e2".
        elements: that each layer samples; over e2 half of them are reflected.
        partial: each layer learns which elements it keeps: see `gzoo.nn.continuous.Arc`, and `gzoo.partial.report`.
        in_chans: channels of the image.
        num_classes: logits; 0 for none.
        width: fields of every layer.
        kernel_size: in pixels, odd.

    Shape:
        x: (B, in_chans, H, W), at least 4x4 pixels; result: (B, num_classes).

    Raises:
        ValueError: there is no such group, or not with so many elements; the kernel size is even.
    """

    def __init__(
        self,
        continuous_group: ContinuousGroup,
        elements: int = 8,
        partial: bool = False,
        in_chans: int = 1,
        num_classes: int = 10,
        width: int = 32,
        kernel_size: int = 7,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}; the kernels turn about a pixel, so it must be odd")
        lift, *arcs = (Arc(continuous_group, elements, partial) for _ in range(5))
        self.group = lift.group  # of the sampled elements: what gzoo.check holds it to
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, width
        self.stem = _Layer(ContinuousLiftingConv2d(in_chans, width, kernel_size), lift)
        self.blocks = nn.Sequential(
            _Block(width, kernel_size, (arcs[0], arcs[1])), _Block(width, kernel_size, (arcs[2], arcs[3]))
        )
        self.fc: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """The final linear layer, or the identity that stands in for it."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the final layer; see timm."""
        self.num_classes = num_classes
        like = self.stem.conv.weight
        layer = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.fc = layer.to(like.device, like.dtype)

    def forward_features(self, x: Tensor) -> Features:
        """Images to functions on the group, with the elements at which they are known."""
        return self.blocks(_relu(self.stem(x)))

    def forward_head(self, x: Features, pre_logits: bool = False) -> Tensor:
        """The last features to logits, or to what the classifier would see."""
        pooled = pool_all(x)
        return pooled if pre_logits else self.fc(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _relu(features: Features) -> Features:
    return Features(F.relu(features.maps), features.elements)
