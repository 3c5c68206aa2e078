"""The check is about zero for an equivariant network, large for a plain one, and names the place."""

import copy

import pytest
import timm
import torch
from torch import nn

import gzoo
from gzoo import backbones, groups
from gzoo.check import equivariance_error, first_broken_layer, relative_error
from gzoo.nn import FibreNorm, GroupConv2d, InvariantLinear, LiftingConv2d, QuotientConv2d, QuotientNorm
from tests.conftest import act, random_image, with_random_statistics, worst_error

P4, P4M = groups.get("p4"), groups.get("p4m")


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def network(group, broken=None):
    """Lifting, convolution, norm, convolution, classifier; ``broken`` takes the place of the second convolution."""
    G = groups.get(group)
    return with_random_statistics(
        nn.Sequential(
            LiftingConv2d(G, 1, 3, 3, padding=1),
            nn.ReLU(),
            broken or GroupConv2d(G, 3, 4, 3, stride=2, padding=1),
            FibreNorm(nn.BatchNorm2d(4), G.order),
            nn.ReLU(),
            Mean(),
            InvariantLinear(G, 4, 5),
        )
    ).eval()


@pytest.mark.parametrize("group", ["c1", "c2", "p4", "d1", "d2", "p4m"])
@pytest.mark.parametrize("size", [8, 9, (6, 11)])
def test_an_equivariant_network_has_no_error(group, size):
    assert gzoo.check(network(group), size).worst < 1e-12


@pytest.mark.parametrize("group", [P4, P4M])
@pytest.mark.parametrize("size", [28, (31, 28)])
def test_a_plain_network_has_a_large_error(group, size):
    report = gzoo.check(with_random_statistics(backbones.cnn7()), size, group=group)
    assert max(report.errors["logits"].values()) > 0.1
    assert max(report.errors["stage 0"].values()) > 0.1


def test_the_error_of_the_identity_is_zero():
    assert all(row[0] == 0 for row in gzoo.check(network("p4m"), 8).errors.values())


def test_an_equivariant_network_is_not_equivariant_under_a_larger_group():
    assert gzoo.check(network("p4"), 9, group=P4M).worst > 1e-3
    odd = gzoo.convert(nn.Sequential(nn.Conv2d(1, 3, 3, padding=1)), "p4", match="width", classifier="")
    assert gzoo.check(odd, 9, group=P4M).worst == float("inf")  # 12 channels are no fields of p4m


@pytest.mark.parametrize("out", [{"p4": 2}, {"c1": 2}, {"c2": 2}, {"c1": 1, "c2": 2}])
@pytest.mark.parametrize("norm", [False, True])
def test_maps_of_quotient_fields_move_by_their_own_type(out, norm):
    fields = {"c1": 2, "c2": 2}
    norms = [QuotientNorm(P4, fields), nn.ReLU()] if norm else [nn.ReLU()]
    layers = QuotientConv2d(P4, {"p4": 1}, fields, 3, padding=1), *norms, QuotientConv2d(P4, fields, out, 3, padding=1)
    assert gzoo.check(nn.Sequential(*layers), (8, 11), in_chans=1).worst < 1e-12
    broken = nn.Sequential(
        *layers, nn.ReLU(), nn.Conv2d(layers[-1].out_type.size, layers[-1].out_type.size, 3, padding=1)
    )
    assert gzoo.check(broken, (8, 11), in_chans=1).worst > 1e-3


