"""Networks as people write them: pools, strides, pads and flattened maps in functions of their forward."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gzoo
from gzoo import groups
from gzoo.check import relative_error
from gzoo.nn import GroupConv2d, GroupMapLinear, GroupMapNorm, GroupVectorMap
from gzoo.nn.functions import Calls, SymmetricForward, act_symmetrically
from gzoo.plan import plan
from tests.conftest import GRID_GROUPS, Calling, random_fields, random_image, with_random_statistics, worst_error

SIZES = ((16, 16), (17, 17), (15, 15), (18, 18), (17, 22), (19, 14))


class Steps(nn.Module):
    """Two convolutions, and a function between them."""

    def __init__(self, step, width=6, after=1):
        super().__init__()
        self.step = step
        self.first, self.second = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(after * width, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        y = self.first(x).relu()
        return self.head(self.second(self.step(y)).relu().mean((2, 3)))


STEPS = {
    "max pool": lambda y: F.max_pool2d(y, 2),
    "max pool of torch": lambda y: torch.max_pool2d(y, 3, 2, 1),
    "overlapping max pool": lambda y: F.max_pool2d(y, kernel_size=3, stride=2, ceil_mode=True),
    "maxima put back": lambda y: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2, output_size=y.shape[2:]),
    "average pool": lambda y: F.avg_pool2d(y, 3, stride=2, padding=1, count_include_pad=False),
    "average pool of 2": lambda y: F.avg_pool2d(y, (2, 2)),
    "adaptive pool": lambda y: F.adaptive_max_pool2d(y, 5),
    "every second pixel": lambda y: y[:, :, ::2, ::2],
    "every third pixel": lambda y: y[..., ::3, ::3],
    "some channels of every second": lambda y: torch.cat((y[:, :2, ::2, ::2], y[:, 2:, ::2, ::2]), 1),
    "nearest by a factor": lambda y: F.interpolate(y, scale_factor=2),
    "nearest by no whole factor": lambda y: F.interpolate(y, scale_factor=1.5),
    "nearest to a size": lambda y: F.interpolate(y, size=(11, 11)),
    "nearest to half the size": lambda y: F.interpolate(y, size=[n // 2 for n in y.shape[2:]], mode="nearest"),
    "nearest-exact to a third": lambda y: F.interpolate(y, size=[n // 3 for n in y.shape[2:]], mode="nearest-exact"),
    "bilinear by no whole factor": lambda y: F.interpolate(y, scale_factor=1.3, mode="bilinear"),
    "bicubic by two factors": lambda y: F.interpolate(y, scale_factor=(0.7, 0.7), mode="bicubic", align_corners=False),
    "a pixel on one side": lambda y: F.pad(y, (0, 1, 0, 1)),
    "three pixels, replicated": lambda y: F.pad(y, [1, 2, 1, 2], "replicate"),
    "a row and a column left out": lambda y: y[:, :, :-1, :-1],
    "to a multiple of four": lambda y: F.pad(y, (0, -y.shape[3] % 4, 0, -y.shape[2] % 4)),
}


NEVER = {
    *("nearest by no whole factor", "nearest to a size", "nearest to half the size", "bilinear by no whole factor"),
    *("bicubic by two factors", "a pixel on one side", "three pixels, replicated", "a row and a column left out"),
}


@pytest.mark.parametrize("step", STEPS, ids=STEPS.keys())
def test_a_function_of_pixels_in_a_forward_is_symmetric(step):
    model = with_random_statistics(gzoo.convert(Steps(STEPS[step]), "p4m", match="width")).eval()
    for size in SIZES:
        assert gzoo.check(model, size).worst < 1e-12
    assert worst_error(model, "p4m", random_image(3, (16, 16)), "image", "invariant") < 1e-11
    assert worst_error(model, "p4m", random_image(3, (15, 18)), "image", "invariant") < 1e-11


@pytest.mark.parametrize("step", STEPS, ids=STEPS.keys())
def test_where_a_step_is_symmetric_it_is_what_the_plain_network_does(step):
    """Of fields of one element; at these sizes, or never."""
    plain, even, odd = Steps(STEPS[step]).double().eval(), random_image(6, (16, 16)), random_image(6, (15, 15))
    symmetric = act_symmetrically(Calling(STEPS[step]), Calls(crops=True))
    assert all(symmetric(x).shape == plain.step(x).shape for x in (even, odd))
    assert any(symmetric(x).allclose(plain.step(x)) for x in (even, odd)) == (step not in NEVER)


FITTING = {"max pool": 16, "max pool of torch": 17, "every second pixel": 19, "nearest to half the size": 0}


@pytest.mark.parametrize("step", FITTING)
def test_transferred_weights_give_the_mean_where_the_step_is_symmetric_as_it_stands(step):
    plain, size = Steps(STEPS[step]).eval(), FITTING[step]
    model = gzoo.convert(plain, "p4", weights="transfer").eval()
    x = torch.randn(2, 3, size or 16, size or 16)
    mean = sum(plain(x.rot90(r, (2, 3))) for r in range(4)) / 4
    assert model(x).allclose(mean, atol=1e-5) == (size > 0)


def test_maxima_of_one_window_return_to_their_pixels_too():
    step = act_symmetrically(Calling(STEPS["maxima put back"]), Calls())
    assert worst_error(step, "p4m", random_fields("p4m", 2, (2, 2))) < 1e-12
    x = random_image(3, (2, 2))
    assert step(x).allclose(STEPS["maxima put back"](x))


def test_an_input_that_is_named_is_one_all_the_same():
    def step(y):
        return F.interpolate(input=F.avg_pool2d(input=F.max_pool2d(input=y, kernel_size=2), kernel_size=2), size=9)

    model = with_random_statistics(gzoo.convert(Steps(step), "p4")).eval()
    assert gzoo.check(model, 19).worst < 1e-12
    assert gzoo.check(model, 18).worst < 1e-12


def test_rows_of_pixels_are_no_flattened_maps():
    """As a softmax over the pixels of each channel is written."""

    def spatial_softmax(y):
        batch, channels, height, width = y.shape
        return y * y.view(-1, height * width).softmax(1).view(batch, channels, height, width)

    plain = Steps(spatial_softmax).eval()
    model, x = gzoo.convert(plain, "p4", weights="transfer").eval(), torch.randn(2, 3, 9, 9)
    assert model(x).allclose(sum(plain(x.rot90(r, (2, 3))) for r in range(4)) / 4, atol=1e-5)


def test_half_of_the_pixels_by_the_nearest_are_means_of_two_along_each_axis():
    x = random_image(2, (8, 8))
    found = act_symmetrically(Calling(lambda y: F.interpolate(y, size=4)), Calls())(x)
    assert found.allclose(F.avg_pool2d(x, 2))


LOPSIDED = {
    "difference": (lambda y: y[:, :, 1:, 1:] - y[:, :, :-1, :-1], "is not equivariant"),  # cropped alike they are one
    "shift": (lambda y: F.pad(y, (1, -1, 1, -1)), "is not equivariant"),
    "one axis": (lambda y: F.pad(y, (0, 1)), "is not equivariant"),
    "odd pixels": (lambda y: y[:, :, 1::2, 1::2], "is not equivariant"),
    "one axis cropped": (lambda y: y[:, :, :, 1:], "is not equivariant"),
    "roll": (lambda y: y + y.roll(1, 2), "is not equivariant"),
    "height for width": (
        lambda y: F.adaptive_max_pool2d(y, y.shape[2] // 4),
        "at 64x33 pixels, though on squares it is",
    ),
    "oblong pool": (lambda y: F.max_pool2d(y, (1, 2)), r"kernel_size=\(1, 2\) differs between the axes"),
    "whole numbers": (lambda y: y * F.interpolate((y > 0)[:, :, ::2, ::2].float(), y.shape[2:]), "has no means of two"),
}


@pytest.mark.parametrize("step", LOPSIDED)
def test_a_step_that_prefers_a_side_or_an_axis_is_refused(step):
    function, message = LOPSIDED[step]
    with pytest.raises(ValueError, match=message):
        gzoo.convert(Steps(function), "p4m")


class Sizes(nn.Module):
    """The decoder of a U-Net that fits one map to another, as ``fit`` does it."""

    def __init__(self, fit):
        super().__init__()
        self.fit = fit
        self.down, self.lower = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 12, 3, stride=2, padding=1)
        self.up, self.join, self.last = (
            nn.ConvTranspose2d(12, 6, 2, 2),
            nn.Conv2d(12, 8, 3, padding=1),
            nn.Conv2d(8, 2, 1),
        )

    def forward(self, x):
        skip = self.down(x).relu()
        y = self.fit(self.up(F.max_pool2d(self.lower(skip).relu(), 3, 1, 1)), skip)
        return self.last(self.join(torch.cat([skip, y], 1)).relu())


def padded(y, skip):
    more = [a - b for a, b in zip(skip.shape[2:], y.shape[2:], strict=True)]
    return F.pad(y, [more[1] // 2, more[1] - more[1] // 2, more[0] // 2, more[0] - more[0] // 2])


def nearest(y, skip):
    return F.interpolate(y, size=skip.shape[2:], mode="nearest")


def cut_off(y, skip):
    return F.pad(y, (0, skip.shape[3] - y.shape[3], 0, skip.shape[2] - y.shape[2]), mode="replicate")


def if_needed(y, skip):
    return y if y.shape[2:] == skip.shape[2:] else padded(y, skip)


def cropped(y, skip):
    """The skip, that is, which a decoder returns no more of than it needs."""
    return F.pad(y, (0, 1, 0, 1))[:, :, : skip.shape[2], : skip.shape[3]]


def cropped_before(y, skip):
    y = F.pad(y, (1, 0, 1, 0))
    return y[:, :, y.shape[2] - skip.shape[2] :, y.shape[3] - skip.shape[3] :]


@pytest.mark.parametrize("fit", [padded, nearest, cut_off, if_needed, cropped, cropped_before])
def test_a_decoder_that_fits_its_maps_by_functions_converts(fit):
    model = with_random_statistics(gzoo.convert(Sizes(fit), "p4m")).eval()
    for size in SIZES:
        assert gzoo.check(model, size).worst < 1e-12


class Timms(nn.Module):
    """Calls its functions in a method that is called by itself as well, and computes its activations again."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.stem, self.body, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3, padding=1), nn.Linear(8, 5)

    def pooled(self, y):
        return F.max_pool2d(self.body(y).tanh(), 2)

    def forward_features(self, x):
        y = self.stem(x)
        return checkpoint(self.pooled, y, use_reentrant=self.reentrant) if self.training else self.pooled(y)

    def forward(self, x):
        return self.head(self.forward_features(x).mean((2, 3)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_all_methods_of_a_module_call_symmetric_functions(reentrant):
    model, x = with_random_statistics(gzoo.convert(Timms(reentrant), "p4")).eval(), random_image(3, (17, 17))
    turned = model.forward_features(x.rot90(1, (2, 3)))
    assert turned.allclose(model.group.transform_features(model.forward_features(x), 1), atol=1e-12)
    gradients = []
    for mode in (False, True):
        model.train(mode).zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(a.allclose(b) for a, b in zip(*gradients, strict=True))


def test_a_module_with_functions_in_another_one_with_others_is_met_once():
    class Inner(OptionA):
        def forward(self, x):
            more = F.pad(x, (0, 0, 0, 0, 0, 4))
            return F.max_pool2d(self.conv(more).relu(), 2)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.inner, self.head = nn.Conv2d(3, 8, 3), Inner(), nn.Linear(24, 5)
            self.inner.conv = nn.Conv2d(12, 16, 3, padding=1)
            for name in ("stem", "norm", "head"):
                delattr(self.inner, name)

        def forward(self, x):
            y = F.pad(self.inner(self.stem(x)), (0, 0, 0, 0, 0, 8))
            return self.head(by_hand(y, 4).mean((2, 3)))

    model = with_random_statistics(gzoo.convert(Outer(), "p4m")).eval()
    assert gzoo.check(model, 17).worst < 1e-12
    assert gzoo.check(model, (20, 17)).worst < 1e-12


def test_pads_of_the_image_and_of_features_by_one_number_are_told_apart():
    plain = Network(
        lambda self, x: self.b(F.pad(self.a(F.pad(x, (0, 0, 0, 0, 0, 1))), (0, 0, 0, 0, 0, 1))).mean((2, 3))
    )
    plain.a, plain.b, plain.pretrained_cfg = nn.Conv2d(4, 7, 3), nn.Conv2d(8, 5, 3), {"input_size": (3, 9, 9)}
    assert gzoo.check(with_random_statistics(gzoo.convert(plain, "p4m")).eval(), 9).worst < 1e-12


class Network(nn.Module):
    """A forward given as a function; with names of its own that gzoo might use."""

    prefix, functions, calls, fits = "wide", [], 3, None

    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, x):
        assert self.prefix == "wide"
        assert self.calls == 3
        return self.run(self, x)


def test_both_sides_cropped_in_two_modules_are_a_difference():
    first, second = (
        Calling(lambda y, before=before: y[:, :, before : n(before), before : n(before)]) for before in (1, 0)
    )
    plain = Network(lambda self, x: self.b(first(self.a(x)) - second(self.a(x))).mean((2, 3)))
    plain.a, plain.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3)
    plain.first, plain.second = first, second
    with pytest.raises(ValueError, match="not equivariant"):
        gzoo.convert(plain, "p4")


