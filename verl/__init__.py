"""verl: post-training of language models, from a file of questions and answers to a Hugging Face directory."""

import logging

__version__ = "0.1.0"

# Where torchao is installed transformers imports it, and it tells of kernels that it cannot load; so does bitsandbytes. None is used here.
for _name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
    logging.getLogger(_name).setLevel(logging.ERROR)
