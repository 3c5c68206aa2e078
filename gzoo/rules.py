"""The rules of the recipe: for each type of layer, what commutes with the group in its place.

A rule gets the plain module, whose children are converted already, and a `Recipe`; the table at the end lists what
passes unchanged. What no rule knows is an error of `gzoo.convert`.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import timm.layers as tl
import torch
from timm.layers.adaptive_avgmax_pool import (
    AdaptiveCatAvgMaxPool2d,
    FastAdaptiveAvgMaxPool,
    FastAdaptiveAvgPool,
    FastAdaptiveCatAvgMaxPool,
    FastAdaptiveMaxPool,
)
from timm.layers.grn import GlobalResponseNorm
from timm.layers.pool2d_same import MaxPool2dSame
from timm.layers.split_attn import RadixSoftmax
from timm.layers.std_conv import ScaledStdConv2dSame, StdConv2dSame
from timm.models import (
    convnext,
    edgenext,
    efficientvit_mit,
    fastvit,
    hgnet,
    inception_next,
    metaformer,
    mobilevit,
    nfnet,
    rdnet,
    selecsls,
    swiftformer,
)
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d, Permute, StochasticDepth  # type: ignore[import-untyped]

from gzoo.bases import balance
from gzoo.groups import Directions, Group
from gzoo.nn import (
    FibreNorm,
    FourierPosition,
    GroupCondConv2d,
    GroupConv2d,
    GroupConvTranspose2d,
    GroupEca,
    GroupLinear,
    GroupMapLinear,
    GroupMapNorm,
    GroupPixelShuffle,
    GroupPixelUnshuffle,
    GroupPool,
    GroupVectorMap,
    InvariantConv2d,
    InvariantLinear,
    LiftingConv2d,
    PerElement,
    PoolSomeFibres,
    PoseConv2d,
    PoseLinear,
    RepeatAlongFibre,
    SymmetricPool2d,
    SymmetricUnpool2d,
    VectorPool,
    WeightStandardization,
)
from gzoo.nn.expand import ExpandedLayer
from gzoo.nn.fibre import share_along_fibre
from gzoo.nn.functions import act_symmetrically, is_whole
from gzoo.nn.linear import Head, Pooling
from gzoo.nn.mixed import Run
from gzoo.nn.norm import CHANNELS_FIRST, channel_dim
from gzoo.nn.resample import Window, square
from gzoo.plan import REDUCTIONS, Plan, nearest_divisor
from gzoo.segments import Segments, flat
from gzoo.trace import side_folded_by

_WITHOUT_FIBRE = "channels that have no fibre (of the image, a mean over channels, an attention map)"


@dataclass(frozen=True)
class Recipe:
    """What a rule needs to know: the group, the planned widths, and where the module stands.

    Attributes:
        plan: the widths, and what the trace showed.
        group_pool: how the classifier pools a fibre.
        per_element: whether what takes statistics over channels or pixels does so for each element of the fibre by
            itself, as the plain network does for each pose of the image.
        head: what the classifier gives: invariant logits, or logits of class and pose.
        path: of the module.
    """

    plan: Plan
    group_pool: Pooling
    per_element: bool = False
    head: Head = "invariant"
    path: str = ""

    @property
    def group(self) -> Group:
        """The group of the stage that the module is in."""
        return self.plan.group_at(self.path)

    @property
    def in_fields(self) -> int:
        """Regular fields that the module is given; of channels that have no fibre, their own number."""
        runs = self.in_runs
        if len(runs) > 1:
            raise ValueError(f"it is given {_WITHOUT_FIBRE} beside feature maps, which only a convolution can take")
        return runs[0].size

    @property
    def out_fields(self) -> int:
        """Regular fields that the module gives."""
        runs = self.out_runs
        if not all(run.regular for run in runs):
            raise ValueError(f"it gives {_WITHOUT_FIBRE}, which only a convolution can")
        return runs[0].size

    @property
    def lifts(self) -> bool:
        """Whether all that the module is given has no fibre: channels of the image."""
        return not any(run.regular for run in self.in_runs)

    @property
    def in_runs(self) -> list[Run]:
        """What the module is given."""
        return self._runs(self.plan.trace.inputs)

    @property
    def out_runs(self) -> list[Run]:
        """What the module gives."""
        return self._runs(self.plan.trace.outputs)

    @property
    def folded(self) -> int:
        """Side of the squares of pixels that a space-to-depth before the module folded into channels; 1 if none."""
        return max(segment.folded for segment in self._seen(self.plan.trace.inputs))

    @property
    def vectors(self) -> Directions:
        """The channels that the module makes as vectors."""
        return self.plan.vectors.get(self.path, ())

    @property
    def is_classifier(self) -> bool:
        """Whether the module makes logits."""
        return self.path in self.plan.classifiers

    def at(self, path: str) -> "Recipe":
        """This recipe for the module called ``path``."""
        return replace(self, path=path)

    def _runs(self, known: dict[str, Segments]) -> list[Run]:
        alike = itertools.groupby(flat(self._seen(known)), lambda segment: segment.image)
        return [Run(self.plan.fields(tuple(segments), self.path), not image) for image, segments in alike]

    def _seen(self, known: dict[str, Segments]) -> Segments:
        if self.path in known:
            return known[self.path]
        if self.path in self.plan.trace.lost:
            raise ValueError(self.plan.why_lost(self.path))
        raise ValueError(
            "it has weights, but runs on an image neither in eval mode nor in training (as far as the network takes "
            "images alone, and of this size, then), so its width is unknown; remove it from the plain network, have it "
            "run, or name a size at which it does: model.pretrained_cfg = {'input_size': (3, height, width)}"
        )


Rule = Callable[[Any, Recipe], nn.Module]
RULES: dict[type[nn.Module], Rule] = {}


def rule(*types: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Teaches `convert` what replaces modules of exactly these types.

    The decorated function gets the plain module, whose children are converted already, and the `Recipe`; it returns the
    module to put in its place, which must commute with the group: ``convert`` checks the whole network afterwards.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(types, function))
        return function

    return register


# --- convolutions and linear maps


@rule(nn.Conv2d, tl.Conv2dSame)
def _conv(plain: nn.Conv2d, recipe: Recipe) -> nn.Module:
    order, given = recipe.group.order, recipe.in_runs
    gives = _gives(plain, recipe)
    mixed, pools = len(given) > 1, not all(run.regular for run in gives)
    is_linear = (
        plain.kernel_size == plain.stride == (1, 1) and plain.groups == 1 and plain.padding in (0, (0, 0), "same")
    )
    if recipe.is_classifier and is_linear and not (mixed or recipe.lifts or recipe.vectors):
        bias = plain.bias is not None
        if recipe.head == "pose":
            pose = PoseConv2d(recipe.group, recipe.in_fields, plain.out_channels, bias)
            _initialize_like(pose, plain, plain.in_channels, pose.fan_in)
            return pose
        last = InvariantConv2d(recipe.group, recipe.in_fields, plain.out_channels, bias, recipe.group_pool)
        _initialize_like(last, plain, plain.in_channels, last.in_channels)
        return last
    if recipe.per_element and (mixed or pools):
        raise ValueError(f"{_WITHOUT_FIBRE} are the same for all poses here, and each pose's own in the plain network")
    in_fields = sum(run.size for run in given)
    out_fields = sum(run.size for run in gives)
    options = _window_options(plain) | {"padding_mode": plain.padding_mode}
    groups = recipe.plan.groups_of(plain, in_fields, out_fields)
    kind = LiftingConv2d if recipe.lifts else GroupConv2d
    if recipe.folded > 1:  # behind a space-to-depth, which a quarter turn would scramble: the same pixels, unfolded
        in_fields //= recipe.folded**2
        for name in ("kernel_size", "stride", "padding"):
            options[name] *= recipe.folded
    new = kind(recipe.group, in_fields, out_fields, groups=groups, basis=recipe.plan.basis, **options)
    _initialize_like(new, plain, plain.weight[0].numel(), new.fan_in)
    return _with_pools([RepeatAlongFibre(order, given), new] if mixed else [new], gives, recipe)


def _gives(plain: nn.Conv2d | nn.ConvTranspose2d, recipe: Recipe) -> list[Run]:
    """What a convolution gives; logits are regular fields, as they are pooled in a way of their own."""
    return [Run(plain.out_channels, True)] if recipe.is_classifier else recipe.out_runs


def _with_pools(layers: list[nn.Module], gives: list[Run], recipe: Recipe) -> nn.Module:
    """The layers, and behind them what pools the fibres of channels that have none, or of logits."""
    order = recipe.group.order
    if not all(run.regular for run in gives):
        layers = [*layers, PoolSomeFibres(order, gives)]
    if recipe.is_classifier:
        layers = [*layers, _last_pool(recipe)]
    return nn.Sequential(*layers) if len(layers) > 1 else layers[0]


def _last_pool(recipe: Recipe, dim: Literal[1, -1] = 1) -> GroupPool:
    """What pools the fibres of a layer that makes logits, some of them vectors perhaps."""
    if recipe.vectors:
        return VectorPool(recipe.group, recipe.vectors, recipe.group_pool, dim)
    return GroupPool(recipe.group.order, recipe.group_pool, dim)


def _window_options(plain: Any) -> dict[str, Any]:
    """The window of a plain convolution, and whether it has a bias, as arguments of a group convolution."""
    # TensorFlow pads one side more where it must; here both alike, behind the resampling rule
    same = isinstance(plain, tl.Conv2dSame | StdConv2dSame | ScaledStdConv2dSame) or plain.padding == "same"
    height, width = plain.kernel_size
    return {
        "kernel_size": height if height == width else (height, width),
        "stride": square(plain.stride, "stride"),
        "padding": "same" if same or getattr(plain, "dynamic_padding", False) else _square_padding(plain),
        "dilation": square(plain.dilation, "dilation"),
        "bias": plain.bias is not None,
    }


def _square_padding(plain: nn.Conv2d) -> int:
    """The padding of a convolution's kernel, or of the square that the kernel is the middle of."""
    paddings: Any = (0, 0) if plain.padding == "valid" else plain.padding
    side = max(plain.kernel_size)
    around = [p + d * (side - k) // 2 for p, d, k in zip(paddings, plain.dilation, plain.kernel_size, strict=True)]
    if around[0] != around[1]:
        raise ValueError(
            f"kernel_size={plain.kernel_size} with padding={paddings} makes the map smaller along one axis only, and a "
            "quarter turn exchanges the axes; choose the padding that keeps the size, or a square kernel"
        )
    return around[0]


@rule(tl.CondConv2d)
def _cond_conv(plain: tl.CondConv2d, recipe: Recipe) -> nn.Module:
    _one_for_all_poses(plain, recipe, "mixture of experts")
    in_fields, out_fields, experts = recipe.in_fields, recipe.out_fields, plain.num_experts
    groups = recipe.plan.groups_of(plain, in_fields, out_fields)
    options = _window_options(plain) | {"groups": groups, "basis": recipe.plan.basis}
    new = GroupConv2d(recipe.group, in_fields, experts * out_fields, **options)
    _initialize_like(new, plain, math.prod(plain.weight_shape[1:]), new.fan_in)
    return GroupCondConv2d(new, experts)


@rule(tl.StdConv2d, StdConv2dSame, tl.ScaledStdConv2d, ScaledStdConv2dSame)
def _standardized_conv(plain: Any, recipe: Recipe) -> nn.Module:
    if recipe.is_classifier:
        raise ValueError("it makes the logits with standardized weights; use a plain convolution there")
    new: Any = _conv(plain, recipe)
    if isinstance(new, nn.Sequential):
        raise ValueError(
            "it makes or reads channels that have no fibre, such as an attention map, with standardized weights; use a "
            "plain convolution there"
        )
    gain = getattr(plain, "gain", None)
    scale = getattr(plain, "scale", 1.0) * math.sqrt(plain.weight[0].numel() / new.fan_in)  # it is of one input
    new.standardize = WeightStandardization(new.out_fields, recipe.group.order, plain.eps, gain, scale)
    return new


@rule(nn.ConvTranspose2d)
def _transposed_conv(plain: nn.ConvTranspose2d, recipe: Recipe) -> nn.Module:
    if any(plain.output_padding) and recipe.per_element:
        raise ValueError(
            f"output_padding={plain.output_padding} adds pixels on one side only, and no mean over poses does; choose "
            "kernel, stride and padding with kernel - 2 * padding = stride, which doubles the size, or fresh weights"
        )
    if recipe.lifts:
        raise ValueError(f"it enlarges {_WITHOUT_FIBRE}; put a convolution before it, which lifts them to fields")
    gives = _gives(plain, recipe)
    out_fields = sum(run.size for run in gives)
    if recipe.per_element and not all(run.regular for run in gives):
        raise ValueError(f"{_WITHOUT_FIBRE} are the same for all poses here, and each pose's own in the plain network")
    new = GroupConvTranspose2d(
        recipe.group,
        recipe.in_fields,
        out_fields,
        kernel_size=square(plain.kernel_size, "kernel_size"),
        stride=square(plain.stride, "stride"),
        padding=square(plain.padding, "padding"),  # type: ignore[arg-type]
        dilation=square(plain.dilation, "dilation"),
        groups=recipe.plan.groups_of(plain, recipe.in_fields, out_fields),
        bias=plain.bias is not None,
        basis=recipe.plan.basis,
        output_padding=square(plain.output_padding, "output_padding"),
    )
    _initialize_like(new, plain, plain.weight[:, 0].numel() // plain.groups, new.fan_in)
    return _with_pools([new], gives, recipe)


@rule(nn.Linear, tl.Linear)
def _linear(plain: nn.Linear, recipe: Recipe) -> nn.Module:
    if recipe.lifts and recipe.vectors:
        raise ValueError(f"it makes vectors of {_WITHOUT_FIBRE}, which have no direction; make them of feature maps")
    if recipe.lifts and recipe.head == "invariant" and not any(run.regular for run in recipe.out_runs):
        return plain  # of what has no fibre, such as other logits
    if recipe.lifts:
        raise ValueError("it is linear in the channels of the image; use a 1x1 convolution, which lifts them")
    in_fields, bias = recipe.in_fields, plain.bias is not None
    if recipe.path in recipe.plan.trace.unflattened:
        return _vector_map(plain, recipe)
    if recipe.path in recipe.plan.trace.flattened:
        return _map_linear(plain, recipe)
    if recipe.vectors:
        fields = GroupLinear(recipe.group, in_fields, plain.out_features, bias)
        _initialize_like(fields, plain, plain.in_features, fields.fan_in)
        return nn.Sequential(fields, _last_pool(recipe, dim=-1))
    new: GroupLinear | InvariantLinear
    pools = not (recipe.is_classifier or any(run.regular for run in recipe.out_runs))
    if pools and recipe.per_element:
        raise ValueError(f"it gives {_WITHOUT_FIBRE}: one for all poses here, and each pose's own in the plain network")
    if pools or (recipe.is_classifier and recipe.head == "invariant"):
        pool = "mean" if pools else recipe.group_pool
        new = InvariantLinear(recipe.group, in_fields, plain.out_features, bias, pool)
        _initialize_like(new, plain, plain.in_features, in_fields)
    else:
        classes = plain.out_features
        new = (
            PoseLinear(recipe.group, in_fields, classes, bias)
            if recipe.is_classifier
            else GroupLinear(recipe.group, in_fields, recipe.out_fields, bias)
        )
        _initialize_like(new, plain, plain.in_features, new.fan_in)
    return new


def _map_linear(plain: nn.Linear, recipe: Recipe) -> nn.Module:
    """Behind a flattened map, which keeps its pixels, and with them where they are."""
    side = _side_of_map(recipe)
    if recipe.is_classifier and recipe.head == "pose":
        raise ValueError("it makes logits of a flattened map; head='pose' wants a linear layer on vectors behind it")
    if recipe.is_classifier and hasattr(recipe.plan.model, "get_classifier"):
        raise ValueError(
            "it makes logits of a flattened map, and timm's calls for classifiers take what it is given for a vector; "
            "pool the map before it, or make the network one without get_classifier"
        )
    gives = [Run(plain.out_features, True)] if recipe.is_classifier else recipe.out_runs
    fields, bias = sum(run.size for run in gives), plain.bias is not None
    if recipe.per_element and not all(run.regular for run in gives):
        raise ValueError(f"it gives {_WITHOUT_FIBRE}: one for all poses here, and each pose's own in the plain network")
    new = GroupMapLinear(recipe.group, recipe.in_fields, fields, side, bias, recipe.plan.basis)
    _initialize_like(new, plain, plain.in_features, new.fan_in)
    return _with_pools([new], gives, recipe)


def _vector_map(plain: nn.Linear, recipe: Recipe) -> nn.Module:
    """In front of a decoder, which makes a map of the vector that it is given."""
    side, trace = recipe.plan.trace.unflattened[recipe.path], recipe.plan.trace
    if recipe.path in trace.flattened:
        raise ValueError(
            "it makes a map of a flattened map; put a vector between, by two linear layers, or convolve it"
        )
    new = GroupVectorMap(
        recipe.group, recipe.in_fields, recipe.out_fields, side, plain.bias is not None, recipe.plan.basis
    )
    _initialize_like(new.kernels, plain, plain.in_features, recipe.in_fields * recipe.group.order)
    return new


def _side_of_map(recipe: Recipe) -> int:
    """Of the flattened map that a layer is given."""
    height, width = recipe.plan.trace.flattened[recipe.path]
    if height != width:
        raise ValueError(
            f"it is given a flattened map of {height}x{width} pixels, whose sides a quarter turn exchanges; give "
            "square images, or pool the map before it"
        )
    return height


@torch.no_grad()
def _initialize_like(new: Any, plain: Any, plain_fan_in: int, fan_in: int) -> None:
    """Draws weights of the plain layer's size, corrected for the number of inputs; a constant bias is kept."""
    size = plain.weight.square().mean().sqrt() * math.sqrt(plain_fan_in / fan_in)
    if isinstance(new, ExpandedLayer):
        size = size * balance(new.basis)
    new.weight.normal_().mul_(size)
    if new.bias is not None:
        new.bias.fill_(plain.bias.mean())


@rule(tl.GlobalContext)
def _global_context(plain: Any, recipe: Recipe) -> nn.Module:
    if plain.conv_attn is not None:
        _one_for_all_poses(plain, recipe, "attention map")
        plain.conv_attn = nn.Sequential(plain.conv_attn, GroupPool(recipe.group.order))
    return plain


@rule(tl.EcaModule)
def _eca(plain: tl.EcaModule, recipe: Recipe) -> nn.Module:
    if plain.conv2 is not None:
        raise ValueError("ECA with an MLP has no equivariant counterpart here; use ECA without, or squeeze-excite")
    return GroupEca(recipe.group, plain.conv.kernel_size[0], plain.gate)


@rule(fastvit.Attention, metaformer.Attention, tl.Attention, tl.Attention2d)
def _attention(plain: Any, recipe: Recipe) -> nn.Module:
    """Each head holds whole fibres, so the product of a query with a key does not change when both are transformed."""
    _one_for_all_poses(plain, recipe)
    width = plain.qkv.out_fields // (3 * plain.num_heads) * recipe.group.order
    if isinstance(plain, tl.Attention2d):  # its scale is that of the width it finds
        plain.dim_head = width
    else:
        plain.head_dim, plain.scale = width, width**-0.5
    if isinstance(plain, tl.Attention):
        plain.attn_dim = plain.num_heads * width
    return plain


@rule(tl.MultiQueryAttention2d)
def _multi_query_attention(plain: Any, recipe: Recipe) -> nn.Module:
    _one_for_all_poses(plain, recipe)
    plain.key_dim, plain.value_dim = (new.proj.out_fields * recipe.group.order for new in (plain.key, plain.value))
    plain.scale = plain.key_dim**-0.5
    return plain


@rule(edgenext.PositionalEncodingFourier)
def _fourier_position(plain: Any, recipe: Recipe) -> nn.Module:
    new = FourierPosition(recipe.group, plain.hidden_dim, recipe.out_fields, plain.temperature)
    _initialize_like(new.token_projection, plain.token_projection, 1, 1)
    return new


class _SplitFibres(edgenext.SplitTransposeBlock):
    """EdgeNeXt's attention block, which splits its channels in even parts: in whole fields here."""

    sizes: list[int]

    def forward(self, x: Tensor) -> Tensor:
        *pieces, last = x.split(self.sizes, dim=1)
        mixed: list[Tensor] = []
        for conv, piece in zip(self.convs, pieces, strict=True):
            mixed.append(conv(mixed[-1] + piece if mixed else piece))
        y = torch.cat([*mixed, last], dim=1)
        if self.pos_embd is not None:
            y = y + self.pos_embd((len(y), *y.shape[2:]))
        tokens = y.flatten(2).transpose(1, 2)
        tokens = tokens + self.drop_path(self.gamma_xca * self.xca(self.norm_xca(tokens)))
        tokens = self.mlp(self.norm(tokens))
        if self.gamma is not None:
            tokens = self.gamma * tokens
        return x + self.drop_path(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))


@rule(edgenext.SplitTransposeBlock)
def _split_fibres(plain: Any, recipe: Recipe) -> nn.Module:
    plain.__class__ = _SplitFibres
    plain.sizes = [recipe.plan.channels(segments) for _, segments in recipe.plan.trace.pieces[recipe.path]]
    return _channel_scale(plain, recipe)


@rule(edgenext.CrossCovarianceAttn)
def _cross_covariance_attention(plain: Any, recipe: Recipe) -> nn.Module:
    """Channels attend to channels, with weights of all pixels: each head holds whole fibres, so both sides permute."""
    _one_for_all_poses(plain, recipe)
    plain.num_heads = nearest_divisor(recipe.in_fields, plain.num_heads)
    with torch.no_grad():
        temperature = plain.temperature.mean().expand(plain.num_heads, 1, 1).clone()
    plain.temperature = nn.Parameter(temperature, plain.temperature.requires_grad)
    return plain


@rule(efficientvit_mit.LiteMLA)
def _linear_attention(plain: Any, recipe: Recipe) -> nn.Module:
    """Each head holds whole fibres, as queries, keys and values do: their products sum over them."""
    _one_for_all_poses(plain, recipe)
    return plain


@rule(swiftformer.EfficientAdditiveAttention)
def _additive_attention(plain: Any, recipe: Recipe) -> nn.Module:
    """What weighs the pixels is one number for a whole fibre of the queries."""
    _one_for_all_poses(plain, recipe)
    fields = plain.to_query.out_fields
    plain.scale_factor = (fields * recipe.group.order) ** -0.5
    share_along_fibre(plain, ("w_g",), recipe.group.order, fields)
    return plain


def _one_for_all_poses(plain: Any, recipe: Recipe, what: str = "attention") -> None:
    """Marks a module that attends from all poses at once, for `gzoo.grow`; raises ValueError if each must by itself."""
    if recipe.per_element:
        raise ValueError(f"its {what} is one for all poses here, and each pose's own in the plain network")
    plain.one_for_all_poses = True


# --- norms and scales


@rule(
    *(nn.BatchNorm2d, nn.BatchNorm1d, nn.SyncBatchNorm, tl.BatchNormAct2d, tl.SyncBatchNormAct),
    *(tl.FrozenBatchNormAct2d, FrozenBatchNorm2d),
)
def _batch_norm(plain: Any, recipe: Recipe) -> nn.Module:
    if recipe.per_element and getattr(plain, "track_running_stats", True) is False:
        raise ValueError(
            "it norms by the statistics of the batch in evaluation, too, which are one for all poses here, and each "
            "pose's own in the plain network; convert with fresh weights, or let it track running statistics"
        )
    side = _side_of_map(recipe) if recipe.path in recipe.plan.trace.flattened else 1
    plain.num_features = recipe.in_fields * side**2
    if side > 1:
        return GroupMapNorm(_shrunk(plain, plain.num_features), recipe.group, side)
    return _fibre_norm(plain, plain.num_features, recipe)


@rule(nn.InstanceNorm2d)
def _instance_norm(plain: nn.InstanceNorm2d, recipe: Recipe) -> nn.Module:
    if recipe.per_element:
        return PerElement(plain, recipe.group.order)
    return _batch_norm(plain, recipe)


@rule(
    *(tl.EvoNorm2dS0, tl.EvoNorm2dS0a, tl.EvoNorm2dS1, tl.EvoNorm2dS1a, tl.EvoNorm2dS2, tl.EvoNorm2dS2a),
    *(tl.EvoNorm2dB0, tl.EvoNorm2dB1, tl.EvoNorm2dB2, tl.FilterResponseNormTlu2d, tl.FilterResponseNormAct2d),
)
def _evo_norm(plain: Any, recipe: Recipe) -> nn.Module:
    if recipe.per_element:
        return PerElement(plain, recipe.group.order)
    fields = recipe.in_fields
    if hasattr(plain, "groups"):
        plain.groups = max(n for n in range(1, plain.groups + 1) if fields % n == 0)
    return _fibre_norm(plain, fields, recipe)


@rule(nn.GroupNorm, tl.GroupNorm, tl.GroupNorm1, tl.GroupNormAct, tl.GroupNorm1Act, metaformer.GroupNorm1NoBias)
def _group_norm(plain: Any, recipe: Recipe) -> nn.Module:
    if recipe.per_element:
        return PerElement(plain, recipe.group.order)
    fields = recipe.in_fields
    plain.num_channels = fields
    plain.num_groups = max(n for n in range(1, plain.num_groups + 1) if fields % n == 0)
    return _fibre_norm(plain, fields, recipe)


def _fibre_norm(plain: nn.Module, fields: int, recipe: Recipe) -> FibreNorm:
    return FibreNorm(_shrunk(plain, fields), recipe.group.order)


def _shrunk(plain: Any, fields: int) -> Any:
    """The norm, in place, over ``fields`` channels, each with the mean of the plain parameters and statistics."""
    with torch.no_grad():
        for name, parameter in plain.named_parameters(recurse=False):
            shrunk = nn.Parameter(parameter.mean().expand(fields).clone(), parameter.requires_grad)
            plain.register_parameter(name, shrunk)
        for name, buffer in plain.named_buffers(recurse=False):
            if buffer.ndim == 1:
                plain.register_buffer(name, buffer.mean().expand(fields).clone())
    return plain


@rule(
    *(*CHANNELS_FIRST, nn.LayerNorm, nn.RMSNorm, metaformer.LayerNormNoBias),
    *(tl.LayerNorm, tl.LayerNormFp32, tl.LayerNormAct, tl.LayerNormActFp32),
    *(tl.RmsNorm, tl.RmsNormFp32, tl.RmsNormAct, tl.RmsNormActFp32, tl.SimpleNorm, tl.SimpleNormFp32),
)
def _layer_norm(plain: Any, recipe: Recipe) -> nn.Module:
    if len(plain.normalized_shape) != 1:
        raise ValueError(
            f"layer norm over {tuple(plain.normalized_shape)} holds one parameter per pixel; norm channels only"
        )
    if recipe.per_element:
        return PerElement(plain, recipe.group.order, channel_dim(plain))
    fields = recipe.in_fields
    plain.normalized_shape = (fields * recipe.group.order,)
    share_along_fibre(plain, ("weight", "bias"), recipe.group.order, fields)
    return plain


@rule(
    *(tl.LayerScale, tl.LayerScale2d, fastvit.LayerScale2d, swiftformer.LayerScale2d, metaformer.Scale),
    *(convnext.ConvNeXtBlock, edgenext.ConvBlock, inception_next.MetaNeXtBlock, rdnet.DenseBlock),
)
def _channel_scale(plain: Any, recipe: Recipe) -> nn.Module:
    """One number a channel becomes one a field."""
    if isinstance(plain, metaformer.Scale):
        plain.shape = (recipe.in_fields * recipe.group.order, *plain.shape[1:])
    share_along_fibre(plain, ("gamma", "gamma_xca", "weight", "bias", "scale"), recipe.group.order, recipe.out_fields)
    return plain


@rule(nn.LocalResponseNorm)
def _local_response_norm(plain: nn.LocalResponseNorm, recipe: Recipe) -> nn.Module:
    """Over neighbouring fields, for each element by itself."""
    return PerElement(plain, recipe.group.order)


@rule(GlobalResponseNorm)
def _response_norm(plain: GlobalResponseNorm, recipe: Recipe) -> nn.Module:
    if recipe.per_element:
        return PerElement(plain, recipe.group.order, channel_dim(plain))
    return _channel_scale(plain, recipe)


# --- pools and pads


@rule(nn.MaxPool2d, nn.AvgPool2d)
def _pool(plain: Any, recipe: Recipe) -> nn.Module:
    return SymmetricPool2d(plain)


@rule(nn.MaxUnpool2d)
def _unpool(plain: nn.MaxUnpool2d, recipe: Recipe) -> nn.Module:
    return SymmetricUnpool2d(plain)


@rule(nn.LPPool2d)
def _lp_pool(plain: nn.LPPool2d, recipe: Recipe) -> nn.Module:
    kernel, stride = square(plain.kernel_size, "kernel_size"), square(plain.stride or plain.kernel_size, "stride")
    return SymmetricPool2d(plain, Window(kernel, stride, 0, ceil_mode=plain.ceil_mode))


@rule(MaxPool2dSame, tl.AvgPool2dSame)
def _same_pool(plain: Any, recipe: Recipe) -> nn.Module:
    kernel, stride = square(plain.kernel_size, "kernel_size"), square(plain.stride, "stride")
    whole = kernel % 2 == 0 and kernel == stride
    padding = 0 if whole else kernel // 2  # as many pixels out as TensorFlow gives
    window = None if whole or kernel % 2 else Window(kernel, stride, kernel - 1)
    if isinstance(plain, nn.MaxPool2d):
        return SymmetricPool2d(nn.MaxPool2d(kernel, stride, padding, ceil_mode=whole), window)
    return SymmetricPool2d(nn.AvgPool2d(kernel, stride, padding, whole, count_include_pad=False), window)


@rule(tl.BlurPool2d)
def _blur_pool(plain: Any, recipe: Recipe) -> nn.Module:
    if len(set(plain.padding)) > 1:
        raise ValueError(f"it pads {plain.padding} pixels, more on one side; choose an odd filter size")
    plain.channels, plain.filt = None, plain.filt[:1]  # the same filter for all channels, however many
    return SymmetricPool2d(plain, Window(plain.filt_size, plain.stride, 2 * plain.padding[0]))


class _SymmetricStemV2(hgnet.StemV2):
    """PP-HGNetV2's stem, which pads on the right and below: its 2x2 windows are behind the resampling rule here."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem1(x)
        x = torch.cat([self.pool(x), self.stem2b(self.stem2a(x))], dim=1)
        return self.stem4(self.stem3(x))


@rule(hgnet.StemV2)
def _hgnet_stem(plain: Any, recipe: Recipe) -> nn.Module:
    plain.__class__ = _SymmetricStemV2
    window = Window(kernel=2, stride=1, padding=1)
    plain.stem2a.conv.window = plain.stem2b.conv.window = window
    plain.pool = SymmetricPool2d(nn.MaxPool2d(2, stride=1, padding=1), window)
    return plain


@rule(mobilevit.MobileVitBlock, mobilevit.MobileVitV2Block)
def _patches(plain: Any, recipe: Recipe) -> nn.Module:
    square(plain.patch_size, "patch_size")
    return plain


@rule(nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d)
def _pad(plain: Any, recipe: Recipe) -> nn.Module:
    left, right, top, bottom = plain.padding
    if left + right != top + bottom or any(a != b == -a for a, b in ((left, right), (top, bottom))):
        raise ValueError(
            f"it pads {plain.padding} pixels (left, right, top, bottom): a quarter turn exchanges the axes, and a "
            "shift of the map has no counterpart; pad as many along both axes"
        )
    if left == right and top == bottom:
        return plain
    if recipe.per_element:
        raise ValueError(
            f"it pads {plain.padding} pixels, more on one side, and no mean over poses does; pad both alike"
        )
    return act_symmetrically(plain, recipe.plan.calls)


@rule(tl.SpaceToDepth, nn.PixelUnshuffle)
def _space_to_depth(plain: tl.SpaceToDepth | nn.PixelUnshuffle, recipe: Recipe) -> nn.Module:
    if recipe.lifts:
        return nn.Identity()  # the convolution that follows gets a kernel as many times as wide
    if not all(run.regular for run in recipe.in_runs):
        raise ValueError(f"it folds {_WITHOUT_FIBRE} beside maps that have one; fold each for itself")
    _require_turning_squares(recipe)
    return GroupPixelUnshuffle(recipe.group, side_folded_by(plain), by_place=isinstance(plain, tl.SpaceToDepth))


@rule(nn.PixelShuffle)
def _pixel_shuffle(plain: nn.PixelShuffle, recipe: Recipe) -> nn.Module:
    pools, fields = not any(run.regular for run in recipe.out_runs), sum(run.size for run in recipe.out_runs)
    if recipe.lifts or recipe.in_fields != fields * plain.upscale_factor**2:
        raise ValueError(
            f"it unfolds {_WITHOUT_FIBRE}; give it feature maps. If it makes the output, name it, not the layer before "
            "it, as classifier"
        )
    _require_turning_squares(recipe)
    if pools and recipe.per_element and not recipe.is_classifier:
        raise ValueError(f"it gives {_WITHOUT_FIBRE}: one for all poses here, and each pose's own in the plain network")
    new = GroupPixelShuffle(recipe.group, plain.upscale_factor)
    return nn.Sequential(new, GroupPool(recipe.group.order, recipe.group_pool)) if pools else new


def _require_turning_squares(recipe: Recipe) -> None:
    if not (recipe.plan.fit or recipe.per_element):
        raise ValueError("its squares of pixels do not turn, so there are no nearest weights; use weights='transfer'")


@rule(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
def _upsample(plain: nn.Upsample, recipe: Recipe) -> nn.Module:
    is_asymmetric = plain.size is None or plain.mode.startswith("nearest")
    return plain if is_whole(plain.scale_factor) or not is_asymmetric else act_symmetrically(plain, recipe.plan.calls)


@rule(nn.ChannelShuffle)
def _channel_shuffle(plain: nn.ChannelShuffle, recipe: Recipe) -> nn.Module:
    return act_symmetrically(plain, recipe.plan.calls)


@rule(nn.PReLU)
def _prelu(plain: nn.PReLU, recipe: Recipe) -> nn.Module:
    if plain.num_parameters > 1:
        plain.num_parameters = recipe.in_fields * recipe.group.order
        share_along_fibre(plain, ("weight",), recipe.group.order, recipe.in_fields)
    return plain


@rule(
    # These act on each number, or on each channel, alike, or are a softmax over channels.
    *(nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, tl.DropPath, tl.DropBlock2d),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh),
    *(nn.Softmax, nn.LogSoftmax, nn.Softmax2d),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink, nn.Threshold),
    *(nn.RReLU, nn.Hardshrink, nn.Softshrink),
    *(tl.Swish, tl.Mish, tl.Sigmoid, tl.Tanh, tl.HardSwish, tl.HardSigmoid, tl.HardMish, tl.GELU, tl.GELUTanh),
    *(tl.QuickGELU, nfnet.GammaAct, metaformer.StarReLU, hgnet.LearnableAffineBlock, nfnet.NormFreeBlock),
    *(RadixSoftmax, selecsls.SelectSeq, StochasticDepth, Permute),
    nn.GLU,  # whose gates are whole fields, as the trace ties one half of the channels to the other
    # These reduce all pixels alike; a flattened map that still has pixels is met by an error at the next layer.
    *REDUCTIONS,
    *(tl.SelectAdaptivePool2d, tl.AdaptiveAvgMaxPool2d, AdaptiveCatAvgMaxPool2d),
    *(FastAdaptiveAvgPool, FastAdaptiveMaxPool, FastAdaptiveAvgMaxPool, FastAdaptiveCatAvgMaxPool),
)
def _unchanged(plain: nn.Module, recipe: Recipe) -> nn.Module:
    return plain


@rule(nn.Unflatten)
def _unflatten(plain: nn.Unflatten, recipe: Recipe) -> nn.Module:
    """A vector made a map of as many channels as it has then; of other dimensions it stays as it is."""
    _, *pixels = plain.unflattened_size
    if plain.dim in (1, -1) and (recipe.path in recipe.plan.trace.flattened or set(pixels) == {1}):
        plain.dim, plain.unflattened_size = 1, (-1, *pixels)
    return plain


ON_IMAGE = (
    *(_conv, _standardized_conv, _transposed_conv, _linear),
    *(_pool, _unpool, _lp_pool, _same_pool, _blur_pool, _pad, _upsample, _space_to_depth, _pixel_shuffle, _hgnet_stem),
)
"""Rules that replace a module that sees the image, too; others leave it, as it acts on each channel alike."""

WHOLE = (tl.EcaModule, edgenext.PositionalEncodingFourier)
"""Modules that are replaced with all that is in them."""
