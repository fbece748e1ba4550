"""The `verl` command line. Each subcommand passes its arguments to its module. Importing this file does not import torch."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from verl import __version__, signals
from verl.commands import CHAT, DEMO, EVALUATE, EXPORT, PPO, REWARD, SERVE, SFT, Command, load_module, trainer_config
from verl.errors import UserError, exit_on_user_error
from verl.inspection.picks import Picks

EXAMPLES = "\n\n".join(
    [
        "Examples, each for the command of its name; COMMAND --help has all keys:",
        *(command.example for command in (SFT, EVALUATE, CHAT, EXPORT, SERVE, PPO, REWARD)),
        SFT.example.replace("verl sft", "verl plan --gpus 8"),
        "verl demo",
        "verl ui",
        "verl doctor",
        "verl prove Qwen/Qwen2.5-0.5B-Instruct",
    ]
)
app = typer.Typer(
    name="verl",
    help="Post-training of language models: from a file of questions and answers to a Hugging Face directory.",
    no_args_is_help=True,
    epilog=EXAMPLES,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# The module of a subcommand reads the arguments itself, including --help.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def main() -> None:
    """Run the command line. A word that is wrong ends it with exit code 2, after a line that says so and one that says what to write."""
    exit_on_user_error(run_words, sys.argv[1:])


def run_words(words: list[str]) -> None:
    """Run a command. Raises UserError: there is no such command or option."""
    names = [command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands]
    if words and not words[0].startswith("-") and words[0] not in names:
        from verl.config.wrong_words import no_command

        raise no_command(words[0], names)
    if any(word.startswith("--") for word in words[1:]):
        refuse_misspelled_options(words)
    try:
        code = app(standalone_mode=False)
    except Exception as error:  # typer's own errors are of the click that is in it
        if not hasattr(error, "format_message"):
            raise
        from verl.config.wrong_words import wrong_option

        if (found := wrong_option(error, words)) is None:
            error.show()  # type: ignore[attr-defined]
            raise SystemExit(getattr(error, "exit_code", 2)) from None
        raise found from None
    raise SystemExit(code or 0)


def refuse_misspelled_options(words: list[str]) -> None:
    """Raise UserError if a word looks like an option of its command, and is none: the parser passes it on as if it were a key."""
    from verl.config.wrong_words import refuse_misspelled

    command = typer.main.get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    options = [param for param in command.params if param.param_type_name == "option"]
    values = {name: "" if param.is_flag else param.metavar or "N" for param in options for name in param.opts}
    trainers = {"sft": SFT, "ppo": PPO, "reward": REWARD, "plan": SFT, "inspect": SFT}
    own = {one.usage.split()[1]: one for one in (EVALUATE, CHAT, EXPORT, SERVE, DEMO)}
    schema = found.schema() if (found := (trainers | own).get(words[0])) is not None else None
    refuse_misspelled(words, values, schema)


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
    gpus: Annotated[int | None, typer.Option(help="Number of processes to start, one per GPU.", min=1)] = None,
) -> None:
    """Fine-tune a model on a file of questions and answers: key=value …"""
    train(gpus, context.args, SFT)


@app.command(context_settings=PASS_ON)
def ppo(
    context: typer.Context,
    gpus: Annotated[int | None, typer.Option(help="Number of processes to start, one per GPU.", min=1)] = None,
) -> None:
    """Train a fine-tuned checkpoint with reinforcement learning: key=value …"""
    train(gpus, context.args, PPO)


@app.command(context_settings=PASS_ON)
def reward(
    context: typer.Context,
    gpus: Annotated[int | None, typer.Option(help="Number of processes to start, one per GPU.", min=1)] = None,
) -> None:
    """Train a reward model on pairs of answers, or with algorithm.name=dpo, kto, … a policy: key=value …"""
    train(gpus, context.args, REWARD)


@app.command(context_settings=PASS_ON)
def plan(
    context: typer.Context,
    gpus: Annotated[int | None, typer.Option(help="Number of GPUs to plan for; this machine does not need them.", min=1)] = None,
) -> None:
    """Show steps, tokens and GPU memory of a fine-tuning run, and what to change if it does not fit. Needs no GPU: key=value …"""
    if asks_for_help(context.args):
        exit_on_user_error(print_keys, context.args, plan_of_sft())
    else:
        exit_on_user_error(show_plan, gpus, context.args)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: verl inspect data.train_files=train.jsonl model.partial_pretrain=checkpoints/base --longest --html data.html",
)
def inspect(
    context: typer.Context,
    row: Annotated[
        list[str] | None, typer.Option(help="Show this row: its number, from 1, or its place (train.jsonl:17).", metavar="N")
    ] = None,
    longest: Annotated[bool, typer.Option("--longest", help="Show the longest rows.")] = False,
    random: Annotated[int, typer.Option(help="Show so many rows, drawn at random.", metavar="N")] = 0,
    grep: Annotated[str | None, typer.Option(help="Show rows that contain this text.", metavar="TEXT")] = None,
    html: Annotated[Path | None, typer.Option(help="Write what was found to this file, as one page.", metavar="FILE")] = None,
    json: Annotated[Path | None, typer.Option(help="Write what was found to this file, as JSON.", metavar="FILE")] = None,
    exact: Annotated[bool, typer.Option("--all", help="Tokenize all rows; otherwise, a sample of very many.")] = False,
) -> None:
    """Show what a trainer would make of its data: rows used, cut and dropped, lengths, copies, odd characters, and rows as the model
    sees them. Needs no GPU. The arguments are those of verl sft, verl reward or verl ppo: key=value … Exit code 1: it would stop."""
    exit_on_user_error(inspect_data, context.args, Picks(row or (), random, grep, longest), html, json, exact)


@app.command(name="eval", context_settings=PASS_ON)
def evaluate(context: typer.Context) -> None:
    """Grade the answers of a checkpoint to a file of questions, or compare two evaluations: key=value … [--against OTHER]"""
    if is_program():
        signals.own_process()  # as in `train`
    hand_on(context.args, EVALUATE)


@app.command(context_settings=PASS_ON)
def chat(context: typer.Context) -> None:
    """Chat with a checkpoint in the terminal: DIR"""
    hand_on(context.args, CHAT)


@app.command(context_settings=PASS_ON)
def export(context: typer.Context) -> None:
    """Write a checkpoint as a Hugging Face directory: merge its adapter, check the result, push it to the Hub: SRC NEW_DIR [--hub NAME]"""
    hand_on(context.args, EXPORT)


@app.command(context_settings=PASS_ON)
def serve(context: typer.Context) -> None:
    """Answer requests in OpenAI's format over HTTP with a checkpoint: DIR"""
    hand_on(context.args, SERVE)


