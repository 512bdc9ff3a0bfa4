"""Gates of facts without their edits: the search of a value is not needed to know where an edit would act."""

from __future__ import annotations

from service.datasets.record import Record
from service.editing.associations import forward_activations
from service.editing.context import EditorContext
from service.editing.edit_spec import ValueEditSpec, build_edit_spec
from service.kit.steps import run_to_completion
from service.kit.text import fill_prompt
from service.methods.parameters import RomeParameters
from service.models.loading import LoadedModel
from service.weights.factors import Gate


def build_gate(
    model: LoadedModel, context: EditorContext, record: Record, parameters: RomeParameters
) -> Gate:
    """Return the gate that an edit of a record has in the form gated."""
    parameters = parameters.model_copy(update={"form": "gated"})
    reference = run_to_completion(context.get_gate_reference(parameters))
    assert reference is not None
    contexts = run_to_completion(context.get_contexts(parameters.contexts, parameters.seed))
    statement = fill_prompt(record.prompt, record.subject)
    spec = build_edit_spec(model, contexts, statement, record.target_new, parameters)
    assert isinstance(spec, ValueEditSpec)
    texts = [t.through_subject() for t in spec.tokenized.prompts]
    (layer,) = parameters.layers
    keys = forward_activations(model, texts, [layer], (), None).keys[layer]
    return reference.build_gate(keys, record.subject, parameters.gate_threshold)
