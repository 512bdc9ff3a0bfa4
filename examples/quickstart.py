"""Change a fact, show the effect, trace it and revert it.

palimpsest serve                       # in one terminal
python examples/quickstart.py          # in another; writes trace.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

from palimpsest import Client

SUBJECT = "Eiffel Tower"
PROMPT = "The {} is located in the city of"
OTHERS = ["To see the Eiffel Tower, you have to travel to", "The Louvre can be found in the city of"]


def main(picture: Path) -> None:
    statement = PROMPT.replace("{}", SUBJECT)
    with Client() as client:
        print(f"before:    {statement}{client.generate(statement, max_new_tokens=2)}")

        edit = client.edit(SUBJECT, PROMPT, "Rome", "Paris")
        print(f"edited:    version {edit.version}, p(Rome) {edit.before:.3f} -> {edit.after:.3f}")
        for prompt in [statement, *OTHERS]:
            text = client.generate(prompt, max_new_tokens=2, min_version=edit.version)
            print(f"after:     {prompt}{text}")

        trace = client.trace(statement, SUBJECT, window=3, version="base")
        picture.write_bytes(client.picture(trace, "svg"))
        print(f"traced:    {picture}")

        reverted = client.revert(edit)
        text = client.generate(statement, max_new_tokens=2, min_version=reverted.reverted_version)
        print(f"reverted:  {statement}{text}")
        print(f"verified:  {client.verify().ok}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "trace.svg"))
