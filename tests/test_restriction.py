"""Networks that give up symmetry from stage to stage."""

import copy
import pickle
from itertools import pairwise

import pytest
import timm
import torch
from torch import nn

import gzoo
from gzoo import backbones, fields, groups
from gzoo._escnn import load
from gzoo.check import equivariance_error
from gzoo.convert import convert
from gzoo.nn import FibreNorm, Restriction
from gzoo.plan import plan
from tests.conftest import with_random_statistics

PAIRS = [
    ("d8", "p4m"),
    ("p4m", "p4"),
    ("p4m", "d1"),
    ("d8", "d2"),
    ("d6", "c3"),
    ("d16", "c16"),
    ("c8", "c1"),
    ("p4", "p4"),
]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return convert(backbones.resnet_cifar(8, base_width=8), "d8:d4:d1")


@pytest.mark.parametrize(("larger", "smaller"), PAIRS)
def test_a_restricted_field_follows_every_element_of_the_subgroup(larger: str, smaller: str) -> None:
    group, subgroup = groups.get(larger), groups.get(smaller)
    restriction = Restriction(group, subgroup)
    x = torch.randn(2, 3 * group.order, dtype=torch.float64)
    for h in range(subgroup.order):
        g = group.element(h, subgroup)
        assert g is not None
        moved = restriction(group.transform_features(x, g))
        assert torch.equal(moved, subgroup.transform_features(restriction(x), h))
    maps = torch.randn(2, group.order, 5, 4)
    for h in subgroup.grid_elements:
        g = group.element(h, subgroup)
        assert g is not None
        assert torch.equal(
            restriction(group.transform_features(maps, g)), subgroup.transform_features(restriction(maps), h)
        )


@pytest.mark.parametrize(("larger", "smaller"), [("d4", "c4"), ("d4", "c2"), ("c8", "c4"), ("d8", "d1")])
def test_restriction_is_escnns_up_to_the_order_of_fields(larger: str, smaller: str) -> None:
    enn = load().nn
    group, subgroup = groups.get(larger), groups.get(smaller)
    mirror = 0 if subgroup.reflections else None
    part = (mirror, subgroup.rotations) if group.reflections else subgroup.rotations  # escnn's name of the subgroup
    theirs = enn.RestrictionModule(group.field_type(1), part)
    (representation,) = theirs.out_type.representations
    ours = Restriction(group, subgroup)
    for h, element in enumerate(representation.group.elements):
        matrix = torch.tensor(representation(element))
        x = torch.eye(group.order, dtype=torch.float64)  # a row for each channel of the fibre
        assert torch.allclose(ours(x @ matrix.T), subgroup.transform_features(ours(x), h))


def test_elements_of_other_groups() -> None:
    d8, p4m, d1 = (groups.get(name) for name in ("d8", "d4", "d1"))
    assert [d8.element(h, p4m) for h in range(8)] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert [p4m.element(g, d8) for g in range(16)] == [
        0,
        None,
        1,
        None,
        2,
        None,
        3,
        None,
        4,
        None,
        5,
        None,
        6,
        None,
        7,
        None,
    ]
    assert [d1.element(g, p4m) for g in range(8)] == [0, None, None, None, 1, None, None, None]
    assert groups.get("c4").element(5, p4m) is None


@pytest.mark.parametrize("name", ["c4:c8", "c8:c3", "p4:p4m", "p4m:c8"])
def test_symmetry_is_not_won_on_the_way(name: str) -> None:
    with pytest.raises(ValueError, match="is no subgroup of"):
        groups.chain(name)


def test_names_of_chains() -> None:
    assert groups.spell(groups.chain("d8:p4m:d1")) == "d8:d4:d1"
    assert groups.spell(groups.chain("d4")) == "p4m"
    with pytest.raises(ValueError, match="unknown group 'q8'"):
        groups.chain("d8:q8")


@pytest.mark.parametrize("size", [(33, 33), (32, 32), (9, 12), (31, 17)])
def test_each_stage_follows_its_own_group(network: nn.Module, size: tuple[int, int]) -> None:
    model = with_random_statistics(network)
    report = gzoo.check(model, size)
    assert report.worst < 1e-12
    assert set(report.errors["stage 0"]) == set(groups.get("d8").grid_elements)
    assert set(report.errors["stage 2"]) == set(report.errors["logits"]) == {0, 8}
    assert min(report.given_up.values()) > 1e-3  # the symmetry is really gone
    assert "given up" in str(report)


@pytest.mark.parametrize("size", [9, 12])
def test_what_is_before_the_restriction_keeps_the_first_group(network: nn.Module, size: int) -> None:
    model = with_random_statistics(network).double().eval()
    group = groups.get("d8")
    first = nn.Sequential(model.stem, model.stages[0][:-1])
    assert isinstance(model.stages[0][-1], Restriction)
    x = torch.randn(1, 3, size, size, dtype=torch.float64)
    for g in group.grid_elements:
        error = equivariance_error(
            first, x, lambda x, g=g: group.transform_image(x, g), lambda y, g=g: group.transform_features(y, g)
        )
        assert error < 1e-12


