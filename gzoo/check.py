"""Measuring equivariance: how far f(g.x) is from g.f(x), for the logits, the stages, and layer by layer.

The equivariance error is max abs(f(g.x) - g.f(x)) / max abs(f(x)), a pure number.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import SpaceToDepth
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gzoo import groups
from gzoo.equivariant import copied, group_of, like, removing, require_network, tensors_in
from gzoo.equivarify import Canonicalized, Equivarified
from gzoo.fields import level_groups, transform_features
from gzoo.groups import Directions, Group
from gzoo.nn import (
    FibreNorm,
    GroupConv2d,
    GroupMapNorm,
    GroupPool,
    PerElement,
    PoolSomeFibres,
    QuotientConv2d,
    QuotientNorm,
    QuotientPool,
    Restriction,
    VectorPool,
)
from gzoo.nn.expand import ExpandedLayer
from gzoo.nn.merged import MergedConv2d
from gzoo.partial import subsets, symmetry
from gzoo.soft import residuals
from gzoo.trace import side_folded_by

if TYPE_CHECKING:
    from escnn.nn import FieldType


@dataclass(frozen=True)
class Report:
    """Equivariance errors: ``errors[output][g]``, outputs in order of depth, "logits" last.

    In a network that gives up symmetry, by stage or as a partial or soft one, an output follows those elements that it
    keeps. How far the logits are from following the others is a figure, no failure: ``given_up[g]``. A soft network
    keeps all of them as long as its residual filters are zero, and then promises none but the identity.
    """

    group: Group
    size: tuple[int, int]
    dtype: torch.dtype
    errors: dict[str, dict[int, float]]
    given_up: dict[int, float]

    @property
    def worst(self) -> float:
        """The largest of the errors."""
        return max(error for row in self.errors.values() for error in row.values())

    def __str__(self) -> str:
        labels = [self.group.label(g) for g in self.group.grid_elements]
        rows = self.errors | ({"logits, given up": self.given_up} if self.given_up else {})
        names = [*rows, "output"]
        width = max(map(len, names))
        dtype = str(self.dtype).removeprefix("torch.")
        lines = [
            f"equivariance error under {self.group.name}, {self.size[0]}x{self.size[1]} pixels, {dtype}",
            " ".join([f"{'output':{width}}", *(f"{label:>9}" for label in labels)]),
        ]
        for name, row in rows.items():
            cells = (f"{row[g]:9.1e}" if g in row else f"{'':9}" for g in self.group.grid_elements)
            lines.append(" ".join([f"{name:{width}}", *cells]).rstrip())
        return "\n".join([*lines, f"worst: {self.worst:.1e}"])


def equivariance_error(f: Callable[[Tensor], Tensor], x: Tensor, act_in: Callable, act_out: Callable) -> float:
    """max abs(f(act_in(x)) - act_out(f(x))) / max abs(f(x)); inf if the shapes differ."""
    return relative_error(f(act_in(x)), act_out(f(x)))


def relative_error(value: Tensor, expected: Tensor) -> float:
    """max abs(value - expected) / max abs(expected); inf if the shapes differ or a number is not finite."""
    if value.shape != expected.shape:
        return float("inf")
    if not value.numel():  # a map without channels
        return 0.0
    scale = expected.abs().max().item()
    error = (value - expected).abs().max().item()
    if error == 0:
        return 0.0
    return error / scale if scale > 0 and error == error else float("inf")


@torch.no_grad()
def check(
    model: nn.Module,
    size: int | tuple[int, int] | None = None,
    group: str | Group | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    in_chans: int | None = None,
) -> Report:
    """Measures the equivariance error of logits and stage feature maps for every element that is exact on the grid.

    Vectors are held to be invariant, but for those that `gzoo.convert` left as regular fields, as the style of a
    Cellpose network or the code of an autoencoder, and pose logits (B, classes, |G|) to be regular fields. Feature maps
    are regular fields, or plain channels where the model is a plain network; of a partial network, what a layer drops
    is zero. A map of logits, which the model pooled over the group, is trivial fields: it is held to move like an
    image. So may each map of a network with several outputs, if it pools at all. The rows of a table (B, rows,
    numbers), as detectors give one for each anchor of each pixel, may change places. The channels that ``vectors``
    named turn with it. (Inside a network of one's own, where gzoo does not know them, channels may be exchanged and
    change their sign.) The model is copied, so its weights, mode and dtype stay as they are.

    Args:
        model: a classifier (B, C, H, W) -> (B, classes), or of each pixel -> (B, classes, H, W) or (B, H, W); with
            timm's ``forward_intermediates`` its stages are measured too. Or a ``features_only`` model.
        size: height and width of the image in pixels; one number for a square. By default 33, or where the network
            does not take that, those of its ``pretrained_cfg["input_size"]``, 32 or 64.
        group: which group, or its name; by default the model's own, or of several stages the first.
        dtype: float64 tells a broken symmetry from rounding; float32 is what runs in use.
        seed: of the random image: normal numbers, or, where those give no finite output, some between 0 and 1.
        in_chans: channels of the image; by default those of the model's ``pretrained_cfg["input_size"]``, where that is
            of its own, or those that the first convolution takes.

    Raises:
        ValueError: the model has no group of its own and none is given, or no convolution and no ``in_chans``, or takes
            no images of that size.
    """
    require_network("model", model)
    if not isinstance(group, str | Group | None):
        raise ValueError(f"group is {group!r}; accepted are names such as 'p4m', and a gzoo.groups.Group")
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}; accepted are torch.float64, torch.float32 and their like")
    group = groups.get(group) if isinstance(group, str) else group
    own_group, asked = group_of(model), group
    around = isinstance(model, Equivarified | Canonicalized)  # follows its own group, whatever network is in it
    chain: Any = next((module.chain for module in model.modules() if hasattr(module, "chain")), (own_group,))
    group = asked or (own_group if around else chain[0])
    if group is None:
        raise ValueError(
            f"{type(model).__name__} is a plain network, so say which group to check: "
            "group=gzoo.groups.get('p4m'), or --group p4m"
        )
    model = copied(model).to(dtype).eval()
    channels = in_chans or in_channels(model)
    height, width = _sides(size if size is not None else _own_size(model, channels, dtype))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, channels, height, width, dtype=dtype, generator=generator).to(like(model).device)

    with _group_layers(model) as ran:
        expected = _outputs(model, x)
    if not all(y.isfinite().all() for y in expected.values()):  # the logarithm of a negative number, say
        x = x.sigmoid()
        expected = _outputs(model, x)
    pooled = around or _is_pooled(ran, expected)
    pools = pooled or any(isinstance(layer, GroupPool | QuotientPool) for layer in ran)
    mixture = _mixture(ran)
    signed, pairs = _has_vectors(model), _vector_channels(model, list(expected))
    codes = _vectors_of_fields(model, list(expected))
    levels = dict(zip(expected, level_groups(model), strict=False))
    errors: dict[str, dict[int, float]] = {name: {} for name in expected}
    given_up: dict[int, float] = {}
    kept = symmetry(model) if any(subsets(model)) and not around else None
    soft = asked is None and not around and any(residual.any() for residual in residuals(model))
    for g in group.grid_elements:
        for name, value in _outputs(model, group.transform_image(x, g)).items():
            moved, law = expected[name], levels.get(name, own_group) or group
            others = []  # of several outputs each may be logits, fields or vectors
            one_of_several = moved.ndim == 4 and "logits" not in expected
            squeezed = moved.ndim == 3 and own_group is not None and not around  # a map of one channel, or a table
            if (pools and one_of_several) or (pooled and squeezed):
                others.append(group.transform_image(moved, g))
            if moved.ndim == 5 and own_group is not None:
                others += _anchored(group, moved, g)
            if moved.ndim == 3 and own_group is not None and (pooled or not _is_pose(moved, law)):
                others += _possible_rows(moved, value, signed)
            if pairs is None and signed and moved.ndim in (2, 4):
                others.append(_nearest(group.transform_image(moved, g) if moved.ndim > 2 else moved, value, True))
            own_g, row = law.element(g, group), errors[name]
            follows = own_g is not None and (kept is None or own_g in kept)
            if not follows and asked is not None:  # held to what was asked for
                law, own_g = group, g
            elif not follows or (soft and g):
                row = given_up  # of a partial or soft network's outputs the logits, or the last map, come last and stay
            if pairs and pairs[name]:
                moved, others = group.transform_vectors(moved, g, pairs[name]), []
            elif moved.ndim == 4 and (own_group is None or (pooled and name == "logits")):
                moved = group.transform_image(moved, g)
            elif moved.ndim == 4:
                if own_g is None:  # no law of fibres
                    continue
                if mixture is not None and law is own_group and moved.shape[1] == mixture.size:
                    moved = transform_features(moved, own_g, mixture)
                elif moved.shape[1] % law.order:  # no fields of the group that was asked for: an infinite error
                    moved = torch.full_like(moved, math.nan)
                else:
                    moved = law.transform_features(moved, own_g)
            elif own_group is not None and own_g is not None and _is_pose(moved, law):
                moved = _move_pose(law, moved, own_g)
            elif name in codes and own_g is not None:
                moved = _move_fibres(law, moved, own_g)
            row[g] = min(relative_error(value, y) for y in (moved, *others))
    return Report(group, (height, width), dtype, errors, given_up)


class KeepDouble(TorchFunctionMode):
    """Keeps float64 where a norm would turn to float32: that rounding depends on the order of pixels, and would show as
    a broken symmetry."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if not args or not isinstance(args[0], Tensor) or args[0].dtype != torch.float64:
            return func(*args, **kwargs)
        if func is Tensor.float or (func in (Tensor.to, Tensor.type) and torch.float32 in (*args, *kwargs.values())):
            return args[0]
        if kwargs.get("dtype") == torch.float32:  # as in softmax(dim=1, dtype=torch.float32)
            kwargs = kwargs | {"dtype": torch.float64}
        return func(*args, **kwargs)


