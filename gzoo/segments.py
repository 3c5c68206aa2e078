"""Channels of a plain network that stay together, whose number can be chosen, and strings of them."""

from collections.abc import Iterable
from typing import NamedTuple


class Segment:
    """Consecutive channels that stay together.

    Attributes:
        size: plain channels.
        image: whether they have no fibre, as the channels of the image and what is added to them; or a mean over all
            channels; or one channel that is multiplied with all others.
        groups: of the grouped convolutions that read or write them.
        folded: side of the squares of pixels that are folded into them; 1 if none are.
        unfolded: the channels that a pixel shuffle makes of them and of as many more; None if it makes none.
        activated: whether an activation of hidden layers acts on them.
    """

    def __init__(
        self, size: int, image: bool = False, groups: Iterable[int] = (), folded: int = 1, activated: bool = False
    ) -> None:
        self.size, self.image, self.groups, self.folded, self.activated = size, image, set(groups), folded, activated
        self.unfolded: Segment | None = None
        self._became: tuple[Segment, ...] | None = None  # the parts that it was cut in, or what it was tied to

    def parts(self) -> "Segments":
        """What the segment is by now."""
        if self._became is None:
            return (self,)
        self._became = flat(self._became)
        return self._became

    def cut(self, position: int) -> None:
        """Takes the segment apart after ``position`` channels."""
        sizes = position, self.size - position
        self._became = tuple(Segment(size, self.image, self.groups, self.folded, self.activated) for size in sizes)

    def tie(self, other: "Segment") -> None:
        """From now on the two are one; what is added to the image has no fibre, as the image has none."""
        self.image |= other.image
        self.groups |= other.groups
        self.activated |= other.activated
        self.unfolded = self.unfolded or other.unfolded
        other._became = (self,)


Segments = tuple[Segment, ...]


def flat(segments: Iterable[Segment]) -> Segments:
    """The segments as they are by now."""
    return tuple(part for segment in segments for part in segment.parts())


def cut(segments: Segments, position: int) -> tuple[Segments, Segments]:
    """The first ``position`` channels, and the others."""
    left = 0
    for i, segment in enumerate(flat(segments)):
        if left == position:
            return flat(segments)[:i], flat(segments)[i:]
        if left < position < left + segment.size:
            segment.cut(position - left)
            return cut(segments, position)  # it may stand before this place, too
        left += segment.size
    return flat(segments), ()


def tie(first: Segments, second: Segments) -> None:
    """Ties two strings of segments with the same number of channels, cutting them where the other has an end."""
    while True:
        first, second = flat(first), flat(second)
        pair = next(((a, b) for a, b in zip(first, second, strict=False) if a is not b), None)
        if pair is None:
            return
        a, b = pair
        if a.size == b.size:
            a.tie(b)
        else:
            max(pair, key=lambda segment: segment.size).cut(min(a.size, b.size))


def tie_copies(segments: Segments, channels: int) -> Segments:
    """Ties each ``channels`` of a string of segments, which are read as several times the same ones, to the first."""
    first, rest = cut(segments, channels)
    while rest:
        other, rest = cut(rest, channels)
        tie(first, other)
    return flat(first)


def total(segments: Segments) -> int:
    """Plain channels of all of them."""
    return sum(segment.size for segment in segments)


class Channels(NamedTuple):
    """Where a tensor has its channels, and which they are; whether one without a fibre was spread over all of them."""

    dim: int
    segments: Segments
    spread: bool = False
