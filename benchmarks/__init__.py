"""Measurements of glmquant: the real stand-in model, the peers, and their results."""
