"""One request under a memory budget, in a process of its own: `python -m evaluation.benchmark.sides.memory_trial TRIAL_JSON`.

Says on standard output what it holds before it loads anything, waits for a line on standard input (time to set its limit),
then serves the request and says how that went: `served`, or `refused` and why.
"""

import json
import sys
from typing import Any

import torch
import transformers

from configs.load import UserError
from evaluation.engine.loading import load
from evaluation.engine.memory.process import private_bytes
from evaluation.engine.options import EngineOptions


def main(trial: dict[str, Any]) -> None:
    """`trial`: model_dir, memory_budget, context_tokens, batch, new_tokens, seed, threads."""
    torch.set_num_threads(trial["threads"])
    transformers.utils.logging.disable_progress_bar()
    _say(private_bytes=private_bytes())
    sys.stdin.readline()
    batch, context, new = (trial[key] for key in ("batch", "context_tokens", "new_tokens"))
    try:
        with load(
            trial["model_dir"], EngineOptions(memory_budget=trial["memory_budget"], context_tokens=batch * context)
        ) as (
            model,
            engine,
        ):
            assert engine.division is not None
            vocabulary = model.config.get_text_config().vocab_size
            draw = torch.Generator().manual_seed(trial["seed"])
            ids_BT = torch.randint(vocabulary, (batch, context - new), generator=draw)
            generate: Any = model.generate
            generate(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=new, min_new_tokens=new)
            _say(outcome="served", slots=engine.division.slots)
    except UserError as error:
        _say(outcome="refused", why=str(error))


def _say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
