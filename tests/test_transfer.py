"""Plain weights in equivariant networks: the mean over the group at the start, and the nearest that are equivariant."""

import copy
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import GroupNormAct, ScaledStdConv2d
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.resnetv2 import ResNetV2
from timm.models.vgg import VGG
from torch import nn

import gzoo
from gzoo import groups
from gzoo.bases import expand
from gzoo.check import relative_error
from gzoo.convert import convert_in_place
from gzoo.nn import FibreNorm, GroupConv2d, InvariantLinear
from gzoo.nn.expand import ExpandedLayer
from gzoo.rules import RULES
from tests.conftest import Calling, Network, random_image, with_random_statistics


def resnet(**options):
    return timm.create_model("resnet18", num_classes=5, channels=(8, 8, 16, 16), stem_width=8, **options)


def convnext(name="convnext_atto", **options):
    return timm.create_model(name, num_classes=5, dims=(8, 8, 16, 16), depths=(1, 1, 2, 1), **options)


def mobilenet(kind):
    blocks = [["ds_r1_k3_s2_e1_c8_se0.25_nre"], ["ir_r2_k5_s2_e2_c8_se0.25"], ["cn_r1_k1_s1_c16"]]
    if kind is EfficientNet:
        blocks.pop()
    return kind(decode_arch_def(blocks), num_classes=5, num_features=16, stem_size=8)


def repvgg():
    blocks = tuple(ByoBlockCfg(type="rep", d=2, c=c, s=2) for c in (8, 16))
    return ByobNet(ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=8), num_classes=5)


def thin(name, **options):
    return lambda: timm.create_model(name, num_classes=5, **options)


def normalizer_free():  # timm's own average 2x2 windows beside 3x3 ones: symmetric at no size
    convs = ScaledStdConv2d(3, 8, 3, stride=2), nn.GELU(), ScaledStdConv2d(8, 16, 3, stride=2, groups=2), nn.GELU()
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def bit():
    norm = partial(GroupNormAct, num_groups=4)
    return ResNetV2((1, 1), (32, 64), num_classes=5, stem_chs=16, stem_type="fixed", norm_layer=norm)


# A thin network of each family, and a size at which its strides are symmetric.
FAMILIES = {
    "resnet": (resnet, 33),
    "resnet with ECA": (lambda: resnet(block_args={"attn_layer": "eca"}), 33),
    "resnet with group norm": (lambda: resnet(norm_layer="groupnorm1"), 33),
    "regnet": (thin("regnety_002", w0=8, wa=8.0, wm=1.5, group_size=4, depth=5), 33),
    "mobilenetv3": (lambda: mobilenet(MobileNetV3), 33),
    "efficientnet": (lambda: mobilenet(EfficientNet), 33),
    "convnext": (convnext, 32),
    "convnextv2": (lambda: convnext("convnextv2_atto"), 32),
    "densenet": (thin("densenet121", growth_rate=4, block_config=(1, 1, 1, 1)), 29),
    "vgg": (lambda: VGG([8, "M", 16, "M"], num_classes=5, mlp_ratio=1 / 256, norm_layer=nn.BatchNorm2d), 32),
    "repvgg": (repvgg, 33),
    "normalizer-free": (normalizer_free, 33),
    "bit": (bit, 33),
}


@torch.no_grad()
def mean_over_cosets(model, group, subgroup, x):
    group, subgroup = groups.get(group), groups.get(subgroup)
    poses = [group.transform_image(x, group.inverse(coset[0])) for coset in group.cosets(subgroup)]
    return torch.stack([model(pose) for pose in poses]).mean(0)


def mean_over_poses(model, group, x):
    return mean_over_cosets(model, group, "c1", x)


# Transfer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "group"), [*((family, "p4m") for family in FAMILIES), ("convnextv2", "p4")])
def test_a_transferred_network_is_the_mean_of_the_plain_one_over_the_group(family, group):
    build, size = FAMILIES[family]
    plain = with_random_statistics(build()).eval()
    model, x = gzoo.convert(plain, group, weights="transfer"), random_image(3, (size, size))
    expected = mean_over_poses(plain, group, x)
    assert relative_error(model(x), expected) < 1e-12
    assert relative_error(model.float()(x.float()).double(), expected) < 1e-5
    assert relative_error(plain(x), expected) > 1e-4  # one pose is not the mean