def _own_size(model: nn.Module, channels: int, dtype: torch.dtype) -> tuple[int, int]:
    """33 pixels, which show windows of even stride; or what else a network takes that was built for one size."""
    own = (input_size(model) or (3, 224, 224))[1:]
    for size in ((33, 33), own, (32, 32), (64, 64)):
        try:
            _outputs(model, torch.zeros(1, channels, *size, dtype=dtype, device=like(model).device))
            return size
        except Exception as error:  # a network for other sizes says so in any way
            reason = error
    raise ValueError(f"{type(model).__name__} does not run ({reason}); say the size of its images, as in size=224")


def _sides(size: Any) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, tuple | list) or [type(side) for side in sides] != [int, int] or min(sides) < 1:
        raise ValueError(f"size is {size!r}; it takes a number of pixels, or two: height and width")
    return sides[0], sides[1]


def input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """Channels, height and width of the images that a network says are its own; None if it does not.

    Raises:
        ValueError: it says something else.
    """
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    is_size = isinstance(size, tuple | list) and len(size) == 3 and all(isinstance(n, int) and n > 0 for n in size)
    if size is not None and not is_size:
        raise ValueError(f"pretrained_cfg['input_size'] is {size!r}; it takes channels, height and width: (3, 64, 64)")
    return size


