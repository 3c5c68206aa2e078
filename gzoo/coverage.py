"""Which of timm's convolutional networks convert: each is converted, trained for a step and checked, not listed.

A row of the table is one architecture. It is written as soon as it is measured, so a run that was stopped goes on where
it was.
"""

import csv
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from gzoo import groups
from gzoo.check import KeepDouble
from gzoo.convert import check_itself, convert_in_place, odd_images, randomized
from gzoo.equivariant import group_of
from gzoo.groups import Group

# timm's modules whose networks are convolutional by design, a few of them with attention between.
CONV_MODULES = (
    *("byobnet", "convmixer", "convnext", "cspnet", "cspnext", "densenet", "dla", "dpn", "edgenext", "efficientnet"),
    *("efficientvit_mit", "fasternet", "fastvit", "focalnet", "ghostnet", "hardcorenas", "hgnet", "hrnet"),
    *("inception_next", "inception_resnet_v2", "inception_v3", "inception_v4", "lcnetv2", "mambaout", "metaformer"),
    *("mobilenetv3", "mobilenetv5", "mobilevit", "nasnet", "nfnet", "pnasnet", "rdnet", "regnet", "repghost"),
    *("repvit", "res2net", "resnest", "resnet", "resnetv2", "rexnet", "selecsls", "senet", "shvit", "sknet"),
    *("starnet", "swiftformer", "tresnet", "vgg", "vovnet", "xception", "xception_aligned"),
)

TOLERANCE = 1e-9  # of the logits in float64; networks without norms enlarge rounding


@dataclass(frozen=True)
class Row:
    """What was measured of one architecture.

    Attributes:
        params: of the plain network.
        group: that it was converted to.
        ratio: parameters of the equivariant network to those of the plain one.
        error: of the logits in float64 over all elements, at an even and an odd size, relative to how much they differ
            between two images; NaN if it did not get there.
        seconds: for all of it.
        reason: why it does not convert; empty if it does.
    """

    module: str
    name: str
    params: int
    group: str
    ratio: float
    error: float
    seconds: float
    reason: str


def architectures(
    modules: tuple[str, ...] = CONV_MODULES, most_params: float = float("inf")
) -> list[tuple[str, str, int]]:
    """(module, name, parameters) of timm's own architectures in these modules, the smallest first.

    Args:
        modules: names of timm's model modules.
        most_params: leaves out what has more parameters.
    """
    found = []
    for module in modules:
        for name in timm.list_models(module=module):
            with torch.device("meta"):
                params = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
            if params <= most_params:
                found.append((module, name, params))
    return sorted(found, key=lambda row: row[2])


def coverage(
    rows: list[tuple[str, str, int]], group: str, path: Path, say: Callable[[str], object] = lambda text: None
) -> list[Row]:
    """Measures architectures, but for those that the file has already.

    Args:
        rows: of `architectures`.
        group: the name of a group.
        path: CSV that is read, and added to.
        say: is told each row.

    Raises:
        ValueError: there is no such group, or the file has rows over another one.
    """
    groups.chain(group)
    known = {row.name: row for row in read(path)} if path.exists() else {}
    if other := {row.group for row in known.values()} - {group}:
        raise ValueError(f"{path} has rows over {other.pop()}; give another --out for those over {group}")
    for module, name, params in rows:
        if name in known:
            continue
        known[name] = row = measure(module, name, params, group)
        is_new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(asdict(row))
        say(f"{name}: {row.reason or f'{row.error:.0e}'}")
    return [known[name] for _, name, _ in rows]


def read(path: Path) -> list[Row]:
    """The rows of a file that `coverage` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return [Row(**{f.name: f.type(row[f.name]) for f in fields(Row)}) for row in csv.DictReader(file)]  # type: ignore[operator]


def measure(module: str, name: str, params: int, group: str) -> Row:
    """Converts, trains for a step and checks one architecture."""
    start, ratio, error, reason = time.perf_counter(), float("nan"), float("nan"), ""
    torch.manual_seed(0)
    try:
        model = convert_in_place(timm.create_model(name), group)
        ratio = sum(parameter.numel() for parameter in model.parameters()) / params
        error, x = _largest_error(model)
        if not error <= TOLERANCE:
            check_itself(model)
            raise ValueError(f"the logits differ by {error:.0e}")
        _train_step(model, x.float())
    except Exception as problem:  # whatever it is, it is what a user would meet
        reason = re.sub(r"\s+", " ", str(problem))[:300] or type(problem).__name__
    return Row(module, name, params, group, round(ratio, 3), error, round(time.perf_counter() - start, 1), reason)


def _largest_error(model: nn.Module) -> tuple[float, Tensor]:
    """The error of the logits, and the image; the copy in float64 is gone before the step, which needs the memory."""
    probe, x = randomized(model)
    with KeepDouble():
        return max(_errors(probe, x)), x


def _errors(probe: nn.Module, x: Tensor) -> Iterator[float]:
    group = group_of(probe)
    assert group is not None
    # `randomized` calibrated it for x, and `odd_images` does for what it finds.
    yield from _errors_at(probe, x, group, group.grid_elements[1:])
    errors = [error for odd in odd_images(probe, x) for error in _errors_at(probe, odd, group, group.grid_generators)]
    if not errors:
        raise ValueError("it takes no images of odd size")
    yield from errors


@torch.no_grad()
def _errors_at(probe: nn.Module, image: Tensor, group: Group, elements: tuple[int, ...]) -> Iterator[float]:
    expected, other = probe(image), probe(image.roll(1, 1).flip(-2))
    if probe.num_classes and expected.shape != (1, probe.num_classes):  # without classes it gives features
        raise ValueError(f"the logits have shape {tuple(expected.shape)}, not (1, {probe.num_classes})")
    for g in elements:
        moved = expected if expected.ndim == 2 else group.transform_features(expected, g)  # features are a map
        difference = (probe(group.transform_image(image, g)) - moved).abs().max()
        error = (difference / (other - expected).abs().max()).item()
        yield error if math.isfinite(error) else math.inf


def _train_step(model: nn.Module, x: Tensor) -> None:
    """Raises ValueError if a weight gets no gradient, or one that is not finite."""
    model.train()
    model(torch.cat((x, x.flip(-1) + 0.1))).square().mean().backward()
    without = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    if without:
        raise ValueError(f"{without[0]} gets no gradient")
    if not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None):
        raise ValueError("a gradient is not finite")


def table(rows: list[Row]) -> str:
    """Architectures that convert, of those measured, by module, and the first reason of those that do not."""
    lines = [f"{'module':22} {'convert':>9} {'largest error':>14}  why not"]
    for module in sorted({row.module for row in rows}):
        mine = [row for row in rows if row.module == module]
        lines.append(f"{module:22} {_count(mine):>9} {_largest(mine):>14}  {_why(mine)}".rstrip())
    done = sum(not row.reason for row in rows)
    return "\n".join([*lines, f"{'all':22} {_count(rows):>9} {_largest(rows):>14}  {done / len(rows):.1%}"])


def _count(rows: list[Row]) -> str:
    return f"{sum(not row.reason for row in rows)}/{len(rows)}"


def _largest(rows: list[Row]) -> str:
    errors = [row.error for row in rows if not row.reason]
    return f"{max(errors):.0e}" if errors else ""


def _why(rows: list[Row]) -> str:
    failed = [row for row in rows if row.reason]
    return f"{failed[0].name}: {failed[0].reason[:90]}" if failed else ""
