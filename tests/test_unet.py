"""Networks with an output at every pixel: rotate the image, and the mask rotates with it."""

import copy
import re
import warnings
from unittest.mock import patch

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import get_pretrained_cfg
from timm.models._manipulate import checkpoint, group_parameters
from torch import Tensor, nn

import gzoo
from gzoo import groups
from gzoo.backbones import UNet
from gzoo.cli import main
from gzoo.nn import GroupConv2d, InvariantConv2d
from tests.conftest import random_image, with_random_statistics, worst_error

NAMES = ("p4_unet", "p4m_unet", "c8_unet")
SIZES = ((16, 16), (17, 17), (13, 18))  # three levels halve twice: 17 and 13 leave odd maps on the way
WIDTHS = (4, 6, 8)


def small(name: str = "p4m_unet", **options) -> nn.Module:
    """A float64 U-Net of three levels, in eval mode, with random norms and biases."""
    return with_random_statistics(timm.create_model(name, widths=WIDTHS, **options)).eval()


# The U-Net


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_the_mask_moves_with_the_image_in_value_and_gradient(name, size):
    assert worst_error(small(name), name.split("_")[0], random_image(3, size), "image", "image") < 1e-12


def test_the_classes_of_a_turned_image_are_the_turned_classes():
    model, group, x = small(num_classes=5), groups.get("p4m"), random_image(3, (21, 30))
    with torch.no_grad():  # fresh weights prefer one class everywhere
        model.head.bias.sub_(model(x).mean((0, 2, 3)))
    mask = model(x).argmax(1)
    assert len(mask.unique()) > 1
    for g in range(group.order):
        assert torch.equal(model(group.transform_image(x, g)).argmax(1), group.transform_image(mask, g))


def test_a_plain_unet_is_not_equivariant():
    assert gzoo.check(small("unet"), 16, groups.get("p4")).worst > 0.1


@pytest.mark.parametrize("size", [(4, 4), (5, 7), *SIZES])
@pytest.mark.parametrize("name", ["unet", "p4m_unet"])
def test_the_logits_have_the_size_of_the_image(name, size):
    assert small(name, num_classes=3, in_chans=2)(random_image(2, size)).shape == (2, 3, *size)


def test_the_full_size_networks_have_the_parameters_of_the_plain_one():
    plain, *others = (sum(p.numel() for p in timm.create_model(name).parameters()) for name in ("unet", *NAMES))
    assert all(abs(other / plain - 1) < 0.1 for other in others)


def test_the_classifier_of_each_pixel_pools_over_the_group():
    model = small(num_classes=7)
    assert isinstance(model.get_classifier(), InvariantConv2d)
    assert model.get_classifier() is model.get_submodule(get_pretrained_cfg("p4m_unet").classifier)
    assert model.get_classifier().out_type == groups.get("p4m").image_type(7)


def test_a_reset_classifier_is_invariant_where_it_stands_and_0_classes_give_regular_fields():
    model = small()
    model.reset_classifier(4)
    assert model(random_image(3)).shape == (2, 4, 5, 5)
    assert worst_error(model, "p4m", random_image(3, (9, 12)), "image", "image") < 1e-12
    model.reset_classifier(0)
    assert model(random_image(3)).shape == (2, model.num_features, 5, 5)
    assert worst_error(model, "p4m", random_image(3, (9, 12)), "image", "fields") < 1e-12


def test_a_pooled_unet_is_refused():
    with pytest.raises(ValueError, match="global_pool is 'avg'; a U-Net gives logits at every pixel"):
        UNet(WIDTHS).reset_classifier(3, "avg")


def test_the_features_are_the_levels_of_the_expanding_path():
    model = small(features_only=True)
    assert model.feature_info.reduction() == [1, 2, 4]
    levels = model(random_image(3, (13, 18)))
    assert [tuple(y.shape[2:]) for y in levels] == [(13, 18), (6, 9), (3, 4)]
    assert [y.shape[1] for y in levels] == model.feature_info.channels()
    assert isinstance(model.model.get_classifier(), nn.Identity)
    (coarsest,) = small(features_only=True, out_indices=(2,))(random_image(3, (13, 18)))
    assert coarsest.shape == levels[2].shape


def test_recomputed_levels_give_the_same_gradient():
    model, x = small(), random_image(3, (17, 16))
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        with patch("gzoo.backbones.unet.checkpoint", wraps=checkpoint) as recomputed:
            model(x).square().sum().backward()
        assert recomputed.call_count == 5 * enable
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_layer_decay_goes_down_the_expanding_path_before_the_contracting_one():
    model = small()
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    order = sorted((name for name in layers if name.endswith(".0.weight")), key=layers.__getitem__)
    assert order == [f"{stage}.0.weight" for stage in ("encoder.0", "encoder.1", "encoder.2", "decoder.1", "decoder.0")]
    assert layers["head.weight"] == max(layers.values()) > layers["decoder.0.0.weight"]


