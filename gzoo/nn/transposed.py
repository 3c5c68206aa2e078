"""The transposed group convolution, which enlarges feature maps."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzoo.bases import BasisName, balance, regular_basis
from gzoo.groups import Group
from gzoo.nn.conv import LiftingConv2d, require_fields
from gzoo.nn.expand import ExpandedLayer, along_fibre

if TYPE_CHECKING:
    from escnn.nn import FieldType


class GroupConvTranspose2d(ExpandedLayer):
    """Transposed group convolution: the adjoint of `GroupConv2d`, regular fields to regular fields.

    The group acts by orthogonal maps, so the adjoint of an equivariant map is equivariant. The windows cover the output
    symmetrically at every size; exact as `LiftingConv2d`.

    Args:
        group: any point group.
        in_fields: number of regular fields in.
        out_fields: number of regular fields out.
        kernel_size: side of the square kernel in pixels.
        stride: in pixels of the output.
        padding: pixels cut off on either side of the output.
        dilation: pixels between taps.
        groups: divides both numbers of fields.
        bias: whether each field has one.
        basis: of the kernels, as `GroupConv2d` takes it.
        output_padding: pixels by which the output is larger than the windows cover. Torch adds them on one side; here
            the map is stretched over them (bilinear), which treats all sides alike.

    Shape:
        x: (B, in_fields * |G|, H, W); result: (B, out_fields * |G|, H', W') with H', W' as of ``nn.ConvTranspose2d``.
        weight: (in_fields, out_fields / groups, ...) as that of a `GroupConv2d` from out to in.

    Raises:
        ValueError: the group has no such basis; x has other channels; ``output_size`` is not the size of the result.
    """

    def __init__(
        self,
        group: Group,
        in_fields: int,
        out_fields: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        basis: BasisName | None = None,
        output_padding: int = 0,
    ) -> None:
        super().__init__(in_fields, out_fields // groups, regular_basis(group, kernel_size, basis))
        self.group, self.in_fields, self.out_fields = group, in_fields, out_fields
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.output_padding = output_padding
        self.bias = nn.Parameter(torch.zeros(out_fields)) if bias else None
        nn.init.normal_(self.weight, std=math.sqrt(2 * stride**2 / self.fan_in))
        with torch.no_grad():
            self.weight.mul_(balance(self.basis))

    @property
    def fan_in(self) -> int:
        """How many inputs one output sums up, times the stride in both directions."""
        return self.in_fields // self.groups * self.weight[0, 0].numel()

    @property
    def in_type(self) -> "FieldType":
        """The input's escnn type: ``in_fields`` regular fields."""
        return self.group.field_type(self.in_fields)

    @property
    def out_type(self) -> "FieldType":
        """The result's escnn type: ``out_fields`` regular fields."""
        return self.group.field_type(self.out_fields)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        require_fields(x, 1, self.in_fields, self.group)
        bias = None if self.bias is None else along_fibre(self.bias, self.group.order)
        y = F.conv_transpose2d(x, self.filter(), bias, self.stride, self.padding, 0, self.groups, self.dilation)
        if self.output_padding:
            size = [side + self.output_padding for side in y.shape[2:]]
            y = F.interpolate(y, size, mode="bilinear", align_corners=True)
        if output_size is not None and tuple(output_size[-2:]) != y.shape[2:]:
            raise ValueError(
                f"output_size is {tuple(output_size)}, but the windows cover {tuple(y.shape[2:])} pixels; others would "
                "be added on one side only. Choose kernel, stride and padding with kernel - 2 * padding = stride"
            )
        return y

    def extra_repr(self) -> str:
        return (
            f"{self.group.name}, {tuple(self.weight.shape)}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
        )


class GroupVectorMap(nn.Module):
    """Linear map of vectors to flattened maps, as of a decoder: the adjoint of `GroupMapLinear`, with a bias a pixel.

    A transposed convolution of one pixel, and one of a pixel that is always one, which the group leaves as it is. Exact
    as `GroupConvTranspose2d`.

    Args:
        group: any point group.
        in_fields: number of regular fields in.
        out_fields: number of regular fields out.
        side: of the map, in pixels.
        bias: whether each field has one at each pixel.
        basis: of the kernels, as `GroupConv2d` takes it.

    Shape:
        x: (B, in_fields * |G|); result: (B, out_fields * |G| * side * side).

    Raises:
        ValueError: the group has no such basis; x has other channels.
    """

    def __init__(
        self,
        group: Group,
        in_fields: int,
        out_fields: int,
        side: int,
        bias: bool = True,
        basis: BasisName | None = None,
    ) -> None:
        super().__init__()
        self.kernels = GroupConvTranspose2d(group, in_fields, out_fields, side, side, bias=False, basis=basis)
        self.offset: LiftingConv2d | None = None
        if bias:
            self.offset = LiftingConv2d(group, 1, out_fields, side, padding=side - 1, bias=False, basis=basis)
            nn.init.zeros_(self.offset.weight)

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self.kernels(x[:, :, None, None])
        if self.offset is not None:
            maps = maps + self.offset(x.new_ones(1, 1, 1, 1))
        return maps.flatten(1)
