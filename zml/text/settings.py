"""Settings as people read them: numbers that stand for something else are said in words."""

from typing import Any

NEVER = {0: "never"}
MEANS: dict[str, dict[Any, str]] = {
    "staleness": {0: "sync", None: "async"},
    "outer_lr": {0.0: "auto"},
    "warm_up_steps": {-1: "auto"},
    "lr_base_workers": {0: "auto"},
    "checkpoint_steps": NEVER,
    "checkpoint_minutes": NEVER,
    "keep_every_steps": NEVER,
}


def in_words(key: str, value: Any) -> str:
    """ "-" for what is empty."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    if isinstance(value, bool):
        return str(value).lower()
    if (meant := MEANS.get(key, {}).get(value)) is not None:
        return meant
    return str(value) or "-"


def lines(settings: dict[str, Any], origins: dict[str, str]) -> list[str]:
    """Name, value and origin of each, in columns."""
    rows = [(key, in_words(key, value), origins[key]) for key, value in settings.items()]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return [f"{key:<{first}}  {value:<{min(second, 40)}}  {origin}" for key, value, origin in rows]
