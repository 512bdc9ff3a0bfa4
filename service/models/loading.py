"""Load a model from a hub or a folder, with its tokenizer and its row of the architecture table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, processors
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from service.errors import InvalidInput, Misconfigured
from service.kit.chat_format import ChatFormat
from service.kit.model_files import companion_file, is_gguf, local_model
from service.kit.template_renderer import TemplateRenderer
from service.kit.text_encoder import TextEncoder
from service.models.adapter import merge_adapter
from service.models.architectures import Architecture, architecture_of
from service.models.chat import describe_chat_template
from service.models.checkpoint import (
    check_config_values,
    check_functions,
    check_kind,
    check_stored_types,
    check_tensors,
    refuse_adapter,
)
from service.models.fused_activations import use_fused_activations
from service.models.placement import spread
from service.models.position_limit import position_limit
from service.models.prompt_routing import PromptRouting
from service.models.token_text import TokenTextCache

#: between the texts of GPT-2's training, and of many models' since
DOCUMENT_SEPARATOR = "<|endoftext|>"


class WeightRef(NamedTuple):
    """A weight that edits may change: a layer and one of its weights, named alike for every architecture."""

    layer: int
    part: str = (
        "mlp"  #: "mlp", the down-projection; or an attention projection: "q", "k", "v", or the fused "qkv"
    )


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode without gradients. Only `service.engine.versioned_model` replaces its weights."""

    name: str
    model: Any  # a transformers causal language model; its forward is untyped
    tokenizer: Any
    architecture: Architecture
    fingerprint: str  #: SHA-256 of the configuration, the tokenizer and the bytes of every weight
    folder: Path | None = field(default=None, compare=False)  #: the local folder it was loaded from
    gguf_file: Path | None = field(
        default=None, compare=False
    )  #: the GGUF file in that folder it was loaded from
    loaded_fingerprint: str = ""  #: the fingerprint before `with_bos`
    routing: PromptRouting = field(default_factory=PromptRouting, compare=False, repr=False)

    @property
    def path(self) -> Path | None:
        """The local folder or the GGUF file that it was loaded from."""
        return self.gguf_file or self.folder

    def companion_file(self, name: str) -> Path | None:
        """Return the path of a file that belongs to the model; None for a model that is not on this machine."""
        return companion_file(self.path, name) if self.path else None

    @property
    def device(self) -> torch.device:
        """The main device: that of everything but the blocks, and of all tensors between two modules."""
        return self.embedding.weight.device  # type: ignore[return-value]

    @property
    def block_devices(self) -> list[torch.device]:
        """The device of each block, in order; the main device unless the model is spread over several."""
        return [self.weight(layer).device for layer in range(self.num_layers)]

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def max_positions(self) -> int:
        """The longest text that the model reads, in tokens."""
        return position_limit(self.model.config)

    @property
    def hidden_size(self) -> int:
        """d: the hidden size."""
        return int(self.weight(0).shape[1 if self.architecture.conv1d else 0])

    @property
    def embedding_size(self) -> int:
        """The size of a token's embedding: d, except in a model that projects embeddings to d (OPT-350m)."""
        return int(self.embedding.weight.shape[1])  # type: ignore[index]

    @property
    def intermediate_size(self) -> int:
        """D: the size of a key, the input of the MLP's down-projection."""
        weight = self.weight(0)
        return int(weight.shape[0] if self.architecture.conv1d else weight.shape[1])

    @property
    def embedding(self) -> nn.Module:
        return self.model.get_submodule(self.architecture.embedding)  # type: ignore[no-any-return]

    @property
    def residual_factor(self) -> float:
        """The constant by which a block multiplies what it adds to the residual stream (Granite)."""
        return float(getattr(self.model.config, "residual_multiplier", 1.0))

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.get_submodule(self.architecture.blocks)  # type: ignore[no-any-return]

    @property
    def lm_head(self) -> nn.Module:
        return self.model.get_submodule(self.architecture.lm_head)  # type: ignore[no-any-return]

    def block(self, layer: int) -> nn.Module:
        if not 0 <= layer < self.num_layers:
            raise InvalidInput(
                f"layer {layer} does not exist: the model has layers 0 to {self.num_layers - 1}.",
                "layer",
            )
        return self.blocks[layer]

    def attention(self, layer: int) -> nn.Module:
        return self.block(layer).get_submodule(self.architecture.attention)

    def down_proj(self, layer: int) -> nn.Module:
        """Return the MLP's down-projection: its input is the key, its output the value."""
        return self.block(layer).get_submodule(self.architecture.down_proj)

    def attention_output(self, layer: int) -> nn.Module:
        """Return the module whose output is what the attention adds to the residual stream."""
        a = self.architecture
        return self.block(layer).get_submodule(a.attention_output or a.attention)

    def mlp_output(self, layer: int) -> nn.Module:
        """Return the module whose output is what the MLP adds to the residual stream: the down-projection, or a norm
        after it."""
        a = self.architecture
        return self.block(layer).get_submodule(a.mlp_output or a.down_proj)

    def weight(self, layer: int) -> nn.Parameter:
        """Return the parameter that ROME edits, as stored: (D, d) for Conv1D, (d, D) for Linear."""
        return self.down_proj(layer).weight  # type: ignore[return-value]

    @property
    def editable_weights(self) -> list[WeightRef]:
        """Every weight that edits may change, sorted."""
        return sorted(
            site for x in range(self.num_layers) for site in (WeightRef(x), *self.attention_weights(x))
        )

    def attention_weights(self, layer: int) -> list[WeightRef]:
        """Return the weights of a layer's query, key and value projections."""
        return [WeightRef(layer, part) for part in self._weight_paths if part != "mlp"]

    def parameter(self, ref: WeightRef) -> nn.Parameter:
        """Return the referenced weight, as stored: (in, out) for Conv1D, (out, in) for Linear."""
        return self.block(ref.layer).get_submodule(self._weight_paths[ref.part]).weight  # type: ignore[return-value]

    def parameter_name(self, ref: WeightRef) -> str:
        return f"{self.architecture.blocks}.{ref.layer}.{self._weight_paths[ref.part]}.weight"

    @property
    def _weight_paths(self) -> dict[str, str]:
        a = self.architecture
        parts = ("qkv",) if len(a.attention_projections) == 1 else ("q", "k", "v")
        return {"mlp": a.down_proj, **dict(zip(parts, a.attention_projections, strict=True))}

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the token ids of a whole text and their character offsets."""
        return self.text_encoder.encode(text)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The encoder of texts, with the limits of this model."""
        return TextEncoder(self.tokenizer.backend_tokenizer, self.max_positions, self.vocabulary_size)

    @cached_property
    def chat_format(self) -> ChatFormat | None:
        """The form of conversations with this model; None without a chat template."""
        chat = describe_chat_template(self.tokenizer)
        if chat is None:
            return None
        return ChatFormat(chat["template"], chat["special_tokens"], self.text_encoder, TemplateRenderer())

    @property
    def vocabulary_size(self) -> int:
        """The number of tokens that the model can read: the rows of its embedding."""
        return int(self.embedding.weight.shape[0])  # type: ignore[index]

    @cached_property
    def token_text(self) -> TokenTextCache:
        """The text of each token."""
        return TokenTextCache(self.tokenizer)

    def decode(self, ids: list[int] | Tensor) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)  # type: ignore[no-any-return]


