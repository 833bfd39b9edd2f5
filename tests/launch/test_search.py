"""The search: every trial a row, only texts to choose by are read, and what was broken off is taken up again."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from configs.load import UserError, load
from evaluation.frontier import measure as measure_module
from launch import search as search_module
from launch.search import SearchArguments, main
from training.arguments import TrainArguments
from training.model.loading import load_pretrained
from training.model.routers import router_parameters
from training.run_folder import router_delta

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "data" / "embedded" / "model")
CONFIG = str(ROOT / "configs" / "search" / "in_the_loop.yaml")
TEXTS = ["policies=[lru]", "texts_per_domain=2", "max_length=16", "domains=[prose,code]", "new_tokens=0"]
SMALL = [f"frontier_overrides={json.dumps(TEXTS)}", "trials=4"]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[TrainArguments]:
    """In the place of trainings: routers that are moved the further, the larger their coefficient is."""
    monkeypatch.chdir(ROOT)
    given: list[TrainArguments] = []
    base = {n: w.detach() for n, w in router_parameters(load_pretrained(MODEL, dtype=torch.bfloat16)).items()}

    def train(training: TrainArguments, accelerate_config: str | None) -> None:
        assert accelerate_config is None
        given.append(training)
        draw, far = torch.Generator().manual_seed(0), float(training.miss_coef or 0)
        moved = {
            name: (weight + far * weight.std() * torch.randn(weight.shape, generator=draw)).to(weight.dtype)
            for name, weight in base.items()
        }
        about: dict[str, Any] = {"objective": training.objective, "config": {"seed": 0}}
        digest = router_delta.checkpoint_sha256(MODEL, moved)
        folder = Path(training.output_dir) / "router_delta"
        router_delta.save(folder, moved, base_model=MODEL, base_sha256=digest, about=about)

    monkeypatch.setattr(search_module, "launch_training", train)
    return given


def test_every_trial_is_a_row_and_a_search_that_was_killed_goes_on(
    tmp_path: Path, trained: list[TrainArguments], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, texts = measure_module.read_in_steps, []

    def seen(model: Any, texts_RS: Any, *others: Any) -> Any:
        texts.append(texts_RS.tobytes())
        if len(texts) == 4:
            raise KeyboardInterrupt
        return read(model, texts_RS, *others)

    monkeypatch.setattr(measure_module, "read_in_steps", seen)
    given = [CONFIG, *SMALL, f"output_dir={tmp_path / 'out'}"]
    with pytest.raises(KeyboardInterrupt):
        main(given)
    broken_off = trained[-1]
    main(given)
    assert len(set(texts)) == 1, "the texts that are reported are not looked at"
    rows = pd.read_csv(tmp_path / "out" / "trials.csv")
    done = rows[rows.state == "COMPLETE"]
    assert len(done) == 4
    assert (rows.state == "FAIL").sum() == 1
    assert trained.count(broken_off) == 2, "what was broken off is trained on, in its own folder"
    assert done.params_miss_coef.between(0.02, 0.3).all()
    assert done.params_delta.between(0.01, 0.1).all()
    assert done.cost.nunique() > 1
    assert {str(t.output_dir) for t in trained} == {str(Path(folder).parent) for folder in done.user_attrs_router_delta}
    count = len(texts)
    main(given)
    assert len(texts) == count, "all trials were made"
    shown = capsys.readouterr().out
    assert "…" not in shown, "the folder of a delta was cut short"
    assert "fewer loads" in shown
    assert "trials.csv" in shown


def test_a_training_that_fails_is_a_row_with_its_reason_and_the_search_goes_on(
    tmp_path: Path, trained: list[TrainArguments], monkeypatch: pytest.MonkeyPatch
) -> None:
    works = search_module.launch_training

    def fails_once(training: TrainArguments, accelerate_config: str | None) -> None:
        if not trained:
            trained.append(training)
            raise UserError("loss is nan at step 3")
        works(training, accelerate_config)

    monkeypatch.setattr(search_module, "launch_training", fails_once)
    given = [CONFIG, *SMALL, "trials=2", f"output_dir={tmp_path / 'out'}"]
    main(given)
    main(given)
    rows = pd.read_csv(tmp_path / "out" / "trials.csv")
    assert rows.state.tolist() == ["FAIL", "COMPLETE", "COMPLETE"], "what failed is not tried again"
    assert rows.user_attrs_error[0] == "loss is nan at step 3"


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("space={miss_coef: [0.3, 0.02]}", "miss_coef=.*write .least, most. above 0"),
        ("space.cache_policy={choices: []}", "cache_policy=.*choices: .one, another"),
        ("space={miss_cof: [0.02, 0.3]}", "did you mean miss_coef"),
        ("space={delta: [0.02, 0.3]}", "space has delta"),
        ("delta=[0.1]", "delta=.0.1.: write"),
        ("lever=prio", "lever 'prio' is not known"),
        ("trials=0", "trials=0: write a number of at least 1"),
        ("train_overrides=[trainable=all,router_kl_coef=0,distill_coef=0]", "a search trains routers only"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(
    key: str, words: str, tmp_path: Path, trained: list[TrainArguments]
) -> None:
    with pytest.raises(UserError, match=words):
        main([CONFIG, *SMALL, f"output_dir={tmp_path / 'out'}", key])
    assert not (tmp_path / "out").exists()
    assert not trained


def test_a_choice_of_words_can_be_searched(tmp_path: Path, trained: list[TrainArguments]) -> None:
    space = "space={cache_policy: {choices: [lru, decayed]}, lever_delta: null}"
    main([CONFIG, *SMALL, space, "trials=5", f"output_dir={tmp_path / 'out'}"])
    assert {t.cache_policy for t in trained} == {"lru", "decayed"}
    assert {t.lever_delta for t in trained} == {0.06}, "what is left out keeps its preset"
    assert load(SearchArguments, CONFIG).trials == 24
