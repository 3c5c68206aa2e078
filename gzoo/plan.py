"""Choosing widths: how many regular fields stand in for the channels of a plain network, before anything is built.

`gzoo.trace` finds the segments, channels whose number is free. A segment of C plain channels gets about s * C fields,
where s = 1 / sqrt|G| keeps the parameters of a dense layer and 1 / |G| its multiply-adds. Where that misses the whole
network's number by more than 10% (lifting layers, classifiers and rounding follow other laws), s is searched for. A
narrow network over a large group may miss it all the same, as no width is less than a field; `comparison` says so.
"""

import difflib
import math
import warnings
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain as flatten
from typing import Any, Literal

import timm
import torch
from timm.layers import CondConv2d
from torch import Tensor, nn

from gzoo import groups
from gzoo.bases import BasisName, lifting_basis, regular_basis
from gzoo.check import in_channels, input_size
from gzoo.equivariant import classifiers, group_of, like, tensors_in
from gzoo.groups import Directions, DoubleAngle, Group
from gzoo.nn.functions import Calls
from gzoo.segments import Segment, Segments, flat
from gzoo.trace import Trace, channels_of, is_table, sources_of, trace

Match = Literal["params", "flops", "width"]

SCALE: dict[Match, Callable[[int], float]] = {
    "params": lambda order: 1 / math.sqrt(order),
    "flops": lambda order: 1 / order,
    "width": lambda order: 1.0,
}

Vectors = Mapping[str, Directions]

WHOLE_NETWORK = "gzoo.equivarify and gzoo.canonicalize take any network that gives vectors or maps, as it is"

# Sides of the images that a network is tried with that does not name the size of its own, in pixels.
SIDES = (64, 128, 256, 224, 32, 28, 299)

_TOLERANCE = 0.1  # of the plain network's parameters or multiply-adds


@dataclass(frozen=True)
class Row:
    """A layer or a stage: parameters, multiply-adds of one image, and the widest map, plain and equivariant.

    ``plain_width`` is in channels, ``fields`` in regular fields.
    """

    name: str
    plain_width: int
    plain_params: float
    plain_macs: float
    fields: int
    params: float
    macs: float

    def ratio(self, match: str) -> float:
        """How many times the plain parameters there are, or for "flops" the plain multiply-adds."""
        return self.macs / max(self.plain_macs, 1) if match == "flops" else self.params / self.plain_params


@dataclass(frozen=True)
class Fit:
    """What `plan` chose for a network, and another may keep that differs in its classes or in the image's channels.

    Attributes:
        scale: fields for each plain channel in the first stage.
        steps: single widths that have a field more or less than that, by their place among all: (channels, fields).
    """

    scale: float
    steps: Mapping[int, tuple[int, int]] = field(default_factory=dict)


