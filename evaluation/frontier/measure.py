"""Measures all points of a frontier, and what the chosen ones cost in generated text and in tasks; goes on where it was killed.

Letters: L layers, D strengths, R texts, S tokens of each.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.load import UserError
from data.groups import own_pieces
from data.pieces import spread_pieces
from evaluation.engine.levers.spec import levers_of
from evaluation.engine.store.experts import ExpertStore
from evaluation.frontier.allocation import allocate
from evaluation.frontier.arguments import FrontierArguments
from evaluation.frontier.generation import Written, write_on
from evaluation.frontier.points import Found, compare
from evaluation.frontier.prices import price_of
from evaluation.frontier.result import NO_LEVER, UNTOUCHED, Combination, Measure, Point, Price
from evaluation.frontier.steps import CacheKind, Steps, read_in_steps
from evaluation.frontier.task_scores import StepLM
from evaluation.quality.batches import Answers, identity_of, process_index
from evaluation.quality.scores import Scores, scores_of
from evaluation.quality.tasks import LoadedTasks, load_tasks
from training.model.expert_format import ExpertFormat
from training.model.loading import load_pretrained
from training.model.packed_experts import expert_modules
from training.model.quantising import quantised_format
from training.model.routers import copy_into_routers, find_routers, most_chosen, router_parameters
from training.run_folder.router_delta import load_for

Texts = npt.NDArray[np.integer]
Job = tuple[Any, Callable[[], dict[str, Any]]]
"""What is asked, as JSON that says all about it, and what finds the answer."""
CHOSEN_BY, REPORTED = "chosen_by", "reported"
WITHIN = 0.9
"""Strengths for each layer are made for this part of a gate: what they cost together is not quite what it is apart."""


def texts_of(args: FrontierArguments, tokenizer: PreTrainedTokenizerBase) -> dict[str, Texts]:
    """[R, S]: the texts that are chosen by, and other ones that are reported.

    Raises:
        UserError: there are too few of that length.
    """
    tokens, count = args.max_length, args.texts_per_domain
    if not args.groups:
        apart: dict[str, Any] = {"tokens": tokens, "at_least": tokens, "every": tokens, "per_domain": count}
        splits = {CHOSEN_BY: args.choose_split, REPORTED: args.report_split}
        return {
            name: np.stack(spread_pieces(tokenizer, split, args.domains, **apart)) for name, split in splits.items()
        }
    found: dict[str, list[Any]] = {CHOSEN_BY: [], REPORTED: []}
    for name, pieces in own_pieces(tokenizer, args.groups, tokens=tokens, per_group=2 * count).items():
        whole = [piece for piece in pieces if len(piece) == tokens]
        if len(whole) < 4:
            raise UserError(f"group {name} has {len(whole)} pieces of {tokens} tokens, 4 are needed; lower max_length")
        found[CHOSEN_BY] += whole[::2]
        found[REPORTED] += whole[1::2]
    return {name: np.stack(pieces) for name, pieces in found.items()}


class Frontier:
    """What is measured, all combinations alike; what was measured before is not measured again.

    Processes of `accelerate launch` share the work, each with a whole model, and all of them end with all that was found.

    Args:
        kept: a folder where answers are kept as they come.

    Raises:
        UserError: see the parts; everything that can be known is found out before anything is measured.
    """

    def __init__(
        self, args: FrontierArguments, model_dir: str, tokenizer: PreTrainedTokenizerBase, device: Any, *, kept: Path
    ) -> None:
        self._args, self._model_dir, self._tokenizer, self._kept = args, model_dir, tokenizer, kept
        self._texts, self._new = texts_of(args, tokenizer), args.new_tokens or 0
        self._tasks: LoadedTasks | None = load_tasks(args.quality) if args.with_tasks else None
        self._seeds: dict[str, list[Mapping[str, Tensor]]] = {
            arm: [load_for(model_dir, folder) for folder in args.folders(arm)] for arm in args.arms
        }
        self._formats = _formats(args, model_dir)
        self._model = load_pretrained(model_dir, dtype=args.dtype, device=device)
        if (smallest := most_chosen(self._model)) > min(args.slots):
            raise UserError(
                f"slots={min(args.slots)}: one token uses {smallest} experts of a layer; write at least that"
            )
        self._seeds[UNTOUCHED] = [
            {name: weight.detach().clone() for name, weight in router_parameters(self._model).items()}
        ]
        for arm, seeds in self._seeds.items():
            self._seeds[arm] = seeds or self._seeds[UNTOUCHED]

    def points(self, found: Callable[[Point], None] = lambda _: None) -> list[Point]:
        """Every combination; `found` is told of each as it comes."""
        points = []
        with tqdm(desc="frontier", unit="pass", leave=False, disable=process_index() > 0) as bar:
            for arm in (UNTOUCHED, *self._args.arms):
                for slots, policy in itertools.product(self._args.slots, self._args.policies):
                    at = partial(Combination, arm=arm, slots=slots, policy=policy)
                    levers = (NO_LEVER, *self._args.levers, *self._by_layer(at, bar))
                    compared_with = [self._base(slots)] if arm == UNTOUCHED else []
                    self._read_all([*compared_with, *(at(lever=lever) for lever in levers)], (CHOSEN_BY, REPORTED), bar)
                    for lever in levers:
                        here, there = (self._compared(at(lever=lever), name) for name in (CHOSEN_BY, REPORTED))
                        points.append(Point(**at(lever=lever).model_dump(), chosen_by=here, reported=there))
                        found(points[-1])
        return points

    def chosen_by(self, at: Combination) -> Measure:
        """One combination on the texts to choose by alone."""
        return self._compared(at, CHOSEN_BY)

    def prices(self, chosen: list[Combination]) -> list[Price]:
        """What these cost in text that they write themselves, and in tasks; on the texts that are reported."""
        prices, base = [], {}
        for arm in dict.fromkeys(at.arm for at in chosen) if self._new else ():
            self._answered(arm, [self._writing(at) for at in chosen if at.arm == arm])
        for at in tqdm(chosen, desc="prices", unit="combination", leave=False, disable=process_index() > 0):
            if at.slots not in base:
                base[at.slots] = self._written_and_scored(self._base(at.slots))
            measured = self._written_and_scored(at)
            if process_index() == 0:  # what tasks score is known to it alone
                prices.append(price_of(at, *measured, *base[at.slots], new=self._new))
        return prices

    def _base(self, slots: int) -> Combination:
        return Combination(arm=UNTOUCHED, lever=NO_LEVER, slots=slots, policy="lru")

    def _by_layer(self, at: Callable[..., Combination], bar: Any) -> list[str]:
        """Levers with a strength for each layer, for every gate: from curves of each layer alone, by the texts to choose by."""
        deltas, layers, levers = self._args.per_layer_deltas, np.eye(len(find_routers(self._model))), []
        for lever in self._args.per_layer:
            alone = [[at(lever=_of_layers(lever, layer * delta)) for delta in deltas] for layer in layers]
            self._read_all([at(lever=NO_LEVER), *itertools.chain(*alone)], (CHOSEN_BY,), bar)
            measures = [[self._compared(one, CHOSEN_BY) for one in row] for row in alone]
            none = self._compared(at(lever=NO_LEVER), CHOSEN_BY)
            cost_LD, saved_LD = (
                np.array([[getattr(one, name).value - getattr(none, name).value for one in row] for row in measures])
                for name in ("cost", "fewer")
            )
            for gate in self._args.gates:
                left = WITHIN * gate - none.cost.value
                if left > 0:
                    levers.append(_of_layers(lever, allocate(deltas, cost_LD, saved_LD, within=left)))
        return levers

    def _compared(self, at: Combination, texts: str) -> Measure:
        here, base = self._found(at, texts), self._found(self._base(at.slots), texts)
        form = self._formats.get(at.arm)
        return compare(here, base, self._texts[texts].shape, expert_bytes=None if form is None else form.expert_bytes)

    def _found(self, at: Combination, texts: str) -> Found:
        """What was found of every seed."""
        return Found([Steps(**_as_arrays(values)) for (values,) in self._answered(at.arm, [self._reading(at, texts)])])

    def _read_all(self, ats: Sequence[Combination], names: Sequence[str], bar: Any) -> None:
        """Combinations of one arm at once, shared out over the processes; each is found by itself afterwards."""
        self._answered(ats[0].arm, [self._reading(at, texts) for at in ats for texts in names], bar.update)

    def _reading(self, at: Combination, texts: str) -> Job:
        def read() -> dict[str, Any]:
            return _as_lists(read_in_steps(self._model, self._texts[texts], _levers(at), _cache(self._args, at)))

        return ["frontier", self._texts[texts].tolist(), *self._as_asked(at)], read

    def _answered(self, arm: str, jobs: Sequence[Job], done: Callable[[], object] = lambda: None) -> list[list[Any]]:
        """For every seed what each job finds, or found before; every process does its part of them."""
        asked, finds = [job[0] for job in jobs], [job[1] for job in jobs]
        of_seeds = []
        for answers in self._with_routers(arm):
            told: Any = {"engine": None, "answered": lambda _: done()}
            of_seeds.append(answers.of(asked, lambda place: finds[place](), **told))
        return of_seeds

    def _written_and_scored(self, at: Combination) -> tuple[list[Written], list[Scores]]:
        """Of every seed what it writes, if that is asked for, and what it scores."""
        written = self._answered(at.arm, [self._writing(at)]) if self._new else []
        scores = [self._scored(at) for _ in self._with_routers(at.arm)] if self._tasks is not None else []
        return [Written(**_as_arrays(values)) for (values,) in written], scores

    def _writing(self, at: Combination) -> Job:
        untouched = partial(_these, self._model, self._seeds[UNTOUCHED][0])

        def write() -> dict[str, Any]:
            how: dict[str, Any] = {"new": self._new, "untouched": untouched}
            return _as_lists(write_on(self._model, self._texts[REPORTED], _levers(at), _cache(self._args, at), **how))

        return ["written", self._texts[REPORTED].tolist(), self._new, *self._as_asked(at)], write

    def _scored(self, at: Combination) -> Scores:
        assert self._tasks is not None
        identity = f"{identity_of(self._model, self._model_dir, None)} {self._as_asked(at)}"
        with Answers(self._kept, identity) as answers:
            lm = StepLM(self._model, self._tokenizer, _levers(at), _cache(self._args, at), answers)
            return scores_of(lm, self._tokenizer, self._args.quality, self._tasks)

    def _as_asked(self, at: Combination) -> list[Any]:
        """What an answer depends on beside the model and its routers."""
        experts = self._args.experts(at.arm)
        return [at.lever, [at.slots, at.policy, self._args.scope], *([experts] if experts else [])]

    def _with_routers(self, arm: str) -> Iterator[Answers]:
        """For every seed, while the model has its routers and experts, what was answered with them."""
        form = self._formats[arm] if self._args.experts(arm) else None
        for routers in self._seeds[arm]:
            with (
                _these(self._model, routers),
                rounded_experts(self._model, form) if form else nullcontext(),
                Answers(self._kept, identity_of(self._model, self._model_dir, None)) as answers,
            ):
                yield answers


@contextmanager
def _these(model: PreTrainedModel, routers: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the model has these routers; afterwards those that it had."""
    before = {name: weight.detach().clone() for name, weight in router_parameters(model).items()}
    copy_into_routers(model, routers)
    try:
        yield
    finally:
        copy_into_routers(model, before)


