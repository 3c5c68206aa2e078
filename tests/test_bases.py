"""The pixel basis, against the definition of Cohen & Welling 2016 written as loops."""

import itertools

import pytest
import torch

from gzoo import bases, groups
from tests.conftest import GRID_GROUPS, elements


def turned_pixel(group, g, i, j, size):
    """Where g moves pixel (row i, column j) of a square to; rows point down, so a counterclockwise turn takes the right
    end of the first row to its left end."""
    if g >= group.rotations:
        j = size - 1 - j
    for _ in range(g % group.rotations * 4 // group.rotations):
        i, j = size - 1 - j, i
    return i, j


@pytest.mark.parametrize("group", GRID_GROUPS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_lifting_filters_are_equation_10(group, size):
    G, w = groups.get(group), torch.randn(2, 3, size, size)
    filters = bases.expand(w, bases.lifting_index(G, size)).view(2, G.order, 3, size, size)
    for g, i, j in itertools.product(elements(group), range(size), range(size)):
        # filter[g](y) = w(g^-1 y), so filter[g](g y) = w(y).
        u, v = turned_pixel(G, g, i, j, size)
        assert filters[:, g, :, u, v].equal(w[:, :, i, j])


@pytest.mark.parametrize("group", GRID_GROUPS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_regular_filters_are_equation_11(group, size):
    G = groups.get(group)
    w = torch.randn(2, 3, G.order, size, size)
    filters = bases.expand(w, bases.regular_index(G, size)).view(2, G.order, 3, G.order, size, size)
    for g, h, i, j in itertools.product(elements(group), elements(group), range(size), range(size)):
        # filter[g, h](y) = w(g^-1 h, g^-1 y), so filter[g, gh](g y) = w(h, y).
        u, v = turned_pixel(G, g, i, j, size)
        assert filters[:, g, :, G.multiply(g, h), u, v].equal(w[:, :, h, i, j])


@pytest.mark.parametrize("group", ["c3", "c8", "d5", "d8"])
def test_a_kernel_without_pixels_is_equation_11_for_every_group(group):
    G = groups.get(group)
    w = torch.randn(2, 3, G.order, 1, 1)
    filters = bases.expand(w, bases.regular_index(G, 1)).view(2, G.order, 3, G.order)
    for g, h in itertools.product(elements(group), elements(group)):
        assert filters[:, g, :, G.multiply(g, h)].equal(w[:, :, h, 0, 0])


@pytest.mark.parametrize("group", GRID_GROUPS)
def test_a_3x3_pair_of_regular_fields_has_9_times_the_order_free_parameters(group):
    G = groups.get(group)
    parameters = torch.eye(9 * G.order).view(-1, 1, G.order, 3, 3)
    filters = bases.expand(parameters, bases.regular_index(G, 3)).view(9 * G.order, -1)
    assert torch.linalg.matrix_rank(filters) == 9 * G.order


@pytest.mark.parametrize("group", GRID_GROUPS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_pixel_basis_is_all_of_the_equivariant_filters(group, size):
    # Filters K with K[gh, gh'](g y) = K[h, h'](y): the fixed space of the action, whose dimension is the mean trace.
    G = groups.get(group)
    index = torch.arange(G.order**2 * size**2).view(G.order, G.order, size, size)
    traces = []
    for g in elements(group):
        rows = torch.tensor([G.multiply(G.inverse(g), h) for h in elements(group)])
        moved = G.transform_image(index[rows][:, rows], g)
        traces.append((moved == index).sum().item())
    assert sum(traces) / G.order == G.order * size**2


@pytest.mark.parametrize("group", GRID_GROUPS)
@pytest.mark.parametrize("size", [2, 3])
def test_every_filter_of_the_basis_is_equivariant(group, size):
    G = groups.get(group)
    filters = bases.expand(torch.randn(1, 1, G.order, size, size), bases.regular_index(G, size))
    for g in elements(group):
        rows = torch.tensor([G.multiply(G.inverse(g), h) for h in elements(group)])
        assert G.transform_image(filters[rows][:, rows], g).equal(filters)


def test_a_filter_with_one_tap_changed_is_not_equivariant():
    G = groups.get("p4")
    filters = bases.expand(torch.randn(1, 1, 4, 3, 3), bases.regular_index(G, 3))
    filters[0, 0, 0, 0] += 1
    rows = torch.tensor([G.multiply(G.inverse(1), h) for h in elements("p4")])
    assert not G.transform_image(filters[rows][:, rows], 1).equal(filters)


def test_an_index_is_computed_once_for_a_group_and_a_size():
    assert bases.regular_index(groups.get("d4"), 3) is bases.regular_index(groups.get("p4m"), 3)
