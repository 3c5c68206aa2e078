"""The recipe: plain networks become exact, keep what match says, and what cannot be converted is named."""

import copy
import io
import pickle
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import timm
import timm.layers as tl
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from timm.layers.pool2d_same import MaxPool2dSame
from timm.models import edgenext, fastvit, metaformer
from timm.models._efficientnet_blocks import CondConvResidual
from timm.models.efficientvit_mit import LiteMLA
from timm.models.focalnet import FocalNet
from timm.models.ghostnet import GhostNet
from timm.models.inception_v3 import InceptionB, InceptionD
from timm.models.mobilenetv5 import MobileNetV5MultiScaleFusionAdapter
from timm.models.mobilevit import MobileVitV2Block
from timm.models.swiftformer import EfficientAdditiveAttention
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision.models.densenet import _DenseBlock
from torchvision.ops import FrozenBatchNorm2d

import gzoo
from gzoo import groups
from gzoo.check import KeepDouble, in_channels, relative_error
from gzoo.convert import convert_in_place
from gzoo.nn import GroupConv2d, InvariantLinear, LiftingConv2d
from gzoo.nn.functions import Calls, act_symmetrically
from gzoo.plan import plan
from gzoo.rules import RULES
from tests.conftest import GRID_GROUPS, Network, random_image, with_random_statistics, worst_error


class Counting(nn.Module):
    """As tutorials write a ResNet."""

    def __init__(self):
        super().__init__()
        self.in_channels = 16
        self.head = nn.Linear(16, 5)
        self.stem = nn.Conv2d(3, 16, 3)

    def forward(self, x):
        return self.head(self.stem(x).relu().mean((2, 3)))


def conv(width_in, width_out, kernel=3, **options):
    return nn.Conv2d(width_in, width_out, kernel, padding=options.pop("padding", kernel // 2), **options)


def head(width):
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)]


def small(width=24, first=16):
    """The plainest of networks."""
    return nn.Sequential(conv(3, first), nn.BatchNorm2d(first), nn.ReLU(), conv(first, width), nn.ReLU(), *head(width))


def image(size=(9, 9), channels=3):
    return random_image(channels, size)


# What converts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("match", ["params", "flops", "width"])
@pytest.mark.parametrize("group", GRID_GROUPS)
def test_a_converted_sequential_is_invariant_at_every_size(group, match):
    model = with_random_statistics(gzoo.convert(small(8, 8), group, match)).eval()
    for size in ((8, 8), (9, 9), (7, 12)):
        assert gzoo.check(model, size).worst < 1e-12
    assert worst_error(model, group, image(), "image", "invariant") < 1e-12


def test_a_plain_sequential_is_not_invariant():
    assert gzoo.check(with_random_statistics(small()).eval(), 9, group=groups.get("p4")).worst > 1e-3


KINDS = {
    "max pool": lambda: nn.Sequential(conv(3, 8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 16), *head(16)),
    "pool on the image": lambda: nn.Sequential(nn.AvgPool2d(2), conv(3, 16), nn.ReLU(), conv(16, 16), *head(16)),
    "norm on the image": lambda: nn.Sequential(nn.BatchNorm2d(3), conv(3, 16), nn.ReLU(), *head(16)),
    "even kernels": lambda: nn.Sequential(conv(3, 16, 2, stride=2), nn.GELU(), conv(16, 16, 4, stride=3), *head(16)),
    "depthwise": lambda: nn.Sequential(conv(3, 16), nn.SiLU(), conv(16, 16, groups=16), conv(16, 24, 1), *head(24)),
    "grouped": lambda: nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 16, groups=2), *head(16)),
    "group norm": lambda: nn.Sequential(conv(3, 16), nn.GroupNorm(4, 16), nn.ReLU(), *head(16)),
    "instance norm": lambda: nn.Sequential(conv(3, 16), nn.InstanceNorm2d(16, affine=True), nn.ReLU(), *head(16)),
    "hidden linear": lambda: nn.Sequential(
        conv(3, 16), nn.ReLU(), *head(16)[:2], nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 5)
    ),
    "sigmoid at the end": lambda: nn.Sequential(conv(3, 16), nn.ReLU(), *head(16), nn.Dropout(), nn.Sigmoid()),
    "convolution at the end": lambda: nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 5, 1), *head(5)[:2]),
    "adaptive pool of 3x3 and a mean": lambda: Network(
        lambda self, x: self.fc(self.pool(self.conv(x).relu()).mean((2, 3))),
        conv=conv(3, 16),
        pool=nn.AdaptiveAvgPool2d(3),
        fc=nn.Linear(16, 5),
    ),
    "padding modes": lambda: nn.Sequential(
        conv(3, 16, padding_mode="reflect"), nn.ReLU(), conv(16, 16, stride=2, padding_mode="circular"), *head(16)
    ),
    "a convolution at two places": lambda: (
        lambda twice: nn.Sequential(conv(3, 16), nn.ReLU(), twice, nn.ReLU(), twice, *head(16))
    )(conv(16, 16)),
    "a norm at two places": lambda: (
        lambda twice: nn.Sequential(conv(3, 16), twice, nn.ReLU(), conv(16, 16), twice, *head(16))
    )(nn.BatchNorm2d(16)),
    "one slope, and one for each channel": lambda: nn.Sequential(
        conv(3, 16), nn.PReLU(), conv(16, 16), nn.PReLU(16, 0.3), *head(16)
    ),
    "enlarged by a half": lambda: nn.Sequential(
        conv(3, 16, stride=2), nn.Upsample(scale_factor=1.5, mode="bilinear"), nn.ReLU(), conv(16, 16), *head(16)
    ),
    "a counter of channels, and the head defined first": lambda: Counting(),
    "pixels that are cut off beside a number like the width": lambda: Network(
        lambda self, x: self.head(F.interpolate(self.stem(x)[:, :, 1:-1, 1:-1], self.sizes[0], mode="bilinear")),
        stem=conv(3, 8),
        sizes=[8],
        head=nn.Sequential(*head(8)),
    ),
    "local response norm": lambda: nn.Sequential(conv(3, 16), nn.ReLU(), nn.LocalResponseNorm(3, alpha=1.0), *head(16)),
    "gated linear unit": lambda: nn.Sequential(conv(3, 24), nn.GLU(1), conv(12, 16), nn.GLU(dim=1), *head(8)),
    "pool by a power": lambda: nn.Sequential(conv(3, 8), nn.Softplus(), nn.LPPool2d(3, 2), conv(8, 16), *head(16)),
    "maxima put back": lambda: Network(
        lambda self, x: self.head(self.unpool(*self.pool(self.stem(x).relu()), output_size=x.shape)),
        stem=conv(3, 16),
        pool=nn.MaxPool2d(2, return_indices=True),
        unpool=nn.MaxUnpool2d(2),
        head=nn.Sequential(conv(16, 16), *head(16)),
    ),
    "residual": lambda: Network(
        lambda self, x: self.head((self.stem(x) + self.body(self.stem(x))).relu()),
        stem=conv(3, 16),
        body=nn.Sequential(conv(16, 16), nn.BatchNorm2d(16)),
        head=nn.Sequential(*head(16)),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_networks_of_known_layers_convert_to_exact_ones_with_the_same_logits(kind):
    plain = KINDS[kind]().eval()
    model = with_random_statistics(gzoo.convert(plain, "p4m")).eval()
    for size in ((16, 16), (17, 17), (15, 20)):
        assert worst_error(model, "p4m", image(size), "image", "invariant") < 1e-12
    assert model(image()).shape == plain(image().float()).shape


@pytest.mark.parametrize("match", ["params", "flops", "width"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "convnext_atto"])
def test_timm_networks_convert(name, match):
    # Thin, so that the wide match is small too; the zoo's own widths: tests/test_backbones.py.
    thin = {
        "resnet18": {"channels": (8, 8, 16, 16), "stem_width": 8},
        "resnet50": {"channels": (8, 8, 16, 16), "stem_width": 8, "layers": (1, 2, 1, 1)},
        "convnext_atto": {"dims": (8, 8, 16, 16), "depths": (1, 1, 2, 1)},
    }[name]
    plain = timm.create_model(name, num_classes=5, **thin)
    model = with_random_statistics(gzoo.convert(plain, "p4m", match)).eval()
    assert gzoo.check(model, (37, 50)).worst < 1e-12
    assert isinstance(model, type(plain))


# What match keeps ---------------------------------------------------------------------------------------------------


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def deep(width):
    return nn.Sequential(
        conv(3, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width), nn.ReLU(), *head(width)
    )


@pytest.mark.parametrize("group", ["c2", "p4", "d2", "p4m"])
def test_match_params_keeps_the_number_of_parameters(group):
    assert abs(parameters(convert_in_place(deep(96), group)) / parameters(deep(96)) - 1) < 0.05


@pytest.mark.parametrize(("match", "fields"), [("params", 34), ("flops", 12), ("width", 96)])
def test_match_sets_the_number_of_fields(match, fields):
    model = convert_in_place(deep(96), "p4m", match)
    assert model[0].out_fields == model[2].out_fields == fields


def test_match_flops_keeps_the_width_of_the_filters():
    model = convert_in_place(deep(96), "p4m", "flops")
    assert model[2].filter().shape == deep(96)[2].weight.shape


def test_widths_overrule_match():
    model = gzoo.convert(small(), "p4m", widths={16: 3, 24: 5})
    assert (model[0].out_fields, model[3].out_fields) == (3, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": {17: 3}}, r"widths has 17, which is no width of Sequential: \[16, 24\]"),
        ({"widths": {16: 2.5}}, r"widths gives 16 channels 2.5 fields"),
        ({"widths": {16: 0}}, r"widths gives 16 channels 0 fields"),
        ({"group_pool": "Max"}, "a fibre is pooled by 'Max'; accepted are 'mean' and 'max'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        gzoo.convert(small(), "p4", **options)


def test_a_rule_of_the_user_takes_what_sees_the_image_too(monkeypatch):
    class Own(nn.Conv2d):
        pass

    monkeypatch.setitem(RULES, Own, lambda plain, recipe: RULES[nn.Conv2d](plain, recipe))
    model = gzoo.convert(nn.Sequential(Own(3, 16, 3), nn.ReLU(), *head(16)), "p4")
    assert isinstance(model[0], gzoo.nn.LiftingConv2d)


# What a network may do to its images first.
PREPARED = {
    "made float32": lambda x: x.to(torch.float32) / 255,
    "made float32 by keyword": lambda x: x.to(dtype=torch.float32) - x.mean((2, 3), keepdim=True, dtype=torch.float32),
    "optical density": lambda x: -torch.log(x + 1e-3),
    "gray to three channels": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "repeated": lambda x: x[:, :1].repeat(1, 3, 1, 1),
}


@pytest.mark.parametrize("step", PREPARED)
def test_a_network_that_prepares_its_images_converts(step):
    plain = Network(lambda self, x: self.body(PREPARED[step](x)), body=small())
    assert gzoo.check(gzoo.convert(plain, "p4"), 9).worst < 1e-12


def test_one_channel_that_is_expanded_stays_one():
    """As an attention map, or as what a global pooling gives back to each pixel."""

    def run(self, x):
        y = self.a(x)
        everywhere = y.mean((2, 3), keepdim=True).expand(-1, -1, *y.shape[2:])
        return self.c(torch.cat((y * self.b(y).sigmoid().expand_as(y), everywhere), 1))

    model = gzoo.convert(Network(run, a=block(3, 16), b=conv(16, 1, 1), c=conv(32, 5, 1)), "p4m")
    assert model.b(model.a(image().float())).shape[1] == 1
    assert worst_error(with_random_statistics(model).eval(), "p4m", image((9, 12)), "image", "image") < 1e-12


@pytest.mark.parametrize(("wrap", "prefix"), [(torch.compile, "_orig_mod."), (nn.DataParallel, "module.")])
def test_weights_of_a_wrapped_network_say_how_they_load(wrap, prefix):
    model = gzoo.convert(small(), "p4")
    state = wrap(gzoo.convert(small(), "p4")).state_dict()
    with pytest.raises(ValueError, match=f"^the names in this checkpoint begin with '{prefix}', .* give {{key.remove"):
        model.load_state_dict(state)
    model.load_state_dict({key.removeprefix(prefix): value for key, value in state.items()})


def test_a_part_of_a_network_refuses_the_weights_of_another_group():
    """p4 and d2 have tensors of the same shapes."""
    p4, d2 = (nn.ModuleDict({"backbone": gzoo.convert(small(), group)}) for group in ("p4", "d2"))
    with pytest.raises(ValueError, match="this checkpoint is of a d2 network"):
        p4.load_state_dict(d2.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "make", [lambda: gzoo.convert(small(), "c8"), lambda: timm.create_model("se2_resnet", width=4)]
)
def test_half_precision_and_back_keeps_the_filters(make, dtype):
    model = make().eval().to(dtype)
    state = copy.deepcopy(model.float().state_dict())
    x = torch.randn(1, in_channels(model), 16, 16)
    expected = model(x)
    model.to(dtype).bfloat16().float().load_state_dict(state)
    assert model(x).equal(expected)
    assert model.bfloat16()(x.bfloat16()).isfinite().all()


def test_the_group_pool_of_the_classifier_is_the_one_asked_for():
    assert gzoo.convert(small(), "p4", group_pool="max")[-1].group_pool.pool == "max"


def test_over_c1_a_network_keeps_its_parameters():
    assert parameters(gzoo.convert(small(), "c1")) == parameters(small())


# What stays ---------------------------------------------------------------------------------------------------------


def test_the_plain_network_stays_as_it_is():
    plain = timm.create_model("resnet18", num_classes=5, channels=(8, 8, 8, 8), stem_width=8)
    plain.train()
    before, text = copy.deepcopy(plain.state_dict()), repr(plain)
    gzoo.convert(plain, "p4")
    assert repr(plain) == text
    assert plain.training
    assert plain.num_features == 8
    assert list(plain.state_dict()) == list(before)
    assert all(value.equal(before[name]) for name, value in plain.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in plain.modules())


def test_the_converted_network_keeps_no_hooks():
    model = gzoo.convert(small(), "p4")
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(training):
    model = gzoo.convert(small().train(training), "p4")
    assert all(module.training == training for module in model.modules())


def test_the_dtype_is_kept():
    assert {p.dtype for p in gzoo.convert(small().double(), "p4").parameters()} == {torch.float64}


def test_the_first_convolution_lifts_and_the_classifier_is_invariant():
    model = gzoo.convert(small(), "p4")
    assert type(model[0]) is LiftingConv2d
    assert type(model[3]) is GroupConv2d
    assert type(model[-1]) is InvariantLinear


def test_a_converted_network_says_its_group():
    model = gzoo.convert(small(), "d4")
    assert model.group == groups.get("p4m")
    assert model.group_name == "p4m"


def test_weights_keep_the_size_of_the_plain_ones_for_their_fan_in():
    plain = deep(96)
    model = convert_in_place(copy.deepcopy(plain), "p4")
    for i in (0, 2, 4):
        expected = plain[i].weight.std() * (plain[i].weight[0].numel() / model[i].weight[0].numel()) ** 0.5
        assert model[i].weight.std().item() == pytest.approx(expected.item(), rel=0.05)


def test_the_same_seed_gives_the_same_weights():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(gzoo.convert(small(), "p4"))
    assert models[0][0].weight.equal(models[1][0].weight)


# Copies and checkpoints ---------------------------------------------------------------------------------------------


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_a_file,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_copies_keep_class_group_and_result(name, how):
    thin = (
        {"channels": (8, 8, 8, 8), "stem_width": 8}
        if name == "resnet18"
        else {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1)}
    )
    model = gzoo.convert(timm.create_model(name, num_classes=5, **thin), "p4").eval()
    copied, x = COPIES[how](model), torch.randn(1, 3, 32, 32)
    assert type(copied) is type(model)
    assert copied.group == model.group
    assert copied(x).equal(model(x))


def test_a_state_dict_reloads_exactly():
    model, other = gzoo.convert(small(), "p4").eval(), gzoo.convert(small(), "p4").eval()
    other.load_state_dict(model.state_dict())
    x = image().float()
    assert other(x).equal(model(x))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: gzoo.convert(small(), "d2", widths={16: 8, 24: 12}),
            "this checkpoint is of a d2 network .* p4 network",
        ),
        (lambda: gzoo.convert(small(32), "p4"), "another architecture or width than .*: 3.weight is .*, not"),
        (small, "this checkpoint is of a plain network .* p4 network"),
    ],
)
def test_a_checkpoint_of_another_group_or_width_is_refused(other, message):
    with pytest.raises(ValueError, match=message):
        gzoo.convert(small(), "p4").load_state_dict(other().state_dict())


