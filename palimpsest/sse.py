"""Server-sent events, read line by line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Event:
    """One server-sent event."""

    id: str
    name: str
    data: Any


class EventReader:
    """Takes the lines of a stream and gives an event where one ends. Comments (pings) are passed over."""

    def __init__(self) -> None:
        self._fields: dict[str, list[str]] = {}

    def feed_line(self, line: str) -> Event | None:
        """The event that this line ends, if it ends one."""
        if line:
            name, _, value = line.partition(":")
            self._fields.setdefault(name, []).append(value.removeprefix(" "))
            return None
        fields, self._fields = self._fields, {}
        if "data" not in fields:
            return None
        text = "\n".join(fields["data"])
        return Event(fields.get("id", [""])[-1], fields.get("event", ["message"])[-1], json.loads(text))


def parse_events(lines: Iterable[str]) -> Iterator[Event]:
    """The events of a stream whose lines come by themselves."""
    reader = EventReader()
    for line in lines:
        if (event := reader.feed_line(line)) is not None:
            yield event
