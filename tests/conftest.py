"""What every test may use: tiny random models with a byte tokenizer, a text file, and arguments of a run over both."""

import os

# before transformers is imported: no test needs a network, the tests share their machine with other work, and they train on
# the processor, against whose results they compare, but for those that say otherwise; and what oneDNN keeps is bounded before
# the first product, as under a memory budget, whichever test comes first
os.environ.update(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    WANDB_SILENT="true",
    ACCELERATE_USE_CPU="true",
    ONEDNN_PRIMITIVE_CACHE_CAPACITY="24",
    LRU_CACHE_CAPACITY="24",
)

import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from evaluation.benchmark.families import byte_tokenizer
from training.arguments import TrainArguments

ROOT = Path(__file__).parent.parent
pytest_plugins = ["tests.checkpoints"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none")
END_OF_TEXT = "<|endoftext|>"
SMALL: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # wide, so that routers have clear preferences
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def small_config(family: str) -> PretrainedConfig:
    """Two layers, 8 experts of which 2 (DeepSeek: 3); `llama` is there to be refused.

    Sizes are multiples of 8, as the grouped matrix product wants rows of 16 bytes in bfloat16.
    """
    if family == "qwen2_moe":
        return Qwen2MoeConfig(
            **SMALL, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
            intermediate_size=24, decoder_sparse_step=1, norm_topk_prob=False, tie_word_embeddings=True,
        )  # fmt: skip
    if family == "olmoe":
        return OlmoeConfig(**SMALL, num_experts=8, num_experts_per_tok=2, intermediate_size=16)
    if family == "mixtral":
        return MixtralConfig(**SMALL, num_local_experts=8, num_experts_per_tok=2, intermediate_size=16)
    if family == "qwen3_moe":
        return Qwen3MoeConfig(
            **SMALL, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, intermediate_size=24, head_dim=8
        )
    if family == "llama":
        return LlamaConfig(**SMALL, intermediate_size=24)
    deepseek = {
        **SMALL, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1, "moe_intermediate_size": 16,
        "intermediate_size": 24, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": None, "n_group": 1,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "topk_group": 1,
    }  # fmt: skip
    assert family == "deepseek_v2"
    return DeepseekV2Config(**deepseek)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--exhaustive", action="store_true", help="every combination where tests otherwise take turns; an hour"
    )
    parser.addoption(
        "--family", action="append", metavar="CLASS", help="for test_families.py: a configuration class of transformers"
    )


@pytest.fixture(scope="session")
def exhaustive(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--exhaustive"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its state in the process; a test must not see the precision of the one before."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """`tiny_model(family)`: a random model, float32, equal at every call."""

    def make(family: str = "qwen2_moe") -> Any:
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(small_config(family), dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("gate.weight"):  # some families start their gates at zero
                    parameter.normal_(0, 0.5)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`model_dir(family)`: the folder of a saved tiny model with its tokenizer. Never write into it."""
    made: dict[str, Path] = {}

    def make(family: str = "qwen2_moe") -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            torch.manual_seed(1)
            AutoModelForCausalLM.from_config(small_config(family), dtype=torch.float32).save_pretrained(made[family])
            byte_tokenizer().save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short texts, 2 to 90 characters long, some longer than a row."""
    draw = random.Random(0)
    texts = [
        " ".join(draw.choice(["tea", "cup", "we", "drink", "hot", "of"]) for _ in range(draw.randrange(1, 20)))
        for _ in range(40)
    ]
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return path


@pytest.fixture
def train_values(model_dir: Callable[[str], Path], text_file: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`train_values(key=value, ...)`: the config of a run of four tiny steps, as a dictionary."""

    def make(**changed: Any) -> dict[str, Any]:
        return {
            "model_name_or_path": str(model_dir("qwen2_moe")), "output_dir": str(tmp_path / "run"),
            "train_file": str(text_file), "max_length": 24, "max_steps": 4, "per_device_train_batch_size": 2,
            "learning_rate": 0.01, "warmup_steps": 2, "logging_steps": 1, "save_steps": 2, "lags": [1, 2, 4],
            "working_set_window": 4, "cache_slots": [3], "reuse_warmup_steps": 2, "consistency_warmup_steps": 3,
            **changed,
        }  # fmt: skip

    return make


@pytest.fixture
def train_args(train_values: Callable[..., dict[str, Any]]) -> Callable[..., TrainArguments]:
    """`train_args(key=value, ...)`: the same as a dataclass."""
    return lambda **changed: TrainArguments(**train_values(**changed))


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, so that something that does not fit can be written to it."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a small tmpfs cannot be mounted without root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