def n(before):
    return None if before else -1


def test_what_pads_one_side_is_not_transferred():
    for step in (STEPS["a pixel on one side"], STEPS["a row and a column left out"], nn.ZeroPad2d((0, 1, 0, 1))):
        with pytest.raises(ValueError, match=r"one side,? .*no mean over poses does"):
            gzoo.convert(Steps(step), "p4", weights="transfer")


def test_a_decoder_that_pads_odd_maps_alone_is_transferred_at_even_sizes():
    plain = Sizes(padded).eval()
    plain.lower = nn.Conv2d(6, 12, 2, stride=2)  # whose windows fit even sizes
    model, x = gzoo.convert(plain, "p4", weights="transfer").eval(), torch.randn(2, 3, 16, 16)
    mean = sum(plain(x.rot90(r, (2, 3))).rot90(-r, (2, 3)) for r in range(4)) / 4
    assert model(x).allclose(mean, atol=1e-5)


# --- channels ---------------------------------------------------------------------------------------------------------


class OptionA(nn.Module):
    """The shortcut of He et al. 2015 for CIFAR-10: every second pixel, and zeros for new channels."""

    def __init__(self, width=16):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, width, 3, 2, 1)
        self.norm, self.head, self.width = nn.BatchNorm2d(width), nn.Linear(width, 5), width

    def forward(self, x):
        x = self.stem(x).relu()
        more = (self.width - 8) // 2
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, more, self.width - 8 - more), "constant", 0)
        y = (self.norm(self.conv(x)) + shortcut).relu()
        return self.head(F.avg_pool2d(y, y.shape[2:]).view(len(y), -1))


