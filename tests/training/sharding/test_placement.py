"""What is said to be held where is what is; what does not fit is refused with the launcher that makes it fit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator

from configs.load import UserError
from training.arguments import TrainArguments
from training.model.host_memory import memory_limit
from training.model.lazy_weights import empty_model
from training.model.loading import load_pretrained
from training.model.packed_experts import ALIGNED, load_packed, pack, packed_layout
from training.sharding import placement as module
from training.sharding.placement import FreeMemory, Placement, Sizes, check_memory, placement, sizes_of

SIZES = Sizes(total=1000, experts=800, largest_layer=100, swap_buffers=240)
Arguments = Callable[..., TrainArguments]


@pytest.mark.parametrize(
    ("layout", "offload", "processes", "expected"),
    [
        ("replicated", None, 4, Placement(device=1000, host=0, disk=0)),
        ("fsdp2", None, 4, Placement(device=350, host=0, disk=0)),
        ("zero3", None, 3, Placement(device=434, host=0, disk=0)),
        ("zero3", "cpu", 4, Placement(device=100, host=250, disk=0)),
        ("zero3", "nvme", 4, Placement(device=100, host=50 + 60, disk=200)),
        ("on disk", None, 4, Placement(device=200, host=0, disk=800)),
    ],
)
def test_every_process_holds_its_share(layout: str, offload: str | None, processes: int, expected: Placement) -> None:
    is_on_disk = layout == "on disk"
    found = placement(SIZES, layout=layout, offload=offload, processes=processes, experts_on_disk=is_on_disk)
    assert found == expected


def test_sizes_are_those_of_the_loaded_model(model_dir: Callable[[str], Path]) -> None:
    folder = str(model_dir("qwen2_moe"))
    whole = load_pretrained(folder, dtype=torch.float32)
    tensors = dict(whole.named_parameters())
    experts = [t for name, t in tensors.items() if ".experts." in name]
    layers = [[t for name, t in tensors.items() if name.startswith(f"model.layers.{i}.")] for i in (0, 1)]
    assert sizes_of(empty_model(folder, dtype=torch.float32)) == Sizes(
        total=sum(t.nbytes for t in tensors.values()),
        experts=sum(t.nbytes for t in experts),
        largest_layer=max(sum(t.nbytes for t in layer) for layer in layers),
        swap_buffers=3 * max(t.nbytes for t in experts),
    )


@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_sizes_of_quantised_experts_are_those_of_the_loaded_model(kind: str, checkpoint: Callable[[str], Path]) -> None:
    folder = str(checkpoint("qwen3_moe_blocks"))
    found = packed_layout(folder, kind)
    assert found is not None
    empty, plain = (empty_model(folder, dtype=torch.bfloat16) for _ in range(2))
    pack(empty, *found)
    loaded = load_packed(folder, *found, dtype=torch.bfloat16)
    sizes = sizes_of(loaded)
    assert sizes == sizes_of(empty)
    assert sizes.total == sum(t.nbytes for t in loaded.parameters()) < sizes_of(plain).total
    assert 0 <= sizes.experts - 2 * 8 * found[1].expert_bytes < 2 * 8 * len(found[1].parts) * ALIGNED
    assert sizes.decoded == max(t.nbytes for t in plain.model.layers[0].mlp.experts.parameters())
    for layout, offload in (("replicated", None), ("fsdp2", None), ("zero3", "cpu"), ("zero3", "nvme")):
        without = placement(replace(sizes, decoded=0), layout=layout, offload=offload, processes=2)
        assert placement(sizes, layout=layout, offload=offload, processes=2).device == without.device + sizes.decoded


def test_a_model_whose_experts_are_not_stacked_has_sizes_too(tiny_model: Callable[..., Any]) -> None:
    """Nor its layers in one list: it can be trained whole, so what it needs has to be told."""
    model = tiny_model("llama")
    total = sum(p.nbytes for p in model.parameters())
    assert sizes_of(model) == Sizes(total=total, experts=0, largest_layer=total, swap_buffers=0)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`free(bytes)`: so much memory is free on the host."""

    def set_free(size: int) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=size))
        monkeypatch.setattr(module, "memory_limit", lambda: None)

    return set_free


