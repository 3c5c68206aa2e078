"""Functions that a network's own forward calls, such as ``F.max_pool2d(x, 2)`` or ``x[..., ::2, ::2]``, made symmetric.

`gzoo.convert` puts one module in the place of another; what a forward does without a module is met while it runs.
`act_symmetrically` gives a module a class whose methods do so: windows go behind the resampling rule, and what counts
channels goes by fields. One `Calls` holds for a whole network, so it does not matter in which of its modules a
function is met, or whether activations are computed again.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, wraps
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from gzoo.nn.front import Made
from gzoo.nn.resample import SymmetricPool2d, SymmetricUnpool2d, centre


@dataclass(frozen=True)
class Calls:
    """What the functions that a network calls go by once it is converted.

    Attributes:
        channel_pads: how many channels it pads before and after, and how many channels those are in the converted
            network to which it does -> how many to pad there.
        channel_slices: first and last number of the channels that it takes of a map, and how many those are in the
            converted network -> the numbers there.
        rows: how many numbers a row of a flattened map has, as it names them (512 in ``x.view(-1, 512)``).
        maps: channels, height and width of the maps that it makes of vectors, as it names them in
            ``x.view(-1, 64, 7, 7)``.
        shuffles: channels of a part, and parts, of the maps whose channels it shuffles -> |G|.
        pads: whether it pads more on one side, or channels.
        crops: whether it leaves out pixels on one side (``x[:, :, :-1, :-1]``) to fit one map to another.
    """

    channel_pads: Mapping[tuple[int, int, int], tuple[int, int]] = field(default_factory=dict)
    channel_slices: Mapping[tuple[int | None, int | None, int], tuple[int, int]] = field(default_factory=dict)
    rows: Collection[int] = ()
    maps: Collection[tuple[int, ...]] = ()
    shuffles: Mapping[tuple[int, int], int] = field(default_factory=dict)
    pads: bool = False
    crops: bool = False


class SymmetricForward(nn.Module):
    """A module whose methods call symmetric functions; `act_symmetrically` makes one.

    Attributes:
        gzoo_calls: what they go by.
        gzoo_fits: if a list, it gets whether each function of pixels gives what the plain one does.
    """

    gzoo_calls: Calls
    gzoo_fits: list[bool] | None = None


def act_symmetrically(module: nn.Module, calls: Calls) -> nn.Module:
    """Lets the functions that ``module`` calls commute with the group; in place.

    - Pools with a stride, and every second pixel (``x[:, :, ::2, ::2]``), follow the rule of `gzoo.nn.resample`.
    - Interpolation measures from the middle; to the nearest pixel, or to the mean of two that are as near.
    - A map that is padded or cropped more on one side stays in the middle; by an odd number, it is the mean of two.
    - A map becomes vectors, and they a map, whatever number of channels is named (``x.view(-1, 512)``); channels that
      are padded or taken (``x[:, :8]``) are as many as the fields, and a shuffle of channels is one of fields.

    Args:
        module: of a converted network.
        calls: what they go by.

    Returns:
        The module.
    """
    module.__class__ = _symmetric_class(type(module))  # type: ignore[arg-type]  # mypy: a class is hashable
    module.gzoo_calls = calls  # type: ignore[assignment]
    return module


@cache
def _symmetric_class(plain: type[nn.Module]) -> type[nn.Module]:
    members: dict[str, Any] = {"__module__": __name__, "made_by": (_symmetric_class, (plain,))}
    for cls in reversed(plain.__mro__[: plain.__mro__.index(nn.Module)]):
        own = {name: method for name, method in vars(cls).items() if not name.startswith("__")}
        members |= {name: _symmetrically(method) for name, method in own.items() if isinstance(method, FunctionType)}
    made: Any = Made(plain.__name__, (SymmetricForward, plain), members)
    return made


def _symmetrically(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)  # with its signature, which torch.export reads
    def wrapped(self: SymmetricForward, *args: Any, **kwargs: Any) -> Any:
        if self.gzoo_calls.pads and torch.compiler.is_dynamo_compiling():  # which tells no mode of F.pad
            return _uncompiled(wrapped, self, *args, **kwargs)
        if any(isinstance(mode, _Symmetric) for mode in _get_current_function_mode_stack()):  # of the same network
            return method(self, *args, **kwargs)
        with _Symmetric(self.gzoo_calls, self.gzoo_fits):
            return method(self, *args, **kwargs)

    return wrapped


@torch.compiler.disable
def _uncompiled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def is_asymmetric(name: str, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a function that a forward calls needs `act_symmetrically`, if not at this size then at another."""
    args, kwargs = with_input_first(args, kwargs)
    x = args[0] if args else None
    if not isinstance(x, Tensor) or x.ndim not in (4, 5):
        return False
    if name in ("max_pool2d", "max_pool2d_with_indices", "avg_pool2d"):
        kernel, stride = (argument(args, kwargs, i, key) for i, key in ((1, "kernel_size"), (2, "stride")))
        return _pair(stride or kernel) != (1, 1)  # also of a window that covers the map, of this size
    if name == "interpolate":
        mode = argument(args, kwargs, 3, "mode") or "nearest"
        return not is_whole(argument(args, kwargs, 2, "scale_factor")) and (
            mode.startswith("nearest") or argument(args, kwargs, 1, "size") is None
        )
    if name == "__getitem__":
        return _step(x, args[1]) > 1 or one_sided_crops(x, args[1]) is not None
    return name in ("pad", "channel_shuffle", "max_unpool2d")


