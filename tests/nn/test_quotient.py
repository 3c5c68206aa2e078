"""Layers of quotient fields and mixtures commute with the group at every size, and are escnn's."""

import math

import pytest
import torch
from torch import nn

from gzoo import _escnn, check, groups
from gzoo.check import relative_error
from gzoo.nn import FibreNorm, GroupConv2d, GroupPool, LiftingConv2d, QuotientConv2d, QuotientNorm, QuotientPool
from tests.conftest import random_fields, random_image, with_random_statistics, worst_error
from tests.nn.test_conv import SIZES, gain, second_moments

# Mixtures in and out: rotations, reflections and both in the stabilizers, trivial fields, an image, an invariant map.
MIXTURES = [
    ("c1", {"c1": 3}, {"c1": 2}),
    ("c2", {"c2": 2, "c1": 1}, {"c1": 1, "c2": 1}),
    ("p4", {"p4": 3}, {"c2": 2, "c1": 1}),
    ("p4", {"c1": 1, "c2": 2}, {"c2": 1, "p4": 2}),
    ("p4", {"c2": 2}, {"p4": 3}),
    ("d1", {"c1": 1, "d1": 1}, {"d1": 2, "c1": 1}),
    ("d2", {"c1": 1, "d1": 1, "c2": 1}, {"d1": 1, "d2": 1}),
    ("p4m", {"c1": 1, "d1": 1}, {"d2": 1, "c2": 1, "p4": 1}),
    ("p4m", {"p4m": 2, "d2": 1}, {"d1": 1, "p4m": 1}),
]
STEERABLE = [
    *MIXTURES,
    ("c3", {"c1": 1, "c3": 1}, {"c1": 1, "c3": 1}),
    ("c8", {"c1": 1, "c2": 1, "c4": 1, "c8": 1}, {"c2": 1, "c4": 2, "c8": 1}),
    ("d6", {"d1": 1, "c2": 1}, {"d3": 1, "c3": 1}),
    ("d8", {"c1": 1, "d2": 1}, {"d1": 1, "c8": 1, "d8": 1}),
]
VARIANTS = {
    "1x1": {"kernel_size": 1},
    "2x2 strided": {"kernel_size": 2, "stride": 2},
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x3 strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "3x3 dilated, reflect": {"kernel_size": 3, "padding": 2, "dilation": 2, "padding_mode": "reflect"},
    "4x4 same": {"kernel_size": 4, "padding": "same"},
    "5x5 strided": {"kernel_size": 5, "stride": 2, "padding": 2},
}


def random_map(field_type, size=(5, 5), batch=2):
    return random_image(field_type.size, size, batch)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("group", "inside", "outside"), MIXTURES)
def test_convolutions_and_their_gradients_commute_with_the_group(group, inside, outside, variant):
    layer = with_random_statistics(QuotientConv2d(groups.get(group), inside, outside, **VARIANTS[variant]))
    for size in SIZES:
        x = random_map(layer.in_type, size, batch=1)
        assert worst_error(layer, group, x, layer.in_type, layer.out_type) < 1e-12


@pytest.mark.parametrize("variant", ["2x2 strided", "4x4 same", "5x5 strided"])
@pytest.mark.parametrize(("group", "inside", "outside"), STEERABLE)
def test_steerable_convolutions_and_their_gradients_commute_with_the_turns_of_the_grid(group, inside, outside, variant):
    options = VARIANTS[variant] | {"basis": "steerable"}
    layer = with_random_statistics(QuotientConv2d(groups.get(group), inside, outside, **options))
    for size in SIZES:
        x = random_map(layer.in_type, size, batch=1)
        assert worst_error(layer, group, x, layer.in_type, layer.out_type) < 1e-12