@dataclass
class Plan:
    """The widths of an equivariant network. Make one with `plan`.

    Attributes:
        groups: of the network's stages, each a subgroup of the one before; the last one is that of all that follow.
        match: what of the plain network to keep.
        trace: what a run of the plain network showed.
        classifiers: paths of the layers that make logits, which stay as many as they are.
        vectors: the channels that are vectors, by path, of those of them that make vectors.
        sides: "start" or "end", of maps that are padded or cropped there more than on the other side, at any size.
        idle: paths of modules with parameters that run neither in evaluation nor in training.
        constants: names of the buffers that no run changes, in training neither.
        side: of the images that the plain network ran on, in pixels.
        vector_outputs: the same of each tensor that the network gives, by the number of these tensors, which
            may be more in training.
        field_outputs: whether each of them is a vector of regular fields, in the same way.
        widths: plain channels -> fields, where they are given.
        basis: of the kernels, as `gzoo.nn.GroupConv2d` takes it.
        scale: fields for each plain channel in the first stage; in the others as ``match`` has it for their group.
            Where one scale misses what is to be kept, single widths have a field more or less.
        fit: whether widths may give way, to keep what the match says of the whole network.
        steps: the single widths that do, as `Fit` has them.
    """

    model: nn.Module
    groups: tuple[Group, ...]
    match: Match
    trace: Trace
    classifiers: frozenset[str]
    widths: Mapping[int, int]
    basis: BasisName | None
    scale: float
    fit: bool = True
    steps: dict[int, tuple[int, int]] = field(default_factory=dict)
    vectors: Vectors = field(default_factory=dict)
    sides: set[str] = field(default_factory=set)
    idle: frozenset[str] = frozenset()
    constants: frozenset[str] = frozenset()
    side: int = SIDES[0]
    vector_outputs: dict[int, list[Directions]] = field(default_factory=dict)
    field_outputs: dict[int, list[bool]] = field(default_factory=dict)
    _known: dict[Segment, int] = field(default_factory=dict)

    @property
    def fitted(self) -> Fit:
        """Of these widths, what `plan` takes for a network like this one."""
        return Fit(self.scale, self.steps)

    @cached_property
    def stages(self) -> list[str]:
        """Paths of the modules behind each of which the group may become smaller."""
        if len(self.groups) == 1:
            return []

        info = getattr(self.model, "feature_info", None)
        paths = [level.get("module") for level in getattr(info, "info", info) or ()]
        modules = dict(self.model.named_modules())
        convolutions = [name for name, module in modules.items() if isinstance(module, nn.Conv2d)]
        stages = [
            path
            for path in paths
            if path in modules and "stem" not in path and any(name.startswith(f"{path}.") for name in convolutions)
        ]
        if len(stages) < len(self.groups):
            raise ValueError(
                f"{groups.spell(self.groups)} names {len(self.groups)} groups, but {type(self.model).__name__} has "
                f"{len(stages)} stages ({', '.join(stages) or 'none in feature_info'}). Name at most one for each; the "
                "last one holds for all that follow. A network of your own says where its stages end: "
                "model.feature_info = [{'module': 'path.of.the.first', 'num_chs': 64, 'reduction': 2}, ...]"
            )
        return stages[: len(self.groups) - 1]

    def group_at(self, path: str) -> Group:
        """The group of the module called ``path``: of the stage it is in, or of the one that runs next."""
        return self.groups[bisect_left(self._ends, self._ran(path)[0])] if self.stages else self.groups[0]

    @cached_property
    def _ends(self) -> list[int]:
        return [self._ran(path)[-1] for path in self.stages]

    def _ran(self, path: str) -> list[int]:
        """When the leaves in the module called ``path`` ran first."""
        order = self.trace.order
        return [i for i, name in enumerate(order) if name == path or name.startswith(f"{path}.")] or [0]

    @cached_property
    def _homes(self) -> dict[Segment, Group]:
        """The group of the layer that makes a segment; behind a restriction it stands for fields of a subgroup."""
        homes: dict[Segment, Group] = {}
        for name in self.trace.order:
            for segment in flat(self.trace.outputs.get(name, ())):
                homes.setdefault(segment, self.group_at(name))
        return homes

    @cached_property
    def followed(self) -> set[Segment]:
        """The channels of all maps that layers are given or give."""
        maps = (*self.trace.inputs.values(), *self.trace.outputs.values())
        return {part for segments in maps for part in flat(segments)}

    @cached_property
    def calls(self) -> Calls:
        """What the functions that the network calls go by, in these widths."""
        seen = self.trace
        return Calls(
            channel_pads={
                (*named, self.channels(around[1])): (self.channels(around[0]), self.channels(around[2]))
                for named, around in seen.padded
            },
            channel_slices={
                (*named, self.channels(whole)): (
                    self.channels(before),
                    self.channels(before) + self.channels(piece),
                )
                for named, (before, piece, whole) in seen.sliced
            },
            rows=frozenset(seen.rows),
            maps=frozenset(seen.maps),
            shuffles={(self.channels(part), n): self.group_at(path).order for path, part, n in seen.shuffled},
            pads=bool(self.sides or seen.padded),
            crops=len(self.sides) == 1,  # where both sides are cropped or padded, the difference may be meant
        )

    def channels(self, segments: Segments) -> int:
        """Channels in place of some plain ones; of the image's, their own number."""
        return sum(self._segment_channels(segment) for segment in flat(segments))

    def fields(self, segments: Segments, path: str) -> int:
        """The regular fields that `channels` are at the module called ``path``; of the image's, their own number."""
        order = self.group_at(path).order
        return sum(self._segment_channels(part) // (1 if part.image else order) for part in flat(segments))

    def _segment_channels(self, segment: Segment) -> int:
        if segment.image:
            return segment.size
        home = self._homes.get(segment, self.groups[-1])
        if segment.unfolded:
            parts = flat((segment.unfolded,))
            return (
                sum(part.size if part.image else self._segment_channels(part) // home.order for part in parts)
                * home.order
            )
        if segment not in self._known:
            self._known[segment] = self.widths.get(segment.size) or self._near(segment, home)
        return self._known[segment] * home.order

    def _near(self, segment: Segment, home: Group) -> int:
        law = SCALE[self.match]
        wanted = segment.size * self.scale * law(home.order) / law(self.groups[0].order)
        if not self.fit:
            self._require_whole(segment.size)
            return round(wanted)
        if not segment.groups:
            return max(1, round(wanted))
        groups = max(segment.groups)  # a width with a divisor near the number of groups

        def far(fields: int) -> float:
            divisor = nearest_divisor(fields, groups)
            return abs(math.log(fields / wanted)) + 0.5 * abs(math.log(divisor / min(groups, max(wanted, 1))))

        return min(range(max(1, math.floor(0.8 * wanted)), math.ceil(1.25 * wanted) + 1), key=far)

    @property
    def gives_fibres(self) -> bool:
        """Whether the output is a vector of regular fields, as a feature extractor gives that ends in global pooling.

        Not what a linear layer made, whose number of channels may be meant, nor what was normalized over channels.
        """
        result, later = self.trace.result, self.trace.functions[self.trace.after_layers :]
        if not isinstance(result, Tensor) or result.ndim != 2 or any(name in _OVER_CHANNELS for name, _ in later):
            return False
        own, modules = set(channels_of(result)), dict(self.model.named_modules())
        linear = [name for name in self.trace.order if isinstance(modules[name], nn.Linear)]
        return bool(own) and not any(part.image for part in own) and not _makers(own, linear, self.trace)

    def why_lost(self, name: str) -> str:
        """Why the channels that a layer is given could not be followed."""
        step = self.trace.lost[name]
        if step in _AS_MODULES:
            return f"its channels come out of the function {step!r}; use the module {_AS_MODULES[step]} in its place"
        if step in ("cat", "concat", "concatenate", "stack"):
            return (
                f"its channels come out of {step!r} with a tensor that is not made of the image, such as positions, "
                "a class token or noise, or has its channels elsewhere. Give positions as channels of the image. "
                f"{WHOLE_NETWORK}"
            )
        return (
            f"its channels come out of {step!r}, through which gzoo cannot follow them: a step that mixes channels or "
            "pixels, such as attention, or a flattened map that something other than a linear layer or a batch norm "
            "reads, has no equivariant counterpart here. "
            f"Use a convolution, or global pooling before it. {WHOLE_NETWORK}"
        )

    def _require_whole(self, channels: int) -> None:
        share, order = round(1 / self.scale), self.groups[0].order
        if channels % share:
            low = channels - channels % share
            raise ValueError(
                f"{channels} channels are {channels / order:g} fields of |G| = {order}; a whole number is needed. "
                f"Choose {f'{low} or ' if low else ''}{low + share} channels, or weights='transfer'"
            )

    def groups_of(self, conv: nn.Conv2d | nn.ConvTranspose2d | CondConv2d, in_fields: int, out_fields: int) -> int:
        """The ``groups`` of the equivariant counterpart of a plain convolution."""
        if 1 < conv.groups == conv.in_channels and out_fields % in_fields == 0:
            return in_fields  # depthwise
        return nearest_divisor(math.gcd(in_fields, out_fields), conv.groups)

    def layers(self) -> Iterator[Row]:
        """A row for each layer that has parameters, in the order in which they run."""
        modules = dict(self.model.named_modules())
        for name in self.trace.inputs:
            own = sum(parameter.numel() for parameter in modules[name].parameters(recurse=False))
            if own and name in self.trace.outputs:
                yield self._row(name, modules[name], own)

    def _row(self, name: str, module: Any, own: int) -> Row:
        inputs, outputs = flat(self.trace.inputs[name]), flat(self.trace.outputs[name])
        plain_in, plain_out = (sum(segment.size for segment in segments) for segments in (inputs, outputs))
        fields_in, fields_out = self.fields(inputs, name), self.fields(outputs, name)
        is_linear = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
        side = self.trace.flattened.get(name, (1,))[0]  # of the map that a linear layer is given as a vector
        if name in self.classifiers and is_linear and name not in self.vectors and side == 1:  # on pooled fibres
            weights = module.weight.numel() / plain_in
            pixels = self.trace.pixels[name]
            return Row(
                name,
                plain_out,
                own,
                weights * plain_in * pixels,
                plain_out,
                own + weights * (fields_in - plain_in),
                weights * fields_in * pixels,
            )
        if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d | CondConv2d | nn.Linear):
            return Row(name, plain_out, own, 0, fields_out, own / plain_in * fields_in, 0)
        group, pixels = self.group_at(name), self.trace.pixels[name]
        order = group.order
        lifts = all(segment.image for segment in inputs)
        experts = getattr(module, "num_experts", 1)  # an image is convolved with one mixture of their filters
        makes = self.trace.unflattened.get(name, 1)  # side of the map that a linear layer gives as a vector
        if isinstance(module, nn.Linear) and side * makes > 1:
            side *= makes
            taps, free, groups = side**2, _free_numbers(group, (side, side), lifts, self.basis), 1
        elif isinstance(module, nn.Linear):
            taps, free, groups = 1, 1 if lifts or all(segment.image for segment in outputs) else order, 1
        else:
            folded = max(segment.folded for segment in inputs)  # into channels; the kernel is as many times as wide
            fields_in //= folded**2
            kernel = tuple(folded * side for side in module.kernel_size)
            taps = max(kernel) ** 2
            groups = self.groups_of(module, fields_in, fields_out)
            free = _free_numbers(group, kernel, lifts, self.basis)
        kernels = fields_out * fields_in / groups
        bias = 0 if module.bias is None else fields_out * _free_numbers(group, (makes, makes), True, self.basis)
        macs = kernels * order * (1 if lifts else order) * taps * pixels
        plain_macs, params = module.weight.numel() / experts * pixels, experts * (kernels * free + bias)
        return Row(name, plain_out, own, plain_macs, fields_out, params, macs)

    def total(self) -> Row:
        """All layers together."""
        return _sum("total", list(self.layers()))

    def rows(self) -> list[Row]:
        """The layers together by stage: by the first part of their path, by two where the first is a list."""
        rows: dict[str, list[Row]] = {}
        for row in self.layers():
            first, *rest = row.name.split(".")
            listed = rest and isinstance(getattr(self.model, first), nn.Sequential | nn.ModuleList) and len(rest) > 1
            stage = f"{first}.{rest[0]}" if listed and first in _LISTS else first
            rows.setdefault(stage, []).append(row)
        return [_sum(stage, members) for stage, members in rows.items()]


_LISTS = ("stages", "blocks", "features", "layers", "body")  # timm's names for what holds the stages


def _sum(name: str, rows: list[Row]) -> Row:
    widest = max(rows, key=lambda row: row.plain_width)
    numbers = (sum(getattr(row, key) for row in rows) for key in ("plain_params", "plain_macs", "params", "macs"))
    plain_params, plain_macs, params, macs = numbers
    return Row(name, widest.plain_width, plain_params, plain_macs, widest.fields, params, macs)


def _free_numbers(group: Group, kernel_size: tuple[int, ...], lifts: bool, name: BasisName | None) -> int:
    """Parameters of one kernel."""
    basis = (lifting_basis if lifts else regular_basis)(group, max(kernel_size), name)
    if basis.samples is None:
        return math.prod(kernel_size) * (1 if lifts else group.order)
    return math.prod(basis.parameters)


def nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of n that is nearest to ``wanted``, as a ratio."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(math.log(d / wanted)))


def plan(
    model: nn.Module,
    chain: tuple[Group, ...],
    match: Match = "params",
    widths: Mapping[int, int] | None = None,
    fitted: Fit | None = None,
    basis: BasisName | None = None,
    classifier: str | Sequence[str] | None = None,
    fit: bool = True,
    vectors: Vectors | None = None,
) -> Plan:
    """Plans the conversion of a plain network.

    Args:
        model: a plain network (B, C, H, W) -> logits; stays as it is.
        chain: the groups of the network's stages, mostly one; see `gzoo.groups.chain`.
        match: what to keep of the plain network: its "params", its "flops" (multiply-adds), or its "width".
        widths: plain channels -> fields, where they differ from ``match``.
        fitted: what `Plan.fitted` says of a network like this one, in place of what ``match`` leads to.
        basis: of the kernels, "pixel", "steerable" or "steerable_3r"; None chooses by the group.
        classifier: path of the layer that makes the logits, or of several, "" for none; by default found as
            `gzoo.convert` says.
        fit: whether widths may give way, to keep what ``match`` says of the whole network; else ``match`` holds for
            each width, and where C / |G| is no whole number, `Plan.fields` is an error.
        vectors: channels that are vectors, by the path of the layer that makes them.

    Raises:
        ValueError: the network is equivariant already, has no convolution or a linear layer over pixels, does not run,
            or has fewer stages than groups; ``match``, ``classifier`` or ``vectors`` is unknown.
    """
    if match not in SCALE:
        raise ValueError(f"match is {match!r}; accepted are {', '.join(map(repr, SCALE))}")
    if group_of(model) is not None:
        raise ValueError(f"{type(model).__name__} is equivariant already; convert the plain network")
    _require_convolution(model)
    if widths is not None and not isinstance(widths, Mapping):
        raise ValueError(f"widths is {widths!r}; it takes fields by plain channels, such as {{64: 32}}")
    paths = frozenset() if classifier is None else _named(classifier)
    for path in paths:
        if not isinstance(dict(model.named_modules()).get(path), _MAKES_LOGITS):
            raise ValueError(
                f"classifier is {path!r}; {type(model).__name__} has no convolution or Linear of that path. Give the "
                "path of a layer that makes logits, as named_modules() spells it, a list of several, or '' if none"
            )
    x, evaluation = first_run(model)
    training = _training(model, x)
    seen = training if training and _has_more_layers(training, evaluation) else evaluation
    sides = set(flatten.from_iterable(seen.one_sided.values()))
    for other in (evaluation, training, _at_odd_size(model, x, evaluation.with_numbers)):
        if other and other is not seen:
            seen.asymmetric |= other.asymmetric
            seen.rows |= other.rows
            seen.maps |= other.maps
            sides |= set(flatten.from_iterable(other.one_sided.values()))
    if seen.over_pixels:
        raise ValueError(
            f"{seen.over_pixels[0]} is linear over pixels or tokens, each with a weight of its own, which has no "
            f"equivariant counterpart here; use a convolution. {WHOLE_NETWORK}"
        )
    for step in (getattr(y, "gzoo_lost", "") for y in tensors_in(seen.result) if not channels_of(y)):
        if step in _AS_MODULES and not seen.lost:  # by a layer that says so itself
            raise ValueError(
                f"{type(model).__name__} gives what the function {step!r} makes; use the module {_AS_MODULES[step]} in "
                "its place"
            )
    vectors = vectors or {}
    _require_vectors(model, vectors)
    found = paths
    if classifier is None:
        found = _classifiers(model, evaluation, vectors)
        found |= _more_in_training(model, evaluation, training, found, vectors)
    found |= vectors.keys()
    _require_last(model, vectors, seen)
    for segment in (part for path in found for part in flat(seen.outputs.get(path, ()))):
        segment.image = True  # logits have no fibre, wherever they go
    sizes = {part.size for segments in seen.outputs.values() for part in flat(segments) if not part.image}
    for channels, fields in (widths or {}).items():
        if channels not in sizes:
            raise ValueError(f"widths has {channels!r}, which is no width of {type(model).__name__}: {sorted(sizes)}")
        if not isinstance(fields, int) or fields < 1:
            raise ValueError(f"widths gives {channels} channels {fields!r} fields; the least is 1, and they are whole")
    scale = fitted.scale if fitted else SCALE[match](chain[0].order)
    made = Plan(model, chain, match, seen, found, widths or {}, basis, scale, fit, vectors=vectors, side=x.shape[-1])
    made.sides = sides
    if training:  # else it may want more than images then, and run what stays idle in evaluation
        made.idle = _idle(model, evaluation.ran | training.ran)
        made.constants = frozenset(dict(model.named_buffers()).keys() - evaluation.written - training.written)
    for run in (training, evaluation) if vectors else ():
        pairs = _vector_outputs(run, vectors) if run else []
        made.vector_outputs[len(pairs)] = pairs
    for run in (training, evaluation):
        are_fields = [_is_vector_of_fields(y) for y in tensors_in(run.result) if y.ndim] if run else []
        made.field_outputs[len(are_fields)] = are_fields
    if not seen.inputs.keys() & seen.outputs.keys() & {name for name, _ in _layers(model)}:
        lost = next(
            (f"{name}: {made.why_lost(name)}" for name in seen.lost), "no layer with parameters runs on an image"
        )
        raise ValueError(f"nothing of {type(model).__name__} can be followed. {lost}")
    if classifier is None and not found:
        _say_that_fields_stay(model, x, made)
    if fitted:
        made.total()  # knows all segments
        for place, segment in enumerate(made._known):
            channels, fields = fitted.steps.get(place, (0, 0))
            if channels == segment.size:
                made._known[segment] = fields
    elif fit and match != "width":
        _fit(made, match)
    return made


def _at_odd_size(model: nn.Module, x: Tensor, with_numbers: bool) -> Trace | None:
    """What a run on images a pixel larger shows, which may be the first to pad; of timm's networks that is known."""
    if hasattr(model, "get_classifier"):
        return None
    try:
        return trace(model, torch.nn.functional.pad(x, (0, 1, 0, 1)), with_numbers=with_numbers)
    except ValueError:
        return None


def _idle(model: nn.Module, ran: set[str]) -> frozenset[str]:
    """The modules with parameters in which nothing ran, the outermost of them; of lists their members."""
    idle: list[str] = []
    for name, module in model.named_modules():
        is_inside = any(name.startswith(f"{path}.") for path in idle)
        is_list = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)
        runs = any(other == name or other.startswith(f"{name}.") for other in ran)
        if name and not (is_inside or is_list or runs) and any(True for _ in module.parameters()):
            idle.append(name)
    return frozenset(idle)


