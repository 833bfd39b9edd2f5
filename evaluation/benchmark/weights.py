"""How many bytes of a checkpoint are what: from the shards' headers alone."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from evaluation.engine.store.shards import read_index

EXPERT = re.compile(r"(?P<module>.*\.experts)\.\d+\..*")


def expert_modules(model_dir: str | Path) -> tuple[dict[str, int], int]:
    """Bytes of each layer's experts, by module name in layer order, and of everything else."""
    modules: defaultdict[str, int] = defaultdict(int)
    other_bytes = 0
    for name, tensor in read_index(model_dir).items():
        match = EXPERT.fullmatch(name)
        if match:
            modules[match["module"]] += tensor.length_bytes
        else:
            other_bytes += tensor.length_bytes
    return dict(sorted(modules.items(), key=lambda item: _numbers(item[0]))), other_bytes


def expert_bytes(model_dir: str | Path) -> int:
    """Of one expert."""
    modules, _ = expert_modules(model_dir)
    return sum(modules.values()) // (len(modules) * _num_experts(_text_config(model_dir)))


def active_bytes(model_dir: str | Path) -> int:
    """Weights that one token needs: all but its experts and the embeddings, and of each layer's experts the chosen."""
    config = _text_config(model_dir)
    modules, other_bytes = expert_modules(model_dir)
    embedding_bytes = sum(
        tensor.length_bytes for name, tensor in read_index(model_dir).items() if name.endswith("embed_tokens.weight")
    )
    chosen_bytes = sum(modules.values()) * config.num_experts_per_tok // _num_experts(config)
    unused_bytes = 0 if config.tie_word_embeddings else embedding_bytes
    return other_bytes - unused_bytes + chosen_bytes


def _text_config(model_dir: str | Path) -> Any:
    return AutoConfig.from_pretrained(model_dir).get_text_config()


def _num_experts(config: Any) -> int:
    """Per layer; families have three names for it."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next(int(getattr(config, name)) for name in names if hasattr(config, name))


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]
