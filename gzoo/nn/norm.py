"""Norms whose statistics and affine parameters are shared along the fibre."""

from typing import Any

import timm.layers as tl
import torch
from timm.layers.grn import GlobalResponseNorm
from timm.models import metaformer
from torch import Tensor, nn

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
        if not torch.is_grad_enabled():
            return result.reshape(x.shape)
        # Were it a view, an activation in place behind it would have autograd copy gradients: 5% of a training step. No
        # one else holds the norm's result, so torch need not know that they share memory.
        apart: Tensor = torch.ops.aten._unsafe_view.default(result.contiguous(), x.shape)
        return apart
