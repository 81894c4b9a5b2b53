"""`zml top`: a job, or a cluster of jobs, watched live on a terminal.

`source` asks, in a thread of its own; `known` keeps what was told and makes rates of it; `screen` decides what a key
does; `picture` makes the lines; `terminal` reads keys and writes lines, and is the only one that touches the terminal.
Whatever decides is pure: the same status, keys and size give the same lines.
"""
