"""Quotient fields, and mixtures of them with regular and trivial ones: convolution, norm and pooling.

A field of G/H is a function on the cosets xH, with |G| / |H| channels, in the order of `Group.cosets`; G permutes them.
``{"c1": 5, "c2": 2, "c16": 4}`` stands for five fields of G/C1 (regular ones), two of G/C2 and four of G/C16, channels
in this order. Over c16 the last are trivial. Pointwise activations and spatial pools take such maps as they are, and
``gzoo.transform_features(x, g, layer.out_type)`` moves them.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gzoo.bases import BasisName, balance, choose, quotient_basis
from gzoo.groups import Group
from gzoo.nn.conv import Padding, PaddingMode, convolve, window_of
from gzoo.nn.expand import ExpandedLayer, along_fibre
from gzoo.nn.linear import GroupPool, Pooling
from gzoo.nn.norm import FibreNorm

if TYPE_CHECKING:
    from escnn.nn import FieldType

Fields = Mapping[str, int]


def _sizes(group: Group, fields: Fields) -> list[int]:
    """The channels of all fields of each kind."""
    return [number * group.order // h.order for h, number in group.stabilizers(fields)]


def _require_channels(x: Tensor, channels: int, group: Group, fields: Fields) -> None:
    if x.ndim < 2 or x.shape[1] != channels:
        wanted = ", ".join(f"{number} of {group.name}/{h}" for h, number in fields.items())
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not have {channels} channels, those of the fields {wanted}; bring an "
            f"image there with a QuotientConv2d from {{'{group.name}': channels}}"
        )


class QuotientConv2d(nn.Module):
    """Group convolution between quotient fields of any kinds, and mixtures of them. Regular and trivial fields are two.

    A field of G/H is a regular field that does not change under H, at |H| times fewer channels: a kernel between such
    fields is one between regular fields, averaged over cosets. H = G is a channel of an image in the input, and an
    invariant map in the output. Exact as `LiftingConv2d` is.

    Args:
        group: any point group G.
        in_fields: the number of fields in of each kind, by the name of H: {"c1": 5, "c2": 2}, see `gzoo.nn.quotient`.
            H has the same mirror axis as G.
        out_fields: the number of fields out.
        kernel_size: side of the square kernel in pixels, odd or even.
        stride: in pixels.
        padding: pixels on either side; "same" keeps the size at stride 1, "valid" is 0.
        dilation: pixels between taps.
        bias: whether each field has one.
        padding_mode: as in ``nn.Conv2d``.
        basis: as in `LiftingConv2d`.

    Shape:
        x: (B, sum of fields * |G| / |H|, H, W); result: the same of the fields out, H', W' as of ``nn.Conv2d``.
        blocks[i][j].weight, from kind j to kind i: (fields out, fields in, n), n the dimensions of such kernels; or as
        that of `GroupConv2d`, where both are regular.

    Raises:
        ValueError: an H is no subgroup of G; the group has no such basis; x has other channels.

    Source: Weiler & Cesa 2019, arXiv:1911.08251, section 2.6; the tests compare with ``escnn.nn.R2Conv``.
    """

    def __init__(
        self,
        group: Group,
        in_fields: Fields,
        out_fields: Fields,
        kernel_size: int,
        stride: int = 1,
        padding: Padding = 0,
        dilation: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        basis: BasisName | None = None,
    ) -> None:
        super().__init__()
        self.group, self.in_fields, self.out_fields = group, dict(in_fields), dict(out_fields)
        self.window = window_of(kernel_size, stride, padding, dilation)
        self.padding_mode, self.basis_name = padding_mode, choose(group, kernel_size, basis)
        inner, outer = group.stabilizers(in_fields), group.stabilizers(out_fields)
        self.in_channels = sum(_sizes(group, in_fields))
        self.fibres = [group.order // k.order for k, _ in outer]  # channels of one field of each kind
        self.blocks = nn.ModuleList(
            nn.ModuleList(ExpandedLayer(n, m, quotient_basis(group, kernel_size, h, k, basis)) for h, m in inner)
            for k, n in outer
        )
        self.bias = nn.Parameter(torch.empty(sum(out_fields.values()))) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws kernels as `LiftingConv2d` does; each channel in adds the same to the variance, of whatever kind."""
        sizes = _sizes(self.group, self.in_fields)
        rows: Any = self.blocks
        for block, size in ((block, size) for row in rows for block, size in zip(row, sizes, strict=True)):
            share = size / self.in_channels
            nn.init.normal_(block.weight, std=math.sqrt(2 * share / block.weight[0].numel()))
            with torch.no_grad():
                block.weight.mul_(balance(block.basis))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def filter(self) -> Tensor:
        """The expanded filter, (channels out, channels in, k, k)."""
        rows: Any = self.blocks
        return torch.cat([torch.cat([block.filter() for block in row], 1) for row in rows])

    def channel_bias(self) -> Tensor | None:
        """The bias of each channel out."""
        if self.bias is None:
            return None
        kinds = zip(self.bias.split(list(self.out_fields.values())), self.fibres, strict=True)
        return torch.cat([along_fibre(numbers, fibre) for numbers, fibre in kinds])

    def forward(self, x: Tensor) -> Tensor:
        _require_channels(x, self.in_channels, self.group, self.in_fields)
        return convolve(x, self.filter(), self.channel_bias(), self.window, self.padding_mode)

    @property
    def in_type(self) -> "FieldType":
        """The input's escnn type."""
        return self.group.quotient_type(self.in_fields)

    @property
    def out_type(self) -> "FieldType":
        """The result's escnn type."""
        return self.group.quotient_type(self.out_fields)

    def extra_repr(self) -> str:
        window = self.window
        return (
            f"{self.group.name}, {self.in_fields} to {self.out_fields}, kernel_size={window.kernel}, "
            f"stride={window.stride}, padding={window.padding / 2:g}, dilation={window.dilation}, "
            f"bias={self.bias is not None}"
        )