def head(width):
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)]


LAYERS = {
    "rectangular kernels": lambda: [nn.Conv2d(6, 8, (1, 7), padding=(0, 3)), nn.ReLU(), *head(8)],
    "transposed convolution": lambda: [nn.ConvTranspose2d(6, 8, 4, stride=2, padding=1), nn.ReLU(), *head(8)],
    "instance norm": lambda: [nn.InstanceNorm2d(6, affine=True), nn.ReLU(), nn.Conv2d(6, 8, 3), *head(8)],
    "hidden linear": lambda: [*head(6)[:2], nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)],
    "grouped, depthwise": lambda: [nn.Conv2d(6, 8, 3, groups=2), nn.Conv2d(8, 16, 3, groups=8), nn.ReLU(), *head(16)],
    "3x3 convolution at the end": lambda: [nn.Conv2d(6, 5, 3), *head(5)[:2]],
    "1x1 convolution at the end": lambda: [nn.Conv2d(6, 5, 1), *head(5)[:2]],
}


@pytest.mark.parametrize("group", ["c1", "c2", "d1", "p4m"])
@pytest.mark.parametrize("layers", LAYERS)
def test_transferred_layers_are_the_mean_of_the_plain_ones_over_the_group(layers, group):
    plain = with_random_statistics(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), *LAYERS[layers]())).eval()
    x = random_image(3, (11, 11))
    model = gzoo.convert(plain, group, weights="transfer")
    assert relative_error(model(x), mean_over_poses(plain, group, x)) < 1e-12


@pytest.mark.parametrize("bend", [nn.Sigmoid(), nn.Softmax(1), nn.Tanh()])
@pytest.mark.parametrize("last", ["linear", "1x1 convolution"])
def test_transferred_logits_that_become_probabilities_are_the_mean_before(last, bend):
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), *(head(6) if last == "linear" else [nn.Conv2d(6, 5, 1)])]
    plain, x = with_random_statistics(nn.Sequential(*layers)).eval(), random_image(3, (11, 11))
    model = gzoo.convert(nn.Sequential(*plain, bend), "p4", weights="transfer")
    bent, logits = model(x), gzoo.convert(plain, "p4", weights="transfer")(x)
    torch.testing.assert_close(bent, bend(logits))
    if last == "linear":
        assert relative_error(logits, mean_over_poses(plain, "p4", x)) < 1e-12


@pytest.mark.parametrize("classifier", [None, "5"])
def test_a_transferred_autoencoder_is_the_mean_of_the_plain_one_over_the_group(classifier):
    layers = [nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 6, 3, 2, 1), nn.ReLU()]
    channels = 3 if classifier is None else 7
    plain = with_random_statistics(nn.Sequential(*layers, nn.ConvTranspose2d(6, channels, 3, padding=1))).eval()
    p4m, x = groups.get("p4m"), random_image(3, (11, 11))
    model = gzoo.convert(plain, "p4m", weights="transfer", classifier=classifier)
    with torch.no_grad():
        turned_back = [p4m.transform_image(plain(p4m.transform_image(x, p4m.inverse(g))), g) for g in p4m.grid_elements]
        assert relative_error(model(x), torch.stack(turned_back).mean(0)) < 1e-12


class Denoiser(nn.Module):
    """Takes from the image, or from its enlarged one, what the last layer makes."""

    def __init__(self, *last):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *last)
        self.enlarge = nn.Upsample(scale_factor=2) if isinstance(last[0], nn.ConvTranspose2d) else nn.Identity()

    def forward(self, x):
        return self.enlarge(x) - self.body(x)


AGAINST_THE_IMAGE = {
    "convolution": lambda: nn.Conv2d(8, 3, 3, padding=1),
    "1x1 convolution": lambda: nn.Conv2d(8, 3, 1),
    "transposed": lambda: nn.ConvTranspose2d(8, 3, 4, stride=2, padding=1),
}


