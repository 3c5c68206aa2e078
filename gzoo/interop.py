"""To and from escnn: the same network out of escnn's modules, and gzoo's layers out of a network of escnn's.

Both libraries lay a feature map out alike, so only filters and statistics have to change hands. A gzoo kernel and the
coefficients of an ``R2Conv`` span the same filters; one set follows from the other by least squares, and the filters
are compared afterwards.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from gzoo import _escnn, bases
from gzoo.bases import BasisName
from gzoo.check import relative_error
from gzoo.convert import image_for
from gzoo.equivariant import Equivariant, copied, group_of, removing, require_network, sign
from gzoo.fields import group_of_type
from gzoo.groups import Group
from gzoo.nn import (
    FibreNorm,
    GroupCondConv2d,
    GroupConv2d,
    GroupMapLinear,
    GroupPool,
    LiftingConv2d,
    QuotientConv2d,
    QuotientNorm,
    QuotientPool,
    Restriction,
    SymmetricBlur2d,
    SymmetricPool2d,
    keep_original_strides,
)
from gzoo.nn.expand import ExpandedLayer
from gzoo.nn.resample import Window, require_strides, resample, square
from gzoo.partial import subsets
from gzoo.soft import residuals

if TYPE_CHECKING:
    from escnn.nn import EquivariantModule, FieldType, R2Conv

Strides = Literal["symmetric", "original"]

_TOLERANCE = 1e-4  # escnn samples its filters in float32


class EscnnLayer(nn.Module):
    """An escnn module that takes and gives plain tensors; a window in it stands behind `gzoo.nn.resample`.

    Args:
        module: any escnn module.
        window: the window operation that it is, if it is one.

    Shape:
        x: (B, channels of ``module.in_type``, H, W), or without pixels; result: as ``module`` gives it.
    """

    def __init__(self, module: "EquivariantModule", window: Window | None = None) -> None:
        super().__init__()
        self.module, self.window, self.in_type = module, window, module.in_type
        self.wrap = _escnn.load().nn.GeometricTensor

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        if x.ndim == 2:  # a GeometricTensor has pixels
            return self(x[..., None, None])[..., 0, 0]
        if self.window is not None:
            x, padding, _ = resample(x, self.window)
            if self.window.padding % 2:  # "same" padding of an even kernel: rounded up, but down on a single pixel
                self.module.padding = padding
        return self.module(self.wrap(x, self.in_type)).tensor.to(dtype)  # escnn's group pooling gives float32


class GeometricLayer(nn.Module):
    """A layer on plain tensors, in a network whose own code hands ``GeometricTensor`` from module to module.

    Args:
        layer: takes and gives plain tensors.
        in_type: escnn's type of the input.
        out_type: escnn's type of the result.

    Shape:
        x: a GeometricTensor of ``in_type``; result: one of ``out_type``.
    """

    def __init__(self, layer: nn.Module, in_type: "FieldType", out_type: "FieldType") -> None:
        super().__init__()
        self.layer, self.in_type, self.out_type = layer, in_type, out_type
        self.wrap = _escnn.load().nn.GeometricTensor

    def forward(self, x: Any) -> Any:
        return self.wrap(self.layer(x.tensor), self.out_type)


def to_escnn(model: nn.Module) -> nn.Module:
    """The same network out of escnn's modules, with the same weights and statistics.

    Convolutions become ``R2Conv``, batch norms ``InnerBatchNorm``, max and average pools ``PointwiseMaxPool2D`` and
    ``PointwiseAvgPool2D``, group pooling by maximum ``GroupPooling``; each inside an `EscnnLayer`, so that the
    network's own code still hands plain tensors around, and behind gzoo's symmetric resampling, so that outputs are
    equal at every image size. What acts on each number or channel alike (activations, dropout, global pooling) stays as
    it is.

    Without a counterpart in escnn, and so still gzoo's own: `GroupLinear`, `GroupMapLinear`, `GroupMapNorm`,
    `GroupConvTranspose2d`, `GroupPixelShuffle` and `GroupPixelUnshuffle`, convolutions with weight standardization or
    with experts (CondConv), what `gzoo.reparameterize` merged, group pooling by mean, the linear map of a classifier,
    layer norm, group norm, instance norm, layer scale, other pools than torch's two, average pools that do not count
    padding, and pools that the network runs on maps of several widths: an escnn module has one type. So is
    `Restriction`, in networks of several groups by stage: escnn's ``RestrictionModule`` leaves the channels where they
    are, as fields of |G| channels, and its ``DisentangleModule`` does not split those into regular ones.

    A pixel kernel of k > 1 needs an ``R2Conv`` with a ring through every pixel and frequencies up to half of the
    pixels on it: such a layer has more coefficients than the pixels need, and filters that are no smoother than pixels.

    Args:
        model: an equivariant network; it stays as it is.

    Returns:
        The network, in the mode of ``model``. Float32 shares escnn's sampled bases with all other layers of the
        process, as escnn does itself; for other dtypes every layer has its own.

    Raises:
        ValueError: ``model`` is not equivariant, or partial; or an ``R2Conv`` does not hold a filter.
    """
    require_network("model", model)
    group = group_of(model)
    if group is None:
        raise ValueError(f"{type(model).__name__} is not equivariant; convert it with gzoo.convert first")
    if not any(isinstance(module, ExpandedLayer | FibreNorm | GroupPool) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has no layer that escnn has; take a network that gzoo.convert made")
    if any(subsets(model)):
        raise ValueError(f"{type(model).__name__} is partial: escnn has no fields of which some elements are dropped")
    if residuals(model):
        raise ValueError(f"{type(model).__name__} is soft: escnn has no filters with a part that is not equivariant")
    model = copy.deepcopy(model)
    types = _types(model)

    def rule(path: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, GroupCondConv2d):
            return module
        if isinstance(module, QuotientConv2d) or (
            isinstance(module, LiftingConv2d | GroupConv2d)
            and not isinstance(module, GroupMapLinear)
            and module.standardize is None
        ):
            return EscnnLayer(_r2conv(path, module), module.window)
        if isinstance(module, QuotientNorm):
            kinds: Any = module.kinds
            plain = all(type(kind.norm) is nn.BatchNorm2d for kind in kinds)
            return _inner_batch_norm(list(kinds), module.group.quotient_type(module.fields)) if plain else module
        if isinstance(module, QuotientPool) and module.pool == "max":
            return EscnnLayer(_escnn.load().nn.GroupPooling(module.group.quotient_type(module.fields)))
        norm: Any = module.norm if isinstance(module, FibreNorm) else None
        if type(norm) in (nn.BatchNorm2d, BatchNormAct2d):
            new = _inner_batch_norm([module], types.get(path) or group.field_type(norm.num_features))
            return activated(new, norm)
        field_type = types.get(path)
        if isinstance(module, SymmetricPool2d) and field_type:
            return _pointwise_pool(module, field_type)
        if type(module) is GroupPool and module.pool == "max" and field_type:
            return EscnnLayer(_escnn.load().nn.GroupPooling(field_type))
        return None

    return replace_modules(model, rule)


def activated(new: nn.Module, norm: nn.BatchNorm2d) -> nn.Module:
    """``new``, followed by what timm fuses into its batch norms."""
    return nn.Sequential(new, norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else new


Rule = Callable[[str, nn.Module], nn.Module | None]


def replace_modules(module: nn.Module, rule: Rule) -> nn.Module:
    """``module`` with every submodule replaced, in place, by what ``rule`` gives for it; None keeps and walks on."""
    return _walk(module, rule, "", {})


def _walk(module: nn.Module, rule: Rule, path: str, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module not in done:  # a module may stand at two places
        new = rule(path, module)
        with torch.no_grad():  # eval() expands filters, and escnn would keep their graph
            done[module] = module if new is None else new.train(module.training)
        if new is None:
            for name, child in module._modules.items():  # named_children has one that stands at two places once
                if child is not None:
                    module._modules[name] = _walk(child, rule, f"{path}.{name}" if path else name, done)
    return done[module]


def _types(model: nn.Module) -> "dict[str, FieldType | None]":
    """escnn's type of what each norm and pool gets, by path: images before the lifting, fields of a group after it.

    None is what gets several types in turn.
    """
    types: dict[str, FieldType | None] = {}
    watched = (SymmetricPool2d, GroupPool, FibreNorm, LiftingConv2d, GroupConv2d, QuotientConv2d, Restriction)
    modules = {path: module for path, module in model.named_modules() if isinstance(module, watched)}
    lifting = next((module for module in modules.values() if isinstance(module, LiftingConv2d | QuotientConv2d)), None)
    if lifting is None:  # layers without the image that their fields come from
        return types
    images, group = lifting.group, None
    mixture: FieldType | None = None

    def hook(path: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
            nonlocal group, mixture
            if isinstance(module, LiftingConv2d | GroupConv2d):
                group, mixture = module.group, None
            elif isinstance(module, QuotientConv2d):
                mixture = module.out_type
            elif isinstance(module, Restriction):
                group = module.after
            else:
                channels = inputs[0].shape[1]
                if mixture is not None and mixture.size == channels:
                    given = mixture
                elif group is not None and channels % group.order == 0:
                    given = group.field_type(channels // group.order)
                else:  # before the lifting, or beside it on a branch of its own
                    given = images.image_type(channels)
                types[path] = given if types.get(path, given) == given else None

        return record

    training = model.training
    x = image_for(model.eval())  # before the hooks, as it tries sizes
    with removing([module.register_forward_hook(hook(path)) for path, module in modules.items()]), torch.no_grad():
        try:
            model(x)
        finally:
            model.train(training)
    return types


def _r2conv(path: str, layer: LiftingConv2d | GroupConv2d | QuotientConv2d) -> "R2Conv":
    enn, window = _escnn.load().nn, layer.window
    name = layer.basis_name
    rings = _pixel_rings(window.kernel) if name == "pixel" else bases.rings(window.kernel, name)

    def highest_frequency(radius: float) -> int:
        return min(rings, key=lambda ring: abs(ring[0] * window.dilation - radius))[2]

    filters = layer.filter().detach()
    new = enn.R2Conv(
        *(layer.in_type, layer.out_type, window.kernel),
        padding=(window.padding + 1) // 2,
        stride=1 if window.extent == 1 and window.symmetric else window.stride,  # then `resample` takes the steps
        dilation=window.dilation,
        padding_mode=layer.padding_mode,
        groups=1 if isinstance(layer, QuotientConv2d) else layer.groups,
        bias=layer.bias is not None,
        sigma=[window.dilation * width for _, width, _ in rings],
        frequencies_cutoff=highest_frequency,
        rings=[window.dilation * radius for radius, _, _ in rings],
        recompute=filters.dtype != torch.float32,
        initialize=False,
    )
    expansion, inside, outside = new.basisexpansion, _channels(layer.in_type), _channels(layer.out_type)
    with torch.no_grad():
        for pair, (start, stop) in expansion._weights_ranges.items():
            basis = getattr(expansion, f"block_expansion_{expansion._escape_pair(pair)}").sampled_basis
            # The filter of the first pose, the identity, says all; the others are the same functions turned.
            rows = _first_poses(filters[outside[pair[1]], inside[pair[0]]], *basis.shape[1:3]).double()
            coefficients = rows @ torch.linalg.pinv(basis[:, 0].flatten(1).double(), rtol=1e-6)
            new.weights[start:stop] = coefficients.flatten()
        bias = layer.channel_bias()
        if bias is not None:
            columns = new.bias_expansion
            new.bias.copy_(columns.T @ bias.to(columns) / columns.square().sum(0))
    new.to(filters)
    _require_same_filter(path, new.expand_parameters()[0], filters, "no R2Conv holds them; use another kernel size")
    return new.train()  # escnn's eval() expands the filter anew only after train()


def _channels(field_type: "FieldType") -> dict[str, slice]:
    """The channels of the fields of each kind, by the name of their representation; each kind in one run."""
    found: dict[str, slice] = {}
    start = 0
    for representation in field_type.representations:
        first = found.get(representation.name, slice(start, start)).start
        start += representation.size
        found[representation.name] = slice(first, start)
    return found


def _first_poses(filters: Tensor, out_size: int, in_size: int) -> Tensor:
    """(fields out, fields in, in_size * k * k): of each field out, the filter to its first channel."""
    rows = filters.flatten(2).unflatten(0, (-1, out_size))[:, 0]
    return rows.unflatten(1, (-1, in_size)).flatten(2)


def _pixel_rings(size: int) -> list[tuple[float, float, int]]:
    """Radius, width and highest frequency of rings whose functions span all kernels of size x size pixels."""
    axis = [i - (size - 1) / 2 for i in range(size)]
    pixels = Counter(x * x + y * y for x in axis for y in axis)
    # n pixels on a ring need frequencies up to n / 2. The next ring is so far off that its pixels weigh nothing.
    outermost = (size - 1) / 2 * math.sqrt(2)
    return [(min(math.sqrt(square), outermost), 0.01, count // 2) for square, count in sorted(pixels.items())]


def _require_same_filter(path: str, found: Tensor, expected: Tensor, advice: str) -> None:
    error, rounding = relative_error(found, expected), torch.finfo(found.dtype).eps
    if not error < max(_TOLERANCE, 4 * rounding):
        raise ValueError(f"{path or 'the layer'}: the filters differ by {error:.1e} of the largest tap; {advice}")


def _inner_batch_norm(kinds: list[Any], field_type: "FieldType") -> EscnnLayer:
    """The batch norms of the kinds of ``field_type``; escnn has one for all fields of a size."""
    norm = kinds[0].norm
    new = _escnn.load().nn.InnerBatchNorm(field_type, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    for size in {kind.group_order for kind in kinds}:
        inner = getattr(new, f"batch_norm_[{size}]")
        states = [kind.norm.state_dict() for kind in kinds if kind.group_order == size]
        for name, tensor in inner.state_dict().items():
            tensor.copy_(torch.cat([state[name] for state in states]) if tensor.ndim else states[0][name])
    return EscnnLayer(new.to(next(norm.parameters(), torch.empty(0))))


def _pointwise_pool(module: SymmetricPool2d, field_type: "FieldType") -> nn.Module | None:
    enn, pool, window = _escnn.load().nn, module.pool, module.window
    if window.extent == 1 and window.symmetric:
        return None  # no pooling at all: `resample` takes the steps
    if module.gives_shares:
        return None  # escnn's gives none
    sizes = (window.kernel, window.stride, window.padding // 2)
    if type(pool) is nn.MaxPool2d:
        new = enn.PointwiseMaxPool2D(field_type, *sizes, dilation=window.dilation, ceil_mode=window.ceil_mode)
        return EscnnLayer(new, window)
    if type(pool) is not nn.AvgPool2d or pool.divisor_override or not (pool.count_include_pad or window.padding == 0):
        return None
    return EscnnLayer(enn.PointwiseAvgPool2D(field_type, *sizes, ceil_mode=window.ceil_mode), window)


def from_escnn(model: nn.Module, basis: BasisName | None = None, strides: Strides = "symmetric") -> nn.Module:
    """A copy of a network of escnn modules with gzoo's layers in their place, with the same filters and statistics.

    Known are ``R2Conv`` between trivial, regular and quotient fields, ``InnerBatchNorm``, the pointwise nonlinearities,
    dropout and pools (antialiased ones, too), ``GroupPooling``, ``RestrictionModule`` with or without
    ``DisentangleModule``, and ``SequentialModule`` of these. Networks of the user's own classes keep their code: inside
    them each replaced module still takes and gives a ``GeometricTensor``. Regular fields that were restricted to a
    subgroup keep escnn's order of channels; `Restriction` reorders them in front of each ``R2Conv`` that takes them.
    A ``SequentialModule`` or a single module becomes one that takes and gives plain tensors.

    Args:
        model: a network of escnn modules, or one that `to_escnn` made; it stays as it is.
        basis: of the kernels; None for pixel where the group is on the grid, else steerable. What escnn learned with
            its default rings is held by the steerable basis with as many numbers, and by "steerable_3r" what it learned
            with frequencies_cutoff=lambda r: 3 * r.
        strides: "symmetric" puts every stride behind `gzoo.nn.resample`: exactly equivariant at every image size, and
            equal to ``model`` where its windows fit. "original" equals ``model`` at every size, and is no more
            equivariant than that. What `to_escnn` made is resampled already, and equal at every size with "symmetric".

    Returns:
        The network, in the mode of ``model``.

    Raises:
        ValueError: a module has no counterpart, or its filter does not lie in the basis; names it and its type. Or
            ``model`` has no module of escnn's.
    """
    require_strides(strides)
    require_network("model", model)
    if not any(isinstance(module, EscnnLayer) or _is_escnns_own(module) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has no module of escnn's; give a network that is built of them")
    model = copied(model)

    def rule(path: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, EscnnLayer):
            return _gzoo_layer(path, module.module, basis, module.window)
        return _gzoo_layer(path, module, basis, None) if _is_escnns_own(module) else None

    def geometric_rule(path: str, module: nn.Module) -> nn.Module | None:
        new = rule(path, module)
        if new is None or isinstance(module, EscnnLayer):
            return new
        return GeometricLayer(new, module.in_type, module.out_type)

    new = rule("", model)
    new = replace_modules(model, geometric_rule) if new is None else new.train(model.training)
    if strides == "original":
        keep_original_strides(new)
    if isinstance(new, Equivariant):
        sign(new)  # the basis may be another
    return new


def _is_escnns_own(module: nn.Module) -> bool:
    """Whether a module, with all that runs in it, is of escnn's classes and not of a user's."""
    enn = _escnn.load().nn
    if type(module) is enn.SequentialModule:
        return all(_is_escnns_own(child) for child in module.children())
    return isinstance(module, enn.EquivariantModule) and type(module).__module__.startswith("escnn.")


def _gzoo_layer(path: str, module: Any, basis: BasisName | None, window: Window | None) -> nn.Module:
    """gzoo's layer, or torch's, that is the same function as one module of escnn."""
    enn = _escnn.load().nn
    if type(module) is enn.SequentialModule:
        children = module.named_children()  # one that stands at two places is here once
        layers = {child: _gzoo_layer(f"{path}.{n}".strip("."), child, basis, None) for n, child in children}
        return nn.Sequential(*(layers[child] for child in module._modules.values()))
    if type(module) is enn.R2Conv:
        return _gzoo_convolution(path, module, basis, window)
    group = _group(path, module, module.in_type)
    fields = _mixture(group, module.in_type)
    if fields and len(fields) > 1:
        if type(module) is enn.GroupPooling:
            return QuotientPool(group, fields, "max")
        if type(module) is enn.InnerBatchNorm:
            return _quotient_norm(module, group, fields)
    else:  # any other acts on each channel alike, but an unknown type is better named here
        regular = fields or _law(path, module, module.in_type)[1]
        order = module.in_type.representations[0].size if regular else None
        if type(module) is enn.GroupPooling:
            return GroupPool(order, "max") if order else nn.Identity()
        if type(module) is enn.InnerBatchNorm:
            return _gzoo_norm(module, order)
    if type(module) is enn.DisentangleModule and _leaves_fields_whole(module):
        return nn.Identity()
    if type(module) in _pointwise():
        new: Any = _pointwise()[type(module)](module)
        if window is not None:  # a pool that `to_escnn` made, whose own padding does not tell an odd one
            new.pool.padding, new.window = (window.padding + 1) // 2, replace(window, symmetric=True)
        return new
    raise ValueError(
        f"{_named(path, module)} of type {module.in_type}, which gzoo has no layer for; it has counterparts of R2Conv, "
        f"InnerBatchNorm, GroupPooling, SequentialModule, {', '.join(known.__name__ for known in _pointwise())}"
    )


def _leaves_fields_whole(disentangle: nn.Module) -> bool:
    """Whether it changes no number: so it is for regular fields that were restricted."""
    changes = [matrix for name, matrix in disentangle.named_buffers() if name.startswith("change_of_basis")]
    return all(torch.allclose(matrix, torch.eye(len(matrix)).to(matrix), atol=1e-6) for matrix in changes)


def _pointwise() -> dict[type, Callable[[Any], nn.Module]]:
    """What acts on each number or channel alike, or only on their type."""
    enn = _escnn.load().nn
    return {
        enn.IdentityModule: lambda m: nn.Identity(),
        enn.RestrictionModule: lambda m: nn.Identity(),
        enn.ReLU: lambda m: nn.ReLU(m._inplace),
        enn.LeakyReLU: lambda m: nn.LeakyReLU(m._negative_slope, m._inplace),
        enn.ELU: lambda m: nn.ELU(m.alpha, m._inplace),
        enn.PointwiseNonLinearity: lambda m: _FUNCTIONS[m._function.__name__](),
        enn.PointwiseDropout: lambda m: nn.Dropout(m.p, m.inplace),
        enn.PointwiseAdaptiveAvgPool2D: lambda m: nn.AdaptiveAvgPool2d(m.output_size),
        enn.PointwiseAdaptiveMaxPool2D: lambda m: nn.AdaptiveMaxPool2d(m.output_size),
        enn.PointwiseMaxPool2D: lambda m: SymmetricPool2d(
            nn.MaxPool2d(m.kernel_size, m.stride, m.padding, m.dilation, ceil_mode=m.ceil_mode)
        ),
        enn.PointwiseAvgPool2D: lambda m: SymmetricPool2d(
            nn.AvgPool2d(m.kernel_size, m.stride, m.padding, ceil_mode=m.ceil_mode)
        ),
        enn.PointwiseAvgPoolAntialiased2D: lambda m: _blur(m, m.padding),
        enn.PointwiseMaxPoolAntialiased2D: lambda m: nn.Sequential(
            SymmetricPool2d(nn.MaxPool2d(m.kernel_size, 1, m.padding, ceil_mode=m.ceil_mode)), _blur(m, m._pad)
        ),
    }


_FUNCTIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "elu": nn.ELU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


def _blur(module: Any, padding: tuple[int, ...]) -> SymmetricBlur2d:
    return SymmetricBlur2d(module.filter[0, 0].clone(), square(module.stride, "stride"), square(padding, "padding"))


def _gzoo_convolution(path: str, conv: Any, basis: BasisName | None, window: Window | None) -> nn.Module:
    group = _group(path, conv, conv.in_type)
    padding, stride = square(conv.padding, "padding"), square(conv.stride, "stride")
    # What `to_escnn` made may leave steps and an odd padding to the resampling in front of it.
    taken = window or Window(conv.kernel_size, stride, 2 * padding, square(conv.dilation, "dilation"))
    options: dict[str, Any] = {
        "kernel_size": conv.kernel_size,
        "stride": taken.stride,
        "padding": "same" if taken.padding % 2 else taken.padding // 2,
        "dilation": taken.dilation,
        "bias": conv.bias is not None,
        "padding_mode": conv.padding_mode,
        "basis": basis,
    }
    inner, outer = _fields(group, conv.in_type), _fields(group, conv.out_type)
    if inner and outer and (_mixture(group, conv.in_type) or outer.keys() != {"c1"}):
        return _quotient_convolution(path, conv, QuotientConv2d(group, inner, outer, **options))
    fibre = _law(path, conv, conv.in_type)[1]
    if _law(path, conv, conv.out_type)[1] != group:
        raise ValueError(f"{_named(path, conv)} to {conv.out_type}; of restricted fields gzoo makes regular ones only")
    inputs = conv.in_type.size // (group.order if fibre else 1)
    kind = GroupConv2d if fibre else LiftingConv2d
    new = kind(group, inputs, len(conv.out_type), groups=conv.groups, **options)
    with torch.no_grad():
        filters, bias = conv.expand_parameters()
        if fibre:
            filters = filters.unflatten(1, (-1, fibre.order))[:, :, fibre.restriction(group)].flatten(1, 2)
        new.to(filters)
        if bias is not None:
            assert new.bias is not None
            new.bias.copy_(bias[:: group.order])
        fit(path, new, filters, _other_rings(group))
    return new if fibre in (None, group) else nn.Sequential(Restriction(fibre, group), new)


def _quotient_convolution(path: str, conv: Any, new: QuotientConv2d) -> QuotientConv2d:
    if conv.groups > 1:
        raise ValueError(f"{_named(path, conv)} with groups={conv.groups}; QuotientConv2d has groups=1 only")
    inside, outside = _channels(conv.in_type).values(), _channels(conv.out_type).values()
    rows: Any = new.blocks
    with torch.no_grad():
        filters, bias = conv.expand_parameters()
        new.to(filters)
        for row, outputs in zip(rows, outside, strict=True):
            for block, inputs in zip(row, inside, strict=True):
                _fill(block, filters[outputs, inputs])
        if bias is not None:
            assert new.bias is not None
            new.bias.copy_(bias[conv.out_type.fields_start.tolist()])
        _require_same_filter(path, new.filter(), filters, _other_rings(new.group))
    return new


def fit(path: str, layer: ExpandedLayer, filters: Tensor, advice: str) -> None:
    """Gives ``layer`` the kernels that expand to ``filters``.

    Raises:
        ValueError: there are none; says by how much the nearest differ, and ``advice``.
    """
    with torch.no_grad():
        _fill(layer, filters)
        _require_same_filter(path, layer.filter(), filters, advice)


def _fill(layer: ExpandedLayer, filters: Tensor) -> None:
    """Gives ``layer`` the kernels whose filters come closest to these."""
    basis, order = layer.basis, len(layer.index)
    # The filter of the first pose, the identity, says all.
    first = basis._replace(source=basis.source[:1], samples=None if basis.samples is None else basis.samples[:1])
    count = layer.weight[0, 0].numel()
    units = torch.eye(count, dtype=torch.float64, device=filters.device).view(count, 1, *basis.parameters)
    kernels = bases.expand(units, first)  # (parameters, |G/H|, k, k)
    rows = _first_poses(filters, order, kernels.shape[1]).double()
    layer.weight.copy_((rows @ torch.linalg.pinv(kernels.flatten(1))).view_as(layer.weight))


def _other_rings(group: Group) -> str:
    advice = (
        "this R2Conv has other rings or frequencies than that basis; gzoo has basis='steerable' for escnn's default, "
        "basis='steerable_3r' for frequencies_cutoff=lambda r: 3 * r"
    )
    return advice + (", and basis='pixel', which holds every filter" if group.on_grid else "")


def _quotient_norm(norm: Any, group: Group, fields: dict[str, int]) -> QuotientNorm:
    def empty(number: int) -> nn.Module:
        return nn.BatchNorm2d(number, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)

    new, taken = QuotientNorm(group, fields, empty), Counter[int]()
    kinds: Any = new.kinds
    for kind, number in zip(kinds, fields.values(), strict=True):
        inner = getattr(norm, f"batch_norm_[{kind.group_order}]")  # of all fields of this size
        own = slice(taken[kind.group_order], taken[kind.group_order] + number)
        kind.norm.load_state_dict({name: t[own] if t.ndim else t for name, t in inner.state_dict().items()})
        kind.norm.to(next(inner.parameters(), torch.empty(0)))
        taken[kind.group_order] += number
    return new


def _gzoo_norm(norm: Any, order: int | None) -> nn.Module:
    new = nn.BatchNorm2d(len(norm.in_type), norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    inner = getattr(norm, f"batch_norm_[{order or 1}]")
    new.load_state_dict(inner.state_dict())
    new.to(next(inner.parameters(), torch.empty(0)))
    return FibreNorm(new, order) if order else new


def _group(path: str, module: Any, field_type: "FieldType") -> Group:
    """The group of a type."""
    group = group_of_type(field_type)
    if group is None:
        raise ValueError(
            f"{_named(path, module)} of type {field_type}: gzoo knows the gspaces rot2dOnR2(N), flipRot2dOnR2(N), "
            "flip2dOnR2() and trivialOnR2() with their default axis"
        )
    return group


def _fields(group: Group, field_type: "FieldType") -> dict[str, int] | None:
    """Trivial, regular and quotient fields as `QuotientConv2d` has them; None if there are others, or one kind is in
    several runs."""
    laws = {subgroup.name: group.quotient_type({subgroup.name: 1}).representations[0] for subgroup in group.subgroups}
    names = [next((name for name, law in laws.items() if own == law), "") for own in field_type.representations]
    fields = Counter(names)
    return None if "" in fields or list(fields.elements()) != names else dict(fields)


def _mixture(group: Group, field_type: "FieldType") -> dict[str, int] | None:
    """As `_fields`, but None if all are regular or all trivial."""
    fields = _fields(group, field_type)
    return None if fields is None or fields.keys() in ({"c1"}, {group.name}) else fields


def _law(path: str, module: Any, field_type: "FieldType") -> tuple[Group, Group | None]:
    """The group of a type, and the one whose regular fields it has: the same, or a larger one that was restricted to
    it. None if all fields are trivial."""
    group, gspace = _group(path, module, field_type), field_type.gspace
    for fibre, representation in ((group, gspace.regular_repr), (None, gspace.trivial_repr)):
        if all(own == representation for own in field_type.representations):
            return group, fibre
    size = field_type.representations[0].size
    for larger in (Group(size, False), Group(size // 2, True)):
        if larger.order == size and all(_is_restricted(own, larger, group) for own in field_type.representations):
            return group, larger
    raise ValueError(
        f"{_named(path, module)} of type {field_type}: gzoo has layers for trivial, regular and quotient fields, each "
        "kind in one run, by subgroups with the default axis; for no irreps"
    )


def _is_restricted(representation: Any, larger: Group, group: Group) -> bool:
    """Whether a field is a regular one of a larger group."""
    inside = [larger.element(h, group) for h in range(group.order)]
    if representation.size != larger.order:
        return False
    fibre = torch.eye(larger.order, dtype=torch.float64)
    return all(
        g is not None
        and torch.allclose(torch.from_numpy(representation(h)).double(), larger.transform_features(fibre, g).T)
        for g, h in zip(inside, representation.group.elements, strict=True)
    )


def _named(path: str, module: nn.Module) -> str:
    return f"{path or 'the network'} is an escnn {type(module).__name__}"