# What cannot be converted -------------------------------------------------------------------------------------------


class Position(nn.Module):
    """A learned number for every pixel."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(1, 16, 64, 64))

    def forward(self, x):
        return x + self.embedding


class Tables(nn.Module):
    """A fixed filter for each channel, or for every one alike, which training may go on changing."""

    def __init__(self, table, written=False):
        super().__init__()
        self.register_buffer("table", table)
        self.written = written

    def forward(self, x):
        if self.written and self.training:
            self.table.lerp_(x.mean((0, 1))[:3, :3], 0.1)
        if len(self.table) > 1:
            return F.conv2d(x, self.table, padding=1, groups=x.shape[1])
        return F.conv2d(x.flatten(0, 1)[:, None], self.table, padding=1).view(x.shape)


class Enlarged(nn.Module):
    """To twice the size, by a Kronecker product (HoVer-Net)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("ones", torch.ones(2, 2))

    def forward(self, x):
        y = torch.tensordot(x.unsqueeze(-1), self.ones.unsqueeze(0), dims=1).permute(0, 1, 2, 4, 3, 5)
        return y.reshape(-1, x.shape[1], 2 * x.shape[2], 2 * x.shape[3])


class SpatialAttention(nn.Module):
    """Where to look, from the mean and the maximum over channels (CBAM)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(conv(2, 1, 5, bias=False), nn.BatchNorm2d(1), nn.Sigmoid())

    def forward(self, x):
        return x * self.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1))


class Gated(nn.Module):
    """Half of the channels, weighted by the last ones, one after the other, as in focal modulation."""

    def __init__(self, channels, gates):
        super().__init__()
        self.split = [channels, gates]
        self.conv = conv(channels, channels + gates)

    def forward(self, x):
        y, gates = self.conv(x).split(self.split, 1)
        return sum(y * gates[:, i : i + 1].sigmoid() for i in range(self.split[1]))


CHANNELS_FIRST_NORMS = (
    *(tl.BatchNormAct2d, tl.FrozenBatchNormAct2d, FrozenBatchNorm2d, tl.LayerNorm2dFp32, tl.LayerNormAct2dFp32),
    *(tl.RmsNorm2dFp32, tl.RmsNormAct2dFp32, tl.SimpleNorm2dFp32, tl.FilterResponseNormTlu2d),
    *(tl.FilterResponseNormAct2d, tl.EvoNorm2dB0, tl.EvoNorm2dB1, tl.EvoNorm2dB2, tl.EvoNorm2dS0, tl.EvoNorm2dS0a),
    *(tl.EvoNorm2dS1, tl.EvoNorm2dS1a, tl.EvoNorm2dS2, tl.EvoNorm2dS2a),
)
CHANNELS_LAST_NORMS = (
    *(nn.RMSNorm, tl.LayerNormFp32, tl.LayerNormAct, tl.LayerNormActFp32, tl.RmsNormFp32, tl.RmsNormAct),
    *(tl.RmsNormActFp32, tl.SimpleNormFp32),
)


class ChannelsLast(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("weights", [None, "transfer"])
@pytest.mark.parametrize("norm", CHANNELS_FIRST_NORMS + CHANNELS_LAST_NORMS, ids=lambda norm: norm.__name__)
def test_norms_of_timm_convert(norm, weights):
    layer = norm(32)
    layer = layer if norm in CHANNELS_FIRST_NORMS else ChannelsLast(layer)
    plain = nn.Sequential(conv(3, 32, 1), layer, *head(32))
    plain.pretrained_cfg = {"input_size": (3, 12, 12)}  # the self-check takes an image of this size
    model = gzoo.convert(plain, "p4", weights=weights)
    assert gzoo.check(model, (8, 11)).worst < 1e-12
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("size", [(15, 15), (16, 16), (18, 21)])
@pytest.mark.parametrize("block", [InceptionB, InceptionD])
def test_the_pools_in_the_functions_of_inception_v3_are_symmetric(block, size):
    def thin(width_in, width_out, **options):
        return tl.ConvNormAct(width_in // 16, width_out // 16, **{"padding": 0} | options)

    plain = nn.Sequential(conv(3, 8), block(128, conv_block=thin))
    plain.pretrained_cfg = {"input_size": (3, 20, 20)}  # the self-check takes an image of this size
    model = with_random_statistics(gzoo.convert(plain, "p4", classifier="")).eval()
    assert worst_error(model, "p4", image(size), "image", "fields") < 1e-12


@pytest.mark.parametrize("size", [(16, 16), (15, 18), (9, 11)])
@pytest.mark.parametrize(("kernel", "stride"), [(2, 1), (2, 2), (3, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("pool", [tl.AvgPool2dSame, MaxPool2dSame])
def test_pools_that_keep_the_size_give_as_many_pixels_as_tensorflow(pool, kernel, stride, size):
    plain = nn.Sequential(conv(3, 8), pool(kernel, stride))
    model = with_random_statistics(gzoo.convert(plain, "p4", classifier="")).eval()
    assert model(image(size)).shape[2:] == plain(image(size).float()).shape[2:]
    assert worst_error(model, "p4", image(size), "image", "fields") < 1e-12


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_the_gates_in_the_functions_of_ghostnet_are_symmetric(version):
    cfgs = [[[3, 16, 16, 0, 1]], [[3, 32, 24, 0, 2]], [[3, 32, 24, 0, 1]]]
    model = gzoo.convert(GhostNet(cfgs, num_classes=5, width=0.5, version=version), "p4m")
    for size in (32, (33, 35), (38, 45)):
        assert gzoo.check(model, size).worst < 1e-12


def test_a_pose_head_where_there_is_no_classifier_is_refused():
    features = nn.Sequential(conv(3, 8), nn.ReLU())
    for classifier in (None, ""):
        with pytest.raises(
            ValueError, match=r"head='pose' needs a linear classifier, .* those of EquivariantSequential are \[\]"
        ):
            gzoo.convert(features, "p4", head="pose", classifier=classifier)


HEADS = {
    "side by side": lambda self, x: torch.cat([self.b(x.mean((2, 3))), self.c(x.amax((2, 3)))[:, :2]], 1),
    "summed up": lambda self, x: self.b(x.mean((2, 3))) + self.c(x.amax((2, 3))),
    "multiplied": lambda self, x: self.b(x.mean((2, 3))) * self.d(x.amax((2, 3))),
    "cut in two": lambda self, x: self.b(x.mean((2, 3))).chunk(2, 1)[1],
    "of others": lambda self, x: self.e(self.b(x.mean((2, 3))).relu()) + self.b(x.mean((2, 3))),
}


@pytest.mark.parametrize("made", HEADS)
def test_logits_that_several_layers_make_are_invariant(made):
    layers = {name: nn.Linear(16, width) for name, width in (("b", 6), ("c", 6), ("d", 1))}
    plain = Network(lambda self, x: HEADS[made](self, self.a(x)), a=conv(3, 16), e=nn.Linear(6, 6), **layers)
    for unused in set("bcde") - set(HEADS[made].__code__.co_names):
        delattr(plain, unused)
    model = with_random_statistics(gzoo.convert(plain, "p4m")).eval()
    x = image()
    assert model(x).shape == plain(x.float()).shape
    assert worst_error(model, "p4m", x, "image", "invariant") < 1e-12


@pytest.mark.parametrize("size", [(33, 33), (32, 27)])
@pytest.mark.parametrize("head", ["invariant", "pose"])
def test_several_outputs_have_a_classifier_each(head, size):
    plain = Network(
        lambda self, x: {"kind": self.kind(self.a(x).mean((2, 3))), "age": self.age(self.a(x).amax((2, 3))).sigmoid()},
        a=conv(3, 16),
        kind=nn.Linear(16, 7),
        age=nn.Linear(16, 1),
    )
    model = gzoo.convert(plain, "p4m", head=head).double().eval()
    p4m, x = groups.get("p4m"), torch.randn(2, 3, *size, dtype=torch.float64)
    upright = model(x)
    assert {name: tuple(y.shape[:2]) for name, y in upright.items()} == {"kind": (2, 7), "age": (2, 1)}
    for g in p4m.grid_elements:
        for name, y in model(p4m.transform_image(x, g)).items():
            expected = upright[name] if head == "invariant" else p4m.transform_features(upright[name].flatten(1), g)
            torch.testing.assert_close(y.flatten(1), expected, rtol=0, atol=1e-12)


LAST = {
    "convolution": lambda: [nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 3, padding=1)],
    "transposed convolution": lambda: [nn.ConvTranspose2d(8, 3, 4, stride=2, padding=1), nn.Sigmoid()],
}


@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("group", ["p4m", "c8"])
def test_an_autoencoder_gives_an_image_that_moves_with_its_own(last, group):
    encoder = [conv(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    plain = nn.Sequential(*encoder, nn.ConvTranspose2d(16, 8, 2, stride=2), nn.ReLU(), nn.MaxPool2d(2), *LAST[last]())
    model = with_random_statistics(gzoo.convert(plain, group)).eval()
    for size in ((17, 17), (16, 16), (18, 21)):
        x = image(size)
        assert model(x).shape == plain(x.float()).shape
        assert worst_error(model, group, x, "image", "image") < 1e-12


class Own(nn.Module):
    """Two convolutions, the second of which makes what ``end`` makes the output of."""

    def __init__(self, end, channels, kernel=3, first="body"):
        super().__init__()
        layers = {"body": conv(3, 8), "head": conv(8, channels, kernel)}
        for name in (first, *(layers.keys() - {first})):
            setattr(self, name, layers[name])
        self.end, self.pretrained_cfg = end, {"input_size": (3, 64, 64)}

    def forward(self, x):
        return self.end(self.head(self.body(x).relu()))


@pytest.mark.parametrize("named", [None, "head"])
@pytest.mark.parametrize(
    ("end", "channels"),
    [
        (lambda y: 255 * y.sigmoid(), 3),
        (lambda y: y.relu(), 3),
        (lambda y: y[..., 2:-2, 2:-2], 1),
        (lambda y: F.normalize(y), 2),
        (lambda y: y * y.std() + y.mean(), 1),
        (lambda y: y.squeeze(1), 1),
    ],
)
def test_whatever_comes_of_an_image_of_few_channels_is_the_output(end, channels, named):
    plain, x = Own(end, channels), image((9, 12))
    model = gzoo.convert(plain, "p4m", classifier=named).double().eval()
    y = model(x)
    assert y.shape == plain(x.float()).shape
    for g in range(8):
        p4m = groups.get("p4m")
        torch.testing.assert_close(model(p4m.transform_image(x, g)), p4m.transform_image(y, g), rtol=0, atol=1e-12)
    assert gzoo.check(model, (9, 12)).worst < 1e-12


@pytest.mark.parametrize("end", [lambda y: y, lambda y: y.exp(), F.softplus, lambda y: y[..., 1:-1, 1:-1]])
@pytest.mark.parametrize("channels", [7, 8])  # of eight each stands where one was
def test_a_1x1_convolution_makes_the_output_of_any_width(channels, end):
    plain, x = Own(end, channels, kernel=1), image((9, 12))
    model = gzoo.convert(plain, "p4m").double().eval()
    assert model(x).shape == plain(x.float()).shape
    assert worst_error(model, "p4m", x, "image", "image") < 1e-12


# What a network does to the map of its last convolution, seven channels, which leaves them logits.
SCORES = {
    "nothing": lambda y: y,
    "temperature": lambda y: 1 - y / 0.5,
    "channels last": lambda y: y.permute(0, 2, 3, 1),
    "dropout": lambda y: F.dropout2d(y, 0.1, training=False),
    "twice": lambda y: torch.cat([y, y], 1),
    "padded": lambda y: F.pad(y, (1, 1, 1, 1)),
    "resized": lambda y: F.interpolate(y, scale_factor=2, mode="bilinear").softmax(1),
    "decided": lambda y: y.argmax(1),
    "picked": lambda y: y[:, 3],
    "apart": lambda y: (y[:, :1], y[:, 1:].sigmoid()),
}


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("end", SCORES)
def test_a_map_that_a_convolution_makes_is_one_of_logits(end, kernel):
    plain, p4m, x = Own(SCORES[end], 7, kernel), groups.get("p4m"), image((9, 12))
    model = with_random_statistics(gzoo.convert(plain, "p4m")).eval()

    def run(network, x):
        y = network(x)
        return [z.permute(0, 3, 1, 2) if end == "channels last" else z for z in (y if isinstance(y, tuple) else (y,))]

    upright = run(model, x)
    assert [y.shape for y in upright] == [y.shape for y in run(plain.double(), x)]
    for g in range(8):
        for y, turned in zip(upright, run(model, p4m.transform_image(x, g)), strict=True):
            torch.testing.assert_close(turned, p4m.transform_image(y, g), rtol=0, atol=1e-12)


@dataclass
class Result:
    logits: Tensor


class OwnDict(dict):
    pass


def over_channels(y, x):
    return y / y.norm(dim=1, keepdim=True).expand_as(y)


@pytest.mark.parametrize(
    "step",
    [
        over_channels,
        lambda y, x: y - y.mean(1, keepdim=True).repeat(1, y.shape[1], 1, 1),
        lambda y, x: y * (2 * x[:, :1].expand_as(y)).sigmoid(),
    ],
)
def test_what_is_expanded_to_all_channels_leaves_them_their_fibres(step):
    plain = Network(lambda self, x: self.c(self.b(step(self.a(x), x))), a=block(3, 16), b=conv(16, 16), c=conv(16, 5))
    model = gzoo.convert(plain, "p4m")
    assert isinstance(model.b, GroupConv2d)
    model = with_random_statistics(model).eval()
    assert worst_error(model, "p4m", image((9, 12)), "image", "image") < 1e-12


def test_images_that_are_repeated_in_time_are_followed():
    def run(self, x):
        return self.b(self.a(x.repeat(2, 1, 1, 1, 1).flatten(0, 1))).unflatten(0, (2, -1)).mean(0)

    model = with_random_statistics(gzoo.convert(Network(run, a=block(3, 16), b=conv(16, 5, 1)), "p4")).eval()
    assert worst_error(model, "p4", image((9, 12)), "image", "image") < 1e-12


# Ways to give two maps: what holds them, and how to get at them.
HOLDERS = {
    "dictionary of its own class": (lambda y, z: OwnDict(y=y, z=z), lambda out: (out["y"], out["z"])),
    "dataclasses in a list": (lambda y, z: [Result(y), Result(z)], lambda out: (out[0].logits, out[1].logits)),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_logits_are_found_and_checked_in_any_holder(holder):
    hold, get = HOLDERS[holder]
    plain = Network(lambda self, x: hold(self.b(self.a(x)), self.c(self.a(x)).sigmoid()), **two_heads())
    model, x = gzoo.convert(plain, "p4").double().eval(), image((9, 12))
    for y, turned in zip(get(model(x)), get(model(x.rot90(1, (2, 3)))), strict=True):
        torch.testing.assert_close(turned, y.rot90(1, (2, 3)), rtol=0, atol=1e-12)
    assert [y.shape[1] for y in get(model(x))] == [7, 1]
    broken = Network(lambda self, x: hold(moved(self.b(self.a(x))), self.c(self.a(x))), **two_heads())
    with pytest.raises(ValueError, match=r"^the output\[0\] of EquivariantNetwork is not equivariant"):
        gzoo.convert(broken, "p4")


def test_an_output_that_may_hide_tensors_is_refused():
    plain = Network(lambda self, x: SimpleNamespace(y=self.b(self.a(x)), z=self.c(self.a(x))), **two_heads())
    with pytest.raises(ValueError, match=r"output has a SimpleNamespace in it, .* dictionary or dataclass of tensors"):
        gzoo.convert(plain, "p4")


def two_heads():
    return {"a": block(3, 16), "b": conv(16, 7), "c": conv(16, 1)}


# Two outputs of one size, how wide b is, and the channels of both: none where they are features.
BESIDE = {
    "distances beside a probability": (lambda self, y: (self.c(y).sigmoid(), self.b(y).relu()), 7, (1, 7)),
    "features that logits are made of": (lambda self, y: (y, self.b(y) + self.c(y)), 1, (None, 1)),
    "activated features that logits are made of": (lambda self, y: ((z := self.b(y).relu()), self.c(z)), 16, (None, 1)),
}


@pytest.mark.parametrize("outputs", BESIDE)
def test_scores_beside_another_output_are_logits(outputs):
    run, width, channels = BESIDE[outputs]
    layers = {"a": block(3, 16), "b": conv(16, width), "c": conv(16, 1)}
    model = gzoo.convert(Network(lambda self, x: run(self, self.a(x)), **layers), "p4").double().eval()
    x, p4 = image((9, 12)), groups.get("p4")
    for y, turned, own in zip(model(x), model(x.rot90(1, (2, 3))), channels, strict=True):
        moved = p4.transform_features(y, 1) if own is None else y.rot90(1, (2, 3))
        torch.testing.assert_close(turned, moved, rtol=0, atol=1e-12)
        assert y.shape[1] == own or (own is None and y.shape[1] % 4 == 0)


def deeply_supervised(end):
    def run(self, x):
        y = self.a(x)
        side = F.interpolate(self.b(self.down(y)), y.shape[2:], mode="bilinear")
        scores = self.c(torch.cat((y, side), 1))
        return end(self, scores, side) if self.training else scores

    layers = {"a": block(3, 16), "down": nn.AvgPool2d(2), "b": conv(16, 7), "c": conv(23, 7)}
    return Network(run, **layers)


def test_logits_that_are_given_in_training_only_are_logits():
    model = gzoo.convert(deeply_supervised(lambda self, y, side: [y, side]), "p4m")
    assert [y.shape[1] for y in model.train()(image().float())] == [7, 7]
    model, x = with_random_statistics(model).eval(), image((9, 12))
    assert worst_error(model, "p4m", x, "image", "image") < 1e-12
    assert gzoo.convert(deeply_supervised(None).eval(), "p4m")(image().float()).shape[1] == 7


@pytest.mark.parametrize(
    "more",
    [
        lambda self, y: (y, y.square().mean()),
        lambda self, y: (y, self.b(y)),
    ],
)
def test_features_stay_features_whatever_is_given_beside_them_in_training(more):
    def run(self, x):
        y = self.a(x) + 0 * self.b(self.a(x))
        return more(self, y) if self.training else y

    model = gzoo.convert(Network(run, a=block(3, 16), b=block(16, 16)), "p4").double().eval()
    assert worst_error(model, "p4", image((9, 12)), "image", "fields") < 1e-12


def test_outputs_in_training_that_nothing_is_known_of_are_asked_for():
    plain = deeply_supervised(lambda self, y, side: [y.relu(), side.relu()])
    with pytest.raises(ValueError, match=r"gives 2 outputs in training and 1 in evaluation; say .* classifier=\['"):
        gzoo.convert(plain, "p4")
    model = gzoo.convert(plain, "p4", classifier=["b", "c"])
    assert [y.shape[1] for y in model.train()(image().float())] == [7, 7]


def with_auxiliary_head(end=lambda y: y, **aux):
    """A head that does not even run in evaluation."""

    def run(self, x):
        y = self.a(x)
        scores = self.c(self.b(y))
        return (scores, end(self.aux(y))) if self.training else scores

    return Network(run, a=block(3, 16), b=block(16, 24), c=conv(24, 5), **aux)


@pytest.mark.parametrize("group", ["p4", "p4m", "d2"])
def test_a_head_that_runs_in_training_alone_makes_logits(group):
    aux = nn.Sequential(*block(16, 8), nn.Dropout(0.5), nn.Conv2d(8, 5, 1))
    model = with_random_statistics(gzoo.convert(with_auxiliary_head(aux=aux), group)).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Dropout):
            module.eval()  # so that what is left of training is the forward
    for size in ((8, 8), (9, 12)):
        scores, side = model(image(size))
        assert scores.shape == side.shape == (2, 5, *size)
        both = Network(lambda self, x: torch.cat(self.model(x), 1), model=model)
        assert worst_error(both, group, image(size), "image", "image") < 1e-12


def test_a_vector_of_logits_that_is_given_in_training_alone_is_pooled():
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 7))
    with pytest.raises(ValueError, match=r"gives several outputs, \(2, 5, 64, 64\), \(2, 7\); say which"):
        gzoo.convert(with_auxiliary_head(aux=head), "p4")
    model = gzoo.convert(with_auxiliary_head(aux=head), "p4", classifier=["c", "aux.2"]).train()
    assert [y.shape[1] for y in model(image().float())] == [5, 7]


@pytest.mark.parametrize(
    "end",
    [
        lambda y: F.dropout(y, 0.5),
        lambda y: y + 0.1 * torch.randn_like(y),
        lambda y: y.square().mean(),
    ],
)
def test_what_is_random_or_a_number_in_training_alone_converts(end):
    model = gzoo.convert(with_auxiliary_head(end, aux=conv(16, 5)), "p4", classifier=["c", "aux"]).train()
    scores, side = model(image().float())
    assert scores.shape[1] == 5
    assert side.ndim == 0 or side.shape[1] == 5


def test_a_step_that_breaks_the_symmetry_in_training_alone_is_found():
    def shaded(y):
        return y * torch.arange(y.shape[-1], device=y.device)

    with pytest.raises(ValueError, match=r"the output\[1\] of \w+ is not equivariant under p4"):
        gzoo.convert(with_auxiliary_head(shaded, aux=conv(16, 5)), "p4")


def residual_decoder(classes):
    """A U-Net of residual units, the last a sum of two convolutions, as MONAI's."""
    up = nn.ConvTranspose2d(32, 16, 3, stride=2, padding=1, output_padding=1)

    def run(self, x):
        y = self.a(x)
        y = torch.cat((y, self.up(self.down(y))), 1)
        return self.b(y) + self.c(y)

    layers = {"a": block(3, 16), "down": nn.Sequential(conv(16, 32, 3, stride=2), nn.ReLU()), "up": up}
    return Network(run, **layers, b=conv(32, classes), c=conv(32, classes, 1))


