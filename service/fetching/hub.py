"""Downloads a model from the hub, where it can be reached."""

from __future__ import annotations

import shutil
from pathlib import Path

from service.errors import Unavailable

FILES = (
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "model*.safetensors",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
PROBE_TIMEOUT = 5.0  # seconds; without a route to the hub each request would wait much longer


def reach_hub(name: str) -> str:
    """Return the newest revision of a model on the hub. Raise Unavailable when the hub cannot be reached or does not
    have it."""
    try:
        from huggingface_hub import HfApi
    except ModuleNotFoundError:
        raise Unavailable("the hub needs huggingface_hub, which transformers installs.") from None
    try:
        return str(HfApi().model_info(name, timeout=PROBE_TIMEOUT).sha)
    except Exception as error:  # the network, the proxy, the certificate, the name: many classes
        raise Unavailable(f"the hub cannot be reached ({_first_line(error)}).") from error


def download_from_hub(name: str, revision: str, folder: Path) -> None:
    """Download the files of one revision into a folder; an interrupted download continues there. The library shows its
    own progress."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(name, revision=revision, local_dir=folder, allow_patterns=list(FILES))
    except Exception as error:  # as above
        raise Unavailable(f"{name} cannot be downloaded from the hub ({_first_line(error)}).") from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}".removesuffix(": ")