def _require_convolution(model: nn.Module) -> None:
    """Raises ValueError for a network without a Conv2d, and says what it has."""
    layers = dict(_layers(model))
    if any(isinstance(layer, nn.Conv2d) for layer in layers.values()):
        return
    text = f"{type(model).__name__} has no Conv2d, and gzoo converts networks of 2D images that begin with one"
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv1d | nn.Conv3d):
            raise ValueError(f"{text}; {name or 'it'} is a {type(layer).__name__}")
    held = ", ".join(dict.fromkeys(type(layer).__name__ for layer in layers.values())) or "none"
    raise ValueError(f"{text}; its layers with parameters are: {held}. {WHOLE_NETWORK}")


def _require_vectors(model: nn.Module, vectors: Any) -> None:
    """Raises ValueError unless ``vectors`` has channels by the path of a layer that can make vectors."""
    layers = dict(model.named_modules())
    if not isinstance(vectors, Mapping):
        raise ValueError(f"vectors is {vectors!r:.60}; it takes channels by path, as in {{'flow': [(0, 1)]}}")
    for path, given in vectors.items():
        layer: Any = layers.get(path)
        if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) or not given:
            alike = [name for name in layers if name.endswith(f".{path}")]
            hint = f" ({alike[0]!r}?)" if alike else ""
            raise ValueError(
                f"vectors has {path!r}: {given!r:.60}; it takes the path of a convolution or Linear of "
                f"{type(model).__name__} that makes vectors, as named_modules() spells it{hint}, and its channels"
            )
        channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        try:
            groups.require_directions(given, channels)
        except ValueError as error:
            raise ValueError(f"vectors of {path}: {error}") from error


