"""Alerts, dashboard and scraping: made of metrics that exist, and each alert seen to fire."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.checks import objects, render, schema
from infra.checks.lints import network
from infra.components.monitoring import dashboard, panels
from pipeline.ray_metrics import METRICS
from pipeline.serving.metrics import Metrics
from tests.infra.alerts import SCENARIOS, Scenario

FOLDER = dashboard.FILE.parent
RULES = [
    group
    for name in ("alerts.yaml", "node-alerts.yaml", "serve-alerts.yaml")
    for group in yaml.safe_load((FOLDER / name).read_text())["spec"]["groups"]
]
ALERTS = {rule["alert"]: rule for group in RULES for rule in group["rules"] if "alert" in rule}
RECORDED = {rule["record"] for group in RULES for rule in group["rules"] if "record" in rule}
PANELS = [panel for panel in dashboard.dashboard()["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of every rule, panel and variable."""
    for group in RULES:
        for rule in group["rules"]:
            yield rule.get("alert") or rule["record"], rule["expr"]
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in dashboard.dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]


def names(expression: str) -> set[str]:
    """The metrics that a PromQL expression reads."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    bare = re.sub(r"\b(by|on|group_left)\s*\([^)]*\)", "", bare)
    bare = re.sub(r"label_values\((.*),\s*\w+\)", r"\1", bare)
    words = re.findall(
        r"(?<![\w:.$])([a-z_]\w*(?::\w+)*)(?!\w*[=(!])", re.sub(r"\{[^}]*\}", "", bare)
    )
    return {word for word in words if word.startswith(("ray_", "ssr:", "ssr_")) or word == "up"}


@pytest.fixture(scope="module")
def served() -> dict[str, set[str]]:
    """Names of the service's metrics as it writes them for Prometheus, with their labels."""
    metrics = Metrics()
    metrics.requests.labels("/readyz", "GET", "200").inc()
    metrics.seconds.labels("/readyz").observe(1)
    found: dict[str, set[str]] = {}
    for line in metrics.text().decode().splitlines():
        sample = re.match(r"([a-z_]+)(\{.*\})? ", line)
        if sample:
            labels = re.findall(r'(\w+)="', sample[2] or "")
            found.setdefault(sample[1], set()).update(labels)
    return found


@pytest.fixture(scope="module")
def rays() -> set[str]:
    """Names of Ray's own metrics as scraped, from the Ray that is installed."""
    agent = importlib.import_module("ray.dashboard.modules.reporter.reporter_agent")
    import ray

    core = Path(inspect.getfile(ray)).parent / "core/src/ray/raylet/raylet"
    native = re.findall(rb"\0(object_store_[a-z_]+)\0", core.read_bytes())
    found = {*agent.METRICS_GAUGES, *(name.decode() for name in native)}
    return {f"ray_{name}" for name in found}


def test_the_dashboard_is_what_the_metrics_make() -> None:
    made = dashboard.FILE.read_text() == dashboard.text()
    assert made, "python -m infra.components.monitoring.dashboard"


def test_what_is_read_exists(rays: set[str], served: dict[str, set[str]]) -> None:
    known = {f"ray_{metric.name}" for metric in METRICS} | rays | RECORDED | served.keys() | {"up"}
    read = {name: where for where, expression in expressions() for name in names(expression)}
    assert {name: where for name, where in read.items() if name not in known} == {}
    for where, expression in expressions():
        by_pattern = re.search(r'__name__=~"([^"]+)"', expression)
        found = [name for name in known if by_pattern and re.fullmatch(by_pattern[1], name)]
        assert names(expression) or found, where


def of_targets(monitor: str) -> set[str]:
    """Labels that Prometheus puts on all that a PodMonitor scrapes, as the operator spells them."""
    spec = yaml.safe_load((FOLDER / monitor).read_text())["spec"]
    return {"namespace", "pod", *(re.sub(r"\W", "_", label) for label in spec["podTargetLabels"])}


