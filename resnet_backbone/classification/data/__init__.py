"""Classification data: ImageNet, CIFAR-10, shards, built-in digits, augmentation, loader."""
