"""Augmentation in batches against PIL's, image by image; its random numbers; where its tensors lie."""

import random
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as pil

from gzoo.augment import BatchTransform, affine, crop_boxes, jitter, make_resident, resident_loader, resized_crop
from gzoo.data import Augmentation, ImageData, set_epoch, train_transform

CPU = torch.device("cpu")
NOTHING = {"scale": (1, 1), "ratio": (1, 1), "hflip": 0}
SHAPES = [(1, 28, 28), (3, 32, 32), (3, 29, 29), (3, 20, 31), (1, 33, 16)]
# PIL cuts a grey level off or rounds it after each operation; the batch is rounded nowhere.
LEVEL = 1.01


def noise(shape, low=0, high=256, seed=0):
    channels, height, width = shape
    pixels = np.random.default_rng(seed).integers(low, high, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)


def tensor(image):
    """A PIL image as (C, H, W), 0 to 255."""
    return pil.pil_to_tensor(image).float()


def config(channels, height, width, interpolation="bilinear"):
    shape, mean, std = (channels, height, width), (0.4, 0.5, 0.6)[:channels], (0.2, 0.25, 0.3)[:channels]
    return {"input_size": shape, "mean": mean, "std": std, "interpolation": interpolation, "crop_pct": 1.0}


def grey_levels(x, config):
    """Undo the normalisation."""
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    return 255 * (x * std + mean)


def of(images, labels=None):
    return ImageData(images, labels or [0] * len(images), ["a", "b"])


def augmented(image, copies, data_config, seed=0, **options):
    """A batch of changed copies of one image, in grey levels."""
    images = make_resident(of([image]), data_config["input_size"][0], CPU).images.expand(copies, -1, -1, -1)
    x = BatchTransform(data_config, Augmentation(**options))(images, seed)
    assert x.is_contiguous()
    return grey_levels(x, data_config)


# --- against PIL


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 29, 29)])
def test_without_augmentation_a_batch_is_that_of_pil(shape):
    images = [noise(shape, seed=seed) for seed in range(3)]
    resident = make_resident(of(images), shape[0], CPU).images
    found = BatchTransform(config(*shape), Augmentation(**NOTHING))(resident, 0)
    transform = train_transform(config(*shape), Augmentation(**NOTHING))
    torch.testing.assert_close(found, torch.stack([transform(image) for image in images]), atol=1e-5, rtol=0)


def test_images_get_the_channels_of_the_model():
    colour, grey = noise((3, 8, 8)), noise((1, 8, 8))
    assert torch.equal(make_resident(of([colour]), 1, CPU).images[0].float(), tensor(colour.convert("L")))
    assert torch.equal(make_resident(of([grey]), 3, CPU).images[0].float(), tensor(grey).expand(3, -1, -1))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_rotation_is_that_of_pil(shape, interpolation):
    image, angles = noise(shape), np.random.default_rng(1).uniform(-180, 180, 30)
    found = rotate(tensor(image).expand(30, -1, -1, -1), torch.tensor(angles).float().deg2rad(), interpolation)
    for x, angle in zip(found, angles.tolist(), strict=True):
        assert (x - tensor(pil.rotate(image, angle, InterpolationMode(interpolation)))).abs().max() < LEVEL


def rotate(x, angles, interpolation):
    return affine(x, angles, torch.ones_like(angles), torch.zeros_like(angles), interpolation)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_affine_change_is_that_of_pil(shape, interpolation):
    image = noise(shape)
    angles, zooms, shears = np.random.default_rng(2).uniform((-180, 0.7, -25), (180, 1.4, 25), (30, 3)).T
    changes = (torch.tensor(values).float() for values in (np.deg2rad(angles), zooms, np.deg2rad(shears)))
    found = affine(tensor(image).expand(30, -1, -1, -1), *changes, interpolation)
    for x, angle, zoom, shear in zip(found, angles, zooms, shears, strict=True):  # torchvision turns clockwise here
        made = pil.affine(image, -angle, [0, 0], zoom, [shear, 0.0], InterpolationMode(interpolation))
        assert (x - tensor(made)).abs().max() < LEVEL


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [28, 29])
def test_a_quarter_turn_moves_pixels_without_blending(size, interpolation):
    x = torch.rand(1, 2, size, size, dtype=torch.float64)
    for quarters in range(-2, 4):
        turned = rotate(x, torch.tensor([quarters * torch.pi / 2], dtype=torch.float64), interpolation)
        torch.testing.assert_close(turned, x.rot90(quarters, (2, 3)), atol=1e-12, rtol=0)


