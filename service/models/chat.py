"""The chat template of a model."""

from __future__ import annotations

import logging
from typing import Any

from transformers import PreTrainedTokenizerBase

from service.kit.chat_format import MAX_TEMPLATE

log = logging.getLogger(__name__)


def describe_chat_template(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """Return the chat template and the special tokens that it uses as JSON; None without a template."""
    template = tokenizer.chat_template
    if isinstance(template, dict):  # templates by their names
        template = template.get("default")
    if not isinstance(template, str):
        return None
    if len(template) > MAX_TEMPLATE:
        log.warning("chat template ignored: it has %d characters, more than %d", len(template), MAX_TEMPLATE)
        return None
    tokens = {
        name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
    }
    return {"template": template, "special_tokens": tokens}
