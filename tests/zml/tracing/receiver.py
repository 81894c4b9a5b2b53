"""A receiver of OTLP over HTTP, as Jaeger or a collector is one: it decodes what comes, and keeps it."""

import gzip
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Received:
    """A span as it came. Ids are hex; times are nanoseconds since the Unix epoch."""

    service: str
    instance: str
    name: str
    trace: str
    span: str
    parent: str
    began: int
    ended: int
    kind: int
    error: str
    links: tuple[str, ...]
    attributes: dict[str, Any]


def value_of(value: Any) -> Any:
    return getattr(value, value.WhichOneof("value"))


def read(body: bytes) -> list[Received]:
    request = ExportTraceServiceRequest.FromString(body)
    found = []
    for block in request.resource_spans:
        resource = {each.key: value_of(each.value) for each in block.resource.attributes}
        for scope in block.scope_spans:
            for span in scope.spans:
                assert span.status.code in (0, 2), "unset, or an error"
                found.append(
                    Received(
                        resource["service.name"],
                        resource["service.instance.id"],
                        span.name,
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        span.start_time_unix_nano,
                        span.end_time_unix_nano,
                        span.kind,
                        span.status.message if span.status.code else "",
                        tuple(link.span_id.hex() for link in span.links),
                        {each.key: value_of(each.value) for each in span.attributes},
                    )
                )
    return found


class Receiver:
    """Listens on a port that the system chooses, at /v1/traces. A context manager."""

    def __init__(self) -> None:
        self.spans: list[Received] = []
        self.lock = threading.Lock()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                right = self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf"
                if right:
                    spans = read(body)
                    with receiver.lock:
                        receiver.spans += spans
                self.send_response(200 if right else 404)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Receiver":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
