"""Edits of facts that a public chat model knows: by probability and by what it says, in completion and in chat.

    palimpsest fetch smollm2-135m
    python bench/public_model.py --records counterfact.json known_facts.json facts.jsonl --facts 150 --active 10 50 100
    python bench/public_model.py --records counterfact.json --hparams '{"restatement_weight": 0}' --out runs/without

Facts are the records whose true object the model says greedily, one for each subject, in an order drawn from their
names. Those at even places are for choosing hyperparameters (`--half even`), those at odd places are reported.
Results are stored in --out after each fact, and an interrupted run resumes. `--active` measures the same edits when
many are active together, with the loss on statements of the other half, and `--gated` the same edits looked up in
place of solved. `--measured 50` measures only the first 50 of the facts, alone and active.

As the service does, an edit is raised to its next strength until it takes effect. In the columns "says", a greedy
continuation must begin with the new object, for paraphrases and chat it must contain it within 24 tokens. "chat" is the
share of conversations whose answer has the new object and the subject, "other subject" of those that have the new
object without the subject. The questions are the statement by itself, the same as a sentence to finish and as a
question, and each paraphrase; the search uses none of them. Much of what a small model says there answers nothing,
edited or not: "of known" counts only the paraphrases to which the base model gives the true object, and the questions
to which it gives the true object and the subject. "neighbors" is the share whose greedy answer stays the same. "name
kept" is the probability of the subject's name in a restatement as a share of before, at most 1, and "description KL"
the divergence of the subject's description in nats per token: the guard's `subject_name` and `description_kl`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.gates import build_gate
from service.datasets.loading import read_records
from service.datasets.record import Record, record_fits, true_statements
from service.editing.context import EditInput, build_editor_context
from service.editing.description import describe_subjects, measure_descriptions
from service.editing.greedy_text import generate_greedy
from service.editing.probes import Probe, name_share, probe_fits, run_probes
from service.editing.restatement import name_prompt
from service.engine.versioned_model import EmptyLedger, VersionedModel
from service.evaluation.measuring import measure_damage, score_records
from service.evaluation.strengths import choose_group_strengths, choose_strength_alone
from service.evaluation.suites.chat import REQUESTS
from service.kit.answer import answer_object
from service.kit.artifact_store import DirectoryStore
from service.kit.steps import run_to_completion
from service.kit.text import begins_with, fill_prompt, mentions
from service.methods.parameters import Parameters, RomeParameters
from service.models.scoring import score_targets
from service.patches.patch import BASE, PatchSet
from service.recipes.recipe import resolve_hparams
from service.recipes.strength_schedule import StrengthSchedule, strength_schedule
from service.scores.scores import harmonic_mean
from service.settings import Settings
from service.weights.factors import Association, EditUpdate, deserialize_updates, serialize_updates
from workers.resident_model import load_served_model

ANSWER_TOKENS = 24
NEIGHBORS = 4  # of a record whose greedy answers are compared
PARAPHRASES = 2
OTHER_STATEMENTS = 200  # on which the loss is measured
GROUP_SIZE = 10  # edits that become active together
console = Console(width=180)


@dataclass(frozen=True)
class Says:
    """What the model says about one record."""

    own: str
    paraphrases: list[str]
    chat: list[str]
    description: str
    neighbors: list[str]


class PublicModelExperiment:
    """A chat model with the facts that it knows."""

    def __init__(self, args: argparse.Namespace) -> None:
        settings = Settings(model=args.model, data_dir=args.data, threads=args.threads)
        self.model = load_served_model(settings)
        if self.model.chat_format is None:
            raise SystemExit(f"{args.model} has no chat template")
        self.context = run_to_completion(build_editor_context(self.model, args.data / "statistics"))
        self.replica = VersionedModel(self.model, EmptyLedger())
        self.hparams = json.loads(args.hparams) if args.hparams else None
        self.out = DirectoryStore(args.out)
        self.gated = bool(args.gated)

    def stored(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return a stored JSON value; compute and store a missing one."""
        if (data := self.out.get(name)) is None:
            data = json.dumps(compute()).encode()
            self.out.put(name, data)
        return json.loads(data)

    def known_records(self, records: Sequence[Record]) -> list[Record]:
        """Return the records of distinct subjects whose true object is the greedy answer."""
        by_name = {r.name: r for r in records}
        return [by_name[name] for name in self.stored("known.json", lambda: self._known_names(records))]

    def _known_names(self, records: Sequence[Record]) -> list[str]:
        usable = [r for r in records if r.target_true and record_fits(r, self.model.text_encoder)]
        known: dict[str, Record] = {}
        for start in track(range(0, len(usable), 32), "facts that the model knows", console=console):
            batch = usable[start : start + 32]
            pairs = [(r.text, str(r.target_true)) for r in batch]
            scores = run_to_completion(score_targets(self.model, pairs))
            for r, score in zip(batch, scores, strict=True):
                if score.is_greedy:
                    known.setdefault(r.subject.casefold(), r)
        return sorted((r.name for r in known.values()), key=lambda name: sha256(name.encode()).digest())

    def find_updates(self, record: Record, number: int) -> tuple[list[EditUpdate], float]:
        """Return the updates of an edit and the seconds of its search, from the store where it is there."""
        run_to_completion(self.context.get_gate_reference(self.parameters))
        name = f"edit-{number}.safetensors"
        edit = f"{number:06}"
        stored = self.out.get(name)
        seconds = 0.0
        if stored is None:
            began = perf_counter()
            statement = fill_prompt(record.prompt, record.subject)
            found = EditInput(statement, record.target_new, hparams=self.hparams, edit=edit)
            (factors,) = run_to_completion(self.context.find_all_factors([found]))
            seconds = perf_counter() - began
            stored = serialize_updates(factors.updates)
            self.out.put(name, stored)
        updates = deserialize_updates(stored, edit, record.subject, self.context.find_shared)
        if self.gated:
            updates = [self.with_gate(record, u) for u in updates if isinstance(u, Association)]
        return updates, seconds

    def with_gate(self, record: Record, association: Association) -> Association:
        """Return an association with the gate that its edit has in the form gated. The search is the same."""
        parameters = self.parameters
        assert isinstance(parameters, RomeParameters)
        gate = build_gate(self.model, self.context, record, parameters)
        return replace(association, gate=gate)

    def choose_strength(self, record: Record, updates: Sequence[EditUpdate]) -> float:
        """Return the strength that the service chooses for an edit alone."""
        return run_to_completion(
            choose_strength_alone(self.replica, record, updates, self.schedule(1))
        ).strength

    def choose_strengths(
        self, records: Sequence[Record], groups: Sequence[Sequence[EditUpdate]]
    ) -> list[float]:
        """Return the strengths that the service chooses for edits that are posted together, GROUP_SIZE at a time."""
        strengths: list[float] = []
        active: list[EditUpdate] = []
        for start in range(0, len(records), GROUP_SIZE):
            group = groups[start : start + GROUP_SIZE]
            chosen = run_to_completion(
                choose_group_strengths(
                    self.replica, records[start : start + GROUP_SIZE], group, active, start, self.schedule
                )
            )
            strengths += chosen
            active += [u.scaled(s) for updates, s in zip(group, chosen, strict=True) for u in updates]
        return strengths

    def schedule(self, active: int) -> StrengthSchedule:
        """Return the schedule of strengths with a number of active edits."""
        width = self.model.intermediate_size
        return strength_schedule(self.parameters, self.parameters.strengths, active, width)

    @property
    def parameters(self) -> Parameters:
        return resolve_hparams(self.context.recipe, self.hparams, self.model.num_layers, "rome")

    def says(self, record: Record, patch: PatchSet) -> Says:
        """Return the greedy texts of a version about a record."""
        chat = self.model.chat_format
        assert chat is not None
        paraphrases = record.paraphrases[:PARAPHRASES]
        questions = [q.replace("{}", record.text) for q in REQUESTS] + list(paraphrases)
        questions.append(f"Tell me about {record.subject}.")
        conversations = [chat.prompt_text([{"role": "user", "content": q}]) for q in questions]
        neighbors = [n.prompt for n in record.neighbours[:NEIGHBORS]]
        prompts = [record.text, *paraphrases, *conversations, *neighbors]
        generating = generate_greedy(self.model, prompts, ANSWER_TOKENS)
        found = run_to_completion(self.replica.step_with_patch(patch, generating))
        texts = iter([t.text for t in found])
        return Says(
            next(texts),
            [next(texts) for _ in paraphrases],
            [next(texts) for _ in questions[:-1]],
            next(texts),
            list(texts),
        )

    def measure(self, record: Record, patch: PatchSet, before: Says) -> dict[str, Any]:
        """Return the measures of a record at a version."""
        (scores,) = run_to_completion(score_records(self.replica, [record], patch))
        row: dict[str, Any] = {k: v for k, v in scores.measures().items() if k in ("ES", "PS", "NS")}
        row |= self.measure_subject(record, patch)
        after = self.says(record, patch)
        new, true, subject = record.target_new, str(record.target_true), record.subject
        paraphrases = [mentions(text, new) for text in after.paraphrases]
        has_new = [mentions(text, new) for text in after.chat]
        has_subject = [mentions(text, subject) for text in after.chat]
        chat = [a and b for a, b in zip(has_new, has_subject, strict=True)]
        row |= {
            "says": float(begins_with(after.own.strip(), record.target_new)),
            "says paraphrase": mean(paraphrases),
            "says paraphrase, of known": mean(select(paraphrases, before.paraphrases, [true])),
            "chat": mean(chat),
            "chat, of known": mean(select(chat, before.chat, [true, subject])),
            "chat, other subject": mean([a and not b for a, b in zip(has_new, has_subject, strict=True)]),
            "description": float(mentions(after.description, subject)),
            "neighbors": mean(
                [
                    begins_with(now.strip(), answer_object(was, complete=False))
                    for was, now in zip(before.neighbors, after.neighbors, strict=True)
                ]
            ),
            "texts": vars(after),
        }
        return row

    def measure_subject(self, record: Record, patch: PatchSet) -> dict[str, float | None]:
        """Return the two figures of the guard about the subject: the probability of its name where the model restates
        the fact, as a share of that of the base model, and the divergence of its description."""
        named = name_prompt(self.model, fill_prompt(record.prompt, record.subject))
        assert named is not None  # it is None for a statement in a conversation
        prompt, separator = named
        probe, share = Probe(prompt, record.subject, record.subject, separator=separator), None
        if probe_fits(self.model, probe):
            (before,) = run_to_completion(run_probes(self.model, [probe]))
            probing = self.replica.step_with_patch(patch, run_probes(self.model, [probe]))
            (after,) = run_to_completion(probing)
            share = name_share(before, after)
        descriptions = run_to_completion(describe_subjects(self.model, [record.subject]))
        (kl,) = run_to_completion(measure_descriptions(self.replica, patch, descriptions))
        return {"subject_name": share, "description_kl": kl}


