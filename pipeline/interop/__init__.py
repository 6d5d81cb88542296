"""Import models from other programs (Hugging Face and nanoGPT), and export models to Hugging Face.

In this package, *our* model, names and shapes are those of :mod:`pipeline.model.gpt2`. The *canonical name* of a
parameter is its name in our model. Our embedding has padding rows, which the models of other programs do not have.
"""
