"""Packaging of resnet_backbone; tool settings: pyproject.toml, exact pins: constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
CONFIGS = "resnet_backbone.configs"  # the folder configs, as data of the wheel


def read_version() -> str:
    """Return ``__version__`` by reading the text of the package: importing it would need torch."""
    source = ROOT / "resnet_backbone" / "__init__.py"
    match = re.search(r'^__version__ = "([^"]+)"', source.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise RuntimeError(f'{source}: no line of the form __version__ = "X.Y.Z"; add one')
    return match.group(1)


def read_long_description() -> str:
    """Return the README, or nothing in a tree that has none yet."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


CORE = [
    "torch>=2.6",
    "numpy>=1.23",
    "safetensors>=0.4",
]

# The trainer of tools/train_classifier.py: data, engine, report.
CLASSIFICATION = [
    "torch>=2.6",
    "torchvision>=0.21",
    "numpy>=1.23",
    "pillow>=9.1",
    "simplejpeg>=1.8",
    "omegaconf>=2.1,<2.4",
    "tqdm>=4.60",
    "tensorboard>=2.9",
    "matplotlib>=3.6",
    "fsspec>=2023.1",
]

# Tar shards are written with webdataset. nvImageCodec's CPU decoder reads only the part of a JPEG
# that a training crop needs; without it whole images are decoded, to the same pixels.
SHARDS = ["webdataset>=1.0"]
FAST = ['nvidia-nvimgcodec-cu12>=0.9,<1 ; platform_system == "Linux"']

# What Detectron2 needs, without Detectron2 itself: it is not on the package index under its own
# name, and a copy built from git must not be overwritten. tools/setup_env.sh installs it.
DETECTION = [
    "torchvision>=0.21",
    "numpy>=1.23",
    "pillow>=9.1",
    "simplejpeg>=1.8",
    "tqdm>=4.60",
    "fvcore>=0.1.5.post20221221",
    "iopath>=0.1.9",
    "yacs>=0.1.8",
    "pyyaml>=5.4",
    "omegaconf>=2.1,<2.4",
    "hydra-core>=1.1",
    "termcolor>=1.1",
    "tabulate>=0.8",
    "cloudpickle>=2.0",
    "tensorboard>=2.9",
    "pycocotools>=2.0.6",
    "hotcoco>=1.3",  # the same numbers, faster; without it pycocotools computes them
    "matplotlib>=3.6",
    "black>=22.0",
    "packaging>=21.0",
    "opencv-python-headless>=4.6",
    "setuptools>=64,<81",  # Detectron2 imports pkg_resources, which setuptools 81 deprecates away
]

# The built-in pictures of tools/quickstart.sh: real digits, real photographs, no download.
QUICKSTART = [
    "scikit-learn>=1.2",
    "scikit-image>=0.20",
]

# The backbone in other libraries' models: resnet_backbone.adapters. Torchvision's models need
# nothing but torchvision; mmdetection's packages are the user's own.
ADAPTERS = [
    "torchvision>=0.21",
    "timm>=1.0",
    "transformers>=5.0",
]

# ONNX files and their check in onnxruntime; the engines of optimize_for_inference.
EXPORT = [
    "numpy>=1.23",
    "pillow>=9.1",
    "simplejpeg>=1.8",
    "onnx>=1.16",
    "onnxscript>=0.5",
    "onnxruntime>=1.18",
    "openvino>=2024.1",
    "nncf>=2.14",  # int8
]

# The page of tools/demo.py --web. Not part of "all": it needs older versions of Pillow and others.
WEB = ["gradio>=5"]

# RESNET_BACKBONE.LOGGERS of detectors. Not part of "all" either: both bring many packages.
WANDB = ["wandb>=0.16"]
MLFLOW = ["mlflow>=2.10"]

# The site, tools/docs.sh.
DOCS = [
    "sphinx>=8.1",
    "myst-parser>=4.0",
    "furo>=2024.8",
    "sphinxcontrib-mermaid>=1.0",
]

DEV = [
    "pytest>=7.4",
    "pytest-xdist>=3.3",
    "hypothesis>=6.80",
    "ruff>=0.6",
    "shapely>=2.0",  # Detectron2 crops masks with it
]

setup(
    name="resnet_backbone",
    version=read_version(),
    description="The networks of 'Deep Residual Learning' (1512.03385) as Detectron2 backbones",
    long_description=read_long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[*find_packages(include=["resnet_backbone", "resnet_backbone.*"]), CONFIGS],
    package_dir={CONFIGS: "configs"},
    package_data={CONFIGS: ["**/*.yaml"]},
    entry_points={"console_scripts": ["resnet-backbone = resnet_backbone.cli:main"]},
    python_requires=">=3.10",
    install_requires=CORE,
    extras_require={
        "classification": CLASSIFICATION,
        "shards": SHARDS,
        "fast": FAST,
        "detection": DETECTION,
        "quickstart": QUICKSTART,
        "adapters": ADAPTERS,
        "export": EXPORT,
        "web": WEB,
        "wandb": WANDB,
        "mlflow": MLFLOW,
        "docs": DOCS,
        "dev": DEV,
        "all": [
            *(CLASSIFICATION + SHARDS + FAST + DETECTION),
            *(QUICKSTART + ADAPTERS + EXPORT + DOCS + DEV),
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
