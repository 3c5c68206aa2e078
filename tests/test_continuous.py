"""Networks over SE(2) and E(2): exact for the turns that fit the grid, and learning which rotations they keep."""

import copy
import math
from unittest.mock import patch

import pytest
import timm
import torch
from timm.models._manipulate import checkpoint_seq, group_parameters
from torch import nn

import gzoo
from gzoo import groups
from gzoo.bases import circular_harmonics
from gzoo.check import relative_error
from gzoo.convert import calibrate
from gzoo.mnist6 import CONTINUOUS_TASKS, _build
from gzoo.nn.continuous import Arc, ContinuousConv2d, ContinuousLiftingConv2d, Elements, Features, pool_all
from gzoo.partial import subsets, symmetry
from tests.conftest import random_image, with_random_statistics


def network(group="se2", elements=4, partial=False, backbone="resnet", **options):
    """Small, float64, in eval mode, with random statistics, which keeps everything."""
    small = {"resnet": {"width": 3, "kernel_size": 5}, "cnn13": {"width": 2, "in_chans": 1}}[backbone]
    options = small | {"num_classes": 4} | options
    model = timm.create_model(f"{group}_{backbone}", elements=elements, partial=partial, **options)
    model = with_random_statistics(model).eval()
    for arc in model.modules():
        if isinstance(arc, Arc):
            nn.init.constant_(arc.reach, float(group != "t2"))
    return model


@pytest.mark.parametrize("size", [12, 15, (11, 16)])
@pytest.mark.parametrize(("group", "elements"), [("se2", 4), ("se2", 8), ("e2", 8)])
@pytest.mark.parametrize("backbone", ["resnet", "cnn13"])
def test_a_network_that_drops_nothing_is_exact_for_all_that_fits_the_grid(backbone, group, elements, size):
    model = network(group, elements, partial=True, backbone=backbone)
    shape = (size, size) if isinstance(size, int) else size
    calibrate(model, random_image(1, shape, batch=4))  # else the image fades away in the depth
    one, other = model(random_image(1, shape))
    assert relative_error(one, other) > 1e-3
    report = gzoo.check(model, size)
    assert len(report.errors["logits"]) == (8 if group == "e2" else 4)
    assert report.worst < 1e-12
    assert not report.given_up


@pytest.mark.parametrize("backbone", ["resnet", "cnn13"])
def test_recomputed_blocks_give_the_same_gradient_of_the_same_samples(backbone):
    model, x = network("se2", 4, partial=True, backbone=backbone).train(), random_image(1, (9, 9))
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        with patch("gzoo.continuous.checkpoint_seq", wraps=checkpoint_seq) as recomputed:
            model(x).square().sum().backward()
        assert recomputed.called == enable
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backbone", ["resnet", "cnn13"])
def test_layer_decay_goes_from_the_classifier_to_the_stem(backbone):
    model = network(backbone=backbone)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert {path.partition(".")[0] for path in layers if layers[path] == 0} == {"stem"}
    assert layers["fc.weight"] == max(layers.values()) > max(layers[k] for k in layers if k.startswith("blocks"))


def test_odd_numbers_of_elements_are_exact_for_no_quarter_turn():
    report = gzoo.check(network(elements=3), 12, groups.get("p4"))
    assert min(report.errors["logits"][g] for g in (1, 2, 3)) > 1e-6


