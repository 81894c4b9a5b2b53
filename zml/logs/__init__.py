"""What processes say: where lines go, how often, in which files; and (`reading`) how they are found again."""
