"""Checks of statement records and of their classifiers in an edit set. Free of torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from service.application.tensor_checks import check_numbers, check_tensor, clamp
from service.errors import InvalidInput
from service.kit.safetensors_io import SafetensorsFile
from service.kit.separator import Separator, separator
from service.kit.statement_sentence import statement_sentence
from service.kit.text import normalize_whitespace
from service.methods.parameters import SeracParameters
from service.schemas import EditRequest

RECORD_PARTS = ("classifier", "keys", "text", "threshold")
MAX_DIMENSIONS = 256  #: of an embedding
MAX_KEYS = 4  #: of a record
MAX_TEXT = 2**17  #: bytes of the statement and the names


def check_classifier(file: SafetensorsFile, info: Mapping[str, Any]) -> tuple[int, int, str]:
    """Return the layer, the dimensions and the digest of a scope classifier, as `service/weights/scope_classifier.py`
    defines it. Raise InvalidInput unless it is one for a layer of the model."""
    layers = {int(name.split(".")[1]) for name in file.tensor_infos if _is_part_of_classifier(name)}
    prefix = f"scope.{next(iter(layers), 0)}"
    names = [f"{prefix}.{part}" for part in ("center", "numbers", "projection")]
    if len(layers) != 1 or set(file.tensor_infos) != set(names) or next(iter(layers)) >= info["layers"]:
        raise InvalidInput("it must be the classifier of one layer of the model.")
    center, numbers, projection = names
    dimensions = (*file.tensor_infos[projection].shape, 0)[0]
    check_tensor(file.tensor_infos[center], "F32", (info["width"],))
    check_tensor(file.tensor_infos[projection], "F32", (clamp(dimensions, 1, MAX_DIMENSIONS), info["width"]))
    check_tensor(file.tensor_infos[numbers], "F64", (3,))
    digest = hashlib.sha256()
    for name in names:
        array = file.to_numpy(name)
        check_numbers(name, array, may_be_negative=name != numbers)
        digest.update(f"{name}:{array.shape}".encode())
        digest.update(array.data)
    scale, *thresholds = file.to_numpy(numbers).tolist()
    if scale == 0 or max(thresholds) > 1:
        raise InvalidInput(f"{numbers} must be a scale above 0 and two thresholds of at most 1.")
    return next(iter(layers)), dimensions, digest.hexdigest()


def _is_part_of_classifier(name: str) -> bool:
    parts = name.split(".")
    return len(parts) == 3 and parts[0] == "scope" and parts[1].isdecimal() and len(parts[1]) < 5


def check_record(
    file: SafetensorsFile,
    layer: int,
    dimensions: int,
    request: EditRequest,
    target: str,
    between: Separator | None,
    hparams: Mapping[str, Any],
) -> None:
    """Raise InvalidInput unless a record is that of a request: its tensors are valid, and its statement and names are
    those of the prompt, the object and the hyperparameters."""
    infos = {part: file.tensor_infos[f"record.{layer}.{part}"] for part in RECORD_PARTS}
    count = (*infos["keys"].shape, 0)[0]
    check_tensor(infos["keys"], "F64", (clamp(count, 1, MAX_KEYS), dimensions))
    check_numbers(infos["keys"].name, file.to_numpy(infos["keys"].name))
    check_tensor(infos["threshold"], "F64", (1,))
    if not 0 <= file.to_numpy(infos["threshold"].name)[0] <= 1:  # NaN is not
        raise InvalidInput(f"{infos['threshold'].name} must be from 0 to 1.")
    size = (*infos["text"].shape, 0)[0]
    check_tensor(infos["text"], "U8", (clamp(size, 2, MAX_TEXT),))
    expected = record_text(request, target, between, hparams)
    if file.read(infos["text"].name) != expected:
        raise InvalidInput(
            f"{infos['text'].name} is not the statement of its prompt, its object and its hyperparameters."
        )


def record_text(
    request: EditRequest, target: str, between: Separator | None, hparams: Mapping[str, Any]
) -> bytes:
    """Return the stored text of the record of a request (`service/weights/factors.py`)."""
    try:
        parameters = SeracParameters.model_validate(hparams)
    except ValueError:
        raise InvalidInput("its hyperparameters are not those of serac.") from None
    text = request.statement.text
    chosen = separator(text, target) if between is None else between
    names = (normalize_whitespace(request.subject), *parameters.aliases) if parameters.subject_gate else ()
    statement = statement_sentence(text, chosen, target) + parameters.divider
    stored = json.dumps({"names": names, "statement": statement}, ensure_ascii=False, sort_keys=True)
    return stored.encode()
