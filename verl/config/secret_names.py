"""Names that look like keys of services, given by mistake: a run's name is in paths, logs and loggers."""

import re

from verl.errors import UserError

KEY = re.compile(
    r"(?:hf_|sk-|AKIA|ASIA|gh[pousr]_|github_pat_|xox[abp]-|glpat-|AIza|wandb_v1_)[A-Za-z0-9_\-]{12,}|\b[0-9a-f]{40}\b|eyJ[\w-]{8,}\.[\w-]{8,}\."
)


def refuse_secret(key: str, name: str) -> None:
    """Raise UserError if a name looks like a secret. The error does not repeat it."""
    if KEY.search(name):
        fix = f"give a name of your own, and put keys into environment variables; if this one was a key, replace it: it may be in {HISTORY}"
        raise UserError("looks like a secret", where=key, fix=fix)


HISTORY = "your shell's history"