@pytest.mark.parametrize("width", [16, 19])
@pytest.mark.parametrize("group", ["p4m", "c8"])
def test_zeros_in_place_of_channels_are_as_many_as_the_fields(group, width):
    model = with_random_statistics(gzoo.convert(OptionA(width), group)).eval()
    for size in SIZES:
        assert gzoo.check(model, size).worst < 1e-12


def test_zeros_in_place_of_channels_are_carried_over():
    plain = OptionA().eval()
    model, x = gzoo.convert(plain, "p4m", weights="transfer").eval(), torch.randn(2, 3, 17, 17)
    mean = sum(plain(y.rot90(r, (2, 3))) for y in (x, x.flip(3)) for r in range(4)) / 8
    assert model(x).allclose(mean, atol=1e-5)


class Shuffled(nn.Module):
    """A unit of ShuffleNet (Zhang et al. 2018)."""

    def __init__(self, shuffle):
        super().__init__()
        self.shuffle = shuffle
        self.stem, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Linear(12, 5)
        self.first, self.last = (nn.Conv2d(12, 12, 3, padding=1, groups=3) for _ in range(2))

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((x + self.last(self.shuffle(self.first(x).relu()))).mean((2, 3)))


def by_hand(x, groups=3):
    batch, channels, height, width = x.shape
    return x.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(batch, -1, height, width)


def permuted(x, groups=3):
    batch, _, height, width = x.shape
    return (
        x.reshape(batch, groups, -1, height, width).permute(0, 2, 1, 3, 4).contiguous().view(batch, -1, height, width)
    )


@pytest.mark.parametrize("group", ["p4m", "c8"])
@pytest.mark.parametrize(
    "shuffle",
    [by_hand, permuted, nn.ChannelShuffle(3), lambda x: torch.channel_shuffle(x, 3)],
    ids=["by hand", "permuted", "module", "function"],
)
def test_a_shuffle_of_channels_is_one_of_fields(shuffle, group):
    plain = Shuffled(shuffle).eval()
    model = with_random_statistics(gzoo.convert(plain, group)).eval()
    assert gzoo.check(model, 9).worst < 1e-12
    assert worst_error(model, group, random_image(3, (9, 9)), "image", "invariant") < 1e-11
    if group == "p4m":
        model, x = gzoo.convert(plain, "p4m", weights="transfer").eval(), torch.randn(2, 3, 9, 9)
        mean = sum(plain(y.rot90(r, (2, 3))) for y in (x, x.flip(3)) for r in range(4)) / 8
        assert model(x).allclose(mean, atol=1e-5)  # so the fields are in the order of the channels


# --- parameters of a module itself ------------------------------------------------------------------------------------


class OwnNorm(nn.Module):
    """The layer norm of ConvNeXt's own repository (Liu et al. 2022), which takes maps as well."""

    def __init__(self, width, last):
        super().__init__()
        self.weight, self.bias, self.last = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), last

    def forward(self, x):
        if self.last:
            return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, 1e-6)
        centred = x - x.mean(1, keepdim=True)
        x = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class OwnBlock(nn.Module):
    """A block with a scale a channel, and a single number."""

    def __init__(self, width):
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), OwnNorm(width, last=True)
        self.mix, self.back = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma, self.share = nn.Parameter(1e-6 * torch.ones(width)), nn.Parameter(torch.ones(1))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.back(F.gelu(self.mix(y)))
        return x + self.share * y.permute(0, 3, 1, 2)


class OwnNumbers(nn.Module):
    """Also of the image, and in the module that calls functions."""

    def __init__(self, width=16):
        super().__init__()
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))
        self.std = nn.Parameter(torch.rand(3, 1, 1) + 0.5)
        self.stem, self.norm, self.block = nn.Conv2d(3, width, 4, 4), OwnNorm(width, last=False), OwnBlock(width)
        self.scale, self.head = nn.Parameter(torch.ones(1, width, 1, 1)), nn.Linear(width, 5)

    def forward(self, x):
        y = self.block(self.norm(self.stem((x - self.mean) / self.std))) * self.scale.exp()
        return self.head(y[:, :, ::2, ::2].mean((2, 3)))


@pytest.mark.parametrize("group", ["p4m", "c8"])
def test_parameters_of_a_module_that_hold_one_number_a_channel_hold_one_a_field(group):
    plain = OwnNumbers()
    model = with_random_statistics(gzoo.convert(plain, group)).eval()
    order, fields = model.group.order, model.stem.out_fields
    assert model.scale.shape == (1, fields * order, 1, 1)
    assert dict(model.named_parameters())["scale"].shape == (1, fields, 1, 1)
    assert dict(model.named_parameters())["block.gamma"].shape == (fields,)
    assert model.std.shape == (3, 1, 1)
    for size in ((16, 16), (17, 17), (32, 44)):
        assert gzoo.check(model, size).worst < 1e-12
    assert worst_error(model, group, random_image(3, (32, 24)), "image", "invariant") < 1e-11
    assert 0.9 < sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in plain.parameters()) < 1.1
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = random_image(3, (16, 16))
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert twin(x).equal(model(x))


class Scaled(Steps):
    """A scale a channel, of any shape."""

    def __init__(self, *shape):
        super().__init__(None)
        self.scale = nn.Parameter(torch.randn(*shape))

    def forward(self, x):
        return self.head(self.second(self.first(x).relu() * self.scale).mean((2, 3)))