def test_a_residual_decoder_gives_logits_as_few_as_colours_or_is_asked_about():
    assert gzoo.convert(residual_decoder(3), "p4")(image((8, 12)).float()).shape == (2, 3, 8, 12)
    with pytest.warns(UserWarning, match=r"so it stays regular fields.*as in classifier=\['b', 'c'\]; classifier=''"):
        gzoo.convert(residual_decoder(6), "p4")
    model = with_random_statistics(gzoo.convert(residual_decoder(6), "p4m", classifier=["b", "c"])).eval()
    for size in ((8, 8), (8, 12)):
        assert worst_error(model, "p4m", image(size), "image", "image") < 1e-12


class Turned(nn.LayerNorm):
    """Over the channels of a map, as many libraries write it."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Joined(nn.Module):
    """A function as a module, and a map without channels, as segmentation libraries have them."""

    def forward(self, x, y):
        nothing = torch.empty(len(x), 0, *x.shape[2:], dtype=x.dtype, device=x.device)
        return torch.cat((nothing, x, F.interpolate(y, x.shape[2:], mode="bilinear")), 1)


@pytest.mark.parametrize("options", [{}, {"weights": "transfer"}], ids=str)
def test_tables_that_nothing_writes_to_stay(options):
    blur = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])[None, None] / 16
    layers = {"a": block(3, 12), "up": Enlarged(), "blur": Tables(blur), "head": nn.Sequential(conv(12, 8), *head(8))}
    plain = Network(lambda self, x: self.head(self.blur(self.up(self.a(x)))), **layers).eval()
    model = with_random_statistics(gzoo.convert(plain, "p4m", **options)).eval()
    assert torch.equal(model.blur.table, blur)
    for size in (9, (12, 7)):
        assert gzoo.check(model, size).worst < 1e-12


@pytest.mark.parametrize("group", ["p4", "d2"])
def test_modules_of_ones_own_are_followed(group):
    def run(self, x):
        y = self.norm(self.a(x))
        return self.head(self.join(y, self.down(y)))

    layers = {
        "a": conv(3, 16),
        "norm": Turned(16),
        "down": conv(16, 8, 3, stride=2),
        "join": Joined(),
        "head": conv(24, 7, 1),
    }
    model = with_random_statistics(gzoo.convert(Network(run, **layers), group)).eval()
    for size in ((8, 8), (9, 12)):
        assert worst_error(model, group, image(size), "image", "image") < 1e-12
    with pytest.raises(ValueError, match="norm: its forward takes a mean, maximum, norm"):
        gzoo.convert(Network(run, **layers), group, weights="transfer")


@pytest.mark.parametrize("side", [128, 256, 299])
def test_a_network_for_larger_images_is_tried_at_those(side):
    def run(self, x):
        assert min(x.shape[2:]) >= side
        return self.b(self.a(x))

    model = gzoo.convert(Network(run, a=block(3, 8), b=conv(8, 5, 1)), "p4")
    assert model.pretrained_cfg["input_size"] == (3, side, side)
    assert gzoo.check(model).worst < 1e-12


@pytest.mark.parametrize("named", [None, ["b", "c"]])
def test_a_probability_before_the_next_head_runs_is_carried_over(named):
    plain = Network(lambda self, x: [(y := self.a(x).relu()), self.b(y).sigmoid(), self.c(y)][1:], **two_heads())
    plain.a = conv(3, 16)
    model, x = gzoo.convert(plain, "p4", weights="transfer", classifier=named).double().eval(), image((9, 9))
    plain = plain.double()
    mean = sum(plain(x.rot90(k, (2, 3)))[1].rot90(-k, (2, 3)) for k in range(4)) / 4
    torch.testing.assert_close(model(x)[1], mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("error", [AssertionError, ValueError, KeyError])
def test_a_network_that_asserts_the_size_of_its_images_is_tried_at_larger_ones(error):
    def run(self, x):
        if min(x.shape[2:]) < 256:
            raise error
        return self.b(self.a(x))

    plain = Network(run, a=block(3, 8), b=conv(8, 5, 1))
    plain.pretrained_cfg = {"input_size": (3, 256, 256)}
    assert gzoo.convert(plain, "p4")(torch.randn(1, 3, 256, 256)).shape[1] == 5


def test_check_takes_as_many_channels_as_a_network_says_that_it_does():
    plain = Network(lambda self, x: self.b(self.a(x)), b=conv(16, 2, 1), a=block(3, 16))  # the last layer first
    plain.pretrained_cfg = {"input_size": (3, 64, 64)}
    assert gzoo.check(gzoo.convert(plain, "p4"), 9).worst < 1e-12


@pytest.mark.parametrize(
    ("size", "kernel", "logits"),
    [("as fine", 1, True), ("as fine", 3, True), ("coarser", 1, True), ("coarser", 3, False)],
)
def test_maps_of_one_size_or_of_1x1_convolutions_are_logits_and_other_pyramids_features(size, kernel, logits):
    def forward(self, x):
        fine = self.a(x)
        return {"fine": self.b(fine), "other": self.c(self.down(fine) if size == "coarser" else fine)}

    layers = {"a": block(3, 16), "b": conv(16, 8, kernel), "c": conv(16, 5, kernel)}
    down = {"down": nn.MaxPool2d(2)} if size == "coarser" else {}
    asked = (
        nullcontext() if logits else pytest.warns(UserWarning, match="one of several sizes, so it stays regular fields")
    )
    with asked:
        model = with_random_statistics(gzoo.convert(Network(forward, **layers, **down), "p4")).eval()
    p4, x = groups.get("p4"), image((8, 12))
    for y, turned in zip(model(x).values(), model(x.rot90(1, (2, 3))).values(), strict=True):
        moved = p4.transform_image(y, 1) if logits else p4.transform_features(y, 1)
        torch.testing.assert_close(turned, moved, rtol=0, atol=1e-12)


def fcn(self, x):
    """FCN-8's end (Long et al. 2015): scores of three sizes, summed up."""
    fine = self.a(x)
    middle = self.b(self.down(fine))
    y = F.interpolate(self.of_coarse(self.down(middle)), middle.shape[2:], mode="bilinear") + self.of_middle(middle)
    return F.interpolate(y, fine.shape[2:], mode="bilinear") + self.of_fine(fine)


