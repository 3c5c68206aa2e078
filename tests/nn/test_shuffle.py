"""The pixel shuffles of regular fields: exact, each pose a plain shuffle of its own, and where a network has one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import SpaceToDepth
from torch import nn

import gzoo
from gzoo import groups
from gzoo.interop import to_escnn
from gzoo.nn import GroupPixelShuffle, GroupPixelUnshuffle
from gzoo.plan import plan
from tests.conftest import GRID_GROUPS, random_fields, random_image, with_random_statistics, worst_error


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("group", [*GRID_GROUPS, "c3", "c8", "d6", "d8"])
def test_it_and_its_gradients_commute_with_the_group(group, factor):
    layer = GroupPixelShuffle(groups.get(group), factor)
    for size in ((4, 4), (5, 5), (3, 6)):
        x = random_fields(group, 2 * factor**2, size, batch=1)
        assert worst_error(layer, group, x) < 1e-12
        assert layer(x).shape == (1, 2 * groups.get(group).order, size[0] * factor, size[1] * factor)


@pytest.mark.parametrize("group", ["c8", "d6", "d8"])
def test_the_upright_pose_is_shuffled_as_torch_does_and_no_number_is_lost(group):
    order, x = groups.get(group).order, random_fields(group, 8)
    y = GroupPixelShuffle(groups.get(group), 2)(x)
    torch.testing.assert_close(y[:, ::order], F.pixel_shuffle(x[:, ::order], 2), rtol=0, atol=0)
    assert y.flatten().sort()[0].equal(x.flatten().sort()[0])
    for pose in range(order):  # stays what it is
        assert y[:, pose::order].flatten().sort()[0].equal(x[:, pose::order].flatten().sort()[0])


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("group", [*GRID_GROUPS, "c3", "c8", "d8"])
def test_the_unshuffle_undoes_it_and_commutes_with_the_group(group, factor):
    point_group, x = groups.get(group), random_fields(group, 2 * factor**2, (3, 5), batch=1)
    shuffled = GroupPixelShuffle(point_group, factor)(x)
    assert GroupPixelUnshuffle(point_group, factor)(shuffled).equal(x)
    for by_place in (False, True):
        layer = GroupPixelUnshuffle(point_group, factor, by_place)
        assert worst_error(layer, group, shuffled) < 1e-12
        assert layer(shuffled).shape == x.shape


def test_the_upright_pose_is_unshuffled_as_torch_and_timm_do():
    p4m, x = groups.get("p4m"), random_fields("p4m", 2, (8, 12))
    for by_place, plain in ((False, nn.PixelUnshuffle(4)), (True, SpaceToDepth(4))):
        assert GroupPixelUnshuffle(p4m, 4, by_place)(x)[:, ::8].equal(plain(x[:, ::8].contiguous()))


@pytest.mark.parametrize("shape", [(1, 6, 4, 4), (1, 4, 4, 5), (1, 4, 5, 4)])
def test_maps_that_are_no_whole_squares_are_refused(shape):
    with pytest.raises(ValueError, match=r"it takes fields \* 4 channels, regular fields of p4, and sides"):
        GroupPixelUnshuffle(groups.get("p4"), 2)(torch.zeros(shape))


def test_channels_that_are_no_whole_squares_are_refused():
    with pytest.raises(ValueError, match=r"x has 24 channels; it takes fields \* 4 \* 4 of them"):
        GroupPixelShuffle(groups.get("p4"), 2)(torch.zeros(1, 24, 3, 3))


def conv(width_in, width_out, kernel=3):
    return nn.Conv2d(width_in, width_out, kernel, padding=kernel // 2)


class Skip(nn.Module):
    """Adds to the enlarged image."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(3, 16), nn.Tanh(), conv(16, 3 * 4), nn.PixelShuffle(2))
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")

    def forward(self, x):
        return self.up(x) + self.body(x)


