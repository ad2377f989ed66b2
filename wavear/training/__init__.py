"""What `wavear.train` is made of: bits per sample, the Lightning module and its callbacks, files of a run."""