def _require_last(model: nn.Module, vectors: Vectors, seen: Trace) -> None:
    """Raises ValueError where a layer reads vectors, each of their channels by itself as if they were numbers, or makes
    them for the pixels of a map with channels last."""
    for path in vectors:
        own = set(flat(seen.outputs.get(path, ())))
        readers = [name for name, given in seen.inputs.items() if not own.isdisjoint(flat(given))]
        readers = [name for name in readers if name in seen.outputs and seen.outputs[name] != seen.outputs[path]]
        if readers:
            raise ValueError(
                f"vectors has {path!r}, whose channels {readers[0]!r} reads, which would take each for a number; name "
                "the layer that makes the output"
            )
        if isinstance(model.get_submodule(path), nn.Linear) and seen.pixels.get(path, 1) > 1:
            raise ValueError(f"vectors has {path!r}, which is linear at each pixel; use a 1x1 convolution in its place")


def _vector_outputs(seen: Trace, vectors: Vectors) -> list[Directions]:
    """The channels that are vectors in each tensor that the network gives; of tables, whose rows hold them, none."""
    # A part may stand several times in one output, where a forward reads C channels as several times the same ones.
    origin: dict[Segment, list[list[tuple[str, int]]]] = {}
    for path in vectors:
        channel = 0
        for part in flat(seen.outputs.get(path, ())):
            origin.setdefault(part, []).append([(path, channel + i) for i in range(part.size)])
            channel += part.size
    found: list[Directions] = []
    for y in (y for y in tensors_in(seen.result) if y.ndim):
        parts = () if is_table(y) else channels_of(y)
        made: list[tuple[str, int]] = []
        for i, part in enumerate(parts):
            held = origin.get(part, [[("", 0)] * part.size])
            made += held[parts[:i].count(part) % len(held)]
        given: list[tuple[int, ...]] = []
        for path, channels in ((path, channels) for path, own in vectors.items() for channels in own):
            places = [[i for i, place in enumerate(made) if place == (path, channel)] for channel in channels]
            kind = DoubleAngle._make if isinstance(channels, DoubleAngle) else tuple
            given += map(kind, zip(*places, strict=False))  # none where one of them stands in another tensor
        found.append(given)
    return found


