"""Feature maps with their escnn types: moved exactly, taken back exactly, and declared by every level of a pyramid."""

import pytest
import timm
import torch

import gzoo
from gzoo import _escnn, groups
from gzoo.check import relative_error
from tests.conftest import GRID_GROUPS, random_image, with_random_statistics

SIZES = ((6, 6), (7, 7), (5, 8))


def mixed_type(name: str):
    """Regular, trivial and (where there are subgroups of half the order) quotient fields, out of order."""
    group = groups.get(name)
    space = group.gspace
    fields = [space.trivial_repr, space.regular_repr, space.trivial_repr, space.regular_repr]
    if group.rotations % 2 == 0:
        fields.insert(1, space.quotient_repr((None, 2) if group.reflections else 2))
    return _escnn.load().nn.FieldType(space, fields)


def fields_of(law, size=(6, 6)):
    return torch.randn(2, law.size, *size, dtype=torch.float64)


# Moving maps


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [*GRID_GROUPS, "c8", "d8"])
def test_the_inverse_takes_a_map_back_bit_by_bit(name, size):
    group, law = groups.get(name), mixed_type(name)
    x = fields_of(law, size)
    for g in group.grid_elements:
        there = gzoo.transform_features(x, g, law)
        assert torch.equal(gzoo.transform_features(there, group.inverse(g), law), x)


@pytest.mark.parametrize("name", ["p4", "p4m"])
def test_one_element_after_another_is_their_product(name):
    group, law = groups.get(name), mixed_type(name)
    x = fields_of(law, (5, 8))
    for g in range(group.order):
        for h in range(group.order):
            twice = gzoo.transform_features(gzoo.transform_features(x, h, law), g, law)
            assert torch.equal(twice, gzoo.transform_features(x, group.multiply(g, h), law))


@pytest.mark.parametrize("name", [*GRID_GROUPS, "c8", "d8"])
def test_maps_move_as_escnn_moves_them(name):
    group, law = groups.get(name), mixed_type(name)
    x = fields_of(law)
    for g in group.grid_elements:
        element = law.fibergroup.elements[g]
        assert relative_error(law.transform(x, element), gzoo.transform_features(x, g, law)) < 1e-12


def test_regular_and_trivial_fields_move_as_those_of_the_group():
    group, x = groups.get("p4m"), random_image(16, (5, 8))
    for g in range(group.order):
        fields, image = group.field_type(2), group.image_type(16)
        assert torch.equal(gzoo.transform_features(x, g, fields), group.transform_features(x, g))
        assert torch.equal(gzoo.transform_features(x, g, image), group.transform_image(x, g))


def test_an_element_of_escnn_is_its_index():
    law = mixed_type("p4m")
    x = fields_of(law, (5, 8))
    for g, element in enumerate(law.fibergroup.elements):
        assert torch.equal(gzoo.transform_features(x, element, law), gzoo.transform_features(x, g, law))
        assert torch.equal(gzoo.transform_features(gzoo.transform_features(x, element, law), ~element, law), x)


def test_a_geometric_tensor_brings_its_type():
    law = mixed_type("p4m")
    x = fields_of(law, (5, 8))
    moved = gzoo.transform_features(_escnn.load().nn.GeometricTensor(x, law), 5)
    assert moved.type == law
    assert torch.equal(moved.tensor, gzoo.transform_features(x, 5, law))


def test_vectors_move_under_every_element():
    group, law = groups.get("c8"), mixed_type("c8")
    x = torch.randn(2, law.size)
    for g in range(group.order):
        expected = law.transform_fibers(x, law.fibergroup.elements[g])
        torch.testing.assert_close(gzoo.transform_features(x, g, law), expected)


def test_the_gradient_flows_back_along_the_inverse():
    group, law = groups.get("p4m"), mixed_type("p4m")
    x = fields_of(law, (5, 8)).requires_grad_()
    for g in range(group.order):
        y = gzoo.transform_features(x, g, law)
        cotangent = torch.randn_like(y)
        (gradient,) = torch.autograd.grad(y, x, cotangent)
        assert torch.equal(gradient, gzoo.transform_features(cotangent, group.inverse(g), law))


def spaces():
    return _escnn.load().gspaces