@pytest.mark.parametrize("last", AGAINST_THE_IMAGE)
@pytest.mark.parametrize("classifier", [None, "body.2"])
def test_a_transferred_denoiser_is_the_mean_of_the_plain_one_over_the_group(last, classifier):
    plain, p4, x = Denoiser(AGAINST_THE_IMAGE[last]()).double().eval(), groups.get("p4"), random_image(3, (6, 7))
    model = gzoo.convert(plain, "p4", weights="transfer", classifier=classifier)
    with torch.no_grad():
        back = [p4.transform_image(plain(p4.transform_image(x, p4.inverse(g))), g) for g in range(4)]
        assert relative_error(model(x), torch.stack(back).mean(0)) < 1e-12


@pytest.mark.parametrize("last", AGAINST_THE_IMAGE)
def test_the_projected_last_layer_of_an_autoencoder_is_the_mean_of_the_plain_one(last):
    """Where what comes before is equivariant already, so is the nearest network the mean over the poses."""
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), AGAINST_THE_IMAGE[last]()).double().eval()
    with torch.no_grad():  # two fields that are constant along the fibre
        plain[0].weight.copy_(plain[0].weight[::4].repeat_interleave(4, 0))
        plain[0].bias.copy_(plain[0].bias[::4].repeat_interleave(4))
    p4, x = groups.get("p4"), random_image(3, (6, 7))
    model = gzoo.convert(plain, "p4", weights="project")
    with torch.no_grad():
        back = [p4.transform_image(plain(p4.transform_image(x, p4.inverse(g))), g) for g in range(4)]
        assert relative_error(model(x), torch.stack(back).mean(0)) < 1e-12


@pytest.mark.parametrize("family", ["resnet", "convnext", "bit"])
def test_a_transferred_network_is_invariant_at_sizes_where_the_plain_strides_are_not_symmetric(family):
    model = gzoo.convert(with_random_statistics(FAMILIES[family][0]()).eval(), "p4m", weights="transfer")
    for size in ((50, 37), (64, 47)):
        assert gzoo.check(model, size).worst < 1e-12


@pytest.mark.parametrize("family", ["resnet", "convnextv2", "bit"])
def test_one_step_moves_the_zeros_of_a_transferred_network_and_it_stays_invariant(family):
    model = gzoo.convert(with_random_statistics(FAMILIES[family][0]()).eval(), "p4", weights="transfer")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(random_image(3, (33, 33))).square().sum().backward()
    optimizer.step()
    convolutions = [module for module in model.modules() if isinstance(module, GroupConv2d)]
    assert all(module.weight[:, :, 1:].abs().max() > 0 for module in convolutions)
    assert gzoo.check(model, 33).worst < 1e-12


def test_a_transferred_network_without_classifier_gives_the_mean_of_the_features():
    plain = with_random_statistics(resnet()).eval()
    plain.reset_classifier(0)
    x = random_image(3, (33, 33))
    assert relative_error(gzoo.convert(plain, "p4", weights="transfer")(x), mean_over_poses(plain, "p4", x)) < 1e-12


def test_a_transferred_network_takes_a_new_classifier():
    model = gzoo.convert(convnext(), "p4", weights="transfer")
    model.reset_classifier(7)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize("family", ["resnet", "convnext", "bit"])
def test_a_transferred_network_reloads_and_copies(family):
    build, size = FAMILIES[family]
    model = gzoo.convert(with_random_statistics(build()).eval(), "p4", weights="transfer")
    other = gzoo.convert(build().double().eval(), "p4", weights="transfer")
    other.load_state_dict(model.state_dict())
    x = random_image(3, (size, size))
    assert other(x).equal(model(x))
    assert copy.deepcopy(model)(x).equal(model(x))


def test_what_is_frozen_stays_frozen():
    plain = convnext()
    plain.requires_grad_(False)
    plain.get_classifier().requires_grad_(True)
    model = gzoo.convert(plain, "p4", weights="transfer")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.fc.weight", "head.fc.bias"]


@pytest.mark.parametrize("weights", ["transfer", "project"])
def test_the_plain_network_stays_as_it_is(weights):
    plain = resnet()
    before, x = copy.deepcopy(plain.state_dict()), torch.randn(1, 3, 33, 33)
    expected = plain.eval()(x)
    model = gzoo.convert(plain, "p4", weights=weights)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(value.equal(before[name]) for name, value in plain.state_dict().items())
    assert plain(x).equal(expected)


