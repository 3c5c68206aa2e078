"""Following the channels of a plain network through one run: which belong together, and where they are taken apart.

A layer makes a `Segment`: channels whose number can be chosen. Adding two maps ties their segments together; a
concatenation strings them; a split cuts them in two. What is left after the run are the free widths of the network.
"""

import contextlib
import copy
import itertools
import math
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import CondConv2d, SpaceToDepth
from timm.models.edgenext import CrossCovarianceAttn, PositionalEncodingFourier
from timm.models.efficientvit_mit import LiteMLA
from timm.models.mobilevit import MobileVitBlock
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gzoo.nn.functions import argument, is_asymmetric, map_named, merges_channels, rows_named, sides_treated
from gzoo.segments import Channels, Segment, Segments, cut, flat, tie, tie_copies, total


@dataclass
class Trace:
    """What one run showed.

    Attributes:
        order: names of the leaf modules in the order in which they first ran.
        ran: names of all modules that ran, or whose parameters another one used.
        inputs: the channels that each module was given first.
        outputs: the channels of each module's result.
        pieces: channels that a module's own forward split off, with their number, in order.
        prefixes: the same for the channels before each piece, and for all.
        widths: the attributes by which a module's own forward says how many channels it splits off, and where.
        pixels: positions at which a layer is applied to one image.
        coupled: modules whose own forward makes channels depend on each other, by a mean, maximum, norm or softmax over
            them, or by products of queries and keys; with these channels.
        over_pixels: linear layers over something else than channels.
        flattened: height and width of the maps that layers are given as vectors, if they have several pixels.
        unflattened: side of the maps that linear layers make as vectors, if they have several pixels.
        tables: linear layers whose vector is an output with more than two dimensions, which no layer read as a map.
        own: what may be channels of the parameters and buffers that a module holds itself, by their names.
        written: buffers that the run changed, by their whole names.
        asymmetric: modules whose own forward calls functions that `gzoo.nn.functions` makes symmetric.
        one_sided: of the modules that pad or crop maps more on one side themselves, "start" or "end".
        padded: numbers of channels that are put before and after others, with those, the others, and those after.
        sliced: first and last number of the channels that are taken of a map, with those before, these, and all.
        rows: numbers a row of the flattened maps that are made by naming that number.
        maps: channels, height and width of the maps that are made of vectors by naming those numbers.
        shuffled: channels of the parts that are shuffled, by the module, and the number of the parts.
        rows_mixed: whether a linear layer is given rows that are no images.
        lost: leaf modules whose input could not be followed, with the operation that lost it.
        functions: those of feature maps that ran, in order, with the channels that they were given.
        after_layers: how many of them ran before the last convolution or linear layer was done.
        with_numbers: whether the network could not do without arithmetic.
        result: the network's output.
    """

    order: list[str] = field(default_factory=list)
    ran: set[str] = field(default_factory=set)
    inputs: dict[str, Segments] = field(default_factory=dict)
    outputs: dict[str, Segments] = field(default_factory=dict)
    pieces: dict[str, list[tuple[int, Segments]]] = field(default_factory=dict)
    prefixes: dict[str, list[tuple[int, Segments]]] = field(default_factory=dict)
    widths: dict[str, set[str]] = field(default_factory=dict)
    pixels: dict[str, int] = field(default_factory=dict)
    coupled: list[tuple[str, Segments]] = field(default_factory=list)
    over_pixels: list[str] = field(default_factory=list)
    flattened: dict[str, tuple[int, int]] = field(default_factory=dict)
    unflattened: dict[str, int] = field(default_factory=dict)
    tables: set[str] = field(default_factory=set)
    own: dict[str, dict[str, Segments]] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)
    asymmetric: set[str] = field(default_factory=set)
    one_sided: dict[str, set[str]] = field(default_factory=dict)
    padded: list[tuple[tuple[int, int], tuple[Segments, Segments, Segments]]] = field(default_factory=list)
    sliced: list[tuple[tuple[int | None, int | None], tuple[Segments, Segments, Segments]]] = field(
        default_factory=list
    )
    rows: set[int] = field(default_factory=set)
    maps: set[tuple[int, ...]] = field(default_factory=set)
    shuffled: list[tuple[str, Segments, int]] = field(default_factory=list)
    rows_mixed: bool = False
    lost: dict[str, str] = field(default_factory=dict)
    functions: list[tuple[str, Segments]] = field(default_factory=list)
    after_layers: int = 0
    with_numbers: bool = False
    result: Any = None


def trace(model: nn.Module, x: Tensor, training: bool = False, with_numbers: bool = True) -> Trace:
    """Runs a copy of ``model`` on x and follows the channels. Without arithmetic, where the model can do without.

    Args:
        model: a plain network; stays as it is.
        x: images (B, C, H, W).
        training: whether it runs as in training.
        with_numbers: whether to try arithmetic where it does not run without.

    Raises:
        ValueError: the network does not run.
    """
    try:
        return _run(lambda: without_numbers(model).train(training), x.to("meta"))
    except Exception as error:  # what reads numbers, or keeps tensors that are no buffers, has to be run for real
        if not with_numbers:
            raise ValueError(f"{type(model).__name__} does not run: {error}") from error
    try:
        seen = _run(lambda: copy.deepcopy(model).train(training), x)
        seen.with_numbers = True
        return seen
    except Exception as error:
        hint = (
            "If it takes other channels, or one size only, say so: "
            "model.pretrained_cfg = {'input_size': (channels, height, width)}"
        )
        if isinstance(error, TypeError) and not getattr(error, "gzoo_path", ""):
            hint = "gzoo converts networks of one argument, images; of one with more, convert the parts that run on one"
        at = getattr(error, "gzoo_path", "")
        raise ValueError(
            f"{type(model).__name__} does not run on a random image of {tuple(x.shape)}{at and f', at {at}'}: {error}. "
            f"{hint}"
        ) from error


