"""Rules, alerts and dashboard: that they are right, and speak of metrics that there are."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from server_checkpoint import CHECKPOINT, REPOSITORY
from serving import wait_until

from benchmarks.exposition import scrape
from darkroom import Client, InvalidRequest
from darkroom.server import Server, free_ports
from darkroom_engine.metrics import METRICS, Kind

DOCKER = Path(__file__).parents[2] / "docker"
PROMETHEUS = DOCKER / "prometheus"
RULES = PROMETHEUS / "rules.yml"
GRAFANA = DOCKER / "grafana"
DASHBOARD = GRAFANA / "dashboards" / "darkroom.json"

GPU_METRICS = {
    "nv_gpu_power_usage",
    "nv_gpu_power_limit",
    "nv_energy_consumption",
    "nv_gpu_utilization",
    "nv_gpu_memory_total_bytes",
    "nv_gpu_memory_used_bytes",
}
"""What Triton tells where there is a GPU, by docs/user_guide/metrics.md of its server."""
PROMETHEUS_METRICS = {"up", "ALERTS"}
"""What Prometheus makes itself."""
ONLY_OF_FAILURES = {
    "darkroom_network_failures_total",
    "darkroom_dropped_events_total",
    "darkroom_dropped_records_total",
}
"""What a healthy server does not tell; the engine's table has them."""
SUFFIXES = {Kind.COUNTER: [""], Kind.GAUGE: [""], Kind.HISTOGRAM: ["_bucket", "_sum", "_count"]}
LABELS = {"job", "instance", "le", "model", "alertname", "alertstate", "severity", "gpu_uuid"}
"""Those that Prometheus and Triton give; the engine's own are in its table."""

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool, of Debian's package prometheus"
)


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def metric_names(expression: str) -> set[str]:
    """The metrics that a PromQL expression asks for."""
    rest = re.sub(r'"(\\.|[^"\\])*"|\'(\\.|[^\'\\])*\'|`[^`]*`', "", expression)
    rest = re.sub(r"#.*", "", rest)
    rest = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", rest)
    rest = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", rest)
    # An operand is no function; and letters after a digit are a unit or an exponent.
    words = re.findall(r"(?<![\w:.])[a-zA-Z_:][\w:]*(?![\w:]|\s*\()", rest)
    keywords = {"and", "or", "unless", "offset", "bool", "inf", "nan"} | {"group_left", "atan2"}
    # An aggregation may have its grouping before its operand: sum by (model) (...).
    aggregations = {"sum", "min", "max", "avg", "count"}
    return {word for word in words if word.lower() not in keywords | aggregations}


def label_names(expression: str) -> set[str]:
    """The labels that a PromQL expression matches, groups or joins by."""
    rest = re.sub(r'"(\\.|[^"\\])*"', '""', expression)
    matched = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"\"", rest)
    groups = re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", rest)
    return {*matched, *(name for group in groups for name in re.findall(r"\w+", group))}


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> list[str]:
    return [rule["alert"] for rule in rules() if "alert" in rule]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())


def expressions() -> dict[str, str]:
    """All PromQL there is, by where it stands, with Grafana's variables filled in."""
    found = {f"rules.yml: {rule.get('record') or rule['alert']}": rule["expr"] for rule in rules()}
    for panel in panels():
        for target in panel["targets"]:
            where = f"{DASHBOARD.name}: {panel['title']}: {target['refId']}"
            found[where] = target["expr"].replace("$__rate_interval", "5m").replace("$model", ".*")
    return found


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("up", {"up"}),
        ('up{job="a_b"} == 0 or absent(up{job="c"})', {"up"}),
        ("sum by (model, le) (rate(a_bucket[5m]))", {"a_bucket"}),
        ("sum(a) by (model) / on (job, instance) group_left (x) b:c:d", {"a", "b:c:d"}),
        ("1e-6 * 0x1F * a offset 5m > bool 0.5", {"a"}),
        ("a unless (b or c and d)", {"a", "b", "c", "d"}),
        ("histogram_quantile(0.95, a) # b", {"a"}),
        ("""label_replace(a, "b", "$1", 'c"d', "e\\"f")""", {"a"}),
        ("clamp_min(sum without (x) (a), 1) > inf", {"a"}),
    ],
)
def test_metrics_are_found_in_promql(expression, names):
    assert metric_names(expression) == names


def test_labels_are_found_in_promql():
    expression = 'sum by (a, b) (x{c="d=e", f=~"g"}) and on (h) y{i!="j"}'

    assert label_names(expression) == {"a", "b", "c", "f", "h", "i"}


@needs_promtool
def test_prometheus_takes_its_config_and_rules():
    answer = promtool("check", "config", PROMETHEUS / "prometheus.yml")

    assert answer.returncode == 0, answer.stderr
    assert f"{len(rules())} rules found" in answer.stdout


