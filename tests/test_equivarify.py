"""Equivarified and canonicalized networks follow the group, whatever the network."""

import copy
import runpy
from pathlib import Path

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

import gzoo
from gzoo import groups
from gzoo.check import in_channels, relative_error
from tests.conftest import GRID_GROUPS, elements, random_image, with_random_statistics


def vector_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    ).double()


def map_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, stride=2)).double()


def expected(group: groups.Group, y: torch.Tensor, g: int) -> torch.Tensor:
    """g.y for what an equivarified network gives: vectors or maps, pooled or not."""
    if y.ndim in (3, 5):
        return group.transform_features(y.flatten(1, 2), g).unflatten(1, y.shape[1:3])
    return group.transform_image(y, g) if y.ndim == 4 else y


def sizes(group: str) -> list[tuple[int, int]]:
    return [(8, 8), (9, 9)] if groups.get(group).rotations == 4 else [(8, 8), (9, 9), (8, 11)]


def assert_follows(model: nn.Module, group: str, law=expected) -> None:
    """The model follows every element of the group by a law of its output, in value and gradient."""
    G = groups.get(group)
    for size in sizes(group):
        x = random_image(2, size).requires_grad_()
        y = model(x)
        weight = torch.randn_like(y)
        (gradient,) = torch.autograd.grad((y * weight).sum(), x)
        for g in elements(group):
            moved = G.transform_image(x, g).detach().requires_grad_()
            z = model(moved)
            (moved_gradient,) = torch.autograd.grad((z * law(G, weight, g)).sum(), moved)
            assert relative_error(z, law(G, y, g)) < 1e-12
            assert relative_error(moved_gradient, G.transform_image(gradient, g)) < 1e-12


@pytest.mark.parametrize("head", ["invariant", "pose"])
@pytest.mark.parametrize("make", [vector_net, map_net])
@pytest.mark.parametrize("group", GRID_GROUPS)
def test_equivarified_networks_follow_the_group_in_value_and_gradient(group, make, head):
    assert_follows(gzoo.equivarify(make(), group, head), group)


@pytest.mark.parametrize("make", [vector_net, map_net])
@pytest.mark.parametrize("group", GRID_GROUPS)
def test_vectors_are_turned_back_in_value_and_gradient(group, make):
    pairs = [(2, 0)]
    chooser = canonizer(group)

    def turned(G: groups.Group, y: torch.Tensor, g: int) -> torch.Tensor:
        return G.transform_vectors(y, g, pairs)

    for model in (
        gzoo.equivarify(make(), group, vectors=pairs),
        gzoo.equivarify(make(), group, pool=chooser.net, vectors=pairs),
        gzoo.canonicalize(make(), group, chooser, pairs).eval(),
        gzoo.canonicalize(make(), group, chooser, pairs).train(),
    ):
        assert_follows(model, group, turned)
        assert gzoo.check(model, 9).worst < 1e-12


def test_vectors_that_are_no_channels_or_are_not_averaged_are_refused():
    with pytest.raises(ValueError, match="of two of the 3 channels"):
        gzoo.equivarify(map_net(), "p4", vectors=[(0, 3)])(random_image(2, (8, 8)))
    for options in ({"head": "pose"}, {"pool": "max"}):
        with pytest.raises(ValueError, match="turned back and averaged; leave head='pose' and pool='max' out"):
            gzoo.equivarify(map_net(), "p4", vectors=[(0, 1)], **options)


def test_a_plain_network_does_not_follow_the_group():
    net, G, x = vector_net(), groups.get("p4"), random_image(2, (8, 8))
    assert relative_error(net(G.transform_image(x, 1)), net(x)) > 1e-3


@pytest.mark.parametrize("group", ["p4", "p4m"])
def test_the_value_at_g_is_the_network_on_the_image_turned_back(group):
    net, G, x = vector_net(), groups.get(group), random_image(2, (9, 9))
    y = gzoo.equivarify(net, group, "pose")(x)
    for g in elements(group):
        assert relative_error(y[..., g], net(G.transform_image(x, G.inverse(g)))) < 1e-12


