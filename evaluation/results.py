"""What `results.json` holds, as models that are checked when they are built and when a file is read.

A key the report needs must be there, a value that was not measured is null, and every number is finite. Keys beyond these
are kept and ignored. Who measures is `evaluate.py`; who presents is `report/`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from configs.load import UserError

FORMAT_VERSION = 1
BASE = "base"  # the arm that is the untouched model
MEAN = "mean"  # key of the mean over domains among the perplexity differences


class Part(BaseModel):
    """An object of `results.json`."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


class TaskValue(Part):
    """One task of `n` items, by the harness's own name and aggregation; a standard error where that is a mean."""

    metric: str | None
    value: float | None
    stderr: float | None
    n: int | None
    chance: float | None
    is_rate: bool = True  # a share that is better the larger it is
    of_group: str | None = None  # the group that was asked, if this is one of its tasks
    higher_is_better: bool = True


class DomainPerplexity(Part):
    """One domain's perplexity, per token and per word."""

    perplexity: float | None = None
    word_perplexity: float | None
    n: int | None


class Quality(Part):
    """What the model can do; `mean_perplexity` is the geometric mean over domains, per token."""

    tasks: dict[str, TaskValue]
    perplexity: dict[str, DomainPerplexity]
    mean_perplexity: float | None


class TaskDifference(Part):
    """Tuned minus base in the task's metric, with its paired 95 % interval and the p-value of no difference."""

    difference: float | None
    low: float | None
    high: float | None
    p: float | None = None


class PerplexityDifference(Part):
    """Relative change of a perplexity per token, with its paired 95 % interval."""

    relative: float | None
    low: float | None
    high: float | None


class Difference(Part):
    """Tuned against base; the key `MEAN` of `perplexity` is the mean over domains."""

    tasks: dict[str, TaskDifference]  # of shares
    perplexity: dict[str, PerplexityDifference]
    other: dict[str, TaskDifference] = Field(default_factory=dict)  # of metrics that are no shares


class GroupRouting(Part):
    """Which experts one group of the traced text chose: a domain, a task, a file."""

    n_requests: int
    n_tokens: int
    reuse_rate_mean: float | None
    lru_miss_rates: dict[str, float]  # slots of each layer -> misses per access, cold at every request


class Routing(Part):
    """Which experts the traced text chose."""

    n_tokens: int | None
    reuse_rate_mean: float | None
    reuse_rate_per_layer: list[float | None]
    chance_reuse_rate: float | None
    load_entropy_per_layer: list[float | None]
    load_cv_per_layer: list[float | None]
    dead_experts_per_layer: list[int | None]
    nll: float | None  # nats per token
    groups: dict[str, GroupRouting] = Field(default_factory=dict)


class Replay(Part):
    """The trace replayed through one cache per layer, of one policy and size."""

    policy: str
    cache_scope: Literal["per_layer"]
    slots: int
    accesses: int | None
    misses: int | None
    misses_without_first_touches: int | None
    policy_regret: float | None  # misses / Belady's misses at the same size
    hit_rate: float | None = None
    first_touches: int | None = None
    misses_per_layer: list[int] = Field(default_factory=list)


class LruCurve(Part):
    """Misses of LRU with 0, 1, ... slots of each layer, or of the one pool of all layers."""

    accesses: int | None
    misses: list[int]


class LruCurves(Part):
    per_layer: LruCurve
    shared: LruCurve = Field(alias="global")


class HitRate(Part):
    prefill: float | None  # hits per access
    decode: float | None


class GroupDecode(Part):
    """The prompts of one group; see `Decode`."""

    hit_rate: HitRate
    experts_read_per_token: float | None
    bytes_read_per_token: float | None
    mean_ttft_ms: float | None
    mean_tpot_ms: float | None
    n_prompts: int
    n_tokens: int


class Decode(Part):
    """Real prompts decoded with one size of expert cache.

    `ttft_ms` and `tpot_ms` are of every turn: all prompts of the first repeat, then all of the next. Runs of the same
    results have the same order, so equal places were measured side by side.
    """

    expert_cache_bytes: int
    cache_policy: str | None = None
    cache_scope: str | None = None
    lever: str | None = None  # that changed what was decoded
    demands: float | None  # how many tokens' experts the cache holds
    memory_budget: str | None = None  # for everything, as it was asked for, if the cache is what that left
    token_demand_bytes: int | None = None
    hit_rate: HitRate
    bytes_read_per_token: float | None
    ttft_ms: list[float | None] | None = None
    tpot_ms: list[float | None] | None = None
    mean_ttft_ms: float | None
    mean_tpot_ms: float | None
    output_throughput: float | None
    n_prompts: int | None
    n_tokens: int | None
    repeats: int | None = None
    tokens_equal_resident: bool | None = None
    experts_read_per_token: float | None = None
    groups: dict[str, GroupDecode] = Field(default_factory=dict)


