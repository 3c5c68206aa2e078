"""Feature maps with their escnn types: what a type's channels do under an element, and the types of a pyramid."""

import operator
from functools import cache
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import numpy as np
import torch
from timm.models import FeatureInfo
from torch import Tensor, nn

from gzoo import _escnn
from gzoo.equivariant import group_of
from gzoo.groups import Group

if TYPE_CHECKING:
    from escnn.group import GroupElement, Representation
    from escnn.nn import FieldType, GeometricTensor


@overload
def transform_features(x: Tensor, g: "int | GroupElement", type: "FieldType") -> Tensor: ...
@overload
def transform_features(x: "GeometricTensor", g: "int | GroupElement") -> "GeometricTensor": ...
def transform_features(
    x: "Tensor | GeometricTensor", g: "int | GroupElement", type: "FieldType | None" = None
) -> "Tensor | GeometricTensor":
    """g.x for a map of any permutation fields: moves pixels, and the values in each fibre. Exact, and differentiable.

    The inverse takes it back: ``transform_features(y, group.inverse(g), type)``, or ``~g`` for escnn's elements. Where
    ``GeometricTensor.transform`` interpolates, detaches and keeps the size, this moves whole pixels, so a quarter turn
    of a map that is not square exchanges height and width.

    Args:
        x: (B, type.size, H, W), or (B, type.size) without pixels; or a ``GeometricTensor``, whose type is taken.
        g: an element that maps the pixel grid onto itself, by its index as in `gzoo.groups` or as escnn's element;
            without pixels any element.
        type: what the channels are: regular, quotient and trivial fields in any order.

    Returns:
        g.x, like x a tensor or a ``GeometricTensor``; (B, type.size, W, H) after a quarter turn.

    Raises:
        ValueError: x does not have the channels of its type; g is no element, or lies between the pixels; the type is
            over a group that gzoo does not know, or has a field whose values mix or change sign, such as an irrep.
    """
    if not isinstance(x, Tensor):
        if not hasattr(x, "tensor"):
            raise ValueError(f"x is a {x.__class__.__name__}; accepted are a tensor and a GeometricTensor")
        return _escnn.load().nn.GeometricTensor(transform_features(x.tensor, g, x.type), x.type)
    if type is None:
        raise ValueError("a tensor's channels can be anything; give their escnn FieldType, or a GeometricTensor")
    if not hasattr(type, "representations"):
        raise ValueError(f"type is {type!r:.60}; it takes an escnn FieldType, such as group.field_type(fields) makes")
    if x.ndim not in (2, 4):
        raise ValueError(f"x is {tuple(x.shape)}; accepted are (B, {type.size}, H, W) and (B, {type.size})")
    if x.shape[1] != type.size:
        raise ValueError(f"x has {x.shape[1]} channels, but its type {type} has {type.size}")
    group, elements = _group(type), type.fibergroup.elements
    if not isinstance(g, SupportsIndex):
        if g not in elements:
            raise ValueError(f"{g} is no element of {group.name}, the group of the type")
        g = elements.index(g)
    g = operator.index(g)
    group.require_element(g)
    sources, channels = [], 0
    for representation in type.representations:
        sources.append(_sources(representation)[g] + channels)
        channels += representation.size
    y = x.index_select(1, torch.from_numpy(np.concatenate(sources)).to(x.device))
    return group.transform_image(y, g) if x.ndim > 2 else y


@cache
def _sources(representation: "Representation") -> np.ndarray:
    """(|G|, size): the channel of x that each channel of g.x is."""
    matrices = np.stack([representation(g) for g in representation.group.elements])
    rounded = np.rint(matrices)
    if np.abs(matrices - rounded).max() > 1e-6 or rounded.min() < 0 or (rounded.sum(2) != 1).any():
        raise ValueError(
            f"fields of {representation} do more than permute their values; transform_features takes regular, quotient "
            "and trivial fields. GeometricTensor.transform takes all, but interpolates"
        )
    return rounded.argmax(2)


def _group(type: "FieldType") -> Group:
    group = group_of_type(type)
    if group is None:
        raise ValueError(
            f"the type is over {type.gspace}, which is no group of gzoo: finite, turning about the centre, the "
            "reflection flipping the width axis. Make it with gzoo.groups.get(...).field_type, .image_type or .gspace"
        )
    return group


def group_of_type(type: "FieldType") -> Group | None:
    """The group that a type is over; None if it is none of gzoo's: infinite, or with a mirror axis of its own."""
    order = type.fibergroup.order()  # -1 if it is infinite
    candidates = (Group(order, False), Group(max(order // 2, 1), True)) if order > 0 else ()
    return next((group for group in candidates if group.gspace == type.gspace), None)


def level_groups(model: Any) -> list[Group]:
    """The groups of the levels that ``model`` gives; empty where it has one group throughout."""
    info = getattr(model, "feature_info", None)
    if isinstance(info, FeatureInfo):
        levels = [info.info[i] for i in info.out_indices]
    else:  # of one's own network it says where the stages end, not what comes out
        levels = info if info and hasattr(model, "forward_intermediates") else []
    return [level["group"] for level in levels if "group" in level]


def field_types(model: nn.Module) -> list["FieldType"]:
    """The escnn type of each level of a pyramid: regular fields, as many as `feature_info` says.

    Args:
        model: of ``timm.create_model(..., features_only=True)``.

    Raises:
        ValueError: the model is a plain network, or gives no pyramid.
    """
    group, info = group_of(model), getattr(model, "feature_info", None)
    if group is None:
        raise ValueError(f"{type(model).__name__} is a plain network, so its features have no type; see gzoo.convert")
    if not isinstance(info, FeatureInfo):
        raise ValueError(f"{type(model).__name__} gives no pyramid of features; create it with features_only=True")
    channels = info.channels()
    laws = level_groups(model) or len(channels) * [group]
    return [law.field_type(size // law.order) for law, size in zip(laws, channels, strict=True)]


def geometric(model: nn.Module, x: Tensor) -> list["GeometricTensor"]:
    """The pyramid of an image as escnn's ``GeometricTensor``, a level each.

    Args:
        model: of ``timm.create_model(..., features_only=True)``.
        x: (B, in_chans, H, W).

    Raises:
        ValueError: as `field_types`.
    """
    types = field_types(model)
    return [_escnn.load().nn.GeometricTensor(y, law) for y, law in zip(model(x), types, strict=True)]
