"""CIFAR-10, ImageNet weights, a person's own pictures: verified before they are used."""