@pytest.mark.parametrize("weights", ["transfer", "project"])
@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1, 1), (1,)])
def test_such_parameters_are_carried_over(weights, shape):
    plain = Scaled(*shape)
    plain.first, plain.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    model = gzoo.convert(plain.eval(), "p4", weights=weights).eval()
    if weights == "transfer":
        x = torch.randn(2, 3, 9, 9)
        assert model(x).allclose(sum(plain(x.rot90(r, (2, 3))) for r in range(4)) / 4, atol=1e-5)
    else:
        mean = plain.scale if shape == (1,) else plain.scale.flatten().view(2, 4).mean(1)
        assert dict(model.named_parameters())["scale"].flatten().equal(mean)


@pytest.mark.parametrize("shape", [(6, 9, 1), (9, 1), (1, 1, 1, 9), (1, 6, 9, 9)])
def test_a_parameter_that_holds_a_number_a_pixel_is_refused(shape):
    plain = Scaled(*shape)
    plain.pretrained_cfg = {"input_size": (3, 9, 9)}
    with pytest.raises(ValueError, match=r"Scaled with parameters or buffers of its own \(scale\)"):
        gzoo.convert(plain, "p4")


def test_a_buffer_of_features_is_refused():
    """A number a channel that nothing learns may be meant for that channel."""
    plain = Scaled(1)
    del plain.scale
    plain.register_buffer("scale", torch.randn(6, 1, 1))
    with pytest.raises(ValueError, match=r"Scaled with parameters or buffers of its own \(scale\)"):
        gzoo.convert(plain, "p4")


HALVES = {
    "by numbers": lambda y: torch.cat([y[:, :6].relu(), y[:, 6:].tanh()], 1),
    "by the shape": lambda y: torch.cat([y[:, : y.shape[1] // 2].relu(), y[:, y.shape[1] // 2 :].tanh()], 1),
    "from the end": lambda y: torch.cat([y[:, :-6].relu(), y[:, -6:].tanh()], 1),
}


@pytest.mark.parametrize("halves", HALVES)
def test_channels_that_are_taken_by_numbers_are_as_many_of_the_fields(halves):
    plain = Steps(HALVES[halves], width=12).eval()
    model = with_random_statistics(gzoo.convert(plain, "p4m")).eval()
    assert worst_error(model, "p4m", random_image(3, (9, 9)), "image", "invariant") < 1e-11
    x = torch.randn(2, 3, 9, 9)
    model = gzoo.convert(plain, "p4", weights="transfer").eval()
    assert model(x).allclose(sum(plain(x.rot90(r, (2, 3))) for r in range(4)) / 4, atol=1e-5)


# --- heads --------------------------------------------------------------------------------------------------------


class Headed(nn.Module):
    def __init__(self, end, head):
        super().__init__()
        self.end, self.body, self.head = end, nn.Conv2d(3, 8, 3, padding=1), head

    def forward(self, x):
        return self.end(self.head(self.body(x).relu().mean((2, 3))))


HEADS = {
    "squeezed": (lambda y: y.squeeze(1), nn.Linear(8, 1)),
    "a probability": (lambda y: y.sigmoid().squeeze(-1), nn.Linear(8, 1)),
    "a probability of what is squeezed": (lambda y: y.squeeze(-1).sigmoid(), nn.Linear(8, 1)),
    "a view": (lambda y: y.view(-1), nn.Linear(8, 1)),
    "a column": (lambda y: y[:, 0], nn.Linear(8, 1)),
    "flattened": (lambda y: torch.flatten(y), nn.Linear(8, 1)),
    "batch norm": (lambda y: y, nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6))),
    "layer norm, then on the sphere": (F.normalize, nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6))),
    "beside another": (lambda y: (y[:, :1].squeeze(1), y), nn.Linear(8, 4)),
}


@pytest.mark.parametrize("what", HEADS)
def test_a_head_gives_as_many_numbers_as_it_did(what):
    plain = Headed(*HEADS[what]).eval()
    model, x = with_random_statistics(gzoo.convert(plain, "p4m")).eval(), random_image(3, (9, 9))
    first = (lambda y: y[0]) if what == "beside another" else (lambda y: y)
    assert first(model(x)).shape == first(plain(x.float())).shape
    for g in range(8):
        assert first(model(model.group.transform_image(x, g))).allclose(first(model(x)), atol=1e-12)
    assert gzoo.check(model, 9).worst < 1e-12


class Anchored(nn.Module):
    """Logits of three anchors at each pixel, as YOLO's heads give them."""

    def __init__(self, dims):
        super().__init__()
        self.dims = dims
        self.body, self.out = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 27, 1)

    def forward(self, x):
        y = self.out(self.body(x).relu())
        return y.view(len(y), 3, 9, *y.shape[2:]).permute(self.dims)


@pytest.mark.parametrize("dims", [(0, 1, 2, 3, 4), (0, 1, 3, 4, 2)])
def test_logits_of_several_anchors_move_with_the_image(dims):
    plain = Anchored(dims).eval()
    model, x = with_random_statistics(gzoo.convert(plain, "p4m", classifier="out")).eval(), random_image(3, (9, 12))
    assert model(x).shape == plain(x.float()).shape
    pixels = dims.index(3), dims.index(4)
    assert model(x.rot90(1, (2, 3))).allclose(model(x).rot90(1, pixels), atol=1e-12)
    assert model(x.flip(3)).allclose(model(x).flip(pixels[1]), atol=1e-12)
    assert gzoo.check(model, (9, 12)).worst < 1e-12


def test_a_map_beside_features_is_asked_about():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.out = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 2, 3, padding=1)

        def forward(self, x):
            features = self.down(x).relu()
            return self.out(F.interpolate(features, x.shape[2:], mode="bilinear")), features

    with pytest.warns(UserWarning, match=r"an output of Beside .* regular fields, .* classifier=\['out'\]"):
        gzoo.convert(Beside(), "p4")


# --- a map as a vector ------------------------------------------------------------------------------------------------


class Lenet(nn.Module):
    """As tutorials have it: numbers in place of shapes."""

    def __init__(self, flatten, pixels=4):
        super().__init__()
        self.flatten, self.pool = flatten, nn.MaxPool2d(2)
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2 = nn.Linear(16 * pixels**2, 12), nn.Linear(12, 10)
        self.drop = nn.Dropout(0.1)
        self.pretrained_cfg = {"input_size": (1, 24, 24) if pixels == 4 else (1, 12, 12)}

    def forward(self, x):
        x = self.pool(self.conv1(x).relu())
        x = F.max_pool2d(self.conv2(x).relu(), 2)
        return F.log_softmax(self.fc2(self.drop(self.fc1(self.flatten(x)).relu())), dim=1)


FLAT = {
    "flatten": lambda x: x.flatten(1),
    "torch.flatten": lambda x: torch.flatten(x, start_dim=1),
    "by numbers": lambda x: x.view(-1, 256),
    "reshaped": lambda x: x.reshape((len(x), 256)),
    "with dropout": lambda x: F.dropout(nn.Flatten()(x), 0.5, training=False),
}


