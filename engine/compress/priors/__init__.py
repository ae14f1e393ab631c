from .pixels import PIXEL_PRIORS, PRIORS_VERSION, normalise, synthetic_images

__all__ = ["PIXEL_PRIORS", "PRIORS_VERSION", "normalise", "synthetic_images"]
