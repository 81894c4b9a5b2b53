"""A job of zml in one allocation of Slurm, and allocations that come and go.

    zml slurm submit -N 4 -w 8 -p 2 train.py
      -> sbatch -> the batch step on the allocation's first node: `head`
           -> srun, one step for each member: `role` -> zml coordinator | ps | worker

`shape`, `step`, `script`, `address`, `folder`, `verdict` and `table` decide or read; `head`, `role`, `commands` and
the providers act. Slurm is asked for processes and told when to come again; who is alive, and who takes whose place,
is known from zml's own heartbeats, for Slurm notices the death of a node after minutes (`SlurmdTimeout`, by default
300 s).
"""
