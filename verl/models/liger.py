"""Liger's Triton kernels for norms, rotary embeddings and MLPs. The loss is still the engine's own."""

import torch
from transformers import PreTrainedModel

from verl.errors import UserError


def use_liger(model: PreTrainedModel, device: torch.device) -> None:
    """Use Liger's kernels in the layers of a loaded model, in place.

    Raises:
        UserError: there is no GPU, Liger is not installed, or it does not support the architecture.
    """
    if device.type != "cuda":
        raise UserError("Liger's kernels need a GPU", where="model.use_liger", fix="set model.use_liger=false")
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise UserError("Liger is not installed", where="model.use_liger", fix='pip install "verl[liger]"') from error
    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(f"Liger has no kernels for {kind}", where="model.use_liger", fix="set model.use_liger=false")
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
