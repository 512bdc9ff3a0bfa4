"""Train a scope classifier of SERAC on the features of a model, and measure it on subjects that were held out.

Nothing is written to the ledger. The features, and the state of the training every few hundred steps, are artifacts: an
interrupted training resumes and gives the same classifier. What a step draws is a function of the seed and the number
of the step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import torch
from safetensors.torch import load, save
from torch import Tensor

from service.datasets.record import Record
from service.errors import InvalidInput
from service.kit.artifact_store import ArtifactStore, get_json, inputs_digest, put_json
from service.kit.steps import Phase, Progress, Stepper
from service.kit.time_estimate import with_estimate
from service.models.loading import LoadedModel
from service.models.prompt_features import reader_of
from service.schemas import ScopePlan
from service.training.scope_examples import (
    ScopeFact,
    ScopePart,
    scope_facts,
    split_by_subject,
)
from service.training.scope_figures import ScopeMeasurement, measure_scope
from service.training.scope_layer import check_scope_layer
from service.training.scope_loss import balanced_loss, choose_threshold
from service.weights.scope_classifier import ScopeClassifier
from service.weights.trained_scope import TrainedScope

FEATURES_PER_ARTIFACT = 512  # texts
TEXTS_PER_PASS = 16
STEPS_PER_STATE = 250
MIN_NAMED_PAIRS = (
    20  # out of scope, with the subject in the text, by which a threshold of their own is chosen
)
INPUTS, STATE = "inputs", "state"  # names of artifacts
#: seconds of a text and of a step, relative to each other; by these the time left is estimated
COSTS = {Phase.COLLECT: 2.0, Phase.TRAIN: 1.0}


def train_scope(
    model: LoadedModel, records: Sequence[Record], plan: ScopePlan, store: ArtifactStore
) -> Stepper[TrainedScope]:
    """Return the classifier that these records train. Raise InvalidInput for too few of them, or a layer that does not
    exist."""
    return (yield from with_estimate(_train_scope(model, records, plan, store), COSTS))


def _train_scope(
    model: LoadedModel, records: Sequence[Record], plan: ScopePlan, store: ArtifactStore
) -> Stepper[TrainedScope]:
    layer = check_scope_layer(plan, model.num_layers)
    split = split_by_subject(scope_facts(records), plan.seed)
    _bind_inputs(store, training_digest(model, records, plan))
    texts = tuple(dict.fromkeys(text for part in split for text in part.texts))
    features = yield from _read_features(model, layer, texts, store)
    table = FeatureTable({text: i for i, text in enumerate(texts)}, features)
    training = _ScopeTraining(table, split.training, plan)
    yield from training.run(store)
    classifier = training.classifier(layer)
    seen = split.training.texts
    for_threshold = yield from measure_scope(classifier, table.rows, split.threshold, seen, plan.seed)
    classifier = _with_thresholds(classifier, for_threshold, plan.false_open_rate)
    measured = yield from measure_scope(classifier, table.rows, split.measured, seen, plan.seed)
    report = {
        "plan": plan.model_dump(mode="json") | {"layer": layer},
        "facts": {name: len(part.facts) for name, part in split._asdict().items()},
        "loss": training.last_loss,
        "scale": classifier.scale,
        "threshold": classifier.threshold,
        "subject_threshold": classifier.subject_threshold,
        "figures": measured.figures(classifier),
    }
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return TrainedScope(classifier, model.fingerprint, now, report)


def training_digest(model: LoadedModel, records: Sequence[Record], plan: ScopePlan) -> str:
    """Return the SHA-256 of everything that determines a classifier."""
    facts = [asdict(fact) for fact in scope_facts(records)]
    return inputs_digest({"model": model.fingerprint, "plan": plan.model_dump(mode="json"), "facts": facts})


def _bind_inputs(store: ArtifactStore, digest: str) -> None:
    """Bind the store to these inputs. Raise InvalidInput if it holds results of other inputs."""
    if get_json(store, INPUTS) not in (None, digest):
        raise InvalidInput(
            "the folder holds a training with another plan, model or set of records: choose another folder, or delete "
            "its contents.",
            "out",
        )
    put_json(store, INPUTS, digest)


def _read_features(
    model: LoadedModel, layer: int, texts: Sequence[str], store: ArtifactStore
) -> Stepper[Tensor]:
    """Return the features (N, d) of texts, in the order of the texts."""
    reader = reader_of(model, layer)
    parts: list[Tensor] = []
    for number, start in enumerate(range(0, len(texts), FEATURES_PER_ARTIFACT)):
        name = f"features-{number:06}"
        if (stored := store.get(name)) is None:
            rows: dict[str, Tensor] = {}
            by_length = sorted(texts[start : start + FEATURES_PER_ARTIFACT], key=len)
            for first in range(0, len(by_length), TEXTS_PER_PASS):
                batch = by_length[first : first + TEXTS_PER_PASS]
                read = reader.read_batch([model.encode(text)[0] for text in batch])
                rows |= dict(zip(batch, read, strict=True))
                yield Progress(Phase.COLLECT, start + len(rows), len(texts))
            of_texts = [rows[text] for text in texts[start : start + FEATURES_PER_ARTIFACT]]
            store.put(name, stored := save({"features": torch.stack(of_texts)}))
        parts.append(load(stored)["features"])
        yield Progress(Phase.COLLECT, min(start + FEATURES_PER_ARTIFACT, len(texts)), len(texts))
    return torch.cat(parts)


@dataclass(frozen=True)
class FeatureTable:
    """The features of texts."""

    number_of: dict[str, int]
    features: Tensor  #: (N, d)

    def numbers(self, texts: Sequence[str]) -> Tensor:
        """Return the rows of texts."""
        return torch.tensor([self.number_of[t] for t in texts], dtype=torch.long)

    def rows(self, texts: Sequence[str]) -> Tensor:
        """Return the features (n, d) of texts."""
        return self.features[self.numbers(texts)]


class _ScopeTraining:
    """A, c and s while they are trained by Adam."""

    def __init__(self, table: FeatureTable, part: ScopePart, plan: ScopePlan) -> None:
        self.plan, self._part, self._table = plan, part, table
        seen = table.rows(part.texts)
        self._center = seen.mean(0)
        generator = torch.Generator().manual_seed(plan.seed)
        random_rows = torch.randn(seen.shape[1], min(plan.dimensions, seen.shape[1]), generator=generator)
        basis = torch.linalg.qr(random_rows).Q.T
        # divided by the deviation of each entry; distances between two texts are near 1 then
        deviation = (seen - self._center).square().mean(0).sqrt().clamp(min=1e-6)
        self._projection = (basis / deviation / math.sqrt(2 * len(basis))).requires_grad_()
        self._log_scale = torch.zeros((), requires_grad=True)
        self._adam = torch.optim.Adam([self._projection, self._log_scale], lr=plan.learning_rate)
        self._done = 0
        self.last_loss: float | None = None

    def run(self, store: ArtifactStore) -> Stepper[None]:
        """Run the steps that are left, from the last state in the store."""
        self._restore(store)
        while self._done < self.plan.steps:
            self._step()
            if self._done % STEPS_PER_STATE == 0 or self._done == self.plan.steps:
                store.put(STATE, self._state())
            yield Progress(Phase.TRAIN, self._done, self.plan.steps)

    def classifier(self, layer: int) -> ScopeClassifier:
        """Return the classifier, with thresholds that nothing but the record's own texts reaches."""
        scale = float(self._log_scale.detach().double().exp())
        return ScopeClassifier(layer, self._center, self._projection.detach().clone(), scale, 1.0, 1.0)

    def _step(self) -> None:
        texts, facts, within = self._draw(random.Random(f"{self.plan.seed} {self._done}"))
        with torch.enable_grad():
            embedded = self._embed(texts)[:, None]
            keys = torch.stack([self._embed([f.key_texts[j] for f in facts]) for j in range(2)], 1)
            exponents = self._log_scale.exp() * (embedded - keys).square().sum(-1).amin(-1)
            loss = balanced_loss(exponents, within)
            self._adam.zero_grad()
            loss.backward()
        self._adam.step()
        self.last_loss, self._done = float(loss.detach()), self._done + 1

    def _draw(self, rng: random.Random) -> tuple[list[str], list[ScopeFact], Tensor]:
        """Return the texts, facts and kinds of the pairs of one step."""
        pairs: list[tuple[str, ScopeFact, bool]] = []
        for _ in range(self.plan.batch_size):
            fact = rng.choice(self._part.facts)
            pairs.append((self._part.draw_within(fact, rng), fact, True))
            pairs += [(o.text, fact, False) for o in self._part.draw_outside(fact, rng)]
        texts, facts, within = zip(*pairs, strict=True)
        return list(texts), list(facts), torch.tensor(within)

    def _embed(self, texts: Sequence[str]) -> Tensor:
        embedded: Tensor = (self._table.rows(texts) - self._center) @ self._projection.T
        return embedded

    def _state(self) -> bytes:
        tensors = {"projection": self._projection.detach(), "log_scale": self._log_scale.detach()}
        tensors["done"] = torch.tensor([self._done])
        tensors["loss"] = torch.tensor([self.last_loss or 0.0], dtype=torch.float64)
        for number, state in self._adam.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": value.clone() for name, value in state.items()}
        return save({name: t.contiguous() for name, t in tensors.items()})

    def _restore(self, store: ArtifactStore) -> None:
        if (stored := store.get(STATE)) is None:
            return
        tensors = load(stored)
        with torch.no_grad():
            self._projection.copy_(tensors["projection"])
            self._log_scale.copy_(tensors["log_scale"])
        self._done, self.last_loss = int(tensors["done"]), float(tensors["loss"])
        names = ("step", "exp_avg", "exp_avg_sq")
        state = {number: {n: tensors[f"adam.{number}.{n}"] for n in names} for number in range(2)}
        self._adam.load_state_dict(self._adam.state_dict() | {"state": state})


def _with_thresholds(classifier: ScopeClassifier, measured: ScopeMeasurement, rate: float) -> ScopeClassifier:
    """Return a classifier with the least thresholds at which at most this share of the pairs out of scope opens. With
    few pairs whose text has the subject, that of all pairs is used for them, too."""
    outside = ~measured.within
    threshold = choose_threshold(measured.similarities[outside], rate)
    named = measured.similarities[outside & measured.names_subject]
    return ScopeClassifier(
        classifier.layer,
        classifier.center,
        classifier.projection,
        classifier.scale,
        threshold,
        choose_threshold(named, rate) if len(named) >= MIN_NAMED_PAIRS else threshold,
    )
