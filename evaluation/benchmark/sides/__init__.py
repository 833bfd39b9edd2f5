"""The sides of a benchmark, each in a process of its own."""
