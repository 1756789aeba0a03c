"""Run tests again in a process of their own, whose environment JAX or NNX reads on import."""

import os
import subprocess
import sys

__all__ = ["rerun"]


def rerun(*arguments: str, expected: int, **environment: str) -> None:
    """Run pytest; so many tests must pass, and none fail.

    Args:
        arguments: of pytest.
        expected: how many tests there are.
        environment: variables beside those of this process.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{expected} passed" in done.stdout
