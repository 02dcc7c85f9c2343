"""What is measured on a GPU; ``run.sh`` beside this runs the tests and all of it."""
