"""The `verl` command line. Each subcommand passes its arguments to its module. Importing this file does not import torch."""

import logging
import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from verl import __version__, safe_path
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
# The module of a subcommand reads the arguments itself, including --help.
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
    """Define the options before the subcommand."""


@app.command(context_settings=PASS_ON)
def sft(
    context: typer.Context,
    gpus: Annotated[int | None, typer.Option(help="Number of processes to start with torchrun, one per GPU.", min=1)] = None,
) -> None:
    """Fine-tune a model on a file of questions and answers: key=value …"""
    train(gpus, context.args, SFT)


@app.command(context_settings=PASS_ON)
def ppo(
    context: typer.Context,
    gpus: Annotated[int | None, typer.Option(help="Number of processes to start with torchrun, one per GPU.", min=1)] = None,
) -> None:
    """Train a fine-tuned checkpoint with reinforcement learning: key=value …"""
    train(gpus, context.args, PPO)


@app.command(context_settings=PASS_ON)
def reward(
    context: typer.Context,
    gpus: Annotated[int | None, typer.Option(help="Number of processes to start with torchrun, one per GPU.", min=1)] = None,
) -> None:
    """Train a reward model on pairs of answers, or with algorithm.name=dpo a policy: key=value …"""
    train(gpus, context.args, REWARD)


@app.command(context_settings=PASS_ON)
def plan(
    context: typer.Context,
    gpus: Annotated[int | None, typer.Option(help="Number of GPUs to plan for; this machine does not need them.", min=1)] = None,
) -> None:
    """Show steps, tokens and GPU memory of a fine-tuning run, and what to change if it does not fit. Needs no GPU: key=value …"""
    if asks_for_help(context.args):
        exit_on_user_error(print_keys, context.args, SFT._replace(usage="verl plan [--gpus N] key=value …"))
    else:
        exit_on_user_error(show_plan, gpus, context.args)


@app.command(name="eval", context_settings=PASS_ON)
def evaluate(context: typer.Context) -> None:
    """Measure exact match of a checkpoint on a file of questions and answers: key=value …"""
    hand_on(context.args, EVALUATE)


@app.command(context_settings=PASS_ON)
def chat(context: typer.Context) -> None:
    """Chat with a checkpoint in the terminal: DIR"""
    hand_on(context.args, CHAT)


@app.command(context_settings=PASS_ON)
def export(context: typer.Context) -> None:
    """Write a checkpoint as a Hugging Face directory: merge its adapter, cast, split into files, and check the result: SRC DIR"""
    hand_on(context.args, EXPORT)


@app.command(context_settings=PASS_ON)
def demo(context: typer.Context) -> None:
    """Train a small model from random weights, offline, and measure what it learned."""
    hand_on(context.args, DEMO)


@app.command(context_settings=PASS_ON)
def doctor(context: typer.Context) -> None:
    """Show versions, devices, optional packages and disk space, and report problems."""
    run_module("verl.doctor", context.args)


def train(gpus: int | None, words: list[str], trainer: Command) -> None:
    """Run a trainer in this process, or, if `gpus` is given, in that many processes under torchrun."""
    if gpus is None or asks_for_help(words):
        hand_on(words, trainer)
    else:
        exit_on_user_error(launch, gpus, words, trainer)


def hand_on(words: list[str], command: Command) -> None:
    """Run a command's module with the arguments. For --help, print its keys without importing the module."""
    if asks_for_help(words):
        exit_on_user_error(print_keys, words, command)
    else:
        run_module(command.module, words)


def asks_for_help(words: list[str]) -> bool:
    return "--help" in words or "-h" in words


def print_keys(words: list[str], command: Command) -> None:
    """Print every key of a command's config with its default and comment, including the keys of plugins named in the arguments.

    Raises:
        UserError: no such plugin.
    """
    from verl.config.load import describe

    print(f"{command.usage}\n\n{describe(command.schema(), words)}")


def run_module(name: str, words: list[str]) -> NoReturn:
    """Run `main(words)` of a module, and exit the process with its exit code."""
    exit_on_user_error(lambda: load_module(name).main(words))


def show_plan(gpus: int | None, words: list[str]) -> None:
    """Print the plan of `verl sft` with these arguments on `gpus` GPUs.

    Raises:
        UserError: the config or the data is invalid, there is no such model, or the arguments are another trainer's.
    """
    from verl.config.load import load_config

    try:
        config = load_config(SFT.schema(), words)
    except UserError as error:
        command = trainer_of(words)
        if command is None:
            raise
        fix = f"verl {command} trainer.dry_run=true with the same arguments shows its steps and tokens; the error of verl sft: {error}"
        raise UserError(f"plans verl sft only, and these are arguments of verl {command}", where="verl plan", fix=fix) from error
    SFT.load().dry_run(config, gpus)


def trainer_of(words: list[str]) -> str | None:
    """Return the name of the other trainer that accepts these arguments; None if none does."""
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
        UserError: the config is invalid (raised before any process starts), or there are more processes than GPUs.
        SystemExit: with the exit code of the first process that failed, or 128 + the number of the signal that ended it.
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
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds to write a checkpoint after a signal; torchrun's default is 30
    logging.disable()  # silences torchrun: a process that fails prints its own error
    try:
        os.environ.update(safe_path.variables())
        torchrun(["--standalone", f"--nproc_per_node={processes}", "--no-python", *safe_path.command(trainer.module, words)])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # a process killed by a signal printed no error
            print(f"error: process {rank} was killed by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        raise SystemExit(exit_code(failure.exitcode)) from None
    except SignalException as stopped:
        raise SystemExit(128 + stopped.sigval) from None


def exit_code(returncode: int) -> int:
    """Return the exit code that a shell gives to a process's return code, in which a signal is a negative number."""
    return returncode if returncode >= 0 else 128 - returncode
