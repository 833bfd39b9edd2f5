"""Who gets how much of a memory budget."""