def test_dropout_is_at_the_lowest_level_in_training_only():
    model, x = small(drop_rate=0.5), random_image(3)
    assert torch.equal(model(x), model(x))
    model.drop.train()
    assert not torch.equal(model(x), model(x))


def test_one_training_step_lowers_the_loss_and_keeps_the_symmetry():
    model = small().train()
    x, mask = random_image(3, (12, 15)), torch.randint(2, (2, 12, 15))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = F.cross_entropy(model(x), mask)
    before.backward()
    optimizer.step()
    with torch.no_grad():
        assert F.cross_entropy(model(x), mask) < before
    assert gzoo.check(model, (12, 15)).worst < 1e-12


def test_a_unet_compiles_to_one_graph():
    model, x = small().float(), random_image(3, (13, 18)).float()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


# The check


def test_the_check_holds_a_map_of_logits_to_move_like_an_image():
    report = gzoo.check(small(num_classes=8), (9, 12))  # as many logits as |G|: they could be taken for one field
    assert list(report.errors) == ["stage 0", "stage 1", "stage 2", "logits"]
    assert report.worst < 1e-12


def test_the_check_exposes_logits_that_are_regular_fields_behind_a_pooled_classifier():
    model = small(num_classes=8)
    model.head = nn.Sequential(model.head, nn.Conv2d(8, 8, 3, padding=1).double())
    assert max(gzoo.check(model, 9).errors["logits"].values()) > 0.01


def test_gzoo_check_passes_the_unet(capsys):
    assert main(["check", "p4m_unet", "--size", "16", "9x12"]) == 0
    assert "p4m_unet: worst error" in capsys.readouterr().out


def test_gzoo_check_fails_a_plain_unet(capsys):
    assert main(["check", "unet", "--group", "p4m", "--size", "9"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_gzoo_check_fails_a_unet_whose_pool_drops_the_last_row(monkeypatch, capsys):
    broken = small()
    broken.pool = nn.MaxPool2d(2)
    monkeypatch.setattr("gzoo.predict.load_model", lambda *args: broken)
    assert main(["check", "p4m_unet", "--size", "16"]) == 0
    assert main(["check", "p4m_unet", "--size", "16", "17"]) == 1
    assert "FAILED" in capsys.readouterr().out


# Networks of one's own, without timm's calls


class Own(nn.Module):
    """Two levels; ``enlarge`` brings the lower map to the size of the upper, ``end`` is what follows both."""

    def __init__(self, enlarge, end: nn.Module) -> None:
        super().__init__()
        self.enlarge = enlarge
        self.fine = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.coarse = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.joined = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.ReLU())
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        return self.end(self.joined(torch.cat((fine, self.enlarge(self.up(self.coarse(fine)), fine)), 1)))


def resized(x: Tensor, skip: Tensor) -> Tensor:
    return F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)


def wider(x: Tensor, skip: Tensor) -> Tensor:
    return resized(F.pad(x, (0, skip.shape[3] - x.shape[3])), skip)


LOGITS = {
    "a 1x1 convolution": lambda: nn.Conv2d(8, 5, 1),
    "and a sigmoid": lambda: nn.Sequential(nn.Dropout(0.1), nn.Conv2d(8, 5, 1), nn.Sigmoid()),
    "and a softmax": lambda: nn.Sequential(nn.Conv2d(8, 5, 1, bias=False), nn.Softmax(dim=1)),
    "and a tanh": lambda: nn.Sequential(nn.Conv2d(8, 5, 1), nn.Tanh()),
    "and a resize": lambda: nn.Sequential(nn.Conv2d(8, 5, 1), nn.Upsample(scale_factor=2, mode="bilinear")),
    "a 3x3 convolution": lambda: nn.Conv2d(8, 5, 3, padding=1),
    "1x1, pool": lambda: nn.Sequential(nn.Conv2d(8, 5, 1), nn.MaxPool2d(2)),
}


@pytest.mark.parametrize("end", LOGITS)
def test_a_convolution_that_makes_the_output_gives_invariant_logits(end):
    model = with_random_statistics(gzoo.convert(Own(resized, LOGITS[end]()), "p4m")).eval()
    for size in SIZES:
        assert model(random_image(3, size)).shape[1] == 5
        assert worst_error(model, "p4m", random_image(3, size), "image", "image") < 1e-12
    assert gzoo.check(model, (9, 12)).worst < 1e-12