def test_how_to_prepare_images_is_kept_and_where_plain_weights_came_from_is_dropped():
    plain = resnet()
    plain.pretrained_cfg = plain.pretrained_cfg | {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "file": "plain.pth"}
    model = gzoo.convert(plain, "p4", weights="transfer")
    assert timm.data.resolve_model_data_config(model) == timm.data.resolve_model_data_config(plain)
    assert not {"file", "url", "hf_hub_id"} & set(model.pretrained_cfg)


# Projection ---------------------------------------------------------------------------------------------------------


def small():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 5, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 3), nn.ReLU(), *head(16)[:2], nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 5),
    )  # fmt: skip


@torch.no_grad()
def expanded(model, plain):
    """The plain network with the filters of ``model``, which has C / |G| fields for its C channels."""
    twin, order = copy.deepcopy(plain), model.group.order
    for name, module in twin.named_modules():
        own = model.get_submodule(name)
        own = own.norm if isinstance(own, FibreNorm) else own
        for key, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if key == "weight" and isinstance(own, ExpandedLayer):
                value.copy_(own.filter().view_as(value))
            elif key == "weight" and isinstance(own, InvariantLinear):
                value.copy_(own.weight.repeat_interleave(order, 1) / order)
            else:
                stored = getattr(own, key)
                value.copy_(stored if stored.shape == value.shape else stored.repeat_interleave(order))
    return twin


@pytest.mark.parametrize(
    ("build", "group"), [(resnet, "p4"), (resnet, "p4m"), (small, "p4m"), (small, "c8"), (small, "d1")]
)
def test_projecting_the_filters_of_an_equivariant_network_gives_its_weights_back(build, group):
    plain = build().double().eval()
    model = with_random_statistics(gzoo.convert(plain, group, weights="project")).eval()
    twin = expanded(model, plain)
    x = random_image(3, (33, 33))
    assert relative_error(model(x), twin(x)) < 1e-12  # else it is no twin
    again = gzoo.convert(twin, group, weights="project")
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            assert relative_error(again.state_dict()[name], value) < (1e-5 if group == "c8" else 1e-12), name


PROJECTED = {
    "convolution": lambda: nn.Conv2d(16, 32, 3),
    "1x1 convolution": lambda: nn.Conv2d(16, 32, 1),
    "rectangular kernels": lambda: nn.Conv2d(16, 16, (1, 3), padding=(0, 1)),
    "groups that are joined": lambda: nn.Conv2d(16, 32, 3, groups=8),
    "depthwise": lambda: nn.Conv2d(16, 16, 3, groups=16),
    "transposed": lambda: nn.ConvTranspose2d(16, 32, 3, groups=2),
}


def dense(filters, groups):
    """Filters between all channels, on a square, zero where there were none."""
    rows, columns, height, width = filters.shape
    side, rows = max(height, width), rows // groups
    full = filters.new_zeros(rows * groups, columns * groups, side, side)
    top, left = (side - height) // 2, (side - width) // 2
    for i in range(groups):
        block = full[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns]
        block[..., top : top + height, left : left + width] = filters[i * rows : (i + 1) * rows]
    return full


@pytest.mark.parametrize("group", ["p4", "p4m", "c8"])
@pytest.mark.parametrize("layer", ["lifting", *PROJECTED])
def test_what_a_projection_leaves_out_is_orthogonal_to_every_equivariant_filter(layer, group):
    plain = PROJECTED.get(layer, PROJECTED["convolution"])()
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), plain, *head(plain.out_channels)).double()
    index = 0 if layer == "lifting" else 2
    new, filters = (
        gzoo.convert(network, group, weights="project")[index],
        dense(network[index].weight, network[index].groups),
    )
    left = filters - dense(new.filter(), new.groups)
    for _ in range(5):
        direction = dense(expand(torch.randn_like(new.weight), new.basis), new.groups)
        assert abs((left * direction).sum()) < (1e-6 if group == "c8" else 1e-12) * left.norm() * direction.norm()
    assert left.norm() > 0.1 * filters.norm()  # else it proves nothing


# What cannot be carried over ----------------------------------------------------------------------------------------

