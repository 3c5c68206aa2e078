"""Accuracy and loss on a data set: upright, under the eight rotations and flips of the square, under any rotation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import AverageMeter
from torch import Tensor, nn

from gzoo import groups
from gzoo.check import relative_error
from gzoo.data import ImageData, eval_loader, eval_transform, input_config
from gzoo.equivariant import group_of, like
from gzoo.predict import count_poses, label_names, own_label_names

View = Callable[[Tensor], Tensor]  # images (B, C, H, W) to changed images


def evaluate(
    model: nn.Module,
    data: ImageData,
    batch_size: int = 256,
    workers: int = 0,
    bf16: bool = False,
    transforms: bool = False,
    rotation_seed: int | None = None,
) -> dict[str, Any]:
    """Measure a model on a data set, with the preprocessing that the model's config asks for.

    Of a model that says class and pose, logits (B, classes, |G|), the class is the one of the largest probability,
    summed over the poses. Both are right if the likeliest pair is the class and what the image was turned by.

    Args:
        transforms: also turn and flip every batch by the eight symmetries of the square: top1 of each, and their mean.
            Those that leave the logits of noise as they are have the top1 of the upright images. With poses all eight
            are run.
        rotation_seed: also rotate each image by a uniform random angle from this seed (bilinear, borders mirrored).

    Returns:
        top1 and, past five classes, top5 in percent; loss, with poses that of class and pose; n;
        calibration_error in percent (see `calibration_error`);
        images_per_second over all that was asked for, decoding included;
        if asked for, `transforms` and `transforms_mean`, and `random_rotation`, top1 in percent;
        of a model with poses also `pose_top1` and, of the transforms that its group has, `transforms_pose`: class and
        pose both right, in percent.

    Raises:
        ValueError: the model has other classes than the data, or gives no logits.
    """
    device = like(model).device
    relabelled = match_classes(model, data)
    loader = eval_loader(relabelled, eval_transform(input_config(model)), batch_size, workers, device)
    views: dict[str, View] = {"upright": _same}
    if transforms:
        views.update(_symmetries())
    if rotation_seed is not None:
        views["random_rotation"] = _RandomRotation(rotation_seed)
    start = time.perf_counter()
    measured = measure(model, loader, device, bf16, views)
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {**measured["upright"], "n": len(data), "images_per_second": len(data) / seconds}
    if transforms:
        result["transforms"] = {name: measured[name]["top1"] for name in _symmetries()}
        result["transforms_mean"] = sum(result["transforms"].values()) / len(result["transforms"])
        poses = {name: measured[name]["pose_top1"] for name in _symmetries() if "pose_top1" in measured[name]}
        result |= {"transforms_pose": poses} if poses else {}
    if rotation_seed is not None:
        result["random_rotation"] = measured["random_rotation"]["top1"]
    return result


@torch.no_grad()  # not inference_mode: a layer may keep what it computes here and use it in training later
def measure(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    bf16: bool,
    views: dict[str, View] | None = None,
) -> dict[str, dict[str, float]]:
    """Loss, top1, (past five classes) top5, with poses pose_top1, and, upright, the calibration error of each view.

    The model is left in eval mode.

    A view that leaves the logits of noise as an earlier one does, to rounding, has the figures of that one; logits with
    poses change with every view.
    """
    model.eval()
    elements = _elements(model)
    views = views or {"upright": _same}
    leader: dict[str, str] = {}
    meters: dict[str, dict[str, AverageMeter]] = {}
    confidences, rights = [], []
    for images, labels in batches:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if not meters:
            leader = _leaders(model, views, images)
            meters = {name: {} for name in leader.values()}
        for name in meters:
            view = views[name]
            with autocast(device, bf16):
                answer = model(view(images))  # (B, classes), or (B, classes, |G|)
            count_poses(model, answer)
            answer = answer.float()
            logits = without_pose(answer)
            if name == "upright":
                confidence, guess = logits.softmax(1).max(1)
                confidences.append(confidence)
                rights.append(guess == labels)
            _update(meters[name], answer, labels, elements.get(name))
    figures = {name: {key: float(meter.avg) for key, meter in row.items()} for name, row in meters.items()}
    result = {name: dict(figures[first]) for name, first in leader.items()}
    if confidences:
        result["upright"]["calibration_error"] = calibration_error(torch.cat(confidences), torch.cat(rights))
    return result


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    """To bfloat16 if `precision` says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision(device, bf16) == "bfloat16")


