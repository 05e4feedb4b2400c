"""One attention over several GPUs."""
