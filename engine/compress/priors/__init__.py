from .distilled import distil, mismatch
from .inputs import image_shape
from .pixels import PIXEL_PRIORS, normalise, synthetic_images

__all__ = ["PIXEL_PRIORS", "distil", "image_shape", "mismatch", "normalise", "synthetic_images"]
