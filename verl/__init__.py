"""verl: post-training of language models, from a file of questions and answers to a Hugging Face directory."""

import logging
import os

__version__ = "0.1.0"

# Large tensors in host memory in pages of 2 MiB: else much of a step on a CPU, and most of one with offloading, is the system
# handing out pages of 4 KiB. PyTorch reads this before its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Where torchao is installed transformers imports it, and it tells of kernels that it cannot load; so does bitsandbytes. None is used here.
for _name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
    logging.getLogger(_name).setLevel(logging.ERROR)
