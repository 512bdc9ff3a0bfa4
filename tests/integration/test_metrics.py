"""The metrics of the code agree with the documentation, the alerts and the dashboard."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from service.application.store_collector import StoreCollector
from service.kit import metrics
from service.settings import Settings
from tests.support.application import TestApp
from tests.support.paths import ROOT

TABLE_ROW = re.compile(r"^\| `(palimpsest_\w+)` \| (\w+) \| (.+?) \| (.+?) \|$", re.MULTILINE)
METRIC_NAME = re.compile(r"\bpalimpsest_\w+")
SELECTOR = re.compile(r"(palimpsest_\w+)\{([^}]*)\}")
HISTOGRAM_SUFFIX = re.compile(r"_(bucket|sum|count)$")


def read_text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def metric_families(application: TestApp) -> Iterator[tuple[Metric, tuple[str, ...]]]:
    """Yield every metric of the code with its labels."""
    for one in list(metrics.REGISTRY._collector_to_names):
        if isinstance(one, MetricWrapperBase):
            yield from ((family, one._labelnames) for family in one.describe())
    for family in StoreCollector(application.database, application.broker, 30).collect():
        yield family, family._labelnames


def full_name(family: Metric) -> str:
    return family.name + ("_total" if family.type == "counter" else "")


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestApp]:
    built = TestApp(tmp_path_factory.mktemp("metrics"))
    yield built
    built.close()


@pytest.fixture(scope="module")
def labels_by_name(application: TestApp) -> dict[str, tuple[str, ...]]:
    """Return the labels of every metric by name."""
    return {full_name(family): tuple(labels) for family, labels in metric_families(application)}


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(read_text("deploy/alerts.yml"))["groups"]
    return group["rules"]  # type: ignore[no-any-return]


def panels() -> list[dict[str, Any]]:
    return json.loads(read_text("deploy/grafana/palimpsest.json"))["panels"]  # type: ignore[no-any-return]


def expressions() -> list[str]:
    """Return every expression of the alerts, the dashboard and the documentation."""
    asked = [rule["expr"] for rule in alerts()]
    asked += [target["expr"] for panel in panels() for target in panel.get("targets", ())]
    return asked + re.findall(r"^\| [^|]+ \| `(\w+\(.+\))` \|$", read_text("docs/metrics.md"), re.MULTILINE)


def metric_names(expression: str) -> set[str]:
    """Return the metrics in an expression. The parts of a histogram are returned as its name."""
    return {HISTOGRAM_SUFFIX.sub("", name) for name in METRIC_NAME.findall(expression)}


def test_metrics_are_documented(application: TestApp) -> None:
    """docs/metrics.md lists exactly the metrics of the code, each with type, labels and meaning."""
    rows = {
        (
            full_name(family),
            family.type,
            ", ".join(f"`{label}`" for label in labels) or "none",
            family.documentation,
        )
        for family, labels in metric_families(application)
    }
    assert set(TABLE_ROW.findall(read_text("docs/metrics.md"))) == rows


def test_metric_names_follow_conventions(application: TestApp) -> None:
    """Every metric has the common prefix, base units, a meaning, no type in its name, and no unbounded
    label."""
    for family, labels in metric_families(application):
        assert re.fullmatch(r"palimpsest(_[a-z]+)+", family.name)
        assert not re.search(r"_(ms|minutes|gauge|histogram|counter|total|bucket|sum|count)$", family.name)
        assert family.documentation
        assert not {"le", "quantile", "id", "path", "prompt", "actor"} & set(labels)


def test_the_exposition_can_be_read(application: TestApp, labels_by_name: dict[str, tuple[str, ...]]) -> None:
    """GET /metrics returns every metric once, in the format that Prometheus parses."""
    with TestClient(application.app, base_url="http://127.0.0.1") as client:
        answer = client.get("/metrics")
    assert answer.headers["Content-Type"] == metrics.CONTENT_TYPE
    found = [full_name(family) for family in text_string_to_metric_families(answer.text)]
    assert len(found) == len(set(found))
    assert labels_by_name.keys() <= set(found)


def test_alerts_and_dashboard_use_existing_metrics(labels_by_name: dict[str, tuple[str, ...]]) -> None:
    """Alerts, panels and documented expressions use only existing metrics and labels."""
    asked = expressions()
    assert len(asked) > 30
    for expression in asked:
        assert metric_names(expression) <= labels_by_name.keys(), expression
        assert metric_names(expression) or set(re.findall(r"\b(up|process_\w+)\b", expression)), expression
        for name, matchers in SELECTOR.findall(expression):
            labels = re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', matchers)
            assert set(labels) <= {
                *labels_by_name[HISTOGRAM_SUFFIX.sub("", name)],
                "job",
                "instance",
                "le",
            }, expression
        allowed = {label for name in metric_names(expression) for label in labels_by_name[name]} | {
            "le",
            "instance",
            "job",
        }
        for group in re.findall(r"\bby \(([^)]*)\)", expression):
            assert set(re.split(r",\s*", group)) <= allowed, expression
        assert expression.count("(") == expression.count(")")


def test_dashboard_shows_every_metric(labels_by_name: dict[str, tuple[str, ...]]) -> None:
    """The dashboard shows every metric."""
    shown = {name for panel in panels() for t in panel.get("targets", ()) for name in metric_names(t["expr"])}
    assert shown == labels_by_name.keys()


def test_service_gauges_are_not_summed(application: TestApp) -> None:
    """Gauges of the whole service are aggregated by max or min, because every API process exports them."""
    whole = {
        full_name(family) for family in StoreCollector(application.database, application.broker, 30).collect()
    }
    for expression in expressions():
        for name in metric_names(expression) & whole:
            assert re.search(rf"\b(max|min)( by \(\w+\))? ?\({name}\b", expression), expression


def test_counters_are_used_with_rate_or_increase() -> None:
    """Counters are used only within rate or increase, because they start at 0 with each process."""
    for expression in expressions():
        for name in re.findall(r"palimpsest_\w+_(?:total|bucket|sum|count)\b", expression):
            assert re.search(rf"\b(rate|increase)\({name}\b", expression), expression


def test_alerts_say_what_they_are_about() -> None:
    """Each alert has a unique name, a severity and a summary."""
    names = [rule["alert"] for rule in alerts()]
    assert len(names) == len(set(names))
    for rule in alerts():
        assert re.fullmatch(r"Palimpsest[A-Za-z]+", rule["alert"])
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"]


def test_the_dashboard_can_be_imported() -> None:
    """The dashboard has an identity, a data source variable that every panel uses, and panels that do not
    overlap."""
    board = json.loads(read_text("deploy/grafana/palimpsest.json"))
    assert board["uid"] and board["title"] and board["schemaVersion"] >= 30
    assert board["id"] is None  # assigned by Grafana on import
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


def test_scrape_config_covers_api_and_worker() -> None:
    """The scrape configuration has the jobs that alerts and dashboard use, the alert rules, and the port of
    the API."""
    config = yaml.safe_load(read_text("deploy/prometheus.yml"))
    jobs = {job["job_name"] for job in config["scrape_configs"]}
    assert jobs == {"palimpsest-api", "palimpsest-worker"}
    for expression in expressions():
        assert set(re.findall(r'\bjob="([^"]+)"', expression)) <= jobs
    assert config["rule_files"] == ["alerts.yml"]
    (api,) = (job for job in config["scrape_configs"] if job["job_name"] == "palimpsest-api")
    assert api["dns_sd_configs"][0]["port"] == Settings.model_fields["port"].default
