"""`zml ps`: PS shards. They take gradients, run the optimizer on their chunks, publish parameters, and lose nothing.

Rule: what was acknowledged is in the push log or in a backup first. `shard` is the core, `ps` the process around it."""