@pytest.mark.parametrize("make", [vector_net, map_net])
def test_layerwise_and_looped_equal_the_whole(make):
    net, x = make(), random_image(2, (9, 9))
    for head in ("invariant", "pose"):
        whole = gzoo.equivarify(net, "p4m", head)(x)
        for options in ({"mode": "layerwise"}, {"batched": False}, {"mode": "layerwise", "batched": False}):
            assert relative_error(gzoo.equivarify(net, "p4m", head, **options)(x), whole) < 1e-12


def test_equivarified_networks_have_the_parameters_of_the_original():
    net = vector_net()
    parameters = {id(p) for p in net.parameters()}
    assert {id(p) for p in gzoo.equivarify(net, "p4m").parameters()} == parameters


class Score(nn.Module):
    """(B, C, H, W) to one number an image that depends on its pose."""

    def __init__(self):
        super().__init__()
        self.net = vector_net()

    def forward(self, x):
        return self.net(x)[:, :1]


@pytest.mark.parametrize("make", [vector_net, map_net])
def test_max_and_learned_weights_pool_to_an_invariant(make):
    G, x = groups.get("p4m"), random_image(2, (8, 8))
    for pool in ("max", Score()):
        model = gzoo.equivarify(make(), "p4m", pool=pool)
        y = model(x)
        assert all(relative_error(model(G.transform_image(x, g)), expected(G, y, g)) < 1e-12 for g in elements("p4m"))


def test_learned_weights_that_are_equal_give_the_mean_and_get_gradients():
    net, score, x = vector_net(), Score(), random_image(2, (8, 8))
    gzoo.equivarify(net, "p4", pool=score)(x).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in score.net[0].parameters())
    nn.init.zeros_(score.net[-1].weight)
    mean = gzoo.equivarify(net, "p4")(x)
    assert relative_error(gzoo.equivarify(net, "p4", pool=score)(x), mean) < 1e-12


def test_a_vision_transformer_becomes_invariant():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    report = gzoo.check(gzoo.equivarify(vit, "p4m"), 32)
    assert report.worst < 1e-12
    assert gzoo.check(gzoo.equivarify(vit, "p4m", "pose"), 32).worst < 1e-12
    assert gzoo.check(vit.eval(), 32, groups.get("p4m")).worst > 1e-3


def test_an_equivarified_network_without_convolutions_is_checked_on_images_of_the_channels_given():
    model = gzoo.equivarify(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)), "p4")
    assert gzoo.check(model, 8, in_chans=3).worst < 1e-12
    assert gzoo.check(model.net, 8, groups.get("p4"), in_chans=3).worst > 1e-3
    with pytest.raises(ValueError, match=r"Equivarified has no convolution.*say it to gzoo\.check"):
        gzoo.check(model, 8)


@pytest.mark.parametrize("make", [vector_net, map_net])
@pytest.mark.parametrize("head", ["invariant", "pose"])
def test_equivarified_networks_follow_the_group_under_autocast(make, head):
    G, net, x = groups.get("p4m"), make().float(), random_image(2, (9, 9)).float()
    model = gzoo.equivarify(net, "p4m", head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        assert y.dtype == torch.bfloat16
        for g in elements("p4m"):
            moved = G.transform_image(x, g)
            assert relative_error(model(moved).float(), expected(G, y, g).float()) < 2**-7  # bfloat16 has 8 bits
        assert relative_error(net(moved).float(), expected(G, net(x), g).float()) > 2**-4


@pytest.mark.parametrize(("make", "pool"), [(vector_net, True), (map_net, False)])
def test_a_compiled_equivarified_network_trains_like_the_other(make, pool):
    torch._dynamo.reset()
    model = gzoo.equivarify(make(), "p4", pool=Score() if pool else "mean").train()
    reference, x = copy.deepcopy(model), random_image(2, (8, 8))
    y, z = torch.compile(model, fullgraph=True, backend="aot_eager")(x), reference(x)
    assert relative_error(y, z) < 1e-12
    y.square().sum().backward()
    z.square().sum().backward()
    for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert relative_error(parameter.grad, other.grad) < 1e-10


def test_a_loop_over_the_poses_keeps_all_activations_for_the_gradient_unless_the_network_checkpoints():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, in_chans=2, depth=3, num_classes=3).double()
    x, weights = random_image(2, (32, 32)), {parameter.data_ptr() for parameter in vit.parameters()}

    def trained(batched: bool, checkpoints: bool) -> tuple[int, torch.Tensor]:
        """The bytes of activations that autograd keeps, and a gradient."""
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        vit.set_grad_checkpointing(checkpoints)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = gzoo.equivarify(vit, "p4", batched=batched)(x).square().sum()
        return sum(kept.values()), torch.autograd.grad(loss, vit.patch_embed.proj.weight)[0]

    whole, gradient = trained(batched=True, checkpoints=False)
    looped, looped_gradient = trained(batched=False, checkpoints=False)
    saved, saved_gradient = trained(batched=False, checkpoints=True)
    assert looped > 0.9 * whole
    assert saved < 0.25 * whole
    assert relative_error(looped_gradient, gradient) < 1e-10
    assert relative_error(saved_gradient, gradient) < 1e-10


