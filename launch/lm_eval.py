"""`remoe lm-eval`: lm-evaluation-harness's own command, which knows `--model remoe` then; it has no plug-in mechanism."""

import sys
from collections.abc import Sequence

HELP = """usage: remoe lm-eval ARGUMENTS

lm-evaluation-harness's own command, with one model more: `--model remoe`, a mixture of experts whose experts stay on disk.
All its arguments work; `lm-eval --help` and `lm-eval run --help` explain them. In `--model_args` stand

  pretrained=DIR         folder with safetensors weights, or hub name (required)
  memory_budget=8GiB     memory for everything, or expert_cache=2GiB for experts alone: one of them (required)
  router_delta=DIR       tuned routers for exactly this model
  dtype, cache_policy, prefetch, ...                     as `remoe generate --help` explains them
  lever=prior:delta=0.04 changes what is generated; its keys with ; between them: prior:delta=0.04;swaps=1
  max_length, add_bos_token, chat_template_args, ...     as for the harness's `--model hf`

The batch size is found, as large as memory allows; a `--batch_size` above 1 or `--max_batch_size` bounds it. What was read
for it stands in the results beside the scores: hit rate, bytes and tokens of prompts and of generated text.

examples:
  remoe lm-eval --model remoe --model_args pretrained=data/embedded/model,expert_cache=2MiB \\
      --include_path data/embedded/tasks --tasks letters,headword --limit 50
  remoe lm-eval --model remoe --model_args pretrained=DIR,memory_budget=8GiB --tasks gsm8k --num_fewshot 5 \\
      --output_path results
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Register our model and hand over to the harness."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        sys.exit(0)
    from lm_eval.__main__ import cli_evaluate  # type: ignore[import-untyped, unused-ignore]

    import evaluation.quality.language_model  # noqa: F401

    sys.argv = ["lm-eval", *arguments]
    cli_evaluate()
