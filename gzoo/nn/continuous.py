"""Convolutions over the continuous groups SE(2) and E(2), Monte Carlo sums over sampled rotations and reflections.

A map over such a group is known at the elements that a layer has sampled, so it carries them along (`Features`): the
next layer evaluates its kernel at the relative elements v^-1 u, wherever they lie. A kernel is a product of

    circular harmonics on rings, in space        those of `gzoo.bases`, turned analytically, by any angle
    a Fourier series in the relative angle       and one more of it for the relative reflection

The paper's kernels are small networks (SIREN, MAGNet) of the relative element and the position. Both kinds are smooth
and can be evaluated anywhere. The harmonics are linear in their parameters and band-limited, so a turn is exact on the
coefficients and aliasing is bounded by design, without a frequency to tune (SIREN's omega_0); the price is that sharp
kernels cannot be had: a 7x7 kernel has 18 functions, not 49, and the series over angles ends at frequency two.

Source: Romero & Lohit 2022, "Learning Partial Equivariances From Data", arXiv:2110.10211.
"""

import math
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from gzoo.bases import circular_harmonics
from gzoo.groups import Group
from gzoo.nn.constant import Constants, on_default_device
from gzoo.nn.resample import SymmetricPool2d
from gzoo.nn.subset import FIRST_LOGIT, draw

ContinuousGroup = Literal["t2", "se2", "e2"]

_HIGHEST = 2  # frequency in the relative angle


class Elements(NamedTuple):
    """Sampled elements u, as in `gzoo.groups`: reflect the width axis, where ``mirrored``, then turn by the angle.

    Attributes:
        angles: (n,), radians counterclockwise.
        mirrored: (n,), bool.
        weights: (n,), of the elements in sums over the group; they sum to one.
    """

    angles: Tensor
    mirrored: Tensor
    weights: Tensor


class Features(NamedTuple):
    """Functions on the group: ``maps`` (B, fields, n, H, W), their values at the n ``elements`` and all pixels."""

    maps: Tensor
    elements: Elements


