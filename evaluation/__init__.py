"""Quality, reuse, traces, replay, decode under a budget, report."""
