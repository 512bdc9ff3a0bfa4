"""Exports, from a replica at a version to the bytes of a file or the files of a folder."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from service.engine.versioned_model import VersionedModel
from service.errors import InvalidInput
from service.exporting import archive, model_card
from service.exporting.archive import ByteChunks
from service.exporting.fidelity import measure_logit_difference
from service.exporting.lora import LoraAdapter, module_name, pretty_json
from service.kit.safetensors_io import TensorInfo, build_header
from service.kit.steps import Phase, Progress, Stepper
from service.kit.text import fill_prompt, separator
from service.models.loading import LoadedModel, bos_token_id
from service.models.memory_estimates import GIB
from service.schemas import WorkerExportRequest
from service.weights.composition import compose_in_steps

MAX_TEXTS_PER_SOURCE = (
    64  # of edits that the difference is measured on; the same again of plain texts at most
)
MAX_EXPORT_BYTES = GIB  # bytes of edited weights that go through the store of the service
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

ExportManifest = dict[str, Any]
ArchiveFiles = dict[str, tuple[int, ByteChunks]]


def export_version(
    replica: VersionedModel, plain_texts: Sequence[str], request: WorkerExportRequest, file: IO[bytes]
) -> Stepper[ExportManifest]:
    """Write an export to a file; what is said of it. `plain`: texts that no edit is about."""
    yield from replica.weights_in_steps(request.version)
    manifest = build_manifest(replica, request.version)
    yield Progress(Phase.COMPOSE, 0, 1)
    if request.format == "peft":
        return (yield from _export_adapter(replica, plain_texts, manifest, file))
    return _export_weights(replica, manifest, file)


def build_manifest(replica: VersionedModel, version: int) -> ExportManifest:
    """What every export says of itself."""
    model = replica.base
    return {
        "base": {
            "name": public_base_name(model),
            "architecture": model.architecture.model_type,
            "dtype": str(model.weight(0).dtype).removeprefix("torch."),
            "fingerprint": model.fingerprint,
            "start": required_bos_token(model),
        },
        "version": version,
        "digest": replica.attest_version(version),
        "edits": [
            {
                "id": edit,
                "subject": body["subject"],
                "prompt": body["prompt"],
                "object": body["target_new"] or body.get("resolved_true") or body.get("target_true"),
                "objective": body.get("objective", "write"),
                "method": body.get("method", "rome"),
                "strength": float(body.get("strength") or 1.0),
            }
            for edit, body in replica.ledger.active_at(version)
        ],
    }


def public_base_name(model: LoadedModel) -> str:
    """What others call the base model: its name on the hub where it came from there. Never a path of this machine."""
    hub_name = str(getattr(model.model.config, "_name_or_path", "") or "")
    return hub_name if model.folder is None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub_name) else model.name


def required_bos_token(model: LoadedModel) -> str | None:
    """The token that every text is read after, where the recipe asks for one that the model's own tokenizer does not write."""
    token = bos_token_id(model)
    if not model.loaded_fingerprint or model.loaded_fingerprint == model.fingerprint or token is None:
        return None
    return str(model.tokenizer.convert_ids_to_tokens(token))


def _export_adapter(
    replica: VersionedModel, plain_texts: Sequence[str], manifest: ExportManifest, file: IO[bytes]
) -> Stepper[ExportManifest]:
    """A zip with what peft loads, and a page that says what it is worth."""
    model, version = replica.base, manifest["version"]
    active = yield from replica.active_updates_in_steps(version)
    adapter = LoraAdapter.from_changes(
        (yield from compose_in_steps(p for group in active.values() for p in group))
    )
    yield Progress(Phase.FACTORIZE, 1, 1)
    texts = [
        *_evenly_spaced(_edit_statements(manifest["edits"]), MAX_TEXTS_PER_SOURCE),
        *_evenly_spaced(plain_texts, MAX_TEXTS_PER_SOURCE),
    ]
    weights = yield from replica.weights_in_steps(version)
    difference = yield from measure_logit_difference(replica, weights, adapter, texts)
    manifest = manifest | {
        "rank": adapter.rank,
        "layers": [
            {
                "layer": site.layer,
                "module": module_name(model, site),
                "terms": f.terms,
                "rank": adapter.ranks[site],
                "residual": float(f"{f.residual:.1e}"),
            }
            for site, f in adapter.factors.items()
        ],
        "difference": asdict(difference)
        | {"adapter": float(f"{difference.adapter:.1e}"), "edits": float(f"{difference.edits:.3g}")},
    }
    size, chunks = _safetensors_file(adapter.tensors(model), {"format": "pt"})
    files: ArchiveFiles = {
        "README.md": _text_file(model_card.adapter_readme(manifest)),
        "adapter_config.json": _text_file(adapter.config(model, public_base_name(model))),
        "adapter_model.safetensors": (size, chunks),
        "palimpsest.json": _text_file(pretty_json(manifest)),
    }
    if manifest["base"]["start"]:
        files |= _tokenizer_files(model)  # it writes the start token
    archive.write_zip(file, files)
    return manifest | {
        "file": f"{_file_stem(manifest)}-peft.zip",
        "media_type": "application/zip",
        "adapter_bytes": size,
    }


