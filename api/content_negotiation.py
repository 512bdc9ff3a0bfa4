"""Content negotiation of traces and evaluations: JSON, SVG, PNG or HTML by the header `Accept`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from api.errors import NotAcceptable
from service.errors import Conflict

JSON = "application/json"
SVG, PNG, HTML, CSV = "image/svg+xml", "image/png", "text/html", "text/csv"
#: in the order of preference
OFFERED_MEDIA_TYPES = (JSON, SVG, PNG, HTML)

#: for the OpenAPI document
IMAGE_CONTENT: dict[str, Any] = {
    SVG: {"schema": {"type": "string"}},
    PNG: {"schema": {"type": "string", "format": "binary"}},
    HTML: {"schema": {"type": "string"}},
}


def negotiate(
    accept: str | None, offered: Sequence[str] = OFFERED_MEDIA_TYPES, error_detail: str | None = None
) -> str:
    """Return the offered media type that the client prefers; the first without a preference (RFC 9110, 12.5.1)."""
    if not accept or not accept.strip():
        return offered[0]
    ranges = [_parse_media_range(part) for part in accept.split(",") if part.strip()]
    scores = {offer: _match_quality(offer, ranges) for offer in offered}
    best = max(offered, key=lambda offer: scores[offer])  # the first of equals
    if scores[best] <= (0.0, 0):
        raise NotAcceptable(
            error_detail
            or f"The resource is available as {', '.join(offered)}: use one of these in `Accept`."
        )
    return best


def render_trace(resource: dict[str, Any], media_type: str) -> str | bytes:
    """Return the heat map of a finished trace, as in Meng et al. 2022, figure 1. Raises Conflict if it is not done."""
    _require_done("trace", resource)
    from service.tracing import heatmap  # imports matplotlib

    renderers: dict[str, Callable[[dict[str, Any]], str | bytes]] = {
        SVG: heatmap.trace_svg,
        PNG: heatmap.trace_png,
        HTML: heatmap.trace_page,
    }
    return renderers[media_type](resource["result"])


def render_evaluation(resource: dict[str, Any], media_type: str) -> str | bytes:
    """Return the report of a finished evaluation as HTML, or its plot. Raises Conflict if it is not done."""
    _require_done("evaluation", resource)
    from service.evaluation import report, report_figures, report_text
    from service.kit import plotting

    results = [resource["result"]]
    if media_type == HTML:
        return report.page(results)
    *_, figure = report_figures.figures(results).values()
    return (
        plotting.render_svg(figure, report_text.title(results))
        if media_type == SVG
        else plotting.render_png(figure)
    )


def render_comparison(resources: Sequence[dict[str, Any]], media_type: str) -> str:
    """Return finished evaluations beside each other, as a page or as CSV. Raises Conflict if one is not done."""
    for resource in resources:
        _require_done("evaluation", resource)
    from service.evaluation import leaderboard, report

    results = [resource["result"] for resource in resources]
    return report.page(results) if media_type == HTML else leaderboard.csv_of(results)


def _require_done(kind: str, resource: dict[str, Any]) -> None:
    if resource["status"] != "done":
        raise Conflict(
            f"The {kind} is {resource['status']}: images are available when it is done. Request {JSON} for its state."
        )


def _parse_media_range(part: str) -> tuple[str, float]:
    media, *parameters = (piece.strip().lower() for piece in part.split(";"))
    quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
    try:
        return media, min(max(float(quality), 0.0), 1.0)
    except ValueError:
        return media, 0.0


def _match_quality(offer: str, ranges: list[tuple[str, float]]) -> tuple[float, int]:
    """Return (quality, specificity) of an offer: the most specific range applies."""
    specificity = {offer: 3, offer.partition("/")[0] + "/*": 2, "*/*": 1}
    matching = [(specificity[media], quality) for media, quality in ranges if media in specificity]
    if not matching:
        return (0.0, 0)
    precision, quality = max(matching)
    return (quality, precision) if quality > 0 else (0.0, 0)
