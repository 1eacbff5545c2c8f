"""A small latent diffusion model of coloured shapes: data, training, checkpoint, evaluation."""
