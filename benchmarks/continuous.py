"""Real data with the networks over continuous groups: translations, SE(2) and E(2), whole and partial.

    uv run python benchmarks/continuous.py rotmnist --data data/rotmnist
    uv run python benchmarks/continuous.py cifar10 --data ../shared/data/cifar10

A small budget, for one CPU core: images of 14x14 and 16x16 pixels, 8 fields and 5x5 kernels (8 to 32 and 3x3 in the
13-layer CNN), three epochs and one, where the paper (Romero & Lohit 2022, arXiv:2110.10211) has all pixels, 32, 7x7 and
many more. All training images, no validation, the last weights; the first 10,000 test images. A row a run goes to
continuous_NAME.json; a second call makes the rows that are missing.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models import create_model

from gzoo.data import open_split
from gzoo.evaluate import evaluate
from gzoo.partial import report, subsets
from gzoo.train import machine, make_config, train


class Task(NamedTuple):
    """The runs on one data set."""

    title: str
    epochs: int
    changes: dict[str, Any]  # of the recipe
    runs: tuple[tuple[str, int, bool], ...]  # model, elements, partial


TASKS = {
    "rotmnist": Task(
        "gzoo data rotmnist",
        3,
        {"image_size": 14, "mean": (0.1307,), "std": (0.3081,)},
        (
            ("t2_resnet", 1, False),
            ("se2_resnet", 4, False),
            ("se2_resnet", 4, True),
            ("se2_resnet", 8, False),
            ("se2_resnet", 8, True),
            ("se2_resnet", 16, False),
            ("se2_resnet", 16, True),
            ("e2_resnet", 8, False),
            ("e2_resnet", 8, True),
            ("e2_resnet", 16, False),
            ("e2_resnet", 16, True),
        ),
    ),
    "cifar10": Task(
        "CIFAR-10 (JPEG)",
        1,
        {"image_size": 16, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)},
        (
            ("t2_resnet", 1, False),
            ("se2_resnet", 8, False),
            ("se2_resnet", 8, True),
            ("e2_resnet", 16, False),
            ("e2_resnet", 16, True),
            ("t2_cnn13", 1, False),
            ("se2_cnn13", 8, False),
            ("se2_cnn13", 8, True),
        ),
    ),
}
TITLES = {
    "t2_resnet": "T(2)",
    "se2_resnet": "SE(2)",
    "e2_resnet": "E(2)",
    "t2_cnn13": "T(2), 13 layers",
    "se2_cnn13": "SE(2), 13 layers",
}
RECIPE: dict[str, Any] = {
    "batch_size": 64,
    "optimizer": {"name": "adamw", "lr": 0.005, "weight_decay": 0.01},
    "schedule": {"name": "cosine", "warmup_epochs": 0.5, "warmup_lr": 5e-4, "min_lr": 0.0},
    "scale": (1.0, 1.0),
    "ratio": (1.0, 1.0),
    "hflip": 0.0,
    "val_fraction": 0.0,
}
TESTED = 10_000
HERE = Path(__file__).parent


def one_run(
    task: Task, name: str, elements: int, partial: bool, source: Path, seed: int, epochs: int, folder: Path
) -> dict[str, Any]:
    """Trains and tests; a row of the table."""
    channels = len(task.changes["mean"])
    model_args = {"elements": elements, "partial": partial, "width": 8, "in_chans": channels}
    if name.endswith("resnet"):
        model_args["kernel_size"] = 5
    run = {"model": name, "model_args": model_args, "data": str(source), "out": str(folder)}
    start = time.perf_counter()
    train(
        make_config(RECIPE | task.changes | run | {"seed": seed, "epochs": epochs}),
        resume=(folder / "checkpoint.pt").is_file(),
    )
    seconds = time.perf_counter() - start
    trained = create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    test = open_split(str(source), "test")
    if partial:
        print(report(trained), flush=True)
    return {
        **{"model": name, "elements": elements, "partial": partial, "seed": seed, "epochs": epochs},
        "parameters": sum(parameter.numel() for parameter in trained.parameters()),
        "accuracy": evaluate(trained, test.subset(range(TESTED)))["top1"],
        "theta": {path: arc.theta * 180 / torch.pi for path, arc in subsets(trained)},
        "mirror_probability": {path: arc.mirror_probability for path, arc in subsets(trained)},
        "seconds": seconds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Test accuracies in Markdown, a row for each group and number of elements."""
    lines = ["| group | elements | full | partial | training, each |", "|---|---|---|---|---|"]
    for name, title in TITLES.items():
        mine = [row for row in rows if row["model"] == name]
        for elements in sorted({row["elements"] for row in mine}):
            runs = {row["partial"]: row for row in mine if row["elements"] == elements}
            cells = [f"{runs[kind]['accuracy']:.2f}%" if kind in runs else "-" for kind in (False, True)]
            minutes = max(row["seconds"] for row in runs.values()) / 60
            lines.append(f"| {title} | {elements} | {' | '.join(cells)} | {minutes:.0f} min |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=TASKS)
    parser.add_argument("--data", type=Path, required=True, help="folder: parquet files, train and test")
    parser.add_argument("--out", type=Path, help="folder for the runs, default: runs/continuous_NAME")
    parser.add_argument("--epochs", type=int, help="default: as above")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    task, path = TASKS[args.name], HERE / f"continuous_{args.name}.json"
    out = args.out or Path("runs") / path.stem
    result: dict[str, Any] = {"data": task.title, "tested": TESTED, "machine": machine(torch.device("cpu"))}
    result["runs"] = []
    if path.is_file():
        result = json.loads(path.read_text())
    if {row["seed"] for row in result["runs"]} - {args.seed}:
        parser.error(f"{path} holds runs of another seed; move it away for runs of seed {args.seed}")
    for name, elements, partial in task.runs:
        if any((row["model"], row["elements"], row["partial"]) == (name, elements, partial) for row in result["runs"]):
            continue
        folder = out / f"{name}-{elements}{'-partial' if partial else ''}"
        epochs = args.epochs or task.epochs
        result["runs"].append(one_run(task, name, elements, partial, args.data, args.seed, epochs, folder))
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(result["runs"][-1]), flush=True)
    print(table(result["runs"]))


if __name__ == "__main__":
    main()
