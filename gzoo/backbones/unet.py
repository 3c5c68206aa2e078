"""U-Net: segmentation logits at every pixel, from a contracting path, an expanding path and skips between them.

Source: Ronneberger et al. 2015, arXiv:1505.04597, section 2. Ours differs in five places: convolutions are padded and
followed by batch norm, so the logits have the size of the image; four levels from 32 channels on, not five from 64; a
map is enlarged by bilinear interpolation to the size of its skip, not by a 2x2 up-convolution. That takes no
parameters, meets an odd skip in one symmetric step where an up-convolution is a pixel short, and has no 2x2 filter,
which is the hardest to turn between the pixels (c8). Dropout at the lowest level is the paper's, by default none.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.helpers import get_device_dtype
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn


class UNet(nn.Module):
    """A U-Net with timm's interface. Its features are the levels of the expanding path, the finest first.

    Args:
        widths: channels of the levels, the finest first; each level halves height and width.
        in_chans: channels of the image.
        num_classes: logits at each pixel; 0 for the finest features.
        drop_rate: dropout after the lowest level.

    Shape:
        x: (B, in_chans, H, W) of any size from 2^(levels - 1) pixels on; result: (B, num_classes, H, W).
    """

    def __init__(
        self,
        widths: Sequence[int] = (32, 64, 128, 256),
        in_chans: int = 3,
        num_classes: int = 2,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.num_features = self.head_hidden_size = widths[0]
        self.grad_checkpointing = False
        wider, levels = list(pairwise(widths)), len(widths)
        self.encoder = nn.ModuleList([_pair(in_chans, widths[0]), *(_pair(fine, coarse) for fine, coarse in wider)])
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(drop_rate)
        self.decoder = nn.ModuleList(_pair(coarse + fine, fine) for fine, coarse in wider)
        self.head = self._classifier(num_classes)
        modules = [*(f"decoder.{i}" for i in range(levels - 1)), f"encoder.{levels - 1}"]
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": width, "reduction": 2**i, "module": module}
            for i, (width, module) in enumerate(zip(widths, modules, strict=True))
        ]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def _classifier(self, num_classes: int) -> nn.Module:
        return nn.Conv2d(self.num_features, num_classes, 1) if num_classes else nn.Identity()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions for timm's layer-wise parameter groups: the encoder, then the decoder upwards."""
        decoder = [(rf"^decoder\.{i}\.", (-i,)) for i in range(len(self.decoder))]
        return {"encoder": r"^encoder\.(\d+)", "decoder": decoder}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory: levels recompute their activations in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The final 1x1 convolution, or the identity that stands in for it."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the final convolution; see timm.

        Raises:
            ValueError: ``global_pool`` asks for a pooling, which would leave no map.
        """
        if global_pool:
            raise ValueError(f"global_pool is {global_pool!r}; a U-Net gives logits at every pixel, so it takes none")
        self.num_classes = num_classes
        self.head = self._classifier(num_classes).to(**get_device_dtype(self))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The levels ``indices`` (all if None) of the expanding path, the finest first, and the finest; see timm."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}; a CNN has 'NCHW' only")
        levels = self._levels(x)
        take, _ = feature_take_indices(len(levels), indices)
        intermediates = [level for i, level in enumerate(levels) if i in take]
        return intermediates if intermediates_only else (levels[0], intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the head, which features do not need; see timm."""
        take, _ = feature_take_indices(len(self.encoder), indices)
        if prune_head:
            self.reset_classifier(0)
        return take

    def _levels(self, x: Tensor) -> list[Tensor]:
        """The maps of the expanding path, the finest first: level i is (B, widths[i], H // 2^i, W // 2^i)."""

        def run(stage: nn.Module, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(stage, x) if self.grad_checkpointing else stage(x)
            return y

        maps: list[Tensor] = []
        for stage in self.encoder:
            maps.append(run(stage, self.pool(maps[-1]) if maps else x))
        maps[-1] = self.drop(maps[-1])
        for i in reversed(range(len(self.decoder))):
            enlarged = F.interpolate(maps[i + 1], size=maps[i].shape[2:], mode="bilinear", align_corners=False)
            maps[i] = run(self.decoder[i], torch.cat((enlarged, maps[i]), 1))
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the finest features (B, num_features, H, W)."""
        return self._levels(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The finest features to logits at every pixel, or to what the classifier would see."""
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _pair(in_channels: int, out_channels: int) -> nn.Sequential:
    """Two convolutions of 3x3 pixels, which keep the size."""
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        convolution = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
