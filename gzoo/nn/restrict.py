"""Restriction: fields of a group, read as fields of a subgroup."""

import torch
from torch import Tensor, nn

from gzoo.groups import Group


class Restriction(nn.Module):
    """Reads a regular field of G as [G:H] regular fields of its subgroup H; layers behind it need commute with H only.

    Nothing is lost or mixed: each right coset Hx of the fibre becomes a field of its own. Exact for every group.

    Args:
        group: G.
        subgroup: H.

    Shape:
        x: (B, fields * |G|, H, W), or (B, fields * |G|); result: as x, now fields * [G:H] fields of |H| channels.

    Raises:
        ValueError: H is no subgroup of G.

    Source: Weiler & Cesa 2019, arXiv:1911.08251, section 2.7; the tests compare with ``escnn.nn.RestrictionModule``.
    """

    def __init__(self, group: Group, subgroup: Group) -> None:
        super().__init__()
        self.before, self.after = group, subgroup
        self.order: Tensor
        self.register_buffer("order", torch.tensor(group.restriction(subgroup)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, len(self.order))).index_select(2, self.order).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"{self.before.name} to {self.after.name}"
