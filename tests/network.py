"""Where processes of a test find each other."""

import socket

__all__ = ["free_address"]


def free_address() -> str:
    """Give a host:port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"