@pytest.mark.parametrize("size", [(6, 6), (7, 7), (6, 9)])
@pytest.mark.parametrize(("group", "elements"), [("se2", 4), ("e2", 8)])
def test_features_and_gradients_follow_the_image(group, elements, size):
    """The maps move with the pixels, and their elements by the group; a cotangent that moves with them, too."""
    arc = Arc(group, elements, False).double().eval()
    G, mirrors = arc.group, arc.group.reflections
    lift, conv = ContinuousLiftingConv2d(2, 3, 5).double(), ContinuousConv2d(3, 2, 3, mirrors).double()
    x = random_image(2, size)

    def run(x):
        return conv(lift(x, arc()), arc()).maps.flatten(1, 2)

    def gradients(x, cotangent):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(run(x), (x, lift.weight, conv.weight), cotangent)

    cotangent = torch.randn_like(run(x))
    expected = gradients(x, cotangent)
    for g in range(G.order):
        turned = G.transform_image(x, g)
        moved = _move(G, arc(), run(x), g)
        assert relative_error(run(turned), moved) < 1e-12
        image, *weights = gradients(turned, _move(G, arc(), cotangent, g))
        assert relative_error(image, G.transform_image(expected[0], g)) < 1e-12
        assert max(relative_error(a, b) for a, b in zip(weights, expected[1:], strict=True)) < 1e-12


def _move(group, elements, maps, g):
    """g.f for f known at ``elements``: the value at u moves to gu."""
    n = len(elements.angles)
    turn = math.pi / 2 * (g % 4)
    mirrored = elements.mirrored ^ (g >= 4)
    angles = turn + (-elements.angles if g >= 4 else elements.angles)
    target = [
        min(
            (j for j in range(n) if elements.mirrored[j] == mirrored[i]),
            key=lambda j: 1 - math.cos(elements.angles[j] - angles[i]),
        )
        for i in range(n)
    ]
    assert sorted(target) == list(range(n))
    values = group.transform_image(maps.unflatten(1, (-1, n)), g)
    return torch.empty_like(values).index_copy(2, torch.tensor(target), values).flatten(1, 2)


def test_a_convolution_is_the_sum_over_the_group_written_out():
    """Every pair of elements by itself, with its kernel made from the definition: psi(u^-1 v, u^-1 y)."""
    conv = ContinuousConv2d(1, 1, 3, True).double()
    u = Elements(torch.tensor([0.3, 2.0]).double(), torch.tensor([False, True]), torch.tensor([0.5, 0.5]).double())
    v = Elements(torch.tensor([1.1, -0.7]).double(), torch.tensor([True, False]), torch.tensor([0.8, 0.2]).double())
    x = torch.randn(1, 1, 2, 5, 5).double()
    result = conv(Features(x, v), u).maps
    for i in range(2):
        expected = torch.zeros(1, 1, 5, 5).double()
        for j in range(2):
            # u^-1 v turns by the difference of the angles, backwards if u reflects.
            angle = (v.angles[j] - u.angles[i]) * (-1 if u.mirrored[i] else 1)
            waves = [1.0] + [2**0.5 * f(k * angle.item()) for k in (1, 2) for f in (math.cos, math.sin)]
            half = 5 * int(u.mirrored[i] != v.mirrored[j])
            coefficients = sum(wave * conv.weight[0, 0, half + k] for k, wave in enumerate(waves))
            pose = circular_harmonics(3, u.angles[i : i + 1], u.mirrored[i : i + 1])[0] / conv.norm
            kernel = (coefficients @ pose).view(1, 1, 3, 3)
            expected += v.weights[j] * nn.functional.conv2d(x[:, :, j], kernel, padding=1)
        assert relative_error(result[:, :, i], expected) < 1e-12


