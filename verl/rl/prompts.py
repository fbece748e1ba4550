"""The prompts of a run, the same on every rank."""

from transformers import PreTrainedTokenizerBase

from verl import dist
from verl.config.ppo import PromptConfig
from verl.data.prompts import Prompts, load_prompts
from verl.run import Run


def read_prompts(data: PromptConfig, tokenizer: PreTrainedTokenizerBase, run: Run) -> tuple[Prompts, Prompts | None]:
    """Read training and validation prompts, and log what was read.

    Raises:
        UserError: on all ranks, if a file or a row is invalid, or a node has other rows than the first node.
    """

    def load(kind: str) -> Prompts:
        key, files, samples = f"data.{kind}_files", getattr(data, f"{kind}_files"), getattr(data, f"{kind}_max_samples")
        found: list[Prompts] = []
        dist.together(lambda: found.append(load_prompts(data, files, tokenizer, key=key, max_samples=samples)))
        dist.check_same(found[0].fingerprint, what="the rows", where=key)
        run.say(f"{key}: {found[0]}")
        return found[0]

    return load("train"), None if data.val_files is None else load("val")
