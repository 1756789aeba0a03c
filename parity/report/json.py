"""result.json, and its JSON Schema."""

import json
from importlib.resources import files
from typing import Any

from parity.result import Result

__all__ = ["render", "schema"]


def render(result: Result) -> str:
    """Give the text of result.json; points stand in the order of computation."""
    return json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n"


def schema() -> dict[str, Any]:
    """Give the JSON Schema of result.json."""
    loaded: dict[str, Any] = json.loads(files("parity.report").joinpath("result.schema.json").read_text())
    return loaded
