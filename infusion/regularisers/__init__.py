"""Terms of the loss beside the denoising loss, for any method; each file has one `Regulariser`."""
