"""Kernel bases: how the free parameters of a kernel fill the filter that is equivariant.

The pixel basis is exact for groups that map the grid onto itself. One kernel w is a function on G (or on the plane, for
a lifting kernel), and the filter for output element g is w transformed by g:

    lifting:           filter[g](y)    = w(g^-1 y)            Cohen & Welling 2016, equation 10
    group convolution: filter[g, h](y) = w(g^-1 h, g^-1 y)    equation 11

Every parameter of w stands once in each filter[g], so the expansion is a gather. A 3x3 kernel between two regular
fields keeps all 9|G| parameters.
"""

from functools import cache

import torch
from torch import Tensor

from gzoo.groups import Group


@cache
def lifting_index(group: Group, size: int) -> Tensor:
    """Where filter[g](y) lies in the flattened w: (|G|, size, size), values below size^2."""
    if size == 1:  # without pixels there is nothing to turn, so every group is exact, on the grid or not
        return torch.zeros(group.order, 1, 1, dtype=torch.long)
    w = _flat_index(1, size)
    return torch.stack([group.transform_image(w[0], g) for g in range(group.order)]).squeeze(1)


@cache
def regular_index(group: Group, size: int) -> Tensor:
    """Where filter[g, h](y) lies in the flattened w: (|G|, |G|, size, size), values below |G| size^2."""
    if size == 1:  # as above
        rows = [[group.multiply(group.inverse(g), h) for h in range(group.order)] for g in range(group.order)]
        return torch.tensor(rows)[..., None, None]
    w = _flat_index(group.order, size)
    return torch.stack([group.transform_features(w, g) for g in range(group.order)]).squeeze(1)


def _flat_index(order: int, size: int) -> Tensor:
    return torch.arange(order * size * size).view(1, order, size, size)


def expand(weight: Tensor, index: Tensor) -> Tensor:
    """Filters from kernels.

    Args:
        weight: kernels, (fields out, fields in, ...), parameters of one kernel last.
        index: from `lifting_index` (|G|, k, k) or `regular_index` (|G|, |G|, k, k).

    Shape:
        (fields out * |G|, fields in, k, k) for lifting, (fields out * |G|, fields in * |G|, k, k) else.
    """
    out_fields, in_fields = weight.shape[:2]
    order, *_, height, width = index.shape
    # One gather straight into the layout of the filter: an index_select would need a transposed copy after it.
    kernels = weight.flatten(2).unsqueeze(1).expand(-1, order, -1, -1)  # (out, |G|, in, parameters)
    where = index.view(1, order, 1, -1).expand(out_fields, -1, in_fields, -1)  # (out, |G|, in, |G| or 1 * k * k)
    return kernels.gather(3, where).view(out_fields * order, -1, height, width)
