"""Keys that stand beside the method, the reward or the optimizer that reads them, also in a file of the user's own."""

from dataclasses import asdict
from pathlib import Path

import pytest

from verl.algorithms import dapo
from verl.config.commands import EvalConfig
from verl.config.load import describe, load_config, to_yaml
from verl.config.objects import config_of
from verl.config.pairs import RewardTrainerConfig
from verl.config.plugin_settings import completed, settings_of
from verl.config.ppo import AlgorithmConfig, PPOConfig, RewardConfig
from verl.config.sft import SFTConfig
from verl.config.shared import OptimConfig
from verl.errors import UserError

NEEDED = ["data.train_files=train.jsonl", "model.partial_pretrain=model"]
KTO = """
from dataclasses import dataclass

from verl.algorithms.grpo import Loss, advantages


@dataclass
class Settings:
    # How hard it pulls.
    # The larger the harder.
    beta: float = 0.2
    # Leave out what teaches nothing.
    dynamic_sampling: bool = True
    weights: list[float] | None = None

    def check(self) -> None:
        if self.beta > 1:
            raise ValueError("beta is above 1")
"""
LENGTH = """
from dataclasses import dataclass


@dataclass
class Settings:
    # Words that are enough.
    longest: int = 10


def score(prompt, response, row, settings):
    return float(len(response.split()) <= settings.longest)
"""


@pytest.fixture
def kto(tmp_path: Path) -> str:
    (tmp_path / "kto.py").write_text(KTO)
    return str(tmp_path / "kto.py")


@pytest.fixture
def length(tmp_path: Path) -> str:
    (tmp_path / "length.py").write_text(LENGTH)
    return str(tmp_path / "length.py")


def load(*words: str, schema: type = PPOConfig) -> object:
    return load_config(schema, [*NEEDED, *words])


def ppo(*words: str) -> PPOConfig:
    found = load(*words)
    assert isinstance(found, PPOConfig)
    return found


def error_of(*words: str, schema: type = PPOConfig) -> UserError:
    with pytest.raises(UserError) as caught:
        load(*words, schema=schema)
    assert caught.value.fix
    return caught.value