def without_numbers(model: nn.Module) -> nn.Module:
    """A copy on the meta device, made without copying what is in the tensors."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _run(copied: Callable[[], nn.Module], x: Tensor, makes_maps: bool = False) -> Trace:
    """One run of a copy; if a layer reads a map that was a vector, another with ``makes_maps``, which makes it one."""
    model, seen = copied(), Trace()
    foreign = {name for name, module in model.named_modules() if _is_foreign(module)}
    follow = _Follow(seen, len(x), foreign, makes_maps)
    for name, module in model.named_modules():
        _mark_own(module, seen.own.setdefault(name, {}))
        _make_followable(module)
        module.register_forward_pre_hook(follow.enter(name), with_kwargs=True)
        module.register_forward_hook(follow.leave(name), with_kwargs=True)
    _mark(x, 1, (Segment(x.shape[1], image=True),))
    before = {name: (buffer, _version(buffer)) for name, buffer in model.named_buffers()}
    try:
        with torch.no_grad(), follow:
            seen.result = model(x)
    except Exception as error:
        error.gzoo_path = follow.path[-1]  # type: ignore[attr-defined]
        raise
    if follow.reads_maps and not makes_maps:
        return _run(copied, x, makes_maps=True)
    now = dict(model.named_buffers())
    seen.written = {
        name for name, (buffer, version) in before.items() if now.get(name) is not buffer or _version(buffer) != version
    }
    for name, module in model.named_modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
        if any(id(parameter) in follow.used for parameter in module.parameters(recurse=False)):
            seen.ran.add(name)
    seen.tables.update(*(getattr(y, "gzoo_table", ()) for y in _tensors(seen.result)))
    for path in seen.pieces:
        seen.widths[path] = _widths(model.get_submodule(path), *follow.given[path], _sizes(seen, path))
    return seen


def _version(tensor: Tensor) -> float:
    """How often a tensor was written to; of one of torch.inference_mode, which does not count, no number."""
    return math.nan if tensor.is_inference() else tensor._version


def _sizes(seen: Trace, path: str) -> set[int]:
    return {size for size, _ in (*seen.pieces[path], *seen.prefixes[path])}


def _widths(module: nn.Module, args: tuple, kwargs: dict[str, Any], sizes: set[int]) -> set[str]:
    """The attributes of ``module`` that hold some of ``sizes``, and with another number would split channels elsewhere.

    Another attribute may hold the same number, such as a power or a number of heads.
    """
    before = _splits(module, args, kwargs)
    found = set()
    for name, value in list(vars(module).items()):
        if type(value) is int and value in sizes:
            other: Any = 2 * value  # a half of which is another number, too
        elif isinstance(value, list | tuple) and value and all(type(size) is int and size in sizes for size in value):
            other = type(value)(2 * size for size in value)
        else:
            continue
        setattr(module, name, other)
        if _splits(module, args, kwargs) != before:
            found.add(name)
        setattr(module, name, value)
    return found


def _splits(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[str]:
    """Where the forward of ``module`` takes tensors apart, up to an error."""
    log: list[str] = []

    class Log(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            out = func(*args, **kwargs or {})
            if getattr(func, "__name__", "") in _SPLITS:
                log.append(f"{args[1:]} {kwargs} {[tuple(x.shape) for x in _tensors(out)]}")
            return out

    with torch.no_grad(), Log(), contextlib.suppress(Exception):  # a forward may fail in any way with a wrong number
        module(*args, **kwargs)
    return log


def _is_foreign(module: nn.Module) -> bool:
    """Whether a module is of no library whose layers have rules."""
    return not type(module).__module__.startswith(("torch.", "timm.", "torchvision.ops."))


def _mark_own(module: nn.Module, own: dict[str, Segments]) -> None:
    """Marks the parameters and buffers of a module of another library that may hold one number a channel.

    What they are combined with ties them to its channels.
    """
    if not _is_foreign(module):
        return
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        wide = [dim for dim, size in enumerate(tensor.shape) if size > 1]
        if len(wide) == 1:
            own[name] = (Segment(tensor.shape[wide[0]]),)
            _mark(tensor, wide[0], own[name])


def _make_followable(module: Any) -> None:
    """Puts what treats channels alike, and can be followed, in place of a step of a module that cannot."""
    if isinstance(module, CrossCovarianceAttn):  # how many heads follows from the width, not the width from them
        module.num_heads, module.temperature = 1, nn.Parameter(module.temperature[:1], False)
    elif isinstance(module, LiteMLA):  # sums over channels, over pixels, over channels: values, as wide as the queries
        module._attn = lambda q, k, v: q + k + v[..., :-1]  # type: ignore[method-assign]
    elif isinstance(module, MobileVitBlock):
        module.forward = types.MethodType(_without_patches, module)  # type: ignore[method-assign]


def _without_patches(block: Any, x: Tensor) -> Tensor:
    """MobileViT's block on one large patch in place of many small ones."""
    y = block.conv_1x1(block.conv_kxk(x))
    tokens = block.norm(block.transformer(y.flatten(2).transpose(1, 2)))
    y = block.conv_proj(tokens.transpose(1, 2).unflatten(2, y.shape[2:]))
    return y if block.conv_fusion is None else block.conv_fusion(torch.cat((x, y), dim=1))


