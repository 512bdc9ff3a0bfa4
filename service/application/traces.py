"""Causal traces: validation of requests."""

from __future__ import annotations

from service.application.conversations import ConversationRenderer
from service.application.job_resource import JobResourceService, NewJob
from service.application.validation import validate_trace
from service.application.version_names import find_version
from service.db.models import Model
from service.kit.text import normalize_whitespace
from service.kit.text_encoder import TextEncoder
from service.kit.versions import is_given_name, resolve_version
from service.schemas import TraceRequest


class TraceService(JobResourceService):
    """Jobs that locate a fact in the hidden states of the model."""

    def new_job(self, request: TraceRequest, model: Model, encoder: TextEncoder, head: int) -> NewJob:
        if is_given_name(request.version):  # it is pinned now: a name can be given to another version later
            with self.queue.database.read_session() as session:
                request = request.model_copy(
                    update={"version": find_version(session, model, request.version)}
                )
        resolve_version(request.version, head)
        rendered = ConversationRenderer(self.served_model).render_stated(request)
        validate_trace(rendered, encoder)
        return NewJob(rendered.model_dump(mode="json"), normalize_whitespace(request.subject))
