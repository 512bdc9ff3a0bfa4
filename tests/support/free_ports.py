"""Free ports for servers of tests."""

from __future__ import annotations

import random
import socket

#: below the ephemeral ports, so that no client socket takes the port before a server listens or while it restarts
PORT_RANGE = range(15_000, 30_000)


def free_port() -> int:
    """Return a random free port. It is random so that concurrent test processes rarely choose the same."""
    for port in random.SystemRandom().sample(PORT_RANGE, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"a hundred ports of {PORT_RANGE}, and every one is taken")
