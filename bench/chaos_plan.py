"""The faults and the load of a chaos run, as a pure function of the seed.

Times are pauses between actions. A choice that depends on responses (which edit to revert, which version to pin) is
drawn as a fraction and resolved when the action runs, so that a seed gives the same actions in the same order.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

GATED_SHARE = 1 / 3  # of the edits
PROMPT = "{} is located in the city of"
SUBJECT_COUNT = 8
#: an edit is committed only if the model generates its object, so that a text identifies its version
GUARD = {"min_probability": 0.5}
#: relations whose subjects are names of places; the objects of edits are drawn from them
PLACE_RELATIONS = ("city_country", "uscity_state", "island_country", "country_continent")
#: kind of fault -> weight in the draw
FAULT_WEIGHTS = {
    "kill worker": 8,
    "stop worker": 6,
    "kill api": 4,
    "stop api": 2,
    "cut redis": 4,
    "cut postgres": 4,
    "stall redis": 2,
    "stall postgres": 2,
    "refuse redis": 1,
    "refuse postgres": 1,
    "restart redis": 2,
    "kill redis": 2,
    "empty redis": 3,
    "restart postgres": 2,
    "crash postgres": 2,
}


@dataclass(frozen=True)
class Fault:
    """A fault of `seconds` after a `pause`; `number` selects one of several processes."""

    pause: float
    kind: str
    number: int
    seconds: float


@dataclass(frozen=True)
class ClientAction:
    """One action of a client, after a pause."""

    pause: float
    kind: str  #: edit, revert, trace, generate or compare
    body: dict[str, Any] = field(default_factory=dict)
    fraction: float = 0.0  #: position in the list of active edits, or of versions
    version_mode: str = "head"  #: head, pinned, or seen: `min_version` is the newest reported version
    wait_mode: str = (
        "read"  #: how to wait for the end of a job: read, listen (to its events), or "" for not at all
    )
    repeat: bool = False  #: send the request twice
    cancel: bool = False  #: cancel the job at once


@dataclass(frozen=True)
class FactPool:
    """Subjects and objects of the edits. Each object is used by one edit of the run."""

    subjects: tuple[str, ...]
    objects: tuple[str, ...]

    def prompts(self) -> list[str]:
        return [PROMPT.replace("{}", subject) for subject in self.subjects]


def build_fact_pool(facts: Path, seed: int) -> FactPool:
    """Return landmarks whose city the model knows, and place names of which none is a prefix of another."""
    rows = [json.loads(line) for line in facts.read_text(encoding="utf-8").splitlines()]
    landmarks = [r for r in rows if r["relation"] == "landmark_city"]
    known_cities = {r["object"] for r in landmarks}
    places = {r["subject"] for r in rows if r["relation"] in PLACE_RELATIONS} | known_cities
    objects = sorted(p for p in places - known_cities if not any(_share_prefix(p, q) for q in places - {p}))
    subjects = sorted(r["subject"] for r in landmarks if PROMPT in r["prompts"])
    rng = random.Random(f"{seed}/world")
    rng.shuffle(objects)
    return FactPool(tuple(rng.sample(subjects, SUBJECT_COUNT)), tuple(objects))


def _share_prefix(one: str, other: str) -> bool:
    return one.startswith(other) or other.startswith(one)


# faults


def plan_faults(seed: int, count: int, pause: float, lease: float) -> list[Fault]:
    """Return `count` faults: each kind once as far as possible, the rest by weight, in random order."""
    rng = random.Random(f"{seed}/faults")
    kinds = rng.sample(list(FAULT_WEIGHTS), min(count, len(FAULT_WEIGHTS)))
    kinds += rng.choices(list(FAULT_WEIGHTS), list(FAULT_WEIGHTS.values()), k=count - len(kinds))
    rng.shuffle(kinds)
    return [
        Fault(_draw_pause(rng, pause), kind, rng.randrange(1000), _draw_duration(rng, kind, lease))
        for kind in kinds
    ]


def _draw_duration(rng: random.Random, kind: str, lease: float) -> float:
    """Return the seconds of a fault. A stopped worker resumes before or after its timeout."""
    if kind == "stop worker":
        return round(rng.uniform(0.5, 2.5) * lease, 2)
    if kind.startswith(("stop", "stall")):
        return round(rng.uniform(0.5, 5), 2)
    if kind.endswith(("redis", "postgres")) and not kind.startswith(("cut", "empty")):
        return round(rng.uniform(0, 2.5), 2)
    return 0.0


def _draw_pause(rng: random.Random, mean: float) -> float:
    return round(min(rng.expovariate(1 / mean), 4 * mean), 2)


# load


def client_scripts(
    seed: int, pool: FactPool, editors: int = 2, askers: int = 3
) -> dict[str, Iterator[ClientAction]]:
    """Return the actions of each client by its name. Editors end with their objects; the others never end."""
    scripts = {f"editor {i}": _edit_script(seed, i, pool, pool.objects[i::editors]) for i in range(editors)}
    scripts |= {f"asker {i}": _generation_script(seed, i, pool) for i in range(askers)}
    return scripts | {"reverter": _revert_script(seed), "tracer": _trace_script(seed, pool)}


def first_actions(actions: Iterator[ClientAction], count: int) -> list[ClientAction]:
    return list(islice(actions, count))


def _edit_script(seed: int, number: int, pool: FactPool, objects: Sequence[str]) -> Iterator[ClientAction]:
    rng = random.Random(f"{seed}/editor/{number}")
    for target in objects:
        fact = {"subject": rng.choice(pool.subjects), "prompt": PROMPT, "target_new": target}
        fact["form"] = "gated" if rng.random() < GATED_SHARE else "weights"
        yield ClientAction(
            _draw_pause(rng, 2.0),
            "edit",
            fact | {"guard": GUARD},
            wait_mode=_draw_wait_mode(rng),
            repeat=rng.random() < 0.2,
            cancel=rng.random() < 0.08,
        )


def _revert_script(seed: int) -> Iterator[ClientAction]:
    rng = random.Random(f"{seed}/reverter")
    while True:
        yield ClientAction(_draw_pause(rng, 9.0), "revert", fraction=rng.random(), repeat=rng.random() < 0.2)


def _trace_script(seed: int, pool: FactPool) -> Iterator[ClientAction]:
    rng = random.Random(f"{seed}/tracer")
    while True:
        subject = rng.choice(pool.subjects)
        body = {"subject": subject, "prompt": PROMPT, "samples": 2, "kinds": ["hidden"]}
        yield ClientAction(
            _draw_pause(rng, 8.0), "trace", body, wait_mode=_draw_wait_mode(rng), cancel=rng.random() < 0.2
        )


def _draw_wait_mode(rng: random.Random) -> str:
    return rng.choices(["read", "listen", ""], [4, 3, 3])[0]


def _generation_script(seed: int, number: int, pool: FactPool) -> Iterator[ClientAction]:
    rng = random.Random(f"{seed}/asker/{number}")
    while True:
        yield _generation_action(rng, pool)


def _generation_action(rng: random.Random, pool: FactPool) -> ClientAction:
    prompts = pool.prompts()
    pause, share = _draw_pause(rng, 0.4), rng.random()
    body: dict[str, Any] = {"max_new_tokens": rng.randint(6, 24)}
    version = rng.choices(["head", "pinned", "seen"], [4, 3, 3])[0]
    if rng.random() < 0.08:
        return ClientAction(pause, "compare", body | {"prompt": rng.choice(prompts)}, share)
    if rng.random() < 0.2:
        body["prompts"] = prompts  # all prompts of a request must have the same version
    else:
        body["prompt"] = rng.choice(prompts)
    if rng.random() < 0.25:
        body |= {"temperature": 0.8, "top_p": 0.9, "seed": rng.randrange(1000)}
    body["stream"] = rng.random() < 0.5
    return ClientAction(pause, "generate", body, share, version)
