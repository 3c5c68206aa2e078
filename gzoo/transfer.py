"""Weights of another network for an equivariant one: of a plain network, or of one over a subgroup.

Transfer. Each plain channel becomes a field, and the kernel of a group convolution is the plain one at the identity of
the fibre, zero elsewhere. By equation 11 (`gzoo.bases`) filter[g, h] is then the plain kernel turned by g where h = g,
and zero elsewhere: channel g of all fields is the plain network's map of g^-1 x, turned by g. The classifier pools the
fibre by its mean, so the logits are the mean over g of the plain network's logits of g^-1 x. The zeros are trainable.

Projection. The C channels of the plain network are read as C / |G| fields, channel = field * |G| + g, and each map is
replaced by the nearest equivariant one. The expansion E takes kernels to filters, so the nearest kernel to a filter is

    w = argmin |E w - filter|^2 = (E^T E)^-1 E^T filter

On the pixel grid E^T E = |G|, and w is the mean over g of the filter's rows turned back:

    lifting:           w(y)    = mean over g of filter[g](g y)
    group convolution: w(h, y) = mean over g of filter[g, gh](g y)

What holds one number a channel gets the mean along the fibre; the classifier, which pools by the mean itself, the sum.

Growth. A kernel over a subgroup H is zero at the elements outside H as a kernel over G, where the fields stay the same
in number. filter[g, h] then is zero but for h in the coset gH: the channels of each coset xH of a fibre are the smaller
network's map of x^-1 image, turned by x. A deeper network has further blocks that give back what they are given, as
residual ones do whose last norm starts at zero (Chen et al. 2016, arXiv:1511.05641, section 3.2).
"""

import functools
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import SpaceToDepth
from torch import Tensor, nn

from gzoo.bases import expand
from gzoo.equivariant import SIGNATURE, Equivariant, copied, group_of, require_network
from gzoo.groups import Group
from gzoo.nn import (
    FibreNorm,
    GroupEca,
    GroupMapLinear,
    GroupMapNorm,
    GroupVectorMap,
    InvariantConv2d,
    InvariantLinear,
    LiftingConv2d,
    PerElement,
    Subset,
)
from gzoo.nn.expand import ExpandedLayer
from gzoo.nn.idle import Idle
from gzoo.plan import example
from gzoo.trace import side_folded_by

Weights = Literal["transfer", "project"]


@torch.no_grad()
def fill(model: nn.Module, plain: nn.Module, group: Group, weights: Weights) -> None:
    """Fills an equivariant network, in place, from the plain one that it was converted from.

    Args:
        model: the converted network: C fields for C channels, norms for each element of the fibre by itself, if
            ``weights`` is "transfer"; C / |G| fields if it is "project".
        plain: the plain network; stays as it is. What is frozen in it is frozen in ``model``.
        group: its group; on the pixel grid if ``weights`` is "transfer".
        weights: see the head of this file.

    Raises:
        ValueError: a layer has no such weights; names it.
    """
    converted = dict(model.named_modules(remove_duplicate=False))
    folding = next((module for module in plain.modules() if isinstance(module, SpaceToDepth | nn.PixelUnshuffle)), None)
    for path, source in plain.named_modules():
        try:
            _fill(converted.get(path), source, group, weights, folding)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


