"""Which processes do what: the roles of `mapping` on named sets of ranks.

Two layouts are there. All roles on all ranks is the default, and the best one up to some 64 GPUs. Or the rollout has ranks of its own:
there the roles that train share the other ranks, prompts and answers are exchanged, and new weights are sent after each step.
"""

from dataclasses import dataclass

from verl.config.ppo import MappingConfig
from verl.errors import UserError

TRAINING = ("actor", "critic", "reference", "reward")


@dataclass(frozen=True)
class Layout:
    """The ranks of a run.

    Attributes:
        training: of actor, critic, reference and reward.
        rollout: of what generates; the same, or others.
    """

    training: list[int]
    rollout: list[int]

    @property
    def is_split(self) -> bool:
        """Whether the rollout has ranks of its own."""
        return self.training != self.rollout

    def describe(self) -> str:
        """For the run's first lines."""
        if not self.is_split:
            return f"mapping: {', '.join(TRAINING)} and rollout on {_ranks(self.training)}"
        return f"mapping: {', '.join(TRAINING)} on {_ranks(self.training)}; rollout on {_ranks(self.rollout)}"


def choose_layout(mapping: MappingConfig, processes: int) -> Layout:
    """The layout that the config asks for.

    Args:
        processes: that were started.
    Raises:
        UserError: ranks that do not exist, twice or idle, or a layout that is not one of the two.
    """
    roles = {role: _ranks_of(role, getattr(mapping, role), processes) for role in (*TRAINING, "rollout")}
    for role in TRAINING[1:]:
        if roles[role] != roles["actor"]:
            raise UserError(
                f"{role} on {_ranks(roles[role])}, and actor on {_ranks(roles['actor'])}: the roles that train share their ranks",
                where=f"mapping.{role}",
                fix=f"give {', '.join(f'mapping.{name}' for name in TRAINING)} the same ranks",
            )
    layout = Layout(roles["actor"], roles["rollout"])
    shared = set(layout.training) & set(layout.rollout)
    if layout.is_split and shared:
        what = f"{_ranks(sorted(shared))} would both train and generate, and others not"
        fix = 'give mapping.rollout the ranks of mapping.actor, or ranks of its own; "all" for both is the default'
        raise UserError(what, where="mapping.rollout", fix=fix)
    if layout.is_split and 0 in layout.rollout:
        fix = "let rank 0 train, and name others, such as the last ones"
        raise UserError("rank 0, which speaks for all, would only generate", where="mapping.rollout", fix=fix)
    idle = sorted(set(range(processes)) - set(layout.training) - set(layout.rollout))
    if idle:
        raise UserError(f"{_ranks(idle)} would have nothing to do", where="mapping", fix="start fewer processes, or name them in a role")
    return layout


def _ranks_of(role: str, value: object, processes: int) -> list[int]:
    if value == "all":
        return list(range(processes))
    assert isinstance(value, list)  # PPOConfig.check has seen to that
    beyond = [rank for rank in value if rank >= processes]
    if beyond or len(set(value)) < len(value):
        what = f"there is no {_ranks(beyond)}: {processes} processes were started" if beyond else f"a rank is named twice in {value}"
        raise UserError(what, where=f"mapping.{role}", fix=f"name each rank from 0 to {processes - 1} once, or start more with torchrun")
    return sorted(value)


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    runs = ranks == list(range(ranks[0], ranks[-1] + 1))
    return f"ranks {ranks[0]}-{ranks[-1]}" if runs else f"ranks {', '.join(map(str, ranks))}"