def test_timm_finds_the_preprocessing_and_the_classes_of_the_network_inside():
    net = timm.create_model("p4_cnn7", num_classes=4)
    inside = resolve_model_data_config(net)
    models = (
        gzoo.equivarify(net, "p4"),
        gzoo.equivarify(net, "p4", "pose"),
        gzoo.canonicalize(net, "p4", timm.create_model("p4_cnn7", num_classes=1, head="pose")),
    )
    for model in models:
        assert resolve_model_data_config(model) == inside != resolve_model_data_config(nn.Identity())
        assert (model.num_classes, model.in_chans) == (4, 1)
    net.reset_classifier(6)
    assert models[0].num_classes == 6
    plain = gzoo.equivarify(vector_net(), "p4")
    assert not any(hasattr(plain, name) for name in ("pretrained_cfg", "num_classes", "in_chans"))


def canonizer(group: str) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 1))
    return gzoo.equivarify(net.double(), group, "pose")


@pytest.mark.parametrize("make", [vector_net, map_net])
@pytest.mark.parametrize("group", GRID_GROUPS)
def test_canonicalized_networks_follow_the_group_in_value_and_gradient(group, make):
    assert_follows(gzoo.canonicalize(make(), group, canonizer(group)), group)


def test_the_choice_of_the_pose_gets_gradients_in_training_only_and_is_the_same():
    model, x = gzoo.canonicalize(vector_net(), "p4", canonizer("p4")), random_image(2, (8, 8))
    first = model.canonizer.net[0].weight
    trained = model.train()(x)
    trained.pow(2).sum().backward()
    assert first.grad is not None
    assert first.grad.abs().max() > 0
    y = model.eval()(x)
    assert relative_error(trained, y) < 1e-12
    assert torch.autograd.grad(y.sum(), first, allow_unused=True)[0] is None


@pytest.mark.parametrize("make", [vector_net, map_net])
@pytest.mark.parametrize("group", ["p4", "p4m", "d2"])
def test_where_scores_tie_the_result_is_the_mean_over_those_poses(group, make):
    """As for an object with a symmetry of its own beside the middle: the image has none."""

    class Mass(nn.Module):
        def forward(self, x):
            return x.mean((1, 2, 3))[:, None]

    G, net, x = groups.get(group), make(), random_image(2, (8, 8), batch=3)
    model = gzoo.canonicalize(net, group, gzoo.equivarify(Mass(), group, "pose")).eval()  # ties everywhere
    assert_follows(model, group)
    torch.testing.assert_close(model(x), gzoo.equivarify(net, group)(x), rtol=1e-12, atol=1e-12)
    square, chooser = torch.zeros(2, 2, 8, 8, dtype=torch.float64), canonizer(group)
    square[:, :, 1:3, 1:3] = 1
    square[1] = x[0]  # beside an image whose scores do not tie
    model = gzoo.canonicalize(net, group, chooser).eval()
    expected = model(square)
    for g in range(1, G.order):
        moved = G.transform_image(expected, g) if expected.ndim == 4 else expected
        assert relative_error(model(G.transform_image(square, g)), moved) < 1e-12
    torch.testing.assert_close(expected[1:], model(square[1:]))


