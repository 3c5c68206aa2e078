"""Linear maps and group pooling commute with every group, on and off the grid."""

import math

import pytest
import torch
from torch import nn

from gzoo import _escnn, groups
from gzoo.nn import GroupConv2d, GroupLinear, GroupPool, InvariantLinear, VectorPool
from tests.conftest import GRID_GROUPS, random_fields, with_random_statistics, worst_error

GROUPS = [*GRID_GROUPS, "c3", "c8", "d5", "d8"]


@pytest.mark.parametrize("group", GROUPS)
def test_group_linear_and_its_gradients_commute_with_the_group(group):
    layer = with_random_statistics(GroupLinear(groups.get(group), 3, 5))
    assert worst_error(layer, group, random_fields(group, 3, ())) < 1e-12


@pytest.mark.parametrize("group", GRID_GROUPS)
def test_group_linear_on_pixels_with_channels_last_commutes_with_the_group(group):
    layer = with_random_statistics(GroupLinear(groups.get(group), 3, 5))
    x = random_fields(group, 3, (4, 6)).movedim(1, -1)
    assert worst_error(layer, group, x, "channels last") < 1e-12


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("pool", ["mean", "max"])
def test_invariant_linear_gives_the_same_logits_and_gradients_in_every_pose(group, pool):
    layer = with_random_statistics(InvariantLinear(groups.get(group), 3, 5, pool=pool))
    assert worst_error(layer, group, random_fields(group, 3, ()), "fields", "invariant") < 1e-12


@pytest.mark.parametrize("group", GRID_GROUPS)
@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("size", [(4, 4), (5, 5), (4, 7)])
def test_group_pooling_gives_a_trivial_field(group, pool, size):
    layer = GroupPool(groups.get(group).order, pool)
    assert worst_error(layer, group, random_fields(group, 3, size), "fields", "image") < 1e-12


@pytest.mark.parametrize("group", GROUPS)
def test_vector_pooling_gives_vectors_that_turn_with_the_fibre(group):
    layer = VectorPool(groups.get(group), [(0, 1)]).double()
    assert worst_error(layer, group, random_fields(group, 2, ()), "fields", "vectors", range(layer.group_order)) < 1e-7


@pytest.mark.parametrize("group", [*GRID_GROUPS, "c8", "d8", "c12"])
@pytest.mark.parametrize("size", [(4, 4), (5, 5), (4, 7)])
def test_vector_pooling_gives_vectors_that_turn_with_the_map(group, size):
    layer = VectorPool(groups.get(group), [(0, 1)]).double()
    assert worst_error(layer, group, random_fields(group, 2, size), "fields", "vectors") < 1e-12


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("dim", [1, -1])
def test_vector_pooling_leaves_the_other_channels_numbers(pool, dim):
    group = groups.get("p4m")
    x = random_fields("p4m", 5, (4, 6))
    y = VectorPool(group, [(3, 1), (0, 4)], pool, dim).double()(x.movedim(1, dim)).movedim(dim, 1)
    fibres = x.unflatten(1, (5, 8))
    assert torch.allclose(y[:, 2], GroupPool(8, pool)(x)[:, 2])
    for right, down in ((3, 1), (0, 4)):
        pairs = fibres[:, [right, down]]  # (B, 2, |G|, H, W)
        turned = torch.stack([torch.tensor(group.turn(g, 2)).double() for g in range(8)])
        assert torch.allclose(y[:, [right, down]], torch.einsum("gij,bjghw->bihw", turned, pairs) / 8)


@pytest.mark.parametrize("group", ["p4", "p4m", "c8"])
def test_a_plain_linear_map_does_not_commute_with_the_group(group):
    channels = 3 * groups.get(group).order
    plain = nn.Linear(channels, channels).double()
    assert worst_error(plain, group, random_fields(group, 3, ())) > 0.1
    assert worst_error(plain, group, random_fields(group, 3, ()), "fields", "invariant") > 0.1


@pytest.mark.parametrize("group", ["c2", "p4", "d1", "p4m"])
def test_max_pooling_of_the_group_is_escnns(group):
    G, escnn = groups.get(group), _escnn.load()
    x = random_fields(group, 3).float()
    theirs = escnn.nn.GroupPooling(G.field_type(3))(escnn.nn.GeometricTensor(x, G.field_type(3))).tensor
    assert torch.allclose(GroupPool(G.order, "max")(x), theirs, atol=1e-6)


@pytest.mark.parametrize("group", ["p4m", "d5"])
def test_group_linear_is_a_1x1_group_convolution(group):
    G = groups.get(group)
    linear, conv = GroupLinear(G, 3, 5).double(), GroupConv2d(G, 3, 5, 1).double()
    conv.load_state_dict({"weight": linear.weight[..., None, None], "bias": torch.randn(5, dtype=torch.float64)})
    linear.bias.data = conv.bias.data
    x = random_fields(group, 3, (1, 1))
    assert torch.allclose(linear(x[..., 0, 0]), conv(x)[..., 0, 0])


def test_group_linear_has_the_order_times_fewer_parameters_than_a_plain_one():
    layer = GroupLinear(groups.get("p4m"), 3, 5)
    assert layer.weight.shape == (5, 3, 8)
    assert layer.bias.shape == (5,)


def test_initial_weights_of_group_linear_keep_the_variance_through_a_relu():
    layer = GroupLinear(groups.get("p4m"), 64, 256)
    x = torch.randn(64, 512).relu()
    assert abs(layer(x).relu().square().mean() / x.square().mean() - 1) < 3 * math.sqrt(5 / 256)


def test_invariant_linear_has_the_parameters_of_a_plain_linear():
    state = InvariantLinear(groups.get("p4"), 3, 5).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {"weight": (5, 3), "bias": (5,)}


def test_types_say_how_many_regular_fields():
    G = groups.get("p4")
    assert GroupLinear(G, 3, 5).in_type == G.field_type(3) == InvariantLinear(G, 3, 5).in_type
    assert GroupLinear(G, 3, 5).out_type == G.field_type(5)


@pytest.mark.parametrize("layer", [GroupLinear, InvariantLinear])
def test_channels_that_are_not_the_layers_fields_are_refused(layer):
    with pytest.raises(ValueError, match=r"has 8 channels, not 3 fields \* \|G\| = 4"):
        layer(groups.get("p4"), 3, 5)(torch.zeros(2, 8))


def test_a_map_is_refused_by_the_linear_classifier():
    with pytest.raises(ValueError, match=r"takes pooled features .* not a map of shape \(2, 12, 4, 4\)"):
        InvariantLinear(groups.get("p4"), 3, 5)(torch.zeros(2, 12, 4, 4))
