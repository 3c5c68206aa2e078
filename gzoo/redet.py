"""ReResNets of ReDet and mmrotate: their checkpoints, made with e2cnn, become timm ResNets of gzoo.

Source: Han et al. 2021, arXiv:2103.07733; https://github.com/csuhan/ReDet, its branch ReDet_mmcls for the ImageNet
classifiers and `mmdet/models/backbones/re_resnet.py` for the detectors; `mmrotate/models/backbones/re_resnet.py`. It is
torchvision's ResNet-50 or 101 with an eighth of the channels as regular fields of C8, inner batch norm, and the band
limit of the basis "steerable_3r". What ReDet publishes is on a web drive, and the user's to fetch.

A file may be of the classifier, of the backbone alone or of a whole detector, of which the backbone is taken. What is
read are filters, so nothing rests on the order of e2cnn's coefficients; those of another order of the elements, or of
turns in the other direction, would not fit and are refused. Of the convolution ``layer1.0.conv2`` the filter is
``layer1.0.conv2.filter``, which e2cnn keeps in eval mode only; or ``.weights`` times the sampled basis below
``._basisexpansion``, which stands in files of training, too; or ``.weight``, in what ReDet's `convert_*_to_torch.py`
exported. That these are the keys is taken from the code of both and from a list of them in ReDet's issue 33, not from a
file.

One thing is not the original's: its classifier is a linear map of all 2048 channels, so its logits change when the
image is turned. Here it gets their mean over the fibre, which gives the mean of the original's logits over the eight
elements acting on its last features; features are the original's.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gzoo import foreign, groups
from gzoo.interop import Strides, fit
from gzoo.nn import FibreNorm, GroupConv2d, LiftingConv2d

TAG = "redet"
DEPTHS = (50, 101)
FIELDS = 8  # of the stem, 64 channels

_BACKBONE = re.compile(r"(backbone\.)?((conv1|bn1|layer\d\.\d+)\..+)")
_ORDER = 8


def name(depth: int) -> str:
    """The name of the entry without its tag."""
    return f"c8_resnet{depth}"


def create(depth: int, strides: Strides = "symmetric", **kwargs: Any) -> nn.Module:
    """timm's ResNet of gzoo's layers as a ReResNet over C8, with random weights.

    Args:
        depth: 50 or 101.
        strides: as in `gzoo.foreign.resnet`.
        **kwargs: of timm's ResNet.
    """
    return foreign.resnet(depth, groups.get("c8"), FIELDS, "steerable_3r", "mean", name(depth), TAG, strides, **kwargs)


def import_checkpoint(path: str | Path, out: str | Path, strides: Strides = "symmetric") -> nn.Module:
    """Turns a checkpoint of ReDet or mmrotate into a folder with model.safetensors and config.json.

    Args:
        path: the file, of ``torch.save`` or safetensors. No code in it is run.
        out: the folder.
        strides: as in `create`. The weights are the same.

    Returns:
        The network in eval mode, without a classifier if the file has none. Its feature maps equal the original's at
        every image size with "original" strides, and at 32 n + 1 pixels with symmetric ones.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, of another network, or has no filters in this basis.
    """
    path = Path(path)
    state = foreign.read(path, "fetch a checkpoint of ReResNet-50 or 101, of ReDet or of mmrotate")
    try:
        model = _filled(state, strides)
    except ValueError as error:
        raise ValueError(f"{path} is no checkpoint of a ReResNet over C8: {error}") from error
    foreign.write(model, out, strides)
    return model


def _filled(state: dict[str, Tensor], strides: Strides) -> nn.Module:
    backbone = {match[2]: value for key, value in state.items() if (match := _BACKBONE.fullmatch(key))}
    head = state.get("head.fc.weight")
    model: Any = create(_depth(backbone), strides, num_classes=0 if head is None else len(head)).eval()
    own, paths = model.state_dict(), []
    for path, module in model.named_modules():
        if isinstance(module, LiftingConv2d | GroupConv2d):
            found = _filter(backbone, path, module.out_fields)
            filters = _require_shape(f"the filter of {path}", found, module.filter())
            fit(path, module, filters, "they are not of frequencies up to 3r on the ring of radius r, turned by C8")
        elif isinstance(module, FibreNorm):
            own |= {f"{path}.norm.{key}": value for key, value in _norm(backbone, path).items()}
        else:
            continue
        paths.append(f"{path}.")
    stray = [key for key in backbone if not key.startswith(tuple(paths))]
    if stray:
        raise ValueError(f"{stray[0]} is not in a ReResNet-{_depth(backbone)}")
    if head is not None:
        fibres = _require_shape("head.fc.weight", head, torch.empty(len(head), model.num_features)).unflatten(
            1, (-1, _ORDER)
        )
        own |= {"fc.weight": fibres.sum(2), "fc.bias": _get(state, "head.fc.bias")}
    model.load_state_dict(own)
    return model


def _depth(backbone: dict[str, Tensor]) -> int:
    found = {tuple(key.split(".")[:2]) for key in backbone if key.startswith("layer")}
    blocks = tuple(sum(stage == f"layer{i}" for stage, _ in found) for i in range(1, 5))
    depth = next((depth for depth in DEPTHS if foreign.BLOCKS[depth] == blocks), None)
    if depth is None:
        accepted = " or ".join(f"{foreign.BLOCKS[depth]} of ReResNet-{depth}" for depth in DEPTHS)
        raise ValueError(f"its stages layer1 to layer4 have {blocks} blocks, not {accepted}")
    return depth


def _get(state: dict[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise ValueError(f"{key} is missing")
    return state[key]


def _require_shape(what: str, found: Tensor, expected: Tensor) -> Tensor:
    if found.shape != expected.shape:
        raise ValueError(f"{what} is {tuple(found.shape)}, not {tuple(expected.shape)}")
    return found.to(expected)


def _filter(state: dict[str, Tensor], path: str, out_fields: int) -> Tensor:
    """The expanded filter of a convolution, (channels out, channels in, k, k)."""
    for key in (f"{path}.filter", f"{path}.weight"):
        if key in state:
            return state[key]
    bases = [value for key, value in state.items() if re.fullmatch(rf"{path}\._basisexpansion\..+\.sampled_basis", key)]
    if not bases:
        raise ValueError(
            f"{path} has neither a filter nor coefficients with their basis; load the file into the network that it is "
            "of, and save that in eval mode: torch.save(model.eval().state_dict(), new_file)"
        )
    basis, weights = bases[0], _get(state, f"{path}.weights")  # (functions, |G|, |G| or 1, k * k)
    if weights.numel() % (out_fields * len(basis)):
        raise ValueError(f"{path}.weights has {weights.numel()} numbers, no multiple of {out_fields} * {len(basis)}")
    side = round(basis.shape[3] ** 0.5)
    filters = torch.einsum("mnb,bgip->mgnip", weights.view(out_fields, -1, len(basis)), basis)
    return filters.flatten(2, 3).flatten(0, 1).unflatten(2, (side, side))


def _norm(state: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Statistics and affine parameters of an inner batch norm, one number a field."""
    names = ("weight", "bias", "running_mean", "running_var")
    if f"{path}.weight" not in state:
        return {key: _get(state, f"{path}.batch_norm_[{_ORDER}].{key}") for key in names}
    fibres = {key: _get(state, f"{path}.{key}").unflatten(0, (-1, _ORDER)) for key in names}  # exported: each channel's
    if any(not fibre.equal(fibre[:, :1].expand_as(fibre)) for fibre in fibres.values()):
        raise ValueError(f"{path} is not the same for the {_ORDER} channels of a field")
    return {key: fibre[:, 0] for key, fibre in fibres.items()}