def test_zoom_and_shear_are_drawn_for_each_image_from_their_ranges():
    dot = np.zeros((41, 41), np.uint8)
    dot[20 - 8, 20] = 255  # eight pixels above the middle
    x = augmented(Image.fromarray(dot), 400, config(1, 41, 41), zoom=(0.75, 1.25), shear=30, **NOTHING)[:, 0]
    rows, columns = torch.meshgrid(torch.arange(41.0) - 20, torch.arange(41.0) - 20, indexing="ij")
    mass = x.sum((1, 2))
    up, right = -(x * rows).sum((1, 2)) / mass, (x * columns).sum((1, 2)) / mass
    assert 8 * 0.75 - 0.5 < up.min() < 6.5 < 9.5 < up.max() < 8 * 1.25 + 0.5
    slant = right / up
    tangent = np.tan(np.pi / 6)
    assert -tangent - 0.1 < slant.min() < -tangent + 0.1
    assert tangent - 0.1 < slant.max() < tangent + 0.1


def test_corners_are_black_before_the_normalisation():
    x = augmented(Image.new("L", (28, 28), 200), 50, config(1, 28, 28), rotate=180, **NOTHING)
    levels = x.round().unique().tolist()
    assert levels == [0, 200]
    assert (x[:, :, 10:18, 10:18] > 199).all()