def test_stages_are_measured_before_the_logits():
    model = gzoo.convert(backbones.resnet_cifar(8, base_width=4), "p4")
    assert list(gzoo.check(model, 16).errors) == ["stage 0", "stage 1", "stage 2", "logits"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # timm's, about the unused head
def test_a_features_only_model_is_measured_by_its_stages():
    import timm

    model = timm.create_model("p4m_cnn7", features_only=True)
    report = gzoo.check(model, (29, 28))
    assert list(report.errors) == ["stage 0", "stage 1"]
    assert report.worst < 1e-12


def test_a_network_that_gives_a_feature_map_is_held_to_be_regular_fields():
    assert gzoo.check(network("p4m")[:3], 9).worst < 1e-12


def test_the_table_has_a_row_an_output_and_a_column_an_element():
    report = gzoo.check(gzoo.convert(backbones.resnet_cifar(8, base_width=4), "p4m"), (9, 12))
    title, head, *rows, worst = str(report).splitlines()
    assert title == "equivariance error under p4m, 9x12 pixels, float64"
    assert " ".join(head.split()) == "output 0 90 180 270 flip flip 90 flip 180 flip 270"
    assert [row.split()[0] for row in rows] == ["stage", "stage", "stage", "logits"]
    assert all(len(row) == len(head) for row in rows)
    assert worst == f"worst: {report.worst:.1e}"


def test_the_check_leaves_weights_mode_and_dtype_alone():
    model = network("p4").float().train()
    before = copy.deepcopy(model.state_dict())
    gzoo.check(model, 8)
    assert all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert value.equal(before[name])


def test_the_same_seed_gives_the_same_report():
    model = network("p4")
    assert gzoo.check(model, 8, seed=3) == gzoo.check(model, 8, seed=3)


def test_float32_errors_are_rounding():
    assert 0 < gzoo.check(network("p4m"), 9, dtype=torch.float32).worst < 1e-5


def test_a_plain_network_without_a_group_is_refused():
    with pytest.raises(ValueError, match="CNN is a plain network, so say which group to check: group="):
        gzoo.check(backbones.cnn7())


def test_an_image_smaller_than_the_network_is_refused():
    with pytest.raises(ValueError, match=r"too small for a window of .* give the network a larger image"):
        gzoo.check(gzoo.convert(backbones.cnn7(), "p4"), 20)


@pytest.mark.parametrize(
    "broken",
    [
        nn.Conv2d(12, 16, 3, padding=1),  # filters that are not equivariant
        nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), GroupConv2d(P4, 3, 4, 2)),  # pads on one side only
        nn.Sequential(nn.MaxPool2d(2), GroupConv2d(P4, 3, 4, 1)),  # drops the last row of an odd map
    ],
)
def test_the_first_broken_layer_is_named(broken):
    model = network("p4", broken)
    expected = "2" if isinstance(broken, nn.Conv2d) else "2.0"
    assert first_broken_layer(model, random_image(1, (9, 9)), P4) == expected


def test_no_layer_of_an_equivariant_network_is_broken():
    assert first_broken_layer(network("p4m"), random_image(1, (8, 8)), P4M) is None


def test_the_equivariance_error_is_relative():
    x = random_image(1)
    act_in = act_out = lambda y: act(P4, "image", y, 1)
    assert equivariance_error(lambda y: 1e6 * y, x, act_in, act_out) == 0
    assert equivariance_error(lambda y: y.flip(3), x, act_in, act_out) > 0.1


def test_the_relative_error_of_other_shapes_or_of_no_number_is_infinite():
    assert relative_error(torch.ones(2), torch.ones(3)) == float("inf")
    assert relative_error(torch.full((2,), float("nan")), torch.ones(2)) == float("inf")
    assert relative_error(torch.ones(2), torch.zeros(2)) == float("inf")
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0


def test_a_check_of_finer_rotations_measures_the_grid_elements():
    G = groups.get("c8")
    model = nn.Sequential(LiftingConv2d(G, 1, 2, 1), Mean(), InvariantLinear(G, 2, 3))
    assert list(gzoo.check(model, 5).errors["logits"]) == [0, 2, 4, 6]


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = timm.create_model("p4_cnn7", num_classes=4)

    def forward(self, x):
        return {"logits": self.net(x), "maps": [self.net.forward_features(x), None]}


def test_tensors_in_a_dictionary_are_checked_as_those_in_a_list():
    report = gzoo.check(Several(), 28)
    assert len(report.errors) == 2
    assert report.worst < 1e-12


