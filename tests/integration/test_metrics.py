"""The metrics are what the documentation, the alerts and the dashboard say they are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from service.application.store_collector import Monitor
from service.kit import metrics
from service.settings import Settings
from tests.support.application import House
from tests.support.paths import ROOT

ROW = re.compile(r"^\| `(palimpsest_\w+)` \| (\w+) \| (.+?) \| (.+?) \|$", re.MULTILINE)
NAME = re.compile(r"\bpalimpsest_\w+")
MATCHED = re.compile(r"(palimpsest_\w+)\{([^}]*)\}")
PARTS = re.compile(r"_(bucket|sum|count)$")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def families(house: House) -> Iterator[tuple[Metric, tuple[str, ...]]]:
    """Every metric of the code, with its labels."""
    for one in list(metrics.REGISTRY._collector_to_names):
        if hasattr(one, "_labelnames"):
            yield from ((family, one._labelnames) for family in one.describe())
    for family in Monitor(house.database, house.broker, 30).collect():
        yield family, family._labelnames  # type: ignore[attr-defined]


def full(family: Metric) -> str:
    return family.name + ("_total" if family.type == "counter" else "")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    built = House(tmp_path_factory.mktemp("metrics"))
    yield built
    built.close()


@pytest.fixture(scope="module")
def known(house: House) -> dict[str, tuple[str, ...]]:
    """name -> labels."""
    return {full(family): tuple(labels) for family, labels in families(house)}


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(read("deploy/alerts.yml"))["groups"]
    return group["rules"]  # type: ignore[no-any-return]


def panels() -> list[dict[str, Any]]:
    return json.loads(read("deploy/grafana/palimpsest.json"))["panels"]  # type: ignore[no-any-return]


def expressions() -> list[str]:
    """Every expression of the alerts, the dashboard and the documentation."""
    asked = [rule["expr"] for rule in alerts()]
    asked += [target["expr"] for panel in panels() for target in panel.get("targets", ())]
    return asked + re.findall(r"^\| [^|]+ \| `(\w+\(.+\))` \|$", read("docs/metrics.md"), re.MULTILINE)


def named(expression: str) -> set[str]:
    """The metrics in an expression; the parts of a histogram by the histogram's name."""
    return {PARTS.sub("", name) for name in NAME.findall(expression)}


def test_metrics_are_documented(house: House) -> None:
    """docs/metrics.md has exactly the metrics of the code, each with kind, labels and meaning."""
    rows = {
        (
            full(family),
            family.type,
            ", ".join(f"`{label}`" for label in labels) or "none",
            family.documentation,
        )
        for family, labels in families(house)
    }
    assert set(ROW.findall(read("docs/metrics.md"))) == rows


def test_names_follow_the_rules(house: House) -> None:
    """One prefix, base units, no type in a name but a counter's `_total`, and meanings that are not empty."""
    for family, labels in families(house):
        assert re.fullmatch(r"palimpsest(_[a-z]+)+", family.name)
        assert not re.search(r"_(ms|minutes|gauge|histogram|counter|total|bucket|sum|count)$", family.name)
        assert family.documentation
        assert not {"le", "quantile", "id", "path", "prompt", "actor"} & set(labels)


def test_the_exposition_can_be_read(house: House, known: dict[str, tuple[str, ...]]) -> None:
    """GET /metrics is text that Prometheus reads, with every metric of the house in it, each once."""
    with TestClient(house.app, base_url="http://127.0.0.1") as client:
        answer = client.get("/metrics")
    assert answer.headers["Content-Type"] == metrics.CONTENT_TYPE
    found = [full(family) for family in text_string_to_metric_families(answer.text)]
    assert len(found) == len(set(found))
    assert known.keys() <= set(found)


def test_alerts_and_dashboard_name_what_there_is(known: dict[str, tuple[str, ...]]) -> None:
    """Every metric that an alert, a panel or an example asks for is one of the code's, with labels that it has."""
    asked = expressions()
    assert len(asked) > 30
    for expression in asked:
        assert named(expression) <= known.keys(), expression
        assert named(expression) or set(re.findall(r"\b(up|process_\w+)\b", expression)), expression
        for name, matchers in MATCHED.findall(expression):
            labels = re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', matchers)
            assert set(labels) <= {*known[PARTS.sub("", name)], "job", "instance", "le"}, expression
        allowed = {label for name in named(expression) for label in known[name]} | {"le", "instance", "job"}
        for group in re.findall(r"\bby \(([^)]*)\)", expression):
            assert set(re.split(r",\s*", group)) <= allowed, expression
        assert expression.count("(") == expression.count(")")


def test_everything_is_shown(known: dict[str, tuple[str, ...]]) -> None:
    """There is no metric that the dashboard passes over."""
    shown = {name for panel in panels() for t in panel.get("targets", ()) for name in named(t["expr"])}
    assert shown == known.keys()


def test_gauges_of_the_whole_service_are_never_added_up(house: House) -> None:
    """Every API tells them, so a sum over APIs would count them several times."""
    whole = {full(family) for family in Monitor(house.database, house.broker, 30).collect()}
    for expression in expressions():
        for name in named(expression) & whole:
            assert re.search(rf"\b(max|min)( by \(\w+\))? ?\({name}\b", expression), expression


def test_counters_are_asked_for_their_growth() -> None:
    """A counter starts at 0 with its process: only its rate or its increase means something."""
    for expression in expressions():
        for name in re.findall(r"palimpsest_\w+_(?:total|bucket|sum|count)\b", expression):
            assert re.search(rf"\b(rate|increase)\({name}\b", expression), expression


def test_alerts_say_what_they_are_about() -> None:
    """Each alert has a name of its own, a severity, and a summary for the person it calls."""
    names = [rule["alert"] for rule in alerts()]
    assert len(names) == len(set(names))
    for rule in alerts():
        assert re.fullmatch(r"Palimpsest[A-Za-z]+", rule["alert"])
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"]


def test_the_dashboard_can_be_imported() -> None:
    """It has an identity, a variable for the data source that every panel uses, and panels that do not overlap."""
    board = json.loads(read("deploy/grafana/palimpsest.json"))
    assert board["uid"] and board["title"] and board["schemaVersion"] >= 30
    assert board["id"] is None  # the importer gives it one
    (variable,) = board["templating"]["list"]
    assert (variable["name"], variable["type"], variable["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    ids = [panel["id"] for panel in panels()]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        across = range(place["x"], place["x"] + place["w"])
        cells = {(x, y) for x in across for y in range(place["y"], place["y"] + place["h"])}
        assert cells and max(across) < 24 and not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        source = {"type": "prometheus", "uid": "${datasource}"}
        assert panel["title"] and panel["description"] and panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == source
        assert all(target["datasource"] == source for target in panel["targets"])
        letters = [target["refId"] for target in panel["targets"]]
        assert letters and len(letters) == len(set(letters))


def test_prometheus_finds_both_kinds_of_process() -> None:
    """The jobs of the scrape configuration are those that alerts and dashboard ask for, at a path that is served."""
    config = yaml.safe_load(read("deploy/prometheus.yml"))
    jobs = {job["job_name"] for job in config["scrape_configs"]}
    assert jobs == {"palimpsest-api", "palimpsest-worker"}
    for expression in expressions():
        assert set(re.findall(r'\bjob="([^"]+)"', expression)) <= jobs
    assert config["rule_files"] == ["alerts.yml"]
    (api,) = (job for job in config["scrape_configs"] if job["job_name"] == "palimpsest-api")
    assert api["dns_sd_configs"][0]["port"] == Settings.model_fields["port"].default