def deeplab(self, x):
    """DeepLabV2's end (Chen et al. 2017, figure 7): a sum of scores, each by kernels of another dilation."""
    features = self.b(self.a(x))
    return self.of_fine(features) + self.of_middle(features) + self.of_coarse(features)


@pytest.mark.parametrize(("forward", "kernel"), [(fcn, 1), (deeplab, 3)])
def test_scores_that_are_summed_up_are_logits(forward, kernel):
    scores = {f"of_{name}": conv(16, 7, kernel) for name in ("fine", "middle", "coarse")}
    plain = Network(forward, a=block(3, 16), b=block(16, 16), down=nn.AvgPool2d(2), **scores)
    model, x = with_random_statistics(gzoo.convert(plain, "p4m")).eval(), image((8, 12))
    assert model(x).shape == plain.double()(x).shape
    assert worst_error(model, "p4m", x, "image", "image") < 1e-12


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_a_feature_extractor_that_gives_a_vector_pools_its_fibres(pool):
    plain = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), *head(8)[:2])
    model = with_random_statistics(gzoo.convert(plain, "p4m", "width", group_pool=pool)).eval()
    x = image((9, 12))
    assert model(x).shape == plain(x.float()).shape
    assert worst_error(model, "p4m", x, "image", "invariant") < 1e-12
    assert gzoo.check(model, (9, 12)).worst < 1e-12
    assert copy.deepcopy(model)(x).equal(model(x))
    fibres = with_random_statistics(gzoo.convert(plain, "p4m", "width", classifier="")).eval()
    assert fibres(x).shape == (2, 8 * 8)
    assert worst_error(fibres, "p4m", x, "image", "invariant") > 1e-3


def block(width_in, width_out):
    return nn.Sequential(conv(width_in, width_out), nn.BatchNorm2d(width_out), nn.ReLU())


