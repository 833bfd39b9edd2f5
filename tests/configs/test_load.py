"""The loader: defaults < YAML < overrides, and one clear refusal for everything else."""

import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import pytest

from configs.files import write_yaml
from configs.load import UserError, field_comments, keys_help, load
from evaluation.arguments import EvaluationArguments
from training.arguments import TrainArguments


@dataclass
class Inner:
    depth: int = 2
    name: str = "inner"


@dataclass
class Schema:
    max_steps: int = 10
    learning_rate: float = 0.1
    names: list[str] = field(default_factory=lambda: ["a"])
    maybe: float | None = None
    bf16: bool = False
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps} must be at least 1")


@dataclass
class WithRequired:
    output_dir: str = "???"


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("max_steps: 20\nlearning_rate: 4.0e-3\ninner:\n  depth: 5\n", encoding="utf-8")
    return path


def test_without_a_file_there_are_the_defaults() -> None:
    assert load(Schema) == Schema()


def test_yaml_wins_over_defaults_and_overrides_win_over_yaml(yaml_file: Path) -> None:
    found = load(Schema, yaml_file, ["max_steps=30", "inner.name=other", "names=[b,c]", "maybe=0.5", "bf16=true"])
    assert found == Schema(30, 0.004, ["b", "c"], 0.5, True, Inner(5, "other"))
    assert isinstance(found.inner, Inner)


def test_a_later_override_wins() -> None:
    assert load(Schema, overrides=["max_steps=3", "max_steps=4"]).max_steps == 4


def test_null_unsets_an_optional_key() -> None:
    assert load(Schema, overrides=["maybe=null"]).maybe is None


def test_a_tilde_is_the_home_folder(yaml_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    yaml_file.write_text("inner:\n  name: ~/a\n")
    assert load(Schema, yaml_file).inner.name == "/somewhere/a"
    assert load(Schema, overrides=["inner.name=~/b/c"]).inner.name == "/somewhere/b/c"
    assert load(Schema, overrides=["inner.name=a~/b"]).inner.name == "a~/b"


def test_a_byte_order_mark_is_no_part_of_a_key(yaml_file: Path) -> None:
    yaml_file.write_bytes(b"\xef\xbb\xbfmax_steps: 9\n")
    assert load(Schema, yaml_file).max_steps == 9


def test_what_is_dumped_loads_as_the_same_config(tmp_path: Path) -> None:
    config = Schema(7, 1e-5, ["x", "y: z"], 0.25, True, Inner(9, "ümlaut"))
    write_yaml(tmp_path / "dumped.yaml", config)
    assert load(Schema, tmp_path / "dumped.yaml") == config
    assert [path.name for path in tmp_path.iterdir()] == ["dumped.yaml"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["max_step=3"], "override 'max_step=3': unknown key max_step; did you mean max_steps?"),
        (["inner.deph=3"], "override 'inner.deph=3': unknown key inner.deph; did you mean inner.depth?"),
        (["zzz=3"], "unknown key zzz; known keys: bf16, inner, learning_rate, max_steps, maybe, names"),
        (["max_steps"], "override 'max_steps' has no '='; write it as key=value"),
        (["max_steps=many"], "override 'max_steps=many': max_steps: "),
        (["max_steps=1.5"], "override 'max_steps=1.5': max_steps: "),
        (["bf16=perhaps"], "override 'bf16=perhaps': bf16: "),
        (["names=[b,"], "override 'names=[b,'"),
        (["max_steps={"], "override 'max_steps={'"),
        (["max_steps.deep=3"], "max_steps"),
        (["maybe="], "override 'maybe=' has no value; write maybe=null to unset the key"),
        (["inner=3"], "inner"),
        (["=3"], "override '=3'"),
        (["learning_rate=${nothing}"], "nothing"),
        (["max_steps=0"], "Schema: max_steps=0 must be at least 1"),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load(Schema, overrides=overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"max_stepz: 3\n", "config.yaml: unknown key max_stepz; did you mean max_steps?"),
        (b"inner:\n  dept: 3\n", "config.yaml: unknown key inner.dept; did you mean inner.depth?"),
        (b"max_steps: many\n", "config.yaml: max_steps: "),
        (b"max_steps: 0\n", "config.yaml: max_steps=0 must be at least 1"),
        (b"", "config.yaml must hold `key: value` lines, found NoneType"),
        (b"- 1\n- 2\n", "config.yaml must hold `key: value` lines, found list"),
        (b"max_steps: [1\n", "config.yaml, line 2 is not valid YAML: "),
        (b"learning_rate: \xff\xfe\n", "config.yaml is not UTF-8 text"),
        (
            b"max_steps: 3\nbf16: true\nmax_steps: 4\n",
            "config.yaml, line 3 is not valid YAML: found duplicate key max_steps",
        ),
        (b"inner:\n  depth: 3\n  depth: 4\n", "found duplicate key depth"),
        (b"max_steps: 3\n7: 8\n", "config.yaml: unknown key 7"),
        (b"learning_rate: ${nothing}\n", "nothing"),
        (b"learning_rate: ${\n", "config.yaml"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(yaml_file: Path, content: bytes, message: str) -> None:
    yaml_file.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load(Schema, yaml_file)
    assert "\n" not in str(caught.value)


def test_a_missing_file_suggests_its_neighbour(yaml_file: Path) -> None:
    with pytest.raises(UserError, match=r"confg\.yaml does not exist; did you mean .*config\.yaml\?"):
        load(Schema, yaml_file.with_name("confg.yaml"))


def test_a_missing_file_without_a_neighbour_says_where_the_shipped_ones_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; shipped configs are under configs/"):
        load(Schema, tmp_path / "nowhere" / "x.yaml")


def test_a_key_without_a_value_must_be_given() -> None:
    with pytest.raises(UserError, match="WithRequired: no value for output_dir; set it in the YAML or as key=value"):
        load(WithRequired)
    assert asdict(load(WithRequired, overrides=["output_dir=runs/x"])) == {"output_dir": "runs/x"}


def test_help_names_every_key_with_default_and_comment() -> None:
    shown = keys_help(TrainArguments)
    for key in fields(TrainArguments):
        assert f"\n  {key.name}=" in shown
        assert field_comments(TrainArguments)[key.name], f"{key.name} has no comment"
    assert re.search(r"\n  max_steps=2000 +optimizer steps of the whole run\n", shown)
    assert re.search(r"\n  output_dir=\(required\) +the run's own folder", shown)
    assert "\n  decode.max_new_tokens=32" in keys_help(EvaluationArguments)
