"""A conversation with a public model, SmolLM2-135M-Instruct."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from service.engine.decoding import DecodingBatch, new_sequences
from service.kit.chat_format import ChatFormat
from service.kit.template_renderer import TemplateRenderer
from service.kit.text_encoder import TextEncoder
from service.models.chat import describe_chat_template
from service.models.loading import LoadedModel, load_model
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
