"""Small images, kept on the device as one tensor and augmented there a whole batch at a time.

`BatchTransform` does to a batch what `gzoo.data.train_transform` does to one PIL image: the same options in the same
order, each image with random numbers of its own, and the same pixels to within the grey levels that PIL rounds away.
So rotation and crop stay two resamplings, as there. Torchvision's transforms draw one set of numbers for a whole batch
and its sampling is not PIL's, hence the three operations below. Source: Pillow's `transform`, `resize` and
`ImageEnhance`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from gzoo.data import MEMORY_BUDGET, Augmentation, ImageData, mixed_seed, shuffled, to_channels

_TRIES = 10  # of a random box, as in timm

# --- images on the device -------------------------------------------------------------------------------------------


@dataclass
class Resident:
    """An `ImageData` whose images are one tensor on the device."""

    images: Tensor  # (N, C, H, W), uint8
    labels: Tensor  # (N,)
    classes: list[str]
    skipped: list[str]

    def __len__(self) -> int:
        return len(self.labels)


def make_resident(data: ImageData, channels: int, device: torch.device, budget: int = MEMORY_BUDGET) -> Resident:
    """Put all images on the device, with the channels of the model.

    Args:
        budget: the most bytes that they may take.

    Raises:
        ValueError: they are of several sizes, take more than the budget, or have an alpha channel.
    """
    if channels == 4:  # PIL weighs colours by alpha when it resamples
        raise ValueError("augment_batches takes models of 1 or 3 channels, not 4; leave it out")
    convert = to_channels(channels)
    width, height = data[0][0].size
    if (size := len(data) * channels * height * width) > budget:
        raise ValueError(
            f"augment_batches keeps all training images on the device: {len(data)} of {height}x{width} pixels are "
            f"{size / 2**20:.0f} MB, {budget / 2**20:.0f} MB is the most; leave it out for large images"
        )
    images = np.empty((len(data), channels, height, width), np.uint8)
    for i in range(len(data)):
        image, _ = data[i]
        if image.size != (width, height):
            raise ValueError(
                f"augment_batches needs images of one size; the first is {height}x{width} pixels and number {i + 1} "
                f"{image.height}x{image.width}; leave it out, or resize the images"
            )
        images[i] = np.asarray(convert(image)).reshape(height, width, channels).transpose(2, 0, 1)
    labels = torch.tensor(data.labels, device=device)
    return Resident(torch.from_numpy(images).to(device), labels, data.classes, data.skipped)


class _ResidentBatches(Dataset):
    """Batches whose random numbers depend on (seed, epoch, first image), like those of `gzoo.data`."""

    def __init__(self, data: Resident, transform: BatchTransform, seed: int) -> None:
        self.data, self.transform, self.seed, self.epoch = data, transform, seed, 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(indices, device=self.data.images.device)
        images = self.transform(self.data.images[chosen], mixed_seed(self.seed, self.epoch, indices[0]))
        return images, self.data.labels[chosen]


def resident_loader(data: Resident, transform: BatchTransform, batch_size: int, seed: int) -> DataLoader:
    """`gzoo.data.train_loader` for images on the device, where the batches are made, too."""
    return shuffled(_ResidentBatches(data, transform, seed), batch_size, seed)


# --- one batch ------------------------------------------------------------------------------------------------------


class BatchTransform:
    """Uint8 images to randomly changed, normalised ones, on the device that they are on.

    Random numbers are drawn on the CPU: a GPU changes the same images in the same way.

    Args:
        config: a data config of `gzoo.data.input_config`.
        augmentation: what changes.

    Shape:
        (B, C, H, W) to (B, C, H', W'), where (C, H', W') is the config's input_size.

    Raises:
        ValueError: an option that has no form for batches; when called, images too small for a padded crop, or to be
            transposed and not square.
    """

    def __init__(self, config: dict[str, Any], augmentation: Augmentation) -> None:
        if augmentation.auto_augment:
            raise ValueError(
                f"auto_augment {augmentation.auto_augment!r} changes single images; leave it out, or augment_batches"
            )
        if config["interpolation"] not in _KERNELS:
            raise ValueError(
                f"augment_batches resizes by {' or '.join(_KERNELS)} interpolation, not {config['interpolation']!r}; "
                f"set interpolation to one of them, or leave augment_batches out"
            )
        self.augmentation, self.interpolation = augmentation, config["interpolation"]
        self.size: tuple[int, int] = tuple(config["input_size"][1:])
        self.mean, self.std = (255 * torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))

    def __call__(self, images: Tensor, seed: int) -> Tensor:
        a, device = self.augmentation, images.device
        generator = torch.Generator().manual_seed(seed)

        def uniform(low: float, high: float, *rows: int) -> Tensor:
            return torch.empty(*rows, len(images)).uniform_(low, high, generator=generator).to(device)

        x = images.float()
        if a.transpose:
            if x.shape[2] != x.shape[3]:
                raise ValueError(
                    f"augment_batches transposes square images, not {x.shape[2]}x{x.shape[3]}; leave transpose out"
                )
            x = torch.where((uniform(0, 1) < a.transpose)[:, None, None, None], x.mT, x)
        if a.turns_or_stretches:
            angles = uniform(-a.rotate, a.rotate).deg2rad()
            zooms = uniform(*a.zoom) if a.zoom else torch.ones_like(angles)
            shears = uniform(-a.shear, a.shear).deg2rad() if a.shear else torch.zeros_like(angles)
            x = affine(x, angles, zooms, shears, self.interpolation)
        if a.crop_padding:
            x = self._padded_crop(x, uniform(0, 1, 2))
        else:
            boxes = crop_boxes(images.shape[2:], *a.resized_crop, uniform(0, 1, 2 * _TRIES + 2))
            x = resized_crop(x, boxes, self.size, self.interpolation)
        for dim, probability in ((3, a.hflip), (2, a.vflip)):
            x = torch.where((uniform(0, 1) < probability)[:, None, None, None], x.flip(dim), x)
        if a.color_jitter:
            factors = uniform(max(0.0, 1 - a.color_jitter), 1 + a.color_jitter, 3)
            x = jitter(x, factors, uniform(0, 1, 3).argsort(0))
        x = (x - self.mean.to(device)) / self.std.to(device)
        if a.re_prob:
            state = random.getstate()
            random.seed(seed)
            x = RandomErasing(a.re_prob, device=device)(x)
            random.setstate(state)
        return x

    def _padded_crop(self, x: Tensor, where: Tensor) -> Tensor:
        """Crop from the image padded by black, at `where` (2, B) between 0, the first position, and 1."""
        padding, (height, width) = self.augmentation.crop_padding, self.size
        short = min(x.shape[2:])
        if short != min(self.size):
            sides = [int(min(self.size) * side / short) for side in x.shape[2:]]
            x = functional.interpolate(x, sides, mode=self.interpolation, antialias=True).clamp(0, 255)
        x = functional.pad(x, [padding] * 4)
        room = (x.shape[2] - height, x.shape[3] - width)
        if min(room) < 0:
            raise ValueError(
                f"a crop of {height}x{width} pixels is larger than the padded images, {x.shape[2]}x{x.shape[3]}; "
                f"raise crop_padding, or set scale in its place"
            )
        top, left = ((u * (r + 1)).long()[:, None] for u, r in zip(where, room, strict=True))
        rows = (top + torch.arange(height, device=x.device))[:, :, None]  # (B, H', 1)
        columns = (left + torch.arange(width, device=x.device))[:, None]  # (B, 1, W')
        image = torch.arange(len(x), device=x.device)[:, None, None]
        return x[image, :, rows, columns].movedim(3, 1).contiguous()


def affine(x: Tensor, angles: Tensor, zooms: Tensor, shears: Tensor, interpolation: str) -> Tensor:
    """Shear each image along its rows, enlarge it and rotate it about its centre; what comes from outside is black.

    Args:
        angles: (B,), in radians, counterclockwise.
        zooms: (B,), above 1 to enlarge.
        shears: (B,), in radians: rows move against each other by the tangent of it.
        interpolation: "bilinear" or "bicubic".

    Shape:
        x and result: (B, C, H, W), 0 to 255.
    """
    height, width = x.shape[2:]
    down = (torch.arange(height, device=x.device) + 0.5 - height / 2)[:, None]  # of pixel centres, from the middle
    right = torch.arange(width, device=x.device) + 0.5 - width / 2
    cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]
    row, column = sin * right + cos * down, cos * right - sin * down  # where each comes from
    zoom = zooms[:, None, None]
    row, column = row / zoom + height / 2, (column + shears.tan()[:, None, None] * row) / zoom + width / 2
    inside = (row >= 0) & (row <= height) & (column >= 0) & (column <= width)
    if interpolation == "bilinear":
        grid = torch.stack([2 * column / width - 1, 2 * row / height - 1], 3)  # -1 and 1 are the edges of the image
        turned = functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
    else:
        turned = _bicubic(x, row - 0.5, column - 0.5)
    return turned * inside[:, None]  # PIL blends with black nowhere: it is the image or black


def _bicubic(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """x (B, C, H, W) at `row` and `column` (B, H', W'), counted from the first pixel's centre, as PIL rotates.

    PIL has Keys' kernel with a = -1 here, and a = -1/2 where it resizes; `grid_sample` has -3/4.
    """
    x, image = x.movedim(1, 3), torch.arange(len(x), device=x.device)[:, None, None]
    taps = []
    for position, side in zip((row, column), x.shape[1:3], strict=True):
        near = [position.floor() + k for k in range(-1, 3)]
        taps.append([(pixel.clamp(0, side - 1).long(), _keys(position - pixel, -1)) for pixel in near])
    total = torch.zeros(())
    for (r, down), (c, across) in itertools.product(*taps):
        total = total + (down * across)[..., None] * x[image, r, c]
    return total.movedim(3, 1).clamp(0, 255)


def crop_boxes(sides: Sequence[int], scale: tuple[float, float], ratio: tuple[float, float], draws: Tensor) -> Tensor:
    """Random boxes: for each image the first of ten tries that fits; if none does, the largest in the middle.

    Args:
        sides: height and width of the images.
        scale: the range of the area, as a share of the image.
        ratio: the range of width / height.
        draws: (22, B), uniform between 0 and 1: ten areas, ten ratios, then top and left within what room there is.

    Shape:
        result: (4, B), whole numbers: top, left, height, width.

    Source: `timm.data.transforms.RandomResizedCropAndInterpolation`.
    """
    height, width = sides
    areas = height * width * (scale[0] + (scale[1] - scale[0]) * draws[:_TRIES])
    ratios = ratio[0] * (ratio[1] / ratio[0]) ** draws[_TRIES:-2]  # their logarithm is uniform
    widths = (areas * ratios).sqrt().round()
    heights = (areas / ratios).sqrt().round()
    fits = (widths <= width) & (heights <= height)
    first = fits.int().argmax(0, keepdim=True)
    middle = (min(height, round(width / ratio[0])), min(width, round(height * ratio[1])))
    starts, extents = [], []
    for tried, side, extent, u in zip((heights, widths), sides, middle, draws[-2:], strict=True):
        chosen = tried.gather(0, first)[0]
        starts.append(torch.where(fits.any(0), (u * (side - chosen + 1)).floor(), (side - extent) // 2))
        extents.append(torch.where(fits.any(0), chosen, extent))
    return torch.stack(starts + extents)


def resized_crop(x: Tensor, boxes: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Cut a box from each image and resize it, without looking past the edge of the box, smoothing where it shrinks.

    Args:
        boxes: (4, B), top, left, height, width in pixels.
        interpolation: "bilinear" or "bicubic".

    Shape:
        (B, C, H, W) to (B, C, *size).
    """
    top, left, height, width = boxes
    across = _resize_weights(x.shape[3], left, width, size[1], _KERNELS[interpolation])
    down = _resize_weights(x.shape[2], top, height, size[0], _KERNELS[interpolation])
    x = (x @ across.mT).clamp(0, 255)  # bicubic overshoots; PIL cuts after each axis
    return (down @ x).clamp(0, 255)


