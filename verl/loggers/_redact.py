"""Removal of secrets from a configuration before it leaves the machine; `verl.redaction` has the rules."""

from verl.redaction import HIDDEN as HIDDEN
from verl.redaction import redact as redact
