"""What the paper (Lee, KDD 2024) reports: its Tables 1 to 4, and what it says of them.

Accuracies are percentages, mean and spread over at least three runs; throughputs are
images a second on two NVIDIA RTX A6000. None of them is ours.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A row of Table 1 but for its results.

    Attributes:
      dataset: As the paper names it.
      model: As the paper names it.
      batch_size: Over both devices.
      learning_rate: The first one; it falls by ten twice.
      epochs: Length of the run.
      alpha: Weight of the perturbed gradient; r is 0.1 everywhere (section 4.2).
      interval: Steps between the ascents of LookSAM, in brackets in Table 1.
      k: Layers that layer-wise SAM perturbs, in brackets in Table 1.
    """

    dataset: str
    model: str
    batch_size: int
    learning_rate: float
    epochs: int
    alpha: float
    interval: int
    k: int


RECIPES: Mapping[str, Recipe] = {
    "cifar10": Recipe("CIFAR-10", "ResNet20", 128, 0.1, 150, 0.8, 3, 4),
    "cifar100": Recipe("CIFAR-100", "Wide-ResNet28", 128, 0.1, 200, 0.8, 2, 4),
    "flowers": Recipe("Oxford_Flowers102", "Wide-ResNet16", 40, 0.1, 100, 0.7, 3, 2),
    "vit": Recipe("CIFAR-100 (Fine-Tuning)", "ViT-b16", 128, 0.001, 10, 0.8, 2, 1),
}
BENCHMARKS = tuple(RECIPES)
METHODS = ("sgd", "generalized_sam", "looksam", "lwsam")

# Table 1.
ACCURACY: Mapping[tuple[str, str], tuple[float, float]] = {
    ("cifar10", "sgd"): (91.96, 0.3),
    ("cifar10", "generalized_sam"): (92.64, 0.4),
    ("cifar10", "looksam"): (92.14, 0.4),
    ("cifar10", "lwsam"): (92.81, 0.3),
    ("cifar100", "sgd"): (79.41, 0.4),
    ("cifar100", "generalized_sam"): (80.83, 0.5),
    ("cifar100", "looksam"): (80.13, 0.3),
    ("cifar100", "lwsam"): (81.25, 0.4),
    ("flowers", "sgd"): (69.82, 0.4),
    ("flowers", "generalized_sam"): (74.77, 0.5),
    ("flowers", "looksam"): (73.53, 0.6),
    ("flowers", "lwsam"): (75.56, 0.6),
    ("vit", "sgd"): (90.73, 0.5),
    ("vit", "generalized_sam"): (91.46, 0.9),
    ("vit", "looksam"): (91.15, 0.7),
    ("vit", "lwsam"): (91.36, 0.5),
}

# Table 2.
THROUGHPUT: Mapping[tuple[str, str], float] = {
    ("cifar10", "sgd"): 659.2,
    ("cifar10", "generalized_sam"): 459.5,
    ("cifar10", "looksam"): 595.2,
    ("cifar10", "lwsam"): 604.2,
    ("cifar100", "sgd"): 229.1,
    ("cifar100", "generalized_sam"): 139.5,
    ("cifar100", "looksam"): 151.0,
    ("cifar100", "lwsam"): 190.7,
    ("flowers", "sgd"): 604.2,
    ("flowers", "generalized_sam"): 401.9,
    ("flowers", "looksam"): 473.6,
    ("flowers", "lwsam"): 463.4,
    ("vit", "sgd"): 77.28,
    ("vit", "generalized_sam"): 49.82,
    ("vit", "looksam"): 50.32,
    ("vit", "lwsam"): 53.97,
}

# Table 3; k as in `RECIPES`.
CRITERIA = ("none", "high", "low", "random")
CRITERION: Mapping[tuple[str, str], tuple[float, float]] = {
    ("cifar10", "none"): (91.63, 0.3),
    ("cifar10", "high"): (92.81, 0.3),
    ("cifar10", "low"): (91.40, 0.5),
    ("cifar10", "random"): (92.46, 0.2),
    ("cifar100", "none"): (79.41, 0.4),
    ("cifar100", "high"): (81.25, 0.4),
    ("cifar100", "low"): (80.01, 0.9),
    ("cifar100", "random"): (80.67, 0.5),
    ("flowers", "none"): (69.82, 0.4),
    ("flowers", "high"): (75.36, 0.6),
    ("flowers", "low"): (71.76, 1.1),
    ("flowers", "random"): (72.45, 0.9),
}

