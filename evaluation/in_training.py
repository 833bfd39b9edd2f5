"""What training measures of the model that it trains, every so many steps: tasks, routing and replay, beside the untouched base.

`training/loop.py` names this module and does not import it: training needs nothing of the evaluation unless it is asked to.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.load import UserError, load
from evaluation.arguments import EvaluationArguments
from evaluation.figures import figures
from evaluation.measurement import Candidate, Measurement, pieces_of_text
from evaluation.quality.batches import Answers
from evaluation.quality.scores import Scores
from evaluation.quality.tasks import check_chat_template, load_tasks
from training.sharding.layerwise import is_sharded


class InTraining:
    """What the YAML `config` asks for but for decoding and plans, of a model that is in memory already.

    Raises:
        UserError: a task or a text that cannot be used; a budget, under which another model would have to be loaded.
    """

    def __init__(self, config: str, model_dir: str, tokenizer: PreTrainedTokenizerBase) -> None:
        args = load(EvaluationArguments, config)
        if args.engine_options(dtype=args.dtype) is not None:
            raise UserError(
                f"eval_config={config} has a memory_budget or an expert_cache, but while training the model in memory is "
                "measured; leave them out"
            )
        tasks = load_tasks(args.quality)
        check_chat_template(args.quality, tokenizer)
        per_group, tokens = args.routing.requests_per_domain, args.routing.max_length
        texts = pieces_of_text(tokenizer, args, tasks, per_group=per_group, tokens=tokens, with_answers=True)
        self._measurement = Measurement(model_dir, tokenizer, tasks, texts, args, output=None)
        self._base: Scores | None = None

    def __call__(self, model: PreTrainedModel, *, is_base: bool = False) -> dict[str, float]:
        """Name and value of everything that was measured, the same in every process that has results.

        Args:
            is_base: whether the model computes with the routers it came with, which later ones are compared with.
        """
        with _left_as_it_is(model):
            answers, untouched = Answers(together=is_sharded(model)), Candidate({}, None, [])
            base = None if is_base else self._base
            run, scores = self._measurement.of_model(model, None, untouched, answers, base_scores=base)
        if is_base:
            self._base = scores
        return {f"eval/{name}": value for name, value in figures(run)}


@contextmanager
def _left_as_it_is(model: PreTrainedModel) -> Iterator[None]:
    """No checkpointing inside, which would do without a key-value cache; afterwards modes and random numbers are as before."""
    modes = [(module, module.training) for module in model.modules()]
    states = random.getstate(), np.random.get_state()
    model.eval()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, mode in modes:
            module.training = mode
