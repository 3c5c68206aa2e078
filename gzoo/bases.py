"""Kernel bases: how the free parameters of a kernel fill the filter that is equivariant.

One kernel w is a function on G (or on the plane, for a lifting kernel), and the filter for output element g is w
transformed by g:

    lifting:           filter[g](y)    = w(g^-1 y)            Cohen & Welling 2016, equation 10
    group convolution: filter[g, h](y) = w(g^-1 h, g^-1 y)    equation 11

The pixel basis takes the values of w at the pixels as parameters. It is exact for groups that map the grid onto itself,
and the expansion is a gather: every parameter stands once in each filter[g]. A 3x3 kernel between two regular fields
keeps all 9|G| parameters.

The steerable basis serves every group. Its parameters are the coefficients of w in circular harmonics on rings
(Weiler & Cesa 2019, arXiv:1911.08251, section 2.5), functions that can be turned by any angle before they are sampled
at the pixels. Rings, widths and band limits are those of ``escnn.nn.R2Conv``, so both span the same filters; a 3x3
kernel keeps 6|G| parameters. Turns that fit the grid move the samples exactly, so on that subgroup it is exact, too.

The basis "steerable_3r" has the same rings, with frequencies up to 3r on the ring of radius r: the band limit of the
experiments of Weiler & Cesa 2019 and of ReDet (Han et al. 2021, arXiv:2103.07733), which write it as
``R2Conv(..., frequencies_cutoff=lambda r: 3 * r)``. A 3x3 kernel keeps 8|G| parameters.

Kernels between quotient fields, G/H to G/K, are sums of either over K (`quotient_basis`).
"""

import math
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from gzoo.groups import Group

BasisName = Literal["pixel", "steerable", "steerable_3r"]

NAMES: tuple[BasisName, ...] = get_args(BasisName)  # checkpoints know a basis by its place here

P = ParamSpec("P")
T = TypeVar("T")


