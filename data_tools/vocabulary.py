"""Describe GPT-2's vocabulary. This module imports nothing, so commands start fast."""

TOKENIZER_NAME = "gpt2"
GPT2_VOCAB_SIZE = 50257
END_OF_TEXT = 50256

#: The SHA-256 of ``Tokenizer.rank_file``. OpenAI publishes this file as ``r50k_base.tiktoken``.
VOCABULARY_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
