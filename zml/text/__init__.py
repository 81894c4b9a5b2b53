"""Text for people: data in, lines out. What strangers have written is made harmless first (`ansi`)."""