def precision(device: torch.device, bf16: bool) -> str:
    """The dtype of a run: "bfloat16" if asked for, else "float32". That also where oneDNN has no bfloat16, as on CPUs
    without AVX-512, as there torch takes loops of its own, which are many times slower."""
    has_it = device.type != "cpu" or (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return "bfloat16" if bf16 and has_it else "float32"


def _leaders(model: nn.Module, views: dict[str, View], images: Tensor) -> dict[str, str]:
    """For each view the first one that leaves all logits the same: noise shows which, where a blank image would not."""
    noise = torch.randn(2, *images.shape[1:], generator=torch.Generator().manual_seed(0)).to(images)
    leaders: dict[str, str] = {}
    seen: dict[str, Tensor] = {}
    for name, view in views.items():
        leaders[name] = name
        if len(views) == 1 or isinstance(view, _RandomRotation):
            continue
        logits = model(view(noise))
        if count_poses(model, logits) == 1:
            leaders[name] = next((first for first, y in seen.items() if relative_error(logits, y) < 1e-4), name)
            seen.setdefault(leaders[name], logits)
    return leaders


def calibration_error(confidence: Tensor, right: Tensor, bins: int = 15) -> float:
    """Expected calibration error in percent: how far the confidence is from the accuracy, over bins of equal width.

    Args:
        confidence: (N,), the largest probability of each image.
        right: (N,), whether its class was the true one.

    Source: Guo et al. 2017, arXiv:1706.04599, equation 3. Bin m holds what lies in ((m - 1) / bins, m / bins].
    """
    index = (confidence.double() * bins).ceil().long() - 1  # (N,)
    gaps = torch.zeros(bins, dtype=torch.double, device=index.device)
    gaps.index_add_(0, index.clamp(0, bins - 1), right.double() - confidence.double())
    return float(100 * gaps.abs().sum() / len(confidence))


def _update(meters: dict[str, AverageMeter], answer: Tensor, labels: Tensor, element: int | None) -> None:
    logits = without_pose(answer)
    ranks = (1, 5) if logits.shape[1] > 5 else (1,)
    right = logits.topk(ranks[-1]).indices == labels[:, None]  # (B, ranks)
    values = {f"top{k}": 100 * right[:, :k].any(1).double().mean() for k in ranks}
    values["loss"] = F.cross_entropy(logits, labels).double()
    if answer.ndim == 3 and element is not None:
        pairs, target = answer.flatten(1), labels * answer.shape[2] + element
        values["pose_top1"] = 100 * (pairs.argmax(1) == target).double().mean()
        values["loss"] = F.cross_entropy(pairs, target).double()
    for key, value in values.items():
        meters.setdefault(key, AverageMeter()).update(value, len(labels))


def without_pose(logits: Tensor) -> Tensor:
    """Logits of the classes, (B, classes): of those with poses, (B, classes, |G|), the probabilities summed over G."""
    return logits.logsumexp(2) if logits.ndim == 3 else logits


def _elements(model: nn.Module) -> dict[str, int]:
    """The element of the model's group that each view turns by, of those that it has."""
    group = group_of(model)
    if group is None:
        return {}
    names, turns = list(_symmetries()), group.rotations
    return {"upright": 0} | {names[4 * (g // turns) + 4 * (g % turns) // turns]: g for g in group.grid_elements}


def match_classes(model: nn.Module, data: ImageData) -> ImageData:
    """The data with its labels numbered as the model numbers its classes: matched by name, if it has names."""
    classes: Any = getattr(model, "num_classes", None)
    if not isinstance(classes, int):
        raise ValueError(f"{type(model).__name__} has no num_classes; set it to the number of logits, as timm does")
    names = label_names(model, classes)
    if set(data.classes) <= set(names):
        labels = [names.index(name) for name in data.classes]
        return ImageData(data.images, [labels[i] for i in data.labels], names)
    unnamed = not own_label_names(model, classes)
    if unnamed and classes == len(data.classes):
        return data
    known = f"{classes} classes" if unnamed else f"the classes {names}"
    raise ValueError(f"the model knows {known}, the data have {len(data.classes)}: {data.classes}; fine-tune it first")


def _same(x: Tensor) -> Tensor:
    return x


def _symmetries() -> dict[str, View]:
    """The eight symmetries of the square by name; the reflection, where there is one, comes first."""
    square = groups.get("p4m")
    names = [f"{'flip + ' if g >= 4 else ''}{90 * (g % 4)} degrees" for g in range(square.order)]
    return {name: partial(square.transform_image, g=g) for g, name in enumerate(names)}


class _RandomRotation:
    """Rotate each image of a batch by its own uniform angle; the angles follow from the seed and the order."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, x: Tensor) -> Tensor:
        angle = torch.rand(len(x), generator=self.generator).to(x.device) * 2 * math.pi
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        aspect = x.shape[3] / x.shape[2]  # grid coordinates run from -1 to 1 on both axes, whatever the lengths
        rows = torch.stack([cos, -sin / aspect, zero, sin * aspect, cos, zero], 1)
        grid = F.affine_grid(rows.view(-1, 2, 3), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
