"""KN: the neurons that express a fact, and what they write (Dai et al. 2022)."""

from __future__ import annotations

from service.methods.method import EditMethod, SolveRule
from service.methods.parameters import MAX_NEURONS, NeuronParameters

KN = EditMethod(
    "kn",
    "knowledge neurons",
    "Dai et al. 2022",
    NeuronParameters,
    "service.editing.neuron_edits:find_neuron_edits",
    solve=SolveRule("kn", metric="identity", solved=False),
    max_associations=MAX_NEURONS,
    covers_all_layers=True,
    search_space=(({"new_weight": 2.0}, {"new_weight": 4.0}, {"new_weight": 8.0}, {"new_weight": 16.0}),),
)

METHODS = (KN,)