def test_eight_elements_follow_a_turn_by_45_degrees_better_than_four():
    """On a band-limited image, a sum of broad Gaussians in the middle, drawn anew at the turned centres."""
    generator = torch.Generator().manual_seed(1)
    centres = 9 * torch.rand(8, 2, dtype=torch.float64, generator=generator) - 4.5
    signs = torch.randn(8, dtype=torch.float64, generator=generator)

    def image(angle):
        c, s = math.cos(angle), math.sin(angle)
        turned = centres @ torch.tensor([[c, s], [-s, c]], dtype=torch.float64)
        axis = torch.arange(29, dtype=torch.float64) - 14
        distance = (axis - turned[:, :1, None]) ** 2 + (-axis[:, None] - turned[:, 1:, None]) ** 2
        return (signs.view(-1, 1, 1) * torch.exp(-distance / 8)).sum(0).expand(1, 1, -1, -1)

    assert image(math.pi / 2).allclose(image(0.0).rot90(1, (2, 3)), atol=1e-12)
    torch.manual_seed(0)
    eight = network(elements=8, width=6)
    four = network(elements=4, width=6)
    four.load_state_dict(eight.state_dict())
    one = network("t2", elements=1, width=6)
    # Weights of se2, which a network over t2 refuses by their signature.
    one.load_state_dict({k: v for k, v in eight.state_dict().items() if k != "group_signature"}, strict=False)

    def error(f):
        return relative_error(f(image(math.pi / 4)), f(image(0.0)))

    def before_the_pools(model):
        return lambda x: pool_all(model.blocks[0].first(model.stem(x)))

    assert error(before_the_pools(eight)) < 0.1 * error(before_the_pools(four))
    assert error(before_the_pools(eight)) < 0.01 * error(before_the_pools(one))
    assert error(eight) < 0.1 * error(one)  # the pools, over squares, are what is left


@pytest.mark.parametrize(("group", "elements"), [("se2", 8), ("e2", 8)])
def test_a_partial_network_starts_as_the_full_one(group, elements):
    partial = network(group, elements, partial=True)
    full = network(group, elements)
    learned = {key for key in partial.state_dict() if key.endswith(("reach", "logit"))}
    assert len(learned) == (10 if group == "e2" else 5)
    full.load_state_dict({key: value for key, value in partial.state_dict().items() if key not in learned})
    x = random_image(1, (12, 12))
    assert partial(x).equal(full(x))
    assert symmetry(partial) == tuple(range(elements))


def test_a_layer_that_drops_rotations_keeps_none_but_the_mirror():
    model = network("e2", 8, partial=True)
    with torch.no_grad():
        model.blocks[1].second.arc.reach.fill_(0.4)
    report = gzoo.check(model, 12)
    assert symmetry(model) == (0, 4)
    assert tuple(report.errors["logits"]) == (0, 4)
    assert report.worst < 1e-12
    assert min(report.given_up.values()) > 1e-6
    with torch.no_grad():
        model.stem.arc.logit.fill_(-1.0)
    assert symmetry(model) == (0,)
    assert gzoo.check(model, 12).given_up[4] > 1e-6