@app.command(context_settings=PASS_ON)
def demo(context: typer.Context) -> None:
    """Train a small model from random weights, offline, and measure what it learned."""
    hand_on(context.args, DEMO)


@app.command(context_settings=PASS_ON)
def doctor(context: typer.Context) -> None:
    """Show versions, devices, optional packages and disk space, and report problems."""
    run_module("verl.doctor", context.args)


@app.command()
def board(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR…", help="Runs, or folders of runs.", show_default=False)],
    logger: Annotated[str | None, typer.Option(help="tensorboard or trackio; default: the one of the runs.", metavar="NAME")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; the default is this machine only.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port; default: the library's own, or the next free one.", min=1, max=65535)] = None,
) -> None:
    """Open TensorBoard or Trackio on runs in a browser: DIR…"""
    exit_on_user_error(show_board, directories, logger, host, port)


@app.command(epilog="Example: verl prove Qwen/Qwen2.5-0.5B-Instruct")
def prove(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model directory, a Hub name, or a config.json.", show_default=False)],
    real: Annotated[bool, typer.Option("--real", help="Prove the model itself, not a tiny twin of its architecture.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write what was found to this file, too.", metavar="FILE")] = None,
) -> None:
    """Prove on a CPU, in a minute, what is exact for a model's architecture: MODEL.

    Exit code 1: something is wrong; 2: there is no such model, or fine-tuning it is refused.
    """
    exit_on_user_error(run_proofs, model, real, json)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="DIR…", help="Directories of runs (trainer.default_local_dir).", show_default=False)
    ],
    evaluation: Annotated[
        list[Path] | None, typer.Option("--eval", help="An evaluation (output_dir of verl eval); repeatable.", metavar="DIR")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The page; by default report.html in the first run's directory.", metavar="FILE")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the curves as PNG into this directory, too.", metavar="DIR")] = None,
) -> None:
    """Write a page about runs, one HTML file: curves, evaluations, answers that turned, settings, commands.

    Evaluations in a run's directory, and those beside it of its models, are found.

    Example: verl report checkpoints/verl-sft/run --eval eval-before --eval eval-after
    """
    exit_on_user_error(show_report, runs, evaluation or [], out, png)


@app.command()
def ui(
    directory: Annotated[Path, typer.Option("--dir", help="Folder of runs and uploaded files.", metavar="FOLDER")] = Path(
        "checkpoints/verl-ui"
    ),
    port: Annotated[int | None, typer.Option(help="Port; default: 7860, or the next free one.", min=1, max=65535)] = None,
) -> None:
    """Open a page for this machine's browser: choose model and data, train, watch, try the result.

    Example: verl ui --dir experiments
    """
    exit_on_user_error(open_page, directory, port)


def train(gpus: int | None, words: list[str], trainer: Command) -> None:
    """Run a trainer in this process, or, if `gpus` is given, in that many processes."""
    if is_program():
        signals.own_process()  # before torch is imported, which takes seconds
    if gpus is None or asks_for_help(words):
        hand_on(words, trainer)
    else:
        exit_on_user_error(launch, gpus, words, trainer)