def _is_vector_of_fields(y: Tensor) -> bool:
    """Whether what the plain network gives as numbers an image, (B, C), has a fibre for each in the converted one."""
    parts = channels_of(y)
    return y.ndim == 2 and bool(parts) and not any(part.image for part in parts)


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that have parameters of their own."""
    return [(name, module) for name, module in model.named_modules() if any(True for _ in module.parameters(False))]


def _fit(made: Plan, match: str) -> None:
    """Searches for the widths that keep what ``match`` says to 10%, if the first do not; the nearest if none do.

    First for one scale of all, then, as narrow widths of one size all round alike, by a field more or less in one after
    the other.
    """

    def ratio(scale: float) -> float:
        made.scale = scale
        made._known.clear()
        return made.total().ratio(match)

    first = made.scale
    errors = {first: abs(math.log(ratio(first)))}
    low, high = first / 8, first * 8  # further down a narrow network comes nearer only by single fields throughout
    while min(errors.values()) > math.log(1 + _TOLERANCE) and high / low > 1.005:
        middle = math.sqrt(low * high)
        found = ratio(middle)
        errors[middle] = abs(math.log(found))
        low, high = (middle, high) if found < 1 else (low, middle)
    found = ratio(min(errors, key=errors.__getitem__))
    split = {part for outputs in made.trace.outputs.values() if len(flat(outputs)) > 1 for part in flat(outputs)}
    for place, segment in enumerate(made._known):  # the parts of a split must stay alike
        if abs(math.log(found)) <= math.log(1 + _TOLERANCE):
            break
        if segment in split or segment.groups or segment.size in made.widths:
            continue
        before = made._known[segment]
        made._known[segment] = max(1, before + (1 if found < 1 else -1))
        changed = made.total().ratio(match)
        if abs(math.log(changed)) < abs(math.log(found)):
            found = changed
            made.steps[place] = (segment.size, made._known[segment])
        else:
            made._known[segment] = before


def comparison(name: str, group: str, basis: BasisName | None = None) -> str:
    """A table of plain and equivariant widths, parameters and multiply-adds by stage, for all that can be matched.

    Args:
        name: a plain model that timm lists.
        group: the name of a group.
        basis: of the kernels, as in `plan`.

    Raises:
        ValueError: timm has no such model; or as `plan`.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 3)
        near = f"near it are {', '.join(close)}" if close else "give a plain one's name, as timm.list_models() has them"
        raise ValueError(f"timm has no model {name!r}; {near}")
    with torch.device("meta"):
        model = timm.create_model(name)
    chain = groups.chain(group)
    plans = {match: plan(model, chain, match, basis=basis) for match in SCALE}
    weighted = [name for name in plans["width"].trace.lost if any(True for _ in model.get_submodule(name).parameters())]
    if weighted:
        raise ValueError(f"{name} does not convert. {weighted[0]}: {plans['width'].why_lost(weighted[0])}")
    columns = [f"{'channels':>8} {'params':>8} {'macs':>8}", *(3 * [f"{'fields':>8} {'params':>8} {'macs':>8}"])]
    shape = "x".join(map(str, example(model).shape[2:]))
    rows = {match: [*made.rows(), made.total()] for match, made in plans.items()}
    width = max(len(row.name) for row in rows["params"])
    orders = ":".join(str(each.order) for each in chain)
    lines = [
        f"{name} over {groups.spell(chain)}, |G| = {orders}; multiply-adds of one image of {shape} pixels",
        " | ".join([" " * width, f"{'plain':26}", *(f"{f'match={match}':26}" for match in rows)]),
        " | ".join(["stage".ljust(width), *columns]),
    ]
    for plain, *others in zip(rows["params"], *rows.values(), strict=True):
        cells = [f"{plain.plain_width:8} {_short(plain.plain_params)} {_short(plain.plain_macs)}"]
        cells += [f"{row.fields:8} {_short(row.params)} {_short(row.macs)}" for row in others]
        lines.append(" | ".join([plain.name.ljust(width), *cells]))
    totals = {match: made.total() for match, made in plans.items()}
    total = " | ".join(f"{'':8} {row.ratio('params'):7.2f}x {row.ratio('flops'):7.2f}x" for row in totals.values())
    missed = [
        f"match={match} misses its 10%: {row.ratio(match):.2f} times the plain network's. A width is at least one "
        "field; a smaller group or a wider network comes nearer"
        for match, row in totals.items()
        if match != "width" and abs(math.log(row.ratio(match))) > math.log(1 + _TOLERANCE)
    ]
    return "\n".join([*lines, f"{'':{width}} | {'':26} | {total}", *missed])


