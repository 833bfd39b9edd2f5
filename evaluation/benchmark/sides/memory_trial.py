"""One request under a memory budget, in a process of its own: `python -m evaluation.benchmark.sides.memory_trial TRIAL_JSON`.

Says on standard output what it holds before it loads anything, waits for a line on standard input (time to set its limit),
then serves the request and says how that went: `served`, or `refused` and why.
"""

import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from configs.load import UserError
from evaluation.engine.loading import load
from evaluation.engine.memory.process import private_bytes
from evaluation.engine.options import EngineOptions


@dataclass(frozen=True)
class Trial:
    """The task of one process."""

    model_dir: str
    memory_budget: int  # bytes
    batch: int
    context_tokens: int  # of each sequence, the new ones included
    new_tokens: int
    seed: int  # of the prompts
    threads: int


def main(trial: Trial) -> None:
    """Say what is held, wait for the limit, serve the request, say how it went."""
    torch.set_num_threads(trial.threads)
    transformers.utils.logging.disable_progress_bar()
    _say(private_bytes=private_bytes())
    sys.stdin.readline()
    try:
        _say(outcome="served", slots=_serve(trial))
    except UserError as error:
        _say(outcome="refused", why=str(error))


def _serve(trial: Trial) -> int:
    """Generate from random prompts under the budget; returns the slots that it bought."""
    options = EngineOptions(memory_budget=trial.memory_budget, context_tokens=trial.batch * trial.context_tokens)
    with load(trial.model_dir, options) as (model, engine):
        assert engine.division is not None
        vocabulary = model.config.get_text_config().vocab_size
        draw = torch.Generator().manual_seed(trial.seed)
        ids_BT = torch.randint(vocabulary, (trial.batch, trial.context_tokens - trial.new_tokens), generator=draw)
        generate: Any = model.generate
        mask_BT, new_tokens = torch.ones_like(ids_BT), trial.new_tokens
        generate(input_ids=ids_BT, attention_mask=mask_BT, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        return engine.division.slots


def _say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main(Trial(**json.loads(sys.argv[1])))