REFUSED = {
    "between the pixels": (lambda: (groups.get("c8").field_type(1), 1), "element 1 of c8 turns by 45 degrees, between"),
    "no element": (lambda: (groups.get("p4").field_type(2), 4), "4 is no element of p4; its elements are 0 to 3"),
    "element of another group": (
        lambda: (groups.get("p4").field_type(2), groups.get("c8").gspace.fibergroup.elements[2]),
        "is no element of p4, the group of the type",
    ),
    "other channels": (lambda: (groups.get("p4").field_type(3), 1), "x has 8 channels, but its type .* has 12"),
    "no type": (lambda: (None, 1), "give their escnn FieldType, or a GeometricTensor"),
    "irreps": (
        lambda: (_escnn.load().nn.FieldType(spaces().rot2dOnR2(4), 4 * [spaces().rot2dOnR2(4).irrep(1)]), 0),
        "do more than permute their values; transform_features takes regular, quotient and trivial fields",
    ),
    "signs": (
        lambda: (_escnn.load().nn.FieldType(spaces().flip2dOnR2(), 8 * [spaces().flip2dOnR2().irrep(1)]), 1),
        "do more than permute their values",
    ),
    "all rotations": (
        lambda: (_escnn.load().nn.FieldType(spaces().rot2dOnR2(-1), 8 * [spaces().rot2dOnR2(-1).trivial_repr]), 0),
        "which is no group of gzoo: finite, turning about the centre",
    ),
    "another axis of reflection": (
        lambda: (
            _escnn.load().nn.FieldType(spaces().flip2dOnR2(axis=0.0), 4 * [spaces().flip2dOnR2(axis=0.0).regular_repr]),
            1,
        ),
        "the reflection flipping the width axis",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_moved_exactly_is_refused(what):
    build, message = REFUSED[what]
    law, g = build()
    with pytest.raises(ValueError, match=message):
        gzoo.transform_features(random_image(8), g, law)


@pytest.mark.parametrize(
    ("x", "law", "message"),
    [
        (
            torch.zeros(2, 8, 9),
            lambda: groups.get("p4m").field_type(1),
            r"x is \(2, 8, 9\); accepted are \(B, 8, H, W\)",
        ),
        (
            torch.zeros(8),
            lambda: groups.get("p4m").field_type(1),
            r"x is \(8,\); accepted are \(B, 8, H, W\) and \(B, 8\)",
        ),
        (torch.zeros(2, 8, 3, 3), lambda: "p4m", "type is 'p4m'; it takes an escnn FieldType"),
        ([[1.0]], lambda: None, "x is a list; accepted are a tensor and a GeometricTensor"),
    ],
)
def test_what_is_no_map_of_fields_is_refused(x, law, message):
    with pytest.raises(ValueError, match=message):
        gzoo.transform_features(x, 1, law())


# Pyramids

PYRAMIDS = {
    "p4_resnet18": {"layers": (1, 1, 1, 1)},
    "p4m_cnn7": {},
    "p4m_unet": {"widths": (4, 6, 8)},
    "c8_resnet20": {"out_indices": (0, 2)},
}


def pyramid(name: str) -> tuple[torch.nn.Module, int]:
    """A float64 features_only model with random norms, and the channels of its image."""
    model = timm.create_model(name, features_only=True, **PYRAMIDS[name])
    return with_random_statistics(model).eval(), 1 if "cnn7" in name else 3


@pytest.mark.parametrize("name", PYRAMIDS)
def test_each_level_declares_its_type(name):
    model, channels = pyramid(name)
    types = gzoo.field_types(model)
    levels = model(random_image(channels, (33, 33), 1))
    assert [law.size for law in types] == [y.shape[1] for y in levels]
    for law in types:
        assert law.gspace == groups.get(name.split("_")[0]).gspace
        assert set(law.representations) == {law.gspace.regular_repr}


@pytest.mark.parametrize("size", [(32, 32), (33, 33), (31, 36)])
@pytest.mark.parametrize("name", PYRAMIDS)
def test_geometric_levels_move_with_the_image(name, size):
    model, channels = pyramid(name)
    group, x = groups.get(name.split("_")[0]), random_image(channels, size, 1)
    levels = gzoo.geometric(model, x)
    assert len(levels) == len(model.feature_info.channels())
    for g in group.grid_elements:
        turned = gzoo.geometric(model, group.transform_image(x, g))
        for y, expected in zip(turned, levels, strict=True):
            assert relative_error(y.tensor, gzoo.transform_features(expected, g).tensor) < 1e-12


def test_geometric_levels_move_under_escnns_own_transform():
    model, channels = pyramid("p4m_unet")
    group, x = groups.get("p4m"), random_image(channels, (13, 13), 1)
    levels = gzoo.geometric(model, x)
    for g, element in enumerate(group.gspace.fibergroup.elements):
        for y, expected in zip(gzoo.geometric(model, group.transform_image(x, g)), levels, strict=True):
            assert relative_error(y.tensor, expected.transform(element).tensor) < 1e-12


def test_features_of_a_plain_network_have_no_type():
    with pytest.raises(ValueError, match="FeatureGetterNet is a plain network, so its features have no type"):
        gzoo.field_types(timm.create_model("unet", features_only=True))


def test_a_classifier_gives_no_pyramid():
    with pytest.raises(ValueError, match="EquivariantStagedCNN gives no pyramid of features; create it with features"):
        gzoo.geometric(timm.create_model("p4_cnn7"), random_image(1))
