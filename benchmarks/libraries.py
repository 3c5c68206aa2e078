"""Which networks of segmentation_models_pytorch and MONAI convert, and how exactly their maps follow the image.

    uv run --with segmentation-models-pytorch --with monai python benchmarks/libraries.py

Each is converted over p4m with random weights and checked in float64 on an image of 64x96 pixels, a multiple of what
all of them reduce by. A row a network goes to libraries.csv.
"""

import argparse
import csv
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from gzoo import convert
from gzoo.check import check

SMP, MONAI = "segmentation_models_pytorch", "monai.networks.nets"
BILINEAR = {"decoder_interpolation": "bilinear"}
IN_TWO = {"spatial_dims": 2, "in_channels": 3, "out_channels": 2}
STRIDED = IN_TWO | {"channels": (16, 32, 64), "strides": (2, 2)}
NETWORKS: list[tuple[str, str, dict[str, Any]]] = [
    *((SMP, name, BILINEAR) for name in ("Unet", "UnetPlusPlus")),
    *((SMP, name, {}) for name in ("Linknet", "FPN", "DeepLabV3", "DeepLabV3Plus", "UPerNet", "Segformer")),
    *((SMP, name, {}) for name in ("Unet", "MAnet", "PSPNet")),
    *((SMP, "Unet", BILINEAR | {"encoder_name": name}) for name in ("mobilenet_v2", "densenet121", "tu-convnext_atto")),
    (MONAI, "UNet", STRIDED),
    (MONAI, "UNet", STRIDED | {"num_res_units": 2}),
    (MONAI, "AttentionUnet", STRIDED),
    (MONAI, "DynUNet", IN_TWO | {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}),
    (MONAI, "SegResNet", IN_TWO),
    (MONAI, "BasicUNet", IN_TWO),
    (MONAI, "DenseNet121", IN_TWO),
    (MONAI, "SEResNet50", {"spatial_dims": 2, "in_channels": 3, "num_classes": 2}),
]
COLUMNS = ("library", "version", "network", "options", "parameters", "equivariant", "error", "reason")
SHOWN = ("decoder_interpolation", "encoder_name", "num_res_units")
HERE = Path(__file__).parent


def one_network(library: str, name: str, options: dict[str, Any]) -> dict[str, object]:
    """Converts and checks; a row of the table."""
    version = importlib.import_module(library.partition(".")[0]).__version__
    make: Callable[..., nn.Module] = getattr(importlib.import_module(library), name)
    plain = make(**{"encoder_name": "resnet18", "encoder_weights": None} | options if library == SMP else options)
    row: dict[str, object] = dict.fromkeys(COLUMNS, "")
    row |= {"library": library.partition(".")[0], "version": version, "network": name, "parameters": count(plain)}
    row["options"] = ", ".join(f"{key}={value!r}" for key, value in options.items() if key in SHOWN)
    try:
        model = convert(plain, "p4m").eval()
    except ValueError as error:
        return row | {"reason": str(error)}
    return row | {"equivariant": count(model), "error": f"{check(model, (64, 96)).worst:.0e}"}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def table(rows: list[dict[str, str]]) -> str:
    """In Markdown: what converts, with its error; what does not is named with its reason in the file."""
    lines = ["| network | parameters, plain and over p4m | error in float64 |", "|---|---|---|"]
    for row in rows:
        name = f"{row['library'].replace('segmentation_models_pytorch', 'smp')}: {row['network']}"
        options = f", `{row['options']}`" if row["options"] else ""
        sizes = [f"{int(row[key]) / 1e3:,.0f}k" for key in ("parameters", "equivariant") if row[key]]
        lines.append(f"| {name}{options} | {', '.join(sizes)} | {row['error'] or 'does not convert'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=HERE / "libraries.csv")
    arguments = parser.parse_args()
    rows = [one_network(*network) for network in NETWORKS]
    with arguments.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(table([{key: str(value) for key, value in row.items()} for row in rows]))


if __name__ == "__main__":
    main()
