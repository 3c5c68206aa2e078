"""Trivial fields beside regular ones: repeating and pooling commute with every group, in value and gradient."""

import pytest
import torch
from torch import nn

from gzoo import _escnn, groups
from gzoo.nn import PoolSomeFibres, RepeatAlongFibre
from tests.conftest import GRID_GROUPS, random_image, worst_error

RUNS = [(1, False), (2, True), (3, False), (1, True)]


def types(group):
    """Of the mixture, and of as many regular fields."""
    space = groups.get(group).gspace
    fields = [space.regular_repr if regular else space.trivial_repr for size, regular in RUNS for _ in range(size)]
    return _escnn.load().nn.FieldType(space, fields), groups.get(group).field_type(len(fields))


@pytest.mark.parametrize("size", [(4, 4), (5, 5), (4, 7)])
@pytest.mark.parametrize("group", [group for group in GRID_GROUPS if group != "c1"])
def test_they_commute_with_the_group(group, size):
    mixed, regular = types(group)
    order = groups.get(group).order
    x = random_image(mixed.size, size)
    assert worst_error(RepeatAlongFibre(order, RUNS), group, x, mixed, regular) < 1e-12
    x = random_image(regular.size, size)
    assert worst_error(PoolSomeFibres(order, RUNS), group, x, regular, mixed) < 1e-12


def test_pooling_what_was_repeated_gives_it_back():
    x = random_image(4 + 3 * 8)
    torch.testing.assert_close(nn.Sequential(RepeatAlongFibre(8, RUNS), PoolSomeFibres(8, RUNS))(x), x)


@pytest.mark.parametrize("layer", [RepeatAlongFibre, PoolSomeFibres])
def test_another_number_of_channels_is_refused(layer):
    with pytest.raises(ValueError, match=r"has 9 channels, not .* those of 1 trivial, 2 regular, 3 trivial, 1 regular"):
        layer(4, RUNS)(random_image(9))
