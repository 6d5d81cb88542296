"""Import models from Hugging Face and nanoGPT, and export models.

In this package, *our* model is the one in :mod:`pipeline.model.gpt2`. The *canonical name* of a parameter is its name
in our model. Our embedding has padding rows.
"""