def test_the_documentation_has_every_alert_with_its_severity():
    text = (DOCKER.parent / "docs" / "docker.md").read_text()
    rows = re.findall(r"^\| `(Darkroom\w+)` \| (\w+) \|", text, re.MULTILINE)

    assert sorted(rows) == sorted(
        (rule["alert"], rule["labels"]["severity"]) for rule in rules() if "alert" in rule
    )


@needs_promtool
def test_alerts_fire_when_they_should_and_not_else():
    answer = promtool("test", "rules", PROMETHEUS / "rules_test.yml")

    assert answer.returncode == 0, answer.stdout


@needs_promtool
@pytest.mark.parametrize("expression", ["vector(1)", "vector(0) > 1"])
def test_alerts_that_always_or_never_fire_are_found(tmp_path, expression):
    text = yaml.safe_load(RULES.read_text())
    for group in text["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                rule["expr"] = expression
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(text))
    shutil.copy(PROMETHEUS / "rules_test.yml", tmp_path)

    answer = promtool("test", "rules", tmp_path / "rules_test.yml")

    wrong = set(re.findall(r"alertname: ?(\w+)", answer.stdout + answer.stderr))
    assert answer.returncode == 1
    assert wrong == set(alerts())


@needs_promtool
def test_the_dashboards_expressions_are_promql(tmp_path):
    records = [
        {"record": f"panel:{index}", "expr": expression}
        for index, expression in enumerate(expressions().values())
    ]
    file = tmp_path / "expressions.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": records}]}))

    answer = promtool("check", "rules", file)

    assert answer.returncode == 0, answer.stderr


@pytest.mark.server
def test_every_expression_asks_for_metrics_that_the_server_tells(exported):
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    known = exported | ONLY_OF_FAILURES | recorded | GPU_METRICS | PROMETHEUS_METRICS

    unknown = {
        where: missing
        for where, expression in expressions().items()
        if (missing := metric_names(expression) - known)
    }

    assert not unknown


@pytest.mark.server
def test_the_server_tells_what_the_engines_table_has_and_no_more(exported):
    table = {metric.name + suffix for metric in METRICS for suffix in SUFFIXES[metric.kind]}

    own = {name for name in exported if name.startswith("darkroom_")}

    assert own == table - ONLY_OF_FAILURES


def test_every_expression_asks_for_labels_that_there_are():
    known = LABELS | {metric.label for metric in METRICS if metric.label}

    unknown = {
        where: missing
        for where, expression in expressions().items()
        if (missing := label_names(expression) - known)
    }

    assert not unknown


def test_every_recorded_series_and_every_metric_of_the_engine_is_looked_at():
    asked = set().union(*(metric_names(expression) for expression in expressions().values()))

    recorded = {rule["record"] for rule in rules() if "record" in rule}
    of_engine = {metric.name for metric in METRICS}

    assert recorded - {"model:darkroom_images:rate2m"} <= asked
    assert not {name for name in of_engine if not any(it.startswith(name) for it in asked)}


def test_the_dashboard_is_laid_out_without_overlaps_and_has_its_names_once():
    places = [panel["gridPos"] for panel in dashboard()["panels"]]
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    ids = [panel["id"] for panel in dashboard()["panels"]]

    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    assert len(set(ids)) == len(ids)


def test_the_dashboard_asks_the_datasource_that_is_provisioned():
    file = GRAFANA / "provisioning" / "datasources" / "prometheus.yaml"
    (source,) = yaml.safe_load(file.read_text())["datasources"]
    asked = [it["datasource"] for panel in panels() for it in (panel, *panel["targets"])]
    (variable,) = dashboard()["templating"]["list"]

    assert {json.dumps(it, sort_keys=True) for it in [*asked, variable["datasource"]]} == {
        json.dumps({"type": source["type"], "uid": source["uid"]}, sort_keys=True)
    }


def test_the_dashboard_stands_where_grafana_looks():
    file = GRAFANA / "provisioning" / "dashboards" / "darkroom.yaml"
    (provider,) = yaml.safe_load(file.read_text())["providers"]
    grafana = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["grafana"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]

    assert home == f"{provider['options']['path']}/{DASHBOARD.name}"
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in grafana["volumes"]


@pytest.fixture(scope="module")
def exported() -> Iterator[set[str]]:
    """The names on the metrics port of a server that was asked for this and that."""
    from darkroom_export import export_checkpoint

    export_checkpoint(CHECKPOINT, REPOSITORY)
    with (
        Server(REPOSITORY, free_ports(), response_cache_bytes=1 << 20) as server,
        Client(server.grpc_url, timeout=60) as client,
    ):
        client.generate("a red circle", num_inference_steps=2)
        with pytest.raises(InvalidRequest):
            client.generate("a red circle", num_inference_steps=-1)

        def names() -> set[str]:
            return {series.partition("{")[0] for series in scrape(server.metrics_url)}

        # Engines hand over what they count some time later.
        wait_until(lambda: 'outcome="invalid"' in str(list(scrape(server.metrics_url))))
        wait_until(lambda: "darkroom_decode_duration_seconds_sum" in names())
        yield names()
