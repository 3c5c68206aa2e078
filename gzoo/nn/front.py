"""Classes that are made at run time, of others: in front of a module's own, which keeps what its class can do."""

import copyreg
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn


class Made(type):
    """The class of classes that exist in this process only: pickles name how one is made, not where it is.

    Attributes:
        made_by: a function and its arguments.
    """

    made_by: tuple[Callable[..., type], tuple[Any, ...]]


copyreg.pickle(Made, lambda cls: cls.made_by)  # type: ignore[arg-type,return-value]  # typeshed knows instances only


class Front(nn.Module):
    """A class that `put_in_front` can put in front of another.

    Attributes:
        gzoo_prefix: before the name of the other.
    """

    gzoo_prefix: str


def put_in_front(module: nn.Module, front: type[Front]) -> None:
    """Gives ``module``, in place, the class that ``front`` and its own class make."""
    module.__class__ = _both(front, type(module))  # type: ignore[arg-type]  # mypy: a class is hashable


@cache
def _both(front: type[Front], plain: type[nn.Module]) -> type[Front]:
    members: dict[str, Any] = {"__module__": __name__, "made_by": (_both, (front, plain))}
    made: Any = Made(f"{front.gzoo_prefix}{plain.__name__}", (front, plain), members)
    return made
