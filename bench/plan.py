"""What a run of the chaos bench will do: its faults and its load, as a pure function of the seed.

Times are only pauses. What depends on the answers (which edit to take back, which version to pin) is drawn as a share
and looked up when its turn comes, so a replayed seed asks for the same things in the same order.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

PROMPT = "{} is located in the city of"
SUBJECTS = 8
#: an edit lands only if the model then says its object, so that the version can be read from the answer
GUARD = {"min_probability": 0.5}
#: relations whose subjects are names of places: what the edits make the model say
PLACES = ("city_country", "uscity_state", "island_country", "country_continent")
#: kinds of faults and how often each is drawn
FAULTS = {
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
    """`seconds` is how long it lasts; `number` picks one of several processes."""

    pause: float
    kind: str
    number: int
    seconds: float


@dataclass(frozen=True)
class Wish:
    """One thing that a client does, after a pause."""

    pause: float
    action: str  #: edit, revert, trace, generate or compare
    body: dict[str, Any] = field(default_factory=dict)
    share: float = 0.0  #: of the own edits that stand, or of the versions there are
    version: str = (
        "head"  #: head, pinned, or seen: at least the newest version that an edit was told to be at
    )
    patient: str = (
        "read"  #: how the end of a job is waited for: read, listen (to its events) or, empty, not at all
    )
    twice: bool = False  #: say it again although it was answered
    cancel: bool = False  #: take it back at once


@dataclass(frozen=True)
class World:
    """The subjects of the edits, and the objects: each is given to one edit of the run and to no other."""

    subjects: tuple[str, ...]
    objects: tuple[str, ...]

    def prompts(self) -> list[str]:
        return [PROMPT.replace("{}", subject) for subject in self.subjects]


def world(facts: Path, seed: int) -> World:
    """Landmarks that the model knows the city of, and names of places of which none begins another."""
    rows = [json.loads(line) for line in facts.read_text(encoding="utf-8").splitlines()]
    landmarks = [r for r in rows if r["relation"] == "landmark_city"]
    known = {r["object"] for r in landmarks}
    places = {r["subject"] for r in rows if r["relation"] in PLACES} | known
    objects = sorted(p for p in places - known if not any(_begins(p, q) for q in places - {p}))
    subjects = sorted(r["subject"] for r in landmarks if PROMPT in r["prompts"])
    draw = random.Random(f"{seed}/world")
    draw.shuffle(objects)
    return World(tuple(draw.sample(subjects, SUBJECTS)), tuple(objects))


def _begins(one: str, other: str) -> bool:
    return one.startswith(other) or other.startswith(one)


# faults


def faults(seed: int, count: int, pause: float, lease: float) -> list[Fault]:
    """Every kind once, as far as they go, and the rest by weight, in an order of the seed's."""
    draw = random.Random(f"{seed}/faults")
    kinds = draw.sample(list(FAULTS), min(count, len(FAULTS)))
    kinds += draw.choices(list(FAULTS), list(FAULTS.values()), k=count - len(kinds))
    draw.shuffle(kinds)
    return [
        Fault(_pause(draw, pause), kind, draw.randrange(1000), _seconds(draw, kind, lease)) for kind in kinds
    ]


def _seconds(draw: random.Random, kind: str, lease: float) -> float:
    """Around the lease for a process that freezes: some come back before it is over, some after."""
    if kind == "stop worker":
        return round(draw.uniform(0.5, 2.5) * lease, 2)
    if kind.startswith(("stop", "stall")):
        return round(draw.uniform(0.5, 5), 2)
    if kind.endswith(("redis", "postgres")) and not kind.startswith(("cut", "empty")):
        return round(draw.uniform(0, 2.5), 2)
    return 0.0


def _pause(draw: random.Random, mean: float) -> float:
    return round(min(draw.expovariate(1 / mean), 4 * mean), 2)


# load


def clients(seed: int, world: World, editors: int = 2, askers: int = 3) -> dict[str, Iterator[Wish]]:
    """Each client's wishes by its name. An editor ends with its objects, the others never."""
    scripts = {f"editor {i}": _editor(seed, i, world, world.objects[i::editors]) for i in range(editors)}
    scripts |= {f"asker {i}": _asker(seed, i, world) for i in range(askers)}
    return scripts | {"reverter": _reverter(seed), "tracer": _tracer(seed, world)}


def first(wishes: Iterator[Wish], count: int) -> list[Wish]:
    return list(islice(wishes, count))


def _editor(seed: int, number: int, world: World, objects: Sequence[str]) -> Iterator[Wish]:
    draw = random.Random(f"{seed}/editor/{number}")
    for target in objects:
        fact = {"subject": draw.choice(world.subjects), "prompt": PROMPT, "target_new": target}
        yield Wish(
            _pause(draw, 2.0),
            "edit",
            fact | {"guard": GUARD},
            patient=_patience(draw),
            twice=draw.random() < 0.2,
            cancel=draw.random() < 0.08,
        )


def _reverter(seed: int) -> Iterator[Wish]:
    draw = random.Random(f"{seed}/reverter")
    while True:
        yield Wish(_pause(draw, 9.0), "revert", share=draw.random(), twice=draw.random() < 0.2)


def _tracer(seed: int, world: World) -> Iterator[Wish]:
    draw = random.Random(f"{seed}/tracer")
    while True:
        subject = draw.choice(world.subjects)
        body = {"subject": subject, "prompt": PROMPT, "samples": 2, "kinds": ["hidden"]}
        yield Wish(_pause(draw, 8.0), "trace", body, patient=_patience(draw), cancel=draw.random() < 0.2)


def _patience(draw: random.Random) -> str:
    return draw.choices(["read", "listen", ""], [4, 3, 3])[0]


def _asker(seed: int, number: int, world: World) -> Iterator[Wish]:
    draw = random.Random(f"{seed}/asker/{number}")
    while True:
        yield _question(draw, world)


def _question(draw: random.Random, world: World) -> Wish:
    prompts = world.prompts()
    pause, share = _pause(draw, 0.4), draw.random()
    body: dict[str, Any] = {"max_new_tokens": draw.randint(6, 24)}
    version = draw.choices(["head", "pinned", "seen"], [4, 3, 3])[0]
    if draw.random() < 0.08:
        return Wish(pause, "compare", body | {"prompt": draw.choice(prompts)}, share)
    if draw.random() < 0.2:
        body["prompts"] = prompts  # all subjects at once: every one must be of the same version
    else:
        body["prompt"] = draw.choice(prompts)
    if draw.random() < 0.25:
        body |= {"temperature": 0.8, "top_p": 0.9, "seed": draw.randrange(1000)}
    body["stream"] = draw.random() < 0.5
    return Wish(pause, "generate", body, share, version)