def test_an_object_with_a_symmetry_of_its_own_beside_the_middle_is_no_exception():
    image = torch.zeros(1, 1, 33, 33, dtype=torch.float64)
    image[..., 10:15, 8:13] = 1
    chooser = with_random_statistics(timm.create_model("p4_resnet20", in_chans=1, num_classes=1, head="pose")).eval()
    net = nn.Sequential(nn.Flatten(), nn.Linear(33 * 33, 3)).double()
    model = gzoo.canonicalize(net, "p4", chooser).eval()
    for turns in range(1, 4):
        assert relative_error(model(image.rot90(turns, (2, 3))), model(image)) < 1e-12


def test_what_is_around_a_network_is_checked_for_its_own_group():
    inner = with_random_statistics(timm.create_model("p4_cnn7", num_classes=4)).eval()
    report = gzoo.check(gzoo.equivarify(inner, "p4m"), size=28)
    assert report.group.name == "p4m"
    assert report.worst < 1e-12
    broken = gzoo.canonicalize(inner, "p4m", nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.Unflatten(1, (1, 8))))
    assert gzoo.check(broken, size=28).worst > 1e-3
    soft = timm.create_model("p4_cnn7", num_classes=5, soft=True).double()
    for residual in gzoo.soft.residuals(soft):
        residual.data.normal_(std=0.1)
    report = gzoo.check(gzoo.equivarify(soft, "p4"), size=28)
    assert report.worst < 1e-12
    assert not report.given_up


def test_a_pool_scores_the_image_as_it_was():
    net = nn.Sequential(nn.ReLU(), *vector_net())
    in_place = nn.Sequential(nn.ReLU(inplace=True), *net[1:])
    x, pool = random_image(2, (8, 8)), canonizer("c1").net
    expected = gzoo.equivarify(net, "p4", pool=pool)(x)
    for batched in (True, False):
        made = gzoo.equivarify(in_place, "p4", pool=pool, batched=batched)(x.clone())
        torch.testing.assert_close(made, expected)


def test_labels_of_bytes_do_not_wrap_around():
    logits = torch.randn(1, 200, 4)
    label = torch.tensor([100])
    assert gzoo.pose_loss(logits, label.byte()) == gzoo.pose_loss(logits, label)


def test_the_prior_loss_teaches_a_canonizer_to_leave_images_as_they_are():
    model, x = canonizer("p4"), random_image(2, (8, 8), batch=4)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(100):
        optimizer.zero_grad()
        gzoo.pose_loss(model(x), torch.zeros(4, dtype=torch.long)).backward()
        optimizer.step()
    assert model(x)[:, 0].argmax(1).eq(0).all()
    turned = groups.get("p4").transform_image(x, 1)
    assert model(turned)[:, 0].argmax(1).eq(1).all()


def test_the_pose_loss_has_its_target_at_the_class_and_the_identity():
    logits = torch.zeros(1, 3, 4)
    logits[0, 2, 0] = 100
    assert gzoo.pose_loss(logits, torch.tensor([2])) < 1e-6
    assert gzoo.pose_loss(logits, torch.tensor([1])) > 50
    assert gzoo.pose_loss(logits.repeat(2, 1, 1), torch.tensor([2, -100])) < 1e-6  # torch leaves that label out


class Rotations(nn.Module):
    """Of scores over p4m, those over p4."""

    group = groups.get("p4")

    def __init__(self):
        super().__init__()
        self.net = canonizer("p4m")

    def forward(self, x):
        return self.net(x)[..., :4]


@pytest.mark.parametrize("make", [vector_net, map_net])
def test_where_the_canonizer_gives_no_numbers_the_network_gives_none(make):
    model, x = gzoo.canonicalize(make(), "p4", canonizer("p4")).eval(), random_image(2, (8, 8), batch=3)
    expected = model(x)
    x[1, 0, 2, 3] = torch.nan
    y = model(x)
    assert y[1].isnan().all()
    torch.testing.assert_close(y[::2], expected[::2], rtol=0, atol=1e-12)


