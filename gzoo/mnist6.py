"""MNIST6-180 and MNIST6-M: tell a digit 6 from its own copy, turned by 180 degrees or mirrored.

A network that is equivariant to that transformation gives both the same logits, and one of each pair is wrong: 50.0%,
whatever it learns. A partial one can drop the symmetry. Source: Romero & Lohit 2022, arXiv:2110.10211, section 6; ours
are the small CNN of `gzoo.backbones.cnn7` with groups on the pixel grid (`TASKS`), and the residual network of
`gzoo.continuous`, like the paper's but narrow and on images of half the size (`CONTINUOUS_TASKS`).
"""

import math
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzoo import backbones, groups
from gzoo.check import check
from gzoo.continuous import ContinuousResNet
from gzoo.convert import convert_in_place
from gzoo.data import open_split, seed_everything
from gzoo.groups import Group
from gzoo.nn import Arc, Subset
from gzoo.partial import parameter_groups, subsets, symmetry
from gzoo.train import machine


class Task(NamedTuple):
    """Tell x from g.x, with networks over a group that has g; ``element`` is g in p4, d1 or p4m."""

    name: str
    group: str
    element: int

    @property
    def acting(self) -> Group:
        """The group that g is an element of: of a continuous one the part that moves pixels exactly."""
        return groups.get({"se2": "p4", "e2": "p4m"}.get(self.group, self.group))

    @property
    def epochs(self) -> int:
        """As many as they need."""
        return 1 if self in CONTINUOUS_TASKS else 3


TASKS = (
    Task("MNIST6-180", "p4", 2),
    Task("MNIST6-M", "d1", 1),
    Task("MNIST6-180", "p4m", 2),
    Task("MNIST6-M", "p4m", 4),
)
CONTINUOUS_TASKS = (Task("MNIST6-180", "se2", 2), Task("MNIST6-180", "e2", 2), Task("MNIST6-M", "e2", 4))
MODELS = ("plain", "full", "partial")

_BATCH = 64
_RATE = 2e-3
_SUBSET_RATE = 5e-2  # a logit has to come from 2 to below 0 in some hundred steps, or theta from pi to 0


def mnist6(
    mnist: str, seed: int = 0, say: Callable[[str], None] = print, tasks: tuple[Task, ...] = TASKS
) -> dict[str, Any]:
    """Trains and tests every model on every task.

    Args:
        mnist: MNIST, a folder of parquet files or a data set on the Hub.
        seed: of weights, order of the images, draws and validation images.
        say: gets a line after each run.
        tasks: `TASKS` or `CONTINUOUS_TASKS`.

    Returns:
        Seed, data, machine, versions and a row for each run, as JSON has it; `table` prints it.
    """
    training, test = _sixes(mnist, "train"), _sixes(mnist, "test")
    kept = len(training) * 9 // 10  # the rest is validation; rows are in no order
    runs = []
    for task in tasks:
        for model in MODELS:
            row = _run(task, model, training[:kept], training[kept:], test, seed)
            runs.append(row)
            say(f"{task.name} {task.group} {model}: test {row['test_accuracy']:.1f}%, {row['seconds']:.0f} s")
    return {
        "data": mnist,
        "sixes": {"training": kept, "validation": len(training) - kept, "test": len(test)},
        "seed": seed,
        "machine": machine(torch.device("cpu")),
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "runs": runs,
    }


def _sixes(mnist: str, split: Any) -> Tensor:
    """(n, 1, 28, 28), about zero mean and unit variance."""
    data = open_split(mnist, split)
    images = [np.asarray(data[i][0].convert("L")) for i, label in enumerate(data.labels) if data.classes[label] == "6"]
    if not images:
        raise ValueError(f"{mnist}: no {split} image has the class '6'; its classes are {', '.join(data.classes)}")
    return (torch.from_numpy(np.stack(images)).float().unsqueeze(1) / 255 - 0.13) / 0.31


def _run(task: Task, kind: str, training: Tensor, validation: Tensor, test: Tensor, seed: int) -> dict[str, Any]:
    seed_everything(seed)
    group = task.acting
    model = _build(task, kind)
    if isinstance(model, ContinuousResNet):
        training, validation, test = (F.avg_pool2d(images, 2) for images in (training, validation, test))
    start = time.perf_counter()
    _train(model, *pairs(training, group, task.element), task.epochs)
    row: dict[str, Any] = {
        **task._asdict(),
        "model": kind,
        "epochs": task.epochs,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": time.perf_counter() - start,
        "validation_accuracy": _accuracy(model, *pairs(validation, group, task.element)),
        "test_accuracy": _accuracy(model, *pairs(test, group, task.element)),
        "error": check(model, 28, group).errors["logits"],
    }
    if kind == "partial":
        row["kept"] = {name: _kept(subset) for name, subset in subsets(model)}
        row["symmetry"] = symmetry(model)
    return row


def _build(task: Task, kind: str) -> nn.Module:
    if task in CONTINUOUS_TASKS:
        elements = 1 if kind == "plain" else task.acting.order
        return timm.create_model(
            f"{'t2' if kind == 'plain' else task.group}_resnet",
            elements=elements,
            partial=kind == "partial",
            num_classes=2,
            width=8,
            kernel_size=5,
        )
    plain = backbones.cnn7(num_classes=2)
    return plain if kind == "plain" else convert_in_place(plain, task.acting, partial=kind == "partial")


def _kept(subset: Subset | Arc) -> Any:
    if isinstance(subset, Subset):
        return subset.kept
    return {"theta_degrees": math.degrees(subset.theta), "mirror_probability": subset.mirror_probability}


def pairs(images: Tensor, group: Group, g: int) -> tuple[Tensor, Tensor]:
    """Every image x as class 0 and g.x as class 1."""
    x = torch.cat([images, group.transform_image(images, g)])
    return x, torch.arange(2).repeat_interleave(len(images))


def _train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(model, _RATE, _SUBSET_RATE))
    steps = len(images) // _BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images))[: steps * _BATCH].view(steps, _BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In percent."""
    right = [(model(x).argmax(1) == y) for x, y in zip(images.split(256), labels.split(256), strict=True)]
    return 100 * torch.cat(right).double().mean().item()


def table(report: dict[str, Any]) -> str:
    """The test accuracies as a table in Markdown, a row for each task."""
    rows = {(run["name"], run["group"], run["model"]): run for run in report["runs"]}
    lines = [
        "| task | group | plain CNN | G-CNN | partial G-CNN | the partial one is still exact under | training, each |",
        "|---|---|---|---|---|---|---|",
    ]
    for task in dict.fromkeys(Task(run["name"], run["group"], run["element"]) for run in report["runs"]):
        runs = [rows[task.name, task.group, model] for model in MODELS]
        cells = " | ".join(f"{run['test_accuracy']:.1f}%" for run in runs)
        exact = runs[-1]["symmetry"]
        kept = ", ".join(map(task.acting.label, exact)) if len(exact) > 1 else "the identity alone"
        longest = max(run["seconds"] for run in runs)
        lines.append(f"| {task.name} | `{task.group}` | {cells} | {kept} | at most {longest:.0f} s |")
    return "\n".join(lines)
