"""Group convolutions: images to regular fields, and regular fields to regular fields."""

import math
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzoo.bases import Basis, BasisName, balance, lifting_basis, regular_basis
from gzoo.groups import Group
from gzoo.nn.expand import ExpandedLayer, along_fibre
from gzoo.nn.resample import Window, resample

if TYPE_CHECKING:
    from escnn.nn import FieldType

Padding = int | Literal["same", "valid"]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class _GroupConv2d(ExpandedLayer):
    """What both convolutions share: window, bias, and the one conv2d."""

    def __init__(
        self,
        group: Group,
        out_fields: int,
        in_per_group: int,
        basis: Basis,
        stride: int,
        padding: Padding,
        dilation: int,
        groups: int,
        bias: bool,
        padding_mode: PaddingMode,
    ) -> None:
        super().__init__(out_fields, in_per_group, basis)
        self.group = group
        self.out_fields = out_fields
        self.stride, self.dilation, self.groups = 2 * (stride,), 2 * (dilation,), groups  # as networks read nn.Conv2d's
        self.window = window_of(self.kernel_size, stride, padding, dilation)
        self.padding_mode = padding_mode
        self.bias = nn.Parameter(torch.empty(self.out_fields)) if bias else None
        self.standardize: nn.Module | None = None  # of `WeightStandardization`
        self.residual: nn.Parameter | None = None  # of a soft network: a plain filter beside the equivariant one
        self.reset_parameters()

    @property
    def fan_in(self) -> int:
        """How many inputs one output sums up."""
        return self.weight[0].numel()

    def reset_parameters(self) -> None:
        """Draws kernels that keep the variance through a ReLU (He et al. 2015, arXiv:1502.01852, equation 10).

        In the steerable basis that of white noise and that of constant maps; what lies between gains up to 15% a layer.
        """
        nn.init.normal_(self.weight, std=math.sqrt(2 / self.fan_in))
        with torch.no_grad():
            self.weight.mul_(balance(self.basis))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def channel_bias(self) -> Tensor | None:
        """The bias of each channel out."""
        return None if self.bias is None else along_fibre(self.bias, self.group.order)

    def full_filter(self) -> Tensor:
        """What x is convolved with: the expanded filter, standardized and softened where that is asked for."""
        filters = self.filter() if self.standardize is None else self.standardize(self.filter())
        return filters if self.residual is None else filters + self.residual

    def _convolve(self, x: Tensor) -> Tensor:
        return convolve(x, self.full_filter(), self.channel_bias(), self.window, self.padding_mode, self.groups)

    @property
    def out_type(self) -> "FieldType":
        """The result's escnn type: ``out_fields`` regular fields."""
        return self.group.field_type(self.out_fields)

    def extra_repr(self) -> str:
        return (
            f"{self.group.name}, {tuple(self.weight.shape)}, stride={self.window.stride}, "
            f"padding={self.window.padding / 2:g}, dilation={self.window.dilation}, groups={self.groups}, "
            f"bias={self.bias is not None}"
        )


class LiftingConv2d(_GroupConv2d):
    """Lifting convolution: an image to regular fields. Each kernel is applied in all |G| poses.

    Exact for groups on the pixel grid, at every image size: strides follow the rule of `gzoo.nn.resample`. For finer
    rotations exact for the turns that fit the grid, and for the others up to sampling at pixels.

    Args:
        group: any point group.
        in_channels: channels of the image (trivial fields).
        out_fields: number of regular fields.
        kernel_size: side of the square kernel in pixels, odd or even. Or height and width in the pose of the identity,
            which differ by an even number: then the filter is the square of the longer side, zero around the kernel,
            and ``padding`` is that of the square. Off the pixel grid the kernel fills that square.
        stride: in pixels.
        padding: pixels on either side; "same" keeps the size at stride 1, "valid" is 0.
        dilation: pixels between taps.
        groups: as in ``nn.Conv2d``; divides in_channels and out_fields.
        bias: whether each field has one.
        padding_mode: as in ``nn.Conv2d``.
        basis: of the kernels: "pixel", "steerable" (the band-limited filters of ``escnn.nn.R2Conv``) or "steerable_3r"
            (a higher band limit); None for pixel where the group is on the grid, else steerable. See `gzoo.bases`.

    Shape:
        x: (B, in_channels, H, W); result: (B, out_fields * |G|, H', W') with H', W' as of ``nn.Conv2d``.
        weight: (out_fields, in_channels / groups, k, k); (out_fields, in_channels / groups, 1, functions) if steerable.

    Raises:
        ValueError: groups do not divide the widths; the group has no such basis; x has other channels.

    Source: Cohen & Welling 2016, arXiv:1602.07576, equation 10.
    """

    def __init__(
        self,
        group: Group,
        in_channels: int,
        out_fields: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        padding: Padding = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        basis: BasisName | None = None,
    ) -> None:
        _require_divisible(groups, in_channels, out_fields)
        kernels = _framed(lifting_basis(group, _side(kernel_size), basis), kernel_size)
        inputs = in_channels // groups
        super().__init__(group, out_fields, inputs, kernels, stride, padding, dilation, groups, bias, padding_mode)
        self.in_channels = in_channels

    @property
    def in_type(self) -> "FieldType":
        """The image's escnn type: ``in_channels`` trivial fields."""
        return self.group.image_type(self.in_channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"the image has shape {tuple(x.shape)}, not (B, {self.in_channels}, H, W); give it {self.in_channels} "
                f"channels, or create the model with in_chans={x.shape[1] if x.ndim == 4 else '...'}"
            )
        return self._convolve(x)