def _short(number: float) -> str:
    """In eight characters, with a unit: 2.64M."""
    unit = next((unit for unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if number >= unit[0]), (1, " "))
    return f"{number / unit[0]:7.2f}{unit[1]}"


def first_run(model: nn.Module) -> tuple[Tensor, Trace]:
    """Random images that a plain network takes, of its own input size or one of `SIDES`, and what they show.

    Raises:
        ValueError: it does not run on any.
    """
    reason: ValueError | None = None
    mixed: tuple[Tensor, Trace] | None = None  # where x.view(-1, 1024) makes other rows than images, a size for others
    for side in SIDES[:1] if input_size(model) else SIDES:
        x = example(model, side=side)
        try:
            seen = trace(model, x)
        except ValueError as error:
            reason = reason or error
            continue
        if not seen.rows_mixed:
            return x, seen
        mixed = mixed or (x, seen)
    if mixed:
        return mixed
    assert reason is not None
    raise reason


def example(model: nn.Module, most: int | None = None, side: int = SIDES[0]) -> Tensor:
    """Random images: two of the network's own input size, at most ``most`` pixels wide and high, or of ``side``."""
    height, width = (input_size(model) or (3, side, side))[1:]
    parameter, channels = like(model), in_channels(model)
    generator = torch.Generator().manual_seed(0)
    size = (min(height, most or height), min(width, most or width))
    x = torch.randn(2, channels, *size, generator=generator, device="cpu")
    return x.to(parameter.device, parameter.dtype)


# They reduce all pixels alike.
REDUCTIONS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten)

_AS_MODULES = {"pixel_shuffle": "torch.nn.PixelShuffle", "pixel_unshuffle": "torch.nn.PixelUnshuffle"}

_MAKES_LOGITS = nn.Conv2d | nn.ConvTranspose2d | nn.PixelShuffle | nn.Linear

