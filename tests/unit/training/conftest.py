"""Import path of the scripts in training/, which import each other from their folder."""

import sys

from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / "training"))
