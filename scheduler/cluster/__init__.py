"""Which job gets which machines, and when: the decisions over many jobs and nodes. The life of one job is in `machine`.

    events -> machine -> view -> policy -> plan -> actions

A policy is asked for the whole picture, who should have what from now on, and the machine turns the difference to what
is into orders. The simulator asks the same policies about traces.
"""
