"""AdamW (arXiv:1711.05101), with moments in float32.

On a GPU it is our own fused kernel. On a CPU it is PyTorch's, or torchao's for bfloat16 weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from verl.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from verl.engine.fused_adamw import FusedAdamW
    from verl.engine.optim import Optimizer

rounds_bfloat16 = True


@dataclass
class Settings:
    # Decay rates of the first and second moment.
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])

    def check(self) -> None:
        """Raises UserError naming the key."""
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise UserError(f"found {list(self.betas)}", where="betas", fix="give two numbers from 0 to below 1, such as [0.9,0.95]")


def state_bytes() -> float:
    return 2 * 4.0


def build(
    groups: list[dict[str, Any]], settings: Settings, *, lr: float, copies: "Mapping[nn.Parameter, Tensor]", eight_bit: bool = False
) -> "Optimizer | FusedAdamW":
    """Build AdamW with the implementation for the device and dtypes.

    Args:
        eight_bit: whether moments have 8 bits; otherwise they are float32.
    Raises:
        UserError: 8-bit moments or bfloat16 weights on a CPU, without torchao.
    """
    import torch

    from verl.dist import HAS_TRITON
    from verl.engine.fused_adamw import FusedAdamW

    parameters = [p for group in groups for p in group["params"]]
    betas = (settings.betas[0], settings.betas[1])
    if HAS_TRITON and parameters[0].device.type == "cuda":
        return FusedAdamW(groups, lr=lr, betas=betas, eight_bit=eight_bit, copies=copies)
    if not eight_bit and all(p.dtype != torch.bfloat16 for p in parameters):
        return with_zero_moments(torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True))
    try:
        from verl.engine.compact_adamw import CompactAdamW
    except ImportError as error:
        where = "optim.name=adamw_8bit" if eight_bit else "model.param_dtype=bfloat16"
        raise UserError(f"needs torchao: {error}", where=where, fix='pip install "verl[8bit]"') from error
    return CompactAdamW(groups, lr=lr, betas=betas, eight_bit=eight_bit)


def with_zero_moments(optimizer: Any) -> "Optimizer":
    """Create the state that PyTorch's AdamW creates in its first step, so that a checkpoint can be loaded into it before."""
    import torch

    for group in optimizer.param_groups:
        for p in group["params"]:
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device), **moments}
    filled: Optimizer = optimizer
    return filled
