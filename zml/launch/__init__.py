"""Where processes come from: here, this machine's own. What a launcher starts never outlives it."""
