"""`zml simulate`: the scheduler's own code on recorded workloads, in simulated time.

`workloads` and `measured` read files, `work` says what a job does with the nodes it has, `engine` lets time pass and
asks the policy, `report` sums up, `plot` draws. Nothing here decides anything: that is `zml.scheduler.cluster`.
"""
