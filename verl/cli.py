"""The `verl` command: each subcommand hands its words to the module that does the work. Light to import: no torch."""

import logging
import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from verl import __version__
from verl.commands import CHAT, DEMO, EVALUATE, EXPORT, PPO, REWARD, SFT, Command, load_module
from verl.errors import UserError, exit_on_user_error

app = typer.Typer(
    name="verl",
    help="Post-training of language models: from a file of questions and answers to a Hugging Face directory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# The module behind a subcommand reads its own words, --help among them.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def main() -> None:
    app()


def print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Options before the subcommand."""


@app.command(context_settings=PASS_ON)
def sft(
    context: typer.Context,
    gpus: Annotated[int | None, typer.Option(help="Processes to start with torchrun, one a GPU.", min=1)] = None,
) -> None:
    """Fine-tune a model on a file of questions and answers: key=value …"""
    train(gpus, context.args, SFT)


@app.command(context_settings=PASS_ON)
def ppo(
    context: typer.Context,
    gpus: Annotated[int | None, typer.Option(help="Processes to start with torchrun, one a GPU.", min=1)] = None,
) -> None:
    """Go on from a fine-tuned checkpoint with reinforcement learning: key=value …"""
    train(gpus, context.args, PPO)


@app.command(context_settings=PASS_ON)
def reward(
    context: typer.Context,
    gpus: Annotated[int | None, typer.Option(help="Processes to start with torchrun, one a GPU.", min=1)] = None,
) -> None:
    """Train a reward model, or with algorithm.name=dpo a policy, on pairs of answers: key=value …"""
    train(gpus, context.args, REWARD)


@app.command(context_settings=PASS_ON)
def plan(
    context: typer.Context,
    gpus: Annotated[int | None, typer.Option(help="Processes of the run, one a GPU; they need not be here.", min=1)] = None,
) -> None:
    """Show what fine-tuning would take, without a GPU: steps, tokens, memory, and what to change where it does not fit: key=value …"""
    if asks_for_help(context.args):
        exit_on_user_error(print_keys, context.args, SFT._replace(usage="verl plan [--gpus N] key=value …"))
    else:
        exit_on_user_error(show_plan, gpus, context.args)


@app.command(name="eval", context_settings=PASS_ON)
def evaluate(context: typer.Context) -> None:
    """Exact match of a checkpoint on a file of questions and answers: key=value …"""
    hand_on(context.args, EVALUATE)


@app.command(context_settings=PASS_ON)
def chat(context: typer.Context) -> None:
    """Talk with a checkpoint in the terminal: DIR"""
    hand_on(context.args, CHAT)


@app.command(context_settings=PASS_ON)
def export(context: typer.Context) -> None:
    """Merge an adapter into its base, cast, split into files, and check the result: SRC DIR"""
    hand_on(context.args, EXPORT)


@app.command(context_settings=PASS_ON)
def demo(context: typer.Context) -> None:
    """Train a small model from nothing and prove that it learned, offline."""
    hand_on(context.args, DEMO)


@app.command(context_settings=PASS_ON)
def doctor(context: typer.Context) -> None:
    """Show versions, devices, optional packages and disk space, and report problems."""
    run_module("verl.doctor", context.args)


def train(gpus: int | None, words: list[str], trainer: Command) -> None:
    """Run a trainer in this process, or on so many GPUs under torchrun."""
    if gpus is None or asks_for_help(words):
        hand_on(words, trainer)
    else:
        exit_on_user_error(launch, gpus, words, trainer)


def hand_on(words: list[str], command: Command) -> None:
    """Run a command's module on the words, or, for --help, print what it reads without loading it."""
    if asks_for_help(words):
        exit_on_user_error(print_keys, words, command)
    else:
        run_module(command.module, words)


def asks_for_help(words: list[str]) -> bool:
    return "--help" in words or "-h" in words


def print_keys(words: list[str], command: Command) -> None:
    """Print every key of a command's config with its default and comment, and the keys of the plugins that the words name.

    Raises:
        UserError: no such plugin.
    """
    from verl.config.load import describe

    print(f"{command.usage}\n\n{describe(command.schema(), words)}")


def run_module(name: str, words: list[str]) -> NoReturn:
    """Run `main(words)` of a module as this command."""
    exit_on_user_error(lambda: load_module(name).main(words))


def show_plan(gpus: int | None, words: list[str]) -> None:
    """The plan of `verl sft` with these words on so many GPUs.

    Raises:
        UserError: a wrong config, wrong data, no such model, or the words of another trainer.
    """
    from verl.config.load import load_config

    try:
        config = load_config(SFT.schema(), words)
    except UserError as error:
        command = trainer_of(words)
        if command is None:
            raise
        fix = f"verl {command} trainer.dry_run=true with the same words shows its steps and tokens; as words of fine-tuning: {error}"
        raise UserError(f"is for fine-tuning, and these are words of verl {command}", where="verl plan", fix=fix) from error
    SFT.load().dry_run(config, gpus)


def trainer_of(words: list[str]) -> str | None:
    """The command beside `verl sft` that takes these words; None: none does."""
    from verl.config.load import load_config

    for name, command in (("reward", REWARD), ("ppo", PPO)):
        try:
            load_config(command.schema(), words)
        except UserError:
            continue
        return name
    return None


def launch(processes: int, words: list[str], trainer: Command) -> None:
    """Run a trainer under torchrun, on this machine.

    Raises:
        UserError: a wrong config, before any process starts; or more processes than GPUs.
        SystemExit: with the exit code of the first process that failed, or 128 and the number of the signal that ended it.
    """
    from verl.config.load import load_config

    load_config(trainer.schema(), words)
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    if 0 < torch.cuda.device_count() < processes:
        raise UserError(f"found {torch.cuda.device_count()} GPUs", where=f"--gpus {processes}", fix="ask for no more than there are")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds for the checkpoint after a signal, in place of 30
    logging.disable()  # of torchrun: a process that fails says why by itself
    try:
        torchrun(["--standalone", f"--nproc_per_node={processes}", "-m", trainer.module, *words])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # this one could not say it
            print(f"error: process {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        raise SystemExit(exit_code(failure.exitcode)) from None
    except SignalException as stopped:
        raise SystemExit(128 + stopped.sigval) from None


def exit_code(of_process: int) -> int:
    """A shell's exit code for that of a process, where a signal is a negative number."""
    return of_process if of_process >= 0 else 128 - of_process
