"""The editing methods. A method is one module in this package and one line here. Torch-free.

The HTTP schema, the command line, GET /models, the console and the search for a recipe read this registry.
"""

from __future__ import annotations

from importlib import import_module

from service.errors import InvalidInput
from service.methods.method import EditMethod, SolveRule

#: modules of this package, in the order in which their methods are listed
MODULES = (
    "rome",
    "memit",
    "emmet",
    "alphaedit",
    "finetune",
    "grace",
    "ultraedit",
    "kn",
    "serac",
)

#: name -> method
METHODS: dict[str, EditMethod] = {
    method.name: method for module in MODULES for method in import_module(f"service.methods.{module}").METHODS
}

#: name -> rule, as stored with the factors of an edit
SOLVE_RULES: dict[str, SolveRule] = {m.solve.name: m.solve for m in METHODS.values() if m.solve is not None}

#: the method of an edit that names none
DEFAULT_METHOD = "rome"


def get_method(name: str) -> EditMethod:
    """Return the method of this name. Raise InvalidInput when there is none."""
    try:
        return METHODS[name]
    except KeyError:
        raise InvalidInput(f"there is no method {name!r}; known: {', '.join(METHODS)}.", "method") from None