def test_every_parameter_has_a_gradient_when_the_reflected_elements_are_dropped(monkeypatch):
    monkeypatch.setattr("gzoo.nn.continuous.draw", lambda logit: (logit - logit.detach()).mul(0.1))
    model = network("e2", 4, partial=True).train()
    model(torch.randn(2, 1, 9, 9, dtype=torch.float64)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_training_samples_all_of_the_interval_and_nothing_else():
    arc = Arc("se2", 3, True)
    nn.init.constant_(arc.reach, 0.5)
    angles = torch.cat([arc().angles for _ in range(400)]).detach()
    assert angles.abs().max() <= math.pi / 2
    counts = torch.histc(angles, 8, -math.pi / 2, math.pi / 2)
    assert counts.sum() == 1200
    assert counts.min() > 100
    assert arc.eval()().angles.allclose(torch.tensor([-math.pi / 3, 0.0, math.pi / 3]), atol=1e-6)


def test_training_drops_the_reflected_elements_by_their_probability():
    arc = Arc("e2", 4, True)
    nn.init.zeros_(arc.logit)
    counts = [len(arc().angles) for _ in range(400)]
    assert set(counts) == {2, 4}
    assert 150 < counts.count(4) < 250
    kept = next(elements for elements in iter(arc, None) if len(elements.angles) == 4)
    (gradient,) = torch.autograd.grad(kept.weights[2], arc.logit)
    assert gradient > 0
    nn.init.constant_(arc.logit, -1.0)
    assert not arc.eval()().mirrored.any()


@pytest.mark.parametrize(("wanted", "start"), [(0.2, 1.0), (0.8, 0.3)])
def test_theta_learns_the_interval_of_a_toy_problem(wanted, start):
    """The mean of cos over [-theta, theta] is sin(theta) / theta, with its one minimum of the squared distance."""
    arc = Arc("se2", 8, True)
    nn.init.constant_(arc.reach, start)
    target = math.sin(math.pi * wanted) / (math.pi * wanted)
    optimizer = torch.optim.Adam(arc.parameters(), 0.02)
    for _ in range(300):
        optimizer.zero_grad()
        (arc().angles.cos().mean() - target).square().backward()
        optimizer.step()
    assert arc.theta == pytest.approx(math.pi * wanted, abs=0.1)


def test_every_theta_and_logit_has_a_gradient_from_the_start():
    model = network("e2", 8, partial=True).train()
    learned = [parameter for _, arc in subsets(model) for parameter in arc.parameters()]
    total = [torch.zeros(()) for _ in learned]
    for _ in range(4):  # a draw without the reflected elements of a layer has no gradient for its logit
        logits = model(random_image(1, (12, 12)))
        gradients = torch.autograd.grad(logits.square().sum(), learned, allow_unused=True)
        total = [a if b is None else a + b.abs() for a, b in zip(total, gradients, strict=True)]
    assert min(total) > 1e-9


def test_theta_stays_between_nothing_and_all():
    arc = Arc("se2", 4, True)
    for value, degrees in ((1.3, 180.0), (-0.2, 0.0)):
        nn.init.constant_(arc.reach, value)
        assert math.degrees(arc.eval().theta) == degrees
        assert math.degrees(arc().angles.abs().max().item()) <= degrees
        arc.train()()
        assert arc.reach.item() == degrees / 180


def test_a_partial_network_survives_a_save(tmp_path):
    model = network("e2", 8, partial=True)
    with torch.no_grad():
        model.blocks[0].first.arc.reach.fill_(0.3)
        model.stem.arc.logit.fill_(-1.0)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    again = network("e2", 8, partial=True)
    x = random_image(1, (12, 12))
    assert not again(x).equal(model(x))
    again.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert again(x).equal(model(x))
    assert copy.deepcopy(model)(x).equal(model(x))


def test_the_report_says_theta_and_the_probability_of_reflections(tmp_path):
    model = timm.create_model("e2_resnet", partial=True, width=2)
    nn.init.constant_(model.blocks[0].first.arc.reach, 0.25)
    nn.init.constant_(model.blocks[0].first.arc.logit, -2.0)
    assert gzoo.partial.report(model).splitlines() == [
        "kept rotations, from -theta to theta in degrees",
        "layer              theta  reflected",
        "stem               180.0      0.88 ",
        "blocks.0.first      45.0     (0.12)",
        "blocks.0.second    180.0      0.88 ",
        "blocks.1.first     180.0      0.88 ",
        "blocks.1.second    180.0      0.88 ",
        "all layers together: exactly equivariant to 0",
    ]
    gzoo.partial.plot(model, tmp_path / "subsets.png")
    assert (tmp_path / "subsets.png").read_bytes().startswith(b"\x89PNG")


def test_the_networks_have_the_interface_of_timm():
    for name in ("t2_resnet", "se2_resnet", "e2_resnet", "t2_cnn13", "se2_cnn13", "e2_cnn13"):
        model = timm.create_model(name, in_chans=3, num_classes=7, width=2).eval()
        x = torch.randn(2, 3, 9, 8)
        assert model(x).shape == (2, 7)
        assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, model.num_features)
        model.reset_classifier(0, "avg")
        assert model(x).shape == (2, 2)
        with pytest.raises(ValueError, match="global_pool is 'max'; continuous networks pool by the mean alone"):
            model.reset_classifier(5, "max")
        with pytest.raises(ValueError, match=f"{name} gives no pyramid of features"):
            timm.create_model(name, features_only=True)