def start_token_id(model: LoadedModel) -> int | None:
    """Return the token that stood before every text in training: <|endoftext|> where it is a special token, else the
    BOS token, else the EOS token; None where the tokenizer has none of them.

    The BOS token of a chat model can be the beginning of a message, which no plain text follows in training.
    """
    tokenizer = model.tokenizer
    if DOCUMENT_SEPARATOR in tokenizer.all_special_tokens:
        return int(tokenizer.convert_tokens_to_ids(DOCUMENT_SEPARATOR))
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return int(token)
    return None


def with_bos(model: LoadedModel) -> LoadedModel:
    """Return the model with a tokenizer that prepends the start token to every text. The fingerprint changes with
    it."""
    token = start_token_id(model)
    if token is None or model.encode("a")[0][:1] == [token]:
        return model
    raw = _without_added_tokens(model.tokenizer.backend_tokenizer)
    added_ids = [token, *model.encode("")[0]]
    names = [raw.id_to_token(i) for i in added_ids]
    add_bos = processors.TemplateProcessing(
        single=[*names, "$A"], special_tokens=list(dict(zip(names, added_ids, strict=True)).items())
    )
    raw.post_processor = processors.Sequence([p for p in (raw.post_processor, add_bos) if p is not None])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=model.tokenizer.bos_token,
        eos_token=model.tokenizer.eos_token,
        chat_template=model.tokenizer.chat_template,
    )
    fingerprint = hashlib.sha256(f"{model.fingerprint} after token {token}".encode()).hexdigest()
    return replace(model, tokenizer=tokenizer, fingerprint=fingerprint, loaded_fingerprint=model.fingerprint)


