"""What `remoe frontier` measures, in keys that a YAML sets; checked as it is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from configs.checks import in_range
from data.corpus import DOMAINS
from data.groups import source_of
from evaluation.engine.cache.policies import ONLINE
from evaluation.engine.cache.pool import SCOPES
from evaluation.engine.levers.spec import levers_of
from evaluation.frontier.result import UNTOUCHED
from evaluation.quality.tasks import QualityArguments
from training.model.quantising import KINDS


@dataclass
class FrontierArguments:
    """`remoe frontier`: routers x levers x cache sizes x policies, on text to choose by and on other text to report."""

    model: str = "???"  # folder or hub name of the untouched model
    output_dir: str = "???"  # everything is written here
    # arm: folder of a router delta, or a list of them that were trained alike with several seeds; or a mapping of `routers`
    # (such a folder or list) and `experts` (mxfp4, fp8, int4 or int8: rounded to that), either of them. The untouched model is
    # always measured; null: an arm of the config is left out
    arms: dict[str, Any] = field(default_factory=dict)
    levers: list[str] = field(
        default_factory=lambda: [f"prior:delta={delta}" for delta in (0.02, 0.04, 0.06, 0.08)]
    )  # as `remoe generate --lever`; without one everything is measured too
    # levers without delta, as [prior]: for every gate one more point with a strength for each layer, which are found from
    # points of each layer alone at `per_layer_deltas`
    per_layer: list[str] = field(default_factory=list)
    per_layer_deltas: list[float] = field(default_factory=lambda: [0.04, 0.08, 0.16])
    slots: list[int] = field(default_factory=lambda: [8])  # experts of a layer that are cached
    policies: list[str] = field(default_factory=lambda: ["lru", "decayed"])
    scope: str = "per_layer"  # or global: one pool of slots x layers
    max_length: int = 192  # tokens of a text; it starts with an empty cache
    texts_per_domain: int = 40  # or of each group, for choosing and for reporting each
    choose_split: str = "validation"  # of the shipped corpus: what strengths and arms are chosen by
    report_split: str = "test"  # of the shipped corpus: what is reported of what was chosen
    domains: list[str] = field(default_factory=lambda: list(DOMAINS))  # of the shipped corpus
    # own text in place of the corpus, as in `remoe evaluate`; every second piece is chosen by, the others are reported
    groups: dict[str, Any] = field(default_factory=dict)
    gates: list[float] = field(
        default_factory=lambda: [0.0025, 0.005, 0.01, 0.02]
    )  # perplexity that may be lost at most
    # gates whose best points are priced further: in text that they write themselves, and in tasks
    priced_at: list[float] = field(default_factory=lambda: [0.01])
    new_tokens: int | None = None  # of the end of every text, written anew by sampling; null: half of it, 0: none
    with_tasks: bool = False  # ask the tasks of `quality` too, step by step
    quality: QualityArguments = field(default_factory=QualityArguments)
    dtype: str = "auto"  # as stored, or float32 or bfloat16
    device: str = "auto"  # the accelerator if there is one, or cpu, or cuda

    def __post_init__(self) -> None:
        self.arms = {arm: given for arm, given in self.arms.items() if given is not None}
        in_range(self, slots=(1, float("inf")), max_length=(2, float("inf")), texts_per_domain=(2, float("inf")))
        in_range(self, gates=(0, float("inf")), new_tokens=(0, self.max_length), per_layer_deltas=(0, float("inf")))
        self.new_tokens = self.max_length // 2 if self.new_tokens is None else self.new_tokens
        if not set(self.priced_at) <= set(self.gates):
            raise ValueError(f"priced_at={self.priced_at} must be among gates={self.gates}")
        if self.per_layer_deltas != sorted(set(self.per_layer_deltas) - {0}):
            raise ValueError(f"per_layer_deltas={self.per_layer_deltas}: write rising numbers above 0, as [0.04, 0.08]")
        for name, known in (("policies", list(ONLINE)), ("scope", list(SCOPES))):
            given = getattr(self, name)
            if unknown := [value for value in ([given] if isinstance(given, str) else given) if value not in known]:
                raise ValueError(f"{name} has {unknown[0]!r}; write of {', '.join(known)}")
        if not self.slots or not self.policies:
            raise ValueError("slots and policies must each name at least one")
        if self.choose_split == self.report_split:
            raise ValueError(
                f"choose_split and report_split are both {self.report_split}: what is chosen must be seen anew"
            )
        if UNTOUCHED in self.arms:
            raise ValueError(
                f"an arm cannot be called {UNTOUCHED}: that is the model as it is, which is always measured"
            )
        for arm, given in self.arms.items():
            if not isinstance(given, Mapping):
                continue
            if set(given) - {"routers", "experts"} or self.experts(arm) not in (None, *KINDS):
                raise ValueError(
                    f"arms.{arm}={dict(given)}: write routers (folders of router deltas), experts ({', '.join(KINDS)}), or both"
                )
        for lever in self.levers:
            levers_of(lever)
        for lever in self.per_layer:
            levers_of(f"{lever}{',' if ':' in lever else ':'}delta=0")
        for name, given in self.groups.items():
            source_of(name, given)

    def folders(self, arm: str) -> list[str]:
        """Of an arm's router deltas, one for each seed; none where its routers are the untouched ones."""
        given = self.arms[arm]
        given = given.get("routers", []) if isinstance(given, Mapping) else given
        return [given] if isinstance(given, str) else list(given)

    def experts(self, arm: str) -> str | None:
        """What an arm's experts are rounded to; None: they are as stored."""
        given = self.arms.get(arm)
        return given.get("experts") if isinstance(given, Mapping) else None