def _mark(x: Tensor, dim: int, segments: Segments, spread: bool = False) -> None:
    x.gzoo_channels = Channels(dim, segments, spread)  # type: ignore[attr-defined]


def _reads_map(module: nn.Module, x: Any) -> bool:
    """Whether a layer is given all pixels of a map as one vector, and may be."""
    return isinstance(module, READ_FLATTENED) and hasattr(x, "gzoo_map")


def _channels(x: Any) -> Channels | None:
    return getattr(x, "gzoo_channels", None) if isinstance(x, Tensor) else None


def channels_of(x: Tensor) -> Segments:
    """The segments that a tensor of a traced run has, or the one that was squeezed; none if they were lost."""
    channels = _channels(x)
    return flat(channels.segments if channels else getattr(x, "gzoo_squeezed", ()))


def sources_of(x: Tensor) -> Segments:
    """The segments that a tensor of a traced run has, or that it was computed from if they were lost."""
    return channels_of(x) or flat(getattr(x, "gzoo_sources", ()))


def is_table(x: Tensor) -> bool:
    """Whether a result has rows of numbers, (B, rows, numbers), as of anchors, or is a map without channels."""
    return x.ndim == 3


def _sources(inputs: Iterable[Tensor]) -> Segments:
    return tuple(dict.fromkeys(part for x in inputs for part in sources_of(x)))


