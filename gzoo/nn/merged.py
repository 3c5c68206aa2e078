"""The convolution that several branches of a network add up to."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from gzoo.nn.conv import GroupConv2d, LiftingConv2d, convolve

if TYPE_CHECKING:
    from escnn.nn import FieldType


class MergedConv2d(nn.Module):
    """A lifting or group convolution with its filter written out, for inference: nothing would keep it equivariant.

    Args:
        like: the convolution whose group, fields and window it has; stays as it is.
        filters: of the kernel size of ``like``.
        bias: of each channel.

    Raises:
        ValueError: x has other channels.

    Shape:
        x and result: as of ``like``.
        filters: (channels out, channels in / groups, k, k), channel = field * |G| + g; bias: (channels out,).
    """

    filters: Tensor
    bias: Tensor

    def __init__(self, like: LiftingConv2d | GroupConv2d, filters: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.group, self.out_fields, self.lifts = like.group, like.out_fields, isinstance(like, LiftingConv2d)
        self.window, self.padding_mode, self.groups = like.window, like.padding_mode, like.groups
        self.in_channels = filters.shape[1] * like.groups
        self.register_buffer("filters", filters)
        self.register_buffer("bias", bias)

    @property
    def in_type(self) -> "FieldType":
        """The input's escnn type: trivial fields if it lifts an image, else regular ones."""
        if self.lifts:
            return self.group.image_type(self.in_channels)
        return self.group.field_type(self.in_channels // self.group.order)

    @property
    def out_type(self) -> "FieldType":
        """The result's escnn type: ``out_fields`` regular fields."""
        return self.group.field_type(self.out_fields)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.in_channels:
            raise ValueError(f"x of shape {tuple(x.shape)} has {x.shape[1]} channels, not {self.in_channels}")
        return convolve(x, self.filters, self.bias, self.window, self.padding_mode, self.groups)

    def extra_repr(self) -> str:
        return f"{self.group.name}, {tuple(self.filters.shape)}, stride={self.window.stride}, groups={self.groups}"