# Networks whose output is no image and no vector of logits, and its channels: regular fields, or as they were.
NO_IMAGE = {
    "few features of many bands": (
        lambda: Network(lambda self, x: self.b(self.a(x)).relu(), a=block(13, 16), b=conv(16, 8)),
        13,
    ),
    "a residual stream as wide as the image": (
        lambda: Network(lambda self, x: self.a(x) + self.b(self.a(x)), a=block(16, 16), b=conv(16, 16)),
        16,
    ),
    "a 1x1 convolution and an activation": (
        lambda: Network(lambda self, x: self.b(self.a(x)).relu(), a=block(3, 16), b=conv(16, 16, 1)),
        3,
    ),
    "a dense block": (lambda: nn.Sequential(conv(3, 16), _DenseBlock(2, 16, 2, 8, 0.0)), 3),
    "a gated convolution": (
        lambda: Network(
            lambda self, x: self.b(self.a(x)) * self.c(self.a(x)).sigmoid(),
            **{"a": block(3, 16), "b": conv(16, 16), "c": conv(16, 16)},
        ),
        3,
    ),
    "a residual block with a projection": (
        lambda: Network(
            lambda self, x: self.c(self.b(y := self.a(x))) + self.shortcut(y),
            **{"a": block(3, 16), "b": block(16, 16), "c": conv(16, 16), "shortcut": conv(16, 16, 1)},
        ),
        3,
    ),
    "a residual block without norms": (
        lambda: Network(
            lambda self, x: (y := self.a(x)) + self.c(self.b(y)), a=conv(3, 16), b=block(16, 16), c=conv(16, 16)
        ),
        3,
    ),
}


@pytest.mark.parametrize("name", ["mobilenetv2_050", "tinynet_e", "eca_nfnet_l0", "hrnet_w18_small"])
def test_no_level_of_timms_pyramids_is_one_of_logits(name):
    with torch.device("meta"):
        plain = timm.create_model(name, features_only=True)
    assert not plan(plain, groups.chain("p4")).classifiers


@pytest.mark.parametrize("network", NO_IMAGE)
@pytest.mark.parametrize("weights", [None, "transfer"])
def test_feature_maps_are_regular_fields(network, weights):
    build, channels = NO_IMAGE[network]
    model = with_random_statistics(gzoo.convert(build(), "p4m", weights=weights)).eval()
    assert worst_error(model, "p4m", image((9, 12), channels), "image", "fields") < 1e-12


def test_a_branch_aside_that_runs_last_does_not_make_features_an_output():
    def run(self, x):
        y = self.b(self.a(x)).relu()
        self.kept = self.c(y)
        return y

    model = gzoo.convert(Network(run, a=block(3, 16), b=conv(16, 16, 1), c=conv(16, 1, 1)), "p4").double().eval()
    x = image((9, 12))
    expected = groups.get("p4").transform_features(model(x), 1)
    torch.testing.assert_close(model(x.rot90(1, (2, 3))), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(7, 2), (3, 3)])
@pytest.mark.parametrize("weights", [None, "transfer"])
def test_a_table_of_logits_is_invariant_and_no_map(shape, weights):
    plain = Network(
        lambda self, x: self.b(self.a(x).mean((2, 3))).view(-1, *shape),
        a=block(3, 16),
        b=nn.Linear(16, shape[0] * shape[1]),
    )
    model = with_random_statistics(gzoo.convert(plain.eval(), "p4", weights=weights)).eval()
    assert model(image()).shape == (2, *shape)
    assert gzoo.check(model, (9, 12)).worst < 1e-12


@pytest.mark.parametrize("act", [nn.ReLU(), nn.Hardtanh(), nn.ELU(), nn.Softplus()])
def test_a_map_of_one_channel_behind_an_activation_is_carried_over(act):
    plain = nn.Sequential(*block(3, 16), conv(16, 1), act).double().eval()
    model, x = gzoo.convert(plain, "p4", weights="transfer"), image((9, 9))
    logits = torch.stack([plain[:-1](x.rot90(k, (2, 3))).rot90(-k, (2, 3)) for k in range(4)]).mean(0)
    torch.testing.assert_close(model(x), act(logits), rtol=0, atol=1e-12)


def test_vectors_that_are_normalized_keep_their_fibres_and_say_so():
    plain = Network(lambda self, x: F.normalize(self.a(x).mean((2, 3))), a=block(3, 16))
    with pytest.warns(UserWarning, match=r"ends in a norm.* so it stays regular fields, .* turn with the image"):
        unit = gzoo.convert(plain, "p4").eval()
    torch.testing.assert_close(unit(image().float()).norm(dim=1), torch.ones(2))


def test_what_a_linear_layer_makes_for_a_norm_is_invariant():
    projected = gzoo.convert(nn.Sequential(*block(3, 16), *head(16), nn.BatchNorm1d(5)), "p4").double().eval()
    assert projected(image()).shape == (2, 5)
    assert gzoo.check(projected, 9).worst < 1e-12


def test_a_vector_that_the_network_squeezes_is_pooled_for_a_single_image_too():
    plain = Network(lambda self, x: F.adaptive_avg_pool2d(self.a(x), 1).squeeze(), a=block(3, 16))
    model = with_random_statistics(gzoo.convert(plain, "p4")).eval()
    x = image()
    assert model(x).ndim == 2
    torch.testing.assert_close(model(x[:1]), model(x)[0])


@pytest.mark.parametrize("first", ["body", "head"])
def test_the_order_in_which_layers_are_registered_does_not_matter(first):
    model = gzoo.convert(Own(lambda y: y.relu(), 5, first=first), "p4")
    assert model(torch.randn(1, 3, 9, 9)).shape[1] % 4 == 0  # more than the image has: features


def test_the_layer_that_makes_the_output_need_not_run_last():
    class Aside(Own):
        def forward(self, x):
            features = self.body(x).relu()
            y = self.head(features)
            self.kept = self.aside(features)
            return y

    plain = Aside(None, 2, kernel=1)
    plain.aside = conv(8, 2, 1)
    model = gzoo.convert(plain, "p4").double().eval()
    x = image()
    assert model(x).shape == (2, 2, 9, 9)
    torch.testing.assert_close(model(x.rot90(1, (2, 3))), model(x).rot90(1, (2, 3)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_a_transposed_convolution_with_more_channels_makes_the_output_if_it_is_named(kernel):
    plain = nn.Sequential(conv(3, 16), nn.ReLU(), nn.ConvTranspose2d(16, 6, kernel, stride=2))
    x, model = image((9, 12)), gzoo.convert(plain, "p4", classifier="2").double().eval()
    assert model(x).shape == plain(x.float()).shape
    assert worst_error(model, "p4", x, "image", "image") < 1e-12
    planned = plan(plain, (groups.get("p4"),), classifier="2").total()
    assert sum(parameter.numel() for parameter in model.parameters()) == planned.params


def test_a_mask_and_a_vector_beside_it_have_a_classifier_each():
    plain = Network(
        lambda self, x: (self.mask(self.a(x)), self.kind(self.a(x).mean((2, 3)))),
        a=conv(3, 16),
        mask=nn.Conv2d(16, 2, 1),
        kind=nn.Linear(16, 5),
    )
    model = gzoo.convert(plain, "p4", classifier=("mask", "kind")).double().eval()
    x = torch.randn(2, 3, 17, 12, dtype=torch.float64)
    mask, kind = model(x)
    turned_mask, turned_kind = model(x.rot90(1, (2, 3)))
    assert mask.shape == (2, 2, 17, 12)
    assert gzoo.check(model, (17, 12)).worst < 1e-12
    torch.testing.assert_close(turned_mask, mask.rot90(1, (2, 3)), rtol=0, atol=1e-12)
    torch.testing.assert_close(turned_kind, kind, rtol=0, atol=1e-12)


class Numbers(nn.Module):
    """Splits maps by one of its numbers, and logits by another."""

    def __init__(self):
        super().__init__()
        self.half, self.power, self.first = 8, 8, 2
        self.a, self.b, self.fc = conv(3, 16), conv(8, 16), nn.Linear(16, 12)

    def forward(self, x):
        y = self.a(x)
        y = self.b(y[:, : self.half] * (y[:, self.half :] / self.power).sigmoid())
        z = self.fc(y.mean((2, 3)))
        return torch.cat([z[:, : self.first].sigmoid(), z[:, self.first :]], 1)


@pytest.mark.parametrize("weights", [None, "transfer"])
def test_of_equal_numbers_those_that_split_maps_are_widths(weights):
    model = gzoo.convert(Numbers(), "p4", weights=weights)
    assert (model.power, model.first) == (8, 2)
    assert model.half == (32 if weights else 16)


CHANNELS_LAST = {
    "map": (lambda self, x: self.b(self.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2), "image"),
    "tokens": (lambda self, x: self.b(self.a(x).flatten(2).transpose(1, 2)).mean(1), "invariant"),
}


@pytest.mark.parametrize("size", [(8, 8), (9, 6)])
@pytest.mark.parametrize("layout", CHANNELS_LAST)
def test_a_linear_classifier_of_each_pixel(layout, size):
    forward, law = CHANNELS_LAST[layout]
    plain = Network(forward, a=conv(3, 8), b=nn.Linear(8, 5))
    model = with_random_statistics(gzoo.convert(plain, "p4m")).eval()
    assert worst_error(model, "p4m", image(size), "image", law) < 1e-12


def test_a_frozen_layer_gets_no_fresh_weights():
    plain = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    plain[2].requires_grad_(False)
    with pytest.raises(ValueError, match=r"2 is frozen, and its new weights are fresh; convert before you freeze, or"):
        gzoo.convert(plain, "p4")
    model = gzoo.convert(plain, "p4", weights="transfer")
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"2.weight", "2.bias"}


class PairNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 8), nn.Linear(8, 3)

    def forward(self, x, y):
        return self.b((self.a(x) - self.a(y)).mean((2, 3)))


def zero(layer):
    nn.init.zeros_(layer.weight)
    return layer


def multiples_of_four(self, x):
    y = self.a(x)
    z = F.max_pool2d(F.max_pool2d(y, 2), 2)
    z = z + moved_if_odd(z)
    return self.c(self.b(y + F.interpolate(z, scale_factor=4)))  # a sum of maps of one size


