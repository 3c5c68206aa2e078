"""Convolutions of 3x3 with a quarter of the multiplications, to train in float32 on a CPU.

Winograd's F(4x4, 3x3): 4x4 pixels of the result follow from 6x6 of the image, and where the sum over the window
multiplies 16 * 9 = 144 numbers for them, 36 products of transformed pixels and transformed weights do. A CPU spends
nearly all of its time on these multiplications when it trains a G-CNN. The convolution stays the same up to rounding,
of 1e-5 of the largest value in float32, and so does the symmetry.

Source: Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4.3.
"""

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

_TILE = 4
_LEAST_CHANNELS = 32  # below, to transform costs more than it saves
_FILTER = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]  # G of the paper, in 24ths


# The paper's other two matrices, and their transposes for the gradient, as sums: few of their entries are not zero.


def _image(d: list[Tensor]) -> list[Tensor]:
    even, odd = d[4] - 4 * d[2], d[3] - 4 * d[1]
    second, twice = d[4] - d[2], 2 * (d[3] - d[1])
    first, last = 4 * d[0] - 5 * d[2] + d[4], 4 * d[1] - 5 * d[3] + d[5]
    return [first, even + odd, even - odd, second + twice, second - twice, last]


def _image_adjoint(v: list[Tensor]) -> list[Tensor]:
    s, t, p, q = v[1] + v[2], v[1] - v[2], v[3] + v[4], v[3] - v[4]
    first, middle = 4 * v[0], v[0] + s + p
    return [first, 4 * v[5] - 4 * t - 2 * q, -5 * v[0] - 4 * s - p, t + 2 * q - 5 * v[5], middle, v[5]]


def _result(m: list[Tensor]) -> list[Tensor]:
    s, t, p, q = m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4]
    return [m[0] + s + p, t + 2 * q, s + 4 * p, t + 8 * q + m[5]]


def _result_adjoint(y: list[Tensor]) -> list[Tensor]:
    s, t, p, q = y[0] + y[2], y[1] + y[3], y[0] + 4 * y[2], 2 * y[1] + 8 * y[3]
    return [y[0], s + t, s - t, p + q, p - q, y[3]]


def _on_rows_and_columns(transform: Callable[[list[Tensor]], list[Tensor]], grid: list[list[Tensor]]) -> list[Tensor]:
    columns = [transform(list(column)) for column in zip(*grid, strict=True)]
    return [value for row in zip(*columns, strict=True) for value in transform(list(row))]


def _transform_image(x: Tensor) -> Tensor:
    """(B, H, W, C), H and W multiples of 4, to (36, tiles, C)."""
    height, width, channels = x.shape[1:]
    x = F.pad(x, (0, 0, 1, 1, 1, 1))
    grid = [[x[:, i : i + height : _TILE, j : j + width : _TILE] for j in range(6)] for i in range(6)]
    return torch.stack(_on_rows_and_columns(_image, grid)).reshape(36, -1, channels)


