"""Networks keep their function on the way to escnn's modules and back, at every image size."""

from functools import partial

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

import gzoo
from gzoo import _escnn, backbones, groups
from gzoo.check import check, relative_error
from gzoo.equivariant import make_equivariant
from gzoo.interop import EscnnLayer, from_escnn, to_escnn
from gzoo.nn import (
    FibreNorm,
    GroupCondConv2d,
    GroupConv2d,
    GroupPool,
    LiftingConv2d,
    QuotientConv2d,
    QuotientNorm,
    QuotientPool,
    Restriction,
    SymmetricBlur2d,
    SymmetricPool2d,
    WeightStandardization,
)
from gzoo.nn.resample import Window
from tests.conftest import random_fields, random_image, with_random_statistics
from tests.nn.test_conv import VARIANTS


def enn():
    """escnn.nn, imported by the first test that needs it: not while tests are collected."""
    return _escnn.load().nn


def d8_resnet8():
    return gzoo.convert(backbones.resnet_cifar(8, base_width=8), "d8")


def fused():
    """timm's batch norm with its activation, an average pool, and a classifier on pixels."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), BatchNormAct2d(8), nn.AvgPool2d(3, 2, 1), nn.Conv2d(8, 5, 1)]
    return gzoo.convert(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), "p4", group_pool="max")


def by_stage(chain):
    return gzoo.convert(backbones.resnet_cifar(8, base_width=4), chain, group_pool="max")


def d6_c6():
    """Between the pixels, and restricted; escnn needs half a minute for a 3x3 basis between regular fields of D16."""
    d6, c6 = groups.get("d6"), groups.get("c6")
    layers = [LiftingConv2d(d6, 1, 1, 3), FibreNorm(nn.BatchNorm2d(1), 12), nn.ReLU(), GroupConv2d(d6, 1, 2, 1)]
    layers += [Restriction(d6, c6), FibreNorm(nn.BatchNorm2d(4), 6), SymmetricPool2d(nn.MaxPool2d(3, 2))]
    model = nn.Sequential(*layers, GroupConv2d(c6, 4, 1, 3), GroupPool(6, "max"))
    make_equivariant(model, (d6, c6), "max")
    return model


def mixture():
    """Regular, quotient and trivial fields."""
    c8, fields = groups.get("c8"), {"c1": 2, "c2": 1, "c4": 1, "c8": 2}
    layers = [QuotientConv2d(c8, {"c8": 3}, fields, 5, padding=2), QuotientNorm(c8, fields), nn.ReLU()]
    layers += [SymmetricPool2d(nn.MaxPool2d(2)), QuotientConv2d(c8, fields, {"c2": 3}, 3, stride=2, padding=1)]
    layers += [FibreNorm(nn.BatchNorm2d(3), 4), nn.ReLU(), QuotientConv2d(c8, {"c2": 3}, {"c4": 1, "c1": 1}, 1)]
    return nn.Sequential(*layers, QuotientPool(c8, {"c4": 1, "c1": 1}, "max"))


NETWORKS = {
    "p4_cnn7": (lambda: timm.create_model("p4_cnn7"), 1, (28, 29, 36)),
    "p4m_resnet20": (lambda: timm.create_model("p4m_resnet20"), 3, (32, 33, 18)),
    "c8_cnn7": (lambda: timm.create_model("c8_cnn7"), 1, (28, 29)),
    "d8_resnet8": (d8_resnet8, 3, (16, 17)),
    "fused": (fused, 3, (8, 9)),
    "d8:d4:d1": (lambda: by_stage("d8:d4:d1"), 3, (16, 17)),
    "d4:c4:c1": (lambda: by_stage("d4:c4:c1"), 3, (16, 17)),
    "d6:c6": (d6_c6, 1, (9, 10)),
    "mixture": (mixture, 3, (11, 12)),
}


@pytest.fixture(scope="module", params=NETWORKS)
def pair(request):
    """A network with random statistics, its escnn twin, and images of several sizes."""
    torch.manual_seed(0)
    build, channels, sizes = NETWORKS[request.param]
    model = with_random_statistics(build()).float().eval()
    return model, to_escnn(model), [torch.randn(2, channels, n, n + 2) for n in sizes]


def modules(network, *types):
    return [module for module in network.modules() if isinstance(module, types)]


def test_outputs_are_equal_at_every_size(pair):
    model, twin, images = pair
    with torch.no_grad():
        for x in images:
            assert relative_error(twin.eval()(x), model.eval()(x)) < 1e-5


def test_batch_norms_train_alike(pair):
    model, twin, images = pair
    model, twin = from_escnn(twin).train(), to_escnn(model).train()  # both new: a step changes the statistics
    with torch.no_grad():
        assert relative_error(twin(images[0]), model(images[0])) < 1e-5
    for ours, theirs in zip(modules(model, nn.BatchNorm2d), modules(twin, nn.BatchNorm3d), strict=True):
        assert relative_error(theirs.running_mean, ours.running_mean) < 1e-5
        assert relative_error(theirs.running_var, ours.running_var) < 1e-5
        assert theirs.num_batches_tracked == ours.num_batches_tracked


def test_the_twin_is_made_of_escnns_modules(pair):
    model, twin, _ = pair
    convolutions = (LiftingConv2d, GroupConv2d, QuotientConv2d)
    assert not modules(twin, *convolutions, FibreNorm, SymmetricPool2d, QuotientPool)
    assert len(modules(twin, enn().R2Conv)) == len(modules(model, *convolutions))
    assert len(modules(twin, nn.BatchNorm3d)) == len(modules(model, FibreNorm))
    pools = modules(twin, enn().PointwiseMaxPool2D, enn().PointwiseAvgPool2D)
    assert len(pools) == len(modules(model, SymmetricPool2d))


def test_the_way_there_and_back_gives_the_same_network(pair):
    model, twin, images = pair
    back = from_escnn(twin).eval()
    with torch.no_grad():
        for x in images:
            assert relative_error(back(x), model(x)) < 1e-5
    assert not modules(back, EscnnLayer)
    if modules(model, BatchNormAct2d):
        return  # the activation that timm fuses into it now stands beside the norm
    own, found = model.state_dict(), back.state_dict()
    assert list(own) == list(found)
    assert all(relative_error(found[key].double(), own[key].double()) < 1e-5 for key in own)


def test_what_escnn_learns_comes_back(pair):
    model, twin, images = pair
    twin = to_escnn(from_escnn(twin))  # a copy: others use the first
    optimizer = torch.optim.SGD(twin.train().parameters(), lr=0.1)
    twin(images[0]).square().mean().backward()
    optimizer.step()
    twin.eval()
    back = from_escnn(twin)
    with torch.no_grad():
        assert relative_error(back(images[1]), twin(images[1])) < 1e-5
        assert relative_error(back(images[1]), model(images[1])) > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("group", "basis"),
    [("p4", "pixel"), ("d1", "pixel"), ("c8", "steerable_3r")],
)
def test_every_kind_of_window_is_equal_at_every_size_and_comes_back(group, basis, variant):
    layers = (LiftingConv2d, random_image(4, (8, 8))), (GroupConv2d, random_fields(group, 4, (8, 8)))
    for layer, x in layers:
        ours = with_random_statistics(layer(groups.get(group), 4, 4, **VARIANTS[variant], basis=basis)).float()
        twin = to_escnn(ours)
        back = from_escnn(twin, basis)
        # A kernel that is no square comes back as the square that it stands in.
        assert relative_error(back.filter(), ours.filter()) < 1e-5
        assert back.weight.shape[-2:] != ours.weight.shape[-2:] or relative_error(back.weight, ours.weight) < 1e-5
        for height, width in [(7, 7), (8, 5)]:
            image = x[..., :height, :width].float()
            with torch.no_grad():
                assert relative_error(twin(image), ours(image)) < 1e-5
                assert back(image).shape == ours(image).shape
                assert relative_error(back(image), ours(image)) < 1e-5


@pytest.mark.parametrize("variant", ["1x1", "2x2 strided", "3x3 strided", "4x4 same, dilated"])
@pytest.mark.parametrize(("group", "basis"), [("p4m", "pixel"), ("p4m", "steerable"), ("d6", "steerable_3r")])
def test_convolutions_of_quotient_fields_are_equal_at_every_size_and_come_back(group, basis, variant):
    inside, outside = {"c1": 1, "d1": 2, "c2": 1, group: 1}, {"d2": 1, "c1": 1, group: 2}
    ours = QuotientConv2d(groups.get(group), inside, outside, **VARIANTS[variant], basis=basis)
    ours = with_random_statistics(ours).float()
    twin = to_escnn(ours)
    back = from_escnn(twin, basis)
    assert (back.in_fields, back.out_fields) == (inside, outside)
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(back.parameters(), ours.parameters(), strict=True))
    for size in [(7, 7), (8, 8), (5, 8)]:
        x = random_image(ours.in_channels, size).float()
        with torch.no_grad():
            assert relative_error(twin(x), ours(x)) < 1e-5
            assert relative_error(back(x), ours(x)) < 1e-5


def test_norms_of_kinds_of_one_size_share_a_batch_norm_of_escnn():
    G, fields = groups.get("p4m"), {"c2": 2, "p4m": 1, "d1": 3, "c1": 1}
    ours = with_random_statistics(QuotientNorm(G, fields)).float().eval()
    twin, x = to_escnn(ours), random_image(G.quotient_type(fields).size).float()
    back = from_escnn(twin)
    assert [norm.num_features for norm in modules(twin, nn.BatchNorm3d)] == [5, 1, 1]
    assert relative_error(twin(x), ours(x)) < 1e-5
    assert all(tensor.equal(back.state_dict()[key]) for key, tensor in ours.state_dict().items())


def test_a_norm_of_quotient_fields_that_escnn_does_not_have_stays_gzoos_own():
    ours = QuotientNorm(groups.get("p4"), {"c2": 2}, lambda fields: nn.GroupNorm(1, fields))
    assert not modules(to_escnn(ours), EscnnLayer)


def test_same_padding_of_an_even_kernel_is_equal_on_a_single_pixel():
    ours = LiftingConv2d(groups.get("p4"), 1, 2, 4, padding="same")
    x = torch.randn(1, 1, 1, 5)
    assert relative_error(to_escnn(ours)(x), ours(x)) < 1e-5


def test_a_pool_of_odd_padding_is_equal_at_every_size_and_comes_back():
    """As in the stem of PP-HGNetV2."""
    window = Window(kernel=2, stride=1, padding=1)
    layers = LiftingConv2d(groups.get("p4"), 1, 2, 1), SymmetricPool2d(nn.MaxPool2d(2, 1, 1), window)
    ours = nn.Sequential(*layers)
    make_equivariant(ours, (groups.get("p4"),), "mean")
    twin = to_escnn(ours)
    twin(torch.randn(1, 1, 1, 1))  # here its padding is rounded down
    back = from_escnn(twin)
    assert back[1].window == window
    for size in [(7, 7), (8, 8), (5, 8), (1, 1), (1, 4)]:
        x = torch.randn(1, 1, *size)
        assert ours(x).shape[-2:] == size
        assert relative_error(twin(x), ours(x)) < 1e-5
        assert relative_error(back(x), ours(x)) < 1e-5


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7])
def test_an_r2conv_can_hold_every_pixel_filter(size):
    ours = GroupConv2d(groups.get("p4m"), 1, 1, size, bias=False)
    found = to_escnn(ours).module.expand_parameters()[0]
    assert relative_error(found, ours.filter()) < 1e-5


def test_an_r2conv_with_escnns_default_rings_holds_no_pixel_filter(monkeypatch):
    monkeypatch.setattr("gzoo.interop._pixel_rings", partial(gzoo.bases.rings, name="steerable"))
    with pytest.raises(ValueError, match=r"the filters differ by \S+ of the largest tap; no R2Conv holds them"):
        to_escnn(GroupConv2d(groups.get("p4"), 2, 2, 3))


def test_a_kernel_that_is_no_square_keeps_its_function():
    ours = GroupConv2d(groups.get("p4"), 2, 2, (1, 3), padding=1)
    twin, x = to_escnn(ours), random_fields("p4", 2).float()
    assert relative_error(twin(x), ours(x)) < 1e-5
    assert relative_error(from_escnn(twin)(x), ours(x)) < 1e-5


def test_weight_standardization_stays_gzoos_own():
    ours = GroupConv2d(groups.get("p4"), 2, 2, 3)
    ours.standardize = WeightStandardization(2, 4, 1e-6)
    twin, x = to_escnn(ours), random_fields("p4", 2).float()
    assert not modules(twin, EscnnLayer)
    assert twin(x).equal(ours(x))


def test_a_convolution_with_experts_stays_gzoos_own():
    ours = GroupCondConv2d(GroupConv2d(groups.get("p4"), 2, 6, 3), num_experts=3)
    x, shares = random_fields("p4", 2).float(), torch.rand(2, 3)
    assert to_escnn(ours)(x, shares).equal(ours(x, shares))


def test_a_network_of_large_images_only_becomes_one_of_escnns():
    """As Inception-v3, whose windows do not fit 64 pixels."""
    ours = nn.Sequential(LiftingConv2d(groups.get("p4"), 1, 2, 1), SymmetricPool2d(nn.MaxPool2d(65)))
    make_equivariant(ours, (groups.get("p4"),), "mean")
    ours.pretrained_cfg = {"input_size": (1, 66, 66)}
    twin, x = to_escnn(ours), torch.randn(1, 1, 66, 66)
    assert relative_error(twin(x), ours(x)) < 1e-5


class SharedPool(nn.Module):
    """One pool runs on 8 channels and on 16, another on 16 only."""

    def __init__(self):
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.pool, self.own = nn.MaxPool2d(2), nn.AvgPool2d(2)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.own(self.pool(self.wide(self.pool(self.narrow(x)))))
        return self.fc(self.pool(x).mean((2, 3)))


def test_a_pool_of_several_widths_stays_gzoos_own():
    ours = gzoo.convert(SharedPool(), "p4", match="width").eval()
    twin, x = to_escnn(ours), torch.randn(2, 3, 17, 18)
    assert isinstance(twin.pool, SymmetricPool2d)
    assert isinstance(twin.own, EscnnLayer)
    with torch.no_grad():
        assert relative_error(twin(x), ours(x)) < 1e-5
        assert relative_error(from_escnn(twin)(x), ours(x)) < 1e-5


class ImageBeside(nn.Module):
    """The image itself, pooled, joins the maps of the first convolution."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.Conv2d(7, 4, 1)
        self.pool, self.fc = nn.AvgPool2d(2), nn.Linear(4, 5)

    def forward(self, x):
        maps = self.stem(x)
        return self.fc(self.body(torch.cat((maps, self.pool(x)), 1)).mean((2, 3)))


