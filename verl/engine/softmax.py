"""Log-probabilities of targets from logits: with entropies, or with the gradient, which overwrites the logits in the same pass.

Dimensions: C positions of a chunk, V vocabulary.
"""

import torch
from torch import Tensor

from verl.kernels import HAS_TRITON


def logprobs_with_gradient_(logits_CV: Tensor, target_C: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of each target under softmax(factor * logits), and its gradient with respect to the logits.

    The gradient is returned as a scale per row and an unscaled matrix that overwrites the logits. It is only used in matmuls, where the
    scale costs next to nothing, while another pass over [C, V] would not. The derivative of the loss with respect to the log-probability
    can be multiplied into the scale.

    Args:
        logits_CV: contiguous; overwritten, so that `scale_C[:, None] * logits_CV` is the gradient.
        target_C: token ids to score.
    Returns:
        logprob_C, natural log, and scale_C; both float32.
    """
    if HAS_TRITON and logits_CV.is_cuda:
        from verl.engine import softmax_triton

        return softmax_triton.logprobs_with_gradient_(logits_CV, target_C, factor)
    scaled_CV = logits_CV if factor == 1.0 and logits_CV.dtype == torch.float32 else logits_CV.float() * factor
    at_target_C, highest_C = scaled_CV.gather(1, target_C[:, None]).squeeze(1), scaled_CV.amax(-1)
    # In place from here on: on a CPU, each copy of the logits takes as long as the exponentials.
    power_CV = scaled_CV.sub_(highest_C[:, None]).exp_()
    total_C = power_CV.sum(-1)
    # d logprob / d logit = factor * (1 at the target - power / total)
    power_CV.scatter_add_(1, target_C[:, None], -total_C[:, None])
    if power_CV is not logits_CV:
        logits_CV.copy_(power_CV)
    return at_target_C - (highest_C + total_C.log()), -factor / total_C  # bit for bit equal to `logsumexp`


def logprobs_and_entropy(logits_CV: Tensor, target_C: Tensor, factor: float = 1.0, *, entropy: bool = True) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of each target under softmax(factor * logits) and that distribution's entropy, without a gradient.

    Args:
        logits_CV: contiguous; not changed.
        target_C: token ids to score.
        entropy: whether to compute the entropy; on a GPU it needs no extra pass over the logits, on a CPU it needs one.
    Returns:
        logprob_C, natural log, and entropy_C in nats, empty if not requested; both float32.
    """
    logits_CV = logits_CV.detach()
    if HAS_TRITON and logits_CV.is_cuda:
        from verl.engine import softmax_triton

        logprob_C, entropy_C = softmax_triton.logprobs_and_entropy(logits_CV, target_C, factor)
        return logprob_C, entropy_C if entropy else entropy_C[:0]
    scaled_CV = logits_CV.float() * factor
    total_C = scaled_CV.logsumexp(-1)
    logprob_C = scaled_CV.gather(1, target_C[:, None]).squeeze(1) - total_C
    return logprob_C, entropy_of(scaled_CV, total_C) if entropy else total_C[:0]


def entropy_of(logits_CV: Tensor, total_C: Tensor) -> Tensor:
    """Entropy of softmax(logits), from the logits and their logsumexp: log Z - sum of p * logit."""
    return total_C - ((logits_CV - total_C[:, None]).exp() * logits_CV).sum(-1)
