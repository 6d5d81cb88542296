"""Define GPT-2 and its layers. This package does not depend on a backend."""