# Table 4: mean, spread, images a second.
KS: tuple[int | str, ...] = (1, 2, 4, 8, "all")
BY_K: Mapping[tuple[str, int | str], tuple[float, float, float]] = {
    ("cifar10", 1): (92.51, 0.5, 628.5),
    ("cifar10", 2): (92.57, 0.4, 617.0),
    ("cifar10", 4): (92.81, 0.3, 604.2),
    ("cifar10", 8): (92.77, 0.5, 564.5),
    ("cifar10", "all"): (92.64, 0.4, 459.5),
    ("cifar100", 1): (80.12, 0.3, 229.1),
    ("cifar100", 2): (80.81, 0.7, 194.6),
    ("cifar100", 4): (81.25, 0.4, 190.7),
    ("cifar100", 8): (81.93, 0.5, 160.0),
    ("cifar100", "all"): (80.83, 0.5, 139.5),
    ("flowers", 1): (74.93, 0.5, 482.6),
    ("flowers", 2): (75.56, 0.6, 463.4),
    ("flowers", 4): (76.31, 1.1, 442.9),
    ("flowers", 8): (76.70, 0.9, 427.5),
    ("flowers", "all"): (74.77, 0.5, 401.9),
}

# What to know before comparing: by table, in which numbers of the paper disagree.
NOTES: Mapping[str, tuple[str, ...]] = {
    "table1": (
        "The spreads of 0.3 to 0.9 points are of the size of many gaps between the"
        " methods.",
        "The interval of LookSAM is 3, 2, 3, 2 here and 3, 2, 3 in Figure 5, but 3, 4,"
        " 3, 2 in the text on Table 2.",
        "The text says that layer-wise SAM has the highest accuracy of CIFAR-10,"
        " CIFAR-100 and the ViT; of the ViT, generalised SAM has (91.46 against 91.36).",
    ),
    "table2": (
        "The interval of LookSAM is 3, 4, 3, 2 in the text on this table, and 3, 2, 3,"
        " 2 in Table 1.",
        "By this table layer-wise SAM is 8.3 %, 16.8 % and 23.3 % below SGD on CIFAR-10,"
        " CIFAR-100 and Flowers. The text says 8.5 %, 16.8 % and 25.4 %, and 11 % for"
        " CIFAR-10 in the introduction.",
    ),
    "table3": (
        "CIFAR-10 without perturbation is 91.63 here and 91.96 in Table 1 (SGD).",
        "Flowers with the highest norms is 75.36 here and 75.56 in Tables 1 and 4.",
    ),
    "table4": (
        "CIFAR-100 at k = 1 runs at 229.1 images/s, which is SGD's throughput in Table"
        " 2 to the last digit.",
        "The text says that the accuracy stops rising at some k; on CIFAR-100 and"
        " Flowers it still rises up to k = 8, the most that was tried short of all.",
    ),
}

# What the paper says each artefact shows; for a figure all there is to compare with.
CLAIMS: Mapping[str, str] = {
    "table1": "Layer-wise SAM on one to four layers is as accurate as generalised SAM or"
    " a little more; LookSAM lies between SGD and these two.",
    "table2": "Layer-wise SAM trains faster than generalised SAM everywhere, and faster"
    " than LookSAM on all benchmarks but Flowers.",
    "table3": "The layers of the largest gradient norm are the ones to perturb: layers"
    " drawn at random do less, and those of the smallest norm least.",
    "table4": "A few layers give the accuracy of all of them, and every layer more costs"
    " throughput.",
    "figure1": "The gradient norm of a layer is steady while the learning rate is, and"
    " some layers near the output have much larger norms than the others (ResNet-20 on"
    " CIFAR-10, WRN-16 on Flowers).",
    "figure2": "The layers of a WRN-16 trained on Flowers differ much in how sharp the"
    " loss is around them, when one layer at a time is moved along two orthonormal"
    " random directions.",
    "figure3": "The training loss falls more slowly with any SAM than with SGD; the"
    " accuracy ends higher (CIFAR-10, CIFAR-100, Flowers).",
    "figure4": "Every SAM lowers the gradient norm of the full model, layer-wise SAM even"
    " more than generalised SAM. After the learning rate has fallen, the norm is above"
    " that of SGD (CIFAR-10, CIFAR-100, Flowers).",
    "figure5": "Generalised SAM perturbs every layer in every step, LookSAM all at its"
    " interval, layer-wise SAM only k layers a step, most often those near the output.",
    "figure6": "Trained with layer-wise SAM, the layers of Figure 2 lie in much flatter"
    " surroundings, above all those near the output.",
    "lm": "The paper names language modelling among its benchmarks and prints no numbers"
    " of it: nothing published stands beside these.",
    "theorem1": "While the learning rate and the radius are at most 1/(2 β), the mean"
    " squared gradient norm stays below the bound of Eq. 7, whichever layers are"
    " perturbed.",
}


def accuracy(mean: float, spread: float) -> str:
    """Return an accuracy as a cell of a table."""
    return f"{mean:.2f} ± {spread:.1f} %"
