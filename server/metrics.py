"""Prometheus metrics: what was asked for over HTTP, and what the scheduler last said about queue and replicas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import prometheus_client
from fastapi import APIRouter, Response
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..protocol.replicas import ReplicaStatus
from .answers import READING, answers
from .scheduler_link import SchedulerLink

_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

_REPLICA_COUNTERS = {
    "forwards": "Forwards that the replica has run since its start",
    "calls": "Calls of pipelines to components that these forwards answered",
    "outputs": "Outputs that the replica has finished since its start",
    "cancelled": "Requests whose work was cancelled in the replica since its start",
    "failed": "Requests that failed in the replica since its start",
    "predicted_calls": "Calls that guidance pairing made beside the first call of a step",
    "tiled_calls": "Calls of autoencoders that were computed in tiles",
    "divided_forwards": "Forwards whose rows several ranks have shared",
    "skipped_forwards": "Calls of denoisers that step caches answered without a forward",
    "missed_predictions": "Calls that guidance pairing made and no pipeline asked for",
}

_GRAPH_COUNTERS = {
    "captures": "Calls of blocks that were captured as CUDA graphs",
    "replays": "Calls of blocks that a CUDA graph answered",
    "misses": "Calls of blocks that ran eagerly though CUDA graphs are on",
    "evictions": "Shapes whose CUDA graphs were dropped for lack of memory",
}


_COMPILED_COUNTERS = {
    "graphs": "Graphs that were compiled of the component's blocks",
    "seconds": "Seconds that the compiler has worked on the component",
    "block_calls": "Calls of the component's blocks that ran a compiled graph",
    "eager_block_calls": "Calls of the component's blocks that ran eagerly for lack of a graph",
    "kinds": "Kinds of calls of the component's blocks that have a graph",
    "kinds_over_limit": "Kinds of calls that run eagerly because their class of blocks has too many graphs",
}


class Metrics(Collector):
    """The metrics of one server, in a registry of their own."""

    def __init__(self, link: SchedulerLink) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "safelight_requests",
            "HTTP requests that ended; status 499 counts clients that went away before their answer",
            ("route", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "safelight_request_seconds",
            "Seconds from a request's first line to its answer's last byte",
            ("route",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._outputs = Counter("safelight_outputs", "Outputs sent to clients", registry=self._registry)
        self._link = link
        self._registry.register(self)

    def count_request(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def count_outputs(self, number: int) -> None:
        self._outputs.inc(number)

    def exposition(self) -> bytes:
        """Everything in Prometheus's text format."""
        return prometheus_client.generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Read the scheduler's last status, so there is no second copy of it."""
        status = self._link.status
        yield GaugeMetricFamily("safelight_queued_requests", "Requests that wait in the queue", status.queued)
        yield GaugeMetricFamily("safelight_running_requests", "Requests that replicas work on", status.running)
        yield GaugeMetricFamily(
            "safelight_queued_operations", "Operations that wait for others", status.queued_operations
        )
        yield GaugeMetricFamily("safelight_queued_bytes", "Bytes of all that waits", status.queued_bytes)
        hold = GaugeMetricFamily(
            "safelight_hold_seconds", "Seconds that an operation has held back what came after it", labels=["operation"]
        )
        if status.hold is not None:
            hold.add_metric([status.hold.operation], status.hold.held_s)
        yield hold
        halted = GaugeMetricFamily("safelight_halted_seconds", "Seconds without any start", labels=["reason"])
        if status.halted is not None:
            halted.add_metric([status.halted], status.halted_s)
        yield halted
        up = GaugeMetricFamily("safelight_replica_up", "1 while the replica takes requests", labels=["replica"])
        for replica in status.replicas:
            up.add_metric([str(replica.replica)], float(replica.state == "ready"))
        yield up
        for name, description in _REPLICA_COUNTERS.items():
            family = CounterMetricFamily(f"safelight_replica_{name}", description, labels=["replica"])
            for replica in status.replicas:
                family.add_metric([str(replica.replica)], getattr(replica.stats, name))
            yield family
        yield from _graph_metrics(status.replicas)
        yield from _compiled_metrics(status.replicas)
        yield self._merge_limits()

    def _merge_limits(self) -> Metric:
        family = GaugeMetricFamily(
            "safelight_replica_merge_limit",
            "Outputs that may share a forward of the component's most recent kind of call, by measured times",
            labels=["replica", "call"],
        )
        for replica in self._link.status.replicas:
            newest = {limit.name: limit.outputs for limit in replica.stats.merge_limits}
            for name, outputs in newest.items():
                family.add_metric([str(replica.replica), name], outputs)
        return family


def _compiled_metrics(replicas: Sequence[ReplicaStatus]) -> Iterator[Metric]:
    """Compiled components, by replica and component."""
    labels = ["replica", "component"]
    families = {
        name: CounterMetricFamily(f"safelight_compiled_{name}", description, labels=labels)
        for name, description in _COMPILED_COUNTERS.items()
    }
    for replica in replicas:
        for component, stats in replica.stats.compiled.items():
            label = [str(replica.replica), component]
            families["graphs"].add_metric(label, sum(stats.graphs.values()))
            families["seconds"].add_metric(label, stats.compile_s)
            families["block_calls"].add_metric(label, stats.calls - stats.eager_calls)
            families["eager_block_calls"].add_metric(label, stats.eager_calls)
            families["kinds"].add_metric(label, stats.kinds)
            families["kinds_over_limit"].add_metric(label, stats.kinds_over_limit)
    yield from families.values()


def _graph_metrics(replicas: Sequence[ReplicaStatus]) -> Iterator[Metric]:
    for name, description in _GRAPH_COUNTERS.items():
        family = CounterMetricFamily(f"safelight_replica_graph_{name}", description, labels=["replica"])
        for replica in replicas:
            family.add_metric([str(replica.replica)], getattr(replica.stats.graphs, name))
        yield family
    memory = GaugeMetricFamily("safelight_replica_graph_mb", "Megabytes of CUDA graphs", labels=["replica"])
    for replica in replicas:
        memory.add_metric([str(replica.replica)], replica.stats.graphs.mb)
    yield memory


def routes(metrics: Metrics) -> APIRouter:
    router = APIRouter(tags=["information"])

    @router.get("/metrics", summary="Metrics in Prometheus's text format", responses=answers("The metrics", READING))
    async def read_metrics() -> Response:
        return Response(metrics.exposition(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    return router
