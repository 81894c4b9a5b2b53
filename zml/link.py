"""Where the roles meet ZeroMQ: which endpoints a process has, and the thread in which a script's live."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import uvloop

from .errors import BAD_KEYS, OPEN_BIND, PORT_IN_USE, USAGE, ZmlError
from .messages import AnyMessage
from .seat import Seat
from .transport import (
    BULK,
    CONTROL,
    AddressInUse,
    BadAddress,
    BadKeys,
    Endpoint,
    Handler,
    OpenBind,
)
from .transport.endpoint import ZmqEndpoint
from .transport.keys import Keys

if TYPE_CHECKING:
    from .config import Settings

T = TypeVar("T")
MB = 1 << 20
# A layout of many parameters is the one large control message: as much as `layout.MOST_BYTES`, and its envelope.
CONTROL_LIMITS = replace(CONTROL, payload_bytes=5 * MB, credit_bytes=10 * MB)
BULK_LIMITS = BULK
