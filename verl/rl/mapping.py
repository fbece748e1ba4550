"""Assignment of ranks to roles, from the config's `mapping`.

There are two layouts. By default, all roles share all ranks, which is best up to about 64 GPUs. Otherwise the rollout has its own ranks,
and actor, critic, reference and reward share the other ranks: prompts and answers are exchanged, and new weights are sent after each step.
"""

from dataclasses import dataclass

from verl.config.ppo import MappingConfig
from verl.errors import UserError

TRAINING = ("actor", "critic", "reference", "reward")


@dataclass(frozen=True)
class Layout:
    """The ranks of a run.

    Attributes:
        training: ranks of actor, critic, reference and reward.
        rollout: ranks of the rollout: the same as `training`, or none of them.
    """

    training: list[int]
    rollout: list[int]

    @property
    def is_split(self) -> bool:
        """Return whether the rollout has its own ranks."""
        return self.training != self.rollout

    def describe(self) -> str:
        """Return the layout as one line for the log."""
        if not self.is_split:
            return f"mapping: {', '.join(TRAINING)} and rollout on {_ranks(self.training)}"
        return f"mapping: {', '.join(TRAINING)} on {_ranks(self.training)}; rollout on {_ranks(self.rollout)}"


def choose_layout(mapping: MappingConfig, processes: int) -> Layout:
    """Read and check the layout of the config.

    Args:
        processes: number of started processes.
    Raises:
        UserError: a rank does not exist, is named twice or has no role, or the layout is neither of the two.
    """
    roles = {role: _ranks_of(role, getattr(mapping, role), processes) for role in (*TRAINING, "rollout")}
    for role in TRAINING[1:]:
        if roles[role] != roles["actor"]:
            raise UserError(
                f"{role} is on {_ranks(roles[role])}, but actor on {_ranks(roles['actor'])}; the roles that train must share their ranks",
                where=f"mapping.{role}",
                fix=f"give {', '.join(f'mapping.{name}' for name in TRAINING)} the same ranks",
            )
    layout = Layout(roles["actor"], roles["rollout"])
    shared = set(layout.training) & set(layout.rollout)
    if layout.is_split and shared:
        what = f"{_ranks(sorted(shared))} would both train and generate, but other ranks would not"
        fix = 'give mapping.rollout the same ranks as mapping.actor, or only others; the default is "all" for both'
        raise UserError(what, where="mapping.rollout", fix=fix)
    if layout.is_split and 0 in layout.rollout:
        fix = "let rank 0 train, and give mapping.rollout other ranks, such as the last ones"
        raise UserError("rank 0, which logs and saves, would only generate", where="mapping.rollout", fix=fix)
    idle = sorted(set(range(processes)) - set(layout.training) - set(layout.rollout))
    if idle:
        raise UserError(f"{_ranks(idle)} would have no role", where="mapping", fix="start fewer processes, or give these ranks a role")
    return layout


def _ranks_of(role: str, value: object, processes: int) -> list[int]:
    if value == "all":
        return list(range(processes))
    assert isinstance(value, list)  # PPOConfig.check checks this
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
