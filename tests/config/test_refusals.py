"""What each command refuses before it loads anything: the error names the key, and says what to do."""

import pytest
import yaml
from omegaconf import OmegaConf

from verl.config.commands import ChatConfig, DemoConfig, EvalConfig, ExportConfig
from verl.config.load import load_config
from verl.config.pairs import RewardTrainerConfig
from verl.config.sft import SFTConfig
from verl.errors import UserError

TRAINING = ["data.train_files=train.jsonl", "model.partial_pretrain=m"]
NEEDED = {
    SFTConfig: TRAINING,
    RewardTrainerConfig: TRAINING,
    EvalConfig: ["model_path=m", "test_file=test.jsonl", "output_dir=out"],
    ChatConfig: ["model_path=m"],
    ExportConfig: ["source=m", "directory=out"],
    DemoConfig: [],
}
WRONG = {
    SFTConfig: {
        "model.lora_rank=-1": "model.lora_rank",
        "model.lora_rank=8 model.lora_alpha=0": "model.lora_alpha",
        "model.lora_rank=8 model.lora_alpha=.inf": "model.lora_alpha",
        "model.lora_rank=8 model.lora_dropout=1": "model.lora_dropout",
        "model.use_dora=true": "model.use_dora",
        "model.trainable_tokens=stop": "model.trainable_tokens",
        "model.load_in_4bit=true": "model.load_in_4bit",
        "model.lora_rank=8 model.load_in_4bit=true model.fsdp_config.cpu_offload=true": (
            "model.load_in_4bit=true with model.fsdp_config.cpu_offload=true"
        ),
        "model.param_dtype=bfloat16 model.fsdp_config.cpu_offload=true": (
            "model.param_dtype=bfloat16 with model.fsdp_config.cpu_offload=true"
        ),
        "optim.name=adamw_8bit model.fsdp_config.cpu_offload=true": "optim.name=adamw_8bit with model.fsdp_config.cpu_offload=true",
        "model.strategy=ddp model.fsdp_config.shard_size=2": "model.fsdp_config.shard_size=2 with model.strategy=ddp",
        "model.strategy=ddp model.param_dtype=bfloat16": "model.param_dtype=bfloat16 with model.strategy=ddp",
        "trainer.logger=[console,3]": "trainer.logger",
        "trainer.logger=''": "trainer.logger",
        "trainer.total_training_steps=5 trainer.profile_step=6": "trainer.profile_step",
    },
    RewardTrainerConfig: {
        "data.truncation=middle": "data.truncation",
        "data.max_length=1": "data.max_length",
        "data.train_batch_size=0": "data.train_batch_size",
        "data.val_max_samples=0": "data.val_max_samples",
        "data.max_length=100 data.max_tokens_per_micro_batch=150": "data.max_tokens_per_micro_batch",
        "model.context_parallel_size=2": "model.context_parallel_size",
        "optim.lr=-1": "optim.lr",
        "trainer.save_freq=0": "trainer.save_freq",
    },
    EvalConfig: {
        "messages_key=messages system_prompt=Hi": "system_prompt",
        "max_new_tokens=0": "max_new_tokens",
        "n=0": "n",
        "n=2": "n",
        "batch_size=0": "batch_size",
        "temperature=-0.1": "temperature",
        "top_k=-1": "top_k",
        "top_p=0": "top_p",
        "top_p=1.1": "top_p",
        "max_samples=0": "max_samples",
    },
    ChatConfig: {"temperature=-1": "temperature", "max_new_tokens=0": "max_new_tokens"},
    ExportConfig: {"dtype=int8": "dtype", "max_shard_size=5": "max_shard_size", "max_shard_size=0GB": "max_shard_size"},
    DemoConfig: {"train_rows=0": "train_rows", "rl_steps=0": "rl_steps", "test_rows=0": "test_rows", "seed=-1": "seed"},
}
RIGHT = {
    SFTConfig: ["model.lora_adapter_path=a model.use_dora=true", "trainer.max_ckpt_to_keep=-1", "data.train_max_samples=-1"],
    RewardTrainerConfig: ["", "data.max_length=100 data.max_tokens_per_micro_batch=200"],
    EvalConfig: ["messages_key=messages tools_key=tools", "n=2 temperature=1", "max_samples=-1", "top_p=1"],
    ChatConfig: ["temperature=0"],
    ExportConfig: ["dtype=float16 max_shard_size=500mb", "max_shard_size=1.5GB"],
    DemoConfig: ["seed=0"],
}


@pytest.mark.parametrize(
    ("schema", "words", "where"),
    [(schema, words, where) for schema, refused in WRONG.items() for words, where in refused.items()],
)
def test_a_wrong_setting_names_its_key(schema: type, words: str, where: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(schema, [*NEEDED[schema], *words.split()])
    assert caught.value.where == where
    assert caught.value.fix


@pytest.mark.parametrize(("schema", "words"), [(schema, words) for schema, accepted in RIGHT.items() for words in accepted])
def test_what_is_at_the_edge_of_what_is_right_is_taken(schema: type, words: str) -> None:
    loaded = OmegaConf.structured(load_config(schema, [*NEEDED[schema], *words.split()]))
    for key, _, text in (word.partition("=") for word in words.split()):
        value = OmegaConf.select(loaded, key)
        assert value == type(value)(yaml.safe_load(text)), f"{key} was not taken as given"


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_what_only_prints_ends_with_0(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load_config(ChatConfig, [word])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert ("max_new_tokens" in printed) == (word == "--help") and printed.strip()
