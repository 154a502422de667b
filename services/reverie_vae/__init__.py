"""The VAE service: image files in, references to latents out, and back to PNG files."""
