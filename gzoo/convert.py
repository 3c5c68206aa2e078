"""The recipe: a plain CNN becomes its equivariant counterpart, layer by layer.

`convert` walks a plain network and replaces each leaf by the rule for its type; the network's own classes, and with
them everything that timm lets one do with them, stay. The rules are the functions under `rule`; the table at the end of
them lists what passes unchanged. What no rule knows is an error. Then the result checks itself.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import timm.layers as tl
import torch
from timm.layers.adaptive_avgmax_pool import AdaptiveCatAvgMaxPool2d
from timm.models._pretrained import filter_pretrained_cfg
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from gzoo import groups
from gzoo.check import first_broken_layer, group_of, in_channels
from gzoo.equivariant import make_equivariant
from gzoo.groups import Group
from gzoo.nn import FibreNorm, GroupConv2d, GroupLinear, GroupPool, InvariantLinear, LiftingConv2d, SymmetricPool2d
from gzoo.nn.fibre import share_along_fibre
from gzoo.nn.linear import Pooling
from gzoo.nn.resample import square

Match = Literal["params", "flops", "width"]

_SCALE: dict[str, Callable[[int], float]] = {
    "params": lambda order: 1 / math.sqrt(order),
    "flops": lambda order: 1 / order,
    "width": lambda order: 1.0,
}


@dataclass(frozen=True)
class Recipe:
    """What a rule needs to know: the group, how plain channels become fields, and where the module stands."""

    group: Group
    match: Match
    widths: Mapping[int, int]
    group_pool: Pooling
    first_conv: str
    classifier: str | None
    path: str = ""

    def fields(self, channels: int) -> int:
        """Regular fields in place of ``channels`` plain channels."""
        return self.widths.get(channels) or max(1, round(channels * _SCALE[self.match](self.group.order)))

    def at(self, path: str) -> "Recipe":
        """This recipe for the module called ``path``."""
        return replace(self, path=path)


Rule = Callable[[Any, Recipe], nn.Module]
_RULES: dict[type[nn.Module], Rule] = {}


def rule(*types: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Teaches `convert` what replaces modules of exactly these types.

    The decorated function gets the plain module, whose children are converted already, and the `Recipe`; it returns the
    module to put in its place, which must commute with the group: ``convert`` checks the whole network afterwards.
    """

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(types, function))
        return function

    return register


@rule(nn.Conv2d)
def _conv(plain: nn.Conv2d, recipe: Recipe) -> nn.Module:
    if isinstance(plain.padding, str):
        padding: int | Literal["same"] = "same" if plain.padding == "same" else 0
    else:
        padding = square(plain.padding, "padding")
    options: dict[str, Any] = {
        "kernel_size": square(plain.kernel_size, "kernel_size"),
        "stride": square(plain.stride, "stride"),
        "padding": padding,
        "dilation": square(plain.dilation, "dilation"),
        "bias": plain.bias is not None,
        "padding_mode": plain.padding_mode,
    }
    is_classifier = recipe.path == recipe.classifier
    out_fields = plain.out_channels if is_classifier else recipe.fields(plain.out_channels)
    new: LiftingConv2d | GroupConv2d
    if recipe.path == recipe.first_conv:
        new = LiftingConv2d(recipe.group, plain.in_channels, out_fields, groups=plain.groups, **options)
    else:
        in_fields = recipe.fields(plain.in_channels)
        depthwise = 1 < plain.groups == plain.in_channels
        new = GroupConv2d(
            recipe.group, in_fields, out_fields, groups=in_fields if depthwise else plain.groups, **options
        )
    _initialize_like(new, plain, new.fan_in)
    return nn.Sequential(new, GroupPool(recipe.group.order, recipe.group_pool)) if is_classifier else new


@rule(nn.Linear)
def _linear(plain: nn.Linear, recipe: Recipe) -> nn.Module:
    in_fields, bias = recipe.fields(plain.in_features), plain.bias is not None
    new: GroupLinear | InvariantLinear
    if recipe.path == recipe.classifier:
        new = InvariantLinear(recipe.group, in_fields, plain.out_features, bias, recipe.group_pool)
        _initialize_like(new, plain, in_fields)
    else:
        new = GroupLinear(recipe.group, in_fields, recipe.fields(plain.out_features), bias)
        _initialize_like(new, plain, new.fan_in)
    return new


@torch.no_grad()
def _initialize_like(new: Any, plain: nn.Conv2d | nn.Linear, fan_in: int) -> None:
    """Draws weights of the plain layer's size, corrected for the number of inputs; a constant bias is kept."""
    size = plain.weight.square().mean().sqrt() * math.sqrt(plain.weight[0].numel() / fan_in)
    new.weight.normal_().mul_(size)
    if plain.bias is not None:
        new.bias.fill_(plain.bias.mean())


