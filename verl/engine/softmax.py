"""Log-probabilities of targets from their logits: with entropies, or the logits giving way to their own gradient in the same pass.

Dimensions: C positions of a chunk, V vocabulary.
"""

import torch
from torch import Tensor

from verl.kernels import HAS_TRITON


def logprobs_with_gradient_(logits_CV: Tensor, target_C: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax(factor * logits), and its gradient by the logits.

    The gradient comes as a factor for each row and, in place of the logits, what the factor is to be multiplied with: what
    uses the gradient is a matrix product, where the factor costs next to nothing, and a further pass over [C, V] does not.
    The derivative of what is minimized by a log-probability is one more such factor.

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
    # In place from here on: on a CPU each further copy of the logits costs as much time as the exponentials.
    power_CV = scaled_CV.sub_(highest_C[:, None]).exp_()
    total_C = power_CV.sum(-1)
    # d logprob / d logit = factor * (1 at the target - power / total)
    power_CV.scatter_add_(1, target_C[:, None], -total_C[:, None])
    if power_CV is not logits_CV:
        logits_CV.copy_(power_CV)
    return at_target_C - (highest_C + total_C.log()), -factor / total_C  # bit for bit as `logsumexp` has it


def logprobs_and_entropy(logits_CV: Tensor, target_C: Tensor, factor: float = 1.0, *, entropy: bool = True) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax(factor * logits), and the entropy of that distribution. Without a gradient.

    Args:
        logits_CV: contiguous; stays as it is.
        target_C: token ids to score.
        entropy: whether it is asked for; one pass over the logits has both on a GPU, and a CPU takes another for it.
    Returns:
        logprob_C, natural log, and entropy_C in nats, or nothing where it is not asked for; both float32.
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
    """The entropy of softmax(logits), from their logarithm of the sum of exponentials: log Z - sum of p * logit."""
    return total_C - ((logits_CV - total_C[:, None]).exp() * logits_CV).sum(-1)
