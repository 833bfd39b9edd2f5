"""`remoe bench`: decode speed under a memory limit, beside peers and beside what the machine can do.

Every side runs in a process of its own, the sides take turns in every repeat, and a side that fails is reported.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm import tqdm

from configs.command import run
from configs.files import prepare, write_json
from configs.load import UserError
from configs.sizes import parse_size
from data.pieces import document_beginnings
from evaluation.benchmark import page_cache
from evaluation.benchmark.bandwidth import memory_bandwidth, products_beside, read_bandwidth
from evaluation.benchmark.comparison import decode_bound, equal_tokens, prompt_bound, ratios, summarise
from evaluation.benchmark.memory_group import Hierarchy, find_hierarchy
from evaluation.benchmark.order import COLD, LONG, WARM, Leg, Order
from evaluation.benchmark.processes import SideRun, run_side
from evaluation.benchmark.sides.contenders import Contender, opponent, our_contenders, parse_opponents
from evaluation.benchmark.tables import result_tables
from evaluation.engine.cache.policies import DEFAULT
from evaluation.engine.store.experts import ExpertStore
from evaluation.machine import machine_facts
from training.model.lazy_weights import read_config
from training.model.loading import load_tokenizer, local_folder

EXAMPLE = """examples:
  remoe make-model --output runs/models/mid
  remoe bench --model runs/models/mid --expert-cache 400MiB --memory-limit-cgroup 900MiB --output runs/bench.json
  remoe bench --model data/embedded/model --expert-cache 25%,50% --against resident --max-new-tokens 64 --repeats 1

Sides: remoe (this engine, once for every cache size), accelerate (experts of the layers that do not fit on disk),
llamacpp (GGUF in F16, mapped), resident (plain transformers, everything in memory, no limit).
"""
LONG_SIDES = ("remoe", "resident")
AROUND_DEPTHS, AROUND_SECONDS = (2, 8, 16), 1.0
"""Reads in flight, and how long each, when the disk is measured around every process."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, prepare the sides, let them take turns, measure the machine before and after, write and print."""
    arguments = _parser().parse_args(argv)
    output = prepare(arguments.output) if arguments.output else None
    _check(arguments)
    model_dir = str(Path(local_folder(arguments.model)).resolve())
    hierarchy, notes = _memory_groups(arguments)
    legs, more_notes = _legs(model_dir, arguments)
    contenders = _contenders(model_dir, arguments, hierarchy)
    shards = sorted(Path(model_dir).glob("*.safetensors"))
    bandwidth = {"before": _bandwidth(shards, model_dir, arguments.threads)}
    runs = _take_turns(contenders, legs, arguments, hierarchy)
    bandwidth["after"] = _bandwidth(shards, model_dir, arguments.threads)
    result = {
        "config": {**vars(arguments), "model_dir": model_dir},
        "machine": machine_facts(),
        "notes": [*notes, *more_notes],
        "bandwidth": bandwidth,
        **_compared(runs, contenders, bandwidth, model_dir),
        "runs": [one.as_json() for one in runs],
    }
    if output:
        write_json(output, result)
    Console(width=max(110, Console().width)).print(result_tables(result))


def _check(arguments: argparse.Namespace) -> None:
    for flag in ("max_new_tokens", "prompt_tokens", "repeats", "threads"):
        if getattr(arguments, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} is {getattr(arguments, flag)}; write at least 1")
    if not _sizes(arguments.expert_cache) + _sizes(arguments.memory_budget):
        raise UserError(
            "our engine needs a size: write --expert-cache 400MiB (experts) or --memory-budget 900MiB (all)"
        )
    if arguments.max_new_tokens < 2:
        raise UserError("--max-new-tokens 1 leaves nothing to time after the first token; write at least 2")
    if arguments.against_new_tokens is not None and arguments.against_new_tokens < 2:
        raise UserError(f"--against-new-tokens is {arguments.against_new_tokens}; write at least 2")


def _memory_groups(arguments: argparse.Namespace) -> tuple[Hierarchy | None, list[str]]:
    """Where processes can be limited, and what to say about it.

    Raises:
        UserError: a limit was asked for where none can be set.
    """
    hierarchy = find_hierarchy()
    if hierarchy is not None:
        return hierarchy, [
            f"peak + cache: of the process's memory group ({hierarchy.version.name}), page cache included"
        ]
    if arguments.memory_limit_cgroup:
        raise UserError(
            "--memory-limit-cgroup needs a memory controller (cgroup v1 or v2) in which this user may make groups, and "
            "there is none; run as root on a machine that has it, or leave the limit away"
        )
    return None, ["no memory groups can be made here: peaks are of the process alone, without its page cache"]