@pytest.mark.parametrize("flatten", FLAT, ids=FLAT.keys())
@pytest.mark.parametrize("group", GRID_GROUPS)
def test_a_linear_layer_over_a_flattened_map_is_a_convolution_as_large_as_the_map(group, flatten):
    model = with_random_statistics(gzoo.convert(Lenet(FLAT[flatten]), group)).eval()
    assert isinstance(model.fc1, GroupMapLinear)
    assert gzoo.check(model, 24).worst < 1e-12
    assert worst_error(model, group, random_image(1, (24, 24)), "image", "invariant") < 1e-11


def test_it_keeps_the_parameters_and_can_be_steerable():
    plain = Lenet(FLAT["flatten"])
    for model in (gzoo.convert(plain, "p4m"), gzoo.convert(plain, "c8"), gzoo.convert(plain, "p4", basis="steerable")):
        ratio = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in plain.parameters())
        assert 0.9 < ratio < 1.1
        assert gzoo.check(model, 24).worst < 1e-12


def test_a_flattened_map_of_one_pixel_by_numbers():
    """After global pooling ``x.view(-1, 16)`` is in every tutorial; the converted network has other widths."""
    model = with_random_statistics(gzoo.convert(Lenet(lambda x: x.view(-1, 16), pixels=1), "p4m")).eval()
    assert model(torch.randn(3, 1, 12, 12).double()).shape == (3, 10)
    assert gzoo.check(model, 12).worst < 1e-12


def test_it_takes_plain_weights_over():
    plain = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 7)).eval()
    plain.pretrained_cfg = {"input_size": (1, 8, 8)}
    model, x = gzoo.convert(plain, "p4m", weights="transfer").eval(), torch.randn(2, 1, 8, 8)
    mean = sum(plain(y.rot90(r, (2, 3))) for y in (x, x.flip(3)) for r in range(4)) / 8
    assert model(x).allclose(mean, atol=1e-5)


def with_a_norm_of_a_flattened_map():
    layers = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(8 * 36), nn.ReLU(), nn.Linear(8 * 36, 7)
    plain = with_random_statistics(nn.Sequential(*layers)).eval()
    plain.pretrained_cfg = {"input_size": (1, 8, 8)}
    return plain


def test_a_synchronized_norm_of_a_flattened_map_and_one_that_a_partial_network_cannot_have():
    plain = nn.SyncBatchNorm.convert_sync_batchnorm(with_a_norm_of_a_flattened_map())
    assert gzoo.check(gzoo.convert(plain, "p4"), 8).worst < 1e-12
    with pytest.raises(ValueError, match="3 is a norm of a flattened map, which cannot leave elements out"):
        gzoo.convert(with_a_norm_of_a_flattened_map(), "p4", partial=True)


def test_a_flattened_map_exports_for_any_batch():
    model, x = gzoo.convert(with_a_norm_of_a_flattened_map(), "p4").float().eval(), torch.randn(3, 1, 8, 8)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    torch.testing.assert_close(exported(x[:2]), model(x[:2]))


@pytest.mark.parametrize("weights", [None, "transfer", "project"])
@pytest.mark.parametrize("group", GRID_GROUPS)
def test_a_norm_of_a_flattened_map_is_one_of_the_pixels_that_the_group_exchanges(group, weights):
    plain, x, own = with_a_norm_of_a_flattened_map(), random_image(1, (8, 8)), groups.get(group)
    model = gzoo.convert(plain, group, weights=weights).double()
    assert isinstance(model[3], GroupMapNorm)
    if weights == "transfer":
        poses = [plain(own.transform_image(x, g)) for g in range(own.order)]
        torch.testing.assert_close(model.eval()(x), sum(poses) / len(poses))
    model = with_random_statistics(model)
    assert gzoo.check(model.eval(), 8).worst < 1e-12
    assert worst_error(model, group, x, "image", "invariant") < 1e-11
    assert worst_error(model.train(), group, torch.cat((x, x.sin())), "image", "invariant") < 1e-11


def test_the_plan_counts_the_numbers_of_a_norm_of_a_flattened_map():
    plain = with_a_norm_of_a_flattened_map()
    total = plan(plain, groups.chain("p4")).total()
    assert total.plain_params == sum(p.numel() for p in plain.parameters())
    assert total.params == sum(p.numel() for p in gzoo.convert(plain, "p4").parameters())


def test_it_takes_back_the_norm_of_an_equivariant_network_that_was_made_plain():
    plain, group = with_a_norm_of_a_flattened_map(), groups.get("p4")
    norm = gzoo.convert(plain, "p4", weights="project")[3].norm
    fields = norm.weight.view(2, 6, 6)
    poses = [group.transform_image(fields, g) for g in range(4)]
    with torch.no_grad():
        plain[3].weight.copy_(torch.stack(poses, 1).flatten())
    assert gzoo.convert(plain, "p4", weights="project")[3].norm.weight.allclose(norm.weight)


def test_a_norm_of_pixels_that_a_group_turns_between_others_is_refused():
    with pytest.raises(ValueError, match="3: c8 has elements that move no pixel of a flattened map onto another"):
        gzoo.convert(with_a_norm_of_a_flattened_map(), "c8")


def test_it_takes_back_the_filters_of_an_equivariant_network_that_was_made_plain():
    plain = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 8), nn.ReLU(), nn.Linear(8, 7))
    plain.pretrained_cfg = {"input_size": (1, 8, 8)}
    first = gzoo.convert(plain, "p4", weights="project").eval()
    with torch.no_grad():
        for number in (0, 3):
            plain[number].weight.copy_(first[number].filter().reshape_as(plain[number].weight))
            plain[number].bias.copy_(first[number].channel_bias())
    again = gzoo.convert(plain, "p4", weights="project").eval()
    for number in (0, 3):
        assert again[number].weight.allclose(first[number].weight, atol=1e-6)


def test_a_classifier_of_a_flattened_map_says_no_pose():
    plain = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 7))
    plain.pretrained_cfg = {"input_size": (1, 8, 8)}
    with pytest.raises(ValueError, match="3: it makes logits of a flattened map; head='pose' wants"):
        gzoo.convert(plain, "p4m", head="pose")
    behind = nn.Sequential(*plain, nn.ReLU(), nn.Linear(7, 4))
    behind.pretrained_cfg = plain.pretrained_cfg
    model, x, group = (
        gzoo.convert(behind, "p4m", head="pose").double().eval(),
        random_image(1, (8, 8)),
        groups.get("p4m"),
    )
    for g in range(8):
        turned = group.transform_features(model(x).flatten(1), g).view(2, 4, 8)
        assert model(group.transform_image(x, g)).allclose(turned)


def test_a_flattened_oblong_map_is_refused():
    plain = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Flatten(), nn.Linear(6 * 24, 7))
    plain.pretrained_cfg = {"input_size": (1, 8, 6)}
    with pytest.raises(ValueError, match="6x4 pixels, whose sides a quarter turn exchanges"):
        gzoo.convert(plain, "p4m")


