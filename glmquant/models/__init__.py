"""Running checkpoints: THUDM's first generation as a model of our own, the others as transformers' ``glm``."""
