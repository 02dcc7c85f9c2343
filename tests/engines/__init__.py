"""Converted checkpoints in real engines; ``make test-engines`` runs this, pytest does not collect it.

Every engine lives in an environment of its own, built once and kept in the cache. It loads what ``glmquant convert``
wrote from one real language model and continues a few prompts. Stock transformers, given the same weights as glmquant
decodes them, judges every token.
"""