def _levers(at: Combination) -> Any:
    return () if at.lever == NO_LEVER else levers_of(at.lever)


def _cache(args: FrontierArguments, at: Combination) -> CacheKind:
    return CacheKind(at.slots, at.policy, args.scope)


def _formats(args: FrontierArguments, model_dir: str) -> dict[str, ExpertFormat]:
    """How each arm's experts are stored; none where the engine could not page the checkpoint.

    Raises:
        UserError: an arm's experts cannot be rounded to what it names.
    """
    kinds = {arm: args.experts(arm) for arm in (UNTOUCHED, *args.arms)}
    try:
        form = ExpertStore(model_dir).format
    except UserError:
        if any(kinds.values()):
            raise
        return {}
    return {arm: replace(form, numbers=quantised_format(kind, form)) if kind else form for arm, kind in kinds.items()}


@contextmanager
def rounded_experts(model: PreTrainedModel, form: ExpertFormat) -> Iterator[None]:
    """Inside, experts have the numbers that this format has nearest to theirs."""
    stacks = [
        stack for module in expert_modules(model) for stack in module.parameters(recurse=False) if stack.dim() == 3
    ]
    before = [stack.data for stack in stacks]
    try:
        for stack in stacks:
            stack.data = torch.stack([_rounded(matrix, form) for matrix in stack.data])
        yield
    finally:
        for stack, matrices in zip(stacks, before, strict=True):
            stack.data = matrices


def _rounded(matrix: Tensor, form: ExpertFormat) -> Tensor:
    """As if it were stored and read again."""
    stored = matrix.T if form.transposed else matrix
    parts = {
        ending: part.contiguous().flatten().view(torch.uint8).numpy()
        for ending, part in form.numbers.encode(stored.cpu()).items()
    }
    out = torch.empty(stored.shape, dtype=matrix.dtype)
    form.numbers.decode(parts, out)
    return (out.T if form.transposed else out).to(matrix.device)


def _of_layers(lever: str, deltas: Any) -> str:
    """A lever with these strengths."""
    return f"{lever}{',' if ':' in lever else ':'}delta={'/'.join(f'{delta:.4g}' for delta in deltas)}"


def _as_lists(found: Any) -> dict[str, Any]:
    return {name: part.tolist() if isinstance(part, np.ndarray) else part for name, part in found._asdict().items()}


def _as_arrays(values: dict[str, Any]) -> dict[str, Any]:
    return {name: np.array(part) if isinstance(part, list) else part for name, part in values.items()}
