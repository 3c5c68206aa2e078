"""Symmetric resampling: window operations (convolution, pooling) that commute with the group at every image size.

A window of k pixels, stride s and padding p on either side covers n pixels symmetrically only if (n + 2p - k) % s == 0;
otherwise the last pixels on one side are dropped, and the result of a turned image is not the turned result. The rule
keeps the output size m of the plain operation and puts the windows in the middle: they read n' = (m - 1) s + k - 2p
samples, one pixel apart, about the centre of the image. Where n - n' is even these are pixels, and as many are left out
on one side as on the other. Where it is odd they lie between two pixels and are their mean, everywhere alike. (Bilinear
resampling from n to n' is as exact for quarter turns, but blurs the middle of the image more than its border, which
other rotations notice: the tests compare.) Each axis is treated alone.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)  # torch.compile of torch 2.5 and 2.7 reads no property of a named tuple
class Window:
    """A window operation along one axis, in pixels. Both axes share it, or a quarter turn would mix them up.

    ``padding`` is the sum over both ends. An odd sum, as "same" padding with an even kernel has, is rounded up and
    the input has one sample less. If not ``symmetric`` nothing is resampled: see `keep_original_strides`.
    """

    kernel: int
    stride: int
    padding: int
    dilation: int = 1
    ceil_mode: bool = False
    symmetric: bool = True

    @property
    def extent(self) -> int:
        """Pixels from the first to the last tap."""
        return self.dilation * (self.kernel - 1) + 1

    def output_size(self, size: int) -> int:
        """Output pixels of the plain operation on ``size`` pixels, as torch counts them."""
        room = size + self.padding - self.extent
        if not self.ceil_mode:
            return room // self.stride + 1
        count = -(-room // self.stride) + 1
        starts_inside = (count - 1) * self.stride < size + self.padding // 2
        return count if starts_inside else count - 1


def resample(x: Tensor, window: Window) -> tuple[Tensor, int, int]:
    """The samples of x that ``window`` reads if it is put in the middle, the padding for either side, and the stride.

    Where the window is one pixel, what comes back are only the pixels that it reads, and the stride is 1. It is 1 as
    well where the window fits once.

    Args:
        x: (B, C, H, W).
        window: the operation that will follow, with the padding and the stride that are returned.

    Raises:
        ValueError: the map is smaller than the window.
    """
    if not window.symmetric:
        return x, (window.padding + 1) // 2, window.stride
    height, width = x.shape[-2:]
    # Each side by itself: the smaller of two is one of them alone in an export for any size.
    fits = all(side + window.padding >= window.extent for side in (height, width))
    if window.stride == 1 and window.padding % 2 == 0 and fits:
        return x, window.padding // 2, 1  # fits everywhere
    counts = window.output_size(height), window.output_size(width)
    padding = (window.padding + 1) // 2
    size = [(count - 1) * window.stride + window.extent - 2 * padding for count in counts]
    if any(n < 1 for n in size):  # a single pixel under an even kernel: pad less, and go on beyond the border
        padding = window.padding // 2
        size = [(count - 1) * window.stride + window.extent - 2 * padding for count in counts]
    if any(n < 1 for n in (*counts, *size)):
        raise ValueError(
            f"a map of {height}x{width} pixels is too small for a window of {window.extent} pixels with "
            f"{window.padding} pixels of padding in all; give the network a larger image"
        )
    if window.extent == 1 and not padding:
        return centre(x, size, window.stride), 0, 1
    # torch's strided convolution of 1 pixel in bfloat16 leaves part of the gradient of its weight unwritten on a CPU.
    return centre(x, size), padding, window.stride if any(n > 1 for n in counts) else 1


def centre(x: Tensor, size: list[int], step: int = 1) -> Tensor:
    """Every ``step``-th of ``size`` samples of (B, C, H, W), one pixel apart, in the middle of it."""
    if torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export():
        x = _require_size(x, int(x.shape[2]), int(x.shape[3]))
    for axis, n in enumerate(size, start=2):
        spare = x.shape[axis] - n
        if spare < 0:  # the border goes on
            more = (1 - spare) // 2
            x, spare = F.pad(x, (0, 0, more, more) if axis == 2 else (more, more, 0, 0), mode="replicate"), spare % 2
        if spare % 2:
            if not x.is_floating_point():
                raise ValueError(
                    f"an even and an odd number of pixels meet in a map of {x.dtype}, which has no means of two "
                    "pixels; turn it into floating-point numbers first"
                )
            left, right = (_every(step, x.narrow(axis, spare // 2 + shift, n), axis) for shift in (0, 1))
            x = (left + right).mul_(0.5)
        else:
            x = _every(step, x.narrow(axis, spare // 2, n) if spare else x, axis)
    return x


@torch.jit.script_if_tracing
def _require_size(x: Tensor, height: int, width: int) -> Tensor:
    """x; a traced network, whose ways do not depend on the size any more, raises RuntimeError at another."""
    if x.shape[2] != height or x.shape[3] != width:
        raise RuntimeError("the network was traced at another size of images; torch.export takes dynamic shapes")
    return x


def _every(step: int, x: Tensor, axis: int) -> Tensor:
    if step == 1:
        return x
    return x[:, :, ::step] if axis == 2 else x[..., ::step]


class SymmetricPool2d(nn.Module):
    """A pool behind the symmetric resampling rule. Acts on each channel, so any field type passes.

    Args:
        pool: ``nn.MaxPool2d`` or ``nn.AvgPool2d`` with a square window, or a module that treats each channel alike.
        window: of another module than those two.

    Shape:
        x: (B, C, H, W); result: (B, C, H', W') with the size that ``pool`` itself would give. With ``return_indices``
        also what `SymmetricUnpool2d` reads in place of indices: the share of each pixel in the maximum of its window.

    Raises:
        ValueError: kernel, stride or padding differ between the axes; with ``return_indices`` windows overlap or leave
            pixels out; or x is smaller than the window.
    """

    def __init__(self, pool: nn.Module, window: Window | None = None) -> None:
        super().__init__()
        self.pool = pool
        self.window = window or _window(pool)
        self.gives_shares = bool(getattr(pool, "return_indices", False))
        if self.gives_shares:
            _require_side_by_side(self.window)

    def forward(self, x: Tensor) -> Any:
        x, padding, _ = resample(x, self.window)
        if self.window.extent == 1 and self.window.symmetric:
            return x
        pool: Any = self.pool
        if padding < (self.window.padding + 1) // 2:  # rounded down, for a single pixel
            pool = copy.copy(pool)
            pool.padding = padding
        if not self.gives_shares:
            return pool(x)
        y, _ = pool(x)
        side = self.window.kernel
        is_maximum = (x == _enlarge(y, side)).to(x)
        return y, is_maximum / _enlarge(F.avg_pool2d(is_maximum, side, divisor_override=1), side)


class SymmetricUnpool2d(nn.Module):
    """Undoes a max pool of `SymmetricPool2d`: puts numbers where the maxima were, and zero elsewhere.

    Torch puts each on the first of equal maxima, which a turned image has elsewhere; behind a ReLU many windows are all
    zero. Here equal maxima share it.

    Args:
        plain: a ``nn.MaxUnpool2d`` whose windows lie side by side.

    Shape:
        x, shares: (B, C, H, W) and (B, C, k H, k W), as that pool with ``return_indices=True`` gives them; result:
        (B, C, H', W') of ``output_size``, else (B, C, k H, k W).

    Raises:
        ValueError: kernel or stride differ between the axes, or windows overlap or leave pixels out.

    Source: Badrinarayanan et al. 2017, arXiv:1511.00561, section 3.1.
    """

    def __init__(self, plain: nn.MaxUnpool2d) -> None:
        super().__init__()
        self.kernel_size = square(plain.kernel_size, "kernel_size")
        _require_side_by_side(_window(plain))

    def forward(self, x: Tensor, shares: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        y = _enlarge(x, self.kernel_size) * shares
        return y if output_size is None else centre(y, list(output_size[-2:]))

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}"


def _require_side_by_side(window: Window) -> None:
    """Raises ValueError unless each pixel is in one window."""
    if window.kernel != window.stride or window.padding or window.dilation > 1:
        raise ValueError(
            f"kernel_size {window.kernel}, stride {window.stride}, padding {window.padding // 2} and dilation "
            f"{window.dilation} overlap or leave pixels out, so maxima have no place of their own to return to; use a "
            "stride of kernel_size and no padding"
        )


def _enlarge(x: Tensor, times: int) -> Tensor:
    return x.repeat_interleave(times, 2).repeat_interleave(times, 3)


class SymmetricBlur2d(nn.Module):
    """A fixed blur with a stride, behind the symmetric resampling rule. Acts on each channel alike.

    Exact for the group if ``kernel`` itself is symmetric, as a Gaussian is.

    Args:
        kernel: what each channel is convolved with, (k, k).
        stride: in pixels.
        padding: pixels on either side.

    Shape:
        x: (B, C, H, W); result: (B, C, H', W') with H', W' as of ``nn.Conv2d``.

    Raises:
        ValueError: x is smaller than the window.

    Source: Zhang 2019, arXiv:1904.11486.
    """

    def __init__(self, kernel: Tensor, stride: int, padding: int) -> None:
        super().__init__()
        self.kernel: Tensor
        self.register_buffer("kernel", kernel)
        self.window = Window(kernel.shape[-1], stride, 2 * padding)

    def forward(self, x: Tensor) -> Tensor:
        x, padding, stride = resample(x, self.window)
        channels = x.shape[1]
        return F.conv2d(x, self.kernel.expand(channels, 1, -1, -1), None, stride, padding, groups=channels)


def require_strides(strides: str) -> None:
    """Raises ValueError unless it is one of the two kinds of strides that imported networks have."""
    if strides not in ("symmetric", "original"):
        raise ValueError(f"strides is {strides!r}; accepted are 'symmetric' and 'original'")


def keep_original_strides(model: nn.Module) -> nn.Module:
    """Lets every window in ``model`` drop the pixels that its stride does not reach, as plain torch does; in place.

    For weights that were trained so. The result is not equivariant at sizes where windows do not fit.
    """
    for module in model.modules():
        window = getattr(module, "window", None)
        if isinstance(window, Window):
            module.window = replace(window, symmetric=False)  # type: ignore[assignment]  # no submodule
    return model


def _window(pool: Any) -> Window:
    return Window(
        kernel=square(pool.kernel_size, "kernel_size"),
        stride=square(pool.stride, "stride"),
        padding=2 * square(pool.padding, "padding"),
        dilation=square(getattr(pool, "dilation", 1), "dilation"),
        ceil_mode=getattr(pool, "ceil_mode", False),
    )


def square(value: int | tuple[int, ...], what: str) -> int:
    """The one value of an int or a pair of equal ints.

    Raises:
        ValueError: the two differ.
    """
    if isinstance(value, int):
        return value
    if len(set(value)) != 1:
        raise ValueError(
            f"{what}={tuple(value)} differs between the axes, which a quarter turn exchanges; use one value"
        )
    return value[0]
