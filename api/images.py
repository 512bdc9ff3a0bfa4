"""The forms of a trace: JSON, or the heat map in the manner of the paper's figures, as `Accept` asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from api.errors import NotAcceptable
from service.errors import Conflict

JSON = "application/json"
SVG, PNG, HTML = "image/svg+xml", "image/png", "text/html"
#: in the order of preference where the client has none
OFFERED = (JSON, SVG, PNG, HTML)

#: for the OpenAPI document
DOCUMENTED: dict[str, Any] = {
    SVG: {"schema": {"type": "string"}},
    PNG: {"schema": {"type": "string", "format": "binary"}},
    HTML: {"schema": {"type": "string"}},
}


def negotiate(accept: str | None) -> str:
    """The offered media type that the client likes best; JSON where it does not care (RFC 9110, 12.5.1)."""
    if not accept or not accept.strip():
        return JSON
    wanted = [_range(part) for part in accept.split(",") if part.strip()]
    liked = {offer: _liking(offer, wanted) for offer in OFFERED}
    best = max(OFFERED, key=lambda offer: liked[offer])  # the first of equals: JSON
    if liked[best] <= (0.0, 0):
        raise NotAcceptable(f"A trace can be had as {', '.join(OFFERED)}: ask for one of these in `Accept`.")
    return best


def draw(trace: dict[str, Any], media_type: str) -> str | bytes:
    """The heat map of a trace that is done."""
    if trace["status"] != "done":
        raise Conflict(
            f"The trace is {trace['status']}: there is a picture once it is done. Ask for {JSON} to see how it stands."
        )
    from service.tracing import heatmap  # and matplotlib with it, which only this needs

    drawings: dict[str, Callable[[dict[str, Any]], str | bytes]] = {
        SVG: heatmap.svg,
        PNG: heatmap.png,
        HTML: heatmap.page,
    }
    return drawings[media_type](trace["result"])


def _range(part: str) -> tuple[str, float]:
    media, *parameters = (piece.strip().lower() for piece in part.split(";"))
    quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
    try:
        return media, min(max(float(quality), 0.0), 1.0)
    except ValueError:
        return media, 0.0


def _liking(offer: str, wanted: list[tuple[str, float]]) -> tuple[float, int]:
    """(quality, how exactly it is named): the most exact range speaks for the offer."""
    exact = {offer: 3, offer.partition("/")[0] + "/*": 2, "*/*": 1}
    fitting = [(exact[media], quality) for media, quality in wanted if media in exact]
    if not fitting:
        return (0.0, 0)
    precision, quality = max(fitting)
    return (quality, precision) if quality > 0 else (0.0, 0)
