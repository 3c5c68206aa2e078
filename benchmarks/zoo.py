"""How exact the whole zoo is: every registered equivariant model, every element, two sizes, float64 and float32.

    uv run python benchmarks/zoo.py

The sizes are 33 x 48 and 31 x 64 pixels; 65 x 96 and 63 x 128, or 129 x 192 and 127 x 256, where a network takes no
smaller image. In float32 each model is as `create_model` makes it. In float64 all that starts constant is random, and
batch norms have the statistics of four images of the size. A row a model goes to zoo.csv; a second call makes those
that are missing.
"""

import argparse
import time
from pathlib import Path

import timm
import torch
from low_data import add, read
from torch import nn

from gzoo import registry
from gzoo.check import check, in_channels
from gzoo.convert import calibrate, randomized

HERE = Path(__file__).parent
BARS = {"float64": 1e-12, "float32": 1e-5}


def names() -> list[str]:
    """The registered models that are equivariant."""
    plain = {entry.name for entry in registry.ENTRIES if entry.group is None}
    return sorted(set(timm.list_models(module="registry")) - plain)


def worst_errors(model: nn.Module, scale: int) -> dict[str, float]:
    """The largest equivariance error of any stage, element and size, by the name of the dtype."""
    probe, _ = randomized(model)
    worst = dict.fromkeys(BARS, 0.0)
    for size in ((32 * scale + 1, 48 * scale), (32 * scale - 1, 64 * scale)):
        calibrate(probe, torch.randn(2, in_channels(probe), *size, dtype=torch.float64))
        worst["float64"] = max(worst["float64"], check(probe, size).worst)
        worst["float32"] = max(worst["float32"], check(model, size, dtype=torch.float32).worst)
    return worst


def one_row(name: str) -> dict[str, object]:
    """A model's errors at the smallest sizes that it takes."""
    start = time.perf_counter()
    torch.manual_seed(0)
    model = timm.create_model(name)
    for scale in (1, 2, 4):
        try:
            worst = worst_errors(model, scale)
            break
        except (RuntimeError, ValueError):  # the image is too small
            if scale == 4:
                raise
    errors = {dtype: f"{error:.0e}" for dtype, error in worst.items()}
    return {"model": name, "scale": scale, **errors, "seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=HERE / "zoo.csv")
    args = parser.parse_args()
    rows = read(args.csv)
    done = {row["model"] for row in rows}
    for name in names():
        if name not in done:
            add(rows, one_row(name), args.csv)
    for dtype, bar in BARS.items():
        errors = {row["model"]: float(row[dtype]) for row in rows}
        above = [name for name, error in errors.items() if error > bar]
        print(f"{dtype}: at most {max(errors.values()):.0e}; above {bar:g}: {', '.join(above) or 'none'}")


if __name__ == "__main__":
    main()
