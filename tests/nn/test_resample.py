"""The symmetric resampling rule: exact at every size, the output size of the plain operation, and no other change."""

import copy
import itertools
import runpy
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from torch import nn

from gzoo import _escnn, groups
from gzoo.backbones import resnet_cifar
from gzoo.convert import convert_in_place
from gzoo.nn import LiftingConv2d, SymmetricBlur2d, SymmetricPool2d, SymmetricUnpool2d, keep_original_strides
from gzoo.nn.resample import Window, resample, square
from tests.conftest import GRID_GROUPS, random_fields, random_image, worst_error

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
POOLS = {
    "max 2": lambda: nn.MaxPool2d(2),
    "max 3/2 padded": lambda: nn.MaxPool2d(3, 2, 1),
    "max 3/2": lambda: nn.MaxPool2d(3, 2),
    "max 3/2 ceil": lambda: nn.MaxPool2d(3, 2, ceil_mode=True),
    "max 3/1 padded": lambda: nn.MaxPool2d(3, 1, 1),
    "max 2/2 dilated": lambda: nn.MaxPool2d(2, 2, dilation=2),
    "avg 2": lambda: nn.AvgPool2d(2),
    "avg 2 ceil": lambda: nn.AvgPool2d(2, ceil_mode=True),
    "avg 3/2 padded": lambda: nn.AvgPool2d(3, 2, 1),
    "avg 3/2 ceil, padding not counted": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "avg 4/3": lambda: nn.AvgPool2d(4, 3),
}
SIZES = [(7, 7), (8, 8), (9, 9), (10, 10), (6, 11)]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("group", GRID_GROUPS)
def test_pools_and_their_gradients_commute_with_the_group_at_every_size(group, pool):
    layer = SymmetricPool2d(POOLS[pool]())
    for size in SIZES:
        assert worst_error(layer, group, random_fields(group, 2, size)) < 1e-12


class PutBack(nn.Module):
    """Maxima at the pixels that they are from, of a map as it is behind a ReLU."""

    def __init__(self, kernel, ceil_mode=False, with_size=True):
        super().__init__()
        self.pool = SymmetricPool2d(nn.MaxPool2d(kernel, return_indices=True, ceil_mode=ceil_mode))
        self.unpool, self.with_size = SymmetricUnpool2d(nn.MaxUnpool2d(kernel)), with_size

    def forward(self, x):
        y, shares = self.pool(x.relu())
        # Other numbers than the maxima: those of a window of zeros have a place, too.
        return self.unpool(y + 1, shares, x.shape if self.with_size else None)


@pytest.mark.parametrize(("kernel", "ceil_mode", "with_size"), [(2, False, True), (2, True, True), (3, False, False)])
@pytest.mark.parametrize("group", GRID_GROUPS)
def test_maxima_return_to_their_pixels_and_equal_ones_share_them(group, kernel, ceil_mode, with_size):
    layer = PutBack(kernel, ceil_mode, with_size)
    for size in SIZES:
        assert worst_error(layer, group, random_fields(group, 2, size)) < 1e-12


def test_where_no_maxima_are_equal_they_return_as_torchs_do():
    x = random_image(3, (9, 12))
    y, shares = SymmetricPool2d(nn.MaxPool2d(3, return_indices=True))(x)
    expected = F.max_unpool2d(y + 1, F.max_pool2d(x, 3, return_indices=True)[1], 3)
    assert torch.equal(SymmetricUnpool2d(nn.MaxUnpool2d(3))(y + 1, shares), expected)


@pytest.mark.parametrize("options", [(3, 2), (2, 2, 1), (2, 3)])
def test_maxima_of_windows_that_do_not_lie_side_by_side_have_no_place_to_return_to(options):
    with pytest.raises(ValueError, match="overlap or leave pixels out"):
        SymmetricUnpool2d(nn.MaxUnpool2d(*options))
    with pytest.raises(ValueError, match="overlap or leave pixels out"):
        SymmetricPool2d(nn.MaxPool2d(*options, return_indices=True))


@pytest.mark.parametrize("pool", ["max 2", "avg 2 ceil", "avg 4/3"])
def test_a_plain_pool_is_broken_where_its_windows_do_not_fit(pool):
    assert worst_error(POOLS[pool](), "p4", random_image(4, (9, 9)), "image") > 0.1


@pytest.mark.parametrize("pool", POOLS)
def test_output_sizes_are_those_of_the_plain_pool(pool):
    plain = POOLS[pool]()
    for n in range(5, 21):
        x = random_image(1, (n, 20))
        assert SymmetricPool2d(plain)(x).shape == plain(x).shape


