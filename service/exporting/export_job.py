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

from service.engine.versioned_model import Replica
from service.errors import InvalidInput
from service.exporting import archive, model_card
from service.exporting.archive import Pieces
from service.exporting.fidelity import difference_steps
from service.exporting.lora import Adapter, module_name, pretty
from service.kit.safetensors_io import Described, header
from service.kit.steps import Progress, Steps
from service.kit.text import fill, separator
from service.models.loading import LoadedModel, start_token
from service.models.memory_estimates import GIB
from service.schemas import ExportRequest
from service.weights.composition import compose

STATEMENTS = 64  # of edits that the difference is measured on; the same again of plain texts at most
MOST = GIB  # bytes of edited weights that go through the store of the service
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

Told = dict[str, Any]
Files = dict[str, tuple[int, Pieces]]


def export_steps(
    replica: Replica, plain: Sequence[str], request: ExportRequest, file: IO[bytes]
) -> Steps[Told]:
    """Write an export to a file; what is said of it. `plain`: texts that no edit is about."""
    told = about(replica, request.version)
    yield Progress("compose", 0, 1)
    if request.format == "peft":
        return (yield from _adapter_steps(replica, plain, told, file))
    return _weights(replica, told, file)


def about(replica: Replica, version: int) -> Told:
    """What every export says of itself."""
    model = replica.base
    return {
        "base": {
            "name": base_name(model),
            "architecture": model.architecture.model_type,
            "dtype": str(model.weight(0).dtype).removeprefix("torch."),
            "fingerprint": model.fingerprint,
            "start": start_of(model),
        },
        "version": version,
        "digest": replica.vouch(version),
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


def base_name(model: LoadedModel) -> str:
    """What others call the base model: its name on the hub where it came from there. Never a path of this machine."""
    known = str(getattr(model.model.config, "_name_or_path", "") or "")
    return known if model.folder is None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", known) else model.name


def start_of(model: LoadedModel) -> str | None:
    """The token that every text is read after, where the recipe asks for one that the model's own tokenizer does not write."""
    token = start_token(model)
    if not model.origin or model.origin == model.fingerprint or token is None:
        return None
    return str(model.tokenizer.convert_ids_to_tokens(token))


def _adapter_steps(replica: Replica, plain: Sequence[str], told: Told, file: IO[bytes]) -> Steps[Told]:
    """A zip with what peft loads, and a page that says what it is worth."""
    model, version = replica.base, told["version"]
    adapter = Adapter.of(compose(p for group in replica.active(version).values() for p in group))
    yield Progress("factorise", 1, 1)
    texts = [*_spread(_statements(told["edits"]), STATEMENTS), *_spread(plain, STATEMENTS)]
    found = yield from difference_steps(replica, replica.weights(version), adapter, texts)
    told = told | {
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
        "difference": asdict(found)
        | {"adapter": float(f"{found.adapter:.1e}"), "edits": float(f"{found.edits:.3g}")},
    }
    size, pieces = _tensors(adapter.tensors(model), {"format": "pt"})
    files: Files = {
        "README.md": _text(model_card.adapter_page(told)),
        "adapter_config.json": _text(adapter.config(model, base_name(model))),
        "adapter_model.safetensors": (size, pieces),
        "palimpsest.json": _text(pretty(told)),
    }
    if told["base"]["start"]:
        files |= _tokenizer(model)  # it writes the start token
    archive.write(file, files)
    return told | {"file": f"{_stem(told)}-peft.zip", "media_type": "application/zip", "adapter_bytes": size}


def _weights(replica: Replica, told: Told, file: IO[bytes]) -> Told:
    """The edited weights alone, under the names that the base model has for them."""
    weights = replica.weights(told["version"])
    size = sum(t.numel() * t.element_size() for t in weights.values())
    if size > MOST:
        raise InvalidInput(
            f"the edited weights are {size / GIB:.1f} GiB, and the service hands out {MOST / GIB:.0f}: run "
            "`palimpsest export --format model` where the base model and the database are at hand."
        )
    named = {replica.base.parameter_name(site): tensor for site, tensor in sorted(weights.items())}
    _, pieces = _tensors(named, {"format": "pt", "palimpsest": pretty(told)})
    for piece in pieces:
        file.write(piece)
    return told | {"file": f"{_stem(told)}-edited.safetensors", "media_type": "application/octet-stream"}


def write_model(replica: Replica, version: int, folder: Path) -> Told:
    """A folder that `from_pretrained` loads: the whole model at a version, with its tokenizer and a page. Weights that no edit
    touches are written as they are, from where they are."""
    told, model = about(replica, version), replica.base
    with replica.stand(replica.weights(version)):
        model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(model_card.model_page(told), encoding="utf-8")
    (folder / "palimpsest.json").write_text(pretty(told), encoding="utf-8")
    return told


def _statements(edits: Sequence[Mapping[str, Any]]) -> list[str]:
    """The edits' statements with their objects."""
    asked = [(fill(e["prompt"], e["subject"]).text, str(e["object"])) for e in edits]
    return [prompt + separator(prompt, target) + target for prompt, target in asked]


def _spread(texts: Sequence[str], most: int) -> Sequence[str]:
    """Some of the texts, spread evenly."""
    return texts[:: max(1, -(-len(texts) // most))]


def _stem(told: Told) -> str:
    """What a file is called before its kind: the base model and the version."""
    name = (
        re.sub(r"[^\w.-]+", "-", told["base"]["name"].rsplit("/", 1)[-1], flags=re.ASCII).strip("-.")
        or "model"
    )
    return f"{name}-v{told['version']}"


def _text(text: str) -> tuple[int, Pieces]:
    data = text.encode()
    return len(data), [data]


def _tensors(named: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[int, Pieces]:
    """A file of safetensors: its size, and its pieces, one tensor at a time in memory."""
    beginning = header([Described(n, DTYPES[t.dtype], tuple(t.shape)) for n, t in named.items()], metadata)

    def pieces() -> Iterator[bytes | memoryview]:
        yield beginning
        for tensor in named.values():
            yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data

    return len(beginning) + sum(t.numel() * t.element_size() for t in named.values()), pieces()


def _tokenizer(model: LoadedModel) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        model.tokenizer.save_pretrained(folder)
        found = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
    return {name: (len(data), [data]) for name, data in found.items()}