def test_a_canonizer_can_say_that_it_is_over_another_group_than_its_layers():
    assert_follows(gzoo.canonicalize(vector_net(), "p4", Rotations()), "p4")


class Tokens(nn.Module):
    def forward(self, x):
        return x.flatten(2)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Nested(nn.Module):
    """A map and vectors in a dictionary, as torchvision's networks for segmentation give them."""

    def __init__(self):
        super().__init__()
        self.map, self.vector = map_net(), vector_net()

    def forward(self, x):
        return {"out": self.map(x), "aux": (self.vector(x), [self.map(x).tanh(), None])}


class OwnForward(nn.Sequential):
    def forward(self, x):
        return x


class Total(nn.Module):
    def forward(self, x):
        return x.sum()


def one_row() -> nn.Sequential:
    """A network that takes the images of a batch for one."""
    return nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (1, -1)))


def wide_maps() -> nn.Module:
    return nn.Conv2d(2, 3, (2, 3)).double()


def scores(number: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(50, number)).double()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gzoo.equivarify(vector_net(), "c8"), "c8 turns pixels between pixels"),
        (lambda: gzoo.canonicalize(vector_net(), "c8", canonizer("p4")), "c8 turns pixels between pixels"),
        (lambda: gzoo.equivarify("resnet18", "p4"), "net is 'resnet18'; it takes a network, an nn.Module"),
        (lambda: gzoo.canonicalize(vector_net(), "p4", None), "canonizer is None; it takes a network, an nn.Module"),
        (
            lambda: gzoo.equivarify(OwnForward(), "p4", mode="layerwise"),
            "not a OwnForward, and no forward of its own",
        ),
        (lambda: gzoo.equivarify(vector_net(), 4), "group is 4; accepted are names such as 'p4'"),
        (lambda: gzoo.equivarify(vector_net(), "p4", "dense"), "head is 'dense'"),
        (lambda: gzoo.equivarify(vector_net(), "p4", pool="sum"), "pool is 'sum'"),
        (lambda: gzoo.equivarify(vector_net(), "p4", "pose", pool="max"), "pools nothing"),
        (lambda: gzoo.equivarify(vector_net(), "p4", mode="lazy"), "mode is 'lazy'"),
        (lambda: gzoo.equivarify(Tokens(), "p4", mode="layerwise"), "needs an nn.Sequential, not a Tokens"),
        (lambda: gzoo.equivarify(Tokens(), "p4")(random_image(2)), "output is .*accepted are vectors"),
        (
            lambda: gzoo.equivarify(nn.Sequential(Pair(), nn.ReLU()), "p4", mode="layerwise")(random_image(2)),
            "ReLU is given a tuple; take mode='whole'",
        ),
        (
            lambda: gzoo.equivarify(Pair(), "p4", vectors=[(0, 1)])(random_image(2)),
            "channels of one output, and the ne",
        ),
        (
            lambda: gzoo.canonicalize(Pair(), "p4", canonizer("p4"), [(0, 1)])(random_image(2, (8, 8))),
            "channels of one output, and the network gives a tuple",
        ),
        (lambda: gzoo.equivarify(vector_net(), "p4", pool=Pair())(random_image(2)), "the pool gives a tuple for 2 im"),
        (lambda: gzoo.equivarify(Total(), "p4")(random_image(2)), r"Total gives \(\) for a batch of 8; accepted are"),
        (lambda: gzoo.equivarify(one_row(), "p4")(random_image(2)), r"gives \(1, 400\) for a batch of 8"),
        (
            lambda: gzoo.equivarify(one_row(), "p4", batched=False)(random_image(2)),
            r"gives \(1, 100\) for a batch of 2",
        ),
        (lambda: gzoo.canonicalize(one_row(), "p4", canonizer("p4"))(random_image(2, (8, 8))), r"gives \(1, 256\)"),
        (lambda: gzoo.equivarify(wide_maps(), "p4")(random_image(2)), "network's maps are 4x3 pixels .* or take c2"),
        (
            lambda: gzoo.canonicalize(wide_maps(), "p4m", canonizer("p4m"))(random_image(2, (8, 8))),
            "network's maps are 7x6 pixels and p4m turns by 90 degrees",
        ),
        (
            lambda: gzoo.equivarify(vector_net(), "p4", pool=scores(2))(random_image(2)),
            r"pool gives \(2, 2\) for 2 images; accepted is one score an image, \(2, 1\); give it a last layer",
        ),
        (
            lambda: gzoo.equivarify(vector_net(), "p4", pool=scores(2))(random_image(2, batch=1)),
            r"gives \(1, 2\) for 1",
        ),
        (
            lambda: gzoo.canonicalize(vector_net(), "p4", nn.Sequential(canonizer("d2"))),
            "canonizer is over d2, not p4; make it over p4",
        ),
        (lambda: gzoo.canonicalize(vector_net(), "p4", Pair())(random_image(2)), "canonizer gives a tuple"),
        (lambda: gzoo.equivarify(vector_net(), "p4")(random_image(2, (8, 9))), "8x9 pixels .* pad or crop"),
        (lambda: gzoo.equivarify(vector_net(), "p4")(random_image(2)[0]), "batch of images"),
        (lambda: gzoo.canonicalize(vector_net(), "p4", vector_net())(random_image(2)), "canonizer gives"),
        (lambda: gzoo.pose_loss(torch.zeros(2, 3), torch.zeros(2).long()), r"logits are \(2, 3\); accepted are those"),
        (
            lambda: gzoo.pose_loss(torch.zeros(2, 3, 4), torch.eye(3)[:2]),
            r"labels are \(2, 3\) of torch.float32; accep",
        ),
        (lambda: gzoo.pose_loss(torch.zeros(2, 3, 4), torch.ones(2)), r"labels are \(2,\) of torch.float32; accepted"),
        (lambda: gzoo.pose_loss(torch.zeros(2, 3, 4), [0, 1]), "labels are a list; accepted are class indices"),
        (
            lambda: gzoo.pose_loss(torch.zeros(2, 3, 4), torch.tensor([0, 3])),
            r"labels are \[0, 3\]; accepted are classes, 0 to 2, and -100",
        ),
        (lambda: gzoo.equivarify(vector_net(), "p4")([random_image(2)]), "x is a list; accepted is a batch of images"),
        (lambda: gzoo.equivarify(vector_net(), "p4", vectors=(0, 1)), r"vectors are \(0, 1\); accepted are pairs"),
        (lambda: gzoo.canonicalize(vector_net(), "p4", canonizer("p4"), [(0, 0)]), r"\[\(0, 0\)\]; accepted are pairs"),
    ],
)
def test_what_cannot_be_done_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_pool_that_works_in_place_leaves_the_image_alone():
    x = random_image(2, (8, 8))
    for inplace in (False, True):
        pool = nn.Sequential(nn.ReLU(inplace=inplace), nn.Flatten(), nn.Linear(128, 1)).double()
        torch.nn.init.constant_(pool[2].weight, 0.01)
        net = nn.Sequential(nn.Flatten(), nn.Linear(128, 3)).double()
        torch.nn.init.constant_(net[1].weight, 0.1)
        torch.nn.init.zeros_(net[1].bias)
        y = gzoo.equivarify(net, "p4", pool=pool)(x)
        assert y.allclose(net(x))


