"""The tasks that lm-evaluation-harness asks: which and how, and whether each can be used, found out before any model runs."""

import logging
import os
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from configs.checks import at_least
from configs.load import UserError


@dataclass
class QualityArguments:
    """What is asked of the model; names and meanings as in lm-evaluation-harness."""

    # a folder of task YAMLs, or a list of folders; tasks that none of them holds are taken from the harness's own
    include_path: Any = "data/embedded/tasks"
    # tasks, groups and tags; * stands for any letters
    tasks: list[str] = field(
        default_factory=lambda: ["arithmetic", "letters", "headword", "next_line_prose", "next_line_code",
                                 "perplexity_prose", "perplexity_code", "perplexity_glosses", "perplexity_puzzles"]
    )  # fmt: skip
    metrics: dict[str, Any] = field(
        default_factory=dict
    )  # task: metric, or [metric, "metric,filter"]; all if not given
    limit: int | None = None  # items per task; null for all
    num_fewshot: int | None = None  # examples before each question; null: as the task has it
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True  # with a chat template: each example is a turn
    system_instruction: str | None = None
    gen_kwargs: dict[str, Any] = field(default_factory=dict)  # for tasks that generate, as {max_gen_toks: 64}
    seed: int = 1234  # of the choice of examples
    batch_size: int | None = None  # at most; null: as many as memory allows, 32 if the whole model is in memory
    confirm_run_unsafe_code: bool = False  # needed for tasks that run code that a model wrote
    log_samples: bool = False  # write every item with what was asked and answered to OUTPUT/samples/ARM/TASK.jsonl
    offline: bool = False  # use no network, as HF_HUB_OFFLINE=1 and HF_DATASETS_OFFLINE=1 in the environment do

    def __post_init__(self) -> None:
        at_least(self, limit=1, num_fewshot=0, batch_size=1)
        if not self.tasks:
            raise ValueError("tasks names none; `lm_eval ls tasks` lists what there is")
        for task, wanted in self.metrics.items():
            names = [wanted] if isinstance(wanted, str) else wanted
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError(
                    f'metrics.{task} is {wanted!r}; write a metric, or a list as [acc, "exact_match,strict"]'
                )
            self.metrics[task] = names

    @property
    def folders(self) -> list[str]:
        """Of own tasks."""
        given = self.include_path
        return [given] if isinstance(given, str) else list(given or [])


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data, to be asked of any number of models; `chosen` holds what was named, groups as a whole."""

    chosen: list[Any]
    tasks: dict[str, Any]
    groups: dict[str, Any]
    manager: Any

    names: list[str]

    @property
    def group_of(self) -> dict[str, str]:
        """Task or lesser group -> the group that was named, of all that were not named themselves."""
        found: dict[str, str] = {}
        for group in (self.groups[name] for name in self.names if name in self.groups):
            inner = [task.task_name for task in group.get_all_tasks()] + [
                lesser.name for lesser in group.get_all_groups()
            ]
            found |= {name: group.name for name in inner if name not in self.names}
        return found


def load_tasks(args: QualityArguments) -> LoadedTasks:
    """Load everything that `args` names; what a first item lacks is found before any model runs.

    Raises:
        UserError: a task that is nowhere, or whose YAML or data the harness cannot use; a metric that its task lacks.
    """
    if args.offline:
        os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns that the model is already loaded
    manager, names = _find(args)
    chosen: list[Any] = []
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for name in names:
        try:
            loaded = manager.load([name])
            for task in loaded["tasks"].values():
                _set_examples(task, args)
                _look_at_first_item(task)
        except Exception as error:  # whatever a YAML, its functions and its data set may raise
            raise UserError(f"task {name!r} cannot be used: {type(error).__name__}: {error}{_hint(error)}") from error
        new = {key: task for key, task in loaded["tasks"].items() if key not in tasks}
        chosen += [loaded["groups"][name]] if name in loaded["groups"] else list(new.values())
        tasks |= new
        groups |= loaded["groups"]
    _check(args, tasks)
    return LoadedTasks(chosen, tasks, groups, manager, names)


def check_chat_template(args: QualityArguments, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse to render chats with a tokenizer that does not say how."""
    if args.apply_chat_template and not tokenizer.chat_template:
        raise UserError(
            f"quality.apply_chat_template=true, and the tokenizer of {tokenizer.name_or_path} has no chat template; write "
            "false, or add its chat_template.jinja to the folder"
        )


def _find(args: QualityArguments) -> tuple[Any, list[str]]:
    """The manager that knows all tasks, and their names; the harness's own are only read if they are needed."""
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped, unused-ignore]

    for folder in args.folders:
        if not os.path.isdir(folder):
            raise UserError(f"include_path {folder} is no folder; give one that holds task YAMLs")
    for with_defaults in (False, True) if args.folders else (True,):
        manager = TaskManager(include_path=args.folders or None, include_defaults=with_defaults)
        found = {pattern: manager.match_tasks([pattern]) for pattern in args.tasks}
        if all(found.values()):
            return manager, list(dict.fromkeys(name for names in found.values() for name in names))
    unknown = next(pattern for pattern, names in found.items() if not names)
    own = TaskManager(include_path=args.folders, include_defaults=False).all_tasks if args.folders else []
    raise UserError(
        f"task {unknown!r} is neither in {', '.join(args.folders) or 'include_path'}, which has "
        f"{', '.join(own) or 'no task at all'}, nor among the {len(manager.all_tasks)} of lm-evaluation-harness; "
        "`lm_eval ls tasks` lists those"
    )


def _hint(error: Exception) -> str:
    """What to do about data that cannot be had."""
    causes, cause = [], error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    names = " ".join(f"{type(found).__name__} {found}" for found in causes)
    if any(word in names for word in ("Offline", "offline", "ConnectionError", "Couldn't reach", "LocalEntryNotFound")):
        return (
            ". Its data is not on this machine and the hub cannot be reached: fetch it where there is a network "
            "(`python -c \"import datasets; datasets.load_dataset('NAME')\"`) and copy ~/.cache/huggingface, unset "
            "HF_HUB_OFFLINE and HF_DATASETS_OFFLINE if they are set, or write quality.offline=false"
        )
    return ""


def _set_examples(task: Any, args: QualityArguments) -> None:
    """As the harness itself does before it asks; a task that has none by its own choice gets none."""
    if (own := task.get_config("num_fewshot")) is None or (args.num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=args.num_fewshot or 0)
    task.set_fewshot_seed(seed=args.seed)


def _look_at_first_item(task: Any) -> None:
    """Ask for everything that the harness asks of an item; raises what it would, and where no choice is the right one."""
    item = next(iter(task.eval_docs))
    text, target = task.doc_to_text(item), task.doc_to_target(item)
    if task.OUTPUT_TYPE == "multiple_choice":
        choices, right = task.doc_to_choice(item), text if task.multiple_input else target
        for answer in right if isinstance(right, list) else [right]:
            if answer not in choices and answer not in range(len(choices)):
                raise ValueError(f"the right answer of its first item is {answer!r}, which is none of {choices}")


def _check(args: QualityArguments, tasks: dict[str, Any]) -> None:
    """What the harness would only refuse after models have run."""
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) and not args.confirm_run_unsafe_code:
            raise UserError(
                f"task {name!r} runs code that a model wrote; write quality.confirm_run_unsafe_code=true if that may happen "
                "on this machine"
            )
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"task {name!r} shows pictures, and only text is evaluated here; leave it out")
    if unknown := sorted(set(args.metrics) - set(tasks)):
        raise UserError(f"metrics names task {unknown[0]!r}, which is not asked; tasks: {', '.join(tasks)}")