class _PerKind(nn.Module):
    """One module for each kind of fields in a mixture."""

    def __init__(self, group: Group, fields: Fields, make: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.group, self.fields = group, dict(fields)
        self.sizes = _sizes(group, fields)
        self.kinds = nn.ModuleList(make(number, group.order // h.order) for h, number in group.stabilizers(fields))

    def forward(self, x: Tensor) -> Tensor:
        _require_channels(x, sum(self.sizes), self.group, self.fields)
        kinds = zip(self.kinds, x.split(self.sizes, 1), strict=True)
        return torch.cat([module(part) for module, part in kinds], 1)

    def extra_repr(self) -> str:
        return f"{self.group.name}, {self.fields}"


class QuotientNorm(_PerKind):
    """A norm of quotient fields: one mean, variance, scale and shift for all of a fibre, as `FibreNorm`. Exact.

    Args:
        group: any point group.
        fields: the number of fields of each kind, as of `QuotientConv2d`.
        norm: makes the norm of as many fields as it is given, by default ``nn.BatchNorm2d``.

    Shape:
        x and result: (B, sum of fields * |G| / |H|, H, W).

    Raises:
        ValueError: an H is no subgroup; x has other channels.

    Source: with batch norm the same function as ``escnn.nn.InnerBatchNorm``; the tests compare the two.
    """

    def __init__(self, group: Group, fields: Fields, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__(group, fields, lambda number, order: FibreNorm(norm(number), order))


class QuotientPool(_PerKind):
    """Group pooling of quotient fields: the mean or the maximum of each fibre. Exact for every group.

    Args:
        group: any point group.
        fields: the number of fields of each kind, as of `QuotientConv2d`.
        pool: "mean" or "max".

    Shape:
        x: (B, sum of fields * |G| / |H|, ...); result: (B, fields, ...), of which a plain classifier is invariant.

    Raises:
        ValueError: an H is no subgroup; x has other channels.

    Source: "max" is the same function as ``escnn.nn.GroupPooling``; the tests compare the two.
    """

    def __init__(self, group: Group, fields: Fields, pool: Pooling = "mean") -> None:
        super().__init__(group, fields, lambda number, order: GroupPool(order, pool))
        self.pool = pool
