"""``python -m glmquant.cli``."""

from . import main

main(prog_name="glmquant")
