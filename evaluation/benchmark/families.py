"""What works with which family: a tiny random model of every mixture-of-experts class of transformers, through everything.

Nothing is measured here; every column is a comparison with transformers itself. Prints the table of README.md.
"""

import inspect
import re
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from configs.load import UserError
from evaluation.engine.loading import load
from evaluation.engine.options import EngineOptions
from evaluation.engine.stats import EngineStats
from evaluation.export.hf_folder import write_folder
from evaluation.tracing import teacher_forced_trace
from training.arguments import TrainArguments
from training.loop import train_step
from training.model.lazy_weights import stored_tensors
from training.model.loading import load_pretrained
from training.model.packing import one_per_row
from training.model.routers import router_parameters
from training.run import Run, build, finish
from training.run_folder import router_delta
from training.step import outputs_of

SIZES: dict[str, Any] = {
    "vocab_size": 264, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0, "intermediate_size": 16, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8,
    "num_experts_per_tok": 3, "moe_k": 3, "n_shared_experts": 1, "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1, "moe_layer_start_index": 1, "decoder_sparse_step": 1, "num_dense_layers": 1,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "n_group": 1, "topk_group": 1, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
    "depth": 2, "num_heads": 2, "out_hidden_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
"""Of a tiny model, by the names that configurations have for them."""
OF_ONE_CLASS: dict[str, dict[str, Any]] = {
    "BailingHybridConfig": {"layer_group_size": 2},
    "DbrxConfig": {
        "d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "ffn_config": {"ffn_hidden_size": 16},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    },
    "Gemma4TextConfig": {
        "enable_moe_block": True, "top_k_experts": 3, "vocab_size_per_layer_input": 264, "hidden_size_per_layer_input": 8,
    },
    "GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention"] * 2},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 0},
    "KimiLinearConfig": {"layer_types": ["linear_attention", "full_attention"] * 2, "linear_head_dim": 8},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 2},
    "MiMoV2FlashConfig": {"num_attention_heads": 4},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16, "indexer_compress_ratio": 4,
    },
    "ZayaConfig": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What one class calls otherwise, or needs beside it; models have layers of all their kinds."""
WORDS = ("tea", "cup", "we", "drink", "hot", "of", "green", "pot")
"""Of the text that is trained on: documents of all lengths, shorter and longer than a row."""


def moe_configs() -> list[type[PretrainedConfig]]:
    """The configuration classes of all causal language models with experts, by name."""
    found = {}
    for model_type in list(CONFIG_MAPPING):
        config_class = CONFIG_MAPPING[model_type]
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, None)
        source = Path(inspect.getfile(model_class)).read_text(encoding="utf-8") if model_class else ""
        if "xperts" in source and "outer" in source:
            found[config_class.__name__] = config_class
    return [found[name] for name in sorted(found)]


def tiny_config(config_class: type[PretrainedConfig], **changed: Any) -> PretrainedConfig:
    """A small configuration of this class, with whichever of the sizes it knows."""
    make = cast(Any, config_class)
    parts = {name: config_class.sub_configs.get(name) for name in ("text_config", "vision_config")}
    if parts["text_config"] is not None:
        return make(**{name: tiny_config(part).to_dict() for name, part in parts.items() if part is not None})
    known = config_class()
    values = {key: value for key, value in SIZES.items() if _knows(known, key)}
    return make(**values | OF_ONE_CLASS.get(config_class.__name__, {}) | changed)


def _knows(config: PretrainedConfig, key: str) -> bool:
    try:
        return hasattr(config, key)
    except RuntimeError:  # transformers: it is an attribute of every layer
        return True


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; token 0 ends a text."""
    characters, end = sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"
    vocabulary = {end: 0, **{character: 1 + i for i, character in enumerate(characters)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)


def make_tiny(config: PretrainedConfig, folder: Path) -> None:
    """Save a random float32 model with a tokenizer; gates and biases are wide, so that routers have preferences.

    A text model that lies on the Hub inside one for pictures is saved inside it.
    """
    torch.manual_seed(1)
    whole = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    model = (AutoModelForImageTextToText if whole else AutoModelForCausalLM).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and ("bias" in name or "gate.weight" in name or "router" in name):
                tensor.normal_(0, 0.2)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


class Wrong(Exception):
    """Something that ran without a complaint and gave another result than transformers."""


@dataclass
class Family:
    """The tiny model of one class, in a folder of its own."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @cached_property
    def run(self) -> Run:
        """A run of two steps, not begun."""
        text = self.folder / "train.txt"
        sentences = [" ".join(WORDS[(i + k) % len(WORDS)] for k in range(i % 13 + 1)) for i in range(40)]
        text.write_text("\n\n".join(sentences), encoding="utf-8")
        return build(
            TrainArguments(
                model_name_or_path=str(self.base), output_dir=str(self.folder / "run"), train_file=str(text),
                max_length=24, max_steps=2, per_device_train_batch_size=2, learning_rate=0.01, warmup_steps=0, lags=[1, 2],
                working_set_window=4, cache_slots=[4], reuse_warmup_steps=0, consistency_warmup_steps=0,
            )
        )  # fmt: skip

    @cached_property
    def delta(self) -> dict[str, Tensor] | None:
        """Tuned routers; None where training is refused."""
        try:
            before = {name: tensor.clone() for name, tensor in self.run.model.state_dict().items()}
        except UserError:
            return None
        for _ in range(self.run.args.max_steps):
            train_step(self.run)
        changed = {name for name, t in self.run.model.state_dict().items() if not torch.equal(t, before[name])}
        if changed != set(router_parameters(self.run.model)):
            raise Wrong(f"training changed {sorted(changed)}")
        (Path(self.run.args.output_dir) / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
        return router_delta.load_for(self.base, finish(self.run))

    def resident(self) -> Any:
        """The model as transformers has it, with tuned routers if there are any."""
        return load_pretrained(str(self.base), dtype=torch.float32, router_delta=self.delta)

    @cached_property
    def smallest_cache(self) -> int:
        """Bytes of one layer's experts for one token."""
        with load(self.base, EngineOptions("100%")) as (_, engine):
            return engine.demand.top_k * engine.demand.slot_bytes

    def decoded(self, cache: str | None = None, **options: Any) -> tuple[Tensor, EngineStats]:
        """Tokens that the engine decodes with this cache, else the smallest, and what was counted."""
        options = {"expert_cache": cache or self.smallest_cache, **options}
        with load(self.base, EngineOptions(**options), router_delta=self.delta) as (model, engine):
            return decoded(model), engine.stats()


def decoded(model: Any) -> Tensor:
    """24 tokens, greedily, after a prompt of nine."""
    ids = _ids(1, 9)
    options: Any = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    tokens: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return tokens


def _ids(rows: int, tokens: int) -> Tensor:
    return torch.randint(1, 257, (rows, tokens), generator=torch.Generator().manual_seed(3))


def _logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return logits


def trains(family: Family) -> None:
    _ = family.run
    _ = family.delta


def packed(family: Family) -> None:
    """Every document of a packed row gives what it gives alone."""
    run = family.run
    run.head = None
    batch = run.rows.batch(range(4))
    with torch.no_grad():
        alone = None if run.packs else one_per_row(batch.input_ids_BS, batch.document_ids_BS)
        logits_BSV = outputs_of(run, batch, alone)
        for row, documents_S in enumerate(batch.document_ids_BS):
            for document in documents_S.unique():
                here_S = documents_S == document
                alone_SV = run.model(input_ids=batch.input_ids_BS[row : row + 1, here_S], use_cache=False).logits[0]
                if (gap := (logits_BSV[row, here_S] - alone_SV).abs().max() / alone_SV.std()) > 1e-3:
                    raise Wrong(f"packed logits differ from those alone by {gap:.2g} standard deviations")


def paged(family: Family) -> None:
    tokens, stats = family.decoded()
    if not torch.equal(tokens, decoded(family.resident())):
        raise Wrong("other tokens than the resident model's")
    if stats.misses <= SIZES["num_experts"]:
        raise Wrong("nothing was evicted")


def read_ahead(family: Family) -> None:
    if not torch.equal(family.decoded(prefetch=2)[0], decoded(family.resident())):
        raise Wrong("other tokens than the resident model's")


def traced(family: Family) -> None:
    """The routing of a text is what the engine is asked for."""
    ids, resident = _ids(1, 20), family.resident()
    trace, _ = teacher_forced_trace(resident, [ids[0].numpy()], max_length=64)
    with load(family.base, EngineOptions("100%", record_trace=True), router_delta=family.delta) as (model, engine):
        _logits(model, ids)
        found = engine.trace()
    if trace.layer_ids != found.layer_ids or not (trace.expert_ids == found.expert_ids).all():
        raise Wrong(f"layers {trace.layer_ids} are traced, layers {found.layer_ids} ask for experts")


def lever(family: Family) -> None:
    """A prior of strength 0 changes nothing; a strong one lowers the misses, in either space."""
    for space in ("probability", "logits"):
        if not torch.equal(family.decoded(lever=f"prior:space={space},delta=0")[0], decoded(family.resident())):
            raise Wrong(f"a strength of 0 changes tokens ({space})")
        if family.decoded("50%", lever=f"prior:space={space},delta=8")[1].misses >= family.decoded("50%")[1].misses:
            raise Wrong(f"a strong preference saves no misses ({space})")


def exported(family: Family) -> None:
    if family.delta is None:
        trains(family)  # which says why not
        raise AssertionError
    output, about = family.folder / "exported", router_delta.describe(family.folder / "run" / "router_delta")
    stored = stored_tensors(family.base, family.delta)
    write_folder(family.base, output, family.delta, stored=stored, about=about)
    ids = _ids(2, 11)
    if not torch.equal(_logits(load_pretrained(str(output)), ids), _logits(family.resident(), ids)):
        raise Wrong("the exported model is another")


COLUMNS: dict[str, Callable[[Family], None]] = {
    "trains": trains, "packed": packed, "paged": paged, "read ahead": read_ahead, "trace": traced, "lever": lever,
    "export": exported,
}  # fmt: skip
WORKS, REFUSED, WRONG, TRACEBACK = "yes", "no", "WRONG", "TRACEBACK"


@dataclass
class Row:
    """What became of one class: a column's word, and the reasons of those that are refused or worse."""

    name: str
    words: dict[str, str] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)


