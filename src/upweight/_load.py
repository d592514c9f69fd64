"""Import what a user names as ``path/to/file.py:name`` or ``package.module:name``, or say in one line why not."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from upweight.errors import UpweightError

__all__ = ["import_name"]

EXAMPLE = "examples/digits_experiment.py:experiment"

_LOADED: dict[str, Path] = {}
"""Modules that were made of a user's files here, which a file of the same name elsewhere may replace."""


def import_name(address: str, wanted: Callable[[Any], bool]) -> Any:
    """What the address names; if that is a function without arguments, what it returns.

    Args:
        address: ``path/to/file.py:name`` or ``package.module:name``.
        wanted: Whether a value is of the kind that is looked for, for suggestions and to know when to call.

    Raises:
        UpweightError: The address is malformed, nothing is there, or the code there raises.
    """
    place, colon, name = address.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise UpweightError(
            f"{address!r} is no experiment, expected path/to/file.py:name or package.module:name -> "
            + (f"{address}:experiment, if that is its name there" if address.endswith(".py") else EXAMPLE)
        )
    is_file = place.endswith(".py") or "/" in place or "\\" in place
    module = _from_file(Path(place).expanduser()) if is_file else _from_module(place)
    if not hasattr(module, name):
        raise UpweightError(f"{place} has no {name!r} -> {_others(module, place, name, wanted)}")
    value = getattr(module, name)
    if wanted(value) or isinstance(value, type) or not _callable_without_arguments(value):
        return value
    try:
        return value()
    except (Exception, SystemExit) as error:
        _blame(error, f"{name}() in {place}", _file_of(module))


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UpweightError(f"{path} {what} (looked from {Path.cwd()}) -> check the path{_near(path)}")
    if path.suffix != ".py":
        raise UpweightError(f"{path} is no Python file -> name a file that ends in .py")
    path = path.resolve()
    name = path.stem
    loaded = sys.modules.get(name)
    if "." in name or (loaded is not None and name not in _LOADED and _file_of(loaded) != str(path)):
        why = "holds a dot" if "." in name else f"is that of a module ({_file_of(loaded) or 'built in'})"
        raise UpweightError(f"the name of {path} cannot be imported: {name!r} {why} -> rename the file")
    # As `python path/to/file.py` has it: modules beside the file can be imported, and so can the file itself, by its
    # plain name, in the worker processes of a retraining bank.
    if str(path.parent) in sys.path:
        sys.path.remove(str(path.parent))
    sys.path.insert(0, str(path.parent))
    importlib.invalidate_caches()
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name], _LOADED[name] = module, path
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name], _LOADED[name]
        _blame(error, str(path), str(path))
    return module


def _from_module(name: str) -> ModuleType:
    # A console script does not look in the working folder, `python -m` does.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise UpweightError(
                f"there is no module {error.name!r} (looked in {Path.cwd()} and in the installed packages) -> check "
                "the name; a file is named by its path, such as path/to/file.py:name"
            ) from None
        _blame(error, name, None)
    except (Exception, SystemExit) as error:
        _blame(error, name, None)


def _blame(error: BaseException, what: str, file: str | None) -> NoReturn:
    """Name the last line of the user's own file (of any file, without one) that led to the error."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == file] or [
        frame for frame in frames if not frame.filename.startswith("<") and frame.filename != __file__
    ]
    where, way_out = "", "repair it, or pass --debug for the whole traceback"
    if isinstance(error, SyntaxError) and error.filename == file:
        where = f" (line {error.lineno}: {(error.text or '').strip()})"
        error = SyntaxError(error.msg)
    elif own:
        there = "" if own[-1].filename == file else f"{own[-1].filename}, "
        where = f" ({there}line {own[-1].lineno}: {own[-1].line})"
    if isinstance(error, UpweightError):  # it says itself what to do
        raise UpweightError(f"{what}{where}: {error}") from error
    text = " ".join(traceback.format_exception_only(error)[-1].split())
    raise UpweightError(f"{what} raised {text[:400]}{where} -> {way_out}") from error


def _others(module: ModuleType, place: str, name: str, wanted: Callable[[Any], bool]) -> str:
    """What the user may have meant: values of the right kind, else names alike."""
    names = [key for key, value in vars(module).items() if not key.startswith("_")]
    fitting = [key for key in names if wanted(getattr(module, key))]
    close = fitting or difflib.get_close_matches(name, names, n=3)
    if not close:
        return f"define {name} there, as an upweight.Experiment or a function that returns one"
    return " or ".join(f"{place}:{key}" for key in close[:3])


def _near(path: Path) -> str:
    """Python files beside the missing one whose names are alike."""
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent}"
    close = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.py")], n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _callable_without_arguments(value: Any) -> bool:
    # Functions, also decorated ones; a model is callable too, but not what is meant.
    if not isinstance(value, functools.partial) and not (
        callable(value) and inspect.isroutine(inspect.unwrap(value))
    ):
        return False
    try:
        inspect.signature(value).bind()
    except (TypeError, ValueError):
        return False
    return True


def _file_of(module: ModuleType | None) -> str | None:
    return getattr(module, "__file__", None)
