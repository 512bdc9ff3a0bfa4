"""Tests of service.models.gguf_checkpoint and its parts: models in GGUF files of llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from transformers import AutoConfig, AutoModelForCausalLM

from service.errors import Misconfigured
from service.models.gguf_checkpoint import read_tokenizer
from service.models.gguf_file import read_gguf
from service.models.loading import LoadedModel, load_model, wrap_model
from tests.support.gguf_files import CHAT_TEMPLATE, gguf_tensors, llama3_factors, write_gguf
from tests.support.tiny_models import TEXTS, tiny, tokenizer

MODEL_TYPES = ["gpt2", "llama", "qwen2", "qwen3"]


def source(model_type: str = "llama", **changes: Any) -> LoadedModel:
    """Return a tiny model whose rows have whole blocks of 32 values, with biases and norms that are not trivial."""
    model = tiny(model_type, width=32, inner=64, **changes)
    with torch.no_grad():
        for parameter in model.model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1, 0.2)
    return model


def refusal(path: Path) -> str:
    """Return the message with which a file is refused; it is one line."""
    with pytest.raises(Misconfigured) as caught:
        load_model(path)
    assert "\n" not in caught.value.detail and str(path) in caught.value.detail
    return caught.value.detail


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_file_holds_the_model_and_its_tokenizer(model_type: str, tmp_path: Path) -> None:
    """A model that was written in the layout of llama.cpp is loaded with its weights, logits and token ids."""
    original = source(model_type)
    loaded = load_model(write_gguf(tmp_path / "Tiny.F32.gguf", original))
    for name, tensor in original.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    ids = torch.tensor([original.encode(TEXTS[0])[0]])
    assert torch.equal(loaded.model(ids).logits, original.model(ids).logits)
    assert [loaded.encode(x) for x in TEXTS] == [original.encode(x) for x in TEXTS]
    assert loaded.name == "Tiny.F32" and loaded.tokenizer.chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q8_0])
def test_quantised_weights_are_dequantised(kind: Kind, tmp_path: Path) -> None:
    """The weights of a quantised file are what the package `gguf` makes of its blocks."""
    original = source()
    loaded = load_model(write_gguf(tmp_path / "tiny.gguf", original, kind))
    weight = original.weight(1).numpy()
    expected = torch.from_numpy(dequantize(quantize(weight, kind), kind))
    assert torch.equal(loaded.weight(1), expected) and not torch.equal(loaded.weight(1), original.weight(1))


def test_a_dtype_is_applied_to_every_weight(tmp_path: Path) -> None:
    """Weights are loaded in the dtype that is asked for."""
    loaded = load_model(write_gguf(tmp_path / "tiny.gguf", source()), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}


def test_transformers_reads_the_same_weights(tmp_path: Path) -> None:
    """The weights are those that transformers reads from the file."""
    path = write_gguf(tmp_path / "tiny.gguf", source(), Kind.Q8_0)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).state_dict()
    loaded = load_model(path).model.state_dict()
    assert loaded.keys() == oracle.keys() and all(torch.equal(loaded[name], oracle[name]) for name in oracle)


def test_the_fingerprint_does_not_depend_on_the_path(tmp_path: Path) -> None:
    """The same bytes under another name and in another folder are the same model; other weights are not."""
    first = write_gguf(tmp_path / "a.gguf", source())
    (tmp_path / "folder").mkdir()
    second = tmp_path / "folder" / "b.gguf"
    second.write_bytes(first.read_bytes())
    other = write_gguf(tmp_path / "c.gguf", source(seed=1))
    assert load_model(first).fingerprint == load_model(second).fingerprint != load_model(other).fingerprint


def test_a_folder_stands_for_its_only_file(tmp_path: Path) -> None:
    """A folder with one GGUF file and no config.json is that file; with several, one must be named."""
    path = write_gguf(tmp_path / "tiny.gguf", source())
    assert load_model(tmp_path).path == path
    (tmp_path / "second.gguf").write_bytes(path.read_bytes())
    assert "has several GGUF files (second.gguf, tiny.gguf): name one of them" in refusal(tmp_path)


def test_a_head_that_is_stored_twice_is_tied(tmp_path: Path) -> None:
    """A file whose output embedding repeats the token embedding, as llama.cpp writes GPT-2, has one tensor for both."""
    original = source("gpt2")
    head = {"output.weight": gguf_tensors(original)["token_embd.weight"]}
    loaded = load_model(write_gguf(tmp_path / "tiny.gguf", original, extra=head))
    assert loaded.lm_head.weight is loaded.embedding.weight


def test_a_head_of_its_own_is_kept(tmp_path: Path) -> None:
    """A file whose output embedding differs from the token embedding keeps both."""
    original = source("gpt2")
    head = torch.randn(320, 32)
    loaded = load_model(write_gguf(tmp_path / "tiny.gguf", original, extra={"output.weight": head}))
    assert torch.equal(loaded.lm_head.weight, head)  # type: ignore[arg-type]
    assert torch.equal(loaded.embedding.weight, original.embedding.weight)  # type: ignore[arg-type]


def test_the_rotary_embedding_of_llama_3_is_read_from_its_factors(tmp_path: Path) -> None:
    """The factors that llama.cpp stores for Llama 3.1 give the configuration from which they were computed."""
    theta, factor = 500_000.0, 32.0
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = AutoConfig.for_model(
        "llama", vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, rope_parameters=rope,
    )  # fmt: skip
    original = wrap_model(AutoModelForCausalLM.from_config(config), tokenizer())
    factors = {"rope_freqs.weight": llama3_factors(32, theta, factor)}
    loaded = load_model(write_gguf(tmp_path / "tiny.gguf", original, extra=factors))
    ids = torch.tensor([original.encode(TEXTS[0])[0]])
    torch.testing.assert_close(loaded.model(ids).logits, original.model(ids).logits)
    wrong = {"rope_freqs.weight": torch.linspace(1, 7, 16)}
    assert "are not those of Llama 3.1" in refusal(write_gguf(tmp_path / "wrong.gguf", original, extra=wrong))


def test_tensors_that_the_model_does_not_use_are_refused(tmp_path: Path) -> None:
    """A file that says fewer layers than it has is refused with the names of unused tensors, and so is one that says
    more."""
    fewer = write_gguf(tmp_path / "fewer.gguf", source(), metadata={"block_count": 2})
    assert "tensors that the model does not use: blk.2.attn_k.weight" in refusal(fewer)
    more = write_gguf(tmp_path / "more.gguf", source(), metadata={"block_count": 4})
    assert "its weights lack model.layers.3." in refusal(more)


def test_metadata_that_is_not_read_is_refused(tmp_path: Path) -> None:
    """A key that changes the computation and is not read is refused; at a value that changes nothing it is accepted."""
    scaled = write_gguf(tmp_path / "scaled.gguf", source(), metadata={"rope.scaling.type": "yarn"})
    assert "llama.rope.scaling.type = 'yarn', which is not read" in refusal(scaled)
    unknown = write_gguf(tmp_path / "unknown.gguf", source(), metadata={"logit_scale": 2.0})
    assert "llama.logit_scale" in refusal(unknown)
    part = write_gguf(tmp_path / "part.gguf", source(), metadata={"rope.dimension_count": 8})
    assert "its rope.dimension_count differs from the size of a head, 16" in refusal(part)
    neutral = {"rope.scaling.type": "none", "expert_count": 0, "vocab_size": 320, "rope.dimension_count": 16}
    load_model(write_gguf(tmp_path / "neutral.gguf", source(), metadata=neutral))


def test_metadata_that_is_absent_is_refused(tmp_path: Path) -> None:
    """A file without the number of its layers is refused by the name of the key."""
    path = write_gguf(tmp_path / "tiny.gguf", source(), metadata={"block_count": None})
    assert "its metadata lacks llama.block_count" in refusal(path)


def test_mixtures_of_experts_and_parts_are_refused(tmp_path: Path) -> None:
    """A mixture of experts is refused, and so is one part of a split file."""
    experts = write_gguf(tmp_path / "experts.gguf", source(), metadata={"expert_count": 8})
    assert "llama.expert_count = 8" in refusal(experts)
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 3)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    assert "is one of 3 parts: merge them with llama-gguf-split" in refusal(tmp_path / "part.gguf")


def test_unsupported_architectures_are_refused_with_those_that_are(tmp_path: Path) -> None:
    """An architecture without a row is refused with the names of the rows."""
    path = write_gguf(tmp_path / "tiny.gguf", source(), architecture="mamba")
    assert (
        "has the GGUF architecture 'mamba', and those that are read are gpt2, llama, qwen2, qwen3"
        in refusal(path)
    )


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(share: float, tmp_path: Path) -> None:
    """A file that ends in its metadata or in its tensors is refused as truncated."""
    path = write_gguf(tmp_path / "tiny.gguf", source())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert "is truncated or damaged" in refusal(path) and "get the file again" in refusal(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    """A file that is absent, has other first bytes or an unknown version is refused with the reason."""
    path = tmp_path / "tiny.gguf"
    assert "there is no file" in refusal(path)
    path.write_bytes(b"PK\x03\x04 and so on")
    assert "is not a GGUF file" in refusal(path)
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "big"))
    assert "convert it with the tools of llama.cpp" in refusal(path)


def test_a_file_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """A file without a tokenizer is refused with what to give."""
    path = write_gguf(tmp_path / "tiny.gguf", source(), tokenizer=False)
    assert "has no tokenizer" in refusal(path) and "a folder with tokenizer.json" in refusal(path)


def with_split(path: Path, old: str, new: str) -> Path:
    """Replace the name of the tokenizer's split by one of the same length."""
    data = path.read_bytes()
    assert data.count(old.encode()) == 1 and len(old) == len(new)
    path.write_bytes(data.replace(old.encode(), new.encode()))
    return path


