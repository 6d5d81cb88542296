"""Exchange checkpoints with other programs: Hugging Face, nanoGPT.

In this package, *our* model, names and shapes are those of :mod:`pipeline.model.gpt2`. The *canonical name* of a
parameter is its name in our model. Our embedding has padding rows, which the other programs do not have.
"""
