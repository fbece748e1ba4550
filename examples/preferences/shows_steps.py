"""The share of answers that show their steps, a metric of `verl eval`: lines before the result. See docs/preferences.md."""

from typing import Any


def score(prompt: str, response: str, row: dict[str, Any]) -> float:
    lines = [line for line in response.strip().splitlines() if line.strip()]
    return float(len(lines) > 1 and lines[-1].startswith("####"))
