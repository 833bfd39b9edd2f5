"""The order that the benchmark gives to one side's process: which side, which requests, with which settings."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from evaluation.engine.cache.policies import DEFAULT

COLD, WARM, LONG = "cold", "warm", "long_prompt"


@dataclass(frozen=True)
class Leg:
    """One request. Cold and long-prompt legs start from dropped page caches and empty expert caches; warm ones do not."""

    name: str
    prompt_ids: list[int]
    max_new_tokens: int


@dataclass(frozen=True)
class Order:
    """One process of one side: it loads once and serves the legs one after the other."""

    side: str  # a function of `transformers_sides` or `llamacpp_side`
    model_dir: str
    legs: list[Leg]
    threads: int
    expert_cache: str | None = None  # ours: this, or
    memory_budget: str | None = None  # ours: memory for everything
    cache_policy: str = DEFAULT  # ours
    prefetch: int = 0  # ours: experts of a layer to read ahead
    lever: str | None = None  # ours
    products: str = "exact"  # ours
    gguf: str | None = None  # llamacpp
    repacks: bool = (
        True  # llamacpp: may copy quantised weights into memory of its own, in an order that suits the processor
    )
    kv_cache: str = "F16"  # llamacpp: precision of keys and values; F16 is its own choice
    resident_bytes: int | None = None  # accelerate: weights to keep in memory
    offload_dir: str | None = None  # accelerate

    @property
    def context_tokens(self) -> int:
        """The longest leg."""
        return max(len(leg.prompt_ids) + leg.max_new_tokens for leg in self.legs)

    @property
    def shards(self) -> list[Path]:
        return sorted(Path(self.model_dir).glob("*.safetensors"))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Order":
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "legs": [Leg(**leg) for leg in values["legs"]]})
