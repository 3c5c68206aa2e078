"""Groups: names, products and both actions, compared with escnn's."""

import pytest
import torch

from gzoo import _escnn, groups
from tests.conftest import GRID_GROUPS, elements, random_fields, random_image

ALL_GROUPS = [f"{letter}{n}" for n in (1, 2, 3, 4, 5, 6, 8) for letter in "cd"]


def escnn_elements(group):
    return list(groups.get(group).gspace.fibergroup.elements)


@pytest.mark.parametrize("group", ALL_GROUPS)
def test_products_follow_escnns_order_of_the_elements(group):
    G, theirs = groups.get(group), escnn_elements(group)
    assert len(theirs) == G.order
    for g in elements(group):
        for h in elements(group):
            assert theirs[G.multiply(g, h)] == theirs[g] @ theirs[h]


@pytest.mark.parametrize("group", ALL_GROUPS)
def test_inverses_are_escnns(group):
    G, theirs = groups.get(group), escnn_elements(group)
    assert all(theirs[G.inverse(g)] == ~theirs[g] for g in elements(group))


@pytest.mark.parametrize("group", ALL_GROUPS)
def test_an_element_and_its_inverse_cancel(group):
    G = groups.get(group)
    assert all(G.multiply(g, G.inverse(g)) == G.multiply(G.inverse(g), g) == 0 for g in elements(group))


@pytest.mark.parametrize("group", ALL_GROUPS)
def test_the_image_action_is_escnns(group):
    G, theirs = groups.get(group), escnn_elements(group)
    x = random_image(2, (4, 4)).float()
    for g in G.grid_elements:
        assert torch.allclose(G.transform_image(x, g), G.image_type(2).transform(x, theirs[g]), atol=1e-6)


@pytest.mark.parametrize("group", ALL_GROUPS)
def test_the_feature_action_is_escnns(group):
    G, theirs = groups.get(group), escnn_elements(group)
    x = random_fields(group, 2, (5, 5)).float()
    for g in G.grid_elements:
        assert torch.allclose(G.transform_features(x, g), G.field_type(2).transform(x, theirs[g]), atol=1e-6)


@pytest.mark.parametrize("group", ["c3", "c8", "d5", "d8", "p4m"])
def test_without_pixels_every_element_acts_on_fibres_as_escnns_regular_representation(group):
    G, theirs = groups.get(group), escnn_elements(group)
    x = random_fields(group, 1, ())
    for g in elements(group):
        matrix = torch.tensor(G.gspace.regular_repr(theirs[g]), dtype=x.dtype)
        assert torch.allclose(G.transform_features(x, g), x @ matrix.T)


@pytest.mark.parametrize("group", GRID_GROUPS)
@pytest.mark.parametrize("size", [(4, 4), (5, 5), (4, 7)])
def test_g_then_h_acts_as_hg(group, size):
    G, image, features = groups.get(group), random_image(1, size), random_fields(group, 2, size)
    for g in elements(group):
        for h in elements(group):
            hg = G.multiply(h, g)
            assert G.transform_image(G.transform_image(image, g), h).equal(G.transform_image(image, hg))
            assert G.transform_features(G.transform_features(features, g), h).equal(G.transform_features(features, hg))


def test_the_conventions_of_the_first_turn_and_the_reflection_hold():
    x = random_image(3)
    assert groups.get("p4").transform_image(x, 1).equal(x.rot90(1, (2, 3)))
    assert groups.get("p4m").transform_image(x, 4).equal(x.flip(3))


@pytest.mark.parametrize("group", GRID_GROUPS)
@pytest.mark.parametrize("size", [(4, 4), (5, 5), (4, 7)])
def test_vectors_turn_as_the_slope_of_a_turned_image(group, size):
    def slope(x):  # to the right, and down
        return torch.stack([x.roll(-1, axis) - x.roll(1, axis) for axis in (2, 1)], 1)

    G, x = groups.get(group), random_image(1, size)[:, 0]
    for g in elements(group):
        assert slope(G.transform_image(x, g)).equal(G.transform_vectors(slope(x), g))


@pytest.mark.parametrize("group", ["p4m", "d1", "c3", "d5", "c8"])
def test_without_pixels_vectors_turn_as_the_product_of_elements(group):
    G, x = groups.get(group), torch.randn(2, 5, dtype=torch.float64)
    pairs = [(4, 1), (0, 2)]
    for g in elements(group):
        turned = G.transform_vectors(x, g, pairs)
        assert turned[:, 3].equal(x[:, 3])
        assert turned[:, [4, 1]].norm(dim=1).allclose(x[:, [4, 1]].norm(dim=1))
        for h in elements(group):
            assert G.transform_vectors(turned, h, pairs).allclose(G.transform_vectors(x, G.multiply(h, g), pairs))


@pytest.mark.parametrize("pairs", [[(0, 2)], [(0, 0)], [(0, 1), (1, 0)], [0, 1], [(0, 1, 1)], [(-1, 0)], [(0.0, 1)], 3])
def test_pairs_that_are_no_two_channels_are_refused(pairs):
    with pytest.raises(ValueError, match=r"accepted are pairs \(right, down\) of two of the 2 channels"):
        groups.get("p4").transform_vectors(random_image(2), 1, pairs)


@pytest.mark.parametrize(("alias", "name"), [("c4", "p4"), ("d4", "p4m")])
def test_aliases_name_the_same_group(alias, name):
    assert groups.get(alias) == groups.get(name)
    assert groups.get(alias).name == name