def _without_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy of a tokenizer that adds no special tokens to a text. It keeps the processing of offsets."""
    description = json.loads(tokenizer.to_str())
    processor = description["post_processor"]
    parts = processor["processors"] if processor and processor["type"] == "Sequence" else [processor]
    kept = [part for part in parts if part and part["type"] == "ByteLevel"]
    description["post_processor"] = {"type": "Sequence", "processors": kept} if kept else None
    return Tokenizer.from_str(json.dumps(description))


def _fingerprint(model: nn.Module, config: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of everything that determines the model's outputs. Volatile keys (paths, library version) are
    excluded."""
    digest = hashlib.sha256()
    ignored_keys = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
    config_values = {k: v for k, v in config.to_dict().items() if k not in ignored_keys}
    digest.update(json.dumps(config_values, sort_keys=True, default=str).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def wrap_model(
    model: Any, tokenizer: Any, name: str = "model", folder: Path | None = None, gguf_file: Path | None = None
) -> LoadedModel:
    """Return a `LoadedModel` of loaded parts: frozen, in evaluation mode, with fused activations."""
    architecture = architecture_of(model.config)
    model.eval()
    model.requires_grad_(False)
    use_fused_activations(model)
    fingerprint = _fingerprint(model, model.config, tokenizer)
    return LoadedModel(
        name,
        model,
        tokenizer,
        architecture,
        fingerprint,
        folder,
        gguf_file,
        fingerprint,
    )


def _read(source: str | Path, dtype: torch.dtype, adapter: Path | None) -> tuple[Any, Any]:
    """Return the model and the tokenizer of a checkpoint that passes every check of `service.models.checkpoint`, with
    an adapter merged into its weights."""
    form = (
        "a GGUF file with a tokenizer"
        if is_gguf(source)
        else (
            "a folder with config.json, safetensors and tokenizer.json, or the name of a model on a hub that can be reached from here"
        )
    )
    try:
        with _without_report():
            model, tokenizer = (_read_gguf if is_gguf(source) else _read_folder)(source, dtype)
        if adapter is not None:
            merge_adapter(model, adapter)
    except Misconfigured:
        raise
    except Exception as error:  # of any class: transformers does not document them
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise Misconfigured(f"the model {str(source)!r} cannot be loaded: {reason} Give {form}.") from error
    return model, tokenizer


def _read_gguf(source: str | Path, dtype: torch.dtype) -> tuple[Any, Any]:
    from service.models.gguf_checkpoint import read_gguf_checkpoint  # needs the package gguf

    model, tokenizer, report = read_gguf_checkpoint(Path(source), dtype)
    check_tensors(source, report)
    return model, tokenizer


def _read_folder(source: str | Path, dtype: torch.dtype) -> tuple[Any, Any]:
    refuse_adapter(source)
    check_config_values(source, PreTrainedConfig.get_config_dict(source)[0])
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    check_kind(source, config)
    architecture_of(config)
    check_functions(source, config)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    model, report = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported, and refused by `check_tensors`
    )
    check_tensors(source, report)
    check_stored_types(source)
    return model, tokenizer


@contextmanager
def _without_report() -> Iterator[None]:
    """Do not log the table of tensors that do not fit: the error names them in one line."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def load_model(
    source: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    adapter: Path | None = None,
    all_devices: bool = False,
) -> LoadedModel:
    """Load a model from a folder, a GGUF file or a hub in `dtype`, and merge a LoRA adapter into it. Only safetensors
    and GGUF are read, and no code from the hub is run. `all_devices`: spread its blocks over all devices of this
    machine instead of putting it onto `device`."""
    path = local_model(Path(source)) if Path(source).exists() or is_gguf(source) else None
    model, tokenizer = _read(path or source, dtype, adapter)
    if not tokenizer.is_fast or len(tokenizer) <= len(
        tokenizer.all_special_ids
    ):  # transformers builds an empty tokenizer where none exists
        raise Misconfigured(
            f"the model {str(source)!r} has no fast tokenizer (tokenizer.json): character offsets are needed."
        )
    if all_devices:
        spread(model, architecture_of(model.config))
    else:
        model.to(device)
    if path is None:
        return wrap_model(model, tokenizer, str(source).rsplit("/", 1)[-1])
    if is_gguf(path):
        return wrap_model(model, tokenizer, path.stem, path.parent, path)
    return wrap_model(model, tokenizer, path.resolve().name, path)
