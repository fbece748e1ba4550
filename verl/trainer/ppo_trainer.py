"""Reinforcement learning: from a fine-tuned checkpoint and questions to a model with higher rewards.

    python -m verl.trainer.ppo_trainer data.train_files=train.jsonl model.partial_pretrain=checkpoints/verl-sft/run/global_step_100

Start it with `torchrun` to use several processes. To read the code, start at `train` and `train_loop`.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from verl import dist
from verl.config.load import load_config
from verl.config.ppo import PPOConfig, RewardModelConfig
from verl.data.prompts import Prompts, describe_draws, load_prompts
from verl.engine.hardware import measure
from verl.engine.outline import Outline
from verl.engine.position import Position
from verl.errors import AbandonedError, RankError, Stopped, UserError, exit_on_user_error
from verl.manifest import step_name
from verl.rewards._scoring import Rewards, Scored
from verl.rl.ahead import check_staleness
from verl.rl.answering import Collected
from verl.rl.experience import pack_experience
from verl.rl.first_finished import collect_step, describe_oversampling
from verl.rl.mapping import choose_layout
from verl.rl.method import Method, load_method
from verl.rl.metrics import phase_seconds, step_metrics, time_metrics
from verl.rl.prompts import read_prompts
from verl.rl.remote_rollout import dismiss, divide
from verl.rl.roles import Roles, build_roles, check_names, decide_roles, describe_steps, token_budget
from verl.rl.sample_files import write_samples
from verl.rl.serving import serve_rollout
from verl.rl.updates import Updates
from verl.run import Run, TrainResult
from verl.session import session
from verl.trainer.inputs import read_tokenizer
from verl.trainer.loop import due
from verl.trainer.memory_errors import rl_error
from verl.trainer.oddities import RewardWatch, say_oddities
from verl.trainer.profile import profiled
from verl.trainer.resume import begin, find_checkpoint
from verl.trainer.room import check_room
from verl.trainer.saving import Saver


@session()
def train(config: PPOConfig) -> TrainResult:
    """Train with a config. A process that only generates returns an empty result.

    Raises:
        UserError: the config, the data, a model, a reward or the checkpoint is invalid.
        Stopped: a signal or the time limit ended the run.
    """
    device = dist.start(large_pages=config.model.fsdp_config.cpu_offload, timeout_seconds=config.dist.timeout_seconds)
    method = load_method(config)
    dist.together(lambda: check_names(config, method))
    layout = choose_layout(config.mapping, dist.world_size())
    check_staleness(config, layout)
    bridge = divide(layout, device)
    if bridge is not None and not bridge.trains:
        serve_rollout(config, bridge, read_tokenizer(Outline(config.model), config.data))
        return TrainResult(None, Path(config.trainer.default_local_dir).expanduser(), [])
    with Run(config) as run:
        run.checkpoint = find_checkpoint(config.trainer, run)
        outline = Outline(config.model)
        tokenizer = read_tokenizer(outline, config.data)
        prompts, validation = read_prompts(config.data, tokenizer, run)
        total_steps = steps_of(config, prompts)
        start = begin(config.trainer, run, prompts, config.data.prompts_per_step, total_steps)
        if start is None:
            dismiss(bridge)
            return run.result()
        say_oddities(run, prompts, validation, outline, config.data.prompts_per_step, total_steps)
        run.enter("loading the models")
        decisions = decide_roles(config, method, outline, measure(device), total_steps)
        asked = [*prompts.prompts, *(validation.prompts if validation is not None else [])]
        roles = build_roles(config, method, tokenizer, asked, bridge, decisions, run)
        run.say(f"{roles.describe()}\n{layout.describe()}\n{method.describe()}")
        run.say(f"plan: {describe_steps(config, total_steps)}; into {run.directory}\n{describe_epochs(config, prompts, total_steps)}")
        if (text := describe_oversampling(config, roles.answerer.rollout, start)) is not None:
            run.say(text)
        if run.checkpoint is not None:
            from verl.engine import restore  # a new run restores nothing

            run.enter("loading the checkpoint")
            restore.load(run.checkpoint, roles.actor.engine, roles.critic)
        roles.publish(start.step)
        actor = roles.draw_ahead(config, prompts, start, run)
        roles.set_skipped(start)
        steps_per_epoch = max(1, len(prompts) // config.data.prompts_per_step)
        check_room(config.trainer, run, roles.actor, roles.critic, steps=total_steps - start.step, steps_per_epoch=steps_per_epoch)
        try:
            saver = Saver(config.trainer, run, actor, roles.critic, validation=validation)
            with run.stepping(roles.trained_weights), saver:
                train_loop(config, method, prompts, validation, roles, start, run, saver)
        except Stopped:  # on every training process, after the same step
            roles.answerer.close()
            raise
        except (RuntimeError, MemoryError) as error:
            if (found := rl_error(error, config, run)) is None:
                raise
            raise found from error
        roles.answerer.close()
        return run.result()


@session()
def dry_run(config: PPOConfig) -> None:
    """Print the steps of a run. It writes nothing and reads no weights.

    Raises:
        UserError: as `train`, except for errors that only show when weights are loaded.
    """
    dist.start()
    method, layout = load_method(config), choose_layout(config.mapping, dist.world_size())
    check_staleness(config, layout)
    check_names(config, method)
    tokenizer = read_tokenizer(Outline(config.model), config.data)
    prompts = load_prompts(config.data, config.data.train_files, tokenizer, max_samples=config.data.train_max_samples)
    rewards = Rewards(config.reward, RewardModelConfig())
    rewards.check_references([prompt.row for prompt in prompts.prompts], [prompt.where for prompt in prompts.prompts])
    rewards.close()
    if dist.is_main():
        steps = steps_of(config, prompts)
        plan = f"{describe_steps(config, steps)}\n{describe_epochs(config, prompts, steps)}"
        print(f"data.train_files: {prompts}\n{layout.describe()}\n{method.describe()}\nplan: {plan}", flush=True)


def train_loop(
    config: PPOConfig,
    method: Method,
    prompts: Prompts,
    validation: Prompts | None,
    roles: Roles,
    start: Position,
    run: Run,
    saver: Saver,
) -> None:
    """In each step, sample answers, score them, compute advantages, update and log; when due, validate and save."""
    actor, critic, reference = roles.actor.engine, roles.critic, roles.reference
    clock, updates, rewards, here = roles.clock(), Updates(config, method, start, run), RewardWatch(run), start
    lost: list[UserError] = []
    if validation is not None and start.step == 0:
        run.log(0, before := validate(roles, validation, 0, run))
        saver.check_metric(lambda: before)
    for step in profiled(range(start.step, run.total_steps), config.trainer.profile_step, actor.device, run, number=int):
        clock.start()
        run.enter("generating and scoring answers", step + 1)
        lr = actor.learning_rate(step * updates.per_step - here.skipped)
        try:
            with roles.generating():
                collected = collect_step(roles.answerer, prompts, here, config, clock)
        except UserError as error:  # on every rank
            leave_early(error, config, here, start, run, saver, roles)
        run.enter("training", step + 1, limited=True)
        packing: dict[str, Any] = {"multiple_of_tokens": roles.actor.decisions.multiple_of_tokens, "share_prompts": roles.sharing.on}
        experience = pack_experience(collected, updates.per_step, token_budget(config), separate=updates.skips_zero_advantage, **packing)
        with clock.phase("logprobs"):
            experience.old_logprobs = experience.logprobs_before(actor, method.shared) if method.needs_old_logprobs else None
            experience.ref_logprobs = experience.score(reference, "logprob_M") if reference is not None else None
        with clock.phase("values"):
            experience.values = experience.score(critic.engine, "value_M") if critic is not None else None
        experience.learned = experience.advantages(method, updates.settings, config.rollout.max_new_tokens)
        with clock.phase("update_critic"):
            of_critic = updates.critic(critic, experience, step)
        with clock.phase("update_actor"):
            of_actor = updates.actor(actor, experience, step, roles.teacher)
        with held_back(lost, roles):
            roles.renew(step + 1, clock)
        metrics = step_metrics(collected, experience, of_critic, of_actor, step) | updates.adapt(of_actor, collected)
        of_time, seen = time_metrics(clock, collected, here, actor.device)
        done, epoch, ends_epoch = step + 1, collected.drawn // len(prompts), collected.drawn // len(prompts) > here.drawn // len(prompts)
        here = roles.with_skipped(replace(seen, step=done, drawn=collected.drawn, abandoned=collected.waiting, kl_coef=updates.kl_coef))
        last = done == run.total_steps
        if validation is not None and not lost and not run.should_stop() and due(config.trainer.test_freq, done, ends_epoch, last):
            with clock.phase("validate"), held_back(lost, roles):
                metrics |= validate(roles, validation, done, run)
        stop = run.should_stop() or bool(lost)
        report_answers(collected, done, run)
        rewards.see(done, without_differences(collected, method))
        run.enter("logging", done)
        run.log(done, {"epoch": epoch, "train/lr": lr, **metrics, **of_time, **phase_seconds(clock)})
        if saver.weigh(done, metrics) or due(config.trainer.save_freq, done, ends_epoch, last or stop):
            saver.save(here, metrics)
        if stop:
            leave(lost, done, run, saver)
        if saver.ends_early:
            break


def validate(roles: Roles, validation: Prompts, step: int, run: Run) -> dict[str, float]:
    """Answer the validation prompts greedily, and return the mean reward, total and per grader.

    The first grader that compares answers with reference answers is reported as `val/exact_match`, as in the evaluator. The answers are
    written to rollouts/validation_N.jsonl. Every rank calls it and answers its share.
    """
    run.enter("validating", step)
    mine = validation.prompts[dist.rank() :: dist.world_size()]
    try:
        with roles.generating():
            samples = roles.answerer.greedy(mine)
        for place, sample in enumerate(samples):
            sample.group = dist.rank() + place * dist.world_size()
        scored = roles.answerer.score(samples)
    except AbandonedError:  # on every rank, as the run stops
        return {}
    write_samples(run, f"validation_{step}", samples)
    say_errors(scored, f"validation after step {step}", run)
    names = max(dist.gathered(list(samples[0].parts) if samples else []), key=len)
    sums = [sum(sample.parts[name] for sample in samples) for name in names]
    answers, reward, *each = dist.total([float(len(samples)), sum(sample.reward for sample in samples), *sums])
    shown = ["exact_match" if name == roles.answerer.exact_grader else name for name in names]
    of_episodes, own = roles.answerer.metrics_of(samples)
    means = {name: total / answers for name, total in zip(shown, each, strict=True)}
    return {f"val/{name}": value for name, value in ({**own, "reward": reward / answers} | means | of_episodes).items()}


@contextmanager
def held_back(lost: list[UserError], roles: Roles) -> Iterator[None]:
    """Keep an error of the rollout in this context, which all ranks raise: a step that is trained is saved before the run ends.

    Not so if answers are drawn ahead: those of the next step are lost, and belong into its checkpoint. Nor if a rank does not answer.
    """
    try:
        yield
    except UserError as error:
        if isinstance(error, RankError) or roles.answerer.ahead is not None:
            raise
        lost.append(error)


def leave(lost: list[UserError], step: int, run: Run, saver: Saver) -> NoReturn:
    """End the run after a step, because of a signal or a rollout that is lost. Every rank calls it."""
    saver.finish()
    if lost:
        raise lost[0]
    run.leave(step)


def leave_early(error: UserError, config: PPOConfig, here: Position, start: Position, run: Run, saver: Saver, roles: Roles) -> NoReturn:
    """End the run while it generates or scores, because of a signal or an error that all ranks raise, with a checkpoint of the step before.

    Every rank calls it.
    """
    is_stopped = isinstance(error, AbandonedError)
    # A rank that is gone does not answer, nor does a rollout that has failed, of whose unfinished answers a checkpoint would need to know.
    if isinstance(error, RankError) or (roles.answerer.ahead is not None and not is_stopped):
        raise error
    run.should_stop()  # all ranks learn of the signal
    run.enter("saving", here.step)
    saver.finish()
    is_saved = here.step == start.step or run.checkpoint == run.directory / step_name(here.step)
    if not is_saved and config.trainer.save_freq != "never":
        saver.save(here, {})
        saver.finish()
    if not is_stopped:
        raise error
    run.leave(here.step)


def report_answers(collected: Collected, step: int, run: Run) -> None:
    """Write the step's answers to a file, and log failed rewards. Every rank calls it."""
    write_samples(run, f"step_{step}", collected.answered, trained=set(collected.kept))
    for scored in collected.scored:
        say_errors(scored, f"step {step}", run)


