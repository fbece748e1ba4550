"""The libraries that this is built on, kept quiet."""

import logging
import warnings


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and advice out of what a run says."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)  # of a checkpoint in compiled code
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft")