def _legs(model_dir: str, arguments: argparse.Namespace) -> tuple[list[list[Leg]], list[str]]:
    """For every repeat a cold leg, a warm leg with another text, and the long prompt; and what had to be left out."""
    tokenizer = load_tokenizer(model_dir)
    context = int(read_config(model_dir).get_text_config().max_position_embeddings)
    new_tokens, repeats = arguments.max_new_tokens, arguments.repeats
    if arguments.prompt_tokens + new_tokens > context:
        raise UserError(
            f"{arguments.prompt_tokens} prompt tokens and {new_tokens} new ones do not fit the model's context of "
            f"{context}; write fewer"
        )
    prompts = document_beginnings(tokenizer, "test", tokens=arguments.prompt_tokens, count=2 * repeats)
    rows = [[Leg(COLD, prompts[2 * i], new_tokens), Leg(WARM, prompts[2 * i + 1], new_tokens)] for i in range(repeats)]
    length = arguments.long_prompt_tokens
    if not length:
        return rows, []
    if length + 1 > context:
        return rows, [f"no long prompt: {length} tokens and one more do not fit the model's context of {context}"]
    texts = document_beginnings(tokenizer, "test", tokens=length, count=repeats, domains=("prose", "code"))
    return [[*row, Leg(LONG, text, 1)] for row, text in zip(rows, texts, strict=True)], []


def _contenders(model_dir: str, arguments: argparse.Namespace, hierarchy: Hierarchy | None) -> list[Contender]:
    limit = arguments.memory_limit_cgroup
    limit_bytes = parse_size(limit, what="--memory-limit-cgroup") if limit else None
    caches, budgets = _sizes(arguments.expert_cache), _sizes(arguments.memory_budget)
    base = Order("", model_dir, [], arguments.threads, cache_policy=arguments.cache_policy)
    work_dir = Path(arguments.work_dir).resolve()
    gguf = Path(arguments.gguf).resolve() if arguments.gguf else work_dir / f"{Path(model_dir).name}-f16.gguf"
    opponents = parse_opponents(arguments.against)
    ours = our_contenders(
        base, caches=caches, budgets=budgets, prefetches=_numbers(arguments.prefetch), limit_bytes=limit_bytes
    )
    return ours + [
        opponent(
            name, base, work_dir=work_dir, gguf=gguf, ours=ours[0].order, hierarchy=hierarchy, limit_bytes=limit_bytes,
            timeout_seconds=arguments.timeout,
        )
        for name in tqdm(opponents, desc="prepare", unit="opponent")
    ]  # fmt: skip


def _sizes(text: str) -> list[str]:
    return [size.strip() for size in text.split(",") if size.strip()]


def _numbers(text: str) -> list[int]:
    """Of experts to read ahead.

    Raises:
        UserError: something else.
    """
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise UserError(f"--prefetch {text!r} is no list of numbers; write for example 3, or 0,3 for both")
    return list(dict.fromkeys(int(number) for number in text.split(",")))


def _take_turns(
    contenders: Sequence[Contender], legs: Sequence[list[Leg]], arguments: argparse.Namespace,
    hierarchy: Hierarchy | None,
) -> list[SideRun]:  # fmt: skip
    """Every repeat begins with another side; page caches are dropped before each process."""
    runs = []
    turns = [(i, contenders[(i + j) % len(contenders)]) for i in range(len(legs)) for j in range(len(contenders))]
    with tqdm(turns, unit="process") as progress:
        for repeat, contender in progress:
            progress.set_description(f"repeat {repeat + 1}: {contender.name}")
            if contender.unable:
                runs.append(SideRun(contender.name, repeat, contender.limit_bytes, failure=contender.unable))
                continue
            order = replace(contender.order, legs=_legs_of(contender, legs[repeat], arguments.against_new_tokens))
            before = _read_rate(order)
            page_cache.drop(_files(order))
            one = run_side(
                order, contender=contender.name, repeat=repeat, hierarchy=hierarchy, limit_bytes=contender.limit_bytes,
                timeout_seconds=arguments.timeout,
            )  # fmt: skip
            one.read_rate = (before + _read_rate(order)) / 2
            runs.append(one)
            if order.offload_dir:
                shutil.rmtree(order.offload_dir)
                Path(order.offload_dir).mkdir()
    return runs


def _legs_of(contender: Contender, legs: Sequence[Leg], against_new_tokens: int | None) -> list[Leg]:
    """The long prompt only for the sides its bound is made of; fewer tokens for slow opponents if so asked."""
    side = contender.order.side
    kept = [leg for leg in legs if leg.name != LONG or side in LONG_SIDES]
    if side in LONG_SIDES or against_new_tokens is None:
        return kept
    return [replace(leg, max_new_tokens=min(leg.max_new_tokens, against_new_tokens)) for leg in kept]


def _read_rate(order: Order) -> float:
    """Bytes per second that the model's disk gives now: disks that are shared change from minute to minute."""
    shards = sorted(Path(order.model_dir).glob("*.safetensors"))
    read_bytes = ExpertStore(order.model_dir).format.expert_bytes
    return read_bandwidth(shards, read_bytes, depths=AROUND_DEPTHS, seconds=AROUND_SECONDS).best


