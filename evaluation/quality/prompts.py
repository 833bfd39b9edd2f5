"""The tasks' own prompts as text to route, replay and decode: what the model reads when it is asked, examples and chat
template included."""

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from evaluation.quality.tasks import LoadedTasks, QualityArguments

Pieces = dict[str, list[npt.NDArray[np.integer]]]


def task_pieces(
    tasks: LoadedTasks, args: QualityArguments, tokenizer: PreTrainedTokenizerBase, *, tokens: int, per_task: int,
    with_answers: bool,
) -> Pieces:  # fmt: skip
    """At most `per_task` prompts of each task, or group that was named, as token ids, evenly over its items, their last
    `tokens` tokens.

    Args:
        with_answers: each with its right answer, as text that is read; otherwise without, as a prompt to be answered. Of a
            task that scores whole texts it is these texts in both cases, their first `tokens` tokens.
    """
    of_group: dict[str, list[Any]] = {}
    for name, task in tasks.tasks.items():
        of_group.setdefault(tasks.group_of.get(name, name), []).append(task)
    found: Pieces = {}
    for name, members in of_group.items():
        items = [(task, item) for task in members for item in range(len(task.eval_docs))]
        count = min(per_task, len(items))
        chosen = [items[place * len(items) // count] for place in range(count)]
        found[name] = []
        for task, of_task in itertools.groupby(chosen, key=lambda pair: pair[0]):
            for prompt, answer in _pairs(task, [item for _, item in of_task], args, tokenizer):
                ids = tokenizer(prompt + answer * (with_answers or not prompt), verbose=False)["input_ids"]
                kept = ids[-tokens:] if prompt else ids[:tokens]
                found[name].append(np.array(kept or [tokenizer.eos_token_id], dtype=np.int32))
    return found


def build_requests(task: Any, args: QualityArguments, tokenizer: PreTrainedTokenizerBase, **items: Any) -> list[Any]:
    """The harness's requests for these items (`samples`), or for the first ones (`limit`; None: for all)."""

    def rendered(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        how: Any = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(tokenizer.apply_chat_template(history, tokenize=False, **how))

    task.build_all_requests(
        **items, system_instruction=args.system_instruction, apply_chat_template=args.apply_chat_template,
        fewshot_as_multiturn=args.fewshot_as_multiturn and args.apply_chat_template,
        chat_template=rendered if args.apply_chat_template else None,
    )  # fmt: skip
    return list(task.instances)


def _pairs(
    task: Any, items: list[int], args: QualityArguments, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, str]]:
    """(prompt, right answer) of these items, as the harness makes them."""

    of_item: dict[int, list[Any]] = {}
    for instance in build_requests(task, args, tokenizer, samples=items):
        of_item.setdefault(instance.doc_id, []).append(instance)
    return [_pair(task, instances) for instances in of_item.values()]


def _pair(task: Any, instances: list[Any]) -> tuple[str, str]:
    first = instances[0]
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return "", str(first.args[0])
    target = task.doc_to_target(first.doc)
    if task.OUTPUT_TYPE == "generate_until":
        answer = target[0] if isinstance(target, list) and target else target
        return str(first.args[0]), f"{task.config.target_delimiter}{answer}"
    of_choice = instances[target] if isinstance(target, int) and 0 <= target < len(instances) else first
    return str(of_choice.args[0]), str(of_choice.args[1])
