"""How well timm's networks follow turns by 45 degrees over c8: with gzoo's strides, and with escnn's.

    uv run python benchmarks/turns.py

Each network is converted once and drawn anew for 25 seeds. Its logits of a band-limited image in a disc, and of the
image turned by 45 degrees, differ by the error: the norm of the difference over that of the logits, in float32, with
the norm statistics of the upright image. "escnn" is the same network with the strides of plain torch, as a network of
escnn's modules has them; at odd sizes where all windows fit, the two are one. Draws differ much, so the two are
compared draw by draw: the share is the geometric mean of the quotients. A row for each network and size goes to
turns.csv; a second call makes those that are missing.
"""

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import timm
import torch
from low_data import add, read
from scipy import ndimage
from torch import Tensor, nn

from gzoo.convert import calibrate, convert_in_place
from gzoo.nn import keep_original_strides

CSV = Path(__file__).parent / "turns.csv"
SIZES = (64, 96, 128)
SEEDS = 25
NETWORKS = (
    *("resnet18", "resnet18d", "resnet26", "resnetv2_18", "regnetx_002", "dla46_c", "mobilenetv2_050"),
    *("efficientnet_lite0", "convnext_atto", "densenet121"),
)


def image(size: int, seed: int) -> Tensor:
    """Colours without frequencies above 0.1 per pixel, in a disc: upright and turned, float64, (2, 3, size, size)."""
    rng, frequency = np.random.default_rng(seed), np.fft.fftfreq(size)
    spectrum = np.fft.fft2(rng.standard_normal((3, size, size)))
    colours = np.fft.ifft2(spectrum * (np.hypot(frequency, frequency[:, None]) < 0.1)).real
    distance = np.hypot(*(np.mgrid[:size, :size] - (size - 1) / 2)) / (size / 2)
    upright = colours / colours.std() * np.clip((0.95 - distance) / 0.35, 0, 1)
    turned = ndimage.rotate(upright, 45, axes=(1, 2), reshape=False, order=5)
    return torch.from_numpy(np.stack([upright, turned]))


def draw(model: nn.Module, seed: int) -> None:
    """All weights anew; scales, which in timm's residual branches start at 0, about 1."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.std().item())
        elif name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)


@torch.no_grad()
def error(model: nn.Module, x: Tensor) -> float:
    calibrate(model, x[:1])
    upright, turned = model(x)
    return ((upright - turned).norm() / upright.norm()).item()


def one_row(name: str, model: nn.Module, size: int) -> dict[str, object]:
    """Means over the seeds, the share of gzoo's in escnn's, and the standard error of its logarithm."""
    start = time.perf_counter()
    theirs = keep_original_strides(copy.deepcopy(model))
    found = []
    for seed in range(SEEDS):
        for network in (model, theirs):
            draw(network, seed)
        found.append([error(network, image(size, seed).float()) for network in (model, theirs)])
    quotients = np.log(found) @ (1, -1)
    numbers = {
        **dict(zip(("gzoo", "escnn"), np.mean(found, 0), strict=True)),
        "share": np.exp(quotients.mean()),
        "+-": quotients.std(ddof=1) / SEEDS**0.5,
    }
    row = {"network": name, "size": size} | {key: f"{value:.4f}" for key, value in numbers.items()}
    return row | {"seconds": round(time.perf_counter() - start)}


def table(rows: list[dict[str, str]]) -> str:
    """Markdown: for each size gzoo's share of the error with escnn's strides, ± its standard error."""
    lines = ["| pixels | geometric mean | lowest | highest |", "|---|---|---|---|"]
    for size in SIZES:
        shares = sorted(
            (float(row["share"]), float(row["+-"]), row["network"]) for row in rows if row["size"] == str(size)
        )
        mean = np.exp(np.mean([np.log(share) for share, *_ in shares]))
        low, high = (
            f"{share:.2f} ± {spread * share:.2f} (`{name}`)" for share, spread, name in (shares[0], shares[-1])
        )
        lines.append(f"| {size} | {mean:.2f} | {low} | {high} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=CSV)
    args = parser.parse_args()
    rows = read(args.csv)
    for name in NETWORKS:
        missing = [s for s in SIZES if not any((row["network"], row["size"]) == (name, str(s)) for row in rows)]
        if missing:
            torch.manual_seed(0)
            model = convert_in_place(timm.create_model(name), "c8").eval()
            for size in missing:
                add(rows, one_row(name, model, size), args.csv)
    print(table(rows))


if __name__ == "__main__":
    main()
