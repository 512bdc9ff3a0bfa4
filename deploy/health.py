"""The health check of a container: ends with 0 when GET /healthz on this port of this machine says 200.

Part of the images, run by whatever python is there: the standard library only, and no proxy on the way.
"""

from __future__ import annotations

import sys
from http.client import HTTPConnection, HTTPException

SECONDS = 4.0  # less than the engine's patience with the whole check


def healthy(port: int) -> bool:
    """Whether the process behind the port says that it is well."""
    connection = HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(0 if healthy(int(sys.argv[1])) else 1)