@rule(nn.BatchNorm2d, nn.SyncBatchNorm, tl.BatchNormAct2d, nn.InstanceNorm2d)
def _batch_norm(plain: Any, recipe: Recipe) -> nn.Module:
    plain.num_features = recipe.fields(plain.num_features)
    return _fibre_norm(plain, plain.num_features, recipe)


@rule(nn.GroupNorm, tl.GroupNorm, tl.GroupNorm1, tl.GroupNormAct, tl.GroupNorm1Act)
def _group_norm(plain: Any, recipe: Recipe) -> nn.Module:
    fields = recipe.fields(plain.num_channels)
    plain.num_channels = fields
    plain.num_groups = max(n for n in range(1, plain.num_groups + 1) if fields % n == 0)
    return _fibre_norm(plain, fields, recipe)


def _fibre_norm(plain: nn.Module, fields: int, recipe: Recipe) -> FibreNorm:
    with torch.no_grad():
        for name, parameter in plain.named_parameters(recurse=False):
            shrunk = nn.Parameter(parameter.mean().expand(fields).clone(), parameter.requires_grad)
            plain.register_parameter(name, shrunk)
        for name, buffer in plain.named_buffers(recurse=False):
            if buffer.ndim == 1:
                plain.register_buffer(name, buffer.mean().expand(fields).clone())
    return FibreNorm(plain, recipe.group.order)


@rule(nn.LayerNorm, tl.LayerNorm, tl.LayerNorm2d, tl.RmsNorm, tl.RmsNorm2d, tl.SimpleNorm, tl.SimpleNorm2d)
def _layer_norm(plain: Any, recipe: Recipe) -> nn.Module:
    if len(plain.normalized_shape) != 1:
        raise ValueError(
            f"layer norm over {tuple(plain.normalized_shape)} holds one parameter per pixel; norm channels only"
        )
    fields = recipe.fields(plain.normalized_shape[0])
    plain.normalized_shape = (fields * recipe.group.order,)
    share_along_fibre(plain, ("weight", "bias"), recipe.group.order, fields)
    return plain


@rule(tl.LayerScale, tl.LayerScale2d, ConvNeXtBlock)
def _layer_scale(plain: Any, recipe: Recipe) -> nn.Module:
    if plain.gamma is not None:
        share_along_fibre(plain, ("gamma",), recipe.group.order, recipe.fields(plain.gamma.numel()))
    return plain


@rule(nn.MaxPool2d, nn.AvgPool2d)
def _pool(plain: Any, recipe: Recipe) -> nn.Module:
    return SymmetricPool2d(plain)


# These reduce all pixels alike; a flattened map that still has pixels meets an error at the next layer.
_REDUCTIONS = (
    *(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten),
    *(tl.SelectAdaptivePool2d, tl.AdaptiveAvgMaxPool2d, AdaptiveCatAvgMaxPool2d),
)


@rule(
    # These act on each number, or on each channel, alike.
    *(nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, tl.DropPath, tl.DropBlock2d),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink, nn.Threshold),
    *(tl.Swish, tl.Mish, tl.Sigmoid, tl.Tanh, tl.HardSwish, tl.HardSigmoid, tl.HardMish, tl.GELU, tl.GELUTanh),
    tl.QuickGELU,
    *_REDUCTIONS,
)
def _unchanged(plain: nn.Module, recipe: Recipe) -> nn.Module:
    return plain


def convert(
    model: nn.Module,
    group: str | Group,
    match: Match = "params",
    widths: Mapping[int, int] | None = None,
    group_pool: Pooling = "mean",
) -> nn.Module:
    """The equivariant counterpart of a plain CNN, freshly initialised; ``model`` itself stays as it is.

    Args:
        model: a plain network (B, C, H, W) -> logits: a timm model or any ``nn.Module`` of known layers. Its classifier
            is timm's, or else the linear layer that runs last.
        group: a name that `gzoo.groups.get` knows, or a group.
        match: what to keep of the plain network: its "params" (C / sqrt|G| fields for C channels), its "flops" (C / |G|
            fields, the cost of the plain network), or its "width" (C fields, C * |G| channels).
        widths: plain channels -> fields, where they differ from ``match``.
        group_pool: how the classifier pools a fibre, "mean" or "max".

    Returns:
        The network; ``model.group`` is its group. Feature maps are (B, fields * |G|, H, W); logits are invariant.

    Raises:
        ValueError: a module has no equivariant counterpart here, or the result is not equivariant; names the module.
    """
    copied = copy.deepcopy(model)
    converted = convert_in_place(copied, group, match, widths, group_pool)
    check_itself(converted)
    return converted


