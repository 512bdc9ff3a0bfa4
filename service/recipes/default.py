"""The recipe of a model for which nothing is known: layers by architecture and depth, of which the first edit chooses
one. Torch-free.

The published recipes edit between a twentieth and two fifths of the depth: a third in GPT-2, a sixth in Llama,
Mistral, Qwen and GPT-J (`published.py`).
"""

from __future__ import annotations

from service.methods.method import EditMethod
from service.methods.parameters import RomeParameters
from service.recipes.recipe import Recipe

SHALLOWEST, DEEPEST = 0.05, 0.4  # of the depth
DEPTHS = {"gpt2": 1 / 3, "gpt_neox": 1 / 3}  # the best depth of an architecture before anything is tried
OTHER_DEPTH = 1 / 6
CANDIDATES = 6  # layers that the first edit tries
VALUES = {"steps": 20, "learning_rate": 0.5, "contexts": 2}
#: of a model with a chat template: without it an edit can change which subject a conversation is about
CHAT_VALUES = {"restatement_weight": 0.5}


def default_recipe(model_type: str, layers: int, is_chat: bool = False) -> Recipe:
    """Return the recipe of a model of this architecture and depth."""
    candidates = layers_to_try(layers)
    expected = DEPTHS.get(model_type, OTHER_DEPTH) * layers
    layer = min(candidates, key=lambda candidate: abs(candidate - expected))
    return Recipe(
        source=f"default for {layers} layers; the first edit chooses one of layers {', '.join(map(str, candidates))}",
        rome=RomeParameters.model_validate(
            {"layers": (layer,), **VALUES, **(CHAT_VALUES if is_chat else {})}
        ),
        candidate_layers=candidates if len(candidates) > 1 else (),
    )


def can_try_layers(method: EditMethod) -> bool:
    """Whether an edit by this method can be made at any layer, so that some can be tried."""
    return method.searches_value and method.default_depth is None


def layers_to_try(
    layers: int, candidates: int = CANDIDATES, shallowest: float = SHALLOWEST
) -> tuple[int, ...]:
    """Return at most `candidates` layers at equal distances, early to middle ones. `shallowest`: of the depth."""
    first, last = round(shallowest * layers), max(1, round(DEEPEST * layers))
    last = min(last, layers - 1)
    distance = (last - first) / (candidates - 1)
    return tuple(dict.fromkeys(round(first + i * distance) for i in range(candidates)))
