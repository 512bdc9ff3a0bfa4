"""Tests of service.models.loading."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from service.errors import InvalidInput, Misconfigured
from service.kit.text_encoder import TextEncoder
from service.models.loading import LoadedModel, load_model, with_bos, wrap_model
from service.models.token_batch import forward, pad
from tests.support.tiny_models import END, MODEL_TYPES, tiny
from workers.model_info import tokenizer_json

TEXT = "The Eiffel Tower is located in the city of"


def save_model(model: LoadedModel, folder: Path) -> Path:
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def logits(model: LoadedModel) -> torch.Tensor:
    with torch.no_grad():
        return forward(model, pad([model.encode(TEXT)[0]], model))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_saved_model_comes_back(model_type: str, tmp_path: Path) -> None:
    """A loaded folder has the logits and tokens of the saved model, on every architecture."""
    model = tiny(model_type)
    back = load_model(save_model(model, tmp_path / "twin"))
    assert back.name == "twin" and back.folder == tmp_path / "twin"
    assert back.encode(TEXT) == model.encode(TEXT)
    assert torch.equal(logits(back), logits(model))
    assert not back.model.training
    assert not any(p.requires_grad for p in back.model.parameters())


def test_the_fingerprint_names_the_model(tmp_path: Path) -> None:
    """The same bytes in another folder, or saved again after loading, have the same fingerprint."""
    model = tiny()
    one, two = (
        load_model(save_model(model, tmp_path / "one")),
        load_model(save_model(model, tmp_path / "two")),
    )
    again = load_model(save_model(one, tmp_path / "three"))
    assert one.fingerprint == two.fingerprint == again.fingerprint


def test_use_does_not_change_the_fingerprint(tmp_path: Path) -> None:
    """Using a model does not change its fingerprint."""
    model = load_model(save_model(tiny(), tmp_path))
    logits(model)
    assert wrap_model(model.model, model.tokenizer).fingerprint == model.fingerprint


def test_anything_else_is_another_fingerprint(tmp_path: Path) -> None:
    """One bit of one weight, the tokenizer, the configuration and the dtype each change the fingerprint."""
    base = load_model(save_model(tiny(), tmp_path / "base")).fingerprint
    fingerprints = {base}
    nudged = tiny()
    weight = nudged.weight(2).data
    weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
    fingerprints.add(load_model(save_model(nudged, tmp_path / "weight")).fingerprint)
    spelled = save_model(tiny(), tmp_path / "tokenizer")
    file = spelled / "tokenizer.json"
    file.write_text(file.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true'))
    fingerprints.add(load_model(spelled).fingerprint)
    configured = save_model(tiny(), tmp_path / "config")
    file = configured / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layer_norm_epsilon": 0.1}))
    fingerprints.add(load_model(configured).fingerprint)
    fingerprints.add(load_model(tmp_path / "base", dtype=torch.bfloat16).fingerprint)
    assert len(fingerprints) == 5


def test_half_precision_files_are_loaded_in_fp32(tmp_path: Path) -> None:
    """Weights stored in fp16 are loaded in fp32 unless a dtype is given."""
    model = tiny(dtype=torch.float16)
    stored = model.weight(1).data
    back = load_model(save_model(model, tmp_path))
    assert back.weight(1).dtype == torch.float32
    assert torch.equal(back.weight(1).data, stored.float())
    assert load_model(tmp_path, dtype=torch.bfloat16).weight(1).dtype == torch.bfloat16


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    """A source that is neither a folder nor a model name is rejected; the error says what to give."""
    with pytest.raises(Misconfigured, match=r"nowhere.*config\.json"):
        load_model(tmp_path / "nowhere")


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    """A folder without a model is rejected."""
    with pytest.raises(Misconfigured, match="cannot be loaded"):
        load_model(tmp_path)


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """A folder with weights but no tokenizer is rejected."""
    tiny().model.save_pretrained(tmp_path)
    with pytest.raises(Misconfigured, match="tokenizer"):
        load_model(tmp_path)


def test_an_unknown_type_says_which_are_known(tmp_path: Path) -> None:
    """A model type that transformers supports and this project does not is rejected with the list of types."""
    folder = save_model(tiny(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(Misconfigured, match=r"'bert' are not supported.*gpt2"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonsense"}))
    with pytest.raises(Misconfigured, match="nonsense"):
        load_model(folder)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    """A folder with only pytorch_model.bin is rejected; nothing is unpickled."""
    folder = save_model(tiny(), tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(Misconfigured, match="safetensors"):
        load_model(folder)


def test_broken_weights_are_refused(tmp_path: Path) -> None:
    """A damaged weights file is rejected."""
    folder = save_model(tiny(), tmp_path)
    (folder / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(Misconfigured, match="cannot be loaded"):
        load_model(folder)


@pytest.mark.parametrize(("damage", "message"), [("missing", "lack.*c_proj"), ("shape", "cannot be loaded")])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, damage: str, message: str) -> None:
    """A missing weight, or one of another shape, is rejected and never initialized at random."""
    folder = save_model(tiny(), tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if n.endswith("h.1.mlp.c_proj.weight"))
    whole = weights.pop(name)
    if damage == "shape":
        weights[name] = whole[:-1].contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(Misconfigured, match=message):
        load_model(folder)


def test_layers_that_do_not_exist_are_refused() -> None:
    """A layer index is 0 to the last; a negative index is rejected."""
    model = tiny()
    for layer in (-1, 3):
        with pytest.raises(InvalidInput, match="layers 0 to 2"):
            model.weight(layer)


def test_decoding_leaves_special_tokens_out() -> None:
    """`decode` omits special tokens."""
    model = tiny("llama", bos=True)
    ids, offsets = model.encode(TEXT)
    assert ids[0] == 0 and offsets[0] == (0, 0)
    assert model.decode(ids) == TEXT


def ending_model(template: str) -> LoadedModel:
    """Return a model with a tokenizer that adds special tokens around a text."""
    model = tiny()
    raw = Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str())
    raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=[(END, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=END, eos_token=END)
    return replace(model, tokenizer=tokenizer)


@pytest.mark.parametrize("template", [f"$A {END}", f"{END} $A {END}"])
def test_a_model_reads_no_end_after_a_text(template: str) -> None:
    """A model, also with a start token that the recipe adds, reads a text without the token that its tokenizer adds
    after it, and with one start token."""
    plain, offsets = tiny().encode(TEXT)
    model = ending_model(template)
    assert model.encode(TEXT)[0] == ([0] if template.startswith(END) else []) + plain
    for text in (TEXT, END + TEXT):
        assert with_bos(model).encode(text)[0] == [0, *plain]
    assert with_bos(model).encode(TEXT)[1] == [(0, 0), *offsets]


@pytest.mark.parametrize("template", ["$A", f"$A {END}", f"{END} $A"])
def test_the_api_and_the_worker_read_the_same_tokens(template: str) -> None:
    """The registered tokenizer gives the API the tokens and offsets that the worker reads."""
    model = ending_model(template)
    registered = TextEncoder(Tokenizer.from_str(tokenizer_json(model)), 64, model.vocabulary_size)
    for text in (TEXT, END + TEXT, f"São {END} 東京"):
        assert registered.encode(text) == model.encode(text)


def test_a_token_without_an_embedding_is_refused() -> None:
    """A text with a token beyond the rows of the embedding is an error of the request."""
    model = ending_model("$A")
    model.tokenizer.add_tokens(["<extra>"])
    model.encode(TEXT)
    with pytest.raises(InvalidInput, match=r"no embedding for the token .*'<extra>'"):
        model.encode("The <extra>")