def _export_weights(replica: VersionedModel, manifest: ExportManifest, file: IO[bytes]) -> ExportManifest:
    """The edited weights alone, under the names that the base model has for them."""
    weights = replica.weights(manifest["version"])
    size = sum(t.numel() * t.element_size() for t in weights.values())
    if size > MAX_EXPORT_BYTES:
        raise InvalidInput(
            f"the edited weights are {size / GIB:.1f} GiB, and the service hands out {MAX_EXPORT_BYTES / GIB:.0f}: run "
            "`palimpsest export --format model` where the base model and the database are at hand."
        )
    tensors_by_name = {replica.base.parameter_name(site): tensor for site, tensor in sorted(weights.items())}
    _, chunks = _safetensors_file(tensors_by_name, {"format": "pt", "palimpsest": pretty_json(manifest)})
    for chunk in chunks:
        file.write(chunk)
    return manifest | {
        "file": f"{_file_stem(manifest)}-edited.safetensors",
        "media_type": "application/octet-stream",
    }


def write_model(replica: VersionedModel, version: int, folder: Path) -> ExportManifest:
    """A folder that `from_pretrained` loads: the whole model at a version, with its tokenizer and a page. Weights that no edit
    touches are written as they are, from where they are."""
    manifest, model = build_manifest(replica, version), replica.base
    with replica.use_weights(replica.weights(version)):
        model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(model_card.model_readme(manifest), encoding="utf-8")
    (folder / "palimpsest.json").write_text(pretty_json(manifest), encoding="utf-8")
    return manifest


def _edit_statements(edits: Sequence[Mapping[str, Any]]) -> list[str]:
    """The edits' statements with their objects."""
    prompts_and_targets = [(fill_prompt(e["prompt"], e["subject"]).text, str(e["object"])) for e in edits]
    return [prompt + separator(prompt, target) + target for prompt, target in prompts_and_targets]


def _evenly_spaced(texts: Sequence[str], limit: int) -> Sequence[str]:
    """Some of the texts, spread evenly."""
    return texts[:: max(1, -(-len(texts) // limit))]


def _file_stem(manifest: ExportManifest) -> str:
    """What a file is called before its kind: the base model and the version."""
    name = (
        re.sub(r"[^\w.-]+", "-", manifest["base"]["name"].rsplit("/", 1)[-1], flags=re.ASCII).strip("-.")
        or "model"
    )
    return f"{name}-v{manifest['version']}"


def _text_file(text: str) -> tuple[int, ByteChunks]:
    data = text.encode()
    return len(data), [data]


def _safetensors_file(
    tensors_by_name: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[int, ByteChunks]:
    """A file of safetensors: its size, and its pieces, one tensor at a time in memory."""
    header_bytes = build_header(
        [TensorInfo(n, DTYPES[t.dtype], tuple(t.shape)) for n, t in tensors_by_name.items()], metadata
    )

    def pieces() -> Iterator[bytes | memoryview]:
        yield header_bytes
        for tensor in tensors_by_name.values():
            yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data

    return len(header_bytes) + sum(t.numel() * t.element_size() for t in tensors_by_name.values()), pieces()


def _tokenizer_files(model: LoadedModel) -> ArchiveFiles:
    with tempfile.TemporaryDirectory() as folder:
        model.tokenizer.save_pretrained(folder)
        contents = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
    return {name: (len(data), [data]) for name, data in contents.items()}
