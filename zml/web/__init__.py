"""The HTTP API of the standing coordinator: what a `Desk` answers, for whoever speaks HTTP.

    request -> `access` (who asks) -> `asking` (what for) -> `handlers` -> zml.cluster.jobs.Desk

`routes` is the one table of what can be asked: the server takes its paths from it and `openapi` its description, so
that neither can say what the other does not. Only `server`, `asking` and `handlers` know aiohttp; `bodies` is also
what clients read.
"""
