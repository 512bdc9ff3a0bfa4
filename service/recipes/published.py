"""Published recipes: what the authors chose for the models that they edited. Torch-free.

Recipes are found by the shape of a model, not by its name, so that a folder that contains GPT-2 XL needs no
configuration. The inner width tells Llama-3-8B from Llama-2-7B. Sources: the hyperparameter files of kmeng01/rome and
kmeng01/memit (Meng et al. 2022, 2023) and of EasyEdit, of AlphaEdit (Fang et al. 2025), of EMMET (Gupta et al. 2024),
whose ridge is the product of its lambda and the weight of the covariance, and of GRACE (Hartvigsen et al. 2023).
"""

from __future__ import annotations

from typing import Any

from service.methods.parameters import RomeParameters
from service.recipes.recipe import Recipe


def _published(
    source: str, layer: int, methods: dict[str, dict[str, Any]] | None = None, **changes: object
) -> Recipe:
    rome = RomeParameters.model_validate({"layers": (layer,), **changes})
    return Recipe(source=source, rome=rome, methods=methods or {})


def _multi_layer_hparams(
    layers: tuple[int, ...], ridge: float, **changes: object
) -> dict[str, dict[str, Any]]:
    """Return the layers of MEMIT and AlphaEdit, and MEMIT's lambda."""
    return {
        "memit": {"layers": layers, "ridge": ridge, **changes},
        "alphaedit": {"layers": layers, **changes},
    }


#: what the authors of GRACE and EasyEdit share; their layer of GPT-2 XL is the MLP's first projection
_GRACE = {
    "steps": 100,
    "learning_rate": 1.0,
    "stop_loss": 0.0,
    "start": "cold",
    "radius": 1.0,
    "radius_unit": "absolute",
}


def _grace(layer: int, **changes: object) -> dict[str, dict[str, Any]]:
    return {"grace": {"layers": (layer,), **_GRACE, **changes}}


_EASYEDIT = {"steps": 25, "weight_decay": 1e-3}
_EASYEDIT_MULTI_LAYER = _multi_layer_hparams((4, 5, 6, 7, 8), 15_000.0, clamp=4.0)
#: of Fang et al. for Llama-3-8B
_ALPHAEDIT_LLAMA_3 = {
    "layers": (4, 5, 6, 7, 8), "clamp": 0.75, "learning_rate": 0.1, "weight_decay": 0.5, "ridge": 10.0,
}  # fmt: skip
_GPT2_XL = _multi_layer_hparams((13, 14, 15, 16, 17), 20_000.0) | {
    "ft": {"layers": (1,)},
    "ft-l": {"layers": (0,), "epsilon": 5e-4},
    "ft-attn": {"layers": (33,)},
    "emmet": {"ridge": 100.0},
    **_grace(35),
}
_GPTJ = _multi_layer_hparams((3, 4, 5, 6, 7, 8), 15_000.0, steps=25) | {
    "ft": {"layers": (21,)},
    "ft-l": {"layers": (0,), "epsilon": 5e-5},
    **_grace(25, steps=200),
}

Shape = tuple[str, int, int, int]  #: model_type, layers, width, inner width

PUBLISHED: dict[Shape, Recipe] = {
    ("gpt2", 24, 1024, 4096): _published("rome: gpt2-medium", 8, clamp=3.0),
    ("gpt2", 36, 1280, 5120): _published("rome: gpt2-large", 12),
    ("gpt2", 48, 1600, 6400): _published("rome: gpt2-xl", 17, _GPT2_XL),
    ("gptj", 28, 4096, 16384): _published("rome: gpt-j-6B", 5, _GPTJ),
    ("gpt_neox", 44, 6144, 24576): _published("memit: gpt-neox-20b", 15),
    ("llama", 32, 4096, 11008): _published(
        "EasyEdit: Llama-2-7b", 5, _EASYEDIT_MULTI_LAYER | _grace(27, steps=50), **_EASYEDIT
    ),
    ("llama", 32, 4096, 14336): _published(
        "EasyEdit, AlphaEdit: Llama-3-8b",
        5,
        _EASYEDIT_MULTI_LAYER | {"alphaedit": _ALPHAEDIT_LLAMA_3} | _grace(27, steps=50),
        **_EASYEDIT,
    ),
    ("llama", 28, 3072, 8192): _published(
        "EasyEdit: Llama-3.2-3b", 5, _EASYEDIT_MULTI_LAYER | _grace(27, steps=50), **_EASYEDIT
    ),
    ("mistral", 32, 4096, 14336): _published("EasyEdit: Mistral-7b", 5, _EASYEDIT_MULTI_LAYER, **_EASYEDIT),
    ("qwen2", 28, 3584, 18944): _published(
        "EasyEdit: Qwen2-7b, Qwen2.5-7b", 5, _EASYEDIT_MULTI_LAYER | _grace(18, steps=50), **_EASYEDIT
    ),
}


def published_recipe(model_type: str, layers: int, width: int, inner_width: int) -> Recipe | None:
    """Return the published recipe of a model of this shape, or None."""
    return PUBLISHED.get((model_type, layers, width, inner_width))
