"""MNIST6-180 and MNIST6-M: tell a digit 6 from its own copy, turned by 180 degrees or mirrored.

A network that is equivariant to that transformation gives both the same logits, and one of each pair is wrong: 50.0%,
whatever it learns. A partial one can drop the symmetry. Source: Romero & Lohit 2022, arXiv:2110.10211, section 6; ours
is the small CNN of `gzoo.backbones.cnn7` with exact groups in place of the paper's continuous kernels.
"""

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzoo import backbones, groups
from gzoo.check import check
from gzoo.convert import convert_in_place
from gzoo.data import open_split, seed_everything
from gzoo.groups import Group
from gzoo.partial import parameter_groups, subsets, symmetry
from gzoo.train import machine


class Task(NamedTuple):
    """Tell x from g.x, with networks over a group that has g."""

    name: str
    group: str
    element: int


TASKS = (
    Task("MNIST6-180", "p4", 2),
    Task("MNIST6-M", "d1", 1),
    Task("MNIST6-180", "p4m", 2),
    Task("MNIST6-M", "p4m", 4),
)
MODELS = ("plain", "full", "partial")

_EPOCHS = 3
_BATCH = 64
_RATE = 2e-3
_SUBSET_RATE = 5e-2  # a logit has to come from 2 to below 0 in some hundred steps


def mnist6(mnist: str, seed: int = 0, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains and tests every model on every task.

    Args:
        mnist: MNIST, a folder of parquet files or a data set on the Hub.
        seed: of weights, order of the images, draws and validation images.
        say: gets a line after each run.

    Returns:
        Seed, data, machine, versions and a row for each run, as JSON has it; `table` prints it.
    """
    training, test = _sixes(mnist, "train"), _sixes(mnist, "test")
    kept = len(training) * 9 // 10  # the rest is validation; rows are in no order
    runs = []
    for task in TASKS:
        for model in MODELS:
            row = _run(task, model, training[:kept], training[kept:], test, seed)
            runs.append(row)
            say(f"{task.name} {task.group} {model}: test {row['test_accuracy']:.1f}%, {row['seconds']:.0f} s")
    return {
        "data": mnist,
        "sixes": {"training": kept, "validation": len(training) - kept, "test": len(test)},
        "seed": seed,
        "epochs": _EPOCHS,
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
    group = groups.get(task.group)
    plain = backbones.cnn7(num_classes=2)
    model = plain if kind == "plain" else convert_in_place(plain, group, partial=kind == "partial")
    start = time.perf_counter()
    _train(model, *pairs(training, group, task.element))
    row: dict[str, Any] = {
        **task._asdict(),
        "model": kind,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": time.perf_counter() - start,
        "validation_accuracy": _accuracy(model, *pairs(validation, group, task.element)),
        "test_accuracy": _accuracy(model, *pairs(test, group, task.element)),
        "error": check(model, 28, group).errors["logits"],
    }
    if kind == "partial":
        row["kept"] = {name: subset.kept for name, subset in subsets(model)}
        row["symmetry"] = symmetry(model)
    return row


def pairs(images: Tensor, group: Group, g: int) -> tuple[Tensor, Tensor]:
    """Every image x as class 0 and g.x as class 1."""
    x = torch.cat([images, group.transform_image(images, g)])
    return x, torch.arange(2).repeat_interleave(len(images))


def _train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(model, _RATE, _SUBSET_RATE))
    steps = len(images) // _BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _EPOCHS * steps)
    model.train()
    for _ in range(_EPOCHS):
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
    for task in TASKS:
        runs = [rows[task.name, task.group, model] for model in MODELS]
        cells = " | ".join(f"{run['test_accuracy']:.1f}%" for run in runs)
        exact = runs[-1]["symmetry"]
        kept = ", ".join(map(groups.get(task.group).label, exact)) if len(exact) > 1 else "the identity alone"
        longest = max(run["seconds"] for run in runs)
        lines.append(f"| {task.name} | `{task.group}` | {cells} | {kept} | at most {longest:.0f} s |")
    return "\n".join(lines)