@pytest.mark.parametrize("name", ["p4", "p4m", "c1", "c2", "c8", "d1", "d2", "d8", "c16"])
def test_a_canonical_name_is_found_again(name):
    assert groups.get(name).name == name


@pytest.mark.parametrize("name", ["", "p6", "p4g", "c0", "c-1", "c", "d4m", "P4", " p4", "so2", "c08"])
def test_an_unknown_name_is_rejected_with_the_grammar(name):
    with pytest.raises(ValueError, match=r"unknown group .*; accepted are p4 .*p4m .*cN .*dN "):
        groups.get(name)


def test_a_turn_between_the_pixels_is_refused():
    with pytest.raises(ValueError, match=r"element 1 of c8 turns by 45 degrees, between the pixels.*0, 2, 4, 6"):
        groups.get("c8").transform_image(random_image(1), 1)
    with pytest.raises(ValueError, match="between the pixels"):
        groups.get("d8").transform_features(random_fields("d8", 1), 9)


@pytest.mark.parametrize("g", [-1, 4])
def test_what_is_no_element_is_refused(g):
    G = groups.get("p4")
    with pytest.raises(ValueError, match="is no element of p4; its elements are 0 to 3"):
        G.transform_image(random_image(1), g)
    with pytest.raises(ValueError, match="is no element of p4"):
        G.transform_features(random_fields("p4", 1, ()), g)


def test_channels_that_are_no_whole_number_of_fields_are_refused():
    with pytest.raises(ValueError, match="6 channels are no whole number of p4 fields"):
        groups.get("p4").transform_features(random_image(6), 1)


@pytest.mark.parametrize(
    ("name", "grid"),
    [("c1", 1), ("c2", 2), ("c3", 1), ("p4", 4), ("c6", 2), ("c8", 4), ("d1", 2), ("d3", 2), ("p4m", 8), ("d8", 8)],
)
def test_grid_elements_are_the_quarter_turns_and_their_reflections(name, grid):
    G = groups.get(name)
    assert len(G.grid_elements) == grid
    assert G.on_grid == (grid == G.order)


def test_labels_tell_all_elements_apart():
    labels = [groups.get("p4m").label(g) for g in elements("p4m")]
    assert labels == ["0", "90", "180", "270", "flip", "flip 90", "flip 180", "flip 270"]


@pytest.mark.parametrize("group", ["c1", "p4", "p4m", "d1", "c8", "d8"])
def test_field_types_hold_regular_and_trivial_fields(group):
    G = groups.get(group)
    assert G.field_type(3).size == 3 * G.order
    assert G.image_type(3).size == 3
    assert isinstance(G.field_type(3), _escnn.load().nn.FieldType)


def test_the_gspace_of_equal_groups_is_one_object():
    assert groups.get("d4").gspace is groups.get("p4m").gspace


@pytest.mark.parametrize("group", ALL_GROUPS)
def test_every_element_moves_cosets_as_escnns_quotient_representation(group):
    G, theirs = groups.get(group), escnn_elements(group)
    for subgroup in G.subgroups:
        cosets = [set(coset) for coset in G.cosets(subgroup)]
        (representation,) = G.quotient_type({subgroup.name: 1}).representations
        assert len(cosets) == representation.size
        for g in elements(group):
            moved = [cosets.index({G.multiply(g, h) for h in coset}) for coset in cosets]
            expected = torch.eye(len(cosets))[moved].T  # e_xH goes to e_gxH
            assert torch.allclose(torch.tensor(representation(theirs[g]), dtype=torch.float32), expected, atol=1e-6)


@pytest.mark.parametrize("name", [f"{kind}{n}" for kind in "cd" for n in (1, 2, 3, 4, 6, 8, 12, 16)])
def test_the_generators_make_all_grid_elements(name):
    G = groups.get(name)
    made = {0}
    while more := {G.multiply(g, h) for g in G.grid_generators for h in made} - made:
        made |= more
    assert made == set(G.grid_elements)


def test_quotients_by_the_trivial_and_the_whole_group_are_regular_and_trivial_fields():
    for name in ("c1", "d1", "p4", "d8"):
        G = groups.get(name)
        assert G.quotient_type({"c1": 3}) == G.field_type(3)
        if G.order > 1:
            assert G.quotient_type({name: 3}) == G.image_type(3)


@pytest.mark.parametrize(("fields", "message"), [(3, "fields are 3; give their"), ({"c1": 1.5}, "1.5 fields of p4/c1")])
def test_numbers_of_quotient_fields_that_are_none_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        groups.get("p4").stabilizers(fields)


def test_a_quotient_by_what_is_no_subgroup_is_refused():
    for group, other in (("p4", "c3"), ("p4", "d1"), ("p4", "c8"), ("p4", "p4m")):
        with pytest.raises(ValueError, match=rf"{other} is no subgroup of p4; its subgroups are c1, c2, p4$"):
            groups.get(group).cosets(groups.get(other))
    with pytest.raises(ValueError, match=r"c3 is no subgroup of p4m; its subgroups are c1, c2, p4, d1, d2, p4m$"):
        groups.get("p4m").quotient_type({"c1": 2, "c3": 1})


def test_fields_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"there are no fields; give some by subgroup, as in {'c1': 4, 'p4': 8}"):
        groups.get("p4").stabilizers({})
    with pytest.raises(ValueError, match=r"0 fields of p4/c2: a number is at least 1; leave 'c2' out"):
        groups.get("p4").stabilizers({"c1": 1, "c2": 0})
    with pytest.raises(ValueError, match="unknown group 'c'"):
        groups.get("p4").stabilizers({"c": 1})