def convert_in_place(
    model: nn.Module,
    group: str | Group,
    match: Match = "params",
    widths: Mapping[int, int] | None = None,
    group_pool: Pooling = "mean",
) -> nn.Module:
    """`convert`, but uses up ``model`` and does not check the result; for networks that a test checks."""
    group = groups.get(group) if isinstance(group, str) else group
    if match not in _SCALE:
        raise ValueError(f"match is {match!r}; accepted are {', '.join(map(repr, _SCALE))}")
    if group_of(model) is not None:
        raise ValueError(f"{type(model).__name__} is equivariant already; convert the plain network")
    has_conv = any(isinstance(module, nn.Conv2d) for module in model.modules())
    order, output = _execution_order(model) if has_conv else ([], None)
    first_conv = next((name for name in order if isinstance(model.get_submodule(name), nn.Conv2d)), None)
    if first_conv is None:
        raise ValueError(f"{type(model).__name__} has no Conv2d; gzoo converts convolutional networks")
    recipe = Recipe(group, match, widths or {}, group_pool, first_conv, _classifier(model, order, output))
    recipe = _with_doubled_width(model, recipe)
    for name in order[: order.index(first_conv)]:
        if type(model.get_submodule(name)) not in _RULES:
            raise ValueError(_unknown(name, model.get_submodule(name)))
    _update_channel_counts(model, recipe)
    converted = _walk(model, recipe, set(order[: order.index(first_conv)]), {})
    make_equivariant(converted, group, group_pool)
    _rename(converted, group)
    return converted


def _walk(module: nn.Module, recipe: Recipe, before_lifting: set[str], done: dict[nn.Module, nn.Module]) -> nn.Module:
    path = recipe.path
    for name, child in list(module._modules.items()):
        child_path = f"{path}.{name}" if path else name
        # What sees the image acts on each channel alike and stays, but for the windows of a pool.
        if child is None or (child_path in before_lifting and _RULES[type(child)] is not _pool):
            continue
        if child not in done:  # a module may stand at two places
            done[child] = _walk(child, recipe.at(child_path), before_lifting, done)
        setattr(module, name, done[child])
    if type(module) in _RULES:
        try:
            return _like(module, _RULES[type(module)](module, recipe))
        except ValueError as error:
            raise ValueError(f"{path or type(module).__name__}: {error}") from error
    own = [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
    is_leaf = not any(True for _ in module.children())
    if own or (is_leaf and type(module) not in (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        raise ValueError(_unknown(path, module, own))
    return module


def _like(plain: nn.Module, new: nn.Module) -> nn.Module:
    """``new`` in the mode, on the device and in the dtype of ``plain``."""
    tensor = next((parameter for parameter in plain.parameters() if parameter.is_floating_point()), None)
    if new is plain or tensor is None:
        return new if new is plain else new.train(plain.training)
    return new.train(plain.training).to(tensor.device, tensor.dtype)


def _unknown(path: str, module: nn.Module, own: list[str] | None = None) -> str:
    holds = f" with parameters of its own ({', '.join(own)})" if own else ""
    return (
        f"{path or 'the network'} is a {type(module).__module__}.{type(module).__qualname__}{holds}, which gzoo has no "
        "equivariant counterpart for. Replace it in the plain network by layers that gzoo knows (convolution, batch, "
        "group and layer norm, pointwise activation, pooling, linear), or teach it with gzoo.convert.rule"
    )


def _execution_order(model: nn.Module) -> tuple[list[str], Any]:
    """Names of the leaf modules in the order in which they run, and what the network then gives."""
    order: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        return lambda module, inputs: order.append(name) if name not in order else None

    leaves = [(name, module) for name, module in model.named_modules() if not any(True for _ in module.children())]
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in leaves]
    training = model.training
    try:
        with torch.no_grad():
            output = model.eval()(_example(model))
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} does not run on a random image of {tuple(_example(model).shape)}: {error}"
        ) from error
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return order, output


def _example(model: nn.Module, most: int = 64) -> Tensor:
    """A random image that the network takes: at most 64x64 pixels, its own input size if that is less."""
    config = getattr(model, "pretrained_cfg", None) or {}
    size = min(most, *(config.get("input_size") or (3, most, most))[1:])
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, in_channels(model), size, size, generator=generator)
    return x.to(parameter.device, parameter.dtype)


def _classifier(model: nn.Module, order: list[str], output: Any) -> str | None:
    """The layer that makes the logits: timm's classifier, else the last to run if it is linear, or a convolution whose
    map is pooled to a vector; activations and dropout may follow."""
    if hasattr(model, "get_classifier"):
        classifier = model.get_classifier()  # type: ignore[operator]
        return next((name for name, module in model.named_modules() if module is classifier), None)
    rules = {name: _RULES.get(type(model.get_submodule(name))) for name in order}
    last = next((name for name in reversed(order) if rules[name] is not _unchanged), None)
    module = None if last is None else model.get_submodule(last)
    logits = output.shape[1] if isinstance(output, Tensor) and output.ndim == 2 else None
    if type(module) is nn.Conv2d and module.out_channels == logits:
        return last
    reduced_later = last is not None and any(
        type(model.get_submodule(name)) in _REDUCTIONS for name in order[order.index(last) :]
    )
    return last if type(module) is nn.Linear and not reduced_later else None


