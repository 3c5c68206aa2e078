"""Accuracy and loss, upright and under rotations and flips."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import gzoo
from gzoo import groups
from gzoo.data import ImageData
from gzoo.evaluate import (
    _elements,
    _RandomRotation,
    _symmetries,
    calibration_error,
    evaluate,
    match_classes,
    measure,
    without_pose,
)


class Corner(nn.Module):
    """Class 1 where the top left quarter is brighter than the rest, else class 0: knows up from down."""

    num_classes = 2

    def __init__(self, **config):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0, **config}

    def forward(self, x):
        bright = x[:, 0, :4, :4].mean((1, 2)) - x[:, 0].mean((1, 2))
        return self.scale * torch.stack([-bright, bright - 0.1], 1)


class Mean(Corner):
    """Class 1 where the image is bright: the same under every symmetry."""

    def forward(self, x):
        mean = x.mean((1, 2, 3))
        return self.scale * torch.stack([-mean, mean], 1)


def quarter(row, column):
    image = np.zeros((8, 8), dtype=np.uint8)
    image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 255
    return Image.fromarray(image)


@pytest.fixture
def corners():
    """Class 1 has its bright quarter at the top left; class 0 is black."""
    images = [quarter(0, 0), Image.new("L", (8, 8)), quarter(0, 0)]
    return ImageData(images, [1, 0, 1], ["black", "corner"])


def test_top1_loss_and_n_are_those_of_the_whole_set(corners):
    model = Corner()
    result = evaluate(model, corners, batch_size=2)  # the last batch is smaller than the first
    x = torch.stack([torch.from_numpy(np.asarray(image).copy()).float()[None] / 127.5 - 1 for image, _ in corners])
    assert result["loss"] == pytest.approx(F.cross_entropy(model(x), torch.tensor(corners.labels)).item())
    assert (result["top1"], result["n"], "top5" in result) == (100, 3, False)
    assert result["images_per_second"] > 0


def test_top5_is_measured_past_five_classes():
    logits = torch.arange(7.0).expand(4, 7).clone()
    labels = torch.tensor([6, 2, 5, 0])
    model = nn.Identity()
    measured = measure(model, [(logits, labels)], torch.device("cpu"), bf16=False)["upright"]
    assert (measured["top1"], measured["top5"]) == (25, 75)


def test_the_calibration_error_is_that_of_a_case_by_hand():
    # Bins of 1/15: 0.50 and 0.52 share the bin (7/15, 8/15], 1.0 is in the last one, 0.8 = 12/15 closes the twelfth.
    confidence = torch.tensor([0.50, 0.52, 0.8, 0.82, 1.0], dtype=torch.double)
    right = torch.tensor([True, False, True, False, True])
    by_hand = (abs(1 - 1.02) + abs(1 - 0.8) + abs(0 - 0.82) + abs(1 - 1.0)) / 5
    assert calibration_error(confidence, right) == pytest.approx(100 * by_hand)
    assert calibration_error(confidence, right, bins=1) == pytest.approx(100 * abs(3 - 3.64) / 5)


def test_a_model_that_is_always_right_is_calibrated_as_far_as_it_is_sure(corners):
    x = torch.stack([torch.from_numpy(np.asarray(image).copy()).float()[None] / 127.5 - 1 for image, _ in corners])
    confidence = Corner()(x).softmax(1).max(1).values
    result = evaluate(Corner(), corners, batch_size=2)
    assert result["calibration_error"] == pytest.approx(100 * (1 - confidence).mean().item())


def test_a_model_without_symmetry_falls_under_the_eight_symmetries(corners):
    result = evaluate(Corner(), corners, transforms=True)
    assert len(result["transforms"]) == 8
    right = [name for name, top1 in result["transforms"].items() if top1 == 100]
    assert right == ["0 degrees", "flip + 90 degrees"]  # the second is the mirror along the diagonal
    assert result["transforms_mean"] == pytest.approx((2 * 100 + 6 * 100 / 3) / 8)


def test_an_invariant_model_does_not_fall(corners):
    result = evaluate(Mean(), ImageData(corners.images, [0, 0, 0], corners.classes), transforms=True)
    assert set(result["transforms"].values()) == {100.0}


def test_poses_with_the_logits_of_another_are_run_on_noise_only(corners):
    many = ImageData(corners.images * 4, [0] * 12, corners.classes)
    model, runs = Mean(), []
    model.register_forward_hook(lambda *_: runs.append(1))
    evaluate(model, many, batch_size=4, transforms=True)
    assert len(runs) == 3 + 9
    model, runs = Corner(), []
    model.register_forward_hook(lambda *_: runs.append(1))
    evaluate(model, many, batch_size=4, transforms=True)
    assert len(runs) == 4 * 3 + 9  # each corner is that of two of the eight, and the upright one that of all others


def test_a_blank_first_image_does_not_make_a_model_invariant(corners):
    blank = Image.fromarray(np.zeros((8, 8), np.uint8))
    data = ImageData([blank, *corners.images], [0, *corners.labels], corners.classes)
    result = evaluate(Corner(), data, batch_size=1, transforms=True, rotation_seed=0)
    assert result["transforms_mean"] < result["top1"]
    assert result["random_rotation"] < result["top1"]


class Pointer(nn.Module):
    """Over p4: the bright quarter of the image says the pose, and there is one class; where it is dark, the other."""

    num_classes = 2

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.group = groups.get("p4")
        self.pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}

    def forward(self, x):
        quarters = [x.rot90(-g, (2, 3))[:, 0, :4, :4].mean((1, 2)) for g in range(4)]
        bright = torch.stack(quarters, 1)
        return self.scale * 10 * torch.stack([-bright.mean(1, keepdim=True) - 0.4 + 0 * bright, bright], 1)


def test_a_model_with_poses_is_right_in_class_and_pose(corners):
    """The third image is upright with its quarter at the bottom left, a quarter turn off: its class is right."""
    images = [quarter(0, 0), quarter(0, 0), quarter(1, 0)]
    data = ImageData(images, [1, 1, 1], corners.classes)
    result = evaluate(Pointer(), data, batch_size=2, transforms=True)
    assert result["top1"] == 100
    x = torch.stack([torch.from_numpy(np.asarray(image).copy()).float()[None] / 127.5 - 1 for image in images])
    assert result["loss"] == pytest.approx(gzoo.pose_loss(Pointer()(x), torch.ones(3, dtype=torch.long)).item())
    assert result["pose_top1"] == pytest.approx(200 / 3)
    assert result["transforms_pose"] == {f"{90 * g} degrees": pytest.approx(200 / 3) for g in range(4)}
    assert set(result["transforms"].values()) == {100.0}
    logits = Pointer()(torch.rand(2, 1, 8, 8))
    together = logits.flatten(1).softmax(1).unflatten(1, (2, 4)).sum(2)
    assert without_pose(logits).softmax(1).allclose(together)


@pytest.mark.parametrize("group", ["c1", "c2", "p4", "d1", "d2", "p4m", "c8", "d8"])
def test_each_symmetry_of_the_square_is_one_element_of_the_models_group(group):
    """The view turns an image as that element does."""
    own, image = groups.get(group), torch.rand(1, 1, 5, 5)
    model = nn.Module()
    model.group = own
    elements = _elements(model)
    assert elements.pop("upright") == 0
    assert sorted(elements.values()) == sorted(own.grid_elements)
    for name, g in elements.items():
        assert _symmetries()[name](image).equal(own.transform_image(image, g))


def test_random_rotations_follow_from_their_seed():
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    first, again, other = (_RandomRotation(seed)(x) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_model_without_symmetry_falls_under_random_rotations(corners):
    many = ImageData(corners.images * 20, corners.labels * 20, corners.classes)
    result = evaluate(Corner(), many, batch_size=16, rotation_seed=1)
    assert result["top1"] == 100
    assert result["random_rotation"] < 80
    assert (
        evaluate(Mean(), ImageData(corners.images, [0, 0, 0], corners.classes), rotation_seed=1)["random_rotation"]
        == 100
    )


def test_a_random_rotation_by_a_quarter_turn_is_rot90(monkeypatch):
    x = torch.rand(2, 3, 5, 5)
    monkeypatch.setattr(torch, "rand", lambda n, generator: torch.full((n,), 0.25))
    turned = _RandomRotation(0)(x)
    assert min((turned - x.rot90(k, (2, 3))).abs().max() for k in (1, 3)) < 1e-5
    assert (turned - x).abs().max() > 0.1


def test_labels_are_matched_by_class_name_where_the_numbering_differs(corners):
    renamed = Corner(label_names=["black", "corner"])
    swapped = ImageData(corners.images, [0, 1, 0], ["corner", "black"])
    assert match_classes(renamed, swapped).labels == [1, 0, 1]
    assert evaluate(renamed, swapped)["top1"] == 100


def test_classes_that_the_model_does_not_know_are_an_error(corners):
    model = Corner(label_names=["black", "white"])
    with pytest.raises(ValueError, match=r"knows the classes \['black', 'white'\], the data have 2"):
        evaluate(model, corners)


def test_classes_that_are_named_by_number_are_names(corners):
    with pytest.raises(ValueError, match=r"knows the classes \['0', '1'\], the data have 2"):
        evaluate(Corner(label_names=["0", "1"]), corners)


def test_a_model_without_logits_is_an_error(corners):
    model = Corner()
    model.forward = lambda x: x * model.scale
    with pytest.raises(ValueError, match=r"Corner gives no logits \(B, classes\)"):
        evaluate(model, corners)
    with pytest.raises(ValueError, match="Linear has no num_classes"):
        evaluate(nn.Linear(2, 2), corners)


def test_another_number_of_classes_is_an_error(corners):
    three = ImageData(corners.images, corners.labels, ["a", "b", "c"])
    with pytest.raises(ValueError, match="knows 2 classes, the data have 3"):
        evaluate(Corner(), three)


def test_evaluating_leaves_a_model_that_can_be_trained(corners):
    model = Corner()
    evaluate(model, corners)
    model.train()(torch.rand(1, 1, 8, 8)).sum().backward()
    assert model.scale.grad is not None