def in_channels(model: nn.Module) -> int:
    """The channels of the image that ``model`` takes: those that it says itself, or those of its first convolution."""
    config = getattr(model, "pretrained_cfg", None) or {}
    size = input_size(model)
    if "first_conv" not in config and size:  # timm's does not know of in_chans
        return size[0]
    folded = 1
    for module in model.modules():
        if isinstance(module, SpaceToDepth | nn.PixelUnshuffle):
            folded *= side_folded_by(module) ** 2
        channels = getattr(module, "in_channels", None)
        inner = list(module.modules())[1:] if channels is not None else []
        if any(isinstance(getattr(child, "in_channels", None), int) for child in inner):
            channels = None  # a network may count channels under the name; its layers come after it
        if type(module).__module__.startswith("escnn."):
            channels = module.in_type.size
        if isinstance(channels, int) and not isinstance(module, GroupConv2d):  # which stands behind one, wherever it is
            return channels // folded
    raise ValueError(
        f"{type(model).__name__} has no convolution, which would say how many channels its images have; if it takes "
        "images, say it to gzoo.check, as in in_chans=3"
    )


def _outputs(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Stage feature maps and logits of ``model``, by name."""
    with KeepDouble():
        if hasattr(model, "forward_intermediates") and hasattr(model, "forward_head"):
            features, stages = model.forward_intermediates(x)
            return {**_named(stages), "logits": model.forward_head(features)}
        output = model(x)
    if isinstance(output, Tensor):
        return {"logits": output}
    tensors = tensors_in(output)
    if not tensors:
        raise ValueError(f"{type(model).__name__} gives a {type(output).__name__} without a tensor in it to check")
    return _named(tensors)


@contextmanager
def _group_layers(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Collects the layers that know about fibres in the order in which they run: the last decides what the output is,
    regular fields, or trivial ones after a group pooling."""
    ran: list[nn.Module] = []

    def record(module: nn.Module, inputs: tuple, output: object) -> None:
        ran.append(module)

    kinds = ExpandedLayer | MergedConv2d | QuotientConv2d | FibreNorm | GroupMapNorm | QuotientNorm
    kinds |= GroupPool | QuotientPool | PoolSomeFibres
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    with removing([module.register_forward_hook(record) for module in layers]):
        yield ran


def _is_pooled(ran: list[nn.Module], outputs: dict[str, Tensor]) -> bool:
    """Whether the last layer that knows about fibres leaves the network's output without: as an image, or as logits."""
    last = ran[-1] if ran else None
    if isinstance(last, PoolSomeFibres):  # else an attention map, which the output was multiplied with
        return last.runs == ((outputs["logits"].shape[1], False),) if "logits" in outputs else False
    return last is None or isinstance(last, GroupPool | QuotientPool)


def _has_vectors(model: nn.Module) -> bool:
    """Whether some of the channels that the network gives are directions, which turn with the image."""
    around = [module for module in model.modules() if isinstance(module, Equivarified | Canonicalized)]
    return any(module.vectors for module in around) or any(isinstance(m, VectorPool) for m in model.modules())


def _vector_channels(model: Any, names: list[str]) -> dict[str, Directions] | None:
    """The channels that are vectors in each output; None if they are not known, as inside another network."""
    if isinstance(model, Equivarified | Canonicalized):
        return dict.fromkeys(names, model.vectors)
    if not _has_vectors(model):
        return dict.fromkeys(names, ())
    held = getattr(model, "vector_outputs", {})
    if names[-1:] == ["logits"] or names == [""]:  # behind the stages, which are fields
        return {**dict.fromkeys(names, ()), names[-1]: held[1][0]} if held.get(1) else None
    return dict(zip(names, held[len(names)], strict=True)) if len(names) in held else None


def _vectors_of_fields(model: Any, names: list[str]) -> list[str]:
    """The outputs that are vectors of regular fields, of a network that `gzoo.convert` made."""
    are_fields = getattr(model, "field_outputs", {}).get(len(names), ())
    return [name for name, fields in zip(names, are_fields, strict=bool(are_fields)) if fields]


def _mixture(ran: list[nn.Module]) -> "FieldType | None":
    """The type of what the last layer that knows about fibres gives, if they are not regular ones alone."""
    last = ran[-1] if ran else None
    if isinstance(last, QuotientNorm):
        return last.group.quotient_type(last.fields)
    return last.out_type if isinstance(last, QuotientConv2d) else None


def _named(stages: list[Tensor]) -> dict[str, Tensor]:
    return {f"stage {i}": stage for i, stage in enumerate(stages)}


def leaves(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Leaf modules by path. A `FibreNorm`, `GroupMapNorm` or `PerElement` is one: what is in it sees fibres as rows or
    as images, which follow no law of maps. So is a module that restricts its own output, beside the leaves in it."""
    children = [] if isinstance(module, FibreNorm | GroupMapNorm | PerElement) else list(module.named_children())
    if not children or isinstance(module, Restriction):
        yield path, module
    for name, child in children:
        yield from leaves(child, f"{path}.{name}" if path else name)


@contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collects the first output tensor of every leaf, in order of execution."""
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: tuple, output: object) -> None:
            if isinstance(module, Restriction) and isinstance(output, list | tuple):
                output = output[0]
            if isinstance(output, Tensor):
                outputs.setdefault(name, output.clone())  # cloned: an in-place activation may follow

        return record

    with removing([module.register_forward_hook(hook(name)) for name, module in leaves(model)]):
        yield outputs


ROUNDING = 1e-8
"""The largest error in float64 that no broken symmetry makes, of networks with random weights."""


@torch.no_grad()
def first_broken_layer(
    model: nn.Module,
    x: Tensor,
    group: Group,
    elements: Iterable[int] | None = None,
    stage: tuple[nn.Module | None, nn.Module | None] = (None, None),
    inner: bool = True,
) -> str | None:
    """The name of the first leaf module whose output does not transform with x; None if all do.

    A leaf's own law is not known here: its output may be an image, regular fields with channels first or last, both in
    one, either with its pixels in a row, in patches or flattened with the channels, what pixels or channels attend to
    which, or a vector. A leaf is blamed only if no law that fits its shape holds. Where no leaf is to blame, but the
    network's own output does not follow, the name is "", the network's.

    Args:
        model: float64, in eval mode.
        x: (B, C, H, W), with H = W if ``inner``.
        group: which group.
        elements: which elements; by default all that are exact on the grid.
        stage: the leaves that run first and next after the ones looked at; None for all from the start, or to the end.
        inner: whether leaves are looked at, not the network's own outputs alone.
    """
    expected, signed = _recorded_outputs(model, x), _has_vectors(model)
    outputs_of_all = [name for name in expected if name == "" or name.startswith("[")]
    pairs = _vector_channels(model, outputs_of_all) or {}
    ran, paths = list(expected), {module: name for name, module in model.named_modules()}
    first, end = (None if leaf is None else ran.index(paths[leaf]) for leaf in stage)
    for g in group.grid_elements if elements is None else elements:
        outputs = _recorded_outputs(model, group.transform_image(x, g))
        for name in ran[first:end] if inner else outputs_of_all:
            found = outputs[name]
            laws = _possible(group, expected[name], g, found, signed and name not in pairs)
            if name not in outputs_of_all:
                laws = chain(laws, _possible_vectors(group, expected[name], g))
            elif expected[name].ndim == 3:
                laws = chain(laws, _possible_rows(expected[name], found, signed))
            if pairs.get(name) and expected[name].ndim > 1:  # not what is computed of one of their channels
                laws = iter([group.transform_vectors(expected[name], g, pairs[name])])
            if not any(relative_error(found, moved) <= ROUNDING for moved in laws):
                return name
    return None


def _recorded_outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The outputs of all leaves by name, and the network's own, under "", last."""
    with _recorded(model) as outputs, KeepDouble():
        output = model(x)
    if isinstance(output, Tensor):
        return outputs | {"": output}
    # Tensors in a list, a tuple or a dictionary: a path in the output, which is none of a module.
    return outputs | {f"[{i}]": y for i, y in enumerate(tensors_in(output)) if y.ndim}  # a number is a loss, say


def _possible(group: Group, y: Tensor, g: int, found: Tensor, signed: bool) -> Iterator[Tensor]:
    """y transformed by g under every law that its shape allows; of maps also by the channels' permutation that is
    nearest to ``found``, and if it is ``signed`` with other signs, of vectors, too."""
    if y.ndim == 4:  # what most are; where a law holds, no other is tried
        yield from _possible_maps(group, y, g, found, signed)
    yield y
    if signed and y.ndim == 2:
        yield _nearest(y, found, signed)
    if _is_pose(y, group):
        yield _move_pose(group, y, g)
    regular_first = y.ndim > 1 and y.shape[1] % group.order == 0
    if y.ndim == 2 and regular_first:
        yield group.transform_features(y, g)
    if y.ndim == 3:  # a map of one channel, squeezed
        yield group.transform_image(y, g)
    if y.ndim == 5:
        yield from _anchored(group, y, g)
    rows: list[Tensor] = []
    if y.ndim == 3 and _is_square(y.shape[1]):  # pixels in a row, channels last
        rows.append(_move_row(group, y.mT, g).mT)
    if y.ndim in (3, 4) and _is_square(y.shape[-2]) and y.shape[-1] % group.order == 0:  # and fields, of each head
        rows.append(_move_row(group, _move_fibres(group, y, g).mT, g).mT)
    if y.ndim == 4 and _is_square(y.shape[2]) and _is_square(y.shape[3]):  # what pixels attend to which
        rows.append(_move_row(group, _move_row(group, y, g).mT, g).mT)
    yield from rows
    if _is_square(len(y)):  # the pixels of a patch in place of images
        for moved in rows:
            yield _move_row(group, moved.movedim(0, -1), g).movedim(-1, 0)
    if y.ndim == 4 and y.shape[2] % group.order == y.shape[3] % group.order == 0:  # what channels attend to which
        yield _move_fibres(group, _move_fibres(group, y, g).mT, g).mT
    if y.ndim == 4:
        last = y.permute(0, 3, 1, 2)  # channels last
        yield group.transform_image(last, g).permute(0, 2, 3, 1)
        if y.shape[-1] % group.order == 0:
            yield group.transform_features(last, g).permute(0, 2, 3, 1)
    if y.ndim == 4 and _is_square(y.shape[2]) and _is_square(y.shape[3]):  # in a patch, and of which patch
        inside = math.isqrt(y.shape[2])
        for moved in _possible_maps(group, _folded(y, inside), g, _folded(found, inside), signed):
            yield _unfolded(moved, inside)


def _anchored(group: Group, y: Tensor, g: int) -> list[Tensor]:
    """Logits of several anchors a pixel, (B, anchors, C, H, W) or (B, anchors, H, W, C), transformed by g."""
    return [group.transform_image(y, g), group.transform_image(y.movedim(4, 2), g).movedim(2, 4)]


def _possible_vectors(group: Group, y: Tensor, g: int) -> Iterator[Tensor]:
    """Regular fields (B, fields * |G| * side * side), flattened with their pixels, of any side, transformed by g."""
    numbers = y.shape[1] // group.order if y.ndim == 2 and y.shape[1] % group.order == 0 else 0
    for side in range(2, math.isqrt(numbers) + 1):
        if numbers % side**2 == 0:
            yield group.transform_features(y.unflatten(1, (-1, side, side)), g).flatten(1)


def _possible_maps(group: Group, y: Tensor, g: int, found: Tensor, signed: bool) -> Iterator[Tensor]:
    """`_possible` for a map (B, C, H, W)."""
    if y.shape[1] % group.order == 0:
        yield group.transform_features(y, g)
    moved = group.transform_image(y, g)
    yield moved
    if moved.shape == found.shape:
        yield _nearest(moved, found, signed)


def _nearest(moved: Tensor, found: Tensor, signed: bool) -> Tensor:
    """``moved`` (B, C, ...) with its channels in the order of ``found``, and if ``signed`` with their signs."""
    weights = torch.rand(moved.shape[2:], generator=torch.Generator().manual_seed(0)).to(moved)
    sums = [(x * weights).transpose(0, 1).flatten(1).sum(1) for x in (moved, found)]  # of each channel
    old, new = ((x.abs() if signed else x).argsort() for x in sums)  # alike in their order
    source = old[new.argsort()]
    signs = (sums[0][source].sign() * sums[1].sign()).view(-1, *(1,) * (moved.ndim - 2))
    return moved[:, source] * signs if signed else moved[:, source]


def _possible_rows(y: Tensor, found: Tensor, signed: bool) -> Iterator[Tensor]:
    """y (B, rows, numbers) with its rows in the order of ``found``.

    If ``signed`` the numbers of a row are compared without signs, in order of size: they may be vectors, such as the
    sides of a box.
    """
    if y.shape == found.shape:
        given, wanted = ((x.abs().sort(2).values if signed else x) for x in (y, found))
        yield found + _nearest(given, wanted, False) - wanted


def _folded(y: Tensor, inside: int) -> Tensor:
    """Square patches (B, C, pixels of a patch, patches) as a square map; ``inside`` is the side of a patch."""
    patches = y.unflatten(3, (math.isqrt(y.shape[3]), -1)).unflatten(2, (inside, inside))  # (B, C, y, x, rows, columns)
    return patches.permute(0, 1, 4, 2, 5, 3).flatten(4).flatten(2, 3)


def _unfolded(y: Tensor, inside: int) -> Tensor:
    """`_folded` undone."""
    patches = y.unflatten(3, (-1, inside)).unflatten(2, (-1, inside))  # (B, C, rows, y, columns, x)
    return patches.permute(0, 1, 3, 5, 2, 4).flatten(4).flatten(2, 3)


def _is_square(pixels: int) -> bool:
    return math.isqrt(pixels) ** 2 == pixels


def _move_row(group: Group, y: Tensor, g: int) -> Tensor:
    """The pixels of a square image, in a row along the last dimension, moved by g."""
    side = math.isqrt(y.shape[-1])
    return group.transform_image(y.unflatten(-1, (side, side)), g).flatten(-2)


def _move_fibres(group: Group, y: Tensor, g: int) -> Tensor:
    """Regular fibres along the last dimension, moved by g."""
    return group.transform_features(y.flatten(0, -2), g).view(y.shape)


def _is_pose(y: Tensor, group: Group) -> bool:
    """Whether y has the shape of pose logits (B, classes, |G|), or of maps of them."""
    return y.ndim in (3, 5) and y.shape[2] == group.order


def _move_pose(group: Group, y: Tensor, g: int) -> Tensor:
    return group.transform_features(y.flatten(1, 2), g).unflatten(1, y.shape[1:3])
