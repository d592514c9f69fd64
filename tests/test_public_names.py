"""Every public name exists, is documented, and is part of the API reference."""

import inspect

import pytest

import upweight

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