def test_layers_that_work_in_place_may_run_one_pose_after_the_other():
    net, x = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Flatten()).double(), random_image(2, (8, 8))
    gradients = []
    for options in ({"batched": False, "mode": "layerwise"}, {}):
        net.zero_grad()
        gzoo.equivarify(net, "p4", **options)(x).square().sum().backward()
        gradients.append(net[0].weight.grad.clone())
    assert relative_error(*gradients) < 1e-12


def test_autocast_leaves_the_choice_of_a_pose_alone():
    net, chooser = vector_net().float(), canonizer("p4").float()
    given = []
    chooser.register_forward_hook(lambda module, inputs, y: given.append(y))
    x = random_image(2, (8, 8)).float()
    model = gzoo.canonicalize(net, "p4", chooser).eval()
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert given[0].equal(given[1])
    assert y.dtype == torch.bfloat16
    assert relative_error(y.float(), expected) < 2**-6


def test_a_canonicalized_network_is_exported_for_any_batch():
    model = gzoo.canonicalize(map_net(), "p4", canonizer("p4")).eval()
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    exported = torch.export.export(model, (random_image(2, (9, 9), 4),), dynamic_shapes=shapes).module()
    x = random_image(2, (9, 9), 6)
    assert relative_error(exported(x), model(x)) < 1e-12


