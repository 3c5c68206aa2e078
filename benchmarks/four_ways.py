"""Four ways to symmetry on one task: around a network, in front of it, inside it, and only as far as the data goes.

    uv run python benchmarks/four_ways.py --data data/mnist

One small CNN over p4. Three tasks, all trained on upright MNIST images alone: ten digits from many images, ten digits
from few, and a 6 against a 9, which a turn exchanges. Tested upright and turned by random multiples of 90 degrees. All
runs have the same optimizer, rates and steps; what starts from the trained plain network has them twice. No option was
chosen on test images. Writes four_ways.json.
"""

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pose_mnist import P4, Loss, Split, count, fit, main, row, turned
from torch import Tensor, nn

import gzoo
from gzoo.card import multiply_adds
from gzoo.check import check
from gzoo.soft import penalty

PENALTIES = (10, 1, 0.1)
FEW = 1000


def cnn(outputs: int, width: int = 12) -> nn.Sequential:
    """A plain CNN with a global average, so that any way applies."""
    layers: list[nn.Module] = []
    for channels, out, stride in ((1, width, 2), (width, 2 * width, 1), (2 * width, 4 * width, 2)):
        layers += [nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    layers += [nn.Conv2d(4 * width, 4 * width, 3, 2, padding=1, bias=False), nn.BatchNorm2d(4 * width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, outputs))


def supervised(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def with_turned_copies(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return supervised(model, turned(x, torch.randint(P4.order, y.shape)), y)


def prior(canonizer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return gzoo.pose_loss(canonizer(x), torch.zeros_like(y))


def joint(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Straight through the choice of the pose, and the prior."""
    return supervised(model, x, y) + prior(model.canonizer, x, y)


def softly(weight: float) -> Loss:
    return lambda model, x, y: supervised(model, x, y) + weight * penalty(model)


def ways(train: Split, outputs: int, epochs: int) -> dict[str, tuple[nn.Module, float]]:
    """Every model, trained, and the seconds of all training that went into it."""
    plain, canonizer = cnn(outputs), gzoo.convert(cnn(1, 4), "p4", head="pose")
    before, choosing = fit(plain, supervised, *train, epochs), fit(canonizer, prior, *train, epochs)
    found = {
        "plain": (plain, before),
        "equivarify, not trained": (gzoo.equivarify(plain, "p4", pool="max").eval(), before),
        "canonicalize, prior alone": (gzoo.canonicalize(plain, "p4", canonizer).eval(), before + choosing),
    }
    # Jointly: the trained network and a canonizer that starts anew.
    fresh = gzoo.canonicalize(copy.deepcopy(plain), "p4", gzoo.convert(cnn(1, 4), "p4", head="pose"))
    started: dict[str, tuple[nn.Module, Loss, float]] = {
        "plain, turned copies": (cnn(outputs), with_turned_copies, 0.0),
        "equivarify, trained": (gzoo.equivarify(cnn(outputs), "p4"), supervised, 0.0),
        "canonicalize, joint": (fresh, joint, before),
        "G-CNN": (gzoo.convert(cnn(outputs), "p4"), supervised, 0.0),
        "partial": (gzoo.convert(cnn(outputs), "p4", partial=True), supervised, 0.0),
    }
    for weight in PENALTIES:
        started[f"soft, penalty {weight:g}"] = gzoo.convert(cnn(outputs), "p4", soft=True), softly(weight), 0.0
    started["equivarify, fine-tuned"] = gzoo.equivarify(copy.deepcopy(plain), "p4"), supervised, before
    for name, (model, loss, seconds) in started.items():
        found[name] = model, seconds + fit(model, loss, *train, epochs)
    return found


def measured(models: dict[str, tuple[nn.Module, float]], test: Split, seed: int) -> dict[str, object]:
    """A row for each model; ``error`` is the largest equivariance error of its logits in float64."""
    turns = torch.randint(P4.order, (len(test[1]),), generator=torch.Generator().manual_seed(seed))
    rotated = turned(test[0], turns)
    return {
        name: {
            **row(model, test[0], rotated, test[1]),
            "error": max(check(model, 28, P4).errors["logits"].values()),
            "parameters": count(model),
            "multiply_adds": multiply_adds(model, (1, 28, 28)),
            "train_seconds": round(seconds, 1),
        }
        for name, (model, seconds) in models.items()
    }


def sixes_and_nines(images: Tensor, labels: Tensor) -> Split:
    chosen = (labels == 6) | (labels == 9)
    return images[chosen], (labels[chosen] == 9).long()


def experiment(train: Split, test: Split, epochs: int, seed: int) -> dict[str, object]:
    """Trains and tests every model on every task; the figures. Fewer images are seen the more often."""
    few, pairs = (train[0][:FEW], train[1][:FEW]), (sixes_and_nines(*train), sixes_and_nines(*test))
    tasks = {"digits": (train, test, 10, 1), "few": (few, test, 10, 10), "6 or 9": (*pairs, 2, 3)}
    report: dict[str, object] = {}
    for name, (training, testing, outputs, repeats) in tasks.items():
        torch.manual_seed(seed)
        report[name] = measured(ways(training, outputs, epochs * repeats), testing, seed)
    return {"few": FEW, "tasks": report}


def table(report: dict[str, Any]) -> str:
    """The figures as a table in Markdown, a row for each way; error and cost are those of the first task.

    Without seconds: on a machine that others use, too, the same work differs by more than a factor of two.
    """
    digits, few, pairs = (report["tasks"][task] for task in ("digits", "few", "6 or 9"))
    lines = [
        f"| way | digits, upright / turned | from {report['few']:,} images | 6 or 9, upright | equivariance error "
        "| parameters | multiply-adds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in sorted(digits, key=lambda name: (not name.startswith("plain"), name.lower())):
        found = digits[name]
        accuracies = [f"{rows[name]['upright']:.1f} / {rows[name]['rotated']:.1f}" for rows in (digits, few)]
        error = "exact" if found["error"] < 1e-12 else f"{found['error']:.2f}"
        size = f"{found['parameters'] / 1e3:.0f}k | {found['multiply_adds'] / 1e6:.1f}M"
        lines.append(f"| {name} | {' | '.join(accuracies)} | {pairs[name]['upright']:.1f} | {error} | {size} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(__doc__, experiment, Path(__file__).with_suffix(".json"))
