"""The other process of `wire.py`: takes what is pushed, acknowledges it, and says what CPU time that cost.

Not for people: started with one JSON argument, it prints one line of JSON with its addresses, then answers each line
of its input ("cpu", "latency") with one line, and ends when its input does.
"""

import json
import os
import resource
import sys
from typing import Any

import checkout  # noqa: F401
import rivals
import routes


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def quiet() -> None:
    """Only warnings, and not into the answers."""
    import logging

    import structlog

    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def main() -> None:
    order: dict[str, Any] = json.loads(sys.argv[1])
    quiet()
    addresses: dict[str, Any] = {}
    largest = int(order["largest"])
    thread = routes.LoopThread()
    if "tcp" in order["ways"]:
        addresses["tcp"] = routes.serve_tcp(largest)
    if "grpc" in order["ways"]:
        addresses["grpc"] = rivals.serve_grpc(thread)
    if "gloo" in order["ways"]:
        addresses["gloo"] = order["gloo_port"]
        rivals.serve_gloo(order["gloo_port"], largest)
    if "zml" in order["ways"]:
        import zml_routes

        addresses["zmq"] = routes.serve_zmq(thread)
        addresses["zml"] = zml_routes.serve(thread, order["folder"])
    print(json.dumps(addresses), flush=True)
    for line in sys.stdin:
        if line.strip() == "cpu":
            print(json.dumps(cpu_s()), flush=True)
    os._exit(0)  # threads that still wait for the other side are of no interest any more


if __name__ == "__main__":
    main()
