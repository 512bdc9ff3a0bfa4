"""OpenAI's Python client against a service with a tiny model, on each wiring, compared with transformers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from openai.types import Completion
from openai.types.completion_choice import Logprobs
from transformers import AutoModelForCausalLM, AutoTokenizer

from api.app import create_app
from service.application import Services
from service.application.development import Development
from service.bootstrap import build_container
from service.schemas import EditRequest
from service.settings import Settings
from tests.support.chat_templates import CONVERSATIONS, LLAMA, QUESTION, message
from tests.support.local_server import run_http_server, wait_until
from tests.support.tiny_models import tiny
from tests.support.wirings import ALL_WIRINGS, store_settings
from workers.worker import Worker

torch.set_num_threads(1)

PROMPT = "The Eiffel Tower is located in the city of"
PROMPTS = [PROMPT, "Big Ben", "São Paulo 🗼 lies in"]
RECIPE = {
    "source": "test",
    "rome": {"layers": [1], "steps": 6, "contexts": 4, "clamp": 40.0, "weight_decay": 0.0},
}


class TransformersReference:
    """The same model, loaded and run by transformers alone."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    @torch.no_grad()
    def greedy(self, text: str, count: int) -> str:
        ids = torch.tensor([self.ids(text)])
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        completion: str = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return completion

    def chat_ids(self, messages: list[dict[str, str]], **options: Any) -> list[int]:
        """Return the tokens of a conversation in the form of the chat template."""
        options = {"add_generation_prompt": True} | options
        return list(self.tokenizer.apply_chat_template(messages, return_dict=False, **options))

    @torch.no_grad()
    def answer(self, ids: list[int], count: int) -> str:
        """Return the greedy answer."""
        prompt = torch.tensor([ids])
        out = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        text = str(self.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))
        return text.rstrip("\ufffd")  # an incomplete character at the end is not in an answer

    @torch.no_grad()
    def log_probs(self, ids: list[int]) -> list[float]:
        """Return the log-probability of each token but the first, given the tokens before it."""
        log_p = self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return [float(log_p[i, token]) for i, token in enumerate(ids[1:])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the name `almanac`, on disk."""
    model_dir = tmp_path_factory.mktemp("models") / "almanac"
    model = tiny("gpt2", positions=128)
    model.model.save_pretrained(model_dir)
    model.tokenizer.save_pretrained(model_dir)
    (model_dir / "chat_template.jinja").write_text(LLAMA)
    (model_dir / "recipe.json").write_text(json.dumps(RECIPE))
    (model_dir / "corpus.txt").write_text(
        "\n".join(f"{PROMPT} Paris, and {i} is a number." for i in range(60))
    )
    return model_dir


@pytest.fixture(scope="module")
def reference(folder: Path) -> TransformersReference:
    return TransformersReference(folder)


@pytest.fixture(scope="module", params=ALL_WIRINGS)
def running_service(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[OpenAI, Services]]:
    """A client and the services of a running API and worker."""
    settings = Settings(
        model=str(folder),
        data_dir=tmp_path_factory.mktemp("data"),
        covariance_tokens=1000,
        corpus=folder / "corpus.txt",
        threads=1,
        **store_settings(request),
    )
    container = build_container(settings)
    worker = Worker(settings, container)
    worker.start_in_thread()
    while not worker.ready.wait(0.05):
        worker.check()
    app = create_app(container.services, container.broker, settings, Development.ON)
    with (
        run_http_server(app) as url,
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client,
    ):
        yield client, container.services
    worker.stop()
    container.close()


@pytest.fixture
def client(running_service: tuple[OpenAI, Services]) -> OpenAI:
    return running_service[0]


def texts(answer: Completion) -> list[str]:
    return [choice.text for choice in answer.choices]


def create_completion(client: OpenAI, **fields: Any) -> Completion:
    answer: Completion = client.completions.create(
        **{"model": "almanac@base", "prompt": PROMPT, "max_tokens": 12, **fields}
    )
    return answer


def stream_completion(client: OpenAI, **fields: Any) -> Iterator[Completion]:
    chunks: Iterator[Completion] = client.completions.create(
        **{"model": "almanac@base", "prompt": PROMPT, "max_tokens": 12, "stream": True, **fields}
    )
    return chunks


def logprob_lines(logprobs: Logprobs) -> list[tuple[str, float, dict[str, float], int]]:
    """Return token, log-probability, best tokens and offset of each token."""
    assert logprobs.tokens is not None and logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None and logprobs.text_offset is not None
    return list(
        zip(
            logprobs.tokens,
            logprobs.token_logprobs,
            logprobs.top_logprobs,
            logprobs.text_offset,
            strict=True,
        )
    )


def test_greedy_answers_are_those_of_transformers(client: OpenAI, reference: TransformersReference) -> None:
    """At temperature 0 the completion of each prompt equals that of transformers, and the usage counts the
    tokens."""
    answer = create_completion(client, prompt=PROMPTS, temperature=0)
    assert texts(answer) == [reference.greedy(prompt, 12) for prompt in PROMPTS]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(reference.ids(prompt)) for prompt in PROMPTS)
    assert answer.model == "almanac@0"


def test_token_prompt_equals_text_prompt(client: OpenAI, reference: TransformersReference) -> None:
    """A prompt of token ids has the same completion as its text, alone and in a list."""
    fields: dict[str, Any] = {"seed": 5, "temperature": 0.9}
    assert texts(create_completion(client, prompt=reference.ids(PROMPT), **fields)) == texts(
        create_completion(client, **fields)
    )
    every = [reference.ids(prompt) for prompt in PROMPTS]
    assert texts(create_completion(client, prompt=every, **fields)) == texts(
        create_completion(client, prompt=PROMPTS, **fields)
    )


def test_the_log_probabilities_are_those_of_transformers(
    client: OpenAI, reference: TransformersReference
) -> None:
    """At any temperature the log-probabilities of the prompt and the completion equal those of
    transformers."""
    for choice, prompt in zip(
        create_completion(client, prompt=PROMPTS, echo=True, logprobs=5, temperature=1.7, seed=1).choices,
        PROMPTS,
        strict=True,
    ):
        logprobs = choice.logprobs
        assert (
            logprobs is not None
            and logprobs.tokens
            and logprobs.token_logprobs
            and logprobs.top_logprobs
            and logprobs.text_offset
        )
        names = {reference.tokenizer.decode([i]): i for i in range(len(reference.tokenizer))}
        read = reference.ids(prompt)
        rest = logprobs.tokens[len(read) :]
        assert choice.text.startswith(prompt)
        if all(token in names for token in rest):  # no token is a part of a character
            wanted = reference.log_probs(read + [names[token] for token in rest])
            assert logprobs.token_logprobs[1:] == pytest.approx(wanted, abs=1e-4)
        assert logprobs.token_logprobs[1 : len(read)] == pytest.approx(reference.log_probs(read), abs=1e-4)
        first: Any = logprobs.token_logprobs[0]  # the client's types do not allow None
        assert first is None
        for token, log_p, best in list(
            zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
        )[1:]:
            assert 5 <= len(best) <= 6
            assert best[token] == log_p
            assert max(best.values()) >= log_p


def test_max_tokens_zero_scores_the_prompt(client: OpenAI, reference: TransformersReference) -> None:
    """With `max_tokens` 0, `echo` and `logprobs` the response has the log-probabilities of the prompt, as
    evaluation harnesses request."""
    answer = create_completion(
        client, prompt=[reference.ids(prompt) for prompt in PROMPTS], max_tokens=0, echo=True, logprobs=1
    )
    assert texts(answer) == PROMPTS
    for choice, prompt in zip(answer.choices, PROMPTS, strict=True):
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(
            reference.log_probs(reference.ids(prompt)), abs=1e-4
        )
    assert answer.usage is not None and answer.usage.completion_tokens == 0


def test_first_choice_equals_a_single_choice(client: OpenAI) -> None:
    """With a seed, `n` choices are distinct and reproducible, and the first equals a single choice; without
    one, completions differ."""
    many = texts(create_completion(client, n=4, seed=11))
    assert many == texts(create_completion(client, n=4, seed=11))
    assert many[:1] == texts(create_completion(client, seed=11))
    assert len(set(many)) == 4
    assert texts(create_completion(client)) != texts(create_completion(client))  # without a seed


@pytest.mark.parametrize(
    "wish",
    [
        {},
        {"logprobs": 2},
        {"logprobs": 2, "echo": True, "stop": ["e", "a"]},
        {"prompt": PROMPTS, "n": 2, "logprobs": 0},
        {"max_tokens": 0, "echo": True, "logprobs": 1},
    ],
)
def test_stream_equals_the_whole_completion(client: OpenAI, wish: dict[str, Any]) -> None:
    """The concatenated chunks of a stream equal the response without streaming: text, tokens, offsets,
    log-probabilities and finish reasons."""
    wish = {"seed": 3, "temperature": 1.2, "max_tokens": 20, **wish}
    whole = create_completion(client, **wish)
    streamed: dict[int, dict[str, Any]] = {}
    for chunk in stream_completion(client, **wish):
        assert chunk.model == whole.model
        for choice in chunk.choices:
            state = streamed.setdefault(choice.index, {"text": "", "lines": []})
            state["text"] += choice.text
            if logprobs := choice.logprobs:
                state["lines"] += logprob_lines(logprobs)
            state["end"] = choice.finish_reason
    for choice in whole.choices:
        state, logprobs = streamed[choice.index], choice.logprobs
        assert (state["text"], state["end"]) == (choice.text, choice.finish_reason)
        if logprobs is not None:
            lines = logprob_lines(logprobs)
            assert [(x[0], x[3]) for x in state["lines"]] == [(x[0], x[3]) for x in lines]
            assert [x[1] for x in state["lines"][1:]] == pytest.approx([x[1] for x in lines[1:]], abs=1e-4)


def test_stop_string_ends_a_completion(client: OpenAI) -> None:
    """The completion ends before the stop string, and no listed token begins after its end."""
    (whole,) = texts(create_completion(client, seed=3, max_tokens=40))
    stop = whole[len(whole) // 2 :][:2]
    (choice,) = create_completion(client, seed=3, max_tokens=40, stop=stop, logprobs=0).choices
    assert choice.text == whole[: whole.index(stop)]
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None and choice.logprobs.text_offset is not None
    assert all(at < len(choice.text) for at in choice.logprobs.text_offset)


def test_model_ids_name_versions(
    running_service: tuple[OpenAI, Services], reference: TransformersReference
) -> None:
    """NAME and NAME@head name the head, NAME@base the base model, and NAME@N always version N."""
    client, services = running_service
    fields: dict[str, Any] = {"temperature": 0, "logprobs": 5}
    before = create_completion(client, **fields)
    request = EditRequest(
        subject="Eiffel Tower",
        prompt="The {} is located in the city of",
        target_new=" Rome",
        guard={"enabled": False},
    )
    (edit,) = services.edits.submit([request], "somebody")
    wait_until(lambda: services.edits.get(edit["id"])["status"] not in ("queued", "running"))
    edit = services.edits.get(edit["id"])
    assert edit["status"] == "applied"
    number = edit["version"]
    for name, version in {
        "almanac": number,
        "almanac@head": number,
        f"almanac@{number}": number,
        "almanac@base": 0,
    }.items():
        answer = create_completion(client, model=name, **fields)
        assert answer.model == f"almanac@{version}"
        same = answer.choices[0].logprobs == before.choices[0].logprobs
        assert same is (version == 0)
    services.edits.revert(edit["id"], "somebody")
    assert (
        create_completion(client, model=f"almanac@{number}", **fields).choices[0].logprobs
        != before.choices[0].logprobs
    )
    back = create_completion(client, model="almanac", **fields)
    assert back.model == f"almanac@{number + 1}"
    assert back.choices[0].logprobs == before.choices[0].logprobs
    assert back.system_fingerprint == before.system_fingerprint


def test_all_choices_are_of_one_version(client: OpenAI) -> None:
    """All choices of a request are of one version, and they are ordered by prompt."""
    answer = create_completion(client, model="almanac", prompt=PROMPTS, n=3, temperature=0)
    assert len(answer.choices) == 9
    groups = [
        {c.text for c in group} for _, group in itertools.groupby(answer.choices, lambda c: c.index // 3)
    ]
    assert [group.pop() for group in groups] == texts(
        create_completion(client, model=answer.model, prompt=PROMPTS, temperature=0)
    )
    assert not any(groups)  # at temperature 0 all choices of a prompt are equal


def ask(client: OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "almanac@base", "messages": [QUESTION], "max_tokens": 12, "temperature": 0, **fields}
    )


def test_chat_answers_are_those_of_transformers(client: OpenAI, reference: TransformersReference) -> None:
    """At temperature 0 each answer equals that of transformers to the conversation in its chat template, also when the
    last message is continued; the usage counts the tokens."""
    for messages in CONVERSATIONS:
        ids = reference.chat_ids(messages)
        answer = ask(client, messages=messages)
        assert answer.choices[0].message.content == reference.answer(ids, 12)
        assert answer.usage.prompt_tokens == len(ids)
    messages = [QUESTION, message("assistant", "It is in")]
    ids = reference.chat_ids(messages, add_generation_prompt=False, continue_final_message=True)
    continued = ask(client, messages=messages, extra_body={"continue_final_message": True})
    assert continued.choices[0].message.content == reference.answer(ids, 12)


def test_a_chat_stream_equals_the_whole_answer(client: OpenAI, reference: TransformersReference) -> None:
    """The chunks of two sampled choices make the response without streaming, with its log-probabilities, which are
    those of transformers."""
    wish = {"n": 2, "seed": 3, "temperature": 1.2, "logprobs": True, "top_logprobs": 7}
    whole = ask(client, **wish)
    texts_of, tokens_of = {0: "", 1: ""}, {0: list[Any](), 1: list[Any]()}
    for chunk in ask(client, stream=True, **wish):
        for choice in chunk.choices:
            texts_of[choice.index] += choice.delta.content or ""
            tokens_of[choice.index] += choice.logprobs.content if choice.logprobs else []
    ids = reference.chat_ids([QUESTION])
    for choice in whole.choices:
        tokens = choice.logprobs.content
        assert texts_of[choice.index] == choice.message.content
        assert [t.token for t in tokens_of[choice.index]] == [t.token for t in tokens]
        assert all(len(t.top_logprobs) == 7 for t in tokens)
        text = b"".join(bytes(t.bytes) for t in tokens).decode(errors="replace")
        assert text.rstrip("\ufffd") == choice.message.content
        first = reference.tokenizer.convert_tokens_to_ids(reference.tokenizer.tokenize(tokens[0].token))
        if len(first) == 1:
            (expected,) = reference.log_probs([*ids, *first])[len(ids) - 1 :]
            assert tokens[0].logprob == pytest.approx(expected, abs=1e-4)


def test_chat_and_completions_of_the_same_tokens_are_equal(
    client: OpenAI, reference: TransformersReference
) -> None:
    """A conversation and the completion of its tokens give the same text with the same seed."""
    fields: dict[str, Any] = {"seed": 5, "temperature": 0.9}
    (choice,) = ask(client, **fields).choices
    (text,) = texts(create_completion(client, prompt=reference.chat_ids([QUESTION]), **fields))
    assert choice.message.content == text
