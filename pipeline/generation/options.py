"""Define the allowed values of the options of text generation. This module imports no other module of the project."""

from typing import Literal

Template = Literal["messages", "instruction"]  # the layout of a conversation with the model
WeightsDtype = Literal["fp32", "bf16"]  # the dtype of weights and matrix products
