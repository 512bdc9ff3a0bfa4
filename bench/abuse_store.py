"""A store with the largest resources that the service returns, for `bench/abuse.py`."""

from __future__ import annotations

import hashlib
from typing import Any

from service.application.edit_set import EditOrigin, EditProvenance, EditSet, ExportedEdit, edit_set_header
from service.db.models import Job, LedgerEntry, now
from service.evaluation.metrics import CHANGE_SCORES, MEASURES
from service.kit.safetensors_io import TensorInfo, build_header
from service.methods.parameters import RomeParameters
from service.recipes.recipe import Recipe
from service.schemas import MAX_RECORDS, EditRequest, EvaluationPlan
from tests.support.application import EDIT_PROVENANCE, EVALUATION_RESULT, TestApp, tokenizer
from tests.support.chat_templates import CHATML

FINGERPRINT = "f" * 64
#: the shape of the model; each character is a token, so that texts of any accepted length fit
MODEL: dict[str, Any] = {
    "name": "large",
    "layers": 48,
    "positions": 20_000,
    "vocabulary": 302,
    "width": 900,
    "inner_width": 16_384,
    "facts": True,
    "chat": {"template": CHATML, "special_tokens": {}},
    "recipe": Recipe(source="bench", rome=RomeParameters(layers=(1,))).model_dump(mode="json"),
}
LAYERS_OF_EDIT = 5  #: of an imported edit
ENTRIES = 2000  #: of the ledger
LARGE_EDITS = 201  #: more than a page
PROBE = ("the word, " * 750)[:7400]  #: 128 of them fill a request
LARGE_EDIT_ID = "edit_large000"
EVALUATION_ID = "evaluation_large"


def edit_body(number: int = 0) -> dict[str, Any]:
    """Return one edit of nearly a megabyte: the largest that the service accepts."""
    return {
        "subject": f"Tower {number}",
        "prompt": "{} is in",
        "target_new": "Rome",
        "target_true": "Paris",
        "probes": {
            "paraphrase": [PROBE] * 64,
            "neighborhood": [{"prompt": PROBE, "target": "Paris"}] * 64,
        },
    }


def fill_store(test_app: TestApp) -> None:
    """Register the model, and insert edits, a ledger whose entries are all invalid, and a finished evaluation."""
    test_app.worker_parts.session.register(MODEL, tokenizer())
    with test_app.database.write_session() as session:
        session.add_all(_small_edit(number) for number in range(1, ENTRIES + 1))
        session.flush()
        session.add_all(_invalid_entry(number) for number in range(1, ENTRIES + 1))
        session.add(_evaluation())
    for number in range(LARGE_EDITS):
        with test_app.database.write_session() as session:
            session.add(_large_edit(number))


def _large_edit(number: int) -> Job:
    request = EditRequest.model_validate(edit_body(number) | {"method": "rome"}).model_dump(mode="json")
    return _job("edit", f"edit_large{number:03}", request, subject=f"Tower {number}", status="rejected")


def _small_edit(number: int) -> Job:
    request = {"subject": f"Bridge {number}", "prompt": "{} is in", "target_new": "Rome", "method": "rome"}
    return _job(
        "edit",
        f"edit_a{number:06}",
        request,
        subject=request["subject"],
        fact_key=f"Bridge {number}\n{{}} is in",
        status="applied",
        version=number,
    )


def _invalid_entry(number: int) -> LedgerEntry:
    """Return an entry whose hash is wrong. Its body is as large as an edit's can be."""
    body = {"subject": f"Bridge {number}", "prompt": PROBE, "strength": 1.0, "factors_sha256": "0" * 64}
    return LedgerEntry(
        model=FINGERPRINT,
        version=number,
        kind="apply",
        edit_id=f"edit_a{number:06}",
        actor="bench",
        at=now(),
        body=body,
        state="0" * 64,
        previous="0" * 64,
        hash="0" * 64,
    )


def _evaluation() -> Job:
    """Return an evaluation with the largest number of rows."""
    measures = dict.fromkeys(MEASURES, 0.123456789)
    row = {
        "record": "record 1",
        "subject": "Tower",
        "prompt": "{} is in the city of",
        "target_new": "Rome",
        "target_true": "Paris",
        "relation": "",
        "missing_fields": [],
        "before": measures,
        "after": measures,
        "changes": dict.fromkeys(CHANGE_SCORES, 0.123456789),
        "strength": 1.0,
        "loss": 0.1,
        "norm": {"1.mlp": 0.1},
        "damage": {"loss": 0.1, "drift": 0.2},
    }
    result = EVALUATION_RESULT | {"rows": [row] * MAX_RECORDS}
    request = EvaluationPlan().model_dump(mode="json") | {
        "records": MAX_RECORDS,
        "dataset": None,
        "limit": None,
    }
    return _job("evaluation", EVALUATION_ID, request, subject="bench", status="done", result=result)


def _job(kind: str, job_id: str, request: dict[str, Any], **columns: Any) -> Job:
    times = {"created": now(), "updated": now(), "started": now(), "ended": now()}
    return Job(id=job_id, kind=kind, model=FINGERPRINT, request=request, actor="bench", **times, **columns)


def edit_set(count: int, method: str = "rome") -> bytes:
    """Return a file to import with `count` edits of one method, each as large as the shape of the model makes it."""
    layers = [0] if method.startswith("ft") else list(range(LAYERS_OF_EDIT))
    shapes: dict[str, tuple[int, ...]] = {}
    d, D = MODEL["width"], MODEL["inner_width"]
    if method.startswith("ft"):
        shapes["weight.0.mlp"] = (d, D)
    else:
        for x in layers:
            sizes = {"key": D, "direction": D, "value": d, "left": d, "right": D}
            shapes |= {f"layer.{x}.{name}": (n,) for name, n in sizes.items()}
    infos = [TensorInfo(name, "F32", shape) for name, shape in shapes.items()]
    factors = build_header(infos, {}) + bytes(sum(info.nbytes for info in infos))
    digest = hashlib.sha256(factors).hexdigest()
    provenance = EditProvenance(**EDIT_PROVENANCE | {"method": method, "hparams": {"layers": layers}})
    edits = [
        ExportedEdit(
            origin=EditOrigin(
                ledger="0" * 64, edit=f"edit_{n:06}", version=n + 1, actor="a", at="", entry=""
            ),
            request=EditRequest(subject=f"House {n}", prompt="{} is in", target_new="Rome", method=method),
            provenance=provenance,
            factors_sha256=digest,
        )
        for n in range(count)
    ]
    description = EditSet(
        model={"name": "large", "fingerprint": FINGERPRINT}, version=count, state="", edits=edits
    )
    header = edit_set_header(description, {e.origin.edit: len(factors) for e in edits})
    return header + factors * count