@pytest.mark.parametrize("options", [{}, {"pool": "max"}, {"head": "pose"}, {"batched": False}])
def test_several_outputs_are_each_what_they_are_alone(options):
    net, x = Nested(), random_image(2, (8, 8))
    y = gzoo.equivarify(net, "p4", **options)(x)
    assert y["out"].equal(gzoo.equivarify(net.map, "p4", **options)(x))
    assert y["aux"][0].equal(gzoo.equivarify(net.vector, "p4", **options)(x))
    model = gzoo.equivarify(net, "p4m", **options)
    assert gzoo.check(model, 9).worst < 1e-12


@pytest.mark.parametrize("training", [False, True])
def test_several_outputs_are_each_canonicalized(training):
    net, chooser, x = Nested(), canonizer("p4"), random_image(2, (8, 8))
    y = gzoo.canonicalize(net, "p4", chooser).train(training)(x)
    assert y["out"].equal(gzoo.canonicalize(net.map, "p4", chooser).train(training)(x))
    assert y["aux"][0].equal(gzoo.canonicalize(net.vector, "p4", chooser).train(training)(x))
    assert gzoo.check(gzoo.canonicalize(net, "p4", chooser), 8).worst < 1e-12


def test_equivarified_networks_can_be_copied_and_their_state_reloaded():
    model, x = gzoo.equivarify(vector_net(), "p4m"), random_image(2, (8, 8))
    other = gzoo.equivarify(vector_net(), "p4m")
    other.load_state_dict(copy.deepcopy(model).state_dict())
    assert relative_error(other(x), model(x)) == 0


@pytest.mark.parametrize("name", ["p4_cnn7", "p4m_cnn7", "c8_cnn7"])
def test_the_pose_head_of_a_zoo_model_follows_the_group(name):
    model = timm.create_model(name, num_classes=3, head="pose").double().eval()
    for size in (32, 33):
        x = random_image(in_channels(model), (size, size))
        y = model(x)
        assert y.shape == (2, 3, model.group.order)
        for g in model.group.grid_elements:
            assert relative_error(model(model.group.transform_image(x, g)), expected(model.group, y, g)) < 1e-12
        assert relative_error(model(model.group.transform_image(x, model.group.grid_elements[1])), y) > 1e-3


def test_the_pose_head_survives_save_load_and_reset_classifier():
    model, other = (timm.create_model("p4_cnn7", num_classes=3, head="pose").eval() for _ in range(2))
    x = torch.randn(2, 1, 28, 28)
    other.load_state_dict(model.state_dict())
    assert relative_error(other(x), model(x)) == 0
    assert relative_error(copy.deepcopy(model)(x), model(x)) == 0
    model.reset_classifier(5)
    assert model(x).shape == (2, 5, 4)
    assert gzoo.check(model, 28).worst < 1e-12
    with pytest.raises(ValueError, match="is a plain network"):
        timm.create_model("cnn7", head="pose")


@pytest.mark.parametrize("group", ["p4", "p4m", "c8"])
def test_a_classifier_that_is_a_convolution_says_the_pose_of_the_image_or_of_each_pixel(group):
    plain = timm.create_model("resnetv2_18", num_classes=3, channels=(8, 8, 16, 16), stem_chs=8, layers=(1, 1, 1, 1))
    model = gzoo.convert(plain, group, head="pose").double().eval()
    law, x = model.group, random_image(3, (33, 48))
    for width in (3, 5):
        y = model(x)
        assert y.shape == (2, width, law.order)
        for g in law.grid_elements:
            assert relative_error(model(law.transform_image(x, g)), expected(law, y, g)) < 1e-12
        assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, model.head_hidden_size)
        model.reset_classifier(0)
        assert model(x).shape == (2, model.head_hidden_size)
        model.reset_classifier(5)
    model.reset_classifier(2, global_pool="")
    y = model(x)
    assert y.shape == (2, 2, law.order, 2, 2)
    assert gzoo.check(model, (33, 48)).worst < 1e-12


