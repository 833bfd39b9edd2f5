"""Decode speed under a memory limit, beside peers and beside what the machine can do.

Every side runs in a process of its own, the sides take turns in every repeat, and a side that fails is reported.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm import tqdm

from configs.checks import at_least, chosen, whole_numbers, words
from configs.files import prepare, write_json
from configs.load import UserError
from configs.sizes import parse_size
from data.pieces import document_beginnings
from evaluation.benchmark import page_cache
from evaluation.benchmark.bandwidth import disk_rate, memory_bandwidth, products_beside
from evaluation.benchmark.comparison import decode_bound, equal_tokens, prompt_bound, ratios, summarise
from evaluation.benchmark.memory_group import NO_CONTROLLER, Hierarchy, find_hierarchy
from evaluation.benchmark.order import COLD, LONG, WARM, Leg, Order
from evaluation.benchmark.processes import Limits, SideRun, run_side
from evaluation.benchmark.sides.contenders import OPPONENTS, Contender, opponent, our_contenders
from evaluation.benchmark.tables import result_tables
from evaluation.engine.cache.policies import DEFAULT
from evaluation.engine.levers.spec import levers_of
from evaluation.engine.options import EXACT, PACKED
from evaluation.engine.store.experts import ExpertStore
from evaluation.machine import machine_facts
from evaluation.report.numbers import MILLISECONDS
from training.model.lazy_weights import read_config
from training.model.loading import load_tokenizer, local_folder

LONG_SIDES = ("remoe", "resident")
AROUND_DEPTHS, AROUND_SECONDS = (2, 8, 16), 1.0
"""Reads in flight, and how long each, when the disk is measured around every process."""


@dataclass(frozen=True, kw_only=True)
class DecodeBenchmark:
    """Time greedy decoding of real prompts by this engine and by its peers at equal memory, cold and warm apart, and say
    how near it comes to what the machine can do.

    Sides: remoe (this engine, once for every cache size), accelerate (experts of the layers that do not fit on disk),
    llamacpp (GGUF in F16, mapped), resident (plain transformers, everything in memory, no limit).

    examples:
      remoe make-model --output runs/models/mid
      remoe bench decode --model runs/models/mid --expert-cache 400MiB --memory-limit-cgroup 900MiB --output runs/bench.json
      remoe bench decode --model data/embedded/model --expert-cache 25%,50% --against resident --max-new-tokens 64 --repeats 1
    """

    model: str  # folder with safetensors weights, or hub name
    expert_cache: str = ""  # ours: memory for experts alone, 400MiB or 25% of all; several, with commas, take turns
    memory_budget: str = ""  # ours: memory for everything, 900MiB or 25% of the machine's; several take turns
    against: str = "accelerate,llamacpp,resident"  # opponents; '' for none
    memory_limit_cgroup: str | None = None  # run all sides but resident in a memory group of this size, with page cache
    max_new_tokens: int = 256  # of the cold and the warm leg
    against_new_tokens: int | None = None  # fewer for accelerate and llamacpp, which may be slow
    prompt_tokens: int = 64  # of the cold and the warm leg
    long_prompt_tokens: int = 1000  # of the leg that times the first token alone; 0: no such leg
    repeats: int = 3  # processes of every side
    cache_policy: str = DEFAULT  # ours
    prefetch: str = "0"  # ours: experts of a layer to read ahead; 0,3: without and with it, in turns
    # ours: with this lever too, in turns; it changes outputs. prior:delta=0 shows what a lever itself takes
    lever: str = ""
    products: str = EXACT  # ours: exact, or packed for experts as they are stored; packed changes last bits
    threads: int = field(default_factory=torch.get_num_threads)  # of every side; all cores if not given
    timeout: float = 3600  # seconds for one process
    work_dir: str = "runs/bench_files"  # for the GGUF, which is kept, and accelerate's offload; on the model's disk
    gguf: str | None = None  # a GGUF of the same weights in F16, instead of making one
    output: str | None = None  # JSON file to write everything that was measured to

    def __post_init__(self) -> None:
        at_least(self, prompt_tokens=1, repeats=1, threads=1, against_new_tokens=2)
        if self.max_new_tokens < 2:
            raise UserError(
                f"--max-new-tokens {self.max_new_tokens} leaves nothing to time after the first token; write at least 2"
            )
        if not words(self.expert_cache) + words(self.memory_budget):
            raise UserError(
                "our engine needs a size: write --expert-cache 400MiB (experts) or --memory-budget 900MiB (all)"
            )
        if self.products not in (EXACT, PACKED):
            raise UserError(f"--products {self.products!r} is not known; write {EXACT} or {PACKED}")
        _ = self.prefetches, self.opponents, self.limit_bytes, self.lever and levers_of(self.lever)

    @property
    def prefetches(self) -> list[int]:
        return whole_numbers(self.prefetch, flag="--prefetch", example="3, or 0,3 for both")

    @property
    def opponents(self) -> list[str]:
        return chosen(self.against, OPPONENTS, flag="--against") if self.against else []

    @property
    def limit_bytes(self) -> int | None:
        limit = self.memory_limit_cgroup
        return parse_size(limit, what="--memory-limit-cgroup") if limit else None


def benchmark(options: DecodeBenchmark) -> None:
    """Prepare the sides, let them take turns, measure the machine before and after, write and print."""
    output = prepare(options.output) if options.output else None
    model_dir = str(Path(local_folder(options.model)).resolve())
    hierarchy, group_note = _memory_groups(options)
    legs, notes = _legs(model_dir, options)
    contenders = _contenders(model_dir, options, hierarchy)
    store = ExpertStore(model_dir)
    bandwidth = {"before": _bandwidth(store, options.threads)}
    runs = _take_turns(contenders, legs, store, options.against_new_tokens)
    bandwidth["after"] = _bandwidth(store, options.threads)
    result = {
        "config": {**asdict(options), "model_dir": model_dir},
        "machine": machine_facts(),
        "notes": [group_note, *notes],
        "bandwidth": bandwidth,
        **_compared(runs, contenders, bandwidth, store),
        "runs": [asdict(one) for one in runs],
    }
    if output:
        write_json(output, result)
    Console(width=max(110, Console().width)).print(result_tables(result))


def _memory_groups(options: DecodeBenchmark) -> tuple[Hierarchy | None, str]:
    """The place where processes can be limited, and a note on it; a `UserError` where a wanted limit cannot be set."""
    hierarchy = find_hierarchy()
    if hierarchy is not None:
        return hierarchy, f"peak + cache: of the process's memory group ({hierarchy.version.name}), page cache included"
    if options.memory_limit_cgroup:
        raise UserError(f"--memory-limit-cgroup {NO_CONTROLLER}, or leave the limit away")
    return None, "no memory groups can be made here: peaks are of the process alone, without its page cache"


def _legs(model_dir: str, options: DecodeBenchmark) -> tuple[list[list[Leg]], list[str]]:
    """A cold leg, a warm leg with another text and the long prompt for every repeat; and notes on what was left out."""
    tokenizer = load_tokenizer(model_dir)
    context = int(read_config(model_dir).get_text_config().max_position_embeddings)
    new_tokens, repeats = options.max_new_tokens, options.repeats
    if options.prompt_tokens + new_tokens > context:
        raise UserError(
            f"{options.prompt_tokens} prompt tokens and {new_tokens} new ones do not fit the model's context of "
            f"{context}; write fewer"
        )
    prompts = document_beginnings(tokenizer, "test", tokens=options.prompt_tokens, count=2 * repeats)
    rows = [[Leg(COLD, prompts[2 * i], new_tokens), Leg(WARM, prompts[2 * i + 1], new_tokens)] for i in range(repeats)]
    length = options.long_prompt_tokens
    if not length:
        return rows, []
    if length + 1 > context:
        return rows, [f"no long prompt: {length} tokens and one more do not fit the model's context of {context}"]
    texts = document_beginnings(tokenizer, "test", tokens=length, count=repeats, domains=("prose", "code"))
    return [[*row, Leg(LONG, text, 1)] for row, text in zip(rows, texts, strict=True)], []


def _contenders(model_dir: str, options: DecodeBenchmark, hierarchy: Hierarchy | None) -> list[Contender]:
    limits = Limits(options.timeout, options.limit_bytes, hierarchy)
    base = Order("", model_dir, [], options.threads, cache_policy=options.cache_policy, products=options.products)
    work_dir = Path(options.work_dir).resolve()
    gguf = Path(options.gguf).resolve() if options.gguf else work_dir / f"{Path(model_dir).name}-f16.gguf"
    caches, budgets = words(options.expert_cache), words(options.memory_budget)
    turns: dict[str, Any] = {"prefetches": options.prefetches, "levers": [None, *filter(None, [options.lever])]}
    ours = our_contenders(base, limits, caches=caches, budgets=budgets, **turns)
    return ours + [
        opponent(name, base, limits, work_dir=work_dir, gguf=gguf, ours=ours[0].order)
        for name in tqdm(options.opponents, desc="prepare", unit="opponent")
    ]


def _take_turns(
    contenders: Sequence[Contender], legs: Sequence[list[Leg]], store: ExpertStore, against_new_tokens: int | None
) -> list[SideRun]:
    """Run all sides with the legs of every repeat, each of which begins with another side."""
    turns = [(i, contenders[(i + j) % len(contenders)]) for i in range(len(legs)) for j in range(len(contenders))]
    runs = []
    with tqdm(turns, unit="process") as progress:
        for repeat, contender in progress:
            progress.set_description(f"repeat {repeat + 1}: {contender.name}")
            own_legs = _legs_of(contender, legs[repeat], against_new_tokens)
            runs.append(_turn(contender, own_legs, store, repeat=repeat))
            progress.write(_found(runs[-1]))
    return runs


def _found(run: SideRun) -> str:
    """One process in a line, while others are still to come."""
    times = [f"{leg} {MILLISECONDS.text(one['tpot_ms'])}" for leg, one in run.legs.items() if one.get("tpot_ms")]
    said = [*([f"TPOT {', '.join(times)}"] if times else []), *([run.failure] if run.failure else [])]
    return f"repeat {run.repeat + 1}, {run.contender}: {'; '.join(said)}"


def _turn(contender: Contender, legs: list[Leg], store: ExpertStore, *, repeat: int) -> SideRun:
    """One process, from dropped page caches, and the disk's rate around it: shared disks change from minute to minute."""
    if contender.unable:
        return SideRun(contender.name, repeat, contender.limits.memory_bytes, failure=contender.unable)
    order = replace(contender.order, legs=legs)
    before = _read_rate(store)
    page_cache.drop([*order.shards, *([Path(order.gguf)] if order.gguf else [])])
    one = run_side(order, contender.limits, contender=contender.name, repeat=repeat)
    one.read_rate = (before + _read_rate(store)) / 2
    if order.offload_dir:
        shutil.rmtree(order.offload_dir)
        Path(order.offload_dir).mkdir()
    return one


