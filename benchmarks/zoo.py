"""How exact the whole zoo is: every registered equivariant model, every element, float64 and float32.

    uv run python benchmarks/zoo.py

The image has 33 x 48 pixels: an odd side, a power of two plus one, an even side, and no square. Where a network takes
no smaller image it has 65 x 96 or 129 x 192, and where its plain twin takes multiples of 32 only, 64 x 96. In float32
each model is as `create_model` makes it; over continuous groups with the statistics of images, too. In float64 all that
starts constant is random, and batch norms have the statistics of eight images. A row a model goes to zoo.csv; a second
call makes those that are missing.
"""

import argparse
import copy
from pathlib import Path

import timm
import torch
from low_data import add, read

from gzoo import registry
from gzoo.check import check, in_channels
from gzoo.convert import calibrate, randomized
from gzoo.nn.continuous import Arc

HERE = Path(__file__).parent
SIZES = ((33, 48), (65, 96), (129, 192), (64, 96))
BARS = {"float64": 1e-12, "float32": 1e-5}


def names() -> list[str]:
    """The registered models that are equivariant."""
    plain = {entry.name for entry in registry.ENTRIES if entry.group is None}
    return sorted(set(timm.list_models(module="registry")) - plain)


def one_row(name: str) -> dict[str, object]:
    """A model's largest error, of any stage and element, at the smallest size that it takes."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    probe, _ = randomized(model)
    for path, module in model.named_modules():
        if isinstance(module, Arc):  # its one number says how much of the group it keeps: all of it
            probe.set_submodule(path, copy.deepcopy(module).double().eval())
    for size in SIZES:
        try:
            calibrate(probe, torch.randn(4, in_channels(probe), *size, dtype=torch.float64))
            break
        except (RuntimeError, ValueError):
            if size == SIZES[-1]:
                raise
    if any(isinstance(module, Arc) for module in model.modules()):  # the image fades away in their depth
        calibrate(model.eval(), torch.randn(4, in_channels(probe), *size))
    errors = {
        "float64": check(probe, size).worst,
        "float32": check(model, size, dtype=torch.float32).worst,
    }
    row = {dtype: f"{error:.0e}" for dtype, error in errors.items()}
    return {"model": name, "size": "x".join(map(str, size)), **row}


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