@pytest.mark.parametrize("side", [8, 7])
def test_a_size_at_which_a_view_mixes_images_is_not_the_networks_own(side):
    """The networks of tutorials for CIFAR-10 and MNIST run on 64 and 224 pixels, with other rows than images."""
    first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1))
    plain = Network(lambda self, x: self.b(F.max_pool2d(self.a(x).relu(), 2).view(-1, 4 * side**2)))
    plain.a, plain.b = first, nn.Linear(4 * side**2, 5)
    assert gzoo.check(with_random_statistics(gzoo.convert(plain, "p4")).eval(), 4 * side).worst < 1e-12


def test_sums_of_flattened_maps_and_functions_of_them():
    class Twice(Lenet):
        def __init__(self):
            super().__init__(None)
            self.conv3 = nn.Conv2d(6, 16, 5)

        def forward(self, x):
            y = self.pool(self.conv1(x).relu())
            rows = [F.max_pool2d(conv(y), 2).flatten(1) for conv in (self.conv2, self.conv3)]
            return self.fc2(self.fc1(F.normalize(rows[0] + rows[1].relu(), dim=1)).relu())

    plain = Twice()
    assert gzoo.check(with_random_statistics(gzoo.convert(plain, "p4m")).eval(), 24).worst < 1e-12
    with pytest.raises(ValueError, match="norm, softmax or product over channels, which is the same for all poses"):
        gzoo.convert(plain, "p4m", weights="transfer")


def test_timms_classifier_of_a_flattened_map_is_refused():
    class Timm(Lenet):
        num_classes = 10

        def get_classifier(self):
            return self.fc1

        def forward(self, x):
            return self.fc1(F.max_pool2d(self.conv2(self.pool(self.conv1(x).relu())).relu(), 2).flatten(1))

    model = Timm(None)
    del model.fc2
    with pytest.raises(ValueError, match=r"^fc1: it makes logits of a flattened map, and timm's calls"):
        gzoo.convert(model, "p4")


def test_another_size_of_image_is_refused_by_a_network_that_flattens():
    model = gzoo.convert(Lenet(FLAT["flatten"]), "p4m")
    with pytest.raises(ValueError, match="4x4 pixels has"):
        model(torch.rand(1, 1, 32, 32))


@pytest.mark.parametrize("group", [*GRID_GROUPS, "c8", "d3"])
@pytest.mark.parametrize("side", [1, 4, 5])
def test_the_layer_itself_is_equivariant(group, side):
    G = groups.get(group)
    layer = GroupMapLinear(G, 3, 4, side).double()
    layer.bias.data.normal_()
    flat = nn.Sequential(nn.Flatten(), layer)
    x = random_fields(group, 3, (side, side))
    y = flat(x)
    assert y.shape == (2, 4 * G.order)
    for g in G.grid_elements:
        assert flat(G.transform_features(x, g)).allclose(G.transform_features(y, g), atol=1e-12)


def test_the_layer_is_the_group_convolution_of_the_map():
    layer = GroupMapLinear(groups.get("p4"), 2, 3, 5)
    twin = GroupConv2d(groups.get("p4"), 2, 3, 5)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 8, 5, 5)
    assert layer(x.flatten(1)).equal(twin(x).flatten(1))


# --- a vector as a map ------------------------------------------------------------------------------------------------


class Autoencoder(nn.Module):
    def __init__(self, unflatten, bias=True):
        super().__init__()
        self.unflatten = unflatten
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, 8, 4, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 4, 2, 1), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(16 * 9, 8), nn.Tanh(), nn.Linear(8, 16 * 9, bias), nn.BatchNorm1d(16 * 9), nn.ReLU()),
        )
        self.decoder = nn.Sequential(nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 1, 4, 2, 1))
        self.pretrained_cfg = {"input_size": (1, 12, 12)}

    def forward(self, x):
        return self.decoder(self.unflatten(self.encoder(x)))


UNFLAT = {
    "view": lambda x: x.view(-1, 16, 3, 3),
    "view by rows": lambda x: x.view(x.size(0), 16, 3, 3),
    "reshape": lambda x: torch.reshape(x, (len(x), 16, 3, 3)),
    "any number of channels": lambda x: x.view(len(x), -1, 3, 3),
    "unflatten": lambda x: x.unflatten(1, (16, 3, 3)),
    "unflatten by names": lambda x: x.unflatten(dim=1, sizes=(16, 3, 3)),
    "a module": nn.Unflatten(1, (16, 3, 3)),
    "a module, from the end": nn.Unflatten(-1, (16, 3, 3)),
    "a map of one pixel before": lambda x: x.view(-1, 144, 1, 1).flatten(1).view(-1, 16, 3, 3),
}


@pytest.mark.parametrize("unflatten", UNFLAT)
def test_a_decoder_turns_with_the_image(unflatten):
    model = gzoo.convert(Autoencoder(UNFLAT[unflatten]), "p4m")
    assert isinstance(model.encoder[7], GroupVectorMap)
    model = with_random_statistics(model).eval()
    assert worst_error(model, "p4m", random_image(1, (12, 12)), "image", "image") < 1e-11
    assert gzoo.check(model, 12).worst < 1e-12


def test_a_vector_becomes_a_map_as_large_as_another():
    def run(self, x):
        y = F.relu(self.first(x))
        return self.last(self.up(F.relu(self.down(y.flatten(1)))).view_as(y))

    plain = Network(run)
    plain.first, plain.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
    plain.down, plain.up = nn.Linear(16 * 64, 32), nn.Linear(32, 16 * 64)
    plain.pretrained_cfg = {"input_size": (3, 8, 8)}
    model = with_random_statistics(gzoo.convert(plain, "p4m")).eval()
    assert worst_error(model, "p4m", random_image(3, (8, 8)), "image", "image") < 1e-12


@pytest.mark.parametrize("weights", [None, "transfer", "project"])
@pytest.mark.parametrize(("group", "bias"), [*((group, True) for group in GRID_GROUPS), ("p4m", False)])
def test_an_autoencoder_takes_plain_weights_over(group, weights, bias):
    plain = with_random_statistics(Autoencoder(UNFLAT["view"], bias)).eval()
    x, own = random_image(1, (12, 12)), groups.get(group)
    model = gzoo.convert(plain, group, weights=weights).double()
    if weights == "transfer":
        poses = [plain(own.transform_image(x, g)) for g in range(own.order)]
        mean = sum(own.transform_image(y, own.inverse(g)) for g, y in enumerate(poses)) / own.order
        torch.testing.assert_close(model.eval()(x), mean)
    elif weights is None:
        ratio = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in plain.parameters())
        assert 0.9 < ratio < 1.1
        assert plan(plain, groups.chain(group)).total().params == sum(p.numel() for p in model.parameters())
    model = with_random_statistics(model)
    assert worst_error(model.eval(), group, x, "image", "image") < 1e-11
    assert worst_error(model.train(), group, torch.cat((x, x.sin())), "image", "image") < 1e-11


