"""The ImageNet and CIFAR-10 trainer."""
