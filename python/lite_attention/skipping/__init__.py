"""What a layer remembers from one denoising step to the next."""
