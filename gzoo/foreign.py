"""Checkpoints of other libraries: read without running code in them, and written as folders of ours.

Those that have published ImageNet weights of equivariant networks, `gzoo.equivision` and `gzoo.redet`, both took
torchvision's ResNet, which timm has as well, in their own widths.
"""

from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models._hub import save_for_hf
from torch import Tensor, nn

from gzoo.bases import BasisName
from gzoo.convert import convert_in_place
from gzoo.equivariant import Equivariant
from gzoo.groups import Group
from gzoo.interop import Strides
from gzoo.nn import keep_original_strides
from gzoo.nn.linear import Pooling
from gzoo.nn.resample import require_strides
from gzoo.plan import Fit

# Of both: 256 pixels on the short side, the central 224 of them, bilinear interpolation.
PREPROCESSING = {
    "input_size": (3, 224, 224),
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "test_input_size": None,
    "test_crop_pct": None,
}

# Blocks of each stage, by depth; 18 has basic blocks, the others bottlenecks.
BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def resnet(
    depth: int,
    group: Group,
    fields: int,
    basis: BasisName,
    group_pool: Pooling,
    architecture: str,
    tag: str,
    strides: Strides,
    **kwargs: Any,
) -> nn.Module:
    """timm's ResNet of gzoo's layers, in the widths of another library, with random weights.

    Args:
        depth: a key of `BLOCKS`.
        group: any point group.
        fields: regular fields of the stem; the other widths keep their ratio to it.
        basis: of the kernels.
        group_pool: how the classifier pools a fibre.
        architecture: the name of the entry.
        tag: which weights of that entry are meant.
        strides: "symmetric" for gzoo's exact strides; "original" for torch's own, which the checkpoints were trained
            with: equivariant only where each window fits, at 32 n + 1 pixels.
        **kwargs: of timm's ResNet.
    """
    require_strides(strides)
    plain: Any = timm.create_model(f"resnet{depth}", **kwargs)
    noted = plain._model_args
    widths = {64 * 2**i: fields * 2**i for i in range(6) if 64 * 2**i <= plain.num_features}
    model: Any = convert_in_place(plain, group, widths=widths, group_pool=group_pool, basis=basis, fitted=Fit(1.0))
    model._model_args = noted  # without those of the conversion, which are no options of these entries
    config = model.pretrained_cfg
    model.pretrained_cfg = model.default_cfg = config | {"architecture": architecture, "tag": tag} | PREPROCESSING
    return keep_original_strides(model) if strides == "original" else model


def read(path: Path, where: str) -> dict[str, Tensor]:
    """The state_dict in a file of ``torch.save`` or safetensors, alone or as "state_dict" beside other things.

    Args:
        path: the file. No code in it is run.
        where: what to do for lack of it, for the error message.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, or holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {where}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises what the zip reader, the unpickler or the tensor reader raise
        raise ValueError(
            f"{path}: the file is truncated or corrupt, or holds more than tensors ({type(error).__name__}); download "
            "it again, or, if you trust it, save the state_dict in it alone: "
            "torch.save(torch.load(file, weights_only=False)['state_dict'], new_file)"
        ) from error
    if isinstance(state, dict) and "state_dict" in state:
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds a {type(state).__name__}, no state_dict; {where}")
    return state


def write(model: nn.Module, out: str | Path, strides: Strides) -> None:
    """Writes a folder with model.safetensors and config.json, as training writes it.

    Args:
        model: from `resnet`, with its weights.
        out: the folder.
        strides: those of ``model``.
    """
    assert isinstance(model, Equivariant)
    config: Any = model.pretrained_cfg
    save_for_hf(
        model,
        str(out),
        model_config={"pretrained_cfg": {"tag": config["tag"]}, "gzoo": {"group": model.group_name}},
        model_args={"strides": strides} if strides == "original" else {},
        safe_serialization=True,
    )