# Shrunken noise of full range overshoots, and versions of PIL differ in which axis they cut first: hence less range.
@pytest.mark.parametrize(("interpolation", "low", "high"), [("bilinear", 0, 256), ("bicubic", 90, 160)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_resized_crop_is_that_of_pil(shape, interpolation, low, high):
    image, rng = noise(shape, low, high), np.random.default_rng(1)
    _, height, width = shape
    extents = rng.integers(1, (height + 1, width + 1), (30, 2))
    corners = rng.integers(0, np.array([height + 1, width + 1]) - extents)
    boxes = torch.tensor(np.concatenate([corners, extents], 1).T)
    for size in ((28, 28), (9, 7), (24, 41)):
        found = resized_crop(tensor(image).expand(30, -1, -1, -1), boxes, size, interpolation)
        for x, box in zip(found, boxes.T.tolist(), strict=True):
            expected = pil.resized_crop(image, *box, size, InterpolationMode(interpolation))
            assert (x - tensor(expected)).abs().max() < 1.1


def test_bicubic_crops_that_grow_overshoot_as_far_as_pils():
    image = noise((3, 20, 20))
    found = resized_crop(tensor(image)[None], torch.tensor([[3], [2], [15], [11]]), (28, 28), "bicubic")[0]
    expected = tensor(pil.resized_crop(image, 3, 2, 15, 11, (28, 28), InterpolationMode.BICUBIC))
    assert (found - expected).abs().max() < 1.1
    assert (expected == 0).any()
    assert (expected == 255).any()


@pytest.mark.parametrize(
    ("sides", "scale", "ratio"),
    [((32, 32), (0.35, 1), (3 / 4, 4 / 3)), ((28, 28), (0.08, 1), (0.5, 2)), ((20, 31), (0.9, 1), (0.9, 2))],
)
def test_random_boxes_are_distributed_as_timms(sides, scale, ratio):
    random.seed(0)
    image, count = Image.new("L", sides[::-1]), 6000
    expected = [RandomResizedCropAndInterpolation.get_params(image, scale, ratio) for _ in range(count)]
    expected = torch.tensor(expected).double().T  # (4, count): top, left, height, width
    torch.manual_seed(0)
    boxes = crop_boxes(sides, scale, ratio, torch.rand(22, count)).double()
    assert (boxes >= 0).all()
    assert torch.equal(boxes, boxes.round())
    assert (boxes[:2] + boxes[2:] <= torch.tensor(sides)[:, None]).all()
    for power in (1, 2, 3):
        a, b = boxes**power, expected**power
        error = ((a.var(1) + b.var(1)) / count).sqrt()
        assert ((a.mean(1) - b.mean(1)).abs() < 4 * error).all()
    assert (torch.corrcoef(boxes) - torch.corrcoef(expected)).abs().max() < 0.06


@pytest.mark.parametrize("sides", [(20, 50), (50, 20), (30, 30)])
def test_where_no_box_fits_it_is_timms_in_the_middle(sides):
    ratio = (3 / 4, 4 / 3)
    expected = RandomResizedCropAndInterpolation.get_params(Image.new("L", sides[::-1]), (2, 2), ratio)
    boxes = crop_boxes(sides, (2, 2), ratio, torch.rand(22, 3))
    assert boxes.T.tolist() == [list(expected)] * 3


@pytest.mark.parametrize(("height", "width", "size"), [(12, 12, 12), (12, 15, 12), (9, 7, 12), (31, 24, 12)])
def test_padded_crops_are_pils_in_all_places(height, width, size):
    image = noise((3, height, width), 60, 200)
    short = pil.resize(image, size, InterpolationMode.BILINEAR)
    padded = tensor(pil.pad(short, 2))
    places = padded.unfold(1, size, 1).unfold(2, size, 1).movedim(0, 2).flatten(0, 1)  # (places, 3, size, size)
    found = augmented(image, 40 * len(places), config(3, size, size), crop_padding=2, hflip=0)
    distance = (found[:, None] - places).abs().amax((2, 3, 4))  # (batch, places)
    assert distance.amin(1).max() < LEVEL
    assert set(distance.argmin(1).tolist()) == set(range(len(places)))


@pytest.mark.parametrize(("hflip", "vflip"), [(0, 0), (1, 0), (0, 1), (1, 1), (0.25, 0), (0, 0.75)])
def test_flips_have_their_probabilities(hflip, vflip):
    image = noise((3, 9, 9))
    x = augmented(image, 2000, config(3, 9, 9), **NOTHING | {"hflip": hflip, "vflip": vflip})
    views = [tensor(image).flip(dims) for dims in ((), (2,), (1,), (1, 2))]
    share = [((x - view).abs().amax((1, 2, 3)) < 1e-3).float().mean().item() for view in views]
    expected = [(1 - hflip) * (1 - vflip), hflip * (1 - vflip), (1 - hflip) * vflip, hflip * vflip]
    assert share == pytest.approx(expected, abs=0.05)


def test_transposing_with_both_flips_shows_all_eight_poses():
    image, options = noise((3, 9, 9)), NOTHING | {"transpose": 0.5, "hflip": 0.5, "vflip": 0.5}
    views = [pose.flip(dims) for pose in (tensor(image), tensor(image).mT) for dims in ((), (2,), (1,), (1, 2))]
    transform, data_config = train_transform(config(3, 9, 9), Augmentation(**options)), config(3, 9, 9)
    one_by_one = grey_levels(torch.stack([transform(image) for _ in range(2000)]), data_config)
    for x in (one_by_one, augmented(image, 2000, data_config, **options)):
        share = [((x - view).abs().amax((1, 2, 3)) < 1e-3).float().mean().item() for view in views]
        assert share == pytest.approx([1 / 8] * 8, abs=0.03)


def test_a_batch_that_is_not_square_is_not_transposed():
    with pytest.raises(ValueError, match="augment_batches transposes square images, not 20x29; leave transpose out"):
        augmented(noise((3, 20, 29)), 4, config(3, 16, 16), transpose=0.5)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 29, 20)])
