"""Counters of the service in Prometheus' format. They hold sizes and times, but no name or content of a file."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
FILES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BYTES = tuple(10.0**n for n in range(2, 9))


class Metrics:
    """The counters of one service. It has its own registry, so a process may have several services."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("bfsys_requests", "Requests answered.", ("path", "status"), registry=registry)
        self.seconds = Histogram(
            "bfsys_request_seconds", "From the head of a request to the end of its answer.", ("path",),
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.files = Counter("bfsys_files", "Files received.", registry=registry)
        self.bytes = Counter("bfsys_file_bytes", "Bytes of files received.", registry=registry)
        self.refused_files = Counter("bfsys_refused_files", "Files without an answer.", registry=registry)
        self.batch_files = Histogram(
            "bfsys_batch_files", "Files that were computed together.", buckets=FILES, registry=registry
        )
        self.batch_bytes = Histogram(
            "bfsys_batch_bytes", "Bytes that were computed together.", buckets=BYTES, registry=registry
        )
        self.in_progress = Gauge(
            "bfsys_requests_in_progress", "Requests received, waiting or computed.", registry=registry
        )
        self.queue = Gauge("bfsys_queue_files", "Files that wait for the model.", registry=registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)
