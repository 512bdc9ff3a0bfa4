"""`training/` is scripts and no package: they import each other from their own folder."""

import sys

from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / "training"))