def test_colour_changes_are_those_of_pil_in_any_order(shape):
    adjust = (pil.adjust_brightness, pil.adjust_contrast, pil.adjust_saturation)
    orders = [*permutations(range(3))]
    factors = np.random.default_rng(1).uniform(0.6, 1.4, (3, 6))
    images = [noise(shape, low, low + 150, seed=low) for low in range(0, 120, 20)]
    x = torch.stack([tensor(image) for image in images])
    found = jitter(x, torch.tensor(factors).float(), torch.tensor(orders).T)
    for y, image, order, factor in zip(found, images, orders, factors.T, strict=True):
        expected = image
        for change in order:
            expected = adjust[change](expected, float(factor[change]))
        assert (y - tensor(expected)).abs().max() < 1 + 1.4 + 1.4**2  # a level of each change, scaled by the next ones
    for change in range(3):
        only = torch.ones(3, 6)
        only[change] = 0.4
        expected = torch.stack([tensor(adjust[change](image, 0.4)) for image in images])
        assert (jitter(x, only, torch.tensor(orders).T) - expected).abs().max() < 1.6


def test_each_image_draws_the_factors_and_the_order_of_its_colour_changes(monkeypatch):
    seen = []
    monkeypatch.setattr("gzoo.augment.jitter", lambda x, *numbers: seen.extend(numbers) or x)
    augmented(noise((3, 8, 8)), 3000, config(3, 8, 8), color_jitter=0.3)
    factors, order = seen
    assert (factors.min().item(), factors.max().item()) == pytest.approx((0.7, 1.3), abs=0.001)
    permutation, count = order.T.unique(dim=0, return_counts=True)
    assert permutation.tolist() == [list(p) for p in permutations(range(3))]
    assert (count / 3000).tolist() == pytest.approx([1 / 6] * 6, abs=0.03)


def test_random_erasing_is_timms():
    x = augmented(Image.new("RGB", (32, 32), (255,) * 3), 1000, config(3, 32, 32), re_prob=0.3, **NOTHING)
    white = torch.isclose(x, torch.tensor(255.0), atol=1e-3)
    assert (~white).flatten(1).any(1).float().mean().item() == pytest.approx(0.3, abs=0.05)
    erased = grey_levels(torch.zeros(3, 1, 1), config(3, 32, 32)).expand_as(x)[~white]
    torch.testing.assert_close(x[~white], erased)


@pytest.mark.parametrize("crop", [{"scale": (0.4, 0.9)}, {"crop_padding": 3}])
def test_all_changes_together_have_the_mean_and_spread_of_pils(crop):
    y, x = np.mgrid[:20, :20]
    pixels = np.stack([6 * x + 6 * y, 250 - 12 * x, 40 + 9 * y], 2).clip(0, 255).astype(np.uint8)
    image, data_config, count = Image.fromarray(pixels), config(3, 16, 16, "bicubic"), 1500
    options = {
        "rotate": 40,
        "zoom": (0.8, 1.2),
        "shear": 9,
        "hflip": 0.2,
        "vflip": 0.3,
        "color_jitter": 0.3,
        "re_prob": 0.4,
        **crop,
    }
    random.seed(0)
    torch.manual_seed(0)
    transform = train_transform(data_config, Augmentation(**options))
    expected = grey_levels(torch.stack([transform(image) for _ in range(count)]), data_config).double()
    found = augmented(image, count, data_config, **options).double()
    error = ((found.var(0) + expected.var(0)) / count).sqrt()
    # PIL's loss of up to a level at each of its steps is no error; 768 values: 5 deviations.
    assert ((found.mean(0) - expected.mean(0)).abs() < 5 * error + 2).all()
    assert (found.std(0) / expected.std(0) - 1).abs().max() < 0.15


