"""The result of a trace, in probabilities, as in the paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.errors import InvalidInput
from service.kit.text import Span
from service.tracing.noise import NoiseLevel
from service.tracing.trace_input import TraceInput

ScoreGrid = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class TraceResult:
    """Scores of a trace. A score is the mean over the noise samples of p(answer) with one clean state restored."""

    prompt: str
    tokens: tuple[str, ...]
    subject: Span  #: token range [b, e) of the mention at which paths were severed
    mentions: tuple[Span, ...]  #: token ranges of the mentions whose embeddings were corrupted
    answer: str
    answer_tokens: tuple[str, ...]
    answer_ids: tuple[int, ...]
    high: float  #: p(answer) of the clean run
    low: float  #: mean p(answer) of the corrupted runs
    scores: Mapping[str, ScoreGrid]  #: by kind: "hidden", "mlp", "attn"
    severed: Mapping[str, tuple[float, ...]] | None  #: at the subject's last token, by severed path
    window: int
    samples: int
    noise: NoiseLevel
    seed: int
    compat: str | None

    @property
    def total_effect(self) -> float:
        return self.high - self.low

    def indirect_effect(self, kind: str) -> ScoreGrid:
        """Return the indirect effect of each cell: score - low."""
        return tuple(tuple(s - self.low for s in row) for row in self.scores[kind])

    def to_json(self) -> dict[str, Any]:
        b, e = self.subject
        return {
            "prompt": self.prompt,
            "tokens": list(self.tokens),
            "subject": {
                "text": "".join(self.tokens[b:e]).strip(),
                "tokens": [b, e],
                "mentions": [list(span) for span in self.mentions],
            },
            "answer": {
                "text": self.answer.strip() or self.answer,
                "tokens": list(self.answer_tokens),
                "ids": list(self.answer_ids),
            },
            "high": self.high,
            "low": self.low,
            "total_effect": self.total_effect,
            "kinds": {kind: self._kind_json(kind) for kind in self.scores},
            "severed": self._severed_json(),
            "window": self.window,
            "samples": self.samples,
            "noise": {"level": self.noise.value, "factor": self.noise.factor, "sigma": self.noise.sigma},
            "seed": self.seed,
            "compat": self.compat,
        }

    def _kind_json(self, kind: str) -> dict[str, Any]:
        grid = self.scores[kind]
        best = max((score, -t, -m) for t, row in enumerate(grid) for m, score in enumerate(row))
        return {
            "scores": [list(row) for row in grid],
            "indirect_effect": [list(row) for row in self.indirect_effect(kind)],
            "best": {"token": -best[1], "layer": -best[2], "score": best[0]},
        }

    def _severed_json(self) -> dict[str, Any] | None:
        if self.severed is None:
            return None
        return {"token": self.subject[1] - 1, "scores": {cut: list(row) for cut, row in self.severed.items()}}


def build_trace_result(
    trace_input: TraceInput,
    high: float,
    low: float,
    scores: Mapping[str, Sequence[Sequence[float]]],
    severed: Mapping[str, Sequence[float]] | None,
    window: int,
) -> TraceResult:
    """Return the immutable result of a trace. Raise InvalidInput when the noise makes a probability non-finite."""
    grids = {kind: tuple(map(tuple, grid)) for kind, grid in scores.items()}
    if not all(math.isfinite(x) for x in (high, low, *(s for g in grids.values() for row in g for s in row))):
        raise InvalidInput(
            f"the model's probabilities are not finite under noise {trace_input.noise_level.value:g}: use less noise.",
            "noise",
        )
    return TraceResult(
        prompt=trace_input.text,
        tokens=trace_input.tokens,
        subject=trace_input.subject,
        mentions=trace_input.mentions,
        answer=trace_input.answer,
        answer_tokens=trace_input.answer_tokens,
        answer_ids=trace_input.answer_ids,
        high=high,
        low=low,
        scores=grids,
        severed=None if severed is None else {cut: tuple(row) for cut, row in severed.items()},
        window=window,
        samples=trace_input.samples,
        noise=trace_input.noise_level,
        seed=trace_input.seed,
        compat=trace_input.compat,
    )
