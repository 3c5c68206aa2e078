"""Every model of the zoo is exact at every size; the plain backbones have the sizes of their papers."""

import pytest
import torch

import gzoo
from gzoo import backbones
from gzoo.check import relative_error
from gzoo.registry import ENTRIES
from tests.conftest import core_entries, shallow, with_random_statistics

# Deep or wide: one small image each, not square, odd after the first stride. The others: odd, and even but not square.
SLOW = ("resnet26_cifar", "wrn16_8", "resnet18", "resnet50", "unet")
SIZES = {
    "cnn6": (28, 33, (24, 27)),
    "cnn7": (28, 31, (33, 36)),
    "cnn13": ((13, 16),),
    "convnext_atto": (33, (36, 49)),
    **dict.fromkeys(SLOW, ((9, 12),)),
}

BY_NAME = {entry.name: entry for entry in ENTRIES}
EQUIVARIANT = [entry for entry in core_entries() if entry.group]


def sizes(entry):
    return SIZES.get(entry.backbone, (17, (12, 20)))


@pytest.fixture(scope="module")
def model(request):
    """The network of an entry in float64 with random norms and biases, timm's with a block a stage, built once."""
    torch.manual_seed(0)
    return with_random_statistics(request.param.build(**shallow(request.param.name))).eval()


def one_of_the_sizes(i):
    """Of entry i: odd and oblong in turn."""
    return sizes(EQUIVARIANT[i])[i % len(sizes(EQUIVARIANT[i]))]


CASES = [
    pytest.param(entry, one_of_the_sizes(i), id=f"{entry.name}-{one_of_the_sizes(i)}")
    for i, entry in enumerate(EQUIVARIANT)
]


@pytest.mark.parametrize(("model", "size"), CASES, indirect=["model"])
def test_every_entry_is_exact_in_float64(model, size):
    assert gzoo.check(model, size).worst < 1e-12


@pytest.mark.parametrize(
    ("model", "size"),
    [
        pytest.param(BY_NAME[name], sizes(BY_NAME[name])[-1], id=name)
        for name in ("c8_cnn7", "p4m_resnet44", "p4m_convnext_atto")
    ],
    indirect=["model"],
)
def test_an_entry_is_exact_to_rounding_in_float32(model, size):
    assert gzoo.check(model, size, dtype=torch.float32).worst < 1e-5


@pytest.mark.parametrize("name", ["resnet20", "allcnnc", "cnn7"])
def test_the_plain_entries_are_not_equivariant(name):
    model = with_random_statistics(BY_NAME[name].build()).eval()
    assert gzoo.check(model, sizes(BY_NAME[name])[-1], group=gzoo.groups.get("p4m")).worst > 0.1


def millions(name):
    """Learned numbers of an entry; group_signature and running statistics are not learned."""
    return sum(parameter.numel() for parameter in BY_NAME[name].build().parameters()) / 1e6


@pytest.mark.parametrize(
    ("name", "paper"),
    [
        ("resnet44", 2.64),
        ("p4m_resnet44", 2.62),
        ("resnet26_cifar", 7.24),
        ("p4m_resnet26_cifar", 7.17),
        ("cnn13", 3.1),
        ("allcnnc", 1.37),
        ("p4_allcnnc", 1.37),
        ("p4m_allcnnc", 1.22),
        ("cnn7", 0.025),
        ("p4_cnn7", 0.025),
    ],
)
def test_parameter_counts_are_those_of_the_paper(name, paper):
    assert abs(millions(name) / paper - 1) < 0.02


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("p4m_resnet44", (11, 23, 45)),
        ("p4m_resnet26_cifar", (25, 50, 100)),
        ("p4_allcnnc", (48, 96, 96)),
        ("p4m_allcnnc", (32, 64, 64)),
        ("p4_cnn7", (10, 10)),
        ("c16_sfcnn", (64, 96)),  # of Weiler & Cesa
    ],
)
def test_widths_are_those_of_the_paper(name, fields):
    model = BY_NAME[name].build()
    assert tuple(level["num_chs"] // model.group.order for level in model.feature_info) == fields


@pytest.mark.parametrize(("depth", "width"), [(20, 32), (32, 32), (44, 32), (56, 32), (110, 32), (26, 71), (20, 16)])
def test_a_cifar_resnet_has_6n_plus_2_layers_of_three_widths(depth, width):
    model = backbones.resnet_cifar(depth, base_width=width)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == depth
    assert [level["num_chs"] for level in model.feature_info] == [width, 2 * width, 4 * width]


@pytest.mark.parametrize(("depth", "factor", "paper"), [(16, 8, 11.0), (28, 10, 36.5), (40, 4, 8.9)])
def test_wide_resnets_have_the_parameters_of_their_paper(depth, factor, paper):
    with torch.device("meta"):
        model = backbones.wide_resnet(depth, factor)
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 / paper - 1) < 0.01
    assert [level["num_chs"] for level in model.feature_info] == [16 * factor, 32 * factor, 64 * factor]


