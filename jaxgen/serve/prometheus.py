"""What the server counts and times, as text that Prometheus reads.

Queued and running requests, the share of the cache in use and the cache's blocks are what gateways
of the Gateway API Inference Extension choose a server by.
"""

from collections.abc import Callable, Iterator

import prometheus_client as prometheus
from prometheus_client import metrics_core

from jaxgen.serve.stats import EngineStats

# When a count began is of no use to anybody here, and doubles the text.
prometheus.disable_created_metrics()

CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST

_TIMES = {
    "time_to_first_token": (
        "From a request's arrival to its first token.",
        (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
    ),
    "time_per_output_token": (
        "Between tokens, the mean of a request.",
        (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1),
    ),
    "request_duration": (
        "From a request's arrival to its last token.",
        (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
    ),
}


class Metrics:
    """Counts of one server, and of its engine when they are read."""

    def __init__(self, stats: Callable[[], EngineStats | None], model: str):
        """Starts at zero.

        Args:
            stats: returns the engine's `EngineStats`, or None before there is an engine.
            model: what the server calls it.
        """
        self._registry = prometheus.CollectorRegistry()
        self._registry.register(_EngineCollector(stats, model))
        named = {"registry": self._registry}
        self._times = {
            name: prometheus.Histogram(
                f"jaxgen_{name}_seconds", text, ("model_name",), buckets=buckets, **named
            ).labels(model)
            for name, (text, buckets) in _TIMES.items()
        }
        self._ended = prometheus.Counter(
            "jaxgen_requests",
            "Answers that have ended, and why.",
            ("model_name", "reason"),
            **named,
        )
        self._responses = prometheus.Counter(
            "jaxgen_http_responses", "Responses, by path and status.", ("path", "status"), **named
        )
        self._model = model

    def ended(self, reason: str) -> None:
        """Counts an answer by why it has ended."""
        self._ended.labels(self._model, reason).inc()

    def timed(self, arrived: float, first: float, last: float, tokens: int) -> None:
        """Takes in when a request and its first and last token came, on one clock."""
        self._times["time_to_first_token"].observe(first - arrived)
        self._times["request_duration"].observe(last - arrived)
        if tokens > 1:
            self._times["time_per_output_token"].observe((last - first) / (tokens - 1))

    def responded(self, path: str, status: int) -> None:
        """Counts a response."""
        self._responses.labels(path, str(status)).inc()

    def text(self) -> bytes:
        """Returns all counts now."""
        return prometheus.generate_latest(self._registry)


class _EngineCollector:
    """Reads the engine's own counts whenever Prometheus asks."""

    def __init__(self, stats: Callable[[], EngineStats | None], model: str):
        self._stats, self._model = stats, model

    def collect(self) -> Iterator[metrics_core.Metric]:
        """Yields one family of metrics after the other."""
        stats = self._stats()
        if stats is None:
            return
        gauges = {
            "requests_waiting": ("Requests that wait for a place.", stats.queued),
            "requests_running": ("Requests that are being served.", stats.running),
            "kv_cache_utilization": (
                "Share of the cache's blocks that requests hold.",
                stats.blocks_used / stats.blocks,
            ),
        }
        counters = {
            "prompt_tokens": ("Tokens of prompts.", stats.prompt_tokens),
            "prefix_cache_hit_tokens": (
                "Tokens of prompts that the prefix cache held.",
                stats.prompt_tokens_found,
            ),
            "generation_tokens": ("Tokens of answers.", stats.tokens_generated),
            "speculative_drafted_tokens": (
                "Tokens guessed for the model to verify.",
                stats.tokens_drafted,
            ),
            "speculative_accepted_tokens": (
                "Of these, those that it drew itself.",
                stats.tokens_accepted,
            ),
            "preemptions": ("Times that a request had to make room.", stats.preemptions),
            "reloads": ("Times that the weights were replaced.", stats.reloads),
            "recompiles": ("Programs compiled since the engine was ready.", stats.recompiles),
            "decode_bytes": ("Bytes a device had to read to decode.", stats.decode_bytes),
            "decode_seconds": ("What decoding them took.", stats.decode_s),
        }
        if stats.decode_roofline_s is not None:
            text = "What it would have taken at the device's peak."
            counters["decode_roofline_seconds"] = text, stats.decode_roofline_s
        if stats.roofline_fraction is not None:
            text = "Share of the decode roofline, of recent bursts."
            gauges["decode_roofline_fraction"] = text, stats.roofline_fraction
        kinds = (
            (metrics_core.GaugeMetricFamily, gauges),
            (metrics_core.CounterMetricFamily, counters),
        )
        for family, values in kinds:
            for name, (text, value) in values.items():
                metric = family(f"jaxgen_{name}", text, labels=["model_name"])
                metric.add_metric([self._model], value)
                yield metric
        info = metrics_core.InfoMetricFamily("jaxgen_cache_config", "The paged cache.")
        info.add_metric([], {"block_size": str(stats.block_size), "num_blocks": str(stats.blocks)})
        yield info
        weights = metrics_core.InfoMetricFamily("jaxgen_weights", "The weights that answer.")
        weights.add_metric([], {"model_name": self._model, "version": stats.weight_version})
        yield weights
