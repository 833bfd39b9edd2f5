"""What a model's generation_config.json says, as far as one answer of token ids goes: passed on, overridden or refused."""

import logging
from pathlib import Path
from typing import Any, cast

from transformers import GenerationConfig, PreTrainedModel

from configs.load import UserError

NAME = "generation_config.json"
OVERRIDDEN: dict[str, Any] = {
    "return_dict_in_generate": False, "output_scores": False, "output_logits": False, "output_attentions": False,
    "output_hidden_states": False, "num_return_sequences": 1, "num_beams": 1, "use_cache": True,
    "cache_implementation": None,
}  # fmt: skip
"""What would change what `generate` returns or keeps, and the value that it is used with."""
REFUSED = (
    "token_healing", "penalty_alpha", "dola_layers", "constraints", "force_words_ids", "prompt_lookup_num_tokens",
    "is_assistant", "guidance_scale",
)  # fmt: skip
"""Other ways to decode than token by token from the model's own scores."""
logger = logging.getLogger(__name__)


def read_generation_config(model_dir: str | Path) -> GenerationConfig:
    """The settings in a model's folder; without a file of their own those in config.json, as transformers has it.

    Raises:
        UserError: the file is damaged, or asks for a way to decode that is not supported.
    """
    path = Path(model_dir) / NAME
    where: dict[str, Any] = {} if path.is_file() else {"config_file_name": "config.json", "_from_model_config": True}
    try:
        config: Any = GenerationConfig.from_pretrained(model_dir, **where)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be used: {error}; mend it, or remove it") from error
    for name in REFUSED:
        value = getattr(config, name, None)
        if value and not (name == "guidance_scale" and value == 1):
            raise UserError(f"{path}: {name}={value} is not supported; remove it there")
    for name, value in OVERRIDDEN.items():
        if (found := getattr(config, name, None)) not in (None, value):
            logger.warning("%s: %s=%s is not used", path, name, found)
            setattr(config, name, value)
    return cast(GenerationConfig, config)


def take_stop_strings(model: PreTrainedModel) -> tuple[str, ...]:
    """The strings at which answers of this model end; `generate` knows them no more, which needs a tokenizer for them."""
    config: Any = model.generation_config
    stops, config.stop_strings = config.stop_strings or (), None
    return (stops,) if isinstance(stops, str) else tuple(stops)