class _Follow(TorchFunctionMode):
    """Hands the channels on from the arguments of every torch function to its results."""

    def __init__(self, seen: Trace, images: int, foreign: set[str], makes_maps: bool) -> None:
        super().__init__()
        self.makes_maps = makes_maps  # whether a vector that is viewed as a map becomes one
        self.views = self.reads_maps = False  # whether some vector is, and a layer reads such a map
        self.seen, self.images, self.foreign = seen, images, foreign  # paths of modules of no library that we know
        self.path = [""]
        self.made: dict[str, Segments] = {}
        self.vectors: dict[str, Segments] = {}  # what linear layers made, a vector an image
        self.attending: set[str] = set()  # modules whose own forward multiplies queries with keys
        self.given: dict[str, tuple[tuple, dict[str, Any]]] = {}  # what each module was given first
        self.used: set[int] = set()  # parameters that functions were given

    # --- modules

    def enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            self.path.append(name)
            self.given.setdefault(name, (inputs, named))
            seen = self.seen
            seen.ran.add(name)
            inputs += tuple(named.values())
            if isinstance(module, _READ_MAPS) and isinstance(inputs[0], Tensor) and inputs[0].ndim == 4:
                known = _channels(inputs[0])
                self.reads_maps |= self.views and (known is None or known.dim != 1)
            x = next((x for x in _tensors(inputs) if _channels(x)), None)
            if not any(True for _ in module.children()) and name not in seen.order:
                seen.order.append(name)
                if x is None and inputs and isinstance(inputs[0], Tensor) and not _reads_map(module, inputs[0]):
                    seen.lost[name] = getattr(inputs[0], "gzoo_lost", "the network")
            if isinstance(module, nn.Linear) and inputs and inputs[0].ndim == 2 and len(inputs[0]) != self.images:
                seen.rows_mixed = True
            if x is None and inputs and _reads_map(module, inputs[0]):
                segments, seen.flattened[name] = inputs[0].gzoo_map
            elif x is None:
                return
            else:
                segments = _channels(x).segments  # type: ignore[union-attr]
            first = seen.inputs.setdefault(name, segments)
            has_own = any(True for _ in (*module.parameters(), *module.buffers()))
            if has_own and total(first) == total(segments):  # run twice, it has the same widths twice
                tie(first, segments)

        return hook

    def leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            self.path.pop()
            inputs += tuple(named.values())
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.PixelShuffle | nn.Linear):
                self.seen.after_layers = len(self.seen.functions)
            channels = _channels(inputs[0]) if inputs else None
            if channels and isinstance(module, nn.Conv2d | nn.ConvTranspose2d | CondConv2d):
                for shares in (_channels(x) for x in inputs[1:]):  # of CondConv's experts, the same for a whole fibre
                    for segment in flat(shares.segments) if shares else ():
                        segment.image = True
                y = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
                self.seen.pixels[name] = y.shape[2:].numel()  # not by an index, which would be a function of the map
                _mark(output, 1, self._made(name, _conv_output(module, channels.segments)))
            elif channels and isinstance(module, SpaceToDepth | nn.PixelUnshuffle):
                _mark(output, 1, _folded(module, channels.segments, output.shape[1]))
            elif channels and isinstance(module, nn.PixelShuffle):
                _mark(output, 1, self._made(name, _unfolded(channels.segments, output.shape[1])))
            elif isinstance(module, PositionalEncodingFourier):  # of places, which have no fibre, it makes channels
                projection = f"{name}.token_projection"
                self.seen.lost.pop(projection, None)
                self.seen.inputs[projection] = (Segment(module.token_projection.in_channels, image=True),)
                self.seen.pixels[projection] = output.shape[2:].numel()
                self.seen.outputs[projection] = self._made(name, (Segment(module.dim),))
                _mark(output, 1, self.seen.outputs[projection])
            elif inputs and _reads_map(module, inputs[0]) and not isinstance(module, nn.Linear):
                self.seen.outputs.setdefault(name, self.seen.inputs[name])  # flattened still, for the next one to read
            elif inputs and _reads_map(module, inputs[0]):
                self.seen.pixels[name] = 1
                self.vectors[name] = self._made(name, (Segment(output.shape[1]),))
                _mark(output, 1, self.vectors[name])
            elif channels and isinstance(module, nn.Linear) and channels.dim != inputs[0].ndim - 1:
                self.seen.over_pixels.append(name)
            elif channels and isinstance(module, nn.Linear):
                self.seen.pixels[name] = output.shape[1:-1].numel()
                made = self._made(name, (Segment(module.out_features),))
                if name in self.seen.unflattened:  # it runs again
                    output.__dict__.pop("gzoo_channels", None)
                    output.gzoo_map, output.gzoo_lost = (made, 2 * (self.seen.unflattened[name],)), "linear"
                    return
                _mark(output, output.ndim - 1, made)
                if output.ndim == 2:
                    self.vectors[name] = made
            result = next((_channels(x) for x in _tensors(output) if _channels(x)), None)
            if result:
                self.seen.outputs.setdefault(name, result.segments)

        return hook

    def _made(self, name: str, segments: Segments) -> Segments:
        return self.made.setdefault(name, segments)

    # --- functions

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        outputs = [out] if isinstance(out, Tensor) else list(_tensors(out))
        inputs = list(_tensors((args, kwargs)))
        name = getattr(func, "__name__", "")
        self.used.update(id(x) for x in inputs if isinstance(x, nn.Parameter))
        if is_asymmetric(name, args, kwargs):
            self.seen.asymmetric.add(self.path[-1])
        if sides := sides_treated(name, args, kwargs):
            self.seen.one_sided.setdefault(self.path[-1], set()).update(sides)
        comes_back = name == "unsqueeze" and hasattr(inputs[0], "gzoo_reduced")
        if not comes_back and not any(_channels(x) for x in inputs):
            lost = next((x.gzoo_lost for x in inputs if hasattr(x, "gzoo_lost")), None)
            for x in outputs if lost else ():
                x.gzoo_lost, x.gzoo_sources = lost, _sources(inputs)  # type: ignore[attr-defined]
                self._follow_map(name, x, inputs, args, kwargs)
            return out
        if name == "__get__":  # a property: x.mT
            name = func.__self__.__name__
        if outputs:
            given = tuple(part for x in inputs if (known := _channels(x)) for part in known.segments)
            self.seen.functions.append((name, given))
        if name in _ACTIVATIONS and (own := _channels(inputs[0])):
            for segment in flat(own.segments):
                segment.activated = True
        before = [(x, _channels(x)) for x in outputs if any(x is y for y in inputs)]  # written in place
        followed = _FOLLOWED.get(name, _Follow._inherit)(self, outputs, inputs, args, kwargs)
        for x, channels in before:
            if channels and not followed:
                _mark(x, *channels)
        tables = [x for x in inputs if hasattr(x, "gzoo_table")]
        for x, table in itertools.product(outputs, tables):
            if x.shape == table.shape:
                x.gzoo_table = table.gzoo_table  # type: ignore[attr-defined]
        spread = {part for x in inputs if (own := _channels(x)) and own.spread for part in flat(own.segments)}
        for x in outputs:
            channels = _channels(x)
            if channels is None:
                earlier = (y.gzoo_lost for y in inputs if _channels(y) is None and hasattr(y, "gzoo_lost"))
                x.gzoo_lost = inputs[0].gzoo_lost if comes_back else next(earlier, name)  # type: ignore[attr-defined]
                x.gzoo_sources = _sources(inputs)  # type: ignore[attr-defined]
            elif spread.issuperset(flat(channels.segments)):
                _mark(x, channels.dim, channels.segments, spread=True)
        return out

    def _follow_map(self, name: str, out: Tensor, inputs: list[Tensor], args: tuple, kwargs: dict) -> None:
        """Results of flattened maps, which are as long, are such maps, and as many of them are of the same channels.

        Reshaped to what they were, they are maps again. Those of one squeezed number an image are such numbers.
        """
        if squeezed := next((x.gzoo_squeezed for x in inputs if hasattr(x, "gzoo_squeezed")), ()):
            out.gzoo_squeezed = squeezed  # type: ignore[attr-defined]
        if name in _RESHAPES and hasattr(inputs[0], "gzoo_map"):
            segments, pixels = inputs[0].gzoo_map
            if tuple(out.shape) == (len(inputs[0]), total(segments), *pixels):
                self._note_map_named(inputs[0], args, kwargs)
                _mark(out, 1, segments)
        maps = [x.gzoo_map for x in inputs if hasattr(x, "gzoo_map") and x.shape == out.shape]
        if maps and name in _OVER_ROWS:
            self._couple(maps[0][0])
        for segments, _ in maps[1:]:
            tie(maps[0][0], segments)
        if maps:
            out.gzoo_map = maps[0]  # type: ignore[attr-defined]

    def _inherit(self, outputs: list[Tensor], inputs: list[Tensor], args: tuple, kwargs: dict) -> bool:
        """Results with as many channels at the same place have those of the arguments."""
        found = False
        known = [(x.ndim, channels) for x in inputs if (channels := _channels(x))]
        known = [(ndim, channels) for ndim, channels in known if not channels.spread] or known
        for out in outputs:
            mine, single = None, []
            for ndim, (dim, segments, _) in known:
                place = dim - ndim  # from the right, as broadcasting aligns
                if -place > out.ndim or out.shape[place] != total(segments):
                    if -place <= out.ndim and total(segments) == 1:
                        single.append((place + out.ndim, segments))
                    place = dim  # from the left, as reductions of pixels leave it
                    if place >= out.ndim or out.shape[place] != total(segments):
                        continue
                    place -= out.ndim
                if mine is None:
                    mine = place + out.ndim, segments
                elif mine[0] == place + out.ndim:
                    tie(mine[1], segments)
            if mine:
                _mark(out, *mine)
                found = True
                for place, segments in single:  # an attention map, say: it goes to every channel of a fibre alike
                    for segment in flat(segments) if place == mine[0] else ():
                        segment.image = True
        return found

    def _cat(self, outputs: list[Tensor], inputs: list[Tensor], args: tuple, kwargs: dict) -> bool:
        out = outputs[0]
        dim = argument(args, kwargs, 1, "dim", 0) % out.ndim
        known = [_channels(x) for x in inputs if x.numel()]  # a map without channels adds none
        if any(channels is None for channels in known) or len({c.dim for c in known if c}) > 1:
            return False
        if known[0].dim != dim:  # type: ignore[union-attr]
            return self._inherit(outputs, inputs, args, kwargs)
        _mark(out, dim, tuple(segment for channels in known if channels for segment in channels.segments))
        return True

    def _stack(self, outputs: list[Tensor], inputs: list[Tensor], args: tuple, kwargs: dict) -> bool:
        out = outputs[0]
        new = argument(args, kwargs, 1, "dim", 0) % out.ndim
        known = [_channels(x) for x in inputs]
        first = known[0]
        if first is None or any(channels is None or channels.dim != first.dim for channels in known):
            return False
        for channels in known[1:]:
            tie(first.segments, channels.segments)  # type: ignore[union-attr]
        _mark(out, first.dim + (new <= first.dim), first.segments)
        return True

    def _repeat(self, outputs: list[Tensor], inputs: list[Tensor], args: tuple, kwargs: dict) -> bool:
        """Channels one after another again. One channel that goes to many, as an attention map, stays one; without a
        fibre, as gray images made colours, it makes as many without."""
        out, channels = outputs[0], _channels(inputs[0])
        if channels is None or out.ndim != inputs[0].ndim:
            return self._inherit(outputs, inputs, args, kwargs)
        segments, times = flat(channels.segments), out.shape[channels.dim] // total(channels.segments)
        if times == 1 or total(segments) > 1:
            _mark(out, channels.dim, segments * times)
        elif segments[0].image:
            _mark(out, channels.dim, (Segment(times, image=True),), spread=True)
        else:
            _mark(out, channels.dim, segments)
        return True

    def _split(self, outputs: list[Tensor], inputs: list[Tensor], args: tuple, kwargs: dict) -> bool:
        channels = _channels(inputs[0])
        dim = argument(args, kwargs, 2, "dim", 0) % inputs[0].ndim
        if channels is None or dim != channels.dim:
            return self._inherit(outputs, inputs, args, kwargs)
        start = 0
        for out in outputs:
            self._piece(out, channels, start, start + out.shape[dim])
            start += out.shape[dim]
        return True

    def _narrow(self, outputs: list[Tensor], inputs: list[Tensor], args: tuple, kwargs: dict) -> bool:
        channels = _channels(inputs[0])
        dim = argument(args, kwargs, 1, "dim", 0) % inputs[0].ndim
        if channels is None or dim != channels.dim:
            return self._inherit(outputs, inputs, args, kwargs)
        start = argument(args, kwargs, 2, "start", 0)
        self._piece(outputs[0], channels, start, start + outputs[0].shape[dim])
        return True

    def _getitem(self, outputs: list[Tensor], inputs: list[Tensor], args: tuple, kwargs: dict) -> bool:
        x, index = args
        channels = _channels(x)
        index = index if isinstance(index, tuple) else (index,)
        are_image = channels is not None and all(segment.image for segment in flat(channels.segments))
        is_order = len(index) > 1 and isinstance(index[0], slice) and isinstance(index[1], list)
        if channels and are_image and channels.dim == 1 and is_order:  # colours in another order
            _mark(outputs[0], 1, (Segment(len(index[1]), image=True),))
            return True
        if channels is None or not all(i is None or i is ... or isinstance(i, int | slice) for i in index):
            return False
        used = sum(i is not None and i is not ... for i in index)
        at = next((k for k, i in enumerate(index) if i is ...), len(index))
        index = index[:at] + (slice(None),) * (x.ndim - used) + index[at + 1 :]
        old = new = 0
        for i in index:
            if i is None:
                new += 1
                continue
            if old == channels.dim:
                if i == 0 and len(channels.segments) == total(channels.segments) == 1 and outputs[0].ndim == 1:
                    outputs[0].gzoo_squeezed = channels.segments  # type: ignore[attr-defined]
                if isinstance(i, int) and are_image:  # one colour, (B, H, W), which may become a map of one channel
                    outputs[0].gzoo_reduced = new  # type: ignore[attr-defined]
                if isinstance(i, int) and x.ndim == 1:  # a number of its own among the parameters of a module
                    for segment in flat(channels.segments):
                        segment.image = True
                if isinstance(i, int) or i.step not in (None, 1):
                    return False
                if i == slice(None):  # all of them: a step along pixels, whose numbers are no widths
                    _mark(outputs[0], new, channels.segments)
                    return True
                start, stop, _ = i.indices(x.shape[old])
                before, piece = self._piece(outputs[0], Channels(new, channels.segments), start, stop)
                if x.ndim == 4 and self.path[-1] in self.foreign:  # timm's numbers are attributes
                    self.seen.sliced.append(((i.start, i.stop), (before, piece, channels.segments)))
                    self.seen.asymmetric.add(self.path[-1])
                return True
            old += 1
            new += not isinstance(i, int)
        return False

    def _piece(self, out: Tensor, channels: Channels, start: int, stop: int) -> tuple[Segments, Segments]:
        """Marks ``out`` as the channels from ``start`` to ``stop``, and remembers how many were cut off where.

        Returns those before, and these.
        """
        before, rest = cut(channels.segments, start)
        segments, _ = cut(rest, stop - start)
        path = self.path[-1]
        self.seen.pieces.setdefault(path, []).append((stop - start, segments))
        whole = total(channels.segments), channels.segments
        self.seen.prefixes.setdefault(path, []).extend([(start, before), whole] if start else [whole])
        _mark(out, channels.dim, segments)
        return before, segments

    def _pad(self, outputs: list[Tensor], inputs: list[Tensor], args: tuple, kwargs: dict) -> bool:
        """Zeros before and after the channels, which as many channels stand for as are added to them."""
        channels, pads = _channels(inputs[0]), argument(args, kwargs, 1, "pad", ())
        assert channels is not None
        place = 2 * (inputs[0].ndim - 1 - channels.dim)
        numbers = tuple(pads[place : place + 2])
        if not any(numbers):
            return self._inherit(outputs, inputs, args, kwargs)
        if min(numbers) < 0:
            return False
        is_image = all(segment.image for segment in flat(channels.segments))
        before, after = ((Segment(number, is_image),) if number else () for number in numbers)
        self.seen.padded.append(((numbers[0], numbers[1]), (before, channels.segments, after)))
        _mark(outputs[0], channels.dim, (*before, *channels.segments, *after))
        return True

    def _glu(self, outputs: list[Tensor], inputs: list[Tensor], args: tuple, kwargs: dict) -> bool:
        """One half of the channels gates the other."""
        channels, dim = _channels(inputs[0]), argument(args, kwargs, 1, "dim", -1) % inputs[0].ndim
        if channels is None or dim != channels.dim:
            return self._inherit(outputs, inputs, args, kwargs)
        _mark(outputs[0], dim, tie_copies(channels.segments, total(channels.segments) // 2))
        return True

    def _shuffle(self, outputs: list[Tensor], inputs: list[Tensor], args: tuple, kwargs: dict) -> bool:
        channels, groups = _channels(inputs[0]), argument(args, kwargs, 1, "groups", 1)
        assert channels is not None
        part = tie_copies(channels.segments, total(channels.segments) // groups)
        self.seen.shuffled.append((self.path[-1], part, groups))
        _mark(outputs[0], channels.dim, part * groups)
        return True

    def _permute(self, outputs: list[Tensor], inputs: list[Tensor], args: tuple, kwargs: dict) -> bool:
        channels = _channels(inputs[0])
        dims = args[1] if len(args) == 2 and isinstance(args[1], Sequence) else args[1:] or kwargs["dims"]
        assert channels is not None
        _mark(outputs[0], [d % inputs[0].ndim for d in dims].index(channels.dim), channels.segments)
        return True

    def _transpose(self, outputs: list[Tensor], inputs: list[Tensor], args: tuple, kwargs: dict) -> bool:
        channels, ndim = _channels(inputs[0]), inputs[0].ndim
        assert channels is not None
        first = argument(args, kwargs, 1, "dim0", 0) % ndim
        second = argument(args, kwargs, 2, "dim1", 0) % ndim
        dim = {first: second, second: first}.get(channels.dim, channels.dim)
        _mark(outputs[0], dim, channels.segments)
        return True

    def _reduce(self, outputs: list[Tensor], inputs: list[Tensor], args: tuple, kwargs: dict, place: int = 1) -> bool:
        """``dim`` is argument number ``place``."""
        x, channels = inputs[0], _channels(inputs[0])
        dims = argument(args, kwargs, place, "dim", None)
        if isinstance(dims, Tensor):  # torch.max of two tensors
            return self._inherit(outputs, inputs, args, kwargs)
        if channels is None:
            return False
        if dims is None:
            self._couple(channels.segments)
            return False
        reduced = {d % x.ndim for d in ([dims] if isinstance(dims, int) else dims)}
        if channels.dim in reduced:
            self._couple(channels.segments)
            for out in outputs if outputs[0].ndim == x.ndim else ():
                _mark(out, channels.dim, (Segment(1, image=True),))
            for out in outputs if outputs[0].ndim == x.ndim - 1 else ():
                out.gzoo_reduced = channels.dim  # type: ignore[attr-defined]
            return outputs[0].ndim == x.ndim
        dropped = 0 if outputs[0].ndim == x.ndim else sum(d < channels.dim for d in reduced)
        for out in outputs:
            _mark(out, channels.dim - dropped, channels.segments)
        return True

    def _matmul(self, outputs: list[Tensor], inputs: list[Tensor], args: tuple, kwargs: dict) -> bool:
        """A product keeps the channels that it does not sum over; those that it does sum over are as many."""
        summed_over = []
        for x, summed in zip(inputs[:2], (-1, -2), strict=False):
            channels = _channels(x)
            place = channels.dim - x.ndim if channels else summed
            if channels and place != summed and outputs[0].ndim == x.ndim:
                _mark(outputs[0], channels.dim, channels.segments)
                if _channels(inputs[1]):  # of each channel with each
                    self.attending.add(self.path[-1])
                    self._couple(channels.segments)
                return True
            if channels:
                summed_over.append(channels.segments)
        if len(summed_over) == 2:
            self._attend(*summed_over)
        return False

    def _attention(self, outputs: list[Tensor], inputs: list[Tensor], args: tuple, kwargs: dict) -> bool:
        query, key, value = (c.segments if (c := _channels(x)) and c.dim == x.ndim - 1 else () for x in inputs[:3])
        if not (query and key and value):
            return False
        self._attend(query, key)
        _mark(outputs[0], outputs[0].ndim - 1, value)
        return True

    def _attend(self, query: Segments, key: Segments) -> None:
        """Ties what a product of queries and keys sums over."""
        tie(query, key)
        self.attending.add(self.path[-1])
        self._couple(query)

    def _couple(self, segments: Segments) -> None:
        self.seen.coupled.append((self.path[-1], segments))

    def _over(self, given: Any, place: int, default: int | None) -> bool:
        """A norm or softmax: over the dimension that is argument number ``place``, or over all of an image."""
        _, inputs, args, kwargs = given
        channels, dim = _channels(inputs[0]), argument(args, kwargs, place, "dim", default)
        if channels and (dim is None or dim % inputs[0].ndim == channels.dim):
            self._couple(channels.segments)
        return self._inherit(*given)

    def _lose(self, outputs: list[Tensor], inputs: list[Tensor], args: tuple, kwargs: dict) -> bool:
        return False

    def _unsqueeze(self, outputs: list[Tensor], inputs: list[Tensor], args: tuple, kwargs: dict) -> bool:
        """A maximum over channels, (B, H, W), becomes a map of one channel again."""
        x, out = inputs[0], outputs[0]
        dim = argument(args, kwargs, 1, "dim", 0) % out.ndim
        if dim == getattr(x, "gzoo_reduced", None):
            _mark(out, dim, (Segment(1, image=True),))
            return True
        return self._reshape(outputs, inputs, args, kwargs)

    def _reshape(self, outputs: list[Tensor], inputs: list[Tensor], args: tuple, kwargs: dict) -> bool:
        out, channels = outputs[0], _channels(inputs[0])
        if channels is None:
            return False
        dim, segments, _ = channels
        old, new, count = inputs[0].shape, out.shape, total(channels.segments)
        if count == 1 and len(new) == 1 and len(old) == 2:  # a number an image
            out.gzoo_squeezed = segments  # type: ignore[attr-defined]
            return False
        if dim == 1 and len(old) == 4 and tuple(new) == (old[0], math.prod(old[1:])):
            if (named := rows_named(inputs[0], args[1:], kwargs)) is not None:
                self.seen.rows.add(named)
                self.seen.asymmetric.add(self.path[-1])
            if count < new[1]:
                out.gzoo_map = segments, tuple(old[2:])  # type: ignore[attr-defined]  # for a linear layer to read
                return False
        if dim == 1 and len(old) == 2 and len(new) == 4 and new[0] == old[0]:
            if new[2] == new[3]:
                self._note_map_named(inputs[0], args, kwargs)
            layers = [name for name, made in self.vectors.items() if flat(made) == flat(segments)]
            if layers and new[2] == new[3] > 1:
                self.views = True
                if self.makes_maps:
                    self._unflatten(layers, inputs[0], out)
                    return True
            if count > max(new[1:]):
                out.gzoo_table = layers  # type: ignore[attr-defined]
        if dim == 1 and merges_channels(inputs[0], out):  # which are those of one part and of all others, in turn
            self.seen.shuffled.append((self.path[-1], segments, old[2]))
            self.seen.asymmetric.add(self.path[-1])
            _mark(out, 1, segments * old[2])
            return True
        before = math.prod(old[:dim])
        for e in range(len(new)):
            leading = math.prod(new[:e])
            if leading == before and new[e] == count:
                self._tie_attention(segments)
                _mark(out, e, segments)
                return True
            last = next((i for i in range(e + 1, len(new)) if math.prod(new[e : i + 1]) == count), None)
            if leading == before and last is not None and new[last] < count:
                _mark(out, last, tie_copies(segments, new[last]))
                return True
            for first in range(dim):  # the dimensions before the channels are taken in, as copies of them
                if count > 1 and leading == math.prod(old[:first]) and leading * new[e] == before * count:
                    heads = segments * math.prod(old[first:dim])
                    self._tie_attention(heads)
                    _mark(out, e, heads)
                    return True
        return False

    def _unflatten(self, layers: list[str], x: Tensor, out: Tensor) -> None:
        """Makes the vector of linear layers, and what ran on it since, a flattened map of the channels of ``out``."""
        seen, vector, side = self.seen, flat(self.made[layers[0]]), out.shape[3]
        channels = (Segment(out.shape[1]),)
        for known in (self.made, seen.inputs, seen.outputs):
            for name in [name for name, segments in known.items() if flat(segments) == vector]:
                known[name] = channels
                if known is seen.inputs:
                    seen.flattened[name] = side, side
        seen.unflattened |= dict.fromkeys(layers, side)
        x.__dict__.pop("gzoo_channels")
        x.gzoo_map, x.gzoo_lost = (channels, (side, side)), "view"  # type: ignore[attr-defined]
        _mark(out, 1, channels)

    def _note_map_named(self, x: Tensor, args: tuple, kwargs: dict) -> None:
        named = map_named(x, args[1:], kwargs)
        if named is not None and self.path[-1] in self.foreign:  # timm's numbers follow from shapes
            self.seen.maps.add(named)
            self.seen.asymmetric.add(self.path[-1])

    def _tie_attention(self, segments: Segments) -> None:
        """After its product of queries and keys, a module reads maps as wide as its input in the width of its input."""
        path = self.path[-1]
        own = self.seen.inputs.get(path, ())
        if path in self.attending and total(own) == total(segments):
            tie(segments, own)


_REDUCTIONS = (
    *("mean", "sum", "amax", "amin", "max", "min", "std", "var", "logsumexp", "prod", "median"),
    *("std_mean", "var_mean", "nanmean", "nansum", "nanmedian", "mode", "any", "all", "count_nonzero", "aminmax"),
)
_RESHAPES = ("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze")
READ_FLATTENED = nn.Linear | nn.BatchNorm1d | nn.SyncBatchNorm
"""Layers that may be given all pixels of a map as one vector."""
_READ_MAPS = (
    nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d | nn.MaxPool2d | nn.AvgPool2d | nn.Upsample | nn.PixelShuffle
)
_OVER_ROWS = ("softmax", "log_softmax", "normalize", "layer_norm")
_SPLITS = ("split", "split_with_sizes", "chunk", "tensor_split", "narrow", "__getitem__")
# Of hidden layers; what makes probabilities or bounded numbers of logits is none.
_ACTIVATIONS = {
    *("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "rrelu_", "threshold", "threshold_"),
    *("elu", "elu_", "selu", "selu_", "celu", "celu_", "gelu", "silu", "mish", "hardswish", "hardtanh", "hardtanh_"),
    *("hardshrink", "softshrink", "tanhshrink", "softsign"),
}

_FOLLOWED: dict[str, Callable[..., bool]] = {
    **dict.fromkeys(("cat", "concat", "concatenate"), _Follow._cat),
    "stack": _Follow._stack,
    **dict.fromkeys(("expand", "expand_as", "broadcast_to", "repeat", "tile"), _Follow._repeat),
    **dict.fromkeys(_SPLITS[:4], _Follow._split),
    "narrow": _Follow._narrow,
    "__getitem__": _Follow._getitem,
    "pad": _Follow._pad,
    "channel_shuffle": _Follow._shuffle,
    "glu": _Follow._glu,
    "permute": _Follow._permute,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _Follow._transpose),
    "mT": lambda self, outputs, inputs, *_: self._transpose(outputs, inputs, (inputs[0], -2, -1), {}),
    **dict.fromkeys(_REDUCTIONS, _Follow._reduce),
    **dict.fromkeys(
        ("norm", "linalg_norm", "linalg_vector_norm", "quantile", "kthvalue", "cosine_similarity"),
        lambda self, *given: self._reduce(*given, place=2),
    ),
    "topk": lambda self, *given: self._over(given, 2, -1),
    **dict.fromkeys(("sort", "argsort"), lambda self, *given: self._over(given, 1, -1)),
    **dict.fromkeys(("matmul", "bmm", "__matmul__"), _Follow._matmul),
    "scaled_dot_product_attention": _Follow._attention,
    **dict.fromkeys(("softmax", "log_softmax", "softmin"), lambda self, *given: self._over(given, 1, None)),
    "normalize": lambda self, *given: self._over(given, 2, 1),
    **dict.fromkeys(("group_norm", "layer_norm", "rms_norm"), lambda self, *given: self._over(given, 9, None)),
    "einsum": _Follow._lose,
    **dict.fromkeys(_RESHAPES, _Follow._reshape),
    "unsqueeze": _Follow._unsqueeze,
}


def _conv_output(module: nn.Conv2d | nn.ConvTranspose2d | CondConv2d, segments: Segments) -> Segments:
    inputs, outputs, groups = module.in_channels, module.out_channels, module.groups
    if groups > 1 and groups == inputs and not any(segment.image for segment in flat(segments)):
        return segments * (outputs // inputs)  # depthwise: each channel gives its own
    out = Segment(outputs)
    if groups > 1:
        out.groups.add(groups)
        for segment in flat(segments):
            segment.groups.add(groups)
    return (out,)


def side_folded_by(module: SpaceToDepth | nn.PixelUnshuffle) -> int:
    """Of the squares of pixels that a module folds into channels."""
    return module.bs if isinstance(module, SpaceToDepth) else module.downscale_factor


def _folded(module: SpaceToDepth | nn.PixelUnshuffle, segments: Segments, channels: int) -> Segments:
    """What becomes of channels whose squares of pixels are folded into them: of each, one for each place."""
    side = side_folded_by(module)
    if all(segment.image for segment in flat(segments)):
        return (Segment(channels, image=True, folded=side),)
    if isinstance(module, SpaceToDepth):
        return segments * side**2
    return tuple(segment for segment in segments for _ in range(side**2))


def _unfolded(segments: Segments, channels: int) -> Segments:
    """What a pixel shuffle makes of channels: each ``channels`` of them, however they are numbered, are as wide."""
    first = tie_copies(segments, channels)
    for segment in first:
        segment.unfolded = segment.unfolded or Segment(segment.size)
    return tuple(segment.unfolded for segment in first if segment.unfolded)


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
