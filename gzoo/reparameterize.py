"""Reparameterization: the branches of RepVGG and its kin become one convolution, as in timm's `reparameterize_model`.

In eval mode a batch norm scales and shifts each field, so a sum of convolutions, norms and identities is one
convolution (Ding et al. 2021, "RepVGG", arXiv:2101.03697). The scale is constant along the fibre, and the identity is
the filter that is 1 in the middle where field and element are the same: equivariant both, and so is the sum. timm's own
code looks for plain norms, and would make plain convolutions, which break the symmetry where a stride does not fit the
image.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models import byobnet, fastvit, ghostnet, lcnetv2, repghost, repvit
from torch import Tensor, nn

from gzoo.equivariant import group_of, require_network
from gzoo.interop import replace_modules
from gzoo.nn import FibreNorm, GroupConv2d, LiftingConv2d
from gzoo.nn.expand import along_fibre
from gzoo.nn.merged import MergedConv2d
from gzoo.partial import subsets
from gzoo.soft import residuals


class Branch(NamedTuple):
    """factor * norm(conv(x)); the identity if there is no convolution, and no norm if there is none."""

    conv: Any = None
    norm: Any = None
    factor: Any = 1.0  # or (channels, 1, 1, 1)


@torch.no_grad()
def reparameterize(model: nn.Module) -> nn.Module:
    """A copy for inference in which each block of several branches is one convolution: the same function, faster.

    For RepVGG, MobileOne, FastViT and MobileCLIP, RepViT, RepGhost, GhostNetV3 and LCNetV2, over any group. Of other
    networks the copy is as it was.

    Args:
        model: a converted network; stays as it is.

    Returns:
        The network in eval mode. What was merged has no parameters any more: it is for inference and export, not for
        training, nor for timm's function.

    Raises:
        ValueError: ``model`` is not equivariant, or it is partial or soft; the branches of a block are plain ones, or
            have norms that are no fixed scale and shift, such as layer norm. Names the block.
    """
    require_network("model", model)
    if group_of(model) is None:
        raise ValueError(f"{type(model).__name__} is not equivariant; use timm.models.reparameterize_model for it")
    if residuals(model) or any(subsets(model)):
        raise ValueError(f"{type(model).__name__} is partial or soft; only equivariant branches can be merged")
    return replace_modules(copy.deepcopy(model).eval(), _merged)


def _merged(path: str, module: nn.Module) -> nn.Module | None:
    """What stands in the place of ``module``: its convolution, or itself with less in it; None keeps it."""
    merge = next((_MERGE[kind] for kind in type(module).__mro__ if kind in _MERGE), None)
    if merge is None or getattr(module, "reparam_conv", None) is not None:  # or merged already
        return None
    try:
        return merge(module)
    except ValueError as error:
        raise ValueError(f"{path or 'the network'}: {error}") from error


def _convolution(branches: Iterable[Branch], norm: nn.Module | None = None) -> MergedConv2d:
    """The one convolution that is the sum of ``branches``, with ``norm`` behind it."""
    branches = list(branches)
    convolutions = [branch.conv for branch in branches if branch.conv is not None]
    for conv in convolutions:
        if not isinstance(conv, LiftingConv2d | GroupConv2d):
            raise ValueError(
                f"its branches are of {type(conv).__name__}, not of gzoo's convolutions; of a plain network inside an "
                "equivariant one merge that first, with timm.models.reparameterize_model"
            )
    largest = max(convolutions, key=lambda conv: conv.kernel_size)
    dtype = largest.weight.dtype
    filters = torch.zeros_like(_filter(largest))
    bias = filters.new_zeros(len(filters))
    for conv, inner, factor in branches:
        own = _identity(filters) if conv is None else _filter(conv)
        own, shift = _behind(inner, own, None if conv is None else conv.channel_bias())
        frame = (largest.kernel_size - own.shape[-1]) // 2
        filters += factor * F.pad(own, 4 * (frame,))
        bias += shift if isinstance(factor, float) else factor.flatten() * shift
    filters, bias = _behind(norm, filters, bias)
    return MergedConv2d(largest, filters.to(dtype), bias.to(dtype))


def _filter(conv: LiftingConv2d | GroupConv2d) -> Tensor:
    """The filter, in float32 at least, or the sum would round at every branch."""
    filters = conv.full_filter()
    return filters.to(torch.promote_types(filters.dtype, torch.float32))


def _identity(like: Tensor) -> Tensor:
    channels, inputs = like.shape[:2]
    out = torch.arange(channels)
    filters = like.new_zeros(channels, inputs, 1, 1)
    filters[out, out % inputs] = 1
    return filters


def _behind(norm: nn.Module | None, filters: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Filters and bias of a convolution with a batch norm in eval mode behind it."""
    bias = filters.new_zeros(len(filters)) if bias is None else bias
    if norm is None or isinstance(norm, nn.Identity):
        return filters, bias
    plain: Any = norm.norm if isinstance(norm, FibreNorm) else norm
    fixed = getattr(plain, "running_var", None) is not None
    linear = isinstance(getattr(plain, "act", None), nn.Identity | None)
    if not isinstance(norm, FibreNorm) or not fixed or not linear:
        raise ValueError(
            f"its {type(plain).__name__} is no fixed scale and shift, so the branches are not one convolution; leave "
            "the network as it is"
        )
    scale = 1 / (plain.running_var.to(filters) + plain.eps).sqrt()
    if plain.weight is not None:
        scale = scale * plain.weight
    shift = -plain.running_mean * scale
    if plain.bias is not None:
        shift = shift + plain.bias
    scale, shift = (along_fibre(field, norm.group_order) for field in (scale, shift))
    return filters * scale.view(-1, 1, 1, 1), bias * scale + shift


