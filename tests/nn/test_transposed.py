"""Transposed group convolutions: exact, the adjoint of the group convolution, and torch's size."""

import pytest
import torch
from torch import nn

import gzoo
from gzoo import groups
from gzoo.check import relative_error
from gzoo.nn import GroupConv2d, GroupConvTranspose2d, GroupMapLinear, GroupVectorMap
from gzoo.plan import plan
from tests.conftest import GRID_GROUPS, random_fields, with_random_statistics, worst_error

VARIANTS = {
    "2x2 strided": {"kernel_size": 2, "stride": 2},
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x3 strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "4x4 strided, padded": {"kernel_size": 4, "stride": 2, "padding": 1},
    "3x3 dilated": {"kernel_size": 3, "dilation": 2, "bias": False},
    "3x3 depthwise": {"kernel_size": 3, "groups": 4},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group", [*GRID_GROUPS, "c8", "d8"])
def test_it_and_its_gradients_commute_with_the_group(group, variant):
    layer = with_random_statistics(GroupConvTranspose2d(groups.get(group), 4, 4, **VARIANTS[variant]))
    for size in ((4, 4), (5, 5), (3, 6)):
        assert worst_error(layer, group, random_fields(group, 4, size, batch=1)) < 1e-12


@pytest.mark.parametrize(("group", "basis"), [("p4", "steerable"), ("p4m", "steerable_3r"), ("c8", "steerable_3r")])
@pytest.mark.parametrize("kernel", [3, 4])
def test_the_basis_is_the_one_asked_for(group, basis, kernel):
    layer = GroupConvTranspose2d(groups.get(group), 2, 3, kernel, stride=2, padding=1, basis=basis).double()
    assert layer.basis_name == basis
    assert worst_error(layer, group, random_fields(group, 2)) < 1e-12


@pytest.mark.parametrize("basis", [None, "steerable"])
def test_as_many_parameters_are_planned_as_are_built(basis):
    up = nn.ConvTranspose2d(16, 16, 4, 2, 1)
    plain = nn.Sequential(nn.Conv2d(3, 16, 3), up, nn.ReLU(), nn.Conv2d(16, 2, 1))
    planned = plan(plain, groups.chain("p4m"), basis=basis).total().params
    assert sum(p.numel() for p in gzoo.convert(plain, "p4m", basis=basis).parameters()) == planned


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_size_is_that_of_torch(variant):
    options = VARIANTS[variant]
    plain = nn.ConvTranspose2d(8, 8, **(options | {"groups": 1}))
    layer = GroupConvTranspose2d(groups.get("p4"), 4, 4, **options)
    for size in ((4, 4), (5, 7)):
        assert layer(torch.zeros(1, 16, *size)).shape[2:] == plain(torch.zeros(1, 8, *size)).shape[2:]


def test_it_is_the_adjoint_of_the_group_convolution():
    group = groups.get("p4m")
    up = GroupConvTranspose2d(group, 3, 2, 3, padding=1, bias=False).double()
    down = GroupConv2d(group, 2, 3, 3, padding=1, bias=False).double()
    with torch.no_grad():
        down.weight.copy_(up.weight)
    x, y = random_fields("p4m", 3), random_fields("p4m", 2)
    assert torch.allclose((up(x) * y).sum(), (x * down(y)).sum())


def test_other_channels_are_refused():
    with pytest.raises(ValueError, match=r"x of shape .* has 8 channels, not 4 fields"):
        GroupConvTranspose2d(groups.get("p4"), 4, 4, 2)(torch.zeros(1, 8, 3, 3))


@pytest.mark.parametrize("group", ["p4", "p4m", "d2", "c8"])
@pytest.mark.parametrize("size", [(4, 4), (5, 7)])
def test_output_padding_is_spread_over_the_map_and_commutes_with_the_group(group, size):
    layer = with_random_statistics(
        GroupConvTranspose2d(groups.get(group), 2, 3, 3, stride=2, padding=1, output_padding=1)
    )
    x = random_fields(group, 2, size)
    assert layer(x).shape[2:] == (2 * size[0], 2 * size[1])
    assert worst_error(layer, group, x) < 1e-12


@pytest.mark.parametrize("group", [*GRID_GROUPS, "c8", "d8"])
@pytest.mark.parametrize("side", [2, 3])
def test_a_map_of_a_vector_turns_with_it(group, side):
    own = groups.get(group)
    layer = GroupVectorMap(own, 3, 2, side).double()
    torch.nn.init.normal_(layer.offset.weight)
    x = torch.randn(2, 3 * own.order, dtype=torch.float64)
    y = layer(x).unflatten(1, (-1, side, side))
    assert y.shape == (2, 2 * own.order, side, side)
    for g in own.grid_elements:
        moved = layer(own.transform_features(x, g)).view_as(y)
        assert relative_error(moved, own.transform_features(y, g)) < 1e-12
    assert relative_error(layer(0 * x), layer(x)) > 1e-3
    if (group, side) in (("c8", 2), ("d8", 2)):  # whose filters of 2x2 pixels are constant
        return
    constant = layer(0 * x).view_as(y)
    assert (constant - constant.mean((2, 3), keepdim=True)).abs().max() > 1e-3  # a bias a pixel


def test_without_its_bias_it_is_the_adjoint_of_a_linear_layer_over_a_flattened_map():
    own = groups.get("p4m")
    down, up = GroupMapLinear(own, 2, 3, 3, bias=False).double(), GroupVectorMap(own, 3, 2, 3, bias=False).double()
    up.kernels.weight = down.weight
    x, y = torch.randn(2 * 8 * 9, dtype=torch.float64), torch.randn(3 * 8, dtype=torch.float64)
    torch.testing.assert_close(down(x[None])[0] @ y, x @ up(y[None])[0])
    with pytest.raises(ValueError, match="lift an image"):
        up(torch.randn(1, 5, dtype=torch.float64))