def test_a_converted_network_with_a_pose_head_checks_itself():
    plain = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    model = gzoo.convert(plain, "p4m", head="pose")
    assert model(torch.randn(2, 1, 9, 9)).shape == (2, 2, 8)
    with pytest.raises(ValueError, match="head is 'pose' with weights='transfer'"):
        gzoo.convert(plain, "p4", head="pose", weights="transfer")


def test_a_zoo_model_with_a_pose_head_is_a_canonizer():
    chooser = timm.create_model("p4_cnn7", num_classes=1, head="pose")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, in_chans=1, depth=1, num_classes=5)
    dense = nn.Conv2d(1, 2, 3)
    assert gzoo.check(gzoo.canonicalize(dense, "p4", chooser), 32).worst < 1e-12
    assert gzoo.check(gzoo.equivarify(dense, "p4", "pose"), 32).worst < 1e-12
    assert gzoo.check(gzoo.canonicalize(vit, "p4", chooser), 32).worst < 1e-12


def test_the_pose_experiment_runs_and_its_figures_follow_the_group():
    path = Path(__file__).parent.parent / "benchmarks" / "pose_mnist.py"
    script = runpy.run_path(str(path))
    data = torch.rand(200, 1, 28, 28), torch.arange(200) % 10
    figures = script["experiment"](data, data, epochs=1, seed=0)
    poses, classes = (torch.tensor(figures["figure4"][key]) for key in ("probabilities", "angle_dropped"))
    assert all(torch.allclose(poses[g], poses[0].roll(g, 1), atol=1e-4) for g in range(4))
    assert torch.allclose(classes, classes[:1].expand(4, 10), atol=1e-4)
    assert torch.allclose(classes.sum(1), torch.ones(4))
    assert figures["angle_dropped"]["upright"] == figures["angle_dropped"]["rotated"]


def test_of_the_four_ways_the_exact_ones_do_not_notice_a_turn_and_the_others_say_how_much(monkeypatch):
    folder = Path(__file__).parent.parent / "benchmarks"
    monkeypatch.syspath_prepend(folder)  # it imports the script beside it
    script = runpy.run_path(str(folder / "four_ways.py"))
    data = torch.rand(200, 1, 28, 28), torch.arange(200) % 10
    models = script["ways"](data, 10, 1)
    del models["partial"]  # two steps are too few to drop an element
    exact = {name for name in models if name.startswith(("equivarify", "canonicalize", "G-CNN"))}
    rows = script["measured"](models, data, 0)
    assert {name for name, row in rows.items() if row["error"] < 1e-12} == exact
    assert all(rows[name]["upright"] == rows[name]["rotated"] for name in exact)
    assert rows["soft, penalty 10"]["error"] < rows["soft, penalty 0.1"]["error"]


def test_of_the_canonicalized_networks_only_the_plain_one_notices_a_quarter_turn(monkeypatch):
    folder = Path(__file__).parent.parent / "benchmarks"
    monkeypatch.syspath_prepend(folder)  # it imports the scripts beside it
    script = runpy.run_path(str(folder / "canonicalize_rotmnist.py"))
    data = torch.rand(200, 1, 28, 28), torch.arange(200) % 10
    found = script["experiment"](data, data, epochs=1, seed=0)["networks"]
    assert {name for name, row in found.items() if row["error"] == row["error_turned"]} == set(found) - {"CNN"}


def test_masked_logits_stay_masked_when_a_map_is_turned_back():
    class Masked(nn.Module):
        def forward(self, x):
            return x.masked_fill(x > 0, float("-inf"))

    y = gzoo.canonicalize(Masked(), "p4", canonizer("p4")).eval()(random_image(2, (8, 8)))
    assert y.isneginf().any()
    assert not y.isnan().any()
