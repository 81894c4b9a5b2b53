"""What a person types: one module for each group of commands, and what they share. `cli` has the group of them all.

Rule: a command reads flags, calls the room that does the work, and prints. Nothing heavy is loaded
before it is needed."""