def test_labels_that_are_asked_for_exist(served: dict[str, set[str]]) -> None:
    """A matcher of a label that is not there takes no series, or every one."""
    runs, service = of_targets("pod-monitor.yaml"), of_targets("serve-monitor.yaml")
    known = {f"ray_{metric.name}": runs | set(metric.labels) for metric in METRICS}
    known |= {name: service | labels for name, labels in served.items()} | {"up": service}
    seen = set()
    for where, expression in expressions():
        for name, matchers in re.findall(r"\b([a-z_]\w*)\{([^}]*)\}", expression):
            if name in known:
                labels = set(re.findall(r'(\w+)[=!]~?"', matchers))
                assert labels and labels <= known[name], f"{where}: {name}"
                seen.add(name)
    assert len(seen) > 20 and "up" in seen


def test_the_service_is_called_what_it_calls_itself(served: dict[str, set[str]]) -> None:
    assert served.keys() == panels.SERVED.keys()
    with pytest.raises(KeyError):
        panels.served("ssr_waiting_total")


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ('sum by (run, ray_io_cluster) (delta(ray_a{run=~"ray_b"}[30m])) > 2', {"ray_a"}),
        ("a:b - on (ray_x) group_left (ray_y) ssr:c:30m / ray_d", {"ssr:c:30m", "ray_d"}),
        ('label_values(ray_e{namespace=~"$n"}, ray_io_cluster)', {"ray_e"}),
    ],
)
def test_names_are_found_in_promql(expression: str, found: set[str]) -> None:
    assert names(expression) == found


def test_every_metric_of_ours_is_shown() -> None:
    shown = {name for panel in PANELS for t in panel["targets"] for name in names(t["expr"])}
    assert {f"ray_{metric.name}" for metric in METRICS} <= shown
    for metric in Metrics().registry.collect():
        assert any(name.startswith(metric.name) for name in shown), metric.name