class Fused(nn.Module):
    """Two scales, brought together by MobileNetV5's adapter."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = conv(3, 8), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.msfa = MobileNetV5MultiScaleFusionAdapter([8, 16], 12, output_resolution=6)

    def forward(self, x):
        fine = self.fine(x)
        return self.msfa([fine, self.coarse(fine)])


def test_the_fusion_of_mobilenet_v5_is_symmetric():
    plain = Fused()
    model = with_random_statistics(gzoo.convert(copy.deepcopy(plain), "p4m", classifier="", match="width")).eval()
    for size in ((12, 12), (13, 13), (12, 17), (9, 11)):  # in one test, as to convert takes most of it
        assert worst_error(model, "p4m", image(size), "image", "fields") < 1e-12
    adapter, maps = plain.msfa, [torch.randn(1, 8, 12, 12), torch.randn(1, 16, 6, 6)]
    expected = adapter(maps)
    assert torch.equal(act_symmetrically(adapter, Calls())(maps), expected)  # whole factors stay as they are


class PixelsInARow(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


ATTENTION = {
    "FastViT's": lambda: fastvit.Attention(32, 8, qkv_bias=True),
    "ViT's": lambda: PixelsInARow(tl.Attention(32, 8)),
    "MetaFormer's": lambda: PixelsInARow(metaformer.Attention(32, 8)),
    "EfficientViT's": lambda: LiteMLA(32, 32, dim=8),
    "SwiftFormer's": lambda: EfficientAdditiveAttention(32, 32),
    "EdgeNeXt's, of channels": lambda: PixelsInARow(edgenext.CrossCovarianceAttn(32, 8)),
    "EdgeNeXt's, in uneven parts": lambda: edgenext.SplitTransposeBlock(32, 3, num_heads=4, ls_init_value=1.0),
    "heads within q, k and v": lambda: tl.Attention2d(32, num_heads=4),
    "q, k and v within heads": lambda: tl.Attention2d(32, 24, num_heads=2, head_first=True),
    "one key for all queries": lambda: tl.MultiQueryAttention2d(32, 24, num_heads=4, key_dim=6),
    "fewer keys and queries": lambda: tl.MultiQueryAttention2d(32, num_heads=2, query_strides=2, kv_stride=2),
}


def attending(name, fused=True):
    attention = ATTENTION[name]()
    for module in attention.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    plain = Network(
        lambda self, x: self.head(self.last(self.attention(self.stem(x))) + self.stem(x)),
        stem=nn.Sequential(conv(3, 32), nn.BatchNorm2d(32), nn.ReLU()),
        attention=attention,
        last=conv(attention(torch.randn(1, 32, 4, 4)).shape[1], 32),
        head=nn.Sequential(*head(32)),
    )
    plain.pretrained_cfg = {"input_size": (3, 12, 12)}  # the self-check takes an image of this size
    return plain


@pytest.mark.parametrize("group", ["c2", "p4m"])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_between_pixels_looks_from_every_pose_alike(name, group):
    model = with_random_statistics(gzoo.convert(attending(name), group)).eval()
    sizes = ((8, 8), (8, 12)) if "fewer" in name else ((9, 9), (8, 8), (8, 11))  # it wants whole strides
    for size in sizes:
        with KeepDouble():  # EfficientViT's turns to float32, and divides by what may be small
            assert worst_error(model, group, image(size), "image", "invariant") < 1e-11


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_over_finer_groups_without_fused_kernels_and_with_a_gradient(name):
    model = with_random_statistics(gzoo.convert(attending(name, fused=False), "c8"))
    assert gzoo.check(model.eval(), 8).worst < 1e-12
    model(torch.randn(2, 3, 8, 8, dtype=torch.float64)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_heads_hold_the_parameters_of_the_plain_network_and_whole_fibres():
    plain = nn.Sequential(conv(3, 64), nn.ReLU(), fastvit.Attention(64, 16), conv(64, 64), *head(64))
    model = convert_in_place(copy.deepcopy(plain), "p4")
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in (plain, model)]
    assert 0.9 < sizes[1] / sizes[0] < 1.1
    attention = model[2]
    assert (attention.num_heads, attention.head_dim % 4) == (4, 0)
    assert attention.head_dim == attention.proj.in_fields  # four heads of whole fibres of four
    assert attention.scale == attention.head_dim**-0.5


@pytest.mark.parametrize(("place", "blamed", "shape"), [("", "qkv", (12, 12)), (".attn_drop", "attn_drop", (144, 1))])
def test_attention_that_knows_positions_is_refused(place, blamed, shape):
    plain = attending("FastViT's", fused=False)
    positions = torch.linspace(0, 1, 144).view(shape)  # for the 12 x 12 pixels of the self-check
    module = plain.get_submodule(f"attention{place}")
    module.register_forward_pre_hook(lambda module, inputs: (inputs[0] + positions[-inputs[0].shape[-2] :],))
    with pytest.raises(ValueError, match=rf"^attention\.{blamed} \(\w+\) is not equivariant under p4m at 12x12 pixels"):
        gzoo.convert(plain, "p4m")


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_not_that_of_each_pose(name):
    with pytest.raises(ValueError, match=r"its attention is one for all poses here, and each pose's own in the plain"):
        gzoo.convert(attending(name), "p4", weights="transfer")


# Channels that have no fibre, inside of a network.
FIBRELESS = {
    "spatial attention": lambda: nn.Sequential(conv(3, 12), nn.ReLU(), SpatialAttention(), conv(12, 8), *head(8)),
    "attention gate": lambda: Network(
        lambda self, x: self.head(self.a(x) * self.gate(self.a(x))),
        a=nn.Sequential(conv(3, 12), nn.ReLU()),
        gate=nn.Sequential(conv(12, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid()),
        head=nn.Sequential(conv(12, 8), nn.ReLU(), *head(8)),
    ),
    "gate of a transposed convolution": lambda: Network(
        lambda self, x: self.head(self.a(x) * self.gate(self.a(x))),
        a=nn.Sequential(conv(3, 12), nn.ReLU()),
        gate=nn.Sequential(nn.ConvTranspose2d(12, 1, 3, padding=1), nn.Sigmoid()),
        head=nn.Sequential(conv(12, 8), nn.ReLU(), *head(8)),
    ),
    "several gates": lambda: nn.Sequential(conv(3, 12), nn.ReLU(), Gated(12, 3), conv(12, 8), *head(8)),
    "one query for all keys, in patches": lambda: nn.Sequential(
        conv(3, 16), nn.ReLU(), MobileVitV2Block(16, transformer_depth=1, patch_size=2), nn.ReLU(), *head(16)
    ),
    "the image again": lambda: Network(
        lambda self, x: self.head(self.b(torch.cat([x, self.a(x), x.amax(1, keepdim=True)], 1))),
        a=nn.Sequential(conv(3, 12), nn.BatchNorm2d(12), nn.ReLU()),
        b=nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), conv(16, 8)),
        head=nn.Sequential(*head(8)),
    ),
    "the image again, before a mask": lambda: Network(
        lambda self, x: self.mask(torch.cat([self.a(x), x], 1)), a=conv(3, 12), mask=conv(15, 2, 1)
    ),
    "noise that is taken off the image": lambda: Network(
        lambda self, x: x - self.noise(x),
        noise=nn.Sequential(conv(3, 12), nn.BatchNorm2d(12), nn.ReLU(), conv(12, 3)),
    ),
    "an image that is made in two steps": lambda: Network(
        lambda self, x: self.b(x + self.a(x)) + x + self.a(x), a=conv(3, 3), b=nn.Sequential(conv(3, 8), conv(8, 3, 1))
    ),
    "a maximum over channels, as CBAM's authors write it": lambda: Network(
        lambda self, x: self.head(self.a(x) * self.gate(torch.max(self.a(x), 1)[0].unsqueeze(1)).sigmoid()),
        a=conv(3, 12),
        gate=conv(1, 1),
        head=nn.Sequential(nn.ReLU(), conv(12, 8), *head(8)),
    ),
    "less the mean over channels": lambda: Network(
        lambda self, x: self.head(self.a(x) - self.a(x).mean(1, keepdim=True)),
        a=conv(3, 12),
        head=nn.Sequential(nn.ReLU(), conv(12, 8), *head(8)),
    ),
}


IMAGE_TO_IMAGE = (
    "the image again, before a mask",
    "noise that is taken off the image",
    "an image that is made in two steps",
)


@pytest.mark.parametrize("group", ["d1", "p4", "p4m"])
@pytest.mark.parametrize("name", FIBRELESS)
def test_channels_without_a_fibre_move_as_the_image_does(name, group):
    model = with_random_statistics(gzoo.convert(FIBRELESS[name](), group)).eval()
    output = "image" if name in IMAGE_TO_IMAGE else "invariant"
    for size in ((9, 9), (8, 8), (8, 11)):
        assert worst_error(model, group, image(size), "image", output) < 1e-12


@pytest.mark.parametrize("name", FIBRELESS)
def test_channels_without_a_fibre_are_as_exact_over_finer_groups(name):
    model = with_random_statistics(gzoo.convert(FIBRELESS[name](), "c8")).eval()
    assert gzoo.check(model, 9).worst < 1e-12


@pytest.mark.parametrize("group", GRID_GROUPS)
@pytest.mark.parametrize("pad_type", ["", "same"])
def test_a_convolution_whose_filters_depend_on_the_image_converts(pad_type, group):
    block = CondConvResidual(8, 12, 3, stride=2, pad_type=pad_type, exp_ratio=2.0, num_experts=3)
    plain = nn.Sequential(conv(3, 8), nn.ReLU(), block, *head(12))
    model = with_random_statistics(gzoo.convert(plain, group)).eval()
    for size in ((9, 9), (8, 8), (8, 11)):
        assert worst_error(model, group, image(size), "image", "invariant") < 1e-12


def test_experts_hold_the_parameters_of_the_plain_network_and_its_shares_are_invariant():
    block = CondConvResidual(32, 32, 3, exp_ratio=2.0, num_experts=3)
    plain = nn.Sequential(conv(3, 32), nn.ReLU(), block, *head(32))
    model = convert_in_place(copy.deepcopy(plain), "p4")
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in (plain, model)]
    assert 0.9 < sizes[1] / sizes[0] < 1.1
    assert isinstance(model[2].routing_fn, InvariantLinear)
    assert model[2].conv_pw.num_experts == model[2].routing_fn.out_features == 3
    with pytest.raises(ValueError, match=r"each pose's own in the plain network"):
        gzoo.convert(plain, "p4", weights="transfer")


@pytest.mark.parametrize("group", ["p4m", "c8"])
def test_focal_modulation_converts(group):
    model = gzoo.convert(FocalNet(depths=(1, 1, 1, 1), embed_dim=16), group)
    assert gzoo.check(with_random_statistics(model), (64, 75)).worst < 1e-12


def test_gates_hold_the_parameters_of_the_plain_network():
    plain = nn.Sequential(conv(3, 64), nn.ReLU(), Gated(64, 3), conv(64, 64), *head(64))
    model = gzoo.convert(plain, "p4")
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in (plain, model)]
    assert 0.9 < sizes[1] / sizes[0] < 1.1
    assert model[2].split == [4 * model[3].in_fields, 3]


@pytest.mark.parametrize("name", sorted(FIBRELESS.keys() - {"noise that is taken off the image"}))
def test_channels_without_a_fibre_are_not_those_of_each_pose(name):
    with pytest.raises(ValueError, match=r"the same for all poses here, and each pose's own in the plain network"):
        gzoo.convert(FIBRELESS[name](), "p4", weights="transfer")


def tied():
    a, b = conv(3, 3), conv(3, 3)
    b.weight = a.weight
    return {"a": a, "b": b}


def hooked():
    model = small()
    model[0].register_full_backward_hook(lambda module, to_inputs, to_output: None)
    return model


def moved(x):
    """Each row goes to where the next one was."""
    return x.roll(1, 2)


def moved_if_odd(x):
    return moved(x) if x.shape[2] % 2 else x


REFUSED = {
    "norm of features beside the image": (
        lambda: Network(
            lambda self, x: self.head(self.norm(torch.cat([self.a(x), x], 1))),
            a=conv(3, 13),
            norm=nn.BatchNorm2d(16),
            head=nn.Sequential(conv(16, 8), *head(8)),
        ),
        "^norm: it is given channels that have no fibre .* beside feature maps, which only a convolution can take",
    ),
    "gate of a standardized convolution": (
        lambda: Network(
            lambda self, x: self.head(self.a(x) * self.gate(x)),
            a=conv(3, 12),
            gate=tl.StdConv2d(3, 1, 3, padding=1),
            head=nn.Sequential(conv(12, 8), *head(8)),
        ),
        "^gate: it makes or reads channels that have no fibre",
    ),
    "unknown module": (
        lambda: nn.Sequential(conv(3, 16), type("Slope", (nn.PReLU,), {})(16), *head(16)),
        r"^1 is a .*\.Slope with parameters or buffers of its own \(weight\), .* with gzoo.rule\.",
    ),
    "unknown module without parameters": (
        lambda: nn.Sequential(conv(3, 16), nn.FractionalMaxPool2d(2, 9), conv(16, 8), *head(8)),
        r"^1 is a torch\.nn\.modules\.pooling\.FractionalMaxPool2d, which gzoo has no equivariant counterpart for",
    ),
    "unknown module before the first convolution": (
        lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 0)), conv(3, 16), *head(16)),
        r"^0: it pads \(0, 1, 0, 0\) pixels \(left, right, top, bottom\): a quarter turn exchanges the axes",
    ),
    "filter a channel in a table": (
        lambda: nn.Sequential(conv(3, 16), Tables(torch.ones(16, 1, 3, 3) / 9), *head(16)),
        r"^1 is a .*Tables with parameters or buffers of its own \(table\)",
    ),
    "table that is written in training": (
        lambda: nn.Sequential(conv(3, 16), Tables(torch.ones(1, 1, 3, 3), written=True), *head(16)),
        r"^1 is a .*Tables with parameters or buffers of its own \(table\)",
    ),
    "table with a direction": (
        lambda: nn.Sequential(conv(3, 16), Tables(torch.tensor([[[[0.0, 1, 0], [1, 0, -1], [0, -1, 0]]]])), *head(16)),
        r"^1 \(Tables\) is not equivariant under p4",
    ),
    "position embedding": (
        lambda: nn.Sequential(conv(3, 16), Position(), *head(16)),
        r"^1 is a .*Position with parameters or buffers of its own \(embedding\)",
    ),
    "pad of one axis": (
        lambda: Network(
            lambda self, x: self.head(self.second(F.pad(self.first(x), (0, 1)))),
            first=conv(3, 16),
            second=conv(16, 16, 2, padding=0),
            head=nn.Sequential(*head(16)),
        ),
        r"^second \(GroupConv2d\) is not equivariant under p4 at 64x64 pixels: .*a shift, a padding or a crop of one",
    ),
    "broken at odd sides": (
        lambda: Network(
            lambda self, x: self.head(self.second(moved_if_odd(self.first(x)))),
            first=conv(3, 16),
            second=conv(16, 16),
            head=nn.Sequential(*head(16)),
        ),
        r"^second \(GroupConv2d\) is not equivariant under p4 at 65x65 pixels: neither",
    ),
    "crop of one axis": (
        lambda: Network(
            lambda self, x: self.second(self.first(x)[:, :, 1:]).mean((2, 3)), first=conv(3, 16), second=conv(16, 5)
        ),
        r"^second\.0 \(GroupConv2d\) is not equivariant under p4",
    ),
    "step after the last module": (
        lambda: Network(lambda self, x: self.first(x)[:, :, :, :3].mean((2, 3)), first=conv(3, 16)),
        r"the output of EquivariantNetwork is not equivariant under p4 .*, though each module is",
    ),
    "split of channels": (
        lambda: Network(
            lambda self, x: self.second(self.first(x).roll(1, 1)).mean((2, 3)), first=conv(3, 16), second=conv(16, 8)
        ),
        r"^second\.0 \(GroupConv2d\) is not equivariant under p4 .* a split of channels",
    ),
    "norm of a flattened map": (
        lambda: nn.Sequential(conv(3, 16), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 5)),
        r"^3: its channels come out of 'flatten', .* other than a linear layer or a batch norm reads",
    ),
    "kernel that shrinks one axis": (
        lambda: nn.Sequential(conv(3, 16), nn.Conv2d(16, 16, (1, 3)), *head(16)),
        r"^1: kernel_size=\(1, 3\) with padding=\(0, 0\) makes the map smaller along one axis only",
    ),
    "kernel of odd and even sides": (
        lambda: nn.Sequential(conv(3, 16), nn.Conv2d(16, 16, (2, 3), padding=(0, 0)), *head(16)),
        r"^1: kernel_size=\(2, 3\)",
    ),
    "patches that are no squares": (
        lambda: nn.Sequential(conv(3, 16), nn.ReLU(), MobileVitV2Block(16, patch_size=(2, 4)), *head(16)),
        r"^2: patch_size=\(2, 4\) differs between the axes",
    ),
    "function that a module does": (
        lambda: Network(lambda self, x: self.b(F.pixel_shuffle(self.a(x), 2)), a=conv(3, 16), b=conv(4, 3)),
        r"^b: its channels come out of the function 'pixel_shuffle'; use the module torch\.nn\.PixelShuffle",
    ),
    "function that makes the output": (
        lambda: Network(lambda self, x: F.pixel_shuffle(self.a(x), 2), a=conv(3, 16)),
        r"^Network gives what the function 'pixel_shuffle' makes; use the module torch\.nn\.PixelShuffle",
    ),
    "attention": (
        lambda: Network(
            lambda self, x: self.head(
                torch.einsum("bchw,bdhw->bcd", self.first(x), self.first(x)).unflatten(2, (4, 4))
            ),
            first=conv(3, 16),
            head=nn.Sequential(nn.Flatten(), nn.Linear(256, 5)),
        ),
        r"^head\.1: its channels come out of 'einsum'",
    ),
    "transformer": (
        lambda: timm.create_model("vit_tiny_patch16_224"),
        r"^blocks\.0\.norm1: its channels come out of 'cat' with a tensor .* class token .* gzoo\.equivarify and",
    ),
    "tokens mixed by a linear layer": (
        lambda: timm.models.mlp_mixer.MlpMixer(img_size=64, num_blocks=1, embed_dim=8),
        r"^blocks\.0\.mlp_tokens\.fc1 is linear over pixels or tokens, .* gzoo\.equivarify and gzoo\.canonicalize take",
    ),
    "torch's transformer": (
        lambda: Network(
            lambda self, x: self.fc(self.layer(self.stem(x).flatten(2).transpose(1, 2)).mean(1)),
            stem=conv(3, 16),
            layer=nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
            fc=nn.Linear(16, 5),
        ),
        r"^layer\.self_attn\.out_proj is a .* gzoo\.equivarify and gzoo\.canonicalize take any network",
    ),
    "network for another size": (
        lambda: Network(lambda self, x: self.first(x.view(2, 3, 48, 48)).mean((2, 3)), first=conv(3, 16)),
        r"^Network does not run on .* model.pretrained_cfg = {'input_size': \(channels, height, width\)}",
    ),
    "image that is cut into patches": (
        lambda: Network(lambda self, x: self.first(x.view(-1, 3, 8, 8, 4)[..., 0]).mean((2, 3)), first=conv(3, 16)),
        r"^nothing of Network can be followed\. first: its channels come out of '\w+'",
    ),
    "network that ignores the image": (
        lambda: Network(lambda self, x: x.mean((1, 2, 3)), first=conv(3, 16)),
        r"^nothing of Network can be followed\. no layer with parameters runs on an image",
    ),
    "broken behind a stride": (
        lambda: Network(
            lambda self, x: self.head(moved_if_odd(self.stem(x))), stem=conv(3, 16, stride=2), head=conv(16, 5, 1)
        ),
        r"under p4 at 65x65 pixels",
    ),
    "one output of several": (
        lambda: Network(lambda self, x: (self.a(x), {"b": moved(self.a(x))}), a=conv(3, 16)),
        r"^the output\[1\] of EquivariantNetwork is not equivariant under p4 at 64x64 pixels",
    ),
    "input by keyword": (
        lambda: Network(lambda self, x: self.b(self.a(input=x)).mean((2, 3)), a=conv(3, 16), b=conv(16, 5)),
        r"^the converted EquivariantNetwork does not run \(at a: LiftingConv2d.forward\(\) got .* argument 'input'",
    ),
    "a vector beside a map": (
        lambda: Network(lambda self, x: (self.b(self.a(x).mean((2, 3))), self.a(x)), a=conv(3, 16), b=nn.Linear(16, 7)),
        r"^Network gives several outputs, \(2, 7\), \(2, 16, 64, 64\); say .* as in classifier=\['b'\], or",
    ),
    "logits beside what they are made of": (
        lambda: Network(
            lambda self, x: (self.b(self.a(x).mean((2, 3))), self.a(x).mean((2, 3))), a=conv(3, 16), b=nn.Linear(16, 7)
        ),
        r"^Network gives several outputs, \(2, 7\), \(2, 16\); say .* as in classifier=\['b'\], or classifier='' if",
    ),
    "two images": (
        lambda: PairNetwork(),
        r"missing 1 required positional argument: 'y'. gzoo converts networks of one argument, images",
    ),
    "broken behind weights of zero": (
        lambda: Network(lambda self, x: moved(self.b(self.a(x))), a=conv(3, 16), b=zero(nn.Conv2d(16, 5, 3))),
        r"^the output of EquivariantNetwork is not equivariant under p4 at 64x64 pixels",
    ),
    "broken at odd multiples of four": (
        lambda: Network(multiples_of_four, a=conv(3, 8), b=conv(8, 8), c=nn.Conv2d(8, 5, 1)),
        r"^b \(GroupConv2d\) is not equivariant under p4 at 68x68 pixels",
    ),
    "broken where a pool of two leaves odd sides": (
        lambda: Network(
            lambda self, x: self.b(moved_if_odd(self.p(self.a(x)))),
            **{"a": conv(3, 8), "p": nn.MaxPool2d(2), "b": nn.Conv2d(8, 5, 1)},
        ),
        r"not equivariant under p4 at 63x63 pixels",
    ),
    "broken behind a stride of four": (
        lambda: Network(
            lambda self, x: self.b(moved_if_odd(self.a(x))),
            **{"a": nn.Conv2d(3, 8, 7, stride=4, padding=2), "b": nn.Conv2d(8, 5, 1)},
        ),
        r"not equivariant under p4 at 68x68 pixels",
    ),
    "shared weight": (
        lambda: Network(lambda self, x: self.b(self.a(x)).mean((2, 3)), **tied()),
        r"^b is a .*Conv2d whose weight is that of a as well, and each would get its own here",
    ),
    "lost before it is concatenated": (
        lambda: Network(
            lambda self, x: self.c(torch.cat((self.a(x), F.pixel_shuffle(self.b(x), 2)[..., ::2, ::2]), 1)),
            **{"a": conv(3, 4), "b": conv(3, 16), "c": conv(8, 5)},
        ),
        r"^c: its channels come out of the function 'pixel_shuffle'; use the module torch.nn.PixelShuffle",
    ),
    "broken behind images made float32": (
        lambda: Network(lambda self, x: moved(self.a(x.float())), a=conv(3, 5)),
        r"^the output of EquivariantNetwork is not equivariant under p4 at 64x64 pixels",
    ),
    "dropout in evaluation": (
        lambda: Network(lambda self, x: F.dropout(self.a(x), training=True).mean((2, 3)), a=conv(3, 16)),
        r"^EquivariantNetwork gives two results for one image, in evaluation, too",
    ),
    "no finite output": (
        lambda: Network(lambda self, x: self.a(x).abs().neg().log(), a=conv(3, 16)),
        r"^the converted EquivariantNetwork gives numbers that are not finite, so it cannot be checked",
    ),
    "positions beside the image": (
        lambda: Network(
            lambda self, x: self.b(torch.cat((y := self.a(x), torch.zeros(y.shape, device=y.device)), 1)),
            **{"a": conv(3, 8), "b": conv(16, 5)},
        ),
        r"^b: its channels come out of 'cat' with a tensor that is not made of the image, such as positions",
    ),
    "own group": (
        lambda: Network(lambda self, x: self.a(x).mean((2, 3)), a=conv(3, 16), group=2),
        r"^Network has an attribute group, which is where a converted network keeps its own",
    ),
    "lazy layer": (
        lambda: nn.Sequential(nn.LazyConv2d(16, 3), *head(16)),
        r"^0 is a .*LazyConv2d, which has no weights before it has run; run the network once",
    ),
    "parametrized weight": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(conv(3, 16)), *head(16)),
        r"^0 is a .* whose weights are parametrized; take that off first, with .*remove_parametrizations",
    ),
    "backward hook": (lambda: hooked(), r"^0: it has a hook, "),
    "compiled network": (
        lambda: torch.compile(small(), backend="eager"),
        r"^the network is a .*OptimizedModule, which torch\.compile made; convert the network first, then compile",
    ),
    "compiled layer": (
        lambda: nn.Sequential(torch.compile(conv(3, 16), backend="eager"), *head(16)),
        r"^0 is a .*OptimizedModule, which torch\.compile made",
    ),
    "traced network": (
        lambda: torch.jit.trace(conv(3, 16), torch.randn(1, 3, 8, 8)),
        r"^the network is a torch\.jit\..*, a recorded graph, not layers; convert the network that it was made from",
    ),
    "spectral norm": (
        lambda: nn.Sequential(nn.utils.spectral_norm(conv(3, 16)), *head(16)),
        r"^0: it has a hook, .*SpectralNorm.*, which would not go over to the layer in its place; take it off first",
    ),
    "pruned": (
        lambda: nn.Sequential(prune.l1_unstructured(conv(3, 16), "weight", 0.5), *head(16)),
        r"^0 is a .*Conv2d that holds a computed weight, as torch.nn.utils.weight_norm and prune leave one",
    ),
    "graph module": (lambda: torch.fx.symbolic_trace(small()), r"^the network is a torch\.fx\..*, a recorded graph"),
    "exported program": (
        lambda: torch.export.export(small(), (torch.randn(2, 3, 8, 8),)),
        r"^model is .*, a ExportedProgram; gzoo\.convert takes a network",
    ),
    "quantized network": (
        lambda: nn.Sequential(torch.ao.quantization.QuantStub(), conv(3, 16), *head(16)),
        r"^0 is a .*QuantStub, of a quantized network; convert the float network that it was made from",
    ),
    "name": (lambda: "resnet18", r"^model is 'resnet18', a str; gzoo\.convert takes a network, an nn\.Module"),
    "network without numbers": (
        lambda: small().to("meta"),
        r"^Sequential is on the meta device, where the converted network cannot be checked",
    ),
    "three-dimensional convolution": (
        lambda: nn.Sequential(nn.ReLU(), nn.Conv3d(3, 8, 3)),
        r"^Sequential has no Conv2d, and gzoo converts networks of 2D images that begin with one; 1 is a Conv3d",
    ),
    "transposed convolution of the image": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 2, stride=2), conv(8, 8), *head(8)),
        r"^0: it enlarges channels that have no fibre .*; put a convolution before it, which lifts them to fields",
    ),
    "transposed convolution to a size": (
        lambda: Network(
            lambda self, x: self.head(self.up(self.first(x), output_size=(2 * x.shape[2], 2 * x.shape[3]))),
            first=conv(3, 8),
            up=nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1),
            head=nn.Sequential(*head(8)),
        ),
        r"at up: output_size is \(128, 128\), but the windows cover \(127, 127\) pixels; others would be added",
    ),
    "layer norm over pixels": (
        lambda: nn.Sequential(conv(3, 16), nn.LayerNorm((16, 64, 64)), *head(16)),
        r"^1: layer norm over \(16, 64, 64\) holds one parameter per pixel; norm channels only",
    ),
    "network without a convolution": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 5)),
        r"^Sequential has no Conv2d, .*; its layers with parameters are: Linear\. gzoo\.equivarify and gzoo",
    ),
    "network without anything": (lambda: nn.Sequential(), r"^Sequential has no Conv2d, .* with parameters are: none"),
    "network that does not run": (
        lambda: nn.Sequential(conv(3, 16), *head(8)),
        r"^Sequential does not run on a random image of \(2, 3, 64, 64\), at 3: ",
    ),
    "equivariant network": (
        lambda: gzoo.convert(small(), "p4"),
        r"^EquivariantSequential is equivariant already; convert the plain network",
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_converted_is_named(what):
    build, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        gzoo.convert(build(), "p4")


def test_an_unknown_match_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match="match is 'size'; accepted are 'params', 'flops', 'width'"):
        gzoo.convert(small(), "p4", "size")


def test_an_unknown_group_is_refused():
    with pytest.raises(ValueError, match="unknown group 'p6'; accepted are p4"):
        gzoo.convert(small(), "p6")
    with pytest.raises(ValueError, match="group is None; accepted are names such as 'p4m' or 'd8:d4:d1', and a gzoo"):
        gzoo.convert(small(), None)


@pytest.mark.parametrize("group", ["p4", "c8"])
def test_the_default_device_does_not_matter(group):
    plain, models = small(), []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        with torch.device(device):
            models.append(gzoo.convert(plain, group))
    x = image().float()
    assert models[1](x).equal(models[0](x))


def test_a_transposed_convolution_takes_the_size_that_it_gives():
    layer = gzoo.nn.GroupConvTranspose2d(groups.get("p4"), 2, 2, 2, stride=2)
    x = torch.randn(1, 8, 5, 5)
    assert layer(x, output_size=(1, 8, 10, 10)).equal(layer(x))


@pytest.mark.parametrize("group", ["c8", "d6"])
def test_a_network_over_finer_rotations_is_exact_on_those_that_fit_the_grid(group):
    model = with_random_statistics(gzoo.convert(small(), group))
    assert gzoo.check(model, 9).worst < 1e-12


def test_checkpoints_of_the_two_bases_are_told_apart():
    with pytest.raises(ValueError, match=r"c8.*p4m"):
        gzoo.convert(small(), "p4m").load_state_dict(gzoo.convert(small(), "c8").state_dict())


@pytest.mark.parametrize("group", ["p4m", "c8", "d8", "c16"])
def test_a_network_in_the_steerable_3r_basis_trains_and_stays_exact_on_the_turns_that_fit_the_grid(group):
    model = gzoo.convert(small(), group, basis="steerable_3r")
    kernels = [layer for layer in model.modules() if isinstance(layer, LiftingConv2d | GroupConv2d)]
    assert [layer.weight.shape[-1] for layer in kernels] == [8, 8]
    before = [layer.weight.detach().clone() for layer in kernels]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(torch.randn(4, 3, 9, 9)), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()
    assert not any(layer.weight.equal(old) for layer, old in zip(kernels, before, strict=True))
    model = with_random_statistics(model).eval()
    for size in [(7, 7), (8, 8), (6, 9)]:
        assert worst_error(model, group, image(size), "image", "invariant") < 1e-12


def test_the_checkpoint_of_another_band_limit_is_refused_where_all_shapes_are_the_same():
    plain = nn.Sequential(conv(3, 8, 2, padding=0), nn.ReLU(), *head(8))  # 2x2 kernels have one function in both
    default, finer = (gzoo.convert(plain, "c8", basis=basis) for basis in ("steerable", "steerable_3r"))
    assert [v.shape for v in default.state_dict().values()] == [v.shape for v in finer.state_dict().values()]
    with pytest.raises(ValueError, match="a c8 network in the steerable_3r basis, but the model is a c8 network in"):
        default.load_state_dict(finer.state_dict())


def test_a_refused_network_is_left_as_it_was():
    plain = nn.Sequential(conv(3, 16), nn.BatchNorm2d(16), nn.FractionalMaxPool2d(2, 9), *head(16))
    before = repr(plain)
    with pytest.raises(ValueError, match="FractionalMaxPool2d"):
        gzoo.convert(plain, "p4")
    assert repr(plain) == before


# Rules of one's own -------------------------------------------------------------------------------------------------


class Scale(nn.Module):
    """Multiplies each channel by a number of its own, and adds one, in a table that gzoo knows nothing of."""

    def __init__(self, channels):
        super().__init__()
        self.factor = nn.Parameter(torch.randn(2, channels, 1, 1))

    def forward(self, x):
        return x * self.factor[0] + self.factor[1]


class FibreScale(Scale):
    def __init__(self, fields, order):
        super().__init__(fields)
        self.order = order

    def forward(self, x):
        factor, offset = self.factor.repeat_interleave(self.order, 1)
        return x * factor + offset


@pytest.fixture
def rules():
    """Rules that a test adds are forgotten after it."""
    known = dict(RULES)
    yield
    RULES.clear()
    RULES.update(known)


@pytest.mark.usefixtures("rules")
def test_a_taught_module_converts():
    plain = nn.Sequential(conv(3, 16), Scale(16), nn.ReLU(), *head(16))
    with pytest.raises(ValueError, match=r"1 is a .*Scale"):
        gzoo.convert(plain, "p4m")

    @gzoo.rule(Scale)
    def scale(plain, recipe):
        return FibreScale(recipe.in_fields, recipe.group.order)

    model = gzoo.convert(plain, "p4m").double()
    assert type(model[1]) is FibreScale
    assert worst_error(model, "p4m", image(), "image", "invariant") < 1e-12


@pytest.mark.usefixtures("rules")
def test_a_wrong_rule_is_found_by_the_self_check():
    @gzoo.rule(Scale)
    def scale(plain, recipe):
        return Scale(recipe.in_fields * recipe.group.order)  # apart along the fibre

    with pytest.raises(ValueError, match=r"^1 \(Scale\) is not equivariant under p4m"):
        gzoo.convert(nn.Sequential(conv(3, 16), Scale(16), nn.ReLU(), *head(16)), "p4m")


# Random networks ----------------------------------------------------------------------------------------------------

NORMS = {
    "none": lambda width: nn.Identity(),
    "batch": nn.BatchNorm2d,
    "group": lambda width: nn.GroupNorm(2, width),
    "instance": lambda width: nn.InstanceNorm2d(width, affine=True),
    "layer": tl.LayerNorm2d,
}

blocks = st.lists(
    st.fixed_dictionaries(
        {
            "width": st.sampled_from((4, 6, 8, 12)),
            "kernel": st.integers(1, 4),
            "stride": st.integers(1, 2),
            "norm": st.sampled_from(sorted(NORMS)),
            "groups": st.integers(1, 2),
            "residual": st.booleans(),
            "depthwise": st.booleans(),
            "branches": st.booleans(),
            "pool": st.sampled_from((None, nn.MaxPool2d, nn.AvgPool2d)),
            "attention": st.booleans(),
        }
    ),
    min_size=1,
    max_size=4,
)


class Residual(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


class Branches(nn.Module):
    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


def random_network(blocks):
    layers, width = [], 2
    for i, block in enumerate(blocks):
        layers += [
            conv(width, block["width"], block["kernel"], stride=block["stride"], groups=block["groups"]),
            NORMS[block["norm"]](block["width"]),
            nn.ReLU(),
        ]
        width = block["width"]
        if block["residual"]:
            layers.append(
                Residual(nn.Sequential(conv(width, width, groups=width if block["depthwise"] else 1), nn.ReLU()))
            )
        if block["branches"]:
            layers.append(Branches(conv(width, width // 2), nn.Sequential(conv(width, width // 2, 1), nn.ReLU())))
        if block["attention"]:
            layers.append(SpatialAttention())
        if block["pool"] and i == 0:
            layers.append(block["pool"](2))
    network = nn.Sequential(*layers, *head(width))
    network.pretrained_cfg = {"input_size": (2, 17, 17)}  # the self-check takes an image of this size
    return network


@given(
    blocks,
    st.sampled_from((*GRID_GROUPS, "c3", "c8", "d8")),
    st.sampled_from(("params", "flops", "width")),
    st.sampled_from(((17, 17), (20, 13))),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_networks_are_exact_in_value_and_gradient(blocks, group, match, size):
    torch.manual_seed(0)
    plain = random_network(blocks)
    try:
        plain.eval()(torch.randn(2, 2, 17, 17)), plain(torch.randn(2, 2, *size))
    except ValueError:  # an instance norm of a single pixel
        assume(False)
    try:
        model, x = with_random_statistics(gzoo.convert(plain, group, match)).eval(), image(size, 2)
        y = model(x)
    except ValueError as error:  # which plain networks take, with more padding than image
        assume("is too small for a window" not in str(error))
        raise
    # A layer norm over a single field of 1x1 kernels leaves nothing of the image, and of its gradient rounding.
    assume(relative_error(*y) > 1e-4)
    assert worst_error(model, group, x, "image", "invariant") < 1e-10


def test_logits_of_the_same_converted_network_differ_between_images():
    model = with_random_statistics(gzoo.convert(small(), "p4")).eval()
    assert relative_error(model(image()), model(image())) > 1e-3