def select(outcomes: Sequence[bool], texts_before: Sequence[str], names: Sequence[str]) -> list[bool]:
    """Return the outcomes where the text of the base model has all the names."""
    pairs = zip(outcomes, texts_before, strict=True)
    return [outcome for outcome, text in pairs if all(mentions(text, name) for name in names)]


def mean(values: Sequence[float]) -> float | None:
    """Return the mean; None of nothing."""
    return fmean(map(float, values)) if values else None


def run_single(experiment: PublicModelExperiment, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return a row for each record, with its edit alone active."""

    def row(number: int, record: Record) -> dict[str, Any]:
        before = base_says(experiment, record, number)
        updates, seconds = experiment.find_updates(record, number)
        strength = experiment.choose_strength(record, updates)
        patch = experiment.replica.compose_patch(u.scaled(strength) for u in updates)
        about = {"seconds": seconds, "strength": strength, "record": record.name}
        return experiment.measure(record, patch, before) | about

    prefix = "gated-" if experiment.gated else ""
    return [
        experiment.stored(f"{prefix}alone-{number}.json", partial(row, number, record))
        for number, record in enumerate(track(records, "edits alone", console=console))
    ]


def base_says(experiment: PublicModelExperiment, record: Record, number: int) -> Says:
    """Return what the base model says about a record."""
    return Says(**experiment.stored(f"base-{number}.json", lambda: vars(experiment.says(record, BASE))))


def run_active(
    experiment: PublicModelExperiment,
    records: Sequence[Record],
    count: int,
    measured: int | None,
    other_facts: Sequence[Record],
) -> list[dict[str, Any]]:
    """Return a row for each of the first `measured` records, with the edits of the first `count` active together. Print
    the rise of the loss on statements about other subjects."""
    groups = [experiment.find_updates(r, i)[0] for i, r in enumerate(records[:count])]
    prefix = "gated-" if experiment.gated else ""
    strengths = experiment.stored(
        f"{prefix}strengths-{count}.json", lambda: experiment.choose_strengths(records[:count], groups)
    )
    scaled = [u.scaled(s) for updates, s in zip(groups, strengths, strict=True) for u in updates]
    patch = experiment.replica.compose_patch(scaled)
    damage = experiment.stored(
        f"{prefix}loss-{count}.json",
        lambda: run_to_completion(measure_damage(experiment.replica, true_statements(other_facts), patch)),
    )
    console.print(
        f"{count} active: loss on {len(other_facts)} other statements {100 * damage['loss_rise']:+.2f} %"
    )

    def row(number: int, record: Record) -> dict[str, Any]:
        return experiment.measure(record, patch, base_says(experiment, record, number))

    return [
        experiment.stored(f"{prefix}active-{count}-{number}.json", partial(row, number, record))
        for number, record in enumerate(
            track(records[:count][:measured], f"{count} edits active", console=console)
        )
    ]


COLUMNS = (
    "ES",
    "PS",
    "NS",
    "says",
    "says paraphrase",
    "says paraphrase, of known",
    "chat",
    "chat, of known",
    "chat, other subject",
    "description",
    "neighbors",
)


def print_table(results: dict[str, list[dict[str, Any]]]) -> None:
    """Print the means in percent."""
    table = Table(box=box.MARKDOWN)
    for name in ("edits", "facts", "S", *COLUMNS, "name kept", "description KL", "seconds of a search"):
        table.add_column(name)
    for name, rows in results.items():
        means = {c: mean([r[c] for r in rows if r[c] is not None]) for c in COLUMNS}
        parts = [means[c] for c in ("ES", "PS", "NS")]
        s = harmonic_mean([p for p in parts if p is not None])
        seconds = [r["seconds"] for r in rows if r.get("seconds")]
        shares = [min(1.0, x) for r in rows if (x := r.get("subject_name")) is not None]
        kls = [x for r in rows if (x := r.get("description_kl")) is not None]
        cells = [f"{100 * m:.1f}" if (m := means[c]) is not None else "" for c in COLUMNS]
        cells += [f"{100 * fmean(shares):.1f}" if shares else "", f"{fmean(kls):.3f}" if kls else ""]
        table.add_row(
            name, str(len(rows)), f"{100 * s:.1f}", *cells, f"{fmean(seconds):.1f}" if seconds else ""
        )
    console.print(table)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument(
        "--records", type=Path, nargs="+", required=True, help="files of CounterFact or of own records"
    )
    p.add_argument("--data", type=Path, default=Path("runs/public_model/data"), help="statistics")
    p.add_argument("--out", type=Path, default=Path("runs/public_model"))
    p.add_argument("--half", choices=("odd", "even"), default="odd")
    p.add_argument("--facts", type=int, default=1000, help="maximum number of facts")
    p.add_argument("--skip", type=int, default=0, help="leave out the first facts; needs an --out of its own")
    p.add_argument("--only-active", action="store_true", help="do not measure each edit alone")
    p.add_argument(
        "--active", type=int, nargs="*", default=[], help="numbers of edits that are active together"
    )
    p.add_argument("--measured", type=int, metavar="N", help="measure only the first N facts (default: all)")
    p.add_argument("--hparams", help="JSON; replaces hyperparameters of the recipe")
    p.add_argument("--gated", action="store_true", help="look the same edits up in place of solving them")
    p.add_argument("--threads", type=int, default=1)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    experiment = PublicModelExperiment(args)
    records = [r for source in args.records for r in read_records(source, 0)]
    known = experiment.known_records(records)
    chosen = known[args.half == "odd" :: 2][args.skip :][: args.facts]
    console.print(f"{len(records)} facts, {len(known)} known, {len(chosen)} measured")
    others = known[args.half == "even" :: 2][:OTHER_STATEMENTS]
    results = {} if args.only_active else {"each alone": run_single(experiment, chosen[: args.measured])}
    for count in sorted({min(c, len(chosen)) for c in args.active}):
        results[f"{count} active"] = run_active(experiment, chosen, count, args.measured, others)
    print_table(results)


if __name__ == "__main__":
    main()