def test_a_network_made_without_numbers_is_filled_by_a_checkpoint():
    x = random_image(1, (9, 9))
    for partial in (True, False):
        model = network("e2", 8, partial)
        with torch.device("meta"):
            empty = timm.create_model("e2_resnet", elements=8, partial=partial, width=3, kernel_size=5, num_classes=4)
        filled = empty.to_empty(device="cpu").double().eval()
        filled.load_state_dict(model.state_dict())
        assert relative_error(filled(x), model(x)) < 1e-12


def test_weights_of_another_continuous_group_are_refused():
    with pytest.raises(ValueError, match=r"checkpoint is of a network over se2, but the model is a network over t2"):
        network("t2", 1).load_state_dict(network("se2").state_dict())
    with pytest.raises(ValueError, match="ContinuousResNet is no network that"):
        gzoo.grow(network("se2"), network("t2", 1))


@pytest.mark.parametrize(("group", "elements"), [("t2", 1), ("se2", 4), ("e2", 8)])
def test_full_networks_export_and_take_synchronized_batch_norms(group, elements):
    model, x = network(group, elements), random_image(1, (9, 9))
    exported = torch.export.export(model, (x,)).module()
    assert relative_error(exported(x), model(x)) < 1e-12
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert relative_error(synchronized(x), model(x)) < 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("so3", 4, False), "unknown group 'so3'; accepted are t2"),
        (("se2", 0, False), "elements is 0; t2 takes 1, se2 1 or more"),
        (("e2", 5, False), "elements is 5; t2 takes 1, se2 1 or more, e2 an even number"),
        (("t2", 2, False), "elements is 2; t2 takes 1"),
        (("t2", 1, True), "t2 has no rotations and reflections to drop"),
    ],
)
def test_groups_and_numbers_of_elements_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Arc(*options)


@pytest.mark.parametrize("name", ["se2_resnet", "e2_cnn13"])
def test_even_kernels_are_refused(name):
    with pytest.raises(ValueError, match="kernel_size is 6; the kernels turn about a pixel"):
        timm.create_model(name, kernel_size=6)


def test_the_13_layers_learn_a_subset_each_and_have_the_widths_of_the_plain_network():
    model = timm.create_model("se2_cnn13", partial=True, width=2)
    assert len(list(subsets(model))) == 9
    plain = [module for module in timm.create_model("cnn13").modules() if isinstance(module, nn.Conv2d)]
    layers = [module for module in model.modules() if isinstance(module, ContinuousLiftingConv2d | ContinuousConv2d)]
    assert [64 * len(layer.weight) for layer in layers] == [layer.out_channels for layer in plain]
    assert [layer.size for layer in layers] == [layer.kernel_size[0] for layer in plain]
    full = sum(parameter.numel() for parameter in timm.create_model("se2_cnn13").parameters())
    assert 0.8 < full / sum(parameter.numel() for parameter in timm.create_model("cnn13").parameters()) < 1


@pytest.mark.parametrize("task", CONTINUOUS_TASKS, ids=lambda task: f"{task.name}-{task.group}")
def test_the_full_network_cannot_tell_a_six_from_its_copy_and_a_partial_one_can(task):
    x = random_image(1, (12, 12)).float()
    copied = task.acting.transform_image(x, task.element)
    full, partial = (_build(task, kind).eval() for kind in ("full", "partial"))
    assert full(x).allclose(full(copied), atol=1e-5)
    for _, arc in subsets(partial):
        nn.init.constant_(arc.reach, 0.2)
        if arc.logit is not None:
            nn.init.constant_(arc.logit, -2.0)
    assert not partial(x).allclose(partial(copied), rtol=1e-2)
