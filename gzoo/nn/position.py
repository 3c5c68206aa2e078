"""A position encoding that turns with the image."""

import math

import torch
from torch import Tensor, nn

from gzoo.groups import Group


class FourierPosition(nn.Module):
    """Sines and cosines of where a pixel is, in each pose of the image: a map of regular fields that the group leaves
    as it is.

    At element g of a fibre and pixel p stand the encoding's channels at g^-1 p, as the plain network sees them in that
    pose. A pixel's place is measured from the sides of the image; in a pose between the pixels, from those of the box
    around the turned image. Exact for groups on the pixel grid, at every image size.

    Args:
        group: any point group.
        frequencies: of each axis.
        out_fields: number of regular fields.
        temperature: wavelengths go from the side of the image to nearly this many sides.

    Shape:
        forward takes (B, H, W) as three numbers; result: (1, out_fields * |G|, H, W), the same for all images.

    Source: Maaz et al. 2022, arXiv:2206.10589, section 3.2; the encoding is that of Vaswani et al. 2017,
    arXiv:1706.03762, section 3.5, along two axes.
    """

    def __init__(self, group: Group, frequencies: int, out_fields: int, temperature: float) -> None:
        super().__init__()
        self.group, self.frequencies, self.temperature = group, frequencies, temperature
        self.token_projection = nn.Conv2d(2 * frequencies, out_fields, kernel_size=1)

    def forward(self, shape: tuple[int, int, int]) -> Tensor:
        _, height, width = shape
        weight = self.token_projection.weight
        # From whole numbers of half pixels, so that poses on the grid agree but for their sines, which some processors
        # round otherwise at the end of a row than in it: so not in float32 for a float64 model.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        right = torch.arange(width, dtype=dtype, device=weight.device) - (width - 1) / 2
        up = (height - 1) / 2 - torch.arange(height, dtype=dtype, device=weight.device)[:, None]
        poses = torch.stack([self._waves(g, right, up) for g in range(self.group.order)])
        maps = self.token_projection(poses.to(weight.dtype))  # (|G|, out_fields, H, W)
        return maps.transpose(0, 1).flatten(0, 1)[None]

    def _waves(self, g: int, right: Tensor, up: Tensor) -> Tensor:
        """The encoding (2 * frequencies, H, W) at g^-1 p for each pixel p."""
        angle = 2 * math.pi * (g % self.group.rotations) / self.group.rotations
        cos, sin = round(math.cos(angle), 12), round(math.sin(angle), 12)  # a right angle's are whole numbers
        x, y = right * cos + up * sin, up * cos - right * sin
        height, width = len(up), len(right)
        sides = abs(cos) * width + abs(sin) * height, abs(cos) * height + abs(sin) * width
        if g >= self.group.rotations:
            x = -x
        return torch.cat([self._axis(-y, sides[1]), self._axis(x, sides[0])])

    def _axis(self, place: Tensor, side: float) -> Tensor:
        phase = 2 * math.pi * (place + (side + 1) / 2) / side  # of the first pixel 2 pi / side, of the last 2 pi
        pairs = torch.arange(0, self.frequencies, 2, device=place.device)
        phase = phase / self.temperature ** (pairs[:, None, None] / self.frequencies)
        return torch.stack([phase.sin(), phase.cos()], 1).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"{self.group.name}, frequencies={self.frequencies}, temperature={self.temperature:g}"
