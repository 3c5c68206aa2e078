"""Classes that are made at run time, of others: in front of a module's own, which keeps what its class can do."""

import copyreg
from collections.abc import Callable
from functools import cache, wraps
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
        prefix: before the name of the other.
    """

    prefix: str


def put_in_front(module: nn.Module, front: type[Front]) -> None:
    """Gives ``module``, in place, the class that ``front`` and its own class make."""
    module.__class__ = _both(front, type(module))  # type: ignore[arg-type]  # mypy: a class is hashable


@cache
def _both(front: type[Front], plain: type[nn.Module]) -> type[Front]:
    members: dict[str, Any] = {"__module__": __name__, "made_by": (_both, (front, plain))}
    if "forward" in vars(front):
        members["forward"] = _with_arguments_of(plain.forward, front.forward)
    made: Any = Made(f"{front.prefix}{plain.__name__}", (front, plain), members)
    return made


def _with_arguments_of(plain: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` with the arguments of another in its signature, which torch.export reads."""

    @wraps(plain)
    def forward_of_both(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return forward_of_both
