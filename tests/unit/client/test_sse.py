"""Server-sent events: palimpsest.sse."""

from __future__ import annotations

from palimpsest.sse import Event, parse_events


def test_events_are_read_as_the_standard_has_them() -> None:
    """Comments are passed over, several data lines are one text, and what ends without a blank line is no event."""
    text = ": hi\n\nid: 4\nevent: token\ndata: {\ndata: }\n\nevent: empty\n\ndata:[1]\n\ndata: 2"
    assert list(parse_events(text.split("\n"))) == [Event("4", "token", {}), Event("", "message", [1])]