# Functions that leave logits what they are.
_COPIES = {"interpolate", "__getitem__", "contiguous", "to", "type", "float", "double", "half", "bfloat16"}
# Functions that add maps up, or put one beside another.
_SUMS = {"add", "__add__", "__radd__", "__iadd__", "add_", "sub", "__sub__", "__rsub__", "sum", "stack", "cat"}
_OVER_CHANNELS = {"normalize", "norm", "linalg_vector_norm", "softmax", "log_softmax"}


def _classifiers(model: Any, seen: Trace, vectors: Collection[str] = ()) -> frozenset[str]:
    """The layers that make logits: timm's classifier, or those in it (two where a network was distilled).

    Else the convolutions whose maps are the output (see `_score_maps`). Else the last layer that the output has its
    channels from, if it is linear, or a convolution whose map is pooled to a vector (activations and dropout may
    follow), or one whose map is the output and has as many channels as the image, or a few (anything may follow), as
    that of an autoencoder. A convolution whose map is added to the image is one, too. What the layers ``vectors`` make
    is known, and says nothing of the other outputs.
    """
    modules = dict(model.named_modules())
    if hasattr(model, "get_classifier"):
        heads = classifiers(model)
        paths = [name for name, module in modules.items() if any(module is head for head in heads)]
        if not paths or isinstance(heads[0], nn.Linear | nn.Conv2d):
            return frozenset(paths)
        starts = tuple(f"{path}." for path in paths)
        inside = [name for name in modules if name.startswith(starts) and isinstance(modules[name], nn.Linear)]
        return frozenset(name for name in inside if modules[name].out_features == model.num_classes)
    layers = [name for name in seen.order if isinstance(modules[name], _MAKES_LOGITS)]
    if not layers:
        return frozenset()
    results = [y for y in tensors_in(seen.result) if y.ndim > 1 or channels_of(y)]  # single numbers are parts
    known = {part for path in vectors for part in flat(seen.outputs.get(path, ()))}
    results = [y for y in results if not known or not known.issuperset(sources_of(y))]
    makers = [_makers(set(channels_of(y)), layers, seen) for y in results]
    linear = [[name for name in names if isinstance(modules[name], nn.Linear)] for names in makers]
    if len(results) > 1 and any(y.ndim <= 2 for y in results):
        if all(names and y.ndim <= 2 for y, names in zip(results, linear, strict=True)):
            return frozenset(flatten.from_iterable(linear))
        shapes = ", ".join(str(tuple(y.shape)) for y in results)
        likely = [names[-1] for y, *found in zip(results, linear, makers, strict=True) if (names := found[y.ndim > 2])]
        read = {part for name in layers for part in flat(seen.inputs.get(name, ()))}
        likely = [name for name in likely if read.isdisjoint(flat(seen.outputs[name]))] or ["path.of.the.layer"]
        raise ValueError(
            f"{type(model).__name__} gives several outputs, {shapes}; say which layers make logits, as in "
            f"classifier={likely}, or classifier='' if none does. The other outputs stay regular fields, which "
            "gzoo.nn.GroupPool makes invariant"
        )
    if found := _score_maps(results, layers, modules, seen):
        return found
    if len(results) != 1:
        return frozenset()
    own, shape = set(channels_of(results[0])), results[0].shape
    last = makers[0][-1] if makers[0] else layers[-1]
    behind = seen.order[seen.order.index(last) + 1 :]
    later = [modules[name] for name in (_makers(own, behind, seen) if own else behind)]
    if all(segment.image for segment in own) and len(makers[0]) == 1:
        return frozenset(makers[0])
    is_vector = isinstance(modules[last], nn.Linear) and results[0].ndim == 2  # may be normalized, as embeddings are
    held = [m for m in later if not (is_vector and isinstance(m, nn.BatchNorm1d | nn.LayerNorm))]
    if any(True for module in held for _ in module.parameters()):
        return frozenset()
    if not isinstance(modules[last], nn.Linear):
        channels = sum(segment.size for segment in flat(seen.outputs.get(last, ())))
        colours = sum(segment.size for segment in flat(seen.inputs[""]))
        read = {part for name in layers for part in flat(seen.inputs.get(name, ()))}
        is_image = (channels == colours or channels <= min(colours, 4)) and len(makers[0]) <= 1
        is_image |= channels <= min(colours, 4) and own.isdisjoint(read)  # a sum, at the end of a residual decoder
        makes = shape[1:2] == (channels,) and (len(shape) == 2 or is_image)
    else:
        makes = not any(isinstance(module, REDUCTIONS) for module in later)
    # The others are parts of the same logits, or summed up with them.
    summed = makers[0] if makes and not isinstance(modules[last], nn.Linear) else []
    return frozenset([last, *flatten.from_iterable(linear), *summed] if makes else [])


