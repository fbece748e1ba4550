"""Log-probabilities of targets from their logits, the logits giving way to their own gradient in the same pass.

Dimensions: C positions of a chunk, V vocabulary.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None  # PyTorch for CPUs comes without it


def logprobs_with_gradient_(logits_CV: Tensor, target_C: Tensor, slope_C: Tensor, factor: float = 1.0) -> Tensor:
    """Log-probability of each target under softmax(factor * logits), in float32.

    Args:
        logits_CV: contiguous; overwritten with the gradient of sum(slope_C * logprob_C) by the logits.
        target_C: token ids to score.
        slope_C: derivative of what is minimized by each log-probability.
    Returns:
        logprob_C in float32, natural log.
    """
    if HAS_TRITON and logits_CV.is_cuda:
        from verl.engine import softmax_triton

        return softmax_triton.logprobs_with_gradient_(logits_CV, target_C, slope_C, factor)
    scaled_CV = logits_CV.float() * factor if factor != 1.0 or logits_CV.dtype != torch.float32 else logits_CV
    normalizer_C = scaled_CV.logsumexp(-1)
    logprob_C = scaled_CV.gather(1, target_C[:, None]).squeeze(1) - normalizer_C
    # d logprob / d logit = factor * (1 at the target - probability)
    weight_C = slope_C * factor
    gradient_CV = scaled_CV.sub_(normalizer_C[:, None]).exp_().mul_(-weight_C[:, None])
    gradient_CV.scatter_add_(1, target_C[:, None], weight_C[:, None])
    logits_CV.copy_(gradient_CV)
    return logprob_C
