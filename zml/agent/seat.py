"""What an agent tells the script it starts: who it is and where the coordinator listens.

It travels in one environment variable, because the script's command line belongs to the user.
"""

import os

import msgspec

from ..messages import JobSpec

VARIABLE = "ZML_SEAT"


class Seat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One worker's place in a job."""

    job: str
    worker: str
    incarnation: int
    coordinator: list[str]  # its addresses, the nearest first
    keys: str = ""  # folder with CURVE keys, empty without
    run_dir: str = ""
    bucket_chunks: int = 8
    spec: JobSpec = JobSpec()  # what was asked for
    patience_s: float = 600.0  # how long a step may wait for other members before the script gives up
    run: str = ""  # the run directory as the coordinator calls it: the same for all workers
    heartbeat_s: float = 0.15  # of its agent
    trace: str = "off"  # which steps are traced, as the setting says

    def to_environment(self) -> dict[str, str]:
        return {VARIABLE: msgspec.json.encode(self).decode()}

    @staticmethod
    def from_environment() -> "Seat | None":
        text = os.environ.get(VARIABLE)
        return msgspec.json.decode(text, type=Seat) if text else None
