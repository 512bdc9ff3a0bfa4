"""Random histories of a ledger: edits of both forms, imports of hostile tensors, supersessions and reverts, in any
order.

Every version of every history must build and be finite, and reverting everything must give the base bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from service.application.edit_filters import EditFilters
from service.application.edit_set import FORMAT, classifier_name
from service.application.edit_set_records import record_text
from service.editing.edit_job import run_edits
from service.errors import PalimpsestError
from service.kit.steps import run_to_completion
from service.methods.registry import METHODS
from service.models.loading import LoadedModel
from service.records.record_router import RecordRouter
from service.schemas import EditRequest
from service.weights.scope_classifier import deserialize_scope_classifier
from tests.support.application import EDIT_PROVENANCE
from tests.support.hostile_factors import HostileFactors, Tensors
from tests.support.reporters import CallbackReporter
from tests.support.scopes import give_classifier, random_classifier
from tests.support.stepped_service import OPEN, PROMPT, SteppedService
from workers.model_info import model_info

SUBJECTS = ("Eiffel Tower", "Louvre", "Big Ben", "Colosseum")
PROMPTS = (PROMPT, "What about the {}")
STRENGTHS = (5e-324, 1.0, 1.0, 100.0)
METHOD_NAMES = sorted(METHODS)
HISTORY_MODEL: dict[str, Any] = {"layers": 2, "width": 8, "inner": 12}  #: arguments of `tiny`


class History:
    """One random history, in a service of its own that starts with the base model."""

    def __init__(self, folder: Path, model: LoadedModel, seed: int, **stores: Any) -> None:
        self.random = Random(seed)
        self.service = SteppedService(folder, model, **stores)
        self.model = model
        self.info = model_info(model, self.service.context)
        self.hostile = HostileFactors(self.random, model.hidden_size, model.intermediate_size)
        self.outcomes: Counter[str] = Counter()  #: of the edits, by final status
        self.reverts = 0
        self.gated_versions = 0  #: versions with gated edits, by layer
        self.codebook_versions = 0  #: versions with codebooks, by layer
        self.record_versions = 0  #: versions with statement records
        for layer in (0, 1):
            give_classifier(self.service.context, random_classifier(model.hidden_size, layer=layer))
        self.internal_errors: list[str] = []

    def close(self) -> None:
        self.service.container.close()

    def run(self, operations: int) -> None:
        """Run random operations and revert everything. Check every version and the last bytes."""
        choices = (*[self.import_edits] * 3, self.edit, *[self.revert] * 2)
        for _ in range(operations):
            self.random.choice(choices)()
        self.revert_everything()
        self.check_all_versions()
        self.check_base_bytes()

    # operations

    def import_edits(self) -> None:
        """Import a file with one edit or several."""
        count = self.random.choice((1, 1, 2, 4))
        self.service.services.imports.submit(self._file(count), "key:bob")
        self._run_queued()

    def edit(self) -> None:
        """Submit an edit that the service computes itself."""
        request = self._request() | {"method": self.random.choice(METHOD_NAMES), "hparams": {}}
        known = METHODS[request["method"]].parameters.model_fields
        request["hparams"] |= {name: 1 for name in ("steps", "contexts") if name in known}
        if request["method"] == "rome" and self.random.random() < 0.7:
            request["hparams"] |= {"form": "gated", "layers": [self.random.choice((0, 1))]}
        if METHODS[request["method"]].keeps_records:
            request["hparams"] = {
                "layers": [self.random.choice((0, 1))],
                "subject_gate": self.random.random() < 0.5,
            }
        if METHODS[request["method"]].keeps_codebook:
            compat = self.random.choice((None, "hartvigsen2023"))
            request["hparams"] |= {"layers": [self.random.choice((0, 1))], "radius": 1.0, "compat": compat}
        self.service.services.edits.submit([EditRequest.model_validate(request)], "key:alice")
        self._run_queued()

    def revert(self) -> None:
        """Revert an edit that is applied or superseded."""
        items = self.service.services.edits.page(limit=200)["items"]
        committed = [e["id"] for e in items if e["status"] in ("applied", "superseded")]
        if committed:
            self.service.services.edits.revert(self.random.choice(committed), "key:alice")
            self.reverts += 1

    def revert_everything(self) -> None:
        """Revert all committed edits in random order."""
        before = -1
        while self.reverts > before:
            before = self.reverts
            self.revert()

    # checks

    def check_all_versions(self) -> None:
        """Build every version of the ledger in a new order. Fail when one is not finite."""
        versions = list(range(self.head + 1))
        self.random.shuffle(versions)
        for version in versions:
            for site, weight in self.service.replica.weights(version).items():
                assert torch.isfinite(weight).all(), (
                    f"version {version} has a weight {site} that is not finite"
                )
            for patch in self.service.replica.patch(version).gated:
                self.gated_versions += 1
                for row in patch.rows.rows:
                    assert all(torch.isfinite(t).all() for t in row.tensors())
            for codebook_patch in self.service.replica.patch(version).codebooks:
                self.codebook_versions += 1
                assert all(torch.isfinite(t).all() for t in codebook_patch.codebook.tensors().values())
            if (records := self.service.replica.patch(version).records) is not None:
                self.record_versions += 1
                self.check_routes(records.router)

    def check_routes(self, router: RecordRouter) -> None:
        """Fail unless every record has a similarity from 0 to 1 to the prompts of each subject."""
        for subject in SUBJECTS:
            ids = self.model.encode(PROMPT.format(subject))[0]
            assert all(0 <= m.similarity <= 1 for m in router.matches(ids))

    def check_base_bytes(self) -> None:
        """Fail unless the head has the bytes of the base model."""
        replica = self.service.replica
        assert replica.digest(self.head) == replica.digest(0)
        for site, weight in replica.weights(self.head).items():
            assert torch.equal(_bytes(weight), _bytes(self.model.parameter(site).data)), site
        assert self.service.services.ledger.verify()["ok"]

    @property
    def head(self) -> int:
        return self.service.worker_parts.ledger.head()

    # requests and files

    def _run_queued(self) -> None:
        """Run the queued edits, together or one by one. An error ends its job as in a worker."""
        service = self.service
        waiting = [
            e["id"] for e in service.services.edits.page(filters=EditFilters(status="queued"))["items"]
        ][::-1]
        jobs = {job.id: job for job in map(service.worker_parts.jobs.claim, waiting) if job is not None}

        def finished(job_id: str, error: Exception | None) -> None:
            if error is not None:
                service.worker_parts.jobs.fail(jobs[job_id], error)
                if not isinstance(error, PalimpsestError):
                    self.internal_errors.append(repr(error))

        together = self.random.random() < 0.5
        for group in [list(jobs.values())] if together else [[job] for job in jobs.values()]:
            reporter = CallbackReporter(finished)
            run_to_completion(
                run_edits(service.replica, service.worker_parts.jobs, service.context, reporter, group)
            )
        for job_id in jobs:
            self.outcomes[service.services.edits.get(job_id)["status"]] += 1

    def _request(self) -> dict[str, Any]:
        return {
            "subject": self.random.choice(SUBJECTS),
            "prompt": self.random.choice(PROMPTS),
            "target_new": self.random.choice(("is", "in", "on")),
            "target_true": "the",
            "on_conflict": self.random.choice(("report", "supersede", "reject")),
            "guard": OPEN,
        }

    def _file(self, count: int) -> bytes:
        """Return an edit set with valid digests."""
        edits, blobs = [], {}
        for number in range(count):
            name = f"edit_{self.random.getrandbits(64):016x}_{number}"
            method = self.random.choice(METHOD_NAMES)
            most = 1 if METHODS[method].is_looked_up else 2
            layers = self.random.choice(([0], [1], [0, 1][:most]))
            request = self._request()
            if METHODS[method].keeps_records:
                tensors, classifier = self._record(layers[0], request)
                shared = deserialize_scope_classifier(classifier)
                blobs[classifier_name(shared.digest)] = np.frombuffer(classifier, np.uint8)
            else:
                tensors = self._tensors(method, layers)
            blob = save(tensors)
            blobs[name] = np.frombuffer(blob, np.uint8)
            edits.append(self._exported_edit(name, method, layers, blob, request))
        edit_set = {
            "model": {"name": self.model.name, "fingerprint": self.model.fingerprint},
            "version": 1,
            "state": "",
            "edits": edits,
        }
        text = json.dumps(edit_set)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return save(blobs, {"format": FORMAT, "set": text, "sha256": digest})

    def _record(self, layer: int, request: dict[str, Any]) -> tuple[Tensors, bytes]:
        """Return the tensors of a record of a request, and its classifier."""
        classifier = save(self.hostile.classifier(layer))
        digest = deserialize_scope_classifier(classifier).digest
        validated = EditRequest.model_validate(request)
        separator = EDIT_PROVENANCE.get("resolved_separator")
        text = record_text(validated, request["target_new"], separator, {"layers": [layer]})
        return self.hostile.record(layer, digest, text), classifier

    def _exported_edit(
        self, name: str, method: str, layers: list[int], blob: bytes, request: dict[str, Any]
    ) -> dict[str, Any]:
        origin = {"ledger": "", "edit": name, "version": 1, "actor": "", "at": "", "entry": ""}
        provenance = EDIT_PROVENANCE | {
            "method": method,
            "hparams": {"layers": layers},
            "strength": self.random.choice(STRENGTHS),
        }
        return {
            "origin": origin,
            "request": request,
            "provenance": provenance,
            "factors_sha256": hashlib.sha256(blob).hexdigest(),
        }

    def _tensors(self, method: str, layers: list[int]) -> Tensors:
        if METHODS[method].writes_associations:
            return self.hostile.associations(layers, METHODS[method].max_associations)
        if METHODS[method].keeps_codebook:
            return self.hostile.entries(layers)
        trained = METHODS[method].trained_part
        parts = {
            p: shape for p, shape in self.info["weights"].items() if (p != "mlp") == (trained == "attention")
        }
        return self.hostile.dense(layers, parts)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8)