def test_a_map_in_a_dictionary_is_the_output_all_the_same():
    """As in torchvision's networks for segmentation."""

    class Named(Own):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"out": super().forward(x).float()}

    model = gzoo.convert(Named(resized, nn.Conv2d(8, 5, 1)), "p4m").eval()
    x = random_image(3).float()
    y, turned = model(x)["out"], model(x.rot90(1, (2, 3)))["out"]
    assert y.shape[1] == 5
    torch.testing.assert_close(turned, y.rot90(1, (2, 3)), rtol=1e-4, atol=1e-5)


FEATURES = {
    "3x3, norm": lambda: nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)),
    "1x1, norm": lambda: nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)),
    "1x1, activation": lambda: nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(inplace=True)),
}


@pytest.mark.parametrize("end", FEATURES)
def test_a_network_that_ends_otherwise_gives_regular_fields(end):
    plain = Own(resized, FEATURES[end]())
    with pytest.warns(UserWarning, match=r"of Own ends in a norm, .* as in classifier=\['end.0'\]; classifier='' says"):
        model = gzoo.convert(plain, "p4m")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # not where it is said
        gzoo.convert(plain, "p4m", classifier="")
    model = with_random_statistics(model).eval()
    assert worst_error(model, "p4m", random_image(3, (9, 12)), "image", "fields") < 1e-12
    assert gzoo.check(model, (9, 12)).worst < 1e-12


@pytest.mark.parametrize("end", [[], [nn.AdaptiveAvgPool2d(1), nn.Flatten()]], ids=["map", "pooled"])
def test_a_classifier_that_is_the_first_layer_lifts_and_pools(end):
    model = gzoo.convert(nn.Sequential(nn.Conv2d(3, 5, 1), *end), "p4m")
    assert gzoo.check(model, (9, 12)).worst < 1e-12
    assert model(random_image(3).float()).shape[1] == 5


def test_the_classifier_can_be_named():
    plain = Own(resized, nn.Conv2d(8, 5, 3, padding=1))
    model = with_random_statistics(gzoo.convert(plain, "p4", classifier="end")).eval()
    assert model(random_image(3)).shape == (2, 5, 5, 5)
    assert worst_error(model, "p4", random_image(3, (9, 12)), "image", "image") < 1e-12
    assert gzoo.check(model, (9, 12)).worst < 1e-12


def test_without_a_classifier_the_output_is_regular_fields():
    model = with_random_statistics(gzoo.convert(Own(resized, nn.Conv2d(8, 5, 1)), "p4", classifier="")).eval()
    assert isinstance(model.end, GroupConv2d)
    assert worst_error(model, "p4", random_image(3, (9, 12)), "image", "fields") < 1e-12


@pytest.mark.parametrize("path", ["ends", "joined.1", ["end", "ends"], nn.Linear(8, 5)])
def test_a_classifier_that_is_no_layer_is_refused(path):
    named = path[1] if isinstance(path, list) else path
    with pytest.raises(
        ValueError, match=f"classifier is {re.escape(repr(named))}; Own has no convolution or Linear of that path"
    ):
        gzoo.convert(Own(resized, nn.Conv2d(8, 5, 1)), "p4", classifier=path)


def test_a_pad_of_one_axis_of_the_expanding_path_is_found():
    with pytest.raises(ValueError, match=r"^joined\.0 \(GroupConv2d\) is not equivariant under p4 at 65x65 pixels"):
        gzoo.convert(Own(wider, nn.Conv2d(8, 5, 1)), "p4")


def test_a_softmax_over_pixels_is_found():
    end = nn.Sequential(nn.Conv2d(8, 5, 1), nn.Softmax(dim=3))
    with pytest.raises(ValueError, match="is not equivariant under p4"):
        gzoo.convert(Own(resized, end), "p4")


class Pyramid(nn.Module):
    """A feature pyramid network over timm's ResNet: laterals, sums from the top down, logits from all levels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = timm.create_model("resnet10t", features_only=True, out_indices=(1, 2, 3))
        self.laterals = nn.ModuleList(nn.Conv2d(width, 16, 1) for width in self.body.feature_info.channels())
        self.smooth = nn.Conv2d(16, 16, 3, padding=1)
        self.logits = nn.Conv2d(48, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [lateral(y) for lateral, y in zip(self.laterals, self.body(x), strict=True)]
        for i in (1, 0):
            maps[i] = maps[i] + resized(maps[i + 1], maps[i])
        merged = torch.cat([resized(self.smooth(y), maps[0]) for y in maps], 1)
        return resized(self.logits(merged.relu()), x)


def test_a_feature_pyramid_network_over_a_timm_backbone_converts():
    model = with_random_statistics(gzoo.convert(Pyramid(), "p4", "flops")).eval()
    for size in ((33, 33), (32, 45)):
        assert model(random_image(3, size, 1)).shape == (1, 4, *size)
        assert gzoo.check(model, size).worst < 1e-12


def test_a_copy_of_a_unet_gives_the_same():
    model = small()
    x = random_image(3)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