@pytest.mark.parametrize(("group", "inside", "outside"), STEERABLE)
def test_a_1x1_convolution_commutes_with_every_element(group, inside, outside):
    layer = with_random_statistics(QuotientConv2d(groups.get(group), inside, outside, 1))
    vectors = nn.Sequential(nn.Unflatten(1, (-1, 1, 1)), layer, nn.Flatten())
    everything = range(groups.get(group).order)
    x = random_map(layer.in_type, ())
    assert worst_error(vectors, group, x, layer.in_type, layer.out_type, everything) < 1e-12


def test_a_convolution_with_the_law_of_another_quotient_does_not_commute():
    layer = QuotientConv2d(groups.get("p4m"), {"c2": 1}, {"d1": 1}, 3, padding=1).double()
    other = groups.get("p4m").quotient_type({"c2": 1})  # of the same size
    assert worst_error(layer, "p4m", random_map(layer.in_type), layer.in_type, other) > 0.1


def fitted(layer, theirs):
    """``layer`` with the filter of an ``R2Conv``, by least squares, and its bias."""
    with torch.no_grad():
        found, bias = theirs.expand_parameters()
        weights = [block.weight for row in layer.blocks for block in row]
        count = sum(weight.numel() for weight in weights)
        filters = []
        for one in torch.eye(count):
            torch.nn.utils.vector_to_parameters(one, weights)
            filters.append(layer.filter().flatten())
        solution = torch.linalg.lstsq(torch.stack(filters).T.double(), found.flatten().double()[:, None]).solution
        torch.nn.utils.vector_to_parameters(solution[:, 0].float(), weights)
        layer.bias.copy_(bias[theirs.out_type.fields_start.tolist()])
    return layer


@pytest.mark.parametrize(("group", "inside", "outside"), [mixture for mixture in STEERABLE if mixture[0] != "c1"])
def test_the_layer_has_the_parameters_of_escnns_convolution_and_holds_its_filters(group, inside, outside):
    G, escnn = groups.get(group), _escnn.load()
    ours = QuotientConv2d(G, inside, outside, 3, padding=1, basis="steerable")
    theirs = escnn.nn.R2Conv(ours.in_type, ours.out_type, 3, padding=1, recompute=True)
    nn.init.normal_(theirs.bias)
    assert sum(weight.numel() for weight in ours.blocks.parameters()) == theirs.weights.numel()
    assert ours.bias.numel() == theirs.bias.numel()
    x = random_map(ours.in_type, (6, 7)).float()
    expected = theirs(escnn.nn.GeometricTensor(x, ours.in_type)).tensor
    assert relative_error(fitted(ours, theirs)(x), expected) < 1e-5


@pytest.mark.parametrize("group", ["p4", "p4m", "c8"])
def test_regular_fields_alone_are_those_of_the_group_convolution(group):
    G, x = groups.get(group), random_fields(group, 2, (6, 7))
    ours, regular = (kind.double() for kind in (QuotientConv2d(G, {"c1": 2}, {"c1": 3}, 3), GroupConv2d(G, 2, 3, 3)))
    ours.blocks[0][0].weight = regular.weight
    assert ours(x).equal(regular(x))
    assert (ours.in_type, ours.out_type) == (regular.in_type, regular.out_type)
    assert QuotientConv2d(G, {group: 3}, {"c1": 2}, 3).in_type == LiftingConv2d(G, 3, 2, 3).in_type