def without_differences(collected: Collected, method: Method) -> str | None:
    """Say which of a step's rewards are equal; None if they differ as the method needs. Every rank calls it."""
    if not method.learns_from_rewards:
        return None
    is_equal = len(set().union(*dist.gathered({sample.reward for sample in collected.answered}))) == 1
    if collected.groups == collected.without_spread and len(collected.kept) == 0:
        return f"the answers to each prompt have equal rewards, even after {collected.refills} refills; no update"
    if collected.groups == collected.without_spread and method.needs_groups:
        return "the answers to each prompt have equal rewards, so a group does not tell which is better"
    return "all answers have equal rewards" if is_equal else None


def say_errors(scored: Scored, place: str, run: Run) -> None:
    """Log failed rewards of all ranks, which count as 0, and failures of the tool, the environment and the agent. Every rank calls it."""
    kinds = ("errors", "tool_errors", "environment_errors", "agent_errors", "unclosed")
    errors, of_tool, of_environment, of_agent, unclosed = (
        [error for of_rank in dist.gathered(getattr(scored, kind)) for error in of_rank] for kind in kinds
    )
    everywhere = replace(
        scored, errors=errors, tool_errors=of_tool, environment_errors=of_environment, agent_errors=of_agent, unclosed=unclosed
    )
    if (text := everywhere.describe_errors()) is not None:
        run.say(f"{place}: {text}")


def steps_of(config: PPOConfig, prompts: Prompts) -> int:
    """Return the number of steps of the whole run.

    Raises:
        UserError: a step has fewer prompts than there are processes.
    """
    per_step = config.data.prompts_per_step
    if per_step < dist.world_size():
        what = f"{per_step} prompts per step are too few for {dist.world_size()} processes"
        raise UserError(what, where="data.prompts_per_step", fix=f"give at least {dist.world_size()}")
    if config.trainer.total_training_steps is not None:
        return config.trainer.total_training_steps
    return max(1, len(prompts) * config.trainer.total_epochs // per_step)


def describe_epochs(config: PPOConfig, prompts: Prompts, steps: int) -> str:
    """Say how often the run asks each prompt."""
    more = "; dynamic sampling draws more prompts (algorithm.max_refills)" if config.algorithm.dynamic_sampling else ""
    return f"epochs: {describe_draws(len(prompts), config.data.prompts_per_step, steps)}{more}"


def main(argv: list[str]) -> None:
    config = load_config(PPOConfig, argv)
    dry_run(config) if config.trainer.dry_run else train(config)


if __name__ == "__main__":
    exit_on_user_error(main, sys.argv[1:])