ERRORS = {
    "unknown weights": (small, "p4", {"weights": "copy"}, r"weights is 'copy'; accepted are 'transfer', 'project'"),
    "another match": (small, "p4", {"weights": "transfer", "match": "params"}, r"fills the widths of match='width'"),
    "another match to project": (small, "p4", {"weights": "project", "match": "width"}, r"the widths of match='flops'"),
    "widths": (small, "p4", {"weights": "transfer", "widths": {16: 8}}, r"leave match and widths out"),
    "maximum": (small, "p4", {"weights": "transfer", "group_pool": "max"}, r"needs group_pool='mean'"),
    "off the grid": (
        small,
        "c8",
        {"weights": "transfer"},
        r"steerable kernels of c8 are turned between the pixels, .* p4 or p4m",
    ),
    "between the pixels of the grid": (
        small,
        "p4",
        {"weights": "transfer", "basis": "steerable_3r"},
        r"steerable kernels of p4 are turned between the pixels",
    ),
    "width that |G| does not divide": (
        lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3), *head(12)),
        "p4m",
        {"weights": "project"},
        r"^2: 12 channels are 1\.5 fields of \|G\| = 8; a whole number is needed. Choose 8 or 16 channels",
    ),
    "groups that cannot be joined": (
        lambda: nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=8), *head(24)),
        "p4m",
        {"weights": "project"},
        r"^2: its 8 groups would become 3, which does not divide them",
    ),
    "neighbouring channels": (
        lambda: resnet(block_args={"attn_layer": "eca"}),
        "p4",
        {"weights": "project"},
        r"^layer1\.0\.se: its gates see neighbouring channels",
    ),
    "attention map of all poses": (
        lambda: resnet(block_args={"attn_layer": "gc"}),
        "p4",
        {"weights": "transfer"},
        r"^layer1\.0\.se: its attention map is one for all poses",
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_what_cannot_be_carried_over_is_an_error(error):
    build, group, options, message = ERRORS[error]
    with pytest.raises(ValueError, match=message):
        gzoo.convert(build(), group, **options)


class Shift(nn.Module):
    """A number for each channel."""

    def __init__(self, width):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width, 1, 1))

    def forward(self, x):
        return x + self.shift


@pytest.mark.parametrize("weights", ["transfer", "project"])
def test_parameters_that_a_rule_of_the_user_leaves_out_are_an_error(weights, monkeypatch):
    monkeypatch.setitem(RULES, Shift, lambda plain, recipe: nn.Identity())
    with pytest.raises(ValueError, match=r"^1: its shift has no place in Identity; convert with fresh weights"):
        gzoo.convert(nn.Sequential(nn.Conv2d(3, 8, 3), Shift(8), nn.ReLU(), *head(8)), "p4", weights=weights)


# Growth -------------------------------------------------------------------------------------------------------------

GROWING = {
    **{name: FAMILIES[name] for name in ("resnet with ECA", "mobilenetv3", "densenet", "repvgg")},
    **{name: (lambda name=name: stack(name), 12) for name in LAYERS if name != "instance norm"},
}


def stack(layers):
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), *LAYERS[layers]())


def grown(plain, group, subgroup, **options):
    """The network over the group, filled from a random one over the subgroup, and that one; float64, eval mode."""
    model, smaller = (
        convert_in_place(copy.deepcopy(plain), name, match="width", **options) for name in (group, subgroup)
    )
    model, smaller = model.double().eval(), with_random_statistics(smaller).eval()
    gzoo.grow(model, smaller)
    return model, smaller


@pytest.mark.parametrize(("group", "subgroup"), [("p4m", "c1"), ("p4", "c2")])
@pytest.mark.parametrize("family", GROWING)
def test_a_grown_network_is_the_mean_of_the_smaller_one_over_the_cosets(family, group, subgroup):
    build, size = GROWING[family]
    model, smaller = grown(build(), group, subgroup)
    x = random_image(3, (size, size + 4))
    expected = mean_over_cosets(smaller, group, subgroup, x)
    assert relative_error(model(x), expected) < 1e-12
    assert family in LAYERS or relative_error(smaller(x), expected) > 1e-4  # one coset is not the mean


@pytest.mark.parametrize(("group", "subgroup"), [("p4m", "d2"), ("p4", "c1"), ("p4", "p4")])
def test_growth_in_the_steerable_basis_and_with_poses(group, subgroup):
    model, smaller = grown(stack("grouped, depthwise"), group, subgroup, basis="steerable", head="pose")
    x = random_image(3, (12, 15))
    expected = mean_over_cosets(lambda y: smaller(y).mean(2), group, subgroup, x)
    assert relative_error(model(x).mean(2), expected) < 1e-12