def _score_maps(
    results: list[Tensor], layers: list[str], modules: Mapping[str, nn.Module], seen: Trace
) -> frozenset[str]:
    """The convolutions that make those maps among the outputs that are scores and not features.

    Features end in a norm, in an activation of hidden layers, or in a function of two maps that a network made. But
    scores may be summed up that convolutions with one size of kernel make and nothing else reads (those of an FCN); and
    beside scores an activated map is one of scores, too, if nothing else reads it (distances beside a probability).
    Maps of several sizes are a pyramid of features, but if 1x1 convolutions, and no sums, make all of them; tables,
    whose rows are anchors, have no size. Anything else may happen to scores on their way out.
    """
    if not results or any(y.ndim < 3 for y in results):
        return frozenset()
    own = [set(sources_of(y)) for y in results]
    rows = {part for y in results if is_table(y) for part in sources_of(y)}
    learned = [name for name, module in modules.items() if any(True for _ in module.parameters(recurse=False))]
    read = {part for name in layers for part in flat(seen.inputs.get(name, ()))}
    joined = [flat(given) for name, given in seen.functions if name not in _SUMS]
    makers = {part: _makers({part}, layers, seen) for parts in own for part in parts}

    def is_score(part: Segment) -> bool:
        sizes = {getattr(modules[name], "kernel_size", None) for name in makers[part]}
        is_sum = len(makers[part]) > 1
        return (
            bool(makers[part])
            and not any(isinstance(modules[name], nn.Linear) for name in makers[part])
            and set(makers[part]).issuperset(_makers({part}, learned, seen))  # else a norm
            and not (part in read and (is_sum or part.activated))
            and not (is_sum and (len(sizes) > 1 or any(given.count(part) > 1 for given in joined)) and part not in rows)
        )

    scores = [bool(parts) and all(map(is_score, parts)) for parts in own]
    activated = [any(part.activated for part in parts) for parts in own]
    if all(bent or not score for score, bent in zip(scores, activated, strict=True)):
        return frozenset()
    names = frozenset(
        name for parts, score in zip(own, scores, strict=True) if score for part in parts for name in makers[part]
    )
    if len({y.shape[2:] for y in results if not is_table(y)}) <= 1:
        return names
    are_1x1 = all(getattr(modules[name], "kernel_size", 0) == (1, 1) for name in names)
    single = all(len(found) == 1 and not part.activated for part, found in makers.items())
    return names if are_1x1 and single and all(scores) else frozenset()


def _training(model: nn.Module, x: Tensor) -> Trace | None:
    """What a run as in training shows; None if it wants more than images then, labels say.

    Also of timm's networks: what they give in training is known to timm's code alone.
    """
    if hasattr(model, "get_classifier"):
        return None
    try:
        return trace(model, x, training=True)
    except ValueError:
        return None


def _more_in_training(
    model: nn.Module, evaluation: Trace, training: Trace | None, logits: frozenset[str], vectors: Collection[str]
) -> frozenset[str]:
    """The layers that make maps of logits that a network gives in training beside those of the layers ``logits``.

    And vectors of logits, if layers make them that do not run in evaluation, as auxiliary heads do.
    """
    if training is None:
        return frozenset()
    idle = _has_more_layers(training, evaluation)
    more, held = (sum(y.ndim > 2 - idle for y in tensors_in(run.result)) for run in (training, evaluation))
    if more <= held:
        return frozenset()
    try:
        found = _classifiers(model, training, vectors)
    except ValueError:  # it gives a vector beside a map, say
        if idle and not training.lost:  # else the conversion says which layer
            raise
        return frozenset()
    if logits and not found:
        raise ValueError(
            f"{type(model).__name__} gives {more} outputs in training and {held} in evaluation; say which layers make "
            "logits, as in classifier=['head', 'side']"
        )
    return found


def _has_more_layers(training: Trace, evaluation: Trace) -> bool:
    return training.inputs.keys() > evaluation.inputs.keys()


def bent_logits(
    model: nn.Module, classifier: str | Sequence[str] | None, vectors: Vectors | None = None
) -> frozenset[str]:
    """The layers that make logits if the network goes on with functions of them, such as probabilities; else none.

    Also if some of them are vectors, or rows of a table for each pixel, which the network's outputs do not tell.
    """
    _, seen = first_run(model)
    found = _named(classifier) if classifier is not None else _classifiers(model, seen, vectors or ())
    if vectors:
        return found | vectors.keys()
    if any(is_table(y) for y in tensors_in(seen.result)) and any(seen.pixels.get(path, 1) > 1 for path in found):
        return found
    logits = {part for path in found for part in flat(seen.outputs.get(path, ()))}
    bent = (name for name, given in seen.functions if not logits.isdisjoint(flat(given)))
    return frozenset() if _COPIES.issuperset(bent) else found


def _say_that_fields_stay(model: nn.Module, x: Tensor, made: Plan) -> None:
    """Warns where the map of a decoder, as large as the image, or a vector is taken for features: it may be logits."""
    seen = made.trace
    if hasattr(model, "get_classifier"):
        return
    is_flat = min(seen.pixels.values(), default=0) == x.shape[2:].numel()  # features throughout, as large as the image
    for result in tensors_in(seen.result):
        is_decoder = result.ndim == 4 and result.shape[2:] == x.shape[2:] and not is_flat
        parts = set(channels_of(result))
        is_vector = not made.gives_fibres and _is_vector_of_fields(result)
        if is_decoder or is_vector:
            layers = [name for name in seen.order if isinstance(model.get_submodule(name), _MAKES_LOGITS)]
            makers = _makers(parts, layers, seen) or layers[-1:]
            warnings.warn(
                f"an output of {type(model).__name__} ends in a norm, an activation or a sum, or is one of several "
                "sizes, so it stays regular fields, |G| channels each, which turn with the image. If it is logits, say "
                f"so, as in classifier={makers}; classifier='' says that it is features",
                stacklevel=2,
            )
            return


def _named(classifier: Any) -> frozenset[str]:
    return frozenset(classifier if isinstance(classifier, list | tuple | set) else [classifier]) - {""}


def _makers(own: set[Segment], layers: list[str], seen: Trace) -> list[str]:
    """The layers whose results have some of the channels ``own``."""
    return [name for name in layers if not own.isdisjoint(flat(seen.outputs.get(name, ())))]
