"""Imports escnn where py3nj and lie_learn are missing. Both serve escnn's 3D groups only; gzoo works in the plane.

Neither installs everywhere (py3nj needs a Fortran compiler, lie_learn numpy < 2), so gzoo installs without them. Every
other module of gzoo gets escnn from `load`; an installed lie_learn or py3nj is used as it is.
"""

import sys
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn


class _StandIn(MetaPathFinder, Loader):
    """Makes ``lie_learn`` where it is not installed, so that escnn imports as soon as gzoo was imported.

    escnn.group.groups.so3_utils takes one name of it at import, which SO(3) code alone calls. For escnn alone: without
    it, lie_learn stays missing.
    """

    user = "lie_learn.representations.SO3.wigner_d"

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        inside = "escnn" in sys.modules and (name == self.user or self.user.startswith(f"{name}."))
        return ModuleSpec(name, self, is_package=name != self.user) if inside else None

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == self.user:
            module.wigner_D_matrix = _needs_lie_learn  # type: ignore[attr-defined]


sys.meta_path.append(_StandIn())  # the last, so that an installed one comes first
if "escnn" in sys.modules and "escnn.group" not in sys.modules:
    # Who imported escnn before has half of it: it hides that lie_learn is missing, and goes on from here only anew.
    for _name in [name for name in sys.modules if name.startswith("escnn.")]:
        del sys.modules[_name]


@cache
def load() -> ModuleType:
    """Returns the module ``escnn`` with ``escnn.gspaces``, ``escnn.nn`` and ``escnn.group`` imported."""
    with warnings.catch_warnings():
        # Without py3nj escnn warns that 3D Clebsch-Gordan coefficients are slow; its own docstrings hold bad escapes.
        warnings.filterwarnings("ignore", message="`py3nj` package not found")
        warnings.filterwarnings("ignore", message=".*invalid escape sequence", category=SyntaxWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        import escnn
        import escnn.group
        import escnn.gspaces
        import escnn.nn
    # Where scikit-learn is installed escnn 1.0.11 hands it a np.matrix, which scikit-learn has refused since 1.2, so no
    # kernel basis of a dN is built. This takes escnn's other way, scipy's SVD, which also draws no random numbers.
    escnn.group._numerical.randomized_svd = None
    return escnn


def _needs_lie_learn(*args: Any, **kwargs: Any) -> NoReturn:
    raise ImportError(
        "this part of escnn works with 3D rotations and needs the package lie_learn, which gzoo leaves out because it "
        "serves the plane. Install lie_learn and py3nj for 3D groups."
    )