def _parts(*modules: Any) -> Iterable[Branch]:
    """The branches of timm's modules: convolution and norm, a norm behind the identity, a list of these, or None."""
    for module in modules:
        if isinstance(module, nn.ModuleList):
            yield from _parts(*module)
        elif module is not None and not hasattr(module, "conv"):
            yield Branch(norm=module)
        elif module is not None:
            yield Branch(module.conv, module.bn if hasattr(module, "bn") else module.bn1)


_BRANCHES = ("identity", "conv_kxk", "conv_1x1", "conv_scale", "large_conv", "small_conv")


def _branches(block: nn.Module) -> Iterable[Branch]:
    return _parts(*(getattr(block, name, None) for name in _BRANCHES))


def _one_of(block: Any) -> nn.Module:
    block.reparam_conv = _convolution(_branches(block))
    return _without(block, *_BRANCHES, "drop_path")


def _rep_mixer(block: Any) -> nn.Module:
    scaled = not isinstance(block.layer_scale, nn.Identity)
    gamma = block.layer_scale.gamma.view(-1, 1, 1, 1) if scaled else 1.0
    mixed = [branch._replace(factor=gamma) for branch in _branches(block.mixer)]
    normed = [branch._replace(factor=-gamma) for branch in _branches(block.norm)]
    block.reparam_conv = _convolution([Branch(), *mixed, *normed])
    return _without(block, "mixer", "norm", "layer_scale")


def _position(block: Any) -> nn.Module:
    block.reparam_conv = _convolution([Branch(), Branch(block.pos_enc)])
    return _without(block, "pos_enc")


def _rep_vgg_dw(block: Any) -> nn.Module:
    one = Branch(block.conv1.c, block.conv1.bn) if block.legacy else Branch(block.conv1)
    return _convolution([Branch(block.conv.c, block.conv.bn), one, Branch()], block.bn)


def _rep_ghost(block: Any) -> nn.Module | None:
    if len(block.fusion_bn) == 0:
        return None
    fused = [
        Branch(None if isinstance(conv, nn.Identity) else conv, norm)
        for conv, norm in zip(block.fusion_conv, block.fusion_bn, strict=True)
    ]
    block.cheap_operation = _convolution([Branch(*block.cheap_operation), *fused])
    block.fusion_conv, block.fusion_bn = nn.Sequential(), nn.Sequential()
    return None  # its other convolution is followed by a norm, as before


def _ghost_v3(block: Any) -> nn.Module | None:
    if block.infer_mode:
        return None
    first = _convolution(_parts(block.primary_rpr_conv))
    second = _convolution(_parts(block.cheap_rpr_skip, block.cheap_rpr_conv, block.cheap_rpr_scale))
    block.primary_conv = nn.Sequential(first, block.primary_activation)
    block.cheap_operation = nn.Sequential(second, block.cheap_activation)
    block.infer_mode = True
    return _without(
        block, *(f"{kind}_rpr_{part}" for kind in ("primary", "cheap") for part in ("skip", "conv", "scale"))
    )


def _ghost_v3_bottleneck(block: Any) -> None:
    if block.stride > 1 and not block.infer_mode:
        block.conv_dw, block.infer_mode = _convolution(_parts(block.dw_rpr_conv, block.dw_rpr_scale)), True
        block.bn_dw = nn.Identity()
        _without(block, "dw_rpr_conv", "dw_rpr_scale")


def _lcnet_v2(block: Any) -> None:
    if block.dw_conv_list is not None:
        block.dw_conv, block.dw_conv_list = _convolution(_parts(block.dw_conv_list)), None


def _without(block: nn.Module, *names: str) -> nn.Module:
    for name in names:
        if hasattr(block, name):
            delattr(block, name)
    return block


_MERGE: dict[type[nn.Module], Callable[[Any], nn.Module | None]] = {
    byobnet.RepVggBlock: _one_of,
    byobnet.MobileOneBlock: _one_of,
    fastvit.MobileOneBlock: _one_of,
    fastvit.ReparamLargeKernelConv: _one_of,
    fastvit.RepMixer: _rep_mixer,
    fastvit.RepConditionalPosEnc: _position,
    repvit.ConvNorm: lambda block: _convolution([Branch(block.c, block.bn)]),
    repvit.RepVggDw: _rep_vgg_dw,
    repghost.RepGhostModule: _rep_ghost,
    ghostnet.GhostModuleV3: _ghost_v3,
    ghostnet.GhostBottleneckV3: _ghost_v3_bottleneck,
    lcnetv2.RepDepthwiseSeparable: _lcnet_v2,
}
