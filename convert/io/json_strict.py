"""JSON as a checkpoint's files hold it: one object, no key twice, every failure an UnreadableCheckpoint.

Imports the standard library and convert.errors.
"""

import json
from pathlib import Path
from typing import Any

from convert.errors import UnreadableCheckpoint

__all__ = ["MAX_JSON_BYTES", "parse_object", "read_object"]

MAX_JSON_BYTES = 10_000_000
"""The largest published Mixtral takes a fiftieth of it; to parse so much takes less than a second."""


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        UnreadableCheckpoint: it is missing, unreadable or not such an object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UnreadableCheckpoint(f"{path}: {path.stat().st_size:,} bytes, at most {MAX_JSON_BYTES:,} expected")
        return parse_object(path.read_bytes(), str(path))
    except OSError as error:
        raise UnreadableCheckpoint(f"{path}: cannot be read: {error.strerror}") from error


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """Parse one JSON object; `where` opens the message of a failure.

    Raises:
        UnreadableCheckpoint: not UTF-8, not JSON, not an object, or a key occurs twice or does not print.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise UnreadableCheckpoint(f"{where}: nested too deeply to be what it claims") from error
    except ValueError as error:  # covers bad UTF-8, bad JSON and overlong numbers
        raise UnreadableCheckpoint(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnreadableCheckpoint(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key[:80]!r} occurs twice")
        if not key.isprintable():
            raise ValueError(f"key {key[:80]!r} has characters that do not print")
        found[key] = value
    return found
