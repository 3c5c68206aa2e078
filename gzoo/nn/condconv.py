"""Group convolutions whose filters depend on the image."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gzoo.nn.conv import GroupConv2d, convolve, require_fields

if TYPE_CHECKING:
    from escnn.nn import FieldType


class GroupCondConv2d(nn.Module):
    """CondConv: for each image its own mixture of several experts' filters. Exact as `GroupConv2d`.

    The shares of the experts must not change when the image is transformed, as what an `InvariantLinear` gives.

    Args:
        experts: a convolution with the fields of all experts, one expert after another.
        num_experts: how many they are; divides its ``out_fields``.

    Shape:
        x: (B, in_fields * |G|, H, W); shares: (B, num_experts).
        result: (B, out_fields / num_experts * |G|, H', W') with H', W' as of ``experts``.

    Raises:
        ValueError: x does not have in_fields * |G| channels.

    Source: Yang et al. 2019, arXiv:1904.04971, equation 2.
    """

    one_for_all_poses = True  # for `gzoo.grow`

    def __init__(self, experts: GroupConv2d, num_experts: int) -> None:
        super().__init__()
        self.experts, self.num_experts = experts, num_experts

    @property
    def in_type(self) -> "FieldType":
        """The input's escnn type: regular fields."""
        return self.experts.in_type

    @property
    def out_type(self) -> "FieldType":
        """The result's escnn type: the regular fields of one expert."""
        return self.experts.group.field_type(self.experts.out_fields // self.num_experts)

    def forward(self, x: Tensor, shares: Tensor) -> Tensor:
        experts, images = self.experts, len(x)
        require_fields(x, 1, experts.in_fields, experts.group)
        bias = experts.channel_bias()
        # A filter for each image, so one convolution with as many times the groups and all images side by side.
        y = convolve(
            x.flatten(0, 1)[None],
            self._mixed(experts.full_filter(), shares),
            None if bias is None else self._mixed(bias, shares),
            experts.window,
            experts.padding_mode,
            experts.groups * images,
        )
        return y[0].unflatten(0, (images, -1))

    def _mixed(self, numbers: Tensor, shares: Tensor) -> Tensor:
        """(experts * n, ...) and (B, experts) -> (B * n, ...)."""
        return torch.einsum("be,e...->b...", shares, numbers.unflatten(0, (self.num_experts, -1))).flatten(0, 1)