def test_a_tokenizer_with_an_unknown_split_is_refused(tmp_path: Path) -> None:
    """A byte-level tokenizer whose split of texts is not known is refused by its name."""
    path = with_split(write_gguf(tmp_path / "tiny.gguf", source()), "gpt-2", "gpt-9")
    assert "splits texts in a way that is not known (tokenizer.ggml.pre is 'gpt-9')" in refusal(path)


def test_single_digits_are_split_where_the_tokenizer_asks_for_it(tmp_path: Path) -> None:
    """The split of SmolLM separates digits from the spaces before them; that of GPT-2 does not."""
    path = write_gguf(tmp_path / "tiny.gguf", source())
    splits = {}
    for name in ("gpt-2", "jais", "smollm"):
        file = read_gguf(path)
        object.__setattr__(file, "metadata", {**file.metadata, "tokenizer.ggml.pre": name})
        splits[name] = read_tokenizer(file).backend_tokenizer.pre_tokenizer.pre_tokenize_str("in  1999")
    assert [text for text, _ in splits["gpt-2"]] == ["in", "Ġ", "Ġ1999"] and splits["jais"] == splits["gpt-2"]
    assert [text for text, _ in splits["smollm"]] == ["in", "ĠĠ", "1", "9", "9", "9"]


def sentencepiece_file(path: Path, **flags: bool) -> Path:
    """Write a file with a SentencePiece vocabulary of byte tokens and the pieces of two words, and no model."""
    words = ["▁", *"helowrd", "he", "ll", "hell", "hello", "▁hello", "▁w", "or", "ld", "▁wor", "▁world"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words])
    writer.add_token_scores([0.0] * 259 + [-1000.0 if len(x) == 1 else float(len(x)) for x in words])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(words))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path


@pytest.mark.parametrize("bos", [True, False])
def test_sentencepiece_tokenizers_are_read(bos: bool, tmp_path: Path) -> None:
    """A SentencePiece vocabulary merges by its scores, falls back to bytes, starts texts as the file says, and has the
    offsets of the text."""
    file = read_gguf(sentencepiece_file(tmp_path / "tiny.gguf", add_bos_token=bos))
    encoding = read_tokenizer(file).backend_tokenizer.encode("hello world ü")
    start = ["<s>"] if bos else []
    assert encoding.tokens == [*start, "▁hello", "▁world", "▁", "<0xC3>", "<0xBC>"]
    assert encoding.offsets[len(start) :] == [(0, 5), (5, 11), (11, 12), (12, 13), (12, 13)]


def test_sentencepiece_without_a_first_space_is_refused(tmp_path: Path) -> None:
    """A SentencePiece tokenizer that adds no space before a text is refused: transformers would add one."""
    file = read_gguf(sentencepiece_file(tmp_path / "tiny.gguf", add_space_prefix=False))
    with pytest.raises(Misconfigured, match="adds no space before a text"):
        read_tokenizer(file)
