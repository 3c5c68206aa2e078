"""Efficient channel attention along the fields."""

import torch.nn.functional as F
from torch import Tensor, nn

from gzoo.bases import regular_basis
from gzoo.groups import Group
from gzoo.nn.expand import ExpandedLayer


class GroupEca(ExpandedLayer):
    """Efficient channel attention (Wang et al. 2020, arXiv:1910.03151) on regular fields.

    The plain module lets each channel's gate see the neighbouring channels. Here a field's gates, one for each element
    of its fibre, see the neighbouring fields: one convolution along the fields that is a group convolution along the
    fibre. Exact for every group.

    Args:
        group: any point group.
        kernel_size: how many fields a gate sees; odd.
        gate: from any number to a factor, such as ``nn.Sigmoid()``.

    Shape:
        x and result: (B, fields * |G|, H, W). weight: (1, kernel_size, |G|).
    """

    def __init__(self, group: Group, kernel_size: int, gate: nn.Module) -> None:
        super().__init__(1, kernel_size, regular_basis(group, 1)._replace(parameters=(group.order,)))
        self.group, self.gate = group, gate
        nn.init.normal_(self.weight, std=self.weight.numel() ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        order, neighbours = self.group.order, self.weight.shape[1]
        fibres = x.mean((2, 3)).unflatten(1, (-1, order)).transpose(1, 2)  # (B, |G|, fields)
        filters = self.filter().view(order, neighbours, order).transpose(1, 2)  # (|G| out, |G| in, neighbours)
        gates = F.conv1d(fibres, filters, padding=neighbours // 2).transpose(1, 2).flatten(1)
        return x * self.gate(gates)[:, :, None, None]
