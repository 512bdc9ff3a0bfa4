"""Validation of requests against the tokenizer, the shape and the recipe of the served model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from service.datasets.loading import read_records
from service.datasets.record import check_record_fits
from service.db.models import Model
from service.errors import InvalidInput
from service.kit.chat_format import MESSAGES_FIELD
from service.kit.separator import Separator
from service.kit.stated_fact import StatedFact
from service.kit.text import token_span
from service.kit.text_encoder import TextEncoder
from service.methods.method import EditMethod
from service.methods.registry import DEFAULT_METHOD, METHODS, get_method
from service.recipes.default import can_try_layers
from service.recipes.recipe import Recipe, resolve_hparams
from service.schemas import (
    ChatProbe,
    EditRequest,
    EvaluationRequest,
    PromptForm,
    TraceRequest,
    TrainingRequest,
    WorkerGenerateRequest,
    paraphrase_text,
)
from service.training.scope_examples import scope_facts, split_by_subject
from service.training.scope_layer import check_scope_layer

NOISE_PATTERN = re.compile(r"\d+(\.\d+)?sigma")


def validate_edit(request: EditRequest, model: Model, encoder: TextEncoder) -> None:
    """Raise InvalidInput if an edit cannot be computed."""
    encoder.check_plain(request.subject, "subject")
    with prompt_errors_of(request):
        _validate_statement(request, encoder)
    for number, prompt in enumerate(request.given_paraphrases or ()):
        with error_path(f"probes.paraphrase.{number}"):
            _validate_paraphrase(prompt, request, encoder)
    for number, neighbour in enumerate(request.given_neighbors or ()):
        with error_path(f"probes.neighborhood.{number}"), prompt_errors_of(neighbour):
            if neighbour.messages is None:  # messages are checked when they are rendered
                encoder.check_plain(neighbour.prompt_text, "prompt")
            _validate_target(encoder, neighbour.prompt_text, neighbour.target, "target")
    method = request.method or DEFAULT_METHOD
    _check_can_be_a_statement(request, get_method(method))
    resolve_hparams(_recipe_of(model), request.hparam_overrides, model.info["layers"], method)
    if request.try_layers and not can_try_layers(get_method(method)):
        methods = ", ".join(method.name for method in METHODS.values() if can_try_layers(method))
        raise InvalidInput(f"the layers of {request.method} are fixed: use one of {methods}.", "try_layers")


def _check_can_be_a_statement(request: EditRequest, method: EditMethod) -> None:
    """Raise InvalidInput for an edit that would be a statement, and cannot be one."""
    if method.keeps_records and request.objective == "erase":
        raise InvalidInput(
            f"{method.title} states a fact before prompts and cannot erase one: use another method.", "method"
        )
    if method.keeps_records and request.messages is not None:
        raise InvalidInput(
            f"{method.title} states a fact as a plain text: give `prompt` in place of `messages`, or use another method.",
            "messages",
        )


def _validate_statement(request: EditRequest, encoder: TextEncoder) -> None:
    statement = request.statement
    _check_plain_texts(encoder, request.fact)
    for name in ("target_new", "target_true"):
        if (target := getattr(request, name)) is not None:
            _validate_target(encoder, statement.text, target, name, request.separator)
    token_span(encoder.encode(statement.text)[1], statement.span)


def _validate_paraphrase(probe: str | ChatProbe, request: EditRequest, encoder: TextEncoder) -> None:
    text = paraphrase_text(probe, request.subject)
    if isinstance(probe, str):
        encoder.check_plain(text, "prompt")
        encoder.check(text, request.target_object)
        return
    with prompt_errors_of(probe):
        encoder.check(text, request.target_object)


def _check_plain_texts(encoder: TextEncoder, fact: StatedFact) -> None:
    """Raise InvalidInput if a prompt or a message contains a special token."""
    for field, text in fact.written_texts.items():
        encoder.check_plain(text, field)


def resolve_methods(requests: Sequence[EditRequest], model: Model) -> list[EditRequest]:
    """Return the requests with their methods. The default is the batch method of the recipe for several, else rome,
    which alone has the form "gated"."""
    recipe = _recipe_of(model)
    method = recipe.batch_method if recipe is not None and len(requests) > 1 else DEFAULT_METHOD

    def method_of(request: EditRequest) -> str:
        is_gated = (request.hparam_overrides or {}).get("form") == "gated"
        return request.method or (DEFAULT_METHOD if is_gated else method)

    return [r if r.method else r.model_copy(update={"method": method_of(r)}) for r in requests]


def _recipe_of(model: Model) -> Recipe | None:
    return Recipe.model_validate(model.info["recipe"]) if model.info.get("recipe") else None


def validate_trace(request: TraceRequest, encoder: TextEncoder) -> None:
    """Raise InvalidInput if a trace cannot be run."""
    encoder.check_plain(request.subject, "subject")
    with prompt_errors_of(request):
        _validate_traced(request, encoder)
    noise = request.noise
    if isinstance(noise, str) and not NOISE_PATTERN.fullmatch(noise):
        raise InvalidInput(
            '`noise` is a number, or a multiple of the embeddings\' deviation such as "3sigma".', "noise"
        )
    if isinstance(noise, float) and not 0 <= noise < float("inf"):
        raise InvalidInput("`noise` must not be negative, and finite.", "noise")


def _validate_traced(request: TraceRequest, encoder: TextEncoder) -> None:
    statement = request.statement
    _check_plain_texts(encoder, request.fact)
    if request.target is None:
        encoder.check(statement.text)
    else:
        _validate_target(encoder, statement.text, request.target, "target", request.separator)
    token_span(encoder.encode(statement.text)[1], statement.span)


def validate_evaluation(request: EvaluationRequest, model: Model, encoder: TextEncoder) -> None:
    """Raise InvalidInput if an evaluation cannot be run. The worker validates the fact table of the model."""
    resolve_hparams(_recipe_of(model), request.hparams, model.info["layers"], request.method)
    request.check_consistency()
    _check_source(request, model)
    if request.records is None:
        return
    for record in read_records(request.records, request.seed, request.limit):
        try:
            check_record_fits(record, request.objective, encoder)
        except InvalidInput as error:
            raise InvalidInput(f"{record.name}: {error.detail}", "records") from None


def validate_training(request: TrainingRequest, model: Model) -> None:
    """Raise InvalidInput if a training cannot be run. The worker validates the fact table of the model."""
    _check_source(request, model)
    check_scope_layer(request, model.info["layers"])
    if request.records is not None:
        records = read_records(request.records, request.seed, request.limit)
        split_by_subject(scope_facts(records), request.seed)


def _check_source(request: EvaluationRequest | TrainingRequest, model: Model) -> None:
    """Raise InvalidInput unless a request has either records or a table of facts that exists."""
    if (request.records is None) == (request.dataset is None):
        raise InvalidInput('give either `records` or `"dataset": "facts"`.', "records")
    if request.records is None and not model.info.get("facts"):
        raise InvalidInput("the resident model has no table of facts beside it: give `records`.", "dataset")


def validate_generation(request: WorkerGenerateRequest, encoder: TextEncoder) -> None:
    """Raise InvalidInput if a prompt has unknown tokens or does not fit the positions of the model."""
    max_prompt_tokens = encoder.positions - min(1, request.max_new_tokens)
    for prompt in request.prompts_or_ids():
        if isinstance(prompt, str):
            ids, _ = encoder.encode(prompt)
        else:
            encoder.check_ids(ids := prompt)
        if not 0 < len(ids) <= max_prompt_tokens:
            raise InvalidInput(
                f"the prompt has {len(ids)} tokens and the model has {encoder.positions} positions: give it 1 to "
                f"{max_prompt_tokens}.",
                "prompt",
            )


def _validate_target(
    encoder: TextEncoder, text: str, target: str, field: str, separator: Separator | None = None
) -> None:
    encoder.check_plain(target, field)
    try:
        encoder.check(text, target, separator)
    except InvalidInput as error:
        raise InvalidInput(error.detail, field if error.field == "target" else error.field) from None


@contextmanager
def error_path(path: str) -> Iterator[None]:
    """Prefix the field of an InvalidInput raised inside with a path."""
    try:
        yield
    except InvalidInput as error:
        names = [name for name in (path, error.field) if name]
        raise type(error)(error.detail, ".".join(names), **error.extra) from None


@contextmanager
def prompt_errors_of(form: PromptForm) -> Iterator[None]:
    """Name `messages` in an InvalidInput about the prompt of a conversation."""
    try:
        yield
    except InvalidInput as error:
        if form.messages is None or error.field != "prompt":
            raise
        raise type(error)(error.detail, MESSAGES_FIELD, **error.extra) from None