def test_a_grown_network_pools_by_the_maximum_over_all_cosets():
    model, smaller = grown(stack("hidden linear"), "p4m", "p4", group_pool="max")
    x = random_image(3, (12, 12))
    fibres = [smaller[:-1](y).unflatten(1, (-1, 4)) for y in (x, x.flip(-1))]
    pooled = torch.cat(fibres, 2).amax(2)
    assert relative_error(model(x), F.linear(pooled, model[-1].weight, model[-1].bias)) < 1e-12


@pytest.mark.parametrize("name", ["edgenext_xx_small", "mobilevit_xxs", "gcresnext26ts"])
def test_a_network_that_attends_from_all_poses_at_once_does_not_grow(name):
    model, smaller = (convert_in_place(timm.create_model(name, num_classes=3), group) for group in ("p4", "c1"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r": its attention, mixture of filters, .* is one for all poses"):
        gzoo.grow(model, smaller)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


COUPLINGS = {
    "a softmax layer": lambda net, y: net.softmax(y),
    "a norm by its name in linalg": lambda net, y: torch.linalg.vector_norm(y, 2, 1, keepdim=True),
    "a logarithm of a sum": lambda net, y: y.logsumexp(1, keepdim=True),
    "a variance with its mean": lambda net, y: torch.var_mean(y, 1, keepdim=True)[0],
    "the largest number": lambda net, y: 1 / y.amax(),
    "softmax": lambda net, y: y.mean((2, 3), keepdim=True).softmax(1),
    "softmin": lambda net, y: F.softmin(y, 1),
    "a norm by its short name": lambda net, y: torch.linalg.norm(y, dim=1, keepdim=True),
    "cosine similarity": lambda net, y: F.cosine_similarity(y, y + 1, dim=1)[:, None],
    "the largest of the channels": lambda net, y: y.topk(1, 1)[0],
    "the channels in order": lambda net, y: y.sort(1)[0][:, -1:],
    "a mean of what is a number": lambda net, y: y.nanmean(1, keepdim=True),
    "normalize": lambda net, y: F.normalize(y),
    "group norm": lambda net, y: F.group_norm(y, 2),
    "maximum": lambda net, y: y.amax(1, keepdim=True),
    "products of pixels": lambda net, y: (y.flatten(2).mT @ y.flatten(2)).softmax(-1).mean(1).view(-1, 1, 9, 9),
}


UNCARRIED = {
    "some of the channels, by a number": lambda y: torch.cat(
        [y.narrow(1, 0, 4), y.narrow(1, 4, y.shape[1] - 4).relu()], 1
    ),
    "how many channels there are": lambda y: (y * y.shape[1] ** -0.5).tanh(),
    "a sum of products": lambda y: y * torch.einsum("bchw,bchw->bhw", y, y)[:, None],
}


class Between(nn.Module):
    def __init__(self, run, bend):
        super().__init__()
        self.bend = bend
        self.a, self.b = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc, self.run = nn.Linear(8, 3), run

    def forward(self, x):
        return self.bend(self.fc(self.run(self.b(self.a(x).relu())).mean((2, 3))))


@pytest.mark.parametrize("step", UNCARRIED)
@pytest.mark.parametrize("bend", [nn.Identity(), nn.Sigmoid()])
def test_a_forward_that_the_mean_over_poses_does_not_pass_is_an_error(step, bend):
    with pytest.raises(ValueError, match=r"^Between is not carried over: with weights='transfer' the output differs"):
        gzoo.convert(Between(UNCARRIED[step], bend), "p4", weights="transfer")


def test_so_is_one_with_modules_of_ones_own():
    for step in UNCARRIED.values():
        with pytest.raises(ValueError, match=r"^Between is not carried over"):
            gzoo.convert(Between(Calling(step), nn.Identity()), "p4", weights="transfer")
    plain, x = Between(Calling(lambda y: y * y.sigmoid()), nn.Identity()).double().eval(), random_image(3, (17, 17))
    model = gzoo.convert(plain, "p4", weights="transfer")
    assert relative_error(model(x), mean_over_poses(plain, "p4", x)) < 1e-12


PREPARED = {
    "gray": lambda x: x.mean(1, keepdim=True).expand_as(x),
    "standardized": lambda x: (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True),
    "of one length": lambda x: F.normalize(x),
    "colours one by one": lambda x: torch.cat([x[:, i].unsqueeze(1) * (i + 1) - 0.5 for i in range(3)], 1),
    "colours in another order": lambda x: x[:, [2, 0, 1]],
    "two colours": lambda x: torch.cat([x[:, [2, 1]], x[:, :1] ** 2], 1),
}


@pytest.mark.parametrize("prepare", PREPARED)
def test_what_prepares_the_image_converts_and_transfers(prepare):
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    plain = nn.Sequential(Calling(PREPARED[prepare]), *body, nn.Flatten(), nn.Linear(8, 5))
    plain, x = plain.double().eval(), random_image(3, (16, 19))
    assert gzoo.check(gzoo.convert(plain, "p4m"), (16, 19)).worst < 1e-12
    expected = mean_over_poses(plain, "p4m", x)
    assert relative_error(gzoo.convert(plain, "p4m", weights="transfer")(x), expected) < 1e-12


def test_logits_that_are_squeezed_transfer():
    plain = Network(
        lambda self, x: self.fc(F.adaptive_avg_pool2d(self.conv(x).relu(), 1).squeeze()),
        conv=nn.Conv2d(3, 8, 3, padding=1),
        fc=nn.Linear(8, 5),
    )
    plain, x = plain.double().eval(), random_image(3, (9, 9))
    model = gzoo.convert(plain, "p4", weights="transfer")
    assert relative_error(model(x), mean_over_poses(plain, "p4", x)) < 1e-12


def test_a_sum_weighted_by_single_parameters_transfers():
    def run(self, x):
        weights = self.weights.relu()
        weights = weights / (weights.sum() + 1e-4)
        return self.fc((weights[0] * self.a(x) + weights[1] * self.b(x)).relu().mean((2, 3)))

    convolutions = {name: nn.Conv2d(3, 8, 3, padding=1) for name in "ab"}
    plain = Network(run, **convolutions, fc=nn.Linear(8, 5), weights=nn.Parameter(torch.tensor([1.0, 2.0])))
    plain, x = plain.double().eval(), random_image(3, (9, 12))
    assert gzoo.check(gzoo.convert(plain, "p4m"), (9, 12)).worst < 1e-12
    model = gzoo.convert(plain, "p4", weights="transfer")
    assert relative_error(model(x), mean_over_poses(plain, "p4", x)) < 1e-12


def test_norms_by_the_batch_alone_do_not_transfer():
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    gzoo.convert(plain, "p4")
    with pytest.raises(ValueError, match="1: it norms by the statistics of the batch in evaluation, too"):
        gzoo.convert(plain, "p4", weights="transfer")


class Coupled(nn.Module):
    """Weighs its map by what one forward has seen in all channels; ends in probabilities."""

    def __init__(self, weigh):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc, self.softmax, self.weigh = nn.Linear(8, 5), nn.Softmax2d(), weigh

    def forward(self, x):
        y = self.conv1(x).relu()
        return self.fc(self.conv2(y * self.weigh(self, y)).relu().mean((2, 3))).softmax(1)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_what_couples_channels_neither_transfers_nor_grows(coupling):
    build = partial(convert_in_place, match="width")
    plain = Coupled(COUPLINGS[coupling])
    plain.pretrained_cfg = {"input_size": (3, 9, 9)}
    with pytest.raises(ValueError, match=r"(Coupled|softmax): its forward takes a mean, maximum, norm, softmax"):
        build(copy.deepcopy(plain), "p4", match=None, weights="transfer")
    with pytest.raises(ValueError, match=r"(Coupled|softmax): its attention, mixture of filters, norm or softmax"):
        gzoo.grow(build(copy.deepcopy(plain), "p4"), build(plain, "c1"))


def test_what_weighs_pixels_or_classes_alone_transfers_and_grows():
    plain = Coupled(lambda net, y: y.flatten(2).softmax(2).view_as(y))
    gzoo.grow(*(convert_in_place(copy.deepcopy(plain), group, match="width") for group in ("p4", "c1")))
    convert_in_place(plain, "p4", weights="transfer")


def test_new_weights_of_a_grown_network_train():
    model, _ = grown(stack("3x3 convolution at the end"), "p4", "c2")
    model.train()(random_image(3, (12, 12))).square().sum().backward()
    layer = next(m for m in model.modules() if isinstance(m, GroupConv2d))
    assert not layer.weight[:, :, [1, 3]].any()
    assert layer.weight.grad[:, :, [1, 3]].abs().amax((0, 1, 3, 4)).min() > 0


@pytest.mark.parametrize("subgroup", ["c1", "p4"])
def test_a_deeper_network_starts_as_the_mean_of_the_shallower_one(subgroup):
    smaller = with_random_statistics(timm.create_model("p4_resnet20", subgroup=subgroup, num_classes=3)).eval()
    model = timm.create_model("p4_resnet32", num_classes=3).double()
    gzoo.grow(model, smaller)
    assert model.training  # as it was
    x = random_image(3, (16, 20))
    assert relative_error(model.eval()(x), mean_over_cosets(smaller, "p4", subgroup, x)) < 1e-12
    model.train()(random_image(3, (16, 20))).square().sum().backward()
    assert model.stages[2][4].bn2.norm.weight.grad.abs().max() > 0


def test_a_plain_network_grows_deeper_too_and_not_from_one_of_gzoos():
    smaller = with_random_statistics(timm.create_model("resnet20", num_classes=3)).eval()
    model, x = timm.create_model("resnet32", num_classes=3).double().eval(), random_image(3, (16, 20))
    gzoo.grow(model, smaller)
    assert model(x).equal(smaller(x))
    with pytest.raises(ValueError, match=r"the two networks differ in head\.fc\.bias, head\.fc\.weight; they must"):
        gzoo.grow(timm.create_model("resnet32", num_classes=5), smaller)
    equivariant = timm.create_model("p4_resnet20", num_classes=3)
    for pair in ((equivariant, smaller), (smaller, equivariant)):
        with pytest.raises(ValueError, match="StagedCNN is plain and the other network is not; convert it, too"):
            gzoo.grow(*pair)


def test_blocks_that_change_what_they_are_given_do_not_make_a_network_deeper():
    smaller, model = timm.create_model("p4_resnet20"), with_random_statistics(timm.create_model("p4_resnet32"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^stages.0.3: the smaller network has no such block, and it changes"):
        gzoo.grow(model, smaller.double())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"the two networks differ in stages.0.3.bn1.norm.bias, "):
        gzoo.grow(smaller, model)


NOT_GROWN = {
    "no subgroup": ("p4m", "c3", {}, "c3 is no subgroup of p4m"),
    "smaller group": ("p4", "p4m", {}, "p4m is no subgroup of p4"),
    "other widths": ("p4m", "p4", {"match": "params"}, "^0: its weight .* has another layout"),
    "other layers": ("p4m", "p4", {"bias": True}, "the two networks differ in 0.bias; "),
}


@pytest.mark.parametrize("error", NOT_GROWN)
def test_what_cannot_grow_is_an_error(error):
    group, subgroup, change, message = NOT_GROWN[error]

    def build(bias=False):
        return nn.Sequential(nn.Conv2d(3, 8, 1, bias=bias), nn.ReLU(), nn.Conv2d(8, 8, 1), *head(8))

    model = gzoo.convert(build(change.get("bias", False)), group, match=change.get("match", "width"))
    with pytest.raises(ValueError, match=message):
        gzoo.grow(model, gzoo.convert(build(), subgroup, match="width"))


def test_partial_networks_do_not_grow():
    model, smaller = (timm.create_model("p4_cnn7", partial=True, **over) for over in ({}, {"subgroup": "c2"}))
    with pytest.raises(ValueError, match=r"stem.1.subset: .* grow a network that is not partial"):
        gzoo.grow(model, smaller)


def test_standardized_kernels_do_not_grow():
    models = [gzoo.convert(normalizer_free(), group, match="width") for group in ("p4m", "p4")]
    with pytest.raises(ValueError, match=r"^2: its kernels are standardized, and zeros would change them"):
        gzoo.grow(*models)
