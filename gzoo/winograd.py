"""Convolutions of 3x3 and 5x5 with a quarter and a sixth of the multiplications, to train in float32 on a CPU.

Winograd's F(4x4, 3x3): 4x4 pixels of the result follow from 6x6 of the image, and where the sum over the window
multiplies 16 * 9 = 144 numbers for them, 36 products of transformed pixels and transformed weights do; F(4x4, 5x5)
takes 64 in place of 400. A CPU spends nearly all of its time on these multiplications when it trains a G-CNN. The
convolution stays the same up to rounding, of 1e-5 of the largest value in float32 (2e-5 for 5x5), and so does the
symmetry.

Source: Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, sections 4.1 and 4.3.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

_TILE = 4
_LEAST_CHANNELS = 32  # below, to transform costs more than it saves
_POINTS = (0, 1, -1, 2, -2, 0.5, -0.5)  # those that cost float32 the least

_Matrix = tuple[tuple[float, ...], ...]


class _Transforms(NamedTuple):
    """The matrices of F(4, kernel) for tiles of n = kernel + 3 pixels, named by what they act on."""

    image: _Matrix  # (n, n), the paper's B^T
    image_adjoint: _Matrix
    weight: _Matrix  # (n, kernel), its G
    result: _Matrix  # (4, n), its A^T
    result_adjoint: _Matrix


def _transforms(kernel: int) -> _Transforms:
    """By Toom and Cook: polynomials are multiplied by their values at n - 1 points and at infinity, here transposed."""
    points = np.array(_POINTS[: kernel + 2])
    others = [np.delete(points, i) for i in range(len(points))]
    image = np.array([[*np.poly(zeros)[::-1], 0] for zeros in others] + [np.poly(points)[::-1]])
    values = np.vander(points, _TILE, increasing=True)
    result = np.vstack([values, np.eye(_TILE)[-1]]).T
    scales = [np.prod(point - zeros) for point, zeros in zip(points, others, strict=True)]
    values = np.vander(points, kernel, increasing=True) / np.array(scales)[:, None]
    weight = np.vstack([values, np.eye(kernel)[-1]])
    matrices = (image, image.T, weight, result, result.T)
    return _Transforms(*(tuple(tuple(row) for row in matrix.tolist()) for matrix in matrices))


_TRANSFORMS = {kernel: _transforms(kernel) for kernel in (3, 5)}


def _times(matrix: _Matrix, values: Sequence[Tensor]) -> list[Tensor]:
    """As sums of tensors, which torch.compile makes one pass over memory of."""
    return [
        sum(factor * value for factor, value in zip(row, values, strict=True) if factor)  # type: ignore[misc]
        for row in matrix
    ]


def _on_rows_and_columns(matrix: _Matrix, grid: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    columns = [_times(matrix, column) for column in zip(*grid, strict=True)]
    return [value for row in zip(*columns, strict=True) for value in _times(matrix, row)]


def _transform_image(x: Tensor, kernel: int) -> Tensor:
    """(B, H, W, C), H and W multiples of 4, to (n * n, tiles, C)."""
    height, width, channels = x.shape[1:]
    n, halo = kernel + 3, kernel // 2
    x = F.pad(x, (0, 0, halo, halo, halo, halo))
    grid = [[x[:, i : i + height : _TILE, j : j + width : _TILE] for j in range(n)] for i in range(n)]
    return torch.stack(_on_rows_and_columns(_TRANSFORMS[kernel].image, grid)).reshape(n * n, -1, channels)


def _transform_image_adjoint(v: Tensor, kernel: int, shape: tuple[int, ...]) -> Tensor:
    batch, height, width, channels = shape
    n = kernel + 3
    v = v.reshape(n, n, batch, height // _TILE, width // _TILE, channels)
    flat = _on_rows_and_columns(_TRANSFORMS[kernel].image_adjoint, list(v))
    grid = [flat[n * i : n * i + n] for i in range(n)]
    columns = [_overlap(column, kernel // 2, 1) for column in zip(*grid, strict=True)]
    return _assemble([pixel for row in zip(*columns, strict=True) for pixel in _overlap(row, kernel // 2, 2)])


def _overlap(d: Sequence[Tensor], halo: int, dim: int) -> list[Tensor]:
    """The n rows of each tile to its own four: the first and the last ``halo`` are pixels of the tiles beside it."""
    rest, none = d[0].shape[dim] - 1, torch.zeros_like(d[0].narrow(dim, 0, 1))
    own = list(d[halo : halo + _TILE])
    for i in range(halo):
        own[i] = own[i] + torch.cat([none, d[halo + _TILE + i].narrow(dim, 0, rest)], dim)
        own[i - halo] = own[i - halo] + torch.cat([d[i].narrow(dim, 1, rest), none], dim)
    return own


def _assemble(pixels: list[Tensor]) -> Tensor:
    """16 tensors (B, H/4, W/4, C), a pixel of all tiles each, to (B, H, W, C)."""
    y = torch.stack([torch.stack(pixels[4 * i : 4 * i + 4], 3) for i in range(4)], 2)
    batch, rows, _, columns, _, channels = y.shape
    return y.reshape(batch, _TILE * rows, _TILE * columns, channels)


def _transform_result(m: Tensor, kernel: int, shape: tuple[int, ...]) -> Tensor:
    batch, height, width, channels = shape
    n = kernel + 3
    m = m.reshape(n, n, batch, height // _TILE, width // _TILE, channels)
    return _assemble(_on_rows_and_columns(_TRANSFORMS[kernel].result, list(m)))


def _transform_result_adjoint(y: Tensor, kernel: int) -> Tensor:
    batch, height, width, channels = y.shape
    tiles = y.reshape(batch, height // _TILE, _TILE, width // _TILE, _TILE, channels)
    grid = [[tiles[:, :, i, :, j] for j in range(_TILE)] for i in range(_TILE)]
    products = _on_rows_and_columns(_TRANSFORMS[kernel].result_adjoint, grid)
    return torch.stack(products).reshape(len(products), -1, channels)


@cache
def _compiled(function: Callable[..., Tensor], kernel: int, shape: tuple[int, ...]) -> Callable[..., Tensor]:
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
    """conv2d of x (B, I, H, W) and weight (O, I, K, K) with padding K // 2, for K of 3 or 5."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        kernel = weight.shape[3]
        to_filter = weight.new_tensor(_TRANSFORMS[kernel].weight)
        to_filter = torch.kron(to_filter, to_filter)
        filters = (to_filter @ weight.flatten(2).flatten(0, 1).T).unflatten(1, weight.shape[:2]).mT
        tiles = _to_tiles(x)
        image = _compiled(_transform_image, kernel, tiles.shape)(tiles, kernel)
        ctx.save_for_backward(x, image, filters, to_filter)
        shape = (*tiles.shape[:3], len(weight))
        return _from_tiles(_compiled(_transform_result, kernel, shape)(image @ filters, kernel, shape), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, image, filters, to_filter = ctx.saved_tensors
        kernel = math.isqrt(to_filter.shape[1])
        tiles = _to_tiles(gradients[0])
        result = _compiled(_transform_result_adjoint, kernel, tiles.shape)(tiles, kernel)
        for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            shape = (*tiles.shape[:3], x.shape[1])
            transform = _compiled(_transform_image_adjoint, kernel, shape)
            for_x = _from_tiles(transform(result @ filters.mT, kernel, shape), x)
        if ctx.needs_input_grad[1]:
            for_filters = (result.mT @ image).flatten(1)  # (n * n, O * I)
            for_weight = (for_filters.T @ to_filter).reshape(result.shape[2], x.shape[1], kernel, kernel)
        return for_x, for_weight


class Winograd(TorchFunctionMode):
    """While it is entered, convolutions in float32 on a CPU take a quarter or a sixth of the multiplications.

    Those with kernels of 3x3 and padding 1 or 5x5 and padding 2, stride, dilation and groups 1 and at least 32 channels
    on both sides; all others stay as they are. Gradients take the short way too, but cannot be differentiated again::

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
    halo = weight.shape[-1] // 2
    return (
        weight.shape[2:] in ((3, 3), (5, 5))
        and padding in (halo, (halo, halo))
        and all(setting in (1, (1, 1)) for setting in (stride, dilation, groups))
        and min(weight.shape[:2]) >= _LEAST_CHANNELS
        and x.dim() == 4
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")  # the products would be rounded to half precision
    )
