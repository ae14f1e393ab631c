from .distilled import distil, mismatch
from .inputs import image_shape
from .pixels import PIXEL_PRIORS, PRIORS_VERSION, normalise, synthetic_images

__all__ = ["PIXEL_PRIORS", "PRIORS_VERSION", "distil", "image_shape", "mismatch", "normalise", "synthetic_images"]
