"""Group convolutions commute with the group at every size, hold escnn's, and give the plain operation's size."""

import itertools
import math

import pytest
import torch
from torch import nn

from gzoo import _escnn, groups
from gzoo.check import relative_error
from gzoo.nn import GroupConv2d, LiftingConv2d
from tests.conftest import (
    GRID_GROUPS,
    elements,
    random_fields,
    random_image,
    with_random_statistics,
    worst_error,
)

SIZES = [(7, 7), (8, 8), (9, 9), (6, 10)]  # 8 and 8 +- 1, and not square

# Every kind of window; fields in and out are 4.
VARIANTS = {
    "1x1": {"kernel_size": 1},
    "2x2": {"kernel_size": 2},
    "2x2 strided": {"kernel_size": 2, "stride": 2},
    "2x2 padded, strided": {"kernel_size": 2, "stride": 2, "padding": 1},
    "2x2 same": {"kernel_size": 2, "padding": "same"},
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x3 strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "3x3 stride 3": {"kernel_size": 3, "stride": 3},
    "3x3 dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "3x3 dilated, strided": {"kernel_size": 3, "padding": 1, "dilation": 2, "stride": 2},
    "3x3 grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "3x3 depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
    "3x3 depthwise, strided": {"kernel_size": 3, "padding": 1, "groups": 4, "stride": 2},
    "3x3 reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "3x3 replicate, strided": {"kernel_size": 3, "padding": 1, "stride": 2, "padding_mode": "replicate"},
    "3x3 circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "4x4 same": {"kernel_size": 4, "padding": "same"},
    "4x4 same, dilated": {"kernel_size": 4, "padding": "same", "dilation": 2},
    "4x4 strided": {"kernel_size": 4, "stride": 4},
    "5x5 same": {"kernel_size": 5, "padding": "same"},
    "5x5 strided": {"kernel_size": 5, "stride": 2, "padding": 2},
    "1x1 strided": {"kernel_size": 1, "stride": 2},
    "1x7 padded": {"kernel_size": (1, 7), "padding": 3},
    "5x3 strided": {"kernel_size": (5, 3), "padding": 2, "stride": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group", GRID_GROUPS)
def test_group_convolution_and_its_gradients_commute_with_the_group(group, variant):
    layer = with_random_statistics(GroupConv2d(groups.get(group), 4, 4, **VARIANTS[variant]))
    for size in SIZES:
        assert worst_error(layer, group, random_fields(group, 4, size, batch=1)) < 1e-12


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group", GRID_GROUPS)
def test_lifting_convolution_and_its_gradients_commute_with_the_group(group, variant):
    layer = with_random_statistics(LiftingConv2d(groups.get(group), 4, 4, **VARIANTS[variant]))
    for size in SIZES:
        assert worst_error(layer, group, random_image(4, size, batch=1), "image", "fields") < 1e-12


def assert_commute(group, fewer, more, options):
    """A lifting convolution from as many channels to as many fields, and one of these fields back."""
    lifting = with_random_statistics(LiftingConv2d(groups.get(group), fewer, more, **options))
    regular = with_random_statistics(GroupConv2d(groups.get(group), more, fewer, **options))
    for size in SIZES:
        assert worst_error(lifting, group, random_image(fewer, size, batch=1), "image", "fields") < 1e-12
        assert worst_error(regular, group, random_fields(group, more, size, batch=1)) < 1e-12


@pytest.mark.parametrize("variant", ["2x2 strided", "3x3 strided", "3x3 depthwise", "4x4 same", "5x5 same"])
@pytest.mark.parametrize("group", [*GRID_GROUPS, "c8", "d8", "d6", "c3"])
def test_steerable_convolutions_and_their_gradients_commute_with_the_turns_of_the_grid(group, variant):
    assert_commute(group, 4, 4, VARIANTS[variant] | {"basis": "steerable"})


@pytest.mark.parametrize("variant", ["3x3 strided", "4x4 same", "5x5 same"])
@pytest.mark.parametrize("group", ["p4m", "c8", "d8", "c16", "c3"])
def test_steerable_3r_convolutions_and_their_gradients_commute_with_the_turns_of_the_grid(group, variant):
    assert_commute(group, 1, 2, VARIANTS[variant] | {"basis": "steerable_3r"})


@pytest.mark.parametrize(("group", "g"), [("c8", 1), ("d8", 3), ("d8", 9), ("c16", 1), ("d6", 1)])
def test_steerable_convolutions_nearly_commute_with_turns_between_the_pixels(group, g):
    G = groups.get(group)
    layers = nn.Sequential(LiftingConv2d(G, 1, 3, 5, padding=2), nn.ReLU(), GroupConv2d(G, 3, 2, 5, padding=2)).double()
    x = smooth_image(65)
    y = layers(x)
    source = torch.tensor([G.multiply(G.inverse(g), h) for h in range(G.order)])
    moved = move(y.unflatten(1, (2, G.order))[:, :, source].flatten(1, 2), G, g)
    inner = (..., slice(12, -12), slice(12, -12))  # the corners of a turned square are unknown
    assert relative_error(layers(move(x, G, g))[inner], moved[inner]) < 0.045
    assert relative_error(layers(move(x, G, g))[inner], move(y, G, g)[inner]) > 0.1  # without moving the fibre


def smooth_image(size):
    """A few broad bumps on a disc: nothing between the pixels is lost."""
    axis = torch.linspace(-1, 1, size, dtype=torch.float64)
    x, y = axis.expand(size, size), axis.unsqueeze(1).expand(size, size)
    bumps = [(0.3, 0.1, 1.0), (-0.2, 0.35, -0.8), (-0.1, -0.4, 0.6), (0.35, -0.3, -0.5)]
    return sum(a * torch.exp(-((x - u) ** 2 + (y - v) ** 2) / 0.02) for u, v, a in bumps)[None, None]


def move(x, group, g):
    """The pixels of x moved by g, between the pixels bicubically."""
    angle = torch.tensor(2 * math.pi * (g % group.rotations) / group.rotations)
    cos, sin = angle.cos().item(), angle.sin().item()
    if g >= group.rotations:
        x = x.flip(-1)
    # Rows of the inverse turn, for y pointing down.
    turn = torch.tensor([[[cos, -sin, 0], [sin, cos, 0]]], dtype=x.dtype)
    grid = nn.functional.affine_grid(turn, [1, *x.shape[1:]], align_corners=False)
    return nn.functional.grid_sample(x, grid, mode="bicubic", align_corners=False)


@pytest.mark.parametrize("group", ["p4", "p4m"])
def test_a_plain_convolution_does_not_commute_with_the_group(group):
    channels = 2 * groups.get(group).order
    plain = nn.Conv2d(channels, channels, 3, padding=1).double()
    assert worst_error(plain, group, random_fields(group, 2)) > 0.1


def test_a_strided_convolution_without_resampling_is_broken_at_even_sizes():
    layer = GroupConv2d(groups.get("p4"), 2, 2, 3, stride=2, padding=1).double()
    plain = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False).double()
    plain.weight = nn.Parameter(layer.filter().detach(), requires_grad=False)
    assert worst_error(plain, "p4", random_fields("p4", 2, (7, 7))) < 1e-12
    assert worst_error(plain, "p4", random_fields("p4", 2, (8, 8))) > 0.1


@pytest.mark.parametrize("group", ["c3", "c8", "d8"])
def test_a_1x1_group_convolution_is_exact_off_the_grid_too(group):
    G = groups.get(group)
    layer = with_random_statistics(GroupConv2d(G, 2, 3, 1))
    x = random_fields(group, 2, (1, 1))
    for g in elements(group):
        moved = G.transform_features(x[..., 0, 0], g)[..., None, None]
        assert relative_error(layer(moved)[..., 0, 0], G.transform_features(layer(x)[..., 0, 0], g)) < 1e-12


WINDOWS = [
    (k, s, p, d)
    for k, s, p, d in itertools.product((1, 2, 3, 4, 5), (1, 2, 3), (0, 1, 2), (1, 2))
    if p < k  # more padding than kernel gives outputs that see no pixel
]


def test_output_sizes_are_those_of_the_plain_convolution():
    G = groups.get("c1")
    for k, s, p, d in WINDOWS:
        plain, ours = nn.Conv2d(1, 1, k, s, p, d), LiftingConv2d(G, 1, 1, k, s, p, d)
        for n in range(max(5, d * (k - 1) + 1 - 2 * p), 21):
            x = torch.zeros(1, 1, n, 20)
            assert ours(x).shape == plain(x).shape, (k, s, p, d, n)


@pytest.mark.parametrize("kernel", range(1, 8))
def test_same_padding_keeps_every_size(kernel):
    layer = LiftingConv2d(groups.get("p4"), 1, 1, kernel, padding="same")
    for n in range(1, 12):
        assert layer(torch.zeros(1, 1, n, 5)).shape == (1, 4, n, 5)


def test_valid_padding_is_none_and_other_words_are_refused():
    layer = LiftingConv2d(groups.get("p4"), 1, 1, 3, padding="valid")
    assert layer(torch.zeros(1, 1, 9, 7)).shape == (1, 4, 7, 5)
    with pytest.raises(ValueError, match=r"padding is 'full'; accepted are pixels on each side, 'same' and 'valid'"):
        LiftingConv2d(groups.get("p4"), 1, 1, 3, padding="full")


@pytest.mark.parametrize("layer", [LiftingConv2d, GroupConv2d])
def test_the_name_of_a_group_is_no_group(layer):
    with pytest.raises(TypeError, match=r"group is 'p4'; layers take a gzoo.groups.Group, such as gzoo.groups.get"):
        layer("p4", 1, 1, 3)


@pytest.mark.parametrize("size", [(7, 7), (9, 7)])
def test_where_the_window_fits_the_layer_is_one_plain_convolution(size):
    layer = with_random_statistics(GroupConv2d(groups.get("p4m"), 2, 3, 3, stride=2, padding=1))
    x = random_fields("p4m", 2, size)
    bias = layer.bias.repeat_interleave(8)
    assert layer(x).equal(nn.functional.conv2d(x, layer.filter(), bias, stride=2, padding=1))


@pytest.mark.parametrize("group", ["c2", "p4", "d1", "d2", "p4m"])
def test_every_filter_of_escnn_is_one_of_ours(group):
    G, escnn = groups.get(group), _escnn.load()
    theirs = escnn.nn.R2Conv(G.field_type(2), G.field_type(3), 3, padding=1, bias=False, recompute=True)
    filters, _ = theirs.expand_parameters()
    ours = GroupConv2d(G, 2, 3, 3, padding=1, bias=False)
    ours.weight.data = filters.detach().view(3, G.order, 2, G.order, 3, 3)[:, 0].contiguous()
    x = random_fields(group, 2, (6, 6)).float()
    expected = theirs(escnn.nn.GeometricTensor(x, theirs.in_type)).tensor
    assert ours.in_type == theirs.in_type
    assert ours.out_type == theirs.out_type
    assert torch.allclose(ours(x), expected, atol=1e-5)


@pytest.mark.parametrize("group", ["c2", "p4", "d1", "d2", "p4m"])
def test_every_lifting_filter_of_escnn_is_one_of_ours(group):
    G, escnn = groups.get(group), _escnn.load()
    theirs = escnn.nn.R2Conv(G.image_type(2), G.field_type(3), 3, padding=1, bias=False, recompute=True)
    filters, _ = theirs.expand_parameters()
    ours = LiftingConv2d(G, 2, 3, 3, padding=1, bias=False)
    ours.weight.data = filters.detach().view(3, G.order, 2, 3, 3)[:, 0].contiguous()
    x = random_image(2, (6, 6)).float()
    expected = theirs(escnn.nn.GeometricTensor(x, theirs.in_type)).tensor
    assert ours.in_type == theirs.in_type
    assert torch.allclose(ours(x), expected, atol=1e-5)


@pytest.mark.parametrize("group", GRID_GROUPS)
def test_results_transform_as_escnn_transforms_a_geometric_tensor_of_out_type(group):
    G, GeometricTensor = groups.get(group), _escnn.load().nn.GeometricTensor
    lift, conv = LiftingConv2d(G, 1, 2, 3, padding=1), GroupConv2d(G, 2, 3, 3, padding=1, stride=2)
    x = random_image(1, (8, 8)).float()
    with torch.no_grad():
        y = GeometricTensor(conv(lift(x)), conv.out_type)
        for element in G.gspace.fibergroup.elements:
            turned = GeometricTensor(x, lift.in_type).transform(element).tensor
            assert torch.allclose(conv(lift(turned)), y.transform(element).tensor, atol=1e-5)


def second_moments(layers, x):
    """The mean square of the input and of each layer's result."""
    moments = [x.square().mean().item()]
    with torch.no_grad():
        for layer in layers:
            x = layer(x).relu()
            moments.append(x.square().mean().item())
    return moments


def test_initial_weights_keep_the_variance_through_100_layers():
    # After a few layers with ReLU all pixels and poses are alike, so each of the n kernels of a layer adds one square
    # of a rectified normal number to the moment: a gain of 1 +- sqrt(5 / n). Three deviations are allowed.
    fields = 64
    layers = [GroupConv2d(groups.get("p4m"), fields, fields, 3, padding=1, padding_mode="circular") for _ in range(100)]
    moments = second_moments(layers, random_fields("p4m", fields, (3, 3), batch=1).float())
    gains = [after / before for before, after in itertools.pairwise(moments)]
    assert abs(sum(gains) / 100 - 1) < 3 * math.sqrt(5 / fields / 100)
    assert abs(math.log(moments[-1] / moments[0])) < 3 * math.sqrt(5 / fields * 100)


def test_a_fan_in_without_the_order_of_the_group_loses_the_variance():
    G = groups.get("p4m")
    layers = [GroupConv2d(G, 8, 8, 3, padding=1, padding_mode="circular") for _ in range(20)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=math.sqrt(2 / (8 * 9)))
    moments = second_moments(layers, random_fields("p4m", 8, (4, 4)).float())
    assert moments[-1] > 1e6 * moments[0]


def gain(layer, x):
    """By how much the layer and a ReLU, which halves it, enlarge the second moment of white noise or a constant."""
    with torch.no_grad():
        return (layer(x).square().mean() / x.square().mean() / 2).item()


@pytest.mark.parametrize("size", [3, 4, 5, 7])
@pytest.mark.parametrize(
    ("group", "basis", "without"), [("p4m", "steerable", 1.3), ("c8", "steerable", 1.3), ("c8", "steerable_3r", 1.15)]
)
def test_initial_steerable_kernels_keep_the_variance_of_white_noise_and_of_a_constant(group, basis, without, size):
    layer = LiftingConv2d(groups.get(group), 16, 400, size, basis=basis)
    noise, constant = torch.randn(400, 16, size, size), torch.ones(1, 16, size, size)
    assert abs(gain(layer, noise) - 1) < 0.15
    assert abs(gain(layer, constant) - 1) < 0.15
    nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.fan_in))  # all functions alike: rings sum a constant up
    assert gain(layer, constant) > without


