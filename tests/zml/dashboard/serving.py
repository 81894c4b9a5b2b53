"""A dashboard in a thread with a loop of its own, which can be ended and begun again at the same address."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from zml.dashboard.serving import Limits
from zml.dashboard.sources import Source
from zml.dashboard.standing import serving
from zml.web.access import Door, Token

QUICK = Limits(every_s=0.1, still_s=0.3)


class Dashboard:
    """`url` from `start` on; it stays the same."""

    def __init__(self, source: Source, door: Door | None = None, limits: Limits = QUICK) -> None:
        self.source = source
        self.door = door or Door("127.0.0.1")
        self.limits = limits
        self.port = 0
        self.url = ""
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        begun, self.over = threading.Event(), threading.Event()

        async def main() -> None:
            async with serving(self.source, self.door, "127.0.0.1", self.port, limits=self.limits) as url:
                self.url, self.port = url, int(url.rpartition(":")[2].strip("/"))
                begun.set()
                await asyncio.to_thread(self.over.wait)

        self.thread = threading.Thread(target=lambda: asyncio.run(main()))
        self.thread.start()
        assert begun.wait(20)

    def stop(self) -> None:
        if self.thread is not None:
            self.over.set()
            self.thread.join(20)
            self.thread = None

    def ask(
        self,
        path: str,
        *,
        method: str = "GET",
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        place = urlsplit(self.url)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=20)
        try:
            connection.request(method, path, body=body, headers=dict(headers or {}))
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()


class Answer:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@contextmanager
def dashboard(source: Source, tokens: tuple[str, ...] = (), limits: Limits = QUICK) -> Iterator[Dashboard]:
    door = Door("127.0.0.1", tuple(Token(text) for text in tokens))
    served = Dashboard(source, door, limits)
    served.start()
    try:
        yield served
    finally:
        served.stop()
