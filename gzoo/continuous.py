"""The networks over SE(2) and E(2) of Romero & Lohit 2022, arXiv:2110.10211, whole and partial.

Their small residual network: a lifting convolution and two residual blocks of two group convolutions, each followed by
a max pool; the mean over group and pixels; a linear classifier. And the 13-layer CNN of their table 5, which is that of
`gzoo.backbones.cnn13`. Over t2 each is their baseline, translations alone, with the same kernels.

Ours differ from the paper's in the kernels, harmonics in place of small networks (`gzoo.nn.continuous` compares them).
As every convolution samples its own elements, a shortcut takes its input over to those of its block, by a group
convolution of one pixel.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from gzoo.equivariant import CONTINUOUS, SIGNATURE, require_same_group
from gzoo.nn.constant import Constants, on_default_device
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
    """Convolution and norm, at elements that it samples, and a leaky ReLU if it has a ``slope``; 0 is a ReLU."""

    def __init__(self, conv: ContinuousLiftingConv2d | ContinuousConv2d, arc: Arc, slope: float | None = None) -> None:
        super().__init__()
        self.arc, self.conv, self.slope = arc, conv, slope
        self.norm = ContinuousNorm(len(conv.weight))

    def forward(self, x: Tensor | Features) -> Features:
        y: Features = self.norm(self.conv(x, self.arc()))
        return y if self.slope is None else Features(F.leaky_relu(y.maps, self.slope), y.elements)


class _Block(nn.Module):
    """Two layers beside a shortcut, and a pool."""

    def __init__(self, width: int, size: int, arcs: tuple[Arc, Arc]) -> None:
        super().__init__()
        mirrors = arcs[0].group.reflections
        self.first = _Layer(ContinuousConv2d(width, width, size, mirrors), arcs[0], slope=0.0)
        self.second = _Layer(ContinuousConv2d(width, width, size, mirrors), arcs[1])
        self.shortcut = ContinuousConv2d(width, width, 1, mirrors)
        self.pool = ContinuousPool()

    def forward(self, features: Features) -> Features:
        y = self.second(self.first(features))
        return self.pool(Features(F.relu(y.maps + self.shortcut(features, y.elements).maps), y.elements))


class _Classifier(Constants):
    """Stem, blocks, and a linear map of the mean over group and pixels, with timm's interface for classifiers."""

    constants: ClassVar[tuple[str, ...]] = (SIGNATURE,)

    def __init__(self, stem: _Layer, blocks: nn.Sequential, in_chans: int, num_classes: int) -> None:
        super().__init__()
        self.group = stem.arc.group  # of the sampled elements: what gzoo.check holds it to
        self.num_classes, self.in_chans = num_classes, in_chans
        self.stem, self.blocks = stem, blocks
        self.grad_checkpointing = False
        # Networks over t2 and se2 have weights of the same names and shapes.
        kind = torch.tensor([CONTINUOUS.index(stem.arc.continuous_group)], device="cpu")
        self.register_buffer(SIGNATURE, on_default_device(kind))
        norms = [module for module in blocks.modules() if isinstance(module, nn.BatchNorm3d)]
        self.num_features = norms[-1].num_features
        self.fc: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Regular expressions for timm's layer-wise parameter groups."""
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory: blocks recompute their activations in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The final linear layer, or the identity that stands in for it."""
        return self.fc

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ``nn.Module.load_state_dict``, but refuses what belongs to another group; raises ValueError."""
        if strict or SIGNATURE in state_dict:
            require_same_group(self, state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the final layer; see timm. Raises ValueError unless the pool is the mean, which is the only one."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool is {global_pool!r}; continuous networks pool by the mean alone, 'avg'")
        self.num_classes = num_classes
        like = self.stem.conv.weight
        layer = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.fc = layer.to(like.device, like.dtype)

    def forward_features(self, x: Tensor) -> Features:
        """Images to functions on the group, with the elements at which they are known."""
        lifted = self.stem(x)
        features: Features = checkpoint_seq(self.blocks, lifted) if self.grad_checkpointing else self.blocks(lifted)
        return features

    def forward_head(self, x: Features, pre_logits: bool = False) -> Tensor:
        """The last features to logits, or to what the classifier would see."""
        pooled = pool_all(x)
        return pooled if pre_logits else self.fc(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class ContinuousResNet(_Classifier):
    """The residual network, with timm's interface for classifiers.

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
        lift, *arcs = (Arc(continuous_group, elements, partial) for _ in range(5))
        stem = _Layer(ContinuousLiftingConv2d(in_chans, width, kernel_size), lift, slope=0.0)
        blocks = (_Block(width, kernel_size, (arcs[0], arcs[1])), _Block(width, kernel_size, (arcs[2], arcs[3])))
        super().__init__(stem, nn.Sequential(*blocks), in_chans, num_classes)


class ContinuousCNN13(_Classifier):
    """The 13-layer CNN: three, three and three convolutions, max pools between them; see `gzoo.backbones.cnn13`.

    All convolutions keep the size of the map. As exact as `ContinuousResNet`.

    Args:
        width: fields of the first three layers; then come twice, four times, twice and once as many. The default has
            over SE(2) about the parameters of the plain network, 3 million.
        kernel_size: in pixels, odd; of all but the last two layers, which have 1x1 kernels.

        The others are those of `ContinuousResNet`.

    Shape:
        x: (B, in_chans, H, W), at least 4x4 pixels; result: (B, num_classes).

    Raises:
        ValueError: as `ContinuousResNet`.
    """

    def __init__(
        self,
        continuous_group: ContinuousGroup,
        elements: int = 8,
        partial: bool = False,
        in_chans: int = 3,
        num_classes: int = 10,
        width: int = 64,
        kernel_size: int = 3,
    ) -> None:
        def layer(inner: int, outer: int, size: int = kernel_size) -> _Layer:
            arc = Arc(continuous_group, elements, partial)
            conv = ContinuousConv2d(inner * width, outer * width, size, arc.group.reflections)
            return _Layer(conv, arc, slope=0.1)

        lifting = ContinuousLiftingConv2d(in_chans, width, kernel_size)
        stem = _Layer(lifting, Arc(continuous_group, elements, partial), slope=0.1)
        blocks = (
            *(layer(1, 1), layer(1, 1), ContinuousPool()),
            *(layer(1, 2), layer(2, 2), layer(2, 2), ContinuousPool()),
            *(layer(2, 4), layer(4, 2, 1), layer(2, 1, 1)),
        )
        super().__init__(stem, nn.Sequential(*blocks), in_chans, num_classes)
