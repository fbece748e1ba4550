"""Wrong uses of the command line: the first line says what is wrong, and the second one what to write."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
from forked import run_forked
from tiny import write_problems_and_model

SFT = "data.train_files=train.jsonl model.partial_pretrain=model"
BEST = "data.val_files=test.jsonl trainer.best_metric"
PLACE = "trainer.default_local_dir"
EVAL = "model_path=model test_file=test.jsonl output_dir=results"
# What is typed after `verl`, a part of the first line, and a part of the second one.
USES = [
    # Options with typing errors, and their values
    (f"inspect {SFT} --radom 3", "there is no option '--radom'", "write --random 3"),
    (f"inspect {SFT} --longst", "there is no option '--longst'", "write --longest"),
    (f"inspect {SFT} --random abc", "'abc' is no whole number", "write verl inspect --random 3"),
    ("export model new --crad", "there is no option '--crad'", "write --card"),
    ("export model new --dtyp float32", "there is no option '--dtyp'", "write --dtype float32"),
    ("export model new --hbu=me/x", "there is no option '--hbu'", "write --hub me/x"),
    ("report begun --evl x", "there is no option '--evl'", "write --eval x"),
    ("serve model --prot 8000", "there is no option '--prot'", "write --port 8000"),
    ("chat model --comapre model", "there is no option '--comapre'", "write --compare model"),
    (f"eval {EVAL} --agianst model", "there is no option '--agianst'", "write --against model"),
    ("sft --cofnig recipe.yaml", "there is no option '--cofnig'", "write --config recipe.yaml"),
    (f"ppo --gups 2 {SFT}", "there is no option '--gups'", "write --gpus 2"),
    ("prove model --rael", "there is no option '--rael'", "write --real"),
    ("demo --sed 3", "there is no option '--sed'", "write --seed 3"),
    ("demo --dir x", "there is no option '--dir'", "--help lists all keys"),
    ("ui --port abc", "'abc' is no port: a whole number from 1 to 65535", "write verl ui --port 8080"),
    ("board begun --port=99999", "'99999' is no port: a whole number from 1 to 65535", "write verl board --port 8080"),
    # Words too many
    ("ui experiments", "one word too many: experiments", "write verl ui --dir experiments"),
    ("prove model model", "one word too many: model", "verl prove takes one MODEL"),
    ("serve model model", "one word too many: 'model'", "remove it: verl serve DIR"),
    ("export model new third", "one word too many: 'third'", "remove it: verl export SRC NEW_DIR"),
    ("eval model", "'model' is a model or a directory", "write model_path=model test_file=… output_dir=…"),
    ("eval test.jsonl", "'test.jsonl' is a file", "write test_file=test.jsonl"),
    ("demo foo", "'foo' is no key with a value", "such as seed=1"),
    # A folder of runs, a run or a checkpoint in place of another
    ("chat runs", "is a folder of runs: runs/b/new, runs/a/old, the newest first", "verl chat runs/b/new"),
    ("serve runs/a", "is a folder of runs: runs/a/old", "verl serve runs/a/old"),
    ("export runs out", "is a folder of runs: runs/b/new", "verl export runs/b/new out"),
    ("eval runs", "is a folder of runs: runs/b/new", "model_path=runs/b/new"),
    ("eval model_path=runs test_file=test.jsonl output_dir=results", "is a folder of runs", "verl eval model_path=runs/b/new test_file"),
    ("chat model compare=runs", "compare=runs: is a folder of runs", "verl chat model compare=runs/b/new"),
    (f"eval {EVAL} --against runs", "against=runs: is a folder of runs", "--against runs/b/new"),
    ("sft data.train_files=train.jsonl model.partial_pretrain=runs", "is a folder of runs", "model.partial_pretrain=runs/b/new"),
    ("prove runs", "is a folder of runs", "verl prove runs/b/new"),
    ("report runs", "is a folder of runs", "verl report runs/b/new"),
    ("prove empty", "is an empty directory", "give the directory that has config.json"),
    ("prove train.jsonl", "is a file, not a directory", "give the directory"),
    ("eval model --against full", "verl eval model: is a checkpoint, not an evaluation", "verl eval model_path=model test_file=test.jsonl"),
    ("eval begun --against full", "verl eval begun: is a run, not an evaluation", "evaluate it first: verl eval model_path=begun"),
    (
        "eval done --against model",
        "against=model: is a checkpoint",
        "verl eval model_path=model test_file=asked.jsonl output_dir=model-eval",
    ),
    ("eval dnoe --against model", "no such directory", "did you mean done?"),
    ("eval train.jsonl --against done", "is a file, not an evaluation", "name the output_dir"),
    ("eval cut --against done", "an evaluation that was interrupted", "overwrite=true"),
    ("eval outer --against done", "is not an evaluation, and has outer/one in it", "name one of them, such as outer/one"),
    ("report begun --eval model", "--eval model: is a checkpoint, not an evaluation", "verl eval model_path=model"),
    # Files in place of directories, and the other way
    (f"sft {SFT} {PLACE}=train.jsonl", "is a file, and a directory is wanted", f"{PLACE}=checkpoints"),
    (f"sft {SFT} {PLACE}=train.jsonl/run", "train.jsonl is a file, so there can be no", f"{PLACE}=checkpoints"),
    ("eval model_path=model test_file=test.jsonl output_dir=train.jsonl", "is a file, and a directory is wanted", "output_dir=results"),
    ("ui --dir train.jsonl", "--dir train.jsonl: is a file, and a directory is wanted", "verl ui --dir experiments"),
    ("prove model --json empty", "empty: is a directory, expected a file", "give the name of a file"),
    ("prove model --json train.jsonl/found.json", "train.jsonl: is a file, and a directory is wanted", "choose another folder"),
    (f"inspect {SFT} --json empty", "empty: is a directory, expected a file", "give the name of a file"),
    ("sft --config train.jsonl", "is a file of rows, expected a config file", "write data.train_files=train.jsonl"),
    ("sft --config begun", "is a directory, expected a config file", "did you mean --config begun/config.yaml?"),
    # Metrics of the validation
    (f"sft {SFT} {BEST}=val/los", "does not measure val/los", "did you mean val/loss?"),
    (f"sft {SFT} {BEST}=loss", "loss is no metric of the validation", "did you mean val/loss?"),
    (f"sft {SFT} {BEST}=val/accuracy trainer.best_mode=max", "does not measure val/accuracy", "write one of val/loss, val/exact_match"),
    (f"ppo {SFT} {BEST}=val/rewards", "does not measure val/rewards", "did you mean val/reward?"),
    (f"reward {SFT} {BEST}=val/acuracy", "does not measure val/acuracy", "did you mean val/accuracy?"),
    # Commands
    (f"train {SFT}", "there is no command 'train'", "did you mean verl sft?"),
    (f"finetune {SFT}", "there is no command 'finetune'", "did you mean verl sft?"),
    (f"evaluate {EVAL}", "there is no command 'evaluate'", "did you mean verl eval?"),
    (f"grpo {SFT}", "there is no command 'grpo'", "did you mean verl ppo?"),
    (f"exprot {SFT}", "there is no command 'exprot'", "did you mean verl export?"),
    ("xyzzy", "there is no command 'xyzzy'", "verl --help; the commands are sft,"),
    (SFT, "there is no command 'data.train_files=train.jsonl'", "name the command first: verl sft data.train_files=train.jsonl"),
    # Words that are no keys
    ("sft", "data.train_files and model.partial_pretrain must be given", "add data.train_files=… model.partial_pretrain=…"),
    ("sft train.jsonl", "'train.jsonl' is a file, and no key names it", "write data.train_files=train.jsonl"),
    ("inspect train.jsonl", "'train.jsonl' is a file, and no key names it", "write data.train_files=train.jsonl"),
    ("eval train.jsonl", "'train.jsonl' is a file, and no key names it", "write test_file=train.jsonl"),
    ("sft book.xlsx", "'book.xlsx' is a file, and no key names it", "write data.train_files=book.xlsx"),
    ("sft model", "'model' is a model or a directory, and no key names it", "write model.partial_pretrain=model"),
    ("sft recipe.yaml", "'recipe.yaml' is a file, and no key names it", "write --config recipe.yaml"),
    (f"sft --lr 1e-5 {SFT}", "there is no option '--lr'", "write optim.lr=1e-5"),
    (f"sft --learning-rate=1e-5 {SFT}", "there is no option '--learning-rate=1e-5'", "write optim.lr=1e-5"),
    (f"sft {SFT} optim.lr = 1e-5", "there is a space beside the = after 'optim.lr'", "write optim.lr=1e-5"),
    (f"sft {SFT} optim.lr:1e-5", "'optim.lr:1e-5' has a colon in place of =", "write optim.lr=1e-5"),
    (f"sft {SFT} optim.lr 1e-5", "'optim.lr' has no value", "write optim.lr=1e-5"),
    (f"sft {SFT} —model.lora_rank=8", "'—model.lora_rank'", "model.lora_rank"),
    (f"sft --gpu 2 {SFT}", "there is no option '--gpu'", "write --gpus 2"),
    (f"sft --gpus two {SFT}", "invalid value for '--gpus'", "write verl sft --gpus 2"),
    (f"sft --gpus 0 {SFT}", "invalid value for '--gpus'", "write verl sft --gpus 2"),
    ("sft --config nothere.yaml", "nothere.yaml: no such config file", "the current folder is"),
    ("prove", "missing argument 'MODEL'", "write verl prove MODEL"),
    ("chat", "a checkpoint must be given", "write verl chat checkpoints/verl-sft/run"),
    ("export model", "a new directory must be given", "write verl export model NEW_DIR"),
    # Keys
    (f"sft {SFT} leraning_rate=1e-5", "unknown key 'leraning_rate'", "did you mean optim.lr?"),
    (f"sft {SFT} lora_r=8", "unknown key 'lora_r'", "did you mean model.lora_rank?"),
    (f"sft {SFT} num_train_epoch=3", "unknown key 'num_train_epoch'", "did you mean trainer.total_epochs?"),
    (f"sft {SFT} push_to_hub=true", "unknown key 'push_to_hub'", "hf upload|verl export"),
    (f"sft {SFT} early_stopping=3", "unknown key 'early_stopping'", "trainer.best_metric=val/loss keeps the best checkpoint"),
    (f"sft {SFT} gradient_acumulation_steps=4", "unknown key 'gradient_acumulation_steps'", "set data.train_batch_size"),
    (f"sft {SFT} fp16=true", "unknown key 'fp16'", "model.compute_dtype=bfloat16"),
    (f"sft {SFT} deepspeed=z3.json", "unknown key 'deepspeed'", "model.strategy=fsdp2"),
    (f"sft {SFT} zzz=1", "unknown key 'zzz'", "--help lists all keys"),
    (f"sft {SFT} data.micro_batch_size=8", "data.micro_batch_size is not supported", "use data.micro_batch_size_per_gpu"),
    (f"sft {SFT} optim=adamw", "optim is a group of keys", "write one of its keys: optim.name,"),
    (f"ppo {SFT} algorithm.kl_coeff=0.1", "unknown key 'algorithm.kl_coeff'", "did you mean algorithm.kl_coef?"),
    (f"ppo {SFT} rollout.n=4", "unknown key 'rollout.n'", "did you mean rollout.samples_per_prompt?"),
    (f"ppo {SFT} actor_rollout_ref.model.path=m", "actor_rollout_ref.model.path is not supported", "model.partial_pretrain"),
    (f"eval {EVAL} model=model", "unknown key 'model'", "did you mean model_path?"),
    ("chat model temprature=1", "unknown key 'temprature'", "did you mean temperature?"),
    # What is found before the work
    ("inspect data.train_files=train.jsonl model.partial_pretrain=model --random", "--random has no value", "verl inspect --random 3"),
    ("board runs --host", "--host has no value", "verl board --host"),
    ("sft data.train_files=model model.partial_pretrain=model", "'model' is a directory", "it is a model's: name a data file"),
    ("chat modle", "model_path=modle: is not downloaded", "did you mean the directory model?"),
    ("prove modle", "MODEL=modle: is not downloaded", "did you mean the directory model?"),
    ("eval done", "'done' is an evaluation, and no key names it", "verl eval done --against OTHER"),
    (f"sft {SFT} samples.rows=2 data.val_files=train.jsonl samples.metric=gsm8kk", "'gsm8kk'", "gsm8k"),
    ("sft data.train_files= model.partial_pretrain=model", "data.train_files: is empty", "data.train_files=train.jsonl"),
    (f"sft {SFT} trainer.save_freq=1.5", "trainer.save_freq: 1.5 is not a whole number", "trainer.save_freq=epoch"),
    ("export model new --hub bad//name", "hub=bad//name: is no name of a repository", "give owner/name"),
    (
        "inspect data.train_files=train.jsonl model.partial_pretrain=model --row two",
        "--row: 'two' is no row",
        "--row 17, --row train.jsonl:17",
    ),
    (
        "inspect data.train_files=train.jsonl model.partial_pretrain=model --html model",
        "model: is a directory, expected a file",
        "give the name of a file",
    ),
    # Values
    (f"sft {SFT} optim.lr=abc", "optim.lr: 'abc' is not a number", "write e.g. optim.lr=1e-5"),
    (f"sft {SFT} data.max_length=1k", "data.max_length: '1k' is not a whole number", "write e.g. data.max_length=1024"),
    (f"sft {SFT} data.train_batch_size=0", "data.train_batch_size: found 0", "give a number of at least 1"),
    (f"sft {SFT} model.use_dora=yes", "model.use_dora: found 'yes'", "write true or false"),
    (f"sft {SFT} model.enable_gradient_checkpointing=3", "found 3", 'write one of true, "selective" or false'),
    (f"sft {SFT} optim.lr_scheduler=cosinus", "found 'cosinus'", "write one of cosine, linear, constant or wsd"),
    (f"sft {SFT} trainer.logger=wanbd", "trainer.logger: no loggers named 'wanbd'", "did you mean 'wandb'?"),
    (f"ppo {SFT} algorithm.name=grppo", "no algorithms named 'grppo'", "did you mean 'grpo'?"),
    (f"ppo {SFT} rollout.temperature=0", "rollout.temperature: 0.0 is not positive", "give a number above 0"),
    (f"reward {SFT} algorithm.name=dppo", "no algorithms named 'dppo'", "did you mean 'dpo'?"),
    (f"eval {EVAL} n=4", "n=4 answers at temperature=0 are all equal", "set temperature=1, or n=1"),
    ("export model new dtype=int8", "dtype: found 'int8'", "write one of bfloat16, float16 or float32"),
    (f"sft {SFT} trainer.best_metric=val/loss", "there are no validation rows", "set data.val_files"),
    (f"sft {SFT} trainer.resume_from_path=out", "do not go together", "set trainer.resume_mode=resume_path"),
    # Files
    ("sft data.train_files=trian.jsonl model.partial_pretrain=model", "no file 'trian.jsonl'", "did you mean train.jsonl?"),
    ("sft data.train_files=. model.partial_pretrain=model", "'.' is a directory", "name its files with a glob"),
    ("sft data.train_files=[train.jsonl model.partial_pretrain=model", "cannot read the value", "write lists as [a,b]"),
    ("sft data.train_files=a.jsonl,b.jsonl model.partial_pretrain=model", "is one text with 2 files", "write a list: 'data.train_files=["),
    ("sft data.train_files=book.xlsx model.partial_pretrain=model", "a spreadsheet", "CSV"),
    ("inspect data.train_files=book.xlsx model.partial_pretrain=model", "a spreadsheet", "CSV"),
    (f"inspect {SFT} --row 999", "there is no row 999", "data.train_files has 16 rows"),
    ("sft data.train_files=broken.jsonl model.partial_pretrain=model", "broken.jsonl:2: not JSON", "write one object per line"),
    (f"sft {SFT} data.prompt_key=qestion", "column 'qestion' is missing", "did you mean data.prompt_key=question?"),
    (f"reward {SFT}", "has one answer (column 'answer'), not a pair", "verl sft trains on such rows"),
    (f"sft {SFT} data.max_length=4", "rows are longer than data.max_length=4", "data.max_length="),
    (f"sft {SFT} data.chat_template=nothere.jinja", "data.chat_template=nothere.jinja: no such file", "give the path of a file"),
    ("sft data.train_files=train.jsonl model.partial_pretrain=./modle", "no such model directory", "did you mean model?"),
    ("sft data.train_files=train.jsonl model.partial_pretrain=empty", "is an empty directory", "give the directory that has config.json"),
    ("sft data.train_files=train.jsonl model.partial_pretrain=begun", "without a complete checkpoint", "run its command again"),
    ("eval model_path=a/b/c test_file=test.jsonl output_dir=results", "no such model directory", "the current folder is"),
    ("eval model_path=model test_file=tset.jsonl output_dir=results", "no file 'tset.jsonl'", "did you mean test.jsonl?"),
    ("eval model_path=scorer test_file=test.jsonl output_dir=results", "is a reward model", "give a language model"),
    ("chat scorer", "is a reward model", "reward_model.path of verl ppo"),
    ("chat model --best", "no key names a run's directory", "model_path=checkpoints/verl-sft/run"),
    ("export model full", "the directory is not empty", "choose a new directory"),
    ("export model train.jsonl", "is a file, and a directory is wanted", "directory=my-model"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_problems_and_model(tmp_path_factory.mktemp("wrong"), 16, 4)
    for name in ("empty", "full", "begun"):
        (folder / name).mkdir()
    for name in ("full/a", "begun/train.log", "begun/config.yaml"):
        (folder / name).touch()
    (folder / "broken.jsonl").write_text('{"question": "1", "answer": "2"}\n{"question": \n')
    for age, run in enumerate(("runs/b/new", "runs/a/old")):
        shutil.copytree(folder / "model", step := folder / run / "global_step_2")
        os.utime(step, (0, 1e9 - age))
    for name in ("done", "cut", "outer/one"):
        (folder / name).mkdir(parents=True)
    for name in ("done", "outer/one"):
        (folder / name / "results.json").write_text('{"config": {"test_file": "asked.jsonl", "n": 1}, "answers": 1}')
    for name in ("done", "cut"):
        (folder / name / "predictions.jsonl").write_text('{"prompt": "1", "reference": "2", "score": 0}\n')
    with zipfile.ZipFile(folder / "book.xlsx", "w") as book:
        book.writestr("xl/workbook.xml", "<x/>")
    shutil.copytree(folder / "model", folder / "scorer")
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "scorer" / "config.json").write_text(
        json.dumps({**config, "architectures": ["Qwen2ForSequenceClassification"], "num_labels": 1})
    )
    return folder


@pytest.mark.parametrize(("typed", "wrong", "right"), USES, ids=[typed for typed, _, _ in USES])
def test_the_first_line_says_what_is_wrong_and_the_second_what_to_write(typed: str, wrong: str, right: str, folder: Path) -> None:
    done = run_forked("-m", "verl", *typed.split(" "), folder=folder, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2, done.stdout + done.stderr
    first, second, *_ = [*done.stderr.splitlines(), "", ""]
    assert first.startswith("error: ") and wrong in first
    assert second.startswith("  fix: ") and any(part in second for part in right.split("|"))
    assert len(first) < 300 and "Traceback" not in done.stderr


def test_there_are_many() -> None:
    assert len(USES) == len({typed for typed, _, _ in USES}) >= 120