def test_gradients_follow_the_last_group(network: nn.Module) -> None:
    model = with_random_statistics(network).double().eval()
    mirror = model.group
    x = torch.randn(1, 3, 11, 8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
    turned = mirror.transform_image(x.detach(), 1).requires_grad_()
    (other,) = torch.autograd.grad(model(turned).square().sum(), turned)
    assert torch.allclose(other, mirror.transform_image(gradient, 1), atol=1e-12)


def test_levels_say_their_types(network: nn.Module) -> None:
    model = timm.create_model("d8d4d1_resnet20", features_only=True)
    types = fields.field_types(model)
    assert [law.gspace for law in types] == [groups.get(name).gspace for name in ("d4", "d1", "d1")]
    assert [law.size for law in types] == model.feature_info.channels()
    x = torch.randn(1, 3, 16, 16)
    assert [level.shape[1] for level in model.eval()(x)] == model.feature_info.channels()


@pytest.mark.parametrize(
    ("name", "chain"),
    [
        ("resnet18", "p4m:p4:c1"),
        ("convnext_atto", "c8:c2"),
        ("efficientnet_lite0", "p4m:c4"),
        ("regnetx_002", "p4m:p4:c1"),  # a stage that runs all its children
    ],
)
def test_timms_networks(name: str, chain: str) -> None:
    model = convert(timm.create_model(name, num_classes=5), chain)
    assert gzoo.check(with_random_statistics(model), (32, 33)).worst < 1e-12


class Blocks(nn.Module):
    """A stage that runs all its children, as timm's RegStage."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        for i, (width, out) in enumerate(pairwise(widths)):
            self.add_module(f"b{i}", nn.Conv2d(width, out, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.children():
            x = block(x).relu()
        return x


class OwnStages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.s1, self.s2, self.fc = Blocks(3, 8, 8), Blocks(8, 16), nn.Linear(16, 5)
        self.feature_info = [{"num_chs": 8, "module": "s1"}, {"num_chs": 16, "module": "s2"}]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.s2(self.s1(x)).mean((2, 3)))


def test_a_stage_of_a_class_of_its_own_stays_what_it_was() -> None:
    plain = OwnStages()
    model = convert(plain, "p4:c2").eval()
    assert isinstance(model.s1, Blocks)
    assert model.state_dict().keys() == convert(plain, "p4").state_dict().keys()
    assert gzoo.check(with_random_statistics(model), (9, 12)).worst < 1e-12
    x = torch.randn(1, 3, 9, 12)
    with torch.no_grad():
        y = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(other.s1) is type(model.s1)
            assert torch.equal(other(x), y)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        exported = torch.export.export(model, (x,)).module()
        for made in (compiled, exported):
            assert torch.allclose(made(x), y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))


def test_the_output_of_a_class_of_its_own_is_held_to_the_last_group() -> None:
    plain = nn.Sequential(Blocks(3, 8), Blocks(8, 8), Blocks(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plain.append(nn.Linear(16, 5)).feature_info = [{"num_chs": n, "module": f"{i}"} for i, n in enumerate((8, 8, 16))]
    report = gzoo.check(with_random_statistics(convert(plain, "p4m:p4:c1")), (9, 12))
    assert report.worst < 1e-12
    assert set(report.given_up) == set(range(1, 8))


def test_a_list_of_maps_is_restricted_each() -> None:
    restriction = Restriction(groups.get("p4m"), groups.get("p4"))
    maps = [torch.randn(1, 8, 4, 4), torch.randn(1, 16, 2, 2)]
    restricted = restriction(maps)
    assert [torch.equal(y, restriction(x)) for x, y in zip(maps, restricted, strict=True)] == [True, True]
    assert isinstance(restriction(tuple(maps)), tuple)


@pytest.mark.parametrize("match", ["params", "flops"])
@pytest.mark.parametrize("name", ["wrn16_8", "resnet18"])
def test_what_is_matched(name: str, match: str) -> None:
    with torch.device("meta"):
        plain = timm.create_model(name)
    total = plan(plain, groups.chain("d8:d4:d1"), match).total()  # type: ignore[arg-type]
    ratio = total.params / total.plain_params if match == "params" else total.macs / total.plain_macs
    assert 0.9 < ratio < 1.1


def test_the_plan_is_what_is_built(network: nn.Module) -> None:
    made = plan(backbones.resnet_cifar(8, base_width=8), groups.chain("d8:d4:d1"))
    assert made.total().params == sum(parameter.numel() for parameter in network.parameters())


def test_timms_calls() -> None:
    model = timm.create_model("d8d4d1_resnet20", num_classes=7).eval()
    x = torch.randn(2, 3, 20, 20)
    assert model(x).shape == (2, 7)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    again = timm.create_model("d8d4d1_resnet20", num_classes=3).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    assert model.group_name == "d8:d4:d1"
    assert timm.create_model("d8d4d1_resnet20", num_classes=0).eval()(x).shape == (2, model.head_hidden_size)


def test_a_checkpoint_of_other_groups_is_refused() -> None:
    model, other = (convert(backbones.resnet_cifar(8, base_width=8), chain) for chain in ("d4:c4:c1", "d4:c4:c2"))
    with pytest.raises(
        ValueError, match="of a d4:c4:c1 network in the pixel basis, but the model is a d4:c4:c2 network"
    ):
        other.load_state_dict(model.state_dict())


def test_training_mode_statistics_are_shared_in_the_group_of_the_stage(network: nn.Module) -> None:
    orders = {norm.group_order for norm in network.modules() if isinstance(norm, FibreNorm)}
    assert orders == {16, 8, 2}


def test_bad_input() -> None:
    plain = backbones.resnet_cifar(8, base_width=8)
    with pytest.raises(ValueError, match="names 4 groups, but StagedCNN has 3 stages"):
        convert(plain, "d8:d4:d2:d1")
    stages = (nn.Sequential(nn.Conv2d(width, 8, 3), nn.ReLU()) for width in (3, 8))
    own = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"0 stages .*: model.feature_info = \[\{'module'"):
        convert(own, "d4:d1")
    own.feature_info = [{"module": f"{i}", "num_chs": 8, "reduction": 1} for i in range(2)]  # as the error says
    assert gzoo.check(convert(own, "d4:d1"), 9).worst < 1e-12
    with pytest.raises(ValueError, match="one group through all stages"):
        convert(plain, "p4m:p4", weights="project")
