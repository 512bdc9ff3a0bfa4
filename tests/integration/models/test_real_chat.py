"""A conversation with a public model, SmolLM2-135M-Instruct."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from service.editing.context import find_recipe
from service.editing.greedy_text import generate_greedy
from service.editing.suffix_batch import DeltaSite
from service.editing.tokenized_contexts import tokenize_contexts
from service.editing.value_optimizer import ValueSearchSpec, optimize_values
from service.engine.decoding import DecodingBatch, new_sequences
from service.kit.chat_format import ChatFormat
from service.kit.stated_fact import StatedFact, fill_messages
from service.kit.steps import run_to_completion
from service.kit.template_renderer import TemplateRenderer
from service.kit.text_encoder import TextEncoder
from service.models.chat import describe_chat_template
from service.models.loading import LoadedModel, load_model
from service.models.token_batch import tokenize_statement
from service.schemas import WorkerGenerateRequest
from tests.support.chat_templates import CONVERSATIONS, message
from workers.model_info import tokenizer_json

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def model(smollm2: Path) -> LoadedModel:
    return load_model(smollm2)


@pytest.fixture(scope="module")
def chat(model: LoadedModel) -> ChatFormat:
    """The form of conversations that the API makes of what a worker registers."""
    registered = describe_chat_template(model.tokenizer)
    assert registered is not None
    encoder = TextEncoder(
        Tokenizer.from_str(tokenizer_json(model)), model.max_positions, model.vocabulary_size
    )
    return ChatFormat(registered["template"], registered["special_tokens"], encoder, TemplateRenderer())


def test_the_api_reads_conversations_as_transformers(model: LoadedModel, chat: ChatFormat) -> None:
    """The tokens of conversations are those of `apply_chat_template`."""
    for messages in CONVERSATIONS:
        expected = model.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert chat.encode(chat.prompt_text(messages)) == expected


def test_an_answer_ends_at_its_turn(model: LoadedModel, chat: ChatFormat) -> None:
    """A question is answered in a sentence that ends at the end of the turn, which is not shown."""
    text = chat.prompt_text([message("user", "What is the capital of France?")])
    assert [model.tokenizer.convert_ids_to_tokens(i) for i in chat.end_token_ids] == ["<|im_end|>"]
    request = WorkerGenerateRequest(
        tokens=[chat.encode(text)], max_new_tokens=40, end_token_ids=list(chat.end_token_ids)
    )
    (answer,) = new_sequences(model, request)
    batch = DecodingBatch(model, [answer])
    while len(batch):
        batch.step()
    assert (answer.text, answer.finish_reason) == ("The capital of France is Paris.", "stop")


def test_a_fact_in_a_conversation_has_the_tokens_of_transformers(
    model: LoadedModel, chat: ChatFormat
) -> None:
    """The statement of a fact in a conversation has the tokens of `apply_chat_template`, and the last of its subject is
    the last of its last mention; a context begins the message of the subject."""
    messages = [message("user", "What is the capital of {}?"), message("assistant", "The capital of {} is")]
    text = chat.prompt_text(messages, continue_final=True)
    statement = StatedFact("Japan", text, messages, continued=True).statement()
    expected = model.tokenizer.apply_chat_template(
        fill_messages(messages, "Japan"), continue_final_message=True, return_dict=False
    )
    tokenized = tokenize_statement(model, statement)
    assert tokenized.ids == expected
    assert model.tokenizer.decode(tokenized.ids[slice(*tokenized.subject)]) == " Japan"
    assert tokenized.subject[1] == len(expected) - 1
    moved = tokenize_statement(model, statement.with_context("It rains. "))
    assert model.tokenizer.decode(moved.ids).endswith("assistant\nIt rains. The capital of Japan is")


def test_a_fact_in_a_conversation_is_edited(model: LoadedModel, chat: ChatFormat) -> None:
    """A value at the subject makes the model continue the beginning of its answer with the new object, and without the
    value it continues it with the true one."""
    messages = [message("user", "What is the capital of {}?"), message("assistant", "The capital of {} is")]
    text = chat.prompt_text(messages, continue_final=True)
    statement = StatedFact("Japan", text, messages, continued=True).statement()
    answers = run_to_completion(generate_greedy(model, [statement.text]))
    assert answers[0].text.startswith(" Tokyo")
    recipe = find_recipe(model)
    assert recipe is not None
    parameters = recipe.rome.model_copy(update={"steps": 20, "layers": (3,)})
    tokenized = tokenize_contexts(model, statement, "Oslo", [], restated=True)
    assert tokenized.restatement is not None
    spec = ValueSearchSpec(tokenized, parameters)
    (value,) = run_to_completion(optimize_values(model, DeltaSite(3), [spec]))
    assert value.losses[-1] < 0.5 * value.losses[0]
