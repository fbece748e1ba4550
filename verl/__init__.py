"""verl: post-training of language models, from a file of questions and answers to a Hugging Face directory."""

__version__ = "0.1.0"
