"""escnn imports without lie_learn and py3nj, and what needs them says so."""

from importlib.util import find_spec

import pytest

from gzoo import _escnn
from tests import fresh


def test_escnn_loads_with_its_parts():
    escnn = _escnn.load()
    assert escnn.gspaces.rot2dOnR2(4).fibergroup.order() == 4
    assert escnn.nn.R2Conv.__name__ == "R2Conv"


def test_loading_escnn_twice_gives_the_same_module():
    assert _escnn.load() is _escnn.load()


@pytest.mark.skipif(
    getattr(find_spec("lie_learn"), "origin", None) is not None, reason="the real lie_learn is installed and used"
)
def test_3d_code_without_lie_learn_says_what_to_install():
    _escnn.load()
    from lie_learn.representations.SO3.wigner_d import wigner_D_matrix

    with pytest.raises(ImportError, match="Install lie_learn and py3nj for 3D groups"):
        wigner_D_matrix(1, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "code",
    [
        "import escnn; from gzoo import _escnn; _escnn.load().gspaces.flipRot2dOnR2(4).regular_repr; escnn.nn.R2Conv",
        "import gzoo; from escnn import gspaces, nn; gspaces.flipRot2dOnR2(4).regular_repr",
        "import escnn; import gzoo; from escnn import gspaces; gspaces.flipRot2dOnR2(4).regular_repr",
    ],
)
def test_escnn_imports_before_and_after_gzoo(code):
    done = fresh.run(f"import warnings; warnings.simplefilter('ignore'); {code}")
    assert done.returncode == 0, done.stderr


def test_a_kernel_basis_with_reflections_is_built_where_scikit_learn_is_installed():
    escnn = _escnn.load()
    pytest.importorskip("sklearn")
    constraint = [
        escnn.group.dihedral_group(3).regular_representation(g) for g in escnn.group.dihedral_group(3).generators
    ]
    basis = escnn.group._numerical.find_intertwiner_basis_sylvester(constraint, constraint)
    assert basis.shape == (36, 6)
