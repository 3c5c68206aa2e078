"""Groups by name, and how their elements act on images and on feature maps.

An element is its index in escnn's order of the point group: first the N rotations, g = r; then, where there are
reflections, g = N + r: reflect the width axis, then rotate by r. A rotation by r is counterclockwise by r * 360 / N
degrees. The tests compare order, products and action with escnn's.
"""

import math
import operator
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor

from gzoo import _escnn

if TYPE_CHECKING:
    from escnn.group import Representation
    from escnn.gspaces import GSpace
    from escnn.nn import FieldType

# Of channels: pairs are vectors, how far to the right and how far down, or of twice the angle; more than two are
# numbers of as many directions, evenly spaced from the left clockwise, such as the distances (left, top, right, bottom)
# to sides of a box. Opposite directions may share theirs: (0, 1, 0, 1) are a width and a height.
Directions = Sequence[tuple[int, ...]]


class DoubleAngle(NamedTuple):
    """Two channels of what half a turn brings back, such as the orientation of a fibre or of the long side of a box, or
    the ellipticity (e1, e2) of a galaxy: its size times cos 2a and sin 2a.

    Attributes:
        cosine: the channel of the first; a is the angle from the right downwards, as rows count.
        sine: the channel of the second, along the diagonal from the top left; for an angle upwards it is the negative.

    Source: Granlund 1978, "In search of a general picture processing operator".
    """

    cosine: int
    sine: int


_ALIASES = {"c4": "p4", "d4": "p4m"}
_GRAMMAR = (
    "p4 (rotations by 90 degrees), p4m (those and reflections), cN (N rotations: c1, c2, c4 = p4, c8, ...), "
    "dN (N rotations and reflections: d1, d2, d4 = p4m, d8, ...)"
)


