"""Everything that the product takes from inside transformers (5.23): what is private there, or may change with any release.

No other file of the product imports these modules or reads these attributes, so that a new release is met in one place.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils
from transformers.conversion_mapping import get_model_conversion_mapping as get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter as WeightConverter
from transformers.core_model_loading import WeightRenaming as WeightRenaming
from transformers.core_model_loading import convert_and_load_state_dict_in_model as convert_and_load_state_dict_in_model
from transformers.core_model_loading import rename_source_key as rename_source_key
from transformers.core_model_loading import revert_weight_conversion as revert_weight_conversion
from transformers.integrations.deepspeed import unset_hf_deepspeed_config as unset_hf_deepspeed_config
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as ALL_EXPERTS_FUNCTIONS
from transformers.integrations.moe import _batched_linear, _default_apply_gate, _grouped_linear
from transformers.integrations.moe import grouped_mm_experts_forward as grouped_mm_experts_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa_attention_forward
from transformers.masking_utils import sdpa_mask as sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer as GradientCheckpointingLayer
from transformers.modeling_utils import LoadStateDictConfig as LoadStateDictConfig

batched_linear, grouped_linear = _batched_linear, _grouped_linear
sequences_of = masking_utils.find_packed_sequence_indices


@contextmanager
def packed_sequences(sequences_BS: Tensor | None) -> Iterator[None]:
    """Models that run meanwhile are told what `sequences_of` gives for the positions of their inputs.

    They ask it themselves in every forward pass, and it waits for an accelerator to answer.
    """
    masking_utils.find_packed_sequence_indices = lambda position_ids: sequences_BS
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = sequences_of


def router_classes(model: PreTrainedModel) -> tuple[type[nn.Module], ...]:
    """The classes of the modules whose outputs transformers records as `router_logits`, in `model` or a model inside it."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    recorded = [(getattr(part, "_can_record_outputs", None) or {}).get("router_logits", []) for part in parts]
    recorders = [one for each in recorded for one in (each if isinstance(each, list | tuple) else [each])]
    return tuple({getattr(recorder, "target_class", recorder) for recorder in recorders})


def is_expert_parallel(experts: Any) -> bool:
    """Whether the experts of one layer lie on several devices."""
    return bool(experts._is_expert_parallel)


def applies_plain_gate(experts: Any) -> bool:
    """Whether the activation is act(gate) * up, gate in the first half."""
    return getattr(type(experts), "_apply_gate", None) is _default_apply_gate