def test_what_fits_is_told_beforehand(
    train_args: Arguments, free: Any, capsys: pytest.CaptureFixture[str], model_dir: Callable[[str], Path]
) -> None:
    free(2**30)
    check_memory(train_args(), Accelerator(cpu=True), layout="replicated")
    total = sum(p.nbytes for p in load_pretrained(str(model_dir("qwen2_moe"))).parameters()) / 2**10
    said = capsys.readouterr().out
    assert f"weights: {total:.3g} KiB in float32, of it experts" in said
    assert f"each process will hold {total:.3g} KiB on its cpu (activations come on top)" in said


def test_what_does_not_fit_is_refused_with_the_launcher_that_does(
    train_args: Arguments, free: Any, model_dir: Callable[[str], Path]
) -> None:
    sizes = sizes_of(empty_model(str(model_dir("qwen2_moe")), dtype=torch.float32))
    free(sizes.total + 1)
    check_memory(train_args(), Accelerator(cpu=True), layout="replicated")
    free(sizes.total - 1)
    with pytest.raises(UserError) as caught:
        check_memory(train_args(), Accelerator(cpu=True), layout="replicated")
    assert "1 process), " in str(caught.value)
    assert "are free; " in str(caught.value)
    assert "write experts_on_disk=true, or bf16=true" in str(caught.value)
    check_memory(train_args(experts_on_disk=True), Accelerator(cpu=True), layout="replicated")
    free(1000)
    with pytest.raises(UserError, match=r"no launcher here makes them fit.*or bf16=true"):
        check_memory(train_args(), Accelerator(cpu=True), layout="replicated")
    with pytest.raises(UserError) as caught:
        check_memory(train_args(bf16=True), Accelerator(cpu=True), layout="replicated")
    assert "bf16" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "may_be_on_disk", "advice"),
    [(700, True, "experts_on_disk=true"), (700, False, "deepspeed_zero3_nvme.yaml"), (539, False, "no launcher"),
     (300, True, "experts_on_disk=true"), (199, True, "no launcher")],
)  # fmt: skip
def test_what_is_named_fits(free: Any, size: int, may_be_on_disk: bool, advice: str) -> None:
    free(size)
    assert advice in module._advice(SIZES, FreeMemory(Accelerator(cpu=True)), may_be_on_disk=may_be_on_disk)


def test_experts_on_disk_are_read_on_a_processor_and_whole_alone(
    train_args: Arguments, capsys: pytest.CaptureFixture[str]
) -> None:
    args = train_args(experts_on_disk=True)
    check_memory(args, Accelerator(cpu=True), layout="replicated")
    assert " on its cpu, " in (said := capsys.readouterr().out)
    assert " on disk (activations" in said
    gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    for accelerator, layout in ((Accelerator(cpu=True), "fsdp2"), (gpu, "replicated")):
        with pytest.raises(
            UserError, match=r"experts_on_disk=true: on (cpu|cuda) with .* weights experts are not read"
        ):
            check_memory(args, accelerator, layout=layout)


def test_processes_of_one_machine_share_its_memory(
    train_args: Arguments, free: Any, model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    total = sizes_of(empty_model(str(model_dir("qwen2_moe")), dtype=torch.float32)).total
    free(total + total // 2)
    accelerator: Any = SimpleNamespace(
        device=torch.device("cpu"), num_processes=2, state=SimpleNamespace(distributed_type="NO"), print=print
    )
    check_memory(train_args(), accelerator, layout="replicated")  # on two machines
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"\(2 processes\)"):
        check_memory(train_args(), accelerator, layout="replicated")


def test_the_memory_limit_is_that_of_the_nearest_group_that_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = memory_limit()
    assert known is None or known > 2**28
    (tmp_path / "memory" / "job" / "step").mkdir(parents=True)
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (tmp_path / "memory" / "job" / "memory.limit_in_bytes").write_text("5000\n")
    (tmp_path / "memory" / "job" / "step" / "memory.limit_in_bytes").write_text("7000\n")
    (tmp_path / "groups").write_text("3:cpu:/x\n2:memory:/job/step\n0::/\n")
    assert memory_limit(tmp_path / "groups", tmp_path) == 5000
    (tmp_path / "v2").mkdir()
    (tmp_path / "v2" / "memory.max").write_text("max\n")
    (tmp_path / "groups").write_text("0::/v2\n")
    assert memory_limit(tmp_path / "groups", tmp_path) is None
    (tmp_path / "v2" / "memory.max").write_text("6000\n")
    assert memory_limit(tmp_path / "groups", tmp_path) == 6000
    assert memory_limit(tmp_path / "nowhere", tmp_path) is None