class GroupConv2d(_GroupConv2d):
    """Group convolution: regular fields to regular fields.

    Exact as `LiftingConv2d`; with a 1x1 kernel exact for every group.

    Args:
        group: any point group.
        in_fields: number of regular fields in.
        out_fields: number of regular fields out.
        groups: divides both; ``groups=in_fields`` is depthwise: a field sees its own |G| channels only.

        The others are those of `LiftingConv2d`.

    Shape:
        x: (B, in_fields * |G|, H, W); result: (B, out_fields * |G|, H', W') with H', W' as of ``nn.Conv2d``.
        weight: (out_fields, in_fields / groups, |G|, k, k); (out_fields, in_fields / groups, |G|, functions) if
        steerable.

    Raises:
        ValueError: as `LiftingConv2d`.

    Source: Cohen & Welling 2016, arXiv:1602.07576, equation 11.
    """

    def __init__(
        self,
        group: Group,
        in_fields: int,
        out_fields: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        padding: Padding = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        basis: BasisName | None = None,
    ) -> None:
        _require_divisible(groups, in_fields, out_fields)
        kernels = _framed(regular_basis(group, _side(kernel_size), basis), kernel_size)
        inputs = in_fields // groups
        super().__init__(group, out_fields, inputs, kernels, stride, padding, dilation, groups, bias, padding_mode)
        self.in_fields = in_fields

    @property
    def in_channels(self) -> int:
        """Channels of x, which timm's code reads."""
        return self.in_fields * self.group.order

    @property
    def in_type(self) -> "FieldType":
        """The input's escnn type: ``in_fields`` regular fields."""
        return self.group.field_type(self.in_fields)

    def forward(self, x: Tensor) -> Tensor:
        require_fields(x, 1, self.in_fields, self.group)
        return self._convolve(x)


class GroupMapLinear(GroupConv2d):
    """Linear map of a flattened map, a vector of all its pixels: a group convolution whose window is the whole map.

    Exact as `GroupConv2d`.

    Args:
        group: any point group.
        in_fields: number of regular fields in.
        out_fields: number of regular fields out.
        side: of the map, in pixels.
        bias: whether each field has one.
        basis: of the kernels, as of `GroupConv2d`.

    Shape:
        x: (B, in_fields * |G| * side * side); result: (B, out_fields * |G|). weight: as of `GroupConv2d`.

    Raises:
        ValueError: x has another length.
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
        super().__init__(group, in_fields, out_fields, side, bias=bias, basis=basis)

    def forward(self, x: Tensor) -> Tensor:
        side = self.kernel_size
        if x.shape[1] != self.in_channels * side**2:
            raise ValueError(
                f"a map of {self.in_channels} channels and {side}x{side} pixels has {self.in_channels * side**2} "
                f"numbers, not {x.shape[1]}; give images of the size that the network was made for"
            )
        return super().forward(x.unflatten(1, (self.in_channels, side, side))).flatten(1)


def window_of(kernel_size: int, stride: int, padding: Padding, dilation: int) -> Window:
    """The window of a convolution, whose padding may be given as in ``nn.Conv2d``."""
    words = {"same": dilation * (kernel_size - 1), "valid": 0}
    if isinstance(padding, str) and padding not in words:
        raise ValueError(f"padding is {padding!r}; accepted are pixels on each side, 'same' and 'valid'")
    return Window(kernel_size, stride, words[padding] if isinstance(padding, str) else 2 * padding, dilation)


def convolve(
    x: Tensor, filters: Tensor, bias: Tensor | None, window: Window, padding_mode: PaddingMode, groups: int = 1
) -> Tensor:
    """The one conv2d of a layer, behind the symmetric resampling."""
    x, padding, stride = resample(x, window)
    if padding_mode != "zeros":
        x, padding = F.pad(x, 4 * (padding,), mode=padding_mode), 0
    return F.conv2d(x, filters, bias, stride, padding, window.dilation, groups)


def require_fields(x: Tensor, dim: int, fields: int, group: Group) -> None:
    """Raises ValueError if dimension ``dim`` of x does not hold ``fields`` regular fields of ``group``."""
    if x.shape[dim] != fields * group.order:
        raise ValueError(
            f"x of shape {tuple(x.shape)} has {x.shape[dim]} channels, not {fields} fields * |G| = {group.order}; "
            "lift an image with LiftingConv2d first"
        )


def _require_divisible(groups: int, *widths: int) -> None:
    for width in widths:
        if width % groups:
            low = width - width % groups
            near = f"{low} or {low + groups}" if low else f"{groups}"
            raise ValueError(f"groups={groups} does not divide a width of {width}; the nearest that works: {near}")


def _side(kernel_size: int | tuple[int, int]) -> int:
    """Side of the square that a kernel stays in when it is turned."""
    if isinstance(kernel_size, int):
        return kernel_size
    if (kernel_size[0] - kernel_size[1]) % 2:
        raise ValueError(
            f"kernel_size={kernel_size}: height and width must both be odd or both be even, or the kernel has no place "
            "in the middle of a square"
        )
    return max(kernel_size)


def _framed(basis: Basis, kernel_size: int | tuple[int, int]) -> Basis:
    """``basis`` with parameters for the pixels of the kernel only."""
    if isinstance(kernel_size, int) or basis.samples is not None:
        return basis
    return basis._replace(parameters=(*basis.parameters[:-2], *kernel_size))