def test_each_of_several_outputs_is_judged_by_itself():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
            self.kind, self.box, self.centre = nn.Conv2d(16, 5, 1), nn.Conv2d(16, 4, 1), nn.Conv2d(16, 1, 1)

        def forward(self, x):
            y = self.body(x)
            return {"kind": self.kind(y), "box": self.box(y), "centre": self.centre(y)}

    report = gzoo.check(gzoo.convert(Detector(), "p4", classifier="kind"), 9)
    assert len(report.errors) == 3
    assert report.worst < 1e-12


class Styled(nn.Module):
    """A mask, and the style of the image: a vector of fields, as a Cellpose network gives it."""

    def __init__(self):
        super().__init__()
        self.body, self.mask, self.add = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 3, 1), nn.Linear(8, 8)

    def forward(self, x):
        features = self.body(x).relu()
        style = features.mean((2, 3))
        return self.mask(features + self.add(style)[..., None, None]), style / style.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("group", ["p4", "p4m"])
def test_a_vector_that_stays_fields_is_held_to_turn_its_fibres(group):
    model = gzoo.convert(Styled(), group, classifier="mask")
    assert gzoo.check(model, (9, 12)).worst < 1e-12
    broken = copy.deepcopy(model)
    broken.field_outputs = {2: [False, False]}  # were it invariant
    assert gzoo.check(broken, (9, 12)).worst > 1e-3
    features = gzoo.convert(nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), Mean(), nn.Linear(8, 6)), group, classifier="")
    assert gzoo.check(features, (9, 12)).worst < 1e-12


def test_a_network_of_one_size_is_checked_at_that():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    report = gzoo.check(gzoo.equivarify(vit, "p4"))
    assert report.size == (32, 32)
    assert report.worst < 1e-12
    plain = nn.Sequential(nn.Conv2d(3, 2, 90), nn.Flatten(), nn.Linear(2 * 2 * 2, 2))
    with pytest.raises(ValueError, match=r"Sequential does not run \(.*\); say the size of its images, as in size=224"):
        gzoo.check(plain, group="p4")
    assert gzoo.check(plain, 91, "p4").worst > 0.01


class Sized(nn.Conv2d):
    def __init__(self, size):
        super().__init__(3, 1, 3)
        self.pretrained_cfg = {"input_size": size}


class Nothing(nn.Module):
    def forward(self, x):
        return {"boxes": None}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gzoo.check("p4_cnn7"), "model is 'p4_cnn7'; it takes a network, an nn.Module"),
        (
            lambda: gzoo.check(nn.Conv2d(1, 1, 3), size=32.0, group="p4"),
            "size is 32.0; it takes a number of pixels, or two",
        ),
        (lambda: gzoo.check(nn.Conv2d(1, 1, 3), size=(1, 2, 3), group="p4"), r"size is \(1, 2, 3\); it takes a number"),
        (lambda: gzoo.check(nn.Conv2d(1, 1, 3), group="p5"), "unknown group 'p5'"),
        (lambda: gzoo.check(nn.Conv2d(1, 1, 3), group=4), "group is 4; accepted are names such as 'p4m'"),
        (lambda: gzoo.check(nn.Conv2d(1, 1, 3), group="p4", dtype="float32"), "dtype is 'float32'; accepted are torch"),
        (
            lambda: gzoo.check(Sized((96, 96)), group="p4"),
            r"input_size'\] is \(96, 96\); it takes channels",
        ),
        (lambda: gzoo.check(Sized(96), group="p4"), r"pretrained_cfg\['input_size'\] is 96; it takes"),
        (lambda: gzoo.check(Nothing(), group="p4", in_chans=1), "Nothing gives a dict without a tensor in it to check"),
    ],
)
def test_what_cannot_be_checked_is_an_error_in_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_group_is_taken_by_its_name():
    symmetric = nn.Conv2d(1, 1, 1)
    assert gzoo.check(symmetric, group="p4m").group.name == "p4m"


def test_what_is_no_number_is_no_small_error():
    class Broken(nn.Module):
        def forward(self, x):
            return x * torch.nan

    assert worst_error(Broken(), "p4", random_image(4), "image", "image") == float("inf")
