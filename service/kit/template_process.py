"""The process that renders templates: one line of JSON in, one out. Started by `service.kit.template_renderer`.

The kernel ends it when a template needs more processor time than it may have, and refuses it memory above its
limit. It has no environment variables, so no template can read the secrets of the service.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from contextlib import suppress
from typing import Any

from service.kit.chat_template import RefusedByTemplate, render

MAX_MESSAGE = 500  #: characters of the message of an error


def main(cpu_seconds: float, max_memory: int) -> None:
    """Answer until the input ends. The limits are the processor time of one rendering, and bytes of address space."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the service, which then closes the input
    for limit, value in (
        (resource.RLIMIT_AS, max_memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        with suppress(ValueError, OSError):  # not every system has every limit
            resource.setrlimit(limit, (value, value))
    for line in sys.stdin.buffer:
        signal.setitimer(
            signal.ITIMER_PROF, cpu_seconds
        )  # SIGPROF ends the process, also inside a C function
        answer = _answer(line)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _answer(line: bytes) -> dict[str, Any]:
    request = json.loads(line)
    try:
        return {"text": render(request["source"], request["variables"])}
    except RefusedByTemplate as error:
        return {"refusal": str(error)[:MAX_MESSAGE]}
    except Exception as error:  # a template's expressions can raise errors of every class
        return {"error": f"{type(error).__name__}: {error}"[:MAX_MESSAGE]}


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
