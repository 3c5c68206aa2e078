"""Norms whose statistics and affine parameters are shared along the fibre."""

from typing import Any

import timm.layers as tl
import torch
from timm.layers.grn import GlobalResponseNorm
from timm.models import metaformer
from torch import Tensor, nn

from gzoo.groups import Group
from gzoo.nn.subset import Subset

CHANNELS_FIRST = (
    *(tl.LayerNorm2d, tl.LayerNorm2dFp32, tl.LayerNormAct2d, tl.LayerNormAct2dFp32, metaformer.LayerNorm2dNoBias),
    *(tl.RmsNorm2d, tl.RmsNorm2dFp32, tl.RmsNormAct2d, tl.RmsNormAct2dFp32, tl.SimpleNorm2d, tl.SimpleNorm2dFp32),
)


def channel_dim(norm: nn.Module) -> int:
    """Where a norm over channels takes them to be: 1, or -1 for channels last."""
    if isinstance(norm, GlobalResponseNorm):
        return norm.channel_dim
    return 1 if isinstance(norm, CHANNELS_FIRST) else -1


class FibreNorm(nn.Module):
    """Batch, instance or group norm of regular fields: one mean, variance, scale and shift for all of a fibre.

    G permutes a fibre, so statistics over the whole fibre are the same for x and g.x. Exact for every group. The fibre
    is handed to ``norm`` as further rows of pixels; ``norm`` itself may be any module that treats each channel alike at
    all pixels, with or without a pointwise activation after it (timm's ``BatchNormAct2d``, ``GroupNormAct``). It stays
    visible as a submodule, so that SyncBN conversion finds it.

    Args:
        norm: a norm over ``fields`` channels.
        group_order: |G|.

    Shape:
        x and result: (B, fields * |G|, H, W), or (B, fields * |G|) for ``nn.BatchNorm1d``; channel = field * |G| + g.

    Raises:
        ValueError: the channels of x are no whole number of fields.

    Source: with batch norm the same function as ``escnn.nn.InnerBatchNorm``; the tests compare the two.
    """

    def __init__(self, norm: nn.Module, group_order: int) -> None:
        super().__init__()
        self.norm = norm
        self.group_order = group_order
        self.subset: Subset | None = None  # of a partial network: statistics over the kept elements only

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias", "running_mean", "running_var"):  # as timm's code for merging branches reads them
            raise AttributeError(
                f"{type(self).__name__} has no {name} of its own: its norm has one number a field, in .norm; to merge "
                "branches for inference use gzoo.reparameterize(model), not timm's reparameterize_model"
            )
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        if self.subset is not None:
            return self.subset(x, self.norm)
        order = self.group_order
        batch, channels, *pixels = x.shape
        if channels % order:
            raise ValueError(f"x has {channels} channels, no whole number of fields of |G| = {order}; lift it first")
        rows = x.reshape(batch, channels // order, order * (pixels or [1])[0], *pixels[1:])  # a view of x
        result: Tensor = self.norm(rows)
        if not torch.is_grad_enabled() or torch.jit.is_tracing():
            return result.reshape(x.shape)
        # Were it a view, an activation in place behind it would have autograd copy gradients: 5% of a training step. No
        # one else holds the norm's result, so torch need not know that they share memory.
        apart: Tensor = torch.ops.aten._unsafe_view.default(result.contiguous(), x.shape)
        return apart


class GroupMapNorm(nn.Module):
    """Batch norm of a flattened map of regular fields, a vector of all its pixels: one mean, variance, scale and shift
    for all pixels that G moves onto one another, each in the element of the fibre that it comes to.

    Each element's map is turned back by that element, so that another pose of the image permutes the maps of a fibre
    and does nothing else; then it is normed as by `FibreNorm`. Exact for every group of quarter turns and mirrors.

    Args:
        norm: a norm over ``fields * side * side`` numbers.
        group: one whose elements all move pixels onto pixels.
        side: of the map, in pixels.

    Shape:
        x and result: (B, fields * |G| * side * side).

    Raises:
        ValueError: the group turns by angles in between, or x has another length.
    """

    def __init__(self, norm: nn.BatchNorm1d, group: Group, side: int) -> None:
        super().__init__()
        if len(group.grid_elements) < group.order:
            raise ValueError(
                f"{group.name} has elements that move no pixel of a flattened map onto another; norm the map before it "
                "is flattened, or pool it"
            )
        self.norm, self.group, self.side = norm, group, side

    def turned_back(self, x: Tensor) -> Tensor:
        """(B, fields * |G| * side * side) to (B, fields * side * side, |G|): each map as it stands at the identity."""
        maps, group = x.unflatten(1, (-1, self.group.order, self.side, self.side)), self.group
        poses = [group.transform_image(maps[:, :, g], group.inverse(g)) for g in range(group.order)]
        return torch.stack(poses, -1).flatten(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        numbers = self.norm.num_features * self.group.order
        if x.shape[1:] != (numbers,):
            raise ValueError(
                f"x has shape {tuple(x.shape)}, not (B, {numbers}) for maps of {self.side}x{self.side} pixels; give "
                "images of the size that the network was made for"
            )
        maps = self.norm(self.turned_back(x)).unflatten(1, (-1, self.side, self.side))
        poses = [self.group.transform_image(maps[..., g], g) for g in range(self.group.order)]
        return torch.stack(poses, 2).flatten(1)
