"""tools/grafana_dashboard.json asks for what is exported, and is laid out as Grafana wants it."""

import json
import re

import pytest

from specbackend.radix.index import COUNTERS
from specbackend.serving.metrics import FAMILIES
from tests.conftest import ROOT

DASHBOARD = json.loads((ROOT / "tools" / "grafana_dashboard.json").read_text())
ROWS = ["Traffic", "Latency", "Speculation", "Cache tiers", "Engine health"]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)(?=[{\[])")
GRID_WIDTH = 24
PARTS = {"bucket": "le", "sum": None, "count": None}  # of a histogram, and their labels

HISTOGRAMS = [family.name for family in FAMILIES if family.kind == "HISTOGRAM"]
GAUGES = {family.name for family in FAMILIES if family.kind == "GAUGE"}
SIDECARS = {*(f"specbackend:radix_{name}_total" for name in COUNTERS), "specbackend:radix_store_fetched_blocks"}
LABELS = {family.name: family.label for family in FAMILIES if family.kind != "HISTOGRAM"} | dict.fromkeys(SIDECARS)
LABELS |= {f"{name}_{part}": label for name in HISTOGRAMS for part, label in PARTS.items()}


@pytest.mark.parametrize("query", QUERIES)
def test_queries_ask_for_what_is_exported(query):
    names = SELECTOR.findall(query)
    assert names
    for name in names:
        assert name in LABELS
        assert 'model=~"$model"' in query or name in SIDECARS
    for name in re.findall(r"(?:rate|increase)\(([\w:]+)", query):
        assert name not in GAUGES
    labels = {LABELS[name] for name in names}
    assert set(re.findall(r"by \((\w+)\)", query)) <= labels
    assert query.count("(") == query.count(")") and query.count("{") == query.count("}")


def test_the_model_is_chosen_by_a_metric_there_is():
    source, model = DASHBOARD["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    [name] = re.fullmatch(r"label_values\(([\w:]+), model\)", model["query"]["query"]).groups()
    assert model["name"] == "model" and name in GAUGES


def test_legends_name_labels_that_are_left():
    for panel in PANELS:
        for target in panel["targets"]:
            left = set(re.findall(r"by \((\w+)\)", target["expr"]))
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= left


def test_layout():
    assert DASHBOARD["schemaVersion"] >= 39  # Grafana 10's
    assert [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"] == ROWS
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + right, place["y"] + down) for right in range(place["w"]) for down in range(place["h"])}
        assert not cells & taken and all(column < GRID_WIDTH for column, _ in cells), panel["title"]
        taken |= cells
    for panel in PANELS:
        assert panel["targets"] and panel["datasource"]["uid"] == "${datasource}"
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
