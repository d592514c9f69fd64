"""What upweight raises when it is asked for something it cannot do right.

Every message is one line: what was seen, what was expected, and the way out.
"""

from __future__ import annotations

__all__ = ["CacheMismatchError", "StoreError", "UpweightError"]


class UpweightError(ValueError):
    """Base of every error upweight raises on input it cannot use.

    It is a ``ValueError``, so code that already guards against bad input keeps working.

    Example:
        >>> try:
        ...     raise CacheMismatchError("the cache was written for another model -> use a new folder")
        ... except UpweightError as error:
        ...     print(error)
        the cache was written for another model -> use a new folder
    """


class StoreError(UpweightError):
    """A file or folder cannot be written, cannot be read, or is not what it claims to be."""


class CacheMismatchError(StoreError):
    """A folder holds results of a different run: other model, data or settings."""
