# SPDX-License-Identifier: Apache-2.0
"""The Grafana dashboard as code; `make dashboard` writes it as JSON.

python deploy/grafana/dashboard.py              # writes dashboards/kvserve.json
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    prometheus,
    stat,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueTextMode
from grafana_foundation_sdk.models.dashboard import (
    Dashboard,
    DataSourceRef,
    VariableOption,
    VariableRefresh,
)

FILE = Path(__file__).parent / "dashboards" / "kvserve.json"

_PROMETHEUS = DataSourceRef(type_val="prometheus", uid="${datasource}")
_ON = '{instance=~"$instance"}'
_COLUMNS = 24


@dataclass(frozen=True)
class Query:
    """A PromQL query and the name of its curve."""

    expression: str
    legend: str

    @property
    def target(self) -> prometheus.Dataquery:
        query = prometheus.Dataquery().expr(self.expression)
        return query.legend_format(self.legend).datasource(_PROMETHEUS)


@dataclass(frozen=True)
class Shown:
    """One panel: what it shows, in which unit, and what a reader should make of it.

    Attributes:
        unit: a unit of Grafana's, such as ``bytes`` or ``percentunit``.
        value: show the present value, large, instead of curves.
    """

    title: str
    unit: str
    about: str
    queries: tuple[Query, ...]
    value: bool = False

    def panel(self) -> stat.Panel | timeseries.Panel:
        """Build the panel, queries named A, B, C."""
        panel = self._value() if self.value else self._curves()
        panel.title(self.title).description(self.about).unit(self.unit)
        panel.datasource(_PROMETHEUS)
        for letter, query in zip("ABCDEF", self.queries, strict=False):
            panel.with_target(query.target.ref_id(letter))
        return panel

    def _value(self) -> stat.Panel:
        panel = stat.Panel().height(4).span(_COLUMNS // len(GLANCE))
        panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        if self.unit == "string":
            panel.text_mode(BigValueTextMode.NAME)
        return panel

    def _curves(self) -> timeseries.Panel:
        legend = common.VizLegendOptions().show_legend(True)
        panel = timeseries.Panel().height(8).span(_COLUMNS // 3).legend(legend)
        return panel.fill_opacity(10).min(0)


def _total(metric: str, legend: str) -> Query:
    return Query(f"sum({metric}{_ON})", legend)


def _rate(metric: str, legend: str) -> Query:
    return Query(f"sum(rate({metric}{_ON}[$__rate_interval]))", legend)


def _quantiles(histogram: str) -> tuple[Query, ...]:
    rate = f"sum by (le) (rate({histogram}_bucket{_ON}[$__rate_interval]))"
    return tuple(
        Query(f"histogram_quantile({share}, {rate})", name)
        for share, name in ((0.5, "p50"), (0.9, "p90"), (0.99, "p99"))
    )


GLANCE = (
    Shown(
        "Policy",
        "string",
        "The cache policy that each instance was started with.",
        (Query(f"kvserve_policy_info{_ON}", "{{policy}}"),),
        value=True,
    ),
    Shown(
        "Compression",
        "none",
        "Bytes that a cache that evicts nothing would hold, over bytes held. 1 when "
        "nothing runs, or nothing is long enough to be evicted from.",
        (
            Query(
                f"sum(kvserve_kv_bytes_full{_ON}) "
                f"/ (sum(kvserve_kv_bytes_held{_ON}) > 0) "
                f"or avg(kvserve_compression_ratio{_ON})",
                "full / held",
            ),
        ),
        value=True,
    ),
    Shown(
        "KV memory saved",
        "bytes",
        "Bytes that running requests do not hold thanks to the policy.",
        (_total("kvserve_kv_bytes_saved", "saved"),),
        value=True,
    ),
    Shown(
        "KV cache in use",
        "percentunit",
        "Share of the pool that requests hold; when it nears 100 %, requests wait.",
        (Query(f"max(vllm:kv_cache_usage_perc{_ON})", "fullest instance"),),
        value=True,
    ),
    Shown(
        "Running",
        "none",
        "Requests in the batch.",
        (_total("vllm:num_requests_running", "running"),),
        value=True,
    ),
    Shown(
        "Waiting",
        "none",
        "Requests that wait for room in the batch or the pool.",
        (_total("vllm:num_requests_waiting", "waiting"),),
        value=True,
    ),
)

MEMORY = (
    Shown(
        "KV memory: held against a full cache",
        "bytes",
        "What requests hold, and what they would hold if nothing were evicted.",
        (
            _total("kvserve_kv_bytes_held", "held"),
            _total("kvserve_kv_bytes_full", "full cache"),
        ),
    ),
    Shown(
        "Head pages",
        "none",
        "The pool: pages that requests hold, pages that are free, and all.",
        (
            _total("kvserve_pages_held", "held"),
            _total("kvserve_pages_free", "free"),
            _total("kvserve_pages_total", "total"),
            _total("kvserve_dense_prefill_pages", "held by dense prefills"),
        ),
    ),
    Shown(
        "KV entries: retained against seen",
        "none",
        "An entry is a token in a KV head of a layer, over running requests.",
        (
            _total("kvserve_retained_tokens", "retained"),
            _total("kvserve_seen_tokens", "seen"),
        ),
    ),
    Shown(
        "Evictions",
        "ops",
        "KV entries evicted a second.",
        (_rate("kvserve_evictions_total", "entries/s"),),
    ),
    Shown(
        "Time spent on the policy",
        "percentunit",
        "Worker time that goes into choosing survivors and moving them.",
        (
            _rate("kvserve_selection_seconds_total", "selection"),
            _rate("kvserve_compaction_seconds_total", "compaction"),
        ),
    ),
    Shown(
        "Preemptions",
        "ops",
        "Requests a second that lost their pages and start over. Above 0, the pool is "
        "too small for the batch.",
        (_rate("vllm:num_preemptions_total", "preemptions/s"),),
    ),
)

REQUESTS = (
    Shown(
        "Requests",
        "none",
        "In the batch, and waiting for it.",
        (
            _total("vllm:num_requests_running", "running"),
            _total("vllm:num_requests_waiting", "waiting"),
        ),
    ),
    Shown(
        "Tokens a second",
        "none",
        "Prompt tokens read and tokens generated.",
        (
            _rate("vllm:prompt_tokens_total", "prompt"),
            _rate("vllm:generation_tokens_total", "generated"),
        ),
    ),
    Shown(
        "Finished requests",
        "reqps",
        "By reason: stop, length, abort.",
        (
            Query(
                "sum by (finished_reason) "
                f"(rate(vllm:request_success_total{_ON}[$__rate_interval]))",
                "{{finished_reason}}",
            ),
        ),
    ),
    Shown(
        "Time to first token",
        "s",
        "From arrival, waiting included.",
        _quantiles("vllm:time_to_first_token_seconds"),
    ),
    Shown(
        "Time between tokens",
        "s",
        "Of one reply.",
        _quantiles("vllm:inter_token_latency_seconds"),
    ),
    Shown(
        "Time in the queue",
        "s",
        "Before a request first runs.",
        _quantiles("vllm:request_queue_time_seconds"),
    ),
)

ROWS = {
    "At a glance": GLANCE,
    "What compression does": MEMORY,
    "What users see": REQUESTS,
}


def build() -> Dashboard:
    """Build the dashboard."""
    board = dashboard.Dashboard("kvserve").uid("kvserve").tags(["kvserve", "vllm"])
    board.description("KV-cache compression and serving. Generated: see dashboard.py.")
    board.time("now-15m", "now").refresh("5s").timezone("browser").editable()
    board.with_variable(
        dashboard.DatasourceVariable("datasource")
        .label("Data source")
        .type("prometheus")
    )
    board.with_variable(
        dashboard.QueryVariable("instance")
        .label("Instance")
        .datasource(_PROMETHEUS)
        .query("label_values(vllm:num_requests_running, instance)")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(text="All", value="$__all"))
    )
    numbers = itertools.count(1)
    for title, panels in ROWS.items():
        board.with_row(dashboard.Row(title).id(next(numbers)))
        for shown in panels:
            board.with_panel(shown.panel().id(next(numbers)))
    return board.build()


def render() -> str:
    """The JSON that Grafana reads."""
    return json.dumps(build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    FILE.write_text(render(), encoding="utf-8")
    print(f"wrote {FILE}")
