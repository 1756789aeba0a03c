"""result.json."""

import json

from parity.result import Result

__all__ = ["render"]


def render(result: Result) -> str:
    """Give the text of result.json; points stand in the order of computation."""
    return json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n"