def check(config_class: type[PretrainedConfig]) -> Row:
    """Take the tiny model of a class through every column."""
    row = Row(config_class.__name__)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        family = Family(Path(folder))
        try:
            make_tiny(tiny_config(config_class), family.base)
        except Exception as error:
            row.reasons.append(f"no tiny model of it can be made: {_first_line(error)}")
            return row
        for column, run in COLUMNS.items():
            row.words[column] = _word(run, family, row.reasons)
    return row


def _word(run: Callable[[Family], None], family: Family, reasons: list[str]) -> str:
    try:
        run(family)
        return WORKS
    except UserError as error:
        word, reason = REFUSED, _first_line(error)
    except Wrong as error:
        word, reason = WRONG, str(error)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        word, reason = (
            TRACEBACK,
            f"{type(error).__name__}: {_first_line(error)} ({Path(place.filename).name}:{place.lineno})",
        )
    reason = re.sub(r"^\w+(Router|Gate|Gating)\b", "its router", reason.replace(str(family.base), "the checkpoint"))
    if reason not in reasons:
        reasons.append(reason)
    return word


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def markdown(rows: list[Row]) -> Iterator[str]:
    """Lines of the table, and under it the reasons."""
    yield "| class | " + " | ".join(COLUMNS) + " |"
    yield "|---|" + "---|" * len(COLUMNS)
    reasons = list(dict.fromkeys(reason for row in rows for reason in row.reasons))
    for row in rows:
        notes = " ".join(f"[{reasons.index(reason) + 1}]" for reason in row.reasons)
        yield (
            f"| {row.name.removesuffix('Config')} {notes} | " + " | ".join(row.words.get(c, "") for c in COLUMNS) + " |"
        )
    yield ""
    yield from (f"{number}. {reason}" for number, reason in enumerate(reasons, 1))


@dataclass(frozen=True, kw_only=True)
class FamiliesBenchmark:
    """What works with which mixture-of-experts family of the installed transformers.

    example:
      remoe bench families --only OlmoeConfig,Qwen3MoeConfig
    """

    only: str | None = None  # configuration classes, with commas between; all of them otherwise

    @property
    def classes(self) -> list[type[PretrainedConfig]]:
        known = {config_class.__name__: config_class for config_class in moe_configs()}
        if self.only is None:
            return list(known.values())
        if unknown := [name for name in self.only.split(",") if name not in known]:
            raise UserError(f"--only {unknown[0]}: no such class; write some of {', '.join(known)}")
        return [known[name] for name in self.only.split(",")]


def benchmark(options: FamiliesBenchmark) -> None:
    """Check every class, print the table."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = [check(config_class) for config_class in tqdm(options.classes, desc="families", unit="class")]
    print("\n".join(markdown(rows)))
