"""The public names: each is there, typed as it is at run time, and costs nothing until it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import cedkv


def test_every_public_name_can_be_imported() -> None:
    for name in cedkv.__all__:
        assert getattr(cedkv, name) is not None, name
    assert set(cedkv.__all__) <= set(dir(cedkv))
    assert sorted(cedkv.__all__) == sorted(["__version__", *cedkv._MODULE_OF])
    assert not hasattr(cedkv, "Selectr")


def test_type_checkers_see_the_same_names() -> None:
    """Under ``TYPE_CHECKING`` the names are imported plainly; the two lists must not drift apart."""
    tree = ast.parse(Path(cedkv.__file__).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {(node.module, name.name) for node in guarded.body for name in node.names}  # type: ignore[attr-defined]
    assert imported == {(module, name) for module, names in cedkv._PUBLIC.items() for name in names}


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = "import cedkv, sys; print(sorted({'numpy', 'torch', 'pydantic', 'mlflow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
