"""What pretrained weights are worth on other images: steel surfaces (NEU), from weights that learned CIFAR-10 (JPEG).

    uv run python benchmarks/fine_tune.py --data ../shared/data/neu_surface

p4m_resnet44 by the recipe of p4m_resnet20.neu_surface, shortened: from random weights, from pretrained ones with all
layers trained or with lower rates for lower layers, and with the classifier alone. No rate was tuned. A row a run goes
to fine_tune.csv; a second call makes the rows that are missing.
"""

import argparse
from pathlib import Path
from typing import Any

from low_data import add, read
from timm.models import create_model

from gzoo.check import check
from gzoo.data import open_split
from gzoo.evaluate import evaluate
from gzoo.train import make_config, read_recipe, train

MODEL = "p4m_resnet44"
RUNS: dict[str, dict[str, Any]] = {  # title: what differs from the recipe
    "random weights": {},
    "pretrained": {"pretrained": True},
    "pretrained, `layer_decay: 0.8`": {"pretrained": True, "layer_decay": 0.8},
    "pretrained, `freeze_backbone: true`": {"pretrained": True, "freeze_backbone": True},
}
COLUMNS = ("start", "epochs", "seed", "test_accuracy", "turned_and_flipped", "equivariance_error", "seconds")
HERE = Path(__file__).parent


def one_run(title: str, data: str, epochs: int, out: Path) -> dict[str, object]:
    """Trains and tests; a row of the table."""
    recipe = read_recipe(str(HERE.parent / "recipes" / "p4m_resnet20.neu_surface.yaml"))
    folder = out / str(list(RUNS).index(title))
    changes = {"model": MODEL, "data": data, "out": str(folder), "epochs": epochs} | RUNS[title]
    trained = train(make_config(recipe | changes), resume=(folder / "checkpoint.pt").is_file())
    model = create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    tested = evaluate(model, open_split(data, "test"), bf16=True, transforms=True)
    accuracies = (round(tested[key], 2) for key in ("top1", "transforms_mean"))
    error = f"{check(model, 33).worst:.0e}"
    return dict(zip(COLUMNS, (title, epochs, recipe["seed"], *accuracies, error, trained["seconds"]), strict=True))


def table(rows: list[dict[str, str]]) -> str:
    """Accuracies in Markdown."""
    lines = ["| start | test accuracy, upright | mean of the eight turns and flips | training |", "|---|---|---|---|"]
    for row in rows:
        upright, turned = (f"{float(row[key]):.1f}%" for key in ("test_accuracy", "turned_and_flipped"))
        lines.append(f"| {row['start']} | {upright} | {turned} | {float(row['seconds']) / 60:.0f} min |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the NEU images, a folder of parquet files")
    parser.add_argument("--out", type=Path, default=Path("runs/fine_tune"), help="folder for the runs")
    parser.add_argument("--csv", type=Path, default=HERE / "fine_tune.csv")
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()
    rows = read(args.csv)
    if {int(row["epochs"]) for row in rows} - {args.epochs}:
        parser.error(f"{args.csv} holds runs of another number of epochs; give another --csv")
    for title in RUNS:
        if all(row["start"] != title for row in rows):
            add(rows, one_run(title, args.data, args.epochs, args.out), args.csv)
    print(table(rows))


if __name__ == "__main__":
    main()
