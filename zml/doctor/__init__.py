"""`zml doctor`: is this machine fit to take part, and is a cluster well that runs?

findings   what is found, as data
machine    the checks of one machine: versions, limits, disk
network    the same: names, addresses, interfaces, the clock
graphics   the same: GPUs, their driver, the CUDA that torch was built for
slurm      the same: inside a job, is all there that zml needs to know?
answering  a member of a cluster is asked how it is, and answers while it trains
desk       the coordinator answers, and hands on what is for others
means      what it looks and measures with
links      how long a message takes to another member, how fast many are
cluster    asks all members, each within a deadline
verdicts   what the answers add up to
telling    how checks are told
summary    and those of a cluster, in few lines

Rule: what is broken must not break the doctor. Nothing here loads torch, and `machine` and its like not even zmq.
"""
