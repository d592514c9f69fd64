"""Every public name exists, is documented, and is part of the API reference."""

import importlib.util
import inspect
from pathlib import Path

import pytest

import upweight
import upweight.evaluate

NAMES = [name for name in upweight.__all__ if not name.startswith("__")]
DOCUMENTED = [
    name for name in NAMES if callable(getattr(upweight, name)) or inspect.ismodule(getattr(upweight, name))
]


def test_no_name_is_promised_twice_or_missing():
    assert len(set(upweight.__all__)) == len(upweight.__all__)
    assert [name for name in upweight.__all__ if not hasattr(upweight, name)] == []


@pytest.mark.parametrize(
    "name", DOCUMENTED or [pytest.param("", marks=pytest.mark.skip("nothing is public yet"))]
)
def test_public_name_and_its_public_methods_have_a_docstring(name):
    thing = getattr(upweight, name)
    assert inspect.getdoc(thing)
    if not inspect.isclass(thing):
        return
    # inspect.getdoc follows the inheritance, so an override may leave the words to its base.
    bare = [
        attribute
        for attribute, value in vars(thing).items()
        if not attribute.startswith("_")
        and (callable(value) or isinstance(value, property | staticmethod | classmethod))
        and not inspect.getdoc(getattr(thing, attribute))
    ]
    assert bare == []


@pytest.mark.parametrize("package", [upweight, upweight.evaluate], ids=lambda package: package.__name__)
def test_a_name_that_a_module_of_the_same_name_hides_has_its_own_entry_in_the_reference(package):
    """The generator takes the module for the name, and a module has no entry among the package's members."""
    reference = Path(__file__).parent.parent / "docs" / "api.md"
    assert f"::: {package.__name__}\n" in reference.read_text()
    hidden = []
    for name in package.__all__:
        thing = getattr(package, name)
        owner = getattr(thing, "__module__", None) or getattr(thing, "__name__", "")
        if owner.endswith(f".{name}"):  # a function in a module of its name, or the module itself
            beside = importlib.util.find_spec(owner.rpartition(".")[0])
            assert beside is not None
            if beside.name in ("upweight", "upweight.evaluate"):
                hidden.append(owner if inspect.ismodule(thing) else f"{owner}.{name}")
    assert [path for path in hidden if f"::: {path}\n" not in reference.read_text()] == []
    assert hidden or package is upweight
