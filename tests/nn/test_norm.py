"""Norms with statistics shared along the fibre commute with the group, in train and in eval mode, and are escnn's."""

import copy

import pytest
import timm.layers as tl
import torch
from torch import nn

from gzoo import _escnn, groups
from gzoo.check import relative_error
from gzoo.nn import FibreNorm, GroupMapNorm
from tests.conftest import GRID_GROUPS, act, elements, random_fields, with_random_statistics, worst_error

NORMS = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(6),
    "BatchNormAct2d": lambda: tl.BatchNormAct2d(6),
    "SyncBatchNorm in eval": lambda: nn.SyncBatchNorm(6).eval(),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(6, affine=True),
    "InstanceNorm2d with statistics": lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    "GroupNorm": lambda: nn.GroupNorm(3, 6),
    "GroupNorm1": lambda: tl.GroupNorm1(6),
    "GroupNormAct": lambda: tl.GroupNormAct(6, num_groups=2),
}
SIZES = [(4, 4), (5, 5), (4, 7)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("group", GRID_GROUPS)
def test_norms_in_eval_mode_commute_with_the_group(group, norm):
    layer = with_random_statistics(FibreNorm(NORMS[norm](), groups.get(group).order)).eval()
    for size in SIZES:
        assert worst_error(layer, group, random_fields(group, 6, size)) < 1e-12


@pytest.mark.parametrize("norm", [name for name in NORMS if "Sync" not in name])
@pytest.mark.parametrize("group", GRID_GROUPS)
def test_norms_in_train_mode_commute_with_the_group(group, norm):
    layer = with_random_statistics(FibreNorm(NORMS[norm](), groups.get(group).order)).train()
    for size in SIZES:
        assert worst_error(layer, group, random_fields(group, 6, size)) < 1e-12


@pytest.mark.parametrize("norm", ["BatchNorm2d", "GroupNorm"])
def test_a_plain_norm_over_the_channels_does_not_commute_with_the_group(norm):
    plain = nn.BatchNorm2d(8) if norm == "BatchNorm2d" else nn.GroupNorm(4, 8)
    assert worst_error(with_random_statistics(plain).eval(), "p4", random_fields("p4", 2)) > 0.1


@pytest.mark.parametrize("group", GRID_GROUPS)
def test_running_statistics_are_the_same_for_every_pose(group):
    G, x = groups.get(group), random_fields(group, 6, (4, 7))
    layer = with_random_statistics(FibreNorm(nn.BatchNorm2d(6), G.order)).train()
    for g in elements(group):
        seen, turned = copy.deepcopy(layer), copy.deepcopy(layer)
        seen(x)
        turned(act(G, "fields", x, g))
        assert relative_error(turned.norm.running_mean, seen.norm.running_mean) < 1e-12
        assert relative_error(turned.norm.running_var, seen.norm.running_var) < 1e-12
        assert not seen.norm.running_mean.equal(layer.norm.running_mean)


@pytest.mark.parametrize("group", ["c2", "p4", "d1", "p4m"])
def test_batch_norm_is_escnns_inner_batch_norm_in_train_and_eval(group):
    G, escnn = groups.get(group), _escnn.load()
    theirs = escnn.nn.InnerBatchNorm(G.field_type(3))
    ours = with_random_statistics(FibreNorm(nn.BatchNorm2d(3), G.order)).float()
    (their_norm,) = (module for module in theirs.modules() if isinstance(module, nn.BatchNorm3d))
    their_norm.load_state_dict(ours.norm.state_dict())
    for mode in (True, True, False):
        x = random_fields(group, 3).float()
        expected = theirs.train(mode)(escnn.nn.GeometricTensor(x, G.field_type(3))).tensor
        assert torch.allclose(ours.train(mode)(x), expected, atol=1e-5)
    assert torch.allclose(ours.norm.running_var, their_norm.running_var, atol=1e-6)


def test_batch_norm_makes_each_field_standard_over_its_fibre():
    y = FibreNorm(nn.BatchNorm2d(3), 8).double()(3 * random_fields("p4m", 3, (6, 6), 8) + 1)
    fibres = y.unflatten(1, (3, 8))
    assert fibres.mean((0, 2, 3, 4)).abs().max() < 1e-12
    assert (fibres.var((0, 2, 3, 4), correction=0) - 1).abs().max() < 1e-4


def test_channels_last_input_gives_the_same_result():
    layer, x = FibreNorm(nn.BatchNorm2d(3), 4).double(), random_fields("p4", 3, (4, 6))
    assert torch.allclose(layer(x.contiguous(memory_format=torch.channels_last)), layer(x))


def test_the_norm_is_visible_to_sync_bn_conversion():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(FibreNorm(nn.BatchNorm2d(3), 4)))
    assert isinstance(model[0].norm, nn.SyncBatchNorm)


def test_an_image_without_lifting_is_refused():
    with pytest.raises(ValueError, match=r"x has 3 channels, no whole number of fields of \|G\| = 4; lift it first"):
        FibreNorm(nn.BatchNorm2d(3), 4)(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize("group", GRID_GROUPS)
def test_a_norm_of_a_flattened_map_keeps_its_pixels_apart(group):
    own, order = groups.get(group), groups.get(group).order
    norm = with_random_statistics(GroupMapNorm(nn.BatchNorm1d(2 * 9), own, 3)).train()
    x = random_fields(group, 2, (3, 3))
    y = norm(x.flatten(1))
    for g in own.grid_elements:
        moved = own.transform_features(x, g)
        assert relative_error(norm(moved.flatten(1)), own.transform_features(y.view_as(x), g).flatten(1)) < 1e-12
    assert norm.turned_back(x.flatten(1)).shape == (len(x), 2 * 9, order)
    norm.eval()
    alike = norm(torch.ones_like(x).flatten(1)).view(len(x), 2, order, 3, 3)
    assert alike[:, :, 0].std((2, 3)).min() > 1e-3  # each pixel has numbers of its own
    with pytest.raises(ValueError, match="give images of the size that the network was made for"):
        norm(x[..., :2].flatten(1))