def test_the_shape_of_the_weight_follows_the_basis():
    G = groups.get("p4m")
    assert LiftingConv2d(G, 3, 2, 3).weight.shape == (2, 3, 3, 3)
    assert LiftingConv2d(G, 3, 2, 3, basis="steerable").weight.shape == (2, 3, 1, 6)
    assert GroupConv2d(G, 3, 2, 3, basis="pixel").weight.shape == (2, 3, 8, 3, 3)
    assert GroupConv2d(G, 3, 2, 3, basis="steerable").weight.shape == (2, 3, 8, 6)
    assert GroupConv2d(G, 3, 2, 3, basis="steerable_3r").weight.shape == (2, 3, 8, 8)


@pytest.mark.parametrize("layer", [LiftingConv2d, GroupConv2d])
def test_a_pixel_basis_off_the_grid_is_refused(layer):
    with pytest.raises(ValueError, match=r"c8 .* has no pixel basis; use basis='steerable'"):
        layer(groups.get("c8"), 3, 2, 3, basis="pixel")


def test_a_bias_starts_at_zero():
    assert not GroupConv2d(groups.get("p4"), 2, 2, 3).bias.any()


@pytest.mark.parametrize("layer", [LiftingConv2d, GroupConv2d])
def test_groups_that_do_not_divide_a_width_are_refused_with_the_nearest_that_works(layer):
    with pytest.raises(ValueError, match="groups=4 does not divide a width of 6; the nearest that works: 4 or 8"):
        layer(groups.get("p4"), 6, 8, 3, groups=4)
    with pytest.raises(ValueError, match=r"groups=4 does not divide a width of 3; the nearest that works: 4$"):
        layer(groups.get("p4"), 4, 3, 3, groups=4)


def test_an_image_with_other_channels_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 4, 5, 5\), not \(B, 3, H, W\); .*in_chans=4"):
        LiftingConv2d(groups.get("p4"), 3, 2, 3)(random_image(4))


def test_an_image_without_lifting_is_refused():
    with pytest.raises(ValueError, match=r"3 channels, not 2 fields \* \|G\| = 4; lift an image with LiftingConv2d"):
        GroupConv2d(groups.get("p4"), 2, 2, 3)(random_image(3))


def test_a_map_smaller_than_the_window_is_refused():
    with pytest.raises(ValueError, match="a map of 2x6 pixels is too small for a window of 3 pixels"):
        GroupConv2d(groups.get("p4"), 1, 1, 3)(random_fields("p4", 1, (2, 6)).float())


def test_the_printed_layer_says_its_group_and_window():
    layer = GroupConv2d(groups.get("p4m"), 2, 3, 3, stride=2, padding=1)
    assert "p4m, (3, 2, 8, 3, 3), stride=2, padding=1" in repr(layer)