class Arc(Constants):
    """Samples the elements at which a layer is evaluated: rotations in [-theta, theta], plain and reflected ones.

    In train mode the angles are theta t with t uniform on [-1, 1): n equal steps that are shifted together by a random
    amount, so each is uniform and none leaves a gap. The reflected ones are kept together, or dropped, by a relaxed
    Bernoulli variable. In eval mode the steps stand in the middle, and the reflected ones are there if their
    probability is one half or more. At theta = pi the elements are those of C_N or D_N, all turned by one angle: the
    layer commutes with that group, exactly as far as it fits the pixel grid.

    Args:
        group: "t2", the translations alone (theta = 0); "se2", with rotations; "e2", with reflections, too.
        elements: n; over e2 half of them are reflected.
        partial: learn theta and the probability of the reflected ones; they start at pi and 0.88. Else all are kept.

    Shape:
        reach: (), theta / pi, from 0 to 1. logit: (), of the reflected ones.

    Raises:
        ValueError: there is no such group; the elements are less than one, odd over e2, or more than one over t2; or
            partial with t2.

    Source: Romero & Lohit 2022, arXiv:2110.10211, section 4. Theirs are independent draws; ours have less variance.
    """

    constants: ClassVar[tuple[str, ...]] = ("reach",)
    reach: Tensor

    def __init__(self, group: ContinuousGroup, elements: int, partial: bool) -> None:
        super().__init__()
        if group not in get_args(ContinuousGroup):
            raise ValueError(
                f"unknown group {group!r}; accepted are t2 (translations), se2 (and rotations), e2 (and reflections)"
            )
        halves = 2 if group == "e2" else 1
        if elements < halves or elements % halves or (group == "t2" and elements > 1):
            raise ValueError(
                f"elements is {elements}; t2 takes 1, se2 1 or more, e2 an even number from 2 on: half are reflected"
            )
        if partial and group == "t2":
            raise ValueError("t2 has no rotations and reflections to drop, so no partial=True; take se2 or e2")
        self.group = Group(elements // halves, group == "e2")
        self.continuous_group, self.partial = group, partial
        reach = on_default_device(torch.tensor(0.0 if group == "t2" else 1.0, device="cpu"))
        self.logit = nn.Parameter(torch.tensor(FIRST_LOGIT)) if partial and group == "e2" else None
        if partial:
            self.reach = nn.Parameter(reach)
        else:
            self.register_buffer("reach", reach, persistent=False)

    @property
    def theta(self) -> float:
        """The largest angle, radians."""
        return math.pi * min(max(self.reach.item(), 0.0), 1.0)

    @property
    def mirror_probability(self) -> float:
        """How likely the reflected elements are kept in train mode."""
        if self.logit is not None:
            return self.logit.sigmoid().item()
        return float(self.group.reflections)

    @property
    def keeps_mirror(self) -> bool:
        """Whether the reflected elements are kept in eval mode."""
        return self.mirror_probability >= 0.5

    @property
    def symmetry(self) -> tuple[int, ...]:
        """The elements of ``group``, C_N or D_N, with which the sampled set goes over into itself in eval mode."""
        turns = range(self.group.rotations if self.theta == math.pi else 1)
        return tuple(turns) + tuple(self.group.rotations + r for r in turns if self.keeps_mirror)

    def forward(self) -> Elements:
        """A new sample in train mode, the one of evaluation in eval mode."""
        n, reach = self.group.rotations, self.reach
        if self.training and self.partial:
            with torch.no_grad():
                reach.clamp_(0.0, 1.0)  # else a step beyond pi would have to be taken back before anything changes
        theta = math.pi * (reach + (reach.clamp(0.0, 1.0) - reach).detach())  # at 1, too, it has a gradient
        shift = torch.rand_like(reach) if self.training else torch.full_like(reach, 0.5)
        steps = (torch.arange(n, device=reach.device, dtype=reach.dtype) + shift) * (2 / n) - 1
        angles = theta * steps
        kept = self._mirror()
        # Not asked of a tensor where nothing is learned: torch.export takes no branch that depends on numbers.
        if not self.group.reflections or (self.logit is not None and kept.item() == 0):
            weights = torch.full_like(angles, 1 / n) + 0 * kept  # DDP waits for a gradient of every parameter
            return Elements(angles, torch.zeros_like(angles, dtype=torch.bool), weights)
        mirrored = torch.arange(2 * n, device=reach.device) >= n
        weights = torch.where(mirrored, kept, 1.0)
        return Elements(angles.repeat(2), mirrored, weights / weights.sum())

    def _mirror(self) -> Tensor:
        """One if the reflected elements are kept, else zero."""
        if self.training and self.logit is not None:
            return draw(self.logit)
        return torch.full_like(self.reach, self.keeps_mirror)

    def extra_repr(self) -> str:
        return f"{self.group.name}, theta={math.degrees(self.theta):.0f} degrees"


class _Kernels(Constants):
    """Weights (fields out, fields in, functions of the relative element, functions in space)."""

    constants: ClassVar[tuple[str, ...]] = ("norm",)
    precise: ClassVar[tuple[str, ...]] = ("norm",)

    def __init__(self, in_fields: int, out_fields: int, size: int, relative: int) -> None:
        super().__init__()
        if size % 2 == 0:
            raise ValueError(f"kernel_size is {size}; the kernels turn about a pixel, so it must be odd")
        zero = torch.zeros(1, dtype=torch.float64, device="cpu")
        norm = circular_harmonics(size, zero, zero.bool())[0].norm(dim=1, keepdim=True)  # (functions, 1)
        self.norm: Tensor
        self.register_buffer("norm", on_default_device(norm.float()), persistent=False)
        self.size = size
        self.weight = nn.Parameter(torch.randn(out_fields, in_fields, relative, len(norm)))
        with torch.no_grad():
            self.weight.mul_((2 / self.weight[0].numel()) ** 0.5)

    def poses(self, elements: Elements) -> Tensor:
        """The functions in space at u^-1 y, (n, functions, k * k)."""
        functions = circular_harmonics(self.size, elements.angles, elements.mirrored)
        return functions / self.norm.to(functions.dtype)

    def convolve(self, x: Tensor, filters: Tensor, elements: Elements) -> Features:
        """``filters``: (fields out, n, channels of x, k * k)."""
        filters = filters.flatten(0, 1).unflatten(2, (self.size, self.size))
        y = nn.functional.conv2d(x, filters, padding=self.size // 2)
        return Features(y.unflatten(1, (-1, len(elements.angles))), elements)


class ContinuousLiftingConv2d(_Kernels):
    """Images to functions on the group: f(u, x) = sum over y of w(u^-1 (y - x)) image(y).

    Args:
        in_channels: of the image.
        out_fields: functions on the group.
        size: k, odd: the side of the filter in pixels.

    Shape:
        x: (B, in_channels, H, W); result: maps (B, out_fields, n, H, W).

    Raises:
        ValueError: the size is even.
    """

    def __init__(self, in_channels: int, out_fields: int, size: int) -> None:
        super().__init__(in_channels, out_fields, size, 1)
        self.in_channels = in_channels

    def forward(self, x: Tensor, elements: Elements) -> Features:
        filters = torch.einsum("oci,uip->oucp", self.weight[:, :, 0], self.poses(elements))
        return self.convolve(x, filters, elements)


class ContinuousConv2d(_Kernels):
    """Functions on the group to such: f'(u, x) = sum over v, y of p(v) psi(u^-1 v, u^-1 (y - x)) f(v, y).

    The elements v are those of the features, the elements u are asked for. The layer commutes with each g that maps
    both sets onto themselves, exactly as far as g fits the pixel grid.

    Args:
        in_fields: functions on the group.
        out_fields: the same, of the result.
        size: k, odd: the side of the filter in pixels.
        mirrors: whether the group has reflections.

    Shape:
        maps: (B, in_fields, n, H, W); of the result (B, out_fields, n', H, W).

    Raises:
        ValueError: the size is even.
    """

    def __init__(self, in_fields: int, out_fields: int, size: int, mirrors: bool) -> None:
        super().__init__(in_fields, out_fields, size, (1 + mirrors) * (1 + 2 * _HIGHEST))
        self.mirrors = mirrors

    def forward(self, features: Features, elements: Elements) -> Features:
        x, v = features
        relative = self._relative(elements, v) * v.weights.unsqueeze(1)  # (n', n, functions)
        steered = torch.einsum("ocri,uvr->oucvi", self.weight, relative)
        filters = torch.einsum("oucvi,uip->oucvp", steered, self.poses(elements)).flatten(2, 3)
        return self.convolve(x.flatten(1, 2), filters, elements)

    def _relative(self, u: Elements, v: Elements) -> Tensor:
        """The Fourier functions at u^-1 v, (n', n, functions): for every relative reflection, zero but for its own."""
        between = v.angles - u.angles.unsqueeze(1)
        angle = torch.where(u.mirrored.unsqueeze(1), -between, between)  # a reflection turns what follows backwards
        waves = [torch.ones_like(angle)]
        for frequency in range(1, _HIGHEST + 1):
            waves += [2**0.5 * torch.cos(frequency * angle), 2**0.5 * torch.sin(frequency * angle)]
        series = torch.stack(waves, 2)
        if not self.mirrors:
            return series
        reflected = (u.mirrored.unsqueeze(1) != v.mirrored).unsqueeze(2)
        return torch.cat([series * ~reflected, series * reflected], 2)


class ContinuousNorm(nn.Module):
    """Batch norm of `Features`: statistics of each field over images, sampled elements and pixels."""

    def __init__(self, fields: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm3d(fields)  # a child, which becomes a SyncBatchNorm where there are several GPUs

    def forward(self, features: Features) -> Features:
        return Features(self.norm(features.maps), features.elements)


class ContinuousPool(nn.Module):
    """A max pool over 2x2 pixels of `Features`, behind the symmetric resampling rule: exact at every size."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = SymmetricPool2d(nn.MaxPool2d(2))

    def forward(self, features: Features) -> Features:
        maps = self.pool(features.maps.flatten(1, 2))
        return Features(maps.unflatten(1, features.maps.shape[1:3]), features.elements)


def pool_all(features: Features) -> Tensor:
    """The weighted mean over elements and the mean over pixels: (B, fields)."""
    return features.maps.mean((3, 4)) @ features.elements.weights
