"""Ports for the servers of tests."""

from __future__ import annotations

import random
import socket

#: below those from which systems give clients theirs: none comes by one of these before a server of ours listens on it, or
#: while that server is down for a moment
PORT_RANGE = range(15_000, 30_000)


def free_port() -> int:
    """One on which nobody listens, by lot: processes that test side by side do not meet on it."""
    for port in random.SystemRandom().sample(PORT_RANGE, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"a hundred ports of {PORT_RANGE}, and every one is taken")