class _Symmetric(TorchFunctionMode):
    """Calls symmetric functions in place of others."""

    def __init__(self, calls: Calls, fits: list[bool] | None) -> None:
        super().__init__()
        self.calls, self.fits = calls, fits

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        symmetric = _SYMMETRIC.get(getattr(func, "__name__", ""))
        args, kwargs = with_input_first(args, kwargs or {})
        if symmetric is None or not args or not isinstance(args[0], Tensor):
            return func(*args, **kwargs)
        if args[0].ndim not in (4, 5) and (args[0].ndim != 2 or symmetric is not _Symmetric.reshape):
            return func(*args, **kwargs)
        y = symmetric(self, func, *args, **kwargs)
        if self.fits is not None and symmetric in _OF_PIXELS:
            plain, own = (_first(z) for z in (func(*args, **kwargs), y))
            self.fits.append(plain.shape[2:] == own.shape[2:] and (plain.shape != own.shape or plain.allclose(own)))
        return y

    def max_pool(
        self,
        func: Any,
        x: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        return _pooled(x, nn.MaxPool2d(kernel_size, stride or None, padding, dilation, return_indices, ceil_mode))

    def max_unpool(
        self,
        func: Any,
        x: Tensor,
        indices: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        output_size: Sequence[int] | None = None,
    ) -> Tensor:
        return SymmetricUnpool2d(nn.MaxUnpool2d(kernel_size, stride or None, padding))(x, indices, output_size)

    def avg_pool(self, func: Any, x: Tensor, kernel_size: Any, stride: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        return _pooled(x, nn.AvgPool2d(kernel_size, stride or None, *args, **kwargs))

    def interpolate(
        self,
        func: Any,
        x: Tensor,
        size: Any = None,
        scale_factor: Any = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
        recompute_scale_factor: bool | None = None,
        antialias: bool = False,
    ) -> Tensor:
        if size is None and is_whole(scale_factor):
            return func(x, None, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
        if size is None:  # with a factor torch measures from one corner
            size = [math.floor(n * factor) for n, factor in zip(x.shape[2:], _pair(scale_factor), strict=True)]
        if mode.startswith("nearest"):
            return _nearest(x, _pair(size))
        return func(x, size, None, mode, align_corners, None, antialias)

    def pad(self, func: Any, x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
        left, right, top, bottom, *channels = *pad, *(0,) * (4 - len(pad))
        if len(channels) > 1:
            channels[:2] = self.calls.channel_pads.get((channels[0], channels[1], x.shape[1]), channels[:2])
        more = top + bottom, left + right
        shifts = any(first != second == -first for first, second in ((left, right), (top, bottom)))
        if (left == right and top == bottom) or shifts:
            return func(x, [left, right, top, bottom, *channels], mode, value)
        down, across = (-(-pixels // 2) for pixels in more)
        y = func(x, [across, across, down, down, *channels], mode, value)
        return centre(y, [n + pixels for n, pixels in zip(x.shape[2:], more, strict=True)])

    def getitem(self, func: Any, x: Tensor, index: Any) -> Tensor:
        full = _full(x, index)
        if len(full) == 4 and isinstance(full[1], slice) and (full[1].start, full[1].stop) != (None, None):
            named = full[1].start, full[1].stop, x.shape[1]
            if named in self.calls.channel_slices:
                index = full = full[0], slice(*self.calls.channel_slices[named]), *full[2:]
        step, crops = _step(x, index), one_sided_crops(x, index) if self.calls.crops else None
        if step == 1 and not crops:
            return func(x, index)
        sizes = [(n - 1) // step * step + 1 for n in x.shape[2:]]
        if crops:
            sizes = [n - before - after for n, (before, after) in zip(x.shape[2:], crops, strict=True)]
        return func(centre(x, sizes, step), (*full[:2], slice(None), slice(None)))

    def reshape(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if rows_named(x, args, kwargs) in self.calls.rows:
            return x.flatten(1)
        if (named := map_named(x, args, kwargs)) and named in self.calls.maps:
            return x.unflatten(1, (-1, *named[1:]))
        y = func(x, *args, **kwargs)
        if merges_channels(x, y) and (order := self.calls.shuffles.get((x.shape[1], x.shape[2]))):
            return x.unflatten(1, (-1, order)).transpose(2, 3).reshape(y.shape)  # (B, fields * |G|, parts, H, W)
        return y

    def channel_shuffle(self, func: Any, x: Tensor, groups: int) -> Tensor:
        order = self.calls.shuffles.get((x.shape[1] // groups, groups), 1)
        return x.unflatten(1, (groups, -1, order)).transpose(1, 2).reshape(x.shape)


_SYMMETRIC: dict[str, Callable[..., Tensor]] = {
    **dict.fromkeys(("max_pool2d", "max_pool2d_with_indices"), _Symmetric.max_pool),
    "max_unpool2d": _Symmetric.max_unpool,
    "avg_pool2d": _Symmetric.avg_pool,
    "interpolate": _Symmetric.interpolate,
    "pad": _Symmetric.pad,
    "__getitem__": _Symmetric.getitem,
    "getitem": _Symmetric.getitem,
    "view": _Symmetric.reshape,
    "reshape": _Symmetric.reshape,
    "flatten": _Symmetric.reshape,
    "unflatten": _Symmetric.reshape,
    "channel_shuffle": _Symmetric.channel_shuffle,
}


_OF_PIXELS = (_Symmetric.max_pool, _Symmetric.avg_pool, _Symmetric.interpolate, _Symmetric.pad, _Symmetric.getitem)


def merges_channels(x: Tensor, y: Tensor) -> bool:
    """Whether a reshape of x to y takes two dimensions of channels, in front of the pixels, for one."""
    return x.ndim == 5 and y.ndim == 4 and y.shape[1] == x.shape[1] * x.shape[2] and y.shape[2:] == x.shape[3:]


def _pooled(x: Tensor, pool: Any) -> Tensor:
    """By a pool of one window or of many, whose windows then are symmetric."""
    is_single = _covers(x, pool.kernel_size) and not getattr(pool, "return_indices", False)
    return pool(x) if is_single else SymmetricPool2d(pool)(x)


def _first(y: Any) -> Tensor:
    """A result, or the maxima of a pool that gives their places, too."""
    return y if isinstance(y, Tensor) else y[0]


def _nearest(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The pixels of x that are nearest to those of ``size``; means of two that are as near."""
    for axis in (2, 3):
        n, m = x.shape[axis], size[axis - 2]
        target = [m, x.shape[3]] if axis == 2 else [x.shape[2], m]
        y = F.interpolate(x, target, mode="nearest-exact")
        is_known = type(n) is type(m) is int  # not a symbol of an export with dynamic shapes
        if not is_known or n // math.gcd(n, m) % 2 == 0:  # then pixels lie half-way between two
            y = (y + F.interpolate(x.flip(axis), target, mode="nearest-exact").flip(axis)) / 2
        x = y
    return x


def _covers(x: Tensor, kernel: Any) -> bool:
    return _pair(kernel) == tuple(x.shape[2:])


def _pair(value: Any) -> tuple[Any, Any]:
    first, second = value if isinstance(value, list | tuple) and len(value) == 2 else 2 * tuple(_listed(value))
    return first, second


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)


def is_whole(factors: Any) -> bool:
    """Whether scale factors, one or one for each axis, are whole numbers."""
    return all(factor and float(factor).is_integer() for factor in _listed(factors))


def _full(x: Tensor, index: Any) -> tuple[Any, ...]:
    """An index of all dimensions of x; shorter where it has other things than numbers, slices and an ellipsis."""
    index = index if isinstance(index, tuple) else (index,)
    if not all(i is ... or isinstance(i, int | slice) for i in index):
        return ()
    at = next((k for k, i in enumerate(index) if i is ...), len(index))
    rest = [i for i in index if i is not ...]
    return *rest[:at], *(slice(None),) * (x.ndim - len(rest)), *rest[at:]


def _step(x: Tensor, index: Any) -> int:
    """The n of an index that takes every n-th pixel of a map, from the first on, along both axes; else 1."""
    pixels = _full(x, index)[2:] if x.ndim == 4 else ()
    if len(pixels) != 2 or not all(isinstance(i, slice) and i.step not in (None, 1) for i in pixels):
        return 1
    first, second = pixels
    from_first = all(i.start in (None, 0) for i in pixels)
    to_last = all(i.stop is None or i.stop >= n for i, n in zip(pixels, x.shape[2:], strict=True))
    return first.step if first.step == second.step > 1 and from_first and to_last else 1


def one_sided_crops(x: Tensor, index: Any) -> list[tuple[int, int]] | None:
    """How many pixels of each axis of a map an index leaves out before and after.

    None if as many, or if it names one axis alone, or no map.
    """
    pixels = _full(x, index)[2:] if x.ndim == 4 else ()
    if len(pixels) != 2 or not all(isinstance(i, slice) and i.step in (None, 1) for i in pixels):
        return None
    if slice(None) in pixels:
        return None
    crops = []
    for i, n in zip(pixels, x.shape[2:], strict=True):
        start, stop, _ = i.indices(n)
        crops.append((start, n - stop))
    return crops if any(before != after for before, after in crops) else None


def sides_treated(name: str, args: tuple, kwargs: dict[str, Any]) -> set[str]:
    """Of a function of a map: "start" or "end" where it pads or crops more pixels on that side."""
    args, kwargs = with_input_first(args, kwargs)
    if not args or not isinstance(args[0], Tensor) or args[0].ndim != 4:
        return set()
    amounts: Sequence[tuple[int, int]] = ()
    if name == "__getitem__":
        amounts = one_sided_crops(args[0], args[1]) or ()
    elif name == "pad":
        pads: Sequence[int] = argument(args, kwargs, 1, "pad")
        left, right, top, bottom, *_ = *pads, 0, 0, 0, 0
        amounts = (top, bottom), (left, right)
    return {"start" if before > after else "end" for before, after in amounts if before != after}


def rows_named(x: Tensor, args: tuple, kwargs: dict[str, Any]) -> int | None:
    """How many numbers a row has that the arguments of a reshape name, which makes a row of each map; else None."""
    shape = kwargs.get("shape", kwargs.get("size", args[0] if len(args) == 1 else args))
    is_rows = x.ndim == 4 and isinstance(shape, list | tuple) and len(shape) == 2 and shape[0] in (-1, len(x))
    return None if not is_rows or shape[1] == -1 else shape[1]


def map_named(x: Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    """Channels, height and width that the arguments of a reshape or unflatten name, which makes maps of vectors."""
    shape = kwargs.get("shape", kwargs.get("size", args[0] if len(args) == 1 else args))
    if x.ndim != 2 or not isinstance(shape, list | tuple):
        return None
    sizes: Any = kwargs.get("sizes", shape[1:])
    if len(sizes) == 1 and isinstance(sizes[0], list | tuple):  # of unflatten, behind the dimension
        sizes = sizes[0]
    return tuple(sizes) if len(sizes) == 3 and sizes[0] != -1 else None


def with_input_first(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a function with what it acts on as the first, also where a call names it."""
    if args or "input" not in kwargs:
        return args, kwargs
    return (kwargs["input"],), {key: value for key, value in kwargs.items() if key != "input"}


def argument(args: tuple, kwargs: dict[str, Any], position: int, name: str, default: Any = None) -> Any:
    """One argument of a call, by place or by name."""
    return args[position] if len(args) > position else kwargs.get(name, default)