def _files(order: Order) -> list[Path]:
    return [*Path(order.model_dir).glob("*.safetensors"), *([Path(order.gguf)] if order.gguf else [])]


def _bandwidth(shards: Sequence[Path], model_dir: str, threads: int) -> dict[str, Any]:
    """Bytes per second, of reads as large as one expert, alone and while all cores compute, and of memory."""
    reads = read_bandwidth(shards, ExpertStore(model_dir).format.expert_bytes)
    with products_beside(threads):
        beside = read_bandwidth(
            shards, ExpertStore(model_dir).format.expert_bytes, depths=AROUND_DEPTHS, seconds=AROUND_SECONDS
        )
    return {
        "read_bytes": reads.read_bytes, "direct": reads.direct, "read_by_depth": reads.by_depth, "read": reads.best,
        "read_beside_products": beside.best, "memory": memory_bandwidth(threads),
    }  # fmt: skip


def _active_bytes(model_dir: str) -> int:
    """Weights that one token needs."""
    config = read_config(model_dir).get_text_config()
    return ExpertStore(model_dir).active_bytes(
        top_k=config.num_experts_per_tok, tied_embeddings=config.tie_word_embeddings
    )


def _compared(
    runs: Sequence[SideRun], contenders: Sequence[Contender], bandwidth: dict[str, Any], model_dir: str
) -> dict[str, Any]:
    """Summaries, ratios and bounds; the memory's rate is the better of before and after."""
    memory_rate = max(measured["memory"] for measured in bandwidth.values())
    ours = [contender.name for contender in contenders if contender.order.side == "remoe"]
    names = [contender.name for contender in contenders]
    bounds: dict[str, Any] = {}
    for name in ours:
        legs = {
            leg: decode_bound(
                runs, name, leg, resident="resident", memory_rate=memory_rate, active_bytes=_active_bytes(model_dir)
            )
            for leg in (COLD, WARM)
        }
        legs[LONG] = prompt_bound(runs, name, resident="resident")
        bounds[name] = {leg: bound for leg, bound in legs.items() if bound is not None}
    others = {name: [one for one in ours if one != name] for name in names}
    return {
        "ours": ours,
        "model": {"active_bytes": _active_bytes(model_dir), "expert_bytes": ExpertStore(model_dir).format.expert_bytes},
        "summary": summarise(runs),
        "ratios": {
            name: {to: {leg: ratios(runs, of=name, to=to, leg=leg) for leg in (COLD, WARM)} for to in others[name]}
            for name in names
        },
        "equal_tokens": {name: {to: equal_tokens(runs, of=name, to=to) for to in others[name]} for name in names},
        "bounds": bounds,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="remoe bench",
        description="Time greedy decoding of real prompts by this engine and by its peers at equal memory, cold and "
        "warm apart, and say how near it comes to what the machine can do.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder with safetensors weights, or hub name")
    memory = parser.add_argument_group("our memory, one of them or both; several sizes take turns")
    memory.add_argument(
        "--expert-cache", default="", metavar="SIZE[,SIZE]", help="for experts alone: 400MiB, or 25%% of all"
    )
    memory.add_argument(
        "--memory-budget", default="", metavar="SIZE[,SIZE]", help="for everything: 900MiB, or 25%% of the machine's"
    )
    parser.add_argument(
        "--against",
        default="accelerate,llamacpp,resident",
        metavar="NAMES",
        help="opponents (default: all); '' for none",
    )
    parser.add_argument(
        "--memory-limit-cgroup", metavar="SIZE",
        help="run every side but resident in a memory group of this size, page cache included",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of every leg (default 256)")
    parser.add_argument(
        "--against-new-tokens", type=int, metavar="N", help="fewer for accelerate and llamacpp, which may be slow"
    )
    parser.add_argument("--prompt-tokens", type=int, default=64, metavar="N", help="of cold and warm legs (default 64)")
    parser.add_argument(
        "--long-prompt-tokens", type=int, default=1000, metavar="N",
        help="of the leg that times the first token alone (default 1000); 0: no such leg",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="processes of every side (default 3)")
    parser.add_argument("--cache-policy", default=DEFAULT, help=f"ours (default {DEFAULT})")
    parser.add_argument(
        "--prefetch", default="0", metavar="N[,N]",
        help="ours: experts of a layer to read ahead; 0,3: without and with it, in turns (default 0)",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of every side (default: all cores)"
    )
    parser.add_argument("--timeout", type=float, default=3600, metavar="SECONDS", help="for one process (default 3600)")
    parser.add_argument(
        "--work-dir", default="runs/bench_files", metavar="DIR",
        help="for the GGUF, which is kept, and accelerate's offload; should be on the model's disk",
    )  # fmt: skip
    parser.add_argument("--gguf", metavar="FILE", help="a GGUF of the same weights in F16, instead of making one")
    parser.add_argument("--output", metavar="JSON", help="where to write everything that was measured")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
