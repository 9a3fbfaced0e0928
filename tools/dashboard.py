"""Write the Grafana dashboard: ``python tools/dashboard.py``, or ``--check`` that it is current.

Grafana's JSON repeats some sixty lines for each panel; what a panel shows stands in ``dashboard_panels``.
"""

import json
import sys
from pathlib import Path
from typing import Any

from dashboard_panels import ROWS, Panel, Query

TARGET = Path(__file__).parent.parent / "deploy" / "grafana" / "dashboards" / "gptoss.json"

WIDTH = 24


def main() -> int:
    text = json.dumps(dashboard(), indent=2) + "\n"
    if "--check" not in sys.argv[1:]:
        TARGET.parent.mkdir(parents=True, exist_ok=True)
        TARGET.write_text(text, encoding="utf-8")
        return 0
    if TARGET.exists() and TARGET.read_text(encoding="utf-8") == text:
        return 0
    print(f"{TARGET.name} is not current; run python tools/dashboard.py", file=sys.stderr)
    return 1


def dashboard() -> dict[str, Any]:
    """The whole document, as Grafana 11 and newer import it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row, members in ROWS.items():
        panels.append({"type": "row", "title": row, "collapsed": False, "panels": [], "gridPos": _at(0, y, WIDTH, 1)})
        y += 1
        height = 4 if members[0].kind == "stat" else 8
        across = len(members) if members[0].kind == "stat" else min(3, len(members))
        for start in range(0, len(members), across):
            line = members[start : start + across]
            width = WIDTH // len(line)
            panels += [_panel(panel, _at(index * width, y, width, height)) for index, panel in enumerate(line)]
            y += height
    return {
        "uid": "gptoss",
        "title": "gptoss",
        "tags": ["gptoss", "llm"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": [_firing_alerts()]},
        "templating": {"list": _variables()},
        "panels": [{"id": index, **panel} for index, panel in enumerate(panels, 1)],
    }


def _panel(panel: Panel, where: dict[str, int]) -> dict[str, Any]:
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "gridPos": where,
        "datasource": _SOURCE,
        "targets": [_target(query, "ABCDEF"[index], panel.kind) for index, query in enumerate(panel.queries)],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _OPTIONS[panel.kind],
    }


def _target(query: Query, ref: str, kind: str) -> dict[str, Any]:
    return {
        "refId": ref,
        "datasource": _SOURCE,
        "expr": query.expr,
        "legendFormat": query.legend,
        "exemplar": query.exemplars,
        "range": kind != "stat",
        "instant": kind == "stat",
        "format": "heatmap" if kind == "heatmap" else "time_series",
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    if panel.kind == "heatmap":
        return {}
    good, bad = ("red", "green") if panel.is_floor else ("green", "red")
    steps: list[dict[str, Any]] = [{"color": good if panel.limit is not None else "blue", "value": None}]
    if panel.limit is not None:
        steps.append({"color": bad, "value": panel.limit})
    found: dict[str, Any] = {"unit": panel.unit, "min": 0, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.unit == "percentunit":
        found["decimals"] = 1
    if panel.kind == "timeseries":
        found["custom"] = {
            "drawStyle": "line",
            "fillOpacity": 20 if panel.stacked else 0,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stacked else "none"},
            "thresholdsStyle": {"mode": "line" if panel.limit is not None else "off"},
        }
    return found


def _variables() -> list[dict[str, Any]]:
    def query(name: str, expr: str, *, several: bool) -> dict[str, Any]:
        return {
            "name": name,
            "type": "query",
            "datasource": _SOURCE,
            "query": {"query": expr, "refId": name},
            "refresh": 2,
            "sort": 1,
            "multi": several,
            "includeAll": several,
            **({"allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]}} if several else {}),
        }

    return [
        {"name": "source", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1},
        query("job", "label_values(gptoss_executor_ready, job)", several=False),
        query("instance", 'label_values(gptoss_executor_ready{job="$job"}, instance)', several=True),
    ]


def _firing_alerts() -> dict[str, Any]:
    return {
        "name": "Alerts",
        "enable": True,
        "datasource": _SOURCE,
        "expr": 'ALERTS{alertname=~"Gptoss.*", alertstate="firing"}',
        "titleFormat": "{{alertname}}",
        "textFormat": "{{instance}}",
        "iconColor": "red",
        "step": "30s",
    }


def _at(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


_SOURCE = {"type": "prometheus", "uid": "${source}"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "colorMode": "value",
        "graphMode": "none",
        "textMode": "value",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    },
    "heatmap": {
        "calculate": False,
        "cellGap": 1,
        "yAxis": {"unit": "s"},
        "color": {"mode": "scheme", "scheme": "Spectral", "steps": 64},
        "exemplars": {"color": "rgba(255,0,255,0.7)"},
        "tooltip": {"mode": "single", "yHistogram": False},
        "legend": {"show": True},
    },
}


if __name__ == "__main__":
    raise SystemExit(main())
