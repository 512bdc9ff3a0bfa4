"""Submission and validation of generations and comparisons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from service.application import Services
from service.db.database import Database
from service.errors import InvalidInput, QueueFull
from service.jobs.broker import Broker
from service.schemas import CompareRequest, GenerateRequest
from service.settings import Settings
from tests.support.served_model import INFO, tokenizer_json
from tests.support.workers import WorkerParts


class TestGeneration:
    def test_generate(self, services: Services, broker: Broker) -> None:
        """The broker delivers a generation with the fields of the request."""
        request = GenerateRequest(prompt="The Eiffel Tower", seed=7, stop=["."])
        channel = services.generation.generate(request)
        (delivery,) = broker.receive(["generate"], 1, 0)
        assert delivery.job_id == channel
        assert GenerateRequest.model_validate(delivery.payload) == request

    def test_compare(self, services: Services, broker: Broker, applied_edit: Callable[..., Any]) -> None:
        """The broker delivers a comparison with the fields of the request."""
        applied_edit()
        request = CompareRequest(prompt="The Eiffel Tower", versions=(0, 1))
        services.generation.compare(request)
        (delivery,) = broker.receive(["compare"], 1, 0)
        assert CompareRequest.model_validate(delivery.payload) == request

    @pytest.mark.parametrize(
        ("field", "changes"),
        [
            ("version", {"version": 1}),
            ("version", {"version": -1}),
            ("min_version", {"min_version": 1}),
            ("prompt", {"prompts": ["both"]}),
            ("prompt", {"prompt": "word " * 100}),
        ],
    )
    def test_refused(self, services: Services, broker: Broker, field: str, changes: Any) -> None:
        """An invalid generation is rejected with the name of the field, and nothing is queued."""
        with pytest.raises(InvalidInput) as error:
            services.generation.generate(GenerateRequest(**{"prompt": "The", **changes}))
        assert error.value.field == field
        assert broker.queue_depth("generate") == 0

    def test_pinned_version_older_than_min_version(
        self, services: Services, applied_edit: Callable[..., Any]
    ) -> None:
        """A pinned version that is older than `min_version` is rejected."""
        applied_edit()
        assert services.generation.generate(GenerateRequest(prompt="The", min_version=1))
        assert services.generation.generate(GenerateRequest(prompt="The", version=1, min_version=1))
        with pytest.raises(InvalidInput, match="older"):
            services.generation.generate(GenerateRequest(prompt="The", version="base", min_version=1))

    def test_unknown_version_in_comparison(self, services: Services) -> None:
        """Both versions of a comparison must exist."""
        with pytest.raises(InvalidInput, match="version 3 does not exist"):
            services.generation.compare(CompareRequest(prompt="The", versions=("base", 3)))

    def test_resubmit_keeps_the_channel(self, services: Services, broker: Broker) -> None:
        """A call that is resubmitted has the same channel and payload."""
        request = GenerateRequest(prompt="The", seed=3)
        channel = services.generation.generate(request)
        (first,) = broker.receive(["generate"], 1, 0)
        broker.ack(first)
        services.generation.resubmit("generate", channel, request)
        (second,) = broker.receive(["generate"], 1, 0)
        assert (second.job_id, second.payload) == (channel, first.payload)

    def test_max_new_tokens_setting(
        self, database: Database, broker: Broker, worker: WorkerParts, tmp_path: Path
    ) -> None:
        """Generations and comparisons with more tokens than the setting allows are rejected."""
        services = Services(database, broker, Settings(data_dir=tmp_path, max_new_tokens=7))
        services.generation.generate(GenerateRequest(prompt="The", max_new_tokens=7))
        operations: list[Callable[[], object]] = [
            lambda: services.generation.generate(GenerateRequest(prompt="The", max_new_tokens=8)),
            lambda: services.generation.compare(CompareRequest(prompt="The", max_new_tokens=8)),
        ]
        for operation in operations:
            with pytest.raises(InvalidInput, match="at most 7") as error:
                operation()
            assert error.value.field == "max_new_tokens"

    def test_the_tokenizer_is_read_once(
        self, services: Services, database: Database, worker: WorkerParts
    ) -> None:
        """The tokenizer is read from the database once after each registration of a worker, not for each
        request."""
        reads_tokenizer = []

        def note(*args: Any) -> None:
            reads_tokenizer.append("tokenizer" in args[2])

        event.listen(database.engine, "before_cursor_execute", note)
        for _ in range(3):
            services.generation.generate(GenerateRequest(prompt="The"))
        assert sum(reads_tokenizer) == 1
        worker.session.register(INFO, tokenizer_json())
        reads_tokenizer.clear()
        for _ in range(2):
            services.generation.generate(GenerateRequest(prompt="The"))
        assert sum(reads_tokenizer) == 1
        event.remove(database.engine, "before_cursor_execute", note)

    def test_queue_full(self, services: Services) -> None:
        """A generation that exceeds the queue limit is rejected with `retry_after`."""
        for _ in range(5):
            services.generation.generate(GenerateRequest(prompt="The"))
        with pytest.raises(QueueFull) as error:
            services.generation.generate(GenerateRequest(prompt="The"))
        assert error.value.retry_after > 0