def test_output_sizes_are_torchs_for_every_window():
    for kernel, stride, padding, dilation, ceil in itertools.product(
        range(1, 6), range(1, 4), range(3), (1, 2), (False, True)
    ):
        if 2 * padding > kernel:
            continue
        window = Window(kernel, stride, 2 * padding, dilation, ceil)
        plain = nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil)
        for n in range(max(5, window.extent), 21):
            assert window.output_size(n) == plain(torch.zeros(1, n, n)).shape[-1], (window, n)


@pytest.mark.parametrize("pool", POOLS)
def test_where_the_windows_fit_nothing_is_resampled(pool):
    plain = POOLS[pool]()
    layer = SymmetricPool2d(plain)
    window = layer.window
    n = 3 * window.stride + window.extent - window.padding
    x = random_image(2, (n, n))
    assert resample(x, window)[0] is x
    assert layer(x).equal(plain(x))


@pytest.mark.parametrize("group", ["p4", "p4m"])
@pytest.mark.parametrize("name", ["max", "avg"])
def test_pools_are_escnns_where_the_windows_fit(group, name):
    G, escnn = groups.get(group), _escnn.load()
    x = random_fields(group, 2, (9, 9)).float()
    if name == "max":
        theirs = escnn.nn.PointwiseMaxPool2D(G.field_type(2), 3, 2, 1)
        ours = SymmetricPool2d(nn.MaxPool2d(3, 2, 1))
    else:
        theirs = escnn.nn.PointwiseAvgPool2D(G.field_type(2), 3, 2, 1)
        ours = SymmetricPool2d(nn.AvgPool2d(3, 2, 1))
    assert torch.allclose(ours(x), theirs(escnn.nn.GeometricTensor(x, G.field_type(2))).tensor, atol=1e-5)


windows = st.builds(
    Window,
    kernel=st.integers(1, 6),
    stride=st.integers(1, 4),
    padding=st.integers(0, 6),
    dilation=st.integers(1, 3),
    symmetric=st.just(True),
)


