"""The tool of `rollout.tool`: a module in verl/tools, or a user's own, which runs in processes of its own (see verl.workers)."""

from collections.abc import Sequence
from types import ModuleType

from verl import plugin
from verl.config.ppo import RolloutConfig
from verl.config.workers import WorkersConfig
from verl.errors import UserError
from verl.rewards._scoring import error_of
from verl.rl.samples import Sample
from verl.user_files import is_own
from verl.workers.calls import Failure, check_function
from verl.workers.pool import Watch, load_code

FIX = "correct rollout.tool, or set rollout.on_error=reply, which gives the model the error as the tool's reply"


def load_tool(name: str) -> ModuleType:
    """Load the module of a tool. Raises UserError: there is none, or its function `reply` cannot be called."""
    module = plugin.load("verl.tools", name, needs=("reply",))
    if is_own(module):
        check_function(module, "reply", f"rollout.tool={name}")
    return module


class Tool:
    """Replies to turns of the model.

    Args:
        name: the tool's name in the config.
        on_error: "stop" or "reply", see `rollout.on_error`.
        watch: is told if the processes of a user's own tool are waited for.
    Attributes:
        role: role of the replies in the chat.
        errors: failures of the tool that the model has got as replies, each with the place of its row.
    Raises:
        UserError: there is no such tool, or its function `reply` cannot be called.
    """

    def __init__(self, name: str, on_error: str, workers: WorkersConfig, watch: Watch | None = None):
        module = load_tool(name)
        self.role: str = getattr(module, "ROLE", "tool")
        self.errors: list[UserError] = []
        self._stops = on_error == "stop"
        self._code = load_code(module, None, "reply", "the tool", workers, watch)

    def replies(self, samples: Sequence[Sample]) -> list[str | None]:
        """Return the reply to the last turn of each answer; None if the answer is complete.

        Raises:
            UserError: the tool failed, and `rollout.on_error=stop`.
        """
        turns = [(sample.text, sample.prompt.text, sample.prompt.row) for sample in samples]
        found = self._code.run("reply", turns, until_failure=self._stops)
        failed = [(sample, reply) for sample, reply in zip(samples, found, strict=True) if isinstance(reply, Failure)]
        errors = [error_of("the tool", failure, sample.prompt.where, FIX) for sample, failure in failed]
        if errors and self._stops:
            raise errors[0]
        self.errors += errors
        return [f"error: the tool {reply.what}" if isinstance(reply, Failure) else reply for reply in found]

    def take_errors(self) -> list[UserError]:
        """Return the errors since the last call."""
        errors, self.errors = self.errors, []
        return errors

    def close(self) -> None:
        """End the processes of a user's own tool."""
        self._code.close()


def tool_of(config: RolloutConfig, workers: WorkersConfig, watch: Watch | None) -> Tool | None:
    """Return the tool that the config names; None if it names none."""
    return None if config.tool is None else Tool(config.tool, config.on_error, workers, watch)