def test_a_decoder_takes_back_the_filters_of_an_equivariant_network_that_was_made_plain():
    plain = with_random_statistics(Autoencoder(UNFLAT["view"])).float()
    first = gzoo.convert(plain, "p4m", weights="project").encoder[7]
    with torch.no_grad():
        plain.encoder[7].weight.copy_(first.kernels.filter().flatten(1).T)
        plain.encoder[7].bias.copy_(first(torch.zeros(1, 8))[0])
    again = gzoo.convert(plain, "p4m", weights="project").encoder[7]
    assert again.kernels.weight.allclose(first.kernels.weight, atol=1e-6)
    assert again.offset.weight.allclose(first.offset.weight, atol=1e-6)


def test_the_code_of_a_variational_autoencoder_is_fields():
    class Variational(Autoencoder):
        def __init__(self):
            super().__init__(None)
            self.before, self.mean, self.scale = self.encoder[:5], self.encoder[5], nn.Linear(144, 8)
            self.after = self.encoder[7]

        def forward(self, x):
            y = self.before(x)
            mean, scale = self.mean(y), self.scale(y)
            code = mean + torch.randn_like(mean) * scale.exp() if self.training else mean
            return self.decoder(self.after(code).view(-1, 16, 3, 3)), mean, scale

    with pytest.raises(ValueError, match=r"as in classifier=\['decoder.2', 'scale'\]"):  # none that another reads
        gzoo.convert(Variational(), "p4")
    with pytest.warns(UserWarning, match=r"encoder\.8"):  # which it leaves out
        model = gzoo.convert(Variational(), "p4", classifier="decoder.2")
    probe, x, group = with_random_statistics(model).eval(), random_image(1, (12, 12)), groups.get("p4")
    for found, y in zip(probe(x.rot90(1, (2, 3))), probe(x), strict=True):
        assert relative_error(found, y.rot90(1, (2, 3)) if y.ndim == 4 else group.transform_features(y, 1)) < 1e-11
    assert model.train()(torch.randn(2, 1, 12, 12))[0].shape == (2, 1, 12, 12)


def test_a_map_of_a_flattened_map_is_refused():
    plain = Network(lambda self, x: self.c(self.b(self.a(x).flatten(1)).view(-1, 4, 6, 6)))
    plain.a, plain.b, plain.c = nn.Conv2d(1, 4, 3), nn.Linear(4 * 36, 4 * 36), nn.Conv2d(4, 2, 1)
    plain.pretrained_cfg = {"input_size": (1, 8, 8)}
    with pytest.raises(ValueError, match="b: it makes a map of a flattened map; put a vector between"):
        gzoo.convert(plain, "p4")


MATRICES = {
    "sums": lambda y: y.view(-1, 4, 3, 3).logsumexp((2, 3)),
    "norms": lambda y: y.view(-1, 4, 3, 3).norm(dim=(2, 3)),
    "rows again": lambda y: y.view(-1, 4, 3, 3).flatten(1),
}


@pytest.mark.parametrize("function", MATRICES)
def test_matrices_of_logits_which_no_layer_reads_are_no_maps(function):
    plain = Network(lambda self, x: MATRICES[function](self.b(self.a(x).relu().mean((2, 3)))))
    plain.a, plain.b = nn.Conv2d(1, 8, 3), nn.Linear(8, 36)
    model = with_random_statistics(gzoo.convert(plain, "p4", classifier="b")).eval()
    assert worst_error(model, "p4", random_image(1, (9, 9)), "image", "invariant") < 1e-12


@pytest.mark.parametrize("shape", [(4, 3, 3), (3, 3, 4)])
def test_a_map_that_a_linear_layer_makes_last_is_said_not_to_turn(shape):
    plain = Network(lambda self, x: self.b(self.a(x).relu().mean((2, 3))).view(-1, *shape).sigmoid())
    plain.a, plain.b = nn.Conv2d(1, 8, 3), nn.Linear(8, 36)
    with pytest.warns(UserWarning, match="b of Network: .* stays as it is when the image turns"):
        gzoo.convert(plain, "p4", classifier="b")


def test_a_vector_that_was_made_a_map_is_read_as_a_flattened_map():
    def run(self, x):
        code = self.c(self.b(self.a(x).relu().mean((2, 3))).relu())
        return self.e(code.view(-1, 4, 3, 3)), self.d(code)

    plain = Network(run)
    plain.a, plain.b, plain.e = nn.Conv2d(1, 8, 3), nn.Linear(8, 8), nn.ConvTranspose2d(4, 1, 4, 4)
    plain.c, plain.d = nn.Linear(8, 36), nn.Linear(36, 5)
    model = with_random_statistics(gzoo.convert(plain, "p4m", classifier=["e", "d"])).eval()
    assert gzoo.check(model, 12).worst < 1e-12


BETWEEN = {"PReLU": nn.PReLU(36), "LayerNorm": nn.LayerNorm(36), "GroupNorm": nn.GroupNorm(4, 36)}


@pytest.mark.parametrize("between", BETWEEN)
def test_what_holds_numbers_for_pixels_of_a_flattened_map_is_named(between):
    plain = Network(lambda self, x: self.e(self.norm(self.b(self.a(x).relu().mean((2, 3)))).view(-1, 4, 3, 3)))
    plain.a, plain.b, plain.e = nn.Conv2d(1, 8, 3), nn.Linear(8, 36), nn.ConvTranspose2d(4, 1, 4, 4)
    plain.norm = BETWEEN[between]
    with pytest.raises(ValueError, match=f"norm: a {between} of a flattened map holds numbers that a turn"):
        gzoo.convert(plain, "p4")


CODES = {
    "a sum of two": lambda self, x: (self.c(x) + self.d(x)).view(-1, 4, 3, 3),
    "twice the same": lambda self, x: self.c(x).view(-1, 4, 3, 3) + self.c(x.tanh()).relu().view(-1, 4, 3, 3),
    "a map again": lambda self, x: self.c(x).view(-1, 4, 3, 3).flatten(1).tanh().view(-1, 4, 3, 3),
}


@pytest.mark.parametrize("code", CODES)
def test_maps_are_made_of_vectors_in_several_ways(code):
    plain = Network(lambda self, x: self.e(CODES[code](self, self.b(self.a(x).relu().mean((2, 3))).relu())))
    plain.a, plain.b, plain.e = nn.Conv2d(1, 8, 3), nn.Linear(8, 8), nn.ConvTranspose2d(4, 1, 4, 4)
    plain.c, plain.d = nn.Linear(8, 36), nn.Linear(8, 36)
    if code != "a sum of two":
        del plain.d
    model = with_random_statistics(gzoo.convert(plain, "p4m")).eval()
    assert worst_error(model, "p4m", random_image(1, (12, 12)), "image", "image") < 1e-11