def is_program() -> bool:
    """Return whether this process runs the command line, and not a program that calls it."""
    path = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    return path.stem == "verl" or path.parent == Path(__file__).parent


def hand_on(words: list[str], command: Command) -> None:
    """Run a command's module with the arguments. For --help, print its keys without importing the module."""
    if asks_for_help(words):
        exit_on_user_error(print_keys, words, command)
    else:
        run_module(command.module, words, command)


def asks_for_help(words: list[str]) -> bool:
    return "--help" in words or "-h" in words


def print_keys(words: list[str], command: Command) -> None:
    """Print every key of a command's config with its default and comment, including the keys of plugins named in the arguments.

    Raises:
        UserError: no such plugin.
    """
    from verl.config.load import describe
    from verl.plugin_outline import outlined

    with outlined():
        example = f"example: {command.example}\n\n" if command.example else ""
        print(f"{command.usage}\n\n{example}{describe(command.schema(), words)}")


def run_module(name: str, words: list[str], command: Command | None = None) -> NoReturn:
    """Run `main(words)` of a module, and exit the process with its exit code.

    Args:
        command: whose arguments they are; they are checked before the module is imported.
    """

    def run() -> None:
        given = words
        if command is not None:
            from verl import early

            given = early.check(command, words)
        module = load_module(name)
        from verl.machine import machine_errors_named

        with machine_errors_named():
            module.main(given)

    exit_on_user_error(run)


def run_proofs(model: str, real: bool, json: Path | None) -> None:
    """Run `verl prove`. Raises SystemExit: 1 if something is wrong, 2 if fine-tuning is refused. Raises UserError without such a model."""
    from verl.regular_file import check_output
    from verl.run_directory import checkpoint_in, folder_of_runs, is_run_directory

    if json is not None:
        check_output(json)
    if is_run_directory(model):
        model = checkpoint_in(model, "MODEL")
    elif not (Path(model).expanduser() / "config.json").is_file() and (found := folder_of_runs(model, lambda run: f"verl prove {run}")):
        raise found
    if not (Path(model).expanduser().is_file() and model.endswith(".json")):
        from verl.early import check_model

        check_model(model, "MODEL")
    command = load_module("verl.prove.command")
    command.use_cpu()
    if code := command.prove(model, real=real, json_file=json):
        raise SystemExit(code)


def inspect_data(words: list[str], picks: Picks, html: Path | None, json: Path | None, exact: bool) -> None:
    """Run `verl inspect` with the arguments of a trainer.

    Args:
        html, json, exact: as in `verl.inspection.command.run`.
    Raises:
        UserError: as `verl.inspection.command.run`; or the arguments are no trainer's.
        SystemExit: with 1 if the trainer would stop at its data.
    """
    from verl import early
    from verl.regular_file import check_output

    config = trainer_config(words)
    picks.check()
    for path in (html, json):
        if path is not None:
            check_output(path)
    early.check_names(config)
    if not load_module("verl.inspection.command").run(config, picks, html=html, json_file=json, exact=exact):
        raise SystemExit(1)


def show_board(directories: list[Path], logger: str | None, host: str, port: int | None) -> None:
    """Run `verl board`. Raises UserError: there is no such run, or its library is not installed or does not start."""
    from verl.errors import one_of

    one_of("--logger", logger, (None, "tensorboard", "trackio"))
    load_module("verl.board").open_board(directories, logger, host=host, port=port)


def open_page(directory: Path, port: int | None) -> None:
    """Run `verl ui`. Raises UserError: gradio is not installed, the port is taken, or the folder cannot be written."""
    load_module("verl.ui.server").open_ui(directory.expanduser(), port)


def plan_of_sft() -> Command:
    """Return `verl plan`, whose keys are those of `verl sft`."""
    return SFT._replace(usage="verl plan [--gpus N] key=value …", example=SFT.example.replace("verl sft", "verl plan --gpus 8"))


def show_report(runs: list[Path], evaluations: list[Path], out: Path | None, png: Path | None) -> None:
    """Run `verl report`. Raises UserError: a directory is not what it should be, a package is missing, or a file would be lost."""
    load_module("verl.report.command").main(runs, evaluations, out, png)


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
    """Run a trainer in several processes, on this machine.

    Raises:
        UserError: the config is invalid (raised before any process starts), or there are more processes than GPUs.
        SystemExit: with the exit code of the processes, see `verl.launch.code_of`.
    """
    from verl import early

    early.check(trainer, words)
    import torch

    from verl.launch import Launcher

    if 0 < torch.cuda.device_count() < processes:
        raise UserError(f"found {torch.cuda.device_count()} GPUs", where=f"--gpus {processes}", fix="ask for no more than there are")
    raise SystemExit(Launcher(trainer.module, words, processes).run())
