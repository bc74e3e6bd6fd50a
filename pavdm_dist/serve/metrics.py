"""What Prometheus reads of a server: what waits, what is under way, what has become of the rest."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from pavdm_dist.serve.front_desk import FrontDesk


class _Desk(Collector):
    def __init__(self, desk: FrontDesk) -> None:
        self._desk = desk

    def collect(self) -> Iterator[Metric]:
        desk, counts, figures = self._desk, self._desk.counts, self._desk.figures
        yield GaugeMetricFamily("pavdm_serve_queued_videos", "Videos that wait for a renderer.", figures["waiting"])
        yield GaugeMetricFamily("pavdm_serve_running_videos", "Videos that are being rendered.", figures["running"])
        yield GaugeMetricFamily("pavdm_serve_queue_limit", "http.max_queue.", desk.config.http.max_queue)
        yield GaugeMetricFamily("pavdm_serve_renderers", "Renderers that are up, or coming up.", figures["renderers"])
        ended = CounterMetricFamily("pavdm_serve_videos", "Videos by what became of them.", labels=["end"])
        for end in ("asked", "done", "failed", "cancelled"):
            ended.add_metric([end], getattr(counts, end))
        yield ended
        yield CounterMetricFamily("pavdm_serve_refused", "Requests refused because of a full queue.", counts.refused)
        yield CounterMetricFamily("pavdm_serve_retries", "Videos that go back to the queue.", counts.retried)
        yield CounterMetricFamily("pavdm_serve_chunks", "Chunks that were written.", counts.chunks)
        yield CounterMetricFamily("pavdm_serve_frames", "Frames that were written.", counts.frames)
        yield CounterMetricFamily("pavdm_serve_prompt_changes", "Prompts changed in mid-video.", counts.prompts)
        idle = CounterMetricFamily("pavdm_serve_renderer_idle_seconds", "Idle although videos waited.")
        idle.add_metric([], figures["idle_s"])
        yield idle
        if counts.first_chunk_s is not None:
            what = "From the request to the first chunk, newest video."
            yield GaugeMetricFamily("pavdm_serve_first_chunk_seconds", what, counts.first_chunk_s)


def exposition(desk: FrontDesk) -> tuple[bytes, str]:
    """The metrics in Prometheus' text format, and its content type."""
    registry = CollectorRegistry()
    registry.register(_Desk(desk))
    return generate_latest(registry), CONTENT_TYPE_LATEST
