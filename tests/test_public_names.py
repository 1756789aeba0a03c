"""What `__all__` promises is there, once; its order is checked by ruff (RUF022)."""

import importlib
import pkgutil

import pytest

PACKAGES = ("convert", "flax_mixtral", "parity")


def public_modules() -> list[str]:
    """The packages and all their modules, but those that start with an underscore."""
    names = list(PACKAGES)
    for package in PACKAGES:
        path = importlib.import_module(package).__path__
        names += [module.name for module in pkgutil.walk_packages(path, f"{package}.")]
    return [name for name in names if not any(part.startswith("_") for part in name.split("."))]


def unkept_promises(exported: list[str], there: list[str]) -> list[str]:
    """The names of `__all__` that are missing or listed twice."""
    return sorted(set(exported) - set(there)) + sorted({name for name in exported if exported.count(name) > 1})


@pytest.mark.parametrize("name", PACKAGES)
def test_package_has_a_public_face(name: str) -> None:
    assert importlib.import_module(name).__all__


@pytest.mark.parametrize("name", public_modules())
def test_public_names_are_there(name: str) -> None:
    module = importlib.import_module(name)
    exported = list(getattr(module, "__all__", []))
    there = [export for export in exported if hasattr(module, export)]
    assert unkept_promises(exported, there) == []


def test_unkept_promises_are_found() -> None:
    assert unkept_promises(["here", "gone", "here"], ["here"]) == ["gone", "here"]
