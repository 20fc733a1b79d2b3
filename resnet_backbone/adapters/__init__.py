"""The backbones inside other libraries' detectors: one module per library, importing only its own.

``torchvision_models``, ``timm_models``, ``huggingface`` and ``mmdetection``. All of them take
weights from any source, build the network that they belong to, and hand on the mean and standard
deviation that they need, or check them.
"""
