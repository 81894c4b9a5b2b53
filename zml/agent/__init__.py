"""`zml worker`: the agent. It joins for a script, starts it, reads what it prints, and keeps the lease while it hangs.

Rule: nothing here loads torch, so an agent is small and starts at once; the script's own side is `zml.worker`."""
