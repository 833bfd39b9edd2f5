"""What an evaluation found of one run as plain numbers with names, for trackers."""

from collections.abc import Iterator

from evaluation.results import Run


def figures(run: Run) -> Iterator[tuple[str, float]]:
    """Name and value of what was measured of one run."""
    if run.quality is not None:
        yield from ((f"task/{name}", task.value) for name, task in run.quality.tasks.items() if task.value is not None)
        if run.quality.mean_perplexity is not None:
            yield "mean_perplexity", run.quality.mean_perplexity
    if run.difference is not None:
        changes = {**run.difference.tasks, **run.difference.other}
        yield from ((f"change/{name}", one.difference) for name, one in changes.items() if one.difference is not None)
        ratios = run.difference.perplexity.items()
        yield from ((f"change/perplexity/{name}", one.relative) for name, one in ratios if one.relative is not None)
    if run.routing is not None and run.routing.reuse_rate_mean is not None:
        yield "reuse_rate_mean", run.routing.reuse_rate_mean
    for row in run.replay or []:
        if row.misses is not None and row.accesses:
            yield f"miss_rate/{row.policy}/{row.slots}_slots", row.misses / row.accesses
    for cache in run.decode or []:
        if cache.bytes_read_per_token is not None:
            yield f"bytes_read_per_token/{cache.expert_cache_bytes}_bytes", cache.bytes_read_per_token