def test_panels_are_as_grafana_reads_them() -> None:
    model = dashboard.dashboard()
    ids = [panel["id"] for panel in model["panels"]]
    assert len(set(ids)) == len(ids) and {"uid", "title", "schemaVersion", "time"} <= model.keys()
    cells = [
        (x, y)
        for panel in model["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24, "none covers another"
    variables = {variable["name"] for variable in model["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(model)))
    assert used - {"__all"} == variables


def test_an_alert_says_what_it_is_and_where_to_read_on() -> None:
    for name, rule in ALERTS.items():
        assert {"summary", "description", "runbook"} == rule["annotations"].keys(), name
        assert rule["labels"]["severity"] in ("warning", "critical"), name
    guide = (FOLDER.parents[1] / "README.md").read_text()
    assert f" {len(ALERTS)} alerts" in guide
    headings = re.findall(r"^#+ (.+)$", guide, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}
    for name, rule in ALERTS.items():
        path, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert path == "infra/README.md" and anchor in anchors, name


# --- promtool ---


def promtool(folder: Path, *words: str) -> str:
    if shutil.which("promtool") is None:
        pytest.skip("no promtool; apt install prometheus")
    shown = [(n, query) for n, (_, query) in enumerate(expressions()) if "label_" not in query]
    rules = [{"record": f"shown:{n}", "expr": query} for n, query in shown]
    (folder / "shown.yaml").write_text(yaml.safe_dump({"groups": [{"name": "a", "rules": rules}]}))
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": RULES}))
    done = subprocess.run(["promtool", *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_takes_the_rules(tmp_path: Path) -> None:
    count = len(ALERTS) + len(RECORDED)
    assert f"SUCCESS: {count} rules" in promtool(tmp_path, "check", "rules", "rules.yaml")
    promtool(tmp_path, "check", "rules", "shown.yaml")  # and what the panels ask


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.title)
def test_alerts_fire_when_they_should(scenario: Scenario, tmp_path: Path) -> None:
    firing = "group by (alertname) (ALERTS{alertstate='firing'})"
    checks: list[dict[str, Any]] = [
        {
            "expr": firing,
            "eval_time": moment,
            "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in alerts],
        }
        for moment, alerts in scenario.firing.items()
    ]
    series = [{"series": name, "values": values} for name, values in scenario.series.items()]
    test = {"interval": "1m", "input_series": series, "promql_expr_test": checks}
    case = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [test]}
    (tmp_path / "case.yaml").write_text(yaml.safe_dump(case))
    promtool(tmp_path, "test", "rules", "case.yaml")


def test_every_alert_is_seen_to_fire_and_not_to() -> None:
    fired = {name for s in SCENARIOS for alerts in s.firing.values() for name in alerts}
    assert fired == ALERTS.keys()
    for name in ALERTS:
        assert any(
            any(name in alerts for alerts in s.firing.values())
            and any(name not in alerts for alerts in s.firing.values())
            for s in SCENARIOS
        ), f"{name}: no scenario in which it fires and does not"


# --- kustomize ---


def test_the_component_builds_and_its_objects_are_valid(tmp_path: Path) -> None:
    if not render.renderer_found():
        pytest.skip("neither kustomize nor kubectl is installed (infra/checks/kustomize.sh DIR)")
    # kustomize loads no file from outside of a build's folder
    shutil.copytree(FOLDER, tmp_path / "monitoring", ignore=shutil.ignore_patterns("__pycache__"))
    site = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "ssr",
        "components": ["../monitoring"],
    }
    (tmp_path / "site").mkdir()
    (tmp_path / "site/kustomization.yaml").write_text(yaml.safe_dump(site))
    documents = render.render(tmp_path / "site")
    assert list(schema.check(documents)) == []
    by_kind = {document["kind"]: document for document in documents}
    assert by_kind.keys() == {"PodMonitor", "PrometheusRule", "ConfigMap"}
    assert {document["metadata"]["namespace"] for document in documents} == {"ssr"}
    rules = [document for document in documents if document["kind"] == "PrometheusRule"]
    assert [group for document in rules for group in document["spec"]["groups"]] == RULES
    config = by_kind["ConfigMap"]
    assert config["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert json.loads(config["data"]["ssr.json"]) == dashboard.dashboard()
    broken = json.loads(json.dumps(by_kind["PodMonitor"]))
    broken["spec"]["podMetricsEndpoint"] = broken["spec"].pop("podMetricsEndpoints")
    assert list(schema.check([broken])), "a typo is refused"


def test_a_driver_is_scraped_before_its_last_word_is_forgotten() -> None:
    monitor = yaml.safe_load((FOLDER / "pod-monitor.yaml").read_text())
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    import ray

    lasts = 2 * ray._config.metrics_report_interval_ms() / 1000
    assert 2 * float(endpoint["interval"].removesuffix("s")) <= lasts


def test_prometheus_looks_where_its_objects_are(rendered: Callable[[str], list[Any]]) -> None:
    """In the namespaces with ours, and in its own, or the chart's rules are silently left out."""
    values = yaml.safe_load((render.INFRA / "operator/prometheus.yaml").read_text())
    spec, ours = values["prometheus"]["prometheusSpec"], rendered("prod")
    places = {
        objects.namespace(document)
        for document in ours
        if document["kind"] in ("PodMonitor", "PrometheusRule")
    }
    for field in ("podMonitorNamespaceSelector", "ruleNamespaceSelector"):
        for place in places | {network.PROMETHEUS.namespace}:
            assert objects.selects(spec[field], {"kubernetes.io/metadata.name": place}), field
    shown = set(values["grafana"]["sidecar"]["dashboards"]["searchNamespace"])
    assert shown == places | {network.PROMETHEUS.namespace}


def test_the_token_that_the_guide_makes_is_one_that_prometheus_sends(tmp_path: Path) -> None:
    """What a Secret holds goes into the header as it is, and no header has a line break."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    (made,) = re.findall(r"^openssl .*", (render.INFRA / "README.md").read_text(), re.M)
    subprocess.run(["bash", "-euo", "pipefail", "-c", made], cwd=tmp_path, check=True)
    token = tmp_path / "token"
    assert re.fullmatch(r"[0-9a-f]{64}", token.read_text()) and token.stat().st_mode & 0o77 == 0
