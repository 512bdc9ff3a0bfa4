"""The suites of an evaluation. A suite is one module in this package and one line here. Torch-free."""

from __future__ import annotations

from service.evaluation.suites.chat import CHAT
from service.evaluation.suites.consistency import CONSISTENCY
from service.evaluation.suites.divergence import DIVERGENCE
from service.evaluation.suites.free_text import FREE_TEXT
from service.evaluation.suites.negation import NEGATION
from service.evaluation.suites.portability import PORTABILITY
from service.evaluation.suites.prefixes import PREFIXED
from service.evaluation.suites.suite import Suite

#: name -> suite
SUITES: dict[str, Suite] = {
    suite.name: suite for suite in (FREE_TEXT, CONSISTENCY, DIVERGENCE, NEGATION, PREFIXED, PORTABILITY, CHAT)
}
#: name -> description, of the measures of all suites
SUITE_MEASURES: dict[str, str] = {
    name: words for suite in SUITES.values() for name, words in suite.measures.items()
}
