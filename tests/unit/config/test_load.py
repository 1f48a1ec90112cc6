"""From arguments to typed settings: what is accepted, and how everything else is refused in one line with its source."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lctrain import cli
from lctrain.config.load import load
from lctrain.config.overrides import assignment, split
from lctrain.config.schema import CorpusConfig, TrainConfig
from lctrain.config.strict import Positive, Strict
from lctrain.errors import UserError


class Probe(Strict):
    """Settings of a command that has no YAML file."""

    prompt: str = ""
    """Text."""
    name: str | None = None
    """Text or nothing."""
    cp: tuple[Positive, ...] = (1,)
    """Sizes."""
    paths: tuple[str, ...] = ()
    """Files."""
    strategies: tuple[Literal["ring", "all_gather"], ...] = ("ring",)
    """Names."""
    corpora: tuple[CorpusConfig, ...] = ()
    """Sections."""
    rate: float = 0.5
    """A number."""
    data: str = "x"
    """A plain setting that shares its name with a group of configs."""


def train(*args):
    return load(TrainConfig, "train", list(args))


def probe(*args):
    return load(Probe, "no_such_root", list(args))


def refused(action, *args):
    with pytest.raises(UserError) as caught:
        action(*args)
    return str(caught.value)


class TestAccepted:
    def test_defaults_of_the_root(self):
        config = train()
        assert (config.model.name, config.run_dir) == ("tiny", "runs/tiny")
        assert config.data.corpora[0].source == ("python:",)

    def test_plain_plus_and_double_plus_set_the_same(self):
        assert train("trainer.z_loss=0.1") == train("+trainer.z_loss=0.1") == train("++trainer.z_loss=0.1")

    def test_the_last_override_wins(self):
        assert train("trainer.steps=5", "trainer.steps=6").trainer.steps == 6

    def test_group_choice_and_interpolation(self):
        config = train("model=small", "parallel=ring", "launcher.processes=2")
        assert (config.run_dir, config.parallel.cp) == ("runs/small", 2)

    def test_recipe_overrules_groups_and_arguments_overrule_the_recipe(self):
        config = train("recipe=demo", "trainer.steps=30")
        assert (config.parallel.cp, config.launcher.processes, config.trainer.steps) == (2, 2, 30)

    def test_interpolation_reaches_a_default_of_the_schema(self):
        assert train("run_dir=runs/s${trainer.seed}").run_dir == "runs/s0"

    @pytest.mark.parametrize(
        "argument", ["~tracking", "tracking=null", "~tracking.plot", "~recipe", "recipe=null", "+model=tiny"]
    )
    def test_removing_falls_back_to_the_default(self, argument):
        assert train(argument) == train()

    def test_entry_of_a_list(self):
        assert train("data=custom", "data.corpora.0.prefix=c/mine").data.corpora == (CorpusConfig(prefix="c/mine"),)

    @pytest.mark.parametrize(
        "text",
        ["def main(", "a, b: [c", "it's", 'say "hi"', "é 漢字", "C:\\tmp\\", "12", "true", "null", "a=b", "${oops", "x ${a} (",
         r"back\\${slash} (", "[1,2]", "{a: 1}", " padded ", "# no comment", "~", "two\nlines"],
    )  # fmt: skip
    def test_text_is_taken_as_typed(self, text):
        assert probe(f"prompt={text}").prompt == text

    @given(st.text(st.characters(exclude_categories=["Cs"])))
    def test_any_text_is_taken_as_typed(self, text):
        assume(
            text != "???" and text.strip()[:1] not in ("'", '"')
        )  # a mandatory value, and quotes, mean what they do in Hydra
        value = assignment(split(f"prompt={text}"), Probe).value
        assume(not (value == text and "${" in text))  # an interpolation
        assert OmegaConf.to_container(OmegaConf.create({"prompt": value}), resolve=True) == {"prompt": text}

    def test_quoted_text_loses_its_quotes(self):
        assert probe("prompt=' x '").prompt == " x "

    def test_null_for_optional_text(self):
        assert probe("name=null").name is None

    @pytest.mark.parametrize(
        ("argument", "value"),
        [
            ("cp=2", (2,)),
            ("cp=2,4", (2, 4)),
            ("cp=[2,4]", (2, 4)),
            ("cp=[]", ()),
            ("paths=/usr/lib/python3", ("/usr/lib/python3",)),
            ("paths=a,b,1", ("a", "b", "1")),
            ("paths=a(1", ("a(1",)),
            ("strategies=ring,all_gather", ("ring", "all_gather")),
            ("corpora={prefix: a}", (CorpusConfig(prefix="a"),)),
        ],
    )
    def test_lists(self, argument, value):
        assert getattr(probe(argument), argument.partition("=")[0]) == value

    def test_whole_numbers_are_numbers(self):
        assert probe("rate=1").rate == 1.0

    def test_only_heads_that_are_rotated_must_be_even(self):
        assert "set model.attention.head_dim to an even number" in refused(train, "model.attention.head_dim=15")
        assert train("model.attention.head_dim=15", "model.attention.rotary=false").model.attention.head_dim == 15

    def test_a_setting_may_have_the_name_of_a_group(self):
        assert probe("data=tiny").data == "tiny"


class TestRefused:
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ("modle=tiny", "unknown setting modle (argument modle=tiny): did you mean model?"),
            ("+trainer.stpes=3", "unknown setting trainer.stpes (argument +trainer.stpes=3): did you mean trainer.steps?"),
            ("++model.dmi=4", "unknown setting model.dmi (argument ++model.dmi=4): did you mean model.d_model?"),
            ("modle.d_model=4", "unknown setting modle.d_model (argument modle.d_model=4): did you mean model.d_model?"),
            ("steps=3", "unknown setting steps (argument steps=3): did you mean trainer.steps?"),
            ("~trainer.stpes", "unknown setting trainer.stpes (argument ~trainer.stpes): did you mean trainer.steps?"),
            ("recpie=demo", "unknown setting recpie (argument recpie=demo): did you mean recipe?"),
            ("model.name.x=1", "unknown setting model.name.x (argument model.name.x=1): model.name is a single value"),
            ("model={d_modle:4}", "unknown setting model.d_modle (argument model={d_modle:4}): did you mean model.d_model?"),
            ("hydra.run.dir=x", "unknown setting hydra.run.dir (argument hydra.run.dir=x): the top level has run_dir, "),
            ("model=tinny", "model=tinny: group model has no 'tinny'; did you mean model=tiny? choices: deepseek_v3_like, "),
            ("modle/x=3", "unknown config group modle/x (argument modle/x=3): did you mean model?"),
            ("model.d_model=abc", "model.d_model=abc: must be a whole number above 0"),
            ("trainer.steps=-1", "trainer.steps=-1: must be a whole number above 0"),
            ("+trainer.steps=1.5", "trainer.steps=1.5 (argument +trainer.steps=1.5): must be a whole number above 0"),
            ("optim.lr=nan", "optim.lr=NaN (argument optim.lr=nan): must be a finite number above 0"),
            ("optim.beta1=2", "optim.beta1=2: must be a finite number at least 0 and at most 1"),
            ("tracking.plot=1", "tracking.plot=1: must be true or false"),
            ("model.attention.window=0", "model.attention.window=0: must be a whole number above 0, or null"),
            ("parallel.attention=rnig", "parallel.attention=rnig: must be one of ring, bidirectional_ring, double_ring,"),
            ("trainer=5", "trainer=5: must be a section with steps, seq_len, "),
            ("data.corpora=[]", "data.corpora=[]: must be a list of sections with prefix, weight, source, not empty"),
            ("data.corpora=a", "data.corpora.0=a (argument data.corpora=a): must be a section with prefix, weight, source"),
            ("data.corpora.7.prefix=a", "data.corpora.7.prefix=a: list index out of range"),
            ("model.d_model=1,2", "model.d_model=1,2: model.d_model takes one value, not several"),
            ("parallel.cp=3 launcher.processes=4", "launcher.processes=4 is not a multiple of parallel.cp=3; set "),
            ("model.d_model=130", "model.d_model=130 is not a multiple of model.attention.n_heads=4"),
            ("model.pattern=*X", "model.pattern '*X': unknown symbol 'X' at character 2"),
            ("model.moe.top_k=9", "model.moe.top_k=9 exceeds the 8 experts that a token can reach (model.moe.n_experts)"),
            ("model.attention.rope.factor=2", "model.attention.rope.factor=2.0 has no effect with scaling=none; choose "),
            ("engine.distributed_optimizer=false", "engine.distributed_optimizer=false is for engine.name=megatron, but "),
            ("parallel.attention=auto parallel.ulysses=1", "parallel.attention=auto chooses its own degrees: drop parallel.u"),
            ("engine.deepspeed_config=[1]", "engine.deepspeed_config=[1]: must be text or a mapping, or null"),
            ("data=custom", "data.corpora.0.prefix has no value: add data.corpora.0.prefix=... (Path without ending"),
            ("data=null", "data.corpora has no value: add data.corpora=... (Corpora to blend)"),
            ("run_dir=${modle.name}", "run_dir: Interpolation key 'modle.name' not found"),
            ("nonsense", "cannot read 'nonsense': write a setting as name=value, as in trainer.steps=100"),
            ("=3", "cannot read '=3': write"),
            ("--steps=3", "unknown option --steps=3: there are --config-dir DIR and --help; settings have no dashes: steps=3"),
            ("--config-dir", "--config-dir needs a folder"),
            ("--config-dir=/no/such", "--config-dir /no/such is not a folder"),
        ],
    )  # fmt: skip
    def test_one_line_says_what_and_where(self, args, message):
        said = refused(train, *args.split(" "))
        assert said.startswith(message)
        assert "\n" not in said
        assert "http" not in said

    def test_several_mistakes_are_several_lines_but_few(self):
        bad = [f"trainer.{name}=x" for name in ("steps", "seq_len", "global_batch", "micro_batch", "seed", "z_loss")]
        lines = refused(train, *bad).splitlines()
        assert lines[0] == "trainer.steps=x: must be a whole number above 0"
        assert len(lines) == 5
        assert lines[-1] == "and 2 more"

    def test_a_long_value_is_cut(self):
        assert len(refused(train, "trainer.steps=" + "x" * 5000).split(" (argument")[0]) < 120

    def test_through_the_command_line(self, capsys):
        assert cli.main(["config", "train", "+trainer.stpes=3"]) == 2
        captured = capsys.readouterr()
        assert captured.err == "error: unknown setting trainer.stpes (argument +trainer.stpes=3): did you mean trainer.steps?\n"
        assert captured.out == ""


class TestConfigDir:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "model").mkdir()
        (tmp_path / "recipe").mkdir()
        return tmp_path

    def load(self, folder, *args):
        return train(*args, "--config-dir", str(folder))

    def test_a_file_of_ones_own(self, folder):
        (folder / "model" / "mine.yaml").write_text("name: mine\npattern: (*-){1}\nd_model: 8\nvocab_size: 9\n")
        assert self.load(folder, "model=mine").model.d_model == 8

    def test_it_comes_before_the_packages_own(self, folder):
        (folder / "model" / "tiny.yaml").write_text("name: other\npattern: '*'\nd_model: 8\nvocab_size: 9\n")
        assert self.load(folder).model.name == "other"

    def test_unknown_key_names_the_file(self, folder):
        (folder / "recipe" / "mine.yaml").write_text("# @package _global_\ntrainer:\n  stpes: 3\n")
        said = refused(self.load, folder, "recipe=mine")
        assert said == f"unknown setting trainer.stpes ({folder}/recipe/mine.yaml): did you mean trainer.steps?"

    def test_wrong_value_names_the_file(self, folder):
        (folder / "model" / "mine.yaml").write_text("pattern: '*'\nd_model: wide\nvocab_size: 9\n")
        said = refused(self.load, folder, "model=mine")
        assert said == f"model.d_model=wide ({folder}/model/mine.yaml): must be a whole number above 0"

    def test_an_argument_over_the_file_is_the_source(self, folder):
        (folder / "model" / "mine.yaml").write_text("pattern: '*'\nd_model: wide\nvocab_size: 9\n")
        assert refused(self.load, folder, "model=mine", "model.d_model=x") == "model.d_model=x: must be a whole number above 0"

    def test_missing_key_in_a_file(self, folder):
        (folder / "model" / "mine.yaml").write_text("pattern: '*'\nd_model: 8\n")
        assert refused(self.load, folder, "model=mine").startswith("model.vocab_size has no value: add model.vocab_size=...")

    @pytest.mark.parametrize("text", ["a: [1\n", "a: b: c\n", "\tx: 1\n", "defaults:\n  - nowhere: x\n", "- 1\n- 2\n"])
    def test_broken_files_are_one_line(self, folder, text):
        (folder / "recipe" / "mine.yaml").write_text(text)
        assert "\n" not in refused(self.load, folder, "recipe=mine")
