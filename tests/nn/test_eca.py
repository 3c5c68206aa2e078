"""Channel attention along the fields: exact, and the plain module over the trivial group."""

import pytest
import torch
from timm.layers import EcaModule
from torch import nn

from gzoo import groups
from gzoo.nn import GroupEca
from tests.conftest import GRID_GROUPS, random_fields, worst_error


@pytest.mark.parametrize("group", [*GRID_GROUPS, "c8", "d3"])
def test_it_and_its_gradients_commute_with_the_group(group):
    layer = GroupEca(groups.get(group), 3, nn.Sigmoid()).double()
    for size in ((4, 4), (5, 5), (3, 6)):
        assert worst_error(layer, group, random_fields(group, 5, size)) < 1e-12


def test_over_the_trivial_group_it_is_the_plain_module():
    plain, layer = EcaModule(kernel_size=5).double(), GroupEca(groups.get("c1"), 5, nn.Sigmoid()).double()
    with torch.no_grad():
        layer.weight.copy_(plain.conv.weight.view(1, 5, 1))
    x = random_fields("c1", 7)
    assert torch.allclose(layer(x), plain(x))


def test_gates_see_their_neighbours_and_poses_differ():
    layer = GroupEca(groups.get("p4"), 3, nn.Identity()).double()
    x = torch.zeros(1, 4 * 5, 1, 1, dtype=torch.float64)
    x[0, 4 * 2] = 1  # one element of the fibre of field 2
    gates = layer.forward(x + 1).flatten() / (x + 1).flatten() - layer.forward(x * 0 + 1).flatten()
    moved = gates.view(5, 4).abs() > 1e-9
    assert moved.all(1).tolist() == [False, True, True, True, False]
    assert len(set(gates.view(5, 4)[1].tolist())) == 4