def _with_doubled_width(model: nn.Module, recipe: Recipe) -> Recipe:
    """This recipe, with twice the fields in twice the features where timm's "catavgmax" pooling doubles them."""
    channels = getattr(model, "num_features", None)
    pools = (module for module in model.modules() if isinstance(module, tl.SelectAdaptivePool2d))
    if isinstance(channels, int) and any(pool.feat_mult() == 2 for pool in pools):
        return replace(recipe, widths={2 * channels: 2 * recipe.fields(channels), **recipe.widths})
    return recipe


def _update_channel_counts(model: Any, recipe: Recipe) -> None:
    """Brings the channel counts that timm's code reads back from its models up to date."""
    order = recipe.group.order
    for module in (model, getattr(model, "head", None)):
        for name in ("num_features", "in_features"):
            if isinstance(getattr(module, name, None), int) and not isinstance(module, nn.Linear):
                setattr(module, name, recipe.fields(getattr(module, name)) * order)
    if hasattr(model, "head_hidden_size"):
        model.head_hidden_size = recipe.fields(model.head_hidden_size)  # what forward_head gives before the classifier
    info = getattr(model, "feature_info", None)
    for level in getattr(info, "info", info) or ():
        level["num_chs"] = recipe.fields(level["num_chs"]) * order


def _rename(model: Any, group: Group) -> None:
    """Names the network in timm's config after its group, and drops where the plain weights came from."""
    config = getattr(model, "pretrained_cfg", None)
    if config:
        config = filter_pretrained_cfg(config, remove_source=True) | {"tag": None}
        config["architecture"] = f"{group.name}_{config.get('architecture')}"
        model.pretrained_cfg = model.default_cfg = config


def check_itself(model: nn.Module, tolerance: float = 1e-8) -> None:
    """Runs random images in all poses, in float64, through a copy of ``model`` with random norms and biases.

    One image has an odd size, where windows of even stride without resampling show, if the network takes that size.

    Raises:
        ValueError: the outputs do not transform with the image; names the first layer that fails.
    """
    group = group_of(model)
    assert group is not None
    probe = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # Fresh norms, zero biases and zero-initialised branches hide errors: whatever is constant becomes random.
        for tensor in (*probe.parameters(), *probe.buffers()):
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5)
    x = _example(probe)[:1]
    try:
        with _path_in_errors(probe), torch.no_grad():
            probe(x)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the converted {type(model).__name__} does not run ({error}). Plain widths that are added, concatenated "
            "or flattened must turn into fitting numbers of fields: try another match, give widths, or replace a "
            "flattened feature map by global pooling"
        ) from error
    _check_poses(probe, x, group, tolerance, group.grid_elements)
    odd = x[..., 1:, 1:] if x.shape[-1] % 2 == 0 else x
    try:
        with torch.no_grad():
            probe(odd)
    except (RuntimeError, ValueError):  # a network for one size of image
        return
    # All elements were tried at the even size; here the first turn and the reflection do, which make all the others.
    turns = [g for g in group.grid_elements if 0 < g < group.rotations]
    reflections = [g for g in group.grid_elements if g == group.rotations]
    _check_poses(probe, odd, group, tolerance, (*turns[:1], *reflections))


@contextmanager
def _path_in_errors(model: nn.Module) -> Iterator[None]:
    """Puts the path of the leaf that ran last before the message of an error."""
    last = ""

    def hook(name: str) -> Callable[..., None]:
        def enter(module: nn.Module, inputs: Any) -> None:
            nonlocal last
            last = name

        return enter

    leaves = [(name, module) for name, module in model.named_modules() if not any(True for _ in module.children())]
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in leaves]
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"at {last}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()


def _check_poses(probe: nn.Module, x: Tensor, group: Group, tolerance: float, elements: tuple[int, ...]) -> None:
    at_size = f"under {group.name} at {x.shape[-2]}x{x.shape[-1]} pixels"
    broken = first_broken_layer(probe, x, group, tolerance, elements)
    if broken:
        module = probe.get_submodule(broken)
        raise ValueError(
            f"{broken} ({type(module).__name__}) is not equivariant {at_size}: neither its output nor any permutation "
            "of it follows the image. Look for a step just before it that treats some pixels or channels unlike "
            "others: an asymmetric padding, a functional pooling or stride, a position embedding, a split of channels"
        )
    if broken is not None:
        raise ValueError(
            f"the output of {type(probe).__name__} is not equivariant {at_size}, though each of its modules is: look "
            "for a step in its forward that treats some pixels or channels unlike others"
        )
