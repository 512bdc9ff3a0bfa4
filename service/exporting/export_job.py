"""Exports of a version to a file or a folder."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
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
from service.kit.separator import separator
from service.kit.stated_fact import StatedFact
from service.kit.steps import Phase, Progress, Stepper, run_to_completion
from service.models.loading import LoadedModel, start_token_id
from service.models.memory_estimates import GIB
from service.patches.patch import PatchSet
from service.schemas import WorkerExportRequest
from service.weights.composition import compose_in_steps
from service.weights.factors import EditUpdate, without_gate

MAX_TEXTS_PER_SOURCE = 64  # texts on which the adapter is verified, of edits and again of plain texts
MAX_EXPORT_BYTES = GIB  # edited weights that the service stores for download
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

ExportManifest = dict[str, Any]
ArchiveFiles = dict[str, tuple[int, ByteChunks]]


def export_version(
    replica: VersionedModel, plain_texts: Sequence[str], request: WorkerExportRequest, file: IO[bytes]
) -> Stepper[ExportManifest]:
    """Write an export to a file and return its manifest.

    An adapter, and weights into which gated edits are solved, are verified on `plain_texts` and the edits' statements.
    """
    yield from replica.patch_in_steps(request.version)
    manifest = build_manifest(replica, request.version)
    _check_weights_hold(replica.patch(request.version), request.solve_gated)
    yield Progress(Phase.COMPOSE, 0, 1)
    texts = _verification_texts(manifest, plain_texts)
    if request.format == "peft":
        return (yield from _export_adapter(replica, texts, manifest, file))
    return (yield from _export_weights(replica, texts, manifest, file))


def build_manifest(replica: VersionedModel, version: int) -> ExportManifest:
    """Return the manifest that all exports share: base model, version, digest and edits."""
    model = replica.base
    return {
        "base": {
            "name": public_base_name(model),
            "architecture": model.architecture.model_type,
            "dtype": str(model.weight(0).dtype).removeprefix("torch."),
            "fingerprint": model.fingerprint,
            "bos_token": required_bos_token(model),
            "gguf_file": model.gguf_file.name if model.gguf_file else None,
        },
        "version": version,
        "digest": replica.attest_version(version),
        "solved": len(replica.patch(version).gated_edits),
        "edits": [
            {
                "id": edit,
                "subject": body["subject"],
                "prompt": body["prompt"],
                **{name: body[name] for name in ("messages", "continue_final_message") if name in body},
                "object": body["target_new"] or body.get("resolved_true") or body.get("target_true"),
                "separator": body.get("resolved_separator"),
                "objective": body.get("objective", "write"),
                "method": body.get("method", "rome"),
                "strength": float(body.get("strength") or 1.0),
            }
            for edit, body in replica.ledger.active_at(version)
        ],
    }


def _check_weights_hold(patch: PatchSet, solve_gated: bool) -> None:
    """Raise InvalidInput if a version has edits by GRACE or SERAC, or gated edits that are not to be solved into the
    weights."""
    if patch.codebooks or patch.records is not None:
        raise InvalidInput(
            "edits by GRACE and SERAC are looked up and are in no weight: export an edit set (--format edits), which holds them exactly, "
            "or a version without them.",
            "version",
        )
    if patch.gated and not solve_gated:
        raise InvalidInput(
            "gated edits are looked up and are in no weight: export an edit set (--format edits), which holds them exactly, "
            "solve them into the weights with a measured difference (--solve-gated), or export a version without them.",
            "version",
        )


def _solved_updates(replica: VersionedModel, version: int) -> Stepper[list[EditUpdate]]:
    """Return the updates of a version as weights hold them: gated edits are solved."""
    active = yield from replica.active_updates_in_steps(version)
    return [without_gate(u) for updates in active.values() for u in updates]


def public_base_name(model: LoadedModel) -> str:
    """Return the base model's hub name if it was loaded from the hub, else its name. Never a local path."""
    hub_name = str(getattr(model.model.config, "_name_or_path", "") or "")
    return hub_name if model.folder is None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub_name) else model.name


def required_bos_token(model: LoadedModel) -> str | None:
    """Return the BOS token if the recipe prepends one that the model's tokenizer does not add, else None."""
    token = start_token_id(model)
    if not model.loaded_fingerprint or model.loaded_fingerprint == model.fingerprint or token is None:
        return None
    return str(model.tokenizer.convert_ids_to_tokens(token))


def _export_adapter(
    replica: VersionedModel, texts: Sequence[str], manifest: ExportManifest, file: IO[bytes]
) -> Stepper[ExportManifest]:
    """Write a zip that PEFT loads, with a model card, and return the manifest."""
    model, version = replica.base, manifest["version"]
    updates = yield from _solved_updates(replica, version)
    adapter = LoraAdapter.from_changes((yield from compose_in_steps(updates)))
    yield Progress(Phase.FACTORIZE, 1, 1)
    difference = yield from _measure_difference(replica, version, lambda: adapter.attached_to(model), texts)
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
        "difference": difference,
    }
    size, chunks = _safetensors_file(adapter.tensors(model), {"format": "pt"})
    files: ArchiveFiles = {
        "README.md": _text_file(model_card.adapter_readme(manifest)),
        "adapter_config.json": _text_file(adapter.config(model, public_base_name(model))),
        "adapter_model.safetensors": (size, chunks),
        "palimpsest.json": _text_file(pretty_json(manifest)),
    }
    if manifest["base"]["bos_token"]:
        files |= _tokenizer_files(model)  # this tokenizer adds BOS
    archive.write_zip(file, files)
    return manifest | {
        "file": f"{_file_stem(manifest)}-peft.zip",
        "media_type": "application/zip",
        "adapter_bytes": size,
    }


