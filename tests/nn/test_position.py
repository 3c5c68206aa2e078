"""The encoding of places: the group leaves it as it is, and in the pose of the identity it is timm's."""

import pytest
import torch
from timm.models.edgenext import PositionalEncodingFourier

from gzoo import groups
from gzoo.check import relative_error
from gzoo.nn import FourierPosition
from tests.conftest import GRID_GROUPS

SIZES = [(1, 1), (7, 7), (8, 8), (5, 8)]


def encoding(group, fields=3):
    return FourierPosition(groups.get(group), 4, fields, 10000.0).double()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("group", [*GRID_GROUPS, "c8", "d3"])
def test_the_group_leaves_it_as_it_is(group, size):
    layer, law = encoding(group), groups.get(group)
    y = layer((1, *size))
    for g in law.grid_elements:
        moved = law.transform_features(y, g)
        assert relative_error(layer((1, *moved.shape[2:])), moved) < 1e-14
        assert size == (1, 1) or g == 0 or not torch.equal(law.transform_image(y, g), moved)


@pytest.mark.parametrize("size", SIZES)
def test_in_the_pose_of_the_identity_it_is_that_of_the_plain_network(size):
    layer, plain = encoding("p4m"), PositionalEncodingFourier(4, 3).double()
    plain.token_projection = layer.token_projection
    assert relative_error(layer((1, *size))[:, ::8], plain((1, *size))) < 1e-5  # in float32


@pytest.mark.parametrize("size", SIZES)
def test_over_a_larger_group_the_poses_of_the_smaller_one_stay(size):
    larger, smaller = encoding("d8"), encoding("p4m")
    larger.load_state_dict(smaller.state_dict())
    every = larger.group.elements_of(smaller.group)
    found = larger((1, *size)).unflatten(1, (3, -1))[:, :, every].flatten(1, 2)
    assert relative_error(found, smaller((1, *size))) < 1e-14


def test_every_place_is_told_apart_in_every_pose():
    poses = encoding("d8", 8)((1, 6, 6)).unflatten(1, (8, -1))[0].permute(1, 2, 3, 0)  # (|G|, H, W, fields)
    for pixels in poses.flatten(1, 2):
        assert torch.cdist(pixels, pixels).fill_diagonal_(1).min() > 1e-3
