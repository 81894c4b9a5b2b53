"""A run in a browser: while it goes on, years later, and as one file to attach to a ticket.

    run directory -> `run` (reads what is new) -> pure functions (what was read in, views out) -> `serving` | `page`

`views` declares what the pages are given; `overview`, `members` and `findings` make it, `steps` and `telling` from
files of their own; `sources` says which runs there are, `mounting` puts it beside `/metrics`. Nothing is written, and
every answer is bounded however long the run is. `static/` holds the pages: hand-written ES modules and one style
sheet, served as they are, and uPlot 1.6.32 (MIT, Leon Sorokin). There is no build, and nothing is fetched from
elsewhere.
"""