# --- random numbers


def test_batches_depend_on_seed_and_epoch_and_every_image_has_its_own_numbers():
    data = make_resident(of([noise((3, 12, 12))] * 8, [0, 1] * 4), 3, CPU)
    transform = BatchTransform(config(3, 12, 12), Augmentation(rotate=90, re_prob=0.5))

    def epoch(seed, number):
        loader = resident_loader(data, transform, 4, seed)
        set_epoch(loader, number)
        return torch.cat([images for images, _ in loader])

    first = epoch(1, 2)
    torch.manual_seed(99)  # what ran before must not matter, in this process or another one
    random.seed(99)
    assert torch.equal(first, epoch(1, 2))
    assert not torch.equal(first, epoch(1, 3))
    assert not torch.equal(first, epoch(2, 2))
    assert len({tuple(image.flatten().tolist()) for image in first}) == 8
    same_order = [resident_loader(data, transform, 4, seed).dataset.__getitems__([2, 1])[0] for seed in (1, 2)]
    assert not torch.equal(*same_order)


def test_labels_stay_with_their_images():
    data = make_resident(of([Image.new("L", (4, 4), 10 * i) for i in range(10)], list(range(10))), 1, CPU)
    batches = list(resident_loader(data, BatchTransform(config(1, 4, 4), Augmentation(**NOTHING)), 3, 0))
    assert [len(labels) for _, labels in batches] == [3, 3, 3]  # a last incomplete batch is left out
    for images, labels in batches:
        levels = grey_levels(images, config(1, 4, 4))[:, 0, 0, 0]
        assert levels.round().tolist() == [10 * label for label in labels.tolist()]


def test_augmenting_batches_leaves_the_callers_random_numbers_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    augmented(noise((3, 12, 12)), 4, config(3, 12, 12), rotate=90, color_jitter=0.2, re_prob=1.0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()


# --- where and what


@pytest.mark.parametrize("crop", [{"scale": (0.4, 0.9)}, {"crop_padding": 3}])
def test_a_batch_is_made_on_the_device_of_its_images(crop):
    """Fake tensors know their device and refuse to mix two of them; they need no GPU."""
    options = {"rotate": 40, "vflip": 0.3, "color_jitter": 0.3, "re_prob": 1.0, **crop}
    with FakeTensorMode():
        images = torch.empty(4, 3, 20, 20, dtype=torch.uint8, device="cuda")
        found = BatchTransform(config(3, 16, 16), Augmentation(**options))(images, 0)
    assert (found.device.type, found.shape, found.dtype) == ("cuda", (4, 3, 16, 16), torch.float32)


def test_what_has_no_form_for_batches_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match=r"auto_augment 'rand-m5' changes single images; leave it out"):
        BatchTransform(config(3, 8, 8), Augmentation(auto_augment="rand-m5"))
    with pytest.raises(ValueError, match=r"by bilinear or bicubic interpolation, not 'lanczos'"):
        BatchTransform(config(3, 8, 8, "lanczos"), Augmentation())
    with pytest.raises(ValueError, match=r"8x12 pixels is larger than the padded images, 10x10; raise crop_padding"):
        BatchTransform(config(1, 8, 12), Augmentation(crop_padding=1))(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), 0)


def test_images_that_are_no_single_small_tensor_are_an_error():
    same, other = noise((3, 12, 10)), noise((3, 10, 12))
    with pytest.raises(ValueError, match=r"the first is 12x10 pixels and number 3 10x12; leave it out"):
        make_resident(of([same, same, other]), 3, CPU)
    with pytest.raises(ValueError, match=r"2 of 1024x1024 pixels are 6 MB, 5 MB is the most; leave it out"):
        make_resident(of([noise((3, 1024, 1024))] * 2), 3, CPU, budget=5 << 20)
    with pytest.raises(ValueError, match=r"1 or 3 channels, not 4"):
        make_resident(of([same]), 4, CPU)
