"""Builds guest images from Debian packages: a kernel, an initramfs and a root disk that many VMs share."""

from hva_images.build import ensure_image
from hva_images.cache import GuestImage, list_images
from hva_images.spec import DEFAULT, ImageSpec, load_image_spec

__all__ = ["DEFAULT", "GuestImage", "ImageSpec", "ensure_image", "list_images", "load_image_spec"]
