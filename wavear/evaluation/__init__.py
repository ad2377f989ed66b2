"""What `wavear.evaluate` and `wavear.compare` are made of; docs/evaluation.md has the definitions in one place."""