@dataclass(frozen=True)
class Group:
    """A point group of the plane: N rotations about the centre of the image, with or without reflections.

    Two groups are equal if rotations and reflections are, so ``get("d4") == get("p4m")``. Get one with `get`.
    """

    rotations: int
    reflections: bool

    @property
    def name(self) -> str:
        """The canonical name: "p4" for c4, "p4m" for d4, else cN or dN."""
        name = f"{'d' if self.reflections else 'c'}{self.rotations}"
        return _ALIASES.get(name, name)

    @property
    def order(self) -> int:
        """|G|, the number of elements."""
        return self.rotations * (2 if self.reflections else 1)

    @property
    def on_grid(self) -> bool:
        """Whether every element maps the pixel grid onto itself: N is 1, 2 or 4."""
        return self.rotations in (1, 2, 4)

    @cached_property
    def grid_elements(self) -> tuple[int, ...]:
        """The elements that map the pixel grid onto itself; all of them if `on_grid`."""
        return tuple(g for g in range(self.order) if self._is_on_grid(g))

    @property
    def grid_generators(self) -> tuple[int, ...]:
        """The first turn on the grid and the reflection, as far as there are such: they make all `grid_elements`."""
        turns = [g for g in self.grid_elements if 0 < g < self.rotations]
        return (*turns[:1], *([self.rotations] if self.reflections else []))

    def _is_on_grid(self, g: int) -> bool:
        return (g % self.rotations) * 4 % self.rotations == 0

    def label(self, g: int) -> str:
        """A short name of element g for tables: "90", "flip", "flip 90" (degrees)."""
        angle = f"{g % self.rotations * 360 / self.rotations:g}"
        if g < self.rotations:
            return angle
        return "flip" if angle == "0" else f"flip {angle}"

    def multiply(self, g: int, h: int) -> int:
        """The product gh: h acts first."""
        n = self.rotations
        turn = -(h % n) if g >= n else h % n  # a reflection turns the rotations that follow it backwards
        return (g % n + turn) % n + n * ((g >= n) != (h >= n))

    def inverse(self, g: int) -> int:
        """The element h with gh = hg = e."""
        return g if g >= self.rotations else -g % self.rotations

    def transform_image(self, x: Tensor, g: int) -> Tensor:
        """g.x for an image or any trivial field: moves pixels, exactly.

        Args:
            x: (..., H, W).
            g: an element of `grid_elements`.

        Shape:
            (..., H, W), or (..., W, H) after a quarter turn.

        Raises:
            ValueError: g is no element of the group, or maps pixels between pixels.
        """
        self.require_element(g)
        if not self._is_on_grid(g):  # not the cached elements: torch.compile cannot enter their lock (Python < 3.12)
            raise ValueError(
                f"element {g} of {self.name} turns by {self.label(g)} degrees, between the pixels; exact on the grid "
                f"are the elements {self.grid_elements}"
            )
        if g >= self.rotations:
            x = x.flip(-1)
        return x.rot90(g % self.rotations * 4 // self.rotations, (-2, -1))

    def transform_features(self, x: Tensor, g: int) -> Tensor:
        """g.x for regular fields: moves pixels, and the value at h in a fibre to gh.

        Args:
            x: (B, fields * |G|, H, W), channel = field * |G| + h; or (B, fields * |G|) without pixels.
            g: an element of `grid_elements`; without pixels any element.

        Raises:
            ValueError: as `transform_image`, or the channels are no whole number of fields.
        """
        self.require_element(g)
        if x.shape[1] % self.order:
            raise ValueError(f"{x.shape[1]} channels are no whole number of {self.name} fields of |G| = {self.order}")
        inverse = self.inverse(g)
        source = torch.tensor([self.multiply(inverse, h) for h in range(self.order)], device=x.device)
        y = x.unflatten(1, (-1, self.order)).index_select(2, source).flatten(1, 2)
        return self.transform_image(y, g) if x.ndim > 2 else y

    def transform_vectors(self, x: Tensor, g: int, vectors: Directions = ((0, 1),)) -> Tensor:
        """g.x for maps of directions, such as a flow: moves pixels, and turns the directions with them.

        Args:
            x: (B, C, H, W); or (B, C) without pixels.
            g: an element of `grid_elements`; without pixels any element.
            vectors: the channels of each: a pair is a vector, how far to the right and how far down (as rows count); a
                `DoubleAngle` turns by twice the angle. More are numbers of that many directions from the left
                clockwise, such as (left, top, right, bottom) or (width, height, width, height). The other channels are
                numbers, which only move.

        Raises:
            ValueError: as `transform_image` and `turn`, or ``vectors`` names no channels of x.
        """
        self.require_element(g)
        require_directions(vectors, x.shape[1])
        if vectors:
            channels = list(x.unbind(1))
            for places in vectors:
                rows = self.turn(g, len(places), 2 if isinstance(places, DoubleAngle) else 1)
                for place, row in zip(places, rows, strict=True):
                    parts = [factor * x[:, source] for factor, source in zip(row, places, strict=True) if factor]
                    channels[place] = torch.stack(parts).sum(0)
            x = torch.stack(channels, 1)
        return self.transform_image(x, g) if x.ndim > 2 else x

    def turn(self, g: int, numbers: int, frequency: int = 1) -> tuple[tuple[float, ...], ...]:
        """The matrix of g for a vector (right, down), exact for multiples of 90 degrees; or for more numbers than two,
        of as many directions, evenly spaced, from the left clockwise.

        Args:
            frequency: 2 turns a pair of numbers by twice the angle, see `DoubleAngle`.

        Raises:
            ValueError: the group takes some of these directions to none of them.
        """
        if numbers == 2:
            angle = 2 * math.pi * (g % self.rotations) * frequency / self.rotations
            cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
            side = -1.0 if g >= self.rotations else 1.0  # a reflection acts first: a becomes 180 degrees - a
            first, second = side**frequency, side ** (frequency + 1)
            return (first * cos, second * sin), (-first * sin, second * cos)
        if numbers % self.rotations or (self.reflections and numbers % 2):
            raise ValueError(
                f"{self.name} takes some of {numbers} directions between two others; it permutes multiples of "
                f"{math.lcm(self.rotations, 2 if self.reflections else 1)}"
            )
        step = g % self.rotations * numbers // self.rotations  # counterclockwise
        came_from = [i + step if g < self.rotations else numbers // 2 - i - step for i in range(numbers)]
        return tuple(tuple(float(j == source % numbers) for j in range(numbers)) for source in came_from)

    def element(self, g: int, other: "Group") -> int | None:
        """Element g of another group as one of this group, with the same mirror axis; None if it is not in it."""
        turn, between = divmod(g % other.rotations * self.rotations, other.rotations)
        if between or (g >= other.rotations and not self.reflections):
            return None
        return turn + self.rotations * (g >= other.rotations)

    def elements_of(self, subgroup: "Group") -> list[int]:
        """All elements of a subgroup as ones of this group, in its order.

        Raises:
            ValueError: it is no subgroup with the same mirror axis.
        """
        elements = [g for h in range(subgroup.order) if (g := self.element(h, subgroup)) is not None]
        if len(elements) < subgroup.order:
            names = ", ".join(known.name for known in self.subgroups)
            raise ValueError(f"{subgroup.name} is no subgroup of {self.name}; its subgroups are {names}")
        return elements

    @property
    def subgroups(self) -> list["Group"]:
        """All with the same mirror axis, from c1 to the group itself."""
        divisors = [m for m in range(1, self.rotations + 1) if self.rotations % m == 0]
        return [Group(m, mirror) for mirror in (False, True)[: 1 + self.reflections] for m in divisors]

    def cosets(self, subgroup: "Group") -> list[list[int]]:
        """The left cosets xH of a subgroup H, xh at h, in the order of their first elements: escnn's order of G/H.

        Raises:
            ValueError: it is no subgroup.
        """
        elements = self.elements_of(subgroup)
        cosets: list[list[int]] = []
        for x in range(self.order):
            if not any(x in coset for coset in cosets):
                cosets.append([self.multiply(x, h) for h in elements])
        return cosets

    def stabilizers(self, fields: Mapping[str, int]) -> list[tuple["Group", int]]:
        """What ``{"c1": 5, "c2": 2}`` stands for, five G/C1 fields and two G/C2 fields: each H with its number.

        Raises:
            ValueError: there is no such group, or it is no subgroup; a number is none; there are no fields.
        """
        if not isinstance(fields, Mapping):
            raise ValueError(
                f"fields are {fields!r}; give their number by subgroup, as in {{'c1': 4, '{self.name}': 8}}"
            )
        for name, number in fields.items():
            self.cosets(get(name))
            if type(number) is not int or number < 1:
                raise ValueError(f"{number} fields of {self.name}/{name}: a number is at least 1; leave {name!r} out")
        if not fields:
            raise ValueError(f"there are no fields; give some by subgroup, as in {{'c1': 4, '{self.name}': 8}}")
        if len({get(name) for name in fields}) < len(fields):
            raise ValueError(f"{list(fields)} name a subgroup twice; add their numbers up under one name")
        return [(get(name), number) for name, number in fields.items()]

    def restriction(self, subgroup: "Group") -> list[int]:
        """The order of a fibre in which it is regular fields of ``subgroup``: one for each right coset Hx, hx at h.

        Raises:
            ValueError: it is no subgroup.
        """
        elements = self.elements_of(subgroup)
        order: list[int] = []
        for x in range(self.order):
            if x not in order:
                order += [self.multiply(g, x) for g in elements]
        return order

    def require_element(self, g: object) -> None:
        if not isinstance(g, SupportsIndex) or not 0 <= operator.index(g) < self.order:
            raise ValueError(f"{g!r} is no element of {self.name}; its elements are 0 to {self.order - 1}")

    @property
    def gspace(self) -> "GSpace":
        """The group as an escnn gspace."""
        return _gspace(self)

    def field_type(self, fields: int) -> "FieldType":
        """The escnn type of ``fields`` regular fields."""
        return _escnn.load().nn.FieldType(self.gspace, fields * [self.gspace.regular_repr])

    def image_type(self, channels: int) -> "FieldType":
        """The escnn type of an image: ``channels`` trivial fields."""
        return _escnn.load().nn.FieldType(self.gspace, channels * [self.gspace.trivial_repr])

    def quotient_type(self, fields: Mapping[str, int]) -> "FieldType":
        """The escnn type of quotient fields: H -> number of fields of G/H, in this order; see `gzoo.nn.QuotientConv2d`.

        Raises:
            ValueError: as `stabilizers`.
        """
        kinds = self.stabilizers(fields)
        return _escnn.load().nn.FieldType(self.gspace, [self._quotient_repr(h) for h, n in kinds for _ in range(n)])

    def _quotient_repr(self, subgroup: "Group") -> "Representation":
        if subgroup.order == 1:  # escnn takes one law under two names for two laws
            return self.gspace.regular_repr
        if subgroup == self:
            return self.gspace.trivial_repr
        axis = 0 if subgroup.reflections else None
        return self.gspace.quotient_repr((axis, subgroup.rotations) if self.reflections else subgroup.rotations)


@cache
def _gspace(group: Group) -> "GSpace":
    gspaces = _escnn.load().gspaces
    if group.reflections:
        return gspaces.flipRot2dOnR2(group.rotations) if group.rotations > 1 else gspaces.flip2dOnR2()
    return gspaces.rot2dOnR2(group.rotations) if group.rotations > 1 else gspaces.trivialOnR2()


def require_directions(vectors: Any, channels: int | None = None) -> None:
    """Raises ValueError unless each of ``vectors`` is two or more of the channels, and no channel is in two."""
    try:
        flat = [channel for places in vectors for channel in (*_once(places), *(() if len(places) > 1 else (None,)))]
    except TypeError:
        flat = [None]
    most = sys.maxsize if channels is None else channels
    if not all(type(channel) is int and 0 <= channel < most for channel in flat) or len(set(flat)) < len(flat):
        known = "channels" if channels is None else f"{channels} channels"
        raise ValueError(
            f"the channels that are vectors are {vectors!r}; accepted are pairs (right, down) of two of the {known}, "
            "as in [(0, 1)], gzoo.DoubleAngle(0, 1), distances (left, top, right, bottom), or (width, height, width, "
            "height), each channel in one at most"
        )


def _once(places: Any) -> Any:
    """The channels of some directions, those that opposite ones share but once."""
    half = len(places) // 2
    return places[:half] if half > 1 and places[:half] == places[half:] else places


def get(name: str) -> Group:
    """The group called ``name``: p4, p4m, cN or dN; c4 is p4 and d4 is p4m.

    Raises:
        ValueError: there is no such group; the message lists the names.
    """
    match = re.fullmatch(r"(c|d)([1-9][0-9]*)", {"p4": "c4", "p4m": "d4"}.get(name, name))
    if match is None:
        raise ValueError(f"unknown group {name!r}; accepted are {_GRAMMAR}")
    return Group(int(match[2]), match[1] == "d")


def chain(name: str) -> tuple[Group, ...]:
    """The groups of the stages of a network: one, or several as in "d8:d4:d1".

    Raises:
        ValueError: there is no such group, or one is no subgroup of the one before it.
    """
    found = tuple(map(get, name.split(":")))
    for larger, smaller in pairwise(found):
        larger.restriction(smaller)
    return found


def spell(chain: tuple[Group, ...]) -> str:
    """The name of the groups of the stages, as `chain` takes it: "p4m", or "d8:d4:d1"."""
    if len(chain) == 1:
        return chain[0].name
    return ":".join(f"{'d' if group.reflections else 'c'}{group.rotations}" for group in chain)