# As all methods had them in one group of keys, nulls filled by each method's own table.
COMMON: dict[str, object] = {
    "updates_per_step": 1,
    "clip_ratio_low": 0.2,
    "clip_ratio_high": 0.2,
    "dual_clip": None,
    "whiten_advantages": False,
    "loss_aggregation": "token-mean",
    "keep_reference": True,
    "kl_coef": 0.0,
    "kl_in": "loss",
    "kl_target": None,
    "kl_horizon": 10000,
    "entropy_coef": 0.0,
    "old_logprobs": "trainer",
    "importance_weights": None,
    "importance_cap": 2.0,
    "dynamic_sampling": False,
    "max_refills": 3,
    "overlong_buffer_tokens": 0,
    "overlong_penalty": 1.0,
}
OWN: dict[str, dict[str, object]] = {
    "grpo": {"norm_by_std": True, "loss_aggregation": "sequence-mean"},
    "dr_grpo": {"norm_by_std": False, "loss_aggregation": "constant"},
    "rloo": {"norm_by_std": False, "loss_aggregation": "sequence-mean"},
    "dapo": {"norm_by_std": True, "clip_ratio_high": 0.28, "dynamic_sampling": True},
    "gspo": {"norm_by_std": True, "loss_aggregation": "sequence-mean", "clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4},
    "reinforce": {"norm_by_std": True, "gamma": 1.0},
    "ppo": {"whiten_advantages": True, "gamma": 1.0, "lam": 1.0, "value_clip": 0.2},
}


@pytest.mark.parametrize("name", OWN)
def test_each_methods_defaults_are_its_own(name: str) -> None:
    algorithm = ppo(f"algorithm.name={name}").algorithm
    assert asdict(algorithm) == {"name": name, "kl_estimator": None, **COMMON, **OWN[name]}


def test_the_divergence_is_estimated_by_k1_in_the_reward_and_by_k3_in_the_loss() -> None:
    found = [ppo("algorithm.kl_coef=0.1", *words).algorithm.estimator for words in ((), ("algorithm.kl_in=reward",))]  # type: ignore[attr-defined]
    assert found == ["k3", "k1"]


def test_a_file_of_ones_own_has_its_keys_like_a_built_in_method(kto: str) -> None:
    algorithm = ppo(f"algorithm.name={kto}", "algorithm.beta=0.5", "algorithm.weights=[1,2]", "algorithm.updates_per_step=2").algorithm
    assert isinstance(algorithm, AlgorithmConfig)
    assert (algorithm.beta, algorithm.weights, algorithm.updates_per_step) == (0.5, [1.0, 2.0], 2)  # type: ignore[attr-defined]


def test_a_shared_key_may_have_another_default(kto: str) -> None:
    assert ppo(f"algorithm.name={kto}").algorithm.dynamic_sampling is True
    assert ppo(f"algorithm.name={kto}", "algorithm.dynamic_sampling=false").algorithm.dynamic_sampling is False
    assert ppo().algorithm.dynamic_sampling is False


def test_the_order_of_words_and_files_does_not_matter(kto: str, tmp_path: Path) -> None:
    (tmp_path / "key.yaml").write_text("algorithm: {beta: 0.5}\n")
    (tmp_path / "name.yaml").write_text(f"algorithm.name: {kto}\n")
    name, key = f"algorithm.name={kto}", "algorithm.beta=0.5"
    files = [["--config", f"{tmp_path}/{file}.yaml"] for file in ("key", "name")]
    ways = [(name, key), (key, name), (*files[0], name), (*files[1], key), (*files[0], *files[1]), (*files[1], *files[0])]
    assert all(ppo(*words) == ppo(name, key) for words in ways)


def test_the_last_name_counts(kto: str, tmp_path: Path) -> None:
    (tmp_path / "name.yaml").write_text("algorithm: {name: dapo}\n")
    assert ppo("--config", f"{tmp_path}/name.yaml").algorithm.clip_ratio_high == 0.28  # type: ignore[attr-defined]
    assert ppo("--config", f"{tmp_path}/name.yaml", f"algorithm.name={kto}").algorithm.beta == 0.2  # type: ignore[attr-defined]


def test_references_to_keys_are_resolved_also_in_a_name(kto: str) -> None:
    assert ppo(f"algorithm.name={kto}", "optim.lr=${algorithm.beta}").optim.lr == 0.2
    assert ppo(f"trainer.experiment_name={kto}", "algorithm.name=${trainer.experiment_name}").algorithm.beta == 0.2  # type: ignore[attr-defined]
    assert error_of("algorithm.name=${algorithm.beta}").where == "algorithm.name"


def test_a_written_config_reads_back_as_itself(kto: str, length: str, tmp_path: Path) -> None:
    config = ppo(
        f"algorithm.name={kto}", "algorithm.beta=0.5", f"reward.name=[{length},format]", "reward.longest=3", "optim.betas=[0.8,0.9]"
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(PPOConfig, ["--config", f"{tmp_path}/config.yaml"]) == config
    assert "beta: 0.5" in (tmp_path / "config.yaml").read_text() and "longest: 3" in (tmp_path / "config.yaml").read_text()


def test_a_misspelt_key_of_ones_own_file_is_answered_with_the_nearest(kto: str) -> None:
    assert error_of(f"algorithm.name={kto}", "algorithm.betta=0.5").fix == "did you mean algorithm.beta?"


@pytest.mark.parametrize("word", ["algorithm.beta=strong", "algorithm.dynamic_sampling=3.5", "algorithm.weights=[a]"])
def test_a_value_of_the_wrong_type_names_its_key(kto: str, word: str) -> None:
    assert error_of(f"algorithm.name={kto}", word).where == word.partition("=")[0]


def test_a_key_of_another_is_answered_with_those_that_have_it(kto: str, tmp_path: Path) -> None:
    error = error_of("algorithm.name=rloo", "algorithm.gamma=0.9")
    assert (error.where, error.what) == ("algorithm.gamma", "is a key of ppo, reinforce; rloo has no such key")
    assert error.fix == "leave it out, or set algorithm.name=ppo"
    (tmp_path / "other.yaml").write_text("algorithm: {lam: 0.9}\n")
    assert error_of("--config", f"{tmp_path}/other.yaml").where == f"{tmp_path}/other.yaml: algorithm.lam"
    assert "is a key of adamw, adamw_8bit;" not in error_of("optim.beta=1").what, "betas is"
    assert error_of("reward.format=[a]").what == "is a key of format; gsm8k has no such key"
    owners = "dpo, dpo_norm, ipo, kto, odpo, orpo, robust_dpo, simpo"
    assert error_of("algorithm.beta=0.1", schema=RewardTrainerConfig).what == f"is a key of {owners}; bradley_terry has no such key"


def test_a_wrong_value_is_found_by_the_file_itself(kto: str) -> None:
    error = error_of(f"algorithm.name={kto}", "algorithm.beta=2")
    assert (error.where, error.what) == (f"algorithm.name={kto}", "ValueError: beta is above 1")
    assert error_of("optim.betas=[1,2]", schema=SFTConfig).where == "optim.betas"
    assert error_of("critic.optim.betas=[0.9]").where == "critic.optim.betas"
    assert error_of("algorithm.kl_coef=-1").where == "algorithm.kl_coef"


def test_a_key_without_a_default_must_be_given(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(KTO.replace("beta: float = 0.2", "beta: float"))
    assert "algorithm.beta must be given" in error_of(f"algorithm.name={file}").what
    assert ppo(f"algorithm.name={file}", "algorithm.beta=1").algorithm.beta == 1.0  # type: ignore[attr-defined]
    assert "algorithm.beta=required" in describe(PPOConfig, [f"algorithm.name={file}"])


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("beta: float = 0.2", "name: str = 'kto'", "'name' cannot be a key of its Settings: every"),
        ("dynamic_sampling: bool = True", "dynamic_sampling: int = 1", "'dynamic_sampling' in its Settings is a key that every"),
        ("@dataclass\n", "", "Settings is not a dataclass"),
        ("beta: float = 0.2", "beta: 'Missing' = 0.2", "Settings: name 'Missing' is not defined"),
        ("beta: float = 0.2", "beta: complex = 1j", "Unexpected type annotation: complex"),
        ("from verl.algorithms.grpo import Loss, advantages", "from verl.algorithms.grpo import Loss", "is no method of reinforcement"),
    ],
)
def test_settings_that_cannot_be_are_refused(old: str, new: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(KTO.replace(old, new))
    error = error_of(f"algorithm.name={tmp_path}/mine.py")
    assert found in error.what
    assert error.where is not None


# Help


def test_help_shows_the_keys_of_what_is_named(kto: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*words: str) -> str:
        with pytest.raises(SystemExit):
            load_config(PPOConfig, [*words, "--help"])
        return capsys.readouterr().out

    of_mine = "  algorithm.beta=0.2\n      How hard it pulls.\n      The larger the harder.\n"
    assert of_mine in shown(f"algorithm.name={kto}") and "algorithm.clip_ratio_low" not in shown(f"algorithm.name={kto}")
    assert "algorithm.dynamic_sampling=true\n      Leave out what teaches nothing.\n" in shown(f"algorithm.name={kto}")
    assert "  algorithm.clip_ratio_high=0.28\n" in shown("algorithm.name=dapo")
    assert "  algorithm.norm_by_std=true\n      Divide the advantages" in shown(), "a default of its own, the comment of the class below"
    (tmp_path / "name.yaml").write_text(f"algorithm: {{name: {kto}}}\n")
    assert of_mine in shown("--config", f"{tmp_path}/name.yaml")


def test_help_of_what_does_not_exist_says_so() -> None:
    with pytest.raises(UserError, match="no algorithms named 'gppo'") as caught:
        load_config(PPOConfig, ["algorithm.name=gppo", "--help"])
    assert caught.value.fix == "did you mean 'ppo'? dapo, distill, dr_grpo, grpo, gspo, ppo, reinforce, rloo, or path/to/file.py"


# Rewards


def test_rewards_that_are_named_together_have_the_keys_of_all(length: str) -> None:
    reward = ppo(f"reward.name=[gsm8k,format,{length}]", "reward.longest=3", "reward.format=[a]", "reward.weights=[1,2,3]").reward
    assert (reward.longest, reward.format, reward.weights) == (3, ["a"], [1.0, 2.0, 3.0])  # type: ignore[attr-defined]


def test_a_key_that_two_rewards_have_names_both(length: str, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(LENGTH)
    error = error_of(f"reward.name=[{length},{tmp_path}/other.py]")
    assert (error.where, error.what) == ("reward.name", f"both {length} and {tmp_path}/other.py have a key 'longest'")
    assert "twice" in error_of(f"reward.name=[{length},{length}]").what


def test_the_evaluators_metric_has_the_keys_of_its_grader(length: str, tmp_path: Path) -> None:
    words = ["model_path=m", "test_file=t", "output_dir=o"]
    config = load_config(EvalConfig, [*words, "reward.longest=3", f"metric={length}"])
    assert config.reward.longest == 3  # type: ignore[attr-defined]
    plain = load_config(EvalConfig, words)
    (tmp_path / "plain.yaml").write_text(to_yaml(plain))
    assert load_config(EvalConfig, ["--config", f"{tmp_path}/plain.yaml"]) == plain, "without own keys too"
    with pytest.raises(UserError, match=r"reward\.format: is a key of format; gsm8k has no such key"):
        load_config(EvalConfig, [*words, "metric=gsm8k", "reward.format=[a]"])
    with pytest.raises(UserError, match=r"reward\.pattern: is a key of regex; metric is not set\n  fix: leave it out, or set metric=regex"):
        load_config(EvalConfig, [*words, "reward.pattern=a"])
    with pytest.raises(UserError, match=r"did you mean reward\.longest\?"):
        load_config(EvalConfig, [*words, "metric.longest=3", f"metric={length}"])


# Configs that are made in Python


def test_a_config_that_is_made_in_python_is_completed(kto: str) -> None:
    config = PPOConfig(algorithm=AlgorithmConfig(kto, updates_per_step=2), reward=RewardConfig(["format"]), optim=OptimConfig(lr=1e-3))
    config.data.train_files, config.model.partial_pretrain = "train.jsonl", "model"
    whole = config_of(PPOConfig, [config])
    assert whole == ppo(f"algorithm.name={kto}", "algorithm.updates_per_step=2", "reward.name=[format]", "optim.lr=1e-3", *SCHEDULE)
    assert completed(whole).algorithm is whole.algorithm and type(config.algorithm) is AlgorithmConfig


SCHEDULE = ("optim.lr_scheduler=cosine", "optim.warmup_steps_ratio=0.1")  # of a plain OptimConfig


def test_keys_of_another_method_in_python_are_refused() -> None:
    from verl.algorithms import dapo

    config = PPOConfig(algorithm=dapo.Settings(name="grpo"))
    with pytest.raises(UserError, match="algorithm has the keys of another method"):
        completed(config)
    config.algorithm.name = "dapo"
    assert completed(config).algorithm is config.algorithm


def test_keys_that_a_group_lacks_have_their_defaults() -> None:
    from verl.engine.optimizers import adamw

    assert settings_of(OptimConfig(), adamw) == adamw.Settings([0.9, 0.95])


DERIVED = """
from dataclasses import dataclass

from verl.algorithms._settings import GroupSettings
from verl.algorithms.grpo import Loss, advantages

{decorator}
class Settings(GroupSettings):
    alpha: int
"""


def test_a_key_without_a_default_must_be_given_also_where_the_settings_derive_from_the_shared_ones(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(DERIVED.format(decorator="@dataclass(kw_only=True)"))
    words = [*NEEDED, f"algorithm.name={tmp_path / 'own.py'}"]
    with pytest.raises(UserError, match=r"algorithm\.alpha must be given"):
        load_config(PPOConfig, words)
    assert asdict(load_config(PPOConfig, [*words, "algorithm.alpha=3"]))["algorithm"]["alpha"] == 3


def test_settings_that_only_derive_from_a_dataclass_would_lose_their_fields_and_are_refused(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(DERIVED.format(decorator=""))
    with pytest.raises(UserError, match=r"own\.py: Settings is not a dataclass\n  fix: write @dataclass above it"):
        load_config(PPOConfig, [*NEEDED, f"algorithm.name={tmp_path / 'own.py'}"])


def test_a_config_with_the_settings_of_another_method_than_its_name_is_refused() -> None:
    config = PPOConfig()
    config.algorithm = dapo.Settings()
    with pytest.raises(UserError, match="algorithm has the keys of another method"):
        config_of(PPOConfig, (config,))


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ('alpha: float = "abc"', r"own\.py: algorithm\.alpha: .*abc.*\n  fix: in its Settings, use the types"),
        ("alpha: complex = 1j", r"own\.py: algorithm\.alpha: "),
        ("check: int = 1", "'check' cannot be a key of its Settings"),
        ('name: str = "x"', "'name' cannot be a key of its Settings"),
    ],
)
def test_a_key_that_a_config_cannot_hold_is_named_with_its_file(field: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(DERIVED.format(decorator="@dataclass").replace("alpha: int", field))
    with pytest.raises(UserError, match=said):
        load_config(PPOConfig, [*NEEDED, f"algorithm.name={tmp_path / 'own.py'}"])


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("algorithm.alpha=1", None),  # as like algorithm.dual_clip as any other key of the group
        ("algorithm.dual_clp=3", "algorithm.dual_clip"),
        ("data.lora_rnk=8", "model.lora_rank"),
        ("optin.lr=1", "optim.lr"),
        ("reward.bonus=2", None),
    ],
)
def test_only_a_key_that_looks_alike_is_proposed(word: str, near: str | None) -> None:
    with pytest.raises(UserError) as caught:
        load_config(PPOConfig, [*NEEDED, word])
    assert caught.value.fix == (f"did you mean {near}?" if near else "--help lists all keys")