class Run(Part):
    """One model: the base, or an arm trained with one seed."""

    seed: int | None
    history: list[dict[str, Any]] | None
    quality: Quality | None
    difference: Difference | None
    routing: Routing | None
    replay: list[Replay] | None
    lru_curves: LruCurves | None
    decode: list[Decode] | None


class ArmResults(Part):
    """Runs of one objective that differ in their seed only."""

    objective: str | None
    coefficients: dict[str, Any]
    runs: list[Run] = Field(min_length=1)


class Division(Part):
    """What a memory budget becomes."""

    budget_bytes: int
    resident_bytes: int | None
    buffer_bytes: int | None
    kv_bytes: int | None
    activation_bytes: int | None
    expert_cache_bytes: int | None
    context_tokens: int | None
    slots: int


class ReadBandwidth(Part):
    bytes_per_second: float


class PlanTimes(Part):
    compute_ms: float | None  # per token, of a short request under a budget


class Plan(Part):
    """A memory budget, divided and tried."""

    memory_budget: str | None = None  # as it was asked for
    division: Division
    read_bandwidth: ReadBandwidth
    measured: PlanTimes


class TooSmall(Part):
    """A memory budget under which the model does not work."""

    memory_budget: str  # as it was asked for
    too_small: str  # which one would work


class ModelFacts(Part):
    name: str | None
    n_parameters: int | None
    layers: int | None  # those with experts
    experts: int | None  # of a layer
    top_k: int | None
    expert_bytes: int | None  # as stored
    token_demand_bytes: int | None  # in the expert cache
    dtype: str | None


class MachineLoad(Part):
    """How busy the machine was with other things while models were decoded; see `machine.py`."""

    load_average_before: float
    load_average_after: float
    stolen_share: float  # of all processors' time: taken by the hypervisor
    others_share: float  # by other processes


class Measured(Part):
    """What an evaluation found."""

    format_version: int = FORMAT_VERSION
    model: ModelFacts
    plans: list[Plan]
    budgets_too_small: list[TooSmall] = Field(default_factory=list)
    arms: dict[str, ArmResults]
    machine_load: MachineLoad | None = None
    lever: str | None = None  # that changed what was generated and decoded


class Reproduction(Part):
    """What someone needs to measure the same again."""

    command: str | None
    commit: str | None
    config: dict[str, Any]
    machine: dict[str, Any]
    seconds: dict[str, float | None]


class Results(Measured):
    """`results.json`."""

    created: str | None
    reproduce: Reproduction


def read_results(path: str | Path) -> Results:
    """The checked content of a results file.

    Raises:
        UserError: no such file, not UTF-8, not JSON, or not what the report reads.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"results file {path} does not exist; name the results.json of a finished run")
    try:
        return checked_results(json.loads(path.read_text(encoding="utf-8")), source=str(path))
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise UserError(f"{path} is not UTF-8 text ({where}); is it a results.json?") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); it may be cut off: write it with `remoe run`") from error


def checked_results(content: Any, *, source: str = "results") -> Results:
    """Nested JSON as results.

    Raises:
        UserError: it is not what the report reads; names the place.
    """
    if not isinstance(content, dict):
        raise UserError(f"{source} must hold one JSON object, found {_kind(content)}")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{source}: format_version is {version!r}, this report reads {FORMAT_VERSION}; run `remoe run` again"
        )
    with naming_the_place(source):
        results = Results.model_validate(content)
    if BASE not in results.arms:
        raise UserError(f"{source}: arms has no {BASE!r}, the untouched model that all others are compared with")
    return results


NOT_MEASURED = "or null if it was not measured"
WANTED = {
    "missing": "is missing; write null if it was not measured",
    "too_short": "is empty; leave out an arm that was not run",
    "finite_number": f"must be a finite number, {NOT_MEASURED}",
    "float_type": f"must be a finite number, {NOT_MEASURED}",
    "int_type": f"must be a whole number, {NOT_MEASURED}",
    "string_type": "must be text or null",
    "bool_type": "must be true, false or null",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
}
"""What pydantic misses, by its names for errors, in our words."""


@contextmanager
def naming_the_place(source: str) -> Iterator[None]:
    """What is built inside and is not as it should be becomes a `UserError` that says where, in `source`."""
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        said = WANTED.get(first["type"], f"must be {first['msg']}")
        found = "" if first["type"] in ("missing", "too_short") else f", found {_kind(first['input'])}"
        raise UserError(f"{source}: {place} {said}{found}") from error


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {value!r:.40}"
