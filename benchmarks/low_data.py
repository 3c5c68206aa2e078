"""Accuracy against the number of training images, equivariant and plain.

    uv run python benchmarks/low_data.py rotmnist --data data/rotmnist
    uv run python benchmarks/low_data.py cifar10 --data ../shared/data/cifar10

Every run follows a recipe of a bundled weight, shortened, without a validation split: the last weights are tested. A
run with a share of the images sees each of them the more often, so that all runs take the same number of steps. A row a
run goes to low_data_NAME.csv; a second call makes the rows that are missing, and the plot.
"""

import argparse
import csv
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from timm.models import create_model

from gzoo.data import open_split
from gzoo.evaluate import evaluate
from gzoo.train import make_config, read_recipe, train

SHARES = (0.01, 0.05, 0.1, 0.5)


class Series(NamedTuple):
    """The runs on one data set."""

    title: str
    recipe: str
    epochs: int  # in images of the whole set
    runs: dict[str, dict[str, Any]]  # title: changes of the recipe


# He's width, a quarter of the cost, and few pixels: the runs take an hour on a CPU core.
_SMALL = {
    "grown_from": None,
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True},
    "model_args": {"base_width": 16},
    "image_sizes": None,
    "image_size": 16,
    "augment_batches": True,
    "bf16": False,
}
SERIES = {
    "rotmnist": Series(
        "rotated MNIST",
        "p4_cnn7.rotmnist",
        15,
        {
            "p4_cnn7": {"model": "p4_cnn7"},
            "p4_cnn7, rotated copies": {"model": "p4_cnn7", "rotate": 180.0},
            "cnn7": {"model": "cnn7"},
            "cnn7, rotated copies": {"model": "cnn7", "rotate": 180.0},
        },
    ),
    "cifar10": Series(
        "CIFAR-10 (JPEG), 16x16",
        "p4m_resnet44.cifar10",
        2,
        {
            "p4m_resnet20, shifted copies": {"model": "p4m_resnet20"} | _SMALL,
            "resnet20, shifted copies": {"model": "resnet20"} | _SMALL,
            "resnet20, shifted and flipped copies": {"model": "resnet20", "hflip": 0.5} | _SMALL,
        },
    ),
}
COLUMNS = ("run", "share", "images", "seed", "epochs", "test_error")
HERE = Path(__file__).parent


def reduced(source: Path, share: float, seed: int, out: Path) -> int:
    """Writes ``share`` of each class of the training images, repeated to as many as there were; their own number."""
    files = sorted(map(str, source.glob("train*.parquet")))
    table = datasets.load_dataset("parquet", data_files=files, split="train")
    table = table.cast_column("image", datasets.Image(decode=False))
    labels, rng = np.asarray(table["label"]), np.random.default_rng(seed)
    chosen: list[int] = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen += members[: round(share * len(members))].tolist()
    out.mkdir(parents=True, exist_ok=True)
    repeated = np.resize(rng.permutation(chosen), len(table))
    table.select(repeated).cast_column("image", datasets.Image()).to_parquet(str(out / "train.parquet"))
    return len(chosen)


def one_run(
    series: Series, title: str, share: float, source: Path, seed: int, epochs: int, out: Path
) -> dict[str, object]:
    """Trains and tests; a row of the table."""
    folder = out / f"{title.replace(', ', '-').replace(' ', '-')}.{share:g}"
    data = folder.with_name(f"{folder.name}-data")
    images = reduced(source, share, seed, data)
    recipe = read_recipe(str(HERE.parent / "recipes" / f"{series.recipe}.yaml"))
    schedule = recipe["schedule"] | {"warmup_epochs": epochs / 6}
    changes = series.runs[title] | {"seed": seed, "epochs": epochs, "schedule": schedule}
    config = make_config(recipe | changes | {"data": str(data), "out": str(folder), "val_fraction": 0})
    train(config, resume=(folder / "checkpoint.pt").is_file())
    trained = create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    tested = evaluate(trained, open_split(str(source), "test"))
    row = (title, share, images, seed, epochs, round(100 - tested["top1"], 3))
    return dict(zip(COLUMNS, row, strict=True))


def read(path: Path) -> list[dict[str, str]]:
    """The rows that were made before; none without a file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def add(rows: list[dict[str, str]], found: dict[str, object], path: Path) -> None:
    """Adds a row to ``rows`` and writes all of them."""
    rows.append({key: str(value) for key, value in found.items()})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(found, flush=True)


def plot(rows: list[dict[str, str]], title: str, path: Path) -> None:
    """Test error over training images, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure((6, 4), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="training images", ylabel="test error, %", title=title)
    for run in _runs(rows):
        points = sorted((int(row["images"]), float(row["test_error"])) for row in rows if row["run"] == run)
        axes.plot(*zip(*points, strict=True), marker="o", label=run)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def table(rows: list[dict[str, str]]) -> str:
    """Test errors in Markdown, a row for each number of images."""
    runs = _runs(rows)
    lines = [f"| training images | {' | '.join(runs)} |", "|---" * (len(runs) + 1) + "|"]
    for images in sorted({int(row["images"]) for row in rows}):
        found = {row["run"]: float(row["test_error"]) for row in rows if int(row["images"]) == images}
        lines.append(f"| {images:,} | {' | '.join(f'{found[run]:.1f}%' for run in runs)} |")
    return "\n".join(lines)


def _runs(rows: list[dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(row["run"] for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("series", choices=SERIES, help="the data set")
    parser.add_argument("--data", type=Path, required=True, help="folder of it: train*.parquet and test*.parquet")
    parser.add_argument("--out", type=Path, default=Path("runs/low_data"), help="folder for the runs")
    parser.add_argument("--csv", type=Path, help="table of the results, default: beside this file")
    parser.add_argument("--epochs", type=int, help="in images of the whole set")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    series = SERIES[args.series]
    path = args.csv or HERE / f"low_data_{args.series}.csv"
    rows = read(path)
    if {int(row["seed"]) for row in rows} - {args.seed}:
        parser.error(f"{path} holds runs of another seed; give another --csv")
    for share in SHARES:
        for title in series.runs:
            if any(row["run"] == title and float(row["share"]) == share for row in rows):
                continue
            add(rows, one_run(series, title, share, args.data, args.seed, args.epochs or series.epochs, args.out), path)
    plot(rows, series.title, path.with_suffix(".png"))
    print(table(rows))


if __name__ == "__main__":
    main()