@given(windows, st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_after_the_rule_windows_cover_both_ends_alike(window, height, width):
    assume(window.padding <= window.extent)
    sizes = window.output_size(height), window.output_size(width)
    assume(min(sizes) >= 1)
    x = torch.zeros(1, 1, height, width)
    try:
        y, padding, stride = resample(x, window)
    except ValueError:
        # Only a window that is all padding at its single place has no size: the plain operation sees half of it.
        assert window.padding >= window.extent - 1
        assert min(sizes) == 1
        return
    assert padding in (window.padding // 2, (window.padding + 1) // 2)
    for n, count in zip(y.shape[-2:], sizes, strict=True):
        room = n + 2 * padding - window.extent
        assert room % stride == 0
        assert room // stride + 1 == count


@given(windows, st.integers(1, 24), st.integers(1, 24), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_the_rule_commutes_with_turns_and_flips(window, height, width, seed):
    assume(window.padding < window.extent - 1 or window.padding == 0)
    assume(min(window.output_size(height), window.output_size(width)) >= 1)
    x = torch.randn(1, 1, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    y = resample(x, window)[0]
    assert torch.allclose(resample(x.rot90(1, (2, 3)), window)[0], y.rot90(1, (2, 3)), atol=1e-13)
    assert torch.allclose(resample(x.flip(3), window)[0], y.flip(3), atol=1e-13)


def test_the_rule_shrinks_by_less_than_a_stride():
    for window in (Window(2, 2, 0), Window(3, 2, 2), Window(4, 3, 0)):
        for n in range(4, 30):
            size = resample(torch.zeros(1, 1, n, n), window)[0].shape[-1]
            assert n - window.stride < size <= n


def between(size: int, positions: torch.Tensor) -> torch.Tensor:
    """The matrix of linear interpolation from ``size`` pixels to positions, the border going on."""
    distance = (positions.clamp(0, size - 1).unsqueeze(1) - torch.arange(size)).abs()
    return (1 - distance).clamp(min=0)


@pytest.mark.parametrize("window", [Window(1, 2, 0), Window(1, 3, 0), Window(1, 4, 0), Window(2, 2, 0, 1, True)])
def test_windows_stand_in_the_middle_one_stride_apart(window):
    for n in range(5, 20):
        x = random_image(2, (n, n + 3))
        read, padding, stride = resample(x, window)
        matrices = []
        for size in x.shape[2:]:
            samples = (window.output_size(size) - 1) * window.stride + window.extent
            step = window.stride if window.extent == 1 else 1
            positions = (size - 1) / 2 + torch.arange(0, samples, step, dtype=torch.float64) - (samples - 1) / 2
            matrices.append(between(size, positions))
        assert torch.allclose(read, matrices[0] @ x @ matrices[1].T, atol=1e-14)
        assert (padding, stride) == (0, 1 if window.extent == 1 else window.stride)


def test_a_convolution_that_fits_once_in_bfloat16_has_its_whole_gradient():
    """torch leaves parts of it as they were in memory if the convolution has a stride."""
    conv = nn.Conv2d(128, 256, 3, stride=2, padding=1, bias=False).bfloat16()
    for _ in range(20):
        used = [torch.full((2**n,), float("nan")) for n in range(6, 23) for _ in range(2)]
        del used
        x, padding, stride = resample(torch.randn(1, 128, 2, 2).bfloat16(), Window(3, 2, 2))
        (gradient,) = torch.autograd.grad(F.conv2d(x, conv.weight, None, stride, padding).float().sum(), conv.weight)
        assert gradient.isfinite().all()


def test_a_map_smaller_than_the_window_is_refused():
    with pytest.raises(ValueError, match="a map of 2x7 pixels is too small for a window of 3 pixels with 0 pixels"):
        SymmetricPool2d(nn.MaxPool2d(3))(random_image(1, (2, 7)))


def test_a_window_that_sees_a_single_pixel_from_one_side_only_is_refused():
    assert F.max_pool2d(torch.zeros(1, 1, 1, 1), 2, 2, 1).shape[-1] == 1
    with pytest.raises(ValueError, match="a map of 1x1 pixels is too small for a window of 2 pixels with 2 pixels"):
        SymmetricPool2d(nn.MaxPool2d(2, 2, 1))(random_image(1, (1, 1)))


@pytest.mark.parametrize("options", [{"kernel_size": (2, 3)}, {"kernel_size": 2, "stride": (1, 2)}])
def test_a_pool_that_differs_between_the_axes_is_refused(options):
    with pytest.raises(ValueError, match="differs between the axes, which a quarter turn exchanges; use one value"):
        SymmetricPool2d(nn.MaxPool2d(**options))


def test_a_pair_of_equal_numbers_is_one_number():
    assert square((3, 3), "kernel_size") == square(3, "kernel_size") == 3


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 2), nn.MaxPool2d(1, 2)])
def test_original_strides_are_those_of_the_plain_operation(pool):
    convolution = LiftingConv2d(groups.get("p4"), 2, 1, 3, stride=2, padding=1)
    layers = nn.Sequential(convolution, SymmetricPool2d(pool))
    for size in (8, 9, 10, 11):
        x = torch.randn(1, 2, size, size)
        plain = pool(F.conv2d(x, convolution.filter(), convolution.bias.repeat_interleave(4), 2, 1))
        for module in (convolution, layers[1]):
            module.window = replace(module.window, symmetric=True)
        assert size % 2 or not layers(x).equal(plain)
        assert keep_original_strides(layers)(x).equal(plain)


def test_a_blur_is_a_depthwise_convolution_at_the_size_of_the_plain_one():
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=torch.float64) / 16
    blur = SymmetricBlur2d(kernel, 2, 1)
    for size in (7, 8, 9):
        x = random_fields("p4", 1, (size, size))
        plain = F.conv2d(x, kernel.expand(4, 1, 3, 3), None, 2, 1, groups=4)
        assert blur(x).shape == plain.shape
        assert blur(x).equal(plain) == (size % 2 == 1)
        assert worst_error(blur, "p4", x) < 1e-12


@pytest.mark.parametrize("group", ["c8", "d8"])
@pytest.mark.parametrize("size", [32, 48])
def test_turns_between_pixels_are_followed_better_than_with_the_strides_of_escnn(
    group: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)  # the script imports the one beside it
    turns = runpy.run_path(str(BENCHMARKS / "turns.py"))
    errors = []
    for seed in range(3):
        torch.manual_seed(seed)
        ours = convert_in_place(resnet_cifar(8, base_width=8), group).double().eval()
        theirs = keep_original_strides(copy.deepcopy(ours))
        errors += [turns["error"](model, turns["image"](size, seed)) for model in (ours, theirs)]
    assert 0.001 < sum(errors[::2]) < 0.7 * sum(errors[1::2])
