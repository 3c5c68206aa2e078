"""A subset keeps what it says, exactly, and learns what to keep."""

import itertools

import pytest
import torch
from torch import nn

from gzoo import groups
from gzoo.nn import FibreNorm, GroupConv2d, GroupPool, LiftingConv2d, Subset
from tests.conftest import GRID_GROUPS, elements, random_fields, random_image, with_random_statistics, worst_error

# Every group that has elements to drop, with each of its subgroups: elements by index.
SUBGROUPS = [
    *(("c2", kept) for kept in [(0,), (0, 1)]),
    *(("d1", kept) for kept in [(0,), (0, 1)]),
    *(("p4", kept) for kept in [(0,), (0, 2), (0, 1, 2, 3)]),
    *(("d2", kept) for kept in [(0,), (0, 1), (0, 2), (0, 3), (0, 1, 2, 3)]),
    *(("p4m", (0, g)) for g in (2, 4, 5, 6, 7)),
    *(("p4m", kept) for kept in [(0,), (0, 1, 2, 3), (0, 2, 4, 6), (0, 2, 5, 7), tuple(range(8))]),
]


def subset_of(group, kept):
    """In eval mode, where the logits have no gradient."""
    subset = Subset(groups.get(group)).double().eval().requires_grad_(False)
    subset.keep(kept)
    return subset


def layers(group, kept):
    """Lifting, norm, strided convolution: with a subset in the norm, and one behind the second convolution."""
    G = groups.get(group)
    norm, last = FibreNorm(nn.BatchNorm2d(3), G.order), GroupConv2d(G, 3, 2, 3, stride=2, padding=1)
    net = with_random_statistics(nn.Sequential(LiftingConv2d(G, 1, 3, 3), norm, nn.ReLU(), last)).eval()
    net[1].subset, net[3].subset = subset_of(group, kept), subset_of(group, kept)
    return net


@pytest.mark.parametrize(("group", "kept"), SUBGROUPS)
@pytest.mark.parametrize("size", [(8, 8), (9, 9), (7, 10)])
def test_layers_that_keep_a_subgroup_commute_with_it_and_with_nothing_else(group, kept, size):
    net, x = layers(group, kept), random_image(1, size)
    assert worst_error(net, group, x, "image", "fields", kept) < 1e-12
    for lost in set(elements(group)) - set(kept):
        assert worst_error(net, group, x.detach(), "image", "fields", [lost]) > 0.1


@pytest.mark.parametrize("group", [group for group in GRID_GROUPS if group != "c1"])
def test_the_whole_group_changes_no_bit(group):
    x = random_fields(group, 3)
    norm = with_random_statistics(FibreNorm(nn.BatchNorm2d(3), groups.get(group).order)).eval()
    expected = norm(x)
    norm.subset = Subset(groups.get(group)).eval()
    assert norm(x).equal(expected)
    assert norm.subset(x).equal(x)


@pytest.mark.parametrize("group", ["p4", "d2"])
def test_the_symmetry_of_any_subset_is_the_subgroup_that_it_commutes_with(group):
    G = groups.get(group)
    x = random_fields(group, 2)
    for kept in ((0, *rest) for n in range(4) for rest in itertools.combinations(range(1, 4), n)):
        subset = subset_of(group, kept)
        assert subset.kept == kept
        commutes = [
            subset(G.transform_features(x, g)).equal(G.transform_features(subset(x), g)) for g in elements(group)
        ]
        assert subset.symmetry == tuple(g for g in elements(group) if commutes[g])


def test_what_is_dropped_is_never_seen():
    x = random_fields("p4m", 3)
    norm = FibreNorm(nn.BatchNorm2d(3), 8).double()
    norm.subset = subset_of("p4m", (0, 3, 5))
    expected = norm(x)  # norm in train mode, its subset in eval mode
    x.unflatten(1, (3, 8))[:, :, [1, 2, 4, 6, 7]] = float("nan")
    assert norm(x).equal(expected)
    assert expected.unflatten(1, (3, 8))[:, :, [1, 2, 4, 6, 7]].count_nonzero() == 0


def test_batch_statistics_are_those_of_the_kept_elements():
    x = random_fields("p4", 3)
    norm = FibreNorm(nn.BatchNorm2d(3, momentum=1.0), 4).double()
    norm.subset = subset_of("p4", (0, 3))
    norm(x)
    kept = x.unflatten(1, (3, 4))[:, :, [0, 3]]
    assert norm.norm.running_mean.allclose(kept.mean((0, 2, 3, 4)))
    assert norm.norm.running_var.allclose(kept.var((0, 2, 3, 4)))


def test_sums_over_the_group_become_sums_over_the_subset():
    x = random_fields("p4", 3)
    subset = subset_of("p4", (0, 1, 3))
    kept = x.unflatten(1, (3, 4))[:, :, [0, 1, 3]]
    assert GroupPool(4)(subset(x)).allclose(kept.mean(2))
    conv = GroupConv2d(groups.get("p4"), 3, 2, 3, bias=False).double()
    filters = conv.filter().unflatten(1, (3, 4))[:, :, [0, 1, 3]].flatten(1, 2)
    assert conv(subset(x)).allclose(4 / 3 * nn.functional.conv2d(kept.flatten(1, 2), filters))


def test_training_draws_each_element_with_its_probability_and_always_the_identity():
    subset = Subset(groups.get("p4"))
    with torch.no_grad():
        subset.logits.copy_(torch.tensor([-1.0, 0.0, 2.0]))
    drawn = torch.stack([subset(torch.ones(1, 4))[0] > 0 for _ in range(2000)]).float().mean(0)
    assert drawn[0] == 1
    assert drawn.sub(torch.tensor([subset.probability(g) for g in range(4)])).abs().max() < 0.05


def test_training_repeats_with_the_seed():
    subset, x = Subset(groups.get("p4m")), random_fields("p4m", 2)
    torch.manual_seed(3)
    first = [subset(x) for _ in range(5)]
    torch.manual_seed(3)
    assert all(subset(x).equal(y) for y in first)
    assert any(not y.equal(first[0]) for y in first)


def test_training_drops_what_harms_and_keeps_what_helps():
    subset = Subset(groups.get("p4"))
    optimizer = torch.optim.Adam(subset.parameters(), lr=0.1)
    x = torch.tensor([[1.0, 1.0, -1.0, 1.0]])
    for _ in range(200):
        optimizer.zero_grad()
        (subset(x).mean() - 1).square().backward()  # the mean over S is 1 unless S has the third element
        optimizer.step()
    assert subset.eval().kept == (0, 1, 3)


def test_elements_outside_the_group_are_refused():
    subset = Subset(groups.get("p4"))
    with pytest.raises(ValueError, match=r"1\.5 is no element of p4; its elements are 0 to 3"):
        subset.keep([0, 1.5])
    with pytest.raises(ValueError, match="4 is no element of p4; its elements are 0 to 3"):
        subset.keep([0, 4])
    with pytest.raises(ValueError, match="-1 is no element of p4"):
        subset.probability(-1)
    with pytest.raises(ValueError, match="without the identity"):
        subset.keep([1, 2])
    with pytest.raises(ValueError, match="p4m is no subgroup of p4"):
        subset.keep("p4m")
    subset.keep("c2")
    assert subset.kept == (0, 2)
    with pytest.raises(ValueError, match="c1 has no element beside the identity"):
        Subset(groups.get("c1"))
    with pytest.raises(ValueError, match="6 channels, no whole number of fields"):
        subset(torch.randn(1, 6, 3, 3))