def test_a_mixture_is_the_sum_and_concatenation_of_its_parts():
    G = groups.get("p4")
    whole = with_random_statistics(QuotientConv2d(G, {"c1": 1, "c2": 2}, {"c2": 1, "p4": 2}, 3))
    x = random_map(whole.in_type)
    parts = []
    for row, bias, name in zip(whole.blocks, whole.bias.split([1, 2]), ("c2", "p4"), strict=True):
        y = 0
        for block, piece, inside in zip(row, x.split([4, 4], 1), ({"c1": 1}, {"c2": 2}), strict=True):
            part = QuotientConv2d(G, inside, {name: len(bias)}, 3, bias=False)
            part.blocks[0][0].weight = block.weight
            y = y + part(piece)
        parts.append(y + bias.repeat_interleave(y.shape[1] // len(bias))[:, None, None])
    assert relative_error(whole(x), torch.cat(parts, 1)) < 1e-12


def test_the_filter_in_eval_mode_follows_the_weights():
    layer = QuotientConv2d(groups.get("p4"), {"c2": 1}, {"c2": 1, "p4": 1}, 3).eval()
    x = random_map(layer.in_type).float()
    with torch.no_grad():
        before = layer(x)
        assert layer(x).equal(before)
        layer.blocks[0][0].weight.mul_(2)
        assert not layer(x).equal(before)
        torch.manual_seed(1)
        layer.reset_parameters()
        assert not layer(x).equal(before)


@pytest.mark.parametrize(("group", "inside", "outside"), STEERABLE)
@pytest.mark.parametrize("training", [True, False])
def test_norms_commute_with_every_element_and_are_escnns(group, inside, outside, training):
    G, escnn = groups.get(group), _escnn.load()
    norm = with_random_statistics(QuotientNorm(G, inside)).train(training)
    field_type = G.quotient_type(inside)
    assert worst_error(norm, group, random_map(field_type, (4, 5)), field_type) < 1e-12
    if len({representation.size for representation in field_type}) == len(inside):  # escnn joins equal sizes
        theirs = escnn.nn.InnerBatchNorm(field_type).double().train(training)
        for kind in norm.kinds:
            inner = getattr(theirs, f"batch_norm_[{kind.group_order}]")
            inner.load_state_dict(kind.norm.state_dict())
        x = random_map(field_type, (4, 5))
        assert relative_error(norm(x), theirs(escnn.nn.GeometricTensor(x, field_type)).tensor) < 1e-12


def test_a_norm_is_made_as_it_is_asked_for():
    norm = QuotientNorm(groups.get("p4"), {"c1": 4, "p4": 2}, lambda fields: nn.GroupNorm(2, fields))
    assert [type(kind.norm) for kind in norm.kinds] == [nn.GroupNorm, nn.GroupNorm]
    assert [kind.norm.num_channels for kind in norm.kinds] == [4, 2]


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize(("group", "inside", "outside"), STEERABLE)
def test_group_pooling_is_invariant_under_every_element_and_escnns(group, inside, outside, pool):
    G, escnn = groups.get(group), _escnn.load()
    layer, field_type = QuotientPool(G, inside, pool), G.quotient_type(inside)
    x = random_map(field_type, ())
    assert worst_error(layer, group, x, field_type, "invariant", range(G.order)) < 1e-12
    if pool == "max" and group != "c1":
        x = random_map(field_type).float()
        assert layer(x).equal(escnn.nn.GroupPooling(field_type)(escnn.nn.GeometricTensor(x, field_type)).tensor)


def test_one_kind_of_field_goes_through_the_layers_that_know_a_size_alone():
    G = groups.get("p4m")
    lift = QuotientConv2d(G, {"p4m": 1}, {"d1": 3}, 3, padding=1)
    layers = nn.Sequential(lift, FibreNorm(nn.BatchNorm2d(3), 4), nn.ReLU(), GroupPool(4))
    assert worst_error(with_random_statistics(layers), "p4m", random_image(1, (6, 7)), "image") < 1e-12


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_a_network_of_mixtures_as_in_the_paper_is_invariant_at_every_size(pool):
    G = groups.get("c8")  # the paper: 5 regular, 2 C16/C2, 2 C16/C4 and 4 trivial fields for c16
    fields = {"c1": 3, "c2": 2, "c4": 2, "c8": 2}
    model = nn.Sequential(
        *(QuotientConv2d(G, {"c8": 3}, fields, 5, padding=2), QuotientNorm(G, fields), nn.ReLU()),
        *(QuotientConv2d(G, fields, fields, 3, stride=2, padding=1), QuotientNorm(G, fields), nn.ReLU()),
        *(QuotientPool(G, fields, pool), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 4)),
    )
    model = with_random_statistics(model)
    for size in (16, 17, (15, 18)):
        assert check(model, size).worst < 1e-12
    broken = nn.Sequential(*model[:-4], nn.Conv2d(38, 1, 1), *model[-3:-1], nn.Linear(1, 4))
    assert check(broken, 17).worst > 1e-3


def test_initial_kernels_keep_the_variance_through_50_layers():
    # As in test_conv: each of 48 kernels to a field adds to the moment, a gain of 1 +- sqrt(5 / 48) a layer.
    G, fields = groups.get("p4"), {"c1": 16, "c2": 16, "p4": 16}
    layers = [QuotientConv2d(G, fields, fields, 3, padding=1, padding_mode="circular") for _ in range(50)]
    moments = second_moments(layers, random_map(G.quotient_type(fields)).float())
    assert abs(math.log(moments[-1] / moments[0])) < 3 * math.sqrt(5 / 48 * 50)


@pytest.mark.parametrize(("group", "subgroup"), [("p4", "c2"), ("p4", "p4"), ("p4m", "d1"), ("c8", "c4"), ("d8", "d8")])
def test_initial_kernels_keep_the_variance_of_a_constant(group, subgroup):
    G = groups.get(group)
    layer = QuotientConv2d(G, {subgroup: 16}, {subgroup: 400}, 3)
    constant = torch.ones(1, layer.in_channels, 3, 3)
    assert abs(gain(layer, constant) - 1) < 0.2
    for row in layer.blocks:
        for block in row:
            nn.init.normal_(block.weight, std=(2 / block.weight[0].numel()) ** 0.5)
    assert gain(layer, constant) > 1.3  # all kernels alike: those that sum to something would enlarge it


def test_a_map_with_other_channels_is_refused():
    G, fields = groups.get("p4"), {"c1": 1, "c2": 2}
    message = (
        r"\(2, 3, 5, 5\) does not have 8 channels, those of the fields 1 of p4/c1, 2 of p4/c2; bring an image there"
    )
    for layer in (QuotientConv2d(G, fields, fields, 3), QuotientNorm(G, fields), QuotientPool(G, fields)):
        with pytest.raises(ValueError, match=message):
            layer(random_image(3))


def test_fields_of_what_is_no_subgroup_are_refused():
    G = groups.get("p4")
    for make in (lambda f: QuotientConv2d(G, {"c1": 1}, f, 3), lambda f: QuotientConv2d(G, f, {"c1": 1}, 3)):
        with pytest.raises(ValueError, match=r"c3 is no subgroup of p4; its subgroups are c1, c2, p4"):
            make({"c1": 1, "c3": 2})
    for layer in (QuotientNorm, QuotientPool):
        with pytest.raises(ValueError, match="d1 is no subgroup of p4"):
            layer(G, {"d1": 1})
    with pytest.raises(ValueError, match=r"\['c4', 'p4'\] name a subgroup twice; add their numbers up"):
        QuotientNorm(G, {"c4": 1, "p4": 2})


def test_a_pixel_basis_off_the_grid_is_refused():
    with pytest.raises(ValueError, match=r"c8 .* has no pixel basis; use basis='steerable'"):
        QuotientConv2d(groups.get("c8"), {"c2": 1}, {"c1": 1}, 3, basis="pixel")


def test_the_printed_layers_say_their_fields():
    layer = QuotientConv2d(groups.get("p4"), {"c1": 1, "c2": 2}, {"p4": 3}, 3, stride=2, padding=1)
    assert "p4, {'c1': 1, 'c2': 2} to {'p4': 3}, kernel_size=3, stride=2, padding=1" in repr(layer)
    assert "p4, {'c2': 2}" in repr(QuotientPool(groups.get("p4"), {"c2": 2}))
