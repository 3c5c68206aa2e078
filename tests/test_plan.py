"""The planned widths are those that are built, and keep what is to be matched."""

import itertools

import pytest
import timm
import torch
from timm.models.res2net import Bottle2neck
from timm.models.resnet import ResNet
from torch import nn

import gzoo
from gzoo import groups
from gzoo.cli import main
from gzoo.convert import convert_in_place
from gzoo.nn import GroupConv2d, GroupLinear, InvariantConv2d, InvariantLinear, LiftingConv2d
from gzoo.plan import nearest_divisor, plan

# Concatenation, grouped and depthwise convolutions, squeeze ratios, splits, dense connections.
NAMES = (
    *(
        "resnet50",
        "resnext50_32x4d",
        "seresnet50",
        "regnety_002",
        "densenet121",
        "mobilenetv3_small_100",
        "ghostnet_050",
    ),
    *("res2net50_14w_8s", "dpn48b", "mixnet_s", "convnext_atto", "inception_v4", "hrnet_w18_small", "dla46x_c"),
)


def meta(name):
    with torch.device("meta"):
        return timm.create_model(name)


CASES = [
    (name, group, match)
    for name, cases in zip(
        NAMES, itertools.cycle(((("p4", "params"), ("d8", "flops")), (("d8", "params"), ("c8", "flops")))), strict=False
    )
    for group, match in cases
    # Its layers of 8 to 20 channels are narrower than a single field of 8 or 16.
    if (name, match) != ("ghostnet_050", "flops")
]
# All layers of ten channels: one scale gives each the same one or two fields, which misses.
CASES += [("cnn7", "p4m", "flops"), ("cnn7", "c8", "flops"), ("cnn7", "d8", "params"), ("cnn7", "d16", "params")]


@pytest.mark.parametrize(("name", "group", "match"), CASES)
def test_what_is_matched_is_kept_within_ten_percent(name, group, match):
    total = plan(meta(name), groups.chain(group), match).total()
    ratio = total.params / total.plain_params if match == "params" else total.macs / total.plain_macs
    assert 0.9 <= ratio <= 1.1


def test_given_widths_and_the_parts_of_a_split_stay_as_they_are():
    """Where the match misses its 10%, single fields are added; not to these."""
    cnn7 = plan(meta("cnn7"), groups.chain("p4m"), "flops", widths={20: 5})
    assert {row.fields for row in cnn7.layers() if row.plain_width == 20} == {5}
    plain = ResNet(Bottle2neck, [1, 1, 1, 1], base_width=4, block_args={"scale": 4}, channels=(16,) * 4)
    gzoo.convert(plain, "d8", match="flops")  # its four parts are added to one another


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "group"), list(zip(NAMES[::2], itertools.cycle(("p4", "c8")))))
def test_the_plan_counts_the_parameters_that_are_built(name, group):
    total = plan(meta(name), groups.chain(group)).total()
    assert total.plain_params == parameters(meta(name))
    with torch.device("meta"):
        assert total.params == pytest.approx(parameters(convert_in_place(timm.create_model(name), group)), rel=1e-6)


@pytest.mark.parametrize("match", ["params", "flops", "width"])
def test_the_plan_counts_the_multiply_adds_that_are_done(match):
    plain = timm.create_model("ghostnet_050", num_classes=5)
    plain.pretrained_cfg = {"input_size": (3, 33, 33)}
    total = plan(plain, groups.chain("p4"), match).total()
    model, done = convert_in_place(plain, "p4", match).eval(), 0

    def count(module, inputs, output):
        nonlocal done
        weight = module.filter() if hasattr(module, "filter") else module.weight
        done += weight.numel() * output[0].numel() // weight.shape[0]

    for module in model.modules():
        if isinstance(module, GroupConv2d | LiftingConv2d | GroupLinear | InvariantLinear | InvariantConv2d):
            module.register_forward_hook(count)
    model(torch.randn(1, 3, 33, 33))
    assert total.macs == done


def test_rows_of_stages_add_up_to_the_total():
    made = plan(meta("resnext50_32x4d"), groups.chain("p4m"))
    assert sum(row.params for row in made.rows()) == made.total().params
    assert [row.name for row in made.rows()] == ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]


def test_a_grouped_convolution_keeps_groups_near_the_plain_ones():
    model = convert_in_place(timm.create_model("resnext50_32x4d", num_classes=5, layers=(1, 1, 1, 1)), "p4m")
    grouped = [m for m in model.modules() if isinstance(m, GroupConv2d) and m.groups > 1]
    assert grouped
    for layer in grouped:
        assert layer.in_fields % layer.groups == 0


@pytest.mark.parametrize(("n", "wanted", "expected"), [(12, 4.8, 4), (12, 6, 6), (7, 2, 1), (7, 4, 7), (1, 32, 1)])
def test_nearest_divisor(n, wanted, expected):
    assert nearest_divisor(n, wanted) == expected


def test_the_width_does_not_depend_on_the_classifier():
    shapes = [
        {k: v.shape for k, v in timm.create_model("p4m_mobilenetv3_small_100", num_classes=n).state_dict().items()}
        for n in (3, 1000)
    ]
    assert {key for key in shapes[0] if shapes[0][key] != shapes[1][key]} == {"classifier.weight", "classifier.bias"}


def test_gzoo_plan_prints_all_three_matches(capsys):
    assert main(["plan", "resnet18", "--group", "p4m"]) == 0
    printed = capsys.readouterr().out
    for text in ("match=params", "match=flops", "match=width", "layer4", "11.69M", "11.37M", "224x224"):
        assert text in printed


@pytest.mark.parametrize(("group", "misses"), [("p4", False), ("d8", True)])
def test_gzoo_plan_says_where_a_match_misses_its_ten_percent(group, misses, capsys):
    assert main(["plan", "lcnet_050", "--group", group]) == 0
    printed = capsys.readouterr().out
    assert ("match=flops misses its 10%: 1.46 times the plain network's" in printed) == misses
    assert "match=params misses" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet19", "--group", "p4"], "timm has no model 'resnet19'; near it are resnet18"),
        (["resnet18", "--group", "p5"], "unknown group 'p5'; accepted are p4"),
        (["p4_resnet20", "--group", "p4m"], "EquivariantStagedCNN is equivariant already; convert the plain network"),
        (["d8d4d1_resnet20", "--group", "p4"], "is equivariant already"),
        (["mixer_s32_224", "--group", "p4"], "blocks.0.mlp_tokens.fc1 is linear over pixels or tokens"),
        (["vit_tiny_patch16_224", "--group", "p4"], "does not convert. blocks.0.norm1: its channels come out of"),
    ],
)
def test_gzoo_plan_refuses_what_it_does_not_know(arguments, message, capsys):
    assert main(["plan", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_linear_networks_have_no_plan():
    with pytest.raises(ValueError, match="has no Conv2d"):
        plan(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), groups.chain("p4"))
