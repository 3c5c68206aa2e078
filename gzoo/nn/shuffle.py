"""The pixel shuffles of regular fields, which enlarge feature maps by unfolding channels into pixels, and back."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gzoo.groups import Group
from gzoo.nn.constant import Constants, on_default_device


class GroupPixelShuffle(Constants):
    """Unfolds r^2 fields into the r x r pixels that each pixel becomes, regular fields to regular fields.

    The plain shuffle says by a channel's number where in the square it goes, so the square does not turn with the
    image. Here the places of pose h are those of the upright one, turned by h: field c r^2 + i puts its element h at
    place h i. Exact as `LiftingConv2d`; a turn between the pixels leaves the places, as of the nearest turn before it.

    Args:
        group: any point group.
        upscale_factor: r.

    Shape:
        x: (B, fields * r^2 * |G|, H, W); result: (B, fields * |G|, r H, r W).

    Raises:
        ValueError: x has other channels.

    Source: Shi et al. 2016, arXiv:1609.05158, equation 4, on functions on the group.
    """

    constants = ("index",)
    index: Tensor

    def __init__(self, group: Group, upscale_factor: int) -> None:
        super().__init__()
        self.group, self.upscale_factor = group, upscale_factor
        self.register_buffer("index", on_default_device(_index(group, upscale_factor)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % len(self.index):
            square = self.upscale_factor**2
            raise ValueError(
                f"x has {x.shape[1]} channels; it takes fields * {square} * {self.group.order} of them, as it unfolds "
                f"{square} regular fields of {self.group.name} into the pixels of one"
            )
        y = x.unflatten(1, (-1, len(self.index))).index_select(2, self.index).flatten(1, 2)
        return F.pixel_shuffle(y, self.upscale_factor)

    def extra_repr(self) -> str:
        return f"{self.group.name}, upscale_factor={self.upscale_factor}"


class GroupPixelUnshuffle(Constants):
    """Folds the r x r pixels of each square into r^2 fields, regular fields to regular fields.

    Undoes `GroupPixelShuffle`, and is as exact, where the squares fill the map.

    Args:
        group: any point group.
        downscale_factor: r.
        by_place: whether the fields are in the order of timm's ``SpaceToDepth``: those of the first place in the square
            of all fields, then of the second; else as torch's: all places of the first field, then of the second.

    Shape:
        x: (B, fields * |G|, r H, r W); result: (B, fields * r^2 * |G|, H, W).

    Raises:
        ValueError: x has other channels, or sides that r does not divide.
    """

    constants = ("index",)
    index: Tensor

    def __init__(self, group: Group, downscale_factor: int, by_place: bool = False) -> None:
        super().__init__()
        self.group, self.downscale_factor, self.by_place = group, downscale_factor, by_place
        self.register_buffer("index", on_default_device(_index(group, downscale_factor).argsort()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        order, side = self.group.order, self.downscale_factor
        if x.shape[1] % order or x.shape[2] % side or x.shape[3] % side:
            raise ValueError(
                f"x is {tuple(x.shape)}; it takes fields * {order} channels, regular fields of {self.group.name}, and "
                f"sides that are multiples of {side}. Pad or resize the images"
            )
        y = F.pixel_unshuffle(x, side).unflatten(1, (-1, len(self.index))).index_select(2, self.index)
        if self.by_place:
            y = y.unflatten(2, (-1, order)).transpose(1, 2).flatten(2, 3)
        return y.flatten(1, 2)

    def extra_repr(self) -> str:
        return f"{self.group.name}, downscale_factor={self.downscale_factor}, by_place={self.by_place}"


def _index(group: Group, side: int) -> Tensor:
    """For each pose and place in its square the number, among those of all places' poses, that is there: (|G| r^2)."""
    on_grid = Group(math.gcd(group.rotations, 4), group.reflections)
    places = torch.arange(side**2, device="cpu").view(side, side)
    sources = [on_grid.transform_image(places, k).flatten() for k in range(on_grid.order)]
    # Element h is kx, with k on the grid, of the right coset of x: what a turn of the grid does to h, it does to k.
    index = torch.empty(group.order, side**2, dtype=torch.long, device="cpu")
    for i, h in enumerate(group.restriction(on_grid)):
        index[h] = sources[i % on_grid.order] * group.order + h
    return index.flatten()
