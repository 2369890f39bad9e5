"""The names of the datasets, read without importing what reads them."""

DATASETS = (
    "digits",
    "fashion_mnist",
    "cifar10",
    "cifar100",
    "oxford_flowers102",
    "oxford_flowers102_subset",
    "tiny_shakespeare",
)
