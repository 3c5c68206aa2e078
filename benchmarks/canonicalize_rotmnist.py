"""Canonicalization on rotated MNIST: a CNN behind a small network that learns how each image should be turned.

    uv run python benchmarks/canonicalize_rotmnist.py --data data/rotmnist --images 12000 --epochs 40

The experiment of Kaba et al. 2022, arXiv:2211.06489, table 1, over p4: the CNN alone, behind a canonizer that learns
with it from the task alone, behind one whose random weights stay (the statistics of its norms do not), and the G-CNN.
Ours is the 7-layer CNN of the zoo behind four convolutions of 2 to 8 fields. All have the same optimizer, rates and
steps; no option was chosen on test images. Writes canonicalize_rotmnist.json.
"""

from pathlib import Path
from typing import Any

import timm
import torch
from four_ways import cnn, supervised
from pose_mnist import P4, Split, accuracy, count, fit, main
from torch import nn

import gzoo
from gzoo.card import multiply_adds

PAPER = {"CNN": 4.90, "canonicalized": 2.41, "canonicalized, frozen": 3.91, "G-CNN": 2.28}  # test errors in %


def networks() -> dict[str, nn.Module]:
    """By the names of `PAPER`, all with fresh weights."""

    def zoo(name: str) -> nn.Module:
        return timm.create_model(name, block_drop_rate=0.1)

    def behind(canonizer: nn.Module) -> nn.Module:
        return gzoo.canonicalize(zoo("cnn7"), "p4", canonizer)

    learned, frozen = (gzoo.convert(cnn(1, 4), "p4", head="pose") for _ in range(2))
    frozen.requires_grad_(False)
    return {
        "CNN": zoo("cnn7"),
        "canonicalized": behind(learned),
        "canonicalized, frozen": behind(frozen),
        "G-CNN": zoo("p4_cnn7"),
    }


def experiment(train: Split, test: Split, epochs: int, seed: int) -> dict[str, object]:
    """Trains and tests every network; the figures."""
    found = {}
    for name in PAPER:
        torch.manual_seed(seed)
        model = networks()[name]
        seconds = fit(model, supervised, *train, epochs)
        images, turned = test[0], P4.transform_image(test[0], 1)
        found[name] = {
            "error": round(100 - accuracy(model, images, test[1]), 2),
            "error_turned": round(100 - accuracy(model, turned, test[1]), 2),
            "parameters": count(model),
            "multiply_adds": multiply_adds(model, (1, 28, 28)),
            "train_seconds": round(seconds, 1),
        }
        print(name, found[name], flush=True)
    return {"networks": found}


def table(report: dict[str, Any]) -> str:
    """The figures as a table in Markdown, beside the paper's."""
    lines = [
        "| network | test error | test images turned by 90 degrees | Kaba et al. 2022 | parameters | multiply-adds |",
        "|---|---|---|---|---|---|",
    ]
    for name, paper in PAPER.items():
        own = report["networks"][name]
        size = f"{own['parameters'] / 1e3:.0f}k | {own['multiply_adds'] / 1e6:.1f}M"
        lines.append(f"| {name} | {own['error']:.2f}% | {own['error_turned']:.2f}% | {paper:.2f}% | {size} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(__doc__, experiment, Path(__file__).with_suffix(".json"))