def _on_cpu(build: Callable[P, T]) -> Callable[P, T]:
    """Has ``build`` make plain tensors on the CPU: what is cached must not depend on the context of its first use, on
    its default device or its inference mode."""

    @wraps(build)
    def built(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.device("cpu"), torch.inference_mode(False):
            return build(*args, **kwargs)

    return built


class Basis(NamedTuple):
    """How kernels expand to filters.

    Attributes:
        parameters: shape of the parameters of one kernel.
        source: for each number of a filter, or each coefficient of one, the parameter it comes from: (|G|, ...).
        samples: the steerable functions in all poses, (|G|, functions, k * k); None for the pixel basis.
        size: k, the side of the filter in pixels.
        name: which basis it is; of a single pixel, where all are one, "pixel".
    """

    parameters: tuple[int, ...]
    source: Tensor
    samples: Tensor | None
    size: int
    name: BasisName


@cache
@_on_cpu
def lifting_basis(group: Group, size: int, name: BasisName | None = None) -> Basis:
    """Kernels from an image to regular fields: ``parameters`` is (k, k), or (1, functions) if steerable.

    Args:
        group: any point group.
        size: k. A single pixel has nothing to turn: there all bases are one, exact for every group.
        name: which basis; None for "pixel" where the group is on the grid, else "steerable".

    Raises:
        ValueError: there is no such basis, or no pixel basis of this group.
        TypeError: ``group`` is something else, such as a name.
    """
    name = choose(group, size, name)
    if size == 1:
        return Basis((1, 1), torch.zeros(group.order, 1, dtype=torch.long), None, 1, name)
    if name == "pixel":
        w = torch.arange(size * size).view(1, size, size)
        index = torch.stack([group.transform_image(w, g) for g in range(group.order)])
        return Basis((size, size), index.flatten(1), None, size, name)
    samples = _harmonics(group, size, name)
    functions = samples.shape[1]
    return Basis((1, functions), torch.arange(functions).repeat(group.order, 1), samples, size, name)


@cache
@_on_cpu
def regular_basis(group: Group, size: int, name: BasisName | None = None) -> Basis:
    """Kernels from regular to regular fields: ``parameters`` is (|G|, k, k), or (|G|, functions) if steerable.

    Arguments and errors are those of `lifting_basis`.
    """
    name, order = choose(group, size, name), group.order
    if size > 1 and name == "pixel":
        w = torch.arange(order * size * size).view(1, order, size, size)
        index = torch.stack([group.transform_features(w, g) for g in range(order)])
        return Basis((order, size, size), index.flatten(1), None, size, name)
    samples = None if name == "pixel" else _harmonics(group, size, name)
    slices = 1 if samples is None else samples.shape[1]
    rows = [[group.multiply(group.inverse(g), h) for h in range(order)] for g in range(order)]
    index = torch.tensor(rows).unsqueeze(2) * slices + torch.arange(slices)  # (|G|, |G|, slices)
    return Basis((order, 1, 1) if samples is None else (order, slices), index.flatten(1), samples, size, name)


@cache
@_on_cpu
def quotient_basis(group: Group, size: int, inner: Group, outer: Group, name: BasisName | None = None) -> Basis:
    """Kernels from fields of G/H to fields of G/K: ``parameters`` is (n,), or those of `regular_basis` if H = K = c1.

    A function on G/H is one on G that does not change under H, so the kernel is a function w(xH, y) on G/H and the
    plane, and the filter is filter[gK, xH](y) = w(g^-1 xH, g^-1 y). It is the same for all g of a coset if w is the
    same as w(k xH, k y) for all k of K. A basis of these are pixels or harmonics of one xH, summed over K, where the
    sums are independent; each has norm one. H = G is an image, K = G an invariant map.

    Args:
        group: any point group G.
        size: k.
        inner: H, a subgroup of G.
        outer: K, a subgroup of G.
        name: as in `lifting_basis`.

    Raises:
        ValueError: there is no such basis, or no pixel basis of this group; H or K is no subgroup.
    """
    if inner.order == outer.order == 1:
        return regular_basis(group, size, name)
    name = choose(group, size, name)
    poses = _poses(group, size, name).double()
    rows, columns = group.cosets(outer), group.cosets(inner)
    column = {g: x for x, coset in enumerate(columns) for g in coset}
    moved = [[column[group.multiply(s, coset[0])] for coset in columns] for s in range(group.order)]  # sxH, by s and xH
    starts = [x for x in range(len(columns)) if x == min(moved[k][x] for k in rows[0])]  # one of each orbit under K
    # Float32 numbers, summed in float64: exact, so that no turn of the grid rounds otherwise.
    sums = poses.new_zeros(len(rows), len(starts), poses.shape[1], len(columns), size * size)
    for row, coset in enumerate(rows):
        for s in coset:
            for i, x in enumerate(starts):
                sums[row, i, :, moved[s][x]] += poses[s]
    sums = sums.flatten(1, 2).flatten(2)  # (|G/K|, kernels, |G/H| * k * k)
    kept = _independent(sums[0] / len(rows[0]))
    samples = sums[:, kept]
    count = len(kept)
    samples = (samples / samples[0].norm(dim=1)[:, None]).float()
    return Basis((count,), torch.arange(count).expand(len(rows), -1), samples, size, name)


def _independent(vectors: Tensor) -> list[int]:
    """The vectors, of norm one or less, that are no combination of those before them."""
    kept, orthonormal = [], vectors.new_zeros(0, vectors.shape[1])
    for i, vector in enumerate(vectors):
        rest = vector - (orthonormal @ vector) @ orthonormal
        if rest.norm() > 1e-4:  # far above the rounding of the samples, far below what a turn leaves of a harmonic
            kept.append(i)
            orthonormal = torch.cat([orthonormal, (rest / rest.norm()).unsqueeze(0)])
    return kept


def _poses(group: Group, size: int, name: BasisName) -> Tensor:
    """The pixels, or the steerable functions, in all poses of the group: (|G|, functions, size * size)."""
    if name != "pixel":
        return _harmonics(group, size, name)
    if size == 1:
        return torch.ones(group.order, 1, 1)
    pixels = torch.eye(size * size).view(-1, size, size)
    return torch.stack([group.transform_image(pixels, g) for g in range(group.order)]).flatten(2)


def choose(group: Group, size: int, name: BasisName | None) -> BasisName:
    """The basis that ``name`` means; arguments and errors are those of `lifting_basis`."""
    if not isinstance(group, Group):
        raise TypeError(f"group is {group!r}; layers take a gzoo.groups.Group, such as gzoo.groups.get('p4m') gives")
    if name is not None and name not in NAMES:
        accepted = ", ".join(map(repr, NAMES))
        raise ValueError(f"basis is {name!r}; accepted are {accepted} and None, which chooses by the group")
    if size == 1:
        return "pixel"
    if name == "pixel" and not group.on_grid:
        raise ValueError(
            f"{group.name} turns kernels of {size}x{size} pixels between the pixels, so it has no pixel basis; use "
            "basis='steerable'"
        )
    return name or ("pixel" if group.on_grid else "steerable")


def _harmonics(group: Group, size: int, name: BasisName) -> Tensor:
    """Circular harmonics on rings, of norm one, sampled in all poses of the group: (|G|, functions, size * size)."""
    poses: list[Tensor | None] = [None] * group.order
    for g in range(group.order):
        if poses[g] is None:
            pose = _pose(group, size, g, name)
            # Poses that differ by a turn or reflection of the grid are moved, not computed, so that rounding is alike.
            for u in group.grid_elements:
                poses[group.multiply(u, g)] = group.transform_image(pose, u)
    samples = torch.stack([pose for pose in poses if pose is not None])
    norm = samples[0].square().sum((1, 2)).sqrt()
    return (samples / norm.view(1, -1, 1, 1)).flatten(2).float()


def balance(basis: Basis) -> Tensor:
    """How wide to draw the coefficients of a kernel, (functions,), or () if not steerable; 1 keeps white noise.

    Functions of norm one keep the variance of white noise, but enlarge what all pixels share: a ring without frequency
    sums it up. With these both keep their variance: the functions that sum to something are drawn smaller.
    """
    if basis.samples is None or basis.samples.shape[1] == 1 or basis.samples.is_meta:  # on meta nothing is drawn
        return torch.ones(())
    energy = basis.samples.square().sum(2).mean(0)  # of each function, over the poses: the norm is one in the first
    sums = basis.samples.sum(2).square().mean(0)
    shared = sums > 1e-6
    variance = len(sums) / sums.sum()
    rest = (len(sums) - variance * energy[shared].sum()) / energy[~shared].sum()
    return torch.where(shared, variance, rest).sqrt()


def _pose(group: Group, size: int, g: int, name: BasisName) -> Tensor:
    """The functions at g^-1 y for all pixels y: (functions, size, size), float64."""
    angle = torch.tensor([2 * math.pi * (g % group.rotations) / group.rotations], dtype=torch.float64)
    mirrored = torch.tensor([g >= group.rotations])
    return circular_harmonics(size, angle, mirrored, name)[0].unflatten(1, (size, size))


def circular_harmonics(size: int, angles: Tensor, mirrored: Tensor, name: BasisName = "steerable") -> Tensor:
    """The steerable functions at u^-1 y for all pixels y and each pose u; differentiable in the angles.

    Args:
        size: k, the side of the filter in pixels.
        angles: of the poses, (n,).
        mirrored: which poses reflect the width axis first, (n,), bool.
        name: whose band limits: "steerable" or "steerable_3r".

    Shape:
        (n, functions, size * size), dtype and device of ``angles``.
    """
    theta, profile, frequency, phase = (table.to(angles) for table in _polar(size, name))
    turned = theta - angles.unsqueeze(1)  # (n, k * k)
    turned = torch.where(mirrored.unsqueeze(1), math.pi - turned, turned)
    return profile * torch.cos(frequency * turned.unsqueeze(1) - phase)


@cache
@_on_cpu
def _polar(size: int, name: BasisName) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Angles of the pixels (k * k,), and of the functions profile (functions, k * k), frequency and phase, float64."""
    axis = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    x, y = axis.repeat(size), -axis.repeat_interleave(size)  # y points up
    radius, rows = torch.hypot(x, y), []
    for ring, width, highest in rings(size, name):
        profile = torch.exp(-((radius - ring) ** 2) / (2 * width**2))
        turning = torch.where(radius > 1e-9, profile, 0.0)  # the centre has no direction
        rows.append((profile, 0, 0.0))
        rows += [(turning, frequency, phase) for frequency in range(1, highest + 1) for phase in (0.0, math.pi / 2)]
    profiles, *numbers = zip(*rows, strict=True)
    frequency, phase = (torch.tensor(column, dtype=torch.float64).unsqueeze(1) for column in numbers)
    return torch.atan2(y, x), torch.stack(profiles), frequency, phase


def rings(size: int, name: BasisName) -> list[tuple[float, float, int]]:
    """Radius and width in pixels, as escnn chooses them, and highest frequency of each ring."""
    count = math.ceil(size / 2)
    chosen = []
    for radius in map(float, range(count)):
        width = 0.6 if radius < count - 1 else 0.4
        if radius == 0 and size % 2:
            width = 0.005  # the central pixel alone; an even size has none
        outermost = radius == size // 2
        highest = min(2 * radius, 2 if outermost else 2 * radius - (radius + 1) % 2) if radius else 0
        if name == "steerable_3r":
            highest = 3 * radius
        chosen.append((radius, width, int(highest)))
    return chosen


class _Spread(torch.autograd.Function):
    """Kernels (out, in, parameters) to their poses (out, |G|, in, parameters): one gather, in both directions.

    Every parameter stands once in each pose, so the gradient is gathered back and summed over the poses. Torch's own
    backward would scatter into a zeroed buffer: slower, and on a GPU in an order that changes from run to run.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(kernels: Tensor, source: Tensor) -> Tensor:
        # Straight into the layout of the filter: an index_select would need a transposed copy after it.
        order = len(source)
        where = source.view(1, order, 1, -1).expand(len(kernels), -1, kernels.shape[1], -1)
        return kernels.unsqueeze(1).expand(-1, order, -1, -1).gather(3, where)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (source,) = ctx.saved_tensors
        where = source.argsort(1).view(1, len(source), 1, -1).expand_as(grad)
        return grad.gather(3, where).sum(1), None

    @staticmethod
    def jvp(ctx: Any, kernels: Tensor, source: None) -> Tensor:  # linear, so it is its own derivative
        return _Spread.forward(kernels, *ctx.saved_tensors)


def expand(weight: Tensor, basis: Basis) -> Tensor:
    """Filters from kernels.

    Args:
        weight: kernels, (fields out, fields in, *basis.parameters).
        basis: from `lifting_basis` or `regular_basis`, on the device of ``weight``.

    Shape:
        (fields out * |G|, fields in, k, k) for lifting, (fields out * |G|, fields in * |G|, k, k) else.
    """
    out_fields, order = len(weight), len(basis.source)
    if basis.samples is None and weight.ndim > 3:  # a kernel that is no square stands in the middle of one
        height, width = ((basis.size - side) // 2 for side in weight.shape[-2:])
        if height or width:
            weight = F.pad(weight, (width, width, height, height))
    # A compiler derives the gradient itself; it does not take a Function with a jvp, and ONNX takes none.
    is_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
    spread = _Spread.forward if is_graph else _Spread.apply
    filters: Tensor = spread(weight.flatten(2), basis.source)  # (out, |G|, in, |G| or 1 * pixels or functions)
    if basis.samples is not None:
        functions = basis.samples.shape[1]
        filters = filters.view(out_fields, order, -1, functions) @ basis.samples.to(weight.dtype)
    return filters.view(out_fields * order, -1, basis.size, basis.size)