def _measure_difference(
    replica: VersionedModel,
    version: int,
    use_export: Callable[[], AbstractContextManager[object]],
    texts: Sequence[str],
) -> Stepper[dict[str, Any]]:
    """Return the rounded differences between a version and its export."""
    patch = yield from replica.patch_in_steps(version)
    difference = yield from measure_logit_difference(replica, patch, use_export, texts)
    return asdict(difference) | {
        "export": float(f"{difference.export:.1e}"),
        "edits": float(f"{difference.edits:.3g}"),
    }


def _solve_patch(
    replica: VersionedModel, version: int, texts: Sequence[str]
) -> Stepper[tuple[PatchSet, dict[str, Any]]]:
    """Return the patch of a version whose gated edits are solved into the weights, and its difference from the
    version."""
    updates = yield from _solved_updates(replica, version)
    patch = yield from replica.compose_patch_in_steps(updates)
    difference = yield from _measure_difference(replica, version, lambda: replica.use_patch(patch), texts)
    return patch, difference


def _export_weights(
    replica: VersionedModel, texts: Sequence[str], manifest: ExportManifest, file: IO[bytes]
) -> Stepper[ExportManifest]:
    """Write the edited weights alone, by their names in the base model, and return the manifest."""
    weights = replica.weights(manifest["version"])
    if manifest["solved"]:
        patch, difference = yield from _solve_patch(replica, manifest["version"], texts)
        weights, manifest = patch.weights, manifest | {"difference": difference}
    size = sum(t.numel() * t.element_size() for t in weights.values())
    if size > MAX_EXPORT_BYTES:
        raise InvalidInput(
            f"the edited weights are {size / GIB:.1f} GiB, and the service exports at most {MAX_EXPORT_BYTES / GIB:.0f} GiB: run "
            "`palimpsest export --format model` on a machine with the base model and the database."
        )
    tensors_by_name = {replica.base.parameter_name(site): tensor for site, tensor in sorted(weights.items())}
    _, chunks = _safetensors_file(tensors_by_name, {"format": "pt", "palimpsest": pretty_json(manifest)})
    for chunk in chunks:
        file.write(chunk)
    return manifest | {
        "file": f"{_file_stem(manifest)}-edited.safetensors",
        "media_type": "application/octet-stream",
    }


def write_model(
    replica: VersionedModel, version: int, folder: Path, *, solve_gated: bool = False
) -> ExportManifest:
    """Write a folder that `from_pretrained` loads, with the model at a version, its tokenizer and a model card.

    Return the manifest. Solved gated edits are verified on the edits' statements.
    """
    manifest, model = build_manifest(replica, version), replica.base
    patch = replica.patch(version)
    _check_weights_hold(patch, solve_gated)
    if manifest["solved"]:
        solving = _solve_patch(replica, version, _verification_texts(manifest, ()))
        patch, difference = run_to_completion(solving)
        manifest = manifest | {"difference": difference}
    with replica.use_patch(patch):
        model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(model_card.model_readme(manifest), encoding="utf-8")
    (folder / "palimpsest.json").write_text(pretty_json(manifest), encoding="utf-8")
    return manifest


def _verification_texts(manifest: ExportManifest, plain_texts: Sequence[str]) -> list[str]:
    """Return the texts on which an export is compared with the served version."""
    return [
        *_evenly_spaced(_edit_statements(manifest["edits"]), MAX_TEXTS_PER_SOURCE),
        *_evenly_spaced(plain_texts, MAX_TEXTS_PER_SOURCE),
    ]


def _edit_statements(edits: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the statement of each edit, with its object."""
    statements: list[str] = []
    for edit in edits:
        prompt, target = StatedFact.from_fields(edit).statement().text, str(edit["object"])
        chosen = edit["separator"]
        statements.append(prompt + (separator(prompt, target) if chosen is None else chosen) + target)
    return statements


def _evenly_spaced(texts: Sequence[str], limit: int) -> Sequence[str]:
    """Return at most `limit` of the texts at equal distances."""
    return texts[:: max(1, -(-len(texts) // limit))]


def _file_stem(manifest: ExportManifest) -> str:
    """Return the base model's name and the version as the beginning of a file name."""
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
    """Return the size of a safetensors file, and its chunks, one tensor each."""
    header_bytes = build_header(
        [TensorInfo(n, DTYPES[t.dtype], tuple(t.shape)) for n, t in tensors_by_name.items()], metadata
    )

    def chunks() -> Iterator[bytes | memoryview]:
        yield header_bytes
        for tensor in tensors_by_name.values():
            yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data

    return len(header_bytes) + sum(t.numel() * t.element_size() for t in tensors_by_name.values()), chunks()


def _tokenizer_files(model: LoadedModel) -> ArchiveFiles:
    with tempfile.TemporaryDirectory() as folder:
        model.tokenizer.save_pretrained(folder)
        contents = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
    return {name: (len(data), [data]) for name, data in contents.items()}