def _resize_weights(side: int, start: Tensor, extent: Tensor, count: int, kernel: Callable[[Tensor], Tensor]) -> Tensor:
    """What each of `side` pixels adds to each of `count` that share out the part from `start`: (B, 1, count, side)."""
    start, extent = start[:, None, None, None], extent[:, None, None, None]
    centre = start + (torch.arange(count, device=start.device)[:, None] + 0.5) * extent / count
    pixel = torch.arange(side, device=start.device) + 0.5
    weights = kernel((pixel - centre) / (extent / count).clamp(min=1))
    weights = weights * ((pixel > start) & (pixel < start + extent))
    return weights / weights.sum(3, keepdim=True)


def _linear(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _keys(x: Tensor, a: float) -> Tensor:
    """Source: Keys 1981, equation 15 with any a, as PIL has it."""
    x = x.abs()
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((x - 5) * x + 8) * x - 4
    return torch.where(x < 1, near, torch.where(x < 2, a * far, 0))


_KERNELS: dict[str, Callable[[Tensor], Tensor]] = {"bilinear": _linear, "bicubic": partial(_keys, a=-0.5)}


def jitter(x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Scale brightness, contrast and saturation of each image.

    Args:
        factors: (3, B), of brightness, contrast and saturation.
        order: (3, B), a permutation of these three for each image.

    Shape:
        x and result: (B, C, H, W), 0 to 255, grey or RGB.
    """
    for change in order:
        factor = factors.gather(0, change[None])[0]
        grey = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:] if x.shape[1] == 3 else x
        mean = grey.mean((2, 3), keepdim=True).round()
        change, factor = change[:, None, None, None], factor[:, None, None, None]
        base = torch.where(change == 0, 0, torch.where(change == 1, mean, grey))  # what each change draws away from
        x = (base + factor * (x - base)).clamp(0, 255)
    return x