def test_a_depth_that_is_not_6n_plus_4_is_refused():
    with pytest.raises(ValueError, match=r"depth is 18; a wide ResNet has 6n \+ 4 layers: 10, 16"):
        backbones.wide_resnet(18, 2)


def test_sfcnn_has_the_fields_of_weiler_and_cesa():
    fields = [layer.out_fields for layer in BY_NAME["c16_sfcnn"].build().modules() if hasattr(layer, "out_fields")]
    assert fields == [24, 32, 36, 36, 64, 96]


def test_its_sister_restricts_before_the_last_layer():
    restricted = BY_NAME["d16c16_cnn6"].build()
    groups = [layer.group.name for layer in restricted.modules() if hasattr(layer, "out_fields")]
    assert groups == 5 * ["d16"] + ["c16"]


def test_cnn6_of_width_16_has_the_fields_of_weiler_and_cesa_as_channels():
    widths = [m.out_channels for m in backbones.cnn6(base_width=16).modules() if isinstance(m, torch.nn.Conv2d)]
    assert widths == [16, 24, 32, 32, 48, 64]


@pytest.mark.parametrize(("network", "width", "multiple"), [(backbones.sfcnn, 20, 6), (backbones.cnn6, 15, 2)])
def test_a_base_width_that_the_layers_do_not_divide_is_refused(network, width, multiple):
    with pytest.raises(ValueError, match=rf"base_width is {width}; .* give a multiple of {multiple}"):
        network(base_width=width)


def test_base_width_16_gives_the_resnet_20_of_he():
    model = backbones.resnet_cifar(20, base_width=16)
    assert abs(sum(p.numel() for p in model.parameters()) / 0.27e6 - 1) < 0.02


@pytest.mark.parametrize("depth", [2, 18, 19, 60])
def test_a_depth_that_is_not_6n_plus_2_is_refused(depth):
    with pytest.raises(ValueError, match=f"depth is {depth}; a CIFAR ResNet has 6n \\+ 2 layers: 8, 14, 20"):
        backbones.resnet_cifar(depth)


SMALL = {
    "resnet_cifar": lambda **kwargs: backbones.resnet_cifar(8, base_width=4, **kwargs),
    "allcnnc": backbones.allcnnc,
    "cnn7": backbones.cnn7,
}


@pytest.fixture(params=SMALL)
def build(request):
    return SMALL[request.param]


def test_a_backbone_takes_any_number_of_channels_and_classes(build):
    assert build(in_chans=4, num_classes=7)(torch.zeros(2, 4, 32, 32)).shape == (2, 7)


def test_features_and_head_make_the_whole_network(build):
    model = build(in_chans=3).eval()
    x = torch.randn(1, 3, 32, 32)
    assert relative_error(model.forward_head(model.forward_features(x)), model(x)) < 1e-6


def test_intermediates_are_the_maps_that_feature_info_says(build):
    model = build(in_chans=3).eval()
    last, maps = model.forward_intermediates(torch.randn(1, 3, 32, 32))
    assert [m.shape[1] for m in maps] == [level["num_chs"] for level in model.feature_info]
    assert last is maps[-1]
    (only,) = model.forward_intermediates(
        torch.randn(1, 3, 32, 32), indices=[0], intermediates_only=True, stop_early=True
    )
    assert only.shape == maps[0].shape


@pytest.mark.parametrize("name", ["resnet_cifar", "allcnnc"])
def test_maps_shrink_by_the_reduction_that_feature_info_says(name):
    model = SMALL[name](in_chans=3).eval()
    maps = model.forward_intermediates(torch.randn(1, 3, 32, 32), intermediates_only=True)
    assert [32 // m.shape[-1] for m in maps] == [level["reduction"] for level in model.feature_info]


def test_other_output_formats_than_nchw_are_refused(build):
    with pytest.raises(ValueError, match="output_fmt is 'NLC'; a CNN has 'NCHW' only"):
        build().forward_intermediates(torch.zeros(1, 3, 32, 32), output_fmt="NLC")


def test_a_reset_classifier_has_the_new_classes(build):
    model = build(in_chans=3).eval()
    model.reset_classifier(4)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
    model.reset_classifier(0)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, model.num_features)


def test_pruned_layers_leave_the_first_maps_as_they_were(build):
    model, x = build(in_chans=3).eval(), torch.randn(1, 3, 32, 32)
    before = model.forward_intermediates(x, indices=[0], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([0]) == [0]
    assert model(x).equal(before)


def test_gradient_checkpointing_changes_no_gradient():
    model, x = SMALL["resnet_cifar"]().eval(), torch.randn(2, 3, 16, 16)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        gradients.append(torch.autograd.grad(model(x).square().sum(), model.stem[0].weight)[0])
    assert relative_error(*gradients) < 1e-5


def test_drop_path_grows_with_depth():
    model = backbones.resnet_cifar(20, drop_path_rate=0.8)
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.8)


def test_an_image_smaller_than_cnn7_is_an_error_that_asks_for_a_larger_one():
    model = BY_NAME["p4_cnn7"].build()
    with pytest.raises(ValueError, match=r"too small for a window of .* give the network a larger image"):
        model(torch.zeros(1, 1, 20, 20))
