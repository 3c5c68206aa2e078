"""Soft networks start exactly equivariant, leave it as far as training takes them, and are saved and refused."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from torch import nn

import gzoo
from gzoo import groups
from gzoo.check import relative_error
from gzoo.cli import main
from gzoo.soft import make_soft, penalty, residuals
from tests.conftest import random_image, with_random_statistics, without, worst_error


def plain_net():
    """An image, depthwise, strided and pointwise convolution, with norms and biases."""
    return nn.Sequential(
        *(nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, stride=2, groups=16), nn.ReLU(), nn.Conv2d(16, 16, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)),
    )


def soft_net(group="p4m", trained=False):
    """In float64 and eval mode; ``trained``: after a step on random images, so on data without any symmetry."""
    model = with_random_statistics(gzoo.convert(plain_net(), group, soft=True)).eval()
    if trained:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        F.cross_entropy(model(random_image(2, (9, 9), batch=3)), torch.arange(3)).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("size", [(16, 16), (17, 17), (12, 17)])
@pytest.mark.parametrize("group", ["p4", "p4m", "d2"])
def test_a_soft_network_starts_as_the_equivariant_one_in_value_and_gradient(group, size):
    model, x = soft_net(group), random_image(2, size)
    assert len(residuals(model)) == 3
    assert model(x).equal(without(model, "residual")(x))
    # All gradients but those of the residual filters: the way out of the symmetry differs between x and g.x.
    for residual in residuals(model):
        residual.requires_grad_(False)
    assert worst_error(model, group, x, "image", "invariant") < 1e-12
    report = gzoo.check(model, size)
    assert set(report.errors["logits"]) == set(range(groups.get(group).order))
    assert report.worst < 1e-12
    assert not report.given_up


@pytest.mark.parametrize("size", [16, (12, 17)])
def test_a_step_on_images_without_symmetry_breaks_it_by_a_figure_that_is_no_failure(size):
    model = soft_net(trained=True)
    report = gzoo.check(model, size)
    assert tuple(report.errors["logits"]) == (0,)
    assert report.worst == 0
    assert set(report.given_up) == set(range(1, 8))
    assert min(report.given_up.values()) > 1e-6
    x = random_image(2, (16, 16), batch=1)
    p4m = groups.get("p4m")
    assert relative_error(model(p4m.transform_image(x, 1)), model(x)) > 1e-6
    assert relative_error(without(model, "residual")(p4m.transform_image(x, 1)), without(model, "residual")(x)) < 1e-12
    assert gzoo.check(model, size, p4m).worst > 1e-6  # held to a group, it fails


def test_the_figure_grows_with_the_residual_filters():
    model, given_up = soft_net(trained=True), []
    for _ in range(3):
        given_up.append(max(gzoo.check(model, 16).given_up.values()))
        with torch.no_grad():
            for residual in residuals(model):
                residual *= 0.1
    assert given_up[0] > 5 * given_up[1] > 25 * given_up[2] > 0


def test_pose_logits_stages_and_maps_have_their_figures_too():
    pose = gzoo.convert(plain_net(), "p4", soft=True, head="pose")
    stages = timm.create_model("d4c4c1_resnet20", soft=True)
    pyramid = timm.create_model("p4_resnet20", soft=True, features_only=True)
    for model in (pose, stages, pyramid):
        exact = gzoo.check(model, 16)
        assert exact.worst < 1e-12
        for residual in residuals(model):
            nn.init.normal_(residual, std=1e-6)
        report = gzoo.check(model, 16)
        assert report.worst == 0
        assert all(report.given_up[g] > 1e-9 for g in report.group.grid_elements if g)
        if not exact.given_up:  # compared by the right law, a small residual is a small error
            assert max(report.given_up.values()) < 1e-3


def test_the_penalty_is_half_the_sum_of_squares_and_its_gradient_the_filters():
    model = soft_net()
    assert penalty(model) == 0
    for residual in residuals(model):
        nn.init.normal_(residual)
    expected = sum(residual.square().sum() for residual in residuals(model)) / 2
    assert penalty(model).item() == pytest.approx(expected.item(), rel=1e-12)
    penalty(model).backward()
    assert all(residual.grad.allclose(residual) for residual in residuals(model))
    others = [p for name, p in model.named_parameters() if not name.endswith("residual")]
    assert all(p.grad is None for p in others)


def test_a_strong_penalty_keeps_the_network_nearer_to_the_symmetry_than_a_weak_one():
    errors = []
    for weight in (0.0, 10.0):
        torch.manual_seed(0)
        model, x = soft_net(), random_image(2, (9, 9), batch=3)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(20):
            optimizer.zero_grad()
            (F.cross_entropy(model(x), torch.arange(3)) + weight * penalty(model)).backward()
            optimizer.step()
        errors.append(max(gzoo.check(model, 9).given_up.values()))
    assert errors[0] > 3 * errors[1] > 0


def test_trained_networks_become_soft_without_a_change():
    model = timm.create_model("p4_cnn7", pretrained=True).eval()
    x = torch.randn(2, 1, 28, 28)
    before = model(x)
    make_soft(model)
    assert model(x).equal(before)
    assert timm.create_model("p4_cnn7", pretrained=True, soft=True).eval()(x).allclose(before, atol=1e-5)
    transferred = gzoo.convert(plain_net(), "p4", weights="transfer", soft=True)
    assert gzoo.check(transferred, 9).worst < 1e-12
    assert len(residuals(transferred)) == 3


def test_weights_survive_a_save_a_copy_and_the_check_command(tmp_path, capsys):
    model = timm.create_model("p4_cnn7", soft=True).eval()
    for residual in residuals(model):
        nn.init.normal_(residual, std=0.1)
    other = timm.create_model("p4_cnn7", soft=True).eval()
    other.load_state_dict(model.state_dict())
    save_for_hf(model, str(tmp_path), model_args={"soft": True}, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 1, 28, 28)
    for twin in (other, loaded, copy.deepcopy(model), model.to(memory_format=torch.channels_last)):
        assert twin(x).allclose(model(x), atol=1e-5)
    assert main(["check", str(tmp_path), "--size", "28"]) == 0
    assert "given up" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gzoo.convert(plain_net(), "p4", partial=True, soft=True), "is partial: .* take one of the two"),
        (lambda: make_soft(soft_net()), "is soft already"),
        (lambda: make_soft(plain_net()), "has no lifting or group convolution; convert it"),
        (lambda: penalty(gzoo.convert(plain_net(), "p4")), "is not soft, .* create it with soft=True"),
        (lambda: gzoo.to_escnn(soft_net()), "is soft: escnn has no filters"),
        (lambda: timm.create_model("cnn7", soft=True), "cnn7 is a plain network; soft=True is for .* p4_cnn7"),
    ],
)
def test_what_does_not_go_with_softness_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
