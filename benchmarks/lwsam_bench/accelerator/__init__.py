"""The GPU's part of the evidence: races of full-size networks, and runs on CIFAR-10."""