class Beside(nn.Module):
    """Shuffles the channels of two convolutions together, and puts the result beside that of a third."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm, self.shuffle = conv(3, 10), conv(3, 6), nn.BatchNorm2d(16), nn.PixelShuffle(2)
        self.skip, self.last = nn.Sequential(conv(3, 4), nn.Upsample(scale_factor=2)), conv(8, 3)

    def forward(self, x):
        shuffled = self.shuffle(self.norm(torch.cat([self.a(x), self.b(x)], 1)))
        return self.last(torch.cat([shuffled, self.skip(x)], 1))


class AndItself(nn.Module):
    """Features of the image, and the image."""

    def __init__(self):
        super().__init__()
        self.a = conv(3, 4)

    def forward(self, x):
        return torch.cat([self.a(x), x], 1)


NETWORKS = {
    "at the end": lambda: nn.Sequential(conv(3, 16), nn.Tanh(), conv(16, 3 * 4), nn.PixelShuffle(2), nn.Sigmoid()),
    "by three": lambda: nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 3 * 9), nn.PixelShuffle(3)),
    "inside": lambda: nn.Sequential(conv(3, 64), nn.BatchNorm2d(64), nn.PixelShuffle(2), nn.ReLU(), conv(16, 3)),
    "twice": lambda: nn.Sequential(conv(3, 64), nn.PixelShuffle(2), nn.ReLU(), nn.PixelShuffle(2), conv(4, 3)),
    "beside others": Beside,
    "added to the image": Skip,
}


FOLDING = {
    "in front": lambda: nn.Sequential(nn.PixelUnshuffle(2), conv(12, 16), nn.ReLU(), nn.PixelShuffle(2), conv(4, 3)),
    "in front, by place": lambda: nn.Sequential(
        *(SpaceToDepth(), conv(48, 32), nn.ReLU(), nn.PixelShuffle(4), conv(2, 3))
    ),
    "of features": lambda: nn.Sequential(
        *(conv(3, 8), nn.ReLU(), nn.PixelUnshuffle(2), conv(32, 16), nn.PixelShuffle(2), conv(4, 3))
    ),
    "of features, by place": lambda: nn.Sequential(
        *(conv(3, 5), nn.ReLU(), SpaceToDepth(), nn.BatchNorm2d(80), conv(80, 32, 1), nn.PixelShuffle(4), conv(2, 3))
    ),
}
NETWORKS |= FOLDING


def small(network):
    """The network, which `gzoo.convert` then checks on small images."""
    plain = NETWORKS[network]()
    plain.pretrained_cfg = {"input_size": (3, 16, 16)}
    return plain


@pytest.mark.parametrize("group", ["p4m", "c8"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_that_enlarges_images_converts(network, group):
    plain = small(network)
    built = gzoo.convert(plain, group)
    model = with_random_statistics(built).eval()
    for size in ((8, 8), (12, 4)) if network in FOLDING else ((8, 8), (9, 9), (7, 10)):
        x = random_image(3, size, batch=1)
        assert model(x).shape == plain(x.float()).shape
        assert worst_error(model, group, x, "image", "image") < 1e-12
    planned = plan(plain, groups.chain(group)).total().params
    assert sum(parameter.numel() for parameter in built.parameters()) == planned


@pytest.mark.parametrize("network", NETWORKS)
def test_a_transferred_network_is_the_mean_of_the_plain_one_over_the_group(network):
    p4m, plain = groups.get("p4m"), with_random_statistics(small(network)).eval()
    model = gzoo.convert(plain, "p4m", weights="transfer")
    x = random_image(3, (4, 8) if network in FOLDING else (6, 7))
    with torch.no_grad():
        back = [p4m.transform_image(plain(p4m.transform_image(x, p4m.inverse(g))), g) for g in p4m.grid_elements]
        expected = torch.stack(back).mean(0)
        if network == "at the end":  # the mean is in front of the sigmoid
            linear = copy.deepcopy(plain)
            linear[4] = nn.Identity()
            back = [p4m.transform_image(linear(p4m.transform_image(x, p4m.inverse(g))), g) for g in p4m.grid_elements]
            expected = torch.stack(back).mean(0).sigmoid()
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("plain", "options", "message"),
    [
        (lambda: nn.Sequential(nn.PixelShuffle(2), conv(2, 8)), {}, "0: it unfolds channels that have no fibre"),
        (lambda: NETWORKS["by three"](), {"classifier": "2"}, "3: it unfolds .* name it, not the layer before it, as"),
        (lambda: NETWORKS["by three"](), {"weights": "project"}, "3: its squares .* use weights='transfer'"),
        (lambda: NETWORKS["of features"](), {"weights": "project"}, "2: its squares .* use weights='transfer'"),
        (lambda: nn.Sequential(AndItself(), nn.PixelUnshuffle(2), conv(28, 8)), {}, "1: it folds .* beside maps"),
    ],
)
def test_what_does_not_convert_names_the_shuffle(plain, options, message):
    plain = plain()
    if isinstance(plain[0] if isinstance(plain, nn.Sequential) else None, nn.PixelShuffle):
        plain.pretrained_cfg = {"input_size": (8, 16, 16)}
    with pytest.raises(ValueError, match=message):
        gzoo.convert(plain, "p4", **options)


def test_it_stays_what_it_is_in_escnn():
    model = gzoo.convert(NETWORKS["inside"](), "p4m").eval()
    x = torch.randn(1, 3, 9, 9)
    torch.testing.assert_close(to_escnn(model)(x), model(x))
