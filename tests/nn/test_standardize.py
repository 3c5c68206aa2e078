"""Weight standardization: exact, and timm's over the trivial group."""

import pytest
import torch
from timm.layers import ScaledStdConv2d, StdConv2d

import gzoo
from gzoo import groups
from gzoo.nn import GroupConv2d, WeightStandardization
from tests.conftest import GRID_GROUPS, random_fields, worst_error


def standardized(group, **options):
    layer = GroupConv2d(groups.get(group), 3, 4, 3, padding=1)
    gain = torch.rand(4) if options.pop("gain", True) else None
    layer.standardize = WeightStandardization(4, layer.group.order, 1e-5, gain, 1.5)
    return layer.double()


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("group", [*GRID_GROUPS, "c8"])
def test_it_and_its_gradients_commute_with_the_group(group, gain):
    for size in ((4, 4), (5, 5), (3, 6)):
        assert worst_error(standardized(group, gain=gain), group, random_fields(group, 3, size)) < 1e-12


def test_filters_have_no_mean_and_unit_variance():
    layer = standardized("p4m", gain=False)
    filters = layer.standardize(layer.filter())
    assert filters.mean((1, 2, 3)).abs().max() < 1e-12
    assert (filters.var((1, 2, 3), unbiased=False) - 1).abs().max() < 1e-2


@pytest.mark.parametrize("kind", [StdConv2d, ScaledStdConv2d])
def test_over_the_trivial_group_it_is_timms(kind):
    plain = kind(6, 8, 3, bias=True)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 1), plain, torch.nn.Conv2d(8, 2, 1))
    with torch.no_grad():
        plain.bias.fill_(0.3)
    layer = gzoo.convert(network.double(), "c1")[1]
    with torch.no_grad():
        layer.weight.copy_(plain.weight.view_as(layer.weight))
    x = random_fields("c1", 6)
    assert torch.allclose(layer(x), plain(x))
