"""The networks: UNet, autoencoder, text encoders, CLIP."""
