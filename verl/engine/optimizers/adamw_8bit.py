"""AdamW with 8-bit moments, quantized in blocks with one scale each (arXiv:2110.02861)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from verl.engine.optimizers import adamw
from verl.engine.optimizers.adamw import Settings as Settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from verl.engine.fused_adamw import FusedAdamW
    from verl.engine.optim import Optimizer

rounds_bfloat16 = True


def state_bytes() -> float:
    from verl.engine.moments import BLOCK

    return 2 * (1 + 4.0 / BLOCK)


def build(
    groups: list[dict[str, Any]], settings: Settings, *, lr: float, copies: "Mapping[nn.Parameter, Tensor]"
) -> "Optimizer | FusedAdamW":
    """Build AdamW with 8-bit moments. Raises UserError: on a CPU without torchao."""
    return adamw.build(groups, settings, lr=lr, copies=copies, eight_bit=True)