@torch.no_grad()
def grow(model: nn.Module, smaller: nn.Module) -> None:
    """Fills a network, in place, from one over a subgroup H, or a shallower one, with as many fields.

    In eval mode the pooled features then are the mean (or maximum, whichever ``model`` pools by) over the cosets xH of
    those that ``smaller`` has for x^-1 image, and with the mean so are the logits; nearly so with norms over channels
    (ConvNeXt), which see all cosets at once. The new weights are zero and trainable. To train over H first is cheaper
    by up to the square of the index of H in the group::

        model, smaller = timm.create_model("p4m_resnet44"), timm.create_model("p4m_resnet44", subgroup="c1")
        ...  # train smaller; over c1 it is a plain network, whose images should be shown in all eight poses
        gzoo.grow(model, smaller)

    Args:
        model: a network over one group, or a plain one.
        smaller: the same network over a subgroup, or over the group itself (plain if ``model`` is); stays as it is. It
            may lack residual blocks that ``model`` has, if those start as the identity, as timm's do: p4m_resnet44
            grows from p4m_resnet20, and resnet44 from resnet20.

    Raises:
        ValueError: the two have other layers, fields, bases or classes; a group is no subgroup; one alone is plain; a
            layer's kernels are standardized, which more zeros would change; a layer attends from all poses at once, or
            mixes filters or weighs pixels by what it sees in all of them; a further block changes what it is given; or
            ``model`` is partial. It then is as it was.
    """
    for name, network in {"model": model, "smaller": smaller}.items():
        require_network(name, network)
        if not isinstance(network, Equivariant) and (SIGNATURE in network.state_dict() or group_of(network)):
            raise ValueError(f"{type(network).__name__} is no network that gzoo.convert made, so it does not grow")
    if isinstance(model, Equivariant) != isinstance(smaller, Equivariant):
        plain = smaller if isinstance(model, Equivariant) else model
        raise ValueError(f"{type(plain).__name__} is plain and the other network is not; convert it, too")
    for path, module in model.named_modules():
        if getattr(module, "one_for_all_poses", False):
            raise ValueError(
                f"{path or type(model).__name__}: its attention, mixture of filters, norm or softmax over channels is "
                "one for all poses, which would not be the mean of those over the subgroup; train it over its own"
            )
        if isinstance(module, Subset):
            raise ValueError(f"{path}: it learns what to keep of one group; grow a network that is not partial")
    values, state = smaller.state_dict(), model.state_dict()
    blocks = _further_blocks(model, smaller)
    further = {key for key in state if key.startswith(tuple(f"{path}." for path in blocks))}
    other = values.keys() ^ (state.keys() - further)
    if not isinstance(model, Equivariant):
        other |= {key for key in values.keys() & state.keys() if values[key].shape != state[key].shape}
    if other:
        raise ValueError(f"the two networks differ in {', '.join(sorted(other)[:3])}; they must have the same layers")
    grown = {SIGNATURE: state.pop(SIGNATURE)} if SIGNATURE in state else {}
    grown |= {key: state.pop(key) for key in further}
    for key, target in state.items():
        path, _, name = key.rpartition(".")
        try:
            grown[key] = _grown(values[key], target, name, model.get_submodule(path), smaller.get_submodule(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if blocks:
        probe = copied(model).eval()
        probe.load_state_dict(grown)
        _require_identities(probe, blocks)
    model.load_state_dict(grown)


def _further_blocks(model: nn.Module, smaller: nn.Module) -> list[str]:
    """Paths of what is in sequences of ``model``, such as the blocks of a stage, and not in those of ``smaller``."""
    held = dict(smaller.named_modules())
    return [
        path
        for path, module in model.named_modules()
        if path not in held and isinstance(held.get(path.rpartition(".")[0]), nn.Sequential) and module.state_dict()
    ]


def _require_identities(model: nn.Module, blocks: list[str]) -> None:
    """Raises ValueError where one of these blocks gives another map than it is given."""

    def require(module: nn.Module, inputs: tuple[Any, ...], y: Any, path: str) -> None:
        if not torch.equal(y, inputs[0]):
            raise ValueError(
                f"{path}: the smaller network has no such block, and it changes what it is given; a network grows "
                "deeper by residual blocks whose last norm is zero, as timm's are before they train"
            )

    for path in blocks:
        model.get_submodule(path).register_forward_hook(functools.partial(require, path=path))
    model(example(model, most=64))


@torch.no_grad()
def average(model: nn.Module, other: nn.Module) -> None:
    """Gives ``model``, in place, the mean of its weights and those of ``other``, which often errs less than either.

    Args:
        model: a network.
        other: the same network from another run, such as the one that ``model`` went on from; stays as it is.

    Raises:
        ValueError: the two have other layers, or layers of other widths. ``model`` then is as it was.

    Source: Izmailov et al. 2018, arXiv:1803.05407; Wortsman et al. 2022, arXiv:2203.05482, equation 1, of two runs.
    """
    own, others = model.state_dict(), other.state_dict()
    if different := sorted(own.keys() ^ others.keys()) or [key for key in own if own[key].shape != others[key].shape]:
        raise ValueError(f"the two networks differ in {', '.join(different[:3])}; take runs of one network")
    mean = {key: own[key].lerp(others[key].to(own[key]), 0.5) for key in own if own[key].is_floating_point()}
    model.load_state_dict(own | mean)


def _grown(value: Tensor, target: Tensor, name: str, layer: nn.Module, inner: nn.Module) -> Tensor:
    if name != "weight" or not isinstance(layer, ExpandedLayer) or isinstance(layer, LiftingConv2d):
        _require_layout(value, target.shape)
        return value
    if getattr(layer, "standardize", None) is not None:
        raise ValueError("its kernels are standardized, and zeros would change them; train it over its own group")
    group, subgroup = (getattr(module, "group", None) for module in (layer, inner))
    if not isinstance(group, Group) or not isinstance(subgroup, Group):
        raise ValueError("its fields are not regular; train it over its own group")
    elements = group.elements_of(subgroup)
    _require_layout(value, torch.Size((*target.shape[:2], len(elements), *target.shape[3:])))
    return torch.zeros_like(target).index_copy_(2, torch.tensor(elements, device=target.device), value.to(target))


def _fill(new: Any, plain: Any, group: Group, weights: Weights, folding: Any) -> None:
    pooled = False
    if isinstance(new, PerElement):
        new.module.load_state_dict(plain.state_dict())
        return
    flattened = new if isinstance(new, GroupMapNorm) else None
    if isinstance(new, FibreNorm | GroupMapNorm):
        new = new.norm
    elif isinstance(new, GroupVectorMap):
        _fill_vector_map(new, plain, group.order, weights)
        return
    elif isinstance(new, GroupEca):
        plain = plain.conv
    elif isinstance(new, nn.Sequential) and isinstance(plain, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        new, pooled = new[0], True  # behind it comes a group pooling
    elif new is None or isinstance(new, Idle):  # inside of what was replaced as a whole, or left out
        return
    own = new._parameters | new._buffers  # not by attribute: a shared parameter reads as one number a channel
    standardized = getattr(new, "standardize", None) is not None
    for name, value in (plain._parameters | plain._buffers).items():
        target = own.get(name)
        if target is None or value is None:
            if isinstance(value, nn.Parameter) and not standardized:
                raise ValueError(f"its {name} has no place in {type(new).__name__}; convert with fresh weights")
            continue
        if name == "weight" and isinstance(new, ExpandedLayer):
            if folding and isinstance(new, LiftingConv2d) and value.shape[1] != new.weight.shape[1]:
                value = _on_pixels(value, folding)
            if isinstance(new, GroupMapLinear) and weights == "transfer":
                value = value.unflatten(1, (-1, new.kernel_size, new.kernel_size))
            if pooled and weights == "project":  # the mean over a fibre is nearest if each of its filters is
                value = value.repeat_interleave(group.order, 1 if isinstance(plain, nn.ConvTranspose2d) else 0)
            kernels = _at_identity(new, value) if weights == "transfer" else _nearest(new, value, plain, group.order)
            target.copy_(kernels)
        elif name == "weight" and isinstance(new, InvariantLinear | InvariantConv2d) and weights == "project":
            target.copy_(value.unflatten(1, (-1, group.order)).sum(2))
        elif flattened is not None and value.ndim and value.shape != target.shape:  # one number a pixel of each element
            target.copy_(flattened.turned_back(value[None]).mean(2)[0])
        else:
            target.copy_(_per_field(value, target, group.order))
        target.requires_grad_(value.requires_grad)
    if standardized:
        _fill_standardization(new, plain, group.order, weights)


def _per_field(value: Tensor, target: Tensor, order: int) -> Tensor:
    """One number a field: the channel's own if there are as many channels as fields, else the mean along the fibre."""
    dims = [dim for dim, (a, b) in enumerate(zip(value.shape, target.shape, strict=False)) if a == b * order > b]
    if value.shape != target.shape and len(dims) == 1:
        value = value.unflatten(dims[0], (-1, order)).mean(dims[0] + 1)
    _require_layout(value, target.shape)
    return value


def _on_pixels(kernels: Tensor, folding: SpaceToDepth | nn.PixelUnshuffle) -> Tensor:
    """The kernels of a convolution behind a space-to-depth as kernels for the pixels in front of it."""
    side = side_folded_by(folding)
    if isinstance(folding, SpaceToDepth):  # whose channels are those of one place after another
        kernels = kernels.unflatten(1, (side**2, -1)).transpose(1, 2).flatten(1, 2)
    return F.pixel_shuffle(kernels, side)


def _at_identity(layer: ExpandedLayer, value: Tensor) -> Tensor:
    """Kernels that are the plain ones at the identity, element 0 of the fibre, and zero at the others."""
    kernels = torch.zeros_like(layer.weight)
    identity = kernels if isinstance(layer, LiftingConv2d) else kernels[:, :, 0]
    if isinstance(layer, GroupEca):
        value = value[0]
    _require_layout(value, identity.shape)
    identity.copy_(value)
    return kernels


def _nearest(layer: Any, value: Tensor, plain: Any, order: int) -> Tensor:
    """The kernels whose filters are nearest to the plain ones."""
    if isinstance(layer, GroupEca):
        raise ValueError(
            "its gates see neighbouring channels, which are no neighbouring fields; use weights='transfer'"
        )
    if isinstance(plain, nn.Linear):
        side = layer.kernel_size  # of a flattened map; else 1
        value = value.unflatten(1, (-1, side, side))
    else:
        value = _with_groups(value, plain.groups, layer.groups)
        value = F.pad(value, [(layer.kernel_size - side) // 2 for side in value.shape[:1:-1] for _ in range(2)])
    return _projected(layer, value, order)


def _projected(layer: ExpandedLayer, value: Tensor, order: int) -> Tensor:
    """`_nearest` for filters of the layer's own layout."""
    filters, basis = value.double(), layer.basis
    _require_layout(filters, expand(layer.weight, basis).shape)
    # E^T is the gradient of E.
    _, kernels = torch.autograd.functional.vjp(lambda w: expand(w, basis), layer.weight.double(), filters)
    if basis.samples is None:
        return kernels / order
    samples = basis.samples.double()
    return kernels @ torch.linalg.pinv(torch.einsum("gfy,gey->fe", samples, samples), hermitian=True)


def _fill_vector_map(new: GroupVectorMap, plain: nn.Linear, order: int, weights: Weights) -> None:
    side = new.kernels.kernel_size
    kernels = plain.weight.T.unflatten(1, (-1, side, side))
    parts: list[tuple[ExpandedLayer, Tensor, Tensor]] = [(new.kernels, kernels, plain.weight)]
    if new.offset is not None:  # its window slides over one pixel, and meets it with its last one first
        parts.append((new.offset, plain.bias.view(-1, 1, side, side).flip(2, 3), plain.bias))
    for layer, filters, parameter in parts:
        layer.weight.copy_(_at_identity(layer, filters) if weights == "transfer" else _projected(layer, filters, order))
        layer.weight.requires_grad_(parameter.requires_grad)


def _require_layout(value: Tensor, expected: torch.Size) -> None:
    if value.shape != expected:
        raise ValueError(
            f"its weight {tuple(value.shape)} has another layout than the equivariant one, {tuple(expected)}, so it "
            "cannot be carried over; convert with fresh weights"
        )


def _with_groups(filters: Tensor, groups: int, fewer: int) -> Tensor:
    """(out, in / groups, k, k) as the same map in fewer groups, zero between those that are joined."""
    if groups % fewer:
        raise ValueError(
            f"its {groups} groups would become {fewer}, which does not divide them; use weights='transfer'"
        )
    joined = groups // fewer
    blocks = filters.unflatten(0, (fewer, joined, -1))  # (fewer, joined, out / groups, in / groups, k, k)
    diagonal = torch.einsum("fjoihw,jl->fjolihw", blocks, torch.eye(joined).to(blocks))
    return diagonal.flatten(3, 4).flatten(0, 2)


def _fill_standardization(layer: Any, plain: Any, order: int, weights: Weights) -> None:
    """Gives the standardized filters the plain layer's gains.

    With its kernel at the identity, one in |G| of the numbers that a field's filters are standardized by is the plain
    layer's, the others are zero. A plain kernel of mean zero, times sqrt|G|, makes the variance the plain layer's; what
    that makes too large, the factor of the gain takes back, which is that of one of |G| times as many inputs.
    """
    standardize, gain = layer.standardize, getattr(plain, "gain", None)
    if weights == "transfer" and not isinstance(layer, LiftingConv2d):
        kernel = layer.weight[:, :, 0]
        kernel.sub_(kernel.mean((1, 2, 3), keepdim=True)).mul_(math.sqrt(order))
        gain = plain.weight.new_ones(layer.out_fields) if gain is None else gain.flatten()
        standardize.gain = nn.Parameter(gain.clone(), plain.weight.requires_grad)
    elif gain is not None:
        standardize.gain.copy_(_per_field(gain.flatten(), standardize.gain, order))