def test_a_decoder_compiles_exports_and_goes_to_escnn():
    model, x = gzoo.convert(Autoencoder(UNFLAT["view"]), "p4").eval(), torch.randn(2, 1, 12, 12)
    y = model(x)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), y)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), y)
    torch.testing.assert_close(gzoo.to_escnn(model)(x), y)


# --- what networks do besides -------------------------------------------------------------------------------------


def model_with_functions():
    return with_random_statistics(gzoo.convert(Steps(STEPS_OF_A_CLASS), "p4m")).eval()


def STEPS_OF_A_CLASS(y):
    """Can be pickled."""
    return F.interpolate(F.max_pool2d(y, 3, 2), size=(9, 9))[:, :, ::2, ::2]


def test_it_is_copied_and_pickled():
    model, x = model_with_functions(), random_image(3, (17, 17))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False), copy.copy(model)):
        assert isinstance(twin, SymmetricForward)
        assert isinstance(twin, Steps)
        assert twin(x).equal(model(x))
        assert gzoo.check(twin, 18).worst < 1e-12


def test_it_compiles_and_exports():
    model, x = model_with_functions().float(), torch.randn(2, 3, 17, 17)
    y = model(x)
    assert torch.compile(model, backend="eager", fullgraph=True)(x).allclose(y, atol=1e-5)
    assert torch.export.export(model, (x,)).module()(x).allclose(y, atol=1e-5)


def dynamic(y):
    return F.interpolate(F.max_pool2d(y, 2), size=y.shape[2:])[:, :, ::2, ::2]


def test_it_exports_for_images_of_any_size():
    model = with_random_statistics(gzoo.convert(Steps(dynamic), "p4m")).float().eval()
    shapes = ({2: 8 * torch.export.Dim("height"), 3: 8 * torch.export.Dim("width")},)
    program = torch.export.export(model, (torch.randn(2, 3, 48, 48),), dynamic_shapes=shapes)
    x = torch.randn(2, 3, 64, 80)
    assert program.module()(x).allclose(model(x), atol=1e-5)


def functions_and_a_flattened_map():
    return Lenet(lambda x: F.pad(x[:, :, ::2, ::2], (0, 2, 0, 2)).view(-1, 256))


def test_it_goes_to_escnn_and_back():
    model, x = (
        with_random_statistics(gzoo.convert(functions_and_a_flattened_map(), "p4")).eval(),
        random_image(1, (24, 24)),
    )
    twin = gzoo.to_escnn(model)
    assert twin(x).allclose(model(x), atol=1e-5)
    assert gzoo.from_escnn(twin)(x).allclose(model(x), atol=1e-5)


@pytest.mark.parametrize("options", [{"partial": True}, {"soft": True}], ids=str)
def test_it_can_be_partial_or_soft(options):
    model = gzoo.convert(functions_and_a_flattened_map(), "p4", **options)
    assert gzoo.check(model, 24).worst < 1e-12
    if "partial" in options:
        for _, subset in gzoo.partial.subsets(model):
            subset.keep([0, 2])
        assert gzoo.check(model, 24).worst < 1e-12
        assert gzoo.partial.symmetry(model) == (0, 2)


def test_it_grows():
    small, large = (
        gzoo.convert(functions_and_a_flattened_map(), group, match="width").eval() for group in ("c2", "p4")
    )
    gzoo.grow(large, small)
    x = torch.randn(2, 1, 24, 24)
    logits = [logits_of(small, x.rot90(r, (2, 3))) for r in (0, 1)]
    assert logits_of(large, x).allclose(sum(logits) / 2, atol=1e-5)


def logits_of(model, x):
    """Before the softmax."""
    found = []
    with model.fc2.register_forward_hook(lambda module, inputs, y: found.append(y)):
        model(x)
    return found[0]


class Block(nn.Module):
    """A stage that starts with a shortcut of zeros, and ends with a pool."""

    def __init__(self, width, more):
        super().__init__()
        self.conv, self.more = nn.Conv2d(width, width + more, 3, padding=1), more

    def forward(self, x):
        return F.max_pool2d((self.conv(x) + F.pad(x, (0, 0, 0, 0, self.more, 0))).relu(), 2)


def test_stages_have_groups_of_their_own():
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), Block(8, 4), Block(12, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plain.append(nn.Linear(16, 5))
    plain.feature_info = [{"module": f"{i}", "num_chs": 4 + 8 * i, "reduction": 2**i} for i in (1, 2)]
    model = with_random_statistics(gzoo.convert(plain, "p4m:p4")).eval()
    for size in SIZES:
        report = gzoo.check(model, size)
        assert report.worst < 1e-12
        assert max(report.given_up.values()) > 1e-6


def test_the_plain_network_stays_as_it_is():
    plain = Steps(STEPS_OF_A_CLASS)
    gzoo.convert(plain, "p4m")
    assert type(plain) is Steps


def test_what_never_runs_is_left_out_with_a_warning_and_refuses_to_run():
    plain = Steps(lambda y: y)
    plain.spare, plain.more = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Linear(3, 4)
    with pytest.warns(
        UserWarning, match=r"they run on no image, neither in evaluation nor in training: more, spare\.0"
    ):
        model = gzoo.convert(plain, "p4m")
    with pytest.raises(ValueError, match=r"spare\.0 ran on no image when the network was converted"):
        model.spare(torch.rand(1, 3, 9, 9))
    with pytest.warns(UserWarning, match="spare"):
        gzoo.convert(plain, "p4m", weights="transfer")


class Targets(Steps):
    """An auxiliary head that runs in training alone, when there are labels."""

    def __init__(self):
        super().__init__(lambda y: y)
        self.aux = nn.Linear(8, 5)

    def forward(self, x, target=None):
        y = self.second(self.first(x).relu()).mean((2, 3))
        if self.training:
            return F.cross_entropy(self.head(y), target) + F.cross_entropy(self.aux(y), target)
        return self.head(y)


def test_what_may_run_in_training_with_labels_is_not_left_out():
    with pytest.raises(ValueError, match=r"^aux: it has weights, but runs on an image neither"):
        gzoo.convert(Targets(), "p4m")


def test_a_module_whose_weights_another_one_uses_is_not_left_out():
    plain = Bare()
    with pytest.raises(ValueError, match=r"^bare: it has weights"):
        gzoo.convert(plain, "p4m")


class Bare(Steps):
    def __init__(self):
        super().__init__(None)
        self.bare = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        return self.head(self.second(F.conv2d(self.first(x), self.bare.weight, padding=1)).mean((2, 3)))


@pytest.mark.parametrize("side", [32, 28])
def test_a_network_for_small_images_need_not_say_so(side):
    plain = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(4 * ((side - 2) // 4) ** 2, 3)
    )
    assert gzoo.check(gzoo.convert(plain, "p4m"), side).worst < 1e-12
