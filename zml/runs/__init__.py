"""Runs on disk: the run directory, what is written into it while a run goes on, and what it tells afterwards.

Rule: nobody is asked; whoever sees the folder sees the run."""