def _transform_image_adjoint(v: Tensor, shape: tuple[int, ...]) -> Tensor:
    batch, height, width, channels = shape
    v = v.reshape(6, 6, batch, height // _TILE, width // _TILE, channels)
    flat = _on_rows_and_columns(_image_adjoint, [list(row) for row in v])
    grid = [flat[6 * i : 6 * i + 6] for i in range(6)]
    columns = [_overlap(list(column), 1) for column in zip(*grid, strict=True)]
    return _assemble([pixel for row in zip(*columns, strict=True) for pixel in _overlap(list(row), 2)])


def _overlap(d: list[Tensor], dim: int) -> list[Tensor]:
    """Six rows of each tile to its own four: the first and the last are pixels of the tiles beside it."""
    rest, none = d[0].shape[dim] - 1, torch.zeros_like(d[0].narrow(dim, 0, 1))
    above, below = d[5].narrow(dim, 0, rest), d[0].narrow(dim, 1, rest)
    return [d[1] + torch.cat([none, above], dim), d[2], d[3], d[4] + torch.cat([below, none], dim)]


def _assemble(pixels: list[Tensor]) -> Tensor:
    """16 tensors (B, H/4, W/4, C), a pixel of all tiles each, to (B, H, W, C)."""
    y = torch.stack([torch.stack(pixels[4 * i : 4 * i + 4], 3) for i in range(4)], 2)
    batch, rows, _, columns, _, channels = y.shape
    return y.reshape(batch, _TILE * rows, _TILE * columns, channels)


def _transform_result(m: Tensor, shape: tuple[int, ...]) -> Tensor:
    batch, height, width, _ = shape
    m = m.reshape(6, 6, batch, height // _TILE, width // _TILE, m.shape[2])
    return _assemble(_on_rows_and_columns(_result, [list(row) for row in m]))


def _transform_result_adjoint(y: Tensor) -> Tensor:
    batch, height, width, channels = y.shape
    tiles = y.reshape(batch, height // _TILE, _TILE, width // _TILE, _TILE, channels)
    grid = [[tiles[:, :, i, :, j] for j in range(_TILE)] for i in range(_TILE)]
    return torch.stack(_on_rows_and_columns(_result_adjoint, grid)).reshape(36, -1, channels)


@cache
def _compiled(function: Callable[..., Tensor], shape: tuple[int, ...]) -> Callable[..., Tensor]:
    # By a copy of its code for each shape: torch.compile counts the shapes of a code, and after eight it gives up.
    return torch.compile(FunctionType(function.__code__.replace(), function.__globals__), dynamic=False)


def _to_tiles(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H, W, C), with zeros up to whole tiles; a view of a channels_last x of whole tiles."""
    x = F.pad(x, (0, -x.shape[3] % _TILE, 0, -x.shape[2] % _TILE))
    return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def _from_tiles(y: Tensor, like: Tensor) -> Tensor:
    y = y.permute(0, 3, 1, 2)[:, :, : like.shape[2], : like.shape[3]]
    nhwc = like.is_contiguous(memory_format=torch.channels_last)
    return y.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)


class _Convolution(torch.autograd.Function):
    """conv2d of x (B, I, H, W) and weight (O, I, 3, 3) with padding 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        to_filter = weight.new_tensor(_FILTER) / 24
        to_filter = torch.kron(to_filter, to_filter)
        filters = (to_filter @ weight.flatten(2).flatten(0, 1).T).unflatten(1, weight.shape[:2]).mT
        tiles = _to_tiles(x)
        image = _compiled(_transform_image, tiles.shape)(tiles)
        ctx.save_for_backward(x, image, filters, to_filter)
        shape = (*tiles.shape[:3], len(weight))
        return _from_tiles(_compiled(_transform_result, shape)(image @ filters, shape), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, image, filters, to_filter = ctx.saved_tensors
        tiles = _to_tiles(gradients[0])
        result = _compiled(_transform_result_adjoint, tiles.shape)(tiles)
        for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            shape = (*tiles.shape[:3], x.shape[1])
            for_x = _from_tiles(_compiled(_transform_image_adjoint, shape)(result @ filters.mT, shape), x)
        if ctx.needs_input_grad[1]:
            for_filters = (result.mT @ image).flatten(1)  # (36, O * I)
            for_weight = (for_filters.T @ to_filter).reshape(result.shape[2], x.shape[1], 3, 3)
        return for_x, for_weight


class Winograd(TorchFunctionMode):
    """While it is entered, convolutions in float32 on a CPU take a quarter of the multiplications.

    Those with kernels of 3x3, stride, dilation and groups 1, padding 1 and at least 32 channels on both sides; all
    others stay as they are. Gradients take the short way too, but cannot be differentiated again::

        with Winograd():
            loss = loss_function(model(images), labels)
        loss.backward()

    The transforms are compiled by torch.compile, which needs a C++ compiler and half a minute for each shape that it
    meets first; so enter it where steps are many and images of one size, and not around what torch.compile made.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.conv2d and not kwargs and len(args) == 7 and _applies(*args):
            x, weight, bias = args[:3]
            y = _Convolution.apply(x, weight)
            return y if bias is None else y + bias[:, None, None]
        return func(*args, **kwargs or {})


def _applies(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> bool:
    return (
        all(setting in (1, (1, 1)) for setting in (stride, padding, dilation, groups))
        and weight.shape[2:] == (3, 3)
        and min(weight.shape[:2]) >= _LEAST_CHANNELS
        and x.dim() == 4
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
    )