def test_a_pool_of_the_image_beside_the_lifting_is_escnns():
    ours = gzoo.convert(ImageBeside(), "p4", match="width").eval()
    twin, x = to_escnn(ours), torch.randn(2, 3, 16, 18)
    assert twin.pool.in_type == groups.get("p4").image_type(3)
    with torch.no_grad():
        assert relative_error(twin(x), ours(x)) < 1e-5
        assert relative_error(from_escnn(twin)(x), ours(x)) < 1e-5


def test_float64_has_bases_of_its_own():
    ours = with_random_statistics(GroupConv2d(groups.get("p4"), 2, 2, 3))
    x = random_fields("p4", 2)
    single, double = to_escnn(ours.float()), to_escnn(ours.double())
    assert relative_error(double(x), ours(x)) < 1e-6
    assert single(x.float()).dtype == torch.float32


def test_the_model_stays_as_it_is():
    model = timm.create_model("p4_cnn7")
    before = [type(module) for module in model.modules()]
    twin = to_escnn(model)
    from_escnn(twin)
    assert [type(module) for module in model.modules()] == before
    assert modules(twin, EscnnLayer)
    assert model.training
    assert twin.training
    assert not to_escnn(model.eval()).training


def test_a_module_that_stands_at_two_places_stays_one():
    """There and back: a convolution and a nonlinearity that a network runs twice."""
    first, twice, relu = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
    plain = nn.Sequential(first, relu, twice, relu, twice, relu, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    model = gzoo.convert(plain, "p4").eval()
    twin = to_escnn(model)
    x = random_image(1, (9, 9)).float()
    for network in (twin, from_escnn(twin)):
        assert network[2] is network[4]
        assert relative_error(network(x), model(x)) < 1e-5
    enn, field_type = _escnn.load().nn, groups.get("p4").field_type(2)
    layer, act = enn.R2Conv(field_type, field_type, 3, padding=1), enn.ReLU(field_type)
    sequence = enn.SequentialModule(layer, act, layer, act).eval()
    y = random_image(8, (9, 9)).float()
    assert relative_error(from_escnn(sequence)(y), sequence(enn.GeometricTensor(y, field_type)).tensor) < 1e-5


def test_what_escnn_gives_can_be_checked():
    twin = to_escnn(timm.create_model("p4_cnn7").eval())
    twin.train().eval()  # escnn then keeps filters with the graph that made them
    assert gzoo.check(twin, 28, dtype=torch.float32).worst < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_of_half_precision_become_ones_of_escnn(dtype):
    model = timm.create_model("p4_cnn7").eval().to(dtype)
    assert all(p.dtype == dtype for p in to_escnn(model).parameters())


def test_a_network_without_layers_of_escnn_is_refused():
    with pytest.raises(ValueError, match="Equivarified has no layer that escnn has"):
        to_escnn(gzoo.equivarify(timm.create_model("test_resnet"), "p4"))


def test_a_plain_network_is_refused():
    with pytest.raises(ValueError, match=r"StagedCNN is not equivariant; convert it with gzoo.convert first"):
        to_escnn(timm.create_model("cnn7"))


def test_the_signature_follows_the_basis():
    model = nn.Sequential(LiftingConv2d(groups.get("p4"), 1, 2, 3, basis="steerable"))
    make_equivariant(model, (groups.get("p4"),), "mean")
    assert from_escnn(to_escnn(model), "steerable").state_dict()["group_signature"].tolist() == [4, 0, 1]
    assert from_escnn(to_escnn(model), "steerable_3r").state_dict()["group_signature"].tolist() == [4, 0, 2]
    assert from_escnn(to_escnn(model)).state_dict()["group_signature"].tolist() == [4, 0, 0]


# --- networks that somebody wrote in escnn ---


def sequential(group, pools=True):
    G = groups.get(group)
    image, narrow, wide = G.image_type(3), G.field_type(2), G.field_type(4)
    layers = [enn().R2Conv(image, narrow, 5, padding=2), enn().InnerBatchNorm(narrow), enn().ReLU(narrow, inplace=True)]
    if pools:
        layers += [enn().PointwiseMaxPool(narrow, 3, 2, 1), enn().PointwiseAvgPool(narrow, 2, 1)]
    layers += [
        enn().R2Conv(narrow, wide, 3, padding=1, stride=2, bias=False),
        enn().InnerBatchNorm(wide),
        enn().ELU(wide, 0.5),
    ]
    layers += [enn().PointwiseDropout(wide, 0.3), enn().PointwiseAdaptiveAvgPool(wide, 1), enn().GroupPooling(wide)]
    return with_random_numbers(enn().SequentialModule(*layers))


def with_random_numbers(network):
    """Random biases and statistics, float32, in eval mode."""
    with torch.no_grad():
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            if name.split(".")[-1] in ("bias", "weight", "running_mean", "running_var"):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return network.eval()


def run(network, x):
    with torch.no_grad():
        return network(enn().GeometricTensor(x, network.in_type)).tensor


@pytest.mark.parametrize(
    ("group", "basis"),
    [
        ("c1", "pixel"),
        ("d1", "steerable"),
        ("c2", None),
        ("p4", "steerable"),
        ("p4m", None),
        ("c8", None),
        ("c6", None),
    ],
)
def test_a_sequential_module_becomes_a_sequential_of_plain_tensors(group, basis):
    theirs = sequential(group)
    symmetric, original = from_escnn(theirs, basis), from_escnn(theirs, basis, strides="original")
    assert not modules(symmetric, enn().EquivariantModule)
    for size, fits in ((15, True), (19, True), (16, False), (17, False)):  # the strided windows fit 15 -> 8 -> 7 -> 4
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            assert relative_error(original(x), run(theirs, x)) < 1e-5
            assert (relative_error(symmetric(x), run(theirs, x)) < 1e-5) == fits


@pytest.mark.parametrize("group", ["p4", "d1", "c6"])
def test_a_network_of_regular_quotient_and_trivial_fields_becomes_one_of_plain_tensors(group):
    G = groups.get(group)
    half = G.subgroups[1].name  # d1 has none between
    image, mixed, out = (G.quotient_type(f) for f in ({group: 3}, {half: 2, "c1": 1}, {group: 2, "c1": 1}))
    theirs = with_random_numbers(
        enn().SequentialModule(
            *(enn().R2Conv(image, mixed, 5), enn().InnerBatchNorm(mixed), enn().ReLU(mixed)),
            *(enn().PointwiseMaxPool(mixed, 2), enn().R2Conv(mixed, out, 3, stride=2), enn().InnerBatchNorm(out)),
            *(enn().ELU(out), enn().R2Conv(out, G.field_type(1), 1), enn().GroupPooling(G.field_type(1))),
        )
    )
    ours = from_escnn(theirs)
    assert not modules(ours, enn().EquivariantModule)
    assert [type(layer) for layer in modules(ours, QuotientNorm, GroupConv2d)] == [QuotientNorm, QuotientNorm]
    x = torch.randn(2, 3, 18, 18)  # 18 -> 14 -> 7 -> 3
    with torch.no_grad():
        assert relative_error(ours(x), run(theirs, x)) < 1e-5
    assert check(nn.Sequential(ours, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 17).worst < 1e-12


@pytest.mark.parametrize("group", ["p4", "p4m"])
def test_symmetric_strides_make_it_exact_and_original_ones_do_not(group):
    theirs = sequential(group)
    for size, fits in ((15, True), (16, False), (17, False)):
        errors = [
            check(nn.Sequential(from_escnn(theirs, strides=strides), nn.Flatten()), size).worst
            for strides in ("symmetric", "original")
        ]
        assert errors[0] < 1e-12
        assert (errors[1] < 1e-12) == fits


def users_network(group):
    """Of classes of a user's own: plain tensors in and out, geometric ones inside."""

    class Block(enn().EquivariantModule):
        def __init__(self, in_type, out_type):
            super().__init__()
            self.in_type, self.out_type = in_type, out_type
            self.body = enn().SequentialModule(
                enn().R2Conv(in_type, out_type, 3, padding=1, stride=2),
                enn().InnerBatchNorm(out_type),
                enn().ReLU(out_type),
                enn().R2Conv(out_type, out_type, 3, padding=1, bias=False),
            )
            self.shortcut = enn().R2Conv(in_type, out_type, 1, stride=2, bias=False)
            self.relu = enn().ReLU(out_type)

        def forward(self, x):
            return self.relu(self.body(x) + self.shortcut(x))

        def evaluate_output_shape(self, input_shape):
            raise NotImplementedError

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            G = groups.get(group)
            self.in_type, self.norm = G.image_type(1), enn().InnerBatchNorm(G.image_type(1))
            self.stem = enn().SequentialModule(
                enn().R2Conv(self.in_type, G.field_type(2), 3), Block(G.field_type(2), G.field_type(3))
            )
            self.pool = enn().GroupPooling(G.field_type(3))
            self.fc = nn.Linear(3, 4)

        def forward(self, x):
            y = self.pool(self.stem(self.norm(enn().GeometricTensor(x, self.in_type))))
            return self.fc(y.tensor.mean((2, 3)))

    return with_random_numbers(Network())


@pytest.mark.parametrize("group", ["p4m", "c8"])
def test_a_network_of_a_users_own_classes_keeps_its_code(group):
    theirs = users_network(group)
    ours = from_escnn(theirs)
    assert type(ours) is type(theirs)
    assert not modules(ours, enn().R2Conv, enn().InnerBatchNorm, enn().ReLU, enn().GroupPooling)
    original = from_escnn(theirs, strides="original")
    for size, fits in ((9, True), (11, True), (10, False)):
        x = torch.randn(2, 1, size, size)
        with torch.no_grad():
            assert relative_error(original(x), theirs(x)) < 1e-5
            assert (relative_error(ours(x), theirs(x)) < 1e-5) == fits


@pytest.mark.parametrize(
    ("larger", "part"), [("p4m", (None, 4)), ("p4m", (0, 1)), ("p4", 2), ("d8", (0, 4)), ("p4", 1)]
)
def test_a_restriction_between_layers_keeps_escnns_order_of_channels(larger, part):
    fields = groups.get(larger).field_type(3)
    restriction = enn().RestrictionModule(fields, part)
    disentangle = enn().DisentangleModule(restriction.out_type)
    middle = disentangle.out_type
    out = enn().FieldType(middle.gspace, 2 * [middle.gspace.regular_repr])
    layers = [enn().ReLU(middle), enn().InnerBatchNorm(middle), enn().R2Conv(middle, out, 3, padding=1)]
    theirs = with_random_numbers(enn().SequentialModule(restriction, disentangle, *layers))
    ours = from_escnn(theirs)
    assert modules(ours, Restriction)
    x = random_fields(larger, 3, (6, 7)).float()
    assert relative_error(ours(x), run(theirs, x)) < 1e-5
    assert from_escnn(enn().SequentialModule(restriction, enn().ReLU(restriction.out_type)))(x).equal(x.relu())


def test_a_user_restricts_between_blocks():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            fields = groups.get("d8").field_type(2)
            self.lift = enn().R2Conv(groups.get("d8").image_type(1), fields, 3)
            self.restrict = enn().RestrictionModule(fields, (0, 4))
            self.conv = enn().R2Conv(self.restrict.out_type, groups.get("d4").field_type(2), 3)

        def forward(self, x):
            return self.conv(self.restrict(self.lift(enn().GeometricTensor(x, self.lift.in_type)))).tensor

    theirs, x = Network().eval(), random_image(1, (7, 8)).float()
    assert relative_error(from_escnn(theirs)(x), theirs(x)) < 1e-5


@pytest.mark.parametrize("name", ["PointwiseAvgPoolAntialiased", "PointwiseMaxPoolAntialiased"])
def test_antialiased_pools_are_escnns_where_they_fit_and_exact_elsewhere(name):
    G = groups.get("p4")
    options = {"sigma": 0.6, "stride": 2} | ({"kernel_size": 3, "padding": 1} if "Max" in name else {})
    theirs = getattr(enn(), name)(G.field_type(2), **options)
    ours = from_escnn(theirs)
    x = random_fields("p4", 2, (9, 11)).float()
    assert relative_error(ours(x), run(theirs, x)) < 1e-5
    assert modules(ours, SymmetricBlur2d)
    even = random_fields("p4", 2, (8, 6)).float()
    assert relative_error(from_escnn(theirs, strides="original")(even), run(theirs, even)) < 1e-5
    for maps in (x.double(), even.double()):
        y = ours.double()(maps)
        for g in G.grid_elements:
            assert relative_error(ours(G.transform_features(maps, g)), G.transform_features(y, g)) < 1e-12


@pytest.mark.parametrize("function", ["p_relu", "p_elu", "p_sigmoid", "p_tanh"])
def test_pointwise_nonlinearities_are_torchs(function):
    theirs = enn().PointwiseNonLinearity(groups.get("p4").field_type(2), function)
    x = random_fields("p4", 2)
    assert from_escnn(theirs)(x).equal(run(theirs, x))


def test_a_filter_beyond_the_default_band_is_held_by_pixels_and_refused_elsewhere():
    p4, c8 = groups.get("p4"), groups.get("c8")
    options = {"padding": 1, "bias": False, "rings": [0.0, 1.0, 1.4], "frequencies_cutoff": 3.0}
    theirs = enn().SequentialModule(enn().R2Conv(p4.image_type(1), p4.field_type(2), 3, **options))
    x = random_image(1).float()
    assert relative_error(from_escnn(theirs)(x), run(theirs, x)) < 1e-5
    with pytest.raises(ValueError, match=r"0: the filters differ by .* than that basis; .* and basis='pixel'"):
        from_escnn(theirs, "steerable")
    with pytest.raises(ValueError, match=r"than that basis; .* basis='steerable_3r' for \S+ r: 3 \* r$"):
        from_escnn(enn().R2Conv(c8.image_type(1), c8.field_type(2), 3, **options))


def unknown():
    """Modules without a counterpart, and what an error says of them."""
    G = groups.get("p4")
    gspace, fields = G.gspace, G.field_type(2)
    irreps = enn().FieldType(gspace, [gspace.irrep(1)])
    p4m = groups.get("p4m").gspace
    diagonal = enn().FieldType(p4m, [p4m.quotient_repr((1, 1))])
    scattered = enn().FieldType(gspace, [gspace.regular_repr, gspace.trivial_repr, gspace.regular_repr])
    restricted = enn().RestrictionModule(groups.get("p4m").field_type(1), (None, 4)).out_type
    so2 = _escnn.load().gspaces.rot2dOnR2(-1, maximum_frequency=1)
    tilted = _escnn.load().gspaces.flipRot2dOnR2(4, axis=0.3)
    return {
        "irreps": (enn().R2Conv(fields, irreps, 3), "is an escnn R2Conv of type .* each kind in one run, .* no irreps"),
        "axis of a quotient": (enn().InnerBatchNorm(diagonal), "InnerBatchNorm of type .* with the default axis"),
        "scattered": (enn().ReLU(scattered), "is an escnn ReLU of type .* each kind in one run"),
        "restricted": (
            enn().R2Conv(restricted, G.image_type(2), 1),
            "R2Conv to .*; of restricted fields gzoo makes regular ones only",
        ),
        "groups": (
            enn().R2Conv(G.quotient_type({"c2": 2}), G.quotient_type({"c2": 2}), 3, groups=2),
            "R2Conv with groups=2; QuotientConv2d has groups=1 only",
        ),
        "norm pool": (enn().NormMaxPool(fields, 2), "is an escnn NormMaxPool of type .* no layer for; it has .*R2Conv"),
        "SO(2)": (
            enn().IdentityModule(enn().FieldType(so2, [so2.trivial_repr])),
            r"gzoo knows the gspaces rot2dOnR2\(N\)",
        ),
        "axis": (enn().ReLU(enn().FieldType(tilted, [tilted.regular_repr])), "with their default axis"),
    }


@pytest.mark.parametrize(
    "case", ["irreps", "axis of a quotient", "scattered", "restricted", "groups", "norm pool", "SO(2)", "axis"]
)
def test_a_module_without_a_counterpart_is_named(case):
    module, message = unknown()[case]
    with pytest.raises(ValueError, match=f"the network .*{message}|the network {message}"):
        from_escnn(module)
    with pytest.raises(ValueError, match=r"^1 is an escnn"):
        from_escnn(nn.Sequential(nn.Identity(), module))


def test_unknown_strides_are_refused():
    with pytest.raises(ValueError, match="strides is 'plain'; accepted are 'symmetric' and 'original'"):
        from_escnn(enn().IdentityModule(groups.get("p4").field_type(1)), strides="plain")
