"""Classes in front of a module's own: it keeps what its class can do, its forward first of all, and does more."""

from functools import cache
from typing import Any

from torch import nn


class Front(nn.Module):
    """A class that `put_in_front` can put in front of another.

    Attributes:
        prefix: before the name of the other.
    """

    prefix: str
    front_class: type["Front"]
    plain_class: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class of both exists in this process only, so copies and pickles name what it was made of.
        return _rebuild, _made_of(type(self)), self.__dict__.copy()


def put_in_front(module: nn.Module, front: type[Front]) -> None:
    """Gives ``module``, in place, the class that ``front`` and its own class make."""
    module.__class__ = _both(front, type(module))  # type: ignore[arg-type]  # mypy: a class is hashable


@cache
def _both(front: type[Front], plain: type[nn.Module]) -> type[Front]:
    members = {"__module__": __name__, "front_class": front, "plain_class": plain}
    return type(f"{front.prefix}{plain.__name__}", (front, plain), members)


def _made_of(cls: Any) -> tuple[type[nn.Module], ...]:
    """The classes that one was made of, the foremost first."""
    return (cls.front_class, *_made_of(cls.plain_class)) if "front_class" in vars(cls) else (cls,)


def _rebuild(*classes: Any) -> nn.Module:
    *fronts, cls = classes
    for front in reversed(fronts):
        cls = _both(front, cls)
    return cls.__new__(cls)
