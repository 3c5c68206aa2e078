"""A reparameterized network is the same function and as equivariant; what cannot be merged is refused."""

import copy

import pytest
import timm
import torch
from timm.layers import LayerNorm2d
from timm.models import reparameterize_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.ghostnet import GhostNet
from timm.models.lcnetv2 import LCNetV2
from timm.models.repghost import RepGhostNet
from torch import nn

import gzoo
from gzoo.check import relative_error
from gzoo.convert import randomized
from gzoo.nn import GroupConv2d, LiftingConv2d
from gzoo.nn.merged import MergedConv2d
from tests.conftest import random_image


def of_blocks(kind):
    blocks = tuple(ByoBlockCfg(type=kind, d=2, c=16, s=2, gs=groups) for groups in (0, 1, 0))
    return ByobNet(ByoModelCfg(blocks=blocks, stem_type=kind, stem_chs=16), num_classes=5)


def of_timm(name, **widths):
    return lambda: timm.create_model(name, num_classes=5, **widths)


GHOST = [[[3, 16, 16, 0, 1]], [[3, 48, 24, 0, 2]], [[3, 72, 24, 0.25, 1]], [[5, 72, 40, 0.25, 2]]]
FASTVIT = {"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32)}
NETS = {
    "repvgg": lambda: of_blocks("rep"),
    "mobileone": lambda: of_blocks("one"),
    "fastvit": of_timm("fastvit_t8", **FASTVIT),
    "fastvit, attention": of_timm("fastvit_sa12", **FASTVIT),
    "repvit": of_timm("repvit_m0_9", embed_dim=(16, 16, 32, 32), depth=(1, 1, 1, 1)),
    "repvit, legacy": of_timm("repvit_m1", embed_dim=(16, 16, 32, 32), depth=(1, 1, 1, 1)),
    "repghost": lambda: RepGhostNet(GHOST, num_classes=5, width=0.5),
    "ghostnet v3": lambda: GhostNet(GHOST, num_classes=5, width=0.5, version="v3"),
    "lcnet v2": lambda: LCNetV2(depths=(1, 1, 1, 1), scale=0.25, num_classes=5, head_hidden_size=32),
}
FAMILIES = [
    ("repvgg", "p4m:p4"),
    ("repvgg", "c8"),
    ("mobileone", "d8"),
    ("fastvit", "p4"),
    ("fastvit", "c8"),
    ("fastvit, attention", "c2"),
    ("repvit", "p4m"),
    ("repvit, legacy", "c8"),
    ("repghost", "p4m"),
    ("ghostnet v3", "p4"),
    ("lcnet v2", "p4m"),
]


def merged(model):
    return [module for module in model.modules() if isinstance(module, MergedConv2d)]


def convolutions(model):
    kinds = (nn.Conv2d, GroupConv2d, LiftingConv2d, MergedConv2d)
    return sum(isinstance(module, kinds) for module in model.modules())


@pytest.mark.parametrize(("name", "group"), FAMILIES)
def test_the_same_function_with_as_many_convolutions_as_timm_leaves(name, group):
    plain = NETS[name]()
    model, _ = randomized(gzoo.convert(plain, group))
    before = copy.deepcopy(model.state_dict())
    new = gzoo.reparameterize(model)
    assert convolutions(new) == convolutions(reparameterize_model(plain))
    assert len(list(new.modules())) < len(list(model.modules()))
    assert merged(new)
    assert not any(list(layer.parameters()) for layer in merged(new))
    image = random_image(3, (64, 49)).requires_grad_()
    gradients = []
    for network in (model, new):
        (gradient,) = torch.autograd.grad(network(image).square().sum(), image)
        gradients.append(gradient)
    assert relative_error(new(image), model(image)) < 1e-9
    assert relative_error(gradients[1], gradients[0]) < 1e-8
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("size", [(64, 64), (65, 48)])
def test_it_is_exactly_equivariant(size):
    model = gzoo.convert(of_blocks("rep"), "p4m")
    new = gzoo.reparameterize(randomized(model)[0])
    assert gzoo.check(new, size=size).worst < 1e-11
    broken = copy.deepcopy(new)
    merged(broken)[2].filters[0, 0, 0, 0] += 1
    assert gzoo.check(broken, size=size).worst > 1e-6
    lifting, first, *_ = merged(new)
    assert (lifting.in_type.size, lifting.out_type) == (3, first.in_type)


def test_a_transferred_network_keeps_its_function():
    model, _ = randomized(gzoo.convert(of_blocks("rep").eval(), "p4", weights="transfer"))
    image = random_image(3, (49, 64))
    assert relative_error(gzoo.reparameterize(model)(image), model(image)) < 1e-11


def test_twice_is_once_and_other_networks_stay_as_they_are():
    model = gzoo.reparameterize(gzoo.convert(of_blocks("one"), "c2"))
    again = gzoo.reparameterize(model)
    image = torch.rand(1, 3, 32, 32)
    assert len(merged(again)) == len(merged(model)) > 0
    assert torch.equal(again(image), model(image))
    resnet = timm.create_model("p4_resnet20")
    assert gzoo.reparameterize(resnet).state_dict().keys() == resnet.state_dict().keys()
    assert resnet.training


def test_plain_partial_and_soft_networks_are_refused():
    with pytest.raises(ValueError, match=r"not equivariant; use timm\.models\.reparameterize_model"):
        gzoo.reparameterize(timm.create_model("resnet18"))
    for option in ("partial", "soft"):
        with pytest.raises(ValueError, match="partial or soft"):
            gzoo.reparameterize(timm.create_model("p4_cnn7", **{option: True}))
    with pytest.raises(ValueError, match="partial or soft"):
        gzoo.reparameterize(timm.create_model("se2_resnet", width=2, elements=4, partial=True))


def test_a_network_of_merged_convolutions_alone_is_checked_as_maps():
    merged = gzoo.reparameterize(gzoo.convert(of_blocks("rep"), "p4", classifier=""))
    assert gzoo.check(merged, 9).worst < 1e-12


def with_norms(layer):
    """RepVGG blocks with norms of another kind, converted."""
    plain = of_blocks("rep")
    for path, module in list(plain.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            plain.set_submodule(path, layer(module.num_features))
    return gzoo.convert(plain, "c2")


def test_norms_without_affine_parameters_merge_too():
    model, _ = randomized(with_norms(lambda width: nn.BatchNorm2d(width, affine=False)))
    image = random_image(3, (33, 48))
    assert relative_error(gzoo.reparameterize(model)(image), model(image)) < 1e-11


@pytest.mark.parametrize("layer", [LayerNorm2d, lambda width: nn.BatchNorm2d(width, track_running_stats=False)])
def test_norms_that_follow_the_image_are_refused(layer):
    model = with_norms(layer)
    with pytest.raises(ValueError, match=r"stem: its .*Norm2d is no fixed scale and shift"):
        gzoo.reparameterize(model)
    model.stem = nn.Identity()
    with pytest.raises(ValueError, match=r"stages\.0\.0: its .*Norm2d is no fixed"):
        gzoo.reparameterize(model)
    model.stages[0][0] = nn.Identity()
    with pytest.raises(ValueError, match=r"stages\.0\.1: its .*Norm2d is no fixed"):  # the identity comes first
        gzoo.reparameterize(model)


def test_plain_branches_inside_an_equivariant_network_are_refused():
    with pytest.raises(ValueError, match=r"net\.stem: its branches are of Conv2d, not of gzoo's convolutions"):
        gzoo.reparameterize(gzoo.equivarify(of_blocks("rep"), "p4"))


def test_the_sum_is_made_in_float32_at_least():
    model, _ = randomized(gzoo.convert(of_blocks("one"), "c2"))
    half = copy.deepcopy(model).bfloat16()
    image, exact = random_image(3, (32, 32)), half.double()
    new = gzoo.reparameterize(copy.deepcopy(half).bfloat16()).double()
    assert relative_error(new(image), exact(image)) < 0.004


def test_timms_own_function_says_what_to_use():
    model = gzoo.convert(of_blocks("rep"), "c2")
    with pytest.raises(AttributeError, match=r"use gzoo\.reparameterize\(model\)"):
        reparameterize_model(model)


def test_a_merged_convolution_names_a_wrong_width():
    new = gzoo.reparameterize(gzoo.convert(of_blocks("rep"), "c2"))
    with pytest.raises(ValueError, match="has 4 channels, not 3"):
        new.stem(torch.rand(1, 4, 32, 32))
