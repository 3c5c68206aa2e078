"""CondConv over a group: it commutes, and is for each image the convolution with its own mixture of filters."""

import pytest
import torch
from torch import nn

from gzoo import groups
from gzoo.check import relative_error
from gzoo.nn import GroupCondConv2d, GroupConv2d, InvariantLinear
from tests.conftest import GRID_GROUPS, elements, random_fields, with_random_statistics, worst_error

VARIANTS = {
    "1x1": {"kernel_size": 1, "bias": True},
    "2x2 strided": {"kernel_size": 2, "stride": 2},
    "3x3 strided": {"kernel_size": 3, "stride": 2, "padding": 1, "bias": True},
    "3x3 reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "3x3 depthwise, strided": {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 4},
}


class Routed(nn.Module):
    """As timm uses it: the image chooses its experts."""

    def __init__(self, group, **options):
        super().__init__()
        self.routing = InvariantLinear(groups.get(group), 4, 3)
        self.conv = GroupCondConv2d(GroupConv2d(groups.get(group), 4, 12, **options), num_experts=3)

    def forward(self, x):
        return self.conv(x, self.routing(x.mean((2, 3))).sigmoid())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group", GRID_GROUPS)
def test_it_and_its_gradients_commute_with_the_group(group, variant):
    layer = with_random_statistics(Routed(group, **VARIANTS[variant]))
    for size in ((7, 7), (8, 8), (6, 9)):
        assert worst_error(layer, group, random_fields(group, 4, size)) < 1e-12


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_image_is_convolved_with_its_own_mixture(variant):
    group, options = groups.get("p4"), VARIANTS[variant]
    layer = with_random_statistics(GroupCondConv2d(GroupConv2d(group, 4, 12, **options), num_experts=3))
    one = GroupConv2d(group, 4, 4, **options).double()
    x, shares = random_fields("p4", 4, (8, 8), batch=3), torch.rand(3, 3, dtype=torch.float64)
    result = layer(x, shares)
    for k in range(3):
        mixed = {
            name: torch.einsum("e,e...->...", shares[k], value.unflatten(0, (3, 4)))
            for name, value in layer.experts.state_dict().items()
        }
        one.load_state_dict(mixed)
        assert relative_error(result[k], one(x[k : k + 1])[0]) < 1e-12
    assert not torch.allclose(result[0], layer(x, shares.flip(0))[0])


def test_its_types_say_what_one_expert_gives():
    layer = GroupCondConv2d(GroupConv2d(groups.get("p4m"), 4, 6, 3), num_experts=3)
    assert (layer.in_type.size, layer.out_type.size) == (4 * len(elements("p4m")), 2 * len(elements("p4m")))


def test_a_map_of_another_width_is_refused():
    layer = GroupCondConv2d(GroupConv2d(groups.get("p4"), 4, 6, 3), num_experts=3)
    with pytest.raises(ValueError, match=r"has 5 channels, not 4 fields \* \|G\| = 4"):
        layer(torch.randn(1, 5, 8, 8), torch.rand(1, 3))
