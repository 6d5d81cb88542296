"""Import models from Hugging Face and nanoGPT, and export models.

In this package, *our* model, names and shapes are those of :mod:`pipeline.model.gpt2`. The *canonical name* of a
parameter is its name in our model. Only our embedding has padding rows.
"""