def _legs_of(contender: Contender, legs: Sequence[Leg], against_new_tokens: int | None) -> list[Leg]:
    """The legs of one side: the long prompt is for those its bound is made of; slow opponents may decode fewer tokens."""
    if contender.order.side in LONG_SIDES:
        return list(legs)
    most = against_new_tokens or max(leg.max_new_tokens for leg in legs)
    return [replace(leg, max_new_tokens=min(leg.max_new_tokens, most)) for leg in legs if leg.name != LONG]


def _read_rate(store: ExpertStore) -> float:
    """Bytes per second that the model's disk gives now."""
    return disk_rate(store.shards, store.format.expert_bytes, depths=AROUND_DEPTHS, seconds=AROUND_SECONDS).best


def _bandwidth(store: ExpertStore, threads: int) -> dict[str, Any]:
    """Bytes per second: of reads as large as one expert, alone and while all cores compute, and of memory."""
    reads = disk_rate(store.shards, store.format.expert_bytes)
    with products_beside(threads):
        beside = _read_rate(store)
    return {
        "read_bytes": reads.read_bytes,
        "direct": reads.direct,
        "read_by_depth": reads.by_depth,
        "read": reads.best,
        "read_beside_products": beside,
        "memory": memory_bandwidth(threads),
    }


def _compared(
    runs: Sequence[SideRun], contenders: Sequence[Contender], bandwidth: dict[str, Any], store: ExpertStore
) -> dict[str, Any]:
    """Summaries, ratios and bounds; the memory's rate is the better of before and after."""
    config = read_config(store.model_dir).get_text_config()
    active_bytes = store.active_bytes(top_k=config.num_experts_per_tok, tied_embeddings=config.tie_word_embeddings)
    machine = {"memory_rate": max(one["memory"] for one in bandwidth.values()), "active_bytes": active_bytes}
    ours = [contender.name for contender in contenders if contender.order.side == "remoe"]
    others = {contender.name: [one for one in ours if one != contender.name] for contender in contenders}
    bounds: dict[str, Any] = {}
    for name in ours:
        legs = {leg: decode_bound(runs, name, leg, **machine) for leg in (COLD, WARM)}
        legs[LONG] = prompt_bound(runs, name)
        bounds[name] = {leg: bound for leg, bound in legs.items() if bound is not None}
    return {
        "ours": ours,
        "model": {"active_bytes": active_bytes, "expert_bytes": store.format.expert_bytes},
        "summary": summarise(runs),
        "ratios": {
            name: {to: {leg: ratios(runs, of=name, to=to, leg=leg) for leg in (COLD, WARM)} for to in beside}
            for name, beside in others.items()
        },
        "equal_tokens": {
            name: {to: equal_tokens(runs, of=name, to=to) for to in beside} for name, beside in others.items()
        },
        "bounds": bounds,
    }
