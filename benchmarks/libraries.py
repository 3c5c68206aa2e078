"""Which networks of torchvision, segmentation_models_pytorch, MONAI and nnU-Net convert, and how exactly.

    uv run --with segmentation-models-pytorch --with monai --with dynamic-network-architectures \\
        python benchmarks/libraries.py

Each is converted over p4m with random weights and checked in float64 on an image of 64x96 pixels, a multiple of what
most of them reduce by, or of another size that it needs. A row a network goes to libraries.csv.
"""

import argparse
import csv
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from gzoo import convert
from gzoo.check import check

SMP, MONAI = "segmentation_models_pytorch", "monai.networks.nets"
TORCHVISION, SEGMENTATION = "torchvision.models", "torchvision.models.segmentation"
PLAIN, BARE = {"init_weights": False}, {"weights": None, "weights_backbone": None}
IN_TWO = {"spatial_dims": 2, "in_channels": 3, "out_channels": 2}
STRIDED = IN_TWO | {"channels": (16, 32, 64), "strides": (2, 2)}
SQUARE = {"in_shape": (3, 64, 64), "classes": 4, "channels": (16, 32, 64), "strides": (2, 2, 2)}
NNUNET = "dynamic_network_architectures.architectures.unet"
PLANNED: dict[str, Any] = {  # as nnU-Net plans them for small images
    "input_channels": 3,
    "n_stages": 4,
    "features_per_stage": (32, 64, 128, 256),
    "conv_op": nn.Conv2d,
    "kernel_sizes": 3,
    "strides": (1, 2, 2, 2),
    "num_classes": 2,
    "conv_bias": True,
    "norm_op": nn.InstanceNorm2d,
    "norm_op_kwargs": {"affine": True},
    "nonlin": nn.LeakyReLU,
}
PLAIN_UNET = PLANNED | {"n_conv_per_stage": 2, "n_conv_per_stage_decoder": 2}
USUAL, LARGE = (64, 96), (128, 160)
NETWORKS: list[tuple[str, str, dict[str, Any], tuple[int, int]]] = [
    *((TORCHVISION, name, {}, USUAL) for name in ("alexnet", "squeezenet1_1", "shufflenet_v2_x1_0", "mnasnet1_0")),
    (TORCHVISION, "googlenet", PLAIN, LARGE),
    (TORCHVISION, "inception_v3", PLAIN | {"aux_logits": False}, LARGE),  # its auxiliary head takes 299 pixels alone
    *((TORCHVISION, name, {}, USUAL) for name in ("mobilenet_v3_large", "regnet_y_400mf", "efficientnet_b0")),
    *((SEGMENTATION, name, BARE, USUAL) for name in ("fcn_resnet50", "lraspp_mobilenet_v3_large")),
    *((SMP, name, {}, USUAL) for name in ("Unet", "UnetPlusPlus", "Linknet", "FPN", "PSPNet")),
    *((SMP, name, {}, USUAL) for name in ("DeepLabV3", "DeepLabV3Plus", "UPerNet", "Segformer", "MAnet")),
    *((SMP, "Unet", {"encoder_name": name}, USUAL) for name in ("mobilenet_v2", "densenet121", "tu-convnext_atto")),
    (MONAI, "UNet", STRIDED, USUAL),
    (MONAI, "UNet", STRIDED | {"num_res_units": 2}, USUAL),
    (MONAI, "AttentionUnet", STRIDED, USUAL),
    (
        MONAI,
        "DynUNet",
        IN_TWO | {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]},
        USUAL,
    ),
    *((MONAI, name, IN_TWO, USUAL) for name in ("SegResNet", "SegResNetDS", "BasicUNet", "HighResNet", "DenseNet121")),
    (MONAI, "FlexibleUNet", IN_TWO | {"backbone": "resnet18"}, USUAL),
    (MONAI, "SEResNet50", {"spatial_dims": 2, "in_channels": 3, "num_classes": 2}, USUAL),
    (MONAI, "Classifier", SQUARE, (64, 64)),
    *((NNUNET, "PlainConvUNet", PLAIN_UNET | {"deep_supervision": deep}, USUAL) for deep in (False, True)),
    (NNUNET, "ResidualEncoderUNet", PLANNED | {"n_blocks_per_stage": 2, "n_conv_per_stage_decoder": 1}, USUAL),
]
COLUMNS = ("library", "version", "network", "options", "parameters", "equivariant", "error", "reason")
SHOWN = ("encoder_name", "num_res_units", "aux_logits", "deep_supervision")
SHORT = {"segmentation_models_pytorch": "smp", "dynamic_network_architectures": "nnU-Net"}
HERE = Path(__file__).parent


def one_network(library: str, name: str, options: dict[str, Any], size: tuple[int, int]) -> dict[str, object]:
    """Converts, and checks at a size in pixels; a row of the table."""
    version = importlib.metadata.version(library.partition(".")[0])
    make: Callable[..., nn.Module] = getattr(importlib.import_module(library), name)
    plain = make(**{"encoder_name": "resnet18", "encoder_weights": None} | options if library == SMP else options)
    row: dict[str, object] = dict.fromkeys(COLUMNS, "")
    row |= {"library": library.partition(".")[0], "version": version, "network": name, "parameters": count(plain)}
    row["options"] = ", ".join(f"{key}={value!r}" for key, value in options.items() if key in SHOWN)
    try:
        model = convert(plain, "p4m").eval()
    except ValueError as error:
        return row | {"reason": str(error)}
    return row | {"equivariant": count(model), "error": f"{check(model, size).worst:.0e}"}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def table(rows: list[dict[str, str]]) -> str:
    """In Markdown: what converts, with its error; what does not is named with its reason in the file."""
    lines = ["| network | parameters, plain and over p4m | error in float64 |", "|---|---|---|"]
    for row in rows:
        name = f"{SHORT.get(row['library'], row['library'])}: {row['network']}"
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
