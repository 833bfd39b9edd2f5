"""What `remoe evaluate` measures, in keys that a YAML sets; checked as it is read. Decoding and quality have theirs with them."""

from dataclasses import dataclass, field
from typing import Any

from data.corpus import DOMAINS
from data.groups import source_of
from evaluation.decode import DecodeArguments
from evaluation.engine.memory.demand import budget_bytes
from evaluation.engine.options import EngineOptions
from evaluation.quality.tasks import QualityArguments

SOURCES = ("corpus", "tasks")


@dataclass
class RoutingArguments:
    """The text whose routing is traced, teacher-forced; the prompts that are decoded are of the same text."""

    # corpus: what ships; tasks: the prompts of the tasks that are asked, each task a group. See `groups` for other text
    source: str = "corpus"
    # own text in the place of both: {name: file.txt, name: chats.jsonl, name: data set, name: {dataset_name: NAME,
    # dataset_split: SPLIT}}
    groups: dict[str, Any] = field(default_factory=dict)
    split: str = "test"  # of the shipped corpus
    domains: list[str] = field(default_factory=lambda: list(DOMAINS))  # of the shipped corpus
    requests_per_domain: int = 24  # or of each group
    max_length: int = 256  # tokens of a request; the replay starts cold with each

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(
                f"source is {self.source!r}; write one of {', '.join(SOURCES)}, or name own text in groups"
            )
        for name, given in self.groups.items():
            source_of(name, given)


@dataclass
class ReplayArguments:
    """Which caches are simulated on the trace."""

    policies: list[str] = field(default_factory=lambda: ["lru", "lfu", "fifo", "belady"])
    slots: list[int] = field(default_factory=lambda: [4, 6, 8, 12, 16, 24, 32])  # of each layer


@dataclass
class PlanArguments:
    """Memory budgets that the report divides; none: no plan in it."""

    memory_budgets: list[str] = field(default_factory=list)  # for everything, for example [64MiB]
    context_tokens: int = 256  # tokens of prompt and answer to keep room for

    def __post_init__(self) -> None:
        for budget in self.memory_budgets:
            budget_bytes(budget, smallest_bytes=1)  # refuses what is no size, before anything is trained or measured


@dataclass
class EvaluationArguments:
    """`remoe evaluate`: what is measured."""

    # memory for everything: experts are paged from disk for quality, trace and decode alike, and the process never holds
    # the model; 8GiB, or as `remoe plan` takes it. null, and no expert_cache: quality and trace hold it in memory whole
    memory_budget: str | None = None
    expert_cache: str | None = None  # the same with memory for experts alone: 2GiB, or 25% of all experts
    # CHANGES OUTPUTS of what is generated and decoded, as `remoe generate --lever` does; in log-likelihood tasks and in the trace
    # it acts with prefill=true only, as these are prompts. Needs memory_budget or expert_cache
    lever: str | None = None
    dtype: str = "auto"  # precision of quality and trace: as stored, or float32 or bfloat16
    device: str = "auto"  # of quality, trace and decode: the accelerator if there is one, or cpu, or cuda
    quality: QualityArguments = field(default_factory=QualityArguments)
    routing: RoutingArguments = field(default_factory=RoutingArguments)
    replay: ReplayArguments = field(default_factory=ReplayArguments)
    decode: DecodeArguments = field(default_factory=DecodeArguments)
    plan: PlanArguments = field(default_factory=PlanArguments)

    def __post_init__(self) -> None:
        if (
            self.engine_options(dtype=self.dtype) is None and self.lever is not None
        ):  # which refuses what no engine could do
            raise ValueError(
                f"lever={self.lever} looks at what is in the cache: write memory_budget or expert_cache too"
            )

    def engine_options(self, *, dtype: str, device: str = "cpu") -> EngineOptions | None:
        """How quality and trace run on the engine; None: on the model in memory."""
        if self.memory_budget is None and self.expert_cache is None:
            return None
        tokens = self.decode.prompt_tokens + self.decode.max_new_tokens
        return EngineOptions(
            self.expert_cache, self.memory_budget, context_tokens=tokens, dtype=dtype, device=device, lever=self.lever,
            warn=False,
        )  # fmt: skip
